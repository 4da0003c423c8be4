"""memory: when each arena buffer is alive, and which ones take over the memory of another.

Assumes that the body's order is final, that each launch's buffers match its kernel's arguments, and that
what an iteration of a loop needs from another one is also touched outside the loop, as carries are: by what
starts them. Guarantees, for every arena buffer, `first` (the position that first writes it) and `last` (the
last one that touches it, itself or through a view), both widened to the ends of loops that the buffer lives
through; `alias` where a kernel may write its result over an operand that dies there; that no
buffer is left that nothing touches; and that launches say what they write. Offsets are not chosen here but
by `bind`, once the symbols have values. Preserves every bit.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphflow.compiler.kernel.form import (
    ContractionKernel,
    Kernel,
    Load,
    Loop,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.routines import ROUTINES
from graphflow.compiler.kernel.walk import loops, subexpressions
from graphflow.compiler.passes.stack_memory import stack_aliases
from graphflow.compiler.plan.dims import DimLike, symbol
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.plan.schema import (
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Launch,
    Repeat,
    base_of,
    map_items,
    places,
)


def memory(program: KernelProgram) -> KernelProgram:
    """The program with lifetimes and in-place results; CompilerError if a value is read before it is
    written."""
    plan = program.plan
    table = {b.id: b for b in plan.buffers}
    lives = _lifetimes(program, table)
    aliases = _aliases(program, table, lives)
    kept = []
    for b in plan.buffers:
        if b.role == "arena" and b.id in lives:
            first, last = lives[b.id]
            kept.append(replace(b, first=first, last=last, alias=aliases.get(b.id, "")))
        elif b.role != "arena":
            kept.append(b)
    bases = {b.id for b in kept if b.role != "view"}
    kept = [b for b in kept if b.role != "view" or b.base in bases]
    kept.sort(key=_order)
    body = map_items(plan.body, lambda item: replace(item, writes=accesses(program, item)[1])
                     if isinstance(item, Launch) else item)
    return replace(program, plan=replace(plan, buffers=tuple(kept), body=body))


def _order(b: Buffer) -> tuple[int, int]:
    """What is taken over comes before who takes it over, views come last."""
    return ("arena", "view").index(b.role) + 1 if b.role in ("arena", "view") else 0, b.first


def accesses(program: KernelProgram, item: Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(ids of the buffers that the item reads, ids of those that it writes)."""
    if isinstance(item, Check):
        return (item.buffer,), ()
    if isinstance(item, Copy):
        return (item.source,), (item.target,)
    if isinstance(item, Repeat):
        return ((item.condition,) if item.condition else ()), ()
    if isinstance(item, Branch):
        return (item.predicate,), ()
    arguments = program.kernels[item.kernel].arguments
    if len(arguments) != len(item.buffers):
        message = f"{item.kernel} takes {len(arguments)} buffers, a launch gives it {len(item.buffers)}"
        raise CompilerError(message, stage="memory")
    pairs = list(zip(arguments, item.buffers))
    reads = tuple(id for a, id in pairs if "r" in a.mode)
    return reads, tuple(id for a, id in pairs if "w" in a.mode)


def _lifetimes(program: KernelProgram, table: dict[str, Buffer]) -> dict[str, tuple[int, int]]:
    """Buffer -> (first, last position) for every arena buffer that the body touches. A buffer that is
    touched both in a loop and outside lives through all of the loop, and so does all that is touched in a
    loop that is cut along rows."""
    touched: dict[str, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    cut = {(p.position, p.last) for p in places(program.plan.body)
           if isinstance(p.item, Repeat) and p.item.rows != 0}
    for place in places(program.plan.body):
        reads, writes = ([base_of(table, id) for id in ids] for ids in accesses(program, place.item))
        loops, ends = place.loops, (place.position, place.position)
        if isinstance(place.item, Repeat):
            loops = (*loops, (place.position, place.last))     # its condition is looked at before each trip
        if loops and loops[-1] in cut:                         # every thread is at another step of it
            loops, ends = loops[:-1], loops[-1]
        for id in reads:
            if table[id].role == "arena" and id not in touched:
                message = f"item {place.position} of the body reads {id}, which nothing wrote before"
                raise CompilerError(message, stage="memory")
        for id in (*reads, *writes):
            if table[id].role == "arena":
                touched.setdefault(id, []).extend((position, loops) for position in ends)
    return {id: _life(found) for id, found in touched.items()}


def _life(touched: list[tuple[int, tuple[tuple[int, int], ...]]]) -> tuple[int, int]:
    """(first, last) from the positions that touch a buffer, each with the loops around it."""
    depth = 0
    while all(len(loops) > depth and loops[depth] == touched[0][1][depth] for _, loops in touched):
        depth += 1
    spans = [loops[depth] if len(loops) > depth else (position, position) for position, loops in touched]
    return min(first for first, _ in spans), max(last for _, last in spans)


def _aliases(program: KernelProgram, table: dict[str, Buffer], lives: dict[str, tuple[int, int]]
             ) -> dict[str, str]:
    """Buffer -> the one whose memory it takes over."""
    out: dict[str, str] = {}
    taken: set[str] = set()
    proved: dict[tuple[str, int, int], bool] = {}
    for position, _, item, _ in places(program.plan.body):
        if not isinstance(item, Launch):
            continue
        kernel = program.kernels[item.kernel]
        for target in range(len(item.buffers)):
            for source in range(len(item.buffers)):
                x, y = item.buffers[source], item.buffers[target]
                if y in out or x in taken or not _may_share(item, kernel, table, source, target):
                    continue
                if lives[x][1] != position or lives[y][0] != position:
                    continue
                key = (item.kernel, source, target)
                if key not in proved:
                    proved[key] = reads_before_writing(kernel, kernel.arguments[source].name,
                                                       kernel.arguments[target].name)
                if proved[key]:
                    out[y] = x
                    taken.add(x)
    for y, x in stack_aliases(program, table, lives, reads_before_writing):
        if y not in out and x not in taken:
            out[y] = x
            taken.add(x)
    return out


def _may_share(item: Launch, kernel: Kernel, table: dict[str, Buffer], source: int, target: int) -> bool:
    """Whether two buffers of a launch, one read and one written, are of one size and form."""
    x, y = table[item.buffers[source]], table[item.buffers[target]]
    formal_x, formal_y = kernel.arguments[source], kernel.arguments[target]
    bases = [base_of(table, id) for id in item.buffers]
    return (x.role == y.role == "arena" and x.id != y.id and formal_x.mode == "r" and formal_y.mode == "w"
            and (x.dtype, x.shape, x.layout) == (y.dtype, y.shape, y.layout)
            and formal_x.shape == formal_y.shape
            and bases.count(x.id) == bases.count(y.id) == 1)


@dataclass(frozen=True)
class _Access:
    """A load or a store: `path` names the enclosing loops (place in the text, variable), `order` counts
    accesses in the order of the text."""
    order: int
    path: tuple[tuple[int, str], ...]
    index: tuple[DimLike, ...]


def reads_before_writing(kernel: Kernel, source: str, target: str) -> bool:
    """Whether the kernel reads every element of `source` before anything writes that element of `target`,
    whatever the order and the threads in which its iterations run: then both can be the same memory."""
    if isinstance(kernel, RoutineKernel):
        return source in ROUTINES[kernel.routine].takes_over
    loads: list[_Access] = []
    stores: list[_Access] = []
    early = [*kernel.indirect.values()]
    if isinstance(kernel, ContractionKernel):
        c = kernel.contraction
        early += [c.a, c.b]
        path = tuple((0, var) for var, _ in (*c.batch, *c.m, *c.n))
        _collect((*c.lets, *c.stores), path, source, target, loads, stores)
    else:
        _collect(kernel.body, (), source, target, loads, stores)
    if any(isinstance(x, Load) and x.arg == source for e in early for x in subexpressions(e)):
        return False
    extents = dict(loops(kernel))
    return bool(stores) and all(_safe(load, store, extents) for load in loads for store in stores)


def _safe(load: _Access, store: _Access, extents: Mapping[str, DimLike]) -> bool:
    """Whether both never touch the same element, or the load comes first in every iteration of the loops that
    both are in, and no other iteration of these writes what it reads: each of their variables, perhaps with a
    number added, is the index along one and the same axis."""
    shared = [a[1] for a, b in zip(load.path, store.path) if a == b]
    pairs = list(zip(load.index, store.index))
    apart = {var: {i - j for i, j in pairs if all(isinstance(d - symbol(var), int) for d in (i, j))}
             for var in shared}
    for var, shifts in apart.items():
        extent = extents[var]
        if isinstance(extent, int) and any(isinstance(s, int) and abs(s) >= extent for s in shifts):
            return True
    if load.order > store.order:
        return False
    if (load.path, load.index) == (store.path, store.index):
        return True
    return all(0 in apart[var] for var in shared)


def _collect(body: tuple[Statement, ...], path: tuple[tuple[int, str], ...], source: str, target: str,
             loads: list[_Access], stores: list[_Access]) -> None:
    """Appends the loads of `source` and the stores to `target`."""
    for number, s in enumerate(body):
        if isinstance(s, Loop):
            _collect(s.body, (*path, (number, s.var)), source, target, loads, stores)
            continue
        for x in subexpressions(s.value):
            if isinstance(x, Load) and x.arg == source:
                loads.append(_Access(len(loads) + len(stores), path, x.index))
        if isinstance(s, Store) and s.arg == target:
            stores.append(_Access(len(loads) + len(stores), path, s.index))
