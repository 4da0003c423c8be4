"""Pooling, its opposites, and upsampling, over one to three spatial axes."""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.creation import arange, extent, ones
from graphflow.nn.geometry import Borders, Padding, PerAxis, borders, check_float, check_maps, per_axis
from graphflow.reductions import max as largest
from graphflow.reductions import mean
from graphflow.scope import here
from graphflow.shapes import broadcast_to, reshape, swapaxes
from graphflow.tensor import Tensor, apply, cast, elementwise


def max_pool1d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid"
               ) -> Tensor:
    """The largest element of each window of the last axis. x: [N, C, L]; else as `max_pool2d`."""
    return _max_pool("max_pool1d", 1, x, window, stride, padding)[0]


def max_pool2d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid"
               ) -> Tensor:
    """The largest element of each window of the last two axes; padding never wins. x: [N, C, H, W].

    stride: the window's size without one; if it is less, windows overlap. padding: as for `conv2d`.
    """
    return _max_pool("max_pool2d", 2, x, window, stride, padding)[0]


def max_pool3d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid"
               ) -> Tensor:
    """The largest element of each window of the last three axes. x: [N, C, D, H, W]; else as `max_pool2d`."""
    return _max_pool("max_pool3d", 3, x, window, stride, padding)[0]


def avg_pool1d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid", *,
               include_padding: bool = True) -> Tensor:
    """The mean of each window of the last axis. x: [N, C, L]; else as `avg_pool2d`."""
    return _avg_pool("avg_pool1d", 1, x, window, stride, padding, include_padding)


def avg_pool2d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid", *,
               include_padding: bool = True) -> Tensor:
    """The mean of each window of the last two axes. x: [N, C, H, W].

    stride: the window's size without one. padding: as for `conv2d`. include_padding: padding counts as zeros
    (PyTorch's count_include_pad); without it, the mean is over the window's elements inside the map.
    """
    return _avg_pool("avg_pool2d", 2, x, window, stride, padding, include_padding)


def avg_pool3d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid", *,
               include_padding: bool = True) -> Tensor:
    """The mean of each window of the last three axes. x: [N, C, D, H, W]; else as `avg_pool2d`."""
    return _avg_pool("avg_pool3d", 3, x, window, stride, padding, include_padding)


def global_max_pool(x: Tensor) -> Tensor:
    """The largest element of each map. x: [N, C, ...]; result: [N, C]."""
    return largest(x, _spatial("global_max_pool", x))


def global_avg_pool(x: Tensor) -> Tensor:
    """The mean of each map. x: [N, C, ...]; result: [N, C]."""
    return mean(x, _spatial("global_avg_pool", x))


def max_pool_with_switches(x: Tensor, window: PerAxis, stride: PerAxis | None = None,
                           padding: Padding = "valid") -> tuple[Tensor, Tensor]:
    """Max pooling of x: [N, C, ...] over its one to three spatial axes, and where in its window (row-major,
    int32) each maximum was found: what `max_unpool` takes."""
    axes = len(_spatial("max_pool_with_switches", x))
    return _max_pool("max_pool_with_switches", axes, x, window, stride, padding)


def max_unpool(x: Tensor, switches: Tensor, window: PerAxis, stride: PerAxis | None = None,
               padding: Padding = "valid", size: Sequence[DimLike] | None = None) -> Tensor:
    """Puts each element back to where its switch points in its window, with zeros elsewhere; where windows
    overlap, they add up. x, switches: [N, C, ...], as from `max_pool_with_switches` with the same windows.

    size: the spatial extents of the result; by default the smallest that has so many windows. Zeiler and
    Fergus, "Visualizing and understanding convolutional networks", ECCV 2014.
    """
    axes = len(_spatial("max_unpool", x))
    kernel, step, sides = _windows("max_unpool", axes, x, window, stride, padding)
    if padding == "same" and size is None:
        raise UseError("max_unpool with padding 'same' needs the size of the result", op="max_unpool",
                       shapes=[x.shape], where=here(), hint="pass size=pooled.shape[2:]")
    if size is None:
        size = [(d - 1) * s + k - sum(p) for d, s, k, p in zip(x.shape[2:], step, kernel, sides)]
    return apply("unpool", [x, switches], window=kernel, stride=step, padding=sides, spatial=tuple(size))


def adaptive_avg_pool(x: Tensor, size: PerAxis) -> Tensor:
    """The means of so many parts of each map, however large it is. x: [N, C, ...]; result: [N, C, *size].

    Part i of n of an axis of extent e reaches from floor(i e / n) to before ceil((i + 1) e / n).
    """
    spatial = _spatial("adaptive_avg_pool", x)
    for axis, count in zip(spatial, per_axis("size", size, len(spatial))):
        length = extent(x.shape[axis], "int64")
        part, place = reshape(arange(count, dtype="int64"), (count, 1)), arange(x.shape[axis], dtype="int64")
        low, high = part * length // count, ((part + 1) * length + (count - 1)) // count
        weights = cast((place >= low) & (place < high), x.dtype) / cast(high - low, x.dtype)
        x = _along(x, axis, weights)
    return x


def upsample(x: Tensor, factor: PerAxis, mode: str = "nearest", *, align_corners: bool = False) -> Tensor:
    """The maps of x: [N, C, ...] enlarged by an integer factor, or one for each spatial axis.

    mode: "nearest" repeats elements; "linear" interpolates between them, in two dimensions bilinear.
    align_corners: whether the outermost elements of map and result lie on each other, or (without it) the
    borders of their outermost pixels do, beyond which the map goes on unchanged.
    """
    spatial = _spatial("upsample", x)
    if mode not in ("nearest", "linear"):
        raise UseError(f"mode is {mode!r}", op="upsample", shapes=[x.shape], where=here(),
                       hint="use 'nearest' or 'linear'")
    factors = per_axis("factor", factor, len(spatial))
    if mode == "linear":
        for axis, f in zip(spatial, factors):
            x = _along(x, axis, _interpolation(x.shape[axis], f, align_corners, x))
        return x
    split = [d for axis, f in zip(spatial, factors) for d in (x.shape[axis], 1)]
    wide = [d for axis, f in zip(spatial, factors) for d in (x.shape[axis], f)]
    repeated = broadcast_to(reshape(x, (*x.shape[:2], *split)), (*x.shape[:2], *wide))
    return reshape(repeated, (*x.shape[:2], *(x.shape[a] * f for a, f in zip(spatial, factors))))


def _interpolation(size: DimLike, factor: int, align_corners: bool, x: Tensor) -> Tensor:
    """[size * factor, size]: how much each old element counts in each new one, a hat around its place. The
    places are computed in float64: of large maps float32 would lose their fractions."""
    at = cast(arange(size * factor), "float64")
    last = extent(size, "float64") - 1
    if align_corners:
        steps = elementwise("maximum", extent(size * factor, "float64") - 1, 1.0)
        place = at * (last / steps)
    else:
        place = elementwise("minimum", elementwise("maximum", (at + 0.5) / float(factor) - 0.5, 0.0), last)
    distance = abs(reshape(place, (size * factor, 1)) - cast(arange(size), "float64"))
    return cast(elementwise("maximum", 1 - distance, 0.0), x.dtype)


def _along(x: Tensor, axis: int, weights: Tensor) -> Tensor:
    """`x` with the axis of extent n mapped by the matrix `weights`: [m, n]."""
    last = swapaxes(x, axis, -1) if axis != x.ndim - 1 else x
    rows = reshape(last, (product(last.shape[:-1]), last.shape[-1]))
    out = reshape(apply("matmul", [rows, weights], transpose_y=True), (*last.shape[:-1], weights.shape[0]))
    return swapaxes(out, axis, -1) if axis != x.ndim - 1 else out


def _spatial(op: str, x: Tensor) -> tuple[int, ...]:
    """The numbers of the spatial axes, one to three."""
    check_float(op, x)
    if not 3 <= x.ndim <= 5:
        raise ShapeError(f"{op} takes [N, C, ...] with 1 to 3 spatial axes, not {x.ndim} axes", op=op,
                         shapes=[x.shape], where=here())
    return tuple(range(2, x.ndim))


def _windows(op: str, axes: int, x: Tensor, window: PerAxis, stride: PerAxis | None, padding: Padding
             ) -> tuple[tuple[int, ...], tuple[int, ...], Borders]:
    check_maps(op, x, axes)
    size = per_axis("window", window, axes)
    step = per_axis("stride", window if stride is None else stride, axes)
    return size, step, borders(op, padding, x, size, step, (1,) * axes)


def _max_pool(op: str, axes: int, x: Tensor, window: PerAxis, stride: PerAxis | None, padding: Padding
              ) -> tuple[Tensor, Tensor]:
    size, step, sides = _windows(op, axes, x, window, stride, padding)
    values, switches = apply("max_pool", [x], window=size, stride=step, padding=sides)
    return values, switches


def _avg_pool(op: str, axes: int, x: Tensor, window: PerAxis, stride: PerAxis | None, padding: Padding,
              include_padding: bool) -> Tensor:
    size, step, sides = _windows(op, axes, x, window, stride, padding)
    total = apply("window_sum", [x], window=size, stride=step, padding=sides)
    if include_padding or not any(map(any, sides)):
        return total / product(size)
    one_map = ones((1, 1, *x.shape[2:]), x.dtype)
    return total / apply("window_sum", [one_map], window=size, stride=step, padding=sides)
