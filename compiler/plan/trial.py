"""Several ways to compute one kernel, to be timed against each other: what the compiler hands to whoever can
run code."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphflow.compiler.plan.dtypes import DType


@dataclass(frozen=True)
class Variant:
    """A function of the object code that computes the kernel: its name, the number of its tasks, the bytes of
    scratch that each worker needs, and of what they share, and the function that runs before it with the
    number of its tasks, if there is one."""

    name: str
    tasks: int
    scratch: int
    shared: int = 0
    before: tuple[str, int] | None = None


@dataclass(frozen=True)
class Array:
    """An argument: element type, number of elements, and mode ("r", "w" or "rw")."""

    dtype: DType
    size: int
    mode: str


@dataclass(frozen=True)
class Trial:
    """`code` is an object file with the variants' functions, which take the kernel's arguments; `symbols` are
    the values of its symbols."""

    name: str
    code: bytes
    arguments: tuple[Array, ...]
    symbols: tuple[int, ...]
    variants: tuple[Variant, ...]


Measure = Callable[[Trial], Sequence[Sequence[float]]]
"""Runs the variants in turn, for several rounds: for each round, the seconds of each variant."""
