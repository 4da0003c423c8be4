"""Routines as functions of the same convention as loop kernels (see `loops`): `begin` and `end` number tasks,
each of which runs some rows of the routine's work. Rows are cut by shapes only; each writes its own elements.

    emit_routine(module, kernel, target)

One entry of `WORK` for each routine says what its rows are and emits one. Here are those that walk down
columns; `scatter` and `sorting` have the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from graphflow.compiler.emit.builder import I64, Module, Value
from graphflow.compiler.emit.cost import trips
from graphflow.compiler.emit.function import Function, Work, lanes_along
from graphflow.compiler.emit.math import scalar
from graphflow.compiler.emit.scatter import scatter_work
from graphflow.compiler.emit.sorting import sort_work
from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike, ceildiv
from graphflow.compiler.target import Target

GROUP = 4
"""Vectors of neighbouring columns (or rows of single elements) that are walked down side by side: while one
waits for its sum the others go on."""


def emit_routine(module: Module, kernel: RoutineKernel, target: Target) -> None:
    """Adds the routine's function to the module."""
    work = WORK[kernel.routine](kernel, target)
    f = Function(module, kernel)
    b = f.b
    _, begin, end, _ = b.params
    rows = f.dim(work.rows)
    if work.rows != 0:
        last = b.intrinsic("smin", b.mul(end, work.each), rows)
        with b.loop(b.mul(begin, work.each), last) as row:
            row.next()
            work.emit(f, row.index)
    b.ret()


def routine_tasks(kernel: RoutineKernel, target: Target) -> DimLike:
    """The number of tasks."""
    work = WORK[kernel.routine](kernel, target)
    return ceildiv(work.rows, work.each)


def routine_scratch(kernel: RoutineKernel, target: Target) -> DimLike:
    """Bytes of scratch that each worker needs."""
    return WORK[kernel.routine](kernel, target).scratch


class Column(NamedTuple):
    """Neighbouring columns, a lane for each: the first one is [o, :, i]. `mask`: the lanes that are there."""

    o: Value
    i: Value
    lanes: int
    mask: Value | None


Walk = Callable[[Function, Sequence[Column]], None]


def column_work(kernel: RoutineKernel, target: Target, step_ns: float, walk: Walk) -> Work:
    """Work whose rows are groups of columns, walked down together: a few vectors side by side, or, where the
    last axis has one element, single ones of a few rows."""
    before, _, behind = kernel.arguments[-1].shape
    row_ns = step_ns * max(trips(a.shape[1]) for a in kernel.arguments)
    if behind == 1:
        return Work(ceildiv(before, GROUP), GROUP * row_ns, lambda f, row: _single(f, row, walk))
    lanes = lanes_along(behind, kernel.arguments[-1].dtype, target)
    vectors = max(1, min(GROUP, -(-behind // lanes))) if isinstance(behind, int) else GROUP
    width = vectors * lanes
    groups = ceildiv(behind, width)

    def group(f: Function, row: Value) -> None:
        b = f.b
        o = b.udiv(row, f.dim(groups))
        first = b.mul(b.sub(row, b.mul(o, f.dim(groups))), width)
        starts = [b.add(first, lanes * k) for k in range(vectors)]
        left = b.sub(f.dim(behind), first)
        if not isinstance(behind, int) or behind >= width:
            with b.when(b.compare("ge", left, width)):
                walk(f, [Column(o, at, lanes, None) for at in starts])
        if not isinstance(behind, int) or behind % width:
            with b.when(b.compare("lt", left, width)):
                masks = [b.first_lanes(b.sub(left, lanes * k), lanes) for k in range(vectors)]
                walk(f, [Column(o, at, lanes, mask) for at, mask in zip(starts, masks)])

    return Work(before * groups, vectors * row_ns, group)


def _single(f: Function, row: Value, walk: Walk) -> None:
    """The rows [4 row, 4 row + 4) of single elements, side by side if all are there."""
    b, zero, end = f.b, f.dim(0), f.extent("y", 0)
    first = b.mul(row, GROUP)
    whole = b.compare("le", b.add(first, GROUP), end)
    with b.when(whole):
        walk(f, [Column(b.add(first, k), zero, 1, None) for k in range(GROUP)])
    with b.when(b.not_(whole)), b.loop(first, end) as one:
        one.next()
        walk(f, [Column(one.index, zero, 1, None)])


def _starts(f: Function, name: str, columns: Sequence[Column]) -> list[Value]:
    """The address of the first element of each column."""
    return [f.address(name, c.o, f.dim(0), c.i) for c in columns]


def _load(f: Function, name: str, start: Value, at: Value, column: Column) -> Value:
    """Element `at` of the columns that start there."""
    type = f.type(name).vector(column.lanes)
    address = f.b.gep(start, f.b.mul(at, f.extent(name, 2)), f.type(name))
    return f.b.load(type, address) if column.mask is None else f.b.masked_load(type, address, column.mask)


def _store(f: Function, value: Value, name: str, start: Value, at: Value, column: Column) -> None:
    address = f.b.gep(start, f.b.mul(at, f.extent(name, 2)), f.type(name))
    if column.mask is None:
        f.b.store(value, address)
    else:
        f.b.masked_store(value, address, column.mask)


def _in_order(f: Function, columns: Sequence[Column], reads: Sequence[str],
              step: Callable[[Value | None, Sequence[Value]], Value]) -> None:
    """y[n] = step(y[n - 1], the elements n of what is read) down the columns, from the other end if the
    kernel says `reverse`; the first has no y[n - 1]."""
    b, size = f.b, f.extent("y", 1)
    sources = [_starts(f, name, columns) for name in reads]
    results = _starts(f, "y", columns)

    def element(number: Value, before: Sequence[Value | None]) -> list[Value]:
        at = b.sub(b.sub(size, 1), number) if f.kernel.attrs["reverse"] else number
        made = []
        for k, column in enumerate(columns):
            values = [_load(f, name, starts[k], at, column) for name, starts in zip(reads, sources)]
            made.append(step(before[k], values))
        for column, start, value in zip(columns, results, made):
            _store(f, value, "y", start, at, column)
        return made

    with b.when(b.compare("gt", size, 0)):
        first = element(f.dim(0), [None] * len(columns))
        with b.loop(1, size, carry=first) as loop:
            loop.next(*element(loop.index, loop.carry))


_COMBINE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


def _cumulative(kernel: RoutineKernel, target: Target) -> Work:
    function, dtype = _COMBINE[kernel.attrs["kind"]], kernel.arguments[0].dtype

    def walk(f: Function, columns: Sequence[Column]) -> None:
        _in_order(f, columns, ("x",),
                  lambda y, x: x[0] if y is None else scalar(f.b, function, dtype, y, x[0]))

    return column_work(kernel, target, 0.5, walk)


def _recurrence(kernel: RoutineKernel, target: Target) -> Work:
    def walk(f: Function, columns: Sequence[Column]) -> None:
        b = f.b
        _in_order(f, columns, ("a", "b"), lambda y, ab: ab[1] if y is None else b.add(b.mul(ab[0], y), ab[1]))

    return column_work(kernel, target, 0.8, walk)


def _put_add(kernel: RoutineKernel, target: Target) -> Work:
    """The lanes of a vector belong to different columns, so no two of them add to the same element."""
    def walk(f: Function, columns: Sequence[Column]) -> None:
        b, size, type = f.b, f.extent("y", 1), f.type("y")
        indices, updates, results = (_starts(f, name, columns) for name in ("indices", "updates", "y"))
        with b.loop(0, size) as row:
            row.next()
            for column, start in zip(columns, results):
                zeros = b.splat(f.zero("y"), column.lanes)
                _store(f, zeros, "y", start, row.index, column)
        with b.loop(0, f.extent("indices", 1)) as k:
            k.next()
            for number, column in enumerate(columns):
                loaded = _load(f, "indices", indices[number], k.index, column)
                at = b.cast(loaded, I64, signed=f.dtypes["indices"].kind == "i")
                there = b.compare("ult", at, size)
                there = there if column.mask is None else b.and_(there, column.mask)
                value = _load(f, "updates", updates[number], k.index, column)
                flat = b.mul(at, f.extent("y", 2))
                if column.lanes > 1:
                    flat = b.add(flat, b.iota(flat.type))
                address = b.gep(results[number], flat, type)
                old = b.gather(value.type, address, there)
                b.scatter(scalar(b, "add", f.dtypes["y"], old, value), address, there)

    return column_work(kernel, target, 1.5, walk)


WORK: dict[str, Callable[[RoutineKernel, Target], Work]] = {
    "cumulative": _cumulative, "recurrence": _recurrence, "put_add": _put_add,
    "scatter_add": scatter_work, "scatter_set": scatter_work, "argsort": sort_work,
}
"""How each routine is cut and emitted."""
