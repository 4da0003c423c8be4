"""What is computed again rather than stored."""
from __future__ import annotations

import numpy as np
import pytest

import graphflow as gf

pytestmark = pytest.mark.cpu


def stored(f: gf.Program, word: str, argument: str) -> list[int]:
    """For each kernel with this word in its name, how many results like `argument` it writes."""
    return [line.count(f": w {argument}") for line in f.text("memory").splitlines()
            if line.startswith("kernel") and word in line.partition("(")[0]]


@pytest.mark.parametrize("use_bias", [False, True])
def test_batch_norm_keeps_what_the_convolution_gave(use_bias: bool) -> None:
    """Not its difference to the mean as well: of full size, it writes the activations alone."""
    x = gf.input("x", (gf.dim("N"), 3, 16, 16))
    h = gf.nn.conv2d(x, 8, 3, 1, 1, use_bias=use_bias, name="c")
    h = gf.relu(gf.nn.batch_norm(h, name="bn"))
    loss = gf.mean(gf.nn.conv2d(h, 8, 3, 1, 1, name="d") ** 2)
    f = gf.function([x], loss, gf.optim.SGD(0.1).minimize(loss))
    assert stored(f, "rsqrt", "f32[N,8,256]") == [1]
    array = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    losses = [float(f(array)) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", ["output", "product", "elementwise"])
def test_what_others_need_stored_is_stored(case: str) -> None:
    """A difference that is an output, or that a product reads, is no one's to compute again; nor is one of
    what no contraction made."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((6, 200)).astype(np.float32), rng.standard_normal((200, 200))
    w = w.astype(np.float32)
    a, b = gf.input("x", x.shape), gf.input("w", w.shape)
    h = gf.exp(a) if case == "elementwise" else gf.matmul(a, b)
    centred = h - gf.mean(h, 0, keepdims=True)
    scaled = centred * gf.rsqrt(gf.mean(centred * centred, 0, keepdims=True) + 1.0)
    other = gf.matmul(centred, b) if case == "product" else centred + 1.0
    f = gf.function([a, b], [scaled, other, centred] if case == "output" else [scaled, other])
    h64 = np.exp(x.astype(np.float64)) if case == "elementwise" else x.astype(np.float64) @ w
    c = h64 - h64.mean(0)
    expected = [c / np.sqrt((c * c).mean(0) + 1), c @ w if case == "product" else c + 1, c]
    for got, good in zip(f(x, w), expected):
        np.testing.assert_allclose(got, good, rtol=1e-3, atol=1e-3)
