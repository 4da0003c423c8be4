"""Layers, losses, metrics and initial values against NumPy and SciPy."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import signal, special

import graphflow as gf

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def program(device: str, build: Any, *arrays: np.ndarray, **options: Any) -> gf.Program:
    inputs = [gf.input(f"x{i}", a.shape, a.dtype) for i, a in enumerate(arrays)]
    return gf.function(inputs, build(*inputs), device=device, **options)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert np.shape(found) == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_dense(device: str) -> None:
    x = normal(5, 3)
    f = program(device, lambda t: [gf.nn.dense(t, 4, gf.nn.sigmoid, bias_init=0.5),
                                   gf.nn.dense(t, 2, use_bias=False)], x)
    s = f.store
    assert s["dense.W"].shape == (3, 4) and s["dense.b"].tolist() == [0.5] * 4 and "dense_1.b" not in s
    first, second = f(x)
    close(first, special.expit(x @ s["dense.W"] + s["dense.b"]))
    close(second, x @ s["dense_1.W"])


@pytest.mark.parametrize("device", DEVICES)
def test_dense_on_the_last_axis_of_many(device: str) -> None:
    x = normal(2, 6, 3)
    f = program(device, lambda t: gf.nn.dense(t, 4), x)
    close(f(x), x @ f.store["dense.W"])


def correlate(x: np.ndarray, w: np.ndarray, stride: int, dilation: int) -> np.ndarray:
    """SciPy's correlation of each image and channel, the window spread by `dilation`, at every stride-th
    place."""
    spread = np.zeros((*w.shape[:2], *((k - 1) * dilation + 1 for k in w.shape[2:])))
    spread[:, :, ::dilation, ::dilation] = w
    out = [[sum(signal.correlate(image[c].astype(np.float64), kernel[c], "valid") for c in range(len(image)))
            for kernel in spread] for image in x]
    return np.array(out)[:, :, ::stride, ::stride]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding, borders, stride, dilation", [
    ("valid", ((0, 0), (0, 0)), 1, 1), (1, ((1, 1), (1, 1)), 2, 1), ("same", ((1, 1), (0, 1)), 1, 1),
    ("same", ((0, 1), (0, 0)), 2, 1), (((2, 0), (1, 3)), ((2, 0), (1, 3)), 1, 1), (2, ((2, 2), (2, 2)), 1,
                                                                                   2)])
def test_conv2d(device: str, padding: Any, borders: Any, stride: int, dilation: int) -> None:
    x = normal(2, 3, 8, 6)
    f = program(device, lambda t: gf.nn.conv2d(t, 5, (3, 2), stride, padding, dilation=dilation,
                                               bias_init=0.25), x)
    padded = np.pad(x, ((0, 0), (0, 0), *borders))
    close(f(x), correlate(padded, f.store["conv2d.W"], stride, dilation) + 0.25, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_conv2d_in_groups(device: str) -> None:
    x = normal(2, 4, 5, 5)
    f = program(device, lambda t: gf.nn.conv2d(t, 6, 3, groups=2, use_bias=False), x)
    w = f.store["conv2d.W"]
    assert w.shape == (6, 2, 3, 3)
    expected = np.concatenate([correlate(x[:, :2], w[:3], 1, 1), correlate(x[:, 2:], w[3:], 1, 1)], axis=1)
    close(f(x), expected, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_pooling_and_flatten(device: str) -> None:
    x = normal(2, 3, 7, 6)
    most, overlapping, mean, flat = program(device, lambda t: [
        gf.nn.max_pool2d(t, 2), gf.nn.max_pool2d(t, 3, 2, padding=1), gf.nn.avg_pool2d(t, (3, 2), 1),
        gf.nn.flatten(t)], x)(x)
    close(most, x[:, :, :6].reshape(2, 3, 3, 2, 3, 2).max((3, 5)))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf), (3, 3), (2, 3))
    close(overlapping, windows[:, :, ::2, ::2].max((-1, -2)))
    close(mean, np.lib.stride_tricks.sliding_window_view(x, (3, 2), (2, 3)).mean((-1, -2)))
    close(flat, x.reshape(2, -1))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_scales_what_it_keeps(device: str) -> None:
    x = np.ones((100, 100), np.float32)
    training = program(device, lambda t: gf.nn.dropout(t, 0.25), x, training=True)
    values, counts = np.unique(training(x), return_counts=True)
    close(values, [0, np.float32(1 / 0.75)])
    # The count is binomial: 6 standard deviations, and the seed is fixed.
    assert abs(counts[0] - 2500) < 6 * math.sqrt(10_000 * 0.25 * 0.75)
    np.testing.assert_array_equal(training(x), training(x))          # no update: the same step
    np.testing.assert_array_equal(program(device, lambda t: gf.nn.dropout(t, 0.25), x)(x), x)
    np.testing.assert_array_equal(program(device, lambda t: gf.nn.dropout(t, 0), x, training=True)(x), x)


@pytest.mark.parametrize("device", DEVICES)
def test_losses(device: str) -> None:
    z, t, labels = normal(6, 4) * 5, RNG.random((6, 4)).astype(np.float32), RNG.integers(0, 4, 6)
    found = program(device, lambda a, b, y: [
        gf.loss.mean_squared_error(a, b), gf.loss.softmax_cross_entropy(a, y),
        gf.loss.binary_cross_entropy_from_logits(a, b), gf.metrics.accuracy(a, y).value,
        gf.metrics.binary_accuracy(a, b).value, gf.metrics.top_k_accuracy(a, y, 2).value], z, t, labels)(
            z, t, labels)
    wide = z.astype(np.float64)
    p = special.expit(wide)
    ranks = (z > np.take_along_axis(z, labels[:, None], 1)).sum(1)
    expected = [np.square(z - t).mean(), -special.log_softmax(wide, 1)[np.arange(6), labels].mean(),
                -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), (z.argmax(1) == labels).mean(),
                ((z > 0) == (t > 0.5)).mean(), (ranks < 2).mean()]
    for value, wanted in zip(found, expected):
        close(value, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy_of_certain_logits_and_its_gradient(device: str) -> None:
    z, labels = np.array([[1000, 0, -1000], [0, 0, 0]], np.float32), np.array([2, 1])

    def build(a: gf.Tensor, y: gf.Tensor) -> list[gf.Tensor]:
        loss = gf.loss.softmax_cross_entropy(a, y)
        return [loss, gf.grad(loss, a)]
    loss, slope = program(device, build, z, labels)(z, labels)
    close(loss, (2000 + math.log(3)) / 2)
    close(slope, (special.softmax(z.astype(np.float64), 1) - np.eye(3)[labels]) / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_labels_of_any_integer_type(device: str, dtype: str) -> None:
    z, labels = normal(3, 300), np.array([255, 0, 17]).astype(dtype)
    loss = program(device, gf.loss.softmax_cross_entropy, z, labels)(z, labels)
    close(loss, -special.log_softmax(z.astype(np.float64), 1)[np.arange(3), labels.astype(int)].mean())


@pytest.mark.parametrize("name, std, limit", [
    ("glorot_uniform", math.sqrt(2 / 500), math.sqrt(6 / 500)), ("glorot_normal", math.sqrt(2 / 500),
                                                                 math.inf),
    ("he_normal", math.sqrt(2 / 200), math.inf), ("he_uniform", math.sqrt(2 / 200), math.sqrt(6 / 200)),
    ("lecun_normal", math.sqrt(1 / 200), math.inf), ("lecun_uniform", math.sqrt(1 / 200),
                                                     math.sqrt(3 / 200))])
def test_scaled_initial_values(name: str, std: float, limit: float) -> None:
    values = getattr(gf.init, name)(np.random.default_rng(0), (200, 300), np.dtype(np.float32))
    assert values.dtype == np.float32 and values.shape == (200, 300)
    assert abs(values.std() / std - 1) < 0.02 and abs(values.mean()) < 0.01 * std * 3
    assert np.abs(values).max() <= limit


def test_fans_and_plain_initial_values() -> None:
    rng, f32 = np.random.default_rng(0), np.dtype(np.float32)
    assert gf.init.fans((20, 3, 5, 5)) == (75, 500) and gf.init.fans((7,)) == (7, 7)
    assert gf.init.zeros(rng, (2,), f32).tolist() == [0, 0] and gf.init.ones(rng, (2,), f32).tolist() == [1,
                                                                                                          1]
    assert gf.init.constant(3)(rng, (2,), f32).tolist() == [3, 3]
    assert abs(gf.init.normal(2.0, 5.0)(rng, (10_000,), f32).mean() - 5) < 0.1
    drawn = gf.init.uniform(1, 2)(rng, (10_000,), f32)
    assert 1 <= drawn.min() and drawn.max() <= 2 and abs(drawn.mean() - 1.5) < 0.02


def test_initial_values_follow_from_the_seed_and_the_name() -> None:
    def weights(seed: int) -> np.ndarray:
        x = gf.input("x", (1, 3))
        return gf.function(x, gf.nn.dense(x, 3), device="reference", store=gf.Store(seed)).store["dense.W"]
    np.testing.assert_array_equal(weights(1), weights(1))
    assert not np.array_equal(weights(1), weights(2))
