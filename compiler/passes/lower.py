"""lower: from the tensor graph to kernels over buffers. Graph -> KernelProgram (bit-preserving).

Each `fused` node becomes a launch of a kernel (two where its reduction is split); equal kernels are kept
once. Feeds, states and outputs get buffers of those roles; a result that is written in place gets its state's
buffer. What leaves the program unchanged (an output that is a feed, a state copied into another) becomes a
copy: at the start if it reads what the step found, at the end if it writes a state. Checks run as soon as
they can, before the first state is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphflow.compiler.ir.graph import Graph, Node, TensorType, Value
from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes import kernels
from graphflow.compiler.plan.dims import symbols_of
from graphflow.compiler.plan.errors import CompilerError, Location
from graphflow.compiler.plan.schema import Buffer, Check, Copy, EntryGuard, Item, Launch, Message, Plan


def lower(graph: Graph, numbers: Mapping[Location, int], target: str) -> KernelProgram:
    """`numbers`: source location -> number of the traced node that it stands for."""
    return _Lowering(graph, numbers, target).program()


class _Lowering:
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

    def program(self) -> KernelProgram:
        g = self.graph
        feeds = [self._buffer("f", "feed", v.node.attrs["name"], v.type, v.node) for v in g.inputs]
        self.at.update(zip(g.inputs, feeds))
        self._states()
        self._constants()
        outputs = self._outputs()
        fused = sorted((n for n in g.nodes() if n.op == "fused"), key=lambda n: n.attrs["position"])
        for node in fused:
            self._launch(node)
        self._finish_outputs(outputs)
        self._finish_updates()
        messages = self._checks()
        self._orders()
        symbols = sorted(symbols_of(*(d for b in self.buffers.values() for d in b.shape)))
        guards = tuple(
            EntryGuard(x.left, x.right, self.numbers.get(x.where, -1) if x.where else -1) for x in g.guards
        )
        changed = [n for n, e in g.updates().items() if e.inputs[0] != _old_value(g, n)]
        written = [self.state[name] for name in changed]
        plan = Plan(
            g.name,
            self.target,
            tuple(symbols),
            tuple(self.buffers.values()),
            tuple(feeds),
            tuple(outputs.values()),
            tuple(self.state.values()),
            tuple(written),
            (*self.start, *self.body, *self.end),
            tuple(messages),
            guards,
        )
        return KernelProgram(plan, self.kernels)

    def _numbers(self, node: Node) -> tuple[int, ...]:
        return tuple(sorted({self.numbers[o] for o in node.origins if o in self.numbers}))

    def _buffer(self, prefix: str, role: str, name: str, type: TensorType, node: Node) -> str:
        id = f"{prefix}{sum(b.startswith(prefix) for b in self.buffers)}"
        self.buffers[id] = Buffer(
            id, role, name, type.dtype, type.shape, type.layout, origins=self._numbers(node)
        )
        return id

    def _states(self) -> None:
        entries = {name: (leaf.types[0], leaf) for name, leaf in self.graph.states().items()}
        for name, effect in self.graph.updates().items():
            entries.setdefault(name, (effect.types[0], effect))
        for name, (type, node) in sorted(entries.items()):
            self.state[name] = self._buffer("s", "state", name, type, node)
            if node.op == "state":
                self.at[node.result()] = self.state[name]

    def _constants(self) -> None:
        for node in self.graph.nodes():
            if node.op == "array":
                id = self.at[node.result()] = self._buffer("c", "constant", "", node.types[0], node)
                self.buffers[id] = replace(self.buffers[id], data=node.attrs["data"])

    def _outputs(self) -> dict[str, str]:
        """Output buffers; one that is a leaf is copied at the start, others are filled by the kernel that
        makes them."""
        made: dict[str, str] = {}
        for name, v in self.graph.outputs.items():
            made[name] = self._buffer("o", "output", name, v.type, v.node)
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
                kept = self._buffer("b", "arena", name, effect.types[0], effect)
                self.start.append(Copy(source, kept))
                source = kept
            writes.append(Copy(source, target))
        self.end.extend(writes)

    def _launch(self, node: Node) -> None:
        region = node.regions[0]
        count = len(region.parameters)
        operands = [self.at[v] for v in node.inputs[:count]]
        results: list[str] = []
        note = node.attrs["note"] or node.attrs["kind"]
        for j, r in enumerate(region.results):
            v = node.result(j)
            if self._state_of(v):
                self.at[v] = self.state[self._state_of(v)]
            elif v not in self.at:
                self.at[v] = self._buffer("b", "arena", note, r.type, node)
            results.append(self.at[v])
        if node.attrs["kind"] == "copy":
            self.body.append(Copy(operands[0], results[0]))
            return
        shared = {i: results.index(o) for i, o in enumerate(operands) if o in results}
        f = kernels.formals(node, shared)
        actual = {
            a.name: (operands if side == "in" else results)[i] for a, (side, i) in zip(f.arguments, f.slots)
        }
        self._emit(node, f, actual, "k_" + re.sub(r"\W", "_", note))

    def _emit(self, node: Node, f: kernels.Formals, actual: dict[str, str], name: str) -> None:
        kind = node.attrs["kind"]
        if kind == "routine":
            kernel, names = kernels.routine_kernel(name, node, f)
            self._add(node, kernel, {a: actual[n] for a, n in names.items()})
            return
        if kind not in ("map", "row", "contraction"):
            ops = ", ".join(n.op for n in node.regions[0].nodes() if OPS[n.op].kind == "control") or kind
            raise NotImplementedError(f"{ops} has no native code yet; run it on device='reference'")
        if not node.attrs["split"]:
            make = {
                "map": kernels.map_kernel,
                "row": kernels.row_kernel,
                "contraction": kernels.contraction_kernel,
            }[kind]
            self._add(node, make(name, node, f), actual)
            return
        if kind == "contraction":
            head, tail, shape = kernels.split_contraction(name, node, f)
            dtype = head.arguments[-1].dtype
            actual["p"] = self._buffer("b", "arena", "partial sums", TensorType(dtype, shape), node)
        else:
            head, tail, shapes, dtypes = kernels.split_row(name, node, f)
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes)):
                actual[f"p{i}"] = self._buffer(
                    "b", "arena", "partial results", TensorType(dtype, shape), node
                )
        self._add(node, head, actual)
        self._add(node, tail, actual)

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
            messages.append(
                Message(effect.attrs["message"], numbers[0] if numbers else -1, effect.attrs["feed"])
            )
            check = Check(self.at[effect.inputs[0]], len(messages) - 1)
            writers = [
                i
                for i, item in enumerate(self.body)
                if isinstance(item, Launch) and check.buffer in item.buffers
            ]
            self.body.insert(writers[0] + 1 if writers else 0, check)
        return messages

    def _orders(self) -> None:
        """Fills `after`: a launch that writes a state names the launches that read its old value."""
        shift = len(self.start)
        states = set(self.state.values())
        for i, item in enumerate(self.body):
            if not isinstance(item, Launch):
                continue
            modes = {b: a.mode for b, a in zip(item.buffers, self.kernels[item.kernel].arguments)}
            written = {b for b, mode in modes.items() if mode != "r" and b in states}
            before: Sequence[int] = [
                j + shift
                for j, other in enumerate(self.body[:i])
                if isinstance(other, Launch) and written & set(other.buffers)
            ]
            late = [
                other
                for other in self.body[i + 1 :]
                if isinstance(other, Launch) and written & set(other.buffers)
            ]
            if any(w in other.buffers and not self._reads_new(w, other) for other in late for w in written):
                raise CompilerError(
                    f"the kernel {item.kernel} writes a state that a later one still reads", stage="lower"
                )
            self.body[i] = replace(item, after=tuple(before))

    def _reads_new(self, state: str, launch: Launch) -> bool:
        """Whether a launch behind the writer may touch the state: only to read the new value."""
        position = launch.buffers.index(state)
        return self.kernels[launch.kernel].arguments[position].mode == "r" and any(
            self.at.get(v) == state and v.node.op == "fused" for v in self.at
        )


def _old_value(graph: Graph, state: str) -> Value | None:
    """What a state held when the step began, where the graph reads it: an update with it changes nothing."""
    leaf = graph.states().get(state)
    return None if leaf is None else leaf.result()
