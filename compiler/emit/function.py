"""What the routines' emitters share: a function under construction, and how its work is cut into tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from graphflow.compiler.emit.builder import I8, I64, MEMORY_TYPES, PTR, Module, Type, Value, constant
from graphflow.compiler.emit.cost import TASK_NS
from graphflow.compiler.emit.indices import Indices
from graphflow.compiler.emit.nodes import Nodes
from graphflow.compiler.emit.scopes import Scopes
from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.target import Target


class Function:
    """The function of a routine: its builder, the arguments' addresses, types and extents, and the worker's
    scratch."""

    def __init__(self, module: Module, kernel: RoutineKernel):
        self.kernel = kernel
        parameters = [("args", PTR), ("begin", I64), ("end", I64), ("worker", I64)]
        self.b = b = module.function(kernel.name, parameters)
        self.dtypes = {a.name: a.dtype for a in kernel.arguments}
        self.shapes = {a.name: a.shape for a in kernel.arguments}
        slots, count = b.params[0], len(kernel.arguments)
        self.pointers = {a.name: b.load(PTR, b.gep(slots, i, I64)) for i, a in enumerate(kernel.arguments)}
        self._dims = Indices(b, Scopes(b), Nodes({}))
        for i, name in enumerate(kernel.symbols):
            self._dims.scopes.bind(name, b.load(I64, b.gep(slots, count + i, I64)))
        count += len(kernel.symbols)
        each = b.load(I64, b.gep(slots, count + 1, I64))
        self.scratch = b.gep(b.load(PTR, b.gep(slots, count, I64)), b.mul(b.params[3], each), I8)
        self._top = b.point()

    def dim(self, d: DimLike) -> Value:
        """A dimension, computed where the function begins."""
        with self.b.at(self._top):
            return self._dims.scalar(d)

    def extent(self, name: str, axis: int) -> Value:
        """An extent of an argument."""
        return self.dim(self.shapes[name][axis])

    def type(self, name: str) -> Type:
        """The type of an argument's elements in memory."""
        return MEMORY_TYPES[self.dtypes[name].name]

    def zero(self, name: str) -> Value:
        """0 in the type of an argument."""
        return constant(self.type(name), 0)

    def address(self, name: str, *index: Value) -> Value:
        """The address of an element of an argument."""
        b, flat = self.b, index[0]
        for axis, at in enumerate(index[1:], 1):
            flat = b.add(b.mul(flat, self.extent(name, axis)), at)
        return b.gep(self.pointers[name], flat, self.type(name))


@dataclass(frozen=True)
class Work:
    """How a routine is cut: `rows` independent pieces of about `row_ns`; `emit(f, row)` emits one. `scratch`:
    the bytes that a worker needs."""

    rows: DimLike
    row_ns: float
    emit: Callable[[Function, Value], None]
    scratch: DimLike = 0

    @property
    def each(self) -> int:
        """Rows of a task."""
        return max(1, math.ceil(TASK_NS / max(self.row_ns, 1e-3)))


def lanes_along(extent: DimLike, dtype: DType, target: Target) -> int:
    """Elements of a vector along an axis of that extent."""
    whole = target.lanes(dtype)
    return min(whole, 1 << max(extent - 1, 0).bit_length()) if isinstance(extent, int) else whole
