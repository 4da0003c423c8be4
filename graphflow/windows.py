"""Windows along axes: views of them, their addition where they came from, convolution and correlation."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.arguments import as_axis, as_tensor
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.shapes import flip, reshape
from graphflow.tensor import Operand, Tensor, apply, as_tensors

MODES = ("full", "same", "valid")


def unfold(x: Operand, size: int | Sequence[int], stride: int | Sequence[int] = 1,
           dilation: int | Sequence[int] = 1, axis: int | Sequence[int] = -1) -> Tensor:
    """All windows of `size` elements along the axes, a view that copies nothing.

    Each axis becomes that of the windows' positions, (extent - dilation * (size - 1) - 1) // stride + 1 of
    them; the axes of the windows themselves are the last: of x[N, C, H, W] with ``size=(3, 3), axis=(2, 3)``
    the result is [N, C, H - 2, W - 2, 3, 3]. With a stride and dilation of 1 it is NumPy's
    sliding_window_view.
    """
    out = as_tensor(x)
    axes = _axes(out, axis, "unfold", out.ndim)
    for a, n, s, d in zip(axes, *(_each("unfold", v, axes, out) for v in (size, stride, dilation))):
        out = apply("unfold", [out], axis=a, size=n, stride=s, dilation=d)
    return out


def fold(windows: Operand, extent: DimLike | Sequence[DimLike], stride: int | Sequence[int] = 1,
         dilation: int | Sequence[int] = 1, axis: int | Sequence[int] = -1) -> Tensor:
    """Windows such as `unfold` gives, added up where they came from: each axis gets back its `extent`, and
    the last axes, those of the windows themselves, go. `axis` counts in the result. The gradient of
    `unfold`."""
    out = as_tensor(windows)
    count = len(axis) if isinstance(axis, (tuple, list)) else 1
    axes = _axes(out, axis, "fold", out.ndim - count)
    sizes = list(extent) if isinstance(extent, (tuple, list)) else [extent] * count
    if len(sizes) != count:
        raise UseError(f"fold: {len(sizes)} extents for {count} axes", op="fold", shapes=[out.shape],
                       where=here())
    steps = [_each("fold", v, axes, out) for v in (stride, dilation)]
    for a, n, s, d in reversed(list(zip(axes, sizes, *steps))):
        out = apply("fold", [out], axis=a, extent=n, stride=s, dilation=d)
    return out


def _axes(x: Tensor, axis: Any, op: str, rank: int) -> list[int]:
    given = list(axis) if isinstance(axis, (tuple, list)) else [axis]
    axes = [as_axis(x, a, op, rank - x.ndim) for a in given]
    if len(set(axes)) < len(axes):
        raise UseError(f"{op}: an axis is named twice in {axis}", op=op, shapes=[x.shape], where=here())
    return axes


def _each(op: str, given: Any, axes: list[int], x: Tensor) -> list[int]:
    """One number for each axis."""
    out = list(given) if isinstance(given, (tuple, list)) else [given] * len(axes)
    if len(out) != len(axes):
        raise UseError(f"{op}: {given!r} does not have a number for each of {len(axes)} axes", op=op,
                       shapes=[x.shape], where=here())
    return out


# --- convolution

def convolve(x: Operand, kernel: Operand, mode: str = "full") -> Tensor:
    """The convolution of the last axes of `x` with a kernel of one to three axes of fixed extents:
    out[n] = Σ over k of x[n - k] · kernel[k]; axes of `x` before are a batch.

    `mode`: "full" has every place where the two overlap, extent + kernel - 1; "same" those in the middle, as
    many as `x` has; "valid" only where the kernel lies within `x`. As scipy.signal.convolve. For long
    kernels `gf.fft.convolve` is quicker.
    """
    a, k = as_tensors([x, kernel])
    return _correlated("convolve", a, k, mode, reverse=True)


def correlate(x: Operand, kernel: Operand, mode: str = "valid") -> Tensor:
    """The cross-correlation of the last axes of `x` with a kernel of one to three axes of fixed extents:
    out[n] = Σ over k of x[n + k] · kernel[k]; axes of `x` before are a batch. `mode` is that of `convolve`;
    as scipy.signal.correlate, and for one axis numpy.correlate."""
    a, k = as_tensors([x, kernel])
    return _correlated("correlate", a, k, mode, reverse=False)


def _correlated(op: str, x: Tensor, kernel: Tensor, mode: str, reverse: bool) -> Tensor:
    count = kernel.ndim
    if mode not in MODES:
        raise UseError(f"{op}: there is no mode {mode!r}", op=op, where=here(),
                       hint=f"use one of {', '.join(MODES)}")
    if not 1 <= count <= 3 or x.ndim < count:
        raise ShapeError(f"{op} takes a kernel of one to three axes, and an array of at least as many", op=op,
                         shapes=[x.shape, kernel.shape], where=here())
    if not all(isinstance(n, int) and n > 0 for n in kernel.shape):
        raise ShapeError(f"{op} takes a kernel of fixed extents >= 1", op=op, shapes=[x.shape, kernel.shape],
                         where=here(), hint="use gf.fft.convolve, or pad the kernel to a fixed extent")
    lead, spatial = x.shape[:x.ndim - count], x.shape[x.ndim - count:]
    padding = tuple(_borders(int(n), mode) for n in kernel.shape)
    weights = flip(kernel) if reverse else kernel
    out = apply("conv", [reshape(x, (-1, 1, *spatial) if lead else (1, 1, *spatial)),
                         reshape(weights, (1, 1, *kernel.shape))], padding=padding)
    return reshape(out, (*lead, *out.shape[2:]))


def _borders(size: int, mode: str) -> tuple[int, int]:
    """The zeros before and after an axis for a kernel of that size."""
    if mode == "full":
        return size - 1, size - 1
    after = (size - 1) // 2
    return (size - 1 - after, after) if mode == "same" else (0, 0)
