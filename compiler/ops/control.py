"""Ops that hold regions (loops, branches, gradients of the user's own, and the kernels that fusion makes),
and `grad`, which autodiff replaces."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.ops.record import REQUIRED, Arg, Failure, Op
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError

SAVES = ("values", "carries")
"""What the gradient of a scan keeps of each step: values that are dear to compute, or the carries alone."""


def _infer_grad(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    count = attrs["cotangents"]
    if len(types) < (2 * count or 1) + 1:
        raise UseError("grad takes a scalar and at least one value to differentiate it by", op="grad")
    for output, cotangent in zip(types[:count], types[count:2 * count]):
        if output != cotangent:
            raise ShapeError(f"the cotangent of a value of type {output} is {cotangent}", op="grad",
                             shapes=[output.shape, cotangent.shape])
    loss, wrt = types[0], types[2 * count or 1:]
    if not count and loss.shape:
        raise UseError(f"grad differentiates one number, but this is an array {loss}", op="grad",
                       shapes=[loss.shape], hint="reduce it to a scalar, e.g. with mean() or sum()")
    for t in types[:count or 1]:
        if not t.dtype.is_float:
            raise UseError(f"grad differentiates a float, but this is {t.dtype.full_name}", op="grad",
                           hint="compute the loss in float32: inside of gf.autocast, too, or of what is cast"
                           if t.dtype.is_half else "convert it with cast before the arithmetic")
    for i, t in enumerate(wrt):
        if not t.dtype.has_gradient:
            raise UseError(f"grad by value number {i}, which is {t}: only floats have gradients", op="grad",
                           shapes=[t.shape])
    return list(wrt)


def _regions(op: str, regions: Sequence[Region], *names: str) -> Sequence[Region]:
    if len(regions) != len(names):
        count = "one region" if len(names) == 1 else f"{len(names)} regions ({', '.join(names)})"
        raise UseError(f"{op} has {count}, not {len(regions)}", op=op)
    return regions


def _check_parameters(op: str, expected: Sequence[TensorType], region: Region, name: str = "body") -> None:
    if len(expected) != len(region.parameters):
        raise UseError(f"{op}: the {name} has {len(region.parameters)} parameters for {len(expected)} "
                       "operands", op=op)
    for i, (t, parameter) in enumerate(zip(expected, region.parameters)):
        if t != parameter.type:
            message = f"{op}: parameter {i} of the {name} is {parameter.type}, but its operand gives {t}"
            raise ShapeError(message, op=op, shapes=[t.shape, parameter.shape])


def _check_carries(op: str, starts: Sequence[TensorType], results: Sequence[TensorType]) -> None:
    if len(results) < len(starts):
        raise UseError(f"{op}: the body returns {len(results)} values for {len(starts)} carries", op=op)
    for i, (before, after) in enumerate(zip(starts, results)):
        if before != after:
            kind = ShapeError if before.dtype == after.dtype else DTypeError
            raise kind(f"{op}: carry {i} starts as {before}, but the body returns {after}", op=op,
                       shapes=[before.shape, after.shape], hint="a carry keeps its shape and element type")


def _check_number(op: str, name: str, t: TensorType) -> None:
    if t.dtype != BOOL:
        raise DTypeError(f"{op}: the {name} is bool, not {t.dtype.full_name}", op=op, shapes=[t.shape])
    if t.shape:
        raise ShapeError(f"{op}: the {name} is one bool, not an array", op=op, shapes=[t.shape],
                         hint="reduce it with all() or any()")


def _infer_scan(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    region, length = _regions("scan", regions, "body")[0], attrs["length"]
    if attrs["save"] not in SAVES:
        raise UseError(f"scan: save is {attrs['save']!r}, not one of {', '.join(SAVES)}", op="scan")
    carries, steps = attrs["carries"], attrs["steps"]
    if min(carries, steps) < 0 or len(types) < carries + steps:
        raise UseError(f"scan: {carries} carries and {steps} inputs per step, but {len(types)} operands",
                       op="scan")
    rows = []
    for i, t in enumerate(types[carries:carries + steps]):
        if not t.shape or t.shape[0] != length:
            raise ShapeError(f"scan: axis 0 of input {i} per step is {t.shape[0] if t.shape else 'missing'}, "
                             f"the length is {length}", op="scan", shapes=[t.shape])
        rows.append(TensorType(t.dtype, t.shape[1:]))
    _check_parameters("scan", [*types[:carries], *rows, *types[carries + steps:]], region)
    results = [v.type for v in region.results]
    _check_carries("scan", types[:carries], results)
    if attrs["kept"] and len(attrs["kept"]) != len(results) - carries:
        raise UseError(f"scan: {len(attrs['kept'])} names of kept values for {len(results) - carries} "
                       "stacked results", op="scan")
    return results[:carries] + [TensorType(t.dtype, (length, *t.shape)) for t in results[carries:]]


def _gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    from graphflow.compiler.passes.control_gradient import control_gradient
    return control_gradient(b, node, cotangents, [v.dtype.has_gradient for v in node.inputs])


def _infer_cond(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    then, otherwise = _regions("cond", regions, "then", "otherwise")
    if not types:
        raise UseError("cond takes a predicate", op="cond")
    _check_number("cond", "predicate", types[0])
    _check_parameters("cond", types[1:], then, "branch then")
    _check_parameters("cond", types[1:], otherwise, "branch otherwise")
    first, second = ([v.type for v in region.results] for region in regions)
    if len(first) != len(second):
        raise UseError(f"cond: one branch returns {len(first)} values, the other {len(second)}", op="cond")
    for i, (x, y) in enumerate(zip(first, second)):
        if x != y:
            kind = ShapeError if x.dtype == y.dtype else DTypeError
            raise kind(f"cond: result {i} is {x} in the branch then, {y} in the branch otherwise", op="cond",
                       shapes=[x.shape, y.shape], hint="both branches give the same types")
    return first


def _infer_while(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    condition, body = _regions("while_loop", regions, "condition", "body")
    carries, limit = attrs["carries"], attrs["limit"]
    if not 0 <= carries <= len(types):
        raise UseError(f"while_loop: {carries} carries, but {len(types)} operands", op="while_loop")
    if not isinstance(limit, int) or limit < 0:
        raise UseError(f"while_loop: the limit is a number of trips, not {limit!r}", op="while_loop")
    _check_parameters("while_loop", types, condition, "condition")
    _check_parameters("while_loop", types, body)
    if len(condition.results) != 1:
        raise UseError(f"while_loop: the condition returns {len(condition.results)} values, not one bool",
                       op="while_loop")
    _check_number("while_loop", "condition", condition.results[0].type)
    results = [v.type for v in body.results]
    _check_carries("while_loop", types[:carries], results)
    if len(results) > carries:
        raise UseError(f"while_loop: the body returns {len(results)} values for {carries} carries",
                       op="while_loop", hint="to stack an output of every step, use scan")
    return results


def _infer_custom(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    op = "custom_gradient"
    forward, backward = _regions(op, regions, "forward", "backward")
    _check_parameters(op, types, forward, "forward part")
    results = [v.type for v in forward.results]
    cotangents = [t for t in results if t.dtype.has_gradient]
    _check_parameters(op, [*types, *results, *cotangents], backward, "backward part")
    wanted = [(i, t) for i, t in enumerate(types) if t.dtype.has_gradient]
    if len(backward.results) != len(wanted):
        raise UseError(f"{attrs['name']}: the backward part returns {len(backward.results)} cotangents for "
                       f"{len(wanted)} float operands", op=op)
    for (i, t), v in zip(wanted, backward.results):
        if v.type != t:
            kind = ShapeError if v.dtype == t.dtype else DTypeError
            raise kind(f"{attrs['name']}: operand {i} is {t}, but its cotangent is {v.type}", op=op,
                       shapes=[t.shape, v.shape])
    return results


def _infer_fused(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    region, after, inplace = _regions("fused", regions, "body")[0], attrs["after"], attrs["inplace"]
    if not 0 <= after <= len(types):
        raise UseError(f"fused: {after} of {len(types)} operands are said to be for ordering", op="fused")
    _check_parameters("fused", types[:len(types) - after], region)
    if inplace and len(inplace) != len(region.results):
        raise UseError(f"fused: {len(inplace)} in-place states for {len(region.results)} results", op="fused")
    return [v.type for v in region.results]


def _region_flops(node: Node) -> DimLike:
    from graphflow.compiler.ops import OPS as table
    total: DimLike = 0
    for region in node.regions:
        for inner in region.nodes():
            total = total + table[inner.op].flops(inner)
    return total


OPS: tuple[Op, ...] = (
    Op("grad", "grad", "The gradients of a scalar by values that it is computed from; autodiff expands it. "
       "With `cotangents` n > 0 it takes n values in the scalar's place, then a cotangent of each (of its "
       "type), and gives the cotangents of the rest: no gradient flows through those given.",
       ("scalar", "*wrt"), _infer_grad, attrs={"cotangents": 0},
       failures=[Failure((Arg(()),), {}, "at least one value"),
                 Failure((Arg((3,)), Arg((3,))), {}, "reduce it to a scalar"),
                 Failure((Arg((), "i32"), Arg((3,))), {}, "differentiates a float"),
                 Failure((Arg(()), Arg((3,)), Arg((3,), "i64")), {}, "by value number 1, which is i64[3]"),
                 Failure((Arg((3,)), Arg((2,)), Arg((3,))), {"cotangents": 1}, "the cotangent of a value")]),
    Op("scan", "control", "Runs the body `length` times, from the last step to the first if `reverse`. "
       "Operands: `carries` values that each step replaces, then `steps` arrays of which step i sees element "
       "i of axis 0, then constants; the body's parameters stand for them in this order. The body returns "
       "the carries and what is to be stacked along a new axis 0, at the step's own place. Results: the last "
       "carries, the stacked arrays. `save` says what the gradient keeps of each step: the values that are "
       "dear to compute, or the carries alone; `kept` names, for each stacked result, what it is kept as, "
       "\"\" for the program's own.",
       ("*operands",), _infer_scan, gradient=_gradient,
       attrs={"length": REQUIRED, "carries": REQUIRED, "steps": REQUIRED, "reverse": False, "save": "values",
              "kept": ()},
       flops=lambda node: _region_flops(node) * node.attrs["length"],
       failures=[Failure((Arg(()),), {"length": 3, "carries": 1, "steps": 0}, "one region")]),
    Op("cond", "control", "The results of the region `then` if the predicate holds, else those of "
       "`otherwise`; the other region does not run. The parameters of both stand for the operands after the "
       "predicate.",
       ("predicate", "*operands"), _infer_cond, gradient=_gradient, flops=_region_flops,
       failures=[Failure((Arg((), "bool"),), {}, "2 regions (then, otherwise)")]),
    Op("while_loop", "control", "Runs the body as long as the condition holds, at most `limit` times. "
       "Operands: `carries` values that each step replaces, then constants; the parameters of both regions "
       "(condition, body) stand for all of them. Results: the last carries.",
       ("*operands",), _infer_while, gradient=_gradient,
       attrs={"carries": REQUIRED, "limit": REQUIRED},
       flops=lambda node: _region_flops(node) * node.attrs["limit"],
       failures=[Failure((Arg(()),), {"carries": 1, "limit": 9}, "2 regions (condition, body)")]),
    Op("custom_gradient", "control", "The results of the region `forward`, with the region `backward` as the "
       "gradient: its parameters are the operands, the results, and the cotangents of the float results; it "
       "returns a cotangent for each float operand, in order. `name` is what the user calls the op. The "
       "autodiff stage uses `backward` and puts `forward` in the node's place.",
       ("*operands",), _infer_custom, gradient=_gradient, attrs={"name": REQUIRED},
       flops=_region_flops,
       failures=[Failure((Arg(()),), {"name": "mine"}, "2 regions (forward, backward)")]),
    Op("fused", "fused", "A kernel in the making: the region's ops run as one. The last `after` operands are "
       "no parameters of the region: they only say what must run before. `inplace`: per result, the name of "
       "the state that it overwrites, or \"\"; `kind` says what the kernel is, `axes` (kind row) along which "
       "axes its rows run, `note` names its ops; the schedule sets `position`, its place in the order, and "
       "`split`, the pieces of its reduction.",
       ("*operands",), _infer_fused,
       attrs={"kind": REQUIRED, "axes": (), "after": 0, "inplace": (), "note": "", "position": -1,
              "split": 1},
       flops=_region_flops,
       failures=[Failure((Arg(()),), {"kind": "loop"}, "one region")]),
)
