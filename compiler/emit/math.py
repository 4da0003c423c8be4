"""Scalar functions as inline instructions, over any number of lanes.

`MATH` has a row for each function of `graphflow.compiler.kernel.scalars` except `cast`, which is `convert`
here; `scalar` chooses the row for a dtype. Results agree with NumPy's, NaN, infinities and signed zeros
included, except that transcendentals may be off by up to 2.5 units in the last place. Denormals are honoured.

The transcendental functions lie in `math_exp`, `math_trigonometric` and `math_special`. The C library is
called, lane by lane, for what is rare: the remainder of huge quotients, and sine, cosine and tangent of huge
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from graphflow.compiler.emit import math_exp, math_special, math_trigonometric
from graphflow.compiler.emit.builder import I1, MEMORY_TYPES, Builder, Operand, Value, constant
from graphflow.compiler.emit.half import narrow, widen
from graphflow.compiler.emit.math_parts import choose_lanes, form, library, magnitude, with_sign
from graphflow.compiler.plan.dtypes import DType


def _intrinsic(name: str) -> Callable[..., Value]:
    """An intrinsic for floats, nothing to do for integers (which have no fraction)."""

    def function(b: Builder, x: Value) -> Value:
        return b.intrinsic(name, x) if x.type.is_float else x

    return function


def _minimum(b: Builder, x: Value, y: Value) -> Value:
    return _extremum(b, "lt", x, y)


def _maximum(b: Builder, x: Value, y: Value) -> Value:
    return _extremum(b, "gt", x, y)


def _extremum(b: Builder, predicate: str, x: Value, y: Value) -> Value:
    """x if it compares so with y, else y; a NaN on either side is the result."""
    if not x.type.is_float:
        return b.select(b.compare(predicate, x, y), x, y)
    if y.is_constant:
        x, y = y, x
    chosen = b.select(b.compare(predicate, x, y), x, y)  # y if either is NaN
    return chosen if x.is_constant else b.select(b.compare("uno", x, x), x, chosen)


def _abs(b: Builder, x: Value) -> Value:
    if x.type.is_float:
        return b.intrinsic("fabs", x)
    return b.select(b.compare("lt", x, 0), b.neg(x), x)


def _sign(b: Builder, x: Value) -> Value:
    one, zero = constant(x.type, 1), constant(x.type, 0)
    rest = b.select(b.compare("lt", x, 0), constant(x.type, -1), b.select(b.compare("eq", x, 0), zero, x))
    return b.select(b.compare("gt", x, 0), one, rest)


def _rsqrt(b: Builder, x: Value) -> Value:
    return b.div(1.0, b.intrinsic("sqrt", x))


def _isnan(b: Builder, x: Value) -> Value:
    return b.compare("uno", x, x) if x.type.is_float else constant(x.type.like(I1), False)


def _isfinite(b: Builder, x: Value) -> Value:
    if not x.type.is_float:
        return constant(x.type.like(I1), True)
    return b.compare("lt", b.intrinsic("fabs", x), math.inf)


def _divmod(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """Quotient and remainder, rounding to minus infinity; both 0 where an integer y is 0, as in NumPy."""
    if x.type.is_float:
        return _float_divmod(b, x, y)
    # The hardware traps on y = 0 and on the least integer divided by -1: both go around the division.
    trapping = b.or_(b.compare("eq", y, 0), b.compare("eq", y, -1))
    safe = b.select(trapping, 1, y)
    remainder = b.srem(x, safe)
    crossed = b.and_(b.compare("ne", remainder, 0), b.compare("lt", b.xor(remainder, safe), 0))
    quotient = b.sub(b.sdiv(x, safe), b.cast(crossed, x.type.scalar))
    remainder = b.select(crossed, b.add(remainder, safe), remainder)
    quotient = b.select(b.compare("eq", y, -1), b.neg(x), quotient)
    return b.select(b.compare("eq", y, 0), 0, quotient), remainder


def _fmod(b: Builder, x: Value, y: Value) -> Value:
    """C's fmod. A quotient of few bits is off by one at most, and x - q·y is exact then; other lanes call the
    library."""
    top, bottom = magnitude(b, x), magnitude(b, y)
    limit = b.mul(bottom, 2.0 ** (form(x).mantissa - 1))
    few = b.and_(b.compare("lt", top, limit), b.compare("lt", bottom, math.inf))

    def usual() -> Value:
        rest = b.fma(b.neg(b.intrinsic("trunc", b.div(top, bottom))), bottom, top)
        rest = b.select(b.compare("lt", rest, 0.0), b.add(rest, bottom), rest)
        return with_sign(b, rest, x)

    return choose_lanes(b, b.not_(few), lambda: library("fmod")(b, x, y), usual)


def _float_divmod(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """NumPy's divmod of floats, on top of C's fmod."""
    remainder = _fmod(b, x, y)
    zero = b.compare("eq", remainder, 0.0)
    crossed = b.xor(b.compare("lt", y, 0.0), b.compare("lt", remainder, 0.0))
    crossed = b.and_(crossed, b.compare("one", remainder, 0.0))
    quotient = b.div(b.sub(x, remainder), y)
    quotient = b.select(crossed, b.sub(quotient, 1.0), quotient)
    remainder = b.select(crossed, b.add(remainder, y), remainder)
    nothing = constant(x.type, 0)
    remainder = b.select(zero, b.intrinsic("copysign", nothing, y), remainder)
    whole = b.intrinsic("floor", quotient)
    whole = b.select(b.compare("gt", b.sub(quotient, whole), 0.5), b.add(whole, 1.0), whole)
    ratio = b.div(x, y)
    whole = b.select(b.compare("eq", quotient, 0.0), b.intrinsic("copysign", nothing, ratio), whole)
    return b.select(b.compare("eq", y, 0.0), ratio, whole), remainder


def _mod(b: Builder, x: Value, y: Value) -> Value:
    return _divmod(b, x, y)[1]


def _floordiv(b: Builder, x: Value, y: Value) -> Value:
    return _divmod(b, x, y)[0]


def _unsigned_mod(b: Builder, x: Value, y: Value) -> Value:
    zero = b.compare("eq", y, 0)
    return b.select(zero, 0, b.urem(x, b.select(zero, 1, y)))


def _unsigned_floordiv(b: Builder, x: Value, y: Value) -> Value:
    zero = b.compare("eq", y, 0)
    return b.select(zero, 0, b.udiv(x, b.select(zero, 1, y)))


def _integer_pow(b: Builder, x: Value, y: Value) -> Value:
    """By squaring, wrapping; a negative exponent gives the truncated reciprocal (0, or ±1 for x = ±1)."""
    result = _unsigned_pow(b, x, y)
    odd = b.compare("ne", b.and_(y, 1), 0)
    unit = b.or_(b.compare("eq", x, 1), b.compare("eq", x, -1))
    reciprocal = b.select(unit, b.select(odd, x, 1), 0)
    return b.select(b.compare("lt", y, 0), reciprocal, result)


def _any_pow(b: Builder, x: Value, y: Value) -> Value:
    if x.type.is_float:
        return math_exp.pow(b, x, y)
    return _integer_pow(b, x, y)


def _unsigned_pow(b: Builder, x: Value, y: Value) -> Value:
    with b.loop(0, x.type.bits, carry=[constant(x.type, 1), x, y]) as loop:
        result, base, exponent = loop.carry
        odd = b.compare("ne", b.and_(exponent, 1), 0)
        loop.next(b.select(odd, b.mul(result, base), result), b.mul(base, base), b.lshr(exponent, 1))
    return loop.results[0]


def _shift(opcode: str) -> Callable[[Builder, Value, Value], Value]:
    """A shift that, as in NumPy, moves everything out when the count is negative or not below the width."""

    def function(b: Builder, x: Value, y: Value) -> Value:
        bits = x.type.bits
        fits = b.compare("ult", y, bits)
        if opcode == "ashr":
            return b.ashr(x, b.select(fits, y, bits - 1))
        shifted = (b.shl if opcode == "shl" else b.lshr)(x, b.select(fits, y, 0))
        return b.select(fits, shifted, 0)

    return function


def _compare(predicate: str) -> Callable[[Builder, Value, Value], Value]:
    return lambda b, x, y: b.compare(predicate, x, y)


def _where(b: Builder, condition: Value, x: Operand, y: Operand) -> Value:
    return b.select(condition, x, y)


#: A function of a builder and values of one type, by name. Integers are signed; see `scalar` for the others.
MATH: dict[str, Callable[..., Value]] = {
    "add": Builder.add, "sub": Builder.sub, "mul": Builder.mul, "div": Builder.div, "fma": Builder.fma,
    "mod": _mod, "floordiv": _floordiv, "minimum": _minimum, "maximum": _maximum,
    "neg": Builder.neg, "abs": _abs, "sign": _sign,
    "sqrt": lambda b, x: b.intrinsic("sqrt", x), "rsqrt": _rsqrt,
    "floor": _intrinsic("floor"), "ceil": _intrinsic("ceil"), "trunc": _intrinsic("trunc"),
    "round": _intrinsic("rint"), "copysign": lambda b, x, y: b.intrinsic("copysign", x, y),
    "exp": math_exp.exp, "exp2": math_exp.exp2, "expm1": math_exp.expm1, "log": math_exp.log,
    "log2": math_exp.log2, "log10": math_exp.log10, "log1p": math_exp.log1p, "sinh": math_exp.sinh,
    "cosh": math_exp.cosh, "tanh": math_exp.tanh, "asinh": math_exp.asinh, "acosh": math_exp.acosh,
    "atanh": math_exp.atanh, "sigmoid": math_exp.sigmoid, "softplus": math_exp.softplus,
    "sin": math_trigonometric.sin, "cos": math_trigonometric.cos, "tan": math_trigonometric.tan,
    "asin": math_trigonometric.asin, "acos": math_trigonometric.acos, "atan": math_trigonometric.atan,
    "atan2": math_trigonometric.atan2,
    "erf": math_special.erf, "erfc": math_special.erfc, "erfinv": math_special.erfinv,
    "cbrt": math_special.cbrt, "hypot": math_special.hypot,
    "pow": _any_pow,
    "isnan": _isnan, "isfinite": _isfinite,
    "eq": _compare("eq"), "ne": _compare("ne"), "lt": _compare("lt"),
    "le": _compare("le"), "gt": _compare("gt"), "ge": _compare("ge"),
    "and": Builder.and_, "or": Builder.or_, "not": Builder.not_,
    "bit_and": Builder.and_, "bit_or": Builder.or_, "bit_xor": Builder.xor,
    "shift_left": _shift("shl"), "shift_right": _shift("ashr"),
    "where": _where,
}

_UNSIGNED: dict[str, Callable[..., Value]] = {
    "mod": _unsigned_mod, "floordiv": _unsigned_floordiv, "pow": _unsigned_pow,
    "minimum": lambda b, x, y: b.select(b.compare("ult", x, y), x, y),
    "maximum": lambda b, x, y: b.select(b.compare("ugt", x, y), x, y),
    "abs": lambda b, x: x,
    "sign": lambda b, x: b.cast(b.compare("ne", x, 0), x.type.scalar),
    "lt": _compare("ult"), "le": _compare("ule"), "gt": _compare("ugt"), "ge": _compare("uge"),
    "shift_right": _shift("lshr"),
}

_BOOLEAN: dict[str, Callable[..., Value]] = {
    **_UNSIGNED, "add": Builder.or_, "mul": Builder.and_, "sign": lambda b, x: x,
}


def scalar(b: Builder, name: str, dtype: DType, *values: Value) -> Value:
    """Apply a scalar function to values of `dtype` (for `where`, that of the choices); bools are I1."""
    table = {"b": _BOOLEAN, "u": _UNSIGNED}.get(dtype.kind, MATH)
    return table.get(name, MATH[name])(b, *values)


def convert(b: Builder, x: Value, source: DType, target: DType) -> Value:
    """The function `cast`: the value x of one dtype as another; bools are I1 (see `Builder.cast`)."""
    if source.is_half:
        return widen(b, x, source)
    if target.is_half:
        return narrow(b, x, target)
    element = I1 if target.kind == "b" else MEMORY_TYPES[target.name]
    if source.is_float:
        return b.cast(x, element, signed=target.kind == "i")
    return b.cast(x, element, signed=source.kind == "i")
