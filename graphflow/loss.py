"""Losses: scalars to minimise, means over the batch."""
from __future__ import annotations

from graphflow.compiler.plan.errors import DTypeError, ShapeError
from graphflow.functions import op_function, square
from graphflow.indexing import check_range, matches
from graphflow.reductions import log_softmax, mean, sum
from graphflow.scope import here
from graphflow.tensor import Tensor, broadcast_shapes, elementwise


def mean_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean over all elements of (predictions - targets)²; the shapes must be equal."""
    _check_same("mean_squared_error", predictions, targets)
    return mean(square(predictions - targets))


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[label]. logits: [..., classes]; labels: integers [...] in
    0..classes-1, which every call checks.
    """
    if not logits.shape:
        raise ShapeError("softmax_cross_entropy needs logits [..., classes]", op="softmax_cross_entropy",
                         shapes=[logits.shape, labels.shape], where=here())
    classes = logits.shape[-1]
    if not labels.dtype.is_integer:
        raise DTypeError(f"labels are integers, not {labels.dtype.full_name}", op="softmax_cross_entropy",
                         shapes=[logits.shape, labels.shape], where=here(),
                         hint="declare the input with dtype 'int64'; for one-hot targets take their argmax")
    if labels.shape != logits.shape[:-1]:
        raise ShapeError("softmax_cross_entropy: the labels must have the shape of the logits without the "
                         "last axis",
                         op="softmax_cross_entropy", shapes=[logits.shape, labels.shape], where=here(),
                         hint="declare both inputs with one gf.dim for the batch" if len(labels.shape) ==
                         len(logits.shape) - 1 else None)
    labels = check_range(labels, classes, "the labels")
    chosen = elementwise("where", matches(labels, classes), log_softmax(logits), 0.0)
    return mean(-sum(chosen, -1))


def binary_cross_entropy_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -t log σ(z) - (1 - t) log(1 - σ(z)), computed as softplus(z) - t z, which cannot overflow.
    targets: of the logits' shape, 0 to 1.
    """
    _check_same("binary_cross_entropy_from_logits", logits, targets)
    return mean(op_function("softplus")(logits) - targets * logits)


def _check_same(op: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        broadcast_shapes(op, [x.shape, y.shape])        # says which axis, if they do not even broadcast
        raise ShapeError(f"{op} compares tensors of one shape", op=op, shapes=[x.shape, y.shape],
                         where=here(),
                         hint="reshape one of them: broadcasting here is mostly a mistake")
