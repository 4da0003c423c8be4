"""Convolutions by their definition and their gradients, as the emitters for few channels compute them."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from native_code import targets
from support import graph_of, native_program, one_op

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.direct import direct
from graphflow.compiler.emit.direct_weights import direct_weights
from graphflow.compiler.emit.pool import pool_object
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.ops import OPS
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import Target, host_target
from graphflow.runtime.cpu import CpuProgram
from graphflow.runtime.native import install_pool
from graphflow.runtime.store import Store

# (images, channels, outs, height, width, kernel, padding, stride)
CASES: tuple[tuple[Any, ...], ...] = (
    (2, 1, 20, 28, 28, (5, 5), 0, 1),
    (3, 4, 10, 14, 14, (5, 5), 0, 1),
    (2, 1, 4, 32, 32, (5, 5), 0, 1),
    (2, 3, 7, 17, 13, (3, 3), 1, 1),
    (2, 5, 6, 27, 23, (3, 2), ((1, 0), (2, 1)), 2),
    (1, 3, 16, 67, 67, (11, 11), 2, 4),
    (2, 3, 8, 39, 39, (7, 7), 3, 3),
    (1, 3, 64, 113, 111, (3, 3), 1, 1),
    (1, 2, 17, 300, 40, (2, 7), ((1, 0), (0, 6)), (1, 2)),
)


def windows(x: np.ndarray, kernel: tuple[int, int], padding: Any, stride: Any) -> np.ndarray:
    """[n, c, y, x, ky, kx]: what lies under the kernel at each place of the output."""
    sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    steps = (stride, stride) if isinstance(stride, int) else stride
    padded = np.pad(x, ((0, 0), (0, 0), *sides))
    view = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))
    return view[:, :, :: steps[0], :: steps[1]]


def input_gradient(dy: np.ndarray, w: np.ndarray, size: tuple[int, int], padding: Any, stride: Any
                   ) -> np.ndarray:
    """The gradient for the convolution's input, by adding each product where it belongs."""
    sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    steps = (stride, stride) if isinstance(stride, int) else stride
    out = np.zeros((dy.shape[0], w.shape[1], *(n + sum(s) for n, s in zip(size, sides))))
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            rows = slice(i, i + (dy.shape[2] - 1) * steps[0] + 1, steps[0])
            columns = slice(j, j + (dy.shape[3] - 1) * steps[1] + 1, steps[1])
            out[:, :, rows, columns] += np.einsum("noyx,oc->ncyx", dy, w[:, :, i, j])
    (top, _), (left, _) = sides
    return out[:, :, top : top + size[0], left : left + size[1]]


def operands(case: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """(x, w, dy, attributes) in float32."""
    n, c, o, h, w, kernel, padding, stride = case
    rng = np.random.default_rng(sum(case[:5]))
    x = rng.standard_normal((n, c, h, w)).astype(np.float32)
    weights = rng.standard_normal((o, c, *kernel)).astype(np.float32)
    places = windows(x, kernel, padding, stride).shape[2:4]
    dy = rng.standard_normal((n, o, *places)).astype(np.float32)
    return x, weights, dy, {"padding": padding, "stride": stride}


def contractions(graph: Graph, target: Target) -> list[ContractionKernel]:
    """The contractions that the graph becomes."""
    kernels = Compilation(graph, target).result("memory").kernels.values()
    return [k for k in kernels if isinstance(k, ContractionKernel)]


def check(graph: Graph, arrays: list[np.ndarray], expected: np.ndarray, terms: int, largest: float = 0.0
          ) -> None:
    """Runs the graph on 1, 2 and 3 threads: same bits, within the rounding of a sum of so many terms; the
    largest sum is `largest`, or the largest that is expected."""
    found = [native_program(graph, threads, guard=True).run(arrays)[0] for threads in (1, 2, 3)]
    bound = 4 * np.sqrt(terms) * np.finfo(np.float32).eps * max(1.0, largest, np.abs(expected).max())
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=bound)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("case", CASES)
def test_convolution(case: tuple[Any, ...]) -> None:
    x, w, _, attrs = operands(case)
    _, inputs, node = one_op(OPS["conv"], [x, w], attrs)
    graph = graph_of(inputs, [node.result()])
    assert direct(contractions(graph, host_target())[0], host_target()) is not None
    view = windows(x.astype(float), case[5], **attrs)
    check(graph, [x, w], np.einsum("ncyxij,ocij->noyx", view, w), w[0].size)


@pytest.mark.parametrize("case", [case for case in CASES if case[7] == 1 and case[1] > 1])
def test_gradient_for_input(case: tuple[Any, ...]) -> None:
    x, w, dy, attrs = operands(case)
    _, inputs, node = one_op(OPS["conv_input_grad"], [dy, w], {**attrs, "spatial": x.shape[2:]})
    graph = graph_of(inputs, [node.result()])
    assert direct(contractions(graph, host_target())[0], host_target()) is not None
    check(graph, [dy, w], input_gradient(dy, w, x.shape[2:], **attrs), w[:, 0].size)


@pytest.mark.parametrize("case", CASES)
def test_gradient_for_weights(case: tuple[Any, ...]) -> None:
    x, w, dy, attrs = operands(case)
    _, inputs, node = one_op(OPS["conv_weight_grad"], [x, dy], {**attrs, "kernel": case[5]})
    graph = graph_of(inputs, [node.result()])
    assert direct_weights(contractions(graph, host_target())[0], host_target()) is not None
    view = windows(x.astype(float), case[5], **attrs)
    check(graph, [x, dy], np.einsum("ncyxij,noyx->ocij", view, dy), dy[:, 0].size)


# With the channels of the gradient side by side: their vectors divide every target's lanes.
LAST = (
    (3, 3, 16, 20, 20, (3, 3), 1, 1),
    (2, 3, 64, 67, 67, (11, 11), 2, 4),
    (2, 1, 32, 28, 28, (5, 5), 0, 1),
    (2, 3, 48, 33, 35, (7, 7), 3, 2),
    (1, 5, 80, 40, 21, (2, 3), ((1, 0), (0, 2)), (1, 2)),
)


@pytest.mark.parametrize("case", LAST)
def test_gradient_for_weights_of_channels_last(case: tuple[Any, ...]) -> None:
    x, w, dy, attrs = operands(case)
    n = symbol("N")
    b = Builder()
    turned = np.ascontiguousarray(dy.transpose(0, 2, 3, 1))
    values = [b.input(name=name, dtype=F32, shape=(n, *array.shape[1:]))
              for name, array in (("x", x), ("dy", turned))]
    result = b.conv_weight_grad(values[0], b.transpose(values[1], perm=(0, 3, 1, 2)), kernel=case[5], **attrs)
    graph = graph_of(values, [result])
    (found,) = filter(None, (direct_weights(k, host_target()) for k in contractions(graph, host_target())))
    assert found.last
    view = windows(x.astype(float), case[5], **attrs)
    check(graph, [x, turned], np.einsum("ncyxij,noyx->ocij", view, dy), dy[:, 0].size)


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("case", LAST)
def test_convolution_to_channels_last(case: tuple[Any, ...], follows: bool) -> None:
    """With a layout that the product of channels-last images asks for; a bias and a function behind it."""
    x, w, _, attrs = operands(case)
    outs = w.shape[0]
    b = Builder()
    shapes = {"x": (symbol("N"), *x.shape[1:]), "w": w.shape, "bias": (outs, 1, 1), "one": (outs, outs, 1, 1)}
    values = [b.input(name=name, dtype=F32, shape=shape) for name, shape in shapes.items()]
    y = b.conv(values[0], values[1], **attrs)
    if follows:
        y = b.tanh(b.add(y, b.broadcast_to(values[2], shape=y.shape)))
    graph = graph_of(values, [b.conv(y, values[3])])
    found = [d for k in contractions(graph, host_target()) if (d := direct(k, host_target())) is not None]
    assert [d.last for d in found] == [True]
    bias = np.linspace(-1, 1, outs).astype(np.float32).reshape(-1, 1, 1)
    total = np.einsum("ncyxij,ocij->noyx", windows(x.astype(float), case[5], **attrs), w)
    arrays = [x, w, bias, np.eye(outs, dtype=np.float32).reshape(outs, outs, 1, 1)]
    expected = np.tanh(total + bias) if follows else total
    check(graph, arrays, expected, w[0].size, np.abs(total).max())


def test_any_batch_and_epilogues() -> None:
    """Batches of any size, none included; a bias and a function behind the products; the update of the
    weights behind their gradient."""
    n = symbol("N")
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(n, 2, 19, 21))
    dy = b.input(name="dy", dtype=F32, shape=(n, 6, 17, 17))
    w = b.input(name="w", dtype=F32, shape=(6, 2, 3, 5))
    bias = b.input(name="bias", dtype=F32, shape=(6, 1, 1))
    y = b.tanh(b.add(b.conv(x, w), b.broadcast_to(bias, shape=(n, 6, 17, 17))))
    new = b.sub(w, b.mul(b.conv_weight_grad(x, dy, kernel=(3, 5)), 0.5))
    graph = graph_of([x, dy, w, bias], [y, new])
    chosen = [(direct(k, host_target()), direct_weights(k, host_target()))
              for k in contractions(graph, host_target())]
    assert any(a for a, _ in chosen) and any(c for _, c in chosen)
    programs = [native_program(graph, threads, guard=True) for threads in (1, 2, 3)]
    rng = np.random.default_rng(3)
    for images in (0, 1, 5, 40):
        shapes = (images, 2, 19, 21), (images, 6, 17, 17), (6, 2, 3, 5), (6, 1, 1)
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        results = [program.run(arrays) for program in programs]
        view = windows(arrays[0].astype(float), (3, 5), 0, 1)
        total = np.einsum("ncyxij,ocij->noyx", view, arrays[2]) + arrays[3]
        np.testing.assert_allclose(results[0][0], np.tanh(total), rtol=0, atol=1e-5)
        gradient = np.einsum("ncyxij,noyx->ocij", view, arrays[1])
        np.testing.assert_allclose(results[0][1], arrays[2] - gradient / 2, rtol=0, atol=1e-3)
        for other in results[1:]:
            for found, same in zip(other, results[0]):
                np.testing.assert_array_equal(found, same)


def test_what_is_not_a_number_stays_in_its_place() -> None:
    """Elements beyond the last whole vector of places, which lie in scratch, are not multiplied."""
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 14, 14), (2, 5, 10, 10)))
    x[1, 1, 2, 3] = np.nan
    _, inputs, node = one_op(OPS["conv_weight_grad"], [x, dy], {"kernel": (5, 5)})
    found = native_program(graph_of(inputs, [node.result()])).run([x, dy])[0]
    assert np.isfinite(found[:, [0, 2]]).all() and np.isnan(found[:, 1, 0, 0]).all()
    assert np.isfinite(found[:, 1, 3:]).all()


@pytest.mark.parametrize("name", targets())
def test_other_targets(name: str) -> None:
    """Narrow vectors and few registers get smaller tiles."""
    target = targets()[name]
    x, w, dy, attrs = operands(CASES[1])
    _, inputs, node = one_op(OPS["conv"], [x, w], attrs)
    _, others, gradient = one_op(OPS["conv_weight_grad"], [x, dy], {**attrs, "kernel": (5, 5)})
    view = windows(x.astype(float), (5, 5), **attrs)
    for graph, arrays, expected in (
        (graph_of(inputs, [node.result()]), [x, w], np.einsum("ncyxij,ocij->noyx", view, w)),
        (graph_of(others, [gradient.result()]), [x, dy], np.einsum("ncyxij,noyx->ocij", view, dy)),
    ):
        (kernel,) = contractions(graph, target)
        found = direct(kernel, target) or direct_weights(kernel, target)
        assert found is not None and found.image.lanes == target.vector_bytes // 4
        compilation = Compilation(graph, target)
        install_pool(pool_object(host_target()))
        program = CpuProgram(compilation.result("plan"), compilation.object_code(), Store(), 2, guard=True)
        np.testing.assert_allclose(program.run(arrays)[0], expected, rtol=0, atol=1e-4)


def test_strided_bands_of_fewer_rows_than_the_kernel_has() -> None:
    """A small second cache holds the rows under a few rows of the output, of which each needs two besides."""
    x, w, _, attrs = operands(CASES[5])
    _, inputs, node = one_op(OPS["conv"], [x, w], attrs)
    graph, target = graph_of(inputs, [node.result()]), replace(host_target(), l2=100 << 10)
    found = direct(contractions(graph, target)[0], target)
    assert found is not None and found.image.band < w.shape[2]
    compilation = Compilation(graph, target)
    install_pool(pool_object(host_target()))
    program = CpuProgram(compilation.result("plan"), compilation.object_code(), Store(), 2, guard=True)
    view = windows(x.astype(float), (11, 11), **attrs)
    np.testing.assert_allclose(program.run([x, w])[0], np.einsum("ncyxij,ocij->noyx", view, w),
                               rtol=0, atol=1e-4)


def test_what_is_stored_along_the_channels_is_left_to_other_emitters() -> None:
    x, w, _, attrs = operands(CASES[1])
    _, inputs, node = one_op(OPS["conv"], [x, w], attrs)
    (kernel,) = contractions(graph_of(inputs, [node.result()]), host_target())
    c = kernel.contraction
    image, out, row, column = c.stores[0].index
    turned = replace(c.stores[0], index=(image, row, column, out))
    assert direct(replace(kernel, contraction=replace(c, stores=(turned,))), host_target()) is None
