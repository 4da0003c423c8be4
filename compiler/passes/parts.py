"""Arrays that are made in parts, side by side along the last axis: concatenations that a kernel stores.

A kernel over the shape of a part stores all parts of an element's place, one after the other, rather than
going over the whole array and asking everywhere which part it is in: so what the parts have in common is
computed once. Gradients of slices come as a sum of padded parts, which is such a concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule
from graphflow.compiler.plan.dims import DimLike

MOST_PARTS, LEAST_WIDTH = 8, 16
"""Narrow parts, and very many, are not worth stores of their own."""


def is_in_parts(node: Node) -> bool:
    """Whether the array, if a kernel stores it, is made in parts."""
    if node.op != "concatenate" or not 2 <= len(node.inputs) <= MOST_PARTS:
        return False
    shapes = {v.shape for v in node.inputs}
    width = node.inputs[0].shape[-1]
    return (len(shapes) == 1 and node.attrs["axis"] == node.types[0].rank - 1
            and isinstance(width, int) and width >= LEAST_WIDTH)


def made_at(value: Value) -> tuple[DimLike, ...]:
    """The shape over which a kernel goes that stores the value."""
    return value.node.inputs[0].shape if is_in_parts(value.node) else value.shape


def _sum_of_pads(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """Padded parts that leave no gap and do not overlap, added up, are a concatenation."""
    pads = _pads(b, inputs)
    axis = node.types[0].rank - 1
    if pads is None or axis < 0:
        return None
    pads.sort(key=lambda pad: pad.attrs["low"][axis])
    at: DimLike = 0
    for pad in pads:
        if pad.attrs["low"][axis] != at:
            return None
        at = at + pad.inputs[0].shape[axis]
    if at != node.types[0].shape[axis]:
        return None
    return b.node("concatenate", [pad.inputs[0] for pad in pads], {"axis": axis}).result()


def _pads(b: RewriteBuilder, values: Sequence[Value]) -> list[Node] | None:
    """The paddings that are added up, each along the last axis alone; None if there is anything else."""
    found: list[Node] = []
    stack = list(values)
    while stack:
        v = stack.pop()
        pad = b.match(v, "pad")
        if pad is not None:
            lows, highs = pad.attrs["low"], pad.attrs["high"]
            if any(pad.attrs["interior"]) or any((*lows[:-1], *highs[:-1])) or not lows:
                return None
            if not all(isinstance(x, int) and x >= 0 for x in (lows[-1], highs[-1])):
                return None
            found.append(pad)
        elif b.match(v, "add") is not None and len(found) + len(stack) < MOST_PARTS:
            stack += v.node.inputs
        else:
            return None
    return found


PARTS = (Rule("sum of padded parts", "add", _sum_of_pads, "tolerance"),)
"""0 + -0 is 0, so bits are not kept. Cost: additions."""
