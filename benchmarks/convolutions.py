"""Each convolution of the workloads' steps, and each of its gradients, beside PyTorch:

    python benchmarks/convolutions.py [WORKLOAD ...] [--threads 1] [--small] [--python PATH]

Images whose channels fill vectors lie channels-last, as they do within a step (`passes/layout.py`); PyTorch's
time, by the interpreter --python, is the better one of both layouts. GFLOP/s count the products of the
definition, so Winograd's algorithm may pass the machine's peak.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch_ops
from nets_graphflow import training_step
from workloads import SMALL, WORKLOADS, Workload

import graphflow as gf
from graphflow import bench
from graphflow.compiler.ops.contract import per_axis, per_side
from graphflow.compiler.passes.convolutions import FULL
from graphflow.compiler.plan.dims import evaluate
from graphflow.tensor import apply

IMAGES = ("traffic", "lenet", "inception", "resnet", "alexnet")
PASSES = {"conv": "forward", "conv_input_grad": "input gradient", "conv_weight_grad": "weight gradient"}
HEADS = f"{'':9} {'convolution':27} {'pass':15} {'ms':>8} {'GFLOP/s':>8} {'of peak':>8} {'PyTorch':>8} ratio"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """A pass of a convolution: its op, the shapes of images, weights and results, its geometry,
    and whether x is what a step is fed."""

    op: str
    x: Shape
    w: Shape
    y: Shape
    stride: Shape
    padding: tuple[tuple[int, int], ...]
    fed: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions of the definition."""
        return 2 * int(np.prod(self.y)) * int(np.prod(self.w[1:]))

    def __str__(self) -> str:
        _, channels, *size = self.x
        window = "x".join(map(str, self.w[2:])) + (f"/{self.stride[0]}" if self.stride != (1, 1) else "")
        return f"{channels:>4} x {size[0]} x {size[1]} -> {self.w[0]}, {window}"


def convolutions(work: Workload) -> dict[Convolution, int]:
    """Those of a workload's step, and how many of each there are."""
    step = training_step(work, work.params(), work.batch(0), 1)
    found: dict[Convolution, int] = {}
    for node in step.compilation.result("autodiff").nodes():
        if node.op not in PASSES:
            continue
        shapes = [tuple(evaluate(d, {"N": work.batch_size}) for d in t.shape)
                  for t in (*(v.type for v in node.inputs), *node.types)]
        order = {"conv": (0, 1, 2), "conv_input_grad": (2, 1, 0), "conv_weight_grad": (0, 2, 1)}[node.op]
        x, w, y = (shapes[i] for i in order)
        stride = per_axis(node.op, "stride", node.attrs["stride"], 2, 1)
        one = Convolution(node.op, x, w, y, stride, per_side(node.op, node.attrs["padding"], 2),
                          node.op != "conv_input_grad" and node.inputs[0].node.op == "input")
        found[one] = found.get(one, 0) + 1
    return found


# --- graphflow


def _last(shape: Shape, fed: bool) -> bool:
    """Whether an image of that shape lies channels-last in a step."""
    return shape[1] % FULL == 0 and not fed


def _image(name: str, shape: Shape, last: bool) -> tuple[gf.Tensor, gf.Tensor]:
    """A feed, and the image that it is."""
    _, channels, *size = shape
    feed = gf.input(name, (gf.dim("N"), *size, channels) if last else (gf.dim("N"), channels, *size))
    return feed, gf.transpose(feed, (0, 3, 1, 2)) if last else feed


def program(c: Convolution, threads: int) -> gf.Program:
    """The pass alone as a program."""
    (fx, x), (fy, y) = _image("x", c.x, _last(c.x, c.fed)), _image("y", c.y, _last(c.y, False))
    w = gf.input("w", c.w)
    how: dict[str, Any] = {"stride": c.stride, "padding": c.padding}
    if c.op == "conv_weight_grad":
        return gf.function([fx, fy], apply(c.op, [x, y], kernel=c.w[2:], **how), threads=threads)
    shape, feeds, image = (c.y, [fx, w], x) if c.op == "conv" else (c.x, [fy, w], y)
    if c.op == "conv_input_grad":
        how["spatial"] = c.x[2:]
    result = apply(c.op, [image, w], **how)
    if not _last(shape, False):
        return gf.function(feeds, result, threads=threads)
    reader = gf.input("reader", (FULL, shape[1], 1, 1))         # what a step keeps channels-last, others read
    return gf.function([*feeds, reader], apply("conv", [result, reader]), threads=threads)


def ours(c: Convolution, threads: int) -> float:
    """Seconds of all kernels of the pass."""
    step = program(c, threads)
    timings = bench.profile(step, bench.random_feeds(step, {"N": c.x[0]}))
    return sum(t.seconds for t in (timings[:-1] if "reader" in step.inputs else timings))


def measure(names: Sequence[str], small: bool, threads: int, python: str) -> str:
    """The table of these workloads."""
    found = [(name, c) for name in names for c in convolutions((SMALL if small else WORKLOADS)[name])]
    peak = bench.machine(threads).flops
    times = [ours(c, threads) for _, c in found]
    calls = [("convolution", (c.op, c.x, c.w, c.y, c.stride, [low for low, _ in c.padding]))
             for _, c in found]
    theirs = torch_ops.measure(python, calls, threads, bench.ROUNDS)
    lines = [HEADS]
    for (name, c), mine, other in zip(found, times, theirs):
        rate = c.flops / mine
        lines.append(f"{name:9} {c!s:27} {PASSES[c.op]:15} {mine * 1e3:8.3f} {rate / 1e9:8.1f} "
                     f"{rate / peak:8.0%} {other * 1e3:8.3f} {mine / other:5.2f}")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(IMAGES)}; else all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="the small sizes")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has PyTorch")
    args = parser.parse_args()
    print(measure(args.workloads or IMAGES, args.small, args.threads, args.python))


if __name__ == "__main__":
    main()
