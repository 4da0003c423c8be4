"""Mixed precision: which ops a net does with halves, decided where it is declared.

Parameters stay float32 (the master weights); inside ``with gf.autocast("bfloat16"):`` matrix products and
convolutions take their operands rounded to halves, and give halves; what needs the range or the precision of
float32 takes its operands in float32. Each rounding is a `cast` node of the graph. Products are summed in
float32 on every device. Micikevicius et al., "Mixed precision training", ICLR 2018.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from graphflow.compiler.ops.record import Op
from graphflow.compiler.plan.dtypes import F32, DType, as_dtype
from graphflow.compiler.plan.errors import DTypeError
from graphflow.scope import here

_half: ContextVar[DType | None] = ContextVar("graphflow_autocast", default=None)

_WIDE_KINDS = ("reduce", "routine", "window")
_WIDE_OPS = ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "div", "sqrt", "rsqrt",
             "sigmoid", "softplus", "erf", "erfinv", "sinh", "cosh", "tan", "logaddexp")
"""Ops whose results lose too much in a half: what PyTorch's autocast keeps in float32."""


@contextlib.contextmanager
def autocast(dtype: Any = "bfloat16", enabled: bool = True) -> Iterator[None]:
    """What is declared inside computes its matrix products and convolutions with operands of that half.

    dtype: "bfloat16", whose range is float32's, or "float16", which needs a scaled loss
    (`gf.optim.LossScale`). With ``enabled=False`` a part inside another autocast is declared as without.
    DTypeError for any other type.
    """
    try:
        half = as_dtype(dtype)
    except DTypeError as error:
        raise error.with_location(here()) from None
    if not half.is_half:
        raise DTypeError(f"autocast takes a half, not {half.full_name}", where=here(),
                         hint="use 'bfloat16' or 'float16'")
    token = _half.set(half if enabled else None)
    try:
        yield
    finally:
        _half.reset(token)


def autocast_type(record: Op) -> DType | None:
    """The type in which the op takes its operands of float32 and of halves where it is declared now; None for
    as they are."""
    half = _half.get()
    if half is None:
        return None
    if record.kind == "contraction":
        return half
    return F32 if record.kind in _WIDE_KINDS or record.name in _WIDE_OPS else None


def master_type(dtype: DType) -> DType:
    """The type of parameters for activations of a type: float32 for the halves that an autocast makes."""
    return F32 if dtype.is_half and _half.get() is not None else dtype
