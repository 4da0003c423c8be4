"""The model: a net with its loss, optimizer and metrics, trained and used through NumPy arrays."""
from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.plan.dims import Dim
from graphflow.compiler.plan.dtypes import I64
from graphflow.compiler.plan.errors import FeedError, TrainingError, UseError
from graphflow.data import Minibatches
from graphflow.function import Program, as_feed, function
from graphflow.optim import Optimizer
from graphflow.runtime.store import SEED, Store
from graphflow.scope import here
from graphflow.tensor import Tensor

EPOCH = "epoch"
"""The Store's entry for the number of epochs trained, so that a checkpoint goes on where it was saved."""

Batches = Iterable[Mapping[str, np.ndarray]]
Data = Any
"""Arrays by position (inputs, then targets), by feed name, or as `gf.data.Minibatches` that name the
feeds."""


class History(dict[str, list[float]]):
    """What `Model.fit` measured: a list with one number for each epoch under "loss", the metrics' names, the
    same after "validation_" if there was validation data, and "seconds"."""

    def __str__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.items() if values)
        return f"{len(self.get('loss', []))} epochs: {last}"


class Model:
    """A net to train and use: three programs over one Store.

    inputs, targets: a Tensor or a list of them, from `gf.input`. outputs: a Tensor, list or dict of what
    `predict` gives. loss: the scalar to minimise. metrics: further scalars by name. The programs are
    ``model.step`` (one training step), ``model.evaluation`` and ``model.prediction``; each is compiled when
    it is first used. Without a loss there is only the last, without an optimizer no `step`.
    """

    def __init__(self, inputs: Tensor | Sequence[Tensor], outputs: Any, loss: Tensor | None = None, *,
                 targets: Tensor | Sequence[Tensor] = (), optimizer: Optimizer | None = None,
                 metrics: Mapping[str, Tensor] | None = None, device: str = "cpu", seed: int = 0,
                 threads: int | None = None) -> None:
        self.inputs, self.targets = _tensors(inputs), _tensors(targets)
        self.store = Store(seed)
        self.store.declare(EPOCH, "step", I64, (), 0)
        self._step: Program | None = None
        self._evaluation: Program | None = None
        self._measures: dict[str, Tensor] = {}
        common: dict[str, Any] = {"device": device, "store": self.store, "threads": threads}
        if loss is not None:
            self._measures = {"loss": loss, **(metrics or {})}
            _check_scalars(self._measures)
            feeds = [*self.inputs, *self.targets]
            if optimizer is not None:
                self._step = function(feeds, self._measures, optimizer.minimize(loss), name="step", **common)
            self._evaluation = function(feeds, self._measures, name="evaluate", training=False, **common)
        elif metrics or optimizer:
            raise UseError("a Model with metrics or an optimizer needs a loss", where=here())
        _check_rows(outputs)
        self.prediction = function(self.inputs, outputs, name="predict", training=False, **common)

    @property
    def step(self) -> Program:
        """The program of one training step; UseError without an optimizer."""
        if self._step is None:
            raise UseError("this Model has no optimizer, so it cannot be trained", where=here(),
                           hint="gf.Model(..., loss, optimizer=gf.optim.SGD(0.1))")
        return self._step

    @property
    def evaluation(self) -> Program:
        """The program that computes loss and metrics; UseError without a loss."""
        if self._evaluation is None:
            raise UseError("this Model has no loss, so there is nothing to evaluate", where=here(),
                           hint="gf.Model(inputs, outputs, loss, targets=...)")
        return self._evaluation

    @property
    def main(self) -> Program:
        """The training step, or without an optimizer the prediction: what dumps and checkpoints are about."""
        return self._step or self.prediction

    @property
    def epoch(self) -> int:
        """How many epochs have been trained."""
        return int(self.store[EPOCH])

    def summary(self) -> str:
        """The parameters: name, type, number of elements, and their sum."""
        rows = [self.store.entry(name) for name in self.store.names("parameter")]
        lines = [f"{e.name:<24}{e.dtype}{list(e.shape)!s:<20}{e.size:>12,}" for e in rows]
        return "\n".join([*lines, f"{'parameters':<48}{sum(e.size for e in rows):>12,}"])

    def fit(self, data: Data, epochs: int = 1, batch_size: int | None = None, *, validation: Data = None,
            shuffle: bool = True, progress: bool | None = None) -> History:
        """Trains for so many epochs; loss and metrics are means over the samples seen.

        batch_size: 32, or what the inputs declare. The order of the rows follows from the model's seed and
        the number of the epoch, so training in two halves, with a checkpoint between, gives the same bits as
        in one. progress: a bar on the terminal; by default if there is one. TrainingError once the loss is
        NaN or infinite.
        """
        if not isinstance(epochs, int) or epochs < 0:
            raise UseError(f"epochs is {epochs!r}", where=here(), hint="use an integer >= 0")
        step = self.step
        batches = self._batches(data, batch_size, shuffle, [*self.inputs, *self.targets])
        held_out = None if validation is None else self._batches(validation, batch_size, False,
                                                                 [*self.inputs, *self.targets])
        history = History()
        for _ in range(epochs):
            start = time.perf_counter()
            if isinstance(batches, Minibatches):
                batches.epoch = self.epoch
            means = self._train_epoch(step, batches, progress)
            if held_out is not None:
                means.update((f"validation_{k}", v) for k, v in self._measure(held_out).items())
            self.store[EPOCH] = self.epoch + 1
            means["seconds"] = time.perf_counter() - start
            for name, value in means.items():
                history.setdefault(name, []).append(value)
        return history

    def _train_epoch(self, step: Program, batches: Batches, progress: bool | None) -> dict[str, float]:
        from tqdm import tqdm
        means, last = _Means(self._measures), math.nan
        # None: tqdm looks whether there is a terminal
        hidden = None if progress is None else not progress
        with tqdm(batches, desc=f"epoch {self.epoch + 1}", disable=hidden, leave=True) as bar:
            for number, batch in enumerate(bar, 1):
                results = step(**batch)
                loss = float(results["loss"])
                if not math.isfinite(loss):
                    raise self._diverged(loss, number, last)
                last = loss
                means.add(results, len(next(iter(batch.values()))))
                if not bar.disable:
                    bar.set_postfix_str(f"loss {means.result()['loss']:.4f}", refresh=False)
        return means.result()

    def _diverged(self, loss: float, number: int, last: float) -> TrainingError:
        before = "it was the first" if math.isnan(last) else f"the last finite loss was {last:.6g}"
        return TrainingError(f"the loss is {loss} in epoch {self.epoch + 1}, step {number}; {before}",
                             where=_origin(self._measures["loss"]),
                             hint="try a smaller learning rate; the parameters are spoilt now: build the "
                                  "model "
                             "again, or load a checkpoint")

    def evaluate(self, data: Data, batch_size: int | None = None) -> dict[str, float]:
        """The loss and the metrics on the data, as means over the samples; nothing is trained, nothing
        dropped."""
        return self._measure(self._batches(data, batch_size, False, [*self.inputs, *self.targets]))

    def _measure(self, batches: Batches) -> dict[str, float]:
        means = _Means(self._measures)
        for batch in batches:
            means.add(self.evaluation(**batch), len(next(iter(batch.values()))))
        return means.result()

    def predict(self, data: Data, batch_size: int | None = None) -> Any:
        """The outputs for the inputs in `data` (an array, a list of arrays, or a dict), computed batch by
        batch."""
        batches = self._batches(data, batch_size, False, self.inputs)
        parts = [self.prediction(**batch) for batch in batches]
        if isinstance(parts[0], dict):
            return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        if isinstance(parts[0], list):
            return [np.concatenate(column) for column in zip(*parts)]
        return np.concatenate(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, optimizer slots, seed, step and epoch to a safetensors file, whole or not at
        all."""
        self.store.save(path, self.main.fingerprint())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces all of these by the file's; CheckpointError, and nothing changed, if it holds another net.

        Warns if the checkpoint comes from another program or device: then training goes on, but the bits may
        differ from those of a run without a break.
        """
        metadata = self.store.load(path)
        if metadata.get("plan") not in ("", None, self.main.fingerprint()):
            warnings.warn(f"{os.fspath(path)} was saved by another program or device: results may differ in "
                          "the "
                          "last bits from those of an unbroken run", stacklevel=2)

    def _batches(self, data: Data, batch_size: int | None, shuffle: bool, tensors: Sequence[Tensor]
                 ) -> Batches:
        """Minibatches of arrays that are checked here: names, types, and that all numbers are finite."""
        ready = data if isinstance(data, Minibatches) else None
        arrays = _named_arrays(ready.arrays if ready else data, tensors)
        for t in tensors:
            arrays[t.name] = as_feed(t.value.node, arrays[t.name])
            _check_finite(t, arrays[t.name])
        if ready:
            return ready
        size = _batch_size(tensors, batch_size, len(arrays[tensors[0].name]))
        return Minibatches(arrays, size, shuffle=shuffle, seed=int(self.store[SEED]))


class _Means:
    """Means of a program's outputs over batches, weighted by the batches' sizes."""

    def __init__(self, names: Iterable[str]) -> None:
        self.totals, self.count = dict.fromkeys(names, 0.0), 0

    def add(self, results: Mapping[str, Any], count: int) -> None:
        for name in self.totals:
            self.totals[name] += float(results[name]) * count
        self.count += count

    def result(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.totals.items()} if self.count else {}


def _tensors(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def _origin(t: Tensor) -> Any:
    return t.value.node.origins[0] if t.value.node.origins else None


def _check_scalars(measures: Mapping[str, Tensor]) -> None:
    for name, t in measures.items():
        if not isinstance(t, Tensor):
            raise UseError(f"{name} is {t!r}, not a Tensor", where=here())
        if t.shape:
            raise UseError(f"{name} is no scalar", shapes=[t.shape], where=here(),
                           hint="reduce it to its mean over the batch with gf.mean")


def _check_rows(outputs: Any) -> None:
    listed = outputs.values() if isinstance(outputs, Mapping) else _tensors(outputs)
    if any(isinstance(t, Tensor) and not t.shape for t in listed):
        raise UseError("an output of a Model has one row for each row of the inputs, so it is no scalar",
                       where=here(), hint="scalars of a batch are metrics")


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
                        hint="pass a tuple of arrays or "
                        "a dict by name")
    missing, surplus = [n for n in names if n not in arrays], [n for n in arrays if n not in names]
    if missing or surplus:
        what = f"the data misses {missing[0]!r}" if missing else f"there is no feed {surplus[0]!r}"
        raise FeedError(what, where=here(), hint=f"the feeds are {', '.join(names)}")
    return arrays


def _check_finite(t: Tensor, array: np.ndarray) -> None:
    """FeedError with the first place where there is NaN or infinity."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    raise FeedError(f"feed {t.name!r}: {array[place]} at {list(place)}", where=_origin(t),
                    hint="the data must be finite: remove or replace such rows")


def _batch_size(tensors: Sequence[Tensor], wish: int | None, rows: int) -> int:
    """The rows of a batch: as wished, else as declared, else 32."""
    fixed = {t.shape[0] for t in tensors if t.shape and not isinstance(t.shape[0], Dim)}
    if not fixed:
        return 32 if wish is None else wish
    size = min(fixed)
    if len(fixed) > 1 or wish not in (None, size) or rows % size:
        raise UseError(f"the inputs are declared with batches of {', '.join(map(str, sorted(fixed)))}; "
                       f"{rows} rows in "
                       f"batches of {wish or size} do not fit that", where=here(),
                       hint="declare the batch as a dimension: N = gf.dim('N')")
    return size
