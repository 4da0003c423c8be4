"""What becomes one kernel, what does not and why, and which state updates are made in place."""
from __future__ import annotations

import numpy as np
import pytest
from nets import Net, lenet_step, mlp_step, values_for

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Node
from graphflow.compiler.passes.assemble import assemble
from graphflow.compiler.passes.autodiff import expand_gradients
from graphflow.compiler.passes.canonical import canonicalize
from graphflow.compiler.passes.fuse import fusion_of
from graphflow.compiler.passes.schedule import order, schedule
from graphflow.compiler.plan.dtypes import I64


def prepared(graph: Graph) -> Graph:
    return canonicalize(expand_gradients(canonicalize(graph)))


def fused(graph: Graph) -> tuple[list[Node], list[str]]:
    """The kernels in the order in which they run, and the reasons of what was refused."""
    fusion = fusion_of(prepared(graph))
    result = assemble(fusion)
    check_graph(result, "fuse")
    return order(result), [reason for _, reason in fusion.refusals]


def kinds(nodes: list[Node]) -> list[str]:
    return sorted(n.attrs["kind"] for n in nodes)


@pytest.mark.reference
@pytest.mark.parametrize("make", [mlp_step, lenet_step], ids=["mlp", "lenet"])
def test_fusion_keeps_bits(make) -> None:
    graph = prepared(make())
    feeds, state = values_for(graph, 3)
    after = schedule(assemble(fusion_of(graph)))
    for before, now in zip(interpret(graph, feeds, state), interpret(after, feeds, state)):
        for name in before:
            np.testing.assert_array_equal(before[name], now[name], err_msg=name)


def test_a_training_step_is_few_kernels() -> None:
    nodes, _ = fused(mlp_step())
    assert kinds(nodes) == ["contraction"] * 5 + ["row"] * 4


def test_softmax_is_one_kernel() -> None:
    net = Net()
    x = net.input("x", (10,))
    b = net.b
    top = b.broadcast(b.reshape(b.reduce_max(x, axes=(1,)), shape=(net.n, 1)), x.shape)
    e = b.exp(b.sub(x, top))
    total = b.broadcast(b.reshape(b.reduce_sum(e, axes=(1,)), shape=(net.n, 1)), x.shape)
    nodes, reasons = fused(net.graph(p=b.div(e, total)))
    assert kinds(nodes) == ["row"] and not reasons


def test_rows_compared_with_each_other_are_made_before() -> None:
    """The kernel of the distances needs each row at two places, neither of which is its own."""
    net = Net()
    b, h = net.b, net.b.tanh(net.input("x", (2,)))
    apart = b.sub(b.broadcast(h, (net.n, net.n, 2)),
                  b.broadcast(b.reshape(h, shape=(net.n, 1, 2)), (net.n, net.n, 2)))
    squares = b.reduce_sum(b.mul(apart, apart), axes=(2,))
    nodes, reasons = fused(net.graph(h=h, squares=squares))
    assert kinds(nodes) == ["map", "row"]
    assert reasons == ["tanh f32[N,2] is not fused into its reader: it is needed at several indices of one "
                       "kernel"]


def test_every_update_of_a_momentum_step_is_in_place() -> None:
    nodes, reasons = fused(mlp_step())
    written = [name for n in nodes for name in n.attrs["inplace"] if name]
    assert sorted(written) == sorted(mlp_step().updates())
    assert not any("in place" in r for r in reasons)


def test_the_writer_runs_behind_every_reader_of_the_old_value() -> None:
    nodes, _ = fused(mlp_step())
    for i, n in enumerate(nodes):
        for name in filter(None, n.attrs["inplace"]):
            readers = [j for j, m in enumerate(nodes) if m is not n
                       and any(v.op == "state" and v.node.attrs["name"] == name for v in m.inputs)]
            assert all(j < i for j in readers), name


def test_clipping_by_global_norm_keeps_the_gradient() -> None:
    """The norm needs every gradient before any update may start, so no update is an epilogue."""
    net = Net()
    b = net.b
    loss = net.cross_entropy(net.dense(net.input("x", (20,)), "fc", 10), net.input("y", (), I64))
    gradients = b.node("grad", (loss, *net.parameters.values())).results
    parts = [b.reduce_sum(b.mul(g, g), axes=tuple(range(g.type.rank))) for g in gradients]
    scale = b.div(b.constant(1.0, loss.dtype), b.add(b.sqrt(b.add(*parts)), 1.0))
    for (name, w), g in zip(net.parameters.items(), gradients):
        net.effects.append(b.update(b.sub(w, b.mul(g, b.broadcast(scale, g.shape))), name=name).node)
    nodes, _ = fused(net.graph(loss=loss))
    for n in nodes:
        if any(n.attrs["inplace"]):
            assert n.attrs["kind"] != "contraction"
    feeds, state = values_for(net.graph(loss=loss), 4)
    before = prepared(net.graph(loss=loss))
    for x, y in zip(interpret(before, feeds, state), interpret(assemble(fusion_of(before)), feeds, state)):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_an_update_whose_new_value_is_needed_by_a_reader_of_the_old_is_refused() -> None:
    net = Net()
    b, w = net.b, net.parameter("w", (4, 4))
    new = b.add(w, 1.0)
    net.effects.append(b.update(new, name="w").node)
    nodes, reasons = fused(net.graph(y=b.matmul(w, b.exp(new))))
    assert not any(any(n.attrs["inplace"]) for n in nodes)
    assert any("the update of 'w' is not made in place" in r for r in reasons)


def test_an_update_that_reads_other_elements_is_refused() -> None:
    net = Net()
    b, w = net.b, net.parameter("w", (4, 4))
    net.effects.append(b.update(b.transpose(w, perm=(1, 0)), name="w").node)
    nodes, reasons = fused(net.graph())
    assert not any(any(n.attrs["inplace"]) for n in nodes)
    assert any("reads other elements of the old value" in r for r in reasons)


def test_an_update_is_refused_where_a_reduction_still_needs_the_old_row() -> None:
    net = Net()
    b, w = net.b, net.parameter("w", (6, 40))
    norm = b.sqrt(b.reduce_sum(b.mul(w, w), axes=(1,)))
    new = b.div(w, b.broadcast_to(b.reshape(norm, shape=(6, 1)), shape=w.shape))
    net.effects.append(b.update(new, name="w").node)
    nodes, reasons = fused(net.graph())
    assert kinds(nodes) == ["row"] and not any(nodes[0].attrs["inplace"])
    assert any("reads whole rows of the old value" in r for r in reasons)


def test_a_check_runs_before_every_write() -> None:
    net = Net()
    b, x, w = net.b, net.input("x", (3,)), net.parameter("w", (3,))
    fine = b.reduce_all(b.isfinite(x), axes=(0, 1))
    net.effects.append(b.update(b.mul(w, 2.0), name="w").node)
    net.effects.append(b.check(fine, message="x is not finite").node)
    nodes, _ = fused(net.graph())
    assert [any(n.attrs["inplace"]) for n in nodes] == [False, True]


def test_refusals_name_op_and_reason() -> None:
    _, reasons = fused(mlp_step())
    reason = "relu f32[N,33] is not fused into its reader: a contraction reads each element many times"
    assert reason in reasons
