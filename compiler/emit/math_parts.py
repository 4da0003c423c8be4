"""What the vector functions of `math_exp`, `math_trigonometric` and `math_special` are made of.

They are written once for float32 and float64: a `Format` holds the layout of a type, and a table of
coefficients has a row for each. The coefficients are fitted for the least maximal relative error (Remez'
exchange) and then rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from graphflow.compiler.emit.builder import F32, F64, I32, I64, Builder, Type, Value, constant

INF = math.inf


class Format(NamedTuple):
    """How a floating-point type lays out its bits, and constants that depend on it."""

    integer: Type           # of the same width
    mantissa: int           # stored bits of the mantissa
    bias: int               # of the exponent
    magic: float            # adding it rounds a smaller number to an integer, left in the low bits
    ln2: Sequence[float]    # log(2) as the sum of two numbers, π/2 as that of three
    half_pi: Sequence[float]

    @property
    def tiny(self) -> float:
        """The least normal number."""
        return 2.0 ** (1 - self.bias)

    @property
    def magic_bits(self) -> int:
        """The bits of `magic`."""
        return (self.bias + self.mantissa << self.mantissa) + (1 << (self.mantissa - 1))


def _hex(text: str) -> tuple[float, ...]:
    return tuple(float.fromhex(word) for word in text.split())


_FORMATS = {
    "float": Format(I32, 23, 127, 1.5 * 2.0**23, _hex("0x1.62e400p-1 0x1.7f7d1cp-20"),
                    _hex("0x1.921fb6p+0 -0x1.777a5cp-25 -0x1.ee59dap-50")),
    "double": Format(I64, 52, 1023, 1.5 * 2.0**52, _hex("0x1.62e42fefa39efp-1 0x1.abc9e3b39803fp-56"),
                     _hex("0x1.921fb54442d18p+0 0x1.1a62633145c07p-54 -0x1.f1976b7ed8fbcp-110")),
}


def form(x: Value) -> Format:
    """The layout of the value's type."""
    return _FORMATS[x.type.element]


Table = dict[str, list[float]]


def table(float32: str, float64: str) -> Table:
    """Polynomial coefficients for both types, written as hexadecimal floats, lowest power first."""
    return {"float": list(_hex(float32)), "double": list(_hex(float64))}


def polynomial(b: Builder, x: Value, coefficients: Table | Sequence[float]) -> Value:
    """Horner's rule, fused."""
    row = coefficients[x.type.element] if isinstance(coefficients, dict) else coefficients
    result: Value = constant(x.type, row[-1])
    for coefficient in reversed(row[:-1]):
        result = b.fma(result, x, coefficient)
    return result


def odd(b: Builder, x: Value, square: Value, coefficients: Table) -> Value:
    """x + x³·p(x²)."""
    return b.fma(b.mul(square, polynomial(b, square, coefficients)), x, x)


def magnitude(b: Builder, x: Value) -> Value:
    """|x|."""
    return b.intrinsic("fabs", x)


def with_sign(b: Builder, x: Value, sign: Value) -> Value:
    """x with the sign bit of `sign`."""
    return b.intrinsic("copysign", x, sign)


def bits_of(b: Builder, x: Value) -> Value:
    """The bits of a float as an integer."""
    return b.bitcast(x, x.type.like(form(x).integer))


def float_of(b: Builder, bits: Value, like: Value) -> Value:
    """The float of `like`'s type that has these bits."""
    return b.bitcast(bits, like.type)


def power_of_two(b: Builder, n: Value, like: Value) -> Value:
    """2^n in `like`'s type for integers n that give a normal number."""
    f = form(like)
    return float_of(b, b.shl(b.add(n, f.bias), f.mantissa), like)


def scaled(b: Builder, p: Value, n: Value) -> Value:
    """p·2^n, in two factors: 2^n itself may be out of range, for results near the largest float and denormal
    ones."""
    half = b.ashr(n, 1)
    return b.mul(b.mul(p, power_of_two(b, half, p)), power_of_two(b, b.sub(n, half), p))


def to_float(b: Builder, n: Value, like: Value) -> Value:
    """A small integer as a float."""
    f = form(like)
    if f.integer == I32:
        return b.cast(n, F32)
    return b.sub(float_of(b, b.add(n, f.magic_bits), like), f.magic)    # no 64-bit conversion before AVX-512


def nearest(b: Builder, x: Value, factor: float = 1.0) -> tuple[Value, Value]:
    """x·factor rounded to an integer, as a float and as an integer, below about 2^22 (float64: 2^51)."""
    f = form(x)
    shifted = b.fma(x, factor, f.magic)
    return b.sub(shifted, f.magic), b.sub(bits_of(b, shifted), f.magic_bits)


def quotient(
    b: Builder, above: Value, below: Value, below_rest: Value, above_rest: Value | None = None
) -> Value:
    """(above + above_rest) / (below + below_rest), the rests tiny: about half a unit from it."""
    inverse = b.div(1.0, below)
    q = b.mul(above, inverse)
    error = b.fma(b.neg(q), below, above)
    error = b.fma(b.neg(q), below_rest, error if above_rest is None else b.add(error, above_rest))
    return b.fma(error, inverse, q)


def clamp(b: Builder, x: Value, low: float, high: float) -> Value:
    """x within [low, high]; NaN stays."""
    x = b.select(b.compare("gt", constant(x.type, low), x), low, x)
    return b.select(b.compare("lt", constant(x.type, high), x), high, x)


def either(x: Value, float32: float, float64: float) -> float:
    """A number that depends on the value's type."""
    return float32 if x.type.scalar == F32 else float64


def library(name: str) -> Callable[..., Value]:
    """A function of the C library, called lane by lane."""

    def function(b: Builder, *values: Value) -> Value:
        type = values[0].type.scalar
        symbol = name + "f" if type == F32 else name
        return b.each_lane(lambda *lanes: b.call(symbol, type, lanes), *values)

    return function


def in_double(function: Callable[..., Value]) -> Callable[..., Value]:
    """A function of float64, which float32 goes to as well: for what is rare."""

    def either_type(b: Builder, *values: Value) -> Value:
        if values[0].type.scalar == F64:
            return function(b, *values)
        return b.cast(function(b, *(b.cast(v, F64) for v in values)), F32)

    return either_type


def by_accuracy(function: Callable[[Builder, Value, str], Value]) -> Callable[[Builder, Value], Value]:
    """A function that computes in float64, and gets the name of the type to whose accuracy it may do so."""

    def either_type(b: Builder, x: Value) -> Value:
        if x.type.scalar == F64:
            return function(b, x, "double")
        return b.cast(function(b, b.cast(x, F64), "float"), F32)

    return either_type


def choose_lanes(
    b: Builder, rare: Value, exceptional: Callable[[], Value], usual: Callable[[], Value]
) -> Value:
    """`exceptional` in the lanes where `rare` holds, else `usual`; the former runs only if some lane needs
    it, and no lane depends on another."""
    common = usual()
    return b.choose(b.any(rare), lambda: b.select(rare, exceptional(), common), lambda: common)

