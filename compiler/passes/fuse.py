"""fuse: groups ops into kernels. Graph -> Graph whose work is done by `fused` nodes (bit-preserving).

Consumers are visited first. A producer joins the kernel of its readers when that repeats no work and closes
no cycle:

- "map": every op is evaluated at the element that the kernel is at; views are looked through, and a producer
read by one
  kernel at another index (a transpose, a slice) is evaluated there.
- "row": a map over rows together with reductions over the same axes of those rows (softmax, normalisation).
- "contraction": one matmul or convolution with the map that follows it as its epilogue.

A value that others need too is stored by the kernel that computes it. What is refused is recorded with the
reason. Then each state update is written in place if every reader of the old value is, or can be ordered,
before it: the order is an explicit edge (the last `after` inputs of the `fused` node), which `check_graph`
verifies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Contract
from graphflow.compiler.passes.access import (
    Probe,
    Read,
    axis,
    domain,
    has_index_map,
    reads,
    reduced_axes,
    relation,
    through,
)
from graphflow.compiler.passes.parts import is_in_parts
from graphflow.compiler.passes.precedence import Precedence
from graphflow.compiler.plan.dims import DimLike, product, typical
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.errors import Location

MANY_ELEMENTS = 1 << 14
CONVOLUTIONS = ("conv", "conv_input_grad", "conv_weight_grad")
FEW_ROWS = 8


@dataclass(eq=False)
class Group:
    """A kernel in the making. `level` of a member: "full" evaluated at each element of `shape`; "outer" once
    per row (kind row: the axes of `shape` that are not in `reduced`); "inlined" at some other index inside
    its reader."""

    kind: str
    shape: tuple[DimLike, ...]
    level: dict[Node, str]
    reduced: tuple[int, ...] = ()
    anchor: Node | None = None
    stored: dict[Value, None] = field(default_factory=dict)

    def outer_shape(self) -> tuple[DimLike, ...]:
        """The shape of what is made once per row."""
        return tuple(d for i, d in enumerate(self.shape) if i not in self.reduced)


@dataclass
class Fusion:
    """The outcome: which group computes each node, the order that this asks of the groups, and what was
    refused. `parts`: concatenations that are stored part by part, by kernels over the shape of a part."""

    graph: Graph
    free: set[Node]
    parts: set[Node]
    group_of: dict[Node, Group]
    refusals: list[tuple[tuple[Location, ...], str]]
    reads: dict[Node, list[Read]]
    needed: dict[Node, dict[Value, None]]
    consumers: dict[Node, list[Node]]
    order: Precedence[Group] = field(default_factory=Precedence)


def fusion_of(graph: Graph, widen: bool = False) -> Fusion:
    """Decides the groups. `widen`: whoever reads a half that was cast to float32 reads the half itself."""
    roots = dict.fromkeys([*graph.outputs.values(), *(v for n in graph.effects for v in n.inputs)])
    asked = {v.node for v in roots}
    # routines and reshapes that copy read whole buffers: a view of one is made first
    asked |= {v.node for n in graph.nodes() if _reads_whole(n) for v in n.inputs}
    asked |= {n for conv in graph.nodes() if conv.op in CONVOLUTIONS for v in conv.inputs for n in _parts(v)}
    free = {n for n in graph.nodes() if (is_view(n) or widen and _widens(n)) and n not in asked
            and has_index_map(n)}
    work = [n for n in graph.nodes() if (is_view(n) or OPS[n.op].kind not in ("leaf", "effect"))
            and n not in free]
    parts = {n for n in work if n in asked and is_in_parts(n)}
    seen = {n: _part_reads(n, free) if n in parts else reads(n, free.__contains__) for n in work}
    f = Fusion(graph, free, parts, {}, [], seen, {}, {})
    readers: dict[Node, list[tuple[Node, Read]]] = {n: [] for n in work}
    for n in work:
        for r in f.reads[n]:
            f.consumers.setdefault(r.value.node, []).append(n)
            if r.value.node in readers:
                readers[r.value.node].append((n, r))
    for v in roots:
        f.needed.setdefault(v.node, {})[v] = None
    for node in reversed(work):
        group = f.group_of[node] = _place(f, node, readers[node])
        if group not in f.order.before:
            f.order.add(group)
        for reader, _ in readers[node]:
            if f.group_of[reader] is not group:
                f.order.order(group, f.group_of[reader])
    for node in work:
        for reader in f.consumers.get(node, ()):
            _unite(f, f.group_of[node], f.group_of[reader])
    for node in work:  # a value read from another kernel is stored by its own
        for reader, read in readers[node]:
            if f.group_of[reader] is not f.group_of[node]:
                f.group_of[node].stored[read.value] = None
        for v in f.needed.get(node, ()):
            f.group_of[node].stored[v] = None
    return f


def _part_reads(node: Node, free: set[Node]) -> list[Read]:
    """What a concatenation reads where all of its parts are at the same place."""
    at = tuple(axis(i) for i in range(node.types[0].rank))
    return [r for v in node.inputs for r in through(v, at, free.__contains__)]


def _domain(f: Fusion, node: Node) -> tuple[DimLike, ...]:
    """The index space in which a node is evaluated."""
    return node.inputs[0].shape if node in f.parts else domain(node)


def _parts(v: Value) -> list[Node]:
    """The concatenation that a value is a view of: a convolution, which reads each element many times, would
    choose among its parts as often."""
    while is_view(v.node) and v.node.inputs:
        if v.node.op == "concatenate":
            return [v.node]
        v = v.node.inputs[0]
    return []


def is_view(node: Node) -> bool:
    """Whether the op computes nothing: a view, or a literal."""
    return OPS[node.op].kind == "view" or (OPS[node.op].kind == "leaf" and OPS[node.op].lowering is not None)


def _widens(node: Node) -> bool:
    return node.op == "cast" and node.inputs[0].dtype.is_half and node.types[0].dtype is F32


def _reads_whole(node: Node) -> bool:
    return OPS[node.op].kind in ("routine", "control") or (is_view(node) and not has_index_map(node))


def _place(f: Fusion, node: Node, readers: list[tuple[Node, Read]]) -> Group:
    """Joins the node to a group of its readers, or opens a group."""
    groups = list(dict.fromkeys(f.group_of[c] for c, _ in readers))
    reasons: list[str] = []
    for group in reversed(groups):
        inside = [(c, r) for c, r in readers if f.group_of[c] is group]
        outside = len(groups) > 1 or node in f.needed
        reason = _join(f, node, group, inside, outside)
        if reason is None and outside:
            if f.order.leads((g for g in groups if g is not group), group):
                reason = "another reader comes before the kernel that would compute it"
        if reason is None:
            _commit(f, node, group, inside)
            return group
        reasons.append(reason)
    alias = _is_alias(f, node, readers)
    if reasons and not alias:
        f.refusals.append((node.origins,
                           f"{node.op} {node.types[0]} is not fused into its reader: {reasons[0]}"))
    kind = OPS[node.op].kind
    if kind == "reduce":
        return Group("row", domain(node), {node: "outer"}, reduced_axes(node))
    if kind == "contraction":
        return Group("contraction", domain(node), {node: "full"}, anchor=node)
    if is_view(node) and not has_index_map(node):
        return Group("copy" if _source_changes(f, node) else "view", domain(node), {node: "full"})
    if alias:
        return Group("view", domain(node), {node: "full"})
    return Group(kind if kind in ("routine", "control") else "map", _domain(f, node), {node: "full"})


def _is_alias(f: Fusion, node: Node, readers: list[tuple[Node, Read]]) -> bool:
    """Whether the node is a reshape of an array that lies in memory anyway, read only by what reads whole
    arrays: then it is the same memory by another shape."""
    return (node.op == "reshape" and node not in f.needed and bool(readers)
            and all(_reads_whole(reader) for reader, _ in readers)
            and node.inputs[0].node not in f.free and not _source_changes(f, node))


def _source_changes(f: Fusion, node: Node) -> bool:
    """Whether the node reads a state that the program overwrites: who reads its result later on needs a
    copy."""
    source = node.inputs[0].node
    return source.op == "state" and source.attrs["name"] in f.graph.updates()


def _level(f: Fusion, group: Group, inside: list[tuple[Node, Read]]) -> tuple[str, tuple[int, ...]] | str:
    """(level, broadcast axes) at which the group's readers need a producer, or the reason why it can't be one
    level."""
    levels: set[tuple[str, tuple[int, ...]]] = set()
    for reader, read in inside:
        kind = OPS[reader.op].kind
        if kind == "contraction":
            return "a contraction reads each element many times"
        if kind in ("window", "gather", "routine", "control") or group.kind in (
            "copy", "view", "routine", "control"
        ):
            return f"{reader.op} reads it at other places than its own"
        at = group.level[reader]
        if kind == "reduce":
            at = "full"
        shape = _domain(f, reader)
        how = relation(read, shape)
        if how == "other":
            return f"{reader.op} would compute its elements more than once"
        if at == "inlined" or how == "injective":
            if isinstance(how, tuple):
                return f"{reader.op} would compute its elements more than once"
            levels.add(("inlined", ()))
        elif isinstance(how, tuple):
            if at != "full":
                return f"{reader.op} would compute its elements more than once"
            levels.add(("outer", how))
        else:
            levels.add((at, ()))
    if len(levels) > 1 and all(level == "outer" for level, _ in levels):
        levels = ({(level, axes) for level, axes in levels if axes} if group.kind != "row"
                  else {(level, axes or group.reduced) for level, axes in levels})
    if len(levels) != 1:
        return "it is needed at several indices of one kernel"
    return levels.pop()


def _join(f: Fusion, node: Node, group: Group, inside: list[tuple[Node, Read]], outside: bool) -> str | None:
    """The reason why the node can't join the group; None if it can."""
    found = _level(f, group, inside)
    if isinstance(found, str):
        return found
    level, axes = found
    if outside and level == "inlined":
        return "others read it too, and the kernel evaluates it at other indices"
    kind = OPS[node.op].kind
    if kind == "contraction":
        if group.kind != "map" or level != "full" and (outside or not _in_columns(f, node, group)):
            return (f"a {group.kind} kernel can't hold a contraction" if group.kind != "map"
                    else "not read in place")
        if any(OPS[n.op].kind in ("window", "gather") for n in group.level if n.op != "random_bits"):
            return "the epilogue of a contraction only holds elementwise ops"
        return None
    if kind in ("routine", "control") or (is_view(node) and not has_index_map(node)):
        return f"{node.op} is a kernel of its own"
    if kind == "reduce":
        return _join_reduce(node, group, level, axes)
    if kind in ("window", "gather"):
        if level != "full" or (group.kind != "map" and node.op != "random_bits"):
            return f"{node.op} is costly to evaluate inside a {group.kind} kernel"
        return None
    if level == "outer" and group.kind == "map":
        if not f.parts.isdisjoint(group.level):
            return "the kernel stores an array part by part"
        rank = len(group.shape)
        if len(axes) == rank:
            return "one number for all elements is computed once, beforehand"
        if axes != tuple(range(rank - len(axes), rank)) or _few_rows(group.shape, axes):
            return "the kernel would compute its elements more than once"
        return None
    if level == "full" and outside and group.kind == "row" and len(group.shape) - 1 not in group.reduced:
        return "others read it too, and this kernel walks down columns"
    if level == "outer" and axes and axes != group.reduced:
        return "it belongs to rows along other axes"
    if level == "outer" and group.kind not in ("row", "map"):
        return "the kernel has no rows"
    return None


def _in_columns(f: Fusion, node: Node, group: Group) -> bool:
    """Whether the map reads, element by element, equal slices along the last axis of a contraction's result
    that together are all of it, as recurrent layers read their gates: then it can be the epilogue of a
    contraction with column groups."""
    whole, part = node.types[0].shape, group.shape
    lowering = OPS[node.op].lowering
    assert isinstance(lowering, Contract)
    parts = lowering.parts(Probe(node))
    if not part or len(whole) != len(part) or whole[:-1] != part[:-1] or len(parts.n) != 1:
        return False
    if parts.out(parts.batch, parts.m, (axis(0),))[-1] != axis(0):
        return False
    columns, width = whole[-1], part[-1]
    if not isinstance(columns, int) or not isinstance(width, int) or width == 0:
        return False
    starts = _starts(f, node, group)
    return bool(starts) and sorted(starts) == list(range(0, columns, width))


def _starts(f: Fusion, node: Node, group: Group) -> set[int]:
    """The columns at which the slices of the node's result begin that the group reads; none if it reads
    anything else of it."""
    found: set[int] = set()
    for reader in f.consumers[node]:
        outer = {0} if group.level[reader] == "full" else _starts(f, reader, group)
        for read in f.reads[reader]:
            if read.value.node is not node:
                continue
            rank = len(_domain(f, reader))
            if read.index is None or len(read.index) != rank:
                return set()
            shift = read.index[-1] - axis(rank - 1)
            if not isinstance(shift, int) or read.index[:-1] != tuple(axis(i) for i in range(rank - 1)):
                return set()
            if not outer:
                return set()
            found |= {shift + start for start in outer}
    return found


def _join_reduce(node: Node, group: Group, level: str, axes: tuple[int, ...]) -> str | None:
    reduced, shape = reduced_axes(node), domain(node)
    if level == "inlined":
        return "a reduction is not evaluated at other indices"
    if group.kind == "map" and level == "full":
        return None if _plain(group) else "the kernel reads at other places than its own"
    if group.kind == "map":
        if reduced != axes or shape != group.shape:
            return "the reduction runs along other axes than the kernel's rows"
        return "there are too few rows to share among threads" if _few_rows(shape, axes) else None
    if group.kind == "row":
        if level != "outer" or reduced != group.reduced or shape != group.shape:
            return "the reduction runs along other axes than the kernel's rows"
        return None
    return f"a {group.kind} kernel can't hold a reduction before its result"


def _plain(group: Group) -> bool:
    return all(OPS[n.op].kind == "elementwise" for n in group.level)


def _few_rows(shape: tuple[DimLike, ...], axes: tuple[int, ...]) -> bool:
    rows = typical(product(d for i, d in enumerate(shape) if i not in axes))
    return rows < FEW_ROWS and rows * typical(product(shape[i] for i in axes)) > MANY_ELEMENTS


def _commit(f: Fusion, node: Node, group: Group, inside: list[tuple[Node, Read]]) -> None:
    found = _level(f, group, inside)
    assert not isinstance(found, str), found
    level, axes = found
    kind = OPS[node.op].kind
    if kind == "contraction":
        group.kind, group.anchor = "contraction", node
    elif kind == "reduce" and level == "full":  # the map was over the reduction's results
        group.level = {n: "outer" if at == "full" else at for n, at in group.level.items()}
        group.kind, group.shape, group.reduced = "row", domain(node), reduced_axes(node)
        level = "outer"
    elif level == "outer" and group.kind == "map":
        group.kind, group.reduced = "row", axes
    group.level[node] = level


def _unite(f: Fusion, first: Group, then: Group) -> None:
    """Makes one kernel of two where the second walks the same elements or rows as the first, whose values it
    reads; a contraction takes a map like that as a part of its epilogue."""
    if first is then or {first.kind, then.kind} - {"map", "row"} and not _is_epilogue(f, first, then):
        return
    if first.shape == then.shape and "map" in (first.kind, then.kind) or _same_rows(first, then):
        down = False
    elif first.kind == "row" and then.kind == "map" and then.shape == first.outer_shape():
        down = True  # a map over the rows' results
    else:
        return
    reduced = first.reduced or then.reduced
    if reduced and not f.parts.isdisjoint((*first.level, *then.level)):
        return
    if reduced and len(first.shape) - 1 not in reduced or (then.kind == "row" and first.kind == "map"):
        return  # columns: see _join; and rows are not forced on a plain map
    if any(OPS[n.op].kind in ("window", "gather") and n.op != "random_bits"
           for n in (*first.level, *then.level)):
        return
    at = {n: "outer" if down and level == "full" else level for n, level in then.level.items()}
    for node in then.level:
        for r in f.reads[node]:
            if f.group_of.get(r.value.node) is first and not _in_step(f, first, node, r, at[node], reduced):
                return
    if f.order.between(first, then):
        return
    f.order.merge(first, then)
    first.level.update(at)
    if first.kind != "contraction":
        first.kind, first.reduced = ("row" if reduced else "map"), reduced
    for node in then.level:
        f.group_of[node] = first


def _is_epilogue(f: Fusion, first: Group, then: Group) -> bool:
    """Whether a contraction can compute the map `then` where it has its results at hand."""
    return (first.kind, then.kind) == ("contraction", "map") and all(
        level == "full" and (OPS[n.op].kind == "elementwise" or n in f.parts)
        for n, level in then.level.items())


def _same_rows(first: Group, then: Group) -> bool:
    return (first.shape, first.reduced) == (then.shape, then.reduced)


def _in_step(f: Fusion, first: Group, reader: Node, read: Read, level: str, reduced: tuple[int, ...]) -> bool:
    """Whether `first` has the value at hand where the reader wants it."""
    at = "full" if OPS[reader.op].kind == "reduce" else level
    have = first.level[read.value.node]
    how = relation(read, _domain(f, reader))
    return (how == "identity" and at == have) or (at == "full" and have == "outer" and how == reduced)
