"""The gradient of convolutions for their weights by Winograd's algorithm along channels, against sums by
NumPy in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import graph_of, native_program

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.pool import pool_object
from graphflow.compiler.emit.winograd_nhwc_weights import WinogradNhwcWeights, winograd_nhwc_weights
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Value
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan.dims import DimLike, symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import Target, host_target
from graphflow.runtime.cpu import CpuProgram
from graphflow.runtime.native import install_pool
from graphflow.runtime.store import Store

Sides = tuple[tuple[int, int], tuple[int, int]]
LANES = host_target().vector_bytes // 4


def gradient_graph(x: tuple[DimLike, ...], outs: int, places: int, padding: Sides
                   ) -> tuple[Builder, list[Value], Value]:
    """A builder, feeds x[N, H, W, C] and dy[N, H, W, O], and the gradient of weights."""
    b = Builder()
    size = [d + low + high - places + 1 for d, (low, high) in zip(x[1:3], padding)]
    shapes = {"x": x, "dy": (x[0], *size, outs)}
    feeds = [b.input(name=name, dtype=F32, shape=shape) for name, shape in shapes.items()]
    images = [b.transpose(f, perm=(0, 3, 1, 2)) for f in feeds]
    return b, feeds, b.conv_weight_grad(*images, kernel=(places, places), padding=padding)


def expected_gradient(x: np.ndarray, dy: np.ndarray, padding: Sides) -> np.ndarray:
    """dW[o, c, i, j] = sum over n, h, w of dy[n, h, w, o] x[n, h + i, w + j, c], in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, dy.shape[1:3], (1, 2))
    return np.einsum("nijchw,nhwo->ocij", windows, dy.astype(np.float64), optimize=True)


def normal(rng: np.random.Generator, images: int, x: tuple[int, ...], outs: int, places: int, padding: Sides
           ) -> list[np.ndarray]:
    """Normal numbers for both feeds; x without its first axis."""
    size = [d + low + high - places + 1 for d, (low, high) in zip(x[:2], padding)]
    shapes = (images, *x), (images, *size, outs)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def chosen(graph: Graph, target: Target) -> list[WinogradNhwcWeights]:
    """How those of the graph's kernels are computed that are computed so."""
    kernels = Compilation(graph, target).result("memory").kernels.values()
    found = [winograd_nhwc_weights(k, target) for k in kernels if isinstance(k, ContractionKernel)]
    return [w for w in found if w is not None]


# (images, (height, width), vectors of input and of output channels, places, padding): tiles in part outside
# of the image, one tile, blocks of tiles within and across images, blocks of channels, odd numbers.
CASES: tuple[tuple[int, tuple[int, int], int, int, int, Sides], ...] = (
    (3, (8, 8), 2, 2, 3, ((1, 1), (1, 1))),
    (2, (32, 32), 1, 1, 3, ((1, 1), (1, 1))),
    (2, (13, 14), 1, 3, 3, ((0, 0), (0, 0))),
    (1, (7, 9), 5, 2, 3, ((0, 2), (2, 1))),
    (2, (5, 6), 3, 4, 3, ((2, 2), (2, 2))),
    (40, (3, 3), 2, 5, 3, ((1, 1), (1, 1))),
    (2, (13, 13), 13, 7, 3, ((1, 1), (1, 1))),
    (1, (40, 5), 2, 11, 3, ((1, 1), (1, 1))),
    (3, (11, 13), 1, 2, 5, ((2, 2), (2, 2))),
    (2, (9, 8), 3, 1, 5, ((0, 1), (2, 0))),
)


@pytest.mark.parametrize("images, size, ins, outs, places, padding", CASES)
def test_gradient(images: int, size: tuple[int, int], ins: int, outs: int, places: int, padding: Sides
                  ) -> None:
    """Within the stated error, the same for any number of threads, and within its scratch."""
    rng = np.random.default_rng(images)
    x = (*size, ins * LANES)
    b, feeds, dw = gradient_graph((images, *x), outs * LANES, places, padding)
    graph = graph_of(feeds, [dw])
    assert chosen(graph, host_target())
    arrays = normal(rng, images, x, outs * LANES, places, padding)
    expected = expected_gradient(*arrays, padding)
    found = [native_program(graph, threads, guard=True).run(arrays)[0] for threads in (1, 2, 3)]
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("places, size", [(3, 28), (5, 27)])
def test_long_sums_stay_accurate(places: int, size: int) -> None:
    """Thousands of terms: at most 1e-5 of the largest element."""
    rng = np.random.default_rng(7)
    padding = ((places // 2, places // 2),) * 2
    x = (size, size, LANES)
    _, feeds, dw = gradient_graph((12, *x), LANES, places, padding)
    graph = graph_of(feeds, [dw])
    assert chosen(graph, host_target())
    arrays = normal(rng, 12, x, LANES, places, padding)
    expected = expected_gradient(*arrays, padding)
    (found,) = native_program(graph, 2).run(arrays)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("size", [(13, 10), (4, 4)])
def test_update_in_place_and_any_batch(size: tuple[int, int]) -> None:
    """The gradient goes straight into the update of the weights; pieces of the batch are cut short."""
    rng = np.random.default_rng(5)
    padding = ((1, 1), (1, 1))
    x, outs = (*size, 2 * LANES), 3 * LANES
    b, feeds, dw = gradient_graph((symbol("N"), *x), outs, 3, padding)
    w = b.state(name="w", role="parameter", dtype=F32, shape=dw.shape)
    update = b.update(b.sub(w, b.mul(dw, b.constant(0.25, F32, dw.shape))), name="w").node
    graph = Graph("g", tuple(feeds), {"y": b.mul(dw, dw)}, (update,))
    assert chosen(graph, host_target())
    for threads in (1, 3):
        program = native_program(graph, threads, guard=True)
        for images in (1, 37, 0, 3):
            arrays = normal(rng, images, x, outs, 3, padding)
            before = rng.standard_normal((outs, 2 * LANES, 3, 3)).astype(np.float32)
            program.store["w"] = before
            expected = expected_gradient(*arrays, padding)
            (squares,) = program.run(arrays)
            close = {"rtol": 2e-5, "atol": 1e-5 * max(np.abs(expected).max(), 1e-9)}
            np.testing.assert_allclose(program.store["w"], before - 0.25 * expected, **close)
            np.testing.assert_allclose(np.sqrt(squares), np.abs(expected), **close)


def test_groups() -> None:
    """Groups of channels are gradients of their own."""
    rng = np.random.default_rng(2)
    b = Builder()
    shape = (2, 17, 17, 4 * LANES)
    feeds = [b.input(name=name, dtype=F32, shape=shape) for name in ("x", "dy")]
    images = [b.transpose(f, perm=(0, 3, 1, 2)) for f in feeds]
    graph = graph_of(feeds, [b.conv_weight_grad(*images, kernel=(3, 3), padding=1, groups=2)])
    assert chosen(graph, host_target())
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in feeds)
    halves = [slice(0, 2 * LANES), slice(2 * LANES, None)]
    expected = np.concatenate([expected_gradient(x[..., h], dy[..., h], ((1, 1), (1, 1))) for h in halves])
    found = native_program(graph, 2, guard=True).run([x, dy])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("number", [0, 2, 4, 5])
def test_the_tile_names_the_algorithm(number: int) -> None:
    """Tiles of 2, 4 and 5 outputs, or none, whatever the cost model says."""
    rng = np.random.default_rng(number)
    padding, x = ((1, 1), (1, 1)), (7, 12, LANES)
    _, feeds, dw = gradient_graph((2, *x), LANES, 3, padding)
    program = Compilation(graph_of(feeds, [dw]), host_target()).result("lower")
    (name, kernel), = program.kernels.items()
    kernel = replace(kernel, contraction=replace(kernel.contraction, tile={"algorithm": number}))
    asked = replace(program, kernels={name: kernel})
    found = winograd_nhwc_weights(kernel, host_target())
    assert (found.outputs if found else 0) == number
    arrays = normal(rng, 2, x, LANES, 3, padding)
    expected = expected_gradient(*arrays, padding)
    result = run(Compilation(asked, host_target(), "lower"), arrays)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def run(compilation: Compilation, arrays: list[np.ndarray]) -> np.ndarray:
    """The only output of a program for the machine at hand."""
    install_pool(pool_object(host_target()))
    return CpuProgram(compilation.result("plan"), compilation.object_code(), Store(), 2).run(arrays)[0]


@pytest.mark.parametrize("vector_bytes, registers", [(32, 16), (16, 16), (16, 32)])
@pytest.mark.parametrize("places", [3, 5])
def test_shorter_vectors(vector_bytes: int, registers: int, places: int) -> None:
    """What other targets would run, in this machine's instructions."""
    host = host_target()
    if vector_bytes > host.vector_bytes:
        pytest.skip("this machine's vectors are shorter")
    target = replace(host, vector_bytes=vector_bytes, vector_registers=registers)
    rng = np.random.default_rng(registers)
    padding = ((places // 2, places // 2),) * 2
    x, outs = (10, 9, 3 * target.vector_bytes // 4), 16 * 5
    _, feeds, dw = gradient_graph((2, *x), outs, places, padding)
    graph = graph_of(feeds, [dw])
    assert chosen(graph, target)
    arrays = normal(rng, 2, x, outs, places, padding)
    expected = expected_gradient(*arrays, padding)
    np.testing.assert_allclose(run(Compilation(graph, target), arrays), expected, rtol=0,
                               atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("change", [{"stride": 2}, {"dilation": 2}, {"channels_last": False}, {"places": 1},
                                    {"places": 2}, {"ins": LANES + 1}])
def test_left_where_it_does_not_apply(change: dict[str, Any]) -> None:
    """Other gradients, other layouts and odd channels follow other emitters."""
    places, ins = change.pop("places", 3), change.pop("ins", 2 * LANES)
    geometry = {k: v for k, v in change.items() if k != "channels_last"}
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(2, 17, 17, ins))
    w = b.input(name="w", dtype=F32, shape=(2 * LANES, ins, places, places))
    y = b.conv(b.transpose(x, perm=(0, 3, 1, 2)), w, padding=1, **geometry)
    dy = b.input(name="dy", dtype=F32, shape=(y.shape[0], *y.shape[2:], y.shape[1]))
    images = [b.transpose(v, perm=(0, 3, 1, 2)) for v in (x, dy)]
    if not change.get("channels_last", True):
        images = [b.input(name=f"{name}'", dtype=F32, shape=v.shape) for name, v in zip(("x", "dy"), images)]
    dw = b.conv_weight_grad(*images, kernel=(places, places), padding=1, **geometry)
    feeds = (x, dy) if change.get("channels_last", True) else tuple(images)
    assert not chosen(graph_of(feeds, [dw]), host_target())
