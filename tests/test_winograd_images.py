"""Convolutions and their gradients by Winograd's algorithm with vectors along images, against NumPy."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from native_code import targets
from support import graph_of, loaded_program, native_program

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.candidates import candidates
from graphflow.compiler.emit.winograd_images import (
    WinogradImages,
    WinogradImagesWeights,
    winograd_images,
    winograd_images_weights,
)
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import Target, host_target
from graphflow.compiler.tune import Choice, Tuning

pytestmark = pytest.mark.cpu
TARGETS = targets()
NAMES = ("conv", "conv_input_grad", "conv_weight_grad")
ERRORS = {(3, 2): 1e-6, (3, 4): 3e-6, (5, 2): 4e-6, (5, 4): 1e-5}
"""By places and outputs of a tile: the largest error over the largest element (see `winograd_matrices`)."""

# (images, channels, outs, height, width, places, padding): odd sizes, lanes and tiles left over, several
# bands, little padding.
CASES: tuple[tuple[Any, ...], ...] = (
    (16, 20, 50, 12, 12, 5, ((0, 0), (0, 0))),
    (31, 17, 33, 11, 13, 5, ((0, 0), (0, 0))),
    (16, 20, 19, 7, 6, 3, ((0, 0), (0, 0))),
    (48, 24, 18, 8, 9, 5, ((1, 0), (1, 1))),
    (5, 17, 40, 5, 6, 3, ((0, 0), (0, 1))),
    (3, 29, 40, 14, 28, 3, ((0, 0), (0, 0))),
    (7, 20, 33, 7, 50, 3, ((0, 1), (2, 1))),
    (40, 48, 48, 4, 4, 3, ((1, 1), (1, 1))),
    (2, 20, 10, 15, 37, 5, ((2, 3), (0, 2))),
)


def windows(x: np.ndarray, places: int, padding: Any) -> np.ndarray:
    """[image, channel, y, x, place along y, along x] of the padded images, in float64."""
    padded = np.pad(x.astype(float), ((0, 0), (0, 0), *padding))
    return np.lib.stride_tricks.sliding_window_view(padded, (places, places), axis=(2, 3))


def reference(name: str, arrays: list[np.ndarray], places: int, size: tuple[int, ...], padding: Any
              ) -> np.ndarray:
    """The definition."""
    first, second = arrays
    if name == "conv":
        return np.einsum("ncyxij,ocij->noyx", windows(first, places, padding), second, optimize=True)
    if name == "conv_weight_grad":
        return np.einsum("ncyxij,noyx->ocij", windows(first, places, padding), second, optimize=True)
    out = np.zeros((first.shape[0], second.shape[1], *(n + sum(s) for n, s in zip(size, padding))))
    for i in range(places):
        for j in range(places):
            at = slice(i, i + first.shape[2]), slice(j, j + first.shape[3])
            out[:, :, at[0], at[1]] += np.einsum("noyx,oc->ncyx", first.astype(float), second[:, :, i, j])
    (top, _), (left, _) = padding
    return out[:, :, top : top + size[0], left : left + size[1]]


def with_tiles(graph: Graph, target: Target) -> dict[int, Compilation]:
    """The graph, of one contraction, compiled so with each size of tiles that applies."""
    kernels = Compilation(graph, target).result("tile").kernels
    ((name, kernel),) = [(name, k) for name, k in kernels.items() if isinstance(k, ContractionKernel)]
    found = {}
    for size in (2, 4):
        tile = {"algorithm": size}
        if tile in candidates(kernel, target):
            choices = {name: Choice(tile, 1.0, 1.0, 1)}
            made = Compilation(graph, target, tuning=Tuning(lambda trial: None, 1, choices=choices))
            assert [w.tiles.size for w in chosen(made, target)] == [size]
            found[size] = made
    return found


def chosen(compilation: Compilation, target: Target) -> list[WinogradImages | WinogradImagesWeights]:
    """How those of its kernels are computed that are computed so."""
    kernels = compilation.result("memory").kernels.values()
    found = [choose(k, target) for k in kernels if isinstance(k, ContractionKernel)
             for choose in (winograd_images, winograd_images_weights)]
    return [w for w in found if w is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case, target_name", [(case, name) for name in TARGETS
                                               for case in (CASES if name == "host" else CASES[1:4])])
def test_against_the_definition(case: tuple[Any, ...], name: str, target_name: str) -> None:
    """Within the error of each size of tiles whose bands fit the cache, the same for any number of threads,
    and within its scratch."""
    n, c, o, height, width, places, padding = case
    target, rng = TARGETS[target_name], np.random.default_rng(n)
    size = tuple(d + sum(s) - places + 1 for d, s in zip((height, width), padding))
    x, y, w = (n, c, height, width), (n, o, *size), (o, c, places, places)
    shapes, more = {"conv": ((x, w), {}), "conv_input_grad": ((y, w), {"spatial": (height, width)}),
                    "conv_weight_grad": ((x, y), {"kernel": (places, places)})}[name]
    b = Builder()
    inputs = [b.input(name=f"x{i}", dtype=F32, shape=shape) for i, shape in enumerate(shapes)]
    graph = graph_of(inputs, [b.node(name, inputs, {"padding": padding, **more}).result()])
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    expected = reference(name, arrays, places, (height, width), padding)
    fits = with_tiles(graph, target)
    assert fits
    for tiles, compilation in fits.items():
        found = [loaded_program(compilation.result("plan"), compilation.object_code(), threads, guard=True)
                 .run(arrays)[0] for threads in (1, 3)]
        assert np.abs(found[0] - expected).max() <= ERRORS[places, tiles] * np.abs(expected).max()
        np.testing.assert_array_equal(*found)


def test_bands_and_tiles_turned_round() -> None:
    """What does not fit the cache is cut into bands; unpadded gradients for inputs are turned round."""
    b, target = Builder(), replace(host_target(), l2=1 << 20)
    x, w, dy = (b.input(name=name, dtype=F32, shape=shape) for name, shape in (
        ("x", (32, 20, 34, 40)), ("w", (24, 20, 5, 5)), ("dy", (32, 24, 8, 8))))
    (wide,) = chosen(with_tiles(graph_of([x, w], [b.conv(x, w)]), target)[2], target)
    assert isinstance(wide, WinogradImages) and wide.tiles.bands > 1 and not wide.turned
    graph = graph_of([dy, w], [b.conv_input_grad(dy, w, spatial=(12, 12))])
    (small,) = chosen(with_tiles(graph, target)[2], target)
    assert isinstance(small, WinogradImages) and small.turned


@pytest.mark.parametrize("name", NAMES)
def test_any_batch_and_what_follows(name: str) -> None:
    """What follows is computed with it, and the batch comes with the call; pieces of it are cut short."""
    n, b, rng = symbol("N"), Builder(), np.random.default_rng(5)
    shapes = {"x": (n, 18, 10, 10), "dy": (n, 30, 6, 6), "w": (30, 18, 5, 5)}
    x, dy, w = (b.input(name=key, dtype=F32, shape=shape) for key, shape in shapes.items())
    found = {"conv": lambda: b.conv(x, w),
             "conv_input_grad": lambda: b.conv_input_grad(dy, w, spatial=(10, 10)),
             "conv_weight_grad": lambda: b.conv_weight_grad(x, dy, kernel=(5, 5))}[name]()
    h = b.input(name="h", dtype=F32, shape=found.shape)
    graph = graph_of([x, dy, w, h], [b.mul(found, h), b.tanh(b.mul(found, 0.02))])
    assert chosen(Compilation(graph, host_target()), host_target())
    programs = [native_program(graph, threads, guard=True) for threads in (1, 3)]
    for images in (0, 1, 16, 37):
        sizes = [[images if d == n else d for d in v.shape] for v in graph.inputs]
        arrays = [rng.standard_normal(size).astype(np.float32) for size in sizes]
        feeds = dict(zip((v.node.attrs["name"] for v in graph.inputs), arrays))
        expected = interpret(graph, feeds, {})[0]
        first, second = (program.run(arrays) for program in programs)
        for one, other, wanted in zip(first, second, expected.values()):
            assert np.abs(one - wanted).max(initial=0) <= 3e-5 * np.abs(wanted).max(initial=0)
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("change", [{"dilation": 2}, {"stride": 2}, {"groups": 2}, {"channels": 2},
                                    {"size": 2}, {"images": 1}])
def test_left_where_it_does_not_fit(change: dict[str, int]) -> None:
    """Other convolutions, and those whose transformations cost more than they save, follow the definition."""
    attrs = {name: n for name, n in change.items() if name in ("dilation", "stride", "groups")}
    channels, size = change.get("channels", 30), change.get("size", 3)
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(change.get("images", 32), channels, 16, 16))
    w = b.input(name="w", dtype=F32, shape=(30, channels // attrs.get("groups", 1), size, size))
    assert not chosen(Compilation(graph_of([x, w], [b.conv(x, w, padding=1, **attrs)]), host_target()),
                      host_target())
