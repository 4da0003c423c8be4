"""The text form of kernels and kernel programs: print, parse, print is the identity. The grammar is in
docs/kernel-grammar.md.

Types are printed where they are declared; an expression shows its own, as in ``add<f64>(x, y)``, only where
it is not what its parts imply, so a faulty kernel shows its fault.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphflow.compiler.kernel.form import (
    REDUCTIONS,
    Apply,
    Argument,
    Const,
    Contraction,
    ContractionKernel,
    Expr,
    Guard,
    Guarded,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Loop,
    LoopKernel,
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import BOOL, DTYPES, DType
from graphflow.compiler.plan.plan_text import print_plan, scan_plan
from graphflow.compiler.plan.text import Scanner, dim_text, literal_text, name_text, number_text, type_text

_LOOPS = {"for": "serial", "grid": "grid", "lanes": "lanes"}
_WORDS = {kind: word for word, kind in _LOOPS.items()}
_AXES = ("batch", "m", "n", "k")
_KINDS = {LoopKernel: "kernel", ContractionKernel: "contraction", RoutineKernel: "routine"}
Axes = tuple[tuple[str, DimLike], ...]


def print_program(program: KernelProgram, origins: bool = True) -> str:
    """The plan and the kernels. `origins`: whether to show the numbers of the traced nodes."""
    plan = print_plan(program.plan, origins).rstrip("\n")
    return plan + "\n" + "".join("\n" + print_kernel(k) for k in program.kernels.values())


def print_kernel(kernel: Kernel) -> str:
    """One kernel, a statement on each line."""
    return _Printer(kernel).kernel(kernel)


def parse_program(text: str, source: str = "program") -> KernelProgram:
    """Reads what `print_program` prints; TextError with line and column where it cannot. Nothing is checked
    beyond the grammar: see `graphflow.compiler.kernel.check`."""
    s = Scanner(text, source)
    plan = scan_plan(s)
    kernels: dict[str, Kernel] = {}
    while s.kind() != "end":
        kernel = _Parser(s).kernel()
        if kernel.name in kernels:
            raise s.error(f"there are two kernels named {kernel.name!r}")
        kernels[kernel.name] = kernel
    return KernelProgram(plan, kernels)


def parse_kernel(text: str, source: str = "kernel") -> Kernel:
    """Reads what `print_kernel` prints."""
    s = Scanner(text, source)
    kernel = _Parser(s).kernel()
    s.end()
    return kernel


class _Types:
    """What names have been declared as so far: the same for the printer and the parser, which walk in one
    order."""

    def __init__(self) -> None:
        self.arguments: dict[str, DType] = {}
        self.locals: dict[str, DType] = {}

    @staticmethod
    def of_apply(function: str, args: tuple[Expr, ...]) -> DType | None:
        """The type that the table gives; None where it leaves it open (cast) or does not know the
        function."""
        scalar = SCALARS.get(function)
        if scalar is None or len(args) != scalar.arity:
            return None
        if scalar.result == "bool":
            return BOOL
        if scalar.result == "same":
            return args[0].dtype
        return args[1].dtype if function == "where" else None


class _Printer:
    def __init__(self, kernel: Kernel) -> None:
        self.types = _Types()
        self.types.arguments = {a.name: a.dtype for a in kernel.arguments}
        self.lines: list[str] = []

    def kernel(self, kernel: Kernel) -> str:
        word = _KINDS[type(kernel)]
        arguments = ", ".join(f"{name_text(a.name)}: {a.mode} {type_text(a.dtype, a.shape)}"
                              for a in kernel.arguments)
        symbols = f" symbols [{', '.join(kernel.symbols)}]" if kernel.symbols else ""
        symbols += " by rows" if kernel.rows else ""
        self.lines.append(f"{word} {name_text(kernel.name)}({arguments}){symbols} {{")
        if isinstance(kernel, RoutineKernel):
            attrs = ", ".join(f"{name}={literal_text(value)}" for name, value in kernel.attrs.items())
            self.lines.append(f"  {kernel.routine} [{attrs}]")
            return "\n".join([*self.lines, "}"]) + "\n"
        for name, value in kernel.indirect.items():
            self.lines.append(f"  index {name} = {self.expression(value)}")
        if isinstance(kernel, ContractionKernel):
            self.contraction(kernel.contraction)
        else:
            self.statements(kernel.body, 1)
        return "\n".join([*self.lines, "}"]) + "\n"

    def contraction(self, c: Contraction) -> None:
        for word, axes in zip(_AXES, (c.batch, c.m, c.n, c.k)):
            self.lines.append(f"  {word} [{_axes_text(axes)}]")
        if c.groups:
            self.lines.append(f"  groups [{_axes_text(c.groups)}]")
        if c.tile:
            self.lines.append(f"  tile [{', '.join(f'{name}={number}' for name, number in c.tile.items())}]")
        self.lines += [f"  a = {self.expression(c.a)}", f"  b = {self.expression(c.b)}"]
        self.types.locals.update(dict.fromkeys(c.accumulators, c.a.dtype))
        self.statements((*c.lets, *c.stores), 1)

    def statements(self, body: tuple[Statement, ...], depth: int) -> None:
        indent = "  " * depth
        for s in body:
            if isinstance(s, Let):
                self.lines.append(indent + self.let(s))
            elif isinstance(s, Store):
                self.lines.append(f"{indent}{name_text(s.arg)}{_index_text(s.index)} = "
                                  f"{self.expression(s.value)}")
            else:
                self.lines.append(f"{indent}{_WORDS[s.kind]} {_axes_text(((s.var, s.extent),))} {{")
                self.statements(s.body, depth + 1)
                self.lines.append(indent + "}")

    def let(self, let: Let) -> str:
        text = f"let {name_text(let.name)} = {self.expression(let.value)}"
        self.types.locals[let.name] = let.value.dtype
        return text

    def expression(self, e: Expr) -> str:
        if isinstance(e, Const):
            return f"{e.dtype}({number_text(e.value)})"
        if isinstance(e, Load):
            return name_text(e.arg) + _type_mark(e.dtype,
                                                 self.types.arguments.get(e.arg)) + _index_text(e.index)
        if isinstance(e, Index):
            return f"index<{e.dtype}>({dim_text(e.at)})"
        if isinstance(e, Local):
            return name_text(e.name) + _type_mark(e.dtype, self.types.locals.get(e.name))
        if isinstance(e, Apply):
            mark = _type_mark(e.dtype, self.types.of_apply(e.function, e.args))
            return f"{e.function}{mark}({', '.join(map(self.expression, e.args))})"
        if isinstance(e, Guarded):
            guards = [f"0 <= {dim_text(g.at)} < {dim_text(g.bound)}" for g in e.guards]
            return f"guarded({', '.join([*guards, self.expression(e.value), self.expression(e.fill)])})"
        loops = _axes_text(e.loops, e.lanes)
        lets = "".join(f"{self.let(let)}, " for let in e.lets)
        result = f"#{e.result}" if e.result else ""
        return f"{e.kind}({loops}: {lets}{', '.join(map(self.expression, e.operands))}){result}"


def _axes_text(axes: Axes, lanes: str = "") -> str:
    return ", ".join(f"{'lanes ' if name == lanes else ''}{name} < {dim_text(extent)}" for name,
                     extent in axes)


def _index_text(index: tuple[DimLike, ...]) -> str:
    return f"[{', '.join(map(dim_text, index))}]"


def _type_mark(dtype: DType, implied: DType | None) -> str:
    return "" if dtype == implied else f"<{dtype}>"


class _Parser:
    def __init__(self, scanner: Scanner) -> None:
        self.s = scanner
        self.types = _Types()

    def kernel(self) -> Kernel:
        s = self.s
        word = s.word(tuple(_KINDS.values()), "a kernel")
        name = s.name()
        arguments = s.sequence("(", self.argument, ")")
        self.types.arguments = {a.name: a.dtype for a in arguments}
        symbols = s.sequence("[", s.name, "]") if s.accept("symbols") else ()
        rows = word != "routine" and bool(s.accept("by"))
        if rows:
            s.expect("rows")
        s.expect("{")
        if word == "routine":
            routine, attrs = s.name(), dict(s.sequence("[", self.attribute, "]"))
            s.expect("}")
            return RoutineKernel(name, arguments, routine, attrs, symbols)
        indirect: dict[str, Expr] = {}
        while s.peek() == "index" and s.peek(2) == "=":
            s.take()
            at = s.name()
            s.expect("=")
            indirect[at] = self.expression()
        if word == "kernel":
            return LoopKernel(name, arguments, self.block(), symbols, indirect, rows)
        return ContractionKernel(name, arguments, self.contraction(), symbols, indirect, rows)

    def argument(self) -> Argument:
        name = self.s.name()
        self.s.expect(":")
        mode = self.s.word(("r", "w", "rw"), "a mode")
        dtype, shape, layout = self.s.type()
        if layout:
            raise self.s.error(f"the argument {name} has a layout: its shape is in the order of memory")
        return Argument(name, dtype, shape, mode)

    def contraction(self) -> Contraction:
        s = self.s
        axes: list[Axes] = []
        for word in _AXES:
            s.expect(word)
            axes.append(s.sequence("[", self.axis, "]"))
        groups: tuple[tuple[str, int], ...] = ()
        if s.peek() == "groups" and s.peek(1) == "[":
            s.take()
            groups = tuple(s.sequence("[", self.group, "]"))
        tile: Mapping[str, int] = {}
        if s.peek() == "tile" and s.peek(1) == "[" and s.peek(3) == "=":
            s.take()
            tile = dict(s.sequence("[", self.tile_field, "]"))
        s.expect("a")
        s.expect("=")
        a = self.expression()
        s.expect("b")
        s.expect("=")
        b = self.expression()
        made = Contraction(axes[0], axes[1], axes[2], axes[3], a, b, (), tile, groups=groups)
        self.types.locals.update(dict.fromkeys(made.accumulators, a.dtype))
        body = self.block()
        lets = tuple(x for x in body if isinstance(x, Let))
        stores = tuple(x for x in body if isinstance(x, Store))
        if body != (*lets, *stores):
            raise s.error("a contraction ends with lets and then stores")
        return replace(made, stores=stores, lets=lets)

    def attribute(self) -> tuple[str, Any]:
        name = self.s.name()
        self.s.expect("=")
        return name, self.s.literal()

    def tile_field(self) -> tuple[str, int]:
        name = self.s.name()
        self.s.expect("=")
        return name, self.s.integer()

    def axis(self) -> tuple[str, DimLike]:
        name = self.s.name()
        self.s.expect("<")
        return name, self.s.dim()

    def group(self) -> tuple[str, int]:
        name = self.s.name()
        self.s.expect("<")
        return name, self.s.integer()

    def block(self) -> tuple[Statement, ...]:
        """Statements up to the closing brace."""
        body: list[Statement] = []
        while not self.s.accept("}"):
            body.append(self.statement())
        return tuple(body)

    def statement(self) -> Statement:
        s = self.s
        if s.peek(1) == "[":
            arg, index = s.name(), s.sequence("[", s.dim, "]")
            s.expect("=")
            return Store(arg, index, self.expression())
        word = s.word(("let", *_LOOPS), "a statement")
        if word == "let":
            return self.let()
        var, extent = self.axis()
        s.expect("{")
        return Loop(var, extent, self.block(), _LOOPS[word])

    def let(self) -> Let:
        name = self.s.name()
        self.s.expect("=")
        value = self.expression()
        self.types.locals[name] = value.dtype
        return Let(name, value)

    def expression(self) -> Expr:
        s, start = self.s, self.s.position
        name = s.name()
        if s.peek() == "(" and name in DTYPES:
            s.take()
            value = s.number()
            s.expect(")")
            return Const(value, DTYPES[name])
        marked = None
        if s.accept("<"):
            marked = s.dtype()
            s.expect(">")
        if s.peek() == "[":
            index = s.sequence("[", s.dim, "]")
            return Load(name, index, self.declared(marked, self.types.arguments.get(name), "argument", start))
        if not s.accept("("):
            return Local(name, self.declared(marked, self.types.locals.get(name), "let", start))
        if name == "index":
            at = s.dim()
            s.expect(")")
            return Index(at, self.declared(marked, None, "type", start))
        if name == "guarded":
            return self.guarded()
        if name in REDUCTIONS:
            return self.reduce(name)
        args = self.expressions()
        return Apply(name, args, self.declared(marked, self.types.of_apply(name, args), "type", start))

    def declared(self, marked: DType | None, known: DType | None, what: str, start: int) -> DType:
        dtype = marked or known
        if dtype is None:
            raise self.s.error(f"there is no {what} for {self.s.tokens[start]!r}", start)
        return dtype

    def expressions(self) -> tuple[Expr, ...]:
        """Expressions up to the closing parenthesis."""
        found: list[Expr] = []
        while not self.s.accept(")"):
            if found:
                self.s.expect(",")
            found.append(self.expression())
        return tuple(found)

    def guarded(self) -> Guarded:
        s = self.s
        guards: list[Guard] = []
        while s.accept("0"):
            s.expect("<=")
            at = s.dim()
            s.expect("<")
            guards.append(Guard(at, s.dim()))
            s.expect(",")
        found = self.expressions()
        if len(found) != 2:
            raise s.error("a guarded expression has a value and a fill after its guards")
        return Guarded(tuple(guards), *found)

    def reduce(self, kind: str) -> Reduce:
        s = self.s
        loops: list[tuple[str, DimLike]] = []
        lanes = ""
        while not s.accept(":"):
            if loops:
                s.expect(",")
            vectorised = s.peek() == "lanes" and s.peek(1) != "<" and s.accept("lanes")
            loops.append(self.axis())
            lanes = loops[-1][0] if vectorised else lanes
        lets: list[Let] = []
        while s.peek() == "let" and s.peek(2) == "=":
            s.take()
            lets.append(self.let())
            s.expect(",")
        operands = self.expressions()
        result = s.integer() if s.accept("#") else 0
        if not 0 <= result < len(operands):
            raise s.error(f"{kind} has no operand {result}")
        return Reduce(kind, tuple(loops), operands, result, lanes, tuple(lets))

