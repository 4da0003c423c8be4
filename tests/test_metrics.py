"""Metrics over batches of unequal size against NumPy and SciPy on all the data at once."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import special, stats

import graphflow as gf
from graphflow.metrics import Metric

RNG = np.random.default_rng(8)
ROWS, CLASSES = 101, 5
SCORES = (RNG.standard_normal((ROWS, CLASSES)) * 2).astype(np.float32)
LABELS = np.where(RNG.random(ROWS) < 0.4, SCORES.argmax(1), RNG.integers(0, CLASSES - 1, ROWS))
LOGITS = RNG.standard_normal(ROWS).astype(np.float32)
TARGETS = (LOGITS + RNG.standard_normal(ROWS) > 0).astype(np.float32)
MASK = RNG.random(ROWS) < 0.7
MASK[90:] = False                                     # the last batches have nothing that counts

Arrays = dict[str, np.ndarray]
Make = Callable[..., Metric]
BY_CLASS: Arrays = {"scores": SCORES, "labels": LABELS}
BY_LOGIT: Arrays = {"logits": LOGITS, "targets": TARGETS}


def measured(make: Make, arrays: Arrays, device: str, batch: int, mask: np.ndarray | None = None) -> Any:
    """The metric by Model.evaluate, in batches of a symbolic size."""
    n = gf.dim("N")
    given = arrays if mask is None else {**arrays, "mask": mask}
    inputs = [gf.input(k, (n, *v.shape[1:]), v.dtype.name) for k, v in given.items()]
    loss = gf.mean(inputs[0])
    model = gf.Model(inputs, inputs[0], loss, metrics={"m": make(*inputs)}, device=device)
    return model.evaluate(given, batch)["m"]


def confusions(found: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (labels, found), 1)
    return matrix


def by_definition(kind: str, found: np.ndarray, labels: np.ndarray, classes: int) -> list[float]:
    """Precision, recall or F1 of each class, from the samples themselves; 0 where there are none."""
    values = []
    for c in range(classes):
        hit = ((found == c) & (labels == c)).sum()
        said, real = (found == c).sum(), (labels == c).sum()
        part, whole = {"precision": (hit, said), "recall": (hit, real), "f1": (2 * hit, said + real)}[kind]
        values.append(part / whole if whole else 0.0)
    return values


def nats(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -special.log_softmax(scores.astype(np.float64), 1)[np.arange(len(labels)), labels]


def top(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    return float(np.mean([label in np.argsort(-row)[:k] for row, label in zip(scores, labels)]))


CASES: dict[str, tuple[Make, Arrays, Callable[..., Any]]] = {
    "accuracy": (gf.metrics.accuracy, BY_CLASS, lambda s, y: (s.argmax(1) == y).mean()),
    "top 2": (lambda s, y, mask=None: gf.metrics.top_k_accuracy(s, y, 2, mask), BY_CLASS,
              lambda s, y: top(s, y, 2)),
    "binary accuracy": (gf.metrics.binary_accuracy, BY_LOGIT, lambda z, t: ((z > 0) == (t > 0.5)).mean()),
    "confusion matrix": (gf.metrics.confusion_matrix, BY_CLASS,
                         lambda s, y: confusions(s.argmax(1), y, CLASSES)),
    "binary confusion matrix": (gf.metrics.confusion_matrix, BY_LOGIT,
                                lambda z, t: confusions((z > 0).astype(int), t.astype(int), 2)),
    "perplexity": (gf.metrics.perplexity, BY_CLASS, lambda s, y: np.exp(nats(s, y).mean())),
    "bits per character": (gf.metrics.bits_per_character, BY_CLASS,
                           lambda s, y: nats(s, y).mean() / np.log(2)),
    "mean absolute error": (gf.metrics.mean_absolute_error, BY_LOGIT, lambda z, t: np.abs(z - t).mean()),
    "mean squared error": (gf.metrics.mean_squared_error, BY_LOGIT, lambda z, t: np.square(z - t).mean()),
    "R²": (gf.metrics.r_squared, BY_LOGIT,
           lambda z, t: 1 - np.square(t - z).sum() / np.square(t - t.mean()).sum()),
}
for _kind in ("precision", "recall", "f1"):
    _make = getattr(gf.metrics, _kind)
    CASES[_kind] = (_make, BY_CLASS, lambda s, y, k=_kind: np.mean(by_definition(k, s.argmax(1), y, CLASSES)))
    CASES[f"{_kind} of each"] = (lambda s, y, mask=None, m=_make: m(s, y, mask, average=None), BY_CLASS,
                                 lambda s, y, k=_kind: by_definition(k, s.argmax(1), y, CLASSES))
    CASES[f"{_kind} of class 1"] = (lambda z, t, mask=None, m=_make: m(z, t, mask, average=1), BY_LOGIT,
                                    lambda z, t, k=_kind: by_definition(k, z > 0, t > 0.5, 2)[1])
    CASES[f"micro {_kind}"] = (lambda s, y, mask=None, m=_make: m(s, y, mask, average="micro"), BY_CLASS,
                               lambda s, y: (s.argmax(1) == y).mean())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_batches_add_up_to_the_whole(name: str, device: str) -> None:
    make, arrays, oracle = CASES[name]
    expected = oracle(*arrays.values())
    for batch in (ROWS, 32) if device == "cpu" else (ROWS, 32, 7):
        np.testing.assert_allclose(measured(make, arrays, device, batch), expected, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_what_is_masked_does_not_count(name: str, kind: str) -> None:
    make, arrays, oracle = CASES[name]
    expected = oracle(*(a[MASK] for a in arrays.values()))
    np.testing.assert_allclose(measured(make, arrays, "reference", 8, MASK.astype(kind)), expected, rtol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_sequences_are_measured_by_their_steps(device: str) -> None:
    steps = {"scores": SCORES[:100].reshape(10, 10, CLASSES), "labels": LABELS[:100].reshape(10, 10)}
    mask, flat = MASK[:100].reshape(10, 10), MASK[:100]
    for make, oracle in ((gf.metrics.accuracy, lambda s, y: (s.argmax(1) == y).mean()),
                         (gf.metrics.confusion_matrix, lambda s, y: confusions(s.argmax(1), y, CLASSES)),
                         (gf.metrics.perplexity, lambda s, y: np.exp(nats(s, y).mean()))):
        expected = oracle(SCORES[:100][flat], LABELS[:100][flat])
        np.testing.assert_allclose(measured(make, steps, device, 3, mask), expected, rtol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bins", [50, 1000])
def test_the_area_under_the_curve_is_the_statistic_of_mann_and_whitney(device: str, bins: int) -> None:
    def oracle(logits: np.ndarray, targets: np.ndarray) -> float:
        step = np.floor(special.expit(logits.astype(np.float64)) * bins)
        positive, negative = step[targets > 0.5], step[targets < 0.5]
        return stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))

    def make(z: gf.Tensor, t: gf.Tensor, mask: gf.Tensor | None = None) -> Metric:
        return gf.metrics.auc(z, t, mask, bins)

    found = measured(make, BY_LOGIT, device, 32)
    assert found == pytest.approx(oracle(LOGITS, TARGETS), rel=1e-6)
    exact = stats.mannwhitneyu(LOGITS[TARGETS > 0.5], LOGITS[TARGETS < 0.5]).statistic
    assert found == pytest.approx(exact / (TARGETS.sum() * (1 - TARGETS).sum()), abs=2 / bins)
    masked = measured(make, BY_LOGIT, device, 32, MASK)
    assert masked == pytest.approx(oracle(LOGITS[MASK], TARGETS[MASK]), rel=1e-6)


def test_large_offsets_leave_r_squared_exact() -> None:
    far = {"z": LOGITS + 1000, "t": TARGETS + 1000}
    z, t = (a.astype(np.float64) for a in far.values())
    expected = 1 - np.square(t - z).sum() / np.square(t - t.mean()).sum()
    assert measured(gf.metrics.r_squared, far, "reference", 32) == pytest.approx(expected, rel=1e-6)


def test_nothing_that_counts_is_no_number() -> None:
    nothing = np.zeros(ROWS, bool)
    assert np.isnan(measured(gf.metrics.accuracy, BY_CLASS, "reference", 32, nothing))
    assert np.isnan(measured(gf.metrics.auc, BY_LOGIT, "reference", 32, nothing))
    assert measured(gf.metrics.f1, BY_CLASS, "reference", 32, nothing) == 0


def test_the_value_of_one_batch_is_a_tensor() -> None:
    n = gf.dim("N")
    s, y = gf.input("s", (n, CLASSES)), gf.input("y", (n,), "int64")
    found = gf.function([s, y], [gf.metrics.accuracy(s, y).value, gf.metrics.bits_per_character(s, y).value],
                        device="reference")(SCORES, LABELS)
    expected = [(SCORES.argmax(1) == LABELS).mean(), nats(SCORES, LABELS).mean() / np.log(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(gf.UseError, match="computed by NumPy after the last batch"):
        _ = gf.metrics.f1(s, y).value


def test_metrics_of_one_matrix_share_it() -> None:
    n = gf.dim("N")
    s, y = gf.input("s", (n, CLASSES)), gf.input("y", (n,), "int64")
    names = ("precision", "recall", "f1")
    model = gf.Model(s, s, gf.loss.softmax_cross_entropy(s, y), targets=y, device="reference",
                     metrics={name: getattr(gf.metrics, name)(s, y) for name in names})
    assert sum(node.op == "matmul" for node in model.evaluation.traced.nodes()) == 1
    found = model.evaluate((SCORES, LABELS), 16)
    for name in names:
        expected = np.mean(by_definition(name, SCORES.argmax(1), LABELS, CLASSES))
        assert found[name] == pytest.approx(expected, rel=1e-6)


def test_ones_own_metric() -> None:
    x = gf.input("x", (gf.dim("N"), 3))
    largest = Metric({"sum": gf.sum(x, 0), "squares": gf.sum(gf.square(x), 0)}, lambda s, q: np.sqrt(q) - s)
    model = gf.Model(x, x, gf.mean(x), metrics={"m": largest}, device="reference")
    data = RNG.random((10, 3)).astype(np.float32)
    np.testing.assert_allclose(model.evaluate(data, 3)["m"], np.sqrt(np.square(data).sum(0)) - data.sum(0),
                               rtol=1e-5)


@pytest.mark.parametrize("act, message", [
    (lambda s, y, z, m: gf.metrics.accuracy(s, y, m), "accuracy: the mask must have the shape of the labels"),
    (lambda s, y, z, m: gf.metrics.perplexity(s, z), "integers"),
    (lambda s, y, z, m: gf.metrics.confusion_matrix(s, z),
     "confusion_matrix: labels are integers, not float32"),
    (lambda s, y, z, m: gf.metrics.f1(s, y, average="mean"), "f1: average is 'mean'"),
    (lambda s, y, z, m: gf.metrics.f1(s, y, average=CLASSES), "f1: average is 5"),
    (lambda s, y, z, m: gf.metrics.confusion_matrix(gf.stack([z, z]), y[:2]),
     "the number of classes is fixed"),
    (lambda s, y, z, m: Metric({"a": z}, max), "the sum 'a' of a metric has one shape for all batches"),
    (lambda s, y, z, m: Metric({"a": 3}, max), "the sum 'a' of a metric is 3"),  # type: ignore[dict-item]
    (lambda s, y, z, m: gf.metrics.auc(s, z), "auc compares tensors of one shape"),
    (lambda s, y, z, m: gf.metrics.auc(z, z, bins=1), "auc: 1 bins"),
    (lambda s, y, z, m: gf.metrics.r_squared(s, z), "r_squared compares tensors of one shape")])
def test_misuse(act: Callable[..., Any], message: str) -> None:
    n = gf.dim("N")
    s, y = gf.input("s", (n, CLASSES)), gf.input("y", (n,), "int64")
    z, m = gf.input("z", (n,)), gf.input("m", (gf.dim("M"),), "bool")
    with pytest.raises(gf.UserError, match=message) as caught:
        act(s, y, z, m)
    assert caught.value.where is not None and caught.value.where.file == __file__
