"""Vectorised loops that divide their variable by 2, on every target, against NumPy."""
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
