"""tile: decides how each loop of a kernel runs. LoopKernel -> LoopKernel, ContractionKernel ->
ContractionKernel.

What it hands to the emitters (and what `lower` hands to it differs only in that no loop is marked "lanes",
loops are not collapsed and `Contraction.tile` is empty):

- Loops of kind "grid" are outermost and perfectly nested; iterations are independent. They may be none.
- At most one loop of kind "lanes" lies on any path. It is vectorised: its iterations are independent. It may
be
    * the innermost loop, below grid loops (elementwise) - where there are no grid loops at all, or too few,
    the
      emitter also cuts the lanes loop into chunks, by a rule of shapes only, so that tasks = grid x chunks;
    * above serial loops and Lets with Reduce (a column reduction: lanes run over the columns, the Reduce over
    the rows);
    * inside a row body: grid row loop { Let m = Reduce(lanes=k); Let s = Reduce(lanes=k); loop k lanes {
    Store } }.
- A Reduce with `lanes` set is vectorised over that one of its own loop variables (the innermost one); one
without runs
  serially inside whatever encloses it - inside a lanes loop that means one vector of independent reductions.
- Adjacent axes that every argument walks contiguously are collapsed: an Argument's shape is then a reshape of
the
  buffer's shape with the same row-major elements.
- A full reduction to few elements is split by `lower` into two kernels (partials, then a fixed tree), never
here.
- Contraction.tile stays empty, but where the ways to compute it were timed (`compiler/tune.py`): the emitter
decides
  from the target and the shapes.

The choice is a function of the kernel and the target alone: results keep their bits for any number of
threads.
"""

from __future__ import annotations

from dataclasses import replace

from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    Apply,
    Expr,
    Guarded,
    Kernel,
    Let,
    Load,
    Loop,
    LoopKernel,
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.passes.collapse import collapse
from graphflow.compiler.plan.dims import DimLike, symbol


def tile(program: KernelProgram) -> KernelProgram:
    """Every kernel of the program, tiled."""
    return replace(program, kernels={name: tile_kernel(k) for name, k in program.kernels.items()})


def tile_kernel(kernel: Kernel) -> Kernel:
    """One kernel: loops collapsed, then the lanes chosen. A contraction's tile and a routine are left to the
    emitter."""
    if isinstance(kernel, RoutineKernel):
        return kernel
    if isinstance(kernel, LoopKernel) and kernel.rows:
        (loop,) = kernel.body
        assert isinstance(loop, Loop)
        row = tile_kernel(replace(kernel, body=loop.body, rows=False))
        assert isinstance(row, LoopKernel)
        return replace(row, body=(replace(loop, body=row.body),), rows=True)
    kernel = collapse(kernel)
    if not isinstance(kernel, LoopKernel):
        return kernel
    grid, inner = _grid(kernel.body)
    if not any(isinstance(s, Loop) for s in inner) and not any(_reduces(s) for s in inner):
        return replace(kernel, body=_rebuild_grid(grid, inner, -1 if grid else None))
    if grid and _unit_stride(kernel, grid[-1].var) and not _inner_unit_stride(kernel, inner):
        return replace(kernel, body=_rebuild_grid(grid, inner, -1))
    return replace(kernel, body=_rebuild_grid(grid, tuple(_row_lanes(s) for s in inner), None))


def _grid(body: tuple[Statement, ...]) -> tuple[list[Loop], tuple[Statement, ...]]:
    """The perfectly nested grid loops and what is inside them."""
    loops: list[Loop] = []
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].kind == "grid":
        loops.append(body[0])
        body = body[0].body
    return loops, body


def _rebuild_grid(grid: list[Loop], inner: tuple[Statement, ...], lanes: int | None) -> tuple[Statement, ...]:
    for position, loop in reversed(list(enumerate(grid))):
        kind = "lanes" if lanes is not None and position == len(grid) + lanes else "grid"
        inner = (replace(loop, body=inner, kind=kind),)
    return inner


def _reduces(s: Statement) -> bool:
    return isinstance(s, (Let, Store)) and any(isinstance(e, Reduce) for e in walk.subexpressions(s.value)
                                               if isinstance(e, Reduce) and _is_long(e))


SHORT = 64
"""A reduction over at most this many elements (a pooling window) runs serially inside vectorised elements."""


def _is_long(e: Reduce) -> bool:
    size: DimLike = 1
    for _, extent in e.loops:
        size = size * extent
    return not (isinstance(size, int) and size <= SHORT)


def _accesses(kernel: LoopKernel) -> list[tuple[DimLike, ...]]:
    """The indices of all loads and stores, without axes of one element at their end."""
    shapes = {a.name: a.shape for a in kernel.arguments}
    found = [(e.arg, e.index) for e in walk.expressions(kernel) if isinstance(e, Load)]
    found += [(s.arg, s.index) for s in walk.stores(kernel)]
    ends = [max((i + 1 for i in range(len(index)) if shapes[arg][i] != 1), default=0) for arg, index in found]
    return [index[:end] for (_, index), end in zip(found, ends)]


def _unit_stride(kernel: LoopKernel, var: str) -> bool:
    """Whether `var` walks the last axis of what the kernel reads, wherever it is used in more than one
    axis."""
    return any(index and index[-1] == symbol(var) for index in _accesses(kernel) if len(index) > 1)


def _inner_unit_stride(kernel: LoopKernel, inner: tuple[Statement, ...]) -> bool:
    """Whether a long reduction or an inner loop walks a last axis."""
    variables = {v for e in walk.expressions(kernel) if isinstance(e, Reduce) and _is_long(e)
                 for v, _ in e.loops[-1:]}
    for s in inner:
        while isinstance(s, Loop):
            last = s.var
            s = s.body[-1]
            if not isinstance(s, Loop):
                variables.add(last)
    names = [symbol(v) for v in variables]
    return any(index and index[-1] in names for index in _accesses(kernel))


def _row_lanes(s: Statement) -> Statement:
    """Vectorises the reductions and the innermost loop of a row."""
    if isinstance(s, Loop):
        if any(isinstance(x, Loop) for x in s.body):
            return replace(s, body=tuple(_row_lanes(x) for x in s.body))
        return replace(s, kind="lanes")
    return replace(s, value=_lane_reductions(s.value))


def _lane_reductions(e: Expr) -> Expr:
    if isinstance(e, Reduce):
        return replace(e, lanes=e.loops[-1][0]) if e.loops and not e.lanes else e
    if isinstance(e, Apply):
        return replace(e, args=tuple(_lane_reductions(x) for x in e.args))
    if isinstance(e, Guarded):
        return replace(e, value=_lane_reductions(e.value))
    return e
