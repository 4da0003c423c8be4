"""The null device: plans, counts, checks feeds, and computes nothing. For nets that no machine at hand
could run."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphflow.compiler.plan.bind import Binding, bind, buffer_bytes
from graphflow.compiler.plan.dims import DimLike, evaluate
from graphflow.compiler.plan.errors import UseError
from graphflow.compiler.plan.schema import Branch, Copy, Item, Launch, Plan, Repeat
from graphflow.runtime.feeds import FeedChecker, Where, nowhere
from graphflow.runtime.steps import Stack, by_calls


@dataclass(frozen=True)
class Counts:
    """What one step would take, if every loop makes all its trips and every branch takes its costlier side.
    `bytes`: of all operands of all launches and copies; `peak_bytes`: the
    arena; `state_bytes`, `output_bytes`: beside it; `flops`: 0 where the program's cost is not known."""
    launches: int
    bytes: int
    flops: int
    peak_bytes: int
    state_bytes: int
    output_bytes: int


class NullProgram:
    """A plan without code. `flops`: the cost of a step, an expression of the plan's symbols."""

    def __init__(self, plan: Plan, threads: int = 1, where: Where = nowhere, flops: DimLike = 0) -> None:
        self.plan, self.threads, self.flops = plan, threads, flops
        self.checker = FeedChecker(plan, where)

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the right shapes and types, all zero; FeedError as on any device."""
        symbols = self.checker.symbols(feeds)
        outputs = [self.plan.buffer(id) for id in self.plan.outputs]
        return [np.zeros([evaluate(d, symbols) for d in b.shape], b.dtype.numpy) for b in outputs]

    def run_steps(self, stack: Stack) -> list[np.ndarray]:
        """The outputs of many steps, stacked."""
        return by_calls(self.plan.name, self.run, stack)

    def binding(self, symbols: dict[str, int]) -> Binding:
        """Offsets and sizes for these values of the symbols."""
        if set(symbols) != set(self.plan.symbols):
            raise UseError(f"{self.plan.name} has the symbols {list(self.plan.symbols)}, got {list(symbols)}")
        return bind(self.plan, {name: symbols[name] for name in self.plan.symbols}, self.threads)

    def peak_bytes(self, symbols: dict[str, int]) -> int:
        """The exact size of the working memory that a call would take, scratch included."""
        return self.binding(symbols).peak_bytes

    def counts(self, symbols: dict[str, int]) -> Counts:
        """What a step with these values of the symbols would take."""
        size = {b.id: buffer_bytes(b, symbols) for b in self.plan.buffers}
        launched, moved = _work(self.plan.body, size, symbols)

        def role_bytes(role: str) -> int:
            return sum(size[b.id] for b in self.plan.buffers if b.role == role)

        return Counts(launches=launched, bytes=moved,
                      flops=evaluate(self.flops, symbols), peak_bytes=self.peak_bytes(symbols),
                      state_bytes=role_bytes("state"), output_bytes=role_bytes("output"))


def _work(body: Sequence[Item], size: Mapping[str, int], symbols: Mapping[str, int]) -> tuple[int, int]:
    """(launches, bytes of their operands and of copies) of the items."""
    launched = moved = 0
    for item in body:
        if isinstance(item, Launch):
            launched, moved = launched + 1, moved + sum(size[id] for id in item.buffers)
        elif isinstance(item, Copy):
            moved += size[item.source] + size[item.target]
        elif isinstance(item, Repeat):
            trips, inner = evaluate(item.trips, symbols), _work(item.body, size, symbols)
            launched, moved = launched + trips * inner[0], moved + trips * inner[1]
        elif isinstance(item, Branch):
            sides = [_work(side, size, symbols) for side in (item.then, item.otherwise)]
            more = max(sides, key=lambda work: work[::-1])
            launched, moved = launched + more[0], moved + more[1]
    return launched, moved
