"""Row kernels in phases: what one kernel computes for each row, cut into pieces that threads share.

A row is cut along one axis. One kernel leaves the partial results of each piece, a second combines them in a
fixed order; reductions that need the results of others follow in the same way, then the elements that need
all of them. That is how few long rows are computed, and the rows of channels-last images: these lie across
memory, so they are walked side by side, and there are too few vectors of them for threads to share.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from graphflow.compiler.ir.graph import Node, TensorType, Value
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import Argument, Expr, Guard, Kernel, Load, Reduce, Statement, Store
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.evaluate import Evaluator, OpPoint, Scope
from graphflow.compiler.passes.kernels import (
    PIECE,
    Formals,
    axes_of,
    domain_layout,
    evaluator,
    finish,
    nest,
    row_shape,
)
from graphflow.compiler.plan.dims import DimLike, ceildiv, symbol, typical
from graphflow.compiler.plan.dtypes import DType

IDENTITY = {"sum": 0, "prod": 1, "any": False, "all": True}
WHOLE = -1
"""The `split` of rows that are not cut: blocks of threads share them, in a kernel for each level of
reductions and one for the elements."""
ENOUGH_PIECES = 8
"""An axis so long is cut, if there is one, rather than the first one."""


class Phases(NamedTuple):
    """Kernels in the order in which they run, and the arrays that some leave for others, by argument."""

    kernels: list[Kernel]
    between: dict[str, TensorType]


def row_phases(name: str, node: Node, f: Formals) -> Phases:
    """The kernels of a row node whose `split` is the length of a piece, or WHOLE."""
    return _Phases(name, node, f).run()


def cut_axis(shape: Sequence[DimLike], axes: Sequence[int]) -> int:
    """Which of the axes that rows run along is cut into pieces."""
    return next((a for a in axes if typical(shape[a]) >= ENOUGH_PIECES), axes[0])


class _Phases:
    """`level`: how many reductions follow each other on the way to a node's value."""

    def __init__(self, name: str, node: Node, f: Formals):
        self.name, self.node, self.f = name, node, f
        self.region = node.regions[0]
        self.shape, self.axes = row_shape(node)
        self.layout = domain_layout(node, self.shape)
        self.axis, self.piece = cut_axis(self.shape, self.axes), node.attrs["split"]
        whole = self.piece == WHOLE
        self.pieces = 1 if whole else ceildiv(self.shape[self.axis], self.piece)
        self.loops, self.index = axes_of("i", self.shape, self.layout)
        self.outer = tuple((n, x) for n, x in self.loops if int(n[1:]) not in self.axes)
        self.at_row = tuple(d for i, d in enumerate(self.index) if i not in self.axes)
        self.rows = tuple(d for i, d in enumerate(self.shape) if i not in self.axes)
        self.level: dict[Node, int] = {}
        for n in self.region.nodes():
            self.level[n] = max((self.level[v.node] for v in n.inputs), default=0) + _is_reduction(n)
        self.between: dict[str, TensorType] = {}
        self.partial: dict[Value, str] = {}
        self.total: dict[Value, str] = {}
        used = {v for n in self.level for v in n.inputs}
        for n in self.level:
            if _is_reduction(n) and not whole:
                self._leave("p", self.partial, n, (self.pieces, *self.rows))
            if self.level[n] and n.result() in used and n.types[0].shape == self.rows and (
                    OPS[n.op].kind in ("reduce", "elementwise")):
                self._leave("t", self.total, n, self.rows)

    def _leave(self, letter: str, where: dict[Value, str], n: Node, shape: tuple[DimLike, ...]) -> None:
        where[n.result()] = name = f"{letter}{len(where)}"
        self.between[name] = TensorType(n.types[0].dtype, shape)

    def run(self) -> Phases:
        """All kernels. They are made from the last one, which shows what those before must leave."""
        deepest = max(self.level.values())
        rank = len(self.at_row)
        of_rows = [j for j, r in enumerate(self.region.results) if r.type.rank == rank]
        left = [j for j, r in enumerate(self.region.results) if r.type.rank != rank]
        depth = {j: self.level[self.region.results[j].node] if self.piece == 1 else deepest for j in left}
        made: list[Kernel] = []
        late = [j for j in left if depth[j] == deepest]
        if late:
            made.append(self._elements(late, deepest))
        written = {self.f.outputs[j] for j in of_rows}
        if any(a.name in written for k in made for a in k.arguments):      # a state that is read until then
            made.append(self._combined(deepest + 1, [], of_rows))
            of_rows = []
        for level in range(deepest, 0, -1):
            asked = {a.name for k in made for a in k.arguments}
            wanted = [v for v, name in self.total.items() if name in asked and self.level[v.node] == level]
            made.insert(0, self._combined(level, wanted, of_rows if level == deepest else []))
            if self.piece != WHOLE:
                made.insert(0, self._partial(level, [j for j in left if depth[j] == level - 1]))
        asked = {a.name for k in made for a in k.arguments}
        return Phases(made, {name: t for name, t in self.between.items() if name in asked})

    def _evaluator(self, level: int, at_row: tuple[DimLike, ...]) -> Evaluator:
        """An evaluator to which values of rows below that level are known."""
        e = evaluator(self.node, self.f)
        self._know(e, level, at_row)
        return e

    def _know(self, e: Evaluator, level: int, at_row: tuple[DimLike, ...]) -> None:
        for v, name in self.total.items():
            if self.level[v.node] < level:
                e.preset(v, at_row, Load(name, at_row, v.dtype))

    def _finished(self, name: str, e: Evaluator, writes: Sequence[str],
                  body: tuple[Statement, ...]) -> Kernel:
        more = [Argument(n, t.dtype, t.shape, "w" if n in writes else "r") for n, t in self.between.items()]
        kernel = finish(name, e, [*self.f.arguments, *more], body)
        stored = {s.arg for s in walk.stores(kernel)}
        arguments = (a if a.name in stored else replace(a, mode="r") for a in kernel.arguments)
        return replace(kernel, arguments=tuple(arguments))

    def _partial(self, level: int, elements: list[int]) -> Kernel:
        """The reductions of one level, of each piece; and elements that need none of them."""
        e = self._evaluator(level, self.at_row)
        cut = (PIECE, self.pieces)
        e.declare((*self.outer, cut))
        own = [n for n in self.level if _is_reduction(n) and self.level[n] == level]
        found = [e.bind(self._piece(e, n)) for n in own]        # neighbours run in one loop
        stores = [Store(self.partial[n.result()], (symbol(PIECE), *self.at_row), x)
                  for n, x in zip(own, found)]
        body: tuple[Statement, ...] = (*e.scopes[0].lets, *stores)
        writes = [s.arg for s in stores]
        if not elements:
            return self._finished(f"{self.name}_partial", e, writes, nest((cut, *self.outer), body, "grid"))
        body = nest(self.outer, body, "serial")
        loops, index = axes_of("j", self.shape, self.layout)
        index = tuple(symbol(PIECE) if i == self.axis else d for i, d in enumerate(index))
        loops = tuple(x for x in loops if x[0] != f"j{self.axis}")
        e.scopes[0] = Scope()
        e.declare(loops)
        self._know(e, level, tuple(d for i, d in enumerate(index) if i not in self.axes))
        each = [self.f.store(j, index, e.value(self.region.results[j], index)) for j in elements]
        body += nest(loops, (*e.scopes[0].lets, *each), "serial")
        return self._finished(f"{self.name}_partial", e, writes, nest((cut,), body, "grid"))

    def _piece(self, e: Evaluator, n: Node) -> Expr:
        """The reduction over one piece; elements past the end count as the identity."""
        kind = n.op.removeprefix("reduce_")
        point = OpPoint(e, n)
        order = [int(name[1:]) for name, _ in axes_of("i", (2,) * len(self.shape), self.layout)[0]]
        axes = [a for a in order if a in self.axes]
        axes = [a for a in axes if a != self.axis or self.piece > 1]
        loops = point.loops(*(self.piece if a == self.axis else self.shape[a] for a in axes))
        at = dict(zip(axes, (symbol(v) for v, _ in loops)))
        at[self.axis] = symbol(PIECE) * self.piece + at.get(self.axis, 0)
        index = [at.get(i, d) for i, d in enumerate(self.index)]
        fill = IDENTITY[kind] if kind in IDENTITY else _worst(kind, n.inputs[0].dtype)
        guards = (Guard(at[self.axis], self.shape[self.axis]),) if self.piece > 1 else ()
        return point.reduce(kind, loops, point.operand(0, index, guards, fill))

    def _combined(self, level: int, wanted: list[Value], results: list[int]) -> Kernel:
        """The reductions of one level, from those of the pieces if there are any, and values of rows that
        follow."""
        e = self._evaluator(level, self.at_row)
        e.declare((*self.outer, (PIECE, self.pieces)))
        for v, name in self.partial.items():
            if self.level[v.node] == level:
                var = f"s{name[1:]}"
                load = Load(name, (symbol(var), *self.at_row), v.dtype)
                total = Reduce(v.node.op.removeprefix("reduce_"), ((var, self.pieces),), (load,))
                e.preset(v, self.at_row, e.bind(total))
        stores = [Store(self.total[v], self.at_row, e.value(v, self.at_row)) for v in wanted]
        ends = [self.f.store(j, self.at_row, e.value(self.region.results[j], self.at_row)) for j in results]
        body = nest(self.outer, (*e.scopes[0].lets, *stores, *ends), "grid")
        return self._finished(self.name, e, [s.arg for s in stores], body)

    def _elements(self, results: list[int], deepest: int) -> Kernel:
        """Results of every element, of which the reductions are known."""
        e = self._evaluator(deepest + 1, self.at_row)
        e.declare(self.loops)
        each = [self.f.store(j, self.index, e.value(self.region.results[j], self.index)) for j in results]
        return self._finished(self.name, e, [], nest(self.loops, (*e.scopes[0].lets, *each), "grid"))


def _is_reduction(n: Node) -> bool:
    return OPS[n.op].kind == "reduce"


def _worst(kind: str, dtype: DType) -> float | int | bool:
    if dtype.is_float:
        return float("-inf") if kind == "max" else float("inf")
    limits = np.iinfo(dtype.numpy)
    return int(limits.min if kind == "max" else limits.max)
