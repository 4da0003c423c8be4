"""Clipping of gradients: functions of all (parameter, gradient) pairs.

They are made by a limit and then applied: ``Adam(1e-3, clip=gf.optim.clip.by_global_norm(1.0))``, or by hand
``optimizer.apply(gf.optim.clip.by_value(0.5)(pairs))``. Limits are numbers or scalar Tensors.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from graphflow.compiler.plan.dtypes import F64
from graphflow.compiler.plan.errors import UseError
from graphflow.reductions import max as largest
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.tensor import Tensor, cast, elementwise

Pairs = Sequence[tuple[Tensor, Tensor]]
Clip = Callable[[Pairs], list[tuple[Tensor, Tensor]]]
Limit = float | Tensor

EPS = 1e-6
"""What is added to a norm before it divides, as in PyTorch's ``clip_grad_norm_``."""


def by_value(high: Limit, low: Limit | None = None) -> Clip:
    """Limits every number of every gradient to low … high; `low` is -high if it is not given."""
    _check(high)
    bottom = -high if low is None else low

    def clip(pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        return [(p, elementwise("minimum", elementwise("maximum", g, cast(bottom, g.dtype)),
                                cast(high, g.dtype))) for p, g in pairs]

    return clip


def by_norm(limit: Limit, norm: float = 2.0) -> Clip:
    """Scales each gradient whose norm exceeds the limit down to it, each for itself:
    g ← g min(1, limit / (‖g‖ + 1e-6))."""
    _check(limit)

    def clip(pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        return [(p, g * _factor(limit, global_norm([g], norm), g)) for p, g in pairs]

    return clip


def by_global_norm(limit: Limit, norm: float = 2.0) -> Clip:
    """Scales all gradients by one factor, so that their norm as one long vector is at most the limit:
    g ← g min(1, limit / (‖all g‖ + 1e-6)).

    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
    """
    _check(limit)

    def clip(pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        size = global_norm([g for _, g in pairs], norm)
        return [(p, g * _factor(limit, size, g)) for p, g in pairs]

    return clip


def global_norm(tensors: Sequence[Tensor], norm: float = 2.0) -> Tensor:
    """The norm of the tensors as one long vector, a scalar of float64. norm: a number > 0, or ``inf`` for
    the largest absolute value."""
    if not tensors:
        raise UseError("global_norm takes at least one tensor", where=here())
    if not norm > 0:
        raise UseError(f"there is no norm {norm!r}", where=here(), hint="use a number > 0")
    sizes = [elementwise("abs", t) for t in tensors]
    if norm == float("inf"):
        parts = [cast(largest(s), F64) for s in sizes]
        out = parts[0]
        for part in parts[1:]:
            out = elementwise("maximum", out, part)
        return out
    powers = [t * t for t in tensors] if norm == 2 else [s if norm == 1 else s ** float(norm) for s in sizes]
    parts = [cast(total(x), F64) for x in powers]
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    if norm == 2:
        return elementwise("sqrt", out)
    return out if norm == 1 else out ** (1 / norm)


def _factor(limit: Limit, size: Tensor, like: Tensor) -> Tensor:
    return cast(elementwise("minimum", cast(limit, F64) / (size + EPS), 1.0), like.dtype)


def _check(limit: Limit) -> None:
    if isinstance(limit, Tensor) and not limit.shape or not isinstance(limit, Tensor) and limit > 0:
        return
    raise UseError(f"the limit is {limit!r}", where=here(), hint="use a number > 0 or a scalar Tensor")
