"""Functions that give arrays another shape or order, and put them together; they compute nothing."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphflow.arguments import as_axes, as_axis, as_shape, as_tensor
from graphflow.compiler.plan.dims import Dim, DimLike, product
from graphflow.compiler.plan.dtypes import BOOL, I64
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import Axes, Operand, Tensor, apply, as_tensors, constant, elementwise, stretch


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


def moveaxis(x: Operand, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    """`x` with the axes `source` at the places `destination`; the others keep their order."""
    x = as_tensor(x)
    moved, places = ([as_axis(x, a, "moveaxis") for a in _listed(given)] for given in (source, destination))
    if len(moved) != len(places) or len(set(moved)) < len(moved) or len(set(places)) < len(places):
        raise UseError(f"moveaxis: {source} and {destination} do not name equally many different axes",
                       op="moveaxis", shapes=[x.shape], where=here())
    order = [a for a in range(x.ndim) if a not in moved]
    for place, axis in sorted(zip(places, moved)):
        order.insert(place, axis)
    return transpose(x, order)


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (tuple, list)) else [given]


def broadcast_to(x: Operand, shape: Any) -> Tensor:
    """`x` stretched to `shape` by NumPy's rules."""
    return stretch(as_tensor(x), as_shape(shape))


def expand_dims(x: Operand, axis: int | Sequence[int]) -> Tensor:
    """`x` with new axes of extent 1 at the places that `axis` names in the result."""
    x = as_tensor(x)
    given = _listed(axis)
    places = {as_axis(x, a, "expand_dims", len(given)) for a in given}
    if len(places) < len(given):
        raise UseError(f"expand_dims: a place is named twice in {axis}", op="expand_dims", shapes=[x.shape],
                       where=here())
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
    return [_part(x, a, low, high) for low, high in zip(cuts, cuts[1:])]


def _part(x: Tensor, axis: int, start: DimLike, stop: DimLike) -> Tensor:
    """The elements from `start` to before `stop` of one axis."""
    return x[(*(slice(None),) * axis, slice(start, stop))]


# --- repetition and order

def tile(x: Operand, repeats: int | Sequence[int]) -> Tensor:
    """`x` side by side so many times along each axis, as in NumPy: missing axes or counts in front are 1."""
    x = as_tensor(x)
    counts = _counts("tile", x, repeats)
    lead = max(0, len(counts) - x.ndim)
    x = reshape(x, ((1,) * lead + x.shape))
    counts = [1] * (x.ndim - len(counts)) + counts
    for axis, count in enumerate(counts):
        n = x.shape[axis]
        if isinstance(n, int):                         # a new axis before it, stretched and merged
            wide = stretch(expand_dims(x, axis), (*x.shape[:axis], count, *x.shape[axis:]))
            x = reshape(wide, (*x.shape[:axis], count * n, *x.shape[axis + 1:]))
        elif count != 1:                               # one index would be divided by a symbol
            x = concatenate([x] * count, axis) if count else _part(x, axis, 0, 0)
    return x


def _counts(op: str, x: Tensor, repeats: Any) -> list[int]:
    counts = _listed(repeats)
    if not all(isinstance(c, (int, np.integer)) and not isinstance(c, bool) and c >= 0 for c in counts):
        raise UseError(f"{op}: {repeats!r} are no counts", op=op, shapes=[x.shape], where=here(),
                       hint="use integers >= 0")
    return [int(c) for c in counts]


def repeat(x: Operand, repeats: int | Sequence[int], axis: int | None = None) -> Tensor:
    """Every element along the axis so many times in a row; a list gives each its own count. Without `axis`
    the elements in row-major order."""
    x = as_tensor(x)
    x = reshape(x, -1) if axis is None else x
    a = as_axis(x, 0 if axis is None else axis, "repeat")
    n, counts = x.shape[a], _counts("repeat", x, repeats)
    if len(counts) == 1:
        wide = stretch(expand_dims(x, a + 1), (*x.shape[:a + 1], counts[0], *x.shape[a + 1:]))
        return reshape(wide, (*x.shape[:a], n * counts[0], *x.shape[a + 1:]))
    if n != len(counts):
        raise ShapeError(f"repeat: {len(counts)} counts for axis {a}, which has {n} elements", op="repeat",
                         shapes=[x.shape], where=here())
    return apply("gather", [x, constant(np.repeat(np.arange(len(counts)), counts))], axis=a)


def flip(x: Operand, axis: Axes = None) -> Tensor:
    """`x` with the order along the axes reversed; along all without `axis`."""
    x = as_tensor(x)
    return apply("flip", [x], axes=as_axes(x, axis, "flip"))


def roll(x: Operand, shift: int | Sequence[int], axis: int | Sequence[int] | None = None) -> Tensor:
    """`x` moved by `shift` places along the axis, what leaves at one end comes in at the other. Several axes
    have a shift each, or one for all; without `axis` the elements are taken in row-major order.

    On an axis whose extent the call decides, a shift that exceeds it refuses the call.
    """
    x = as_tensor(x)
    if axis is None:
        return reshape(roll(reshape(x, -1), shift, 0), x.shape)
    axes, shifts = [as_axis(x, a, "roll") for a in _listed(axis)], _listed(shift)
    shifts = shifts * len(axes) if len(shifts) == 1 else shifts
    if len(shifts) != len(axes) or not all(isinstance(s, (int, np.integer)) for s in shifts):
        raise UseError(f"roll: {shift!r} is neither an integer nor one for each of {len(axes)} axes",
                       op="roll", shapes=[x.shape], where=here())
    for a, by in zip(axes, shifts):
        n = x.shape[a]
        by = int(by) % n if isinstance(n, int) and n else int(by)
        if by and n != 0:
            cut = n - by if by > 0 else -by
            x = concatenate([_part(x, a, cut, n), _part(x, a, 0, cut)], a)
    return x


def rot90(x: Operand, times: int = 1, axes: tuple[int, int] = (0, 1)) -> Tensor:
    """`x` turned by 90° so many times, from the first of the two axes to the second."""
    x = as_tensor(x)
    first, second = (as_axis(x, a, "rot90") for a in axes)
    if first == second:
        raise UseError("rot90 turns in two different axes", op="rot90", shapes=[x.shape], where=here())
    if times % 4 == 0:
        return x
    if times % 4 == 2:
        return flip(x, (first, second))
    turned = swapaxes(x, first, second)
    return flip(turned, first) if times % 4 == 1 else flip(turned, second)


# --- padding

PAD_MODES = ("constant", "edge", "reflect", "symmetric", "wrap")


def pad(x: Operand, widths: Any, value: int | float | bool = 0, mode: str = "constant") -> Tensor:
    """`x` with elements around it. `widths`: a number for both ends of every axis, a (before, after) pair for
    every axis, or one pair for each axis.

    The elements are `value` (mode "constant"), the nearest one ("edge"), those mirrored at the border without
    ("reflect") or with the border element ("symmetric"), or those of the other end ("wrap"). On an axis whose
    extent the call decides, the mirrored or wrapped part must fit into it once.
    """
    x = as_tensor(x)
    if mode not in PAD_MODES:
        raise UseError(f"pad: there is no mode {mode!r}", op="pad", shapes=[x.shape], where=here(),
                       hint=f"use one of {', '.join(PAD_MODES)}")
    try:
        pairs = np.broadcast_to(np.asarray(widths), (x.ndim, 2)).tolist()
    except ValueError:
        raise ShapeError(f"pad: {widths!r} is neither a number, a pair, nor a pair for each of {x.ndim} axes",
                         op="pad", shapes=[x.shape], where=here()) from None
    if mode == "constant":
        return apply("pad", [x], low=tuple(int(p[0]) for p in pairs), high=tuple(int(p[1]) for p in pairs),
                     interior=(0,) * x.ndim, value=value)
    for axis, (low, high) in enumerate(pairs):
        x = _bordered(x, axis, int(low), int(high), mode)
    return x


def _bordered(x: Tensor, axis: int, low: int, high: int, mode: str) -> Tensor:
    """`x` with a border along one axis that repeats elements of it."""
    n = x.shape[axis]
    if low < 0 or high < 0 or n == 0 and low + high > 0:
        raise ShapeError(f"pad: axis {axis} of {n} elements can't have a border of {low} and {high}",
                         op="pad", shapes=[x.shape], where=here())
    mode = "edge" if mode == "reflect" and n == 1 else mode
    most = {"edge": None, "reflect": n - 1}.get(mode, n)
    if isinstance(most, int) and max(low, high) > most:      # first a border as wide as can be, then the rest
        first = [most if width > most else 0 for width in (low, high)]
        wider = _bordered(x, axis, first[0], first[1], mode)
        return _bordered(wider, axis, low - first[0], high - first[1], mode)
    parts = [_border(x, axis, low, mode, False)] if low else []
    parts += [x]
    parts += [_border(x, axis, high, mode, True)] if high else []
    return concatenate(parts, axis) if len(parts) > 1 else x


def _border(x: Tensor, axis: int, width: int, mode: str, after: bool) -> Tensor:
    n = x.shape[axis]
    if mode == "edge":
        edge = _part(x, axis, n - 1, n) if after else _part(x, axis, 0, 1)
        return stretch(edge, (*x.shape[:axis], width, *x.shape[axis + 1:]))
    if mode == "wrap":
        return _part(x, axis, 0, width) if after else _part(x, axis, n - width, n)
    skip = 1 if mode == "reflect" else 0
    mirrored = _part(x, axis, n - width - skip, n - skip) if after else _part(x, axis, skip, width + skip)
    return flip(mirrored, axis)


# --- diagonals

def diagonal(x: Operand, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The elements [i, i + offset] of two axes, along a new last axis, as in NumPy. Axes whose extents the
    call decides must be equal, with an offset of 0."""
    x = as_tensor(x)
    first, second = as_axis(x, axis1, "diagonal"), as_axis(x, axis2, "diagonal")
    if first == second:
        raise UseError("diagonal takes two different axes", op="diagonal", shapes=[x.shape], where=here())
    x = moveaxis(x, (first, second), (-2, -1))
    lead, (rows, columns) = x.shape[:-2], x.shape[-2:]
    if isinstance(rows, int) and isinstance(columns, int):
        start = offset if offset >= 0 else -offset * columns
        count = max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))
        flat = reshape(x, (*lead, rows * columns))
        stop = start + (count - 1) * (columns + 1) + 1 if count else start
        return flat[..., start:stop:columns + 1]
    if rows != columns or offset:
        raise ShapeError(f"diagonal: with an extent that the call decides, the matrix must be square and the "
                         f"offset 0, not {offset}", op="diagonal", shapes=[x.shape], where=here())
    line = apply("iota", [], shape=(rows,), axis=0, dtype=I64)
    on = elementwise("eq", expand_dims(line, 1), line)
    kept = elementwise("where", on, x, False if x.dtype == BOOL else 0)
    return apply("reduce_any" if x.dtype == BOOL else "reduce_sum", [kept], axes=(kept.ndim - 1,))


def diag(x: Operand, offset: int = 0) -> Tensor:
    """A square matrix with the elements of a vector on the diagonal j = i + offset and zeros elsewhere; of a
    matrix its `diagonal`."""
    x = as_tensor(x)
    if x.ndim == 2:
        return diagonal(x, offset)
    if x.ndim != 1:
        raise ShapeError("diag takes a vector or a matrix", op="diag", shapes=[x.shape], where=here(),
                         hint="of other arrays, gf.diagonal takes the diagonals of two axes")
    size = x.shape[0] + abs(offset)
    placed = pad(x, ((max(offset, 0), max(-offset, 0)),))     # element j of column j
    line = apply("iota", [], shape=(size,), axis=0, dtype=I64)
    on = elementwise("eq", expand_dims(line, 1) + offset, line)
    return elementwise("where", on, placed, False if x.dtype == BOOL else 0)


def trace(x: Operand, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Tensor:
    """The sum of the `diagonal`."""
    line = diagonal(x, offset, axis1, axis2)
    return apply("reduce_sum", [line], axes=(line.ndim - 1,))
