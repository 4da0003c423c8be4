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
    Launch,
    Plan,
    Repeat,
    places,
)

MAX_BYTES = 1 << 48
"""No buffer may be larger: far above any machine, far below where 64-bit sums overflow."""


@dataclass(frozen=True)
class Binding:
    """Where everything lies for given symbols and threads: sizes in bytes, offsets from the arena's start.

    `offsets` has every arena buffer (one that takes over another has the same offset). `scratch`: for each
    launch, in the order of the text, where its scratch lies, 0 if it has none: first what its workers share,
    then a piece for each of them, of a whole number of ALIGNMENTs. `peak_bytes` is the end of the last byte
    the plan reserves; `arena_bytes` the same rounded up to the alignment: what to allocate. `live_peak_bytes`
    is the least that any packing could reach: the largest sum of what is alive at once, scratch included.
    """
    symbols: Mapping[str, int]
    threads: int
    offsets: Mapping[str, int]
    scratch: tuple[int, ...]
    arena_bytes: int
    peak_bytes: int
    live_peak_bytes: int


@dataclass(frozen=True)
class Block:
    """A piece of the arena, alive from `first` to `last` (inclusive): `buffers` that share it, one by one, or
    the scratch of the `launch` of that number."""
    buffers: tuple[str, ...]
    bytes: int
    first: int
    last: int
    launch: int = -1


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
    blocks, first = blocks_of(plan, symbols, threads), 0
    if plan.functions:                             # a GPU's kernels have theirs where the arena begins
        first = align(max((block.bytes for block in blocks if not block.buffers), default=0))
        blocks = [block for block in blocks if block.buffers]
    lower = max(live_bytes(blocks), default=0)
    placed = _pack(blocks, lower)
    peak = first + max((placed[i] + block.bytes for i, block in enumerate(blocks)), default=0)
    offsets = {id: first + placed[i] for i, block in enumerate(blocks) for id in block.buffers}
    at = {block.launch: placed[i] for i, block in enumerate(blocks) if block.launch >= 0}
    count = sum(isinstance(place.item, Launch) for place in places(plan.body))
    return Binding(symbols=dict(symbols), threads=threads, offsets=offsets,
                   scratch=tuple(at.get(number, 0) for number in range(count)), arena_bytes=align(peak),
                   peak_bytes=peak, live_peak_bytes=first + lower)


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


def scratch_bytes(item: Launch, symbols: Mapping[str, int], threads: int) -> int:
    """The bytes of a launch's scratch: what is shared, and a piece for each of the workers that it keeps
    busy."""
    busy = min(threads, evaluate(item.tasks, symbols))
    shared, own = evaluate(item.shared, symbols), evaluate(item.scratch, symbols)
    return align(shared) + (busy - 1) * align(own) + own if busy > 0 else 0


def scratch_lives(plan: Plan) -> list[tuple[int, int, Launch]]:
    """For each launch the positions between which its scratch is alive: its own, but in a loop that is cut
    along its rows, where every thread is at another step, the whole loop's."""
    found = places(plan.body)
    cut = {(place.position, place.last) for place in found
           if isinstance(place.item, Repeat) and place.item.rows != 0}
    out = []
    for position, last, item, loops in found:
        if isinstance(item, Launch):
            out.append((*(loops[-1] if loops and loops[-1] in cut else (position, last)), item))
    return out


def blocks_of(plan: Plan, symbols: Mapping[str, int], threads: int = 1) -> list[Block]:
    """The arena's blocks: a buffer and those that take over its memory are one; the scratch of a launch."""
    out = [Block(tuple(b.id for b in group), max(buffer_bytes(b, symbols) for b in group),
                 group[0].first, group[-1].last) for group in sharing(plan)]
    for number, (first, last, item) in enumerate(scratch_lives(plan)):
        size = scratch_bytes(item, symbols, threads)
        if size:
            out.append(Block((), size, first, last, number))
    return out


def sharing(plan: Plan) -> list[list[Buffer]]:
    """The arena buffers, grouped by whose memory they take over, in the order of their lives."""
    groups: dict[str, list[Buffer]] = {}
    for b in plan.buffers:
        if b.role == "arena":
            group = groups[b.id] = groups[b.alias] if b.alias else []
            group.append(b)
    return list({id(group): group for group in groups.values()}.values())


def _pack(blocks: Sequence[Block], lower: int) -> dict[int, int]:
    """Block number -> offset: the best of several orders, and of those in which the block that ended last,
    again and again, comes first. None can do better than `lower`."""
    def end(placed: Mapping[int, int]) -> int:
        return max((placed[i] + block.bytes for i, block in enumerate(blocks)), default=0)

    tried: list[dict[int, int]] = []
    for key in _ORDERS:
        if not tried or align(end(tried[-1])) > lower:
            tried.append(_place(blocks, sorted(range(len(blocks)), key=lambda i: (key(blocks[i]), i))))
    best = last = min(tried, key=end)
    for _ in range(min(_ATTEMPTS, _MOST // max(len(blocks), 1))):
        if align(end(best)) <= lower:
            break
        top = max(last, key=lambda i: last[i] + blocks[i].bytes)
        last = _place(blocks, [top, *(i for i in last if i != top)])
        best = min(best, last, key=end)
    return best


_ATTEMPTS, _MOST = 50, 20_000
"""After the orders, so many more are tried, as long as they place no more than so many blocks."""
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


def live_bytes(blocks: Sequence[Block]) -> list[int]:
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
