"""Functions that read along computed indices, and the checks of these."""
from __future__ import annotations

from typing import Any

import numpy as np

from graphflow.arguments import as_axis, as_tensor
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import I64
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.creation import arange, extent
from graphflow.reductions import all as every
from graphflow.scope import here
from graphflow.shapes import expand_dims, reshape
from graphflow.tensor import (
    Operand,
    Tensor,
    apply,
    as_array,
    broadcast_shapes,
    cast,
    constant,
    stretch,
    with_check,
)


def one_hot(indices: Operand, classes: int, dtype: Any = "float32") -> Tensor:
    """1 where the last, new axis has the position that `indices` says, else 0; no 1 for an index outside
    0..classes-1."""
    indices = as_tensor(indices)
    return cast(matches(indices, classes), dtype)


def matches(indices: Tensor, classes: DimLike) -> Tensor:
    """Whether the position along a new last axis of extent `classes` is the one that the integer `indices`
    says."""
    if not indices.dtype.is_integer:
        raise DTypeError(f"indices are integers, not {indices.dtype.full_name}", op="one_hot",
                         shapes=[indices.shape], where=here(), hint="convert them with gf.cast(x, 'int32')")
    line = arange(classes, dtype=indices.dtype if indices.dtype.bytes > 1 else "int32")
    return expand_dims(indices, -1) == line


def feed_name(x: Tensor) -> str:
    """The name of the feed that `x` is, but for casts and views; "" if it is none."""
    node = x.value.node
    while node.op != "input" and len(node.inputs) == 1:
        node = node.inputs[0].node
    return str(node.attrs["name"]) if node.op == "input" else ""


def check_range(indices: Tensor, size: DimLike, what: str) -> Tensor:
    """`indices`, with a check in every program that uses them: all must be in 0..size-1. `what` names
    them."""
    if not indices.dtype.is_integer:
        raise DTypeError(f"{what} are integers, not {indices.dtype.full_name}", shapes=[indices.shape],
                         where=here(),
                         hint="declare or cast them as 'int64'")
    wide = cast(indices, I64)
    holds = every((wide >= 0) & (wide < extent(size, I64)))
    return with_check(indices, holds, f"{what} must lie in 0..{size - 1}", feed_name(indices))


def take(x: Operand, indices: Operand, axis: int | None = 0) -> Tensor:
    """The slices of `x` along the axis (None: the elements in row-major order) that the integers `indices`
    name; their axes stand in the place of that axis.

    Every call checks that they are in 0..extent-1; negative ones are refused unless they are constants.
    """
    x = as_tensor(x)
    x = reshape(x, -1) if axis is None else x
    at = as_axis(x, 0 if axis is None else axis, "take")
    return apply("gather", [x, checked_indices(indices, x, at)], axis=at)


def take_along_axis(x: Operand, indices: Operand, axis: int) -> Tensor:
    """The elements of `x` at the integers `indices` along the axis: with axis 1, out[i, j] = x[i, indices[i,
    j]].

    The other axes must be equal, or 1 in `indices` or `x`. Every call checks that the indices are in
    0..extent-1.
    """
    x = as_tensor(x)
    at = as_axis(x, axis, "take_along_axis")
    given = checked_indices(indices, x, at)
    if given.ndim != x.ndim:
        raise ShapeError("take_along_axis needs as many axes of indices as of elements, got "
                         f"{given.ndim} and {x.ndim}", op="take_along_axis",
                         shapes=[x.shape, given.shape], where=here(), hint="insert one with gf.expand_dims")
    others = broadcast_shapes("take_along_axis", [(*t.shape[:at], 1, *t.shape[at + 1:]) for t in (x, given)])
    x, given = (stretch(t, (*others[:at], t.shape[at], *others[at + 1:])) for t in (x, given))
    return apply("take_along_axis", [x, given], axis=at)


def checked_indices(indices: Operand, x: Tensor, axis: int) -> Tensor:
    """Indices along an axis, all within it: constants are checked here, others by every call."""
    size = x.shape[axis]
    if isinstance(indices, Tensor):
        return check_range(indices, size, "the indices")
    array = as_array(indices)
    array = array if array.size else array.astype("int32")
    if array.dtype.kind not in "iu":
        raise DTypeError("indices are integers", op="gather", shapes=[x.shape], where=here())
    if not isinstance(size, int):
        if (array < 0).any():
            raise UseError("an axis whose extent the call decides takes no negative index", op="gather",
                           shapes=[x.shape], where=here(), hint="reverse the axis with gf.flip")
        return check_range(constant(array), size, "the indices")
    if ((array < -size) | (array >= size)).any():
        raise UseError(f"an index is outside 0..{size - 1}", op="gather", shapes=[x.shape], where=here())
    return constant(np.where(array < 0, array + size, array).astype(array.dtype))
