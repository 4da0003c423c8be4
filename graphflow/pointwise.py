"""Functions of single elements that are composed of others, and NumPy's names of ops that have another."""
from __future__ import annotations

import math

from graphflow.arguments import as_float, as_tensor
from graphflow.compiler.plan.dtypes import BOOL, F32, F64
from graphflow.tensor import Operand, Tensor, cast, elementwise
from graphflow.tensor import power as _power

ALIASES = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh",
    "arctan": "atan", "arctan2": "atan2", "arctanh": "atanh", "bitwise_and": "bit_and",
    "bitwise_or": "bit_or", "bitwise_xor": "bit_xor", "divide": "div", "equal": "eq",
    "floor_divide": "floordiv", "greater": "gt", "greater_equal": "ge", "left_shift": "shift_left",
    "less": "lt", "less_equal": "le", "multiply": "mul", "negative": "neg", "not_equal": "ne",
    "remainder": "mod", "right_shift": "shift_right", "rint": "round", "subtract": "sub",
    "true_divide": "div",
}
"""NumPy's name -> the op's."""


def _as_bool(x: Operand) -> Tensor:
    x = as_tensor(x)
    return x if x.dtype == BOOL else x != 0


def _where(condition: Tensor, x: Operand, y: Operand) -> Tensor:
    return elementwise("where", condition, x, y)


# --- arithmetic

def clip(x: Operand, low: Operand | None = None, high: Operand | None = None) -> Tensor:
    """`x` with what is below `low` or above `high` replaced by these. At a bound the gradient is x's."""
    x = as_tensor(x)
    x = x if low is None else _where(x < low, low, x)
    return x if high is None else _where(x > high, high, x)


def square(x: Operand) -> Tensor:
    """``x * x``."""
    x = as_tensor(x)
    return x * x


def reciprocal(x: Operand) -> Tensor:
    """``1 / x``, a float."""
    return 1.0 / as_tensor(x)


def power(x: Operand, y: Operand) -> Tensor:
    """``x ** y``: a float, but for a y of 2 or 3, which multiplies."""
    return _power(as_tensor(x), y)


def fmod(x: Operand, y: Operand) -> Tensor:
    """The rest of x / y rounded towards 0, with x's sign (C's fmod; `mod` has y's sign)."""
    x, y = as_float(x), as_float(y)
    return elementwise("copysign", abs(x) % abs(y), x)


def divmod(x: Operand, y: Operand) -> tuple[Tensor, Tensor]:  # noqa: A001
    """``(x // y, x % y)``."""
    x = as_tensor(x)
    return x // y, x % y


def modf(x: Operand) -> tuple[Tensor, Tensor]:
    """Fraction and whole part, both with x's sign."""
    x = as_float(x)
    whole = elementwise("trunc", x)
    return elementwise("copysign", _where(isinf(x), 0.0, x - whole), x), whole


def fmax(x: Operand, y: Operand) -> Tensor:
    """The larger; where one is NaN, the other."""
    x, y = as_tensor(x), as_float(y)
    return _where((x >= y) | elementwise("isnan", y), x, y)


def fmin(x: Operand, y: Operand) -> Tensor:
    """The smaller; where one is NaN, the other."""
    x, y = as_tensor(x), as_float(y)
    return _where((x <= y) | elementwise("isnan", y), x, y)


def heaviside(x: Operand, at_zero: Operand) -> Tensor:
    """0 for x < 0, 1 for x > 0, `at_zero` for 0."""
    x = as_float(x)
    return _where(x == 0, at_zero, _where(x > 0, 1.0, _where(x < 0, 0.0, x)))


def nan_to_num(x: Operand, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
               ) -> Tensor:
    """`x` with NaN and the infinities replaced; these by default by the largest numbers of the type."""
    x = as_float(x)
    largest = {"f16": 65504.0, "bf16": 2.0**127 * (2 - 2.0**-7), "f32": 2.0**127 * (2 - 2.0**-23)}
    limit = largest.get(x.dtype.name, 2.0**1023 * (2 - 2.0**-52))
    x = _where(elementwise("isnan", x), nan, x)
    x = _where(x == math.inf, limit if posinf is None else posinf, x)
    return _where(x == -math.inf, -limit if neginf is None else neginf, x)


def degrees(x: Operand) -> Tensor:
    """Radians in degrees."""
    return as_float(x) * (180 / math.pi)


def radians(x: Operand) -> Tensor:
    """Degrees in radians."""
    return as_float(x) * (math.pi / 180)


rad2deg, deg2rad = degrees, radians


# --- logic

def isinf(x: Operand) -> Tensor:
    """Whether x is infinite."""
    return abs(as_float(x)) == math.inf


def signbit(x: Operand) -> Tensor:
    """Whether x has a minus sign, -0 among them."""
    return elementwise("copysign", 1.0, as_float(x)) < 0


def logical_xor(x: Operand, y: Operand) -> Tensor:
    """Whether exactly one holds."""
    return _as_bool(x) != _as_bool(y)


def invert(x: Operand) -> Tensor:
    """The other bits of integers, the opposite of bools."""
    return ~as_tensor(x)


bitwise_not = invert


# --- logarithms

def logaddexp2(x: Operand, y: Operand) -> Tensor:
    """log2(2 ** x + 2 ** y), without overflow."""
    scale = math.log(2)
    return elementwise("logaddexp", as_float(x) * scale, as_float(y) * scale) * (1 / scale)


def logit(p: Operand) -> Tensor:
    """log(p / (1 - p)), the inverse of sigmoid."""
    p = as_float(p)
    return elementwise("log", p) - elementwise("log1p", -p)


def xlogy(x: Operand, y: Operand) -> Tensor:
    """x log(y), and 0 where x is 0 whatever number y is; where log(y) is no finite number, so are the
    gradients."""
    x, y = as_float(x), as_float(y)
    return x * elementwise("log", _where((x == 0) & ((y <= 0) | (y == math.inf)), 1.0, y))


def xlog1py(x: Operand, y: Operand) -> Tensor:
    """x log(1 + y), and 0 where x is 0 whatever number y is; where log(1 + y) is no finite number, so are the
    gradients."""
    x, y = as_float(x), as_float(y)
    return x * elementwise("log1p", _where((x == 0) & ((y <= -1) | (y == math.inf)), 0.0, y))


def sinc(x: Operand) -> Tensor:
    """sin(πx) / (πx), 1 at 0; near 0 its series, so that the derivatives keep their accuracy."""
    angle = as_float(x) * math.pi
    small = abs(angle) < 0.5
    square = _where(small, angle * angle, 0.0)
    series = square * (1 / math.factorial(17))
    for n in range(15, 0, -2):
        series = (1 / math.factorial(n) - series) * (square if n > 1 else 1.0)
    far = _where(small, 1.0, angle)
    return _where(small, series, elementwise("sin", far) / far)


# --- the gamma function

_SHIFT = 10
"""From here on Stirling's series serves."""


def lgamma(x: Operand) -> Tensor:
    """log |Γ(x)|: Stirling's series for x of 10 and more, to which others are shifted and, if negative,
    reflected (Abramowitz and Stegun 6.1). Computed in float64; the error is about 1e-14 near the zeros."""
    x = as_float(x)
    wide, negative, positive, small = _reflected(x)
    product = _where(small, positive, 1.0)
    for i in range(1, _SHIFT):
        product = product * _where(small, positive + i, 1.0)
    z = _where(small, positive + _SHIFT, positive)
    inverse = 1.0 / z
    series = _even_series(inverse, [1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360]) * inverse
    log = elementwise("log", z)
    result = (z - 0.5) * log - z + 0.5 * math.log(2 * math.pi) + series - elementwise("log", product)
    result = _where(z == math.inf, z, result)
    angle = _where(negative, wide - elementwise("round", wide), 0.5) * math.pi
    reflected = math.log(math.pi) - elementwise("log", abs(elementwise("sin", angle))) - result
    return cast(_where(negative, reflected, result), x.dtype)


def digamma(x: Operand) -> Tensor:
    """The derivative of `lgamma`, in the same way; NaN at negative integers, -inf at 0. Its gradient is the
    trigamma function."""
    x = as_float(x)
    wide, negative, positive, small = _reflected(x)
    z = _where(small, positive + _SHIFT, positive)
    inverse = 1.0 / z
    result = elementwise("log", z) - inverse * (inverse * _even_series(
        inverse, [1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760]) + 0.5)
    for i in range(_SHIFT):
        result = result - _where(small, 1.0 / _where(small, positive + i, 1.0), 0.0)
    whole = elementwise("round", wide)
    angle = _where(negative, wide - whole, 0.25) * math.pi
    reflected = result - math.pi * elementwise("cos", angle) / elementwise("sin", angle)
    reflected = _where(wide == whole, math.nan, reflected)
    return cast(_where(negative, reflected, result), x.dtype)


def _reflected(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in float64; whether it is negative; 1 - x if so, else x; whether that is too small for the series."""
    wide = cast(cast(x, F32) if x.dtype.is_half else x, F64)
    negative = wide < 0
    positive = _where(negative, 1.0 - wide, wide)
    return wide, negative, positive, positive < _SHIFT


def _even_series(x: Tensor, coefficients: list[float]) -> Tensor:
    """c0 + c1 x² + c2 x⁴ + …"""
    square = x * x
    result = square * coefficients[-1]
    for c in reversed(coefficients[1:-1]):
        result = (result + c) * square
    return result + coefficients[0]
