"""Activation functions: of single elements, but for `glu` and `maxout`, which halve or divide an axis.

``relu``, ``sigmoid``, ``tanh`` and ``softplus`` are ops of the table. What is written here is composed of
others, and becomes one kernel with its neighbours. Neither values nor gradients overflow for large |x|; at
kinks the gradients are those of PyTorch.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from graphflow.arguments import as_axis, as_float, as_tensor
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.shapes import reshape, split
from graphflow.tensor import Operand, Tensor, elementwise


def _where(condition: Tensor, x: Operand, y: Operand) -> Tensor:
    return elementwise("where", condition, x, y)


def _lower_part(x: Tensor) -> Tensor:
    """min(x, 0): what a branch for x <= 0 computes with, so that it cannot overflow where it is not taken."""
    return _where(x > 0, 0.0, x)


def _between(x: Tensor, low: float, high: float) -> Tensor:
    """x within bounds, at which its gradient is 0."""
    return _where(x <= low, low, _where(x >= high, high, x))


# --- rectifiers

def leaky_relu(x: Operand, slope: float = 0.01) -> Tensor:
    """x for x > 0, else slope · x (Maas, Hannun and Ng 2013, Rectifier nonlinearities improve neural network
    acoustic models)."""
    x = as_float(x)
    return _where(x > 0, x, x * slope)


def prelu(x: Operand, slope: Operand) -> Tensor:
    """x for x > 0, else slope · x with a learned slope (He et al. 2015, Delving deep into rectifiers).

    slope: a parameter of a shape that broadcasts to x's, e.g. [channels, 1, 1] for images [N, C, H, W].
    """
    x = as_float(x)
    return _where(x > 0, x, 0.0) + slope * _lower_part(x)


def relu6(x: Operand) -> Tensor:
    """min(max(x, 0), 6) (Krizhevsky 2010, Convolutional deep belief networks on CIFAR-10)."""
    return _between(as_float(x), 0.0, 6.0)


def threshold(x: Operand, limit: float, value: float = 0.0) -> Tensor:
    """x for x > limit, else value."""
    x = as_float(x)
    return _where(x > limit, x, value)


def elu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x for x > 0, else alpha · (exp(x) - 1) (Clevert, Unterthiner and Hochreiter 2015, Fast and accurate
    deep network learning by exponential linear units)."""
    x = as_float(x)
    return _where(x > 0, x, elementwise("expm1", _lower_part(x)) * alpha)


def selu(x: Operand) -> Tensor:
    """1.0507 · elu(x, 1.6733), which keeps mean 0 and variance 1 through layers (Klambauer et al. 2017,
    Self-normalizing neural networks)."""
    return elu(x, 1.6732632423543772848170429916717) * 1.0507009873554804934193349852946


def celu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x for x > 0, else alpha · (exp(x / alpha) - 1), with a continuous derivative for every alpha (Barron
    2017, Continuously differentiable exponential linear units)."""
    x = as_float(x)
    return _where(x > 0, x, elementwise("expm1", _lower_part(x) * (1 / alpha)) * alpha)


# --- smooth

def gelu(x: Operand, approximate: str = "none") -> Tensor:
    """x · Φ(x), Φ the normal distribution function: x · (1 + erf(x / √2)) / 2; with approximate="tanh"
    x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2 (Hendrycks and Gimpel 2016, Gaussian error linear
    units)."""
    x = as_float(x)
    if approximate == "none":
        return x * (elementwise("erf", x * math.sqrt(0.5)) * 0.5 + 0.5)
    if approximate != "tanh":
        raise UseError(f"gelu has no approximation {approximate!r}", op="gelu", shapes=[x.shape],
                       where=here(), hint="approximate is 'none' or 'tanh'")
    inner = x * (x * x * 0.044715 + 1.0) * (2 * math.sqrt(2 / math.pi))
    return x * elementwise("sigmoid", inner)                      # sigmoid(2u) = (1 + tanh(u)) / 2


def silu(x: Operand) -> Tensor:
    """x · sigmoid(x), also called swish (Elfwing, Uchibe and Doya 2017, Sigmoid-weighted linear units;
    Ramachandran, Zoph and Le 2017, Searching for activation functions)."""
    x = as_float(x)
    return x * elementwise("sigmoid", x)


swish = silu


def mish(x: Operand) -> Tensor:
    """x · tanh(softplus(x)) (Misra 2019, Mish: a self regularized non-monotonic activation function),
    computed as x · n / (n + 2) with n = e^x (e^x + 2): above 20 the quotient is 1."""
    x = as_float(x)
    e = elementwise("exp", _where(x > 20, 20.0, x))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


def softsign(x: Operand) -> Tensor:
    """x / (1 + |x|) (Turian, Bergstra and Bengio 2009, Quadratic features and deep architectures for
    chunking)."""
    x = as_float(x)
    return x / (abs(x) + 1.0)


def log_sigmoid(x: Operand) -> Tensor:
    """log(sigmoid(x)) = -softplus(-x)."""
    return -elementwise("softplus", -as_float(x))


# --- piecewise linear forms of smooth ones

def hard_tanh(x: Operand, low: float = -1.0, high: float = 1.0) -> Tensor:
    """x within [low, high] (Collobert 2004, Large scale machine learning)."""
    return _between(as_float(x), low, high)


def hard_sigmoid(x: Operand) -> Tensor:
    """x / 6 + 1/2 within [0, 1] (Courbariaux, Bengio and David 2015, BinaryConnect; with PyTorch's slope)."""
    return _between(as_float(x) * (1 / 6) + 0.5, 0.0, 1.0)


def hard_swish(x: Operand) -> Tensor:
    """x · hard_sigmoid(x) (Howard et al. 2019, Searching for MobileNetV3)."""
    x = as_float(x)
    return x * hard_sigmoid(x)


def hard_shrink(x: Operand, limit: float = 0.5) -> Tensor:
    """x where |x| > limit, else 0."""
    x = as_float(x)
    return _where(abs(x) > limit, x, 0.0)


def soft_shrink(x: Operand, limit: float = 0.5) -> Tensor:
    """x moved by `limit` towards 0, up to 0 (Donoho 1995, De-noising by soft-thresholding)."""
    x = as_float(x)
    return _where(x > limit, x - limit, _where(x < -limit, x + limit, x * 0.0))


def tanh_shrink(x: Operand) -> Tensor:
    """x - tanh(x)."""
    x = as_float(x)
    return x - elementwise("tanh", x)


# --- of several elements

def glu(x: Operand, axis: int = -1, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """a · sigmoid(b), a and b the halves of x along the axis (Dauphin et al. 2016, Language modeling with
    gated convolutional networks). With another activation than sigmoid: `silu` gives SwiGLU, `gelu` GEGLU,
    `relu` ReGLU (Shazeer 2020, GLU variants improve transformer)."""
    x = as_float(x)
    a, b = split(x, 2, as_axis(x, axis, "glu"))
    return a * (activation(b) if activation is not None else elementwise("sigmoid", b))


def maxout(x: Operand, pieces: int, axis: int = -1) -> Tensor:
    """The largest of each `pieces` neighbours along the axis, whose extent they divide: [..., C] becomes
    [..., C / pieces] (Goodfellow et al. 2013, Maxout networks)."""
    x = as_tensor(x)
    at = as_axis(x, axis, "maxout")
    if pieces < 1 or x.shape[at] % pieces != 0:
        raise ShapeError(f"maxout: axis {at} of extent {x.shape[at]} does not divide into groups of {pieces}",
                         op="maxout", shapes=[x.shape], where=here())
    groups = reshape(x, (*x.shape[:at], x.shape[at] // pieces, pieces, *x.shape[at + 1:]))
    return groups.max(at + 1)
