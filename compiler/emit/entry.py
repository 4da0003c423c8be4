"""The entry of a program: ``i64 NAME(ptr ctx)`` runs the plan's body in order.

`ctx` is { ptr *buffers, i64 *symbols, i64 threads, ptr parallel, ptr scratch, i64 scratch_bytes_per_worker
}. The result is 0, or the code of the check that failed plus 1.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from graphflow.compiler.plan.schema import Branch, Check, Copy, Item, Launch, Plan, Repeat, base_of, launches


def emit_entry(module: Module, program: KernelProgram) -> None:
    """Adds the entry function to the module."""
    plan = program.plan
    b = module.function(plan.name, [("ctx", PTR)], I64)
    Entry(b, program).emit()


class Entry:
    """Writes the entry, item by item."""

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
                for i in launches(self.plan.body)
            ),
            default=1,
        )
        self.args = b.alloca(I64, slots, align=8)
        self.table = {buffer.id: buffer for buffer in self.plan.buffers}
        self.places = {id: i for i, id in enumerate(self.table)}

    def emit(self) -> None:
        """The whole body, then the result 0."""
        self._body(self.plan.body)
        self.b.ret(constant(I64, 0))

    def _body(self, body: Sequence[Item]) -> None:
        for item in body:
            if isinstance(item, Launch):
                self._launch(item)
            elif isinstance(item, Copy):
                self._copy(item)
            elif isinstance(item, Check):
                self._check(item)
            elif isinstance(item, Repeat):
                self._repeat(item)
            else:
                self._branch(item)

    def _address(self, id: str) -> Value:
        base = self.b.load(PTR, self.b.gep(self.buffers, self.places[base_of(self.table, id)], I64))
        view = self.table[id]
        if view.role != "view" or (isinstance(view.offset, int) and view.offset == 0):
            return base
        return self.b.gep(base, self.dims.scalar(view.offset), MEMORY_TYPES[view.dtype.name])

    def _holds(self, id: str) -> Value:
        return self.b.compare("ne", self.b.load(I8, self._address(id)), 0)

    def _repeat(self, item: Repeat) -> None:
        b, scopes = self.b, self.dims.scopes
        b.comment(f"{item.counter} < {item.trips}")
        trips = self.dims.scalar(item.trips)
        last = item.trips - 1 if isinstance(item.trips, int) else None
        self.dims.bounds[item.counter] = (0, last)
        if not item.condition:
            with scopes.loop(item.counter, constant(I64, 0), trips) as loop:
                loop.next()
                self._body(item.body)
            done = trips if isinstance(item.trips, int) else b.intrinsic("smax", trips, 0)
        else:
            done = self._while(item, trips)
        scopes.bind(item.counter, done)

    def _while(self, item: Repeat, trips: Value) -> Value:
        """The loop; gives the number of trips done."""
        b = self.b
        start, ask, body, done = b.current, b.block("ask"), b.block("trip"), b.block("done")
        more = b.block("more")
        b.branch(ask)
        b.place(ask)
        index = b.phi(I64, (constant(I64, 0), start))
        b.branch_if(b.compare("lt", index, trips), more, done)
        b.place(more)
        b.branch_if(self._holds(item.condition), body, done)
        b.place(body)
        with self.dims.scopes.block(item.counter, index):
            self._body(item.body)
        index.add(b.add(index, 1), b.current)
        b.branch(ask)
        b.place(done)
        return index

    def _branch(self, item: Branch) -> None:
        b = self.b
        sides, done = (b.block("then"), b.block("else")), b.block("joined")
        b.branch_if(self._holds(item.predicate), *sides)
        for block, body in zip(sides, (item.then, item.otherwise)):
            b.place(block)
            with self.dims.scopes.block(str(block), constant(I64, 0)):    # what it computes stays inside
                self._body(body)
            b.branch(done)
        b.place(done)

    def _launch(self, item: Launch) -> None:
        b, kernel = self.b, self.program.kernels[item.kernel]
        b.comment(f"{item.kernel}({', '.join(item.buffers)})" + describe(item.origins))
        values = [self._address(id) for id in item.buffers]
        values += [self.dims.scopes.bound(name) for name in kernel.symbols]
        values += [self.scratch, self.scratch_bytes]
        for i, value in enumerate(values):
            b.store(value, b.gep(self.args, i, I64), align=8)
        tasks, zero = self.dims.scalar(item.tasks), constant(I64, 0)
        if kernel.name in b.module.before:
            name, count = b.module.before[kernel.name]
            with b.when(b.compare("gt", tasks, 0)):      # without tasks there is no scratch
                values = [Value(PTR, f"@{name}"), self.args, constant(I64, count), self.threads]
                b.call_address(self.parallel, VOID, values)
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
        buffer = self.table[item.target]
        size = self.dims.scalar(product(buffer.shape) * buffer.dtype.bytes)
        target, source = self._address(item.target), self._address(item.source)
        self.b.module.declare("llvm.memmove.p0.p0.i64", VOID, ["ptr", "ptr", "i64", "i1 immarg"], "")
        self.b.call("llvm.memmove.p0.p0.i64", VOID, [target, source, size, FALSE], declare=False)

    def _check(self, item: Check) -> None:
        b = self.b
        failed, passed = b.block("failed"), b.block("passed")
        b.branch_if(self._holds(item.buffer), passed, failed)
        b.place(failed)
        b.ret(constant(I64, item.code + 1))
        b.place(passed)


def describe(origins: tuple[int, ...]) -> str:
    """The traced nodes that something comes from, for a comment."""
    return f" from {', '.join(f'%{o}' for o in origins)}" if origins else ""


__all__ = ["MEMORY_TYPES", "Plan", "emit_entry"]
