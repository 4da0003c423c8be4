"""Sums of centred values: gradients of normalisations, against formulas in float64."""
from __future__ import annotations

import numpy as np
import pytest

import graphflow as gf

pytestmark = pytest.mark.cpu


def normalised(x: np.ndarray, axes: tuple[int, ...], g: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """(x normalised, the gradient of sum(g·normalised) for x): the closed form."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    spread = 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
    out = (x - x.mean(axes, keepdims=True)) * spread
    inner = g - g.mean(axes, keepdims=True) - out * (g * out).mean(axes, keepdims=True)
    return out, spread * inner


@pytest.mark.parametrize("shape, axes", [((6, 3, 5, 7), (0, 2, 3)), ((40, 9), (0,)), ((4, 130), (1,)),
                                         ((2, 3, 4, 5), (1, 3))])
@pytest.mark.parametrize("symbolic", [False, True])
def test_gradients_of_normalisations(shape: tuple[int, ...], axes: tuple[int, ...], symbolic: bool) -> None:
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    given = (gf.dim("N"), *shape[1:]) if symbolic else shape
    a, b = gf.input("x", given), gf.input("g", given)
    middle = gf.mean(a, axes, keepdims=True)
    variance = gf.mean((a - middle) * (a - middle), axes, keepdims=True)
    out = (a - middle) * gf.rsqrt(variance + 0.1)
    f = gf.function([a, b], [out, gf.grad(gf.sum(out * b), a)])
    got, expected = f(x + 3, g), normalised(x + 3, axes, g, 0.1)
    for mine, theirs in zip(got, expected):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


def test_batch_norm_trains_with_one_sum_less() -> None:
    """The gradient's sum of g, which the bias needs as well, serves its input too."""
    x, t = gf.input("x", (gf.dim("N"), 4, 8, 8)), gf.input("t", (gf.dim("N"), 4, 8, 8))
    h = gf.nn.conv2d(x, 4, 3, 1, 1, use_bias=False)
    loss = gf.sum(gf.nn.batch_norm(h, name="bn") * t)
    f = gf.function([x, t], loss, gf.optim.SGD(0.1).minimize(loss))
    assert f.text("joint").count("= reduce_sum(") == f.text("autodiff").count("= reduce_sum(") - 1


@pytest.mark.parametrize("case", ["other axes", "other number", "nothing left", "another mean"])
def test_sums_that_stay(case: str) -> None:
    """What is not quite a mean is not taken for one; a sum of nothing else keeps what is not a number."""
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal((6, 8)).astype(np.float32) for _ in range(2))
    a, b = gf.input("x", x.shape), gf.input("y", y.shape)
    axis = 1 if case == "other axes" else 0
    total = gf.sum(b if case == "another mean" else a, axis, keepdims=True)
    centred = a - total / (7.0 if case == "other number" else float(x.shape[axis]))
    out = gf.sum(centred if case == "nothing left" else b + centred * 2.0, 0)
    mean = np.sum(y if case == "another mean" else x, axis, keepdims=True, dtype=np.float64)
    expected = x - mean / (7 if case == "other number" else x.shape[axis])
    if case == "nothing left":
        x[0, 0] = np.nan
        assert np.isnan(gf.function([a, b], out)(x, y)[0])
        return
    got = gf.function([a, b], out)(x, y)
    np.testing.assert_allclose(got, (y + expected * 2).sum(0), rtol=1e-4, atol=1e-4)
