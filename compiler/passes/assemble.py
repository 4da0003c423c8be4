"""The second half of fuse: makes the `fused` nodes of the chosen groups and writes state updates in place
where allowed; `fuse` does the whole stage, inside loops and branches too."""

from __future__ import annotations

from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, Region, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.access import domain, has_index_map, relation
from graphflow.compiler.passes.bodies import in_bodies
from graphflow.compiler.passes.fuse import Fusion, Group, fusion_of, is_view
from graphflow.compiler.passes.recompute import copied, recomputed
from graphflow.compiler.plan.errors import Location

Refusals = list[tuple[tuple[Location, ...], str]]


def fuse(graph: Graph, refusals: Refusals | None = None, widen: bool = False) -> Graph:
    """The graph with all work done by `fused` nodes, in the bodies of loops and branches first. A loop or a
    branch is a kernel of its own, of kind "control". Appends what was refused, and why. `widen`: see
    `fusion_of`."""
    refused: Refusals = [] if refusals is None else refusals
    b = Builder()
    private: dict[Value, Value] = {}
    again = recomputed(graph)
    originals: set[Node] = set()

    def make(_: Builder, node: Node, inputs: list[Value]) -> tuple[Value, ...]:
        if node in again:
            original = b.copy(node, inputs)
            originals.add(original)
            return original.results
        inputs = copied(inputs, originals)
        node = in_bodies(node, lambda body: fuse(body, refused, widen))
        if OPS[node.op].kind in ("control", "routine"):
            inputs = [_private(v, private) for v in inputs]
        return b.copy(node, inputs).results

    fusion = fusion_of(rebuild(graph, make, b), widen)
    refused += fusion.refusals
    return assemble(fusion)


def _private(v: Value, made: dict[Value, Value]) -> Value:
    """A view or a literal once more, for those who read arrays only and have it stored: others still look
    through the first one."""
    if not is_view(v.node) or not has_index_map(v.node):
        return v
    if v not in made:
        n = v.node
        made[v] = Node(n.op, n.inputs, n.attrs, n.regions, n.types, n.origins).result(v.index)
    return made[v]


def assemble(f: Fusion) -> Graph:
    """The fused graph."""
    groups = list({id(g): g for g in f.group_of.values()}.values())
    sources = {id(g): _sources(f, g) for g in groups}
    inplace, after = _in_place(f, groups, sources)
    order = _ordered(groups, sources, after)
    b = Builder()
    mapped: dict[Value, Value] = {}
    for node in f.graph.nodes():
        if OPS[node.op].kind == "leaf" and node not in f.free and node not in f.group_of:
            for v in node.results:
                mapped[v] = Value(b.copy(node, ()), v.index)
    for g in order:
        fused = _fused_node(
            f, b, g, mapped, inplace, [mapped[_first_stored(h)] for h in after.get(id(g), ())]
        )
        for position, v in enumerate(g.stored):
            mapped[v] = fused.result(position)
    effects = []
    for n in f.graph.effects:
        effects.append(b.copy(n, [mapped[v] for v in n.inputs]))
    return Graph(f.graph.name, tuple(mapped[v] for v in f.graph.inputs),
                 {k: mapped[v] for k, v in f.graph.outputs.items()}, tuple(effects), f.graph.guards)


def _first_stored(g: Group) -> Value:
    return next(iter(g.stored))


def _sources(f: Fusion, g: Group) -> list[Group]:
    """The groups whose values the group reads."""
    found: dict[int, Group] = {}
    for node in g.level:
        for r in f.reads[node]:
            h = f.group_of.get(r.value.node)
            if h is not None and h is not g:
                found[id(h)] = h
    return list(found.values())


def _ordered(groups: list[Group], sources: dict[int, list[Group]],
             after: dict[int, list[Group]]) -> list[Group]:
    """The groups, each behind those that it reads or must follow."""
    done: dict[int, Group] = {}
    for root in groups:
        stack = [(root, iter([*sources[id(root)], *after.get(id(root), ())]))]
        while stack:
            g, pending = stack[-1]
            if id(g) in done:
                stack.pop()
                continue
            nxt = next((h for h in pending if id(h) not in done), None)
            if nxt is None:
                done[id(g)] = g
                stack.pop()
            else:
                stack.append((nxt, iter([*sources[id(nxt)], *after.get(id(nxt), ())])))
    return list(done.values())


def _in_place(
    f: Fusion, groups: list[Group], sources: dict[int, list[Group]]
) -> tuple[dict[Value, str], dict[int, list[Group]]]:
    """Which values are written straight into a state, and behind which groups each writer must run."""
    inplace: dict[Value, str] = {}
    after: dict[int, list[Group]] = {}
    checked = _ancestors([f.group_of[v.node] for n in f.graph.effects if n.op == "check" for v in n.inputs
                          if v.node in f.group_of], sources)
    states = f.graph.states()
    # Copies are made last, of what is there then.
    copied = {v.node for n in f.graph.effects for v in n.inputs}
    for name, effect in f.graph.updates().items():
        value = effect.inputs[0]
        if value.node not in f.group_of or value in inplace:
            continue
        g = f.group_of[value.node]
        readers = _state_readers(f, groups, states.get(name))
        reason = _refusal(f, g, value, states.get(name), checked)
        if states.get(name) in copied:
            reason = "another state takes over the old value"
        others = [h for h in readers if h is not g]
        if reason is None and any(f.order.leads([g], h) for h in others):
            reason = "a kernel that needs the new value also reads the old one"
        if reason is not None:
            f.refusals.append((effect.origins, f"the update of {name!r} is not made in place: {reason}"))
            continue
        inplace[value] = name
        for h in others:
            f.order.order(h, g)
        if others:
            after.setdefault(id(g), []).extend(h for h in others if h not in after.get(id(g), []))
    return inplace, after


def _state_readers(f: Fusion, groups: list[Group], leaf: Node | None) -> list[Group]:
    found: dict[int, Group] = {}
    for node in f.consumers.get(leaf, ()) if leaf is not None else ():
        found[id(f.group_of[node])] = f.group_of[node]
    return list(found.values())


def _refusal(f: Fusion, g: Group, value: Value, leaf: Node | None, checked: set[int]) -> str | None:
    """Why the group can't write `value` over the state that `leaf` reads; None if it can."""
    if g.kind not in ("map", "row", "contraction"):
        return f"a {g.kind} kernel makes the new value"
    if id(g) in checked:
        return "a check, which must run before any state changes, needs the new value"
    if leaf is None:
        return None
    if value.type != leaf.types[0]:
        return "the new value has another type than the state"
    level = g.level[value.node]
    if level == "inlined":
        return "the new value is made at another index than it is needed"
    for node in g.level:
        for r in f.reads[node]:
            if r.value.node is not leaf:
                continue
            at = "full" if OPS[node.op].kind == "reduce" else g.level[node]
            if OPS[node.op].kind != "elementwise" or at != level or relation(r, domain(node)) != "identity":
                return f"{node.op} in the same kernel reads other elements of the old value"
    if level == "full" and any(OPS[n.op].kind == "reduce" and _depends(f, g, n, leaf) for n in g.level):
        return "a reduction in the same kernel reads whole rows of the old value"
    return None


def _depends(f: Fusion, g: Group, node: Node, leaf: Node) -> bool:
    """Whether the node needs the leaf through ops of its own kernel."""
    stack, seen = [node], {node}
    while stack:
        for r in f.reads[stack.pop()]:
            if r.value.node is leaf:
                return True
            if r.value.node in g.level and r.value.node not in seen:
                seen.add(r.value.node)
                stack.append(r.value.node)
    return False


def _ancestors(groups: list[Group], sources: dict[int, list[Group]]) -> set[int]:
    seen: set[int] = set()
    stack = list(groups)
    while stack:
        g = stack.pop()
        if id(g) not in seen:
            seen.add(id(g))
            stack.extend(sources[id(g)])
    return seen


def _fused_node(f: Fusion, b: Builder, g: Group, mapped: dict[Value, Value], inplace: dict[Value, str],
                after: list[Value]) -> Node:
    """The group as one node; ops of the region keep their types and origins."""
    inner = Builder()
    parameters: dict[Value, Value] = {}
    cloned: dict[Value, Value] = {}

    def clone(v: Value) -> Value:
        if v in cloned:
            return cloned[v]
        node = v.node
        if node in g.level or node in f.free:
            made = inner.copy(node, [clone(x) for x in node.inputs])
            for r in node.results:
                cloned[r] = made.result(r.index)
        else:
            with inner.origin(node.origins):
                cloned[v] = parameters[v] = inner.parameter(v.type, len(parameters))
        return cloned[v]

    results = tuple(clone(v) for v in g.stored)
    region = Region(tuple(parameters.values()), results)
    operands = [mapped[v] for v in parameters]
    extra = [v for v in dict.fromkeys(after) if v not in operands]
    origins: dict[Location, None] = {o: None for n in g.level for o in n.origins}
    names = tuple(inplace.get(v, "") for v in g.stored)
    with b.origin(tuple(origins)):
        return b.node("fused", [*operands, *extra], {"kind": g.kind, "axes": g.reduced, "after": len(extra),
                                                     "inplace": names, "note": _note(g)}, [region])


def _note(g: Group) -> str:
    """A name for people: the ops of the kernel, the anchor first, each once."""
    names = [n.op for n in reversed(list(g.level))]
    if g.anchor is not None:
        names = [g.anchor.op, *names]
    short = list(dict.fromkeys(names))
    return "_".join(short[:5]) + ("_etc" if len(short) > 5 else "")
