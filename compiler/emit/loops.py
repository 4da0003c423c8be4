"""Loop kernels as functions ``void NAME(ptr args, i64 begin, i64 end, i64 worker)``.

`args` is an array of 8-byte slots: the addresses of the kernel's arguments, the values of its symbols, the
address of the scratch area, the bytes of scratch per worker. The function runs tasks [begin, end). Tasks
are cut by shapes only.

What is accepted: grid loops outermost and perfectly nested (none is fine); at most one lanes loop on a
path, with Lets, Stores and serial loops inside; reductions with or without `lanes`. A lanes loop that is
all there is inside the grid is cut into chunks, so it may be long.

Fast are accesses that are the same for all lanes or walk neighbouring elements. Lanes that lie close
together (backwards, strides up to 4, ``v // c`` and ``v % c`` for c of 2, 4 or 8) cost some shuffles. Other
``// c`` and ``% c`` of the vectorised variable and indirect numbers are gathers, unless c is a multiple of 8,
16 or 32, when whole vectors lie between two multiples of c. Short lanes loops waste the rest of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from graphflow.compiler.emit.builder import I64, PTR, Builder, Module, Value, constant
from graphflow.compiler.emit.cost import TASK_NS, statement_ns, trips
from graphflow.compiler.emit.expr import Emitter
from graphflow.compiler.emit.halves import emit_halves, has_halves
from graphflow.compiler.emit.nodes import Node, Nodes
from graphflow.compiler.emit.reduction import is_short, join_reductions
from graphflow.compiler.emit.width import lane_count, reachable
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import Guard, Guarded, Kernel, Let, Loop, LoopKernel, Statement, Store
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, symbol
from graphflow.compiler.target import Target

CHUNK_ALIGN = 128
"""Chunks of a lanes loop start at multiples of this many elements."""
MASKED_NODES = 24
"""Bodies with more operations than this are emitted once, masked, where masks are cheap, rather than
twice."""
MOST_IN_PARTS = 4096
"""A lanes loop of more elements is cut into chunks, even if it is a concatenation."""
LONG_PIECE, MAX_PIECES = 32, 8
"""A loop is cut where its guards change into at most so many pieces, each of at least that many elements."""


@dataclass(frozen=True)
class Tasks:
    """How a loop kernel is cut: each task runs `rows` iterations of the flattened grid, or, where `chunk`
    is set, that many iterations of the lanes loop of one row. `count` is the number of tasks."""

    grid: tuple[Loop, ...]
    body: tuple[Statement, ...]
    rows: int
    chunk: int
    count: DimLike


def cut(kernel: LoopKernel) -> Tasks:
    """Cuts a kernel into tasks."""
    if kernel.rows:
        (loop,) = kernel.body
        assert isinstance(loop, Loop)
        return Tasks((loop,), loop.body, 1, 0, loop.extent)
    grid: list[Loop] = []
    body = kernel.body
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].kind == "grid":
        grid.append(body[0])
        body = body[0].body
    rows = product(loop.extent for loop in grid)
    row_ns = max(sum(statement_ns(s, False) for s in body), 1e-3)
    alone = body[0] if len(body) == 1 and isinstance(body[0], Loop) and body[0].kind == "lanes" else None
    if alone is not None and _in_parts(kernel, alone):
        alone = None
    if alone is not None and (row_ns > 2 * TASK_NS or not isinstance(alone.extent, int)):
        chunk = _round_up(max(1, int(TASK_NS * trips(alone.extent) / row_ns)), CHUNK_ALIGN)
        return Tasks(tuple(grid), body, 1, chunk, rows * ceildiv(alone.extent, chunk))
    if not grid:
        return Tasks((), body, 1, 0, 1)
    each = max(1, math.ceil(TASK_NS / row_ns))
    return Tasks(tuple(grid), body, each, 0, ceildiv(rows, each))


def _in_parts(kernel: LoopKernel, loop: Loop) -> bool:
    """Whether guards begin or cease to hold within the loop: as between the parts of a concatenation. It is
    then run whole, in pieces that need no masks."""
    places = {place for e in walk.expressions(kernel) if isinstance(e, Guarded) for g in e.guards
              for place in _places(g, loop.var)}
    most = loop.extent if isinstance(loop.extent, int) and loop.extent <= MOST_IN_PARTS else 0
    return any(0 < place < most for place in places)


def _places(g: Guard, var: str) -> list[int]:
    """Where a guard on `var` alone begins and ceases to hold."""
    shift = g.at - symbol(var)
    return [-shift, g.bound - shift] if isinstance(shift, int) and isinstance(g.bound, int) else []


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def start_function(module: Module, kernel: Kernel, target: Target) -> Emitter:
    """Starts the kernel's function: an emitter with arguments and symbols bound."""
    b = module.function(kernel.name, [("args", PTR), ("begin", I64), ("end", I64), ("worker", I64)])
    b.fused = target.has_fma
    e = Emitter(b, target, Nodes(kernel.indirect), {a.name: a for a in kernel.arguments})
    slots = b.params[0]
    for i, argument in enumerate(kernel.arguments):
        e.pointers[argument.name] = b.load(PTR, b.gep(slots, i, I64))
    for i, name in enumerate(kernel.symbols):
        e.scopes.bind(name, b.load(I64, b.gep(slots, len(kernel.arguments) + i, I64)))
    return e


def emit_loop_kernel(module: Module, kernel: LoopKernel, target: Target) -> None:
    """Adds the kernel's function to the module."""
    e = start_function(module, kernel, target)
    b, tasks = e.b, cut(kernel)
    _, begin, end, _ = b.params
    for loop in tasks.grid:
        _bound(e, loop)
    with e.scopes.loop("task ", begin, end) as task:
        task.next()
        if tasks.chunk:
            lanes = tasks.body[0]
            assert isinstance(lanes, Loop)
            chunks = e.scalar(ceildiv(lanes.extent, tasks.chunk))
            _decode(e, tasks.grid, b.udiv(task.index, chunks) if tasks.grid else None)
            start = b.mul(b.urem(task.index, chunks) if tasks.grid else task.index, tasks.chunk)
            stop = b.intrinsic("smin", b.add(start, tasks.chunk), e.scalar(lanes.extent))
            _lanes(e, lanes, start, stop)
        elif tasks.rows == 1:
            _decode(e, tasks.grid, task.index)
            statements(e, tasks.body)
        else:
            start = b.mul(task.index, tasks.rows)
            total = e.scalar(product(loop.extent for loop in tasks.grid))
            stop = b.intrinsic("smin", b.add(start, tasks.rows), total)
            with e.scopes.loop("row ", start, stop) as row:
                row.next()
                _decode(e, tasks.grid, row.index)
                statements(e, tasks.body)
    b.ret()


def _bound(e: Emitter, loop: Loop) -> None:
    e.bounds[loop.var] = (0, loop.extent - 1 if isinstance(loop.extent, int) else None)


def _decode(e: Emitter, grid: Sequence[Loop], flat: Value | None) -> None:
    """Binds the variables of the grid loops to those of iteration `flat`, row-major."""
    for loop in reversed(grid[1:]):
        assert flat is not None
        extent = e.scalar(loop.extent)
        rest = e.b.udiv(flat, extent)
        e.scopes.bind(loop.var, e.b.sub(flat, e.b.mul(rest, extent)))
        flat = rest
    if grid:
        assert flat is not None
        e.scopes.bind(grid[0].var, flat)


def statements(e: Emitter, body: Sequence[Statement]) -> None:
    """Emits statements in order. A Let is evaluated where it stands, but for reductions that neighbours
    take along."""
    for i, s in enumerate(body):
        if isinstance(s, Let):
            if i == 0 or not isinstance(body[i - 1], Let):
                neighbours = takewhile(lambda x: isinstance(x, Let), body[i:])
                join_reductions(e, e.nodes.lets(x for x in neighbours if isinstance(x, Let)))
            (node,) = e.nodes.lets((s,))
            e.value(node)
        elif isinstance(s, Store):
            e.store(s)
        elif s.kind == "lanes" and e.scopes.lane is None:
            _lanes(e, s, constant(I64, 0), e.scalar(s.extent))
        else:
            _bound(e, s)
            with e.scopes.loop(s.var, constant(I64, 0), e.scalar(s.extent)) as loop:
                loop.next()
                statements(e, s.body)


def _lanes(e: Emitter, loop: Loop, start: Value, stop: Value) -> None:
    """A vectorised loop over [start, stop), `start` a multiple of CHUNK_ALIGN."""
    _bound(e, loop)
    roots, dims = _survey(e, loop.body)
    if has_halves(e, loop, roots, dims):
        emit_halves(e, loop, roots, start, stop)
        return
    if not (start.is_constant and stop.is_constant):
        _piece(e, loop, roots, dims, start, stop)
        return
    ends = [int(start.name), *_changes(roots, loop.var, int(start.name), int(stop.name)), int(stop.name)]
    for first, last in zip(ends, ends[1:]):
        e.bounds[loop.var] = (first, last - 1)
        _piece(e, loop, roots, dims, constant(I64, first), constant(I64, last))


def _changes(roots: Sequence[Node], var: str, start: int, stop: int) -> list[int]:
    """Where, within a loop, guards on its variable begin or cease to hold, as far as what lies between is
    worth a loop of its own: as between the parts of a concatenation."""
    found = {place for node in reachable(roots) if node.kind == "guarded" for g in node.data
             for place in _places(g, var)}
    ends = [start]
    for x in sorted(found):
        if x - ends[-1] >= LONG_PIECE and stop - x >= LONG_PIECE:
            ends.append(x)
    return ends[1:] if len(ends) <= MAX_PIECES else []


def _piece(
    e: Emitter, loop: Loop, roots: Sequence[Node], dims: Sequence[DimLike], start: Value, stop: Value
) -> None:
    """A vectorised loop over the elements from `start` to `stop` of the loop's."""
    first = int(start.name) if start.is_constant else 0
    extent = int(stop.name) - first if start.is_constant and stop.is_constant else loop.extent
    count = lane_count(e, roots, loop.var, extent, _vectors(roots, loop.var, extent, e.target), dims)

    def body(carry: list[Value]) -> list[Value]:
        statements(e, loop.body)
        return []

    e.scopes.lanes(
        loop.var,
        start,
        stop,
        count,
        body,
        masked_only=e.target.vector_bytes == 64 and _operations(loop.body) > MASKED_NODES,
        align=math.gcd(first, count),
    )


def _vectors(roots: Sequence[Node], var: str, extent: DimLike, target: Target) -> int:
    """How many registers of elements are worked on at a time. Where long sums run down columns: as many as
    memory holds side by side, and as registers hold sums, so that memory is read in long runs."""
    sums = sum(len(n.args) for n in reachable(roots)
               if n.kind == "reduce" and var in n.deps and not is_short(n.data[1]))
    if not sums or not isinstance(extent, int):
        return 2
    most = target.vector_registers // 2 // sums
    lanes = target.vector_bytes // 4
    return next((v for v in (8, 4) if v <= most and extent % (v * lanes) == 0), 2)


def _survey(e: Emitter, body: Sequence[Statement]) -> tuple[list, list[DimLike]]:
    """The nodes of the body's values and the element numbers of its stores."""
    roots, dims = [], []
    for s in body:
        if isinstance(s, Let):
            roots += e.nodes.lets((s,))
        elif isinstance(s, Store):
            roots.append(e.nodes.of(s.value))
            dims.append(e.offset(s.arg, s.index))
            widest = e.arguments[s.arg]
            if widest.dtype.bytes == 8:
                roots.append(e.nodes.make("load", (s.arg, s.index, -1), (), widest.dtype, s.index))
        else:
            inner = _survey(e, s.body)
            roots += inner[0]
            dims += inner[1]
    return roots, dims


def _operations(body: Sequence[Statement]) -> int:
    """About how many instructions the body's expressions become."""
    total = 0.0
    for s in body:
        total += statement_ns(s, True) / 0.03
    return int(total)


__all__ = ["Builder", "Tasks", "cut", "emit_loop_kernel", "start_function", "statements"]
