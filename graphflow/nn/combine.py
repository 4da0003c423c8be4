"""Nets from parts. A part is a function from a Tensor to a Tensor that makes its layers when it is called.

    block = gf.nn.sequential(lambda x: gf.nn.conv2d(x, 16, 3, padding="same"), gf.nn.batch_norm, gf.relu)
    y = gf.nn.residual(x, block)
"""
from __future__ import annotations

from collections.abc import Callable

from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.shapes import concatenate
from graphflow.tensor import Tensor

Part = Callable[[Tensor], Tensor]


def sequential(*parts: Part) -> Part:
    """One part that calls the parts one after another, each on the result of the one before. Every call makes
    new layers; for the same ones again, see `shared`."""
    for number, part in enumerate(parts):
        if not callable(part):
            raise UseError(f"part {number} of sequential is {part!r}, not a function", where=here(),
                           hint="write lambda x: gf.nn.dense(x, 10)")

    def net(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x
    return net


def residual(x: Tensor, body: Part, shortcut: Part | None = None, activation: Part | None = None) -> Tensor:
    """activation(body(x) + shortcut(x)); without a shortcut x itself is added.

    Where the body changes the shape, the shortcut must change it alike: a 1×1 convolution with the body's
    stride. He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.
    """
    out, direct = body(x), x if shortcut is None else shortcut(x)
    if out.shape != direct.shape:
        hint = "pass a shortcut, such as lambda x: gf.nn.conv2d(x, channels, 1, stride)"
        raise ShapeError("residual: the body's result has another shape than what is added to it",
                         op="residual", shapes=[out.shape, direct.shape], where=here(),
                         hint=hint if shortcut is None else "they must agree in every axis")
    return activation(out + direct) if activation else out + direct


def inception(x: Tensor, *branches: Part, axis: int = 1) -> Tensor:
    """The results of the branches, each called on `x`, one after another along the axis: of [N, C, H, W] the
    channels.

    Szegedy and others, "Going deeper with convolutions", CVPR 2015.
    """
    return concatenate([branch(x) for branch in branches], axis)
