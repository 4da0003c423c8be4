"""Sequences of unequal length, padded batch by batch."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data.sets import Batch, _rows_of


def pad(sequences: Sequence[ArrayLike], length: int | None = None, value: float = 0,
        ) -> tuple[np.ndarray, np.ndarray]:
    """(padded, mask) of arrays [steps, ...]: [rows, length, ...] with `value` behind each sequence's end, and
    bool [rows, length], true within it. length: by default that of the longest. DataError where one is
    longer, or differs in another axis or type."""
    arrays = [np.asarray(s) for s in sequences]
    if not arrays or any(a.ndim == 0 for a in arrays):
        raise DataError("sequences have at least one axis, the steps; and there must be one at least")
    steps = np.array([len(a) for a in arrays])
    length = int(steps.max()) if length is None else length
    kind = np.result_type(*arrays)
    padded = np.full((len(arrays), length, *arrays[0].shape[1:]), value, kind)
    for number, (row, array) in enumerate(zip(padded, arrays)):
        if len(array) > length or array.shape[1:] != padded.shape[2:]:
            raise DataError(f"sequence {number} does not fit into [{length}, "
                            f"{', '.join(map(str, padded.shape[2:]))}]", shapes=[array.shape])
        row[:len(array)] = array
    return padded, np.arange(length) < steps[:, None]


class Sequences:
    """Rows of unequal length as a data set: what is a list of arrays [steps, ...] is padded to the longest of
    its batch; what is an array has one entry for each row and is taken as it is.

    mask: the name of bool [rows, steps], true where a step is no padding; None for none. multiple: pads to a
    multiple of so many steps. value: what is padded with, one for all or by name. `lengths` (of each row) is
    what ``Minibatches(..., lengths=)`` sorts by. DataError where the lists differ in a row's steps, by its
    number, or a mask given as data has another length than its row.
    """

    def __init__(self, data: Mapping[str, Any], *, mask: str | None = "mask", multiple: int = 1,
                 value: float | Mapping[str, float] = 0) -> None:
        self.padded = {k: [np.asarray(row) for row in v] for k, v in data.items()
                       if isinstance(v, (list, tuple)) and len(v) and np.ndim(v[0]) > 0}
        self.plain = {k: _rows_of(k, v) for k, v in data.items() if k not in self.padded}
        if not self.padded:
            raise DataError("none of the data is a list of sequences",
                            hint="arrays of one shape need no padding")
        if mask in data:
            raise UseError(f"{mask!r} is the name of the mask that is made, and of data",
                           hint="mask=None leaves it out, mask='another' names it otherwise")
        if multiple < 1:
            raise UseError(f"multiple is {multiple!r}; it must be an integer of 1 or more")
        self.mask, self.multiple = mask, multiple
        self.values = {k: value.get(k, 0) if isinstance(value, Mapping) else value for k in self.padded}
        counts = {k: len(v) for k, v in (self.padded | self.plain).items()}
        if len(set(counts.values())) > 1:
            raise DataError("the data have different numbers of rows: "
                            + ", ".join(f"'{k}' {n}" for k, n in counts.items()))
        self.lengths = self._lengths()

    def _lengths(self) -> np.ndarray:
        """The steps of each row, after checking that its sequences agree in them, and in their other axes."""
        first = next(iter(self.padded))
        for name, rows in self.padded.items():
            for number, (row, other) in enumerate(zip(rows, self.padded[first])):
                if row.ndim == 0 or row.shape[1:] != rows[0].shape[1:]:
                    raise DataError(f"row {number} of '{name}' is {list(row.shape)}, the first "
                                    f"{list(rows[0].shape)}: only the number of steps may differ")
                if len(row) != len(other):
                    raise DataError(f"row {number}: '{name}' has {len(row)} steps, '{first}' has "
                                    f"{len(other)}")
        return np.array([len(row) for row in self.padded[first]])

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    def take_rows(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, padded to one length, with their mask."""
        longest = int(self.lengths[rows].max())
        length = max(-(-longest // self.multiple) * self.multiple, 1)
        batch: Batch = {name: array[rows] for name, array in self.plain.items()}
        for name, values in self.padded.items():
            batch[name], mask = pad([values[row] for row in rows], length, self.values[name])
            if self.mask is not None:
                batch[self.mask] = mask
        return batch
