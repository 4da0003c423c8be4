"""Gradients: a node that the compiler expands."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from graphflow.compiler.ir.graph import topological
from graphflow.compiler.plan.errors import UseError
from graphflow.scope import here
from graphflow.tensor import Tensor, apply


@overload
def grad(scalar: Tensor, wrt: Tensor) -> Tensor: ...
@overload
def grad(scalar: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]: ...


def grad(scalar: Tensor, wrt: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """The gradient of a scalar by a tensor that it is computed from, or by each of a list; of the tensors'
    shapes.

    The result is a tensor like any other: it can be differentiated again. UseError for a `scalar` that is
    none, and for a tensor that it does not depend on.
    """
    listed: list[Any] = list(wrt) if isinstance(wrt, (list, tuple)) else [wrt]
    for t in (scalar, *listed):
        if not isinstance(t, Tensor):
            raise UseError(f"grad takes tensors, not {t!r}", op="grad", where=here())
    known = set(topological([scalar.value.node]))
    for i, t in enumerate(listed):
        if t.value.node not in known:
            which = repr(t.name) if t.name else f"tensor number {i} (the result of {t.value.op})"
            raise UseError(f"the scalar does not depend on {which}", op="grad",
                           shapes=[scalar.shape, t.shape], where=here(),
                           hint="differentiate by what it is computed from; reshaping or casting a tensor "
                                "makes another one")
    results = apply("grad", [scalar, *listed])
    results = (results,) if isinstance(results, Tensor) else results
    return list(results) if isinstance(wrt, (list, tuple)) else results[0]
