"""Schedules: hyperparameters as functions of the number of updates made so far, computed inside the program.

They stand wherever a hyperparameter does: ``SGD(schedule.cosine(0.1, 1000), schedule.linear(0.5, 0.9, 500))``
has a learning rate and a momentum that change. Any function from a scalar Tensor of float64 (0, 1, 2, …) to a
number or a scalar Tensor is one, too. Counts are of updates, not epochs.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.plan.dtypes import F64
from graphflow.compiler.plan.errors import UseError
from graphflow.reductions import max as largest
from graphflow.reductions import min as smallest
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.tensor import Tensor, cast, constant, elementwise


class Schedule:
    """A function of the number of updates made so far; what the functions of this module give."""

    def __init__(self, function: Callable[[Tensor], Any], text: str) -> None:
        self._function, self._text = function, text

    def __call__(self, count: Tensor) -> Tensor:
        """The value (a scalar of float64) after `count` (a scalar) updates."""
        return cast(self._function(cast(count, F64)), F64)

    def __repr__(self) -> str:
        return self._text

    def values(self, updates: int) -> np.ndarray:
        """The values for the first so many updates, float64: to look at, or to plot."""
        from graphflow.function import function
        from graphflow.state import input as feed
        count = feed("count", (), "float64")
        program = function(count, self(count), device="reference")
        return np.array([program(float(i)) for i in range(updates)])


Value = float | Callable[[Tensor], Any]
"""What the parts of a composed schedule are: numbers or schedules."""


def step(start: float, every: int, factor: float = 0.1) -> Schedule:
    """start · factor^k after k times `every` updates."""
    _positive("every", every)
    return Schedule(lambda t: start * _power(factor, elementwise("floor", t / every)),
                    f"step({start}, {every}, {factor})")


def multistep(start: float, milestones: Sequence[int], factor: float = 0.1) -> Schedule:
    """start · factor^k, where k is how many of the `milestones` have been reached."""
    places = constant(np.asarray(list(milestones), float)) if milestones else None

    def function(t: Tensor) -> Any:
        return start if places is None else start * _power(factor, total(cast(places <= t, F64)))

    return Schedule(function, f"multistep({start}, {list(milestones)}, {factor})")


def exponential(start: float, factor: float, every: int = 1) -> Schedule:
    """start · factor^(t / every): smooth, not in steps."""
    _positive("every", every)
    return Schedule(lambda t: start * _power(factor, t / every), f"exponential({start}, {factor}, {every})")


def inverse_time(start: float, rate: float) -> Schedule:
    """start / (1 + rate·t)."""
    return Schedule(lambda t: start / (1 + rate * t), f"inverse_time({start}, {rate})")


def inverse_sqrt(start: float, warmup: int = 1) -> Schedule:
    """A linear warm-up from start/`warmup` to `start` over `warmup` updates, then
    start · sqrt(warmup / (t+1)): the schedule of Vaswani and others, "Attention is all you need", NeurIPS
    2017."""
    _positive("warmup", warmup)

    def function(t: Tensor) -> Any:
        number = t + 1.0
        rising, falling = number / warmup, elementwise("sqrt", warmup / number)
        return start * elementwise("minimum", rising, falling)

    return Schedule(function, f"inverse_sqrt({start}, {warmup})")


def linear(start: float, end: float, updates: int) -> Schedule:
    """On a straight line from `start` to `end` within so many updates, then `end`."""
    return polynomial(start, updates, end, 1.0)


def polynomial(start: float, updates: int, end: float = 0.0, power: float = 1.0) -> Schedule:
    """end + (start - end) (1 - t/updates)^power, then `end`."""
    _positive("updates", updates)

    def function(t: Tensor) -> Any:
        rest = 1 - elementwise("minimum", t / updates, 1.0)
        return end + (start - end) * (rest if power == 1 else elementwise("pow", rest, power))

    return Schedule(function, f"polynomial({start}, {updates}, {end}, {power})")


def cosine(start: float, updates: int, end: float = 0.0) -> Schedule:
    """Half a cosine from `start` to `end` within so many updates, then `end`: Loshchilov and Hutter, "SGDR:
    stochastic gradient descent with warm restarts", ICLR 2017, without restarts."""
    _positive("updates", updates)
    return Schedule(lambda t: _anneal(start, end, elementwise("minimum", t / updates, 1.0)),
                    f"cosine({start}, {updates}, {end})")


def cosine_restarts(start: float, period: int, factor: int = 1, end: float = 0.0) -> Schedule:
    """Half a cosine from `start` to `end` within `period` updates, then again from `start`; each period is
    `factor` times as long as the one before. Loshchilov and Hutter, ICLR 2017."""
    _positive("period", period)
    if not isinstance(factor, int) or factor < 1:
        raise UseError(f"factor is {factor!r}", where=here(), hint="use an integer >= 1")

    def function(t: Tensor) -> Any:
        if factor == 1:
            return _anneal(start, end, t / period - elementwise("floor", t / period))
        restarts, length = [0], period
        while restarts[-1] < 2 ** 53:
            restarts.append(restarts[-1] + length)
            length *= factor
        places = constant(np.asarray(restarts, float))
        last = largest(elementwise("where", places <= t, places, 0.0))
        following = smallest(elementwise("where", places > t, places, math.inf))
        return _anneal(start, end, (t - last) / (following - last))

    return Schedule(function, f"cosine_restarts({start}, {period}, {factor}, {end})")


def one_cycle(peak: float, updates: int, start: float | None = None, end: float | None = None,
              rising: float = 0.3) -> Schedule:
    """Half a cosine from `start` (peak/25) up to `peak` within the share `rising` of the updates, then one
    down to `end` (start/10000). The momentum usually goes the other way: ``one_cycle(0.85, n, 0.95, 0.95)``.

    Smith and Topin, "Super-convergence", arXiv 1708.07120, 2017, in the form that PyTorch uses: the last
    value is reached in update number `updates`.
    """
    _positive("updates", updates)
    first = peak / 25 if start is None else start
    last = first / 1e4 if end is None else end
    top = rising * updates - 1
    if not 0 < top < updates - 1:
        raise UseError(f"one_cycle with {updates} updates can't rise for {rising} of them", where=here(),
                       hint="rising is a share between 0 and 1 of more than a few updates")

    def function(t: Tensor) -> Any:
        up = _anneal(first, peak, elementwise("minimum", t / top, 1.0))
        share = elementwise("minimum", (t - top) / (updates - 1 - top), 1.0)
        return elementwise("where", t <= top, up, _anneal(peak, last, share))

    return Schedule(function, f"one_cycle({peak}, {updates}, {first}, {last}, {rising})")


def warmup(updates: int, then: Value, start: float = 0.0) -> Schedule:
    """On a straight line from `start` times the first value of `then` up to that value, within so many
    updates; then `then`, which counts from there."""
    _positive("updates", updates)

    def function(t: Tensor) -> Any:
        first = _value(then, constant(0.0, F64))
        rising = first * (start + (1 - start) * elementwise("minimum", t / updates, 1.0))
        return elementwise("where", t < updates, rising, _value(then, _since(t, updates)))

    return Schedule(function, f"warmup({updates}, {then}, {start})")


def piecewise(boundaries: Sequence[int], parts: Sequence[Value]) -> Schedule:
    """Part i from boundary i-1 up to boundary i (excluded): one part more than boundaries. Parts are numbers
    or schedules, which count from the start of their own stretch."""
    if len(parts) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)):
        raise UseError(f"{len(parts)} parts for the boundaries {list(boundaries)}", where=here(),
                       hint="boundaries grow, and there is one part more than boundaries")

    def function(t: Tensor) -> Any:
        out: Any = _value(parts[0], t)
        for begin, part in zip(boundaries, parts[1:]):
            out = elementwise("where", t < begin, out, _value(part, _since(t, begin)))
        return out

    return Schedule(function, f"piecewise({list(boundaries)}, {list(parts)})")


def _anneal(start: float, end: float, share: Tensor) -> Tensor:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * (1 + elementwise("cos", share * math.pi)) / 2


def _since(t: Tensor, begin: int) -> Tensor:
    return elementwise("maximum", t - begin, 0.0)


def _value(part: Value, t: Tensor) -> Tensor:
    return cast(part(t) if callable(part) else part, F64)


def _power(factor: float, exponent: Tensor) -> Tensor:
    return elementwise("pow", factor, exponent)


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UseError(f"{name} is {value!r}", where=here(), hint="use a number of updates > 0")
