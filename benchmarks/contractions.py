"""Each matrix product of the workloads' steps, forward and of both gradients, and products of large squares,
beside NumPy and PyTorch:

    python benchmarks/contractions.py [WORKLOAD ...] [--threads 1] [--small] [--python PATH]

"of bound" is the least time that the roofline allows (`graphflow.bench`) over the time taken. PyTorch is that
of the interpreter --python, if it has one. The ratio is our time over the better one of theirs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch_ops
from nets_graphflow import training_step
from workloads import SMALL, WORKLOADS, Workload

import graphflow as gf
from graphflow import bench
from graphflow.compiler.plan.dims import DimLike, evaluate
from graphflow.tensor import apply

SQUARES = "squares"
SIZES = (512, 1024, 2048)
HEADS = (f"{'':9} {'form':4} {'m x n x k':>18} {'ms':>8} {'GFLOP/s':>8} {'of bound':>8} {'NumPy':>8} "
         f"{'PyTorch':>8} ratio")
Shape = tuple[DimLike, ...]


@dataclass(frozen=True)
class Product:
    """A product of two matrices, either transposed or not, of these shapes, at a value of their symbol N."""

    x: Shape
    y: Shape
    transpose_x: bool
    transpose_y: bool
    batch: int

    @property
    def form(self) -> str:
        """T for an operand that is transposed, N for one that is not."""
        return "NT"[self.transpose_x] + "NT"[self.transpose_y]

    def sizes(self) -> tuple[int, int, int]:
        """(rows, columns, products of a sum)."""
        (rows, depth), (_, columns) = (
            shape[::-1] if turned else shape
            for shape, turned in ((self.numbers(self.x), self.transpose_x),
                                  (self.numbers(self.y), self.transpose_y)))
        return rows, columns, depth

    def numbers(self, shape: Shape) -> tuple[int, ...]:
        """The shape as numbers."""
        return tuple(evaluate(d, {"N": self.batch}) for d in shape)


def products(work: Workload) -> list[Product]:
    """Those of a workload's step, each once."""
    step = training_step(work, work.params(), work.batch(0), 1)
    found: dict[Product, None] = {}
    for node in _nodes(step.compilation.result("autodiff")):
        if node.op == "matmul" and all(len(v.type.shape) == 2 for v in node.inputs):
            x, y = (v.type.shape for v in node.inputs)
            found[Product(x, y, **node.attrs, batch=work.batch_size)] = None
    return list(found)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.nodes():
        yield node
        for region in node.regions:
            yield from _nodes(region)


def squares() -> list[Product]:
    """Products of large squares, in every form."""
    return [Product((size, size), (size, size), a, b, 0)
            for size in SIZES for a in (False, True) for b in (False, True)]


def ours(p: Product, threads: int) -> tuple[float, bench.Work]:
    """Seconds of the product's kernels, and their work."""
    x, y = gf.input("x", p.x), gf.input("y", p.y)
    result = apply("matmul", [x, y], transpose_x=p.transpose_x, transpose_y=p.transpose_y)
    step = gf.function([x, y], result, threads=threads)
    timings = bench.profile(step, bench.random_feeds(step, {"N": p.batch} if p.batch else {}))
    return sum(t.seconds for t in timings), timings[-1].work


def numpy(p: Product) -> float:
    """Seconds of NumPy."""
    x, y = (np.random.default_rng(0).standard_normal(p.numbers(s), np.float32) for s in (p.x, p.y))
    out = np.empty(p.sizes()[:2], np.float32)
    left, right = x.T if p.transpose_x else x, y.T if p.transpose_y else y
    return torch_ops.median(lambda: np.dot(left, right, out=out), bench.ROUNDS)


def measure(names: Sequence[str], small: bool, threads: int, python: str) -> str:
    """The table of these workloads."""
    sizes = SMALL if small else WORKLOADS
    found = [(name, p) for name in names for p in (squares() if name == SQUARES else products(sizes[name]))]
    machine = bench.machine(threads)
    times = [ours(p, threads) for _, p in found]
    theirs = [numpy(p) for _, p in found]       # after all of ours, for its threads spin between calls
    calls = [("product", (p.numbers(p.x), p.numbers(p.y), p.transpose_x, p.transpose_y)) for _, p in found]
    others = torch_ops.measure(python, calls, threads, bench.ROUNDS)
    lines = [HEADS]
    for (name, p), (mine, work), *rest in zip(found, times, theirs, others):
        best = min(t for t in rest if not math.isnan(t))
        lines.append(f"{name:9} {p.form:4} {' x '.join(map(str, p.sizes())):>18} {mine * 1e3:8.3f} "
                     f"{work.flops / mine / 1e9:8.1f} {machine.least_seconds(work) / mine:8.0%} "
                     f"{rest[0] * 1e3:8.3f} {rest[1] * 1e3:8.3f} {mine / best:5.2f}")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    names = [*WORKLOADS, SQUARES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(names)}; else all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="the small sizes")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has PyTorch")
    args = parser.parse_args()
    held = "OPENBLAS_NUM_THREADS"               # read when NumPy is imported, which has been
    if os.environ.get(held) != str(args.threads):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, held: str(args.threads)})
    print(measure(args.workloads or names, args.small, args.threads, args.python))


if __name__ == "__main__":
    main()
