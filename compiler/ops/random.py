"""Random bits, from a counter: the same on every device, in any order, without state between elements."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Attrs, Region, TensorType
from graphflow.compiler.kernel.form import Expr
from graphflow.compiler.ops.record import (
    REQUIRED,
    Arg,
    Failure,
    Index,
    Op,
    Point,
    Pointwise,
    Sample,
    check_operands,
)
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import U32
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
ROUNDS = 20
FOLD = 2 ** 32 - 1
"""The second word of the counter that makes a new key of a key and a loop's index: a stream that the
language, which numbers them from 0, does not reach."""


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The Threefry-2x32 block cipher with 20 rounds, on uint32 arrays: Salmon, Moraes, Dror and Shaw,
    "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""
    k0, k1 = (np.atleast_1d(np.asarray(k, np.uint32)) for k in key)      # arrays wrap silently, scalars warn
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(PARITY))
    x0, x1 = np.asarray(counter[0], np.uint32) + keys[0], np.asarray(counter[1], np.uint32) + keys[1]
    for r in range(ROUNDS):
        turn = ROTATIONS[r % 8]
        x0 = x0 + x1
        x1 = ((x1 << np.uint32(turn)) | (x1 >> np.uint32(32 - turn))) ^ x0
        if r % 4 == 3:
            s = r // 4 + 1
            x0, x1 = x0 + keys[s % 3], x1 + keys[(s + 1) % 3] + np.uint32(s)
    return x0, x1


def _infer(types: Sequence[TensorType], attrs: Attrs, regions: Sequence[Region]) -> list[TensorType]:
    if len(types) < 2:
        check_operands("random_bits", types, 2)
    for name, t in zip(("seed", "step"), types):
        if t.dtype != U32:
            raise DTypeError(f"the {name} of random_bits is uint32, not {t.dtype.full_name}",
                             op="random_bits")
        if t.shape:
            raise ShapeError(f"the {name} of random_bits is one number", op="random_bits", shapes=[t.shape])
    for t in types[2:]:
        if t.dtype != U32 or t.shape:
            raise DTypeError(f"an index of random_bits is one uint32, not {t}", op="random_bits",
                             shapes=[t.shape])
    if not 0 <= attrs["stream"] < 2 ** 32:
        raise UseError(f"the stream {attrs['stream']} is not in 0..2**32-1", op="random_bits")
    out = TensorType(U32, tuple(attrs["shape"]))
    if isinstance(out.size, int) and out.size > 2 ** 32:
        raise ShapeError("random_bits numbers its elements with 32 bits: this shape has more",
                         op="random_bits", shapes=[out.shape], hint="make it in two halves")
    return [out]


def _reference(arrays: Sequence[Any], attrs: Attrs, types: Sequence[Any]) -> list[Any]:
    shape = types[0].shape
    element = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64).astype(np.uint32)
    key = (arrays[0], arrays[1])
    for index in arrays[2:]:
        key = threefry2x32(key, (index, np.uint32(FOLD)))
    word, _ = threefry2x32(key, (element, np.full_like(element, attrs["stream"])))
    return [word.reshape(shape)]


def _lower(p: Point, index: Index, result: int) -> Expr:
    flat: DimLike = 0
    for at, extent in zip(index, p.node.types[0].shape):
        flat = flat * extent + at

    key = (p.operand(0, ()), p.operand(1, ()))
    for i in range(2, len(p.node.inputs)):
        key = _cipher(p, key, p.operand(i, ()), p.const(FOLD, U32))
    return _cipher(p, key, p.index(flat, U32), p.const(p.node.attrs["stream"], U32))[0]


def _cipher(p: Point, key: tuple[Expr, Expr], low: Expr, high: Expr) -> tuple[Expr, Expr]:
    """`threefry2x32` of the counter (low, high)."""
    def u32(value: int) -> Expr:
        return p.const(value, U32)

    def do(function: str, x: Expr, y: Expr) -> Expr:
        return p.apply(function, x, y, dtype=U32)

    k0, k1 = p.bind(key[0]), p.bind(key[1])
    keys = (k0, k1, p.bind(do("bit_xor", do("bit_xor", k0, k1), u32(PARITY))))
    x0 = p.bind(do("add", low, keys[0]))
    x1 = p.bind(do("add", high, keys[1]))
    for r in range(ROUNDS):
        turn = ROTATIONS[r % 8]
        x0 = p.bind(do("add", x0, x1))
        turned = do("bit_or", do("shift_left", x1, u32(turn)), do("shift_right", x1, u32(32 - turn)))
        x1 = p.bind(do("bit_xor", turned, x0))
        if r % 4 == 3:
            s = r // 4 + 1
            x0 = p.bind(do("add", x0, keys[s % 3]))
            x1 = p.bind(do("add", do("add", x1, keys[(s + 1) % 3]), u32(s)))
    return x0, x1


_SEED = Arg((), "u32", 0, 2 ** 32 - 1)

OPS: tuple[Op, ...] = (
    Op("random_bits", "window", "32 random bits per element: the first word of Threefry-2x32 under the key "
       "(seed, step), at the counter (row-major number of the element, stream). Each index, the step of a "
       "loop around it, makes a new key first: the cipher of (index, 2**32 - 1). About 120 integer "
       "operations per element, so it is of the kind that readers do not evaluate many times. Two nodes with "
       "different streams are independent.",
       ("seed", "step", "*indices"), _infer, _reference, None, Pointwise(_lower),
       {"shape": REQUIRED, "stream": REQUIRED},
       flops=lambda node: node.types[0].size * 120,
       samples=lambda: [Sample((_SEED,) * operands, {"shape": shape, "stream": stream}, smooth=False)
                        for shape, stream, operands in
                        (((), 0, 2), ((0,), 1, 2), ((7,), 2, 2), ((3, 1, 5), 2 ** 32 - 1, 2),
                         ((2, 2, 3, 2), 12345, 2), ((7,), 2, 3), ((3, 5), 1, 4))],
       failures=[Failure((Arg((), "i32"), _SEED), {"shape": (), "stream": 0}, "is uint32, not int32"),
                 Failure((_SEED, Arg((1,), "u32")), {"shape": (), "stream": 0},
                         "the step of random_bits is one number"),
                 Failure((_SEED, _SEED, Arg((), "i64")), {"shape": (), "stream": 0}, "one uint32, not i64[]"),
                 Failure((_SEED, _SEED), {"shape": (), "stream": -1}, "the stream -1"),
                 Failure((_SEED, _SEED), {"shape": (2 ** 17, 2 ** 16), "stream": 0}, "in two halves")]),
)
