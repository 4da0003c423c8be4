"""The machine that CPU code is generated for: instruction set, vector width, cache sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import DeviceError

_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

#: What avx512 code needs: the base, and operations on bytes, words and 128/256-bit registers under masks.
_AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl")


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
    def has_fma(self) -> bool:
        """Whether multiply and add can be one instruction with one rounding."""
        return self.is_arm or "+fma" in self.features.split(",")

    def lanes(self, dtype: DType) -> int:
        """How many elements of a dtype one vector register holds; a bool in a register counts as float32."""
        return self.vector_bytes // (4 if dtype.kind == "b" else dtype.bytes)

    def key(self) -> str:
        """Everything that code for this target depends on, as one line for cache keys."""
        return " ".join(
            map(
                str,
                (
                    self.triple,
                    self.cpu,
                    self.features,
                    self.vector_bytes,
                    self.vector_registers,
                    self.l1,
                    self.l2,
                    self.l3,
                ),
            )
        )


def make_target(triple: str, cpu: str, features: dict[str, bool], caches: dict[int, int]) -> Target:
    """The `Target` of a processor given by LLVM's names; `caches` maps level to bytes.

    DeviceError if graphflow has no code generator for it.
    """
    arm = triple.startswith(("aarch64", "arm64"))
    if not arm and not triple.startswith("x86_64"):
        raise DeviceError(
            f"graphflow generates CPU code for x86-64 and arm64, not for {triple}",
            hint='use device="reference", which needs no code generation',
        )
    if "windows" in triple:
        raise DeviceError(
            "graphflow's CPU device runs on Linux and macOS, not on Windows",
            hint='use device="reference", or run under the Linux subsystem of Windows',
        )
    vector_bytes, registers = 16, 32 if arm else 16
    flags = [("+" if present else "-") + name for name, present in sorted(features.items())]
    if not arm and all(features.get(name) for name in _AVX512):
        vector_bytes, registers = 64, 32
        # LLVM's tuning for several processors would split 512-bit operations in two.
        flags.append("-prefer-256-bit")
    elif not arm and features.get("avx2") and features.get("fma"):
        vector_bytes = 32
    return Target(
        triple,
        cpu,
        ",".join(flags),
        vector_bytes,
        registers,
        caches.get(1, 32 << 10),
        caches.get(2, 1 << 20),
        caches.get(3, 8 << 20),
    )


@cache
def host_target() -> Target:
    """The processor this process runs on. DeviceError if graphflow has no code generator for it."""
    import llvmlite.binding as llvm

    triple = llvm.get_process_triple()
    return make_target(triple, llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features()), _cache_sizes())


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
