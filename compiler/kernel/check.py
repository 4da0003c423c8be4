"""The checker of kernels and kernel programs: what every stage from `lower` on must hand over.

Faults of the compiler, so each is a CompilerError that says where and shows the kernel. Indices are checked
as far as they can be decided: an index is reported where some iteration certainly leaves the argument; the
interpreter finds the rest.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    REDUCTIONS,
    TILE_FIELDS,
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
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.reach import reach
from graphflow.compiler.kernel.routines import fault
from graphflow.compiler.kernel.rows import dependence, row_axis
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.kernel.text import print_kernel
from graphflow.compiler.plan.dims import Dim, DimLike, product, symbols_of
from graphflow.compiler.plan.dtypes import BOOL, DTYPES, DType
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.plan.layouts import is_layout
from graphflow.compiler.plan.schema import (
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Launch,
    Repeat,
    base_of,
    launches,
    places,
    positions,
)


def check_kernel(kernel: Kernel, stage: str = "lower") -> None:
    """CompilerError if the kernel breaks a rule of its form."""
    _Kernel(kernel, stage).run()


def check_program(program: KernelProgram, stage: str = "lower") -> None:
    """CompilerError if a kernel breaks a rule, a launch does not fit its kernel, something is read before it
    is written, or a state is written before all that must come first."""
    for name, kernel in program.kernels.items():
        if name != kernel.name:
            raise CompilerError(f"the kernel {kernel.name} is filed under {name}", stage=stage)
        check_kernel(kernel, stage)
    _Program(program, stage).run()


class _Kernel:
    def __init__(self, kernel: Kernel, stage: str) -> None:
        self.kernel, self.stage = kernel, stage
        self.arguments: dict[str, Argument] = {a.name: a for a in kernel.arguments}
        self.stored: dict[str, set[tuple[DimLike, ...]]] = {}
        self.variables: dict[str, DimLike] = {}            # loop variable in scope -> extent
        self.parallel: set[str] = set()                    # of these, those of loops whose order is free
        self.locals: dict[str, DType] = {}
        self.guards: list[Guard] = []
        # indirect integer -> loop variables that it depends on
        self.needs: dict[str, set[str]] = {}
        self.extents: dict[str, DimLike] = dict(walk.loops(kernel))

    def fault(self, message: str) -> CompilerError:
        return CompilerError(f"kernel {self.kernel.name}: {message}", stage=self.stage,
                             dump=print_kernel(self.kernel))

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise self.fault(message)

    def run(self) -> None:
        k = self.kernel
        self.require(len(self.arguments) == len(k.arguments), "two arguments have one name")
        for a in k.arguments:
            self.require(a.mode in ("r", "w", "rw"), f"the argument {a.name} has the mode {a.mode!r}")
            self.require(DTYPES.get(a.dtype.name) == a.dtype, f"the argument {a.name} has no known type")
            self.dims(f"the shape of {a.name}", a.shape)
        if isinstance(k, RoutineKernel):
            self.require(not fault(k), fault(k))
            return
        self.require(not k.rows or row_axis(k) is not None, "it has no rows to be cut along")
        for s in walk.stores(k):
            self.stored.setdefault(s.arg, set()).add(s.index)
        for name, value in k.indirect.items():
            self.indirect(name, value)
        if isinstance(k, ContractionKernel):
            self.contraction(k.contraction)
        else:
            self.body(k.body, "top", False)
        unwritten = [a.name for a in k.arguments if "w" in a.mode and a.name not in self.stored]
        self.require(not unwritten, f"nothing stores to {', '.join(unwritten)}")

    def indirect(self, name: str, value: Expr) -> None:
        """Checked with every loop variable in scope; each use then needs those that it depends on."""
        own = {v for e in walk.subexpressions(value) if isinstance(e, Reduce) for v, _ in e.loops}
        self.require(name not in self.extents and name not in self.kernel.symbols, f"{name} names two things")
        self.variables = {v: e for v, e in self.extents.items() if v not in own}
        self.expression(value)
        self.variables = {}
        self.require(value.dtype.is_integer, f"the index {name} is of type {value.dtype}")
        used = {s for e in walk.subexpressions(value) for d in _dims_of(e) for s in symbols_of(d)}
        depends = set(used & set(self.extents)) - own
        for other in used & set(self.needs):
            depends |= self.needs[other]
        self.needs[name] = depends

    def contraction(self, c: Contraction) -> None:
        axes = (*c.batch, *c.m, *c.n, *c.k, *c.groups)
        self.require(len(c.groups) <= 1 and all(extent > 0 for _, extent in c.groups),
                     "its groups are not one axis of constant extent")
        self.require(len({v for v, _ in axes}) == len(axes), "two axes have one name")
        for name, number in c.tile.items():
            self.require(name in TILE_FIELDS, f"its tile has no field {name!r}: there are "
                                              f"{', '.join(TILE_FIELDS)}")
            self.require(number >= TILE_FIELDS[name], f"its tile has {name}={number}")
        with self.loops((*c.batch, *c.m, *c.k)):
            self.expression(c.a)
        with self.loops((*c.batch, *c.groups, *c.n, *c.k)):
            self.expression(c.b)
        self.require(c.a.dtype == c.b.dtype and c.a.dtype.is_float,
                     f"the operands are of type {c.a.dtype} and {c.b.dtype}")
        with self.loops((*c.batch, *c.m, *c.n)):
            self.parallel = set(self.variables)
            self.locals.update(dict.fromkeys(c.accumulators, c.a.dtype))
            self.body((*c.lets, *c.stores), "contraction", False)
        self.require(all(isinstance(s, Store) for s in c.stores) and bool(c.stores), "it stores nothing")

    @contextmanager
    def loops(self, loops: Sequence[tuple[str, DimLike]]) -> Iterator[None]:
        """Loop variables and locals that are in scope for a while."""
        before, locals_before = dict(self.variables), dict(self.locals)
        for name, extent in loops:
            self.dims(f"the extent of {name}", (extent,))
            taken = name in self.variables or name in self.kernel.symbols or name in self.kernel.indirect
            self.require(not taken, f"the loop variable {name} hides another of its name")
            self.require(isinstance(extent, Dim) or extent >= 0, f"the loop over {name} has the extent "
                                                                 f"{extent}")
            self.variables[name] = extent
        yield
        self.variables, self.locals = before, locals_before

    def body(self, body: Sequence[Statement], inside: str, lanes: bool) -> None:
        """Statements; `inside` is the kind of the loop around them ("top" for none)."""
        before = dict(self.locals)
        for s in body:
            if isinstance(s, Let):
                self.let(s)
            elif isinstance(s, Store):
                self.store(s)
            else:
                self.loop(s, inside, lanes, len(body))
        self.locals = before

    def loop(self, s: Loop, inside: str, lanes: bool, siblings: int) -> None:
        self.require(s.kind in ("serial", "grid", "lanes"),
                     f"the loop over {s.var} is of the kind {s.kind!r}")
        if s.kind == "grid":
            self.require(inside in ("top", "grid") and siblings == 1,
                         f"the grid loop over {s.var} is not outermost and perfectly nested")
        self.require(not (lanes and s.kind == "lanes"), f"the lanes loop over {s.var} lies in another")
        with self.loops([(s.var, s.extent)]):
            self.parallel |= {s.var} if s.kind != "serial" else set()
            self.body(s.body, s.kind, lanes or s.kind == "lanes")
        self.parallel.discard(s.var)

    def let(self, s: Let) -> None:
        self.require(s.name not in self.locals, f"{s.name} is bound twice")
        self.expression(s.value)
        self.locals[s.name] = s.value.dtype

    def store(self, s: Store) -> None:
        self.expression(s.value)
        argument = self.element(s.arg, s.index)
        used = symbols_of(*s.index)
        used |= {v for name in used & set(self.needs) for v in self.needs[name]}
        shared = sorted(v for v in self.parallel - used if self.variables[v] != 1)
        self.require(not shared, f"every iteration over {', '.join(shared)} stores to the same element of "
                                 f"{s.arg}")
        self.require("w" in argument.mode, f"it stores to {s.arg}, which it only reads")
        self.require(s.value.dtype == argument.dtype, f"it stores {s.value.dtype} to {s.arg} of "
                                                      f"{argument.dtype}")

    def element(self, name: str, index: tuple[DimLike, ...]) -> Argument:
        """Checks an access; gives the argument."""
        self.require(name in self.arguments, f"there is no argument {name}")
        argument = self.arguments[name]
        where = f"{name}[{', '.join(map(str, index))}]"
        self.require(len(index) == len(argument.shape), f"{where} has {len(index)} indices for "
                                                        f"{len(argument.shape)} axes")
        self.dims(where, index)
        for axis, (at, size) in enumerate(zip(index, argument.shape)):
            loaded = symbols_of(at) & set(self.needs)
            outside = "" if loaded else reach(at, size, self.variables, self.guards)
            self.require(not outside, f"{where} {outside} of axis {axis}, which has {size}")
        return argument

    def dims(self, where: str, dims: Sequence[DimLike]) -> None:
        """Every symbol must be a program's symbol, a loop variable in scope, or an indirect integer whose own
        are."""
        for name in sorted(symbols_of(*dims)):
            if name in self.needs:
                missing = ", ".join(sorted(self.needs[name] - set(self.variables)))
                self.require(not missing, f"{where} uses {name} outside the loop over {missing}")
            else:
                self.require(name in self.variables or name in self.kernel.symbols,
                             f"{where} uses {name}, which nothing defines there")

    def expression(self, e: Expr) -> None:
        if isinstance(e, Const):
            self.constant(e)
        elif isinstance(e, Load):
            argument = self.element(e.arg, e.index)
            self.require("r" in argument.mode, f"it loads from {e.arg}, which it only writes")
            self.require(e.dtype == argument.dtype, f"it loads {e.dtype} from {e.arg} of {argument.dtype}")
            self.require(argument.mode == "r" or e.index in self.stored.get(e.arg, ()),
                         f"it loads {e.arg}[{', '.join(map(str, e.index))}], but stores to other elements of "
                         f"it")
        elif isinstance(e, Index):
            self.dims("an index", (e.at,))
            self.require(e.dtype != BOOL, "an index is a bool")
        elif isinstance(e, Local):
            self.require(e.name in self.locals, f"{e.name} is used where no let binds it")
            self.require(e.dtype == self.locals[e.name], f"{e.name} is {self.locals[e.name]}, used as "
                                                         f"{e.dtype}")
        elif isinstance(e, Apply):
            self.apply(e)
        elif isinstance(e, Guarded):
            self.guarded(e)
        else:
            self.reduce(e)

    def constant(self, e: Const) -> None:
        fits = isinstance(e.value, bool) if e.dtype == BOOL else not isinstance(e.value, bool) and (
            isinstance(e.value, float) if e.dtype.has_gradient else isinstance(e.value, int))
        self.require(fits, f"the constant {e.value!r} is no {e.dtype}")
        if e.dtype.is_integer:
            bits = 8 * e.dtype.bytes
            low, high = (0, 2 ** bits - 1) if e.dtype.kind == "u" else (-2 ** (bits - 1), 2 ** (bits - 1) - 1)
            self.require(low <= e.value <= high, f"the constant {e.value} does not fit {e.dtype}")

    def apply(self, e: Apply) -> None:
        for x in e.args:
            self.expression(x)
        scalar = SCALARS.get(e.function)
        if scalar is None:
            raise self.fault(f"there is no scalar function {e.function!r}")
        types = [x.dtype for x in e.args]
        shown = f"{e.function}({', '.join(map(str, types))}) -> {e.dtype}"
        self.require(len(types) == scalar.arity, f"{shown} takes {scalar.arity} arguments")
        if e.function == "where":
            self.require(types[0] == BOOL and types[1] == types[2] == e.dtype, f"{shown} has wrong types")
        elif e.function != "cast":
            result = BOOL if scalar.result == "bool" else types[0]
            self.require(all(t == types[0] for t in types) and e.dtype == result, f"{shown} has wrong types")
            if e.function in ("and", "or", "not"):
                self.require(types[0] == BOOL, f"{shown} has wrong types")

    def guarded(self, e: Guarded) -> None:
        for g in e.guards:
            self.dims("a guard", (g.at, g.bound))
        self.expression(e.fill)
        self.guards += e.guards
        self.expression(e.value)
        del self.guards[len(self.guards) - len(e.guards):]
        self.require(e.value.dtype == e.fill.dtype,
                     f"a guarded {e.value.dtype} is filled with {e.fill.dtype}")

    def reduce(self, e: Reduce) -> None:
        self.require(REDUCTIONS.get(e.kind) == len(e.operands), f"{e.kind} of {len(e.operands)} operands")
        self.require(0 <= e.result < len(e.operands), f"{e.kind} has no operand {e.result}")
        self.require(not e.lanes or e.lanes in [v for v, _ in e.loops],
                     f"{e.kind} has no loop over {e.lanes}")
        with self.loops(e.loops):
            for let in e.lets:
                self.let(let)
            for x in e.operands:
                self.expression(x)
        logical = e.operands[0].dtype == BOOL
        self.require(logical or e.kind not in ("any", "all"), f"{e.kind} of {e.operands[0].dtype}")
        self.require(not logical or e.kind not in ("sum", "prod"), f"{e.kind} of {e.operands[0].dtype}")
        if len(e.operands) == 2:
            self.require(e.operands[1].dtype.is_integer, f"{e.kind} numbers its elements in "
                                                         f"{e.operands[1].dtype}")


def _dims_of(e: Expr) -> tuple[DimLike, ...]:
    if isinstance(e, Load):
        return e.index
    if isinstance(e, Index):
        return (e.at,)
    if isinstance(e, Guarded):
        return tuple(d for g in e.guards for d in (g.at, g.bound))
    if isinstance(e, Reduce):
        return tuple(extent for _, extent in e.loops)
    return ()


class _Program:
    def __init__(self, program: KernelProgram, stage: str) -> None:
        self.program, self.plan, self.stage = program, program.plan, stage
        self.table: dict[str, Buffer] = {b.id: b for b in self.plan.buffers}
        # buffer -> position of the first item that writes it
        self.written: dict[str, int] = {}
        self.counters: set[str] = set()                     # of the loops around and before an item
        self.placed = any(b.role == "arena" and b.last for b in self.plan.buffers)      # `memory` has run
        # buffer -> positions of the items that touch it or a view of it
        self.touching: dict[str, set[int]] = {}
        for place in places(self.plan.body):
            for id in touched(place.item):
                for name in {id, self.table[id].base} if id in self.table else {id}:
                    self.touching.setdefault(name, set()).add(place.position)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise CompilerError(f"program {self.plan.name}: {message}", stage=self.stage)

    def run(self) -> None:
        plan = self.plan
        self.require(len(self.table) == len(plan.buffers), "two buffers have one id")
        for role, ids in (("feed", plan.feeds), ("output", plan.outputs), ("state", plan.states)):
            for id in ids:
                self.require(id in self.table and self.table[id].role == role, f"{id} is listed as a {role}")
        for b in plan.buffers:
            self.require((b.role == "view") == bool(b.base) and (not b.base or b.base in self.table
                                                                 and not self.table[b.base].base),
                         f"{b.id}, a {b.role}, lies in {b.base!r}")
            self.require(not b.layout or (b.role == "arena" and is_layout(b.layout, len(b.shape))),
                         f"{b.id} ({b.role}, {len(b.shape)} axes) has the layout {b.layout!r}")
        self.body(plan.body, 0)
        launched = {item.kernel for item in launches(plan.body)}
        unused = sorted(set(self.program.kernels) - launched)
        self.require(not unused, f"nothing launches {', '.join(unused)}")
        for id in (*plan.outputs, *plan.written):
            self.require(id in self.written, f"nothing writes {id}")

    def body(self, body: Sequence[Item], position: int) -> None:
        """The items of one body, the first of which has this position."""
        outside = set(self.counters)
        for item in body:
            who = f"item {position}"
            if isinstance(item, Repeat):
                known = {*self.plan.symbols, *self.counters}
                self.require(item.counter not in known, f"{who} counts with {item.counter} a second time")
                self.require(symbols_of(item.trips) <= set(self.plan.symbols),
                             f"{who} makes {item.trips} trips")
                if item.condition:
                    self.bool_scalar(who, position, item.condition)
                self.counters.add(item.counter)
                self.rows(who, item)
                self.body(item.body, position + 1)
            elif isinstance(item, Branch):
                self.bool_scalar(who, position, item.predicate)
                self.body(item.then, position + 1)
                self.body(item.otherwise, position + 1 + positions(item.then))
            else:
                self.item(position, item)
            position += positions([item])
        self.counters = outside

    def rows(self, who: str, item: Repeat) -> None:
        """A loop that is cut along rows: all of its kernels are, and no row needs another."""
        if item.rows == 0:
            return
        names = [x.kernel for x in item.body if isinstance(x, Launch)]
        self.require(all(name in self.program.kernels and self.program.kernels[name].rows for name in names),
                     f"{who} is cut along rows, but a kernel in it is not")
        reason = dependence(item.body, item.rows, self.program.kernels, self.table)
        reason = reason or ("it has a condition" if item.condition else "")
        self.require(not reason, f"{who} is cut along rows, but {reason}")

    def bool_scalar(self, who: str, position: int, id: str) -> None:
        self.read(who, position, id)
        b = self.table[id]
        self.require(b.dtype == BOOL and product(b.shape) == 1, f"{who}: {b.id} is no bool scalar")

    def item(self, position: int, item: Launch | Copy | Check) -> None:
        who = f"item {position}"
        if isinstance(item, Check):
            self.check(who, position, item)
        elif isinstance(item, Copy):
            self.read(who, position, item.source)
            self.write(who, position, item.target)
            a, b = self.table[item.source], self.table[item.target]
            same = a.dtype == b.dtype and a.layout == b.layout and product(a.shape) == product(b.shape)
            self.require(same and a.id != b.id, f"{who} copies {a.id} to {b.id}, which is of another size or "
                                                f"type")
        else:
            self.launch(who, position, item)

    def check(self, who: str, position: int, item: Check) -> None:
        self.bool_scalar(who, position, item.buffer)
        self.require(0 <= item.code < len(self.plan.messages), f"{who}: no message has the code {item.code}")
        late = [id for id in self.written if self.table[id].role == "state"]
        self.require(not late, f"{who} checks after the state {', '.join(late)} was written")

    def launch(self, who: str, position: int, item: Launch) -> None:
        kernel = self.program.kernels.get(item.kernel)
        if kernel is None:
            raise CompilerError(f"program {self.plan.name}: {who} launches {item.kernel}, which there is not",
                                stage=self.stage)
        who = f"{who} ({item.kernel})"
        count = len(kernel.arguments)
        self.require(count == len(item.buffers), f"{who} takes {count} buffers, not {len(item.buffers)}")
        unknown = set(kernel.symbols) - set(self.plan.symbols)
        self.require(not unknown, f"{who} uses the symbol {', '.join(sorted(unknown))}, which the program "
                                  f"has not")
        pairs = list(zip(kernel.arguments, item.buffers))
        for a, id in pairs:
            self.fits(who, a, id)
        for a, id in pairs:
            if a.mode != "r":
                self.require(self.alone(id, item.buffers), f"{who} gets {id}, which it writes, twice")
            if a.mode != "w":
                self.read(who, position, id)
        writes = [id for a, id in pairs if a.mode != "r"]
        self.require(not item.writes or set(item.writes) == set(writes),
                     f"{who} does not write {item.writes}")
        for id in writes:
            if self.table[id].role == "state":
                self.overwrite(who, position, item, id)
            self.write(who, position, id)

    def fits(self, who: str, a: Argument, id: str) -> None:
        """Element types must be equal; the shape is in the order of memory and may be another one of the same
        elements (see `collapse`)."""
        self.require(id in self.table, f"{who} uses the unknown buffer {id}")
        b = self.table[id]
        self.require(a.dtype == b.dtype, f"{who} takes {a.dtype} as {a.name}, but {id} is {b.dtype}")
        self.require(product(a.shape) == product(b.shape),
                     f"{who} takes {list(a.shape)} as {a.name}, but {id} is {list(b.shape)}")

    def alone(self, id: str, buffers: Sequence[str]) -> bool:
        """Whether no other of the buffers is the same memory, as far as that can be told."""
        b = self.table[id]
        others = [self.table[other] for other in buffers if other != id]
        return buffers.count(id) == 1 and not any(
            other.id == b.base or other.base == b.id or (other.base and other.base == b.base
                                                         and other.offset == b.offset) for other in others)

    def overwrite(self, who: str, position: int, item: Launch, id: str) -> None:
        """A state is written once, after everything that reads its old value, which the launch names."""
        self.require(id not in self.written, f"{who} writes the state {id} a second time")
        readers = {p for p in self.touching.get(id, ()) if p < position}
        forgotten = sorted(readers - set(item.after))
        self.require(not forgotten, f"{who} overwrites {id}, but is not ordered after {forgotten}, which "
                                    f"read it")
        self.require(all(0 <= i < position for i in item.after), f"{who} is ordered after {list(item.after)}")

    def read(self, who: str, position: int, id: str) -> None:
        base = self.alive(who, position, id)
        if base.role in ("arena", "output"):
            self.require(base.id in self.written, f"{who} reads {id}, which nothing has written before")

    def write(self, who: str, position: int, id: str) -> None:
        base = self.alive(who, position, id)
        self.require(base.role not in ("feed", "constant"), f"{who} writes {id}, a {base.role}")
        self.require(base.role != "state" or id in self.plan.written,
                     f"{who} writes {id}, a state not listed as written")
        self.written.setdefault(base.id, position)

    def alive(self, who: str, position: int, id: str) -> Buffer:
        """Checks that the buffer may be used here; gives the one whose memory it is."""
        self.require(id in self.table, f"{who} uses the unknown buffer {id}")
        unknown = symbols_of(self.table[id].offset) - set(self.plan.symbols) - self.counters
        self.require(not unknown, f"{who} uses {id} outside the loop of {', '.join(sorted(unknown))}")
        b = self.table[base_of(self.table, id)]
        if self.placed and b.role == "arena":
            self.require(b.first <= position <= b.last, f"{who} uses {id}, which lives from {b.first} to "
                                                        f"{b.last}")
        return b


def touched(item: Item) -> tuple[str, ...]:
    """The buffers that a launch gets or a copy reads."""
    if isinstance(item, Launch):
        return item.buffers
    return (item.source,) if isinstance(item, Copy) else ()
