"""Kernels of fused nodes: the loop nest or contraction that computes a region, before tiling.

Arguments are named a0, a1, … in the order of the region's parameters, then of its results; a result that is
written over a state which the region also reads shares that argument ("rw"). Names of loops and locals are
made in a fixed order, so that equal regions give equal kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    Argument,
    Contraction,
    ContractionKernel,
    Expr,
    Guard,
    Kernel,
    Load,
    Local,
    Loop,
    LoopKernel,
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.routines import ROUTINES
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Contract, Routine
from graphflow.compiler.passes.access import domain, reduced_axes
from graphflow.compiler.passes.evaluate import Evaluator, Loops, OpPoint
from graphflow.compiler.passes.parts import made_at
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, symbol, typical
from graphflow.compiler.plan.layouts import CHANNELS_LAST, in_memory, is_layout

Index = tuple[DimLike, ...]
PIECE = "s0"
"""The variable that numbers the pieces of a split reduction."""


@dataclass
class Formals:
    """The formal arguments of a fused node's kernel. `slots`: for each argument ("in", i) or ("out", j); an
    argument that is both has the slot of its result. `layouts`: of the results. An argument's shape is in the
    order of memory, as are the indices of its loads and stores: kernels know nothing of layouts."""

    arguments: list[Argument]
    slots: list[tuple[str, int]]
    inputs: dict[Value, str]
    outputs: list[str]
    layouts: list[str]

    def store(self, j: int, index: Index, value: Expr) -> Store:
        """The store of an element of result j."""
        return Store(self.outputs[j], in_memory(self.layouts[j], index), value)

    def stores(self, j: int, result: Value, index: Index, e: Evaluator) -> tuple[Store, ...]:
        """The stores of an element of result j, or of one element of each of its parts."""
        if made_at(result) == result.shape:
            return (self.store(j, index, e.value(result, index)),)
        width = made_at(result)[-1]
        return tuple(self.store(j, (*index[:-1], index[-1] + number * width), e.value(part, index))
                     for number, part in enumerate(result.node.inputs))


def formals(node: Node, shared: dict[int, int]) -> Formals:
    """`shared`: operand number -> result number where both are the same buffer."""
    region = node.regions[0]
    f = Formals([], [], {}, [""] * len(region.results), [t.layout for t in node.types])
    for i, p in enumerate(region.parameters):
        name = f"a{len(f.arguments)}"
        f.inputs[p] = name
        mode, slot = ("r", ("in", i)) if i not in shared else ("rw", ("out", shared[i]))
        f.arguments.append(Argument(name, p.dtype, in_memory(p.type.layout, p.shape), mode))
        f.slots.append(slot)
        if i in shared:
            f.outputs[shared[i]] = name
    for j, r in enumerate(region.results):
        if not f.outputs[j]:
            f.outputs[j] = f"a{len(f.arguments)}"
            f.arguments.append(Argument(f.outputs[j], r.dtype, in_memory(f.layouts[j], r.shape), "w"))
            f.slots.append(("out", j))
    return f


def evaluator(node: Node, f: Formals) -> Evaluator:
    """An evaluator of the node's region over these arguments."""
    written = frozenset(a.name for a in f.arguments if a.mode == "rw")
    return Evaluator(node.regions[0], f.inputs, written)


def axes_of(prefix: str, extents: tuple[DimLike, ...], layout: str = "") -> tuple[Loops, Index]:
    """Loops over the extents, in the order of that layout, and the index that walks them; an axis of extent 1
    needs no loop."""
    order = in_memory(layout, range(len(extents)))
    loops = tuple((f"{prefix}{i}", extents[i]) for i in order if not _is_one(extents[i]))
    index = tuple(0 if _is_one(e) else symbol(f"{prefix}{i}") for i, e in enumerate(extents))
    return loops, index


def domain_layout(node: Node, shape: Sequence[DimLike]) -> str:
    """The layout of most elements that a kernel over that shape reads and writes."""
    sizes: dict[str, int] = {"": 0}
    for t in (*(p.type for p in node.regions[0].parameters), *node.types):
        if t.rank == len(shape) and is_layout(CHANNELS_LAST, t.rank) and product(t.shape[2:]) != 1:
            sizes[t.layout] = sizes.get(t.layout, 0) + typical(t.size)
    return max(sizes, key=lambda layout: sizes[layout])


def _is_one(e: DimLike) -> bool:
    return isinstance(e, int) and e == 1


def nest(loops: Loops, body: tuple[Statement, ...], kind: str) -> tuple[Statement, ...]:
    """The body inside the loops, the last innermost."""
    for name, extent in reversed(loops):
        body = (Loop(name, extent, body, kind),)
    return body


def map_kernel(name: str, node: Node, f: Formals) -> Kernel:
    """Every result at every element of one domain."""
    region, e = node.regions[0], evaluator(node, f)
    shape = made_at(region.results[0])
    loops, index = axes_of("i", shape, domain_layout(node, shape))
    e.declare(loops)
    stores = tuple(s for j, r in enumerate(region.results) for s in f.stores(j, r, index, e))
    return finish(name, e, f.arguments, nest(loops, (*e.scopes[0].lets, *stores), "grid"))


def row_kernel(name: str, node: Node, f: Formals) -> Kernel:
    """Reductions over rows, values made once per row, and values of every element of the row."""
    region, e = node.regions[0], evaluator(node, f)
    shape, axes = row_shape(node)
    loops, index = axes_of("i", shape, domain_layout(node, shape))
    outer = tuple((n, x) for n, x in loops if int(n[1:]) not in axes)
    inner = tuple((n, x) for n, x in loops if int(n[1:]) in axes)
    at_row = tuple(d for i, d in enumerate(index) if i not in axes)
    e.declare(outer)
    for n in region.nodes():
        if OPS[n.op].kind == "reduce":
            for r in n.results:
                e.value(r, at_row)
    by_row = [(j, r) for j, r in enumerate(region.results) if r.type.rank == len(at_row)]
    by_element = [(j, r) for j, r in enumerate(region.results) if r.type.rank != len(at_row)]
    for n in region.nodes():  # values of the row that elements use: made before the loop over elements
        if (by_element and n.types and n.types[0].shape == tuple(shape[i] for i in range(len(shape))
                                                                 if i not in axes)):
            if OPS[n.op].kind == "elementwise" and not any(v.shape == shape for v in n.inputs):
                e.value(n.result(), at_row)
    stores = [f.store(j, at_row, e.value(r, at_row)) for j, r in by_row]
    body: list[Statement] = list(e.scopes[0].lets)
    if by_element:
        e.scopes.append(type(e.scopes[0])())
        e.declare(inner)
        each = [f.store(j, index, e.value(r, index)) for j, r in by_element]
        body += nest(inner, (*e.scopes[-1].lets, *each), "serial")
    return finish(name, e, f.arguments, nest(outer, (*body, *stores), "grid"))


def row_shape(node: Node) -> tuple[tuple[DimLike, ...], tuple[int, ...]]:
    """The full shape of a row kernel's domain and the axes that its rows run along."""
    region = node.regions[0]
    for n in region.nodes():
        if OPS[n.op].kind == "reduce":
            return domain(n), reduced_axes(n)
    return max((r.shape for r in region.results), key=len), tuple(node.attrs["axes"])


def contraction_kernel(name: str, node: Node, f: Formals) -> Kernel:
    """The contraction with everything after it as its epilogue."""
    region, e = node.regions[0], evaluator(node, f)
    c, out_index = _contraction(node, e)
    anchor = _anchor(node)
    width = made_at(region.results[0])[-1] if c.groups else 0
    for group, name_of_sum in enumerate(c.accumulators):
        index = (*out_index[:-1], out_index[-1] + group * width) if c.groups else out_index
        e.preset(anchor.result(), index, Local(name_of_sum, anchor.types[0].dtype))
    stores = tuple(s for j, r in enumerate(region.results) for s in f.stores(j, r, out_index, e))
    return finish(name, e, f.arguments, replace(c, stores=stores, lets=tuple(e.scopes[0].lets)))


def _anchor(node: Node) -> Node:
    return next(n for n in node.regions[0].nodes() if OPS[n.op].kind == "contraction")


def column_groups(node: Node) -> int:
    """How many equal slices along the last axis of its contraction's result a kernel computes together; 1: it
    computes the result as it is."""
    whole, part = _anchor(node).types[0].shape, made_at(node.regions[0].results[0])
    if whole == part or not isinstance(whole[-1], int) or not isinstance(part[-1], int):
        return 1
    return whole[-1] // max(part[-1], 1)


def _contraction(node: Node, e: Evaluator, piece: int = 0) -> tuple[Contraction, Index]:
    """The region's contraction, yet without stores, and the index of its result. `piece` cuts the first k
    axis into pieces of that length, which become a leading batch axis."""
    anchor = _anchor(node)
    lowering = OPS[anchor.op].lowering
    assert isinstance(lowering, Contract)
    parts = lowering.parts(OpPoint(e, anchor))
    batch, at_batch = axes_of("b", parts.batch)
    m, at_m = axes_of("m", parts.m)
    count = column_groups(node)
    groups: tuple[tuple[str, int], ...] = (("g0", count),) if count > 1 else ()
    columns = tuple(d // count for d in parts.n)
    n, at_n = axes_of("n", columns)
    in_b = tuple(at + symbol("g0") * d for at, d in zip(at_n, columns)) if groups else at_n
    k, at_k = axes_of("k", parts.k)
    e.declare((*batch, *m, *n, *k, *groups))
    guards: list[Guard] = []
    if piece:
        whole = parts.k[0]
        first = symbol(PIECE) * piece + symbol("k0")
        batch = ((PIECE, ceildiv(whole, piece)), *batch)
        k = (("k0", piece), *(x for x in k if x[0] != "k0"))
        at_k = (first, *at_k[1:])
        e.declare((batch[0], k[0]))
        if not (isinstance(whole, int) and whole % piece == 0):
            guards = [Guard(first, whole)]
    e.binding = False
    e.guards.extend(guards)
    a, b = parts.a(at_batch, at_m, at_k), parts.b(at_batch, in_b, at_k)
    del e.guards[:]
    e.binding = True
    made = Contraction(batch, m, n, k, a, b, (), groups=groups)
    return made, tuple(parts.out(at_batch, at_m, at_n))


def routine_kernel(name: str, node: Node, f: Formals) -> tuple[Kernel, dict[str, str]]:
    """(the routine's kernel, its argument -> the formal argument of the node that it is)."""
    region = node.regions[0]
    anchor = region.results[0].node
    lowering = OPS[anchor.op].lowering
    assert isinstance(lowering, Routine)
    values = (*anchor.inputs, *anchor.results)
    form = lowering.form([v.shape for v in values], anchor.attrs)
    names = [*(f.inputs[v] for v in anchor.inputs), *f.outputs]
    arguments = tuple(Argument(formal.name, v.dtype, shape, formal.mode)
                      for formal, v, shape in zip(ROUTINES[form.routine].formals, values, form.shapes))
    kernel = RoutineKernel(name, arguments, form.routine, form.attrs)
    return replace(kernel, symbols=walk.symbols(kernel)), {a.name: n for a, n in zip(arguments, names)}


def split_contraction(name: str, node: Node, f: Formals) -> tuple[Kernel, Kernel, tuple[DimLike, ...]]:
    """(partial sums per piece, their sum with the epilogue, the partials' shape)."""
    region, e = node.regions[0], evaluator(node, f)
    anchor, piece = _anchor(node), node.attrs["split"]
    c, out_index = _contraction(node, e, piece)
    dtype = anchor.types[0].dtype
    pieces = c.batch[0][1]
    layout = f.layouts[0] if region.results[0].shape == anchor.types[0].shape else ""
    shape = (pieces, *in_memory(layout, anchor.types[0].shape))
    at = (symbol(PIECE), *in_memory(layout, out_index))
    c = replace(c, stores=(Store("p", at, Local("acc", dtype)),))
    head = finish(f"{name}_partial", e, [*f.arguments, Argument("p", dtype, shape, "w")], c)
    e = evaluator(node, f)
    loops, index = axes_of("i", anchor.types[0].shape, layout)
    e.declare((*loops, (PIECE, pieces)))
    at = (symbol(PIECE), *in_memory(layout, index))
    total = Reduce("sum", ((PIECE, pieces),), (Load("p", at, dtype),))
    e.preset(anchor.result(), index, e.bind(total))
    stores = tuple(s for j, r in enumerate(region.results) for s in f.stores(j, r, index, e))
    body = nest(loops, (*e.scopes[0].lets, *stores), "grid")
    return head, finish(name, e, [*f.arguments, Argument("p", dtype, shape, "r")], body), shape


def finish(name: str, e: Evaluator, arguments: list[Argument], body: tuple[Statement, ...]
           | Contraction) -> Kernel:
    """The kernel, with the arguments that it touches and its symbols."""
    kernel: Kernel
    if isinstance(body, Contraction):
        kernel = ContractionKernel(name, tuple(arguments), body, (), dict(e.indirect))
    else:
        kernel = LoopKernel(name, tuple(arguments), body, (), dict(e.indirect))
    touched = walk.loaded(kernel) | {s.arg for s in walk.stores(kernel)}
    kernel = replace(kernel, arguments=tuple(a for a in arguments if a.name in touched))
    return replace(kernel, symbols=walk.symbols(kernel))
