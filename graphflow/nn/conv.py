"""Convolutions."""
from __future__ import annotations

from typing import Any

from graphflow import init
from graphflow.compiler.plan.errors import ShapeError
from graphflow.functions import reshape
from graphflow.nn.dense import Activation
from graphflow.nn.geometry import Padding, PerAxis, borders, check_count, check_maps, fixed_extent, per_axis
from graphflow.scope import here
from graphflow.state import Naming, variable
from graphflow.tensor import Tensor, apply


def conv2d(x: Tensor, channels: int, window: PerAxis, stride: PerAxis = 1, padding: Padding = "valid",
           activation: Activation = None, *, dilation: PerAxis = 1, groups: int = 1, use_bias: bool = True,
           weight_init: Any = init.he_normal, bias_init: Any = 0.0, name: str | None = None) -> Tensor:
    """A convolution (cross-correlation) over the last two axes. x: [N, C, H, W]; result: [N, channels, H',
    W'].

    padding: "valid" (none), "same" (zeros, so that H' is H / stride rounded up), a number for all sides, or
    (vertical, horizontal), each a number or a (before, after) pair. groups: the channels are split into so
    many independent convolutions.
    """
    check_maps("conv2d", x, 2)
    check_count("conv2d", "channels", channels)
    check_count("conv2d", "groups", groups)
    size, step, spread = (per_axis(n, v, 2) for n, v in
                          (("window", window), ("stride", stride), ("dilation", dilation)))
    inputs = fixed_extent("conv2d", x, 1, "channels", 4)
    if inputs % groups or channels % groups:
        raise ShapeError(f"{inputs} channels in and {channels} out cannot be split into {groups} groups",
                         op="conv2d", shapes=[x.shape], where=here())
    naming = Naming.of(name, "conv2d")
    weights = variable(naming, "W", (channels, inputs // groups, *size), weight_init, x.dtype)
    sides = borders("conv2d", padding, x, size, step, spread)
    out = apply("conv", [x, weights], stride=step, padding=sides, dilation=spread, groups=groups)
    if use_bias:
        out = out + reshape(variable(naming, "b", (channels,), bias_init, x.dtype), (channels, 1, 1))
    return activation(out) if activation else out
