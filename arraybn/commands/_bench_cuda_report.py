"""What ``bench --device cuda`` shows of its results: the ceilings, the blocks of the table, what follows, the JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ._bench_cases import LARGE_WHATS
from ._bench_clock import Result
from ._bench_cuda_cases import GpuCase
from ._bench_cuda_check import OTHERS, OURS, SUMS
from ._bench_cuda_ranks import LOCAL, SYNC
from ._bench_cuda_session import NO_TIME, GpuCell
from ._bench_report import TITLES, _ms, _plain, _quotient, _spread

OUR_ROWS = ("arraybn fused", "arraybn split")
PEER = "PyTorch"
FEW = 8  # cases that are named
AHEAD = 1.1  # fused is kept where it is so much faster than split


# ---- Figures ---------------------------------------------------------------------------------------------------------


def rate(ceilings: Mapping[str, Any] | None) -> float | None:
    """Bytes a second of a copy in memory; None where it was not measured."""
    copy = (ceilings or {}).get("copy")
    return None if copy is None else copy["gb_per_s"] * 1e9


def floors(case: GpuCase, what: str, speed: float | None) -> tuple[float | None, float | None]:
    """Seconds that the bytes take at the speed of a copy: if x is read once, and if it is read by sums and by map."""
    return _quotient(case.moved(what), speed), _quotient(case.moved_twice(what), speed)


def best(result: Result, what: str) -> tuple[float, str] | None:
    """The fastest of our rows, and its name."""
    found = [(median, row) for row in OUR_ROWS if (median := result.median(row, what)) is not None]
    return min(found, default=None)


def figures(result: Result, cell: GpuCell, speed: float | None) -> dict[str, Any]:
    """The samples of a cell and what follows from them; None where it cannot be said."""
    assert isinstance(result.case, GpuCase)
    q1, median, q3 = cell.quartiles if cell.seconds else (None, None, None)
    one, two = floors(result.case, cell.what, speed)
    ours = best(result, cell.what)
    moved = result.case.moved(cell.what)
    return {
        "row": cell.row,
        "what": cell.what,
        "backend": cell.backend,
        "clock": cell.clock,
        "calls": cell.calls,
        "seconds": cell.seconds,
        "late": cell.late,
        "median": median,
        "q1": q1,
        "q3": q3,
        "bytes": moved,
        "gb_per_s": _quotient(moved / 1e9, median),
        "floor_one_read": one,
        "floor_two_reads": two,
        "of_one_read": _quotient(one, median),
        "of_two_reads": _quotient(two, median),
        "ratio": _quotient(median, None if ours is None else ours[0]),
        "failed": cell.failed or None,
        "left": cell.left or None,
    }


def as_json(result: Result, speed: float | None) -> dict[str, Any]:
    """A case of the table and its cells."""
    cells = [figures(result, cell, speed) for cell in result.cells if isinstance(cell, GpuCell)]
    return {**result.case.as_json(), "bytes_of_x": result.case.nbytes, "skipped": result.skipped or None, "rows": cells}


def host_json(result: Result) -> dict[str, Any]:
    """A case of the host's time and its cells."""
    cells = [
        {
            "row": cell.row,
            "what": cell.what,
            "seconds": cell.seconds,
            "done": cell.done,
            "median": cell.median,
            "median_done": statistics.median(cell.done) if cell.done else None,
            "failed": cell.failed or None,
            "left": cell.left or None,
        }
        for cell in result.cells
        if isinstance(cell, GpuCell)
    ]
    return {**result.case.as_json(), "skipped": result.skipped or None, "rows": cells}


# ---- Words -----------------------------------------------------------------------------------------------------------


def head(device: Mapping[str, Any], versions: Mapping[str, str], ceilings: Mapping[str, Any], command: str) -> str:
    """The device, the versions, what it can do at best, and how to get the same."""
    details = [f"{device['memory'] / 2**30:.0f} GiB", f"{device['l2'] / 2**20:.0f} MiB of L2"]
    if "multiprocessors" in device:
        details += [f"{device['multiprocessors']} multiprocessors, compute capability {device['capability']}"]
        details += [f"CUDA driver {device['driver']}, runtime {device['runtime']}"]
    lines = [f"{device['name']}, {', '.join(details)}"]
    lines += textwrap.wrap(", ".join(f"{name} {version}".strip() for name, version in versions.items()), 110)
    if "failed" in ceilings:
        lines.append(f"ceilings: not measured: {ceilings['failed']}")
    else:
        for key, title in (("copy", "copy"), ("l2_copy", "copy in L2")):
            found = ceilings[key]
            lines.append(
                f"{title}: {found['gb_per_s']:.0f} GB/s, read and written ({found['bytes'] / 1e6:.0f} MB each)"
            )
        launch = {key: f"{value * 1e6:.2f} µs" for key, value in ceilings["launch"].items()}
        lines.append(
            f"empty kernel: {launch['queued']} each when queued, {launch['host']} for the host to launch,"
            f" {launch['waited']} until it is waited for"
        )
    return "\n".join([*lines, f"again: {command}"])


def block(result: Result, speed: float | None) -> str:
    """One case: for each thing that is done its floors, and under them the rows."""
    case = result.case
    assert isinstance(case, GpuCase)
    lines = ["", f"{case}, {case.nbytes / 1e6:.1f} MB"]
    if result.skipped:
        return "\n".join([*lines, f"  {result.skipped}"])
    for what in case.whats:
        cells = [cell for cell in result.cells if isinstance(cell, GpuCell) and cell.what == what]
        lines += ["", _heading(case, what, speed), *(_line(result, cell, speed) for cell in cells)]
    return "\n".join(lines)


def _heading(case: GpuCase, what: str, speed: float | None) -> str:
    one, two = floors(case, what, speed)
    text = f"  {TITLES[what]}"
    if one is not None and two is not None:
        text += f", floor {_ms(one, 1e6)} µs" + (f", read twice {_ms(two, 1e6)} µs" if two != one else "")
    columns = f"{'µs':>10}{'quartiles':>16}{'× arraybn':>11}{'GB/s':>8}{'of floor':>10}{'read twice':>12}"
    return f"{text}\n    {'':<28}{columns}"


def _line(result: Result, cell: GpuCell, speed: float | None) -> str:
    backend = f" ({cell.backend})" if cell.backend and cell.backend not in cell.row else ""
    name = f"    {cell.row + backend:<28}"
    if not cell.seconds:
        return f"{name}   {cell.failed or cell.left or '–'}"
    found = figures(result, cell, speed)
    text = f"{_ms(found['median'], 1e6):>10}{_spread(cell, 1e6):>16}{_plain(found['ratio']):>11}"
    text += f"{found['gb_per_s'] or 0:>8.0f}{_percent(found['of_one_read']):>10}{_percent(found['of_two_reads']):>12}"
    marks = ["by the host's clock"] if cell.clock == "host" else []
    marks += ["waited for the host"] if cell.late > len(cell.seconds) / 2 else []
    return f"{name}{text}" + "".join(f"  {mark}" for mark in marks) + (f"  then {cell.failed}" if cell.failed else "")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def notes(dtypes: Sequence[str]) -> str:
    """What the columns mean, and what was checked before."""
    ours = ", ".join(f"{OURS[one][0]:g} and {OURS[one][1]:g} in {one} ({OTHERS[one]:g})" for one in dtypes)
    texts = [
        "Checked first, on the very shapes, on fresh random data and into NaN, against float64 on the same GPU: y and"
        f" dx of arraybn may be off by {ours}, in ulp of the largest term; in brackets: all others; dweight and dbias"
        f" by {SUMS[0]:g} ({SUMS[1]:g}) ulp of float32. Who is wrong is not timed.",
        "Medians of device time over turns taken one after another, on sets of buffers that L2 cannot hold, the calls"
        " of a sample queued before the first begins. By the host's clock: the library has a stream of its own. GB/s:"
        " the bytes that must be moved if each value is read once, by the time. of floor: the time of these bytes at"
        " the speed of the copy above, by the time; read twice: likewise, if sums and map each read everything.",
        "× arraybn: the time by that of the faster of arraybn fused and arraybn split.",
    ]
    return "\n".join(["", *(textwrap.fill(text, 110) for text in texts)])


# ---- What follows ----------------------------------------------------------------------------------------------------


def summary(results: Sequence[Result], speed: float | None) -> str:
    """For each case, how near arraybn comes to the floor, and how far ahead of PyTorch's choice it is."""
    lines = ["", "arraybn at its fastest: of the one-read floor, and how many times as fast as PyTorch's choice"]
    shown = False
    for result in results:
        words = []
        for what in LARGE_WHATS:
            text = _compared(result, what, speed)
            words.append(f"{text:>26}")
            shown = shown or text != "–"
        lines.append(f"  {result.case!s:<46}{''.join(words)}".rstrip())
    if not shown:
        return ""
    lines.insert(2, f"  {'':<46}{''.join(f'{what:>26}' for what in LARGE_WHATS)}")
    return "\n".join([*lines, *_verdict(results)])


def _compared(result: Result, what: str, speed: float | None) -> str:
    found = best(result, what)
    if found is None:
        return "–"
    assert isinstance(result.case, GpuCase)
    one, _ = floors(result.case, what, speed)
    peer = _quotient(result.median(PEER, what), found[0])
    fraction = "" if one is None else f" {one / found[0]:.0%}"
    return f"{found[1].removeprefix('arraybn ')}{fraction}  {_plain(peer)} ×"


def verdict(results: Sequence[Result]) -> dict[str, Any]:
    """Where fused is worth it, where it is slower than split, and where PyTorch is ahead of both."""
    found: dict[str, Any] = {"compared": 0, "fused_ahead": [], "fused_behind": [], "peer_ahead": []}
    for result in results:
        for what in result.case.whats:
            fused, split = (result.median(row, what) for row in OUR_ROWS)
            ours, peer = best(result, what), result.median(PEER, what)
            name = f"{what} {result.case}"
            found["compared"] += ours is not None
            if fused is not None and split is not None:
                found["fused_ahead"] += [name] if split >= AHEAD * fused else []
                found["fused_behind"] += [name] if split < fused else []
            if ours is not None and peer is not None and peer < ours[0]:
                found["peer_ahead"].append(name)
    return found


def _verdict(results: Sequence[Result]) -> list[str]:
    """How often, and where if it is seldom; the JSON has them all."""
    found = verdict(results)
    titles = {
        "fused_ahead": f"fused at least {AHEAD - 1:.0%} faster than split",
        "fused_behind": "fused slower than split",
        "peer_ahead": "PyTorch's choice faster than both",
    }
    lines = [""]
    for key, title in titles.items():
        count = len(found[key])
        where = f": {'; '.join(found[key])}" if 0 < count <= FEW else ""
        lines += textwrap.wrap(f"{title}: {count} of {found['compared']}{where}", 110, subsequent_indent="  ")
    return lines


def host_table(results: Sequence[Result]) -> str:
    """The time that a call of a layer takes the host, and until the device is done with it."""
    lines = [
        "",
        "A layer's call [µs]: until the host has queued it, back to back; and until the device has done it too",
    ]
    for result in results:
        lines += ["", f"  {result.case}"]
        if result.skipped:
            lines.append(f"    {result.skipped}")
        for cell in result.cells:
            assert isinstance(cell, GpuCell)
            name = f"    {cell.row:<12}{TITLES[cell.what]:<30}"
            if not cell.seconds:
                lines.append(f"{name}{cell.failed or cell.left or NO_TIME}")
                continue
            done = _ms(statistics.median(cell.done), 1e6)
            lines.append(f"{name}{_ms(cell.quartiles[1], 1e6):>10}{_spread(cell, 1e6):>16}{done:>12}")
    return "\n".join(lines)


def ranks_table(found: Mapping[str, Any]) -> str:
    """Two ranks: a synchronized layer beside a local one."""
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
    for shape, what, scheme in medians:
        if scheme == LOCAL:
            local, both = (medians[shape, what, one] for one in (LOCAL, SYNC))
            name = f"{'×'.join(map(str, shape))} {what}"
            lines.append(f"    {name:<22}{_ms(local, 1e6):>14}{_ms(both, 1e6):>16}{_ms(both - local, 1e6):>10}")
    lines += [f"    {'×'.join(map(str, shape))}: {NO_TIME}" for shape in found["left"]]
    return "\n".join(lines)
