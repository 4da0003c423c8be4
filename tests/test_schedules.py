"""Every way in which a contraction may be computed, against NumPy in float64: within the error of its
algorithm, with the same bits on one, two and three threads, nothing read or written outside of buffers,
whatever the alignment of what is fed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from native_code import fenced, targets
from support import graph_of, loaded_program, make_operands, one_op

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.candidates import DIRECT, candidates, special
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Value
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Contract
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32, F64, DType
from graphflow.compiler.target import Target
from graphflow.compiler.tune import Choice, Tuning
from graphflow.runtime.native import load_object

pytestmark = pytest.mark.cpu
TARGETS = targets()
ERRORS = {DIRECT: 8.0, 1: 8.0, 3: 8.0, 6: 8.0, 2: 24.0, 4: 40.0, 5: 40.0}
"""By algorithm: how many roundings of the sum of the absolute products a result may be off. Measured on
normal numbers, with a factor of about three; sums of transformed numbers cancel, the more the larger the
tiles."""


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


# -- programs for each candidate -----------------------------------------------------------------------------


def never(trial: Any) -> Any:
    raise AssertionError("nothing is to be timed")


def schedules(graph: Graph, target: Target) -> Iterator[tuple[int, Compilation]]:
    """The graph compiled with every candidate of its contractions in turn; the first has the cost model's.
    With each, the greatest number of the algorithms in it."""
    plain = Compilation(graph, target)
    kernels = {name: kernel for name, kernel in plain.result("tile").kernels.items()
               if isinstance(kernel, ContractionKernel)}
    found = {name: candidates(kernel, target) for name, kernel in kernels.items()}
    assert found and all(tiles[0] == {} for tiles in found.values())
    for i in range(max(map(len, found.values()))):
        choices = {name: Choice(tiles[min(i, len(tiles) - 1)], 1.0, 1.0, len(tiles))
                   for name, tiles in found.items()}
        tuning = Tuning(never, 1, choices=choices)
        compilation = Compilation(plain.result("lower"), target, "lower", tuning)
        made = compilation.result("tile").kernels
        numbers = [algorithm_of(made[name], target) for name in found]
        yield max(numbers), compilation


def algorithm_of(kernel: Any, target: Target) -> int:
    """The number of the algorithm that computes the kernel; the largest where its emitter has several."""
    found = special(kernel, target)
    if found is None:
        return DIRECT
    return kernel.contraction.tile.get("algorithm", max(found[0].numbers))


def shifted(array: np.ndarray) -> np.ndarray:
    """A copy whose address is a multiple of nothing but the size of its elements."""
    block = np.zeros(array.nbytes + 128, np.uint8)
    start = -block.ctypes.data % 64 + array.itemsize
    out = block[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    assert not array.size or out.ctypes.data % (2 * array.itemsize)
    return out


def strided(array: np.ndarray) -> np.ndarray:
    """The same values, not next to each other."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]) if array.ndim else (2,), array.dtype)
    out = wide[..., 1::2] if array.ndim else wide[1:].reshape(2)[0:1].reshape(())
    out[...] = array
    return out


LAYOUTS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (fenced, shifted, strided)


def results(compilation: Compilation, feeds: Sequence[np.ndarray], state: Mapping[str, np.ndarray]
            ) -> dict[str, np.ndarray]:
    """Outputs and new states, the same bits on one, two and three threads and for feeds in memory of every
    kind, with canaries around everything that is written."""
    plan = compilation.result("plan")
    library = load_object(compilation.object_code(), plan.name, [plan.name])
    found: list[dict[str, np.ndarray]] = []
    for threads, place in zip((1, 2, 3), LAYOUTS):
        program = loaded_program(plan, library, threads, guard=True)
        for name, value in state.items():
            program.store[name] = value
        outputs = program.run([place(feed) for feed in feeds])
        found.append({**{plan.buffer(id).name: value for id, value in zip(plan.outputs, outputs)},
                      **{plan.buffer(id).name: program.store[plan.buffer(id).name] for id in plan.written}})
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
    return found[0]


def check(graph: Graph, feeds: Sequence[np.ndarray], wanted: Mapping[str, np.ndarray],
          sums: Mapping[str, Any], target: Target, state: Mapping[str, np.ndarray] | None = None,
          symbols: Mapping[str, int] | None = None) -> None:
    """Every schedule of the graph gives what is wanted (in float64), with errors relative to `sums`, those of
    the absolute products; and so does the interpreter of kernels."""
    state, named = state or {}, {v.node.attrs["name"]: feed for v, feed in zip(graph.inputs, feeds)}
    for number, (algorithm, compilation) in enumerate(schedules(graph, target)):
        tiles = [dict(k.contraction.tile) for k in compilation.result("memory").kernels.values()
                 if isinstance(k, ContractionKernel)]
        found = [results(compilation, feeds, state)]
        if not number:
            outputs, updates, _ = run_program(compilation.result("memory"), named, state, dict(symbols or {}))
            found.append({**outputs, **updates})
        for values, error in zip(found, (ERRORS[algorithm], ERRORS[DIRECT])):
            for name, expected in wanted.items():
                bound = error * np.finfo(values[name].dtype).eps * sums[name] + 1e-30
                worst = np.max(np.abs(values[name] - expected) / bound, initial=0)
                assert worst <= 1, f"{name} with {tiles}: {worst * error:.1f} roundings, {error:.0f} allowed"


def check_op(name: str, arrays: Sequence[np.ndarray], attrs: Mapping[str, Any], target: Target) -> None:
    """Every schedule of one op against its reference."""
    _, inputs, node = one_op(OPS[name], arrays, attrs)
    wide = [a.astype(np.float64) for a in arrays]
    (wanted,) = OPS[name].reference(wide, node.attrs, node.types)
    (sums,) = OPS[name].reference([np.abs(a) for a in wide], node.attrs, node.types)
    check(graph_of(inputs, [node.result()]), arrays, {"y0": wanted}, {"y0": sums}, target)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# -- matrix products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tx", [False, True])
@pytest.mark.parametrize("ty", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matrix_products(tx: bool, ty: bool, dtype: type) -> None:
    check_product(tx, ty, dtype, TARGETS["host"])


def test_matrix_products_on_every_target(target: Target) -> None:
    check_product(False, True, np.float32, target)


def check_product(tx: bool, ty: bool, dtype: type, target: Target) -> None:
    """Every schedule of a product of odd sizes."""
    m, k, n = 45, 301, 67
    x, y = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, seed=1)
    arrays = [np.ascontiguousarray(a) for a in (x.T if tx else x, y.T if ty else y)]
    check_op("matmul", arrays, {"transpose_x": tx, "transpose_y": ty}, target)


@pytest.mark.parametrize("m, k, n", [(1, 700, 130), (3, 64, 1000), (130, 520, 1), (200, 3, 5), (7, 1030, 33)])
@pytest.mark.parametrize("ty", [False, True])
def test_thin_products(m: int, k: int, n: int, ty: bool) -> None:
    x, y = normal(m, k), normal(*((n, k) if ty else (k, n)), seed=1)
    check_op("matmul", [x, y], {"transpose_x": False, "transpose_y": ty}, TARGETS["host"])


@pytest.mark.parametrize("columns", [4, 8, 16, 32])
def test_a_product_with_what_is_fed_in_panels(columns: int, target: Target) -> None:
    """The columns of b come side by side as the micro-kernel reads them, but at any address."""
    b, x, panels = Builder(), normal(33, 21), normal(3, 21, columns, seed=1)
    left, right = (b.input(name=name, dtype=F32, shape=a.shape) for name, a in (("x", x), ("panels", panels)))
    flat = b.reshape(b.transpose(right, perm=(1, 0, 2)), shape=(21, 3 * columns))
    wide = [x.astype(np.float64), panels.astype(np.float64).transpose(1, 0, 2).reshape(21, -1)]
    check(graph_of([left, right], [b.matmul(left, flat)]), [x, panels], {"y0": wide[0] @ wide[1]},
          {"y0": np.abs(wide[0]) @ np.abs(wide[1])}, target)


@pytest.mark.parametrize("shape", [(3, 17, 40, 33), (65, 5, 9, 6)])
def test_batched_products(shape: tuple[int, int, int, int]) -> None:
    batch, m, k, n = shape
    attrs = {"transpose_x": True, "transpose_y": False}
    check_op("matmul", [normal(batch, k, m), normal(batch, k, n, seed=1)], attrs, TARGETS["host"])


# -- convolutions --------------------------------------------------------------------------------------------

CONVOLUTIONS: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((3, 16, 13, 11), (24, 16, 3, 3), {"padding": 1}),
    ((2, 32, 9, 10), (17, 32, 5, 5), {"padding": ((2, 1), (0, 2))}),
    ((2, 48, 7, 9), (40, 48, 1, 1), {}),
    ((3, 3, 21, 19), (20, 3, 5, 5), {}),
    ((2, 8, 15, 14), (16, 8, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 12, 8, 9), (18, 4, 3, 3), {"padding": 1, "groups": 3}),
)


@pytest.mark.parametrize("name", ["conv", "conv_input_grad", "conv_weight_grad"])
@pytest.mark.parametrize("x, w, attrs", CONVOLUTIONS, ids=str)
def test_convolutions(name: str, x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Any]) -> None:
    y = shape_of(x, w, attrs)
    given = {"conv": ((x, w), {}), "conv_input_grad": ((y, w), {"spatial": x[2:]}),
             "conv_weight_grad": ((x, y), {"kernel": w[2:]})}
    shapes, more = given[name]
    check_op(name, [normal(*s, seed=i) for i, s in enumerate(shapes)], {**attrs, **more}, TARGETS["host"])


def shape_of(x: Sequence[int], w: Sequence[int], attrs: Mapping[str, Any]) -> tuple[int, ...]:
    """Of a convolution's result."""
    b = Builder()
    images, weights = (b.input(name=name, dtype=F32, shape=shape) for name, shape in (("x", x), ("w", w)))
    return tuple(int(d) for d in b.conv(images, weights, **attrs).shape)


@pytest.mark.parametrize("places, images, name", [(3, 2, "host"), (5, 1, "host"), (3, 1, "avx2")])
def test_convolutions_between_channels_last(places: int, images: int, name: str) -> None:
    """Several layers, their gradients too: what lies between them is channels-last. Errors are relative to
    four times the greatest element: one product too few would be seen."""
    if name not in TARGETS:
        pytest.skip(f"this machine has no {name}")

    def outputs(b: Builder, x: Value, w1: Value, w2: Value, w3: Value) -> list[Value]:
        pad = places // 2
        y1 = b.conv(x, w1, padding=pad)
        y2 = b.conv(y1, w2, padding=pad)
        y3 = b.conv(y2, w3, padding=pad)
        d2 = b.conv_input_grad(y3, w3, spatial=tuple(y2.shape[2:]), padding=pad)
        d1 = b.conv_input_grad(d2, w2, spatial=tuple(y1.shape[2:]), padding=pad)
        gradient = b.conv_weight_grad(y1, d2, kernel=(places, places), padding=pad)
        return [b.reduce_sum(d1, axes=(0, 2, 3)), gradient, b.conv_weight_grad(x, d1, kernel=(places, places),
                                                   padding=pad)]

    shapes = {"x": (images, 3, 11, 12), "w1": (16, 3, places, places), "w2": (32, 16, places, places),
              "w3": (16, 32, places, places)}

    def graph(dtype: DType) -> Graph:
        b = Builder()
        values = [b.input(name=name, dtype=dtype, shape=shape) for name, shape in shapes.items()]
        return graph_of(values, outputs(b, *values))

    feeds = [normal(*shape) for shape in shapes.values()]
    wide = {name: feed.astype(np.float64) for name, feed in zip(shapes, feeds)}
    wanted = interpret(graph(F64), wide, {})[0]
    sums = {name: 4 * np.max(np.abs(value)) for name, value in wanted.items()}
    assert "@nhwc" in Compilation(graph(F32), TARGETS[name]).text("schedule")
    check(graph(F32), feeds, wanted, sums, TARGETS[name])


# -- epilogues, symbolic sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 37])
def test_a_product_with_an_update_in_place_and_any_number_of_rows(rows: int) -> None:
    b, n = Builder(), symbol("N")
    x, d = (b.input(name=name, dtype=F32, shape=(n, size)) for name, size in (("x", 50), ("d", 70)))
    w, slot = (b.state(name=name, role="parameter", dtype=F32, shape=(50, 70)) for name in ("w", "slot"))
    fresh = b.add(b.mul(slot, 0.5), b.matmul(x, d, transpose_x=True))
    updates = [b.node("update", (value,), {"name": name}) for name, value in (
        ("w", b.sub(w, b.mul(fresh, 0.25))), ("slot", fresh))]
    graph = Graph("step", (x, d), {"y": b.reduce_sum(x, axes=(1,))}, tuple(updates))
    feeds, state = [normal(rows, 50), normal(rows, 70, seed=1)], {"w": normal(50, 70), "slot": normal(50, 70)}
    wide = [a.astype(np.float64) for a in (*feeds, *state.values())]

    def step(x: np.ndarray, d: np.ndarray, w: np.ndarray, slot: np.ndarray, sign: int
             ) -> dict[str, np.ndarray]:
        fresh = 0.5 * slot + x.T @ d
        return {"y": x.sum(1), "slot": fresh, "w": w + sign * 0.25 * fresh}

    check(graph, feeds, step(*wide, -1), step(*map(abs, wide), 1), TARGETS["host"], state, {"N": rows})


@pytest.mark.parametrize("images", [1, 6])
def test_a_convolution_with_what_follows_it_and_any_batch(images: int) -> None:
    b, n = Builder(), symbol("N")
    x, w, bias, more = (b.input(name=name, dtype=F32, shape=shape) for name, shape in (
        ("x", (n, 16, 11, 9)), ("w", (32, 16, 3, 3)), ("bias", (32,)), ("more", (n, 32, 11, 9))))
    y = b.conv(x, w, padding=1)
    total = b.add(b.add(y, b.broadcast(b.reshape(bias, shape=(32, 1, 1)), y.shape)), more)
    graph = graph_of([x, w, bias, more], [b.relu(total), y])
    feeds = [normal(images, 16, 11, 9), normal(32, 16, 3, 3), normal(32), normal(images, 32, 11, 9, seed=1)]
    wide = [a.astype(np.float64) for a in feeds]

    def step(x: np.ndarray, w: np.ndarray, bias: np.ndarray, more: np.ndarray) -> dict[str, np.ndarray]:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        view = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        y = np.einsum("nchvrs,ocrs->nohv", view, w)
        return {"y0": np.maximum(y + bias[:, None, None] + more, 0), "y1": y}

    check(graph, feeds, step(*wide), step(*map(abs, wide)), TARGETS["host"], symbols={"N": images})


# -- the op table --------------------------------------------------------------------------------------------

SAMPLES = [pytest.param(op.name, i, id=f"{op.name}-{i}") for op in OPS.values()
           if isinstance(op.lowering, Contract) for i in range(len(op.samples()))]


@pytest.mark.parametrize("name, number", SAMPLES)
def test_samples_of_the_op_table(name: str, number: int) -> None:
    sample = OPS[name].samples()[number]
    check_op(name, make_operands(name, sample, F32), sample.attrs, TARGETS["host"])


# -- other kernels -------------------------------------------------------------------------------------------

Make = Callable[[Builder, Value], Value]
OTHERS: dict[str, Make] = {
    "map": lambda b, x: b.exp(b.mul(b.tanh(x), 0.5)),
    "double": lambda b, x: b.mul(b.cast(x, dtype=F64), 0.1),
    "row sums": lambda b, x: b.reduce_sum(x, axes=(1,)),
    "column sums": lambda b, x: b.reduce_sum(x, axes=(0,)),
    "sum": lambda b, x: b.reduce_sum(x, axes=(0, 1)),
    "max": lambda b, x: b.reduce_max(x, axes=(1,)),
    "argmax": lambda b, x: b.argmax(x, axis=1),
    "softmax": lambda b, x: b.div(b.exp(x), b.broadcast(b.reduce_sum(b.exp(x), axes=(0,)), x.shape)),
    "transposed": lambda b, x: b.mul(b.transpose(x, perm=(1, 0)), 2.0),
    "reversed and cut": lambda b, x: b.neg(b.slice(x, starts=(1, 2), stops=(60, 130), steps=(2, 3))),
    "running sums": lambda b, x: b.cumsum(x, axis=1),
    "pool": lambda b, x: b.max_pool(b.reshape(x, shape=(1, 1, *x.shape)), window=(3, 3), stride=(2, 2))[0],
}


@pytest.mark.parametrize("name", OTHERS)
def test_kernels_without_products_at_any_alignment(name: str, target: Target) -> None:
    b, x = Builder(), normal(67, 131)
    value = b.input(name="x", dtype=F32, shape=x.shape)
    graph = graph_of([value], [OTHERS[name](b, value)])
    found = results(Compilation(graph, target), [x], {})["y0"]
    wanted, _, _ = run_program(Compilation(graph, target).result("memory"), {"x": x}, {}, {})
    np.testing.assert_allclose(found, wanted["y0"], rtol=1e-5, atol=1e-5)
