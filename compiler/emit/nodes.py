"""Kernel expressions as a graph in which equal ones are one node.

`Nodes.of` turns an expression into a `Node`; a `Local` becomes the node of what its `Let` bound. A node
knows the names that it depends on (loop variables, symbols), which is all that the emitter needs to put its
code in the outermost place where it is valid, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from graphflow.compiler.emit.half import half_bits
from graphflow.compiler.kernel.form import (
    Apply,
    Const,
    Expr,
    Guard,
    Guarded,
    Index,
    Let,
    Load,
    Local,
)
from graphflow.compiler.plan.dims import DimLike, substitute, symbol, symbols_of
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import CompilerError

Names = frozenset[str]
NONE: Names = frozenset()


class Node:
    """One operation. kind and data:

    const (an int, or a float in hexadecimal) · load (arg, index, version of the argument) · index
    (dimension) · given (name of a value that the emitter has bound) · apply (function) · guarded (guards;
    args: value, fill) · reduce (kind, loops, lanes; args: the operands) · result (number; args: the
    reduce).

    `deps`: names it depends on. `loads`: it reads memory, so where it may run depends on guards.
    """

    __slots__ = ("kind", "data", "args", "dtype", "deps", "loads")

    def __init__(self, kind: str, data: Any, args: tuple[Node, ...], dtype: DType, deps: Names, loads: bool):
        self.kind, self.data, self.args, self.dtype = kind, data, args, dtype
        self.deps, self.loads = deps, loads


@lru_cache(maxsize=65536)
def names_in(d: DimLike) -> Names:
    """The symbols of a dimension."""
    return frozenset(symbols_of(d))


class Nodes:
    """The nodes of one kernel. `indirect`: the kernel's integers that indices use as symbols."""

    def __init__(self, indirect: Mapping[str, Expr]):
        self._indirect_expressions = dict(indirect)
        self.indirect: dict[str, Node] = {}
        self._table: dict[tuple, Node] = {}
        self._locals: dict[str, Node] = {}
        self._versions: dict[str, int] = {}
        self._seen: dict[int, tuple[Expr, Node]] = {}

    # -- names ---------------------------------------------------------------------------------------------

    def bind(self, name: str, node: Node) -> None:
        """From here on, `Local(name)` is `node`."""
        if self._locals.get(name, node) is not node:
            self._seen.clear()
        self._locals[name] = node

    def stored(self, arg: str) -> None:
        """From here on, loads of the argument give other values."""
        self._versions[arg] = self._versions.get(arg, 0) + 1
        self._seen.clear()

    def closure(self, *dims: DimLike) -> Names:
        """What dimensions depend on, through indirect integers too."""
        names = NONE.union(*map(names_in, dims))
        for name in names:
            if self.is_indirect(name):
                names |= self.indirect[name].deps
        return names

    def is_indirect(self, name: str) -> bool:
        """Whether the symbol is an integer loaded from memory."""
        if name not in self.indirect and name in self._indirect_expressions:
            self.indirect[name] = self.of(self._indirect_expressions[name])
        return name in self.indirect

    # -- making nodes --------------------------------------------------------------------------------------

    def make(
        self,
        kind: str,
        data: Any,
        args: tuple[Node, ...],
        dtype: DType,
        dims: Iterable[DimLike] = (),
        own: Names = NONE,
    ) -> Node:
        """The node with this content; `dims` are the dimensions in `data`, `own` the names that it binds
        itself."""
        key = (kind, data, args, dtype, type(data))
        node = self._table.get(key)
        if node is None:
            deps = self.closure(*dims).union(*(a.deps for a in args)) - own
            loads = kind == "load" or any(a.loads for a in args) or any(map(self.is_indirect, deps))
            node = self._table[key] = Node(kind, data, args, dtype, deps, loads)
        return node

    def given(self, name: str, dtype: DType) -> Node:
        """A value that the emitter binds to `name` in one of its scopes."""
        return self.make("given", name, (), dtype, (symbol(name),))

    def of(self, e: Expr) -> Node:
        """The node of an expression."""
        known = self._seen.get(id(e))
        if known is None:
            known = self._seen[id(e)] = (e, self._of(e))
        return known[1]

    def _of(self, e: Expr) -> Node:
        if isinstance(e, Const):
            value = float(e.value).hex() if e.dtype.is_float else int(e.value)
            if e.dtype.is_half:
                value = half_bits(e.value, e.dtype)
            return self.make("const", value, (), e.dtype)
        if isinstance(e, Load):
            return self.make("load", (e.arg, e.index, self._versions.get(e.arg, 0)), (), e.dtype, e.index)
        if isinstance(e, Index):
            return self.make("index", e.at, (), e.dtype, (e.at,))
        if isinstance(e, Local):
            if e.name not in self._locals:
                raise CompilerError(f"the local {e.name} is used before it is bound", stage="emit")
            return self._locals[e.name]
        if isinstance(e, Apply):
            return self.make("apply", e.function, tuple(map(self.of, e.args)), e.dtype)
        if isinstance(e, Guarded):
            return self.guarded(e.guards, self.of(e.value), self.of(e.fill))
        for let in e.lets:
            self.bind(let.name, self.of(let.value))
        return self.reduce(e.kind, e.loops, e.lanes, tuple(map(self.of, e.operands)), e.result)

    def guarded(self, guards: tuple[Guard, ...], value: Node, fill: Node) -> Node:
        """`value` where the guards hold, else `fill`."""
        dims = [d for g in guards for d in (g.at, g.bound)]
        return self.make("guarded", guards, (value, fill), value.dtype, dims)

    def reduce(self, kind: str, loops: tuple, lanes: str, operands: tuple[Node, ...], result: int) -> Node:
        """One result of a reduction."""
        own = frozenset(v for v, _ in loops)
        whole = self.make("reduce", (kind, loops, lanes), operands, operands[0].dtype, [x for _, x in loops],
                          own)
        return self.make("result", result, (whole,), operands[result].dtype)

    def lets(self, lets: Iterable[Let]) -> list[Node]:
        """Binds each let in order; their nodes."""
        out = []
        for let in lets:
            out.append(self.of(let.value))
            self.bind(let.name, out[-1])
        return out

    # -- rewriting -----------------------------------------------------------------------------------------

    def substitute(
        self, node: Node, values: Mapping[str, DimLike], done: dict[Node, Node] | None = None
    ) -> Node:
        """The node with names replaced by dimensions."""
        done = {} if done is None else done
        if node in done:
            return done[node]
        if node.deps.isdisjoint(values):
            return node
        args = tuple(self.substitute(a, values, done) for a in node.args)

        def dim(d: DimLike) -> DimLike:
            return substitute(d, self._with_indirect(d, values, done))

        data, dims = node.data, []
        if node.kind == "load":
            index = tuple(map(dim, node.data[1]))
            data, dims = (node.data[0], index, node.data[2]), list(index)
        elif node.kind == "index":
            data = dim(node.data)
            dims = [data]
        elif node.kind == "guarded":
            data = tuple(Guard(dim(g.at), dim(g.bound)) for g in node.data)
            dims = [d for g in data for d in (g.at, g.bound)]
        own = NONE
        if node.kind == "reduce":
            kind, loops, lanes = node.data
            loops = tuple((v, dim(x)) for v, x in loops)
            own, dims = frozenset(v for v, _ in loops), [x for _, x in loops]
            data = (kind, loops, lanes)
        done[node] = self.make(node.kind, data, args, node.dtype, dims, own)
        return done[node]

    def _with_indirect(
        self, d: DimLike, values: Mapping[str, DimLike], done: dict[Node, Node]
    ) -> dict[str, DimLike]:
        """`values`, and new names for the indirect integers in `d` that change with them."""
        out = dict(values)
        for name in names_in(d):
            if self.is_indirect(name) and not self.indirect[name].deps.isdisjoint(values):
                node = self.substitute(self.indirect[name], values, done)
                same = [n for n, other in self.indirect.items() if other is node]
                fresh = same[0] if same else f"{name}'{len(self.indirect)}"
                self.indirect[fresh] = node
                out[name] = symbol(fresh)
        return out
