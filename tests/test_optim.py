"""Optimizers against their formulas in NumPy, run for several steps on a problem whose gradient is known."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf

START = np.array([1.0, -2.0, 3.0, 0.5])
SCALE = np.array([1.0, 0.5, 2.0, 4.0])
STEPS = 6


def gradient(p: np.ndarray) -> np.ndarray:
    """Of sum(SCALE p² + p): 2 SCALE p + 1."""
    return 2 * SCALE * p + 1


def sgd(p: np.ndarray) -> Iterator[np.ndarray]:
    while True:
        p = p - 0.05 * gradient(p)
        yield p


def momentum(p: np.ndarray, nesterov: bool = False) -> Iterator[np.ndarray]:
    m = np.zeros(4)
    while True:
        g = gradient(p)
        m = 0.9 * m + g
        p = p - 0.05 * (g + 0.9 * m if nesterov else m)
        yield p


def rmsprop(p: np.ndarray) -> Iterator[np.ndarray]:
    v = np.zeros(4)
    while True:
        g = gradient(p)
        v = 0.95 * v + 0.05 * g * g
        p = p - 0.05 * g / (np.sqrt(v) + 1e-8)
        yield p


def adam(p: np.ndarray) -> Iterator[np.ndarray]:
    m, v, t = np.zeros(4), np.zeros(4), 0
    while True:
        g = gradient(p)
        t += 1
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p - 0.05 * m / (1 - 0.9 ** t) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
        yield p


def lion(p: np.ndarray) -> Iterator[np.ndarray]:
    m = np.zeros(4)
    while True:
        g = gradient(p)
        p = p - 0.05 * 0.3 * p - 0.05 * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        yield p


def penalised(p: np.ndarray) -> Iterator[np.ndarray]:
    while True:
        p = p - 0.05 * (gradient(p) + 0.3 * p + 0.2 * np.sign(p))
        yield p


def thresholded(p: np.ndarray) -> Iterator[np.ndarray]:
    """One number starts so near to 0 that it stays there."""
    while True:
        p = p - 0.05 * gradient(p)
        p = np.sign(p) * np.maximum(np.abs(p) - 0.05 * 1.2, 0)
        yield p


CASES = [(gf.optim.SGD(0.05), sgd(START)), (gf.optim.SGD(0.05, 0.9), momentum(START)),
         (gf.optim.SGD(0.05, 0.9, nesterov=True), momentum(START, True)),
         (gf.optim.RMSprop(0.05, 0.95), rmsprop(START)), (gf.optim.Adam(0.05), adam(START)),
         (gf.optim.Lion(0.05, weight_decay=0.3), lion(START)),
         (gf.optim.SGD(0.05, l1=0.2, l2=0.3), penalised(START)),
         (gf.optim.SGD(0.05, l1_proximal=1.2), thresholded(START))]
NAMES = ["sgd", "momentum", "nesterov", "rmsprop", "adam", "lion", "penalties", "proximal"]


def minimised(optimizer: gf.optim.Optimizer, device: str, dtype: str = "float32",
              **options: Any) -> gf.Program:
    p = gf.parameter((4,), START, "p", dtype)
    loss = gf.sum(p * p * SCALE + p)
    return gf.function(options.pop("inputs", []), loss, optimizer.minimize(loss), device=device, **options)


TRACKS = [[next(formula) for _ in range(STEPS)] for _, formula in CASES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-6)])
def test_optimizers_follow_their_formulas(device: str, case: int, dtype: str, tolerance: float) -> None:
    step = minimised(CASES[case][0], device, dtype)
    for expected in TRACKS[case]:
        step()
        np.testing.assert_allclose(step.store["p"], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_the_learning_rate_may_be_fed(device: str) -> None:
    lr = gf.input("lr", ())
    step = minimised(gf.optim.SGD(lr), device, inputs=[lr])
    p = START
    for rate in (0.1, 0.01, 0.0):
        step(rate)
        p = p - rate * gradient(p)
        np.testing.assert_allclose(step.store["p"], p, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_parameters_given_are_updated(device: str) -> None:
    a, b, fixed = (gf.parameter((), 1.0, name) for name in "abc")
    statistic = gf.parameter((), 1.0, "d", trainable=False)
    loss = a * b * fixed * statistic
    one = gf.function([], loss, gf.optim.SGD(0.5).minimize(loss, [a]), device=device)
    one()
    assert [float(one.store[n]) for n in "abcd"] == [0.5, 1, 1, 1]
    rest = gf.function([], loss, gf.optim.SGD(0.5).minimize(loss), device=device)
    rest()
    assert [float(rest.store[n]) for n in "abcd"] == [0, 0.75, 0.75, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_may_be_changed_before_they_are_applied(device: str) -> None:
    p = gf.parameter((4,), START, "p", "float64")
    loss = gf.sum(p * p * SCALE + p)
    g = gf.grad(loss, p)
    clipped = g / gf.maximum(gf.sqrt(gf.sum(g * g)), 1.0)
    step = gf.function([], loss, gf.optim.SGD(0.1).apply([(p, clipped)]), device=device)
    step()
    slope = gradient(START)
    np.testing.assert_allclose(step.store["p"], START - 0.1 * slope / np.linalg.norm(slope), rtol=1e-12)


def test_two_optimizers_on_one_parameter_keep_slots_of_their_own() -> None:
    p = gf.parameter((2,), 1.0, "p")
    loss = gf.sum(p * p)
    first = gf.function([], loss, gf.optim.SGD(0.1, 0.9).minimize(loss), device="reference")
    gf.function([], loss, gf.optim.SGD(0.1, 0.9).minimize(loss), device="reference")
    assert first.store.names("slot") == ["p.momentum", "p.momentum_1"]


@pytest.mark.parametrize("device", DEVICES)
def test_rmsprop_with_a_mean_that_stays(device: str) -> None:
    """0.00001 / 0.00005 and 100 / 25, before the learning rate: the mean square is set by hand."""
    p, g = gf.parameter((2,), 0.0, "p"), gf.input("g", (2,))
    program = gf.function(g, [], gf.optim.RMSprop(1.0, decay=1.0, eps=0.0).apply([(p, g)]), device=device)
    program.store["p.square"] = np.array([0.00005 ** 2, 25.0 ** 2], "float32")
    program(np.array([0.00001, 100.0], "float32"))
    np.testing.assert_allclose(program.store["p"], [-0.2, -4.0], rtol=1e-6)
    np.testing.assert_array_equal(program.store["p.square"], np.array([0.00005 ** 2, 625.0], "float32"))


@pytest.mark.parametrize("make, message", [
    (lambda: gf.optim.SGD(-1), "the learning rate is -1"), (lambda: gf.optim.SGD(0.1, 1.0),
                                                            "the momentum is 1.0"),
    (lambda: gf.optim.SGD(0.1, nesterov=True), "needs a momentum"), (lambda: gf.optim.Adam(beta2=2),
                                                                     "beta2 is 2"),
    (lambda: gf.optim.RMSprop(decay=-0.1), "decay is -0.1"),
    (lambda: gf.optim.RMSprop(decay=1.1), "from 0 to 1"),
    (lambda: gf.optim.SGD("fast"), "the learning rate is 'fast'"),
    (lambda: gf.optim.SGD(gf.constant([0.1])), "the learning rate is one number"),
    (lambda: gf.optim.SGD(lambda t: gf.stack([t, t])).minimize(gf.sum(gf.parameter((2,), 0.0))),
     "the learning rate is one number"),
    (lambda: gf.optim.SGD(0.1, 0.9, True, dampening=0.1), "has no dampening"),
    (lambda: gf.optim.Rprop(gf.constant(0.1)), "where its steps start"),
    (lambda: gf.optim.Rprop(growth=0.9), "grows by 0.9"), (lambda: gf.optim.Adam(l2=-1), "l2 is -1"),
    (lambda: gf.optim.Adam(accumulate=0), "accumulate is 0"),
    (lambda: gf.optim.SGD(0.1, groups=[([], {"momentun": 0.9})]), "SGD has no 'momentun'"),
    (lambda: gf.optim.SGD(0.1, groups=[([], {"lr": -0.9})]), "the learning rate is -0.9"),
    (lambda: gf.optim.EMA(1.0), "the decay is 1.0"), (lambda: gf.optim.PolyakAverage(-1), "start is -1"),
    (lambda: gf.optim.EMA(0.9).of(gf.constant(1.0)), "of no parameters yet"),
    (lambda: gf.optim.clip.by_norm(0), "the limit is 0"), (lambda: gf.optim.max_norm(0), "the limit is 0"),
    (lambda: gf.optim.clip.global_norm([]), "at least one tensor"),
    (lambda: gf.optim.clip.global_norm([gf.constant(1.0)], -1), "there is no norm -1"),
    (lambda: gf.freeze(gf.input("x", ())), "computed from no parameter"),
    (lambda: gf.optim.schedule.cosine(0.1, 0), "updates is 0"),
    (lambda: gf.optim.schedule.cosine_restarts(0.1, 5, 1.5), "factor is 1.5"),
    (lambda: gf.optim.schedule.one_cycle(0.1, 10, rising=1.0), "can't rise for 1.0"),
    (lambda: gf.optim.schedule.piecewise([3, 2], [1, 2, 3]), "3 parts for the boundaries"),
    (lambda: gf.substitute(gf.constant(1.0), {gf.constant(1.0): gf.constant([1.0])}), "another shape"),
    (lambda: gf.substitute(gf.constant(1.0), {gf.constant(1.0): gf.constant(1)}), "int32 can't replace"),
    (lambda: gf.optim.SGD(0.1).minimize(gf.sum(gf.input("x", (2,)))), "computed from no parameter"),
    (lambda: gf.optim.SGD(0.1).minimize(gf.parameter((2,), 0.0)), "differentiates one number"),
    (lambda: gf.optim.SGD(0.1).minimize(gf.sum(gf.input("x", (2,))), [gf.input("x", (2,))]),
     "is no parameter")])
def test_misuse_is_refused(make: Any, message: str) -> None:
    with pytest.raises(gf.UserError, match=message) as error:
        make()
    assert error.value.where is not None and error.value.where.file == __file__
