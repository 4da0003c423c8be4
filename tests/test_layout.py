"""The layouts of buffers: which images are kept channels-last, and that results do not depend on it."""
from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

import graphflow as gf
from graphflow.compiler.driver import Compilation
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.target import host_target, make_target

AVX2 = make_target("x86_64-unknown-linux-gnu", "haswell", {"avx2": True, "fma": True},
                   {1: 1 << 15, 2: 1 << 18, 3: 1 << 23})


class Net:
    """A net over feeds: weights are feeds too, so that every device has the same."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.feeds: list[gf.Tensor] = []
        self.arrays: list[np.ndarray] = []

    def feed(self, shape: tuple, array_shape: tuple | None = None, scale: float = 1.0) -> gf.Tensor:
        t = gf.input(f"f{len(self.feeds)}", shape)
        self.feeds.append(t)
        self.arrays.append((scale * self.rng.standard_normal(array_shape or shape)).astype(np.float32))
        return t

    def images(self, batch: int, *shape: int) -> gf.Tensor:
        return self.feed((gf.dim("N"), *shape), (batch, *shape))

    def conv(self, x: gf.Tensor, channels: int, kernel: int = 3, stride: int = 1, padding: int | None = None,
             groups: int = 1) -> gf.Tensor:
        per_group = int(x.shape[1]) // groups
        w = self.feed((channels, per_group, kernel, kernel), scale=(per_group * kernel * kernel) ** -0.5)
        padding = kernel // 2 if padding is None else padding
        return gf.conv(x, w, stride=stride, padding=padding, groups=groups)

    def bias(self, x: gf.Tensor) -> gf.Tensor:
        return x + gf.reshape(self.feed((int(x.shape[1]),)), (1, int(x.shape[1]), 1, 1))

    def norm(self, x: gf.Tensor) -> gf.Tensor:
        mean = gf.mean(x, (0, 2, 3), keepdims=True)
        variance = gf.mean((x - mean) ** 2, (0, 2, 3), keepdims=True)
        return self.bias((x - mean) * gf.rsqrt(variance + 1e-3))

    def program(self, loss: gf.Tensor, *more: gf.Tensor, device: str = "cpu", threads: int | None = None
                ) -> gf.Program:
        outputs = [loss, *gf.grad(loss, self.feeds), *more]
        return gf.function(self.feeds, outputs, device=device, threads=threads)


def plain(net: Net) -> gf.Tensor:
    h = gf.relu(net.bias(net.conv(net.images(3, 3, 9, 9), 16)))
    return gf.mean(net.conv(h, 32) ** 2)


def residual(net: Net) -> gf.Tensor:
    h = gf.relu(net.norm(net.conv(net.images(2, 3, 8, 10), 16)))
    h = gf.relu(net.norm(net.conv(h, 16)) + h)
    h = gf.relu(net.norm(net.conv(h, 32, stride=2)) + net.conv(h, 32, 1, stride=2))
    return gf.mean(gf.mean(h, (2, 3)) ** 2)


def inception(net: Net) -> gf.Tensor:
    x = gf.relu(net.conv(net.images(2, 5, 7, 7), 32, 1))
    towers = [net.conv(x, 16, 1), net.conv(gf.relu(net.conv(x, 16, 1)), 32), net.conv(x, 16, 5),
              net.conv(gf.nn.max_pool2d(x, 3, stride=1, padding=1), 32, 1)]
    return gf.mean(gf.conv(gf.relu(gf.concatenate(towers, 1)), net.feed((16, 96, 1, 1), scale=0.1)) ** 2)


def pools(net: Net) -> gf.Tensor:
    h = gf.nn.max_pool2d(gf.relu(net.conv(net.images(2, 3, 13, 15), 16, 5, padding=0)), 3, stride=2)
    h = gf.nn.avg_pool2d(gf.tanh(net.conv(h, 32)), 2, stride=2)
    h = gf.reshape(h, (h.shape[0], 32 * 2 * 2))
    return gf.mean(gf.matmul(h, net.feed((128, 10))) ** 2)


def odd_channels(net: Net) -> gf.Tensor:
    h = gf.relu(net.conv(net.images(2, 16, 6, 6), 20))
    return gf.mean(net.conv(gf.relu(net.conv(h, 48)), 21, 1) ** 2)


def grouped(net: Net) -> gf.Tensor:
    h = gf.relu(net.conv(net.images(2, 3, 7, 7), 32))
    h = gf.relu(net.conv(h, 64, groups=2))
    return gf.mean(net.conv(h, 64, groups=64) ** 2)


NETS: dict[str, Callable[[Net], gf.Tensor]] = {f.__name__: f for f in (
    plain, residual, inception, pools, odd_channels, grouped)}


def traced(make: Callable[[Net], gf.Tensor], seed: int = 0) -> tuple[Graph, list[np.ndarray]]:
    net = Net(seed)
    return net.program(make(net)).traced, net.arrays


def close(found: np.ndarray, good: np.ndarray) -> None:
    """Equal but for the order of sums of float32."""
    np.testing.assert_allclose(found, good, rtol=2e-4, atol=2e-5 * max(1.0, float(np.abs(good).max())))


@pytest.mark.cpu
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_those_of_the_reference(name: str, threads: int) -> None:
    net = Net()
    loss = NETS[name](net)
    good = net.program(loss, device="reference")(*net.arrays)
    f = net.program(loss, threads=threads)
    assert "@nhwc" in f.text("schedule")
    for x, y in zip(good, f(*net.arrays)):
        close(y, x)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("target", [host_target(), AVX2], ids=["host", "avx2"])
def test_every_stage_keeps_values_and_text(name: str, target) -> None:
    graph, arrays = traced(NETS[name])
    feeds = {v.node.attrs["name"]: a for v, a in zip(graph.inputs, arrays)}
    good, _ = interpret(Compilation(graph, target).result("autodiff"), feeds, {})
    c = Compilation(graph, target)
    for stage in ("schedule", "lower", "tile", "memory"):
        text = c.text(stage)
        again = Compilation.resume(text, stage, target)
        assert again.text(stage) == text
        result = again.result(stage)
        found = interpret(result, feeds, {})[0] if stage == "schedule" else \
            run_program(result, feeds, {}, {"N": len(arrays[0])})[0]
        for label, x in good.items():
            close(found[label], x)
    assert "@nhwc" in c.text("schedule")
    again = Compilation.resume(c.text("schedule"), "schedule", target)
    for stage in ("lower", "tile", "memory", "plan"):
        assert unnumbered(again.text(stage)) == unnumbered(c.text(stage))


def unnumbered(text: str) -> str:
    """The text without the numbers of source lines, which a program that is read has not."""
    return re.sub(r" #[\d,]+", "", text)


def types_of(text: str, op: str) -> list[str]:
    """The types of the results of the fused nodes that hold that op."""
    found = []
    for part in re.split(r"\n(?=%)", text):
        if re.search(rf"= {op}\(", part):
            head = part.splitlines()[0]
            found += re.findall(r"(\w+\[[^\]]*\](?:@\w+)?)", head.rpartition(" : ")[2])
    return found


def test_what_is_channels_last() -> None:
    """Images around convolutions; not what leaves the program, has few channels or is read as one row."""
    net = Net()
    h = gf.relu(net.conv(net.images(2, 3, 8, 8), 16))
    shown = net.conv(h, 16)
    flat = gf.nn.max_pool2d(gf.relu(net.conv(h, 32)), 2)
    few = net.conv(h, 4)
    f = net.program(gf.mean(gf.matmul(gf.reshape(flat, (h.shape[0], 512)), net.feed((512, 4))) ** 2)
                    + gf.mean(gf.sin(few)) + gf.mean(gf.cos(shown)), shown)
    text = Compilation(f.traced, AVX2).text("schedule")
    assert {"f32[N,16,8,8]", "f32[N,16,8,8]@nhwc", "f32[N,32,8,8]@nhwc"} <= set(types_of(text, "conv"))
    assert "f32[N,4,8,8]" in types_of(text, "conv") and "f32[N,4,8,8]@nhwc" not in text
    assert types_of(text, "max_pool")[0] == "f32[N,32,4,4]"


def test_layouts_follow_operands_through_a_net() -> None:
    graph, _ = traced(residual)
    text = Compilation(graph, AVX2).text("schedule")
    images = [t for op in ("relu", "conv", "conv_input_grad") for t in types_of(text, op) if t.count(",") == 3
              and "[N," in t and "[N,3," not in t]
    assert len(images) >= 8 and all(t.endswith("@nhwc") for t in images)


def test_without_convolutions_nothing_changes() -> None:
    x = gf.input("x", (gf.dim("N"), 32, 8, 8))
    f = gf.function([x], gf.mean(gf.nn.max_pool2d(gf.exp(x), 2) * 2.0, (2, 3)))
    assert "@" not in f.text("memory")


def test_explain_says_it() -> None:
    net = Net()
    assert "channels-last" in net.program(plain(net)).explain()


@pytest.mark.cpu
def test_an_image_is_overwritten_where_layouts_agree() -> None:
    """In place: a ReLU over what batch norm made; never over an image of another layout."""
    net = Net()
    h = net.conv(net.images(2, 3, 8, 8), 16)
    y = gf.exp(h) * gf.sum(h, (0, 2, 3), keepdims=True)
    f = net.program(gf.mean(net.conv(y, 16) ** 2))
    plan = Compilation(f.traced, AVX2).result("plan")
    table = {b.id: b for b in plan.buffers}
    taken = [(b, table[b.alias]) for b in plan.buffers if b.alias]
    assert all(a.layout == b.layout for a, b in taken)


@pytest.mark.cpu
def test_inside_a_loop() -> None:
    """A body has layouts of its own; carries keep the default."""
    net = Net()
    x = net.images(2, 16, 6, 6)
    w = net.feed((16, 16, 3, 3), scale=0.1)

    def step(carry: gf.Tensor, weights: gf.Tensor) -> gf.Tensor:
        return carry + gf.conv(gf.tanh(gf.conv(carry, weights, padding=1)), weights, padding=1)

    loss = gf.mean(gf.scan(lambda c, _: (step(c, w), None), x, length=3)[0] ** 2)
    good = net.program(loss, device="reference")(*net.arrays)
    f = net.program(loss)
    assert "@nhwc" in f.text("schedule")
    for a, b in zip(good, f(*net.arrays)):
        close(b, a)


@pytest.mark.cpu
def test_what_a_convolution_reads_of_several_arrays_is_stored_once() -> None:
    """A concatenation, which the convolution would choose from at every multiplication."""
    net = Net()
    x = net.images(2, 16, 6, 6)
    h = gf.concatenate([net.conv(x, 16), net.conv(x, 32, 1)], 1)
    f = net.program(gf.mean(net.conv(h, 16) ** 2))
    assert "f32[N,48,6,6]@nhwc" in types_of(f.text("schedule"), "concatenate")
    good = net.program(gf.mean(gf.conv(h, net.feeds[-1], padding=1) ** 2), device="reference")(*net.arrays)
    for a, b in zip(good, f(*net.arrays)):
        close(b, a)


@pytest.mark.cpu
@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize("size", [(24, 20), (3, 3)])
def test_rows_in_phases(batch: int, size: tuple[int, int]) -> None:
    """Batch norm with its statistics: reductions of reductions, values of rows and elements, in one piece and
    in many; the same bits for any number of threads."""
    net = Net()
    h = net.conv(net.images(batch, 32, *size), 48)
    y = gf.relu(net.norm(h) + h)
    loss = gf.mean(net.conv(y, 16) ** 2) + gf.sum(gf.var(y, (0, 2, 3)))
    good = net.program(loss, gf.mean(y, (0, 2, 3)), device="reference")(*net.arrays)
    runs = [net.program(loss, gf.mean(y, (0, 2, 3)), threads=t)(*net.arrays) for t in (1, 2, 3)]
    for a, b, *more in zip(good, *runs):
        close(b, a)
        assert all(np.array_equal(b, c) for c in more)
    assert "partial results" in net.program(loss).text("lower")
