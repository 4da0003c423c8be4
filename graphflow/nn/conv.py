"""Convolutions and transposed convolutions over one to three spatial axes."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphflow import init
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.nn.dense import Activation
from graphflow.nn.geometry import Padding, PerAxis, borders, check_count, check_maps, fixed_extent, per_axis
from graphflow.nn.parameters import layer_parameter
from graphflow.scope import here
from graphflow.shapes import flip as reverse
from graphflow.shapes import reshape
from graphflow.state import Naming
from graphflow.tensor import Tensor, apply, cast


def conv1d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1, padding: Padding = "valid",
           activation: Activation = None, **options: Any) -> Tensor:
    """A convolution over the last axis. x: [N, C, L]; result: [N, channels, L']; else as `conv2d`."""
    return _conv("conv1d", 1, x, channels, window, stride, padding, activation, **options)


def conv2d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1, padding: Padding = "valid",
           activation: Activation = None, *, dilation: PerAxis = 1, groups: int = 1, flip: bool = False,
           use_bias: bool = True, weight_init: Any = init.he_normal, bias_init: Any = 0.0,
           name: str | None = None) -> Tensor:
    """A convolution over the last two axes. x: [N, C, H, W]; result: [N, channels, H', W'], where
    out[n, o, i, j] = b[o] + Σ over c, r, s of W[o, c, r, s] · x[n, c, i · stride + r · dilation, …].

    W: [channels, C / groups, *window], b: [channels]; weight_init and bias_init may be Tensors of these
    shapes, to use as they are.
    stride, dilation: a number, or (vertical, horizontal).
    padding: "valid" (none), "same" (zeros, so that H' is H / stride rounded up), a number for all sides, or
    (vertical, horizontal), each a number or a (before, after) pair.
    groups: the channels are split into so many independent convolutions.
    flip: reads the window reversed along its spatial axes. Without it the operation is, as everywhere in the
    field, what statistics calls a cross-correlation; with it, the convolution of mathematics.
    """
    return _conv("conv2d", 2, x, channels, window, stride, padding, activation, dilation=dilation,
                 groups=groups, flip=flip, use_bias=use_bias, weight_init=weight_init, bias_init=bias_init,
                 name=name)


def conv3d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1, padding: Padding = "valid",
           activation: Activation = None, **options: Any) -> Tensor:
    """A convolution over the last three axes. x: [N, C, D, H, W]; result: [N, channels, D', H', W']; else as
    `conv2d`."""
    return _conv("conv3d", 3, x, channels, window, stride, padding, activation, **options)


def depthwise_conv2d(x: Tensor, window: PerAxis, stride: PerAxis = 1, padding: Padding = "valid",
                     activation: Activation = None, *, multiplier: int = 1, name: str | None = None,
                     **options: Any) -> Tensor:
    """A convolution of each channel on its own, with `multiplier` results each. x: [N, C, H, W]; result:
    [N, C · multiplier, H', W']; W: [C · multiplier, 1, *window]; else as `conv2d`."""
    check_maps("depthwise_conv2d", x, 2)
    check_count("depthwise_conv2d", "multiplier", multiplier)
    channels = fixed_extent("depthwise_conv2d", x, 1, "channels", 4)
    return _conv("depthwise_conv2d", 2, x, channels * multiplier, window, stride, padding, activation,
                 groups=channels, name=name, **options)


def _conv(op: str, axes: int, x: Tensor, channels: int, window: PerAxis, stride: PerAxis, padding: Padding,
          activation: Activation, *, dilation: PerAxis = 1, groups: int = 1, flip: bool = False,
          use_bias: bool = True, weight_init: Any = init.he_normal, bias_init: Any = 0.0,
          name: str | None = None) -> Tensor:
    inputs = _check_channels(op, axes, x, channels, groups)
    size, step, spread = (per_axis(n, v, axes) for n, v in
                          (("window", window), ("stride", stride), ("dilation", dilation)))
    naming = Naming.of(name, op)
    weights = layer_parameter(naming, "W", (channels, inputs // groups, *size), weight_init, x.dtype)
    if flip:
        weights = reverse(weights, tuple(range(2, 2 + axes)))
    sides = borders(op, padding, x, size, step, spread)
    out = apply("conv", [x, weights], stride=step, padding=sides, dilation=spread, groups=groups)
    return _finish(out, naming, channels, use_bias, bias_init, activation)


def conv_transpose1d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1,
                     padding: Padding = "valid", activation: Activation = None, **options: Any) -> Tensor:
    """A transposed convolution over the last axis. x: [N, C, L]; else as `conv_transpose2d`."""
    return _conv_transpose("conv_transpose1d", 1, x, channels, window, stride, padding, activation, **options)


def conv_transpose2d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1,
                     padding: Padding = "valid", activation: Activation = None, *,
                     output_padding: PerAxis = 0, dilation: PerAxis = 1, groups: int = 1,
                     use_bias: bool = True, weight_init: Any = init.he_normal, bias_init: Any = 0.0,
                     name: str | None = None) -> Tensor:
    """The transpose of `conv2d`: the linear map from its result's to its input's shape that its gradient is,
    to enlarge maps. x: [N, C, H, W]; result: [N, channels, H', W'] with
    H' = (H - 1) · stride + dilation · (window - 1) + 1 + output_padding - both paddings.

    W: [C, channels / groups, *window], as of the convolution that goes the other way (and as PyTorch's).
    padding: as for `conv2d`; it crops the result. "same" makes H' = H · stride. output_padding: more rows and
    columns at the end, fewer than the stride.
    """
    return _conv_transpose("conv_transpose2d", 2, x, channels, window, stride, padding, activation,
                           output_padding=output_padding, dilation=dilation, groups=groups,
                           use_bias=use_bias, weight_init=weight_init, bias_init=bias_init, name=name)


def conv_transpose3d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1,
                     padding: Padding = "valid", activation: Activation = None, **options: Any) -> Tensor:
    """A transposed convolution over the last three axes. x: [N, C, D, H, W]; else as `conv_transpose2d`."""
    return _conv_transpose("conv_transpose3d", 3, x, channels, window, stride, padding, activation, **options)


def _conv_transpose(op: str, axes: int, x: Tensor, channels: int, window: PerAxis, stride: PerAxis,
                    padding: Padding, activation: Activation, *, output_padding: PerAxis = 0,
                    dilation: PerAxis = 1, groups: int = 1, use_bias: bool = True,
                    weight_init: Any = init.he_normal, bias_init: Any = 0.0, name: str | None = None
                    ) -> Tensor:
    inputs = _check_channels(op, axes, x, channels, groups)
    size, step, spread = (per_axis(n, v, axes) for n, v in
                          (("window", window), ("stride", stride), ("dilation", dilation)))
    more = per_axis("output_padding", output_padding, axes, 0)
    reach = [(k - 1) * d + 1 for k, d in zip(size, spread)]
    if padding == "same":
        cropped = [max(r - s, 0) for r, s in zip(reach, step)]
        sides = tuple((c // 2, c - c // 2) for c in cropped)
        more = tuple(m + max(s - r, 0) for m, r, s in zip(more, reach, step))
    else:
        sides = borders(op, padding, x, size, step, spread)
    if any(m >= s for m, s in zip(more, step)):
        raise UseError(f"output_padding is {output_padding!r} with a stride of {stride!r}", op=op,
                       shapes=[x.shape], where=here(), hint="it must be less than the stride")
    extents = [(d - 1) * s + r + m - sum(p) for d, s, r, m, p in zip(x.shape[2:], step, reach, more, sides)]
    if any(isinstance(d, int) and d < 0 for d in extents):
        raise ShapeError(f"{op}: the padding crops more than there is: {extents} would be left", op=op,
                         shapes=[x.shape], where=here(), hint="pad less")
    naming = Naming.of(name, op)
    weights = layer_parameter(naming, "W", (inputs, channels // groups, *size), _transposed(weight_init),
                              x.dtype)
    out = apply("conv_input_grad", [x, weights], spatial=tuple(extents), stride=step, padding=sides,
                dilation=spread, groups=groups)
    return _finish(out, naming, channels, use_bias, bias_init, activation)


def _transposed(weight_init: Any) -> Any:
    """Initial values whose scale follows from the fans of the transposed convolution, which are those of the
    weights with the first two axes exchanged."""
    if not callable(weight_init):
        return weight_init

    def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        drawn = weight_init(generator, (shape[1], shape[0], *shape[2:]), dtype)
        return np.ascontiguousarray(np.swapaxes(drawn, 0, 1))
    return draw


def _check_channels(op: str, axes: int, x: Tensor, channels: int, groups: int) -> int:
    """The channels of `x`; ShapeError if they or the result's do not divide into the groups."""
    check_maps(op, x, axes)
    check_count(op, "channels", channels)
    check_count(op, "groups", groups)
    inputs = fixed_extent(op, x, 1, "channels", axes + 2)
    if inputs % groups or channels % groups:
        raise ShapeError(f"{inputs} channels in and {channels} out cannot be split into {groups} groups",
                         op=op, shapes=[x.shape], where=here())
    return inputs


def _finish(out: Tensor, naming: Naming, channels: int, use_bias: bool, bias_init: Any,
            activation: Callable[[Tensor], Tensor] | None) -> Tensor:
    if use_bias:
        bias = layer_parameter(naming, "b", (channels,), bias_init, out.dtype)
        out = out + reshape(cast(bias, out.dtype), (channels, *(1,) * (out.ndim - 2)))
    return activation(out) if activation else out
