"""Products of large matrices, of which neither operand nor the result stays in the caches by itself.

A function of its own, which runs before, packs all of b as [panel][k][nr]. A task computes `tiles` row tiles
of all columns, and who gets several tasks computes them together, strip by strip: for each block of k it
packs one tile of a after the other and multiplies it with the panels of the strip in turn. So a strip of b
stays in the second cache for all tiles, a tile of a in the first, and rows of the result are read and written
in long runs. They are asked for ahead, as are the next tile of a and the next strip of b where b is large.
A transposed a is packed once for all strips where there are many, and all tiles side by side: what a tile
needs lies a row of memory apart, and where that is a power of two, in the same few places of the caches.
(K. Goto, R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008, has the idea of blocks for
each cache.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil

from graphflow.compiler.emit.builder import I64, Module, Type, Value, constant
from graphflow.compiler.emit.contraction import FRACTION, PANEL, STEP, ZERO, DirectContraction
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.operands import algorithm_asked, arranged, coefficient, load_offset
from graphflow.compiler.emit.packing import (
    COLUMN,
    FROM,
    TO,
    KLoop,
    pack_a,
    pack_b,
    pack_columns,
)
from graphflow.compiler.emit.tiling import LONG_ROW, Tiling, contraction_tiling, cut_k, whole_lines
from graphflow.compiler.kernel.form import Contraction, ContractionKernel
from graphflow.compiler.plan.dims import TYPICAL_SIZE, DimLike, ceildiv, symbol, typical
from graphflow.compiler.target import Target

BLOCKED = 3
"""The number of this algorithm."""
_ROWS, _PANELS = 192, 4
"""It pays for so many rows and panels at least."""
_FEW, _LONG = 8, 256
"""Rows of a tile at most where k is shorter than the last, or the result is larger than the last cache: the
stores of so few proceed beside the sums of the next tile, and memory delivers so many streams fast."""
_STRIPS, _RUN = 3, 8
"""More strips than this are many; for so many k the tiles are packed one after the other."""
_TASK_ROWS, _TASKS, _BLOCK_ROWS = 128, 32, 256
"""Where b is larger than the second cache: rows of a task, about, fewer if that leaves less tasks; and rows
that a worker, which gets several tasks at once, multiplies with a strip before it goes on to the next."""


@dataclass(frozen=True)
class Blocked:
    """How a product is computed so. `tiling`: as for others, with the mode of packing b and all rows of a
    block of k as its panel; `strip`: panels of a strip; `tasks`: so many are computed at once, and if more
    than one then what comes from memory is asked for ahead; `along`: whether vectors of a lie along "m" or
    "k"; `once`: whether the tiles of a are packed before the first strip, for all; `bytes`: of an element."""

    tiling: Tiling
    strip: int
    tasks: int
    along: str
    once: bool
    bytes: int

    @property
    def panels(self) -> int:
        """Panels of b."""
        panels = self.tiling.panels
        assert isinstance(panels, int)
        return panels

    @property
    def depth(self) -> DimLike:
        """Rows of a panel of packed b, those that a transposition may fill included."""
        t, extent = self.tiling, self.tiling.inner[0][1]
        return ceildiv(extent, t.lanes) * t.lanes if t.b == "transpose" else extent

    @property
    def a_width(self) -> int:
        """Elements of a packed tile of a for each k."""
        return 1 << (self.tiling.mr - 1).bit_length() if self.along == "m" else self.tiling.mr

    @property
    def sum_rows(self) -> int:
        """Rows of sums that wait: of all tiles of the tasks computed at once and a strip."""
        t = self.tiling
        return t.mr * (t.tiles * self.tasks * self.strip if t.blocks else 1)

    def parts(self) -> tuple[int, int]:
        """Bytes of a worker's packed a and of its sums."""
        t = self.tiling
        packed = self.a_width * t.panel_rows * self.bytes
        if self.once:
            packed *= t.tiles * self.tasks * len(range(0, int(t.inner[0][1]), t.panel_rows))
        return whole_lines(packed), whole_lines(self.sum_rows * t.nr * self.bytes)

    def shared(self) -> DimLike:
        """Bytes of packed b, a multiple of cache lines."""
        return whole_lines(self.panels * self.tiling.nr * self.bytes) * self.depth


def blocked(kernel: ContractionKernel, target: Target) -> Blocked | None:
    """How the kernel is computed so; None where it is no product of two plain matrices, its tile asks for
    something else, or nothing does and it does not pay."""
    c, asked = arranged(kernel, target), algorithm_asked(kernel)
    direct = any(name in c.tile for name in ("mr", "nr", "kc"))
    if asked not in (None, BLOCKED) or direct or kernel.indirect or c.batch or c.groups:
        return None
    along = _along(kernel, c)
    if not along:
        return None
    plain = replace(kernel, contraction=replace(kernel.contraction, tile={}))
    t = contraction_tiling(plain, target)
    if t.nr < t.lanes or not (asked or _pays(t, c, target)):
        return None
    return _described(kernel, c, t, along, target)


def _along(kernel: ContractionKernel, c: Contraction) -> str:
    """Whether neighbours in a lie along "m" or "k"; "" if a or b is no matrix, transposed or not."""
    a, b = load_offset(kernel, c.a), load_offset(kernel, c.b)
    if a is None or b is None or len(c.k) != 1 or len(c.n) != 1 or not c.m or c.k[0][1] == 0:
        return ""
    k, n = c.k[0][0], c.n[0][0]
    if not isinstance(c.n[0][1], int) or 1 not in (coefficient(b, n), coefficient(b, k)):
        return ""
    if coefficient(a, c.m[-1][0]) == 1:
        return "m" if len(c.m) == 1 and coefficient(a, k) is not None else ""
    return "k" if coefficient(a, k) == 1 else ""


def _pays(t: Tiling, c: Contraction, target: Target) -> bool:
    """Whether a or the result is too large for the second cache, and packed b not for the last. Where each of
    them fits, the stores count little beside long sums, and rows of a lie less than a page apart, tiles that
    read long rows of b where they lie are faster."""
    rows, columns, depth = (typical(d) for d in (t.m_total, t.n_total, c.k[0][1]))
    size = c.a.dtype.bytes
    fits = max(rows * columns, rows * depth, columns * depth) * size <= target.l2
    if fits and _LONG <= depth < target.l1 // (8 * size) and t.nr * size >= LONG_ROW:
        return False
    large = max(rows * columns, rows * depth) * size > target.l2 // 4 and columns * depth * size <= target.l3
    return large and rows >= _ROWS and columns >= _PANELS * t.nr


def _described(kernel: ContractionKernel, c: Contraction, t: Tiling, along: str, target: Target) -> Blocked:
    """A tile of a takes half of the first cache, a strip of b half of the second, or a quarter if the next
    one comes from memory meanwhile."""
    size, extent = c.a.dtype.bytes, c.k[0][1]
    rows, columns, depth = (typical(d) for d in (t.m_total, t.n_total, extent))
    mr = min(t.mr, _FEW) if depth < _LONG or rows * columns * size > target.l3 else t.mr
    deep = min(512, target.l1 // (2 * mr * size)) if isinstance(extent, int) else TYPICAL_SIZE
    _, chunk, _ = cut_k(c.k, deep)
    panel_rows = chunk or depth
    far = columns * depth * size > target.l2
    strip = max(1, target.l2 // (4 if far else 2) // (panel_rows * t.nr * size))
    tiles = max(1, min(_TASK_ROWS // mr, -(-rows // mr) // _TASKS)) if far else 1
    tasks = max(2, _BLOCK_ROWS // (mr * tiles)) if far else 1
    b = load_offset(kernel, c.b)
    assert b is not None
    t = replace(t, mr=mr, tiles=tiles, outer=(), chunk=chunk, inner=c.k, panel_rows=panel_rows, pack_a=True,
                b="lanes" if coefficient(b, c.n[0][0]) == 1 else "transpose", limit=None)
    how = Blocked(t, min(strip, int(ceildiv(t.n_total, t.nr))), tasks, along, False, size)
    if not far or along == "k" or not isinstance(extent, int) or how.panels <= _STRIPS * how.strip:
        return how
    once = replace(how, once=True)
    return once if once.parts()[0] <= target.l3 // 8 else how


def blocked_tasks(how: Blocked) -> DimLike:
    """The number of tasks."""
    return how.tiling.m_blocks


def blocked_scratch(how: Blocked) -> DimLike:
    """Bytes of scratch that each worker needs."""
    return sum(how.parts())


def blocked_shared(how: Blocked) -> DimLike:
    """Bytes of packed b."""
    return how.shared()


def emit_blocked(module: Module, kernel: ContractionKernel, target: Target, how: Blocked) -> None:
    """Adds the kernel's function and the one that packs b to the module."""
    before = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = before.name, how.panels
    _Packing(module, before, target, how).emit()
    _Blocked(module, kernel, target, how).emit()


class _Emission(DirectContraction):
    """What both functions share: scratch and columns."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, how: Blocked):
        super().__init__(module, kernel, target)
        self.how, self.t = how, replace(how.tiling, tiles=how.tiling.tiles * how.tasks)
        self.ask_every = STEP

    def _scratch(self) -> None:
        b, t, e, how = self.b, self.t, self.e, self.how
        slot = len(self.kernel.arguments) + len(self.kernel.symbols)
        area = b.load(Type("ptr"), b.gep(b.params[0], slot, I64))
        self._place("panel ", area, (how.panels * how.depth, t.nr))
        packed, sums = how.parts()
        own = b.gep(area, e.scalar(how.shared()), Type("i8"))
        own = b.gep(own, b.mul(b.params[3], packed + sums), Type("i8"))
        self._place("packed ", own, (packed // how.bytes,))
        self._place("sums ", b.gep(own, packed, Type("i8")), (how.sum_rows, t.nr))

    def _scale(self) -> int:
        """How many rows of a panel have as many elements as one of the first panels."""
        return self.how.tiling.nr // self.t.nr


class _Packing(_Emission):
    """Packs b; a task is a panel."""

    def emit(self) -> None:
        e, b = self.e, self.b
        _, begin, end, _ = b.params
        self._scratch()
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            with self._range(ZERO, self._k_limit()):
                self._at_columns(task.index, self._pack_b)
        b.ret()

    def _pack_b(self) -> None:
        first = symbol(PANEL) * self.how.depth * self._scale()
        pack_b(self.e, self.right, self.t.n, self._k_loops(), self.t, first)


class _Blocked(_Emission):
    """Multiplies; a task is some row tiles."""

    asking: Value = constant(I64, -1)
    """All bits set where the stores follow."""

    def emit(self) -> None:
        e, b = self.e, self.b
        _, begin, end, _ = b.params
        self._scratch()
        with e.scopes.loop("task ", begin, end, self.how.tasks) as task:
            task.next()
            self._block(task.index, b.intrinsic("smin", b.add(task.index, self.how.tasks), end))
        b.ret()

    def _block(self, index: Value, end: Value) -> None:
        """The tasks from `index` on, strip by strip."""
        e, b, t, panels = self.e, self.b, self.t, self.how.panels
        rows = t.mr * self.how.tiling.tiles
        first_row, last_row, strip = b.mul(index, rows), b.mul(end, rows), self._strip()
        if self.how.once:
            self._pack_tiles(first_row, last_row)
        with e.scopes.loop("strip ", ZERO, b.udiv(b.add(strip, panels - 1), strip)) as at:
            at.next()
            start = b.mul(at.index, strip)
            stop = b.intrinsic("smin", b.add(start, strip), panels)
            wait = b.compare("gt", self._k_limit(), t.panel_rows)    # else the strip may be longer
            chunks = self._chunks(self._k_limit())
            with chunks as (first, last), self._tiles(first_row, last_row) as tile:
                if not self.how.once:
                    self._pack_tile(tile, self._k_loops()[0])
                with e.scopes.loop("panel ", start, stop) as panel:
                    panel.next()
                    if last is not None:
                        self.asking = b.select(last, constant(I64, -1), ZERO)
                    e.scopes.bind("in strip", b.sub(panel.index, start))
                    e.scopes.bind("slot", b.select(wait, e.scopes.bound("in strip"), ZERO))
                    self.around = first_row, last_row, last, stop
                    self._at_columns(panel.index, lambda: self._multiply(tile, first, last))

    def _strip(self) -> Value:
        """Panels of a strip: more where k turns out to be short."""
        e, b, t, how = self.e, self.b, self.t, self.how
        extent = t.inner[0][1]
        if isinstance(extent, int):
            return constant(I64, how.strip)
        room = b.udiv(constant(I64, how.strip * t.panel_rows), b.intrinsic("smax", e.scalar(extent), 1))
        return b.intrinsic("smin", b.intrinsic("smax", room, how.strip), how.panels)

    def _pack_tiles(self, first_row: Value, last_row: Value) -> None:
        """Packs all tiles of a between these rows, as [block of k][tile][k][a_width]."""
        e, b, var = self.e, self.b, self.c.k[0][0]
        with self._chunks(self._k_limit()):
            start, stop = e.scopes.bound(FROM), e.scopes.bound(TO)
            with e.scopes.loop("run from", start, stop, _RUN) as run:
                run.next()
                e.scopes.bind("run to", b.intrinsic("smin", b.add(run.index, _RUN), stop))
                with self._tiles(first_row, last_row) as tile:
                    self._pack_tile(tile, (var, symbol("run from"), symbol("run to")))

    def _pack_tile(self, tile: DimLike, loop: KLoop) -> None:
        """Packs the tile of a: [k][a_width], or [mr][k]."""
        e, t, how = self.e, self.t, self.how
        if how.along == "m":
            node = self._at_row(self.a, symbol("a row"), "")
            pack_columns(e, node, loop, how.a_width, t, self._packed_start(tile) + loop[1] - symbol(FROM))
        else:
            pack_a(e, lambda row: self._at_row(self.a, row, ""), 0, [loop], t)

    def _packed_start(self, tile: DimLike) -> DimLike:
        """The first k of "packed " that is the tile's."""
        return symbol(FROM) * self.t.tiles + tile * self.t.panel_rows if self.how.once else 0

    @contextmanager
    def _packed_a(self, tile: DimLike) -> Iterator[None]:
        yield

    def _packed_row(self, tile: DimLike, r: int) -> Node:
        how, k = self.how, symbol("k flat")
        start = self._packed_start(tile) + k
        at = start * how.a_width + r if how.along == "m" else k + r * self.t.panel_rows
        return self.e.nodes.make("load", ("packed ", (at,), 0), (), self.dtype, (at,))

    def _panel_start(self) -> DimLike:
        return symbol(PANEL) * self.how.depth * self._scale() + symbol(FROM)

    def _sum(self, tile: DimLike, r: DimLike, group: DimLike | None = None) -> Value:
        t = self.t
        before = (tile * self.how.strip + symbol("slot")) * t.mr if t.blocks else 0
        return self.e.address("sums ", (before * self._scale() + r) * t.nr)

    # -- what is asked for ahead ---------------------------------------------------------------------------

    def _prepare_asking(self) -> None:
        e = self.e
        self.results = self._results()
        e.scopes.bind("asking", self.asking)
        if self.how.tasks > 1:
            self._find_coming()

    def _find_coming(self) -> None:
        """Where the tile of a and the panel of b begin that take the place of those at hand."""
        e, b, t, how = self.e, self.b, self.t, self.how
        first_row, last_row, last, stop = self.around
        panel, at, begin, depth = *map(e.scopes.bound, (PANEL, "in strip", FROM)), e.scalar(how.depth)
        row, later = b.add(e.scopes.bound("tile row"), t.mr), b.add(stop, at)
        more, later = b.compare("lt", row, last_row), b.select(b.compare("lt", later, how.panels), later, at)
        later, after = b.mul(later, depth), ZERO
        if last is not None:
            after = b.select(last, ZERO, b.add(begin, t.chunk))
            later = b.select(last, later, b.add(b.mul(panel, depth), after))
        found = {"next row": b.select(more, row, first_row), "next from": b.select(more, begin, after),
                 "next panel": later, "steps of a": b.mul(at, t.panel_rows),
                 "steps of b": b.mul(e.scopes.bound("tile"), t.panel_rows)}
        for name, value in found.items():
            e.scopes.bind(name, value)
            e.bounds[name] = (0, None)

    def _ask(self, step: Value) -> None:
        """For what the stores will touch of the next tile of the strip; where it comes from memory, also for
        the next tile of a and the next strip of b, a share each time."""
        e, b, t, how = self.e, self.b, self.t, self.how
        each = 64 // how.bytes
        self._ask_results(b.and_(step, e.scopes.bound("asking")), symbol(COLUMN) + t.nr)
        if how.tasks == 1:
            return
        for line in self._shared("steps of b", step, max(t.nr // each, 1) / t.tiles):
            e.prefetch("panel ", symbol("next panel") * how.tiling.nr + line * each)
        if how.once:
            after = self._packed_start(symbol("tile") + 1) * how.a_width
            for line in self._shared("steps of a", step, how.a_width / each / how.strip):
                e.prefetch("packed ", after + line * each)
            return
        wide = 1 if how.along == "m" else 1 << (t.mr - 1).bit_length()
        lines = wide / how.strip / (1 if how.along == "m" else each)
        for line in self._shared("steps of a", step, lines) if len(t.m) == 1 else ():
            r, k = (t.mr - 1, line) if how.along == "m" else (line % wide, line // wide * each + each - 1)
            node = self._at_row(self.a, symbol("next row") + r, ".asked")
            node = e.nodes.substitute(node, {self.c.k[0][0]: symbol("next from") + k})
            e.prefetch(node.data[0], e.offset(node.data[0], node.data[1]))

    def _shared(self, before: str, step: Value, share: float) -> Iterator[DimLike]:
        """The numbers of the lines whose turn it is, if each k has that share of a line."""
        e, b, name = self.e, self.b, f"line of {before}"
        so_far = b.mul(b.add(e.scopes.bound(before), step), int(share * (1 << FRACTION)) + 1)
        e.scopes.bind(name, b.lshr(so_far, FRACTION))
        e.bounds[name] = (0, None)
        for i in range(ceil(share * STEP)):
            yield symbol(name) + i
