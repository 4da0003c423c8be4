"""The memory stage: lifetimes, in-place results, and the proof that a kernel allows them."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from graphflow.compiler.emit.module import emit_module, kernel_tasks
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.emit.pool import pool_object
from graphflow.compiler.kernel.form import (
    Apply,
    Argument,
    Contraction,
    ContractionKernel,
    Expr,
    Guard,
    Guarded,
    Kernel,
    Let,
    Load,
    Local,
    Loop,
    LoopKernel,
    Reduce,
    Statement,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.passes.memory import memory, reads_before_writing
from graphflow.compiler.passes.tile import tile_kernel
from graphflow.compiler.plan.bind import bind
from graphflow.compiler.plan.dims import DimLike, symbol
from graphflow.compiler.plan.dtypes import F32, I64
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.plan.schema import Buffer, Copy, Launch, Plan
from graphflow.compiler.plan.validate import validate
from graphflow.compiler.target import host_target
from graphflow.runtime import store
from graphflow.runtime.cpu import CpuProgram
from graphflow.runtime.measure import measure_arena
from graphflow.runtime.native import install_pool

N, R, C, K = symbol("N"), symbol("i"), symbol("j"), symbol("k")


def load(arg: str, *index: DimLike) -> Load:
    return Load(arg, index, F32)


def add(a: Expr, b: Expr) -> Expr:
    return Apply("add", (a, b), F32)


def kernel(*body: Statement, shape: tuple[DimLike, ...] = (N, 8), more: tuple[Argument, ...] = (),
           indirect: dict[str, Expr] | None = None) -> LoopKernel:
    """A kernel over x (read) and y (written) of one shape."""
    return LoopKernel("k", (Argument("x", F32, shape, "r"), Argument("y", F32, shape, "w"), *more),
                      (Loop("i", N, (Loop("j", 8, body),), "grid"),), ("N",), indirect or {})


Z = Argument("z", F32, (N, 8), "w")
OWN = load("x", R, C)
ALLOWED = {
    "elementwise": kernel(Store("y", (R, C), add(OWN, OWN))),
    "through a let": kernel(Let("t", OWN), Store("y", (R, C), Local("t", F32))),
    "guarded": kernel(Store("y", (R, C), Guarded((Guard(C, 4),), OWN, Local("t", F32)))),
    "the last of two stores": kernel(Store("z", (R, C), OWN), Store("y", (R, C), OWN), more=(Z,)),
    "not read at all": kernel(Store("y", (R, C), load("z", R, C)), more=(replace(Z, mode="r"),)),
}
TOTAL = Let("t", Reduce("sum", (("k", 8),), (load("x", R, K),)))
QUOTIENT = Store("y", (R, C), Apply("div", (OWN, Local("t", F32)), F32))
SQUARES = (Argument("x", F32, (8, 8), "r"), Argument("y", F32, (8, 8), "w"))
XY = (Argument("x", F32, (N, 8), "r"), Argument("y", F32, (N, 8), "w"))
ROW = LoopKernel("k", XY, (Loop("i", N, (TOTAL, Loop("j", 8, (QUOTIENT,), "lanes")), "grid"),), ("N",))
ALLOWED.update({
    "a row before it is written": ROW,
    "a column before it is written": LoopKernel("k", XY, (Loop("j", 8, (
        Let("t", Reduce("sum", (("k", N),), (load("x", K, C),))),
        Loop("i", N, (QUOTIENT,))), "lanes"),), ("N",)),
    "in a loop before": LoopKernel("k", (*XY, Z), (Loop("i", N, (
        Loop("j", 8, (Store("z", (R, C), OWN),)), Loop("j", 8, (Store("y", (R, C), OWN),))), "grid"),)),
    "everything before": LoopKernel("k", SQUARES, (
        Let("t", load("x", 0, 0)), Loop("i", 8, (Loop("j", 8, (Store("y", (R, C), OWN),)),)))),
})
REFUSED = {
    "a row written before it": LoopKernel("k", (*XY, Z), (Loop("i", N, (
        Loop("j", 8, (Store("y", (R, C), OWN),)), Loop("j", 8, (Store("z", (R, C), OWN),))), "grid"),)),
    "another row": LoopKernel("k", XY, (Loop("i", N, (
        Let("t", load("x", R + 1, 0)), Loop("j", 8, (QUOTIENT,))), "grid"),), ("N",)),
    "a column for each row": LoopKernel("k", XY, (Loop("i", N, (
        Let("t", Reduce("sum", (("k", N),), (load("x", K, 0),))), Loop("j", 8, (QUOTIENT,))), "grid"),)),
    "the row of another axis": LoopKernel(
        "k", SQUARES, (Loop("i", 8, (
            Let("t", load("x", 0, R)), Loop("j", 8, (QUOTIENT,))), "grid"),)),
    "the neighbour": kernel(Store("y", (R, C), load("x", R, C + 1))),
    "transposed": kernel(Store("y", (C, R), OWN), shape=(8, 8)),
    "a row": kernel(Store("y", (R, C), Reduce("sum", (("k", 8),), (load("x", R, K),)))),
    "in a reduction's let": kernel(Store("y", (R, C), Reduce("sum", (("k", 8),), (Local("t", F32),),
                                                             lets=(Let("t", load("x", R, K)),)))),
    "its fill": kernel(Store("y", (R, C), Guarded((Guard(C, 4),), OWN, load("x", R, 0)))),
    "after the store": kernel(Store("y", (R, C), OWN), Store("z", (R, C), OWN), more=(Z,)),
    "let after the store": kernel(Store("y", (R, C), OWN), Let("t", OWN), Store("z", (R, C), OWN), more=(Z,)),
    "as an index": kernel(Store("y", (R, C), OWN), indirect={"n": OWN}),
    "never written": kernel(Let("t", OWN)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name):
    assert reads_before_writing(ALLOWED[name], "x", "y")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert not reads_before_writing(REFUSED[name], "x", "y")


def contraction(a: Expr, stored: Expr, lets: tuple[Let, ...] = ()) -> ContractionKernel:
    arguments = (Argument("x", F32, (N, 8), "r"), Argument("w", F32, (8, 8), "r"),
                 Argument("y", F32, (N, 8), "w"))
    c = Contraction((), (("i", N),), (("j", 8),), (("k", 8),), a, load("w", K, C),
                    (Store("y", (R, C), stored),), lets=lets)
    return ContractionKernel("k", arguments, c, ("N",))


def test_contractions():
    acc, w = Local("acc", F32), load("w", R, K)
    assert reads_before_writing(contraction(w, add(acc, OWN)), "x", "y")
    assert reads_before_writing(contraction(w, acc, (Let("t", OWN),)), "x", "y")
    assert not reads_before_writing(contraction(load("x", R, K), acc), "x", "y")
    assert not reads_before_writing(contraction(w, add(acc, load("x", R, 0))), "x", "y")


MAP: Kernel = kernel(Store("y", (R, C), OWN))


def program(body: tuple, ids: str, kernels: dict[str, Kernel] | None = None, **shapes) -> KernelProgram:
    """f is the feed, o the output, `ids` the arena; every buffer is [N, 8] unless `shapes` says otherwise."""
    buffers = (Buffer("f", "feed", "x", F32, (N, 8)), Buffer("o", "output", "y", F32, (N, 8)),
               *(Buffer(i, "arena", i, F32, shapes.get(i, (N, 8))) for i in ids))
    plan = Plan("p", "t", ("N",), buffers, ("f",), ("o",), (), (), body)
    return KernelProgram(plan, kernels or {"k": MAP})


def test_chain_shares_one_buffer():
    done = memory(program((Launch("k", ("f", "a"), 1), Launch("k", ("a", "b"), 1), Launch("k", ("b", "c"), 1),
                           Copy("c", "o")), "cbad"))
    validate(done.plan)
    table = {b.id: b for b in done.plan.buffers}
    assert "d" not in table                                       # nothing touches it
    assert [(table[i].first, table[i].last, table[i].alias) for i in "abc"] == [
        (0, 1, ""), (1, 2, "a"), (2, 3, "b")]
    assert [item.writes for item in done.plan.body[:3]] == [("a",), ("b",), ("c",)]
    assert bind(done.plan, {"N": 10}).peak_bytes == 10 * 8 * 4


def test_operand_that_lives_on_is_kept():
    two = LoopKernel("l", (Argument("x", F32, (N, 8), "r"), Argument("z", F32, (N, 8), "r"),
                           Argument("y", F32, (N, 8), "w")),
                     (Loop("i", N, (Loop("j", 8, (Store("y", (R, C), add(OWN, load("z", R, C))),)),)),))
    body = (Launch("k", ("f", "a"), 1), Launch("k", ("a", "b"), 1), Launch("l", ("a", "b", "c"), 1),
            Copy("c", "o"))
    done = memory(program(body, "abc", {"k": MAP, "l": two}))
    validate(done.plan)
    table = {b.id: b for b in done.plan.buffers}
    assert table["b"].alias == "" and table["c"].alias == "a"     # only one of the two operands
    assert bind(done.plan, {"N": 16}).peak_bytes == 2 * 16 * 8 * 4


def test_one_operand_is_taken_over_once():
    both = kernel(Store("z", (R, C), OWN), Store("y", (R, C), OWN), more=(Z,))
    body = (Launch("k", ("f", "a"), 1), Launch("l", ("a", "b", "c"), 1), Copy("b", "o"))
    done = memory(program(body, "abc", {"k": MAP, "l": both}))
    validate(done.plan)
    assert {b.id: b.alias for b in done.plan.buffers if b.role == "arena"} == {"a": "", "b": "a", "c": ""}


@pytest.mark.parametrize("buffers, shapes", [(("a", "b"), {"b": (N, 4, 2)}), (("a", "b"), {"b": (8, N)})])
def test_other_shapes_are_not_taken_over(buffers, shapes):
    body = (Launch("k", ("f", "a"), 1), Launch("k", buffers, 1), Copy("b", "o"))
    done = memory(program(body, "ab", **shapes))
    assert all(not b.alias for b in done.plan.buffers)


def test_feed_is_never_overwritten():
    done = memory(program((Launch("k", ("f", "a"), 1), Copy("a", "o")), "a"))
    assert all(not b.alias for b in done.plan.buffers)


def test_another_type_is_not_taken_over():
    cast = LoopKernel("c", (Argument("x", I64, (N, 8), "r"), Argument("y", F32, (N, 8), "w")), MAP.body)
    first = program((Launch("k", ("f", "a"), 1), Launch("c", ("a", "b"), 1), Copy("b", "o")), "ab",
                    {"k": MAP, "c": cast})
    buffers = tuple(replace(b, dtype=I64) if b.id == "a" else b for b in first.plan.buffers)
    done = memory(replace(first, plan=replace(first.plan, buffers=buffers)))
    assert all(not b.alias for b in done.plan.buffers)


def test_read_before_write():
    with pytest.raises(CompilerError, match="item 0 of the body reads a, which nothing wrote before"):
        memory(program((Launch("k", ("a", "b"), 1), Copy("b", "o")), "ab"))


def test_launch_with_too_few_buffers():
    with pytest.raises(CompilerError, match="k takes 2 buffers, a launch gives it 1"):
        memory(program((Launch("k", ("f",), 1),), ""))


@pytest.mark.cpu
@pytest.mark.parametrize("n", [1, 17, 64])
def test_results_in_place_and_the_measured_peak(n):
    """Rows of f, squared, normed, squared, in buffers that take over each other: right, as big as planned."""
    target = host_target()
    install_pool(pool_object(target))
    total = LoopKernel("t", (Argument("x", F32, (N, 8), "r"), Argument("y", F32, (N,), "w")), (Loop("i", N, (
        Store("y", (R,), Reduce("sum", (("k", 8),), (load("x", R, K),))),), "grid"),), ("N",))
    quotient = Apply("div", (OWN, load("z", R)), F32)
    divide = LoopKernel("d", (Argument("x", F32, (N, 8), "r"), Argument("z", F32, (N,), "r"),
                              Argument("y", F32, (N, 8), "w")),
                        (Loop("i", N, (Loop("j", 8, (Store("y", (R, C), quotient),)),), "grid"),), ("N",))
    square = replace(kernel(Store("y", (R, C), Apply("mul", (OWN, OWN), F32))), name="s")
    body = (Launch("s", ("f", "a"), 1), Launch("t", ("a", "b"), 1), Launch("d", ("a", "b", "c"), 1),
            Launch("r", ("c", "d"), 1), Launch("s", ("d", "e"), 1), Copy("e", "o"))
    row = tile_kernel(replace(ROW, name="r"))
    given = program(body, "abcde", {"t": total, "d": divide, "s": square, "r": row}, b=(N,))
    cut = tuple(replace(item, tasks=kernel_tasks(given.kernels[item.kernel], target))
                if isinstance(item, Launch) else item for item in given.plan.body)
    done = memory(replace(given, plan=replace(given.plan, body=cut)))
    validate(done.plan)
    aliases = {b.id: b.alias for b in done.plan.buffers if b.role == "arena"}
    assert aliases == {"a": "", "b": "", "c": "a", "d": "c", "e": "d"}
    code = compile_object(emit_module(done, target), target)
    x = np.random.default_rng(n).uniform(1, 2, (n, 8)).astype(np.float32)
    share = x * x / (x * x).sum(1, keepdims=True)
    expected = (share / share.sum(1, keepdims=True)) ** 2
    for guard in (False, True):
        run = CpuProgram(done.plan, code, store.Store(), threads=2, guard=guard)
        np.testing.assert_allclose(run.run([x])[0], expected, rtol=1e-5)
    found = measure_arena(run, [x])
    assert found.measured_bytes == found.planned_bytes == run.peak_bytes({"N": n})
    assert found.overruns == () and found.never_written == {}
