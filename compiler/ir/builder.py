"""Builds graphs: the one place where nodes are made, typed and interned.

``b.add(x, y)``, ``b.reduce_sum(x, axes=(0,))``: every op of the table is a method, Python numbers become
constants of the other operand's type, and the result is a Value (a tuple of them for an op with several
results).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from graphflow.compiler.ir.graph import Attrs, Graph, Node, Region, TensorType, Value
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import F32, DType
from graphflow.compiler.plan.errors import Location

if TYPE_CHECKING:
    from graphflow.compiler.ops.record import Op


class Builder:
    """Makes nodes, each once: equal (op, inputs, attrs, regions) give the same node, whose origins are the
    union.

    The intern table lives in the builder, that is in one graph under construction. ``random_bits`` nodes
    carry their stream in the attributes, so two of them never merge by accident. Origins of new nodes are
    those set by ``with b.origin(...)``, plus those passed.
    """

    def __init__(self) -> None:
        self._interned: dict[tuple, Node] = {}
        self._origins: tuple[Location, ...] = ()

    @contextlib.contextmanager
    def origin(self, origins: Sequence[Location]) -> Iterator[None]:
        """Nodes made inside come from these lines."""
        before, self._origins = self._origins, tuple(origins)
        try:
            yield
        finally:
            self._origins = before

    def node(self, op: str, inputs: Sequence[Value] = (), attrs: Attrs | None = None,
             regions: Sequence[Region] = ()) -> Node:
        """The node, typed by its op's record; errors of typing are UserErrors without a place, which the
        language adds."""
        from graphflow.compiler.ops import OPS

        record = OPS[op]
        full = record.complete(attrs or {})
        types = tuple(record.infer([v.type for v in inputs], full, regions))
        return self.intern(Node(op, tuple(inputs), full, tuple(regions), types, self._origins))

    def intern(self, node: Node) -> Node:
        """The builder's node equal to this one; the origins of both are united."""
        key = (node.op, node.inputs, attrs_key(node.attrs), tuple(map(id, node.regions)), node.types)
        known = self._interned.setdefault(key, node)
        if known is not node and any(o not in known.origins for o in node.origins):
            self.add_origins(known, node.origins)
        return known

    @staticmethod
    def add_origins(node: Node, origins: Sequence[Location]) -> None:
        """Unites origins. They are no part of identity, so this is the only change a node ever sees, and it
        only happens to nodes of the graph that this builder is making."""
        merged = tuple(dict.fromkeys((*node.origins, *origins)))
        object.__setattr__(node, "origins", merged)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        from graphflow.compiler.ops import OPS

        if op not in OPS:
            raise AttributeError(f"no op named {op!r}")

        def make(*inputs: Value | int | float | bool, **attrs: Any) -> Any:
            first = next((v for v in inputs if isinstance(v, Value)), None)
            values = [v if isinstance(v, Value) else self.scalar_like(v, first) for v in inputs]
            results = self._made(OPS[op], values, attrs)
            return results[0] if len(results) == 1 else results

        return make

    def _made(self, record: Op, values: Sequence[Value], attrs: Attrs) -> tuple[Value, ...]:
        """The results of an op, with float32 between casts where an operand is a half."""
        from graphflow.compiler.ops.half import passes_float32, rounded_to

        if record.name == "cast" and passes_float32(values[0].dtype, attrs["dtype"]):
            values = [self.cast(values[0], dtype=F32)]
        rounded = rounded_to(record, [v.dtype for v in values])
        if rounded is None:
            return self.node(record.name, values, attrs).results
        values = [self.cast(v, dtype=F32) if v.dtype.is_half else v for v in values]
        return tuple(self.cast(r, dtype=rounded) if r.dtype == F32 else r
                     for r in self.node(record.name, values, attrs).results)

    def constant(self, value: int | float | bool, dtype: DType, shape: Sequence[DimLike] = ()) -> Value:
        """A scalar constant, broadcast to `shape`."""
        scalar = self.node("constant", (), {"value": _python_scalar(value, dtype), "dtype": dtype}).result()
        return self.broadcast(scalar, shape) if shape else scalar

    def scalar_like(self, value: int | float | bool, like: Value | None) -> Value:
        """A constant of the dtype and shape of `like`."""
        if like is None:
            raise TypeError("an op on Python numbers alone has no element type: use builder.constant")
        return self.constant(value, like.dtype, like.shape)

    def broadcast(self, value: Value, shape: Sequence[DimLike]) -> Value:
        """`value` broadcast to `shape` by NumPy's rules; the value itself where it has that shape."""
        if tuple(value.shape) == tuple(shape):
            return value
        return self.node("broadcast_to", (value,), {"shape": tuple(shape)}).result()

    def zeros(self, type: TensorType) -> Value:
        """Zeros of that type."""
        return self.constant(False if type.dtype.kind == "b" else 0, type.dtype, type.shape)

    def copy(self, node: Node, inputs: Sequence[Value]) -> Node:
        """The node with other inputs of the same types; its type is kept, not inferred again."""
        return self.intern(Node(node.op, tuple(inputs), node.attrs, node.regions, node.types, node.origins))

    def parameter(self, type: TensorType, index: int) -> Value:
        """A region parameter; a new node each time."""
        return Node("parameter", (), {"index": index}, (), (type,), self._origins).result()


def attrs_key(attrs: Attrs) -> tuple:
    """A hashable identity of attributes in which 0.0 is not -0.0, 1 is not True, and nan is itself."""
    return tuple((k, type(v), v.hex() if isinstance(v, float) else v) for k, v in attrs.items())


def _python_scalar(value: Any, dtype: DType) -> int | float | bool:
    if dtype.kind == "b":
        return bool(value)
    return float(value) if dtype.has_gradient else int(value)


Make = Callable[[Builder, Node, list[Value]], Sequence[Value]]
"""What stands for a node's results, of its mapped inputs; the builder is that of the graph or region."""


def rebuild(graph: Graph, make: Make, builder: Builder | None = None, name: str | None = None) -> Graph:
    """The graph made anew: `make(builder, node, mapped inputs)` gives what stands for the node's results.
    Every new node carries the origins of the node that it stands for; dead nodes are gone, equal ones are
    one."""
    b = builder or Builder()
    mapped: dict[Node, Sequence[Value]] = {}
    _make_all(graph.nodes(), make, b, mapped)

    def at(v: Value) -> Value:
        return mapped[v.node][v.index]

    return Graph(name or graph.name, tuple(at(v) for v in graph.inputs),
                 {k: at(v) for k, v in graph.outputs.items()},
                 tuple(mapped[n][0].node for n in graph.effects), graph.guards)


def rebuild_region(region: Region, make: Make, builder: Builder | None = None,
                   types: Sequence[TensorType] = ()) -> Region:
    """The region made anew in the same way, by a builder of its own: it shares no node with what is around
    it. `types`: new types of the parameters."""
    b = builder or Builder()
    mapped: dict[Node, Sequence[Value]] = {}
    for i, p in enumerate(region.parameters):
        with b.origin(p.node.origins):
            mapped[p.node] = [b.parameter(types[i] if types else p.type, i)]
    _make_all((n for n in region.nodes() if n not in mapped), make, b, mapped)
    return Region(tuple(mapped[p.node][0] for p in region.parameters),
                  tuple(mapped[v.node][v.index] for v in region.results))


def _make_all(nodes: Iterable[Node], make: Make, b: Builder, mapped: dict[Node, Sequence[Value]]) -> None:
    for node in nodes:
        with b.origin(node.origins):
            results = make(b, node, [mapped[v.node][v.index] for v in node.inputs])
        for r in results:
            b.add_origins(r.node, node.origins)
        mapped[node] = results
