"""Binding: from a plan and its symbols' values to offsets in one arena, and so to the exact peak of memory.

The same plan, symbols and thread count give the same offsets on every machine. Nothing is compiled again.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphflow.compiler.plan.dims import Dim, DimLike, Symbol, bounds_of, evaluate, product, substitute
from graphflow.compiler.plan.errors import CompilerError, DeviceError, PlanError
from graphflow.compiler.plan.schema import (
    ALIGNMENT,
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Plan,
    Repeat,
    launches,
)

MAX_BYTES = 1 << 48
"""No buffer may be larger: far above any machine, far below where 64-bit sums overflow."""


@dataclass(frozen=True)
class Binding:
    """Where everything lies for given symbols and threads: sizes in bytes, offsets from the arena's start.

    `offsets` has every arena buffer (one that takes over another has the same offset). Worker w's scratch
    starts at ``w * scratch_per_worker``, before all buffers; `scratch_bytes` is what all of them take
    together, where a launch of fewer tasks than threads keeps fewer workers busy. `peak_bytes` is the end of
    the last byte the plan reserves; `arena_bytes` the same rounded up to the alignment: what to allocate.
    `live_peak_bytes` is the least that any packing could reach: the largest sum of what is alive at once,
    scratch included.
    """
    symbols: Mapping[str, int]
    threads: int
    offsets: Mapping[str, int]
    arena_bytes: int
    peak_bytes: int
    live_peak_bytes: int
    scratch_per_worker: int
    scratch_bytes: int


@dataclass(frozen=True)
class Block:
    """A piece of the arena, alive from `first` to `last` (inclusive); `buffers` share it, one by one."""
    buffers: tuple[str, ...]
    bytes: int
    first: int
    last: int


def align(size: int) -> int:
    """`size` rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def buffer_bytes(buffer: Buffer, symbols: Mapping[str, int]) -> int:
    """The buffer's size in bytes under these symbols; DeviceError where no machine could hold it."""
    size = evaluate(product(buffer.shape), symbols) * buffer.dtype.bytes
    if size < 0:
        raise CompilerError(f"buffer {buffer.id} has a negative size at {dict(symbols)}", stage="plan")
    if size > MAX_BYTES:
        values = ", ".join(f"{name} = {value}" for name, value in symbols.items())
        name = buffer.name or buffer.id
        raise DeviceError(f"{name} takes {size:,} bytes at {values}, which no machine holds")
    return size


def bind(plan: Plan, symbols: Mapping[str, int], threads: int = 1) -> Binding:
    """Packs the plan's arena for these values of its symbols and this number of workers.

    Several deterministic orders are tried, each buffer going to the smallest gap that fits (best fit); the
    smallest arena is kept. Raises DeviceError for sizes that no machine holds, PlanError where a view would
    leave its buffer.
    """
    if any(b.role == "view" for b in plan.buffers):
        _Views(plan, symbols).body(plan.body, {})
    blocks = blocks_of(plan, symbols)
    live = _live_bytes(blocks)
    lower = max(live, default=0)
    best: dict[int, int] = {}
    best_end = -1
    for key in _ORDERS:
        placed = _place(blocks, sorted(range(len(blocks)), key=lambda i: (key(blocks[i]), i)))
        end = max((placed[i] + blocks[i].bytes for i in placed), default=0)
        if best_end < 0 or end < best_end:
            best, best_end = placed, end
        if align(best_end) <= lower:
            break
    per_worker = align(scratch_bytes(plan, symbols))
    scratch = _all_scratch(plan, symbols, threads, per_worker)
    start = align(scratch)            # scratch lies first: how much of it a call uses, its shapes decide
    peak = start + best_end if best_end else scratch
    offsets = {id: start + best[i] for i, block in enumerate(blocks) for id in block.buffers}
    return Binding(symbols=dict(symbols), threads=threads, offsets=offsets, arena_bytes=align(peak),
                   peak_bytes=peak, live_peak_bytes=lower + scratch,
                   scratch_per_worker=per_worker, scratch_bytes=scratch)


class _Views:
    """Sees to it that every view lies within its buffer wherever it is used, for these symbols."""

    def __init__(self, plan: Plan, symbols: Mapping[str, int]) -> None:
        self.table = {b.id: b for b in plan.buffers}
        self.symbols = symbols

    def body(self, body: Sequence[Item], counters: dict[str, tuple[int, int]]) -> None:
        """`counters`: the range of each counter in scope, both ends included."""
        counters = dict(counters)
        for item in body:
            if isinstance(item, Repeat):
                trips = evaluate(item.trips, self.symbols)
                self.use([item.condition] if item.condition else [], counters)
                if trips > 0:
                    self.body(item.body, {**counters, item.counter: (0, trips - 1)})
                counters[item.counter] = (0 if item.condition else max(trips, 0), max(trips, 0))
            elif isinstance(item, Branch):
                self.use([item.predicate], counters)
                self.body(item.then, counters)
                self.body(item.otherwise, counters)
            elif isinstance(item, Check):
                self.use([item.buffer], counters)
            else:
                self.use([item.source, item.target] if isinstance(item, Copy) else item.buffers, counters)

    def use(self, ids: Iterable[str], counters: Mapping[str, tuple[int, int]]) -> None:
        for id in ids:
            view = self.table[id]
            if view.role != "view":
                continue
            whole, size = (evaluate(product(b.shape), self.symbols) for b in (self.table[view.base], view))
            low, high = bounds_of(substitute(view.offset, self.symbols), counters)
            if low is None or high is None or low < 0 or size < 0 or high + size > whole:
                raise PlanError(f"not a valid plan: {id!r} is {size} elements from {low} to {high} on, but "
                                f"{view.base!r} has {whole}")


def scratch_bytes(plan: Plan, symbols: Mapping[str, int]) -> int:
    """The bytes that one worker needs: the most that any launch asks for."""
    return max((evaluate(item.scratch, symbols) for item in launches(plan.body)), default=0)


def _all_scratch(plan: Plan, symbols: Mapping[str, int], threads: int, per_worker: int) -> int:
    """The extent of all workers' scratch: the last busy worker of a launch needs only what that launch asks
    for."""
    ends = [0]
    for item in launches(plan.body):
        busy, own = min(threads, evaluate(item.tasks, symbols)), evaluate(item.scratch, symbols)
        if busy > 0 and own:
            ends.append((busy - 1) * per_worker + own)
    return max(ends)


def blocks_of(plan: Plan, symbols: Mapping[str, int]) -> list[Block]:
    """The arena's blocks: a buffer and those that take over its memory are one."""
    return [Block(tuple(b.id for b in group), max(buffer_bytes(b, symbols) for b in group),
                  group[0].first, group[-1].last) for group in _sharing(plan)]


def _sharing(plan: Plan) -> list[list[Buffer]]:
    """The arena buffers, grouped by whose memory they take over, in the order of their lives."""
    groups: dict[str, list[Buffer]] = {}
    for b in plan.buffers:
        if b.role == "arena":
            group = groups[b.id] = groups[b.alias] if b.alias else []
            group.append(b)
    return list({id(group): group for group in groups.values()}.values())


_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda b: (-b.bytes, b.first),
    lambda b: (-b.bytes * (b.last - b.first + 1), b.first),
    lambda b: (b.first - b.last, -b.bytes),
    lambda b: (b.first, -b.bytes),
)


def _place(blocks: Sequence[Block], order: Iterable[int]) -> dict[int, int]:
    """Block number -> offset, placing one by one, each in the smallest gap among those alive with it."""
    first, last, start, end = (np.zeros(len(blocks), np.int64) for _ in range(4))
    out: dict[int, int] = {}
    for count, i in enumerate(order):
        block = blocks[i]
        size = align(block.bytes)
        meets = (first[:count] <= block.last) & (last[:count] >= block.first) & (end[:count] > start[:count])
        offset = _best_gap(start[:count][meets], end[:count][meets], size) if size else 0
        first[count], last[count], start[count], end[count] = block.first, block.last, offset, offset + size
        out[i] = offset
    return out


def _best_gap(starts: np.ndarray, ends: np.ndarray, size: int) -> int:
    """The start of the smallest gap of at least `size` between the taken spans, else behind them all."""
    if not len(starts):
        return 0
    order = np.argsort(starts, kind="stable")
    taken = np.concatenate(([0], np.maximum.accumulate(ends[order])))  # where the gap before each span begins
    gaps = starts[order] - taken[:-1]
    fitting = np.flatnonzero(gaps >= size)
    if not len(fitting):
        return int(taken[-1])
    return int(taken[fitting[np.argmin(gaps[fitting])]])


def _live_bytes(blocks: Sequence[Block]) -> list[int]:
    """For each position of the body up to the last that any block lives at, the bytes alive there."""
    if not blocks:
        return []
    change = [0] * (max(b.last for b in blocks) + 2)
    for b in blocks:
        change[b.first] += align(b.bytes)
        change[b.last + 1] -= align(b.bytes)
    out, total = [], 0
    for step in change[:-1]:
        total += step
        out.append(total)
    return out


def peak_formula(plan: Plan, threads: int = 1) -> list[DimLike]:
    """The peak as a formula: for all values of the symbols it is the largest of these expressions, in bytes.

    They are the sums of what is alive at each point of the body (rounding up to the alignment left out) plus
    the scratch of `threads` workers; those that another one is never below are dropped.
    """
    change: dict[int, DimLike] = {}
    for group in _sharing(plan):
        size = product(group[0].shape) * group[0].dtype.bytes
        change[group[0].first] = change.get(group[0].first, 0) + size
        change[group[-1].last + 1] = change.get(group[-1].last + 1, 0) - size
    sums: list[DimLike] = [0]
    for position in sorted(change):
        sums.append(sums[-1] + change[position])
    scratch = _largest([0, *(item.scratch * threads for item in launches(plan.body))])
    return _largest(live + extra for live in _largest(sums) for extra in scratch)


def _largest(sizes: Iterable[DimLike]) -> list[DimLike]:
    """The distinct sizes, without those that another is never below."""
    kept: list[DimLike] = []
    for size in dict.fromkeys(sizes):
        if not any(_never_below(other, size) for other in kept):
            kept = [other for other in kept if not _never_below(size, other)] + [size]
    return kept


def _never_below(a: DimLike, b: DimLike) -> bool:
    low = bounds_of(a - b, {})[0]
    return low is not None and low >= 0


@dataclass(frozen=True)
class PeakReport:
    """Who is alive where the most is: `position` in the body, and (buffer, bytes), largest first."""
    position: int
    live: tuple[tuple[Buffer, int], ...]
    scratch_per_worker: int

    @property
    def live_bytes(self) -> int:
        """The sum of the live buffers, without scratch and alignment."""
        return sum(size for _, size in self.live)


def explain_peak(plan: Plan, symbols: Mapping[str, int]) -> PeakReport:
    """The buffers alive at the point of the body where the most bytes are (the first of several)."""
    live = _live_bytes(blocks_of(plan, symbols))
    position = live.index(max(live)) if live else 0
    found = [(b, buffer_bytes(b, symbols)) for b in plan.buffers
             if b.role == "arena" and b.first <= position <= b.last]
    taken_over = {b.alias for b, _ in found if b.alias}
    found = [(b, size) for b, size in found if b.id not in taken_over]
    found.sort(key=lambda pair: (-pair[1], pair[0].id))
    return PeakReport(position, tuple(found), scratch_bytes(plan, symbols))


def solve_symbols(shapes: Sequence[tuple[Sequence[DimLike], Sequence[int]]]) -> dict[str, int]:
    """The values of the symbols that make each declared shape equal the given one, as far as they decide it.

    An axis that is c*symbol + k (once the symbols known already have their values) decides one; bare symbols
    go first. Nothing is verified: the caller evaluates every axis afterwards.
    """
    pairs = [(d, n) for declared, given in shapes for d, n in zip(declared, given) if isinstance(d, Dim)]
    found: dict[str, int] = {}
    for d, size in pairs:
        name, factor, rest = _linear(d)
        if name and (factor, rest) == (1, 0):
            found.setdefault(name, size)
    known = -1
    while known < len(found):
        known = len(found)
        for d, size in pairs:
            name, factor, rest = _linear(substitute(d, found))
            if name:
                found[name] = (size - rest) // factor
    return found


def _linear(d: DimLike) -> tuple[str, int, int]:
    """(symbol, c, k) where `d` is c*symbol + k with c > 0, else ("", 1, 0)."""
    if isinstance(d, Dim):
        varying = [(atoms, c) for atoms, c in d.terms if atoms]
        atoms, factor = varying[0]
        if len(varying) == 1 and len(atoms) == 1 and isinstance(atoms[0], Symbol) and factor > 0:
            return atoms[0].name, factor, sum(c for atoms, c in d.terms if not atoms)
    return "", 1, 0
