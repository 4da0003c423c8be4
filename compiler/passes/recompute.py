"""Values that are cheaper to compute again than to keep: what a convolution gave, less its mean.

Batch norm's gradient needs x - mean(x). The product x is in memory anyway, as the mean could only be taken
once all of it was there; to store the difference as well costs about as much as all else that the
normalisation does, and to subtract again costs nothing.
"""
from __future__ import annotations

from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.plan.dims import product, typical

SMALL = 64
"""An operand so many times smaller than the result counts for nothing."""


def recomputed(graph: Graph) -> set[Node]:
    """The nodes of which each reader is to get a copy of its own."""
    users = graph.users()
    roots = {v.node for v in (*graph.outputs.values(), *(v for n in graph.effects for v in n.inputs))}
    found: set[Node] = set()
    for n in graph.nodes():
        if (OPS[n.op].kind == "elementwise" and n not in roots and len(users[n]) > 1
                and all(OPS[u.op].kind in ("elementwise", "reduce") for u in users[n])
                and any(_in_memory(v, n, users, found) and all(_is_small(w, v) for w in n.inputs if w != v)
                        for v in n.inputs)):
            found.add(n)
    return found


def _in_memory(v: Value, reader: Node, users: dict[Node, list[Node]], found: set[Node]) -> bool:
    """Whether a contraction stores the value, as it can't reduce it, nor what the reader makes of it; or
    whether the value is computed again itself."""
    reduced = any(OPS[u.op].kind == "reduce" for u in (*users[v.node], *users[reader]))
    return v.node in found or (OPS[v.node.op].kind == "contraction" and reduced)


def _is_small(w: Value, v: Value) -> bool:
    """Whether reading `w`, a view perhaps, is little beside reading `v`."""
    while OPS[w.node.op].kind == "view" and w.node.inputs:
        w = w.node.inputs[0]
    return typical(product(w.shape)) * SMALL <= typical(product(v.shape))


def copied(inputs: list[Value], again: set[Node]) -> list[Value]:
    """The inputs of a node, with copies for it alone of those that are computed again."""
    made: dict[Value, Value] = {}

    def copy(v: Value) -> Value:
        if v.node in again and v not in made:
            n = v.node
            own = Node(n.op, tuple(map(copy, n.inputs)), n.attrs, n.regions, n.types, n.origins)
            made[v] = own.result(v.index)
        return made.get(v, v)

    return [copy(v) for v in inputs]
