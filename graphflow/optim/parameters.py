"""Which parameters are trained: those that a loss is computed from, unless they are frozen."""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import topological
from graphflow.compiler.plan.errors import UseError
from graphflow.scope import here
from graphflow.state import Variable, variables_in
from graphflow.tensor import Tensor


def trainable(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The parameters that `x` is computed from and that are not frozen, in the order in which they were
    made."""
    return [v.tensor for v in _parameters(x) if not v.frozen]


def freeze(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Freezes the parameters that `x` is computed from, and gives them back: optimizers leave them alone.

    `x` is a parameter, a list of them, or anything computed from them: ``gf.freeze(features)`` freezes the
    net that makes the features. It counts for the optimizers that `minimize` from then on; programs that
    exist stay as they are. Gradients with respect to frozen parameters can still be asked for.
    """
    return _set_frozen(x, True)


def unfreeze(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Takes `freeze` back for the parameters that `x` is computed from, and gives them back."""
    return _set_frozen(x, False)


def _set_frozen(x: Tensor | Sequence[Tensor], frozen: bool) -> list[Tensor]:
    found = _parameters(x)
    if not found:
        raise UseError("this is computed from no parameter", where=here(),
                       hint="make parameters with gf.parameter or the layers of gf.nn")
    for v in found:
        v.frozen = frozen
    return [v.tensor for v in found]


def _parameters(x: Tensor | Sequence[Tensor]) -> list[Variable]:
    tensors = [x] if isinstance(x, Tensor) else list(x)
    for t in tensors:
        if not isinstance(t, Tensor):
            raise UseError(f"this is {t!r}, not a Tensor", where=here())
    return [v for v in variables_in(topological([t.value.node for t in tensors])) if v.role == "parameter"]
