"""Products of matrices, block by block and panel by panel, against NumPy in float64: odd sizes, transposed
operands, symbolic sizes, updates in place, every target; the same bits however the tasks are dealt out.

Arrays end at (or begin after) a page that cannot be touched.
"""
from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from native_code import fenced, targets

from graphflow.compiler.emit.blocked import BLOCKED, blocked
from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.module import emit_kernel, kernel_scratch, kernel_shared, kernel_tasks
from graphflow.compiler.emit.narrow import narrow
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.emit.thin import THIN, thin
from graphflow.compiler.emit.tiling import contraction_tiling
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.target import Target
from graphflow.runtime.native import load_object

pytestmark = pytest.mark.cpu
TARGETS = targets()
FORMS = ("NN", "NT", "TN", "TT")
SIZES = ((1, 33, 17), (14, 32, 1), (29, 47, 300), (150, 130, 40))


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def product(form: str, sizes: Mapping[str, int], free: str = "", dtype: str = "f32",
            stores: str = "y[i, j] = acc", more: str = "") -> ContractionKernel:
    """A kernel for a product of these sizes M, N and K, of which those in `free` are symbols."""
    names = {s: s if s in free else str(size) for s, size in sizes.items()}
    left, right = ("[k, i]" if form[0] == "T" else "[i, k]"), ("[j, k]" if form[1] == "T" else "[k, j]")
    a, b = ("KM" if form[0] == "T" else "MK"), ("NK" if form[1] == "T" else "KN")
    shapes = [",".join(names[s] for s in shape) for shape in (a, b, "MN")]
    kernel = parse_kernel(f"""contraction c(a: r {dtype}[{shapes[0]}], b: r {dtype}[{shapes[1]}],
        {more.replace('SHAPE', shapes[2])} y: rw {dtype}[{shapes[2]}])
        {f"symbols [{', '.join(sorted(free))}]" if free else ""} {{
        batch [] m [i < {names['M']}] n [j < {names['N']}] k [k < {names['K']}]
        a = a{left} b = b{right}
        {stores} }}""")
    assert isinstance(kernel, ContractionKernel)
    return kernel


def forced(kernel: ContractionKernel, algorithm: int = BLOCKED) -> ContractionKernel:
    """The kernel, to be computed by that algorithm whatever its size."""
    return replace(kernel, contraction=replace(kernel.contraction, tile={"algorithm": algorithm}))


def small(target: Target) -> Target:
    """The target with caches so small that small products have many blocks and strips."""
    return replace(target, l1=2048, l2=8192)


def run(kernel: ContractionKernel, arrays: Mapping[str, np.ndarray], target: Target,
        symbols: Mapping[str, int] | None = None, workers: int = 1, at_end: bool = True
        ) -> dict[str, np.ndarray]:
    """The arguments after the kernel ran on copies of the arrays, its tasks dealt out to some workers."""
    module, symbols = Module(), symbols or {}
    emit_kernel(module, kernel, target)
    steps = [*module.before.values(), (kernel.name, evaluate(kernel_tasks(kernel, target), symbols))]
    library = load_object(compile_object(module.text(), target), "c", [name for name, _ in steps])
    scratch = evaluate(kernel_scratch(kernel, target), symbols)
    shared = evaluate(kernel_shared(kernel, target), symbols)
    assert scratch % 64 == shared % 64 == 0
    area = fenced(np.full((shared + scratch * workers) // 4 + 16, np.nan, np.float32), True)
    place = -(-area.ctypes.data // 64) * 64
    held = {a.name: fenced(arrays[a.name], at_end) for a in kernel.arguments}
    slots = [*(held[a.name].ctypes.data for a in kernel.arguments), *(symbols[s] for s in kernel.symbols),
             place, scratch]
    args = (ctypes.c_int64 * len(slots))(*slots)
    for name, tasks in steps:
        call = library.function(name, None, ctypes.c_void_p, *[ctypes.c_int64] * 3)
        for worker in range(workers):
            call(ctypes.addressof(args), worker * tasks // workers, (worker + 1) * tasks // workers, worker)
    return held


def operands(
    form: str, m: int, n: int, k: int, dtype: str = "f32"
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The arrays of a product, the exact result, and what rounding may do to it."""
    rng, numpy = np.random.default_rng(m + 10 * n + 100 * k), np.dtype(dtype.replace("f", "float"))
    a, b = rng.standard_normal((m, k)).astype(numpy), rng.standard_normal((k, n)).astype(numpy)
    arrays = {"a": a.T if form[0] == "T" else a, "b": b.T if form[1] == "T" else b,
              "y": np.full((m, n), np.nan, numpy)}
    wide = (a.astype(np.float64), b.astype(np.float64))
    bound = np.abs(wide[0]) @ np.abs(wide[1]) * np.finfo(numpy).eps * 8 + 1e-30
    return arrays, wide[0] @ wide[1], bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("free", ["", "MK"])
def test_blocks_of_any_size(m: int, n: int, k: int, form: str, free: str) -> None:
    target = small(TARGETS["host"])
    kernel = product(form, {"M": m, "N": n, "K": k}, free)
    arrays, exact, bound = operands(form, m, n, k)
    symbols = {s: {"M": m, "K": k}[s] for s in free}
    one = run(forced(kernel), arrays, target, symbols)["y"]
    assert np.all(np.abs(one - exact) <= bound)
    for workers in (2, 3):
        other = run(forced(kernel), arrays, target, symbols, workers, at_end=False)["y"]
        np.testing.assert_array_equal(one, other)
    panels = run(kernel, arrays, target, symbols)["y"]
    np.testing.assert_array_equal(one, panels)                  # the order of k is the same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_blocks_on_every_target(form: str, dtype: str, target: Target) -> None:
    kernel = forced(product(form, {"M": 45, "N": 150, "K": 333}, "K", dtype))
    arrays, exact, bound = operands(form, 45, 150, 333, dtype)
    for t in (target, small(target)):
        got = run(kernel, arrays, t, {"K": 333}, 2)["y"]
        assert np.all(np.abs(got - exact) <= bound)


@pytest.mark.parametrize("m, n, k, free", [
    (45, 100, 30, ""), (45, 100, 30, "MK"), (28, 64, 200, "K"), (15, 33, 0, "K"),
])
@pytest.mark.parametrize("algorithm", [0, BLOCKED])
def test_an_update_in_place(m: int, n: int, k: int, free: str, algorithm: int, target: Target) -> None:
    more = "s: rw f32[SHAPE], v: r f32[SHAPE],"
    kernel = product("TN", {"M": m, "N": n, "K": k}, free, more=more, stores="""
        let slot = s[i, j]
        let fresh = add(mul(slot, f32(0.5)), add(acc, v[i, j]))
        let old = y[i, j]
        s[i, j] = fresh
        y[i, j] = sub(old, mul(fresh, f32(0.25)))""")
    kernel = forced(kernel, algorithm)
    arrays, exact, bound = operands("TN", m, n, k)
    rng = np.random.default_rng(5)
    for name in ("s", "v", "y"):
        arrays[name] = rng.standard_normal((m, n)).astype(np.float32)
    symbols = {s: {"M": m, "K": k}[s] for s in free}
    found = [run(kernel, arrays, small(target), symbols, workers) for workers in (1, 3)]
    slot = arrays["s"] * 0.5 + exact + arrays["v"]
    for got in found:
        assert np.all(np.abs(got["s"] - slot) <= bound + 1e-6)
        assert np.all(np.abs(got["y"] - (arrays["y"] - 0.25 * slot)) <= bound + 1e-6)
        np.testing.assert_array_equal(got["y"], found[0]["y"])


@pytest.mark.parametrize("form", FORMS)
def test_large_products_are_computed_block_by_block(form: str) -> None:
    target = TARGETS["host"]
    kernel = product(form, {"M": 700, "N": 520, "K": 600})
    assert blocked(kernel, replace(target, l2=1 << 20)) is not None
    arrays, exact, bound = operands(form, 700, 520, 600)
    got = run(kernel, arrays, target, workers=3)["y"]
    assert np.all(np.abs(got - exact) <= bound)


@pytest.mark.parametrize("form", ["NN", "TN"])
@pytest.mark.parametrize("m, n, k, free", [
    (50, 130, 40, ""), (50, 130, 40, "MK"), (33, 65, 300, "M"), (9, 250, 31, "K"), (3, 300, 20, ""),
    (30, 75, 1200, "K"), (25, 96, 0, "K"), (0, 100, 9, "M"), (70, 64, 1, "M"),
])
def test_a_right_operand_is_read_where_it_lies(
    m: int, n: int, k: int, free: str, form: str, target: Target
) -> None:
    """In place: an element that two panels have must be stored once."""
    kernel = product(form, {"M": m, "N": n, "K": k}, free, more="s: rw f32[SHAPE],", stores="""
        let fresh = add(mul(s[i, j], f32(0.5)), acc)
        s[i, j] = fresh
        y[i, j] = maximum(sub(y[i, j], fresh), f32(0.0))""")
    kernel = forced(kernel, 0)
    arrays, exact, bound = operands(form, m, n, k)
    rng = np.random.default_rng(5)
    arrays["s"], arrays["y"] = (rng.standard_normal((m, n)).astype(np.float32) for _ in range(2))
    symbols = {s: {"M": m, "K": k}[s] for s in free}
    slot = arrays["s"] * 0.5 + exact
    large = replace(target, l2=1 << 20)
    tiled, packed = contraction_tiling(kernel, large), contraction_tiling(kernel, replace(target, l2=0))
    assert tiled.single or (tiled.b == "inline") == (target.vector_bytes == 64)
    assert packed.single or packed.b == "lanes"
    one = run(kernel, arrays, large, symbols)
    assert np.all(np.abs(one["s"] - slot) <= bound + 1e-6)
    assert np.all(np.abs(one["y"] - np.maximum(arrays["y"] - slot, 0)) <= bound + 1e-6)
    for workers, l2 in ((2, large.l2), (3, large.l2), (1, 0)):
        other = run(kernel, arrays, replace(target, l2=l2), symbols, workers, at_end=False)
        np.testing.assert_array_equal(one["s"], other["s"])
        np.testing.assert_array_equal(one["y"], other["y"])


@pytest.mark.parametrize("m, n, k, free", [
    (512, 10, 128, "K"), (65, 6, 1200, "K"), (33, 5, 7, ""), (50, 12, 0, "K"), (35, 11, 1, ""),
])
def test_few_columns_times_a_transposed_matrix(m: int, n: int, k: int, free: str, target: Target) -> None:
    kernel = product("TN", {"M": m, "N": n, "K": k}, free, more="s: rw f32[SHAPE],", stores="""
        let fresh = add(mul(s[i, j], f32(0.5)), acc)
        s[i, j] = fresh
        y[i, j] = sub(y[i, j], mul(fresh, f32(0.25)))""")
    how, lanes = narrow(kernel, target), target.vector_bytes // 4
    assert (how is not None) == (4 < n <= 0.75 * lanes)
    arrays, exact, bound = operands("TN", m, n, k)
    rng = np.random.default_rng(5)
    arrays["s"], arrays["y"] = (rng.standard_normal((m, n)).astype(np.float32) for _ in range(2))
    slot, symbols = arrays["s"] * 0.5 + exact, {"K": k} if free else {}
    panels = run(forced(kernel, 0), arrays, target, symbols)
    for workers, at_end in ((1, True), (2, False), (3, True)):
        got = run(kernel, arrays, target, symbols, workers, at_end)
        assert np.all(np.abs(got["s"] - slot) <= bound + 1e-6)
        assert np.all(np.abs(got["y"] - (arrays["y"] - 0.25 * slot)) <= bound + 1e-6)
        np.testing.assert_array_equal(got["y"], panels["y"])                # the order of k is the same


def test_what_has_no_few_columns_or_asks_otherwise_keeps_its_operands() -> None:
    target = replace(TARGETS["host"], vector_bytes=64, vector_registers=32)
    wanted = product("TN", {"M": 512, "N": 10, "K": 128})
    assert narrow(wanted, target) is not None
    for form, m, n in (("NN", 512, 10), ("TT", 512, 10), ("TN", 512, 4), ("TN", 512, 13), ("TN", 20, 10),
                       ("TN", 512, 10)):
        free = "M" if (form, m, n) == ("TN", 512, 10) else ""
        assert narrow(product(form, {"M": m, "N": n, "K": 128}, free), target) is None
    assert narrow(forced(wanted, 0), target) is None
    assert narrow(product("TN", {"M": 512, "N": 10, "K": 128}, stores="y[i, 9 - j] = acc"), target) is None


@pytest.mark.parametrize("form", ["TN", "TT"])
@pytest.mark.parametrize("m, n, k, free", [
    (128, 320, 64, ""), (45, 333, 100, ""), (37, 450, 33, "M"), (300, 700, 7, ""), (1, 400, 50, ""),
    (0, 400, 50, "M"), (0, 400, 50, ""),
])
def test_a_transposed_left_operand_is_packed_once_for_many_strips(
    m: int, n: int, k: int, free: str, form: str, target: Target
) -> None:
    small_target = small(target)
    kernel = forced(product(form, {"M": m, "N": n, "K": k}, free, more="v: r f32[SHAPE],",
                            stores="y[i, j] = maximum(add(acc, v[i, j]), f32(0.0))"))
    how, panels = blocked(kernel, small_target), blocked(kernel, replace(small_target, l3=0))
    assert how is not None and how.once and panels is not None and not panels.once
    arrays, exact, bound = operands(form, m, n, k)
    arrays["v"] = np.random.default_rng(5).standard_normal((m, n)).astype(np.float32)
    symbols = {"M": m} if free else {}
    one = run(kernel, arrays, small_target, symbols)["y"]
    assert np.all(np.abs(one - np.maximum(exact + arrays["v"], 0)) <= bound + 1e-6)
    for workers, l3 in ((2, small_target.l3), (3, small_target.l3), (1, 0)):
        other = run(kernel, arrays, replace(small_target, l3=l3), symbols, workers, at_end=False)["y"]
        np.testing.assert_array_equal(one, other)


def test_when_a_transposed_left_operand_is_packed_once() -> None:
    target = replace(TARGETS["host"], l2=1 << 20, l3=1 << 25)
    for size, form, once in ((1024, "TN", True), (2048, "TT", True), (2048, "NN", False), (600, "TN", False)):
        how = blocked(product(form, {"M": size, "N": size, "K": size}), target)
        assert how is not None and how.once == once
    for sizes, free in (({"M": 1024, "N": 1024, "K": 1 << 13}, ""), ({"M": 2048, "N": 4096, "K": 128}, "K")):
        how = blocked(product("TN", sizes, free), target)
        assert how is not None and not how.once             # it would not fit, or nobody knows


@pytest.mark.parametrize("places, k, outs", [(169, 30, 40), (5, 17, 64), (48, 300, 32), (1, 5, 33)])
@pytest.mark.parametrize("free", ["", "N"])
def test_a_matrix_for_each_image(places: int, k: int, outs: int, free: str, target: Target) -> None:
    """Channels of images, of which the places follow each other, times one matrix: channels-last results."""
    count = free or "3"
    kernel = parse_kernel(f"""contraction c(
        x: r f32[{count},{k},{places}], w: r f32[{outs},{k}], v: r f32[{outs}],
        y: w f32[{count},{places},{outs}]) {"symbols [N]" if free else ""} {{
        batch [g < {count}] m [o < {outs}] n [i < {places}] k [c < {k}]
        a = w[o, c] b = x[g, c, i]
        y[g, i, o] = maximum(add(acc, v[o]), f32(0.0)) }}""")
    assert isinstance(kernel, ContractionKernel) and blocked(forced(kernel), target) is None
    rng = np.random.default_rng(places)
    shapes = (3, k, places), (outs, k), (outs,)
    x, w, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    arrays = {"x": x, "w": w, "v": v, "y": np.full((3, places, outs), np.nan, np.float32)}
    exact = np.maximum(np.einsum("oc,gci->gio", w.astype(float), x.astype(float)) + v, 0)
    bound = np.einsum("oc,gci->gio", np.abs(w), np.abs(x)) * np.finfo(np.float32).eps * 8 + 1e-6
    for t in (target, small(target)):
        one = run(kernel, arrays, t, {"N": 3} if free else {})["y"]
        assert np.all(np.abs(one - exact) <= bound)
        other = run(kernel, arrays, t, {"N": 3} if free else {}, 3, at_end=False)["y"]
        np.testing.assert_array_equal(one, other)


def test_what_is_small_thin_or_asked_otherwise_is_computed_panel_by_panel() -> None:
    target = replace(TARGETS["host"], l2=1 << 20)
    large = product("NN", {"M": 1024, "N": 1024, "K": 1024})
    assert blocked(large, target) is not None
    for tile in ({"algorithm": 0}, {"mr": 4}, {"kc": 64}):
        assert blocked(replace(large, contraction=replace(large.contraction, tile=tile)), target) is None
    assert blocked(product("NN", {"M": 64, "N": 4096, "K": 4096}), target) is None
    assert blocked(product("NN", {"M": 128, "N": 128, "K": 128}), target) is None
    assert blocked(product("NN", {"M": 1024, "N": 10, "K": 1024}), target) is None


@pytest.mark.parametrize("form", ["NN", "TN"])
@pytest.mark.parametrize("m, n, k", [(1, 16, 3), (16, 530, 50), (19, 70, 24), (65, 100, 40), (0, 64, 9)])
@pytest.mark.parametrize("free", ["", "M"])
def test_few_rows(m: int, n: int, k: int, form: str, free: str, target: Target) -> None:
    kernel = product(form, {"M": m, "N": n, "K": k}, free, more="v: r f32[SHAPE],",
                     stores="y[i, j] = maximum(add(acc, v[i, j]), f32(0.0))")
    if not free and (thin(forced(kernel, THIN), target) is None or m == 0):
        assert m == 0 or m > 64 or n < target.vector_bytes // 4 or m <= 4
        return
    arrays, exact, bound = operands(form, m, n, k)
    arrays["v"] = np.random.default_rng(5).standard_normal((m, n)).astype(np.float32)
    symbols = {"M": m} if free else {}
    for t in (target, small(target)):
        found = [run(forced(kernel, THIN), arrays, t, symbols, workers, at_end)["y"]
                 for workers, at_end in ((1, True), (2, False), (3, True))]
        for got in found:
            assert np.all(np.abs(got - np.maximum(exact + arrays["v"], 0)) <= bound + 1e-6)
            np.testing.assert_array_equal(got, found[0])
        np.testing.assert_array_equal(found[0], run(forced(kernel, 0), arrays, t, symbols)["y"])


def test_a_large_matrix_is_read_as_it_lies_where_rows_may_be_few() -> None:
    target = replace(TARGETS["host"], l2=1 << 20)
    sizes = {"M": 16, "N": 4096, "K": 4096}
    assert thin(product("NN", sizes), target) is not None
    assert thin(product("NN", sizes, "M"), target) is not None
    for other in (product("NT", sizes, "M"), product("NN", {**sizes, "M": 65}), product("NN", sizes, "MK"),
                  product("NN", {**sizes, "N": 64}, "M"), forced(product("NN", sizes), 0)):
        assert thin(other, target) is None
