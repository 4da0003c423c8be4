"""Runs whole kernel programs with the interpreter, on a poisoned arena."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.kernel.interpret import run_kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.bind import bind
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.errors import CompilerError, FeedError
from graphflow.compiler.plan.layouts import in_memory
from graphflow.compiler.plan.schema import (
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Launch,
    Repeat,
    launches,
    positions,
)

Arrays = Mapping[str, Any]


def run_program(program: KernelProgram, feeds: Arrays, states: Arrays, symbols: Mapping[str, int],
                threads: int = 1
                ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """(outputs by name, new values of the states by name, peak bytes of the arena) of one call.

    Where the `memory` stage has run, the arena is one block, laid out by `bind`; before it each buffer is an
    array of its own. A buffer that is not yet or no longer alive holds NaN or the bytes 0xCD. `states` is
    left as it is. FeedError where a guard or a check fails; CompilerError where a kernel does what it must
    not.
    """
    for guard in program.plan.guards:
        left, right = evaluate(guard.left, symbols), evaluate(guard.right, symbols)
        if left != right:
            raise FeedError(f"{guard.left} = {guard.right} must hold, but here it says {left} = {right}")
    run = _Program(program, symbols, threads)
    run.fill("feed", feeds)
    run.fill("state", states)
    run.body(program.plan.body, 0)
    plan, arrays = program.plan, run.arrays
    return ({plan.buffer(id).name: arrays[id] for id in plan.outputs},
            {plan.buffer(id).name: arrays[id] for id in plan.states}, run.peak)


class _Program:
    def __init__(self, program: KernelProgram, symbols: Mapping[str, int], threads: int) -> None:
        self.program, self.symbols = program, dict(symbols)     # and the counters of loops
        self.buffers = {b.id: b for b in program.plan.buffers}
        self.taken_over = {b.alias for b in self.buffers.values()}
        self.placed = any(item.writes for item in launches(program.plan.body))
        self.arrays: dict[str, np.ndarray] = {}
        self.peak = 0
        if self.placed:
            binding = bind(program.plan, symbols, threads)
            arena = np.full(binding.arena_bytes, 0xCD, np.uint8)
            self.peak = binding.peak_bytes
        for b in self.buffers.values():
            if b.role == "view":
                continue
            shape = self.shape(b)
            size = int(np.prod(shape, dtype=np.int64)) * b.dtype.bytes
            if b.role == "constant":
                self.arrays[b.id] = np.frombuffer(b.data, b.dtype.numpy).reshape(shape)
            elif b.role == "arena" and self.placed:
                start = binding.offsets[b.id]
                self.arrays[b.id] = arena[start:start + size].view(b.dtype.numpy).reshape(shape)
            else:
                self.arrays[b.id] = np.empty(shape, b.dtype.numpy)
                poison(self.arrays[b.id])
                self.peak += size if b.role == "arena" else 0

    def shape(self, b: Buffer) -> tuple[int, ...]:
        """The buffer's shape in the order of memory."""
        return tuple(evaluate(d, self.symbols) for d in in_memory(b.layout, b.shape))

    def fill(self, role: str, given: Arrays) -> None:
        """Copies the caller's arrays."""
        for b in self.buffers.values():
            if b.role != role:
                continue
            if b.name not in given:
                raise FeedError(f"the {role} {b.name!r} is missing")
            array = np.asarray(given[b.name])
            if (array.shape, array.dtype) != (self.shape(b), b.dtype.numpy):
                raise FeedError(f"the {role} {b.name!r} is {array.dtype}{list(array.shape)}, declared "
                                f"{b.dtype}{list(self.shape(b))}")
            self.arrays[b.id][...] = array

    def begin(self, position: int) -> None:
        """Poisons what comes to life here, but for what takes over the memory of something alive."""
        for b in self.buffers.values():
            if self.placed and b.role == "arena" and b.first == position and not b.alias:
                poison(self.arrays[b.id])

    def end(self, position: int) -> None:
        """Poisons what dies here, but for what another one has taken over."""
        for b in self.buffers.values():
            if self.placed and b.role == "arena" and b.last == position and b.id not in self.taken_over:
                poison(self.arrays[b.id])

    def array(self, id: str) -> np.ndarray:
        """The buffer's memory; for a view as the counters stand."""
        b = self.buffers[id]
        if b.role != "view":
            return self.arrays[id]
        shape, start = self.shape(b), evaluate(b.offset, self.symbols)
        stop = start + int(np.prod(shape, dtype=np.int64))
        whole = self.arrays[b.base].reshape(-1)
        if not 0 <= start <= stop <= len(whole):
            raise CompilerError(f"the view {id} is elements {start} to {stop} of {len(whole)}",
                                stage="interpret")
        return whole[start:stop].reshape(shape)

    def body(self, body: Sequence[Item], position: int) -> None:
        """Runs the items, the first of which has this position."""
        for item in body:
            last = position + positions([item]) - 1
            self.begin(position)
            if isinstance(item, Repeat):
                self.end(position)
                self.repeat(item, position)
            elif isinstance(item, Branch):
                holds = self.array(item.predicate).all()
                self.end(position)
                if holds:
                    self.body(item.then, position + 1)
                else:
                    self.body(item.otherwise, position + 1 + positions(item.then))
            else:
                self.item(item)
            if last != position:
                self.begin(last)
            self.end(last)
            position = last + 1

    def repeat(self, item: Repeat, position: int) -> None:
        done, trips = 0, evaluate(item.trips, self.symbols)
        while done < trips and (not item.condition or self.array(item.condition).all()):
            self.symbols[item.counter] = done
            self.body(item.body, position + 1)
            done += 1
        self.symbols[item.counter] = done

    def item(self, item: Launch | Copy | Check) -> None:
        if isinstance(item, Copy):
            target = self.array(item.target)
            target[...] = self.array(item.source).reshape(target.shape)
        elif isinstance(item, Check):
            if not self.array(item.buffer).all():
                message = self.program.plan.messages[item.code]
                raise FeedError(message.text)
        else:
            self.launch(item)

    def launch(self, item: Launch) -> None:
        kernel = self.program.kernels[item.kernel]
        given: dict[str, np.ndarray] = {}
        for a, id in zip(kernel.arguments, item.buffers):
            shape = tuple(evaluate(d, self.symbols) for d in a.shape)
            array = self.array(id)
            if array.size != np.prod(shape, dtype=np.int64):
                raise CompilerError(f"kernel {kernel.name}: {a.name} is {list(shape)}, but {id} is "
                                    f"{list(array.shape)}",
                                    stage="interpret")
            given[a.name] = array.reshape(shape)
        run_kernel(kernel, given, self.symbols)


def poison(array: np.ndarray) -> None:
    """NaN in floats, 0xCD in the bytes of all else (True in bools)."""
    if array.dtype.kind == "f":
        array.fill(np.nan)
    elif array.dtype.kind == "b":
        array.fill(True)
    else:
        array.reshape(-1).view(np.uint8)[...] = 0xCD
