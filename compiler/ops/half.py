"""float16 and bfloat16: types that are stored and moved, while arithmetic is float32 between explicit casts.

Whoever makes nodes (the language, the builder of passes) asks here which casts an op needs around it, so no
op but `cast` knows of halves, and each rounding to one can be seen in the graph's text.
"""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ops.record import Op
from graphflow.compiler.plan.dtypes import F32, DType

_MOVING_KINDS = ("leaf", "view", "gather", "effect", "control", "grad", "fused")
_MOVING_OPS = ("cast", "where", "stop_gradient")


def moves(record: Op) -> bool:
    """Whether the op takes halves as they are: it computes nothing with its operands."""
    return record.kind in _MOVING_KINDS or record.name in _MOVING_OPS


def rounded_to(record: Op, operands: Sequence[DType]) -> DType | None:
    """The half to which the op's float32 results are rounded, its halves having been cast to float32; None
    where no cast is needed."""
    halves = [d for d in operands if d.is_half]
    if not halves or moves(record):
        return None
    return halves[0] if all(d == halves[0] or not d.has_gradient for d in operands) else F32


def passes_float32(source: DType, target: DType) -> bool:
    """Whether a cast from one type to the other goes by float32: halves are cast to and from no other."""
    return source != target and (source.is_half and target != F32 or target.is_half and source != F32)
