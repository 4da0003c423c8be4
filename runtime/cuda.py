"""Runs a plan on an NVIDIA GPU: the whole step is one captured CUDA graph, replayed by one call.

Parameters, optimizer state and working memory stay on the device. A call copies its feeds into pinned memory
and from there to the device on a stream of its own, so that the copies of one step overlap the kernels of the
step before; there are two sets of feeds and outputs (`Slot`) for that, used in turn. Results are fetched when
they are read. `run_steps` copies the feeds of all its steps first.

A plan with a loop whose end, or a branch whose side, is decided by a value runs launch by launch instead, as
the host has to look at the value. Checks are looked at before the first state is written. Those that look at
feeds alone (labels, indices) run on the stream of copies, ahead of the step before; others cost a wait for
what comes before them.
"""
from __future__ import annotations

import math
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from graphflow.compiler.plan.bind import bind, buffer_bytes
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.errors import FeedError
from graphflow.compiler.plan.schema import (
    GPU_ELEMENTS,
    MOST_TOGETHER,
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Launch,
    Plan,
    Repeat,
    bases_of_loop,
    launches,
    name_of_loop,
    places,
)
from graphflow.runtime.cuda_arrays import DeviceArray, Slot
from graphflow.runtime.cuda_checks import FeedChecks
from graphflow.runtime.cuda_device import CapturedGraph, Gpu
from graphflow.runtime.cuda_states import CudaStates
from graphflow.runtime.feeds import FeedChecker, Where, nowhere
from graphflow.runtime.steps import Interrupts, Stack, failed, interrupted
from graphflow.runtime.store import Store

MAX_BINDINGS = 16
"""How many bindings (one for each combination of feed shapes) a program remembers."""
MOST_BLOCKS = 65_535
STEPS_AHEAD = 64
"""So many steps of `run_steps` may be on the stream before the host waits for them, and looks at Ctrl-C."""


@dataclass(frozen=True)
class Call:
    """A kernel with how it is launched; `values` are the arguments, packed as `format` says."""

    handle: Any
    blocks: int
    threads: int
    shared: int
    format: str
    values: list[int]

    def launch(self, values: Sequence[int], stream: Any) -> None:
        """Puts it on the stream with these arguments."""
        if self.blocks:
            self.handle._launch_kernel((self.blocks, 1, 1), (self.threads, 1, 1),
                                       struct.pack(self.format, *values), self.shared, stream)


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
        sizes["verdicts"] = sum(isinstance(item, Check) for item in plan.body)
        sizes.update(program.checks.sizes(symbols))
        self.slots = [Slot(program.gpu, sizes, len(plan.feeds), f"feeds and outputs of {plan.name}")
                      for _ in range(2)]
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
        self.checker = FeedChecker(plan, where, (np.ndarray, DeviceArray))
        self.gpu = Gpu.get()
        self.states = CudaStates.of(store, self.gpu)
        self._together: Any = None
        self._names = [self.table[id].name for id in plan.states]
        self._written = [self.table[id].name for id in plan.written]
        functions = {f.name: f for f in plan.functions}
        loops = {name_of_loop(place.item) for place in places(plan.body) if isinstance(place.item, Repeat)}
        with self.gpu.current():
            self._module = self.gpu.driver.module_from_buffer(code)
            self._loops = self._resident_loops(code)
            self._functions = {name: (f, self.gpu.function(self._module, name, f.dynamic))
                               for name, f in functions.items() if name not in loops}
            self._constants = {b.id: self._constant(b) for b in plan.buffers if b.role == "constant"}
        self._bindings: OrderedDict[tuple[tuple[int, ...], ...], Bound] = OrderedDict()
        self.checks = FeedChecks(plan)
        body = self.checks.rest
        self._captured, split = _fixed(body), _last_check(body)
        self._late = [item for item in body if isinstance(item, Check)]
        self._parts = [part for part in (body[:split], body[split:]) if part]

    def _resident_loops(self, code: bytes) -> dict[str, Any]:
        """The functions that run whole loops, by counter: those whose blocks fit on the GPU together."""
        functions = {f.name: f for f in self.plan.functions}
        found: dict[str, Any] = {}
        for item in (place.item for place in places(self.plan.body)):
            if isinstance(item, Repeat) and name_of_loop(item) in functions:
                module = self._together = self._together or self.gpu.load(code)
                handle = module.function(name_of_loop(item))
                if self.gpu.resident(handle, functions[name_of_loop(item)].threads) >= _blocks_of_loop(item):
                    found[item.counter] = (functions[name_of_loop(item)], handle)
        return found

    def _constant(self, b: Buffer) -> Any:
        block = self.gpu.allocate(len(b.data), "a constant")
        if b.data:
            self.gpu.driver.memcpy_htod(block, np.frombuffer(b.data, np.uint8))
        return block

    def run(self, feeds: Sequence[Any]) -> list[Any]:
        """One call: the outputs in the plan's order, each fetched when it is read. Feeds are arrays of NumPy,
        or of the device.

        FeedError for feeds that do not fit, and for a check of the program that fails; no state has changed
        then. DeviceError where the GPU has not the memory, or a launch fails.
        """
        self.checker.check_types(feeds)
        with self.store.lock, self.gpu.current():
            bound = self._bound(feeds)
            slot = bound.next_slot()
            slot.finish()
            slot.fill(dict(zip(self.plan.feeds, feeds)))
            wrong = self._wrong_feed(bound, slot, 1, lambda step, id: slot.address(id))
            if wrong is not None:
                raise self.checker.check_failed(wrong[1])
            self._execute(bound, slot, self._ready(bound))
            slot.done.record(self.gpu.stream)
            self.states.written(self._written)
            outputs = [DeviceArray(self.gpu, slot.memory, slot.address(id), bound.shapes[id],
                                   self.table[id].dtype.numpy, slot.done) for id in self.plan.outputs]
            slot.results = [weakref.ref(r) for r in outputs]
        return outputs

    def run_steps(self, stack: Stack) -> list[Any]:
        """Many steps: the outputs, stacked on the device. Feeds are sent once, if they are not there.

        FeedError as `run`, KeyboardInterrupt for Ctrl-C between two steps: both say how many steps are done,
        and the Store is as these left it.
        """
        with self.store.lock, self.gpu.current():
            feeds = [feed if isinstance(feed, DeviceArray) and feed.on_device else
                     np.asarray(feed, order="C") for feed in stack.feeds]
            first = [_first(feed) if stacked else feed for feed, stacked in zip(feeds, stack.stacked)]
            self.checker.check_types(first)
            bound = self._bound(first)
            slot = bound.next_slot()
            slot.finish()
            sent = {id: self._sent(feed) for id, feed, stacked in zip(self.plan.feeds, feeds, stack.stacked)
                    if stacked}
            slot.fill({id: feed for id, feed in zip(self.plan.feeds, feeds) if id not in sent})
            stacked_at = {id: (feed.address, feed.nbytes // stack.steps) for id, feed in sent.items()}

            def feed_at(step: int, id: str) -> int:
                address, size = stacked_at.get(id, (slot.address(id), 0))
                return address + step * size

            steps, wrong = stack.steps, self._wrong_feed(bound, slot, stack.steps, feed_at)
            outputs = [self._stacked(bound, id, steps, slot.done) for id in self.plan.outputs]
            count = steps if wrong is None else wrong[0]
            done = self._steps(count, bound, slot, self._ready(bound), stacked_at, outputs, steps)
            if wrong is not None:
                raise failed(self.checker.check_failed(wrong[1]), done, steps)
        return outputs

    def _sent(self, feed: Any) -> DeviceArray:
        """The feed on the device, from here on in the stream of copies."""
        if isinstance(feed, DeviceArray):
            feed.wait(self.gpu.copies)
            return feed
        memory = self.gpu.allocate_for_now(feed.nbytes, f"feeds of {self.plan.name}", self.gpu.copies)
        if feed.nbytes:
            self.gpu.driver.memcpy_htod_async(int(memory), feed, self.gpu.copies)
        return DeviceArray(self.gpu, memory, int(memory), feed.shape, feed.dtype)

    def _stacked(self, bound: Bound, id: str, steps: int, ready: Any) -> DeviceArray:
        """Room for an output of all steps."""
        dtype, shape = self.table[id].dtype.numpy, (steps, *bound.shapes[id])
        memory = self.gpu.allocate_for_now(math.prod(shape) * dtype.itemsize, f"outputs of {self.plan.name}",
                                           self.gpu.stream)
        return DeviceArray(self.gpu, memory, int(memory), shape, dtype, ready)

    def _steps(self, count: int, bound: Bound, slot: Slot, base: int, feeds: Mapping[str, tuple[int, int]],
               outputs: Sequence[DeviceArray], steps: int) -> int:
        """Runs the first `count` of the steps; the number done. `feeds`: (address of the first step's, bytes
        of a step's) of those that are stacked."""
        results = [(slot.address(id), output.address, output.nbytes // steps)
                   for id, output in zip(self.plan.outputs, outputs)]
        done = 0
        with Interrupts() as interrupts:
            try:
                while done < count:
                    for id, (address, size) in feeds.items():
                        self._copy(slot.address(id), address + done * size, size)
                    self._execute(bound, slot, base)
                    for source, address, size in results:
                        self._copy(address + done * size, source, size)
                    done += 1
                    if done % STEPS_AHEAD == 0:
                        self.gpu.stream.synchronize()
                    if interrupts.raised:
                        raise interrupted(self.plan.name, done, steps)
            except FeedError as error:
                raise failed(error, done, steps) from None
            finally:
                slot.done.record(self.gpu.stream)
                if done:
                    self.states.written(self._written)
        return done

    def _copy(self, target: int, source: int, size: int) -> None:
        if size:
            self.gpu.driver.memcpy_dtod_async(target, source, size, self.gpu.stream)

    def _bound(self, feeds: Sequence[Any]) -> Bound:
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

    def _wrong_feed(self, bound: Bound, slot: Slot, steps: int, feed_at: Callable[[int, str], int]
                    ) -> tuple[int, int] | None:
        """(step, number of the check) of the first check of feeds that fails: they run on the stream of
        copies, with memory of their own. `feed_at`: where a step's feed lies."""
        checks = self.checks
        if not checks.codes:
            return None
        copies, place = self.gpu.copies, list(checks.codes)
        flags = np.empty((steps, len(place)), np.uint8)
        memory = slot.address("verdicts") if steps == 1 else \
            self.gpu.allocate_for_now(flags.nbytes, f"checks of {self.plan.name}", copies)

        def address(step: int, id: str) -> int:
            b = self.table[id]
            if b.role == "view":
                return address(step, b.base) + evaluate(b.offset, bound.symbols) * b.dtype.bytes
            if b.role == "constant":
                return int(self._constants[id])
            return int(memory) + step * len(place) + place.index(id) if id in place else feed_at(step, id)

        scratch = slot.address("scratch")
        ready = [[self._call_of(item, partial(address, step), scratch, bound.symbols) for step in (0, 1)]
                 for item in checks.launches]
        for step in range(steps):                            # with each, addresses move by the same number
            for first, second in ready:
                values = [a + step * (b - a) for a, b in zip(first.values, second.values)]
                first.launch(values, copies)
        self.gpu.driver.memcpy_dtoh_async(flags, int(memory), copies)
        copies.synchronize()
        found = np.argwhere(flags == 0)
        return (int(found[0][0]), list(checks.codes.values())[found[0][1]]) if len(found) else None

    def _execute(self, bound: Bound, slot: Slot, base: int) -> None:
        """What is before the last check, its verdict, and the rest."""
        if not self._captured:
            for part in self._parts:
                self._items(part, bound, slot, base, dict(bound.symbols))
            return
        if slot.stamp != self.states.version:
            try:
                slot.graphs = self._capture(bound, slot, base)
            except self.gpu.driver.Error:
                if not self._loops:
                    raise
                self._loops = {}                             # a driver that captures no such launch
                slot.graphs = self._capture(bound, slot, base)
            slot.stamp = self.states.version
        for part, graph in zip(self._parts, slot.graphs):
            graph.launch()
            if part is self._parts[0] and self._late:
                found = np.empty(len(self._late), np.uint8)
                self.gpu.stream.synchronize()
                self.gpu.driver.memcpy_dtoh(found, slot.address("verdicts"))
                for check, holds in zip(self._late, found):
                    self._judge(check, holds, slot)

    def _capture(self, bound: Bound, slot: Slot, base: int) -> list[CapturedGraph]:
        return [self.gpu.capture(partial(self._items, part, bound, slot, base, dict(bound.symbols)))
                for part in self._parts]

    def _items(self, body: Sequence[Item], bound: Bound, slot: Slot, base: int, symbols: dict[str, int]
               ) -> None:
        """Puts the items on the stream. Of a captured plan, checks are looked at behind the graph: what they
        found is kept, as its memory is used again before."""
        def address(id: str) -> int:
            return self._address(id, bound, slot, base, symbols)

        for item in body:
            if isinstance(item, Launch):
                self._launch(item, address, base, symbols, self.gpu.stream)
            elif isinstance(item, Copy):
                self._copy(address(item.target), address(item.source),
                           buffer_bytes(self.table[item.source], symbols))
            elif isinstance(item, Check):
                if self._captured:
                    self._copy(slot.address("verdicts") + self._late.index(item), address(item.buffer), 1)
                else:
                    self._judge(item, self._flag(address(item.buffer)), slot)
            elif isinstance(item, Branch):
                side = item.then if self._flag(address(item.predicate)) else item.otherwise
                self._items(side, bound, slot, base, symbols)
            else:
                self._repeat(item, bound, slot, base, symbols)

    def _repeat(self, item: Repeat, bound: Bound, slot: Slot, base: int, symbols: dict[str, int]) -> None:
        trips = evaluate(item.trips, symbols)
        if item.counter in self._loops:
            function, handle = self._loops[item.counter]
            bases = [self._address(id, bound, slot, base, symbols) for id in bases_of_loop(self.table, item)]
            self.gpu.launch_together(handle, _blocks_of_loop(item), function.threads, [*bases, base],
                                     [symbols[s] for s in function.symbols])
            symbols[item.counter] = max(trips, 0)
            return
        symbols[item.counter] = 0
        while symbols[item.counter] < trips:
            if item.condition and not self._flag(self._address(item.condition, bound, slot, base, symbols)):
                break
            self._items(item.body, bound, slot, base, symbols)
            symbols[item.counter] += 1

    def _launch(self, item: Launch, address: Callable[[str], int], scratch: int, symbols: Mapping[str, int],
                stream: Any) -> None:
        """Puts the launch on the stream; scratch lies where the arena begins."""
        call = self._call_of(item, address, scratch, symbols)
        call.launch(call.values, stream)

    def _call_of(self, item: Launch, address: Callable[[str], int], scratch: int, symbols: Mapping[str, int]
                 ) -> Call:
        function, handle = self._functions[item.kernel]
        pointers = [*(address(id) for id in item.buffers), *([scratch] if item.scratch != 0 else ())]
        return Call(handle, min(evaluate(item.tasks, symbols), MOST_BLOCKS), function.threads,
                    function.dynamic, "P" * len(pointers) + "i" * len(function.symbols),
                    [*pointers, *(symbols[s] for s in function.symbols)])

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


def _first(feed: Any) -> Any:
    """What a stacked feed's first step is like; of one on the device, its shape and type."""
    return np.broadcast_to(np.empty((), feed.dtype), feed.shape[1:])


def _blocks_of_loop(item: Repeat) -> int:
    """Blocks that run all trips of the loop, each with its share of every kernel's."""
    return min(MOST_TOGETHER, max(evaluate(x.tasks, {}) for x in launches(item.body)))


def _fixed(body: Sequence[Item]) -> bool:
    """Whether the same launches run in every call of the same sizes."""
    return all(_fixed(item.body) and not item.condition if isinstance(item, Repeat) else
               not isinstance(item, Branch) for item in body)


def _last_check(body: Sequence[Item]) -> int:
    """The number of items up to the last check."""
    return max((i + 1 for i, item in enumerate(body) if isinstance(item, Check)), default=0)
