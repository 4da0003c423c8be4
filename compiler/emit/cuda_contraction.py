"""CUDA C for contractions: acc(b, m, n) = sum over k of a(b, m, k) * b(b, k, n), then the kernel's stores.

A block of threads computes a tile of `rows` x `columns` sums, which its threads keep in registers, `up` x
`along` each. For a run of `depth` k's both operands are evaluated, whatever their expressions are (padding,
strides, gathers, prologues), into shared memory as [k][row] and [k][column]; while the block multiplies one
run, its threads load the next into registers. So matmul, convolution and both of its gradients are this one
text with other index expressions: implicit matrix products.

The sums of a tile are in the order of k, one fma after the other, so every run gives the same bits, and the
same as any other tile size. Threads that load walk along the axis that lies in neighbouring elements.
"""
from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.cuda_target import ANY, CudaTarget
from graphflow.compiler.emit.cost import UNKNOWN
from graphflow.compiler.emit.cuda_text import C_TYPES, Writer, apply, c_name, literal, signature, used_locals
from graphflow.compiler.emit.operands import Axes, coefficient, load_offset
from graphflow.compiler.kernel.form import ContractionKernel, Expr, Guarded, Load
from graphflow.compiler.kernel.walk import subexpressions
from graphflow.compiler.plan.dims import DimLike, ceildiv, product

GROUP = 4
"""Neighbouring sums of a thread, along either side: shared memory is read 16 bytes at a time."""
_ENOUGH, _MOST_SUMS = 128, 128
"""Tiles that keep the multiprocessors of a large device busy; sums of a thread that stay in registers."""


@dataclass(frozen=True)
class BlockTile:
    """The sums of a block and those of a thread; `depth`: how many k's are in shared memory at a time (twice:
    the run in use and the next)."""

    rows: int
    columns: int
    up: int
    along: int
    depth: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.up * (self.columns // self.along)


TILES = (
    BlockTile(128, 128, 8, 8, 8),
    BlockTile(64, 64, 4, 4, 16),
    BlockTile(128, 16, 4, 4, 8),
    BlockTile(16, 128, 4, 4, 8),
    BlockTile(32, 32, 4, 4, 8),
)
"""The larger, the fewer loads for a product; but few tiles leave multiprocessors idle."""


def block_tile(kernel: ContractionKernel, target: CudaTarget = ANY) -> BlockTile:
    """The first tile of the table of which there are enough, and which is not mostly beyond the edges; if
    there is none, the one that does the least work for nothing."""
    c = kernel.contraction
    batch, m, n = (_guess(product(x for _, x in axes)) for axes in (c.batch, c.m, c.n))
    fitting = [t for t in TILES if t.up * t.along * len(c.accumulators) <= _MOST_SUMS]

    def tiles(t: BlockTile) -> int:
        return batch * -(-m // t.rows) * -(-n // t.columns)

    def work(t: BlockTile) -> int:
        return tiles(t) * t.rows * t.columns

    least = min(work(t) for t in fitting)
    return next((t for t in fitting if tiles(t) >= _ENOUGH and work(t) <= 1.25 * least),
                min(fitting, key=work))


def contraction_blocks(kernel: ContractionKernel, target: CudaTarget = ANY) -> DimLike:
    """The number of tiles, which is the number of blocks to launch."""
    c, t = kernel.contraction, block_tile(kernel)
    m, n = (product(x for _, x in axes) for axes in (c.m, c.n))
    return product(x for _, x in c.batch) * ceildiv(m, t.rows) * ceildiv(n, t.columns)


def contraction_scratch(kernel: ContractionKernel, target: CudaTarget = ANY) -> DimLike:
    """Bytes that the blocks of a launch share for what they hand to each other."""
    return 0


def _guess(d: DimLike) -> int:
    return d if isinstance(d, int) else UNKNOWN


def contraction_text(kernel: ContractionKernel, target: CudaTarget = ANY) -> str:
    """The ``__global__`` function."""
    return _Contraction(kernel).text()


class _Contraction(Writer):
    """Writes one kernel."""

    def __init__(self, kernel: ContractionKernel):
        c = kernel.contraction
        stored = [*kernel.indirect.values(), *(s.value for s in c.stores)]
        super().__init__(kernel.arguments, kernel.indirect, used_locals(stored, c.lets))
        self.kernel, self.c, self.tile = kernel, c, block_tile(kernel)
        self.dtype = c.a.dtype
        self.type = C_TYPES[self.dtype]
        self.groups = len(c.accumulators)

    def text(self) -> str:
        """The ``__global__`` function."""
        t = self.tile
        extents = (*self.c.batch, *self.c.m, *self.c.n)
        if all(extent != 0 for _, extent in extents):        # else there is nothing to do
            self._tiles()
        lines = [f"// Launch with {t.threads} threads a block, one block per tile of {t.rows} x {t.columns}.",
                 signature(self.kernel, t.threads, contraction_scratch(self.kernel)), "{", *self.lines, "}"]
        return "\n".join(lines) + "\n"

    def _tiles(self) -> None:
        t = self.tile
        for name, width in (("left", t.rows), ("right", t.columns * self.groups)):
            self.line(f"__shared__ __align__(16) {self.type} {name}[2][{t.depth}][{width}];")
        for name, axes in (("M", self.c.m), ("N", self.c.n), ("K", self.c.k)):
            self.line(f"const idx {name} = {self.dim(product(x for _, x in axes))};")
        self.line(f"const idx down = (M + {t.rows - 1}) / {t.rows}, across = "
                  f"(N + {t.columns - 1}) / {t.columns};")
        self.line(f"const idx tiles = {self.dim(product(x for _, x in self.c.batch))} * down * across;")
        across = t.columns // t.along
        self.line(f"const int thread = threadIdx.x, row = thread / {across} * {min(GROUP, t.up)}, "
                  f"column = thread % {across} * {min(GROUP, t.along)};")
        self.open("for (idx tile = blockIdx.x; tile < tiles; tile += gridDim.x)")
        self.line(f"const idx first_row = tile / across % down * {t.rows}, "
                  f"first_column = tile % across * {t.columns};")
        self._axes(self.c.batch, "(tile / across / down)")
        self._products()
        self._store()
        self.close()

    def _axes(self, axes: Axes, flat: str) -> None:
        """Declares the variables of axes from their flattened index."""
        rest = flat
        for number, (name, extent) in reversed(list(enumerate(axes))):
            self.line(f"const idx {c_name(name)} = {f'{rest} % {self.dim(extent)}' if number else rest};")
            rest = f"({rest} / {self.dim(extent)})"

    # -- loading

    def _products(self) -> None:
        """The sums of each thread."""
        t = self.tile
        sides = [("left", t.rows, self.c.m, self.c.a, "row", "M"),
                 ("right", t.columns * self.groups, self.c.n, self.c.b, "column", "N")]
        for name, width, *_ in sides:
            self.line(f"{self.type} next_{name}[{self._share(width)}];")
        self.open("auto load = [&](idx first_k)")
        for side in sides:
            self._load(*side)
        self.close(";")
        self.open("auto keep = [&](int stage)")
        for name, width, axes, e, *_ in sides:
            self._each(name, width, axes, e)
            self.line(f"{name}[stage][depth][at] = next_{name}[i];")
            self.close()
        self.close(";")
        self.line(f"{self.type} sums[{t.up}][{t.along * self.groups}] = {{}};")
        for statement in ("load(0);", "keep(0);", "__syncthreads();", "int stage = 0;"):
            self.line(statement)
        self.open(f"for (idx k = 0; k < K; k += {t.depth})")
        self.line(f"if (k + {t.depth} < K) load(k + {t.depth});")
        self._multiply()
        self.line("stage ^= 1;")
        self.line(f"if (k + {t.depth} < K) keep(stage);")
        self.line("__syncthreads();")
        self.close()

    def _share(self, width: int) -> int:
        """How many elements of an operand's run each thread loads."""
        return -(-width * self.tile.depth // self.tile.threads)

    def _each(self, name: str, width: int, axes: Axes, e: Expr) -> None:
        """Opens the loop over a thread's share of an operand; `at` and `depth` are its place in the run."""
        t = self.tile
        threads, size = t.threads, width * t.depth
        self.line("#pragma unroll")
        self.open(f"for (int i = 0; i < {self._share(width)}; i++)")
        self.line(f"const int e = thread + i * {threads};")
        if size % threads:
            self.line(f"if (e >= {size}) break;")
        if self._along_k(e, axes):
            self.line(f"const int at = e / {t.depth}, depth = e % {t.depth};")
        else:
            self.line(f"const int at = e % {width}, depth = e / {width};")

    def _along_k(self, e: Expr, axes: Axes) -> bool:
        """Whether neighbouring elements of the operand lie along k rather than along its own axis."""
        loads = [x for x in subexpressions(e.value if isinstance(e, Guarded) else e) if isinstance(x, Load)]
        steps = [load_offset(self.kernel, x) for x in loads]
        along_k, own = (bool(names) and any(coefficient(s, names[-1][0]) == 1 for s in steps if s is not None)
                        for names in (self.c.k, axes))
        return along_k and not own

    def _load(self, name: str, width: int, axes: Axes, e: Expr, at: str, total: str) -> None:
        """Evaluates an operand into registers; beyond the edges it is zero."""
        self._each(name, width, axes, e)
        place = "at"
        if width > self.tile.columns and name == "right":    # the columns of a group, then those of the next
            place = f"at % {self.tile.columns}"
            self.line(f"const idx {c_name(self.c.groups[0][0])} = at / {self.tile.columns};")
        self.line(f"const idx own = first_{at} + {place}, k = first_k + depth;")
        self.line(f"{self.type} value = {literal(0, self.dtype)};")
        self.open(f"if (own < {total} && k < K)")
        self._axes(axes, "own")
        self._axes(self.c.k, "k")
        self.line(f"value = {self.expr(e)};")
        self.close()
        self.line(f"next_{name}[i] = value;")
        self.close()

    # -- multiplying

    def _multiply(self) -> None:
        t = self.tile
        self.line("#pragma unroll")
        self.open(f"for (int depth = 0; depth < {t.depth}; depth++)")
        along = t.along * self.groups
        parts = ("left", t.up, t.up, "row", t.rows), ("right", along, t.along, "column", t.columns)
        for name, count, own, first, width in parts:
            place = self._place(first, "i" if count == own else f"i % {own}", own, width)
            place += "" if count == own else f" + i / {own} * {width}"
            self.line(f"{self.type} {name}_part[{count}];")
            self.line("#pragma unroll")
            self.line(f"for (int i = 0; i < {count}; i++) {name}_part[i] = {name}[stage][depth][{place}];")
        self.line("#pragma unroll")
        self.open(f"for (int i = 0; i < {t.up}; i++)")
        self.line("#pragma unroll")
        self.open(f"for (int j = 0; j < {along}; j++)")
        factors, total = ["left_part[i]", "right_part[j]"], "sums[i][j]"
        if self.dtype.is_float:
            value = apply("fma", [*factors, total], self.dtype, self.dtype)
        else:
            value = apply("mul", factors, self.dtype, self.dtype)
            value = apply("add", [value, total], self.dtype, self.dtype)
        self.line(f"{total} = {value};")
        for _ in range(3):
            self.close()

    @staticmethod
    def _place(first: str, i: str, count: int, width: int) -> str:
        """Where sum i of a thread lies in the tile: groups of neighbours, the groups far apart, so that the
        threads of a warp read neighbouring groups."""
        if count <= GROUP:
            return f"{first} + {i}"
        return f"{first} + ({i}) / {GROUP} * {width // (count // GROUP)} + ({i}) % {GROUP}"

    # -- results

    def _store(self) -> None:
        """The kernel's stores for each sum of the thread."""
        t = self.tile
        for i, count, name, width, total, axes in (("i", t.up, "row", t.rows, "M", self.c.m),
                                                   ("j", t.along, "column", t.columns, "N", self.c.n)):
            self.line("#pragma unroll")
            self.open(f"for (int {i} = 0; {i} < {count}; {i}++)")
            self.line(f"const idx own_{name} = first_{name} + {self._place(name, i, count, width)};")
            self.line(f"if (own_{name} >= {total}) continue;")
            self._axes(axes, f"own_{name}")
        for g, name in enumerate(self.c.accumulators):
            self.line(f"const {self.type} {c_name(name)} = sums[i][j{f' + {g * t.along}' if g else ''}];")
        for let in self.c.lets:
            self.let(let)
        for s in self.c.stores:
            self.line(f"{self.element(s.arg, s.index)} = {self.expr(s.value)};")
        self.close()
        self.close()
