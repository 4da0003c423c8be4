"""Fast algorithms of convolutions: rewrites and kernels against the references of the op table."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import graph_of, native_program, one_op

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.winograd import winograd
from graphflow.compiler.emit.winograd_weights import winograd_weights
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.joint import optimize_jointly
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.target import host_target

# (x shape, w shape, attributes): convolutions whose input gradient as one contraction wastes much work.
WASTEFUL: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 3, 12, 12), (50, 3, 5, 5), {}),
    ((2, 5, 9, 8), (40, 5, 3, 3), {"stride": 2, "padding": 1}),
    ((3, 4, 8, 8), (32, 4, 1, 1), {"stride": 2}),
    ((1, 4, 17, 13), (24, 4, 3, 4), {"stride": (3, 2), "padding": ((0, 2), (3, 1)), "dilation": (2, 1)}),
    ((2, 6, 11, 10), (81, 2, 4, 3), {"stride": (1, 2), "dilation": (2, 3), "groups": 3}),
    ((2, 3, 31), (64, 3, 5), {"stride": 4, "padding": ((1, 0),)}),
    ((1, 2, 6, 7, 8), (36, 2, 2, 3, 2), {"stride": (2, 1, 3), "padding": ((0, 1), (1, 1), (2, 0))}),
    ((1, 2, 3, 3), (90, 2, 3, 3), {}),
)


def output_shape(x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the convolution's result."""
    _, _, node = one_op(OPS["conv"], [np.zeros(x, np.float32), np.zeros(w, np.float32)], attrs)
    return node.types[0].shape                                    # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("x, w, attrs", WASTEFUL)
def test_input_gradient_by_output(x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Any],
                                  dtype: type) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in (output_shape(x, w, attrs), w)]
    op = OPS["conv_input_grad"]
    _, inputs, node = one_op(op, arrays, {**attrs, "spatial": x[2:]})
    graph = graph_of(inputs, [node.result()])
    joint = optimize_jointly(graph)
    assert {"matmul", "fold"} <= {n.op for n in joint.nodes()} and "conv_input_grad" not in {
        n.op for n in joint.nodes()}
    feeds = dict(zip(("x0", "x1"), arrays))
    (expected,) = op.reference([a.astype(np.float64) for a in arrays], node.attrs, node.types)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is np.float32 else {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(interpret(joint, feeds, {})[0]["y0"], expected, **close)
    found = [native_program(graph, threads).run(arrays)[0] for threads in (1, 2)]
    np.testing.assert_allclose(found[0], expected, **close)
    np.testing.assert_array_equal(*found)


def test_input_gradient_of_any_batch() -> None:
    """The rewriting keeps symbols, of the batch and of the image."""
    rng = np.random.default_rng(2)
    h, n = symbol("H"), symbol("N")
    b = Builder()
    dy = b.input(name="dy", dtype=F32, shape=(n, 64, h, h))
    w = b.input(name="w", dtype=F32, shape=(64, 3, 2, 2))
    graph = graph_of([dy, w], [b.conv_input_grad(dy, w, spatial=(2 * h, 2 * h), stride=2)])
    assert "fold" in {node.op for node in optimize_jointly(graph).nodes()}
    program = native_program(graph)
    for images, size in ((1, 3), (5, 4), (0, 2)):
        shapes = ((images, 64, size, size), (64, 3, 2, 2))
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        feeds = dict(zip(("dy", "w"), arrays))
        np.testing.assert_allclose(program.run(arrays)[0], interpret(graph, feeds, {})[0]["y0"],
                                   rtol=1e-4, atol=1e-4)


def test_padded_input_gradient_stays() -> None:
    """Where the output has as many places as the input, nothing is to be saved."""
    b = Builder()
    dy = b.input(name="dy", dtype=F32, shape=(2, 64, 9, 9))
    w = b.input(name="w", dtype=F32, shape=(64, 8, 3, 3))
    graph = graph_of([dy, w], [b.conv_input_grad(dy, w, spatial=(9, 9), padding=1)])
    assert [n.op for n in optimize_jointly(graph).nodes()] == ["input", "input", "conv_input_grad"]


# --- Winograd's algorithm

# (x shape, output channels, places, padding): tiles in part outside of the image, panels within and across
# images.
SMALL_PLACES: tuple[tuple[tuple[int, ...], int, int, Any], ...] = (
    ((2, 16, 32, 32), 16, 3, 1),
    ((5, 64, 8, 8), 64, 3, 1),
    ((3, 29, 14, 28), 40, 3, 0),
    ((2, 30, 7, 50), 33, 3, ((0, 1), (2, 1))),
    ((40, 48, 4, 4), 48, 3, 1),
    ((7, 32, 13, 13), 40, 5, 2),
    ((1, 61, 16, 70), 24, 5, ((2, 3), (0, 2))),
)


def uses_winograd(graph: Graph) -> bool:
    """Whether some kernel of the graph is computed so."""
    target = host_target()
    kernels = Compilation(graph, target).result("memory").kernels.values()
    return any(isinstance(k, ContractionKernel) and bool(winograd(k, target) or winograd_weights(k, target))
               for k in kernels)


@pytest.mark.parametrize("name", ["conv", "conv_input_grad", "conv_weight_grad"])
@pytest.mark.parametrize("x, channels, places, padding", SMALL_PLACES)
def test_winograd(name: str, x: tuple[int, ...], channels: int, places: int, padding: Any) -> None:
    """About as accurate as a sum of as many products in float32 (gradients for weights of 5 places, whose
    transformation has larger numbers, within twice its error), the same for any number of threads, and within
    its scratch."""
    rng = np.random.default_rng(3)
    w = (channels, x[1], places, places)
    attrs: dict[str, Any] = {"padding": padding}
    y = output_shape(x, w, attrs)
    more = {"conv": {}, "conv_input_grad": {"spatial": x[2:]}, "conv_weight_grad": {"kernel": w[2:]}}
    shapes = {"conv": (x, w), "conv_input_grad": (y, w), "conv_weight_grad": (x, y)}[name]
    attrs |= more[name]
    arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    _, inputs, node = one_op(OPS[name], arrays, attrs)
    graph = graph_of(inputs, [node.result()])
    assert uses_winograd(graph)
    (expected,) = OPS[name].reference([a.astype(np.float64) for a in arrays], node.attrs, node.types)
    found = [native_program(graph, threads, guard=True).run(arrays)[0] for threads in (1, 3)]
    terms = {"conv": x[1] * places ** 2, "conv_input_grad": channels * places ** 2,
             "conv_weight_grad": x[0] * y[2] * y[3]}[name]
    factor = 2 if places == 5 and name == "conv_weight_grad" else 1
    bound = (2e-6 * terms ** 0.5 + 1e-7 * terms) * factor
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=bound)
    np.testing.assert_array_equal(*found)


def test_winograd_with_stores_and_any_batch() -> None:
    """What follows the convolution is computed with it; odd images, and a batch that comes with the call."""
    rng = np.random.default_rng(4)
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(symbol("N"), 32, 11, 9))
    w = b.input(name="w", dtype=F32, shape=(48, 32, 3, 3))
    bias = b.input(name="bias", dtype=F32, shape=(48,))
    more = b.input(name="more", dtype=F32, shape=(symbol("N"), 48, 11, 9))
    y = b.conv(x, w, padding=1)
    y = b.add(y, b.broadcast(b.reshape(bias, shape=(48, 1, 1)), y.shape))
    graph = graph_of([x, w, bias, more], [b.add(b.relu(y), more), y])
    assert uses_winograd(graph)
    for threads in (1, 2):
        program = native_program(graph, threads, guard=True)
        for images in (1, 6, 0):
            shapes = ((images, 32, 11, 9), (48, 32, 3, 3), (48,), (images, 48, 11, 9))
            arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
            feeds = dict(zip(("x", "w", "bias", "more"), arrays))
            expected = interpret(graph, feeds, {})[0]
            for found, key in zip(program.run(arrays), ("y0", "y1")):
                np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-4)


def test_winograd_of_weights_in_place_and_any_batch() -> None:
    """The gradient goes straight into the update of the weights, and pieces of the batch are cut short."""
    rng = np.random.default_rng(5)
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(symbol("N"), 31, 13, 10))
    dy = b.input(name="dy", dtype=F32, shape=(symbol("N"), 24, 13, 10))
    gradient = b.conv_weight_grad(x, dy, kernel=(3, 3), padding=1)
    graph = graph_of([x, dy], [b.add(b.mul(gradient, b.constant(0.5, F32, gradient.shape)), 1.0)])
    assert uses_winograd(graph)
    for threads in (1, 2):
        program = native_program(graph, threads, guard=True)
        for images in (1, 13, 0):
            arrays = [rng.standard_normal((images, c, 13, 10)).astype(np.float32) for c in (31, 24)]
            expected = interpret(graph, dict(zip(("x", "dy"), arrays)), {})[0]["y0"]
            np.testing.assert_allclose(program.run(arrays)[0], expected, rtol=0, atol=4e-4)


@pytest.mark.parametrize("change", [{"dilation": 2}, {"stride": 2}, {"groups": 2}, {"channels": 3},
                                    {"size": 2}])
def test_winograd_is_left_where_it_does_not_fit(change: dict[str, int]) -> None:
    """Other convolutions, and those whose transformations cost more than they save, follow the definition."""
    attrs = {name: n for name, n in change.items() if name in ("dilation", "stride", "groups")}
    channels, size = change.get("channels", 32), change.get("size", 3)
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(4, channels, 16, 16))
    w = b.input(name="w", dtype=F32, shape=(32, channels // attrs.get("groups", 1), size, size))
    assert not uses_winograd(graph_of([x, w], [b.conv(x, w, padding=1, **attrs)]))
