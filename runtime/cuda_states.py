"""The entries of a Store on the GPU: what programs there read and write stays there.

An entry is copied to the device when a program first needs it or the host has changed it, and back when
somebody reads a value that the device has changed. The Store asks (`fetch`) and tells (`changed`).
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from graphflow.runtime.cuda_device import Gpu
from graphflow.runtime.store import Store


class CudaStates:
    """The copies of a Store's entries on the device, and working memory. `version` changes when one moves."""

    def __init__(self, store: Store, gpu: Gpu) -> None:
        self.store, self.gpu, self.version = store, gpu, 0
        self._copies: dict[str, Any] = {}
        self._stale: set[str] = set()         # the host has a newer value
        self._newer: set[str] = set()         # the device has
        self._arena: Any = None
        self._arena_bytes = 0

    @classmethod
    def of(cls, store: Store, gpu: Gpu) -> CudaStates:
        """The Store's, made when first asked for."""
        if store.mirror is None:
            store.mirror = cls(store, gpu)
        assert isinstance(store.mirror, cls)
        return store.mirror

    def address(self, name: str) -> int:
        """Where the entry lies on the device."""
        if name not in self._copies:
            self._copies[name] = self.gpu.allocate(self.store.entry(name).bytes, f"{name} of the Store")
            self._stale.add(name)
            self.version += 1
        return int(self._copies[name])

    def arena(self, size: int) -> int:
        """The address of at least so many bytes of working memory, for all programs over the Store."""
        if size > self._arena_bytes or self._arena is None:
            if self._arena is not None:
                self.gpu.stream.synchronize()
                self._arena.free()                            # so that old and new are never held at once
                self._arena, self._arena_bytes = None, 0
            self._arena = self.gpu.allocate(size, "the working memory")
            self._arena_bytes = size
            self.version += 1
        return int(self._arena)

    def update(self, names: Iterable[str]) -> None:
        """Brings to the device what the host has changed of these."""
        for name in self._stale.intersection(names):
            self.gpu.driver.memcpy_htod_async(int(self._copies[name]), self.store.host(name), self.gpu.stream)
            self.gpu.stream.synchronize()                     # the host's memory is not pinned
            self._stale.discard(name)

    def written(self, names: Iterable[str]) -> None:
        """The device has written these."""
        self._newer.update(names)

    def fetch(self, names: Iterable[str]) -> None:
        """Brings back to the host what the device has changed of these. For the Store."""
        wanted = self._newer.intersection(names)
        if not wanted:
            return
        with self.gpu.current():
            self.gpu.stream.synchronize()
            for name in sorted(wanted):
                self.gpu.driver.memcpy_dtoh(self.store.host(name).reshape(-1).view(np.uint8),
                                            int(self._copies[name]))
        self._newer -= wanted

    def changed(self, names: Iterable[str]) -> None:
        """The host has written these. For the Store."""
        mine = self._copies.keys() & set(names)
        self._stale |= mine
        self._newer -= mine
