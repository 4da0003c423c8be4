"""Contractions of which a task is one row (see `kernel/rows.py`), with panels that an array holds.

Whoever runs tasks [begin, end) multiplies these rows with one panel after the other, in as few tiles of at
most `mr` rows as there can be, of about one size, which has a micro-kernel of its own. The sums of a block of
rows wait in scratch until those of all column groups are there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from graphflow.compiler.emit.builder import I64, Module, Type, Value, constant
from graphflow.compiler.emit.contraction import PANEL, ZERO, DirectContraction
from graphflow.compiler.emit.packing import COLUMN, ROW, pack_a
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.tiling import Tiling, contraction_tiling, whole_lines
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan.dims import DimLike, symbol
from graphflow.compiler.target import Target

BLOCK = 32
"""The rows of a block, about."""


class RowTiling(NamedTuple):
    """The tiling, with as many tiles as a block of rows has, and the bytes of an element."""

    tiling: Tiling
    bytes: int


def row_contraction(kernel: ContractionKernel, target: Target) -> RowTiling | None:
    """How a contraction is computed of which a task is one row; None for others."""
    if not kernel.rows:
        return None
    t = contraction_tiling(replace(kernel, contraction=replace(kernel.contraction, tile={})), target)
    assert t.b == "packed" and not t.blocks
    return RowTiling(replace(t, tiles=max(1, BLOCK // t.mr)), kernel.contraction.a.dtype.bytes)


def row_tasks(how: RowTiling) -> DimLike:
    """One for each row."""
    return how.tiling.m_total


def row_scratch(how: RowTiling) -> DimLike:
    """Bytes of scratch that each worker needs."""
    return sum(_parts(how))


def _parts(how: RowTiling) -> tuple[int, int]:
    """Bytes of a worker's packed a and of its sums."""
    t = how.tiling
    rows = t.mr * t.tiles
    packed = rows * t.panel_rows * how.bytes if t.pack_a else 0
    return whole_lines(packed), whole_lines(t.group_count * rows * t.nr * how.bytes)


def emit_row_contraction(module: Module, kernel: ContractionKernel, target: Target, how: RowTiling) -> None:
    """Adds the kernel's function to the module."""
    _RowContraction(module, kernel, target, how).emit()


class _RowContraction(DirectContraction):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, how: RowTiling):
        super().__init__(module, kernel, target)
        self.t = how.tiling
        self.block_rows = self.t.mr * self.t.tiles
        self.packed_bytes = _parts(how)[0]

    def emit(self) -> None:
        e, b, t = self.e, self.b, self.t
        _, begin, end, _ = b.params
        own = self._own_scratch()
        self._place("packed ", own, (self.block_rows, t.panel_rows))
        sums = b.gep(own, self.packed_bytes, Type("i8"))
        self._place("sums ", sums, (t.group_count * self.block_rows, t.nr))
        rows = b.sub(end, begin)
        blocks = b.udiv(b.add(rows, self.block_rows - 1), constant(I64, self.block_rows))
        step = b.udiv(b.add(rows, b.sub(blocks, 1)), b.intrinsic("smax", blocks, 1))
        with self._range(ZERO, self._k_limit()), e.scopes.loop("block ", ZERO, blocks) as block:
            block.next()
            first = b.add(begin, b.mul(block.index, step))
            count = b.intrinsic("smin", b.sub(end, first), step)
            if t.pack_a:
                self._pack_rows(first, count)
            with e.scopes.loop(PANEL, ZERO, e.scalar(t.panels)) as panel:
                panel.next()
                column, total = b.mul(panel.index, t.nr), e.scalar(t.n_total)
                whole = isinstance(t.n_total, int) and t.n_total % t.nr == 0
                mask = None if whole or t.nr == 1 else b.first_lanes(b.sub(total, column), t.nr)
                with e.scopes.block(COLUMN, column, Lane(COLUMN, t.nr, mask, t.nr)):
                    e.bounds[COLUMN] = (0, t.n_total - 1 if isinstance(t.n_total, int) else None)
                    self._block(first, count)
        b.ret()

    def _pack_rows(self, first: Value, count: Value) -> None:
        """Evaluates a for the rows of the block."""
        e, b, t = self.e, self.b, self.t
        tiles = b.udiv(b.add(count, t.mr - 1), constant(I64, t.mr))
        with e.scopes.loop("tile", ZERO, tiles) as tile:
            tile.next()
            e.scopes.bind(ROW, b.add(first, b.mul(tile.index, t.mr)))
            pack_a(e, lambda row: self._at_row(self.a, row, ""), symbol("tile"), self._k_loops(), t)

    def _block(self, first: Value, count: Value) -> None:
        """A block of rows times the panel, then what is stored."""
        e, b, t = self.e, self.b, self.t
        tiles = b.udiv(b.add(count, t.mr - 1), constant(I64, t.mr))
        each = b.udiv(count, tiles)
        longer, last = b.sub(count, b.mul(each, tiles)), b.sub(b.add(first, count), 1)
        e.bounds.update({ROW: (0, None), "rows done": (0, self.block_rows - 1)})
        with self._groups(), e.scopes.loop("tile", ZERO, tiles) as tile:
            tile.next()
            size = b.add(each, b.cast(b.compare("lt", tile.index, longer), I64))
            done = b.add(b.mul(tile.index, each), b.intrinsic("smin", tile.index, longer))
            e.scopes.bind("rows done", done)
            e.scopes.bind(ROW, b.add(first, done))
            fewer = 0
            for rows in sorted({max(t.mr // 4, 1), *range(max(t.mr // 2, 1), t.mr + 1)}):
                fits = b.and_(b.compare("gt", size, fewer), b.compare("le", size, rows))
                with e.scopes.loop(f"tile of {rows}", ZERO, b.cast(fits, I64)) as once:
                    once.next()
                    self._rows(self._numbers(rows, rows == fewer + 1, last), symbol("rows done"))
                fewer = rows
        e.bounds["r"] = (0, self.block_rows - 1)
        with e.scopes.loop("r", ZERO, count) as row:
            row.next()
            sums = [self._load_sum(symbol("r") + group * self.block_rows) for group in range(t.group_count)]
            self._store_row(b.add(first, row.index), sums)

    def _numbers(self, count: int, whole: bool, last: Value) -> list[DimLike]:
        """The rows of a tile; where it may be less than `whole`, the last one again and again."""
        e, b = self.e, self.b
        if whole:
            return [symbol(ROW) + r for r in range(count)]
        for r in range(count):
            e.scopes.bind(f"row {r}", b.intrinsic("smin", b.add(e.scopes.bound(ROW), r), last))
            e.bounds[f"row {r}"] = (0, None)
        return [symbol(f"row {r}") for r in range(count)]

    def _rows(self, numbers: list[DimLike], at: DimLike) -> None:
        """The products of these rows with the panel of the group at hand; `at`: where in the block they
        are."""
        e, b, t = self.e, self.b, self.t
        if t.pack_a:
            index = [(at + r, symbol("k flat")) for r in range(len(numbers))]
            rows = [e.nodes.make("load", ("packed ", i, 0), (), self.dtype, i) for i in index]
        else:
            rows = [self._at_row(self.a, number, f".{r}") for r, number in enumerate(numbers)]
        loops, flat = self._merged(rows)
        if t.pack_a:
            rows = [e.nodes.substitute(x, {"k flat": flat}) for x in rows]
        zero = constant(self.type.vector(t.nr), 0)
        group = symbol(t.groups[0][0]) * self.block_rows if t.groups else 0
        for r, total in enumerate(self._accumulate(loops, flat, rows, [zero] * len(rows))):
            b.store(total, e.address("sums ", (group + at + r) * t.nr), align=self._align())

    def _load_sum(self, row: DimLike) -> Value:
        t = self.t
        return self.b.load(self.type.vector(t.nr), self.e.address("sums ", row * t.nr), align=self._align())


