"""Text as numbers: characters, and windows of a long text."""
from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data.sets import Batch


class Characters:
    """The characters that occur in a text, sorted, numbered from 0."""

    def __init__(self, text: str) -> None:
        self.characters = "".join(sorted(set(text)))
        if not self.characters:
            raise DataError("the text is empty")
        self._codes = np.array([ord(c) for c in self.characters], np.uint32)

    def __len__(self) -> int:
        """The number of different characters."""
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The text's characters as numbers, int64 [length]; DataError for one that is not known."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if len(unknown):
            place = int(unknown[0])
            raise DataError(f"character {place} of the text, {text[place]!r}, is not among the "
                            f"{len(self)} known ones")
        return ids.astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The text of these numbers."""
        numbers = np.asarray(ids)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise DataError(f"numbers from {numbers.min()} to {numbers.max()} for {len(self)} characters")
        return "".join(self.characters[i] for i in numbers.ravel())


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a text file in UTF-8, line ends as they are; DataError if it cannot be read."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)}: byte {error.start} is not text in UTF-8: {error.reason}"
                        ) from error


class TextWindows:
    """A long text cut for truncated back-propagation through time, as batches.

    The numbers `ids` [length] are laid out as `batch_size` texts that run side by side; batch t holds `steps`
    numbers of each, in order, so that what a net remembers of batch t is what it needs in batch t + 1. A
    batch is {x: [batch_size, steps], y: the same, one number further on}, and with `start`, a name, bool
    [batch_size] under it, true in an epoch's first batch: there a net forgets what it carries. The numbers
    beyond the last whole window, at most batch_size · steps, are left out. Every epoch is the same.
    """

    def __init__(self, ids: ArrayLike, batch_size: int, steps: int, *, x: str = "x", y: str = "y",
                 start: str | None = None) -> None:
        numbers = np.asarray(ids)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise DataError(f"a text is a row of integers, not {numbers.dtype.name}{list(numbers.shape)}",
                            hint="gf.data.Characters(text).encode(text)")
        for word, number in (("batch_size", batch_size), ("steps", steps)):
            if not isinstance(number, int) or number < 1:
                raise UseError(f"{word} is {number!r}; it must be an integer of 1 or more")
        self.count = (len(numbers) - 1) // batch_size // steps
        if self.count < 1:
            raise DataError(f"{len(numbers)} characters are too few for {batch_size} texts of {steps + 1}")
        self.ids, self.batch_size, self.steps = numbers, batch_size, steps
        self.x, self.y, self.start = x, y, start

    def __len__(self) -> int:
        """The batches of one epoch."""
        return self.count

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The windows of an epoch in order, without the first `start`."""
        span = (len(self.ids) - 1) // self.batch_size
        places = np.arange(self.batch_size)[:, None] * span + np.arange(self.steps)
        for number in range(start, self.count):
            here = places + number * self.steps
            batch = {self.x: self.ids[here], self.y: self.ids[here + 1]}
            if self.start is not None:
                batch[self.start] = np.full(self.batch_size, number == 0)
            yield batch
