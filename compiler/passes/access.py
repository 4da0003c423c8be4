"""Where an op reads its operands: index maps found by running lowerings on symbolic indices.

Views (broadcast, transpose, slice, …) compute nothing, so fusion looks through them: what counts is which
element of the value behind them each element of the reader needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.kernel.form import Const, Expr, Guard
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Pointwise
from graphflow.compiler.plan.dims import DimLike, simplify, symbol
from graphflow.compiler.plan.dtypes import F32, DType


@dataclass(frozen=True)
class Read:
    """`value` is read at `index`, given in the axis symbols of the reader's domain (None: anywhere, perhaps
    often). `injective`: no element is read twice over the whole domain."""

    value: Value
    index: tuple[DimLike, ...] | None
    injective: bool


class Probe:
    """A `Point` that computes nothing and notes which operand is read where."""

    def __init__(self, node: Node):
        self.node = node
        self.reads: list[tuple[int, tuple[DimLike, ...]]] = []
        self._fresh = 0

    def operand(self, i: int, index: Sequence[DimLike], guards: Sequence[Guard] = (), fill: Any = 0) -> Expr:
        """See `Point.operand`."""
        self.reads.append((i, tuple(index)))
        return Const(0, self.node.inputs[i].dtype)

    def const(self, value: Any, dtype: DType) -> Expr:
        """See `Point.const`."""
        return Const(0, dtype)

    def index(self, at: DimLike, dtype: DType) -> Expr:
        """See `Point.index`."""
        return Const(0, dtype)

    def apply(self, function: str, *args: Expr, dtype: DType | None = None) -> Expr:
        """See `Point.apply`."""
        return Const(0, dtype or F32)

    def bind(self, value: Expr) -> Expr:
        """See `Point.bind`."""
        return value

    def indirect(self, value: Expr) -> DimLike:
        """See `Point.indirect`."""
        self._fresh += 1
        return symbol(f"indirect{self._fresh}")

    def loops(self, *extents: DimLike) -> tuple[tuple[str, DimLike], ...]:
        """See `Point.loops`."""
        self._fresh += 1
        return tuple((f"loop{self._fresh}.{i}", e) for i, e in enumerate(extents))

    def reduce(self, kind: str, loops: Sequence[tuple[str, DimLike]], *operands: Expr,
               result: int = 0) -> Expr:
        """See `Point.reduce`."""
        return operands[result]


def axis(i: int) -> DimLike:
    """The symbol of axis `i` of a reader's domain."""
    return symbol(f"i{i}")


def domain(node: Node) -> tuple[DimLike, ...]:
    """The index space in which a node is evaluated: its operand's for a reduction, else its result's."""
    return node.inputs[0].shape if OPS[node.op].kind == "reduce" else node.types[0].shape


def reduced_axes(node: Node) -> tuple[int, ...]:
    """The axes along which a reduction runs."""
    return tuple(node.attrs["axes"]) if "axes" in node.attrs else (node.attrs["axis"],)


def reads(node: Node, free: Callable[[Node], bool]) -> list[Read]:
    """What a node reads, seen through the views for which `free` holds."""
    kind = OPS[node.op].kind
    index = tuple(axis(i) for i in range(len(domain(node))))
    out: list[Read] = []
    if kind in ("elementwise", "reduce"):
        for v in node.inputs:
            out += through(v, index, free)
    elif kind in ("view", "leaf") and has_index_map(node):
        for i, at in view_reads(node, index):
            out += through(node.inputs[i], at, free, OPS[node.op].injective)
    else:
        for v in node.inputs:
            out += through(v, None, free)
    return out


def has_index_map(node: Node) -> bool:
    """False for a reshape whose index map would divide by a symbol: it copies."""
    try:
        view_reads(node, tuple(axis(i) for i in range(node.types[0].rank)))
    except NotImplementedError:
        return False
    return True


def through(value: Value, index: tuple[DimLike, ...] | None, free: Callable[[Node], bool],
            injective: bool = True) -> list[Read]:
    """The reads behind `value` at `index`, looking through free views."""
    if not free(value.node):
        return [Read(value, index, injective and index is not None)]
    out: list[Read] = []
    if index is None:
        for v in value.node.inputs:
            out += through(v, None, free)
        return out
    for i, at in view_reads(value.node, index, value.index):
        out += through(value.node.inputs[i], at, free, injective and OPS[value.node.op].injective)
    return out


def view_reads(
    node: Node, index: tuple[DimLike, ...], result: int = 0
) -> list[tuple[int, tuple[DimLike, ...]]]:
    """(operand, index) pairs that a view reads for its element at `index`, whose symbols range over its
    result's shape."""
    lowering = OPS[node.op].lowering
    assert isinstance(lowering, Pointwise), node.op
    probe = Probe(node)
    lowering.value(probe, index, result)
    extents = {f"i{i}": (0, e - 1) for i, e in enumerate(node.types[result].shape) if isinstance(e, int)
               and e > 0 and index == tuple(axis(j) for j in range(len(index)))}
    return [(i, tuple(simplify(d, extents) for d in at)) for i, at in probe.reads]


def relation(read: Read, shape: Sequence[DimLike]) -> str | tuple[int, ...]:
    """How the elements read relate to a reader with domain `shape`: "identity", a tuple of the axes along
    which one element serves all (a broadcast), "injective" or "other"."""
    if read.index is None:
        return "other"
    source = read.value.shape
    names = [axis(i) for i in range(len(shape))]
    if tuple(read.index) == tuple(names) and tuple(source) == tuple(shape):
        return "identity"
    at = 0
    kept: list[int] = []
    for position, d in enumerate(read.index):
        while at < len(names) and names[at] != d:
            at += 1
        if at == len(names) or source[position] != shape[at]:
            return "injective" if read.injective else "other"
        kept.append(at)
        at += 1
    return tuple(i for i in range(len(shape)) if i not in kept)
