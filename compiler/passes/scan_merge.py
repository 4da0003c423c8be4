"""Loops that compute alike become one, and what nobody reads of a loop goes.

The gradient of a scan needs values of each of its steps. It makes a second scan that does the same work and
stacks these, too; here both become one scan. So do scans that the user wrote twice. Then outputs, carries and
operands go that nothing needs, and carries that no step changes become constants. Bits stay as they are. The
bodies of all regions are seen to as well. """
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from graphflow.compiler.ir.builder import Builder, Make, attrs_key, rebuild, rebuild_region
from graphflow.compiler.ir.graph import Graph, Node, Region, Value
from graphflow.compiler.passes.regions import extract, inline, needed_nodes
from graphflow.compiler.passes.rewrite import RewriteBuilder, pinned_results

Change = Callable[[Region], Region]


def tidy_scans(graph: Graph) -> Graph:
    """The graph with equal scans merged and all scans pruned."""
    if not any(node.regions for node in graph.nodes()):
        return graph
    while True:
        make, again = _merging(graph.nodes())
        graph = rebuild(graph, _but_pinned(make, graph.nodes()), RewriteBuilder())
        if not again:
            break
    roots = [*graph.outputs.values(), *(node.result() for node in graph.effects)]
    return rebuild(graph, _but_pinned(_pruning(graph.nodes(), roots), graph.nodes()), RewriteBuilder())


def _but_pinned(make: Make, nodes: Sequence[Node]) -> Make:
    """The same, but what gradients still to come are taken by stays apart from equal nodes."""
    pinned = pinned_results(nodes)

    def made(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node in pinned:
            assert isinstance(b, RewriteBuilder)
            return b.keep(node, inputs, pinned[node])
        return make(b, node, inputs)
    return made


def merge_region(region: Region) -> Region:
    """The region, with the scans in it merged at every depth."""
    if not any(node.regions for node in region.nodes()):
        return region
    while True:
        make, again = _merging(region.nodes())
        region = rebuild_region(region, make)
        if not again:
            return region


def _prune_region(region: Region) -> Region:
    if not any(node.regions for node in region.nodes()):
        return region
    return rebuild_region(region, _pruning(region.nodes(), region.results))


def _inside(change: Change) -> Callable[[Builder, Node, Sequence[Value]], Sequence[Value]]:
    """Makes a copy of a node with its regions changed. Nodes that shared a region still do, so equal ones are
    one."""
    done: dict[Region, Region] = {}

    def make(b: Builder, node: Node, inputs: Sequence[Value]) -> Sequence[Value]:
        regions = tuple(done[r] if r in done else done.setdefault(r, change(r)) for r in node.regions)
        return b.intern(Node(node.op, tuple(inputs), node.attrs, regions, node.types, node.origins)).results
    return make


# --- merging

class _Merged(NamedTuple):
    """What stands for scans that compute alike: `places` are, for each of them, its results among the new
    ones."""
    attrs: dict[str, Any]
    body: Region
    places: dict[Node, list[int]]


def _merging(nodes: Sequence[Node]) -> tuple[Make, bool]:
    """How to make these nodes anew with equal scans merged, and whether there were any."""
    groups: dict[tuple, list[Node]] = {}
    pinned = pinned_results(nodes)
    for node in nodes:
        if node.op == "scan" and node not in pinned:
            attrs = {k: v for k, v in node.attrs.items() if k != "kept"}
            groups.setdefault((node.inputs, attrs_key(attrs)), []).append(node)
    found: dict[Node, _Merged] = {}
    for group in groups.values():
        while len(group) > 1:
            first, rest = group[0], []
            one = _Merged(dict(first.attrs), first.regions[0], {first: list(range(len(first.types)))})
            for other in group[1:]:
                both = _merge(one, other)
                one = both or one
                rest += [other] if both is None else []
            if len(one.places) > 1:
                found.update(dict.fromkeys(one.places, one))
            group = rest
    inside = _inside(merge_region)

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node not in found:
            return inside(b, node, inputs)
        attrs, body, places = found[node]
        results = b.node("scan", inputs, attrs, [body]).results
        return [results[i] for i in places[node]]
    return make, bool(found)


def _merge(one: _Merged, other: Node) -> _Merged | None:
    """Both scans as one; None if their carries differ."""
    b, count = Builder(), one.attrs["carries"]
    parameters = []
    for i, p in enumerate(one.body.parameters):
        with b.origin(p.node.origins):
            parameters.append(b.parameter(p.type, i))
    first, second = inline(b, one.body, parameters), inline(b, other.regions[0], parameters)
    both = merge_region(Region(tuple(parameters), (*first, *second)))
    first, second = list(both.results[:len(first)]), list(both.results[len(first):])
    if first[:count] != second[:count]:
        return None
    outputs = list(dict.fromkeys((*first[count:], *second[count:])))

    def places(results: Sequence[Value]) -> list[int]:
        return [*range(count), *(count + outputs.index(v) for v in results[count:])]
    moved = places(first)
    kept = [*zip(first[count:], one.attrs["kept"]), *zip(second[count:], other.attrs["kept"])]
    return _Merged({**one.attrs, "kept": _names(kept, outputs)},
                   Region(both.parameters, (*first[:count], *outputs)),
                   {**{node: [moved[i] for i in at] for node, at in one.places.items()},
                    other: places(second)})


def _names(kept: Sequence[tuple[Value, str]], outputs: Sequence[Value]) -> tuple[str, ...]:
    """The attribute `kept` for these outputs of a body, of which some are known under a name."""
    names = {v: name for v, name in kept if name}
    return tuple(names.get(v, "") for v in outputs) if names else ()


# --- pruning

class _Pruned(NamedTuple):
    """What stays of a scan: its operands (by their numbers), and for each old result that is read the new
    result, or the operand that it is."""
    attrs: dict[str, Any]
    body: Region | None
    operands: list[int]
    results: dict[int, int]
    unchanged: dict[int, int]


def _pruning(nodes: Sequence[Node], roots: Sequence[Value]) -> Make:
    """How to make the nodes anew without what the roots do not need of scans."""
    live, pinned = set(roots), pinned_results(nodes)
    plans: dict[Node, _Pruned] = {}
    for node in reversed(nodes):
        used = [v.index for v in node.results if v in live]
        if node.op == "scan" and used and node not in pinned:
            plan = plans[node] = _plan(node, used)
            kept = {*plan.operands, *plan.unchanged.values()}
            live.update(v for i, v in enumerate(node.inputs) if i in kept)
        elif used:
            live.update(node.inputs)
    inside = _inside(_prune_region)

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node not in plans:
            return inside(b, node, inputs)
        attrs, body, operands, results, unchanged = plans[node]
        made: Sequence[Value] = ()
        if body is not None:
            made = b.node("scan", [inputs[i] for i in operands], attrs, [body]).results
        out = []
        for i, type in enumerate(node.types):
            if i in unchanged:
                out.append(inputs[unchanged[i]])
            else:                                                     # zeros stand for what nobody reads
                out.append(made[results[i]] if i in results else b.zeros(type))
        return out
    return make


def _plan(node: Node, used: Sequence[int]) -> _Pruned:
    body = _prune_region(node.regions[0])
    count, steps = node.attrs["carries"], node.attrs["steps"]
    parameters, ends = body.parameters, body.results
    fixed = [i for i in range(count) if ends[i] == parameters[i]]
    outputs = list(dict.fromkeys(ends[i] for i in used if i >= count))
    carries = {i for i in used if i < count and i not in fixed}
    while True:
        roots = [*(ends[i] for i in sorted(carries)), *outputs]
        read = {v for n in needed_nodes(roots, ()) for v in n.inputs} | set(roots)
        more = {i for i in range(count) if parameters[i] in read and i not in fixed}
        if more <= carries:
            break
        carries |= more
    kept = sorted(carries)
    rows = [i for i in range(count, count + steps) if parameters[i] in read]
    constants = [i for i in (*fixed, *range(count + steps, len(parameters))) if parameters[i] in read]
    operands = [*kept, *rows, *constants]
    place = {v: len(kept) + j for j, v in enumerate(outputs)}
    results = {i: kept.index(i) if i < count else place[ends[i]] for i in used if i not in fixed}
    region = extract(roots, [parameters[i] for i in operands]) if roots else None
    attrs = {**node.attrs, "carries": len(kept), "steps": len(rows),
             "kept": _names(list(zip(ends[count:], node.attrs["kept"])), outputs)}
    return _Pruned(attrs, region, operands, results, {i: i for i in used if i in fixed})
