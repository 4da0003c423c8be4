"""The reference interpreter: binding, state, checks and regions, against NumPy and plain Python."""
from __future__ import annotations

import numpy as np
import pytest

from graphflow.compiler.interpret import bind_symbols, interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Guard, Node, Region, TensorType, Value
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, F64, I64, U32
from graphflow.compiler.plan.errors import (
    CompilerError,
    DTypeError,
    FeedError,
    Location,
    ShapeError,
    UseError,
)

pytestmark = pytest.mark.reference

N, T = symbol("N"), symbol("T")


def feed(b: Builder, name: str, shape: tuple, dtype=F64, finite: bool = False) -> Value:
    return b.node("input", (), {"name": name, "dtype": dtype, "shape": shape, "finite": finite}).result()


def state(b: Builder, name: str, shape: tuple, dtype=F64, role: str = "parameter") -> Value:
    return b.node("state", (), {"name": name, "role": role, "dtype": dtype, "shape": shape}).result()


# --- feeds and symbols

def test_symbols_come_from_the_feeds() -> None:
    b = Builder()
    x, y = feed(b, "x", (N, T)), feed(b, "y", (T, N * T))
    graph = Graph("g", (x, y), {"size": b.reduce_sum(b.iota(shape=(N * T,), axis=0, dtype=I64), axes=(0,))})
    feeds = {"x": np.zeros((2, 5)), "y": np.zeros((5, 10))}
    assert bind_symbols(graph, feeds) == {"N": 2, "T": 5}
    assert interpret(graph, feeds, {})[0]["size"] == sum(range(10))


@pytest.mark.parametrize("feeds, message", [
    ({}, "the feed 'x' is missing: f64[N,3]"),
    ({"x": np.zeros((2, 3)), "y": np.zeros(2), "z": 1}, "there is no feed 'z'"),
    ({"x": np.zeros((2, 3), np.float32), "y": np.zeros(2)}, "the feed 'x' is float32, declared f64[N,3]"),
    ({"x": np.zeros((2, 3, 1)), "y": np.zeros(2)}, "the feed 'x' has 3 axes"),
    ({"x": np.zeros((2, 4)), "y": np.zeros(2)}, "axis 1 of the feed 'x' is 4, declared 3"),
    ({"x": np.zeros((2, 3)), "y": np.zeros(3)}, "axis 0 of the feed 'y' is 3, declared N, N = 2"),
    ({"x": np.full((2, 3), np.nan), "y": np.zeros(2)}, "feed 'x': has NaN or infinity in it"),
])
def test_wrong_feeds(feeds: dict, message: str) -> None:
    b = Builder()
    x, y = feed(b, "x", (N, 3), finite=True), feed(b, "y", (N,))
    with pytest.raises(FeedError) as caught:
        interpret(Graph("g", (x, y), {"out": x}), feeds, {})
    assert message in str(caught.value)


def test_a_symbol_that_no_feed_binds_is_given() -> None:
    b = Builder()
    x = feed(b, "x", (2 * N,))
    graph = Graph("g", (x,), {"out": b.reshape(x, shape=(N, 2))})
    assert interpret(graph, {"x": np.arange(6.0)}, {}, {"N": 3})[0]["out"].shape == (3, 2)


def test_guards() -> None:
    b = Builder()
    x, y = feed(b, "x", (N,)), feed(b, "y", (T,))
    graph = Graph("g", (x, y), {"out": x}, guards=(Guard(N, T, Location(__file__, 1)),))
    interpret(graph, {"x": np.zeros(3), "y": np.zeros(3)}, {})
    with pytest.raises(FeedError, match="N = T must hold, but with these feeds it says 3 = 4") as caught:
        interpret(graph, {"x": np.zeros(3), "y": np.zeros(4)}, {})
    assert caught.value.where == Location(__file__, 1)


# --- state, updates, checks

def test_every_read_sees_the_state_of_the_start() -> None:
    b = Builder()
    a, c = state(b, "a", (2,)), state(b, "c", (2,))
    swap = (b.node("update", (c,), {"name": "a"}), b.node("update", (a,), {"name": "c"}))
    before = {"a": np.array([1.0, 2]), "c": np.array([3.0, 4])}
    outputs, updates = interpret(Graph("g", (), {"sum": b.add(a, c)}, swap), {}, before)
    np.testing.assert_array_equal(outputs["sum"], [4, 6])
    np.testing.assert_array_equal(updates["a"], [3, 4])
    np.testing.assert_array_equal(updates["c"], [1, 2])
    np.testing.assert_array_equal(before["a"], [1, 2])


def test_missing_state() -> None:
    b = Builder()
    with pytest.raises(UseError, match="the state entry 'w' is missing"):
        interpret(Graph("g", (), {"w": state(b, "w", ())}), {}, {})


def test_a_check_that_fails_says_its_message_and_line() -> None:
    b = Builder()
    with b.origin([Location(__file__, 3)]):
        x = feed(b, "x", (N,))
        check = b.node("check", (b.reduce_all(b.gt(x, 0.0), axes=(0,)),), {"message": "x must be positive"})
    graph = Graph("g", (x,), {"out": x}, (check,))
    interpret(graph, {"x": np.ones(2)}, {})
    with pytest.raises(FeedError, match="x must be positive") as caught:
        interpret(graph, {"x": np.array([1.0, -1])}, {})
    assert caught.value.where == Location(__file__, 3)


def test_what_an_earlier_stage_replaces_is_refused() -> None:
    b = Builder()
    x = feed(b, "x", ())
    for node in (b.node("grad", (x, x)), b.node("training")):
        with pytest.raises(CompilerError, match=f"the op {node.op} cannot be interpreted"):
            interpret(Graph("g", (x,), {"out": node.result()}), {"x": np.float64(1)}, {})


def test_a_node_whose_type_is_wrong_is_found() -> None:
    b = Builder()
    x = feed(b, "x", (3,))
    wrong = Node("exp", (x,), {}, (), (TensorType(F64, (4,)),))
    with pytest.raises(CompilerError, match="the reference of exp gives"):
        interpret(Graph("g", (x,), {"out": wrong.result()}), {"x": np.zeros(3)}, {})


# --- regions

def scan_of_sums(b: Builder, x: Value, reverse: bool = False) -> Node:
    """carry' = carry * k + x[i], stacked: carry before the step."""
    carry = b.parameter(TensorType(F64, (2,)), 0)
    row = b.parameter(TensorType(F64, (2,)), 1)
    k = b.parameter(TensorType(F64, (2,)), 2)
    body = Region((carry, row, k), (b.add(b.mul(carry, k), row), carry))
    start, factor = feed(b, "start", (2,)), feed(b, "k", (2,))
    attrs = {"length": x.shape[0], "carries": 1, "steps": 1, "reverse": reverse}
    return b.node("scan", (start, x, factor), attrs, (body,))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_scan_is_a_loop(length: int, reverse: bool) -> None:
    b = Builder()
    x = feed(b, "x", (T, 2))
    node = scan_of_sums(b, x, reverse)
    assert node.types == (TensorType(F64, (2,)), TensorType(F64, (T, 2)))
    rng = np.random.default_rng(length)
    rows, start, k = rng.standard_normal((length, 2)), rng.standard_normal(2), rng.standard_normal(2)
    graph = Graph("g", (x, *(node.inputs[0], node.inputs[2])),
                  {"last": node.result(0), "before": node.result(1)})
    outputs, _ = interpret(graph, {"x": rows, "start": start, "k": k}, {})
    carry, before = start, np.zeros((length, 2))
    for step in range(length)[::-1] if reverse else range(length):
        before[step] = carry
        carry = carry * k + rows[step]
    np.testing.assert_allclose(outputs["last"], carry, rtol=1e-14)
    np.testing.assert_allclose(outputs["before"], before, rtol=1e-14)


def test_scan_refuses_what_does_not_fit() -> None:
    b = Builder()
    x = feed(b, "x", (T, 2))
    node = scan_of_sums(b, x)
    body, attrs = node.regions[0], dict(node.attrs)
    start, _, k = node.inputs
    for inputs, changed, region, error, message in (
            ((start, x, k), {"length": 5}, body, ShapeError, "axis 0 of input 0 per step is T, the length is "
                                                             "5"),
            ((start, x, x), {}, body, ShapeError, "parameter 2 of the body is f64[2], but its operand gives "
                                                  "f64[T,2]"),
            ((start, x), {}, body, UseError, "the body has 3 parameters for 2 operands"),
            ((start,), {}, body, UseError, "1 carries and 1 inputs per step, but 1 operands"),
            ((start, x, k), {}, Region(body.parameters, ()), UseError, "returns 0 values for 1 carries"),
            ((start, x, k), {}, Region(body.parameters, (b.cast(body.results[0], dtype=F32),)), DTypeError,
             "carry 0 starts as f64[2], but the body returns f32[2]"),
            ((start, x, k), {}, Region(body.parameters, (b.reshape(body.results[0], shape=(1, 2)),)),
             ShapeError,
             "a carry keeps its shape")):
        with pytest.raises(error) as caught:
            b.node("scan", inputs, {**attrs, **changed}, (region,))
        assert message in str(caught.value)


def test_fused_runs_its_region_and_ignores_what_it_comes_after() -> None:
    b = Builder()
    x, y = feed(b, "x", (N,)), feed(b, "y", ())
    p = b.parameter(TensorType(F64, (N,)), 0)
    body = Region((p,), (b.exp(p), b.reduce_sum(b.exp(p), axes=(0,))))
    node = b.node("fused", (x, y), {"kind": "loop", "after": 1}, (body,))
    outputs, _ = interpret(Graph("g", (x, y), {"e": node.result(0), "s": node.result(1)}),
                           {"x": np.array([0.0, 1]), "y": np.float64(0)}, {})
    np.testing.assert_allclose(outputs["e"], [1, np.e], rtol=1e-15)
    np.testing.assert_allclose(outputs["s"], 1 + np.e, rtol=1e-15)
    with pytest.raises(UseError, match="3 of 2 operands are said to be for ordering"):
        b.node("fused", (x, y), {"kind": "loop", "after": 3}, (body,))
    with pytest.raises(UseError, match="1 in-place states for 2 results"):
        b.node("fused", (x, y), {"kind": "loop", "after": 1, "inplace": ("w",)}, (body,))


# --- random bits

@pytest.mark.parametrize("key, counter, expected", [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
])
def test_threefry_has_the_published_test_vectors(key: tuple, counter: tuple, expected: tuple) -> None:
    """The known answers for threefry2x32, 20 rounds, of the authors' Random123 library."""
    from graphflow.compiler.ops.random import threefry2x32
    assert tuple(int(word[0]) for word in threefry2x32(key, counter)) == expected


def test_random_bits_depend_on_seed_step_and_stream_only() -> None:
    b = Builder()
    seed, step = state(b, "seed", (), U32, "seed"), state(b, "step", (), U32, "step")
    nodes = {name: b.random_bits(seed, step, shape=shape, stream=stream) for name, shape, stream in (
        ("a", (6, 50), 0), ("flat", (300,), 0), ("other", (6, 50), 1))}
    graph = Graph("g", (), nodes)

    def bits(seed: int, step: int) -> dict:
        return interpret(graph, {}, {"seed": np.uint32(seed), "step": np.uint32(step)})[0]

    first = bits(1, 0)
    np.testing.assert_array_equal(first["a"].ravel(), first["flat"])
    assert not np.any(first["a"] == first["other"])
    assert not np.any(first["a"] == bits(1, 1)["a"]) and not np.any(first["a"] == bits(2, 0)["a"])
    mean = np.mean([bits(seed, 0)["a"] / 2 ** 32 for seed in range(20)])
    assert abs(mean - 0.5) < 5 * np.sqrt(1 / 12 / 6000)
    assert BOOL not in {v.dtype for v in nodes.values()}
