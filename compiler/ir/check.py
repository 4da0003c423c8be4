"""The checker of tensor graphs: what must hold after every stage. A violation is a CompilerError: the
language refuses wrong programs before there is a graph, so what fails here was done by a pass (or by the
author of a graph's text)."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType, walk
from graphflow.compiler.plan.bind import solve_symbols
from graphflow.compiler.plan.dims import Dim, evaluate, symbols_of
from graphflow.compiler.plan.errors import CompilerError, GraphflowError, Location
from graphflow.compiler.plan.layouts import is_layout

STAGES = ("trace", "canonical", "stable", "autodiff", "joint", "fuse", "schedule")
"""The stages whose result is a tensor graph, in order."""

_OUTSIDE_ONLY = ("input", "state", "training", "update", "check")


def check_graph(graph: Graph, stage: str) -> None:
    """CompilerError, with the graph's text, unless the graph is well formed for what follows `stage`."""
    try:
        _Check(graph, stage).run()
    except CompilerError as e:
        raise CompilerError(e.message, stage=stage, dump=_dump(graph), where=e.where) from None


def _dump(graph: Graph) -> str | None:
    from graphflow.compiler.ir.text import print_graph
    try:
        return print_graph(graph)
    except (ValueError, KeyError, TypeError):                 # too broken to print: the message must do
        return None


def _wrong(message: str, node: Node | None = None) -> CompilerError:
    where: Location | None = node.origins[0] if node is not None and node.origins else None
    return CompilerError(message, where=where)


class _Check:
    def __init__(self, graph: Graph, stage: str) -> None:
        self.graph, self.stage = graph, STAGES.index(stage)
        try:
            self.nodes = list(graph.nodes())
        except ValueError as e:
            raise _wrong(str(e)) from None
        self.known = set(self.nodes)

    def run(self) -> None:
        self.leaves()
        self.body(self.nodes, self.known, inside=False)
        self.effects()
        self.symbols()
        self.origins()
        self.in_place([n for n in self.nodes if n.op == "fused" and any(n.attrs["inplace"])])

    def leaves(self) -> None:
        """Feeds, states and the table of inputs agree, each name once."""
        inputs = [v.node for v in self.graph.inputs]
        for node in inputs:
            if node.op != "input":
                raise _wrong(f"{node.op} is listed among the inputs", node)
        self._once("input", inputs)
        self._once("state", (n for n in self.nodes if n.op == "state"))
        for node in self.nodes:
            if node.op == "input" and node not in inputs:
                raise _wrong(f"the input {node.attrs['name']!r} is not listed among the inputs", node)

    @staticmethod
    def _once(what: str, nodes: Iterable[Node]) -> None:
        seen: set[str] = set()
        for node in nodes:
            if node.attrs["name"] in seen:
                raise _wrong(f"there are two nodes for the {what} {node.attrs['name']!r}", node)
            seen.add(node.attrs["name"])

    def body(self, nodes: Sequence[Node], known: set[Node], inside: bool) -> None:
        """The nodes of the graph or of one region."""
        for node in nodes:
            if inside and node.op in _OUTSIDE_ONLY:
                raise _wrong(f"{node.op} inside a region", node)
            if not inside and node.op == "parameter":
                raise _wrong("a region's parameter outside its region", node)
            self.stage_of(node)
            for v in node.inputs:
                if v.node not in known or not 0 <= v.index < len(v.node.types):
                    raise _wrong(f"{node.op} reads a value that is not there", node)
            for region in node.regions:
                self.region(node, region)
            if node.op != "parameter":
                self.types(node)

    def stage_of(self, node: Node) -> None:
        """What a stage has removed does not come back."""
        if node.op == "grad" and self.stage >= STAGES.index("autodiff"):
            raise _wrong("a grad node is left after autodiff", node)
        if node.op == "training" and self.stage > STAGES.index("trace"):
            raise _wrong("the training flag is not yet a constant", node)
        if node.op == "fused" and self.stage < STAGES.index("fuse"):
            raise _wrong("a fused node before fuse", node)
        if any(t.layout for t in node.types) and self.stage < STAGES.index("schedule"):
            raise _wrong("a layout before schedule", node)
        for t in node.types:
            if t.layout and not (node.op in ("fused", "parameter") and is_layout(t.layout, t.rank)):
                raise _wrong(f"{node.op} cannot have the layout {t.layout!r} of {t}", node)

    def region(self, owner: Node, region: Region) -> None:
        try:
            nodes = region.nodes()
        except ValueError as e:
            raise _wrong(str(e), owner) from None
        for i, p in enumerate(region.parameters):
            if p.node.op != "parameter" or p.node.attrs["index"] != i:
                raise _wrong(f"parameter {i} of a region of {owner.op} is not its number {i}", owner)
        parameters = {p.node for p in region.parameters}
        for node in nodes:
            if node in self.known or node.op == "parameter" and node not in parameters:
                raise _wrong(f"a region of {owner.op} is not closed: it reads {node.op} from outside", owner)
        self.body(nodes, set(nodes), inside=True)

    def types(self, node: Node) -> None:
        """The types are those that the op's record infers; layouts are the schedule's business."""
        from graphflow.compiler.ops import OPS
        from graphflow.compiler.ops.half import rounded_to
        if node.op not in OPS:
            raise _wrong(f"there is no op {node.op!r}", node)
        record = OPS[node.op]
        if tuple(node.attrs) != tuple(record.attrs):
            raise _wrong(f"{node.op} has the attributes {list(node.attrs)}, not {list(record.attrs)}", node)
        given = [v.type for v in node.inputs]
        if rounded_to(record, [t.dtype for t in given]) is not None:
            raise _wrong(f"{node.op} computes with {[str(t) for t in given]}: halves are cast to float32 for "
                         f"arithmetic", node)
        if node.op != "fused":
            given = [_plain(t) for t in given]
        try:
            inferred = tuple(record.infer(given, node.attrs, node.regions))
        except GraphflowError as e:
            raise _wrong(f"{node.op} does not fit its operands: {getattr(e, 'message', e)}", node) from None
        if tuple(map(_plain, inferred)) != tuple(map(_plain, node.types)):
            raise _wrong(f"{node.op} is {list(node.types)}, its operands give {list(inferred)}", node)

    def effects(self) -> None:
        """Effects are where they are listed, and nowhere else; a state is written once, as what it is."""
        listed = list(self.graph.effects)
        for node in listed:
            if node.op not in ("update", "check"):
                raise _wrong(f"{node.op} is listed among the effects", node)
        for node in self.nodes:
            if node.op in ("update", "check") and node not in listed:
                raise _wrong(f"{node.op} is not listed among the effects", node)
        self._once("update of", (n for n in listed if n.op == "update"))
        states = self.graph.states()
        for name, node in self.graph.updates().items():
            if name in states and _plain(states[name].types[0]) != _plain(node.types[0]):
                state, new = states[name].types[0], node.types[0]
                raise _wrong(f"the state {name!r} is {state}, its update {new}", node)
        for name, v in self.graph.outputs.items():
            if v.node not in self.known or not 0 <= v.index < len(v.node.types):
                raise _wrong(f"the output {name!r} is a value that is not there")
        for v in (*self.graph.outputs.values(), *(v for n in self.graph.effects for v in n.inputs)):
            if v.type.layout:
                raise _wrong(f"{v.type}, which leaves the program, has a layout", v.node)

    def symbols(self) -> None:
        """Every symbol follows from the shape of some feed."""
        shapes = [v.shape for v in self.graph.inputs]
        names = symbols_of(*(d for shape in shapes for d in shape))
        sample = {name: 1000 + i for i, name in enumerate(sorted(names))}
        found = solve_symbols([(shape, [evaluate(d, sample) for d in shape]) for shape in shapes])
        for node in walk(self.nodes):
            for d in (*(d for t in node.types for d in t.shape), *_dims_of(tuple(node.attrs.values()))):
                for name in sorted(symbols_of(d) - set(found)):
                    raise _wrong(f"no feed's shape decides the symbol {name!r} of {node.op}", node)
        for guard in self.graph.guards:
            for name in sorted(symbols_of(guard.left, guard.right) - set(found)):
                raise CompilerError(f"no feed's shape decides the symbol {name!r} of a guard",
                                    where=guard.where)

    def origins(self) -> None:
        """Every node knows a line that asked for it, unless the graph was built without any."""
        every = list(walk(self.nodes))
        if any(n.origins for n in every):
            for node in every:
                if not node.origins:
                    raise _wrong(f"{node.op} : {list(node.types)} has lost its origins")

    def in_place(self, writers: Sequence[Node]) -> None:
        """Whoever reads the old value of a state runs before the kernel that writes over it."""
        if not writers:
            return
        users, updates, states = self.graph.users(), self.graph.updates(), self.graph.states()
        place = {n: i for i, n in enumerate(self.nodes)}
        before = _ancestors(self.nodes)
        for node in writers:
            for i, name in enumerate(node.attrs["inplace"]):
                if not name:
                    continue
                update, leaf = updates.get(name), states.get(name)
                if update is None or update.inputs[0] != node.result(i):
                    raise _wrong(f"fused writes the state {name!r} in place, but its result {i} is not the "
                                 f"state's update", node)
                if leaf is None:
                    continue
                if leaf.types[0] != node.types[i]:
                    raise _wrong(f"fused writes {node.types[i]} over the state {name!r}, {leaf.types[0]}",
                                 node)
                for reader in users[leaf]:
                    if reader is not node and not before[node] >> place[reader] & 1:
                        raise _wrong(f"{reader.op} reads the old value of the state {name!r}, but nothing "
                                     f"orders it before the kernel that writes over it", reader)


def _ancestors(nodes: Sequence[Node]) -> dict[Node, int]:
    """The nodes that each node needs, directly or not: a bit for each, by its place among the nodes."""
    closure: dict[Node, int] = {}           # with the node itself
    out: dict[Node, int] = {}
    for place, node in enumerate(nodes):
        needed = 0
        for v in node.inputs:
            needed |= closure[v.node]
        out[node], closure[node] = needed, needed | 1 << place
    return out


def _plain(type: TensorType) -> TensorType:
    return TensorType(type.dtype, type.shape)


def _dims_of(value: object) -> list[Dim]:
    if isinstance(value, Dim):
        return [value]
    return [d for item in value for d in _dims_of(item)] if isinstance(value, tuple) else []
