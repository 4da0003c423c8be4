"""CUDA C for neighbouring elements: what a thread computes at once, so that it reads and writes 16 bytes.

A *chunk* is `width` neighbouring iterations of an innermost loop. Where the elements of an argument that they
touch lie side by side, and the first of them at a multiple of the width, they are one `gf_pack`. Whether the
argument itself begins at a multiple of 16 bytes is seen at run time (a view may begin anywhere), and so is
whether symbolic extents are multiples of the width.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

from graphflow.compiler.emit.cuda_text import C_TYPES, Writer, used_locals
from graphflow.compiler.emit.operands import coefficient
from graphflow.compiler.kernel.form import (
    Apply,
    Expr,
    Guarded,
    Let,
    Load,
    Loop,
    LoopKernel,
    Reduce,
    Statement,
    Store,
)
from graphflow.compiler.kernel.walk import expressions, statements, subexpressions
from graphflow.compiler.plan.dims import Dim, DimLike, Symbol, symbol, symbols_of

PACK_BYTES = 16
"""The longest load of a thread."""
Loops = Sequence[tuple[str, DimLike]]


class Vectors(Writer):
    """Writes chunks. `width`: elements of one; `multiples`: symbols that must be multiples of the width."""

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel.arguments, kernel.indirect, _used(kernel))
        self.kernel = kernel
        self.grid, self.body = grid_of(kernel.body)
        self.modes = {a.name: a.mode for a in kernel.arguments}
        self.bytes = {a.name: a.dtype.bytes for a in kernel.arguments}
        self.types = {a.name: C_TYPES[a.dtype] for a in kernel.arguments}
        self.width = 1
        self.multiples: set[str] = set()

    def scratch(self) -> DimLike:
        """Bytes that the blocks of a launch share for what they hand to each other."""
        return 0

    def is_plain(self) -> bool:
        """Whether the points of the grid are all that there is to compute, each by itself."""
        return bool(self.grid) and not self.reads_back() and not any(
            isinstance(s, Loop) for s in self.body) and not any(
            isinstance(e, Reduce) for e in expressions(self.kernel))

    # -- what can be a pack

    def multiple(self, d: DimLike, width: int) -> set[str] | None:
        """The symbols of the kernel that must be multiples of the width for `d` to be one; None if it may not
        be one all the same."""
        needed: set[str] = set()
        for atoms, c in d.terms if isinstance(d, Dim) else (((), d),):
            if c % width:
                own = [a.name for a in atoms if isinstance(a, Symbol) and a.name in self.kernel.symbols]
                if not own:
                    return None
                needed.add(own[0])
        return needed

    def packed(self, arg: str, index: tuple[DimLike, ...], var: str, width: int) -> set[str] | None:
        """The same for where the elements of a chunk begin; None also if they do not lie side by side."""
        flat = self.flat(arg, index)
        if coefficient(flat, var) != 1 or self.depends([flat - symbol(var)], var):
            return None
        return self.multiple(flat - symbol(var), width)

    def is_used(self, s: Statement) -> TypeGuard[Let | Store]:
        """Whether a result depends on the statement, which is no loop."""
        return isinstance(s, Store) or isinstance(s, Let) and s.name in self.used

    def is_pack(self, x: Load | Store, var: str) -> bool:
        """Whether the elements of a chunk are a pack, or a chunk is one element."""
        if self.width == 1:
            return True
        needed = self.packed(x.arg, x.index, var, self.width)
        return needed is not None and needed <= self.multiples

    def depends(self, dims: Iterable[DimLike], var: str) -> bool:
        """Whether dimensions depend on a variable, perhaps through integers that are loaded."""
        return any(name == var or name in self.indirect and
                   any(self.depends(load.index, var) for load in subexpressions(self.indirect[name])
                       if isinstance(load, Load)) for name in symbols_of(*dims))

    def loads(self, e: Expr, var: str, guards: tuple[str, ...] = ()
              ) -> Iterator[tuple[Load, tuple[str, ...]]]:
        """The loads of an expression, each with the guards under which it may be done for a whole chunk; not
        those in reductions, nor those whose guards are not the same for the chunk."""
        if isinstance(e, Load):
            yield e, guards
        elif isinstance(e, Apply):
            for x in e.args:
                yield from self.loads(x, var, guards)
        elif isinstance(e, Guarded):
            yield from self.loads(e.fill, var, guards)
            if not self.depends([d for g in e.guards for d in (g.at, g.bound)], var):
                yield from self.loads(e.value, var, (*guards, self.holds(e)))

    def reads_back(self) -> bool:
        """Whether something is read behind the place in the text where the kernel writes it."""
        written: set[str] = set()
        for s in statements(self.kernel.body):
            if isinstance(s, Loop):
                continue
            if any(isinstance(x, Load) and x.arg in written for x in subexpressions(s.value)):
                return True
            if isinstance(s, Store):
                written.add(s.arg)
        return False

    def condition(self, args: Iterable[str]) -> str:
        """Whether, at run time, packs of these arguments begin at multiples of their size."""
        addresses = " | ".join(f"(unsigned long long){a}" for a in sorted(set(args)))
        terms = [f"({addresses}) % {PACK_BYTES} == 0"]
        terms += [f"{self.names.get(s) or 'v_' + s} % {self.width} == 0" for s in sorted(self.multiples)]
        return " && ".join(terms)

    # -- a chunk

    def place(self, loops: Loops, chunk: str, width: str, first: str = "from") -> None:
        """Declares the variables of loops for a chunk by its number; `first`: the name of the innermost."""
        rest = chunk
        for number, (var, extent) in reversed(list(enumerate(loops))):
            inner = number == len(loops) - 1
            size = self.dim(extent) if not inner or width == "1" else f"({self.dim(extent)} / {width})"
            here = f"{rest} % {size}" if number else rest
            scaled = f" * {width}" if inner and width != "1" else ""
            name = first if inner and width != "1" else self.variable(var)
            self.line(f"const idx {name} = {here}{scaled};")
            rest = f"{rest} / {size}"

    def fetch(self, load: Load, var: str, first: str, width: str, wide: str = "") -> str:
        """The pack of a load."""
        return f"gf_load<{width}>({self.pointer(load.arg, load.index, var, first)}{wide})"

    def pointer(self, arg: str, index: tuple[DimLike, ...], var: str, first: str) -> str:
        """Where the elements of a chunk begin."""
        kept, self.names[var] = self.names.get(var), first
        text = self.dim(self.flat(arg, index))
        self.names.pop(var)
        if kept is not None:
            self.names[var] = kept
        return f"{arg} + {text}"

    def stored(self, body: Sequence[Statement], var: str, first: str, width: str, wide: str = "",
               guard: str = "") -> None:
        """The statements of a chunk: its elements one after the other, their results as packs."""
        packs: list[tuple[Store, str]] = []
        for s in body:
            if isinstance(s, Store) and self.is_pack(s, var):
                packs.append((s, self.fresh("y")))
                self.line(f"gf_pack<{self.types[s.arg]}, {width}> {packs[-1][1]};")
        of_store = {id(s): name for s, name in packs}
        self.line("#pragma unroll")
        self.open(f"for (int w = 0; w < {width}; w++)")
        self.line(f"const idx {self.variable(var)} = {first} + w;")
        for s in body:
            if isinstance(s, Let):
                self.let(s)
            elif isinstance(s, Store):
                value = self.expr(s.value)
                name = of_store.get(id(s))
                self.line(f"{name}.at[w] = {value};" if name else
                          f"{guard}{self.element(s.arg, s.index)} = {value};")
        self.close()
        for s, name in packs:
            self.line(f"{guard}gf_store({self.pointer(s.arg, s.index, var, first)}, {name}{wide});")


def grid_of(body: tuple[Statement, ...]) -> tuple[list[tuple[str, DimLike]], tuple[Statement, ...]]:
    """The outer loops that threads share: the grid loops and a lanes loop directly below them."""
    loops: list[tuple[str, DimLike]] = []
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].kind in ("grid", "lanes"):
        loop = body[0]
        loops.append((loop.var, loop.extent))
        body = loop.body
        if loop.kind == "lanes":
            break
    return loops, body


def reductions_of(e: Expr) -> Iterator[Reduce]:
    """The outermost reductions of an expression."""
    if isinstance(e, Reduce):
        yield e
    elif isinstance(e, Apply):
        for x in e.args:
            yield from reductions_of(x)
    elif isinstance(e, Guarded):
        yield from reductions_of(e.value)
        yield from reductions_of(e.fill)


def _used(kernel: LoopKernel) -> set[str]:
    """The locals that what is stored depends on."""
    lets = [s for s in statements(kernel.body) if isinstance(s, Let)]
    lets += [x for e in expressions(kernel) if isinstance(e, Reduce) for x in e.lets]
    stored = [s.value for s in statements(kernel.body) if isinstance(s, Store)]
    return used_locals([*kernel.indirect.values(), *stored], lets)
