"""The gradients of ops with regions; that of scan is in `scan_gradient`.

Both branches of a cond are differentiated, and the gradient is a cond again: it runs one of them, which
computes the forward values again. A while_loop becomes a scan of `limit` steps before it is differentiated;
steps after the last trip do nothing. """
from __future__ import annotations

from collections.abc import Callable, Sequence

from graphflow.compiler.ir.builder import Builder, rebuild_region
from graphflow.compiler.ir.graph import Node, Region, TensorType, Value
from graphflow.compiler.passes.regions import extract, inline, needed_nodes
from graphflow.compiler.passes.scan_gradient import Cotangents, scan_gradient
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.errors import CompilerError


def control_gradient(b: Builder, node: Node, given: Cotangents, wanted: Sequence[bool]) -> list[Value | None]:
    """The cotangents of the operands (those `wanted`) of an op with regions."""
    return _GRADIENTS[node.op](b, node, given, wanted)


def _cond_gradient(b: Builder, node: Node, given: Cotangents, wanted: Sequence[bool]) -> list[Value | None]:
    branches = [_branch(region, given, wanted[1:]) for region in node.regions]
    flowing = [i for i, flows in enumerate(zip(*(flows for _, flows in branches))) if any(flows)]
    out: list[Value | None] = [None] * len(node.inputs)
    if not flowing:
        return out
    operands = [*node.inputs[1:], *(g for g in given if g is not None)]
    ends = [[flows[i] or _zeros(node, node.inputs[1 + i].type) for i in flowing] for _, flows in branches]
    used = {i for (leaves, _), roots in zip(branches, ends) for i in _read(roots, leaves)}
    chosen = sorted(used)
    regions = [extract(roots, [leaves[i] for i in chosen]) for (leaves, _), roots in zip(branches, ends)]
    made = b.node("cond", [node.inputs[0], *(operands[i] for i in chosen)], {}, regions)
    for i, v in zip(flowing, made.results):
        out[1 + i] = v
    return out


def _branch(region: Region, given: Cotangents, wanted: Sequence[bool]
            ) -> tuple[list[Value], list[Value | None]]:
    """(parameters: the operands, then the given cotangents; the cotangents of the operands)."""
    from graphflow.compiler.passes.autodiff import flow
    b = Builder()
    parameters = [_parameter(b, p, p.type) for p in region.parameters]
    results = inline(b, region, parameters)
    seeds = [i for i, g in enumerate(given) if g is not None]
    seeded = [_parameter(b, results[i], results[i].type) for i in seeds]
    targets = [i for i, w in enumerate(wanted) if w]
    with b.origin(region.results[0].node.origins):
        flows = flow(b, [results[i] for i in seeds], seeded, [parameters[i] for i in targets])
    found = dict(zip(targets, flows))
    return [*parameters, *seeded], [found.get(i) for i in range(len(parameters))]


def _parameter(b: Builder, like: Value, type: TensorType) -> Value:
    with b.origin(like.node.origins):
        return b.parameter(type, 0)


def _read(roots: Sequence[Value], leaves: Sequence[Value]) -> list[int]:
    read = {v for n in needed_nodes(roots, leaves) for v in n.inputs} | set(roots)
    return [i for i, v in enumerate(leaves) if v in read]


def _zeros(node: Node, type: TensorType) -> Value:
    b = Builder()
    with b.origin(node.origins):
        return b.zeros(type)


def _custom_gradient(b: Builder, node: Node, given: Cotangents, wanted: Sequence[bool]) -> list[Value | None]:
    cotangents = [b.zeros(v.type) if g is None else g for v, g in zip(node.results, given)
                  if v.dtype.has_gradient]
    flows = iter(inline(b, node.regions[1], [*node.inputs, *node.results, *cotangents]))
    return [next(flows) if v.dtype.has_gradient else None for v in node.inputs]


def _while_gradient(b: Builder, node: Node, given: Cotangents, wanted: Sequence[bool]) -> list[Value | None]:
    raise CompilerError("a while_loop must become a scan before it is differentiated", stage="autodiff")


_GRADIENTS: dict[str, Callable[..., list[Value | None]]] = {
    "scan": scan_gradient, "cond": _cond_gradient, "custom_gradient": _custom_gradient,
    "while_loop": _while_gradient}


# --- loops with an open number of trips

def while_as_scan(b: Builder, node: Node, operands: Sequence[Value]) -> Sequence[Value]:
    """The results of the while_loop, made by a scan of `limit` steps that carries whether it still runs."""
    count, limit = node.attrs["carries"], node.attrs["limit"]
    condition, body = node.regions
    inner = Builder()
    parameters = [_parameter(inner, p, p.type) for p in condition.parameters]
    with inner.origin(node.origins):
        running = inner.parameter(TensorType(BOOL, ()), 0)
        goes_on = inner.logical_and(running, *inline(inner, condition, parameters))
        same = extract(parameters[:count], parameters)
        after = inner.node("cond", [goes_on, *parameters], {}, [body, same]).results
    leaves = [*parameters[:count], running, *parameters[count:]]
    made = b.node("scan", [*operands[:count], b.constant(True, BOOL), *operands[count:]],
                  {"length": limit, "carries": count + 1, "steps": 0}, [extract([*after, goes_on], leaves)])
    return made.results[:count]


def whiles_as_scans(region: Region) -> Region:
    """The region with every while_loop in it made a scan, at every depth."""
    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        regions = tuple(map(whiles_as_scans, node.regions))
        copy = Node(node.op, tuple(inputs), node.attrs, regions, node.types, node.origins)
        return while_as_scan(b, copy, inputs) if node.op == "while_loop" else b.intern(copy).results
    return rebuild_region(region, make)
