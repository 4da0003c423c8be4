"""The joint stage: rewrites over forward and backward together, once autodiff has put them into one graph.

The canonical table runs again, for gradients come out in pieces. What was there for autodiff alone goes:
nothing is differentiated any more, so `stop_gradient` means nothing. Rows that may round differently are
listed as such. """
from __future__ import annotations

import math
from collections.abc import Sequence

from graphflow.compiler.ir.graph import Graph, Node, Value, walk
from graphflow.compiler.passes.canonical import CANONICAL
from graphflow.compiler.passes.centred import CENTRED
from graphflow.compiler.passes.convolutions import CONVOLUTIONS
from graphflow.compiler.passes.fourier import FOURIER
from graphflow.compiler.passes.one_hot import ONE_HOT
from graphflow.compiler.passes.parts import PARTS
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule, rewrite
from graphflow.compiler.passes.scan_hoist import hoist
from graphflow.compiler.passes.scan_merge import tidy_scans
from graphflow.compiler.passes.scan_slices import join_stacks
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.dtypes import DType

_EXACT = {4: 1 << 24, 8: 1 << 53}
"""By the bytes of a float type: below this every integer is one of its numbers."""


def optimize_jointly(graph: Graph) -> Graph:
    """One sweep of the table together with the canonical one; where there are loops, what can leave their
    bodies does, and the table comes again. Assumes that no `grad` node is left."""
    graph = rewrite(graph, JOINT)
    if not any(node.op == "scan" for node in walk(graph.nodes())):
        return graph
    return rewrite(join_stacks(tidy_scans(hoist(graph))), JOINT)


def _pass_through(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    return inputs[0]


def _sum_of_stretched(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """The sum over an axis along which x was stretched n-fold is x * n, rounded once instead of n times."""
    view, axes = b.match(inputs[0], "broadcast_to"), node.attrs["axes"]
    if view is None or not node.types[0].dtype.is_float:
        return None
    x, shape = view.inputs[0], inputs[0].shape
    new = len(shape) - x.type.rank
    stretched = {a for a in range(len(shape)) if a < new or x.shape[a - new] == 1}
    count = product(shape[a] for a in axes if a in stretched)
    if not axes or not isinstance(count, int) or not 0 < count < _EXACT[x.dtype.bytes]:
        return None
    if not set(axes) <= stretched:
        return None
    kept = [a for a in range(new, len(shape)) if a not in axes]
    x = b.reshape(x, shape=tuple(x.shape[a - new] for a in kept))
    return b.broadcast(b.mul(x, count), node.types[0].shape)


def _sum_of_number(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """The same for a literal of which every partial sum is exact, so that the order does not count."""
    number = b.constant_of(inputs[0])
    if not isinstance(number, float) or not _sums_exactly(number, inputs[0], node):
        return None
    return _sum_of_stretched(b, node, inputs)


def _sums_exactly(number: float, x: Value, node: Node) -> bool:
    count = product(x.shape[a] for a in node.attrs["axes"])
    if not math.isfinite(number) or not number or not isinstance(count, int):
        return False
    numerator, _ = abs(number).as_integer_ratio()             # the divisor is a power of 2
    odd = numerator // (numerator & -numerator)
    return odd * count < _EXACT[x.dtype.bytes] and _is_moderate(number, x.dtype)


def _is_moderate(number: float, dtype: DType) -> bool:
    return 1e-30 < abs(number) < (1e30 if dtype.bytes == 4 else 1e290)


def _matmul_of_transposed(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """A matmul reads its operands either way round: the transposition becomes a flag."""
    attrs, operands = dict(node.attrs), list(inputs)
    for i, flag in enumerate(("transpose_x", "transpose_y")):
        view = b.match(operands[i], "transpose")
        if view is not None and _swaps_last(view):
            operands[i], attrs[flag] = view.inputs[0], not attrs[flag]
    return None if operands == list(inputs) else b.matmul(*operands, **attrs)


def _transposed_matmul(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """(x y)' = y' x'."""
    inner = b.match(inputs[0], "matmul")
    if inner is None or not _swaps_last(node):
        return None
    (x, y), attrs = inner.inputs, inner.attrs
    return b.matmul(y, x, transpose_x=not attrs["transpose_y"], transpose_y=not attrs["transpose_x"])


def _swaps_last(view: Node) -> bool:
    perm = view.attrs["perm"]
    rank = len(perm)
    return perm == (*range(rank - 2), rank - 1, rank - 2)


JOINT: tuple[Rule, ...] = (Rule("stop_gradient", "stop_gradient", _pass_through),
                           Rule("sum of a stretched number", "reduce_sum", _sum_of_number),
                           Rule("sum of a stretched value", "reduce_sum", _sum_of_stretched, "tolerance"),
                           Rule("matmul of a transposed", "matmul", _matmul_of_transposed, "tolerance"),
                           Rule("transposed matmul", "transpose", _transposed_matmul, "tolerance"), *CENTRED,
                           *ONE_HOT, *FOURIER, *CONVOLUTIONS, *PARTS, *CANONICAL)
"""The table. Stated cost: elements computed, then ops, then transpositions."""
