"""Data as batches of feeds: names, types and finite numbers checked before a program sees them."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.plan.dims import Dim
from graphflow.compiler.plan.errors import FeedError, UseError
from graphflow.data.batches import Batches, Minibatches
from graphflow.data.sets import Arrays, Batch, Dataset
from graphflow.function import as_feed
from graphflow.scope import here
from graphflow.tensor import Tensor

Data = Any
"""Arrays by position (inputs, then targets) or by feed name; a `gf.data.Dataset`; or `gf.data.Batches`, which
name the feeds, such as `gf.data.Minibatches`."""


class Feeds:
    """The batches of some data, each checked to be feeds for these inputs; feeds that none takes are left
    out.

    `checked`: the arrays' numbers have been seen to be finite already.
    """

    def __init__(self, source: Batches, tensors: Sequence[Tensor], checked: bool) -> None:
        self.source, self.tensors, self.checked = source, list(tensors), checked

    def __len__(self) -> int:
        """The batches of one epoch."""
        return len(self.source)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch, without the first `start`. Closing it closes the source."""
        made = self.source.batches(epoch, start)
        try:
            for batch in made:
                yield {t.name: self._feed(t, batch) for t in self.tensors}
        finally:
            close = getattr(made, "close", None)
            if close is not None:
                close()

    def _feed(self, t: Tensor, batch: Mapping[str, Any]) -> np.ndarray:
        if t.name not in batch:
            raise FeedError(f"the data misses {t.name!r}", where=here(),
                            hint=f"the feeds are {_names(self.tensors)}, a batch has {', '.join(batch)}")
        array = as_feed(t.value.node, batch[t.name])
        if not self.checked:
            check_finite(t, array)
        return array

    def rows(self, batch: Batch) -> int:
        """The samples of a batch."""
        shape = batch[self.tensors[0].name].shape
        return shape[0] if shape else 1


def closing(feeds: Feeds, epoch: int = 0, start: int = 0) -> contextlib.closing:
    """The batches of an epoch as a context that ends the threads which make them."""
    return contextlib.closing(feeds.batches(epoch, start))


def as_feeds(data: Data, tensors: Sequence[Tensor], batch_size: int | None, shuffle: bool, seed: int,
             ) -> Feeds:
    """The data as batches for these inputs; FeedError where they do not fit.

    Arrays in memory are checked here and whole, all else batch by batch.
    """
    if isinstance(data, Batches):
        ready = data if isinstance(data, Minibatches) and not data.transforms else None
        whole = ready.data if ready and isinstance(ready.data, Arrays) and ready.data.in_memory else None
        if whole:
            _checked({name: array for name, array in whole.arrays.items()}, tensors)
        return Feeds(data, tensors, whole is not None)
    if isinstance(data, Iterator):
        raise FeedError("an iterator can be passed over once only", where=here(),
                        hint="wrap the function that makes it: gf.data.Stream(make, batches_per_epoch)")
    checked = False
    if not isinstance(data, Dataset):
        arrays = Arrays(_named_arrays(data, tensors))
        checked = arrays.in_memory
        data = Arrays(_checked(arrays.arrays, tensors)) if checked else arrays
    elif isinstance(data, Arrays) and data.in_memory:
        data, checked = Arrays(_checked(data.arrays, tensors)), True
    size = _batch_size(tensors, batch_size, len(data))
    return Feeds(Minibatches(data, size, shuffle=shuffle, seed=seed), tensors, checked)


def _checked(arrays: Mapping[str, np.ndarray], tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    feeds = {}
    for t in tensors:
        if t.name not in arrays:
            raise FeedError(f"the data misses {t.name!r}", where=here(),
                            hint=f"the feeds are {_names(tensors)}")
        feeds[t.name] = as_feed(t.value.node, arrays[t.name])
        check_finite(t, feeds[t.name])
    return feeds


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(t.name for t in tensors)


def _named_arrays(data: Data, tensors: Sequence[Tensor]) -> dict[str, Any]:
    names = [t.name for t in tensors]
    if isinstance(data, Mapping):
        arrays = dict(data)
    elif isinstance(data, (tuple, list)) and not (len(names) == 1 and len(data) != 1):
        if len(data) != len(names):
            raise FeedError(f"{len(data)} arrays for {len(names)} feeds", where=here(),
                            hint=f"pass one for each of {', '.join(names)}, in this order")
        arrays = dict(zip(names, data))
    elif len(names) == 1:
        arrays = {names[0]: data}
    else:
        raise FeedError(f"one array for the feeds {', '.join(names)}", where=here(),
                        hint="pass a tuple of arrays or a dict by name")
    missing, surplus = [n for n in names if n not in arrays], [n for n in arrays if n not in names]
    if missing or surplus:
        what = f"the data misses {missing[0]!r}" if missing else f"there is no feed {surplus[0]!r}"
        raise FeedError(what, where=here(), hint=f"the feeds are {', '.join(names)}")
    # Python's numbers adapt to the feed's type, which is lost once they are an array
    return {t.name: v if isinstance(v := arrays[t.name], np.ndarray) else as_feed(t.value.node, v)
            for t in tensors}


def check_finite(t: Tensor, array: np.ndarray) -> None:
    """FeedError with the first place where there is NaN or infinity."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    where = t.value.node.origins[0] if t.value.node.origins else None
    raise FeedError(f"feed {t.name!r}: {array[place]} at {list(place)}", where=where,
                    hint="the data must be finite: remove or replace such rows")


def _batch_size(tensors: Sequence[Tensor], wish: int | None, rows: int) -> int:
    """The rows of a batch: as wished, else as declared, else 32."""
    fixed = {t.shape[0] for t in tensors if t.shape and not isinstance(t.shape[0], Dim)}
    if not fixed:
        return 32 if wish is None else wish
    size = min(fixed)
    if len(fixed) > 1 or wish not in (None, size) or rows % size:
        raise UseError(f"the inputs are declared with batches of {', '.join(map(str, sorted(fixed)))}; "
                       f"{rows} rows in batches of {wish or size} do not fit that", where=here(),
                       hint="declare the batch as a dimension: N = gf.dim('N')")
    return size
