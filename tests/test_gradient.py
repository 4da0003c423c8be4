"""Products with Jacobians, Jacobians and Hessians against their formulas, finite differences and PyTorch."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.gradient import MAX_ROWS

RNG = np.random.default_rng(0)
A, W = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2))


def run(outputs: Any, *arrays: np.ndarray, inputs: Any, device: str = "reference") -> Any:
    return gf.function(inputs, outputs, device=device)(*arrays)


def feeds(*shapes: tuple[int, ...]) -> list[gf.Tensor]:
    return [gf.input(f"x{i}", shape, "float64") for i, shape in enumerate(shapes)]


def net(x: gf.Tensor, w: gf.Tensor) -> gf.Tensor:
    return gf.softmax(gf.tanh(x) @ w) * gf.sum(w * w)


def net_numpy(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    e = np.exp(np.tanh(x) @ w)
    return e / e.sum(-1, keepdims=True) * np.sum(w * w)


def difference(x: np.ndarray, w: np.ndarray, dx: np.ndarray, dw: np.ndarray, h: float = 1e-6) -> np.ndarray:
    return (net_numpy(x + h * dx, w + h * dw) - net_numpy(x - h * dx, w - h * dw)) / (2 * h)


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_the_jacobian_with_a_direction(device: str) -> None:
    x, w = feeds(A.shape, W.shape)
    dx, dw = RNG.standard_normal(A.shape), RNG.standard_normal(W.shape)
    found = run(gf.jvp(net, [x, w], [dx, dw]), A, W, inputs=[x, w], device=device)
    np.testing.assert_allclose(found, difference(A, W, dx, dw), rtol=1e-6, atol=1e-8)
    one = run(gf.jvp(net(x, w), w, dw), A, W, inputs=[x, w], device=device)
    np.testing.assert_allclose(one, difference(A, W, 0 * dx, dw), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_a_vector_with_the_jacobian(device: str) -> None:
    x, w = feeds(A.shape, W.shape)
    v, dx, dw = (RNG.standard_normal(s) for s in ((3, 2), A.shape, W.shape))
    by_x, by_w = run(gf.vjp(net, [x, w], v), A, W, inputs=[x, w], device=device)
    expected = np.sum(v * difference(A, W, dx, dw))
    np.testing.assert_allclose(np.sum(by_x * dx) + np.sum(by_w * dw), expected, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_several_outputs_and_numbers_for_vectors(device: str) -> None:
    (x,) = feeds((3,))
    point = np.array([0.3, -1.0, 2.0])
    pulled = gf.vjp([x * x, gf.exp(x)], x, [1, 2.0])
    pushed = gf.jvp([x * x, gf.exp(x)], x, 0.5)
    a, b, c = run([pulled, *pushed], point, inputs=[x], device=device)
    np.testing.assert_allclose(a, 2 * point + 2 * np.exp(point), rtol=1e-14)
    np.testing.assert_allclose(b, point, rtol=1e-14)
    np.testing.assert_allclose(c, 0.5 * np.exp(point), rtol=1e-14)


def test_no_gradient_flows_through_cotangents() -> None:
    """But derivatives of the product by what it depends on do."""
    (x,) = feeds(())
    pulled = gf.vjp(x ** 3, x, x)                         # 3x² times x, the last x a constant
    again = gf.grad(pulled, x)                            # of 3x³
    assert run([pulled, again], np.array(2.0), inputs=[x]) == [24.0, 36.0]


@pytest.mark.parametrize("device", DEVICES)
def test_hessian_products(device: str) -> None:
    x, w = feeds(A.shape, W.shape)

    def slopes(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        return run(gf.grad(gf.sum(net(x, w) ** 2), [x, w]), a, b, inputs=[x, w])

    dx, dw, h = RNG.standard_normal(A.shape), RNG.standard_normal(W.shape), 1e-6
    found = run(gf.hvp(lambda x, w: gf.sum(net(x, w) ** 2), [x, w], [dx, dw]), A, W, inputs=[x, w],
                device=device)
    for f, up, down in zip(found, slopes(A + h * dx, W + h * dw), slopes(A - h * dx, W - h * dw)):
        np.testing.assert_allclose(f, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_jacobians_by_rows_and_by_columns(device: str) -> None:
    x, w = feeds((4,), (4, 3))
    point, weights = RNG.standard_normal(4), RNG.standard_normal((4, 3))
    wide = run(gf.jacobian(gf.tanh(x @ w), x), point, weights, inputs=[x, w], device=device)
    slope = 1 - np.tanh(point @ weights) ** 2
    np.testing.assert_allclose(wide, slope[:, None] * weights.T, rtol=1e-12)
    tall = run(gf.jacobian(lambda x: gf.stack([x, x * x, x ** 3]), x), point, inputs=[x], device=device)
    diagonals = np.stack([np.ones(4), 2 * point, 3 * point ** 2])
    np.testing.assert_allclose(tall, diagonals[:, :, None] * np.eye(4), rtol=1e-12)
    by_x, by_w = run(gf.jacobian(x @ w, [x, w]), point, weights, inputs=[x, w], device=device)
    np.testing.assert_allclose(by_x, weights.T, rtol=1e-14)
    np.testing.assert_allclose(by_w, np.einsum("i,jk->jik", point, np.eye(3)), rtol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_hessians(device: str) -> None:
    """Rosenbrock's function of three numbers, whose second derivatives are known."""
    (x,) = feeds((3,))
    value = gf.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    a, b, c = point = np.array([0.5, -0.3, 1.2])
    expected = [[1200 * a * a - 400 * b + 2, -400 * a, 0],
                [-400 * a, 200 + 1200 * b * b - 400 * c + 2, -400 * b], [0, -400 * b, 200]]
    np.testing.assert_allclose(run(gf.hessian(value, x), point, inputs=[x], device=device), expected,
                               rtol=1e-12, atol=1e-9)
    y, z = feeds((2,), (2,))
    blocks = gf.hessian(lambda y, z: gf.sum(y * y * z), [y, z])
    p, q = np.array([1.0, 2.0]), np.array([3.0, -1.0])
    (yy, yz), (zy, zz) = (run(row, p, q, inputs=[y, z], device=device) for row in blocks)
    np.testing.assert_allclose(yy, np.diag(2 * q))
    np.testing.assert_allclose([yz, zy], [np.diag(2 * p)] * 2)
    np.testing.assert_allclose(zz, np.zeros((2, 2)))


def test_value_and_gradient() -> None:
    x, y = feeds((2,), (2,))
    value, (by_x, by_y) = gf.value_and_grad(lambda a, b: gf.sum(a * b), [x, y])
    p, q = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    total, a, b = run([value, by_x, by_y], p, q, inputs=[x, y])
    assert total == 11 and a.tolist() == [3, 4] and b.tolist() == [1, 2]


def test_batches_of_open_size() -> None:
    x = gf.input("x", (None, 2), "float64")
    found = run([gf.jvp(gf.exp(x), x, 1.0), gf.vjp(gf.exp(x), x, 2.0)], np.ones((5, 2)), inputs=[x])
    np.testing.assert_allclose(found[0], np.full((5, 2), np.e))
    np.testing.assert_allclose(found[1], np.full((5, 2), 2 * np.e))


def test_checking_a_gradient() -> None:
    assert gf.check_gradient(net, A, W) < 1e-6

    def wrong(x: gf.Tensor) -> gf.Tensor:
        return x * gf.stop_gradient(x)

    with pytest.raises(gf.UseError, match=r"the gradient by array 0 at \[0\] is .*, the difference quotient"):
        gf.check_gradient(wrong, np.array([1.0, 2.0]))


@pytest.mark.parametrize("make, message", [
    (lambda x, y: gf.vjp(x * 2, y, 1.0), "the output does not depend on 'x1'"),
    (lambda x, y: gf.vjp(x * 2, x, np.ones(2)), "the cotangent has another shape"),
    (lambda x, y: gf.vjp(x * 2, x, gf.cast(x, "float32")), "the cotangent is float32, its tensor float64"),
    (lambda x, y: gf.jvp(x * y, [x, y], np.ones(3)), "there are 2 tensors, so tangents are a list"),
    (lambda x, y: gf.vjp(gf.argmax(x), x, 1), "differentiates a float"),
    (lambda x, y: gf.jacobian(gf.zeros((64, 64), "float64") + gf.pad(x, ((0, 4093),)).reshape(64, 64),
                              gf.pad(x, ((0, MAX_ROWS),))), "does not depend"),
    (lambda x, y: gf.grad(x * y, x), "reduce it to a scalar")])
def test_misuse_is_refused(make: Any, message: str) -> None:
    with pytest.raises(gf.UserError, match=message) as error:
        make(*feeds((3,), (3,)))
    assert error.value.where is not None and error.value.where.file == __file__


def test_a_jacobian_that_is_too_large_is_refused() -> None:
    (x,) = feeds((MAX_ROWS + 1,))
    with pytest.raises(gf.UseError, match="needs a pass for each"):
        gf.jacobian(x * x, x)
    n = gf.input("n", (None,))
    with pytest.raises(gf.UseError, match="needs a pass for each"):
        gf.jacobian(n * n, n)


@pytest.mark.parametrize("name", ["jacobian", "hessian", "hvp", "vjp", "jvp"])
def test_pytorch_agrees(name: str) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.autograd.functional
    x, v = RNG.standard_normal((3, 3)), RNG.standard_normal((3, 3))
    tensor, vector = torch.from_numpy(x), torch.from_numpy(v)
    (feed,) = feeds((3, 3))

    def ours(z: gf.Tensor) -> gf.Tensor:
        return gf.tanh(z @ z) * gf.log(1 + gf.exp(z.T))

    def theirs(z: Any) -> Any:
        return torch.tanh(z @ z) * torch.log(1 + torch.exp(z.T))

    scalar = name in ("hessian", "hvp")
    f, g = (lambda z: gf.sum(ours(z)), lambda z: theirs(z).sum()) if scalar else (ours, theirs)
    if name in ("jacobian", "hessian"):
        expected, found = getattr(functional, name)(g, tensor), getattr(gf, name)(f, feed)
    else:
        expected, found = getattr(functional, name)(g, tensor, vector)[1], getattr(gf, name)(f, feed, v)
    np.testing.assert_allclose(run(found, x, inputs=[feed]), expected.numpy(), rtol=1e-10, atol=1e-12)
