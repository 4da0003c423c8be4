"""From LLVM IR text to object code or assembly.

The IR that graphflow emits is vectorised and in its final order, so LLVM's IR pass pipeline is left out: it
costs more time than all the rest and was measured to gain nothing. The code generator's own passes do run,
but for loop strength reduction: it took half of the code generator's time, and what it could do is done
already, as index arithmetic stands in the outermost loop where it is valid.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.target import Target

_lock = threading.Lock()
_initialized = False


def compile_object(ir_text: str, target: Target) -> bytes:
    """The relocatable object file of a module. CompilerError, with the text kept, if LLVM refuses it."""
    module, machine = _prepare(ir_text, target)
    with _options():
        return machine.emit_object(module)


def assembly(ir_text: str, target: Target) -> str:
    """The assembly of a module, for reading. CompilerError, with the text kept, if LLVM refuses it."""
    module, machine = _prepare(ir_text, target)
    with _options():
        return machine.emit_assembly(module)


def llvm_version() -> str:
    """The versions of llvmlite and LLVM, for cache keys."""
    import llvmlite
    import llvmlite.binding as llvm

    return f"llvmlite {llvmlite.__version__} llvm {'.'.join(map(str, llvm.llvm_version_info))}"


@contextmanager
def _options() -> Iterator[None]:
    """LLVM's options belong to the process, so they are set for as long as ours are needed."""
    import llvmlite.binding as llvm

    with _lock:
        llvm.set_option("graphflow", "-disable-lsr")
        try:
            yield
        finally:
            llvm.set_option("graphflow", "-disable-lsr=false")


def _prepare(ir_text: str, target: Target) -> tuple[Any, Any]:
    """The parsed and checked module and the target machine for it."""
    import llvmlite.binding as llvm

    global _initialized
    with _lock:
        if not _initialized:
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
            _initialized = True
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, reloc="pic", codemodel="default")
    header = f'target datalayout = "{machine.target_data}"\ntarget triple = "{target.triple}"\n'
    try:
        module = llvm.parse_assembly(header + ir_text)
        module.verify()
    except RuntimeError as error:
        message = f"LLVM refuses the generated code: {error}"
        raise CompilerError(message, stage="emit", dump=ir_text) from error
    return module, machine
