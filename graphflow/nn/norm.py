"""Normalisation of activations and of weights.

All compute y = (x - mean) / sqrt(variance + eps) · scale + b, or a part of it; they differ in what the mean
and the variance are taken over. Scale and bias are the parameters ``NAME.scale`` and ``NAME.b``.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.arguments import as_axes
from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.creation import extent
from graphflow.nn.geometry import check_count, check_float, fixed_extent
from graphflow.nn.parameters import layer_parameter
from graphflow.reductions import mean
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.shapes import reshape
from graphflow.state import Naming, track, variable
from graphflow.tensor import Tensor, apply, cast, elementwise


def batch_norm(x: Tensor, *, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True,
               scale_init: Any = 1.0, bias_init: Any = 0.0, name: str | None = None) -> Tensor:
    """Each channel normalised over the batch and the spatial axes. x: [N, C, ...].

    In training programs mean and variance are the batch's, and the running statistics ``NAME.mean`` and
    ``NAME.variance`` move towards them with every call: r = (1 - momentum) r + momentum · new, where the
    variance is the unbiased one, as in PyTorch. Other programs use the running statistics. Inside a loop or a
    branch they can't be updated, so a training program refuses that.
    Ioffe and Szegedy, "Batch normalization", ICML 2015.
    """
    check_float("batch_norm", x)
    channels = fixed_extent("batch_norm", x, 1, "channels", 2)
    if not 0 <= momentum <= 1:
        raise UseError(f"momentum is {momentum!r}", op="batch_norm", shapes=[x.shape], where=here(),
                       hint="use a number from 0 to 1: how far the running statistics move in one step")
    naming, dtype, x = Naming.of(name, "batch_norm"), x.dtype, _widened(x)
    axes, wide = (0, *range(2, x.ndim)), (1, channels, *(1,) * (x.ndim - 2))
    running_mean = variable(naming, "mean", (channels,), 0.0, x.dtype, "statistic")
    running_variance = variable(naming, "variance", (channels,), 1.0, x.dtype, "statistic")
    training = apply("training", [])
    batch_mean = mean(x, axes)
    middle = elementwise("where", training, batch_mean, running_mean)
    centred = x - reshape(middle, wide)
    batch_variance = mean(centred * centred, axes)
    spread = elementwise("where", training, batch_variance, running_variance)
    count = extent(product(x.shape[a] for a in axes), x.dtype)
    unbiased = batch_variance * (count / elementwise("maximum", count - 1, 1.0))
    track(running_mean, middle, lambda old: old * (1 - momentum) + batch_mean * momentum)
    track(running_variance, spread, lambda old: old * (1 - momentum) + unbiased * momentum)
    factor = elementwise("rsqrt", spread + eps)
    if affine:
        factor = factor * layer_parameter(naming, "scale", (channels,), scale_init, x.dtype)
    out = centred * reshape(factor, wide)
    if affine:
        out = out + reshape(layer_parameter(naming, "b", (channels,), bias_init, x.dtype), wide)
    return cast(out, dtype)


def layer_norm(x: Tensor, axis: int | Sequence[int] = -1, *, eps: float = 1e-5, affine: bool = True,
               use_bias: bool = True, scale_init: Any = 1.0, bias_init: Any = 0.0, name: str | None = None
               ) -> Tensor:
    """Each sample normalised over the axes named, which scale and bias have too. x: [N, ...].

    Ba, Kiros and Hinton, "Layer normalization", 2016.
    """
    check_float("layer_norm", x)
    axes = as_axes(x, axis, "layer_norm")
    out = _normalised(_widened(x), axes, eps)
    out = _affine("layer_norm", out, axes, affine, affine and use_bias, scale_init, bias_init, name)
    return cast(out, x.dtype)


def rms_norm(x: Tensor, axis: int | Sequence[int] = -1, *, eps: float = 1e-6, affine: bool = True,
             scale_init: Any = 1.0, name: str | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) · scale, with the mean over the axes named: a layer norm without centring.

    Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """
    check_float("rms_norm", x)
    axes = as_axes(x, axis, "rms_norm")
    wide = _widened(x)
    out = wide * elementwise("rsqrt", mean(wide * wide, axes, keepdims=True) + eps)
    return cast(_affine("rms_norm", out, axes, affine, False, scale_init, 0.0, name), x.dtype)


def group_norm(x: Tensor, groups: int, *, eps: float = 1e-5, affine: bool = True, scale_init: Any = 1.0,
               bias_init: Any = 0.0, name: str | None = None) -> Tensor:
    """Each sample's channels normalised in so many groups, over these and the spatial axes. x: [N, C, ...];
    scale and bias are per channel. Wu and He, "Group normalization", ECCV 2018."""
    return _group_norm("group_norm", x, groups, eps, affine, scale_init, bias_init, name)


def instance_norm(x: Tensor, *, eps: float = 1e-5, affine: bool = False, scale_init: Any = 1.0,
                  bias_init: Any = 0.0, name: str | None = None) -> Tensor:
    """Each map of each sample normalised over its spatial axes. x: [N, C, ...].

    Ulyanov, Vedaldi and Lempitsky, "Instance normalization", 2016.
    """
    check_float("instance_norm", x)
    channels = fixed_extent("instance_norm", x, 1, "channels", 3)
    return _group_norm("instance_norm", x, channels, eps, affine, scale_init, bias_init, name)


def local_response_norm(x: Tensor, size: int, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
                        ) -> Tensor:
    """Each element divided by (k + alpha · the mean square of `size` neighbouring channels)^beta; channels
    beyond the ends count as zeros. x: [N, C, ...].

    Krizhevsky, Sutskever and Hinton, NIPS 2012, who take the sum, not the mean: their numbers are size 5,
    k 2, beta 0.75 and an alpha of 5 · 1e-4 here, as in PyTorch and Caffe.
    """
    check_float("local_response_norm", x)
    check_count("local_response_norm", "size", size)
    if x.ndim < 2:
        raise ShapeError("local_response_norm takes [N, C, ...]", op="local_response_norm", shapes=[x.shape],
                         where=here())
    wide = _widened(x)
    across = reshape(wide, (x.shape[0], 1, x.shape[1], product(x.shape[2:])))
    squares = apply("window_sum", [across * across], window=(size, 1), stride=(1, 1),
                    padding=((size // 2, (size - 1) // 2), (0, 0)))
    return cast(wide * reshape(elementwise("pow", squares * (alpha / size) + k, -beta), x.shape), x.dtype)


def weight_norm(direction: Tensor, axis: int, *, scale_init: Any = 1.0, name: str | None = None) -> Tensor:
    """Weights by direction and length: direction / ‖direction‖ · scale, with a length (``NAME.scale``) for
    each place along the axis, the axis of the outputs: 1 for dense layers, 0 for convolutions.

        gf.nn.dense(x, 10, weight_init=gf.nn.weight_norm(gf.parameter((20, 10), gf.init.normal(0.05)), 1))

    Salimans and Kingma, "Weight normalization", NIPS 2016.
    """
    check_float("weight_norm", direction)
    (kept,) = as_axes(direction, axis, "weight_norm")
    rest = tuple(a for a in range(direction.ndim) if a != kept)
    wide = tuple(d if a == kept else 1 for a, d in enumerate(direction.shape))
    count = fixed_extent("weight_norm", direction, kept, "outputs", 1)
    scale = layer_parameter(Naming.of(name, "weight_norm"), "scale", (count,), scale_init, direction.dtype)
    length = elementwise("sqrt", total(direction * direction, rest))
    return direction * reshape(scale / length, wide)


def _widened(x: Tensor) -> Tensor:
    return cast(x, F32) if x.dtype.is_half else x


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - mean(x, axes, keepdims=True)
    return centred * elementwise("rsqrt", mean(centred * centred, axes, keepdims=True) + eps)


def _group_norm(op: str, x: Tensor, groups: int, eps: float, affine: bool, scale_init: Any, bias_init: Any,
                name: str | None) -> Tensor:
    check_float(op, x)
    check_count(op, "groups", groups)
    channels = fixed_extent(op, x, 1, "channels", 3)
    if channels % groups:
        raise ShapeError(f"{channels} channels cannot be split into {groups} groups", op=op, shapes=[x.shape],
                         where=here())
    grouped = reshape(_widened(x), (x.shape[0], groups, channels // groups * product(x.shape[2:])))
    out = reshape(_normalised(grouped, (2,), eps), x.shape)
    return cast(_affine(op, out, (1,), affine, affine, scale_init, bias_init, name), x.dtype)


def _affine(op: str, x: Tensor, axes: tuple[int, ...], scaled: bool, biased: bool, scale_init: Any,
            bias_init: Any, name: str | None) -> Tensor:
    """x · scale + b, or what is asked for of it, with parameters that have the axes' extents."""
    naming = Naming.of(name, op)
    shape = tuple(fixed_extent(op, x, a, "elements to scale", 1) for a in axes) if scaled or biased else ()
    wide: tuple[DimLike, ...] = tuple(d if a in axes else 1 for a, d in enumerate(x.shape))
    if scaled:
        x = x * reshape(layer_parameter(naming, "scale", shape, scale_init, x.dtype), wide)
    return x + reshape(layer_parameter(naming, "b", shape, bias_init, x.dtype), wide) if biased else x
