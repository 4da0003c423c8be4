"""Whole training steps built on the bare graph, for tests of the stages."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.plan.dims import DimLike, symbol
from graphflow.compiler.plan.dtypes import F32, I64


class Net:
    """A builder with parameters, layers, a loss and an optimizer in a few lines each."""

    def __init__(self, batch: DimLike | None = None):
        self.b, self.n = Builder(), symbol("N") if batch is None else batch
        self.inputs: list[Value] = []
        self.parameters: dict[str, Value] = {}
        self.effects: list[Node] = []

    def input(self, name: str, shape: Sequence[DimLike], dtype=F32) -> Value:
        self.inputs.append(self.b.input(name=name, dtype=dtype, shape=(self.n, *shape)))
        return self.inputs[-1]

    def parameter(self, name: str, shape: Sequence[int], role: str = "parameter") -> Value:
        value = self.b.state(name=name, role=role, dtype=F32, shape=tuple(shape))
        if role == "parameter":
            self.parameters[name] = value
        return value

    def dense(self, h: Value, name: str, units: int) -> Value:
        w = self.parameter(f"{name}.W", (int(h.shape[1]), units))
        z = self.b.matmul(h, w)
        return self.b.add(z, self.b.broadcast(self.parameter(f"{name}.b", (units,)), z.shape))

    def conv(self, h: Value, name: str, channels: int, window: int) -> Value:
        w = self.parameter(f"{name}.W", (channels, int(h.shape[1]), window, window))
        z = self.b.conv(h, w)
        bias = self.b.reshape(self.parameter(f"{name}.b", (channels,)), shape=(1, channels, 1, 1))
        return self.b.add(z, self.b.broadcast(bias, z.shape))

    def pool(self, h: Value) -> Value:
        return self.b.max_pool(h, window=(2, 2), stride=(2, 2))[0]

    def cross_entropy(self, z: Value, y: Value) -> Value:
        b, column = self.b, (self.n, 1)
        top = b.stop_gradient(b.reduce_max(z, axes=(1,)))
        shifted = b.sub(z, b.broadcast(b.reshape(top, shape=column), z.shape))
        log_sum = b.add(b.log(b.reduce_sum(b.exp(shifted), axes=(1,))), top)
        hit = b.eq(b.broadcast(b.reshape(y, shape=column), z.shape), b.iota(shape=z.shape, axis=1, dtype=I64))
        picked = b.reduce_sum(b.where(hit, z, b.zeros(z.type)), axes=(1,))
        return b.mul(b.reduce_sum(b.sub(log_sum, picked), axes=(0,)), 1 / 8)

    def momentum(self, loss: Value, rate: float = 0.1, momentum: float = 0.9) -> None:
        b = self.b
        gradients = b.node("grad", (loss, *self.parameters.values())).results
        for (name, w), g in zip(list(self.parameters.items()), gradients):
            slot = self.parameter(f"{name}.momentum", w.shape, "slot")
            velocity = b.add(b.mul(slot, momentum), g)
            self.effects.append(b.update(velocity, name=f"{name}.momentum").node)
            self.effects.append(b.update(b.sub(w, b.mul(velocity, rate)), name=name).node)

    def graph(self, name: str = "step", **outputs: Value) -> Graph:
        return Graph(name, tuple(self.inputs), outputs, tuple(self.effects))


def mlp_step(batch: DimLike | None = None) -> Graph:
    """20 inputs, 33 rectifiers, 10 classes; cross-entropy; momentum."""
    net = Net(batch)
    x, y = net.input("x", (20,)), net.input("y", (), I64)
    loss = net.cross_entropy(net.dense(net.b.relu(net.dense(x, "fc1", 33)), "fc2", 10), y)
    net.momentum(loss)
    return net.graph(loss=loss)


def lenet_step(batch: DimLike | None = None) -> Graph:
    """LeNet on 28x28 images with momentum."""
    net = Net(batch)
    x, y = net.input("x", (1, 28, 28)), net.input("y", (), I64)
    h = net.pool(net.conv(net.pool(net.conv(x, "conv1", 20, 5)), "conv2", 50, 5))
    h = net.b.reshape(h, shape=(net.n, 800))
    loss = net.cross_entropy(net.dense(net.b.relu(net.dense(h, "fc1", 500)), "fc2", 10), y)
    net.momentum(loss, rate=0.01)
    return net.graph(loss=loss)


def values_for(graph: Graph, n: int, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(feeds with n rows, state) of a graph, random."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else n for d in v.shape]
        floats = rng.standard_normal(shape).astype(np.float32)
        feeds[v.node.attrs["name"]] = floats if v.dtype.is_float else rng.integers(0, 10, shape)
    state = {name: (0.1 * rng.standard_normal(leaf.types[0].shape)).astype(np.float32)
             for name, leaf in graph.states().items()}
    return feeds, state
