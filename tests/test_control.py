"""Loops, branches and custom gradients: the ops, and the language that makes them."""
from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
from support import feed

import graphflow as gf
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.plan.dtypes import F32, I64
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


# --- the language

def value_of(output: Any, inputs: dict[gf.Tensor, Any], **options: Any) -> Any:
    return gf.function(list(inputs), output, device="reference", **options)(*inputs.values())


@pytest.mark.reference
def test_scan_is_numpys_loop_with_nests_of_carries_inputs_and_outputs() -> None:
    x, y, h = gf.input("x", (4, 3), "float64"), gf.input("y", (4,), "float64"), gf.input("h", (3,), "float64")
    k = gf.input("k", (3,), "float64")
    Pair = namedtuple("Pair", "left right")

    def body(carry: dict[str, Any], step: tuple[gf.Tensor, gf.Tensor]) -> Any:
        row, number = step
        after = {"h": carry["h"] * k + row, "more": [carry["more"][0] + number]}
        return after, Pair(after["h"], {"t": gf.step_index(), "row": row * number})
    last, out = gf.scan(body, {"more": [0.0 * y[0]], "h": h}, (x, y))
    assert set(last) == {"h", "more"} and isinstance(out, Pair) and out.right["t"].dtype == I64
    rng = np.random.default_rng(0)
    a, b, start, factor = (rng.standard_normal(t.shape) for t in (x, y, h, k))
    for reverse in (False, True):
        last, out = gf.scan(body, {"more": [0.0 * y[0]], "h": h}, (x, y), reverse=reverse)
        got = value_of([last["h"], last["more"][0], out.left, out.right["t"], out.right["row"]],
                       {x: a, y: b, h: start, k: factor})
        state, total, rows = start, 0.0, np.zeros((4, 3))
        for t in range(4)[::-1] if reverse else range(4):
            state, total = state * factor + a[t], total + b[t]
            rows[t] = state
        for g, e in zip(got, (state, total, rows, np.arange(4), a * b[:, None])):
            np.testing.assert_allclose(g, e, rtol=1e-14)


@pytest.mark.reference
def test_what_no_step_changes_is_computed_once_outside() -> None:
    x, w = gf.input("x", (4, 3)), gf.input("w", (3,))
    _, ys = gf.scan(lambda c, row: (c, row * gf.exp(w)), (), x)
    scan, = (n for n in gf.function([x, w], ys, device="reference").traced.nodes() if n.op == "scan")
    assert [n.op for n in scan.regions[0].nodes()] == ["parameter", "parameter", "mul"]
    assert scan.inputs[1].op == "exp"


@pytest.mark.reference
def test_loops_in_loops_know_both_indices() -> None:
    x = gf.input("x", (2,), "float64")

    def outer(c: Any, row: gf.Tensor) -> Any:
        i = gf.step_index()

        def inner(c: Any, _: None) -> Any:
            return c, gf.cast(10 * i + gf.step_index(), "float64") + row
        return c, gf.scan(inner, (), length=3)[1]
    _, out = gf.scan(outer, (), x)
    np.testing.assert_array_equal(value_of(out, {x: np.array([0.5, 0.25])}),
                                  [[0.5, 1.5, 2.5], [10.25, 11.25, 12.25]])


@pytest.mark.reference
def test_while_loop_with_nests_and_indices() -> None:
    x = gf.input("x", (3,), "float64")
    out = gf.while_loop(lambda c: gf.max(c["v"]) > 1, lambda c: {"v": c["v"] / 2, "t": gf.step_index()},
                        {"v": x, "t": gf.constant(-1, "int64")}, 50)
    for value, trips in (([16.0, 1, 2], 4), ([0.5, 0, 0], 0)):
        got = value_of(out, {x: np.array(value)})
        np.testing.assert_array_equal(got["v"], np.array(value) / 2 ** trips)
        assert got["t"] == trips - 1


@pytest.mark.reference
def test_only_one_branch_of_a_cond_runs() -> None:
    """What a branch computes of outer tensors stays in it."""
    x, p = gf.input("x", (3,), "float64"), gf.input("p", (), "bool")
    out = gf.cond(p, lambda: {"a": gf.exp(x), "b": x[0]}, lambda: {"a": x + 1, "b": gf.sum(x)})
    program = gf.function([x, p], out, device="reference")
    node, = (n for n in program.traced.nodes() if n.op == "cond")
    assert "exp" not in [n.op for n in program.traced.nodes()]
    assert "exp" in [n.op for n in node.regions[0].nodes()]
    value = np.array([1.0, -2, 3])
    for holds, a, b in ((True, np.exp(value), 1), (False, value + 1, 2)):
        got = program(value, holds)
        np.testing.assert_allclose(got["a"], a, rtol=1e-15)
        assert got["b"] == b


@pytest.mark.reference
def test_checks_inside_bodies_refuse_the_call() -> None:
    table, i = gf.input("table", (4,), "float64"), gf.input("i", (3,), "int64")
    p = gf.input("p", (), "bool")
    _, looped = gf.scan(lambda c, i: (c, gf.take(table, i)), (), i)
    nested = gf.scan(lambda c, i: (c, gf.scan(lambda c, k: (c, gf.take(table, i + k)), (),
                                              gf.constant(np.array([0, 1])))[1]), (), i - 1)[1]
    counted = gf.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + gf.take(table, c[0] + i[0])),
                            (0, 0.0 * table[0]), 9)[1]
    chosen = gf.cond(p, lambda: gf.take(table, i), lambda: table[:3] * 2)
    recomputed = gf.checkpoint(lambda i: gf.take(table, i))(i)
    values = np.arange(4.0)
    for out, good, bad in ((looped, [0, 3, 1], [0, 4, 1]), (nested, [1, 2, 3], [1, 4, 2]),
                           (counted, [1, 0, 0], [2, 0, 0]), (recomputed, [0, 3, 1], [0, 4, 1])):
        program = gf.function([table, i], out, device="reference")
        assert np.isfinite(program(values, good)).all()
        with pytest.raises(gf.FeedError, match="4"):
            program(values, bad)
    program = gf.function([table, i, p], chosen, device="reference")
    np.testing.assert_array_equal(program(values, [9, 9, 9], False), [0, 2, 4])
    np.testing.assert_array_equal(program(values, [3, 2, 1], True), [3, 2, 1])
    with pytest.raises(gf.FeedError):
        program(values, [9, 9, 9], True)


def test_mistakes_in_bodies_are_named_at_the_users_line() -> None:
    x, h = gf.input("x", (4, 3)), gf.input("h", (3,))
    n = gf.dim("M")
    leaked: list[gf.Tensor] = []

    def leak(c: Any, row: gf.Tensor) -> Any:
        leaked.append(row * 2)
        return c, row
    for call, kind, message in (
            (lambda: gf.scan(lambda c, r: {"h": c["h"][:2]}, {"h": h}, x), gf.UseError,
             "returns (new carries, outputs)"),
            (lambda: gf.scan(lambda c, r: ({"h": c["h"][:2]}, None), {"h": h}, x), gf.ShapeError,
             'carry["h"] starts as f32[3], but the body returns f32[2]'),
            (lambda: gf.scan(lambda c, r: ((c[0], gf.cast(c[1], "int32")), None), (h, h), x), gf.DTypeError,
             "carry[1] starts as f32[3], but the body returns i32[3]"),
            (lambda: gf.scan(lambda c, r: ((c, c), None), h, x), gf.UseError,
             "the carry starts as a tensor, but the body returns tuple(a tensor, a tensor)"),
            (lambda: gf.scan(lambda c, r: (c, None), h, {"x": x, "y": h}), gf.ShapeError,
             'the first axis of inputs["y"] is 3, but inputs["x"] says 4'),
            (lambda: gf.scan(lambda c, r: (c, None), h, x, length=5), gf.ShapeError,
             "is 4, but length= says 5"),
            (lambda: gf.scan(lambda c, r: (c, None), h, x, length=n), gf.ShapeError, "but length= says M"),
            (lambda: gf.scan(lambda c, r: (c, None), h), gf.UseError, "how many steps"),
            (lambda: gf.scan(lambda c, r: (c, None), h, length=-1), gf.UseError, "the length is -1"),
            (lambda: gf.scan(lambda c, r: (c, None), h, gf.sum(x)), gf.ShapeError, "no axis to step along"),
            (lambda: gf.scan(lambda c, r: (c, "y"), h, x), gf.UseError, "as outputs holds 'y'"),
            (lambda: gf.scan(lambda c, r: (c, None), h, x, checkpoint=0), gf.UseError,
             "a number of steps, not 0"),
            (lambda: gf.step_index(), gf.UseError, "only inside the body"),
            (lambda: gf.cond(h > 0, lambda: h, lambda: h), gf.ShapeError, "gf.where chooses"),
            (lambda: gf.cond(gf.sum(h), lambda: h, lambda: h), gf.DTypeError, "is one bool, not f32[]"),
            (lambda: gf.cond(True, lambda: (h, x), lambda: (h, h)), gf.ShapeError,
             "result[1] is f32[4,3] in the branch then, f32[3] in the branch otherwise"),
            (lambda: gf.cond(True, lambda: h, lambda: (h, h)), gf.UseError, "returns a tensor, the branch"),
            (lambda: gf.while_loop(lambda c: gf.sum(c) > 0, lambda c: c[:2], h, 3), gf.ShapeError,
             "carry starts as f32[3]"),
            (lambda: gf.while_loop(lambda c: c, lambda c: c, h, 3), gf.DTypeError,
             "the condition is one bool"),
            (lambda: gf.while_loop(lambda c: gf.sum(c) > 0, lambda c: c, h, 1.5), gf.UseError, "not 1.5"),
            (lambda: gf.function([x, h], gf.scan(leak, h, x)[1][0] + leaked[0]), gf.UseError,
             "a tensor of a body is used outside of it")):
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value), str(caught.value)
        assert caught.value.where is not None and caught.value.where.file == __file__


def test_a_condition_with_indices_says_what_to_do() -> None:
    h = gf.input("h", (3,))
    with pytest.raises(NotImplementedError, match="do that in the body"):
        gf.while_loop(lambda n: gf.take(h, n) > 0, lambda n: n + 1, 0, 9)
