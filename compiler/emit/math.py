"""Scalar functions as inline instructions, over any number of lanes.

`MATH` has a row for each function of `graphflow.compiler.kernel.scalars` except `cast`, which is `convert`
here; `scalar` chooses the row for a dtype. Results agree with NumPy's, NaN, infinities and signed zeros
included, except that float32 transcendentals may be off by up to 2.5 units in the last place. Denormals are
honoured.

The float32 methods are the textbook ones (Muller, Elementary Functions): argument reduction, a polynomial
fitted for the least maximal relative error, reconstruction. float64 transcendentals call the C library lane
by lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphflow.compiler.emit.builder import (
    F32,
    F64,
    I1,
    I32,
    I64,
    MEMORY_TYPES,
    Builder,
    Operand,
    Value,
    constant,
)
from graphflow.compiler.plan.dtypes import DType

_INF = math.inf
_MAGIC = 1.5 * 2.0**23  # adding it rounds a float32 below 2^22 to an integer, left in the low bits
_MAGIC_BITS = 0x4B400000
_ONE_BITS = 0x3F800000
_LN2_HI, _LN2_LO = float.fromhex("0x1.62e400p-1"), float.fromhex("0x1.7f7d1cp-20")


def _coefficients(text: str) -> list[float]:
    """Polynomial coefficients written as hexadecimal floats, lowest power first."""
    return [float.fromhex(word) for word in text.split()]


# (exp(r) - 1 - r) / r² on ±ln(2)/2.
_EXP = _coefficients("0x1.fffffcp-2 0x1.555492p-3 0x1.5558bcp-5 0x1.1239c6p-7 0x1.6a4154p-10")
_EXPM1 = _coefficients("0x1p-1 0x1.555554p-3 0x1.5554f8p-5 0x1.1112d4p-7 0x1.6d3a84p-10 0x1.9e7cf0p-13")
# (log(1 + f) - f) / f² on [-1/4, 1/2].
_LOG = _coefficients(
    "-0x1.fffffep-2 0x1.555554p-2 -0x1.000128p-2 0x1.999d6ep-3 -0x1.54fa54p-3 "
    "0x1.23a4dcp-3 -0x1.04a64ep-3 0x1.eb88f4p-4 -0x1.8f4bfep-4 0x1.55cbd8p-5")
# (tanh(x) - x) / x³ in x² up to 0.625.
_TANH = _coefficients("-0x1.555530p-2 0x1.110684p-3 -0x1.b82628p-5 0x1.519040p-6 -0x1.732bd0p-8")
# (erf(x) - x) / x in x² up to 0.92, and -log(erfc(x)) in x from there to 4.
_ERF_SMALL = _coefficients(
    "0x1.06eba8p-3 -0x1.812740p-2 0x1.ce2d64p-4 -0x1.b8011ap-6 0x1.544a1ap-8 -0x1.a60a2ep-11 0x1.4f6760p-14")
_ERF_LARGE = _coefficients(
    "-0x1.6e5654p-13 0x1.2127e4p+0 0x1.44460cp-1 0x1.bb83e2p-4 "
    "-0x1.9b8e78p-6 0x1.115ac0p-8 -0x1.c790ecp-12 0x1.61ea2ep-16")
# (sin(r) - r) / r³ and (cos(r) - 1) / r² in r² up to π/4; π/2 in three parts.
_SIN = _coefficients("-0x1.555556p-3 0x1.111174p-7 -0x1.a0595ap-13 0x1.7c3068p-19")
_COS = _coefficients("-0x1p-1 0x1.555556p-5 -0x1.6c175ep-10 0x1.a071b6p-16 -0x1.36147ap-22")
_HALF_PI = _coefficients("0x1.921fb6p+0 -0x1.777a5cp-25 -0x1.ee59dap-50")
_TRIG_LIMIT = 65536.0  # the three parts give full accuracy up to here


def _polynomial(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's rule, fused."""
    result: Value = constant(x.type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = b.fma(result, x, coefficient)
    return result


def _int_bits(b: Builder, x: Value) -> Value:
    return b.bitcast(x, x.type.like(I32))


def _as_float(b: Builder, bits: Value) -> Value:
    return b.bitcast(bits, bits.type.like(F32))


def _power_of_two(b: Builder, n: Value) -> Value:
    """2^n as float32 for integers n in [-126, 127]."""
    return _as_float(b, b.shl(b.add(n, 127), 23))


def _clamp(b: Builder, x: Value, low: float, high: float) -> Value:
    """x within [low, high]; NaN stays."""
    x = b.select(b.compare("gt", constant(x.type, low), x), low, x)
    return b.select(b.compare("lt", constant(x.type, high), x), high, x)


def _split_exponent(b: Builder, x: Value) -> tuple[Value, Value]:
    """n = the integer nearest to x/ln(2), and r = x - n·ln(2), for |x| < 2^20."""
    shifted = b.fma(x, math.log2(math.e), _MAGIC)
    n = b.sub(shifted, _MAGIC)
    r = b.fma(n, -_LN2_LO, b.fma(n, -_LN2_HI, x))
    return b.sub(_int_bits(b, shifted), _MAGIC_BITS), r


def _exp_core(b: Builder, x: Value) -> tuple[Value, Value]:
    """n and p with exp(x) = p·2^n, p in about [0.7, 1.42]."""
    n, r = _split_exponent(b, x)
    tail = b.fma(b.mul(r, r), _polynomial(b, r, _EXP), r)
    return n, b.add(tail, 1.0)


def _exp(b: Builder, x: Value) -> Value:
    n, p = _exp_core(b, _clamp(b, x, -104.0, 89.0))
    # In two factors: 2^n itself is out of range for results near the largest float and for denormal ones.
    half = b.ashr(n, 1)
    return b.mul(b.mul(p, _power_of_two(b, half)), _power_of_two(b, b.sub(n, half)))


def _expm1(b: Builder, x: Value) -> Value:
    n, r = _split_exponent(b, _clamp(b, x, -25.0, 89.0))
    p = b.fma(b.mul(r, r), _polynomial(b, r, _EXPM1), r)
    # Half of the result, 2^(n-1)·(1 + p) - 1/2: for n = 128 the whole factor would overflow.
    scale = _power_of_two(b, b.sub(n, 1))
    half = b.fma(scale, p, b.sub(scale, 0.5))
    tiny = b.compare("lt", b.intrinsic("fabs", x), 2.0**-25)
    return b.select(tiny, x, b.add(half, half))


def _log_core(b: Builder, f: Value, k: Value) -> Value:
    """log(1 + f) + k·ln(2) for f in [-1/4, 1/2] and integer k; relative accuracy for k = 0."""
    k = b.cast(k, F32)
    tail = b.mul(b.mul(f, f), _polynomial(b, f, _LOG))
    return b.fma(k, _LN2_HI, b.add(f, b.fma(k, _LN2_LO, tail)))


def _log(b: Builder, x: Value) -> Value:
    denormal = b.compare("lt", x, 2.0**-126)
    normal = b.select(denormal, b.mul(x, 2.0**24), x)
    bits = _int_bits(b, normal)
    k = b.ashr(b.sub(bits, 0x3F400000), 23)  # the bits of 0.75: the mantissa goes to [0.75, 1.5)
    f = b.sub(_as_float(b, b.sub(bits, b.shl(k, 23))), 1.0)
    k = b.sub(k, b.select(denormal, constant(k.type, 24), constant(k.type, 0)))
    return _log_ends(b, x, _log_core(b, f, k), 0.0)


def _log_ends(b: Builder, x: Value, result: Value, pole: float) -> Value:
    """Put in the ends of a logarithm's domain: -inf at the pole, NaN below, inf at inf, NaN at NaN."""
    result = b.select(b.compare("eq", x, pole), -_INF, result)
    result = b.select(b.compare("lt", x, pole), math.nan, result)
    return b.select(b.compare("lt", x, _INF), result, x)


def _log1p(b: Builder, x: Value) -> Value:
    # 1 + x = m·2^k with m in [0.75, 1.5); then f = m - 1 comes from x itself, so that nothing of it is lost.
    k = b.ashr(b.sub(_int_bits(b, b.add(x, 1.0)), 0x3F400000), 23)
    scale = _as_float(b, b.sub(constant(k.type, 0x40800000), b.shl(k, 23)))  # 4·2^-k: k may be 128
    f = b.fma(b.mul(x, 0.25), scale, b.fma(scale, 0.25, -1.0))
    f = b.select(b.compare("eq", k, 0), x, f)
    result = b.select(b.compare("eq", x, 0.0), x, _log_core(b, f, k))
    return _log_ends(b, x, result, -1.0)


def _tanh(b: Builder, x: Value) -> Value:
    magnitude = b.intrinsic("fabs", x)
    square = b.mul(x, x)
    small = b.fma(b.mul(square, _polynomial(b, square, _TANH)), x, x)
    bounded = _clamp(b, magnitude, 0.0, 10.0)
    n, p = _exp_core(b, b.add(bounded, bounded))
    large = b.sub(1.0, b.div(2.0, b.fma(p, _power_of_two(b, n), 1.0)))
    return b.intrinsic("copysign", b.select(b.compare("lt", magnitude, 0.625), small, large), x)


def _sigmoid(b: Builder, x: Value) -> Value:
    # exp of a negative number only: it cannot overflow, and small results keep their accuracy.
    e = MATH["exp"](b, b.neg(b.intrinsic("fabs", x)))
    return b.div(b.select(b.compare("lt", x, 0.0), e, 1.0), b.add(e, 1.0))


def _softplus(b: Builder, x: Value) -> Value:
    e = MATH["exp"](b, b.neg(b.intrinsic("fabs", x)))
    return b.add(_maximum(b, x, constant(x.type, 0)), MATH["log1p"](b, e))


def _erf(b: Builder, x: Value) -> Value:
    square = b.mul(x, x)
    small = b.fma(_polynomial(b, square, _ERF_SMALL), x, x)
    magnitude = b.intrinsic("fabs", x)
    n, p = _exp_core(b, b.neg(_polynomial(b, _clamp(b, magnitude, 0.0, 4.0), _ERF_LARGE)))
    large = b.fma(b.neg(p), _power_of_two(b, n), 1.0)
    return b.intrinsic("copysign", b.select(b.compare("lt", magnitude, 0.92), small, large), x)


def _trigonometric(name: str, quarter_turns: int) -> Callable[[Builder, Value], Value]:
    """sin(x + quarter_turns·π/2)."""

    def reduced(b: Builder, x: Value) -> Value:
        shifted = b.fma(x, 2 / math.pi, _MAGIC)
        n = b.sub(shifted, _MAGIC)
        r = x
        for part in _HALF_PI:
            r = b.fma(n, -part, r)
        quadrant = b.add(_int_bits(b, shifted), quarter_turns)
        square = b.mul(r, r)
        sine = b.fma(b.mul(square, _polynomial(b, square, _SIN)), r, r)
        sine = b.select(b.compare("eq", x, 0.0), x, sine)  # the sum above loses the sign of -0
        cosine = b.fma(square, _polynomial(b, square, _COS), 1.0)
        odd = b.compare("ne", b.and_(quadrant, 1), 0)
        sign = b.shl(b.and_(quadrant, 2), 30)
        return _as_float(b, b.xor(_int_bits(b, b.select(odd, cosine, sine)), sign))

    def function(b: Builder, x: Value) -> Value:
        huge = b.any(b.compare("gt", b.intrinsic("fabs", x), _TRIG_LIMIT))
        return b.choose(huge, lambda: _library(name)(b, x), lambda: reduced(b, x))

    return function


def _pow(b: Builder, x: Value, y: Value) -> Value:
    """|x|^y as 2^(y·log2|x|) in float64, then the sign and the special cases of C's pow."""
    magnitude = b.intrinsic("fabs", x)
    wide, exponent = b.cast(magnitude, F64), b.cast(y, F64)
    t = _clamp(b, b.mul(exponent, _log2_wide(b, wide)), -200.0, 200.0)
    result = b.cast(_exp2_wide(b, t), F32)
    plain = b.or_(b.compare("eq", magnitude, 1.0), b.compare("eq", y, 0.0))
    result = b.select(b.and_(plain, b.compare("ord", y, y)), 1.0, result)
    whole = b.compare("eq", b.intrinsic("trunc", y), y)
    half = b.mul(y, 0.5)
    odd = b.and_(whole, b.compare("ne", b.intrinsic("trunc", half), half))
    negative = b.compare("ne", b.intrinsic("copysign", constant(x.type, 1.0), x), 1.0)
    result = b.select(b.and_(odd, negative), b.neg(result), result)
    finite_base = b.and_(b.compare("lt", x, 0.0), b.compare("gt", x, -_INF))
    result = b.select(b.and_(finite_base, b.not_(whole)), math.nan, result)
    one = b.or_(b.compare("eq", x, 1.0), b.compare("eq", y, 0.0))
    return b.select(one, 1.0, result)


def _log2_wide(b: Builder, x: Value) -> Value:
    """log2 of float64 lanes that are 0, inf, NaN or widened positive float32s, to about 2^-38."""
    bits = b.bitcast(x, x.type.like(I64))
    k = b.ashr(b.sub(bits, 0x3FE6A09E667F3BCD), 52)  # the bits of √½: the mantissa goes to [√½, √2)
    m = b.bitcast(b.sub(bits, b.shl(k, 52)), x.type)
    s = b.div(b.sub(m, 1.0), b.add(m, 1.0))
    series = _polynomial(b, b.mul(s, s), [2 * math.log2(math.e) / (2 * i + 1) for i in range(9)])
    result = b.fma(s, series, b.cast(b.cast(k, I32), F64))
    result = b.select(b.compare("eq", x, 0.0), -_INF, result)
    return b.select(b.compare("lt", x, _INF), result, x)


def _exp2_wide(b: Builder, t: Value) -> Value:
    """2^t in float64 for |t| <= 1000, to about 2^-38."""
    magic = 1.5 * 2.0**52
    shifted = b.add(t, magic)
    f = b.mul(b.sub(t, b.sub(shifted, magic)), math.log(2))
    p = _polynomial(b, f, [1 / math.factorial(i) for i in range(11)])
    bits = b.bitcast(shifted, t.type.like(I64))
    scale = b.bitcast(b.shl(b.add(bits, 1023), 52), t.type)
    return b.mul(p, scale)


# -- float32 inline, float64 by the C library ---------------------------------------------------------------


def _library(name: str) -> Callable[..., Value]:
    """A function of the C library, called lane by lane."""

    def function(b: Builder, *values: Value) -> Value:
        type = values[0].type.scalar
        symbol = name + "f" if type == F32 else name
        return b.each_lane(lambda *lanes: b.call(symbol, type, lanes), *values)

    return function


def _float32_or_library(name: str, float32: Callable[..., Value]) -> Callable[..., Value]:
    library = _library(name)

    def function(b: Builder, *values: Value) -> Value:
        return (float32 if values[0].type.scalar == F32 else library)(b, *values)

    return function


# -- floats and integers ------------------------------------------------------------------------------------


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
    return b.compare("lt", b.intrinsic("fabs", x), _INF)


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


def _float_divmod(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """NumPy's divmod of floats, on top of C's fmod."""
    remainder = _library("fmod")(b, x, y)
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
        return _float32_or_library("pow", _pow)(b, x, y)
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
    "round": _intrinsic("rint"),
    "exp": _float32_or_library("exp", _exp), "expm1": _float32_or_library("expm1", _expm1),
    "log": _float32_or_library("log", _log), "log1p": _float32_or_library("log1p", _log1p),
    "tanh": _float32_or_library("tanh", _tanh), "erf": _float32_or_library("erf", _erf),
    "sin": _float32_or_library("sin", _trigonometric("sin", 0)),
    "cos": _float32_or_library("cos", _trigonometric("cos", 1)),
    "sigmoid": _sigmoid, "softplus": _softplus,
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
    element = I1 if target.kind == "b" else MEMORY_TYPES[target.name]
    if source.is_float:
        return b.cast(x, element, signed=target.kind == "i")
    return b.cast(x, element, signed=source.kind == "i")
