"""Element types: one table, one short name each (``f32``), used at every level."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graphflow.compiler.plan.errors import DTypeError


@dataclass(frozen=True)
class DType:
    """An element type. `kind`: "f" float, "h" half (a float that is stored, and cast to float32 for
    arithmetic), "i" signed, "u" unsigned integer, "b" boolean; `bytes` per element."""

    name: str
    full_name: str
    kind: str
    bytes: int

    @cached_property
    def numpy(self) -> np.dtype:
        """The same type in NumPy; bfloat16 is that of the package ml_dtypes."""
        if self.name == "bf16":
            import ml_dtypes
            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.full_name)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    @property
    def is_float(self) -> bool:
        """Whether it is a floating-point type that arithmetic is done in."""
        return self.kind == "f"

    @property
    def is_half(self) -> bool:
        """Whether it is a floating-point type of 16 bits, which is stored and moved but not computed with."""
        return self.kind == "h"

    @property
    def has_gradient(self) -> bool:
        """Whether its values stand for real numbers, so that one can differentiate by them."""
        return self.kind in "fh"

    @property
    def is_integer(self) -> bool:
        """Whether it is an integer type, signed or not; bool is none."""
        return self.kind in "iu"


F32 = DType("f32", "float32", "f", 4)
F64 = DType("f64", "float64", "f", 8)
F16 = DType("f16", "float16", "h", 2)
BF16 = DType("bf16", "bfloat16", "h", 2)
I32 = DType("i32", "int32", "i", 4)
I64 = DType("i64", "int64", "i", 8)
U32 = DType("u32", "uint32", "u", 4)
U8 = DType("u8", "uint8", "u", 1)
BOOL = DType("bool", "bool", "b", 1)

DTYPES = {d.name: d for d in (F32, F64, F16, BF16, I32, I64, U32, U8, BOOL)}
COMPUTED = tuple(d for d in DTYPES.values() if not d.is_half)
"""The types that arithmetic is done in."""
_BY_FULL_NAME = {d.full_name: d for d in DTYPES.values()}


def as_dtype(dtype: Any) -> DType:
    """The DType of a DType, a short or NumPy name, or anything that ``np.dtype`` takes; DTypeError for
    others."""
    if isinstance(dtype, DType):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if isinstance(dtype, str) and dtype in _BY_FULL_NAME:
        return _BY_FULL_NAME[dtype]           # NumPy knows no bfloat16 until ml_dtypes is loaded
    try:
        return _BY_FULL_NAME[np.dtype(dtype).name]
    except (TypeError, KeyError):
        known = ", ".join(d.full_name for d in DTYPES.values())
        raise DTypeError(f"{dtype!r} is not an element type of graphflow",
                         hint=f"use one of {known}") from None


def promote(a: DType, b: DType) -> DType:
    """The type of an operation on two arrays: a float wins over an integer with its own width, so int64 with
    float32 is float32; among floats and among integers the wider (float16 with bfloat16 is float32); bool
    gives way to all; uint32 with a signed one is int64."""
    if a == b:
        return a
    if a.is_half and b.is_half:
        return F32
    if a.has_gradient or b.has_gradient:
        floats = [d for d in (a, b) if d.has_gradient]
        return max(floats, key=lambda d: d.bytes)
    if "b" in (a.kind, b.kind):
        return b if a.kind == "b" else a
    if {a, b} == {U32, I32}:
        return I64
    return max((a, b), key=lambda d: (d.bytes, d.kind == "i"))
