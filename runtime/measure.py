"""Measuring what a program really touches, by poison and canaries and not by the planner's own numbers."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphflow.compiler.plan.bind import Binding, align, blocks_of, buffer_bytes
from graphflow.compiler.plan.errors import CompilerError
from graphflow.runtime.arena import address_of, aligned_bytes
from graphflow.runtime.store import Store

if TYPE_CHECKING:
    from graphflow.runtime.cpu import CpuProgram

CANARY = 256
"""Bytes on either side of each buffer that nobody may write; a multiple of the alignment."""
MARGIN = 1 << 16
"""Bytes on either side of an arena whose real extent is measured."""
POISONS = (0xA5, 0x5A)
"""A byte is untouched if it is still poison in both of two runs: no value can look like both."""


@dataclass(frozen=True)
class Measurement:
    """What one call touched. `planned_bytes` is the plan's peak; `first` and `end` bound the bytes of the
    arena that the call wrote when it ran in an arena of just that size. `overruns` says who wrote where
    nothing is his; `never_written` maps buffers, and "scratch" with the number of a launch, to how many of
    their bytes the call left alone."""
    planned_bytes: int
    first: int
    end: int
    overruns: tuple[str, ...]
    never_written: Mapping[str, int]

    @property
    def measured_bytes(self) -> int:
        """The extent of the memory in use: 0 if nothing was."""
        return self.end - self.first


@dataclass(frozen=True)
class _Layout:
    """Offsets in a block of `bytes`; `spans` are the pieces (name -> start, end) that may be written."""
    offsets: Mapping[str, int]
    scratch: Sequence[int]
    bytes: int
    spans: Mapping[str, tuple[int, int]]


def measure_arena(program: CpuProgram, feeds: Sequence[np.ndarray]) -> Measurement:
    """Runs the program four times on these feeds, from the same state, and puts the state back.

    Twice in an arena of exactly the planned size between poisoned margins, then twice with the buffers
    spread apart and a canary on either side of each. Raises what `run` raises.
    """
    with program.store.lock:
        binding = program.binding(program.checker.symbols(feeds))
        tight, spread = _tight(binding), _spread(program, binding)
        touched = _touched(program, feeds, binding, tight)
        places = np.flatnonzero(touched[MARGIN:len(touched) - MARGIN])
        outside = np.flatnonzero(np.delete(touched, np.s_[MARGIN:len(touched) - MARGIN]))
        overruns = [f"{len(outside)} bytes around the arena were written"] if len(outside) else []
        apart = _touched(program, feeds, binding, spread)
        overruns += _overruns(apart, spread)
        untouched = {name: int(end - start - np.count_nonzero(apart[start:end]))
                     for name, (start, end) in spread.spans.items()}
    return Measurement(binding.peak_bytes, int(places[0]) if len(places) else 0,
                       int(places[-1]) + 1 if len(places) else 0, tuple(overruns),
                       {name: count for name, count in untouched.items() if count})


def run_guarded(program: CpuProgram, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One call with canaries around every arena buffer, the scratch and every output.

    CompilerError naming the buffer that was overrun; else as `CpuProgram.run`.
    """
    with program.store.lock:
        binding = program.binding(program.checker.symbols(feeds))
        layout = _spread(program, binding)
        block, outputs, code = _call(program, feeds, binding, layout, POISONS[0])
        found = _overruns(block != POISONS[0], layout)
    if found:
        raise CompilerError(f"the native code of {program.plan.name} writes where it must not: "
                            + "; ".join(found), stage="emit")
    if code:
        raise program.failure(code)
    return outputs


def _tight(binding: Binding) -> _Layout:
    return _Layout({id: MARGIN + at for id, at in binding.offsets.items()},
                   [MARGIN + at for at in binding.scratch], binding.peak_bytes + 2 * MARGIN, {})


def _spread(program: CpuProgram, binding: Binding) -> _Layout:
    """Every buffer in a place of its own (those that take over memory still do), canaries in between."""
    offsets: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    scratch = [0] * len(binding.scratch)
    at = CANARY
    for block in blocks_of(program.plan, binding.symbols, binding.threads):
        offsets.update(dict.fromkeys(block.buffers, at))
        if not block.buffers:
            scratch[block.launch] = at
        spans["/".join(block.buffers) or f"scratch {block.launch}"] = (at, at + block.bytes)
        at += align(block.bytes) + CANARY
    return _Layout(offsets, scratch, at, spans)


def _touched(program: CpuProgram, feeds: Sequence[np.ndarray], binding: Binding,
             layout: _Layout) -> np.ndarray:
    """For each byte of the layout's block, whether a call writes it; the state is put back."""
    written = np.zeros(layout.bytes, np.bool_)
    before = _snapshot(program.store)
    for poison in POISONS:
        block, _, code = _call(program, feeds, binding, layout, poison)
        for name, value in before.items():
            program.store[name] = value
        if code:
            raise program.failure(code)
        written |= block != poison
    return written


def _snapshot(store: Store) -> dict[str, np.ndarray]:
    return {name: store[name] for name in store}


def _call(program: CpuProgram, feeds: Sequence[np.ndarray], binding: Binding, layout: _Layout,
          poison: int) -> tuple[np.ndarray, list[np.ndarray], int]:
    """Runs once on a fresh poisoned block: (the block, the outputs, the entry's result)."""
    from graphflow.runtime.cpu import Bound
    block = aligned_bytes(layout.bytes, "the guarded arena")
    block[...] = poison
    bound = Bound(binding, program.plan, (-1, -1))
    base = address_of(block)
    program.place(bound, layout.offsets, layout.scratch, base)
    copies = program.fill_feeds(bound.table, feeds)
    guarded = []
    sizes = {i: buffer_bytes(program.plan.buffers[i], binding.symbols) for i, _, _ in bound.outputs}
    for place, size in sizes.items():
        memory = aligned_bytes(size + 2 * CANARY, "an output")
        memory[...] = poison
        bound.table[place] = address_of(memory) + CANARY
        guarded.append(memory)
    code = program.execute(bound)
    del copies
    outputs = []
    for (place, shape, dtype), memory in zip(bound.outputs, guarded):
        if np.any(memory[:CANARY] != poison) or np.any(memory[CANARY + sizes[place]:] != poison):
            raise CompilerError(f"the native code of {program.plan.name} writes beyond its output "
                                f"{program.plan.buffers[place].name!r}", stage="emit")
        outputs.append(memory[CANARY:CANARY + sizes[place]].view(dtype).reshape(shape).copy())
    return block, outputs, code


def _overruns(touched: np.ndarray, layout: _Layout) -> list[str]:
    """For every piece, whether bytes between it and its neighbours were written."""
    out, end_before, name_before = [], 0, "the arena's start"
    for name, (start, end) in [*layout.spans.items(), ("the arena's end", (layout.bytes, layout.bytes))]:
        count = int(np.count_nonzero(touched[end_before:start]))
        if count:
            out.append(f"{count} bytes between {name_before} and {name}")
        end_before, name_before = end, name
    return out
