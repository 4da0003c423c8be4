"""Turns the ops of a region into kernel expressions: pull-based, one element at a time.

`Evaluator.value(v, index)` is element `index` of `v` as an expression over the kernel's arguments. Loads made
under a guard are guarded themselves, so every expression is safe wherever it is evaluated. Values used more
than once become `Let`s of the innermost open scope: the kernel's body, or a reduction that is being built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphflow.compiler.ir.graph import Node, Region, Value
from graphflow.compiler.kernel.form import Apply, Const, Expr, Guard, Guarded, Index, Let, Load, Local, Reduce
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Pointwise
from graphflow.compiler.plan.dims import DimLike, bounds_of, simplify, symbol
from graphflow.compiler.plan.dtypes import BOOL, DType
from graphflow.compiler.plan.layouts import in_memory

Loops = tuple[tuple[str, DimLike], ...]


@dataclass
class Scope:
    """A place where `Let`s can be put, and what has been computed in it."""

    lets: list[Let] = field(default_factory=list)
    known: dict[tuple, Expr] = field(default_factory=dict)


class Evaluator:
    """`arguments`: the formal argument that each region parameter is read from, in the layout of its type;
    `written`: arguments whose old value must be read before the kernel writes it."""

    def __init__(self, region: Region, arguments: Mapping[Value, str], written: frozenset[str] = frozenset()):
        self.arguments, self.written = arguments, written
        self.scopes: list[Scope] = [Scope()]
        self.guards: list[Guard] = []
        self.bounds: dict[str, tuple[int, int | None]] = {}
        self.indirect: dict[str, Expr] = {}
        self.binding = True  # whether shared values may become Lets
        self._fresh = 0
        self._bound: dict[str, Expr] = {}
        self._uses: dict[Value, int] = {}
        for node in region.nodes():
            for v in node.inputs:
                self._uses[v] = self._uses.get(v, 0) + 1
        for v in region.results:
            self._uses[v] = self._uses.get(v, 0) + 1

    def declare(self, loops: Loops) -> None:
        """Makes the ranges of loop variables known, for index simplification."""
        for name, extent in loops:
            self.bounds[name] = (0, extent - 1 if isinstance(extent, int) else None)

    def fresh(self, prefix: str) -> str:
        """A name that no other has in this kernel."""
        self._fresh += 1
        return f"{prefix}{self._fresh}"

    def preset(self, v: Value, index: Sequence[DimLike], expr: Expr) -> None:
        """What the element is, from here on (an accumulator, a value computed elsewhere)."""
        self.scopes[-1].known[(v, tuple(index), ())] = expr

    def value(self, v: Value, index: Sequence[DimLike]) -> Expr:
        """Element `index` of `v`."""
        at = tuple(simplify(d, self.bounds) for d in index)
        key = (v, at, tuple(self.guards))
        for scope in reversed(self.scopes):
            for k in (key, (v, at, ())):
                if k in scope.known:
                    return scope.known[k]
        expr = self._compute(v, at)
        if self._binds(v, expr):
            expr = self.bind(expr)
        self.scopes[-1].known[key] = expr
        return expr

    def bind(self, expr: Expr) -> Expr:
        """The expression as a `Let` of the innermost scope."""
        if not self.binding or isinstance(expr, (Const, Index, Local)):
            return expr
        name = self.fresh("t")
        self.scopes[-1].lets.append(Let(name, expr))
        self._bound[name] = expr
        return Local(name, expr.dtype)

    def without_locals(self, expr: Expr) -> Expr:
        """The expression with what its locals stand for: indirect integers are evaluated where an index needs
        them, which may be in another scope."""
        if isinstance(expr, Local) and expr.name in self._bound:
            return self.without_locals(self._bound[expr.name])
        if isinstance(expr, Apply):
            return replace(expr, args=tuple(self.without_locals(x) for x in expr.args))
        if isinstance(expr, Guarded):
            return replace(expr, value=self.without_locals(expr.value))
        return expr

    def _binds(self, v: Value, expr: Expr) -> bool:
        if not self.binding or isinstance(expr, (Const, Index, Local)):
            return False
        kind = OPS[v.node.op].kind
        loaded = expr.value if isinstance(expr, Guarded) else expr
        old = isinstance(loaded, Load) and loaded.arg in self.written
        return old or kind == "reduce" or (self._uses.get(v, 0) > 1 and kind != "view")

    def _compute(self, v: Value, at: tuple[DimLike, ...]) -> Expr:
        node = v.node
        if v in self.arguments:
            load: Expr = Load(self.arguments[v], in_memory(v.type.layout, at), v.dtype)
            return Guarded(tuple(self.guards), load, zero(v.dtype)) if self.guards else load
        lowering = OPS[node.op].lowering
        if not isinstance(lowering, Pointwise):
            raise NotImplementedError(f"{node.op} has no pointwise lowering")
        return lowering.value(OpPoint(self, node), at, v.index)


class OpPoint:
    """The `Point` that lowerings see."""

    def __init__(self, evaluator: Evaluator, node: Node):
        self._e, self.node = evaluator, node

    def operand(self, i: int, index: Sequence[DimLike], guards: Sequence[Guard] = (), fill: Any = 0) -> Expr:
        """See `Point.operand`."""
        e, v = self._e, self.node.inputs[i]
        needed: list[Guard] = []
        for g in guards:
            at = simplify(g.at, e.bounds)
            low, high = bounds_of(at, e.bounds)
            _, room = bounds_of(g.bound - 1 - at, e.bounds)
            if (high is not None and high < 0) or (room is not None and room < 0):
                return Const(_python(fill, v.dtype), v.dtype)
            if not (low is not None and low >= 0 and _at_least_zero(g.bound - 1 - at, e.bounds)):
                needed.append(Guard(at, g.bound))
        if not needed:
            return e.value(v, index)
        outer = len(e.guards)
        e.guards.extend(g for g in needed if g not in e.guards)
        try:
            inner = e.value(v, index)
            inside = tuple(e.guards)
        finally:
            del e.guards[outer:]
        other = Const(_python(fill, v.dtype), v.dtype)
        if isinstance(inner, Guarded) and inner.guards == inside and (not outer or inner.fill == other):
            return replace(inner, fill=other)
        return Guarded(tuple(needed), inner, other)

    def const(self, value: Any, dtype: DType) -> Expr:
        """See `Point.const`."""
        return Const(_python(value, dtype), dtype)

    def index(self, at: DimLike, dtype: DType) -> Expr:
        """See `Point.index`."""
        return Index(simplify(at, self._e.bounds), dtype)

    def apply(self, function: str, *args: Expr, dtype: DType | None = None) -> Expr:
        """See `Point.apply`."""
        scalar = SCALARS[function]
        if len(args) != scalar.arity:
            raise TypeError(f"{function} takes {scalar.arity} arguments, got {len(args)}")
        if scalar.result == "bool":
            dtype = BOOL
        elif function == "where":
            dtype = args[1].dtype
        return Apply(function, args, dtype or args[0].dtype)

    def bind(self, value: Expr) -> Expr:
        """See `Point.bind`."""
        return self._e.bind(value)

    def indirect(self, value: Expr) -> DimLike:
        """See `Point.indirect`."""
        value = self._e.without_locals(value)
        for name, known in self._e.indirect.items():
            if known == value:
                return symbol(name)
        name = self._e.fresh("g")
        self._e.indirect[name] = value
        return symbol(name)

    def loops(self, *extents: DimLike) -> Loops:
        """See `Point.loops`."""
        prefix = self._e.fresh("r")
        made = tuple((f"{prefix}.{j}", extent) for j, extent in enumerate(extents))
        self._e.declare(made)
        if made:
            self._e.scopes.append(Scope())
        return made

    def reduce(self, kind: str, loops: Sequence[tuple[str, DimLike]], *operands: Expr,
               result: int = 0) -> Expr:
        """See `Point.reduce`."""
        if not loops:
            return operands[result]
        scope = self._e.scopes.pop()
        return Reduce(kind, tuple(loops), operands, result, lets=tuple(scope.lets))


def _at_least_zero(d: DimLike, bounds: Mapping[str, tuple[int, int | None]]) -> bool:
    low, _ = bounds_of(d, bounds)
    return low is not None and low >= 0


def _python(value: Any, dtype: DType) -> int | float | bool:
    if dtype.kind == "b":
        return bool(value)
    return float(value) if dtype.has_gradient else int(value)


def zero(dtype: DType) -> Const:
    """The literal 0 (false) of a type."""
    return Const(_python(0, dtype), dtype)
