"""Collapses loops that walk memory contiguously into one (part of tile).

Two adjacent loop variables u, v collapse where every access that uses them has them as adjacent axes, v
running over the whole of its axis: then (u, v) is one axis of extent U*V, and the argument's shape is a
reshape of the buffer's. All loop nests of a kernel that walk the same axes (a row's reductions and its
stores) collapse together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    Apply,
    Contraction,
    ContractionKernel,
    Expr,
    Guarded,
    Index,
    Let,
    Load,
    Loop,
    LoopKernel,
    Nest,
    Reduce,
    Statement,
    Store,
)
from graphflow.compiler.plan.dims import DimLike, symbol, symbols_of

Pair = tuple[str, str]


def collapse(kernel: Nest) -> Nest:
    """The kernel with everything collapsed that can be."""
    depth = max((len(nest) for nest, _ in _nests(kernel)), default=0)
    level = 0
    while level < depth - 1:
        merged = _merge(kernel, level, 0) or _merge(kernel, level, 1)
        if merged is None:
            level += 1
        else:
            kernel = merged
    return kernel


def _nests(kernel: Nest) -> Iterator[tuple[tuple[tuple[str, DimLike], ...], bool]]:
    """The variables of every perfect nest, outermost first, and whether it is a reduction's."""
    if isinstance(kernel, ContractionKernel):
        c = kernel.contraction
        yield from ((axes, False) for axes in (c.batch, c.m, c.n, c.k))
    else:
        yield from ((nest, False) for nest in _loop_nests(kernel.body))
    for e in walk.expressions(kernel):
        if isinstance(e, Reduce):
            yield e.loops, True


def _loop_nests(body: tuple[Statement, ...]) -> Iterator[tuple[tuple[str, DimLike], ...]]:
    for s in body:
        if not isinstance(s, Loop):
            continue
        nest = [(s.var, s.extent)]
        while len(s.body) == 1 and isinstance(s.body[0], Loop) and s.body[0].kind == s.kind:
            s = s.body[0]
            nest.append((s.var, s.extent))
        yield tuple(nest)
        yield from _loop_nests(s.body)


def _merge(kernel: Nest, level: int, further: int) -> Nest | None:
    """Merges the pairs at this distance from the innermost loop, those of loops that are no reduction's so
    much further from it (rows that lie side by side have loops of their own inside); None if none can be."""
    extents = dict(walk.loops(kernel))
    pairs = set()
    for nest, reduces in _nests(kernel):
        distance = level if reduces else level + further
        if len(nest) >= 2 + distance:
            pairs.add((nest[-2 - distance][0], nest[-1 - distance][0]))
    accesses = [(e.arg, e.index) for e in walk.expressions(kernel) if isinstance(e, Load)]
    accesses += [(s.arg, s.index) for s in walk.stores(kernel)]
    shapes = {a.name: a.shape for a in kernel.arguments}
    while pairs:
        at = _positions(accesses, pairs, shapes, extents)
        bad = {p for p in pairs if _used_elsewhere(kernel, p, accesses, at)}
        if not bad:
            return _Rewrite(pairs, at, extents).kernel(kernel)
        pairs -= bad
    return None


def _positions(accesses: list[tuple[str, tuple[DimLike, ...]]], pairs: set[Pair],
               shapes: Mapping[str, tuple[DimLike, ...]], extents: Mapping[str, DimLike]) -> dict[str, int]:
    """For each argument the axis at which all of its accesses have a pair, where there is one."""
    found: dict[str, int | None] = {}
    for arg, index in accesses:
        here = None
        for p in range(len(index) - 1):
            match = [(u, v) for u, v in pairs if index[p] == symbol(u) and index[p + 1] == symbol(v)]
            if match and shapes[arg][p + 1] == extents[match[0][1]]:
                here = p
        if arg not in found:
            found[arg] = here
        elif found[arg] != here:
            found[arg] = None
    return {arg: p for arg, p in found.items() if p is not None}


def _used_elsewhere(kernel: Nest, pair: Pair, accesses: list[tuple[str, tuple[DimLike, ...]]],
                    at: Mapping[str, int]) -> bool:
    names = set(pair)
    for arg, index in accesses:
        p = at.get(arg)
        for position, d in enumerate(index):
            if p is not None and position in (p, p + 1):
                continue
            if names & symbols_of(d):
                return True
    for e in walk.expressions(kernel):
        if isinstance(e, Index) and names & symbols_of(e.at):
            return True
        if isinstance(e, Guarded) and any(names & symbols_of(g.at, g.bound) for g in e.guards):
            return True
    return False


class _Rewrite:
    """Replaces each pair by its first variable, over the product of the extents."""

    def __init__(self, pairs: set[Pair], at: Mapping[str, int], extents: Mapping[str, DimLike]):
        self.gone = {v: u for u, v in pairs}
        self.extent = {u: extents[u] * extents[v] for u, v in pairs}
        self.at = at

    def kernel(self, kernel: Nest) -> Nest:
        arguments = tuple(replace(a, shape=self.shape(a.name, a.shape)) for a in kernel.arguments)
        indirect = {k: self.expr(e) for k, e in kernel.indirect.items()}
        if isinstance(kernel, LoopKernel):
            return replace(kernel, arguments=arguments, indirect=indirect, body=self.body(kernel.body))
        c = kernel.contraction
        made = Contraction(self.loops(c.batch), self.loops(c.m), self.loops(c.n), self.loops(c.k),
                           self.expr(c.a), self.expr(c.b), tuple(self.store(s) for s in c.stores), c.tile,
                           tuple(Let(x.name, self.expr(x.value)) for x in c.lets), c.groups)
        return replace(kernel, arguments=arguments, indirect=indirect, contraction=made)

    def shape(self, arg: str, shape: tuple[DimLike, ...]) -> tuple[DimLike, ...]:
        p = self.at.get(arg)
        return shape if p is None else (*shape[:p], shape[p] * shape[p + 1], *shape[p + 2 :])

    def index(self, arg: str, index: tuple[DimLike, ...]) -> tuple[DimLike, ...]:
        p = self.at.get(arg)
        return index if p is None else (*index[: p + 1], *index[p + 2 :])

    def loops(self, loops: tuple[tuple[str, DimLike], ...]) -> tuple[tuple[str, DimLike], ...]:
        return tuple((n, self.extent.get(n, x)) for n, x in loops if n not in self.gone)

    def store(self, s: Store) -> Store:
        return Store(s.arg, self.index(s.arg, s.index), self.expr(s.value))

    def body(self, body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        out: list[Statement] = []
        for s in body:
            if isinstance(s, Let):
                out.append(Let(s.name, self.expr(s.value)))
            elif isinstance(s, Store):
                out.append(self.store(s))
            elif s.var in self.gone:
                out.extend(self.body(s.body))
            else:
                out.append(Loop(s.var, self.extent.get(s.var, s.extent), self.body(s.body), s.kind))
        return tuple(out)

    def expr(self, e: Expr) -> Expr:
        if isinstance(e, Load):
            return replace(e, index=self.index(e.arg, e.index))
        if isinstance(e, Apply):
            return replace(e, args=tuple(self.expr(x) for x in e.args))
        if isinstance(e, Guarded):
            return replace(e, value=self.expr(e.value), fill=self.expr(e.fill))
        if isinstance(e, Reduce):
            return replace(e, loops=self.loops(e.loops), operands=tuple(self.expr(x) for x in e.operands),
                           lets=tuple(Let(x.name, self.expr(x.value)) for x in e.lets))
        return e
