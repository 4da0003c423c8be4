"""lower: from the tensor graph to kernels over buffers. Graph -> KernelProgram (bit-preserving).

Each `fused` node becomes a launch of a kernel (two where its reduction is split), or a loop or a branch with
the launches of its body (see `lower_control`); equal kernels are kept once in the whole program.
 Feeds, states and outputs get buffers of those roles; a result that is written in place gets its state's
buffer. What leaves the program unchanged (an output that is a feed, a state copied into another) becomes a
copy: at the start if it reads what the step found, at the end if it writes a state. Checks run as soon as
they can, before the first state is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from graphflow.compiler.ir.graph import Graph, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.passes import kernels, lower_control
from graphflow.compiler.passes.phases import row_phases
from graphflow.compiler.plan.dims import DimLike, symbols_of
from graphflow.compiler.plan.errors import CompilerError, Location
from graphflow.compiler.plan.schema import (
    Buffer,
    Check,
    Copy,
    EntryGuard,
    Item,
    Launch,
    Message,
    Place,
    Plan,
    base_of,
    places,
    positions,
)


def lower(graph: Graph, numbers: Mapping[Location, int], target: str) -> KernelProgram:
    """`numbers`: source location -> number of the traced node that it stands for."""
    return Lowering(graph, numbers, target).program()


class Lowering:
    """The program in the making: `body` collects items, `at` says where values are."""

    def __init__(self, graph: Graph, numbers: Mapping[Location, int], target: str):
        self.graph, self.numbers, self.target = graph, numbers, target
        self.buffers: dict[str, Buffer] = {}
        self.at: dict[Value, str] = {}  # value -> buffer id
        self.state: dict[str, str] = {}  # state name -> buffer id
        self.kernels: dict[str, Kernel] = {}
        self.names: dict[str, str] = {}  # kernel text -> name
        self.start: list[Item] = []
        self.body: list[Item] = []
        self.end: list[Item] = []
        self.views: dict[tuple[str, DimLike, tuple[DimLike, ...]], str] = {}
        self.counters = 0  # how many loops have one
        self.made: Counter[str] = Counter()  # how many buffers' ids begin with a letter

    def program(self) -> KernelProgram:
        """The whole program."""
        g = self.graph
        feeds = [self.buffer("f", "feed", v.node.attrs["name"], v.type, v.node) for v in g.inputs]
        self.at.update(zip(g.inputs, feeds))
        self._states()
        self._constants(g.nodes())
        outputs = self._outputs()
        self._launch_all(g.nodes())
        self._finish_outputs(outputs)
        self._finish_updates()
        messages = self._checks()
        body = self._ordered((*self.start, *self.body, *self.end))
        symbols = sorted(symbols_of(*(d for b in self.buffers.values() for d in b.shape)))
        guards = tuple(EntryGuard(x.left, x.right, self.numbers.get(x.where, -1) if x.where else -1)
                       for x in g.guards)
        leaves = g.states()     # an update with what the state held when the step began changes nothing
        changed = [n for n, e in g.updates().items() if n not in leaves or e.inputs[0] != leaves[n].result()]
        written = [self.state[name] for name in changed]
        plan = Plan(g.name, self.target, tuple(symbols), tuple(self.buffers.values()), tuple(feeds),
                    tuple(outputs.values()), tuple(self.state.values()), tuple(written), body,
                    tuple(messages), guards)
        return KernelProgram(plan, self.kernels)

    def _numbers(self, node: Node) -> tuple[int, ...]:
        return tuple(sorted({self.numbers[o] for o in node.origins if o in self.numbers}))

    def buffer(self, prefix: str, role: str, name: str, type: TensorType, node: Node) -> str:
        """A new buffer; its id."""
        id = f"{prefix}{self.made[prefix]}"
        self.made[prefix] += 1
        self.buffers[id] = Buffer(id, role, name, type.dtype, type.shape, type.layout,
                                  origins=self._numbers(node))
        return id

    def arena(self, type: TensorType, node: Node, name: str = "") -> str:
        """A new buffer of the arena; its id."""
        return self.buffer("b", "arena", name or node.op, type, node)

    def view(self, id: str, shape: Sequence[DimLike], offset: DimLike, node: Node) -> str:
        """A buffer of that shape from element `offset` of a buffer on; each is made once."""
        b = self.buffers[id]
        base, offset = base_of(self.buffers, id), b.offset + offset
        if (base, offset, tuple(shape)) == (id, 0, b.shape):
            return id
        key = (base, offset, tuple(shape))
        if key not in self.views:
            made = self.buffer("v", "view", b.name, TensorType(b.dtype, tuple(shape)), node)
            self.buffers[made] = replace(self.buffers[made], base=base, offset=offset)
            self.views[key] = made
        return self.views[key]

    def counter(self) -> str:
        """The name of a new loop's counter; no dimension of the user's is called so."""
        self.counters += 1
        return f"u{self.counters - 1}"

    def _states(self) -> None:
        entries = {name: (leaf.types[0], leaf) for name, leaf in self.graph.states().items()}
        for name, effect in self.graph.updates().items():
            entries.setdefault(name, (effect.types[0], effect))
        for name, (type, node) in sorted(entries.items()):
            self.state[name] = self.buffer("s", "state", name, type, node)
            if node.op == "state":
                self.at[node.result()] = self.state[name]

    def _constants(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.op == "array":
                id = self.at[node.result()] = self.buffer("c", "constant", "", node.types[0], node)
                self.buffers[id] = replace(self.buffers[id], data=node.attrs["data"])

    def _outputs(self) -> dict[str, str]:
        """Output buffers; one that is a leaf is copied at the start, others are filled by the kernel that
        makes them."""
        made: dict[str, str] = {}
        for name, v in self.graph.outputs.items():
            made[name] = self.buffer("o", "output", name, v.type, v.node)
            if v in self.at and self.buffers[self.at[v]].role in ("feed", "state", "constant"):
                self.start.append(Copy(self.at[v], made[name]))
            elif v not in self.at and not self._state_of(v):
                self.at[v] = made[name]
        return made

    @staticmethod
    def _state_of(v: Value) -> str:
        return v.node.attrs["inplace"][v.index] if v.node.op == "fused" and v.node.attrs["inplace"] else ""

    def _finish_outputs(self, outputs: dict[str, str]) -> None:
        for name, v in self.graph.outputs.items():
            if self.at[v] != outputs[name] and Copy(self.at[v], outputs[name]) not in self.start:
                self.end.append(Copy(self.at[v], outputs[name]))

    def _finish_updates(self) -> None:
        writes: list[Item] = []
        for name, effect in self.graph.updates().items():
            source, target = self.at[effect.inputs[0]], self.state[name]
            if source == target:
                continue
            if self.buffers[source].role == "state":  # another state, as it was at the start
                kept = self.arena(effect.types[0], effect, name)
                self.start.append(Copy(source, kept))
                source = kept
            writes.append(Copy(source, target))
        self.end.extend(writes)

    def region(self, region: Region, given: Sequence[str], wanted: Sequence[str]) -> list[str]:
        """Appends what computes the region's results, the parameters being in the buffers `given`. Where a
        buffer is `wanted` the result will be there. Gives the results' buffers."""
        nodes = region.nodes()
        for node in nodes:  # a region may come more than once
            for v in node.results:
                self.at.pop(v, None)
        self.at.update(zip(region.parameters, given))
        self._constants(nodes)
        for v, id in zip(region.results, wanted):
            if id and v.node.op == "fused":
                self.at.setdefault(v, id)
        self._launch_all(nodes)
        for v, id in zip(region.results, wanted):
            if id and self.at[v] != id:
                self.body.append(Copy(self.at[v], id))
        return [id or self.at[v] for v, id in zip(region.results, wanted)]

    def _launch_all(self, nodes: Iterable[Node]) -> None:
        for node in sorted((n for n in nodes if n.op == "fused"), key=lambda n: n.attrs["position"]):
            self._launch(node)

    def _launch(self, node: Node) -> None:
        region = node.regions[0]
        count = len(region.parameters)
        operands = [self.at[v] for v in node.inputs[:count]]
        if node.attrs["kind"] == "view":
            self.at[node.result()] = self.view(operands[0], node.types[0].shape, 0, node)
            return
        if node.attrs["kind"] == "control":
            self._control(node, operands)
            return
        results: list[str] = []
        note = node.attrs["note"] or node.attrs["kind"]
        for j, r in enumerate(region.results):
            v = node.result(j)
            if self._state_of(v):
                self.at[v] = self.state[self._state_of(v)]
            elif v not in self.at:
                self.at[v] = self.arena(r.type, node, note)
            results.append(self.at[v])
        if node.attrs["kind"] == "copy":
            self.body.append(Copy(operands[0], results[0]))
            return
        shared = {i: results.index(o) for i, o in enumerate(operands) if o in results}
        f = kernels.formals(node, shared)
        actual = {a.name: (operands if side == "in" else results)[i]
                  for a, (side, i) in zip(f.arguments, f.slots)}
        self._emit(node, f, actual, "k_" + re.sub(r"\W", "_", note))

    def _control(self, node: Node, operands: Sequence[str]) -> None:
        """A loop or a branch; an output of the program that it can't write itself is copied at the end."""
        region = node.regions[0]
        inner = region.results[0].node
        given = dict(zip(region.parameters, operands))
        wanted = [""] * len(inner.types)
        for j, r in enumerate(region.results):
            wanted[r.index] = self.at.get(node.result(j), "")
        made = lower_control.LOWERINGS[inner.op](self, inner, [given[v] for v in inner.inputs], wanted)
        for j, r in enumerate(region.results):
            self.at[node.result(j)] = made[r.index]

    def _emit(self, node: Node, f: kernels.Formals, actual: dict[str, str], name: str) -> None:
        kind = node.attrs["kind"]
        if kind == "routine":
            kernel, names = kernels.routine_kernel(name, node, f)
            self._add(node, kernel, {a: actual[n] for a, n in names.items()})
            return
        if not node.attrs["split"]:
            make = {"map": kernels.map_kernel, "row": kernels.row_kernel,
                    "contraction": kernels.contraction_kernel}[kind]
            self._add(node, make(name, node, f), actual)
            return
        if kind == "contraction":
            head, tail, shape = kernels.split_contraction(name, node, f)
            made, between = [head, tail], {"p": TensorType(head.arguments[-1].dtype, shape)}
        else:
            made, between = row_phases(name, node, f)
        for argument, type in between.items():
            actual[argument] = self.arena(type, node, "partial results")
        for kernel in made:
            self._add(node, kernel, actual)

    def _add(self, node: Node, kernel: Kernel, actual: Mapping[str, str]) -> None:
        """Appends a launch; a kernel equal to an earlier one is that one."""
        text = repr(replace(kernel, name=""))
        name = self.names.get(text)
        if name is None:
            name = f"{kernel.name}_{len(self.kernels)}"
            self.names[text] = name
            self.kernels[name] = replace(kernel, name=name)
        buffers = tuple(actual[a.name] for a in kernel.arguments)
        self.body.append(Launch(name, buffers, 1, origins=self._numbers(node)))

    def _checks(self) -> list[Message]:
        """Puts every check right behind the launch that makes its condition."""
        messages: list[Message] = []
        for effect in self.graph.effects:
            if effect.op != "check":
                continue
            numbers = self._numbers(effect)
            messages.append(Message(effect.attrs["message"], numbers[0] if numbers else -1,
                                    effect.attrs["feed"]))
            check = Check(self.at[effect.inputs[0]], len(messages) - 1)
            base = base_of(self.buffers, check.buffer)
            writers = [i for i, item in enumerate(self.body) if base in self._written(item)]
            self.body.insert(writers[-1] + 1 if writers else 0, check)
        return messages

    def _written(self, item: Item) -> set[str]:
        """The buffers that an item writes, or that lie in what it writes."""
        found: set[str] = set()
        for place in places([item]):
            if isinstance(place.item, Launch):
                pairs = zip(place.item.buffers, self.kernels[place.item.kernel].arguments)
                found.update(base_of(self.buffers, id) for id, a in pairs if a.mode != "r")
            elif isinstance(place.item, Copy):
                found.add(base_of(self.buffers, place.item.target))
        return found

    def _ordered(self, body: Sequence[Item]) -> tuple[Item, ...]:
        """Fills `after`: a launch that writes a state names what reads its old value."""
        states = set(self.state.values())
        readers: dict[str, dict[int, Place]] = {id: {} for id in states}
        for place in places(body):
            for id in self._read(place.item) & states:
                readers[id][place.position] = place
        out: list[Item] = []
        position = 0
        for item in body:
            written = self._written(item) & states if isinstance(item, Launch) else set()
            if written:
                assert isinstance(item, Launch)
                found = {p: place for id in written for p, place in readers[id].items() if p != position}
                touching = [place for _, place in sorted(found.items())]
                if any(p.position > position and not self._reads_new(written, p.item) for p in touching):
                    raise CompilerError(
                        f"the kernel {item.kernel} writes a state that a later one still reads", stage="lower"
                    )
                item = replace(item, after=tuple(p.position for p in touching if p.position < position))
            out.append(item)
            position += positions([item])
        return tuple(out)

    def _read(self, item: Item) -> set[str]:
        """The buffers that a launch gets or a copy reads, or that these lie in."""
        ids = item.buffers if isinstance(item, Launch) else ((item.source,) if isinstance(item, Copy) else ())
        return {base_of(self.buffers, id) for id in ids}

    def _reads_new(self, states: set[str], item: Item) -> bool:
        """Whether an item behind the writer may touch the states: only to read the new value."""
        return not states & self._written(item) and any(base_of(self.buffers, self.at[v]) in states
                                                        and v.node.op == "fused" for v in self.at)
