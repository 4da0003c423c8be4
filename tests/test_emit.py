"""Native kernels against NumPy: each form that the emitters accept, odd sizes, every element type and target.

Arrays end at (or begin after) a page that cannot be touched, so a load or store outside ends the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from native_code import fenced, targets

from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.module import (
    emit_kernel,
    emit_module,
    kernel_scratch,
    kernel_shared,
    kernel_tasks,
)
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.plan.dims import evaluate, symbol
from graphflow.compiler.plan.dtypes import COMPUTED, DTYPES, F32
from graphflow.compiler.plan.schema import Buffer, Check, Copy, Launch, Plan
from graphflow.compiler.target import Target
from graphflow.runtime.native import load_object

pytestmark = pytest.mark.cpu
TARGETS = targets()
SIZES = (0, 1, 3, 17, 33, 100)


def run(
    kernel: Kernel,
    arrays: Mapping[str, np.ndarray],
    symbols: Mapping[str, int] | None = None,
    target: Target | None = None,
    workers: int = 1,
    at_end: bool = True,
) -> dict[str, np.ndarray]:
    """The arguments after the kernel ran on copies of the arrays, its tasks dealt out to some workers."""
    target, symbols = target or TARGETS["host"], symbols or {}
    module = Module()
    emit_kernel(module, kernel, target)
    library = load_object(compile_object(module.text(), target), kernel.name, [kernel.name])
    call = library.function(kernel.name, None, ctypes.c_void_p, *[ctypes.c_int64] * 3)
    tasks = evaluate(kernel_tasks(kernel, target), symbols)
    scratch = evaluate(kernel_scratch(kernel, target), symbols)
    shared = evaluate(kernel_shared(kernel, target), symbols)
    assert scratch % 64 == shared % 64 == 0
    area = np.full(shared + scratch * workers + 64, 255, np.uint8)  # NaN as floats
    held = {a.name: fenced(arrays[a.name], at_end) for a in kernel.arguments}
    slots = [
        *(held[a.name].ctypes.data for a in kernel.arguments),
        *(symbols[s] for s in kernel.symbols),
        -(-area.ctypes.data // 64) * 64,
        scratch,
    ]
    args = (ctypes.c_int64 * len(slots))(*slots)
    for worker in range(workers):
        call(ctypes.addressof(args), worker * tasks // workers, (worker + 1) * tasks // workers, worker)
    return held


def numbers(shape: Any, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Random values of a type: small integers, or floats around 0."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    low = 0 if np.dtype(dtype).kind in "ub" else -9
    return rng.integers(low, 2 if np.dtype(dtype).kind == "b" else 9, shape).astype(dtype)


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


# -- elements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*SIZES, 5000, 70001])
def test_elementwise_over_a_symbolic_length(n: int, target: Target) -> None:
    kernel = parse_kernel("""kernel k(x: r f32[N], c: r f32[], y: w f32[N]) symbols [N] {
        lanes i < N { y[i] = maximum(mul(x[i], c[]), f32(0.0)) } }""")
    x, c = numbers(n), numbers(())
    for at_end in (True, False):
        got = run(kernel, {"x": x, "c": c, "y": np.zeros(n, np.float32)}, {"N": n}, target, 2, at_end)
        np.testing.assert_array_equal(got["y"], np.maximum(x * c, 0))


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("n", [1, 17, 100])
def test_every_type_moves_and_compares(dtype: Any, n: int, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r {dtype}[N], y: r {dtype}[N], z: w {dtype}[N], b: w bool[N])
        symbols [N] {{ lanes i < N {{
            let t = gt(x[i], y[i])
            z[i] = where(t, x[i], y[i])
            b[i] = t }} }}""")
    x, y = numbers(n, dtype.numpy, 1), numbers(n, dtype.numpy, 2)
    got = run(kernel, {"x": x, "y": y, "z": np.zeros_like(x), "b": np.zeros(n, bool)}, {"N": n}, target)
    np.testing.assert_array_equal(got["z"], np.where(x > y, x, y))
    np.testing.assert_array_equal(got["b"], x > y)


@pytest.mark.parametrize("source", COMPUTED, ids=str)
@pytest.mark.parametrize("result", COMPUTED, ids=str)
def test_casts(source: Any, result: Any) -> None:
    kernel = parse_kernel(f"""kernel k(x: r {source}[33], y: w {result}[33]) {{
        lanes i < 33 {{ y[i] = cast<{result}>(x[i]) }} }}""")
    x = np.abs(numbers(33, source.numpy)) if source.kind != "b" else numbers(33, bool)
    got = run(kernel, {"x": x, "y": np.zeros(33, result.numpy)})
    np.testing.assert_array_equal(got["y"], x.astype(result.numpy))


def test_an_update_in_place_reads_the_old_value(target: Target) -> None:
    kernel = parse_kernel("""kernel k(p: rw f32[N], g: r f32[N], s: rw f32[N]) symbols [N] { lanes i < N {
        let old = p[i]
        let slot = s[i]
        s[i] = add(mul(slot, f32(0.5)), g[i])
        p[i] = sub(old, add(mul(slot, f32(0.5)), g[i])) } }""")
    p, g, s = (numbers(77, seed=i) for i in range(3))
    got = run(kernel, {"p": p, "g": g, "s": s}, {"N": 77}, target)
    np.testing.assert_array_equal(got["s"], s * np.float32(0.5) + g)
    np.testing.assert_array_equal(got["p"], p - (s * np.float32(0.5) + g))


@pytest.mark.parametrize("size", [7, 64, 144, 576])
def test_quotients_of_the_lanes_variable(size: int, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r f32[{20 * size}*N], b: r f32[20], y: w f32[{20 * size}*N],
                 z: w i64[{20 * size}*N])
        symbols [N] {{ lanes p < {20 * size}*N {{
            y[p] = add(x[p], b[((p)//{size})%20])
            z[p] = index<i64>((p)%{size} + 3) }} }}""")
    x, b = numbers((3, 20, size)), numbers(20)
    got = run(
        kernel, {"x": x, "b": b, "y": np.zeros_like(x), "z": np.zeros(x.shape, np.int64)}, {"N": 3}, target
    )
    np.testing.assert_array_equal(got["y"], x + b[:, None])
    np.testing.assert_array_equal(got["z"], np.broadcast_to(np.arange(size) + 3, x.shape))


def test_strides_backwards_and_transposed(target: Target) -> None:
    kernel = parse_kernel("""kernel k(x: r f32[50,40], r: w f32[50,40], t: w f32[40,50], e: w f32[50,20],
                 c: w f32[50,13])
        { grid i < 50 {
            lanes j < 40 { r[i, j] = x[i, -j+39]
                           t[j, i] = x[i, j] }
            lanes h < 20 { e[i, h] = x[i, 2*h+1] }
            lanes q < 13 { c[i, q] = x[i, 3*q+1] } } }""")
    x = numbers((50, 40))
    got = run(kernel, {"x": x, "r": x * 0, "t": x.T * 0, "e": x[:, :20] * 0, "c": x[:, :13] * 0}, {}, target)
    np.testing.assert_array_equal(got["r"], x[:, ::-1])
    np.testing.assert_array_equal(got["t"], x.T)
    np.testing.assert_array_equal(got["e"], x[:, 1::2])
    np.testing.assert_array_equal(got["c"], x[:, 1::3])


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_strided_vectors_read_nothing_beyond_the_last_element(stride: int, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r f32[{63 * stride + 1}], y: w f32[64]) {{
        lanes i < 64 {{ y[i] = x[{stride}*i] }} }}""")
    x = numbers(63 * stride + 1)
    got = run(kernel, {"x": x, "y": np.zeros(64, np.float32)}, {}, target)
    np.testing.assert_array_equal(got["y"], x[::stride])


@pytest.mark.parametrize("integer", ["i32", "i64"])
def test_rows_and_elements_chosen_by_loaded_numbers(integer: str, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(t: r f32[50,40], n: r {integer}[N], y: w f32[N,40]) symbols [N] {{
        index g = n[i]
        grid i < N {{ lanes j < 40 {{ y[i, j] = t[g, j] }} }} }}""")
    t, n = numbers((50, 40)), np.random.default_rng(1).integers(0, 50, 30).astype(DTYPES[integer].numpy)
    got = run(kernel, {"t": t, "n": n, "y": np.zeros((30, 40), np.float32)}, {"N": 30}, target)
    np.testing.assert_array_equal(got["y"], t[n])
    kernel = parse_kernel(f"""kernel k(t: r f32[50], n: r {integer}[N], y: w f32[N]) symbols [N] {{
        index g = n[i]
        lanes i < N {{ y[i] = guarded(0 <= g < 50, t[g], f32(-7.0)) }} }}""")
    n = np.random.default_rng(2).integers(-90, 90, 100).astype(DTYPES[integer].numpy)
    got = run(kernel, {"t": t[:, 0], "n": n, "y": np.zeros(100, np.float32)}, {"N": 100}, target)
    np.testing.assert_array_equal(
        got["y"], np.where((n >= 0) & (n < 50), t[np.clip(n, 0, 49), 0], np.float32(-7))
    )


def test_a_loaded_row_under_guards_on_the_lanes(target: Target) -> None:
    kernel = parse_kernel("""kernel k(x: r f32[7], n: r i64[4], y: w f32[4,5]) {
        index g = n[i]
        grid i < 4 { lanes j < 5 {
            y[i, j] = guarded(0 <= g < 3, 0 <= 3*g+j-1 < 7, x[3*g+j-1], f32(0.25)) } } }""")
    x, n = numbers(7), np.array([0, 2, -1, 9])
    at = 3 * n[:, None] + np.arange(5) - 1
    holds = (n[:, None] >= 0) & (n[:, None] < 3) & (at >= 0) & (at < 7)
    got = run(kernel, {"x": x, "n": n, "y": np.zeros((4, 5), np.float32)}, {}, target)
    np.testing.assert_array_equal(got["y"], np.where(holds, x[np.clip(at, 0, 6)], np.float32(0.25)))


def test_guards_on_lanes_rows_and_symbols(target: Target) -> None:
    kernel = parse_kernel("""kernel k(x: r f32[N,M], y: w f32[N+4,M+4]) symbols [M, N] {
        grid i < N+4 { lanes j < M+4 {
            y[i, j] = guarded(0 <= i-2 < N, 0 <= j-2 < M, x[i-2, j-2], f32(9.0)) } } }""")
    for n, m in ((1, 1), (3, 17), (5, 33), (2, 0), (0, 5), (4, 64)):
        x = numbers((n, m))
        for at_end in (True, False):
            got = run(
                kernel,
                {"x": x, "y": np.zeros((n + 4, m + 4), np.float32)},
                {"N": n, "M": m},
                target,
                1,
                at_end,
            )
            np.testing.assert_array_equal(got["y"], np.pad(x, 2, constant_values=9))


def test_a_guard_on_a_remainder(target: Target) -> None:
    kernel = parse_kernel("""kernel k(x: r f32[11], y: w f32[33]) { lanes i < 33 {
        y[i] = guarded(0 <= (i+1)%3 < 1, 0 <= (i+1)//3 < 11, x[(i+1)//3], f32(0.0)) } }""")
    x = numbers(11)
    want = np.array(
        [x[(i + 1) // 3] if (i + 1) % 3 == 0 and (i + 1) // 3 < 11 else 0 for i in range(33)], np.float32
    )
    np.testing.assert_array_equal(run(kernel, {"x": x, "y": want * 0}, {}, target)["y"], want)


# -- reductions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 1), (9, 10), (5, 33), (3, 128), (4, 1000), (0, 4), (4, 0)])
def test_softmax_by_rows(rows: int, columns: int, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r f32[N,{columns}], y: w f32[N,{columns}])
        symbols [N] {{ grid i < N {{
        let m = max(lanes k < {columns}: x[i, k])
        let s = sum(lanes k < {columns}: let d = sub(x[i, k], m), exp(d))
        lanes j < {columns} {{ y[i, j] = div(exp(sub(x[i, j], m)), s) }} }} }}""")
    x = numbers((rows, columns))
    got = run(kernel, {"x": x, "y": x * 0}, {"N": rows}, target, 2)["y"]
    if x.size:
        e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        np.testing.assert_allclose(got, e / e.sum(1, keepdims=True), rtol=4e-6)


@pytest.mark.parametrize(
    "kind, function", [("sum", np.sum), ("prod", np.prod), ("max", np.max), ("min", np.min)]
)
@pytest.mark.parametrize("dtype", ["f32", "f64", "i32", "i64", "u32", "u8"])
def test_reductions_of_rows_and_columns(kind: str, function: Any, dtype: str, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r {dtype}[N,37], r: w {dtype}[N], c: w {dtype}[37]) symbols [N] {{
        for i < N {{ r[i] = {kind}(lanes q < 37: x[i, q]) }}
        lanes j < 37 {{ c[j] = {kind}(p < N: x[p, j]) }} }}""")
    x = numbers((19, 37), DTYPES[dtype].numpy)
    got = run(kernel, {"x": x, "r": x[:, 0] * 0, "c": x[0] * 0}, {"N": 19}, target)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(got["r"], function(x, axis=1, **_same(kind, x)), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["c"], function(x, axis=0, **_same(kind, x)), rtol=1e-5, atol=1e-5)


def _same(kind: str, x: np.ndarray) -> dict[str, Any]:
    return {"dtype": x.dtype} if kind in ("sum", "prod") else {}


@pytest.mark.parametrize("kind, function", [("any", np.any), ("all", np.all)])
def test_any_and_all(kind: str, function: Any, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r bool[N,41], y: w bool[N], z: w bool[N])
        symbols [N] {{ grid i < N {{
        y[i] = {kind}(lanes q < 41: x[i, q])
        z[i] = {kind}(q < 3: x[i, q]) }} }}""")
    x = np.random.default_rng(0).random((40, 41)) < (0.03 if kind == "any" else 0.97)
    got = run(kernel, {"x": x, "y": x[:, 0].copy(), "z": x[:, 0].copy()}, {"N": 40}, target)
    np.testing.assert_array_equal(got["y"], function(x, axis=1))
    np.testing.assert_array_equal(got["z"], function(x[:, :3], axis=1))


@pytest.mark.parametrize("kind, function", [("argmax", np.argmax), ("argmin", np.argmin)])
@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("lanes", ["", "lanes "])
def test_the_first_of_equals_wins_and_nan_beats_all(
    kind: str, function: Any, dtype: Any, lanes: str, target: Target
) -> None:
    kernel = parse_kernel(f"""kernel k(x: r {dtype}[N,45], y: w i64[N]) symbols [N] {{ grid i < N {{
        y[i] = {kind}({lanes}k < 45: x[i, k], index<i64>(k))#1 }} }}""")
    x = numbers((6, 45), dtype.numpy)
    x[2, 5:9] = x[2].max() if kind == "argmax" else x[2].min()
    if dtype.is_float:
        x[1, 7] = x[1, 30] = np.nan
        x[3] = -np.inf if kind == "argmax" else np.inf
    got = run(kernel, {"x": x, "y": np.zeros(6, np.int64)}, {"N": 6}, target)
    np.testing.assert_array_equal(got["y"], function(x, axis=1))


def test_max_pooling_with_padding_and_places(target: Target) -> None:
    kernel = parse_kernel("""kernel k(x: r f32[N,13,13], y: w f32[N,7,7], a: w i32[N,7,7]) symbols [N] {
        grid i < N { grid h < 7 { lanes w < 7 {
            y[i, h, w] = max(r < 3, s < 3:
                guarded(0 <= 2*h+r-1 < 13, 0 <= 2*w+s-1 < 13, x[i, 2*h+r-1, 2*w+s-1], f32(-inf)))
            a[i, h, w] = argmax(r < 3, s < 3:
                guarded(0 <= 2*h+r-1 < 13, 0 <= 2*w+s-1 < 13, x[i, 2*h+r-1, 2*w+s-1], f32(-inf)),
                index<i32>(3*r+s))#1
        } } } }""")
    x = numbers((3, 13, 13))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2].reshape(
        3, 7, 7, 9
    )
    for at_end in (True, False):
        got = run(
            kernel,
            {"x": x, "y": np.zeros((3, 7, 7), np.float32), "a": np.zeros((3, 7, 7), np.int32)},
            {"N": 3},
            target,
            1,
            at_end,
        )
        np.testing.assert_array_equal(got["y"], windows.max(-1))
        np.testing.assert_array_equal(got["a"], windows.argmax(-1))


# -- contractions --------------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1),
    (3, 3, 3),
    (17, 17, 17),
    (33, 33, 33),
    (100, 100, 100),
    (1, 33, 17),
    (33, 1, 5),
    (14, 10, 40),
    (50, 64, 3),
    (128, 10, 512),
    (5, 5, 3000),
    (0, 4, 4),
    (4, 0, 4),
    (4, 4, 0),
]


def product_error(got: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The greatest error of a product, relative to what rounding may cause."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (
        float(np.max(np.abs(got - a @ b) / (np.abs(a) @ np.abs(b) + 1e-9), initial=0))
        / np.finfo(got.dtype).eps
    )


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("form", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("free", ["", "M", "K", "MNK"])
def test_products_of_matrices(m: int, n: int, k: int, form: str, free: str) -> None:
    sizes = {"M": m, "N": n, "K": k}
    names = {s: s if s in free else str(size) for s, size in sizes.items()}
    left, right = ("[k, i]" if form[0] == "T" else "[i, k]"), ("[j, k]" if form[1] == "T" else "[k, j]")
    kernel = parse_kernel(
        """contraction c(a: r f32[{A}], b: r f32[{B}], v: r f32[{N}], y: w f32[{M},{N}]) {free} {{
        batch [] m [i < {M}] n [j < {N}] k [k < {K}]
        a = a{left} b = b{right}
        y[i, j] = add(acc, v[j]) }}""".format(
            A="{K},{M}".format(**names) if form[0] == "T" else "{M},{K}".format(**names),
            B="{N},{K}".format(**names) if form[1] == "T" else "{K},{N}".format(**names),
            free=f"symbols [{', '.join(sorted(free))}]" if free else "",
            left=left,
            right=right,
            **names,
        )
    )
    a, b = numbers((m, k), seed=1), numbers((k, n), seed=2)
    arrays = {
        "a": a.T if form[0] == "T" else a,
        "b": b.T if form[1] == "T" else b,
        "v": np.zeros(n, np.float32),
        "y": np.full((m, n), np.nan, np.float32),
    }
    symbols = {s: sizes[s] for s in free}
    one = run(kernel, arrays, symbols)["y"]
    assert product_error(one, a, b) < 8
    two = run(kernel, arrays, symbols, workers=2, at_end=False)["y"]
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("form", ["NN", "NT"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_products_on_every_target(form: str, dtype: str, target: Target) -> None:
    right = ("[j, k]", "23,40") if form[1] == "T" else ("[k, j]", "40,23")
    kernel = parse_kernel(f"""contraction c(a: r {dtype}[N,40], b: r {dtype}[{right[1]}], y: w {dtype}[N,23])
        symbols [N] {{
        batch [] m [i < N] n [j < 23] k [k < 40]  a = a[i, k] b = b{right[0]}  y[i, j] = acc }}""")
    a, b = numbers((19, 40), DTYPES[dtype].numpy, 1), numbers((40, 23), DTYPES[dtype].numpy, 2)
    got = run(
        kernel,
        {"a": a, "b": b.T if form[1] == "T" else b, "y": np.zeros((19, 23), a.dtype)},
        {"N": 19},
        target,
    )
    assert product_error(got["y"], a, b) < 40


def test_epilogue_with_several_stores_in_place(target: Target) -> None:
    kernel = parse_kernel("""contraction c(x: r f32[N,30], d: r f32[N,21], s: rw f32[30,21], w: rw f32[30,21])
        symbols [N] { batch [] m [i < 30] n [j < 21] k [q < N]  a = x[q, i] b = d[q, j]
        let slot = s[i, j]
        let fresh = add(mul(slot, f32(0.5)), acc)
        let old = w[i, j]
        s[i, j] = fresh
        w[i, j] = sub(old, mul(fresh, f32(0.25))) }""")
    x, d, s, w = (
        numbers((40, 30), seed=1),
        numbers((40, 21), seed=2),
        numbers((30, 21), seed=3),
        numbers((30, 21), seed=4),
    )
    got = run(kernel, {"x": x, "d": d, "s": s, "w": w}, {"N": 40}, target, 2)
    slot = s * 0.5 + x.astype(np.float64).T @ d
    np.testing.assert_allclose(got["s"], slot, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["w"], w - 0.25 * slot, rtol=1e-4, atol=1e-5)


def test_a_left_operand_that_is_computed(target: Target) -> None:
    kernel = parse_kernel("""contraction c(x: r f32[N,30], b: r f32[30,21], y: w f32[N,21]) symbols [N] {
        batch [] m [i < N] n [j < 21] k [k < 30]
        a = guarded(0 <= i+k-3 < 20, maximum(x[i, k], f32(0.0)), f32(0.0)) b = b[k, j]  y[i, j] = acc }""")
    x, b = numbers((11, 30), seed=1), numbers((30, 21), seed=2)
    i, k = np.indices(x.shape)
    left = np.where((i + k >= 3) & (i + k < 23), np.maximum(x, 0), 0)
    assert (
        product_error(
            run(kernel, {"x": x, "b": b, "y": np.zeros((11, 21), np.float32)}, {"N": 11}, target)["y"],
            left,
            b,
        )
        < 8
    )


@pytest.mark.parametrize("left", ["f32(1.0)", "a[]"])
def test_products_without_axes(left: str, target: Target) -> None:
    kernel = parse_kernel(f"""contraction c(a: r f32[], b: r f32[2], y: w f32[]) {{
        batch [] m [] n [] k []  a = {left} b = b[1]  y[] = acc }}""")
    a, b = np.float32(3), np.array([5, 7], np.float32)
    got = run(kernel, {"a": np.array(a), "b": b, "y": np.zeros((), np.float32)}, {}, target)
    assert got["y"] == (7 if left == "f32(1.0)" else 21)


def test_batch_axes_of_one_operand(target: Target) -> None:
    kernel = parse_kernel("""contraction c(x: r f32[B,5,30], w: r f32[30,7], y: w f32[B,5,7])
        symbols [B] { batch [b < B] m [i < 5] n [j < 7] k [k < 30]
        a = x[b, i, k] b = w[k, j]  y[b, i, j] = add(acc, x[b, i, j]) }""")
    x, w = numbers((4, 5, 30), seed=1), numbers((30, 7), seed=2)
    got = run(kernel, {"x": x, "w": w, "y": np.zeros((4, 5, 7), np.float32)}, {"B": 4}, target)
    np.testing.assert_allclose(got["y"], x.astype(np.float64) @ w + x[:, :, :7], rtol=1e-4, atol=1e-5)
    kernel = parse_kernel("""contraction c(w: r f32[5,30], x: r f32[B,30,7], y: w f32[B,5,7]) symbols [B] {
        batch [b < B] m [i < 5] n [j < 7] k [k < 30]  a = w[i, k] b = x[b, k, j]  y[b, i, j] = acc }""")
    w, x = numbers((5, 30), seed=1), numbers((9, 30, 7), seed=2)
    got = run(kernel, {"w": w, "x": x, "y": np.zeros((9, 5, 7), np.float32)}, {"B": 9}, target, 2)
    np.testing.assert_allclose(got["y"], w.astype(np.float64) @ x, rtol=1e-4, atol=1e-5)


def test_pieces_of_a_split_sum_end_with_the_axis(target: Target) -> None:
    kernel = parse_kernel("""contraction c(a: r f32[N,9], b: r f32[N,20], y: w f32[(N+15)//16,9,20])
        symbols [N] {
        batch [s < (N+15)//16] m [i < 9] n [j < 20] k [k < 16]
        a = guarded(0 <= 16*s+k < N, a[16*s+k, i], f32(0.0))
        b = guarded(0 <= 16*s+k < N, b[16*s+k, j], f32(0.0))  y[s, i, j] = acc }""")
    for n in (1, 16, 37):
        a, b = numbers((n, 9), seed=1), numbers((n, 20), seed=2)
        y = run(kernel, {"a": a, "b": b, "y": np.zeros((-(-n // 16), 9, 20), np.float32)}, {"N": n}, target)[
            "y"
        ]
        for s, part in enumerate(y):
            assert product_error(part, a[16 * s : 16 * s + 16].T, b[16 * s : 16 * s + 16]) < 8


@pytest.mark.parametrize("width", [3, 7, 12, 24, 33])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("free", [False, True])
def test_convolution_with_padding(width: int, stride: int, free: bool, target: Target) -> None:
    high, out = 6, (width + 2 - 3) // stride + 1
    rows, columns = (high + 2 - 3) // stride + 1, "W" if free and stride == 1 else str(out)
    wide = "W" if free and stride == 1 else str(width)
    kernel = parse_kernel(f"""contraction c(w: r f32[5,3,3,3], x: r f32[N,3,{high},{wide}],
                      y: w f32[N,5,{rows},{columns}])
        symbols [{"N, W" if wide == "W" else "N"}] {{
        batch [b < N] m [o < 5] n [h < {rows}, v < {columns}] k [c < 3, r < 3, s < 3]
        a = w[o, c, r, s]
        b = guarded(0 <= {stride}*h+r-1 < {high}, 0 <= {stride}*v+s-1 < {wide},
                    x[b, c, {stride}*h+r-1, {stride}*v+s-1], f32(0.0))
        y[b, o, h, v] = acc }}""")
    x, w = numbers((2, 3, high, width), seed=1), numbers((5, 3, 3, 3), seed=2)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    view = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    want = np.einsum("nchvrs,ocrs->nohv", view, w)
    arrays = {"w": w, "x": x, "y": np.zeros(want.shape, np.float32)}
    for at_end in (True, False):
        got = run(kernel, arrays, {"N": 2, "W": width} if wide == "W" else {"N": 2}, target, 2, at_end)
        np.testing.assert_allclose(got["y"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5])
def test_weight_gradient_of_a_convolution_in_blocks(n: int, target: Target) -> None:
    kernel = parse_kernel("""contraction c(d: r f32[N,4,9,10], x: r f32[N,3,9,10], g: w f32[4,3,3,3])
        symbols [N] {
        batch [] m [o < 4] n [c < 3, r < 3, s < 3] k [q < N, h < 9, v < 10]
        tile [kc=100]
        a = d[q, o, h, v]
        b = guarded(0 <= h+r-1 < 9, 0 <= v+s-1 < 10, x[q, c, h+r-1, v+s-1], f32(0.0))
        g[o, c, r, s] = acc }""")
    x, d = numbers((n, 3, 9, 10), seed=1), numbers((n, 4, 9, 10), seed=2)
    view = np.lib.stride_tricks.sliding_window_view(
        np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
    )
    want = np.einsum("nchvrs,nohv->ocrs", view, d)
    got = run(kernel, {"d": d, "x": x, "g": np.zeros((4, 3, 3, 3), np.float32)}, {"N": n}, target)
    np.testing.assert_allclose(got["g"], want, rtol=1e-4, atol=1e-4)


# -- programs ------------------------------------------------------------------------------------------------

Parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@pytest.mark.parametrize("n, passes", [(5, True), (0, True), (9000, True), (5, False)])
def test_an_entry_runs_the_plan_in_order_and_stops_at_a_failed_check(n: int, passes: bool) -> None:
    double = parse_kernel(
        "kernel double(x: r f32[N], y: w f32[N]) symbols [N] { lanes i < N { y[i] = add(x[i], x[i]) } }"
    )
    host, size = TARGETS["host"], symbol("N")
    buffers = (
        Buffer("x", "feed", "x", F32, (size,)),
        Buffer("ok", "feed", "ok", DTYPES["bool"], ()),
        Buffer("h", "arena", "h", F32, (size,)),
        Buffer("y", "output", "y", F32, (size,)),
        Buffer("s", "state", "s", F32, (size,)),
    )
    tasks = kernel_tasks(double, host)
    body = (
        Launch("double", ("x", "h"), tasks),
        Launch("double", ("h", "y"), tasks, origins=(3,)),
        Check("ok", 4),
        Copy("y", "s"),
    )
    plan = Plan("step", host.key(), ("N",), buffers, ("x", "ok"), ("y",), ("s",), ("s",), body)
    text = emit_module(KernelProgram(plan, {"double": double}), host)
    assert "double(h, y) from %3" in text
    library = load_object(compile_object(text, host), "step", ["step"])
    x = numbers(n)
    arrays = [fenced(a) for a in (x, np.array(passes), x * 0, x * 0, x * 0)]
    calls = []

    def parallel(task: int, args: int, count: int, threads: int) -> None:
        calls.append((count, threads))
        Task(task)(args, 0, count, 0)

    table = (ctypes.c_void_p * 5)(*(a.ctypes.data for a in arrays))
    values, forked = (ctypes.c_int64 * 1)(n), Parallel(parallel)
    scratch = (ctypes.c_void_p * 2)()
    context = (ctypes.c_int64 * 5)(
        ctypes.addressof(table),
        ctypes.addressof(values),
        7,
        ctypes.cast(forked, ctypes.c_void_p).value or 0,
        ctypes.addressof(scratch),
    )
    code = library.function("step", ctypes.c_int64, ctypes.c_void_p)(ctypes.addressof(context))
    assert code == (0 if passes else 5)
    np.testing.assert_array_equal(arrays[3], 4 * x)
    np.testing.assert_array_equal(arrays[4], 4 * x if passes else 0 * x)
    count = evaluate(tasks, {"N": n})
    assert calls == ([(count, 7)] * 2 if count > 1 else [])
