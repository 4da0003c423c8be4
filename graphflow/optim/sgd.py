"""Stochastic gradient descent and its relatives that need no size of the gradient: momentum, Lion, Rprop."""
from __future__ import annotations

from typing import Any

from graphflow.compiler.plan.dtypes import F64
from graphflow.compiler.plan.errors import UseError
from graphflow.optim.optimizer import Hyperparameter, Optimizer, Step, like, mix, scaled
from graphflow.scope import here
from graphflow.tensor import Tensor, constant, elementwise


class SGD(Optimizer):
    """Stochastic gradient descent: p -= lr g.

    With a momentum μ: m = μ m + g and p -= lr m (Polyak, USSR Computational Mathematics 4, 1964), or with
    `nesterov` p -= lr (g + μ m), as in Sutskever, Martens, Dahl and Hinton, ICML 2013, in the form that
    PyTorch uses. With a `dampening` d: m = μ m + (1-d) g, but in the first update m = g.
    """

    def __init__(self, lr: Hyperparameter, momentum: Hyperparameter = 0.0, nesterov: bool = False,
                 dampening: Hyperparameter = 0.0, **common: Any) -> None:
        super().__init__({"lr": lr, "momentum": momentum, "dampening": dampening}, **common)
        if nesterov and _is_number(momentum, 0):
            raise UseError("Nesterov's method needs a momentum", where=here(),
                           hint="SGD(lr, 0.9, nesterov=True)")
        if nesterov and not _is_number(dampening, 0):
            raise UseError("Nesterov's method has no dampening", where=here())
        self.nesterov = nesterov

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        momentum, dampening = at.value("momentum"), at.value("dampening")
        if not _is_number(momentum, 0):
            old = at.slot(p, "momentum")
            new = g
            if not _is_number(dampening, 0):
                taken = elementwise("where", at.number == 1.0, constant(0.0, F64), dampening)
                new = scaled(g, 1 - taken)
            m = at.set(old, scaled(old, momentum) + new)
            g = g + scaled(m, momentum) if self.nesterov else m
        return scaled(g, at.value("lr"))


class Lion(Optimizer):
    """The sign of a momentum: p -= lr sign(b1 m + (1-b1) g), then m = b2 m + (1-b2) g.

    Chen and others, "Symbolic discovery of optimization algorithms", NeurIPS 2023. Its authors use a
    learning rate 3 to 10 times smaller than Adam's, and a ``weight_decay`` as many times larger.
    """

    def __init__(self, lr: Hyperparameter = 1e-4, beta1: Hyperparameter = 0.9, beta2: Hyperparameter = 0.99,
                 **common: Any) -> None:
        super().__init__({"lr": lr, "beta1": beta1, "beta2": beta2}, **common)

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        old = at.slot(p, "momentum")
        at.set(old, mix(old, at.value("beta2"), g))
        return scaled(elementwise("sign", mix(old, at.value("beta1"), g)), at.value("lr"))


class Rprop(Optimizer):
    """Steps of a size s for each number that only the signs of its gradients change: s grows by `growth`
    where the sign stays and shrinks by `shrink` where it changes, between `smallest` and `largest`; p -= s
    sign(g), but 0 where the sign has just changed. `lr` is the first s. For whole batches, not samples.

    Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
    ICNN 1993, in the variant that PyTorch uses.
    """

    def __init__(self, lr: Hyperparameter = 0.01, shrink: float = 0.5, growth: float = 1.2,
                 smallest: float = 1e-6, largest: float = 50.0, **common: Any) -> None:
        if not isinstance(lr, (int, float)):
            raise UseError("Rprop's learning rate is where its steps start: a number", where=here())
        super().__init__({"lr": lr, "shrink": shrink, "growth": growth, "smallest": smallest,
                          "largest": largest}, **common)
        if not shrink < 1 < growth or not smallest <= largest:
            raise UseError(f"Rprop shrinks by {shrink}, grows by {growth}, from {smallest} to {largest}",
                           where=here(), hint="use shrink < 1 < growth and smallest <= largest")

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        previous, size = at.slot(p, "gradient"), at.slot(p, "size", at.value("lr"))
        agreement = previous * g
        factor = elementwise("where", agreement > 0, like(at.value("growth"), p),
                             elementwise("where", agreement < 0, like(at.value("shrink"), p), 1.0))
        low, high = like(at.value("smallest"), p), like(at.value("largest"), p)
        new = at.set(size, elementwise("minimum", elementwise("maximum", size * factor, low), high))
        kept = at.set(previous, elementwise("where", agreement < 0, 0.0, g))
        return elementwise("sign", kept) * new


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number
