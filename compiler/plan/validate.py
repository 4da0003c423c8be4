"""The validator of plans: a plan is refused unless everything that the runtime takes for granted holds.

It treats the plan as untrusted data: no size, number or reference is believed before it is checked.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphflow.compiler.plan.bind import MAX_BYTES
from graphflow.compiler.plan.dims import Dim, DimLike, bounds_of, product, symbol, symbols_of
from graphflow.compiler.plan.dtypes import BOOL, DTYPES
from graphflow.compiler.plan.errors import PlanError
from graphflow.compiler.plan.layouts import is_layout
from graphflow.compiler.plan.schema import (
    MAX_DEPTH,
    ROLES,
    SCHEMA_VERSION,
    Branch,
    Buffer,
    Check,
    Copy,
    Item,
    Launch,
    Plan,
    Repeat,
    base_of,
    launches,
    places,
    positions,
)

MAX_RANK = 32


def validate(plan: Plan) -> None:
    """PlanError, naming the buffer or the item of the body, if the plan breaks any rule."""
    _Validator(plan).run()


class _Validator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.symbols = set(plan.symbols)
        self.table = {b.id: b for b in plan.buffers}
        self.counters: set[str] = set()                # of the loops met so far
        self.in_scope: set[str] = set()                # those that the items at hand may use

    def run(self) -> None:
        plan = self.plan
        if plan.version != SCHEMA_VERSION:
            raise PlanError(f"the plan is of version {plan.version}, this graphflow reads {SCHEMA_VERSION}")
        _require(bool(plan.name), "the plan has no name")
        _unique(plan.symbols, "symbol")
        _unique((b.id for b in plan.buffers), "buffer")
        _require(_depth(plan.body) <= MAX_DEPTH, f"loops and branches nest deeper than {MAX_DEPTH}")
        self.items = {p.position: p.item for p in places(plan.body)}
        self.every_counter = {item.counter for item in self.items.values() if isinstance(item, Repeat)}
        self.length = positions(plan.body)
        for b in plan.buffers:
            self.buffer(b)
        self.lists()
        decided = symbols_of(*(d for id in plan.feeds for d in self.table[id].shape))
        undecided = [name for name in plan.symbols if name not in decided]
        _require(not undecided, f"no feed's shape has the symbol {', '.join(undecided)}")
        self.aliases()
        written: set[str] = set()
        self.body(plan.body, 0, written)
        missing = [id for id in (*plan.outputs, *plan.written) if id not in written]
        _require(not missing, f"nothing writes {', '.join(missing)}")
        for i, m in enumerate(plan.messages):
            _require(not m.feed or m.feed in {self.table[id].name for id in plan.feeds},
                     f"message {i} blames the feed {m.feed!r}, which there is not")
        for i, g in enumerate(plan.guards):
            self.known(f"guard {i}", g.left, g.right)
        self.functions()

    def functions(self) -> None:
        functions = {f.name: f for f in self.plan.functions}
        _unique((f.name for f in self.plan.functions), "function")
        for f in functions.values():
            _require(1 <= f.threads <= 1024, f"function {f.name!r} has blocks of {f.threads} threads")
            _require(f.dynamic >= 0, f"function {f.name!r} asks for {f.dynamic} bytes of shared memory")
            self.known(f"function {f.name!r}", *map(symbol, f.symbols))
        if functions:
            missing = {item.kernel for item in launches(self.plan.body)} - functions.keys()
            _require(not missing, f"nothing says how to launch {', '.join(sorted(missing))}")

    def known(self, who: str, *dims: DimLike) -> None:
        unknown = symbols_of(*dims) - self.symbols
        _require(not unknown, f"{who} uses the unknown symbol {', '.join(sorted(unknown))}")

    def buffer(self, b: Buffer) -> None:
        who = f"buffer {b.id!r}"
        _require(bool(b.id), "a buffer has no id")
        _require(b.role in ROLES, f"{who} has the unknown role {b.role!r}")
        _require(DTYPES.get(b.dtype.name) == b.dtype, f"{who} has the unknown element type {b.dtype}")
        _require(len(b.shape) <= MAX_RANK, f"{who} has {len(b.shape)} axes, more than {MAX_RANK}")
        self.known(who, *b.shape)
        _require(not b.layout or (b.role == "arena" and is_layout(b.layout, len(b.shape))),
                 f"{who}, {b.role} of {len(b.shape)} axes, has the layout {b.layout!r}")
        _require(all(isinstance(d, Dim) or 0 <= d <= MAX_BYTES for d in b.shape),
                 f"{who} has an axis that is negative or absurdly large")
        size = product(b.shape) * b.dtype.bytes
        _require(isinstance(size, Dim) or size <= MAX_BYTES, f"{who} takes {size} bytes")
        if b.role in ("state", "constant"):
            _require(not isinstance(size, Dim), f"{who} is a {b.role}: its shape must be constant")
        _require(len(b.data) == (size if b.role == "constant" else 0),
                 f"{who} of {size} bytes holds {len(b.data)} bytes of data")
        _require(bool(b.base) == (b.role == "view") and (b.role == "view" or b.offset == 0),
                 f"{who}, a {b.role}, lies in {b.base!r} at {b.offset}")
        if b.role == "view":
            self.view(who, b)
        if b.role == "arena":
            _require(0 <= b.first <= b.last < self.length,
                     f"{who} lives from {b.first} to {b.last}, outside the body of {self.length} items")
        else:
            _require(b.first == b.last == 0 and not b.alias, f"{who}, a {b.role}, has a lifetime")
            _require(bool(b.name) or b.role in ("constant", "view"), f"{who} is a {b.role} without a name")

    def view(self, who: str, b: Buffer) -> None:
        """A view lies in a buffer of its type that is no view; `bind` sees to it that it lies within."""
        _require(b.base in self.table and self.table[b.base].role != "view",
                 f"{who} lies in {b.base!r}, which is no buffer of its own")
        base = self.table[b.base]
        _require((base.dtype, base.layout, b.layout) == (b.dtype, "", ""),
                 f"{who} lies in {b.base!r}, which is of another type")
        unknown = symbols_of(b.offset) - self.symbols - self.every_counter
        _require(not unknown, f"{who} uses the unknown symbol {', '.join(sorted(unknown))}")

    def lists(self) -> None:
        """Feeds, outputs and states list each buffer of their role once; names are distinct in a role."""
        plan = self.plan
        for role, ids in (("feed", plan.feeds), ("output", plan.outputs), ("state", plan.states)):
            _unique(ids, f"listed {role}")
            for id in ids:
                _require(id in self.table and self.table[id].role == role, f"{id!r} is not a {role}")
            listed = set(ids)
            left = [b.id for b in self.plan.buffers if b.role == role and b.id not in listed]
            _require(not left, f"{role} {', '.join(left)} is not listed")
            _unique((self.table[id].name for id in ids), f"name of a {role}")
        _unique(self.plan.written, "written state")
        for id in self.plan.written:
            _require(id in set(self.plan.states), f"{id!r} is listed as written but is no state")

    def aliases(self) -> None:
        """A buffer takes over one defined before it that dies where it begins, or in the loop that it begins
        in, is no smaller, and is free."""
        loops = {(p.position, p.last) for p in places(self.plan.body) if isinstance(p.item, Repeat)}
        before: set[str] = set()
        taken: set[str] = set()
        for b in self.plan.buffers:
            if b.alias:
                who = f"buffer {b.id!r} takes over {b.alias!r}"
                _require(b.alias in before, f"{who}, which no line before it defines")
                old = self.table[b.alias]
                _require(old.role == "arena", f"{who}, which is not in the arena")
                _require(old.id not in taken, f"{who}, which another one has taken over")
                _require(old.first < b.first and (b.first == old.last or (b.first, old.last) in loops),
                         f"{who}, alive from {old.first} to {old.last}, but begins at {b.first}")
                more = product(old.shape) * old.dtype.bytes - product(b.shape) * b.dtype.bytes
                low = bounds_of(more, {})[0]
                _require(low is not None and low >= 0, f"{who}, which may be smaller")
                taken.add(old.id)
            before.add(b.id)

    def body(self, body: Sequence[Item], position: int, written: set[str]) -> None:
        """The items of one body, the first of which has this position; `written` collects what has been
        written before each."""
        outside = set(self.in_scope)
        for item in body:
            if isinstance(item, Repeat):
                self.repeat(position, item, written)
            elif isinstance(item, Branch):
                self.branch(position, item, written)
            else:
                self.item(position, item, written)
            position += positions([item])
        self.in_scope = outside

    def repeat(self, position: int, item: Repeat, written: set[str]) -> None:
        who = f"item {position}"
        _require(bool(item.counter) and item.counter not in self.counters | self.symbols,
                 f"{who} counts with {item.counter!r}, which is something else")
        self.counters.add(item.counter)
        self.known(who, item.trips)
        _require(isinstance(item.trips, Dim) or 0 <= item.trips <= MAX_BYTES,
                 f"{who} has absurd trips: {item.trips}")
        if item.condition:
            self.bool_scalar(who, position, item.condition, written)
        if item.rows != 0:
            self.known(who, item.rows)
            _require(not item.condition and all(self.in_rows(x, item.rows) for x in item.body),
                     f"{who} is cut along {item.rows} rows, but not all that it holds is")
        self.in_scope.add(item.counter)
        self.body(item.body, position + 1, written)
        if item.condition:
            self.use(who, position + positions(item.body) + 1, [item.condition], written)

    def in_rows(self, item: Item, rows: DimLike) -> bool:
        """Whether the item has a task, or moves a piece, for each row."""
        if isinstance(item, Copy):
            moved = [self.table[id] for id in (item.source, item.target) if id in self.table]
            return all(b.shape[:1] == (rows,) for b in moved)
        return isinstance(item, Launch) and item.tasks == rows

    def branch(self, position: int, item: Branch, written: set[str]) -> None:
        self.bool_scalar(f"item {position}", position, item.predicate, written)
        then, otherwise = set(written), set(written)
        self.body(item.then, position + 1, then)
        self.body(item.otherwise, position + 1 + positions(item.then), otherwise)
        written |= then & otherwise

    def bool_scalar(self, who: str, position: int, id: str, written: set[str]) -> None:
        self.use(who, position, [id], written)
        b = self.table[id]
        _require(b.dtype == BOOL and product(b.shape) == 1, f"{who}: {id!r} is no bool scalar")

    def item(self, position: int, item: Launch | Copy | Check, written: set[str]) -> None:
        """One item that is no loop and no branch."""
        who = f"item {position}"
        if isinstance(item, Check):
            self.bool_scalar(who, position, item.buffer, written)
            _require(0 <= item.code < len(self.plan.messages), f"{who}: no message has the code {item.code}")
            late = [id for id in self.plan.written if id in written]
            _require(not late, f"{who} checks after the state {', '.join(late)} was written")
        elif isinstance(item, Copy):
            self.use(who, position, [item.source], written)
            self.write(who, position, [item.target], written)
            a, b = self.table[item.source], self.table[item.target]
            same = (a.dtype, a.layout, product(a.shape)) == (b.dtype, b.layout, product(b.shape))
            _require(a.id != b.id and same, f"{who} copies {a.id!r} to {b.id!r}, which is of another size")
        else:
            self.launch(who, position, item, written)

    def launch(self, who: str, position: int, item: Launch, written: set[str]) -> None:
        _require(bool(item.kernel), f"{who} launches a kernel without a name")
        _unique(item.writes, f"buffer written by {who}")
        _require(set(item.writes) <= set(item.buffers), f"{who} writes a buffer that it is not given")
        _require(bool(item.writes), f"{who} writes nothing")
        self.write(who, position, item.writes, written)
        self.use(who, position, item.buffers, written)
        self.known(who, item.tasks, item.scratch, item.shared)
        for what, d in (("tasks", item.tasks), ("scratch", item.scratch), ("scratch", item.shared)):
            _require(isinstance(d, Dim) or 0 <= d <= MAX_BYTES, f"{who} has absurd {what}: {d}")
        for other in item.after:
            _require(0 <= other < position, f"{who} must run after item {other}, which is not before it")
            earlier = self.items.get(other)
            touched = earlier.buffers if isinstance(earlier, Launch) else (
                (earlier.source,) if isinstance(earlier, Copy) else ())
            shared = {base_of(self.table, id) for id in touched} & set(item.writes)
            _require(any(self.table[id].role == "state" for id in shared),
                     f"{who} must run after item {other}, which reads no state that it writes")

    def use(self, who: str, position: int, ids: Iterable[str], written: set[str]) -> None:
        for id in ids:
            _require(id in self.table, f"{who} uses the unknown buffer {id!r}")
            unknown = symbols_of(self.table[id].offset) - self.symbols - self.in_scope
            _require(not unknown, f"{who} uses {id!r}, which counts with {', '.join(sorted(unknown))}, the "
                                  f"counter of a loop elsewhere")
            b = self.table[base_of(self.table, id)]
            if b.role == "arena":
                _require(b.first <= position <= b.last,
                         f"{who} uses {id!r}, which lives from {b.first} to {b.last} only")
            if b.role in ("arena", "output"):
                _require(b.id in written, f"{who} reads {id!r}, which nothing has written before")

    def write(self, who: str, position: int, ids: Sequence[str], written: set[str]) -> None:
        for id in ids:
            _require(id in self.table, f"{who} uses the unknown buffer {id!r}")
            b = self.table[base_of(self.table, id)]
            _require(b.role not in ("feed", "constant"), f"{who} writes {id!r}, a {b.role}")
            _require(b.role != "state" or id in self.plan.written,
                     f"{who} writes the state {id!r}, which is not listed as written")
            written.add(b.id)
        self.use(who, position, ids, written)


def _depth(body: Sequence[Item]) -> int:
    """How deep loops and branches nest, counted without recursion."""
    depth, level = 0, list(body)
    while True:
        level = [x for item in level if isinstance(item, (Repeat, Branch))
                 for x in ((*item.body,) if isinstance(item, Repeat) else (*item.then, *item.otherwise))]
        if not level:
            return depth
        depth += 1
        if depth > MAX_DEPTH:
            return depth


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(f"not a valid plan: {message}")


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        _require(name not in seen, f"the {what} {name!r} comes twice")
        seen.add(name)
