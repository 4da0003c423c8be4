"""Whole nets written in the language, trained for some steps on the CPU beside the interpreter."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import graphflow as gf

pytestmark = pytest.mark.cpu
Net = tuple[gf.Program, list[np.ndarray]]


def lstm(device: str) -> Net:
    """Two LSTM layers of 8 units, unrolled over 6 steps; gates in the order i, f, g, o."""
    steps, batch, classes, units = 6, 5, 7, 8
    x, y = gf.input("x", (steps, batch), "int64"), gf.input("y", (steps, batch), "int64")
    layer = [gf.one_hot(x[t], classes) for t in range(steps)]
    for number in range(2):
        start = gf.init.uniform(-0.3, 0.3)
        w = gf.parameter((layer[0].shape[-1], 4 * units), start, f"l{number}.Wx")
        u = gf.parameter((units, 4 * units), start, f"l{number}.Wh")
        b = gf.parameter((4 * units,), 0.0, f"l{number}.b")
        hidden = cell = gf.zeros((batch, units))
        outputs = []
        for step in layer:
            i, f, g, o = gf.split(step @ w + hidden @ u + b, 4, axis=1)
            cell = gf.sigmoid(f) * cell + gf.sigmoid(i) * gf.tanh(g)
            hidden = gf.sigmoid(o) * gf.tanh(cell)
            outputs.append(hidden)
        layer = outputs
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(gf.stack(layer), classes), y)
    step_program = gf.function([x, y], loss, gf.optim.RMSprop(0.01, 0.95).minimize(loss), device=device)
    return step_program, [np.random.default_rng(s).integers(0, classes, (steps, batch)) for s in (1, 2)]


def normalised(x: gf.Tensor) -> gf.Tensor:
    """Batch normalisation of [N, C, H, W] with the statistics of the batch."""
    channels = x.shape[1]
    centred = x - x.mean((0, 2, 3), keepdims=True)
    scale = gf.rsqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    return centred * scale * gf.parameter((channels, 1, 1), 1.0) + gf.parameter((channels, 1, 1), 0.0)


def residual(device: str) -> Net:
    """A convolution and a residual block with a projection."""
    n = gf.dim("N")
    x, y = gf.input("x", (n, 3, 8, 8)), gf.input("y", (n,), "int64")
    h = gf.relu(normalised(gf.nn.conv2d(x, 8, 3, padding=1, use_bias=False)))
    shortcut = gf.nn.conv2d(h, 16, 1, 2, use_bias=False)
    h = gf.relu(normalised(gf.nn.conv2d(h, 16, 3, 2, 1, use_bias=False)))
    h = gf.relu(normalised(gf.nn.conv2d(h, 16, 3, 1, 1, use_bias=False)) + shortcut)
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(h.mean((2, 3)), 10), y)
    step = gf.function([x, y], loss, gf.optim.SGD(0.05, 0.9).minimize(loss), device=device)
    rng = np.random.default_rng(3)
    return step, [rng.standard_normal((6, 3, 8, 8)).astype(np.float32), rng.integers(0, 10, 6)]


def autoencoder(device: str) -> Net:
    """Sigmoid units around a linear code, trained with Nesterov's momentum, and dropout on the inputs."""
    x = gf.input("x", (None, 30))
    h = gf.nn.dense(gf.nn.dense(gf.nn.dropout(x, 0.2), 16, gf.nn.sigmoid), 4)
    h = gf.nn.dense(gf.nn.dense(h, 16, gf.nn.sigmoid), 30)
    loss = gf.loss.mean_squared_error(h, x)
    optimizer = gf.optim.SGD(0.05, 0.9, nesterov=True)
    step = gf.function(x, loss, optimizer.minimize(loss), device=device)
    return step, [np.random.default_rng(4).random((9, 30)).astype(np.float32)]


def products(device: str) -> Net:
    """Matrix products whose operands are no plain arrays: constants, joined and sliced ones, of one tile of
    rows."""
    w = gf.parameter((4, 4), gf.init.normal(1.0))
    x = gf.input("x", (5, 4))
    h = gf.concatenate([gf.ones((5, 4)) @ w + x, gf.tanh(x @ w)[:, ::-1]])
    loss = gf.mean(gf.square(gf.stack([h @ w.T, h]) @ w[:, :3]))
    step = gf.function(x, loss, gf.optim.Adam(0.01).minimize(loss), device=device)
    return step, [np.random.default_rng(5).standard_normal((5, 4)).astype(np.float32)]


@pytest.mark.parametrize("net", [lstm, residual, autoencoder, products])
def test_training_is_the_same_as_interpreted(net: Callable[[str], Net]) -> None:
    expected, feeds = net("reference")
    found, _ = net("cpu")
    first = None
    for _ in range(5):
        losses = float(expected(*feeds)), float(found(*feeds))
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
        first = losses[0] if first is None else first
    assert losses[0] < first, "nothing was learnt: the comparison would be of little worth"
    for name in expected.store:
        np.testing.assert_allclose(found.store[name], expected.store[name], rtol=2e-4, atol=2e-5,
                                   err_msg=name)


@pytest.mark.parametrize("net", [lstm, residual, autoencoder, products])
def test_the_bits_are_the_same_on_one_and_two_threads(net: Callable[[str], Net]) -> None:
    states = []
    for threads in (1, 2):
        program, feeds = net("cpu")
        program.threads = threads
        for _ in range(3):
            program(*feeds)
        states.append({name: program.store[name].tobytes() for name in program.store})
    assert states[0] == states[1]
