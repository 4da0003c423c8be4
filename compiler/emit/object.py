"""From LLVM IR text to object code or assembly.

The IR that graphflow emits is vectorised and in its final order, so LLVM's IR pass pipeline is left out: it
costs more time than all the rest and was measured to gain nothing. The code generator's own passes all run:
without loop strength reduction it takes half the time, but then reads what no load of the IR asks for.
"""

from __future__ import annotations

import threading
from typing import Any

from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.target import Target

_lock = threading.Lock()
_initialized = False


def compile_object(ir_text: str, target: Target) -> bytes:
    """The relocatable object file of a module. CompilerError, with the text kept, if LLVM refuses it."""
    module, machine = _prepare(ir_text, target)
    return machine.emit_object(module)


def assembly(ir_text: str, target: Target) -> str:
    """The assembly of a module, for reading. CompilerError, with the text kept, if LLVM refuses it."""
    module, machine = _prepare(ir_text, target)
    return machine.emit_assembly(module)


def llvm_version() -> str:
    """The versions of llvmlite and LLVM, for cache keys."""
    import llvmlite
    import llvmlite.binding as llvm

    return f"llvmlite {llvmlite.__version__} llvm {'.'.join(map(str, llvm.llvm_version_info))}"


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
