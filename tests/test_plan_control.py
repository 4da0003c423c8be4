"""Plans with loops and branches: text, validator, positions, lifetimes, and views within their buffers."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_control_native import lstm

from graphflow.compiler.driver import Compilation
from graphflow.compiler.kernel.check import check_program
from graphflow.compiler.kernel.form import Argument, Loop, LoopKernel, Store
from graphflow.compiler.kernel.form import Load as Element
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.passes.memory import memory
from graphflow.compiler.plan.bind import bind
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, F32
from graphflow.compiler.plan.errors import CompilerError, PlanError, TextError
from graphflow.compiler.plan.plan_text import parse_plan, plan_hash, print_plan
from graphflow.compiler.plan.schema import Branch, Buffer, Copy, Item, Launch, Plan, Repeat, places, positions
from graphflow.compiler.plan.validate import validate
from graphflow.compiler.target import host_target

pytestmark = pytest.mark.reference

TEXT = """\
plan step version 1 target "t"
symbols [N, T]
buffer f0 feed x : f32[T,N]
buffer f1 feed p : bool[]
buffer o0 output y : f32[N]
buffer b0 arena scan : f32[2,N] live 0 to 8
buffer b1 arena more : bool[] live 1 to 7
buffer b2 arena new : f32[N] live 4 to 5
buffer v0 view scan : f32[N] of b0 at 0
buffer v1 view scan : f32[N] of b0 at N*(u0)%2
buffer v2 view x : f32[N] of f0 at T*N - N*u0 - N
buffer v3 view scan : f32[N] of b0 at N*(u0+1)%2
buffer v4 view x : f32[N] of f0 at 0
feeds [f0, f1]
outputs [o0]
states []
written []
0: copy v4 to v0
1: copy f1 to b1
2: repeat u0 < T while b1 {
  3: branch b1 {
    4: launch k_add [v1, v2, b2] writes [b2] tasks 1
    5: copy b2 to v3
  } else {
  6: }
7: }
8: copy v1 to o0
"""


def lines(*changes: tuple[str, str]) -> str:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


def numbered(text: str) -> str:
    """The text with its items numbered anew."""
    count, out = 0, []
    for line in text.splitlines():
        head, colon, rest = line.partition(":")
        if colon and head.strip().isdigit():
            line = f"{head[:len(head) - len(head.lstrip())]}{count}:{rest}"
            count += 1
        out.append(line)
    return "\n".join(out) + "\n"


def test_print_parse_print() -> None:
    plan = parse_plan(TEXT)
    text = print_plan(plan)
    again = parse_plan(text)
    assert print_plan(again) == text and again == plan and plan_hash(again) == plan_hash(plan)
    assert [line.strip() for line in text.splitlines()][-10:] == [
        line.strip() for line in TEXT.splitlines()][-10:]


def test_positions() -> None:
    plan = parse_plan(TEXT)
    found = [(p.position, p.last, type(p.item).__name__, p.loops) for p in places(plan.body)]
    assert found == [(0, 0, "Copy", ()), (1, 1, "Copy", ()), (2, 7, "Repeat", ()),
                     (3, 6, "Branch", ((2, 7),)), (4, 4, "Launch", ((2, 7),)), (5, 5, "Copy", ((2, 7),)),
                     (8, 8, "Copy", ())]
    assert positions(plan.body) == 9


VIOLATIONS = [
    (lines(("u0", "N")), "counts with 'N', which is something else"),
    (lines(("u0 < T while", "u0 < K while")), "unknown symbol K"),
    (lines(("u0 < T while", "u0 < -1 while")), "absurd trips"),
    (lines(("while b1", "while f0")), "'f0' is no bool scalar"),
    (lines(("branch b1", "branch b2"), ("b2 arena new : f32[N] live 4", "b2 arena new : f32[N] live 3")),
     "reads 'b2', which nothing has written before"),
    (lines(("of b0 at 0", "of v1 at 0")), "lies in 'v1', which is no buffer of its own"),
    (lines(("of b0 at 0", "of b9 at 0")), "lies in 'b9', which is no buffer of its own"),
    (lines(("v4 view x : f32[N]", "v4 view x : i32[N]")), "lies in 'f0', which is of another type"),
    (lines(("at N*(u0)%2", "at N*(u7)%2")), "unknown symbol u7"),
    (lines(("copy v4 to v0", "copy v1 to v0")), "the counter of a loop elsewhere"),
    (lines(("5: copy b2 to v3", "5: copy b2 to v4")), "writes 'v4', a feed"),
    (lines(("live 0 to 8", "live 0 to 9")), "outside the body of 9 items"),
    (lines(("live 0 to 8", "live 0 to 7")), "item 8 uses 'v1', which lives from 0 to 7 only"),
    (lines(("live 1 to 7", "live 1 to 6")), "item 2 uses 'b1', which lives from 1 to 6 only"),
    (lines(("5: copy b2 to v3", "5: copy b2 to o0"), ("8: copy v1 to o0", "8: copy v4 to v0")),
     "nothing writes o0"),
    (numbered(lines(("8: copy v1 to o0", "8: copy v1 to o0\n9: repeat u0 < 2 {\n10: }"))),
     "counts with 'u0', which is something else"),
]


@pytest.mark.parametrize("text, message", VIOLATIONS, ids=[m for _, m in VIOLATIONS])
def test_plans_that_break_a_rule(text: str, message: str) -> None:
    with pytest.raises(PlanError) as found:
        parse_plan(text)
    assert message in str(found.value)


@pytest.mark.parametrize("old, new, message", [
    ("} else {", "}", "expected 'else'"),
    ("  6: }", "  }", "expected an integer"),
    ("7: }\n", "", "expected 7"),
    ("  4: launch", "  5: launch", "expected 4"),
    ("of b0 at 0", "of b0", "expected 'at'"),
    ("repeat u0 < T", "repeat u0 T", "expected '<'"),
])
def test_text_that_breaks_the_grammar(old: str, new: str, message: str) -> None:
    with pytest.raises(TextError) as found:
        parse_plan(lines((old, new)))
    assert message in str(found.value)


def test_nesting_has_a_limit() -> None:
    deep = TEXT[:TEXT.index("0: copy")]
    deep = "\n".join(line for line in deep.splitlines() if "live" not in line and "view" not in line)
    body = "".join(f"{i}: repeat u{i} < 2 {{\n" for i in range(50)) + "50: }\n"
    with pytest.raises(TextError, match="nest deeper than 32"):
        parse_plan(deep + "\n" + body)
    plan = parse_plan(TEXT)
    item: Item = Copy("v4", "v0")
    for i in range(40):
        item = Repeat(f"u{i + 1}", 1, (item,))
    with pytest.raises(PlanError, match="nest deeper than 32"):
        validate(replace(plan, body=(*plan.body, item)))


# --- binding

@pytest.mark.parametrize("symbols", [{"N": 3, "T": 4}, {"N": 0, "T": 4}, {"N": 3, "T": 1}])
def test_views_lie_within_their_buffers(symbols: dict[str, int]) -> None:
    bind(parse_plan(TEXT), symbols)


@pytest.mark.parametrize("old, new", [
    ("at T*N - N*u0 - N", "at T*N - N*u0"), ("at T*N - N*u0 - N", "at N*u0 - 1"),
    ("at T*N - N*u0 - N", "at T*N - N*u0 - 2*N"), ("at N*(u0)%2", "at N*(u0)%3"), ("at N*(u0)%2", "at N*u0"),
    ("of f0 at 0", "of f0 at T*N - N + 1"),
])
def test_views_that_leave_their_buffers(old: str, new: str) -> None:
    plan = parse_plan(lines((old, new)))
    with pytest.raises(PlanError, match="elements from"):
        bind(plan, {"N": 3, "T": 4})


def test_a_loop_without_trips_uses_no_views() -> None:
    with pytest.raises(PlanError, match="'v4' is 3 elements from 0 to 0 on, but 'f0' has 0"):
        bind(parse_plan(TEXT), {"N": 3, "T": 0})
    start = ("buffer f1 feed", "buffer f2 feed z : f32[N]\nbuffer f1 feed")
    bind(parse_plan(lines(("copy v4", "copy f2"), start, ("[f0, f1]", "[f0, f1, f2]"))), {"N": 3, "T": 0})


# --- lifetimes

N = symbol("N")
ADD = LoopKernel("add", tuple(Argument(name, F32, (N,), mode) for name, mode in (("a", "r"), ("b", "w"))),
                 (Loop("i", N, (Store("b", (symbol("i"),), Element("a", (symbol("i"),), F32)),), "grid"),),
                 ("N",))


def program(body: Sequence[Item], *buffers: Buffer) -> KernelProgram:
    every = (Buffer("f0", "feed", "x", F32, (N,)), Buffer("f1", "feed", "p", BOOL, ()),
             Buffer("o0", "output", "y", F32, (N,)), *(Buffer(f"b{i}", "arena", "", F32, (N,))
                                                       for i in range(4)), *buffers)
    return KernelProgram(Plan("g", "t", ("N",), every, ("f0", "f1"), ("o0",), (), (), tuple(body)),
                         {"add": ADD})


def launch(source: str, target: str) -> Launch:
    return Launch("add", (source, target), 1)


def lives(done: KernelProgram) -> dict[str, tuple[int, int, str]]:
    return {b.id: (b.first, b.last, b.alias) for b in done.plan.buffers if b.role == "arena"}


def test_lifetimes_around_a_loop() -> None:
    """b0 is read in the loop, so it lives through it, and b2, which is read behind it, too; b1 lives within
    a trip, and nothing takes over b0."""
    done = memory(program([launch("f0", "b0"), Repeat("u0", 5, (launch("b0", "b1"), launch("b1", "b2"))),
                           launch("b2", "o0")]))
    assert lives(done) == {"b0": (0, 4, ""), "b1": (2, 3, ""), "b2": (1, 5, "")}
    check_program(done, "memory")
    x = np.arange(3, dtype=np.float32)
    outputs, _, _ = run_program(done, {"x": x, "p": np.asarray(True)}, {}, {"N": 3})
    np.testing.assert_array_equal(outputs["y"], x)


def test_lifetimes_within_a_trip() -> None:
    """What lives within a trip is taken over there as outside loops."""
    done = memory(program([Repeat("u0", 5, (launch("f0", "b0"), Repeat("u1", 2, (
        launch("b0", "b1"), launch("b1", "b2"), launch("b2", "b3"))), launch("b3", "o0")))]))
    assert lives(done) == {"b0": (1, 6, ""), "b1": (3, 4, ""), "b2": (4, 5, "b1"), "b3": (2, 7, "")}


def test_lifetimes_of_branches() -> None:
    """Both sides write b1; b0 dies in one of them."""
    done = memory(program([launch("f0", "b0"), Branch("f1", (launch("b0", "b2"), launch("b2", "b1")),
                                                      (launch("f0", "b1"),)), launch("b1", "o0")]))
    assert lives(done) == {"b0": (0, 2, ""), "b2": (2, 3, "b0"), "b1": (3, 6, "b2")}
    check_program(done, "memory")
    for holds in (False, True):
        x = np.arange(3, dtype=np.float32)
        outputs, _, _ = run_program(done, {"x": x, "p": np.asarray(holds)}, {}, {"N": 3})
        np.testing.assert_array_equal(outputs["y"], x)


def test_a_view_keeps_its_buffer_alive() -> None:
    view = Buffer("v0", "view", "", F32, (N,), base="b0")
    done = memory(program([launch("f0", "b0"), launch("f0", "b1"), launch("b1", "b2"), launch("v0", "o0"),
                           launch("b2", "b3")], view))
    assert lives(done)["b0"] == (0, 3, "") and lives(done)["b2"] == (2, 4, "b1")


def test_views_are_not_taken_over() -> None:
    """The kernel reads its operand, and once more through a view."""
    two = LoopKernel("two", (Argument("a", F32, (N,), "r"), Argument("v", F32, (N,), "r"),
                             Argument("b", F32, (N,), "w")), ADD.body, ("N",))
    given = program([launch("f0", "b0"), Launch("two", ("b0", "v0", "b1"), 1), launch("b1", "o0")],
                    Buffer("v0", "view", "", F32, (N,), base="b0"))
    done = memory(replace(given, kernels={**given.kernels, "two": two}))
    assert lives(done)["b1"] == (1, 2, "")


FAULTS = [
    ([Repeat("u0", 2, (launch("b0", "o0"),))], "reads b0, which nothing has written before"),
    ([Repeat("N", 2, (launch("f0", "o0"),))], "counts with N a second time"),
    ([Repeat("u0", 2, (), condition="f0"), launch("f0", "o0")], "f0 is no bool scalar"),
    ([launch("f0", "b0"), launch("v0", "o0")], "uses v0 outside the loop of u0"),
    ([launch("f0", "b0"), Repeat("u0", 1, (launch("b0", "v0"), launch("b0", "o0")))],
     "gets v0, which it writes, twice"),
]


@pytest.mark.parametrize("body, message", FAULTS, ids=[m for _, m in FAULTS])
def test_programs_that_break_a_rule(body: list[Item], message: str) -> None:
    view = Buffer("v0", "view", "", F32, (N,), base="b0", offset=symbol("u0"))
    with pytest.raises(CompilerError, match=message):
        check_program(program(body, view), "lower")


def test_the_graph_of_a_program_with_a_loop() -> None:
    """Items at every depth are vertices; a view is its buffer."""
    compilation = Compilation(lstm(3)[0], host_target())
    plan, found = compilation.result("plan"), compilation.graph("memory")
    own = [b.id for b in plan.buffers if b.role != "view"]
    assert len(found) == len(own) + len(places(plan.body))
    inside = [p for p in places(plan.body) if p.loops and isinstance(p.item, Launch)]
    assert inside and all(found.in_degree(f"item {p.position}") > 0 for p in inside)
    assert {kind for _, kind in found.nodes(data="kind")} >= {"repeat", "launch", "copy"}
