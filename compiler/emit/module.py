"""A program of kernels as one LLVM module.

    text = emit_module(program, target)

The module defines each kernel's function and the entry (see `loops`, `contraction` and `entry` for their
conventions).
"""

from __future__ import annotations

from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.candidates import special
from graphflow.compiler.emit.contraction import emit_contraction
from graphflow.compiler.emit.entry import describe, emit_entry
from graphflow.compiler.emit.loops import cut, emit_loop_kernel
from graphflow.compiler.emit.routines import emit_routine, routine_scratch, routine_tasks
from graphflow.compiler.emit.tiling import contraction_scratch, contraction_tasks
from graphflow.compiler.kernel.form import ContractionKernel, Kernel, LoopKernel, RoutineKernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.schema import launches
from graphflow.compiler.target import Target


def emit_module(program: KernelProgram, target: Target) -> str:
    """The program as LLVM IR text: its kernels and the entry, named like the plan."""
    module = Module()
    origins: dict[str, set[int]] = {}
    for item in launches(program.plan.body):
        origins.setdefault(item.kernel, set()).update(item.origins)
    for name, kernel in program.kernels.items():
        emit_kernel(module, kernel, target, describe(tuple(sorted(origins.get(name, ())))))
    emit_entry(module, program)
    return module.text()


def emit_kernel(module: Module, kernel: Kernel, target: Target, note: str = "") -> None:
    """Adds a kernel's function to the module."""
    if isinstance(kernel, LoopKernel):
        emit_loop_kernel(module, kernel, target)
    elif isinstance(kernel, RoutineKernel):
        emit_routine(module, kernel, target)
    elif (found := special(kernel, target)) is not None:
        algorithm, how = found
        algorithm.emit(module, kernel, target, how)
    else:
        emit_contraction(module, kernel, target)


def kernel_tasks(kernel: Kernel, target: Target) -> DimLike:
    """How many tasks the kernel's work is cut into."""
    if isinstance(kernel, LoopKernel):
        return cut(kernel).count
    if isinstance(kernel, RoutineKernel):
        return routine_tasks(kernel, target)
    found = special(kernel, target)
    if found is not None:
        algorithm, how = found
        return algorithm.tasks(how)
    return contraction_tasks(kernel, target)


def kernel_scratch(kernel: Kernel, target: Target) -> DimLike:
    """Bytes of scratch that each worker needs."""
    if isinstance(kernel, LoopKernel):
        return 0
    if isinstance(kernel, RoutineKernel):
        return routine_scratch(kernel, target)
    found = special(kernel, target)
    if found is not None:
        algorithm, how = found
        return algorithm.scratch(how)
    return contraction_scratch(kernel, target)


def kernel_shared(kernel: Kernel, target: Target) -> DimLike:
    """Bytes of scratch that all workers share, in front of their own."""
    found = special(kernel, target) if isinstance(kernel, ContractionKernel) else None
    return found[0].shared(found[1]) if found is not None else 0
