"""Functions that give arrays another shape or order, and put them together; they compute nothing."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphflow.arguments import as_axes, as_axis, as_shape, as_tensor
from graphflow.compiler.plan.dims import Dim, DimLike, product
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import Axes, Operand, Tensor, apply, as_tensors, stretch


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
    order = range(x.ndim)[::-1] if axes is None else [as_axis(x, a, "transpose") for a in axes]
    return apply("transpose", [x], perm=tuple(order))


def swapaxes(x: Operand, first: int, second: int) -> Tensor:
    """`x` with two axes exchanged."""
    x = as_tensor(x)
    order = list(range(x.ndim))
    a, b = as_axis(x, first, "swapaxes"), as_axis(x, second, "swapaxes")
    order[a], order[b] = order[b], order[a]
    return transpose(x, order)


def broadcast_to(x: Operand, shape: Any) -> Tensor:
    """`x` stretched to `shape` by NumPy's rules."""
    return stretch(as_tensor(x), as_shape(shape))


def expand_dims(x: Operand, axis: int | Sequence[int]) -> Tensor:
    """`x` with new axes of extent 1 at the places that `axis` names in the result."""
    x = as_tensor(x)
    given = list(axis) if isinstance(axis, (tuple, list)) else [axis]
    places = {as_axis(x, a, "expand_dims", len(given)) for a in given}
    old = iter(x.shape)
    return reshape(x, tuple(1 if a in places else next(old) for a in range(x.ndim + len(places))))


def squeeze(x: Operand, axis: Axes = None) -> Tensor:
    """`x` without the axes named, which must have the extent 1; without all of that extent if none is
    named."""
    x = as_tensor(x)
    if axis is None:
        axes = tuple(a for a, d in enumerate(x.shape) if d == 1)
    else:
        axes = as_axes(x, axis, "squeeze")
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
    return apply("concatenate", parts, axis=as_axis(parts[0], axis, "concatenate"))


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise UseError("stack takes a list of tensors", op="stack", where=here())
    parts = as_tensors(tensors)
    for i, t in enumerate(parts):
        if t.shape != parts[0].shape:
            raise ShapeError(f"stack: tensor {i} has another shape than tensor 0", op="stack",
                             shapes=[parts[0].shape, t.shape], where=here())
    place = as_axis(parts[0], axis, "stack", 1)
    return concatenate([expand_dims(t, place) for t in parts], place)


def split(x: Operand, parts: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """`x` in so many equal parts along an axis, or cut at the positions that a list names."""
    x = as_tensor(x)
    a = as_axis(x, axis, "split")
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
    return apply("flip", [x], axes=as_axes(x, axis, "flip"))


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
