"""Runs kernel programs with their CUDA C, compiled for the CPU over `cuda_host.h`.

Every kernel runs twice, the threads of a block in rising and in falling order, and must give the same bits;
every buffer lies between canaries.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.cuda import cuda_blocks, cuda_function, cuda_scratch, emit_cuda
from graphflow.compiler.emit.cuda_text import C_TYPES
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.schema import Check, Copy, Plan
from graphflow.compiler.target import host_target

HEADER = Path(__file__).with_name("cuda_host.h")
COMPILER = shutil.which("g++")
BLOCKS, PIECES = 2, 4
CANARY = 256
"""Bytes on both sides of each buffer."""


def lowered(graph: Graph) -> KernelProgram:
    """The graph's kernels, tiled, with the memory that its buffers share."""
    return Compilation(graph, host_target()).result("memory")


def united(programs: Iterable[KernelProgram]) -> KernelProgram:
    """The kernels of all programs, under names of their own; equal ones are one."""
    kernels = {}
    for kernel in (k for p in programs for k in p.kernels.values()):
        name = kernel_name(kernel)
        kernels[name] = replace(kernel, name=name)
    return KernelProgram(Plan("united", "none", (), (), (), (), (), (), ()), kernels)


def kernel_name(kernel: Kernel) -> str:
    """A name made from what the kernel is."""
    return "k_" + hashlib.sha256(repr(replace(kernel, name="")).encode()).hexdigest()[:16]


def launcher(kernel: Kernel) -> str:
    """A C function that launches the kernel on the simulated device; it returns what went wrong, or null."""
    pointers = [f"({C_TYPES[a.dtype]}*)a[{i}]" for i, a in enumerate(kernel.arguments)]
    if cuda_scratch(kernel) != 0:
        pointers.append(f"(char*)a[{len(pointers)}]")
    symbols = [f"s[{i}]" for i in range(len(kernel.symbols))]
    return (
        f'extern "C" const char* launch_{kernel.name}(void** a, const long long* s, int blocks, int threads, '
        f"int shared, int falling) {{\n  return host::launch(blocks, threads, shared, falling, []("
        f"void** a, const long long* s) {{ "
        f"{kernel.name}({', '.join(pointers + symbols)}); }}, a, s);\n}}\n"
    )


class HostKernels:
    """The kernels of programs as functions of shared libraries."""

    def __init__(self, programs: Iterable[KernelProgram], folder: Path):
        kernels = list(united(programs).kernels.items())
        self.functions: dict[str, Any] = {}
        pieces = [dict(kernels[i::PIECES]) for i in range(min(PIECES, len(kernels)))]
        with ThreadPoolExecutor(2) as pool:  # two compilers at a time
            paths = list(
                pool.map(lambda i: self._compile(pieces[i], folder / f"kernels{i}.cpp"), range(len(pieces)))
            )
        for piece, path in zip(pieces, paths):
            library = ctypes.CDLL(str(path))
            for name in piece:
                self.functions[name] = getattr(library, f"launch_{name}")
                self.functions[name].restype = ctypes.c_char_p

    @staticmethod
    def _compile(kernels: Mapping[str, Kernel], path: Path) -> Path:
        program = KernelProgram(Plan("piece", "none", (), (), (), (), (), (), ()), kernels)
        launchers = "".join(launcher(k) for k in kernels.values())
        text = re.sub(r"\*(\((?:const )?gf_pack<T, N>\*\)\w+)", r"*host::aligned(\1)", emit_cuda(program))
        path.write_text(f'#include "{HEADER}"\n{text}\n{launchers}')
        command = [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            "-w",
            "-shared",
            "-fPIC",
            str(path),
            "-o",
            str(path.with_suffix(".so")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return path.with_suffix(".so")

    def launch(self, kernel: Kernel, arrays: list[np.ndarray], symbols: Mapping[str, int]) -> None:
        """Runs the kernel with its threads in both orders and checks that they agree to the bit."""
        before = [np.copy(a) for a in {id(a): a for a in arrays}.values()]
        unique = list({id(a): a for a in arrays}.values())
        self._call(kernel, arrays, symbols, falling=False)
        rising = [np.copy(a) for a in unique]
        for array, old in zip(unique, before):
            array[...] = old
        self._call(kernel, arrays, symbols, falling=True)
        for array, first in zip(unique, rising):
            assert array.tobytes() == first.tobytes(), f"{kernel.name} depends on the order of threads"

    def _call(
        self, kernel: Kernel, arrays: list[np.ndarray], symbols: Mapping[str, int], falling: bool
    ) -> None:
        blocks, function, pointers = BLOCKS, cuda_function(kernel), [*arrays]
        if cuda_scratch(kernel) != 0:  # right for one number of blocks only
            scratch = _fenced((evaluate(cuda_scratch(kernel), symbols),), np.dtype(np.uint8))
            pointers.append(scratch)
            blocks = evaluate(cuda_blocks(kernel), symbols)
        addresses = (ctypes.c_void_p * (len(pointers) + 1))(*(a.ctypes.data for a in pointers))
        sizes = (ctypes.c_longlong * max(1, len(kernel.symbols)))(*(symbols[s] for s in kernel.symbols))
        fault = self.functions[kernel_name(kernel)](
            addresses, sizes, blocks, function.threads, function.dynamic, int(falling)
        )
        assert fault is None, f"{kernel.name}: {fault.decode()}"
        assert all(map(_intact, pointers[len(arrays) :])), f"{kernel.name} wrote outside its scratch"

    def run(
        self,
        program: KernelProgram,
        feeds: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray],
        symbols: Mapping[str, int],
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs, updated states) of the program, launch by launch."""
        plan = program.plan
        memory: dict[str, np.ndarray] = {}
        for b in plan.buffers:
            given = {"feed": feeds, "state": state}.get(b.role, {}).get(b.name)
            if b.alias:
                memory[b.id] = memory[b.alias]
                continue
            memory[b.id] = _fenced(tuple(evaluate(d, symbols) for d in b.shape), b.dtype.numpy)
            if given is not None:
                memory[b.id][...] = given
            elif b.role == "constant":
                memory[b.id][...] = np.frombuffer(b.data, b.dtype.numpy).reshape(memory[b.id].shape)
        for item in plan.body:
            if isinstance(item, Copy):
                memory[item.target].reshape(-1)[...] = memory[item.source].reshape(-1)
            elif isinstance(item, Check):
                assert memory[item.buffer], plan.messages[item.code].text
            else:
                self.launch(program.kernels[item.kernel], [memory[id] for id in item.buffers], symbols)
        assert all(map(_intact, memory.values())), "a kernel wrote outside a buffer"
        outputs = {plan.buffer(id).name: memory[id] for id in plan.outputs}
        return outputs, {plan.buffer(id).name: memory[id] for id in plan.written}


def _intact(array: np.ndarray) -> bool:
    """Whether the canaries around an array are what they were."""
    raw = array.base if array.base is not None else array
    return raw.size >= 2 * CANARY and bool((raw[:CANARY] == 0xA5).all() and (raw[-CANARY:] == 0xA5).all())


def _fenced(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array full of garbage, which its base holds between canaries."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.full(CANARY + size + CANARY, 0xA5, np.uint8)
    return raw[CANARY : CANARY + size].view(dtype).reshape(shape)
