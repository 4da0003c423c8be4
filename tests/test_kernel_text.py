"""The text form of kernels and programs: print, parse, print is the identity, and a text that breaks the
grammar is
refused with its place."""
from __future__ import annotations

import math

import pytest

from graphflow.compiler.kernel.form import (
    Apply,
    Argument,
    Const,
    Contraction,
    ContractionKernel,
    Guard,
    Guarded,
    Index,
    Let,
    Load,
    Local,
    Loop,
    LoopKernel,
    Reduce,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.text import parse_kernel, parse_program, print_kernel, print_program
from graphflow.compiler.plan.dims import floordiv, symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, F64, I32, I64
from graphflow.compiler.plan.errors import TextError
from graphflow.compiler.plan.schema import Buffer, Check, Copy, EntryGuard, Launch, Message, Plan

N, i, j, k, r = map(symbol, ("N", "i", "j", "k", "r1.0"))


def softmax() -> LoopKernel:
    x = Load("x", (i, k), F32)
    row = (Let("m", Reduce("max", (("k", 10),), (x,), lanes="k")),
           Let("s", Reduce("sum", (("k", 10),),
                           (Apply("exp", (Apply("sub", (x, Local("m", F32)), F32),), F32),))),
           Loop("j", 10, (Store("y", (i, j), Apply("div", (Local("e", F32), Local("s", F32)), F32)),),
                "lanes"))
    body = (*row[:2], Loop("j", 10,
                           (Let("e", Apply("exp", (Apply("sub", (Load("x", (i, j), F32), Local("m", F32)),
                                                         F32),),
                                                    F32)), *row[2].body), "lanes"))
    return LoopKernel("softmax", (Argument("x", F32, (N, 10), "r"), Argument("y", F32, (N, 10), "w")),
                      (Loop("i", N, body, "grid"),), ("N",))


def everything() -> LoopKernel:
    """Every kind of expression and number."""
    at = floordiv(i + 3, 2) % 5 - symbol("g")
    reduction = Reduce("argmax", (("r1.0", 3), ("q", N)), (Local("t", F32), Index(r * 3 + 1, I32)), 1,
                       lets=(Let("t", Load("x", (i, r), F32)),))
    guarded = Guarded((Guard(at, N), Guard(i - 1, 4)), Load("x", (at, i - 1), F32), Const(float("-inf"), F32))
    numbers = [Const(v, F32) for v in (0.1, -0.0, 1e-30, 1e22, 3.0, math.nan, math.inf)]
    total = guarded
    for n in numbers:
        total = Apply("add", (total, n), F32)
    body = (Let("a b", total), Let("p", Apply("cast", (reduction,), F32)),
            Store("y", (i,), Apply("where",
                                   (Apply("lt", (Local("p", F32), Local("a b", F32)), BOOL), Local("p", F32),
                                             Const(-1.5, F32)), F32)),
            Loop("for", 3, (Store("y", (i,), Apply("cast", (Const(True, BOOL),), F32)),)))
    return LoopKernel("every thing", (Argument("x", F32, (N, 4), "r"), Argument("n", I64, (N,), "r"),
                                      Argument("y", F32, (N,), "rw")),
                      (Loop("i", N, body),), ("N",), {"g": Load("n", (i,), I64)})


def conv() -> ContractionKernel:
    at = symbol("n0") + symbol("k1") - 1
    b = Guarded((Guard(at, 8),), Load("x", (symbol("b0"), symbol("k0"), at), F32), Const(0.0, F32))
    out = (symbol("b0"), symbol("m0"), symbol("n0"))
    c = Contraction((("b0", N),), (("m0", 6),), (("n0", 8),), (("k0", 3), ("k1", 3)),
                    Load("w", (symbol("m0"), symbol("k0"), symbol("k1")), F32), b,
                    (Store("y", out, Local("t1", F32)),), {"mr": 6, "nr": 32},
                    (Let("t1", Apply("maximum", (Local("acc", F32), Const(0.0, F32)), F32)),))
    return ContractionKernel("conv", (Argument("w", F32, (6, 3, 3), "r"), Argument("x", F32, (N, 3, 8), "r"),
                                      Argument("y", F32, (N, 6, 8), "w")), c, ("N",))


KERNELS = [softmax(), everything(), conv()]


def program() -> KernelProgram:
    buffers = (Buffer("f0", "feed", "x", F32, (N, 10)), Buffer("o0", "output", "the result", F32, (N, 10)),
               Buffer("s0", "state", "layer/w:0", F32, (6,)),
               Buffer("c0", "constant", "", F32, (1,), data=b"\0\1\2\3"),
               Buffer("b0", "arena", "softmax", F32, (N, 10), "nc+1", 0, 1, "", (3, 4)))
    body = (Launch("softmax", ("f0", "b0"), N, N * 4 + 64, (), (1, 2), ("b0",)), Check("b0", 0),
            Copy("b0", "o0"))
    plan = Plan("step", "x86-64", ("N",), buffers, ("f0",), ("o0",), ("s0",), (), body,
                (Message('bad "label"', 7, "x"),), (EntryGuard(N, N * 2, 3),))
    return KernelProgram(plan, {k.name: k for k in KERNELS})


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_kernel_round_trip(kernel) -> None:
    text = print_kernel(kernel)
    again = parse_kernel(text)
    assert print_kernel(again) == text
    assert repr(again) == repr(kernel)              # repr: nan is not equal to itself


def test_text_is_as_documented() -> None:
    assert print_kernel(softmax()) == """\
kernel softmax(x: r f32[N,10], y: w f32[N,10]) symbols [N] {
  grid i < N {
    let m = max(lanes k < 10: x[i, k])
    let s = sum(k < 10: exp(sub(x[i, k], m)))
    lanes j < 10 {
      let e = exp(sub(x[i, j], m))
      y[i, j] = div(e, s)
    }
  }
}
"""
    assert print_kernel(conv()) == """\
contraction conv(w: r f32[6,3,3], x: r f32[N,3,8], y: w f32[N,6,8]) symbols [N] {
  batch [b0 < N]
  m [m0 < 6]
  n [n0 < 8]
  k [k0 < 3, k1 < 3]
  tile [mr=6, nr=32]
  a = w[m0, k0, k1]
  b = guarded(0 <= k1+n0-1 < 8, x[b0, k0, k1+n0-1], f32(0.0))
  let t1 = maximum(acc, f32(0.0))
  y[b0, m0, n0] = t1
}
"""


def test_types_that_do_not_follow_are_shown() -> None:
    faulty = LoopKernel("bad", (Argument("x", F32, (), "r"), Argument("y", F64, (), "w")),
                        (Store("y", (), Apply("add", (Load("x", (), F64), Local("lost", I32)), BOOL)),))
    text = print_kernel(faulty)
    assert "add<bool>(x<f64>[], lost<i32>)" in text
    assert parse_kernel(text) == faulty


def test_program_round_trip() -> None:
    text = print_program(program())
    again = parse_program(text)
    assert print_program(again) == text
    assert repr(again) == repr(program())
    assert "#1,2" not in print_program(program(), origins=False)


@pytest.mark.parametrize("text, message", [
    ("kernel k() {", "line 1, column 13: expected a statement"),
    ("kernel k(x: q f32[]) {}", "expected a mode (r, w, rw), found 'q'"),
    ("kernel k(x: r f12[]) {}", "expected an element type"),
    ("kernel k(x: w f32[]) {\n  x[] = y[]\n}", "line 2, column 9: there is no argument for 'y'"),
    ("kernel k(x: w f32[]) { x[] = t }", "there is no let for 't'"),
    ("kernel k(x: w f32[]) { x[] = cast(f32(1.0)) }", "there is no type for 'cast'"),
    ("kernel k(x: w f32[]) { x[] = frob(f32(1.0)) }", "there is no type for 'frob'"),
    ("kernel k(x: w f32[]) { x[] = guarded(0 <= 1 < 2, f32(1.0)) }", "a value and a fill"),
    ("kernel k(x: w f32[]) { x[] = sum(i < 3: f32(1.0))#1 }", "sum has no operand 1"),
    ("kernel k(x: w f32[]) { until i < 3 {} }",
     "expected a statement (let, for, grid, lanes), found 'until'"),
    ("kernel k(x: w f32[]) {} more", "expected the end, found 'more'"),
    ("contraction k(x: w f32[]) { m [] }", "expected 'batch', found 'm'"),
    ("contraction k(x: w f32[]) { batch [] m [] n [] k [] a = f32(1.0) b = f32(1.0) x[] = acc let t = acc }",
     "lets and then stores"),
    ("loop k() {}", "expected a kernel (kernel, contraction, routine), found 'loop'"),
    ("kernel k(x: w f32[]) { x[] = " + "neg(" * 300 + "f32(1.0)" + ")" * 300 + "}", "brackets nest deeper"),
])
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(TextError) as error:
        parse_kernel(text)
    assert message in str(error.value)


def test_two_kernels_of_one_name_are_refused() -> None:
    text = print_program(program())
    with pytest.raises(TextError, match="two kernels named 'conv'"):
        parse_program(text + print_kernel(conv()))
