"""CUDA C for contractions: acc(b, m, n) = sum over k of a(b, m, k) * b(b, k, n), then the kernel's stores.

A block of threads computes a tile of sums, which its threads keep in registers. Both operands go through
shared memory (`cuda_operands`), a run of k's at a time, into one of several places that are filled in turn;
while the block multiplies one run, the next are on their way. So matmul, convolution and both of its
gradients are this one text with other index expressions: implicit matrix products. What multiplies is the fma
of each thread (`FmaSums`) or a tensor core (`cuda_mma`).

Where there are few tiles and many k's, several blocks share a tile, each for a part of k; the last that is
done adds the parts. `cuda_tiles` chooses all this from shapes alone, so every run gives the same bits.
"""
from __future__ import annotations

import re

from graphflow.compiler.cuda_target import ANY, DECLARED_SHARED, CudaTarget
from graphflow.compiler.emit.cuda_mma import TensorSums
from graphflow.compiler.emit.cuda_operands import Operand, axis_values, declare_axes
from graphflow.compiler.emit.cuda_text import C_TYPES, Code, Writer, apply, c_name, used_locals
from graphflow.compiler.emit.cuda_tiles import WARP, BlockTile, Work, half_of, side_by_side, work
from graphflow.compiler.emit.operands import load_offset
from graphflow.compiler.kernel.form import ContractionKernel, Load, Store
from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.dtypes import DType

_BAND = 16
"""Rows of tiles whose blocks run together, so that they share the columns that they read."""


def block_tile(kernel: ContractionKernel, target: CudaTarget = ANY) -> BlockTile:
    """The tile of each block."""
    return work(kernel, target).tile


def contraction_blocks(kernel: ContractionKernel, target: CudaTarget = ANY) -> DimLike:
    """The number of blocks to launch: tiles by parts of k."""
    found = work(kernel, target)
    return found.tiles * found.parts


def contraction_scratch(kernel: ContractionKernel, target: CudaTarget = ANY) -> DimLike:
    """Bytes that the blocks of a launch share for what they hand to each other."""
    return work(kernel, target).scratch


def contraction_shared(kernel: ContractionKernel, target: CudaTarget = ANY) -> int:
    """Bytes of shared memory that a launch asks for; 0 where the kernel declares what it needs."""
    size = _Contraction(work(kernel, target)).shared
    return size if size > DECLARED_SHARED else 0


def contraction_code(kernel: ContractionKernel, target: CudaTarget = ANY) -> Code:
    """The kernel's code."""
    return _Contraction(work(kernel, target)).code()


class FmaSums:
    """The sums of a thread: neighbouring rows and columns by fours, so that shared memory is read 16 bytes at
    a time. Neighbouring lanes read the same rows, those two apart the same columns, which the hardware
    merges."""

    neighbours = 4

    def __init__(self, tile: BlockTile, dtype: DType, groups: int):
        self.tile, self.dtype, self.groups = tile, dtype, groups
        self.rows, self.runs = tile.up, tile.along // 4      # rows, and runs of neighbours in each
        self.count = tile.up * tile.along * groups

    def declare(self, w: Writer) -> None:
        """Where the thread is: its first row and column."""
        high = "lane >> 1 & 1 | lane >> 2 & 6", "lane & 1 | lane >> 1 & 2"
        low = "lane >> 1 & 1 | lane >> 2 & 2", "lane & 1 | lane >> 1 & 2 | lane >> 2 & 4"
        for name, bits in zip(("row", "column"), high if self.tile.down == 8 else low):
            bits = " | ".join(f"({x})" for x in bits.split(" | "))
            w.line(f"const int {name} = warp_{name} + ({bits}) * 4;")

    def row(self, i: str) -> str:
        """Row number i of the thread."""
        return f"row + {i} / 4 * {4 * self.tile.down} + {i} % 4"

    def column(self, j: str) -> str:
        """The first column of run number j."""
        return f"column + {j} * {4 * WARP // self.tile.down}"

    def number(self, i: str, j: str, group: int) -> str:
        """Which of the sums is the first of row i, run j."""
        return f"{i} * {self.tile.along * self.groups} + {j} * 4 + {group * self.tile.along}"

    def multiply(self, w: Writer, left: Operand, right: Operand) -> None:
        """Adds the products of a run."""
        t, type = self.tile, C_TYPES[self.dtype]
        depth = t.depth // t.slices
        w.line("#pragma unroll")
        w.open(f"for (int d = 0; d < {depth}; d++)")
        w.line(f"const int depth = {f'slice * {depth} + ' if t.slices > 1 else ''}d;")
        w.line(f"{type} rows[{t.up}], columns[{t.along * self.groups}];")
        w.line("#pragma unroll")
        w.line(f"for (int i = 0; i < {t.up}; i++) rows[i] = left[stage][depth][{self.row('i')}];")
        across = f"{self.column(f'(j % {t.along} / 4)')} + j % 4 + j / {t.along} * {t.columns}"
        w.line("#pragma unroll")
        w.line(f"for (int j = 0; j < {t.along * self.groups}; j++) "
               f"columns[j] = right[stage][depth][{across}];")
        w.line("#pragma unroll")
        w.open(f"for (int i = 0; i < {self.count}; i++)")
        wide = t.along * self.groups
        factors = [f"rows[i / {wide}]", f"columns[i % {wide}]", "sums[i]"]
        w.line(f"sums[i] = {apply('fma', factors, self.dtype, self.dtype)};")
        w.close()
        w.close()


class _Contraction(Writer):
    """Writes one kernel."""

    def __init__(self, found: Work):
        kernel, tile = found.kernel, found.tile
        c = kernel.contraction
        stored = [*kernel.indirect.values(), *(s.value for s in c.stores)]
        super().__init__(kernel.arguments, kernel.indirect, used_locals(stored, c.lets))
        self.work, self.kernel, self.c, self.tile = found, kernel, c, tile
        self.dtype, self.type = c.a.dtype, C_TYPES[c.a.dtype]
        a, b = (half_of(e) if tile.units == "half" else e for e in (c.a, c.b))
        assert a is not None and b is not None
        self.operands = Operand(kernel, tile, True, a), Operand(kernel, tile, False, b)
        kind = FmaSums if tile.units == "fma" else TensorSums
        self.sums = kind(tile, a.dtype, len(c.accumulators))

    @property
    def shared(self) -> int:
        """Bytes of shared memory: of the operands, or of the sums that slices hand over."""
        t = self.tile
        gathered = (t.slices - 1) * self.sums.count * t.threads // t.slices * self.dtype.bytes
        return max(sum(x.bytes for x in self.operands), gathered)

    def code(self) -> Code:
        """The kernel's code."""
        t, parts = self.tile, self.work.parts
        extents = (*self.c.batch, *self.c.m, *self.c.n)
        done = ""
        if all(extent != 0 for _, extent in extents):        # else there is nothing to do
            self._tiles()
            if parts > 1:
                done = f"static __device__ int {self.kernel.name}_done[{self.work.tiles}];\n"
        form = f"one block per tile of {t.rows} x {t.columns}{f' and part of {parts}' if parts > 1 else ''}"
        return Code(self.kernel, self.lines, form, t.threads, self.work.scratch, statics=done,
                       asks=self.shared > DECLARED_SHARED)

    def _tiles(self) -> None:
        t, parts = self.tile, self.work.parts
        left, right = self.operands
        if self.shared > DECLARED_SHARED:
            self.line("char* const shared = gf_shared();")
        else:
            self.line(f"__shared__ __align__(16) char shared[{self.shared}];")
        left.declare(self, 0)
        right.declare(self, left.bytes)
        if t.slices > 1:
            self.line(f"auto& gathered = *({self.type}(*)[{t.slices - 1}][{self.sums.count}]"
                      f"[{t.threads // t.slices}])shared;")
        for name, axes in (("M", self.c.m), ("N", self.c.n), ("K", self.c.k)):
            self.line(f"const idx {name} = {self.dim(product(x for _, x in axes))};")
        self.line(f"const idx down = (M + {t.rows - 1}) / {t.rows}, across = "
                  f"(N + {t.columns - 1}) / {t.columns};")
        self.line(f"const idx tiles = {self.dim(product(x for _, x in self.c.batch))} * down * across;")
        self.line(f"const unsigned thread = threadIdx.x, lane = thread % {WARP};")
        if t.slices > 1:
            self.line(f"const int slice = thread / {WARP * t.warps}, in_slice = thread % {WARP * t.warps};")
        across = t.columns // t.warp_columns
        self.line(f"const int warp = thread / {WARP} % {t.warps};")
        self.line(f"const int warp_row = warp / {across} * {t.warp_rows}, "
                  f"warp_column = warp % {across} * {t.warp_columns};")
        self.sums.declare(self)
        if parts > 1:
            self.open(f"for (idx task = block; task < tiles * {parts}; task += blocks)")
            self.line("const idx tile = task % tiles;")
        else:
            self.open("for (idx tile = block; tile < tiles; tile += blocks)")
        self._place()
        declare_axes(self, self.c.batch, "(tile / across / down)")
        self._products()
        self._add_slices()
        self._add_parts()
        self._store()
        self.close()

    def _place(self) -> None:
        """The tile's first row and column. Tiles that run at a time are about as many down as across."""
        t = self.tile
        self.line("const idx place = tile % (down * across), band = place / "
                  f"({_BAND} * across) * {_BAND};")
        self.line(f"const idx high = down - band < {_BAND} ? down - band : {_BAND};")
        self.line("const idx rest = place - band * across;")
        self.line(f"const idx first_row = (band + rest % high) * {t.rows}, "
                  f"first_column = rest / high * {t.columns};")

    def _products(self) -> None:
        """The sums of each thread."""
        t, parts = self.tile, self.work.parts
        copied = [x for x in self.operands if x.plain is not None]
        others = [x for x in self.operands if x.plain is None]
        for operand in self.operands:
            operand.begin(self)
        self.line(f"const idx all_runs = (K + {t.depth - 1}) / {t.depth};")
        if parts > 1:
            self.line("const idx part = task / tiles;")
            self.line(f"const idx share = all_runs / {parts}, more = all_runs % {parts};")
            self.line("const idx run_0 = part * share + (part < more ? part : more);")
            self.line("const idx runs = run_0 + share + (part < more);")
        else:
            self.line("const idx run_0 = 0, runs = all_runs;")
        self.open("auto fetch = [&](idx run, int stage)")
        self.line(f"const idx first_k = run * {t.depth};")
        for operand in self.operands:
            operand.fetch(self)
        self.close(";")
        if others:
            self.open("auto keep = [&](int stage)")
            for operand in others:
                operand.keep(self)
            self.close(";")
        self.line(f"{self.type} sums[{self.sums.count}] = {{}};")
        self.line("__syncthreads();")                        # the tile before is done with shared memory
        self.line("#pragma unroll")
        self.open(f"for (int i = 0; i < {t.stages - 1}; i++)")
        self._fetch("run_0 + i", "i", bool(copied), bool(others))
        self.close()
        self.line("int stage = 0;")
        self.open("for (idx run = run_0; run < runs; run++)")
        if copied:
            self.line(f"gf_copies_wait<{t.stages - 2}>();")
        self.line("__syncthreads();")
        ahead = t.stages - 1
        self.line(f"const int free = stage == 0 ? {ahead} : stage - 1;")
        self._fetch(f"run + {ahead}", "free", bool(copied), False)
        self.sums.multiply(self, *self.operands)
        if others:
            self.line(f"if (run + {ahead} < runs) keep(free);")
        self.line(f"stage = stage == {ahead} ? 0 : stage + 1;")
        self.close()

    def _fetch(self, run: str, stage: str, copied: bool, keep: bool) -> None:
        self.line(f"if ({run} < runs) {'{ ' if keep else ''}fetch({run}, {stage});"
                  f"{f' keep({stage}); }}' if keep else ''}")
        if copied:
            self.line("gf_copies_end();")

    def _add_slices(self) -> None:
        """The sums of all slices, in the first."""
        t = self.tile
        if t.slices == 1:
            return
        self.line("__syncthreads();")                        # all are done with the operands
        self._each_sum("if (slice > 0) ", "gathered[slice - 1][i][in_slice] = sums[i];")
        self.line("__syncthreads();")
        self.open("if (slice == 0)")
        self.open(f"for (int s = 0; s < {t.slices - 1}; s++)")
        self._each_sum("", "sums[i] += gathered[s][i][in_slice];")
        self.close()
        self.close()

    def _each_sum(self, condition: str, statement: str) -> None:
        if condition:
            self.open(condition.rstrip())
        self.line("#pragma unroll")
        self.line(f"for (int i = 0; i < {self.sums.count}; i++) {statement}")
        if condition:
            self.close()

    def _add_parts(self) -> None:
        """The sums of all parts, in the block that is done last."""
        t, parts, count = self.tile, self.work.parts, self.sums.count
        if parts == 1:
            return
        first, threads = ("if (slice == 0)", t.threads // t.slices) if t.slices > 1 else ("", t.threads)
        own = "in_slice" if t.slices > 1 else "thread"
        self.line(f"{self.type}* const partial = ({self.type}*)scratch + "
                  f"(i64)tile * {parts * count * threads} + {own};")
        self._each_sum(first, f"partial[(part * {count} + i) * {threads}] = sums[i];")
        self.line(f"if (!gf_last_block(&{self.kernel.name}_done[tile], {parts})) continue;")
        if first:
            self.open(first)
        self._each_sum("", f"sums[i] = partial[i * {threads}];")
        self.line(f"#pragma unroll {4 if count <= 16 else 1}")
        self.open(f"for (int p = 1; p < {parts}; p++)")
        self._each_sum("", f"sums[i] += partial[(p * {count} + i) * {threads}];")
        self.close()
        if first:
            self.close()

    # -- results

    def _store(self) -> None:
        """The kernel's stores for each sum of the thread."""
        sums = self.sums
        if self.tile.slices > 1:
            self.open("if (slice == 0)")
        for i, count, place, name, total, axes in (
                ("i", sums.rows, sums.row("i"), "row", "M", self.c.m),
                ("j", sums.runs, sums.column("j"), "column", "N", self.c.n)):
            self.line("#pragma unroll")
            self.open(f"for (int {i} = 0; {i} < {count}; {i}++)")
            self.line(f"const idx own_{name} = first_{name} + {place};")
            self.line(f"if (own_{name} >= {total}) continue;")
            if name == "row":
                declare_axes(self, axes, f"own_{name}")
        packed = [s for s in self.c.stores if self._packed(s)]
        for s in packed:
            self.line(f"gf_pack<{C_TYPES[s.value.dtype]}, {sums.neighbours}> out_{s.arg};")
        self.line("#pragma unroll")
        self.open(f"for (int more = 0; more < {sums.neighbours}; more++)")
        if self._last() % sums.neighbours:
            self.line("if (own_column + more >= N) continue;")
        body = len(self.lines)
        for g, name in enumerate(self.c.accumulators):
            self.line(f"const {self.type} {c_name(name)} = sums[{sums.number('i', 'j', g)} + more];")
        for let in self.c.lets:
            self.let(let)
        for s in self.c.stores:
            target = f"out_{s.arg}.at[more]" if s in packed else self.element(s.arg, s.index)
            self.line(f"{target} = {self.expr(s.value)};")
        written = "\n".join(self.lines[body:])
        for name, value in axis_values(self, self.c.n, "(own_column + more)"):
            if re.search(rf"\b{name}\b", written):           # nvcc warns of a value without a use
                self.lines.insert(body, f"{'  ' * self.depth}const idx {name} = {value};")
        self.close()
        if packed:
            declare_axes(self, self.c.n, "own_column")
        for s in packed:
            self.line(f"{C_TYPES[s.value.dtype]}* const to_{s.arg} = &{self.element(s.arg, s.index)};")
            self.line(f"gf_store(to_{s.arg}, out_{s.arg}, (size_t)to_{s.arg} % sizeof(out_{s.arg}) == 0);")
        for _ in range(3 if self.tile.slices > 1 else 2):
            self.close()

    def _last(self) -> int:
        """The extent of the last column axis; 1 where it is not known."""
        extent = self.c.n[-1][1] if self.c.n else 1
        return extent if isinstance(extent, int) else 1

    def _packed(self, s: Store) -> bool:
        """Whether neighbouring sums of a thread lie side by side in what is stored."""
        at = load_offset(self.kernel, Load(s.arg, s.index, s.value.dtype))
        stored = [x.arg for x in self.c.stores].count(s.arg)
        return at is not None and stored == 1 and side_by_side(at, self.c.n, self.sums.neighbours)
