"""Fully connected layers."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphflow import init
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.errors import ShapeError
from graphflow.nn.geometry import check_count, check_float, fixed_extent
from graphflow.nn.parameters import layer_parameter
from graphflow.scope import here
from graphflow.shapes import reshape
from graphflow.state import Naming, variable
from graphflow.tensor import Tensor, apply, cast, elementwise

Activation = Callable[[Tensor], Tensor] | None


def dense(x: Tensor, units: int, activation: Activation = None, use_bias: bool = True,
          weight_init: Any = init.glorot_uniform, bias_init: Any = 0.0, name: str | None = None, *,
          mask: Any = None) -> Tensor:
    """A fully connected layer: activation(x @ W + b). x: [..., in]; result: [..., units].

    weight_init, bias_init: see `gf.init`; or Tensors of the shapes [in, units] and [units] to use as they
    are. mask: an array [in, units] that says which inputs reach which units (0 or False: not connected); it
    is kept in the Store as ``NAME.mask``.
    """
    features = fixed_extent("dense", x, -1, "features", 1)
    check_float("dense", x)
    check_count("dense", "units", units)
    naming = Naming.of(name, "dense")
    weights = layer_parameter(naming, "W", (features, units), weight_init, x.dtype)
    if mask is not None:
        connected = variable(naming, "mask", (features, units), np.asarray(mask, bool), "bool", "statistic")
        weights = elementwise("where", connected, weights, 0.0)
    rows = x if x.ndim == 2 else reshape(x, (product(x.shape[:-1]), features))
    out = apply("matmul", [rows, weights])
    if use_bias:
        out = out + cast(layer_parameter(naming, "b", (units,), bias_init, x.dtype), out.dtype)
    out = out if x.ndim == 2 else reshape(out, (*x.shape[:-1], units))
    return activation(out) if activation else out


def flatten(x: Tensor) -> Tensor:
    """[N, ...] as [N, product of the rest], in row-major order."""
    if not x.shape:
        raise ShapeError("flatten needs a batch axis", op="flatten", shapes=[x.shape], where=here())
    return reshape(x, (x.shape[0], product(x.shape[1:])))
