"""Reductions: serial, unrolled where short, or over the lanes of several vector accumulators.

The order is fixed: lane l of the accumulators combines elements l, l + count, …; the lanes are then
combined by a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product as tuples

import numpy as np

from graphflow.compiler.emit.builder import I64, Builder, Value, constant
from graphflow.compiler.emit.expr import Emitter, register_type
from graphflow.compiler.emit.indices import Guards
from graphflow.compiler.emit.math import scalar
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.width import lane_count, reachable
from graphflow.compiler.kernel.form import REDUCTIONS
from graphflow.compiler.plan.dims import DimLike, product, symbol
from graphflow.compiler.plan.dtypes import DType

UNROLL = 16
"""Serial reductions over at most this many elements become straight code."""
MOST_JOINED = 4
"""At most so many reductions share a loop: their sums must fit the registers."""

Combine = Callable[[Builder, list[Value], list[Value]], list[Value]]
_SIMPLE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum", "any": "or", "all": "and"}


def join_reductions(e: Emitter, values: Sequence[Node]) -> None:
    """Of values that are bound one after the other, lets reductions over the same elements run in one loop,
    where none needs another's result: what they read is then read once."""
    waiting = list(dict.fromkeys(v.args[0] for v in values if v.kind == "result"))
    waiting = [r for r in waiting if r not in e.joined and not is_short(r.data[1])]
    while waiting:
        first, group = waiting[0], [waiting[0]]
        for r in waiting[1:]:
            if len(group) < MOST_JOINED and _in_step(first, r) and not set(waiting) & set(reachable(r.args)):
                group.append(r)
        waiting = [r for r in waiting if r not in group]
        if len(group) > 1:
            _join(e, group)


def _in_step(x: Node, y: Node) -> bool:
    """Whether two reductions have the same loops but for the names of variables."""
    (_, loops, lanes), (_, others, other) = x.data, y.data
    pairs = list(zip(loops, others))
    return (len(loops) == len(others) and all(a[1] == b[1] for a, b in pairs) and x.deps == y.deps
            and all((a[0] == lanes) == (b[0] == other) for a, b in pairs))


def _join(e: Emitter, group: Sequence[Node]) -> None:
    _, loops, lanes = group[0].data
    kinds: list[str] = []
    operands: list[Node] = []
    for r in group:
        names: dict[str, DimLike] = {own: symbol(var) for (own, _), (var, _) in zip(r.data[1], loops)}
        kinds.append(r.data[0])
        operands += [e.nodes.substitute(a, names) for a in r.args]
    data, own = (tuple(kinds), loops, lanes), frozenset(var for var, _ in loops)
    whole = e.nodes.make("reduce", data, tuple(operands), group[0].dtype, [x for _, x in loops], own)
    at = 0
    for r in group:
        e.joined[r] = whole, at
        at += len(r.args)


def is_short(loops: Sequence[tuple[str, DimLike]]) -> bool:
    """Whether the elements are few, and how many is known."""
    size = product(extent for _, extent in loops)
    known = all(isinstance(extent, int) for _, extent in loops)  # 0 times a symbol is known, the loops not
    return known and isinstance(size, int) and size <= UNROLL


def emit_reduction(e: Emitter, node: Node, guards: Guards) -> list[Value]:
    """The reduced values of all operands of a reduce node, evaluated where the guards hold. Its kind may be
    several, of reductions that run in one loop."""
    kind, loops, lanes = node.data
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for var, extent in loops:
        e.bounds[var] = (0, extent - 1 if isinstance(extent, int) else None)
    lane = e.scopes.lane
    vector = lane is not None and lane.var in node.deps | e.guard_names(guards)
    width = lane.count if lane is not None and vector else 1
    dtypes = [a.dtype for a in node.args]
    first = [constant(register_type(d).vector(width), x) for d, x in zip(dtypes, _identities(kinds, dtypes))]
    combine = _combinations(kinds, dtypes)
    if (vector or not lanes) and is_short(loops):
        return _unrolled(e, node, guards, first, combine)
    if vector or not lanes:
        return _nest(e, node, guards, first, combine, 0, "", 1)
    vectors = 4 if len(node.args) <= 2 else 2
    count = lane_count(e, node.args, lanes, dict(loops)[lanes], vectors=vectors)
    wide = [e.b.splat(v, count) for v in first]
    return _across(e.b, _nest(e, node, guards, wide, combine, 0, lanes, count), combine)


def _identities(kinds: Sequence[str], dtypes: list[DType]) -> list[float]:
    out: list[float] = []
    for kind in kinds:
        out += identity(kind, dtypes[len(out) : len(out) + REDUCTIONS[kind]])
    return out


def _combinations(kinds: Sequence[str], dtypes: list[DType]) -> Combine:
    ends = [0]
    for kind in kinds:
        ends.append(ends[-1] + REDUCTIONS[kind])
    parts = [(a, z, combination(kind, dtypes[a:z])) for kind, a, z in zip(kinds, ends, ends[1:])]
    return lambda b, x, y: [v for a, z, combine in parts for v in combine(b, x[a:z], y[a:z])]


def _unrolled(e: Emitter, node: Node, guards: Guards, first: list[Value], combine: Combine) -> list[Value]:
    _, loops, _ = node.data
    total = first
    for i, point in enumerate(tuples(*(range(extent) for _, extent in loops))):
        at = dict(zip((var for var, _ in loops), point))
        values = [e.value(e.nodes.substitute(a, at), guards) for a in node.args]
        values = [e.b.splat(v, f.type.lanes) for v, f in zip(values, first)]
        total = values if i == 0 and len(values) == 1 else combine(e.b, total, values)
    return total


def _nest(e: Emitter, node: Node, guards: Guards, carry: list[Value], combine: Combine, depth: int,
          lanes: str, count: int) -> list[Value]:
    """The loops from number `depth` on; `lanes` is the vectorised variable, if any, of `count` lanes."""
    _, loops, _ = node.data
    if depth == len(loops):
        values = [e.value(a, guards) for a in node.args]
        new = combine(e.b, carry, [e.b.splat(v, c.type.lanes) for v, c in zip(values, carry)])
        mask = e.scopes.lane.mask if lanes and e.scopes.lane else None
        return new if mask is None else [e.b.select(mask, n, c) for n, c in zip(new, carry)]
    var, extent = loops[depth]
    stop = e.scalar(extent, guards)
    if var == lanes:
        return e.scopes.lanes(var, constant(I64, 0), stop, count,
                              lambda now: _nest(e, node, guards, now, combine, depth + 1, lanes, count),
                              carry)
    with e.scopes.loop(var, constant(I64, 0), stop, 1, carry) as loop:
        loop.next(*_nest(e, node, guards, loop.carry, combine, depth + 1, lanes, count))
    return loop.results


def _across(b: Builder, values: list[Value], combine: Combine) -> list[Value]:
    """All lanes combined: lower half with upper half until one is left."""
    while values[0].type.lanes > 1:
        half = values[0].type.lanes // 2
        values = combine(b, [b.slice(v, 0, half) for v in values], [b.slice(v, half, half) for v in values])
    return values


def combination(kind: str, dtypes: list[DType]) -> Combine:
    """How two partial results become one; the first comes first in the order of the loops."""
    if kind in _SIMPLE:
        return lambda b, x, y: [scalar(b, _SIMPLE[kind], dtypes[0], x[0], y[0])]
    return lambda b, x, y: _better(b, kind == "argmax", dtypes, x, y)


def _better(b: Builder, greatest: bool, dtypes: list[DType], x: list[Value], y: list[Value]) -> list[Value]:
    """The (value, number) that wins: NaN first, then the greater (less) value, then the lower number."""
    value, number = dtypes
    wins = scalar(b, "gt" if greatest else "lt", value, y[0], x[0])
    same = scalar(b, "eq", value, y[0], x[0])
    if value.is_float:
        nan_x, nan_y = b.compare("uno", x[0], x[0]), b.compare("uno", y[0], y[0])
        wins = b.or_(wins, b.and_(nan_y, b.not_(nan_x)))
        same = b.or_(same, b.and_(nan_x, nan_y))
    wins = b.or_(wins, b.and_(same, scalar(b, "lt", number, y[1], x[1])))
    return [b.select(wins, new, old) for new, old in zip(y, x)]


def identity(kind: str, dtypes: list[DType]) -> list[float]:
    """What a reduction of nothing gives: for argmax and argmin, the worst value and the last number."""
    simple = {"sum": 0, "prod": 1, "any": False, "all": True}
    if kind in simple:
        return [simple[kind]]
    worst = _limit(dtypes[0], lowest=kind in ("max", "argmax"))
    return [worst] if kind in _SIMPLE else [worst, _limit(dtypes[1], lowest=False)]


def _limit(dtype: DType, lowest: bool) -> float:
    """The least or greatest value of a dtype."""
    if dtype.kind == "b":
        return not lowest
    if dtype.is_float:
        return -np.inf if lowest else np.inf
    info = np.iinfo(dtype.numpy)
    return int(info.min if lowest else info.max)
