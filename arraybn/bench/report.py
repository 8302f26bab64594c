"""Results in words and in JSON: the lines at the top, the blocks of the table, the notes, on the CPU and on a GPU."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .cases import LARGE_OPERATIONS, Case
from .contestants.registry import COPYTO
from .gpu_ranks import LOCAL, SYNC
from .gpu_session import NO_TIME
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


# ---- Figures ---------------------------------------------------------------------------------------------------------


def figures(result: Result, cell: Cell) -> dict[str, Any]:
    """Return the samples of a cell on the CPU and what follows from them; None where it cannot be said."""
    found = _samples(result, cell, "library", "row", "calls")
    copy, moved, median = result.median(COPYTO, "copy"), found["bytes"], found["median"]
    return {
        **found,
        "ratio": quotient(median, result.median(OUR_ROW, cell.operation)),
        "copy_fraction": quotient(moved / result.case.moved("copy") * copy if copy else None, median),
        "copy_ratio": quotient(median, copy),
    }


def gpu_figures(result: Result, cell: Cell, speed: float | None) -> dict[str, Any]:
    """Return the samples of a cell on a GPU and what follows from them; None where it cannot be said."""
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


def host_figures(cell: Cell) -> dict[str, Any]:
    """Return the samples of a layer's call on the host of a GPU."""
    done = statistics.median(cell.done) if cell.done else None
    found = {"row": cell.row, "what": cell.operation, "seconds": cell.seconds, "done": cell.done}
    problems = {"failed": cell.failed or None, "left": cell.left or None}
    return {**found, "median": cell.median, "median_done": done, **problems}


def as_json(result: Result) -> dict[str, Any]:
    return _case_json(result, [figures(result, cell) for cell in result.cells], bytes_of_x=result.case.nbytes)


def gpu_json(result: Result, speed: float | None) -> dict[str, Any]:
    cells = [gpu_figures(result, cell, speed) for cell in result.cells]
    return _case_json(result, cells, bytes_of_x=result.case.nbytes)


def host_json(result: Result) -> dict[str, Any]:
    return _case_json(result, [host_figures(cell) for cell in result.cells])


def _case_json(result: Result, rows: list[dict[str, Any]], **sizes: int) -> dict[str, Any]:
    return {**result.case.as_json(), **sizes, "skipped": result.skipped or None, "rows": rows}


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


# ---- The blocks ------------------------------------------------------------------------------------------------------


class CpuColumns(NamedTuple):
    """The figures of a block on the CPU, where copies were made by so many threads."""

    threads: int

    def title(self, result: Result) -> list[str]:
        case, copy = result.case, result.cell(COPYTO, "copy")
        lines = [f"{case}, {case.nbytes / 1e6:.1f} MB" if case.nbytes >= 1e5 else str(case)]
        if copy is not None and copy.seconds and not case.is_small:
            speed = case.moved("copy") / copy.quartiles[1] / 1e9
            time = f"{duration(copy.quartiles[1])} ms ({spread(copy)}), {speed:.1f} GB/s"
            lines.append(f"  {COPYTO} of x, {_threads(self.threads)}: {time}")
        return lines

    def heading(self, case: Case, operation: str) -> str:
        columns = f"{'µs' if case.is_small else 'ms':>10}{'quartiles':>16}{'× arraybn':>11}"
        more = "" if case.is_small else f"{'GB/s':>8}{'of copy':>9}{'× copyto':>10}"
        return f"  {TITLES[operation]:<30}{columns}{more}"

    def line(self, result: Result, cell: Cell) -> str:
        name, small = f"    {cell.row:<28}", result.case.is_small
        if not cell.seconds:
            return f"{name}   {cell.failed or '–'}"
        found, scale = figures(result, cell), 1e6 if small else 1e3
        text = f"{duration(found['median'], scale):>10}{spread(cell, scale):>16}{_ratio(found['ratio']):>11}"
        if not small:
            text += f"{found['gb_per_s']:>8.1f}{_percent(found['copy_fraction']):>9}{_ratio(found['copy_ratio']):>10}"
        few = f"  {len(cell.seconds)} turns" if len(cell.seconds) < FEWEST else ""
        return f"{name}{text}{few}" + (f"  then {cell.failed}" if cell.failed else "")


class GpuColumns(NamedTuple):
    """The figures of a block on a GPU, where a copy moves so many bytes a second."""

    speed: float | None

    def title(self, result: Result) -> list[str]:
        return [f"{result.case}, {result.case.nbytes / 1e6:.1f} MB"]

    def heading(self, case: Case, operation: str) -> str:
        one, two = floors(case, operation, self.speed)
        text = f"  {TITLES[operation]}"
        if one is not None and two is not None:
            text += f", floor {duration(one, 1e6)} µs" + (f", read twice {duration(two, 1e6)} µs" if two != one else "")
        columns = f"{'µs':>10}{'quartiles':>16}{'× arraybn':>11}{'GB/s':>8}{'of floor':>10}{'read twice':>12}"
        return f"{text}\n    {'':<28}{columns}"

    def line(self, result: Result, cell: Cell) -> str:
        backend = f" ({cell.backend})" if cell.backend and cell.backend not in cell.row else ""
        name = f"    {cell.row + backend:<28}"
        if not cell.seconds:
            return f"{name}   {cell.failed or cell.left or '–'}"
        found = gpu_figures(result, cell, self.speed)
        text = f"{duration(found['median'], 1e6):>10}{spread(cell, 1e6):>16}{_ratio(found['ratio']):>11}"
        text += f"{found['gb_per_s'] or 0:>8.0f}{_percent(found['of_one_read']):>10}"
        text += f"{_percent(found['of_two_reads']):>12}"
        marks = ["by the host's clock"] if cell.clock == "host" else []
        marks += ["waited for the host"] if cell.late > len(cell.seconds) / 2 else []
        marks += [f"then {cell.failed}"] if cell.failed else []
        return f"{name}{text}" + "".join(f"  {mark}" for mark in marks)


def block(result: Result, columns: CpuColumns | GpuColumns) -> str:
    """Return one case: for each operation a heading, and under it the rows."""
    lines = ["", *columns.title(result)]
    if result.skipped:
        return "\n".join([*lines[:2], f"  {result.skipped}"])
    for operation in result.case.operations:
        shown = [cell for cell in result.cells if cell.operation == operation]
        lines += ["", columns.heading(result.case, operation), *(columns.line(result, cell) for cell in shown)]
    return "\n".join(lines)


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


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


# ---- Above and below the table ---------------------------------------------------------------------------------------


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
    """Return what the columns mean, and what was checked before."""
    ours = " and ".join(f"{N2[dtype][0]:g} (y) and {N2[dtype][1]:g} (gradients) in {dtype}" for dtype in dtypes)
    batches = "a small batch" if checked == 1 else f"{checked} small batches"
    texts = [
        f"Checked first, on {batches}, against 80-bit results: arraybn may be off by {ours}, all others by"
        f" {OTHERS[dtypes[0]]:g}, in ulp of the largest term. Who is wrong is not timed.",
        "Medians over turns taken one after another, each library in a process of its own. × arraybn: the time divided"
        " by that of arraybn into a new array, as the others work; out=: into an array that is there already.",
    ]
    if not small:
        texts.append(
            "GB/s: the bytes that must be moved (forward: reads x, writes y; backward: reads dy and x, writes dx) by"
            f" the time. of copy: that, by the GB/s of {COPYTO} of the same x; × copyto: the time by that of this copy."
        )
    return "\n".join(["", *(textwrap.fill(text, 110) for text in texts)])


def company(load: float | None, cores: int) -> str:
    """Return a warning if other programs worked meanwhile, otherwise ''."""
    if load is None or load < 0.1 * cores:
        return ""
    text = f"NOT ALONE: meanwhile other programs kept {load:.1f} of {cores} cores busy, so these figures are"
    return "\n" + textwrap.fill(f"{text} worse than need be, most of all those of libraries that use every core.", 110)


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
    """Return what the columns mean, and what was checked before."""
    ours = ", ".join(f"{N2[one][0]:g} and {N2[one][1]:g} in {one} ({OTHERS[one]:g})" for one in dtypes)
    sums = f"{N2['float32'][1]:g} ({OTHERS['float32']:g}) ulp of float32"
    texts = [
        "Checked first, on the very shapes, on fresh random data and into NaN, against float64 on the same GPU: y and"
        f" dx of arraybn may be off by {ours}, in ulp of the largest term; in brackets: all others; dweight and dbias"
        f" by {sums}. Who is wrong is not timed.",
        "Medians of device time over turns taken one after another, on sets of buffers that L2 cannot hold, the calls"
        " of a sample queued before the first begins. By the host's clock: the library has a stream of its own. GB/s:"
        " the bytes that must be moved if each value is read once, by the time. of floor: the time of these bytes at"
        " the speed of the copy above, by the time; read twice: likewise, if sums and map each read everything.",
        "× arraybn: the time by that of the faster of arraybn fused and arraybn split.",
    ]
    return "\n".join(["", *(textwrap.fill(text, 110) for text in texts)])


# ---- After the table of a GPU ----------------------------------------------------------------------------------------


def summary(results: Sequence[Result], speed: float | None) -> str:
    """Return, for each case, how near arraybn comes to the floor, and how far ahead of PyTorch's choice it is."""
    lines = ["", "arraybn at its fastest: of the one-read floor, and how many times as fast as PyTorch's choice"]
    lines.append(f"  {'':<46}{''.join(f'{operation:>26}' for operation in LARGE_OPERATIONS)}")
    found = {str(result.case): [_compared(result, one, speed) for one in LARGE_OPERATIONS] for result in results}
    if all(text == "–" for texts in found.values() for text in texts):
        return ""
    lines += [f"  {case:<46}{''.join(f'{text:>26}' for text in texts)}".rstrip() for case, texts in found.items()]
    return "\n".join([*lines, *_verdict(results)])


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
    found: dict[str, Any] = {"compared": 0, "fused_ahead": [], "fused_behind": [], "peer_ahead": []}
    for result in results:
        for operation in result.case.operations:
            fused, split = (result.median(row, operation) for row in OUR_GPU_ROWS)
            ours, peer = best(result, operation), result.median(PEER, operation)
            name = f"{operation} {result.case}"
            found["compared"] += ours is not None
            if fused is not None and split is not None:
                found["fused_ahead"] += [name] if split >= AHEAD * fused else []
                found["fused_behind"] += [name] if split < fused else []
            if ours is not None and peer is not None and peer < ours[0]:
                found["peer_ahead"].append(name)
    return found


def _verdict(results: Sequence[Result]) -> list[str]:
    """Return how often, and where if it is seldom; the JSON has them all."""
    found = verdict(results)
    titles = {
        "fused_ahead": f"fused at least {AHEAD - 1:.0%} faster than split",
        "fused_behind": "fused slower than split",
        "peer_ahead": "PyTorch's choice faster than both",
    }
    lines = [""]
    for key, title in titles.items():
        where = f": {'; '.join(found[key])}" if 0 < len(found[key]) <= FEW else ""
        text = f"{title}: {len(found[key])} of {found['compared']}{where}"
        lines += textwrap.wrap(text, 110, subsequent_indent="  ")
    return lines


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
    medians = {
        (tuple(row["shape"]), row["what"], row["scheme"]): statistics.median(row["seconds"]) for row in found["rows"]
    }
    for shape, operation, scheme in medians:
        if scheme == LOCAL:
            local, both = (medians[shape, operation, one] for one in (LOCAL, SYNC))
            times = f"{duration(local, 1e6):>14}{duration(both, 1e6):>16}{duration(both - local, 1e6):>10}"
            lines.append(f"    {_times(shape) + ' ' + operation:<22}{times}")
    return "\n".join([*lines, *(f"    {_times(shape)}: {NO_TIME}" for shape in found["left"])])


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
