"""Arithmetic, functions, comparisons and logic on equal shapes, element by element.

Operands have the result's shape and one element type: broadcasting (`broadcast_to`) and promotion (`cast`)
are explicit nodes that the language inserts. Each op is a row: its kinds of element type, its gradient and
its domain for tests; what it computes is the scalar function of the same name (see `kernel.scalars`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.ops.half import passes_float32
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
from graphflow.compiler.plan.dtypes import BF16, BOOL, DTYPES, F16, F32, F64, I32, U8, DType
from graphflow.compiler.plan.errors import DTypeError, ShapeError

_KINDS = {"f": "floats", "h": "halves", "i": "signed integers", "u": "unsigned integers", "b": "bools"}
_SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (1,), (0,), (2, 3), (3, 1, 2), (2, 1, 3, 2))
_FEW_SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (0,), (3, 1, 2))      # for the many unary functions


def check_kind(op: str, dtype: DType, kinds: str) -> None:
    """DTypeError unless the element type is of one of the kinds, letters as in `DType.kind`."""
    if dtype.kind not in kinds:
        takes = " or ".join(_KINDS[k] for k in kinds)
        raise DTypeError(f"{op} takes {takes}, not {dtype.full_name}", op=op, hint="convert it with cast")


def check_equal(op: str, types: Sequence[TensorType]) -> None:
    """DTypeError or ShapeError, which names the axis, unless the types are equal."""
    shapes = [t.shape for t in types]
    for t in types[1:]:
        first = types[0]
        if t.dtype != first.dtype:
            raise DTypeError(f"{op} takes operands of one element type, got {first.dtype.full_name} and "
                             f"{t.dtype.full_name}", op=op, shapes=shapes,
                             hint="convert one of them with cast")
        if t.rank != first.rank:
            raise ShapeError(f"{op} takes operands of one shape, got {first.rank} axes and {t.rank}", op=op,
                             shapes=shapes)
        for axis, (a, b) in enumerate(zip(first.shape, t.shape)):
            if a != b:
                raise ShapeError(f"{op}: the operands differ in axis {axis}: {a} and {b}", op=op,
                                 shapes=shapes)


def _infer(op: str, count: int, kinds: str, result: DType | None) -> Callable:
    def infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
        check_operands(op, types, count)
        for t in types:
            check_kind(op, t.dtype, kinds)
        check_equal(op, types)
        return [TensorType(result or types[0].dtype, types[0].shape)]
    return infer


def _lower(function: str, count: int) -> Pointwise:
    def value(p: Point, index: Index, result: int) -> Expr:
        return p.apply(function, *(p.operand(i, index) for i in range(count)), dtype=p.node.types[0].dtype)
    return Pointwise(value)


def _flops(function: str) -> Callable[[Node], Any]:
    return lambda node: node.types[0].size * SCALARS[function].flops


def _samples(kinds: str, ranges: Sequence[tuple[float, float]], smooth: bool) -> list[Sample]:
    out = []
    if "f" in kinds:
        for shape in _SHAPES if len(ranges) > 1 else _FEW_SHAPES:
            args = tuple(Arg(shape, low=low, high=high) for low, high in ranges)
            out.append(Sample(args, smooth=smooth, second=smooth and shape in ((), (7,))))
    for dtype in DTYPES.values():
        if dtype.kind in kinds and dtype.kind != "f":
            limits = [(0.0 if dtype.kind in "ub" else low, 1.0 if dtype.kind == "b" else high) for low,
                      high in ranges]
            for shape in ((), (9,), (0, 2)) if dtype in (I32, BOOL) else ((9,),):
                out.append(Sample(tuple(Arg(shape, dtype.name, *limit) for limit in limits), smooth=False,
                                  second=False))
    return out


def _failures(count: int, kinds: str) -> list[Failure]:
    good = next(d.name for d in (F32, I32, BOOL) if d.kind in kinds)
    out = [Failure((Arg((2,), good),) * (count + 1), {}, f"takes {count} operand(s), got {count + 1}")]
    out += [Failure((Arg((2,), d.name),) * count, {}, f"not {d.full_name}") for d in (F32, I32, BOOL, U8)
            if d.kind not in kinds]
    if count == 2:
        out += [Failure((Arg((2, 3), good), Arg((2, 4), good)), {}, "differ in axis 1: 3 and 4"),
                Failure((Arg((2, 1), good), Arg((2, 4), good)), {}, "differ in axis 1: 1 and 4"),
                Failure((Arg((3,), good), Arg((1, 3), good)), {}, "got 1 axes and 2")]
        if kinds != "b":
            other = "f64" if good == "f32" else "i64"
            out.append(Failure((Arg((3,), good), Arg((3,), other)), {}, "of one element type"))
    return out


def _row(name: str, count: int, kinds: str, doc: str, gradient: Callable | None = None, *,
         ranges: Sequence[tuple[float, float]] | None = None, function: str | None = None,
         result: DType | None = None, names: tuple[str, ...] = ("x", "y")) -> Op:
    """One op. gradient(b, g, y, *operands): a cotangent per operand; ranges: the domain, per operand."""
    function = function or name
    compute = SCALARS[function].numpy
    spans = list(ranges or [(-2.0, 2.0)] * count)
    rule = None
    if gradient is not None:
        def rule(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
            found = gradient(b, cotangents[0], node.result(), *node.inputs)
            return found if isinstance(found, list) else [found]
    return Op(name, "elementwise", doc, names[:count], _infer(name, count, kinds, result),
              lambda arrays, attrs, types: [compute(*arrays)], rule, _lower(function, count),
              flops=_flops(function),
              samples=lambda: _samples(kinds, spans, gradient is not None), failures=_failures(count, kinds))


def _flat(b: Any, g: Value, y: Value, *operands: Value) -> list[Value | None]:
    return [None] * len(operands)                     # a derivative of 0 wherever there is one


def _div_gradient(b: Any, g: Value, y: Value, x: Value, by: Value) -> list[Value]:
    part = b.div(g, by)
    return [part, b.neg(b.mul(part, y))]


def _mod_gradient(b: Any, g: Value, y: Value, x: Value, by: Value) -> list[Value]:
    return [g, b.neg(b.mul(g, b.floordiv(x, by)))]


def _pow_gradient(b: Any, g: Value, y: Value, x: Value, e: Value) -> list[Value]:
    # At x = 0, x ** (e - 1) for e = 0 and log x are infinite, where the products are to be 0.
    one = b.constant(1, x.dtype, x.shape)
    lower = b.where(b.eq(e, 0), one, b.sub(e, 1))
    safe = b.where(b.eq(x, 0), one, x)
    return [b.mul(g, b.mul(e, b.pow(x, lower))), b.mul(g, b.mul(y, b.log(safe)))]


def _extreme_gradient(wins: str) -> Callable:
    def gradient(b: Any, g: Value, y: Value, *operands: Value) -> list[Value]:
        zero, half = b.zeros(g.type), b.mul(g, 0.5)
        tie = b.where(b.eq(*operands), half, zero)
        compare = getattr(b, wins)
        return [b.where(compare(operands[0], operands[1]), g, tie),
                b.where(compare(operands[1], operands[0]), g, tie)]
    return gradient


def _unless_zero(b: Any, x: Value) -> Value:
    """x with 1 for 0: a divisor whose quotients by 0 are not used, or are to be 0."""
    return b.where(b.eq(x, 0), b.constant(1, x.dtype, x.shape), x)


def _atan2_gradient(b: Any, g: Value, angle: Value, y: Value, x: Value) -> list[Value]:
    r = _unless_zero(b, b.hypot(x, y))                # twice: its square may overflow
    part = b.div(g, r)
    return [b.mul(part, b.div(x, r)), b.neg(b.mul(part, b.div(y, r)))]


def _hypot_gradient(b: Any, g: Value, r: Value, x: Value, y: Value) -> list[Value]:
    r = _unless_zero(b, r)
    return [b.mul(g, b.div(x, r)), b.mul(g, b.div(y, r))]


def _copysign_gradient(b: Any, g: Value, result: Value, x: Value, y: Value) -> list[Value | None]:
    return [b.mul(g, b.mul(b.sign(x), b.copysign(b.constant(1, y.dtype, y.shape), y))), None]


def _one_minus_square(b: Any, x: Value) -> Value:
    return b.mul(b.sub(1, x), b.add(x, 1))            # x² would be rounded before what it cancels with


def _arccosh_gradient(b: Any, g: Value, y: Value, x: Value) -> Value:
    return b.mul(g, b.mul(b.rsqrt(b.sub(x, 1)), b.rsqrt(b.add(x, 1))))


_POSITIVE = [(0.1, 3.0)]
_INSIDE = [(-0.8, 0.8)]
_DIVISOR = [(-2.0, 2.0), (0.5, 2.0)]
_NUMBERS = "fiu"

_ARITHMETIC = (
    _row("add", 2, _NUMBERS, "x + y. Integers wrap.", lambda b, g, y, x, z: [g, g]),
    _row("sub", 2, _NUMBERS, "x - y. Integers wrap.", lambda b, g, y, x, z: [g, b.neg(g)]),
    _row("mul", 2, _NUMBERS, "x * y. Integers wrap.", lambda b, g, y, x, z: [b.mul(g, z), b.mul(g, x)]),
    _row("div", 2, "f", "x / y of floats.", _div_gradient, ranges=_DIVISOR),
    _row("mod", 2, _NUMBERS, "The rest of floordiv, with y's sign; 0 for an integer y of 0.", _mod_gradient,
         ranges=[(-2.0, 2.0), (1.1, 1.9)]),
    _row("floordiv", 2, _NUMBERS, "x / y rounded down; 0 for an integer y of 0. Its gradient is 0.", _flat,
         ranges=[(-9.0, 9.0), (1.0, 4.0)]),
    _row("pow", 2, "f", "x ** y of floats. With y = 0 the derivative by x is 0, with x = 0 that by y is.",
         _pow_gradient, ranges=[(0.2, 2.0), (-2.0, 2.0)]),
    _row("hypot", 2, "f", "√(x² + y²), without overflow. Its gradient at the origin is 0.", _hypot_gradient,
         ranges=_DIVISOR),
    _row("atan2", 2, "f", "The angle of the point (x, y), in [-π, π]. Its gradient at the origin is 0.",
         _atan2_gradient, ranges=_DIVISOR, names=("y", "x")),
    _row("copysign", 2, "f", "|x| with y's sign, that of a zero too. The gradient by x at 0 is 0.",
         _copysign_gradient, ranges=_DIVISOR),
    _row("minimum", 2, _NUMBERS, "The smaller; NaN if either is. Where they are equal, each gets half of the "
         "gradient (as in PyTorch and JAX).", _extreme_gradient("lt")),
    _row("maximum", 2, _NUMBERS, "The larger; NaN if either is. Where they are equal, each gets half of the "
         "gradient (as in PyTorch and JAX).", _extreme_gradient("gt")),
)

_FUNCTIONS = (
    _row("neg", 1, _NUMBERS, "-x. Integers wrap.", lambda b, g, y, x: b.neg(g)),
    _row("abs", 1, _NUMBERS, "|x|. The gradient at 0 is 0.", lambda b, g, y, x: b.mul(g, b.sign(x))),
    _row("sign", 1, _NUMBERS, "-1, 0 or 1; NaN for NaN. Its gradient is 0.", _flat),
    _row("sqrt", 1, "f", "The square root.", lambda b, g, y, x: b.div(b.mul(g, 0.5), y), ranges=_POSITIVE),
    _row("rsqrt", 1, "f", "1 / sqrt(x), rounded twice.",
         lambda b, g, y, x: b.mul(g, b.mul(b.div(y, x), -0.5)), ranges=_POSITIVE),
    _row("cbrt", 1, "f", "The cube root, of negative numbers too.",
         lambda b, g, y, x: b.div(g, b.mul(b.mul(y, y), 3)), ranges=[(0.2, 4.0)]),
    _row("exp", 1, "f", "e ** x.", lambda b, g, y, x: b.mul(g, y)),
    _row("exp2", 1, "f", "2 ** x.", lambda b, g, y, x: b.mul(g, b.mul(y, math.log(2)))),
    _row("expm1", 1, "f", "exp(x) - 1, exact near 0.", lambda b, g, y, x: b.mul(g, b.add(y, 1))),
    _row("log", 1, "f", "The natural logarithm.", lambda b, g, y, x: b.div(g, x), ranges=_POSITIVE),
    _row("log2", 1, "f", "The logarithm to the base 2.",
         lambda b, g, y, x: b.mul(b.div(g, x), 1 / math.log(2)), ranges=_POSITIVE),
    _row("log10", 1, "f", "The logarithm to the base 10.",
         lambda b, g, y, x: b.mul(b.div(g, x), 1 / math.log(10)), ranges=_POSITIVE),
    _row("log1p", 1, "f", "log(1 + x), exact near 0.", lambda b, g, y, x: b.div(g, b.add(x, 1)),
         ranges=[(-0.8, 2.0)]),
    _row("sinh", 1, "f", "The hyperbolic sine.", lambda b, g, y, x: b.mul(g, b.cosh(x))),
    _row("cosh", 1, "f", "The hyperbolic cosine.", lambda b, g, y, x: b.mul(g, b.sinh(x))),
    _row("tanh", 1, "f", "The hyperbolic tangent.", lambda b, g, y, x: b.mul(g, b.sub(1, b.mul(y, y)))),
    _row("sigmoid", 1, "f", "1 / (1 + exp(-x)), without overflow.",
         lambda b, g, y, x: b.mul(g, b.mul(y, b.sub(1, y)))),
    _row("softplus", 1, "f", "log(1 + exp(x)), without overflow.", lambda b, g, y, x: b.mul(g, b.sigmoid(x))),
    _row("erf", 1, "f", "The error function.",
         lambda b, g, y, x: b.mul(g, b.mul(b.exp(b.neg(b.mul(x, x))), 2 / math.sqrt(math.pi)))),
    _row("erfc", 1, "f", "1 - erf(x), accurate where that is tiny.",
         lambda b, g, y, x: b.mul(g, b.mul(b.exp(b.neg(b.mul(x, x))), -2 / math.sqrt(math.pi)))),
    _row("erfinv", 1, "f", "The inverse of erf on [-1, 1]; NaN outside.",
         lambda b, g, y, x: b.mul(g, b.mul(b.exp(b.mul(y, y)), math.sqrt(math.pi) / 2)), ranges=_INSIDE),
    _row("sin", 1, "f", "The sine; x in radians.", lambda b, g, y, x: b.mul(g, b.cos(x))),
    _row("cos", 1, "f", "The cosine; x in radians.", lambda b, g, y, x: b.neg(b.mul(g, b.sin(x)))),
    _row("tan", 1, "f", "The tangent; x in radians.", lambda b, g, y, x: b.mul(g, b.add(b.mul(y, y), 1)),
         ranges=[(-1.2, 1.2)]),
    _row("asin", 1, "f", "The inverse of sin, in [-π/2, π/2]; NaN outside [-1, 1].",
         lambda b, g, y, x: b.mul(g, b.rsqrt(_one_minus_square(b, x))), ranges=_INSIDE),
    _row("acos", 1, "f", "The inverse of cos, in [0, π]; NaN outside [-1, 1].",
         lambda b, g, y, x: b.neg(b.mul(g, b.rsqrt(_one_minus_square(b, x)))), ranges=_INSIDE),
    _row("atan", 1, "f", "The inverse of tan, in [-π/2, π/2].",
         lambda b, g, y, x: b.div(g, b.add(b.mul(x, x), 1))),
    _row("asinh", 1, "f", "The inverse of sinh.",
         lambda b, g, y, x: b.div(g, b.hypot(x, b.constant(1, x.dtype, x.shape)))),
    _row("acosh", 1, "f", "The inverse of cosh, at least 0; NaN below 1.", _arccosh_gradient,
         ranges=[(1.2, 3.0)]),
    _row("atanh", 1, "f", "The inverse of tanh; NaN outside [-1, 1].",
         lambda b, g, y, x: b.div(g, _one_minus_square(b, x)), ranges=_INSIDE),
    _row("floor", 1, "f", "Rounded down. Its gradient is 0.", _flat),
    _row("ceil", 1, "f", "Rounded up. Its gradient is 0.", _flat),
    _row("trunc", 1, "f", "Rounded towards 0. Its gradient is 0.", _flat),
    _row("round", 1, "f", "Rounded to the nearest integer, halves to the even one. Its gradient is 0.",
         _flat),
    _row("isnan", 1, "f", "Whether x is NaN.", result=BOOL),
    _row("isfinite", 1, "f", "Whether x is neither NaN nor infinite.", result=BOOL),
)

_COMPARISONS = tuple(
    _row(name, 2, kinds, f"Whether x {sign} y, as a bool.", result=BOOL, ranges=[(-1.4, 1.4)] * 2)
    for name, sign, kinds in (("eq", "=", "fiub"), ("ne", "≠", "fiub"), ("lt", "<", _NUMBERS),
                              ("le", "≤", _NUMBERS), ("gt", ">", _NUMBERS), ("ge", "≥", _NUMBERS)))

_LOGIC = (
    _row("logical_and", 2, "b", "Whether both hold.", function="and"),
    _row("logical_or", 2, "b", "Whether at least one holds.", function="or"),
    _row("logical_not", 1, "b", "Whether it does not hold.", function="not"),
    _row("bit_and", 2, "iu", "The bits that both integers have."),
    _row("bit_or", 2, "iu", "The bits that either integer has."),
    _row("bit_xor", 2, "iu", "The bits that one of the integers has."),
    _row("shift_left", 2, "iu", "x's bits, y places up; 0 <= y < bits of x.",
         ranges=[(-9.0, 9.0), (0.0, 7.0)]),
    _row("shift_right", 2, "iu", "x's bits, y places down, keeping a sign; 0 <= y < bits of x.",
         ranges=[(-99.0, 99.0), (0.0, 7.0)]),
)


def _infer_where(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("where", types, 3)
    if types[0].dtype != BOOL:
        raise DTypeError(f"the condition of where is a bool, not {types[0].dtype.full_name}", op="where",
                         shapes=[t.shape for t in types], hint="compare it, e.g. x != 0")
    check_equal("where", types[1:])
    check_equal("where", [TensorType(BOOL, t.shape) for t in types])
    return [types[1]]


def _where_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    g, zero = cotangents[0], b.zeros(node.types[0])
    return [None, b.where(node.inputs[0], g, zero), b.where(node.inputs[0], zero, g)]


def _relu_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    g = cotangents[0]                                 # through the result, so that x need not be kept
    return [b.where(b.gt(node.result(), 0), g, b.zeros(node.types[0]))]


def _lower_relu(p: Point, index: Index, result: int) -> Expr:
    dtype = p.node.types[0].dtype
    return p.apply("maximum", p.operand(0, index), p.const(0.0, dtype), dtype=dtype)


def _infer_cast(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("cast", types, 1)
    if passes_float32(types[0].dtype, attrs["dtype"]):
        raise DTypeError(f"cast takes {types[0].dtype.full_name} to {attrs['dtype'].full_name} by float32 "
                         "only", op="cast", hint="cast to float32 first")
    return [TensorType(attrs["dtype"], types[0].shape)]


def _cast_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    source, target = node.inputs[0].dtype, node.types[0].dtype
    return [b.cast(cotangents[0], dtype=source) if source.has_gradient and target.has_gradient else None]


def _lower_cast(p: Point, index: Index, result: int) -> Expr:
    x, dtype = p.operand(0, index), p.node.types[0].dtype
    return x if p.node.inputs[0].dtype == dtype else p.apply("cast", x, dtype=dtype)


def _cast_samples() -> list[Sample]:
    out = [Sample((Arg(shape),), {"dtype": F64}, second=False) for shape in _SHAPES]
    out += [Sample((Arg((3, 4), source, 0 if target.kind == "u" else -9, 9),), {"dtype": target},
                   smooth=False)
            for source in ("float", "i32", "i64", "u32", "u8", "bool") for target in DTYPES.values()
            if not target.is_half]
    out += [Sample((Arg((3, 5), source, -70000, 70000),), {"dtype": target}, smooth=False)
            for half in (F16, BF16)
            for source, target in (("f32", half), (half.name, F32), (half.name, half))]
    return out


def _where_samples() -> list[Sample]:
    out = [Sample((Arg(s, "bool", 0, 1), Arg(s), Arg(s)), second=s == (7,)) for s in _SHAPES]
    return [*out, Sample((Arg((4,), "bool", 0, 1), Arg((4,), "i64"), Arg((4,), "i64")), smooth=False)]


def _lower_logaddexp(p: Point, index: Index, result: int) -> Expr:
    """The greater one plus log1p(exp(-|x - y|)); equal infinities have the difference 0."""
    dtype = p.node.types[0].dtype
    x, y = p.bind(p.operand(0, index)), p.bind(p.operand(1, index))
    gap = p.apply("where", p.apply("eq", x, y, dtype=BOOL), p.const(0.0, dtype),
                  p.apply("abs", p.apply("sub", x, y, dtype=dtype), dtype=dtype), dtype=dtype)
    rest = p.apply("log1p", p.apply("exp", p.apply("neg", gap, dtype=dtype), dtype=dtype), dtype=dtype)
    return p.apply("add", p.apply("maximum", x, y, dtype=dtype), rest, dtype=dtype)


def _logaddexp_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> list[Value]:
    g, (x, y) = cotangents[0], node.inputs
    gap = b.where(b.eq(x, y), b.zeros(x.type), b.sub(x, y))
    return [b.mul(g, b.sigmoid(gap)), b.mul(g, b.sigmoid(b.neg(gap)))]


_SPECIAL = (
    Op("logaddexp", "elementwise", "log(exp(x) + exp(y)), without overflow.", ("x", "y"),
       _infer("logaddexp", 2, "f", None), lambda arrays, attrs, types: [np.logaddexp(*arrays)],
       _logaddexp_gradient, Pointwise(_lower_logaddexp), flops=_flops("softplus"),
       samples=lambda: _samples("f", [(-2.0, 2.0)] * 2, True), failures=_failures(2, "f")),
    Op("where", "elementwise", "x where the condition holds, else y.", ("condition", "x", "y"), _infer_where,
       lambda arrays, attrs, types: [np.where(*arrays)], _where_gradient, _lower("where", 3),
       flops=_flops("where"),
       samples=_where_samples,
       failures=[Failure((Arg((2,)),) * 3, {}, "compare it"),
                 Failure((Arg((2,), "bool"), Arg((2,)), Arg((3,))), {}, "axis 0: 2 and 3"),
                 Failure((Arg((4,), "bool"), Arg((3,)), Arg((3,))), {}, "axis 0: 4 and 3"),
                 Failure((Arg((2,), "bool"), Arg((2,)), Arg((2,), "i32")), {}, "of one element type")]),
    Op("relu", "elementwise", "max(x, 0), an op of its own so that the gradient at 0 is 0, where that of "
       "maximum(x, 0) is 1/2, and so that the backward pass needs only the result.",
       ("x",), _infer("relu", 1, "f", None),
       lambda arrays, attrs, types: [np.maximum(arrays[0], 0)], _relu_gradient, Pointwise(_lower_relu),
       flops=_flops("maximum"), samples=lambda: _samples("f", [(-2.0, 2.0)], True),
       failures=_failures(1, "f")),
    Op("cast", "elementwise", "x as another element type. Floats become integers by dropping the fraction "
       "(unspecified where the integer cannot hold it), numbers bools by x != 0. Only float to float has a "
       "gradient.",
       ("x",), _infer_cast, lambda arrays, attrs, types: [arrays[0].astype(types[0].dtype.numpy)],
       _cast_gradient,
       Pointwise(_lower_cast), attrs={"dtype": REQUIRED}, flops=_flops("cast"), samples=_cast_samples,
       failures=[Failure((Arg((2,)),), {}, "needs the attribute 'dtype'")]),
    Op("stop_gradient", "elementwise", "x, through which no gradient flows.", ("x",),
       _infer("stop_gradient", 1, "fhiub", None), lambda arrays, attrs, types: [arrays[0]],
       lowering=Pointwise(lambda p, index, result: p.operand(0, index)),
       samples=lambda: [Sample((Arg(s),), smooth=False) for s in _SHAPES],
       failures=[Failure((), {}, "takes 1 operand(s)")]),
)

OPS: tuple[Op, ...] = _ARITHMETIC + _FUNCTIONS + _COMPARISONS + _LOGIC + _SPECIAL
