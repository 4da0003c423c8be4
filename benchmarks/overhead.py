"""What graphflow costs beside arithmetic: a call, the import, compiling. Prints a Markdown table.

Compiling is that of LeNet's training step, in fresh interpreters: once with an empty cache, once with the
program in it. Of the stages those are shown that took 10 ms or more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

IMPORT = """
import time; start = time.perf_counter()
import graphflow
print(time.perf_counter() - start)
"""
COMPILE = """
import json, time
import graphflow as gf
n = gf.dim("N")
x, y = gf.input("x", (n, 1, 28, 28)), gf.input("y", (n,), "int64")
h = gf.nn.max_pool2d(gf.nn.conv2d(x, 20, 5), 2)
h = gf.nn.max_pool2d(gf.nn.conv2d(h, 50, 5), 2)
h = gf.nn.dense(gf.nn.dense(gf.nn.flatten(h), 500, gf.relu), 10)
loss = gf.loss.softmax_cross_entropy(h, y)
step = gf.function([x, y], loss, gf.optim.SGD(0.01, momentum=0.9).minimize(loss))
start = time.perf_counter()
step.runner
print(json.dumps([time.perf_counter() - start, step.compilation.seconds]))
"""
ROUNDS, CALLS = 5, 2000


def fresh(program: str, cache: str) -> str:
    """What a new interpreter prints for the program."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GRAPHFLOW_CACHE": cache},
    )
    return done.stdout


def call_microseconds() -> float:
    """A call of a program that adds two scalars: the least of the means of several rounds."""
    import graphflow as gf

    a, b = gf.input("a", ()), gf.input("b", ())
    add = gf.function([a, b], a + b, threads=1)
    x, y = np.array(1, np.float32), np.array(2, np.float32)
    assert add(x, y) == 3
    means = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            add(x, y)
        means.append((time.perf_counter() - start) / CALLS)
    return min(means) * 1e6


def table() -> str:
    """All measurements as a Markdown table."""
    with tempfile.TemporaryDirectory() as cache:
        imported = min(float(fresh(IMPORT, cache)) for _ in range(ROUNDS))
        cold, stages = json.loads(fresh(COMPILE, cache))
        cached = min(json.loads(fresh(COMPILE, cache))[0] for _ in range(ROUNDS))
    rows = [
        ("`import graphflow`, NumPy included", f"{imported:.2f} s"),
        ("a call that adds two scalars", f"{call_microseconds():.1f} µs"),
        ("compiling LeNet's training step", f"{cold:.2f} s"),
        ("the same from the cache", f"{cached:.3f} s"),
    ]
    rows += [
        (f"the stage `{name}` of it", f"{seconds:.3f} s")
        for name, seconds in stages.items()
        if seconds >= 0.01
    ]
    return "\n".join(["| what | time |", "|---|---:|", *(f"| {what} | {much} |" for what, much in rows)])


if __name__ == "__main__":
    print(table())
