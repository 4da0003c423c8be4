"""Pooling."""
from __future__ import annotations

from graphflow.nn.geometry import Padding, PerAxis, borders, check_maps, per_axis
from graphflow.tensor import Tensor, apply


def max_pool2d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid"
               ) -> Tensor:
    """The largest element of each window of the last two axes; padding never wins. stride: the window's size
    without one."""
    check_maps("max_pool2d", x, 2)
    size, step = per_axis("window", window, 2), per_axis("stride", window if stride is None else stride, 2)
    sides = borders("max_pool2d", padding, x, size, step, (1, 1))
    return apply("max_pool", [x], window=size, stride=step, padding=sides)[0]


def avg_pool2d(x: Tensor, window: PerAxis, stride: PerAxis | None = None, padding: Padding = "valid"
               ) -> Tensor:
    """The mean of each window of the last two axes; padding counts as zeros (PyTorch's count_include_pad).
    stride: the window's size without one."""
    check_maps("avg_pool2d", x, 2)
    size, step = per_axis("window", window, 2), per_axis("stride", window if stride is None else stride, 2)
    sides = borders("avg_pool2d", padding, x, size, step, (1, 1))
    return apply("window_sum", [x], window=size, stride=step, padding=sides) / (size[0] * size[1])
