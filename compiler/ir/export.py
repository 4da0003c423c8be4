"""Graphs for graph tools: the tensor graph and the kernel program as networkx digraphs, and as GraphML
files."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from graphflow.compiler.ir.graph import Graph, Node
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.errors import Location
from graphflow.compiler.plan.schema import Branch, Check, Copy, Item, Launch, Repeat, base_of, places
from graphflow.compiler.plan.text import dim_text, type_text

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: Graph) -> networkx.DiGraph:
    """The graph with a vertex per node, numbered as in `Graph.nodes()`.

    Vertices carry op, shape and dtype (of the first result), line, scope (of the first origin), label, ops (a
    fused node's, separated by blanks) and outputs (names). Edges carry `operands`: the positions, as text
    "0,2". """
    import networkx
    out = networkx.DiGraph(name=graph.name)
    numbers = {node: i for i, node in enumerate(graph.nodes())}
    for node, i in numbers.items():
        names = [name for name, v in graph.outputs.items() if v.node is node]
        out.add_node(i, **_attributes(node), outputs=" ".join(names))
    for node, i in numbers.items():
        _connect(out, [numbers[v.node] for v in node.inputs], i)
    return out


def _attributes(node: Node) -> dict[str, Any]:
    type = node.types[0]
    inner = [n.op for region in node.regions for n in region.nodes() if n.op != "parameter"]
    name = node.attrs.get("name") or node.attrs.get("note") or ""
    where: Location | None = node.origins[0] if node.origins else None
    return {"op": node.op, "shape": ",".join(map(dim_text, type.shape)), "dtype": type.dtype.name,
            "line": str(where) if where else "", "scope": where.scope if where else "",
            "label": f"{node.op} {name}".rstrip() + f"\n{type}", "ops": " ".join(inner)}


def _connect(out: networkx.DiGraph, sources: Iterable[Any], target: Any) -> None:
    operands: dict[Any, list[str]] = {}
    for position, source in enumerate(sources):
        operands.setdefault(source, []).append(str(position))
    for source, positions in operands.items():
        out.add_edge(source, target, operands=",".join(positions))


def program_to_networkx(program: KernelProgram) -> networkx.DiGraph:
    """The program with a vertex per buffer (its id; a view is the buffer that it lies in) and per item of the
    body at any depth (``item 3``).

    Vertices carry kind (a buffer's role, or launch, copy, check, repeat, branch), label, shape and dtype
    (buffers), kernel (launches). Edges run from what is read to the item and from the item to what it writes;
    they carry `operands` as in `to_networkx` (positions among the item's buffers). """
    import networkx
    plan = program.plan
    out = networkx.DiGraph(name=plan.name)
    table = {b.id: b for b in plan.buffers}
    for b in plan.buffers:
        if b.role == "view":
            continue
        out.add_node(b.id, kind=b.role, label=f"{b.name}\n{type_text(b.dtype, b.shape, b.layout)}".strip(),
                     shape=",".join(map(dim_text, b.shape)), dtype=b.dtype.name, kernel="")
    for position, _, item, _ in places(plan.body):
        vertex = f"item {position}"
        kernel = item.kernel if isinstance(item, Launch) else ""
        kind = type(item).__name__.lower()
        out.add_node(vertex, kind=kind, label=kernel or kind, shape="", dtype="", kernel=kernel)
        for at, id, mode in _accesses(program, item):
            buffer = base_of(table, id)
            if "r" in mode:
                _add_operand(out, buffer, vertex, at)
            if "w" in mode:
                _add_operand(out, vertex, buffer, at)
        if isinstance(item, Launch):
            for earlier in item.after:
                out.add_edge(f"item {earlier}", vertex, operands="")
    return out


def _accesses(program: KernelProgram, item: Item) -> list[tuple[int, str, str]]:
    """(position, buffer, mode "r", "w" or "rw") of everything that an item touches."""
    if isinstance(item, Copy):
        return [(0, item.source, "r"), (1, item.target, "w")]
    if isinstance(item, Check):
        return [(0, item.buffer, "r")]
    if isinstance(item, Repeat):
        return [(0, item.condition, "r")] if item.condition else []
    if isinstance(item, Branch):
        return [(0, item.predicate, "r")]
    arguments = program.kernels[item.kernel].arguments
    return [(i, b, a.mode) for i, (b, a) in enumerate(zip(item.buffers, arguments))]


def _add_operand(out: networkx.DiGraph, source: str, target: str, position: int) -> None:
    before = out.edges[source, target]["operands"] + "," if out.has_edge(source, target) else ""
    out.add_edge(source, target, operands=f"{before}{position}")


def to_graphml(graph: Graph, path: str) -> None:
    """Writes `to_networkx(graph)` as a GraphML file, for Gephi, yEd and the like."""
    import networkx
    networkx.write_graphml(to_networkx(graph), path)
