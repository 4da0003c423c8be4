"""Runs a plan on the CPU: one native call per step, with every address bound beforehand."""
from __future__ import annotations

import ctypes
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from operator import length_hint
from typing import Any

import numpy as np

from graphflow.compiler.plan.bind import Binding, bind
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.errors import CompilerError, FeedError, UseError
from graphflow.compiler.plan.schema import Buffer, Plan
from graphflow.runtime.arena import address_of, aligned_bytes
from graphflow.runtime.feeds import FeedChecker, Where, nowhere
from graphflow.runtime.native import Library, default_threads, load_object, thread_pool
from graphflow.runtime.steps import Interrupts, Stack, by_calls, failed, interrupted
from graphflow.runtime.store import Store

MAX_BINDINGS = 64
"""How many bindings (one for each combination of feed shapes) a program remembers."""
CHUNK_SECONDS, CHUNK_STEPS = 0.05, 1024
"""For so long at most the steps of `run_steps` follow each other without a look at Ctrl-C."""


class Context(ctypes.Structure):
    """What the native entry ``i64 NAME(Context *)`` is given."""
    _fields_ = [("buffers", ctypes.c_void_p), ("symbols", ctypes.c_void_p), ("threads", ctypes.c_int64),
                ("parallel", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]


class Bound:
    """A binding with its context: ready to run once the addresses of feeds and outputs are filled in.

    `table`: the address of each of the plan's buffers; `scratch`: of each launch's scratch. `outputs`: (place
    in the table, shape, NumPy dtype). `stamp`: the versions of Store and arena for which the addresses hold.
    """

    def __init__(self, binding: Binding, plan: Plan, stamp: tuple[int, int]) -> None:
        self.binding, self.stamp = binding, stamp
        self.table = (ctypes.c_void_p * max(len(plan.buffers), 1))()
        self.scratch = (ctypes.c_void_p * max(len(binding.scratch), 1))()
        self._symbols = (ctypes.c_int64 * max(len(plan.symbols), 1))(*binding.symbols.values())
        place = {b.id: i for i, b in enumerate(plan.buffers)}
        outputs = [(place[id], plan.buffers[place[id]]) for id in plan.outputs]
        self.outputs = [(i, tuple(evaluate(d, binding.symbols) for d in b.shape), b.dtype.numpy)
                        for i, b in outputs]
        self.context = Context(ctypes.addressof(self.table), ctypes.addressof(self._symbols), binding.threads,
                               None, ctypes.addressof(self.scratch))
        self.pointer = ctypes.addressof(self.context)


class CpuProgram:
    """A plan and its object code, bound to a Store.

    `code`: the object file, or a library that is loaded already. `threads`: None takes the process's
    default. `where` gives the user's lines for messages. With `guard`, every call lays canaries around
    everything that the program may write and raises CompilerError if one died (slow; for tests and bug
    hunts).
    """

    def __init__(self, plan: Plan, code: bytes | Library, store: Store, threads: int | None = None,
                 where: Where = nowhere, guard: bool = False) -> None:
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise UseError(f"threads is {threads!r}", hint="use a positive integer, or None for the default")
        self.plan, self.store, self.guard = plan, store, guard
        self.threads = threads or default_threads()
        self.checker = FeedChecker(plan, where)
        self.library = code if isinstance(code, Library) else load_object(code, plan.name, [plan.name])
        self._entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(self.library.address(plan.name))
        self._parallel = thread_pool()
        self._constants = {b.id: _constant(b) for b in plan.buffers if b.role == "constant"}
        self._bindings: OrderedDict[tuple[tuple[int, ...], ...], Bound] = OrderedDict()
        place = {b.id: i for i, b in enumerate(plan.buffers)}
        self._feeds = [(place[b.id], b.dtype.numpy) for b in self.checker.feeds]
        written = set(plan.written)
        self._written = [b.name for b in plan.buffers if b.id in written]
        self._check_states()

    def _check_states(self) -> None:
        for b in self.plan.buffers:
            if b.role == "state":
                entry = self.store.entry(b.name)
                if (entry.dtype, entry.shape) != (b.dtype, b.shape):
                    raise UseError(f"{self.plan.name} was compiled for {b.name} as {b.dtype}{list(b.shape)}, "
                                   f"the Store has {entry.dtype}{list(entry.shape)}",
                                   hint="compile the program again with this Store")

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One call: the outputs, as new arrays, in the plan's order. Feeds are C-ordered copies where
        they need be.

        FeedError for feeds that do not fit, and for a check of the program that fails; no state has
        changed then.
        """
        if self.guard:
            from graphflow.runtime.measure import run_guarded
            return run_guarded(self, feeds)
        with self.store.lock:
            if self.store.mirror is not None:
                self.store.fetch()
            bound = self._bound_for(feeds)
            table = bound.table
            held = self.fill_feeds(table, feeds)
            outputs = []
            for place, shape, dtype in bound.outputs:
                array = np.empty(shape, dtype)
                table[place] = address_of(array)
                outputs.append(array)
            code = self._entry(bound.pointer)
            if self.store.mirror is not None:
                self.store.changed(self._written)
            del held                                   # the copies of feeds live until here
        if code:
            raise self.failure(code)
        return outputs

    def run_steps(self, stack: Stack) -> list[np.ndarray]:
        """Many steps: the outputs, stacked.

        FeedError as `run`, KeyboardInterrupt for Ctrl-C between two chunks of steps: both say how many steps
        are done, and the Store is as these left it.
        """
        if self.guard:
            return by_calls(self.plan.name, self.run, stack)
        feeds = [np.require(feed, requirements=["C", "A"]) for feed in stack.feeds]
        stack = Stack(feeds, stack.stacked, stack.steps)
        outputs = [np.empty((stack.steps, *shape), dtype)
                   for _, shape, dtype in self._bound_for(stack.at(0)).outputs]
        done, count = 0, 1
        with Interrupts() as interrupts:
            while done < stack.steps:
                start = time.perf_counter()
                ran, code = self._chunk(stack, outputs, done, min(count, stack.steps - done))
                if code:
                    raise failed(self.failure(code), done + ran - 1, stack.steps)
                done += ran
                pace = CHUNK_SECONDS / max(time.perf_counter() - start, 1e-6)
                count = max(1, min(int(count * pace), count * 8, CHUNK_STEPS))
                if interrupts.raised:
                    raise interrupted(self.plan.name, done, stack.steps)
        return outputs

    def _chunk(self, stack: Stack, outputs: Sequence[np.ndarray], first: int, count: int) -> tuple[int, int]:
        """(steps run, what the entry said of the last) of `count` steps from number `first` on."""
        with self.store.lock:
            if self.store.mirror is not None:
                self.store.fetch()
            bound = self._bound_for(stack.at(first))
            tables = np.tile(np.frombuffer(bytes(bound.table), np.uint64), (count, 1))
            steps = np.arange(first, first + count, dtype=np.uint64)
            moving = [(place, feed, stacked) for (place, _), feed, stacked in
                      zip(self._feeds, stack.feeds, stack.stacked)]
            moving += [(place, output, True) for (place, *_), output in zip(bound.outputs, outputs)]
            for place, array, stacked in moving:
                stride = array.nbytes // stack.steps if stacked else 0
                tables[:, place] = np.uint64(address_of(array)) + steps * np.uint64(stride)
            contexts = np.tile(np.frombuffer(bytes(bound.context), np.uint64), (count, 1))
            contexts[:, 0] = address_of(tables) + np.arange(count) * tables.strides[0]
            pending = iter((address_of(contexts) + np.arange(count) * contexts.strides[0]).tolist())
            code = next(filter(None, map(self._entry, pending)), 0)
            if self.store.mirror is not None:
                self.store.changed(self._written)
        return count - length_hint(pending), code

    def fill_feeds(self, table: Any, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Writes the feeds' addresses; returns the copies made of those that are not plain row-major
        memory."""
        copies = []
        for (place, dtype), feed in zip(self._feeds, feeds):
            if not isinstance(feed, np.ndarray) or feed.dtype != dtype:
                self.checker.check_types(feeds)       # raises
            flags = feed.flags
            if not (flags.c_contiguous and flags.aligned):
                feed = np.array(feed, dtype, order="C")
                copies.append(feed)
            table[place] = address_of(feed)
        return copies

    def _bound_for(self, feeds: Sequence[np.ndarray]) -> Bound:
        try:
            key = tuple([feed.shape for feed in feeds])
            bound = self._bindings.get(key)
        except AttributeError:
            bound = None
        if bound is None:                # outside of `except`: an error then has no other as its cause
            self.checker.check_types(feeds)
            bound = self._bind(feeds)
            key = tuple(feed.shape for feed in feeds)
            self._bindings[key] = bound
            if len(self._bindings) > MAX_BINDINGS:
                self._bindings.popitem(last=False)
        if bound.stamp != (self.store.version, self.store.arena.version):
            self._fill_addresses(bound)
        self._bindings.move_to_end(key)
        return bound

    def _bind(self, feeds: Sequence[np.ndarray]) -> Bound:
        return Bound(self.binding(self.checker.symbols(feeds)), self.plan, (-1, -1))

    def _fill_addresses(self, bound: Bound) -> None:
        arena = self.store.arena
        arena.reserve(bound.binding.arena_bytes)
        self.place(bound, bound.binding.offsets, bound.binding.scratch, arena.address)
        bound.stamp = (self.store.version, arena.version)

    def place(self, bound: Bound, offsets: Mapping[str, int], scratch: Sequence[int], base: int) -> None:
        """Fills in the addresses of arena buffers and of launches' scratch (`base` plus its offset), of
        states and constants."""
        for i, b in enumerate(self.plan.buffers):
            if b.role == "arena":
                bound.table[i] = base + offsets[b.id]
            elif b.role == "state":
                bound.table[i] = self.store.address(b.name)
            elif b.role == "constant":
                bound.table[i] = address_of(self._constants[b.id])
        bound.context.parallel = self._parallel
        for i, offset in enumerate(scratch):
            bound.scratch[i] = base + offset

    def execute(self, bound: Bound) -> int:
        """Calls the entry: 0, or the number of the check that failed plus 1."""
        return int(self._entry(bound.pointer))

    def failure(self, code: int) -> FeedError | CompilerError:
        """The error that a result of the entry other than 0 means."""
        if 1 <= code <= len(self.plan.messages):
            return self.checker.check_failed(code - 1)
        return CompilerError(f"the code of {self.plan.name} returned {code}, which is no check's number",
                             stage="emit")

    def binding(self, symbols: dict[str, int]) -> Binding:
        """Offsets and sizes for these values of the symbols."""
        if set(symbols) != set(self.plan.symbols):
            raise UseError(f"{self.plan.name} has the symbols {list(self.plan.symbols)}, got {list(symbols)}")
        return bind(self.plan, {name: symbols[name] for name in self.plan.symbols}, self.threads)

    def peak_bytes(self, symbols: dict[str, int]) -> int:
        """The exact size of the working memory of a call with these values of the symbols, scratch
        included."""
        return self.binding(symbols).peak_bytes


def _constant(b: Buffer) -> np.ndarray:
    """The constant's bytes, aligned."""
    block = aligned_bytes(len(b.data), "a constant")
    block[...] = np.frombuffer(b.data, np.uint8)
    return block
