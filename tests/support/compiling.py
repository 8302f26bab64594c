"""Compile CUDA source for a GPU by nvcc or NVRTC, without a GPU, and read how many registers and bytes it takes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from arraybn.kernels.cuda import launch

from .libraries import REQUIRED

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]  # A100, H100 and H200, B200
FULLY = os.environ.get("ARRAYBN_COMPILE", "")  # an architecture for which every kernel is compiled, or "all"
OPTIONS = [*launch.OPTIONS, "-ftz=true"]  # which CuPy adds


def every_kernel_for(architecture: str) -> bool:
    """Return True if not only the kernels that are nearest to a spill are compiled; all together take minutes."""
    return FULLY in ("all", architecture)


def nvrtc() -> ctypes.CDLL | None:
    """Return NVRTC from the wheels nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12, without a driver."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return None


def compiled(text: str, architecture: str, folder: Path, *options: str) -> str:
    """Compile the kernels of `text`; return the report of ptxas."""
    if (nvcc := shutil.which("nvcc")) is not None:
        source = folder / "kernels.cu"
        source.write_text(text, encoding="utf-8")
        command = [nvcc, *OPTIONS, *options, "-Werror", "all-warnings", f"-arch={architecture}", "-Xptxas", "-v"]
        run = subprocess.run(
            [*command, "-cubin", "-o", folder / "kernels.cubin", source], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[:4000]
        return run.stderr
    if (library := nvrtc()) is not None:
        return _compiled_by_nvrtc(library, text, [*OPTIONS, *options, f"-arch={architecture}", "--ptxas-options=-v"])
    if "nvcc" in REQUIRED:
        pytest.fail("there is neither nvcc nor a wheel with NVRTC")
    pytest.skip("there is neither nvcc nor a wheel with NVRTC")


def _compiled_by_nvrtc(library: ctypes.CDLL, text: str, options: list[str]) -> str:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()[:4000]
    return log.value.decode()


NUMBERS = {
    "stack": r"(\d+) bytes stack frame",
    "stores": r"(\d+) bytes spill stores",
    "loads": r"(\d+) bytes spill loads",
    "registers": r"Used (\d+) registers",
}


def resources(report: str) -> dict[str, dict[str, int]]:
    """Return bytes of stack and spills, and registers, of each kernel."""
    found = {}
    for part in re.split(r"Compiling entry function ", report)[1:]:
        matches: Any = {key: re.search(pattern, part) for key, pattern in NUMBERS.items()}
        found[part.split("'")[1]] = {key: int(match[1]) for key, match in matches.items()}
    return found


def in_local_memory(found: dict[str, dict[str, int]]) -> list[str]:
    """Return the kernels that keep something outside the registers."""
    return [name for name, of in found.items() if of["stack"] or of["stores"] or of["loads"]]
