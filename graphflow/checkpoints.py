"""Checkpoints of training: when they are written, which are kept, and what is in them beside the Store."""
from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphflow.compiler.plan.errors import CheckpointError, UseError
from graphflow.scope import here

SUFFIX = ".safetensors"

ARRAY = "array of the checkpoint"
"""The key under which the JSON of a training's state names an array."""


class Checkpoints:
    """A folder of checkpoints that `Model.fit` writes and from which it goes on.

    A checkpoint holds all that training needs: parameters, optimizer slots, statistics, seed and step, the
    epoch and the place in it, the sums of the running epoch's measures, the History, and the callbacks'
    states. So training that was interrupted in whatever way, and started again with the same data and the
    same arguments, ends with the same bits as one that was not.

    They are written after every so many steps, epochs or seconds, at the end, and on Ctrl-C; each appears
    whole or not at all, is flushed to the disk, and the last `keep` stay. A folder serves one call of `fit`,
    which a finished training in it ends at once; resume=False begins anew, and removes what the folder has.
    The files are named after the training step: step-00001234.safetensors.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every_epochs: int | None = 1,
                 every_steps: int | None = None, every_seconds: float | None = None, keep: int = 2,
                 resume: bool = True) -> None:
        for word, number in (("every_epochs", every_epochs), ("every_steps", every_steps), ("keep", keep)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise UseError(f"{word} is {number!r}", where=here(), hint="use an integer >= 1")
        if every_seconds is not None and not every_seconds > 0:
            raise UseError(f"every_seconds is {every_seconds!r}", where=here(), hint="use a number > 0")
        self.folder, self.keep, self.resume = Path(folder), keep, resume
        self.every_epochs, self.every_steps, self.every_seconds = every_epochs, every_steps, every_seconds
        self._written = time.monotonic()

    def due(self, step: int, epoch: int, epoch_end: bool) -> bool:
        """Whether to write one now, after so many steps and epochs in all."""
        if epoch_end and self.every_epochs is not None and epoch % self.every_epochs == 0:
            return True
        if self.every_seconds is not None and time.monotonic() - self._written >= self.every_seconds:
            return True
        return not epoch_end and self.every_steps is not None and step % self.every_steps == 0

    def path(self, step: int) -> Path:
        """Where the checkpoint of this training step lies."""
        return self.folder / f"step-{step:08d}{SUFFIX}"

    def written(self, path: Path) -> None:
        """Notes that this one was written, and removes those that are no longer kept."""
        self._written = time.monotonic()
        others = [p for p in self.files() if p != path]
        for old in others[:max(0, len(others) - self.keep + 1)]:
            old.unlink(missing_ok=True)

    def begin(self) -> Path | None:
        """The checkpoint to go on from, None to begin anew; makes the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".checkpoint-*.tmp"):       # of a process that was killed
                left.unlink(missing_ok=True)
            if not self.resume:
                for old in self.files():
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be used for checkpoints: {error.strerror}"
                                  ) from error
        self._written = time.monotonic()
        return self.latest()

    def latest(self) -> Path | None:
        """The newest checkpoint in the folder, None if it has none."""
        files = self.files()
        return files[-1] if files else None

    def files(self) -> list[Path]:
        """The checkpoints in the folder, the oldest first."""
        found = ((re.fullmatch(rf"step-(\d+){re.escape(SUFFIX)}", p.name), p)
                 for p in self.folder.glob("step-*"))
        return [p for _, p in sorted((int(match[1]), p) for match, p in found if match)]


def packed(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """(arrays by name, JSON of the rest) of nested dicts and lists of arrays, numbers and text."""
    arrays: dict[str, np.ndarray] = {}

    def take_out(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise UseError(f"a callback's state holds {value!r}: a checkpoint keeps arrays, numbers and text")
        name = f"training/{len(arrays)}"
        arrays[name] = value
        return {ARRAY: name}

    return arrays, json.dumps(state, default=take_out)


def unpacked(arrays: Mapping[str, np.ndarray], text: str) -> dict[str, Any]:
    """What `packed` was given; CheckpointError if the text is damaged."""
    try:
        return json.loads(text, object_hook=lambda d: arrays[d[ARRAY]] if ARRAY in d else d)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the state of training is damaged: {error!r}") from error
