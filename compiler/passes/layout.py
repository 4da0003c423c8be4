"""layout: the order in memory of the arrays that kernels leave in the arena (part of schedule; keeps bits).

A convolution is best computed with the channels of a pixel side by side: they are what a vector holds, what
is added up in one run, and what any padding leaves whole. So images [N, C, H, W] around convolutions are kept
channels-last ("nhwc") where their channels fill vectors. What lies outside the arena or is read as one long
row stays as it is: feeds, outputs, states, constants, what loops carry, and the arrays of views, copies and
routines.

The choice is made for whole regions, so that nothing is converted within one: two images are of one region
where a kernel reads or writes both at the same elements, up to windows and shifts. A region is channels-last
if the convolutions at its arrays count for more than the elements that its kernels then read or write across
memory. A GPU has this for convolutions of halves, weights included: 16 bytes are eight channels of a pixel,
while pixels in rows, of which a guard may hold for one and not for the next, would be copied one by one.
"""
from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from graphflow.compiler.ir.builder import Builder, rebuild, rebuild_region
from graphflow.compiler.ir.graph import Graph, Node, Value, walk
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.bodies import in_bodies
from graphflow.compiler.plan.dims import product, typical
from graphflow.compiler.plan.errors import Location
from graphflow.compiler.plan.layouts import CHANNELS_LAST

KINDS = ("map", "row", "contraction")
"""The kernels that can read and write any layout."""
_MOVES = ("reshape", "transpose", "unfold")
"""Views that read an image along other axes."""
_CONVOLUTIONS: dict[str, tuple[int, ...]] = {
    "conv": (0, 2), "conv_input_grad": (0, 2), "conv_weight_grad": (0, 1)}
"""Which two are images of the two operands and the result."""
ACROSS = 64.0
"""An element that is read or written across memory costs about as much as so many operations of a
convolution."""


def lay_out(graph: Graph, lanes: int, halves: bool = False) -> Graph:
    """The graph of `fused` nodes with the layout in the types of their results and parameters, in bodies of
    loops and branches too. `lanes`: elements of a vector. `halves`: only convolutions of halves count, with
    their weights."""
    chosen = _chosen(graph, lanes, halves)

    def make(b: Builder, node: Node, inputs: list[Value]) -> tuple[Value, ...]:
        node = in_bodies(node, lambda body: lay_out(body, lanes, halves))
        if node.op != "fused":
            return b.copy(node, inputs).results
        types = [v.type for v in inputs[:len(node.inputs) - node.attrs["after"]]]
        regions = node.regions
        if any(t.layout for t in types):
            regions = (rebuild_region(regions[0], lambda inner, n, given: inner.copy(n, given).results,
                                      types=types),)
        results = tuple(replace(v.type, layout=CHANNELS_LAST if v in chosen else "") for v in node.results)
        return b.intern(replace(node, inputs=tuple(inputs), regions=regions, types=results)).results

    return rebuild(graph, make)


class _Regions:
    """Sets of values that share a layout, with the votes for channels-last (less those against it)."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}
        self.votes: dict[Hashable, float] = {}

    def root(self, key: Hashable) -> Hashable:
        path = []
        while self.parent.get(key, key) != key:
            path.append(key)
            key = self.parent[key]
        self.parent.update(dict.fromkeys(path, key))
        return key

    def tie(self, keys: Sequence[Hashable]) -> None:
        """Makes one region of those that the keys are in."""
        for key in keys[1:]:
            first, other = self.root(keys[0]), self.root(key)
            if first != other:
                self.parent[other] = first
                self.votes[first] = self.votes.get(first, 0.0) + self.votes.pop(other, 0.0)

    def vote(self, key: Hashable, amount: float) -> None:
        root = self.root(key)
        self.votes[root] = self.votes.get(root, 0.0) + amount


def _chosen(graph: Graph, lanes: int, halves: bool) -> set[Value]:
    """The results of fused nodes that are channels-last."""
    regions = _Regions()
    candidates = _candidates(graph, lanes)
    for node in graph.nodes():
        if node.op == "fused" and node.attrs["kind"] in KINDS:
            for inner in node.regions[0].nodes():
                _relate(regions, node, inner, lanes, halves)
            for outside, inside in _border(node):
                if outside in candidates:
                    regions.tie([outside, (node, inside)])
                elif _is_image(inside):
                    regions.vote((node, inside), -ACROSS * typical(inside.type.size))
    return {v for v in candidates if regions.votes.get(regions.root(v), 0.0) > 0}


def _border(node: Node) -> Iterator[tuple[Value, Value]]:
    """(value outside, value inside) for each operand and result of a fused node."""
    yield from zip(node.inputs, node.regions[0].parameters)
    yield from zip(node.results, node.regions[0].results)


def _is_image(v: Value) -> bool:
    return v.type.rank == 4 and product(v.shape[2:]) != 1


def _candidates(graph: Graph, lanes: int) -> set[Value]:
    """The arrays that may be channels-last: written and read by kernels alone, and by one of them as an
    image."""
    kept = {*graph.outputs.values(), *(v for n in graph.effects for v in n.inputs)}
    read: dict[Value, bool] = {}        # whether some kernel reads it as an image
    for node in graph.nodes():
        if node.op != "fused" or node.attrs["kind"] not in KINDS:
            kept.update(node.inputs)
            continue
        seen = _read_as_images(node)
        for v, p in zip(node.inputs, node.regions[0].parameters):
            read[v] = read.get(v, False) or p in seen
    return {v for node in graph.nodes() if node.op == "fused" and node.attrs["kind"] in KINDS
            for v, state in zip(node.results, node.attrs["inplace"] or [""] * len(node.types)) if _is_image(v)
            and isinstance(v.shape[1], int) and v.shape[1] % lanes == 0 and not state and v not in kept
            and read.get(v, False)}


def _read_as_images(node: Node) -> set[Value]:
    """The parameters of a fused node that are read otherwise than by views that move their axes."""
    return {v for n in node.regions[0].nodes() if n.op not in _MOVES for v in n.inputs}


def _relate(regions: _Regions, node: Node, inner: Node, lanes: int, halves: bool) -> None:
    """Ties the images that one op of a kernel reads and writes at the same places, and counts its votes."""
    kind = OPS[inner.op].kind
    images = [(node, v) for v in (*inner.inputs, *inner.results) if _is_image(v)]
    if inner.op in _MOVES:
        for v in filter(_is_image, inner.inputs):
            regions.vote((node, v), -ACROSS * typical(v.type.size))
    elif kind in ("elementwise", "view", "window") or inner.op == "pool_take":
        regions.tie(images)
    elif inner.op in _CONVOLUTIONS and (not halves or all(map(_was_half, inner.inputs))):
        for v in _images(inner, halves):
            regions.vote((node, v), _worth(inner, lanes))


def _was_half(v: Value) -> bool:
    return v.op == "cast" and v.node.inputs[0].dtype.is_half


def _images(conv: Node, weights: bool = False) -> list[Value]:
    which = {*_CONVOLUTIONS[conv.op], *((0, 1) if weights else ())}
    return [(*conv.inputs, conv.result())[at] for at in which]


def _worth(conv: Node, lanes: int) -> float:
    """The vote of a convolution at each of its images: the part of its operations that it gains in time,
    which is little where it is a matrix product; against it where a group has too few channels to fill a
    vector."""
    groups = conv.attrs["groups"]
    weights = conv.types[0] if conv.op == "conv_weight_grad" else conv.inputs[1].type
    flops = typical(OPS[conv.op].flops(conv))
    if groups > 1 and any(typical(v.shape[1]) < lanes * groups for v in _images(conv)):
        return -flops
    return flops * (0.06 if product(weights.shape[2:]) == 1 else 0.4)


def explain_layouts(graph: Graph) -> list[tuple[tuple[Location, ...], str]]:
    """(lines that asked for it, what) for each type of images that a scheduled graph keeps in a layout of
    their own."""
    found: dict[str, dict[Location, None]] = {}
    for node in walk(graph.nodes()):
        for t in node.types if node.op == "fused" else ():
            if t.layout:
                found.setdefault(str(t), {}).update(dict.fromkeys(node.origins))
    return [(tuple(origins), f"{type} is kept channels-last") for type, origins in found.items()]
