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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphflow.compiler.plan.errors import DeviceError

_THREAD_LOCAL = 1
"""Capture mode: calls of other threads are none of this capture's business."""


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
        try:
            block = self.driver.mem_alloc(max(size, 1))
        except self.driver.MemoryError:
            free, total = self.driver.mem_get_info()
            raise DeviceError(f"{what} needs {size:,} bytes on the GPU: {free:,} of its {total:,} are free",
                              hint="use a smaller batch, or a smaller net") from None
        self._owned.add(block)
        return block

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """What `work` launches on the stream, to be replayed with one call. Call within `current()`."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream.handle), _THREAD_LOCAL)
        graph = ctypes.c_void_p()
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", ctypes.c_void_p(self.stream.handle), ctypes.byref(graph))
        executable = ctypes.c_void_p()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        captured = CapturedGraph(self, executable)
        self._owned.add(captured)
        return captured

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._libcuda, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._libcuda.cuGetErrorString(code, ctypes.byref(text))
            raise self.driver.LogicError(f"{function} failed: {(text.value or b'?').decode()}")

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
        if self._executable and Gpu._only is self._gpu:
            try:
                with self._gpu.current():
                    self.free()
            except DeviceError:
                pass
