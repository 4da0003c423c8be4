"""Mixed precision: what runs in which type, and that nets train with it."""
from __future__ import annotations

import numpy as np
import pytest

import graphflow as gf
from graphflow.compiler.ir.graph import walk

pytest.importorskip("ml_dtypes")


def net(x: gf.Tensor, y: gf.Tensor) -> gf.Tensor:
    h = gf.nn.conv2d(x, 4, 3, activation=gf.relu, name="conv")
    h = gf.nn.dense(gf.nn.flatten(h), 16, gf.nn.tanh, name="fc1")
    return gf.loss.softmax_cross_entropy(gf.nn.dense(h, 3, name="fc2"), y)


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 48)
    x = rng.standard_normal((48, 1, 6, 6)).astype(np.float32)
    x[np.arange(48), 0, y, y] += 4
    return x, y


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_products_are_of_halves_and_the_rest_is_float32(half: str) -> None:
    n = gf.dim("N")
    x, y = gf.input("x", (n, 1, 6, 6)), gf.input("y", (n,), "int64")
    with gf.autocast(half):
        loss = net(x, y)
        inner = gf.nn.dense(gf.nn.flatten(x), 3)
        with gf.autocast(enabled=False):
            outer = gf.nn.dense(gf.nn.flatten(x), 3)
    assert inner.dtype.full_name == half and outer.dtype.full_name == "float32"
    assert loss.dtype.full_name == "float32"
    program = gf.function([x, y], loss, gf.optim.SGD(0.1).minimize(loss), device="reference")
    assert {program.store[name].dtype for name in program.store if "rng" not in name} == {np.dtype("f4")}
    products = [n for n in walk(program.traced.nodes()) if n.op in ("matmul", "conv")]
    assert len(products) == 3
    for node in products:                                    # float32 arithmetic on rounded operands
        for v in node.inputs:
            assert v.op == "cast" and v.node.inputs[0].dtype.full_name == half


@pytest.mark.cpu
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_net_trains_with_halves(half: str) -> None:
    def losses(enabled: bool) -> list[float]:
        n = gf.dim("N")
        x, y = gf.input("x", (n, 1, 6, 6)), gf.input("y", (n,), "int64")
        with gf.autocast(half, enabled):
            loss = net(x, y)
        step = gf.function([x, y], loss, gf.optim.SGD(0.2, 0.9).minimize(loss), store=gf.Store(seed=1))
        return [float(step(*data())) for _ in range(40)]
    rounded, exact = losses(True), losses(False)
    assert exact[-1] < 0.1 and rounded[-1] < 0.1
    assert rounded[0] != exact[0] and abs(rounded[0] - exact[0]) < 0.02


def test_autocast_takes_halves_only() -> None:
    with pytest.raises(gf.GraphflowError, match="takes a half, not float64"):
        with gf.autocast("float64"):
            pass


@pytest.mark.cpu
def test_a_scaled_loss_keeps_small_gradients_and_leaves_out_infinite_ones() -> None:
    x = gf.input("x", (4,))
    w = gf.parameter((4,), np.ones(4), "w")
    narrow = gf.cast(gf.cast(w, "float16") * gf.cast(x, "float16"), "float32")

    def trained(scale: gf.optim.LossScale | None) -> gf.Program:
        loss = narrow.sum() * 1e-6
        optimizer = gf.optim.SGD(1e6, 0.5, loss_scale=scale)
        return gf.function([x], loss, optimizer.minimize(loss))

    small, big = np.full(4, 0.01, np.float32), np.full(4, np.inf, np.float32)
    plain = trained(None)
    plain(small)
    np.testing.assert_array_equal(plain.store["w"], 1)                  # 1e-8 is 0 in float16
    step = trained(gf.optim.LossScale(2.0 ** 15, interval=2))
    store = step.store
    store["w"] = np.ones(4)
    moved = []
    for data in (small, big, small, small, small):
        step(data)
        moved.append((float(store["loss_scale.value"]), store["w"].copy()))
    assert [scale for scale, _ in moved] == [2 ** 15, 2 ** 14, 2 ** 14, 2 ** 15, 2 ** 15]
    assert (moved[0][1] < 1).all() and np.isfinite(moved[1][1]).all()
    np.testing.assert_array_equal(moved[0][1], moved[1][1])             # the update was left out
    assert (moved[2][1] < moved[1][1]).all()


@pytest.mark.reference
def test_a_loss_of_halves_says_where_to_declare_it() -> None:
    with gf.autocast("bfloat16"):
        logits = gf.nn.dense(gf.input("x", (None, 4)), 3)
    loss = gf.loss.softmax_cross_entropy(logits, gf.input("y", (None,), "int64"))
    with pytest.raises(gf.UseError, match="this is bfloat16(?s:.)*inside of gf.autocast"):
        gf.optim.SGD(0.1).minimize(loss)
