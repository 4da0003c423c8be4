"""The text of plans and their validator."""
from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, I64, DType
from graphflow.compiler.plan.errors import GraphflowError, PlanError, TextError
from graphflow.compiler.plan.plan_text import parse_plan, plan_hash, print_plan
from graphflow.compiler.plan.schema import Buffer, Check, Copy, EntryGuard, Launch, Message, Plan
from graphflow.compiler.plan.validate import validate

N, M = symbol("N"), symbol("M")

BUFFERS = (
    Buffer("f0", "feed", "x", F32, (N, 4), origins=(0,)),
    Buffer("f1", "feed", "the labels", I64, (N, 2 * M + 1)),
    Buffer("s0", "state", "layer/w", F32, (4, 4), origins=(1, 2)),
    Buffer("c0", "constant", "", I64, (2,), data=bytes(range(16))),
    Buffer("b0", "arena", "matmul", F32, (N, 4, 1, 1), layout="nhwc", first=0, last=1),
    Buffer("b1", "arena", "relu", F32, (N, 4), first=1, last=3, alias="b0", origins=(3,)),
    Buffer("b2", "arena", "ok", BOOL, (), first=1, last=2),
    Buffer("o0", "output", "y", F32, (N * 4,)),
)
BODY = (
    Launch("k0", ("f0", "s0", "c0", "b0"), N, scratch=64 * N, origins=(3,), writes=("b0",), shared=8 * M),
    Launch("k1", ("b0", "f1", "b1", "b2"), (N + 7) // 8, writes=("b1", "b2")),
    Check("b2", 1),
    Copy("b1", "o0"),
    Launch("k2", ("s0",), 1, after=(0,), origins=(4, 5), writes=("s0",)),
)
PLAN = Plan("step", "x86-64 \"v3\"\n", ("N", "M"), BUFFERS, ("f0", "f1"), ("o0",), ("s0",), ("s0",), BODY,
            (Message("all is lost", 1), Message("labels; from 0 to 9", -1, "the labels")),
            (EntryGuard(N, 4 * M, 2),))


def test_the_plan_is_valid():
    validate(PLAN)


def test_print_parse_print():
    text = print_plan(PLAN)
    read = parse_plan(text)
    assert read == PLAN
    assert print_plan(read) == text


def test_print_without_origins():
    text = print_plan(PLAN, origins=False)
    assert "#" not in text
    read = parse_plan(text)
    assert print_plan(read) == text
    assert plan_hash(read) == plan_hash(PLAN)


def test_hash_sees_what_the_plan_does():
    moved = replace(PLAN, buffers=(replace(BUFFERS[0], origins=(9,)), *BUFFERS[1:]))
    other = replace(PLAN, body=(replace(BODY[0], shared=128), *BODY[1:]))
    assert plan_hash(moved) == plan_hash(PLAN) != plan_hash(other)


def with_buffer(which: str, **changes) -> Plan:
    return replace(PLAN, buffers=tuple(replace(b, **changes) if b.id == which else b for b in BUFFERS))


def with_item(position: int, item) -> Plan:
    return replace(PLAN, body=(*BODY[:position], item, *BODY[position + 1:]))


def with_order(*positions: int) -> Plan:
    return replace(PLAN, body=tuple(BODY[p] for p in positions))


VIOLATIONS = [
    (replace(PLAN, version=2), "version 2"),
    (replace(PLAN, name=""), "no name"),
    (replace(PLAN, symbols=("N", "M", "N")), "symbol 'N' comes twice"),
    (replace(PLAN, symbols=("N",)), "unknown symbol M"),
    (replace(PLAN, symbols=("N", "M", "K")), "no feed's shape has the symbol K"),
    (replace(PLAN, buffers=(*BUFFERS, BUFFERS[0])), "buffer 'f0' comes twice"),
    (replace(PLAN, feeds=("f0",)), "feed f1 is not listed"),
    (replace(PLAN, feeds=("f0", "f1", "f0")), "listed feed 'f0' comes twice"),
    (replace(PLAN, feeds=("f0", "f1", "f2")), "'f2' is not a feed"),
    (replace(PLAN, outputs=("b1",)), "'b1' is not a output"),
    (replace(PLAN, written=("s1",)), "'s1' is listed as written but is no state"),
    (replace(PLAN, written=()), "item 4 writes the state 's0', which is not listed as written"),
    (replace(PLAN, messages=PLAN.messages[:1]), "no message has the code 1"),
    (replace(PLAN, messages=(Message("m", 0, "z"), PLAN.messages[1])), "blames the feed 'z'"),
    (replace(PLAN, guards=(EntryGuard(symbol("K"), 1, 0),)), "unknown symbol K"),
    (with_buffer("b2", id=""), "has no id"),
    (with_buffer("b2", role="stack"), "unknown role"),
    (with_buffer("b2", dtype=DType("f16", "float16", "f", 2)), "unknown element type"),
    (with_buffer("b2", shape=(1,) * 33), "33 axes"),
    (with_buffer("b2", shape=(symbol("K"),)), "buffer 'b2' uses the unknown symbol K"),
    (with_buffer("b2", shape=(-1,)), "negative or absurdly large"),
    (with_buffer("b2", shape=(1 << 60,)), "negative or absurdly large"),
    (with_buffer("b2", shape=(1 << 30, 1 << 30)), "takes 1152921504606846976 bytes"),
    (with_buffer("s0", shape=(N, 4)), "its shape must be constant"),
    (with_buffer("s0", name=""), "is a state without a name"),
    (with_buffer("f1", name="x"), "the name of a feed 'x' comes twice"),
    (with_buffer("c0", data=b"123"), "'c0' of 16 bytes holds 3 bytes"),
    (with_buffer("b2", data=b"1"), "holds 1 bytes of data"),
    (with_buffer("b2", first=2, last=1), "lives from 2 to 1"),
    (with_buffer("b2", last=5), "outside the body of 5 items"),
    (with_buffer("f0", last=1), "'f0', a feed, has a lifetime"),
    (with_buffer("b2", first=2, last=2), "item 1 uses 'b2', which lives from 2 to 2 only"),
    (with_buffer("b1", last=2), "item 3 uses 'b1'"),
    (with_buffer("b1", alias="b9"), "which no line before it defines"),
    (with_buffer("b1", alias="b2"), "which no line before it defines"),
    (with_buffer("b1", alias="f0"), "which is not in the arena"),
    (with_buffer("b0", last=2), "alive from 0 to 2, but begins at 1"),
    (with_buffer("b0", shape=(N, 3, 1, 1)), "which may be smaller"),
    (with_buffer("b0", shape=(M, 4, 1, 1)), "which may be smaller"),
    (with_buffer("b0", layout="nchw"), "arena of 4 axes, has the layout 'nchw'"),
    (with_buffer("b1", layout="nhwc"), "arena of 2 axes, has the layout 'nhwc'"),
    (with_buffer("o0", layout="nhwc"), "output of 1 axes, has the layout 'nhwc'"),
    (with_buffer("b2", alias="b0"), "which another one has taken over"),
    (with_item(2, Check("b9", 0)), "item 2 uses the unknown buffer 'b9'"),
    (with_item(2, Check("b1", 0)), "no bool scalar"),
    (with_item(2, Check("b2", -1)), "no message has the code -1"),
    (with_item(3, Copy("b1", "b9")), "unknown buffer 'b9'"),
    (with_item(3, Copy("b1", "f0")), "writes 'f0', a feed"),
    (with_item(3, Copy("s0", "o0")), "which is of another size"),
    (with_item(0, replace(BODY[0], kernel="")), "kernel without a name"),
    (with_item(0, replace(BODY[0], writes=())), "item 0 writes nothing"),
    (with_item(0, replace(BODY[0], writes=("o0",))), "writes a buffer that it is not given"),
    (with_item(0, replace(BODY[0], writes=("b0", "c0"))), "writes 'c0', a constant"),
    (with_item(0, replace(BODY[0], tasks=-1)), "absurd tasks: -1"),
    (with_item(0, replace(BODY[0], scratch=1 << 60)), "absurd scratch"),
    (with_item(0, replace(BODY[0], shared=-1)), "absurd scratch: -1"),
    (with_item(0, replace(BODY[0], shared=symbol("K"))), "item 0 uses the unknown symbol K"),
    (with_item(0, replace(BODY[0], tasks=symbol("K"))), "item 0 uses the unknown symbol K"),
    (with_item(1, replace(BODY[1], writes=("b1",))), "item 1 reads 'b2', which nothing has written before"),
    (with_item(4, replace(BODY[4], after=(4,))), "must run after item 4, which is not before it"),
    (with_item(4, replace(BODY[4], after=(1,))), "which reads no state that it writes"),
    (with_item(3, Launch("k", ("b1",), 1, writes=("b1",))), "nothing writes o0"),
    (replace(with_order(0, 1, 4, 2, 3), buffers=with_buffer("b2", last=3).buffers), "after the state s0"),
]


@pytest.mark.parametrize("plan, message", VIOLATIONS, ids=[m for _, m in VIOLATIONS])
def test_violation(plan, message):
    with pytest.raises(PlanError) as caught:
        validate(plan)
    assert message in str(caught.value)


def test_overlapping_chain_of_aliases():
    """c takes over b at the very item where b has taken over a: b and c would share memory in one launch."""
    buffers = (Buffer("f", "feed", "x", F32, (N,)), Buffer("o", "output", "y", F32, (N,)),
               Buffer("a", "arena", "", F32, (N,), first=0, last=1),
               Buffer("b", "arena", "", F32, (N,), first=1, last=1, alias="a"),
               Buffer("c", "arena", "", F32, (N,), first=1, last=2, alias="b"))
    body = (Launch("k", ("f", "a"), 1, writes=("a",)), Launch("l", ("a", "b", "c"), 1, writes=("b", "c")),
            Copy("c", "o"))
    plan = Plan("p", "t", ("N",), buffers, ("f",), ("o",), (), (), body)
    with pytest.raises(PlanError, match="alive from 1 to 1, but begins at 1"):
        validate(plan)
    validate(replace(plan, buffers=(*buffers[:4], replace(buffers[4], alias=""))))


@pytest.mark.parametrize("old, new, message", [
    ("version 1", "version 7", "of version 7"),
    ("feed x :", "food x :", "line 3, column 11: expected a role"),
    ("live 0 to 1", "", "expected 'live'"),
    ("1: launch", "2: launch", "without gaps: expected 1"),
    ("hex\"", "hex\"zz", "not hexadecimal"),
    ("tasks N", "tasks N N", "expected"),
    ("check b2", "chuck b2", "expected what to do (launch, copy, check, repeat, branch)"),
])
def test_text_that_breaks_the_grammar(old, new, message):
    text = print_plan(PLAN)
    assert old in text
    with pytest.raises(TextError) as caught:
        parse_plan(text.replace(old, new, 1), "my.plan")
    assert message in str(caught.value) and "my.plan, line" in str(caught.value)


def test_mutated_text_raises_only_our_errors():
    """Whatever is done to the text, the answer is a plan or an error of ours."""
    text = print_plan(PLAN)
    tokens = text.split(" ")
    rng = random.Random(5)
    pieces = ["0", "-1", "99999999999999999999", "N", "[", "]", "\"", "#", "hex", "live", "//", "%", "(", "é"]
    accepted = 0
    for _ in range(3000):
        changed = list(tokens)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            word = changed[at]
            changed[at] = rng.choice([rng.choice(pieces), rng.choice(tokens), word[:-1], word * 2])
        try:
            parse_plan(" ".join(changed))
            accepted += 1
        except GraphflowError:
            pass
    assert accepted < 2000                                        # so the mutations do change something
    for _ in range(500):
        with pytest.raises(GraphflowError):                       # what comes after the body may be missing
            parse_plan(text[:rng.randrange(text.index("message"))])


def test_the_example_of_the_grammar():
    page = (Path(__file__).parent.parent / "docs" / "plan-grammar.md").read_text()
    text = page.split("```text\n")[1].split("```")[0]
    assert print_plan(parse_plan(text)) == text
