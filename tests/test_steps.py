"""`Program.run`: many steps in one call, against calls one after the other."""
from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf

X = np.random.default_rng(0).standard_normal((7, 5, 20)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 10, (7, 5))


def net(device: str) -> gf.Program:
    x, labels, rate = gf.input("x", (None, 20)), gf.input("labels", (None,), "int64"), gf.input("rate", ())
    logits = gf.nn.dense(gf.nn.dropout(gf.nn.dense(x, 16, gf.relu), 0.3), 10)
    loss = gf.loss.softmax_cross_entropy(logits, labels)
    return gf.function([x, labels, rate], {"loss": loss, "logits": logits}, gf.optim.SGD(rate).minimize(loss),
                       device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_those_of_calls(device: str) -> None:
    one, many = net(device), net(device)
    expected = [one(x, labels, 0.1) for x, labels in zip(X, LABELS)]
    found = many.run(X[:4], LABELS[:4], 0.1)
    for name in found:
        np.testing.assert_array_equal(found[name], [np.asarray(e[name]) for e in expected[:4]])
    found = many.run(np.asfortranarray(X[4:]), rate=np.full(3, 0.1, np.float32), labels=LABELS[4:], steps=3)
    for name in found:
        np.testing.assert_array_equal(found[name], [np.asarray(e[name]) for e in expected[4:]])
    for name in one.store.names():
        np.testing.assert_array_equal(one.store[name], many.store[name])


@pytest.mark.parametrize("device", DEVICES)
def test_a_check_tells_its_step(device: str) -> None:
    program, labels = net(device), LABELS.copy()
    labels[3, 0] = 10
    with pytest.raises(gf.FeedError, match="step 3 of 7, counted from 0: feed 'labels': the labels must lie"):
        program.run(X, labels, 0.1)
    assert program.store["rng.step"] == 3


@pytest.mark.parametrize("device", DEVICES)
def test_without_inputs(device: str) -> None:
    w = gf.parameter((2,), 1.0, name="w")
    program = gf.function([], w * 2.0, {w: w + 1.0}, device=device)
    np.testing.assert_array_equal(program.run(steps=3), [[2, 2], [4, 4], [6, 6]])


@pytest.mark.parametrize("feeds, steps, said", [
    ((X, LABELS[:3], 0.1), None, "feed 'labels' has 3 steps along its first axis, but feed 'x' has 7"),
    ((X, LABELS, 0.1), 3, "feed 'x' has 7 steps along its first axis, but steps is 3"),
    ((X[0], LABELS[0], 0.1), None, "no feed has an axis of steps"),
    ((X[None], LABELS, 0.1), None, "feed 'x' has the shape"),
    ((X[:0], LABELS[:0], 0.1), None, "feed 'x' has no steps"),
    ((X, LABELS, 0.1), 0, "steps is 0"),
    ((X, LABELS), None, "misses the feed 'rate'"),
    ((X[:, :, :19], LABELS, 0.1), None, "axis 1 must be 20, got 19"),
    ((X, LABELS.astype(float), 0.1), None, "feed 'labels': must be int64"),
])
def test_faults(feeds: tuple[object, ...], steps: int | None, said: str) -> None:
    with pytest.raises((gf.FeedError, gf.UseError), match=said):
        net("cpu").run(*feeds, steps=steps)


@pytest.mark.cpu
def test_ctrl_c_leaves_whole_steps(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    w = gf.parameter((), 0, name="w", dtype="int64")
    x = gf.input("x", (), "int64")
    program = gf.function([x], w, {w: w + x})
    program(1)

    def press() -> None:
        while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            time.sleep(0.001)  # the steps have not begun
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match=r"function: \d+ of 50000000 steps are done") as caught:
        program.run(1, steps=50_000_000)
    assert program.store["w"] == int(str(caught.value).split()[1]) + 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.cpu
def test_prints_of_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    x = gf.input("x", ())
    program = gf.function([x], gf.print("x is", x) + 1.0)
    program.run(np.arange(3, dtype=np.float32))
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["0.0", "1.0", "2.0"]
