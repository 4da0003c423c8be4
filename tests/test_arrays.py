"""Functions of shapes, windows, indices and reductions against NumPy and SciPy; their gradients against
finite differences of NumPy's functions."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import signal

import graphflow as gf
from graphflow.compiler.plan.errors import ShapeError, UseError

RNG = np.random.default_rng(0)
CUBE = RNG.permutation(np.linspace(-2, 2, 4 * 5 * 3)).reshape(4, 5, 3)
FLOATS = ["float32", "float64"]
Case = tuple[str, Callable[[Any, Any], Any]]


def compute(device: str, cases: list[Case], x: np.ndarray, shape: Any = None) -> dict[str, np.ndarray]:
    """Every case of the array, in one program."""
    t = gf.input("x", x.shape if shape is None else shape, x.dtype)
    return gf.function(t, {name: f(gf, t) for name, f in cases}, device=device)(x)


def check(found: dict[str, np.ndarray], cases: list[Case], m: Any, x: np.ndarray, tolerance: float) -> None:
    for name, f in cases:
        expected = np.asarray(f(m, x))
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == expected.dtype, name
        np.testing.assert_allclose(found[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)


def numeric_gradient(f: Callable[[np.ndarray], Any], x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Central differences of sum(f(x) * weights) at x, in float64."""
    out, step = np.zeros(x.shape), 1e-6
    for at in np.ndindex(*x.shape):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            sides.append(np.sum(f(moved) * weights))
        out[at] = (sides[0] - sides[1]) / (2 * step)
    return out


def check_gradients(device: str, cases: list[Case], m: Any, x: np.ndarray, tolerance: float = 1e-7) -> None:
    """The gradients of weighted sums of all cases, in one program."""
    rng = np.random.default_rng(1)
    t = gf.input("x", x.shape, "float64")
    weights = {name: rng.uniform(0.5, 1.5, np.shape(f(m, x))) for name, f in cases}
    built = {name: gf.grad(gf.sum(f(gf, t) * gf.constant(weights[name])), t) for name, f in cases}
    found = gf.function(t, built, device=device)(x)
    for name, f in cases:
        expected = numeric_gradient(lambda a, f=f: f(m, a), x, weights[name])        # type: ignore[misc]
        np.testing.assert_allclose(found[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)


# --- shapes

SHAPES: list[Case] = [
    ("moveaxis", lambda m, x: m.moveaxis(x, 0, -1)),
    ("moveaxis two", lambda m, x: m.moveaxis(x, (0, 2), (1, 0))),
    ("tile", lambda m, x: m.tile(x, (2, 1, 3))), ("tile last", lambda m, x: m.tile(x, 2)),
    ("tile front", lambda m, x: m.tile(x, (2, 1, 1, 2))), ("tile none", lambda m, x: m.tile(x, (1, 0, 1))),
    ("repeat", lambda m, x: m.repeat(x, 3, axis=1)), ("repeat flat", lambda m, x: m.repeat(x, 2)),
    ("repeat each", lambda m, x: m.repeat(x, [2, 0, 1, 3], axis=0)),
    ("roll", lambda m, x: m.roll(x, 2, axis=1)), ("roll back", lambda m, x: m.roll(x, -1, axis=0)),
    ("roll far", lambda m, x: m.roll(x, 13, axis=1)), ("roll flat", lambda m, x: m.roll(x, 7)),
    ("roll several", lambda m, x: m.roll(x, (1, -2), axis=(0, 2))),
    ("roll all", lambda m, x: m.roll(x, 1, axis=(0, 1))),
    *((f"rot90 {k}", lambda m, x, k=k: m.rot90(x, k, axes=(2, 0))) for k in (-1, 0, 1, 2, 3)),
    ("diagonal", lambda m, x: m.diagonal(x)), ("diagonal 0 2", lambda m, x: m.diagonal(x, 1, 0, 2)),
    ("diagonal below", lambda m, x: m.diagonal(x, -2, 1, 2)), ("no diagonal", lambda m, x: m.diagonal(x, 9)),
    ("diag of matrix", lambda m, x: m.diag(x[0], 1)), ("diag", lambda m, x: m.diag(x[:, 0, 1])),
    ("diag above", lambda m, x: m.diag(x[:, 0, 1], 2)), ("diag below", lambda m, x: m.diag(x[0, :, 1], -1)),
    ("trace", lambda m, x: m.trace(x)), ("trace of", lambda m, x: m.trace(x, -1, 1, 2)),
    ("tril", lambda m, x: m.tril(x)), ("tril 1", lambda m, x: m.tril(x, 1)), ("triu", lambda m, x: m.triu(x)),
    ("triu -1", lambda m, x: m.triu(x, -1)),
    ("split", lambda m, x: m.split(x, 5, axis=1)[3]), ("stack", lambda m, x: m.stack([x, x * 2], axis=-1)),
    ("squeeze", lambda m, x: m.squeeze(x[:, :1])), ("expand", lambda m, x: m.expand_dims(x, (1, -1))),
    ("concatenate", lambda m, x: m.concatenate([x, x[:, :2]], axis=1)),
]


@pytest.mark.parametrize("device", DEVICES)
def test_shape_functions_are_numpys(device: str) -> None:
    for dtype in ("float32", "int32", "bool"):
        x = (CUBE * 9 > 0) if dtype == "bool" else (CUBE * 9).astype(dtype)
        cases = [(n, f) for n, f in SHAPES if not (dtype == "bool" and n.startswith(("trace", "stack")))]
        if dtype == "int32":
            cases = [(n, f) for n, f in cases if not n.startswith("trace")]       # NumPy sums it in int64
        check(compute(device, cases, x), cases, np, x, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_shape_functions(device: str) -> None:
    cases = [(n, f) for n, f in SHAPES if n not in ("tile none", "no diagonal")]
    check_gradients(device, cases, np, CUBE)


MODES = ["edge", "reflect", "symmetric", "wrap"]
WIDTHS = [1, (2, 3), ((0, 2), (1, 0), (3, 1)), ((7, 9), (4, 11), (0, 5))]


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_numpys(device: str) -> None:
    cases: list[Case] = [(f"{mode} {width}", lambda m, x, mode=mode, width=width: m.pad(x, width, mode=mode))
                         for mode in ["constant", *MODES] for width in WIDTHS]
    cases += [("one", lambda m, x: m.pad(x[:1], 3, mode="reflect"))]
    check(compute(device, cases, CUBE), cases, np, CUBE, 0)
    check_gradients(device, [case for case in cases if "(7" not in case[0]], np, CUBE[:2, :4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [4, 7])
def test_shape_functions_with_an_extent_that_the_call_decides(device: str, rows: int) -> None:
    cases: list[Case] = [
        ("tile", lambda m, x: m.tile(x, (3, 1, 2))), ("repeat", lambda m, x: m.repeat(x, 2, axis=0)),
        ("roll", lambda m, x: m.roll(x, 2, axis=0)),
        ("roll back", lambda m, x: m.roll(x, (-4, 1), axis=(0, 1))),
        ("rot90", lambda m, x: m.rot90(x)), ("tril", lambda m, x: m.tril(m.moveaxis(x, 0, 2), 1)),
        ("gram", lambda m, x: m.diagonal(x[:, 0] @ x[:, 0].T)),
        ("trace", lambda m, x: m.trace(x[:, 0] @ x[:, 0].T)), ("diag", lambda m, x: m.diag(x[:, 0, 0], -1)),
        ("diagonal", lambda m, x: m.diagonal(x, 0, 1, 2)), ("flip", lambda m, x: m.flip(x)),
        ("merged", lambda m, x: m.reshape(m.transpose(x * 2, (1, 0, 2)), (-1, 3))),
        ("last", lambda m, x: x[[0, 1, 3]]), ("stride", lambda m, x: x[1::2, ::-2]),
        *((mode, lambda m, x, mode=mode: m.pad(x, ((3, 2), (1, 1), (0, 0)), mode=mode)) for mode in MODES)]
    x = RNG.standard_normal((rows, 5, 3)).astype(np.float32)
    check(compute(device, cases, x, (gf.dim("N"), 5, 3)), cases, np, x, 1e-5)


# --- new arrays

@pytest.mark.parametrize("device", DEVICES)
def test_new_arrays_are_numpys(device: str) -> None:
    n = gf.dim("N")
    line = np.linspace(0, 1, 7, dtype=np.float32)
    x = gf.input("x", (n,))
    built = [gf.arange(5), gf.arange(2, 11, 3), gf.arange(5, -4, -2), gf.arange(0.5, 2, 0.3), gf.arange(3, 3),
             gf.arange(4, dtype="int64"), gf.arange(n), gf.arange(2, n), gf.arange(-2, n, 2),
             gf.arange(n, 3 * n, 4),
             gf.linspace(-1, 2, 8), gf.linspace(0, 1, 4, endpoint=False), gf.linspace(x[0], x[-1], n),
             gf.linspace(3, 4, 1), gf.eye(4), gf.eye(3, 5, 1, "int32"), gf.eye(n, offset=-2), gf.tri(3, 4, 1),
             *gf.meshgrid(x, gf.arange(3)), *gf.meshgrid(x, gf.arange(3), gf.arange(2), indexing="ij"),
             gf.zeros_like(x), gf.ones_like(x, "int32"), gf.full_like(x, 2.5), gf.one_hot(gf.arange(3), 4)]
    f32, i32 = np.float32, np.int32
    expected = [np.arange(5, dtype=i32), np.arange(2, 11, 3, i32), np.arange(5, -4, -2, i32),
                np.arange(0.5, 2, 0.3, f32), np.arange(0, dtype=i32), np.arange(4), np.arange(7, dtype=i32),
                np.arange(2, 7, dtype=i32), np.arange(-2, 7, 2, i32), np.arange(7, 21, 4, i32),
                np.linspace(-1, 2, 8, dtype=f32), np.linspace(0, 1, 4, endpoint=False, dtype=f32), line,
                np.linspace(3, 4, 1, dtype=f32), np.eye(4, dtype=f32), np.eye(3, 5, 1, i32),
                np.eye(7, k=-2, dtype=f32), np.tri(3, 4, 1, f32), *np.meshgrid(line, np.arange(3, dtype=i32)),
                *np.meshgrid(line, np.arange(3, dtype=i32), np.arange(2, dtype=i32), indexing="ij"),
                np.zeros(7, f32), np.ones(7, i32), np.full(7, 2.5, f32), np.eye(3, 4, dtype=f32)]
    made = gf.function(x, built, device=device)(line)
    for i, (found, wanted) in enumerate(zip(made, expected, strict=True)):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, i
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6, err_msg=str(i))


# --- indices

@pytest.mark.parametrize("device", DEVICES)
def test_index_arrays_among_the_keys(device: str) -> None:
    rows = np.array([[2, 0], [1, 1]])
    mask = np.array([True, False, True, False, True])
    keys: list[Any] = [(slice(None), rows), (Ellipsis, [0, 2]), (1, [0, -1]), (rows, None, slice(1, None, 2)),
                       (slice(None, None, -1), mask), (Ellipsis, rows, 1), (0, rows, 2), [3, 1], np.array(2),
                       (slice(None), [], slice(1, 2)), np.array([True, False, False, True])]
    t, r = gf.input("x", CUBE.shape, "float64"), gf.input("rows", rows.shape, "int64")
    symbolic = [tuple(r if k is rows else k for k in key) if isinstance(key, tuple) else key for key in keys]
    found = gf.function([t, r], [*(t[k] for k in keys), *(t[k] for k in symbolic),
                                 gf.take(t, [5, -1], axis=None)], device=device)(CUBE, rows)
    for value, key in zip(found, [*keys, *keys]):
        expected = CUBE[tuple(np.array(k, int) if isinstance(k, list) else k for k in key)
                        if isinstance(key, tuple) else key]
        assert value.shape == expected.shape, key
        np.testing.assert_array_equal(value, expected, err_msg=str(key))
    np.testing.assert_array_equal(found[-1], np.take(CUBE, [5, -1]))


@pytest.mark.parametrize("device", DEVICES)
def test_take_along_an_axis_broadcasts(device: str) -> None:
    order = np.argsort(CUBE[:1], axis=1)
    cases: list[Case] = [
        ("one row", lambda m, x: m.take_along_axis(x, order, 1)),
        ("array", lambda m, x: m.take_along_axis(x[:, :1], np.zeros((4, 2, 3), int), 1)),
        ("negative", lambda m, x: m.take_along_axis(x, np.full((4, 1, 3), -1), 1)),
        ("take", lambda m, x: m.take(x, [[0, 2], [2, 1]], axis=2))]
    check(compute(device, cases, CUBE), cases, np, CUBE, 0)
    check_gradients(device, cases, np, CUBE)


# --- windows

def windows_of(x: np.ndarray, size: Any, stride: Any, dilation: Any, axis: Any) -> np.ndarray:
    """NumPy's sliding windows with steps."""
    span = tuple((s - 1) * d + 1 for s, d in zip(size, dilation))
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=axis)
    for a, s in zip(axis, stride):
        view = view[(slice(None),) * a + (slice(None, None, s),)]
    return view[(Ellipsis, *(slice(None, None, d) for d in dilation))]


UNFOLDED = [((3,), (1,), (1,), (0,)), ((2,), (2,), (1,), (1,)), ((2, 2), (2, 1), (1, 1), (1, 2)),
            ((2, 3), (1, 1), (2, 1), (0, 1)), ((4, 1), (1, 3), (1, 1), (0, 1))]


@pytest.mark.parametrize("device", DEVICES)
def test_windows_and_their_addition(device: str) -> None:
    cases: list[Case] = [(str(args), lambda m, x, args=args: m.unfold(x, *args)) for args in UNFOLDED]

    class Oracle:
        unfold = staticmethod(windows_of)
    check(compute(device, cases, CUBE), cases, Oracle, CUBE, 0)
    check_gradients(device, cases, Oracle, CUBE)
    x = gf.input("x", CUBE.shape, "float64")
    n = gf.input("n", (gf.dim("N"), 3), "float64")
    folded = [gf.fold(gf.unfold(x, *args), [CUBE.shape[a] for a in args[3]], *args[1:]) for args in UNFOLDED]
    rows = gf.unfold(n, 3, 2, axis=0)
    found = gf.function([x, n], [*folded, rows, gf.fold(rows, gf.dim("N"), 2, axis=0)], device=device)(
        CUBE, CUBE[0])
    for value, args in zip(found, UNFOLDED):
        counts = np.zeros(CUBE.shape)
        np.add.at(counts, tuple(windows_of(i, *args) for i in np.indices(CUBE.shape)), 1)
        np.testing.assert_allclose(value, counts * CUBE, err_msg=str(args))
    np.testing.assert_array_equal(found[-2], windows_of(CUBE[0], (3,), (2,), (1,), (0,)))
    np.testing.assert_allclose(found[-1], CUBE[0] * [[1], [1], [2], [1], [1]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_convolution_and_correlation_are_scipys(device: str, dtype: str) -> None:
    image, line = CUBE[:, :, 0].astype(dtype), CUBE[0, :, 0].astype(dtype)
    x, v = gf.input("x", image.shape, dtype), gf.input("v", line.shape, dtype)
    kernels = [RNG.standard_normal(shape).astype(dtype) for shape in ((2, 3), (3, 2), (4, 5), (1, 1))]
    lines = [RNG.standard_normal(n).astype(dtype) for n in (1, 2, 3, 5)]
    built, expected = [], []
    for mode in ("full", "same", "valid"):
        for name in ("convolve", "correlate"):
            built += [getattr(gf, name)(x, k, mode) for k in kernels]
            expected += [getattr(signal, name)(image, k, mode) for k in kernels]
            built += [getattr(gf, name)(v, k, mode) for k in lines]
            expected += [getattr(np, name)(line, k, mode) for k in lines]
    built.append(gf.convolve(x, lines[2], "same"))
    expected.append(np.stack([np.convolve(row, lines[2], "same") for row in image]))
    for found, wanted in zip(gf.function([x, v], built, device=device)(image, line), expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 if dtype == "float32" else 1e-13)


# --- reductions

def norms(m: Any) -> Callable[..., Any]:
    return m.linalg.norm if m is np else m.norm


REDUCTIONS: list[Case] = [
    ("var", lambda m, x: m.var(x, axis=(0, 2), ddof=1)), ("std", lambda m, x: m.std(x, axis=1, ddof=2)),
    ("std all", lambda m, x: m.std(x)), ("prod", lambda m, x: m.prod(x, axis=1)),
    ("average", lambda m, x: m.average(x, axis=1, weights=[1, 2, 0, 4, 5])),
    ("average of all", lambda m, x: m.average(x, weights=m.abs(x) + 1)),
    ("average along two", lambda m, x: m.average(x, axis=(0, 2), weights=np.arange(1.0, 13).reshape(4, 3))),
    ("plain average", lambda m, x: m.average(x, axis=0)), ("max", lambda m, x: m.max(x, axis=(0, 2))),
    ("min", lambda m, x: m.min(x, axis=1, keepdims=True)),
    ("norm", lambda m, x: norms(m)(x)), ("fro", lambda m, x: norms(m)(x, "fro", axis=(0, 2))),
    *((f"norm {p}", lambda m, x, p=p: norms(m)(x, p, axis=1))
      for p in (1, 2, 3, 0.5, 1.5, np.inf, -np.inf, -2)),
    *((f"matrix norm {p}", lambda m, x, p=p: norms(m)(x, p, axis=(2, 0), keepdims=True))
      for p in (1, -1, np.inf, -np.inf)),
    ("norm of vector", lambda m, x: norms(m)(x[0, 0], 3)), ("norm of matrix", lambda m, x: norms(m)(x[0], 1)),
]
COUNTS: list[Case] = [
    ("count", lambda m, x: m.count_nonzero(x > 0.5, axis=1)), ("count all", lambda m, x: m.count_nonzero(x)),
    ("argmax", lambda m, x: m.argmax(x, axis=1, keepdims=True)), ("argmin", lambda m, x: m.argmin(x)),
    ("argmin all", lambda m, x: m.argmin(x, keepdims=True)), ("any", lambda m, x: m.any(x > 1.9, axis=0)),
    ("all", lambda m, x: m.all(x > -1.9, axis=(1, 2), keepdims=True))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions_are_numpys(device: str, dtype: str) -> None:
    x = CUBE.astype(dtype)
    cases = REDUCTIONS + COUNTS
    found = compute(device, cases, x)
    for name, f in cases:
        expected = np.asarray(f(np, x))
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == (x.dtype if expected.dtype.kind == "f" else expected.dtype), name
        near = 2e-6 if dtype == "float32" else 1e-14
        np.testing.assert_allclose(found[name], expected, rtol=near, atol=near, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_reductions(device: str) -> None:
    check_gradients(device, REDUCTIONS, np, CUBE, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_reductions_at_special_points(device: str) -> None:
    x = gf.input("x", (4, 3), "float64")
    zeros = np.array([[2.0, 3, 4], [0, 3, 4], [0, 3, 0], [0, 0, 0]])
    built = [gf.grad(gf.sum(f(x)), x) for f in (
        lambda v: gf.prod(v, axis=1), lambda v: gf.max(v, axis=1), lambda v: gf.min(v, axis=1),
        lambda v: gf.norm(v, axis=1), lambda v: gf.norm(v, 1, axis=1), lambda v: gf.norm(v, 1.5, axis=1),
        lambda v: gf.norm(v, np.inf, axis=1), lambda v: gf.std(v, axis=1), lambda v: gf.norm(v * 0))]
    product, most, least, two, one, p, inf, std, none = gf.function(x, built, device=device)(zeros)
    np.testing.assert_allclose(product, [[12, 8, 6], [12, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(most, [[0, 0, 1], [0, 0, 1], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(least, [[1, 0, 0], [1, 0, 0], [.5, 0, .5], [1 / 3, 1 / 3, 1 / 3]])
    lengths = np.array([[29.0], [25], [9], [1]]) ** 0.5
    np.testing.assert_allclose(two, zeros / lengths)
    np.testing.assert_allclose(one, np.sign(zeros))
    np.testing.assert_allclose(p[2:], [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(inf, [[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
    assert np.all(np.isfinite(std)) and np.all(std[3] == 0) and np.all(none == 0)


# --- messages

@pytest.mark.parametrize("build, kind, message", [
    (lambda x: gf.moveaxis(x, (0, 1), 2), UseError, "equally many different axes"),
    (lambda x: gf.tile(x, -1), UseError, "no counts"),
    (lambda x: gf.repeat(x, [1, 2], axis=0), ShapeError, "2 counts for axis 0, which has 4"),
    (lambda x: gf.roll(x, (1, 2), axis=0), UseError, "one for each of 1 axes"),
    (lambda x: gf.pad(x, 1, mode="mirror"), UseError, "use one of constant, edge"),
    (lambda x: gf.pad(x[:0], 1, mode="edge"), ShapeError, "axis 0 of 0 elements"),
    (lambda x: gf.diag(x), ShapeError, "a vector or a matrix"),
    (lambda x: gf.tril(x[0, 0]), ShapeError, "at least two axes"),
    (lambda x: x[[0], :, [1]], UseError, "only one of the keys"),
    (lambda x: x[0, :, [1]], UseError, "are ambiguous"),
    (lambda x: x[x > 0], UseError, "would depend on values"),
    (lambda x: x[[4]], UseError, "outside 0..3"),
    (lambda x: gf.take_along_axis(x, [[0]], 0), ShapeError, "as many axes of indices"),
    (lambda x: gf.arange("int32"), UseError, "neither a number nor a dimension"),
    (lambda x: gf.arange(1, 2, 0), UseError, "other than 0"),
    (lambda x: gf.arange(gf.dim("N"), 0, -1), UseError, "reverse it with gf.flip"),
    (lambda x: gf.unfold(x, 6, axis=1), ShapeError, "spans 6 does not fit into axis 1"),
    (lambda x: gf.unfold(x, (2, 2), axis=1), UseError, "a number for each of 1 axes"),
    (lambda x: gf.convolve(x, [1.0, 2], "some"), UseError, "use one of full"),
    (lambda x: gf.convolve(x[0, 0], x), ShapeError, "an array of at least as many"),
    (lambda x: gf.norm(x, 2, axis=(0, 1)), NotImplementedError, "singular values"),
    (lambda x: gf.norm(x, 1), UseError, "name the axes"),
    (lambda x: gf.norm(x, "fro", 0), UseError, "for matrices"),
    (lambda x: gf.average(x, 1, weights=[1, 2]), ShapeError, "nor that of the axes"),
    (lambda x: gf.meshgrid(x), ShapeError, "one axis"),
    (lambda x: gf.linspace(x, 1, 3), ShapeError, "single numbers"),
])
def test_errors_say_what_is_wrong(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(gf.input("x", (4, 5, 3)))
