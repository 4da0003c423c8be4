"""The nine training steps in graphflow.

The nets are written as a user writes them; the batch is a symbolic dimension, and a step is one call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from workloads import Arrays, Workload

import graphflow as gf


class Net:
    """Layers that take their names, sizes and initial values from a workload's parameters."""

    def __init__(self, initial: Arrays) -> None:
        self.initial = initial
        self.shapes = {key: value.shape for key, value in initial.items()}

    def value(self, key: str) -> Callable[..., np.ndarray]:
        """An initialiser that gives the value away, so that it is not kept beside the Store's."""
        return lambda *_: self.initial.pop(key)

    def dense(self, h: gf.Tensor, key: str, activation: Any = None) -> gf.Tensor:
        """A dense layer."""
        weight, bias = self.value(f"{key}.W"), self.value(f"{key}.b")
        units = self.shapes[f"{key}.W"][1]
        return gf.nn.dense(h, units, activation, weight_init=weight, bias_init=bias, name=key)

    def conv(
        self, h: gf.Tensor, key: str, activation: Any = None, stride: int = 1, padding: int = 0
    ) -> gf.Tensor:
        """A convolution; without a bias if it has none."""
        channels, _, *window = self.shapes[f"{key}.W"]
        return gf.nn.conv2d(
            h,
            channels,
            window,
            stride,
            padding,
            activation,
            weight_init=self.value(f"{key}.W"),
            bias_init=self.value(f"{key}.b"),
            use_bias=f"{key}.b" in self.shapes,
            name=layer_name(key),
        )

    def normed(self, h: gf.Tensor, key: str, stride: int = 1) -> gf.Tensor:
        """A 3x3 convolution without bias, and batch norm."""
        channels, weight, name = self.shapes[f"{key}.W"][0], self.value(f"{key}.W"), layer_name(key)
        h = gf.nn.conv2d(h, channels, 3, stride, 1, use_bias=False, weight_init=weight, name=name)
        scale, bias = self.value(f"{key}.g"), self.value(f"{key}.b")
        return gf.nn.batch_norm(h, scale_init=scale, bias_init=bias, name=name)

    def lstm(self, h: gf.Tensor, key: str) -> gf.Tensor:
        """The outputs of an LSTM layer."""
        weight, recurrent, bias = (self.value(f"{key}.{part}") for part in ("Wx", "Wh", "b"))
        units = self.shapes[f"{key}.Wh"][0]
        return gf.nn.lstm(h, units, weight_init=weight, recurrent_init=recurrent, bias_init=bias, name=key)[0]


def layer_name(key: str) -> str:
    """The name of a layer in the Store: parts of names are words there, not numbers."""
    return re.sub(r"\.(\d)", r".n\1", key)


def stored_as(key: str) -> str:
    """The name of a workload's parameter in the Store: batch norm's g is called scale."""
    return re.sub(r"\.g$", ".scale", layer_name(key))


def logreg(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """Softmax regression."""
    return gf.loss.softmax_cross_entropy(net.dense(x, "fc"), y)


def mlp(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """Two hidden layers of rectifiers."""
    h = net.dense(net.dense(x, "fc1", gf.relu), "fc2", gf.relu)
    return gf.loss.softmax_cross_entropy(net.dense(h, "fc3"), y)


def autoenc(net: Net, x: gf.Tensor) -> gf.Tensor:
    """A deep autoencoder with sigmoids and a linear code."""
    h = x
    for number in range(1, 9):
        h = net.dense(h, f"fc{number}", None if number == 4 else gf.nn.sigmoid)
    return gf.loss.mean_squared_error(h, x)


def traffic(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """A small convolutional net with tanh."""
    h = gf.nn.max_pool2d(net.conv(x, "conv1", gf.nn.tanh), 2)
    h = gf.nn.max_pool2d(net.conv(h, "conv2", gf.nn.tanh), 2)
    return gf.loss.softmax_cross_entropy(net.dense(gf.nn.flatten(h), "fc"), y)


def lenet(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """LeNet."""
    h = gf.nn.max_pool2d(net.conv(x, "conv1"), 2)
    h = gf.nn.max_pool2d(net.conv(h, "conv2"), 2)
    h = net.dense(gf.nn.flatten(h), "fc1", gf.relu)
    return gf.loss.softmax_cross_entropy(net.dense(h, "fc2"), y)


def inception(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """One Inception module, global average pooling and a classifier."""
    relu = gf.relu
    three = net.conv(net.conv(x, "b3r", relu), "b3", relu, padding=1)
    five = net.conv(net.conv(x, "b5r", relu), "b5", relu, padding=2)
    pooled = net.conv(gf.nn.max_pool2d(x, 3, 1, padding=1), "bp", relu)
    h = gf.concatenate([net.conv(x, "b1", relu), three, five, pooled], 1)
    return gf.loss.softmax_cross_entropy(net.dense(gf.nn.global_avg_pool(h), "fc"), y)


def resnet(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """ResNet-20 for small images: three stages of three residual blocks."""
    h = gf.relu(net.normed(x, "stem"))
    for key in (f"s{stage}b{block}" for stage in range(3) for block in range(3)):
        stride = 2 if f"{key}.p.W" in net.shapes else 1
        short = net.conv(h, f"{key}.p", stride=2) if stride == 2 else h
        inner = gf.relu(net.normed(h, f"{key}.1", stride))
        h = gf.relu(net.normed(inner, f"{key}.2") + short)
    return gf.loss.softmax_cross_entropy(net.dense(gf.nn.global_avg_pool(h), "fc"), y)


def alexnet(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """AlexNet in one tower, without dropout."""
    h = gf.nn.max_pool2d(net.conv(x, "c1", gf.relu, 4, 2), 3, 2)
    h = gf.nn.max_pool2d(net.conv(h, "c2", gf.relu, 1, 2), 3, 2)
    for key in ("c3", "c4", "c5"):
        h = net.conv(h, key, gf.relu, 1, 1)
    h = gf.nn.flatten(gf.nn.max_pool2d(h, 3, 2))
    h = net.dense(net.dense(h, "fc6", gf.relu), "fc7", gf.relu)
    return gf.loss.softmax_cross_entropy(net.dense(h, "fc8"), y)


def charrnn(net: Net, x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """Two layers of LSTM over characters; x, y: [time, batch]."""
    h = net.lstm(net.lstm(gf.one_hot(x, net.shapes["l1.Wx"][0]), "l1"), "l2")
    return gf.loss.softmax_cross_entropy(net.dense(h, "fc"), y)


NETS: dict[str, Callable[..., gf.Tensor]] = {
    net.__name__: net for net in (logreg, mlp, autoenc, traffic, lenet, inception, resnet, alexnet, charrnn)
}


def optimizer(work: Workload) -> gf.optim.Optimizer:
    """The workload's optimizer."""
    if work.optimizer == "rmsprop":
        return gf.optim.RMSprop(work.rate, decay=0.95, eps=1e-8)
    momentum = 0.0 if work.optimizer == "sgd" else 0.9
    return gf.optim.SGD(work.rate, momentum=momentum, nesterov=work.optimizer == "nesterov")


def training_step(
    work: Workload, initial: Arrays, data: Arrays, threads: int, device: str = "cpu", half: str = ""
) -> gf.Program:
    """The workload's step, for any batch size; `initial` is emptied, `data` a batch like those that it will
    get. half: products and convolutions take operands of that type, such as "bfloat16"."""
    batch_axis = 1 if work.steps else 0
    feeds = []
    for key, array in data.items():
        shape: list[Any] = list(array.shape)
        shape[batch_axis] = gf.dim("N")
        feeds.append(gf.input(key, shape, str(array.dtype)))
    with gf.autocast(half or "bfloat16", enabled=bool(half)):
        loss = NETS[work.name](Net(initial), *feeds)
    return gf.function(
        feeds, loss, optimizer(work).minimize(loss), name=work.name, threads=threads, device=device
    )


def residual_net(depths: tuple[int, ...], threads: int | None = None) -> gf.Program:
    """The training step of a residual net with bottlenecks on 3×224×224 images, 1000 classes: (3, 8, 36, 3)
    has 152 layers (He et al. 2015, Deep residual learning for image recognition)."""

    def normed(h: gf.Tensor, channels: int, window: int, stride: int = 1) -> gf.Tensor:
        h = gf.nn.conv2d(h, channels, window, stride, window // 2, use_bias=False)
        return gf.nn.batch_norm(h)

    def block(h: gf.Tensor, channels: int, stride: int) -> gf.Tensor:
        same = h.shape[1] == 4 * channels
        short = h if same else normed(h, 4 * channels, 1, stride)
        inner = gf.relu(normed(gf.relu(normed(h, channels, 1)), channels, 3, stride))
        return gf.relu(normed(inner, 4 * channels, 1) + short)

    rows = gf.dim("N")
    x, y = gf.input("x", (rows, 3, 224, 224)), gf.input("y", (rows,), "int64")
    h = gf.nn.max_pool2d(gf.relu(normed(x, 64, 7, 2)), 3, 2, padding=1)
    for stage, depth in enumerate(depths):
        for number in range(depth):
            h = block(h, 64 << stage, 2 if stage and not number else 1)
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(gf.nn.global_avg_pool(h), 1000), y)
    updates = gf.optim.SGD(0.1, momentum=0.9).minimize(loss)
    return gf.function([x, y], loss, updates, name="residual", threads=threads)


class Engine:
    """A step that is built and compiled when it first runs; `initial` is emptied then."""

    def __init__(
        self,
        work: Workload,
        initial: Arrays,
        batches: list[Arrays],
        threads: int,
        mode: str = "",
        device: str = "cpu",
        half: str = "",
    ) -> None:
        self.work, self.batches, self.threads, self.device, self.half = work, batches, threads, device, half
        self.initial, self.keys = initial, list(initial)
        self.program: gf.Program | None = None

    def step(self, index: int) -> Any:
        """Runs a training step; its loss."""
        if self.program is None:
            self.program = training_step(
                self.work, self.initial, self.batches[0], self.threads, self.device, self.half
            )
        return self.program(**self.batches[index % 2])

    def read_loss(self, loss: Any) -> float:
        """The loss as a number."""
        return float(loss)

    def read_norms(self) -> dict[str, float]:
        """The norm of each parameter, by its name in the workload."""
        assert self.program is not None
        return {key: float(np.linalg.norm(self.program.store.view(stored_as(key)))) for key in self.keys}
