"""Functions that reduce whole axes: sums, means, extremes, and what is made of them."""
from __future__ import annotations

from graphflow.arguments import as_axes, as_axis, as_tensor
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.dtypes import BOOL, F32, I64
from graphflow.creation import extent
from graphflow.shapes import reshape, squeeze
from graphflow.tensor import Axes, Operand, Tensor, apply, cast, elementwise


def _reduce(op: str, x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    out = apply(op, [x], axes=axes) if axes else x
    return reshape(out, tuple(1 if a in axes else d for a, d in enumerate(x.shape))) if keepdims else out


def sum(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The sum over all axes, or those named. Integers keep their type and wrap; bools are counted in
    int64."""
    x = as_tensor(x)
    return _reduce("reduce_sum", cast(x, I64) if x.dtype == BOOL else x, as_axes(x, axis, "sum"), keepdims)


def prod(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The product over all axes, or those named. Integers keep their type and wrap."""
    x = as_tensor(x)
    return _reduce("reduce_prod", cast(x, I64) if x.dtype == BOOL else x, as_axes(x, axis, "prod"), keepdims)


def max(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The largest element over all axes, or those named; NaN if there is one."""
    x = as_tensor(x)
    return _reduce("reduce_max", x, as_axes(x, axis, "max"), keepdims)


def min(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The smallest element over all axes, or those named; NaN if there is one."""
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
    return _reduce("reduce_sum", x, axes, keepdims) / extent(product(x.shape[a] for a in axes), x.dtype)


def var(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The variance over all axes, or those named: the mean squared distance from the mean."""
    x = as_tensor(x)
    centred = x - mean(x, axis, keepdims=True)
    return mean(centred * centred, axis, keepdims)


def std(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The standard deviation over all axes, or those named: the square root of `var`."""
    return elementwise("sqrt", var(x, axis, keepdims))


def argmax(x: Operand, axis: int | None = None) -> Tensor:
    """The position (int64) of the largest element along the axis, or in row-major order; the first of
    equals."""
    return _arg("argmax", as_tensor(x), axis)


def argmin(x: Operand, axis: int | None = None) -> Tensor:
    """The position (int64) of the smallest element along the axis, or in row-major order; the first of
    equals."""
    return _arg("argmin", as_tensor(x), axis)


def _arg(op: str, x: Tensor, axis: int | None) -> Tensor:
    x = reshape(x, -1) if axis is None else x
    return apply(op, [x], axis=as_axis(x, 0 if axis is None else axis, op))


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
