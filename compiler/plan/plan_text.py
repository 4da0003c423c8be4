"""The text form of a plan: one line per thing, by the grammar in docs/plan-grammar.md. Print, parse,
print is the identity."""
from __future__ import annotations

import hashlib
from collections.abc import Callable

from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.schema import (
    MAX_DEPTH,
    ROLES,
    SCHEMA_VERSION,
    Branch,
    Buffer,
    Check,
    Copy,
    EntryGuard,
    Function,
    Item,
    Launch,
    Message,
    Plan,
    Repeat,
    positions,
)
from graphflow.compiler.plan.text import Scanner, dim_text, literal_text, name_text, type_text


def print_plan(plan: Plan, origins: bool = True) -> str:
    """The plan as text. Without `origins`, lines that moved in the user's file change nothing."""
    lines = [f"plan {name_text(plan.name)} version {plan.version} target {literal_text(plan.target)}",
             f"symbols {_names(plan.symbols)}"]
    lines += [_buffer_line(b, origins) for b in plan.buffers]
    for word, ids in (("feeds", plan.feeds), ("outputs", plan.outputs), ("states", plan.states),
                      ("written", plan.written)):
        lines.append(f"{word} {_names(ids)}")
    _item_lines(plan.body, 0, "", origins, lines)
    for m in plan.messages:
        feed = f" feed {name_text(m.feed)}" if m.feed else ""
        lines.append(f"message {literal_text(m.text)}{feed}{_at((m.origin,), origins)}")
    for g in plan.guards:
        lines.append(f"guard {dim_text(g.left)} == {dim_text(g.right)}{_at((g.origin,), origins)}")
    for f in plan.functions:
        dynamic = f" dynamic {f.dynamic}" if f.dynamic else ""
        lines.append(f"function {name_text(f.name)} threads {f.threads} symbols {_names(f.symbols)}{dynamic} "
                     f"registers {f.registers} shared {f.shared} spilled {f.spilled}")
    return "\n".join(lines) + "\n"


def plan_hash(plan: Plan) -> str:
    """A hash (64 hexadecimal digits) of what the plan does, source lines left out: what a checkpoint
    records."""
    return hashlib.sha256(print_plan(plan, origins=False).encode()).hexdigest()


def _names(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(map(name_text, names)) + "]"


def _at(origins: tuple[int, ...], shown: bool) -> str:
    return f" #{','.join(map(str, origins))}" if origins and shown and origins[0] >= 0 else ""


def _buffer_line(b: Buffer, origins: bool) -> str:
    line = f"buffer {name_text(b.id)} {b.role} {name_text(b.name)} : {type_text(b.dtype, b.shape, b.layout)}"
    if b.role == "arena":
        line += f" live {b.first} to {b.last}"
    if b.alias:
        line += f" over {name_text(b.alias)}"
    if b.role == "view":
        line += f" of {name_text(b.base)} at {dim_text(b.offset)}"
    if b.role == "constant":
        line += f" data {literal_text(b.data)}"
    return line + _at(b.origins, origins)


def _item_lines(body: tuple[Item, ...], position: int, indent: str, origins: bool, lines: list[str]) -> None:
    for item in body:
        last = position + positions([item]) - 1
        if isinstance(item, Repeat):
            head = f"repeat {name_text(item.counter)} < {dim_text(item.trips)}"
            head += f" while {name_text(item.condition)}" if item.condition else ""
            head += f" rows {dim_text(item.rows)}" if item.rows != 0 else ""
            lines.append(f"{indent}{position}: {head} {{")
            _item_lines(item.body, position + 1, indent + "  ", origins, lines)
            lines.append(f"{indent}{last}: }}")
        elif isinstance(item, Branch):
            lines.append(f"{indent}{position}: branch {name_text(item.predicate)} {{")
            _item_lines(item.then, position + 1, indent + "  ", origins, lines)
            lines.append(f"{indent}}} else {{")
            _item_lines(item.otherwise, position + 1 + positions(item.then), indent + "  ", origins, lines)
            lines.append(f"{indent}{last}: }}")
        else:
            lines.append(indent + _item_line(position, item, origins))
        position = last + 1


def _item_line(position: int, item: Launch | Copy | Check, origins: bool) -> str:
    if isinstance(item, Copy):
        return f"{position}: copy {name_text(item.source)} to {name_text(item.target)}"
    if isinstance(item, Check):
        return f"{position}: check {name_text(item.buffer)} code {item.code}"
    line = f"{position}: launch {name_text(item.kernel)} {_names(item.buffers)} writes {_names(item.writes)}"
    line += f" tasks {dim_text(item.tasks)}"
    if item.scratch != 0:
        line += f" scratch {dim_text(item.scratch)}"
    if item.shared != 0:
        line += f" shared {dim_text(item.shared)}"
    if item.after:
        line += f" after [{', '.join(map(str, item.after))}]"
    return line + _at(item.origins, origins)


def parse_plan(text: str, source: str = "plan") -> Plan:
    """Reads what `print_plan` prints (with or without origins), and validates it.

    TextError with the line and column where the text breaks the grammar, PlanError where the plan breaks
    a rule (see `validate`). The text is untrusted: nothing in it is executed.
    """
    from graphflow.compiler.plan.validate import validate
    s = Scanner(text, source)
    plan = scan_plan(s)
    s.end()
    validate(plan)
    return plan


def scan_plan(s: Scanner) -> Plan:
    """Reads a plan where the scanner stands, unvalidated: before `memory` a plan is not yet whole."""
    return _Parser(s).plan()


class _Parser:
    """Reads the lines of a plan in the order in which they are printed."""

    def __init__(self, s: Scanner) -> None:
        self.s = s
        self.position = self.depth = 0

    def plan(self) -> Plan:
        s = self.s
        s.expect("plan")
        name = s.name()
        s.expect("version")
        version = s.integer()
        if version != SCHEMA_VERSION:
            raise s.error(f"the plan is of version {version}, this graphflow reads version {SCHEMA_VERSION}")
        s.expect("target")
        target = s.string()
        s.expect("symbols")
        symbols = s.sequence("[", s.name, "]")
        buffers = self._lines("buffer", self._buffer)
        feeds, outputs, states, written = map(self._ids, ("feeds", "outputs", "states", "written"))
        body = self._body()
        messages = self._lines("message", self._message)
        guards = self._lines("guard", self._guard)
        functions = self._lines("function", self._function)
        return Plan(name, target, symbols, tuple(buffers), feeds, outputs, states, written, body,
                    tuple(messages), tuple(guards), tuple(functions), version)

    def _ids(self, word: str) -> tuple[str, ...]:
        self.s.expect(word)
        return self.s.sequence("[", self.s.name, "]")

    def _lines(self, word: str, read: Callable) -> list:
        out = []
        while self.s.accept(word):
            out.append(read())
        return out

    def _origins(self) -> tuple[int, ...]:
        if not self.s.accept("#"):
            return ()
        out = [self.s.integer()]
        while self.s.accept(","):
            out.append(self.s.integer())
        return tuple(out)

    def _origin(self) -> int:
        return self.s.integer() if self.s.accept("#") else -1

    def _buffer(self) -> Buffer:
        s = self.s
        id, role, name = s.name(), s.word(ROLES, "a role"), s.name()
        s.expect(":")
        dtype, shape, layout = s.type()
        first = last = 0
        if role == "arena":
            s.expect("live")
            first = s.integer()
            s.expect("to")
            last = s.integer()
        alias = s.name() if s.accept("over") else ""
        data, base = b"", ""
        offset: DimLike = 0
        if role == "constant":
            s.expect("data")
            data = self._data(dtype)
        if role == "view":
            s.expect("of")
            base = s.name()
            s.expect("at")
            offset = s.dim()
        return Buffer(id, role, name, dtype, shape, layout, first, last, alias, self._origins(), data, base,
                      offset)

    def _data(self, dtype: DType) -> bytes:
        data = self.s.literal()
        if not isinstance(data, bytes) or len(data) % dtype.bytes:
            raise self.s.error(f"the data of a constant is hex\"...\" with whole elements of {dtype}")
        return data

    def _body(self) -> tuple[Item, ...]:
        body: list[Item] = []
        while self.s.kind() == "integer" and self.s.peek(2) != "}":
            self._number()
            body.append(self._item())
        return tuple(body)

    def _number(self) -> None:
        if self.s.integer() != self.position:
            raise self.s.error(f"the items of the body are numbered from 0 without gaps: expected "
                               f"{self.position}")
        self.position += 1
        self.s.expect(":")

    def _block(self, end: Callable[[], None]) -> tuple[Item, ...]:
        """What stands in braces; `end` reads the number of the closing one, if it has one."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.s.error(f"loops and branches nest deeper than {MAX_DEPTH}")
        self.s.expect("{")
        body = self._body()
        end()
        self.s.expect("}")
        self.depth -= 1
        return body

    def _repeat(self) -> Repeat:
        s = self.s
        counter = s.name()
        s.expect("<")
        trips = s.dim()
        condition = s.name() if s.accept("while") else ""
        rows = s.dim() if s.accept("rows") else 0
        return Repeat(counter, trips, self._block(self._number), condition, rows)

    def _branch(self) -> Branch:
        predicate = self.s.name()
        then = self._block(lambda: None)
        self.s.expect("else")
        return Branch(predicate, then, self._block(self._number))

    def _item(self) -> Item:
        s = self.s
        word = s.word(("launch", "copy", "check", "repeat", "branch"), "what to do")
        if word == "repeat":
            return self._repeat()
        if word == "branch":
            return self._branch()
        if word == "copy":
            source = s.name()
            s.expect("to")
            return Copy(source, s.name())
        if word == "check":
            buffer = s.name()
            s.expect("code")
            return Check(buffer, s.integer())
        kernel, buffers = s.name(), s.sequence("[", s.name, "]")
        s.expect("writes")
        writes = s.sequence("[", s.name, "]")
        s.expect("tasks")
        tasks = s.dim()
        scratch, shared = (s.dim() if s.accept(word) else 0 for word in ("scratch", "shared"))
        after = s.sequence("[", s.integer, "]") if s.accept("after") else ()
        return Launch(kernel, buffers, tasks, scratch, after, self._origins(), writes, shared)

    def _message(self) -> Message:
        text = self.s.string()
        feed = self.s.name() if self.s.accept("feed") else ""
        return Message(text, self._origin(), feed)

    def _guard(self) -> EntryGuard:
        left = self.s.dim()
        self.s.expect("==")
        right = self.s.dim()
        return EntryGuard(left, right, self._origin())

    def _function(self) -> Function:
        s = self.s
        name = s.name()
        s.expect("threads")
        threads = s.integer()
        s.expect("symbols")
        symbols = s.sequence("[", s.name, "]")
        found = [s.integer() if s.accept("dynamic") else 0]
        for word in ("registers", "shared", "spilled"):
            s.expect(word)
            found.append(s.integer())
        return Function(name, threads, symbols, *found)
