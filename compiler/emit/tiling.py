"""How a contraction is cut: register tile, panels, blocks of k, tasks. A function of the kernel and the
target alone.

The flattened n axis is cut into panels of `nr` columns, the flattened m axis into tiles of `mr` rows; a
task computes `tiles` row tiles of one panel of one batch element. The panel of b is packed as [k][nr] once
for consecutive tasks that share it; a is read where it lies unless evaluating it takes more than a load.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.emit.cost import TASK_NS, UNKNOWN
from graphflow.compiler.emit.expr import strides
from graphflow.compiler.kernel.form import ContractionKernel, Expr, Guard, Guarded, Load
from graphflow.compiler.plan.dims import (
    Dim,
    DimLike,
    Quotient,
    Symbol,
    bounds_of,
    ceildiv,
    product,
    symbol,
    symbols_of,
)
from graphflow.compiler.target import Target

Axes = tuple[tuple[str, DimLike], ...]
_FLOPS_PER_NS = 60.0
_SYMBOLIC_K = 1024
"""Rows of a panel where the extent of k is not known."""


@dataclass(frozen=True)
class Tiling:
    """mr, nr: the register tile. lanes: elements of a vector register. tiles: row tiles of a task. fixed_m:
    the extent of m if constant, else 0: then rows past the end repeat the last one.

    outer: k axes that are looped over outside a panel; chunk: rows of the first inner axis that a panel
    covers (0: all of it); inner: k axes within a panel. panel_rows: k's of a panel. blocks: whether sums
    are kept in memory between panels.

    b: "inline" (read in the inner loop), "lanes" (packed, vectors along n) or "transpose" (packed, vectors
    along the last k axis, transposed in registers). pack_a: a is evaluated into scratch first. limit: a
    guard that a and b share and that just shortens the first k axis.
    """

    mr: int
    nr: int
    lanes: int
    tiles: int
    fixed_m: int
    outer: Axes
    chunk: int
    inner: Axes
    panel_rows: int
    b: str
    pack_a: bool
    limit: Guard | None
    m_total: DimLike
    n_total: DimLike

    @property
    def blocks(self) -> bool:
        return bool(self.outer) or self.chunk > 0

    @property
    def m_blocks(self) -> DimLike:
        """Tasks along m."""
        return ceildiv(self.m_total, self.mr * self.tiles)

    @property
    def panels(self) -> DimLike:
        """Panels along n."""
        return ceildiv(self.n_total, self.nr)


def contraction_tiling(kernel: ContractionKernel, target: Target) -> Tiling:
    """The tiling of a contraction; its `tile` field may set mr, nr and kc."""
    c = kernel.contraction
    dtype = c.a.dtype
    lanes = target.vector_bytes // dtype.bytes
    m_total, n_total = (product(x for _, x in axes) for axes in (c.m, c.n))
    nr = c.tile.get("nr") or _columns(n_total, lanes)
    mr = c.tile.get("mr") or _rows(m_total, nr, lanes, target)
    if isinstance(m_total, int):
        mr = max(1, min(mr, m_total))
    limit = _shared_limit(c.a, c.b, c.k)
    a, b = (drop_guard(x, limit) for x in (c.a, c.b))
    depth = c.tile.get("kc") or max(64, target.l2 // 2 // (nr * dtype.bytes))
    outer, chunk, inner = _cut_k(c.k, depth)
    rows = chunk or 1
    for _, extent in inner[1 if chunk else 0 :]:
        assert isinstance(extent, int)
        rows *= extent
    tiles = _tiles(m_total, mr, nr, rows, bool(outer or chunk))
    mode = _b_mode(kernel, b, m_total, mr * tiles, nr, lanes, bool(outer or chunk))
    pack_a = not _direct(kernel, a, c.k)
    return Tiling(
        mr,
        nr,
        min(lanes, nr),
        tiles,
        m_total if isinstance(m_total, int) else 0,
        outer,
        chunk,
        inner,
        rows,
        mode,
        pack_a,
        limit,
        m_total,
        n_total,
    )


def contraction_tasks(kernel: ContractionKernel, target: Target) -> DimLike:
    """The number of tasks: batch, panels of n, blocks of m, the last changing fastest."""
    t = contraction_tiling(kernel, target)
    return product(x for _, x in kernel.contraction.batch) * t.panels * t.m_blocks


def scratch_parts(t: Tiling, size: int) -> tuple[int, int, int]:
    """Bytes of one worker's panel of b, sums kept between panels, and packed a; `size`: bytes of an
    element."""
    panel = 0 if t.b == "inline" else (t.panel_rows + t.lanes) * t.nr * size
    sums = t.tiles * t.mr * t.nr * size if t.blocks else 0
    packed = t.tiles * t.mr * (t.panel_rows + t.lanes) * size if t.pack_a else 0
    return _whole_lines(panel), _whole_lines(sums), _whole_lines(packed)


def contraction_scratch(kernel: ContractionKernel, target: Target) -> DimLike:
    """Bytes of scratch that each worker needs."""
    return sum(scratch_parts(contraction_tiling(kernel, target), kernel.contraction.a.dtype.bytes))


def _whole_lines(size: int) -> int:
    return -(-size // 64) * 64


def _columns(n: DimLike, lanes: int) -> int:
    """Two registers, or fewer for a short n."""
    whole = 2 * lanes
    return min(whole, 1 << max(n - 1, 0).bit_length()) if isinstance(n, int) else whole


def _rows(m: DimLike, nr: int, lanes: int, target: Target) -> int:
    """As many rows as the registers hold (sums, a row of b, one of a), and such that few are left over."""
    vectors = -(-nr // lanes)
    most = min((target.vector_registers - 2 - vectors) // vectors, 14)
    if not isinstance(m, int):
        return min(8, most)
    if m <= most:
        return max(m, 1)
    choices = range(most, most // 2, -1)
    return min(choices, key=lambda r: -(-m // r) * (r + 0.5))


def _cut_k(k: Axes, depth: int) -> tuple[Axes, int, Axes]:
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


def _tiles(m: DimLike, mr: int, nr: int, rows: int, blocks: bool) -> int:
    """Row tiles of a task: enough work; where sums lie in memory, the panel is packed anew by every task,
    so many."""
    work = 2 * mr * nr * max(rows, 1) / _FLOPS_PER_NS
    wanted = max(1, round(TASK_NS / 2 / work))
    if blocks:
        wanted = max(wanted, 128 // mr)
    most = -(-m // mr) if isinstance(m, int) else max(1, UNKNOWN // mr)
    return max(1, min(wanted, most))


# -- what a and b look like -----------------------------------------------------------------------------


def drop_guard(e: Expr, limit: Guard | None) -> Expr:
    """The expression without that guard, if it is its outermost."""
    if limit is None or not isinstance(e, Guarded):
        return e
    kept = tuple(g for g in e.guards if g != limit)
    return Guarded(kept, e.value, e.fill) if kept else e.value


def _shared_limit(a: Expr, b: Expr, k: Axes) -> Guard | None:
    """A guard of both, on the first k axis alone, outside which both are 0."""
    if not (
        k and isinstance(a, Guarded) and isinstance(b, Guarded) and all(_is_zero(x.fill) for x in (a, b))
    ):
        return None
    var = k[0][0]
    others = {v for v, _ in k[1:]}
    for g in a.guards:
        rest = g.at - symbol(var)
        if g in b.guards and not (symbols_of(rest, g.bound) & ({var} | others)) and _positive(rest):
            return g
    return None


def _is_zero(e: Expr) -> bool:
    return getattr(e, "value", None) == 0


def _positive(d: DimLike) -> bool:
    low, _ = bounds_of(d, {})
    return low is not None and low >= 0


def load_offset(kernel: ContractionKernel, e: Expr) -> DimLike | None:
    """The number of the element that a load reads; None if the expression is no load."""
    if not isinstance(e, Load):
        return None
    argument = next(x for x in kernel.arguments if x.name == e.arg)
    total: DimLike = 0
    for d, step in zip(e.index, strides(argument)):
        total = total + d * step
    return total


def coefficient(d: DimLike, var: str) -> DimLike | None:
    """What `var` is multiplied by, if the dimension is linear in it, else None."""
    if not isinstance(d, Dim):
        return 0
    found: DimLike = 0
    for atoms, c in d.terms:
        if not any(var in symbols_of(Dim((((a,), 1),))) for a in atoms):
            continue
        plain = [a for a in atoms if isinstance(a, Symbol) and a.name == var]
        others = tuple(a for a in atoms if a not in plain)
        if len(plain) != 1 or var in symbols_of(*(Dim((((a,), 1),)) for a in others)):
            return None
        found = found + (Dim(((others, c),)) if others else c)
    return found


def _direct(kernel: ContractionKernel, a: Expr, k: Axes) -> bool:
    """Whether a is a load that is linear in all k."""
    offset = load_offset(kernel, a)
    return offset is not None and all(coefficient(offset, v) is not None for v, _ in k)


def _b_mode(
    kernel: ContractionKernel, b: Expr, m: DimLike, task_rows: int, nr: int, lanes: int, blocks: bool
) -> str:
    c = kernel.contraction
    inner = b.value if isinstance(b, Guarded) else b
    offset = load_offset(kernel, inner)
    last_n, last_k = (axes[-1] if axes else ("", 1) for axes in (c.n, c.k))
    along_n = offset is not None and coefficient(offset, last_n[0]) == 1
    along_k = offset is not None and coefficient(offset, last_k[0]) == 1
    if (
        isinstance(b, Load)
        and along_n
        and len(c.n) == 1
        and isinstance(m, int)
        and m <= task_rows
        and not blocks
        and m <= 14
    ):
        return "inline"
    wide = len(c.n) == 1 or not isinstance(last_n[1], int) or last_n[1] >= min(lanes // 2, nr)
    if along_k and not (along_n and wide) and nr > 1:
        return "transpose"
    return "lanes"


def flat_index(axes: Axes, flat: DimLike) -> dict[str, DimLike] | None:
    """Each axis' variable as an expression of the flattened index; None where that needs division by a
    symbol."""
    values: dict[str, DimLike] = {}
    inner = 1
    for i in range(len(axes) - 1, -1, -1):
        var, extent = axes[i]
        rest = flat // inner
        if i == 0:
            values[var] = rest
            break
        if not isinstance(extent, int) or extent == 0:
            return None
        values[var] = rest % extent
        inner *= extent
    return values


def has_quotient(d: DimLike, var: str) -> bool:
    """Whether `var` stands under a // or %."""
    return isinstance(d, Dim) and any(
        isinstance(a, Quotient) and var in symbols_of(a.inner) for atoms, _ in d.terms for a in atoms
    )
