"""Views of symbolic shapes: their types, gradients and index maps, for several values of the symbols."""
from __future__ import annotations

import numpy as np
import pytest

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, TensorType, Value
from graphflow.compiler.ops.shape import reshape_index, slice_guards
from graphflow.compiler.passes.autodiff import gradients
from graphflow.compiler.plan.dims import DimLike, evaluate, floordiv, symbol
from graphflow.compiler.plan.dtypes import F64, I64
from graphflow.compiler.plan.errors import ShapeError

N, T = symbol("N"), symbol("T")


def feed(b: Builder, name: str, shape: tuple) -> Value:
    return b.node("input", (), {"name": name, "dtype": F64, "shape": shape}).result()


# --- reshape_index

def divides(d: DimLike) -> bool:
    return "//" in str(d) or "%" in str(d)


@pytest.mark.parametrize("from_shape, to_shape, division", [
    ((2, 3, 4), (6, 4), False), ((6, 4), (2, 3, 4), True), ((24,), (2, 3, 4), True),
                                                            ((2, 3, 4), (24,), False),
    ((2, 1, 3), (2, 3, 1, 1), False), ((), (1, 1), False), ((1,), (), False), ((5, 6, 7), (5, 42), False),
    ((5, 42), (5, 6, 7), True), ((4, 6), (8, 3), True), ((9, 2, 4), (3, 3, 8), True), ((3, 4), (3, 4), False),
    ((N, 12), (N, 3, 4), True), ((N, 3, 4), (N, 12), False), ((N, T, 4), (N * T, 4), False),
                                                            ((4 * N,), (N, 4), True),
    ((N, 4), (4 * N,), False), ((N, 6), (2 * N, 3), True), ((N, T), (N, 1, T), False),
                                                            ((2 * N, 3), (N, 6), True),
    ((N, 1, T, 8), (N * T, 2, 4), True),
])
@pytest.mark.parametrize("n, t", [(3, 2), (1, 5)])
def test_reshape_index_is_numpys_reshape(from_shape: tuple, to_shape: tuple, division: bool, n: int,
                                         t: int) -> None:
    names = [f"i{a}" for a in range(len(from_shape))]
    found = reshape_index([symbol(name) for name in names], from_shape, to_shape)
    assert any(map(divides, found)) == division
    symbols = {"N": n, "T": t}
    left = tuple(evaluate(d, symbols) for d in from_shape)
    right = tuple(evaluate(d, symbols) for d in to_shape)
    numbers = np.arange(int(np.prod(left)))
    reshaped = numbers.reshape(right)
    for at in np.ndindex(*left):
        place = tuple(evaluate(d, {**symbols, **dict(zip(names, at))}) for d in found)
        assert reshaped[place] == numbers.reshape(left)[at]


def test_reshape_index_uses_the_bounds_of_the_index() -> None:
    index = [symbol("tile") * 4 + symbol("lane")]
    assert reshape_index(index, (32,), (8, 4), {"lane": (0, 3)}) == [symbol("tile"), symbol("lane")]


@pytest.mark.parametrize("from_shape, to_shape", [((4 * N,), (4, N)), ((N * T,), (N, T)), ((T, N), (N, T))])
def test_reshape_index_divides_by_constants_only(from_shape: tuple, to_shape: tuple) -> None:
    with pytest.raises(NotImplementedError, match="which is not constant"):
        reshape_index([symbol(f"i{a}") for a in range(len(from_shape))], from_shape, to_shape)


# --- types

def test_symbolic_types() -> None:
    b = Builder()
    x = feed(b, "x", (N, T))
    assert b.reshape(x, shape=(T * N,)).shape == (N * T,)
    assert b.slice(x, starts=(0, 1), stops=(N, T), steps=(1, 1)).shape == (N, T - 1)
    assert b.slice(x, starts=(0, 0), stops=(N, T), steps=(1, 2)).shape == (N, floordiv(T + 1, 2))
    assert b.pad(x, low=(T, 0), high=(0, 1), interior=(0, 1)).shape == (N + T, 2 * T)
    assert b.concatenate(x, x, axis=1).shape == (N, 2 * T)
    assert b.broadcast_to(x, shape=(3, N, T)).type == TensorType(F64, (3, N, T))


def test_a_symbol_is_never_broadcast_and_never_equal_by_chance() -> None:
    b = Builder()
    x, y = feed(b, "x", (N,)), feed(b, "y", (T,))
    with pytest.raises(ShapeError, match="axis 0 has extent N, which does not stretch to T(.|\n)*N is not "
                                         "known to be 1"):
        b.broadcast_to(x, shape=(T,))
    with pytest.raises(ShapeError, match="differ in axis 0: N and T"):
        b.add(x, y)
    with pytest.raises(ShapeError, match="N is not T"):
        b.reshape(x, shape=(T,))


def test_slice_guards_say_what_must_hold() -> None:
    assert slice_guards((5, N), (1, 0), (4, N)) == []
    for shape, starts, stops, fits in (((N,), (1,), (N,), lambda n, t: 1 <= n),
                                       ((64,), (0,), (T,), lambda n, t: t <= 64),
                                       ((N,), (T,), (N,), lambda n, t: t <= n),
                                       ((N,), (0,), (T,), lambda n, t: t <= n)):
        guards = slice_guards(shape, starts, stops)
        assert guards
        for n in (0, 1, 5, 64, 100):
            for t in (0, 1, 5, 64, 100):
                holds = all(evaluate(a, {"N": n, "T": t}) == evaluate(c, {"N": n, "T": t}) for a, c in guards)
                assert holds == fits(n, t), (shape, starts, stops, n, t)
    with pytest.raises(ShapeError, match="0:N \\+ 1 is not within axis 0 of extent N"):
        slice_guards((N,), (0,), (N + 1,))


# --- values and gradients

CASES = {
    "slice": lambda b, x: b.slice(x, starts=(0, 1), stops=(N, T), steps=(1, 1)),
    "slice with steps": lambda b, x: b.slice(x, starts=(1, 0), stops=(N, T), steps=(2, 3)),
    "slice to a symbol": lambda b, x: b.slice(b.concatenate(x, x, axis=0), starts=(0, 0), stops=(N, T),
                                              steps=(1, 1)),
    "pad": lambda b, x: b.pad(x, low=(T, 0), high=(0, 1), interior=(2, 0)),
    "concatenate": lambda b, x: b.concatenate(x, b.mul(x, x), axis=1),
    "flip": lambda b, x: b.flip(x, axes=(0,)),
    "transpose": lambda b, x: b.transpose(x, perm=(1, 0)),
    "reshape": lambda b, x: b.reshape(x, shape=(N * T,)),
    "broadcast": lambda b, x: b.broadcast_to(b.reshape(x, shape=(N, 1, T)), shape=(2, N, 3, T)),
    "reduce_max": lambda b, x: b.reduce_max(x, axes=(1,)),
    "reduce_sum": lambda b, x: b.reduce_sum(b.mul(x, x), axes=(0,)),
}
ORACLES = {
    "slice": lambda x: x[:, 1:], "slice with steps": lambda x: x[1::2, ::3], "slice to a symbol": lambda x: x,
    "concatenate": lambda x: np.hstack([x, x * x]), "flip": lambda x: x[::-1], "transpose": lambda x: x.T,
    "reshape": lambda x: x.ravel(), "broadcast": lambda x: np.tile(x[None, :, None], (2, 1, 3, 1)),
    "reduce_max": lambda x: x.max(1), "reduce_sum": lambda x: (x * x).sum(0),
    "pad": lambda x: np.pad(np.insert(x, np.repeat(np.arange(1, len(x)), 2), 0, 0),
                            ((x.shape[1], 0), (0, 1))),
}


@pytest.mark.reference
@pytest.mark.parametrize("n, t", [(4, 7), (1, 1), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_symbolic_values_and_gradients(name: str, n: int, t: int) -> None:
    b = Builder()
    x = feed(b, "x", (N, T))
    y = CASES[name](b, x)
    w = feed(b, "w", y.shape)
    loss = b.reduce_sum(b.mul(y, w), axes=tuple(range(y.type.rank)))
    graph = Graph("g", (x, w), {"y": y, "loss": loss, "dx": gradients(b, loss, [x])[0]})
    rng = np.random.default_rng(n * t)
    shape = tuple(evaluate(d, {"N": n, "T": t}) for d in y.shape)
    feeds = {"x": rng.standard_normal((n, t)), "w": rng.standard_normal(shape)}

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return interpret(graph, {**feeds, "x": x}, {})[0]

    found = run(feeds["x"])
    np.testing.assert_allclose(found["y"], ORACLES[name](feeds["x"]), rtol=1e-14)
    direction, step = rng.standard_normal((n, t)), 1e-6
    moved = [run(feeds["x"] + s * direction)["loss"] for s in (step, -step)]
    np.testing.assert_allclose(np.sum(found["dx"] * direction), (moved[0] - moved[1]) / (2 * step), rtol=1e-6,
                               atol=1e-8)


@pytest.mark.reference
def test_a_slice_outside_its_array_is_refused_when_it_runs() -> None:
    b = Builder()
    x = feed(b, "x", (N,))
    graph = Graph("g", (x,), {"y": b.slice(x, starts=(0,), stops=(5,), steps=(1,))})
    assert interpret(graph, {"x": np.arange(9.0)}, {})[0]["y"].shape == (5,)
    with pytest.raises(ShapeError, match="0:5 is not within axis 0 of extent 3"):
        interpret(graph, {"x": np.arange(3.0)}, {})


@pytest.mark.reference
def test_empty_reductions_at_run_time_give_the_identity() -> None:
    b = Builder()
    x = feed(b, "x", (N,))
    ops = {"reduce_max": -np.inf, "reduce_min": np.inf, "reduce_sum": 0, "reduce_prod": 1}
    graph = Graph("g", (x,), {**{op: getattr(b, op)(x, axes=(0,)) for op in ops},
                              "argmax": b.argmax(x, axis=0)})
    found = interpret(graph, {"x": np.zeros(0)}, {})[0]
    assert {op: float(found[op]) for op in ops} == ops
    assert found["argmax"] == 0 and found["argmax"].dtype == I64.numpy
