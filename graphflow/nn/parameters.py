"""The parameters of layers: new ones, given ones, and those that several calls share."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from graphflow.autocast import master_type
from graphflow.compiler.plan.errors import DTypeError, ShapeError
from graphflow.scope import here
from graphflow.state import Naming, Sharing, variable
from graphflow.tensor import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def layer_parameter(naming: Naming, part: str, shape: tuple[int, ...], init: Any, dtype: Any) -> Tensor:
    """The parameter ``naming.part`` of a layer, with initial values by `init`; or `init` itself if it is a
    Tensor, which must have the shape and the element type. Under `gf.autocast` parameters are float32."""
    dtype = master_type(dtype)
    if not isinstance(init, Tensor):
        return variable(naming, part, shape, init, dtype)
    if init.shape != shape:
        raise ShapeError(f"{naming.base}.{part} has another shape than the tensor given for it",
                         op=naming.base, shapes=[shape, init.shape], where=here())
    if init.dtype != dtype:
        raise DTypeError(f"{naming.base}.{part} is {dtype.full_name}, and the tensor given for it "
                         f"{init.dtype.full_name}", op=naming.base, shapes=[shape], where=here(),
                         hint=f"convert it with gf.cast(x, '{dtype.full_name}')")
    return init


def shared(build: Callable[P, R]) -> Callable[P, R]:
    """The function `build`, which makes layers, such that all calls use the parameters that the first makes.

        encoder = gf.nn.shared(lambda x: gf.nn.dense(x, 32, gf.relu, name="encoder"))
        left, right = encoder(a), encoder(b)

    Gradients of all uses add up; each call of a dropout inside drops other elements. Every call must ask for
    parameters of the same shapes. To share a single array, make it with `gf.parameter` and pass it as
    `weight_init` to the layers.
    """
    sharing = Sharing()

    @functools.wraps(build)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with sharing:
            return build(*args, **options)
    return call
