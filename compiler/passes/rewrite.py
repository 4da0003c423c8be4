"""The rewriting engine: tables of small local rules, applied in one sweep from operands to users.

A pass is a table of `Rule` rows. Every new node is shown to the rules of its op until none fires; the nodes
that a rule makes are shown to the rules too. There is no fix-point over the whole graph: each rule lowers the
cost that its table states, so the sweep ends, and a limit turns a table that does not into a CompilerError.

What a `grad` node differentiates with respect to is *pinned*: a rule must not look through it
(``log(exp(a))`` is not ``a`` for one who asks for the gradient with respect to ``exp(a)``), and it never
merges with an equal node. """
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, Value, walk
from graphflow.compiler.passes.bodies import in_bodies
from graphflow.compiler.plan.errors import CompilerError

Result = Value | Sequence[Value] | None
LIMIT = 200
"""How many rules may fire for one node of the old graph."""


class RewriteBuilder(Builder):
    """A builder that knows the pinned values of the new graph."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[Value] = set()

    def match(self, value: Value, *ops: str) -> Node | None:
        """The node that makes `value` if it is of one of these ops and may be looked into."""
        return value.node if value.node.op in ops and value not in self.pinned else None

    def constant_of(self, value: Value) -> int | float | bool | None:
        """The number that every element of `value` is: a scalar constant, possibly broadcast or reshaped."""
        while (view := self.match(value, "broadcast_to", "reshape")) is not None:
            value = view.inputs[0]
        node = self.match(value, "constant")
        return None if node is None else node.attrs["value"]

    def is_constant(self, value: Value, number: int | float) -> bool:
        """Whether every element of `value` is `number`, told by bits: 0.0 is not -0.0."""
        found = self.constant_of(value)
        return found is not None and found == number and str(float(found)) == str(float(number))

    def keep(self, node: Node, inputs: Sequence[Value], pinned: Iterable[int]) -> tuple[Value, ...]:
        """A copy of a node some of whose results are pinned: it merges with no other node."""
        if inputs:
            copy = Node(node.op, tuple(inputs), node.attrs, node.regions, node.types, node.origins)
        else:
            copy = self.intern(node)                          # a leaf is itself whoever reads it
        self.pinned.update(copy.result(i) for i in pinned)
        return copy.results


@dataclass(frozen=True)
class Rule:
    """A row: `apply(b, node, inputs)` gives what stands for a node of op `op`, or None where the pattern does
    not fit.

    `keeps`: "bits", the result is the same bit for bit, or "tolerance", it is at least as accurate.
    """
    name: str
    op: str
    apply: Callable[[RewriteBuilder, Node, Sequence[Value]], Result]
    keeps: str = "bits"


def rewrite(graph: Graph, rules: Sequence[Rule]) -> Graph:
    """The graph after one sweep. Guarantees: same inputs, outputs, effects and types; no dead nodes; equal
    nodes are one unless pinned. Bodies of loops and branches are rewritten by the same table."""
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        table.setdefault(rule.op, []).append(rule)
    pinned = pinned_results(graph.nodes())
    b = RewriteBuilder()
    sweep = _Sweep(b, table)

    def make(_: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        node, old = in_bodies(node, lambda body: rewrite(body, rules)), node
        if old in pinned:
            return sweep.settle_as(b.keep(node, inputs, pinned[old]))
        sweep.fired = 0
        return sweep.settle(b.copy(node, inputs))

    return rebuild(graph, make, b)


def pinned_results(nodes: Iterable[Node]) -> dict[Node, tuple[int, ...]]:
    """The nodes with results that some `grad` differentiates with respect to, and which results these are."""
    out: dict[Node, tuple[int, ...]] = {}
    for node in walk(nodes):
        if node.op == "grad":
            for v in node.inputs[2 * node.attrs["cotangents"] or 1:]:
                out[v.node] = tuple(dict.fromkeys((*out.get(v.node, ()), v.index)))
    return out


class _Sweep:
    def __init__(self, b: RewriteBuilder, table: Mapping[str, Sequence[Rule]]) -> None:
        self.b, self.table = b, table
        self.settled: dict[Node, tuple[Value, ...]] = {}
        self.fired = 0

    def settle_as(self, results: tuple[Value, ...]) -> tuple[Value, ...]:
        self.settled[results[0].node] = results
        return results

    def settle(self, node: Node) -> tuple[Value, ...]:
        """What stands for a node of the new graph, once no rule fires on it or on what the rules made for
        it."""
        if node not in self.settled:
            inputs = tuple(self.settle(v.node)[v.index] for v in node.inputs)
            done = node if inputs == node.inputs else self.b.copy(node, inputs)
            self.settled[node] = self.settled[done] if done in self.settled else self.apply(done)
        return self.settled[node]

    def apply(self, node: Node) -> tuple[Value, ...]:
        for rule in self.table.get(node.op, ()):
            found = rule.apply(self.b, node, node.inputs)
            if found is None:
                continue
            results = (found,) if isinstance(found, Value) else tuple(found)
            self.check(rule, node, results)
            return tuple(self.settle(v.node)[v.index] for v in results)
        self.settled[node] = node.results
        return node.results

    def check(self, rule: Rule, node: Node, results: tuple[Value, ...]) -> None:
        where = node.origins[0] if node.origins else None
        self.fired += 1
        if self.fired > LIMIT:
            raise CompilerError(f"the rewriting of {node.op} does not end: rule {rule.name!r} fired last",
                                where=where)
        if tuple(v.type for v in results) != node.types:
            made = [v.type for v in results]
            raise CompilerError(f"rule {rule.name!r} changes {list(node.types)} to {made}", where=where)
