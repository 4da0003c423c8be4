"""Loading object code into the process, and the process-wide thread pool.

Object code arrives as bytes: the runtime loads and runs, it never compiles.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphflow.compiler.plan.errors import CompilerError, UseError
from graphflow.runtime.elf import is_elf, link

_lock = threading.RLock()
_numbers = itertools.count()
_linker: Any = None
_pool: Library | None = None


class Library:
    """Loaded object code. `addresses` are valid as long as this lives: `owner` frees the memory with it."""

    def __init__(self, owner: Any, addresses: Mapping[str, int]) -> None:
        self._owner = owner
        self._addresses = dict(addresses)

    def address(self, symbol: str) -> int:
        """The address of an exported function or variable."""
        return self._addresses[symbol]

    def function(self, symbol: str, result: Any, *arguments: Any) -> Any:
        """A ctypes function (types are ctypes types) that keeps this library loaded."""
        called: Any = ctypes.CFUNCTYPE(result, *arguments)(self._addresses[symbol])
        called.library = self
        return called


def load_object(object_bytes: bytes, name: str, symbols: Sequence[str]) -> Library:
    """Link an object file against the process's own symbols (libc, libm, pthread) and load it.

    `name` is for messages; `symbols` are the functions whose addresses are wanted. CompilerError if the
    object cannot be linked.
    """
    load = link if is_elf(object_bytes) else _load_by_llvm
    try:
        return Library(*load(object_bytes, symbols))
    except RuntimeError as error:
        message = f"the object code of {name} cannot be loaded: {error}"
        raise CompilerError(message, stage="emit") from error


def _load_by_llvm(object_bytes: bytes, symbols: Sequence[str]) -> tuple[Any, dict[str, int]]:
    """Links formats that `elf` does not know: (what keeps the code in memory, addresses)."""
    import llvmlite.binding as llvm

    builder = llvm.JITLibraryBuilder().add_object_img(object_bytes).add_current_process()
    for symbol in symbols:
        builder.export_symbol(symbol)
    with _lock:
        tracker = builder.link(_get_linker(), f"library.{next(_numbers)}")
    return tracker, {symbol: int(tracker[symbol]) for symbol in symbols}


def _get_linker() -> Any:
    """The process's one LLJIT, used as a linker only."""
    import llvmlite.binding as llvm

    global _linker
    if _linker is None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        _linker = llvm.create_lljit_compiler(use_jit_link=True)
    return _linker


def install_pool(object_bytes: bytes) -> int:
    """Load the thread pool's object code, unless the process has a pool; the address of `gf_parallel`."""
    global _pool
    with _lock:
        if _pool is None:
            pool = load_object(object_bytes, "gf_pool", ["gf_parallel", "gf_pool_reset"])
            # Parked threads stand in this code until the process ends: it must never be unloaded.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(_linker))
            os.register_at_fork(after_in_child=pool.function("gf_pool_reset", None))
            _pool = pool
        return _pool.address("gf_parallel")


def thread_pool() -> int:
    """The address of `gf_parallel`; CompilerError if `install_pool` has not been called."""
    if _pool is None:
        raise CompilerError("the thread pool is used before it is installed")
    return _pool.address("gf_parallel")


def default_threads() -> int:
    """How many threads to use: `GRAPHFLOW_THREADS`, else the cores this process may use, within its quota.

    Two hardware threads of one core count once: they share the arithmetic units that the kernels keep busy.
    UseError if the variable is no positive integer.
    """
    wish = os.environ.get("GRAPHFLOW_THREADS", "").strip()
    if wish:
        if not wish.isdigit() or int(wish) < 1:
            raise UseError(f"GRAPHFLOW_THREADS is {wish!r}", hint="set it to a positive number of threads")
        return int(wish)
    if hasattr(os, "sched_getaffinity"):
        processors = os.sched_getaffinity(0)
    else:
        processors = set(range(os.cpu_count() or 1))
    cores = {_core(processor) for processor in processors}
    quota = _cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def _core(processor: int) -> str:
    """A name that the hardware threads of one core share."""
    folder = Path(f"/sys/devices/system/cpu/cpu{processor}/topology")
    try:
        return (folder / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"),
               membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest CPU quota, in processors, of this process's control groups (version 2 or 1), or None."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / controllers
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            quota = _folder_quota(folder)
            if quota is not None:
                quotas.append(quota)
            if folder == base:
                break
    return min(quotas, default=None)


def _folder_quota(folder: Path) -> float | None:
    """The CPU quota that one control group sets."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
