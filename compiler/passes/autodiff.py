"""The autodiff stage: replaces every `grad` node by the nodes that compute the gradient.

Reverse mode. Only nodes on a path from what is differentiated with respect to, to the outputs, are visited,
users before operands; each op's record says how a cotangent goes through it. Cotangents of a value are added
in the order in which the graph meets them, so the result has the same bits every time. Gradients inside
gradients come out innermost first, because a `grad` whose output needs another one comes after it.

Gradients of loops are loops: `control_gradient` and `scan_gradient`. Before the next nested gradient is
expanded, loops that compute alike are merged (`scan_merge`).

Assumes: a checked graph. Guarantees: no `grad` or `custom_gradient` node is left; gradient nodes carry the
origins of their forward node. """
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.builder import Builder, Make, rebuild, rebuild_region
from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType, Value, topological, walk
from graphflow.compiler.passes.control_gradient import control_gradient, while_as_scan, whiles_as_scans
from graphflow.compiler.passes.regions import inline
from graphflow.compiler.passes.rewrite import RewriteBuilder, pinned_results
from graphflow.compiler.passes.scan_merge import merge_region, tidy_scans
from graphflow.compiler.plan.errors import CompilerError, Location, UseError

NO_FLOW = frozenset(("stop_gradient", "sign", "floor", "ceil", "round", "floordiv"))
"""Ops through which no gradient flows: it is 0 wherever it exists."""


def expand_gradients(graph: Graph) -> Graph:
    """The graph without `grad` and `custom_gradient` nodes, its scans merged and pruned. UseError where an op
    on the way has no gradient."""
    while any(node.op == "grad" for node in walk(graph.nodes())):
        graph = _prepared(graph)
        graph = rebuild(graph, _expanding(graph.nodes()), RewriteBuilder())
        graph = tidy_scans(graph)
    if any(node.op == "custom_gradient" for node in walk(graph.nodes())):
        graph = rebuild(graph, _inline_custom)
    return tidy_scans(graph)


def _expand_region(region: Region) -> Region:
    while any(node.op == "grad" for node in walk(region.nodes())):
        region = merge_region(rebuild_region(region, _expanding(region.nodes()), RewriteBuilder()))
    return region


def _expanding(nodes: Sequence[Node]) -> Make:
    """How to make the nodes anew with gradients expanded: in regions all, here those that no other one feeds,
    so that their scans are merged before these are differentiated again."""
    pinned, fed = pinned_results(nodes), set[Node]()
    for node in nodes:
        if any(v.node in fed or v.op == "grad" for v in node.inputs):
            fed.add(node)

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node.op == "grad" and node not in fed:
            return _expand(b, inputs, node.attrs["cotangents"])
        regions = tuple(map(_expand_region, node.regions))
        copy = Node(node.op, tuple(inputs), node.attrs, regions, node.types, node.origins)
        if node in pinned:
            assert isinstance(b, RewriteBuilder)
            return b.keep(copy, inputs, pinned[node])
        return b.intern(copy).results
    return make


def _prepared(graph: Graph) -> Graph:
    """The graph with the while_loops that gradients flow through made scans."""
    if not any(node.op == "while_loop" for node in walk(graph.nodes())):
        return graph
    passed = set[Node]()
    for node in graph.nodes():
        if node.op == "grad":
            count = node.attrs["cotangents"]
            order = topological(v.node for v in node.inputs[:count or 1])
            active = active_values(order, node.inputs[2 * count or 1:])
            passed.update(n for n in order if n.regions and any(v in active for v in n.inputs))
    pinned = pinned_results(graph.nodes())
    builder = RewriteBuilder()

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        regions = tuple(map(whiles_as_scans, node.regions)) if node in passed else node.regions
        copy = Node(node.op, tuple(inputs), node.attrs, regions, node.types, node.origins)
        if node.op == "while_loop" and node in passed:
            made = while_as_scan(b, copy, inputs)
            builder.pinned.update(made[i] for i in pinned.get(node, ()))
            return made
        return builder.keep(copy, inputs, pinned[node]) if node in pinned else b.intern(copy).results
    return rebuild(graph, make, builder)


def _inline_custom(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
    regions = tuple(rebuild_region(region, _inline_custom) for region in node.regions)
    if node.op == "custom_gradient":
        return inline(b, regions[0], inputs)
    return b.intern(Node(node.op, tuple(inputs), node.attrs, regions, node.types, node.origins)).results


def _expand(b: Builder, inputs: Sequence[Value], count: int) -> list[Value]:
    """What stands for a `grad` node with these operands and so many cotangents given."""
    if not count:
        return gradients(b, inputs[0], inputs[1:])
    return pullback(b, inputs[:count], inputs[count:2 * count], inputs[2 * count:])


def gradients(b: Builder, scalar: Value, wrt: Sequence[Value]) -> list[Value]:
    """The derivative of `scalar` with respect to each value, made of nodes of the builder."""
    return pullback(b, [scalar], [b.constant(1, scalar.dtype, scalar.shape)], wrt)


def pullback(b: Builder, outputs: Sequence[Value], given: Sequence[Value], wrt: Sequence[Value]
             ) -> list[Value]:
    """The cotangents of the values `wrt` for those `given` of the outputs, made of nodes of the builder;
    zeros where no output depends on a value."""
    flows = flow(b, outputs, given, wrt)
    return [b.zeros(v.type) if f is None else f for f, v in zip(flows, wrt)]


def flow(b: Builder, outputs: Sequence[Value], given: Sequence[Value], wrt: Sequence[Value]
         ) -> list[Value | None]:
    """What `pullback` gives; None where no output depends on a value."""
    order = topological([v.node for v in outputs])
    active = active_values(order, wrt)
    cotangents: dict[Value, Value] = {}
    for output, cotangent in zip(outputs, given):
        if output in active:
            before = cotangents.get(output)
            cotangents[output] = cotangent if before is None else b.add(before, cotangent)
    for node in reversed(order):
        flowing = [cotangents.get(v) for v in node.results]
        if any(flowing) and any(v in active for v in node.inputs):
            with b.origin(node.origins):
                _through(b, node, flowing, active, cotangents)
    return [cotangents.get(v) for v in wrt]


def active_values(order: Sequence[Node], wrt: Sequence[Value]) -> set[Value]:
    """The float values that depend on one of `wrt` through ops that let gradients pass, and these
    themselves."""
    active = set(wrt)
    for node in order:
        if node.op not in NO_FLOW and any(v in active for v in node.inputs):
            active.update(v for v in node.results if v.dtype.has_gradient)
    return active


def _through(b: Builder, node: Node, given: Sequence[Value | None], active: set[Value],
             cotangents: dict[Value, Value]) -> None:
    """Adds what flows through one node to the cotangents of its operands."""
    from graphflow.compiler.ops import OPS
    if node.op in NO_FLOW:
        return
    gradient = OPS[node.op].gradient
    if gradient is None:
        raise UseError(f"{node.op} has no gradient", op=node.op, shapes=[v.shape for v in node.inputs],
                       where=_where(node), hint="put gf.stop_gradient around it to make it a constant")
    flowing: Sequence[Value | None]
    if node.regions:
        flowing = control_gradient(b, node, given, [v in active for v in node.inputs])
    else:
        flowing = gradient(b, node, given)
    if len(flowing) != len(node.inputs):
        raise CompilerError(f"{node.op} has {len(node.inputs)} operands, its gradient has {len(flowing)}",
                            stage="autodiff", where=_where(node))
    for operand, cotangent in zip(node.inputs, flowing):
        if cotangent is None or operand not in active:
            continue
        if _plain(cotangent.type) != _plain(operand.type):
            raise CompilerError(f"the gradient of {node.op} is {cotangent.type}, its operand {operand.type}",
                                stage="autodiff", where=_where(node))
        before = cotangents.get(operand)
        cotangents[operand] = cotangent if before is None else b.add(before, cotangent)


def _plain(type: TensorType) -> TensorType:
    return TensorType(type.dtype, type.shape)


def _where(node: Node) -> Location | None:
    return node.origins[0] if node.origins else None
