"""What graphflow costs beside arithmetic: import, calls, forks, compiling, memory. Prints a Markdown table.

Compiling is that of the training steps of LeNet and of a residual net of 152 layers on 224×224 images, in
fresh interpreters: once with an empty cache, then with the program in it. Of the larger one's stages those
are shown that took 10 ms or more. Memory is what the process's resident memory grew by in the first step on a
whole batch, beside what the plan says beforehand.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

IMPORT = """
import time; start = time.perf_counter()
import graphflow
print(time.perf_counter() - start)
"""
COMPILE = """
import json, sys, time
from pathlib import Path
import protocol
from nets_graphflow import training_step
from workloads import WORKLOADS

work = WORKLOADS["lenet"]
batch, rows = work.batch(0), work.batch_size
step = training_step(work, work.params(), batch, 1)
start = time.perf_counter()
step.runner
seconds = time.perf_counter() - start
step(**{key: array[:1] for key, array in batch.items()})
grown = None
if sys.platform == "linux":
    protocol.forget_peak()
    before = protocol.peak_bytes()
    step(**batch)
    grown = protocol.peak_bytes() - before + step.peak_bytes(N=1)
print(json.dumps({"seconds": seconds, "stages": step.compilation.seconds, "grown": grown,
                  "planned": step.peak_bytes(N=rows), "state": step.store.bytes, "rows": rows}))
"""
DEEP = """
import json, sys, time
from nets_graphflow import residual_net

step = residual_net({depths})
start = time.perf_counter()
step.runner
print(json.dumps({{"seconds": time.perf_counter() - start, "stages": step.compilation.seconds}}))
"""
DEPTHS, SMALL_DEPTHS = (3, 8, 36, 3), (1,)
NOTHING = """
define void @nothing(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  ret void
}
define void @forks(ptr %parallel, i64 %threads, i64 %count) {
entry:
  br label %loop
loop:
  %n = phi i64 [ 0, %entry ], [ %next, %loop ]
  call void %parallel(ptr @nothing, ptr null, i64 64, i64 %threads)
  %next = add i64 %n, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""
"""Forks and joins of tasks that do nothing, as a program's entry does them."""
ROUNDS, CALLS = 5, 2000


def fresh(program: str, cache: str) -> str:
    """What a new interpreter prints for the program."""
    here = str(Path(__file__).resolve().parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GRAPHFLOW_CACHE": cache, "PYTHONPATH": here},
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


def fork_microseconds(threads: int) -> float:
    """A fork of so many threads and the join, from native code: the least of the means of several rounds."""
    from graphflow.compiler.driver import compile_pool
    from graphflow.compiler.emit.object import compile_object
    from graphflow.compiler.target import host_target
    from graphflow.runtime.native import install_pool, load_object

    parallel = install_pool(compile_pool(host_target()))
    forks = load_object(compile_object(NOTHING, host_target()), "forks", ["forks"]).function(
        "forks", None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    )
    means = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        forks(parallel, threads, CALLS)
        means.append((time.perf_counter() - start) / CALLS)
    return min(means) * 1e6


def measure(threads: int, small: bool = False) -> dict[str, Any]:
    """All measurements: seconds, microseconds of a call and of a fork, bytes. `small`: of a shallow net."""
    depths, rounds = (SMALL_DEPTHS, 1) if small else (DEPTHS, ROUNDS)
    deep = DEEP.format(depths=depths)
    with tempfile.TemporaryDirectory() as cache:
        imported = min(float(fresh(IMPORT, cache)) for _ in range(rounds))
        cold = json.loads(fresh(COMPILE, cache))
        cached = [json.loads(fresh(COMPILE, cache)) for _ in range(rounds)]
        deep_cold, deep_cached = (json.loads(fresh(deep, cache)) for _ in range(2))
    return {
        "import_s": imported,
        "call_us": call_microseconds(),
        "compile_s": cold["seconds"],
        "cached_s": min(run["seconds"] for run in cached),
        "fork_us": {str(n): fork_microseconds(n) for n in sorted({1, threads})},
        "deep": {"compile_s": deep_cold["seconds"], "cached_s": deep_cached["seconds"],
                 "layers": 2 + 3 * sum(depths)},
        "stages_s": deep_cold["stages"],
        "memory": {key: cached[0][key] for key in ("rows", "planned", "grown", "state")},
    }


def table(found: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    memory, deep = found["memory"], found["deep"]
    rows = [
        ("`import graphflow`, NumPy included", f"{found['import_s']:.2f} s"),
        ("a call that adds two scalars", f"{found['call_us']:.1f} µs"),
        *((f"a fork of {n} threads and the join", f"{us:.2f} µs") for n, us in found["fork_us"].items()
          if n != "1"),
        ("compiling LeNet's training step", f"{found['compile_s']:.2f} s"),
        ("the same from the cache", f"{found['cached_s']:.3f} s"),
        (f"compiling a training step of {deep['layers']} layers", f"{deep['compile_s']:.2f} s"),
        ("the same from the cache", f"{deep['cached_s']:.3f} s"),
    ]
    rows += [(f"the stage `{k}` of it", f"{s:.3f} s") for k, s in found["stages_s"].items() if s >= 0.01]
    what = f"LeNet's working memory at batch {memory['rows']}, by the plan"
    rows.append((what, f"{memory['planned'] / 1e6:.2f} MB"))
    if memory["grown"] is not None:
        rows.append(("what its memory really grew by", f"{memory['grown'] / 1e6:.2f} MB"))
    rows.append(("its parameters and optimizer state", f"{memory['state'] / 1e6:.2f} MB"))
    return "\n".join(["| what | cost |", "|---|---:|", *(f"| {what} | {cost} |" for what, cost in rows)])


if __name__ == "__main__":
    print(table(measure(os.cpu_count() or 1)))
