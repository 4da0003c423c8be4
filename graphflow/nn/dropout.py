"""Dropout, and the random numbers that it is made of."""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from graphflow.compiler.plan.errors import UseError
from graphflow.nn.geometry import check_float
from graphflow.scope import here
from graphflow.state import random_state
from graphflow.tensor import Tensor, apply, cast, elementwise

_streams = itertools.count()


def dropout(x: Tensor, rate: float) -> Tensor:
    """In training each element is 0 with probability `rate`, and otherwise divided by 1 - rate; else `x`.

    Which ones follows from the Store's seed and step: the same bits on every run.
    """
    check_float("dropout", x)
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise UseError(f"the rate of dropout is {rate!r}", op="dropout", shapes=[x.shape], where=here(),
                       hint="use a probability from 0 to below 1")
    if rate == 0:
        return x
    kept = random_uniform(x.shape) >= rate
    dropped = elementwise("where", kept, x * (1 / (1 - rate)), 0.0)
    return elementwise("where", apply("training", []), dropped, x)


def random_uniform(shape: Sequence[Any]) -> Tensor:
    """Numbers in [0, 1), multiples of 2**-24 in float32, fresh in every training step and for every node."""
    seed, step = random_state()
    bits = apply("random_bits", [seed, step], shape=tuple(shape), stream=next(_streams))
    return cast(bits >> 8, "float32") * 2.0 ** -24
