"""Bodies: what a function computes from parameters, as a closed region of the graph.

A body is traced once, by calling it with parameter tensors. What it reads from outside becomes an operand;
so does what it computes from that alone (`close` with what the parameters decide), so a loop does not compute
it at every step. Random numbers depend on the loop's index, hence on a parameter: they stay inside.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar

from graphflow.compiler.ir.graph import Node, Region, TensorType, Value, topological
from graphflow.compiler.plan.errors import Location

Part = tuple[Sequence[Value], Sequence[Value]]
"""Parameters and results of a traced function, before it is closed."""

_made: ContextVar[tuple[set[Node], ...]] = ContextVar("graphflow_made", default=())
_indices: ContextVar[tuple[Value, ...]] = ContextVar("graphflow_indices", default=())

OUTSIDE = ("input", "state")
"""Ops that are never part of a region."""
_NUMBERS = ("constant", "training", "iota")
_VIEWS = ("broadcast_to", "reshape")
REMADE = (*_NUMBERS, *_VIEWS)
"""Ops whose nodes a body may have copies of instead of reading them from outside."""


def note(node: Node) -> None:
    """Tells the open `recording`s of a new node."""
    for nodes in _made.get():
        nodes.add(node)


@contextlib.contextmanager
def recording() -> Iterator[set[Node]]:
    """The nodes that are made inside."""
    nodes: set[Node] = set()
    token = _made.set((*_made.get(), nodes))
    try:
        yield nodes
    finally:
        _made.reset(token)


@contextlib.contextmanager
def loop(index: Value) -> Iterator[None]:
    """Inside, a loop's body is traced; `index` is the number of its step, int64."""
    token = _indices.set((*_indices.get(), index))
    try:
        yield
    finally:
        _indices.reset(token)


def loop_indices() -> tuple[Value, ...]:
    """The step numbers of the loops whose bodies are being traced, outermost first."""
    return _indices.get()


def parameter(type: TensorType, where: Location | None) -> Value:
    """A parameter of a body that is about to be traced."""
    return Node("parameter", (), {"index": 0}, (), (type,), (where,) if where else ()).result()


def depends_on(parameters: Sequence[Value]) -> Callable[[Node], bool]:
    """Whether a node is computed from one of the parameters."""
    known = {p.node: True for p in parameters}

    def depends(node: Node) -> bool:
        if node not in known:
            for n in topological([node]):
                if n not in known:
                    known[n] = any(known[v.node] for v in n.inputs)
        return known[node]
    return depends


def close(parts: Sequence[Part], inside: Callable[[Node], bool]) -> tuple[list[Region], list[Value]]:
    """Regions for the parts, made of copies of the nodes that are `inside`, and the values from outside that
    any of them reads: these are the last parameters of each region, in this order. Numbers are copied, and so
    are broadcasts of what is outside: inside they cost nothing, as an operand they would lie in memory."""
    numbers: dict[Node, bool] = {}

    def is_number(node: Node) -> bool:
        if node not in numbers:
            numbers[node] = node.op in _NUMBERS or node.op in _VIEWS and is_number(node.inputs[0].node)
        return numbers[node]

    orders, captured = [], dict[Value, None]()
    for parameters, results in parts:
        own = {p.node for p in parameters}
        passed = _gradient_paths(results, inside)
        order, outside = _reach(results, own, _stays(inside, passed, is_number))
        orders.append(order)
        captured.update(outside)
    return [_copy(part, order, list(captured)) for part, order in zip(parts, orders)], list(captured)


def _gradient_paths(results: Sequence[Value], inside: Callable[[Node], bool]) -> set[Node]:
    """The nodes between what the gradients inside a body are by and what they are of: if they stayed outside
    of the body, no gradient would pass through them."""
    passed = set[Node]()
    for node in topological(v.node for v in results):
        if node.op == "grad" and inside(node):
            count = node.attrs["cotangents"]
            reached = set(node.inputs[2 * count or 1:])
            for n in topological(v.node for v in node.inputs[:count or 1]):
                if any(v in reached for v in n.inputs):
                    reached.update(n.results)
                    passed.add(n)
    return passed


def _reach(results: Sequence[Value], own: set[Node], inside: Callable[[Node], bool]
           ) -> tuple[list[Node], dict[Value, None]]:
    """The nodes of a region in topological order, and what they read from outside."""
    order, outside = [], dict[Value, None]()
    keep: set[Node] = set()
    stack = [v.node for v in results]
    while stack:
        node = stack.pop()
        if node not in keep and node not in own and inside(node):
            keep.add(node)
            stack.extend(v.node for v in node.inputs)
    for node in topological(v.node for v in results):
        if node in keep:
            order.append(node)
            outside.update(dict.fromkeys(v for v in node.inputs if v.node not in keep and v.node not in own))
    outside.update(dict.fromkeys(v for v in results if v.node not in keep and v.node not in own))
    return order, outside


def _copy(part: Part, order: Sequence[Node], captured: Sequence[Value]) -> Region:
    values: dict[Value, Value] = {}
    parameters = []
    for i, v in enumerate((*part[0], *captured)):
        type = TensorType(v.dtype, v.shape)
        values[v] = Node("parameter", (), {"index": i}, (), (type,), v.node.origins).result()
        parameters.append(values[v])
    for node in order:
        inputs = tuple(values[v] for v in node.inputs)
        copy = Node(node.op, inputs, node.attrs, node.regions, node.types, node.origins)
        values.update(zip(node.results, copy.results))
    return Region(tuple(parameters), tuple(values[v] for v in part[1]))


def _stays(inside: Callable[[Node], bool], passed: Collection[Node], is_number: Callable[[Node], bool]
           ) -> Callable[[Node], bool]:
    """Which nodes a body keeps: its own, those that a gradient passes through, literals."""
    return lambda n: inside(n) or n in passed or is_number(n) or n.op == "broadcast_to"
