"""Level 1: the tensor graph.

A `Node` is ``(op, inputs, attrs, regions, types, origins)``; a `Value` is (node, index of a result). Nodes
are immutable and form a DAG; a `Graph` names its feeds, outputs and effects (state updates and checks).
Regions are closed: what a body needs is passed in as an operand and appears as a region parameter (a node of
op ``parameter``).

State is explicit and functional: a leaf node ``state`` reads an entry of the Store as it was when the step
began, an effect node ``update`` gives the entry's value after the step.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import Location


@dataclass(frozen=True)
class TensorType:
    """Element type and shape, e.g. ``f32[N,784]``; `layout` ("" is row-major in the order of the shape) is
    chosen by the schedule stage and belongs to the buffer that will hold the value."""
    dtype: DType
    shape: tuple[DimLike, ...]
    layout: str = ""

    def __str__(self) -> str:
        at = f"@{self.layout}" if self.layout else ""
        return f"{self.dtype}[{','.join(str(d).replace(' ', '') for d in self.shape)}]{at}"

    __repr__ = __str__

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> DimLike:
        """The number of elements."""
        return product(self.shape)


Attrs = Mapping[str, Any]


class Value(NamedTuple):
    """One result of a node."""
    node: Node
    index: int = 0      # type: ignore[assignment]  # the name that every user of a tuple of results expects

    @property
    def type(self) -> TensorType:
        """Element type and shape."""
        return self.node.types[self.index]

    @property
    def shape(self) -> tuple[DimLike, ...]:
        """The extent of each axis."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.type.dtype

    @property
    def op(self) -> str:
        """The op that makes it."""
        return self.node.op

    def __repr__(self) -> str:
        return f"<{self.node.op}#{self.index} {self.type}>"


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One operation. Attribute values are bool, int, float, str, bytes, DType, dimensions and tuples of
    these.

    `origins` are the user's lines that asked for it; they are no part of a node's identity (see `Builder`).
    """
    op: str
    inputs: tuple[Value, ...]
    attrs: Attrs
    regions: tuple[Region, ...]
    types: tuple[TensorType, ...]
    origins: tuple[Location, ...] = ()

    def result(self, index: int = 0) -> Value:
        """Result number `index`."""
        return Value(self, index)

    @property
    def results(self) -> tuple[Value, ...]:
        """All results."""
        return tuple(Value(self, i) for i in range(len(self.types)))

    def __repr__(self) -> str:
        return f"<Node {self.op} {list(self.types)}>"


@dataclass(frozen=True, eq=False)
class Region:
    """A closed body: parameters (results of ``parameter`` nodes) and results computed from them."""
    parameters: tuple[Value, ...]
    results: tuple[Value, ...]

    def nodes(self) -> list[Node]:
        """Every node, parameters first, then in topological order."""
        return topological([*(p.node for p in self.parameters), *(r.node for r in self.results)])


@dataclass(frozen=True, eq=False)
class Graph:
    """A whole program at level 1.

    inputs: the feed nodes (op ``input``) in the order of the call; outputs: name -> value; effects:
    ``update`` and ``check`` nodes, in order. `guards` are equalities between dimensions that are checked when
    a call binds the symbols.
    """
    name: str
    inputs: tuple[Value, ...]
    outputs: Mapping[str, Value]
    effects: tuple[Node, ...] = ()
    guards: tuple[Guard, ...] = ()
    _nodes: list[Node] = field(default_factory=list, repr=False)

    def nodes(self) -> list[Node]:
        """Every node in topological order: feeds first, then as first needed by outputs and effects."""
        if not self._nodes:
            leaves = [v.node for v in self.inputs]
            roots = [*leaves, *(v.node for v in self.outputs.values()), *self.effects]
            self._nodes.extend(topological(roots))
        return self._nodes

    def users(self) -> dict[Node, list[Node]]:
        """The nodes that read each node, in topological order, each once."""
        out: dict[Node, list[Node]] = {n: [] for n in self.nodes()}
        for n in self.nodes():
            for producer in dict.fromkeys(v.node for v in n.inputs):
                out[producer].append(n)
        return out

    def states(self) -> dict[str, Node]:
        """The state leaves by name."""
        return {n.attrs["name"]: n for n in self.nodes() if n.op == "state"}

    def updates(self) -> dict[str, Node]:
        """The update effects by the name of the state that they write."""
        return {n.attrs["name"]: n for n in self.effects if n.op == "update"}


@dataclass(frozen=True)
class Guard:
    """`left == right` must hold when a call binds the symbols, else the error points at `where`."""
    left: DimLike
    right: DimLike
    where: Location | None = None


def topological(roots: Iterable[Node]) -> list[Node]:
    """The nodes that the roots need, operands before users, iteratively (deep graphs do not hit the
    stack)."""
    done: dict[Node, None] = {}
    for root in roots:
        stack = [(root, iter(root.inputs))]
        if root in done:
            continue
        open_nodes = {root}
        while stack:
            node, pending = stack[-1]
            for v in pending:
                if v.node not in done:
                    if v.node in open_nodes:
                        raise ValueError(f"the graph has a cycle through {v.node!r}")
                    open_nodes.add(v.node)
                    stack.append((v.node, iter(v.node.inputs)))
                    break
            else:
                stack.pop()
                open_nodes.discard(node)
                done[node] = None
    return list(done)


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes and, after each, those of its regions, at every depth."""
    for n in nodes:
        yield n
        for r in n.regions:
            yield from walk(r.nodes())
