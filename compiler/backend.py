"""What differs between back ends: the stages of `driver.py` that depend on the machine ask one of these.

A target describes a machine; its back end turns kernels into code for it.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphflow.compiler.cuda_target import CudaTarget, compile_cubin, with_figures
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.passes.layout import lay_out
from graphflow.compiler.passes.panels import pack_once
from graphflow.compiler.passes.rows import by_rows
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.plan.schema import Function, Plan
from graphflow.compiler.target import Target


@dataclass(frozen=True)
class CpuBackend:
    """LLVM code for a CPU, with an entry that runs the whole plan."""

    target: Target
    ending = "ll"
    widen = False                            # halves in float32 are computed with more quickly than halves
    blocks = False                           # rows are cut into pieces by `schedule`

    def lay_out(self, graph: Graph) -> Graph:
        """Images that are kept channels-last."""
        return lay_out(graph, self.target.lanes(F32))

    def prepare(self, program: KernelProgram) -> KernelProgram:
        """What is done once instead of in every trip of a loop, and which loops are cut along rows."""
        return by_rows(pack_once(program, self.target), self.target)

    def work(self, kernel: Kernel) -> tuple[DimLike, DimLike, DimLike]:
        """(tasks, bytes of scratch of each worker, and of what they share) of a launch."""
        from graphflow.compiler.emit.module import kernel_scratch, kernel_shared, kernel_tasks

        tasks, own, shared = (f(kernel, self.target) for f in (kernel_tasks, kernel_scratch, kernel_shared))
        return tasks, own, shared

    def functions(self, program: KernelProgram) -> tuple[Function, ...]:
        """None: the entry knows how to call its kernels."""
        return ()

    def check(self, kernel: Kernel, stage: str) -> None:
        """CompilerError where the kernel asks the target for what it cannot do."""
        from graphflow.compiler.emit.candidates import check_tile

        check_tile(kernel, self.target, stage)

    def emit(self, program: KernelProgram, lines: Mapping[int, str] | None = None) -> str:
        """The text of the program's code; its comments have no use for source `lines`."""
        from graphflow.compiler.emit.module import emit_module

        return emit_module(program, self.target)

    def machine_code(self, plan: Plan, text: str) -> tuple[Plan, bytes]:
        """The plan, with what is known of the code, and the code."""
        from graphflow.compiler.emit.object import compile_object

        return plan, compile_object(text, self.target)

    def assembly(self, text: str) -> str:
        """The code for a reader."""
        from graphflow.compiler.emit.object import assembly

        return assembly(text, self.target)


@dataclass(frozen=True)
class CudaBackend:
    """CUDA C for an NVIDIA GPU; the runtime launches its kernels one by one, or captures them."""

    target: CudaTarget
    ending = "cu"
    widen = True                             # half the memory to move, and tensor cores take halves
    blocks = True                            # rows are cut among blocks by their kernels

    def lay_out(self, graph: Graph) -> Graph:
        """Images that are kept channels-last: those of convolutions of halves, which are copied 16 bytes, or
        eight channels, at a time."""
        return lay_out(graph, 8, halves=True)

    def prepare(self, program: KernelProgram) -> KernelProgram:
        """Nothing is packed."""
        return program

    def work(self, kernel: Kernel) -> tuple[DimLike, DimLike, DimLike]:
        """(blocks, bytes of scratch, 0) of a launch."""
        from graphflow.compiler.emit.cuda import cuda_blocks, cuda_scratch

        return cuda_blocks(kernel, self.target), cuda_scratch(kernel, self.target), 0

    def functions(self, program: KernelProgram) -> tuple[Function, ...]:
        """How each kernel is launched."""
        from graphflow.compiler.emit.cuda import cuda_functions

        return cuda_functions(program, self.target)

    def check(self, kernel: Kernel, stage: str) -> None:
        """CUDA kernels are computed in one way."""

    def emit(self, program: KernelProgram, lines: Mapping[int, str] | None = None) -> str:
        """The translation unit, with the traced nodes' source `lines` in comments."""
        from graphflow.compiler.emit.cuda import emit_cuda

        return emit_cuda(program, self.target, lines)

    def machine_code(self, plan: Plan, text: str) -> tuple[Plan, bytes]:
        """The plan, with what the assembler reports of each kernel, and the cubin."""
        code, report = compile_cubin(text, self.target)
        return replace(plan, functions=with_figures(plan.functions, report)), code

    def assembly(self, text: str) -> str:
        """CompilerError: the assembly of a GPU is nvdisasm's business."""
        raise CompilerError("graphflow prints no assembly of a GPU; see the CUDA C of the stage emit",
                            stage="emit")


Backend = CpuBackend | CudaBackend


def backend_of(target: Target | CudaTarget) -> Backend:
    """The target's back end."""
    return CudaBackend(target) if isinstance(target, CudaTarget) else CpuBackend(target)
