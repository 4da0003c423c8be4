"""Losses to minimise.

All take the same two arguments last. `reduction`: "mean" (a scalar, the default), "sum" (a scalar) or "none"
(a loss for each sample). `weights`: how much each sample counts, of the losses' shape or of its first axes;
with them, "mean" is the weighted mean Σ w loss / Σ w. Predictions come first, targets second.
"""
from __future__ import annotations

from typing import Any

from graphflow.arguments import as_tensor
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import I64
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.creation import extent
from graphflow.ctc import log_likelihood
from graphflow.indexing import check_range, feed_name, matches
from graphflow.reductions import all as every
from graphflow.reductions import log_softmax, mean, sum
from graphflow.scope import here
from graphflow.shapes import broadcast_to, expand_dims
from graphflow.tensor import Tensor, broadcast_shapes, cast, elementwise, with_check


def squared_error(predictions: Tensor, targets: Tensor, *, weights: Any = None, reduction: str = "mean"
                  ) -> Tensor:
    """(prediction - target)² of each element; the shapes must be equal."""
    _check_same("squared_error", predictions, targets)
    difference = predictions - targets
    return _reduced("squared_error", difference * difference, reduction, weights)


def mean_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean over all elements of (predictions - targets)²; the shapes must be equal."""
    _check_same("mean_squared_error", predictions, targets)
    return squared_error(predictions, targets)


def absolute_error(predictions: Tensor, targets: Tensor, *, weights: Any = None, reduction: str = "mean"
                   ) -> Tensor:
    """|prediction - target| of each element; the shapes must be equal."""
    _check_same("absolute_error", predictions, targets)
    return _reduced("absolute_error", abs(predictions - targets), reduction, weights)


def huber(predictions: Tensor, targets: Tensor, delta: float = 1.0, *, weights: Any = None,
          reduction: str = "mean") -> Tensor:
    """d² / 2 where the distance d is at most `delta`, else delta (d - delta / 2): squared near 0, linear
    far away. Huber, Annals of Mathematical Statistics 35, 1964."""
    _check_same("huber", predictions, targets)
    _check_positive("huber", "delta", delta)
    return _reduced("huber", _huber(abs(predictions - targets), delta), reduction, weights)


def smooth_l1(predictions: Tensor, targets: Tensor, beta: float = 1.0, *, weights: Any = None,
              reduction: str = "mean") -> Tensor:
    """The Huber loss divided by its `beta`, so that far away it is the distance less beta / 2."""
    _check_same("smooth_l1", predictions, targets)
    _check_positive("smooth_l1", "beta", beta)
    return _reduced("smooth_l1", _huber(abs(predictions - targets), beta) / beta, reduction, weights)


def _huber(distance: Tensor, delta: float) -> Tensor:
    near = elementwise("minimum", distance, delta)
    return near * (distance - near * 0.5)


def poisson(log_rates: Tensor, counts: Tensor, *, weights: Any = None, reduction: str = "mean") -> Tensor:
    """exp(z) - count · z for each element, where z is the logarithm of the rate: the negative log-likelihood
    of counts, but for a term that no parameter changes."""
    _check_same("poisson", log_rates, counts)
    return _reduced("poisson", elementwise("exp", log_rates) - counts * log_rates, reduction, weights)


# --- classes

def softmax_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0,
                          class_weights: Any = None, ignore_index: int | None = None, weights: Any = None,
                          reduction: str = "mean") -> Tensor:
    """-log softmax(logits)[label] of each sample, or -Σ p log softmax(logits) for probabilities p.

    logits: [..., classes]; labels: integers [...] in 0..classes-1, which every call checks, or floats
    [..., classes]. label_smoothing: the share of the label that is spread evenly over all classes.
    class_weights: [classes], how much each label counts. ignore_index: a label whose samples do not count.
    The "mean" is over what counts: Σ loss / Σ weight of the label, as in PyTorch.
    """
    op = "softmax_cross_entropy"
    if not 0 <= label_smoothing <= 1:
        raise UseError(f"label_smoothing is {label_smoothing!r}", op=op, where=here(),
                       hint="use a share from 0 to 1")
    if not logits.shape:
        raise ShapeError(f"{op} needs logits [..., classes]", op=op, shapes=[logits.shape, labels.shape],
                         where=here())
    if labels.dtype.has_gradient and labels.shape == logits.shape:
        if ignore_index is not None:
            raise UseError("ignore_index is for integer labels", op=op,
                           shapes=[logits.shape, labels.shape], where=here(),
                           hint="give such samples the weight 0")
        return _reduced(op, _soft_labels(op, logits, labels, label_smoothing, class_weights), reduction,
                        weights)
    labels, kept = _checked_labels(op, logits, labels, ignore_index)
    return _reduced(op, *_of_labels(op, log_softmax(logits), labels, kept, label_smoothing, class_weights,
                                    reduction, weights))


def negative_log_likelihood(log_probabilities: Tensor, labels: Tensor, *, class_weights: Any = None,
                            ignore_index: int | None = None, weights: Any = None, reduction: str = "mean"
                            ) -> Tensor:
    """-log_probabilities[label] of each sample: `softmax_cross_entropy` of what is the logarithm of a softmax
    already. log_probabilities: [..., classes]; labels: integers [...]."""
    op = "negative_log_likelihood"
    labels, kept = _checked_labels(op, log_probabilities, labels, ignore_index)
    return _reduced(op, *_of_labels(op, log_probabilities, labels, kept, 0.0, class_weights, reduction,
                                    weights))


def _soft_labels(op: str, logits: Tensor, labels: Tensor, smoothing: float, class_weights: Any) -> Tensor:
    classes = logits.shape[-1]
    if smoothing:
        labels = labels * (1 - smoothing) + smoothing / extent(classes, labels.dtype)
    if class_weights is not None:
        labels = labels * _class_weights(op, class_weights, logits)
    return -sum(labels * log_softmax(logits), -1)


def _of_labels(op: str, logs: Tensor, labels: Tensor, kept: Tensor | None, smoothing: float,
               class_weights: Any, reduction: str, weights: Any) -> tuple[Tensor, str, Any, Tensor | None]:
    """The arguments of `_reduced` for integer labels; `logs`: the logarithms of the classes'
    probabilities."""
    hit = matches(labels, logs.shape[-1])
    by_class = None if class_weights is None else _class_weights(op, class_weights, logs)
    weighted = logs if by_class is None else logs * by_class
    losses = -sum(elementwise("where", hit, weighted, 0.0), -1)
    if smoothing:
        losses = losses * (1 - smoothing) - mean(weighted, -1) * smoothing
    if by_class is None and kept is None:
        return losses, reduction, weights, None
    counted = as_tensor(1.0) if by_class is None else sum(elementwise("where", hit, by_class, 0.0), -1)
    counted = broadcast_to(cast(counted, logs.dtype), losses.shape)
    if kept is not None:
        losses, counted = (elementwise("where", kept, t, 0.0) for t in (losses, counted))
    return losses, reduction, weights, counted


def _checked_labels(op: str, scores: Tensor, labels: Tensor, ignore_index: int | None = None
                    ) -> tuple[Tensor, Tensor | None]:
    """The labels with a check that all are classes, and which of them count (None: all)."""
    if not scores.shape:
        raise ShapeError(f"{op} needs scores [..., classes]", op=op, shapes=[scores.shape, labels.shape],
                         where=here())
    if not labels.dtype.is_integer:
        raise DTypeError(f"labels are integers, not {labels.dtype.full_name}", op=op,
                         shapes=[scores.shape, labels.shape], where=here(),
                         hint="declare the input with dtype 'int64'; for one-hot targets take their argmax")
    if labels.shape != scores.shape[:-1]:
        same_rank = len(labels.shape) == len(scores.shape) - 1
        raise ShapeError(f"{op}: the labels must have the shape of the logits without the last axis", op=op,
                         shapes=[scores.shape, labels.shape], where=here(),
                         hint="declare both inputs with one gf.dim for the batch" if same_rank else None)
    classes: DimLike = scores.shape[-1]
    wide = cast(labels, I64)
    fine = (wide >= 0) & (wide < extent(classes, I64))
    message = f"the labels must lie in 0..{classes - 1}"
    if ignore_index is None:
        return with_check(labels, every(fine), message, feed_name(labels)), None
    kept = wide != ignore_index
    labels = with_check(labels, every(fine | ~kept), f"{message} or be {ignore_index}", feed_name(labels))
    return labels, kept


def _class_weights(op: str, class_weights: Any, scores: Tensor) -> Tensor:
    """The weights of the classes, stretched to the scores' shape."""
    given = cast(as_tensor(class_weights), scores.dtype)
    if given.shape != scores.shape[-1:]:
        raise ShapeError(f"{op} needs one weight for each class", op=op,
                         shapes=[scores.shape, given.shape], where=here())
    return broadcast_to(given, scores.shape)


def ctc(logits: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, *, blank: int = 0,
        weights: Any = None, reduction: str = "mean") -> Tensor:
    """-log of the probability of each label sequence, summed over all its alignments with the steps
    (connectionist temporal classification: Graves, Fernández, Gomez and Schmidhuber, ICML 2006).

    logits: [T, N, classes], before the softmax; labels: integers [N, L], of which the first
    ``label_lengths[n]`` count; lengths: integers [N], how many of the T steps count. `blank`: the class that
    stands for no label. The loss is infinite where too few steps are left for the labels.
    """
    shapes = [logits.shape, labels.shape, lengths.shape, label_lengths.shape]
    if logits.ndim != 3 or labels.ndim != 2 or not labels.shape[:1] == logits.shape[1:2] == lengths.shape \
            == label_lengths.shape:
        raise ShapeError("ctc takes logits [T, N, classes], labels [N, L] and the lengths [N] of both",
                         op="ctc", shapes=shapes, where=here())
    for x in (labels, lengths, label_lengths):
        if not x.dtype.is_integer:
            raise DTypeError(f"ctc: labels and lengths are integers, not {x.dtype.full_name}", op="ctc",
                             shapes=shapes, where=here(), hint="declare them as 'int64'")
    labels = check_range(labels, logits.shape[2], "the labels")
    lengths = check_range(lengths, logits.shape[0] + 1, "the lengths")
    label_lengths = check_range(label_lengths, labels.shape[1] + 1, "the label lengths")
    return _reduced("ctc", -log_likelihood(logits, labels, lengths, label_lengths, blank), reduction, weights)


def binary_cross_entropy_from_logits(logits: Tensor, targets: Tensor, *, pos_weight: Any = None,
                                     weights: Any = None, reduction: str = "mean") -> Tensor:
    """-t log σ(z) - (1 - t) log(1 - σ(z)) of each element, computed as softplus(z) - t z, which cannot
    overflow. targets: of the logits' shape, 0 to 1. pos_weight: a factor of the first term, a number or one
    for each element of the last axis."""
    op = "binary_cross_entropy_from_logits"
    _check_same(op, logits, targets)
    if pos_weight is None:
        losses = elementwise("softplus", logits) - targets * logits
    else:
        factor = 1 + (as_tensor(pos_weight) - 1) * targets
        losses = (1 - targets) * logits + factor * elementwise("softplus", -logits)
    return _reduced(op, losses, reduction, weights)


def binary_cross_entropy(probabilities: Tensor, targets: Tensor, *, weights: Any = None,
                         reduction: str = "mean") -> Tensor:
    """-t log p - (1 - t) log(1 - p) of each element; no logarithm counts less than -100. Where p comes from a
    sigmoid, `binary_cross_entropy_from_logits` is more exact. targets: of the same shape, 0 to 1."""
    _check_same("binary_cross_entropy", probabilities, targets)
    losses = -(targets * _log(probabilities) + (1 - targets) * _log(1 - probabilities))
    return _reduced("binary_cross_entropy", losses, reduction, weights)


def _log(p: Tensor) -> Tensor:
    """log(p), at least -100; its gradient at 0 is 0, not infinite."""
    positive = p > 0
    logs = elementwise("log", elementwise("where", positive, p, 1.0))
    return elementwise("where", positive, elementwise("maximum", logs, -100.0), -100.0)


def kl_divergence(log_predictions: Tensor, targets: Tensor, *, weights: Any = None, reduction: str = "mean"
                  ) -> Tensor:
    """Σ p (log p - log q) over the last axis: how far the distribution q, given by its logarithms, is from
    the targets p. Both [..., classes]; a loss for each distribution."""
    _check_same("kl_divergence", log_predictions, targets)
    logs = elementwise("log", elementwise("where", targets > 0, targets, 1.0))
    return _reduced("kl_divergence", sum(targets * (logs - log_predictions), -1), reduction, weights)


def hinge(scores: Tensor, targets: Tensor, margin: float = 1.0, *, power: int = 1, weights: Any = None,
          reduction: str = "mean") -> Tensor:
    """max(0, margin - target · score)^power of each element; targets -1 or 1, of the scores' shape. With L2
    on the weights: a support vector machine. Cortes and Vapnik, Machine Learning 20, 1995."""
    _check_same("hinge", scores, targets)
    return _reduced("hinge", _excess("hinge", margin - targets * scores, power), reduction, weights)


def multiclass_hinge(scores: Tensor, labels: Tensor, margin: float = 1.0, *, power: int = 1,
                     weights: Any = None, reduction: str = "mean") -> Tensor:
    """Σ over the wrong classes j of max(0, margin + score_j - score_label)^power, divided by the number of
    classes. scores: [..., classes]; labels: integers [...].

    Weston and Watkins, ESANN 1999.
    """
    labels, _ = _checked_labels("multiclass_hinge", scores, labels)
    hit = matches(labels, scores.shape[-1])
    right = sum(elementwise("where", hit, scores, 0.0), -1, keepdims=True)
    excess = _excess("multiclass_hinge", scores - right + margin, power)
    return _reduced("multiclass_hinge", mean(elementwise("where", hit, 0.0, excess), -1), reduction, weights)


def _excess(op: str, x: Tensor, power: int) -> Tensor:
    if power not in (1, 2):
        raise UseError(f"power is {power!r}", op=op, shapes=[x.shape], where=here(), hint="use 1 or 2")
    excess = elementwise("relu", x)
    return excess if power == 1 else excess * excess


# --- distances of vectors

def cosine_distance(x: Tensor, y: Tensor, *, weights: Any = None, reduction: str = "mean") -> Tensor:
    """1 - cos of the angle between the vectors along the last axis; lengths below 1e-8 count as 1e-8."""
    _check_same("cosine_distance", x, y)
    lengths = [elementwise("sqrt", elementwise("maximum", sum(t * t, -1), 1e-16)) for t in (x, y)]
    return _reduced("cosine_distance", 1 - sum(x * y, -1) / (lengths[0] * lengths[1]), reduction, weights)


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 1.0, *, weights: Any = None,
            reduction: str = "mean") -> Tensor:
    """max(0, ‖anchor - positive‖ - ‖anchor - negative‖ + margin) of the vectors along the last axis.

    Schroff, Kalenichenko and Philbin, CVPR 2015, with distances that are not squared.
    """
    _check_same("triplet", anchor, positive)
    _check_same("triplet", anchor, negative)
    excess = _distance(anchor, positive) - _distance(anchor, negative) + margin
    return _reduced("triplet", elementwise("relu", excess), reduction, weights)


def contrastive(x: Tensor, y: Tensor, same: Tensor, margin: float = 1.0, *, weights: Any = None,
                reduction: str = "mean") -> Tensor:
    """d² / 2 for pairs that are the same, max(0, margin - d)² / 2 for others, with the distance d of the
    vectors along the last axis. same: bools or numbers 0 and 1, of the vectors' shape without that axis.

    Hadsell, Chopra and LeCun, CVPR 2006.
    """
    _check_same("contrastive", x, y)
    if same.shape != x.shape[:-1]:
        raise ShapeError("contrastive needs one `same` for each pair", op="contrastive",
                         shapes=[x.shape, same.shape], where=here())
    distance = _distance(x, y)
    apart = elementwise("relu", margin - distance)
    losses = elementwise("where", cast(same, "bool"), distance * distance, apart * apart) * 0.5
    return _reduced("contrastive", losses, reduction, weights)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """‖x - y + 1e-6‖ along the last axis: what is added, as in PyTorch, keeps the slope finite at 0."""
    difference = x - y + 1e-6
    return elementwise("sqrt", sum(difference * difference, -1))


# --- common

def _reduced(op: str, losses: Tensor, reduction: str, weights: Any = None, counted: Tensor | None = None
             ) -> Tensor:
    """The losses put together; `counted`: how much each counts in the mean, if not 1."""
    if reduction not in ("mean", "sum", "none"):
        raise UseError(f"reduction is {reduction!r}", op=op, shapes=[losses.shape], where=here(),
                       hint="use 'mean', 'sum' or 'none'")
    if weights is not None:
        factor = _sample_weights(op, weights, losses)
        losses, counted = losses * factor, factor if counted is None else counted * factor
    if reduction == "none":
        return losses
    if reduction == "sum":
        return sum(losses)
    return mean(losses) if counted is None else sum(losses) / sum(counted)


def _sample_weights(op: str, weights: Any, losses: Tensor) -> Tensor:
    """The weights stretched to the losses' shape."""
    given = cast(as_tensor(weights), losses.dtype)
    if given.shape != losses.shape[:given.ndim]:
        raise ShapeError(f"{op} needs weights of the losses' shape, or of its first axes", op=op,
                         shapes=[losses.shape, given.shape], where=here(),
                         hint="one weight for each sample: declare them with the batch's dimension")
    missing = tuple(range(given.ndim, losses.ndim))
    return broadcast_to(expand_dims(given, missing) if missing else given, losses.shape)


def _check_same(op: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        broadcast_shapes(op, [x.shape, y.shape])        # says which axis, if they do not even broadcast
        raise ShapeError(f"{op} compares tensors of one shape", op=op, shapes=[x.shape, y.shape],
                         where=here(),
                         hint="reshape one of them: broadcasting here is mostly a mistake")


def _check_positive(op: str, name: str, value: float) -> None:
    if not value > 0:
        raise UseError(f"{name} is {value!r}", op=op, where=here(), hint="use a number > 0")
