"""Every loss against PyTorch: values, and gradients by the predictions (and by float targets)."""
from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from torch_cases import Case, compare, normal

import graphflow as gf

torch = pytest.importorskip("torch")
F = torch.nn.functional
loss = gf.loss
pytestmark = pytest.mark.cpu

both = pytest.mark.parametrize("dtype", ["float64", "float32"])
REDUCTIONS = ("mean", "sum", "none")

PREDICTIONS, TARGETS = normal(6, 4) * 2, normal(6, 4, seed=1) * 2
LABELS = np.array([3, 0, 2, 2, 1, 3])
SHARES = np.exp(TARGETS) / np.exp(TARGETS).sum(1, keepdims=True)
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])
CLASS_WEIGHTS = [0.5, 1.0, 2.0, 4.0]


def each_reduction(name: str, arrays: Any, ours: Any, theirs: Any) -> list[Case]:
    """A case for each reduction of functions that take it."""
    return [Case(f"{name}_{r}", arrays, lambda *xs, r=r: ours(*xs, reduction=r),
                 lambda *xs, r=r: theirs(*xs, reduction=r)) for r in REDUCTIONS]


def reduced(losses: Any, reduction: str) -> Any:
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


@both
def test_errors_of_each_element(dtype: str) -> None:
    pair = [PREDICTIONS, TARGETS]
    compare([
        *each_reduction("squared", pair, loss.squared_error, F.mse_loss),
        *each_reduction("absolute", pair, loss.absolute_error, F.l1_loss),
        *each_reduction("huber", pair, partial(loss.huber, delta=1.5), partial(F.huber_loss, delta=1.5)),
        *each_reduction("smooth", pair, partial(loss.smooth_l1, beta=0.7),
                        partial(F.smooth_l1_loss, beta=0.7)),
        *each_reduction("poisson", [PREDICTIONS, np.abs(TARGETS)], loss.poisson, F.poisson_nll_loss),
        Case("mean_squared", pair, loss.mean_squared_error, F.mse_loss),
        Case("scalars", [PREDICTIONS[0, 0], TARGETS[0, 0]], loss.squared_error, F.mse_loss),
        Case("one", [PREDICTIONS[:1, :1], TARGETS[:1, :1]], loss.huber, F.huber_loss),
        Case("nothing", [PREDICTIONS[:0], TARGETS[:0]],
             lambda x, t: loss.squared_error(x, t, reduction="sum"),
             lambda x, t: F.mse_loss(x, t, reduction="sum")),
    ], dtype)


def class_cases(name: str, ours: Any, theirs: Any, **options: Any) -> list[Case]:
    weights = options.pop("class_weights", None)
    tensors = {} if weights is None else {"weight": torch.tensor(weights, dtype=torch.float64)}
    given = {} if weights is None else {"class_weights": weights}
    ignored = {"ignore_index": options.get("ignore_index", -100)}
    smooth = {k: v for k, v in options.items() if k == "label_smoothing"}
    return each_reduction(
        name, [PREDICTIONS, LABELS],
        lambda x, y, reduction: ours(x, y, reduction=reduction, **options, **given),
        lambda x, y, reduction: theirs(x, y, reduction=reduction, **tensors, **ignored, **smooth))


@both
def test_cross_entropy_with_labels(dtype: str) -> None:
    ours, theirs = loss.softmax_cross_entropy, F.cross_entropy

    def likelihood(x: Any, y: Any, **options: Any) -> Any:
        return loss.negative_log_likelihood(gf.log_softmax(x), y, **options)

    def torch_likelihood(x: Any, y: Any, **options: Any) -> Any:
        return F.nll_loss(F.log_softmax(x, -1), y, **options)
    compare([
        *class_cases("plain", ours, theirs),
        *class_cases("smooth", ours, theirs, label_smoothing=0.2),
        *class_cases("weighted", ours, theirs, class_weights=CLASS_WEIGHTS),
        *class_cases("ignored", ours, theirs, ignore_index=2),
        *class_cases("all", ours, theirs, class_weights=CLASS_WEIGHTS, ignore_index=3, label_smoothing=0.1),
        *class_cases("likelihood", likelihood, torch_likelihood, class_weights=CLASS_WEIGHTS, ignore_index=0),
        Case("many_axes", [normal(2, 3, 5), np.arange(6).reshape(2, 3) % 5], ours,
             lambda x, y: F.cross_entropy(x.transpose(1, 2), y)),
        Case("outside", [PREDICTIONS, np.array([3, -1, 2, -1, 1, 0])],
             lambda x, y: ours(x, y, ignore_index=-1), lambda x, y: theirs(x, y, ignore_index=-1)),
    ], dtype)


@both
def test_cross_entropy_with_probabilities_and_divergence(dtype: str) -> None:
    tensor = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    zeros = np.where(SHARES > 0.3, SHARES, 0)
    compare([
        *each_reduction("plain", [PREDICTIONS, SHARES], loss.softmax_cross_entropy, F.cross_entropy),
        *each_reduction(
            "all", [PREDICTIONS, SHARES],
            partial(loss.softmax_cross_entropy, class_weights=CLASS_WEIGHTS, label_smoothing=0.3),
            partial(F.cross_entropy, weight=tensor, label_smoothing=0.3)),
        *each_reduction(
            "divergence", [PREDICTIONS, SHARES],
            lambda x, p, reduction: loss.kl_divergence(gf.log_softmax(x), p, reduction=reduction),
            lambda x, p, reduction: reduced(F.kl_div(F.log_softmax(x, -1), p, reduction="none").sum(-1),
                                            reduction)),
        Case("divergence_zeros", [PREDICTIONS],
             lambda x: loss.kl_divergence(gf.log_softmax(x), gf.constant(zeros, x.dtype)),
             lambda x: F.kl_div(F.log_softmax(x, -1), torch.tensor(zeros.astype(dtype).astype(np.float64)),
                                reduction="batchmean")),
    ], dtype)


@both
def test_binary_cross_entropy(dtype: str) -> None:
    shares = np.abs(np.sin(TARGETS))
    factor = [0.5, 1.0, 2.0, 4.0]
    compare([
        *each_reduction("logits", [PREDICTIONS, shares], loss.binary_cross_entropy_from_logits,
                        F.binary_cross_entropy_with_logits),
        *each_reduction(
            "positive", [PREDICTIONS, shares],
            partial(loss.binary_cross_entropy_from_logits, pos_weight=factor),
            partial(F.binary_cross_entropy_with_logits,
                    pos_weight=torch.tensor(factor, dtype=torch.float64))),
        *each_reduction("probabilities", [SHARES, shares], loss.binary_cross_entropy, F.binary_cross_entropy),
        Case("certain", [PREDICTIONS * 1000, (PREDICTIONS > 1).astype(float)],
             loss.binary_cross_entropy_from_logits, F.binary_cross_entropy_with_logits),
    ], dtype)


def test_probabilities_0_and_1_count_100() -> None:
    p, t = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    x, y = gf.input("p", (4,), "float64"), gf.input("t", (4,), "float64")
    losses = loss.binary_cross_entropy(x, y, reduction="none")
    found, slopes = gf.function([x, y], [losses, gf.grad(gf.sum(losses), x)])(p, t)
    np.testing.assert_array_equal(found, F.binary_cross_entropy(torch.tensor(p), torch.tensor(t),
                                                                reduction="none").numpy())
    assert np.isfinite(slopes).all()


@both
def test_margins(dtype: str) -> None:
    signs = np.sign(TARGETS)
    compare([
        *each_reduction("binary", [PREDICTIONS, signs], partial(loss.hinge, margin=0.5),
                        lambda x, t, reduction: reduced((0.5 - t * x).clamp(min=0), reduction)),
        *each_reduction("squared", [PREDICTIONS, signs], partial(loss.hinge, power=2),
                        lambda x, t, reduction: reduced((1 - t * x).clamp(min=0).square(), reduction)),
        *each_reduction("classes", [PREDICTIONS, LABELS], loss.multiclass_hinge, F.multi_margin_loss),
        *each_reduction("classes_squared", [PREDICTIONS, LABELS],
                        partial(loss.multiclass_hinge, margin=0.5, power=2),
                        partial(F.multi_margin_loss, margin=0.5, p=2)),
    ], dtype)


@both
def test_distances(dtype: str) -> None:
    third, same = normal(6, 4, seed=2), LABELS > 1

    def contrasted(x: Any, y: Any, reduction: str) -> Any:
        distance = F.pairwise_distance(x, y)
        losses = torch.where(torch.tensor(same), distance ** 2, (2 - distance).clamp(min=0) ** 2) / 2
        return reduced(losses, reduction)
    compare([
        *each_reduction("cosine", [PREDICTIONS, TARGETS], loss.cosine_distance,
                        lambda x, y, reduction: reduced(1 - F.cosine_similarity(x, y, -1), reduction)),
        *each_reduction("triplet", [PREDICTIONS, TARGETS, third], partial(loss.triplet, margin=2.0),
                        partial(F.triplet_margin_loss, margin=2.0)),
        *each_reduction("contrastive", [PREDICTIONS * 0.4, TARGETS * 0.4],
                        lambda x, y, reduction: loss.contrastive(x, y, gf.constant(same), 2.0,
                                                                 reduction=reduction), contrasted),
        Case("equal", [PREDICTIONS], lambda x: loss.triplet(x, x * 1.0, gf.constant(third, x.dtype), 5.0),
             lambda x: F.triplet_margin_loss(x, x * 1.0, torch.tensor(third.astype(dtype).astype(float)),
                                             5.0)),
    ], dtype)


def weighted(losses: Any, reduction: str) -> Any:
    weights = torch.tensor(WEIGHTS).reshape(-1, *(1,) * (losses.ndim - 1)).expand(losses.shape)
    total = losses * weights
    return {"mean": lambda: total.sum() / weights.sum(), "sum": total.sum, "none": lambda: total}[reduction]()


@both
def test_weights_of_samples(dtype: str) -> None:
    counted = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)[torch.tensor(LABELS)] * (
        torch.tensor(LABELS) != 0)

    def of_labels(x: Any, y: Any, reduction: str) -> Any:
        losses = F.cross_entropy(x, y, counted.new_tensor(CLASS_WEIGHTS), ignore_index=0, reduction="none")
        total = losses * torch.tensor(WEIGHTS)
        return total.sum() / (counted * torch.tensor(WEIGHTS)).sum() if reduction == "mean" else reduced(
            total, reduction)
    compare([
        *each_reduction("rows", [PREDICTIONS, TARGETS], partial(loss.squared_error, weights=WEIGHTS),
                        lambda x, t, reduction: weighted((x - t).square(), reduction)),
        *each_reduction("labels", [PREDICTIONS, LABELS],
                        partial(loss.softmax_cross_entropy, weights=WEIGHTS),
                        lambda x, y, reduction: weighted(F.cross_entropy(x, y, reduction="none"), reduction)),
        *each_reduction("classes", [PREDICTIONS, LABELS],
                        partial(loss.softmax_cross_entropy, weights=WEIGHTS, class_weights=CLASS_WEIGHTS,
                                ignore_index=0), of_labels),
        Case("elements", [PREDICTIONS, TARGETS, np.abs(TARGETS)],
             lambda x, t, w: loss.absolute_error(x, t, weights=w),
             lambda x, t, w: ((x - t).abs() * w).sum() / w.sum()),
    ], dtype)
