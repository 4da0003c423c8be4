"""Arrays in the memory of the GPU: outputs of programs, and what the host sent there to feed them with."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from graphflow.compiler.plan.bind import align
from graphflow.runtime.cuda_device import CapturedGraph, Gpu


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the GPU. It is one of the host wherever that is needed, and fetched then: np.asarray,
    float(), arithmetic, indexing and any attribute of an array. Fed to a program on the GPU it stays there.

    An output is moved to the host when it is read. With `kept` every reader gets a copy.
    """

    def __init__(self, gpu: Gpu, memory: Any, address: int, shape: tuple[int, ...], dtype: np.dtype,
                 ready: Any = None, kept: bool = False) -> None:
        self.gpu, self.address, self.shape, self.dtype = gpu, address, shape, dtype
        self._memory, self._ready, self._kept = memory, ready, kept
        self._value: np.ndarray | None = None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def on_device(self) -> bool:
        """Whether the value is still there."""
        return self._value is None

    def fetch(self) -> np.ndarray:
        """The value; waits for the step that makes it."""
        if self._value is not None:
            return self._value
        value = np.empty(self.shape, self.dtype)
        if value.nbytes:
            with self.gpu.current():
                if self._ready is not None:
                    self._ready.synchronize()
                self.gpu.driver.memcpy_dtoh(value.reshape(-1).view(np.uint8), self.address)
        if not self._kept:
            self._value, self._memory = value, None
        return value

    def wait(self, stream: Any) -> None:
        """The stream waits for the step that makes the value."""
        if self._ready is not None:
            stream.wait_for_event(self._ready)

    def copy_to(self, address: int, stream: Any) -> None:
        """Puts a copy on the stream."""
        self.wait(stream)
        if self.nbytes:
            self.gpu.driver.memcpy_dtod_async(address, self.address, self.nbytes, stream)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.fetch(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        values = [x.fetch() if isinstance(x, DeviceArray) else x for x in inputs]
        return getattr(ufunc, method)(*values, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.fetch(), name)

    def __float__(self) -> float:
        return float(self.fetch())

    def __int__(self) -> int:
        return int(self.fetch())

    def __bool__(self) -> bool:
        return bool(self.fetch())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return self.fetch()[key]

    def __format__(self, spec: str) -> str:
        return format(self.fetch()[()], spec)

    def __repr__(self) -> str:
        return repr(self.fetch())


def to_device(array: np.ndarray) -> DeviceArray:
    """The row-major array on the GPU, for as long as the result is held."""
    gpu = Gpu.get()
    with gpu.current():
        memory = gpu.allocate(array.nbytes, f"an array of shape {list(array.shape)}")
        if array.nbytes:
            gpu.driver.memcpy_htod(memory, array)
    return DeviceArray(gpu, memory, int(memory), array.shape, array.dtype, kept=True)


class Slot:
    """Device memory of one call at a time, by name (`sizes`, of which the first are the `feeds`); and what
    replays the call."""

    def __init__(self, gpu: Gpu, sizes: Mapping[str, int], feeds: int, what: str) -> None:
        self.gpu = gpu
        ends = np.cumsum([0, *map(align, sizes.values())])
        self._offsets = dict(zip(sizes, map(int, ends)))
        self.memory = gpu.allocate(int(ends[-1]), what)
        self._pinned = gpu.driver.pagelocked_empty(max(int(ends[feeds]), 1), np.uint8)
        self.copied, self.done = gpu.driver.Event(), gpu.driver.Event()
        self.graphs: list[CapturedGraph] = []
        self.stamp = -1
        self.results: list[Any] = []                         # weak references to the outputs

    def address(self, name: str) -> int:
        """Where it lies."""
        return int(self.memory) + self._offsets[name]

    def fill(self, feeds: Mapping[str, Any]) -> None:
        """Begins to copy the feeds on the stream of copies; that of kernels will wait for them."""
        copies, pieces = self.gpu.copies, []
        for name, feed in feeds.items():
            start = self._offsets[name]
            if isinstance(feed, DeviceArray) and feed.on_device:
                feed.copy_to(self.address(name), copies)
                pieces.append((0, 0))                        # what is before and behind is no one piece
                continue
            end = start + feed.nbytes
            self._pinned[start:end].view(feed.dtype).reshape(feed.shape)[...] = feed
            if pieces and pieces[-1][1]:
                start = pieces.pop()[0]
            pieces.append((start, end))
        for start, end in pieces:
            if end > start:
                self.gpu.driver.memcpy_htod_async(int(self.memory) + start, self._pinned[start:end], copies)
        self.copied.record(copies)
        self.gpu.stream.wait_for_event(self.copied)

    def finish(self) -> None:
        """Waits for the call before, whose results that somebody still holds are fetched."""
        for ref in self.results:
            held = ref()
            if held is not None:
                held.fetch()
        self.results.clear()
        self.done.synchronize()
