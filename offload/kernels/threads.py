"""Threads that share the units of a kernel: a parallel loop for a machine that also does other work.

OpenMP's threads meet at the end of every loop, also those that came too late to find work: where another
process has the core of one, each of a token's hundred loops waits for the scheduler. Here units are claimed
one by one, and a loop ends when its units have ended: a thread that is descheduled delays the loop only while
it is in a unit. A thread without work spins for microseconds and then sleeps.

A word holds the number of the loop and that of the next unit. A claim is a compare-and-swap of it: if it
succeeds, the loop had not ended when its description was read, so that the description was consistent. Loops
of two callers do not share the threads: the second caller runs its units itself.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import kernel_cache  # noqa: F401
from .inline import call_compiled, compile_inline

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
BODY = ir.FunctionType(I64, [I8.as_pointer(), I64])
"""Type of a function that takes (context, unit) and returns 0, or 1 if the unit failed."""

WORD, DONE, OWNED, EPOCH, SLEEPERS, LIMIT, UNIT, CONTEXT, COUNT, FAILED = (8 * line for line in range(10))
"""Offsets in the state, a cache line each."""

NUMBER = (1 << 32) - 1
"""The half of the word that is the next unit's number; as a number, one that no loop has."""

LAST = (1 << 31) - 1
"""Loops are numbered modulo the next power of two."""

STATE = "spilld_threads"
"""The symbol by which compiled code finds the state."""

SPINS = 6000
"""How often a thread reads the epoch before it sleeps, longer than the time between two loops of a token; and
how often a caller reads what is done before it yields."""

FUTEX, PAUSE = {
    "x86_64": (202, ("llvm.x86.sse2.pause", [])),
    "aarch64": (98, ("llvm.aarch64.hint", [I32(1)])),
}[platform.machine()]
"""The number of futex(2); LLVM's name for the pause instruction of spin loops, and its arguments."""

WAIT, WAKE = 128, 129
"""Operations of futex(2), for threads of one process."""

_state = np.zeros(8 * 11, np.int64)
_state = _state[-_state.ctypes.data % 64 // 8 :]
llvmlite.binding.add_symbol(STATE, _state.ctypes.data)
_started = [1]
_lock = threading.Lock()


def use(count: int | None) -> None:
    """Set how many threads share a loop from now on, the caller's among them.

    Args:
        count: The number of threads; None means one for each core that this process may use.

    Raises:
        ValueError: The count is not positive.
    """
    count = len(os.sched_getaffinity(0)) if count is None else count
    if count < 1:
        raise ValueError(f"{count} threads cannot run a loop")
    with _lock:
        while _started[0] < count:
            name = f"spilld-compute-{_started[0]}"
            threading.Thread(target=_help, args=(_started[0],), name=name, daemon=True).start()
            _started[0] += 1
        _state[LIMIT] = count


def used() -> int:
    """Return how many threads share a loop."""
    return max(1, int(_state[LIMIT]))


def check(failed: int) -> None:
    """Check how many units of a loop failed; what these should have written is undefined.

    Raises:
        MemoryError: Some units failed, for want of memory.
    """
    if failed:
        raise MemoryError(f"{failed} parts of a kernel got no memory")


def spreading(unit_for: Callable[..., Any], literals: int = 0) -> Any:
    """Return a function for kernels, spread(count, *numbers, *args), that runs a loop on all threads.

    It runs unit(i, *args) for every 0 <= i < count, in any order, and returns how many units failed, for
    want of memory.

    Args:
        unit_for: Returns the unit, a function compiled by numba that returns nothing, for as many numbers as
            `literals`, which kernels capture or name as constants.
        literals: How many leading numbers there are.
    """

    @intrinsic(prefer_literal=True)
    def spread(typing: Any, count: Any, *args: Any) -> Any:
        unit = unit_for(*(kind.literal_value for kind in args[:literals]))
        kinds = (types.int64, *map(types.unliteral, args[literals:]))
        _share.compile(SHARE)

        def build(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            given = cgutils.unpack_tuple(builder, values[1])[literals:]
            block = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, given))
            body = _body(context, builder, compile_inline(context, unit, kinds), block.type)
            share = _share.overloads[SHARE]
            context.active_code_library.add_linking_library(share.library)
            addresses = [builder.ptrtoint(pointer, I64) for pointer in (body, block)]
            _, failed = call_compiled(context, builder, share, [*addresses, values[0]])
            return failed

        return types.int64(types.int64, types.BaseTuple.from_types(args)), build

    return spread


def _body(context: Any, builder: Any, compiled: Any, block: Any) -> Any:
    """Emit a function (context, unit) that calls a unit with the arguments that the context holds."""
    name = builder.module.get_unique_name("spilld_unit")
    function = ir.Function(builder.module, BODY, name)
    function.linkage = "internal"
    inner = ir.IRBuilder(function.append_basic_block())
    stored = inner.load(inner.bitcast(function.args[0], block))
    values = [function.args[1], *cgutils.unpack_tuple(inner, stored)]
    status, _ = call_compiled(context, inner, compiled, values)
    inner.ret(inner.zext(status.is_error, I64))
    return function


SHARE = (types.int64, types.int64, types.int64)

_compiled = njit(nogil=True, error_model="numpy", cache=True)


@_compiled
def _share(body: Any, context: Any, count: Any) -> Any:
    """Run a loop on the caller's thread, and on others where they are free."""
    failed = 0
    if count < 2 or _load(LIMIT) < 2 or not _swap(OWNED, 0, 1):
        for unit in range(count):
            failed += _run(body, context, unit)
        return failed
    number = (_load(WORD) >> 32) + 1 & LAST
    _store(WORD, number << 32 | NUMBER)
    _store(UNIT, body)
    _store(CONTEXT, context)
    _store(COUNT, count)
    _store(DONE, 0)
    _store(FAILED, 0)
    _store(WORD, number << 32)
    _store(EPOCH, number)
    if _load(SLEEPERS):
        _futex(EPOCH, WAKE, LAST)
    _claim()
    looks = 0
    while _load(DONE) < count:
        looks += 1
        _pause() if looks % SPINS else _yield()
    failed = _load(FAILED)
    _store(OWNED, 0)
    return failed


@_compiled
def _claim() -> None:
    """Claim and run units of the current loop while it has any."""
    while True:
        word = _load(WORD)
        unit, count = word & NUMBER, _load(COUNT)
        body, context = _load(UNIT), _load(CONTEXT)
        if unit >= count:
            return
        if _swap(WORD, word, word + 1):
            if _run(body, context, unit):
                _add(FAILED, 1)
            _add(DONE, 1)


@_compiled
def _help(number: Any) -> None:
    """Run a worker thread: take part in loops, spin, sleep."""
    seen = looks = 0
    while True:
        epoch = _load(EPOCH)
        if epoch != seen and number < _load(LIMIT):
            seen, looks = epoch, 0
            _claim()
        elif looks < SPINS:
            looks += 1
            _pause()
        else:
            _add(SLEEPERS, 1)
            _futex(EPOCH, WAIT, epoch)
            _add(SLEEPERS, -1)
            looks = 0


def _place(builder: Any, line: Any) -> Any:
    state = builder.module.globals.get(STATE) or ir.GlobalVariable(builder.module, I64, STATE)
    return builder.gep(state, [line])


@intrinsic
def _load(_typing: Any, _line: Any) -> Any:
    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), build


@intrinsic
def _store(_typing: Any, _line: Any, _value: Any) -> Any:
    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _place(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _add(_typing: Any, _line: Any, _value: Any) -> Any:
    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", _place(builder, args[0]), args[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _swap(_typing: Any, _line: Any, _old: Any, _new: Any) -> Any:
    """Replace the old value by the new one and return whether the old one was there."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_place(builder, args[0]), args[1], args[2], "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), build


@intrinsic
def _run(_typing: Any, _body: Any, _context: Any, _unit: Any) -> Any:
    """Call the function at an address for a unit and return its result."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        body = builder.inttoptr(args[0], BODY.as_pointer())
        return builder.call(body, [builder.inttoptr(args[1], I8.as_pointer()), args[2]])

    return types.int64(types.int64, types.int64, types.int64), build


@intrinsic
def _pause(_typing: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def build(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        name, values = PAUSE
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _yield(_typing: Any) -> Any:
    """Yield the core to another thread."""

    def build(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _futex(_typing: Any, _line: Any, _operation: Any, _value: Any) -> Any:
    """Call futex(2) on the lower half of a line, without a timeout."""

    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
        place = builder.ptrtoint(_place(builder, args[0]), I64)
        builder.call(function, [I64(FUTEX), place, args[1], args[2], I64(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build
