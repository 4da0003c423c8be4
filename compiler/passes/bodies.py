"""Graph passes inside loops and branches: a body is a graph of its own to them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from graphflow.compiler.ir.builder import rebuild_region
from graphflow.compiler.ir.graph import Graph, Node, Region
from graphflow.compiler.ops import OPS


def graph_of(region: Region, name: str) -> Graph:
    """The region as a graph: its parameters are the inputs, its results the outputs "0", "1", …"""
    return Graph(name, region.parameters, {str(i): v for i, v in enumerate(region.results)})


def region_of(graph: Graph) -> Region:
    """What `graph_of` made a graph, as a region again."""
    return Region(graph.inputs, tuple(graph.outputs.values()))


def in_bodies(node: Node, change: Callable[[Graph], Graph]) -> Node:
    """The node with its bodies changed, if it is a loop or a branch, or a kernel that holds one."""
    if not holds_bodies(node):
        return node
    if node.op == "fused":
        regions = tuple(rebuild_region(r, lambda b, inner, inputs: b.intern(replace(
            in_bodies(inner, change), inputs=tuple(inputs))).results) for r in node.regions)
    else:
        regions = tuple(region_of(change(graph_of(r, node.op))) for r in node.regions)
    return replace(node, regions=regions)


def holds_bodies(node: Node) -> bool:
    """Whether the node is a loop or a branch, or a kernel that holds one."""
    return OPS[node.op].kind == "control" or (node.op == "fused" and node.attrs["kind"] == "control")
