"""Casts between float32 and the halves in integer arithmetic: the same bits on every CPU, and no call into a
library where an instruction is missing. A half in a register is its 16 bits as an integer.
"""
from __future__ import annotations

import numpy as np

from graphflow.compiler.emit.builder import F32, I16, I32, Builder, Value
from graphflow.compiler.plan.dtypes import F16, DType

_INFINITY = 0x7F80_0000
_LEAST_NORMAL, _OVERFLOW = 0x3880_0000, 0x477F_F000
"""As the bits of a float32: float16's least normal number, and the least that rounds to its infinity."""


def half_bits(value: float, dtype: DType) -> int:
    """The bits of a literal."""
    with np.errstate(over="ignore"):
        return int(np.asarray(np.float32(value)).astype(dtype.numpy).view(np.uint16))


def widen(b: Builder, x: Value, source: DType) -> Value:
    """A half as a float32, exactly."""
    bits = b.cast(x, I32, signed=False)
    if source != F16:
        return b.bitcast(b.shl(bits, 16), x.type.like(F32))
    sign = b.shl(b.and_(bits, 0x8000), 16)
    magnitude = b.shl(b.and_(bits, 0x7FFF), 13)
    # The exponent's bias differs by 112; float32's denormals do those of float16 right, too.
    scaled = b.bitcast(b.mul(b.bitcast(magnitude, x.type.like(F32)), 2.0 ** 112), bits.type)
    special = b.compare("uge", magnitude, 0x7C00 << 13)
    return b.bitcast(b.or_(sign, b.select(special, b.or_(magnitude, _INFINITY), scaled)), x.type.like(F32))


def narrow(b: Builder, x: Value, target: DType) -> Value:
    """A float32 as the nearest half, ties to even; NaN stays NaN."""
    bits = b.bitcast(x, x.type.like(I32))
    magnitude = b.and_(bits, 0x7FFF_FFFF)
    nan = b.compare("ugt", magnitude, _INFINITY)
    if target != F16:
        odd = b.and_(b.lshr(bits, 16), 1)
        rounded = b.lshr(b.add(b.add(bits, 0x7FFF), odd), 16)
        return b.cast(b.select(nan, b.or_(b.lshr(bits, 16), 0x40), rounded), I16)
    odd = b.and_(b.lshr(magnitude, 13), 1)
    normal = b.lshr(b.add(b.add(magnitude, 0xFFF - (112 << 23)), odd), 13)
    # Above 0.5 neighbours are 2**-24 apart, as float16's denormals are: the addition rounds.
    shifted = b.bitcast(b.add(b.bitcast(magnitude, x.type), 0.5), bits.type)
    small = b.sub(shifted, 0x3F00_0000)
    out = b.select(b.compare("ult", magnitude, _LEAST_NORMAL), small, normal)
    out = b.select(b.compare("uge", magnitude, _OVERFLOW), 0x7C00, out)
    out = b.select(nan, 0x7E00, out)
    return b.cast(b.or_(out, b.lshr(b.xor(bits, magnitude), 16)), I16)
