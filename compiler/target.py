"""The machine that CPU code is generated for: instruction set, vector width, cache sizes."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphflow.compiler.cache import cache_key, program_cache
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import DeviceError

_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_TELLING = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags",             # x86-64
            "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"}
"""The lines of /proc/cpuinfo that tell processors apart."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

#: What avx512 code needs: the base, and operations on bytes, words and 128/256-bit registers under masks.
_AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl")

_WIDE = ("avx512", "avx10", "evex512", "amx")
"""How the names of features begin that avx2 code must do without."""
_VECTOR_BYTES = {"sse2": 16, "avx2": 32, "avx512": 64}


@dataclass(frozen=True)
class Target:
    """A CPU as the code generator sees it.

    `triple`, `cpu` and `features` are LLVM's; `vector_bytes` (16, 32 or 64) and `vector_registers` describe
    the widest vectors in use; `l1` and `l2` are the bytes of one core's data caches, `l3` those of the last
    level.
    """

    triple: str
    cpu: str
    features: str
    vector_bytes: int
    vector_registers: int
    l1: int
    l2: int
    l3: int

    @property
    def is_arm(self) -> bool:
        """Whether this is arm64 (else x86-64)."""
        return self.triple.startswith(("aarch64", "arm64"))

    @property
    def is_macos(self) -> bool:
        """Whether the operating system is macOS (else Linux)."""
        return any(name in self.triple for name in ("darwin", "macos", "apple"))

    @property
    def has_mask_registers(self) -> bool:
        """Whether masks of vectors are no vectors themselves, and loads and stores under them are fast."""
        return self.vector_bytes == 64

    @property
    def has_fma(self) -> bool:
        """Whether multiply and add can be one instruction with one rounding."""
        return self.is_arm or "+fma" in self.features.split(",")

    def lanes(self, dtype: DType) -> int:
        """How many elements of a dtype one vector register holds; a bool in a register counts as float32."""
        return self.vector_bytes // (4 if dtype.kind == "b" else dtype.bytes)

    def key(self) -> str:
        """Everything that code for this target depends on, as one line for cache keys."""
        return " ".join(map(str, (self.triple, self.cpu, self.features, self.vector_bytes,
                                  self.vector_registers, self.l1, self.l2, self.l3)))


def make_target(triple: str, cpu: str, features: dict[str, bool], caches: dict[int, int]) -> Target:
    """The `Target` of a processor given by LLVM's names; `caches` maps level to bytes.

    DeviceError if graphflow has no code generator for it.
    """
    arm = triple.startswith(("aarch64", "arm64"))
    if not arm and not triple.startswith("x86_64"):
        raise DeviceError(f"graphflow generates CPU code for x86-64 and arm64, not for {triple}",
                          hint='use device="reference", which needs no code generation')
    if "windows" in triple:
        raise DeviceError("graphflow's CPU device runs on Linux and macOS, not on Windows",
                          hint='use device="reference", or run under the Linux subsystem of Windows')
    vector_bytes, registers = 16, 32 if arm else 16
    flags = [("+" if present else "-") + name for name, present in sorted(features.items())]
    if not arm and all(features.get(name) for name in _AVX512):
        vector_bytes, registers = 64, 32
        # LLVM's tuning for several processors would split 512-bit operations in two.
        flags.append("-prefer-256-bit")
    elif not arm and features.get("avx2") and features.get("fma"):
        vector_bytes = 32
    return Target(triple, cpu, ",".join(flags), vector_bytes, registers, caches.get(1, 32 << 10),
                  caches.get(2, 1 << 20), caches.get(3, 8 << 20))


def host_target() -> Target:
    """The processor this process runs on, or as much of it as the instruction set `GRAPHFLOW_TARGET` has:
    sse2, avx2 or avx512 on x86-64, neon on arm64. DeviceError if graphflow has no code generator for it, or
    it cannot run that instruction set."""
    return _host_target(os.environ.get("GRAPHFLOW_TARGET", "").strip().lower())


@cache
def _host_target(name: str) -> Target:
    """The same by the name of the instruction set; "": the best.

    What LLVM says of a processor is kept in the cache of programs: whoever finds his programs there as well
    needs no LLVM.
    """
    from graphflow.compiler.emit.object import llvm_version

    processor, kept = _processor(), program_cache()
    key = cache_key("processor", processor, llvm_version())
    found = kept.get(key) if processor else None
    if found is None:
        found = {"names": json.dumps(_ask_llvm()).encode()}
        if processor:
            kept.put(key, found)
    triple, cpu, features = json.loads(found["names"])
    targets = _runnable(triple, cpu, features, _cache_sizes())
    if name and name not in targets:
        raise DeviceError(f"this machine cannot run code for GRAPHFLOW_TARGET={name}",
                          hint=f"it runs {', '.join(targets)}; without the variable, the last of these")
    return targets[name or list(targets)[-1]]


def _runnable(triple: str, cpu: str, features: dict[str, bool], caches: dict[int, int]) -> dict[str, Target]:
    """The instruction sets that the processor runs, by name, the best last."""
    host = make_target(triple, cpu, features, caches)
    if host.is_arm:
        return {"neon": host}
    narrow = {flag: present and not flag.startswith(_WIDE) for flag, present in features.items()}
    sets = {"sse2": make_target(triple, "x86-64", {}, caches),
            "avx2": make_target(triple, cpu, narrow, caches), "avx512": host}
    return {name: target for name, target in sets.items() if target.vector_bytes == _VECTOR_BYTES[name]}


def _ask_llvm() -> tuple[str, str, dict[str, bool]]:
    """(triple, name, features) of the processor."""
    import llvmlite.binding as llvm

    return llvm.get_process_triple(), llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features())


def _processor() -> str:
    """What Linux says about the processor that decides its name and features; "" where it says nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return ""
    lines = dict(line.partition(":")[::2] for line in first.splitlines())
    told = {key.strip(): value.strip() for key, value in lines.items() if key.strip() in _TELLING}
    complete = "flags" in told and "model" in told or "Features" in told and "CPU part" in told
    return json.dumps([platform.machine(), told]) if complete else ""


def _cache_sizes() -> dict[int, int]:
    """Bytes of the data or unified cache of each level, as far as the system tells."""
    sizes: dict[int, int] = {}
    if not sys.platform.startswith("linux"):
        return sizes
    for entry in sorted(_CACHE_FOLDER.glob("index*")):
        try:
            kind = (entry / "type").read_text().strip()
            level = int((entry / "level").read_text())
            text = (entry / "size").read_text().strip()
            size = int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)
        except (OSError, ValueError, IndexError):
            continue
        if kind != "Instruction" and size > 0:
            sizes[level] = size
    return sizes
