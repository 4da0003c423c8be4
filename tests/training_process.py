"""Training as a process of its own, for test_kill.py: `training_process.py FOLDER`.

It takes a step for each byte on its standard input, and any number once that is closed, so that whoever
started it can stop it where it likes. What came of it is written to FOLDER/result.npz.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import graphflow as gf


class Leash(gf.Callback):
    """Says when the first step is done, the slow one, and waits for the byte of each step."""

    def on_start(self, training: gf.training.Training) -> None:
        self.said = False

    def on_step_end(self, training: gf.training.Training) -> None:
        if not self.said:
            print("ready", flush=True)
            self.said = True
        sys.stdin.buffer.read(1)


def main(folder: Path) -> None:
    rng = np.random.default_rng(7)
    images = rng.random((90, 1, 6, 6), np.float32)
    labels = (images[:, 0, :3].mean((1, 2)) > images[:, 0, 3:].mean((1, 2))).astype(np.int64)
    n = gf.dim("N")
    x, y = gf.input("x", (n, 1, 6, 6)), gf.input("y", (n,), "int64")
    h = gf.nn.dropout(gf.nn.dense(gf.nn.flatten(x), 12, gf.nn.relu), 0.2)
    logits = gf.nn.dense(h, 2)
    model = gf.Model(x, gf.softmax(logits), gf.loss.softmax_cross_entropy(logits, y), targets=y,
                     optimizer=gf.optim.Adam(0.01), seed=3,
                     metrics={"accuracy": gf.metrics.accuracy(logits, y), "f1": gf.metrics.f1(logits, y)})
    train = gf.data.Minibatches({"x": images[:70], "y": labels[:70]}, 8, seed=5, workers=2, transforms={
        "x": [gf.data.augment.Shift(1), gf.data.augment.Flip(), gf.data.augment.Noise(0.1)]})
    history = model.fit(train, 60, validation=(images[70:], labels[70:]), progress=False,
                        callbacks=[Leash(), gf.EarlyStopping(50)],
                        checkpoints=gf.Checkpoints(folder, every_steps=3))
    measured = {k: v for k, v in history.items() if k not in gf.history.RATES}
    np.savez(folder / "result.npz", history=json.dumps(measured),
             **{name: model.store[name] for name in model.store})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
