"""How much a kernel computes and how much memory it must touch, counted on its form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from graphflow.compiler.kernel.form import (
    Apply,
    ContractionKernel,
    Expr,
    Guarded,
    Kernel,
    Load,
    Loop,
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.plan.dims import DimLike, evaluate, product


@dataclass(frozen=True)
class Work:
    """`flops`: arithmetic operations, those of functions such as exp as `SCALARS` weighs them, and those that
    a guard skips included. `bytes`: the least traffic, each element that is read or written once.
    `footprint`: the bytes of all arguments."""

    flops: int
    bytes: int
    footprint: int


def kernel_work(kernel: Kernel, symbols: Mapping[str, int]) -> Work:
    """The work of one launch, for these values of the kernel's symbols. A routine counts as moving data
    only."""
    count = _Count(symbols)
    sizes = {a.name: evaluate(product(a.shape), symbols) for a in kernel.arguments}
    if isinstance(kernel, RoutineKernel):
        reads = {a.name: sizes[a.name] for a in kernel.arguments if "r" in a.mode}
        writes = {a.name: sizes[a.name] for a in kernel.arguments if "w" in a.mode}
    else:
        if isinstance(kernel, ContractionKernel):
            count.contraction(kernel)
        else:
            count.body(kernel.body, 1)
        reads, writes = count.reads, count.writes
    touched = sum(a.dtype.bytes * min(n, sizes[a.name]) for a in kernel.arguments
                  for n in (reads.get(a.name, 0), writes.get(a.name, 0)))
    return Work(count.flops, touched, sum(a.dtype.bytes * sizes[a.name] for a in kernel.arguments))


@dataclass
class _Count:
    """What a walk over a kernel has counted: operations, and loads and stores of each argument."""

    symbols: Mapping[str, int]
    flops: int = 0
    reads: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)

    def trips(self, loops: Iterable[tuple[str, DimLike]]) -> int:
        return prod(evaluate(extent, self.symbols) for _, extent in loops)

    def contraction(self, kernel: ContractionKernel) -> None:
        c = kernel.contraction
        batch, m, n, k = (self.trips(axes) for axes in (c.batch, c.m, c.n, c.k))
        n *= self.trips(c.groups)
        self.flops += 2 * batch * m * n * k
        self.expression(c.a, batch * m * k)
        self.expression(c.b, batch * k * n)
        self.body((*c.lets, *c.stores), batch * m * self.trips(c.n))

    def body(self, body: Iterable[Statement], times: int) -> None:
        for s in body:
            if isinstance(s, Loop):
                self.body(s.body, times * evaluate(s.extent, self.symbols))
                continue
            self.expression(s.value, times)
            if isinstance(s, Store):
                self.writes[s.arg] += times

    def expression(self, e: Expr, times: int) -> None:
        if isinstance(e, Load):
            self.reads[e.arg] += times
        elif isinstance(e, Apply):
            self.flops += SCALARS[e.function].flops * times
            for argument in e.args:
                self.expression(argument, times)
        elif isinstance(e, Guarded):
            self.expression(e.value, times)
            self.expression(e.fill, times)
        elif isinstance(e, Reduce):
            inside = times * self.trips(e.loops)
            self.flops += inside
            self.body(e.lets, inside)
            for operand in e.operands:
                self.expression(operand, inside)
