"""Loops whose rows are independent: what a step makes in row r depends, of what the loop makes, on row r
alone.

So every thread may run the whole loop for rows of its own, without waiting for others in between: recurrent
layers, for which rows are the sequences of a batch. In such a loop a task of each kernel is one row: an
iteration of its outermost loop, or an element of a contraction's only m axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import ContractionKernel, Kernel, Load, Loop, LoopKernel
from graphflow.compiler.plan.dims import Dim, DimLike, product, symbol
from graphflow.compiler.plan.schema import Buffer, Copy, Item, Launch, base_of


def row_axis(kernel: Kernel) -> tuple[str, DimLike] | None:
    """(variable, extent) of the axis whose elements are a kernel's rows; None if it has none."""
    if isinstance(kernel, ContractionKernel):
        c = kernel.contraction
        return c.m[0] if len(c.m) == 1 and not c.batch else None
    if isinstance(kernel, LoopKernel) and len(kernel.body) == 1:
        loop = kernel.body[0]
        return (loop.var, loop.extent) if isinstance(loop, Loop) and loop.kind == "grid" else None
    return None


def dependence(body: Sequence[Item], rows: DimLike, kernels: Mapping[str, Kernel], table: Mapping[str, Buffer]
               ) -> str:
    """The reason why the loop of that body can't be cut along so many rows; "" if it can."""
    written: set[str] = set()
    for item in body:
        if isinstance(item, Launch):
            arguments = kernels[item.kernel].arguments
            written |= {base_of(table, id) for a, id in zip(arguments, item.buffers) if a.mode != "r"}
        elif isinstance(item, Copy):
            written.add(base_of(table, item.target))
        else:
            return "it holds more than launches and copies"
    sizes: dict[str, DimLike] = {}
    for item in body:
        if isinstance(item, Copy):
            touched = [(table[id].shape, id) for id in (item.source, item.target)]
        else:
            assert isinstance(item, Launch)
            kernel = kernels[item.kernel]
            axis = row_axis(kernel)
            if axis is None or axis[1] != rows:
                return f"{kernel.name} has not {rows} rows"
            touched = [(a.shape, id) for a, id in zip(kernel.arguments, item.buffers)
                       if base_of(table, id) in written]
            several = [a.name for a, id in zip(kernel.arguments, item.buffers)
                       if base_of(table, id) in written and not _by_row(kernel, a.name, axis[0])]
            if several:
                return f"{kernel.name} needs several rows of {several[0]}"
        for shape, id in touched:
            size = sizes.setdefault(base_of(table, id), product(table[id].shape))
            if not shape or shape[0] != rows or product(table[id].shape) != size:
                return f"{id} is not made of {rows} rows everywhere"
            if not _divides(size, table[id].offset):
                return f"{id} does not begin where rows begin"
    return ""


def _by_row(kernel: Kernel, arg: str, var: str) -> bool:
    """Whether the kernel touches the argument in the row only that it is at."""
    touched = [e.index for e in walk.expressions(kernel) if isinstance(e, Load) and e.arg == arg]
    touched += [s.index for s in walk.stores(kernel) if s.arg == arg]
    return all(index[0] == symbol(var) for index in touched)


def _divides(by: DimLike, d: DimLike) -> bool:
    """Whether d is certainly a multiple of `by`, a product."""
    parts = by.terms if isinstance(by, Dim) else (((), by),)
    if len(parts) != 1:
        return d == 0
    (factors, number), = parts
    for atoms, c in (d.terms if isinstance(d, Dim) else (((), d),)):
        left = list(atoms)
        for atom in factors:
            if atom not in left:
                return c == 0
            left.remove(atom)
        if number == 0 or c % number:
            return False
    return True
