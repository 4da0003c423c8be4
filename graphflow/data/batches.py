"""Minibatches of the rows of arrays."""
from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike

from graphflow.compiler.plan.errors import DataError, UseError


class Minibatches:
    """The rows of some arrays in batches, one epoch per iteration.

    `arrays` maps names to array-likes of one length along axis 0. Each batch is a dictionary of C-contiguous
    arrays, `batch_size` rows each; the last holds what remains unless `drop_last`. With `shuffle`, epoch e
    visits the rows in an order that depends on `(seed, e)` and nothing else; each `iter()` takes the next
    epoch, and `epoch` may be set to resume. A batch's arrays are buffers that the next batch overwrites
    (without `shuffle`, views of `arrays`): copy what must outlive the loop's step, and run one iterator at
    a time. Raises `DataError` for arrays of different lengths or none, `UseError` for a wrong number.
    """

    def __init__(self, arrays: Mapping[str, ArrayLike], batch_size: int, *, shuffle: bool = True,
                 seed: int = 0, drop_last: bool = False) -> None:
        for word, number, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(number, (int, np.integer)) or number < least:
                raise UseError(f"{word} is {number!r}; it must be an integer of {least} or more")
        self.arrays = {name: _rows_of(name, array) for name, array in arrays.items()}
        self.rows = _common_length(self.arrays)
        if drop_last and batch_size > self.rows:
            raise UseError(f"drop_last leaves no batch: batch_size is {batch_size}, the arrays have "
                           f"{self.rows} rows")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        height = min(batch_size, self.rows)
        self._buffers = {name: np.empty((height, *array.shape[1:]), array.dtype)
                         for name, array in self.arrays.items()} if shuffle else {}

    def __len__(self) -> int:
        """The batches of one epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The row indices in the order in which `epoch` visits them."""
        if not self.shuffle:
            return np.arange(self.rows)
        # Sorting raw bits gives one order under every NumPy; Generator.permutation promises no such thing.
        return np.argsort(np.random.PCG64([self.seed, epoch]).random_raw(self.rows), kind="stable")

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(self.order(epoch))

    def _batches(self, order: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = min(start + self.batch_size, self.rows)
            if not self.shuffle:  # The rows lie in order already: a view is a batch.
                yield {name: array[start:stop] for name, array in self.arrays.items()}
                continue
            indices = order[start:stop]
            batch = {name: buffer[:stop - start] for name, buffer in self._buffers.items()}
            for name, array in self.arrays.items():
                # mode="clip" lets take() write straight into `out`; the indices are in range by construction.
                np.take(array, indices, axis=0, out=batch[name], mode="clip")
            yield batch


def _rows_of(name: str, data: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise DataError(f"'{name}' makes no array: {error}", hint="are its rows of one shape?") from error
    if array.dtype.hasobject:
        raise DataError(f"'{name}' holds Python objects, not numbers", hint="are its rows of one shape?")
    if array.ndim == 0:
        raise DataError(f"'{name}' is a scalar; minibatches need rows along axis 0")
    return np.ascontiguousarray(array)


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
