"""The GPU of this process: its primary context, memory, streams and captured graphs, through PyCUDA.

PyCUDA has no CUDA graphs, so those few calls go to the driver by ctypes; the handles are the same integers.

A context is pushed only inside `Gpu.current()`, which pops it whatever happens: an exception with a context
still pushed would end the process. Everything on the device is freed before the context is given back.
"""
from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graphflow.compiler.plan.errors import DeviceError

_COOPERATIVE_LAUNCH, _MULTIPROCESSORS, _MOST_SHARED = 95, 16, 97
"""The driver's numbers of attributes."""
_RELAXED, _OUT_OF_MEMORY = 2, 2
"""Capture mode: calls that have nothing to do with this capture are none of its business, such as those of
the garbage collector. The driver's number of an error."""


class Gpu:
    """Device 0 with a stream for kernels and one for copies of feeds. `get()` gives the only one."""

    _only: Gpu | None = None

    def __init__(self) -> None:
        import pycuda.driver as driver

        self.driver = driver
        driver.init()
        self._process = os.getpid()
        self.device = driver.Device(0)
        self.context = self.device.retain_primary_context()
        self._libcuda = ctypes.CDLL("libcuda.so.1")
        self._owned: weakref.WeakSet[Any] = weakref.WeakSet()
        self._capturing, self._unwanted = False, list[int]()
        with self.current():
            self.stream, self.copies = driver.Stream(), driver.Stream()
        atexit.register(self.close)

    @classmethod
    def get(cls) -> Gpu:
        """The process's GPU, its context made when first asked for; DeviceError where that fails."""
        if cls._only is None:
            try:
                cls._only = cls()
            except ImportError as error:
                raise DeviceError(f"PyCUDA does not load: {error}", hint="see docs/cuda.md") from None
            except Exception as error:
                raise DeviceError(f"the GPU does not start: {error}") from None
        return cls._only

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is current inside; what the driver refuses becomes a DeviceError."""
        if os.getpid() != self._process:
            raise DeviceError("this process was forked from one that uses the GPU, which a child cannot",
                              hint="fork before the first program runs on the GPU, or start a new process")
        self.context.push()
        try:
            yield
        except self.driver.MemoryError as error:
            raise DeviceError(f"the GPU has not enough memory: {error}",
                              hint="use a smaller batch, or a smaller net") from None
        except self.driver.Error as error:
            raise DeviceError(f"the GPU failed: {error}",
                              hint="what was on the GPU may be lost: start a new process from the last "
                                   "checkpoint") from None
        finally:
            self.context.pop()

    def allocate(self, size: int, what: str) -> Any:
        """Device memory; it is freed with the object. Call within `current()`."""
        with self._telling(size, what):
            block = self.driver.mem_alloc(max(size, 1))
        self._owned.add(block)
        return block

    def allocate_for_now(self, size: int, what: str, stream: Any) -> StreamMemory:
        """Device memory from here on in the stream, until, with the object, what is then on the stream of
        kernels is done. Neither waits for the GPU. Call within `current()`."""
        address = ctypes.c_ulonglong()
        with self._telling(size, what):
            self._call("cuMemAllocAsync", ctypes.byref(address), ctypes.c_size_t(max(size, 1)),
                       ctypes.c_void_p(stream.handle))
        block = StreamMemory(self, address.value)
        self._owned.add(block)
        return block

    @contextmanager
    def _telling(self, size: int, what: str) -> Iterator[None]:
        """Says what there is no memory for."""
        try:
            yield
        except self.driver.MemoryError:
            free, total = self.driver.mem_get_info()
            raise DeviceError(f"{what} needs {size:,} bytes on the GPU: {free:,} of its {total:,} are free",
                              hint="use a smaller batch, or a smaller net") from None

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """What `work` launches on the stream, to be replayed with one call. Call within `current()`."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream.handle), _RELAXED)
        graph, self._capturing = ctypes.c_void_p(), True
        try:
            work()
        finally:
            self._capturing = False
            self._call("cuStreamEndCapture", ctypes.c_void_p(self.stream.handle), ctypes.byref(graph))
            while self._unwanted:
                self.free_later(self._unwanted.pop())
        executable = ctypes.c_void_p()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        captured = CapturedGraph(self, executable)
        self._owned.add(captured)
        return captured

    def function(self, module: Any, name: str, shared: int) -> Any:
        """A kernel whose launches ask for so many bytes of shared memory. Call within `current()`."""
        found = module.get_function(name)
        if shared:
            most = self._attributes(_MOST_SHARED)[0]
            if shared > most:
                raise DeviceError(f"{name} needs {shared:,} bytes of shared memory for each block, of which "
                                  f"this GPU has {most:,}", hint="compile the program for this GPU")
            found.set_attribute(self.driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        return found

    def _attributes(self, *numbers: int) -> list[int]:
        """What the driver tells of the device."""
        device, value, found = ctypes.c_int(), ctypes.c_int(), []
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        for number in numbers:
            self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
            found.append(value.value)
        return found

    def load(self, code: bytes) -> Module:
        """A module whose functions can be launched together, which PyCUDA's cannot. Call within `current()`.
        """
        handle = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(handle), ctypes.c_char_p(code))
        module = Module(self, handle)
        self._owned.add(module)
        return module

    def resident(self, function: ctypes.c_void_p, threads: int) -> int:
        """How many blocks of the function can be on the GPU at once; 0 where they could not wait for each
        other."""
        blocks = ctypes.c_int()
        together, processors = self._attributes(_COOPERATIVE_LAUNCH, _MULTIPROCESSORS)
        self._call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(blocks), function, threads,
                   ctypes.c_size_t(0))
        return blocks.value * processors if together else 0

    def launch_together(self, function: ctypes.c_void_p, blocks: int, threads: int, pointers: Sequence[int],
                        numbers: Sequence[int]) -> None:
        """Puts the function on the stream, all of its blocks at once."""
        values = [*map(ctypes.c_void_p, pointers), *map(ctypes.c_int, numbers)]
        places = (ctypes.c_void_p * (len(values) + 1))(*map(ctypes.addressof, values))
        self._call("cuLaunchCooperativeKernel", function, blocks, 1, 1, threads, 1, 1, 0,
                   ctypes.c_void_p(self.stream.handle), places)

    def free_later(self, address: int) -> None:
        """Gives memory back when what is now on the stream is done; never as a part of a captured graph."""
        if self._capturing:
            self._unwanted.append(address)
        else:
            self._call("cuMemFreeAsync", ctypes.c_ulonglong(address), ctypes.c_void_p(self.stream.handle))

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._libcuda, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._libcuda.cuGetErrorString(code, ctypes.byref(text))
            kind = self.driver.MemoryError if code == _OUT_OF_MEMORY else self.driver.LogicError
            raise kind(f"{function} failed: {(text.value or b'?').decode()}")

    def close(self) -> None:
        """Frees what is left on the device, then gives the context back; at the end of the process."""
        if os.getpid() != self._process:
            return
        try:
            with self.current():
                for thing in list(self._owned):
                    thing.free()
                del self.stream, self.copies
        except DeviceError:
            pass                                              # a context that a fault has spoiled
        finally:
            self.context.detach()
            type(self)._only = None


class CapturedGraph:
    """A CUDA graph, ready to launch."""

    def __init__(self, gpu: Gpu, executable: ctypes.c_void_p) -> None:
        self._gpu, self._executable = gpu, executable

    def launch(self) -> None:
        """Replays the graph on the GPU's stream."""
        self._gpu._call("cuGraphLaunch", self._executable, ctypes.c_void_p(self._gpu.stream.handle))

    def free(self) -> None:
        """Gives the graph back; the context must be current."""
        if self._executable:
            self._gpu._call("cuGraphExecDestroy", self._executable)
            self._executable = ctypes.c_void_p()

    def __del__(self) -> None:
        _free(self, self._gpu, self._executable)


class Module:
    """Loaded machine code."""

    def __init__(self, gpu: Gpu, handle: ctypes.c_void_p) -> None:
        self._gpu, self._handle = gpu, handle

    def function(self, name: str) -> ctypes.c_void_p:
        """A kernel, valid as long as the module is held."""
        function = ctypes.c_void_p()
        self._gpu._call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode())
        return function

    def free(self) -> None:
        """Gives it back; the context must be current."""
        if self._handle:
            self._gpu._call("cuModuleUnload", self._handle)
            self._handle = ctypes.c_void_p()

    def __del__(self) -> None:
        _free(self, self._gpu, self._handle)


class StreamMemory:
    """Device memory that is given back in the order of the GPU's stream of kernels."""

    def __init__(self, gpu: Gpu, address: int) -> None:
        self._gpu, self._address = gpu, address

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        """Gives it back; the context must be current."""
        if self._address:
            self._gpu.free_later(self._address)
            self._address = 0

    def __del__(self) -> None:
        _free(self, self._gpu, self._address)


def _free(thing: Any, gpu: Gpu, held: Any) -> None:
    """What the garbage collector does with a thing of the device."""
    if held and Gpu._only is gpu:
        try:
            with gpu.current():
                thing.free()
        except DeviceError:
            pass
