"""The checker of tensor graphs accepts what the compiler makes and refuses every kind of damage."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from nets import Net

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Guard, Node, Region, TensorType, Value
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.passes.assemble import assemble
from graphflow.compiler.passes.autodiff import expand_gradients
from graphflow.compiler.passes.fuse import fusion_of
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, F64, I64
from graphflow.compiler.plan.errors import CompilerError, Location

N, M = symbol("N"), symbol("M")
VECTOR = TensorType(F32, (N,))


def vector(b: Builder, name: str = "x") -> Value:
    return b.input(name=name, dtype=F32, shape=(N,))


def raw(op: str, inputs: tuple[Value, ...], type: TensorType = VECTOR, **attrs: object) -> Value:
    """A node as no builder would make it."""
    return Node(op, inputs, attrs, (), (type,)).result()


def refused(graph: Graph, message: str, stage: str = "trace") -> CompilerError:
    with pytest.raises(CompilerError) as error:
        check_graph(graph, stage)
    assert message in error.value.message and error.value.stage == stage
    return error.value


def training_step() -> Graph:
    net = Net()
    x, y = net.input("x", (3,)), net.input("y", (), I64)
    loss = net.cross_entropy(net.dense(net.b.relu(net.dense(x, "a", 5)), "b", 4), y)
    net.momentum(loss)
    return Graph("step", tuple(net.inputs), {"loss": loss}, tuple(net.effects))


def test_sound_graphs_pass() -> None:
    graph = training_step()
    check_graph(graph, "trace")
    graph = expand_gradients(graph)
    check_graph(graph, "autodiff")
    check_graph(assemble(fusion_of(graph)), "fuse")


def test_the_error_has_the_line_and_the_text() -> None:
    b = Builder()
    with b.origin([Location("model.py", 7)]):
        x = vector(b)
        bad = Node("neg", (x,), {}, (), (TensorType(F64, (N,)),), (Location("model.py", 7),)).result()
    error = refused(Graph("g", (x,), {"y": bad}), "neg is [f64[N]], its operands give [f32[N]]")
    assert error.where == Location("model.py", 7) and "%1 = neg(%0) : f64[N]" in str(error.dump)


def _leaf_in_region(b: Builder, x: Value) -> Value:
    inner = Builder()
    p = inner.parameter(VECTOR, 0)
    state = inner.state(name="w", role="parameter", dtype=F32, shape=(N,))
    return fused(x, Region((p,), (inner.add(p, state),)))


def fused(x: Value, region: Region, **attrs: object) -> Value:
    return Builder().node("fused", (x,), {"kind": "map", **attrs}, [region]).result()


def _open_region(b: Builder, x: Value) -> Value:
    return fused(x, Region((b.parameter(VECTOR, 0),), (b.neg(x),)))


def _wrong_number(b: Builder, x: Value) -> Value:
    p = b.parameter(VECTOR, 1)
    return fused(x, Region((p,), (b.neg(p),)))


def _wrong_parameter(b: Builder, x: Value) -> Value:
    p = b.parameter(TensorType(F32, (M,)), 0)
    return Node("fused", (x,), {**fused_attrs(), "kind": "map"}, (Region((p,), (p,)),), (p.type,)).result()


def fused_attrs() -> dict[str, object]:
    from graphflow.compiler.ops import OPS
    return dict(OPS["fused"].attrs)


@pytest.mark.parametrize("make, message, stage", [
    (lambda b, x: raw("neg", (x,), TensorType(F32, (M,))), "neg is [f32[M]]", "trace"),
    (lambda b, x: raw("nonsense", (x,)), "there is no op 'nonsense'", "trace"),
    (lambda b, x: raw("neg", (x,), size=1), "neg has the attributes ['size'], not []", "trace"),
    (lambda b, x: raw("neg", (x, x)), "neg does not fit its operands: neg takes 1", "trace"),
    (lambda b, x: raw("neg", (Value(x.node, 1),)), "neg reads a value that is not there", "trace"),
    (lambda b, x: b.parameter(VECTOR, 0), "a region's parameter outside its region", "trace"),
    (lambda b, x: b.add(x, vector(b, "z")), "the input 'z' is not listed among the inputs", "trace"),
    (lambda b, x: b.add(x, vector(Builder())), "the input 'x' is not listed among the inputs", "trace"),
    (lambda b, x: b.broadcast(b.constant(1, F32), (M,)), "no feed's shape decides the symbol 'M'", "trace"),
    (lambda b, x: b.argmax(b.iota(shape=(M,), axis=0, dtype=F32), axis=0), "the symbol 'M'", "trace"),
    (lambda b, x: b.update(b.constant(1, F32), name="w"), "update is not listed among the effects", "trace"),
    (lambda b, x: b.grad(b.reduce_sum(x, axes=(0,)), x), "a grad node is left after autodiff", "autodiff"),
    (lambda b, x: b.training(), "the training flag is not yet a constant", "canonical"),
    (lambda b, x: raw("neg", (x,), TensorType(F32, (N,), "nhwc")), "a layout before schedule", "fuse"),
    (lambda b, x: fused(x, Region((p := b.parameter(VECTOR, 0),), (b.neg(p),))), "before fuse", "joint"),
    (_leaf_in_region, "state inside a region", "fuse"),
    (_open_region, "is not closed: it reads input from outside", "fuse"),
    (_wrong_number, "parameter 0 of a region of fused is not its number 0", "fuse"),
    (_wrong_parameter, "parameter 0 of the body is f32[M], but its operand gives f32[N]", "fuse"),
])
def test_what_is_refused(make: Callable[[Builder, Value], Value], message: str, stage: str) -> None:
    b = Builder()
    x = vector(b)
    refused(Graph("g", (x,), {"y": make(b, x)}), message, stage)


def test_tables_of_the_graph() -> None:
    b = Builder()
    x, w = vector(b), b.state(name="w", role="parameter", dtype=F32, shape=())
    other = b.state(name="w", role="slot", dtype=F32, shape=())
    update = b.update(w, name="w").node
    again = b.update(b.neg(w), name="w").node
    wide = b.update(b.zeros(TensorType(F32, (2,))), name="w").node
    check_graph(Graph("g", (x,), {"w": w}, (update,)), "trace")
    refused(Graph("g", (x, w), {}), "state is listed among the inputs")
    refused(Graph("g", (x, vector(Builder())), {}), "there are two nodes for the input 'x'")
    refused(Graph("g", (x,), {"a": w, "b": other}), "there are two nodes for the state 'w'")
    refused(Graph("g", (x,), {}, (b.neg(x).node,)), "neg is listed among the effects")
    refused(Graph("g", (x,), {}, (update, again)), "there are two nodes for the update of 'w'")
    refused(Graph("g", (x,), {"w": w}, (wide,)), "the state 'w' is f32[], its update f32[2]")
    refused(Graph("g", (x,), {"y": Value(x.node, 3)}), "the output 'y' is a value that is not there")
    refused(Graph("g", (x,), {}, (), (Guard(M, N),)), "the symbol 'M' of a guard")


def test_symbols_follow_from_linear_axes_only() -> None:
    b = Builder()
    solved = b.input(name="x", dtype=F32, shape=(2 * N + 1, N * M))
    check_graph(Graph("g", (solved,), {"x": solved}), "trace")
    unsolved = b.input(name="x", dtype=F32, shape=(N * M,))
    refused(Graph("g", (unsolved,), {"x": unsolved}), "no feed's shape decides the symbol")


def test_a_cycle_is_refused() -> None:
    b = Builder()
    x = vector(b)
    first, second = b.neg(x).node, b.exp(b.neg(x)).node
    object.__setattr__(first, "inputs", (second.result(),))
    refused(Graph("g", (x,), {"y": second.result()}), "cycle")


def test_a_lost_origin_is_refused() -> None:
    b = Builder()
    with b.origin([Location("model.py", 1)]):
        x = vector(b)
    refused(Graph("g", (x,), {"y": b.neg(x)}), "neg : [f32[N]] has lost its origins")


def test_a_state_is_overwritten_behind_its_readers_only() -> None:
    """Without an ordering operand, the kernel that writes over b.W could run before the one that reads
    it for the input's gradient."""
    damaged = assemble(fusion_of(expand_gradients(training_step())))
    check_graph(damaged, "fuse")
    writer = next(n for n in damaged.nodes() if n.op == "fused" and "b.W" in n.attrs["inplace"])
    after = writer.attrs["after"]
    assert after
    object.__setattr__(writer, "inputs", writer.inputs[:-after])
    object.__setattr__(writer, "attrs", {**writer.attrs, "after": 0})
    message = "fused reads the old value of the state 'b.W', but nothing orders it before the kernel"
    refused(replace(damaged, _nodes=[]), message, "fuse")


def test_what_is_written_in_place_is_the_update() -> None:
    graph = assemble(fusion_of(expand_gradients(training_step())))
    position = next(i for i, n in enumerate(graph.nodes()) if n.op == "fused" and any(n.attrs["inplace"]))
    for name in ("other", "loss"):
        damaged = parse_graph(print_graph(graph))
        node = damaged.nodes()[position]
        names = (name,) * len(node.attrs["inplace"])
        object.__setattr__(node, "attrs", {**node.attrs, "inplace": names})
        refused(damaged, f"fused writes the state {name!r} in place, but its result 0 is not", "fuse")


def test_checks_take_one_bool() -> None:
    b = Builder()
    x = vector(b)
    bad = Node("check", (b.lt(x, x),), {"message": "", "feed": ""}, (), (TensorType(BOOL, (N,)),))
    refused(Graph("g", (x,), {}, (bad,)), "check does not fit its operands: check takes one bool")
