"""Reductions over whole axes. The reduced axes leave the shape; who wants them back as 1 says so with
`reshape`.

Over no elements a sum is 0, a product 1, `any` false and `all` true. A maximum over a fixed extent of 0 is
refused; where a symbolic extent turns out to be 0 it is the identity (minus infinity, or the least integer).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr
from graphflow.compiler.ops.elementwise import check_kind
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
from graphflow.compiler.plan.dims import Dim, DimLike, symbol
from graphflow.compiler.plan.dtypes import BOOL, I64, DType
from graphflow.compiler.plan.errors import ShapeError, UseError


def restore(b: Any, value: Value, shape: Sequence[DimLike], axes: Sequence[int]) -> Value:
    """A reduction's result, broadcast back to the shape that was reduced over `axes`."""
    kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
    if kept != value.shape:
        value = b.reshape(value, shape=kept)
    return b.broadcast(value, shape)


def _check_axes(op: str, type: TensorType, axes: Any) -> None:
    if not isinstance(axes, tuple) or not all(isinstance(axis, int) for axis in axes):
        raise UseError(f"{op} takes a tuple of axes, got {axes!r}", op=op)
    for axis in axes:
        if not 0 <= axis < type.rank:
            raise ShapeError(f"{op}: there is no axis {axis} in an array of {type.rank} axes", op=op,
                             shapes=[type.shape])
    if list(axes) != sorted(set(axes)):
        raise UseError(f"{op}: the axes {axes} are not sorted, or one is named twice", op=op)


def _infer(op: str, kinds: str, empty: bool) -> Callable:
    def infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
        check_operands(op, types, 1)
        (x,), axes = types, attrs["axes"]
        check_kind(op, x.dtype, kinds)
        _check_axes(op, x, axes)
        for axis in axes:
            if not empty and x.shape[axis] == 0:
                raise ShapeError(f"{op} over axis {axis}, which has no elements", op=op, shapes=[x.shape])
        return [TensorType(x.dtype, tuple(d for axis, d in enumerate(x.shape) if axis not in axes))]
    return infer


def _lower(kind: str) -> Pointwise:
    def value(p: Point, index: Index, result: int) -> Expr:
        axes, shape = p.node.attrs["axes"], p.node.inputs[0].shape
        if not axes:
            return p.operand(0, index)
        loops = p.loops(*(shape[axis] for axis in axes))
        reduced = {axis: symbol(name) for axis, (name, _) in zip(axes, loops)}
        others = iter(index)
        x = p.operand(0, [reduced[axis] if axis in reduced else next(others) for axis in range(len(shape))])
        return p.reduce(kind, loops, x)
    return Pointwise(value)


def _reference(function: Callable, identity: Callable[[DType], Any] | None = None) -> Callable:
    def reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> list[Any]:
        dtype = types[0].dtype
        more = {"initial": identity(dtype)} if identity else {}
        return [function(arrays[0], axis=attrs["axes"], **more).astype(dtype.numpy)]
    return reference


def _least(dtype: DType) -> Any:
    return -np.inf if dtype.is_float else np.iinfo(dtype.numpy).min


def _greatest(dtype: DType) -> Any:
    return np.inf if dtype.is_float else np.iinfo(dtype.numpy).max


def _sum_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> list[Value | None]:
    return [restore(b, cotangents[0], node.inputs[0].shape, node.attrs["axes"])]


def _extreme_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    x, axes = node.inputs[0], node.attrs["axes"]
    wins = b.eq(x, restore(b, node.result(), x.shape, axes))
    count = b.reduce_sum(b.cast(wins, dtype=x.dtype), axes=axes)
    share = restore(b, b.div(cotangents[0], count), x.shape, axes)
    return [b.where(wins, share, b.zeros(x.type))]


def _prod_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    x, axes = node.inputs[0], node.attrs["axes"]
    none = b.eq(x, 0)
    zeros = b.reduce_sum(b.cast(none, dtype=x.dtype), axes=axes)
    filled = b.where(none, b.constant(1, x.dtype, x.shape), x)
    rest = b.mul(b.reduce_prod(filled, axes=axes), cotangents[0])
    without = b.where(b.eq(zeros, 0), rest, b.zeros(rest.type))
    with_one = b.where(b.eq(zeros, 1), rest, b.zeros(rest.type))
    return [b.where(none, restore(b, with_one, x.shape, axes),
                    b.div(restore(b, without, x.shape, axes), filled))]


_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((5,), (0,)), ((), ()), ((1,), (0,)), ((3, 4), (0,)), ((3, 4), (1,)), ((3, 4), (0, 1)), ((3, 4), ()),
    ((2, 1, 3), (0, 2)), ((2, 3, 1, 5), (1, 3)), ((0, 3), (1,)))
_EMPTY: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (((0,), (0,)), ((3, 0), (1,)), ((0, 3), (0,)))


def _samples(kinds: str, low: float, high: float, smooth: bool, empty: bool, ties: bool) -> list[Sample]:
    cases = _CASES + (_EMPTY if empty else ())
    dtypes = ["float"] if "f" in kinds else []
    dtypes += ["i32", "u8"] if "i" in kinds else ["bool"]
    out = [Sample((Arg(shape, d, 0 if d in ("u8", "bool") else low, high, distinct=ties and d == "float"),),
                  {"axes": axes}, smooth=smooth and d == "float", second=smooth and d == "float"
                  and shape == (5,))
           for d in dtypes for shape, axes in cases]
    if ties:
        out.append(Sample((Arg((4, 5), "i32", 0, 2),), {"axes": (1,)}, smooth=False))
    return out


def _row(name: str, kind: str, kinds: str, doc: str, function: Callable, gradient: Callable | None = None,
         identity: Callable[[DType], Any] | None = None, low: float = -2.0, high: float = 2.0) -> Op:
    good = "float" if "f" in kinds else "bool"
    failures = [Failure((Arg((2, 3), good),), {"axes": (2,)}, "no axis 2 in an array of 2 axes"),
                Failure((Arg((2, 3), good),), {"axes": (1, 0)}, "not sorted"),
                Failure((Arg((2, 3), good),), {"axes": 0}, "takes a tuple of axes"),
                Failure((Arg((2,), "bool" if good == "float" else "i32"),), {"axes": (0,)},
                        "convert it with cast")]
    if identity:
        failures.append(Failure((Arg((2, 0), good),), {"axes": (1,)}, "axis 1, which has no elements"))
    return Op(name, "reduce", doc, ("x",), _infer(name, kinds, identity is None),
              _reference(function, identity), gradient,
              _lower(kind), {"axes": REQUIRED}, flops=lambda node: node.inputs[0].type.size,
              samples=lambda: _samples(kinds, low, high, gradient is not None, identity is None,
                                       identity is not None),
              failures=failures)


def _infer_arg(op: str) -> Callable:
    plain = _infer(op, "fiu", False)

    def infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
        (found,) = plain(types, {"axes": (attrs["axis"],)}, regions)
        return [TensorType(I64, found.shape)]
    return infer


def _lower_arg(kind: str) -> Pointwise:
    def value(p: Point, index: Index, result: int) -> Expr:
        axis = p.node.attrs["axis"]
        extent = p.node.inputs[0].shape[axis]
        loops = p.loops(extent)
        at = symbol(loops[0][0])
        x = p.operand(0, [*index[:axis], at, *index[axis:]])
        found = p.reduce(kind, loops, x, p.index(at, I64), result=1)
        if not isinstance(extent, Dim):
            return found
        some = p.apply("lt", p.const(0, I64), p.index(extent, I64), dtype=BOOL)
        return p.apply("where", some, found, p.const(0, I64), dtype=I64)
    return Pointwise(value)


def _arg_row(name: str, function: Callable, what: str) -> Op:
    def reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> list[Any]:
        x, axis = arrays[0], attrs["axis"]
        return [function(x, axis=axis) if x.shape[axis] else np.zeros(types[0].shape, np.int64)]

    samples = [Sample((Arg(shape, dtype, -2, 2),), {"axis": axis}, smooth=False) for dtype in ("float", "i32")
               for shape, axis in (((5,), 0), ((1,), 0), ((3, 4), 0), ((3, 4), 1), ((0, 3), 1),
                                   ((2, 3, 1, 4), 3))]
    return Op(name, "reduce", f"The position, as int64, of the {what} along one axis: the first among "
              f"equals; NaN counts as the {what}; 0 over no elements.",
              ("x",), _infer_arg(name), reference, None,
              _lower_arg(name),
              {"axis": REQUIRED}, flops=lambda node: node.inputs[0].type.size, samples=lambda: samples,
              failures=[Failure((Arg((2, 3)),), {"axis": 2}, "no axis 2"),
                        Failure((Arg((2, 0)),), {"axis": 1}, "which has no elements"),
                        Failure((Arg((2,), "bool"),), {"axis": 0}, "convert it with cast")])


OPS: tuple[Op, ...] = (
    _row("reduce_sum", "sum", "fiu", "The sum over the axes. Integers wrap.", np.sum, _sum_gradient),
    _row("reduce_prod", "prod", "fiu", "The product over the axes. Integers wrap. The gradient is right with "
         "zeros among the factors, second derivatives only without.",
         np.prod, _prod_gradient, low=0.5, high=2.5),
    _row("reduce_max", "max", "fiu", "The largest over the axes; NaN if one is. Equal largest elements share "
         "the gradient evenly (as in PyTorch's amax).", np.max, _extreme_gradient, _least),
    _row("reduce_min", "min", "fiu", "The smallest over the axes; NaN if one is. Equal smallest elements "
         "share the gradient evenly (as in PyTorch's amin).", np.min, _extreme_gradient, _greatest),
    _row("reduce_any", "any", "b", "Whether one of the bools over the axes holds.", np.any),
    _row("reduce_all", "all", "b", "Whether all bools over the axes hold.", np.all),
    _arg_row("argmax", np.argmax, "largest"),
    _arg_row("argmin", np.argmin, "smallest"),
)
