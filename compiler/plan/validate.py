"""The validator of plans: a plan is refused unless everything that the runtime takes for granted holds.

It treats the plan as untrusted data: no size, number or reference is believed before it is checked.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphflow.compiler.plan.bind import MAX_BYTES
from graphflow.compiler.plan.dims import Dim, DimLike, bounds_of, product, symbols_of
from graphflow.compiler.plan.dtypes import BOOL, DTYPES
from graphflow.compiler.plan.errors import PlanError
from graphflow.compiler.plan.schema import ROLES, SCHEMA_VERSION, Buffer, Check, Copy, Item, Launch, Plan

MAX_RANK = 32


def validate(plan: Plan) -> None:
    """PlanError, naming the buffer or the item of the body, if the plan breaks any rule."""
    _Validator(plan).run()


class _Validator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.symbols = set(plan.symbols)
        self.table = {b.id: b for b in plan.buffers}

    def run(self) -> None:
        plan = self.plan
        if plan.version != SCHEMA_VERSION:
            raise PlanError(f"the plan is of version {plan.version}, this graphflow reads {SCHEMA_VERSION}")
        _require(bool(plan.name), "the plan has no name")
        _unique(plan.symbols, "symbol")
        _unique((b.id for b in plan.buffers), "buffer")
        for b in plan.buffers:
            self.buffer(b)
        self.lists()
        decided = symbols_of(*(d for id in plan.feeds for d in self.table[id].shape))
        undecided = [name for name in plan.symbols if name not in decided]
        _require(not undecided, f"no feed's shape has the symbol {', '.join(undecided)}")
        self.aliases()
        written: set[str] = set()
        for position, item in enumerate(plan.body):
            self.item(position, item, written)
        missing = [id for id in (*plan.outputs, *plan.written) if id not in written]
        _require(not missing, f"nothing writes {', '.join(missing)}")
        for i, m in enumerate(plan.messages):
            _require(not m.feed or m.feed in {self.table[id].name for id in plan.feeds},
                     f"message {i} blames the feed {m.feed!r}, which there is not")
        for i, g in enumerate(plan.guards):
            self.known(f"guard {i}", g.left, g.right)

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
        _require(all(isinstance(d, Dim) or 0 <= d <= MAX_BYTES for d in b.shape),
                 f"{who} has an axis that is negative or absurdly large")
        size = product(b.shape) * b.dtype.bytes
        _require(isinstance(size, Dim) or size <= MAX_BYTES, f"{who} takes {size} bytes")
        if b.role in ("state", "constant"):
            _require(not isinstance(size, Dim), f"{who} is a {b.role}: its shape must be constant")
        _require(len(b.data) == (size if b.role == "constant" else 0),
                 f"{who} of {size} bytes holds {len(b.data)} bytes of data")
        if b.role == "arena":
            length = len(self.plan.body)
            _require(0 <= b.first <= b.last < length,
                     f"{who} lives from {b.first} to {b.last}, outside the body of {length} items")
        else:
            _require(b.first == b.last == 0 and not b.alias, f"{who}, a {b.role}, has a lifetime")
            _require(bool(b.name) or b.role == "constant", f"{who} is a {b.role} without a name")

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
        """A buffer takes over one defined before it that dies where it begins, is no smaller, and is free."""
        before: set[str] = set()
        taken: set[str] = set()
        for b in self.plan.buffers:
            if b.alias:
                who = f"buffer {b.id!r} takes over {b.alias!r}"
                _require(b.alias in before, f"{who}, which no line before it defines")
                old = self.table[b.alias]
                _require(old.role == "arena", f"{who}, which is not in the arena")
                _require(old.id not in taken, f"{who}, which another one has taken over")
                _require(old.first < b.first == old.last,
                         f"{who}, alive from {old.first} to {old.last}, but begins at {b.first}")
                more = product(old.shape) * old.dtype.bytes - product(b.shape) * b.dtype.bytes
                low = bounds_of(more, {})[0]
                _require(low is not None and low >= 0, f"{who}, which may be smaller")
                taken.add(old.id)
            before.add(b.id)

    def item(self, position: int, item: Item, written: set[str]) -> None:
        """One item of the body; `written` collects what has been written before it."""
        who = f"item {position}"
        if isinstance(item, Check):
            self.use(who, position, [item.buffer], written)
            b = self.table[item.buffer]
            _require(b.dtype == BOOL and product(b.shape) == 1, f"{who}: {b.id!r} is no bool scalar")
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
        self.known(who, item.tasks, item.scratch)
        for what, d in (("tasks", item.tasks), ("scratch", item.scratch)):
            _require(isinstance(d, Dim) or 0 <= d <= MAX_BYTES, f"{who} has absurd {what}: {d}")
        for other in item.after:
            _require(0 <= other < position, f"{who} must run after item {other}, which is not before it")
            earlier = self.plan.body[other]
            shared = set(earlier.buffers) & set(item.writes) if isinstance(earlier, Launch) else ()
            _require(any(self.table[id].role == "state" for id in shared),
                     f"{who} must run after item {other}, which reads no state that it writes")

    def use(self, who: str, position: int, ids: Iterable[str], written: set[str]) -> None:
        for id in ids:
            _require(id in self.table, f"{who} uses the unknown buffer {id!r}")
            b = self.table[id]
            if b.role == "arena":
                _require(b.first <= position <= b.last,
                         f"{who} uses {id!r}, which lives from {b.first} to {b.last} only")
            if b.role in ("arena", "output"):
                _require(id in written, f"{who} reads {id!r}, which nothing has written before")

    def write(self, who: str, position: int, ids: Sequence[str], written: set[str]) -> None:
        for id in ids:
            _require(id in self.table, f"{who} uses the unknown buffer {id!r}")
            b = self.table[id]
            _require(b.role not in ("feed", "constant"), f"{who} writes {id!r}, a {b.role}")
            _require(b.role != "state" or id in self.plan.written,
                     f"{who} writes the state {id!r}, which is not listed as written")
            written.add(id)
        self.use(who, position, ids, written)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(f"not a valid plan: {message}")


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        _require(name not in seen, f"the {what} {name!r} comes twice")
        seen.add(name)
