"""The rewriting engine, each row of its tables on numbers, and autodiff."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.special
from nets import Net

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.ir.text import print_graph
from graphflow.compiler.passes.autodiff import expand_gradients
from graphflow.compiler.passes.canonical import CANONICAL, canonicalize
from graphflow.compiler.passes.joint import JOINT, optimize_jointly
from graphflow.compiler.passes.rewrite import Rule, rewrite
from graphflow.compiler.passes.stable import STABLE, stabilize
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, F64, I32, I64, U8, DType
from graphflow.compiler.plan.errors import CompilerError, Location, UseError

N = symbol("N")
HARD = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -7.25, 1e-40, -1e-45, 1e38, -3e38, np.inf, -np.inf, np.nan],
                np.float32)
"""Zeros of both signs, subnormal, huge, infinite, none."""

Make = Callable[[Builder, Value], Value]


def run(graph: Graph, x: np.ndarray) -> np.ndarray:
    return interpret(graph, {"x": x}, {})[0]["y"]


def graph_of(make: Make, dtype: DType = F32, shape: Sequence = (N,)) -> Graph:
    b = Builder()
    x = b.input(name="x", dtype=dtype, shape=tuple(shape))
    return Graph("g", (x,), {"y": make(b, x)})


def ops(graph: Graph) -> str:
    """The ops of the result, operands first, the feed left out."""
    return " ".join(n.op for n in graph.nodes() if n.op != "input")


def bits(x: np.ndarray) -> bytes:
    return (np.where(np.isnan(x), np.nan, x) if x.dtype.kind == "f" else x).astype(x.dtype).tobytes()


def samples(dtype: DType, shape: Sequence) -> np.ndarray:
    if dtype.is_float:
        size = [len(HARD) if d == N else d for d in shape]
        return np.resize(HARD, size).astype(dtype.numpy)
    values = np.array([0, 1, 2, 3, 7, 100, 255])
    values = values if dtype == U8 else values - 3 * (dtype != BOOL)
    return np.resize(values, [len(values) if d == N else d for d in shape]).astype(dtype.numpy)


def keeps_bits(make: Make, expected: str, dtype: DType = F32, shape: Sequence = (N,),
               stage: Callable[[Graph], Graph] = canonicalize) -> None:
    before = graph_of(make, dtype, shape)
    after = stage(before)
    check_graph(after, "joint")
    assert ops(after) == expected, print_graph(after)
    x = samples(dtype, shape)
    assert bits(run(before, x)) == bits(run(after, x))


# --- canonical

def splat(b: Builder, x: Value, number: float) -> Value:
    return b.constant(number, x.dtype, x.shape)


C = "constant broadcast_to "


@pytest.mark.reference
@pytest.mark.parametrize("make, expected", [
    (lambda b, x: b.mul(x, 1.0), ""), (lambda b, x: b.mul(1.0, x), ""), (lambda b, x: b.mul(x, -1.0), "neg"),
    (lambda b, x: b.mul(b.neg(x), 3.0), C + "mul"),
    (lambda b, x: b.mul(b.neg(x), b.neg(b.abs(x))), "abs mul"),
    (lambda b, x: b.mul(x, 0.0), C + "mul"),
    (lambda b, x: b.div(x, 1.0), ""), (lambda b, x: b.div(x, 8.0), C + "mul"),
    (lambda b, x: b.div(x, -0.25), C + "mul"),
    (lambda b, x: b.div(x, 3.0), C + "div"), (lambda b, x: b.div(x, 0.0), C + "div"),
    (lambda b, x: b.div(x, math.inf), C + "div"), (lambda b, x: b.div(x, 2.0 ** 127), C + "div"),
    (lambda b, x: b.div(b.neg(x), b.neg(b.abs(x))), "abs div"),
    (lambda b, x: b.add(x, -0.0), ""), (lambda b, x: b.add(-0.0, x), ""),
    (lambda b, x: b.add(x, 0.0), C + "add"),
    (lambda b, x: b.add(x, b.neg(b.abs(x))), "abs sub"), (lambda b, x: b.add(b.neg(x), b.abs(x)), "abs sub"),
    (lambda b, x: b.sub(x, 0.0), ""), (lambda b, x: b.sub(x, -0.0), C + "sub"),
    (lambda b, x: b.sub(-0.0, x), "neg"),
    (lambda b, x: b.sub(0.0, x), C + "sub"), (lambda b, x: b.sub(x, b.neg(b.abs(x))), "abs add"),
    (lambda b, x: b.pow(x, 1.0), ""), (lambda b, x: b.neg(b.neg(x)), ""),
    (lambda b, x: b.neg(b.neg(b.neg(x))), "neg"),
    (lambda b, x: b.logical_not(b.logical_not(b.isnan(x))), "isnan"),
    (lambda b, x: b.logical_and(b.isnan(x), b.constant(True, BOOL, x.shape)), "isnan"),
    (lambda b, x: b.logical_and(b.constant(False, BOOL, x.shape), b.isnan(x)), C[:-1]),
    (lambda b, x: b.logical_or(b.isnan(x), b.constant(False, BOOL, x.shape)), "isnan"),
    (lambda b, x: b.logical_or(b.isnan(x), b.isnan(x)), "isnan"),
    (lambda b, x: b.where(b.constant(True, BOOL, x.shape), x, b.exp(x)), ""),
    (lambda b, x: b.where(b.constant(False, BOOL, x.shape), x, b.abs(x)), "abs"),
    (lambda b, x: b.where(b.isnan(x), x, x), ""),
    (lambda b, x: b.where(b.logical_not(b.isnan(x)), b.abs(x), x), "isnan abs where"),
    (lambda b, x: b.cast(x, dtype=F32), ""), (lambda b, x: b.cast(b.cast(x, dtype=F64), dtype=F32), ""),
    (lambda b, x: b.add(b.mul(splat(b, x, 2), splat(b, x, 3)), x), C + "add"),
    (lambda b, x: b.add(x, b.cast(b.constant(7, I32, x.shape), dtype=F32)), C + "add"),
    (lambda b, x: b.mul(x, b.exp(splat(b, x, 1))), "constant exp broadcast_to mul"),
    (lambda b, x: b.sub(x, b.sub(x, x)), "sub sub"),
])
def test_canonical_arithmetic(make: Make, expected: str) -> None:
    keeps_bits(make, expected)


@pytest.mark.reference
@pytest.mark.parametrize("make, expected, dtype", [
    (lambda b, x: b.add(x, 0), "", I32), (lambda b, x: b.sub(x, 0), "", U8),
    (lambda b, x: b.mul(x, 1), "", I64),
    (lambda b, x: b.cast(b.cast(x, dtype=I64), dtype=I32), "", I32),
    (lambda b, x: b.cast(b.cast(x, dtype=I32), dtype=F32), "cast", U8),
    (lambda b, x: b.cast(b.cast(x, dtype=U8), dtype=I32), "cast cast", I32),
    (lambda b, x: b.cast(b.cast(x, dtype=F64), dtype=I64), "cast cast", I64),
    (lambda b, x: b.cast(b.cast(x, dtype=U8), dtype=BOOL), "", BOOL),
    (lambda b, x: b.reduce_sum(x, axes=()), "", I32), (lambda b, x: b.reduce_any(x, axes=()), "", BOOL),
])
def test_canonical_integers(make: Make, expected: str, dtype: DType) -> None:
    keeps_bits(make, expected, dtype)


@pytest.mark.reference
@pytest.mark.parametrize("make, expected", [
    (lambda b, x: b.broadcast_to(x, shape=(N, 1, 3)), ""), (lambda b, x: b.reshape(x, shape=(N, 1, 3)), ""),
    (lambda b, x: b.broadcast_to(b.broadcast_to(x, shape=(N, 4, 3)), shape=(2, N, 4, 3)), "broadcast_to"),
    (lambda b, x: b.broadcast_to(b.reshape(x, shape=(1, 1, N, 1, 3)), shape=(2, 5, N, 4, 3)), "broadcast_to"),
    (lambda b, x: b.broadcast_to(b.reshape(x, shape=(N, 1, 1, 3)), shape=(N, 2, 2, 3)),
     "reshape broadcast_to"),
    (lambda b, x: b.reshape(b.reshape(x, shape=(3 * N,)), shape=(N, 3)), "reshape"),
    (lambda b, x: b.reshape(b.reshape(x, shape=(3 * N,)), shape=(N, 1, 3)), ""),
    (lambda b, x: b.transpose(x, perm=(0, 1, 2)), ""),
    (lambda b, x: b.transpose(x, perm=(1, 0, 2)), "reshape"),
    (lambda b, x: b.transpose(x, perm=(2, 1, 0)), "transpose"),
    (lambda b, x: b.transpose(b.transpose(x, perm=(2, 0, 1)), perm=(1, 2, 0)), ""),
    (lambda b, x: b.slice(x, starts=(0, 0, 0), stops=(N, 1, 3), steps=(1, 1, 1)), ""),
    (lambda b, x: b.slice(x, starts=(0, 0, 0), stops=(N, 1, 3), steps=(1, 2, 1)), "slice"),
    (lambda b, x: b.slice(x, starts=(0, 0, 1), stops=(N, 1, 3), steps=(1, 1, 1)), "slice"),
    (lambda b, x: b.pad(x, low=(0,) * 3, high=(0,) * 3, interior=(0,) * 3), ""),
    (lambda b, x: b.pad(x, low=(0,) * 3, high=(0, 0, 1), interior=(0,) * 3), "pad"),
    (lambda b, x: b.flip(x, axes=()), ""), (lambda b, x: b.flip(x, axes=(1,)), ""),
    (lambda b, x: b.flip(b.flip(x, axes=(0, 2)), axes=(2, 0)), ""),
    (lambda b, x: b.flip(b.flip(x, axes=(0,)), axes=(2,)), "flip flip"),
    (lambda b, x: b.concatenate(x, axis=0), ""),
    (lambda b, x: b.concatenate(x, b.constant(1, F32, (N, 0, 3)), axis=1), ""),
    (lambda b, x: b.reduce_max(x, axes=()), ""), (lambda b, x: b.reduce_max(x, axes=(1,)), "reshape"),
    (lambda b, x: b.reduce_sum(x, axes=(1,)), "reduce_sum"),
    (lambda b, x: b.reduce_prod(x, axes=(1,)), "reshape"),
    (lambda b, x: b.transpose(b.constant(2, F32, (N, 3)), perm=(1, 0)), C[:-1]),
    (lambda b, x: b.reshape(b.slice(b.flip(b.constant(2, F32, (N, 3)), axes=(0,)), starts=(0, 1),
                                    stops=(N, 3), steps=(1, 1)), shape=(2 * N,)), C[:-1]),
    (lambda b, x: b.abs(b.broadcast_to(x, shape=(2, N, 4, 3))), "abs broadcast_to"),
    (lambda b, x: b.add(b.broadcast_to(x, shape=(N, 4, 3)), b.constant(2, F32, (N, 4, 3))),
     C + "add broadcast_to"),
    (lambda b, x: b.where(b.isnan(b.broadcast_to(x, shape=(N, 4, 3))), b.constant(2, F32, (N, 4, 3)),
                          b.broadcast_to(x, shape=(N, 4, 3))), "isnan " + C + "where broadcast_to"),
    (lambda b, x: b.add(b.broadcast_to(x, shape=(N, 3, 3)),
                        b.reshape(b.broadcast_to(x, shape=(N, 3, 3)), shape=(N, 3, 3))), "add broadcast_to"),
    (lambda b, x: b.add(b.exp(x), b.exp(x)), "exp add"),
    (lambda b, x: b.sqrt(b.add(b.reshape(b.reduce_max(x, axes=(1, 2)), shape=(N, 1)), 2)),
     "reduce_max " + C + "add sqrt reshape"),
])
def test_canonical_views(make: Make, expected: str) -> None:
    keeps_bits(make, expected, shape=(N, 1, 3))


@pytest.mark.reference
def test_literals_are_folded_in_their_own_type() -> None:
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=())
    wrapped = b.add(b.constant(250, U8), b.constant(10, U8))
    third = b.cast(b.div(b.constant(1, F32), b.constant(3, F32)), dtype=F64)
    far = b.cast(b.constant(1e20, F32), dtype=I32)
    graph = canonicalize(Graph("g", (x,), {"wrapped": wrapped, "third": third, "far": far}))
    assert graph.outputs["wrapped"].node.attrs["value"] == 4
    assert graph.outputs["third"].node.attrs["value"] == float(np.float32(1) / np.float32(3))
    assert graph.outputs["far"].op == "cast"                  # what it becomes is unspecified


# --- stable

LOGITS = np.array([0, -0.0, 1e-8, -1e-8, 0.5, -0.5, 3, -3, 20, -20, 90, -90, 750, -750], np.float64)
SMALL = np.array([0, 1e-3, 1e-9, -1e-9, 1e-17, 0.5, -0.5, 2, 100, -0.999], np.float64)
POSITIVE = np.array([1e-12, 1e-3, 0.3, 1, 2, 1e6], np.float64)


def softmax(b: Builder, x: Value, shift: bool) -> Value:
    if shift:
        m = b.stop_gradient(b.reduce_max(x, axes=(0,)))
        x = b.sub(x, b.broadcast(m, x.shape))
    e = b.exp(x)
    return b.div(e, b.broadcast(b.reduce_sum(e, axes=(0,)), x.shape))


STABLE_CASES = [
    ("log(exp(a) / s)", lambda b, x: b.log(softmax(b, x, True)), scipy.special.log_softmax, LOGITS, "div"),
    ("log(exp(a) / s)", lambda b, x: b.log(softmax(b, x, False)), scipy.special.log_softmax, LOGITS, "div"),
    ("log(exp(x))", lambda b, x: b.log(b.exp(x)), lambda x: x, LOGITS, "exp"),
    ("log(sigmoid(x))", lambda b, x: b.log(b.sigmoid(x)), lambda x: -np.logaddexp(0, -x), LOGITS, "log"),
    ("log(1 - sigmoid(x))", lambda b, x: b.log(b.sub(1, b.sigmoid(x))), lambda x: -np.logaddexp(0, x), LOGITS,
     "log"),
    ("log(1 + x)", lambda b, x: b.log(b.add(x, 1)), np.log1p, SMALL, "log"),
    ("log(1 + x)", lambda b, x: b.log(b.add(1, x)), np.log1p, SMALL, "log"),
    ("log(sum(exp(x)))", lambda b, x: b.log(b.reduce_sum(b.exp(x), axes=(0,))), scipy.special.logsumexp,
     LOGITS, ""),
    ("log(sum(exp(x)))", lambda b, x: b.log(b.reshape(b.reduce_sum(b.exp(x), axes=(0,)), shape=(1,))),
     lambda x: scipy.special.logsumexp(x, keepdims=True), LOGITS, ""),
    ("exp(x) - 1", lambda b, x: b.sub(b.exp(x), 1), np.expm1, SMALL, "exp"),
    ("log1p(exp(x))", lambda b, x: b.log(b.add(b.exp(x), 1)), lambda x: np.logaddexp(0, x), LOGITS, "exp"),
    ("1 / sqrt(x), 1 / (1 + exp(x))", lambda b, x: b.div(1, b.sqrt(x)), lambda x: 1 / np.sqrt(x), POSITIVE,
     "sqrt"),
    ("1 / sqrt(x), 1 / (1 + exp(x))", lambda b, x: b.div(1, b.add(1, b.exp(b.neg(x)))), scipy.special.expit,
     LOGITS, "exp"),
    ("x ** 2, x ** 0.5, x ** -1", lambda b, x: b.pow(x, 2), np.square, LOGITS, "pow"),
    ("x ** 2, x ** 0.5, x ** -1", lambda b, x: b.pow(x, 0.5), np.sqrt, POSITIVE, "pow"),
    ("x ** 2, x ** 0.5, x ** -1", lambda b, x: b.pow(x, -1), np.reciprocal, POSITIVE, "pow"),
]


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name, make, oracle, points, gone", STABLE_CASES)
def test_stable_rows_are_accurate_at_hard_points(name: str, make: Make, oracle: Callable, points: np.ndarray,
                                                 gone: str, dtype: DType) -> None:
    """Against SciPy in double precision, and never worse than the formula that was written."""
    before = graph_of(make, dtype, (len(points),))
    after = stabilize(before)
    check_graph(after, "stable")
    assert not gone or gone not in ops(after).split(), print_graph(after)
    x = points.astype(dtype.numpy)
    with np.errstate(all="ignore"):
        wanted = oracle(x.astype(np.float64))
        scale = np.maximum(np.abs(wanted), np.finfo(dtype.numpy).tiny)
        error, old = (np.abs(run(g, x) - wanted) / scale for g in (after, before))
    wanted_is_number = np.isfinite(wanted) & (np.abs(wanted) < np.finfo(dtype.numpy).max)
    limit = 4 * np.finfo(dtype.numpy).eps
    assert np.all(error[wanted_is_number] <= limit), (x, error)
    if name not in ("x ** 2, x ** 0.5, x ** -1", "1 / sqrt(x), 1 / (1 + exp(x))"):
        assert not np.all(old[wanted_is_number] <= limit), "the old formula does as well: no hard points"


def test_every_stable_row_has_a_case() -> None:
    assert {rule.name for rule in STABLE} == {case[0] for case in STABLE_CASES}
    assert {rule.keeps for rule in STABLE} == {"tolerance"} and {rule.keeps for rule in CANONICAL} == {"bits"}


@pytest.mark.reference
@pytest.mark.parametrize("values", [[-np.inf, -np.inf], [np.inf, 1.0], [-np.inf, 2.0], [np.nan, 0.0]])
def test_log_sum_exp_of_infinities(values: list[float]) -> None:
    graph = stabilize(graph_of(lambda b, x: b.log(b.reduce_sum(b.exp(x), axes=(0,))), F64, (2,)))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run(graph, np.array(values)), np.logaddexp(*values))


@pytest.mark.reference
def test_a_careful_softmax_is_not_shifted_again() -> None:
    for make in (lambda b, x: b.log(softmax(b, x, True)), lambda b, x: b.log(softmax(b, x, False))):
        once = stabilize(graph_of(make, F32, (5,)))
        assert ops(once).split().count("reduce_max") == 1 and ops(stabilize(once)) == ops(once)


@pytest.mark.reference
def test_gradients_of_stable_formulas_are_finite() -> None:
    """The reason why stable comes before autodiff."""
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(4,))
    loss = b.reduce_sum(b.log(b.sub(1, b.sigmoid(x))), axes=(0,))
    graph = Graph("g", (x,), {"y": b.grad(loss, x)})
    points = np.array([-200, -1, 1, 200], np.float32)
    assert not np.isfinite(run(expand_gradients(graph), points)).all()
    np.testing.assert_allclose(run(expand_gradients(stabilize(graph)), points),
                               -scipy.special.expit(points.astype(float)), rtol=1e-6, atol=1e-30)


# --- joint

@pytest.mark.reference
@pytest.mark.parametrize("make, expected", [
    (lambda b, x: b.exp(b.stop_gradient(x)), "exp"),
    (lambda b, x: b.reduce_sum(b.constant(0.75, F32, (3, 5)), axes=(1,)), C[:-1]),
    (lambda b, x: b.reduce_sum(b.constant(3, F32, (1 << 12, 1 << 10)), axes=(0, 1)), "constant"),
])
def test_joint_rows_that_keep_bits(make: Make, expected: str) -> None:
    rules = [rule for rule in JOINT if rule.keeps == "bits"]
    keeps_bits(make, expected, shape=(4, 3), stage=lambda graph: rewrite(graph, rules))


@pytest.mark.reference
def test_a_sum_that_rounds_keeps_its_order_among_the_rows_that_keep_bits() -> None:
    graph = graph_of(lambda b, x: b.reduce_sum(b.constant(0.1, F32, (1000,)), axes=(0,)))
    assert ops(rewrite(graph, [r for r in JOINT if r.keeps == "bits"])) == "constant broadcast_to reduce_sum"
    assert ops(optimize_jointly(graph)) == "constant"


@pytest.mark.reference
@pytest.mark.parametrize("make, expected", [
    (lambda b, x: b.reduce_sum(b.broadcast_to(x, shape=(7, 4, 3)), axes=(0,)), "constant broadcast_to mul"),
    (lambda b, x: b.reduce_sum(b.broadcast_to(b.reshape(x, shape=(4, 1, 3)), shape=(4, 6, 3)), axes=(1,)),
     "constant broadcast_to mul"),
    (lambda b, x: b.reduce_sum(b.broadcast_to(x, shape=(7, 4, 3)), axes=(0, 1)), "broadcast_to reduce_sum"),
    (lambda b, x: b.matmul(b.transpose(x, perm=(1, 0)), x), "matmul"),
    (lambda b, x: b.matmul(x, b.transpose(x, perm=(1, 0))), "matmul"),
    (lambda b, x: b.transpose(b.matmul(b.abs(x), x, transpose_x=True), perm=(1, 0)), "abs matmul"),
    (lambda b, x: b.transpose(b.matmul(b.abs(x), x, transpose_y=True), perm=(1, 0)), "abs matmul"),
])
def test_joint_rows_within_a_tolerance(make: Make, expected: str) -> None:
    before = graph_of(make, F64, (4, 3))
    after = optimize_jointly(before)
    check_graph(after, "joint")
    assert ops(after) == expected, print_graph(after)
    x = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-13)


def test_a_training_step_has_no_transposition_and_no_needless_view() -> None:
    net = Net()
    x, y = net.input("x", (6,)), net.input("y", (), I64)
    loss = net.cross_entropy(net.dense(net.b.relu(net.dense(x, "a", 5)), "b", 4), y)
    net.momentum(loss)
    graph = Graph("step", tuple(net.inputs), {"loss": loss}, tuple(net.effects))
    for stage in (canonicalize, stabilize, expand_gradients, optimize_jointly):
        graph = stage(graph)
    found = ops(graph).split()
    assert "transpose" not in found and "stop_gradient" not in found
    assert found.count("matmul") == 5   # two forward, two weights' gradients, one input's
    assert ops(optimize_jointly(graph)) == ops(graph)         # one sweep does it


# --- the engine

@pytest.mark.reference
@pytest.mark.parametrize("differentiate", [True, False])
def test_what_is_differentiated_is_opaque(differentiate: bool) -> None:
    """d/d(exp x) of log(exp x) is 1 / exp x; looking through exp x would make it 0."""
    b = Builder()
    x = b.input(name="x", dtype=F64, shape=())
    e = b.exp(x)
    loss = b.log(e)
    graph = Graph("g", (x,), {"y": b.grad(loss, e) if differentiate else loss})
    assert ("exp" in ops(stabilize(graph)).split()) == differentiate
    wanted = math.exp(-2.0) if differentiate else 2.0
    np.testing.assert_allclose(run(expand_gradients(stabilize(graph)), np.array(2.0)), wanted, rtol=1e-15)


@pytest.mark.reference
def test_what_is_differentiated_merges_with_nothing() -> None:
    """Two equal values: the derivative by one of them leaves the other alone."""
    x = Builder().input(name="x", dtype=F64, shape=())
    one, other = (Node("exp", (x,), {}, (), (x.type,)).result() for _ in range(2))
    b = Builder()
    graph = Graph("g", (x,), {"y": b.grad(b.mul(one, other), one)})
    for stage in (canonicalize, stabilize):
        graph = stage(graph)
        assert ops(graph) == "exp exp mul grad"
        np.testing.assert_allclose(run(expand_gradients(graph), np.array(2.0)), math.exp(2.0), rtol=1e-15)


def test_a_table_that_does_not_end_is_found() -> None:
    around = Rule("to and fro", "neg", lambda b, node, inputs: b.neg(b.abs(inputs[0])))
    with pytest.raises(CompilerError, match="the rewriting of neg does not end: rule 'to and fro'"):
        rewrite(graph_of(lambda b, x: b.neg(x)), [around])


def test_a_rule_that_changes_the_type_is_found() -> None:
    wrong = Rule("wrong", "neg", lambda b, node, inputs: b.isnan(inputs[0]))
    with pytest.raises(CompilerError, match=r"rule 'wrong' changes \[f32\[N\]\] to \[bool\[N\]\]"):
        rewrite(graph_of(lambda b, x: b.neg(x)), [wrong])


def test_origins_survive_every_replacement() -> None:
    b = Builder()

    def at(line: int):
        return b.origin([Location("model.py", line)])
    with at(1):
        x = b.input(name="x", dtype=F32, shape=(3,))
    with at(2):
        e = b.exp(x)
    with at(3):
        kept = b.mul(e, 1.0)
    with at(4):
        loss = b.reduce_sum(b.log(b.sigmoid(kept)), axes=(0,))
    with at(5):
        gradient = b.grad(loss, x)
    graph = Graph("g", (x,), {"loss": loss, "gradient": gradient})
    graph = canonicalize(graph)
    (exp,) = [n for n in graph.nodes() if n.op == "exp"]
    assert {o.line for o in exp.origins} == {2, 3}
    graph = expand_gradients(stabilize(graph))
    assert all(n.origins for n in graph.nodes())
    (backward,) = [n for n in graph.nodes() if n.op == "sigmoid"]      # the gradient of softplus
    assert 4 in {o.line for o in backward.origins}


# --- autodiff

def gradient_of(make: Make, x: np.ndarray) -> np.ndarray:
    b = Builder()
    v = b.input(name="x", dtype=F64, shape=x.shape)
    return run(expand_gradients(Graph("g", (v,), {"y": b.grad(make(b, v), v)})), x)


@pytest.mark.reference
def test_gradients_of_gradients() -> None:
    """d/dx sum((d/dx sum(x**3))**2) = 36 x**3."""
    x = np.array([0.5, -1.0, 2.0])

    def make(b: Builder, v: Value) -> Value:
        first = b.grad(b.reduce_sum(b.mul(b.mul(v, v), v), axes=(0,)), v)
        return b.reduce_sum(b.mul(first, first), axes=(0,))
    np.testing.assert_allclose(gradient_of(make, x), 36 * x ** 3, rtol=1e-13)


@pytest.mark.reference
def test_a_value_used_twice_adds_up() -> None:
    x = np.array([0.5, -1.0, 2.0])
    found = gradient_of(lambda b, v: b.reduce_sum(b.add(b.mul(v, v), b.sin(v)), axes=(0,)), x)
    np.testing.assert_allclose(found, 2 * x + np.cos(x), rtol=1e-14)


@pytest.mark.reference
@pytest.mark.parametrize("make", [
    lambda b, v: b.constant(3, F64), lambda b, v: b.reduce_sum(b.stop_gradient(v), axes=(0,)),
    lambda b, v: b.reduce_sum(b.floor(v), axes=(0,)), lambda b, v: b.reduce_sum(b.sign(v), axes=(0,)),
    lambda b, v: b.cast(b.reduce_sum(b.cast(v, dtype=I32), axes=(0,)), dtype=F64),
    lambda b, v: b.cast(b.argmax(v, axis=0), dtype=F64),
])
def test_where_nothing_flows_the_gradient_is_zero(make: Make) -> None:
    found = gradient_of(make, np.array([0.5, -1.0, 2.0]))
    assert found.dtype == np.float64 and not found.any() and found.shape == (3,)


@pytest.mark.reference
def test_the_gradient_by_a_value_between() -> None:
    """By the scalar itself it is 1; by a value and by what it is made from, each is the whole derivative."""
    b = Builder()
    x = b.input(name="x", dtype=F64, shape=())
    square = b.mul(x, x)
    loss = b.exp(square)
    by_loss, by_square, by_x = b.node("grad", (loss, loss, square, x)).results
    graph = expand_gradients(Graph("g", (x,), {"loss": by_loss, "square": by_square, "x": by_x}))
    outputs, _ = interpret(graph, {"x": np.array(0.5)}, {})
    wanted = {"loss": 1.0, "square": math.exp(0.25), "x": math.exp(0.25)}
    assert outputs.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-15)


def test_an_op_without_gradient_is_named() -> None:
    from graphflow.compiler.ir.graph import Region, TensorType
    b = Builder()
    with b.origin([Location("model.py", 9)]):
        x = b.input(name="x", dtype=F32, shape=(2,))
        p = b.parameter(TensorType(F32, (2,)), 0)
        y = b.node("fused", (x,), {"kind": "map"}, [Region((p,), (b.exp(p),))]).result()
    with pytest.raises(UseError, match="fused has no gradient") as error:
        expand_gradients(Graph("g", (x,), {"y": b.grad(b.reduce_sum(y, axes=(0,)), x)}))
    assert error.value.where == Location("model.py", 9)
