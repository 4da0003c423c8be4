"""Reading and adding along loaded indices. The reads and the additions are each other's gradients.

An index outside its axis is an error of the caller, which the language guards against before the step; the
references raise IndexError. The lowerings never leave their buffers: such a read gives 0 and such an addition
goes nowhere.

The additions and `scatter_set` are routines. Each element of the result has one owner, which follows the
indices in their order: no atomics, and the same bits for any number of threads.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr, Guard
from graphflow.compiler.ops.record import (
    REQUIRED,
    Arg,
    Failure,
    Index,
    Op,
    Point,
    Pointwise,
    Routine,
    RoutineForm,
    Sample,
    check_operands,
)
from graphflow.compiler.ops.routine import Shapes, around
from graphflow.compiler.plan.dims import Dim, product
from graphflow.compiler.plan.dtypes import I32, I64
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError


def _check(op: str, types: Sequence[TensorType], indices: int, axis: Any, rank: int) -> None:
    """Checks that operand `indices` holds integers and that there is such an axis among `rank`."""
    shapes = [t.shape for t in types]
    if not types[indices].dtype.is_integer:
        raise DTypeError(f"{op} needs integer indices, got {types[indices].dtype}", op=op, shapes=shapes)
    if not isinstance(axis, int) or not 0 <= axis < rank:
        raise ShapeError(f"{op}: there is no axis {axis} among {rank}", op=op, shapes=shapes)


def _check_addition(op: str, types: Sequence[TensorType], attrs: Attrs) -> None:
    check_operands(op, types, 2)
    size = attrs["size"]
    if not isinstance(size, Dim) and (not isinstance(size, int) or size < 0):
        raise UseError(f"{op} needs a size >= 0, not {size!r}", op=op, shapes=[t.shape for t in types])
    if types[1].dtype.kind == "b":
        raise DTypeError(f"{op} adds numbers, not bool", op=op, shapes=[t.shape for t in types])


def _in_range(indices: Any, size: int) -> Any:
    """The indices as int64; IndexError for the first that is outside 0..size-1."""
    wrong = (indices < 0) | (indices >= size)
    if np.any(wrong):
        raise IndexError(f"index {indices[wrong].flat[0]} is outside an axis of {size} elements")
    return indices.astype(np.int64)


# --- gather, scatter_add: whole slices

def _gather_infer(types: Sequence[TensorType], attrs: Attrs,
                  regions: Sequence[Region]) -> Sequence[TensorType]:
    check_operands("gather", types, 2)
    x, axis = types[0].shape, attrs["axis"]
    _check("gather", types, 1, axis, len(x))
    return [TensorType(types[0].dtype, (*x[:axis], *types[1].shape, *x[axis + 1:]))]


def _gather_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, indices = arrays
    return [np.take(x, _in_range(indices, x.shape[attrs["axis"]]), axis=attrs["axis"])]


def _gather_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, indices), axis = node.inputs, node.attrs["axis"]
    return [b.scatter_add(indices, cotangents[0], axis=axis, size=x.shape[axis]), None]


def _gather_value(p: Point, index: Index, result: int) -> Expr:
    x, indices = p.node.inputs
    axis, end = p.node.attrs["axis"], p.node.attrs["axis"] + len(indices.shape)
    at = p.indirect(p.operand(1, index[axis:end]))
    return p.operand(0, (*index[:axis], at, *index[end:]), [Guard(at, x.shape[axis])])


def _scatter_add_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]
                       ) -> Sequence[TensorType]:
    _check_addition("scatter_add", types, attrs)
    (indices, updates), axis = (t.shape for t in types), attrs["axis"]
    _check("scatter_add", types, 0, axis, len(updates) - len(indices) + 1)
    end = axis + len(indices)
    if updates[axis:end] != indices:
        raise ShapeError(f"scatter_add: axes {axis} to {end - 1} of the updates must be those of the indices",
                         op="scatter_add", shapes=[indices, updates])
    return [TensorType(types[1].dtype, (*updates[:axis], attrs["size"], *updates[end:]))]


def _scatter_add_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    indices, updates = arrays
    axis, shape = attrs["axis"], tuple(int(d) for d in types[0].shape)
    out = np.zeros(shape, updates.dtype)
    chosen = _in_range(indices, out.shape[axis])
    np.add.at(out, (*(slice(None),) * axis, chosen), updates)
    return [out]


def _scatter_add_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return [None, b.gather(cotangents[0], node.inputs[0], axis=node.attrs["axis"])]


def _scatter_add_form(shapes: Shapes, attrs: Attrs) -> RoutineForm:
    indices, _, result = shapes
    before, size, behind = around(result, attrs["axis"])
    count = product(indices)
    return RoutineForm("scatter_add", {}, ((count,), (before, count, behind), (before, size, behind)))


# --- scatter_set

def _scatter_set_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]
                       ) -> Sequence[TensorType]:
    check_operands("scatter_set", types, 3)
    (x, indices, updates), axis = (t.shape for t in types), attrs["axis"]
    _check("scatter_set", types, 1, axis, len(x))
    if updates != (*x[:axis], *indices, *x[axis + 1:]) or types[0].dtype != types[2].dtype:
        raise ShapeError("scatter_set needs a slice of x for each index", op="scatter_set",
                         shapes=[x, indices, updates])
    return [types[0]]


def _scatter_set_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, indices, updates = arrays
    axis, out = attrs["axis"], x.copy()
    chosen = _in_range(indices, x.shape[axis])
    before = (slice(None),) * axis
    for at in np.ndindex(*indices.shape):
        out[(*before, chosen[at])] = updates[(*before, *at)]
    return [out]


def _scatter_set_form(shapes: Shapes, attrs: Attrs) -> RoutineForm:
    x = around(shapes[0], attrs["axis"])
    count = product(shapes[1])
    return RoutineForm("scatter_set", {}, (x, (count,), (x[0], count, x[2]), x))


def _scatter_set_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> Sequence[Value | None]:
    """An update that a later one replaces gets nothing; `last` has the number of each place's last one."""
    x, indices, updates = node.inputs
    axis = node.attrs["axis"]
    size, count = x.shape[axis], product(indices.shape)
    number = b.reshape(b.iota(shape=(count,), axis=0, dtype=I64), shape=indices.shape)
    last = b.scatter_set(b.constant(-1, I64, (size,)), indices, number, axis=0)
    wins = b.eq(b.gather(last, indices, axis=0), number)
    ends = (1,) * (x.type.rank - 1 - axis)
    wins = b.broadcast(b.reshape(wins, shape=(*indices.shape, *ends)), updates.shape)
    taken = b.gather(cotangents[0], indices, axis=axis)
    return [b.scatter_set(cotangents[0], indices, b.zeros(updates.type), axis=axis), None,
            b.where(wins, taken, b.zeros(updates.type))]


# --- take_along_axis, put_along_axis_add: element by element

def _same_but(op: str, axis: int, types: Sequence[TensorType]) -> None:
    first, second = types[0].shape, types[1].shape
    if len(first) != len(second):
        raise ShapeError(f"{op} needs as many axes of indices as of elements, got {len(first)} and "
                         f"{len(second)}",
                         op=op, shapes=[first, second])
    for i, (a, b) in enumerate(zip(first, second)):
        if i != axis and a != b:
            raise ShapeError(f"{op}: axis {i} is {a} in one operand and {b} in the other", op=op,
                             shapes=[first, second])


def _take_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> Sequence[TensorType]:
    check_operands("take_along_axis", types, 2)
    _check("take_along_axis", types, 1, attrs["axis"], types[0].rank)
    _same_but("take_along_axis", attrs["axis"], types)
    return [TensorType(types[0].dtype, types[1].shape)]


def _take_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, indices = arrays
    return [np.take_along_axis(x, _in_range(indices, x.shape[attrs["axis"]]), axis=attrs["axis"])]


def _take_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, indices), axis = node.inputs, node.attrs["axis"]
    if indices.shape[axis] != 1:
        return [b.put_along_axis_add(indices, cotangents[0], axis=axis, size=x.shape[axis]), None]
    # One index in each row (a label): a comparison all along the row, which fuses with what is around it.
    compared = indices if indices.dtype.bytes >= 4 else b.cast(indices, dtype=I32)
    here = b.eq(b.broadcast(compared, x.shape), b.iota(shape=x.shape, axis=axis, dtype=compared.dtype))
    return [b.where(here, b.broadcast(cotangents[0], x.shape), b.zeros(x.type)), None]


def _take_value(p: Point, index: Index, result: int) -> Expr:
    axis = p.node.attrs["axis"]
    at = p.indirect(p.operand(1, index))
    return p.operand(0, (*index[:axis], at, *index[axis + 1:]), [Guard(at, p.node.inputs[0].shape[axis])])


def _put_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> Sequence[TensorType]:
    _check_addition("put_along_axis_add", types, attrs)
    _check("put_along_axis_add", types, 0, attrs["axis"], types[0].rank)
    if types[0].shape != types[1].shape:
        raise ShapeError("put_along_axis_add needs one index for each update", op="put_along_axis_add",
                         shapes=[t.shape for t in types])
    axis, shape = attrs["axis"], types[0].shape
    return [TensorType(types[1].dtype, (*shape[:axis], attrs["size"], *shape[axis + 1:]))]


def _put_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    indices, updates = arrays
    axis, shape = attrs["axis"], tuple(int(d) for d in types[0].shape)
    out = np.zeros(shape, updates.dtype)
    where = list(np.indices(indices.shape, sparse=True))
    where[axis] = _in_range(indices, out.shape[axis])
    np.add.at(out, tuple(where), updates)
    return [out]


def _put_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return [None, b.take_along_axis(cotangents[0], node.inputs[0], axis=node.attrs["axis"])]


def _put_form(shapes: Shapes, attrs: Attrs) -> RoutineForm:
    """Where there is one row only, it is a `scatter_add`, which threads share."""
    axis = attrs["axis"]
    given, result = around(shapes[0], axis), around(shapes[2], axis)
    if given[0] == given[2] == 1:
        return RoutineForm("scatter_add", {}, ((given[1],), given, result))
    return RoutineForm("put_add", {}, (given, given, result))


# --- samples and records

def _indices(shape: tuple[int, ...], size: int, dtype: str = "i32") -> Arg:
    return Arg(shape, dtype, 0, max(size - 1, 0))


# (shape of x, shape of the indices, axis)
_SLICES = (((5, 3), (4,), 0), ((5, 3), (2, 3), 0), ((2, 7, 3), (4,), 1), ((2, 3, 4), (5,), 2), ((6,), (), 0),
           ((1, 1), (1,), 0), ((5, 3), (0,), 0), ((5, 0), (2,), 0), ((3, 17), (1, 2, 1), 1))
_ELEMENTS = (((4, 5), (4, 1), 1), ((4, 5), (4, 3), 1), ((3, 4), (6, 4), 0), ((2, 3, 4), (2, 2, 4), 1),
             ((7,), (9,), 0), ((1, 1), (1, 1), 1), ((0, 5), (0, 1), 1), ((3, 5), (3, 0), 1))


def _gather_samples() -> list[Sample]:
    out = [Sample((Arg(x), _indices(i, x[axis])), {"axis": axis}) for x, i, axis in _SLICES]
    return [*out, *(Sample((Arg((5, 3)), _indices((4,), 5, dtype)), {"axis": 0})
                    for dtype in ("i64", "u8", "u32"))]


def _scatter_add_samples() -> list[Sample]:
    out = [Sample((_indices(i, x[axis]), Arg((*x[:axis], *i, *x[axis + 1:]))),
                  {"axis": axis, "size": x[axis]})
           for x, i, axis in _SLICES]
    return [*out, Sample((_indices((6,), 3, "i64"), Arg((6, 2), "i32", -5, 5)), {"size": 3}, False, False),
            Sample((_indices((0,), 0), Arg((0, 2))), {"size": 0})]


def _take_samples() -> list[Sample]:
    out = [Sample((Arg(x), _indices(i, x[axis])), {"axis": axis}) for x, i, axis in _ELEMENTS]
    return [*out, *(Sample((Arg((4, 5)), _indices((4, 1), 5, dtype)), {"axis": 1})
                    for dtype in ("i64", "u8"))]


def _put_samples() -> list[Sample]:
    out = [Sample((_indices(i, x[axis]), Arg(i)), {"axis": axis, "size": x[axis]}) for x, i,
           axis in _ELEMENTS]
    return [*out, Sample((_indices((3, 4), 2, "u8"), Arg((3, 4), "i32", -5, 5)), {"axis": 1, "size": 300},
                         False, False)]


def _scatter_set_samples() -> list[Sample]:
    out = [Sample((Arg(x), _indices(i, x[axis]), Arg((*x[:axis], *i, *x[axis + 1:]))), {"axis": axis})
           for x, i, axis in _SLICES]
    bools = (Arg((300,), "bool"), _indices((5,), 300, "i64"), Arg((5,), "bool"))
    return [*out, Sample(bools, {}, False, False)]


OPS: tuple[Op, ...] = (
    Op("gather", "gather",
       "The slices of x along `axis` that the integer indices name; the indices' axes stand in the place of "
       "that axis.",
       ("x", "indices"), _gather_infer, _gather_reference, _gather_gradient, Pointwise(_gather_value),
       attrs={"axis": 0}, samples=_gather_samples,
       failures=(Failure((Arg((4, 3)), Arg((2,))), {}, "needs integer indices"),
                 Failure((Arg((4, 3)), Arg((2,), "bool")), {}, "needs integer indices"),
                 Failure((Arg((4, 3)), _indices((2,), 4)), {"axis": 2}, "there is no axis 2 among 2"),
                 Failure((Arg(()), _indices((2,), 4)), {}, "there is no axis 0 among 0"))),
    Op("scatter_add", "routine",
       "Zeros with `size` slices along `axis`, to which each slice of the updates is added where its index "
       "says; slices "
       "with the same index add up in order. The gradient of `gather`.",
       ("indices", "updates"), _scatter_add_infer, _scatter_add_reference, _scatter_add_gradient,
       Routine(_scatter_add_form), attrs={"axis": 0, "size": REQUIRED},
       flops=lambda node: product(node.inputs[1].shape), samples=_scatter_add_samples,
       failures=(Failure((_indices((4,), 3), Arg((5, 2))), {"size": 3}, "must be those of the indices"),
                 Failure((Arg((4,)), Arg((4, 2))), {"size": 3}, "needs integer indices"),
                 Failure((_indices((4,), 3), Arg((4, 2))), {"size": 3, "axis": 2}, "there is no axis 2 among "
                                                                                   "2"),
                 Failure((_indices((4,), 3), Arg((4, 2))), {"size": -1}, "needs a size >= 0"),
                 Failure((_indices((4,), 3), Arg((4, 2), "bool")), {"size": 3}, "adds numbers, not bool"))),
    Op("scatter_set", "routine",
       "x, with the slices of the updates along `axis` where the indices say; of slices with the same index "
       "the last one stays.",
       ("x", "indices", "updates"), _scatter_set_infer, _scatter_set_reference, _scatter_set_gradient,
       Routine(_scatter_set_form), attrs={"axis": 0}, samples=_scatter_set_samples,
       failures=(Failure((Arg((5, 2)), _indices((4,), 3), Arg((5, 2))), {}, "a slice of x for each index"),
                 Failure((Arg((5, 2)), Arg((4,)), Arg((4, 2))), {}, "needs integer indices"),
                 Failure((Arg((5, 2)), _indices((4,), 3), Arg((4, 2))), {"axis": 2}, "there is no axis 2"))),
    Op("take_along_axis", "gather",
       "Reads x along `axis` at the indices, which have x's other axes: out[i, j] = x[i, indices[i, j]] for "
       "axis 1.",
       ("x", "indices"), _take_infer, _take_reference, _take_gradient, Pointwise(_take_value),
       attrs={"axis": REQUIRED}, samples=_take_samples,
       failures=(Failure((Arg((4, 3)), _indices((4,), 3)), {"axis": 1}, "as many axes of indices"),
                 Failure((Arg((4, 3)), _indices((5, 1), 3)), {"axis": 1}, "axis 0 is 4 in one operand and 5"),
                 Failure((Arg((4, 3)), Arg((4, 1))), {"axis": 1}, "needs integer indices"),
                 Failure((Arg((4, 3)), _indices((4, 1), 3)), {"axis": -1}, "there is no axis -1"))),
    Op("put_along_axis_add", "routine",
       "Zeros with `size` elements along `axis`, to which each update is added where its index says. The "
       "gradient of "
       "`take_along_axis`.",
       ("indices", "updates"), _put_infer, _put_reference, _put_gradient, Routine(_put_form),
       attrs={"axis": REQUIRED, "size": REQUIRED}, flops=lambda node: product(node.inputs[1].shape),
       samples=_put_samples,
       failures=(Failure((_indices((4, 1), 3), Arg((4, 2))), {"axis": 1, "size": 3},
                         "one index for each update"),
                 Failure((Arg((4, 1)), Arg((4, 1))), {"axis": 1, "size": 3}, "needs integer indices"),
                 Failure((_indices((4, 1), 3), Arg((4, 1))), {"axis": 2, "size": 3}, "there is no axis 2"),
                 Failure((_indices((4, 1), 3), Arg((4, 1))), {"axis": 1}, "needs the attribute 'size'"))),
)
