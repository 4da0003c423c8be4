"""CUDA C for loop kernels: fused elementwise chains, windows, and, in `cuda_rows` and
`cuda_columns`, reductions.

Where every point of the loops stands for itself, a thread takes chunks of neighbouring points (see
`cuda_vectors`) in a grid-stride loop. It may read two of them before it writes the first, so that enough is
under way to keep the memory busy. Points behind the last chunk, or that make no chunks, are taken one by one.

Where results lie side by side along one loop and operands along another (transposition), a block takes a tile
of 32 x 32 points: it reads these operands into shared memory along their own loop, then writes along the
other.
"""
from __future__ import annotations

from graphflow.compiler.emit.cuda_columns import Columns, has_columns
from graphflow.compiler.emit.cuda_rows import Rows
from graphflow.compiler.emit.cuda_teams import has_rows
from graphflow.compiler.emit.cuda_text import THREADS, WARP, Code
from graphflow.compiler.emit.cuda_vectors import PACK_BYTES, Vectors
from graphflow.compiler.emit.operands import coefficient
from graphflow.compiler.kernel.form import Let, Load, LoopKernel, Statement, Store
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, symbols_of, typical

MANY = 1 << 20
"""With so many points, and at most two arrays that are read, a thread has two chunks under way."""


def loop_code(kernel: LoopKernel) -> Code:
    """The kernel's code."""
    return _form(kernel).code()


def loop_threads(kernel: LoopKernel) -> int:
    """Threads of a block."""
    return _form(kernel).threads


def loop_blocks(kernel: LoopKernel) -> DimLike:
    """Blocks for a thread for each chunk, or a team of threads for each row."""
    return _form(kernel).blocks()


def loop_scratch(kernel: LoopKernel) -> DimLike:
    """Bytes that the blocks of a launch share for what they hand to each other."""
    return _form(kernel).scratch()


def _form(kernel: LoopKernel) -> Rows | _Points | _Tiles:
    if has_rows(kernel):
        return Rows(kernel)
    if has_columns(kernel):
        return Columns(kernel)
    tiles = _Tiles(kernel)
    return tiles if tiles.turned else _Points(kernel)


class _Tiles(Vectors):
    """Writes a kernel whose operands `turned` lie along the loop `other` rather than the innermost one."""

    threads = THREADS

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel)
        self.other, self.turned = "", []
        if len(self.grid) < 2 or not self.is_plain():
            return
        var, extent = self.grid[-1]
        values = [s.value for s in self.body if self.is_used(s)]
        loads = [x for v in values for x, guards in self.loads(v, var) if not guards]
        for other, size in self.grid[:-1]:
            found = {self.element(x.arg, x.index): x for x in loads if self._lies_along(x, other, var)}
            if found and min(typical(size), typical(extent)) >= WARP // 2 and all(
                    self._lies_along(s, var, other) for s in self.body if isinstance(s, Store)):
                self.other, self.turned = other, list(found.values())
                return

    def _lies_along(self, x: Load | Store, var: str, other: str) -> bool:
        flat = self.flat(x.arg, x.index)
        return coefficient(flat, var) == 1 and coefficient(flat, other) not in (0, 1, None) and not any(
            name in self.indirect for name in symbols_of(flat))

    def blocks(self) -> DimLike:
        """Blocks for all tiles."""
        turned = (self.other, self.grid[-1][0])
        return product(ceildiv(x, WARP) if var in turned else x for var, x in self.grid)

    def code(self) -> Code:
        """The kernel's code."""
        if all(extent != 0 for _, extent in self.grid):      # else there is nothing to do
            self._tiles()
        return Code(self.kernel, self.lines, f"one block per tile of {WARP} x {WARP}")

    def _tiles(self) -> None:
        extents, (var, extent), other = dict(self.grid), self.grid[-1], self.other
        loops = [(v, x) for v, x in self.grid if v not in (var, other)]
        names = [self.fresh("tile") for _ in self.turned]
        for x, name in zip(self.turned, names):
            self.line(f"__shared__ {self.types[x.arg]} {name}[{WARP}][{WARP + 1}];")
        for name, size in (("across", extent), ("down", extents[other])):
            self.line(f"const unsigned {name} = ({self.dim(size)} + {WARP - 1}) / {WARP};")
        self.line(f"const unsigned tiles = {self.dim(product(x for _, x in loops))} * down * across;")
        self.line(f"const int side = threadIdx.x % {WARP};")
        self.line(f"const int row = threadIdx.x / {WARP};")
        self.open("for (unsigned tile = block; tile < tiles; tile += blocks)")
        self.place(loops, "tile / across / down", "1")
        self._open_part(other, var)
        for x, name in zip(self.turned, names):
            self.line(f"{name}[at][side] = {self.element(x.arg, x.index)};")
        self.close()
        self.line("__syncthreads();")
        self._open_part(var, other)
        self.held = {self.element(x.arg, x.index): f"{name}[side][at]" for x, name in zip(self.turned, names)}
        for s in self.body:
            if isinstance(s, Let):
                self.let(s)
            elif isinstance(s, Store):
                self.line(f"{self.element(s.arg, s.index)} = {self.expr(s.value)};")
        self.close()
        self.line("__syncthreads();")
        self.close()

    def _open_part(self, along: str, down: str) -> None:
        """Opens the loop over a thread's points of a tile; neighbouring threads are neighbours along a
        loop."""
        first = {self.grid[-1][0]: f"tile % across * {WARP}", self.other: f"tile / across % down * {WARP}"}
        extents = dict(self.grid)
        self.line("#pragma unroll")
        self.open(f"for (int at = row; at < {WARP}; at += {THREADS // WARP})")
        for var, place in ((along, "side"), (down, "at")):
            self.line(f"const idx {self.variable(var)} = {first[var]} + {place};")
        bounds = (f"{self.variable(v)} >= {self.dim(extents[v])}" for v in (along, down))
        self.line(f"if ({' || '.join(bounds)}) continue;")


class _Points(Vectors):
    """Writes a kernel whose points are independent."""

    threads = THREADS

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel)
        self.packs: list[tuple[Load, tuple[str, ...]]] = []
        self.args: set[str] = set()
        if self.is_plain():
            self._choose_width()
        many = self.packs and len(self.packs) <= 2 and typical(product(x for _, x in self.grid)) >= MANY
        self.under_way = 2 if many else 1

    def _choose_width(self) -> None:
        """The widest chunks whose loads and stores are packs of 16 bytes, of some result at least."""
        (var, extent), several = self.grid[-1], len(self.grid) > 1
        values = [s.value for s in self.body if self.is_used(s)]
        by_text = {self.element(x.arg, x.index): (x, g) for v in values for x, g in self.loads(v, var)}
        loads = list(by_text.values())
        stores = [s for s in self.body if isinstance(s, Store)]
        for width in (8, 4, 2):
            def fits(x: Load | Store, width: int = width) -> bool:
                return self.packed(x.arg, x.index, var, width) is not None
            whole = self.multiple(extent, width) if several else set()
            accesses: list[Load | Store] = [*(x for x, _ in loads), *stores]
            packed = [x for x in accesses if fits(x)]
            if whole is None or not any(map(fits, stores)) or max(
                    self.bytes[x.arg] for x in packed) * width > PACK_BYTES:
                continue
            self.width, self.args = width, {x.arg for x in packed}
            self.multiples = whole.union(*(self.packed(x.arg, x.index, var, width) or () for x in packed))
            self.packs = [(x, guards) for x, guards in loads if fits(x)]
            return

    def blocks(self) -> DimLike:
        """Blocks for all points."""
        return ceildiv(product(x for _, x in self.grid), THREADS * self.width * self.under_way)

    def code(self) -> Code:
        """The kernel's code."""
        what = f"{self.width} neighbouring elements" if self.width > 1 else "one element"
        if all(extent != 0 for _, extent in self.grid):      # else there is nothing to do
            self.line(f"const unsigned thread = block * {THREADS} + threadIdx.x;")
            self.line(f"const unsigned threads = blocks * {THREADS};")
            self.line(f"const unsigned total = {self.dim(product(extent for _, extent in self.grid))};")
            self._one_by_one() if self.width == 1 else self._chunks()
        return Code(self.kernel, self.lines, f"{what} per thread", meets=False)

    def _one_by_one(self) -> None:
        self.open("for (unsigned point = thread; point < total; point += threads)")
        self.place(self.grid, "point", "1")
        self._statements(self.body)
        self.close()

    def _statements(self, body: tuple[Statement, ...]) -> None:
        for s in body:
            if isinstance(s, Let):
                self.let(s)
            elif isinstance(s, Store):
                value = self.expr(s.value)
                self.line(f"{self.element(s.arg, s.index)} = {value};")
            else:
                self.loop(s.var, s.extent)
                self._statements(s.body)
                self.close()

    def _chunks(self) -> None:
        """The same text for packs and, of single elements, for what is left."""
        several, var = self.under_way, self.grid[-1][0]
        self.open("auto points = [&](auto pack, unsigned begin, unsigned chunks)")
        self.line("constexpr int W = decltype(pack)::value;")
        step = f"{several} * threads" if several > 1 else "threads"
        self.open(f"for (unsigned first = begin + thread; first < chunks; first += {step})")
        held = {}
        for load, _ in self.packs:
            name = self.fresh("x")
            held[self.element(load.arg, load.index)] = f"{name}[u].at[w]" if several > 1 else f"{name}.at[w]"
            self.line(f"gf_pack<{self.types[load.arg]}, W> {name}{f'[{several}]' if several > 1 else ''};")
        if self.packs:
            self._under_way()
            for (load, guards), name in zip(self.packs, held.values()):
                guard = f"if ({' && '.join(guards)}) " if guards else ""
                self.line(f"{guard}{name.removesuffix('.at[w]')} = {self.fetch(load, var, 'from', 'W')};")
            if several > 1:
                self.close()
        if several > 1 or not self.packs:
            self._under_way()
        self.held = held
        self.stored(self.body, var, "from", "W")
        self.held = {}
        for _ in range(3 if several > 1 else 2):
            self.close(";" if self.depth == 2 else "")
        self.line(f"const bool wide = {self.condition(self.args)};")
        self.line(f"const unsigned chunks = wide ? total / {self.width} : 0;")
        self.line(f"points(gf_width<{self.width}>(), 0, chunks);")
        self.line(f"points(gf_width<1>(), chunks * {self.width}, total);")

    def _under_way(self) -> None:
        """Opens the loop over the chunks that are under way together, and places one."""
        if self.under_way > 1:
            self.line("#pragma unroll")
            self.open(f"for (int u = 0; u < {self.under_way}; u++)")
            self.line("const unsigned chunk = first + u * threads;")
            self.line("if (chunk >= chunks) break;")
        self.place(self.grid, "chunk" if self.under_way > 1 else "first", "W")
