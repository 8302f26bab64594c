"""Every CUDA kernel is compiled, for three generations of GPUs, by nvcc or by NVRTC from a wheel; no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import shim
from support.compiling import ARCHITECTURES, FULLY, compiled, every_kernel_for, in_local_memory, resources

from arraybn.kernels import cuda
from arraybn.kernels.cuda import exact, launch, table
from arraybn.kernels.cuda.launch import Kernel

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes of a value
REGISTERS = 65536 // (2 * 256)  # of a thread, so that two blocks of 256 threads fit into a multiprocessor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_keeps_to_its_registers(architecture: str, tmp_path: Path) -> None:
    kernels = shim.all_kernels()
    if architecture != "sm_90":  # the widths between the widest and 1 differ little from them
        kernels = [kernel for kernel in kernels if kernel.width != 4 or kernel.dtype == "float32"]
    found = resources(compiled(launch.source(*kernels), architecture, tmp_path))
    assert set(found) == {kernel.entry for kernel in kernels}
    assert in_local_memory(found) == []
    assert max(of["registers"] for of in found.values()) <= REGISTERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_over_whole_rows_compile_and_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    """All of them, which takes a minute, where ARRAYBN_COMPILE=all; otherwise those that are nearest to a spill."""
    way = "rows" if architecture == "sm_80" else "ring"
    chosen = [*shim.row_kernels("rows"), *shim.row_kernels("ring")]
    if FULLY != "all":
        near = {"dots": SIZES, "forward": SIZES, "backward": SIZES, "affine3": SIZES}
        near |= dict.fromkeys(("forward_masked", "backward_masked", "affine3_masked"), ("float16", "float64"))
        chosen = [
            kernel
            for kernel in shim.row_kernels(way)
            if kernel.dtype in near.get(kernel.name.removesuffix(f"_{way}"), ())
        ]
        chosen = [kernel for kernel in chosen if kernel.width == max(table.WIDTHS[SIZES[kernel.dtype]])]
    near_in_planes = ("affine3_ring_planes_bfloat16_8", "affine2_ring_planes_float64_2")
    chosen += [kernel for kernel in shim.ring_kernels() if FULLY == "all" or kernel.entry in near_in_planes]
    found = resources(compiled(launch.source(*chosen), architecture, tmp_path))
    assert set(found) == {kernel.entry for kernel in chosen}
    assert in_local_memory(found) == []
    assert max(of["registers"] for of in found.values()) <= 65536 // (256 + 32)  # one block on a multiprocessor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_of_exact_mode_compile_and_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    """All of them where `every_kernel_for`; otherwise the widest sums of float32, and the statistics."""
    for layout, threads in (("planes", 256), ("rows", exact.TILE_THREADS)):
        chosen = shim.exact_kernels(layout)
        if not every_kernel_for(architecture):
            sums = [kernel for kernel in chosen if kernel.name.startswith(("squares", "products"))]
            sums = [kernel for kernel in sums if (kernel.dtype, kernel.width) == ("float32", 4)]
            chosen = (*sums, *(kernel for kernel in chosen if "record" in kernel.name))
        found = resources(compiled(launch.source(*chosen), architecture, tmp_path))
        assert set(found) == {kernel.entry for kernel in chosen}
        assert in_local_memory(found) == []
        blocks = 2 if layout == "planes" else 3  # on a multiprocessor
        registers = [of["registers"] for name, of in found.items() if name.startswith(("squares", "products"))]
        assert max(registers) <= 65536 // (blocks * threads) // 8 * 8


def test_a_t4_which_has_fewer_conversions_is_served_too(tmp_path: Path) -> None:
    rows = [kernel for kernel in shim.row_kernels("rows") if kernel.name == "affine2_rows"]
    for kernels in ([kernel for kernel in shim.all_kernels() if kernel.name == "moments_planes"], rows):
        found = resources(compiled(launch.source(*kernels), "sm_75", tmp_path))
        assert set(found) == {kernel.entry for kernel in kernels}
        assert in_local_memory(found) == []


def test_spills_are_found(tmp_path: Path) -> None:
    source = launch.source(Kernel("dots_planes", "float16", 8))
    crowded = source.replace("__launch_bounds__(MOST_THREADS, 2)", "__launch_bounds__(MOST_THREADS, 8)")  # 32 registers
    found = resources(compiled(crowded, "sm_90", tmp_path))
    assert in_local_memory(found) == ["dots_planes_float16_8"]


def test_an_error_of_the_source_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    text = launch.source(Kernel("running", "float32", 1)).replace("DEVICE int items_in(", "DEVICE oops items_in(")
    line = (Path(launch.__file__).parent / "sweeps.cu").read_text().split("DEVICE int items_in(")[0]
    with pytest.raises(AssertionError, match=rf'sweeps.cu"?[(, a-z]*{line.count(chr(10)) + 1}\b.*\n?.*oops'):
        compiled(text, "sm_90", tmp_path)


def test_the_source_includes_nothing_and_keeps_ptx_in_one_place() -> None:
    for file in (*cuda.ROWS, exact.FILE):
        text = launch._text(file)
        assert text.isascii()
        assert not re.search(r"^\s*#\s*include", text, re.MULTILINE)
        assert max(map(len, text.splitlines())) <= 120
        without = re.sub(r"#ifndef ON_CPU.*?#endif  // ON_CPU", "", text, flags=re.DOTALL)
        assert ("asm" in text, "asm" in without) == (file == "values.cuh", False)
