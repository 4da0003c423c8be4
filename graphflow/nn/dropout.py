"""Dropout."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.nn.geometry import check_float
from graphflow.random import uniform
from graphflow.scope import here
from graphflow.tensor import Tensor, apply, elementwise

_SELU_LEAST = -1.7580993408473766
"""What selu approaches at -infinity: -scale · alpha."""


def dropout(x: Tensor, rate: float) -> Tensor:
    """In training each element is 0 with probability `rate`, and otherwise divided by 1 - rate; else `x`.

    Which ones follows from the Store's seed and step: the same bits on every run. Srivastava, Hinton,
    Krizhevsky, Sutskever and Salakhutdinov, JMLR 2014.
    """
    check_float("dropout", x)
    return _dropped("dropout", x, rate, x.shape)


def spatial_dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout of whole maps: all elements of a channel of a sample share their fate. x: [N, C, ...].

    Tompson, Goroshin, Jain, LeCun and Bregler, CVPR 2015.
    """
    check_float("spatial_dropout", x)
    if x.ndim < 3:
        raise ShapeError("spatial_dropout takes [N, C, ...] with spatial axes", op="spatial_dropout",
                         shapes=[x.shape], where=here(), hint="use dropout")
    return _dropped("spatial_dropout", x, rate, (*x.shape[:2], *(1,) * (x.ndim - 2)))


def alpha_dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout for nets of selu: in training each element becomes selu's least value with probability `rate`,
    and all are then scaled and shifted such that mean 0 and variance 1 stay so; else `x`.

    Klambauer, Unterthiner, Mayr and Hochreiter, NIPS 2017.
    """
    check_float("alpha_dropout", x)
    if _rate("alpha_dropout", x, rate) == 0:
        return x
    scale = ((1 - rate) * (1 + rate * _SELU_LEAST ** 2)) ** -0.5
    kept = uniform(x.shape) >= rate
    out = elementwise("where", kept, x, _SELU_LEAST) * scale - scale * rate * _SELU_LEAST
    return elementwise("where", apply("training", []), out, x)


def _dropped(op: str, x: Tensor, rate: float, shape: Sequence[Any]) -> Tensor:
    """`x` without what a mask of the shape drops."""
    if _rate(op, x, rate) == 0:
        return x
    kept = uniform(shape) >= rate
    out = elementwise("where", kept, x * (1 / (1 - rate)), 0.0)
    return elementwise("where", apply("training", []), out, x)


def _rate(op: str, x: Tensor, rate: float) -> float:
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise UseError(f"the rate of {op} is {rate!r}", op=op, shapes=[x.shape], where=here(),
                       hint="use a probability from 0 to below 1")
    return rate
