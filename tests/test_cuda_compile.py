"""Every CUDA kernel is compiled, for three generations of GPUs, by nvcc or by NVRTC from a wheel; no GPU is needed."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import REQUIRED
from cuda import shim

from arraybn.kernels.cuda import launch
from arraybn.kernels.cuda.launch import Kernel

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]  # A100, H100 and H200, B200
OPTIONS = [*launch.OPTIONS, "-ftz=true"]  # which CuPy adds
REGISTERS = 65536 // (2 * 256)  # of a thread, so that two blocks of 256 threads fit into a multiprocessor


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC from the wheels nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12, without a driver."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return None


def compiled(text: str, architecture: str, folder: Path, *options: str) -> str:
    """What ptxas says of the kernels of `text`."""
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


def resources(said: str) -> dict[str, dict[str, int]]:
    """Bytes of stack and spills, and registers, of each kernel."""
    found = {}
    for part in re.split(r"Compiling entry function ", said)[1:]:
        matches: Any = {key: re.search(pattern, part) for key, pattern in NUMBERS.items()}
        found[part.split("'")[1]] = {key: int(match[1]) for key, match in matches.items()}
    return found


def in_local_memory(found: dict[str, dict[str, int]]) -> list[str]:
    """The kernels that keep something outside the registers."""
    return [name for name, of in found.items() if of["stack"] or of["stores"] or of["loads"]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_keeps_to_its_registers(architecture: str, tmp_path: Path) -> None:
    kernels = shim.all_kernels()
    if architecture != "sm_90":  # the widths between the widest and 1 differ little from them
        kernels = [kernel for kernel in kernels if kernel.width != 4 or kernel.dtype == "float32"]
    found = resources(compiled(launch.source(*kernels), architecture, tmp_path))
    assert set(found) == {kernel.entry for kernel in kernels}
    assert in_local_memory(found) == []
    assert max(of["registers"] for of in found.values()) <= REGISTERS


def test_a_t4_which_has_fewer_conversions_is_served_too(tmp_path: Path) -> None:
    kernels = [kernel for kernel in shim.all_kernels() if kernel.name in ("moments_planes", "affine2_lines")]
    found = resources(compiled(launch.source(*kernels), "sm_75", tmp_path))
    assert set(found) == {kernel.entry for kernel in kernels}
    assert in_local_memory(found) == []


def test_spills_are_found(tmp_path: Path) -> None:
    source = launch.source(Kernel("dots_lines", "float16", 8))
    crowded = source.replace("__launch_bounds__(MOST_THREADS, 2)", "__launch_bounds__(MOST_THREADS, 6)")  # 42 registers
    found = resources(compiled(crowded, "sm_90", tmp_path))
    assert in_local_memory(found) == ["dots_lines_float16_8"]


def test_an_error_of_the_source_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    text = launch.source(Kernel("running", "float32", 1)).replace("DEVICE int items_in(", "DEVICE oops items_in(")
    line = (Path(launch.__file__).parent / "sweeps.cu").read_text().split("DEVICE int items_in(")[0]
    with pytest.raises(AssertionError, match=rf'sweeps.cu"?[(, a-z]*{line.count(chr(10)) + 1}\b.*\n?.*oops'):
        compiled(text, "sm_90", tmp_path)


def test_the_source_includes_nothing_and_keeps_ptx_in_one_place() -> None:
    for file in launch.SWEEPS:
        text = launch._text(file)
        assert text.isascii()
        assert not re.search(r"^\s*#\s*include", text, re.MULTILINE)
        assert max(map(len, text.splitlines())) <= 120
        without = re.sub(r"#ifndef ON_CPU.*?#endif  // ON_CPU", "", text, flags=re.DOTALL)
        assert ("asm" in text, "asm" in without) == (file == "values.cuh", False)
