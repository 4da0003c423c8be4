"""What layers do beside their formulas: training and evaluation, sharing, open extents, initial values,
refusals. The formulas are compared in test_nn.py and test_torch_layers.py."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.compiler.plan.errors import DTypeError, FeedError, ShapeError, UseError

RNG = np.random.default_rng(1)
on_devices = pytest.mark.parametrize("device", DEVICES)
nn = gf.nn


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# --- running statistics

@on_devices
def test_running_statistics_move_in_training_programs_alone(device: str) -> None:
    x = gf.input("x", (gf.dim("N"), 2))
    y = nn.batch_norm(x, momentum=0.25)
    step, look = (gf.function(x, y, training=t, device=device) for t in (True, False))
    fed = normal(8, 2) * 3 + 1
    mean, variance = fed.mean(0, dtype=np.float64), fed.var(0, dtype=np.float64)
    np.testing.assert_allclose(look(fed), fed / math.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(step(fed), (fed - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-6)
    store = step.store
    assert store is look.store and store.names("statistic") == ["batch_norm.mean", "batch_norm.variance"]
    np.testing.assert_allclose(store["batch_norm.mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(store["batch_norm.variance"], 0.75 + 0.25 * variance * 8 / 7, rtol=1e-5)
    kept = store["batch_norm.mean"].tobytes(), store["batch_norm.variance"].tobytes()
    found = look(fed)
    expected = (fed - store["batch_norm.mean"]) / np.sqrt(store["batch_norm.variance"] + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert kept == (store["batch_norm.mean"].tobytes(), store["batch_norm.variance"].tobytes())


def test_statistics_of_a_batch_of_one_stay_numbers() -> None:
    x = gf.input("x", (1, 3))
    step = gf.function(x, nn.batch_norm(x), training=True)
    np.testing.assert_allclose(step(normal(1, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(step.store["batch_norm.variance"], 0.9, rtol=1e-6)


def test_an_update_of_a_statistic_by_the_user_wins() -> None:
    x = gf.input("x", (4, 3))
    y = nn.batch_norm(x)
    mean = next(v for v in _statistics(y) if v.name.endswith(".mean"))
    step = gf.function(x, y, {mean: mean + 5.0})
    step(normal(4, 3))
    np.testing.assert_array_equal(step.store["batch_norm.mean"], [5, 5, 5])


def _statistics(y: gf.Tensor) -> list[gf.Tensor]:
    from graphflow.compiler.ir.graph import topological
    from graphflow.state import variables_in
    return [v.tensor for v in variables_in(topological([y.value.node])) if v.role == "statistic"]


def test_only_the_statistics_of_what_a_program_computes_are_updated() -> None:
    """A shared part on two inputs: the program of one does not need the other."""
    a, b = gf.input("a", (4, 2)), gf.input("b", (6, 2))
    part = nn.shared(lambda t: nn.batch_norm(t, name="norm"))
    first, second = part(a), part(b)
    one = gf.function(a, first, training=True)
    both = gf.function([a, b], [first, second], training=True)
    x, y = normal(4, 2), normal(6, 2)
    one(x)
    after_one = 0.1 * x.mean(0, dtype=np.float64)
    np.testing.assert_allclose(one.store["norm.mean"], after_one, rtol=1e-5, atol=1e-7)
    both(x, y)
    expected = 0.9 * (0.9 * after_one + 0.1 * x.mean(0, dtype=np.float64)) + 0.1 * y.mean(0, dtype=np.float64)
    np.testing.assert_allclose(one.store["norm.mean"], expected, rtol=1e-5, atol=1e-7)


def test_a_loop_over_batch_norm_is_refused_in_training_alone() -> None:
    x = gf.input("x", (5, 4, 2))
    _, y = gf.scan(lambda carry, row: (carry, nn.batch_norm(row)), gf.zeros(()), x)
    with pytest.raises(UseError, match="read inside a loop or a branch"):
        gf.function(x, y, training=True)
    fed = normal(5, 4, 2)
    np.testing.assert_allclose(gf.function(x, y, device="reference")(fed), fed / math.sqrt(1 + 1e-5),
                               rtol=1e-6)


def test_a_model_trains_and_evaluates_with_batch_norm() -> None:
    """Evaluation uses the running statistics: after many steps the loss is near the training loss."""
    x, t = gf.input("x", (None, 3)), gf.input("t", (None, 1))
    y = nn.dense(nn.batch_norm(nn.dense(x, 16, gf.tanh)), 1)
    model = gf.Model(x, y, gf.loss.squared_error(y, t), targets=t, optimizer=gf.optim.SGD(0.05, 0.9))
    xs = normal(256, 3) * 2 + 1
    ts = np.sin(xs[:, :1]) + xs[:, 1:2]
    history = model.fit((xs, ts), 30, 64, progress=False)
    evaluated = model.evaluate((xs, ts), 64)["loss"]
    assert history["loss"][-1] < 0.2 * history["loss"][0]
    assert evaluated < 2 * history["loss"][-1] + 0.01


# --- sharing

@on_devices
def test_shared_layers_have_one_set_of_parameters(device: str) -> None:
    a, b = gf.input("a", (2, 3)), gf.input("b", (5, 3))
    twin = nn.shared(lambda t: nn.dense(nn.dense(t, 4, gf.relu), 2))
    program = gf.function([a, b], [twin(a), twin(b)], device=device)
    s = program.store
    assert s.names("parameter") == ["dense.W", "dense.b", "dense_1.W", "dense_1.b"]
    for x, y in zip((normal(2, 3), normal(5, 3)), program(normal(2, 3), normal(5, 3))):
        assert y.shape == (len(x), 2)
    x, y = normal(2, 3), normal(5, 3)
    for fed, found in zip((x, y), program(x, y)):
        expected = np.maximum(fed @ s["dense.W"] + s["dense.b"], 0) @ s["dense_1.W"] + s["dense_1.b"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_shared_parts_may_hold_shared_parts() -> None:
    x = gf.input("x", (2, 3))
    inner = nn.shared(lambda t: nn.dense(t, 3, name="inner"))

    def outer(t: gf.Tensor) -> gf.Tensor:
        own = nn.shared(lambda u: nn.dense(u, 3, name="own"))
        return own(own(inner(inner(t))))
    twice = nn.shared(outer)
    program = gf.function(x, [twice(x), twice(x + 1.0), inner(x)], device="reference")
    assert program.store.names("parameter") == ["inner.W", "inner.b", "own.W", "own.b"]


def test_a_first_call_that_fails_leaves_nothing() -> None:
    x = gf.input("x", (2, 3))

    def build(t: gf.Tensor, fail: bool) -> gf.Tensor:
        y = nn.dense(t, 3)
        if fail:
            raise KeyError("no")
        return y
    part = nn.shared(build)
    with pytest.raises(KeyError):
        part(x, True)
    program = gf.function(x, [part(x, False), part(x, False)], device="reference")
    assert len(program.store.names("parameter")) == 2


def test_shared_parts_that_differ_are_refused() -> None:
    x, wide = gf.input("x", (2, 3)), gf.input("w", (2, 4))
    part = nn.shared(lambda t: nn.dense(t, 3))
    part(x)
    with pytest.raises(ShapeError, match="asks for another parameter than dense.W of its first call"):
        part(wide)
    part = nn.shared(lambda t, more: nn.dense(nn.dense(t, 3), 3) if more else nn.dense(t, 3))
    part(x, False)
    with pytest.raises(UseError, match="asks for more than the 2 parameters of its first call"):
        part(x, True)
    part = nn.shared(lambda t, more: nn.dense(nn.dense(t, 3), 3) if more else nn.dense(t, 3))
    part(x, True)
    with pytest.raises(UseError, match="used 2 of the 4 parameters of its first call"):
        part(x, False)


@on_devices
def test_tied_weights(device: str) -> None:
    """An autoencoder whose decoder is the encoder transposed, and words predicted by their embedding."""
    x, i = gf.input("x", (4, 6)), gf.input("i", (4,), "int64")
    kernel = gf.parameter((6, 2), gf.init.normal(0.5), "kernel")
    code = nn.dense(x, 2, weight_init=kernel, use_bias=False)
    back = nn.dense(code, 6, weight_init=gf.transpose(kernel), use_bias=False)
    table = gf.parameter((6, 3), gf.init.normal(0.5), "table")
    scores = nn.dense(nn.embedding(i, 6, 3, weight_init=table), 6, weight_init=table.T, use_bias=False)
    slope = gf.grad(gf.sum(gf.square(back)), kernel)
    program = gf.function([x, i], [back, scores, slope], device=device)
    assert program.store.names("parameter") == ["kernel", "table"]
    fed, rows = normal(4, 6), np.array([5, 0, 1, 1])
    w, t = (program.store[n].astype(np.float64) for n in ("kernel", "table"))
    found, found_scores, found_slope = program(fed, rows)
    np.testing.assert_allclose(found, fed @ w @ w.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_scores, t[rows] @ t.T, rtol=1e-4, atol=1e-5)
    back_slope = 2 * (fed @ w @ w.T)
    np.testing.assert_allclose(found_slope, back_slope.T @ (fed @ w) + fed.T @ (back_slope @ w), rtol=1e-4,
                               atol=1e-4)


# --- dropout

@on_devices
def test_spatial_dropout_drops_whole_maps(device: str) -> None:
    x = gf.input("x", (40, 50, 3, 2))
    program = gf.function(x, nn.spatial_dropout(x, 0.25), training=True, device=device)
    maps = program(np.ones((40, 50, 3, 2), np.float32)).reshape(2000, 6)
    assert (maps == maps[:, :1]).all() and set(np.unique(maps)) == {0, np.float32(1 / 0.75)}
    # The count is binomial: 6 standard deviations, and the seed is fixed.
    assert abs((maps[:, 0] == 0).sum() - 500) < 6 * math.sqrt(2000 * 0.25 * 0.75)
    fed = normal(40, 50, 3, 2)
    np.testing.assert_array_equal(gf.function(x, nn.spatial_dropout(x, 0.25), device=device)(fed), fed)


@on_devices
def test_alpha_dropout_keeps_mean_and_variance(device: str) -> None:
    x = gf.input("x", (200, 500))
    fed = RNG.standard_normal((200, 500)).astype(np.float32)
    dropped = gf.function(x, nn.alpha_dropout(x, 0.3), training=True, device=device)(fed)
    assert abs(dropped.mean()) < 0.02 and abs(dropped.std() - 1) < 0.02
    values, counts = np.unique(dropped, return_counts=True)
    assert abs(counts.max() / 100_000 - 0.3) < 0.01                     # what is dropped is one value
    np.testing.assert_array_equal(gf.function(x, nn.alpha_dropout(x, 0.3), device=device)(fed), fed)


# --- combinations

@on_devices
def test_residual_inception_and_sequential(device: str) -> None:
    x = gf.input("x", (2, 3, 4, 4))
    net = nn.sequential(gf.tanh, lambda t: t * 2.0)
    outputs = [net(x), nn.residual(x, net), nn.residual(x, net, lambda t: t * 3.0, gf.relu),
               nn.inception(x, net, lambda t: nn.max_pool2d(t, 3, 1, 1)), nn.sequential()(x)]
    fed = normal(2, 3, 4, 4)
    plain, added, shortcut, both, same = gf.function(x, outputs, device=device)(fed)
    body = 2 * np.tanh(fed)
    np.testing.assert_allclose(plain, body, rtol=1e-5)
    np.testing.assert_allclose(added, body + fed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shortcut, np.maximum(body + 3 * fed, 0), rtol=1e-5, atol=1e-6)
    assert both.shape == (2, 6, 4, 4)
    np.testing.assert_allclose(both[:, :3], body, rtol=1e-5)
    padded = np.pad(fed, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    np.testing.assert_array_equal(both[:, 3:], windows.max((-1, -2)))
    np.testing.assert_array_equal(same, fed)


# --- extents that a call decides

OPEN: dict[str, tuple[tuple[int, ...], Callable[[gf.Tensor], gf.Tensor]]] = {
    "dense": ((3, 4), lambda t: nn.dense(t, 2)),
    "conv1d": ((3, 2, 7), lambda t: nn.conv1d(t, 3, 3, 2, 1)),
    "conv2d": ((3, 2, 7, 6), lambda t: nn.conv2d(t, 3, 3, padding="same")),
    "conv3d": ((2, 1, 4, 5, 3), lambda t: nn.conv3d(t, 2, 2)),
    "depthwise_conv2d": ((3, 2, 7, 6), lambda t: nn.depthwise_conv2d(t, 3, 2)),
    "conv_transpose1d": ((3, 2, 5), lambda t: nn.conv_transpose1d(t, 3, 3, 2, 1, output_padding=1)),
    "conv_transpose2d": ((3, 2, 4, 3), lambda t: nn.conv_transpose2d(t, 3, 4, 2, "same")),
    "max_pool2d": ((3, 2, 7, 6), lambda t: nn.max_pool2d(t, 3, 2)),
    "avg_pool2d": ((3, 2, 7, 6), lambda t: nn.avg_pool2d(t, 3, 2, 1, include_padding=False)),
    "global_max_pool": ((3, 2, 7, 6), nn.global_max_pool),
    "global_avg_pool": ((3, 2, 7, 6), nn.global_avg_pool),
    "adaptive_avg_pool": ((3, 2, 7, 6), lambda t: nn.adaptive_avg_pool(t, (2, 4))),
    "max_unpool": ((3, 2, 6, 4), lambda t: nn.max_unpool(*nn.max_pool_with_switches(t, 2), 2)),
    "nearest": ((3, 2, 3, 2), lambda t: nn.upsample(t, 2)),
    "linear": ((3, 2, 3, 2), lambda t: nn.upsample(t, 2, "linear")),
    "corners": ((3, 2, 3, 2), lambda t: nn.upsample(t, 2, "linear", align_corners=True)),
    "batch_norm": ((3, 2, 4, 3), nn.batch_norm),
    "layer_norm": ((3, 2, 4), lambda t: nn.layer_norm(t, 1)),
    "group_norm": ((3, 4, 5), lambda t: nn.group_norm(t, 2)),
    "instance_norm": ((3, 2, 4, 3), nn.instance_norm),
    "rms_norm": ((3, 2, 4), lambda t: nn.rms_norm(t, 1)),
    "local_response_norm": ((3, 6, 4, 3), lambda t: nn.local_response_norm(t, 5)),
}


@pytest.mark.cpu
def test_every_layer_takes_extents_that_a_call_decides() -> None:
    """Batch and, but for dense, spatial extents open: results and gradients as with fixed ones."""
    results = []
    for spatial in (False, True):
        inputs, outputs, feeds = [], [], []
        for name, (shape, build) in OPEN.items():
            extents = [gf.dim(f"{name}_axis{a}") if spatial and a != 1 else d for a, d in enumerate(shape)]
            x = gf.input(name, extents)
            with gf.scope(name):
                y = build(x)
            inputs.append(x)
            outputs += [y, gf.grad(gf.sum(gf.tanh(y)), x)]
            feeds.append(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
        results.append(gf.function(inputs, outputs, training=True)(*feeds))
    for i, (fixed, opened) in enumerate(zip(*results)):
        np.testing.assert_allclose(opened, fixed, rtol=1e-4, atol=1e-5, err_msg=str(list(OPEN)[i // 2]))


# --- initial values

def drawn(initializer: Any, *shape: int) -> np.ndarray:
    values = initializer(np.random.default_rng(0), shape, np.dtype(np.float32))
    assert values.dtype == np.float32 and values.shape == shape
    return values.astype(np.float64)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (20, 20), (8, 3, 3, 3), (40, 2, 3), (1, 5)])
def test_orthogonal_initial_values(shape: tuple[int, ...]) -> None:
    matrix = drawn(gf.init.orthogonal(2.0), *shape).reshape(shape[0], -1)
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(product, 4 * np.eye(len(product)), atol=1e-5)


def test_truncated_normal_initial_values() -> None:
    values = drawn(gf.init.truncated_normal(0.5, 3.0), 100_000)
    assert np.abs(values - 3).max() <= 1 and np.abs(values - 3).max() > 0.99
    assert abs(values.mean() - 3) < 0.01 and abs(values.std() / (0.5 * 0.8796) - 1) < 0.01


def test_identity_and_dirac_keep_their_input() -> None:
    np.testing.assert_array_equal(drawn(gf.init.identity(2.0), 3, 5), 2 * np.eye(3, 5))
    x = gf.input("x", (2, 3, 5, 4))
    keep = nn.conv2d(x, 3, 3, padding=1, weight_init=gf.init.dirac())
    fed = normal(2, 3, 5, 4)
    np.testing.assert_array_equal(gf.function(x, keep)(fed), fed)


def test_gains_scale_the_standard_deviation() -> None:
    for initializer in (gf.init.glorot_uniform, gf.init.he_normal, gf.init.lecun_normal):
        ratio = drawn(initializer.scaled(3.0), 100, 80) / drawn(initializer, 100, 80)
        np.testing.assert_allclose(ratio, 3, rtol=1e-4)


def test_transposed_convolutions_are_scaled_by_their_own_fans() -> None:
    """Each output of a transposed convolution has C · window inputs, C the first axis of the weights."""
    x = gf.input("x", (1, 100, 2, 2))
    program = gf.function(x, nn.conv_transpose2d(x, 4, 3), device="reference")
    weights = program.store["conv_transpose2d.W"]
    assert weights.shape == (100, 4, 3, 3)
    assert abs(weights.std() / math.sqrt(2 / (100 * 9)) - 1) < 0.05


# --- refusals

image, rows, labels = gf.input("image", (2, 4, 6, 5)), gf.input("rows", (3, 4)), gf.input("y", (3,), "int64")
whole = gf.input("whole", (3, 4), "int32")
other = gf.input("other", (3, 5))

REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.conv1d(image, 4, 3), ShapeError, r"conv1d takes \[N, C, L\], not 4 axes"),
    (lambda: nn.conv3d(image, 4, 3), ShapeError, r"conv3d takes \[N, C, D, H, W\], not 4 axes"),
    (lambda: nn.conv2d(image, 4, (3, 3, 3)), UseError, r"window is \(3, 3, 3\)"),
    (lambda: nn.conv2d(image, 4, 3, padding=((1, 1), 1, 1)), UseError, r"padding is \(\(1, 1\), 1, 1\)"),
    (lambda: nn.conv2d(image, 4, 3, padding=-1), UseError, "padding is -1"),
    (lambda: nn.conv2d(image, 4, 3, True), UseError, "stride is True"),
    (lambda: nn.conv2d(image, 4, 3, weight_init=gf.parameter((4, 4, 2, 2), 0.0)), ShapeError,
     "conv2d.W has another shape than the tensor given for it"),
    (lambda: nn.dense(rows, 4, weight_init=gf.parameter((4, 4), 0.0, dtype="float64")), DTypeError,
     "dense.W is float32, and the tensor given for it float64"),
    (lambda: nn.dense(rows, 4, mask=np.ones((4, 3))), ShapeError, "another shape than the parameter"),
    (lambda: nn.depthwise_conv2d(image, 3, multiplier=0), UseError, "multiplier of depthwise_conv2d is 0"),
    (lambda: nn.conv_transpose2d(image, 4, 3, 2, output_padding=2), UseError,
     "output_padding is 2 with a stride of 2"),
    (lambda: nn.conv_transpose2d(image, 4, 1, padding=4), ShapeError, "crops more than there is"),
    (lambda: nn.conv_transpose2d(image, 6, 3, groups=4), ShapeError, "cannot be split into 4 groups"),
    (lambda: nn.max_pool2d(image, 2, padding=2), UseError, "nothing but padding"),
    (lambda: nn.avg_pool1d(image, 2), ShapeError, r"avg_pool1d takes \[N, C, L\]"),
    (lambda: nn.global_avg_pool(rows), ShapeError, "1 to 3 spatial axes, not 2 axes"),
    (lambda: nn.adaptive_avg_pool(image, (2, 2, 2)), UseError, r"size is \(2, 2, 2\)"),
    (lambda: nn.max_unpool(*nn.max_pool_with_switches(image, 2, padding="same"), 2, padding="same"), UseError,
     "needs the size of the result"),
    (lambda: nn.max_unpool(*nn.max_pool_with_switches(image, 2), 2, size=(9, 9)), ShapeError, "has windows"),
    (lambda: nn.upsample(image, 2, "cubic"), UseError, "mode is 'cubic'"),
    (lambda: nn.upsample(image, 1.5), UseError, "factor is 1.5"),
    (lambda: nn.batch_norm(whole), DTypeError, "batch_norm takes floats, not int32"),
    (lambda: nn.batch_norm(gf.input("v", (3,))), ShapeError, "batch_norm needs at least 2 axes, got 1"),
    (lambda: nn.batch_norm(gf.input("v", (3, gf.dim("C")))), ShapeError, "a fixed number of channels"),
    (lambda: nn.batch_norm(rows, momentum=1.5), UseError, "momentum is 1.5"),
    (lambda: nn.layer_norm(rows, 2), ShapeError, "no axis 2"),
    (lambda: nn.layer_norm(gf.input("v", (gf.dim("N"), 3)), 0), ShapeError, "a fixed number of elements"),
    (lambda: nn.group_norm(image, 3), ShapeError, "4 channels cannot be split into 3 groups"),
    (lambda: nn.local_response_norm(image, 0), UseError, "size of local_response_norm is 0"),
    (lambda: nn.spatial_dropout(rows, 0.5), ShapeError, "with spatial axes"),
    (lambda: nn.alpha_dropout(rows, 1), UseError, "the rate of alpha_dropout is 1"),
    (lambda: nn.embedding(rows, 5, 2), DTypeError, "indices are integers, not float32"),
    (lambda: nn.embedding(labels, 5, 2, padding_index=5), UseError, "padding_index is 5"),
    (lambda: nn.residual(rows, lambda t: nn.dense(t, 3)), ShapeError, "residual: the body's result"),
    (lambda: nn.sequential(gf.relu, 3), UseError, "part 1 of sequential is 3"),
    (lambda: nn.inception(image), UseError, "takes a list of tensors"),
    (lambda: gf.function(rows, nn.dense(rows, 3, weight_init=gf.init.dirac()), device="reference"),
     ShapeError, "init.dirac is for weights with 3 to 5 axes"),
    (lambda: gf.init.truncated_normal(1.0, limit=0), UseError, "limit is 0"),
    (lambda: gf.loss.squared_error(rows, other), ShapeError, "axis -1 is 4 in one and 5"),
    (lambda: gf.loss.squared_error(rows, rows, reduction="average"), UseError, "reduction is 'average'"),
    (lambda: gf.loss.squared_error(rows, rows, weights=[1.0, 2.0]), ShapeError, "of the losses' shape"),
    (lambda: gf.loss.huber(rows, rows, 0), UseError, "delta is 0"),
    (lambda: gf.loss.softmax_cross_entropy(rows, labels, label_smoothing=2), UseError,
     "label_smoothing is 2"),
    (lambda: gf.loss.softmax_cross_entropy(rows, labels, class_weights=[1.0, 2.0]), ShapeError,
     "one weight for each class"),
    (lambda: gf.loss.softmax_cross_entropy(rows, rows, ignore_index=1), UseError, "is for integer labels"),
    (lambda: gf.loss.hinge(rows, rows, power=3), UseError, "power is 3"),
    (lambda: gf.loss.contrastive(rows, rows, whole), ShapeError, "one `same` for each pair"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_misuse_is_refused_with_a_reason(number: int) -> None:
    make, kind, message = REFUSED[number]
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "test_layers.py" in str(caught.value)


def test_labels_that_are_no_class_are_refused_by_the_call() -> None:
    z, y = gf.input("z", (3, 4)), gf.input("y", (3,), "int64")
    program = gf.function([z, y], gf.loss.softmax_cross_entropy(z, y, ignore_index=-1), device="reference")
    assert np.isfinite(program(normal(3, 4), [0, -1, 3]))
    for wrong in (4, -2):
        with pytest.raises(FeedError, match=r"must lie in 0\.\.3 or be -1"):
            program(normal(3, 4), [0, wrong, 3])
    i = gf.input("i", (3,), "int64")
    table = gf.function(i, nn.embedding(i, 5, 2), device="reference")
    with pytest.raises(FeedError, match=r"must lie in 0\.\.4"):
        table([0, 5, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_normalised_in_float32(dtype: str) -> None:
    """Sums of squares of numbers near 300 exceed a float16, and a bfloat16 holds 8 bits."""
    x = gf.input("x", (64, 4))
    half = gf.cast(x, dtype)
    outputs = [nn.batch_norm(half), nn.layer_norm(half), nn.rms_norm(half), nn.group_norm(gf.reshape(
        half, (64, 4, 1)), 2)]
    program = gf.function(x, [gf.cast(t, "float32") for t in (half, *outputs)], training=True)
    assert all(t.dtype == half.dtype for t in outputs)
    assert {program.store.entry(n).dtype.full_name for n in program.store.names("parameter")} == {"float32"}
    fed = np.random.default_rng(3).normal(300, 100, (64, 4)).astype(np.float32)
    given, batch, layer, rms, group = program(fed)
    error = {"float16": 2 ** -10, "bfloat16": 2 ** -7}[dtype]

    def standard(values: np.ndarray, axis: int) -> np.ndarray:
        centred = values - values.mean(axis, keepdims=True)
        return centred / np.sqrt(np.square(centred).mean(axis, keepdims=True) + 1e-5)
    given = given.astype(np.float64)
    for found, expected in [
            (batch, standard(given, 0)), (layer, standard(given, 1)),
            (rms, given / np.sqrt(np.square(given).mean(1, keepdims=True))),
            (group, standard(given.reshape(64, 2, 2), 2).reshape(64, 4, 1))]:
        np.testing.assert_allclose(found, expected, rtol=error, atol=error * 0.1)
