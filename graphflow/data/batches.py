"""Batches of a data set's rows, one epoch after the other, from any place in them."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data.draws import Draws, Transform
from graphflow.data.prefetch import prefetched
from graphflow.data.sets import Arrays, Batch, as_dataset, shuffled

WORKERS = 2
"""Threads that make batches where rows must be decoded or transformed, and nothing else is asked for."""

POOL = 50
"""Batches whose rows are sorted by length together."""


@runtime_checkable
class Batches(Protocol):
    """What `Model.fit` trains on. What an epoch holds follows from its number alone, so that training can go
    on in the middle of it."""

    def __len__(self) -> int:
        """The batches of one epoch."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch, without the first `start`. A batch may be overwritten by the next."""
        ...


class Minibatches:
    """The rows of a data set in batches, one epoch per iteration.

    `data`: a Dataset, or arrays (array-likes of one length along axis 0) by name. Each batch is a dictionary
    of C-contiguous arrays, `batch_size` rows each; the last holds what remains unless `drop_last`. With
    `shuffle`, epoch e visits the rows in an order that depends on `(seed, e)` and nothing else; each `iter()`
    takes the next epoch, and `epoch` may be set to resume.

    `lengths`: a number for each row; a shuffled batch then holds rows of about one length (bucketing: rows
    are sorted within every 50 batches). `transforms`: for each name of an array what is applied to its rows,
    in order, such as ``{"x": [Shift(2), Flip()]}`` (`gf.data.augment`); their random numbers follow from the
    seed, the epoch and the number of the row. `workers`: threads that make batches ahead of their use; 0 is
    none, and the default for plain arrays; the batches are the same for any number.

    Plain arrays without workers: a batch's arrays are buffers that the next batch overwrites (without
    `shuffle`, views of the arrays): copy what must outlive the loop's step, and run one iterator at a time.
    Raises `DataError` for arrays of different lengths or none, `UseError` for a wrong number.
    """

    def __init__(self, data: Any, batch_size: int, *, shuffle: bool = True, seed: int = 0,
                 drop_last: bool = False, lengths: ArrayLike | None = None,
                 transforms: Mapping[str, Sequence[Transform]] | None = None,
                 workers: int | None = None) -> None:
        self.data = as_dataset(data)
        self.transforms = {name: list(chain) for name, chain in (transforms or {}).items()}
        plain = isinstance(self.data, Arrays) and not self.transforms
        self.workers = (0 if plain else WORKERS) if workers is None else workers
        for word, number, least in (("batch_size", batch_size, 1), ("seed", seed, 0),
                                    ("workers", self.workers, 0)):
            if not isinstance(number, (int, np.integer)) or number < least:
                raise UseError(f"{word} is {number!r}; it must be an integer of {least} or more")
        self.rows = len(self.data)
        if self.rows == 0:
            raise DataError("the data set has no rows")
        if drop_last and batch_size > self.rows:
            raise UseError(f"drop_last leaves no batch: batch_size is {batch_size}, the arrays have "
                           f"{self.rows} rows")
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.lengths = None if lengths is None else np.asarray(lengths)
        if self.lengths is not None and self.lengths.shape != (self.rows,):
            raise DataError(f"there are {self.rows} rows, and lengths of shape {list(self.lengths.shape)}")
        self.epoch = 0

    def __len__(self) -> int:
        """The batches of one epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The row indices in the order in which `epoch` visits them."""
        if not self.shuffle:
            return np.arange(self.rows)
        order = shuffled(self.rows, [self.seed, epoch])
        return order if self.lengths is None else self._bucketed(order, self.lengths, epoch)

    def _bucketed(self, order: np.ndarray, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """The order sorted by length within pools of rows, then its whole batches shuffled."""
        size = self.batch_size
        pools = np.split(order, range(POOL * size, self.rows, POOL * size))
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        whole = self.rows // size * size
        places = shuffled(whole // size, [self.seed, epoch, 1])
        return np.concatenate([order[:whole].reshape(-1, size)[places].ravel(), order[whole:]])

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self.batches(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch, without the first `start`."""
        order, stop = self.order(epoch), len(self) * self.batch_size
        parts = [order[i:min(i + self.batch_size, self.rows)]
                 for i in range(start * self.batch_size, stop, self.batch_size)]
        if isinstance(self.data, Arrays) and not self.transforms and not self.workers:
            return _copied(self.data, parts, self.batch_size) if self.shuffle else _viewed(self.data, parts)

        def make(rows: np.ndarray) -> Batch:
            return self._transformed(self.data.take_rows(rows), epoch, rows)

        return prefetched(make, parts, self.workers)

    def _transformed(self, batch: Batch, epoch: int, rows: np.ndarray) -> Batch:
        for name, chain in self.transforms.items():
            if name not in batch:
                raise UseError(f"there are transforms for {name!r}, but no such array",
                               hint=f"the arrays are {', '.join(batch)}")
            draws = Draws(self.seed, epoch, rows)
            for transform in chain:
                batch[name] = np.ascontiguousarray(transform(batch[name], draws))
            if len(batch[name]) != len(rows):
                raise UseError(f"a transform made {len(batch[name])} rows of {name!r} out of {len(rows)}")
        return batch


def _viewed(data: Arrays, parts: list[np.ndarray]) -> Iterator[Batch]:
    for rows in parts:                                # the rows lie in order already: a view is a batch
        yield {name: array[rows[0]:rows[-1] + 1] for name, array in data.arrays.items()}


def _copied(data: Arrays, parts: list[np.ndarray], batch_size: int) -> Iterator[Batch]:
    height = min(batch_size, len(data))
    buffers = {name: np.empty((height, *a.shape[1:]), a.dtype) for name, a in data.arrays.items()}
    for rows in parts:
        batch = {name: buffer[:len(rows)] for name, buffer in buffers.items()}
        for name, array in data.arrays.items():
            # mode="clip" lets take() write straight into `out`; the indices are in range by construction.
            np.take(array, rows, axis=0, out=batch[name], mode="clip")
        yield batch


class Stream:
    """Batches that a function makes one after the other, such as those of a simulation or a remote source.

    make: a function of the epoch's number that returns the batches in order (a generator function); `length`:
    how many of them are an epoch (it may go on for ever). Going on in the middle of an epoch makes and passes
    over what came before. One thread runs it ahead of the training if `prefetch`. DataError if it ends early.
    """

    def __init__(self, make: Callable[[int], Iterable[Batch]], length: int, *, prefetch: bool = True) -> None:
        if not callable(make):
            raise UseError(f"a Stream takes a function of the epoch that makes batches, not {make!r}",
                           hint="def make(epoch): ... yield {'x': x, 'y': y}")
        if not isinstance(length, int) or length < 1:
            raise UseError(f"length is {length!r}; it must be an integer of 1 or more")
        self.make, self.length, self.prefetch = make, length, prefetch

    def __len__(self) -> int:
        """The batches of one epoch."""
        return self.length

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch, without the first `start`."""
        source = iter(self.make(epoch))

        def following(number: int) -> Batch:
            try:
                batch = next(source)
            except StopIteration:
                raise DataError(f"the stream ended after {number} batches of epoch {epoch}; an epoch has "
                                f"{self.length}") from None
            # made ahead, a batch must outlive the next one, which may use the same memory
            return {name: np.array(array) for name, array in batch.items()} if self.prefetch else batch

        made = prefetched(following, range(self.length), 1 if self.prefetch else 0)
        try:
            yield from islice(made, start, None)
        finally:
            for iterator in (made, source):
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
