"""Gradients for the input of convolutions by Winograd's algorithm turned round, against NumPy."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import graph_of, native_program, one_op

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.winograd_turned import winograd_turned
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.ops import OPS
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import host_target

# (images, channels, outs, height, width, places, padding): odd sizes, images that leave lanes over, padding.
CASES: tuple[tuple[Any, ...], ...] = (
    (64, 20, 50, 12, 12, 5, ((0, 0), (0, 0))),
    (31, 20, 33, 11, 13, 5, ((0, 0), (0, 0))),
    (16, 20, 20, 7, 6, 3, ((0, 0), (0, 0))),
    (48, 24, 18, 8, 9, 5, ((1, 0), (1, 1))),
    (16, 17, 40, 5, 6, 3, ((0, 0), (0, 1))),
)


def gradient(dy: np.ndarray, w: np.ndarray, size: tuple[int, int], padding: Any) -> np.ndarray:
    """Every product added where it belongs."""
    out = np.zeros((dy.shape[0], w.shape[1], *(n + sum(s) for n, s in zip(size, padding))))
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            at = slice(i, i + dy.shape[2]), slice(j, j + dy.shape[3])
            out[:, :, at[0], at[1]] += np.einsum("noyx,oc->ncyx", dy.astype(float), w[:, :, i, j])
    (top, _), (left, _) = padding
    return out[:, :, top : top + size[0], left : left + size[1]]


def is_turned(graph: Graph) -> bool:
    """Whether some kernel of the graph is computed so."""
    kernels = Compilation(graph, host_target()).result("memory").kernels.values()
    return any(isinstance(k, ContractionKernel) and winograd_turned(k, host_target()) for k in kernels)


@pytest.mark.parametrize("case", CASES)
def test_gradient(case: tuple[Any, ...]) -> None:
    """Within the rounding of a sum of as many products, and the same for any number of threads."""
    n, c, o, h, width, k, padding = case
    rng = np.random.default_rng(n)
    w = rng.standard_normal((o, c, k, k)).astype(np.float32)
    size = [d + sum(s) - k + 1 for d, s in zip((h, width), padding)]
    dy = rng.standard_normal((n, o, *size)).astype(np.float32)
    attrs = {"padding": padding, "spatial": (h, width)}
    _, inputs, node = one_op(OPS["conv_input_grad"], [dy, w], attrs)
    graph = graph_of(inputs, [node.result()])
    assert is_turned(graph)
    expected = gradient(dy, w, (h, width), padding)
    found = [native_program(graph, threads, guard=True).run([dy, w])[0] for threads in (1, 2, 3)]
    terms = o * k * k
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-6 * terms ** 0.5 + 1e-7 * terms)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_any_batch_and_what_follows() -> None:
    n = symbol("N")
    b = Builder()
    dy = b.input(name="dy", dtype=F32, shape=(n, 30, 6, 6))
    w = b.input(name="w", dtype=F32, shape=(30, 18, 5, 5))
    h = b.input(name="h", dtype=F32, shape=(n, 18, 10, 10))
    dx = b.conv_input_grad(dy, w, spatial=(10, 10))
    graph = graph_of([dy, w, h], [b.mul(dx, h), b.tanh(dx)])
    assert is_turned(graph)
    programs = [native_program(graph, threads, guard=True) for threads in (1, 3)]
    rng = np.random.default_rng(5)
    for images in (0, 1, 16, 37):
        shapes = (images, 30, 6, 6), (30, 18, 5, 5), (images, 18, 10, 10)
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        total = gradient(arrays[0], arrays[1], (10, 10), ((0, 0), (0, 0)))
        first, second = (program.run(arrays) for program in programs)
        np.testing.assert_allclose(first[0], total * arrays[2], rtol=0, atol=1e-3)
        np.testing.assert_allclose(first[1], np.tanh(total), rtol=0, atol=1e-4)
        for one, other in zip(first, second):
            np.testing.assert_array_equal(one, other)
