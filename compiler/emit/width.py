"""How many lanes a vectorised variable gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from graphflow.compiler.emit.expr import Emitter
from graphflow.compiler.emit.nodes import Node, names_in
from graphflow.compiler.plan.dims import Dim, DimLike, Quotient


def lane_count(e: Emitter, roots: Iterable[Node], var: str, extent: DimLike, vectors: int = 2,
               dims: Iterable[DimLike] = ()) -> int:
    """A power of two: `vectors` registers of the widest element that varies with `var`; fewer for short
    loops, and where ``var // c`` occurs, if that lets whole vectors fall between two multiples of c.
    `dims`: further dimensions that the loop uses."""
    found = [n for n in reachable(roots) if var in n.deps]
    widest = max((n.dtype.bytes for n in found if n.kind not in ("index", "reduce")), default=4)
    count = vectors * e.target.vector_bytes // max(widest, 4)
    if isinstance(extent, int):
        count = min(count, 1 << max(extent - 1, 0).bit_length())
    divisors = [c for d in (*dims, *(d for n in found for d in dims_of(n, e))) for c in divisors_of(d, var)]
    fitting = [w for w in (count, count // 2, count // 4) if w > 1 and all(c % w == 0 for c in divisors)]
    return fitting[0] if fitting else count


def reachable(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node that the roots need, once."""
    seen: set[Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.args)
            yield node


def dims_of(node: Node, e: Emitter) -> list[DimLike]:
    """The dimensions in the node itself; a load's is the number of its element."""
    if node.kind == "load":
        return [e.offset(node.data[0], node.data[1])]
    if node.kind == "index":
        return [node.data]
    if node.kind == "guarded":
        return [d for g in node.data for d in (g.at, g.bound)]
    return []


def divisors_of(d: DimLike, var: str) -> Iterator[int]:
    """Every c of a ``… // c`` or ``… % c`` around `var`."""
    if isinstance(d, Dim):
        for atoms, _ in d.terms:
            for a in atoms:
                if isinstance(a, Quotient) and var in names_in(a.inner):
                    yield a.by
                    yield from divisors_of(a.inner, var)
