"""Visiting kernels: every statement, expression and dimension in them."""

from __future__ import annotations

from collections.abc import Iterator

from graphflow.compiler.kernel.form import (
    Apply,
    ContractionKernel,
    Expr,
    Guarded,
    Index,
    Kernel,
    Let,
    Load,
    Loop,
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.plan.dims import DimLike, symbols_of


def statements(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """The statements of a body at every depth, a loop before its own."""
    for s in body:
        yield s
        if isinstance(s, Loop):
            yield from statements(s.body)


def subexpressions(e: Expr) -> Iterator[Expr]:
    """The expression and everything in it."""
    yield e
    inner: tuple[Expr, ...] = ()
    if isinstance(e, Apply):
        inner = e.args
    elif isinstance(e, Guarded):
        inner = (e.value, e.fill)
    elif isinstance(e, Reduce):
        inner = (*(let.value for let in e.lets), *e.operands)
    for x in inner:
        yield from subexpressions(x)


def roots(kernel: Kernel) -> Iterator[Expr]:
    """The outermost expressions of a kernel: values of lets and stores, operands, indirect integers; a
    routine has none."""
    yield from kernel.indirect.values()
    if isinstance(kernel, ContractionKernel):
        c = kernel.contraction
        yield c.a
        yield c.b
        yield from (let.value for let in c.lets)
        yield from (s.value for s in c.stores)
    elif not isinstance(kernel, RoutineKernel):
        for s in statements(kernel.body):
            if isinstance(s, (Let, Store)):
                yield s.value


def expressions(kernel: Kernel) -> Iterator[Expr]:
    """Every expression in the kernel, at every depth."""
    for e in roots(kernel):
        yield from subexpressions(e)


def stores(kernel: Kernel) -> list[Store]:
    """Every store of the kernel."""
    if isinstance(kernel, ContractionKernel):
        return list(kernel.contraction.stores)
    if isinstance(kernel, RoutineKernel):
        return []
    return [s for s in statements(kernel.body) if isinstance(s, Store)]


def loops(kernel: Kernel) -> list[tuple[str, DimLike]]:
    """(variable, extent) of every loop, axis and reduction variable."""
    found: list[tuple[str, DimLike]] = []
    if isinstance(kernel, ContractionKernel):
        c = kernel.contraction
        found += [*c.batch, *c.m, *c.n, *c.k, *c.groups]
    elif not isinstance(kernel, RoutineKernel):
        found += [(s.var, s.extent) for s in statements(kernel.body) if isinstance(s, Loop)]
    for e in expressions(kernel):
        if isinstance(e, Reduce):
            found += e.loops
    return found


def dims(kernel: Kernel) -> Iterator[DimLike]:
    """Every dimension in the kernel: shapes, extents, indices, guards."""
    for a in kernel.arguments:
        yield from a.shape
    for _, extent in loops(kernel):
        yield extent
    for s in stores(kernel):
        yield from s.index
    for e in expressions(kernel):
        if isinstance(e, Load):
            yield from e.index
        elif isinstance(e, Index):
            yield e.at
        elif isinstance(e, Guarded):
            for g in e.guards:
                yield g.at
                yield g.bound


def symbols(kernel: Kernel) -> tuple[str, ...]:
    """The program's symbols that occur in the kernel, sorted."""
    own = {name for name, _ in loops(kernel)} | set(kernel.indirect)
    return tuple(sorted(symbols_of(*dims(kernel)) - own))


def loaded(kernel: Kernel) -> set[str]:
    """The arguments that the kernel reads."""
    return {e.arg for e in expressions(kernel) if isinstance(e, Load)}
