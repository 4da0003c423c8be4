"""Views: ops that move elements and compute nothing. Inside a kernel each is an index map.

Attributes are normalised by the language: axes count from 0, there is one start, stop and step per axis, no
-1.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr, Guard
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
from graphflow.compiler.plan.dims import (
    Bounds,
    Dim,
    DimLike,
    bounds_of,
    ceildiv,
    floordiv,
    product,
    simplify,
    substitute,
    symbol,
)
from graphflow.compiler.plan.dtypes import BOOL, F32, I32, I64
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError

Shape = Sequence[DimLike]
MAX_GAP = 2 ** 62
"""Larger than any extent: ``(b - a) // MAX_GAP == 0`` says a <= b as an equality, the form that a guard
has."""


def _per_axis(op: str, x: TensorType, **attrs: Any) -> None:
    for name, value in attrs.items():
        if not isinstance(value, tuple) or len(value) != x.rank:
            raise ShapeError(f"{op} takes one entry of {name} per axis, that is {x.rank}, got {value!r}",
                             op=op, shapes=[x.shape])


# --- broadcast_to

def _infer_broadcast(types: Sequence[TensorType], attrs: Attrs,
                     regions: Sequence[Region]) -> list[TensorType]:
    check_operands("broadcast_to", types, 1)
    x, shape = types[0], tuple(attrs["shape"])
    new = len(shape) - x.rank
    if new < 0:
        raise ShapeError(f"broadcast_to cannot drop axes: {x.rank} to {len(shape)}", op="broadcast_to",
                         shapes=[x.shape, shape])
    for axis, (have, want) in enumerate(zip(x.shape, shape[new:]), start=new):
        if have != want and have != 1:
            hint = f"{have} is not known to be 1 or {want}" if isinstance(have, Dim) else None
            raise ShapeError(f"broadcast_to: axis {axis} has extent {have}, which does not stretch to {want}",
                             op="broadcast_to", shapes=[x.shape, shape], hint=hint)
    return [TensorType(x.dtype, shape)]


def _lower_broadcast(p: Point, index: Index, result: int) -> Expr:
    have, want = p.node.inputs[0].shape, p.node.types[0].shape
    new = len(want) - len(have)
    return p.operand(0, [0 if h == 1 and w != 1 else at for h, w, at in zip(have, want[new:], index[new:])])


def _broadcast_gradient(b: Any, node: Node, cotangents: Sequence[Any]) -> list[Value | None]:
    have, want = node.inputs[0].shape, node.types[0].shape
    new = len(want) - len(have)
    axes = tuple(a for a in range(len(want)) if a < new or (have[a - new] == 1 and want[a] != 1))
    total = b.reduce_sum(cotangents[0], axes=axes) if axes else cotangents[0]
    return [total if total.shape == have else b.reshape(total, shape=have)]


# --- reshape

def _infer_reshape(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("reshape", types, 1)
    x, out = types[0], TensorType(types[0].dtype, tuple(attrs["shape"]))
    if x.size != out.size:
        raise ShapeError(f"reshape keeps the number of elements: {x.size} is not {out.size}", op="reshape",
                         shapes=[x.shape, out.shape])
    return [out]


def reshape_index(index: Index, from_shape: Shape, to_shape: Shape,
                  bounds: Bounds | None = None) -> list[DimLike]:
    """Where element `index` of an array of `from_shape` is once the array is reshaped to `to_shape`.

    Axes are matched in the smallest groups of equal size, so that most reshapes need no division. Divisors
    must be constants: NotImplementedError for a reshape such as [4*N] to [4,N]. `bounds` are those of the
    index's symbols.
    """
    out: list[DimLike] = [0] * len(to_shape)
    if product(from_shape) == 0:
        return out
    names = {f"axis {a}": at for a, at in enumerate(index)}
    known: dict[str, tuple[int, int | None]] = {
        f"axis {a}": (0, e - 1 if isinstance(e, int) else None) for a, e in enumerate(from_shape)}
    for sources, targets in _groups(from_shape, to_shape):
        flat: DimLike = 0
        for a in sources:
            flat = flat * from_shape[a] + symbol(f"axis {a}")
        for a in reversed(targets[1:]):
            extent = to_shape[a]
            if isinstance(extent, Dim):
                raise NotImplementedError(f"reshape of {list(from_shape)} to {list(to_shape)} as an index "
                                          f"map: the index would be divided by {extent}, which is not "
                                          "constant")
            out[a], flat = flat % extent, floordiv(flat, extent)
        out[targets[0]] = flat                        # the outermost of a group needs no remainder
        for a in targets:
            out[a] = simplify(substitute(simplify(out[a], known), names), bounds or {})
    return out


def _groups(left: Shape, right: Shape) -> list[tuple[list[int], list[int]]]:
    """Runs of axes (extents of 1 left out) of the two shapes with equal products, each as short as can be."""
    a = [i for i, d in enumerate(left) if d != 1]
    b = [i for i, d in enumerate(right) if d != 1]
    ends = {product(left[i] for i in a[:n]): n for n in range(len(a) + 1)}
    out, start_a, start_b = [], 0, 0
    for n in range(1, len(b) + 1):
        end = ends.get(product(right[i] for i in b[:n]))
        if end is not None:
            out.append((a[start_a:end], b[start_b:n]))
            start_a, start_b = end, n
    return out


def _lower_reshape(p: Point, index: Index, result: int) -> Expr:
    return p.operand(0, reshape_index(index, p.node.types[0].shape, p.node.inputs[0].shape))


# --- transpose and flip

def _infer_transpose(types: Sequence[TensorType], attrs: Attrs,
                     regions: Sequence[Region]) -> list[TensorType]:
    check_operands("transpose", types, 1)
    x, perm = types[0], attrs["perm"]
    _per_axis("transpose", x, perm=perm)
    if sorted(perm) != list(range(x.rank)):
        raise ShapeError(f"transpose: {perm} names not every axis of {x.rank} exactly once", op="transpose",
                         shapes=[x.shape])
    return [TensorType(x.dtype, tuple(x.shape[axis] for axis in perm))]


def _inverse(perm: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(perm)), key=lambda i: perm[i]))


def _infer_flip(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("flip", types, 1)
    for axis in attrs["axes"]:
        if not 0 <= axis < types[0].rank:
            raise ShapeError(f"flip: there is no axis {axis} in an array of {types[0].rank} axes", op="flip",
                             shapes=[types[0].shape])
    return [types[0]]


def _lower_flip(p: Point, index: Index, result: int) -> Expr:
    axes = p.node.attrs["axes"]
    return p.operand(0, [extent - 1 - at if axis in axes else at
                         for axis, (at, extent) in enumerate(zip(index, p.node.types[0].shape))])


# --- slice

def slice_guards(shape: Shape, starts: Shape, stops: Shape) -> list[tuple[DimLike, DimLike]]:
    """The equalities (left, right) that must hold, once symbols are bound, for the slice to lie within the
    shape. Those that hold anyway are left out; ShapeError names the axis of one that never holds."""
    out: list[tuple[DimLike, DimLike]] = []
    for axis, (extent, start, stop) in enumerate(zip(shape, starts, stops)):
        for low, high in ((0, start), (start, stop), (stop, extent)):
            least, most = bounds_of(high - low, {})
            if most is not None and most < 0:
                raise ShapeError(f"slice: {start}:{stop} is not within axis {axis} of extent {extent}",
                                 op="slice", shapes=[tuple(shape)])
            if least is None or least < 0:
                out.append((floordiv(high - low, MAX_GAP), 0))
    return out


def _infer_slice(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("slice", types, 1)
    x, starts, stops, steps = types[0], attrs["starts"], attrs["stops"], attrs["steps"]
    _per_axis("slice", x, starts=starts, stops=stops, steps=steps)
    for axis, step in enumerate(steps):
        if not isinstance(step, int) or step < 1:
            raise UseError(f"slice: the step of axis {axis} is {step}, not a number > 0", op="slice",
                           shapes=[x.shape], hint="reverse an axis with flip")
    slice_guards(x.shape, starts, stops)
    return [TensorType(x.dtype, tuple(ceildiv(stop - start, step)
                                      for start, stop, step in zip(starts, stops, steps)))]


def _reference_slice(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> list[Any]:
    x = arrays[0]
    for axis, (start, stop, extent) in enumerate(zip(attrs["starts"], attrs["stops"], x.shape)):
        if not 0 <= start <= stop <= extent:
            raise ShapeError(f"slice: {start}:{stop} is not within axis {axis} of extent {extent}",
                             op="slice", shapes=[x.shape])
    return [x[tuple(slice(*bounds) for bounds in zip(attrs["starts"], attrs["stops"], attrs["steps"]))]]


def _slice_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    starts, steps = node.attrs["starts"], node.attrs["steps"]
    last = [(n - 1) * step + 1 for n, step in zip(node.types[0].shape, steps)]
    high = tuple(extent - start - span for extent, start, span in zip(node.inputs[0].shape, starts, last))
    return [b.pad(cotangents[0], low=starts, high=high, interior=tuple(step - 1 for step in steps))]


def _lower_slice(p: Point, index: Index, result: int) -> Expr:
    starts, steps = p.node.attrs["starts"], p.node.attrs["steps"]
    return p.operand(0, [start + at * step for start, at, step in zip(starts, index, steps)])


# --- pad

def _infer_pad(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("pad", types, 1)
    x, low, high, interior = types[0], attrs["low"], attrs["high"], attrs["interior"]
    _per_axis("pad", x, low=low, high=high, interior=interior)
    for axis, sizes in enumerate(zip(low, high, interior)):
        for size in sizes:
            most = bounds_of(size, {})[1]
            if most is not None and most < 0:
                raise ShapeError(f"pad: {size} elements cannot be added to axis {axis}", op="pad",
                                 shapes=[x.shape], hint="to drop elements, use slice")
        if isinstance(sizes[2], Dim):
            raise UseError(f"pad: the interior padding of axis {axis} is not a constant", op="pad",
                           shapes=[x.shape])
    return [TensorType(x.dtype, tuple(_padded(*sizes) for sizes in zip(x.shape, low, high, interior)))]


def _padded(extent: DimLike, low: DimLike, high: DimLike, interior: int) -> DimLike:
    return low + extent + (extent - 1) * interior + high


def _fill(node_attrs: Attrs, dtype: Any) -> Any:
    value = node_attrs["value"]
    return bool(value) if dtype == BOOL else int(value) if dtype.is_integer else float(value)


def _reference_pad(arrays: Sequence[Any], attrs: Attrs, types: Sequence[Any]) -> list[Any]:
    x = arrays[0]
    out = np.full(types[0].shape, _fill(attrs, types[0].dtype), types[0].dtype.numpy)
    if x.size:
        out[tuple(slice(low, low + (n - 1) * (gap + 1) + 1, gap + 1)
                  for low, n, gap in zip(attrs["low"], x.shape, attrs["interior"]))] = x
    return [out]


def _pad_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    x, low, steps = node.inputs[0], node.attrs["low"], tuple(gap + 1 for gap in node.attrs["interior"])
    if x.type.size == 0:
        return [b.zeros(x.type)]
    stops = tuple(start + (n - 1) * step + 1 for start, n, step in zip(low, x.shape, steps))
    return [b.slice(cotangents[0], starts=low, stops=stops, steps=steps)]


def _lower_pad(p: Point, index: Index, result: int) -> Expr:
    source, guards = [], []
    for axis, extent in enumerate(p.node.inputs[0].shape):
        from_low = index[axis] - p.node.attrs["low"][axis]
        step = p.node.attrs["interior"][axis] + 1
        at = floordiv(from_low, step)
        source.append(at)
        if _padded(extent, 0, 0, step - 1) != p.node.types[0].shape[axis]:
            guards.append(Guard(at, extent))
        if step > 1:
            guards.append(Guard(from_low % step, 1))
    return p.operand(0, source, guards, _fill(p.node.attrs, p.node.types[0].dtype))


# --- concatenate

def _infer_concatenate(types: Sequence[TensorType], attrs: Attrs,
                       regions: Sequence[Region]) -> list[TensorType]:
    if not types:
        raise UseError("concatenate takes at least one operand", op="concatenate")
    first, axis, shapes = types[0], attrs["axis"], [t.shape for t in types]
    if not 0 <= axis < first.rank:
        raise ShapeError(f"concatenate: there is no axis {axis} in an array of {first.rank} axes",
                         op="concatenate", shapes=shapes)
    for i, t in enumerate(types):
        if t.dtype != first.dtype:
            raise DTypeError(f"concatenate: operand {i} is {t.dtype.full_name}, operand 0 "
                             f"{first.dtype.full_name}",
                             op="concatenate", shapes=shapes, hint="convert one of them with cast")
        if t.rank != first.rank:
            raise ShapeError(f"concatenate: operand {i} has {t.rank} axes, operand 0 has {first.rank}",
                             op="concatenate", shapes=shapes)
        for other, (a, b) in enumerate(zip(first.shape, t.shape)):
            if other != axis and a != b:
                raise ShapeError(f"concatenate along axis {axis}: axis {other} of operand {i} is {b}, of "
                                 f"operand 0 {a}",
                                 op="concatenate", shapes=shapes)
    total: DimLike = 0
    for t in types:
        total = total + t.shape[axis]
    return [TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1:]))]


def _offsets(node: Node) -> list[DimLike]:
    """Where each operand of a concatenate begins, and where the last ends."""
    out: list[DimLike] = [0]
    for v in node.inputs:
        out.append(out[-1] + v.shape[node.attrs["axis"]])
    return out


def _concatenate_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    axis, offsets, rank = node.attrs["axis"], _offsets(node), node.types[0].rank
    out: list[Value | None] = []
    for i, v in enumerate(node.inputs):
        starts = tuple(offsets[i] if a == axis else 0 for a in range(rank))
        stops = tuple(offsets[i + 1] if a == axis else extent for a, extent in enumerate(v.shape))
        out.append(b.slice(cotangents[0], starts=starts, stops=stops, steps=(1,) * rank))
    return out


def _lower_concatenate(p: Point, index: Index, result: int) -> Expr:
    axis, offsets, dtype = p.node.attrs["axis"], _offsets(p.node), p.node.types[0].dtype

    def part(i: int) -> Expr:
        at = index[axis] - offsets[i]
        guard = [Guard(at, p.node.inputs[i].shape[axis])] if len(p.node.inputs) > 1 else []
        return p.operand(i, [*index[:axis], at, *index[axis + 1:]], guard)

    value = part(len(p.node.inputs) - 1)
    for i in reversed(range(len(p.node.inputs) - 1)):
        before = p.apply("lt", p.index(index[axis], I64), p.index(offsets[i + 1], I64), dtype=BOOL)
        value = p.apply("where", before, part(i), value, dtype=dtype)
    return value


# --- iota

def _infer_iota(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("iota", types, 0)
    check_kind("iota", attrs["dtype"], "fiu")
    shape, axis = tuple(attrs["shape"]), attrs["axis"]
    if not 0 <= axis < len(shape):
        raise ShapeError(f"iota: there is no axis {axis} in an array of {len(shape)} axes", op="iota",
                         shapes=[shape])
    return [TensorType(attrs["dtype"], shape)]


def _reference_iota(arrays: Sequence[Any], attrs: Attrs, types: Sequence[Any]) -> list[Any]:
    shape, axis = types[0].shape, attrs["axis"]
    line = np.arange(shape[axis]).astype(types[0].dtype.numpy)
    return [np.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)]


def _lower_iota(p: Point, index: Index, result: int) -> Expr:
    return p.index(index[p.node.attrs["axis"]], p.node.attrs["dtype"])


# --- the table

def _view(name: str, doc: str, attrs: Sequence[str], infer: Callable, reference: Callable, gradient: Callable,
          lower: Callable, samples: Sequence[Sample], failures: Sequence[Failure], injective: bool = True,
          operands: tuple[str, ...] = ("x",), **defaults: Any) -> Op:
    """A view of any element type: the first sample is tried with integers and bools too."""
    def with_dtype(dtype: str) -> Sample:
        return samples[0]._replace(args=tuple(a._replace(dtype=dtype) for a in samples[0].args), smooth=False)

    return Op(name, "view", doc, operands, infer, reference, gradient, Pointwise(lower),
              {**dict.fromkeys(attrs, REQUIRED), **defaults}, injective=injective,
              samples=lambda: [*samples, with_dtype("i32"), with_dtype("bool")], failures=failures)


def _samples(attr: str, *cases: tuple[tuple[int, ...], Any]) -> list[Sample]:
    """Samples of one operand: (its shape, the attribute's value)."""
    return [Sample((Arg(shape),), {attr: value}) for shape, value in cases]


def _axis_samples(attrs: tuple[str, str, str], *cases: tuple[tuple[int, ...], ...]) -> list[Sample]:
    """Samples of one operand: its shape, then for each axis a value of each of the three attributes."""
    out = []
    for shape, *axes in cases:
        values = {attr: tuple(axis[i] for axis in axes) for i, attr in enumerate(attrs)}
        out.append(Sample((Arg(shape),), values))
    return out


def _part_samples(*cases: tuple[int, tuple[tuple[int, ...], ...]]) -> list[Sample]:
    return [Sample(tuple(Arg(shape) for shape in shapes), {"axis": axis}) for axis, shapes in cases]


_X23 = (Arg((2, 3)),)
_SLICE = ("starts", "stops", "steps")
_PAD = ("low", "high", "interior")

OPS: tuple[Op, ...] = (
    _view("broadcast_to", "x stretched to `shape`: new leading axes, and axes of extent 1. A symbol never "
          "counts as 1.", ["shape"], _infer_broadcast,
          lambda arrays, attrs, types: [np.broadcast_to(arrays[0], types[0].shape)],
          _broadcast_gradient, _lower_broadcast, injective=False,
          samples=_samples("shape", ((3,), (2, 3)), ((), ()), ((), (4,)), ((1,), (5,)), ((1, 3), (2, 3)),
                           ((2, 1), (2, 3)), ((1,), (0,)), ((3, 1, 2), (2, 3, 5, 2)), ((1, 1), (1, 1)),
                           ((2, 3), (2, 3))),
          failures=[Failure(_X23, {"shape": (2, 4)}, "axis 1 has extent 3, which does not stretch to 4"),
                    Failure(_X23, {"shape": (3,)}, "cannot drop axes: 2 to 1")]),
    _view("reshape", "The same elements in row-major order under another shape.", ["shape"], _infer_reshape,
          lambda arrays, attrs, types: [arrays[0].reshape(types[0].shape)],
          lambda b, node, cotangents: [b.reshape(cotangents[0], shape=node.inputs[0].shape)], _lower_reshape,
          samples=_samples("shape", ((2, 6), (3, 4)), ((), (1, 1)), ((1,), ()), ((6,), (2, 3)),
                           ((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 12)), ((0, 3), (5, 0)), ((3, 1, 5), (3, 5)),
                           ((4, 3, 2, 2), (2, 6, 4)), ((2, 9, 2), (2, 3, 3, 1, 2))),
          failures=[Failure(_X23, {"shape": (4, 2)}, "6 is not 8")]),
    _view("transpose", "The axes in the order `perm`: axis i of the result is axis perm[i] of x.", ["perm"],
          _infer_transpose, lambda arrays, attrs, types: [arrays[0].transpose(attrs["perm"])],
          lambda b, node, cotangents: [b.transpose(cotangents[0], perm=_inverse(node.attrs["perm"]))],
          lambda p, index, result: p.operand(0, [index[i] for i in _inverse(p.node.attrs["perm"])]),
          samples=_samples("perm", ((2, 3), (1, 0)), ((), ()), ((4,), (0,)), ((2, 3, 4), (2, 0, 1)),
                           ((2, 1, 3, 2), (3, 1, 0, 2)), ((0, 3), (1, 0))),
          failures=[Failure(_X23, {"perm": (1, 1)}, "names not every axis of 2 exactly once"),
                    Failure(_X23, {"perm": (0,)}, "one entry of perm per axis, that is 2")]),
    _view("slice", "Elements start, start + step, … before stop of each axis; steps are constants > 0.",
          _SLICE, _infer_slice, _reference_slice, _slice_gradient, _lower_slice,
          samples=_axis_samples(_SLICE, ((5, 4), (1, 4, 1), (0, 4, 2)), ((),), ((7,), (1, 7, 3)),
                                ((6,), (2, 2, 1)), ((6,), (6, 6, 2)), ((1,), (0, 1, 5)),
                                ((0, 2), (0, 0, 1), (1, 2, 1)),
                                ((2, 3, 2, 4), (0, 2, 1), (2, 3, 1), (0, 2, 1), (1, 4, 2))),
          failures=[Failure(_X23, dict(zip(_SLICE, values)), message) for values, message in (
              (((0, 1), (2, 4), (1, 1)), "1:4 is not within axis 1 of extent 3"),
              (((2, 0), (1, 3), (1, 1)), "2:1 is not within axis 0 of extent 2"),
              (((0, 0), (2, 3), (1, -1)), "reverse an axis with flip"),
              (((0,), (2, 3), (1, 1)), "one entry of starts per axis"))]),
    _view("flip", "x with the order along `axes` reversed.", ["axes"], _infer_flip,
          lambda arrays, attrs, types: [np.flip(arrays[0], attrs["axes"])],
          lambda b, node, cotangents: [b.flip(cotangents[0], axes=node.attrs["axes"])], _lower_flip,
          samples=_samples("axes", ((2, 3), (1,)), ((), ()), ((4,), (0,)), ((1,), (0,)), ((2, 3, 4), (0, 2)),
                           ((0, 3), (0, 1)), ((2, 1, 3, 2), (3,))),
          failures=[Failure(_X23, {"axes": (2,)}, "flip: there is no axis 2")]),
    _view("pad", "x with `low` elements of `value` before, `high` after and `interior` between the elements "
          "of each axis. Over no elements the inner padding counts as -interior, so that slice and pad undo "
          "each other.", _PAD, _infer_pad, _reference_pad, _pad_gradient, _lower_pad, value=0.0,
          samples=[*_axis_samples(_PAD, ((2, 3), (1, 0, 0), (0, 2, 0)), ((),), ((4,), (1, 2, 2)),
                                  ((1,), (0, 0, 3)), ((0,), (2, 1, 0)), ((0,), (2, 1, 1)),
                                  ((3, 0), (0, 0, 0), (1, 0, 0)),
                                  ((2, 1, 2, 3), (0, 0, 0), (1, 1, 0), (0, 0, 1), (2, 0, 0))),
                   *(Sample((Arg((3,)),), {"low": (1,), "high": (1,), "interior": (1,), "value": value},
                            smooth=False) for value in (-1.5, float("-inf")))],
          failures=[Failure(_X23, {"low": (0, -1), "high": (0, 0), "interior": (0, 0)},
                            "-1 elements cannot be added to axis 1"),
                    Failure(_X23, {"low": (0,), "high": (0, 0), "interior": (0, 0)},
                            "one entry of low per axis")]),
    _view("concatenate", "The operands one after another along `axis`.", ["axis"], _infer_concatenate,
          lambda arrays, attrs, types: [np.concatenate(arrays, attrs["axis"])], _concatenate_gradient,
          _lower_concatenate, operands=("*parts",),
          samples=_part_samples((0, ((2, 3), (4, 3))), (0, ((2,),)), (0, ((1,), (0,), (3,))),
                                (1, ((2, 1), (2, 3), (2, 2))), (1, ((2, 2, 1, 3), (2, 1, 1, 3)))),
          failures=[Failure((), {"axis": 0}, "at least one operand"),
                    Failure((Arg((2, 3)), Arg((2, 4))), {"axis": 0},
                            "axis 1 of operand 1 is 4, of operand 0 3"),
                    Failure((Arg((2, 3)), Arg((3,))), {"axis": 0}, "operand 1 has 1 axes, operand 0 has 2"),
                    Failure((Arg((2,)), Arg((2,), "i32")), {"axis": 0}, "operand 1 is int32"),
                    Failure((Arg((2,)),), {"axis": 1}, "there is no axis 1")]),
    Op("iota", "view", "The position along `axis`, as a number of `dtype`.", (), _infer_iota, _reference_iota,
       lowering=Pointwise(_lower_iota),
       attrs={"shape": REQUIRED, "axis": REQUIRED, "dtype": REQUIRED},
       samples=lambda: [Sample((), {"shape": s, "axis": a, "dtype": d}, smooth=False) for s, a, d in
                        (((5,), 0, I64), ((0,), 0, I32), ((2, 3), 0, F32), ((2, 1, 3, 4), 3, I32))],
       failures=[Failure((), {"shape": (2,), "axis": 1, "dtype": I64}, "there is no axis 1"),
                 Failure((), {"shape": (2,), "axis": 0, "dtype": BOOL}, "not bool")]),
)
