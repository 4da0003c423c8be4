"""The gradient of a scan is a scan that runs the other way.

Forward, the loop stacks some values of each step (`scan_cut` chooses) beside its own outputs. The backward
loop carries the cotangents of the carries; each of its steps reads the kept values, the inputs of the step
and the constants, computes again what was not kept, and gives the cotangents of the step's inputs. Cotangents
of constants are sums over the steps (`scan_sums`). The forward loop that keeps values is a second scan node
at first; `scan_merge` makes the two one. """
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Node, Region, TensorType, Value, topological
from graphflow.compiler.passes.regions import dependent, extract, inline, needed_nodes
from graphflow.compiler.passes.scan_cut import values_to_keep
from graphflow.compiler.passes.scan_merge import merge_region
from graphflow.compiler.passes.scan_sums import Stacked, Term, stack_all, stack_terms
from graphflow.compiler.plan.dtypes import F32

Cotangents = Sequence[Value | None]


def scan_gradient(b: Builder, node: Node, given: Cotangents, wanted: Sequence[bool]) -> list[Value | None]:
    """The cotangents of the scan's operands (those `wanted`), for the `given` ones of its results."""
    step = _step_gradient(node, given, wanted)
    if step is None:
        return [None] * len(node.inputs)
    return _Backward(b, node, given, step).run()


# --- one step

@dataclass(frozen=True)
class _Step:
    """The body together with its gradient: forward results, and cotangents by the number of the operand.

    `forward` are the body's parameters; `cotangents` parameters for those of the results, by their number;
    `carried` the carries whose cotangents the backward loop carries.
    """
    forward: list[Value]
    cotangents: dict[int, Value]
    results: list[Value]
    flows: dict[int, Value]
    carried: list[int]


def _step_gradient(node: Node, given: Cotangents, wanted: Sequence[bool]) -> _Step | None:
    from graphflow.compiler.passes.autodiff import flow
    b, body, count = Builder(), node.regions[0], node.attrs["carries"]
    parameters = _parameters(b, (p.type for p in body.parameters), body.parameters)
    results = inline(b, body, parameters)
    carried = _carried(parameters, results, given, wanted, count)
    seeds = [*carried, *(i for i in range(count, len(results)) if given[i] is not None)]
    seeded = _parameters(b, (results[i].type for i in seeds), [results[i] for i in seeds])
    targets = [*carried, *(i for i in range(count, len(parameters)) if wanted[i])]
    with b.origin(node.origins):
        flows = flow(b, [results[i] for i in seeds], seeded, [parameters[i] for i in targets])
    if all(f is None for f in flows):
        return None
    found = {i: f for i, f in zip(targets, flows) if f is not None}
    whole = merge_region(Region((*parameters, *seeded), (*results, *found.values())))
    n = len(results)
    return _Step(list(whole.parameters[:len(parameters)]),
                 dict(zip(seeds, whole.parameters[len(parameters):])), list(whole.results[:n]),
                 dict(zip(found, whole.results[n:])), carried)


def _parameters(b: Builder, types: Iterable[TensorType], lines: Sequence[Value]) -> list[Value]:
    out = []
    for type, like in zip(types, lines):
        with b.origin(like.node.origins):
            out.append(b.parameter(TensorType(type.dtype, type.shape), 0))
    return out


def _carried(parameters: Sequence[Value], results: Sequence[Value], given: Cotangents, wanted: Sequence[bool],
             count: int) -> list[int]:
    """The carries that depend on what is wanted, and on which what is given depends."""
    from graphflow.compiler.passes.autodiff import active_values
    order = topological(v.node for v in results)
    reached = {i: active_values(order, [parameters[i]]) for i in range(count)
               if parameters[i].dtype.has_gradient}
    active = {i for i in reached if wanted[i]}
    sources = [p for i, p in enumerate(parameters) if i >= count and wanted[i]]
    from_outside = active_values(order, sources)
    active |= {i for i in reached if results[i] in from_outside}
    while more := {i for i in reached if any(results[i] in reached[j] for j in active)} - active:
        active |= more
    ends = {v for v, g in zip(results[count:], given[count:]) if g is not None}
    flowing = {i for i in reached if given[i] is not None or ends & reached[i]}
    while more := {i for i in reached if any(results[j] in reached[i] for j in flowing)} - flowing:
        flowing |= more
    return sorted(active & flowing)


# --- the loop

@dataclass
class _Backward:
    """Builds the backward scan. `rows`: the arrays, stacked over the steps, that stand outside for values of
    a step. `outputs`: what the backward body stacks."""
    b: Builder
    node: Node
    given: Cotangents
    step: _Step
    rows: dict[Value, Value] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)

    def run(self) -> list[Value | None]:
        """The cotangents by operand."""
        node, step = self.node, self.step
        count, steps = node.attrs["carries"], node.attrs["steps"]
        self.rows.update(zip(step.forward[count:count + steps], node.inputs[count:]))
        self.rows.update((p, _given(self.given[i])) for i, p in step.cotangents.items() if i >= count)
        stacked, rest = self.sums({i: f for i, f in step.flows.items() if i >= count + steps})
        b = Builder()
        with b.origin(node.origins):
            sums = {i: self.accumulator(b, i) for i in dict.fromkeys(t.operand for t in rest)}
            added = [self.add_up(b, p, [t for t in rest if t.operand == i]) for i, p in sums.items()]
            ends = [step.flows[i] if i in step.flows else b.zeros(step.results[i].type) for i in step.carried]
        outputs = [step.flows[i] for i in step.flows if count <= i < count + steps]
        outputs += [f for s in stacked for f in s.factors]
        self.outputs = [v for v in dict.fromkeys(outputs) if v not in self.rows]
        self.keep([*ends, *added, *self.outputs])
        self.outputs = [v for v in self.outputs if v not in self.rows]
        return self.collect(self.loop([*ends, *added], sums), list(sums), stacked)

    def varies(self) -> Callable[[Value], bool]:
        """Whether a value of the step is another one at every step."""
        node, step = self.node, self.step
        loop_values = [*step.forward[:node.attrs["carries"] + node.attrs["steps"]], *step.cotangents.values()]
        return dependent(topological(v.node for v in (*step.results, *step.flows.values())), loop_values)

    def sums(self, flows: dict[int, Value]) -> tuple[list[Stacked], list[Term]]:
        """The cotangents of constants: what is summed after the loop, and what the loop carries the sum of.
        Where the user asked to keep carries alone, that is all."""
        if self.node.attrs["length"] == 1:
            return stack_all(flows), []
        if self.node.attrs["save"] == "carries":
            return [], [Term(i, f) for i, f in flows.items()]
        return stack_terms(flows, self.varies())

    def accumulator(self, b: Builder, operand: int) -> Value:
        """The parameter that carries the sum of a constant's cotangents; that of halves is in float32."""
        like = self.step.forward[operand]
        return b.parameter(TensorType(F32 if like.dtype.is_half else like.dtype, like.shape), 0)

    @staticmethod
    def add_up(b: Builder, total: Value, terms: Sequence[Term]) -> Value:
        """The sum with this step's terms added."""
        for term in terms:
            part = term.finish(b, term.value)
            total = b.add(total, part if part.dtype == total.dtype else b.cast(part, dtype=total.dtype))
        return total

    def keep(self, roots: Sequence[Value]) -> None:
        """Chooses what the forward loop keeps for the backward one to compute the roots, and has it kept."""
        node, step = self.node, self.step
        count, steps = node.attrs["carries"], node.attrs["steps"]
        nodes = needed_nodes(roots, ())
        backward = dependent(nodes, step.cotangents.values())
        varies = dependent(nodes, step.forward[:count + steps])
        read = dict.fromkeys([*(v for n in nodes if any(map(backward, n.inputs)) for v in n.inputs), *roots])
        needed = [v for v in read if varies(v) and not backward(v)]
        kept = values_to_keep(needed, step.forward[:count], varies, step.results[count:],
                              node.attrs["save"] == "carries")
        if kept:
            body = extract([*step.results, *kept], step.forward)
            own = node.attrs["kept"] or ("",) * (len(step.results) - count)
            names = (*own, *(f"{_name(v, step.forward)} {v.type}" for v in kept))
            forward = self.b.node("scan", node.inputs, {**node.attrs, "kept": names}, [body])
            self.rows.update(zip(kept, forward.results[len(step.results):]))

    def loop(self, ends: Sequence[Value], accumulators: dict[int, Value]) -> list[Value]:
        """The results of the backward scan, whose body computes `ends` (new carries) and the outputs."""
        b, node, step = self.b, self.node, self.step
        first = node.attrs["carries"] + node.attrs["steps"]
        carries: dict[Value, Value] = {}
        for i in step.carried:
            start = self.given[i]
            carries[step.cotangents[i]] = b.zeros(step.results[i].type) if start is None else start
        for p in accumulators.values():
            carries[p] = b.zeros(p.type)
        roots = [*ends, *self.outputs]
        leaves = {*carries, *self.rows, *step.forward}
        read = {v for n in needed_nodes(roots, leaves) for v in n.inputs} | set(roots)
        rows = {p: v for p, v in self.rows.items() if p in read}
        constants = {p: v for p, v in zip(step.forward[first:], node.inputs[first:]) if p in read}
        body = extract(roots, [*carries, *rows, *constants])
        attrs = {**node.attrs, "carries": len(carries), "steps": len(rows),
                 "reverse": not node.attrs["reverse"], "kept": ()}
        operands = [*carries.values(), *rows.values(), *constants.values()]
        return list(b.node("scan", operands, attrs, [body]).results) if roots else []

    def collect(self, results: list[Value], sums: Sequence[int], stacked: Sequence[Stacked]
                ) -> list[Value | None]:
        """The cotangents by operand, from the results of the backward scan."""
        b, step, count = self.b, self.step, self.node.attrs["carries"]
        steps = self.node.attrs["steps"]
        out: list[Value | None] = [None] * len(self.node.inputs)
        out_rows = {**self.rows, **dict(zip(self.outputs, results[len(step.carried) + len(sums):]))}
        for i, v in zip((*step.carried, *sums), results):
            out[i] = v
        for i, f in step.flows.items():
            if count <= i < count + steps:
                out[i] = out_rows[f]
        for s in stacked:
            total, i = s.term.finish(b, s.total(b, [out_rows[f] for f in s.factors])), s.term.operand
            before = out[i]
            out[i] = total if before is None else b.add(before, b.cast(total, dtype=before.dtype))
        return [v if v is None or v.dtype == o.dtype else b.cast(v, dtype=o.dtype)
                for v, o in zip(out, self.node.inputs)]


def _given(v: Value | None) -> Value:
    assert v is not None
    return v


def _name(v: Value, parameters: Sequence[Value]) -> str:
    """What `kept` calls a value: the carry of that number, or the op that makes it."""
    return f"carry {parameters.index(v)}" if v in parameters else v.op
