"""Optimizers: they append the update of every parameter to the graph, where it is compiled with the rest of
the step.

`lr` is a number, or a Tensor: an input that each call feeds, or a schedule computed from a parameter.
"""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import topological
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.functions import op_function
from graphflow.gradient import grad
from graphflow.scope import here
from graphflow.state import counter, slot, variable_of, variables_in
from graphflow.tensor import Tensor, cast

_sqrt = op_function("sqrt")


class Optimizer:
    """What optimizers have in common. A subclass says in `update` what becomes of one parameter."""

    def __init__(self, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor) and lr.shape:
            raise ShapeError("the learning rate is one number", shapes=[lr.shape], where=here())
        if not isinstance(lr, Tensor) and not (isinstance(lr, (int, float)) and lr >= 0):
            raise UseError(f"the learning rate is {lr!r}", where=here(), hint="use a number >= 0 or a Tensor")
        self.lr = lr

    def minimize(self, loss: Tensor, parameters: Sequence[Tensor] | None = None) -> dict[Tensor, Tensor]:
        """The new values of the parameters and of the optimizer's slots after one step down the gradient of
        `loss`: the `updates` of `gf.function`. Without `parameters`, all that the loss is computed from.
        """
        if not isinstance(loss, Tensor):
            raise UseError(f"minimize takes the loss, a scalar Tensor, not {loss!r}", where=here())
        if parameters is None:
            parameters = trainable(loss)
        if not parameters:
            raise UseError("the loss is computed from no parameter", op="minimize", shapes=[loss.shape],
                           where=here(),
                           hint="make parameters with gf.parameter or the layers of gf.nn")
        for p in parameters:
            variable_of(p)
        return self.apply(list(zip(parameters, grad(loss, list(parameters)))))

    def apply(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
        """The same for gradients that the caller has computed, or changed: pairs (parameter, gradient)."""
        updates: dict[Tensor, Tensor] = {}
        self.begin(updates)
        for p, g in gradients:
            self.update(p, g, updates)
        return updates

    def begin(self, updates: dict[Tensor, Tensor]) -> None:
        """Adds the updates of what all parameters share."""

    def update(self, p: Tensor, g: Tensor, updates: dict[Tensor, Tensor]) -> None:
        """Adds the new values of the parameter `p`, whose gradient is `g`, and of its slots."""
        raise NotImplementedError

    def rate(self, p: Tensor) -> float | Tensor:
        """The learning rate in the parameter's element type."""
        return cast(self.lr, p.dtype) if isinstance(self.lr, Tensor) else self.lr


def trainable(x: Tensor) -> list[Tensor]:
    """The trained parameters that `x` is computed from, in the order in which they were made."""
    found = variables_in(topological([x.value.node]))
    return [v.tensor for v in found if v.role == "parameter"]


class SGD(Optimizer):
    """Stochastic gradient descent: p -= lr g.

    With a momentum μ: m = μ m + g and p -= lr m, or with `nesterov` p -= lr (g + μ m), as in Sutskever,
    Martens, Dahl and Hinton, ICML 2013, in the form that PyTorch uses.
    """

    def __init__(self, lr: float | Tensor, momentum: float = 0.0, nesterov: bool = False) -> None:
        super().__init__(lr)
        if not 0 <= momentum < 1:
            raise UseError(f"the momentum is {momentum!r}", where=here(),
                           hint="use a number from 0 to below 1")
        if nesterov and not momentum:
            raise UseError("Nesterov's method needs a momentum", where=here(),
                           hint="SGD(lr, 0.9, nesterov=True)")
        self.momentum, self.nesterov = momentum, nesterov

    def update(self, p: Tensor, g: Tensor, updates: dict[Tensor, Tensor]) -> None:
        """See the class."""
        if self.momentum:
            old = slot(p, "momentum")
            m = old * self.momentum + g
            updates[old] = m
            g = g + m * self.momentum if self.nesterov else m
        updates[p] = p - g * self.rate(p)


class RMSprop(Optimizer):
    """Gradients divided by a running mean of their size: v = d v + (1-d) g², p -= lr g / (sqrt(v) + eps).

    Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012.
    """

    def __init__(self, lr: float | Tensor = 0.001, decay: float = 0.9, eps: float = 1e-8) -> None:
        super().__init__(lr)
        _check_decay("decay", decay)
        self.decay, self.eps = decay, eps

    def update(self, p: Tensor, g: Tensor, updates: dict[Tensor, Tensor]) -> None:
        """See the class."""
        old = slot(p, "square")
        v = old * self.decay + (g * g) * (1 - self.decay)
        updates[old] = v
        updates[p] = p - g * self.rate(p) / (_sqrt(v) + self.eps)


class Adam(Optimizer):
    """Momentum and RMSprop with corrected biases: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g²,
    p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), t = 1, 2, …

    Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """

    def __init__(self, lr: float | Tensor = 0.001, beta1: float = 0.9, beta2: float = 0.999,
                 eps: float = 1e-8) -> None:
        super().__init__(lr)
        _check_decay("beta1", beta1)
        _check_decay("beta2", beta2)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def begin(self, updates: dict[Tensor, Tensor]) -> None:
        """Counts the steps; the corrections are the same for all parameters."""
        steps = counter("adam")
        updates[steps] = steps + 1
        power = op_function("pow")
        self.correction1 = 1 - power(self.beta1, updates[steps])
        self.correction2 = 1 - power(self.beta2, updates[steps])

    def update(self, p: Tensor, g: Tensor, updates: dict[Tensor, Tensor]) -> None:
        """See the class."""
        first, second = slot(p, "mean"), slot(p, "square")
        m = first * self.beta1 + g * (1 - self.beta1)
        v = second * self.beta2 + (g * g) * (1 - self.beta2)
        updates[first], updates[second] = m, v
        size = _sqrt(v / cast(self.correction2, p.dtype)) + self.eps
        updates[p] = p - m / cast(self.correction1, p.dtype) * self.rate(p) / size


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UseError(f"{name} is {value!r}", where=here(), hint="use a number from 0 to below 1")
