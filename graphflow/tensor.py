"""The Tensor: a value of a graph that is being written down, with Python's operators on it.

No graph is open while a net is declared: a Tensor knows the nodes that it is computed from, and `gf.function`
collects those that its outputs need. Binary operations take Python numbers, lists and NumPy arrays on either
side; these are weak: they take the other operand's element type (but a float makes an integer a float32).
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Union

import numpy as np

from graphflow.autocast import autocast_type
from graphflow.compiler.ir.graph import Node, TensorType, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.half import passes_float32, rounded_to
from graphflow.compiler.ops.record import Op
from graphflow.compiler.plan.dims import Dim, DimLike, symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, I32, I64, DType, as_dtype, promote
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError, UserError
from graphflow.compiler.plan.text import RESERVED
from graphflow.scope import here
from graphflow.tracing import note

Operand = Union["Tensor", int, float, bool, Sequence[Any], np.ndarray, np.generic]  # noqa: UP007
Axes = int | Sequence[int] | None


class Tensor:
    """A value of the graph: ``shape`` (numbers and dimensions), ``dtype``, ``ndim``; NumPy's operators and
    methods.

    `value` is what the compiler sees. `checks` are the nodes that a program must check when it computes this.
    Comparisons are elementwise, so a Tensor has no truth value; as a key of a dict it is the object itself.
    """
    __slots__ = ("value", "checks")
    __array_ufunc__ = None                           # lets ``array + tensor`` come to __radd__

    def __init__(self, value: Value, checks: tuple[Node, ...] = ()) -> None:
        self.value, self.checks = value, checks

    @property
    def shape(self) -> tuple[DimLike, ...]:
        """The extents of the axes: numbers, or dimensions where a call decides them."""
        return self.value.shape

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.value.shape)

    @property
    def name(self) -> str:
        """The name of a feed or a parameter, "" for other tensors."""
        node = self.value.node
        if node.op not in ("input", "state"):
            return ""
        return str(getattr(node, "name", node.attrs["name"]))        # a Variable decides its name late

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<Tensor{name} {self.value.type} from {self.value.op}>"

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise UseError("a Tensor has no truth value: it is computed only when a program runs",
                       op=self.value.op,
                       shapes=[self.shape], where=here(),
                       hint="choose between values with gf.where(condition, x, y)")

    def __len__(self) -> int:
        if not self.shape or not isinstance(self.shape[0], int):
            raise UseError("this Tensor has no fixed length", shapes=[self.shape], where=here(),
                           hint="its first extent is tensor.shape[0]")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        if not self.shape or not isinstance(self.shape[0], int):
            raise UseError("only a Tensor whose first axis has a fixed extent can be iterated over",
                           shapes=[self.shape], where=here())
        return (self[i] for i in range(self.shape[0]))

    def __float__(self) -> Any:
        raise UseError("a Tensor is no number: it is computed only when a program runs", shapes=[self.shape],
                       where=here(), hint="make a program with gf.function(inputs, tensor) and call it")

    __int__ = __index__ = __complex__ = __float__

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise UseError("a Tensor is no array: it is computed only when a program runs", shapes=[self.shape],
                       where=here(), hint="use the function of that name in graphflow, or gf.function")

    def __getitem__(self, key: Any) -> Tensor:
        from graphflow.slicing import take_slice
        return take_slice(self, key)

    def sum(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The sum over all axes, or those named; see `graphflow.functions.sum`."""
        return _functions().sum(self, axis, keepdims)

    def mean(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The mean over all axes, or those named; see `graphflow.functions.mean`."""
        return _functions().mean(self, axis, keepdims)

    def max(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The largest element over all axes, or those named; see `graphflow.functions.max`."""
        return _functions().max(self, axis, keepdims)

    def min(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The smallest element over all axes, or those named; see `graphflow.functions.min`."""
        return _functions().min(self, axis, keepdims)

    def prod(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The product over all axes, or those named; see `graphflow.functions.prod`."""
        return _functions().prod(self, axis, keepdims)

    def any(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """Whether one element holds over all axes, or those named; see `graphflow.functions.any`."""
        return _functions().any(self, axis, keepdims)

    def all(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """Whether all elements hold over all axes, or those named; see `graphflow.functions.all`."""
        return _functions().all(self, axis, keepdims)

    def var(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The variance (divided by the count) over all axes, or those named; see
        `graphflow.functions.var`."""
        return _functions().var(self, axis, keepdims)

    def std(self, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The standard deviation over all axes, or those named; see `graphflow.functions.std`."""
        return _functions().std(self, axis, keepdims)

    def argmax(self, axis: int | None = None) -> Tensor:
        """The position of the largest element along the axis, or in row-major order; int64."""
        return _functions().argmax(self, axis)

    def argmin(self, axis: int | None = None) -> Tensor:
        """The position of the smallest element along the axis, or in row-major order; int64."""
        return _functions().argmin(self, axis)

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in row-major order under another shape; one extent may be -1."""
        return _functions().reshape(self, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Tensor:
        """The axes in another order; without arguments reversed."""
        return _functions().transpose(self, axes[0] if len(axes) == 1 else axes or None)

    @property
    def T(self) -> Tensor:
        """The axes reversed."""
        return _functions().transpose(self)

    def astype(self, dtype: Any) -> Tensor:
        """The elements as another type."""
        return cast(self, dtype)

    def __add__(self, other: Operand) -> Tensor:
        return elementwise("add", self, other)

    def __radd__(self, other: Operand) -> Tensor:
        return elementwise("add", other, self)

    def __sub__(self, other: Operand) -> Tensor:
        return elementwise("sub", self, other)

    def __rsub__(self, other: Operand) -> Tensor:
        return elementwise("sub", other, self)

    def __mul__(self, other: Operand) -> Tensor:
        return elementwise("mul", self, other)

    def __rmul__(self, other: Operand) -> Tensor:
        return elementwise("mul", other, self)

    def __truediv__(self, other: Operand) -> Tensor:
        return elementwise("div", self, other)

    def __rtruediv__(self, other: Operand) -> Tensor:
        return elementwise("div", other, self)

    def __floordiv__(self, other: Operand) -> Tensor:
        return elementwise("floordiv", self, other)

    def __rfloordiv__(self, other: Operand) -> Tensor:
        return elementwise("floordiv", other, self)

    def __mod__(self, other: Operand) -> Tensor:
        return elementwise("mod", self, other)

    def __rmod__(self, other: Operand) -> Tensor:
        return elementwise("mod", other, self)

    def __lshift__(self, other: Operand) -> Tensor:
        return elementwise("shift_left", self, other)

    def __rlshift__(self, other: Operand) -> Tensor:
        return elementwise("shift_left", other, self)

    def __rshift__(self, other: Operand) -> Tensor:
        return elementwise("shift_right", self, other)

    def __rrshift__(self, other: Operand) -> Tensor:
        return elementwise("shift_right", other, self)

    def __pow__(self, other: Operand) -> Tensor:
        return power(self, other)

    def __rpow__(self, other: Operand) -> Tensor:
        return power(other, self)

    def __matmul__(self, other: Operand) -> Tensor:
        return _functions().matmul(self, other)

    def __rmatmul__(self, other: Operand) -> Tensor:
        return _functions().matmul(other, self)

    def __and__(self, other: Operand) -> Tensor:
        return logic("logical_and", "bit_and", self, other)

    __rand__ = __and__

    def __or__(self, other: Operand) -> Tensor:
        return logic("logical_or", "bit_or", self, other)

    __ror__ = __or__

    def __xor__(self, other: Operand) -> Tensor:
        return logic("ne", "bit_xor", self, other)

    __rxor__ = __xor__

    def __eq__(self, other: Operand) -> Tensor:          # type: ignore[override]
        return elementwise("eq", self, other)

    def __ne__(self, other: Operand) -> Tensor:          # type: ignore[override]
        return elementwise("ne", self, other)

    def __lt__(self, other: Operand) -> Tensor:
        return elementwise("lt", self, other)

    def __le__(self, other: Operand) -> Tensor:
        return elementwise("le", self, other)

    def __gt__(self, other: Operand) -> Tensor:
        return elementwise("gt", self, other)

    def __ge__(self, other: Operand) -> Tensor:
        return elementwise("ge", self, other)

    def __neg__(self) -> Tensor:
        return elementwise("neg", self)

    def __abs__(self) -> Tensor:
        return elementwise("abs", self)

    def __invert__(self) -> Tensor:
        return elementwise("logical_not", self) if self.dtype == BOOL else elementwise("bit_xor", self, -1)


def _functions() -> Any:
    from graphflow import functions  # which is written in terms of Tensor
    return functions


def dim(name: str) -> DimLike:
    """A dimension whose extent each call decides: ``N = gf.dim("N")`` in the shapes of inputs.

    Inputs that share it must agree. Dimensions are computed with: ``2 * N + 1`` is the extent of an array,
    too.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UseError(f"{name!r} is no name for a dimension", hint="use letters, digits and _", where=here())
    if name in RESERVED or re.fullmatch("[a-z][0-9]+", name):
        raise UseError(f"{name!r} can't name a dimension: the compiler's texts use it for something else",
                       hint="use another word; types, and a small letter with a number, are taken",
                       where=here())
    return symbol(name)


def apply(op: str, inputs: Sequence[Tensor], regions: Sequence[Any] = (), **attrs: Any) -> Any:
    """The node `op` on the tensors: its result, or a tuple of them where the op has several.

    The node remembers the user's line; errors of its type rule come out there, with the op and the shapes.
    """
    record = OPS[op]
    wanted = autocast_type(record)
    if wanted is not None:
        inputs = [cast(t, wanted) if t.dtype.is_half or t.dtype == F32 else t for t in inputs]
    rounded = rounded_to(record, [t.dtype for t in inputs])
    if rounded is None:
        results = _node(record, inputs, regions, attrs)
    else:                                                      # halves: float32 between casts
        wide = [cast(t, F32) if t.dtype.is_half else t for t in inputs]
        results = tuple(cast(t, rounded) if t.dtype == F32 else t
                        for t in _node(record, wide, regions, attrs))
    return results if len(results) != 1 else results[0]


def _node(record: Op, inputs: Sequence[Tensor], regions: Sequence[Any], attrs: dict[str, Any]
          ) -> tuple[Tensor, ...]:
    where = here()
    try:
        full = record.complete(attrs)
        types = tuple(record.infer([t.value.type for t in inputs], full, regions))
    except UserError as error:
        error.op = error.op or record.name
        if error.shapes is None:
            error.shapes = tuple(t.shape for t in inputs)
        raise error.with_location(where) from None
    operands = tuple(t.value for t in inputs)
    node = Node(record.name, operands, full, tuple(regions), types, (where,) if where else ())
    note(node)
    checks = tuple(dict.fromkeys(check for t in inputs for check in t.checks))
    return tuple(Tensor(v, checks) for v in node.results)


def with_check(x: Tensor, holds: Tensor, message: str, feed: str = "") -> Tensor:
    """`x`, such that every program that computes with it first refuses the call with `message` unless
    `holds`."""
    check = apply("check", [holds], message=message, feed=feed)
    return Tensor(x.value, tuple(dict.fromkeys((*x.checks, *holds.checks, check.value.node))))


# --- operands: constants, promotion, broadcasting

def constant(value: Any, dtype: Any = None) -> Tensor:
    """A literal number or a small array (at most 256 elements).

    Without `dtype` Python's floats are float32 and its ints int32 (int64 where they need it); NumPy arrays
    keep theirs.
    """
    if isinstance(value, Tensor):
        raise UseError("this is a Tensor already", where=here(), hint="convert it with gf.cast(x, dtype)")
    array = as_array(value)
    if dtype is not None:
        target = element_type(dtype)
    elif isinstance(value, (np.ndarray, np.generic)):
        target = element_type(array.dtype)
    else:
        target = _weak_dtype(array)
    return _literal(array, target)


def element_type(dtype: Any) -> DType:
    """The element type that the user names; DTypeError at the user's line if it is none."""
    try:
        return as_dtype(dtype)
    except DTypeError as error:
        raise error.with_location(here()) from None


def as_array(value: Any) -> np.ndarray:
    """A number, list or array as a NumPy array; UseError for anything else."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UseError(f"this is neither a Tensor nor numbers: {error}", where=here()) from None
    if array.dtype.kind not in "fiub":
        raise UseError(f"{value!r} is neither a Tensor nor a number", where=here())
    return array


def _weak_dtype(array: np.ndarray) -> DType:
    if array.dtype.kind == "b":
        return BOOL
    if array.dtype.kind == "f":
        return F32
    wide = array.size and not -2 ** 31 <= int(array.min()) <= int(array.max()) < 2 ** 31
    return I64 if wide else I32


def _literal(array: np.ndarray, dtype: DType) -> Tensor:
    if dtype.is_integer and array.dtype.kind == "f" and not np.all(array == np.floor(array)):
        raise DTypeError(f"a constant with a fraction is no {dtype.full_name}", where=here())
    if array.ndim == 0:
        value = array.item()
        plain = bool(value) if dtype == BOOL else float(value) if dtype.has_gradient else int(value)
        return apply("constant", [], value=plain, dtype=dtype)
    if dtype.is_integer and array.size:
        limits = np.iinfo(dtype.numpy)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DTypeError(f"a constant lies outside {dtype.full_name}, which holds {limits.min} to "
                             f"{limits.max}",
                             where=here())
    data = np.ascontiguousarray(array.astype(dtype.numpy.newbyteorder("<"))).tobytes()
    return apply("array", [], data=data, dtype=dtype, shape=array.shape)


def as_tensors(operands: Sequence[Any], dtype: DType | None = None) -> list[Tensor]:
    """The operands as tensors of one element type: `dtype`, or the promotion of the tensors', to which
    numbers, lists and arrays adapt."""
    if dtype is None:
        dtype = common_dtype(operands)
    return [cast(x, dtype) if isinstance(x, Tensor) else _literal(as_array(x), dtype) for x in operands]


_KIND_RANK = {"b": 0, "i": 1, "u": 1, "h": 2, "f": 2}
"""A weak operand gives way to a strong one of its own rank or a higher one."""


def common_dtype(operands: Sequence[Any]) -> DType:
    """The promotion of the tensors' types; numbers, lists and arrays only decide between bool, integer and
    float."""
    strong = [x.dtype for x in operands if isinstance(x, Tensor)]
    weak = [_weak_dtype(as_array(x)) for x in operands if not isinstance(x, Tensor)]
    out = strong[0] if strong else weak[0]
    for d in strong[1:]:
        out = promote(out, d)
    for d in weak:
        if _KIND_RANK[d.kind] > _KIND_RANK[out.kind]:
            out = d
    return out


def cast(x: Operand, dtype: Any) -> Tensor:
    """`x` as another element type; `x` itself where it has it.

    Floats become integers by dropping the fraction, numbers bools by ``x != 0``.
    """
    target = element_type(dtype)
    if not isinstance(x, Tensor):
        return constant(x, target)
    source: Tensor = apply("cast", [x], dtype=F32) if passes_float32(x.dtype, target) else x
    return source if source.dtype == target else apply("cast", [source], dtype=target)


def broadcast_shapes(op: str, shapes: Sequence[tuple[DimLike, ...]]) -> tuple[DimLike, ...]:
    """The shape that the operands of `op` stretch to by NumPy's rules; a symbolic extent never counts as
    1."""
    rank = max(map(len, shapes))
    out: list[DimLike] = []
    for axis in range(-rank, 0):
        extents = [s[axis] for s in shapes if len(s) >= -axis]
        wide = list(dict.fromkeys(e for e in extents if e != 1)) or [1]
        if len(wide) > 1:
            raise ShapeError(f"{op}: the operands do not fit together: axis {axis} is {wide[0]} in one and "
                             f"{wide[1]} in the other", op=op, shapes=shapes, where=here(),
                             hint=_fit_hint(wide))
        out.append(wide[0])
    return tuple(out)


def _fit_hint(extents: Sequence[DimLike]) -> str:
    names = [str(e) for e in extents if isinstance(e, Dim)]
    if len(names) > 1:
        return f"if {names[0]} and {names[1]} are the same, declare both inputs with one gf.dim"
    if names:
        return f"{names[0]} is decided by the call and never counts as 1"
    return "extents must be equal, or 1; line axes up with gf.expand_dims or gf.reshape"


def stretch(x: Tensor, shape: tuple[DimLike, ...]) -> Tensor:
    """`x` broadcast to `shape`; `x` itself where it has that shape."""
    return x if x.shape == shape else apply("broadcast_to", [x], shape=shape)


def elementwise(op: str, *operands: Any) -> Tensor:
    """The elementwise op on operands of any mix of types and shapes: they are promoted and broadcast
    first."""
    record = OPS[op]
    if len(operands) != len(record.operands):
        raise UseError(f"{op} takes {len(record.operands)} operand(s) ({', '.join(record.operands)}), "
                       f"got {len(operands)}", op=op, where=here())
    if not any(isinstance(x, Tensor) for x in operands):
        operands = (constant(operands[0]), *operands[1:])
    if op == "where":
        condition = operands[0] if isinstance(operands[0], Tensor) else constant(operands[0])
        tensors = [condition, *as_tensors(operands[1:])]
    else:
        dtype = common_dtype(operands)
        if not dtype.has_gradient and not takes(op, dtype):
            dtype = next((d for d in (I32, F32) if takes(op, d)), dtype)
        tensors = as_tensors(operands, dtype)
    shape = broadcast_shapes(op, [t.shape for t in tensors])
    return apply(op, [stretch(t, shape) for t in tensors])


_TAKES: dict[tuple[str, DType], bool] = {}


def takes(op: str, dtype: DType) -> bool:
    """Whether the elementwise op's type rule accepts that element type."""
    key = op, dtype
    if key not in _TAKES:
        record = OPS[op]
        try:
            record.infer([TensorType(dtype, ())] * len(record.operands), record.complete({}), ())
            _TAKES[key] = True
        except UserError:
            _TAKES[key] = False
    return _TAKES[key]


# --- Python's operators

def power(x: Any, y: Any) -> Tensor:
    """``x ** y``. An exponent of 2 or 3 multiplies, so it keeps integers; otherwise the result is a float."""
    if isinstance(x, Tensor) and isinstance(y, int) and not isinstance(y, bool) and y in (2, 3):
        square = elementwise("mul", x, x)
        return square if y == 2 else elementwise("mul", square, x)
    return elementwise("pow", x, y)


def logic(on_bools: str, on_integers: str, x: Any, y: Any) -> Tensor:
    """`&`, `|` and `^`: of bools the logical operation, of integers the one on their bits."""
    return elementwise(on_bools if common_dtype([x, y]) == BOOL else on_integers, x, y)
