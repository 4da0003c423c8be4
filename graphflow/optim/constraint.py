"""Constraints: what an optimizer does to the new value of a parameter, e.g. ``SGD(0.1,
constraint=gf.optim.max_norm(3.0))``. Any function from a Tensor to one of its shape will do."""
from __future__ import annotations

from collections.abc import Callable

from graphflow.compiler.plan.errors import UseError
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.tensor import Axes, Tensor, elementwise


def max_norm(limit: float, axis: Axes = 0) -> Callable[[Tensor], Tensor]:
    """Scales vectors along `axis` that are longer than `limit` down to it. In a dense layer's weights
    [inputs, units] axis 0 runs along the incoming weights of a unit; biases need a group of their own.

    Srivastava and others, "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014.
    """
    if not limit > 0:
        raise UseError(f"the limit is {limit!r}", where=here(), hint="use a number > 0")

    def constraint(p: Tensor) -> Tensor:
        length = elementwise("sqrt", total(p * p, axis, keepdims=True))
        return p * (limit / elementwise("maximum", length, limit))

    return constraint


def non_negative(p: Tensor) -> Tensor:
    """Replaces negative numbers by 0: ``SGD(0.1, constraint=gf.optim.non_negative)``."""
    return elementwise("maximum", p, 0.0)
