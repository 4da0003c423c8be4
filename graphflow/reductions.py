"""Functions that reduce whole axes: sums, means, extremes, and what is made of them."""
from __future__ import annotations

import math
from typing import Any

from graphflow.arguments import as_axes, as_axis, as_tensor
from graphflow.autocast import master_type
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.dtypes import BOOL, F32, I64
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.creation import extent
from graphflow.scope import here
from graphflow.shapes import reshape, squeeze
from graphflow.tensor import Axes, Operand, Tensor, apply, as_tensors, cast, elementwise, stretch


def _reduce(op: str, x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    out = apply(op, [x], axes=axes) if axes else x
    return reshape(out, tuple(1 if a in axes else d for a, d in enumerate(x.shape))) if keepdims else out


def sum(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The sum over all axes, or those named. Integers keep their type and wrap; bools are counted in
    int64."""
    x = as_tensor(x)
    return _reduce("reduce_sum", cast(x, I64) if x.dtype == BOOL else x, as_axes(x, axis, "sum"), keepdims)


def prod(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The product over all axes, or those named. Integers keep their type and wrap. The gradient is right
    with zeros among the factors too; the second derivative only without."""
    x = as_tensor(x)
    return _reduce("reduce_prod", cast(x, I64) if x.dtype == BOOL else x, as_axes(x, axis, "prod"), keepdims)


def max(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The largest element over all axes, or those named; NaN if there is one. Equal largest elements share
    the gradient evenly."""
    x = as_tensor(x)
    return _reduce("reduce_max", x, as_axes(x, axis, "max"), keepdims)


def min(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The smallest element over all axes, or those named; NaN if there is one. Equal smallest elements share
    the gradient evenly."""
    x = as_tensor(x)
    return _reduce("reduce_min", x, as_axes(x, axis, "min"), keepdims)


def any(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Whether an element is true (numbers: not 0), over all axes or those named."""
    x = as_tensor(x)
    return _reduce("reduce_any", x if x.dtype == BOOL else x != 0, as_axes(x, axis, "any"), keepdims)


def all(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Whether all elements are true (numbers: not 0), over all axes or those named."""
    x = as_tensor(x)
    return _reduce("reduce_all", x if x.dtype == BOOL else x != 0, as_axes(x, axis, "all"), keepdims)


def mean(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The mean over all axes, or those named; of integers and bools in float32."""
    x = as_tensor(x)
    x = x if x.dtype.has_gradient else cast(x, F32)
    axes = as_axes(x, axis, "mean")
    if x.dtype.is_half:                           # which may hold neither the sum nor the count
        return cast(mean(cast(x, F32), axes, keepdims), master_type(x.dtype))
    return _reduce("reduce_sum", x, axes, keepdims) / extent(product(x.shape[a] for a in axes), x.dtype)


def average(x: Operand, axis: Axes = None, weights: Operand | None = None, keepdims: bool = False) -> Tensor:
    """The mean over all axes, or those named, each element counted by its weight: sum(x * weights) /
    sum(weights). The weights have the shape of `x`, or of the axes named (for one axis: a vector)."""
    if weights is None:
        return mean(x, axis, keepdims)
    x, w = as_tensors([x, weights])
    axes = as_axes(x, axis, "average")
    if w.shape != x.shape:
        if w.shape != tuple(x.shape[a] for a in axes):
            raise ShapeError("average: the weights have neither the array's shape nor that of the axes",
                             op="average", shapes=[x.shape, w.shape], where=here())
        w = reshape(w, tuple(d if a in axes else 1 for a, d in enumerate(x.shape)))
    x, w = (t if t.dtype.has_gradient else cast(t, F32) for t in (x, w))
    w = stretch(w, x.shape)
    return sum(x * w, axes, keepdims) / sum(w, axes, keepdims)


def var(x: Operand, axis: Axes = None, keepdims: bool = False, ddof: int | float = 0) -> Tensor:
    """The variance over all axes, or those named: the sum of squared distances from the mean, divided by the
    count less `ddof` (1 estimates the variance of what a sample is drawn from)."""
    x = as_tensor(x)
    centred = x - mean(x, axis, keepdims=True)
    squares = centred * centred
    if ddof == 0:
        return mean(squares, axis, keepdims)
    count = extent(product(x.shape[a] for a in as_axes(x, axis, "var")), squares.dtype)
    return sum(squares, axis, keepdims) / (count - ddof)


def std(x: Operand, axis: Axes = None, keepdims: bool = False, ddof: int | float = 0) -> Tensor:
    """The standard deviation over all axes, or those named: the square root of `var`. Where it is 0, so is
    its gradient."""
    return _root(var(x, axis, keepdims, ddof))


def _root(x: Tensor) -> Tensor:
    """The square root of numbers >= 0, with the gradient 0 at 0 instead of infinity."""
    some = x != 0
    return elementwise("where", some, elementwise("sqrt", elementwise("where", some, x, 1.0)), x)


def count_nonzero(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """How many elements are true (numbers: not 0), over all axes or those named; int64."""
    x = as_tensor(x)
    return sum(x if x.dtype == BOOL else x != 0, axis, keepdims)


# --- norms

def norm(x: Operand, ord: int | float | str | None = None, axis: Axes = None,  # noqa: A002
         keepdims: bool = False) -> Tensor:
    """The norm of vectors (one axis named, or an array of one) or matrices (two axes), as numpy.linalg.norm.

    Of vectors: 2 or None sqrt(sum(x²)), 1 sum(|x|), inf max(|x|), -inf min(|x|), 0 the number of elements
    other than 0, any other p sum(|x|^p)^(1/p). Of matrices: "fro" or None sqrt(sum(x²)), 1 and -1 the
    largest and least sum of |x| down a column, inf and -inf that along a row. Without `ord` and `axis`:
    sqrt(sum(x²)) of all. Where a norm has no derivative (at 0) the gradient is 0; equal largest elements
    share it.
    """
    x = as_tensor(x)
    x = x if x.dtype.has_gradient else cast(x, F32)
    if ord is None:
        return _root(sum(x * x, axis, keepdims))
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, (tuple, list)) else (axis,)
    places = [as_axis(x, a, "norm") for a in axes]
    if len(places) == 1:
        return _vector_norm(x, ord, places[0], keepdims)
    if len(places) != 2 or places[0] == places[1]:
        raise UseError(f"the norm {ord!r} is one of vectors or matrices: of one or two axes, not of "
                       f"{len(places)}", op="norm", shapes=[x.shape], where=here(), hint="name the axes")
    return _matrix_norm(x, ord, places[0], places[1], keepdims)


def _vector_norm(x: Tensor, ord: Any, axis: int, keepdims: bool) -> Tensor:  # noqa: A002
    size = elementwise("abs", x)
    if not isinstance(ord, (int, float)):
        raise UseError(f"there is no norm {ord!r} of vectors", op="norm", shapes=[x.shape], where=here(),
                       hint="use a number, or inf; 'fro' is for matrices")
    if ord in (math.inf, -math.inf):
        return max(size, axis, keepdims) if ord > 0 else min(size, axis, keepdims)
    if ord == 0:
        return cast(count_nonzero(x, axis, keepdims), x.dtype)
    if ord == 1:
        return sum(size, axis, keepdims)
    if ord == 2:
        return _root(sum(x * x, axis, keepdims))
    return _power(sum(_power(size, ord), axis, keepdims), 1 / ord)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent of numbers >= 0, with the gradient 0 at 0."""
    some = x != 0
    power = elementwise("pow", elementwise("where", some, x, 1.0), exponent)
    return elementwise("where", some, power, 0.0 if exponent > 0 else math.inf)


def _matrix_norm(x: Tensor, ord: Any, rows: int, columns: int, keepdims: bool) -> Tensor:  # noqa: A002
    if ord == "fro":
        return _root(sum(x * x, (rows, columns), keepdims))
    if ord not in (1, -1, math.inf, -math.inf):
        raise NotImplementedError(f"the norm {ord!r} of matrices, which would need singular values; there "
                                  "are 'fro', 1, -1, inf and -inf, and gf.norm(gf.reshape(x, -1), 2) of all")
    along = rows if ord in (1, -1) else columns
    sums = sum(elementwise("abs", x), along, keepdims=True)
    found = (max if ord > 0 else min)(sums, (rows, columns), keepdims=True)
    return found if keepdims else squeeze(found, (rows, columns))


# --- positions

def argmax(x: Operand, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The position (int64) of the largest element along the axis, or in row-major order; the first of
    equals."""
    return _arg("argmax", as_tensor(x), axis, keepdims)


def argmin(x: Operand, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The position (int64) of the smallest element along the axis, or in row-major order; the first of
    equals."""
    return _arg("argmin", as_tensor(x), axis, keepdims)


def _arg(op: str, x: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    flat = reshape(x, -1) if axis is None else x
    at = as_axis(flat, 0 if axis is None else axis, op)
    found = apply(op, [flat], axis=at)
    if not keepdims:
        return found
    return reshape(found, tuple(1 if axis is None or a == at else d for a, d in enumerate(x.shape)))


# --- exponentials

def logsumexp(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) without overflow; of no elements or only -inf, -inf."""
    x = as_tensor(x)
    most = elementwise("stop_gradient", max(x, axis, keepdims=True))
    finite = elementwise("where", elementwise("isfinite", most), most, 0.0)
    total = elementwise("log", sum(elementwise("exp", x - finite), axis, keepdims=True)) + finite
    return total if keepdims else squeeze(total, as_axes(x, axis, "logsumexp"))


def softmax(x: Operand, axis: Axes = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along the axis, without overflow."""
    powers = elementwise("exp", _shifted(as_tensor(x), axis))
    return powers / sum(powers, axis, keepdims=True)


def log_softmax(x: Operand, axis: Axes = -1) -> Tensor:
    """log(softmax(x)), exact where the softmax itself would round to 0."""
    shifted = _shifted(as_tensor(x), axis)
    return shifted - elementwise("log", sum(elementwise("exp", shifted), axis, keepdims=True))


def _shifted(x: Tensor, axis: Axes) -> Tensor:
    """`x` minus its largest element; softmax is the same for both, so no gradient flows through the shift."""
    return x - elementwise("stop_gradient", max(x, axis, keepdims=True))
