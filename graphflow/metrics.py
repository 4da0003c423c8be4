"""Measures of success: sums over samples, which add up over batches of any size, and what follows from them.

Each function here returns a `Metric`, for ``gf.Model(..., metrics={"accuracy": gf.metrics.accuracy(z, y)})``.
`mask`: a bool or number for each label; those where it is 0 (padding) do not count, others by their weight.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any

import numpy as np

from graphflow.arguments import as_tensor
from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.creation import ones
from graphflow.indexing import matches, one_hot
from graphflow.pointwise import clip, square
from graphflow.products import matmul
from graphflow.reductions import argmax, log_softmax
from graphflow.reductions import max as largest
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.shapes import reshape, stack, transpose
from graphflow.tensor import Tensor, cast, elementwise


class Metric:
    """What is measured over many batches.

    sums: tensors by name, of any shape, that add over batches: counts, sums of errors, a matrix. result: a
    function of their totals (float64 arrays, in this order) that gives a number or an array. `value` is the
    result for one batch alone, as a Tensor, for a program of one's own.
    """

    def __init__(self, sums: Mapping[str, Tensor], result: Callable[..., Any]) -> None:
        self.sums, self.result = dict(sums), result
        for name, t in self.sums.items():
            if not isinstance(t, Tensor):
                raise UseError(f"the sum {name!r} of a metric is {t!r}, not a Tensor", where=here())
            _fixed(f"the sum {name!r} of a metric has one shape for all batches", t.shape)

    @property
    def value(self) -> Tensor:
        """The metric of one batch as a Tensor; UseError if its result is not made of arithmetic alone."""
        try:
            return as_tensor(self.result(*(cast(t, "float32") for t in self.sums.values())))
        except (TypeError, AttributeError, UseError) as error:
            raise UseError("this metric's result is computed by NumPy after the last batch", where=here(),
                           hint="give the Metric to gf.Model(metrics=...), or take its sums") from error


class Totals:
    """The totals of some metrics over batches, and their results.

    measures: a Metric, or a scalar Tensor that is a mean over the batch's samples (a loss) and is weighted by
    their number.
    """

    def __init__(self, measures: Mapping[str, Tensor | Metric]) -> None:
        self.measures = measures
        self.count = 0
        self.totals = {key: np.zeros(_fixed(key, t.shape)) for key, t in outputs_of(measures).items()}

    def add(self, results: Mapping[str, Any], count: int) -> None:
        """Adds the outputs of a program for a batch of `count` samples."""
        for name, measure in self.measures.items():
            if isinstance(measure, Metric):
                for part in measure.sums:
                    self.totals[f"{name}.{part}"] += results[f"{name}.{part}"]
            else:
                self.totals[name] += float(results[name]) * count
        self.count += count

    def value(self, name: str) -> Any:
        """The measure so far: a float, or an array; NaN where nothing was counted."""
        measure = self.measures[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            if isinstance(measure, Metric):
                found = measure.result(*(self.totals[f"{name}.{part}"] for part in measure.sums))
            else:
                found = self.totals[name] / np.float64(self.count)
        return float(found) if np.ndim(found) == 0 else found

    def results(self) -> dict[str, Any]:
        """Every measure so far; nothing before the first batch."""
        return {name: self.value(name) for name in self.measures} if self.count else {}

    def state(self) -> dict[str, Any]:
        """The totals, for `restore`."""
        return {"count": self.count, **{f"total:{k}": v.copy() for k, v in self.totals.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.count = int(state["count"])
        self.totals = {k: np.array(state[f"total:{k}"]) for k in self.totals}


def outputs_of(measures: Mapping[str, Tensor | Metric]) -> dict[str, Tensor]:
    """What a program must compute for these measures, by output name: NAME, or NAME.SUM for a Metric."""
    found: dict[str, Tensor] = {}
    for name, measure in measures.items():
        if isinstance(measure, Metric):
            found.update({f"{name}.{part}": t for part, t in measure.sums.items()})
        else:
            found[name] = measure
    return found


# --- shares of samples

def accuracy(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Metric:
    """The share of samples whose largest score is at the label. scores: [..., classes], labels: integers
    [...]."""
    _check("accuracy", scores, labels)
    return _mean(argmax(scores, -1) == cast(labels, "int64"), mask, "accuracy")


def binary_accuracy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Metric:
    """The share of elements where logit > 0 and target > 0.5 agree; equal shapes."""
    _check_same("binary_accuracy", logits, targets)
    return _mean((logits > 0) == (targets > 0.5), mask, "binary_accuracy")


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int, mask: Tensor | None = None) -> Metric:
    """The share of samples in which fewer than `k` scores are larger than that of the label. Shapes as for
    `accuracy`."""
    _check("top_k_accuracy", scores, labels)
    of_label = largest(elementwise("where", matches(labels, scores.shape[-1]), scores, float("-inf")), -1,
                       True)
    return _mean(total(cast(scores > of_label, "int64"), -1) < k, mask, "top_k_accuracy")


# --- classes

def confusion_matrix(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Metric:
    """How often which class was taken for which: [classes, classes], rows are labels, columns predictions.

    scores: [..., classes], of which the largest is the prediction, and labels: integers [...]; or for two
    classes logits and targets of one shape, class 1 where logit > 0 and target > 0.5.
    """
    return Metric({"matrix": _confusions("confusion_matrix", scores, labels, mask)}, lambda matrix: matrix)


def precision(scores: Tensor, labels: Tensor, mask: Tensor | None = None, average: str | int | None = "macro",
              ) -> Metric:
    """TP / (TP + FP): the share of what was taken for a class that is of it. Shapes as for
    `confusion_matrix`; average as for `f1`."""
    return _of_classes("precision", scores, labels, mask, average,
                       lambda hits, rows, columns: _ratio(hits, columns))


def recall(scores: Tensor, labels: Tensor, mask: Tensor | None = None, average: str | int | None = "macro",
           ) -> Metric:
    """TP / (TP + FN): the share of a class that was found. Shapes as for `confusion_matrix`; average as for
    `f1`."""
    return _of_classes("recall", scores, labels, mask, average,
                       lambda hits, rows, columns: _ratio(hits, rows))


def f1(scores: Tensor, labels: Tensor, mask: Tensor | None = None, average: str | int | None = "macro",
       ) -> Metric:
    """2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall. Shapes as for `confusion_matrix`.

    average: "macro", the mean over the classes; "micro", of the counts of all classes together; a class'
    number, of that alone (1 for the positive of two); None, an array of all. A class that neither occurs nor
    is predicted has 0.
    """
    return _of_classes("f1", scores, labels, mask, average,
                       lambda hits, rows, columns: _ratio(2 * hits, rows + columns))


def auc(logits: Tensor, targets: Tensor, mask: Tensor | None = None, bins: int = 1000) -> Metric:
    """The area under the curve of true over false positives, that is the chance that a positive has a higher
    logit than a negative, ties counting half (Mann and Whitney).

    logits, targets: of one shape, positive where target > 0.5. The logits are counted in `bins` equal steps
    of their sigmoid, so those within one step are ties. NaN without samples of both kinds.
    """
    _check_same("auc", logits, targets)
    if bins < 2:
        raise UseError(f"auc: {bins} bins", op="auc", where=here(), hint="use at least 2")
    step = cast(clip(elementwise("sigmoid", logits) * float(bins), 0, bins - 1), "int64")
    weights = reshape(_weights("auc", targets, mask), (-1,))
    positive = reshape(cast(targets > 0.5, "float32"), (-1,)) * weights
    kinds = stack([positive, weights - positive])
    return Metric({"counts": matmul(kinds, one_hot(reshape(step, (-1,)), bins))}, _area)


def _area(counts: np.ndarray) -> Any:
    positive, negative = counts
    below = np.cumsum(negative) - negative
    return np.sum(positive * (below + negative / 2)) / (positive.sum() * negative.sum())


# --- errors

def perplexity(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Metric:
    """exp of the mean of -log softmax(logits)[label]. logits: [..., classes], labels: integers [...]."""
    summed = _surprise("perplexity", logits, labels, mask)
    return Metric(summed, lambda nats, count: np.exp(nats / count))


def bits_per_character(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Metric:
    """The mean of -log₂ softmax(logits)[label]. logits: [..., classes], labels: integers [...]."""
    summed = _surprise("bits_per_character", logits, labels, mask)
    return Metric(summed, lambda nats, count: nats / count * (1 / log(2)))


def mean_absolute_error(predictions: Tensor, targets: Tensor, mask: Tensor | None = None) -> Metric:
    """The mean over all elements of |prediction - target|; equal shapes."""
    _check_same("mean_absolute_error", predictions, targets)
    return _mean(elementwise("abs", predictions - targets), mask, "mean_absolute_error")


def mean_squared_error(predictions: Tensor, targets: Tensor, mask: Tensor | None = None) -> Metric:
    """The mean over all elements of (prediction - target)²; equal shapes."""
    _check_same("mean_squared_error", predictions, targets)
    return _mean(square(predictions - targets), mask, "mean_squared_error")


def r_squared(predictions: Tensor, targets: Tensor, mask: Tensor | None = None) -> Metric:
    """1 - Σ(target - prediction)² / Σ(target - mean)² over all elements; equal shapes. The sum of squares
    about the mean is taken from sums, in float64."""
    _check_same("r_squared", predictions, targets)
    weights, wide = cast(_weights("r_squared", targets, mask), "float64"), cast(targets, "float64")
    sums = {"residual": total(square(wide - cast(predictions, "float64")) * weights),
            "squares": total(square(wide) * weights), "sum": total(wide * weights), "count": total(weights)}
    return Metric(sums, lambda residual, squares, summed, count:
                  1 - residual / (squares - summed * summed / count))


# --- what they share

def _mean(values: Tensor, mask: Tensor | None, op: str) -> Metric:
    weights = _weights(op, values, mask)
    numbers = values if values.dtype.is_float else cast(values, "float32")
    return Metric({"sum": total(numbers * weights), "count": total(weights)},
                  lambda summed, count: summed / count)


def _surprise(op: str, logits: Tensor, labels: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    _check(op, logits, labels)
    chosen = elementwise("where", matches(labels, logits.shape[-1]), log_softmax(logits), 0.0)
    weights = _weights(op, labels, mask)
    return {"nats": -total(total(chosen, -1) * weights), "count": total(weights)}


def _weights(op: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as float32, ones without one."""
    if mask is None:
        return cast(ones(like.shape), "float32")
    if mask.shape != like.shape:
        raise ShapeError(f"{op}: the mask must have the shape of the labels", op=op,
                         shapes=[mask.shape, like.shape], where=here())
    return cast(mask, "float32")


def _of_classes(op: str, scores: Tensor, labels: Tensor, mask: Tensor | None, average: str | int | None,
                measure: Callable[[Any, Any, Any], Any]) -> Metric:
    matrix = _confusions(op, scores, labels, mask)
    classes, _ = _fixed(op, matrix.shape)
    if not (average in ("macro", "micro", None) or isinstance(average, int) and 0 <= average < classes):
        raise UseError(f"{op}: average is {average!r}", op=op, where=here(),
                       hint="use 'macro', 'micro', None or the number of a class")

    def result(matrix: np.ndarray) -> Any:
        hits, rows, columns = np.diagonal(matrix), matrix.sum(1), matrix.sum(0)
        if average == "micro":
            return measure(hits.sum(), rows.sum(), columns.sum())
        found = measure(hits, rows, columns)
        return found if average is None else found.mean() if average == "macro" else found[average]

    return Metric({"matrix": matrix}, result)


def _ratio(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) != 0)


def _confusions(op: str, scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """The matrix of counts as one product of one-hot matrices: exact up to 2²⁴ samples a batch."""
    classes = 2
    if scores.shape == labels.shape:
        found, wanted = cast(scores > 0, "int64"), cast(labels > 0.5, "int64")
    else:
        _check(op, scores, labels)
        if not labels.dtype.is_integer:
            raise DTypeError(f"{op}: labels are integers, not {labels.dtype.full_name}", op=op, where=here(),
                             shapes=[scores.shape, labels.shape])
        found, wanted = argmax(scores, -1), labels
        classes, = _fixed(f"{op}: the number of classes is fixed", scores.shape[-1:])
    weights = reshape(_weights(op, labels, mask), (-1, 1))
    rows = one_hot(reshape(wanted, (-1,)), classes) * weights
    return matmul(transpose(rows), one_hot(reshape(found, (-1,)), classes))


def _fixed(what: str, shape: Sequence[DimLike]) -> tuple[int, ...]:
    if any(isinstance(d, Dim) for d in shape):
        raise ShapeError(what, shapes=[shape], where=here(),
                         hint="reduce it over the axes that a call decides")
    return tuple(map(int, shape))


def _check(op: str, scores: Tensor, labels: Tensor) -> None:
    if not scores.shape or labels.shape != scores.shape[:-1]:
        raise ShapeError(f"{op}: the labels must have the shape of the scores without the last axis", op=op,
                         shapes=[scores.shape, labels.shape], where=here())


def _check_same(op: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ShapeError(f"{op} compares tensors of one shape", op=op, shapes=[x.shape, y.shape],
                         where=here())
