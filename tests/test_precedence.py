"""The order of kernels while they merge, against NetworkX."""

from __future__ import annotations

import random

import networkx as nx
import pytest

from graphflow.compiler.passes.precedence import Precedence


def _leads(graph: nx.DiGraph, first: int, then: int) -> bool:
    return first == then or nx.has_path(graph, first, then)


@pytest.mark.parametrize("seed", range(30))
def test_what_leads_where_is_as_in_networkx(seed: int) -> None:
    """Members come in front, edges and mergers follow in any order: every answer is that of a plain
    search."""
    rng = random.Random(seed)
    order: Precedence[int] = Precedence()
    graph = nx.DiGraph()
    merged = 0
    for member in range(40):
        order.add(member)
        graph.add_node(member)
        for _ in range(rng.randrange(4)):
            a, b = rng.choice(list(graph)), rng.choice(list(graph))
            assert order.leads([a], b) == _leads(graph, a, b)
            if not _leads(graph, b, a):
                order.order(a, b)
                graph.add_edge(a, b)
        if graph.edges and rng.random() < 0.3:
            first, then = rng.choice(list(graph.edges))
            detours = graph.copy()
            detours.remove_edge(first, then)
            assert order.between(first, then) == nx.has_path(detours, first, then)
            if not order.between(first, then):
                order.merge(first, then)
                graph = nx.contracted_nodes(graph, first, then, self_loops=False)
                merged += 1
        assert nx.is_directed_acyclic_graph(graph)
    assert merged > 2
    for a in graph:
        assert (order.before[a], order.behind[a]) == (set(graph.predecessors(a)), set(graph.successors(a)))
        for b in graph:
            assert order.leads([a], b) == _leads(graph, a, b)


def test_any_start_leads() -> None:
    """The target itself is one of the starts, or one of them leads to it."""
    order: Precedence[str] = Precedence()
    for member in "cba":
        order.add(member)
    order.order("a", "b")
    assert order.leads(["c", "a"], "b") and order.leads(["b"], "b")
    assert not order.leads(["c", "b"], "a") and not order.leads([], "a")
