"""The training loop: callbacks, early stopping, checkpoints and going on from them, histories, Ctrl-C."""
from __future__ import annotations

import csv
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.history import RATES
from graphflow.training import Training

RNG = np.random.default_rng(9)
X = RNG.standard_normal((70, 4)).astype(np.float32)
Y = X[:, :3].argmax(1)
HELD = RNG.standard_normal((30, 4)).astype(np.float32)
HELD_Y = HELD[:, :3].argmax(1)


def build(device: str = "reference", seed: int = 2, rate: float = 0.02) -> gf.Model:
    n = gf.dim("N")
    x, y = gf.input("x", (n, 4)), gf.input("y", (n,), "int64")
    h = gf.nn.dropout(gf.nn.dense(x, 8, gf.nn.relu), 0.2)
    logits = gf.nn.dense(h, 3)
    return gf.Model(x, gf.softmax(logits), gf.loss.softmax_cross_entropy(logits, y), targets=y,
                    optimizer=gf.optim.Adam(rate), device=device, seed=seed,
                    metrics={"accuracy": gf.metrics.accuracy(logits, y),
                             "matrix": gf.metrics.confusion_matrix(logits, y)})


def state(model: gf.Model) -> dict[str, bytes]:
    return {name: model.store[name].tobytes() for name in model.store}


def measured(history: gf.History) -> dict[str, list[float]]:
    return {name: values for name, values in history.items() if name not in RATES}


class Stop(Exception):
    pass


class At(gf.Callback):
    """Does something after so many steps in all."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, training: Training) -> None:
        if training.model.store["rng.step"] == self.step:
            self.act()


def stop() -> None:
    raise Stop


# --- going on from a checkpoint

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", [{"every_steps": 1}, {"every_steps": 4}, {}], ids=str)
def test_training_broken_off_anywhere_ends_with_the_same_bits(
        device: str, every: dict[str, Any], tmp_path: Path) -> None:
    def train(model: gf.Model, act: Any, checkpoints: gf.Checkpoints | None = None) -> gf.History:
        return model.fit((X, Y), 3, 9, validation=(HELD, HELD_Y), callbacks=act, checkpoints=checkpoints)

    whole = build(device)
    expected = train(whole, At(-1, stop))
    for step in (2, 9, 16, 17, 24):
        checkpoints = gf.Checkpoints(tmp_path / str(step), **every)
        with pytest.raises(Stop):
            train(build(device), At(step, stop), checkpoints)
        seed = 77 if checkpoints.latest() else 2      # a checkpoint brings its seed
        again = build(device, seed)
        history = train(again, At(-1, stop), checkpoints)
        assert state(again) == state(whole), step
        assert measured(history) == measured(expected), step


def test_a_finished_training_is_not_repeated_and_can_be_made_longer(tmp_path: Path) -> None:
    def train(model: gf.Model, epochs: int, folder: str) -> gf.History:
        return model.fit((X, Y), epochs, 9, validation=0.2, checkpoints=tmp_path / folder,
                         callbacks=gf.EarlyStopping(40))

    first, again, longer, whole = (build() for _ in range(4))
    expected = train(first, 3, "a")
    assert train(again, 3, "a") == expected and state(again) == state(first)
    assert measured(train(longer, 6, "a")) == measured(train(whole, 6, "b"))
    assert state(longer) == state(whole)


def test_fit_goes_on_after_fit_with_its_own_count_of_epochs(tmp_path: Path) -> None:
    model, other = build(), build()
    model.fit((X, Y), 2, 9)
    history = model.fit((X, Y), 3, 9, checkpoints=tmp_path)
    assert history.epochs == 3 and model.epoch == 5
    other.fit((X, Y), 2, 9)
    assert other.fit((X, Y), 3, 9, checkpoints=tmp_path) == history and state(other) == state(model)


def test_how_often_checkpoints_are_written_and_how_many_are_kept(tmp_path: Path) -> None:
    def steps(**options: Any) -> list[int]:
        folder = tmp_path / str(options)
        build().fit((X, Y), 3, 9, checkpoints=gf.Checkpoints(folder, **options))
        return [int(p.stem.removeprefix("step-")) for p in sorted(folder.iterdir())]

    assert steps(keep=9) == [8, 16, 24] and steps() == [16, 24] and steps(keep=1) == [24]
    assert steps(every_epochs=2, keep=9) == [16, 24]
    assert steps(every_epochs=None, every_steps=5, keep=9) == [5, 10, 15, 20, 24]
    assert steps(every_epochs=None, every_seconds=1e-9, keep=99) == list(range(1, 25))
    assert steps(every_epochs=None, every_seconds=1e9, keep=99) == [24]


def test_resume_can_be_declined(tmp_path: Path) -> None:
    build().fit((X, Y), 3, 9, checkpoints=gf.Checkpoints(tmp_path, keep=9))
    other = build(seed=8)
    history = other.fit((X, Y), 1, 9, checkpoints=gf.Checkpoints(tmp_path, resume=False))
    assert history.epochs == 1 and other.store.seed == 8
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008.safetensors"]


def test_checkpoints_of_other_training_are_refused(tmp_path: Path) -> None:
    build().fit((X, Y), 1, 9, checkpoints=tmp_path)
    with pytest.raises(gf.CheckpointError, match="8 batches an epoch, the data now make 7"):
        build().fit((X, Y), 2, 10, checkpoints=tmp_path)
    with pytest.raises(gf.CheckpointError, match="with other callbacks: none"):
        build().fit((X, Y), 2, 9, checkpoints=tmp_path, callbacks=gf.EarlyStopping())
    with pytest.warns(UserWarning, match="saved by another program"):
        build(rate=0.5).fit((X, Y), 2, 9, checkpoints=tmp_path)
    model = build()
    model.save(tmp_path / "step-99999999.safetensors")
    with pytest.raises(gf.CheckpointError, match="holds no state of a training"):
        build().fit((X, Y), 2, 9, checkpoints=tmp_path)
    (tmp_path / "step-99999999.safetensors").write_bytes(b"rubbish")
    with pytest.raises(gf.CheckpointError, match="step-99999999.safetensors: not a whole checkpoint"):
        build().fit((X, Y), 2, 9, checkpoints=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(gf.CheckpointError, match="cannot be used for checkpoints"):
        build().fit((X, Y), 2, 9, checkpoints=tmp_path / "file")


def test_a_model_loads_a_checkpoint_of_training(tmp_path: Path) -> None:
    trained, model = build(), build()
    trained.fit((X, Y), 2, 9, checkpoints=tmp_path, validation=0.3, callbacks=gf.EarlyStopping(5, mode="max"))
    report = model.load(gf.Checkpoints(tmp_path).latest() or "")
    assert report.loaded == model.store.names() and not report.faults()
    assert model.epoch == 2 and model.store["rng.step"] == trained.store["rng.step"]


@pytest.mark.parametrize("options, message", [
    ({"every_steps": 0}, "every_steps is 0"), ({"every_epochs": -1}, "every_epochs is -1"),
    ({"every_seconds": 0}, "every_seconds is 0"), ({"keep": 0}, "keep is 0"), ({"keep": 1.5}, "keep is 1.5")])
def test_wrong_numbers_of_checkpoints(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gf.UseError, match=message):
        gf.Checkpoints("nowhere", **options)


# --- Ctrl-C

def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupt_saves_and_can_be_gone_on_from(device: str, tmp_path: Path) -> None:
    whole, broken, again = build(device), build(device), build(device)
    expected = whole.fit((X, Y), 3, 9, callbacks=At(-1, press))
    before = signal.getsignal(signal.SIGINT)
    seldom = gf.Checkpoints(tmp_path, every_epochs=None)
    with pytest.raises(KeyboardInterrupt):
        broken.fit((X, Y), 3, 9, callbacks=At(11, press), checkpoints=seldom)
    assert signal.getsignal(signal.SIGINT) is before
    assert broken.store["rng.step"] == 11 and broken.history.epochs == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000011.safetensors"]
    history = again.fit((X, Y), 3, 9, callbacks=At(-1, press), checkpoints=seldom)
    assert measured(history) == measured(expected)
    assert state(again) == state(whole)


def test_an_interrupt_while_validating(tmp_path: Path) -> None:
    class Pressing:
        """Validation data that press Ctrl-C."""

        def __init__(self) -> None:
            self.asked = 0

        def __len__(self) -> int:
            return 2

        def batches(self, epoch: int, start: int = 0) -> Any:
            self.asked += 1
            if self.asked == 2:
                press()
            yield from ({"x": HELD[:20], "y": HELD_Y[:20]}, {"x": HELD[20:], "y": HELD_Y[20:]})

    whole, broken, again = (build() for _ in range(3))
    expected = whole.fit((X, Y), 3, 9, validation=(HELD, HELD_Y))
    with pytest.raises(KeyboardInterrupt):
        broken.fit((X, Y), 3, 9, validation=Pressing(), checkpoints=tmp_path)
    assert broken.epoch == 1 and broken.store["rng.step"] == 16
    history = again.fit((X, Y), 3, 9, validation=(HELD, HELD_Y), checkpoints=tmp_path)
    np.testing.assert_allclose(history["validation_loss"], expected["validation_loss"], rtol=1e-6)
    assert history["loss"] == expected["loss"] and state(again) == state(whole)


def test_a_second_interrupt_does_not_wait() -> None:
    def twice() -> None:
        press()
        press()
        raise AssertionError("it waited")

    with pytest.raises(KeyboardInterrupt):
        build().fit((X, Y), 1, 9, callbacks=At(3, twice))


def test_signals_are_left_alone_outside_the_main_thread_and_with_a_handler_of_ones_own() -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(build().fit((X, Y), 1, 9)))
    thread.start()
    thread.join()
    assert seen[0].epochs == 1
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        build().fit((X, Y), 1, 9, callbacks=At(2, press))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[1] == "mine"


# --- callbacks

class Log(gf.Callback):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, training: Training) -> None:
        self.calls.append(("start", training.resumed))

    def on_step_end(self, training: Training) -> None:
        assert math.isfinite(float(training.results["loss"]))
        self.calls.append((training.epoch, training.step))

    def on_epoch_end(self, training: Training) -> None:
        self.calls.append((training.epoch, training.history.epochs, training.model.epoch))

    def on_end(self, training: Training) -> None:
        self.calls.append("end")

    def state(self) -> dict[str, Any]:
        return {"calls": len(self.calls), "array": np.arange(3), "scalar": np.float32(1.5),
                "deep": {"a": [1, "b"]}}

    def restore(self, state: Any) -> None:
        self.restored = state


def test_callbacks_are_called_in_order_and_keep_their_state(tmp_path: Path) -> None:
    log, epochs = Log(), []
    build().fit((X, Y), 2, 40, callbacks=[log, lambda training: epochs.append(training.epoch)],
                checkpoints=tmp_path)
    assert log.calls == [("start", False), (1, 1), (1, 2), (1, 1, 1), (2, 1), (2, 2), (2, 2, 2), "end"]
    assert epochs == [1, 2]
    again = Log()
    build().fit((X, Y), 3, 40, callbacks=[again, epochs.append], checkpoints=tmp_path)
    assert again.calls == [("start", True), (3, 1), (3, 2), (3, 3, 3), "end"]
    assert again.restored["calls"] == 7 and again.restored["deep"] == {"a": [1, "b"]}
    np.testing.assert_array_equal(again.restored["array"], [0, 1, 2])


def test_a_callback_may_stop_training_and_fail() -> None:
    model = build()
    history = model.fit((X, Y), 9, 9, callbacks=lambda training: training.epoch == 2 and training.stop())
    assert history.epochs == 2
    with pytest.raises(gf.UseError, match="3 is no callback"):
        model.fit((X, Y), 1, callbacks=[3])  # type: ignore[list-item]
    with pytest.raises(Stop):
        model.fit((X, Y), 1, callbacks=At(int(model.store["rng.step"]) + 1, stop))


def test_an_epoch_in_which_training_was_stopped_is_finished_after_an_interruption(tmp_path: Path) -> None:
    class StopThenFail(gf.Callback):
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def on_step_end(self, training: Training) -> None:
            if training.step == 3:
                training.stop()
            if training.step == 5 and self.fails:
                raise Stop

    whole, broken, again = (build() for _ in range(3))
    expected = whole.fit((X, Y), 3, 9, callbacks=StopThenFail(False))
    every = gf.Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(Stop):
        broken.fit((X, Y), 3, 9, callbacks=StopThenFail(True), checkpoints=every)
    history = again.fit((X, Y), 3, 9, callbacks=StopThenFail(False), checkpoints=every)
    assert measured(history) == measured(expected) and history.epochs == 1 and state(again) == state(whole)


def test_a_state_that_no_checkpoint_keeps(tmp_path: Path) -> None:
    class Odd(gf.Callback):
        def state(self) -> dict[str, Any]:
            return {"a": {1, 2}}

    with pytest.raises(gf.UseError, match="a callback's state holds {1, 2}"):
        build().fit((X, Y), 1, callbacks=Odd(), checkpoints=tmp_path)


# --- early stopping

def losses(values: list[float], stopping: gf.EarlyStopping) -> tuple[int, int]:
    """(epochs trained, epoch whose parameters came back) where the epochs measure these values."""
    model, weights = build(), {}

    def pretend(training: Training) -> None:
        training.history["pretended"] = values[:training.history.epochs]
        weights[training.epoch] = model.store["dense.W"]

    history = model.fit((X, Y), len(values), 35, callbacks=[pretend, stopping])
    back = [e for e, w in weights.items() if w.tobytes() == model.store["dense.W"].tobytes()]
    assert len(back) == 1
    return history.epochs, back[0]


@pytest.mark.parametrize("values, options, expected", [
    ([5, 4, 3, 2, 1], {}, (5, 5)), ([5, 3, 4, 4, 2], {}, (4, 2)), ([5, 3, 4, 2, 4, 3], {}, (6, 4)),
    ([1, 1, 1, 1], {}, (3, 1)), ([5, 4.9, 4.8, 4.7], {"min_delta": 0.15}, (4, 3)),
    ([5, 4.9, 4.88, 4.7], {"min_delta": 0.15}, (3, 1)), ([1, 2, 3, 2, 2, 9], {"mode": "max"}, (5, 3)),
    ([5, 3, 4, 4, 2], {"restore_best": False}, (4, 4)), ([5, math.nan, math.nan, 1], {}, (3, 1))])
def test_early_stopping_keeps_the_best(
        values: list[float], options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert losses(values, gf.EarlyStopping(2, "pretended", **options)) == expected


@pytest.mark.parametrize("values, epochs", [([5, 1, 3, 3, 3, 3, 0], 5), ([5, 4, 3, 2, 3, 3, 1], 7)])
def test_early_stopping_goes_on_from_a_checkpoint(values: list[float], epochs: int, tmp_path: Path) -> None:
    def pretend(training: Training) -> None:
        training.history["pretended"] = values[:training.history.epochs]

    def train(model: gf.Model, step: int, folder: str) -> gf.History:
        callbacks = [pretend, gf.EarlyStopping(3, "pretended"), At(step, stop)]
        return model.fit((X, Y), 7, 35, callbacks=callbacks, checkpoints=tmp_path / folder)

    whole = build()
    assert train(whole, -1, "whole").epochs == epochs
    for step in range(3, 2 * epochs):
        with pytest.raises(Stop):
            train(build(), step, str(step))
        again = build()
        assert train(again, -1, str(step)).epochs == epochs
        assert state(again) == state(whole)


def test_early_stopping_watches_validation_if_there_is_any() -> None:
    model = build(rate=0.3)
    stopping = gf.EarlyStopping(3)
    history = model.fit((X, Y), 200, 9, validation=(HELD, HELD_Y), callbacks=stopping)
    assert history.epochs < 200 and stopping.best == min(history["validation_loss"])
    assert stopping.best_epoch == history.epochs - 3
    assert model.evaluate((HELD, HELD_Y))["loss"] == pytest.approx(stopping.best, rel=1e-6)
    plain = gf.EarlyStopping(3)
    history = build(rate=0.3).fit((X, Y), 200, 9, callbacks=plain)
    assert plain.best == min(history["loss"])
    with pytest.raises(gf.UseError, match="watches 'f1', which is not measured"):
        build().fit((X, Y), 1, callbacks=gf.EarlyStopping(3, "f1"))
    for bad in ({"patience": 0}, {"mode": "best"}):
        with pytest.raises(gf.UseError, match="patience is 0|mode is 'best'"):
            gf.EarlyStopping(**bad)  # type: ignore[arg-type]


# --- what is measured

def test_a_share_is_held_out() -> None:
    history = build().fit((X, Y), 1, 9, validation=0.2)
    train, held = gf.data.split((X, Y), (0.8, 0.2), seed=2)
    other = build()
    expected = other.fit(train, 1, 9, validation=held)
    assert measured(history) == measured(expected) and len(held[0]) == 14
    for share in (0.0, 1.5):
        with pytest.raises(gf.UseError, match="holds out a share"):
            build().fit((X, Y), 1, validation=share)
    with pytest.raises(gf.UseError, match="holds out a share"):
        build().fit(gf.data.Minibatches({"x": X, "y": Y}, 9), 1, validation=0.2)


def test_matrices_are_evaluated_and_left_out_of_the_history() -> None:
    model = build()
    history = model.fit((X, Y), 2, 9, validation=(HELD, HELD_Y))
    assert list(history) == ["loss", "accuracy", "validation_loss", "validation_accuracy", *RATES]
    assert model.evaluate((X, Y), 9)["matrix"].sum() == 70
    assert all(rate > 0 for rate in history["steps_per_second"])


def test_curves_as_a_table_and_a_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = build().fit((X, Y), 3, 9, validation=(HELD, HELD_Y))
    history.to_csv(tmp_path / "curves.csv")
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {k: [float(row[k]) for row in rows] for k in history} == history
    pytest.importorskip("matplotlib")
    figure = history.plot(tmp_path / "curves.svg")
    assert "svg" in (tmp_path / "curves.svg").read_text()[:200]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    for axes, name in zip(figure.axes, ("loss", "accuracy")):
        for line, key in zip(axes.lines, (name, f"validation_{name}"), strict=True):
            assert list(line.get_ydata()) == history[key] and list(line.get_xdata()) == [1, 2, 3]
    with pytest.raises(gf.UseError, match="no epoch to draw"):
        gf.History().plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(gf.UseError, match="needs matplotlib") as caught:
        history.plot()
    assert caught.value.hint == "pip install 'graphflow[plot]'"


# --- kinds of data

def test_a_data_set_and_batches_train_as_arrays_do() -> None:
    arrays = {"x": X, "y": Y}
    expected = build()
    expected.fit((X, Y), 2, 9)
    for data in (gf.data.Arrays(arrays), gf.data.Minibatches(arrays, 9, seed=2),
                 gf.data.Minibatches({**arrays, "z": Y}, 9, seed=2, workers=2),
                 gf.data.Stream(lambda epoch: gf.data.Minibatches(arrays, 9, seed=2).batches(epoch), 8)):
        model = build()
        model.fit(data, 2, 9)
        assert state(model) == state(expected)
        assert model.evaluate(data, 9)["loss"] == pytest.approx(expected.evaluate((X, Y))["loss"], rel=1e-6)
    ordered = gf.data.Minibatches(arrays, 9, shuffle=False)
    np.testing.assert_array_equal(model.predict(ordered), expected.predict(X, 9))


@pytest.mark.parametrize("data, message", [
    (gf.data.Minibatches({"x": X}, 9), "the data misses 'y'"),
    (gf.data.Stream(lambda epoch: iter([{"x": X}]), 1), "the data misses 'y'"),
    (gf.data.Stream(lambda epoch: iter([{"x": X.astype("f8"), "y": Y}]), 1), "must be float32, got float64"),
    (gf.data.Stream(lambda epoch: iter([{"x": X * np.inf, "y": Y}]), 1), r"feed 'x': -?inf at \[0, 0\]"),
    (iter([X]), "an iterator can be passed over once only"),
    (gf.data.Sequences({"x": [[1, 2], [3]], "y": [0, 1]}), "must be float32|must have rank 2|axes")])
def test_data_that_are_no_feeds(data: Any, message: str) -> None:
    with pytest.raises(gf.FeedError, match=message):
        build().fit(data, 1)
