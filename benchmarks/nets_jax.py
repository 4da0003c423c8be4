"""The nine training steps in JAX: the whole step, optimizer included, under one jit with its state donated.

Images are [N, height, width, channels] and filters [height, width, in, out], which XLA prefers on the CPU.
JAX takes a thread for each processor that its process may use when it is imported: see `worker.hold_to`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from workloads import Arrays, Workload

Params = dict[str, jax.Array]
relu = jax.nn.relu


def dense(p: Params, h: jax.Array, key: str) -> jax.Array:
    """A dense layer."""
    return h @ p[f"{key}.W"] + p[f"{key}.b"]


def conv(p: Params, h: jax.Array, key: str, stride: int = 1, padding: int = 0) -> jax.Array:
    """A convolution; without a bias if it has none."""
    h = _filtered(h, p[f"{key}.W"], stride, padding)
    return h + p[f"{key}.b"] if f"{key}.b" in p else h


def _filtered(h: jax.Array, weight: jax.Array, stride: int, padding: int) -> jax.Array:
    return lax.conv_general_dilated(
        h, weight, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normed(p: Params, h: jax.Array, key: str, stride: int = 1) -> jax.Array:
    """A 3x3 convolution without bias, and batch norm by the batch's statistics."""
    h = _filtered(h, p[f"{key}.W"], stride, 1)
    centred = h - h.mean((0, 1, 2))
    variance = (centred * centred).mean((0, 1, 2))
    return centred * lax.rsqrt(variance + 1e-5) * p[f"{key}.g"] + p[f"{key}.b"]


def max_pool(h: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """The greatest of each window."""
    sides = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return lax.reduce_window(h, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), sides)


def flatten(h: jax.Array) -> jax.Array:
    """Channel by channel, as the weights behind it expect."""
    return h.transpose(0, 3, 1, 2).reshape(len(h), -1)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean of -log softmax at the labels."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def lstm(p: Params, h: jax.Array, key: str) -> jax.Array:
    """The outputs of an LSTM layer, whose inputs `h` are multiplied by Wx already."""

    def cell(
        state: tuple[jax.Array, jax.Array], z: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        out, memory = state
        i, f, g, o = jnp.split(z + out @ p[f"{key}.Wh"], 4, -1)
        memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        out = jax.nn.sigmoid(o) * jnp.tanh(memory)
        return (out, memory), out

    zero = jnp.zeros((h.shape[1], len(p[f"{key}.Wh"])))
    return lax.scan(cell, (zero, zero), h + p[f"{key}.b"])[1]


def logreg(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Softmax regression."""
    return cross_entropy(dense(p, x, "fc"), y)


def mlp(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Two hidden layers of rectifiers."""
    h = relu(dense(p, relu(dense(p, x, "fc1")), "fc2"))
    return cross_entropy(dense(p, h, "fc3"), y)


def autoenc(p: Params, x: jax.Array) -> jax.Array:
    """A deep autoencoder with sigmoids and a linear code."""
    h = x
    for number in range(1, 9):
        h = dense(p, h, f"fc{number}")
        h = h if number == 4 else jax.nn.sigmoid(h)
    return jnp.square(h - x).mean()


def traffic(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """A small convolutional net with tanh."""
    h = max_pool(jnp.tanh(conv(p, x, "conv1")), 2, 2)
    h = max_pool(jnp.tanh(conv(p, h, "conv2")), 2, 2)
    return cross_entropy(dense(p, flatten(h), "fc"), y)


def lenet(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """LeNet."""
    h = max_pool(conv(p, x, "conv1"), 2, 2)
    h = max_pool(conv(p, h, "conv2"), 2, 2)
    return cross_entropy(dense(p, relu(dense(p, flatten(h), "fc1")), "fc2"), y)


def inception(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """One Inception module, global average pooling and a classifier."""
    one = relu(conv(p, x, "b1"))
    three = relu(conv(p, relu(conv(p, x, "b3r")), "b3", padding=1))
    five = relu(conv(p, relu(conv(p, x, "b5r")), "b5", padding=2))
    pooled = relu(conv(p, max_pool(x, 3, 1, 1), "bp"))
    return cross_entropy(dense(p, jnp.concatenate([one, three, five, pooled], -1).mean((1, 2)), "fc"), y)


def resnet(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """ResNet-20 for small images: three stages of three residual blocks."""
    h = relu(normed(p, x, "stem"))
    for key in (f"s{stage}b{block}" for stage in range(3) for block in range(3)):
        stride = 2 if f"{key}.p.W" in p else 1
        short = conv(p, h, f"{key}.p", 2) if stride == 2 else h
        inner = relu(normed(p, h, f"{key}.1", stride))
        h = relu(normed(p, inner, f"{key}.2") + short)
    return cross_entropy(dense(p, h.mean((1, 2)), "fc"), y)


def alexnet(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """AlexNet in one tower, without dropout."""
    h = max_pool(relu(conv(p, x, "c1", 4, 2)), 3, 2)
    h = max_pool(relu(conv(p, h, "c2", 1, 2)), 3, 2)
    for key in ("c3", "c4", "c5"):
        h = relu(conv(p, h, key, 1, 1))
    h = flatten(max_pool(h, 3, 2))
    return cross_entropy(dense(p, relu(dense(p, relu(dense(p, h, "fc6")), "fc7")), "fc8"), y)


def charrnn(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Two layers of LSTM over characters; x, y: [time, batch]. One-hot times a matrix is a look-up."""
    h = lstm(p, p["l1.Wx"][x], "l1")
    h = lstm(p, h @ p["l2.Wx"], "l2")
    return cross_entropy(dense(p, h.reshape(-1, h.shape[-1]), "fc"), y.reshape(-1))


NETS: dict[str, Callable[..., jax.Array]] = {
    net.__name__: net for net in (logreg, mlp, autoenc, traffic, lenet, inception, resnet, alexnet, charrnn)
}


def updated(work: Workload, p: Params, slots: Params, gradients: Params) -> tuple[Params, Params]:
    """Parameters and the optimizer's slots after a step."""
    if work.optimizer == "rmsprop":
        slots = {key: 0.95 * slots[key] + 0.05 * jnp.square(g) for key, g in gradients.items()}
        moved = {key: g / (jnp.sqrt(slots[key]) + 1e-8) for key, g in gradients.items()}
    elif work.optimizer == "sgd":
        moved = gradients
    else:
        slots = {key: 0.9 * slots[key] + g for key, g in gradients.items()}
        ahead = {key: g + 0.9 * slots[key] for key, g in gradients.items()}
        moved = ahead if work.optimizer == "nesterov" else slots
    return {key: p[key] - work.rate * moved[key] for key in p}, slots


class Engine:
    """A training step as one jitted function."""

    def __init__(
        self,
        work: Workload,
        initial: Arrays,
        batches: list[Arrays],
        threads: int,
        mode: str,
        precision: str = "",
    ) -> None:
        """precision: how products are computed: "fp32", "tf32", or "" for JAX's default."""
        self.precision = {"": None, "fp32": "highest", "tf32": "tensorfloat32"}[precision]
        self.params = {key: self._array(value, (2, 3, 1, 0)) for key, value in initial.items()}
        self.slots = {key: jnp.zeros_like(value) for key, value in self.params.items()}
        self.batches = [
            {key: self._array(value, (0, 2, 3, 1)) for key, value in batch.items()} for batch in batches
        ]

        def step(p: Params, slots: Params, batch: Params) -> tuple[Params, Params, jax.Array]:
            with jax.default_matmul_precision(self.precision):
                loss, gradients = jax.value_and_grad(NETS[work.name])(p, **batch)
            return *updated(work, p, slots, gradients), loss

        self.jitted = jax.jit(step, donate_argnums=(0, 1))

    @staticmethod
    def _array(value: Any, axes: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(value.transpose(axes) if value.ndim == 4 else value)

    def step(self, index: int) -> jax.Array:
        """Runs a training step; its loss."""
        self.params, self.slots, loss = self.jitted(self.params, self.slots, self.batches[index % 2])
        return loss

    def read_loss(self, loss: jax.Array) -> float:
        """The loss as a number."""
        return float(loss)

    def read_norms(self) -> dict[str, float]:
        """The norm of each parameter, by its name in the workload."""
        return {key: float(jnp.linalg.norm(value.ravel())) for key, value in self.params.items()}
