"""Substitution: a tensor computed from other values than it was declared with."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphflow.compiler.ir.graph import Node, Value, topological
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.scope import here
from graphflow.tensor import Tensor


def substitute(x: Any, replacements: Mapping[Tensor, Tensor]) -> Any:
    """`x` (a Tensor, or a list or dict of them) computed with each key of `replacements` replaced by its
    value, which has the same shape and element type.

    The keys are any tensors that `x` is computed from: parameters, inputs or results in between. The values
    themselves are left as they are. ShapeError or DTypeError for a replacement that does not fit.
    """
    for old, new in replacements.items():
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            raise UseError(f"substitute replaces tensors by tensors, not {old!r} by {new!r}", where=here())
        if old.shape != new.shape:
            raise ShapeError("the replacement has another shape", shapes=[old.shape, new.shape], where=here())
        if old.dtype != new.dtype:
            raise DTypeError(f"{new.dtype.full_name} can't replace {old.dtype.full_name}",
                             shapes=[old.shape, new.shape], where=here(), hint="convert it with gf.cast")
    mapped = {old.value: new.value for old, new in replacements.items()}
    if isinstance(x, Mapping):
        return {k: _substitute(t, mapped, replacements) for k, t in x.items()}
    if isinstance(x, (list, tuple)):
        return [_substitute(t, mapped, replacements) for t in x]
    return _substitute(x, mapped, replacements)


def _substitute(t: Tensor, mapped: dict[Value, Value], replacements: Mapping[Tensor, Tensor]) -> Tensor:
    if not isinstance(t, Tensor):
        raise UseError(f"substitute takes tensors, not {t!r}", where=here())
    made: dict[Node, Node] = {}
    for node in topological([t.value.node, *t.checks]):
        inputs = tuple(mapped.get(v, v) for v in node.inputs)
        if inputs != node.inputs:
            made[node] = Node(node.op, inputs, node.attrs, node.regions, node.types, node.origins)
            for v in node.results:
                mapped.setdefault(v, Value(made[node], v.index))
    checks = [made.get(check, check) for check in t.checks]
    checks += [check for new in replacements.values() for check in new.checks]
    return Tensor(mapped.get(t.value, t.value), tuple(dict.fromkeys(checks)))
