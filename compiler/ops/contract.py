"""Contractions: matmul, convolution and the two gradients of convolution.

Each set is closed under differentiation: the gradients of `matmul` are `matmul`s with other transposition
flags, so nothing is ever copied to transpose it; `conv`, `conv_input_grad` and `conv_weight_grad` are each
other's gradients, since all three are the same trilinear form with a different one of (x, w, dy) as the
result.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr, Guard
from graphflow.compiler.ops.record import (
    REQUIRED,
    Arg,
    Contract,
    ContractionParts,
    Failure,
    Index,
    Op,
    Point,
    Sample,
    check_operands,
)
from graphflow.compiler.plan.dims import DimLike, floordiv, product
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError


def _one_float_type(op: str, types: Sequence[TensorType]) -> None:
    shapes = [t.shape for t in types]
    if types[0].dtype != types[1].dtype:
        raise DTypeError(f"{op} needs two operands of one element type, "
                         f"got {types[0].dtype} and {types[1].dtype}", op=op, shapes=shapes,
                         hint="cast one of them")
    if not types[0].dtype.is_float:
        raise DTypeError(f"{op} needs floats, got {types[0].dtype}", op=op, shapes=shapes,
                         hint="cast to float32")


# --- matmul

def _matmul_axes(x: Sequence[Any], y: Sequence[Any], attrs: Attrs) -> tuple[Any, Any, Any, Any]:
    """(m, k of x, k of y, n) of the shapes."""
    m, k = (x[-1], x[-2]) if attrs["transpose_x"] else (x[-2], x[-1])
    other, n = (y[-1], y[-2]) if attrs["transpose_y"] else (y[-2], y[-1])
    return m, k, other, n


def _matmul_infer(types: Sequence[TensorType], attrs: Attrs,
                  regions: Sequence[Region]) -> Sequence[TensorType]:
    check_operands("matmul", types, 2)
    _one_float_type("matmul", types)
    x, y = types[0].shape, types[1].shape
    for name, shape in (("first", x), ("second", y)):
        if len(shape) < 2:
            raise ShapeError(f"matmul needs matrices, but its {name} operand has {len(shape)} axes",
                             op="matmul", shapes=[x, y], hint="reshape a vector to one row or one column")
    if x[:-2] != y[:-2]:
        raise ShapeError("matmul needs equal batch axes (all but the last two)", op="matmul", shapes=[x, y],
                         hint="broadcast the batch axes first")
    m, k, other, n = _matmul_axes(x, y, attrs)
    if k != other:
        raise ShapeError(f"matmul contracts an axis of {k} with one of {other}", op="matmul", shapes=[x, y],
                         hint="the last axis of the first operand must equal the last but one of the second")
    return [TensorType(types[0].dtype, (*x[:-2], m, n))]


def _matmul_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, y = arrays
    return [np.matmul(np.swapaxes(x, -1, -2) if attrs["transpose_x"] else x,
                      np.swapaxes(y, -1, -2) if attrs["transpose_y"] else y)]


def _matmul_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, y), dz = node.inputs, cotangents[0]
    tx, ty = node.attrs["transpose_x"], node.attrs["transpose_y"]
    dx = b.matmul(y, dz, transpose_x=ty, transpose_y=True) if tx else b.matmul(dz, y, transpose_y=not ty)
    dy = b.matmul(dz, x, transpose_x=True, transpose_y=tx) if ty else b.matmul(x, dz, transpose_x=not tx)
    return [dx, dy]


def _matmul_parts(p: Point) -> ContractionParts:
    x, y = (v.shape for v in p.node.inputs)
    tx, ty = p.node.attrs["transpose_x"], p.node.attrs["transpose_y"]
    m, k, _, n = _matmul_axes(x, y, p.node.attrs)

    def a(batch: Index, row: Index, inner: Index) -> Expr:
        return p.operand(0, (*batch, *inner, *row) if tx else (*batch, *row, *inner))

    def b(batch: Index, column: Index, inner: Index) -> Expr:
        return p.operand(1, (*batch, *column, *inner) if ty else (*batch, *inner, *column))

    return ContractionParts(x[:-2], (m,), (n,), (k,), a, b,
                            lambda batch, row, column: (*batch, *row, *column))


def _matmul_flops(node: Node) -> DimLike:
    _, k, _, _ = _matmul_axes(node.inputs[0].shape, node.inputs[1].shape, node.attrs)
    return 2 * product(node.types[0].shape) * k


def _matmul_samples() -> list[Sample]:
    flags = [(tx, ty) for tx in (False, True) for ty in (False, True)]
    out = [_matmul_sample((), 3, 5, 4, tx, ty) for tx, ty in flags]
    out += [_matmul_sample((2, 3), 4, 3, 5, tx, ty) for tx, ty in flags]
    out += [_matmul_sample((), *sizes, False, False)
            for sizes in ((1, 1, 1), (0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 7, 1),
                                                                   (17, 33, 19), (7, 1, 16))]
    return [*out, _matmul_sample((0,), 2, 2, 2, False, True), _matmul_sample((1, 1), 1, 4, 9, True, False)]


def _matmul_sample(batch: tuple[int, ...], m: int, k: int, n: int, tx: bool, ty: bool) -> Sample:
    return Sample((Arg((*batch, k, m) if tx else (*batch, m, k)),
                   Arg((*batch, n, k) if ty else (*batch, k, n))),
                  {"transpose_x": tx, "transpose_y": ty})


MATMUL = Op(
    "matmul", "contraction",
    "Matrix product of the last two axes: x[..., m, k] @ y[..., k, n] is [..., m, n]. The batch axes must be "
    "equal. `transpose_x` says that x is given as [..., k, m], `transpose_y` that y is given as [..., n, k].",
    ("x", "y"), _matmul_infer, _matmul_reference, _matmul_gradient, Contract(_matmul_parts),
    attrs={"transpose_x": False, "transpose_y": False}, flops=_matmul_flops, samples=_matmul_samples,
    failures=(
        Failure((Arg((2, 3)), Arg((4, 5))), {}, "contracts an axis of 3 with one of 4"),
        Failure((Arg((2, 3)), Arg((4, 3))), {"transpose_x": True, "transpose_y": True},
                "an axis of 2 with one of 3"),
        Failure((Arg((3,)), Arg((3, 2))), {}, "needs matrices, but its first operand has 1 axes"),
        Failure((Arg((2, 2, 3)), Arg((3, 3, 2))), {}, "equal batch axes"),
        Failure((Arg((2, 3), "f32"), Arg((3, 2), "f64")), {}, "one element type"),
        Failure((Arg((2, 3), "i32"), Arg((3, 2), "i32")), {}, "needs floats"),
    ))


# --- convolution

class Geometry(NamedTuple):
    """What a convolution does along each spatial axis, and its groups."""
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def per_axis(op: str, name: str, given: Any, axes: int, least: int) -> tuple[int, ...]:
    """An attribute that is one integer for all axes or a tuple with one for each, as a tuple."""
    out = tuple(given) if isinstance(given, (tuple, list)) else (given,) * axes
    if len(out) != axes or not all(isinstance(n, int) and n >= least for n in out):
        raise UseError(f"{op} needs a {name} of {axes} integers >= {least} (or one for all), not {given!r}",
                       op=op)
    return out


def per_side(op: str, given: Any, axes: int) -> tuple[tuple[int, int], ...]:
    """A padding that is one integer for all sides or a tuple of (low, high) for each axis, as a tuple of
    pairs."""
    out = tuple(tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in given) \
        if isinstance(given, (tuple, list)) else ((given, given),) * axes
    if len(out) != axes or not all(len(p) == 2 and all(isinstance(n, int) and n >= 0 for n in p)
                                   for p in out):
        raise UseError(f"{op} needs a padding of {axes} pairs (low, high) of integers >= 0 "
                       f"(or one integer for all sides), not {given!r}", op=op)
    return out


def window_extent(op: str, size: DimLike, window: int, stride: int, padding: tuple[int, int], dilation: int,
                  axis: int, shapes: Sequence[Any]) -> DimLike:
    """The number of positions of a window along an axis; ShapeError if it does not fit once."""
    room = size + (padding[0] + padding[1] - dilation * (window - 1) - 1)
    if isinstance(room, int) and room < 0:
        raise ShapeError(f"{op}: a window that spans {dilation * (window - 1) + 1} does not fit into "
                         f"axis {axis}, which has {size} and a padding of {padding[0]} + {padding[1]}", op=op,
                         shapes=shapes, hint="pad more, or use a smaller window")
    return floordiv(room, stride) + 1


def _geometry(op: str, attrs: Attrs, axes: int) -> Geometry:
    groups = attrs["groups"]
    if not isinstance(groups, int) or groups < 1:
        raise UseError(f"{op} needs groups to be an integer >= 1, not {groups!r}", op=op)
    return Geometry(per_axis(op, "stride", attrs["stride"], axes, 1), per_side(op, attrs["padding"], axes),
                    per_axis(op, "dilation", attrs["dilation"], axes, 1), groups)


def _same_attrs(node: Node) -> dict[str, Any]:
    return {name: node.attrs[name] for name in GEOMETRY}


def _check_conv(op: str, types: Sequence[TensorType], x: Sequence[DimLike], w: Sequence[DimLike], attrs: Attrs
                ) -> tuple[DimLike, ...]:
    """Checks input shape `x` and weight shape `w`; gives the output's shape. `types` are the operands, for
    messages."""
    shapes = [t.shape for t in types]
    axes = len(x) - 2
    if not 1 <= axes <= 3 or len(w) != len(x):
        raise ShapeError(f"{op} needs an input [N, C, ...] with 1 to 3 spatial axes and "
                         f"weights [O, C/groups, ...] of as many axes, got {len(x)} and {len(w)} axes", op=op,
                         shapes=shapes)
    g = _geometry(op, attrs, axes)
    if x[1] != w[1] * g.groups:
        raise ShapeError(f"{op}: the input has {x[1]} channels, but the weights are for {w[1] * g.groups} "
                         f"({w[1]} in each of {g.groups} groups)", op=op, shapes=shapes)
    if w[0] % g.groups != 0:
        raise ShapeError(f"{op}: {w[0]} output channels cannot be split into {g.groups} groups", op=op,
                         shapes=shapes)
    out: list[DimLike] = [x[0], w[0]]
    for i in range(axes):
        k = w[2 + i]
        if not isinstance(k, int) or k < 1:
            raise ShapeError(f"{op} needs a kernel of constant size >= 1 along each axis, not {k}", op=op,
                             shapes=shapes)
        out.append(window_extent(op, x[2 + i], k, g.stride[i], g.padding[i], g.dilation[i], 2 + i, shapes))
    return tuple(out)


def _check_output(op: str, types: Sequence[TensorType], dy: Sequence[DimLike],
                  expected: Sequence[DimLike]) -> None:
    if tuple(dy) != tuple(expected):
        wanted = "[" + ", ".join(map(str, expected)) + "]"
        raise ShapeError(f"{op}: the output's gradient must have the shape {wanted} of the convolution's "
                         f"output", op=op,
                         shapes=[t.shape for t in types])


def _conv_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> Sequence[TensorType]:
    check_operands("conv", types, 2)
    _one_float_type("conv", types)
    return [TensorType(types[0].dtype, _check_conv("conv", types, types[0].shape, types[1].shape, attrs))]


def _input_grad_infer(types: Sequence[TensorType], attrs: Attrs,
                      regions: Sequence[Region]) -> Sequence[TensorType]:
    op = "conv_input_grad"
    check_operands(op, types, 2)
    _one_float_type(op, types)
    dy, w = types[0].shape, types[1].shape
    if len(dy) < 3 or len(w) != len(dy) or len(attrs["spatial"]) != len(dy) - 2:
        raise ShapeError(f"{op} needs an output's gradient [N, O, ...], weights of as many axes "
                         "and one size of `spatial` for each spatial axis", op=op, shapes=[dy, w])
    x = (dy[0], w[1] * _geometry(op, attrs, len(dy) - 2).groups, *attrs["spatial"])
    _check_output(op, types, dy, _check_conv(op, types, x, w, attrs))
    return [TensorType(types[0].dtype, x)]


def _weight_grad_infer(types: Sequence[TensorType], attrs: Attrs,
                       regions: Sequence[Region]) -> Sequence[TensorType]:
    op = "conv_weight_grad"
    check_operands(op, types, 2)
    _one_float_type(op, types)
    x, dy = types[0].shape, types[1].shape
    if len(x) < 3 or len(dy) != len(x) or len(attrs["kernel"]) != len(x) - 2:
        raise ShapeError(f"{op} needs an input [N, C, ...], an output's gradient of as many axes "
                         "and one size of `kernel` for each spatial axis", op=op, shapes=[x, dy])
    w = (dy[1], floordiv(x[1], _geometry(op, attrs, len(x) - 2).groups), *attrs["kernel"])
    _check_output(op, types, dy, _check_conv(op, types, x, w, attrs))
    return [TensorType(types[0].dtype, w)]


# References. Letters of the einsums: n image, g group, o and c channels of a group, xyz position, rst kernel.

def _split_groups(a: Any, axis: int, groups: int) -> Any:
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1:])


def _windows(x: Any, kernel: Sequence[int], g: Geometry) -> Any:
    """x[N, C, *spatial] as a view [N, groups, C/groups, *output, *kernel]."""
    axes = tuple(range(2, x.ndim))
    padded = np.pad(x, ((0, 0), (0, 0), *g.padding))
    spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel, g.dilation))
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
    steps = tuple(slice(None, None, s) for s in (*g.stride, *g.dilation))
    return _split_groups(view[(slice(None), slice(None), *steps)], 1, g.groups)


def _conv_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, w = arrays
    axes = x.ndim - 2
    g = _geometry("conv", attrs, axes)
    o, k = "xyz"[:axes], "rst"[:axes]
    y = np.einsum(f"ngc{o}{k},goc{k}->ngo{o}", _windows(x, w.shape[2:], g), _split_groups(w, 0, g.groups),
                  optimize=True)
    return [np.ascontiguousarray(y.reshape(types[0].shape))]


def _weight_grad_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, dy = arrays
    axes = x.ndim - 2
    g = _geometry("conv_weight_grad", attrs, axes)
    o, k = "xyz"[:axes], "rst"[:axes]
    windows = _windows(x, types[0].shape[2:], g)       # type: ignore[arg-type]
    dw = np.einsum(f"ngc{o}{k},ngo{o}->goc{k}", windows, _split_groups(dy, 1, g.groups), optimize=True)
    return [np.ascontiguousarray(dw.reshape(types[0].shape))]


def _input_grad_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    dy, w = arrays
    shape: tuple[int, ...] = types[0].shape            # type: ignore[assignment]
    axes = len(shape) - 2
    g = _geometry("conv_input_grad", attrs, axes)
    padded = [size + low + high for size, (low, high) in zip(shape[2:], g.padding)]
    out = np.zeros((shape[0], g.groups, shape[1] // g.groups, *padded), dy.dtype)
    letters = "xyz"[:axes]
    split_dy, split_w = _split_groups(dy, 1, g.groups), _split_groups(w, 0, g.groups)
    for at in np.ndindex(*w.shape[2:]):
        reached = tuple(slice(r * d, r * d + (size - 1) * s + 1 if size else r * d, s)
                        for r, d, s, size in zip(at, g.dilation, g.stride, dy.shape[2:]))
        tap = split_w[(slice(None), slice(None), slice(None), *at)]
        out[(slice(None), slice(None), slice(None), *reached)] += np.einsum(
            f"ngo{letters},goc->ngc{letters}", split_dy, tap, optimize=True)
    inside = tuple(slice(low, low + size) for size, (low, _) in zip(shape[2:], g.padding))
    return [np.ascontiguousarray(out[(slice(None), slice(None), slice(None), *inside)].reshape(shape))]


def _conv_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, w), dy = node.inputs, cotangents[0]
    return [b.conv_input_grad(dy, w, spatial=x.shape[2:], **_same_attrs(node)),
            b.conv_weight_grad(x, dy, kernel=w.shape[2:], **_same_attrs(node))]


def _input_grad_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (dy, w), dx = node.inputs, cotangents[0]
    return [b.conv(dx, w, **_same_attrs(node)),
            b.conv_weight_grad(dx, dy, kernel=w.shape[2:], **_same_attrs(node))]


def _weight_grad_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, dy), dw = node.inputs, cotangents[0]
    return [b.conv_input_grad(dy, dw, spatial=x.shape[2:], **_same_attrs(node)),
            b.conv(x, dw, **_same_attrs(node))]


# Lowerings. With one group there is no group axis among the batch axes.

def _groups(g: Geometry) -> tuple[int, ...]:
    return (g.groups,) if g.groups > 1 else ()


def _channel(group: Index, channel: DimLike, per_group: DimLike) -> DimLike:
    return group[0] * per_group + channel if group else channel


def _read_input(p: Point, operand: int, image: DimLike, channel: DimLike, out: Index, tap: Index,
                g: Geometry) -> Expr:
    """The input's element under kernel position `tap` of output position `out`; 0 in the padding."""
    at = [o * s + (r * d - low) for o, s, r, d, (low, _) in zip(out, g.stride, tap, g.dilation, g.padding)]
    sizes = p.node.inputs[operand].shape[2:]
    guards = [Guard(i, size) for i, size, sides in zip(at, sizes, g.padding) if sides != (0, 0)]
    return p.operand(operand, (image, channel, *at), guards)


def _conv_parts(p: Point) -> ContractionParts:
    x, w = (v.shape for v in p.node.inputs)
    g = _geometry("conv", p.node.attrs, len(x) - 2)
    outs = floordiv(w[0], g.groups)

    def a(batch: Index, m: Index, k: Index) -> Expr:
        return p.operand(1, (_channel(batch[1:], m[0], outs), *k))

    def b(batch: Index, n: Index, k: Index) -> Expr:
        return _read_input(p, 0, batch[0], _channel(batch[1:], k[0], w[1]), n, k[1:], g)

    return ContractionParts((x[0], *_groups(g)), (outs,), p.node.types[0].shape[2:], w[1:], a, b,
                            lambda batch, m, n: (batch[0], _channel(batch[1:], m[0], outs), *n))


def _weight_grad_parts(p: Point) -> ContractionParts:
    x, dy = (v.shape for v in p.node.inputs)
    w = p.node.types[0].shape
    g = _geometry("conv_weight_grad", p.node.attrs, len(x) - 2)
    outs = floordiv(w[0], g.groups)

    def a(batch: Index, m: Index, k: Index) -> Expr:
        return p.operand(1, (k[0], _channel(batch, m[0], outs), *k[1:]))

    def b(batch: Index, n: Index, k: Index) -> Expr:
        return _read_input(p, 0, k[0], _channel(batch, n[0], w[1]), k[1:], n[1:], g)

    return ContractionParts(_groups(g), (outs,), w[1:], (x[0], *dy[2:]), a, b,
                            lambda batch, m, n: (_channel(batch, m[0], outs), *n))


def _input_grad_parts(p: Point) -> ContractionParts:
    dy, w = (v.shape for v in p.node.inputs)
    g = _geometry("conv_input_grad", p.node.attrs, len(dy) - 2)
    outs = floordiv(w[0], g.groups)

    def a(batch: Index, m: Index, k: Index) -> Expr:
        return p.operand(1, (_channel(batch[1:], k[0], outs), m[0], *k[1:]))

    def b(batch: Index, n: Index, k: Index) -> Expr:
        at: list[DimLike] = []
        guards: list[Guard] = []
        for i, (place, tap) in enumerate(zip(n, k[1:])):
            # stride * the output position, if one fits
            reached = place + (g.padding[i][0] - tap * g.dilation[i])
            at.append(floordiv(reached, g.stride[i]))
            if w[2 + i] != 1 or g.padding[i] != (0, 0):
                guards.append(Guard(at[i], dy[2 + i]))
            if g.stride[i] > 1:
                guards.append(Guard(reached % g.stride[i], 1))
        return p.operand(0, (batch[0], _channel(batch[1:], k[0], outs), *at), guards)

    return ContractionParts((dy[0], *_groups(g)), (w[1],), p.node.types[0].shape[2:], (outs, *w[2:]), a, b,
                            lambda batch, m, n: (batch[0], _channel(batch[1:], m[0], w[1]), *n))


def _conv_flops(output: Callable[[Node], Sequence[DimLike]], weights: Callable[[Node], Sequence[DimLike]]
                ) -> Callable[[Node], DimLike]:
    """Multiplications and additions of the convolution whose output and weights these are; padding counts."""
    return lambda node: 2 * product(output(node)) * product(weights(node)[1:])


# (x shape, w shape, attributes): kept small, for the gradient tests evaluate each many times.
_CONV_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 3, 7), (4, 3, 3), {}),
    ((2, 2, 5, 6), (3, 2, 3, 2), {}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((2, 3, 5, 5), (2, 3, 1, 1), {"stride": (2, 2)}),
    ((1, 2, 7, 6), (3, 2, 3, 3), {"stride": (2, 1), "padding": ((1, 1), (0, 2))}),
    ((2, 2, 6, 7), (2, 2, 2, 3), {"stride": (1, 3), "padding": ((2, 0), (1, 1)), "dilation": (2, 1)}),
    ((1, 4, 5, 4), (6, 2, 3, 3), {"padding": 1, "groups": 2}),
    ((2, 3, 4, 5), (3, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 3}),
    ((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), {"stride": (1, 2, 1), "padding": ((0, 1), (1, 0), (0, 0))}),
    ((0, 2, 4, 4), (3, 2, 3, 3), {"padding": 1}),
    ((2, 0, 4, 4), (3, 0, 3, 3), {}),
    ((1, 2, 4), (0, 2, 2), {}),
    ((1, 1, 0), (2, 1, 2), {"padding": ((1, 1),)}),
)


def _output_shape(x: Sequence[int], w: Sequence[int], attrs: Attrs) -> tuple[int, ...]:
    return _check_conv("conv", [], x, w, {**GEOMETRY, **attrs})           # type: ignore[return-value]


def _conv_samples() -> list[Sample]:
    return [Sample((Arg(x), Arg(w)), attrs) for x, w, attrs in _CONV_CASES]


def _input_grad_samples() -> list[Sample]:
    return [Sample((Arg(_output_shape(x, w, attrs)), Arg(w)), {**attrs, "spatial": x[2:]})
            for x, w, attrs in _CONV_CASES]


def _weight_grad_samples() -> list[Sample]:
    return [Sample((Arg(x), Arg(_output_shape(x, w, attrs))), {**attrs, "kernel": w[2:]})
            for x, w, attrs in _CONV_CASES]


_ATTRS_DOC = ("`stride`, `dilation`: an integer or one for each spatial axis; `padding`: an integer or a "
              "(low, high) pair for each spatial axis, zeros; `groups`: the channels are split into so many "
              "independent convolutions.")

CONV = Op(
    "conv", "contraction",
    "Cross-correlation over 1 to 3 spatial axes: x[N, C, ...] with w[O, C/groups, ...] is [N, O, ...]. "
    + _ATTRS_DOC,
    ("x", "w"), _conv_infer, _conv_reference, _conv_gradient, Contract(_conv_parts), attrs=GEOMETRY,
    flops=_conv_flops(lambda n: n.types[0].shape, lambda n: n.inputs[1].shape), samples=_conv_samples,
    failures=(
        Failure((Arg((1, 3, 5, 5)), Arg((4, 2, 3, 3))), {},
                "the input has 3 channels, but the weights are for 2"),
        Failure((Arg((1, 3, 2, 5)), Arg((4, 3, 3, 3))), {}, "spans 3 does not fit into axis 2"),
        Failure((Arg((1, 3, 4, 5)), Arg((4, 3, 3, 3))), {"dilation": 2}, "spans 5 does not fit into axis 2"),
        Failure((Arg((1, 3)), Arg((4, 3))), {}, "1 to 3 spatial axes"),
        Failure((Arg((1, 3, 5, 5)), Arg((4, 3, 3))), {}, "of as many axes"),
        Failure((Arg((1, 4, 5, 5)), Arg((3, 2, 3, 3))), {"groups": 2}, "cannot be split into 2 groups"),
        Failure((Arg((1, 3, 5, 5)), Arg((4, 3, 3, 3))), {"stride": 0}, "stride of 2 integers >= 1"),
        Failure((Arg((1, 3, 5, 5)), Arg((4, 3, 3, 3))), {"padding": ((1, 1),)}, "padding of 2 pairs"),
        Failure((Arg((1, 3, 5, 5)), Arg((4, 3, 3, 3))), {"groups": 0}, "groups to be an integer >= 1"),
        Failure((Arg((1, 3, 5, 5)), Arg((4, 3, 0, 3))), {}, "constant size >= 1"),
        Failure((Arg((1, 3, 5, 5), "i32"), Arg((4, 3, 3, 3), "i32")), {}, "needs floats"),
    ))

INPUT_GRAD = Op(
    "conv_input_grad", "contraction",
    "The gradient of `conv` for its input, of spatial size `spatial`: dy[N, O, ...] with w[O, C/groups, ...] "
    "is [N, C, ...]; the transposed convolution. " + _ATTRS_DOC,
    ("dy", "w"), _input_grad_infer, _input_grad_reference, _input_grad_gradient, Contract(_input_grad_parts),
    attrs={"spatial": REQUIRED, **GEOMETRY},
    flops=_conv_flops(lambda n: n.inputs[0].shape, lambda n: n.inputs[1].shape), samples=_input_grad_samples,
    failures=(
        Failure((Arg((1, 4, 3, 3)), Arg((4, 3, 3, 3))), {"spatial": (6, 5)},
                "must have the shape [1, 4, 4, 3]"),
        Failure((Arg((1, 4, 3, 3)), Arg((4, 3, 3, 3))), {"spatial": (5,)}, "one size of `spatial`"),
        Failure((Arg((1, 4, 3, 3)), Arg((4, 3, 3, 3))), {}, "needs the attribute 'spatial'"),
    ))

WEIGHT_GRAD = Op(
    "conv_weight_grad", "contraction",
    "The gradient of `conv` for its weights, of spatial size `kernel`: x[N, C, ...] with dy[N, O, ...] is "
    "[O, C/groups, ...]. " + _ATTRS_DOC,
    ("x", "dy"), _weight_grad_infer, _weight_grad_reference, _weight_grad_gradient,
    Contract(_weight_grad_parts), attrs={"kernel": REQUIRED, **GEOMETRY},
    flops=_conv_flops(lambda n: n.inputs[1].shape, lambda n: n.types[0].shape), samples=_weight_grad_samples,
    failures=(
        Failure((Arg((1, 3, 5, 5)), Arg((1, 4, 4, 3))), {"kernel": (3, 3)},
                "must have the shape [1, 4, 3, 3]"),
        Failure((Arg((1, 3, 5, 5)), Arg((1, 4, 3, 3))), {"kernel": (3,)}, "one size of `kernel`"),
    ))

OPS: tuple[Op, ...] = (MATMUL, CONV, INPUT_GRAD, WEIGHT_GRAD)
