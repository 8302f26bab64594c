"""``python -m arraybn bench``: its options; the work is in ``arraybn.bench``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..bench import cpu, gpu, growth, networks, sync, tune
from ..bench.cases import DTYPES, HALVES, LAYOUTS, OPERATIONS, Case
from ..bench.contestants.registry import PEERS
from ..bench.output import RefusedError, check_files
from ..bench.session import BUDGET

HELP = "how fast every batch norm installed here is, on this machine"
DESCRIPTION = """Check every batch norm installed here, then time them in turns: training forward, backward, evaluation,
on the shapes of ResNet-50 in both layouts, and the calls of layers on small inputs."""
EPILOG = """examples
  python -m arraybn bench --quick
  python -m arraybn bench --shapes 32,64,112,112 64,128 --layout first last --dtype float32 float64
  python -m arraybn bench --peers torch --what forward backward --json bench.json --plot bench.png
  python -m arraybn bench --set cache resnet18 --plot set.png
  python -m arraybn bench --growth --plot growth.png
  python -m arraybn bench --ladder
  python -m arraybn bench sync --plot sync.png
  python -m arraybn bench --device cuda --json gpu.json --plot gpu.png

A shape is N,C,… whatever the layout; channels-last has the array (N, …, C). layer: the call of a layer in training;
step: that, and its backward; both are what is timed up to 65,536 elements, unless --what says otherwise.
Ctrl-C prints what has been measured so far.

exit status: 0; 1 if arraybn is wrong; 2 if what was asked cannot be done; 130 after Ctrl-C."""

SYNC_DESCRIPTION = f"""Time what synchronizing over MPI ranks costs: the layers, the exchange between their two sweeps,
and an all-gather scheme beside it. Starts mpirun with {", ".join(map(str, sync.RANKS))} ranks; under mpirun, measures
on the ranks that it is run on."""

HELP_DEVICE = "cuda: on the GPU, with CuPy; ceilings, table, host time, two MPI ranks: under 9 minutes (cpu)"
HELP_DTYPE = "(float32, and float64 for some shapes; cuda: float32 float16 bfloat16; --set: float32)"
PEER_NAMES = [peer.name for peer in PEERS]


class _Subject(argparse.Action):
    """The argument `sync`, after which `--help` shows the options of `bench sync` alone."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        namespace.subject = values
        if values is not None:
            parser.print_help = _sync_parser(parser.prog).print_help  # type: ignore[method-assign]


def _sync_parser(program: str) -> argparse.ArgumentParser:
    """Return a parser that prints the help of `bench sync`."""
    parser = argparse.ArgumentParser(f"{program} sync", description=SYNC_DESCRIPTION)
    parser.add_argument("--quick", action="store_true", help=f"{sync.QUICK_TURNS} turns instead of {sync.TURNS}")
    parser.add_argument("--repeats", type=_repeats, metavar="TURNS", help=f"of each measurement ({sync.TURNS})")
    _add_files(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    help_ = "instead: what synchronizing over MPI ranks costs; starts mpirun, or measures on the ranks it is run on"
    parser.add_argument("subject", action=_Subject, nargs="?", choices=["sync"], help=help_)
    what = parser.add_argument_group("what is timed")
    what.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=HELP_DEVICE)
    what.add_argument("--quick", action="store_true", help="fewer shapes and turns: under a minute")
    help_ = "these shapes instead of those of ResNet-50"
    what.add_argument("--shapes", nargs="+", type=_shape, metavar="N,C,…", help=help_)
    help_ = "instead: the layers of these networks at batch 1, 4, 8 and 32, or five cases from 8 K to 6 M elements"
    what.add_argument("--set", nargs="+", choices=networks.SETS, help=help_)
    what.add_argument("--layout", nargs="+", choices=LAYOUTS, help="where the channels are (both; --shapes: first)")
    what.add_argument("--dtype", nargs="+", choices=[*DTYPES, *HALVES], help=HELP_DTYPE)
    what.add_argument("--what", nargs="+", choices=OPERATIONS, help="(forward backward eval; small inputs: layer step)")
    help_ = f"{', '.join(PEER_NAMES)}; or none (all that are installed; --quick: but for the reference)"
    what.add_argument("--peers", nargs="+", type=_peer, metavar="NAME", help=help_)
    help_ = f"of each contestant ({cpu.ROUNDS}; fewer, at least 3, for one that has had {BUDGET:g} s)"
    what.add_argument("--repeats", type=_repeats, metavar="TURNS", help=help_)
    other = parser.add_argument_group("instead of the table")
    options: Any = {"nargs": "?", "type": _elements, "const": growth.LAST, "metavar": "ELEMENTS"}
    help_ = "time per element along N, C and S, up to so many elements (1e8)"
    other.add_argument("--growth", help=help_, **options)
    other.add_argument("--ladder", action="store_true", help="how the speed was reached, one idea a step")
    other.add_argument("--tune", action="store_true", help="the constants of the CUDA kernels, one changed at a time")
    _add_files(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures there, or to stdout")
    help_ = "draw a PNG (default arraybn-bench.png)"
    files.add_argument("--plot", nargs="?", const="arraybn-bench.png", metavar="FILE", help=help_)


def _shape(text: str) -> tuple[int, ...]:
    words = text.split(",")
    shape = tuple(int(word) for word in words if word.isascii() and word.isdigit())
    if not (2 <= len(shape) == len(words) <= 5 and all(shape)):
        raise argparse.ArgumentTypeError(f"expected two to five integers ≥ 1, as in 32,64,112,112; got {text!r}")
    if Case(shape).elements == shape[1]:
        raise argparse.ArgumentTypeError(f"expected more than one value per channel, or there is no std; got {text!r}")
    return shape


def _peer(text: str) -> str:
    if text not in (*PEER_NAMES, "none"):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PEER_NAMES)}, or none; got {text!r}")
    return text


def _repeats(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1; got {text!r}")
    return int(text)


def _elements(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not growth.FIRST <= value <= 1e10:
        raise argparse.ArgumentTypeError(f"expected a number of elements from 1e3 to 1e10; got {text!r}")
    return int(value)


def run(arguments: argparse.Namespace) -> int:
    """Return 1 if arraybn is wrong, 2 if what was asked cannot be done, 130 after Ctrl-C."""
    try:
        check_files(arguments.plot, arguments.json)
        if arguments.tune:
            return tune.run(arguments.device)
        if arguments.device == "cuda":
            return gpu.GpuBench(arguments).carry_out()
        return sync.run(arguments) if arguments.subject else cpu.Bench(arguments).carry_out()
    except RefusedError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
