"""Ops that hold regions (scan, and the kernels that fusion makes), and `grad`, which autodiff replaces."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.ops.record import REQUIRED, Arg, Failure, Op
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError


def _infer_grad(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    if len(types) < 2:
        raise UseError("grad takes a scalar and at least one value to differentiate it by", op="grad")
    loss, *wrt = types
    if loss.shape:
        raise UseError(f"grad differentiates one number, but this is an array {loss}", op="grad",
                       shapes=[loss.shape], hint="reduce it to a scalar, e.g. with mean() or sum()")
    if not loss.dtype.is_float:
        raise UseError(f"grad differentiates a float, but this is {loss.dtype.full_name}", op="grad",
                       hint="convert it with cast before the arithmetic")
    for i, t in enumerate(wrt):
        if not t.dtype.is_float:
            raise UseError(f"grad by value number {i}, which is {t}: only floats have gradients", op="grad",
                           shapes=[t.shape])
    return list(wrt)


def _region(op: str, regions: Sequence[Region]) -> Region:
    if len(regions) != 1:
        raise UseError(f"{op} has one region, not {len(regions)}", op=op)
    return regions[0]


def _check_parameters(op: str, expected: Sequence[TensorType], region: Region) -> None:
    if len(expected) != len(region.parameters):
        raise UseError(f"{op}: the body has {len(region.parameters)} parameters for {len(expected)} operands",
                       op=op)
    for i, (t, parameter) in enumerate(zip(expected, region.parameters)):
        if t != parameter.type:
            message = f"{op}: parameter {i} of the body is {parameter.type}, but its operand gives {t}"
            raise ShapeError(message, op=op, shapes=[t.shape, parameter.shape])


def _infer_scan(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    region, length = _region("scan", regions), attrs["length"]
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
    if len(results) < carries:
        raise UseError(f"scan: the body returns {len(results)} values for {carries} carries", op="scan")
    for i, (before, after) in enumerate(zip(types[:carries], results)):
        if before != after:
            kind = ShapeError if before.dtype == after.dtype else DTypeError
            raise kind(f"scan: carry {i} starts as {before}, but the body returns {after}", op="scan",
                       shapes=[before.shape, after.shape], hint="a carry keeps its shape and element type")
    return results[:carries] + [TensorType(t.dtype, (length, *t.shape)) for t in results[carries:]]


def _scan_gradient(b: Any, node: Node, cotangents: Sequence[Value | None]) -> NoReturn:
    raise NotImplementedError("scan has no gradient yet: to differentiate, unroll the loop in Python")


def _infer_fused(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    region, after, inplace = _region("fused", regions), attrs["after"], attrs["inplace"]
    if not 0 <= after <= len(types):
        raise UseError(f"fused: {after} of {len(types)} operands are said to be for ordering", op="fused")
    _check_parameters("fused", types[:len(types) - after], region)
    if inplace and len(inplace) != len(region.results):
        raise UseError(f"fused: {len(inplace)} in-place states for {len(region.results)} results", op="fused")
    return [v.type for v in region.results]


def _region_flops(node: Node) -> DimLike:
    from graphflow.compiler.ops import OPS as table
    total: DimLike = 0
    for inner in node.regions[0].nodes():
        total = total + table[inner.op].flops(inner)
    return total


OPS: tuple[Op, ...] = (
    Op("grad", "grad", "The gradients of a scalar by values that it is computed from; autodiff expands it.",
       ("scalar", "*wrt"), _infer_grad,
       failures=[Failure((Arg(()),), {}, "at least one value"),
                 Failure((Arg((3,)), Arg((3,))), {}, "reduce it to a scalar"),
                 Failure((Arg((), "i32"), Arg((3,))), {}, "differentiates a float"),
                 Failure((Arg(()), Arg((3,)), Arg((3,), "i64")), {}, "by value number 1, which is i64[3]")]),
    Op("scan", "control", "Runs the body `length` times, from the last step to the first if `reverse`. "
       "Operands: `carries` values that each step replaces, then `steps` arrays of which step i sees element "
       "i of axis 0, then constants; the body's parameters stand for them in this order. The body returns "
       "the carries and what is to be stacked along a new axis 0, at the step's own place. Results: the last "
       "carries, the stacked arrays.",
       ("*operands",), _infer_scan, gradient=_scan_gradient,
       attrs={"length": REQUIRED, "carries": REQUIRED, "steps": REQUIRED, "reverse": False},
       flops=lambda node: _region_flops(node) * node.attrs["length"],
       failures=[Failure((Arg(()),), {"length": 3, "carries": 1, "steps": 0}, "one region")]),
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
