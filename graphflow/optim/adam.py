"""Adam and its variants: a momentum divided by a running mean of the gradient's size.

In all of them t = 1, 2, … is the number of the update. The corrections 1 - b^t are computed in float64, one
number for all parameters; with betas that a schedule changes, b is that of the update.
"""
from __future__ import annotations

from typing import Any

from graphflow.optim.optimizer import Hyperparameter, Optimizer, Step, like, mix, scaled, sqrt
from graphflow.tensor import Tensor, elementwise


class Adam(Optimizer):
    """Momentum and RMSprop with corrected biases: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g²,
    p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015. `amsgrad` takes the largest v so
    far: Reddi, Kale and Kumar, "On the convergence of Adam and beyond", ICLR 2018.
    """

    def __init__(self, lr: Hyperparameter = 0.001, beta1: Hyperparameter = 0.9, beta2: Hyperparameter = 0.999,
                 eps: Hyperparameter = 1e-8, amsgrad: bool = False, **common: Any) -> None:
        super().__init__({"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}, **common)
        self.amsgrad = amsgrad

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        beta1, beta2 = at.value("beta1"), at.value("beta2")
        m, v = _moments(p, g, at)
        if self.amsgrad:
            largest = at.slot(p, "largest_square")
            v = at.set(largest, elementwise("maximum", largest, v))
        size = sqrt(scaled(v, 1 / _correction(beta2, at))) + like(at.value("eps"), p)
        return scaled(m, at.value("lr") / _correction(beta1, at)) / size


class AdamW(Adam):
    """`Adam` with decoupled weight decay: beside Adam's step, p -= lr weight_decay p.

    Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    def __init__(self, lr: Hyperparameter = 0.001, beta1: Hyperparameter = 0.9, beta2: Hyperparameter = 0.999,
                 eps: Hyperparameter = 1e-8, weight_decay: Hyperparameter = 0.01, amsgrad: bool = False,
                 **common: Any) -> None:
        super().__init__(lr, beta1, beta2, eps, amsgrad, weight_decay=weight_decay, **common)


class Adamax(Optimizer):
    """Adam with the largest gradient in the place of the mean square: m = b1 m + (1-b1) g,
    u = max(b2 u, |g| + eps), p -= lr m / (1 - b1^t) / u.

    Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, section 7.1.
    """

    def __init__(self, lr: Hyperparameter = 0.002, beta1: Hyperparameter = 0.9, beta2: Hyperparameter = 0.999,
                 eps: Hyperparameter = 1e-8, **common: Any) -> None:
        super().__init__({"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}, **common)

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        beta1, beta2 = at.value("beta1"), at.value("beta2")
        mean, largest = at.slot(p, "mean"), at.slot(p, "largest")
        m = at.set(mean, mix(mean, beta1, g))
        grown = elementwise("abs", g) + like(at.value("eps"), p)
        u = at.set(largest, elementwise("maximum", scaled(largest, beta2), grown))
        return scaled(m, at.value("lr") / _correction(beta1, at)) / u


class NAdam(Optimizer):
    """Adam with Nesterov's momentum: μ_t = b1 (1 - 0.96^(t ψ) / 2) and the products M_t = μ_1 … μ_t,
    p -= lr ((1-μ_t) / (1-M_t) g + μ_{t+1} / (1-M_{t+1}) m) / (sqrt(v / (1 - b2^t)) + eps), m and v as Adam's.
    ψ is `momentum_decay`.

    Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016.
    """

    def __init__(self, lr: Hyperparameter = 0.002, beta1: Hyperparameter = 0.9, beta2: Hyperparameter = 0.999,
                 eps: Hyperparameter = 1e-8, momentum_decay: Hyperparameter = 4e-3, **common: Any) -> None:
        super().__init__({"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps,
                          "momentum_decay": momentum_decay}, **common)

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        beta1, beta2, lr = at.value("beta1"), at.value("beta2"), at.value("lr")
        m, v = _moments(p, g, at)

        def momentum(number: Tensor) -> Tensor:
            return beta1 * (1 - 0.5 * elementwise("pow", 0.96, number * at.value("momentum_decay")))

        now, following = momentum(at.number), momentum(at.number + 1.0)
        before = at.shared("momentum_product", 1.0)
        product = at.set(before, before * now)
        size = sqrt(scaled(v, 1 / _correction(beta2, at))) + like(at.value("eps"), p)
        return (scaled(g, lr * (1 - now) / (1 - product))
                + scaled(m, lr * following / (1 - product * following))) / size


class RAdam(Optimizer):
    """Adam whose steps are rectified for the few samples of its first updates: with ρ∞ = 2 / (1-b2) - 1 and
    ρ = ρ∞ - 2 t b2^t / (1 - b2^t), p -= lr m / (1 - b1^t) r, where r is 1 as long as ρ <= 5, then
    sqrt((ρ-4) (ρ-2) ρ∞ / ((ρ∞-4) (ρ∞-2) ρ)) sqrt(1 - b2^t) / (sqrt(v) + eps); m and v as Adam's.

    Liu and others, "On the variance of the adaptive learning rate and beyond", ICLR 2020.
    """

    def __init__(self, lr: Hyperparameter = 0.001, beta1: Hyperparameter = 0.9, beta2: Hyperparameter = 0.999,
                 eps: Hyperparameter = 1e-8, **common: Any) -> None:
        super().__init__({"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}, **common)

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """See the class."""
        beta1, beta2, t = at.value("beta1"), at.value("beta2"), at.number
        m, v = _moments(p, g, at)
        correction = _correction(beta2, at)
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * t * (1 - correction) / correction
        known = length > 5.0
        safe = elementwise("where", known, length, 6.0)
        rectified = sqrt((safe - 4) * (safe - 2) * limit / ((limit - 4) * (limit - 2) * safe) * correction)
        size = sqrt(v) + like(at.value("eps"), p)
        step = scaled(m, at.value("lr") / _correction(beta1, at))
        return elementwise("where", known, scaled(step, rectified) / size, step)


def _moments(p: Tensor, g: Tensor, at: Step) -> tuple[Tensor, Tensor]:
    """The running means of the gradient and of its square after this update."""
    mean, square = at.slot(p, "mean"), at.slot(p, "square")
    m = at.set(mean, mix(mean, at.value("beta1"), g))
    return m, at.set(square, mix(square, at.value("beta2"), g * g))


def _correction(beta: Any, at: Step) -> Tensor:
    """1 - beta^t, a scalar of float64."""
    return 1 - elementwise("pow", beta, at.number)
