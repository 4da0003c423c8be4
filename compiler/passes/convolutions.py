"""Rewrites of convolutions into what computes the same with fewer multiplications.

The gradient for a convolution's input, taken as one contraction, multiplies by every place of the kernel at
every element of the input: by zeros, where the convolution has a stride or no padding. As a matrix product
for each element of the *output*, whose results are then added where they belong (`fold`), it multiplies by
none, but writes what it adds to memory.
"""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.ops.contract import per_axis, per_side
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule
from graphflow.compiler.plan.dims import product, typical

WORTH = 8
"""A product that is written, read and added costs about as much as this many multiplications."""
FULL = 16
"""Channels that are a multiple of this fill the vectors of any target."""
_FEWER, _FEWER_5 = 2, 2.75
"""How many times fewer multiplications a contraction may need for kernels of 3 x 3 or 5 x 5 without a
stride, and for 5 x 5 with so many channels that Winograd's algorithm pays for sure."""
_MANY_CHANNELS = 16


def _input_grad_by_output(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """conv_input_grad(dy, w) = fold(w' dy), where that saves enough multiplications."""
    dy, w = inputs
    spatial, axes = node.attrs["spatial"], len(node.attrs["spatial"])
    few, many = (typical(product(shape)) for shape in (dy.shape[2:], spatial))
    groups, kernel = node.attrs["groups"], w.shape[2:]
    per_group = dy.shape[1] // groups
    zero = not all(isinstance(d, int) and d for d in (*w.shape, few))
    strides = per_axis(node.op, "stride", node.attrs["stride"], axes, 1)
    fewer: float = _FEWER if kernel in ((3, 3), (5, 5)) and strides == (1, 1) else 1
    if fewer > 1 and kernel == (5, 5) and min(map(typical, w.shape[:2])) >= _MANY_CHANNELS:
        fewer = _FEWER_5
    saved = many - fewer * few
    if zero or dy.dtype.bytes < 4 or typical(per_group) * saved <= WORTH * few:
        return None
    images, channels = dy.shape[0], w.shape[1]
    if axes == 2 and groups == 1 and not (channels % FULL or per_group % FULL):
        return _channels_last(b, node, dy, w)
    left = b.reshape(w, shape=(groups, per_group, product(w.shape[1:])))
    left = b.broadcast_to(left, shape=(images, *left.shape))
    right = b.reshape(dy, shape=(images, groups, per_group, product(dy.shape[2:])))
    products = b.matmul(left, right, transpose_x=True)
    out = b.reshape(products, shape=(images, channels * groups, *kernel, *dy.shape[2:]))
    for axis in range(axes - 1, -1, -1):        # the last kernel axis goes first
        out = _folded(b, node, out, axis)
    return out


def _channels_last(b: RewriteBuilder, node: Node, dy: Value, w: Value) -> Value:
    """The same where channels fill vectors: products lie with the channels of a place side by side, as such
    images do (see `layout`)."""
    outputs, channels, *kernel = w.shape
    images, _, *size = dy.shape
    left = b.reshape(b.transpose(dy, perm=(0, 2, 3, 1)), shape=(product((images, *size)), outputs))
    right = b.reshape(b.transpose(w, perm=(0, 2, 3, 1)), shape=(outputs, product(w.shape[1:])))
    out = b.reshape(b.matmul(left, right), shape=(images, *size, *kernel, channels))
    for axis in (1, 0):
        stride = per_axis(node.op, "stride", node.attrs["stride"], 2, 1)[axis]
        dilation = per_axis(node.op, "dilation", node.attrs["dilation"], 2, 1)[axis]
        low, high = per_side(node.op, node.attrs["padding"], 2)[axis]
        extent, rank = node.attrs["spatial"][axis], out.type.rank
        out = b.transpose(out, perm=(*range(3 + axis), *range(4 + axis, rank), 3 + axis))
        out = b.fold(out, axis=1 + axis, extent=extent + low + high, stride=stride, dilation=dilation)
        stops = tuple(low + extent if i == 1 + axis else d for i, d in enumerate(out.shape))
        starts = tuple(low if i == 1 + axis else 0 for i in range(rank - 1))
        out = b.slice(out, starts=starts, stops=stops, steps=(1,) * (rank - 1))
    return b.transpose(out, perm=(0, 3, 1, 2))


def _folded(b: RewriteBuilder, node: Node, x: Value, axis: int) -> Value:
    """x[images, channels, kernel axes 0 ... axis, sizes], added along that spatial axis, without its
    padding."""
    attrs, axes = node.attrs, len(node.attrs["spatial"])
    stride = per_axis(node.op, "stride", attrs["stride"], axes, 1)[axis]
    dilation = per_axis(node.op, "dilation", attrs["dilation"], axes, 1)[axis]
    low, high = per_side(node.op, attrs["padding"], axes)[axis]
    size, tap = attrs["spatial"][axis], 2 + axis
    x = b.transpose(x, perm=(*range(tap), *range(tap + 1, x.type.rank), tap))
    at = 2 + axis + axis                        # behind the kernel axes that are left and the sizes before
    x = b.fold(x, axis=at, extent=size + (low + high), stride=stride, dilation=dilation)
    if (low, high) == (0, 0):
        return x
    bounds = [(low, low + size) if i == at else (0, d) for i, d in enumerate(x.shape)]
    return b.slice(x, starts=tuple(start for start, _ in bounds), stops=tuple(stop for _, stop in bounds),
                   steps=(1,) * x.type.rank)


CONVOLUTIONS: tuple[Rule, ...] = (Rule("input gradient by output", "conv_input_grad", _input_grad_by_output,
                                       "tolerance"),)
"""The table. Stated cost: multiplications, and elements written."""
