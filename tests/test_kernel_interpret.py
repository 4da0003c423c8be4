"""The interpreter of kernels and programs: values against NumPy and SciPy, every op through it, and each
thing that a kernel must not do."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import lenet_step, values_for
from scipy import signal, special
from support import dtype_of, graph_of, make_operands, one_op

from graphflow.compiler.driver import Compilation
from graphflow.compiler.interpret import interpret
from graphflow.compiler.kernel import interpret as interpreter
from graphflow.compiler.kernel.interpret import run_kernel
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.kernel.text import parse_kernel, parse_program
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Op, Sample
from graphflow.compiler.plan.bind import bind
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.errors import CompilerError, FeedError
from graphflow.compiler.target import host_target

SOFTMAX = """
kernel softmax(x: r f32[N,10], y: w f32[N,10]) symbols [N] {
  grid i < N {
    let m = max(lanes k < 10: x[i, k])
    let s = sum(lanes k < 10: exp(sub(x[i, k], m)))
    lanes j < 10 { y[i, j] = div(exp(sub(x[i, j], m)), s) }
  }
}
"""
MATMUL = """
contraction matmul(x: r f32[B,N,7], w: r f32[B,7,5], c: r f32[5], y: w f32[B,N,5]) symbols [B, N] {
  batch [h < B] m [i < N] n [j < 5] k [l < 7]
  a = x[h, i, l]
  b = w[h, l, j]
  let t = add(acc, c[j])
  y[h, i, j] = maximum(t, f32(0.0))
}
"""
CONV = """
contraction conv(w: r f64[6,3,3,2], x: r f64[N,3,8,9], y: w f64[N,6,4,10]) symbols [N] {
  batch [b < N] m [o < 6] n [p < 4, q < 10] k [c < 3, r < 3, s < 2]
  a = w[o, c, r, s]
  b = guarded(0 <= 2*p+r-1 < 8, 0 <= q+s-1 < 9, x[b, c, 2*p+r-1, q+s-1], f64(0.0))
  y[b, o, p, q] = acc
}
"""


def run(text: str, symbols: dict[str, int] | None = None, **arrays: np.ndarray) -> None:
    run_kernel(parse_kernel(text), arrays, symbols or {})


@pytest.fixture(params=[1 << 21, 1, 100], ids=["whole", "single", "pieces"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with pieces of several sizes."""
    monkeypatch.setattr(interpreter, "PIECE", request.param)


@pytest.mark.reference
@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("n", [0, 1, 13])
def test_softmax(n: int) -> None:
    x = np.random.default_rng(0).standard_normal((n, 10)).astype(np.float32)
    y = np.full_like(x, np.nan)
    run(SOFTMAX, {"N": n}, x=x, y=y)
    np.testing.assert_allclose(y, special.softmax(x, axis=1), rtol=1e-6)


@pytest.mark.reference
@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("n, batch", [(3, 4), (1, 1), (0, 2), (2, 0)])
def test_matmul(n: int, batch: int) -> None:
    rng = np.random.default_rng(1)
    x, w, c = (rng.standard_normal(s).astype(np.float32) for s in ((batch, n, 7), (batch, 7, 5), (5,)))
    y = np.full((batch, n, 5), np.nan, np.float32)
    run(MATMUL, {"N": n, "B": batch}, x=x, w=w, c=c, y=y)
    np.testing.assert_allclose(y, np.maximum(np.einsum("bik,bkj->bij", x, w) + c, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.reference
@pytest.mark.usefixtures("piece")
def test_conv() -> None:
    rng = np.random.default_rng(2)
    w, x = rng.standard_normal((6, 3, 3, 2)), rng.standard_normal((2, 3, 8, 9))
    y = np.full((2, 6, 4, 10), np.nan)
    run(CONV, {"N": 2}, w=w, x=x, y=y)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    for n, o in np.ndindex(2, 6):
        expected = sum(signal.correlate(padded[n, c], w[o, c], "valid") for c in range(3))
        np.testing.assert_allclose(y[n, o], expected[::2], rtol=1e-10)


@pytest.mark.reference
@pytest.mark.usefixtures("piece")
def test_reductions() -> None:
    """Every kind, over two axes at once, with NaN and ties; and over nothing."""
    text = """
    kernel k(x: r f32[5,4,6], z: r f32[5,0], s: w f32[5], p: w f32[5], h: w f32[5], l: w f32[5], a: w i32[5],
             b: w i32[5], y: w bool[5], e: w bool[5], none: w f32[5], first: w i32[5]) {
      grid i < 5 {
        s[i] = sum(j < 4, k < 6: x[i, j, k])
        p[i] = prod(j < 4, k < 6: x[i, j, k])
        h[i] = max(j < 4, k < 6: x[i, j, k])
        l[i] = min(j < 4, lanes k < 6: let t = neg(x[i, j, k]), neg(t))
        a[i] = argmax(j < 4, k < 6: x[i, j, k], index<i32>(6*j+k))#1
        b[i] = argmin(j < 4, k < 6: x[i, j, k], index<i32>(6*j+k))#1
        y[i] = any(j < 4, k < 6: gt(x[i, j, k], f32(2.0)))
        e[i] = all(j < 4, k < 6: lt(x[i, j, k], f32(2.5)))
        none[i] = max(j < 0: z[i, j])
        first[i] = argmax(j < 0: z[i, j], index<i32>(j))#1
      }
    }"""
    x = np.round(np.random.default_rng(3).standard_normal((5, 4, 6)), 1).astype(np.float32)
    x[3, 1, 2] = x[3, 3, 0] = np.nan
    out = {name: np.zeros(5, t) for name, t in zip(["s", "p", "h", "l", "a", "b", "y", "e", "none", "first"],
                                                   "f4 f4 f4 f4 i4 i4 ? ? f4 i4".split())}
    run(text, x=x, z=np.zeros((5, 0), np.float32), **out)
    flat = x.reshape(5, 24)
    np.testing.assert_allclose(out["s"], flat.sum(1), rtol=1e-5)
    np.testing.assert_allclose(out["p"], flat.prod(1), rtol=1e-5)
    for name, function in (("h", np.max), ("l", np.min), ("a", np.argmax), ("b", np.argmin)):
        np.testing.assert_array_equal(out[name], function(flat, axis=1))
    np.testing.assert_array_equal(out["y"], (flat > 2).any(1))
    np.testing.assert_array_equal(out["e"], (flat < 2.5).all(1))
    np.testing.assert_array_equal(out["none"], -np.inf)
    np.testing.assert_array_equal(out["first"], np.iinfo(np.int32).max)


@pytest.mark.reference
def test_gather_reads_nothing_out_of_range() -> None:
    text = """
    kernel gather(x: r f32[9,4], n: r i64[N], y: w f32[N,4]) symbols [N] {
      index g = n[i]
      grid i < N { lanes j < 4 { y[i, j] = guarded(0 <= g < 9, x[g, j], f32(-1.0)) } }
    }"""
    x, n = np.arange(36, dtype=np.float32).reshape(9, 4), np.array([3, -1, 8, 9, 2 ** 40])
    y = np.zeros((5, 4), np.float32)
    run(text, {"N": 5}, x=x, n=n, y=y)
    np.testing.assert_array_equal(y, [x[3], [-1] * 4, x[8], [-1] * 4, [-1] * 4])
    with pytest.raises(CompilerError, match=r"kernel gather: x\[g, j\] reaches -1 in axis 0, which has 9"):
        run(text.replace("0 <= g < 9", "0 <= i < 9"), {"N": 5}, x=x, n=n, y=y)


@pytest.mark.reference
def test_serial_loops_run_in_order() -> None:
    text = """
    kernel power(x: rw f64[1], n: w i32[1]) {
      for i < 5 { let old = x[0] x[0] = mul(old, old) n[0] = index<i32>(i) }
    }"""
    x, n = np.array([1.5]), np.zeros(1, np.int32)
    run(text, x=x, n=n)
    assert x[0] == 1.5 ** 32 and n[0] == 4


@pytest.mark.reference
def test_sums_are_in_the_operands_type() -> None:
    text = """
    kernel k(x: r f32[4], n: r u8[3], y: w f32[], m: w u8[]) {
      y[] = sum(i < 4: x[i])
      m[] = sum(i < 3: n[i])
    }"""
    y, m = np.zeros((), np.float32), np.zeros((), np.uint8)
    run(text, x=np.array([1e8, 1, -1e8, 0], np.float32), n=np.array([200, 100, 0], np.uint8), y=y, m=m)
    assert y == 0 and m == 44


@pytest.mark.reference
@pytest.mark.parametrize("old, new, message", [
    ("x[i, j], m", "x[i, j+1], m", r"kernel softmax: x\[i, j \+ 1\] reaches 10 in axis 1, which has 10"),
    ("x[i, j], m", "x[i-1, j], m", r"x\[i - 1, j\] reaches -1 in axis 0, which has 3"),
    ("y[i, j]", "y[i, j*j]", r"y\[i, j\*j\] reaches 16 in axis 1"),
    ("y[i, j]", "y[i, (j)//2]", r"several iterations write one element at y\[i, \(j\)//2\]"),
    ("y[i, j]", "y[0, j]", r"several iterations write one element at y\[0, j\]"),
    ("x[i, j], m", "guarded(0 <= j+1 < 11, x[i, j+1], f32(0.0)), m", r"x\[i, j \+ 1\] reaches 10 in axis 1"),
])
def test_what_a_kernel_must_not_do(old: str, new: str, message: str) -> None:
    x = np.zeros((3, 10), np.float32)
    assert old in SOFTMAX
    with pytest.raises(CompilerError, match=message):
        run(SOFTMAX.replace(old, new), {"N": 3}, x=x, y=np.zeros_like(x))


@pytest.mark.reference
@pytest.mark.parametrize("arrays, message", [
    ({"x": np.zeros((3, 10), np.float32)}, r"y is f32\[3, 10\], but nothing is given"),
    ({"x": np.zeros((3, 9), np.float32)}, r"x is f32\[3, 10\], but float32\[3, 9\] is given"),
    ({"x": np.zeros((3, 10))}, r"x is f32\[3, 10\], but float64\[3, 10\] is given"),
])
def test_arrays_must_fit(arrays: dict, message: str) -> None:
    with pytest.raises(CompilerError, match=message):
        run(SOFTMAX, {"N": 3}, **arrays)


# --- every op

def op_cases() -> list:
    lowered = [op for op in OPS.values() if op.lowering is not None and op.reference is not None]
    return [pytest.param(op, number, sample, id=f"{op.name}-{number}")
            for op in lowered for number, sample in enumerate(op.samples())]


@pytest.mark.reference
@pytest.mark.parametrize("op, number, sample", op_cases())
def test_every_op_as_a_kernel(op: Op, number: int, sample: Sample) -> None:
    """Lowered, tiled and laid out, the op computes what its reference does, and stays in its buffers."""
    arrays = make_operands(f"{op.name}-{number}", sample, F32)
    assert all(a.dtype == dtype_of(arg, F32).numpy for a, arg in zip(arrays, sample.args))
    _, inputs, node = one_op(op, arrays, sample.attrs)
    graph, feeds = graph_of(inputs, node.results), {f"x{i}": a for i, a in enumerate(arrays)}
    expected, _ = interpret(graph, feeds, {})
    compilation = Compilation(graph, host_target())
    for stage in ("lower", "tile", "memory"):
        found, _, _ = run_program(compilation.result(stage), feeds, {}, {})
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=stage)


# --- programs

PROGRAM = """
plan step version 1 target "any"
symbols [N]
buffer f0 feed x : f32[N,10]
buffer s0 state w : f32[2,5]
buffer c0 constant "" : f32[1] data hex"0000003f"
buffer b0 arena sum : f32[10] live 0 to 2
buffer b1 arena ok : bool[] live 0 to 1
buffer b2 arena double : f32[10] live 2 to 3 over b0
buffer o0 output y : f32[10]
feeds [f0]
outputs [o0]
states [s0]
written [s0]
0: launch total [f0, c0, s0, b0, b1] writes [b0, b1] tasks 1
1: check b1 code 0
2: launch double [b0, b2] writes [b2] tasks 1
3: launch update [s0, b2, o0] writes [s0, o0] tasks 1 after [0]
message "too large"
guard N == 2*M
kernel total(x: r f32[N,10], c: r f32[1], w: r f32[10], t: w f32[10], ok: w bool[]) symbols [N] {
  ok[] = lt(w[0], f32(100.0))
  for j < 10 { t[j] = add(mul(c[0], w[j]), sum(i < N: x[i, j])) }
}
kernel double(x: r f32[10], y: w f32[10]) { lanes j < 10 { y[j] = add(x[j], x[j]) } }
kernel update(w: rw f32[10], g: r f32[10], y: w f32[10]) {
  lanes j < 10 { let old = w[j] w[j] = sub(old, g[j]) y[j] = g[j] }
}
"""


def step(text: str = PROGRAM, n: int = 4, w: Any = None) -> tuple:
    x = np.arange(n * 10, dtype=np.float32).reshape(n, 10)
    w = np.arange(10, dtype=np.float32).reshape(2, 5) if w is None else w
    return x, w, run_program(parse_program(text), {"x": x}, {"w": w}, {"N": n, "M": 2})


@pytest.mark.reference
def test_a_program_updates_its_state() -> None:
    x, w, (outputs, states, peak) = step()
    expected = 2 * (0.5 * w.ravel() + x.sum(0))
    np.testing.assert_array_equal(outputs["y"], expected)
    np.testing.assert_array_equal(states["w"], w - expected.reshape(2, 5))
    assert states["w"].shape == (2, 5)
    assert w[0, 1] == 1                          # the caller's state is as it was
    assert peak == 64 + 1                        # b0 and b2 in one place, then one bool


@pytest.mark.reference
def test_guards_and_checks_stop_a_program() -> None:
    with pytest.raises(FeedError, match=r"N = 2\*M must hold, but here it says 6 = 4"):
        step(n=6)
    with pytest.raises(FeedError, match="too large"):
        step(w=np.full((2, 5), 200, np.float32))
    with pytest.raises(FeedError, match=r"the state 'w' is float64\[2, 5\], declared f32\[2, 5\]"):
        step(w=np.zeros((2, 5)))
    with pytest.raises(FeedError, match="the feed 'x' is missing"):
        run_program(parse_program(PROGRAM), {}, {"w": np.zeros((2, 5), np.float32)}, {"N": 4, "M": 2})


@pytest.mark.reference
@pytest.mark.parametrize("old, new", [
    ("live 0 to 2\n", "live 0 to 0\n"),         # dies before its last use
    ("2: launch double [b0, b2]", "2: launch double [b3, b2]"),        # never written
])
def test_what_is_not_alive_is_poison(old: str, new: str) -> None:
    text = PROGRAM.replace(" over b0", "")
    text = text.replace("buffer o0", "buffer b3 arena never : f32[10] live 0 to 3\nbuffer o0")
    assert np.isfinite(step(text)[2][0]["y"]).all()
    assert old in text
    assert np.isnan(step(text.replace(old, new))[2][0]["y"]).all()


@pytest.mark.reference
@pytest.mark.parametrize("n", [1, 5])
def test_lenet_through_every_stage(n: int) -> None:
    graph = lenet_step()
    feeds, state = values_for(graph, n)
    compilation = Compilation(graph, host_target())
    outputs, updates = interpret(compilation.result("autodiff"), feeds, state)
    for stage in ("lower", "tile", "memory"):
        found, states, peak = run_program(compilation.result(stage), feeds, state, {"N": n})
        assert peak > 0
        for name, value in {**outputs, **updates}.items():
            np.testing.assert_allclose({**states, **found}[name], value, rtol=1e-4, atol=1e-5, err_msg=stage)
    assert peak == bind(compilation.result("memory").plan, {"N": n}).peak_bytes
