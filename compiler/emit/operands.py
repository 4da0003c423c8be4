"""What the operands of a contraction look like: their axes, guards, and how their elements lie."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from graphflow.compiler.emit.expr import strides
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    Const,
    Contraction,
    ContractionKernel,
    Expr,
    Guard,
    Guarded,
    Index,
    Load,
    Reduce,
)
from graphflow.compiler.plan.dims import (
    Dim,
    DimLike,
    Symbol,
    bounds_of,
    product,
    substitute,
    symbol,
    symbols_of,
)
from graphflow.compiler.target import Target

Axes = tuple[tuple[str, DimLike], ...]
_LONG = 8
"""Sums of so many products for each row of the result are long."""


def algorithm_asked(kernel: ContractionKernel) -> int | None:
    """The number of the algorithm that the kernel's tile names (see `candidates`); None where a cost model
    decides. A register tile alone is one for the direct algorithm, 0."""
    tile = kernel.contraction.tile
    return tile.get("algorithm", 0 if tile else None)


def drop_guard(e: Expr, limit: Guard | None) -> Expr:
    """The expression without that guard, if it is its outermost."""
    if limit is None or not isinstance(e, Guarded):
        return e
    kept = tuple(g for g in e.guards if g != limit)
    return Guarded(kept, e.value, e.fill) if kept else e.value


def shared_limit(a: Expr, b: Expr, k: Axes) -> Guard | None:
    """A guard of both, on the first k axis alone, outside which both are 0."""
    if not (k and isinstance(a, Guarded) and isinstance(b, Guarded)
            and all(_is_zero(x.fill) for x in (a, b))):
        return None
    var = k[0][0]
    others = {v for v, _ in k[1:]}
    for g in a.guards:
        rest = g.at - symbol(var)
        if g in b.guards and not (symbols_of(rest, g.bound) & ({var} | others)) and _positive(rest):
            return g
    return None


def _is_zero(e: Expr) -> bool:
    return getattr(e, "value", None) == 0


def _positive(d: DimLike) -> bool:
    low, _ = bounds_of(d, {})
    return low is not None and low >= 0


def load_offset(kernel: ContractionKernel, e: Expr) -> DimLike | None:
    """The number of the element that a load reads; None if the expression is no load."""
    if not isinstance(e, Load):
        return None
    return _place(kernel, e.arg, e.index)


def _place(kernel: ContractionKernel, arg: str, index: tuple[DimLike, ...]) -> DimLike:
    """The number of an element of an argument."""
    argument = next(x for x in kernel.arguments if x.name == arg)
    total: DimLike = 0
    for d, step in zip(index, strides(argument)):
        total = total + d * step
    return total


def coefficient(d: DimLike, var: str) -> DimLike | None:
    """What `var` is multiplied by, if the dimension is linear in it, else None."""
    if not isinstance(d, Dim):
        return 0
    found: DimLike = 0
    for atoms, c in d.terms:
        if not any(var in symbols_of(Dim((((a,), 1),))) for a in atoms):
            continue
        plain = [a for a in atoms if isinstance(a, Symbol) and a.name == var]
        others = tuple(a for a in atoms if a not in plain)
        if len(plain) != 1 or var in symbols_of(*(Dim((((a,), 1),)) for a in others)):
            return None
        found = found + (Dim(((others, c),)) if others else c)
    return found


def depends_on_sum(b: Expr, place: str, tap: str, step: int) -> bool:
    """Whether b is a load, 0 outside its guards, that depends on `place` + step * `tap` alone."""
    load, fill, guards = (b.value, b.fill, b.guards) if isinstance(b, Guarded) else (b, Const(0, b.dtype), ())
    if not isinstance(load, Load) or not isinstance(fill, Const) or fill.value:
        return False
    dims = [*load.index, *(d for g in guards for d in (g.at, g.bound))]
    moved = {place: symbol(place) + step, tap: symbol(tap) - 1}
    return all(substitute(d, moved) == d for d in dims)


def is_direct(kernel: ContractionKernel, a: Expr, k: Axes) -> bool:
    """Whether a is a load that is linear in all k."""
    offset = load_offset(kernel, a)
    return offset is not None and all(coefficient(offset, v) is not None for v, _ in k)


def pieces(width: DimLike, lanes: int) -> int:
    """How many runs of an axis of extent `width` a vector may touch that starts at a multiple of its lanes; 0
    where that is not known."""
    if not isinstance(width, int) or width <= 0:
        return 0
    return max(-(-(start + lanes) // width) for start in range(0, width, gcd(lanes, width)))


def arranged(kernel: ContractionKernel, target: Target) -> Contraction:
    """The contraction with a k axis; with its operands exchanged where the results lie side by side along m,
    or a alone does; with axes in the order in which the operands lie in memory; and with batch axes that only
    one operand uses moved to m or n: always to m; to n where the last panel of each batch element would be
    rather empty."""
    c = kernel.contraction
    if not c.k:
        c = replace(c, k=(("k only", 1),))
    if kernel.indirect:
        return c
    if not c.groups and (_stored_along_m(kernel, target) or _read_along_m(kernel, target)):
        c = replace(c, m=c.n, n=c.m, a=c.b, b=c.a)
        c = replace(c, k=_walked(kernel, c.a, c.k))
    c = replace(c, n=_walked(kernel, c.b, c.n))
    in_a, in_b = names_of(c.a), names_of(c.b)
    to_m = tuple(axis for axis in c.batch if axis[0] not in in_b)
    to_n = tuple(axis for axis in c.batch if axis[0] not in in_a and axis not in to_m)
    if not all(isinstance(x, int) for _, x in c.m):
        to_m = ()
    columns = product(x for _, x in c.n)
    panel = 2 * target.vector_bytes // c.a.dtype.bytes
    if not isinstance(columns, int) or columns == 0 or -(-columns // panel) * panel <= 1.1 * columns:
        to_n = ()
    batch = tuple(axis for axis in c.batch if axis not in (*to_m, *to_n))
    return replace(c, batch=batch, m=(*to_m, *c.m), n=(*to_n, *c.n))


def _stored_along_m(kernel: ContractionKernel, target: Target) -> bool:
    """Whether every result is stored side by side along the last m axis, and none along the last n axis: as
    channels-last convolutions do."""
    c = kernel.contraction
    if not c.m or not c.n or not isinstance(c.m[-1][1], int):
        return False
    if c.m[-1][1] < target.vector_bytes // c.a.dtype.bytes:
        return False
    places = [_place(kernel, s.arg, s.index) for s in c.stores]
    return all(coefficient(at, c.m[-1][0]) == 1 != coefficient(at, c.n[-1][0]) for at in places)


def _read_along_m(kernel: ContractionKernel, target: Target) -> bool:
    """Whether a lies side by side along the last m axis, b along the last k axis, and the results are so few
    beside the sums that storing them across memory costs less than transposing b: as in gradients for the
    weights of 1 x 1 convolutions of images in rows."""
    c = kernel.contraction
    limit = shared_limit(c.a, c.b, c.k)
    a, b = (load_offset(kernel, drop_guard(x, limit)) for x in (c.a, c.b))
    if not c.m or not c.n or a is None or b is None:
        return False
    (out, outs), lanes = c.m[-1], target.vector_bytes // c.a.dtype.bytes
    steps = [coefficient(b, var) for var, _ in (*c.n, *c.k)]
    products = product(extent for _, extent in c.k if isinstance(extent, int))
    rows = product(extent for _, extent in c.m)
    return (isinstance(outs, int) and outs > 0 and outs % lanes == 0 and coefficient(a, out) == 1
            and None not in steps and steps[-1] == 1 != steps[len(c.n) - 1]
            and isinstance(rows, int) and isinstance(products, int) and products >= _LONG * rows)


def _walked(kernel: ContractionKernel, e: Expr, axes: Axes) -> Axes:
    """The axes, the one last along which the operand's elements lie side by side."""
    at = load_offset(kernel, e.value if isinstance(e, Guarded) else e)
    near = [axis for axis in axes if isinstance(axis[1], int) and axis[1] > 1
            and at is not None and coefficient(at, axis[0]) == 1]
    order = (*(axis for axis in axes if axis not in near), *near)
    return order if len(near) == 1 and all(isinstance(extent, int) for _, extent in order[1:]) else axes


def names_of(e: Expr) -> set[str]:
    """Every symbol in the indices of an expression."""
    names: set[str] = set()
    for x in walk.subexpressions(e):
        if isinstance(x, Load):
            names |= symbols_of(*x.index)
        elif isinstance(x, Index):
            names |= symbols_of(x.at)
        elif isinstance(x, Guarded):
            names |= symbols_of(*(d for g in x.guards for d in (g.at, g.bound)))
        elif isinstance(x, Reduce):
            names |= symbols_of(*(extent for _, extent in x.loops))
    return names


PANELS = "panels"
"""The name of the argument that holds the panels of b."""


def packed_columns(kernel: ContractionKernel, c: Contraction) -> int:
    """The columns of a panel where b reads an array that holds its panels already, [panel, …, k…, column] as
    `passes/panels.py` makes them, and so element (n // columns, …, k…, n % columns) of it; else 0. An array
    of the caller's that looks like it has neither their alignment nor, maybe, as few columns."""
    if not isinstance(c.b, Load) or c.b.arg != PANELS:
        return 0
    if not all(isinstance(extent, int) for _, extent in (*c.n, *c.k)):
        return 0
    argument = next(x for x in kernel.arguments if x.name == c.b.arg)
    index, columns, depth = c.b.index, argument.shape[-1] if argument.shape else 0, len(c.k)
    if not isinstance(columns, int) or columns <= 0 or columns & (columns - 1) or len(index) < depth + 2:
        return 0
    flat = flattened(c.n)
    rows = tuple((symbol(var), extent) for var, extent in c.k)
    between = index[1:-1 - depth]
    found = (index[0] == flat // columns and index[-1] == flat % columns
             and tuple(zip(index, argument.shape))[-1 - depth:-1] == rows
             and not symbols_of(*between) & {var for var, _ in (*c.n, *c.k)})
    return columns if found else 0


def flattened(axes: Axes) -> DimLike:
    """The number of an element of the axes, the last of which changes fastest."""
    flat: DimLike = 0
    for var, extent in axes:
        flat = flat * extent + symbol(var)
    return flat


def flat_index(axes: Axes, flat: DimLike) -> dict[str, DimLike] | None:
    """Each axis' variable as an expression of the flattened index; None where that needs division by a
    symbol."""
    values: dict[str, DimLike] = {}
    inner = 1
    for i in range(len(axes) - 1, -1, -1):
        var, extent = axes[i]
        rest = flat // inner
        if i == 0:
            values[var] = rest
            break
        if not isinstance(extent, int) or extent == 0:
            return None
        values[var] = rest % extent
        inner *= extent
    return values
