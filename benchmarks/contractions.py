"""Matrix products by generated kernels beside NumPy, one thread: ``python benchmarks/contractions.py``.

NumPy's threads are held to one by OPENBLAS_NUM_THREADS, which must be set before it is imported.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np

from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.module import emit_kernel, kernel_scratch, kernel_shared, kernel_tasks
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.target import host_target
from graphflow.runtime.native import load_object

SHAPES = (
    (512, 512, 512), (1024, 1024, 1024), (128, 512, 784), (784, 512, 128), (64, 512, 128), (64, 4096, 4096),
    (128, 10, 512), (512, 10, 128), (128, 512, 10), (1, 4096, 4096),
)
REPEATS = 20


def generated(form: str, a: np.ndarray, b: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """A function that computes the product into `y` with a kernel made for these sizes."""
    (m, n), k = y.shape, a.shape[0 if form[0] == "T" else 1]
    left, right = ("[k, i]" if form[0] == "T" else "[i, k]"), ("[j, k]" if form[1] == "T" else "[k, j]")
    shapes = [",".join(map(str, x.shape)) for x in (a, b, y)]
    kernel = parse_kernel(f"""contraction c(
        a: r f32[{shapes[0]}], b: r f32[{shapes[1]}], y: w f32[{shapes[2]}]) {{
        batch [] m [i < {m}] n [j < {n}] k [k < {k}]  a = a{left} b = b{right}  y[i, j] = acc }}""")
    target, module = host_target(), Module()
    emit_kernel(module, kernel, target)
    tasks = kernel_tasks(kernel, target)
    calls = [*module.before.values(), ("c", tasks)]
    library = load_object(compile_object(module.text(), target), "c", [name for name, _ in calls])
    steps = [(library.function(name, None, ctypes.c_void_p, *[ctypes.c_int64] * 3), n) for name, n in calls]
    size, shared = kernel_scratch(kernel, target), kernel_shared(kernel, target)
    assert isinstance(size, int) and isinstance(shared, int)
    scratch = np.zeros(shared + size + 64, np.uint8)
    aligned = -(-scratch.ctypes.data // 64) * 64
    slots = (ctypes.c_int64 * 5)(*(x.ctypes.data for x in (a, b, y)), aligned, size)
    held = (slots, scratch)

    def run() -> None:
        for call, count in steps:
            call(ctypes.addressof(held[0]), 0, count, 0)

    return run


def best(function: Callable[[], object]) -> float:
    """The shortest of several runs, in seconds."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'m x n x k':>18} {'form':>5} {'generated':>10} {'NumPy':>8}  GFLOP/s, one thread")
    for m, n, k in SHAPES:
        for form in ("NN", "NT", "TN", "TT"):
            a = rng.standard_normal((k, m) if form[0] == "T" else (m, k)).astype(np.float32)
            b = rng.standard_normal((n, k) if form[1] == "T" else (k, n)).astype(np.float32)
            y, z = np.empty((m, n), np.float32), np.empty((m, n), np.float32)
            left, right = (a.T if form[0] == "T" else a), (b.T if form[1] == "T" else b)
            ours = best(generated(form, a, b, y))
            numpy = best(lambda left=left, right=right, z=z: np.dot(left, right, out=z))
            assert np.allclose(y, z, rtol=1e-3, atol=1e-3)
            work = 2e-9 * m * n * k
            print(f"{f'{m} x {n} x {k}':>18} {form:>5} {work / ours:>10.1f} {work / numpy:>8.1f}")


if __name__ == "__main__":
    main()
