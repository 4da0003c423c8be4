"""Functions that make arrays out of shapes, dimensions and numbers."""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphflow.arguments import as_shape, as_tensor
from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.shapes import broadcast_to, expand_dims, reshape
from graphflow.tensor import Operand, Tensor, apply, cast, constant, element_type, stretch

Number = int | float | np.integer | np.floating


def full(shape: Any, value: int | float | bool, dtype: Any = None) -> Tensor:
    """An array of one value."""
    return stretch(constant(value, dtype), as_shape(shape))


def zeros(shape: Any, dtype: Any = "float32") -> Tensor:
    """An array of zeros."""
    return full(shape, 0, dtype)


def ones(shape: Any, dtype: Any = "float32") -> Tensor:
    """An array of ones."""
    return full(shape, 1, dtype)


def full_like(x: Operand, value: int | float | bool, dtype: Any = None) -> Tensor:
    """An array of one value, of the shape and (without `dtype`) the element type of `x`."""
    x = as_tensor(x)
    return full(x.shape, value, dtype or x.dtype)


def zeros_like(x: Operand, dtype: Any = None) -> Tensor:
    """Zeros of the shape and (without `dtype`) the element type of `x`."""
    return full_like(x, 0, dtype)


def ones_like(x: Operand, dtype: Any = None) -> Tensor:
    """Ones of the shape and (without `dtype`) the element type of `x`."""
    return full_like(x, 1, dtype)


def extent(size: DimLike, dtype: Any = "float32") -> Tensor:
    """A dimension as a number that a program computes with, e.g. the size of the batch."""
    if not isinstance(size, Dim):
        return constant(size, dtype)
    if element_type(dtype).is_half:
        return cast(extent(size), dtype)
    # Element `size` of 0, 1, … size is within bounds whatever the call's shapes.
    count = apply("iota", [], shape=(size + 1,), axis=0, dtype=element_type(dtype))
    return reshape(count[size:], ())


# --- ranges

def arange(start: Any, stop: Any = None, step: Number = 1, dtype: Any = None) -> Tensor:
    """``arange(stop)``: 0, 1, … stop-1; ``arange(start, stop, step)``: start, start + step, … before `stop`.

    The bounds are numbers or dimensions; with a dimension among them, bounds and step are integers, the step
    is > 0, and a call in which `start` exceeds `stop` is refused. Without `dtype` the elements are int32, or
    float32 where one of the numbers is a float.
    """
    low, high = (0, start) if stop is None else (start, stop)
    for bound in (low, high, step):
        if isinstance(bound, bool) or not isinstance(bound, (int, float, np.integer, np.floating, Dim)):
            raise UseError(f"arange: {bound!r} is neither a number nor a dimension", op="arange",
                           where=here(), hint="name the element type: gf.arange(n, dtype='int64')")
    if step == 0 or not isinstance(step, (int, float, np.integer, np.floating)):
        raise UseError(f"arange: the step is a number other than 0, not {step}", op="arange", where=here())
    whole = all(isinstance(v, (int, np.integer, Dim)) for v in (low, high, step))
    target = element_type(dtype or ("int32" if whole else "float32"))
    if isinstance(low, Dim) or isinstance(high, Dim):
        return _symbolic_range(low, high, step, target)
    count = max(0, math.ceil((high - low) / step))
    line = apply("iota", [], shape=(count,), axis=0, dtype=target if whole else element_type("float64"))
    if whole:
        return line * int(step) + int(low) if (low, step) != (0, 1) else line
    return cast(line * float(step) + float(low), target)


def _symbolic_range(low: Any, high: Any, step: Any, dtype: Any) -> Tensor:
    if step < 0 or not all(isinstance(v, (int, np.integer, Dim)) for v in (low, high, step)):
        raise UseError(f"arange with dimensions takes integers and a step > 0, not {low}, {high}, {step}",
                       op="arange", where=here(), hint="reverse it with gf.flip")
    if not isinstance(low, Dim) and low < 0:
        line = apply("iota", [], shape=(high - int(low),), axis=0, dtype=dtype) + int(low)
    else:
        line = apply("iota", [], shape=(high,), axis=0, dtype=dtype)[low:]
    return line[::int(step)]


def linspace(start: Operand, stop: Operand, count: DimLike, endpoint: bool = True,
             dtype: Any = "float32") -> Tensor:
    """`count` numbers at equal distances from `start` to `stop`, which is the last of them unless `endpoint`
    is false. The bounds may be tensors without axes. Computed in float64."""
    bounds = [cast(b, "float64") for b in (start, stop)]
    for b in bounds:
        if b.shape:
            raise ShapeError("linspace takes single numbers as bounds", op="linspace", shapes=[b.shape],
                             where=here())
    if isinstance(count, int) and count < 1:
        raise UseError(f"linspace makes at least one number, not {count}", op="linspace", where=here())
    line = apply("iota", [], shape=(count,), axis=0, dtype=element_type("float64"))
    last = count - 1 if endpoint else count
    # Over a symbolic count the distance is that of two numbers at least.
    share = line / (max(last, 1) if isinstance(last, int) else _at_least_one(last))
    return cast(bounds[0] * (1 - share) + bounds[1] * share, dtype)


def _at_least_one(size: DimLike) -> Tensor:
    return apply("maximum", [extent(size, "float64"), constant(1.0, "float64")])


def meshgrid(*lines: Operand, indexing: str = "xy") -> list[Tensor]:
    """The coordinates of the grid whose axes the one-dimensional `lines` are: an array of the grid's shape
    for each line. With "xy" the first two axes of the result are exchanged, as in NumPy; with "ij" axis i
    belongs to line i."""
    if indexing not in ("xy", "ij"):
        raise UseError(f"meshgrid: indexing is 'xy' or 'ij', not {indexing!r}", op="meshgrid", where=here())
    given = [as_tensor(line) for line in lines]
    for line in given:
        if line.ndim != 1:
            raise ShapeError("meshgrid takes arrays of one axis", op="meshgrid", shapes=[line.shape],
                             where=here())
    order = list(range(len(given)))
    if indexing == "xy" and len(given) > 1:
        order[:2] = [1, 0]
    shape = tuple(given[i].shape[0] for i in order)
    return [broadcast_to(expand_dims(given[i], [a for a in range(len(order)) if a != order.index(i)]), shape)
            for i in range(len(given))]


# --- matrices

def diagonal_mask(rows: DimLike, columns: DimLike, offset: int = 0) -> Tensor:
    """Whether element [i, j] of a matrix lies on the diagonal j = i + offset."""
    return expand_dims(arange(rows), 1) + offset == expand_dims(arange(columns), 0)


def eye(rows: DimLike, columns: DimLike | None = None, offset: int = 0, dtype: Any = "float32") -> Tensor:
    """A matrix (square without `columns`) with ones on the diagonal j = i + offset, zeros elsewhere."""
    return cast(diagonal_mask(rows, rows if columns is None else columns, offset), dtype)


def tri(rows: DimLike, columns: DimLike | None = None, offset: int = 0, dtype: Any = "float32") -> Tensor:
    """A matrix with ones where j <= i + offset, zeros elsewhere."""
    return cast(_lower_mask(rows, rows if columns is None else columns, offset), dtype)


def tril(x: Operand, offset: int = 0) -> Tensor:
    """`x` with zeros above the diagonal j = i + offset of its last two axes."""
    x = _matrices("tril", x)
    return apply("where", [stretch(_lower_mask(x.shape[-2], x.shape[-1], offset), x.shape), x, zeros_like(x)])


def triu(x: Operand, offset: int = 0) -> Tensor:
    """`x` with zeros below the diagonal j = i + offset of its last two axes."""
    x = _matrices("triu", x)
    below = stretch(_lower_mask(x.shape[-2], x.shape[-1], offset - 1), x.shape)
    return apply("where", [below, zeros_like(x), x])


def _lower_mask(rows: DimLike, columns: DimLike, offset: int) -> Tensor:
    return expand_dims(arange(rows), 1) + offset >= expand_dims(arange(columns), 0)


def _matrices(op: str, x: Operand) -> Tensor:
    x = as_tensor(x)
    if x.ndim < 2:
        raise ShapeError(f"{op} takes matrices: arrays of at least two axes", op=op, shapes=[x.shape],
                         where=here())
    return x
