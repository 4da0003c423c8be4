"""Functions of single elements that the language composes, and NumPy's names, against NumPy and SciPy."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import special

import graphflow as gf
from graphflow.compiler.plan.dtypes import BOOL, I32
from graphflow.pointwise import ALIASES
from graphflow.tensor import takes

pytestmark = pytest.mark.cpu

X = np.array([-np.inf, -7.5, -2.0, -1.0, -0.75, -0.3, -1e-4, -0.0, 0.0, 1e-5, 0.25, 0.5, 1.0, 1.5, 3.0, 1e6,
              np.inf, np.nan])
Y = np.array([2.0, -2.0, 0.0, np.nan, 0.5, -0.3, 3.0, -1.0, np.inf, -np.inf, 1.0, 7.0, np.nan, 0.0, -0.0, 3.0,
              np.inf, 1.0])
UNARY: dict[str, Callable] = {
    "square": np.square, "reciprocal": np.reciprocal, "isinf": np.isinf, "signbit": np.signbit,
    "degrees": np.degrees, "radians": np.radians, "rad2deg": np.rad2deg, "deg2rad": np.deg2rad,
    "nan_to_num": np.nan_to_num, "sinc": np.sinc, "logit": special.logit,
}
BINARY: dict[str, Callable] = {
    "fmod": np.fmod, "fmax": np.fmax, "fmin": np.fmin, "heaviside": np.heaviside, "power": np.power,
    "logaddexp": np.logaddexp, "logaddexp2": np.logaddexp2, "xlogy": special.xlogy,
    "xlog1py": special.xlog1py,
}


def run(function: Callable, *arrays: np.ndarray) -> Any:
    """The function's value at the arrays on the CPU."""
    inputs = [gf.input(f"x{i}", a.shape, a.dtype) for i, a in enumerate(arrays)]
    value = function(*inputs)
    return gf.function(inputs, list(value) if isinstance(value, tuple) else value)(*arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_values_are_numpys(name: str, dtype: str) -> None:
    arrays = [X.astype(dtype)] if name in UNARY else [X.astype(dtype), Y.astype(dtype)]
    with np.errstate(all="ignore"):
        expected = (UNARY | BINARY)[name](*arrays)
    found = run(getattr(gf, name), *arrays)
    assert found.dtype == expected.dtype
    limit = 1e-6 if dtype == "float32" else 1e-14
    np.testing.assert_allclose(found, expected, rtol=2 * limit, atol=limit)


@pytest.mark.parametrize("name", ["divmod", "modf"])
def test_pairs_are_numpys(name: str) -> None:
    arrays = [X[1:-2], np.where(Y == 0, 1, Y)[1:-2]] if name == "divmod" else [X]
    with np.errstate(all="ignore"):
        expected = getattr(np, name)(*arrays)
    for result, wanted in zip(run(getattr(gf, name), *arrays), expected):
        np.testing.assert_array_equal(result, wanted)
        np.testing.assert_array_equal(np.signbit(result), np.signbit(wanted))


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_is_numpys_function(name: str) -> None:
    function = getattr(np, name)
    integers = takes(ALIASES[name], I32)
    x = np.array([3, 5, -7, 1], np.int32) if integers else np.array([0.25, 0.5, 1.0])
    x = np.array([1.0, 1.5, 2.0]) if name == "arccosh" else np.array([0.25, 0.5]) if name == "arctanh" else x
    y = np.array([2, 2, 3, 1], np.int32) if integers else np.array([4.0, 3.0, 2.0])
    arrays = [x, y] if function.nin == 2 else [x]
    np.testing.assert_allclose(run(getattr(gf, name), *arrays), function(*arrays), rtol=1e-14)


def test_logic() -> None:
    x, y = np.array([False, False, True, True]), np.array([False, True, False, True])
    np.testing.assert_array_equal(run(gf.logical_xor, x, y), np.logical_xor(x, y))
    np.testing.assert_array_equal(run(gf.logical_xor, x * 5, y), np.logical_xor(x, y))
    np.testing.assert_array_equal(run(gf.invert, x), ~x)
    numbers = np.array([0, 1, -5], np.int32)
    np.testing.assert_array_equal(run(gf.bitwise_not, numbers), np.bitwise_not(numbers))
    assert gf.isinf(gf.constant([1.0])).dtype == BOOL


def test_clip() -> None:
    x = np.array([-2.0, -1.0, 0.5, 1.0, 3.0, np.nan])
    np.testing.assert_array_equal(run(lambda x: gf.clip(x, -1, 1), x), np.clip(x, -1, 1))
    np.testing.assert_array_equal(run(lambda x: gf.clip(x, None, 1), x), np.clip(x, None, 1))
    at = gf.input("x", x.shape, "float64")
    slope = gf.function([at], gf.grad(gf.clip(at, -1, 1).sum(), [at])[0])(x)
    np.testing.assert_array_equal(slope, [0, 1, 1, 1, 0, 1])


@pytest.mark.parametrize("function, derivative", [
    (lambda x: gf.xlogy(0.0 * x, x), lambda x: 0 * x), (lambda x: gf.xlog1py(0.0 * x, x), lambda x: 0 * x),
    (lambda x: gf.logaddexp(x, 0.0), special.expit),
    (gf.sinc, lambda x: np.where(x == 0, 0, (np.cos(np.pi * x) - np.sinc(x)) / np.where(x == 0, 1, x))),
    (lambda x: gf.fmax(x, 1.0), lambda x: (x >= 1) * 1.0),
])
def test_derivatives(function: Callable, derivative: Callable) -> None:
    x = np.array([-2.3, -1, -0.4, 0.0, 0.1, 1.0, 5.5])
    at = gf.input("x", x.shape, "float64")
    found = gf.function([at], gf.grad(function(at).sum(), [at])[0])(x)
    np.testing.assert_allclose(found, derivative(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gamma_functions(dtype: str) -> None:
    rng = np.random.default_rng(6)
    x = np.concatenate([rng.uniform(-6, 0, 60), rng.uniform(0, 25, 60), 10.0 ** rng.uniform(-30, 30, 60),
                        [0.5, 1, 2, 3, 10, 0, np.inf]]).astype(dtype)
    limit = 2e-7 if dtype == "float32" else 2e-13
    at = gf.input("x", x.shape, dtype)
    psi = gf.digamma(at)
    values = gf.function([at], [gf.lgamma(at), psi, gf.grad(psi.sum(), [at])[0]])(x)
    np.testing.assert_allclose(values[0], special.gammaln(x.astype(np.float64)), rtol=limit, atol=limit / 10)
    np.testing.assert_allclose(values[1], special.digamma(x.astype(np.float64)), rtol=limit, atol=limit / 10)
    ordinary = (x > 1e-10) & (x < 1e10)
    trigamma = special.polygamma(1, x[ordinary].astype(np.float64))
    np.testing.assert_allclose(values[2][ordinary], trigamma, rtol=10 * limit)
    slope = gf.function([at], gf.grad(gf.lgamma(at).sum(), [at])[0])(x)
    expected = special.digamma(x[ordinary].astype(np.float64))
    np.testing.assert_allclose(slope[ordinary], expected, rtol=10 * limit, atol=limit)


def test_second_derivative_of_sinc_at_zero() -> None:
    at = gf.input("x", (3,), "float64")
    first = gf.grad(gf.sinc(at).sum(), [at])[0]
    second = gf.function([at], gf.grad(first.sum(), [at])[0])(np.array([0.0, 1e-9, 1e-3]))
    np.testing.assert_allclose(second, -np.pi**2 / 3, rtol=1e-5)


ACTIVATIONS: dict[str, Callable] = {
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x), "relu6": lambda x: np.clip(x, 0, 6),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)), "celu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "gelu": lambda x: x * special.ndtr(x), "silu": lambda x: x * special.expit(x),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)), "softsign": lambda x: x / (1 + np.abs(x)),
    "log_sigmoid": special.log_expit, "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hard_shrink": lambda x: np.where(np.abs(x) > 0.5, x, 0), "tanh_shrink": lambda x: x - np.tanh(x),
    "soft_shrink": lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    """Values by their formulas, gradients by central differences of these."""
    x = np.random.default_rng(5).normal(size=50) * 3
    at = gf.input("x", x.shape, "float64")
    value = getattr(gf, name)(at)
    found, slope = gf.function([at], [value, gf.grad(value.sum(), [at])[0]])(x)
    np.testing.assert_allclose(found, ACTIVATIONS[name](x), rtol=1e-12, atol=1e-13)
    difference = (ACTIVATIONS[name](x + 1e-6) - ACTIVATIONS[name](x - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)
