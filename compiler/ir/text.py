"""The text form of the tensor graph: print → parse → print is the identity.

One line is one node; its grammar is written down in docs/graph-grammar.md. Attributes at their default are
left out. Origins are numbers into the table of source locations at the end of the text.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from graphflow.compiler.ir.builder import attrs_key
from graphflow.compiler.ir.graph import Graph, Guard, Node, Region, TensorType, Value
from graphflow.compiler.plan.errors import Location, UserError
from graphflow.compiler.plan.text import Scanner, dim_text, literal_text, name_text, type_text

INDENT = "  "


def print_graph(graph: Graph, origins: bool = True) -> str:
    """The graph as text. Without `origins` equal programs on different lines give the same text."""
    return _Printer(origins).graph(graph)


def parse_graph(text: str, source: str = "graph") -> Graph:
    """The graph that the text describes; TextError with line and column otherwise. Types are taken as
    written: `check_graph` compares them with what the ops say. `source` names the text in errors."""
    return _Parser(Scanner(text, source)).graph()


class _Printer:
    def __init__(self, origins: bool) -> None:
        self.with_origins = origins
        self.lines: list[str] = []
        self.numbers: dict[Value, int] = {}
        self.count = 0
        self.locations: dict[Location, int] = {}

    def graph(self, graph: Graph) -> str:
        self.lines.append(f"graph {name_text(graph.name)}")
        self.nodes(graph.nodes(), "")
        if graph.inputs:
            self.lines.append(f"inputs {self.values(graph.inputs)}")
        for name, value in graph.outputs.items():
            self.lines.append(f"output {name_text(name)} = {self.values([value])}")
        for node in graph.effects:
            self.lines.append(f"effect {self.values([node.result()])}")
        for guard in graph.guards:
            where = self.origins([guard.where] if guard.where else [])
            self.lines.append(f"guard {dim_text(guard.left)} == {dim_text(guard.right)}{where}")
        self.lines += [f"#{number} {_location_text(where)}" for where, number in self.locations.items()]
        return "\n".join(self.lines) + "\n"

    def nodes(self, nodes: Iterable[Node], indent: str) -> None:
        for node in nodes:
            for value in node.results:
                self.number(value)
            types = ", ".join(map(_type_text, node.types))
            left = f"{self.values(node.results)} = {node.op}"
            operands = f"({self.values(node.inputs)})" if node.inputs else ""
            line = f"{indent}{left}{operands}{_attrs_text(node)} : {types}{self.origins(node.origins)}"
            for region in node.regions:
                self.lines.append(line + " {")
                self.region(region, indent + INDENT)
                line = indent + "}"
            self.lines.append(line)

    def region(self, region: Region, indent: str) -> None:
        parameters = [f"%{self.number(p)}: {_type_text(p.type)}{self.origins(p.node.origins)}"
                      for p in region.parameters]
        self.lines.append(f"{indent}({', '.join(parameters)})")
        known = {p.node for p in region.parameters}
        self.nodes((n for n in region.nodes() if n not in known), indent)
        self.lines.append(f"{indent}return {self.values(region.results)}".rstrip())

    def number(self, value: Value) -> int:
        """A new number: a region that two nodes share is printed twice."""
        self.numbers[value] = self.count
        self.count += 1
        return self.numbers[value]

    def values(self, values: Iterable[Value]) -> str:
        return ", ".join(f"%{self.numbers[v]}" for v in values)

    def origins(self, origins: Iterable[Location]) -> str:
        if not self.with_origins:
            return ""
        numbers = [str(self.locations.setdefault(o, len(self.locations) + 1)) for o in origins]
        return " #" + ",".join(numbers) if numbers else ""


def _type_text(type: TensorType) -> str:
    return type_text(type.dtype, type.shape, type.layout)


def _attrs_text(node: Node) -> str:
    defaults = _defaults(node.op)
    shown = [f"{name}={literal_text(value)}" for name, value in node.attrs.items()
             if name not in defaults or attrs_key({name: defaults[name]}) != attrs_key({name: value})]
    return f" {{{', '.join(shown)}}}" if shown else ""


def _defaults(op: str) -> Mapping[str, object]:
    from graphflow.compiler.ops import OPS
    return OPS[op].attrs if op in OPS else {}


def _location_text(where: Location) -> str:
    text = f"{literal_text(where.file)} {where.line}"
    if where.column is not None or where.end_column is not None:
        start = "" if where.column is None else str(where.column)
        text += f" columns {start}:{'' if where.end_column is None else where.end_column}"
    return text + (f" in {literal_text(where.scope)}" if where.scope else "")


class _Parser:
    def __init__(self, scanner: Scanner) -> None:
        self.s = scanner
        self.defined: set[int] = set()                        # every value number of the text
        self.origin_numbers: list[tuple[Node, tuple[int, ...]]] = []

    def graph(self) -> Graph:
        s = self.s
        s.expect("graph")
        name = s.name()
        values: dict[int, Value] = {}
        self.nodes(values)
        inputs = self.uses(values) if s.accept("inputs") else ()
        outputs: dict[str, Value] = {}
        while s.accept("output"):
            label = s.name()
            if label in outputs:
                raise s.error(f"a second output named {label!r}")
            s.expect("=")
            outputs[label] = self.use(values)
        effects = []
        while s.accept("effect"):
            effects.append(self.use(values).node)
        guards: list[tuple[Guard, tuple[int, ...]]] = []
        while s.accept("guard"):
            left = s.dim()
            s.expect("==")
            guards.append((Guard(left, s.dim()), self.numbers()))
        table = self.locations()
        s.end()
        self.set_origins(table)
        done = tuple(Guard(g.left, g.right, self.location(table, at[0]) if at else None) for g, at in guards)
        return Graph(name, inputs, outputs, tuple(effects), done)

    def nodes(self, values: dict[int, Value]) -> None:
        while self.s.peek() == "%":
            self.node(values)

    def node(self, values: dict[int, Value]) -> None:
        s = self.s
        results = [self.definition()]
        while s.accept(","):
            results.append(self.definition())
        s.expect("=")
        op, attrs_of = self.op()
        inputs = s.sequence("(", lambda: self.use(values), ")") if s.peek() == "(" else ()
        attrs = attrs_of(self.attributes() if s.peek() == "{" else {})
        s.expect(":")
        types = [TensorType(*s.type())]
        while s.accept(","):
            types.append(TensorType(*s.type()))
        if len(types) != len(results):
            raise s.error(f"expected {len(results)} result type(s) of {op}, found {len(types)}")
        numbers = self.numbers()
        regions = []
        while s.accept("{"):
            regions.append(self.region())
        node = Node(op, inputs, attrs, tuple(regions), tuple(types))
        self.origin_numbers.append((node, numbers))
        values.update(zip(results, node.results))

    def op(self) -> tuple[str, Callable[[dict], dict]]:
        from graphflow.compiler.ops import OPS
        name = self.s.peek()
        if self.s.kind() != "name" or name not in OPS:
            raise self.s.error(f"expected the name of an op, found {name or 'the end'!r}")
        self.s.take()

        def complete(given: dict) -> dict:
            try:
                return OPS[name].complete(given)
            except UserError as e:
                raise self.s.error(e.message) from None
        return name, complete

    def region(self) -> Region:
        s = self.s
        values: dict[int, Value] = {}
        parameters: list[Value] = []

        def parameter() -> None:
            number = self.definition()
            s.expect(":")
            node = Node("parameter", (), {"index": len(parameters)}, (), (TensorType(*s.type()),))
            self.origin_numbers.append((node, self.numbers()))
            parameters.append(node.result())
            values[number] = node.result()

        s.sequence("(", parameter, ")")
        self.nodes(values)
        s.expect("return")
        results = self.uses(values) if s.peek() == "%" else ()
        s.expect("}")
        return Region(tuple(parameters), results)

    def attributes(self) -> dict[str, object]:
        out: dict[str, object] = {}

        def attribute() -> None:
            name = self.s.name()
            if name in out:
                raise self.s.error(f"the attribute {name!r} stands here twice")
            self.s.expect("=")
            out[name] = self.s.literal()

        self.s.sequence("{", attribute, "}")
        return out

    def definition(self) -> int:
        self.s.expect("%")
        number = self.s.integer()
        if number in self.defined:
            raise self.s.error(f"%{number} has a value already")
        self.defined.add(number)
        return number

    def use(self, values: Mapping[int, Value]) -> Value:
        self.s.expect("%")
        number = self.s.integer()
        if number not in values:
            outside = number in self.defined
            why = "lies outside this body: what a region needs is passed in" if outside else "is not defined"
            raise self.s.error(f"%{number} {why}")
        return values[number]

    def uses(self, values: Mapping[int, Value]) -> tuple[Value, ...]:
        out = [self.use(values)]
        while self.s.accept(","):
            out.append(self.use(values))
        return tuple(out)

    def numbers(self) -> tuple[int, ...]:
        if self.s.peek() != "#" or self.s.peek(2).startswith('"'):     # that is a line of the table
            return ()
        self.s.take()
        out = [self.s.integer()]
        while self.s.peek() == "," and self.s.peek(1).isdigit():      # else the comma parts region parameters
            self.s.take()
            out.append(self.s.integer())
        return tuple(out)

    def locations(self) -> dict[int, Location]:
        s, table = self.s, {}
        while s.accept("#"):
            number = s.integer()
            if number in table:
                raise s.error(f"the location #{number} stands here twice")
            file, line = s.string(), s.integer()
            start = stop = None
            if s.accept("columns"):
                start = s.integer() if s.kind() == "integer" else None
                s.expect(":")
                stop = s.integer() if s.kind() == "integer" else None
            table[number] = Location(file, line, s.string() if s.accept("in") else "", start, stop)
        return table

    def location(self, table: Mapping[int, Location], number: int) -> Location:
        if number not in table:
            raise self.s.error(f"the table of locations has no #{number}")
        return table[number]

    def set_origins(self, table: Mapping[int, Location]) -> None:
        """The table comes last, so origins are set when everything else is made."""
        for node, numbers in self.origin_numbers:
            object.__setattr__(node, "origins", tuple(self.location(table, n) for n in numbers))
