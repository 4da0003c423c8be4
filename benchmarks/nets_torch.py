"""The nine training steps in PyTorch: eager, with images in channels-last order ("cl"), compiled, or on a GPU
as captured graphs.

Dense weights are [in, out] as everywhere here, so that a layer is one addmm; the optimizers are the fused
ones where PyTorch has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from workloads import Arrays, Workload


class Net:
    """A workload's parameters, and layers on them."""

    def __init__(self, initial: Arrays, mode: str, device: str = "cpu") -> None:
        self.mode, self.device = mode, device
        self.lstms: dict[str, torch.nn.LSTM] = {}
        self.values: dict[str, torch.Tensor] = {}
        for key, value in initial.items():
            if key.endswith(".Wx"):
                layer = key.removesuffix(".Wx")
                self.lstms[layer] = self._lstm(*(initial[f"{layer}.{part}"] for part in ("Wx", "Wh", "b")))
            elif key.rpartition(".")[0] not in self.lstms:
                self.values[key] = self.tensor(value).requires_grad_()

    def tensor(self, array: Any) -> torch.Tensor:
        """The array as a tensor of its own; images and filters in the mode's order."""
        made = torch.tensor(array, device=self.device)
        return (
            made.contiguous(memory_format=torch.channels_last)
            if self.mode == "cl" and made.ndim == 4
            else made
        )

    def _lstm(self, weight: Any, recurrent: Any, bias: Any) -> torch.nn.LSTM:
        """PyTorch's own layer; of its two biases one stays zero."""
        lstm = torch.nn.LSTM(weight.shape[0], recurrent.shape[0], device=self.device)
        with torch.no_grad():
            lstm.weight_ih_l0.copy_(torch.tensor(weight).T)
            lstm.weight_hh_l0.copy_(torch.tensor(recurrent).T)
            lstm.bias_ih_l0.copy_(torch.tensor(bias))
            lstm.bias_hh_l0.zero_()
        lstm.bias_hh_l0.requires_grad_(False)
        return lstm

    def trained(self) -> dict[str, torch.Tensor]:
        """What the optimizer updates, by the workload's names; the weights of an LSTM are transposed."""
        parts = {"Wx": "weight_ih_l0", "Wh": "weight_hh_l0", "b": "bias_ih_l0"}
        inner = {
            f"{layer}.{part}": getattr(lstm, name)
            for layer, lstm in self.lstms.items()
            for part, name in parts.items()
        }
        return {**self.values, **inner}

    def dense(self, h: torch.Tensor, key: str) -> torch.Tensor:
        """A dense layer."""
        return torch.addmm(self.values[f"{key}.b"], h, self.values[f"{key}.W"])

    def conv(self, h: torch.Tensor, key: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        """A convolution; without a bias if it has none."""
        return F.conv2d(h, self.values[f"{key}.W"], self.values.get(f"{key}.b"), stride, padding)

    def normed(self, h: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
        """A 3x3 convolution without bias, and batch norm by the batch's statistics."""
        h = F.conv2d(h, self.values[f"{key}.W"], None, stride, 1)
        return F.batch_norm(h, None, None, self.values[f"{key}.g"], self.values[f"{key}.b"], training=True)


def logreg(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Softmax regression."""
    return F.cross_entropy(net.dense(x, "fc"), y)


def mlp(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two hidden layers of rectifiers."""
    h = F.relu(net.dense(F.relu(net.dense(x, "fc1")), "fc2"))
    return F.cross_entropy(net.dense(h, "fc3"), y)


def autoenc(net: Net, x: torch.Tensor) -> torch.Tensor:
    """A deep autoencoder with sigmoids and a linear code."""
    h = x
    for number in range(1, 9):
        h = net.dense(h, f"fc{number}")
        h = h if number == 4 else torch.sigmoid(h)
    return F.mse_loss(h, x)


def traffic(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A small convolutional net with tanh."""
    h = F.max_pool2d(torch.tanh(net.conv(x, "conv1")), 2)
    h = F.max_pool2d(torch.tanh(net.conv(h, "conv2")), 2)
    return F.cross_entropy(net.dense(h.flatten(1), "fc"), y)


def lenet(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """LeNet."""
    h = F.max_pool2d(net.conv(x, "conv1"), 2)
    h = F.max_pool2d(net.conv(h, "conv2"), 2)
    return F.cross_entropy(net.dense(F.relu(net.dense(h.flatten(1), "fc1")), "fc2"), y)


def inception(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One Inception module, global average pooling and a classifier."""
    one = F.relu(net.conv(x, "b1"))
    three = F.relu(net.conv(F.relu(net.conv(x, "b3r")), "b3", padding=1))
    five = F.relu(net.conv(F.relu(net.conv(x, "b5r")), "b5", padding=2))
    pooled = F.relu(net.conv(F.max_pool2d(x, 3, 1, 1), "bp"))
    return F.cross_entropy(net.dense(torch.cat([one, three, five, pooled], 1).mean((2, 3)), "fc"), y)


def resnet(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """ResNet-20 for small images: three stages of three residual blocks."""
    h = F.relu(net.normed(x, "stem"))
    for key in (f"s{stage}b{block}" for stage in range(3) for block in range(3)):
        stride = 2 if f"{key}.p.W" in net.values else 1
        short = net.conv(h, f"{key}.p", 2) if stride == 2 else h
        inner = F.relu(net.normed(h, f"{key}.1", stride))
        h = F.relu(net.normed(inner, f"{key}.2") + short)
    return F.cross_entropy(net.dense(h.mean((2, 3)), "fc"), y)


def alexnet(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """AlexNet in one tower, without dropout."""
    h = F.max_pool2d(F.relu(net.conv(x, "c1", 4, 2)), 3, 2)
    h = F.max_pool2d(F.relu(net.conv(h, "c2", 1, 2)), 3, 2)
    for key in ("c3", "c4", "c5"):
        h = F.relu(net.conv(h, key, 1, 1))
    h = F.max_pool2d(h, 3, 2).flatten(1)
    return F.cross_entropy(net.dense(F.relu(net.dense(F.relu(net.dense(h, "fc6")), "fc7")), "fc8"), y)


def charrnn(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two layers of LSTM over characters; x, y: [time, batch]."""
    h = F.one_hot(x, net.lstms["l1"].input_size).float()
    for layer in ("l1", "l2"):
        h, _ = net.lstms[layer](h)
    return F.cross_entropy(net.dense(h.flatten(0, 1), "fc"), y.flatten())


NETS: dict[str, Callable[..., torch.Tensor]] = {
    net.__name__: net for net in (logreg, mlp, autoenc, traffic, lenet, inception, resnet, alexnet, charrnn)
}


class Engine:
    """A training step; mode: "eager", "cl", "compile", or "graphs" on a GPU. Precision, how products are
    computed: "fp32"; "tf32", in float32 with rounded factors; "bf16", with operands of bfloat16."""

    def __init__(
        self,
        work: Workload,
        initial: Arrays,
        batches: list[Arrays],
        threads: int,
        mode: str,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        torch.set_num_threads(threads)
        self.device, self.precision = device, precision
        self.net = Net(initial, mode, device)
        self.batches = [{key: self.net.tensor(value) for key, value in batch.items()} for batch in batches]
        net = NETS[work.name]
        self.loss = torch.compile(net) if mode == "compile" else net
        values = list(self.net.trained().values())
        if work.optimizer == "rmsprop":
            self.optimizer: torch.optim.Optimizer = torch.optim.RMSprop(
                values, work.rate, 0.95, 1e-8, capturable=device == "cuda"
            )
        else:
            momentum = 0.0 if work.optimizer == "sgd" else 0.9
            self.optimizer = torch.optim.SGD(
                values, work.rate, momentum, nesterov=work.optimizer == "nesterov", fused=True
            )
        self.graphs = self._captured() if mode == "graphs" else []

    def prepare(self) -> None:
        """To be called before the first step and after steps of another engine in this process."""
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"

    def step(self, index: int) -> torch.Tensor:
        """Runs a training step; its loss."""
        if self.graphs:
            graph, loss = self.graphs[index % 2]
            graph.replay()
            return loss
        return self._step(index)

    def _step(self, index: int) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(self.net, **self.batches[index % 2])
        loss.backward()
        self.optimizer.step()
        return loss

    def _captured(self) -> list[tuple[torch.cuda.CUDAGraph, torch.Tensor]]:
        """The whole step as a graph for each batch; what warming up has changed is put back."""
        self.prepare()
        values = list(self.net.trained().values())
        kept = [value.detach().clone() for value in values]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(3):
                self._step(index)
        torch.cuda.current_stream().wait_stream(stream)
        graphs = []
        for index in (0, 1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._step(index)
            graphs.append((graph, loss))
        with torch.no_grad():
            for value, old in zip(values, kept):
                value.copy_(old)
            for slots in self.optimizer.state.values():
                for slot in slots.values():
                    if isinstance(slot, torch.Tensor):
                        slot.zero_()
        return graphs

    def read_loss(self, loss: torch.Tensor) -> float:
        """The loss as a number."""
        return loss.item()

    def read_norms(self) -> dict[str, float]:
        """The norm of each parameter, by its name in the workload."""
        return {key: value.detach().norm().item() for key, value in self.net.trained().items()}
