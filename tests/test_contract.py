"""Contractions and windows beyond the samples of the op table: a grid of convolutions against plain loops,
closure
under differentiation, symbolic shapes, and hard cases of pooling and indexing."""
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import signal
from support import EagerPoint, evaluate_lowering, graph_of, native_program, one_op

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Node, TensorType, topological
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.contract import CONV
from graphflow.compiler.plan.dims import evaluate, symbol
from graphflow.compiler.plan.dtypes import F64
from graphflow.compiler.plan.errors import ShapeError

STRIDES = [(1, 1), (2, 1), (3, 2)]
PADDINGS = [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((2, 0), (0, 3))]
DILATIONS = [(1, 1), (2, 1), (2, 3)]
GROUPS = [1, 2, 4]
GRID = list(itertools.product(STRIDES, PADDINGS, DILATIONS, GROUPS))


def operands(groups: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((2, 4, 9, 8)), rng.standard_normal((4, 4 // groups, 3, 2))


def looped(x: np.ndarray, w: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int) -> np.ndarray:
    """The definition, a multiplication at a time."""
    (n, _, h, v), (o, per, r, s) = x.shape, w.shape
    rows = (h + sum(padding[0]) - dilation[0] * (r - 1) - 1) // stride[0] + 1
    columns = (v + sum(padding[1]) - dilation[1] * (s - 1) - 1) // stride[1] + 1
    out = np.zeros((n, o, rows, columns))
    for image, channel, p, q, a, i, j in itertools.product(*map(range, (n, o, rows, columns, per, r, s))):
        y = p * stride[0] + i * dilation[0] - padding[0][0]
        z = q * stride[1] + j * dilation[1] - padding[1][0]
        if 0 <= y < h and 0 <= z < v:
            out[image, channel, p, q] += x[image, channel // (o // groups) * per + a, y, z] * w[channel, a, i,
                                                                                                j]
    return out


def run(name: str, *arrays: np.ndarray, **attrs: Any) -> np.ndarray:
    """The reference of the op, after its lowering was seen to agree."""
    op = OPS[name]
    _, _, node = one_op(op, arrays, attrs)
    found = op.reference(arrays, node.attrs, node.types)
    for i, expected in enumerate(found):
        np.testing.assert_allclose(evaluate_lowering(op, node, arrays, i), expected, rtol=1e-12, atol=1e-12)
    return found[0]


@pytest.mark.reference
@pytest.mark.parametrize("stride, padding, dilation, groups", GRID)
def test_conv_is_its_definition(stride: Any, padding: Any, dilation: Any, groups: int) -> None:
    x, w = operands(groups)
    found = run("conv", x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    np.testing.assert_allclose(found, looped(x, w, stride, padding, dilation, groups), rtol=1e-12, atol=1e-12)


@pytest.mark.reference
@pytest.mark.parametrize("stride, padding, dilation, groups", GRID)
def test_conv_gradients_are_its_adjoints(stride: Any, padding: Any, dilation: Any, groups: int) -> None:
    """<conv(x, w), dy> = <x, conv_input_grad(dy, w)> = <w, conv_weight_grad(x, dy)>, for the definition's
    conv."""
    x, w = operands(groups)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = looped(x, w, **attrs)
    dy = np.random.default_rng(4).standard_normal(y.shape)
    dx = run("conv_input_grad", dy, w, spatial=x.shape[2:], **attrs)
    dw = run("conv_weight_grad", x, dy, kernel=w.shape[2:], **attrs)
    assert dx.shape == x.shape and dw.shape == w.shape
    np.testing.assert_allclose(np.vdot(x, dx), np.vdot(y, dy), rtol=1e-11)
    np.testing.assert_allclose(np.vdot(w, dw), np.vdot(y, dy), rtol=1e-11)


@pytest.mark.reference
@pytest.mark.parametrize("shape, kernel", [((11,), (4,)), ((5, 7), (3, 2)), ((4, 5, 6), (2, 3, 2))])
def test_conv_against_scipy(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((1, 1, *shape)), rng.standard_normal((1, 1, *kernel))
    np.testing.assert_allclose(run("conv", x, w)[0, 0], signal.correlate(x[0, 0], w[0, 0], "valid"),
                               rtol=1e-11)
    full = signal.convolve(x[0, 0], w[0, 0], "full")
    spatial = tuple(n + k - 1 for n, k in zip(shape, kernel))
    np.testing.assert_allclose(run("conv_input_grad", x, w, spatial=spatial)[0, 0], full, rtol=1e-11,
                               atol=1e-12)


def gradient_ops(node: Node, cotangents: list) -> set[str]:
    """The ops that the gradient adds to the graph."""
    b = cotangents[0][0]
    before = set(topological([v.node for v in (*node.inputs, cotangents[0][1])]))
    found = OPS[node.op].gradient(b, node, [cotangents[0][1]])
    return {n.op for n in topological([v.node for v in found if v is not None]) if n not in before}


@pytest.mark.parametrize("name", ["conv", "conv_input_grad", "conv_weight_grad"])
def test_convolutions_are_closed_under_differentiation(name: str) -> None:
    family = {"conv", "conv_input_grad", "conv_weight_grad"}
    sample = OPS[name].samples()[5]
    b, _, node = one_op(OPS[name], [np.zeros(a.shape) for a in sample.args], sample.attrs)
    cotangent = b.input(name="ct", dtype=F64, shape=node.types[0].shape)
    assert gradient_ops(node, [(b, cotangent)]) == family - {name}


@pytest.mark.parametrize("tx", [False, True])
@pytest.mark.parametrize("ty", [False, True])
def test_matmul_gradients_transpose_nothing(tx: bool, ty: bool) -> None:
    x, y = np.zeros((5, 3) if tx else (3, 5)), np.zeros((4, 5) if ty else (5, 4))
    b, _, node = one_op(OPS["matmul"], [x, y], {"transpose_x": tx, "transpose_y": ty})
    cotangent = b.input(name="ct", dtype=F64, shape=(3, 4))
    assert gradient_ops(node, [(b, cotangent)]) == {"matmul"}


def test_symbolic_shapes() -> None:
    n, h = symbol("N"), symbol("H")
    b = Builder()
    x = b.input(name="x", dtype=F64, shape=(n, 3, h, 2 * h))
    w = b.input(name="w", dtype=F64, shape=(6, 3, 3, 3))
    y = b.conv(x, w, stride=(2, 2), padding=((1, 1), (1, 1)))
    assert y.type == TensorType(F64, (n, 6, (h - 1) // 2 + 1, (2 * h - 1) // 2 + 1))
    assert [evaluate(d, {"N": 5, "H": 7}) for d in y.shape] == [5, 6, 4, 7]
    dx = b.conv_input_grad(y, w, spatial=x.shape[2:], stride=(2, 2), padding=((1, 1), (1, 1)))
    dw = b.conv_weight_grad(x, y, kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    assert dx.shape == x.shape and dw.shape == w.shape
    values, switches = b.max_pool(x, window=2, stride=2)
    assert values.shape == switches.shape == (n, 3, h // 2, h)
    assert b.unpool(values, switches, window=2, stride=2, spatial=x.shape[2:]).shape == x.shape
    flops = OPS["conv"].flops(y.node)
    assert evaluate(flops, {"N": 5, "H": 7}) == 2 * 5 * 6 * 4 * 7 * 27


def test_a_symbolic_kernel_is_refused() -> None:
    b = Builder()
    x = b.input(name="x", dtype=F64, shape=(1, 1, 8))
    w = b.input(name="w", dtype=F64, shape=(1, 1, symbol("K")))
    with pytest.raises(ShapeError, match="kernel of constant size"):
        b.conv(x, w)


def test_no_guards_where_there_is_no_padding() -> None:
    """A convolution without padding reads no element under a condition."""
    guards: list = []

    class Watched(EagerPoint):
        def operand(self, i: int, index: Any, given: Any = (), fill: Any = 0) -> np.ndarray:
            guards.extend(given)
            return super().operand(i, index, given, fill)

    x, w = np.ones((1, 2, 6, 6)), np.ones((2, 2, 3, 3))
    for padding in (0, 1):
        _, _, node = one_op(CONV, [x, w], {"padding": padding})
        p = Watched(node, [x, w])
        parts = CONV.lowering.parts(p)                   # type: ignore[union-attr]
        batch, m, n, k = ([symbol(v) for v, _ in p.loops(*e)] for e in parts[:4])
        parts.a(batch, m, k)
        parts.b(batch, n, k)
        assert len(guards) == 2 * padding


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("inner, columns", [(4099, 1025), (700, 2051), (1, 700)])
def test_few_rows_and_a_large_matrix(rows: int, inner: int, columns: int, dtype: type) -> None:
    """The matrix is read in long runs where it lies, the last one cut short."""
    rng = np.random.default_rng(7)
    x, y = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, inner), (inner, columns)))
    _, inputs, node = one_op(OPS["matmul"], [x, y], {"transpose_x": False, "transpose_y": False})
    graph = graph_of(inputs, [node.result()])
    found = [native_program(graph, threads, guard=True).run([x, y])[0] for threads in (1, 2)]
    np.testing.assert_allclose(found[0], x.astype(np.float64) @ y, rtol=0,
                               atol=1e-10 if dtype is np.float64 else 1e-3)
    np.testing.assert_array_equal(*found)


# --- pooling

@pytest.mark.reference
def test_max_pool_of_nan_and_ties() -> None:
    x = np.array([[1, 3, np.nan, 0], [3, 2, 5, np.nan], [-np.inf, -np.inf, 7, 7], [-np.inf, -np.inf, 7, 7]])
    op = OPS["max_pool"]
    _, _, node = one_op(op, [x[None, None]], {"window": 2, "stride": 2})
    values, switches = op.reference([x[None, None]], node.attrs, node.types)
    np.testing.assert_array_equal(values[0, 0], [[3, np.nan], [-np.inf, 7]])
    np.testing.assert_array_equal(switches[0, 0], [[1, 0], [0, 0]])      # the first maximum, or the first NaN
    np.testing.assert_array_equal(evaluate_lowering(op, node, [x[None, None]], 0), values)
    np.testing.assert_array_equal(evaluate_lowering(op, node, [x[None, None]], 1), switches)


@pytest.mark.reference
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_unpool_undoes_what_max_pool_chose(stride: int, padding: int) -> None:
    """The sum of x where it was chosen, once for each window, is the sum of the maxima."""
    x = np.random.default_rng(6).permutation(98).reshape(1, 2, 7, 7) + 1.0
    attrs = {"window": 3, "stride": stride, "padding": padding}
    values = run("max_pool", x, **attrs)
    _, _, node = one_op(OPS["max_pool"], [x], attrs)
    switches = OPS["max_pool"].reference([x], node.attrs, node.types)[1]
    np.testing.assert_array_equal(run("pool_take", x, switches, **attrs), values)
    counts = run("unpool", np.ones_like(values), switches, spatial=(7, 7), **attrs)
    assert np.sum(counts * x) == np.sum(values) and counts.sum() == values.size
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=-1)
    for p, q in np.ndindex(*values.shape[2:]):
        window = padded[..., p * stride:p * stride + 3, q * stride:q * stride + 3]
        np.testing.assert_array_equal(values[..., p, q], window.max((2, 3)))


@pytest.mark.parametrize("attrs, spatial, reduces", [
    ({"window": 2, "stride": 2}, (6, 8), False),
    ({"window": 2, "stride": 2}, (7, 8), False),
    ({"window": 2, "stride": 3}, (5, 8), False),
    ({"window": 3, "stride": 2}, (7, 7), True),
])
def test_one_window_needs_no_reduction(attrs: dict, spatial: tuple[int, int], reduces: bool) -> None:
    """Windows that do not overlap are sent back without a loop, and without guards where they tile
    exactly."""
    seen: list = []

    class Watched(EagerPoint):
        def reduce(self, *args: Any, **more: Any) -> np.ndarray:
            seen.append("reduce")
            return super().reduce(*args, **more)

        def operand(self, i: int, index: Any, guards: Any = (), fill: Any = 0) -> np.ndarray:
            seen.extend("guard" for _ in guards)
            return super().operand(i, index, guards, fill)

    shape = tuple((n - attrs["window"]) // attrs["stride"] + 1 for n in spatial)
    dy = np.ones((1, 1, *shape))
    op = OPS["window_sum_grad"]
    _, _, node = one_op(op, [dy], {**attrs, "spatial": spatial})
    p = Watched(node, [dy])
    op.lowering.value(p, [symbol(v) for v, _ in p.loops(1, 1, *spatial)], 0)     # type: ignore[union-attr]
    assert ("reduce" in seen) == reduces
    assert ("guard" in seen) == (spatial != (6, 8))


# --- indexing

@pytest.mark.reference
@pytest.mark.parametrize("name, arrays, attrs", [
    ("gather", [np.zeros((3, 2)), np.array([0, 3])], {"axis": 0}),
    ("gather", [np.zeros((3, 2)), np.array([-1])], {"axis": 0}),
    ("scatter_add", [np.array([2]), np.zeros((1, 2))], {"axis": 0, "size": 2}),
    ("take_along_axis", [np.zeros((2, 3)), np.array([[0], [5]])], {"axis": 1}),
    ("put_along_axis_add", [np.array([[-2]]), np.zeros((1, 1))], {"axis": 1, "size": 3}),
    ("pool_take", [np.zeros((1, 1, 2, 2)), np.array([[[[4]]]], np.int32)], {"window": 2, "stride": 2}),
    ("unpool", [np.zeros((1, 1, 1, 1)), np.array([[[[-1]]]], np.int32)],
     {"window": 2, "stride": 2, "spatial": (2, 2)}),
])
def test_indices_out_of_range(name: str, arrays: list, attrs: dict) -> None:
    """The reference raises; the lowering stays in bounds (the point asserts it) and gives numbers."""
    op = OPS[name]
    _, _, node = one_op(op, arrays, attrs)
    with pytest.raises(IndexError):
        op.reference(arrays, node.attrs, node.types)
    assert np.all(evaluate_lowering(op, node, arrays) == 0)


@pytest.mark.reference
def test_scatter_add_adds_what_comes_twice() -> None:
    found = run("scatter_add", np.array([1, 1, 3]), np.array([[1.0, 2], [10, 20], [5, 6]]), axis=0, size=4)
    np.testing.assert_array_equal(found, [[0, 0], [11, 22], [0, 0], [5, 6]])
