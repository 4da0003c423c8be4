"""Code that measures: a program's entry with a clock around every launch, and what a machine does at most.

    text, items = emit_profiled(program, target)

The entry is the usual one, but that it adds to the table PROFILE, for each of the items, the nanoseconds that
it took and the number of times that it ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from graphflow.compiler.emit.builder import F32, I32, I64, PTR, Builder, Module, Value, constant
from graphflow.compiler.emit.entry import Entry
from graphflow.compiler.emit.module import emit_kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.schema import Copy, Launch, Repeat
from graphflow.compiler.target import Target

PROFILE = "profile_table"
FMA_PROBE, TRIAD_PROBE = "fma_probe", "triad_probe"
_CLOCK = "profile_clock"
_T = TypeVar("_T", Launch, Copy)


def emit_profiled(program: KernelProgram, target: Target) -> tuple[str, list[Launch | Copy]]:
    """The program as LLVM text, and the items of its body that are timed, at whatever depth: item i owns the
    words 2 i (nanoseconds) and 2 i + 1 (runs) of PROFILE."""
    module = Module()
    for kernel in program.kernels.values():
        emit_kernel(module, kernel, target)
    _emit_clock(module, target)
    entry = _TimedEntry(module.function(program.plan.name, [("ctx", PTR)], I64), program)
    entry.emit()
    table = f"@{PROFILE} = global [{max(2 * len(entry.items), 1)} x i64] zeroinitializer, align 64\n"
    return table + module.text(), entry.items


class _TimedEntry(Entry):
    """The entry with a clock around each launch and copy, those in loops and branches too."""

    in_tables = False

    def __init__(self, b: Builder, program: KernelProgram):
        super().__init__(b, program)
        self.items: list[Launch | Copy] = []

    def _launch(self, item: Launch) -> None:
        self._timed(item, super()._launch)

    def _by_rows(self, item: Repeat) -> None:
        self._repeat(replace(item, rows=0))       # launch by launch, as clocks need it

    def _copy(self, item: Copy) -> None:
        self._timed(item, super()._copy)

    def _timed(self, item: _T, emit: Callable[[_T], None]) -> None:
        b, place = self.b, 2 * len(self.items)
        self.items.append(item)
        begin = b.call(_CLOCK, I64, [], declare=False)
        emit(item)
        taken = b.sub(b.call(_CLOCK, I64, [], declare=False), begin)
        for word, more in ((place, taken), (place + 1, 1)):
            address = b.gep(Value(PTR, f"@{PROFILE}"), word, I64)
            b.store(b.add(b.load(I64, address), more), address)


def _emit_clock(module: Module, target: Target) -> None:
    """Adds a function that gives the nanoseconds of the system's monotonic clock."""
    b = module.function(_CLOCK, [], I64, internal=True)
    time = b.alloca(I64, 2, align=8)
    monotonic = constant(I32, 6 if target.is_macos else 1)
    b.call("clock_gettime", I32, [monotonic, time])
    seconds, rest = b.load(I64, time), b.load(I64, b.gep(time, 1, I64))
    b.ret(b.add(b.mul(seconds, 1_000_000_000), rest))


# --- the machine's limits


def fma_flops(target: Target) -> int:
    """The operations of one repeat of a task of the FMA probe."""
    return 2 * _sums(target) * _lanes(target)


def _lanes(target: Target) -> int:
    return target.vector_bytes // F32.bytes


def _sums(target: Target) -> int:
    """Enough independent sums to hide the latency of an addition, and few enough to stay in registers."""
    return 3 * target.vector_registers // 4


def emit_fma_probe(module: Module, target: Target) -> None:
    """Adds a kernel that multiplies and adds in registers: args are the address of a float32 for each
    task, and the number of repeats."""
    b = _task_function(module, FMA_PROBE)
    args, begin, end, _ = b.params
    sink, repeats = b.load(PTR, args), b.load(I64, b.gep(args, 1, I64))
    type = F32.vector(_lanes(target))
    with b.loop(begin, end) as task:
        sums = [b.splat(b.cast(b.add(repeats, i), F32), type.lanes) for i in range(_sums(target))]
        with b.loop(0, repeats, carry=sums) as loop:
            fma = b.fma if target.has_fma else lambda x, y, z: b.add(b.mul(x, y), z)
            loop.next(*(fma(x, 0.5, 1.0) for x in loop.carry))
        total = loop.results[0]
        for x in loop.results[1:]:
            total = b.add(total, x)
        b.store(b.extract(total, 0), b.gep(sink, task.index, F32))
    b.ret()


def emit_triad_probe(module: Module, target: Target) -> None:
    """Adds a kernel that sets a = b + s c: args are the three addresses, the number of elements of each task
    (a multiple of 64), and how often each goes over its part."""
    b = _task_function(module, TRIAD_PROBE)
    args, begin, end, _ = b.params
    x, y, z = (b.load(PTR, b.gep(args, i, I64)) for i in range(3))
    count, repeats = (b.load(I64, b.gep(args, i, I64)) for i in (3, 4))
    type, unroll = F32.vector(_lanes(target)), 64 // _lanes(target)
    with b.loop(begin, end) as task:
        first = b.mul(task.index, count)
        with b.loop(0, repeats), b.loop(0, count, 64) as loop:
            for i in range(unroll):
                at = b.add(b.add(first, loop.index), i * type.lanes)
                from_y, from_z = (b.load(type, b.gep(p, at, F32)) for p in (y, z))
                b.store(b.add(from_y, b.mul(from_z, 0.5)), b.gep(x, at, F32))
    b.ret()


def _task_function(module: Module, name: str) -> Builder:
    return module.function(name, [("args", PTR), ("begin", I64), ("end", I64), ("worker", I64)])
