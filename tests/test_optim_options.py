"""What all optimizers share: groups, frozen parameters, clipping, constraints, averages, accumulation, and
hyperparameters that change."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.optim import clip, schedule

START = np.array([[1.0, -2.0], [3.0, 0.5]])
Arrays = dict[str, np.ndarray]


def quadratic(device: str, optimizer: gf.optim.Optimizer, steps: int,
              dtype: str = "float64") -> tuple[gf.Program, list[np.ndarray]]:
    """sum(p²)/2, whose gradient is p, minimised; the parameter after each step."""
    p = gf.parameter(START.shape, START, "p", dtype)
    loss = gf.sum(p * p) / 2
    step = gf.function([], loss, optimizer.minimize(loss), device=device)
    track = []
    for _ in range(steps):
        step()
        track.append(step.store["p"])
    return step, track


@pytest.mark.parametrize("device", DEVICES)
def test_groups_by_list_and_by_function(device: str) -> None:
    a, b, c, d = (gf.parameter((), 1.0, name, "float64") for name in "abcd")
    loss = a + b + c + d
    optimizer = gf.optim.SGD(0.1, groups=[([a], {"lr": 0.5}), (lambda p: p.name in "ab", {"l2": 1.0}),
                                          (c, {"frozen": True}),
                                          ([d], {"constraint": lambda p: gf.maximum(p, 0.95)})])
    step = gf.function([], loss, optimizer.minimize(loss), device=device)
    step()
    np.testing.assert_allclose([step.store[n] for n in "abcd"], [0.5, 0.8, 1.0, 0.95])


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_parameters_are_left_alone(device: str) -> None:
    a, b, c = (gf.parameter((), 1.0, name) for name in "abc")
    features = a * b
    assert gf.freeze(features) == [a, b]
    loss = features * c
    optimizer = gf.optim.SGD(0.5, 0.9)
    step = gf.function([], loss, optimizer.minimize(loss), device=device)
    step()
    assert [float(step.store[n]) for n in "abc"] == [1, 1, 0.5]
    assert step.store.names("slot") == ["c.momentum"]
    assert gf.unfreeze(a) == [a]
    then = gf.function([], loss, gf.optim.SGD(0.5).minimize(loss), device=device)
    then()
    assert [float(step.store[n]) for n in "abc"] == [0.75, 1, 0]
    assert gf.optim.trainable(loss) == [a, c]


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_by_norm(device: str) -> None:
    """Each parameter for itself, and both as one."""
    a, b = gf.parameter((2,), [3.0, 4.0], "a", "float64"), gf.parameter((), 12.0, "b", "float64")
    pairs = [(a, a * 1), (b, b * 1)]
    for make, expected in ((clip.by_norm, (1 / 5, 1 / 12)), (clip.by_global_norm, (1 / 13, 1 / 13))):
        (_, g), (_, h) = make(1.0)(pairs)
        found = gf.function([], [g, h], device=device)()
        np.testing.assert_allclose(found[0], np.array([3.0, 4.0]) * expected[0], rtol=1e-6)
        np.testing.assert_allclose(found[1], 12 * expected[1], rtol=1e-6)
        (_, g), (_, h) = make(20.0)(pairs)
        assert gf.function([], [g, h], device=device)()[0].tolist() == [3, 4], "what is short stays"
    sizes = [clip.global_norm([a, b], norm) for norm in (1, 2, 3, float("inf"))]
    np.testing.assert_allclose(gf.function([], sizes, device=device)(),
                               [np.linalg.norm([3, 4, 12], n) for n in (1, 2, 3, np.inf)], rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_by_value_with_limits_that_are_fed(device: str) -> None:
    limit = gf.input("limit", ())
    a = gf.parameter((3,), [-3.0, 0.5, 2.0], "a")
    (_, g), = clip.by_value(limit, -1.0)([(a, a)])
    assert gf.function(limit, g, device=device)(0.75).tolist() == [-1, 0.5, 0.75]


@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_of_columns_is_kept(device: str) -> None:
    _, track = quadratic(device, gf.optim.SGD(0.1, constraint=gf.optim.max_norm(2.0)), 1)
    free = START * 0.9
    lengths = np.linalg.norm(free, axis=0)
    assert lengths[0] > 2 > lengths[1], "one column is too long"
    np.testing.assert_allclose(track[0], free * [2 / lengths[0], 1], rtol=1e-12)
    _, track = quadratic(device, gf.optim.SGD(0.1, constraint=gf.optim.non_negative), 1)
    np.testing.assert_allclose(track[0], np.maximum(free, 0), rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["ema", "debiased", "polyak", "changing"])
def test_averages(device: str, kind: str) -> None:
    def decay(number: Any) -> Any:                   # of update 1, 2, …: 1/2, 2/3, 3/4 …
        return number / (number + 1)

    average = {"ema": gf.optim.EMA(0.9), "debiased": gf.optim.EMA(0.9, debias=True),
               "polyak": gf.optim.PolyakAverage(2), "changing": gf.optim.EMA(decay)}[kind]
    x = gf.input("x", (), "float64")
    p = gf.parameter(START.shape, START, "p", "float64")
    optimizer = gf.optim.SGD(0.2, average=average)
    loss = gf.sum(p * p) / 2
    step = gf.function([], loss, optimizer.minimize(loss), device=device)
    output = x * gf.sum(p) + p
    evaluate = gf.function(x, optimizer.averaged([output, x]), device=device)
    np.testing.assert_allclose(evaluate(2.0)[0], 2 * START.sum() + START)
    track, a, weight = [], np.zeros(START.shape), 0.0
    for number in range(1, 7):
        step()
        track.append(step.store["p"])
        keep = number / (number + 1) if kind == "changing" else 0.9
        if kind != "debiased" and number == 1:
            keep = 0.0
        a, weight = keep * a + (1 - keep) * track[-1], keep * weight + 1 - keep
        expected = a / weight if kind != "polyak" else np.mean(track[min(2, number - 1):], axis=0)
        np.testing.assert_allclose(evaluate(2.0)[0], 2 * expected.sum() + expected, rtol=1e-12)
        assert evaluate(2.0)[1] == 2


def test_without_an_average_outputs_are_themselves() -> None:
    p = gf.parameter((), 1.0)
    assert gf.optim.SGD(0.1).averaged(p) is p


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_accumulated_micro_batches_are_one_big_batch(device: str, name: str) -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 5, 12))

    def train(calls: int, rows: int) -> list[Arrays]:
        u, v = gf.input("u", (None,), "float64"), gf.input("v", (None,), "float64")
        w, b = gf.parameter((), 0.5, "w", "float64"), gf.parameter((), 0.0, "b", "float64")
        loss = gf.mean(gf.square(u * w + b - v))
        optimizer = getattr(gf.optim, name)(0.1, clip=clip.by_global_norm(0.5), accumulate=calls,
                                            average=gf.optim.EMA(0.5))
        step = gf.function([u, v], loss, optimizer.minimize(loss), device=device)
        track = []
        for a, b in zip(x, y):
            for start in range(0, 12, rows):
                before = step.store["w"]
                step(a[start:start + rows], b[start:start + rows])
                if start + rows < 12:
                    assert step.store["w"] == before, "the update waits for the last call"
            track.append({n: step.store[n] for n in step.store if "gradient_sum" not in n and "rng" not in n
                          and "accumulated" not in n})
        assert {n.split(".")[-1] for n in step.store.names("slot")} >= {"average", "step"}
        return track

    for whole, parts in zip(train(1, 12), train(4, 3)):
        assert whole.keys() == parts.keys()
        for key, value in whole.items():
            np.testing.assert_allclose(parts[key], value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("device", DEVICES)
def test_hyperparameters_that_change(device: str) -> None:
    """A schedule of the learning rate, one of the momentum, a decay of the user's own."""
    optimizer = gf.optim.SGD(schedule.exponential(0.1, 0.5), schedule.linear(0.5, 0.9, 4),
                             weight_decay=lambda t: t / 10)
    _, track = quadratic(device, optimizer, 6)
    p, m = START, np.zeros(START.shape)
    for t, found in enumerate(track):
        lr, momentum = 0.1 * 0.5 ** t, 0.5 + 0.4 * min(t / 4, 1)
        m = momentum * m + p
        p = p * (1 - lr * t / 10) - lr * m
        np.testing.assert_allclose(found, p, rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_betas_that_change(device: str) -> None:
    """The corrections are those of the update's own betas."""
    _, track = quadratic(device, gf.optim.Adam(0.1, beta1=schedule.piecewise([3], [0.5, 0.9])), 6)
    p, m, v = START, np.zeros(START.shape), np.zeros(START.shape)
    for t, found in enumerate(track):
        beta = 0.5 if t < 3 else 0.9
        m, v = beta * m + (1 - beta) * p, 0.999 * v + 0.001 * p * p
        p = p - 0.1 * m / (1 - beta ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(found, p, rtol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_the_learning_rate_may_be_kept_in_the_store(device: str) -> None:
    """So the host changes it between calls, and a checkpoint keeps it."""
    lr = gf.parameter((), 0.5, "lr", trainable=False)
    step, track = quadratic(device, gf.optim.SGD(lr), 1)
    step.store["lr"] = 0.25
    step()
    np.testing.assert_allclose(track[0], START * 0.5)
    np.testing.assert_allclose(step.store["p"], START * 0.5 * 0.75)


@pytest.mark.parametrize("device", DEVICES)
def test_the_count_of_updates_is_exact(device: str) -> None:
    """Where float32 can't count any more."""
    step, _ = quadratic(device, gf.optim.Adam(0.1), 1, dtype="float32")
    assert step.store.entry("adam.step").dtype.full_name == "int64"
    step.store["adam.step"] = 2 ** 24 + 1
    step()
    assert step.store["adam.step"] == 2 ** 24 + 2


def test_schedules_are_functions_of_the_count() -> None:
    assert schedule.step(1.0, 2, 0.5).values(5).tolist() == [1, 1, 0.5, 0.5, 0.25]
    assert schedule.multistep(1.0, [], 0.5).values(2).tolist() == [1, 1]
    np.testing.assert_allclose(schedule.warmup(4, 0.5).values(6), [0, 0.125, 0.25, 0.375, 0.5, 0.5])
    np.testing.assert_allclose(schedule.cosine_restarts(1.0, 2, 2).values(7),
                               [1, 0.5, 1, (1 + np.cos(np.pi / 4)) / 2, 0.5, (1 - np.cos(np.pi / 4)) / 2, 1])
    np.testing.assert_allclose(schedule.inverse_sqrt(1.0, 4).values(17)[[0, 3, 16]],
                               [0.25, 1, (4 / 17) ** 0.5])
    np.testing.assert_allclose(schedule.cosine(1.0, 4, 0.5).values(7)[[0, 2, 4, 6]], [1, 0.75, 0.5, 0.5],
                               rtol=1e-12)
    assert repr(schedule.warmup(4, schedule.cosine(0.1, 9))) == "warmup(4, cosine(0.1, 9, 0.0), 0.0)"


@pytest.mark.cpu
@pytest.mark.parametrize("make", [
    lambda: gf.optim.SGD(0.1, 0.9), lambda: gf.optim.Adam(), lambda: gf.optim.AdamW(),
    lambda: gf.optim.NAdam(), lambda: gf.optim.RAdam(), lambda: gf.optim.Lion(weight_decay=0.1),
    lambda: gf.optim.Adadelta(), lambda: gf.optim.RMSprop(0.1, centred=True, momentum=0.9),
    lambda: gf.optim.Rprop(0.1),
    lambda: gf.optim.Adam(clip=clip.by_global_norm(1.0), average=gf.optim.EMA(0.9), accumulate=2)])
def test_updates_are_made_in_place(make: Any) -> None:
    x, y = gf.input("x", (None, 16)), gf.input("y", (None, 4))
    loss = gf.loss.mean_squared_error(gf.nn.dense(gf.nn.dense(x, 32, gf.tanh), 4), y)
    step = gf.function([x, y], loss, make().minimize(loss))
    assert "in place" not in step.explain()
    assert "copy" not in [line.split()[1] for line in step.text("plan").splitlines() if ": " in line]


def test_the_parameters_of_an_average_are_replaced_behind_checks_too() -> None:
    p = gf.parameter((), 2.0, "p")
    checked = gf.check(p * 1, p < 3, "p is small")
    replaced = gf.substitute(checked, {p: gf.constant(4.0)})
    assert gf.function([], checked, device="reference")() == 2
    with pytest.raises(gf.FeedError, match="p is small"):
        gf.function([], replaced, device="reference")()


@pytest.mark.cpu
def test_both_updates_of_a_weight_join_the_kernel_of_its_gradient() -> None:
    """Lion's momentum and its step both read the gradient, and neither reads the other."""
    x = gf.input("x", (None, 16))
    w = gf.parameter((16, 8), 0.1, "w")
    loss = gf.sum(gf.square(x @ w))
    step = gf.function(x, loss, gf.optim.Lion().minimize(loss))
    lines = step.text("plan").splitlines()
    states = {line.split()[3]: line.split()[1] for line in lines if " state " in line}
    (writer,) = [line for line in lines if " launch " in line and
                 states["w"] in line.split("writes [")[1].split("]")[0].split(", ")]
    assert states["w.momentum"] in writer.split("writes [")[1].split("]")[0].split(", ")
    assert "matmul" in writer
