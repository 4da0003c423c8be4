"""Activations against PyTorch: values and gradients, at ordinary and at huge arguments."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import graphflow as gf

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = pytest.mark.cpu

ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "relu": (gf.relu, F.relu),
    "leaky_relu": (gf.leaky_relu, F.leaky_relu),
    "leaky_relu 0.3": (lambda x: gf.leaky_relu(x, 0.3), lambda x: F.leaky_relu(x, 0.3)),
    "relu6": (gf.relu6, F.relu6),
    "threshold": (lambda x: gf.threshold(x, 0.5, -2.0), lambda x: F.threshold(x, 0.5, -2.0)),
    "elu": (gf.elu, F.elu),
    "elu 0.5": (lambda x: gf.elu(x, 0.5), lambda x: F.elu(x, 0.5)),
    "selu": (gf.selu, F.selu),
    "celu 2": (lambda x: gf.celu(x, 2.0), lambda x: F.celu(x, 2.0)),
    "gelu": (gf.gelu, F.gelu),
    "gelu tanh": (lambda x: gf.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (gf.silu, F.silu),
    "swish": (gf.swish, F.silu),
    "mish": (gf.mish, F.mish),
    "softplus": (gf.softplus, lambda x: F.softplus(x, threshold=40)),
    "softsign": (gf.softsign, F.softsign),
    "sigmoid": (gf.sigmoid, torch.sigmoid),
    "log_sigmoid": (gf.log_sigmoid, F.logsigmoid),
    "tanh": (gf.tanh, torch.tanh),
    "hard_tanh": (gf.hard_tanh, F.hardtanh),
    "hard_sigmoid": (gf.hard_sigmoid, F.hardsigmoid),
    "hard_swish": (gf.hard_swish, F.hardswish),
    "hard_shrink": (gf.hard_shrink, F.hardshrink),
    "soft_shrink": (gf.soft_shrink, F.softshrink),
    "tanh_shrink": (gf.tanh_shrink, F.tanhshrink),
}
SINGLE = ("hard_sigmoid",)
"""PyTorch's gradient has a constant in float32 even where the numbers are float64."""


def derivatives(function: Callable, shape: tuple[int, ...], dtype: str, more: tuple = ()) -> gf.Program:
    """A program of x, and of `more` inputs: the value, and the gradient of its sum by each."""
    inputs = [gf.input(f"x{i}", s, dtype) for i, s in enumerate((shape, *more))]
    value = function(*inputs)
    return gf.function(inputs, [value, *gf.grad(value.sum(), inputs)])


def in_torch(function: Callable, *arrays: np.ndarray) -> list[np.ndarray]:
    """The same by PyTorch."""
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    value = function(*tensors)
    value.sum().backward()
    return [t.detach().numpy() for t in (value, *(t.grad for t in tensors))]


def points(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(1)
    huge = [1e3, 1e6, 1e12, 1e18]
    return np.concatenate([rng.normal(size=60) * 3, rng.normal(size=20) * 30, huge, np.negative(huge),
                           [0.0, 1e-30, -1e-30, 20.5, -20.5, 88.5, -88.5]]).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_pytorchs(name: str, dtype: str) -> None:
    ours, theirs = ACTIVATIONS[name]
    x = points(dtype)
    found = derivatives(ours, x.shape, dtype)(x)
    limit = 1e-6 if dtype == "float32" or name in SINGLE else 1e-10
    for result, expected in zip(found, in_torch(theirs, x)):
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result, expected, rtol=2 * limit, atol=limit)


@pytest.mark.parametrize("name", ["celu 2", "gelu", "gelu tanh", "silu", "mish", "softplus", "log_sigmoid",
                                  "sigmoid", "tanh", "tanh_shrink"])
def test_second_derivatives_of_smooth_ones(name: str) -> None:
    ours, theirs = ACTIVATIONS[name]
    x = points("float64")
    x = x[x != 0]                                   # there celu's derivative has a kink
    at = gf.input("x", x.shape, "float64")
    first = gf.grad(ours(at).sum(), [at])[0]
    found = gf.function([at], gf.grad(first.sum(), [at])[0])(x)
    tensor = torch.tensor(x, requires_grad=True)
    (first,) = torch.autograd.grad(theirs(tensor).sum(), tensor, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), tensor)
    known = torch.isfinite(expected).numpy()         # PyTorch's for mish is NaN for huge arguments
    assert np.isfinite(found).all() and known.mean() > 0.9
    np.testing.assert_allclose(found[known], expected.numpy()[known], rtol=1e-9, atol=1e-9)


def test_prelu() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    x[0, 0, :2] = [0, np.inf]
    slope = np.array([0.1, 0.25, -0.5], np.float32)
    program = derivatives(lambda x, s: gf.prelu(x, gf.reshape(s, (3, 1))), x.shape, "float32", ((3,),))
    found = program(x, slope)
    for result, expected in zip(found, in_torch(F.prelu, x, slope)):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_glu(axis: int) -> None:
    x = np.random.default_rng(3).normal(size=(4, 6, 2)).astype(np.float32)
    found = derivatives(lambda x: gf.glu(x, axis), x.shape, "float32")(x)
    for result, expected in zip(found, in_torch(lambda x: F.glu(x, axis), x)):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    gated = derivatives(lambda x: gf.glu(x, axis, gf.silu), x.shape, "float32")(x)[0]
    a, b = np.split(x, 2, axis)
    np.testing.assert_allclose(gated, a * b / (1 + np.exp(-b)), rtol=1e-5, atol=1e-6)


def test_maxout() -> None:
    x = np.random.default_rng(4).normal(size=(5, 6, 3)).astype(np.float32)
    found = derivatives(lambda x: gf.maxout(x, 2, 1), x.shape, "float32")(x)
    for result, expected in zip(found, in_torch(lambda x: x.reshape(5, 3, 2, 3).amax(2), x)):
        np.testing.assert_array_equal(result, expected)
    with pytest.raises(gf.ShapeError, match="does not divide into groups of 4"):
        gf.maxout(gf.input("x", (5, 6)), 4)


def test_integers_become_floats() -> None:
    x = gf.input("x", (3,), "int32")
    found = gf.function([x], [gf.silu(x), gf.leaky_relu(x)])(np.array([-1, 0, 2], np.int32))
    np.testing.assert_allclose(found[0], [-0.26894142, 0, 1.7615942], rtol=1e-6)
    np.testing.assert_allclose(found[1], [-0.01, 0, 2], rtol=1e-6)


def test_an_unknown_approximation_is_refused() -> None:
    with pytest.raises(gf.UseError, match="no approximation 'erf'"):
        gf.gelu(gf.input("x", (3,)), "erf")
