"""Products with one-hot rows: picking rows of a matrix, and adding rows up by their index.

A row that is 1 at its index and 0 elsewhere, times W, is the row of W with that index, or zeros for an index
outside: no product is needed. Its transpose times y adds the rows of y with the same index. Of a W with an
infinity or a NaN, the product would make NaN of every row; these read the rows that are meant and no other.
"""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule
from graphflow.compiler.plan.dtypes import I64


def _picked_rows(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """one_hot(i) W = the rows i of W."""
    x, w = inputs
    if x.type.rank != 2 or node.attrs["transpose_x"] or node.attrs["transpose_y"]:
        return None
    indices, size = _indices(b, x), x.shape[1]
    if indices is None or not isinstance(size, int):
        return None
    inside = _inside(b, indices, size)
    rows = b.gather(w, b.where(inside, indices, b.zeros(indices.type)), axis=0)
    mask = b.broadcast_to(b.reshape(inside, shape=(*indices.shape, 1)), shape=rows.shape)
    return b.where(mask, rows, b.zeros(rows.type))


def _added_rows(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """one_hot(i)' y: row k is the sum of the rows of y whose index is k. What has an index outside goes into
    one row more, which is cut off."""
    x, y = inputs
    if x.type.rank != 2 or not node.attrs["transpose_x"] or node.attrs["transpose_y"] or y.dtype.is_half:
        return None
    indices, size, columns = _indices(b, x), x.shape[1], y.shape[1]
    if indices is None or not isinstance(size, int):
        return None
    last = b.constant(size, I64, indices.shape)
    sums = b.scatter_add(b.where(_inside(b, indices, size), indices, last), y, axis=0, size=size + 1)
    return b.slice(sums, starts=(0, 0), stops=(size, columns), steps=(1, 1))


def _inside(b: RewriteBuilder, indices: Value, size: int) -> Value:
    return b.logical_and(b.ge(indices, 0), b.lt(indices, size))


def _indices(b: RewriteBuilder, x: Value) -> Value | None:
    """The indices [rows] of int64 where x [rows, size] is 1 at them and 0 elsewhere; None if it is not, or
    where the size is no number."""
    rows, size = x.shape
    at = x
    while (view := b.match(at, "cast", "reshape")) is not None and view.inputs[0].shape[-1:] == (size,):
        at = view.inputs[0]
    equal = b.match(at, "eq")
    if equal is None or not isinstance(size, int) or size < 2:
        return None
    for picked, line in (equal.inputs, equal.inputs[::-1]):
        stretched = b.match(picked, "broadcast_to")
        if stretched is None or not _counts(b, line) or not picked.dtype.is_integer:
            continue
        indices = stretched.inputs[0]
        if indices.type.rank == picked.type.rank and indices.shape == (*picked.shape[:-1], 1):
            return b.cast(b.reshape(indices, shape=(rows,)), dtype=I64)
    return None


def _counts(b: RewriteBuilder, line: Value) -> bool:
    """Whether the value is 0, 1, 2, … along its last axis."""
    view = b.match(line, "broadcast_to")
    source = line if view is None else view.inputs[0]
    iota = b.match(source, "iota")
    last = source.type.rank - 1
    return iota is not None and iota.attrs["axis"] == last and source.shape[last] == line.shape[-1]


ONE_HOT: tuple[Rule, ...] = (Rule("one-hot rows times a matrix", "matmul", _picked_rows, "tolerance"),
                             Rule("transposed one-hot rows times a matrix", "matmul", _added_rows,
                                  "tolerance"))
"""Rows of the joint table."""
