"""Vectorised loops over v whose indices hold ``v // 2``: even and odd elements as vectors of their own.

With v = 2 u + r the quotients and remainders vanish, lanes over u walk neighbouring elements, and what
differs between even and odd elements, as in the adjoint of a window of stride 2, is known when the code is
made. What both give is stored together, the lanes interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphflow.compiler.emit.builder import I64, MEMORY_TYPES, Value, constant
from graphflow.compiler.emit.expr import Emitter
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.width import dims_of, divisors_of, lane_count, reachable
from graphflow.compiler.kernel.form import Let, Loop, Statement, Store
from graphflow.compiler.plan.dims import DimLike, substitute, symbol


def has_halves(e: Emitter, loop: Loop, roots: Sequence[Node], dims: Sequence[DimLike]) -> bool:
    """Whether the loop's body, of Lets and Stores to neighbouring elements, divides its variable by 2, and by
    nothing else. `roots` and `dims`: the body's values and the numbers of the elements that it stores."""
    if not all(isinstance(s, (Let, Store)) for s in loop.body) or loop.extent in (0, 1, 2):
        return False
    stores = [e.offset(s.arg, s.index) for s in loop.body if isinstance(s, Store)]
    if any(loop.var in e.nodes.closure(d - symbol(loop.var)) for d in stores):
        return False
    found = [*dims, *(d for n in reachable(roots) for d in dims_of(n, e))]
    return {c for d in found for c in divisors_of(d, loop.var)} == {2}


def emit_halves(e: Emitter, loop: Loop, roots: Sequence[Node], start: Value, stop: Value) -> None:
    """The loop over [start, stop), `start` an even number."""
    b, extent = e.b, loop.extent
    paired = isinstance(extent, int) and extent % 2 == 0
    # Where an even element may lack its odd one, their masks differ: they share no loads then.
    names = (f"{loop.var}/2", f"{loop.var}/2" if paired else f"{loop.var}/2'")
    for name, most in zip(names, ((extent + 1) // 2, extent // 2)):
        e.bounds[name] = (0, most - 1 if isinstance(most, int) else None)
    parts = [2 * symbol(name) + r for r, name in enumerate(names)]
    even = [e.nodes.substitute(n, {loop.var: parts[0]}) for n in roots]
    count = lane_count(e, even, names[0], (extent + 1) // 2)

    def body(carry: list[Value]) -> list[Value]:
        lane = e.scopes.lane
        assert lane is not None
        lanes = [lane, lane]
        if not paired:
            index = e.scopes.bound(names[0])
            e.scopes.bind(names[1], index)
            left = b.sub(_half(e, stop), index)
            lanes[1] = replace(lane, var=names[1], mask=b.first_lanes(left, count))
        for s in loop.body:
            _statement(e, s, loop.var, parts, lanes)
        return []

    e.scopes.lanes(names[0], _half(e, start), _half(e, stop, 1), count, body)


def _half(e: Emitter, x: Value, up: int = 0) -> Value:
    """x // 2, or with `up` = 1 rounded up."""
    if x.is_constant:
        return constant(I64, (int(x.name) + up) // 2)
    return e.b.ashr(e.b.add(x, up) if up else x, 1)


def _statement(e: Emitter, s: Statement, var: str, parts: Sequence[DimLike], lanes: Sequence) -> None:
    assert isinstance(s, (Let, Store))
    (node,) = e.nodes.lets((s,)) if isinstance(s, Let) else (e.nodes.of(s.value),)
    values = []
    for part, lane in zip(parts, lanes):
        with e.scopes.vectorised(lane):
            values.append(e.value(e.nodes.substitute(node, {var: part})))
    if isinstance(s, Store):
        _store(e, s, var, parts[0], values, lanes)
        e.nodes.stored(s.arg)


def _store(e: Emitter, s: Store, var: str, part: DimLike, values: list[Value], lanes: Sequence) -> None:
    b, count = e.b, lanes[0].count
    element = MEMORY_TYPES[e.arguments[s.arg].dtype.name]
    order = [i // 2 + i % 2 * count for i in range(2 * count)]

    def woven(pair: Sequence[Value]) -> Value:
        even, odd = (b.splat(v, count) for v in pair)
        return b.shuffle(even, odd, order)

    if values[0].type.element == "i1":
        values = [b.cast(v, element) for v in values]
    at = substitute(e.offset(s.arg, s.index), {var: part})
    base = e.spread(at).base
    if all(lane.mask is None for lane in lanes):
        b.store(woven(values), e.address(s.arg, base))
        return
    full = constant(lanes[1].mask.type, True)
    mask = woven([full if lane.mask is None else lane.mask for lane in lanes])
    b.masked_store(woven(values), e.address(s.arg, base), mask)
