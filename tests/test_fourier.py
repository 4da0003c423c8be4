"""Convolutions with large kernels, and their gradients, as products of spectra."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.signal import correlate
from support import graph_of, native_program

from graphflow.compiler.driver import Compilation
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.passes import fourier
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32, F64
from graphflow.compiler.target import host_target

pytestmark = pytest.mark.cpu
# (images, channels, outs, height, width, kernel, padding)
CASES: tuple[tuple[Any, ...], ...] = (
    (2, 16, 24, 33, 30, (9, 9), 4),
    (3, 20, 16, 40, 29, (11, 7), ((2, 5), (0, 3))),
    (1, 16, 16, 50, 64, (21, 13), 0),
)


def operands(case: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[tuple[int, int], ...]]:
    """(x, w, the gradient for y, padding)."""
    images, channels, outs, height, width, kernel, padding = case
    sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    rng = np.random.default_rng(sum(case[:5]))
    size = [n + sum(side) - k + 1 for n, side, k in zip((height, width), sides, kernel)]
    shapes = (images, channels, height, width), (outs, channels, *kernel), (images, outs, *size)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, w, dy, sides


def padded(x: np.ndarray, sides: Any) -> np.ndarray:
    """The images with their padding."""
    return np.pad(x, ((0, 0), (0, 0), *sides))


def norms(x: np.ndarray) -> np.ndarray:
    """The root of the sum of squares of each element along the first axis."""
    return np.sqrt((x.astype(float) ** 2).sum(axis=tuple(range(1, x.ndim))))


def ops_of(graph: Graph) -> set[str]:
    """The ops that the kernels are made of."""
    return {node.op for node in Compilation(graph, host_target()).result("joint").nodes()}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spectra whatever they cost: small cases do."""
    monkeypatch.setattr(fourier, "WORTH", 0.0)


def check(graph: Graph, arrays: list[np.ndarray], expected: np.ndarray, size: np.ndarray) -> None:
    """Runs the graph on 1 and 3 threads: same bits, no convolution is left, and an error within the rounding
    of transforms and sums, which are orthogonal but for a factor: small beside the norms of what is
    multiplied."""
    assert "matmul" in ops_of(graph) and not any(op.startswith("conv") for op in ops_of(graph))
    found = [native_program(graph, threads, guard=True).run(arrays)[0] for threads in (1, 3)]
    np.testing.assert_array_equal(*found)
    assert (np.abs(found[0] - expected) <= 16 * 2.0**-24 * size).all()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case: tuple[Any, ...]) -> None:
    """Of any number of images; a function follows."""
    x, w, _, sides = operands(case)
    b = Builder()
    fx = b.input(name="x", dtype=F32, shape=(symbol("N"), *x.shape[1:]))
    fw = b.input(name="w", dtype=F32, shape=w.shape)
    graph = graph_of([fx, fw], [b.relu(b.conv(fx, fw, padding=case[6]))])
    expected = np.stack([[correlate(p, q, "valid")[0] for q in w.astype(float)]
                         for p in padded(x, sides).astype(float)])
    check(graph, [x, w], np.maximum(expected, 0), (norms(x)[:, None] * norms(w))[:, :, None, None])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_gradient(case: tuple[Any, ...]) -> None:
    x, w, dy, sides = operands(case)
    b = Builder()
    fy, fw = (b.input(name=name, dtype=F32, shape=array.shape) for name, array in (("dy", dy), ("w", w)))
    out = b.conv_input_grad(fy, fw, spatial=x.shape[2:], padding=case[6])
    around = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(case[5], sides)]
    turned = w.astype(float).transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    wide = padded(dy, around).astype(float)
    expected = np.stack([[correlate(p, q, "valid")[0] for q in turned] for p in wide])
    size = norms(dy)[:, None] * norms(turned)
    check(graph_of([fy, fw], [out]), [dy, w], expected, size[:, :, None, None])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient(case: tuple[Any, ...]) -> None:
    """Of any number of images."""
    x, w, dy, sides = operands(case)
    b = Builder()
    fx, fy = (b.input(name=name, dtype=F32, shape=(symbol("N"), *array.shape[1:]))
              for name, array in (("x", x), ("dy", dy)))
    out = b.conv_weight_grad(fx, fy, kernel=case[5], padding=case[6])
    wide = padded(x, sides).astype(float)
    expected = np.array([[correlate(p, q.astype(float), "valid")[0] for p in wide.swapaxes(0, 1)]
                         for q in dy.swapaxes(0, 1)])
    size = norms(dy.swapaxes(0, 1))[:, None] * norms(x.swapaxes(0, 1))
    check(graph_of([fx, fy], [out]), [x, dy], expected, size[:, :, None, None])


@pytest.mark.parametrize("change", ["", "stride", "few channels", "small kernel", "float64"])
def test_what_is_left_to_others(change: str) -> None:
    kernel, channels = 3 if change == "small kernel" else 11, 2 if change == "few channels" else 32
    dtype, b = F64 if change == "float64" else F32, Builder()
    x = b.input(name="x", dtype=dtype, shape=(symbol("N"), channels, 64, 64))
    w = b.input(name="w", dtype=dtype, shape=(channels, channels, kernel, kernel))
    graph = graph_of([x, w], [b.conv(x, w, stride=2 if change == "stride" else 1)])
    assert ("conv" in ops_of(graph)) == bool(change)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("axes", [1, 3])
def test_images_of_one_and_of_three_axes_are_left_to_others(axes: int) -> None:
    """Of them no spectra are made, of the gradients neither."""
    rng = np.random.default_rng(axes)
    x, w = (rng.standard_normal((2, 3, *[size] * axes)).astype(np.float32) for size in (11, 7))
    b = Builder()
    fx, fw = (b.input(name=name, dtype=F32, shape=array.shape) for name, array in (("x", x), ("w", w)))
    y = b.conv(fx, fw)
    gradients = [b.conv_weight_grad(fx, y, kernel=w.shape[2:]), b.conv_input_grad(y, fw, spatial=x.shape[2:])]
    found = native_program(graph_of([fx, fw], [y, *gradients])).run([x, w])
    out = np.stack([[correlate(p, q, "valid")[0] for q in w] for p in x])
    for_w = np.array([[correlate(p, q, "valid")[0] for p in x.swapaxes(0, 1)] for q in out.swapaxes(0, 1)])
    turned = np.flip(w, tuple(range(2, w.ndim))).swapaxes(0, 1)
    wide = np.pad(out, ((0, 0), (0, 0), *[(6, 6)] * axes))
    for_x = np.stack([[correlate(p, q, "valid")[0] for q in turned] for p in wide])
    for value, expected in zip(found, (out, for_w, for_x)):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
