"""Measures of success that are no losses: scalars, means over the batch."""
from __future__ import annotations

from graphflow.compiler.plan.errors import ShapeError
from graphflow.reductions import argmax, mean
from graphflow.reductions import max as largest
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.tensor import Tensor, cast, elementwise


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """The share of rows whose largest score is at the label. scores: [..., classes], labels: integers
    [...]."""
    _check("accuracy", scores, labels)
    return mean(argmax(scores, -1) == cast(labels, "int64"))


def binary_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of elements where logit > 0 and target > 0.5 agree; equal shapes."""
    if logits.shape != targets.shape:
        raise ShapeError("binary_accuracy compares tensors of one shape", op="binary_accuracy",
                         shapes=[logits.shape, targets.shape], where=here())
    return mean((logits > 0) == (targets > 0.5))


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """The share of rows in which fewer than `k` scores are larger than that of the label."""
    from graphflow.indexing import matches
    _check("top_k_accuracy", scores, labels)
    of_label = largest(elementwise("where", matches(labels, scores.shape[-1]), scores, float("-inf")), -1,
                       True)
    return mean(total(scores > of_label, -1) < k)


def _check(op: str, scores: Tensor, labels: Tensor) -> None:
    if not scores.shape or labels.shape != scores.shape[:-1]:
        raise ShapeError(f"{op}: the labels must have the shape of the scores without the last axis", op=op,
                         shapes=[scores.shape, labels.shape], where=here())
