"""Data sets: rows that are taken by their numbers, so that order, batches and splits are made elsewhere."""
from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from graphflow.compiler.plan.errors import DataError, UseError

Batch = dict[str, np.ndarray]
"""Arrays by feed name, with one row each for every sample."""

BLOCK = 1024
"""Rows that a pass over a whole data set holds in memory at once."""


@runtime_checkable
class Dataset(Protocol):
    """What batches are made of. A class of one's own needs these two methods, and no more."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def take_rows(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers (int64), in this order, as new arrays by feed name. Worker threads call
        it at the same time."""
        ...


class Arrays:
    """Arrays of one length along axis 0, by name, as a data set.

    An array mapped from a file (``np.load(path, mmap_mode="r")``, ``np.memmap``) stays there: only the rows
    of a batch are read. Raises DataError for arrays of different lengths, without rows or of Python objects.
    """

    def __init__(self, arrays: Mapping[str, ArrayLike]) -> None:
        self.arrays = {name: _rows_of(name, array) for name, array in arrays.items()}
        self.rows = _common_length(self.arrays)

    def __len__(self) -> int:
        """The number of rows."""
        return self.rows

    def take_rows(self, rows: np.ndarray) -> Batch:
        """Copies of the rows."""
        return {name: np.take(array, rows, axis=0) for name, array in self.arrays.items()}

    @property
    def in_memory(self) -> bool:
        """Whether no array is mapped from a file."""
        return not any(_is_mapped(array) for array in self.arrays.values())


class Subset:
    """Some rows of a data set, in the given order."""

    def __init__(self, dataset: Dataset, rows: ArrayLike) -> None:
        self.dataset, self.rows = dataset, np.asarray(rows, np.int64)
        if self.rows.ndim != 1 or not len(self.rows):
            raise UseError(f"a subset is a list of row numbers, not an array {list(self.rows.shape)}")
        if self.rows.min() < 0 or self.rows.max() >= len(dataset):
            raise UseError(f"a subset of rows {self.rows.min()} to {self.rows.max()} of a data set that has "
                           f"{len(dataset)}")

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def take_rows(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, counted within the subset."""
        return self.dataset.take_rows(self.rows[rows])


def as_dataset(data: Any) -> Dataset:
    """The data set itself, or one made of arrays by name."""
    return data if isinstance(data, Dataset) else Arrays(data)


def split(data: Any, parts: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> list[Any]:
    """The rows in random order, cut into parts of these shares: for training, validation and testing.

    data: a Dataset, arrays by name, or a tuple of arrays; each part is of the same kind.
    The order follows from the seed alone. UseError if a part would be empty or the shares exceed 1.
    """
    single = isinstance(data, np.ndarray)
    listed = isinstance(data, (tuple, list)) or single
    dataset = as_dataset({str(i): a for i, a in enumerate([data] if single else data)} if listed else data)
    if not parts or any(not share > 0 for share in parts) or sum(parts) > 1 + 1e-9:
        raise UseError(f"the shares {tuple(parts)} are no positive numbers with a sum of at most 1")
    stops = np.rint(np.cumsum([0.0, *parts]) * len(dataset)).astype(np.int64)
    if (np.diff(stops) == 0).any():
        raise UseError(f"{len(dataset)} rows are too few for parts of {tuple(parts)}: one would be empty")
    order = shuffled(len(dataset), [seed, 0x5EED])
    chosen = [np.sort(order[a:b]) for a, b in zip(stops[:-1], stops[1:])]
    if not isinstance(dataset, Arrays) or dataset is data:
        return [Subset(dataset, rows) for rows in chosen]
    taken = [dataset.take_rows(rows) for rows in chosen]
    if not listed:
        return taken
    return [part["0"] for part in taken] if single else [tuple(part.values()) for part in taken]


def shuffled(count: int, seed: Sequence[int]) -> np.ndarray:
    """The numbers below `count` in an order that follows from the seed alone."""
    # Sorting raw bits gives one order under every NumPy; Generator.permutation promises no such thing.
    return np.argsort(np.random.PCG64(list(seed)).random_raw(count), kind="stable")


def mean_std(data: Any, axes: Sequence[int] = (0, 2, 3), name: str | None = None,
             ) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (of the whole population) along `axes`, which begin with 0: what
    `augment.Normalize` takes.

    data: an array, or a Dataset and the `name` of one of its arrays; it is read in blocks, so it may be
    larger than memory. Returns float32 arrays that broadcast against one row: [C, 1, 1] for images
    [N, C, H, W] and the axes (0, 2, 3). A deviation of 0 becomes 1, so that dividing by it does no harm. The
    blocks are joined as by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm" (1979).
    """
    if 0 not in axes:
        raise UseError(f"the statistics are taken along axis 0 and perhaps others, not along {tuple(axes)}")
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for block in _blocks(data, name):
        if not all(-block.ndim <= axis < block.ndim for axis in axes):
            raise UseError(f"the axes {tuple(axes)} are not all among those of rows {list(block.shape)}")
        wide = block.astype(np.float64)
        size = int(np.prod([block.shape[axis] for axis in axes]))
        block_mean = wide.mean(tuple(axes), keepdims=True)
        change = block_mean - mean
        squares = squares + np.square(wide - block_mean).sum(tuple(axes), keepdims=True) \
            + change ** 2 * (count * size / (count + size))
        mean = mean + change * (size / (count + size))
        count += size
    deviation = np.sqrt(squares / count)
    deviation[deviation == 0] = 1
    return mean[0].astype(np.float32), deviation[0].astype(np.float32)


def _blocks(data: Any, name: str | None) -> Iterator[np.ndarray]:
    if isinstance(data, Dataset) and name is None:
        raise UseError("the statistics of a data set need the name of one of its arrays", hint="name='x'")
    dataset = data if isinstance(data, Dataset) else Arrays({"": data})
    for start in range(0, len(dataset), BLOCK):
        batch = dataset.take_rows(np.arange(start, min(start + BLOCK, len(dataset))))
        if (name or "") not in batch:
            raise UseError(f"the data set has no array {name!r}, but {', '.join(map(repr, batch))}")
        yield batch[name or ""]


def _rows_of(name: str, data: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise DataError(f"'{name}' makes no array: {error}", hint="are its rows of one shape?") from error
    if array.dtype.hasobject:
        raise DataError(f"'{name}' holds Python objects, not numbers",
                        hint="are its rows of one shape? gf.data.Sequences pads rows of unequal length")
    if array.ndim == 0:
        raise DataError(f"'{name}' is a scalar; minibatches need rows along axis 0")
    return array if _is_mapped(array) else np.ascontiguousarray(array)


def _is_mapped(array: Any) -> bool:
    """Whether the array's memory is a mapped file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def _common_length(arrays: Mapping[str, np.ndarray]) -> int:
    if not arrays:
        raise DataError("no arrays to make minibatches of")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError("the arrays have different numbers of rows: "
                        + ", ".join(f"'{name}' {length}" for name, length in lengths.items()))
    rows = next(iter(lengths.values()))
    if rows == 0:
        raise DataError("the arrays have no rows")
    return rows
