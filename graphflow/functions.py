"""The functions of the language, by NumPy's names where NumPy has one.

Written here: what NumPy spells with an axis or a shape, and compositions. Every other op of the table is a
function of its own name, made from its record: ``gf.exp(x)``, ``gf.maximum(x, 0)`` promote and broadcast,
the rest takes tensors by position and attributes by keyword.
"""
from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from graphflow.compiler.ops import OPS
from graphflow.compiler.plan.dims import Dim, DimLike, product
from graphflow.compiler.plan.dtypes import BOOL, F32, I64
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import (
    Axes,
    Operand,
    Tensor,
    apply,
    as_array,
    as_tensors,
    cast,
    constant,
    element_type,
    elementwise,
    matmul,
    stretch,
    with_check,
)

_NOT_FUNCTIONS = ("leaf", "effect", "control", "grad", "fused")


def as_tensor(x: Operand) -> Tensor:
    """`x` itself if it is a Tensor, else a constant."""
    return x if isinstance(x, Tensor) else constant(x)


@cache
def op_function(name: str) -> Callable[..., Any]:
    """The function of an op of the table that has none written here; AttributeError if there is no such
    op."""
    record = OPS.get(name)
    if record is None or record.kind in _NOT_FUNCTIONS:
        raise AttributeError(f"graphflow has no function {name!r}")

    def function(*operands: Any, **attrs: Any) -> Any:
        if record.kind == "elementwise" and not attrs:
            return elementwise(name, *operands)
        given = {k: _attribute(k, v) for k, v in attrs.items()}
        return apply(name, [as_tensor(x) for x in operands], **given)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{record.doc}\n\nOperands: {', '.join(record.operands) or 'none'}." + (
        f" Attributes: {', '.join(record.attrs)}." if record.attrs else "")
    return function


def _attribute(name: str, value: Any) -> Any:
    if name == "dtype":
        return element_type(value)
    return tuple(_attribute("", v) for v in value) if isinstance(value, (list, tuple)) else value


def __getattr__(name: str) -> Any:
    return op_function(name)


# --- shapes

def _axis(x: Tensor, axis: Any, op: str, more: int = 0) -> int:
    """The axis counted from 0; ShapeError if `x` (with `more` axes) has none of that number."""
    rank = x.ndim + more
    if not isinstance(axis, (int, np.integer)) or isinstance(axis, bool):
        raise UseError(f"{op}: {axis!r} is no axis", op=op, shapes=[x.shape], where=here(),
                       hint="use an integer")
    if not -rank <= axis < rank:
        raise ShapeError(f"{op}: there is no axis {axis} in an array of {rank} axes", op=op, shapes=[x.shape],
                         where=here())
    return int(axis) % rank


def _axes(x: Tensor, axis: Axes, op: str) -> tuple[int, ...]:
    """The axes, sorted, counted from 0; None is all of them."""
    if axis is None:
        return tuple(range(x.ndim))
    given = list(axis) if isinstance(axis, (tuple, list)) else [axis]
    out = tuple(sorted(_axis(x, a, op) for a in given))
    if len(set(out)) < len(out):
        raise UseError(f"{op}: an axis is named twice in {axis}", op=op, shapes=[x.shape], where=here())
    return out


def as_shape(shape: Any) -> tuple[DimLike, ...]:
    """A shape given as an integer, a dimension or a sequence of these; UseError for anything else."""
    entries = shape if isinstance(shape, (tuple, list)) else (shape,)
    if not builtins.all(isinstance(d, (int, np.integer, Dim)) and not isinstance(d, bool) for d in entries):
        raise UseError(f"{shape!r} is no shape", where=here(), hint="use integers and dimensions (gf.dim)")
    return tuple(d if isinstance(d, Dim) else int(d) for d in entries)


def reshape(x: Operand, shape: Any) -> Tensor:
    """The same elements in row-major order under another shape; one extent may be -1: what is left over."""
    x, target = as_tensor(x), as_shape(shape)
    unknown = [axis for axis, d in enumerate(target) if d == -1]
    if len(unknown) > 1:
        raise UseError("reshape: only one extent may be -1", op="reshape", shapes=[x.shape, target],
                       where=here())
    if unknown:
        rest = _left_over(x.shape, [d for d in target if d != -1])
        if rest is None:
            raise ShapeError(f"reshape: {_count(x.shape)} elements do not divide among the other extents",
                             op="reshape", shapes=[x.shape, target], where=here())
        target = (*target[:unknown[0]], rest, *target[unknown[0] + 1:])
    return x if target == x.shape else apply("reshape", [x], shape=target)


def _count(shape: Sequence[DimLike]) -> str:
    return str(product(shape))


def _left_over(have: Sequence[DimLike], want: list[DimLike]) -> DimLike | None:
    """product(have) / product(want), None where that is no dimension; symbols cancel one by one."""
    rest = list(have)
    divisor = 1
    for d in want:
        if isinstance(d, Dim) and d in rest:
            rest.remove(d)
        elif isinstance(d, int):
            divisor *= d
        else:
            return None
    total = product(rest)
    if divisor == 0:
        return None
    return total // divisor if total % divisor == 0 else None


def transpose(x: Operand, axes: Sequence[int] | None = None) -> Tensor:
    """The axes in the order `axes`; reversed without them."""
    x = as_tensor(x)
    order = range(x.ndim)[::-1] if axes is None else [_axis(x, a, "transpose") for a in axes]
    return apply("transpose", [x], perm=tuple(order))


def swapaxes(x: Operand, first: int, second: int) -> Tensor:
    """`x` with two axes exchanged."""
    x = as_tensor(x)
    order = list(range(x.ndim))
    a, b = _axis(x, first, "swapaxes"), _axis(x, second, "swapaxes")
    order[a], order[b] = order[b], order[a]
    return transpose(x, order)


def broadcast_to(x: Operand, shape: Any) -> Tensor:
    """`x` stretched to `shape` by NumPy's rules."""
    return stretch(as_tensor(x), as_shape(shape))


def expand_dims(x: Operand, axis: int | Sequence[int]) -> Tensor:
    """`x` with new axes of extent 1 at the places that `axis` names in the result."""
    x = as_tensor(x)
    given = list(axis) if isinstance(axis, (tuple, list)) else [axis]
    places = {_axis(x, a, "expand_dims", len(given)) for a in given}
    old = iter(x.shape)
    return reshape(x, tuple(1 if a in places else next(old) for a in range(x.ndim + len(places))))


def squeeze(x: Operand, axis: Axes = None) -> Tensor:
    """`x` without the axes named, which must have the extent 1; without all of that extent if none is
    named."""
    x = as_tensor(x)
    if axis is None:
        axes = tuple(a for a, d in enumerate(x.shape) if d == 1)
    else:
        axes = _axes(x, axis, "squeeze")
    for a in axes:
        if x.shape[a] != 1:
            raise ShapeError(f"squeeze: axis {a} has the extent {x.shape[a]}, not 1", op="squeeze",
                             shapes=[x.shape],
                             where=here())
    return reshape(x, tuple(d for a, d in enumerate(x.shape) if a not in axes))


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """The tensors one after another along an axis, promoted to one element type."""
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise UseError("concatenate takes a list of tensors", op="concatenate", where=here())
    parts = as_tensors(tensors)
    return apply("concatenate", parts, axis=_axis(parts[0], axis, "concatenate"))


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise UseError("stack takes a list of tensors", op="stack", where=here())
    parts = as_tensors(tensors)
    for i, t in enumerate(parts):
        if t.shape != parts[0].shape:
            raise ShapeError(f"stack: tensor {i} has another shape than tensor 0", op="stack",
                             shapes=[parts[0].shape, t.shape], where=here())
    place = _axis(parts[0], axis, "stack", 1)
    return concatenate([expand_dims(t, place) for t in parts], place)


def split(x: Operand, parts: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """`x` in so many equal parts along an axis, or cut at the positions that a list names."""
    x = as_tensor(x)
    a = _axis(x, axis, "split")
    extent = x.shape[a]
    if isinstance(parts, int):
        if parts < 1 or extent % parts != 0:
            raise ShapeError(f"split: axis {a} of extent {extent} does not divide into {parts} equal parts",
                             op="split", shapes=[x.shape], where=here())
        size = extent // parts
        cuts: list[DimLike] = [size * i for i in range(parts + 1)]
    else:
        cuts = [0, *parts, extent]
    before = (slice(None),) * a
    return [x[(*before, slice(low, high))] for low, high in zip(cuts, cuts[1:])]


def flip(x: Operand, axis: Axes = None) -> Tensor:
    """`x` with the order along the axes reversed; along all without `axis`."""
    x = as_tensor(x)
    return apply("flip", [x], axes=_axes(x, axis, "flip"))


def pad(x: Operand, widths: Any, value: int | float | bool = 0) -> Tensor:
    """`x` with elements `value` around it. `widths`: a number for both ends of every axis, a (before, after)
    pair for every axis, or one pair for each axis."""
    x = as_tensor(x)
    try:
        pairs = np.broadcast_to(np.asarray(widths), (x.ndim, 2)).tolist()
    except ValueError:
        raise ShapeError(f"pad: {widths!r} is neither a number, a pair, nor a pair for each of {x.ndim} axes",
                         op="pad", shapes=[x.shape], where=here()) from None
    return apply("pad", [x], low=tuple(int(p[0]) for p in pairs), high=tuple(int(p[1]) for p in pairs),
                 interior=(0,) * x.ndim, value=value)


# --- new arrays

def full(shape: Any, value: int | float | bool, dtype: Any = None) -> Tensor:
    """An array of one value."""
    return stretch(constant(value, dtype), as_shape(shape))


def zeros(shape: Any, dtype: Any = "float32") -> Tensor:
    """An array of zeros."""
    return full(shape, 0, dtype)


def ones(shape: Any, dtype: Any = "float32") -> Tensor:
    """An array of ones."""
    return full(shape, 1, dtype)


def arange(count: DimLike, dtype: Any = "int32") -> Tensor:
    """0, 1, … count-1; `count` may be a dimension."""
    return apply("iota", [], shape=as_shape(count), axis=0, dtype=element_type(dtype))


def extent(size: DimLike, dtype: Any = "float32") -> Tensor:
    """A dimension as a number that a program computes with, e.g. the size of the batch."""
    if not isinstance(size, Dim):
        return constant(size, dtype)
    # Element `size` of 0, 1, … size is within bounds whatever the call's shapes.
    count = apply("iota", [], shape=(size + 1,), axis=0, dtype=element_type(dtype))
    return reshape(count[size:], ())


# --- reductions

def _reduce(op: str, x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    out = apply(op, [x], axes=axes) if axes else x
    return reshape(out, tuple(1 if a in axes else d for a, d in enumerate(x.shape))) if keepdims else out


def sum(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The sum over all axes, or those named. Integers keep their type and wrap; bools are counted in
    int64."""
    x = as_tensor(x)
    return _reduce("reduce_sum", cast(x, I64) if x.dtype == BOOL else x, _axes(x, axis, "sum"), keepdims)


def prod(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The product over all axes, or those named. Integers keep their type and wrap."""
    x = as_tensor(x)
    return _reduce("reduce_prod", cast(x, I64) if x.dtype == BOOL else x, _axes(x, axis, "prod"), keepdims)


def max(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The largest element over all axes, or those named; NaN if there is one."""
    x = as_tensor(x)
    return _reduce("reduce_max", x, _axes(x, axis, "max"), keepdims)


def min(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The smallest element over all axes, or those named; NaN if there is one."""
    x = as_tensor(x)
    return _reduce("reduce_min", x, _axes(x, axis, "min"), keepdims)


def any(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Whether an element is true (numbers: not 0), over all axes or those named."""
    x = as_tensor(x)
    return _reduce("reduce_any", x if x.dtype == BOOL else x != 0, _axes(x, axis, "any"), keepdims)


def all(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Whether all elements are true (numbers: not 0), over all axes or those named."""
    x = as_tensor(x)
    return _reduce("reduce_all", x if x.dtype == BOOL else x != 0, _axes(x, axis, "all"), keepdims)


def mean(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The mean over all axes, or those named; of integers and bools in float32."""
    x = as_tensor(x)
    x = x if x.dtype.is_float else cast(x, F32)
    axes = _axes(x, axis, "mean")
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
    return apply(op, [x], axis=_axis(x, 0 if axis is None else axis, op))


# --- compositions

def clip(x: Operand, low: Operand | None = None, high: Operand | None = None) -> Tensor:
    """`x` with what is below `low` or above `high` replaced by these."""
    x = as_tensor(x)
    x = x if low is None else elementwise("maximum", x, low)
    return x if high is None else elementwise("minimum", x, high)


def square(x: Operand) -> Tensor:
    """``x * x``."""
    x = as_tensor(x)
    return x * x


def dot(x: Operand, y: Operand) -> Tensor:
    """The product of a number with an array, else the matrix product `matmul`."""
    a, b = as_tensors([x, y])
    return a * b if not a.shape or not b.shape else matmul(a, b)


def logsumexp(x: Operand, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) without overflow; of no elements or only -inf, -inf."""
    x = as_tensor(x)
    most = elementwise("stop_gradient", max(x, axis, keepdims=True))
    finite = elementwise("where", elementwise("isfinite", most), most, 0.0)
    total = elementwise("log", sum(elementwise("exp", x - finite), axis, keepdims=True)) + finite
    return total if keepdims else squeeze(total, _axes(x, axis, "logsumexp"))


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
    return expand_dims(indices, -1) == arange(classes, indices.dtype if indices.dtype.bytes > 1 else "int32")


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
    holds = all((wide >= 0) & (wide < extent(size, I64)))
    return with_check(indices, holds, f"{what} must lie in 0..{size - 1}", feed_name(indices))


def take(x: Operand, indices: Operand, axis: int = 0) -> Tensor:
    """The slices of `x` along the axis that the integers `indices` name; their axes stand in the axis's
    place.

    Every call checks that they are in 0..extent-1; negative ones are refused.
    """
    x = as_tensor(x)
    at = _axis(x, axis, "take")
    return apply("gather", [x, _checked(indices, x, at)], axis=at)


def take_along_axis(x: Operand, indices: Operand, axis: int) -> Tensor:
    """The elements of `x` at the integers `indices` along the axis: with axis 1, out[i, j] = x[i, indices[i,
    j]].

    The other axes must be equal. Every call checks that the indices are in 0..extent-1.
    """
    x = as_tensor(x)
    at = _axis(x, axis, "take_along_axis")
    return apply("take_along_axis", [x, _checked(indices, x, at)], axis=at)


def _checked(indices: Operand, x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    if isinstance(indices, Tensor):
        return check_range(indices, size, "the indices")
    array = as_array(indices)
    if array.size and isinstance(size, int) and (array.min() < 0 or array.max() >= size):
        raise UseError(f"an index is outside 0..{size - 1}", op="gather", shapes=[x.shape], where=here())
    return constant(array if array.size else array.astype("int32"))


