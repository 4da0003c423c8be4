"""The model: a net with its loss, optimizer and metrics, trained and used through NumPy arrays."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.checkpoints import Checkpoints
from graphflow.compiler.plan.dims import symbols_of
from graphflow.compiler.plan.dtypes import I64
from graphflow.compiler.plan.errors import UseError
from graphflow.data.batches import Batches
from graphflow.data.sets import split
from graphflow.feeding import Data, Feeds, as_feeds, closing
from graphflow.function import Program, function
from graphflow.history import History
from graphflow.metrics import Metric, Totals, outputs_of
from graphflow.optim import Optimizer
from graphflow.runtime.loading import Choice, Loaded, Rename
from graphflow.runtime.store import SEED, Store
from graphflow.scope import here
from graphflow.tensor import Tensor
from graphflow.training import EPOCH, CallbackLike, Training, warn_of_another_program


class Model:
    """A net to train and use: three programs over one Store.

    inputs, targets: a Tensor or a list of them, from `gf.input`. outputs: a Tensor, list or dict of what
    `predict` gives. loss: the scalar to minimise. metrics: by name, from `gf.metrics`, or scalars that are
    means over the batch. device, threads, tune: as for `gf.function`. The programs are ``model.step`` (one
    training step), ``model.evaluation`` and ``model.prediction``; each is compiled when it is first used.
    Without a loss there is only the last, without an optimizer no `step`.
    """

    def __init__(self, inputs: Tensor | Sequence[Tensor], outputs: Any, loss: Tensor | None = None, *,
                 targets: Tensor | Sequence[Tensor] = (), optimizer: Optimizer | None = None,
                 metrics: Mapping[str, Tensor | Metric] | None = None, device: str = "cpu", seed: int = 0,
                 threads: int | None = None, tune: bool | Mapping[str, int] = False) -> None:
        self.inputs, self.targets = _tensors(inputs), _tensors(targets)
        self._feeds = [*self.inputs, *self.targets]
        self.store = Store(seed)
        self.store.declare(EPOCH, "step", I64, (), 0)
        self._step: Program | None = None
        self._evaluation: Program | None = None
        self.measures: dict[str, Tensor | Metric] = {}
        self.history = History()
        self.loss_origins = loss.value.node.origins if isinstance(loss, Tensor) else ()
        common: dict[str, Any] = {"device": device, "store": self.store, "threads": threads, "tune": tune}
        if loss is not None:
            self.measures = {"loss": loss, **(metrics or {})}
            _check_measures(self.measures)
            wanted = outputs_of(self.measures)
            if optimizer is not None:
                self._step = function(self._feeds, wanted, optimizer.minimize(loss), name="step", **common)
            self._evaluation = function(self._feeds, wanted, name="evaluate", training=False, **common)
        elif metrics or optimizer:
            raise UseError("a Model with metrics or an optimizer needs a loss", where=here())
        if loss is not None and isinstance(tune, Mapping):        # some dimensions are of targets alone
            own = symbols_of(*(d for t in self.inputs for d in t.shape))
            common["tune"] = {name: size for name, size in tune.items() if name in own}
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
            shuffle: bool = True, callbacks: CallbackLike | Sequence[CallbackLike] = (),
            checkpoints: Checkpoints | str | os.PathLike[str] | None = None, progress: bool | None = None,
            ) -> History:
        """Trains for so many epochs and returns what was measured, which is also `history`.

        data: arrays, a `gf.data.Dataset`, or `gf.data.Batches` such as `gf.data.Minibatches`. validation:
        such data too, measured after each epoch; or a share of `data` (arrays or a Dataset) that is held
        out. batch_size: 32, or what the inputs declare. The order of the rows follows from the model's seed
        and the number of the epoch, so training in two halves, with a checkpoint between, gives the same
        bits as in one.

        callbacks: `gf.Callback`s such as `gf.EarlyStopping`, or functions called at the end of each epoch.
        checkpoints: a folder, or `gf.Checkpoints`; if it holds one, training goes on from there until
        `epochs` are done in all. progress: a bar on the terminal; by default if there is one. TrainingError
        once the loss is NaN or infinite. Ctrl-C lets the running step end, saves a checkpoint if there are
        any, and raises KeyboardInterrupt; `history` has what was measured so far.
        """
        if not isinstance(epochs, int) or epochs < 0:
            raise UseError(f"epochs is {epochs!r}", where=here(), hint="use an integer >= 0")
        _ = self.step                                     # UseError without an optimizer, before all else
        if isinstance(checkpoints, (str, os.PathLike)):
            checkpoints = Checkpoints(checkpoints)
        listed = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        training = Training(self, listed, checkpoints)
        training.resume()
        seed = int(self.store[SEED])
        if isinstance(validation, float):
            if isinstance(data, Batches) or not 0 < validation < 1:
                raise UseError(f"validation={validation} holds out a share, from 0 to 1, of arrays or a "
                               "Dataset", where=here(),
                               hint="gf.data.split cuts data in two; pass the second part")
            data, validation = split(data, (1 - validation, validation), seed)
        train = as_feeds(data, self._feeds, batch_size, shuffle, seed)
        held_out = None if validation is None else as_feeds(validation, self._feeds, batch_size, False, seed)
        self.history = training.history
        return training.run(train, held_out, epochs, progress)

    def evaluate(self, data: Data, batch_size: int | None = None) -> dict[str, Any]:
        """The loss and the metrics on the data, over all samples; nothing is trained, nothing dropped. The
        loss is the mean of the batches' losses, weighted by their samples."""
        return self.measure(as_feeds(data, self._feeds, batch_size, False, int(self.store[SEED])))

    def measure(self, feeds: Feeds, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """As `evaluate`, on batches that are feeds already; `between` is called after each."""
        program, totals = self.evaluation, Totals(self.measures)
        with closing(feeds) as batches:
            for batch in batches:
                totals.add(program(**batch), feeds.rows(batch))
                between()
        return totals.results()

    def predict(self, data: Data, batch_size: int | None = None) -> Any:
        """The outputs for the inputs in `data`, computed batch by batch: arrays as to `fit`, without the
        targets, or batches, whose other feeds are left out."""
        feeds = as_feeds(data, self.inputs, batch_size, False, int(self.store[SEED]))
        with closing(feeds) as batches:
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

    def load(self, path: str | os.PathLike[str], *, rename: Rename | None = None, only: Choice | None = None,
             strict: bool = True) -> Loaded:
        """Replaces all of these by the file's; CheckpointError, and nothing changed, if it holds another net.
        Checkpoints of `fit` are read too.

        rename, only, strict: to load a part, as `gf.Store.load` says; for another task, say
        ``only=model.store.names("parameter"), strict=False``. Returns what was loaded and what not. Warns if
        a whole checkpoint comes from another program or device: then training goes on, but the bits may
        differ from those of a run without a break.
        """
        loaded = self.store.load(path, rename=rename, only=only, strict=strict)
        if strict and rename is None and only is None:
            warn_of_another_program(os.fspath(path), loaded.metadata, self)
        return loaded


def _tensors(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def _check_measures(measures: Mapping[str, Tensor | Metric]) -> None:
    for name, t in measures.items():
        if isinstance(t, Metric):
            continue
        if not isinstance(t, Tensor):
            raise UseError(f"{name} is {t!r}, neither a Metric nor a Tensor", where=here())
        if t.shape:
            raise UseError(f"{name} is no scalar", shapes=[t.shape], where=here(),
                           hint="reduce it to its mean over the batch with gf.mean, or make a "
                                "gf.metrics.Metric")


def _check_rows(outputs: Any) -> None:
    listed = outputs.values() if isinstance(outputs, Mapping) else _tensors(outputs)
    if any(isinstance(t, Tensor) and not t.shape for t in listed):
        raise UseError("an output of a Model has one row for each row of the inputs, so it is no scalar",
                       where=here(), hint="scalars of a batch are metrics")
