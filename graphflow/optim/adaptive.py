"""Optimizers that divide each gradient by its size: Adagrad, Adadelta, RMSprop."""
from __future__ import annotations

from typing import Any

from graphflow.optim.optimizer import Hyperparameter, Optimizer, Step, like, mix, scaled, sqrt
from graphflow.tensor import Tensor, elementwise


class Adagrad(Optimizer):
    """Gradients divided by the root of the sum of all squares so far: v += g², p -= lr g / (sqrt(v) + eps);
    v starts as `initial`.

    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization",
    JMLR 12, 2011.
    """

    def __init__(self, lr: Hyperparameter = 0.01, eps: Hyperparameter = 1e-10, initial: float = 0.0,
                 **common: Any) -> None:
        super().__init__({"lr": lr, "eps": eps}, **common)
        self.initial = initial

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        old = at.slot(p, "square", self.initial)
        v = at.set(old, old + g * g)
        return scaled(g, at.value("lr")) / (sqrt(v) + like(at.value("eps"), p))


class Adadelta(Optimizer):
    """Steps in the units of the parameter: v = d v + (1-d) g², s = g sqrt(u + eps) / sqrt(v + eps),
    u = d u + (1-d) s², p -= lr s.

    Zeiler, "ADADELTA: an adaptive learning rate method", arXiv 1212.5701, 2012.
    """

    def __init__(self, lr: Hyperparameter = 1.0, decay: Hyperparameter = 0.9, eps: Hyperparameter = 1e-6,
                 **common: Any) -> None:
        super().__init__({"lr": lr, "decay": decay, "eps": eps}, **common)

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        decay, eps = at.value("decay"), like(at.value("eps"), p)
        square, moved = at.slot(p, "square"), at.slot(p, "moved")
        v = at.set(square, mix(square, decay, g * g))
        step = sqrt(moved + eps) / sqrt(v + eps) * g
        at.set(moved, mix(moved, decay, step * step))
        return scaled(step, at.value("lr"))


class RMSprop(Optimizer):
    """Gradients divided by a running mean of their size: v = d v + (1-d) g², s = g / (sqrt(v) + eps),
    p -= lr s. With a momentum μ: m = μ m + s and p -= lr m.

    `centred`: a running mean a of the gradient itself is taken off, sqrt(v - a²), as in Graves, "Generating
    sequences with recurrent neural networks", arXiv 1308.0850, 2013. Tieleman and Hinton, lecture 6.5 of
    "Neural Networks for Machine Learning", 2012.
    """

    def __init__(self, lr: Hyperparameter = 0.001, decay: Hyperparameter = 0.9, eps: Hyperparameter = 1e-8,
                 momentum: Hyperparameter = 0.0, centred: bool = False, **common: Any) -> None:
        super().__init__({"lr": lr, "decay": decay, "eps": eps, "momentum": momentum}, **common)
        self.centred = centred

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        decay, momentum = at.value("decay"), at.value("momentum")
        square = at.slot(p, "square")
        v = at.set(square, mix(square, decay, g * g))
        if self.centred:
            mean = at.slot(p, "mean")
            a = at.set(mean, mix(mean, decay, g))
            v = elementwise("maximum", v - a * a, 0.0)      # never below 0 but for rounding
        step = g / (sqrt(v) + like(at.value("eps"), p))
        if isinstance(momentum, Tensor) or momentum:
            old = at.slot(p, "momentum")
            step = at.set(old, scaled(old, momentum) + step)
        return scaled(step, at.value("lr"))
