"""Attention and positional encodings against PyTorch and NumPy."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graphflow as gf

pytestmark = pytest.mark.cpu
RNG = np.random.default_rng(0)
F64, F32 = "float64", "float32"
PRECISION = {F64: 1e-10, F32: 1e-5}


def close(found: np.ndarray, expected: Any, dtype: str) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == dtype
    assert np.abs(found - expected).max() <= PRECISION[dtype] * max(1.0, np.abs(expected).max())


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_equal_pytorchs(dtype: str, causal: bool, masked: bool) -> None:
    torch = pytest.importorskip("torch")
    n, t, s = gf.dim("N"), 5, 5 if causal else 7
    shapes = {"q": (n, 3, t, 4), "k": (n, 3, s, 4), "v": (n, 3, s, 6)}
    feeds = [gf.input(name, shape, dtype) for name, shape in shapes.items()]
    mask = gf.input("mask", (t, s), "bool")
    out = gf.nn.attention(*feeds, mask=mask if masked else None, causal=causal)
    weights = RNG.standard_normal((2, 3, t, 6))
    w = gf.input("w", (n, 3, t, 6), dtype)
    grads = gf.grad((out * w).sum(), feeds)
    arrays = [RNG.standard_normal((2, *shape[1:])).astype(dtype) for shape in shapes.values()]
    allowed = RNG.random((t, s)) < 0.7
    allowed[:, 0] = True
    found = gf.function([*feeds, mask, w], [out, *grads])(*arrays, allowed, weights.astype(dtype))
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    both = allowed if masked else np.ones((t, s), bool)
    both = both & np.tri(t, s, dtype=bool) if causal else both
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=torch.tensor(both))
    (expected * torch.tensor(weights.astype(dtype))).sum().backward()
    for f, e in zip(found, [expected.detach(), *(x.grad for x in tensors)]):
        close(f, e, dtype)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_multi_head_attention_equals_pytorchs(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    n, size, heads = gf.dim("N"), 12, 3
    x, memory = gf.input("x", (n, 5, size), dtype), gf.input("memory", (n, 4, size), dtype)
    own = gf.nn.multi_head_attention(x, heads=heads, causal=True, name="own")
    out = gf.nn.multi_head_attention(own, memory, heads=heads, name="cross")
    loss = (out * out).sum()
    names = ["own.query.W", "own.key.b", "own.value.W", "own.out.W", "cross.key.W", "cross.query.b"]
    parameters = {p.name: p for p in gf.optim.trainable(loss)}
    arrays = [RNG.standard_normal((2, length, size)).astype(dtype) for length in (5, 4)]
    slopes = gf.grad(loss, [x, *(parameters[k] for k in names)])
    program = gf.function([x, memory], [out, *slopes])
    for key in program.store:                                  # biases that are 0 would hide mistakes
        if key.endswith(".b"):
            program.store[key] = RNG.standard_normal(size)
    found = program(*arrays)
    layers = {}
    for name in ("own", "cross"):
        layer = torch.nn.MultiheadAttention(size, heads, batch_first=True).to(getattr(torch, dtype))
        layers[name] = layer
        parts = ("query", "key", "value", "out")
        weights, biases = ([program.store[f"{name}.{part}.{kind}"].T for part in parts]
                           for kind in "Wb")
        with torch.no_grad():
            layer.in_proj_weight.copy_(torch.tensor(np.concatenate(weights[:3])))
            layer.in_proj_bias.copy_(torch.tensor(np.concatenate(biases[:3])))
            layer.out_proj.weight.copy_(torch.tensor(weights[3]))
            layer.out_proj.bias.copy_(torch.tensor(biases[3]))
    tx, tm = (torch.tensor(a, requires_grad=True) for a in arrays)
    later = torch.tensor(np.triu(np.ones((5, 5), bool), 1))
    h, _ = layers["own"](tx, tx, tx, attn_mask=later, need_weights=False)
    expected, _ = layers["cross"](h, tm, tm, need_weights=False)
    (expected * expected).sum().backward()
    own_w, own_b = layers["own"].in_proj_weight.grad, layers["own"].in_proj_bias.grad
    cross_w, cross_b = layers["cross"].in_proj_weight.grad, layers["cross"].in_proj_bias.grad
    grads = [own_w[:size].T, own_b[size:2 * size], own_w[2 * size:].T, layers["own"].out_proj.weight.grad.T,
             cross_w[size:2 * size].T, cross_b[:size]]
    for f, e in zip(found, [expected.detach(), tx.grad, *grads]):
        close(f, e, dtype)


def test_a_query_that_sees_nothing_gets_zeros_and_no_nan() -> None:
    x, mask = gf.input("x", (2, 3, 4)), gf.input("mask", (3, 3), "bool")
    out = gf.nn.attention(x, x, x, mask=mask)
    found, slope = gf.function([x, mask], [out, gf.grad((out * out).sum(), x)])(
        RNG.standard_normal((2, 3, 4)).astype(F32), np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1]], bool))
    assert (found[:, 1] == 0).all() and np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_additive_attention() -> None:
    n = gf.dim("N")
    q, k, v = gf.input("q", (n, 3), F64), gf.input("k", (n, 5, 4), F64), gf.input("v", (n, 5, 2), F64)
    mask = gf.input("mask", (n, 5), "bool")
    program = gf.function([q, k, v, mask], list(gf.nn.additive_attention(q, k, v, 6, mask=mask, name="a")))
    arrays = [RNG.standard_normal((3, *shape)) for shape in ((3,), (5, 4), (5, 2))]
    allowed = RNG.random((3, 5)) < 0.6
    allowed[:, 2] = True
    mean, weights = program(*arrays, allowed)
    wq, wk, u = (program.store[f"a.{part}"] for part in ("Wq", "Wk", "v"))
    scores = (np.tanh((arrays[0] @ wq)[:, None] + arrays[1] @ wk) @ u)[..., 0]
    shares = softmax(np.where(allowed, scores, -np.inf))
    close(weights, shares, F64)
    close(mean, (shares[..., None] * arrays[2]).sum(1), F64)


def test_positional_encodings() -> None:
    t = gf.dim("T")
    x = gf.input("x", (t, 7), F64)
    y = gf.input("y", (2, t, 6), F64)
    wave, turned = gf.function([x, y], [gf.nn.sinusoidal_encoding(t, 7, F64), gf.nn.rotary_encoding(y)])(
        np.zeros((9, 7)), rows := RNG.standard_normal((2, 9, 6)))
    place, column = np.arange(9)[:, None], np.arange(7)
    angle = place / 10000 ** (2 * (column // 2) / 7)
    close(wave, np.where(column % 2, np.cos(angle), np.sin(angle)), F64)
    z = (rows[..., 0::2] + 1j * rows[..., 1::2]) * np.exp(1j * place / 10000 ** (np.arange(0, 6, 2) / 6))
    close(turned, np.stack([z.real, z.imag], -1).reshape(rows.shape), F64)
    learned = gf.nn.learned_encoding(9, 7, name="places")
    assert learned.shape == (9, 7) and learned.name == "places.W"


@pytest.mark.parametrize("build, message", [
    (lambda x: gf.nn.attention(x, x, x[:, :2]), "queries \\[..., T, D\\]"),
    (lambda x: gf.nn.attention(x, x, x, mask=x[0] @ x[0].T), "the mask holds bools, not float32"),
    (lambda x: gf.nn.multi_head_attention(x, heads=3), "does not divide into 3 heads"),
    (lambda x: gf.nn.rotary_encoding(x[..., :3]), "even number of features"),
    (lambda x: gf.nn.learned_encoding(gf.dim("T"), 3), "needs a fixed length"),
    (lambda x: gf.nn.additive_attention(x, x, x, 4), "takes a query \\[N, Q\\]"),
])
def test_errors(build: Any, message: str) -> None:
    with pytest.raises(gf.UserError, match=message):
        build(gf.input("x", (2, 5, 4)))
