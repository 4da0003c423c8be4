"""What may be done while a Model trains: functions of one's own, and early stopping."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from graphflow.compiler.plan.errors import UseError
from graphflow.scope import here

if TYPE_CHECKING:
    from graphflow.training import Training


class Callback:
    """Methods that `Model.fit` calls; a class of one's own replaces those that it needs.

    Each gets the `Training`: its `model`, `history`, the number of the `epoch`, the `step` within it, the
    last step's `results`, and `stop()`. Instead of a Callback, a plain function of the Training may be
    given: it is called at the end of each epoch. What must survive an interruption goes through `state` and
    `restore`.
    """

    def on_start(self, training: Training) -> None:
        """Before the first epoch, or before going on after an interruption."""

    def on_step_end(self, training: Training) -> None:
        """After each step: `training.results` has the loss."""

    def on_epoch_end(self, training: Training) -> None:
        """After each epoch: `training.history` has it."""

    def on_end(self, training: Training) -> None:
        """After the last epoch; not after an error."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: arrays, and what JSON can hold."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""


class EarlyStopping(Callback):
    """Ends training when a measure has not become better for `patience` epochs, and restores the best epoch's
    parameters and statistics (the optimizer's slots stay as they are).

    monitor: a name of the History, by default "validation_loss", or "loss" without validation data. mode:
    "min" or "max", what is better. min_delta: a change that is no larger counts as none. restore_best=False
    keeps the last epoch's parameters.
    """

    def __init__(self, patience: int = 5, monitor: str | None = None, *, mode: str = "min",
                 min_delta: float = 0.0, restore_best: bool = True) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise UseError(f"patience is {patience!r}", where=here(), hint="use an integer >= 1")
        if mode not in ("min", "max"):
            raise UseError(f"mode is {mode!r}", where=here(), hint="use 'min' or 'max'")
        self.patience, self.monitor, self.mode = patience, monitor, mode
        self.min_delta, self.restore_best = min_delta, restore_best
        self._reset()

    def _reset(self) -> None:
        self.best, self.best_epoch, self.waited = math.nan, 0, 0
        self._weights: dict[str, np.ndarray] = {}

    def on_start(self, training: Training) -> None:
        """Forgets an earlier training."""
        if not training.resumed:
            self._reset()

    def on_epoch_end(self, training: Training) -> None:
        """Compares the epoch with the best one."""
        history = training.history
        name = self.monitor or ("validation_loss" if "validation_loss" in history else "loss")
        if name not in history:
            raise UseError(f"early stopping watches {name!r}, which is not measured",
                           hint=f"measured are {', '.join(history)}")
        value = history[name][-1]
        gain = (self.best - value) * (1 if self.mode == "min" else -1)
        if math.isnan(self.best) or gain > self.min_delta:
            self.best, self.best_epoch, self.waited = value, training.epoch, 0
            if self.restore_best:
                store = training.model.store
                names = [*store.names("parameter"), *store.names("statistic")]
                self._weights = {name: store[name] for name in names}
        else:
            self.waited += 1
            if self.waited >= self.patience:
                training.stop()

    def on_end(self, training: Training) -> None:
        """Restores the best epoch's parameters."""
        for name, value in self._weights.items():
            training.model.store[name] = value

    def state(self) -> dict[str, Any]:
        """The best measure, its epoch and its parameters, and the epochs since."""
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited,
                **{f"best:{name}": value for name, value in self._weights.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.best, self.best_epoch = float(state["best"]), int(state["best_epoch"])
        self.waited = int(state["waited"])
        self._weights = {k.removeprefix("best:"): v for k, v in state.items() if k.startswith("best:")}
