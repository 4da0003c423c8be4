"""Generated CUDA C: run on the CPU over a simulated block, and compiled by nvcc if there is one."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_host import COMPILER, HostKernels, lowered, united
from nets import lenet_step, mlp_step, values_for
from oracles import ORACLES
from support import float_dtypes, graph_of, make_operands, one_op

from graphflow.compiler.emit.cuda import emit_cuda
from graphflow.compiler.emit.cuda_text import HELPERS, literal
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Op
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, COMPUTED, DTYPES, F32, F64, I32, I64, U8, DType
from graphflow.compiler.plan.errors import UserError

SIZES = (1, 3, 17, 33, 100)
KINDS = ("elementwise", "view", "gather", "window", "reduce", "routine", "contraction")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++ on the PATH to compile the text for the CPU"),
    pytest.mark.xdist_group("cuda text"),  # one process compiles the text of all ops, for all tests here
]


class Case(NamedTuple):
    """An op on operands, as a program."""

    name: str
    arrays: list[np.ndarray]
    node: Node
    program: KernelProgram


def case(op: Op, name: str, arrays: list[np.ndarray], attrs: Any) -> Case:
    _, inputs, node = one_op(op, arrays, attrs)
    return Case(name, arrays, node, lowered(graph_of(inputs, node.results)))


# --- the op table


@cache
def samples() -> dict[str, list[Case]]:
    """Every sample of every op, in each element type."""
    out: dict[str, list[Case]] = {}
    for op in OPS.values():
        for number, sample in enumerate(op.samples() if op.kind in KINDS else ()):
            for dtype in float_dtypes(sample):
                name = f"{op.name}-{number}-{dtype}"
                out.setdefault(op.name, []).append(
                    case(op, name, make_operands(name, sample, dtype), sample.attrs)
                )
    return out


def extremes(dtype: DType) -> list[Any]:
    """Numbers at the edges of an element type."""
    if dtype.is_float:
        tiny = float(np.finfo(dtype.numpy).smallest_subnormal)
        return [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, tiny, 88.0, -104.0, 1e30, np.inf, -np.inf, np.nan]
    if dtype is BOOL:
        return [False, True]
    limits = np.iinfo(dtype.numpy)
    return sorted({limits.min, max(limits.min, -1), 0, 1, 2, 7, limits.max - 1, limits.max})


EDGY = [
    op.name
    for op in OPS.values()
    if op.kind == "elementwise" and op.name not in ("where", "cast", "shift_left", "shift_right")
]


@cache
def edge_cases() -> dict[str, list[Case]]:
    """Every elementwise op of operands of one type on all extremes, in every type that it takes."""
    out: dict[str, list[Case]] = {}
    for op in OPS.values():
        if op.name not in EDGY:
            continue
        for dtype in COMPUTED:
            pairs = list(itertools.product(extremes(dtype), repeat=len(op.operands)))
            arrays = [np.array(column, dtype.numpy) for column in zip(*pairs)]
            try:
                made = case(op, f"{op.name}-{dtype}", arrays, {})
            except UserError:  # the op does not take this type
                continue
            out.setdefault(op.name, []).append(made)
    return out


# --- graphs with a symbolic size: name -> (types of the feeds, the graph, what it must give)


class Net(NamedTuple):
    feeds: tuple[tuple[DType, tuple[Any, ...]], ...]
    build: Callable[..., Any]
    oracle: Callable[..., Any]


N = symbol("N")


def _broadcast(b: Builder, x: Value, row: Value) -> Value:
    return b.mul(
        b.add(x, b.broadcast(row, x.shape)), b.cast(b.iota(shape=x.shape, axis=1, dtype=I64), dtype=F32)
    )


def over_rows(b: Builder, v: Value, x: Value) -> Value:
    """A number for each row of x as a matrix like x."""
    return b.broadcast(b.reshape(v, shape=(x.shape[0], 1)), x.shape)


def _softmax(b: Builder, x: Value) -> Value:
    e = b.exp(b.sub(x, over_rows(b, b.reduce_max(x, axes=(1,)), x)))
    return b.div(e, over_rows(b, b.reduce_sum(e, axes=(1,)), x))


def _softmax_oracle(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _pooled(b: Builder, x: Value) -> tuple[Value, Value]:
    y, switches = b.max_pool(x, window=(3, 3), stride=(2, 2), padding=(1, 1))
    return y, b.unpool(y, switches, window=(3, 3), stride=(2, 2), padding=(1, 1), spatial=(7, 5))


def _pooled_oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    y, back = np.zeros((*x.shape[:2], 4, 3), x.dtype), np.zeros_like(padded)
    for n, c, i, j in np.ndindex(*y.shape):
        window = padded[n, c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        p, q = np.unravel_index(window.argmax(), window.shape)
        y[n, c, i, j] = window[p, q]
        back[n, c, 2 * i + p, 2 * j + q] += window[p, q]
    return y, back[:, :, 1:-1, 1:-1]


NETS = {
    "broadcast": Net(((F32, (N, 7)), (F32, (7,))), _broadcast, lambda x, row: (x + row) * np.arange(7)),
    "transposed": Net(
        ((F32, (N, 5)),), lambda b, x: b.exp(b.transpose(x, perm=(1, 0))), lambda x: np.exp(x.T)
    ),
    "strided": Net(
        ((F64, (N, 9)),),
        lambda b, x: b.neg(b.slice(x, starts=(0, 1), stops=(N, 9), steps=(1, 3))),
        lambda x: -x[:, 1::3],
    ),
    "flipped": Net(
        ((I32, (N, 6)),), lambda b, x: b.add(b.flip(x, axes=(0, 1)), 1), lambda x: x[::-1, ::-1] + 1
    ),
    "padded": Net(
        ((F32, (N, 4)),),
        lambda b, x: b.mul(b.pad(x, low=(2, 1), high=(1, 3), interior=(0, 0), value=0.5), 2.0),
        lambda x: 2 * np.pad(x, ((2, 1), (1, 3)), constant_values=0.5),
    ),
    "pooling": Net(((F32, (N, 2, 7, 5)),), _pooled, _pooled_oracle),
    "columns": Net(
        ((F32, (N, 37)),), lambda b, x: b.reduce_sum(b.mul(x, x), axes=(0,)), lambda x: (x * x).sum(0)
    ),
    "rows": Net(((F32, (40, N)),), lambda b, x: b.reduce_max(x, axes=(1,)), lambda x: x.max(1)),
    "everything": Net(((F64, (N, 41)),), lambda b, x: b.reduce_sum(x, axes=(0, 1)), lambda x: x.sum()),
    "softmax": Net(((F32, (N, 10)),), _softmax, _softmax_oracle),
    "long softmax": Net(((F32, (9, N)),), _softmax, _softmax_oracle),
    "argmax": Net(((F32, (11, N)),), lambda b, x: b.argmax(x, axis=1), lambda x: x.argmax(1)),
    "argmin down": Net(((I32, (N, 70)),), lambda b, x: b.argmin(x, axis=0), lambda x: x.argmin(0)),
    "bytes": Net(
        ((U8, (6, N)),),
        lambda b, x: (b.reduce_sum(x, axes=(1,)), b.reduce_max(x, axes=(1,))),
        lambda x: (x.sum(1, dtype=np.uint8), x.max(1)),
    ),
    "bools": Net(
        ((BOOL, (6, N)),),
        lambda b, x: (b.reduce_any(x, axes=(1,)), b.reduce_all(x, axes=(1,))),
        lambda x: (x.any(1), x.all(1)),
    ),
    "gathered": Net(
        ((F32, (13, 5)), (I64, (N,))), lambda b, x, at: b.gather(x, at, axis=0), lambda x, at: x[at]
    ),
}


def net_graph(net: Net) -> Graph:
    b = Builder()
    inputs = [b.input(name=f"x{i}", dtype=d, shape=shape) for i, (d, shape) in enumerate(net.feeds)]
    made = net.build(b, *inputs)
    return graph_of(inputs, made if isinstance(made, tuple) and not isinstance(made, Value) else [made])


def net_feeds(net: Net, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    out = []
    for dtype, shape in net.feeds:
        size = [n if d is N else d for d in shape]
        values = (
            rng.standard_normal(size) if dtype.is_float else rng.integers(0, 2 if dtype is BOOL else 13, size)
        )
        out.append(values.astype(dtype.numpy))
    return out


@cache
def programs() -> dict[str, KernelProgram]:
    out = {name: lowered(net_graph(net)) for name, net in NETS.items()}
    return {**out, "mlp step": lowered(mlp_step()), "lenet step": lowered(lenet_step())}


# --- on the CPU


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """All kernels of this file, compiled for the CPU."""
    cases = [c for table in (samples(), edge_cases()) for found in table.values() for c in found]
    return HostKernels([*(c.program for c in cases), *programs().values()], tmp_path_factory.mktemp("cuda"))


def compare(found: Any, expected: Any, dtype: DType, name: str) -> None:
    assert found.dtype == dtype.numpy
    if dtype.is_float:
        tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype is F32 else {"rtol": 1e-12, "atol": 1e-12}
        np.testing.assert_allclose(found, expected, **tolerance, err_msg=name)
    else:
        np.testing.assert_array_equal(found, np.asarray(expected).astype(dtype.numpy), err_msg=name)


def run_case(kernels: HostKernels, c: Case, oracle: Callable[..., Any]) -> None:
    outputs, _ = kernels.run(c.program, {f"x{i}": a for i, a in enumerate(c.arrays)}, {}, {})
    with np.errstate(all="ignore"):
        expected = oracle(c.arrays, c.node.attrs)
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    for found, oracle, type in zip(outputs.values(), expected, c.node.types):
        compare(found, oracle, type.dtype, c.name)


@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.kind in KINDS])
def test_op(op: str, kernels: HostKernels) -> None:
    for c in samples()[op]:
        run_case(kernels, c, ORACLES[op])


@pytest.mark.parametrize("op", EDGY)
def test_extremes(op: str, kernels: HostKernels) -> None:
    """Against NumPy's functions, which define what the ops give at the edges (the oracles above do not)."""
    for c in edge_cases()[op]:
        run_case(
            kernels, c, lambda arrays, attrs, types=c.node.types: OPS[op].reference(arrays, attrs, types)
        )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", NETS)
def test_sizes(name: str, n: int, kernels: HostKernels) -> None:
    net, feeds = NETS[name], net_feeds(NETS[name], n)
    outputs, _ = kernels.run(programs()[name], {f"x{i}": a for i, a in enumerate(feeds)}, {}, {"N": n})
    expected = net.oracle(*feeds)
    for found, oracle in zip(outputs.values(), expected if isinstance(expected, tuple) else [expected]):
        compare(found, oracle, next(d for d in DTYPES.values() if d.numpy == found.dtype), f"{name} of {n}")


@pytest.mark.parametrize(
    "name, make, sizes",
    [("mlp step", mlp_step, (1, 17)), ("lenet step", lenet_step, (3,))],
    ids=["mlp", "lenet"],
)
def test_training_step(
    name: str, make: Callable[[], Graph], sizes: tuple[int, ...], kernels: HostKernels
) -> None:
    from graphflow.compiler.passes.autodiff import expand_gradients

    graph = make()
    for n in sizes:
        feeds, state = values_for(graph, n)
        expected = interpret(expand_gradients(graph), feeds, state)
        for found, wanted in zip(kernels.run(programs()[name], feeds, state, {"N": n}), expected):
            assert found.keys() == wanted.keys()
            for key in wanted:
                np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)


# --- the harness itself: what it must notice


@pytest.mark.parametrize(
    "planted, replacement, noticed",
    [
        (r"__syncwarp\(\);", "", "depends on the order of threads"),
        (r"(const int lane = .*;)", r"\1 if (lane == 3) return;", "wait at different places"),
        (r"(if \(lane == 0\) \w+)\[", r"\1[4 + ", "outside a buffer"),
    ],
)
def test_harness_notices(
    planted: str, replacement: str, noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults planted in a kernel that updates a state by rows, and uses its old value in every element: it is
    read behind both reductions, one of which needs the other."""
    import cuda_host

    b = Builder()
    x, w = (
        b.input(name="x", dtype=F32, shape=(4, 99)),
        b.state(name="w", role="parameter", dtype=F32, shape=(4,)),
    )
    total = b.reduce_sum(x, axes=(1,))
    s = b.reduce_max(b.sub(x, over_rows(b, total, x)), axes=(1,))
    y = b.add(b.mul(x, over_rows(b, b.mul(w, 2.0), x)), over_rows(b, s, x))
    program = lowered(Graph("step", (x,), {"y": y}, (b.update(b.add(w, s), name="w").node,)))
    assert [a.mode for k in program.kernels.values() for a in k.arguments].count("rw") == 1
    feeds = {"x": np.arange(396, dtype=np.float32).reshape(4, 99)}
    state = {"w": np.ones(4, np.float32)}
    (tmp_path / "right").mkdir()
    outputs, _ = HostKernels([program], tmp_path / "right").run(program, feeds, state, {})
    highest, sums = feeds["x"].max(1, keepdims=True), feeds["x"].sum(1, keepdims=True)
    np.testing.assert_array_equal(outputs["y"], 2 * feeds["x"] + (highest - sums))
    text = emit_cuda(united([program]))
    assert re.search(planted, text), text
    monkeypatch.setattr(cuda_host, "emit_cuda", lambda p: re.sub(planted, replacement, emit_cuda(p)))
    with pytest.raises(AssertionError, match=noticed):
        HostKernels([program], tmp_path).run(program, feeds, state, {})


# --- the text


def test_literals_are_exact() -> None:
    assert literal(0.1, F32) == "0x1.99999a0000000p-4f" and literal(-2.0, F64) == "(-0x1.0000000000000p+1)"
    assert literal(float("nan"), F32) == "__int_as_float((int)0x7fc00000u)"
    assert literal(float("-inf"), F64) == "__longlong_as_double((i64)0xfff0000000000000ull)"
    assert (
        literal(-(2**63), I64) == "((long long)(-9223372036854775807LL - 1))"
        and literal(True, BOOL) == "true"
    )


def test_text_names_what_it_computes() -> None:
    text = emit_cuda(programs()["mlp step"])
    assert re.search(r"// k_matmul_\w+: a sum of products; ", text)
    assert re.search(r"// k_\w+: applies .*exp.*; reduces by max, sum\n", text)
    assert re.search(r"//   a\d+ f32\[33\] updated: state fc1\.b\n", text)
    assert "__restrict__" not in text


def test_only_used_helpers_are_emitted() -> None:
    text = emit_cuda(programs()["strided"])
    assert not any(re.search(rf"\b{name}\b", text) for name in HELPERS)
    assert "gf_softplus(T x)" in emit_cuda(samples()["softplus"][0].program)


# --- with nvcc


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_a_warning_and_spills_nothing(architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    few = [c.program for found in samples().values() for c in found[:6]]
    path = tmp_path / "kernels.cu"
    path.write_text(emit_cuda(united([*few, *programs().values()])))
    options = ["-fmad=false", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run(
        ["nvcc", *options, str(path), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
    spilled = re.findall(r"properties for (\w+)\n.* ([1-9]\d*) bytes spill stores", done.stderr)
    calls = set(re.findall(r"// (\w+): applies (?:atan|asin|acos)\n.*\n.*double", path.read_text()))
    # a float64 function that nvcc does not inline saves a register around its call
    spilled = [(name, size) for name, size in spilled if name not in calls or int(size) > 8]
    assert "bytes spill stores" in done.stderr and not spilled, spilled
