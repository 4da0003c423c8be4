"""Windows along one axis as a view, and the addition of windows where they came from: each other's gradients.

Windows along several axes are one `unfold` after another: views of views.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr, Guard
from graphflow.compiler.ops.contract import window_extent
from graphflow.compiler.ops.record import (
    REQUIRED,
    Arg,
    Failure,
    Index,
    Op,
    Point,
    Pointwise,
    Sample,
    check_operands,
)
from graphflow.compiler.plan.dims import DimLike, ceildiv, floordiv, product, symbol
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError


def _check(op: str, x: TensorType, attrs: Attrs, rank: int, names: Sequence[str]) -> None:
    if not isinstance(attrs["axis"], int) or not 0 <= attrs["axis"] < rank:
        raise ShapeError(f"{op}: there is no axis {attrs['axis']} among {rank}", op=op, shapes=[x.shape])
    for name in names:
        if not isinstance(attrs[name], int) or attrs[name] < 1:
            raise UseError(f"{op} needs a {name} >= 1, not {attrs[name]!r}", op=op, shapes=[x.shape])


def _positions(op: str, extent: DimLike, size: int, attrs: Attrs, shapes: Sequence[Any]) -> DimLike:
    return window_extent(op, extent, size, attrs["stride"], (0, 0), attrs["dilation"], attrs["axis"], shapes)


# --- unfold

def _unfold_infer(types: Sequence[TensorType], attrs: Attrs,
                  regions: Sequence[Region]) -> Sequence[TensorType]:
    check_operands("unfold", types, 1)
    (x,), axis, size = types, attrs["axis"], attrs["size"]
    _check("unfold", x, attrs, x.rank, ("size", "stride", "dilation"))
    count = _positions("unfold", x.shape[axis], size, attrs, [x.shape])
    return [TensorType(x.dtype, (*x.shape[:axis], count, *x.shape[axis + 1:], size))]


def _unfold_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    axis, size, stride, dilation = (attrs[name] for name in ("axis", "size", "stride", "dilation"))
    view = np.lib.stride_tricks.sliding_window_view(arrays[0], dilation * (size - 1) + 1, axis=axis)
    return [view[(*(slice(None),) * axis, slice(None, None, stride))][..., ::dilation]]


def _unfold_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    axis = node.attrs["axis"]
    return [b.fold(cotangents[0], axis=axis, extent=node.inputs[0].shape[axis], stride=node.attrs["stride"],
                   dilation=node.attrs["dilation"])]


def _unfold_value(p: Point, index: Index, result: int) -> Expr:
    axis = p.node.attrs["axis"]
    at = index[axis] * p.node.attrs["stride"] + index[-1] * p.node.attrs["dilation"]
    return p.operand(0, (*index[:axis], at, *index[axis + 1:-1]))


# --- fold

def _fold_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> Sequence[TensorType]:
    check_operands("fold", types, 1)
    (x,), axis = types, attrs["axis"]
    _check("fold", x, attrs, x.rank - 1, ("stride", "dilation"))
    if x.dtype.kind not in "fiu":
        raise DTypeError(f"fold adds numbers, not {x.dtype.full_name}", op="fold", shapes=[x.shape],
                         hint="convert it with cast")
    size = x.shape[-1]
    if not isinstance(size, int) or size < 1:
        raise ShapeError(f"fold needs windows of a constant size >= 1, not {size}", op="fold",
                         shapes=[x.shape])
    count = _positions("fold", attrs["extent"], size, attrs, [x.shape])
    if count != x.shape[axis]:
        raise ShapeError(f"fold: an axis of {attrs['extent']} has {count} such windows, not {x.shape[axis]}",
                         op="fold", shapes=[x.shape])
    return [TensorType(x.dtype, (*x.shape[:axis], attrs["extent"], *x.shape[axis + 1:-1]))]


def _fold_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    (x,), (axis, stride, dilation) = arrays, (attrs[name] for name in ("axis", "stride", "dilation"))
    out = np.zeros([int(d) for d in types[0].shape], x.dtype)
    before = (slice(None),) * axis
    for t in range(x.shape[-1]):
        start = t * dilation
        reached = slice(start, start + (x.shape[axis] - 1) * stride + 1 if x.shape[axis] else start, stride)
        out[(*before, reached)] += x[..., t]
    return [out]


def _fold_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return [b.unfold(cotangents[0], axis=node.attrs["axis"], size=node.inputs[0].shape[-1],
                     stride=node.attrs["stride"], dilation=node.attrs["dilation"])]


def _fold_value(p: Point, index: Index, result: int) -> Expr:
    axis, stride, dilation = (p.node.attrs[name] for name in ("axis", "stride", "dilation"))
    count, size = p.node.inputs[0].shape[axis], p.node.inputs[0].shape[-1]
    at = index[axis]
    if dilation == 1:                                  # only the windows that cover the element
        loops = p.loops(ceildiv(size, stride))
        back = symbol(loops[0][0])
        window, place = floordiv(at, stride) - back, at % stride + back * stride
        guards = [Guard(window, count), Guard(place, size)]
    else:
        loops = p.loops(size)
        place = symbol(loops[0][0])
        from_start = at - place * dilation
        window = floordiv(from_start, stride)
        guards = [Guard(window, count), Guard(from_start % stride, 1)]
    return p.reduce("sum", loops, p.operand(0, (*index[:axis], window, *index[axis + 1:], place), guards))


# --- records

# (shape, axis, size, stride, dilation)
_CASES = (((7,), 0, 3, 1, 1), ((2, 9), 1, 4, 2, 1), ((5, 3), 0, 2, 3, 1), ((2, 8, 2), 1, 3, 1, 2),
          ((9, 1), 0, 3, 2, 2), ((4,), 0, 4, 1, 1), ((1,), 0, 1, 1, 1), ((0, 3), 1, 2, 1, 1),
          ((10,), 0, 5, 3, 1))


def _attributes(axis: int, stride: int, dilation: int) -> dict[str, Any]:
    return {"axis": axis, "stride": stride, "dilation": dilation}


def _fold_sample(shape: tuple[int, ...], axis: int, size: int, stride: int, dilation: int) -> Sample:
    count = (shape[axis] - dilation * (size - 1) - 1) // stride + 1
    return Sample((Arg((*shape[:axis], count, *shape[axis + 1:], size)),),
                  {**_attributes(axis, stride, dilation), "extent": shape[axis]})


_X = (Arg((2, 5)),)
_DOC = ("Window number p along `axis` holds the elements p * stride + t * dilation; its own axis, t, is the "
        "last.")

OPS: tuple[Op, ...] = (
    Op("unfold", "view", f"The windows of `size` elements along an axis. {_DOC}", ("x",), _unfold_infer,
       _unfold_reference, _unfold_gradient, Pointwise(_unfold_value),
       attrs={"axis": REQUIRED, "size": REQUIRED, "stride": 1, "dilation": 1},
       samples=lambda: [Sample((Arg(shape),), {**_attributes(axis, stride, dilation), "size": size})
                        for shape, axis, size, stride, dilation in _CASES]
       + [Sample((Arg((6,), dtype),), {"axis": 0, "size": 2}, smooth=False) for dtype in ("i32", "bool")],
       failures=(Failure(_X, {"axis": 2, "size": 2}, "there is no axis 2 among 2"),
                 Failure(_X, {"axis": 1, "size": 0}, "needs a size >= 1"),
                 Failure(_X, {"axis": 1, "size": 2, "stride": 0}, "needs a stride >= 1"),
                 Failure(_X, {"axis": 1, "size": 3, "dilation": 3}, "spans 7 does not fit into axis 1"))),
    Op("fold", "window", f"Zeros of extent `extent` along an axis, to which windows are added. {_DOC}",
       ("x",), _fold_infer, _fold_reference, _fold_gradient, Pointwise(_fold_value),
       attrs={"axis": REQUIRED, "extent": REQUIRED, "stride": 1, "dilation": 1},
       flops=lambda node: product(node.inputs[0].shape),
       samples=lambda: [*(_fold_sample(*case) for case in _CASES),
                        Sample((Arg((5, 2), "i32", -9, 9),), {"axis": 0, "extent": 6}, smooth=False)],
       failures=(Failure(_X, {"axis": 1, "extent": 6}, "there is no axis 1 among 1"),
                 Failure(_X, {"axis": 0, "extent": 7}, "has 3 such windows, not 2"),
                 Failure((Arg((2, 5), "bool"),), {"axis": 0, "extent": 6}, "adds numbers, not bool"))),
)
