"""The functions of the language, by NumPy's names where NumPy has one.

Written in the modules below, by subject: what NumPy spells with an axis or a shape, and compositions. Every
other op of the table is a function of its own name, made from its record: ``gf.exp(x)``, ``gf.maximum(x, 0)``
promote and broadcast, the rest takes tensors by position and attributes by keyword.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from graphflow import (
    activations,
    creation,
    indexing,
    pointwise,
    products,
    reductions,
    shapes,
    sorting,
    windows,
)
from graphflow.arguments import as_tensor
from graphflow.compiler.ops import OPS
from graphflow.tensor import apply, element_type, elementwise

MODULES: tuple[ModuleType, ...] = (
    shapes, creation, pointwise, activations, reductions, products, indexing, sorting, windows)
"""The functions that these define are found here, and as ``gf.NAME``. Sources of the package import them from
the modules themselves."""

_NOT_FUNCTIONS = ("leaf", "effect", "control", "grad", "fused")


@cache
def op_function(name: str) -> Callable[..., Any]:
    """The function of an op of the table that has none written here, by its name or NumPy's; AttributeError
    if there is no such op."""
    record = OPS.get(pointwise.ALIASES.get(name, name))
    if record is None or record.kind in _NOT_FUNCTIONS:
        raise AttributeError(f"graphflow has no function {name!r}")

    def function(*operands: Any, **attrs: Any) -> Any:
        if record.kind == "elementwise" and not attrs:
            return elementwise(record.name, *operands)
        given = {k: _attribute(k, v) for k, v in attrs.items()}
        return apply(record.name, [as_tensor(x) for x in operands], **given)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{record.doc}\n\nOperands: {', '.join(record.operands) or 'none'}." + (
        f" Attributes: {', '.join(record.attrs)}." if record.attrs else "")
    return function


def _attribute(name: str, value: Any) -> Any:
    if name == "dtype":
        return element_type(value)
    return tuple(_attribute("", v) for v in value) if isinstance(value, (list, tuple)) else value


@cache
def _find(name: str) -> Callable[..., Any]:
    for module in MODULES:
        found: Any = vars(module).get(name)
        if getattr(found, "__module__", None) == module.__name__:        # defined there, not imported there
            return found
    return op_function(name)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"graphflow.functions has no {name!r}")
    return _find(name)
