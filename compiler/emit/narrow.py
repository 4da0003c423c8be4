"""Products with fewer columns than a vector has lanes, of which the left operand is transposed: the gradient
for the weights of a last layer.

The operands are exchanged, so that vectors run along the rows and no lane is idle. The sums of a panel are
turned round for the stores, of which vectors run along the columns, as memory does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.contraction import ZERO, DirectContraction
from graphflow.compiler.emit.operands import algorithm_asked, coefficient, load_offset
from graphflow.compiler.emit.packing import COLUMN, transpose
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.tiling import Tiling, contraction_tiling, instructions
from graphflow.compiler.kernel.form import ContractionKernel, Load
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.target import Target

NARROW = 7
"""The number of this algorithm."""
_FEW, _IDLE, _WORK = 4, 0.25, 24
"""More columns than this leave at least that share of a vector's lanes idle, and the stores of a row take no
more instructions than that, for they are straight code."""


def narrow(kernel: ContractionKernel, target: Target) -> Tiling | None:
    """The tiling of the kernel with its operands exchanged, each panel a task; None where it is no such
    product."""
    c, asked = kernel.contraction, algorithm_asked(kernel)
    axes = len(c.m), len(c.n), len(c.k)
    if asked not in (None, NARROW) or c.batch or c.groups or kernel.indirect or axes != (1, 1, 1):
        return None
    (row, rows), (column, columns), (k, _) = c.m[0], c.n[0], c.k[0]
    lanes, a, b = target.lanes(c.a.dtype), load_offset(kernel, c.a), load_offset(kernel, c.b)
    if a is None or b is None or not isinstance(rows, int) or not isinstance(columns, int):
        return None
    stored = [load_offset(kernel, Load(s.arg, s.index, c.a.dtype)) for s in c.stores]
    if coefficient(a, row) != 1 or any(coefficient(x, k) is None for x in (a, b)) or any(
            x is None or coefficient(x, column) != 1 for x in (b, *stored)):
        return None
    work = sum(map(instructions, [*(s.value for s in c.stores), *(let.value for let in c.lets)]))
    if not _FEW < columns <= (1 - _IDLE) * lanes or rows < 2 * lanes or work > _WORK:
        return None
    t = contraction_tiling(_turned(kernel), target)
    return t if t.single and t.b == "inline" and t.m == c.n and not t.pack_a else None


def emit_narrow(module: Module, kernel: ContractionKernel, target: Target, how: Tiling) -> None:
    """Adds the kernel's function to the module."""
    _Narrow(module, _turned(kernel), target).emit()


def _turned(kernel: ContractionKernel) -> ContractionKernel:
    c = kernel.contraction
    return replace(kernel, contraction=replace(c, m=c.n, n=c.m, a=c.b, b=c.a, tile={}))


class _Narrow(DirectContraction):
    """Multiplies with exchanged operands: what it calls columns are rows of the result."""

    def _is_straight(self) -> bool:
        return True

    def _store_sums(self, sums: Sequence[Value]) -> None:
        """The stores of each row of the result that no other panel has stored, a vector along its columns."""
        e, b, t = self.e, self.b, self.t
        first, zero = e.scopes.bound(COLUMN), constant(self.type.vector(t.lanes), 0)
        mask = b.first_lanes(constant(I64, t.mr), t.lanes)
        e.bounds["turned"] = (0, t.mr - 1)
        for part in range(0, t.nr, t.lanes):
            block = [b.shuffle(x, x, list(range(part, part + t.lanes))) for x in sums]
            for i, total in enumerate(transpose(e, [*block, *[zero] * (t.lanes - t.mr)])):
                fresh = None if self.late is None else b.compare("le", self.late, part + i)
                with self._when(fresh), e.scopes.block(COLUMN, b.add(first, part + i)):
                    with e.scopes.block("turned", ZERO, Lane("turned", t.lanes, mask, t.lanes)):
                        self._store_at(symbol("turned"), [total])
