"""Layers as functions: each makes its parameters and returns its output.

Images are [N, C, H, W]; weights are (in, out) for dense layers and (out, in / groups, height, width) for
convolutions, named ``NAME.W`` and ``NAME.b``. Without a name a layer is called "dense", "dense_1", …
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from graphflow import init
from graphflow.compiler.plan.dims import Dim, product
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.functions import log_softmax, op_function, reshape, softmax
from graphflow.scope import here
from graphflow.state import Naming, random_state, variable
from graphflow.tensor import Tensor, apply, cast, elementwise

__all__ = ["avg_pool2d", "conv2d", "dense", "dropout", "flatten", "log_softmax", "max_pool2d", "relu",
           "sigmoid",
           "softmax", "tanh"]

relu, sigmoid, tanh = op_function("relu"), op_function("sigmoid"), op_function("tanh")

Activation = Callable[[Tensor], Tensor] | None
Pair = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]

_streams = itertools.count()


def dense(x: Tensor, units: int, activation: Activation = None, use_bias: bool = True,
          weight_init: Any = init.glorot_uniform, bias_init: Any = 0.0, name: str | None = None) -> Tensor:
    """A fully connected layer: activation(x @ W + b). x: [..., in]; result: [..., units]."""
    features = _fixed("dense", x, -1, "features", 1)
    _check_float("dense", x)
    _check_count("dense", "units", units)
    naming = Naming.of(name, "dense")
    weights = variable(naming, "W", (features, units), weight_init, x.dtype)
    rows = x if x.ndim == 2 else reshape(x, (product(x.shape[:-1]), features))
    out = apply("matmul", [rows, weights])
    if use_bias:
        out = out + variable(naming, "b", (units,), bias_init, x.dtype)
    out = out if x.ndim == 2 else reshape(out, (*x.shape[:-1], units))
    return activation(out) if activation else out


def conv2d(x: Tensor, channels: int, window: Pair, stride: Pair = 1, padding: Padding = "valid",
           activation: Activation = None, *, dilation: Pair = 1, groups: int = 1, use_bias: bool = True,
           weight_init: Any = init.he_normal, bias_init: Any = 0.0, name: str | None = None) -> Tensor:
    """A convolution (cross-correlation) over the last two axes. x: [N, C, H, W]; result: [N, channels, H',
    W'].

    padding: "valid" (none), "same" (zeros, so that H' is H / stride rounded up), a number for all sides, or
    (vertical, horizontal), each a number or a (before, after) pair. groups: the channels are split into so
    many independent convolutions.
    """
    _check_image("conv2d", x)
    _check_count("conv2d", "channels", channels)
    _check_count("conv2d", "groups", groups)
    size, step, spread = _pair("window", window), _pair("stride", stride), _pair("dilation", dilation)
    inputs = _fixed("conv2d", x, 1, "channels", 4)
    if inputs % groups or channels % groups:
        raise ShapeError(f"{inputs} channels in and {channels} out cannot be split into {groups} groups",
                         op="conv2d",
                         shapes=[x.shape], where=here())
    naming = Naming.of(name, "conv2d")
    weights = variable(naming, "W", (channels, inputs // groups, *size), weight_init, x.dtype)
    borders = _padding("conv2d", padding, x, size, step, spread)
    out = apply("conv", [x, weights], stride=step, padding=borders, dilation=spread, groups=groups)
    if use_bias:
        out = out + reshape(variable(naming, "b", (channels,), bias_init, x.dtype), (channels, 1, 1))
    return activation(out) if activation else out


def max_pool2d(x: Tensor, window: Pair, stride: Pair | None = None, padding: Padding = "valid") -> Tensor:
    """The largest element of each window of the last two axes; padding never wins. stride: the window's size
    without one."""
    _check_image("max_pool2d", x)
    size, step = _pair("window", window), _pair("stride", window if stride is None else stride)
    borders = _padding("max_pool2d", padding, x, size, step, (1, 1))
    return apply("max_pool", [x], window=size, stride=step, padding=borders)[0]


def avg_pool2d(x: Tensor, window: Pair, stride: Pair | None = None, padding: Padding = "valid") -> Tensor:
    """The mean of each window of the last two axes; padding counts as zeros (PyTorch's count_include_pad).
    stride: the window's size without one."""
    _check_image("avg_pool2d", x)
    size, step = _pair("window", window), _pair("stride", window if stride is None else stride)
    borders = _padding("avg_pool2d", padding, x, size, step, (1, 1))
    return apply("window_sum", [x], window=size, stride=step, padding=borders) / (size[0] * size[1])


def flatten(x: Tensor) -> Tensor:
    """[N, ...] as [N, product of the rest], in row-major order."""
    if not x.shape:
        raise ShapeError("flatten needs a batch axis", op="flatten", shapes=[x.shape], where=here())
    return reshape(x, (x.shape[0], product(x.shape[1:])))


def dropout(x: Tensor, rate: float) -> Tensor:
    """In training each element is 0 with probability `rate`, and otherwise divided by 1 - rate; else `x`.

    Which ones follows from the Store's seed and step: the same bits on every run.
    """
    _check_float("dropout", x)
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise UseError(f"the rate of dropout is {rate!r}", op="dropout", shapes=[x.shape], where=here(),
                       hint="use a probability from 0 to below 1")
    if rate == 0:
        return x
    kept = random_uniform(x.shape) >= rate
    dropped = elementwise("where", kept, x * (1 / (1 - rate)), 0.0)
    return elementwise("where", apply("training", []), dropped, x)


def random_uniform(shape: Sequence[Any]) -> Tensor:
    """Numbers in [0, 1), multiples of 2**-24 in float32, fresh in every training step and for every node."""
    seed, step = random_state()
    bits = apply("random_bits", [seed, step], shape=tuple(shape), stream=next(_streams))
    return cast(bits >> 8, "float32") * 2.0 ** -24


# --- arguments

def _fixed(op: str, x: Tensor, axis: int, what: str, rank: int) -> int:
    """The extent of an axis that parameters depend on."""
    if x.ndim < rank:
        raise ShapeError(f"{op} needs at least {rank} axes, got {x.ndim}", op=op, shapes=[x.shape],
                         where=here())
    extent = x.shape[axis]
    if isinstance(extent, Dim):
        raise ShapeError(f"{op} needs a fixed number of {what}, but axis {axis} is {extent}", op=op,
                         shapes=[x.shape], where=here(),
                         hint="parameters have fixed shapes: declare this extent as a "
                         "number")
    return extent


def _check_float(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise UseError(f"{op} takes a Tensor, not {x!r}", op=op, where=here())
    if not x.dtype.is_float:
        raise DTypeError(f"{op} takes floats, not {x.dtype.full_name}", op=op, shapes=[x.shape], where=here(),
                         hint="convert them with gf.cast(x, 'float32')")


def _check_image(op: str, x: Tensor) -> None:
    _check_float(op, x)
    if x.ndim != 4:
        raise ShapeError(f"{op} takes [N, C, H, W], not {x.ndim} axes", op=op, shapes=[x.shape], where=here(),
                         hint="add the channels with gf.reshape(x, (-1, 1, height, width))")


def _check_count(op: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UseError(f"{name} of {op} is {value!r}", op=op, where=here(), hint="use an integer >= 1")


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in pair):
        raise UseError(f"{name} is {value!r}", where=here(),
                       hint="use an integer >= 1, or (vertical, horizontal)")
    return pair


def _padding(op: str, padding: Any, x: Tensor, size: tuple[int, int], step: tuple[int, int],
             spread: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(before, after) of both axes."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        vertical, horizontal = zip(size, step, spread)
        return _same(op, x, 2, *vertical), _same(op, x, 3, *horizontal)
    entries = tuple(padding) if isinstance(padding, (tuple, list)) else (padding, padding)
    pairs = [tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in entries]
    numbers = [v for p in pairs for v in p]
    if len(pairs) != 2 or len(numbers) != 4 or not all(isinstance(v, int) and v >= 0 for v in numbers):
        raise UseError(f"padding is {padding!r}", op=op, shapes=[x.shape], where=here(),
                       hint="use 'valid', 'same', a "
                       "number, or (vertical, horizontal), each a number or (before, after)")
    return pairs[0], pairs[1]


def _same(op: str, x: Tensor, axis: int, window: int, step: int, spread: int) -> tuple[int, int]:
    """The zeros around an axis so that the result has its extent / step, rounded up; the odd one comes
    after."""
    extent, reach = x.shape[axis], (window - 1) * spread + 1
    if step == 1:
        total = reach - 1
    elif isinstance(extent, Dim):
        raise ShapeError(f"padding 'same' with a stride of {step} needs a fixed extent, but axis {axis} is "
                         f"{extent}",
                         op=op, shapes=[x.shape], where=here(), hint="give the padding as numbers")
    else:
        total = max((-(-extent // step) - 1) * step + reach - extent, 0)
    return total // 2, total - total // 2
