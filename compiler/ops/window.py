"""Pooling over windows of the spatial axes of x[N, C, ...], 1 to 3 of them.

`max_pool` gives the maxima and the *switches*: where in its window (row-major) each maximum was found.
`unpool` sends values back to where the switches point, `pool_take` reads there; they are each other's
gradients, and `unpool` is that of `max_pool`. `window_sum` and `window_sum_grad` are each other's gradients;
average pooling is `window_sum` over a count.

The backward ops have one owner for each input element: it looks at the windows that cover it, at most
ceil(window / stride) along an axis, so nothing is scattered.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr, Guard
from graphflow.compiler.ops.contract import per_axis, per_side, window_extent
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
from graphflow.compiler.plan.dtypes import I32
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError


class Windows(NamedTuple):
    """Size, step and zero border of the windows along each spatial axis."""
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


def _windows(op: str, attrs: Attrs, axes: int) -> Windows:
    window = per_axis(op, "window", attrs["window"], axes, 1)
    padding = per_side(op, attrs["padding"], axes)
    for size, sides in zip(window, padding):
        if max(sides) >= size:
            raise UseError(f"{op}: a padding of {sides} would leave windows of {size} with nothing but "
                           f"padding", op=op,
                           hint="pad less than the window's size")
    return Windows(window, per_axis(op, "stride", attrs["stride"], axes, 1), padding)


def _same_attrs(node: Node) -> dict[str, Any]:
    return {name: node.attrs[name] for name in ("window", "stride", "padding")}


def _check(op: str, types: Sequence[TensorType], count: int) -> None:
    check_operands(op, types, count)
    shapes = [t.shape for t in types]
    if not 3 <= types[0].rank <= 5:
        raise ShapeError(f"{op} needs [N, C, ...] with 1 to 3 spatial axes, got {types[0].rank} axes", op=op,
                         shapes=shapes)
    if not types[0].dtype.is_float:
        raise DTypeError(f"{op} needs floats, got {types[0].dtype}", op=op, shapes=shapes,
                         hint="cast to float32")
    if count == 2 and types[1].dtype != I32:
        raise DTypeError(f"{op} needs int32 switches (the second result of max_pool), got {types[1].dtype}",
                         op=op, shapes=shapes)


def _pooled(op: str, x: Sequence[DimLike], w: Windows, shapes: Sequence[Any]) -> tuple[DimLike, ...]:
    """The shape of the windows' results for input shape `x`."""
    return (*x[:2], *(window_extent(op, size, w.window[i], w.stride[i], w.padding[i], 1, 2 + i, shapes)
                      for i, size in enumerate(x[2:])))


def _unpooled(op: str, types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    """The type of the gradient for the windows' input; checks that `types[0]` is the windows' result for
    it."""
    dy = types[0].shape
    if len(attrs["spatial"]) != len(dy) - 2:
        raise ShapeError(f"{op} needs one size of `spatial` for each of {len(dy) - 2} spatial axes, "
                         f"not {attrs['spatial']!r}", op=op, shapes=[t.shape for t in types])
    x = (*dy[:2], *attrs["spatial"])
    expected = _pooled(op, x, _windows(op, attrs, len(dy) - 2), [t.shape for t in types])
    if expected != tuple(dy):
        wanted = "[" + ", ".join(map(str, expected)) + "]"
        raise ShapeError(f"{op}: an input of spatial size {tuple(attrs['spatial'])} has windows {wanted}",
                         op=op, shapes=[t.shape for t in types])
    return TensorType(types[0].dtype, x)


def _covering(w: Windows, place: Index, outs: Sequence[DimLike], steps: Sequence[DimLike]
              ) -> tuple[list[DimLike], list[DimLike], list[Guard]]:
    """The window number `steps` back from the last that covers input `place`, the place inside it, and the
    guards under
    which there is such a window."""
    at: list[DimLike] = []
    inside: list[DimLike] = []
    guards: list[Guard] = []
    for i, (p, t) in enumerate(zip(place, steps)):
        size, stride = w.window[i], w.stride[i]
        reached = p + w.padding[i][0]
        at.append(floordiv(reached, stride) - t)
        inside.append(reached % stride + t * stride)
        guards.append(Guard(at[i], outs[i]))
        if size % stride:
            guards.append(Guard(inside[i], size))
    return at, inside, guards


def _tiles(w: Windows, spatial: Sequence[DimLike], outs: Sequence[DimLike]) -> bool:
    """Whether the windows neither overlap nor leave a gap: each element is in exactly one."""
    return w.window == w.stride and not any(map(any, w.padding)) and \
        all(size == out * step for size, out, step in zip(spatial, outs, w.stride))


def _sum_over_covering(p: Point, place: Index, term: Any) -> Expr:
    """Adds `term(window's index, place inside it, guards)` over the windows that cover `place`; no loop where
    it is one."""
    dy = p.node.inputs[0].shape[2:]
    w = _windows(p.node.op, p.node.attrs, len(dy))
    counts = [ceildiv(size, stride) for size, stride in zip(w.window, w.stride)]
    loops = p.loops(*(n for n in counts if n != 1))
    variables = iter(loops)
    steps = [0 if n == 1 else symbol(next(variables)[0]) for n in counts]
    at, inside, guards = _covering(w, place, dy, steps)
    one = term(at, inside, () if _tiles(w, p.node.types[0].shape[2:], dy) else guards)
    return p.reduce("sum", loops, one) if loops else one


def _position(inside: Sequence[DimLike], window: Sequence[int]) -> DimLike:
    out: DimLike = 0
    for at, size in zip(inside, window):
        out = out * size + at
    return out


# References

def _view(x: Any, w: Windows, fill: float) -> Any:
    """x[N, C, ...] as a view [N, C, *windows, *window]."""
    axes = tuple(range(2, x.ndim))
    padded = np.pad(x, ((0, 0), (0, 0), *w.padding), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(padded, w.window, axis=axes)
    return view[(slice(None), slice(None), *(slice(None, None, s) for s in w.stride))]


def _add_back(w: Windows, shape: Sequence[int], dtype: Any, piece: Any) -> Any:
    """Sums `piece(place in the window)`, an array of the windows' shape, back onto an input of `shape`."""
    padded = [size + low + high for size, (low, high) in zip(shape[2:], w.padding)]
    out = np.zeros((*shape[:2], *padded), dtype)
    for at in np.ndindex(*w.window):
        values = piece(at)
        reached = tuple(slice(r, r + (n - 1) * s + 1 if n else r, s) for r, s,
                        n in zip(at, w.stride, values.shape[2:]))
        out[(slice(None), slice(None), *reached)] += values
    inside = tuple(slice(low, low + size) for size, (low, _) in zip(shape[2:], w.padding))
    return np.ascontiguousarray(out[(slice(None), slice(None), *inside)])


def _check_switches(switches: Any, w: Windows) -> None:
    if switches.size and not (0 <= switches.min() and switches.max() < product(w.window)):
        raise IndexError(f"switches must lie in 0..{int(product(w.window)) - 1}, the places of a window")


def _max_pool_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x = arrays[0]
    w = _windows("max_pool", attrs, x.ndim - 2)
    shape: Any = types[0].shape
    flat = _view(x, w, -np.inf).reshape(*shape, int(product(w.window)))
    switches = np.argmax(flat, axis=-1).astype(np.int32)           # the first NaN, else the first maximum
    values = np.take_along_axis(flat, switches[..., None].astype(np.int64), axis=-1)[..., 0]
    return [np.ascontiguousarray(values), switches]


def _unpool_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    dy, switches = arrays
    w = _windows("unpool", attrs, dy.ndim - 2)
    _check_switches(switches, w)
    shape: Any = types[0].shape
    return [_add_back(w, shape, dy.dtype,
                      lambda at: np.where(switches == _position(at, w.window), dy, np.zeros((), dy.dtype)))]


def _pool_take_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x, switches = arrays
    w = _windows("pool_take", attrs, x.ndim - 2)
    _check_switches(switches, w)
    flat = _view(x, w, 0).reshape(*switches.shape, int(product(w.window)))
    return [np.take_along_axis(flat, switches[..., None].astype(np.int64), axis=-1)[..., 0]]


def _window_sum_reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> Sequence[Any]:
    x = arrays[0]
    view = _view(x, _windows("window_sum", attrs, x.ndim - 2), 0)
    return [view.sum(axis=tuple(range(x.ndim, view.ndim)), dtype=x.dtype)]


def _window_sum_grad_reference(arrays: Sequence[Any], attrs: Attrs,
                               types: Sequence[TensorType]) -> Sequence[Any]:
    dy = arrays[0]
    shape: Any = types[0].shape
    return [_add_back(_windows("window_sum_grad", attrs, dy.ndim - 2), shape, dy.dtype, lambda at: dy)]


# Typing

def _max_pool_infer(types: Sequence[TensorType], attrs: Attrs,
                    regions: Sequence[Region]) -> Sequence[TensorType]:
    _check("max_pool", types, 1)
    x = types[0].shape
    shape = _pooled("max_pool", x, _windows("max_pool", attrs, len(x) - 2), [x])
    if 0 in x[2:]:
        raise ShapeError(f"max_pool: axis {x.index(0, 2)} has no elements to take a maximum of",
                         op="max_pool", shapes=[x])
    return [TensorType(types[0].dtype, shape), TensorType(I32, shape)]


def _unpool_infer(types: Sequence[TensorType], attrs: Attrs,
                  regions: Sequence[Region]) -> Sequence[TensorType]:
    _check("unpool", types, 2)
    if types[0].shape != types[1].shape:
        raise ShapeError("unpool needs one switch for each value", op="unpool",
                         shapes=[t.shape for t in types])
    return [_unpooled("unpool", types, attrs)]


def _pool_take_infer(types: Sequence[TensorType], attrs: Attrs,
                     regions: Sequence[Region]) -> Sequence[TensorType]:
    _check("pool_take", types, 2)
    x = types[0].shape
    shape = _pooled("pool_take", x, _windows("pool_take", attrs, len(x) - 2), [t.shape for t in types])
    if shape != types[1].shape:
        raise ShapeError("pool_take needs one switch for each window: [" + ", ".join(map(str, shape)) + "]",
                         op="pool_take", shapes=[t.shape for t in types])
    return [TensorType(types[0].dtype, shape)]


def _window_sum_infer(types: Sequence[TensorType], attrs: Attrs,
                      regions: Sequence[Region]) -> Sequence[TensorType]:
    _check("window_sum", types, 1)
    x = types[0].shape
    return [TensorType(types[0].dtype,
                       _pooled("window_sum", x, _windows("window_sum", attrs, len(x) - 2), [x]))]


def _window_sum_grad_infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]
                           ) -> Sequence[TensorType]:
    _check("window_sum_grad", types, 1)
    return [_unpooled("window_sum_grad", types, attrs)]


# Gradients

def _max_pool_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    if cotangents[0] is None:
        return [None]
    return [b.unpool(cotangents[0], node.result(1), spatial=node.inputs[0].shape[2:], **_same_attrs(node))]


def _unpool_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return [b.pool_take(cotangents[0], node.inputs[1], **_same_attrs(node)), None]


def _pool_take_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    spatial = node.inputs[0].shape[2:]
    return [b.unpool(cotangents[0], node.inputs[1], spatial=spatial, **_same_attrs(node)), None]


def _window_sum_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    return [b.window_sum_grad(cotangents[0], spatial=node.inputs[0].shape[2:], **_same_attrs(node))]


def _window_sum_grad_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value
                                                                                                  | None]:
    return [b.window_sum(cotangents[0], **_same_attrs(node))]


# Lowerings

def _under_window(w: Windows, at: Index, inside: Sequence[DimLike], sizes: Sequence[DimLike]
                  ) -> tuple[list[DimLike], list[Guard]]:
    """The input's place at `inside` of window `at`, and guards along the padded axes."""
    places = [a * s + r - low for a, s, r, (low, _) in zip(at, w.stride, inside, w.padding)]
    return places, [Guard(p, n) for p, n, sides in zip(places, sizes, w.padding) if sides != (0, 0)]


def _max_pool_value(p: Point, index: Index, result: int) -> Expr:
    x = p.node.inputs[0]
    w = _windows("max_pool", p.node.attrs, len(x.shape) - 2)
    loops = p.loops(*w.window)
    inside = [symbol(name) for name, _ in loops]
    places, guards = _under_window(w, index[2:], inside, x.shape[2:])
    value = p.operand(0, (*index[:2], *places), guards, fill=float("-inf"))
    if result == 0:
        return p.reduce("max", loops, value)
    return p.reduce("argmax", loops, value, p.index(_position(inside, w.window), I32), result=1)


def _unpool_value(p: Point, index: Index, result: int) -> Expr:
    dy = p.node.inputs[0]
    window = _windows("unpool", p.node.attrs, len(dy.shape) - 2).window

    def term(at: Sequence[DimLike], inside: Sequence[DimLike], guards: Sequence[Guard]) -> Expr:
        switch = p.operand(1, (*index[:2], *at), guards, fill=-1)
        chosen = p.apply("eq", switch, p.index(_position(inside, window), I32))
        return p.apply("where", chosen, p.operand(0, (*index[:2], *at), guards), p.const(0.0, dy.dtype))

    return _sum_over_covering(p, index[2:], term)


def _pool_take_value(p: Point, index: Index, result: int) -> Expr:
    x = p.node.inputs[0]
    w = _windows("pool_take", p.node.attrs, len(x.shape) - 2)
    rest = p.indirect(p.operand(1, index))
    inside: list[DimLike] = []
    for size in reversed(w.window[1:]):
        inside.insert(0, rest % size)
        rest = floordiv(rest, size)
    places, _ = _under_window(w, index[2:], [rest, *inside], x.shape[2:])
    return p.operand(0, (*index[:2], *places), [Guard(at, size) for at, size in zip(places, x.shape[2:])])


def _window_sum_value(p: Point, index: Index, result: int) -> Expr:
    x = p.node.inputs[0]
    w = _windows("window_sum", p.node.attrs, len(x.shape) - 2)
    loops = p.loops(*w.window)
    places, guards = _under_window(w, index[2:], [symbol(name) for name, _ in loops], x.shape[2:])
    return p.reduce("sum", loops, p.operand(0, (*index[:2], *places), guards))


def _window_sum_grad_value(p: Point, index: Index, result: int) -> Expr:
    return _sum_over_covering(p, index[2:], lambda at, inside,
                              guards: p.operand(0, (*index[:2], *at), guards))


# Costs and samples

def _per_window(node: Node) -> DimLike:
    """One operation for each element of each window."""
    axes = node.types[0].rank - 2
    return product(node.types[0].shape) * product(_windows(node.op, node.attrs, axes).window)


def _per_covering(node: Node) -> DimLike:
    """One operation for each window that may cover each element."""
    w = _windows(node.op, node.attrs, node.types[0].rank - 2)
    return product(node.types[0].shape) * product(ceildiv(size, stride) for size,
                                                  stride in zip(w.window, w.stride))


_CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 3, 4, 6), {"window": (2, 2), "stride": (2, 2)}),
    ((1, 2, 5, 7), {"window": (2, 3), "stride": (2, 3)}),
    ((2, 1, 5, 5), {"window": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    ((1, 2, 6, 5), {"window": (3, 2), "stride": (1, 1), "padding": ((2, 0), (0, 1))}),
    ((1, 1, 7, 7), {"window": (2, 2), "stride": (3, 3)}),
    ((1, 1, 1, 1), {"window": 1, "stride": 1}),
    ((0, 2, 4, 4), {"window": 2, "stride": 2}),
    ((2, 2, 9), {"window": (4,), "stride": (2,), "padding": ((1, 2),)}),
    ((1, 1, 3, 4, 3), {"window": (2, 2, 3), "stride": (1, 2, 3)}),
)


def _result_shape(shape: tuple[int, ...], attrs: Attrs) -> tuple[int, ...]:
    return _pooled("max_pool", shape, _windows("max_pool", {"padding": 0, **attrs}, len(shape) - 2),
                   [])                                 # type: ignore[return-value]


def _switch_arg(shape: tuple[int, ...], attrs: Attrs) -> Arg:
    places = int(product(per_axis("max_pool", "window", attrs["window"], len(shape) - 2, 1)))
    return Arg(_result_shape(shape, attrs), "i32", 0, places - 1)


def _samples_of_input(distinct: bool) -> Any:
    return lambda: [Sample((Arg(shape, distinct=distinct),), attrs) for shape, attrs in _CASES]


def _unpool_samples() -> list[Sample]:
    return [Sample((Arg(_result_shape(shape, attrs)), _switch_arg(shape, attrs)),
                   {**attrs, "spatial": shape[2:]})
            for shape, attrs in _CASES]


def _pool_take_samples() -> list[Sample]:
    return [Sample((Arg(shape), _switch_arg(shape, attrs)), attrs) for shape, attrs in _CASES]


def _window_sum_grad_samples() -> list[Sample]:
    return [Sample((Arg(_result_shape(shape, attrs)),), {**attrs, "spatial": shape[2:]}) for shape,
            attrs in _CASES]


_ATTRS = {"window": REQUIRED, "stride": REQUIRED, "padding": 0}
_TWO = {"window": 2, "stride": 2}
_DOC = (" `window`, `stride`: an integer or one for each spatial axis; `padding`: an integer or a (low, "
        "high) pair for "
        "each spatial axis.")
_BAD = (Failure((Arg((2, 3)),), _TWO, "1 to 3 spatial axes"),
        Failure((Arg((1, 1, 4, 4)),), {"window": (2,), "stride": 2}, "window of 2 integers >= 1"),
        Failure((Arg((1, 1, 4, 4)),), {"window": 2, "stride": 0}, "stride of 2 integers >= 1"),
        Failure((Arg((1, 1, 4, 4)),), {"window": 2, "stride": 2, "padding": 2}, "nothing but padding"),
        Failure((Arg((1, 1, 1, 4)),), _TWO, "spans 2 does not fit into axis 2"),
        Failure((Arg((1, 1, 4, 4), "i32"),), _TWO, "needs floats"),
        Failure((Arg((1, 1, 4, 4)),), {"stride": 2}, "needs the attribute 'window'"))

OPS: tuple[Op, ...] = (
    Op("max_pool", "window",
       "The maximum of each window, and its place in the window as int32 (row-major; the first of equal "
       "ones). NaN wins; "
       "padding counts as -infinity." + _DOC,
       ("x",), _max_pool_infer, _max_pool_reference, _max_pool_gradient, Pointwise(_max_pool_value),
       attrs=_ATTRS, flops=_per_window, samples=_samples_of_input(True),
       failures=(*_BAD, Failure((Arg((1, 1, 0, 4)),), {"window": 2, "stride": 1, "padding": 1},
                                "has no elements"))),
    Op("unpool", "window",
       "The gradient of `max_pool`: each value goes to the place in its window where its switch points; "
       "where windows "
       "overlap they add up; what points at padding is dropped. `spatial`: the input's spatial size." + _DOC,
       ("dy", "switches"), _unpool_infer, _unpool_reference, _unpool_gradient, Pointwise(_unpool_value),
       attrs={**_ATTRS, "spatial": REQUIRED}, flops=_per_covering, samples=_unpool_samples,
       failures=(
           Failure((Arg((1, 1, 2, 2)), Arg((1, 1, 2, 1), "i32", 0, 3)), {**_TWO, "spatial": (4, 4)},
                   "one switch for"),
           Failure((Arg((1, 1, 2, 2)), Arg((1, 1, 2, 2), "i32", 0, 3)), {**_TWO, "spatial": (6, 4)},
                   "has windows"),
           Failure((Arg((1, 1, 2, 2)), Arg((1, 1, 2, 2), "i64", 0, 3)), {**_TWO, "spatial": (4, 4)},
                   "int32 switches"),
           Failure((Arg((1, 1, 2, 2)), Arg((1, 1, 2, 2), "i32", 0, 3)), {**_TWO, "spatial": (4,)},
                   "one size of"))),
    Op("pool_take", "gather",
       "Reads each window of x at the place where its switch points; 0 in the padding. The gradient of "
       "`unpool`." + _DOC,
       ("x", "switches"), _pool_take_infer, _pool_take_reference, _pool_take_gradient,
       Pointwise(_pool_take_value), attrs=_ATTRS, samples=_pool_take_samples,
       failures=(
           Failure((Arg((1, 1, 4, 4)), Arg((1, 1, 2, 1), "i32", 0, 3)), _TWO, "one switch for each window: "
                                                                              "[1, 1, 2, 2]"),
           Failure((Arg((1, 1, 4, 4)), Arg((1, 1, 2, 2), "u8", 0, 3)), _TWO, "int32 switches"))),
    Op("window_sum", "window", "The sum of each window; padding counts as 0." + _DOC,
       ("x",), _window_sum_infer, _window_sum_reference, _window_sum_gradient, Pointwise(_window_sum_value),
       attrs=_ATTRS, flops=_per_window, samples=_samples_of_input(False), failures=_BAD),
    Op("window_sum_grad", "window",
       "The gradient of `window_sum`: for each input element the sum over the windows that cover it. "
       "`spatial`: the "
       "input's spatial size." + _DOC,
       ("dy",), _window_sum_grad_infer, _window_sum_grad_reference, _window_sum_grad_gradient,
       Pointwise(_window_sum_grad_value), attrs={**_ATTRS, "spatial": REQUIRED}, flops=_per_covering,
       samples=_window_sum_grad_samples,
       failures=(Failure((Arg((1, 1, 2, 2)),), {**_TWO, "spatial": (6, 4)}, "has windows [1, 1, 3, 2]"),
                 Failure((Arg((1, 1, 2, 2)),), {**_TWO, "spatial": (4,)}, "one size of `spatial`"))),
)
