"""Regions taken apart and put together: what passes over bodies of loops and branches share."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Node, Region, TensorType, Value, topological
from graphflow.compiler.plan.dims import DimLike, evaluate, symbols_of

GUESS = 128
"""What a size that a call decides is taken for where costs are compared."""


def inline(b: Builder, region: Region, operands: Sequence[Value]) -> list[Value]:
    """The region's results for these operands, made of nodes of the builder."""
    values = dict(zip(region.parameters, operands))
    for node in region.nodes():
        if node.result() not in values:
            copy = b.copy(node, [values[v] for v in node.inputs])
            values.update(zip(node.results, copy.results))
    return [values[v] for v in region.results]


def extract(results: Sequence[Value], leaves: Sequence[Value]) -> Region:
    """The region that computes the results from the leaves, which become its parameters in this order."""
    values: dict[Value, Value] = {}
    parameters = []
    for i, leaf in enumerate(leaves):
        type = TensorType(leaf.dtype, leaf.shape)
        parameter = Node("parameter", (), {"index": i}, (), (type,), leaf.node.origins).result()
        parameters.append(parameter)
        values.setdefault(leaf, parameter)
    for node in needed_nodes(results, values):
        copy = Node(node.op, tuple(values[v] for v in node.inputs), node.attrs, node.regions, node.types,
                    node.origins)
        for old, new in zip(node.results, copy.results):
            values.setdefault(old, new)
    return Region(tuple(parameters), tuple(values[v] for v in results))


def needed_nodes(results: Iterable[Value], leaves: Iterable[Value]) -> list[Node]:
    """The nodes that compute the results from the leaves, in topological order."""
    known, wanted = set(leaves), set[Node]()
    stack = [v for v in results if v not in known]
    while stack:
        node = stack.pop().node
        if node not in wanted:
            wanted.add(node)
            stack.extend(v for v in node.inputs if v not in known)
    return [node for node in topological(v.node for v in results) if node in wanted]


def dependent(nodes: Iterable[Node], on: Iterable[Value]) -> Callable[[Value], bool]:
    """Whether a value of these nodes (in topological order) is computed from one of the values `on`."""
    known = set(on)
    for node in nodes:
        if any(v in known for v in node.inputs):
            known.update(node.results)
    return lambda value: value in known


def guessed(d: DimLike) -> int:
    """The dimension as a number, with `GUESS` for every symbol."""
    return evaluate(d, dict.fromkeys(symbols_of(d), GUESS))


def guessed_bytes(type: TensorType) -> int:
    """The size of a value in bytes, with `GUESS` for every symbol."""
    return guessed(type.size) * type.dtype.bytes
