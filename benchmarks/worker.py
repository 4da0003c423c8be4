"""Times graphflow on one workload: worker.py WORKLOAD THREADS

It speaks the protocol of the referee that compares engines (modules `workloads` and `protocol`, which the
referee puts on the path): the same shapes, initial values and data as every other engine. The nets are
written as a user writes them, the batch is a symbolic dimension, and every step is one call with its arrays.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np

try:
    import protocol  # type: ignore[import-not-found]
    import workloads  # type: ignore[import-not-found]
except ImportError:
    sys.exit(
        "benchmarks/worker.py: no modules 'workloads' and 'protocol' on the path: the referee that compares "
        "engines brings them; benchmarks/bench.py starts it"
    )

import graphflow as gf

NESTEROV = ("autoenc",)
PLAIN = ("logreg", "traffic")
"""Workloads without momentum; the others have 0.9."""


def logreg(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """Softmax regression."""
    return gf.loss.softmax_cross_entropy(gf.nn.dense(x, 10, name="fc"), y)


def mlp(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """Two hidden layers of 512 rectifiers."""
    h = gf.nn.dense(x, 512, gf.relu, name="fc1")
    h = gf.nn.dense(h, 512, gf.relu, name="fc2")
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h, 10, name="fc3"), y)


def autoenc(x: gf.Tensor) -> gf.Tensor:
    """A deep autoencoder with sigmoids and a linear code."""
    h = x
    for number, units in enumerate(workloads.AUTOENC[1:], 1):
        h = gf.nn.dense(h, units, None if number == 4 else gf.nn.sigmoid, name=f"fc{number}")
    return gf.loss.mean_squared_error(h, x)


def traffic(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """A small convolutional net with tanh."""
    h = gf.nn.max_pool2d(gf.nn.conv2d(x, 4, 5, activation=gf.nn.tanh, name="conv1"), 2)
    h = gf.nn.max_pool2d(gf.nn.conv2d(h, 10, 5, activation=gf.nn.tanh, name="conv2"), 2)
    return gf.loss.softmax_cross_entropy(gf.nn.dense(gf.nn.flatten(h), 43, name="fc"), y)


def lenet(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """LeNet."""
    h = gf.nn.max_pool2d(gf.nn.conv2d(x, 20, 5, name="conv1"), 2)
    h = gf.nn.max_pool2d(gf.nn.conv2d(h, 50, 5, name="conv2"), 2)
    h = gf.nn.dense(gf.nn.flatten(h), 500, gf.relu, name="fc1")
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h, 10, name="fc2"), y)


def inception(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """One GoogLeNet module, global average pooling and a classifier."""
    def conv(h: gf.Tensor, channels: int, window: int, name: str) -> gf.Tensor:
        return gf.nn.conv2d(h, channels, window, padding=window // 2, activation=gf.relu, name=name)

    h = gf.concatenate([conv(x, 64, 1, "b1"), conv(conv(x, 96, 1, "b3r"), 128, 3, "b3"),
                        conv(conv(x, 16, 1, "b5r"), 32, 5, "b5"),
                        conv(gf.nn.max_pool2d(x, 3, 1, padding=1), 32, 1, "bp")], 1)
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h.mean((2, 3)), 10, name="fc"), y)


def alexnet(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """AlexNet in one tower, without dropout."""
    def conv(h: gf.Tensor, channels: int, window: int, name: str, stride: int = 1) -> gf.Tensor:
        return gf.nn.conv2d(h, channels, window, stride, 2 if window > 3 else 1, gf.relu, name=name)

    h = gf.nn.max_pool2d(conv(x, 64, 11, "c1", 4), 3, 2)
    h = gf.nn.max_pool2d(conv(h, 192, 5, "c2"), 3, 2)
    h = conv(conv(conv(h, 384, 3, "c3"), 256, 3, "c4"), 256, 3, "c5")
    h = gf.nn.flatten(gf.nn.max_pool2d(h, 3, 2))
    h = gf.nn.dense(gf.nn.dense(h, 4096, gf.relu, name="fc6"), 4096, gf.relu, name="fc7")
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h, 1000, name="fc8"), y)


def resnet(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """ResNet-20 for small images: three stages of three residual blocks."""
    def conv(h: gf.Tensor, channels: int, window: int, stride: int, name: str) -> gf.Tensor:
        return gf.nn.conv2d(h, channels, window, stride, window // 2, use_bias=False, name=name)

    def normalised(h: gf.Tensor, channels: int, stride: int, name: str) -> gf.Tensor:
        return gf.nn.batch_norm(conv(h, channels, 3, stride, name), name=name)

    h, width = gf.relu(normalised(x, 16, 1, "stem")), 16
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            name, stride = f"s{stage}b{block}", 1 if width == channels else 2
            short = h if stride == 1 else conv(h, channels, 1, stride, f"{name}.p")
            inner = gf.relu(normalised(h, channels, stride, f"{name}.n1"))
            h, width = gf.relu(normalised(inner, channels, 1, f"{name}.n2") + short), channels
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h.mean((2, 3)), 10, name="fc"), y)


def charrnn(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    """Two layers of LSTM over characters."""
    h = gf.one_hot(x, workloads.VOCAB)
    for name in ("l1", "l2"):
        h, _ = gf.nn.lstm(h, workloads.HIDDEN, name=name)
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h, workloads.VOCAB, name="fc"), y)


def stored_as(key: str) -> str:
    """The Store's name of what the workload calls `key`: parts of names are words, and a batch norm's g is
    its scale."""
    return re.sub(r"\.([0-9])\.", r".n\1.", key).removesuffix(".g") + ".scale" * key.endswith(".g")


NETS = {f.__name__: f for f in (logreg, mlp, autoenc, traffic, lenet, inception, alexnet,
                               resnet, charrnn)}


Arrays = dict[str, np.ndarray]


def training_step(name: str, data: Arrays, threads: int) -> gf.Program:
    """The workload's step, for any number of rows; `data` is a batch like those that it will get."""
    rows = gf.dim("N")
    feeds = [gf.input(key, (rows, *array.shape[1:]), str(array.dtype)) for key, array in data.items()]
    if name == "charrnn":                                  # [time, batch]: the batch is the second axis
        feeds = [gf.input(key, (len(array), rows), str(array.dtype)) for key, array in data.items()]
    loss = NETS[name](*feeds)
    if name == "charrnn":
        optimizer: gf.optim.Optimizer = gf.optim.RMSprop(workloads.LEARNING_RATE[name], decay=0.95)
        return gf.function(feeds, loss, optimizer.minimize(loss), name=name, threads=threads)
    momentum = 0.0 if name in PLAIN else 0.9
    optimizer = gf.optim.SGD(workloads.LEARNING_RATE[name], momentum=momentum, nesterov=name in NESTEROV)
    return gf.function(feeds, loss, optimizer.minimize(loss), name=name, threads=threads)


def try_another_batch(step: gf.Program, data: Arrays) -> None:
    """Runs one step on a row less and puts the Store back: a new size needs no new compile."""
    runner, before = step.runner, {key: step.store[key] for key in step.store}
    loss = step(**{key: array[:, :-1] if step.name == "charrnn" else array[:-1] for key, array in data.items()})
    if not np.isfinite(loss) or step.runner is not runner:
        sys.exit(f"benchmarks/worker.py: {step.name} on a smaller batch gave {loss}, or compiled anew")
    for key, value in before.items():
        step.store[key] = value


def main() -> None:
    """Serves the protocol for the workload named on the command line."""
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        sys.exit(__doc__)
    name, threads = sys.argv[1], int(sys.argv[2])
    if name not in NETS:
        what = "not yet" if name in workloads.NAMES else "no workload that is"
        print(f"benchmarks/worker.py: {name} is {what} built on graphflow; there are {', '.join(NETS)}",
              file=sys.stderr)
        sys.exit(2)
    batches, initial = [workloads.batch(name, i) for i in (0, 1)], workloads.params(name)
    made: list[gf.Program] = []

    def step(index: int) -> Any:
        if not made:  # compiling belongs to the first step
            made.append(training_step(name, batches[0], threads))
            for key, value in initial.items():
                made[0].store[stored_as(key)] = value
            try_another_batch(made[0], batches[0])
        return made[0](**batches[index % 2])

    def read_norms() -> dict[str, float]:
        return {key: float(np.linalg.norm(made[0].store[stored_as(key)])) for key in initial}

    protocol.serve(step, float, read_norms)


if __name__ == "__main__":
    main()
