"""The forms of generated CUDA C for loops and routines, over a simulated block: chunks of neighbouring
elements, rows that a team holds in registers, reductions that several blocks share, rows of routines."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_host import COMPILER, HostKernels, united

import graphflow as gf
from graphflow.compiler.cuda_target import ANY
from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.cuda import emit_cuda
from graphflow.compiler.kernel.form import Argument, Kernel, RoutineKernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.routines import ROUTINES
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.passes.memory import reads_before_writing
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.dtypes import DTYPES
from graphflow.compiler.plan.schema import Plan

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++ on the PATH to compile the text for the CPU"),
    pytest.mark.xdist_group("cuda loops"),
]
N = gf.dim("N")
Make = Callable[..., Any]


class Net(NamedTuple):
    """A function of feeds, what it must give, sizes to run with, and a part of its text."""

    feeds: tuple[tuple[Any, ...], ...]
    build: Make
    oracle: Make
    sizes: tuple[int, ...]
    text: str
    types: tuple[str, ...] = ()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def layer_norm(x: gf.Tensor) -> gf.Tensor:
    centred = x - gf.mean(x, -1, keepdims=True)
    return centred / gf.sqrt(gf.mean(centred * centred, -1, keepdims=True) + 1e-5)


def batch_norm(x: gf.Tensor) -> gf.Tensor:
    centred = x - gf.mean(x, (0, 2), keepdims=True)
    return centred / gf.sqrt(gf.mean(centred * centred, (0, 2), keepdims=True) + 1e-5)


def batch_norm_oracle(x: np.ndarray) -> np.ndarray:
    return (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)


def gated(x: gf.Tensor, y: gf.Tensor) -> tuple[gf.Tensor, gf.Tensor]:
    axes = (1, 2) if x.shape[0] == 300 else (0, 2)
    out = gf.where(x > 0, y, 0.0)
    return out, gf.sum(out, axes)


def gated_oracle(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.where(x > 0, y, 0)
    return out, out.sum((1, 2) if x.shape[0] == 300 else (0, 2))


def channels_last(x: gf.Tensor) -> gf.Tensor:
    centred = x - gf.mean(x, (0, 1), keepdims=True)
    return centred / gf.sqrt(gf.mean(centred * centred, (0, 1), keepdims=True) + 1e-5)


def channels_last_oracle(x: np.ndarray) -> np.ndarray:
    return (x - x.mean((0, 1), keepdims=True)) / np.sqrt(x.var((0, 1), keepdims=True) + 1e-5)


NETS = {
    # chunks
    "flat, with a tail": Net(
        ((N, 7), (N, 7)), lambda x, y: x * 2 + y, lambda x, y: x * 2 + y, (1, 4, 33), r"points\(gf_width<4>"
    ),
    "two chunks under way": Net(((N, 8192),), lambda x: x + 1, lambda x: x + 1, (1, 3), r"x1\[2\]"),
    "a bias": Net(
        ((N, 5, 12), (5,)),
        lambda x, b: gf.relu(x + gf.reshape(b, (1, 5, 1))),
        lambda x, b: np.maximum(x + b[:, None], 0),
        (1, 9),
        r"\(12 / W\)",
    ),
    "pairs": Net(
        ((N, 3, 6), (3,)),
        lambda x, b: x + gf.reshape(b, (1, 3, 1)),
        lambda x, b: x + b[:, None],
        (1, 7),
        r"gf_width<2>",
    ),
    "symbolic rows": Net(
        ((3, N), (N,)), lambda x, b: x * b, lambda x, b: x * b, (1, 8, 11), r"&& v_N % 4 == 0"
    ),
    "doubles": Net(((N, 10),), lambda x: x * x, lambda x: x * x, (1, 5), r"gf_width<2>", ("float64",)),
    "halves": Net(((N, 24),), lambda x: x + x, lambda x: x + x, (1, 5), r"gf_width<8>", ("float16",)),
    "bytes and floats": Net(
        ((N, 24), (N, 24)),
        lambda m, x: gf.where(m, x, 0.0),
        lambda m, x: np.where(m, x, 0),
        (1, 5),
        r"gf_pack<bool, W>",
        ("bool", "float32"),
    ),
    "shifted": Net(
        ((N, 20),),
        lambda x: x[:, 1:17] - x[:, 4:],
        lambda x: x[:, 1:17] - x[:, 4:],
        (1, 6),
        r"(?s)gf_load<W>.*a0\[\(1 \+",
    ),
    "an embedding": Net(
        ((11, 8), (N,)),
        lambda x, i: gf.gather(x, i),
        lambda x, i: x[i],
        (1, 13),
        r"if \(.*\) x\d = gf_load<W>",
        ("float32", "int64"),
    ),
    "transposed": Net(((N, 36),), lambda x: gf.transpose(x) + 1, lambda x: x.T + 1, (1, 32, 45), r"tile1"),
    "made channels last": Net(
        ((N, 20, 5, 7), (20,)),
        lambda x, b: gf.transpose(x, (0, 2, 3, 1)) * b,
        lambda x, b: x.transpose(0, 2, 3, 1) * b,
        (1, 3),
        r"tile1",
    ),
    # rows in registers
    "softmax, a warp": Net(((N, 100),), gf.softmax, softmax, (1, 19), r"gf_pack<float, 4> x1\[1\]"),
    "softmax, odd": Net(((N, 333),), gf.softmax, softmax, (5,), r"float x1\[11\]"),
    "softmax, a block": Net(((N, 5000),), gf.softmax, softmax, (1, 5), r"bounds__\(256\)(?s:.)*x1\[5\]"),
    "softmax, long": Net(((N, 50002),), gf.softmax, softmax, (1, 3), r"bounds__\(512\)"),
    "softmax, halves": Net(
        ((N, 64),),
        lambda x: gf.cast(gf.softmax(gf.cast(x, "float32")), "float16"),
        lambda x: softmax(x.astype(np.float32)),
        (3,),
        r"gf_pack<unsigned short, 8> x1",
        ("float16",),
    ),
    "softmax, symbolic": Net(((6, N),), gf.softmax, softmax, (1, 31, 700), r""),
    "layer norm": Net(((N, 768),), layer_norm, normalised, (1, 3), r"x1\[6\]"),
    "batch norm": Net(((N, 3, 28),), batch_norm, batch_norm_oracle, (2, 40), r"bounds__\(512\)"),
    "several axes": Net(
        ((N, 6, 5, 8),),
        lambda x: x - gf.max(x, (1, 3), keepdims=True),
        lambda x: x - x.max((1, 3), keepdims=True),
        (1, 4),
        r"",
    ),
    "less the largest": Net(
        ((N, 3000),),
        lambda x: x - gf.max(x, 1, keepdims=True),
        lambda x: x - x.max(1, keepdims=True),
        (7,),
        r"x1\[6\]",
    ),
    "batch norm of known size": Net(((20, 3, 28),), batch_norm, batch_norm_oracle, (1,), r"x1\[\d\]"),
    # rows of several blocks, whose elements are another kernel's
    "few channels": Net(((N, 3, 1024),), batch_norm, batch_norm_oracle, (1, 20), r"88 blocks per row"),
    "few channels, odd": Net(((N, 2, 1111),), batch_norm, batch_norm_oracle, (1, 11), r"132 blocks per row"),
    "two sums of few channels": Net(
        ((N, 5, 1024), (N, 5, 1024)),
        lambda x, y: (x * gf.mean(x * y, (0, 2), keepdims=True) + gf.mean(y, (0, 2), keepdims=True)),
        lambda x, y: x * (x * y).mean((0, 2), keepdims=True) + y.mean((0, 2), keepdims=True),
        (1, 17),
        r"acc1 = [^}]*\n[^}]*acc2 = [^}]*}\s*}",
    ),
    "channels last": Net(
        ((N, 700, 16),), channels_last, channels_last_oracle, (1, 5), r"bounds__\(512\)(?s:.)*acc1s\[4\]"
    ),
    "20 channels last": Net(((N, 700, 20),), channels_last, channels_last_oracle, (1, 5), r"acc1s\[4\]"),
    "6 channels last": Net(((N, 2100, 6),), channels_last, channels_last_oracle, (1, 7), r"acc1s\[2\]"),
    "37 channels last": Net(((N, 700, 37),), channels_last, channels_last_oracle, (1, 5), r"gf_last_block"),
    "halves of channels last": Net(
        ((N, 700, 24),),
        lambda x: channels_last(gf.cast(x, "float32")),
        lambda x: channels_last_oracle(x.astype(np.float64)),
        (1, 5),
        r"acc1s\[8\]",
        ("float16",),
    ),
    "the largest of channels last": Net(
        ((7000, 12),), lambda x: gf.argmax(x, 0), lambda x: x.argmax(0), (1,), r"acc2s\[4\]"
    ),
    # rows of several blocks, whose elements need no result
    "gated": Net(
        ((N, 6, 1024), (N, 6, 1024)), gated, gated_oracle, (1, 11), r"gf_store(?s:.)*if \(!gf_last_block"
    ),
    "gated, odd": Net(((N, 2, 1111), (N, 2, 1111)), gated, gated_oracle, (1, 11), r"x\d\[4\](?s:.)*_done\["),
    "gated, many rows": Net(((300, N, 40), (300, N, 40)), gated, gated_oracle, (3,), r"one block per row"),
    # reductions by several blocks
    "everything": Net(
        ((N, 40),), lambda x: gf.mean(x * x), lambda x: (x * x).mean(), (1, 205, 1000), r"gf_last_block"
    ),
    "a few rows": Net(
        ((3, 8 * N), (3, 8 * N)),
        lambda x, y: (gf.sum(x * y, 1), gf.max(x, 1)),
        lambda x, y: ((x * y).sum(1), x.max(1)),
        (1, 2100),
        r"gf_last_block",
    ),
    "channels": Net(
        ((32, 3, 800),), lambda x: gf.sum(x, (0, 2)), lambda x: x.sum((0, 2)), (1,), r"gf_last_block"
    ),
    "the largest of few": Net(
        ((2, 8 * N),), lambda x: gf.argmax(x, 1), lambda x: x.argmax(1), (1, 3, 2100), r"gf_last_block"
    ),
    "columns": Net(
        ((N, 37),), lambda x: gf.sum(x, 0), lambda x: x.sum(0), (1, 40, 300, 1000), r"gf_last_block"
    ),
    "columns, the largest": Net(
        ((300, 2, N),), lambda x: gf.argmax(x, 0), lambda x: x.argmax(0), (1, 33), r"own"
    ),
    "columns, normalised": Net(
        ((N, 5),), lambda x: gf.softmax(x, 0), lambda x: softmax(x.T).T, (1, 70), r"if \(own\)"
    ),
}


@cache
def programs() -> dict[str, KernelProgram]:
    """All nets, and steps that update states in place."""
    out = {}
    for name, net in NETS.items():
        types = net.types or ("float32",) * len(net.feeds)
        feeds = [gf.input(f"x{i}", shape, dtype) for i, (shape, dtype) in enumerate(zip(net.feeds, types))]
        out[name] = traced(feeds, net.build(*feeds), {})
    return {**out, **steps()}


def traced(feeds: list[gf.Tensor], outputs: Any, updates: dict[gf.Tensor, gf.Tensor]) -> KernelProgram:
    graph = gf.function(feeds, outputs, updates).compilation.result("trace")
    return Compilation(graph, ANY).result("memory")


def steps() -> dict[str, KernelProgram]:
    x = gf.input("x", (N, 96))
    rows, column = gf.parameter((4, 96), 0.0, "rows"), gf.parameter((96,), 0.0, "column")
    w = gf.constant(np.eye(96, dtype=np.float32) * 2)
    y, scale = gf.input("y", (N, 3, 1024)), gf.parameter((3,), 1.0, "scale")
    total = gf.mean(y * y, (0, 2))
    return {
        "read until the end": traced([y], y * gf.reshape(scale, (1, 3, 1)) + gf.reshape(total, (1, 3, 1)),
                                     {scale: scale - total}),
        "in place": traced([x], gf.softmax(x @ w) @ w, {}),
        "updates": traced(
            [x], gf.sum(x), {rows: rows * 0.5 + gf.max(rows, 1, keepdims=True), column: column - gf.sum(x, 0)}
        ),
    }


def values(name: str, n: int) -> list[np.ndarray]:
    net, rng = NETS[name], np.random.default_rng(n)
    out = []
    for shape, dtype in zip(net.feeds, net.types or ("float32",) * len(net.feeds)):
        size = [evaluate(d, {"N": n}) for d in shape]
        made = (
            rng.standard_normal(size)
            if "float" in dtype
            else rng.integers(0, 2 if dtype == "bool" else 11, size)
        )
        out.append(made.astype(dtype))
    return out


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    routines = [as_program(routine(case)) for case in ROUTINE_CASES]
    return HostKernels([*programs().values(), *routines], tmp_path_factory.mktemp("cuda"))


def near(found: np.ndarray, expected: Any, what: str) -> None:
    """To a few roundings of a sum's terms, all of the size of one."""
    expected = np.asarray(expected)
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected, err_msg=what)
        return
    bound = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-14}[found.dtype.name]
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * scale, err_msg=what)


def wide(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]


@pytest.mark.parametrize("name", NETS)
def test_forms(name: str, kernels: HostKernels) -> None:
    net, program = NETS[name], programs()[name]
    assert re.search(net.text, emit_cuda(program)), emit_cuda(program)
    for n in net.sizes:
        feeds = values(name, n)
        outputs, _ = kernels.run(program, {f"x{i}": a for i, a in enumerate(feeds)}, {}, {"N": n})
        expected = net.oracle(*wide(feeds))
        for found, wanted in zip(outputs.values(), expected if isinstance(expected, tuple) else [expected]):
            near(found, wanted, f"{name} of {n}")


def test_in_place(kernels: HostKernels) -> None:
    """A row's results take over the memory of its operand; states are updated where they lie."""
    program, rng = programs()["in place"], np.random.default_rng(1)
    assert any(b.alias for b in program.plan.buffers)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    outputs, _ = kernels.run(program, {"x": x}, {}, {"N": 5})
    near(next(iter(outputs.values())), softmax(2 * x.astype(np.float64)) * 2, "in place")
    state = {"rows": rng.standard_normal((4, 96)), "column": rng.standard_normal(96)}
    state = {k: v.astype(np.float32) for k, v in state.items()}
    for n in (1, 300):
        x = rng.standard_normal((n, 96)).astype(np.float32)
        _, updated = kernels.run(programs()["updates"], {"x": x}, state, {"N": n})
        old = state["rows"].astype(np.float64)
        near(updated["rows"], old * 0.5 + old.max(1, keepdims=True), "rows")
        near(updated["column"], state["column"] - x.astype(np.float64).sum(0), "column")


def test_states_that_elements_read(kernels: HostKernels) -> None:
    """A number of each row is updated when the elements, in a kernel of their own, have read it."""
    program, rng = programs()["read until the end"], np.random.default_rng(3)
    y, scale = rng.standard_normal((9, 3, 1024), np.float32), rng.standard_normal(3, np.float32)
    outputs, updated = kernels.run(program, {"y": y}, {"scale": scale}, {"N": 9})
    total = (y.astype(np.float64) ** 2).mean((0, 2))
    near(next(iter(outputs.values())), y * scale.astype(np.float64)[:, None] + total[:, None], "elements")
    near(updated["scale"], scale - total, "scale")


@pytest.mark.parametrize("name", ["flat, with a tail", "a bias", "softmax, a warp", "halves", "everything"])
def test_arrays_that_begin_anywhere(name: str, kernels: HostKernels) -> None:
    """Views begin at any element, so that packs would not be aligned."""
    net, (kernel,) = NETS[name], programs()[name].kernels.values()
    feeds = [misplaced(a) for a in values(name, 33)]
    expected = np.asarray(net.oracle(*wide(feeds)))
    out = misplaced(np.zeros(expected.shape, "float16" if net.types == ("float16",) else "float32"))
    kernels.launch(kernel, [*feeds, out], {"N": 33})
    near(out, expected, name)


def misplaced(a: np.ndarray) -> np.ndarray:
    """A copy that lies one element behind a multiple of 64 bytes."""
    raw = np.zeros(a.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + a.itemsize
    out = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


@pytest.mark.parametrize("size", [100, 3000])
def test_rows_over_operands(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of each row takes over the memory of one that all threads of its team read until then."""
    import cuda_host

    kernel = parse_kernel(f"""
        kernel k(a0: r f32[5,{size}], a1: r f32[5], a2: w f32[5,{size}], a3: w f32[5]) {{
          grid i0 < 5 {{
            let t1 = max(lanes r1 < {size}: a0[i0, r1])
            lanes i1 < {size} {{
              a2[i0, i1] = add(mul(a0[i0, i1], a1[i0]), t1)
            }}
            a3[i0] = t1
          }}
        }}""")
    x, y = np.random.default_rng(size).standard_normal((2, 5, size)).astype(np.float32)
    scale = np.arange(5, dtype=np.float32)
    expected = x * scale[:, None] + x.max(1, keepdims=True)
    assert reads_before_writing(kernel, "a1", "a3")
    arrays, (right, planted) = [x, scale, y, scale], (tmp_path / "right", tmp_path / "planted")
    for folder in (right, planted):
        folder.mkdir()
    monkeypatch.setattr(cuda_host, "PIECES", 1)
    HostKernels([as_program(kernel)], right).launch(kernel, arrays, {})
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(scale, x.max(1))
    scale[...] = np.arange(5)
    last = r"__sync\w+\(\);(\s*if \(lane == 0\))"
    monkeypatch.setattr(cuda_host, "emit_cuda", lambda p: re.sub(last, r"\1", emit_cuda(p)))
    with pytest.raises(AssertionError, match="depends on the order of threads"):
        HostKernels([as_program(kernel)], planted).launch(kernel, arrays, {})


@pytest.mark.parametrize("column", ["3999 - r1", "r1"])
def test_elements_in_the_pass_of_their_sums(column: str, tmp_path: Path) -> None:
    """Elements are stored while the row is read, unless they may take over what the row has yet to read."""
    read, at_once = column.replace("3999 - r1", "-r1+3999"), column == "r1"
    rows = parse_kernel(f"""
        kernel k(a0: r f32[5,4000], a1: w f32[5,4000], a2: w f32[5]) {{
          grid i0 < 5 {{
            let t1 = sum(lanes r1 < 4000: a0[i0, {read}])
            lanes i1 < 4000 {{
              a1[i0, i1] = mul(a0[i0, i1], f32(2.0))
            }}
            a2[i0] = t1
          }}
        }}""")
    columns = parse_kernel(f"""
        kernel k(a0: r f32[4000,12], a1: w f32[4000,12], a2: w f32[12]) {{
          lanes i1 < 12 {{
            let t1 = sum(r1 < 4000: a0[{read}, i1])
            for i0 < 4000 {{
              a1[i0, i1] = mul(a0[i0, i1], f32(2.0))
            }}
            a2[i1] = t1
          }}
        }}""")
    made = HostKernels(map(as_program, (rows, columns)), tmp_path)
    for kernel, axis in ((rows, 1), (columns, 0)):
        assert reads_before_writing(kernel, "a0", "a1")
        assert (emit_cuda(as_program(kernel)).count("for (idx turn") == 1) == at_once
        shape = kernel.arguments[0].shape
        x = np.random.default_rng(axis).standard_normal(shape, np.float32)
        old, found = x.astype(np.float64), np.zeros(shape[1 - axis], np.float32)
        made.launch(kernel, [x, x, found], {})
        np.testing.assert_array_equal(x, old * 2)
        near(found, old.sum(axis), "sums")


# --- routines: (name, attributes, type, axes before, along and behind, indices)
ROUTINE_CASES = [
    ("scatter_add", {}, "f32", 1, 150, 40, 2500),
    ("scatter_add", {}, "f32", 2, 65, 200, 70),
    ("scatter_add", {}, "f32", 1, 5000, 130, 300),
    ("scatter_add", {}, "i32", 3, 9, 1, 1100),
    ("scatter_set", {}, "f32", 2, 100, 33, 1500),
    ("put_add", {}, "f32", 3, 300, 1, 1200),
    ("put_add", {}, "f32", 2, 30, 64, 45),
    *(
        ("cumulative", {"kind": kind, "reverse": reverse}, dtype, 3, size, behind, 0)
        for kind, reverse, dtype, size, behind in (
            ("sum", False, "f32", 100, 1),
            ("sum", True, "f32", 2600, 2),
            ("max", True, "f32", 1100, 1),
            ("prod", False, "i32", 77, 3),
            ("sum", False, "f64", 50, 64),
            ("min", False, "i64", 33, 1),
        )
    ),
]


def routine(case: tuple[Any, ...]) -> RoutineKernel:
    name, attrs, dtype, before, size, behind, count = case
    axes = {"O": before, "N": size, "I": behind, "K": count}
    types = {"T": dtype, "A": dtype, "J": "i64"}
    arguments = [
        Argument(f.name, DTYPES[types.get(f.dtype, f.dtype)], tuple(axes[a] for a in f.axes), f.mode)
        for f in ROUTINES[name].formals
    ]
    return RoutineKernel(f"k_{name}", tuple(arguments), name, attrs)


def as_program(kernel: Kernel) -> KernelProgram:
    return KernelProgram(Plan("routine", "none", (), (), (), (), (), (), ()), {kernel.name: kernel})


def operands(kernel: RoutineKernel, n: int) -> list[np.ndarray]:
    rng, out = np.random.default_rng(n), []
    for a in kernel.arguments:
        made = rng.standard_normal(a.shape) if a.dtype.is_float else rng.integers(-2, n + 2, a.shape)
        out.append(made.astype(a.dtype.numpy))
    return out


@pytest.mark.parametrize("case", ROUTINE_CASES, ids=lambda c: f"{c[0]}-{'-'.join(map(str, c[2:]))}")
def test_routines(case: tuple[Any, ...], kernels: HostKernels) -> None:
    """To the bit, as each element sees its operands in order; but for running sums of floats."""
    kernel = routine(case)
    arrays = operands(kernel, case[4])
    expected = [a.copy() for a in arrays]
    with np.errstate(all="ignore"):
        ROUTINES[case[0]].run({a.name: x for a, x in zip(kernel.arguments, expected)}, kernel.attrs)
    kernels.launch(kernel, arrays, {})
    if case[2] == "f32" and case[1].get("kind") == "sum":
        exact = arrays[0].astype(np.float64)
        exact = np.flip(np.cumsum(np.flip(exact, 1), 1), 1) if case[1]["reverse"] else np.cumsum(exact, 1)
        near(arrays[-1], exact, str(case))
    else:
        np.testing.assert_array_equal(arrays[-1], expected[-1])


@pytest.mark.parametrize(
    "name, n, planted, replacement, noticed",
    [
        ("flat, with a tail", 33, r"chunks \* 4, total", "chunks * 4, total - 1", "Not equal"),
        (
            "softmax, a block",
            5,
            r"(part\d\[lane / 32\] = acc\d;)\s*__syncthreads\(\);",
            r"\1",
            "depends on the order of threads",
        ),
        ("softmax, a warp", 19, r"if \(chunk >= 100 / 4\) break;", "", "Not equal|outside|depends"),
        (
            "columns",
            300,
            r"(part\d\[\S+ / 32\]\[side\] = acc\d;)\s*__syncthreads\(\);",
            r"\1",
            "depends on the order of threads",
        ),
        ("transposed", 45, r"(\[side\] = [^;]*;\s*})\s*__syncthreads\(\);", r"\1", "depends on the order"),
        ("columns", 300, r"column < columns", "column <= columns", "outside a buffer"),
        (
            "everything",
            1000,
            r"if \(!gf_last_block\([^;]*return;",
            "if (part) return;",
            "depends on the order of threads",
        ),
        (
            "everything",
            1000,
            r"\(part \+ 1\) \* share : chunks",
            "(part + 1) * share : chunks - 1",
            "Not equal",
        ),
        ("a bias", 9, r"const bool wide = [^;]*;", "const bool wide = true;", "not aligned"),
    ],
)
def test_harness_notices(
    name: str,
    n: int,
    planted: str,
    replacement: str,
    noticed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import cuda_host

    program = programs()[name]
    text = emit_cuda(united([program]))
    assert re.search(planted, text), text
    monkeypatch.setattr(cuda_host, "emit_cuda", lambda p: re.sub(planted, replacement, emit_cuda(p)))
    monkeypatch.setattr(cuda_host, "PIECES", 1)
    made = HostKernels([program], tmp_path)
    with pytest.raises(AssertionError, match=noticed):
        if noticed == "not aligned":
            (kernel,) = program.kernels.values()
            feeds = [misplaced(a) for a in values(name, n)]
            made.launch(kernel, [*feeds, misplaced(np.zeros_like(feeds[0]))], {"N": n})
        else:
            feeds = values(name, n)
            outputs, _ = made.run(program, {f"x{i}": a for i, a in enumerate(feeds)}, {}, {"N": n})
            near(next(iter(outputs.values())), NETS[name].oracle(*wide(feeds)), name)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_a_warning_and_spills_nothing(architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    path, options = tmp_path / "kernels.cu", ["-fmad=false", "-std=c++17", "-cubin", f"-arch={architecture}"]
    path.write_text(emit_cuda(united([*programs().values(), *map(as_program, map(routine, ROUTINE_CASES))])))
    options += ["-Werror", "all-warnings", "-Xptxas", "-v", str(path), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(["nvcc", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    assert len(stacks) >= len(NETS) and all(set(found) == {"0"} for found in stacks)
