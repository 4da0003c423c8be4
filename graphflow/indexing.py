"""Functions that read along computed indices, and the checks of these."""
from __future__ import annotations

from typing import Any

from graphflow.arguments import as_axis, as_tensor
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import I64
from graphflow.compiler.plan.errors import DTypeError, UseError
from graphflow.creation import arange, extent
from graphflow.reductions import all as every
from graphflow.scope import here
from graphflow.shapes import expand_dims
from graphflow.tensor import Operand, Tensor, apply, as_array, cast, constant, with_check


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
    return expand_dims(indices, -1) == arange(classes, dtype=indices.dtype if indices.dtype.bytes > 1 else "int32")


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


def take(x: Operand, indices: Operand, axis: int = 0) -> Tensor:
    """The slices of `x` along the axis that the integers `indices` name; their axes stand in the axis's
    place.

    Every call checks that they are in 0..extent-1; negative ones are refused.
    """
    x = as_tensor(x)
    at = as_axis(x, axis, "take")
    return apply("gather", [x, _checked(indices, x, at)], axis=at)


def take_along_axis(x: Operand, indices: Operand, axis: int) -> Tensor:
    """The elements of `x` at the integers `indices` along the axis: with axis 1, out[i, j] = x[i, indices[i,
    j]].

    The other axes must be equal. Every call checks that the indices are in 0..extent-1.
    """
    x = as_tensor(x)
    at = as_axis(x, axis, "take_along_axis")
    return apply("take_along_axis", [x, _checked(indices, x, at)], axis=at)


def _checked(indices: Operand, x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    if isinstance(indices, Tensor):
        return check_range(indices, size, "the indices")
    array = as_array(indices)
    if array.size and isinstance(size, int) and (array.min() < 0 or array.max() >= size):
        raise UseError(f"an index is outside 0..{size - 1}", op="gather", shapes=[x.shape], where=here())
    return constant(array if array.size else array.astype("int32"))
