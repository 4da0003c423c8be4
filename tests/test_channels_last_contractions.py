"""Convolutions of channels-last images with a stride, or of 1 x 1, and their gradients, as contractions."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native_code import targets
from support import graph_of
from test_direct import contractions, input_gradient, operands, windows

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.direct import direct
from graphflow.compiler.emit.pointwise_weights import pointwise_weights
from graphflow.compiler.emit.pool import pool_object
from graphflow.compiler.emit.tiling import Tiling, contraction_tiling
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Value
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import ContractionKernel, Loop, LoopKernel, Reduce
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import Target, host_target
from graphflow.runtime.cpu import CpuProgram
from graphflow.runtime.native import install_pool
from graphflow.runtime.store import Store

pytestmark = pytest.mark.cpu
TARGETS = {name: target for name, target in targets().items() if name != "sse2"}
# (images, channels, outs, height, width, kernel, padding, stride)
STRIDED: tuple[tuple[Any, ...], ...] = (
    (3, 16, 32, 32, 32, (3, 3), 1, 2),
    (2, 32, 64, 17, 15, (3, 3), 1, 2),
    (5, 16, 48, 9, 12, (3, 2), ((1, 0), (0, 1)), (2, 1)),
    (2, 16, 32, 21, 20, (4, 5), 2, 3),
)
ROWS: tuple[tuple[Any, ...], ...] = (
    (3, 19, 32, 17, 16, (1, 1), 0, 1),
    (2, 192, 16, 28, 28, (1, 1), 0, 1),
    (1, 40, 96, 29, 31, (1, 1), 0, 1),
)


def computed(b: Builder, feeds: list[Value], out: Value, arrays: list[np.ndarray], target: Target
             ) -> tuple[np.ndarray, list[Tiling]]:
    """The result, the same with one thread as with three, and the tilings of the contractions."""
    install_pool(pool_object(host_target()))
    compilation = Compilation(graph_of(feeds, [out]), target)
    plan, code = compilation.result("plan"), compilation.object_code()
    found = [CpuProgram(plan, code, Store(), threads, guard=True).run(arrays)[0] for threads in (1, 3)]
    assert np.array_equal(*found)
    kernels = compilation.result("memory").kernels.values()
    return found[0], [contraction_tiling(k, target) for k in kernels if isinstance(k, ContractionKernel)]


def image(b: Builder, name: str, array: np.ndarray) -> tuple[Value, Value, np.ndarray]:
    """A feed [N, height, width, channels], the image in it, and what is fed."""
    turned = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    feed = b.input(name=name, dtype=F32, shape=(symbol("N"), *turned.shape[1:]))
    return feed, b.transpose(feed, perm=(0, 3, 1, 2)), turned


def close(found: np.ndarray, expected: np.ndarray, magnitudes: np.ndarray, terms: int) -> None:
    """The bound for sums of so many rounded products, in any order."""
    assert (np.abs(found - expected) <= (terms + 2) * 2.0**-24 * magnitudes).all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strided_convolutions(case: tuple[Any, ...], target: Target) -> None:
    x, w, _, attrs = operands(case)
    b = Builder()
    fx, at, turned = image(b, "x", x)
    fw = b.input(name="w", dtype=F32, shape=w.shape)
    out = b.transpose(b.conv(at, fw, **attrs), perm=(0, 2, 3, 1))
    found, _ = computed(b, [fx, fw], out, [turned, w], target)
    view = windows(x.astype(float), case[5], case[6], case[7])
    expected, size = (np.einsum("ncyxij,ocij->nyxo", f(view), f(w.astype(float))) for f in (np.array, np.abs))
    close(found, expected, size, w[0].size)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_gradients_of_strided_convolutions(case: tuple[Any, ...], target: Target) -> None:
    x, w, dy, attrs = operands(case)
    b = Builder()
    (fx, at, turned), (fy, place, above) = image(b, "x", x), image(b, "dy", dy)
    found, _ = computed(b, [fx, fy], b.conv_weight_grad(at, place, kernel=case[5], **attrs), [turned, above],
                        target)
    view = windows(x.astype(float), case[5], case[6], case[7])
    expected, size = (np.einsum("ncyxij,noyx->ocij", f(view), f(dy.astype(float)))
                      for f in (np.array, np.abs))
    close(found, expected, size, dy[:, 0].size)
    b = Builder()
    fy, place, above = image(b, "dy", dy)
    fw = b.input(name="w", dtype=F32, shape=w.shape)
    out = b.transpose(b.conv_input_grad(place, fw, spatial=x.shape[2:], **attrs), perm=(0, 2, 3, 1))
    found, _ = computed(b, [fy, fw], out, [above, w], target)
    expected, size = (input_gradient(f(dy.astype(float)), f(w.astype(float)), x.shape[2:], case[6], case[7])
                      for f in (np.array, np.abs))
    close(found, expected.transpose(0, 2, 3, 1), size.transpose(0, 2, 3, 1), w[:, 0].size)


# Few channels in rows to many side by side: bands, the last of them short; places left over of a row; rows
# that are wider, and gradients that are, than the first cache has room for.
FEW: tuple[tuple[Any, ...], ...] = (
    (2, 3, 16, 37, 33, (3, 3), 1, 1),
    (1, 3, 64, 131, 29, (7, 5), ((2, 2), (1, 1)), (3, 2)),
    (2, 2, 32, 9, 301, (2, 4), ((1, 0), (0, 3)), (1, 4)),
    (3, 4, 48, 5, 4, (3, 3), 1, 1),
    (1, 1, 160, 15, 140, (3, 3), 0, 1),
)


def read_by_channels(b: Builder, y: Value) -> tuple[Value, Value, np.ndarray]:
    """What reads an image so that it lies channels-last, and changes nothing: a feed, the result, the feed's
    array."""
    outs = y.shape[1]
    assert isinstance(outs, int)
    one = b.input(name="one", dtype=F32, shape=(outs, outs, 1, 1))
    return one, b.conv(y, one), np.eye(outs, dtype=np.float32).reshape(outs, outs, 1, 1)


@pytest.mark.parametrize("target", targets().values(), ids=targets())
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_channels_in_rows_to_channels_last(case: tuple[Any, ...], target: Target) -> None:
    x, w, dy, attrs = operands(case)
    view = windows(x.astype(float), case[5], case[6], case[7])
    b = Builder()
    fx = b.input(name="x", dtype=F32, shape=(symbol("N"), *x.shape[1:]))
    fw = b.input(name="w", dtype=F32, shape=w.shape)
    one, out, eye = read_by_channels(b, b.conv(fx, fw, **attrs))
    how = [direct(k, target) for k in contractions(graph_of([fx, fw, one], [out]), target)]
    assert any(d.last for d in how if d is not None)
    found, _ = computed(b, [fx, fw, one], out, [x, w, eye], target)
    expected, size = (np.einsum("ncyxij,ocij->noyx", f(view), f(w.astype(float))) for f in (np.array, np.abs))
    close(found, expected, size, w[0].size)
    b = Builder()
    fx = b.input(name="x", dtype=F32, shape=(symbol("N"), *x.shape[1:]))
    fy, place, above = image(b, "dy", dy)
    out = b.conv_weight_grad(fx, place, kernel=case[5], **attrs)
    found, _ = computed(b, [fx, fy], out, [x, above], target)
    expected, size = (np.einsum("ncyxij,noyx->ocij", f(view), f(dy.astype(float)))
                      for f in (np.array, np.abs))
    close(found, expected, size, dy[:, 0].size)


@pytest.mark.parametrize("target", targets().values(), ids=targets())
@pytest.mark.parametrize("case", [(2, 3, 16, 37, 33, (3, 4), ((2, 2), (1, 2)), 1),
                                  (1, 2, 64, 9, 50, (2, 3), 0, 1)], ids=str)
def test_gradient_for_input_with_weights_turned_round(case: tuple[Any, ...], target: Target) -> None:
    """Images of few channels are those of the gradient."""
    dy, back, _, attrs = operands(case)
    w = np.ascontiguousarray(back.transpose(1, 0, 2, 3))
    sides = 2 * ((0, 0),) if case[6] == 0 else case[6]
    size = tuple(d + k - 1 - sum(s) for d, k, s in zip(dy.shape[2:], case[5], sides))
    b = Builder()
    fy = b.input(name="dy", dtype=F32, shape=(symbol("N"), *dy.shape[1:]))
    fw = b.input(name="w", dtype=F32, shape=w.shape)
    one, out, eye = read_by_channels(b, b.conv_input_grad(fy, fw, spatial=size, **attrs))
    how = [direct(k, target) for k in contractions(graph_of([fy, fw, one], [out]), target)]
    assert [d.image.steps for d in how if d is not None and d.last] == [(-1, -1)]
    found, _ = computed(b, [fy, fw, one], out, [dy, w, eye], target)
    expected, magnitudes = (input_gradient(f(dy.astype(float)), f(w.astype(float)), size, sides, 1)
                            for f in (np.array, np.abs))
    close(found, expected, magnitudes, w[:, 0].size)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_weights_of_1x1_between_rows_and_channels_last(case: tuple[Any, ...], target: Target) -> None:
    x, w, dy, attrs = operands(case)
    b = Builder()
    fx = b.input(name="x", dtype=F32, shape=(symbol("N"), *x.shape[1:]))
    fy, place, above = image(b, "dy", dy)
    found, tilings = computed(b, [fx, fy], b.conv_weight_grad(fx, place, kernel=(1, 1), **attrs), [x, above],
                              target)
    expected, size = (np.einsum("nchw,nohw->oc", f(x.astype(float)), f(dy.astype(float)))
                      for f in (np.array, np.abs))
    close(found[:, :, 0, 0], expected, size, dy[:, 0].size)
    # Vectors along the gradient's channels: nothing is transposed.
    assert all(t.n_total == dy.shape[1] and t.b != "transpose" for t in tilings)


@pytest.mark.parametrize("target", targets().values(), ids=targets())
@pytest.mark.parametrize("case", [(5, 45, 48, 12, 9, (1, 1), 0, 1), (3, 192, 16, 28, 28, (1, 1), 0, 1)],
                         ids=str)
def test_weights_of_1x1_in_pieces(case: tuple[Any, ...], target: Target) -> None:
    """Each image is read once, by the task of its piece, the last of which may be short; an update follows.
    The layout is that of a convolution's images."""
    x, w, _, _ = operands(case)
    outs = case[2]
    one = np.eye(outs, dtype=np.float32).reshape(outs, outs, 1, 1)
    b = Builder()
    shapes = (symbol("N"), *x.shape[1:]), w.shape, one.shape
    fx, fw, fo = (b.input(name=name, dtype=F32, shape=shape)
                  for name, shape in zip(("x", "w", "one"), shapes))
    dy = b.conv_input_grad(b.conv(b.conv(fx, fw), fo), fo, spatial=x.shape[2:])
    out = b.sub(fw, b.mul(b.conv_weight_grad(fx, dy, kernel=(1, 1)), 0.5))
    kernels = contractions(graph_of([fx, fw, fo], [out]), target)
    assert any(pointwise_weights(k, target) for k in kernels)
    found, _ = computed(b, [fx, fw, fo], out, [x, w, one], target)
    wide, weights = x.astype(float), w[:, :, 0, 0].astype(float)
    expected, size = (np.einsum("nchw,nohw->oc", f(wide), np.einsum("nchw,oc->nohw", f(wide), f(weights)))
                      for f in (np.array, np.abs))
    close(found[:, :, 0, 0], weights - expected / 2, size + np.abs(weights), x[:, 0].size + x.shape[1])


def test_pieces_of_1x1_weights_are_added_along_memory() -> None:
    """The weights lie side by side, though their last axes have one element: no vector gathers pieces."""
    b = Builder()
    feeds = [b.input(name="x", dtype=F32, shape=(symbol("N"), 48, 12, 9)),
             b.input(name="dy", dtype=F32, shape=(symbol("N"), 12, 9, 32))]
    out = b.conv_weight_grad(feeds[0], b.transpose(feeds[1], perm=(0, 3, 1, 2)), kernel=(1, 1))
    kernels = Compilation(graph_of(feeds, [out]), host_target()).result("tile").kernels.values()
    first, second = kernels
    assert isinstance(first, ContractionKernel) and pointwise_weights(first, host_target()) is not None
    assert isinstance(second, LoopKernel)
    assert [s.kind for s in second.body if isinstance(s, Loop)] == ["lanes"]
    assert not any(e.lanes for e in walk.expressions(second) if isinstance(e, Reduce))


# Places that are cut into rows of 112, of 96 and of 31; more outputs than a row of tiles has.
PLACES: tuple[tuple[Any, ...], ...] = (
    (3, 192, 96, 28, 28, (1, 1), 0, 1),
    (4, 33, 16, 12, 16, (1, 1), 0, 1),
    (1, 40, 176, 29, 31, (1, 1), 0, 1),
)


@pytest.mark.parametrize("target", targets().values(), ids=targets())
@pytest.mark.parametrize("case", PLACES, ids=str)
def test_1x1_from_rows_to_channels_last(case: tuple[Any, ...], target: Target) -> None:
    """With a layout that the product of channels-last images asks for; a bias and a function behind it."""
    x, w, _, _ = operands(case)
    outs = case[2]
    b = Builder()
    shapes = (symbol("N"), *x.shape[1:]), w.shape, (outs, 1, 1), (outs, outs, 1, 1)
    feeds = [b.input(name=name, dtype=F32, shape=shape)
             for name, shape in zip(("x", "w", "bias", "one"), shapes)]
    y = b.conv(feeds[0], feeds[1])
    out = b.conv(b.relu(b.add(y, b.broadcast_to(feeds[2], shape=y.shape))), feeds[3])
    bias = np.linspace(-9, 9, outs).astype(np.float32).reshape(-1, 1, 1)
    ways = [direct(k, target) for k in contractions(graph_of(feeds, [out]), target)]
    assert [how.last for how in ways if how is not None and how.flat] == [True]
    arrays = [x, w, bias, np.eye(outs, dtype=np.float32).reshape(outs, outs, 1, 1)]
    found, _ = computed(b, feeds, out, arrays, target)
    expected, size = (np.einsum("nchw,oc->nohw", f(x.astype(float)), f(w[:, :, 0, 0].astype(float))) + f(bias)
                      for f in (np.array, np.abs))
    close(found, np.maximum(expected, 0), size, w[0].size + 1)
