"""Initial values of parameters: functions (generator, shape, dtype) -> array, drawn once when a Store gets
the entry.

Weights of dense layers are (in, out), of convolutions (out, in, height, width): the fans follow from that.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

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


def uniform(low: float = -0.05, high: float = 0.05) -> Initializer:
    """Uniform in [low, high)."""
    return lambda generator, shape, dtype: generator.uniform(low, high, shape).astype(dtype)


def _scaled(normal_: bool, gain: float, fan: str) -> Initializer:
    """Of variance gain / fan; fan: "in", "out" or "average"."""
    def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        inputs, outputs = fans(shape)
        size = {"in": inputs, "out": outputs, "average": (inputs + outputs) / 2}[fan]
        std = math.sqrt(gain / max(size, 1))
        if normal_:
            return (std * generator.standard_normal(shape)).astype(dtype)
        limit = math.sqrt(3) * std
        return generator.uniform(-limit, limit, shape).astype(dtype)
    return draw


glorot_uniform = _scaled(False, 1, "average")
"""Uniform, variance 2 / (in + out): for sigmoid and tanh. Glorot and Bengio, AISTATS 2010."""
glorot_normal = _scaled(True, 1, "average")
"""Normal, variance 2 / (in + out). Glorot and Bengio, AISTATS 2010."""
he_normal = _scaled(True, 2, "in")
"""Normal, variance 2 / in: for ReLU. He, Zhang, Ren and Sun, ICCV 2015."""
he_uniform = _scaled(False, 2, "in")
"""Uniform, variance 2 / in: for ReLU. He, Zhang, Ren and Sun, ICCV 2015."""
lecun_normal = _scaled(True, 1, "in")
"""Normal, variance 1 / in. LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998."""
lecun_uniform = _scaled(False, 1, "in")
"""Uniform, variance 1 / in. LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998."""
