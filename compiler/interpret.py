"""Runs a tensor graph with NumPy, op by op, by the references of the op table: the `reference` device, and
the oracle to which every pass and back end is held."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType, topological
from graphflow.compiler.plan.dims import Dim, DimLike, Symbol, evaluate, symbols_of
from graphflow.compiler.plan.errors import CompilerError, FeedError, UseError, UserError

Arrays = Mapping[str, Any]
_Values = dict[Node, Sequence[np.ndarray]]


def interpret(graph: Graph, feeds: Arrays, state: Arrays, symbols: Mapping[str, int] | None = None
              ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(outputs by name, new values of the updated state entries by name).

    Every read of a state entry sees `state`, which stays as it is. `symbols` gives symbols that no feed's
    shape binds. FeedError for a wrong feed, a guard or a check that does not hold; CompilerError where an
    op's reference and its type rule disagree. `grad` nodes must have been expanded.
    """
    bound = {**bind_symbols(graph, feeds), **(symbols or {})}
    for guard in graph.guards:
        left, right = evaluate(guard.left, bound), evaluate(guard.right, bound)
        if left != right:
            raise FeedError(f"{guard.left} = {guard.right} must hold, but with these feeds it says {left} = "
                            f"{right}",
                            where=guard.where)
    values: _Values = {}
    with np.errstate(all="ignore"):
        # Checks first, as on every device: what they guard (an index) may not be evaluable otherwise.
        checks = topological(n for n in graph.effects if n.op == "check")
        _run([*checks, *graph.nodes()], values, _Context(feeds, state, bound))
    return ({name: values[v.node][v.index] for name, v in graph.outputs.items()},
            {name: values[node][0] for name, node in graph.updates().items()})


def bind_symbols(graph: Graph, feeds: Arrays) -> dict[str, int]:
    """The symbols' values, from the shapes of the feeds; FeedError for a missing, surplus or ill-typed feed,
    or one whose shape contradicts its declaration or another feed. A symbol is bound by an axis whose extent
    is that symbol alone."""
    declared = {v.node.attrs["name"]: v for v in graph.inputs}
    surplus = [name for name in feeds if name not in declared]
    if surplus:
        raise FeedError(f"there is no feed {surplus[0]!r}",
                        hint=f"the feeds are {', '.join(declared) or 'none'}")
    bound: dict[str, int] = {}
    later: list[tuple[str, int, DimLike, int]] = []
    for name, v in declared.items():
        if name not in feeds:
            raise FeedError(f"the feed {name!r} is missing: {v.type}", where=_where(v.node))
        shape, dtype = np.shape(feeds[name]), np.asarray(feeds[name]).dtype
        if dtype != v.dtype.numpy:
            raise FeedError(f"the feed {name!r} is {dtype}, declared {v.type}", where=_where(v.node))
        if len(shape) != v.type.rank:
            raise FeedError(f"the feed {name!r} has {len(shape)} axes, declared {v.type}", shapes=[shape],
                            where=_where(v.node))
        for axis, (extent, got) in enumerate(zip(v.shape, shape)):
            alone = _single_symbol(extent)
            if alone is not None:
                bound.setdefault(alone, got)
            later.append((name, axis, extent, got))
    for name, axis, extent, got in later:
        if symbols_of(extent) <= bound.keys() and evaluate(extent, bound) != got:
            known = "".join(f", {s} = {bound[s]}" for s in sorted(symbols_of(extent)))
            raise FeedError(f"axis {axis} of the feed {name!r} is {got}, declared {extent}{known}",
                            shapes=[np.shape(feeds[name])], where=_where(declared[name].node))
    return bound


def _single_symbol(extent: DimLike) -> str | None:
    if isinstance(extent, Dim) and len(extent.terms) == 1:
        (atoms, factor), = extent.terms
        if factor == 1 and len(atoms) == 1 and isinstance(atoms[0], Symbol):
            return atoms[0].name
    return None


class _Context:
    """What nodes refer to by name."""

    def __init__(self, feeds: Arrays, state: Arrays, symbols: Mapping[str, int]):
        self.feeds, self.state, self.symbols = feeds, state, symbols

    def concrete(self, attr: Any) -> Any:
        """An attribute with its dimensions evaluated."""
        if isinstance(attr, Dim):
            return evaluate(attr, self.symbols)
        return tuple(self.concrete(a) for a in attr) if isinstance(attr, tuple) else attr

    def type(self, type: TensorType) -> TensorType:
        """A type with its dimensions evaluated."""
        return TensorType(type.dtype, self.concrete(tuple(type.shape)))


def _run(nodes: Iterable[Node], values: _Values, context: _Context) -> None:
    """Evaluates the nodes, in order, into `values`; those that are there already (region parameters) stay."""
    for node in nodes:
        if node in values:
            continue
        try:
            types = [context.type(t) for t in node.types]
            results = _evaluate(node, [values[v.node][v.index] for v in node.inputs], types, context)
        except UserError as error:
            error.with_location(_where(node))
            raise
        except IndexError as error:         # in a body, whose checks come out of it beside its other results
            raise FeedError(str(error), where=_where(node)) from None
        values[node] = [np.asarray(r) for r in results]
        found = [(r.dtype, r.shape) for r in values[node]]
        expected = [(t.dtype.numpy, t.shape) for t in types]
        if found != expected:
            message = f"the reference of {node.op} gives {found}, but its type rule says {expected}"
            raise CompilerError(message, stage="interpret", where=_where(node))


def _evaluate(node: Node, arrays: list[np.ndarray], types: list[TensorType],
              context: _Context) -> Sequence[Any]:
    from graphflow.compiler.ops import OPS
    attrs = {name: context.concrete(value) for name, value in node.attrs.items()}
    if node.op == "input":
        feed = np.asarray(context.feeds[attrs["name"]])
        if attrs["finite"] and not np.isfinite(feed).all():
            raise FeedError(f"feed {attrs['name']!r}: has NaN or infinity in it")
        return [feed]
    if node.op == "state":
        if attrs["name"] not in context.state:
            raise UseError(f"the state entry {attrs['name']!r} is missing")
        return [context.state[attrs["name"]]]
    if node.op == "check" and not arrays[0]:
        raise FeedError(f"feed {attrs['feed']!r}: {attrs['message']}" if attrs["feed"] else attrs["message"])
    if node.op == "scan":
        return _scan(node.regions[0], arrays, attrs, types, context)
    if node.op == "cond":
        return _region(node.regions[0 if arrays[0] else 1], arrays[1:], context)
    if node.op == "while_loop":
        return _while(node, arrays, attrs["carries"], context)
    if node.op == "custom_gradient":
        return _region(node.regions[0], arrays, context)
    if node.op == "fused":
        return _region(node.regions[0], arrays[:len(arrays) - attrs["after"]], context)
    reference = OPS[node.op].reference
    if reference is None:
        raise CompilerError(f"the op {node.op} cannot be interpreted: an earlier stage replaces it",
                            stage="interpret", where=_where(node))
    return reference(arrays, attrs, types)


def _region(region: Region, arrays: Sequence[np.ndarray], context: _Context) -> list[np.ndarray]:
    values: _Values = {p.node: [a] for p, a in zip(region.parameters, arrays)}
    _run(region.nodes(), values, context)
    return [values[v.node][v.index] for v in region.results]


def _scan(body: Region, arrays: Sequence[np.ndarray], attrs: Mapping[str, Any], types: Sequence[TensorType],
          context: _Context) -> list[np.ndarray]:
    count, steps = attrs["carries"], attrs["steps"]
    carries = list(arrays[:count])
    stacked = [np.empty(context.concrete(t.shape), t.dtype.numpy) for t in types[count:]]
    order = range(attrs["length"])
    for step in reversed(order) if attrs["reverse"] else order:
        rows = [a[step] for a in arrays[count:count + steps]]
        results = _region(body, [*carries, *rows, *arrays[count + steps:]], context)
        carries = results[:count]
        for out, row in zip(stacked, results[count:]):
            out[step] = row
    return [*carries, *stacked]


def _while(node: Node, arrays: Sequence[np.ndarray], count: int, context: _Context) -> list[np.ndarray]:
    condition, body = node.regions
    carries, constants = list(arrays[:count]), arrays[count:]
    for _ in range(node.attrs["limit"]):
        if not _region(condition, [*carries, *constants], context)[0]:
            break
        carries = _region(body, [*carries, *constants], context)
    return carries


def _where(node: Node) -> Any:
    return node.origins[0] if node.origins else None
