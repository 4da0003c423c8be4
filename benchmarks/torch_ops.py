"""Seconds that PyTorch takes for single operations, in a process of an interpreter that has it.

`measure` starts that process, which reads what to time as JSON and prints a list of numbers. It needs nothing
but PyTorch.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = Callable[[], Any]


def product(torch: Any, x: list[int], y: list[int], transpose_x: bool, transpose_y: bool) -> list[Run]:
    """A product of two matrices of these shapes, either transposed or not."""
    left, right = torch.randn(x), torch.randn(y)
    left, right = left.T if transpose_x else left, right.T if transpose_y else right
    out = torch.empty(left.shape[0], right.shape[1])
    return [lambda: torch.mm(left, right, out=out)]


def convolution(torch: Any, op: str, x: list[int], w: list[int], y: list[int], stride: list[int],
                padding: list[int]) -> list[Run]:
    """A pass of a convolution of images x, weights w and results y, in both layouts of images. op: "conv",
    "conv_input_grad" or "conv_weight_grad"."""
    how = stride, padding, [1, 1], False, [0, 0], 1
    mask = [op == "conv_input_grad", op == "conv_weight_grad", False]

    def run(layout: Any) -> Run:
        image, weights, result = (torch.randn(s).contiguous(memory_format=layout) for s in (x, w, y))
        if op == "conv":
            return lambda: torch.ops.aten.convolution(image, weights, None, *how)
        return lambda: torch.ops.aten.convolution_backward(result, image, weights, None, *how, mask)

    return [run(torch.contiguous_format), run(torch.channels_last)]


OPERATIONS = {"product": product, "convolution": convolution}
"""Each makes the ways to do the operation, of which the fastest counts."""


def median(run: Run, rounds: int) -> float:
    """Seconds of a run, after one that does not count."""
    times: list[float] = []
    run()
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(python: str, calls: Sequence[tuple[str, Sequence[Any]]], threads: int, rounds: int
            ) -> list[float]:
    """Seconds of each call, an operation's name and its arguments; NaN if the interpreter has no PyTorch."""
    asked = json.dumps({"calls": calls, "threads": threads, "rounds": rounds})
    done = subprocess.run([python, str(Path(__file__).resolve())], input=asked, text=True, check=True,
                          stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    return [math.nan] * len(calls) if found is None else found


def main() -> None:
    """Reads what to time, and prints the seconds, or null without PyTorch."""
    asked = json.load(sys.stdin)
    try:
        import torch
    except ImportError:
        print("null")
        return
    torch.set_num_threads(asked["threads"])
    print(json.dumps([min(median(run, asked["rounds"]) for run in OPERATIONS[name](torch, *arguments))
                      for name, arguments in asked["calls"]]))


if __name__ == "__main__":
    main()
