"""What a loop keeps of the slices of one array is kept as one array (part of joint).

The gates of a recurrent layer are functions of slices of one product. Kept one by one for the gradient, they
are arrays of their own; here the forward loop stacks them side by side, in the order of the slices, and the
loop that reads them takes all of them as one input. Then their memory can be that of the input that they were
made of, and what the gradient makes of them can take their place in turn (see `memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.bodies import in_bodies
from graphflow.compiler.passes.parts import LEAST_WIDTH, MOST_PARTS
from graphflow.compiler.passes.regions import inline
from graphflow.compiler.plan.dims import DimLike


def join_stacks(graph: Graph) -> Graph:
    """The graph with such outputs and inputs of scans joined."""
    if not any(node.regions for node in graph.nodes()):
        return graph
    only_read = _read_by_scans(graph)

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        old, node = node, in_bodies(node, join_stacks)
        if node.op != "scan":
            return b.copy(node, inputs).results
        node, inputs = _whole_inputs(b, node, inputs)
        groups = _groups(node, [k for k in range(len(node.types)) if old.result(k) in only_read])
        return _joined(b, node, inputs, groups) if groups else b.copy(node, inputs).results

    return rebuild(graph, make)


def _read_by_scans(graph: Graph) -> set[Value]:
    """The values that are nothing but inputs of scans, step by step."""
    found: set[Value] = set()
    other = {v for v in graph.outputs.values()}
    for node in graph.nodes():
        first = node.attrs["carries"] if node.op == "scan" else 0
        steps = range(first, first + node.attrs["steps"]) if node.op == "scan" else range(0)
        for i, v in enumerate(node.inputs):
            (found if i in steps else other).add(v)
    other |= {v for n in graph.effects for v in n.inputs}
    return found - other


# --- outputs

def _groups(node: Node, results: Sequence[int]) -> list[list[int]]:
    """The stacked outputs that are to be joined, each group in the order of the slices."""
    body = node.regions[0]
    by_source: dict[tuple[Value, TensorType], dict[int, int]] = {}
    for k in results:
        found = _slice_of(body.results[k]) if k >= node.attrs["carries"] else None
        if found is not None and list(body.results).count(body.results[k]) == 1:
            source, start = found
            by_source.setdefault((source, body.results[k].type), {})[start] = k
    out = []
    for (source, type), starts in by_source.items():
        width, whole = type.shape[-1], source.shape[-1]
        if isinstance(width, int) and LEAST_WIDTH <= width and isinstance(whole, int):
            if sorted(starts) == list(range(0, whole, width)) and 2 <= len(starts) <= MOST_PARTS:
                out.append([starts[s] for s in sorted(starts)])
    return out


def _slice_of(v: Value) -> tuple[Value, int] | None:
    """(array, first column) if the value is a function of one element each of a slice of columns."""
    while OPS[v.node.op].kind == "elementwise" and len(v.node.inputs) == 1:
        v = v.node.inputs[0]
    start = _columns(v)
    return None if start is None else (v.node.inputs[0], start)


def _columns(v: Value) -> int | None:
    """Where the value begins as a slice of whole columns; None if it is none."""
    if v.op != "slice":
        return None
    attrs, whole = v.node.attrs, v.node.inputs[0].shape
    if not whole or any(attrs["starts"][:-1]) or tuple(attrs["stops"][:-1]) != tuple(whole[:-1]):
        return None
    start = attrs["starts"][-1]
    return start if all(s == 1 for s in attrs["steps"]) and isinstance(start, int) else None


def _joined(b: Builder, node: Node, inputs: list[Value], groups: list[list[int]]) -> list[Value]:
    """What stands for the scan's results: slices of the joined ones."""
    body, count = node.regions[0], node.attrs["carries"]
    gone = {k for group in groups for k in group}
    stays = [k for k in range(len(node.types)) if k not in gone]
    inner = Builder()
    parameters = []
    for i, p in enumerate(body.parameters):
        with inner.origin(p.node.origins):
            parameters.append(inner.parameter(p.type, i))
    made = inline(inner, body, parameters)
    whole = []
    for group in groups:
        with inner.origin(body.results[group[0]].node.origins):
            axis = made[group[0]].type.rank - 1
            whole.append(inner.node("concatenate", [made[k] for k in group], {"axis": axis}).result())
    region = Region(tuple(parameters), (*(made[k] for k in stays), *whole))
    attrs: dict[str, Any] = dict(node.attrs)
    if attrs["kept"]:
        names = [attrs["kept"][k - count] for k in stays if k >= count]
        attrs["kept"] = (*names, *(", ".join(attrs["kept"][k - count] for k in group) for group in groups))
    new = b.node("scan", inputs, attrs, [region]).results
    out: dict[int, Value] = {k: new[i] for i, k in enumerate(stays)}
    for number, group in enumerate(groups):
        stack = new[len(stays) + number]
        for i, k in enumerate(group):
            width = node.types[k].shape[-1]
            out[k] = _slice(b, stack, i * width, (i + 1) * width)
    return [out[k] for k in range(len(node.types))]


def _slice(b: Builder, v: Value, start: DimLike, stop: DimLike) -> Value:
    rank = v.type.rank
    attrs = {"starts": (*[0] * (rank - 1), start), "stops": (*v.shape[:-1], stop), "steps": (1,) * rank}
    return b.node("slice", [v], attrs).result()


# --- inputs

def _whole_inputs(b: Builder, node: Node, inputs: list[Value]) -> tuple[Node, list[Value]]:
    """The scan and its operands, with arrays as inputs of the steps instead of their slices of columns."""
    count, steps, body = node.attrs["carries"], node.attrs["steps"], node.regions[0]
    sliced = {i: v.node.inputs[0] for i, v in enumerate(inputs)
              if count <= i < count + steps and v.type.rank > 1 and _columns(v) is not None}
    if not sliced:
        return node, inputs
    kept = [i for i in range(count, count + steps) if i not in sliced]
    arrays = list(dict.fromkeys(sliced.values()))
    inner = Builder()
    given: dict[int, Value] = {}
    for i in (*range(count), *kept):
        with inner.origin(body.parameters[i].node.origins):
            given[i] = inner.parameter(body.parameters[i].type, len(given))
    rows: dict[Value, Value] = {}
    for array in arrays:
        with inner.origin(array.node.origins):
            type = TensorType(array.dtype, array.shape[1:])
            rows[array] = inner.parameter(type, len(given) + len(rows))
    for i in range(count + steps, len(inputs)):
        with inner.origin(body.parameters[i].node.origins):
            given[i] = inner.parameter(body.parameters[i].type, len(given) + len(rows))
    places = (*range(count), *kept), tuple(range(count + steps, len(inputs)))
    parameters = (*(given[i] for i in places[0]), *rows.values(), *(given[i] for i in places[1]))
    for i, array in sliced.items():
        start = inputs[i].node.attrs["starts"][-1]
        with inner.origin(body.parameters[i].node.origins):
            given[i] = _slice(inner, rows[array], start, inputs[i].node.attrs["stops"][-1])
    region = Region(parameters, tuple(inline(inner, body, [given[i] for i in range(len(inputs))])))
    operands = [*(inputs[i] for i in places[0]), *arrays, *(inputs[i] for i in places[1])]
    attrs = {**node.attrs, "steps": len(kept) + len(arrays)}
    made = Node("scan", tuple(operands), attrs, (region,), node.types, node.origins)
    return made, operands


