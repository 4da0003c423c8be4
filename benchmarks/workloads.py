"""The nine training steps that engines are timed on: sizes, initial values, data and hyperparameters.

    work = WORKLOADS["lenet"]
    work.params()       # {parameter: initial values}
    work.batch(0)       # {"x": ..., "y": ...}: one of the two batches that steps are fed in turn

Everything is made by NumPy from seeds, so each engine starts from the same numbers and its losses must agree
with those of the others: a fast wrong answer is found out. A step is the forward pass, the loss, the
gradients and the optimizer's update, in float32.

Images are [N, channels, height, width]; a convolution's weight ``.W`` is [out, in, height, width], a dense
layer's [in, out]; flattening goes channel by channel. Biases are ``.b``; a batch norm's scale is ``.g``; an
LSTM has ``.Wx``, ``.Wh`` and ``.b``, with the gates in the order i, f, g, o. SMALL has the same nets with few
units on few examples, for trying out: a step takes milliseconds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One training step.

    `example`: the shape of one row of x; `classes`: that many labels, 0 for none; `optimizer`: "sgd",
    "momentum" (0.9), "nesterov" (0.9) or "rmsprop" (decay 0.95, eps 1e-8); `gain`: weights are normally
    distributed with the variance gain / fan-in; `steps`: the length of sequences, 0 for none.
    """

    name: str
    about: str
    batch_size: int
    example: tuple[int, ...]
    classes: int
    optimizer: str
    rate: float
    shapes: Shapes
    gain: float = 2.0
    steps: int = 0

    @property
    def state_bytes(self) -> int:
        """What parameters and optimizer state take: as many bytes, whoever runs the step."""
        slots = {"sgd": 0}.get(self.optimizer, 1)
        return 4 * (1 + slots) * sum(map(math.prod, self.shapes.values()))

    def params(self) -> Arrays:
        """Initial values of every parameter, float32: zero biases, unit scales, random weights."""
        rng = self._generator("parameters")
        return {key: self._initial(rng, key, shape) for key, shape in self.shapes.items()}

    def _initial(self, rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> np.ndarray:
        part = key.rpartition(".")[2]
        if part in ("b", "g"):
            return np.full(shape, part == "g", np.float32)
        if part in ("Wx", "Wh"):
            bound = 1 / math.sqrt(shape[1] // 4)
            return rng.uniform(-bound, bound, shape).astype(np.float32)
        fan_in = shape[0] if len(shape) == 2 else math.prod(shape[1:])
        return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(self.gain / fan_in))

    def batch(self, index: int) -> Arrays:
        """Batch 0 or 1: noise, for the time of a step does not depend on what is learned. Sequences are
        [time, batch] of symbols, and y is x one step later; an autoencoder has no y."""
        rng = self._generator(f"batch {index}")
        if self.steps:
            text = rng.integers(0, self.classes, (self.steps + 1, self.batch_size))
            return {"x": text[:-1], "y": text[1:]}
        x = rng.random((self.batch_size, *self.example), np.float32)
        if not self.classes:
            return {"x": x}
        return {"x": 2 * x - 1, "y": rng.integers(0, self.classes, self.batch_size)}

    def _generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(self.name.encode()), zlib.crc32(purpose.encode())])


# --- layers' shapes


def _dense(key: str, *units: int) -> Shapes:
    """Dense layers on top of each other, the first of `units` being the inputs: KEY1, KEY2 … or just KEY."""
    pairs = list(zip(units, units[1:]))
    keys = [key] if len(pairs) == 1 else [f"{key}{i}" for i in range(1, len(pairs) + 1)]
    return {
        f"{k}.{part}": shape for k, (i, o) in zip(keys, pairs) for part, shape in (("W", (i, o)), ("b", (o,)))
    }


def _conv(key: str, channels: int, out: int, window: int) -> Shapes:
    return {f"{key}.W": (out, channels, window, window), f"{key}.b": (out,)}


def _normed(key: str, channels: int, out: int) -> Shapes:
    """A 3x3 convolution without bias, with batch norm behind it."""
    return {f"{key}.W": (out, channels, 3, 3), f"{key}.g": (out,), f"{key}.b": (out,)}


def _lstm(key: str, features: int, units: int) -> Shapes:
    return {f"{key}.Wx": (features, 4 * units), f"{key}.Wh": (units, 4 * units), f"{key}.b": (4 * units,)}


# --- the nets; each function makes the full size, or the small one


def _logreg(small: bool) -> Workload:
    inputs, rows = (12, 6) if small else (784, 128)
    return Workload(
        name="logreg",
        about=f"softmax regression, {inputs} → 10, batch {rows}",
        batch_size=rows,
        example=(inputs,),
        classes=10,
        optimizer="sgd",
        rate=0.1,
        shapes=_dense("fc", inputs, 10),
        gain=1.0,
    )


def _mlp(small: bool) -> Workload:
    units, rows = ((12, 16, 16, 10), 6) if small else ((784, 512, 512, 10), 128)
    return Workload(
        name="mlp",
        about=f"{'-'.join(map(str, units))}, ReLU, momentum, batch {rows}",
        batch_size=rows,
        example=units[:1],
        classes=10,
        optimizer="momentum",
        rate=0.05,
        shapes=_dense("fc", *units),
    )


def _autoenc(small: bool) -> Workload:
    half, rows = ((12, 10, 8, 6, 3), 6) if small else ((784, 1000, 500, 250, 30), 128)
    return Workload(
        name="autoenc",
        about=f"autoencoder, 8 dense layers, Nesterov, batch {rows}",
        batch_size=rows,
        example=half[:1],
        classes=0,
        optimizer="nesterov",
        rate=0.05,
        shapes=_dense("fc", *half, *half[-2::-1]),
        gain=1.0,
    )


def _traffic(small: bool) -> Workload:
    (first, second), rows = ((2, 3), 4) if small else ((4, 10), 32)
    shapes = {
        **_conv("conv1", 1, first, 5),
        **_conv("conv2", first, second, 5),
        **_dense("fc", second * 25, 43),
    }
    return Workload(
        name="traffic",
        about=f"2 convolutions with tanh on 32×32, batch {rows}",
        batch_size=rows,
        example=(1, 32, 32),
        classes=43,
        optimizer="sgd",
        rate=0.05,
        shapes=shapes,
    )


def _lenet(small: bool) -> Workload:
    (first, second, units), rows = ((3, 4, 10), 4) if small else ((20, 50, 500), 64)
    shapes = {
        **_conv("conv1", 1, first, 5),
        **_conv("conv2", first, second, 5),
        **_dense("fc", second * 16, units, 10),
    }
    return Workload(
        name="lenet",
        about=f"LeNet on 28×28, momentum, batch {rows}",
        batch_size=rows,
        example=(1, 28, 28),
        classes=10,
        optimizer="momentum",
        rate=0.01,
        shapes=shapes,
    )


def _inception(small: bool) -> Workload:
    part, side, rows = (16, 7, 2) if small else (1, 28, 16)
    inputs, one, to_three, three, to_five, five, pooled = (n // part for n in (192, 64, 96, 128, 16, 32, 32))
    shapes = {
        **_conv("b1", inputs, one, 1),
        **_conv("b3r", inputs, to_three, 1),
        **_conv("b3", to_three, three, 3),
        **_conv("b5r", inputs, to_five, 1),
        **_conv("b5", to_five, five, 5),
        **_conv("bp", inputs, pooled, 1),
        **_dense("fc", one + three + five + pooled, 10),
    }
    return Workload(
        name="inception",
        about=f"Inception module on {inputs}×{side}×{side}, momentum, batch {rows}",
        batch_size=rows,
        example=(inputs, side, side),
        classes=10,
        optimizer="momentum",
        rate=0.01,
        shapes=shapes,
    )


def _resnet(small: bool) -> Workload:
    part, side, rows = (4, 12, 4) if small else (1, 32, 32)
    width = 16 // part
    shapes = _normed("stem", 3, width)
    for stage, channels in enumerate(n // part for n in (16, 32, 64)):
        for block in range(3):
            key = f"s{stage}b{block}"
            shapes |= {**_normed(f"{key}.1", width, channels), **_normed(f"{key}.2", channels, channels)}
            if width != channels:
                shapes[f"{key}.p.W"] = (channels, width, 1, 1)
            width = channels
    return Workload(
        name="resnet",
        about=f"ResNet-20 on {side}×{side}, batch norm, momentum, batch {rows}",
        batch_size=rows,
        example=(3, side, side),
        classes=10,
        optimizer="momentum",
        rate=0.05,
        shapes={**shapes, **_dense("fc", width, 10)},
    )


def _alexnet(small: bool) -> Workload:
    part, side, rows, left = (16, 99, 2, 2) if small else (1, 224, 16, 6)
    a, b, c, d, e, units = (n // part for n in (64, 192, 384, 256, 256, 4096))
    shapes = {
        **_conv("c1", 3, a, 11),
        **_conv("c2", a, b, 5),
        **_conv("c3", b, c, 3),
        **_conv("c4", c, d, 3),
        **_conv("c5", d, e, 3),
        **_dense("fc6", e * left * left, units),
        **_dense("fc7", units, units),
        **_dense("fc8", units, 1000 // part),
    }
    return Workload(
        name="alexnet",
        about=f"AlexNet on {side}×{side}, one tower, momentum, batch {rows}",
        batch_size=rows,
        example=(3, side, side),
        classes=1000 // part,
        optimizer="momentum",
        rate=0.0002,
        shapes=shapes,
    )


def _charrnn(small: bool) -> Workload:
    symbols, units, steps, rows = (11, 6, 5, 3) if small else (96, 128, 50, 50)
    shapes = {**_lstm("l1", symbols, units), **_lstm("l2", units, units), **_dense("fc", units, symbols)}
    return Workload(
        name="charrnn",
        about=f"2 LSTM layers of {units} over {steps} characters, RMSprop, batch {rows}",
        batch_size=rows,
        example=(),
        classes=symbols,
        optimizer="rmsprop",
        rate=0.002,
        shapes=shapes,
        gain=1.0,
        steps=steps,
    )


_NETS: tuple[Callable[[bool], Workload], ...] = (
    _logreg,
    _mlp,
    _autoenc,
    _traffic,
    _lenet,
    _inception,
    _resnet,
    _alexnet,
    _charrnn,
)
WORKLOADS = {work.name: work for work in (net(False) for net in _NETS)}
SMALL = {work.name: work for work in (net(True) for net in _NETS)}
