"""Every layer against PyTorch: results, and gradients by inputs and parameters, with the same weights."""
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from torch_cases import Case, assert_near, compare, normal, parameters_of

import graphflow as gf

torch = pytest.importorskip("torch")
F = torch.nn.functional
nn = gf.nn
pytestmark = pytest.mark.cpu

both = pytest.mark.parametrize("dtype", ["float64", "float32"])


def padded(x: Any, padding: Any) -> Any:
    """`x` with zeros: ((before, after), …), the last axis last."""
    return F.pad(x, [n for pair in reversed(padding) for n in pair])


def conv_case(name: str, axes: int, window: tuple[int, ...], stride: Any, padding: Any, dilation: Any,
              groups: int, size: int = 7) -> Case:
    x = normal(2, 4, *(size + i for i in range(axes)), seed=axes)
    layer, torch_conv = getattr(nn, f"conv{axes}d"), getattr(F, f"conv{axes}d")

    def ours(t: gf.Tensor) -> gf.Tensor:
        return layer(t, 6, window, stride, padding, dilation=dilation, groups=groups)

    def theirs(t: Any, W: Any, b: Any) -> Any:
        return torch_conv(padded(t, padding), W, b, stride, 0, dilation, groups)
    return Case(name, [x], ours, theirs)


GRID = list(itertools.product([1, 2], [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((2, 0), (0, 1))], [1, 2], [1, 2]))


@both
def test_conv2d_over_stride_padding_dilation_and_groups(dtype: str) -> None:
    compare([conv_case(f"case{i}", 2, (3, 2), stride, padding, dilation, groups)
             for i, (stride, padding, dilation, groups) in enumerate(GRID)], dtype)


@both
def test_conv_of_one_and_three_axes_and_uneven_windows(dtype: str) -> None:
    compare([
        conv_case("line", 1, (3,), 1, ((1, 1),), 1, 1),
        conv_case("line_strided", 1, (4,), 3, ((2, 1),), 1, 2),
        conv_case("line_spread", 1, (3,), 2, ((0, 4),), 3, 1),
        conv_case("cube", 3, (2, 3, 1), 1, ((0, 0), (1, 1), (0, 0)), 1, 1, 4),
        conv_case("cube_strided", 3, (2, 2, 3), (2, 1, 2), ((1, 0), (0, 1), (1, 1)), (1, 2, 1), 2, 4),
        conv_case("point", 2, (1, 1), 1, ((0, 0), (0, 0)), 1, 1),
        conv_case("point_strided", 2, (1, 1), 3, ((1, 1), (1, 1)), 1, 1),
        conv_case("gaps", 2, (2, 1), (3, 4), ((0, 0), (0, 0)), 1, 1),
        conv_case("whole", 2, (7, 8), 1, ((0, 0), (0, 0)), 1, 1),
        conv_case("wide_padding", 2, (3, 3), 2, ((4, 5), (3, 6)), 1, 1),
        conv_case("per_axis", 2, (3, 2), (1, 3), ((1, 0), (2, 2)), (2, 1), 2),
    ], dtype)


@both
def test_depthwise_flipped_and_same(dtype: str) -> None:
    x = normal(2, 3, 7, 6)
    compare([
        Case("depthwise", [x], lambda t: nn.depthwise_conv2d(t, 3, 2, 1, multiplier=2),
             lambda t, W, b: F.conv2d(t, W, b, 2, 1, groups=3)),
        Case("flipped", [x], lambda t: nn.conv2d(t, 2, (3, 2), flip=True, use_bias=False),
             lambda t, W: F.conv2d(t, torch.flip(W, (2, 3)))),
        Case("same", [x], lambda t: nn.conv2d(t, 2, (3, 4), padding="same", dilation=2),
             lambda t, W, b: F.conv2d(t, W, b, 1, "same", 2)),
        Case("activated", [x], lambda t: nn.conv2d(t, 2, 3, activation=gf.tanh),
             lambda t, W, b: torch.tanh(F.conv2d(t, W, b))),
        Case("one", [normal(1, 1, 1, 1)], lambda t: nn.conv2d(t, 1, 1),
             lambda t, W, b: F.conv2d(t, W, b)),
        Case("nothing", [normal(0, 3, 7, 6)], lambda t: nn.conv2d(t, 2, 3, padding=1),
             lambda t, W, b: F.conv2d(t, W, b, padding=1)),
    ], dtype)


def transpose_case(name: str, axes: int, window: Any, stride: Any, padding: Any, more: Any, dilation: Any,
                   groups: int) -> Case:
    x = normal(2, 4, *(3 + i for i in range(axes)), seed=axes)
    layer, theirs_of = getattr(nn, f"conv_transpose{axes}d"), getattr(F, f"conv_transpose{axes}d")
    return Case(name, [x],
                lambda t: layer(t, 6, window, stride, padding, output_padding=more, dilation=dilation,
                                groups=groups),
                lambda t, W, b: theirs_of(t, W, b, stride, padding, more, groups, dilation))


@both
def test_transposed_convolution(dtype: str) -> None:
    grid = itertools.product([(1, 0), (2, 0), (2, 1), (3, 2)], [(0, 1, 1), (1, 2, 1), (1, 1, 2), (0, 2, 2)])
    compare([transpose_case(f"case{i}", 2, (3, 2), stride, padding, more, dilation, groups)
             for i, ((stride, more), (padding, dilation, groups)) in enumerate(grid)], dtype)


@both
def test_transposed_convolution_of_other_axes(dtype: str) -> None:
    x = normal(2, 3, 4, 5)
    compare([
        transpose_case("line", 1, 4, 2, 1, 0, 1, 1), transpose_case("line_more", 1, 3, 3, 0, 2, 2, 2),
        transpose_case("cube", 3, 2, 2, 0, 1, 1, 1),
        transpose_case("per_axis", 2, (3, 4), (2, 1), (1, 2), (1, 0), (1, 2), 2),
        Case("same", [x], lambda t: nn.conv_transpose2d(t, 2, 4, 2, "same"),
             lambda t, W, b: F.conv_transpose2d(t, W, b, 2, 1)),
        Case("same_gaps", [x], lambda t: nn.conv_transpose2d(t, 2, 1, 2, "same"),
             lambda t, W, b: F.conv_transpose2d(t, W, b, 2, 0, 1)),
        Case("asymmetric", [x], lambda t: nn.conv_transpose2d(t, 2, 3, 2, ((1, 0), (0, 1))),
             lambda t, W, b: F.conv_transpose2d(t, W, b, 2)[:, :, 1:, :-1]),
        Case("nothing", [normal(0, 3, 4, 5)], lambda t: nn.conv_transpose2d(t, 2, 3),
             lambda t, W, b: F.conv_transpose2d(t, W, b)),
    ], dtype)


@both
def test_max_pooling(dtype: str) -> None:
    image, line, cube = normal(2, 3, 9, 8), normal(2, 3, 9), normal(2, 2, 5, 4, 6)
    compare([
        Case("tiles", [image], lambda t: nn.max_pool2d(t, 2), lambda t: F.max_pool2d(t, 2)),
        Case("alexnet", [image], lambda t: nn.max_pool2d(t, 3, 2), lambda t: F.max_pool2d(t, 3, 2)),
        Case("padded", [image], lambda t: nn.max_pool2d(t, 3, 2, 1), lambda t: F.max_pool2d(t, 3, 2, 1)),
        Case("dense", [image], lambda t: nn.max_pool2d(t, 3, 1, "same"), lambda t: F.max_pool2d(t, 3, 1, 1)),
        Case("gaps", [image], lambda t: nn.max_pool2d(t, 2, (3, 4)), lambda t: F.max_pool2d(t, 2, (3, 4))),
        Case("uneven", [image], lambda t: nn.max_pool2d(t, (1, 3), (2, 1), ((0, 0), (2, 0))),
             lambda t: F.max_pool2d(F.pad(t, (2, 0), value=-torch.inf), (1, 3), (2, 1))),
        Case("line", [line], lambda t: nn.max_pool1d(t, 3, 2, 1), lambda t: F.max_pool1d(t, 3, 2, 1)),
        Case("cube", [cube], lambda t: nn.max_pool3d(t, 2, 1), lambda t: F.max_pool3d(t, 2, 1)),
        Case("whole", [image], nn.global_max_pool, lambda t: t.amax((2, 3))),
        Case("nothing", [normal(0, 3, 4, 4)], lambda t: nn.max_pool2d(t, 2), lambda t: F.max_pool2d(t, 2)),
        Case("one", [normal(1, 1, 1, 1)], lambda t: nn.max_pool2d(t, 1), lambda t: F.max_pool2d(t, 1)),
    ], dtype)


@both
def test_average_pooling(dtype: str) -> None:
    image, line, cube = normal(2, 3, 9, 8), normal(2, 3, 9), normal(2, 2, 5, 4, 6)
    compare([
        Case("tiles", [image], lambda t: nn.avg_pool2d(t, 2), lambda t: F.avg_pool2d(t, 2)),
        Case("overlapping", [image], lambda t: nn.avg_pool2d(t, (3, 2), 1),
             lambda t: F.avg_pool2d(t, (3, 2), 1)),
        Case("zeros", [image], lambda t: nn.avg_pool2d(t, 3, 2, 1), lambda t: F.avg_pool2d(t, 3, 2, 1)),
        Case("inside", [image], lambda t: nn.avg_pool2d(t, 3, 2, 1, include_padding=False),
             lambda t: F.avg_pool2d(t, 3, 2, 1, count_include_pad=False)),
        Case("line", [line], lambda t: nn.avg_pool1d(t, 4, 3, 2, include_padding=False),
             lambda t: F.avg_pool1d(t, 4, 3, 2, count_include_pad=False)),
        Case("cube", [cube], lambda t: nn.avg_pool3d(t, 2, 1, 1), lambda t: F.avg_pool3d(t, 2, 1, 1)),
        Case("cube_inside", [cube], lambda t: nn.avg_pool3d(t, 3, 2, 1, include_padding=False),
             lambda t: F.avg_pool3d(t, 3, 2, 1, count_include_pad=False)),
        Case("whole", [image], nn.global_avg_pool, lambda t: t.mean((2, 3))),
        Case("adaptive", [image], lambda t: nn.adaptive_avg_pool(t, (4, 3)),
             lambda t: F.adaptive_avg_pool2d(t, (4, 3))),
        Case("adaptive_more", [line], lambda t: nn.adaptive_avg_pool(t, 12),
             lambda t: F.adaptive_avg_pool1d(t, 12)),
    ], dtype)


def linear(t: Any, factor: Any, corners: bool) -> Any:
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[t.ndim]
    return F.interpolate(t, scale_factor=factor, mode=mode, align_corners=corners)


@both
def test_unpooling_and_upsampling(dtype: str) -> None:
    image, line, cube = normal(2, 3, 6, 5), normal(2, 3, 4), normal(1, 2, 3, 2, 4)

    def unpooled(t: Any) -> Any:
        return F.max_unpool2d(*F.max_pool2d(t, 2, return_indices=True), 2, output_size=(6, 5))
    compare([
        Case("unpool", [image],
             lambda t: nn.max_unpool(*nn.max_pool_with_switches(t, 2), 2, size=(6, 5)), unpooled),
        Case("unpool_line", [line], lambda t: nn.max_unpool(*nn.max_pool_with_switches(t, 2), 2),
             lambda t: F.max_unpool1d(*F.max_pool1d(t, 2, return_indices=True), 2)),
        Case("nearest", [image], lambda t: nn.upsample(t, 2), lambda t: F.interpolate(t, scale_factor=2)),
        Case("nearest_line", [line], lambda t: nn.upsample(t, 3), lambda t: F.interpolate(t, scale_factor=3)),
        Case("nearest_cube", [cube], lambda t: nn.upsample(t, (1, 2, 3)),
             lambda t: F.interpolate(t, scale_factor=(1, 2, 3))),
        Case("bilinear", [image], lambda t: nn.upsample(t, 2, "linear"), lambda t: linear(t, 2, False)),
        Case("bilinear_corners", [image], lambda t: nn.upsample(t, (3, 2), "linear", align_corners=True),
             lambda t: linear(t, (3, 2), True)),
        Case("linear", [line], lambda t: nn.upsample(t, 5, "linear"), lambda t: linear(t, 5, False)),
        Case("trilinear", [cube], lambda t: nn.upsample(t, 2, "linear"), lambda t: linear(t, 2, False)),
    ], dtype)


@both
def test_dense_layers(dtype: str) -> None:
    mask = (np.arange(12).reshape(3, 4) % 3 > 0)
    compare([
        Case("plain", [normal(5, 3)], lambda t: nn.dense(t, 4), lambda t, W, b: t @ W + b),
        Case("deep", [normal(2, 3, 3)], lambda t: nn.dense(t, 4, gf.tanh, use_bias=False),
             lambda t, W: torch.tanh(t @ W)),
        Case("vector", [normal(3)], lambda t: nn.dense(t, 4), lambda t, W, b: t @ W + b),
        Case("nothing", [normal(0, 3)], lambda t: nn.dense(t, 4), lambda t, W, b: t @ W + b),
        Case("normalised", [normal(5, 3)],
             lambda t: nn.dense(t, 4, use_bias=False, weight_init=nn.weight_norm(
                 gf.parameter((3, 4), gf.init.normal(1.0), "direction", t.dtype), 1, name="length")),
             lambda t, direction, scale: t @ torch._weight_norm(direction, scale[None], 1)),
    ], dtype)
    x, W = normal(5, 3).astype(dtype), normal(3, 4).astype(dtype)
    t = gf.input("x", x.shape, dtype)
    y = nn.dense(t, 4, weight_init=W, mask=mask, name="layer")
    kernel = next(p for p in parameters_of(y) if p.name == "layer.W")
    program = gf.function(t, [y, gf.grad(gf.sum(y * y), kernel)])
    connected = torch.tensor(W.astype(np.float64)).requires_grad_()
    expected = torch.tensor(x.astype(np.float64)) @ (connected * torch.tensor(mask))
    (slope,) = torch.autograd.grad((expected * expected).sum(), [connected])
    found, found_slope = program(x)
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    assert_near(found, expected.detach().numpy(), tolerance, "masked")
    assert_near(found_slope, slope.numpy(), tolerance, "d masked")
    assert not found_slope[~mask].any()
    np.testing.assert_array_equal(program.store["layer.mask"], mask)


@both
def test_embedding(dtype: str) -> None:
    indices = np.array([[1, 0, 6], [6, 2, 1]])

    def padding_row(i: Any, W: Any) -> Any:
        return F.embedding(i, W) * (i != 2)[..., None]
    compare([
        Case("plain", [indices], lambda i: nn.embedding(i, 7, 5, dtype=dtype),
             lambda i, W: F.embedding(i, W)),
        Case("bytes", [indices.astype(np.uint8)], lambda i: nn.embedding(i, 7, 5, dtype=dtype),
             lambda i, W: F.embedding(i.long(), W)),
        Case("padding", [indices], lambda i: nn.embedding(i, 7, 5, padding_index=2, dtype=dtype),
             padding_row),
    ], dtype)


@both
def test_normalisation(dtype: str) -> None:
    image, rows, cube = normal(3, 4, 5, 6), normal(5, 4), normal(2, 4, 3, 2, 3)
    compare([
        Case("layer", [rows], nn.layer_norm, lambda t, scale, b: F.layer_norm(t, (4,), scale, b)),
        Case("layer_image", [image], lambda t: nn.layer_norm(t, (-2, -1), eps=1e-3),
             lambda t, scale, b: F.layer_norm(t, (5, 6), scale, b, 1e-3)),
        Case("layer_plain", [image], lambda t: nn.layer_norm(t, (1, 2, 3), affine=False),
             lambda t: F.layer_norm(t, (4, 5, 6))),
        Case("layer_no_bias", [rows], lambda t: nn.layer_norm(t, use_bias=False),
             lambda t, scale: F.layer_norm(t, (4,), scale)),
        Case("rms", [rows], lambda t: nn.rms_norm(t), lambda t, scale: F.rms_norm(t, (4,), scale, 1e-6)),
        Case("rms_image", [image], lambda t: nn.rms_norm(t, (2, 3), eps=0.1, affine=False),
             lambda t: F.rms_norm(t, (5, 6), None, 0.1)),
        Case("group", [image], lambda t: nn.group_norm(t, 2),
             lambda t, scale, b: F.group_norm(t, 2, scale, b)),
        Case("group_cube", [cube], lambda t: nn.group_norm(t, 4, affine=False), lambda t: F.group_norm(t, 4)),
        Case("instance", [image], nn.instance_norm, F.instance_norm),
        Case("instance_affine", [cube], lambda t: nn.instance_norm(t, affine=True),
             lambda t, scale, b: F.instance_norm(t, weight=scale, bias=b)),
        Case("response", [image], lambda t: nn.local_response_norm(t, 5, alpha=0.5, k=2.0),
             lambda t: F.local_response_norm(t, 5, 0.5, 0.75, 2.0)),
        Case("response_even", [cube], lambda t: nn.local_response_norm(t, 2, alpha=1.0, beta=0.5),
             lambda t: F.local_response_norm(t, 2, 1.0, 0.5)),
        Case("response_line", [normal(2, 7, 3)], lambda t: nn.local_response_norm(t, 3, alpha=1.0),
             lambda t: F.local_response_norm(t, 3, 1.0)),
    ], dtype)


@both
def test_extents_of_0_and_1_and_windows_beyond_the_ends(dtype: str) -> None:
    one, none, thin = normal(1, 1, 1, 1), normal(0, 4, 3, 3), normal(2, 2, 1, 5)
    compare([
        Case("layer_one", [normal(3, 1)], nn.layer_norm, lambda t, scale, b: F.layer_norm(t, (1,), scale, b)),
        Case("layer_none", [normal(0, 4)], nn.layer_norm,
             lambda t, scale, b: F.layer_norm(t, (4,), scale, b)),
        Case("rms_one", [normal(3, 1)], lambda t: nn.rms_norm(t, eps=0.5),
             lambda t, scale: F.rms_norm(t, (1,), scale, 0.5)),
        Case("group_none", [none], lambda t: nn.group_norm(t, 2),
             lambda t, scale, b: F.group_norm(t, 2, scale, b)),
        Case("batch_two", [normal(2, 1)], lambda t: nn.batch_norm(t, eps=0.5),
             lambda t, **p: batch_norm_of(t, eps=0.5, **p)),
        Case("response_wide", [normal(2, 2, 3)], lambda t: nn.local_response_norm(t, 9, alpha=1.0),
             lambda t: F.local_response_norm(t, 9, 1.0)),
        Case("response_none", [none], lambda t: nn.local_response_norm(t, 3, alpha=1.0),
             lambda t: t * 1.0),
        Case("up_one", [one], lambda t: nn.upsample(t, 3, "linear"), lambda t: linear(t, 3, False)),
        Case("corners_one", [one], lambda t: nn.upsample(t, 3, "linear", align_corners=True),
             lambda t: linear(t, 3, True)),
        Case("up_same", [thin], lambda t: nn.upsample(t, 1, "linear", align_corners=True), lambda t: t * 1.0),
        Case("up_none", [none], lambda t: nn.upsample(t, 2), lambda t: F.interpolate(t, scale_factor=2)),
        Case("pool_thin", [thin], lambda t: nn.avg_pool2d(t, (1, 2), (1, 3)),
             lambda t: F.avg_pool2d(t, (1, 2), (1, 3))),
        Case("conv_thin", [thin], lambda t: nn.conv2d(t, 1, (1, 5)), lambda t, W, b: F.conv2d(t, W, b)),
        Case("transposed_one", [one], lambda t: nn.conv_transpose2d(t, 1, 1),
             lambda t, W, b: F.conv_transpose2d(t, W, b)),
        Case("adaptive_one", [one], lambda t: nn.adaptive_avg_pool(t, 3),
             lambda t: F.adaptive_avg_pool2d(t, 3)),
        Case("no_labels", [np.zeros((0, 2), np.int64)], lambda i: nn.embedding(i, 3, 2, dtype=dtype),
             lambda i, W: F.embedding(i, W)),
    ], dtype)


def batch_norm_of(t: Any, scale: Any = None, b: Any = None, eps: float = 1e-5, **state: Any) -> Any:
    return F.batch_norm(t, None, None, scale, b, True, 0.1, eps)


@both
def test_batch_norm_in_training(dtype: str) -> None:
    compare([
        Case("rows", [normal(6, 4)], nn.batch_norm, batch_norm_of),
        Case("line", [normal(3, 4, 5)], nn.batch_norm, batch_norm_of),
        Case("image", [normal(2, 4, 3, 5)], lambda t: nn.batch_norm(t, eps=0.1),
             lambda t, **p: batch_norm_of(t, eps=0.1, **p)),
        Case("cube", [normal(2, 3, 2, 3, 2)], lambda t: nn.batch_norm(t, affine=False), batch_norm_of),
        Case("far", [normal(8, 3) + 100], nn.batch_norm, batch_norm_of),
    ], dtype)


@both
def test_batch_norm_over_several_steps_and_in_evaluation(dtype: str) -> None:
    """Training with momentum: outputs, running statistics and parameters after each step; then evaluation."""
    N = gf.dim("N")
    x = gf.input("x", (N, 3, 4), dtype)
    y = nn.batch_norm(nn.conv1d(x, 5, 3, use_bias=False, name="conv"), momentum=0.3, name="norm")
    loss = gf.mean(gf.square(gf.tanh(y) - 0.5))
    step = gf.function(x, [y, loss], gf.optim.SGD(0.1, 0.9).minimize(loss))
    evaluate = gf.function(x, [y, loss], training=False)
    store = step.store
    net = torch.nn.Sequential(torch.nn.Conv1d(3, 5, 3, bias=False),
                              torch.nn.BatchNorm1d(5, momentum=0.3)).double()
    ours = {"conv.W": net[0].weight, "norm.scale": net[1].weight, "norm.b": net[1].bias,
            "norm.mean": net[1].running_mean, "norm.variance": net[1].running_var}
    with torch.no_grad():
        for name in ours:
            ours[name].copy_(torch.tensor(store[name].astype(np.float64)))
    descent = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    tolerance = {"float64": 1e-9, "float32": 1e-4}[dtype]
    for number in range(4):
        fed = (normal(4 + number, 3, 4, seed=number) * 2 + 1).astype(dtype)
        net.train()
        descent.zero_grad()
        wanted = net(torch.tensor(fed.astype(np.float64)))
        wanted_loss = (torch.tanh(wanted) - 0.5).square().mean()
        wanted_loss.backward()
        descent.step()
        found, found_loss = step(fed)
        assert_near(found, wanted.detach().numpy(), tolerance, f"step {number}")
        assert_near(found_loss, wanted_loss.detach().numpy(), tolerance, f"loss {number}")
        for name, value in ours.items():
            assert_near(store[name], value.detach().numpy(), tolerance, f"{name} after step {number}")
    net.eval()
    kept = {name: store[name].tobytes() for name in store}
    fed = normal(1, 3, 4).astype(dtype)
    assert_near(evaluate(fed)[0], net(torch.tensor(fed.astype(np.float64))).detach().numpy(), tolerance,
                "evaluation")
    assert kept == {name: store[name].tobytes() for name in store}


@both
def test_shared_layers(dtype: str) -> None:
    """Gradients of both uses add up; running statistics move once for each use."""
    a, b = gf.input("a", (4, 3), dtype), gf.input("b", (5, 3), dtype)
    part = nn.shared(lambda t: nn.batch_norm(nn.dense(t, 2, gf.tanh, name="layer"), name="norm"))
    loss = gf.sum(part(a)[:4] * gf.arange(1, 3)) + gf.sum(gf.exp(part(b)))
    weights = next(p for p in parameters_of(loss) if p.name == "layer.W")
    program = gf.function([a, b], [loss, gf.grad(loss, weights)], training=True)
    store = program.store
    assert store.names("parameter") == ["layer.W", "layer.b", "norm.scale", "norm.b"]
    store["norm.scale"] = store["norm.scale"] * 1.5
    norm = torch.nn.BatchNorm1d(2).double()
    norm.weight.data.fill_(1.5)
    W = torch.tensor(store["layer.W"].astype(np.float64)).requires_grad_()
    fed = [normal(4, 3).astype(dtype), normal(5, 3).astype(dtype)]
    first, second = (norm(torch.tanh(torch.tensor(x.astype(np.float64)) @ W)) for x in fed)
    expected = (first * torch.arange(1, 3)).sum() + second.exp().sum()
    (slope,) = torch.autograd.grad(expected, [W])
    found, found_slope = program(*fed)
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    assert_near(found, expected.detach().numpy(), tolerance, "loss")
    assert_near(found_slope, slope.numpy(), tolerance, "slope")
    assert_near(store["norm.mean"], norm.running_mean.numpy(), tolerance, "mean")
    assert_near(store["norm.variance"], norm.running_var.numpy(), tolerance, "variance")
