"""Sine, cosine, tangent and their inverses as vector code.

Arguments are reduced by multiples of π/2, which is subtracted in three parts (Cody and Waite); those beyond
the limit up to which that is exact go to the C library, lane by lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from graphflow.compiler.emit.builder import Builder, Value, constant
from graphflow.compiler.emit.math_parts import (
    INF,
    bits_of,
    choose_lanes,
    either,
    float_of,
    form,
    library,
    magnitude,
    nearest,
    odd,
    polynomial,
    quotient,
    table,
    with_sign,
)

# (sin(r) - r) / r³ and (cos(r) - 1) / r² in r² up to (π/4)².
_SIN = table(
    "-0x1.555556p-3 0x1.111174p-7 -0x1.a0595ap-13 0x1.7c3068p-19",
    "-0x1.5555555555549p-3 0x1.111111110f871p-7 -0x1.a01a019c105ebp-13 0x1.71de3576995f2p-19 "
    "-0x1.ae5e655259423p-26 0x1.5d92bb43b46d5p-33")
_COS = table(
    "-0x1p-1 0x1.555556p-5 -0x1.6c175ep-10 0x1.a071b6p-16 -0x1.36147ap-22",
    "-0x1p-1 0x1.555555555553cp-5 -0x1.6c16c16c13efcp-10 0x1.a01a019b6d26ap-16 -0x1.27e4f751e3055p-22 "
    "0x1.1ee983a3a322dp-29 -0x1.8f7fe8adecf93p-37")
# (atan(t) - t) / t³ in t² up to (√2 - 1)²; (asin(x) - x) / x³ in x² up to 1/4.
_ATAN = table(
    "-0x1.55554ap-2 0x1.9991aap-3 -0x1.23b682p-3 0x1.b1fea8p-4 -0x1.f24368p-5",
    "-0x1.555555555553dp-2 0x1.99999999958afp-3 -0x1.24924922af8ecp-3 0x1.c71c70e6fddb4p-4 "
    "-0x1.745cf8f7e63c2p-4 0x1.3b111b03331cp-4 -0x1.10ebcd746eab4p-4 0x1.df1075e71c48p-5 "
    "-0x1.9cd7cb9072306p-5 0x1.37e1ef0a8ae56p-5 -0x1.2583fc7c67a9ap-6")
_ASIN = table(
    "0x1.55554cp-3 0x1.333892p-4 0x1.6cabb6p-5 0x1.04abp-5 0x1.d7a7e4p-7 0x1.33d726p-5",
    "0x1.5555555555578p-3 0x1.333333332df01p-4 0x1.6db6db722c2a4p-5 0x1.f1c71a8b5f7eep-6 "
    "0x1.6e8bdfec62dcap-6 0x1.1c49dda578f7fp-6 0x1.ca214c142d47fp-7 0x1.757752c6d81dp-7 "
    "0x1.618be9afe866fp-7 0x1.e14a8829046cp-9 0x1.6506cc3097a89p-6 -0x1.59fcf1577d7bbp-6 "
    "0x1.0be650e302f25p-5")
_TAN_EIGHTH = math.sqrt(2) - 1  # tan(π/8); tan(3π/8) = √2 + 1


def _reduced(b: Builder, x: Value) -> tuple[Value, Value, Value, Value]:
    """The number of quarter turns that are nearest to x; of the angle r that is left: r, sin(r) - r, and
    cos(r) - 1."""
    whole, quadrant = nearest(b, x, 2 / math.pi)
    r = x
    for part in form(x).half_pi:
        r = b.fma(whole, -part, r)
    square = b.mul(r, r)
    sine, cosine = polynomial(b, square, _SIN), polynomial(b, square, _COS)
    return quadrant, r, b.mul(b.mul(square, r), sine), b.mul(square, cosine)


def _at_zero(b: Builder, x: Value, result: Value) -> Value:
    """Where x is a zero, that zero: the sums of the reduction lose its sign."""
    return b.select(b.compare("eq", x, 0.0), x, result)


def _with_library(name: str, reduced: Callable[[Builder, Value], Value]) -> Callable[[Builder, Value], Value]:
    """The function `reduced`, but the C library's for arguments beyond the limit of the reduction."""

    def function(b: Builder, x: Value) -> Value:
        huge = b.compare("gt", magnitude(b, x), either(x, 2.0**16, 2.0**30))
        return choose_lanes(b, huge, lambda: library(name)(b, x), lambda: reduced(b, x))

    return function


def _sine(quarter_turns: int) -> Callable[[Builder, Value], Value]:
    """sin(x + quarter_turns·π/2)."""

    def function(b: Builder, x: Value) -> Value:
        quadrant, r, sine, cosine = _reduced(b, x)
        sine, cosine = _at_zero(b, x, b.add(r, sine)), b.add(cosine, 1.0)
        quadrant = b.add(quadrant, quarter_turns)
        swapped = b.compare("ne", b.and_(quadrant, 1), 0)
        sign = b.shl(b.and_(quadrant, 2), x.type.bits - 2)
        return float_of(b, b.xor(bits_of(b, b.select(swapped, cosine, sine)), sign), x)

    return function


def _tangent(b: Builder, x: Value) -> Value:
    """tan(r) = r + (sin(r) - r - r·(cos(r) - 1)) / cos(r), or -1 / tan(r) = -cos(r) / sin(r)."""
    quadrant, r, sine, cosine = _reduced(b, x)
    swapped = b.compare("ne", b.and_(quadrant, 1), 0)
    whole, total = b.add(cosine, 1.0), b.add(r, sine)
    whole_rest = b.add(b.sub(1.0, whole), cosine)             # what rounding took from the two
    total_rest = b.add(b.sub(r, total), sine)
    above = b.select(swapped, b.neg(whole), b.fma(b.neg(r), cosine, sine))
    above_rest = b.select(swapped, b.neg(whole_rest), 0.0)
    below, below_rest = b.select(swapped, total, whole), b.select(swapped, total_rest, whole_rest)
    ratio = quotient(b, above, below, below_rest, above_rest)
    return _at_zero(b, x, b.select(swapped, ratio, b.add(r, ratio)))


sin = _with_library("sin", _sine(0))
cos = _with_library("cos", _sine(1))
tan = _with_library("tan", _tangent)


def _arctangent(b: Builder, top: Value, bottom: Value, turned: Value | None) -> Value:
    """The angle of the point (bottom, top) with positive coordinates, in [0, π/2]; where `turned` holds, the
    one that makes up π with it. The quotient is reduced to |t| <= tan(π/8): t = -1/q or (q - 1) / (q + 1)."""
    steep = b.compare("gt", top, b.mul(bottom, _TAN_EIGHTH + 2))
    middle = b.compare("gt", top, b.mul(bottom, _TAN_EIGHTH))
    above = b.select(steep, b.neg(bottom), b.select(middle, b.sub(top, bottom), top))
    below = b.select(steep, top, b.select(middle, b.add(top, bottom), bottom))
    t = b.div(above, below)
    eighths = b.select(steep, 2.0, b.select(middle, constant(top.type, 1.0), constant(top.type, 0.0)))
    angle = odd(b, t, b.mul(t, t), _ATAN)
    if turned is not None:
        angle = b.select(turned, b.neg(angle), angle)
        eighths = b.select(turned, b.sub(4.0, eighths), eighths)
    high, low, _ = form(top).half_pi
    return b.fma(eighths, high / 2, b.fma(eighths, low / 2, angle))


def atan(b: Builder, x: Value) -> Value:
    """The inverse of tan, in [-π/2, π/2]."""
    return with_sign(b, _arctangent(b, magnitude(b, x), constant(x.type, 1.0), None), x)


def atan2(b: Builder, y: Value, x: Value) -> Value:
    """The angle of the point (x, y), in [-π, π], with C's values at the ends."""
    top, bottom = magnitude(b, y), magnitude(b, x)
    largest = b.select(b.compare("gt", top, bottom), top, bottom)
    scale = b.select(b.compare("gt", largest, 2.0 ** (form(x).bias - 1)), 0.25, constant(x.type, 1.0))
    infinite = b.and_(b.compare("eq", top, INF), b.compare("eq", bottom, INF))
    one = b.or_(infinite, b.compare("eq", largest, 0.0))
    top = b.select(infinite, 1.0, b.mul(top, scale))
    bottom = b.select(one, 1.0, b.mul(bottom, scale))
    turned = b.compare("lt", bits_of(b, x), 0)
    return with_sign(b, _arctangent(b, top, bottom, turned), y)


def _arcsine(b: Builder, x: Value) -> tuple[Value, Value, Value]:
    """Whether |x| > 1/2, and a sum s + p: asin|x| or, if it is so, half of acos|x|: asin √((1 - |x|) / 2)."""
    size = magnitude(b, x)
    large = b.compare("gt", size, 0.5)
    half = b.mul(b.sub(1.0, size), 0.5)
    square = b.select(large, half, b.mul(size, size))
    s = b.select(large, b.intrinsic("sqrt", half), size)
    return large, s, b.mul(b.mul(s, square), polynomial(b, square, _ASIN))


def asin(b: Builder, x: Value) -> Value:
    """The inverse of sin, in [-π/2, π/2]; NaN outside [-1, 1]."""
    large, s, p = _arcsine(b, x)
    high, low, _ = form(x).half_pi
    beyond = b.add(b.fma(s, -2.0, high), b.fma(p, -2.0, low))
    return with_sign(b, b.select(large, beyond, b.add(s, p)), x)


def acos(b: Builder, x: Value) -> Value:
    """The inverse of cos, in [0, π]; NaN outside [-1, 1]."""
    large, s, p = _arcsine(b, x)
    high, low, _ = form(x).half_pi
    middle = b.sub(high, b.add(x, b.sub(with_sign(b, p, x), low)))
    near = b.add(b.add(s, s), b.add(p, p))
    far = b.add(b.fma(s, -2.0, 2 * high), b.fma(p, -2.0, 2 * low))
    return b.select(large, b.select(b.compare("lt", x, 0.0), far, near), middle)
