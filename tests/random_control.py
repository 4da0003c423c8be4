"""Loops and branches for random graphs: their bodies grow like graphs do."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType, Value
from graphflow.compiler.plan.dtypes import BOOL, I64

SIZE = 5
"""About how many values a body grows by."""


def evaluate_control(node: Node, arrays: Sequence[np.ndarray], symbols: Mapping[str, int]
                     ) -> list[np.ndarray]:
    """The results of a loop or a branch, by the reference."""
    b = Builder()
    inputs = [b.input(name=f"x{i}", dtype=v.dtype, shape=a.shape)
              for i, (v, a) in enumerate(zip(node.inputs, arrays))]
    bare = Node(node.op, tuple(inputs), node.attrs, node.regions, node.types)
    graph = Graph("control", tuple(inputs), {str(i): v for i, v in enumerate(bare.results)})
    outputs, _ = interpret(graph, {f"x{i}": a for i, a in enumerate(arrays)}, {}, symbols)
    return [outputs[str(i)] for i in range(len(node.types))]


def grow_control(g: Any) -> None:
    """One more loop or branch, if a candidate of it is tame."""
    g.pick([_grow_scan, _grow_scan, _grow_cond, _grow_cond, _grow_while])(g)


def _some(g: Any, most: int, wanted: Any = lambda v: True) -> list[Value]:
    found = [g.value(wanted) for _ in range(g.rng.integers(0, most + 1))]
    return [v for v in found if v is not None]


def _grow(g: Any, operands: Sequence[tuple[TensorType, np.ndarray]]) -> tuple[Any, list[Value]]:
    """A grower of a body in which some values have grown."""
    inner, parameters = g.inside(operands)
    while len(inner.values) < len(parameters) + SIZE and inner.tries < 8 * SIZE:
        inner.grow()
    return inner, parameters


def _of_type(g: Any, inner: Any, type: TensorType, otherwise: Value) -> Value:
    """A late value of that type."""
    found = inner.value(lambda v: v.type == type)
    return found if found is not None and g.chance(0.85) else otherwise


def _grow_scan(g: Any) -> None:
    x = g.value(lambda v: v.type.rank > 0)
    if x is None:
        return
    length = x.shape[0] if g.chance(0.8) else g.pick([0, 1, 4])
    steps = _some(g, 2, lambda v: v.type.rank > 0 and v.shape[0] == length)
    carries, constants = _some(g, 2), _some(g, 2)
    rows = []
    for v in steps:
        array = g.values[v]
        rows.append((TensorType(v.dtype, v.shape[1:]),
                     array[0] if len(array) else np.ones(array.shape[1:], array.dtype)))
    given = [(v.type, g.values[v]) for v in carries]
    inner, parameters = _grow(g, [*given, *rows, *((v.type, g.values[v]) for v in constants)])
    news = [_of_type(g, inner, v.type, p) for v, p in zip(carries, parameters)]
    stacked = _some(inner, 3) if inner.values else []
    if not news and not stacked:
        return
    region = Region(tuple(parameters), (*news, *stacked))
    g.add("scan", [*carries, *steps, *constants],
          {"length": length, "carries": len(carries), "steps": len(steps), "reverse": g.chance(0.4)},
          [region])


def _predicate(g: Any) -> Value | None:
    x = g.value(lambda v: v.dtype == g.float)
    if x is None:
        return g.value(lambda v: v.type == TensorType(BOOL, ()))
    total = g.add("reduce_sum", [x], {"axes": tuple(range(x.type.rank))})
    return None if total is None else g.add(g.pick(["lt", "ge"]), [total, g.number(0.3, total)])


def _grow_cond(g: Any) -> None:
    predicate, operands = _predicate(g), _some(g, 3)
    if predicate is None:
        return
    given = [(v.type, g.values[v]) for v in operands]
    then, its = _grow(g, given)
    otherwise, others = _grow(g, given)
    results = []
    for v in _some(then, 3):
        same = otherwise.value(lambda w, v=v: w.type == v.type)
        if same is not None:
            results.append((v, same))
    if results:
        firsts, seconds = zip(*results)
        regions = [Region(tuple(its), firsts), Region(tuple(others), seconds)]
        g.add("cond", [predicate, *operands], {}, regions)


def _grow_while(g: Any) -> None:
    """Counts its trips; goes on while they are few and, perhaps, a carry is small."""
    with g.origin():
        start = g.number(0, g.b.constant(0, I64))
    carries, constants = [start, *_some(g, 2)], _some(g, 1)
    given = [(v.type, g.values[v]) for v in (*carries, *constants)]
    body, parameters = _grow(g, given)
    with g.origin(), body.origin():
        count = body.b.add(parameters[0], 1)
    news = [count, *(_of_type(g, body, v.type, p) for v, p in zip(carries[1:], parameters[1:]))]
    condition, asked = g.inside(given)
    with condition.origin():
        goes_on = condition.b.lt(asked[0], int(g.pick([0, 1, 3])))
        small = _predicate(condition) if g.chance(0.5) else None
        if small is not None:
            goes_on = condition.b.logical_and(goes_on, small)
    g.add("while_loop", [*carries, *constants], {"carries": len(carries), "limit": g.pick([0, 2, 4])},
          [Region(tuple(asked), (goes_on,)), Region(tuple(parameters), tuple(news))])
