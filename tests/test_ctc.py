"""CTC against the sum over all alignments, and against PyTorch."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf

on_devices = pytest.mark.parametrize("device", DEVICES)


def brute_force(logits: np.ndarray, labels: list[int], blank: int) -> float:
    """-log of the sum over all paths that collapse to the labels."""
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        if [c for c, _ in itertools.groupby(path) if c != blank] == labels:
            total += np.exp(sum(logs[t, c] for t, c in enumerate(path)))
    return -np.log(total) if total else np.inf


@on_devices
@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_is_the_sum_over_all_alignments(device: str, blank: int) -> None:
    t, n, classes, most = 5, 6, 3, 3
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((t, n, classes))
    others = [c for c in range(classes) if c != blank]
    a, b = others
    words = [[a, b], [a, a], [b], [], [a, b, a], [a, a, a]]
    lengths = np.array([5, 4, 1, 3, 3, 4])
    labels = np.full((n, most), a)
    for row, word in zip(labels, words):
        row[:len(word)] = word
    feeds = [gf.input("x", (t, n, classes), "float64"), gf.input("y", (n, most), "int64"),
             gf.input("lengths", (n,), "int64"), gf.input("label_lengths", (n,), "int64")]
    losses = gf.loss.ctc(*feeds, blank=blank, reduction="none")
    program = gf.function(feeds, losses, device=device)
    found = program(logits, labels, lengths, np.array([len(w) for w in words]))
    expected = [brute_force(logits[:length, i], word, blank)
                for i, (length, word) in enumerate(zip(lengths, words))]
    assert np.isinf(expected[-1])                              # three equal labels need five steps
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@on_devices
def test_ctc_and_its_gradient_equal_pytorchs(device: str) -> None:
    torch = pytest.importorskip("torch")
    t, n, classes, most = 12, 4, 5, 4
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((t, n, classes))
    labels = rng.integers(1, classes, (n, most))
    lengths, label_lengths = np.array([12, 10, 9, 12]), np.array([4, 2, 3, 0])
    steps = gf.dim("T")
    feeds = [gf.input("x", (steps, n, classes), "float64"), gf.input("y", (n, most), "int64"),
             gf.input("lengths", (n,), "int64"), gf.input("label_lengths", (n,), "int64")]
    loss = gf.loss.ctc(*feeds, reduction="sum")
    found, slope = gf.function(feeds, [loss, gf.grad(loss, feeds[0])], device=device)(
        logits, labels, lengths, label_lengths)
    x = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.ctc_loss(
        torch.log_softmax(x, -1), torch.tensor(labels), torch.tensor(lengths), torch.tensor(label_lengths),
        reduction="sum")
    expected.backward()
    np.testing.assert_allclose(found, expected.item(), rtol=1e-10)
    np.testing.assert_allclose(slope, x.grad.numpy(), atol=1e-10)
