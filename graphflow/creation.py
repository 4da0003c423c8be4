"""Functions that make arrays out of nothing but a shape."""
from __future__ import annotations

from typing import Any

from graphflow.arguments import as_shape
from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.shapes import reshape
from graphflow.tensor import Tensor, apply, constant, element_type, stretch


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
