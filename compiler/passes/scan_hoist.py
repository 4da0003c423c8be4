"""What does not follow from a loop's carries leaves the loop (part of joint).

- A value that no step changes is computed before the loop and becomes an operand.
- A product of what a step reads with something that no step changes, as of an input with a weight, is taken
  for all steps at once before the loop: one large product instead of many small ones.
- A step's input that is the same for every step becomes an operand that no step changes, and a literal goes
  into the body: neither is stored for every step.
- A stacked output behind such a product, which no carry needs, as an output layer or the gradient of the
  inputs, is computed after the loop from what goes into the product, stacked instead.

Products of all steps take the memory of all steps: they stay inside where that is more than `MOST_BYTES`,
or, behind the loop, where what has to be stacked for them is more than twice what they give. Nothing leaves a
loop that was asked to keep carries alone (`save`): it is there to save memory, and computes again on purpose.
The bodies of loops are seen to before the loops. Sums inside one product may be taken in another order: keeps
a tolerance.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, Region, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.passes.bodies import in_bodies
from graphflow.compiler.passes.regions import dependent, extract, guessed, guessed_bytes, inline, needed_nodes
from graphflow.compiler.plan.dims import DimLike

MOST_BYTES = 1 << 28
"""How large a product of all steps may be, with a guess for every symbol."""
Test = Callable[[Value], bool]


def hoist(graph: Graph) -> Graph:
    """The graph with every scan's body made as small as the rules above allow."""
    if not any(node.regions for node in graph.nodes()):
        return graph

    def make(b: Builder, node: Node, inputs: list[Value]) -> Sequence[Value]:
        node = in_bodies(node, hoist)
        if node.op != "scan":
            return b.copy(node, inputs).results
        node, inputs = _entered(b, node, inputs)
        if node.attrs["save"] == "carries":
            return b.copy(node, inputs).results
        plan = _plan(node)
        return _rebuilt(b, node, inputs, plan) if plan.found else b.copy(node, inputs).results

    return rebuild(graph, make)


def _entered(b: Builder, node: Node, inputs: list[Value]) -> tuple[Node, list[Value]]:
    """The scan and its operands, with inputs that are the same for every step as constants, each constant
    once, and literals in the body."""
    count, steps, body = node.attrs["carries"], node.attrs["steps"], node.regions[0]
    alike = {i: _row(b, v) for i, v in enumerate(inputs[count:count + steps], count)}
    rows = [i for i, row in alike.items() if row is None]
    whole = {i: row for i, row in alike.items() if row is not None}
    whole.update(enumerate(inputs[count + steps:], count + steps))
    literals = [i for i, v in whole.items() if _literal(v) is not None]
    first = {v: i for i, v in reversed(whole.items()) if i not in literals}
    if len(rows) == steps and not literals and len(first) == len(whole):
        return node, inputs
    inner = Builder()
    given: dict[int, Value] = {}
    for i in (*range(count), *rows, *first.values()):
        with inner.origin(body.parameters[i].node.origins):
            given[i] = inner.parameter(body.parameters[i].type, len(given))
    for i in literals:
        literal = _literal(whole[i])
        assert literal is not None
        with inner.origin(literal.origins):
            given[i] = inner.constant(literal.attrs["value"], whole[i].dtype, whole[i].shape)
    parameters = tuple(v for i, v in given.items() if i not in literals)
    given.update({i: given[first[v]] for i, v in whole.items() if v in first})
    region = Region(parameters, tuple(inline(inner, body, [given[i] for i in range(len(inputs))])))
    operands = [*inputs[:count], *(inputs[i] for i in rows), *first]
    made = Node("scan", tuple(operands), {**node.attrs, "steps": len(rows)}, (region,), node.types,
                node.origins)
    return made, operands


def _row(b: Builder, stacked: Value) -> Value | None:
    """What every step sees of an array that is the same along axis 0; None where it is not."""
    view = stacked.node
    if view.op != "broadcast_to" or view.inputs[0].type.rank == stacked.type.rank:
        return None
    return b.broadcast(view.inputs[0], stacked.shape[1:])


def _literal(v: Value) -> Node | None:
    """The literal that every element of the value is."""
    node = v.node.inputs[0].node if v.op == "broadcast_to" else v.node
    return node if node.op == "constant" else None


@dataclass
class _Plan:
    """Values of a body that are taken from outside: `fixed` ones, that no step changes, and `products`, of
    all steps. `behind`: numbers of stacked results that are made behind the loop, from the `leaves`."""
    varies: Test
    fixed: list[Value] = field(default_factory=list)
    products: list[Value] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    leaves: list[Value] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.fixed or self.products or self.behind)


def _plan(node: Node) -> _Plan:
    body, count, steps = node.regions[0], node.attrs["carries"], node.attrs["steps"]
    nodes, parameters = body.nodes(), body.parameters
    varies = dependent(nodes, parameters[:count + steps])
    follows = dependent(nodes, parameters[:count])
    plan = _Plan(varies)
    plan.fixed = _fixed(body, varies)
    length = guessed(node.attrs["length"])
    for n in nodes:
        if _is_product(n, varies) and not follows(n.result()):
            size = length * guessed_bytes(n.types[0])
            if size <= MOST_BYTES and not _needs(n.result(), varies, set(parameters)).others:
                plan.products.append(n.result())
    _plan_behind(node, plan)
    return plan


def _fixed(body: Region, varies: Test) -> list[Value]:
    """Values that no step changes, that take some work, and that others which change read."""
    found: dict[Value, None] = {}
    worth: set[Value] = set()
    computed = dependent(body.nodes(), body.parameters)      # the rest is literals, which the rewriting folds
    for n in body.nodes():
        if n.op != "parameter" and computed(n.result()) and not any(varies(v) for v in n.results):
            if OPS[n.op].kind not in ("view", "leaf") or any(v in worth for v in n.inputs):
                worth.update(n.results)

    def note(v: Value) -> None:
        while v in worth and OPS[v.node.op].kind == "view" and len(v.node.inputs) == 1:
            v = v.node.inputs[0]                              # what is behind a view is smaller, or as large
        if v in worth:
            found[v] = None

    for n in body.nodes():
        if any(varies(v) for v in n.results):
            for v in n.inputs:
                note(v)
    for v in body.results:
        note(v)
    return list(found)


def _plan_behind(node: Node, plan: _Plan) -> None:
    """Chooses the stacked results that are made behind the loop."""
    body, count = node.regions[0], node.attrs["carries"]
    carried = {v for n in needed_nodes(body.results[:count], ()) for v in n.results}
    stacked = set(body.results[count:])
    stop = {*carried, *body.parameters, *plan.products}
    for k, v in enumerate(body.results[count:], count):
        if v in stop or not plan.varies(v):
            continue
        needs = _needs(v, plan.varies, stop)
        steps = body.parameters[count:count + node.attrs["steps"]]
        new = [x for x in (*needs.leaves, *needs.others)
               if x not in stacked and x not in steps and x not in plan.products and x not in plan.leaves]
        made = sum(guessed_bytes(n.types[0]) for n in needs.products)
        if v in needs.others or not made or sum(guessed_bytes(x.type) for x in new) > 2 * made:
            continue
        plan.behind.append(k)
        plan.leaves += [x for x in dict.fromkeys((*needs.leaves, *needs.others))
                        if x not in steps and x not in plan.products and x not in plan.leaves]


@dataclass(frozen=True)
class _Needs:
    """What a value for all steps is computed from: `leaves`, where to stop, and `others`, which can be
    computed step by step only; `products` are on the way."""
    leaves: list[Value]
    others: list[Value]
    products: list[Node]


def _needs(value: Value, varies: Test, stop: set[Value]) -> _Needs:
    needs, seen, stack = _Needs([], [], []), {value}, [value]
    while stack:
        v = stack.pop()
        if v in stop:
            needs.leaves.append(v)
        elif not _lifts(v.node, varies):
            needs.others.append(v)
        else:
            if _is_product(v.node, varies):
                needs.products.append(v.node)
            more = [x for x in dict.fromkeys(v.node.inputs) if varies(x) and x not in seen]
            seen.update(more)
            stack += more
    return needs


def _is_product(node: Node, varies: Test) -> bool:
    """Whether the node multiplies rows, which are of the step, with something that no step changes."""
    if node.op == "matmul":
        return (varies(node.inputs[0]) and not varies(node.inputs[1]) and node.types[0].rank == 2
                and not node.attrs["transpose_x"])
    return node.op == "conv" and varies(node.inputs[0]) and not varies(node.inputs[1])


def _lifts(node: Node, varies: Test) -> bool:
    return node.op in _LIFTS or OPS[node.op].kind == "elementwise" or _is_product(node, varies)


# --- for all steps at once

def _lift(b: Builder, length: DimLike, value: Value, known: dict[Value, Value], varies: Test,
          fixed: Callable[[Value], Value]) -> Value:
    """The value for all steps, [length, …]; `known` has some values for all steps, and gets more; `fixed`
    gives what no step changes."""
    for node in needed_nodes([value], known):
        if node.op == "parameter" or not any(varies(v) for v in node.results):
            continue
        with b.origin(node.origins):
            if _is_product(node, varies):
                x = known[node.inputs[0]]
                rows = b.reshape(x, shape=(x.shape[0] * x.shape[1], *x.shape[2:]))
                made = b.node(node.op, [rows, fixed(node.inputs[1])], node.attrs).result()
                known[node.result()] = b.reshape(made, shape=(length, *node.types[0].shape))
                continue
            inputs = [known[v] if varies(v) else b.broadcast(fixed(v), (length, *v.shape))
                      for v in node.inputs]
            operands, attrs = _LIFTS[node.op](b, node, inputs) if node.op in _LIFTS else (inputs, node.attrs)
            known.update(zip(node.results, b.node(node.op, operands, attrs).results))
    return known[value]


Lifted = tuple[Sequence[Value], Mapping[str, Any]]


def _lift_axes(b: Builder, node: Node, inputs: Sequence[Value]) -> Lifted:
    return inputs, {**node.attrs, "axes": tuple(axis + 1 for axis in node.attrs["axes"])}


def _lift_axis(b: Builder, node: Node, inputs: Sequence[Value]) -> Lifted:
    return inputs, {**node.attrs, "axis": node.attrs["axis"] + 1}


def _lift_shape(b: Builder, node: Node, inputs: Sequence[Value]) -> Lifted:
    return inputs, {"shape": (inputs[0].shape[0], *node.attrs["shape"])}


def _lift_broadcast(b: Builder, node: Node, inputs: Sequence[Value]) -> Lifted:
    length, *shape = inputs[0].shape
    ones = (1,) * (node.types[0].rank - len(shape))
    return _lift_shape(b, node, [b.reshape(inputs[0], shape=(length, *ones, *shape))])


def _lift_transpose(b: Builder, node: Node, inputs: Sequence[Value]) -> Lifted:
    return inputs, {"perm": (0, *(axis + 1 for axis in node.attrs["perm"]))}


def _lift_slice(b: Builder, node: Node, inputs: Sequence[Value]) -> Lifted:
    return inputs, {"starts": (0, *node.attrs["starts"]),
                    "stops": (inputs[0].shape[0], *node.attrs["stops"]),
                    "steps": (1, *node.attrs["steps"])}


_LIFTS: dict[str, Callable[[Builder, Node, Sequence[Value]], Lifted]] = {
    **{f"reduce_{kind}": _lift_axes for kind in ("sum", "prod", "max", "min", "any", "all")},
    "flip": _lift_axes, "concatenate": _lift_axis, "reshape": _lift_shape, "broadcast_to": _lift_broadcast,
    "transpose": _lift_transpose, "slice": _lift_slice}
"""Ops that are not elementwise, as ops on all steps at once: (builder, node, operands of all steps) ->
operands, attributes."""


# --- the scan made anew

def _rebuilt(b: Builder, node: Node, inputs: Sequence[Value], plan: _Plan) -> list[Value]:
    """What stands for the scan's results."""
    body, attrs = node.regions[0], node.attrs
    count, steps, length = attrs["carries"], attrs["steps"], attrs["length"]
    outside = dict(zip(body.parameters, inputs))

    def fixed(v: Value) -> Value:
        """A value that no step changes, outside the loop."""
        if v not in outside:
            constants = body.parameters[count + steps:]
            (outside[v],) = inline(b, extract([v], constants), [outside[c] for c in constants])
        return outside[v]

    known = {p: outside[p] for p in body.parameters[count:count + steps]}
    products = [_lift(b, length, v, known, plan.varies, fixed) for v in plan.products]
    leaves = [*body.parameters[:count + steps], *plan.products, *body.parameters[count + steps:], *plan.fixed]
    stays = [k for k in range(count, len(node.types)) if k not in plan.behind]
    stacked = list(dict.fromkeys((*(body.results[k] for k in stays), *plan.leaves)))
    region = extract([*body.results[:count], *stacked], leaves)
    names = dict(zip(body.results[count:], attrs["kept"]))
    kept = tuple(names.get(v, "") for v in stacked) if names else ()
    operands = [*inputs[:count + steps], *products, *inputs[count + steps:], *map(fixed, plan.fixed)]
    made = b.node("scan", operands, {**attrs, "steps": steps + len(products), "kept": kept}, [region]).results
    known.update({v: made[count + i] for i, v in enumerate(stacked)})
    out = [*made[:count]]
    for k in range(count, len(node.types)):
        out.append(_lift(b, length, body.results[k], known, plan.varies, fixed) if k in plan.behind
                   else made[count + stacked.index(body.results[k])])
    return out
