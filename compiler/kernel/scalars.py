"""The scalar functions that kernel expressions apply, each with its NumPy meaning (the interpreter's) and its
arity.

Back ends have one row for each; a test holds them to that. All arguments have the same type unless said
otherwise, and the result has it too, but for the comparisons (bool), ``where`` (bool first) and ``cast``.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scalar:
    """`flops`: the weight that the cost model gives it (an addition is 1)."""
    name: str
    arity: int
    numpy: Callable[..., Any]
    flops: int = 1
    result: str = "same"            # same, bool, or given (the Apply's own dtype)


def _erf(x: Any) -> Any:
    import math
    return np.vectorize(math.erf, otypes=[np.asarray(x).dtype])(x)


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
    Scalar("mod", 2, _integer_safe(np.mod), 8), Scalar("floordiv", 2, _integer_safe(np.floor_divide), 8),
    Scalar("pow", 2, _integer_safe(np.power), 40),
    Scalar("fma", 3, lambda x, y, z: x * y + z),
    Scalar("minimum", 2, np.minimum), Scalar("maximum", 2, np.maximum),
    Scalar("neg", 1, np.negative), Scalar("abs", 1, np.abs), Scalar("sign", 1, np.sign),
    Scalar("sqrt", 1, np.sqrt, 6), Scalar("rsqrt", 1, lambda x: 1 / np.sqrt(x), 10),
    Scalar("exp", 1, np.exp, 12), Scalar("expm1", 1, np.expm1, 14), Scalar("log", 1, np.log, 14),
    Scalar("log1p", 1, np.log1p, 16), Scalar("tanh", 1, np.tanh, 16), Scalar("sigmoid", 1, _sigmoid, 16),
    Scalar("softplus", 1, lambda x: np.logaddexp(x, np.zeros_like(x)), 24), Scalar("erf", 1, _erf, 24),
    Scalar("sin", 1, np.sin, 20), Scalar("cos", 1, np.cos, 20),
    Scalar("floor", 1, np.floor), Scalar("ceil", 1, np.ceil), Scalar("round", 1, np.rint),
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
