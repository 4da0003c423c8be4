"""Fast algorithms of convolutions: rewrites and kernels against the references of the op table."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import graph_of, native_program, one_op

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.joint import optimize_jointly
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32

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
