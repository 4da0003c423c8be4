"""The autodiff stage: replaces every `grad` node by the nodes that compute the gradient.

Reverse mode. Only nodes on a path from what is differentiated with respect to, to the outputs, are visited,
users before operands; each op's record says how a cotangent goes through it. Cotangents of a value are added
in the order in which the graph meets them, so the result has the same bits every time. Gradients inside
gradients come out innermost first, because a `grad` whose output needs another one comes after it.

Assumes: a checked graph. Guarantees: no `grad` node is left; gradient nodes carry the origins of their
forward node. """
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, TensorType, Value, topological
from graphflow.compiler.passes.rewrite import RewriteBuilder, pinned_results
from graphflow.compiler.plan.errors import CompilerError, Location, UseError

NO_FLOW = frozenset(("stop_gradient", "sign", "floor", "ceil", "round", "floordiv"))
"""Ops through which no gradient flows: it is 0 wherever it exists."""


def expand_gradients(graph: Graph) -> Graph:
    """The graph without `grad` nodes. UseError where an op on the way has no gradient."""
    pinned = pinned_results(graph)
    builder = RewriteBuilder()

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node in pinned:
            return builder.keep(node, inputs, pinned[node])
        if node.op == "grad":
            return _expand(b, inputs, node.attrs["cotangents"])
        return b.copy(node, inputs).results

    return rebuild(graph, make, builder)


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
    order = topological([v.node for v in outputs])
    active = _active(order, wrt)
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
    return [cotangents[v] if v in cotangents else b.zeros(v.type) for v in wrt]


def _active(order: Sequence[Node], wrt: Sequence[Value]) -> set[Value]:
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
