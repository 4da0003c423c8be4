"""Vectorised loops that are cut where their guards change, or into even and odd elements, on every target,
against NumPy."""
from __future__ import annotations

import numpy as np
import pytest
from test_emit import TARGETS, numbers, run

from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.module import emit_kernel
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.target import Target

pytestmark = pytest.mark.cpu
SIZES = (1, 2, 3, 7, 30, 31, 32, 33, 63, 64, 65, 257, 1000)


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("symbolic", [False, True])
def test_neighbours_of_halves(n: int, symbolic: bool, target: Target) -> None:
    """Each statement reads, for even and odd elements, what another one reads for the others; nothing
    beyond the last element is read."""
    size, name = ("N", "N") if symbolic else (str(n), "")
    half = f"({size}+1)//2"
    kernel = parse_kernel(f"""kernel k(x: r f32[{half}], w: r f32[{size}], y: w f32[{size}],
                 b: w bool[{size}], z: w i64[{size}])
        symbols [{name}] {{ lanes p < {size} {{
            let t = x[(p)//2]
            y[p] = add(mul(t, w[p]), guarded(0 <= (p+1)//2 < {half}, x[(p+1)//2], f32(7.0)))
            b[p] = gt(guarded(0 <= (p)//2-1 < {half}, x[(p)//2-1], f32(0.0)), t)
            z[p] = index<i64>(3*((p)%2) + (p)//2) }} }}""")
    x, w = numbers((n + 1) // 2), numbers(n, seed=1)
    out = {"y": np.zeros(n, np.float32), "b": np.zeros(n, bool), "z": np.zeros(n, np.int64)}
    got = run(kernel, {"x": x, "w": w, **out}, {"N": n} if symbolic else {}, target)
    p = np.arange(n)
    after, before = np.append(x, np.float32(7)), np.append(np.float32(0), x)
    np.testing.assert_array_equal(got["y"], x[p // 2] * w + after[(p + 1) // 2])
    np.testing.assert_array_equal(got["b"], before[p // 2] > x[p // 2])
    np.testing.assert_array_equal(got["z"], 3 * (p % 2) + p // 2)


@pytest.mark.parametrize("n", SIZES)
def test_what_is_overwritten_is_read_before(n: int, target: Target) -> None:
    kernel = parse_kernel(f"""kernel k(x: r f32[{(n + 1) // 2}], w: rw f32[{n}]) symbols [] {{
        lanes p < {n} {{
            let t = w[p]
            w[p] = sub(t, x[(p)//2]) }} }}""")
    x, w = numbers((n + 1) // 2), numbers(n, seed=1)
    got = run(kernel, {"x": x, "w": w.copy()}, {}, target)
    np.testing.assert_array_equal(got["w"], w - x[np.arange(n) // 2])


@pytest.mark.parametrize("stride", [1, 2])
def test_even_and_odd_elements_are_woven_without_scatters(stride: int) -> None:
    kernel = parse_kernel(f"""kernel k(x: r f32[8,50], y: w f32[8,{100 * stride}]) symbols [] {{
        grid i < 8 {{ lanes p < 100 {{ y[i, {stride}*p] = x[i, (p)//2] }} }} }}""")
    module = Module()
    emit_kernel(module, kernel, TARGETS["host"])
    assert ("scatter" in module.text()) == (stride == 2)
    x, y = numbers((8, 50)), np.zeros((8, 100 * stride), np.float32)
    got = run(kernel, {"x": x, "y": y}, {}, TARGETS["host"])
    np.testing.assert_array_equal(got["y"][:, ::stride], np.repeat(x, 2, axis=1))


@pytest.mark.parametrize("sizes", [(128, 128, 128, 128), (33, 1, 95), (40, 40), (200, 7, 33, 64), (32,) * 9])
@pytest.mark.parametrize("rows", [1, 5])
def test_parts_of_a_concatenation(sizes: tuple[int, ...], rows: int, target: Target) -> None:
    """Gathered into one array, whose old value is subtracted, and read again beyond the parts."""
    starts, total = np.cumsum((0, *sizes))[:-1], sum(sizes)
    parts = [numbers((rows, n), seed=i) for i, n in enumerate(sizes)]
    arguments = ", ".join(f"x{i}: r f32[{rows},{n}]" for i, n in enumerate(sizes))
    value = "f32(0.0)"
    for i, (at, n) in enumerate(zip(starts, sizes)):
        value = f"add({value}, guarded(0 <= p-{at} < {n}, x{i}[i, p-{at}], f32(0.0)))"
    kernel = parse_kernel(f"""kernel k({arguments}, y: rw f32[{rows},{total}]) symbols [] {{
        grid i < {rows} {{ lanes p < {total} {{
            let old = y[i, p]
            y[i, p] = sub({value}, old) }} }} }}""")
    y = numbers((rows, total), seed=99)
    given = {f"x{i}": x for i, x in enumerate(parts)}
    got = run(kernel, {**given, "y": y.copy()}, {}, target)
    np.testing.assert_array_equal(got["y"], np.concatenate(parts, 1) - y)


def test_long_parts_of_a_concatenation_have_no_masks() -> None:
    """Of two parts; padding by one element is not worth a loop of its own."""
    for at, masks in ((64, False), (127, True)):
        kernel = parse_kernel(f"""kernel k(x: r f32[8,{at}], y: w f32[8,128]) symbols [] {{
            grid i < 8 {{ lanes p < 128 {{
                y[i, p] = guarded(0 <= p < {at}, x[i, p], f32(0.0)) }} }} }}""")
        module = Module()
        emit_kernel(module, kernel, TARGETS["host"])
        assert ("masked" in module.text()) == masks


SUMS = """kernel k(x: r f32[R,C], s: w f32[R], m: w f32[R], a: w i64[R], v: w f32[R], t: w f32[R])
    symbols [R, C] {{ grid i < R {{
        let s1 = sum(lanes j < C: x[i, j])
        let m1 = max(lanes k < C: x[i, k])
        let c1 = mul(s1, f32(0.5))
        let v1 = sum(lanes l < C: mul(sub(x[i, l], c1), m1))
        let a1 = argmax(lanes p < C: x[i, p], index<i64>(p))#1
        let t1 = sum(q < C: mul(x[i, q], {factor}))
        s[i] = s1
        m[i] = m1
        a[i] = a1
        v[i] = v1
        t[i] = t1 }} }}"""


@pytest.mark.parametrize("columns", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("factor", ["x[i, q]", "s1", "v1"])
def test_reductions_that_share_a_loop(columns: int, factor: str, target: Target) -> None:
    """Sums, a maximum and its place together; what needs their results comes behind."""
    x = numbers((3, columns))
    out = {name: np.zeros(3, np.float32) for name in "smvt"}
    got = run(parse_kernel(SUMS.format(factor=factor)), {"x": x, "a": np.zeros(3, np.int64), **out},
              {"R": 3, "C": columns}, target)
    wide = x.astype(np.float64)
    total = wide.sum(1)
    last = ((wide - total[:, None] / 2) * wide.max(1)[:, None]).sum(1)
    factors = {"x[i, q]": wide, "s1": total[:, None], "v1": last[:, None]}
    np.testing.assert_array_equal(got["m"], x.max(1))
    np.testing.assert_array_equal(got["a"], x.argmax(1))
    for name, expected in (("s", total), ("v", last), ("t", (wide * factors[factor]).sum(1))):
        bound = 1e-5 * columns * np.maximum(1, np.abs(expected))
        assert np.all(np.abs(got[name] - expected) <= bound), name


def test_what_joined_reductions_read_is_loaded_once() -> None:
    loads = []
    for second in ("x[i, k]", "mul(x[i, k], x[i, k])", "mul(x[i, k], s1)"):
        kernel = parse_kernel(f"""kernel k(x: r f32[8,128], s: w f32[8], t: w f32[8]) symbols [] {{
            grid i < 8 {{
                let s1 = sum(lanes j < 128: x[i, j])
                let t1 = sum(lanes k < 128: {second})
                s[i] = s1
                t[i] = t1 }} }}""")
        module = Module()
        emit_kernel(module, kernel, TARGETS["host"])
        loads.append(module.text().count("load <"))
    assert loads == [1, 1, 2]
