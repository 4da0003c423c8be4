"""Which values of a scan's steps its gradient keeps.

The backward loop needs values of the forward loop. Each may be kept, which costs its bytes for every step,
or computed again from others. What is read anew anyway (inputs of the step, constants) is free. Contractions,
reductions, routines, random numbers, inner loops and transcendental functions are not computed twice: they,
or something behind them, must be kept. The cheapest choice is a minimum cut of the body between what cannot
be had again and what the backward loop reads: L. R. Ford, D. R. Fulkerson, "Maximal flow through a network"
(Canadian Journal of Mathematics 8, 1956). """
from __future__ import annotations

from collections.abc import Callable, Sequence

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.passes.regions import guessed, guessed_bytes, needed_nodes

DEAR_FLOPS = 10
"""An elementwise op of more operations for each element than this is not computed twice."""
_CHEAP_KINDS = ("leaf", "view", "gather")


def values_to_keep(needed: Sequence[Value], carries: Sequence[Value], varies: Callable[[Value], bool],
                   stacked: Sequence[Value], only_carries: bool) -> list[Value]:
    """The values to keep, in the order of the body, from which all that is `needed` can be computed again.

    carries: the parameters that are not free; `varies` says whether a value depends on the step at all;
    `stacked` are outputs of the loop already, so they cost nothing. `only_carries`: keep nothing else.
    """
    nodes = needed_nodes(needed, ())
    order = [v for node in nodes for v in node.results if varies(v)]
    if only_carries:
        read = {v for node in nodes for v in node.inputs} | set(needed)
        return [v for v in carries if v in read]
    return _minimum_cut(order, set(needed), set(carries), set(stacked)) if order else []


def _minimum_cut(order: Sequence[Value], needed: set[Value], carries: set[Value], stacked: set[Value]
                 ) -> list[Value]:
    import networkx
    number = {v: i for i, v in enumerate(order)}
    source, sink = -1, -2
    network = networkx.DiGraph()
    network.add_nodes_from((source, sink))
    for v, i in number.items():                       # 2i: the value before it is kept, 2i + 1: behind that
        if v.node.op == "parameter" and v not in carries:
            continue
        network.add_edge(2 * i, 2 * i + 1, capacity=1 if v in stacked else 1 + guessed_bytes(v.type))
        if v in carries or not _is_cheap(v.node):
            network.add_edge(source, 2 * i)
        else:
            network.add_edges_from((2 * number[u] + 1, 2 * i) for u in v.node.inputs if u in number)
        if v in needed:
            network.add_edge(2 * i + 1, sink)
    _, (before, _) = networkx.minimum_cut(network, source, sink)
    return [v for v, i in number.items()
            if 2 * i in before and 2 * i + 1 in network and 2 * i + 1 not in before]


def _is_cheap(node: Node) -> bool:
    from graphflow.compiler.ops import OPS
    kind = OPS[node.op].kind
    if kind == "elementwise":
        return guessed(OPS[node.op].flops(node)) <= DEAR_FLOPS * guessed(node.types[0].size)
    return kind in _CHEAP_KINDS
