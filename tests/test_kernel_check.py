"""The checker of kernels and programs: what is right passes, and each rule, broken, is reported with its
place."""
from __future__ import annotations

from dataclasses import replace

import pytest
from nets import lenet_step

from graphflow.compiler.driver import Compilation
from graphflow.compiler.kernel.check import check_kernel, check_program
from graphflow.compiler.kernel.form import Const, ContractionKernel, LoopKernel, Store
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.text import parse_kernel, parse_program
from graphflow.compiler.plan.dtypes import F32, I32, U8
from graphflow.compiler.plan.errors import CompilerError
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
contraction matmul(x: r f32[N,7], w: rw f32[N,5], y: w f32[N,5]) symbols [N] {
  batch [] m [i < N] n [j < 5] k [l < 7]
  a = x[i, l]
  b = f32(1.0)
  let t = maximum(acc, f32(0.0))
  y[i, j] = t
  w[i, j] = add(w[i, j], t)
}
"""
GATHER = """
kernel gather(x: r f32[9,4], n: r i64[N], y: w f32[N,4]) symbols [N] {
  index g = n[i]
  grid i < N { lanes j < 4 { y[i, j] = guarded(0 <= g < 9, x[g, j], f32(0.0)) } }
}
"""
PADDED = """
kernel padded(x: r f32[N,8], y: w f32[N,8]) symbols [N] {
  grid i < N { lanes j < 8 { y[i, j] = sum(r < 3: guarded(0 <= j+r-1 < 8, x[i, j+r-1], f32(0.0))) } }
}
"""
FIRST = """
kernel first(x: r f32[N,10], n: w i32[N]) symbols [N] {
  grid i < N { n[i] = argmax(k < 10: let v = neg(x[i, k]), v, index<i32>(k))#1 }
}
"""


@pytest.mark.parametrize("text", [SOFTMAX, MATMUL, GATHER, PADDED, FIRST],
                         ids=["softmax", "matmul", "gather", "padded", "argmax"])
def test_right_kernels_pass(text: str) -> None:
    check_kernel(parse_kernel(text))


@pytest.mark.parametrize("stage", ["lower", "tile", "memory"])
@pytest.mark.parametrize("batch", [None, 3])
def test_every_stage_makes_right_programs(stage: str, batch: int | None) -> None:
    check_program(Compilation(lenet_step(batch), host_target()).result(stage), stage)


FAULTS = [
    # names
    (SOFTMAX, "sub(x[i, j], m)", "sub(x[i, j], q<f32>)", "q is used where no let binds it"),
    (SOFTMAX, "x[i, j]", "x[i, k]", "x[i, k] uses k, which nothing defines there"),
    (SOFTMAX, "symbols [N] ", "", "the shape of x uses N, which nothing defines"),
    (SOFTMAX, "lanes j < 10", "lanes i < 10", "the loop variable i hides another"),
    (SOFTMAX, "lanes j < 10", "lanes N < 10", "the loop variable N hides another"),
    (MATMUL, "let t", "let t = acc let t", "t is bound twice"),
    (SOFTMAX, "y: w", "x: w", "two arguments have one name"),
    (SOFTMAX, "x[i, j]", "z<f32>[i, j]", "there is no argument z"),
    (GATHER, "grid i < N { lanes j < 4 {", "for q < 1 { for i < N { } for j < 4 {", "uses g outside the loop "
                                                                                    "over i"),
    (GATHER, "index g", "index i", "i names two things"),
    (GATHER, "index g = n[i]", "index g = x[i, 0]", "the index g is of type f32"),
    (MATMUL, "n [j < 5]", "n [i < 5]", "two axes have one name"),
    (MATMUL, "a = x[i, l]", "a = x[j, l]", "x[j, l] uses j, which nothing defines there"),
    (MATMUL, "b = f32(1.0)", "b = acc<f32>", "acc is used where no let binds it"),
    # types
    (SOFTMAX, "exp(sub(x[i, j], m))", "exp<f64>(sub(x[i, j], m))", "exp(f32) -> f64 has wrong types"),
    (SOFTMAX, "div(", "div<bool>(", "div(f32, f32) -> bool has wrong types"),
    (SOFTMAX, "sub(x[i, j], m)", "sub(x[i, j], f64(0.0))", "sub(f32, f64) -> f32 has wrong types"),
    (SOFTMAX, "sub(x[i, j], m)", "sub<f32>(m)", "sub(f32) -> f32 takes 2 arguments"),
    (SOFTMAX, "sub(x[i, j], m)", "minus<f32>(m, m)", "there is no scalar function 'minus'"),
    (SOFTMAX, "sub(x[i, j], m)", "where(m, m, m)", "where(f32, f32, f32) -> f32 has wrong types"),
    (SOFTMAX, "sub(x[i, j], m)", "m<f64>", "m is f32, used as f64"),
    (SOFTMAX, "exp(sub(x[i, j], m))", "x<f64>[i, j]", "it loads f64 from x of f32"),
    (SOFTMAX, "y[i, j] = div", "y[i, j] = lt", "it stores bool to y of f32"),
    (SOFTMAX, "sum(", "any(", "any of f32"),
    (SOFTMAX, "sum(", "argmax(", "argmax of 1 operands"),
    (SOFTMAX, "sub(x[i, j], m)", "cast<f32>(index<bool>(j))", "an index is a bool"),
    (SOFTMAX, "sub(x[i, j], m)", "cast<f32>(and(m, m))", "and(f32, f32) -> f32 has wrong types"),
    (SOFTMAX, "sum(lanes k < 10: exp(sub(x[i, k], m)))", "cast<f32>(sum(k < 10: lt(x[i, k], m)))",
     "sum of bool"),
    (FIRST, "index<i32>(k))#1", "cast<i32>(neg(v)), v)#1", "argmax of 3 operands"),
    (GATHER, "f32(0.0)", "i32(0)", "a guarded f32 is filled with i32"),
    (MATMUL, "b = f32(1.0)", "b = f64(1.0)", "the operands are of type f32 and f64"),
    # accesses
    (SOFTMAX, "y[i, j]", "y[j]", "y[j] has 1 indices for 2 axes"),
    (SOFTMAX, "y[i, j] =", "x[i, j] =", "it stores to x, which it only reads"),
    (SOFTMAX, "x[i, j]", "y[i, j]", "it loads from y, which it only writes"),
    (SOFTMAX, "x: r", "x: rw", "it loads x[i, k], but stores to other elements of it"),
    (MATMUL, "add(w[i, j], t)", "add(w[0, j], t)", "it loads w[0, j], but stores to other elements of it"),
    (SOFTMAX, "x: r f32[N,10]", "x: r f32[N,10], z: w f32[]", "nothing stores to z"),
    # bounds
    (SOFTMAX, "lanes j < 10", "lanes j < 11", "x[i, j] reaches 10, past the end of axis 1, which has 10"),
    (SOFTMAX, "y[i, j]", "y[i+1, j]", "y[i + 1, j] reaches N, past the end of axis 0, which has N"),
    (SOFTMAX, "x[i, j]", "x[i, j-1]", "x[i, j - 1] reaches -1, before the start of axis 1"),
    (SOFTMAX, "x[i, j]", "x[i-2*j, j]", "before the start of axis 0"),
    (SOFTMAX, "x[i, k], m", "x[i, 2*k], m", "x[i, 2*k] reaches 18, past the end of axis 1"),
    (SOFTMAX, "x[i, j]", "x[i, 10]", "x[i, 10] reaches 10, past the end"),
    (MATMUL, "y[i, j]", "y[i, j+1]", "y[i, j + 1] reaches 5, past the end of axis 1"),
    # loops
    (SOFTMAX, "y[i, j]", "y[i, 0]", "every iteration over j stores to the same element of y"),
    (SOFTMAX, "y[i, j]", "y[0, j]", "every iteration over i stores to the same element of y"),
    (MATMUL, "w[i, j]", "w[0, j]", "every iteration over i stores to the same element of w"),
    (SOFTMAX, "lanes j < 10", "grid j < 10", "the grid loop over j is not outermost and perfectly nested"),
    (SOFTMAX, "grid i", "lanes i", "the lanes loop over j lies in another"),
    (SOFTMAX, "lanes j < 10", "for j < -3", "the loop over j has the extent -3"),
]


UNDECIDED = [
    (PADDED, "< 8, x", "< 9, x"),                # the guard's range depends on two variables
    (PADDED, "x[i, j+r-1]", "x[i, j+1]"),        # a guard speaks of j
    (SOFTMAX, "grid i < N", "grid i < N-1"),     # perhaps no iteration at all
    (SOFTMAX, "x[i, j]", "x[i, j*j]"),           # not affine
    (GATHER, "0 <= g < 9", "0 <= i < N"),        # loaded
]


@pytest.mark.parametrize("text, old, new", UNDECIDED)
def test_what_is_not_certain_is_not_reported(text: str, old: str, new: str) -> None:
    assert old in text
    check_kernel(parse_kernel(text.replace(old, new)))


@pytest.mark.parametrize("text, old, new, message", FAULTS)
def test_broken_rules_are_reported(text: str, old: str, new: str, message: str) -> None:
    assert old in text
    kernel = parse_kernel(text.replace(old, new))
    with pytest.raises(CompilerError) as error:
        check_kernel(kernel, "tile")
    assert message in str(error.value)
    assert error.value.stage == "tile" and error.value.message.startswith(f"kernel {kernel.name}: ")
    assert error.value.dump and kernel.name in error.value.dump


@pytest.mark.parametrize("constant, message", [
    (Const(1, F32), "the constant 1 is no f32"), (Const(True, F32), "the constant True is no f32"),
    (Const(300, U8), "the constant 300 does not fit u8"), (Const(2 ** 31, I32), "does not fit i32"),
    (Const(-1, U8), "does not fit u8"), (Const(1.0, I32), "the constant 1.0 is no i32"),
])
def test_constants_fit_their_type(constant: Const, message: str) -> None:
    kernel = parse_kernel(f"kernel k(y: w {constant.dtype}[]) {{ }}")
    assert isinstance(kernel, LoopKernel)
    with pytest.raises(CompilerError) as error:
        check_kernel(replace(kernel, body=(Store("y", (), constant),)))
    assert message in str(error.value)


def test_a_contraction_stores() -> None:
    kernel = parse_kernel(MATMUL)
    assert isinstance(kernel, ContractionKernel)
    with pytest.raises(CompilerError, match="it stores nothing"):
        check_kernel(replace(kernel, contraction=replace(kernel.contraction, stores=())))


# --- programs

PROGRAM = """
plan step version 1 target "any"
symbols [N]
buffer f0 feed x : f32[N,10]
buffer s0 state w : f32[10]
buffer s1 state v : f32[10]
buffer c0 constant "" : f32[1] data hex"00000000"
buffer b0 arena sum : f32[10] live 0 to 2
buffer b1 arena ok : bool[] live 0 to 1
buffer o0 output y : f32[10]
feeds [f0]
outputs [o0]
states [s0, s1]
written [s0]
0: launch total [f0, s0, b0, b1] writes [b0, b1] tasks 1
1: check b1 code 0
2: launch update [s0, b0] writes [s0] tasks 1 after [0]
3: copy s1 to o0
message "too large"
kernel total(x: r f32[N,10], w: r f32[10], t: w f32[10], ok: w bool[]) symbols [N] {
  ok[] = lt(w[0], f32(1.0))
  for j < 10 { t[j] = add(w[j], sum(i < N: x[i, j])) }
}
kernel update(w: rw f32[10], g: r f32[10]) {
  lanes j < 10 { let old = w[j] w[j] = sub(old, g[j]) }
}
"""


def test_right_programs_pass() -> None:
    check_program(parse_program(PROGRAM))
    check_program(parse_program(PROGRAM.replace("buffer s0 state w : f32[10]",
                                                "buffer s0 state w : f32[2,5]")))


PROGRAM_FAULTS = [
    ("launch update", "launch upgrade", "item 2 launches upgrade, which there is not"),
    ("kernel update", "kernel spare(w: w f32[]) { w[] = f32(0.0) } kernel update", "nothing launches spare"),
    ("update [s0, b0]", "update [s0, b0, b1]", "item 2 (update) takes 2 buffers, not 3"),
    ("update [s0, b0]", "update [s0, b7]", "item 2 (update) uses the unknown buffer b7"),
    ("update [s0, b0]", "update [s0, b1]", "takes f32 as g, but b1 is bool"),
    ("update [s0, b0]", "update [s0, f0]", "takes [10] as g, but f0 is [N, 10]"),
    ("update [s0, b0]", "update [s0, s0]", "gets s0, which it writes, twice"),
    ("writes [s0]", "writes [b0]", "item 2 (update) does not write"),
    ("sum : f32[10]", "sum : f32[10]@blocked", "b0 (arena, 1 axes) has the layout 'blocked'"),
    ("sum : f32[10]", "sum : f32[10]@nhwc", "b0 (arena, 1 axes) has the layout 'nhwc'"),
    ("symbols [N]\nbuffer", "symbols [M]\nbuffer", "uses the symbol N, which the program has not"),
    ("live 0 to 2", "live 0 to 1", "item 2 (update) uses b0, which lives from 0 to 1"),
    ("after [0]", "", "overwrites s0, but is not ordered after [0], which read it"),
    ("after [0]", "after [0, 3]", "item 2 (update) is ordered after [0, 3]"),
    ("written [s0]", "written []", "writes s0, a state not listed as written"),
    ("written [s0]", "written [s0, s1]", "nothing writes s1"),
    ("3: copy s1 to o0", "3: copy s1 to s0", "nothing writes o0"),
    ("3: copy s1 to o0", "3: copy s1 to f0", "item 3 writes f0, a feed"),
    ("3: copy s1 to o0", "3: copy f0 to o0", "item 3 copies f0 to o0, which is of another size"),
    ("3: copy s1 to o0", "3: launch update [s0, s1] writes [s0] tasks 1 after [0, 2]",
     "item 3 (update) writes the state s0 a second time"),
    ("check b1 code 0", "check b0 code 0", "b0 is no bool scalar"),
    ("check b1 code 0", "check b1 code 1", "no message has the code 1"),
    ("0: launch total [f0, s0, b0, b1] writes [b0, b1] tasks 1\n1: check b1 code 0",
     "0: check b1 code 0\n1: launch total [f0, s0, b0, b1] writes [b0, b1] tasks 1",
     "item 0 reads b1, which nothing has written before"),
    ("1: check b1 code 0\n2: launch update [s0, b0] writes [s0] tasks 1 after [0]",
     "1: launch update [s0, b0] writes [s0] tasks 1 after [0]\n2: check b1 code 0",
     "item 2 checks after the state s0 was written"),
    ("feeds [f0]", "feeds [o0]", "o0 is listed as a feed"),
    ("w[j] = sub(old, g[j])", "w[j] = sub(old, f64(0.0))", "kernel update: sub(f32, f64) -> f32 has wrong "
                                                           "types"),
]


@pytest.mark.parametrize("old, new, message", PROGRAM_FAULTS)
def test_broken_programs_are_reported(old: str, new: str, message: str) -> None:
    assert PROGRAM.count(old) == 1
    text = PROGRAM.replace(old, new)
    if message.startswith("item 2 checks"):
        text = text.replace("b1 arena ok : bool[] live 0 to 1", "b1 arena ok : bool[] live 0 to 2")
    with pytest.raises(CompilerError) as error:
        check_program(parse_program(text), "memory")
    assert message in str(error.value) and error.value.stage == "memory"


def test_kernels_are_filed_under_their_names() -> None:
    program = parse_program(PROGRAM)
    kernels = {"total": program.kernels["total"], "up": program.kernels["update"]}
    with pytest.raises(CompilerError, match="the kernel update is filed under up"):
        check_program(KernelProgram(program.plan, kernels))
