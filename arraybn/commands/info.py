"""``python -m arraybn info``: versions and state of libraries, GPUs and MPI, and the commands that install the rest.

Libraries that are slow to import, or that may end the process, are imported in subprocesses with a time limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .._install import requirement
from .._version import __version__
from ..bench.jobs import launcher

HELP = "what is installed here, what of it works, and how to get the rest"
DESCRIPTION = "Print versions, array namespaces, kernels, MPI and GPUs, and how to install what is missing."

TIME_LIMIT = 10.0  # seconds, for each probe; all run at the same time

EXTRAS = {  # extra: the distributions that the extra installs
    "cpu": ("numba", "ml_dtypes"),
    "cuda12": ("cupy-cuda12x",),
    "cuda13": ("cupy-cuda13x",),
    "mpi": ("mpi4py", "mpich"),
    "demo": ("matplotlib", "numba", "safetensors", "scikit-learn", "tqdm"),
}
NAMESPACES = {  # module: the command that installs a missing module
    "numpy": "pip install numpy",
    "cupy": f"pip install {requirement('cuda12')}  (for CUDA 13: cuda13)",
    "torch": "pip install torch",
    "jax.numpy": "pip install jax",
    "array_api_strict": "pip install array-api-strict",
}

_NAMESPACE_PROBE = """
import importlib.util, json, sys
from arraybn._arrays.namespaces import FLOATS, as_namespace, dtype_name, wide_dtype
xp = as_namespace(importlib.import_module(sys.argv[1]))
wide = dtype_name(wide_dtype(xp.ones(1)))
found = [name for name in FLOATS if hasattr(xp, name) and name in (wide, "float16", "bfloat16", "float32")]
if sys.argv[1] == "numpy" and importlib.util.find_spec("ml_dtypes"):
    import ml_dtypes
    found.insert(1, xp.ones(1, dtype=ml_dtypes.bfloat16).dtype.name)
version = sys.modules[sys.argv[1].partition(".")[0]].__version__
print(json.dumps([version, found]))
"""
_NUMBA_PROBE = """
from arraybn import get_num_threads
from arraybn.kernels.cpu.entries import cache_folder
threads = get_num_threads()
folder = cache_folder() or "no folder, because none can be written"
print(f"{threads} thread{'s' * (threads > 1)}, compiled once and kept in {folder}")
"""
_MPI_PROBE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().replace("\\n", " "), flush=True)
MPI.Init()
MPI.Finalize()
print("started")
"""
_CUPY_PROBE = """
import json, os, pathlib
from cupy.cuda import runtime
devices = [runtime.getDeviceProperties(index) for index in range(runtime.getDeviceCount())]
for found in devices:
    capability = f"compute capability {found['major']}.{found['minor']}"
    print(f"{found['name'].decode()}, {found['totalGlobalMem'] // 2**20} MiB, {capability}")
versions = runtime.driverGetVersion(), runtime.runtimeGetVersion()
driver, library = (f"{version // 1000}.{version % 1000 // 10}" for version in versions)
folder = pathlib.Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
names = b"_planes_", b"_lines_", b"_rows_", b"_ring_"
kept = sum(any(name in file.read_bytes() for name in names) for file in folder.glob("*.cubin"))
state = f"{kept} kernels compiled, kept in {folder}" if kept else f"compiled when first used, kept in {folder}"
print(json.dumps([f"driver {driver}, runtime {library}", state if devices else ""]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--compile`."""
    text = "first compile the CPU kernels for every dtype, so that no later call has to"
    parser.add_argument("--compile", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 0 even if something is missing."""
    if arguments.compile and not _compile():
        return 1
    answers = _ask_all()
    sections = {
        f"arraybn {__version__}": [
            Row("Python", platform.python_version(), sys.executable),
            Row("NumPy", _version("numpy"), "required"),
            Row("array-api-compat", _version("array-api-compat"), "required"),
        ],
        "Namespaces": [_namespace(name, answers.get(name)) for name in NAMESPACES],
        "Kernels": [
            Row("reference", "", "any array; always there"),
            _cpu_kernels(answers.get("numba")),
            _cuda_kernels(answers.get("cupy.cuda")),
        ],
        "MPI": _mpi(answers.get("mpi4py"), answers.get("launcher")),
        "GPUs": _gpus({name: answers[name] for name in ("nvidia-smi", "cupy.cuda") if name in answers}),
        "Extras": [_extra(name) for name in EXTRAS],
    }
    print(_report(sections))
    print(f"\npip here is  {sys.executable} -m pip")
    return 0


def _compile() -> bool:
    """Compile the CPU kernels and print the times; return False without numba."""
    if not _is_installed("numba"):
        print(f"--compile: expected numba; it is not installed. Run: pip install {requirement('cpu')}", file=sys.stderr)
        return False
    from ..kernels.cpu.entries import compile_all

    start = time.monotonic()
    for name in compile_all():
        print(f"compiled, or found compiled, for {name} after {time.monotonic() - start:.1f} s", flush=True)
    print()
    return True


# ---- Probes in subprocesses ----


Answer: TypeAlias = tuple[list[str], str]  # the lines that a probe printed, and its problem or ''


def _ask_all() -> dict[str, Answer]:
    """Run the probes of all installed modules, and nvidia-smi, at the same time."""
    codes = {name: (_NAMESPACE_PROBE, name) for name in NAMESPACES}
    probes = {**codes, "numba": (_NUMBA_PROBE,), "mpi4py": (_MPI_PROBE,), "cupy.cuda": (_CUPY_PROBE,)}
    commands = {name: [sys.executable, "-c", *probe] for name, probe in probes.items() if _is_installed(name)}
    if program := launcher():
        commands["launcher"] = [program, "--version"]
    if program := shutil.which("nvidia-smi"):
        commands["nvidia-smi"] = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(_ask, commands.values()), strict=True))


def _ask(command: Sequence[str]) -> Answer:
    """Run a command; return the printed lines, and the problem or ''."""
    problem = ""
    # files, because a pipe would wait for a grandchild that keeps the pipe open
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        try:
            status = subprocess.run(command, **streams, env=_environment(), timeout=TIME_LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            status, problem = 0, f"no answer within {TIME_LIMIT:g} s"
        for file in (out, err):
            file.seek(0)
        lines, errors = (
            [line.decode(errors="replace").strip() for line in file if line.strip()] for file in (out, err)
        )
    if status < 0:
        problem = f"ended by signal {-status}"
    elif status:
        problem = (errors or lines or [f"exit status {status}"])[-1]
    return lines, problem


def _environment() -> dict[str, str]:
    """Return variables with which Python can import this arraybn and is no rank of a running MPI job."""
    launched = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MPI_LOCAL", "HYDI_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    home = str(Path(__file__).resolve().parents[2])
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))}


# ---- The sections of the report ----


class Row(NamedTuple):
    """A line of the report."""

    name: str
    version: str
    text: str


def _namespace(name: str, answer: Answer | None) -> Row:
    """Return the namespace's version and dtypes, or the reason why it cannot be used."""
    if answer is None:
        return Row(name, "missing", NAMESPACES[name])
    if reason := _reason(answer):
        return Row(name, _version(name.partition(".")[0]), reason)
    version, dtypes = json.loads(answer[0][-1])
    text = ", ".join(dtypes)
    if name == "numpy" and "bfloat16" not in dtypes:
        text += f"  (bfloat16: pip install {requirement('cpu')})"
    if name == "jax.numpy" and "float64" not in dtypes:
        text += "  (float64: jax.enable_x64)"
    return Row(name, version, text)


def _cpu_kernels(answer: Answer | None) -> Row:
    if answer is None:
        return Row("cpu", "missing", f"pip install {requirement('cpu')}")
    return Row("cpu", f"numba {_version('numba')}", _reason(answer) or f"NumPy arrays; {answer[0][-1]}")


def _cuda_kernels(answer: Answer | None) -> Row:
    if answer is None:
        return Row("cuda", "missing", NAMESPACES["cupy"])
    state = "" if _reason(answer) else json.loads(answer[0][-1])[1]
    return Row("cuda", "", f"CuPy arrays; {state}" if state else _reason(answer) or "cannot be used: no GPU")


def _reason(answer: Answer) -> str:
    """Return the reason why a probed module cannot be used, or ''."""
    lines, problem = answer
    return "" if lines and not problem else f"cannot be used: {problem or 'no answer'}"


# What an MPI calls itself, in the text of its library or of its launcher: the MPIs whose ranks find each other
_FAMILIES = {"Open MPI": ("open mpi", "openrte", "prte"), "MPICH": ("mpich", "hydra", "intel", "mvapich", "cray")}


def _family(lines: Sequence[str]) -> str | None:
    """Return the kind of MPI of which the text is; None for an unknown one."""
    text = " ".join(lines).lower()
    return next((name for name, words in _FAMILIES.items() if any(word in text for word in words)), None)


def _mpi(answer: Answer | None, started_by: Answer | None) -> list[Row]:
    rows, built_for = [Row("mpi4py", "missing", f"pip install {requirement('mpi')}")], None
    if answer is not None:
        lines, problem = answer
        library = " ".join(lines[0].split()) if lines and lines[0] != "started" else "unknown"
        built_for = _family([library])
        state = "starts" if "started" in lines else f"does not start: {problem or 'it ended early'}"
        state += f", built for {built_for}" if built_for else ""
        rows = [Row("mpi4py", _version("mpi4py"), state), Row("library", "", _shortened(library))]
    program = launcher()
    if program is None:
        return [*rows, Row("launcher", "", f"missing: pip install {requirement('mpi')} or an MPI of the system")]
    its_own = None if started_by is None else _family(started_by[0])
    text = f"{program}, of {its_own}" if its_own else program
    if built_for and its_own and built_for != its_own:
        text += f"; mpi4py was built for {built_for}, so each rank would be alone. Use the mpirun of {built_for}"
    return [*rows, Row("launcher", "", text)]


def _gpus(answers: Mapping[str, Answer]) -> list[Row]:
    """Return one row for each line that nvidia-smi and CuPy report."""
    rows = []
    for name, (lines, problem) in answers.items():
        texts = [json.loads(line)[0] if line.startswith("[") else line for line in lines]
        rows += [Row(name.partition(".")[0], "", text) for text in ([f"failed: {problem}"] if problem else texts)]
    return rows or [Row("none found", "", "")]


def _extra(name: str) -> Row:
    """Return the versions of an extra's distributions, or the command that installs the missing ones."""
    versions = {distribution: _version(distribution) for distribution in EXTRAS[name]}
    if missing := [distribution for distribution, version in versions.items() if version == "missing"]:
        return Row(name, "missing", f"{', '.join(missing)}: pip install {requirement(name)}")
    return Row(name, "complete", ", ".join(f"{key} {version}" for key, version in versions.items()))


def _is_installed(module: str) -> bool:
    """Return True if the package can be found, without importing the package."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def _shortened(library: str) -> str:
    """Return 'MPICH 5.0.2' or 'Open MPI v5.0.7' from the long text of the library."""
    words = library.partition(",")[0].replace("Version:", "").split()
    return " ".join(words[:2] if words[:1] == ["MPICH"] else words[:8])


def _report(sections: Mapping[str, Sequence[Row]]) -> str:
    """Return headings with their rows, in columns of the same width in all sections."""
    rows = [row for section in sections.values() for row in section]
    name, version = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = []
    for heading, section in sections.items():
        lines += ["", heading]
        lines += [f"  {row.name:<{name}}  {row.version:<{version}}  {row.text}".rstrip() for row in section]
    return "\n".join(lines[1:])
