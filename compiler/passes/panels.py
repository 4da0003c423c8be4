"""What a loop multiplies with at every step is packed once, before it (part of tile).

A contraction reads its right operand b as panels, [k][columns], which are packed by whoever runs the kernel.
In a loop in which b stays the same, every step would do that anew. Here a kernel before the loop writes all
panels to an array of its own, [panel, group, k…, column], and the contraction in the loop reads that
(`emit/operands.packed_columns` recognises it). What takes several loops no change leaves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphflow.compiler.emit.candidates import special
from graphflow.compiler.emit.operands import PANELS, arranged, flat_index, flattened, names_of
from graphflow.compiler.emit.tiling import contraction_tiling
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    Apply,
    Argument,
    Const,
    ContractionKernel,
    Expr,
    Guard,
    Guarded,
    Index,
    Kernel,
    Let,
    Load,
    Loop,
    LoopKernel,
    Reduce,
    Statement,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import DimLike, ceildiv, simplify, substitute, symbol, symbols_of
from graphflow.compiler.plan.schema import (
    Buffer,
    Copy,
    Item,
    Launch,
    Repeat,
    base_of,
    launches,
    map_items,
    places,
)
from graphflow.compiler.target import Target


def pack_once(program: KernelProgram, target: Target) -> KernelProgram:
    """The program with the panels of loops packed before them."""
    made = _Packing(program, target)
    body = made.items(program.plan.body, ())
    if not made.buffers:
        return program
    plan = replace(program.plan, buffers=(*program.plan.buffers, *made.buffers), body=body)
    used = {item.kernel for item in launches(body)}
    kernels = {name: k for name, k in {**program.kernels, **made.kernels}.items() if name in used}
    return ordered(KernelProgram(plan, kernels))


def ordered(program: KernelProgram) -> KernelProgram:
    """The program, with each launch that overwrites a state naming those before it that touch the state."""
    table = {b.id: b for b in program.plan.buffers}
    readers: dict[str, list[int]] = {}
    after: dict[int, tuple[int, ...]] = {}
    for place in places(program.plan.body):
        item = place.item
        ids = item.buffers if isinstance(item, Launch) else (item.source,) if isinstance(item, Copy) else ()
        states = {base_of(table, id) for id in ids if table[base_of(table, id)].role == "state"}
        if isinstance(item, Launch):
            arguments = program.kernels[item.kernel].arguments
            written = {id for a, id in zip(arguments, item.buffers) if a.mode != "r"} & states
            after[place.position] = tuple(sorted({p for id in written for p in readers.get(id, ())}))
        for id in states:
            readers.setdefault(id, []).append(place.position)
    names = iter(sorted(after))               # launches are visited by position
    body = map_items(program.plan.body, lambda item: replace(item, after=after[next(names)])
                     if isinstance(item, Launch) else item)
    return replace(program, plan=replace(program.plan, body=body))


@dataclass
class _Packing:
    """What has been made: buffers, kernels, and, for each loop, the launches that go before it."""

    program: KernelProgram
    target: Target
    buffers: list[Buffer] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    before: dict[str, list[Launch]] = field(default_factory=dict)
    done: dict[tuple[str, str, tuple[str, ...]], str] = field(default_factory=dict)

    def items(self, body: Sequence[Item], loops: tuple[Repeat, ...]) -> tuple[Item, ...]:
        """The items of a body inside these loops."""
        out: list[Item] = []
        for item in body:
            if isinstance(item, Repeat):
                inner = self.items(item.body, (*loops, item))
                out += self.before.pop(item.counter, ())
                out.append(replace(item, body=inner))
            elif isinstance(item, Launch) and loops:
                out.append(self.launch(item, loops))
            else:
                out.append(item)
        return tuple(out)

    def launch(self, item: Launch, loops: tuple[Repeat, ...]) -> Launch:
        """The launch, reading panels that are packed before the outermost loop that b stays the same in."""
        kernel = self.program.kernels[item.kernel]
        if not isinstance(kernel, ContractionKernel) or not packs(kernel, self.target):
            return item
        given = dict(zip((a.name for a in kernel.arguments), item.buffers))
        read = tuple(given[name] for name in sorted(loaded(kernel.contraction.b)))
        same: list[Repeat] = []
        for loop in reversed(loops):
            if not self.fixed(read, loop):
                break
            same.append(loop)
        if not any(_long(loop.trips) for loop in same):
            return item
        head, tail = panel_kernels(kernel, self.target)
        self.kernels.update({head.name: head, tail.name: tail})
        outermost = same[-1]
        key = (outermost.counter, repr(replace(head, name="")), read)
        if key not in self.done:
            self.done[key] = self.pack(item, head, given, outermost)
        given[PANELS] = self.done[key]
        return replace(item, kernel=tail.name, buffers=tuple(given[a.name] for a in tail.arguments))

    def pack(self, item: Launch, head: LoopKernel, given: Mapping[str, str], loop: Repeat) -> str:
        """Appends the launch that packs; gives the buffer of the panels."""
        last = head.arguments[-1]
        id = f"p{len(self.buffers)}"
        assert not any(b.id == id for b in self.program.plan.buffers)
        self.buffers.append(Buffer(id, "arena", PANELS, last.dtype, last.shape, origins=item.origins))
        ids = tuple(id if a is last else given[a.name] for a in head.arguments)
        self.before.setdefault(loop.counter, []).append(Launch(head.name, ids, 1, origins=item.origins))
        return id

    def fixed(self, ids: Sequence[str], loop: Repeat) -> bool:
        """Whether nothing in the loop writes the buffers, and none is other memory at every step."""
        table = {b.id: b for b in self.program.plan.buffers}
        counters = {loop.counter} | {p.item.counter for p in places(loop.body) if isinstance(p.item, Repeat)}
        if any(symbols_of(table[id].offset) & counters for id in ids):
            return False
        bases = {base_of(table, id) for id in ids}
        for place in places(loop.body):
            if isinstance(place.item, Copy) and base_of(table, place.item.target) in bases:
                return False
            if isinstance(place.item, Launch):
                arguments = self.program.kernels[place.item.kernel].arguments
                pairs = zip(arguments, place.item.buffers)
                if any(a.mode != "r" and base_of(table, id) in bases for a, id in pairs):
                    return False
        return True


def _long(trips: DimLike) -> bool:
    return not isinstance(trips, int) or trips > 1


def loaded(e: Expr) -> set[str]:
    """The arguments that an expression reads."""
    return {x.arg for x in walk.subexpressions(e) if isinstance(x, Load)}


def packs(kernel: ContractionKernel, target: Target) -> bool:
    """Whether the kernel packs panels that are the same for all batch elements, of a size that is known."""
    c = kernel.contraction
    if c != replace(arranged(kernel, target), k=c.k) or not c.k or special(kernel, target) is not None:
        return False
    constant = all(isinstance(extent, int) and extent > 0 for _, extent in (*c.n, *c.k))
    own = {var for var, _ in c.batch} | set(kernel.indirect)
    return (constant and not names_of(c.b) & own and bool(loaded(c.b)) and c.a.dtype.name in ("f32", "f64")
            and contraction_tiling(kernel, target).reused)


def panel_kernels(kernel: ContractionKernel, target: Target) -> tuple[LoopKernel, ContractionKernel]:
    """(the kernel that packs all panels, the contraction that reads them)."""
    c, t = kernel.contraction, contraction_tiling(kernel, target)
    panels, columns = ceildiv(t.n_total, t.nr), flattened(c.n)
    assert isinstance(panels, int) and isinstance(t.n_total, int)
    axes = (*c.groups, *c.k)
    array = Argument(PANELS, c.b.dtype, (panels, *(extent for _, extent in axes), t.nr), "w")
    between = tuple(symbol(var) for var, _ in axes)
    loops = (("panel", panels), *axes, ("column", t.nr))
    at = symbol("panel") * t.nr + symbol("column")
    values = flat_index(c.n, at)
    assert values is not None
    bounds = {var: (0, extent - 1) for var, extent in loops if isinstance(extent, int)}
    value = substituted(c.b, {var: simplify(d, bounds) for var, d in values.items()})
    if t.n_total % t.nr:
        value = Guarded((Guard(at, t.n_total),), value, Const(0.0, c.b.dtype))
    body: tuple[Statement, ...] = (Store(PANELS, (symbol("panel"), *between, symbol("column")), value),)
    for var, extent in reversed(loops):
        body = (Loop(var, extent, body, "grid"),)
    inside = tuple(a for a in kernel.arguments if a.name in loaded(c.b))
    head = LoopKernel(f"{kernel.name}_pack", (*inside, array), body)
    b = Load(PANELS, (columns // t.nr, *between, columns % t.nr), c.b.dtype)
    tail = replace(kernel, name=f"{kernel.name}_packed", contraction=replace(c, b=b),
                   arguments=(*kernel.arguments, replace(array, mode="r")))
    used = walk.loaded(tail) | {s.arg for s in walk.stores(tail)}
    tail = replace(tail, arguments=tuple(a for a in tail.arguments if a.name in used))
    return replace(head, symbols=walk.symbols(head)), replace(tail, symbols=walk.symbols(tail))


def substituted(e: Expr, values: Mapping[str, DimLike]) -> Expr:
    """The expression with its variables replaced in every index."""
    def dims(index: Sequence[DimLike]) -> tuple[DimLike, ...]:
        return tuple(substitute(d, values) for d in index)

    if isinstance(e, Load):
        return replace(e, index=dims(e.index))
    if isinstance(e, Index):
        return replace(e, at=substitute(e.at, values))
    if isinstance(e, Apply):
        return replace(e, args=tuple(substituted(x, values) for x in e.args))
    if isinstance(e, Guarded):
        guards = tuple(Guard(*dims((g.at, g.bound))) for g in e.guards)
        return Guarded(guards, substituted(e.value, values), substituted(e.fill, values))
    if isinstance(e, Reduce):
        return replace(e, operands=tuple(substituted(x, values) for x in e.operands),
                       lets=tuple(Let(x.name, substituted(x.value, values)) for x in e.lets))
    return e
