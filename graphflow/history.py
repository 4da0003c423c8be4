"""What training measured, epoch by epoch: as lists, as a table in a file, as curves."""
from __future__ import annotations

import csv
import os
from typing import Any

from graphflow.compiler.plan.errors import UseError

RATES = ("seconds", "steps_per_second")
"""What a History tells of the machine rather than of the net."""

_VALIDATION = "validation_"


class History(dict[str, list[float]]):
    """What `Model.fit` measured: a list with one number for each epoch under "loss", the metrics' names, the
    same after "validation_" if there was validation data, "seconds" (all of the epoch) and
    "steps_per_second" (of training alone). Metrics that are arrays are left out."""

    def __str__(self) -> str:
        """The number of epochs and the last values."""
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.items() if values)
        return f"{self.epochs} epochs: {last}"

    @property
    def epochs(self) -> int:
        """The number of epochs."""
        return len(self.get("loss", []))

    def add(self, values: dict[str, Any]) -> None:
        """Appends what an epoch measured."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.setdefault(name, []).append(float(value))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes a table: the epoch's number, then a column for each name; a row for each epoch."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", *self])
            for epoch, row in enumerate(zip(*self.values()), 1):
                writer.writerow([epoch, *map(repr, row)])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws a panel for the loss and each metric, for training and validation data, into a matplotlib
        Figure, which is returned, and saved if a `path` is given (its ending decides the format). UseError
        without matplotlib or epochs."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UseError("drawing curves needs matplotlib", hint="pip install 'graphflow[plot]'") from None
        names = [n for n in self if n not in RATES and not n.startswith(_VALIDATION)]
        if not names:
            raise UseError("there is no epoch to draw", hint="train with Model.fit first")
        figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(1, len(names), place)
            for key, label in ((name, "training"), (_VALIDATION + name, "validation")):
                if key in self:
                    axes.plot(range(1, len(self[key]) + 1), self[key], label=label)
            axes.set_xlabel("epoch")
            axes.set_ylabel(name)
            axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure
