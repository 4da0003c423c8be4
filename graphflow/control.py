"""Loops and branches in the graph: their size does not depend on the number of steps.

A body is a Python function of tensors, called once. What it captures (tensors from outside, layers'
parameters) becomes an operand by itself. All of them can be differentiated, any number of times.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from graphflow.arguments import as_tensor
from graphflow.compiler.ir.graph import Node, Region, TensorType, Value, topological
from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.compiler.plan.dtypes import BOOL, I64
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.reductions import all as every
from graphflow.scope import here
from graphflow.shapes import concatenate, reshape
from graphflow.structure import Structure, flatten
from graphflow.tensor import Operand, Tensor, apply, constant
from graphflow.tracing import OUTSIDE, close, depends_on, loop, loop_indices, parameter, recording


def scan(body: Callable[[Any, Any], tuple[Any, Any]], initial: Any, inputs: Any = None,
         length: DimLike | None = None, reverse: bool = False, checkpoint: int | None = None
         ) -> tuple[Any, Any]:
    """Runs ``body(carries, step_inputs) -> (new carries, outputs)`` for every step; (last carries, outputs).

    initial: the carries of the first step, a Tensor or nested tuples, lists and dicts of them; a carry keeps
    its shape and element type. inputs: the same kind of nest, or None; step i sees element i of every first
    axis. outputs: a nest or None; each is stacked along a new first axis, at the step's own place. The length
    is that of the inputs' first axis, a number or a dimension, or `length`. `reverse` starts with the last
    step. `gf.step_index()` is the number of the step inside the body.

    checkpoint: the gradient keeps the carries of every so many steps alone, and computes what lies between
    them again: about the square root of the length takes the least memory.
    """
    carries, carry_nest = flatten(initial, "the initial carry of scan")
    rows, row_nest = flatten(inputs, "the inputs of scan")
    steps = _length(rows, row_nest, length)
    traced = _trace_loop(body, carries, carry_nest, rows, row_nest)
    if traced.uses_index:
        rows = [*rows, apply("iota", [], shape=(steps,), axis=0, dtype=I64)]
    if checkpoint is None:
        results = traced.run(carries, rows, steps, reverse, "values")
    else:
        results = _run_in_blocks(traced, carries, rows, steps, reverse, _block(checkpoint))
    results = with_lifted(results, traced.checks, len(results) - len(traced.checks))
    count = len(carries)
    return carry_nest.build(results[:count]), traced.outputs.build(results[count:])


def step_index() -> Tensor:
    """The number (int64, from 0) of the step in whose body this is called, also where steps run in reverse;
    UseError outside of a loop's body."""
    indices = loop_indices()
    if not indices:
        raise UseError("step_index is known only inside the body of gf.scan or gf.while_loop", where=here())
    return Tensor(indices[-1])


def _length(rows: Sequence[Tensor], nest: Structure, length: DimLike | None) -> DimLike:
    if length is not None and (not isinstance(length, (int, Dim)) or isinstance(length, bool)):
        raise UseError(f"scan: the length is a number of steps, not {length!r}", op="scan", where=here())
    if isinstance(length, int) and length < 0:
        raise UseError(f"scan: the length is {length}", op="scan", where=here())
    first = "length="
    for row, path in zip(rows, nest.paths):
        if not row.shape:
            raise ShapeError(f"scan: inputs{path} is one number: it has no axis to step along", op="scan",
                             shapes=[row.shape], where=here(),
                             hint="what every step sees whole is simply used in the body")
        if length is None:
            length, first = row.shape[0], f"inputs{path}"
        elif row.shape[0] != length:
            raise ShapeError(f"scan: the first axis of inputs{path} is {row.shape[0]}, but {first} says "
                             f"{length}", op="scan", shapes=[r.shape for r in rows], where=here(),
                             hint="all inputs have one element for each step")
    if length is None:
        raise UseError("scan: neither inputs nor a length say how many steps there are", op="scan",
                       where=here())
    return length


def _block(checkpoint: Any) -> int:
    if not isinstance(checkpoint, int) or isinstance(checkpoint, bool) or checkpoint < 1:
        raise UseError(f"scan: checkpoint is a number of steps, not {checkpoint!r}", op="scan", where=here())
    return checkpoint


@dataclass(frozen=True)
class _Loop:
    """A scan's body, closed: what it captured, the structure of its outputs, and the checks inside it, whose
    conditions are its last outputs."""
    body: Region
    captured: list[Tensor]
    outputs: Structure
    checks: list[Node]
    uses_index: bool

    def run(self, carries: Sequence[Tensor], rows: Sequence[Tensor], length: DimLike, reverse: bool,
            save: str) -> list[Tensor]:
        """The scan: last carries, stacked outputs, stacked conditions."""
        if not self.body.results:
            return []
        return _listed(apply("scan", [*carries, *rows, *self.captured], [self.body], length=length,
                             carries=len(carries), steps=len(rows), reverse=reverse, save=save))


def _trace_loop(body: Callable[..., Any], carries: Sequence[Tensor], carry_nest: Structure,
                rows: Sequence[Tensor], row_nest: Structure) -> _Loop:
    where = here()
    before = [parameter(t.value.type, where) for t in carries]
    steps = [parameter(TensorType(t.dtype, t.shape[1:]), where) for t in rows]
    index = parameter(TensorType(I64, ()), where)
    with loop(index):
        returned = body(carry_nest.build(_tensors(before)), row_nest.build(_tensors(steps)))
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UseError("scan: the body returns (new carries, outputs)", op="scan", where=where,
                       hint="outputs may be None")
    after, after_nest = flatten(returned[0], "what the body of scan returns as carries")
    outputs, output_nest = flatten(returned[1], "what the body of scan returns as outputs")
    _check_carries("scan", carries, carry_nest, after, after_nest)
    inside = depends_on([*before, *steps, index])
    lifted, outer = sort_checks([*after, *outputs], inside)
    results = [t.value for t in (*after, *outputs)] + [check.inputs[0] for check in lifted]
    uses_index = index.node in topological(v.node for v in results)
    parameters = [*before, *steps] + [index] * uses_index
    (region,), captured = close([(parameters, results)], inside)
    return _Loop(region, [Tensor(v, outer) for v in captured], output_nest, lifted, uses_index)


def _run_in_blocks(traced: _Loop, carries: list[Tensor], rows: list[Tensor], length: DimLike, reverse: bool,
                   block: int) -> list[Tensor]:
    """The same scan as a scan over blocks of steps, of which the gradient keeps the first carries alone.
    Steps that fill no block follow as one more block."""
    count = len(carries)
    if isinstance(length, int):
        block = max(1, min(block, length))
    blocks = length // block
    whole = blocks * block

    def run_block(carry: Any, part: Any) -> tuple[Any, Any]:
        results = traced.run(carry, part, block, reverse, "values")
        return results[:count], results[count:]

    def run_whole(carry: list[Tensor]) -> list[Tensor]:
        cut = [reshape(r[:whole], (blocks, block, *r.shape[1:])) for r in rows]
        nests = (flatten(carry, "")[1], flatten(cut, "")[1])
        outer = _trace_loop(run_block, carry, nests[0], cut, nests[1])
        results = outer.run(carry, cut, blocks, reverse, "carries")
        return results[:count] + [reshape(r, (whole, *r.shape[2:])) for r in results[count:]]

    def run_rest(carry: list[Tensor]) -> list[Tensor]:
        rest = [r[whole:] for r in rows]
        return traced.run(carry, rest, length - whole, reverse, "values")

    if length - whole == 0:
        return run_whole(carries)
    parts = (run_rest, run_whole) if reverse else (run_whole, run_rest)
    first = parts[0](carries)
    second = parts[1](first[:count])
    head, tail = (second, first) if reverse else (first, second)
    return second[:count] + [concatenate([h, t]) for h, t in zip(head[count:], tail[count:])]


def cond(predicate: Operand, then: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any) -> Any:
    """``then(*operands)`` if the predicate (one bool) holds, else ``otherwise(*operands)``; the other does
    not run.

    operands: tensors, and nested tuples, lists and dicts of them. Both functions return the same nest, with
    the same shapes and element types. They may use tensors from outside, too.
    """
    chosen = _one_bool("cond", "predicate", as_tensor(predicate))
    where, leaves, nests = here(), [], []
    for operand in operands:
        more, nest = flatten(operand, "an operand of cond")
        leaves.append(more)
        nests.append(nest)
    parameters = [[parameter(t.value.type, where) for t in group] for group in leaves]
    with recording() as made:
        ends = [flatten(function(*(nest.build(_tensors(group)) for nest, group in zip(nests, parameters))),
                        f"what the branch {name} of cond returns")
                for name, function in (("then", then), ("otherwise", otherwise))]
    (yes, nest), (no, other) = ends
    _check_branches(yes, nest, no, other)
    flat = [p for group in parameters for p in group]

    def inside(node: Node) -> bool:
        return node in made and node.op not in OUTSIDE
    (on_yes, outer_yes), (on_no, outer_no) = sort_checks(yes, inside), sort_checks(no, inside)
    holds = constant(True).value
    first = [t.value for t in yes] + [c.inputs[0] for c in on_yes] + [holds] * len(on_no)
    second = [t.value for t in no] + [holds] * len(on_yes) + [c.inputs[0] for c in on_no]
    regions, captured = close([(flat, first), (flat, second)], inside)
    outer = tuple(dict.fromkeys((*outer_yes, *outer_no)))
    inputs = [chosen, *(t for group in leaves for t in group), *(Tensor(v) for v in captured)]
    inputs[0] = Tensor(chosen.value, (*chosen.checks, *outer))
    results = _listed(apply("cond", inputs, regions)) if first else []
    return nest.build(with_lifted(results, [*on_yes, *on_no], len(yes)))


def _check_branches(yes: list[Tensor], nest: Structure, no: list[Tensor], other: Structure) -> None:
    if nest != other:
        raise UseError(f"cond: the branch then returns {nest}, the branch otherwise {other}", op="cond",
                       where=here(), hint="both return the same nest of tensors")
    for x, y, path in zip(yes, no, nest.paths):
        if x.value.type != y.value.type:
            kind = ShapeError if x.dtype == y.dtype else DTypeError
            raise kind(f"cond: result{path} is {x.value.type} in the branch then, {y.value.type} in the "
                       "branch otherwise", op="cond", shapes=[x.shape, y.shape], where=here(),
                       hint="both branches give the same shapes and element types")


def while_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], initial: Any, limit: int) -> Any:
    """Runs ``body(carries) -> new carries`` as long as ``condition(carries)``, one bool, holds, at most
    `limit` times; the last carries.

    initial: a Tensor or nested tuples, lists and dicts of them; a carry keeps its shape and element type. The
    gradient runs `limit` steps whatever the number of trips, so the limit should not be far above it.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise UseError(f"while_loop: the limit is a number of steps, not {limit!r}", op="while_loop",
                       where=here())
    carries, nest = flatten(initial, "the initial carry of while_loop")
    where, count = here(), len(carries)
    before = [parameter(t.value.type, where) for t in carries]
    index, so_far = parameter(TensorType(I64, ()), where), parameter(TensorType(BOOL, ()), where)
    with loop(index):
        goes_on = _one_bool("while_loop", "condition", as_tensor(condition(nest.build(_tensors(before)))))
        after, after_nest = flatten(body(nest.build(_tensors(before))), "what the body of while_loop returns")
    _check_carries("while_loop", carries, nest, after, after_nest)
    inside = depends_on([*before, index])
    if sort_checks([goes_on], inside)[0]:
        raise NotImplementedError("while_loop: the condition computes with indices that must be checked: "
                                  "do that in the body and carry the result")
    checks, outer = sort_checks([*after, goes_on], inside)
    ends = [t.value for t in after]
    if index.node in topological([goes_on.value.node, *(v.node for v in ends), *checks]):
        before, ends = [*before, index], [*ends, (Tensor(index) + 1).value]
        carries = [*carries, constant(0, I64)]
    if checks:                              # one more carry: whether all checks of all steps have held
        now = Tensor(so_far)
        for check in checks:
            now = now & Tensor(check.inputs[0])
        before, ends, carries = [*before, so_far], [*ends, now.value], [*carries, constant(True)]
    inside = depends_on(before)
    regions, captured = close([(before, [goes_on.value]), (before, ends)], inside)
    inputs = [*carries, *(Tensor(v, outer) for v in captured)]
    if not carries:
        return nest.build([])
    results = _listed(apply("while_loop", inputs, regions, carries=len(carries), limit=limit))
    if checks:
        message = "; ".join(dict.fromkeys(str(c.attrs["message"]) for c in checks))
        feed = checks[0].attrs["feed"] if len(checks) == 1 else ""
        held = replace(checks[0], attrs={"message": message, "feed": feed})
        results = with_lifted([*results[:count], results[-1]], [held], count)
    return nest.build(results[:count])


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of tensors and nests of them, such that gradients keep none of the values inside it: they
    compute these again from the arguments. Less memory for more time: ``gf.checkpoint(block)(x)``."""
    @wraps(function)
    def recomputed(*arguments: Any) -> Any:
        where = here()
        leaves, nest = flatten(arguments, "an argument of the function under checkpoint")
        parameters = [parameter(t.value.type, where) for t in leaves]
        with recording() as made:
            results, result_nest = flatten(function(*nest.build(_tensors(parameters))),
                                           "what the function under checkpoint returns")

        def inside(node: Node) -> bool:
            return node in made and node.op not in OUTSIDE
        lifted, outer = sort_checks(results, inside)
        ends = [t.value for t in results] + [c.inputs[0] for c in lifted]
        (region,), captured = close([(parameters, ends)], inside)
        traced = _Loop(region, [*leaves, *(Tensor(v, outer) for v in captured)], result_nest, lifted, False)
        stacked = traced.run([], [], 1, False, "carries")
        once = [reshape(t, t.shape[1:]) for t in stacked]
        return result_nest.build(with_lifted(once, lifted, len(results)))
    return recomputed


# --- what they share

def _tensors(values: Sequence[Value]) -> list[Tensor]:
    return [Tensor(v) for v in values]


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _one_bool(op: str, name: str, x: Tensor) -> Tensor:
    if x.dtype != BOOL:
        raise DTypeError(f"{op}: the {name} is one bool, not {x.value.type}", op=op, shapes=[x.shape],
                         where=here(), hint="compare with something, e.g. x > 0")
    if x.shape:
        raise ShapeError(f"{op}: the {name} is one bool, not {x.value.type}", op=op, shapes=[x.shape],
                         where=here(),
                         hint="reduce it with gf.all or gf.any; gf.where chooses element by element")
    return x


def _check_carries(op: str, before: Sequence[Tensor], nest: Structure, after: Sequence[Tensor],
                   after_nest: Structure) -> None:
    if nest != after_nest:
        raise UseError(f"{op}: the carry starts as {nest}, but the body returns {after_nest}", op=op,
                       where=here())
    for old, new, path in zip(before, after, nest.paths):
        if old.value.type != new.value.type:
            kind = ShapeError if old.dtype == new.dtype else DTypeError
            line = new.value.node.origins[0] if new.value.node.origins else here()
            hint = f"convert it with gf.cast(…, '{old.dtype.full_name}')" if kind is DTypeError else \
                "a carry keeps its shape"
            raise kind(f"{op}: carry{path} starts as {old.value.type}, but the body returns {new.value.type}",
                       op=op, shapes=[old.shape, new.shape], where=line, hint=hint)


def sort_checks(results: Sequence[Tensor], inside: Callable[[Node], bool]
                 ) -> tuple[list[Node], tuple[Node, ...]]:
    """(checks made in a body, which must be lifted out of it; the others)."""
    checks = list(dict.fromkeys(check for t in results for check in t.checks))
    lifted = [c for c in checks if any(inside(v.node) for v in c.inputs)]
    for note in lifted:
        if note.op == "print":
            line = f"\n{note.origins[0].describe()}" if note.origins else ""
            raise NotImplementedError("a body can't print: return the values as outputs, and print these "
                                      f"outside{line}")
    return lifted, tuple(c for c in checks if c not in lifted)


def with_lifted(results: Sequence[Tensor], checks: Sequence[Node], count: int) -> list[Tensor]:
    """The first `count` results, with a check outside for each one inside: the conditions, stacked or single,
    are the rest of the results."""
    made = []
    for check, holds in zip(checks, results[count:]):
        whole = every(holds) if holds.shape else holds
        node = apply("check", [whole], **check.attrs).value.node
        made.append(replace(node, origins=check.origins or node.origins))
    return [Tensor(t.value, (*t.checks, *made)) for t in results[:count]]
