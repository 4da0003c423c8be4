"""What layers check of their arguments, and the windows of convolutions and pools: size, step, padding."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.compiler.plan.dims import Dim
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import Tensor

PerAxis = int | Sequence[int]
"""A number for all spatial axes, or one for each."""
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]
"""See `borders`."""
Borders = tuple[tuple[int, int], ...]
"""(before, after) of each spatial axis."""

_LAYOUTS = {1: "[N, C, L]", 2: "[N, C, H, W]", 3: "[N, C, D, H, W]"}


def fixed_extent(op: str, x: Tensor, axis: int, what: str, rank: int) -> int:
    """The extent of an axis that parameters depend on; ShapeError if a call decides it."""
    if x.ndim < rank:
        raise ShapeError(f"{op} needs at least {rank} axes, got {x.ndim}", op=op, shapes=[x.shape],
                         where=here())
    extent = x.shape[axis]
    if isinstance(extent, Dim):
        raise ShapeError(f"{op} needs a fixed number of {what}, but axis {axis} is {extent}", op=op,
                         shapes=[x.shape], where=here(),
                         hint="parameters have fixed shapes: declare this extent as a number")
    return extent


def check_float(op: str, x: Tensor) -> None:
    """UseError unless `x` is a Tensor, DTypeError unless it holds floats."""
    if not isinstance(x, Tensor):
        raise UseError(f"{op} takes a Tensor, not {x!r}", op=op, where=here())
    if not x.dtype.has_gradient:
        raise DTypeError(f"{op} takes floats, not {x.dtype.full_name}", op=op, shapes=[x.shape], where=here(),
                         hint="convert them with gf.cast(x, 'float32')")


def check_maps(op: str, x: Tensor, axes: int) -> None:
    """ShapeError unless `x` has a batch axis, a channel axis and so many spatial axes."""
    check_float(op, x)
    if x.ndim != axes + 2:
        hint = "add the channels with gf.reshape(x, (-1, 1, height, width))" if axes == 2 else None
        raise ShapeError(f"{op} takes {_LAYOUTS[axes]}, not {x.ndim} axes", op=op, shapes=[x.shape],
                         where=here(), hint=hint)


def check_count(op: str, name: str, value: Any) -> None:
    """UseError unless `value` is an integer >= 1."""
    if not _is_integer(value, 1):
        raise UseError(f"{name} of {op} is {value!r}", op=op, where=here(), hint="use an integer >= 1")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def per_axis(name: str, value: Any, axes: int, least: int = 1) -> tuple[int, ...]:
    """One number for each spatial axis; UseError for what is none."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(given) != axes or not all(_is_integer(v, least) for v in given):
        each = {1: "", 2: ", or (vertical, horizontal)", 3: ", or one for each of the 3 axes"}[axes]
        raise UseError(f"{name} is {value!r}", where=here(), hint=f"use an integer >= {least}{each}")
    return given


def borders(op: str, padding: Any, x: Tensor, window: Sequence[int], stride: Sequence[int],
            dilation: Sequence[int]) -> Borders:
    """The zeros (before, after) around each spatial axis of `x`.

    padding: "valid" (none), "same" (so many that the result has the extent / stride, rounded up; the odd one
    comes after), a number for all sides, or for each axis a number or a (before, after) pair.
    """
    axes = len(window)
    if padding == "valid":
        return ((0, 0),) * axes
    if padding == "same":
        return tuple(_same(op, x, 2 + i, *sizes) for i, sizes in enumerate(zip(window, stride, dilation)))
    entries = tuple(padding) if isinstance(padding, (tuple, list)) else (padding,) * axes
    pairs = [tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in entries]
    if len(pairs) != axes or not all(len(p) == 2 and all(_is_integer(v, 0) for v in p) for p in pairs):
        each = {1: "[(before, after)]", 2: "(vertical, horizontal), each a number or (before, after)",
                3: "a number or (before, after) for each of the 3 axes"}[axes]
        raise UseError(f"padding is {padding!r}", op=op, shapes=[x.shape], where=here(),
                       hint=f"use 'valid', 'same', a number, or {each}")
    return tuple((p[0], p[1]) for p in pairs)


def _same(op: str, x: Tensor, axis: int, window: int, stride: int, dilation: int) -> tuple[int, int]:
    extent, reach = x.shape[axis], (window - 1) * dilation + 1
    if stride == 1:
        total = reach - 1
    elif isinstance(extent, Dim):
        raise ShapeError(f"padding 'same' with a stride of {stride} needs a fixed extent, but axis {axis} is "
                         f"{extent}", op=op, shapes=[x.shape], where=here(),
                         hint="give the padding as numbers")
    else:
        total = max((-(-extent // stride) - 1) * stride + reach - extent, 0)
    return total // 2, total - total // 2
