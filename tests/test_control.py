"""Loops, branches and custom gradients: the ops, and the language that makes them."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import feed

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.errors import DTypeError, GraphflowError, ShapeError, UseError

# --- the ops

def run_node(node: Node, **arrays: Any) -> list[np.ndarray]:
    """The node's results, after its graph went through its text and the checker."""
    graph = Graph("g", tuple(v for v in node.inputs), {f"y{i}": v for i, v in enumerate(node.results)})
    text = print_graph(graph)
    read = parse_graph(text)
    assert print_graph(read) == text
    check_graph(read, "trace")
    return list(interpret(read, arrays, {})[0].values())


def region(b: Builder, types: list[TensorType], body: Any) -> Region:
    parameters = tuple(b.parameter(t, i) for i, t in enumerate(types))
    return Region(parameters, tuple(body(*parameters)))


def cond_node(b: Builder) -> Node:
    p, x = feed(b, "p", np.bool_(True)), feed(b, "x", np.zeros(3))
    then = region(b, [x.type], lambda v: [b.exp(v), b.reduce_sum(v, axes=(0,))])
    otherwise = region(b, [x.type], lambda v: [b.neg(v), b.reduce_max(v, axes=(0,))])
    return b.node("cond", (p, x), {}, (then, otherwise))


@pytest.mark.reference
def test_cond_runs_one_branch() -> None:
    x = np.array([0.5, -1, 2])
    for holds, expected in ((True, (np.exp(x), x.sum())), (False, (-x, x.max()))):
        got = run_node(cond_node(Builder()), p=np.bool_(holds), x=x)
        for g, e in zip(got, expected):
            np.testing.assert_allclose(g, e, rtol=1e-15)


def while_node(b: Builder, limit: int = 100) -> Node:
    """Halves the carry and counts, until all of it is below a constant."""
    x, count, bound = feed(b, "x", np.zeros(2)), feed(b, "n", np.int64(0)), feed(b, "bound", np.float64(0))
    types = [x.type, count.type, bound.type]
    condition = region(b, types, lambda v, n, c: [b.gt(b.reduce_max(v, axes=(0,)), c)])
    body = region(b, types, lambda v, n, c: [b.mul(v, 0.5), b.add(n, 1)])
    return b.node("while_loop", (x, count, bound), {"carries": 2, "limit": limit}, (condition, body))


@pytest.mark.reference
@pytest.mark.parametrize("limit, trips", [(100, 5), (3, 3), (0, 0)])
def test_while_loop_runs_until_the_condition_fails(limit: int, trips: int) -> None:
    node = while_node(Builder(), limit)
    x, n = run_node(node, x=np.array([16.0, 3]), n=np.int64(0), bound=np.float64(0.9))
    np.testing.assert_array_equal(x, np.array([16.0, 3]) / 2 ** trips)
    assert n == trips


def custom_node(b: Builder) -> Node:
    """x * y with the gradient of its own (3 x', 5 y')."""
    x, y = feed(b, "x", np.zeros(2)), feed(b, "y", np.zeros(2))
    forward = region(b, [x.type] * 2, lambda x, y: [b.mul(x, y)])
    backward = region(b, [x.type] * 4, lambda x, y, out, g: [b.mul(g, 3.0), b.mul(g, 5.0)])
    return b.node("custom_gradient", (x, y), {"name": "mine"}, (forward, backward))


@pytest.mark.reference
def test_custom_gradient_is_its_forward_part() -> None:
    out, = run_node(custom_node(Builder()), x=np.array([2.0, 3]), y=np.array([5.0, 7]))
    np.testing.assert_array_equal(out, [10, 21])


def refused(message: str, kind: type[GraphflowError], b: Builder, *args: Any) -> None:
    with pytest.raises(kind) as caught:
        b.node(*args)
    assert message in str(caught.value)


def test_cond_refuses_what_does_not_fit() -> None:
    b = Builder()
    node = cond_node(b)
    (p, x), (then, otherwise) = node.inputs, node.regions
    for inputs, regions, kind, message in (
            ((x, x), node.regions, DTypeError, "the predicate is bool, not float64"),
            ((feed(b, "q", np.zeros(2, bool)), x), node.regions, ShapeError, "one bool, not an array"),
            ((p,), node.regions, UseError, "the branch then has 1 parameters for 0 operands"),
            ((p, x), (then,), UseError, "2 regions (then, otherwise), not 1"),
            ((p, x), (then, Region(otherwise.parameters, otherwise.results[:1])), UseError,
             "one branch returns 2 values, the other 1"),
            ((p, x), (then, Region(otherwise.parameters, (otherwise.results[0],) * 2)), ShapeError,
             "result 1 is f64[] in the branch then, f64[3] in the branch otherwise")):
        refused(message, kind, b, "cond", inputs, {}, regions)


def test_while_loop_refuses_what_does_not_fit() -> None:
    b = Builder()
    node = while_node(b)
    attrs, (condition, body) = dict(node.attrs), node.regions
    for changed, regions, kind, message in (
            ({"limit": -1}, node.regions, UseError, "the limit is a number of trips, not -1"),
            ({"carries": 4}, node.regions, UseError, "4 carries, but 3 operands"),
            ({"carries": 1}, node.regions, UseError, "returns 2 values for 1 carries"),
            ({}, (body, body), UseError, "the condition returns 2 values, not one bool"),
            ({}, (Region(body.parameters, body.results[1:]), body), DTypeError, "is bool, not int64"),
            ({}, (condition, Region(body.parameters, body.results[::-1])), DTypeError,
             "carry 0 starts as f64[2], but the body returns i64[]")):
        refused(message, kind, b, "while_loop", node.inputs, {**attrs, **changed}, regions)


def test_custom_gradient_refuses_what_does_not_fit() -> None:
    b = Builder()
    node = custom_node(b)
    forward, backward = node.regions
    parameters, (gx, gy) = backward.parameters, backward.results
    for regions, kind, message in (
            ((forward, forward), UseError, "the backward part has 2 parameters for 4 operands"),
            ((forward, Region(parameters, (gx,))), UseError, "returns 1 cotangents for 2 float operands"),
            ((forward, Region(parameters, (gx, b.cast(gy, dtype=F32)))), DTypeError,
             "mine: operand 1 is f64[2], but its cotangent is f32[2]")):
        refused(message, kind, b, "custom_gradient", node.inputs, {"name": "mine"}, regions)


def test_scan_refuses_an_unknown_save() -> None:
    b = Builder()
    x = feed(b, "x", np.zeros(2))
    body = region(b, [x.type], lambda v: [v])
    attrs = {"length": 3, "carries": 1, "steps": 0, "save": "all"}
    refused("save is 'all', not one of values, carries", UseError, b, "scan", (x,), attrs, (body,))
