"""Aligned memory, and the address of an array without the cost of asking NumPy for it."""
from __future__ import annotations

import ctypes

import numpy as np

from graphflow.compiler.plan.bind import align
from graphflow.compiler.plan.errors import DeviceError
from graphflow.compiler.plan.schema import ALIGNMENT

_DATA_FIELD = object.__basicsize__
"""Where NumPy's array object keeps the address of its data: first after the header that all objects
have."""


def _address_by_field(array: np.ndarray) -> int:
    return _read_address(id(array) + _DATA_FIELD).value


def _address_by_interface(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


_read_address = ctypes.c_uint64.from_address
_probe = np.zeros(3)
address_of = (_address_by_field if _address_by_field(_probe) == _address_by_interface(_probe)
              else _address_by_interface)
"""The address of an array's first element: 0.1 µs where the object's layout is the known one, else 1 µs."""


def aligned_bytes(size: int, what: str) -> np.ndarray:
    """`size` zero bytes that start at a multiple of ALIGNMENT; pages cost nothing until they are touched.

    DeviceError naming `what` if the machine has not that much.
    """
    try:
        block = np.zeros(size + ALIGNMENT, np.uint8)
    except MemoryError:
        raise DeviceError(f"{what} needs {size:,} bytes, more than this machine can give",
                          hint="use a smaller batch, or a smaller net") from None
    start = -address_of(block) % ALIGNMENT
    return block[start:start + size]


class Arena:
    """Working memory that grows on demand. Programs that never run at the same time can share one.

    `version` changes whenever `address` does, so that whoever keeps addresses knows when to take new ones.
    """

    def __init__(self) -> None:
        self.block = aligned_bytes(0, "an empty arena")
        self.version = 0

    @property
    def address(self) -> int:
        """Where the block starts."""
        return address_of(self.block)

    @property
    def bytes(self) -> int:
        """The bytes that are allocated."""
        return len(self.block)

    def reserve(self, size: int) -> None:
        """Makes room for at least `size` bytes; what the arena held is lost if it moves."""
        if size > len(self.block):
            self.block = self.block[:0]               # so that old and new are never held at once
            self.block = aligned_bytes(align(size), "the arena")
            self.version += 1
