"""Indexing with NumPy's basic keys (integers, slices with any step, None, Ellipsis) and one array of integers
among them."""
from __future__ import annotations

from typing import Any

import numpy as np

from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import Tensor, apply


def take_slice(x: Tensor, key: Any) -> Tensor:
    """``x[key]``. One of the keys may be an array of integers (a Tensor, a NumPy array or a list): its axes
    stand in the place of the axis that it chooses from, as in `gf.take`.

    On an axis whose extent the call decides nothing is clipped: a bound that a call exceeds refuses that
    call.
    """
    keys = _full_key(x, key if isinstance(key, tuple) else (key,))
    arrays = [place for place, entry in enumerate(keys) if _is_array(entry)]
    if not arrays:
        return _sliced(x, keys)
    from graphflow.indexing import take
    _check_array(x, keys, arrays)
    place = arrays[0]
    chosen = take(x, _integers(x, keys[place]), sum(entry is not None for entry in keys[:place]))
    whole = (slice(None),) * (chosen.ndim - x.ndim + 1)
    return _sliced(chosen, [*keys[:place], *whole, *keys[place + 1:]])


def _is_array(entry: Any) -> bool:
    return isinstance(entry, (Tensor, np.ndarray, list))


def _check_array(x: Tensor, keys: list[Any], arrays: list[int]) -> None:
    """UseError for keys with which NumPy does more than choose along one axis."""
    if len(arrays) > 1:
        raise UseError("only one of the keys may be an array of integers", op="slice", shapes=[x.shape],
                       where=here(), hint="for pairs of indices use gf.take on the two axes reshaped to one; "
                       "for all combinations index twice: x[rows][:, columns]")
    place = arrays[0]
    for other, entry in enumerate(keys):
        low, high = sorted((place, other))
        if _is_index(entry) and any(k is None or isinstance(k, slice) for k in keys[low:high]):
            raise UseError("an integer and an array of integers with other keys between them are ambiguous",
                           op="slice", shapes=[x.shape], where=here(),
                           hint="index twice: first by the integer, then by the array")


def _integers(x: Tensor, entry: Any) -> Any:
    """The index array; a constant mask as the positions where it holds."""
    if isinstance(entry, Tensor):
        if entry.dtype == BOOL:
            raise UseError("a mask can't choose elements: how many there are would depend on values",
                           op="slice", shapes=[x.shape, entry.shape], where=here(),
                           hint="use gf.where(mask, x, 0), or a reduction of it")
        return entry
    array = np.asarray(entry)
    if array.dtype != bool:
        return array if array.size else array.astype(np.int64)
    if array.ndim != 1:
        raise UseError("a mask of constants has one axis", op="slice", shapes=[x.shape, array.shape],
                       where=here())
    return np.flatnonzero(array)


def _sliced(x: Tensor, keys: list[Any]) -> Tensor:
    """`x` by keys that are integers, slices and None."""
    starts: list[DimLike] = []
    stops: list[DimLike] = []
    steps: list[int] = []
    flipped: list[int] = []
    shape: list[DimLike | None] = []                   # None: the extent that the slice gives
    axis = 0
    for entry in keys:
        if entry is None:
            shape.append(1)
            continue
        extent = x.shape[axis]
        if isinstance(entry, slice):
            start, stop, step = _bounds(x, entry, extent, axis)
            if step < 0:                               # x[a:b:-s] is flip(x)[n-1-a : n-1-b : s]
                flipped.append(axis)
                step = -step
            shape.append(None)
        else:
            start = _position(x, entry, extent, axis)
            stop, step = start + 1, 1
        starts.append(start)
        stops.append(stop)
        steps.append(step)
        axis += 1
    out = apply("flip", [x], axes=tuple(flipped)) if flipped else x
    whole = all(s == 0 and e == n and k == 1 for s, e, k, n in zip(starts, stops, steps, x.shape))
    if not whole:
        out = apply("slice", [out], starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))
    return _reshaped(out, keys, shape)


def _reshaped(x: Tensor, keys: list[Any], shape: list[DimLike | None]) -> Tensor:
    """Drops the axes of integer keys, adds those of None."""
    kept = iter([extent for entry, extent in zip([k for k in keys if k is not None], x.shape)
                 if isinstance(entry, slice)])
    final = tuple(next(kept) if extent is None else extent for extent in shape)
    return x if final == x.shape else apply("reshape", [x], shape=final)


def _full_key(x: Tensor, key: tuple[Any, ...]) -> list[Any]:
    """The key with one entry for each axis, beside the Nones."""
    used = sum(entry is not None and entry is not Ellipsis for entry in key)
    dots = sum(entry is Ellipsis for entry in key)
    if dots > 1 or used > x.ndim:
        what = "more than one '...'" if dots > 1 else f"{used} indices for {x.ndim} axes"
        raise UseError(f"{what} in [{', '.join(map(_text, key))}]", op="slice", shapes=[x.shape],
                       where=here())
    fill = [slice(None)] * (x.ndim - used)
    if not dots:
        return [*key, *fill]
    at = next(i for i, entry in enumerate(key) if entry is Ellipsis)
    return [*key[:at], *fill, *key[at + 1:]]


def _text(entry: Any) -> str:
    if not isinstance(entry, slice):
        return "..." if entry is Ellipsis else "an array" if _is_array(entry) else str(entry)
    parts = ["" if p is None else str(p) for p in (entry.start, entry.stop, entry.step)]
    return ":".join(parts if entry.step is not None else parts[:2])


def _is_index(value: Any) -> bool:
    return isinstance(value, (int, np.integer, Dim)) and not isinstance(value, bool)


def _position(x: Tensor, entry: Any, extent: DimLike, axis: int) -> DimLike:
    """Where an integer key points, counted from the front."""
    if not _is_index(entry):
        raise UseError(f"{entry!r} is no index", op="slice", shapes=[x.shape], where=here(),
                       hint="use integers, slices, None, ... and one array of integers")
    at = entry if isinstance(entry, Dim) else int(entry)
    if isinstance(at, int) and at < 0:
        at = extent + at
    if isinstance(at, int) and isinstance(extent, int) and not 0 <= at < extent:
        raise ShapeError(f"index {entry} is outside axis {axis}, which has {extent} elements", op="slice",
                         shapes=[x.shape], where=here())
    return at


def _bounds(x: Tensor, entry: slice, extent: DimLike, axis: int) -> tuple[DimLike, DimLike, int]:
    """(start, stop, step) of a slice; for a step below 0, start and stop in the flipped axis."""
    step = 1 if entry.step is None else entry.step
    if not isinstance(step, (int, np.integer)) or step == 0:
        raise UseError(f"the step {step!r} of axis {axis} is no integer other than 0", op="slice",
                       shapes=[x.shape],
                       where=here())
    if any(v is not None and not _is_index(v) for v in (entry.start, entry.stop)):
        raise UseError(f"a slice has integer bounds, not {_text(entry)}", op="slice", shapes=[x.shape],
                       where=here())
    if isinstance(extent, int) and not any(isinstance(v, Dim) for v in (entry.start, entry.stop)):
        start, stop, step = entry.indices(extent)
        if step < 0:
            start, stop = extent - 1 - start, extent - 1 - stop
        return start, max(start, stop), int(step)
    first = _counted(entry.start, extent, (0 if step > 0 else extent - 1))
    if step > 0:
        return first, _counted(entry.stop, extent, extent), int(step)
    last = -1 if entry.stop is None else _counted(entry.stop, extent, 0)
    return extent - 1 - first, extent - 1 - last, int(step)


def _counted(bound: Any, extent: DimLike, default: DimLike) -> DimLike:
    if bound is None:
        return default
    if isinstance(bound, Dim):
        return bound
    return extent + int(bound) if bound < 0 else int(bound)
