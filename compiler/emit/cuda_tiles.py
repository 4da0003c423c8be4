"""Which tile a block of a GPU computes of a contraction, in which units, and into how many parts its sums are
cut: one table and one estimate of time, of shapes, element types and the architecture alone, so that a
program has the same bits on every run.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from graphflow.compiler.cuda_target import DECLARED_SHARED, CudaTarget
from graphflow.compiler.emit.cuda_text import WARP
from graphflow.compiler.emit.operands import Axes, coefficient, load_offset, names_of
from graphflow.compiler.kernel.form import Apply, Const, ContractionKernel, Expr, Guarded, Load
from graphflow.compiler.plan.dims import Dim, DimLike, ceildiv, product, symbols_of, typical
from graphflow.compiler.plan.dtypes import F32, DType


@dataclass(frozen=True)
class BlockTile:
    """The sums of a block and of one of its warps. `depth`: how many k's of both operands are in shared
    memory at a time, in each of `stages` places that are filled in turn. `slices`: groups of warps that each
    take a share of every run's k's. `units`: "fma", of which a warp is `down` rows of lanes, or the tensor
    cores' "half" and "tf32"."""

    units: str
    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    depth: int
    stages: int
    slices: int = 1
    down: int = 8

    @property
    def warps(self) -> int:
        """Warps that share the sums, in each slice."""
        return self.rows // self.warp_rows * (self.columns // self.warp_columns)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps * self.slices

    @property
    def up(self) -> int:
        """Sums of a thread along the rows."""
        return self.warp_rows // self.down

    @property
    def along(self) -> int:
        """Sums of a thread along the columns, of each group."""
        return self.warp_columns // (WARP // self.down)

    @property
    def sums(self) -> int:
        """Sums of a thread, of each group."""
        return self.warp_rows * self.warp_columns // WARP


TILES = (
    BlockTile("fma", 128, 256, 64, 64, 16, 3),
    BlockTile("fma", 128, 128, 64, 32, 16, 2),
    BlockTile("fma", 64, 64, 32, 32, 16, 3, slices=2, down=4),
    BlockTile("fma", 128, 32, 32, 32, 16, 3, slices=2, down=4),
    BlockTile("fma", 32, 128, 32, 32, 16, 3, slices=2, down=4),
    BlockTile("fma", 128, 16, 64, 16, 32, 2, slices=4),
    BlockTile("fma", 16, 128, 16, 64, 32, 2, slices=4, down=4),
    BlockTile("fma", 32, 32, 32, 16, 32, 3, slices=4),
    BlockTile("fma", 16, 32, 16, 32, 64, 2, slices=8, down=4),
    BlockTile("fma", 32, 16, 32, 16, 64, 2, slices=8),
    BlockTile("half", 128, 256, 64, 64, 64, 3),
    BlockTile("half", 256, 128, 64, 64, 64, 3),
    BlockTile("half", 256, 64, 64, 32, 32, 4),
    BlockTile("half", 128, 128, 64, 32, 32, 3),
    BlockTile("half", 64, 64, 32, 32, 32, 4),
    BlockTile("half", 128, 32, 32, 32, 32, 4),
    BlockTile("half", 32, 128, 32, 32, 32, 4),
    BlockTile("half", 32, 32, 16, 16, 64, 4),
    BlockTile("tf32", 128, 256, 64, 64, 16, 4),
    BlockTile("tf32", 128, 128, 64, 32, 16, 2),
    BlockTile("tf32", 64, 64, 32, 32, 16, 3),
    BlockTile("tf32", 128, 32, 32, 32, 16, 3),
    BlockTile("tf32", 32, 128, 32, 32, 16, 3),
    BlockTile("tf32", 32, 32, 16, 16, 32, 4),
    BlockTile("fma", 32, 16, 32, 16, 32, 2, slices=4),       # these fit where there are several groups
    BlockTile("half", 32, 32, 16, 16, 32, 2),
    BlockTile("tf32", 32, 32, 16, 16, 16, 2),
)
"""The larger, the fewer loads for a product; but few tiles leave multiprocessors idle."""

_PROCESSORS, _MOST_THREADS, _REGISTERS, _BLOCK_SHARED = 132, 2048, 1 << 16, 1 << 10
"""Of a large GPU, and what each of its multiprocessors has; bytes of shared memory that each block costs."""
_MULTIPLIES = {"fma": 128, "half": 1280, "tf32": 640}
"""What a multiprocessor multiplies in a cycle."""
_LATENCY, _START, _L2_BYTES, _FINISH_BYTES = 900, 2500, 32, 48
"""Cycles from a load's issue to its value in shared memory, and of a kernel's start; bytes of a cycle from
the second-level cache, and of what a block alone adds up."""
_PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_LEAST_RUNS, _MOST_SUMS = 4, 128
"""Runs of k's of a part; sums of a thread that stay in registers."""


@dataclass(frozen=True)
class Work:
    """A contraction with its axes as a GPU takes them, the tile of its blocks, and the parts of k."""

    kernel: ContractionKernel
    tile: BlockTile
    parts: int

    @property
    def tiles(self) -> DimLike:
        """How many tiles there are."""
        c = self.kernel.contraction
        m, n = (product(x for _, x in axes) for axes in (c.m, c.n))
        return product(x for _, x in c.batch) * ceildiv(m, self.tile.rows) * ceildiv(n, self.tile.columns)

    @property
    def scratch(self) -> DimLike:
        """Bytes of the parts' sums."""
        c, t = self.kernel.contraction, self.tile
        size = t.rows * t.columns * len(c.accumulators) * c.a.dtype.bytes
        return self.tiles * self.parts * size if self.parts > 1 else 0


def work(kernel: ContractionKernel, target: CudaTarget) -> Work:
    """What takes the least time by the estimate; the first of equals. The largest tiles are for operands that
    are copied 16 bytes at a time: a thread has no registers for the places of more copies. A kernel's own
    tile names another: `algorithm` is its number in TILES, `kc` the k's of each part."""
    kernel = _arranged(kernel)
    units, c = _units(kernel, target), kernel.contraction
    groups, size = len(c.accumulators), c.a.dtype.bytes
    if c.tile:
        part = c.tile.get("kc", 2**30)
        tile = _fitted(TILES[c.tile["algorithm"]], groups, size, target)
        return Work(kernel, tile, -(-_extent(kernel, "k") // part))
    tiles = [_fitted(t, groups, size, target) for t in TILES if t.units == units]
    wide = all(_is_wide(kernel, e, axes) or _is_wide(kernel, e, c.k) for e, axes in ((c.a, c.m), (c.b, c.n)))
    fitting = [t for t in tiles if t.sums * groups * size <= _MOST_SUMS * 4
               and _shared(t, groups, size) <= _room(t, target)
               and (wide or _room(t, target) == DECLARED_SHARED)] or tiles[-1:]
    static = all(isinstance(x, int) for _, x in (*c.batch, *c.m, *c.n))
    found = [(_cycles(kernel, t, parts, target), i, t, parts) for i, t in enumerate(fitting)
             for parts in (_PARTS if static else _PARTS[:1])
             if parts == 1 or _runs(kernel, t) >= parts * _LEAST_RUNS
             and _shared(t, groups, size) < _room(t, target)]
    _, _, tile, parts = min(found, key=lambda x: x[:2])
    return Work(kernel, tile, parts)


def half_of(e: Expr) -> Expr | None:
    """The operand in its half, where it is a half that was cast to float32; else None."""
    if isinstance(e, Apply) and e.function == "cast" and e.args[0].dtype.is_half and e.dtype is F32:
        return e.args[0]
    if isinstance(e, Guarded) and isinstance(e.fill, Const) and e.fill.value == 0:
        value = half_of(e.value)
        if value is None:
            return None
        if isinstance(value, Guarded):                       # by the same bounds, for the most part
            return Guarded(tuple(dict.fromkeys((*e.guards, *value.guards))), value.value, value.fill)
        return Guarded(e.guards, value, Const(0.0, value.dtype))
    return None


def half_type(kernel: ContractionKernel) -> DType | None:
    """The half that both operands are; None if they are not."""
    a, b = half_of(kernel.contraction.a), half_of(kernel.contraction.b)
    return a.dtype if a is not None and b is not None and a.dtype is b.dtype else None


def _units(kernel: ContractionKernel, target: CudaTarget) -> str:
    """What multiplies."""
    if target.version < 80:
        return "fma"
    if half_type(kernel) is not None:
        return "half"
    return "tf32" if target.tf32 and kernel.contraction.a.dtype is F32 else "fma"


def _arranged(kernel: ContractionKernel) -> ContractionKernel:
    """With the operands exchanged where the results lie side by side along m, with batch axes that only one
    operand uses moved to m or n, and with the axis last along which operands can be copied 16 bytes at a
    time: the channels of channels-last images."""
    c = kernel.contraction
    if kernel.indirect or c.groups:
        return kernel
    if c.m and c.n:
        places = [load_offset(kernel, Load(s.arg, s.index, s.value.dtype)) for s in c.stores]
        if all(at is not None and coefficient(at, c.m[-1][0]) == 1 != coefficient(at, c.n[-1][0])
               for at in places):
            c = replace(c, m=c.n, n=c.m, a=c.b, b=c.a)
    in_a, in_b = names_of(c.a), names_of(c.b)
    to_n = tuple(axis for axis in c.batch if axis[0] not in in_a)
    to_m = tuple(axis for axis in c.batch if axis[0] not in in_b and axis not in to_n)
    batch = tuple(axis for axis in c.batch if axis not in (*to_m, *to_n))
    m, n = _copied_wide(kernel, (*to_m, *c.m), c.a), _copied_wide(kernel, (*to_n, *c.n), c.b)
    k = _copied_wide(kernel, c.k, c.a, c.b)
    return replace(kernel, contraction=replace(c, batch=batch, m=m, n=n, k=k))


def _copied_wide(kernel: ContractionKernel, axes: Axes, *operands: Expr) -> Axes:
    """The axes in the order in which most of the operands can be copied 16 bytes at a time along the last."""
    orders = [axes, *((*(x for x in axes if x != last), last) for last in axes)]
    return max(orders, key=lambda order: sum(_is_wide(kernel, e, order) for e in operands))


def _is_wide(kernel: ContractionKernel, e: Expr, axes: Axes) -> bool:
    """Whether an operand can be copied 16 bytes at a time along the last of the axes."""
    e = half_of(e) or e
    load, guards = (e.value, e.guards) if isinstance(e, Guarded) else (e, ())
    at = load_offset(kernel, load)
    return at is not None and side_by_side(at, axes, 16 // load.dtype.bytes) and not (
        {axes[-1][0]} & symbols_of(*(g.at for g in guards)))


def side_by_side(offset: DimLike, axes: Axes, count: int) -> bool:
    """Whether `count` elements along the last axis lie side by side from each multiple of `count` on, and at
    a multiple of it."""
    if not axes or not isinstance(axes[-1][1], int) or axes[-1][1] % count:
        return False
    var = axes[-1][0]
    rest = [c for atoms, c in (offset.terms if isinstance(offset, Dim) else (((), offset),))
            if var not in symbols_of(Dim(((atoms, c),)) if atoms else 0)]
    return coefficient(offset, var) == 1 and all(c % count == 0 for c in rest)


def _room(t: BlockTile, target: CudaTarget) -> int:
    """Bytes of shared memory for the tile: more than a kernel declares only where floats need it."""
    return target.shared if _shared(t, 1, 4) > DECLARED_SHARED else DECLARED_SHARED


def _fitted(t: BlockTile, groups: int, size: int, target: CudaTarget) -> BlockTile:
    """With as many k's at a time as shared memory has room for."""
    least = {"fma": max(8, t.slices), "half": 16, "tf32": 8}[t.units]
    room = _room(t, target)
    while _shared(t, groups, size) > room and t.depth > least:
        t = replace(t, depth=t.depth // 2)
    return t


def padding(t: BlockTile, along_k: bool) -> int:
    """Elements behind each row of an operand in shared memory, so that what a warp reads or writes at a time
    lies in different banks; halves change places instead."""
    return {"fma": 4, "half": 0, "tf32": 4 if along_k else 8}[t.units]


def _shared(t: BlockTile, groups: int, size: int) -> int:
    """Bytes of shared memory of a block, at most."""
    wide = t.rows + t.columns * groups
    if t.units == "half":
        size = 2
    runs = max((wide + 2 * padding(t, False)) * t.depth, wide * (t.depth + padding(t, True)))
    return max(t.stages * runs, (t.slices - 1) * t.rows * t.columns * groups) * size


def _extent(kernel: ContractionKernel, axes: str) -> int:
    """Of all axes of a kind together."""
    return max(1, typical(product(x for _, x in getattr(kernel.contraction, axes))))


def _runs(kernel: ContractionKernel, t: BlockTile) -> int:
    return -(-_extent(kernel, "k") // t.depth)


def _cycles(kernel: ContractionKernel, t: BlockTile, parts: int, target: CudaTarget) -> float:
    """About how long the launch takes."""
    c = kernel.contraction
    groups, size = len(c.accumulators), c.a.dtype.bytes
    batch, m, n = (_extent(kernel, axes) for axes in ("batch", "m", "n"))
    blocks = batch * -(-m // t.rows) * -(-n // t.columns) * parts
    registers = t.sums * groups * size // 4 + 64
    shared = (target.shared + _BLOCK_SHARED) // (_shared(t, groups, size) + _BLOCK_SHARED)
    resident = max(1, min(_MOST_THREADS // t.threads, shared, _REGISTERS // (t.threads * registers)))
    at_once = min(resident, -(-blocks // _PROCESSORS))
    run = _run_cycles(t, groups, size)
    each = max(_LATENCY / (t.stages - 1) + 100, run * at_once) * -(-_runs(kernel, t) // parts)
    waves = -(-blocks // (_PROCESSORS * resident))
    own = t.rows * t.columns * groups * size                 # bytes of a block's sums, written and read again
    add = own * parts / _FINISH_BYTES + 2 * own * blocks / (_PROCESSORS * _L2_BYTES) + 2000
    return _START + waves * (each + 1000) + (add if parts > 1 else 0)


def _run_cycles(t: BlockTile, groups: int, size: int) -> float:
    """How long a block alone on a multiprocessor takes for a run of k's, if nothing waits for loads."""
    columns = t.columns * groups
    multiply = t.rows * columns * t.depth * max(1, size // 4) / _MULTIPLIES[t.units]
    if t.units == "fma":                                     # reads of 16 bytes, 2 cycles each
        reads = (t.up + t.along * groups) / 4 * 2 * t.warps * t.depth
        multiply = max(multiply * 1.1, reads)
    elements = (t.rows + columns) * t.depth
    return max(multiply + elements * 0.05, elements * (2 if t.units == "half" else size) / _L2_BYTES)
