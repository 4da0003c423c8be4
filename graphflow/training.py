"""The training loop: epochs, steps, validation, callbacks, checkpoints, and going on after an
interruption."""
from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphflow.callbacks import Callback
from graphflow.checkpoints import Checkpoints, packed, unpacked
from graphflow.compiler.plan.errors import CheckpointError, TrainingError, UseError
from graphflow.feeding import Feeds, closing
from graphflow.history import History
from graphflow.metrics import Totals
from graphflow.runtime.steps import Interrupts
from graphflow.runtime.store import STEP

if TYPE_CHECKING:
    from graphflow.model import Model

STATE = "training"
"""The name of the training's state among a checkpoint's metadata."""

EPOCH = "epoch"
"""The Store's entry for the number of epochs trained, so that a checkpoint goes on where it was saved."""

CallbackLike = Callback | Callable[["Training"], Any]


class Training:
    """One call of `Model.fit`: what callbacks see.

    model; history: the epochs so far; epoch: the number of the running epoch of the model, from 1; step: the
    steps done in it; results: the last step's outputs (the loss and the metrics' sums); resumed: whether this
    went on from a checkpoint.
    """

    def __init__(self, model: Model, callbacks: Sequence[CallbackLike], checkpoints: Checkpoints | None,
                 ) -> None:
        self.model, self.checkpoints = model, checkpoints
        self.callbacks = [_as_callback(c) for c in callbacks]
        self.history = History()
        self.epoch, self.step, self.results = model.epoch + 1, 0, {}  # type: ignore[var-annotated]
        self.resumed = self.stopped = False
        self._first, self._seconds, self._batches = model.epoch, 0.0, 0
        self._totals = Totals(model.measures)
        self._saved: tuple[int, int] | None = None

    def stop(self) -> None:
        """Ends training after this epoch."""
        self.stopped = True

    # --- the loop

    def resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        path = self.checkpoints.begin() if self.checkpoints else None
        if path is not None:
            self._restore(path)

    def run(self, train: Feeds, held_out: Feeds | None, epochs: int, progress: bool | None) -> History:
        """Trains until so many epochs are done, counted from where this training first began."""
        if self.resumed and self._batches != len(train):
            raise CheckpointError(f"the checkpoint is of training with {self._batches} batches an epoch, the "
                                  f"data now make {len(train)}",
                                  hint="go on with the same data and batch_size")
        self._batches = len(train)
        end = self._first + epochs
        with Interrupts() as interrupts:
            self._call("on_start")
            while self.model.epoch < end and not (self.stopped and self.step == 0):
                self._run_epoch(train, held_out, interrupts, progress)
            if self.checkpoints and self._saved != self._place():
                self._save()                        # before on_end, so that more epochs can follow to the bit
            self._call("on_end")
            self._leave(interrupts, time.perf_counter())
        return self.history

    def _run_epoch(self, train: Feeds, held_out: Feeds | None, interrupts: Interrupts, progress: bool | None,
                   ) -> None:
        start = time.perf_counter() - self._seconds
        self.epoch = self.model.epoch + 1
        self._train_epoch(train, interrupts, progress, start)
        trained = time.perf_counter() - start
        values = self._totals.results()
        if held_out is not None:
            found = self.model.measure(held_out, lambda: self._leave(interrupts, start))
            values.update((f"validation_{name}", value) for name, value in found.items())
        self.history.add({**values, "seconds": time.perf_counter() - start,
                          "steps_per_second": self.step / trained if trained else math.nan})
        self.model.store[EPOCH] = self.epoch
        self.step, self._seconds, self._totals = 0, 0.0, Totals(self.model.measures)
        self._call("on_epoch_end")
        self._keep(True)
        self._leave(interrupts, time.perf_counter())

    def _train_epoch(self, train: Feeds, interrupts: Interrupts, progress: bool | None, start: float) -> None:
        from tqdm import tqdm
        last = math.nan
        # None: tqdm looks whether there is a terminal
        hidden = None if progress is None else not progress
        with closing(train, self.epoch - 1, self.step) as batches, \
                tqdm(batches, f"epoch {self.epoch}", len(train), disable=hidden, initial=self.step) as bar:
            for batch in bar:
                self.results = self.model.step(**batch)
                self.step += 1
                loss = float(self.results["loss"])
                if not math.isfinite(loss):
                    raise self._diverged(loss, last)
                last = loss
                self._totals.add(self.results, train.rows(batch))
                self._seconds = time.perf_counter() - start
                self._call("on_step_end")
                self._keep(False)
                self._leave(interrupts, start)
                if not bar.disable:
                    bar.set_postfix_str(f"loss {self._totals.value('loss'):.4f}", refresh=False)

    def _diverged(self, loss: float, last: float) -> TrainingError:
        before = "it was the first" if math.isnan(last) else f"the last finite loss was {last:.6g}"
        origins = self.model.loss_origins
        return TrainingError(f"the loss is {loss} in epoch {self.epoch}, step {self.step}; {before}",
                             where=origins[0] if origins else None,
                             hint="try a smaller learning rate; the parameters are spoilt now: build the "
                                  "model again, or load a checkpoint")

    def _call(self, method: str) -> None:
        for callback in self.callbacks:
            getattr(callback, method)(self)

    def _leave(self, interrupts: Interrupts, start: float) -> None:
        """Ctrl-C: saves, then raises KeyboardInterrupt."""
        if not interrupts.raised:
            return
        self._seconds = time.perf_counter() - start
        if self.checkpoints and self._saved != self._place():
            self._save()
        raise KeyboardInterrupt

    # --- checkpoints

    def _place(self) -> tuple[int, int]:
        return self.model.epoch, self.step

    def _keep(self, epoch_end: bool) -> None:
        done = int(self.model.store[STEP])
        if self.checkpoints and self.checkpoints.due(done, self.model.epoch, epoch_end):
            self._save()

    def _save(self) -> None:
        assert self.checkpoints is not None
        path = self.checkpoints.path(int(self.model.store[STEP]))
        arrays, text = packed({
            "first": self._first, "step": self.step, "batches": self._batches, "seconds": self._seconds,
            "stopped": self.stopped, "history": self.history, "totals": self._totals.state(),
            "callbacks": [[type(c).__name__, c.state()] for c in self.callbacks]})
        self.model.store.save(path, self.model.main.fingerprint(), arrays, {STATE: text})
        self.checkpoints.written(path)
        self._saved = self._place()

    def _restore(self, path: Path) -> None:
        """Everything as it was when the checkpoint was written."""
        loaded = self.model.store.load(path)
        if STATE not in loaded.metadata:
            raise CheckpointError(f"{path} holds no state of a training", hint="Model.load reads it")
        warn_of_another_program(path, loaded.metadata, self.model)
        state = unpacked(loaded.extra, loaded.metadata[STATE])
        names = [type(c).__name__ for c in self.callbacks]
        if [name for name, _ in state["callbacks"]] != names:
            raise CheckpointError(f"{path} is of training with other callbacks: "
                                  f"{', '.join(name for name, _ in state['callbacks']) or 'none'}",
                                  hint=f"now there are {', '.join(names) or 'none'}")
        self._first, self.step, self._batches = state["first"], state["step"], state["batches"]
        self._seconds, self.stopped = state["seconds"], state["stopped"]
        self.history.update(state["history"])
        self._totals.restore(state["totals"])
        for callback, (_, kept) in zip(self.callbacks, state["callbacks"]):
            callback.restore(kept)
        self.resumed, self.epoch = True, self.model.epoch + 1
        self._saved = self._place()


class _AtEpochEnd(Callback):
    """A plain function as a Callback."""

    def __init__(self, function: Callable[[Training], Any]) -> None:
        self.function = function

    def on_epoch_end(self, training: Training) -> None:
        self.function(training)


def _as_callback(given: CallbackLike) -> Callback:
    if isinstance(given, Callback):
        return given
    if callable(given):
        return _AtEpochEnd(given)
    raise UseError(f"{given!r} is no callback", hint="pass a gf.Callback or a function of the training")


def warn_of_another_program(path: Any, metadata: Mapping[str, str], model: Model) -> None:
    """Warns if a checkpoint was written by another program or device."""
    if metadata.get("plan") not in ("", None, model.main.fingerprint()):
        warnings.warn(f"{path} was saved by another program or device: results may differ in the last bits "
                      "from those of an unbroken run", stacklevel=4)
