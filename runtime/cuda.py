"""Runs a plan on an NVIDIA GPU: the whole step is one captured CUDA graph, replayed by one call.

Parameters, optimizer state and working memory stay on the device. A call copies its feeds into pinned memory
and from there to the device on a stream of its own, so that the copies of one step overlap the kernels of the
step before; there are two sets of feeds and outputs (`Slot`) for that, used in turn. Results are fetched when
they are read.

A plan with a loop whose end, or a branch whose side, is decided by a value runs launch by launch instead, as
the host has to look at the value. Checks are looked at before the first state is written, which costs a wait.
"""
from __future__ import annotations

import math
import struct
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from graphflow.compiler.plan.bind import bind, buffer_bytes
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.schema import (
    ALIGNMENT,
    GPU_ELEMENTS,
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Launch,
    Plan,
    Repeat,
)
from graphflow.runtime.cuda_device import CapturedGraph, Gpu
from graphflow.runtime.cuda_states import CudaStates
from graphflow.runtime.feeds import FeedChecker, Where, nowhere
from graphflow.runtime.store import Store

MAX_BINDINGS = 16
"""How many bindings (one for each combination of feed shapes) a program remembers."""
MOST_BLOCKS = 65_535


class Result(np.lib.mixins.NDArrayOperatorsMixin):
    """An output on the device. It is an array wherever one is needed, and fetched then: np.asarray, float(),
    arithmetic, indexing and any attribute of an array."""

    def __init__(self, slot: Slot, place: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._slot: Slot | None = slot
        self._place, self._value = place, np.empty(0)
        self.shape, self.dtype = shape, dtype

    def fetch(self) -> np.ndarray:
        """The value; waits for the step that makes it."""
        if self._slot is not None:
            self._value = self._slot.read(self._place, self.shape, self.dtype)
            self._slot = None
        return self._value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.fetch(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        values = [x.fetch() if isinstance(x, Result) else x for x in inputs]
        return getattr(ufunc, method)(*values, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.fetch(), name)

    def __float__(self) -> float:
        return float(self.fetch())

    def __int__(self) -> int:
        return int(self.fetch())

    def __bool__(self) -> bool:
        return bool(self.fetch())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return self.fetch()[key]

    def __format__(self, spec: str) -> str:
        return format(self.fetch()[()], spec)

    def __repr__(self) -> str:
        return repr(self.fetch())


class Slot:
    """Device memory for the feeds and outputs of one call at a time, and what replays the call."""

    def __init__(self, program: CudaProgram, sizes: Mapping[str, int]) -> None:
        self.gpu = gpu = program.gpu
        offset, self._offsets = 0, {}
        for id, size in sizes.items():
            self._offsets[id] = offset
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        self._verdicts, self._checks = offset, len(program.checks)
        self._block = gpu.allocate(offset + self._checks, f"feeds and outputs of {program.plan.name}")
        feeds = sum(-(-sizes[id] // ALIGNMENT) * ALIGNMENT for id in program.plan.feeds)
        self._pinned = gpu.driver.pagelocked_empty(max(feeds, 1), np.uint8)
        self.copied, self.done = gpu.driver.Event(), gpu.driver.Event()
        self.graphs: list[CapturedGraph] = []
        self.stamp = -1
        self.results: list[weakref.ref[Result]] = []

    def address(self, id: str) -> int:
        """Where the feed or output lies."""
        return int(self._block) + self._offsets[id]

    def verdict(self, number: int) -> int:
        """Where a check's finding is kept: its own buffer is used again before the host looks."""
        return int(self._block) + self._verdicts + number

    def verdicts(self) -> np.ndarray:
        """What each check found, now."""
        found = np.empty(self._checks, np.uint8)
        self.gpu.stream.synchronize()
        self.gpu.driver.memcpy_dtoh(found, self.verdict(0))
        return found

    def fill(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Begins to copy the feeds; the GPU's stream will wait for them."""
        self.finish()
        end = 0
        for id, feed in feeds.items():
            start = self._offsets[id]
            end = start + feed.nbytes
            self._pinned[start:end].view(feed.dtype).reshape(feed.shape)[...] = feed
        if end:
            self.gpu.driver.memcpy_htod_async(int(self._block), self._pinned[:end], self.gpu.copies)
        self.copied.record(self.gpu.copies)
        self.gpu.stream.wait_for_event(self.copied)

    def finish(self) -> None:
        """Waits for the call before, whose results that somebody still holds are fetched."""
        for ref in self.results:
            held = ref()
            if held is not None:
                held.fetch()
        self.results.clear()
        self.done.synchronize()

    def read(self, place: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An output, after the call."""
        value = np.empty(shape, dtype)
        if value.nbytes:
            with self.gpu.current():
                self.done.synchronize()
                self.gpu.driver.memcpy_dtoh(value.reshape(-1).view(np.uint8), place)
        return value


class Bound:
    """A program for given sizes: where its arena buffers lie, and two slots, used in turn."""

    def __init__(self, program: CudaProgram, symbols: Mapping[str, int]) -> None:
        plan = program.plan
        self.symbols = dict(symbols)
        for b in plan.buffers:
            if math.prod(evaluate(d, symbols) for d in b.shape) >= GPU_ELEMENTS:
                raise NotImplementedError(
                    f"{plan.name}: {b.name or b.id} would have {GPU_ELEMENTS:,} elements or more, which the "
                    "code for GPUs does not count; use smaller batches")
        self.binding = bind(plan, self.symbols, 1)
        self.shapes = {b.id: tuple(evaluate(d, symbols) for d in b.shape) for b in plan.buffers
                       if b.role in ("feed", "output")}
        sizes = {id: buffer_bytes(program.table[id], symbols) for id in (*plan.feeds, *plan.outputs)}
        self.slots = [Slot(program, sizes) for _ in range(2)]
        self.turn = 0

    def next_slot(self) -> Slot:
        """The slot that was used longer ago."""
        self.turn ^= 1
        return self.slots[self.turn]


class CudaProgram:
    """A plan and the cubin of its kernels, bound to a Store. `where` gives the user's lines for messages."""

    def __init__(self, plan: Plan, code: bytes, store: Store, where: Where = nowhere) -> None:
        self.plan, self.store = plan, store
        self.table = {b.id: b for b in plan.buffers}
        self.checker = FeedChecker(plan, where)
        self.gpu = Gpu.get()
        self.states = CudaStates.of(store, self.gpu)
        self._names = [self.table[id].name for id in plan.states]
        self._written = [self.table[id].name for id in plan.written]
        with self.gpu.current():
            self._module = self.gpu.driver.module_from_buffer(code)
            self._functions = {f.name: (f, self._module.get_function(f.name)) for f in plan.functions}
            self._constants = {b.id: self._constant(b) for b in plan.buffers if b.role == "constant"}
        self._bindings: OrderedDict[tuple[tuple[int, ...], ...], Bound] = OrderedDict()
        self._captured = _fixed(plan.body)
        self.checks = [item for item in plan.body if isinstance(item, Check)]
        self._split = _last_check(plan.body)

    def _constant(self, b: Buffer) -> Any:
        block = self.gpu.allocate(len(b.data), "a constant")
        if b.data:
            self.gpu.driver.memcpy_htod(block, np.frombuffer(b.data, np.uint8))
        return block

    def run(self, feeds: Sequence[np.ndarray]) -> list[Any]:
        """One call: the outputs in the plan's order, each fetched when it is read.

        FeedError for feeds that do not fit, and for a check of the program that fails; no state has changed
        then. DeviceError where the GPU has not the memory, or a launch fails.
        """
        self.checker.check_types(feeds)
        with self.store.lock, self.gpu.current():
            bound = self._bound(feeds)
            slot = bound.next_slot()
            slot.fill({id: feed for id, feed in zip(self.plan.feeds, feeds)})
            base = self._ready(bound)
            self._execute(bound, slot, base)
            slot.done.record(self.gpu.stream)
            self.states.written(self._written)
            outputs = [Result(slot, slot.address(id), bound.shapes[id], self.table[id].dtype.numpy)
                       for id in self.plan.outputs]
            slot.results = [weakref.ref(r) for r in outputs]
        return outputs

    def _bound(self, feeds: Sequence[np.ndarray]) -> Bound:
        key = tuple(feed.shape for feed in feeds)
        bound = self._bindings.get(key)
        if bound is None:
            bound = self._bindings[key] = Bound(self, self.checker.symbols(feeds))
            if len(self._bindings) > MAX_BINDINGS:
                _, old = self._bindings.popitem(last=False)
                for slot in old.slots:
                    slot.finish()
        self._bindings.move_to_end(key)
        return bound

    def _ready(self, bound: Bound) -> int:
        """Makes sure that all states and the arena are on the device and up to date; the arena's address."""
        for name in self._names:
            self.states.address(name)
        base = self.states.arena(bound.binding.arena_bytes)
        self.states.update(self._names)
        return base

    # -- one call

    def _execute(self, bound: Bound, slot: Slot, base: int) -> None:
        """What is before the last check, its verdict, and the rest."""
        parts = [part for part in (self.plan.body[:self._split], self.plan.body[self._split:]) if part]
        if not self._captured:
            for part in parts:
                self._items(part, bound, slot, base, dict(bound.symbols))
            return
        if slot.stamp != self.states.version:
            slot.graphs = [self.gpu.capture(partial(self._items, part, bound, slot, base,
                                                    dict(bound.symbols))) for part in parts]
            slot.stamp = self.states.version
        for part, graph in zip(parts, slot.graphs):
            graph.launch()
            if part is parts[0] and self.checks:
                for check, held in zip(self.checks, slot.verdicts()):
                    self._judge(check, held, slot)

    def _items(self, body: Sequence[Item], bound: Bound, slot: Slot, base: int, symbols: dict[str, int]
               ) -> None:
        """Puts the items on the stream. Of a captured plan, checks are looked at behind the graph."""
        def address(id: str) -> int:
            return self._address(id, bound, slot, base, symbols)

        for item in body:
            if isinstance(item, Launch):
                self._launch(item, address, base, symbols)
            elif isinstance(item, Copy):
                size = buffer_bytes(self.table[item.source], symbols)
                if size:
                    self.gpu.driver.memcpy_dtod_async(address(item.target), address(item.source), size,
                                                      self.gpu.stream)
            elif isinstance(item, Check):
                if self._captured:
                    self.gpu.driver.memcpy_dtod_async(slot.verdict(self.checks.index(item)),
                                                      address(item.buffer), 1, self.gpu.stream)
                else:
                    self._judge(item, self._flag(address(item.buffer)), slot)
            elif isinstance(item, Branch):
                side = item.then if self._flag(address(item.predicate)) else item.otherwise
                self._items(side, bound, slot, base, symbols)
            else:
                self._repeat(item, bound, slot, base, symbols)

    def _repeat(self, item: Repeat, bound: Bound, slot: Slot, base: int, symbols: dict[str, int]) -> None:
        trips = evaluate(item.trips, symbols)
        symbols[item.counter] = 0
        while symbols[item.counter] < trips:
            if item.condition and not self._flag(self._address(item.condition, bound, slot, base, symbols)):
                break
            self._items(item.body, bound, slot, base, symbols)
            symbols[item.counter] += 1

    def _launch(self, item: Launch, address: Any, base: int, symbols: Mapping[str, int]) -> None:
        """Scratch lies first in the arena, whose address is `base`."""
        blocks = min(evaluate(item.tasks, symbols), MOST_BLOCKS)
        if blocks == 0:
            return
        function, handle = self._functions[item.kernel]
        pointers = [*(address(id) for id in item.buffers), *([base] if item.scratch != 0 else ())]
        arguments = struct.pack("P" * len(pointers) + "i" * len(function.symbols), *pointers,
                                *(symbols[s] for s in function.symbols))
        handle._launch_kernel((blocks, 1, 1), (function.threads, 1, 1), arguments, 0, self.gpu.stream)

    def _address(self, id: str, bound: Bound, slot: Slot, base: int, symbols: Mapping[str, int]) -> int:
        b = self.table[id]
        if b.role == "arena":
            return base + int(bound.binding.offsets[id])
        if b.role == "state":
            return self.states.address(b.name)
        if b.role == "constant":
            return int(self._constants[id])
        if b.role == "view":
            return (self._address(b.base, bound, slot, base, symbols)
                    + evaluate(b.offset, symbols) * b.dtype.bytes)
        return slot.address(id)

    def _flag(self, address: int) -> bool:
        """A bool scalar of the device, now."""
        value = np.empty(1, np.uint8)
        self.gpu.stream.synchronize()
        self.gpu.driver.memcpy_dtoh(value, address)
        return bool(value[0])

    def _judge(self, item: Check, held: Any, slot: Slot) -> None:
        if not held:
            slot.done.record(self.gpu.stream)
            raise self.checker.check_failed(item.code)


def _fixed(body: Sequence[Item]) -> bool:
    """Whether the same launches run in every call of the same sizes."""
    return all(_fixed(item.body) and not item.condition if isinstance(item, Repeat) else
               not isinstance(item, Branch) for item in body)


def _last_check(body: Sequence[Item]) -> int:
    """The number of items up to the last check."""
    return max((i + 1 for i, item in enumerate(body) if isinstance(item, Check)), default=0)
