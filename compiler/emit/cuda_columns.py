"""CUDA C for long reductions of rows that lie across memory: sums over a batch, statistics of channels-last
images.

A block has up to 32 columns side by side. Neighbouring threads read neighbouring columns, 16 bytes each where
the kernel only reduces and the columns allow it; all threads of a column share its rows, and combine what
they found with shuffles and through shared memory. Then a thread for each column has the result.
"""
from __future__ import annotations

from graphflow.compiler.emit.cuda_rows import Found, Rows
from graphflow.compiler.emit.cuda_text import C_TYPES, WARP
from graphflow.compiler.emit.cuda_vectors import PACK_BYTES, Loops, grid_of, reductions_of
from graphflow.compiler.kernel.form import Let, Local, Loop, LoopKernel, Reduce
from graphflow.compiler.kernel.walk import statements, subexpressions
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, typical

SHORT = 64
"""A reduction of a column over at most so many elements is a thread's own business."""
MANY_COLUMNS, SEVERAL_COLUMNS = 1 << 15, 1 << 11
"""So many columns need no teams, or, where they are about `SHORT`, so many."""
COLUMN_THREADS = 512


def has_columns(kernel: LoopKernel) -> bool:
    """Whether the lanes of the grid are the columns of long reductions, and not very many."""
    grid, body = grid_of(kernel.body)
    reductions = [r for s in statements(body) if not isinstance(s, Loop) for r in reductions_of(s.value)]
    longest = max((typical(product(x for _, x in r.loops)) for r in reductions), default=0)
    many = SEVERAL_COLUMNS if longest <= SHORT else MANY_COLUMNS
    return bool(grid) and any(map(_is_long, reductions)) and typical(product(x for _, x in grid)) < many


def _is_long(e: Reduce) -> bool:
    size = product(x for _, x in e.loops)
    return not (isinstance(size, int) and size <= SHORT)


class Columns(Rows):
    """Writes one kernel. `sides`: columns of a block; `width`: neighbouring columns that a thread reads at
    once; `team`: threads down a column while they read."""

    sides = WARP

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel)
        self.by_warps, self.threads = False, COLUMN_THREADS
        self.what, self.one = f"{self.sides} columns", f"threadIdx.x < {self.sides} && own"
        self.side, self.guard = " + side", "if (begin < columns) " if self.width > 1 else "if (own) "

    def _is_shared(self, e: Reduce) -> bool:
        return _is_long(e)

    def _choose_width(self) -> None:
        """Chunks lie along the columns, where no number of a column is needed before it is reduced."""
        extent = self.grid[-1][1]
        if isinstance(extent, int):
            self.sides = min(WARP, 1 << max(extent - 1, 0).bit_length())
        own = {s.name for s in self.body if isinstance(s, Let)}
        if not self.one_pass or any(isinstance(s, Loop) and s is not self.at_once for s in self.body) or any(
                isinstance(x, Local) and x.name in own
                for _, values in self.passes for v in values for x in subexpressions(v)):
            return
        column = self.grid[-1][0]
        for width in (8, 4, 2):
            packs = [x for x, _ in self._accesses() if self.packed(x.arg, x.index, column, width) == set()]
            if packs and max(self.bytes[x.arg] for x in packs) * width <= PACK_BYTES and (
                    self.multiple(extent, width) == set()):
                self.width = width
                return

    def _choose_team(self) -> None:
        self.along, self.team = 1, COLUMN_THREADS * self.width // self.sides
        self.part_team = self.team

    def _groups(self) -> DimLike:
        *outer, columns = (x for _, x in self.grid)
        return product(outer) * ceildiv(columns, self.sides)

    # -- the text

    def _place_thread(self) -> None:
        self.line(f"const int side = threadIdx.x % {self.sides};")
        self.line(f"const int lane = threadIdx.x / {self.sides // self.width};")

    def _place_row(self) -> None:
        var, extent = self.grid[-1]
        self.line(f"const idx columns = {self.dim(extent)};")
        self.line(f"const idx across = (columns + {self.sides - 1}) / {self.sides};")
        self.line(f"const idx column = group % across * {self.sides} + side;")
        self.line("const bool own = column < columns;")
        self.line(f"const idx {self.variable(var)} = own ? column : columns - 1;")
        if self.width > 1:
            self.line(f"const idx begin = group % across * {self.sides} + "
                      f"threadIdx.x % {self.sides // self.width} * {self.width};")
            self.line(f"const idx from = begin < columns ? begin : columns - {self.width};")
        self.place(self.grid[:-1], "group / across", "1")

    def _var(self, loops: Loops) -> str:
        return self.grid[-1][0]

    def _accumulate_share(self, found: Found, first: str = "lane", end: str = "") -> None:
        for e, accs in found if self.width > 1 else ():
            for acc, x in zip(accs, e.operands):
                starts = ", ".join([acc] * self.width)
                self.line(f"{C_TYPES[x.dtype]} {acc}s[{self.width}] = {{{starts}}};")
        super()._accumulate_share(found, first, end)

    def _own(self, accs: list[str]) -> list[str]:
        return [f"{acc}s[w]" for acc in accs] if self.width > 1 else accs

    def _meet(self, found: Found, width: int) -> None:
        across, warps = self.sides // width, COLUMN_THREADS // WARP
        parts = [[self.fresh("part") for _ in accs] for _, accs in found]
        for (e, accs), names in zip(found, parts):
            for part, x in zip(names, e.operands):
                self.line(f"__shared__ {C_TYPES[x.dtype]} {part}[{warps}][{self.sides}];")
            at, own = "side", accs
            if width > 1:
                self.line("#pragma unroll")
                self.open(f"for (int w = 0; w < {width}; w++)")
                at, own = f"threadIdx.x % {across} * {width} + w", self._own(accs)
            if across < WARP:
                self._shuffle(e, own, WARP // 2, across)
            for part, acc in zip(names, own):
                self.line(f"{f'if (threadIdx.x % {WARP} < {across}) ' if across < WARP else ''}"
                          f"{part}[threadIdx.x / {WARP}][{at}] = {acc};")
            if width > 1:
                self.close()
        self.line("__syncthreads();")
        for (e, accs), names in zip(found, parts):
            for acc, part in zip(accs, names):
                self.line(f"{acc} = {part}[0][side];")
            step = self.fresh("step")
            self.open(f"for (int {step} = 1; {step} < {warps}; {step}++)")
            self.combine(e, accs, [f"{part}[{step}][side]" for part in names])
            self.close()
