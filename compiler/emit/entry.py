"""The entry of a program: ``i64 NAME(ptr ctx)`` runs the plan's body in order.

`ctx` is { ptr *buffers, i64 *symbols, i64 threads, ptr parallel, ptr *scratch }; `scratch` has an address for
each launch. The result is 0, or the code of the check that failed plus 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, groupby

import numpy as np

from graphflow.compiler.emit.builder import (
    FALSE,
    I8,
    I32,
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
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, symbols_of
from graphflow.compiler.plan.schema import (
    ALIGNMENT,
    Branch,
    Check,
    Copy,
    Item,
    Launch,
    Plan,
    Repeat,
    base_of,
    launches,
    places,
)

TASK_PARAMS = [("args", PTR), ("begin", I64), ("end", I64), ("worker", I64)]
LEAST_ROWS = 8
"""With fewer rows than this for each thread, a loop that is cut along rows takes fewer threads."""


def emit_entry(module: Module, program: KernelProgram) -> None:
    """Adds the entry function to the module."""
    plan = program.plan
    b = module.function(plan.name, [("ctx", PTR)], I64)
    Entry(b, program).emit()


class Entry:
    """Writes the entry, item by item; `in_tables`: launches that follow each other together, as data."""

    in_tables = True

    def __init__(self, b: Builder, program: KernelProgram, ctx: Value | None = None):
        self.b, self.program, self.plan = b, program, program.plan
        self.ctx = ctx = ctx or b.params[0]
        self.tables: dict[tuple[int, ...], Value] = {}
        self.numbers = count()                    # of the launches, in the order of the text
        self.records: list[tuple[Value, ...]] = []
        self.buffers, self.symbols, self.threads, self.parallel, self.scratch = (
            b.load(type, b.gep(ctx, i, I64)) for i, type in enumerate((PTR, PTR, I64, PTR, PTR))
        )
        self.dims = Indices(b, Scopes(b), Nodes({}))
        for i, name in enumerate(self.plan.symbols):
            self.dims.scopes.bind(name, b.load(I64, b.gep(self.symbols, i, I64)))
        loops = [p.item for p in places(self.plan.body) if isinstance(p.item, Repeat)]
        slots = len(loops) + max((len(i.buffers) + len(program.kernels[i.kernel].symbols) + 2
                                  for i in launches(self.plan.body)), default=1)
        self.args = b.alloca(I64, slots, align=8)
        self.table = {buffer.id: buffer for buffer in self.plan.buffers}
        self.places = {id: i for i, id in enumerate(self.table)}

    def emit(self) -> None:
        """The whole body, then the result 0."""
        b, module, name = self.b, self.b.module, self.plan.name
        sizes = dict.fromkeys(size for item in launches(self.plan.body) if self._is_plain(item)
                              for size in (item.tasks, _own_scratch(item)))
        self.amounts = {size: i for i, size in enumerate(sizes)}
        self.sizes = b.alloca(I64, max(len(sizes), 1), align=8)
        for i, size in enumerate(sizes):
            b.store(self.dims.scalar(size), b.gep(self.sizes, i, I64), align=8)
        self._body(self.plan.body)
        b.ret(constant(I64, 0))
        _emit_fill(module, f"{name}.fill")
        _emit_run(module, f"{name}.run")
        module._globals.append(_records(f"{name}.launches", self.records))
        _emit_run_all(module, name)

    def _body(self, body: Sequence[Item]) -> None:
        for alike, group in groupby(body, lambda item: isinstance(item, Launch) and self._is_plain(item)):
            items = list(group)
            if alike and self.in_tables:
                self._launches([item for item in items if isinstance(item, Launch)])
            else:
                self._one_by_one(items)

    def _one_by_one(self, body: Sequence[Item]) -> None:
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
        if not self._moves(id):
            return base
        view = self.table[id]
        return self.b.gep(base, self.dims.scalar(view.offset), MEMORY_TYPES[view.dtype.name])

    def _moves(self, id: str) -> bool:
        """Whether this is a view that begins elsewhere than its buffer."""
        view = self.table[id]
        return view.role == "view" and not (isinstance(view.offset, int) and view.offset == 0)

    def _holds(self, id: str) -> Value:
        return self.b.compare("ne", self.b.load(I8, self._address(id)), 0)

    def _repeat(self, item: Repeat) -> None:
        b, scopes = self.b, self.dims.scopes
        b.comment(f"{item.counter} < {item.trips}")
        trips = self.dims.scalar(item.trips)
        last = item.trips - 1 if isinstance(item.trips, int) else None
        self.dims.bounds[item.counter] = (0, last)
        if item.rows != 0:
            self._by_rows(item)
            done = trips if isinstance(item.trips, int) else b.intrinsic("smax", trips, 0)
        elif not item.condition:
            with scopes.loop(item.counter, constant(I64, 0), trips) as loop:
                loop.next()
                self._body(item.body)
            done = trips if isinstance(item.trips, int) else b.intrinsic("smax", trips, 0)
        else:
            done = self._while(item, trips)
        scopes.bind(item.counter, done)

    def _by_rows(self, item: Repeat) -> None:
        """A loop that each thread runs for rows of its own, as a function that gets the context and the
        counters that its views use."""
        b, name = self.b, f"{self.plan.name}.{item.counter}"
        used = symbols_of(*(self.table[id].offset for launch in launches(item.body) for id in launch.buffers))
        counters = sorted(used - {*self.plan.symbols, item.counter})
        function = b.module.function(name, TASK_PARAMS, internal=True)
        _RowLoop(function, self, counters).emit_loop(item)
        b.store(self.ctx, self.args, align=8)
        for i, counter in enumerate(counters, 1):
            b.store(self.dims.scopes.bound(counter), b.gep(self.args, i, I64), align=8)
        parts = self._row_parts(item)
        with b.when(b.compare("gt", self.dims.scalar(item.rows), 0)):
            b.call_address(self.parallel, VOID, [Value(PTR, f"@{name}"), self.args, parts, self.threads])

    def _row_parts(self, item: Repeat) -> Value:
        """Into how many parts the rows are cut: one for each thread, as long as there are enough rows."""
        b = self.b
        enough = b.udiv(self.dims.scalar(item.rows), constant(I64, LEAST_ROWS))
        return b.intrinsic("smax", b.intrinsic("smin", self.threads, enough), 1)

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

    def _is_plain(self, item: Launch) -> bool:
        """Whether the launch is the same wherever the program is, so that nothing depends on a counter."""
        symbols = {*self.program.kernels[item.kernel].symbols, *symbols_of(item.tasks)}
        return symbols <= {*self.plan.symbols} and not any(self._moves(id) for id in item.buffers)

    def _launches(self, items: Sequence[Launch]) -> None:
        """Launches that follow each other, as records of a table that a loop goes through."""
        b, first = self.b, len(self.records)
        for item in items:
            b.comment(f"{item.kernel}({', '.join(item.buffers)})" + describe(item.origins))
            table, count = self._places(item)
            before, parts = b.module.before.get(item.kernel, ("", 0))
            functions = [Value(PTR, f"@{item.kernel}"), Value(PTR, f"@{before}" if before else "null")]
            numbers = (parts, count, self.amounts[item.tasks], self.amounts[_own_scratch(item)],
                       next(self.numbers))
            self.records.append((*functions, table, *(constant(I64, n) for n in numbers)))
        operands = [self.args, self.buffers, self.symbols, self.sizes, self.scratch, self.parallel,
                    self.threads, constant(I64, first), constant(I64, len(self.records))]
        b.call(f"{self.plan.name}.run_all", VOID, operands, declare=False)

    def _launch(self, item: Launch) -> None:
        b, kernel = self.b, self.program.kernels[item.kernel]
        b.comment(f"{item.kernel}({', '.join(item.buffers)})" + describe(item.origins))
        self._arguments(item)
        before, parts = b.module.before.get(kernel.name, ("", 0))
        functions = [Value(PTR, f"@{kernel.name}"), Value(PTR, f"@{before}" if before else "null")]
        operands = [*functions, constant(I64, parts), self.args, self.dims.scalar(item.tasks), self.parallel,
                    self.threads]
        b.call(f"{self.plan.name}.run", VOID, operands, declare=False)

    def _arguments(self, item: Launch) -> None:
        """Fills the table of a launch's arguments: all by one call, then what depends on where the program
        is, which is the address of a view and the counter of a loop."""
        b, symbols = self.b, self.program.kernels[item.kernel].symbols
        table, count = self._places(item)
        scratch = b.load(PTR, b.gep(self.scratch, next(self.numbers), I64))
        operands = [self.args, self.buffers, self.symbols, table, constant(I64, count), scratch,
                    self.dims.scalar(_own_scratch(item))]
        b.call(f"{self.plan.name}.fill", VOID, operands, declare=False)
        moving = [(i, self._address(id)) for i, id in enumerate(item.buffers) if self._moves(id)]
        moving += [(i, self.dims.scopes.bound(name)) for i, name in enumerate(symbols, len(item.buffers))
                   if name not in self.plan.symbols]
        for i, value in moving:
            b.store(value, b.gep(self.args, i, I64), align=8)

    def _places(self, item: Launch) -> tuple[Value, int]:
        """Where a launch's arguments are found, as `_emit_fill` says, and how many they are."""
        known = {name: ~i for i, name in enumerate(self.plan.symbols)}
        symbols = self.program.kernels[item.kernel].symbols
        key = (*(self.places[base_of(self.table, id)] for id in item.buffers),
               *(known.get(name, 0) for name in symbols))
        if key not in self.tables:
            name = f"{self.plan.name}.launch.{len(self.tables)}"
            self.tables[key] = self.b.module.data(name, np.array(key, np.int32), align=4)
        return self.tables[key], len(key)

    def _copy(self, item: Copy) -> None:
        buffer = self.table[item.target]
        size = self.dims.scalar(product(buffer.shape) * buffer.dtype.bytes)
        self._move(self._address(item.target), self._address(item.source), size)

    def _move(self, target: Value, source: Value, size: Value) -> None:
        self.b.module.declare("llvm.memmove.p0.p0.i64", VOID, ["ptr", "ptr", "i64", "i1 immarg"], "")
        self.b.call("llvm.memmove.p0.p0.i64", VOID, [target, source, size, FALSE], declare=False)

    def _check(self, item: Check) -> None:
        b = self.b
        failed, passed = b.block("failed"), b.block("passed")
        b.branch_if(self._holds(item.buffer), passed, failed)
        b.place(failed)
        b.ret(constant(I64, item.code + 1))
        b.place(passed)


class _RowLoop(Entry):
    """Writes the function of a loop that is cut along its rows, whose tasks are parts of them."""

    in_tables = False

    def __init__(self, b: Builder, outer: Entry, counters: Sequence[str]):
        super().__init__(b, outer.program, b.load(PTR, b.params[0]))
        self.tables, self.numbers = outer.tables, outer.numbers
        for i, counter in enumerate(counters, 1):
            self.dims.scopes.bind(counter, b.load(I64, b.gep(b.params[0], i, I64)))

    def emit_loop(self, item: Repeat) -> None:
        """All trips for the parts of a worker."""
        b = self.b
        rows, parts = self.dims.scalar(item.rows), self._row_parts(item)
        self.first, self.end = (b.udiv(b.mul(rows, part), parts) for part in b.params[1:3])
        self._repeat(replace(item, rows=0))
        b.ret()

    def _launch(self, item: Launch) -> None:
        self._arguments(item)
        self.b.call(item.kernel, VOID, [self.args, self.first, self.end, self.b.params[3]], declare=False)

    def _copy(self, item: Copy) -> None:
        buffer = self.table[item.target]
        row = self.dims.scalar(product(buffer.shape[1:]) * buffer.dtype.bytes)
        start, size = self.b.mul(self.first, row), self.b.mul(self.b.sub(self.end, self.first), row)
        target, source = (self.b.gep(self._address(id), start, I8) for id in (item.target, item.source))
        self._move(target, source, size)


def _emit_fill(module: Module, name: str) -> None:
    """Adds the function that fills a launch's arguments: for each of the `places`, the address of that
    buffer or the value of symbol ~place, then the address of the scratch and the bytes of each worker. A call
    instead of loads and stores at every launch keeps the entry of a deep net small."""
    b = module.function(name, [("args", PTR), ("buffers", PTR), ("symbols", PTR), ("places", PTR),
                               ("count", I64), ("scratch", PTR), ("bytes", I64)], internal=True)
    args, buffers, symbols, places, count, scratch, size = b.params
    with b.loop(0, count) as loop:
        place = b.cast(b.load(I32, b.gep(places, loop.index, I32)), I64)
        is_symbol = b.compare("lt", place, 0)
        source = b.gep(b.select(is_symbol, symbols, buffers), b.select(is_symbol, b.not_(place), place), I64)
        b.store(b.load(I64, source), b.gep(args, loop.index, I64), align=8)
        loop.next()
    for i, value in enumerate((scratch, size)):
        b.store(value, b.gep(args, b.add(count, i), I64), align=8)
    b.ret()


def _own_scratch(item: Launch) -> DimLike:
    """Bytes from one worker's scratch to the next one's."""
    return ceildiv(item.scratch, ALIGNMENT) * ALIGNMENT


def _records(name: str, records: Sequence[Sequence[Value]]) -> str:
    """A constant array of records of one form; their fields are addresses and numbers."""
    form = "{ " + ", ".join(str(value.type) for value in records[0]) + " }" if records else "i64"
    text = ", ".join(f"{form} {{ {', '.join(map(str, record))} }}" for record in records)
    return f"@{name} = internal constant [{len(records)} x {form}] [{text}], align 8"


def _emit_run_all(module: Module, program: str) -> None:
    """Adds the function that runs the launches [first, last) of the table: for each the kernel, what is done
    before, its places, and five numbers: the parts of what is done before, the arguments, at which places of
    `sizes` its number of tasks is and the bytes of scratch of each worker, and its own number."""
    b = module.function(f"{program}.run_all", [
        ("args", PTR), ("buffers", PTR), ("symbols", PTR), ("sizes", PTR), ("scratch", PTR),
        ("parallel", PTR), ("threads", I64), ("first", I64), ("last", I64)], internal=True)
    args, buffers, symbols, sizes, scratch, parallel, threads, first, last = b.params
    types = (PTR, PTR, PTR, I64, I64, I64, I64, I64)
    with b.loop(first, last) as loop:
        start = b.mul(loop.index, len(types))
        kernel, before, places, parts, count, amount, own, number = (
            b.load(type, b.gep(Value(PTR, f"@{program}.launches"), b.add(start, i), I64))
            for i, type in enumerate(types))
        tasks, size = (b.load(I64, b.gep(sizes, at, I64)) for at in (amount, own))
        area = b.load(PTR, b.gep(scratch, number, I64))
        b.call(f"{program}.fill", VOID, [args, buffers, symbols, places, count, area, size], declare=False)
        operands = [kernel, before, parts, args, tasks, parallel, threads]
        b.call(f"{program}.run", VOID, operands, declare=False)
        loop.next()
    b.ret()


def _emit_run(module: Module, name: str) -> None:
    """Adds the function that runs a launch: first the `parts` of what must be done before, if there are any,
    then the tasks; a single one without a fork. Without tasks there is no scratch, and nothing runs."""
    b = module.function(name, [("kernel", PTR), ("before", PTR), ("parts", I64), ("args", PTR),
                               ("tasks", I64), ("parallel", PTR), ("threads", I64)], internal=True)
    kernel, before, parts, args, tasks, parallel, threads = b.params
    with b.when(b.compare("gt", tasks, 0)):
        with b.when(b.compare("gt", parts, 0)):
            b.call_address(parallel, VOID, [before, args, parts, threads])
        with b.when(b.compare("eq", tasks, 1)):
            zero = constant(I64, 0)
            b.call_address(kernel, VOID, [args, zero, tasks, zero])
        with b.when(b.compare("gt", tasks, 1)):
            b.call_address(parallel, VOID, [kernel, args, tasks, threads])
    b.ret()


def describe(origins: tuple[int, ...]) -> str:
    """The traced nodes that something comes from, for a comment."""
    return f" from {', '.join(f'%{o}' for o in origins)}" if origins else ""


__all__ = ["MEMORY_TYPES", "Plan", "emit_entry"]
