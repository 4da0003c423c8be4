"""Makes a failing graph smaller: drops outputs and effects, and puts operands in the place of nodes, while it
still fails."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.plan.errors import GraphflowError


def shrink(graph: Graph, fails: Callable[[Graph], bool], seconds: float = 20) -> Graph:
    """The smallest graph found that `fails`; `graph` itself does."""
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(graph):
            if time.monotonic() > end:
                return graph
            if _holds(fails, candidate):
                graph, smaller = candidate, True
                break
    return graph


def _holds(fails: Callable[[Graph], bool], candidate: Graph) -> bool:
    try:
        return fails(candidate)
    except (GraphflowError, NotImplementedError, ValueError):     # another fault than the one looked for
        return False


def _candidates(graph: Graph) -> Iterator[Graph]:
    """Smaller graphs, the much smaller ones first."""
    names = list(graph.outputs)
    for half in (names[:len(names) // 2], names[len(names) // 2:]):
        if len(names) > 1:
            yield _with(graph, half, graph.effects)
    for i in range(len(graph.effects)):
        yield _with(graph, names, (*graph.effects[:i], *graph.effects[i + 1:]))
    for name in names:
        if len(names) + len(graph.effects) > 1:
            yield _with(graph, [n for n in names if n != name], graph.effects)
    for node in reversed(graph.nodes()):
        for v in node.inputs:
            if node.types == (v.type,):
                yield _replaced(graph, node, v)
        number = node.op == "broadcast_to" and node.inputs[0].op == "constant"
        if len(node.types) == 1 and node.inputs and not number and node.op not in ("update", "check"):
            yield _replaced(graph, node, None)


def _with(graph: Graph, outputs: Sequence[str], effects: Sequence[Node]) -> Graph:
    kept = {name: graph.outputs[name] for name in outputs}
    return Graph(graph.name, graph.inputs, kept, tuple(effects), graph.guards)


def _replaced(graph: Graph, old: Node, new: Value | None) -> Graph:
    """The graph with an operand, or a number, for the result of the node `old`."""
    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node is not old:
            return b.copy(node, inputs).results
        if new is not None:
            return [inputs[node.inputs.index(new)]]
        return [b.constant(1, node.types[0].dtype, node.types[0].shape)]

    return rebuild(graph, make)
