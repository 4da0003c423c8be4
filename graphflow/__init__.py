"""graphflow: neural networks as static graphs, compiled to one native program per training step.

    import graphflow as gf
    N = gf.dim("N")
    x, y = gf.input("x", (N, 784)), gf.input("y", (N,), "int64")
    logits = gf.nn.dense(gf.nn.dense(x, 128, gf.relu), 10)
    loss = gf.loss.softmax_cross_entropy(logits, y)
    step = gf.function([x, y], loss, gf.optim.SGD(0.1).minimize(loss))

Importing it loads neither the code generator nor a device library: these come with the first program.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphflow import debug, functions, init, loss, nn, optim, random
from graphflow.autocast import autocast
from graphflow.compiler.plan.errors import (
    CheckpointError,
    CompilerError,
    DataError,
    DeviceError,
    DTypeError,
    FeedError,
    GraphflowError,
    ShapeError,
    TrainingError,
    UseError,
    UserError,
)
from graphflow.control import checkpoint, cond, scan, step_index, while_loop
from graphflow.custom import custom_gradient, custom_op
from graphflow.debug import check, print  # noqa: A004
from graphflow.function import Program, function
from graphflow.gradient import check_gradient, grad, hessian, hvp, jacobian, jvp, value_and_grad, vjp
from graphflow.optim.parameters import freeze, unfreeze
from graphflow.products import matmul
from graphflow.runtime.store import Store
from graphflow.scope import scope
from graphflow.stacking import device_array
from graphflow.state import input, parameter  # noqa: A004
from graphflow.substitute import substitute
from graphflow.tensor import Tensor, cast, constant, dim

if TYPE_CHECKING:
    from graphflow import data, fft, linalg, metrics
    from graphflow.callbacks import Callback, EarlyStopping
    from graphflow.checkpoints import Checkpoints
    from graphflow.history import History
    from graphflow.model import Model

__version__ = "0.1.0"

__all__ = ["Callback", "CheckpointError", "Checkpoints", "CompilerError", "DTypeError", "DataError",
           "DeviceError", "EarlyStopping", "FeedError", "GraphflowError", "History", "Model", "Program",
           "ShapeError", "Store", "Tensor", "TrainingError", "UseError", "UserError", "autocast", "cast",
           "check", "check_gradient", "checkpoint", "cond", "constant", "custom_gradient", "custom_op",
           "data", "debug", "device_array", "dim", "fft", "freeze", "function", "functions", "grad",
           "hessian", "hvp", "init", "input", "jacobian", "jvp", "linalg", "loss", "matmul", "metrics",
           "nn", "optim", "parameter", "print", "random", "scan", "scope", "step_index", "substitute",
           "unfreeze", "value_and_grad", "vjp", "while_loop"]


_ON_DEMAND = {"Callback": "callbacks", "Checkpoints": "checkpoints", "EarlyStopping": "callbacks",
              "History": "history", "Model": "model", "data": "", "fft": "", "linalg": "", "metrics": ""}
"""What is imported when it is first named, so that `import graphflow` is quick: name -> its module, "" for a
module itself."""


def __getattr__(name: str) -> Any:
    """Every function of the language is also found here: ``gf.exp`` is ``gf.functions.exp``."""
    if name in _ON_DEMAND:
        module = import_module(f"graphflow.{_ON_DEMAND[name] or name}")
        globals()[name] = module if not _ON_DEMAND[name] else getattr(module, name)
        return globals()[name]
    if name.startswith("_"):
        raise AttributeError(f"graphflow has no {name!r}")
    return getattr(functions, name)
