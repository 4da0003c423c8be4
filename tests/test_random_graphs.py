"""Every stage keeps what random graphs compute, and their text is exact. A failure is shrunk and shown as
text."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from random_graphs import GROWN, Case, random_case
from shrink import shrink

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, Node, Value, walk
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.passes.assemble import fuse
from graphflow.compiler.passes.autodiff import expand_gradients
from graphflow.compiler.passes.canonical import APPROXIMATE, canonicalize
from graphflow.compiler.passes.joint import JOINT, optimize_jointly
from graphflow.compiler.passes.rewrite import rewrite
from graphflow.compiler.passes.schedule import schedule
from graphflow.compiler.passes.stable import stabilize

SEEDS = range(360)
Arrays = dict[str, np.ndarray]


class Stage(NamedTuple):
    """`keeps`: "bits" or "tolerance", of the results of the stage before."""
    name: str
    apply: Callable[[Graph], Graph]
    keeps: str


def joint_bits(graph: Graph) -> Graph:
    """The rows of the joint table that keep bits."""
    return rewrite(graph, [rule for rule in JOINT if rule.keeps == "bits"])


STAGES = (
    Stage("canonical", canonicalize, "bits"),
    Stage("stable", stabilize, "tolerance"),
    Stage("autodiff", expand_gradients, "bits"),
    Stage("joint", joint_bits, "bits"),
    Stage("joint", optimize_jointly, "tolerance"),
    Stage("fuse", fuse, "bits"),
    Stage("schedule", schedule, "bits"),
)
"""What is applied in turn. A stage that ends in other things than graphs joins as one that returns what it
was given and raises AssertionError where its own results differ."""


def run(graph: Graph, case: Case) -> Arrays:
    """Outputs and updates, whatever the stage."""
    expanded = expand_gradients(graph) if any(n.op == "grad" for n in graph.nodes()) else graph
    outputs, updates = interpret(expanded, case.feeds, case.state)
    return {**outputs, **{f"update of {name}": value for name, value in updates.items()}}


def loosely_kept(graph: Graph) -> set[str]:
    """The results of which bits are not compared. Those behind a `grad` node: the gradient of an equal
    formula may round in another way. Those behind a function that NumPy computes in another way for one
    number than for many."""
    behind: set[Node] = set()
    for node in graph.nodes():
        if node.op == "grad" or any(n.op in APPROXIMATE for n in walk([node])) or any(
                v.node in behind for v in node.inputs):
            behind.add(node)
    return {*(name for name, v in graph.outputs.items() if v.node in behind),
            *(f"update of {name}" for name, node in graph.updates().items() if node in behind)}


def compare(before: Arrays, after: Arrays, keeps: str, loose: set[str]) -> None:
    """AssertionError where `after` is not what it must be. Where `before` is not finite, a tolerance says
    nothing."""
    assert before.keys() == after.keys()
    for name, x in before.items():
        y = after[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{name}: {x.dtype}{x.shape}, {y.dtype}{y.shape}"
        if keeps == "bits" and name not in loose:
            assert bits(x) == bits(y), f"{name} changed bits: {x} became {y}"
        elif x.dtype.kind != "f":
            assert np.array_equal(x, y), f"{name}: {x} became {y}"
        else:
            known = np.isfinite(x)
            scale = np.abs(x[known]).max(initial=1.0)
            error = np.abs(x[known] - y[known]).max(initial=0.0)
            assert error <= (1e-8 if x.dtype == np.float64 else 3e-3) * scale, f"{name}: {x} became {y}"


def bits(x: np.ndarray) -> bytes:
    """The array's bits; every NaN counts as the same one."""
    return (np.where(np.isnan(x), np.nan, x) if x.dtype.kind == "f" else x).astype(x.dtype).tobytes()


def check_stages(graph: Graph, case: Case, stages: tuple[Stage, ...] = STAGES) -> None:
    """Runs the stages one after another; AssertionError where a result changes."""
    check_graph(graph, "trace")
    check_text(graph)
    before = run(graph, case)
    for stage in stages:
        loose = loosely_kept(graph)
        graph = stage.apply(graph)
        check_graph(graph, stage.name)
        check_text(graph)
        after = run(graph, case)
        try:
            compare(before, after, stage.keeps, loose)
        except AssertionError as e:
            raise AssertionError(f"{stage.name}: {e}") from None
        before = after


def check_text(graph: Graph) -> None:
    """Print, parse, print is the identity."""
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text


def fails(case: Case, stages: tuple[Stage, ...] = STAGES) -> Callable[[Graph], bool]:
    """Whether a graph on this case's feeds fails."""
    def check(graph: Graph) -> bool:
        try:
            check_stages(graph, case, stages)
        except AssertionError:
            return True
        return False
    return check


def check_seed(seed: int, stages: tuple[Stage, ...] = STAGES) -> None:
    """The random graph of this seed through the stages. A failure is shrunk before it is shown."""
    case = random_case(seed)
    try:
        check_stages(case.graph, case, stages)
    except AssertionError as e:
        small = shrink(case.graph, fails(case, stages))
        raise AssertionError(f"seed {seed}: {e}\n{print_graph(small)}") from None


@pytest.mark.reference
@pytest.mark.parametrize("seed", SEEDS)
def test_stages_keep_values(seed: int) -> None:
    check_seed(seed)


@pytest.mark.reference
def test_random_graphs_are_diverse() -> None:
    """Every op of the table occurs, and the graphs have what they are to test."""
    seen: dict[str, int] = {}
    symbolic = second = 0
    for seed in SEEDS:
        graph = random_case(seed).graph
        for node in walk(graph.nodes()):
            seen[node.op] = seen.get(node.op, 0) + 1
        symbolic += any(not isinstance(d, int) for n in graph.nodes() for t in n.types for d in t.shape)
        second += sum(n.op == "grad" for n in graph.nodes()) > 1
    assert [op.name for op in GROWN if op.name not in seen] == []
    assert min(seen.get(op, 0) for op in ("scan", "cond", "while_loop")) >= 20
    assert symbolic > len(SEEDS) // 2 and second > len(SEEDS) // 10 and seen["update"] > len(SEEDS) // 2


@pytest.mark.reference
def test_a_wrong_stage_is_found_and_shrunk() -> None:
    """The test above can fail: a stage that takes sin for cos is found, and the case shown is small."""
    def wrong(graph: Graph) -> Graph:
        def make(b: Builder, node: Node, inputs: list[Value]) -> tuple[Value, ...]:
            return b.node("cos" if node.op == "sin" else node.op, inputs, node.attrs, node.regions).results
        return rebuild(graph, make)

    stage = (Stage("canonical", wrong, "tolerance"),)
    seed = next(s for s in SEEDS if fails(c := random_case(s), stage)(c.graph))
    with pytest.raises(AssertionError, match="canonical: .*changed|became") as found:
        check_seed(seed, stage)
    text = str(found.value)
    assert f"seed {seed}: " in text and "sin(" in text
    assert text[text.index("graph random_"):].count(" = ") <= 12
