"""Ops along an axis that a loop nest can't express: running sums and the like, a linear recurrence, and the
order that sorts. Each is one routine of `graphflow.compiler.kernel.routines`.

Sums of floats run in order, so they have the same bits on every device.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.routines import ROUTINES
from graphflow.compiler.ops.elementwise import check_kind
from graphflow.compiler.ops.record import (
    REQUIRED,
    Arg,
    Failure,
    Op,
    Routine,
    RoutineForm,
    Sample,
    check_operands,
)
from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.dtypes import I64
from graphflow.compiler.plan.errors import ShapeError, UseError

Shapes = Sequence[tuple[DimLike, ...]]
Form = Callable[[Shapes, Attrs], RoutineForm]


def around(shape: Sequence[DimLike], axis: int) -> tuple[DimLike, DimLike, DimLike]:
    """The shape as [O, N, I]: the axes before `axis`, that axis, those behind it."""
    return product(shape[:axis]), shape[axis], product(shape[axis + 1:])


def by_routine(form: Form) -> Callable[[Sequence[Any], Attrs, Sequence[TensorType]], list[Any]]:
    """The reference of an op that is its routine: the routine's own meaning in NumPy."""
    def reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> list[Any]:
        out = [np.empty([int(d) for d in t.shape], t.dtype.numpy) for t in types]
        routine, more, shapes = form([np.shape(x) for x in (*arrays, *out)], attrs)
        every = [np.reshape(x, [int(d) for d in shape]) for x, shape in zip((*arrays, *out), shapes)]
        ROUTINES[routine].run({f.name: x for f, x in zip(ROUTINES[routine].formals, every)}, more)
        return out
    return reference


def _check(op: str, x: TensorType, attrs: Attrs, kinds: str) -> None:
    check_kind(op, x.dtype, kinds)
    axis = attrs["axis"]
    if not isinstance(axis, int) or not 0 <= axis < x.rank:
        raise ShapeError(f"{op}: there is no axis {axis} in an array of {x.rank} axes", op=op,
                         shapes=[x.shape])
    for name in ("reverse", "descending"):
        if not isinstance(attrs.get(name, False), bool):
            raise UseError(f"{name} of {op} is {attrs[name]!r}, not a bool", op=op, shapes=[x.shape])


def _shift(b: Any, x: Value, axis: int, back: bool, fill: float) -> Value:
    """Each element's neighbour along the axis, the next one or the one before (`back`); `fill` at the end."""
    none = [0] * x.type.rank
    one = list(none)
    one[axis] = 1
    low, high = (tuple(one), tuple(none)) if back else (tuple(none), tuple(one))
    padded = b.pad(x, low=low, high=high, interior=tuple(none), value=fill)
    starts = none if back else one
    stops = tuple(s + d for s, d in zip(starts, x.shape))
    return b.slice(padded, starts=tuple(starts), stops=stops, steps=(1,) * x.type.rank)


# --- running sums, products, extremes

def _cumulative_infer(op: str) -> Callable[..., list[TensorType]]:
    def infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
        check_operands(op, types, 1)
        _check(op, types[0], attrs, "fiu")
        return [types[0]]
    return infer


def _cumulative_form(kind: str) -> Form:
    def form(shapes: Shapes, attrs: Attrs) -> RoutineForm:
        shape = around(shapes[0], attrs["axis"])
        return RoutineForm("cumulative", {"kind": kind, "reverse": attrs["reverse"]}, (shape, shape))
    return form


def _sum_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> list[Value | None]:
    return [b.cumsum(cotangents[0], axis=node.attrs["axis"], reverse=not node.attrs["reverse"])]


def _prod_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> list[Value | None]:
    """dx[s] = (product before s) * R[s], where R[s] is the sum over t >= s of dy[t] times the product between
    s and t: a linear recurrence from the other end. There is no division, so it is right with zeros."""
    x, axis, reverse = node.inputs[0], node.attrs["axis"], node.attrs["reverse"]
    before = _shift(b, node.result(), axis, not reverse, 1.0)
    behind = _shift(b, x, axis, reverse, 0.0)
    rest = b.linear_recurrence(behind, cotangents[0], axis=axis, reverse=not reverse)
    return [b.mul(before, rest)]


def _extreme_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> list[Value | None]:
    """To the latest element that the extreme is."""
    (x,), y, axis = node.inputs, node.result(), node.attrs["axis"]
    own = b.logical_or(b.eq(x, y), b.isnan(x))
    at = b.iota(shape=x.shape, axis=axis, dtype=I64)
    if node.attrs["reverse"]:
        last = b.where(own, at, b.constant(2 ** 62, I64, x.shape))
        winner = b.cummin(last, axis=axis, reverse=True)
    else:
        winner = b.cummax(b.where(own, at, b.constant(0, I64, x.shape)), axis=axis)
    return [b.put_along_axis_add(winner, cotangents[0], axis=axis, size=x.shape[axis])]


_SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((5,), 0), ((1,), 0), ((3, 4), 0), ((3, 4), 1), ((2, 3, 5), 1), ((3, 37), 0), ((2, 7, 1), 1), ((0, 3), 1),
    ((3, 0), 1), ((2, 0, 3), 0))


def _cumulative_samples(low: float, high: float, distinct: bool) -> list[Sample]:
    out = [Sample((Arg(shape, "float", low, high, distinct),), {"axis": axis, "reverse": reverse},
                  second=not distinct and shape == (5,))
           for reverse in (False, True) for shape, axis in _SHAPES]
    return [*out, *(Sample((Arg((4, 6), dtype, -2, 3),), {"axis": 1}, False, False)
                    for dtype in ("i32", "u8", "i64"))]


_FAILURES = (Failure((Arg((2, 3)),), {"axis": 2}, "no axis 2 in an array of 2 axes"),
             Failure((Arg((2,), "bool"),), {"axis": 0}, "convert it with cast"))


def _cumulative_row(name: str, kind: str, doc: str, gradient: Any, low: float = -2.0, high: float = 2.0,
                    distinct: bool = False) -> Op:
    form = _cumulative_form(kind)
    return Op(name, "routine", doc, ("x",), _cumulative_infer(name), by_routine(form), gradient,
              Routine(form), {"axis": REQUIRED, "reverse": False}, flops=lambda node: node.types[0].size,
              samples=lambda: _cumulative_samples(low, high, distinct),
              failures=(*_FAILURES, Failure((Arg((2, 3)),), {"axis": 0, "reverse": 1}, "reverse of")))


# --- the linear recurrence

def _recurrence_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]
                      ) -> list[TensorType]:
    check_operands("linear_recurrence", types, 2)
    _check("linear_recurrence", types[0], attrs, "f")
    if types[0] != types[1]:
        raise ShapeError(f"linear_recurrence takes two arrays of one type, not {types[0]} and {types[1]}",
                         op="linear_recurrence", shapes=[t.shape for t in types])
    return [types[1]]


def _recurrence_form(shapes: Shapes, attrs: Attrs) -> RoutineForm:
    shape = around(shapes[0], attrs["axis"])
    return RoutineForm("recurrence", {"reverse": attrs["reverse"]}, (shape,) * 3)


def _recurrence_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> list[Value | None]:
    axis, reverse = node.attrs["axis"], node.attrs["reverse"]
    behind = _shift(b, node.inputs[0], axis, reverse, 0.0)
    total = b.linear_recurrence(behind, cotangents[0], axis=axis, reverse=not reverse)
    return [b.mul(total, _shift(b, node.result(), axis, not reverse, 0.0)), total]


def _recurrence_samples() -> list[Sample]:
    return [Sample((Arg(shape), Arg(shape)), {"axis": axis, "reverse": reverse}, second=shape == (5,))
            for reverse in (False, True) for shape, axis in _SHAPES]


# --- the order that sorts

def _argsort_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("argsort", types, 1)
    _check("argsort", types[0], attrs, "fiu")
    return [TensorType(I64, types[0].shape)]


def _argsort_form(shapes: Shapes, attrs: Attrs) -> RoutineForm:
    shape = around(shapes[0], attrs["axis"])
    return RoutineForm("argsort", {"descending": attrs["descending"]}, (shape, shape))


def _argsort_samples() -> list[Sample]:
    out = [Sample((Arg(shape),), {"axis": axis, "descending": descending}, False, False)
           for descending in (False, True) for shape, axis in (*_SHAPES, ((2, 100), 1), ((70, 3), 0))]
    return [*out, *(Sample((Arg((3, 40), dtype, -3, 3),), {"axis": 1, "descending": descending}, False, False)
                    for dtype in ("i32", "u8", "u32", "i64") for descending in (False, True))]


OPS: tuple[Op, ...] = (
    _cumulative_row("cumsum", "sum", "The sum of all elements up to each along the axis, in order; from the "
                    "other end if `reverse`. Integers wrap.", _sum_gradient),
    _cumulative_row("cumprod", "prod", "The product of all elements up to each along the axis, in order; "
                    "from the other end if `reverse`. Integers wrap. The gradient is right with zeros among "
                    "the factors.", _prod_gradient),
    _cumulative_row("cummax", "max", "The largest of all elements up to each along the axis; NaN from the "
                    "first NaN on. Of equal largest elements the latest gets the gradient.",
                    _extreme_gradient, distinct=True),
    _cumulative_row("cummin", "min", "The smallest of all elements up to each along the axis; NaN from the "
                    "first NaN on. Of equal smallest elements the latest gets the gradient.",
                    _extreme_gradient, distinct=True),
    Op("linear_recurrence", "routine",
       "y[t] = a[t] * y[t-1] + b[t] along the axis, from y[-1] = 0; if `reverse`, from the other end with "
       "y[t+1]. Rounded after the product and after the sum.",
       ("a", "b"), _recurrence_infer, by_routine(_recurrence_form), _recurrence_gradient,
       Routine(_recurrence_form), {"axis": REQUIRED, "reverse": False},
       flops=lambda node: node.types[0].size * 2, samples=_recurrence_samples,
       failures=(Failure((Arg((2, 3)), Arg((2, 4))), {"axis": 0}, "two arrays of one type"),
                 Failure((Arg((2, 3)), Arg((2, 3))), {"axis": -1}, "no axis -1"),
                 Failure((Arg((2,), "i32"), Arg((2,), "i32")), {"axis": 0}, "convert it with cast"))),
    Op("argsort", "routine",
       "The positions, as int64, of the elements in rising order along the axis, or in falling order if "
       "`descending`. Equal elements keep their order; NaN counts as the greatest.",
       ("x",), _argsort_infer, by_routine(_argsort_form), None, Routine(_argsort_form),
       {"axis": REQUIRED, "descending": False}, flops=lambda node: node.types[0].size * 16,
       samples=_argsort_samples,
       failures=(*_FAILURES, Failure((Arg((2, 3)),), {"axis": 0, "descending": 0}, "descending of"))),
)
