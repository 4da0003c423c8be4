"""From LLVM IR text to object code or assembly.

The IR that graphflow emits is vectorised and in its final order, so LLVM's IR pass pipeline is left out: it
costs more time than all the rest and was measured to gain nothing. The code generator's own passes all run.
Without loop strength reduction it takes half the time, but then one of AVX2's masked loads was seen to become
a load of everything, beyond the array's end, though the text still had the mask: so it stays on.
"""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.target import Target

_DROP_PAGES = 4
"""MADV_DONTNEED."""

_given_at = [float("-inf")]
"""When memory was last given back."""
_lock = threading.Lock()
_initialized: set[bool] = set()


def compile_object(ir_text: str, target: Target) -> bytes:
    """The relocatable object file of a module. CompilerError, with the text kept, if LLVM refuses it."""
    module, machine = _prepare(ir_text, target)
    return machine.emit_object(module)


def assembly(ir_text: str, target: Target) -> str:
    """The assembly of a module, for reading. CompilerError, with the text kept, if LLVM refuses it."""
    module, machine = _prepare(ir_text, target)
    return machine.emit_assembly(module)


def llvm_version() -> str:
    """The version of llvmlite, and which build of LLVM it holds, for cache keys; LLVM is not loaded."""
    import llvmlite

    files = sorted(Path(llvmlite.__file__).parent.joinpath("binding").glob("libllvmlite.*"))
    builds = [f"{found.st_size} {found.st_mtime_ns}" for found in map(Path.stat, files)]
    return f"llvmlite {llvmlite.__version__} {' '.join(builds)}"


def give_memory_back(pause: float = 0.0) -> None:
    """Returns what only compiling needs to the system: freed memory, and the pages of LLVM's own code, which
    are read again from its file when they are next needed. Does nothing where the system is not Linux, nor
    within `pause` seconds of the last time: one small program after another would pay a sixth of its time."""
    now = time.monotonic()
    if now < _given_at[0] + pause:
        return
    _given_at[0] = now
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    process = ctypes.CDLL(None)
    for line in maps:
        span, access, *_, name = line.split()
        if access == "r-xp" and "libllvmlite" in name:     # code, which nobody writes: the file has it all
            start, end = (int(part, 16) for part in span.split("-"))
            process.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DROP_PAGES)
    if hasattr(process, "malloc_trim"):
        process.malloc_trim(0)


def _prepare(ir_text: str, target: Target) -> tuple[Any, Any]:
    """The parsed and checked module and the target machine for it."""
    import llvmlite.binding as llvm

    native = target.triple == llvm.get_process_triple()
    with _lock:
        if native not in _initialized:
            if native:                                # the others would only fill memory
                llvm.initialize_native_target()
                llvm.initialize_native_asmprinter()
            else:
                llvm.initialize_all_targets()
                llvm.initialize_all_asmprinters()
            _initialized.add(native)
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
