"""Initial values of parameters: functions (generator, shape, dtype) -> array, drawn once when a Store gets
the entry.

Weights of dense layers are (in, out), of convolutions (out, in, height, width): the fans follow from that.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here

Initializer = Callable[[np.random.Generator, tuple[int, ...], np.dtype], np.ndarray]


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """(inputs of one output, outputs that one input reaches) of a weight of that shape."""
    if len(shape) < 2:
        size = shape[0] if shape else 1
        return size, size
    if len(shape) == 2:
        return shape[0], shape[1]
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def constant(value: float) -> Initializer:
    """One value everywhere."""
    return lambda generator, shape, dtype: np.full(shape, value, dtype)


def zeros(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros."""
    return np.zeros(shape, dtype)


def ones(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Ones."""
    return np.ones(shape, dtype)


def normal(std: float = 0.01, mean: float = 0.0) -> Initializer:
    """Normally distributed around `mean` with the standard deviation `std`."""
    return lambda generator, shape, dtype: (mean + std * generator.standard_normal(shape)).astype(dtype)


def truncated_normal(std: float = 0.01, mean: float = 0.0, limit: float = 2.0) -> Initializer:
    """Normally distributed, but nothing farther from `mean` than `limit` times `std`: what is, is drawn
    again. So the standard deviation of the result is less than `std`: 0.88 of it for a limit of 2."""
    if not limit > 0:
        raise UseError(f"limit is {limit!r}", where=here(), hint="use a number > 0")

    def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        values = generator.standard_normal(shape)
        outside = np.abs(values) > limit
        while outside.any():
            values[outside] = generator.standard_normal(np.count_nonzero(outside))
            outside = np.abs(values) > limit
        return (mean + std * values).astype(dtype)
    return draw


def uniform(low: float = -0.05, high: float = 0.05) -> Initializer:
    """Uniform in [low, high)."""
    return lambda generator, shape, dtype: generator.uniform(low, high, shape).astype(dtype)


def orthogonal(gain: float = 1.0) -> Initializer:
    """A random matrix with orthonormal rows or columns, whichever are fewer, times `gain`; of more axes, the
    first against all others. Saxe, McClelland and Ganguli, ICLR 2014."""
    def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        _check_rank("orthogonal", shape, 2, "at least 2 axes")
        rows, columns = shape[0], math.prod(shape[1:])
        drawn = generator.standard_normal((max(rows, columns), min(rows, columns)))
        q, r = np.linalg.qr(drawn)
        q = q * np.where(np.diag(r) < 0, -1.0, 1.0)     # evenly distributed over all such matrices
        return (gain * (q if rows >= columns else q.T)).reshape(shape).astype(dtype)
    return draw


def identity(gain: float = 1.0) -> Initializer:
    """The matrix that keeps its input, times `gain`: 1 where both positions are equal."""
    def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        _check_rank("identity", shape, 2, "2 axes", 2)
        return (gain * np.eye(shape[0], shape[1])).astype(dtype)
    return draw


def dirac(gain: float = 1.0) -> Initializer:
    """The convolution that keeps its input, times `gain`: 1 at the middle of the window from each channel to
    the one of its number."""
    def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        _check_rank("dirac", shape, 3, "3 to 5 axes", 5)
        values = np.zeros(shape, dtype)
        for channel in range(min(shape[:2])):
            values[(channel, channel, *(size // 2 for size in shape[2:]))] = gain
        return values
    return draw


def _check_rank(what: str, shape: tuple[int, ...], least: int, wanted: str, most: int | None = None) -> None:
    if len(shape) < least or most is not None and len(shape) > most:
        raise ShapeError(f"init.{what} is for weights with {wanted}", shapes=[shape], where=here())


@dataclass(frozen=True)
class FanScaled:
    """Random values around 0 with the standard deviation gain · sqrt(factor / fan).

    fan: "in", "out" or "average" of both (see `fans`). uniform: evenly distributed, else normally.
    """
    factor: float
    fan: str
    uniform: bool
    gain: float = 1.0

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        inputs, outputs = fans(shape)
        size = {"in": inputs, "out": outputs, "average": (inputs + outputs) / 2}[self.fan]
        std = self.gain * math.sqrt(self.factor / max(size, 1))
        if not self.uniform:
            return (std * generator.standard_normal(shape)).astype(dtype)
        limit = math.sqrt(3) * std
        return generator.uniform(-limit, limit, shape).astype(dtype)

    def scaled(self, gain: float) -> FanScaled:
        """The same with a standard deviation `gain` times as large: ``gf.init.glorot_normal.scaled(5 / 3)``.
        """
        return replace(self, gain=self.gain * gain)


glorot_uniform = FanScaled(1, "average", True)
"""Uniform, variance 2 / (in + out): for sigmoid and tanh. Glorot and Bengio, AISTATS 2010."""
glorot_normal = FanScaled(1, "average", False)
"""Normal, variance 2 / (in + out). Glorot and Bengio, AISTATS 2010."""
he_normal = FanScaled(2, "in", False)
"""Normal, variance 2 / in: for ReLU. He, Zhang, Ren and Sun, ICCV 2015."""
he_uniform = FanScaled(2, "in", True)
"""Uniform, variance 2 / in: for ReLU. He, Zhang, Ren and Sun, ICCV 2015."""
lecun_normal = FanScaled(1, "in", False)
"""Normal, variance 1 / in. LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998."""
lecun_uniform = FanScaled(1, "in", True)
"""Uniform, variance 1 / in. LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998."""
