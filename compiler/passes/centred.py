"""Sums of what sums to zero: x - mean(x), in the gradients of normalisations.

The gradient of batch norm for its input, taken step by step, ends with minus the sum of
g·s + k·(x - mean(x)), whose second term vanishes. What is left, s · sum(g), is there already for the bias,
and no longer waits for other sums: one pass over memory less, and the sums that stay share one.
"""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule
from graphflow.compiler.plan.dims import DimLike, product

Axes = tuple[int, ...]
MOST_TERMS = 8
"""Sums of more terms are left alone."""


def _sum_of_centred(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """Without the terms that sum to zero, where others are left."""
    axes = tuple(node.attrs["axes"])
    if not node.types[0].dtype.is_float or not axes:
        return None
    terms = _terms(b, inputs[0], True)
    if len(terms) > MOST_TERMS:
        return None
    kept = [(plus, _factored(b, v, axes)) for plus, v in terms]
    left = [(plus, factor, v) for plus, (factor, v) in kept if not _is_centred(b, v, axes)]
    if not left or len(left) == len(terms):
        return None
    total: Value | None = None
    for plus, factor, v in left:
        part = b.reduce_sum(v, axes=axes)
        if factor is not None:
            part = b.mul(part, _of_result(b, factor, axes, node.types[0].shape))
        if total is None:
            total = part if plus else b.neg(part)
        else:
            total = b.add(total, part) if plus else b.sub(total, part)
    return total


def _terms(b: RewriteBuilder, v: Value, plus: bool) -> list[tuple[bool, Value]]:
    """(whether it is added, the term) for the terms of a sum."""
    n = b.match(v, "add", "sub", "neg")
    if n is None:
        return [(plus, v)]
    out = _terms(b, n.inputs[0], plus != (n.op == "neg"))
    return out + _terms(b, n.inputs[1], plus != (n.op == "sub")) if len(n.inputs) == 2 else out


def _factored(b: RewriteBuilder, v: Value, axes: Axes) -> tuple[Node | None, Value]:
    """(a factor that is the same along the axes, what it multiplies)."""
    n = b.match(v, "mul")
    if n is not None:
        for factor, rest in (n.inputs, n.inputs[::-1]):
            view = _stretched(b, factor, axes)
            if view is not None:
                return view, rest
    return None, v


def _stretched(b: RewriteBuilder, v: Value, axes: Axes) -> Node | None:
    """The broadcast that makes the value, if it is the same along the axes."""
    view = b.match(v, "broadcast_to")
    if view is None:
        return None
    new = v.type.rank - view.inputs[0].type.rank
    return view if all(a < new or view.inputs[0].shape[a - new] == 1 for a in axes) else None


def _of_result(b: RewriteBuilder, view: Node, axes: Axes, shape: tuple[DimLike, ...]) -> Value:
    """What a broadcast repeats along the axes, with the shape of a sum over them."""
    x = view.inputs[0]
    new = len(view.types[0].shape) - x.type.rank
    kept = [a for a in range(len(view.types[0].shape)) if a not in axes]
    own = tuple(x.shape[a - new] if a >= new else 1 for a in kept)
    return b.broadcast(x if x.shape == own else b.reshape(x, shape=own), shape)


def _is_centred(b: RewriteBuilder, v: Value, axes: Axes) -> bool:
    """Whether the value is x - mean(x), the mean taken over these axes."""
    difference = b.match(v, "sub")
    if difference is None:
        return False
    x, view = difference.inputs[0], _stretched(b, difference.inputs[1], axes)
    mean = view.inputs[0] if view is not None else None
    while mean is not None and (shaped := b.match(mean, "reshape")) is not None:
        mean = shaped.inputs[0]
    quotient = None if mean is None else b.match(mean, "div")
    if quotient is None:
        return False
    total = b.match(quotient.inputs[0], "reduce_sum")
    return (total is not None and total.inputs[0] == x and tuple(total.attrs["axes"]) == axes
            and _number(b, quotient.inputs[1]) == product(x.shape[a] for a in axes))


def _number(b: RewriteBuilder, v: Value) -> DimLike | None:
    """The integer that every element of the value is: a constant, or an extent (the last of an iota)."""
    constant = b.constant_of(v)
    if constant is not None:
        return int(constant) if constant == int(constant) else None
    while (view := b.match(v, "broadcast_to", "reshape")) is not None:
        v = view.inputs[0]
    last = b.match(v, "slice")
    if last is None or b.match(last.inputs[0], "iota") is None or v.shape != (1,):
        return None
    return last.attrs["starts"][0]


CENTRED: tuple[Rule, ...] = (Rule("sum of centred values", "reduce_sum", _sum_of_centred, "tolerance"),)
"""Stated cost: elements that are summed."""
