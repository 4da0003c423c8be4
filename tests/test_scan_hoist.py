"""What leaves the bodies of loops: values that no step changes, products of all steps before the loop and
behind it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support import feed, run_graph
from test_control_native import floats, graph, open_feed, scan, while_loop

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.passes.joint import optimize_jointly
from graphflow.compiler.passes.scan_hoist import hoist
from graphflow.compiler.plan.dtypes import F32

pytestmark = pytest.mark.reference
Nodes = Sequence[str]


def ops(nodes: Sequence[Node]) -> list[str]:
    return sorted(n.op for n in nodes if n.op not in ("parameter", "input", "constant", "broadcast_to",
                                                      "reshape", "scan"))


def check(g: Graph, feeds: dict[str, np.ndarray], inside: Nodes, outside: Nodes,
          change: Callable[[Graph], Graph] = optimize_jointly) -> Node:
    """The pass keeps the values; the ops that are in the (first) loop and around it then. Gives the scan."""
    after = change(g)
    check_graph(after, "joint")
    wanted, found = interpret(g, feeds, {})[0], interpret(after, feeds, {})[0]
    native = run_graph(g, feeds, "cpu")
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(native[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    loop = next(n for n in after.nodes() if n.op == "scan")
    assert ops(loop.regions[0].nodes()) == sorted(inside)
    assert ops(after.nodes()) == sorted(outside)
    return loop


def start(**shapes: tuple[int, ...]) -> tuple[Builder, list[Value], dict[str, np.ndarray]]:
    b = Builder()
    arrays = {name: floats(*shape) for name, shape in shapes.items()}
    return b, [feed(b, name, a) for name, a in arrays.items()], arrays


@pytest.mark.parametrize("reverse", [False, True])
def test_a_product_of_the_input_is_taken_before_the_loop(reverse: bool) -> None:
    b, (x, h, w), arrays = start(x=(5, 3, 4), h=(3, 6), w=(4, 6))
    last, every = scan(b, [h], [x], [w], lambda i, h, x, w: [n := i.tanh(i.add(i.matmul(x, w), h)), n], 5,
                       reverse)
    loop = check(graph(b, {"last": last, "every": every}), arrays, ["add", "tanh"], ["matmul"])
    assert len(loop.inputs) == 2                              # the weight went with the product


def test_what_leads_to_the_product_goes_with_it() -> None:
    """Elementwise ops, reductions and views of what the step reads, and a bias that no step changes."""
    b, (x, h, w, k), arrays = start(x=(5, 4, 3), h=(3, 6), w=(8, 6), k=(4,))

    def body(i: Builder, h: Value, x: Value, w: Value, k: Value) -> list[Value]:
        rows = i.transpose(i.add(x, i.broadcast(i.reshape(k, shape=(4, 1)), (4, 3))), perm=(1, 0))
        mean = i.broadcast(i.reshape(i.reduce_sum(rows, axes=(1,)), shape=(3, 1)), (3, 4))
        both = i.flip(i.concatenate(i.sub(rows, mean), i.exp(rows), axis=1), axes=(0,))
        return [i.add(i.matmul(i.slice(both, starts=(0, 0), stops=(3, 8), steps=(1, 1)), w), h)]

    (last,) = scan(b, [h], [x], [w, k], body, 5)
    check(graph(b, {"last": last}), arrays, ["add"],
          ["matmul", "add", "sub", "exp", "transpose", "flip", "concatenate", "reduce_sum"])


def test_a_layer_of_products_behind_each_other() -> None:
    b, (x, h, w, v), arrays = start(x=(5, 3, 4), h=(3, 2), w=(4, 6), v=(2, 6))
    (last,) = scan(b, [h], [x], [w, v], lambda i, h, x, w, v: [
        i.add(h, i.matmul(i.tanh(i.matmul(x, w)), v, transpose_y=True))], 5)
    check(graph(b, {"last": last}), arrays, ["add"], ["matmul", "matmul", "tanh"])


def test_an_output_layer_is_computed_behind_the_loop() -> None:
    """The state of each step is stacked instead; what needs the product as a carry stays."""
    b, (x, h, u, w, bias), arrays = start(x=(5, 3, 4), h=(3, 4), u=(4, 4), w=(4, 7), bias=(7,))

    def body(i: Builder, h: Value, x: Value, u: Value, w: Value, bias: Value) -> list[Value]:
        new = i.tanh(i.add(x, i.matmul(h, u)))
        return [new, i.sigmoid(i.add(i.matmul(new, w), i.broadcast(bias, (3, 7))))]

    last, every = scan(b, [h], [x], [u, w, bias], body, 5)
    loop = check(graph(b, {"last": last, "every": every}), arrays, ["add", "matmul", "tanh"],
                 ["add", "matmul", "sigmoid"])
    assert [t.shape for t in loop.types] == [(3, 4), (5, 3, 4)]


def test_an_output_stays_where_stacking_for_it_costs_more() -> None:
    b, (h, u, w), arrays = start(h=(3, 40), u=(40, 40), w=(40, 2))
    last, every = scan(b, [h], [], [u, w], lambda i, h, u, w: [
        n := i.tanh(i.matmul(h, u)), i.matmul(i.mul(n, n), w)], 5)
    check(graph(b, {"last": last, "every": every}), arrays, ["matmul", "matmul", "mul", "tanh"], [])


def test_what_no_step_changes_is_computed_once() -> None:
    """The product of two weights, and a reduction; a transposition is no work, so it stays."""
    b, (x, h, w, v), arrays = start(x=(5, 3, 4), h=(3, 4), w=(4, 6), v=(6, 4))

    def body(i: Builder, h: Value, x: Value, w: Value, v: Value) -> list[Value]:
        m = i.tanh(i.matmul(w, v))
        top = i.broadcast(i.reshape(i.reduce_max(v, axes=(0, 1)), shape=(1, 1)), (3, 4))
        return [i.add(i.mul(i.matmul(h, m), top), x)]

    (last,) = scan(b, [h], [x], [w, v], body, 5)
    check(graph(b, {"last": last}), arrays, ["add", "matmul", "mul"], ["matmul", "tanh", "reduce_max"])


def test_products_leave_every_loop_that_they_can() -> None:
    """Out of the inner loop, and out of the outer one, which does not change the operand either."""
    b, (x, h, w), arrays = start(x=(5, 3, 4), h=(3, 6), w=(4, 6))

    def outer(i: Builder, c: Value, x: Value, w: Value) -> list[Value]:
        return list(scan(i, [c], [x], [w], lambda j, h, x, w: [j.mul(j.add(j.matmul(x, w), h), 0.5)], 5))

    (last,) = scan(b, [h], [], [x, w], outer, 3)
    check(graph(b, {"last": last}), arrays, [], ["matmul"])


def test_a_product_that_a_carry_needs_stays() -> None:
    b, (x, h, w), arrays = start(x=(5, 3, 4), h=(3, 4), w=(4, 4))
    last, every = scan(b, [h], [x], [w], lambda i, h, x, w: [i.add(p := i.matmul(i.add(h, x), w), x), p], 5)
    check(graph(b, {"last": last, "every": every}), arrays, ["add", "add", "matmul"], [])


def test_an_open_length() -> None:
    b = Builder()
    arrays: dict[str, Any] = {"x": floats(7, 3, 4), "h": floats(3, 6), "w": floats(4, 6)}
    x = open_feed(b, "x", arrays["x"])
    h, w = (feed(b, name, arrays[name]) for name in "hw")
    (last,) = scan(b, [h], [x], [w], lambda i, h, x, w: [i.tanh(i.add(i.matmul(x, w), h))], x.shape[0])
    check(graph(b, {"last": last}), arrays, ["add", "tanh"], ["matmul"])


def test_a_loop_without_anything_to_take_out_stays_as_it_is() -> None:
    b, (h, w), arrays = start(h=(3, 4), w=(4, 4))
    (last,) = scan(b, [h], [], [w], lambda i, h, w: [i.tanh(i.matmul(h, i.transpose(w, perm=(1, 0))))], 5)
    loop = check(graph(b, {"last": last}), arrays, ["matmul", "tanh", "transpose"], [], change=hoist)
    assert loop.attrs["steps"] == 0


def test_inputs_that_are_the_same_for_every_step_are_not_stored_for_each() -> None:
    """A literal goes into the body, a row becomes a constant of the loop; others stay inputs of a step."""
    b, (x, h, k), arrays = start(x=(5, 3), h=(3,), k=(3,))
    steps = [b.constant(0.25, F32, (5, 3)), b.broadcast(k, (5, 3)), x,
             b.broadcast(b.reshape(k, shape=(1, 3)), (5, 3))]

    def body(i: Builder, h: Value, *v: Value) -> list[Value]:
        product = i.mul(i.broadcast(v[4], (3,)), v[5])
        return [i.add(i.add(i.mul(h, v[0]), v[1]), i.add(i.add(v[2], v[3]), product)), v[0]]

    last, every = scan(b, [h], steps, [b.constant(3.0, F32), b.constant(1.0, F32, (3,))], body, 5)
    loop = check(graph(b, {"last": last, "every": every}), arrays, ["add"] * 4 + ["mul"], [])
    assert loop.attrs["steps"] == 1 and len(loop.inputs) == 3


def test_nothing_leaves_a_loop_that_is_to_keep_carries_alone() -> None:
    b, (x, h, w), arrays = start(x=(5, 3, 4), h=(3, 6), w=(4, 6))
    (last,) = scan(b, [h], [x], [w], lambda i, h, x, w: [i.add(i.matmul(x, i.exp(w)), h)], 5)
    frugal = b.node("scan", last.node.inputs, {**last.node.attrs, "save": "carries"}, last.node.regions)
    check(graph(b, {"last": frugal.result()}), arrays, ["add", "exp", "matmul"], [])


def test_other_loops_are_left_alone() -> None:
    b, (x, w), _ = start(x=(3, 3), w=(3, 3))
    (y, _) = while_loop(b, [x, b.constant(0.0, F32)], [w], lambda i, x, n, w: [i.lt(n, 3)],
                        lambda i, x, n, w: [i.matmul(x, i.exp(w)), i.add(n, 1)], 9)
    after = hoist(graph(b, {"y": y}))
    check_graph(after, "joint")
    assert [n.op for n in after.nodes()].count("exp") == 0
