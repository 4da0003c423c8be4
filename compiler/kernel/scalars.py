"""The scalar functions that kernel expressions apply, each with its NumPy meaning (the interpreter's) and its
arity.

Back ends have one row for each; a test holds them to that. All arguments have the same type unless said
otherwise, and the result has it too, but for the comparisons (bool), ``where`` (bool first) and ``cast``.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scalar:
    """`flops`: the weight that the cost model gives it (an addition is 1). `exact`: every device gives the
    same bits."""
    name: str
    arity: int
    numpy: Callable[..., Any]
    flops: int = 1
    result: str = "same"            # same, bool, or given (the Apply's own dtype)
    exact: bool = True


def _function(name: str, numpy: Callable[..., Any], flops: int, arity: int = 1) -> Scalar:
    """A function whose last bits a device decides."""
    return Scalar(name, arity, numpy, flops, exact=False)


def _by_element(function: Callable[[float], float]) -> Callable[[Any], Any]:
    """A function of Python's numbers on arrays."""
    return lambda x: np.vectorize(function, otypes=[np.asarray(x).dtype])(x)


def _erfinv(x: float) -> float:
    """Winitzki's approximation, then Halley's iteration; the tails by erfc."""
    size = abs(float(x))
    if not 1e-9 < size < 1:
        return float(x) * (math.sqrt(math.pi) / 2 if size < 1 else math.inf if size == 1 else math.nan)
    log = math.log((1 - size) * (1 + size))
    part = 2 / (math.pi * 0.147) + log / 2
    y = math.sqrt(math.sqrt(part * part - log / 0.147) - part)
    for _ in range(4):
        error = math.erf(y) - size if size < 0.5 else (1 - size) - math.erfc(y)
        step = error * math.sqrt(math.pi) / 2 * math.exp(y * y)
        y -= step / (1 + y * step)
    return math.copysign(y, x)


def _sigmoid(x: Any) -> Any:
    z = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + z), z / (1 + z)).astype(np.asarray(x).dtype)


def _integer_safe(function: Callable[..., Any]) -> Callable[..., Any]:
    def safe(x: Any, y: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return function(x, y)
    return safe


SCALARS = {s.name: s for s in (
    Scalar("add", 2, np.add), Scalar("sub", 2, np.subtract), Scalar("mul", 2, np.multiply),
    Scalar("div", 2, _integer_safe(np.divide), 4),
    _function("mod", _integer_safe(np.mod), 8, 2),
    _function("floordiv", _integer_safe(np.floor_divide), 8, 2),
    Scalar("fma", 3, lambda x, y, z: x * y + z),
    Scalar("minimum", 2, np.minimum), Scalar("maximum", 2, np.maximum),
    Scalar("neg", 1, np.negative), Scalar("abs", 1, np.abs), Scalar("sign", 1, np.sign),
    Scalar("copysign", 2, np.copysign),
    Scalar("floor", 1, np.floor), Scalar("ceil", 1, np.ceil), Scalar("round", 1, np.rint),
    Scalar("trunc", 1, np.trunc),
    Scalar("sqrt", 1, np.sqrt, 6), Scalar("rsqrt", 1, lambda x: 1 / np.sqrt(x), 10),
    _function("cbrt", np.cbrt, 50), _function("hypot", np.hypot, 24, 2),
    _function("pow", _integer_safe(np.power), 40, 2),
    _function("exp", np.exp, 12), _function("exp2", np.exp2, 12), _function("expm1", np.expm1, 14),
    _function("log", np.log, 14), _function("log2", np.log2, 14), _function("log10", np.log10, 16),
    _function("log1p", np.log1p, 16),
    _function("sin", np.sin, 20), _function("cos", np.cos, 20), _function("tan", np.tan, 34),
    _function("asin", np.arcsin, 20), _function("acos", np.arccos, 22), _function("atan", np.arctan, 22),
    _function("atan2", np.arctan2, 30, 2),
    _function("sinh", np.sinh, 22), _function("cosh", np.cosh, 20), _function("tanh", np.tanh, 16),
    _function("asinh", np.arcsinh, 60), _function("acosh", np.arccosh, 60),
    _function("atanh", np.arctanh, 60),
    _function("sigmoid", _sigmoid, 16),
    _function("softplus", lambda x: np.logaddexp(x, np.zeros_like(x)), 24),
    _function("erf", _by_element(math.erf), 24), _function("erfc", _by_element(math.erfc), 70),
    _function("erfinv", _by_element(_erfinv), 60),
    Scalar("isnan", 1, np.isnan, 1, "bool"), Scalar("isfinite", 1, np.isfinite, 1, "bool"),
    Scalar("eq", 2, np.equal, 1, "bool"), Scalar("ne", 2, np.not_equal, 1, "bool"),
    Scalar("lt", 2, np.less, 1, "bool"), Scalar("le", 2, np.less_equal, 1, "bool"),
    Scalar("gt", 2, np.greater, 1, "bool"), Scalar("ge", 2, np.greater_equal, 1, "bool"),
    Scalar("and", 2, np.logical_and), Scalar("or", 2, np.logical_or), Scalar("not", 1, np.logical_not),
    Scalar("bit_and", 2, np.bitwise_and), Scalar("bit_or", 2, np.bitwise_or),
    Scalar("bit_xor", 2, np.bitwise_xor),
    Scalar("shift_left", 2, np.left_shift), Scalar("shift_right", 2, np.right_shift),
    Scalar("where", 3, np.where, 1, "given"),
    Scalar("cast", 1, lambda x: x, 1, "given"),
)}
