"""Sorting, quantiles, running sums and scatters of the language against NumPy, on every device."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf

Axis = int | None


def run(function: Callable[..., Any], *arrays: np.ndarray, device: str, open_axes: bool = False) -> Any:
    """function(tensors) for these arrays; `open_axes`: with every extent decided by the call."""
    inputs = [gf.input(f"x{i}", (None,) * a.ndim if open_axes else a.shape, a.dtype)
              for i, a in enumerate(arrays)]
    made = function(*inputs)
    outputs = list(made) if isinstance(made, (tuple, list)) else made
    return gf.function(inputs, outputs, device=device)(*arrays)


def special(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Floats with NaN, both zeros, infinities and equal elements."""
    rng = np.random.default_rng(seed)
    out = rng.integers(-4, 5, shape).astype(np.float32)
    for value in (np.nan, -0.0, np.inf, -np.inf):
        out[rng.random(shape) < 0.08] = value
    return out


# --- order

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("open_axes", [False, True])
@pytest.mark.parametrize("shape, axis", [((40,), 0), ((5, 33), -1), ((33, 5), 0), ((3, 17, 2), 1),
                                         ((4, 6), None), ((1, 1), 1)])
def test_order(shape: tuple[int, ...], axis: Axis, open_axes: bool, device: str) -> None:
    integers = np.random.default_rng(1).integers(-3, 4, shape)
    for x in (special(shape), integers, special(shape).astype(np.float64)):
        order, values = run(lambda t: [gf.argsort(t, axis), gf.sort(t, axis)], x, device=device,
                            open_axes=open_axes)
        assert order.dtype == np.int64 and values.dtype == x.dtype
        np.testing.assert_array_equal(order, np.argsort(x, axis=axis, kind="stable"))
        flat, along = (x.ravel(), 0) if axis is None else (x, axis)
        np.testing.assert_array_equal(values, np.take_along_axis(flat, order, along))
        np.testing.assert_array_equal(values, np.sort(x, axis=axis))


@pytest.mark.parametrize("device", DEVICES)
def test_falling_order_keeps_equal_elements_in_order(device: str) -> None:
    x = np.array([1, np.nan, 3, 1, -0.0, 3, 0.0, np.nan, np.inf], np.float32)
    order, values = run(lambda t: [gf.argsort(t, descending=True), gf.sort(t, descending=True)], x,
                        device=device)
    np.testing.assert_array_equal(order, [1, 7, 8, 2, 5, 0, 3, 4, 6])
    np.testing.assert_array_equal(values, x[order])
    assert np.signbit(values[-2]) and not np.signbit(values[-1])        # elements are moved, not computed
    numbers = np.array([3, -2 ** 31, 2 ** 31 - 1, 3, 0], np.int32)
    np.testing.assert_array_equal(run(lambda t: gf.argsort(t, descending=True), numbers, device=device),
                                  [2, 0, 3, 4, 1])
    bools = np.array([True, False, True])
    np.testing.assert_array_equal(run(gf.argsort, bools, device=device), [1, 0, 2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [0, 1])
def test_top_k(axis: int, device: str) -> None:
    x = np.random.default_rng(0).permutation(60).reshape(6, 10).astype(np.float32)
    for k in (0, 1, 4, 6):
        values, positions = run(lambda t, k=k: gf.top_k(t, k, axis), x, device=device)
        np.testing.assert_array_equal(values, -np.sort(-x, axis=axis).take(range(k), axis))
        np.testing.assert_array_equal(np.take_along_axis(x, positions, axis), values)
    with pytest.raises(gf.UseError, match="from 0 to 6, not 7"):
        gf.top_k(gf.constant(x), 7, axis=0)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_go_to_the_elements_that_were_moved(device: str) -> None:
    x = np.random.default_rng(0).permutation(24).reshape(4, 6).astype(np.float64)
    weights = np.arange(24.0).reshape(4, 6)

    def build(t: gf.Tensor) -> list[gf.Tensor]:
        best, _ = gf.top_k(t, 2)
        return [*gf.grad(gf.sum(gf.sort(t) * weights), [t]), *gf.grad(gf.sum(best * best), [t])]

    ordered, best = run(build, x, device=device)
    expected = np.zeros_like(x)
    np.put_along_axis(expected, np.argsort(x, axis=1), weights, 1)
    np.testing.assert_array_equal(ordered, expected)
    np.testing.assert_array_equal(best, np.where(x >= np.sort(x, axis=1)[:, [-2]], 2 * x, 0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_quantiles(axis: Axis, keepdims: bool, device: str) -> None:
    rng = np.random.default_rng(0)
    plain, some = rng.standard_normal((3, 8, 5)), special((3, 8, 5))
    for x in (plain, np.where(np.isinf(some), 0, some), rng.integers(0, 9, (3, 8, 5)).astype(np.float32)):
        for q in (0.5, 0.0, 1.0, [0.1, 0.25, 0.9]):
            found = run(lambda t, q=q: gf.quantile(t, q, axis, keepdims), x, device=device)
            expected = np.quantile(x, q, axis=axis, keepdims=keepdims)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
            assert found.shape == expected.shape
        found = run(lambda t: gf.median(t, axis, keepdims), x, device=device, open_axes=True)
        np.testing.assert_allclose(found, np.median(x, axis=axis, keepdims=keepdims), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_quantiles_of_infinities_and_gradients(device: str) -> None:
    x = np.array([np.inf, np.inf, 1.0, -np.inf, -np.inf])
    found = run(lambda t: gf.quantile(t, [0, 0.25, 0.5, 1]), x, device=device)
    np.testing.assert_array_equal(found, [-np.inf, -np.inf, 1, np.inf])
    np.testing.assert_array_equal(run(lambda t: gf.grad(gf.median(t), [t])[0], np.array([4.0, 1, 3, 9]),
                                      device=device), [0.5, 0, 0.5, 0])


def test_what_quantile_refuses() -> None:
    x = gf.input("x", (3, 0))
    with pytest.raises(gf.UseError, match="shares from 0 to 1"):
        gf.quantile(x, 1.5, 0)
    with pytest.raises(gf.ShapeError, match="no elements"):
        gf.median(x, 1)
    with pytest.raises(gf.ShapeError, match="no axis 2"):
        gf.sort(x, 2)


# --- running sums and the like

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("name, expected", [("cumsum", np.add), ("cumprod", np.multiply),
                                            ("cummax", np.maximum), ("cummin", np.minimum)])
def test_running(name: str, expected: np.ufunc, axis: Axis, device: str) -> None:
    x = np.random.default_rng(0).standard_normal((7, 6, 5))
    x[2, 3, 1] = np.nan
    flat, along = (x.ravel(), 0) if axis is None else (x, axis)
    forward, back = run(lambda t: [getattr(gf, name)(t, axis, reverse=r) for r in (False, True)], x,
                        device=device)
    np.testing.assert_array_equal(forward, expected.accumulate(flat, axis=along))
    turned = expected.accumulate(np.flip(flat, along), axis=along)
    np.testing.assert_array_equal(back, np.flip(turned, along))


@pytest.mark.parametrize("device", DEVICES)
def test_running_sums_of_integers_and_bools(device: str) -> None:
    bytes = np.full((4,), 100, np.uint8)
    np.testing.assert_array_equal(run(gf.cumsum, bytes, device=device), [100, 200, 44, 144])
    counts = run(gf.cumsum, np.array([True, False, True]), device=device)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [1, 1, 2])


@pytest.mark.parametrize("device", DEVICES)
def test_linear_recurrence_is_an_exponential_average(device: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 50))
    decay = np.array([[0.9], [0.5], [0.0]])
    found = run(lambda a, t: gf.linear_recurrence(a, (1 - a) * t), decay, x, device=device)
    expected, last = np.zeros_like(x), np.zeros(3)
    for n in range(50):
        last = decay[:, 0] * last + (1 - decay[:, 0]) * x[:, n]
        expected[:, n] = last
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- writing along indices

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatters(axis: int, device: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, 7))
    size = x.shape[axis]
    at = rng.integers(0, size, (4, 3))
    shape = list(x.shape)
    shape[axis:axis + 1 if axis >= 0 else None] = at.shape
    updates = rng.standard_normal(shape)
    added, put = run(lambda t, i, u: [gf.scatter_add(t, i, u, axis), gf.scatter_set(t, i, u, axis)],
                     x, at, updates, device=device)
    where = (*(slice(None),) * (axis % 3), at)
    expected = x.copy()
    np.add.at(expected, where, updates)
    np.testing.assert_allclose(added, expected, rtol=1e-12)
    expected = x.copy()
    for n in np.ndindex(*at.shape):
        expected[(*where[:-1], at[n])] = updates[(*where[:-1], *n)]
    np.testing.assert_array_equal(put, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_scatters_broadcast_and_check_their_indices(device: str) -> None:
    x, at = np.zeros((4, 2), np.float32), np.array([3, 0, 3])
    found = run(lambda t, i: [gf.scatter_add(t, i, 1.0), gf.scatter_set(t, i, [1.0, 2.0])], x, at,
                device=device)
    np.testing.assert_array_equal(found[0], [[1, 1], [0, 0], [0, 0], [2, 2]])
    np.testing.assert_array_equal(found[1], [[1, 2], [0, 0], [0, 0], [1, 2]])
    for function in (gf.scatter_add, gf.scatter_set):
        for wrong in (4, -1):
            with pytest.raises(gf.FeedError, match=r"the indices must lie in 0\.\.3"):
                run(lambda t, i, f=function: f(t, i, 1.0), x, np.array([0, wrong]), device=device)
        with pytest.raises(gf.UseError, match=r"outside 0\.\.3"):
            function(gf.constant(x), np.array([0, 4]), 1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_scatters(device: str) -> None:
    rng = np.random.default_rng(0)
    x, at, updates = rng.standard_normal((5, 3)), np.array([2, 4, 2]), rng.standard_normal((3, 3))

    def build(t: gf.Tensor, i: gf.Tensor, u: gf.Tensor) -> list[gf.Tensor]:
        added, put = gf.scatter_add(t, i, u), gf.scatter_set(t, i, u)
        return [*gf.grad(gf.sum(added * added), [t, u]), *gf.grad(gf.sum(put * put), [t, u])]

    found = run(build, x, at, updates, device=device)
    whole = x.copy()
    np.add.at(whole, at, updates)
    np.testing.assert_allclose(found[0], 2 * whole)
    np.testing.assert_allclose(found[1], 2 * whole[at])
    kept = np.array([1, 1, 0, 1, 0])[:, None]
    np.testing.assert_allclose(found[2], 2 * x * kept)
    np.testing.assert_allclose(found[3], 2 * updates * np.array([0, 1, 1])[:, None])


@pytest.mark.cpu
def test_an_embedding_learns_only_the_rows_that_it_used() -> None:
    table = gf.parameter((1000, 16), gf.init.normal(0.1), name="table")
    at, target = gf.input("at", (None,), "int64"), gf.input("target", (None, 16))
    error = gf.take(table, at) - target
    loss = gf.sum(error * error)
    step = gf.function([at, target], loss, gf.optim.SGD(0.1).minimize(loss))
    before = np.array(step.store["table"])
    rng = np.random.default_rng(0)
    places, wanted = rng.integers(0, 1000, 70), rng.standard_normal((70, 16)).astype(np.float32)
    step(places, wanted)
    expected = before.copy()
    np.add.at(expected, places, -0.2 * (before[places] - wanted))
    np.testing.assert_allclose(step.store["table"], expected, rtol=1e-5, atol=1e-6)
