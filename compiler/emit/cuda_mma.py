"""CUDA C for sums on tensor cores: mma.sync of 16 x 8 sums by a warp, of halves (16 k's) or of float32 with
ten bits of fraction (tf32, 8 k's), all added up in float32. Lane l holds rows l / 4 and l / 4 + 8 of such a
piece, columns l % 4 * 2 and the next. Halves come from shared memory by ldmatrix, transposed on the way if
they do not lie along k.
"""
from __future__ import annotations

from graphflow.compiler.emit.cuda_operands import Operand
from graphflow.compiler.emit.cuda_text import Writer
from graphflow.compiler.emit.cuda_tiles import BlockTile
from graphflow.compiler.plan.dtypes import DType

_INLINE = "static __device__ __forceinline__"


def _mma(name: str, shape: str, types: str) -> str:
    """The wrapper of a multiplication."""
    return f"""\
#ifdef __CUDACC__
{_INLINE} void {name}(float* sums, const unsigned* rows, const unsigned* columns)
{{
  asm("mma.sync.aligned.{shape}.row.col.f32.{types}.{types}.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
}}
#endif"""


def _matrices(name: str, how: str) -> str:
    """The wrapper of a load of four 8 x 8 matrices of halves."""
    return f"""\
#ifdef __CUDACC__
{_INLINE} void {name}(unsigned* to, const unsigned short* from)
{{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{%0, %1, %2, %3}}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"((unsigned)__cvta_generic_to_shared(from)) : "memory");
}}
#endif"""


TENSOR_HELPERS = {
    "gf_mma_f16": _mma("gf_mma_f16", "m16n8k16", "f16"),
    "gf_mma_bf16": _mma("gf_mma_bf16", "m16n8k16", "bf16"),
    "gf_mma_tf32": _mma("gf_mma_tf32", "m16n8k8", "tf32"),
    "gf_matrices": _matrices("gf_matrices", ""),
    "gf_matrices_turned": _matrices("gf_matrices_turned", ".trans"),
    "gf_tf32": f"""\
#ifdef __CUDACC__
{_INLINE} unsigned gf_tf32(float x)
{{
  unsigned out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}}
#endif""",
}
"""Device functions, one for each instruction; a host that simulates a GPU has its own."""


class TensorSums:
    """The sums of a thread: two neighbours in each row of each piece."""

    neighbours = 2

    def __init__(self, tile: BlockTile, dtype: DType, groups: int):
        self.tile, self.dtype, self.groups = tile, dtype, groups
        self.rows, self.runs = tile.warp_rows // 8, tile.warp_columns // 8
        self.count = self.rows * self.runs * 2 * groups

    def declare(self, w: Writer) -> None:
        """Where the thread is: its first row and column."""
        w.line("const int row = warp_row + lane / 4, column = warp_column + lane % 4 * 2;")

    def row(self, i: str) -> str:
        """Row number i of the thread."""
        return f"row + {i} * 8"

    def column(self, j: str) -> str:
        """The first column of run number j."""
        return f"column + {j} * 8"

    def number(self, i: str, j: str, group: int) -> str:
        """Which of the sums is the first of row i, run j."""
        return f"({i} / 2 * {self.runs * self.groups} + {group * self.runs} + {j}) * 4 + {i} % 2 * 2"

    def multiply(self, w: Writer, left: Operand, right: Operand) -> None:
        """Adds the products of a run."""
        t, pieces = self.tile, self.runs * self.groups
        step, depth = 16 if t.units == "half" else 8, t.depth // t.slices
        w.line("#pragma unroll")
        w.open(f"for (int d = 0; d < {depth}; d += {step})")
        w.line(f"const int first = {f'slice * {depth} + ' if t.slices > 1 else ''}d;")
        w.line(f"unsigned rows[{self.rows // 2}][4], columns[{pieces}][2];")
        if t.units == "half":
            self._halves(w, left, right)
        else:
            self._words(w, left, right)
        for i, count in (("i", self.rows // 2), ("j", pieces)):
            w.line("#pragma unroll")
            w.open(f"for (int {i} = 0; {i} < {count}; {i}++)")
        kind = self.dtype.name if t.units == "half" else "tf32"
        w.line(f"gf_mma_{kind}(&sums[(i * {pieces} + j) * 4], rows[i], columns[j]);")
        for _ in range(3):
            w.close()

    def _halves(self, w: Writer, left: Operand, right: Operand) -> None:
        pieces = self.runs * self.groups
        near, far = "lane % 16", "lane / 16 * 8"              # along the first and the second index of left's
        turned = "lane / 8 % 2 * 8", "lane / 16 * 8 + lane % 8"
        at, k = (near, far) if left.by_k else turned
        w.line("#pragma unroll")
        w.line(f"for (int i = 0; i < {self.rows // 2}; i++) "
               f"gf_matrices{'' if left.by_k else '_turned'}(rows[i], "
               f"&left[stage]{left.place(f'warp_row + i * 16 + {at}', f'first + {k}')});")
        at, k = turned[::-1] if right.by_k else (far, near)
        column = f"warp_column + j % {self.runs} * 8 + j / {self.runs} * {self.tile.columns} + {at}"
        w.line("#pragma unroll")
        w.line(f"for (int j = 0; j < {pieces}; j += 2) "
               f"gf_matrices{'' if right.by_k else '_turned'}(columns[j], "
               f"&right[stage]{right.place(column, f'first + {k}')});")

    def _words(self, w: Writer, left: Operand, right: Operand) -> None:
        pieces, depth = self.runs * self.groups, "first + lane % 4 + h / {} * 4"
        w.line("#pragma unroll")
        place = left.place("warp_row + i / 4 * 16 + lane / 4 + h % 2 * 8", depth.format(2))
        w.line(f"for (int i = 0, h = 0; i < {self.rows * 2}; i++, h = i % 4) rows[i / 4][h] = "
               f"gf_tf32(left[stage]{place});")
        column = (f"warp_column + j / 2 % {self.runs} * 8 + j / {2 * self.runs} * {self.tile.columns}"
                  " + lane / 4")
        w.line("#pragma unroll")
        w.line(f"for (int j = 0, h = 0; j < {2 * pieces}; j++, h = j % 2) columns[j / 2][h] = "
               f"gf_tf32(right[stage]{right.place(column, depth.format(1))});")
