"""Jobs of compiled code: how a caller shares one with helper threads, and how the threads share the parts of a job.

A caller makes a job known, works on it itself, and waits only for helpers that have begun. So any number of Python
threads may call: one of them has the helpers, the others work alone. Work is cut into parts by data alone; each part is
done by the first thread that claims it.

Each operation on words of memory is given twice, as in ``half.py``: in Python, where nothing is compiled and nobody
helps, and as the code that Numba makes of a call.
"""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..._arrays.namespaces import Array
from ..threads import ARGUMENTS, ASLEEP, BUSY, CREW, FUNCTION, JOBS, OPEN, RUNNING, STOP
from .tiles import inlined, named_after, plain

PATIENCE = 64  # looks at a word before the core is offered to other threads: the one that is waited for may need it

# ---- Atomic operations -----------------------------------------------------------------------------------------------


def _load(words: Array, i: int) -> Any:
    return words[i]


def _store(words: Array, i: int, value: int) -> None:
    words[i] = value


def _add(words: Array, i: int, value: int) -> Any:
    """Add to a word; return the word as it was."""
    old = int(words[i])
    words[i] += value
    return old


def _swap(words: Array, i: int, value: int) -> Any:
    """Set a word; return the word as it was."""
    old = int(words[i])
    words[i] = value
    return old


def _pause() -> None:
    """Tell the processor that this thread waits for another."""


def _give_way() -> None:
    """Offer the processor to other threads."""


def _operation(python: Any, result: types.Type, build: Callable[[ir.IRBuilder, ir.Value, list[ir.Value]], Any]) -> None:
    """Let compiled code have the instructions that `build` makes, from the place of a word and perhaps a value."""

    def code(context, builder, signature, arguments):
        words = context.make_array(signature.args[0])(context, builder, arguments[0])
        return build(builder, builder.gep(words.data, [arguments[1]]), list(arguments[2:]))

    @intrinsic
    def of_word(typing_context, words, i):
        return result(words, types.intp), code

    @intrinsic
    def of_value(typing_context, words, i, value):
        return result(words, types.intp, types.int64), code

    @overload(python, inline="always")
    def compiled(words, i, value=None):
        if value is None:
            return lambda words, i, value=None: of_word(words, i)
        return lambda words, i, value=None: of_value(words, i, value)


_ORDER = "seq_cst"
_operation(_load, types.int64, lambda code, word, _: code.load_atomic(word, _ORDER, 8))
_operation(_store, types.void, lambda code, word, value: code.store_atomic(*value, word, _ORDER, 8) and None)
_operation(_add, types.int64, lambda code, word, value: code.atomic_rmw("add", word, *value, _ORDER))
_operation(_swap, types.int64, lambda code, word, value: code.atomic_rmw("xchg", word, *value, _ORDER))


def _waiting(python: Any, build: Callable[[ir.IRBuilder], Any]) -> None:
    @intrinsic
    def wait(typing_context):
        return types.void(), lambda context, builder, signature, arguments: build(builder) and None

    overload(python)(lambda: lambda: wait())  # noqa: PLW0108 (Numba wants a function of Python)


def _build_pause(code: ir.IRBuilder) -> None:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        code.call(_declared(code, "llvm.x86.sse2.pause", ir.VoidType()), [])
    elif machine in ("aarch64", "arm64"):
        yield_ = ir.Constant(ir.IntType(32), 1)
        code.call(_declared(code, "llvm.aarch64.hint", ir.VoidType(), yield_.type), [yield_])


def _build_give_way(code: ir.IRBuilder) -> None:
    if os.name == "posix":
        code.call(_declared(code, "sched_yield", ir.IntType(32)), [])


def _declared(code: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    return cgutils.get_or_insert_function(code.module, ir.FunctionType(result, arguments), name)


_waiting(_pause, _build_pause)
_waiting(_give_way, _build_give_way)


@plain
def _rest(looks: int) -> None:
    """Wait a moment, after so many looks in vain."""
    if looks % PATIENCE == PATIENCE - 1:
        _give_way()
    else:
        _pause()


# ---- Calls by address ------------------------------------------------------------------------------------------------
# A function of (number, number, *arguments) is handed to another thread, or to code that was compiled without it, as
# two addresses: that of a C function, and that of the arguments, a tuple on the stack of the caller.

_C = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * 3)


def address_of(function: Any, arguments: tuple[types.Type, ...]) -> Any:
    """Return a function without arguments, to be compiled, that returns the address of the C function."""
    if config.DISABLE_JIT:
        return lambda: function
    function, call = inlined(getattr(function, "py_func", function)), (types.int64, types.int64, *arguments)

    @intrinsic
    def address(typing_context):
        function.compile(call)
        return types.int64(), code

    def code(context, builder, signature, given):
        compiled = function.overloads[call]
        context.active_code_library.add_linking_library(compiled.library)
        outer = ir.Function(builder.module, _C, f"{compiled.fndesc.mangled_name}.c")
        outer.linkage = "internal"
        inner = ir.IRBuilder(outer.append_basic_block())
        pointer = context.get_value_type(types.Tuple(arguments)).as_pointer()
        values = cgutils.unpack_tuple(inner, inner.load(inner.inttoptr(outer.args[0], pointer)))
        callee = context.declare_function(builder.module, compiled.fndesc)
        values = [*outer.args[1:], *values]
        status, _ = context.call_conv.call_function(inner, callee, compiled.fndesc.restype, call, values)
        inner.ret(inner.zext(status.is_error, ir.IntType(32)))
        return builder.ptrtoint(outer, ir.IntType(64))

    def get_address():
        return address()

    get_address.__qualname__ += f".{zlib.crc32(repr(arguments).encode()):x}"
    return named_after(function)(get_address)


def place(arguments: tuple[Any, ...]) -> Any:
    """Return the address of the arguments, for as long as the caller runs."""
    return arguments


def _call(function: Any, place: Any, first: int, second: int) -> bool:
    """Call by address; return True for an error, of which only the lack of memory is possible."""
    function(first, second, *place)
    return False


@intrinsic
def _compiled_place(typing_context, arguments):
    def code(context, builder, signature, given):
        return builder.ptrtoint(cgutils.alloca_once_value(builder, given[0]), ir.IntType(64))

    return types.int64(arguments), code


@intrinsic
def _compiled_call(typing_context, function, place, first, second):
    def code(context, builder, signature, given):
        result = builder.call(builder.inttoptr(given[0], _C.as_pointer()), given[1:])
        return builder.icmp_signed("!=", result, ir.Constant(ir.IntType(32), 0))

    return types.boolean(*[types.int64] * 4), code


@overload(place, inline="always")
def _place_overload(arguments):
    return lambda arguments: _compiled_place(arguments)  # noqa: PLW0108 (Numba wants a function of Python)


@overload(_call, inline="always")
def _call_overload(function, place, first, second):
    return lambda function, place, first, second: _compiled_call(function, place, first, second)  # noqa: PLW0108


# ---- The hand-over ---------------------------------------------------------------------------------------------------


@plain
def share(words: Array, function: Any, place: Any) -> bool:
    """Call a function of (me, crew, *arguments) on this thread, and on all helpers that come in time."""
    crew = 1
    if words.size != 0 and _swap(words, BUSY, 1) == 0:
        crew = _load(words, CREW)
        _store(words, FUNCTION, function)
        _store(words, ARGUMENTS, place)
        _store(words, OPEN, _add(words, JOBS, 1) + 1)
    failed = _call(function, place, 0, crew)
    if crew > 1:
        _store(words, OPEN, 0)
        looks = 0
        while _load(words, RUNNING) != 0:
            _rest(looks)
            looks += 1
        _store(words, BUSY, 0)
    return failed


@plain
def serve(words: Array, me: int, limit: int) -> bool:
    """Take part in jobs until none was there at `limit` looks in a row; return False once there will be no more."""
    last = looks = 0
    while looks < limit:
        job = _load(words, OPEN)
        if job != last and job != 0:  # noqa: PLR1714 (numbers alone, in compiled code)
            _add(words, RUNNING, 1)
            if _load(words, OPEN) == job:  # from here on the caller waits for this thread
                _call(_load(words, FUNCTION), _load(words, ARGUMENTS), me, _load(words, CREW))
                last = job
            _add(words, RUNNING, -1)
            looks = 0
        elif _load(words, STOP) != 0:
            return False
        _rest(looks)
        looks += 1
    _store(words, ASLEEP + me, 1)
    return True


# ---- The parts of a job ----------------------------------------------------------------------------------------------
# A program is a row for each stage: function and place, as addresses; the number of parts in a group; and the kind. The
# function is called with (part, group, *arguments).
#
# The words of a board are: one for errors; for each group, one to claim the group, and one to mark the group for stages
# that are made AGAIN; for each group and stage, one that counts the parts that are done, and one to claim each part.

ONWARDS, BACKWARDS, AGAIN = 0, 1, 2  # kinds; AGAIN: only for groups that an earlier stage has marked


def program(stages: tuple[Any, ...]) -> Any:
    """Return the stages as rows of integers."""
    return stages


@overload(program, inline="always")
def _program_overload(stages):
    return lambda stages: np.array(stages)  # noqa: PLW0108 (Numba wants a function of Python)


@plain
def mark(board: Array, group: int) -> None:
    """Let the group go through the stages that are made AGAIN."""
    _store(board, 1 + 2 * group + 1, 1)


@plain
def _mine(board, word):
    """Return True to the first thread that claims this word."""
    return _load(board, word) == 0 and _add(board, word, 1) == 0


@plain
def _turn(i: int, me: int, crew: int, parts: int, backwards: bool) -> int:
    """Return the i-th part that a thread asks for: of its own share, whose parts are side by side, then of the others.

    So a thread has the same parts in every stage, and finds them in its own cache.
    """
    if backwards:
        return (parts * (me + 1) // crew - 1 - i) % parts
    return (parts * me // crew + i) % parts


@plain
def _stage(me, crew, board, at, group, stages, k):
    """Do the parts that no other thread does, and wait until all are done; `at` is the first word of the stage."""
    parts, done = stages[k][2], 0
    for i in range(parts):
        part = _turn(i, me, crew, parts, stages[k][3] == BACKWARDS)
        if _mine(board, at + 1 + part):
            if _call(stages[k][0], stages[k][1], part, group):
                _store(board, 0, 1)
            done += 1
    if done != 0:
        _add(board, at, done)
    looks = 0
    while _load(board, at) < parts:
        _rest(looks)
        looks += 1


@plain
def work(me, crew, board, cut, stages):
    """Do each group: all threads together, stage by stage; or a group a thread, where a group is one tile."""
    apart, groups = cut.tiles == 1, cut.groups
    words = 0
    for k in range(len(stages)):
        words += 1 + stages[k][2]
    for i in range(groups):
        group = _turn(i, me, crew, groups, False) if apart else i
        if not apart or _mine(board, 1 + 2 * group):
            at = 1 + 2 * groups + group * words
            for k in range(len(stages)):
                if stages[k][3] != AGAIN or _load(board, 1 + 2 * group + 1) != 0:
                    _stage(0 if apart else me, 1 if apart else crew, board, at, group, stages, k)
                at += 1 + stages[k][2]


# ---- Things that a thread may have for itself, as many as there can be threads: a word for each ----------------------


@plain
def borrow(words: Array, first: int, number: int) -> Any:
    """Return which thing nobody else has, of those whose words begin at `first`, and True if nobody ever had it."""
    k = 0
    while True:
        old = _swap(words, first + k, 1)
        if old != 1:
            return k, old == 0
        k = (k + 1) % number


@plain
def give_back(words: Array, i: int) -> None:
    _store(words, i, 2)


@plain
def was_borrowed(words: Array, i: int) -> Any:
    return _load(words, i) != 0
