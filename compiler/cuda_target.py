"""The GPU that CUDA code is generated for, and the compiler that makes machine code of it: nvcc, or NVRTC."""
from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from graphflow.compiler.plan.errors import CompilerError, DeviceError
from graphflow.compiler.plan.schema import Function

_MAJOR, _MINOR = 75, 76
"""The driver's numbers of the attributes that make the compute capability."""
OPTIONS = ("-fmad=false", "-std=c++17")
"""Only the text decides what is fused, so that every build gives the same bits."""


_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KB of shared memory that a block may ask for, by architecture, as the CUDA programming guide tells."""
BUSY_BLOCKS = 264
"""Blocks of threads that keep a large device busy: two for each multiprocessor of an H100 or H200."""
DECLARED_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may declare; for more, its launch asks."""


@dataclass(frozen=True)
class CudaTarget:
    """A GPU architecture, such as "sm_90". `tf32`: products of float32 are computed on tensor cores, which
    take 10 bits of each factor's fraction; else they are exact as on a CPU."""

    architecture: str
    tf32: bool = False

    @property
    def version(self) -> int:
        """The architecture's number: 90 for "sm_90"."""
        return int(self.architecture.removeprefix("sm_").rstrip("af"))

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block may have."""
        return _SHARED.get(self.version, 0) << 10 or DECLARED_SHARED

    def key(self) -> str:
        """Everything that the text for this target depends on, as one line for cache keys."""
        return f"cuda {self.architecture}{' tf32' if self.tf32 else ''}"


ANY = CudaTarget("sm_80")
"""What text is for where no GPU is named."""


@cache
def host_cuda_target() -> CudaTarget:
    """The first GPU of this machine; DeviceError if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceError("there is no NVIDIA driver (libcuda.so.1)") from None
    device, value, found = ctypes.c_int(), ctypes.c_int(), []
    code = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for attribute in (_MAJOR, _MINOR):
        code = code or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    if code:
        raise DeviceError(f"the NVIDIA driver does not give its first GPU (error {code})")
    return CudaTarget(f"sm_{found[0]}{found[1]}")


def nvcc() -> str | None:
    """The path of nvcc: on the PATH, or where CUDA_HOME or the usual folder says. None also where there is no
    gcc, without which it does nothing."""
    if not shutil.which(os.environ.get("NVCC_CCBIN", "gcc")):
        return None
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((found for f in folders if f and (
        found := shutil.which("nvcc", path=str(Path(f) / "bin")))), None)


def nvrtc() -> ctypes.CDLL | None:
    """NVIDIA's run-time compiler as a library: the system's, or that of the package nvidia-cuda-nvrtc."""
    import importlib.util

    names = [f"libnvrtc.so.{n}" for n in (13, 12)]
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found else ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc*.so.*"), key=lambda p: "builtins" not in p.name):
            if "builtins" in path.name:                       # must be there before the compiler looks for it
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            else:
                names.insert(0, str(path))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def compiler_version() -> str:
    """Which compiler makes the machine code; DeviceError if there is none."""
    path = nvcc()
    if path:
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        return (done.stdout.strip().splitlines() or ["nvcc"])[-1]
    library = nvrtc()
    if library is None:
        raise DeviceError("there is neither nvcc nor NVRTC to compile CUDA code",
                          hint="install the CUDA toolkit, or: pip install nvidia-cuda-nvrtc")
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"nvrtc {major.value}.{minor.value}"


def compile_cubin(text: str, target: CudaTarget) -> tuple[bytes, str]:
    """(machine code, what the assembler reported). CompilerError with its messages if the text is refused."""
    path = nvcc()
    if path is None:
        library = nvrtc()
        if library is None:
            compiler_version()                                # raises
        assert library is not None
        return _by_nvrtc(library, text, target)
    with tempfile.TemporaryDirectory(prefix="graphflow-") as folder:
        source, result = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(text)
        command = [path, *OPTIONS, "-cubin", f"-arch={target.architecture}", "-Xptxas", "-v",
                   str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise CompilerError(f"nvcc refuses the generated code:\n{(done.stdout + done.stderr)[:3000]}",
                                stage="emit")
        return result.read_bytes(), done.stdout + done.stderr


def _by_nvrtc(library: ctypes.CDLL, text: str, target: CudaTarget) -> tuple[bytes, str]:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    # Generic lambdas count as functions of the host otherwise, which this compiler refuses.
    options = [o.encode() for o in (*OPTIONS, "-default-device", f"-arch={target.architecture}",
                                    "--ptxas-options=-v")]
    code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def read(what: str) -> bytes:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, out)
        return out.raw

    try:
        log = read("ProgramLog").rstrip(b"\0").decode()
        if code:
            faults = re.sub(r"ptxas( info|  +\.).*\n?", "", log)
            raise CompilerError(f"NVRTC refuses the generated code:\n{faults[:3000]}", stage="emit")
        return read("CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FIGURES = (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores")


def with_figures(functions: Sequence[Function], report: str) -> tuple[Function, ...]:
    """The functions with what the assembler reported of each."""
    parts = _ENTRY.split(report)
    of_function = dict(zip(parts[1::2], parts[2::2]))
    out = []
    for f in functions:
        found = [re.search(pattern, of_function.get(f.name, "")) for pattern in _FIGURES]
        registers, shared, spilled = (int(m.group(1)) if m else 0 for m in found)
        out.append(replace(f, registers=registers, shared=shared, spilled=spilled))
    return tuple(out)
