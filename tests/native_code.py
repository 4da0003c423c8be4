"""Compiling and calling small pieces of native code in tests."""
from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.emit.builder import I8, I64, MEMORY_TYPES, PTR, Builder, Module, Type, Value
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.target import Target, host_target, make_target
from graphflow.runtime.native import Library, load_object


def targets() -> dict[str, Target]:
    """The host, and on x86-64 the narrower instruction sets that it also runs, by name."""
    host = host_target()
    found = {"host": host}
    if not host.is_arm:
        present = {flag[1:] for flag in host.features.split(",") if flag.startswith("+")}
        if host.vector_bytes == 64:
            narrow = {name: not name.startswith(("avx512", "avx10")) for name in present}
            found["avx2"] = make_target(host.triple, "x86-64-v3", narrow, {})
        found["sse2"] = make_target(host.triple, "x86-64", {}, {})
    return found


def fenced(array: np.ndarray, at_end: bool = True) -> np.ndarray:
    """A copy whose memory ends where (or begins after) a page lies that traps."""
    array = np.ascontiguousarray(array)
    pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    trap = address + (pages - 1) * mmap.PAGESIZE if at_end else address
    protected = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(trap), mmap.PAGESIZE, 0)
    assert protected == 0
    start = (pages - 1) * mmap.PAGESIZE - array.nbytes if at_end else mmap.PAGESIZE
    out = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    out[...] = array
    return out


def load_module(module: Module, symbols: Sequence[str], target: Target | None = None) -> Library:
    """Compile a module and load it."""
    return load_object(compile_object(module.text(), target or host_target()), "test", symbols)


def add_map(
    module: Module, name: str, lanes: int, sources: Sequence[DType], result: DType,
    function: Callable[..., Value],
) -> None:
    """Add `name(inputs…, output, n)`, which applies a function to arrays whose length `lanes` divides."""
    b = module.function(name, [(f"a{i}", PTR) for i in range(len(sources) + 1)] + [("n", I64)])
    *inputs, output, n = b.params
    with b.loop(0, n, lanes) as loop:
        values = []
        for pointer, dtype in zip(inputs, sources):
            type = MEMORY_TYPES[dtype.name]
            value = b.load(type.vector(lanes), b.gep(pointer, loop.index, type))
            values.append(b.compare("ne", value, 0) if dtype.kind == "b" else value)
        _store(b, function(b, *values), output, loop.index, result)
    b.ret()


def _store(b: Builder, value: Value, output: Value, index: Value, dtype: DType) -> None:
    if dtype.kind == "b":
        value = b.cast(value, I8)
    type: Type = MEMORY_TYPES[dtype.name]
    b.store(value, b.gep(output, index, type))


def call_map(library: Library, name: str, inputs: Sequence[np.ndarray], result: DType) -> np.ndarray:
    """Call what `add_map` made."""
    inputs = [np.ascontiguousarray(array) for array in inputs]
    output = np.empty(len(inputs[0]), result.numpy)
    function = library.function(name, None, *[ctypes.c_void_p] * (len(inputs) + 1), ctypes.c_int64)
    function(*(array.ctypes.data for array in inputs), output.ctypes.data, len(output))
    return output


def address(array: np.ndarray) -> Any:
    """The address of an array's first element, for ctypes."""
    return ctypes.c_void_p(array.ctypes.data)
