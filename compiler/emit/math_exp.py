"""Exponentials, logarithms, powers, and what is made of them, as vector code.

The methods are the textbook ones (Muller, Elementary Functions): argument reduction by powers of two, a
polynomial, reconstruction. The logarithm in float64 uses log(1 + f) = 2 atanh(f / (2 + f)), as fdlibm does.
"""

from __future__ import annotations

import math

from graphflow.compiler.emit.builder import F32, F64, I64, Builder, Value, constant
from graphflow.compiler.emit.math_parts import (
    INF,
    bits_of,
    clamp,
    either,
    float_of,
    form,
    in_double,
    magnitude,
    nearest,
    odd,
    polynomial,
    power_of_two,
    scaled,
    table,
    to_float,
    with_sign,
)

# (exp(r) - 1 - r) / r² on ±ln(2)/2.
_EXP = table(
    "0x1.fffffcp-2 0x1.555492p-3 0x1.5558bcp-5 0x1.1239c6p-7 0x1.6a4154p-10",
    "0x1.000000000000ap-1 0x1.5555555555502p-3 0x1.5555555550605p-5 0x1.11111111251cep-7 "
    "0x1.6c16c184b4511p-10 0x1.a01a013b732p-13 0x1.a01998967025ap-16 0x1.71def9567e6a3p-19 "
    "0x1.28aec8eeae44fp-22 0x1.adcd04e98a085p-26")
_EXPM1 = table(
    "0x1p-1 0x1.555554p-3 0x1.5554f8p-5 0x1.1112d4p-7 0x1.6d3a84p-10 0x1.9e7cf0p-13",
    "0x1p-1 0x1.5555555555559p-3 0x1.5555555555559p-5 0x1.111111110f6f9p-7 0x1.6c16c16c1620cp-10 "
    "0x1.a01a01af9d495p-13 0x1.a01a01a0b1f18p-16 0x1.71ddf943bf973p-19 0x1.27e4f378ba7fbp-22 "
    "0x1.af5ce3c80b36p-26 0x1.1f411bd106bb5p-29")
# float32: (log(1 + f) - f) / f² on [-1/4, 1/2]; float64: (2 atanh(s)/s - 2) / s² in s² up to that of √2.
_LOG = table(
    "-0x1.fffffep-2 0x1.555554p-2 -0x1.000128p-2 0x1.999d6ep-3 -0x1.54fa54p-3 "
    "0x1.23a4dcp-3 -0x1.04a64ep-3 0x1.eb88f4p-4 -0x1.8f4bfep-4 0x1.55cbd8p-5",
    "0x1.5555555555592p-1 0x1.999999997fd7bp-2 0x1.24924941f4da3p-2 0x1.c71c520618d28p-3 "
    "0x1.74663fa0280c6p-3 0x1.39a1a70fb797ap-3 0x1.2f0634517aafcp-3")
# (sinh(x) - x) / x³ in x² up to 1; (tanh(x) - x) / x³ in x² up to 0.625².
_SINH = table(
    "0x1.555556p-3 0x1.111136p-7 0x1.9ffe1p-13 0x1.7a26bp-19",
    "0x1.5555555555556p-3 0x1.11111111110a1p-7 0x1.a01a01a02921cp-13 0x1.71de3a45f5767p-19 "
    "0x1.ae646767eaac8p-26 0x1.611a399325ecbp-33 0x1.b4cfa4977da84p-41")
_TANH = table(
    "-0x1.555530p-2 0x1.110684p-3 -0x1.b82628p-5 0x1.519040p-6 -0x1.732bd0p-8",
    "-0x1.5555555555552p-2 0x1.1111111110c37p-3 -0x1.ba1ba1b9d1022p-5 0x1.664f4870bd22ap-6 "
    "-0x1.226e32d0c12e8p-7 0x1.d6d35a9585dffp-9 -0x1.7d9c39529667ap-10 0x1.350bc5f0327dcp-11 "
    "-0x1.f1164e0364d9dp-13 0x1.8026d11c8cc7p-14 -0x1.faf51c4edd512p-16 0x1.965ba8fcfbedcp-18")
# The least mantissa that the logarithms reduce to, as bits: 0.75 and √½.
_LOG_LOW = {"float": 0x3F400000, "double": 0x3FE6A09E667F3BCD}
# 1 / log(base) in two parts, rounded to float32 and to float64; log10(2) likewise.
_PARTS = {
    "log2": table("0x1.715476p+0 0x1.4ae0cp-26", "0x1.71547652b82fep+0 0x1.777d0ffda0d24p-56"),
    "log10": table("0x1.bcb7b2p-2 -0x1.5b235ep-27", "0x1.bcb7b1526e50ep-2 0x1.95355baaafad3p-57"),
}
# (atanh(s)/s - 1 - s²/3) / s⁴ in s²; what 1/3 in float64 lacks.
_POW = [float.fromhex(c) for c in (
    "0x1.999999999999ap-3 0x1.2492492492523p-3 0x1.c71c71c6ea3a3p-4 0x1.745d177ae7ef5p-4 "
    "0x1.3b1395b30871fp-4 0x1.1118cdf0a53e8p-4 0x1.df7b9e1996d5ep-5 0x1.e039c43939b97p-5").split()]
_THIRD_LOW = 2.0**-54 / 3
_LOG10_2 = table("0x1.344136p-2 -0x1.ec10cp-27", "0x1.34413509f79ffp-2 -0x1.9dc1da994fd21p-59")


# -- exponentials -------------------------------------------------------------------------------------------


def _split_exponent(b: Builder, x: Value) -> tuple[Value, Value]:
    """n = the integer nearest to x/ln(2), and r = x - n·ln(2), for |x| < 2^20."""
    high, low = form(x).ln2
    whole, n = nearest(b, x, math.log2(math.e))
    return n, b.fma(whole, -low, b.fma(whole, -high, x))


def exp_parts(b: Builder, x: Value, low: Value | None = None) -> tuple[Value, Value]:
    """n and t with exp(x + low) = (1 + t)·2^n, |t| below about 0.42, for |x| < 2^20 and a tiny `low`."""
    n, r = _split_exponent(b, x)
    return n, _exp_tail(b, r if low is None else b.add(r, low))


def _exp_tail(b: Builder, r: Value) -> Value:
    """exp(r) - 1 for r up to log(2) / 2, good enough beside the 1."""
    return b.fma(b.mul(r, r), polynomial(b, r, _EXP), r)


def exp_core(b: Builder, x: Value) -> tuple[Value, Value]:
    """n and p with exp(x) = p·2^n, p in about [0.7, 1.42], for |x| < 2^20."""
    n, tail = exp_parts(b, x)
    return n, b.add(tail, 1.0)


def exp(b: Builder, x: Value) -> Value:
    """e^x."""
    n, p = exp_core(b, clamp(b, x, either(x, -104.0, -746.0), either(x, 89.0, 710.0)))
    return scaled(b, p, n)


def exp2(b: Builder, x: Value) -> Value:
    """2^x."""
    x = clamp(b, x, either(x, -151.0, -1076.0), either(x, 129.0, 1025.0))
    whole, n = nearest(b, x)
    return scaled(b, b.add(_exp_tail(b, b.mul(b.sub(x, whole), math.log(2))), 1.0), n)


def expm1(b: Builder, x: Value) -> Value:
    """e^x - 1."""
    n, r = _split_exponent(b, clamp(b, x, either(x, -25.0, -40.0), either(x, 89.0, 710.0)))
    p = b.fma(b.mul(r, r), polynomial(b, r, _EXPM1), r)
    # Half of the result, 2^(n-1)·(1 + p) - 1/2: for the largest n the whole factor would overflow.
    scale = power_of_two(b, b.sub(n, 1), x)
    half = b.fma(scale, p, b.sub(scale, 0.5))
    small = b.compare("lt", magnitude(b, x), 2.0 ** (-2 - form(x).mantissa))
    return b.select(small, x, b.add(half, half))


def _half_exp(b: Builder, x: Value) -> Value:
    """e^|x| / 2, which overflows only where sinh and cosh do."""
    n, p = exp_core(b, clamp(b, magnitude(b, x), 0.0, either(x, 91.0, 712.0)))
    return scaled(b, p, b.sub(n, 1))


def sinh(b: Builder, x: Value) -> Value:
    """(e^x - e^-x) / 2."""
    half = _half_exp(b, x)
    large = with_sign(b, b.sub(half, b.div(0.25, half)), x)
    return b.select(b.compare("lt", magnitude(b, x), 1.0), odd(b, x, b.mul(x, x), _SINH), large)


def cosh(b: Builder, x: Value) -> Value:
    """(e^x + e^-x) / 2."""
    half = _half_exp(b, x)
    return b.add(half, b.div(0.25, half))


def tanh(b: Builder, x: Value) -> Value:
    """The hyperbolic tangent: a polynomial up to 0.625, 1 - 2 / (e^2x + 1) beyond."""
    size = magnitude(b, x)
    bounded = clamp(b, size, 0.0, either(x, 10.0, 20.0))
    n, p = exp_core(b, b.add(bounded, bounded))
    large = b.sub(1.0, b.div(2.0, b.fma(p, power_of_two(b, n, x), 1.0)))
    small = odd(b, x, b.mul(x, x), _TANH)
    return with_sign(b, b.select(b.compare("lt", size, 0.625), small, large), x)


def sigmoid(b: Builder, x: Value) -> Value:
    """1 / (1 + e^-x). The exp is of a negative number: it cannot overflow, and small results keep their
    accuracy."""
    e = exp(b, b.neg(magnitude(b, x)))
    return b.div(b.select(b.compare("lt", x, 0.0), e, 1.0), b.add(e, 1.0))


def softplus(b: Builder, x: Value) -> Value:
    """log(1 + e^x)."""
    positive = b.select(b.compare("lt", x, 0.0), 0.0, x)
    return b.add(positive, log1p(b, exp(b, b.neg(magnitude(b, x)))))


# -- logarithms ---------------------------------------------------------------------------------------------


def _log_split(b: Builder, x: Value) -> tuple[Value, Value]:
    """k and f with x = (1 + f)·2^k for positive x, f near 0."""
    layout = form(x)
    denormal = b.compare("lt", x, layout.tiny)
    bits = bits_of(b, b.select(denormal, b.mul(x, 2.0 ** (layout.mantissa + 1)), x))
    k = b.ashr(b.sub(bits, _LOG_LOW[x.type.element]), layout.mantissa)
    f = b.sub(float_of(b, b.sub(bits, b.shl(k, layout.mantissa)), x), 1.0)
    return b.sub(k, b.select(denormal, constant(k.type, layout.mantissa + 1), constant(k.type, 0))), f


def _log_tail(b: Builder, f: Value) -> Value:
    """log(1 + f) - f."""
    if f.type.scalar == F32:
        return b.mul(b.mul(f, f), polynomial(b, f, _LOG))
    s = b.div(f, b.add(f, 2.0))
    square, half = b.mul(s, s), b.mul(b.mul(f, f), 0.5)
    return b.fma(s, b.fma(square, polynomial(b, square, _LOG), half), b.neg(half))


def _log_sum(b: Builder, f: Value, k: Value) -> Value:
    """log(1 + f) + k·ln(2); relative accuracy for k = 0."""
    high, low = form(f).ln2
    k = to_float(b, k, f)
    return b.fma(k, high, b.add(f, b.fma(k, low, _log_tail(b, f))))


def _log_ends(b: Builder, x: Value, result: Value, pole: float) -> Value:
    """Put in the ends of a logarithm's domain: -inf at the pole, NaN below, inf at inf, NaN at NaN."""
    result = b.select(b.compare("eq", x, pole), -INF, result)
    result = b.select(b.compare("lt", x, pole), math.nan, result)
    return b.select(b.compare("lt", x, INF), result, x)


def log(b: Builder, x: Value) -> Value:
    """The natural logarithm."""
    k, f = _log_split(b, x)
    return _log_ends(b, x, _log_sum(b, f, k), 0.0)


def log2(b: Builder, x: Value) -> Value:
    """The logarithm to the base 2, exact at powers of 2."""
    k, f = _log_split(b, x)
    high, low = _PARTS["log2"][x.type.element]
    fraction = b.fma(f, high, b.fma(f, low, b.mul(_log_tail(b, f), high)))
    return _log_ends(b, x, b.add(to_float(b, k, x), fraction), 0.0)


def log10(b: Builder, x: Value) -> Value:
    """The logarithm to the base 10."""
    split, f = _log_split(b, x)
    high, low = _PARTS["log10"][x.type.element]
    two_high, two_low = _LOG10_2[x.type.element]
    k = to_float(b, split, x)
    rest = b.fma(_log_tail(b, f), high, b.fma(f, low, b.mul(k, two_low)))
    return _log_ends(b, x, b.fma(k, two_high, b.fma(f, high, rest)), 0.0)


def log1p(b: Builder, x: Value) -> Value:
    """log(1 + x)."""
    # 1 + x = m·2^k with m near 1; then f = m - 1 comes from x itself, so that nothing of it is lost.
    layout = form(x)
    k = b.ashr(b.sub(bits_of(b, b.add(x, 1.0)), _LOG_LOW[x.type.element]), layout.mantissa)
    four = constant(k.type, layout.bias + 2 << layout.mantissa)
    scale = float_of(b, b.sub(four, b.shl(k, layout.mantissa)), x)     # 4·2^-k: k may be the largest exponent
    f = b.fma(b.mul(x, 0.25), scale, b.fma(scale, 0.25, -1.0))
    f = b.select(b.compare("eq", k, 0), x, f)
    result = b.select(b.compare("eq", x, 0.0), x, _log_sum(b, f, k))
    return _log_ends(b, x, result, -1.0)


@in_double
def asinh(b: Builder, x: Value) -> Value:
    """The inverse of sinh: log1p(t + t² / (1 + √(t² + 1))) with t = |x|; beyond 2^60 log(t) + log(2)."""
    t = magnitude(b, x)
    bounded = clamp(b, t, 0.0, 2.0**60)
    square = b.mul(bounded, bounded)
    root = b.intrinsic("sqrt", b.add(square, 1.0))
    large = b.compare("gt", t, 2.0**60)
    log = log1p(b, b.select(large, t, b.add(bounded, b.div(square, b.add(root, 1.0)))))
    return with_sign(b, b.select(large, b.add(log, math.log(2)), log), x)


@in_double
def acosh(b: Builder, x: Value) -> Value:
    """The inverse of cosh: log1p(t + √(t² + 2t)) with t = x - 1; beyond 2^60 log(x) + log(2)."""
    t = b.sub(clamp(b, x, 0.0, 2.0**60), 1.0)
    root = b.intrinsic("sqrt", b.fma(t, t, b.add(t, t)))
    large = b.compare("gt", x, 2.0**60)
    log = log1p(b, b.select(large, x, b.add(t, root)))
    result = b.select(large, b.add(log, math.log(2)), log)
    return b.select(b.compare("lt", x, 1.0), math.nan, result)


@in_double
def atanh(b: Builder, x: Value) -> Value:
    """The inverse of tanh: log1p(2t / (1 - t)) / 2 with t = |x|."""
    t = magnitude(b, x)
    twice = b.add(t, t)
    small = b.compare("lt", t, 0.5)           # there 1 - t is rounded, so less hangs on it
    quotient = b.div(b.select(small, b.mul(twice, t), twice), b.sub(1.0, t))
    argument = b.select(small, b.add(twice, quotient), quotient)
    return with_sign(b, b.mul(log1p(b, argument), 0.5), x)


# -- powers -------------------------------------------------------------------------------------------------


def pow(b: Builder, x: Value, y: Value) -> Value:
    """x^y of floats: |x|^y as 2^(y·log2|x|), then the sign and the special cases of C's pow."""
    size = magnitude(b, x)
    result = (_power_float32 if x.type.scalar == F32 else _power_float64)(b, size, y)
    plain = b.or_(b.compare("eq", size, 1.0), b.compare("eq", y, 0.0))
    result = b.select(b.and_(plain, b.compare("ord", y, y)), 1.0, result)
    whole = b.compare("eq", b.intrinsic("trunc", y), y)
    half = b.mul(y, 0.5)
    odd = b.and_(whole, b.compare("ne", b.intrinsic("trunc", half), half))
    negative = b.compare("ne", with_sign(b, constant(x.type, 1.0), x), 1.0)
    result = b.select(b.and_(odd, negative), b.neg(result), result)
    finite_base = b.and_(b.compare("lt", x, 0.0), b.compare("gt", x, -INF))
    result = b.select(b.and_(finite_base, b.not_(whole)), math.nan, result)
    one = b.or_(b.compare("eq", x, 1.0), b.compare("eq", y, 0.0))
    return b.select(one, 1.0, result)


def _power_float64(b: Builder, x: Value, y: Value) -> Value:
    """x^y for x >= 0, but for y = 0 and x = 1, with the logarithm and its product as sums of two numbers."""
    log, log_low = _log2_sum(b, x)
    t = b.mul(log, y)
    low = b.fma(log_low, y, b.fma(log, y, b.neg(t)))
    low = b.select(b.compare("lt", magnitude(b, t), 1100.0), low, 0.0)      # beyond, 0 or infinite anyhow
    t = clamp(b, t, -1100.0, 1100.0)
    whole, n = nearest(b, t)
    tail = _exp_tail(b, b.mul(b.add(b.sub(t, whole), low), math.log(2)))
    return scaled(b, b.add(tail, 1.0), n)


def _log2_sum(b: Builder, x: Value) -> tuple[Value, Value]:
    """log2 of float64 x >= 0 as a sum, to about 2^-66: log(1 + f) = 2s (1 + s²/3 + s⁴·q(s²)),
    s = f / (2 + f)."""
    k, f = _log_split(b, x)
    below = b.add(f, 2.0)
    inverse = b.div(1.0, below)
    s = b.mul(f, inverse)
    below_low = b.sub(f, b.sub(below, 2.0))
    s_low = b.mul(b.fma(b.neg(s), below_low, b.fma(b.neg(s), below, f)), inverse)
    square = b.mul(s, s)
    square_low = b.fma(b.add(s, s), s_low, b.fma(s, s, b.neg(square)))
    third = b.mul(square, 1 / 3)
    third_low = b.fma(square_low, 1 / 3, b.fma(square, _THIRD_LOW, b.fma(square, 1 / 3, b.neg(third))))
    rest = b.mul(b.mul(square, square), polynomial(b, square, _POW))
    u, u_low = _sum(b, third, rest)
    u_low = b.add(u_low, third_low)
    product = b.mul(s, u)
    product_low = b.fma(s_low, u, b.fma(s, u_low, b.fma(s, u, b.neg(product))))
    log, log_low = _sum(b, s, product)
    log_low = b.add(log_low, b.add(product_low, s_low))
    high, low = (2 * part for part in _PARTS["log2"]["double"])
    scaled_log = b.mul(log, high)
    scaled_low = b.fma(log_low, high, b.fma(log, low, b.fma(log, high, b.neg(scaled_log))))
    total, total_low = _sum(b, to_float(b, k, x), scaled_log)
    return _log_ends(b, x, total, 0.0), b.add(total_low, scaled_low)


def _sum(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """x + y, and what rounding took from it, for |x| >= |y| or x = 0 (Dekker)."""
    total = b.add(x, y)
    return total, b.add(b.sub(x, total), y)


def _power_float32(b: Builder, x: Value, y: Value) -> Value:
    """x^y for x >= 0, but for y = 0 and x = 1, in float64."""
    t = clamp(b, b.mul(b.cast(y, F64), _log2_wide(b, b.cast(x, F64))), -200.0, 200.0)
    return b.cast(_exp2_wide(b, t), F32)


def _log2_wide(b: Builder, x: Value) -> Value:
    """log2 of float64 lanes that are 0, inf, NaN or widened positive float32s, to about 2^-38."""
    bits = b.bitcast(x, x.type.like(I64))
    k = b.ashr(b.sub(bits, _LOG_LOW["double"]), 52)
    m = b.bitcast(b.sub(bits, b.shl(k, 52)), x.type)
    s = b.div(b.sub(m, 1.0), b.add(m, 1.0))
    series = polynomial(b, b.mul(s, s), [2 * math.log2(math.e) / (2 * i + 1) for i in range(9)])
    result = b.fma(s, series, to_float(b, k, x))
    result = b.select(b.compare("eq", x, 0.0), -INF, result)
    return b.select(b.compare("lt", x, INF), result, x)


def _exp2_wide(b: Builder, t: Value) -> Value:
    """2^t in float64 for |t| <= 1000, to about 2^-38."""
    whole, n = nearest(b, t)
    p = polynomial(b, b.mul(b.sub(t, whole), math.log(2)), [1 / math.factorial(i) for i in range(11)])
    return b.mul(p, power_of_two(b, n, t))
