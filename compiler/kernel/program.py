"""A program at level 2: buffers, distinct kernels, and the order in which they run on which buffers.

It is what `lower`, `tile` and `memory` pass on; `plan` drops the kernels' bodies (by then object code) and
keeps the rest.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.plan.schema import Plan


@dataclass(frozen=True)
class KernelProgram:
    """`plan`: buffers and body (lifetimes filled in by `memory`); `kernels`: by name, each launched at least
    once. A launch's buffers match its kernel's arguments in order."""
    plan: Plan
    kernels: Mapping[str, Kernel]
