"""What the functions of the language make of their arguments: tensors, axes counted from 0, shapes."""
from __future__ import annotations

from typing import Any

import numpy as np

from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import Axes, Operand, Tensor, cast, constant


def as_tensor(x: Operand) -> Tensor:
    """`x` itself if it is a Tensor, else a constant."""
    return x if isinstance(x, Tensor) else constant(x)


def as_float(x: Operand) -> Tensor:
    """`x` itself if it has a floating-point type, else in float32."""
    x = as_tensor(x)
    return x if x.dtype.has_gradient else cast(x, F32)


def as_axis(x: Tensor, axis: Any, op: str, more: int = 0) -> int:
    """The axis counted from 0; ShapeError if `x` (with `more` axes) has none of that number."""
    rank = x.ndim + more
    if not isinstance(axis, (int, np.integer)) or isinstance(axis, bool):
        raise UseError(f"{op}: {axis!r} is no axis", op=op, shapes=[x.shape], where=here(),
                       hint="use an integer")
    if not -rank <= axis < rank:
        raise ShapeError(f"{op}: there is no axis {axis} in an array of {rank} axes", op=op, shapes=[x.shape],
                         where=here())
    return int(axis) % rank


def as_axes(x: Tensor, axis: Axes, op: str) -> tuple[int, ...]:
    """The axes, sorted, counted from 0; None is all of them."""
    if axis is None:
        return tuple(range(x.ndim))
    given = list(axis) if isinstance(axis, (tuple, list)) else [axis]
    out = tuple(sorted(as_axis(x, a, op) for a in given))
    if len(set(out)) < len(out):
        raise UseError(f"{op}: an axis is named twice in {axis}", op=op, shapes=[x.shape], where=here())
    return out


def as_shape(shape: Any) -> tuple[DimLike, ...]:
    """A shape given as an integer, a dimension or a sequence of these; UseError for anything else."""
    entries = shape if isinstance(shape, (tuple, list)) else (shape,)
    if not all(isinstance(d, (int, np.integer, Dim)) and not isinstance(d, bool) for d in entries):
        raise UseError(f"{shape!r} is no shape", where=here(), hint="use integers and dimensions (gf.dim)")
    return tuple(d if isinstance(d, Dim) else int(d) for d in entries)
