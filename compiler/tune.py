"""Tuning: which of its candidates computes each contraction fastest on the machine at hand.

Without it every choice follows from the shapes and the target. With it the compiler makes the code of every
candidate (see `emit/candidates.py`) and has it timed by a callback: it runs nothing itself. A choice of the
cost model is left only for one that is clearly faster, and that twice. What was found is part of the
program: it is printed with the kernels and kept in the cache.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import evaluate, product
from graphflow.compiler.plan.trial import Array, Measure, Trial, Variant
from graphflow.compiler.target import Target

GAIN = 0.97
"""A candidate must take at most this share of the cost model's time."""
MOST_BYTES = 1 << 32
"""Kernels whose arguments take more memory are not timed."""


@dataclass(frozen=True)
class Choice:
    """What was found for a kernel: its tile, and the seconds of it and of the cost model's choice (equal
    where that is the choice); `count`: how many ways were timed."""

    tile: Mapping[str, int]
    seconds: float
    default: float
    count: int

    def __str__(self) -> str:
        if not self.tile:
            return f"the cost model's choice, {self.seconds * 1e6:.1f} µs, is the best of {self.count}"
        tile = ", ".join(f"{name}={number}" for name, number in self.tile.items())
        return (f"tile [{tile}] takes {self.seconds * 1e6:.1f} µs, the cost model's choice "
                f"{self.default * 1e6:.1f} µs; {self.count} ways were timed")


@dataclass
class Tuning:
    """How a program is tuned: the callback, the number of threads that it uses, and the values of the
    program's symbols while kernels are timed. `choices` has what was found, by the kernels' names; None
    before."""

    measure: Measure
    threads: int
    symbols: Mapping[str, int] = field(default_factory=dict)
    choices: dict[str, Choice] | None = None

    def key(self) -> str:
        """What choices depend on beside the graph and the target, for cache keys."""
        return f"tuned for {self.threads} threads {sorted(self.symbols.items())}"

    def text(self) -> str:
        """The choices as text, for the cache."""
        return json.dumps({name: [dict(c.tile), c.seconds, c.default, c.count]
                           for name, c in (self.choices or {}).items()})

    def read(self, text: str) -> None:
        """Takes the choices from what `text` gave."""
        self.choices = {name: Choice(*values) for name, values in json.loads(text).items()}

    def apply(self, program: KernelProgram, target: Target) -> KernelProgram:
        """The program with the choices in its kernels' tiles; they are made now if none were before."""
        if self.choices is None:
            self.choices = {}
            for name, kernel in program.kernels.items():
                if isinstance(kernel, ContractionKernel) and not kernel.contraction.tile:
                    choice = self._choose(kernel, target)
                    if choice is not None:
                        self.choices[name] = choice
        kernels = dict(program.kernels)
        for name, choice in self.choices.items():
            kernel = kernels[name]
            assert isinstance(kernel, ContractionKernel)
            kernels[name] = _tiled(kernel, choice.tile)
        return replace(program, kernels=kernels)

    def _choose(self, kernel: ContractionKernel, target: Target) -> Choice | None:
        from graphflow.compiler.emit.candidates import candidates
        from graphflow.compiler.plan.dims import TYPICAL_SIZE

        symbols = {name: self.symbols.get(name, TYPICAL_SIZE) for name in kernel.symbols}
        tiles = candidates(kernel, target)
        arguments = [Array(a.dtype, evaluate(product(a.shape), symbols), a.mode) for a in kernel.arguments]
        bytes = sum(a.size * a.dtype.bytes for a in arguments)
        if len(tiles) == 1 or min(a.size for a in arguments) < 1 or bytes > MOST_BYTES:
            return None
        rounds = self.measure(_trial(kernel, tiles, arguments, symbols, target))
        best, ratio = _best(rounds)
        default = median(row[0] for row in rounds)
        if ratio > GAIN:
            return Choice({}, default, default, len(tiles))
        tile = tiles[best]
        again = self.measure(_trial(kernel, [{}, tile], arguments, symbols, target))
        default = median(row[0] for row in again)
        if _best(again)[1] > GAIN:
            return Choice({}, default, default, len(tiles))
        return Choice(tile, median(row[1] for row in again), default, len(tiles))


def _best(rounds: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The number of the variant, not the first, with the least median of its share of the first one's time in
    the same round; and that."""
    shares = [median(row[i] / row[0] for row in rounds) for i in range(1, len(rounds[0]))]
    return min(range(len(shares)), key=shares.__getitem__) + 1, min(shares)


def _tiled(kernel: ContractionKernel, tile: Mapping[str, int], name: str = "") -> ContractionKernel:
    return replace(kernel, name=name or kernel.name, contraction=replace(kernel.contraction, tile=tile))


def _trial(kernel: ContractionKernel, tiles: Sequence[Mapping[str, int]], arguments: Sequence[Array],
           symbols: Mapping[str, int], target: Target) -> Trial:
    """One module with a function for each tile."""
    from graphflow.compiler.emit.builder import Module
    from graphflow.compiler.emit.module import emit_kernel, kernel_scratch, kernel_shared, kernel_tasks
    from graphflow.compiler.emit.object import compile_object

    module, variants = Module(), []
    for i, tile in enumerate(tiles):
        variant = _tiled(kernel, tile, f"{kernel.name}.{i}")
        emit_kernel(module, variant, target)
        tasks, scratch, shared = (evaluate(size(variant, target), symbols)
                                  for size in (kernel_tasks, kernel_scratch, kernel_shared))
        variants.append(Variant(variant.name, tasks, scratch, shared, module.before.get(variant.name)))
    return Trial(kernel.name, compile_object(module.text(), target), tuple(arguments),
                 tuple(symbols.values()), tuple(variants))
