"""How a contraction is cut: register tile, panels, blocks of k, tasks. A function of the kernel and the
target alone.

The flattened n axis is cut into panels of `nr` columns, the flattened m axis into tiles of `mr` rows; a
task computes `tiles` row tiles of one panel of one batch element. The panel of b is packed as [k][nr] once
for consecutive tasks that share it; a is read where it lies unless evaluating it takes more than a load.
Where half of the last panel would be empty, it has half of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.emit.cost import TASK_NS
from graphflow.compiler.emit.expr import MAX_SPAN
from graphflow.compiler.emit.operands import (
    Axes,
    arranged,
    coefficient,
    drop_guard,
    is_direct,
    load_offset,
    packed_columns,
    pieces,
    shared_limit,
)
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import Apply, Contraction, ContractionKernel, Expr, Guard, Guarded, Local
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.plan.dims import TYPICAL_SIZE, DimLike, ceildiv, product, typical
from graphflow.compiler.target import Target

_FLOPS_PER_NS = 60.0
MAX_PIECES = 4
"""A vector that touches more runs of the last n axis than this is gathered."""
_THIN, _ENOUGH_PANELS = 4, 8
"""So few rows take wider panels, as long as there are so many panels."""
_NARROW, _FEW_PANELS = 8, 6
"""So many rows take narrower panels, where there would be so few that half an empty one counts."""
_FULL_PANELS = 64
"""Beside more panels than this, one that is half empty does not count."""
_FEW_TASKS = 6
"""Where there would be fewer tasks than this, the rows are cut once more."""
_GATHER, _TRANSPOSE = 30.0, 6.0
_STRAIGHT, _FREE = 24, 6
"""Stores of no more work than this are straight code, if so many registers are free."""
LONG_ROW = 128
"""Bytes of a row of a panel that is read where it lies by several tiles: a shorter one costs as much."""
_SYMBOLIC_K = 1024
"""Rows of a panel where the extent of k is not known."""


@dataclass(frozen=True)
class Tiling:
    """batch, m, n: the axes, with batch axes that only one operand uses moved to m or n.

    mr, nr: the register tile. lanes: elements of a vector register. tiles: row tiles of a task.

    outer: k axes that are looped over outside a panel; chunk: how much of the first inner axis a panel covers
    (0: all of it); inner: k axes within a panel. panel_rows: k's of a panel.

    b: "inline" (read in the inner loop, where it lies), "packed" (read there, from panels that an array
    holds), "lanes" (packed here, vectors along n) or "transpose" (packed here, vectors along the last k axis,
    transposed in registers). pack_a: a is evaluated into scratch first. limit: a guard that a and b share and
    that just shortens the first k axis. groups: the axis of column groups, or none; each group has a panel
    and sums of its own.
    """

    batch: Axes
    m: Axes
    n: Axes
    mr: int
    nr: int
    lanes: int
    tiles: int
    outer: Axes
    chunk: int
    inner: Axes
    panel_rows: int
    b: str
    pack_a: bool
    limit: Guard | None
    groups: Axes = ()

    @property
    def group_count(self) -> int:
        """How many column groups there are."""
        return int(product(x for _, x in self.groups))

    @property
    def m_total(self) -> DimLike:
        """Rows of the flattened m axis."""
        return product(x for _, x in self.m)

    @property
    def single(self) -> bool:
        """Whether one tile has all rows for certain."""
        return isinstance(self.m_total, int) and self.m_total <= self.mr

    @property
    def reused(self) -> bool:
        """Whether several tiles use a panel of b, which no array holds as such."""
        return self.b in ("lanes", "transpose") or self.b == "inline" and not self.single

    @property
    def n_total(self) -> DimLike:
        """Columns of the flattened n axis."""
        return product(x for _, x in self.n)

    @property
    def fixed_m(self) -> int:
        """m_total if it is a constant, else 0: then rows past the end repeat the last one."""
        total = self.m_total
        return total if isinstance(total, int) else 0

    @property
    def blocks(self) -> bool:
        """Whether sums wait in memory between panels."""
        return bool(self.outer) or self.chunk > 0

    @property
    def sum_rows(self) -> int:
        """Rows of a group's sums in memory: of one tile, or of a task's where they wait."""
        return self.mr * (self.tiles if self.blocks else 1)

    @property
    def spare_rows(self) -> int:
        """Rows behind the panel that the last square block of a transposition may fill."""
        if self.b != "transpose":
            return 0
        extent = self.chunk if self.chunk and len(self.inner) == 1 else self.inner[-1][1]
        assert isinstance(extent, int)
        return -extent % self.lanes

    @property
    def m_blocks(self) -> DimLike:
        """Tasks along m."""
        return ceildiv(self.m_total, self.mr * self.tiles)

    @property
    def panels(self) -> DimLike:
        """Panels along n."""
        return ceildiv(self.n_total, self.nr)

    @property
    def half_last(self) -> bool:
        """Whether half of the last panel would be empty, which is worth code for one half as wide."""
        n = self.n_total
        return (isinstance(n, int) and self.b != "packed" and len(self.n) == 1
                and not self.groups and self.nr == 2 * self.lanes < n <= _FULL_PANELS * self.nr
                and 0 < n % self.nr <= self.lanes)


def contraction_tiling(kernel: ContractionKernel, target: Target) -> Tiling:
    """The tiling of a contraction; its `tile` field may set mr, nr and kc."""
    c = arranged(kernel, target)
    size = c.a.dtype.bytes
    m_total, n_total = (product(x for _, x in axes) for axes in (c.m, c.n))
    lanes = target.vector_bytes // size
    packed = packed_columns(kernel, c)
    nr = packed or c.tile.get("nr") or _columns(n_total, lanes, m_total)
    mr = c.tile.get("mr") or rows_of_tile(m_total, min(nr, 2 * lanes), lanes, target)
    mr = max(1, min(mr, m_total)) if isinstance(m_total, int) else mr
    limit = shared_limit(c.a, c.b, c.k)
    inline = isinstance(m_total, int) and m_total <= mr or _in_place(kernel, c, nr, target)
    mode = "packed" if packed else (
        _b_mode(kernel, drop_guard(c.b, limit), c.n, c.k, nr, min(lanes, nr), inline))
    depth = c.tile.get("kc") or max(64, target.l2 * 5 // 8 // (nr * size))
    outer, chunk, inner = ((), 0, c.k) if packed else cut_k(c.k, depth)
    blocks = bool(outer) or chunk > 0
    pack_a = not is_direct(kernel, drop_guard(c.a, limit), c.k)
    if mode == "inline" and blocks:
        if len(c.k) == 1 and not pack_a or mr <= _THIN and all(isinstance(extent, int) for _, extent in c.k):
            outer, chunk, inner, blocks = (), 0, c.k, False        # without a panel, k has any length
        else:
            mode = "lanes"
    rows = chunk or 1
    for _, extent in inner[1 if chunk else 0 :]:
        rows *= typical(extent)
    tiles = _tiles(m_total, n_total, mr, nr, rows, blocks)
    return Tiling(
        c.batch, c.m, c.n, mr, nr, min(lanes, nr), tiles, outer, chunk, inner, rows, mode, pack_a, limit,
        c.groups
    )


def contraction_tasks(kernel: ContractionKernel, target: Target) -> DimLike:
    """The number of tasks: batch, panels of n, blocks of m, the last changing fastest."""
    t = contraction_tiling(kernel, target)
    return product(x for _, x in t.batch) * t.panels * t.m_blocks


def scratch_parts(t: Tiling, size: int) -> tuple[int, int, int]:
    """Bytes of one worker's panel of b, packed a and sums; `size`: bytes of an element."""
    panel = 0 if t.b in ("inline", "packed") else (t.panel_rows * t.group_count + t.spare_rows) * t.nr * size
    packed = t.tiles * t.mr * t.panel_rows * size if t.pack_a else 0
    return whole_lines(panel), whole_lines(packed), whole_lines(t.group_count * t.sum_rows * t.nr * size)


def contraction_scratch(kernel: ContractionKernel, target: Target) -> DimLike:
    """Bytes of scratch that each worker needs: for sums only if they leave the registers."""
    t, c = contraction_tiling(kernel, target), kernel.contraction
    panel, packed, sums = scratch_parts(t, c.a.dtype.bytes)
    return panel + packed + (0 if is_straight(t, c, target) and not t.blocks else sums)


def is_straight(t: Tiling, c: Contraction, target: Target) -> bool:
    """Whether the stores are written out for each row of a tile, whose sums stay in registers: if there is
    little to do, and registers are left for it; else LLVM moves sums to the stack within the loops."""
    work = sum(map(instructions, [*(s.value for s in c.stores), *(let.value for let in c.lets)]))
    free = target.vector_registers - (t.mr + 1) * -(-t.nr // t.lanes)
    return work <= _STRAIGHT and free >= _FREE and not t.groups


def instructions(value: Expr) -> int:
    """Rough number of instructions of an expression for a vector."""
    return sum(SCALARS[x.function].flops if isinstance(x, Apply) else 1 for x in walk.subexpressions(value)
               if not isinstance(x, Local))


def whole_lines(size: int) -> int:
    """The size rounded up to cache lines."""
    return -(-size // 64) * 64


def _columns(n: DimLike, lanes: int, m: DimLike) -> int:
    """Two registers, or fewer for a short n; more for few rows and a long n, so that a matrix that is read
    only once is read in long runs."""
    whole = 2 * lanes
    if not isinstance(n, int):
        return whole
    if isinstance(m, int) and 0 < m <= _THIN:
        while 2 * whole * m <= 16 * lanes and n >= 2 * _ENOUGH_PANELS * whole:
            whole *= 2
    narrow = not isinstance(m, int) or m >= _NARROW
    if narrow and whole == 2 * lanes < n and n % whole == lanes and n <= _FEW_PANELS * whole:
        return lanes                                      # rather than a last panel that is half empty
    return min(whole, 1 << max(n - 1, 0).bit_length())


def rows_of_tile(m: DimLike, nr: int, lanes: int, target: Target) -> int:
    """As many rows as the registers hold (sums, a row of b, one of a), and such that few are left over."""
    vectors = -(-nr // lanes)
    spare = 6 if target.is_arm else 2             # LLVM loads elements of a ahead where they need registers
    most = min((target.vector_registers - spare - vectors) // vectors, 14)
    if not isinstance(m, int):
        return min(8, most)
    if m <= most:
        return max(m, 1)
    choices = range(most, most // 2, -1)
    return min(choices, key=lambda r: -(-m // r) * (r + 0.5))


def cut_k(k: Axes, depth: int) -> tuple[Axes, int, Axes]:
    """(outer axes, chunk of the first inner axis or 0, inner axes) so that a panel has about `depth` rows
    at most."""
    size = 1
    for i in range(len(k) - 1, -1, -1):
        extent = k[i][1]
        if isinstance(extent, int) and size * extent <= depth:
            size *= extent
            continue
        chunk = max(1, (depth if isinstance(extent, int) else min(depth, _SYMBOLIC_K)) // max(size, 1))
        if isinstance(extent, int):  # equal pieces
            chunk = -(-extent // -(-extent // chunk))
        return k[:i], chunk, k[i:]
    return (), 0, k


def _tiles(m: DimLike, n: DimLike, mr: int, nr: int, rows: int, blocks: bool) -> int:
    """Row tiles of a task: enough work; where sums lie in memory, the panel is packed anew by every task, so
    many, but as many for one task as for another."""
    work = 2 * mr * nr * max(rows, 1) / _FLOPS_PER_NS
    wanted = max(1, round(TASK_NS / 2 / work))
    if blocks:
        wanted = max(wanted, 128 // mr)
    most = -(-m // mr) if isinstance(m, int) else max(1, TYPICAL_SIZE // mr)
    tiles = max(1, min(wanted, most))
    if not blocks or not isinstance(n, int):
        return tiles
    count = max(most // tiles, _FEW_TASKS // max(1, -(-n // nr)), 1)
    fewer, more = max(1, most // count), -(-most // count)
    return fewer if most % fewer == 0 else max(1, more)


def _in_place(kernel: ContractionKernel, c: Contraction, nr: int, target: Target) -> bool:
    """Whether several tiles may read b where it lies: the rows of a panel are long runs without masks, and
    the second cache keeps them all."""
    n, row = product(x for _, x in c.n), nr * c.a.dtype.bytes
    return (isinstance(n, int) and n >= nr and len(c.k) == 1 and not c.groups and not kernel.indirect
            and row >= LONG_ROW and typical(c.k[0][1]) * row <= target.l2 // 8)


def _b_mode(kernel: ContractionKernel, b: Expr, n: Axes, k: Axes, nr: int, lanes: int, inline: bool) -> str:
    """The cheapest way to get at a panel, by estimates of the instructions for one vector; `inline`: b may be
    read where it lies."""
    inner = b.value if isinstance(b, Guarded) else b
    offset = load_offset(kernel, inner)
    last_n, last_k = (axes[-1] if axes else ("", 1) for axes in (n, k))
    if offset is None or not k:
        return "lanes"
    step = coefficient(offset, last_n[0])
    if inner is b and step == 1 and len(n) == 1 and inline:
        return "inline"
    along_n = _GATHER
    if isinstance(step, int) and 1 <= step <= MAX_SPAN:
        runs = pieces(last_n[1], lanes) if len(n) > 1 else 1
        along_n = step * (2 * runs + 1) if 0 < runs <= MAX_PIECES else _GATHER
    along_k = 2 * _GATHER
    if coefficient(offset, last_k[0]) == 1 and nr > 1 and last_k[1] != 0:
        full = -(-last_k[1] // lanes) * lanes / last_k[1] if isinstance(last_k[1], int) else 1.0
        along_k = _TRANSPOSE * full
    return "transpose" if along_k < along_n else "lanes"
