"""The entry of a program: ``i64 NAME(ptr ctx)`` runs the plan's body in order.

`ctx` is { ptr *buffers, i64 *symbols, i64 threads, ptr parallel, ptr scratch, i64 scratch_bytes_per_worker
}. The result is 0, or the code of the check that failed plus 1.
"""

from __future__ import annotations

from graphflow.compiler.emit.builder import (
    FALSE,
    I8,
    I64,
    MEMORY_TYPES,
    PTR,
    VOID,
    Builder,
    Module,
    Value,
    constant,
)
from graphflow.compiler.emit.indices import Indices
from graphflow.compiler.emit.nodes import Nodes
from graphflow.compiler.emit.scopes import Scopes
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.schema import Check, Copy, Launch, Plan


def emit_entry(module: Module, program: KernelProgram) -> None:
    """Adds the entry function to the module."""
    plan = program.plan
    b = module.function(plan.name, [("ctx", PTR)], I64)
    _Entry(b, program).emit()


class _Entry:
    def __init__(self, b: Builder, program: KernelProgram):
        self.b, self.program, self.plan = b, program, program.plan
        ctx = b.params[0]
        self.buffers, symbols, self.threads, self.parallel, self.scratch, self.scratch_bytes = (
            b.load(type, b.gep(ctx, i, I64)) for i, type in enumerate((PTR, PTR, I64, PTR, PTR, I64))
        )
        self.dims = Indices(b, Scopes(b), Nodes({}))
        for i, name in enumerate(self.plan.symbols):
            self.dims.scopes.bind(name, b.load(I64, b.gep(symbols, i, I64)))
        slots = max(
            (
                len(i.buffers) + len(program.kernels[i.kernel].symbols) + 2
                for i in self.plan.body
                if isinstance(i, Launch)
            ),
            default=1,
        )
        self.args = b.alloca(I64, slots, align=8)
        self.places = {buffer.id: i for i, buffer in enumerate(self.plan.buffers)}

    def emit(self) -> None:
        for item in self.plan.body:
            if isinstance(item, Launch):
                self._launch(item)
            elif isinstance(item, Copy):
                self._copy(item)
            elif isinstance(item, Check):
                self._check(item)
        self.b.ret(constant(I64, 0))

    def _address(self, buffer: str) -> Value:
        return self.b.load(PTR, self.b.gep(self.buffers, self.places[buffer], I64))

    def _launch(self, item: Launch) -> None:
        b, kernel = self.b, self.program.kernels[item.kernel]
        b.comment(f"{item.kernel}({', '.join(item.buffers)})" + describe(item.origins))
        values = [self._address(id) for id in item.buffers]
        values += [self.dims.scopes.bound(name) for name in kernel.symbols]
        values += [self.scratch, self.scratch_bytes]
        for i, value in enumerate(values):
            b.store(value, b.gep(self.args, i, I64), align=8)
        tasks, zero = self.dims.scalar(item.tasks), constant(I64, 0)
        task = Value(PTR, f"@{kernel.name}")
        if isinstance(item.tasks, int):
            if item.tasks == 1:
                b.call(kernel.name, VOID, [self.args, zero, tasks, zero], declare=False)
            elif item.tasks > 1:
                b.call_address(self.parallel, VOID, [task, self.args, tasks, self.threads])
            return
        with b.when(b.compare("eq", tasks, 1)):
            b.call(kernel.name, VOID, [self.args, zero, tasks, zero], declare=False)
        with b.when(b.compare("gt", tasks, 1)):
            b.call_address(self.parallel, VOID, [task, self.args, tasks, self.threads])

    def _copy(self, item: Copy) -> None:
        buffer = self.plan.buffers[self.places[item.target]]
        size = self.dims.scalar(product(buffer.shape) * buffer.dtype.bytes)
        target, source = self._address(item.target), self._address(item.source)
        self.b.module.declare("llvm.memmove.p0.p0.i64", VOID, ["ptr", "ptr", "i64", "i1 immarg"], "")
        self.b.call("llvm.memmove.p0.p0.i64", VOID, [target, source, size, FALSE], declare=False)

    def _check(self, item: Check) -> None:
        b = self.b
        failed, passed = b.block("failed"), b.block("passed")
        b.branch_if(b.compare("eq", b.load(I8, self._address(item.buffer)), 0), failed, passed)
        b.place(failed)
        b.ret(constant(I64, item.code + 1))
        b.place(passed)


def describe(origins: tuple[int, ...]) -> str:
    """The traced nodes that something comes from, for a comment."""
    return f" from {', '.join(f'%{o}' for o in origins)}" if origins else ""


__all__ = ["MEMORY_TYPES", "Plan", "emit_entry"]
