"""The model: training against a loop over the step by hand, checkpoints, measures, and what it refuses."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import special

import graphflow as gf

RNG = np.random.default_rng(2)
X = RNG.standard_normal((150, 4)).astype(np.float32)
Y = X[:, :3].argmax(1)


def build(device: str = "reference", dropout: float = 0.0, optimizer: Any = None, **options: Any) -> gf.Model:
    n = gf.dim("N")
    x, y = gf.input("x", (n, 4)), gf.input("y", (n,), "int64")
    h = gf.nn.dropout(gf.nn.dense(x, 16, gf.nn.relu), dropout)
    logits = gf.nn.dense(h, 3)
    return gf.Model(x, gf.softmax(logits), gf.loss.softmax_cross_entropy(logits, y), targets=y,
                    optimizer=optimizer or gf.optim.Adam(0.02),
                    metrics={"accuracy": gf.metrics.accuracy(logits, y)},
                    device=device, **options)


def state(model: gf.Model) -> dict[str, list[Any]]:
    return {name: model.store[name].tolist() for name in model.store}


@pytest.mark.parametrize("device", DEVICES)
def test_fit_learns(device: str) -> None:
    model = build(device)
    history = model.fit((X, Y), 30, validation={"x": X[:50], "y": Y[:50]})
    assert len(history["loss"]) == 30 and history["loss"][-1] < history["loss"][0] / 2
    assert history["validation_accuracy"][-1] > 0.9
    assert model.epoch == 30 and model.store["rng.step"] == 30 * 5
    assert str(history).startswith("30 epochs: loss 0.")


@pytest.mark.parametrize("device", DEVICES)
def test_measures_are_means_over_samples(device: str) -> None:
    model = build(device)
    p = model.predict(X, batch_size=64)
    expected = -np.log(p[np.arange(150), Y].astype(np.float64)).mean()
    for size in (7, 64, 150):
        found = model.evaluate((X, Y), size)
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(found["accuracy"], (p.argmax(1) == Y).mean(), rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_prediction_is_the_net(device: str) -> None:
    model = build(device, dropout=0.5)
    s = model.store
    h = np.maximum(X @ s["dense.W"] + s["dense.b"], 0)
    expected = special.softmax(h @ s["dense_1.W"] + s["dense_1.b"], axis=1)
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-5, atol=1e-6)


def test_fit_without_shuffling_is_a_loop_over_the_step() -> None:
    by_hand, fitted = build(), build()
    losses = []
    for start in range(0, 150, 32):
        losses.append(float(by_hand.step(X[start:start + 32], Y[start:start + 32])["loss"]))
    history = fitted.fit((X, Y), 1, 32, shuffle=False)
    np.testing.assert_allclose(history["loss"][0], np.average(losses, weights=[32, 32, 32, 32, 22]),
                               rtol=1e-6)
    assert state(fitted) == {**state(by_hand), "epoch": 1}


@pytest.mark.parametrize("device", DEVICES)
def test_training_resumed_from_a_checkpoint_has_the_same_bits(device: str, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    whole, first, second = (build(device, dropout=0.3, seed=5) for _ in range(3))
    whole.fit((X, Y), 4)
    first.fit((X, Y), 2)
    first.save(path)
    second.load(path)
    assert second.epoch == 2
    second.fit((X, Y), 2)
    assert state(second) == state(whole)


def test_another_seed_shuffles_and_starts_otherwise() -> None:
    one, same, other = build(seed=1), build(seed=1), build(seed=2)
    losses = [m.fit((X, Y), 1)["loss"] for m in (one, same, other)]
    assert losses[0] == losses[1] != losses[2]


def test_loading_under_another_program_warns(tmp_path: Path) -> None:
    build(optimizer=gf.optim.SGD(0.1)).save(tmp_path / "a")
    with pytest.warns(UserWarning, match="saved by another program"):
        build(optimizer=gf.optim.SGD(0.2)).load(tmp_path / "a")


def test_a_checkpoint_of_another_net_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    build(optimizer=gf.optim.SGD(0.1)).save(tmp_path / "a")
    model = build()
    before = state(model)
    with pytest.raises(gf.CheckpointError, match=r"another net:\n(.*\n)*?  adam.step is missing"):
        model.load(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"rubbish")
    with pytest.raises(gf.CheckpointError):
        model.load(tmp_path / "b")
    with pytest.raises(gf.CheckpointError, match="nothing.safetensors"):
        model.load(tmp_path / "nothing.safetensors")
    assert state(model) == before


def test_a_loss_that_is_not_finite_stops() -> None:
    n = gf.dim("N")
    x, y = gf.input("x", (n, 1)), gf.input("y", (n, 1))
    loss = gf.loss.mean_squared_error(gf.nn.dense(x, 1), y)
    model = gf.Model(x, x, loss, targets=y, optimizer=gf.optim.SGD(1e20), device="reference")
    ones = np.ones((4, 1), np.float32)
    with pytest.raises(gf.TrainingError, match=r"the loss is (inf|nan) in epoch \d, step \d; (the last|it "
                                               r"was)") as e:
        model.fit((ones, ones), 5, 2)
    assert e.value.where is not None and "mean_squared_error" in e.value.where.source()


def test_data_by_position_by_name_or_as_minibatches() -> None:
    for data in ((X, Y), [X, Y], {"y": Y, "x": X}, gf.data.Minibatches({"x": X, "y": Y}, 32)):
        model = build(seed=3)
        model.fit(data, 1, 32)
        assert model.store["rng.step"] == 5


def test_several_inputs_and_outputs() -> None:
    n = gf.dim("N")
    a, b = gf.input("a", (n, 2)), gf.input("b", (n, 2))
    model = gf.Model([a, b], {"sum": a + b, "first": a[:, 0]}, device="reference")
    found = model.predict([X[:, :2], X[:, 2:]], 64)
    np.testing.assert_array_equal(found["sum"], X[:, :2] + X[:, 2:])
    np.testing.assert_array_equal(found["first"], X[:, 0])
    listed = gf.Model([a, b], [a - b], device="reference").predict({"b": X[:, 2:], "a": X[:, :2]})
    np.testing.assert_array_equal(listed[0], X[:, :2] - X[:, 2:])


def test_a_batch_of_a_declared_size() -> None:
    x = gf.input("x", (10, 4))
    model = gf.Model(x, gf.sum(x, 1), device="reference")
    np.testing.assert_allclose(model.predict(X), X.sum(1), rtol=1e-5)
    with pytest.raises(gf.UseError, match="batches of 10; 149 rows"):
        model.predict(X[1:])


def test_summary_counts_parameters() -> None:
    lines = build().summary().splitlines()
    assert lines[0].split() == ["dense.W", "f32[4,", "16]", "64"]
    assert lines[-1].split() == ["parameters", "131"]


@pytest.mark.parametrize("act, message", [
    (lambda m: m.fit((X, Y), -1), "epochs is -1"), (lambda m: m.fit((X, Y), batch_size=0), "batch_size is 0"),
    (lambda m: m.fit(X), "one array for the feeds x, y"), (lambda m: m.fit((X, Y, Y)),
                                                           "3 arrays for 2 feeds"),
    (lambda m: m.fit({"x": X}), "the data misses 'y'"), (lambda m: m.fit({"x": X, "y": Y, "z": Y}),
                                                         "no feed 'z'"),
    (lambda m: m.fit((X, Y[:9])), "different numbers of rows"), (lambda m: m.fit((X[:0], Y[:0])),
                                                                 "have no rows"),
    (lambda m: m.fit((X.astype("f8"), Y)), "feed 'x': must be float32, got float64"),
    (lambda m: m.fit((X, Y + 3)), "feed 'y': the labels must lie in 0..2"),
    (lambda m: m.predict(X[:, :3]), "axis 1 must be 4, got 3"),
    (lambda m: m.fit((np.where(X == X[7, 1], np.nan, X), Y)), r"feed 'x': nan at \[7, 1\]"),
    (lambda m: m.predict(np.where(X == X[7, 1], -np.inf, X)), r"feed 'x': -inf at \[7, 1\]")])
def test_wrong_data_is_refused(act: Any, message: str) -> None:
    model = build()
    before = state(model)
    with pytest.raises(gf.UserError, match=message):
        act(model)
    assert state(model) == before


def test_a_model_lacks_what_it_was_not_given() -> None:
    x = gf.input("x", (None, 2))
    model = gf.Model(x, x, device="reference")
    with pytest.raises(gf.UseError, match="has no optimizer"):
        model.fit(X[:, :2])
    with pytest.raises(gf.UseError, match="has no loss"):
        model.evaluate(X[:, :2])
    with pytest.raises(gf.UseError, match="needs a loss"):
        gf.Model(x, x, optimizer=gf.optim.SGD(0.1))
    with pytest.raises(gf.UseError, match="loss is no scalar"):
        gf.Model(x, x, gf.sum(x, 1))
    with pytest.raises(gf.UseError, match="no scalar"):
        gf.Model(x, gf.sum(x))


def test_a_bar_is_drawn_only_where_it_is_wanted(capsys: Any) -> None:
    build().fit((X, Y), 1)
    assert capsys.readouterr().err == ""
    build().fit((X, Y), 1, progress=True)
    assert "epoch 1" in capsys.readouterr().err
