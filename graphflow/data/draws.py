"""Random numbers for the rows of a batch that follow from (seed, epoch, number of the row) alone."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class Draws:
    """Random numbers for some rows: each call draws anew, and a row gets the same ones in whatever batch, on
    whatever thread it is made.

    The bits are Threefry-2x32 under a key made of (seed, epoch), at the counter (row, number of the draw).
    `rows` are the numbers of the rows in the data set, from 0 to 2³² - 1.
    """

    def __init__(self, seed: int, epoch: int, rows: ArrayLike) -> None:
        self.rows = np.asarray(rows).astype(np.uint32)
        self._key = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint32)
        self._drawn = 0

    def bits(self, shape: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Two independent uint32 arrays [rows, *shape]."""
        from graphflow.compiler.ops.random import threefry2x32
        size = int(np.prod(shape, dtype=np.int64))
        numbers = np.arange(self._drawn, self._drawn + size, dtype=np.uint64).astype(np.uint32)
        self._drawn += size
        pairs = np.broadcast_arrays(self.rows[:, None], numbers)
        first, second = threefry2x32((self._key[0], self._key[1]), (pairs[0], pairs[1]))
        return first.reshape(-1, *shape), second.reshape(-1, *shape)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """float64 [rows, *shape], evenly distributed from `low` up to, but not including, `high`."""
        return low + (high - low) * (self.bits(shape)[0] * 2.0 ** -32)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """int64 [rows, *shape] from `low` to `high`, both included; they span less than 2³²."""
        words = self.bits(shape)[0].astype(np.uint64)
        return low + ((words * np.uint64(high - low + 1)) >> np.uint64(32)).astype(np.int64)

    def chance(self, probability: float) -> np.ndarray:
        """bool [rows], true with this probability."""
        return self.uniform() < probability

    def normal(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """[rows, *shape] of the normal distribution with mean 0 and deviation 1, from one PCG64 generator for
        each row."""
        first, second = (words.astype(np.uint64) for words in self.bits())
        out = np.empty((len(self.rows), *shape), dtype)
        for row, word in zip(out, (first << np.uint64(32)) | second):
            np.random.Generator(np.random.PCG64(int(word))).standard_normal(out=row, dtype=dtype)
        return out


Transform = Callable[[np.ndarray, Draws], np.ndarray]
"""What changes the rows of an array in a batch, by random numbers of their own: (array, draws) -> array."""
