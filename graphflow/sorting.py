"""Functions of order: sorting and what follows from it, running sums and the like, and writing along
indices."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphflow.arguments import as_axis, as_tensor
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import BOOL, F32, F64, I64, U8
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.creation import extent
from graphflow.indexing import checked_indices
from graphflow.scope import here
from graphflow.shapes import reshape
from graphflow.tensor import (
    Operand,
    Tensor,
    apply,
    as_tensors,
    broadcast_shapes,
    cast,
    constant,
    elementwise,
    stretch,
)

Axis = int | None


# --- order

def argsort(x: Operand, axis: Axis = -1, descending: bool = False) -> Tensor:
    """The positions, as int64, that put `x` in rising order along the axis (None: all elements in row-major
    order).

    Equal elements keep their order, falling or rising. NaN counts as the greatest: it comes last, or first if
    `descending`.
    """
    x, at = _along(x, axis, "argsort")
    return apply("argsort", [_numbers(x)], axis=at, descending=bool(descending))


def sort(x: Operand, axis: Axis = -1, descending: bool = False) -> Tensor:
    """The elements in rising order along the axis (None: all of them), or falling; the order is that of
    `argsort`."""
    x, at = _along(x, axis, "sort")
    return apply("take_along_axis", [x, argsort(x, at, descending)], axis=at)


def top_k(x: Operand, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """(values, positions) of the k greatest elements along the axis, the greatest first; of equal ones the
    first first, NaN before all. The smallest: of ``-x``."""
    x, at = _along(x, axis, "top_k")
    size = x.shape[at]
    if not isinstance(k, int) or k < 0 or (isinstance(size, int) and k > size):
        raise UseError(f"top_k takes a number of elements from 0 to {size}, not {k!r}", op="top_k",
                       shapes=[x.shape], where=here())
    chosen = argsort(x, at, descending=True)[(*(slice(None),) * at, slice(0, k))]
    return apply("take_along_axis", [x, chosen], axis=at), chosen


def median(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The middle element along the axis (None: of all), or the mean of the middle two; NaN if there is
    one."""
    return quantile(x, 0.5, axis, keepdims)


def quantile(x: Operand, q: float | Sequence[float], axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The number below which the share `q` of the elements along the axis (None: of all) lies: at position
    q · (n - 1) of the sorted ones, between two of them in proportion; NaN if there is one. Several q make a
    new first axis."""
    given = as_tensor(x)
    shares = np.atleast_1d(np.asarray(q, np.float64))
    if np.ndim(q) > 1 or not np.all((shares >= 0) & (shares <= 1)):
        raise UseError(f"quantile takes shares from 0 to 1, not {q!r}", op="quantile", shapes=[given.shape],
                       where=here())
    rank = given.ndim
    given, at = _along(given if given.dtype.is_float else cast(given, F32), axis, "quantile")
    size = given.shape[at]
    if size == 0:
        raise ShapeError("quantile of no elements", op="quantile", shapes=[given.shape], where=here())
    ordered = sort(given, at)
    last = extent(size - 1, F64)
    position = constant(shares, F64) * last
    lower = elementwise("floor", position)
    weight = cast(position - lower, given.dtype)
    weight = reshape(weight, (len(shares), *(1,) * (given.ndim - 1 - at)))
    low = apply("gather", [ordered, cast(lower, I64)], axis=at)
    high = apply("gather", [ordered, cast(elementwise("ceil", position), I64)], axis=at)
    between = elementwise("where", low == high, low, low + (high - low) * weight)
    greatest = apply("gather", [ordered, reshape(cast(last, I64), (1,))], axis=at)
    out = elementwise("where", elementwise("isnan", greatest), greatest, between)
    return _placed(out, at, np.ndim(q) == 0, axis, rank, keepdims)


def _placed(x: Tensor, at: int, single: bool, axis: Axis, rank: int, keepdims: bool) -> Tensor:
    """The axis `at`, which numbers the shares, first; or gone if there is one share alone."""
    kept = tuple(d for i, d in enumerate(x.shape) if i != at)
    if keepdims:
        kept = (1,) * rank if axis is None else (*kept[:at], 1, *kept[at:])
    if single:
        return reshape(x, kept)
    order = (at, *(i for i in range(x.ndim) if i != at))
    x = apply("transpose", [x], perm=order) if at else x
    return reshape(x, (x.shape[0], *kept))


# --- running sums and the like

def cumsum(x: Operand, axis: Axis = None, reverse: bool = False) -> Tensor:
    """The sum of all elements up to each one along the axis (None: in row-major order), or from it on if
    `reverse`. Integers keep their type and wrap; bools are counted in int64. Floats are summed in order."""
    return _running("cumsum", x, axis, reverse)


def cumprod(x: Operand, axis: Axis = None, reverse: bool = False) -> Tensor:
    """The product of all elements up to each one along the axis (None: in row-major order), or from it on if
    `reverse`. The gradient is right with zeros in it."""
    return _running("cumprod", x, axis, reverse)


def cummax(x: Operand, axis: Axis = None, reverse: bool = False) -> Tensor:
    """The greatest element up to each one along the axis (None: in row-major order), or from it on if
    `reverse`; NaN from the first NaN on."""
    return _running("cummax", x, axis, reverse)


def cummin(x: Operand, axis: Axis = None, reverse: bool = False) -> Tensor:
    """The smallest element up to each one along the axis (None: in row-major order), or from it on if
    `reverse`; NaN from the first NaN on."""
    return _running("cummin", x, axis, reverse)


def _running(op: str, x: Operand, axis: Axis, reverse: bool) -> Tensor:
    x, at = _along(x, axis, op)
    return apply(op, [cast(x, I64) if x.dtype == BOOL else x], axis=at, reverse=bool(reverse))


def linear_recurrence(a: Operand, b: Operand, axis: int = -1, reverse: bool = False) -> Tensor:
    """y[t] = a[t] · y[t-1] + b[t] along the axis, from y[-1] = 0; if `reverse`, y[t] = a[t] · y[t+1] + b[t].
    Floats; `a` and `b` are broadcast. Exponential averages and linear state-space layers are such
    recurrences."""
    first, second = as_tensors([a, b])
    shape = broadcast_shapes("linear_recurrence", [first.shape, second.shape])
    first, second = stretch(first, shape), stretch(second, shape)
    return apply("linear_recurrence", [first, second], axis=as_axis(second, axis, "linear_recurrence"),
                 reverse=bool(reverse))


def _along(x: Operand, axis: Axis, op: str) -> tuple[Tensor, int]:
    """The tensor and the axis counted from 0; all elements in a row for None."""
    x = as_tensor(x)
    if axis is None:
        return reshape(x, (-1,)), 0
    return x, as_axis(x, axis, op)


def _numbers(x: Tensor) -> Tensor:
    """What argsort compares: bools as 0 and 1, halves as float32."""
    if x.dtype == BOOL:
        return cast(x, U8)
    return cast(x, F32) if x.dtype.is_half else x


# --- writing along indices

def scatter_add(x: Operand, indices: Operand, updates: Operand, axis: int = 0) -> Tensor:
    """`x` with the slices of `updates` added where the integers `indices` say, along the axis: x[indices[k]]
    += updates[k] for axis 0. Slices with the same index all count, in order.

    updates: x's shape with the indices' shape in the place of the axis, or what broadcasts to it. Every call
    checks that the indices are in 0..extent-1. The same bits for any number of threads.
    """
    x, places, values, at = _scattered("scatter_add", x, indices, updates, axis)
    return x + apply("scatter_add", [places, values], axis=at, size=x.shape[at])


def scatter_set(x: Operand, indices: Operand, updates: Operand, axis: int = 0) -> Tensor:
    """`x` with the slices of `updates` in the places that the integers `indices` say, along the axis:
    x[indices[k]] = updates[k] for axis 0. Of slices with the same index the last one stays, and it alone has
    a gradient.

    updates, indices: as in `scatter_add`.
    """
    x, places, values, at = _scattered("scatter_set", x, indices, updates, axis)
    return apply("scatter_set", [x, places, values], axis=at)


def _scattered(op: str, x: Operand, indices: Operand, updates: Operand, axis: int
               ) -> tuple[Tensor, Tensor, Tensor, int]:
    """(x, indices with a check, updates of their full shape, the axis)."""
    first, values = as_tensors([x, updates])
    at = as_axis(first, axis, op)
    places = checked_indices(indices, first, at)
    shape: tuple[DimLike, ...] = (*first.shape[:at], *places.shape, *first.shape[at + 1:])
    return first, places, stretch(values, shape), at
