"""Averages of the parameters over training, which often generalise better than the parameters themselves.

An average is kept in slots beside the parameters. ``Adam(1e-3, average=gf.optim.EMA(0.999))`` keeps it up to
date; ``optimizer.averaged(outputs)`` computes the outputs with the averages in the parameters' places.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphflow.compiler.plan.dtypes import F64
from graphflow.compiler.plan.errors import UseError
from graphflow.scope import here
from graphflow.state import Naming, counter, slot, variable, variable_of
from graphflow.substitute import substitute
from graphflow.tensor import Tensor, cast, constant, elementwise


class Average:
    """The base of averages: a ← keep·a + (1 - keep)·p after every update. A subclass says what `keep` is."""

    def __init__(self, debias: bool = False) -> None:
        self.debias = debias
        self._slots: dict[Tensor, Tensor] = {}
        self._count: Tensor | None = None
        self._rest: Tensor | None = None

    def keep(self, number: Tensor) -> Any:
        """The weight of the average so far in update number 1, 2, … (a scalar of float64); a number or a
        scalar of float64."""
        raise NotImplementedError

    def update(self, updates: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The updates, what an optimizer's `minimize` gives, with those of the averages added."""
        out = dict(updates)
        if self._count is None:
            naming = Naming("average", False)
            self._count = counter(naming)
            if self.debias:
                self._rest = variable(naming, "rest", (), 1.0, F64, "slot")
        keep = cast(self.keep(cast(self._count, F64) + 1.0), F64)
        out[self._count] = self._count + 1
        if self._rest is not None:
            out[self._rest] = self._rest * keep
        for p, new in updates.items():
            if variable_of(p).role == "parameter":
                old = self._slots.setdefault(p, slot(p, "average"))
                out[old] = old * cast(keep, p.dtype) + new * cast(1 - keep, p.dtype)
        return out

    def of(self, x: Any) -> Any:
        """`x` (a Tensor, or a list or dict of them) as it is with the averages of the parameters in their
        places. Before the first update the averages are the parameters."""
        if self._count is None:
            raise UseError("this average is of no parameters yet", where=here(),
                           hint="pass it to an optimizer and minimize, or call its update")
        return substitute(x, {p: self._value(p, a) for p, a in self._slots.items()})

    def _value(self, p: Tensor, average: Tensor) -> Tensor:
        assert self._count is not None
        begun = self._count > 0
        if self._rest is not None:
            weight = elementwise("where", begun, 1 - self._rest, 1.0)
            average = average / cast(weight, p.dtype)
        return elementwise("where", begun, average, p)


class EMA(Average):
    """The exponential moving average: a ← d a + (1-d) p after every update; the first update sets a to p.

    `decay` is a number or a function of the number of the update (1, 2, …, a scalar Tensor). With `debias` a
    starts at 0 and is divided by the sum of its weights, 1 - d^t, where it is used, as Adam corrects its
    means.
    """

    def __init__(self, decay: float | Callable[[Tensor], Any] = 0.999, debias: bool = False) -> None:
        super().__init__(debias)
        if not callable(decay) and not 0 <= decay < 1:
            raise UseError(f"the decay is {decay!r}", where=here(), hint="use a number from 0 to below 1")
        self.decay = decay

    def keep(self, number: Tensor) -> Any:
        """See the class."""
        decay = self.decay(number) if callable(self.decay) else self.decay
        if self.debias:
            return decay
        return elementwise("where", number == 1.0, constant(0.0, F64), decay)


class PolyakAverage(Average):
    """The mean of the parameters over all updates after the first `start`; up to then the parameters.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control and
    Optimization 30, 1992.
    """

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        if not isinstance(start, int) or start < 0:
            raise UseError(f"start is {start!r}", where=here(), hint="use a number of updates >= 0")
        self.start = start

    def keep(self, number: Tensor) -> Any:
        """See the class."""
        return 1 - 1 / elementwise("maximum", number - self.start, 1.0)
