"""Which loops each thread runs for rows of its own (part of tile; see `kernel/rows.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphflow.compiler.emit.operands import packed_columns
from graphflow.compiler.kernel.form import ContractionKernel, Kernel, Load, RoutineKernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.rows import dependence, row_axis
from graphflow.compiler.plan.dims import DimLike, product, typical
from graphflow.compiler.plan.schema import Item, Launch, Repeat, launches, map_items
from graphflow.compiler.target import Target

ENOUGH_ROWS = 16
"""With fewer rows than this a loop is not cut along them."""


def by_rows(program: KernelProgram, target: Target) -> KernelProgram:
    """The program with `rows` set on the loops that are cut along them, and the kernels of these made so."""
    table = {b.id: b for b in program.plan.buffers}
    kernels: dict[str, Kernel] = dict(program.kernels)

    def cut(item: Item) -> Item:
        if not isinstance(item, Repeat) or item.condition:
            return item
        rows = _rows(item.body, program, target)
        if typical(rows) < ENOUGH_ROWS or dependence(item.body, rows, program.kernels, table):
            return item
        return replace(item, rows=rows, body=tuple(map(launch, item.body)))

    def launch(item: Item) -> Item:
        if not isinstance(item, Launch):
            return item
        kernel = program.kernels[item.kernel]
        assert not isinstance(kernel, RoutineKernel)
        name = f"{kernel.name}_rows"
        kernels[name] = replace(kernel, name=name, rows=True)
        return replace(item, kernel=name)

    body = map_items(program.plan.body, cut)
    used = {item.kernel for item in launches(body)}
    return KernelProgram(replace(program.plan, body=body), {n: k for n, k in kernels.items() if n in used})


def _rows(body: Sequence[Item], program: KernelProgram, target: Target) -> DimLike:
    """The rows of the body's contractions, if all multiply with panels that are packed already and that a
    thread's cache holds together, so that each thread may read them all; else 0."""
    found: list[DimLike] = []
    size: DimLike = 0
    for item in body:
        kernel = program.kernels[item.kernel] if isinstance(item, Launch) else None
        if not isinstance(kernel, ContractionKernel):
            continue
        axis, c = row_axis(kernel), kernel.contraction
        if axis is None or not packed_columns(kernel, c):
            return 0
        assert isinstance(c.b, Load)
        panels = next(a for a in kernel.arguments if a.name == c.b.arg)
        size = size + product(panels.shape) * panels.dtype.bytes
        found.append(axis[1])
    return found[0] if found and isinstance(size, int) and size <= target.l2 else 0
