"""The canonical stage: one form for what has several, and nothing that computes what is known already.

Every row keeps the bits of the result (a NaN stays a NaN; which one is not promised) on a device where a
function of a number does not depend on the number's place. Each lowers, in this order: the number of elements
computed, the number of ops, the number of views. Equal nodes become one by the builder, dead ones disappear.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.half import passes_float32
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule, rewrite
from graphflow.compiler.plan.dtypes import DType

_ELEMENTWISE = tuple(name for name, op in OPS.items() if op.kind == "elementwise")
APPROXIMATE = frozenset(name for name, s in SCALARS.items() if not s.exact) | {"logaddexp"}
"""Functions whose last bits a device decides: literals of them are left to it."""
_VIEWS = ("broadcast_to", "reshape", "transpose", "slice", "flip")
_LARGEST_POWER = 126              # 2 ** -126 and 2 ** 126 are normal in every float type


def canonicalize(graph: Graph) -> Graph:
    """One sweep of the table. Assumes a checked graph; keeps bits."""
    return rewrite(graph, CANONICAL)


# --- constants

def _fold(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """An exactly rounded op of literals is the literal that the op's reference computes."""
    literals = [b.match(v, "constant") for v in inputs]
    if not literals or None in literals:
        return None
    arrays = [np.asarray(n.attrs["value"], n.attrs["dtype"].numpy) for n in literals if n is not None]
    dtype = node.types[0].dtype
    if node.op == "cast" and dtype.is_integer and not _fits(arrays[0], dtype):
        return None                                           # what it becomes is the target's business
    reference = OPS[node.op].reference
    assert reference is not None
    with np.errstate(all="ignore"):
        (value,) = reference(arrays, node.attrs, node.types)
    return b.constant(np.asarray(value).item(), dtype)


def _fits(x: np.ndarray, dtype: DType) -> bool:
    limits = np.iinfo(dtype.numpy)
    return bool(np.isfinite(x)) and limits.min <= int(x) <= limits.max


def _hoist(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """What is computed from stretched operands is computed first and stretched afterwards."""
    views = [b.match(v, "broadcast_to") for v in inputs]
    sources = [view.inputs[0] for view in views if view is not None]
    shapes = {s.shape for s in sources if s.shape}
    if len(sources) < len(inputs) or len(shapes) > 1:
        return None
    shape = shapes.pop() if shapes else ()
    inner = b.node(node.op, [b.broadcast(s, shape) for s in sources], node.attrs).result()
    return b.broadcast(inner, node.types[0].shape)


# --- arithmetic

def _unit_axes(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """Axes of extent 1 (keepdims) are added behind the op, so that it joins the rows that it belongs to."""
    shape = node.types[0].shape
    core = tuple(d for d in shape if d != 1)
    plain: list[Value] = []
    added = 0
    for v in inputs:
        view, number = b.match(v, "reshape"), b.match(v, "broadcast_to")
        if view is not None and view.inputs[0].shape == core:
            plain.append(view.inputs[0])
            added += 1
        elif number is not None and number.inputs[0].shape == ():
            plain.append(b.broadcast(number.inputs[0], core))
        else:
            return None
    if not added or len(core) == len(shape):
        return None
    return b.reshape(b.node(node.op, plain, node.attrs).result(), shape=shape)


def _mul(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    for x, factor in (inputs, inputs[::-1]):
        if b.is_constant(factor, 1):
            return x
        if b.is_constant(factor, -1):
            return b.neg(x)
        negated, number = b.match(x, "neg"), b.constant_of(factor)
        if negated is not None and number is not None and factor.dtype.is_float:
            return b.mul(negated.inputs[0], -number)
    return _both_negated(b, node, inputs)


def _both_negated(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    x, y = (b.match(v, "neg") for v in inputs)
    if x is None or y is None:
        return None
    return b.node(node.op, (x.inputs[0], y.inputs[0])).result()


def _div(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    x, by = inputs
    if b.is_constant(by, 1):
        return x
    number = b.constant_of(by)
    if number is not None and math.isfinite(number) and number:
        fraction, exponent = math.frexp(number)
        if abs(fraction) == 0.5 and abs(exponent - 1) <= _LARGEST_POWER:
            return b.mul(x, 1 / number)                       # exact: both are the quotient rounded once
    return _both_negated(b, node, inputs)


def _add(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    nothing = -0.0 if node.types[0].dtype.is_float else 0     # 0.0 + -0.0 is 0.0: only -0.0 is neutral
    for x, y in (inputs, inputs[::-1]):
        if b.is_constant(y, nothing):
            return x
        negated = b.match(y, "neg")
        if negated is not None:
            return b.sub(x, negated.inputs[0])
    return None


def _sub(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    x, y = inputs
    if b.is_constant(y, 0.0 if y.dtype.is_float else 0):
        return x
    if b.is_constant(x, -0.0 if x.dtype.is_float else 0):
        return b.neg(y)
    negated = b.match(y, "neg")
    return None if negated is None else b.add(x, negated.inputs[0])


def _pow(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    return inputs[0] if b.is_constant(inputs[1], 1.0) else None


def _undo(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """neg of neg, not of not."""
    inner = b.match(inputs[0], node.op)
    return None if inner is None else inner.inputs[0]


def _logic(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    neutral = node.op == "logical_and"
    for x, y in (inputs, inputs[::-1]):
        found = b.constant_of(y)
        if found is not None:
            return x if found is neutral else y
    return inputs[0] if inputs[0] == inputs[1] else None


def _where(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    condition, x, y = inputs
    known = b.constant_of(condition)
    if known is not None:
        return x if known else y
    if x == y:
        return x
    inverted = b.match(condition, "logical_not")
    return None if inverted is None else b.where(inverted.inputs[0], y, x)


def _cast(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    if inputs[0].dtype == node.types[0].dtype:
        return inputs[0]
    inner = b.match(inputs[0], "cast")
    if inner is None or not np.can_cast(inner.inputs[0].dtype.numpy, inner.types[0].dtype.numpy, "safe"):
        return None
    source, between = inner.inputs[0].dtype, inner.types[0].dtype
    if passes_float32(source, node.types[0].dtype):
        return None
    if source.kind in "iu" and between.is_float and source.bytes >= between.bytes:
        return None                                           # NumPy calls int64 to float64 safe
    return b.cast(inner.inputs[0], dtype=node.types[0].dtype)


# --- views

def _same_type(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """A broadcast or reshape to the shape that is there already."""
    return inputs[0] if inputs[0].shape == node.types[0].shape else None


def _splat(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """A view of one number stretched is that number stretched to the view's shape."""
    view = b.match(inputs[0], "broadcast_to")
    if view is None or view.inputs[0].shape:
        return None
    return b.broadcast(view.inputs[0], node.types[0].shape)


def _broadcast(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    inner = b.match(inputs[0], "broadcast_to", "reshape")
    if inner is None:
        return None
    before, after = inner.inputs[0].shape, inner.types[0].shape
    new = len(after) - len(before)
    if inner.op == "reshape" and (new < 1 or after[:new] != (1,) * new or after[new:] != before):
        return None               # only a reshape that adds leading axes is no work
    return b.broadcast(inner.inputs[0], node.types[0].shape)


def _reshape(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    inner = b.match(inputs[0], "reshape")
    return None if inner is None else b.reshape(inner.inputs[0], shape=node.types[0].shape)


def _transpose(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    perm = node.attrs["perm"]
    if perm == tuple(range(len(perm))):
        return inputs[0]
    inner = b.match(inputs[0], "transpose")
    if inner is not None:
        return b.transpose(inner.inputs[0], perm=tuple(inner.attrs["perm"][i] for i in perm))
    moved = [axis for axis in perm if inputs[0].shape[axis] != 1]
    return b.reshape(inputs[0], shape=node.types[0].shape) if moved == sorted(moved) else None


def _slice(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    return inputs[0] if node.types == (inputs[0].type,) and set(node.attrs["steps"]) <= {1} else None


def _pad(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    sizes = (*node.attrs["low"], *node.attrs["high"], *node.attrs["interior"])
    return inputs[0] if all(size == 0 for size in sizes) else None


def _flip(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    if all(inputs[0].shape[axis] == 1 for axis in node.attrs["axes"]):
        return inputs[0]
    inner = b.match(inputs[0], "flip")
    if inner is None or set(inner.attrs["axes"]) != set(node.attrs["axes"]):
        return None
    return inner.inputs[0]


def _concatenate(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """One part alone is the whole; parts without elements are left out."""
    axis = node.attrs["axis"]
    parts = [v for v in inputs if v.shape[axis] != 0] or [inputs[0]]
    if len(parts) == 1:
        return parts[0]
    return None if len(parts) == len(inputs) else b.concatenate(*parts, axis=axis)


# --- reductions and indexing

def _reduce(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """Over no axes or axes of extent 1. A float sum is left: it may turn -0.0 into 0.0."""
    if any(inputs[0].shape[axis] != 1 for axis in node.attrs["axes"]):
        return None
    if node.op == "reduce_sum" and inputs[0].dtype.is_float:
        return None
    return b.reshape(inputs[0], shape=node.types[0].shape)


_REDUCTIONS = ("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_any", "reduce_all")

CANONICAL: tuple[Rule, ...] = (*(Rule("fold literals", op, _fold) for op in _ELEMENTWISE
                                 if op not in APPROXIMATE), *(Rule("compute before stretching", op, _hoist)
                                                              for op in _ELEMENTWISE),
                               *(Rule("axes of extent 1 last", op, _unit_axes) for op in _ELEMENTWISE),
                               Rule("x * 1, x * -1, -x * c, -x * -y", "mul", _mul),
                               Rule("x / 1, x / 2**k, -x / -y", "div", _div),
                               Rule("x + nothing, x + -y", "add", _add),
                               Rule("x - 0, nothing - x, x - -y", "sub", _sub), Rule("x ** 1", "pow", _pow),
                               Rule("-(-x)", "neg", _undo), Rule("not not x", "logical_not", _undo),
                               Rule("x and known", "logical_and", _logic),
                               Rule("x or known", "logical_or", _logic),
                               Rule("where known or equal", "where", _where),
                               Rule("cast to the same, cast after a lossless cast", "cast", _cast),
                               Rule("broadcast to its own shape", "broadcast_to", _same_type),
                               Rule("reshape to its own shape", "reshape", _same_type),
                               *(Rule("view of one number", op, _splat) for op in _VIEWS),
                               Rule("broadcast of broadcast", "broadcast_to", _broadcast),
                               Rule("reshape of reshape", "reshape", _reshape),
                               Rule("transpose of transpose, of axes of extent 1", "transpose", _transpose),
                               Rule("whole slice", "slice", _slice), Rule("empty padding", "pad", _pad),
                               Rule("flip of flip, of axes of extent 1", "flip", _flip),
                               Rule("concatenate one part", "concatenate", _concatenate),
                               *(Rule("reduce over no axes or axes of extent 1", op, _reduce)
                                 for op in _REDUCTIONS))
"""The table, in the order in which an op's rows are tried."""
