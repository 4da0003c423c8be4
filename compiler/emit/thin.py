"""Products of a few rows and a matrix that is larger than the second cache: it comes from memory, once, in
the order in which it lies there.

A batch of examples times the weights of a layer is such a product, and how many rows there are is often known
only when the program runs: so the kernel's function calls one that works panel by panel (`contraction`) if
there are many rows, and else one of its own. That walks along n with a few rows of b at a time, as many as
memory delivers side by side, and adds their products to sums that wait in the second cache for all columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from graphflow.compiler.emit.builder import I64, VOID, Module, Value, constant
from graphflow.compiler.emit.contraction import PANEL, ZERO, DirectContraction
from graphflow.compiler.emit.loops import start_function
from graphflow.compiler.emit.operands import algorithm_asked, coefficient, load_offset
from graphflow.compiler.emit.packing import COLUMN, FROM, pack_a
from graphflow.compiler.emit.tiling import (
    Tiling,
    contraction_scratch,
    contraction_tasks,
    contraction_tiling,
    whole_lines,
)
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan.dims import DimLike, symbol
from graphflow.compiler.target import Target

THIN = 6
"""The number of this algorithm."""
_ROWS = 64
"""So many rows at most."""
_STREAMS, _AHEAD = 12, 2
"""Rows of b that are read side by side, and how many panels before they are used they are asked for."""
_RUN = 512
"""Columns of b at least: shorter runs memory does not deliver fast."""


@dataclass(frozen=True)
class Thin:
    """How a product is computed so. `panels`: the tiling for many rows, `tiling`: that for few; `most`: for
    how many panels sums have room; `tasks` and `scratch`: of the kernel; `bytes`: of an element."""

    panels: Tiling
    tiling: Tiling
    most: int
    tasks: DimLike
    scratch: int
    bytes: int


def thin(kernel: ContractionKernel, target: Target) -> Thin | None:
    """How the kernel is computed so; None where it is no product with a plain matrix, or its rows are many
    for certain, or the matrix is too small."""
    c, asked = kernel.contraction, algorithm_asked(kernel)
    if asked not in (None, THIN) or c.batch or c.groups or kernel.indirect or len(c.k) != 1 or len(c.n) != 1:
        return None
    if any(name in c.tile for name in ("mr", "nr", "kc")):
        return None
    plain = replace(kernel, contraction=replace(c, tile={}))
    t, offset = contraction_tiling(plain, target), load_offset(kernel, c.b)
    depth, columns = c.k[0][1], c.n[0][1]
    if offset is None or coefficient(offset, c.n[0][0]) != 1 or coefficient(offset, c.k[0][0]) is None:
        return None
    if not isinstance(depth, int) or not isinstance(columns, int) or t.fixed_m > _ROWS or t.nr < t.lanes:
        return None
    size, rooms = c.a.dtype.bytes, contraction_scratch(plain, target)
    pays = columns >= _RUN and depth * columns * size > target.l2 and not t.single
    if not (asked or pays) or not depth or not isinstance(rooms, int):
        return None
    few = replace(t, tiles=-(-_ROWS // t.mr), outer=(), chunk=min(_STREAMS, depth), inner=c.k,
                  panel_rows=min(_STREAMS, depth), b="inline", pack_a=True, limit=None)
    rows = few.tiles * few.mr
    most = max(1, target.l2 // 2 // (rows * t.nr * size))
    own = whole_lines(rows * few.panel_rows * size) + rows * most * t.nr * size
    return Thin(t, few, most, contraction_tasks(plain, target), max(whole_lines(own), rooms), size)


def thin_tasks(how: Thin) -> DimLike:
    """The number of tasks: those of the tiling for many rows."""
    return how.tasks


def thin_scratch(how: Thin) -> DimLike:
    """Bytes of scratch for each worker."""
    return how.scratch


def emit_thin(module: Module, kernel: ContractionKernel, target: Target, how: Thin) -> None:
    """Adds the kernel's function and the two that it calls to the module."""
    many, few = (replace(kernel, name=f"{kernel.name}.{suffix}") for suffix in ("many", "few"))
    e = start_function(module, kernel, target)
    b = e.b
    wanted = b.compare("le", e.scalar(how.tiling.m_total), _ROWS)
    with b.when(wanted):
        b.call(few.name, VOID, b.params, declare=False)
    with b.when(b.xor(wanted, True)):
        b.call(many.name, VOID, b.params, declare=False)
    b.ret()
    tile = {"algorithm": 0}
    DirectContraction(module, replace(many, contraction=replace(many.contraction, tile=tile)), target).emit()
    _Thin(module, few, target, how).emit()


class _Thin(DirectContraction):
    """The function for few rows. Tasks [begin, end) of the tiling for many are, with all their rows, a range
    of panels."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, how: Thin):
        super().__init__(module, kernel, target)
        self.how, self.t, self.ask_every = how, how.tiling, 1

    def emit(self) -> None:
        e, b, t, how = self.e, self.b, self.t, self.how
        _, begin, end, _ = b.params
        packed = whole_lines(t.tiles * t.mr * t.panel_rows * how.bytes)
        own = self._own_scratch()
        self._place("packed ", own, (t.tiles * t.mr, t.panel_rows))
        self._place("sums ", b.gep(own, packed // how.bytes, self.type), (how.most * t.tiles * t.mr, t.nr))
        blocks = b.intrinsic("smax", e.scalar(how.panels.m_blocks), 1)
        first, last = (b.udiv(b.add(at, b.sub(blocks, 1)), blocks) for at in (begin, end))
        with e.scopes.loop("first panel", first, last, how.most) as part:
            part.next()
            stop = b.intrinsic("smin", b.add(part.index, how.most), last)
            with self._chunks(self._k_limit()) as (fresh, final):
                with self._tiles(ZERO) as tile:
                    pack_a(e, lambda row: self._at_row(self.a, row, ""), tile, self._k_loops(), t)
                with e.scopes.loop(PANEL, part.index, stop) as panel:
                    panel.next()
                    with self._columns(panel.index, t.nr), self._tiles(ZERO) as tile:
                        self._multiply(tile, fresh, final)
        b.ret()

    @contextmanager
    def _packed_a(self, tile: DimLike) -> Iterator[None]:
        yield

    def _sum(self, tile: DimLike, r: DimLike, group: DimLike | None = None) -> Value:
        t = self.t
        row = (symbol(PANEL) - symbol("first panel")) * (t.tiles * t.mr) + tile * t.mr + r
        return self.e.address("sums ", row * t.nr)

    def _ask(self, step: Value) -> None:
        """For what a panel further on will read, by the first tile."""
        e, b, t = self.e, self.b, self.t
        k = b.add(e.scopes.bound(FROM), step)
        e.scopes.bind("asked k", b.and_(k, e.scopes.bound("asking")))
        for part in range(0, t.nr, 64 // self.dtype.bytes):
            at = {self.c.k[0][0]: symbol("asked k"), t.n[0][0]: symbol(COLUMN) + t.nr * _AHEAD + part}
            node = e.nodes.substitute(self.right, at)
            e.prefetch(node.data[0], e.offset(node.data[0], node.data[1]))

    def _prepare_asking(self) -> None:
        e, b = self.e, self.b
        wanted = b.compare("eq", e.scopes.bound("tile row"), 0)
        e.scopes.bind("asking", b.select(wanted, constant(I64, -1), ZERO))
        e.bounds["asked k"] = (0, None)
