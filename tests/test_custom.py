"""Ops of the user's own: names, gradients, nests, errors."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf


def scaled(factor: float) -> Any:
    """sin with the derivative of its own: factor * cos."""
    return gf.custom_gradient(gf.sin, lambda inputs, outputs, cotangents:
                              (cotangents * factor * gf.cos(inputs[0]),))


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_the_users(device: str) -> None:
    x = gf.input("x", (3,), "float64")
    g = gf.grad(gf.sum(scaled(5.0)(2 * x)), x)
    second = gf.grad(gf.sum(g), x)
    value = np.array([0.2, 1, -3])
    found = gf.function([x], [scaled(5.0)(x), g, second], device=device)(value)
    for a, e in zip(found, (np.sin(value), 10 * np.cos(2 * value), -20 * np.sin(2 * value))):
        np.testing.assert_allclose(a, e, rtol=1e-13)


@pytest.mark.reference
def test_nests_options_and_arguments_without_a_gradient() -> None:
    def forward(pair: dict[str, gf.Tensor], n: gf.Tensor, shift: float = 0.0) -> dict[str, Any]:
        return {"sum": pair["a"] + pair["b"] + shift, "n": n + 1}

    def backward(inputs: Any, outputs: Any, cotangents: Any, shift: float = 0.0) -> Any:
        assert cotangents["n"] is None
        return {"a": None, "b": cotangents["sum"] * outputs["sum"] * shift}, None
    op = gf.custom_gradient(forward, backward)
    a, b, n = gf.input("a", (2,), "float64"), gf.input("b", (2,), "float64"), gf.input("n", (), "int64")
    out = op({"a": a, "b": b}, n, shift=3.0)
    program = gf.function([a, b, n], [out["sum"], out["n"], *gf.grad(gf.sum(out["sum"]), [a, b])],
                          device="reference")
    total, count, by_a, by_b = program([1.0, 2], [10.0, 20], 4)
    np.testing.assert_array_equal(total, [14, 25])
    assert count == 5
    np.testing.assert_array_equal(by_a, [0, 0])
    np.testing.assert_array_equal(by_b, [42, 75])


@pytest.mark.reference
def test_in_loops_and_branches() -> None:
    x, h = gf.input("x", (4, 3), "float64"), gf.input("h", (3,), "float64")
    op = scaled(1.0)
    results = []
    for f in (op, gf.sin):
        last, _ = gf.scan(lambda h, x, f=f: (gf.cond(gf.sum(x) > 0, f, gf.tanh, h + x), None), h, x)
        g = gf.grad(gf.sum(last), [x, h])
        second = gf.grad(gf.sum(g[1] * g[1]), [x, h])
        program = gf.function([x, h], [last, *g, *second], device="reference")
        rng = np.random.default_rng(0)
        results.append(program(rng.standard_normal((4, 3)), rng.standard_normal(3)))
    for a, e in zip(*results):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-13)


@pytest.mark.reference
def test_a_wrong_gradient_is_found() -> None:
    assert gf.check_gradient(scaled(1.0), np.array([0.3, 2])) < 1e-7
    with pytest.raises(gf.UseError, match=r"by array 0 at \[0\] is .* the difference quotient"):
        gf.check_gradient(scaled(1.01), np.array([0.3, 2]))


@pytest.mark.reference
def test_names_reach_the_dumps_and_parameters() -> None:
    @gf.custom_op("gated")
    def gated(x: gf.Tensor) -> gf.Tensor:
        return x * gf.sigmoid(gf.nn.dense(x, 3))
    x = gf.input("x", (2, 3))
    program = gf.function([x], gated(x), device="reference")
    lines = [line for line in program.text("joint").splitlines() if line.startswith("#")]
    assert [' in "gated"' in line for line in lines].count(False) == 1              # the input
    assert sorted(n for n in program.store if "rng" not in n) == ["gated/dense.W", "gated/dense.b"]
    assert gated.__name__ == "gated"


@pytest.mark.reference
def test_indices_in_a_custom_op_are_checked() -> None:
    look_up = gf.custom_gradient(lambda table, i: gf.take(table, i),
                                 lambda inputs, outputs, cotangents: (inputs[0] * 0 + 7, None))
    table, i = gf.input("table", (4,), "float64"), gf.input("i", (2,), "int64")
    out = look_up(table, i)
    program = gf.function([table, i], [out, gf.grad(gf.sum(out), table)], device="reference")
    np.testing.assert_array_equal(program(np.arange(4.0), [3, 1])[1], [7] * 4)
    with pytest.raises(gf.FeedError, match=r"indices must lie in 0\.\.3"):
        program(np.arange(4.0), [4, 0])


def test_mistakes_are_named() -> None:
    x = gf.input("x", (3,), "float64")
    w = gf.parameter((3,), 0.0, dtype="float64")

    def one(backward: Any, forward: Any = gf.sin) -> None:
        gf.custom_op("mine", forward, backward)(x)
    for call, kind, message in (
            (lambda: one(lambda i, o, c: c), gf.UseError, "a tuple with a cotangent for each of the 1"),
            (lambda: one(lambda i, o, c: (c, c)), gf.UseError, "not a tuple of 2"),
            (lambda: one(lambda i, o, c: (gf.sum(c),)), gf.ShapeError,
             r"the cotangent of argument\[0\] of mine is f64\[\], the argument f64\[3\]"),
            (lambda: one(lambda i, o, c: (gf.cast(c, "float32"),)), gf.DTypeError, r"is f32\[3\]"),
            (lambda: one(lambda i, o, c: (c * w,)), gf.UseError, "uses a tensor 'parameter' from outside"),
            (lambda: one(lambda i, o, c: (c,), lambda v: v * w), gf.UseError, "pass it as an argument"),
            (lambda: gf.custom_op("no name", gf.sin), gf.UseError, "'no name' is no name")):
        with pytest.raises(kind, match=message) as caught:
            call()
        assert caught.value.where is None or caught.value.where.file == __file__
