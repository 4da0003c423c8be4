"""Linear algebra against numpy.linalg and scipy.linalg; gradients against finite differences of these."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import linalg

import graphflow as gf
from graphflow.compiler.plan.errors import ShapeError, UseError

RNG = np.random.default_rng(0)
Arrays = tuple[np.ndarray, ...]


def square(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    a = RNG.standard_normal(shape)
    return a @ np.swapaxes(a, -1, -2) + shape[-1] * np.eye(shape[-1])


def triangular(*shape: int) -> np.ndarray:
    """Far from singular in both triangles."""
    return RNG.uniform(-1, 1, shape) + 3 * np.eye(shape[-1])


def each(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of matrices applied to each matrix of a batch; results are arrays or tuples of them."""
    def batched(*arrays: np.ndarray) -> Any:
        lead = arrays[0].shape[:-2]
        found = [f(*(a[at] for a in arrays)) for at in np.ndindex(*lead)]
        parts = list(zip(*found)) if isinstance(found[0], tuple) else [found]
        stacked = tuple(np.stack([np.asarray(p) for p in part]).reshape((*lead, *np.shape(part[0])))
                        for part in parts)
        return stacked if isinstance(found[0], tuple) else stacked[0]
    return batched


def scipy_lu(a: np.ndarray) -> np.ndarray:
    return linalg.lu_factor(a)[0]


def scipy_triangular(**options: Any) -> Callable[..., Any]:
    return each(lambda a, b: linalg.solve_triangular(a, b, **options))


Case = tuple[str, Callable[..., Any], Callable[..., Any], Arrays]
CASES: list[Case] = [
    ("cholesky", gf.linalg.cholesky, np.linalg.cholesky, (positive(2, 3, 3),)),
    ("cholesky 1", gf.linalg.cholesky, np.linalg.cholesky, (positive(1, 1),)),
    ("lu", lambda a: gf.linalg.lu_factor(a)[0], each(scipy_lu), (square(2, 4, 4),)),
    ("solve", gf.linalg.solve, np.linalg.solve, (square(2, 4, 4), square(2, 4, 3))),
    ("solve one", gf.linalg.solve, np.linalg.solve, (square(5, 5), square(5))),
    ("inv", gf.linalg.inv, np.linalg.inv, (square(2, 2, 3, 3),)),
    ("det", gf.linalg.det, np.linalg.det, (square(3, 4, 4),)),
    ("slogdet", gf.linalg.slogdet, lambda a: tuple(np.linalg.slogdet(a)), (square(4, 3, 3),)),
    ("qr", gf.linalg.qr, lambda a: tuple(np.linalg.qr(a)), (square(2, 5, 3),)),
    ("qr square", gf.linalg.qr, lambda a: tuple(np.linalg.qr(a)), (square(4, 4),)),
    ("qr wide", gf.linalg.qr, lambda a: tuple(np.linalg.qr(a)), (square(3, 5),)),
    ("r", lambda a: gf.linalg.qr(a, "r"), lambda a: np.linalg.qr(a, "r"), (square(4, 3),)),
    ("lstsq", gf.linalg.lstsq, lambda a, b: np.linalg.lstsq(a, b)[0], (square(6, 3), square(6, 2))),
    ("lstsq one", gf.linalg.lstsq, lambda a, b: np.linalg.lstsq(a, b)[0], (square(6, 3), square(6))),
    ("lstsq wide", gf.linalg.lstsq, each(lambda a, b: np.linalg.lstsq(a, b)[0]),
     (square(2, 3, 5), square(2, 3, 2))),
    *((f"triangular {options}", lambda a, b, o=options: gf.linalg.solve_triangular(a, b, **o),
       scipy_triangular(**options), (triangular(2, 4, 4), square(2, 4, 3)))
      for options in ({}, {"lower": True}, {"trans": True}, {"lower": True, "trans": True},
                      {"lower": True, "unit_diagonal": True}, {"trans": True, "unit_diagonal": True}))]


def parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def compiled(dtype: str, build: Callable[[str, Callable[..., Any], list[gf.Tensor]], list[gf.Tensor]]
             ) -> tuple[list[gf.Tensor], list[np.ndarray], list[list[gf.Tensor]]]:
    """The inputs, arrays and tensors of all cases, for one program."""
    inputs, arrays, built = [], [], []
    for i, (name, f, _, given) in enumerate(CASES):
        own = [gf.input(f"x{i}_{j}", a.shape, dtype) for j, a in enumerate(given)]
        inputs, arrays = inputs + own, arrays + [a.astype(dtype) for a in given]
        built.append(build(name, f, own))
    return inputs, arrays, built


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_numpys(device: str, dtype: str) -> None:
    inputs, arrays, built = compiled(dtype, lambda name, f, own: list(parts(f(*own))))
    found = iter(gf.function(inputs, [t for group in built for t in group], device=device)(*arrays))
    near = 2e-4 if dtype == "float32" else 1e-12
    for (name, _, oracle, given), group in zip(CASES, built):
        for tensor, wanted in zip(group, parts(oracle(*given)), strict=True):
            value = next(found)
            assert value.dtype == np.dtype(dtype) and value.shape == tensor.shape == np.shape(wanted), name
            np.testing.assert_allclose(value, wanted, rtol=near, atol=near, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device: str) -> None:
    """The derivative along a direction of all operands; a symmetric one where a matrix is symmetric."""
    weights: dict[str, list[np.ndarray]] = {}
    directions: dict[str, list[np.ndarray]] = {}
    for name, _, oracle, given in CASES:
        weights[name] = [RNG.uniform(0.5, 1.5, np.shape(p)) for p in parts(oracle(*given))]
        directions[name] = [RNG.standard_normal(a.shape) for a in given]
        if "cholesky" in name:
            directions[name] = [d + np.swapaxes(d, -1, -2) for d in directions[name]]

    def build(name: str, f: Callable[..., Any], own: list[gf.Tensor]) -> list[gf.Tensor]:
        total = gf.constant(0.0, "float64")
        for p, w in zip(parts(f(*own)), weights[name]):
            total = total + gf.sum(p * gf.constant(w))
        along = gf.constant(0.0, "float64")
        for g, d in zip(gf.grad(total, own), directions[name]):
            along = along + gf.sum(g * gf.constant(d))
        return [along]

    inputs, arrays, built = compiled("float64", build)
    found = gf.function(inputs, [t for group in built for t in group], device=device)(*arrays)
    step = 1e-6
    for (name, _, oracle, given), value in zip(CASES, found):
        sides = []
        for sign in (1, -1):
            moved = parts(oracle(*(a + sign * step * d for a, d in zip(given, directions[name]))))
            sides.append(sum(np.sum(w * p) for w, p in zip(weights[name], moved)))
        expected = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(device: str) -> None:
    """The first derivatives are known: of log det the inverse, of a right-hand side the transposed system."""
    a, s, w = square(4, 4), positive(4, 4), square(4, 4)
    d, ds = square(4, 4), square(4, 4)
    ds = ds + ds.T
    x, y = gf.input("a", a.shape, "float64"), gf.input("s", s.shape, "float64")
    weights = gf.constant(w)
    factor = gf.linalg.cholesky(y)
    firsts = [(gf.grad(gf.linalg.slogdet(x).logabsdet, x), x, lambda m: np.linalg.inv(m).T, a, d),
              (gf.grad(2 * gf.sum(gf.log(gf.diagonal(factor))), y), y, np.linalg.inv, s, ds)]
    built, expected = [], []
    for gradient, t, oracle, at, along in firsts:
        second = gf.grad(gf.sum(gradient * weights), t)
        built += [gradient, gf.sum(second * gf.constant(along))]
        moved = [np.sum(w * oracle(at + sign * 1e-6 * along)) for sign in (1, -1)]
        expected += [oracle(at), (moved[0] - moved[1]) / 2e-6]
    b = gf.input("b", (4, 2), "float64")
    db = gf.grad(gf.sum(gf.linalg.solve(x, b) * gf.constant(w[:, :2])), b)
    built += [db, gf.sum(gf.grad(gf.sum(db * db), x) * gf.constant(d))]
    moved = [np.sum(np.linalg.solve((a + sign * 1e-6 * d).T, w[:, :2]) ** 2) for sign in (1, -1)]
    expected += [np.linalg.solve(a.T, w[:, :2]), (moved[0] - moved[1]) / 2e-6]
    found = gf.function([x, y, b], built, device=device)(a, s, square(4, 2))
    for value, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_larger_and_harder_matrices(device: str) -> None:
    a, b = square(60, 60), square(60)
    ill = linalg.hilbert(8)
    swap = np.array([[0.0, 1, 0], [0, 0, 2], [3, 0, 0]])               # every pivot is another row
    n = gf.dim("N")
    x, v = gf.input("x", (n, n), "float64"), gf.input("v", (n,), "float64")
    f = gf.function([x, v], [gf.linalg.solve(x, v), gf.linalg.det(x), gf.linalg.slogdet(x)[0]], device=device)
    for matrix, right in ((a, b), (ill, ill.sum(1)), (swap, np.ones(3))):
        solution, det, sign = f(matrix, right)
        assert np.max(np.abs(matrix @ solution - right)) <= 1e-11 * max(1, np.max(np.abs(solution)))
        np.testing.assert_allclose(det, np.linalg.det(matrix), rtol=1e-5)
        assert sign == np.linalg.slogdet(matrix)[0]
    t = gf.input("t", (40, 25), "float64")
    tall = square(40, 25)
    q, r = gf.function(t, list(gf.linalg.qr(t)), device=device)(tall)
    np.testing.assert_allclose(q.T @ q, np.eye(25), atol=1e-14)
    np.testing.assert_allclose(q @ r, tall, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_what_has_no_factorisation_gives_no_number(device: str) -> None:
    x, b = gf.input("x", (2, 2, 2), "float64"), gf.ones((2, 2), "float64")
    f = gf.function(x, [gf.linalg.cholesky(x), gf.linalg.solve(x, b), gf.linalg.det(x)], device=device)
    bad = np.array([[[1.0, 2], [2, 1]], [[1, 1], [1, 1]]])             # indefinite, singular
    factor, solution, det = f(bad)
    assert np.isnan(factor[0]).any() and not np.isfinite(solution[1]).any()
    np.testing.assert_allclose(solution[0], np.linalg.solve(bad[0], np.ones((2, 2))))
    np.testing.assert_allclose(det, [-3, 0], atol=1e-15)


@pytest.mark.parametrize("build, kind, message", [
    (lambda x, n: gf.linalg.cholesky(x), ShapeError, "cholesky takes square matrices"),
    (lambda x, n: gf.linalg.inv(x[0]), ShapeError, "inv takes square matrices"),
    (lambda x, n: gf.linalg.solve(x, x), ShapeError, "solve takes square matrices"),
    (lambda x, n: gf.linalg.solve(x, x[:2]), ShapeError, "have 3 rows"),
    (lambda x, n: gf.linalg.qr(x, "complete"), UseError, "modes are 'reduced' and 'r'"),
    (lambda x, n: gf.linalg.qr(n), ShapeError, "known extents"),
    (lambda x, n: gf.linalg.lstsq(n, n), ShapeError, "known extents(?s:.)*by gf.linalg.solve"),
])
def test_errors_say_what_is_wrong(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(gf.input("x", (3, 4)), gf.input("n", (gf.dim("N"), 3)))
