"""Rough costs of kernels, from shapes alone: how much work makes a task."""

from __future__ import annotations

from graphflow.compiler.kernel.form import Apply, Expr, Guarded, Let, Load, Loop, Reduce, Statement, Store
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.plan.dims import TYPICAL_SIZE, DimLike

TASK_NS = 2_500
"""A task should take about this long, in nanoseconds: far more than handing it to a thread."""
_FLOP_NS, _ACCESS_NS, _SERIAL = 0.03, 0.15, 8


def trips(extent: DimLike) -> int:
    """The extent, or a guess for a symbolic one."""
    return extent if isinstance(extent, int) else TYPICAL_SIZE


def statement_ns(s: Statement, vector: bool) -> float:
    """The time of a statement; `vector`: it runs in a vectorised loop."""
    if isinstance(s, Loop):
        inside = vector or s.kind == "lanes"
        return trips(s.extent) * sum(statement_ns(x, inside) for x in s.body)
    if isinstance(s, Let):
        return expression_ns(s.value, vector)
    assert isinstance(s, Store)
    return expression_ns(s.value, vector) + _ACCESS_NS * (1 if vector else _SERIAL)


def expression_ns(e: Expr, vector: bool) -> float:
    """The time of an expression."""
    slow = 1 if vector else _SERIAL
    if isinstance(e, Load):
        return _ACCESS_NS * slow
    if isinstance(e, Apply):
        return SCALARS[e.function].flops * _FLOP_NS * slow + sum(expression_ns(a, vector) for a in e.args)
    if isinstance(e, Guarded):
        return 2 * _FLOP_NS * slow + expression_ns(e.value, vector)
    if isinstance(e, Reduce):
        inside = vector or bool(e.lanes)
        total = sum(expression_ns(x, inside) for x in (*e.operands, *(let.value for let in e.lets)))
        for _, extent in e.loops:
            total *= trips(extent)
        return total
    return 0.0
