"""The promised names, the modules that importing loads, the order of imports, and README against CI."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from support.imports import imports_among, module_files
from support.libraries import need

import arraybn
from arraybn import kernels, reference

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "arraybn"

PUBLIC = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Module",
    "Moments",
    "Parameter",
    "RankLostError",
    "Sequential",
    "SyncBatchNorm",
    "SyncError",
    "SyncTimeoutError",
    "average_gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_jvp",
    "batch_norm_sums",
    "broadcast_state",
    "fold",
    "free_memory",
    "get_num_threads",
    "inference_mode",
    "interchange",
    "load",
    "moments",
    "network",
    "pool",
    "recompute_running_stats",
    "save",
    "set_memory_limit",
    "set_num_threads",
    "testing",
    "update_running_stats",
]

SIGNATURES = {
    "batch_norm": "(x, weight=None, bias=None, *, mean=None, var=None, moments=None, where=None, eps=1e-05,"
    " channel_axis=1, comm=None, exact=False, out=None, kernels=None)",
    "batch_norm_backward": "(dy, saved, *, sums=None, out=None)",
    "batch_norm_double_backward": "(v, dy, saved, v_weight=None, v_bias=None, *, sums=None)",
    "batch_norm_jvp": "(x_dot, saved, weight_dot=None, bias_dot=None, *, sums=None, out=None)",
    "batch_norm_sums": "(dy, saved, *, v=None, v_weight=None, tangent=False)",
    "moments": "(x, *, where=None, channel_axis=1, exact=False, kernels=None)",
    "get_num_threads": "()",
    "set_num_threads": "(threads)",
    "set_memory_limit": "(limit)",
    "free_memory": "()",
    "pool": "(*moments)",
    "update_running_stats": "(running_mean, running_var, moments, momentum, *, correction=1)",
    "BatchNorm1d": "(num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, *,"
    " bias=True, exact=False, channel_axis=1, dtype=None, device=None, xp=None)",
    "SyncBatchNorm": "(num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True,"
    " process_group=None, *, comm=None, bias=True, exact=False, channel_axis=1, dtype=None, device=None, xp=None,"
    " timeout=600.0)",
    "broadcast_state": "(model, comm, *, timeout=600.0)",
    "average_gradients": "(model, comm, *, weight, exact=False, timeout=600.0)",
    "fold": "(layer)",
    "inference_mode": "()",
    "recompute_running_stats": "(model, batches, *, comm=None, layer_by_layer=False)",
    "save": "(state, path)",
    "load": "(path)",
}

SILENT = {
    "save",
    "recompute_running_stats",
    "broadcast_state",
    "average_gradients",
    "set_num_threads",
}  # return nothing


def test_the_public_names_are_these() -> None:
    assert arraybn.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(arraybn, name).__doc__
    shown = {name for name in vars(arraybn) if not name.startswith("_")}
    submodules = {path.stem for path in PACKAGE.iterdir()}
    assert shown - submodules - set(PUBLIC) == set()
    assert re.fullmatch(r"\d+\.\d+\.\d+", arraybn.__version__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_these(name: str) -> None:
    signature = inspect.signature(getattr(arraybn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_conversion_has_this_signature() -> None:
    signature = inspect.signature(arraybn.SyncBatchNorm.convert_sync_batchnorm)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == "(module, process_group=None, *, timeout=Ellipsis)"


HERE = [name for name, path in kernels.MODULES.items() if importlib.util.find_spec(path) is not None]
FUSED = ("forward", "backward", "evaluate", "update_running_stats", "widened")


@pytest.mark.parametrize("name", HERE)
def test_every_kernel_module_has_the_signatures_of_the_protocol(name: str) -> None:
    if name == "cpu":
        need("numba")
    module = importlib.import_module(kernels.MODULES[name])
    masks = bool(getattr(module, "MASKS", False))
    for sweep in kernels.SWEEPS:
        wanted = list(inspect.signature(getattr(reference.Sweeps, sweep)).parameters.values())[1:]
        wanted = [parameter for parameter in wanted if masks or parameter.name not in ("where", "skip_zeros")]
        assert list(inspect.signature(getattr(module, sweep)).parameters.values()) == wanted
    offering = [importlib.import_module(kernels.MODULES[other]) for other in HERE if other != "reference"]
    for function in FUSED:
        offered = [getattr(other, function, None) for other in offering]
        assert len({str(inspect.signature(found)) for found in offered if found}) == 1
    if not name.startswith("cuda"):
        assert kernels.select(numpy.zeros(1), name) is kernels.select(numpy.zeros(1), module) is kernels.backend(name)


@pytest.mark.parametrize("name", HERE)
def test_every_backend_is_complete(name: str) -> None:
    if name == "cpu":
        need("numba")
    backend = kernels.backend(name)
    assert backend.exact is None
    for field in dataclasses.fields(exact_mode := kernels.with_exact_sums(backend)):
        assert getattr(exact_mode, field.name) or field.name == "masks", field.name
    sweeps = kernels.as_backend(
        SimpleNamespace(**{sweep: getattr(reference, sweep) for sweep in kernels.SWEEPS}), "own"
    )
    for operation in ("forward", "backward", "evaluate", "evaluation_backward"):
        given = [*inspect.signature(getattr(backend, operation)).parameters]
        assert given == [*inspect.signature(getattr(sweeps, operation)).parameters], operation


def test_kernels_are_chosen_by_the_array_and_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(kernels.MODULES) == ["reference", "cpu", "cuda_split", "cuda_fused", "cuda", "cuda_cluster"]
    need("numba")
    from arraybn.kernels import cpu

    strict = need("array_api_strict")
    assert kernels.select(numpy.zeros(1)).name == "cpu"
    assert kernels.select(strict.zeros(1)).name == "reference"
    with pytest.raises(TypeError, match=r'kernels: expected a NumPy array for "cpu"; got a array_api_strict array'):
        kernels.select(strict.zeros(1), "cpu")
    half = numpy.zeros(1, numpy.float16)
    assert kernels.select(half).name == ("cpu" if cpu.HALF else "reference")
    monkeypatch.setattr(cpu, "HALF", False)  # LLVM would end the process
    assert kernels.select(half).name == "reference"
    with pytest.raises(TypeError, match="because this processor lacks F16C; got float16"):
        kernels.select(half, "cpu")
    monkeypatch.setattr(kernels, "_has_numba", lambda: False)
    assert kernels.select(numpy.zeros(1)).name == "reference"
    with pytest.raises(ImportError, match=r'kernels: expected numba .*pip install "\S+\[cpu\]"'):
        kernels.select(numpy.zeros(1), "cpu")


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isfunction(getattr(arraybn, n))])
def test_docstrings_have_every_section(name: str) -> None:
    text = inspect.getdoc(getattr(arraybn, name)) or ""
    sections = re.findall(r"^([A-Z]\w+)\n-+$", text, re.MULTILINE)
    signature = inspect.signature(getattr(arraybn, name))
    needed = ["Examples"] + (["Parameters", "Raises"] if signature.parameters else [])
    needed += ["Returns"] if name not in SILENT else []
    assert (signature.return_annotation == "None") == (name in SILENT)
    assert set(needed) <= set(sections)
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"^([*\w, ]+) : ", text, re.MULTILINE))))
    documented |= set(re.findall(r"^\*(\w+)", text, re.MULTILINE))
    assert set(signature.parameters) <= documented


def test_importing_loads_nothing_optional() -> None:
    optional = [
        "numba",
        "cupy",
        "mpi4py",
        "torch",
        "jax",
        "matplotlib",
        "sklearn",
        "tqdm",
        "array_api_strict",
        "safetensors",
        "scipy",
    ]
    code = f"import sys, arraybn; layer = arraybn.BatchNorm1d(2); print(set({optional}) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "set()"


# The rooms of the package, and those that the modules of each may import. A room imports only rooms above it.
ROOMS = {
    "_version": "",
    "_install": "",
    "_plotting": "",
    "_arrays": "",
    "_checks": "_arrays",
    "_plan": "_arrays",
    "reference": "_arrays",
    "exact": "_arrays reference",
    "kernels": "_install _arrays _checks reference exact",
    "statistics": "_arrays _checks reference exact kernels",
    "modules": "_arrays _checks",
    "sync": "_arrays _checks reference exact kernels modules",
    "functional": "_arrays _checks _plan reference exact kernels statistics sync",
    "derivatives": "_arrays statistics sync functional",
    "layers": "_arrays _checks reference statistics modules sync functional",
    "recompute": "_arrays _checks reference modules sync layers",
    "testing": "_install _arrays _checks sync",
    "network": "_arrays _checks reference modules layers",
    "checkpoint": "_install _arrays _checks modules",
    "interchange": "_arrays _checks modules",
    "pytorch": "_arrays _checks reference kernels sync functional derivatives layers",
}
ROOMS["bench"] = " ".join(ROOMS)
ROOMS["accuracy"] = " ".join(ROOMS)
ROOMS["commands"] = " ".join(ROOMS)
ROOMS["__main__"] = "_version commands"
ROOMS[""] = " ".join(
    room for room in ROOMS if room not in ("pytorch", "accuracy", "bench", "commands", "__main__")
)  # arraybn/__init__.py


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def wrong_imports(package: Path) -> list[str]:
    """Return the imports from a room into one that it may not import, and a circle among modules, if there is one."""
    edges = {(name, other) for name, imported in imports_among(package).items() for other in imported}
    found = [
        f"{name} imports {other}"
        for name, other in sorted(edges)
        if room_of(name) != room_of(other) and room_of(other) not in ROOMS[room_of(name)].split()
    ]
    modules = graphlib.TopologicalSorter[str]()
    for name, other in edges:
        modules.add(name, other)
    try:
        modules.prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' is imported by '.join(error.args[1])}")
    return found


def test_imports_run_one_way() -> None:
    rooms = list(ROOMS)
    assert all(set(allowed.split()) <= set(rooms[: rooms.index(room)]) for room, allowed in ROOMS.items())
    assert {room_of(name) for name in module_files(PACKAGE)} <= set(ROOMS)
    assert wrong_imports(PACKAGE) == []


PLANTED = [
    ("reference.py", "from .functional import batch_norm", "reference imports arraybn.functional"),
    ("reference.py", "import arraybn.layers as layers", "reference imports arraybn.layers"),
    ("_checks.py", "from . import _arrays, sync", "_checks imports arraybn.sync"),
    ("_arrays/memory.py", "def work():\n    from .. import reference", "memory imports arraybn.reference"),
    ("kernels/cpu/tiles.py", "def work():\n    from ...layers import at", "tiles imports arraybn.layers"),
    ("modules.py", "if TYPE_CHECKING:\n    from .layers import BatchNorm1d", "modules imports arraybn.layers"),
    ("testing/oracle.py", "class Late:\n    from arraybn import kernels", "oracle imports arraybn.kernels"),
    ("layers.py", "def work():\n    import arraybn", "layers imports arraybn"),
    ("commands/info.py", "from .. import __main__", "info imports arraybn.__main__"),
    ("network.py", "from .commands import demo", "network imports arraybn.commands.demo"),
    ("kernels/cpu/half.py", "def work():\n    from . import tiles", "a circle"),
    ("sync/frames.py", "from . import SyncError", "a circle"),
    ("kernels/cuda/launch.py", "if TYPE_CHECKING:\n    from .fused import FILES", "a circle"),
    ("testing/scenarios.py", "from .checking import Failure", "a circle"),
]


@pytest.mark.parametrize(("path", "planted", "complaint"), PLANTED)
def test_a_planted_import_against_the_order_is_found(path: str, planted: str, complaint: str, tmp_path: Path) -> None:
    package = tmp_path / "arraybn"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert wrong_imports(package) == []
    with (package / path).open("a", encoding="utf-8") as file:
        file.write(f"\n\n{planted}\n")
    found = wrong_imports(package)
    assert any(complaint in text for text in found), found


def test_the_reference_imports_nothing_but_arrays() -> None:
    imported = imports_among(PACKAGE)["arraybn.reference"]
    assert {room_of(name) for name in imported} == {"_arrays"}


def test_the_reference_calls_only_the_standard() -> None:
    standard = need("array_api_strict")
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    calls = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"xp$|array_namespace\(", ast.unparse(node.value))
    }
    assert calls
    assert {name for name in calls if not hasattr(standard, name)} == set()
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    assert {type(node) for node in stored} <= {ast.Name, ast.Tuple}  # names, never elements: it never writes
    assert not any(isinstance(node, ast.AugAssign) for node in ast.walk(tree))


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 40, f"{path.name}: {node.name} has {lines} lines"


def commands(text: str) -> list[str]:
    """Return the commands that make and use a virtual environment."""
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python3 -m venv")]


def test_readme_and_ci_run_the_same_two_commands() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert len(commands(readme)) == 2
    assert commands(readme) == commands(ci)
    assert "demo" in commands(readme)[0]
    assert "pytest" in commands(readme)[1]


def test_every_equation_of_the_code_stands_in_the_docs() -> None:
    cited = set()
    for path in PACKAGE.rglob("*.py"):
        cited |= set(re.findall(r"\bE\d\b", path.read_text()))
    headings = set(re.findall(r"^## (E\d)\b", (ROOT / "docs" / "maths.md").read_text(), re.MULTILINE))
    assert {"E1", "E2", "E3", "E4", "E5", "E6", "E7"} <= cited
    assert cited <= headings
