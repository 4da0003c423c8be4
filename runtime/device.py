"""The table of devices: what there is to run on, and why not where it is not usable."""
from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graphflow.compiler.plan.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """A device by name. `unusable`: why programs cannot run on it here, "" if they can; `about` gives one
    line on it (finding out may load the code generator)."""
    name: str
    about: Callable[[], str]
    unusable: str = ""

    def describe(self) -> str:
        """The line that `graphflow devices` prints."""
        return f"{self.name:<11}{self.about()}" + (f" (not usable: {self.unusable})" if self.unusable else "")


def devices() -> list[Device]:
    """Every device, in the order of the table."""
    return [probe() for probe in _PROBES.values()]


def device(name: str) -> Device:
    """The device of that name, ready to run on; DeviceError if there is none or it is not usable here."""
    if name not in _PROBES:
        raise DeviceError(f"there is no device {name!r}", hint=f"use one of {', '.join(_PROBES)}")
    found = _PROBES[name]()
    if found.unusable:
        raise DeviceError(f"the device {name} is not usable here: {found.unusable}", hint="use 'cpu'")
    return found


def _cpu() -> Device:
    return Device("cpu", _about_cpu)


def _about_cpu() -> str:
    from graphflow.runtime.native import default_threads
    threads = default_threads()
    plural = "s" if threads > 1 else ""
    parts = [f"{_cpu_name()}, {threads} thread{plural}, {_vector_bits()}-bit vectors"]
    caches = _caches()
    if caches:
        parts.append("caches " + ", ".join(f"L{level} {size}" for level, size in caches))
    return "; ".join(parts)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _vector_bits() -> int:
    """The width of the vector registers, in bits."""
    import llvmlite.binding as llvm
    features = llvm.get_host_cpu_features()
    for feature, bits in (("avx512f", 512), ("avx", 256)):
        if features.get(feature):
            return bits
    return 128


def _caches() -> list[tuple[int, str]]:
    """(level, size as the system writes it) of the first processor's data caches; nothing where it is not
    told."""
    out = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (folder / "type").read_text().strip() != "Instruction":
                out.append((int((folder / "level").read_text()), (folder / "size").read_text().strip()))
        except (OSError, ValueError):
            continue
    return out


def _reference() -> Device:
    return Device("reference", lambda: "interprets the graph op by op with NumPy: slow, simple, the oracle")


def _null() -> Device:
    return Device("null", lambda: "plans and counts, computes nothing")


def _cuda() -> Device:
    count, reason = _cuda_devices()
    if not reason and importlib.util.find_spec("pycuda") is None:
        reason = "PyCUDA is not installed"
    if not reason and not _cuda_compiler():
        reason = "there is neither nvcc nor NVRTC to compile its code"
    return Device("cuda", lambda: "; ".join([f"NVIDIA GPUs: {count}", *_gpu_names(count)]), reason)


def _cuda_tf32() -> Device:
    return Device("cuda-tf32", lambda: "cuda, with float32 products on tensor cores, of factors rounded to "
                                       "11 bits", _cuda().unusable)


def _cuda_compiler() -> bool:
    """Whether there seems to be one: compiling looks closer."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return bool(shutil.which("nvcc") or any(f and (Path(f) / "bin" / "nvcc").exists() for f in folders)
                or importlib.util.find_spec("nvidia") or ctypes.util.find_library("nvrtc"))


_OLDEST, _NO_DEVICE = 12000, 100
"""The oldest driver that is good, as cuDriverGetVersion tells it; what cuInit says where there is no GPU."""


def _cuda_devices() -> tuple[int, str]:
    """(how many, why none can be used or "") from the driver itself: loads no other library, makes no
    context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, "there is no NVIDIA driver (libcuda.so.1)"
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value < _OLDEST:
        return 0, (f"the NVIDIA driver is for CUDA {version.value // 1000}.{version.value % 1000 // 10}, "
                   f"older than {_OLDEST // 1000}.0")
    code = driver.cuInit(0)
    if code and code != _NO_DEVICE:
        return 0, f"the NVIDIA driver does not start (cuInit returned {code})"
    code = code or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return 0, "the NVIDIA driver finds no GPU"
    return count.value, ""


def _gpu_names(count: int) -> list[str]:
    names = []
    for number in range(count):
        name = ctypes.create_string_buffer(100)
        if ctypes.CDLL("libcuda.so.1").cuDeviceGetName(name, 100, number) == 0:
            names.append(name.value.decode(errors="replace"))
    return names


_PROBES: dict[str, Callable[[], Device]] = {
    "cpu": _cpu, "cuda": _cuda, "cuda-tf32": _cuda_tf32, "reference": _reference, "null": _null}
