"""Winograd's algorithm with vectors along channels, against the definition in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from native_code import targets
from support import graph_of, native_program

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.candidates import candidates
from graphflow.compiler.emit.module import emit_kernel, kernel_scratch, kernel_shared, kernel_tasks
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.emit.winograd_nhwc import winograd_nhwc
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.plan.dims import evaluate, symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import Target, host_target
from graphflow.runtime.native import load_object

Shape = tuple[int, int, int, int]
POISON = np.float32(1e30)

# (images [N, H, W, C], output channels, places, padding): odd sizes, tiles beyond the image, channels that
# fill no vector, several panels and blocks of channels, blocks of tiles within and across images.
SHAPES: tuple[tuple[Shape, int, int, int], ...] = (
    ((2, 7, 9, 16), 32, 3, 1),
    ((3, 13, 13, 32), 16, 3, 0),
    ((1, 28, 28, 16), 48, 3, 1),
    ((2, 5, 6, 200), 16, 3, 2),
    ((1, 3, 2, 10), 7, 3, 1),
    ((9, 4, 4, 64), 64, 3, 1),
    ((2, 13, 10, 16), 32, 5, 2),
    ((1, 9, 11, 24), 80, 5, 1),
    ((2, 8, 8, 32), 16, 5, 3),
)


def definition(x: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """The convolution of x [N, H, W, C] with w [O, C, R, S] in float64, [N, H', W', O]."""
    places = w.shape[2]
    x, w = x.astype(np.float64), w.astype(np.float64)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (n - places + 1 for n in x.shape[1:3])
    return sum(x[:, r:r + height, s:s + width] @ w[:, :, r, s].T
               for r in range(places) for s in range(places))


def parsed(text: str) -> ContractionKernel:
    """The kernel that the text tells of."""
    kernel = parse_kernel(text)
    assert isinstance(kernel, ContractionKernel)
    return kernel


def kernel_of(*args: Any, **options: Any) -> ContractionKernel:
    """The kernel of `text_of`."""
    return parsed(text_of(*args, **options))


def text_of(x: tuple[Any, int, int, int], outs: int, places: int, padding: int, *, gradient: bool = False,
            tile: str = "", more: str = "", value: str = "acc") -> str:
    """A convolution of `x`, or the gradient of one for its input, which has `outs` channels, as a kernel's
    text; `padding` is what `definition` would pad `x` with."""
    n, h, w, c = x
    sign, shift = ("-", places - 1 - padding) if gradient else ("+", -padding)
    height, width = (size + 2 * padding - places + 1 for size in (h, w))
    y, x_ = f"y{sign}r{shift:+d}", f"x{sign}s{shift:+d}"
    weights = f"{c},{outs}" if gradient else f"{outs},{c}"
    return f"""contraction k(
        a0: r f32[{n},{h},{w},{c}], a1: r f32[{weights},{places},{places}], {more}
        out: w f32[{n},{height},{width},{outs}]) {"symbols [N]" if n == "N" else ""} {{
        batch [b < {n}] m [o < {outs}] n [y < {height}, x < {width}] k [c < {c}, r < {places}, s < {places}]
        {tile}
        a = a1[{"c, o" if gradient else "o, c"}, r, s]
        b = guarded(0 <= {y} < {h}, 0 <= {x_} < {w}, a0[b, {y}, {x_}, c], f32(0.0))
        out[b, y, x, o] = {value} }}"""


def compiled(kernel: ContractionKernel, target: Target) -> Callable[..., np.ndarray]:
    """A function (arrays, shape, workers, symbols): what the kernel stores, its tasks shared among workers.
    Nothing beyond its scratch may be touched."""
    module = Module()
    emit_kernel(module, kernel, target)
    prepare, pieces = module.before[kernel.name]
    library = load_object(compile_object(module.text(), target), "k", [kernel.name, prepare])

    def run(arrays: list[np.ndarray], shape: tuple[int, ...], workers: int = 1, **symbols: int
            ) -> np.ndarray:
        tasks = evaluate(kernel_tasks(kernel, target), symbols)
        size, shared = (evaluate(f(kernel, target), symbols) for f in (kernel_scratch, kernel_shared))
        whole = (shared + workers * size) // 4
        memory = np.full(whole + 64, POISON, np.float32)
        first = -memory.ctypes.data % 64 // 4
        result = np.full(shape, np.nan, np.float32)
        addresses = [a.ctypes.data for a in (*arrays, result)]
        slots = [*addresses, *symbols.values(), memory.ctypes.data + 4 * first, size]
        held = (ctypes.c_int64 * len(slots))(*slots)
        for name, count in ((prepare, pieces), (kernel.name, tasks)):
            call = library.function(name, None, ctypes.c_void_p, *[ctypes.c_int64] * 3)
            for worker in reversed(range(workers)):
                call(ctypes.addressof(held), count * worker // workers, count * (worker + 1) // workers,
                     worker)
        assert (memory[:first] == POISON).all() and (memory[first + whole:] == POISON).all()
        return result

    return run


def close(found: np.ndarray, expected: np.ndarray, bound: float = 1e-5) -> None:
    """The largest error over the largest magnitude."""
    assert found.shape == expected.shape and np.isfinite(found).all()
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("gradient", [False, True])
def test_against_the_definition(size: int, gradient: bool, name: str) -> None:
    """Every form on every shape; the same bits whoever does the tasks."""
    rng = np.random.default_rng(size)
    for x, outs, places, padding in SHAPES if name == "host" else SHAPES[:2] + SHAPES[4:7]:
        target = targets()[name]
        kernel = kernel_of(x, outs, places, padding, gradient=gradient, tile=f"tile [algorithm={size}]")
        how = winograd_nhwc(kernel, target)
        assert how is not None and how.size == size and how.flip == gradient
        images = rng.standard_normal(x).astype(np.float32)
        w = rng.standard_normal((outs, x[3], places, places)).astype(np.float32)
        expected = definition(images, w, padding)
        held = np.ascontiguousarray(w.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]) if gradient else w
        run = compiled(kernel, target)
        found = [run([images, held], expected.shape, workers) for workers in (1, 3)]
        close(found[0], expected)
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("places, size, bound", [(3, 2, 1e-6), (3, 4, 2e-6), (5, 2, 2e-6), (5, 4, 1e-5)])
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_accuracy(places: int, size: int, bound: float, channels: int) -> None:
    """The errors that `winograd_matrices` tells of, whatever the number of channels."""
    rng = np.random.default_rng(7)
    kernel = kernel_of((2, 16, 16, channels), 16, places, places // 2, tile=f"tile [algorithm={size}]")
    run = compiled(kernel, host_target())
    for _ in range(3):
        x = rng.standard_normal((2, 16, 16, channels)).astype(np.float32)
        w = rng.standard_normal((16, channels, places, places)).astype(np.float32)
        expected = definition(x, w, places // 2)
        close(run([x, w], expected.shape), expected, bound)


@pytest.mark.parametrize("size", [2, 4])
def test_stores_and_any_batch(size: int) -> None:
    """What follows the convolution is computed with it; the batch comes with the call."""
    rng = np.random.default_rng(size)
    kernel = kernel_of(("N", 11, 9, 32), 48, 3, 1, tile=f"tile [algorithm={size}]",
                       more="bias: r f32[48], more: r f32[N,11,9,48],",
                       value="where(lt(f32(0.0), more[b, y, x, o]), maximum(add(acc, bias[o]), f32(0.0)), "
                             "f32(0.0))")
    run = compiled(kernel, host_target())
    for images in (0, 1, 6):
        shapes = ((images, 11, 9, 32), (48, 32, 3, 3), (48,), (images, 11, 9, 48))
        x, w, bias, more = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        expected = np.where(more > 0, np.maximum(definition(x, w, 1) + bias, 0), 0)
        found = run([x, w, bias, more], expected.shape, 2, N=images)
        if images:
            close(found, expected)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("height, width, places, padding, fold", [
    (13, 13, 3, 1, 2), (14, 14, 3, 1, 3), (13, 9, 3, 1, 2), (9, 9, 5, 2, 2), (11, 11, 3, 0, 2),
    (5, 9, 3, 1, 2)])
def test_mosaics(height: int, width: int, places: int, padding: int, fold: int, gradient: bool) -> None:
    """Several images cut into tiles as one, and those left over: no image touches another."""
    rng = np.random.default_rng(height)
    kernel = kernel_of(("N", height, width, 24), 16, places, padding, gradient=gradient,
                       tile="tile [algorithm=4]")
    how = winograd_nhwc(kernel, host_target())
    assert how is not None and how.fold == fold
    run = compiled(kernel, host_target())
    for images in (0, 1, fold**2, 2 * fold**2 + 1):
        x = rng.standard_normal((images, height, width, 24)).astype(np.float32)
        w = rng.standard_normal((16, 24, places, places)).astype(np.float32)
        expected = definition(x, w, padding)
        held = np.ascontiguousarray(w.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]) if gradient else w
        found = [run([x, held], expected.shape, workers, N=images) for workers in (1, 3)]
        if images:
            close(found[0], expected)
        np.testing.assert_array_equal(*found)


def test_infinity_makes_nan_of_its_tiles_alone() -> None:
    """Tiles whose window an infinite input is not in are as they are without it."""
    rng = np.random.default_rng(3)
    kernel = kernel_of((1, 16, 16, 16), 16, 3, 1, tile="tile [algorithm=4]")
    x = rng.standard_normal((1, 16, 16, 16)).astype(np.float32)
    w = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
    run = compiled(kernel, host_target())
    plain = run([x, w], x.shape)
    x[0, 6, 9, 3] = np.inf
    found = run([x, w], x.shape)
    assert not np.isfinite(found[0, 4:8, 8:12]).any()
    found[0, 4:8, 8:12] = plain[0, 4:8, 8:12]
    np.testing.assert_array_equal(found, plain)


# -- from graphs


def algorithms(graph: Graph) -> list[int]:
    """The tiles' sizes of the graph's kernels that are computed so."""
    target = host_target()
    kernels = Compilation(graph, target).result("memory").kernels.values()
    found = [winograd_nhwc(k, target) for k in kernels if isinstance(k, ContractionKernel)]
    return [w.size for w in found if w is not None]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("places, padding", [(3, 1), (5, 2)])
def test_from_a_graph_of_any_batch(places: int, padding: int, gradient: bool) -> None:
    """A convolution between channels-last arrays is computed so; within its memory, and the same for any
    number of threads."""
    rng = np.random.default_rng(places)
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(symbol("N"), 13, 11, 32))
    w = b.input(name="w", dtype=F32, shape=(32, 32, places, places))
    image = b.transpose(x, perm=(0, 3, 1, 2))
    y = (b.conv_input_grad(image, w, spatial=(13, 11), padding=padding) if gradient
         else b.conv(image, w, padding=padding))
    graph = graph_of([x, w], [b.transpose(b.relu(y), perm=(0, 2, 3, 1))])
    assert algorithms(graph) == [4]
    programs = [native_program(graph, threads, guard=True) for threads in (1, 3)]
    for images in (1, 5, 0):
        arrays = [rng.standard_normal(shape).astype(np.float32)
                  for shape in ((images, 13, 11, 32), (32, 32, places, places))]
        weights = arrays[1].transpose(1, 0, 2, 3)[:, :, ::-1, ::-1] if gradient else arrays[1]
        expected = np.maximum(definition(arrays[0], weights, padding), 0)
        found = [program.run(arrays)[0] for program in programs]
        if images:
            close(found[0], expected)
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)


def test_in_the_middle_of_a_net() -> None:
    """Between other convolutions the layout pass makes such kernels, with bias and activation in their
    stores."""
    rng = np.random.default_rng(5)
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(3, 3, 20, 17))
    shapes = ((32, 3, 3, 3), (32, 32, 3, 3), (16, 32, 3, 3))
    weights = [b.input(name=f"w{i}", dtype=F32, shape=shape) for i, shape in enumerate(shapes)]
    y = x
    for w in weights:
        y = b.relu(b.conv(y, w, padding=1))
    graph = graph_of([x, *weights], [b.reduce_sum(y, axes=(2, 3))])
    assert len(algorithms(graph)) == 2
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 3, 20, 17), *shapes)]
    (expected,) = interpret(graph, dict(zip(("x", "w0", "w1", "w2"), arrays)), {})[0].values()
    found = [native_program(graph, threads, guard=True).run(arrays)[0] for threads in (1, 2)]
    close(found[0], expected)
    np.testing.assert_array_equal(*found)


# -- the choice


def test_the_tile_decides() -> None:
    """The kernel's tile names the algorithm; without it a cost model decides."""
    target = host_target()
    kernel = kernel_of((4, 14, 14, 64), 64, 3, 1)
    best = winograd_nhwc(kernel, target)
    assert best is not None and best.size == 4
    for asked in (0, 2, 4):
        named = replace(kernel, contraction=replace(kernel.contraction, tile={"algorithm": asked}))
        how = winograd_nhwc(named, target)
        assert (how.size if how else 0) == asked
    assert [{"algorithm": n} in candidates(kernel, target) for n in (0, 2)] == [True, True]


@pytest.mark.parametrize("x, outs, places", [
    ((4, 16, 16, 4), 4, 3), ((4, 1, 1, 64), 64, 3), ((4, 8, 8, 16), 16, 7)])
def test_left_where_it_does_not_pay(x: Shape, outs: int, places: int) -> None:
    """Few channels or places that no tile fits."""
    assert winograd_nhwc(kernel_of(x, outs, places, places // 2), host_target()) is None


@pytest.mark.parametrize("old, new", [
    ("a0[b, y+r-1, x+s-1, c]", "a0[b, c, y+r-1, x+s-1]"),       # channels are no neighbours
    ("out[b, y, x, o]", "out[b, o, y, x]"),
    ("y+r", "y+2*r"),                                               # dilation
    ("x+s", "2*x+s"),                                               # stride
    ("< 16, a0", "< 16, 0 <= c-1 < 16, a0"),                       # a part of the channels
    ("a1[o, c, r, s]", "mul(a1[o, c, r, s], f32(2.0))"),
])
def test_other_kernels_are_left_alone(old: str, new: str) -> None:
    """What is no such convolution."""
    text = text_of((64, 16, 16, 16), 16, 3, 1)
    assert winograd_nhwc(parsed(text), host_target()) is not None and old in text
    assert winograd_nhwc(parsed(text.replace(old, new)), host_target()) is None
