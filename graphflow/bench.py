"""How near a program's kernels come to what the machine can do: ``graphflow bench ops``; and what compiling
it takes: ``graphflow bench compile``.

    timings = profile(program, random_feeds(program, {"N": 64}))
    print(table(timings, machine(2)))

Every kernel is timed in its place in the step, by clocks in the native code. What bounds it is the roofline:
it takes at least the time of its arithmetic at the measured rate of fused multiply-adds, and at least that of
its least traffic at the bandwidth measured on as much memory as its arguments take. Williams, Waterman and
Patterson, "Roofline", Communications of the ACM 52, 2009. A convolution counts the operations of its
definition: Winograd's algorithm does fewer, and may pass 100%.
"""
from __future__ import annotations

import ctypes
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.errors import UseError
from graphflow.compiler.plan.schema import Copy, Launch, Plan, launches
from graphflow.function import Program, function, install_threads
from graphflow.runtime.arena import address_of, aligned_bytes
from graphflow.state import input as feed

if TYPE_CHECKING:
    from graphflow.compiler.kernel.work import Work
    from graphflow.compiler.target import Target

GUESS = 128
"""The value of a program's symbol that the caller does not give; the compiler's schedules assume it too."""
ROUNDS = 20
PROBE_SECONDS, PROBE_RUNS = 0.02, 8
"""How long each of the runs that measure the machine takes at least, and how many there are."""


@dataclass(frozen=True)
class Level:
    """A level of memory: its name, how many bytes it holds (for all threads together), and bytes per second
    of a = b + s c, each array counted once."""
    name: str
    capacity: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """What so many threads reach: float32 operations per second, and levels of memory, nearest first."""
    threads: int
    flops: float
    levels: tuple[Level, ...]

    def level(self, footprint: float) -> Level:
        """The nearest level that holds so many bytes."""
        return next(level for level in self.levels if footprint <= level.capacity)

    def least_seconds(self, work: Work) -> float:
        """The least time that the roofline allows."""
        return max(work.flops / self.flops, work.bytes / self.level(work.footprint).bandwidth)

    def bound(self, work: Work) -> str:
        """What the roofline of this work is: "FMA", or the name of the level of memory."""
        level = self.level(work.footprint)
        return "FMA" if work.flops / self.flops >= work.bytes / level.bandwidth else level.name


@dataclass(frozen=True)
class Timing:
    """One launch or copy of a program, with the user's lines: how often it runs in a call, the median of the
    seconds of all its runs in a call, and the work of one run."""
    name: str
    lines: str
    runs: int
    seconds: float
    work: Work

    @property
    def flops(self) -> float:
        """Operations per second."""
        return self.runs * self.work.flops / self.seconds

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the least traffic."""
        return self.runs * self.work.bytes / self.seconds

    def share(self, machine: Machine) -> float:
        """The least time possible over the time taken."""
        return self.runs * machine.least_seconds(self.work) / self.seconds


# --- programs


def profile(program: Program, feeds: Sequence[np.ndarray], rounds: int = ROUNDS) -> list[Timing]:
    """Runs the program and times each launch and copy, in the order of the program; the Store is put back.

    UseError for another device than the CPU; FeedError as a call raises it.
    """
    from graphflow.compiler.emit.object import compile_object
    from graphflow.compiler.emit.profile import PROFILE, emit_profiled
    from graphflow.compiler.target import host_target
    from graphflow.runtime.cpu import CpuProgram
    from graphflow.runtime.native import load_object
    if program.device != "cpu":
        raise UseError(f"{program.name} is on {program.device}: only kernels on the CPU are timed")
    install_threads()
    compiled = program.compilation.result("memory")
    text, items = emit_profiled(compiled, host_target())
    name = program.name
    library = load_object(compile_object(text, host_target()), name, [name, PROFILE])
    runner = CpuProgram(program.plan, library, program.store, program.threads)
    counters = (ctypes.c_int64 * (2 * len(items))).from_address(library.address(PROFILE))
    before = {key: program.store[key] for key in program.store}
    calls = []
    try:
        for _ in range(rounds + 1):
            ctypes.memset(counters, 0, ctypes.sizeof(counters))
            runner.run(feeds)
            calls.append(list(counters))
    finally:
        for key, value in before.items():
            program.store[key] = value
    symbols = runner.checker.symbols(feeds)
    times = [statistics.median(call[2 * i] for call in calls[1:]) / 1e9 for i in range(len(items))]
    lines = [str(n.origins[0]) if n.origins else "" for n in program.traced.nodes()]
    return [Timing(*_titles(item, lines), runs, max(times[i], 1e-9), _work(item, compiled, symbols))
            for i, item in enumerate(items) if (runs := calls[-1][2 * i + 1])]


def _titles(item: Launch | Copy, lines: Sequence[str]) -> tuple[str, str]:
    """The item's name, and the lines that it comes from."""
    if isinstance(item, Copy):
        return f"copy {item.source} to {item.target}", ""
    return item.kernel, ", ".join(dict.fromkeys(lines[n] for n in item.origins))


def _work(item: Launch | Copy, compiled: Any, symbols: Mapping[str, int]) -> Work:
    from graphflow.compiler.kernel.work import Work, kernel_work
    from graphflow.compiler.plan.bind import buffer_bytes
    if isinstance(item, Launch):
        return kernel_work(compiled.kernels[item.kernel], {**_counters(compiled.plan), **symbols})
    size = buffer_bytes(compiled.plan.buffer(item.source), symbols)
    return Work(0, 2 * size, 2 * size)


def _counters(plan: Plan) -> dict[str, int]:
    """The loops' counters, in their first trips: a kernel in a loop may mention them."""
    from graphflow.compiler.plan.schema import Repeat, places
    return {place.item.counter: 0 for place in places(plan.body) if isinstance(place.item, Repeat)}


def random_feeds(program: Program, symbols: Mapping[str, int], seed: int = 0) -> list[np.ndarray]:
    """Feeds of the program's shapes at these values of its symbols (GUESS for the others): normally
    distributed floats, and zeros for all else, which are labels and indices within any range. UseError for a
    symbol that the program does not have."""
    known = program.plan.symbols
    for name in symbols:
        if name not in known:
            raise UseError(f"{program.name} has no dimension {name!r}",
                           hint=f"its dimensions are {', '.join(known)}" if known else "it has none")
    values = {**dict.fromkeys(known, GUESS), **symbols}
    rng, feeds = np.random.default_rng(seed), []
    for v in program.traced.inputs:
        shape = tuple(evaluate(d, values) for d in v.shape)
        numbers = rng.standard_normal(shape, np.float32) if v.dtype.has_gradient else np.zeros(shape)
        feeds.append(numbers.astype(v.dtype.numpy))
    return feeds


def shape_program(text: str) -> Program:
    """The program of one contraction: ``matmul:MxKxN``, [M, K] by [K, N]; or ``conv:NxCxHxW:OxRxS``, images
    by O filters of R by S, without padding. UseError for any other text."""
    from graphflow.nn import conv2d, dense
    kind, *shapes = text.split(":")
    if not all(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) for shape in shapes):
        shapes = []
    sizes = [[int(n) for n in shape.split("x")] for shape in shapes]
    if kind == "matmul" and [len(s) for s in sizes] == [3]:
        m, k, n = sizes[0]
        x = feed("x", (m, k))
        return function([x], dense(x, n, use_bias=False), name=kind)
    if kind == "conv" and [len(s) for s in sizes] == [4, 3]:
        (channels, *window), x = sizes[1], feed("x", sizes[0])
        return function([x], conv2d(x, channels, window, use_bias=False), name=kind)
    raise UseError(f"{text!r} is no contraction", hint="write matmul:MxKxN or conv:NxCxHxW:OxRxS")


# --- the machine


@lru_cache
def machine(threads: int) -> Machine:
    """The limits of the machine at hand with so many threads, measured in about a second."""
    from graphflow.compiler.emit.builder import Module
    from graphflow.compiler.emit.object import compile_object
    from graphflow.compiler.emit.profile import (
        FMA_PROBE,
        TRIAD_PROBE,
        emit_fma_probe,
        emit_triad_probe,
        fma_flops,
    )
    from graphflow.compiler.target import host_target
    from graphflow.runtime.native import load_object
    install_threads()
    target, module = host_target(), Module()
    emit_fma_probe(module, target)
    emit_triad_probe(module, target)
    library = load_object(compile_object(module.text(), target), "probes", [FMA_PROBE, TRIAD_PROBE])
    sink = aligned_bytes(4 * threads, "a probe")
    flops = fma_flops(target) * threads * _rate(library.address(FMA_PROBE), threads, [address_of(sink)])
    levels = []
    for name, capacity, used in _levels(target, threads):
        count = max(used // 12 // threads // 64 * 64, 64)
        block = aligned_bytes(12 * count * threads, "a probe")
        block[...] = 0                                # pages that were never written all lie in one place
        arrays = [address_of(block) + 4 * count * threads * i for i in range(3)]
        rate = _rate(library.address(TRIAD_PROBE), threads, [*arrays, count])
        levels.append(Level(name, capacity, 12 * count * threads * rate))
    return Machine(threads, flops, tuple(levels))


def _levels(target: Target, threads: int) -> list[tuple[str, float, int]]:
    """(name, capacity, bytes to measure it on) of each level of memory; each core has caches of its own but
    for the last level."""
    caches = [("L1", target.l1 * threads), ("L2", target.l2 * threads), ("L3", target.l3)]
    sizes = [size for _, size in caches]
    kept = [(name, size, size // 2) for i, (name, size) in enumerate(caches)
            if size > max(sizes[:i], default=0)]
    return [*kept, ("memory", math.inf, max(4 * max(sizes), 1 << 27))]


def _rate(task: int, threads: int, arguments: Sequence[int]) -> float:
    """Repeats per second of the probe at that address, the best of PROBE_RUNS; its last argument is how many
    repeats to do: as many as take PROBE_SECONDS."""
    from graphflow.runtime.native import thread_pool
    types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    parallel = ctypes.CFUNCTYPE(None, *types)(thread_pool())
    rates: list[float] = []
    repeats = 1
    while len(rates) < PROBE_RUNS:
        words = (ctypes.c_int64 * (len(arguments) + 1))(*arguments, repeats)
        begin = time.perf_counter()
        parallel(task, ctypes.addressof(words), threads, threads)
        seconds = time.perf_counter() - begin
        if seconds < PROBE_SECONDS:
            repeats *= 2
        else:
            rates.append(repeats / seconds)
    return max(rates)


# --- text


def compile_table(program: Program) -> str:
    """What each stage of compiling the program for this processor takes, without the cache; the code
    generator is LLVM's."""
    from graphflow.compiler.driver import Compilation
    from graphflow.compiler.target import host_target
    compilation, start = Compilation(program.traced, host_target()), time.perf_counter()
    plan, code = compilation.compile()
    total = time.perf_counter() - start
    spent = {**compilation.seconds, "checks": total - sum(compilation.seconds.values())}
    spent["code generator"] = spent.pop("object")
    lines = [f"{name:<16}{seconds * 1e3:>9.1f} ms" for name, seconds in spent.items()]
    lines.append(f"{'all':<16}{total * 1e3:>9.1f} ms   {len(list(launches(plan.body)))} launches, "
                 f"{len(code):,} bytes of code")
    return "\n".join(lines)


def describe(found: Machine) -> str:
    """The machine's limits in a line."""
    levels = ", ".join(f"{level.name} {level.bandwidth / 1e9:.0f} GB/s" for level in found.levels)
    return f"{found.threads} threads: {found.flops / 1e9:.0f} GFLOP/s, {levels}"


def table(timings: Sequence[Timing], found: Machine, top: int | None = None) -> str:
    """The timings as text, slowest first, `top` of them, with the sum of all at the end."""
    total = sum(t.seconds for t in timings)
    rows = [_row(t, total, found, t.name + f"  {t.lines}" * bool(t.lines))
            for t in sorted(timings, key=lambda t: -t.seconds)[:top]]
    heads = ("µs", "of step", "runs", "GFLOP/s", "GB/s", "bound", "reached")
    return "\n".join(["".join(map(_column, heads)) + "  kernel", *rows, _sum(timings, total, found)])


def _column(text: str) -> str:
    return f"{text:>10}"


def _row(t: Timing, total: float, found: Machine, title: str) -> str:
    cells = (f"{t.seconds * 1e6:.1f}", f"{t.seconds / total:.1%}", str(t.runs), f"{t.flops / 1e9:.1f}",
             f"{t.bandwidth / 1e9:.1f}", found.bound(t.work), f"{t.share(found):.0%}")
    return "".join(map(_column, cells)) + f"  {title}"


def _sum(timings: Sequence[Timing], total: float, found: Machine) -> str:
    """The row of all together: what they reached of the sum of the least times."""
    flops, moved, least = (sum(values) / total for values in zip(*(
        (t.runs * t.work.flops, t.runs * t.work.bytes, t.share(found) * t.seconds) for t in timings)))
    cells = (f"{total * 1e6:.1f}", "100%", str(sum(t.runs for t in timings)), f"{flops / 1e9:.1f}",
             f"{moved / 1e9:.1f}", "", f"{least:.0%}")
    return "".join(map(_column, cells)) + "  all"
