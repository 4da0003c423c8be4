"""Where values come from, and what a step leaves behind: feeds, state, constants, updates and checks."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Region, TensorType
from graphflow.compiler.ops.record import (
    REQUIRED,
    Arg,
    Failure,
    Op,
    Pointwise,
    Sample,
    check_operands,
)
from graphflow.compiler.plan.dims import Dim
from graphflow.compiler.plan.dtypes import BOOL, F32, I32, I64, U8
from graphflow.compiler.plan.errors import CompilerError, DTypeError, ShapeError, UseError

ROLES = ("parameter", "slot", "statistic", "seed", "step")
"""What an entry of the Store is for: a trained array, an optimizer's slot, a running statistic, the random
seed, or the number of steps done."""

MAX_ARRAY_BYTES = 1 << 20
"""What an `array` may take: it is part of the program's text."""


def _infer_declared(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("a leaf", types, 0)
    for axis, extent in enumerate(attrs["shape"]):
        if isinstance(extent, int) and extent < 0:
            raise ShapeError(f"axis {axis} has the negative extent {extent}", shapes=[attrs["shape"]])
    return [TensorType(attrs["dtype"], tuple(attrs["shape"]))]


def _infer_state(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    if attrs["role"] not in ROLES:
        raise UseError(f"{attrs['role']!r} is no role of a state entry", op="state",
                       hint=f"use one of {', '.join(ROLES)}")
    return _infer_declared(types, attrs, regions)


def _infer_constant(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("constant", types, 0)
    value, dtype = attrs["value"], attrs["dtype"]
    if dtype.kind == "b" and not isinstance(value, bool):
        raise DTypeError(f"the constant {value!r} is not a bool", op="constant")
    if dtype.is_integer:
        limits = np.iinfo(dtype.numpy)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DTypeError(f"the constant {value!r} is not an integer, but its element type is "
                             f"{dtype.full_name}",
                             op="constant")
        if not limits.min <= value <= limits.max:
            raise DTypeError(f"the constant {value} does not fit into {dtype.full_name}", op="constant",
                             hint=f"it holds {limits.min} to {limits.max}")
    return [TensorType(dtype, ())]


def _reference_constant(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> list[Any]:
    return [np.asarray(attrs["value"], types[0].dtype.numpy)]


def _infer_array(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    (type,) = _infer_declared(types, attrs, regions)
    if not isinstance(type.size, int):
        raise ShapeError("an array constant has a fixed shape", op="array", shapes=[type.shape])
    if type.size * type.dtype.bytes > MAX_ARRAY_BYTES:
        raise UseError(f"an array constant has at most {MAX_ARRAY_BYTES:,} bytes, this one has "
                       f"{type.size * type.dtype.bytes:,}", op="array", shapes=[type.shape],
                       hint="make it a feed, or a parameter that is not trained")
    if len(attrs["data"]) != type.size * type.dtype.bytes:
        raise UseError(f"{len(attrs['data'])} bytes are not an array of {type}", op="array")
    return [type]


def _elements(attrs: Attrs) -> np.ndarray:
    return np.frombuffer(attrs["data"], attrs["dtype"].numpy.newbyteorder("<")).astype(attrs["dtype"].numpy)


def _reference_array(arrays: Sequence[Any], attrs: Attrs, types: Sequence[TensorType]) -> list[Any]:
    return [_elements(attrs).reshape(types[0].shape)]


def _made_elsewhere(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> NoReturn:
    raise CompilerError("a region parameter is made by Builder.parameter, with its type")


def _infer_training(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("training", types, 0)
    return [TensorType(BOOL, ())]


def _infer_update(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("update", types, 1)
    if any(isinstance(extent, Dim) for extent in types[0].shape):
        raise ShapeError(f"the state {attrs['name']!r} has a fixed shape, but its new value is {types[0]}",
                         op="update", shapes=[types[0].shape])
    return [types[0]]


def _infer_check(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    check_operands("check", types, 1)
    if types[0].dtype != BOOL:
        raise DTypeError(f"check takes a bool, got {types[0].dtype.full_name}", op="check",
                         shapes=[types[0].shape])
    if types[0].shape:
        raise ShapeError("check takes one bool, not an array of them", op="check", shapes=[types[0].shape],
                         hint="reduce it with all() or any()")
    return [types[0]]


def _array_samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    cases = [(F32, ()), (F32, (5,)), (F32, (10, 100)), (I64, (2, 3)), (U8, (0,)), (BOOL, (2, 1, 4))]
    data = [rng.integers(0, 2, shape).astype(dtype.numpy).tobytes() for dtype, shape in cases]
    return [Sample((), {"data": bytes, "dtype": dtype, "shape": shape}, smooth=False)
            for bytes, (dtype, shape) in zip(data, cases)]


_TYPED = {"dtype": REQUIRED, "shape": REQUIRED}

OPS: tuple[Op, ...] = (
    Op("input", "leaf", "A feed: the array that the call passes under `name`. `finite`: the call refuses NaN "
       "and infinity in it.", (), _infer_declared, attrs={"name": REQUIRED, **_TYPED, "finite": False},
       failures=[Failure((), {"name": "x", "dtype": F32, "shape": (2, -1)},
                         "axis 1 has the negative extent -1")]),
    Op("state", "leaf", "The entry `name` of the Store as it was when the step began.", (), _infer_state,
       attrs={"name": REQUIRED, "role": REQUIRED, **_TYPED},
       failures=[Failure((), {"name": "w", "role": "weight", "dtype": F32, "shape": ()},
                         "use one of parameter")]),
    Op("constant", "leaf", "One literal number.", (), _infer_constant, _reference_constant,
       lowering=Pointwise(lambda p, index, result: p.const(p.node.attrs["value"], p.node.attrs["dtype"])),
       attrs={"value": REQUIRED, "dtype": REQUIRED},
       samples=lambda: [Sample((), {"value": v, "dtype": d}, smooth=False) for v, d in
                        ((1.5, F32), (float("-inf"), F32), (-3, I32), (255, U8), (True, BOOL))],
       failures=[Failure((), {"value": 1, "dtype": BOOL}, "is not a bool"),
                 Failure((), {"value": 0.5, "dtype": I32}, "is not an integer"),
                 Failure((), {"value": 256, "dtype": U8}, "it holds 0 to 255")]),
    Op("array", "leaf", f"A literal array of at most {MAX_ARRAY_BYTES:,} bytes, little-endian and row-major.",
       (), _infer_array, _reference_array,
       attrs={"data": REQUIRED, **_TYPED}, samples=_array_samples,
       failures=[Failure((), {"data": b"\0" * 7, "dtype": F32, "shape": (2,)},
                         "7 bytes are not an array of f32[2]"),
                 Failure((), {"data": b"", "dtype": F32, "shape": (1 << 10, 1 << 10)}, "make it a feed")]),
    Op("parameter", "leaf", "Parameter number `index` of a region.", (), _made_elsewhere,
       attrs={"index": REQUIRED}),
    Op("training", "leaf", "Whether the step trains: a bool that the trace stage replaces by a constant.", (),
       _infer_training),
    Op("update", "effect", "Gives the entry `name` of the Store its value after the step.", ("value",),
       _infer_update, lambda arrays, attrs, types: [arrays[0]], attrs={"name": REQUIRED},
       samples=lambda: [Sample((Arg(s),), {"name": "w"}, smooth=False) for s in ((), (0,), (2, 3))]),
    Op("check", "effect", "Stops the call with `message`, before any state is written, if the operand is "
       "false. `feed` names the feed that is to blame.",
       ("holds",), _infer_check, lambda arrays, attrs, types: [arrays[0]],
       attrs={"message": REQUIRED, "feed": ""},
       failures=[Failure((Arg((), "i32"),), {"message": ""}, "check takes a bool"),
                 Failure((Arg((2,), "bool"),), {"message": ""}, "reduce it with all()")]),
)
