"""Results in words and in JSON: the lines at the top, the blocks of the table, the notes, on the CPU and on a GPU."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .cases import LARGE_OPERATIONS, Case
from .contestants.registry import COPYTO
from .gpu_ranks import LOCAL, SYNC
from .gpu_session import NO_TIME
from .output import Column, entries, headings, paragraphs
from .timing import FEWEST, Cell, Result
from .truth import N2, OTHERS

OUR_ROW, PEER = "arraybn", "PyTorch"
OUR_GPU_ROWS = ("arraybn fused", "arraybn split")
TITLES = {
    "forward": "forward (training)",
    "backward": "backward",
    "eval": "forward (evaluation)",
    "layer": "layer(x)",
    "step": "layer(x), layer.backward(dy)",
}
FEW = 8  # cases that are named
AHEAD = 1.1  # fused is kept where it is so much faster than split


def figures(result: Result, cell: Cell) -> dict[str, Any]:
    """Return the samples of a cell on the CPU and the figures that follow; None where one is unknown."""
    found = _samples(result, cell, "library", "row", "calls")
    copy, moved, median = result.median(COPYTO, "copy"), found["bytes"], found["median"]
    return {
        **found,
        "ratio": quotient(median, result.median(OUR_ROW, cell.operation)),
        "copy_fraction": quotient(moved / result.case.moved("copy") * copy if copy else None, median),
        "copy_ratio": quotient(median, copy),
    }


def gpu_figures(result: Result, cell: Cell, speed: float | None) -> dict[str, Any]:
    """Return the samples of a cell on a GPU and the figures that follow; None where one is unknown."""
    found = _samples(result, cell, "row", "backend", "clock", "calls", "late")
    one, two = floors(result.case, cell.operation, speed)
    ours, median = best(result, cell.operation), found["median"]
    return {
        **found,
        "floor_one_read": one,
        "floor_two_reads": two,
        "of_one_read": quotient(one, median),
        "of_two_reads": quotient(two, median),
        "ratio": quotient(median, None if ours is None else ours[0]),
        "left": cell.left or None,
    }


def _samples(result: Result, cell: Cell, *names: str) -> dict[str, Any]:
    q1, median, q3 = cell.quartiles if cell.seconds else (None, None, None)
    moved = result.case.moved(cell.operation)
    return {
        **{name: getattr(cell, name) for name in names},
        "what": cell.operation,
        "seconds": cell.seconds,
        "median": median,
        "q1": q1,
        "q3": q3,
        "bytes": moved,
        "gb_per_s": quotient(moved / 1e9, median),
        "failed": cell.failed or None,
    }


def host_figures(result: Result, cell: Cell) -> dict[str, Any]:
    """Return the samples of a layer's call on the host of a GPU."""
    return {
        "row": cell.row,
        "what": cell.operation,
        "seconds": cell.seconds,
        "done": cell.done,
        "median": cell.median,
        "median_done": statistics.median(cell.done) if cell.done else None,
        "failed": cell.failed or None,
        "left": cell.left or None,
    }


def as_json(result: Result, figures: Callable[..., dict[str, Any]], *speed: float | None) -> dict[str, Any]:
    case, rows = result.case, [figures(result, cell, *speed) for cell in result.cells]
    return {**case.as_json(), "bytes_of_x": case.nbytes, "skipped": result.skipped or None, "rows": rows}


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def rate(ceilings: Mapping[str, Any] | None) -> float | None:
    """Return the bytes a second of a copy in memory; None where it was not measured."""
    copy = (ceilings or {}).get("copy")
    return None if copy is None else copy["gb_per_s"] * 1e9


def floors(case: Case, operation: str, speed: float | None) -> tuple[float | None, float | None]:
    """Return the seconds of the bytes at the speed of a copy: if x is read once, and if sums and map each read it."""
    return quotient(case.moved(operation), speed), quotient(case.moved_twice(operation), speed)


def best(result: Result, operation: str) -> tuple[float, str] | None:
    """Return the fastest of our rows on a GPU: its median and its name."""
    medians = [(result.median(row, operation), row) for row in OUR_GPU_ROWS]
    return min(((median, row) for median, row in medians if median is not None), default=None)


def cpu_block(result: Result, threads: int) -> str:
    """Return the table of a case on the CPU, where `numpy.copyto` used `threads` threads."""
    case, copy = result.case, result.cell(COPYTO, "copy")
    title = f"{case}, {case.nbytes / 1e6:.1f} MB" if case.nbytes >= 1e5 else str(case)
    columns = _time_columns("µs", 1e6) if case.is_small else [*_time_columns("ms", 1e3), *OF_COPY]
    if copy is not None and copy.seconds and not case.is_small:
        median = copy.quartiles[1]
        speed = f"{duration(median)} ms ({spread(copy)}), {case.moved('copy') / median / 1e9:.1f} GB/s"
        title += f"\n  {COPYTO} of x, {_threads(threads)}: {speed}"
    return _block(result, title, lambda operation: f"  {TITLES[operation]:<30}", columns, figures)


def gpu_block(result: Result, speed: float | None) -> str:
    """Return the table of a case on a GPU, where a copy moves `speed` bytes a second."""

    def heading(operation: str) -> str:
        one, two = floors(result.case, operation, speed)
        text = f"  {TITLES[operation]}"
        if one is not None and two is not None:
            text += f", floor {duration(one, 1e6)} µs" + (f", read twice {duration(two, 1e6)} µs" if two != one else "")
        return f"{text}\n{'':<32}"

    title, columns = f"{result.case}, {result.case.nbytes / 1e6:.1f} MB", [*_time_columns("µs", 1e6), *OF_FLOOR]
    return _block(result, title, heading, columns, partial(gpu_figures, speed=speed))


def _block(
    result: Result, title: str, heading: Callable[[str], str], columns: Sequence[Column], figures: Callable[..., Any]
) -> str:
    """Return one case: for each operation a heading, and under it the rows."""
    lines = ["", title, *([f"  {result.skipped}"] if result.skipped else [])]
    for operation in () if result.skipped else result.case.operations:
        lines += ["", heading(operation) + headings(columns)]
        for cell in result.cells:
            if cell.operation == operation:
                backend = f" ({cell.backend})" if cell.backend and cell.backend not in cell.row else ""
                text = f"   {cell.failed or cell.left or '–'}"
                if cell.seconds:
                    text = "  ".join([entries(columns, figures(result, cell)), *_marks(cell)])
                lines.append(f"    {cell.row + backend:<28}{text}")
    return "\n".join(lines)


def _marks(cell: Cell) -> list[str]:
    marks = {
        f"{len(cell.seconds)} turns": len(cell.seconds) < FEWEST,
        "by the host's clock": cell.clock == "host",
        "waited for the host": cell.late > len(cell.seconds) / 2,
        f"then {cell.failed}": cell.failed,
    }
    return [text for text, holds in marks.items() if holds]


def _time_columns(unit: str, scale: float) -> list[Column]:
    return [
        (unit, 10, lambda found: duration(found["median"], scale)),
        ("quartiles", 16, lambda found: f"{duration(found['q1'], scale)}–{duration(found['q3'], scale)}"),
        ("× arraybn", 11, lambda found: _ratio(found["ratio"])),
    ]


def duration(seconds: float, scale: float = 1e3) -> str:
    """Return the time in three digits or so."""
    value = seconds * scale
    return f"{value:.3f}" if value < 0.9995 else f"{value:.2f}" if value < 99.95 else f"{value:.0f}"


def spread(cell: Cell, scale: float = 1e3) -> str:
    q1, _, q3 = cell.quartiles
    return f"{duration(q1, scale)}–{duration(q3, scale)}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 99.5 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


OF_COPY: tuple[Column, ...] = (
    ("GB/s", 8, lambda found: f"{found['gb_per_s']:.1f}"),
    ("of copy", 9, lambda found: _percent(found["copy_fraction"])),
    ("× copyto", 10, lambda found: _ratio(found["copy_ratio"])),
)
OF_FLOOR: tuple[Column, ...] = (
    ("GB/s", 8, lambda found: f"{found['gb_per_s']:.0f}"),
    ("of floor", 10, lambda found: _percent(found["of_one_read"])),
    ("read twice", 12, lambda found: _percent(found["of_two_reads"])),
)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def head(machine: Mapping[str, Any], versions: Mapping[str, str], limit: Cell | None, nbytes: int, command: str) -> str:
    """Return the machine, the versions, the speed of a copy, and how to get the same table."""
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    lines = [f"{machine['processor']}, {cores}, arraybn uses {_threads(machine['threads'])}; {machine['system']}"]
    lines += _versions(versions)
    if limit is None or not limit.seconds:
        lines.append(f"copy limit: not measured{f': {limit.failed}' if limit and limit.failed else ''}")
    else:
        median = limit.quartiles[1]
        by = f"{_threads(machine['threads'])}, {nbytes / 1e6:.1f} MB: {duration(median)} ms ({spread(limit)})"
        lines.append(f"copy limit: {2 * nbytes / median / 1e9:.1f} GB/s ({COPYTO} by {by})")
    return "\n".join([*lines, f"again: {command}"])


def _versions(versions: Mapping[str, str]) -> list[str]:
    return textwrap.wrap(", ".join(f"{name} {version}".strip() for name, version in versions.items()), 110)


def notes(small: bool, dtypes: Sequence[str], checked: int) -> str:
    """Return the meaning of the columns, and what was checked before."""
    ours = " and ".join(f"{N2[dtype][0]:g} (y) and {N2[dtype][1]:g} (gradients) in {dtype}" for dtype in dtypes)
    batches = "a small batch" if checked == 1 else f"{checked} small batches"
    checks = (
        f"Checked first, on {batches}, against 80-bit results: arraybn may be off by {ours}, all others by"
        f" {OTHERS[dtypes[0]]:g}, in ulp of the largest term. Wrong results are not timed."
    )
    times = (
        "Medians over turns taken one after another, each library in a process of its own. × arraybn: the time divided"
        " by that of arraybn into a new array, as the others work; out=: into an array that is there already."
    )
    speeds = (
        "GB/s: the bytes that must be moved (forward: reads x, writes y; backward: reads dy and x, writes dx) by"
        f" the time. of copy: that, by the GB/s of {COPYTO} of the same x; × copyto: the time by that of this copy."
    )
    return paragraphs(checks, times) if small else paragraphs(checks, times, speeds)


def company(load: float | None, cores: int) -> str:
    """Return a warning if other programs worked meanwhile, otherwise ''."""
    if load is None or load < 0.1 * cores:
        return ""
    text = f"NOT ALONE: meanwhile other programs kept {load:.1f} of {cores} cores busy, so these figures are"
    return paragraphs(f"{text} worse than need be, most of all those of libraries that use every core.")


def gpu_head(device: Mapping[str, Any], versions: Mapping[str, str], ceilings: Mapping[str, Any], command: str) -> str:
    """Return the device, the versions, the ceilings, and how to get the same table."""
    details = [f"{device['memory'] / 2**30:.0f} GiB", f"{device['l2'] / 2**20:.0f} MiB of L2"]
    if "multiprocessors" in device:
        details += [f"{device['multiprocessors']} multiprocessors, compute capability {device['capability']}"]
        details += [f"CUDA driver {device['driver']}, runtime {device['runtime']}"]
    lines = [f"{device['name']}, {', '.join(details)}", *_versions(versions)]
    if "failed" in ceilings:
        return "\n".join([*lines, f"ceilings: not measured: {ceilings['failed']}", f"again: {command}"])
    for key, title in (("copy", "copy"), ("l2_copy", "copy in L2")):
        found = ceilings[key]
        lines.append(f"{title}: {found['gb_per_s']:.0f} GB/s, read and written ({found['bytes'] / 1e6:.0f} MB each)")
    launch = {key: f"{value * 1e6:.2f} µs" for key, value in ceilings["launch"].items()}
    host = f"{launch['host']} for the host to launch, {launch['waited']} until it is waited for"
    return "\n".join([*lines, f"empty kernel: {launch['queued']} each when queued, {host}", f"again: {command}"])


def gpu_notes(dtypes: Sequence[str]) -> str:
    """Return the meaning of the columns, and what was checked before."""
    ours = ", ".join(f"{N2[one][0]:g} and {N2[one][1]:g} in {one} ({OTHERS[one]:g})" for one in dtypes)
    sums = f"{N2['float32'][1]:g} ({OTHERS['float32']:g}) ulp of float32"
    return paragraphs(
        "Checked first, on the very shapes, on fresh random data and into NaN, against float64 on the same GPU: y and"
        f" dx of arraybn may be off by {ours}, in ulp of the largest term (halves: or of the result,"
        f" if larger); in brackets: all others; dweight and dbias by {sums}. Wrong results are not timed.",
        "Medians of device time over turns taken one after another, on sets of buffers that L2 cannot hold, the calls"
        " of a sample queued before the first begins. By the host's clock: the library has a stream of its own. GB/s:"
        " the bytes that must be moved if each value is read once, by the time. of floor: the time of these bytes at"
        " the speed of the copy above, by the time; read twice: likewise, if sums and map each read everything.",
        "× arraybn: the time by that of the faster of arraybn fused and arraybn split.",
    )


VERDICTS = {
    "fused_ahead": f"fused at least {AHEAD - 1:.0%} faster than split",
    "fused_behind": "fused slower than split",
    "peer_ahead": "PyTorch's choice faster than both",
}


def summary(results: Sequence[Result], speed: float | None) -> str:
    """Return, for each case, how near arraybn comes to the floor, and how far ahead of PyTorch's choice it is."""
    lines = ["", "arraybn at its fastest: of the one-read floor, and how many times as fast as PyTorch's choice"]
    lines.append(f"  {'':<46}{''.join(f'{operation:>26}' for operation in LARGE_OPERATIONS)}")
    for result in results:
        texts = [f"{_compared(result, operation, speed):>26}" for operation in LARGE_OPERATIONS]
        lines.append(f"  {result.case!s:<46}{''.join(texts)}".rstrip())
    found = verdict(results)
    lines.append("")
    for key, title in VERDICTS.items():
        where = f": {'; '.join(found[key])}" if 0 < len(found[key]) <= FEW else ""  # the JSON has them all
        text = f"{title}: {len(found[key])} of {found['compared']}{where}"
        lines += textwrap.wrap(text, 110, subsequent_indent="  ")
    return "\n".join(lines) if found["compared"] else ""


def _compared(result: Result, operation: str, speed: float | None) -> str:
    found = best(result, operation)
    if found is None:
        return "–"
    fraction = quotient(floors(result.case, operation, speed)[0], found[0])
    share = "" if fraction is None else f" {fraction:.0%}"
    peer = quotient(result.median(PEER, operation), found[0])
    return f"{found[1].removeprefix('arraybn ')}{share}  {_ratio(peer)} ×"


def verdict(results: Sequence[Result]) -> dict[str, Any]:
    """Return where fused is worth it, where it is slower than split, and where PyTorch is ahead of both."""
    found: dict[str, Any] = {"compared": 0, **{key: [] for key in VERDICTS}}
    for result in results:
        for operation in result.case.operations:
            # NaN where nothing was measured: no comparison with it holds
            fused, split, peer = (result.median(row, operation) or math.nan for row in (*OUR_GPU_ROWS, PEER))
            ours, _ = best(result, operation) or (math.nan, "")
            holds = {"fused_ahead": split >= AHEAD * fused, "fused_behind": split < fused, "peer_ahead": peer < ours}
            found["compared"] += ours > 0
            for key in VERDICTS:
                found[key] += [f"{operation} {result.case}"] if holds[key] else []
    return found


def host_table(results: Sequence[Result]) -> str:
    """Return the time that a call of a layer takes the host, and until the device is done with it."""
    title = "A layer's call [µs]: until the host has queued it, back to back; and until the device has done it too"
    lines = ["", title]
    for result in results:
        lines += ["", f"  {result.case}", *([f"    {result.skipped}"] if result.skipped else [])]
        for cell in result.cells:
            text = f"{cell.failed or cell.left or NO_TIME}"
            if cell.seconds:
                done = duration(statistics.median(cell.done), 1e6)
                text = f"{duration(cell.quartiles[1], 1e6):>10}{spread(cell, 1e6):>16}{done:>12}"
            lines.append(f"    {cell.row:<12}{TITLES[cell.operation]:<30}{text}")
    return "\n".join(lines)


def ranks_table(found: Mapping[str, Any]) -> str:
    """Return the times on two ranks: a synchronized layer beside a local one."""
    title = "Two MPI ranks, each with an x of this shape, float32 [µs until the device is done; the slower rank]"
    if "skipped" in found:
        return f"\n{title}\n  skipped: {found['skipped']}"
    lines = ["", title, f"  {found['mpi']}; the layer was checked against float64 on the whole batch, uneven parts"]
    if found["wrong"]:
        return "\n".join([*lines, f"  WRONG: {found['wrong']}"])
    lines.append(f"    {'':<22}{'local':>14}{'synchronized':>16}{'more':>10}")
    medians: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        times = medians.setdefault(f"{_shape(row['shape'])} {row['what']}", {})
        times[row["scheme"]] = statistics.median(row["seconds"])
    for name, times in medians.items():
        local, both = times[LOCAL], times[SYNC]
        text = f"{duration(local, 1e6):>14}{duration(both, 1e6):>16}{duration(both - local, 1e6):>10}"
        lines.append(f"    {name:<22}{text}")
    return "\n".join([*lines, *(f"    {_shape(shape)}: {NO_TIME}" for shape in found["left"])])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
