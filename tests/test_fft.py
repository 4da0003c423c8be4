"""Fourier transforms against numpy.fft, convolution through them against scipy.signal."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import fft as scipy_fft
from scipy import signal

import graphflow as gf
from graphflow.compiler.plan.errors import ShapeError, UseError

RNG = np.random.default_rng(0)
Build = Callable[[Any, Any], Any]

# Small, split in one and two steps, primes as one matrix and as convolutions, products of large primes.
LENGTHS = [1, 2, 3, 5, 8, 12, 31, 32, 36, 49, 61, 64, 67, 97, 128, 134, 210, 1000, 37 * 41]


def pair(shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    return RNG.standard_normal(shape).astype(dtype), RNG.standard_normal(shape).astype(dtype)


def as_numpy(value: Any) -> np.ndarray:
    """A pair as NumPy's complex array, other arrays as they are."""
    return value[0] + 1j * np.asarray(value[1], np.float64) if isinstance(value, tuple) else np.asarray(value)


def run(device: str, built: list[Any], inputs: list[gf.Tensor], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The values of tensors and pairs of them, in one program."""
    flat = [t for value in built for t in (value if isinstance(value, tuple) else (value,))]
    found = iter(gf.function(inputs, flat, device=device)(*arrays))
    return [as_numpy((next(found), next(found)) if isinstance(value, tuple) else next(found))
            for value in built]


def near(found: np.ndarray, expected: np.ndarray, dtype: str, what: str = "", length: float | None = None
         ) -> None:
    """The distance relative to the expected array's length, or to the one given."""
    assert found.shape == expected.shape, what
    tolerance = 1e-6 if dtype == "float32" else 1e-14 * np.log2(max(4, expected.size))
    assert np.linalg.norm(found - expected) <= tolerance * (length or np.linalg.norm(expected)), what


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_transforms_of_many_lengths(device: str, dtype: str) -> None:
    built, inputs, arrays, expected = [], [], [], []
    for n in LENGTHS:
        real, imag = pair((2, n), dtype)
        a, b = gf.input(f"a{n}", real.shape, dtype), gf.input(f"b{n}", real.shape, dtype)
        inputs, arrays = [*inputs, a, b], [*arrays, real, imag]
        x, z = real.astype(np.float64), real + 1j * imag.astype(np.float64)
        half = np.fft.rfft(x)
        built += [gf.fft.fft((a, b)), gf.fft.ifft((a, b)), gf.fft.rfft(a), gf.fft.fft(a),
                  gf.fft.irfft(gf.fft.rfft(a), n)]
        expected += [np.fft.fft(z), np.fft.ifft(z), half, np.fft.fft(x), x]
    for i, (found, wanted) in enumerate(zip(run(device, built, inputs, arrays), expected, strict=True)):
        near(found, wanted, dtype, f"{LENGTHS[i // 5]} {i % 5}")


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [16384, 30030, 8009])
def test_long_transforms(dtype: str, n: int) -> None:
    real, imag = pair((n,), dtype)
    a, b = gf.input("a", (n,), dtype), gf.input("b", (n,), dtype)
    (found,) = run("cpu", [gf.fft.fft((a, b))], [a, b], [real, imag])
    near(found, np.fft.fft(real + 1j * imag.astype(np.float64)), dtype)


CASES: list[tuple[str, Build]] = [
    ("axis", lambda m, z: m.fft(z, axis=0)), ("middle axis", lambda m, z: m.fft(z, axis=1)),
    ("cut", lambda m, z: m.fft(z, 5)), ("filled", lambda m, z: m.fft(z, 11, axis=1)),
    ("ortho", lambda m, z: m.fft(z, norm="ortho")), ("forward", lambda m, z: m.fft(z, norm="forward")),
    ("inverse ortho", lambda m, z: m.ifft(z, norm="ortho")),
    ("inverse forward", lambda m, z: m.ifft(z, axis=1, norm="forward")),
    ("inverse cut", lambda m, z: m.ifft(z, 3, axis=0)),
    ("fft2", lambda m, z: m.fft2(z)), ("ifft2", lambda m, z: m.ifft2(z, axes=(0, 2))),
    ("fft2 of", lambda m, z: m.fft2(z, (4, 9))), ("fftn", lambda m, z: m.fftn(z)),
    ("ifftn", lambda m, z: m.ifftn(z, norm="ortho")),
    ("fftn of", lambda m, z: m.fftn(z, (3, 7), axes=(1, 0))),
    ("irfft", lambda m, z: m.irfft(z)), ("irfft odd", lambda m, z: m.irfft(z, 11)),
    ("irfft long", lambda m, z: m.irfft(z, 20, axis=1)), ("irfft one", lambda m, z: m.irfft(z, 1)),
    ("irfft2", lambda m, z: m.irfft2(z)), ("irfftn", lambda m, z: m.irfftn(z, (5, 6), axes=(2, 1)))]
REAL: list[tuple[str, Build]] = [
    ("rfft", lambda m, x: m.rfft(x)), ("rfft axis", lambda m, x: m.rfft(x, 7, axis=0)),
    ("rfft2", lambda m, x: m.rfft2(x)), ("rfftn", lambda m, x: m.rfftn(x, norm="ortho")),
    ("rfftn of", lambda m, x: m.rfftn(x, (4, 5), axes=(2, 0))), ("real ifft", lambda m, x: m.ifft(x)),
    ("real irfft", lambda m, x: m.irfft(x)),
    ("shift", lambda m, x: m.fftshift(x)), ("shift axis", lambda m, x: m.ifftshift(x, axes=1)),
    ("shift back", lambda m, x: m.ifftshift(m.fftshift(x, axes=(0, 2)), axes=(0, 2)))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_axes_lengths_and_norms_are_numpys(device: str, dtype: str) -> None:
    real, imag = pair((3, 8, 10), dtype)
    a, b = gf.input("a", real.shape, dtype), gf.input("b", real.shape, dtype)
    built = [f(gf.fft, (a, b)) for _, f in CASES] + [f(gf.fft, a) for _, f in REAL]
    z, x = real + 1j * imag.astype(np.float64), real.astype(np.float64)
    expected = [f(np.fft, z) for _, f in CASES] + [f(np.fft, x) for _, f in REAL]
    found = run(device, built, [a, b], [real, imag])
    for (name, _), value, wanted in zip(CASES + REAL, found, expected, strict=True):
        near(value, wanted, dtype, name)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_transposed_transforms(device: str) -> None:
    """The transforms are linear: sum(gradient * direction) is that of weights and the direction's
    transform."""
    real, imag = pair((3, 8, 10), "float64")
    a, b = gf.input("a", real.shape, "float64"), gf.input("b", real.shape, "float64")
    built, expected = [], []
    for _, f in [case for case in CASES if case[0] != "irfft one"]:          # which has no imaginary part
        direction = RNG.standard_normal(real.shape) + 1j * RNG.standard_normal(real.shape)
        out = f(gf.fft, (a, b))
        moved = np.asarray(f(np.fft, direction))
        weights = RNG.standard_normal(moved.shape) + 1j * RNG.standard_normal(moved.shape)
        total = gf.sum((out[0] if isinstance(out, tuple) else out) * gf.constant(weights.real))
        total = total + gf.sum(out[1] * gf.constant(weights.imag)) if isinstance(out, tuple) else total
        da, db = gf.grad(total, [a, b])
        built.append(gf.sum(da * gf.constant(direction.real)) + gf.sum(db * gf.constant(direction.imag)))
        expected.append(np.sum(weights.real * moved.real)
                        + (np.sum(weights.imag * moved.imag) if isinstance(out, tuple) else 0))
    np.testing.assert_allclose(gf.function([a, b], built, device=device)(real, imag), expected, rtol=1e-10,
                               atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_other_axes_may_be_decided_by_the_call(device: str) -> None:
    x, _ = pair((3, 2, 48), "float32")
    t = gf.input("x", (gf.dim("N"), 2, 48))
    real, imag = gf.fft.fft(t)
    found = gf.function(t, [real, imag, gf.grad(gf.sum(real * real + imag * imag), t)], device=device)(x)
    near(found[0] + 1j * found[1], np.fft.fft(x.astype(np.float64)), "float32")
    near(found[2], 2 * 48 * x, "float32")                        # Parseval's equation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_convolution_is_scipys(device: str, dtype: str) -> None:
    image, line = RNG.standard_normal((12, 17)).astype(dtype), RNG.standard_normal(40).astype(dtype)
    x, v = gf.input("x", image.shape, dtype), gf.input("v", line.shape, dtype)
    kernels = [RNG.standard_normal(shape).astype(dtype) for shape in ((3, 4), (12, 17), (1, 6))]
    lines = [RNG.standard_normal(n).astype(dtype) for n in (1, 8, 25)]
    built, expected = [], []
    lengths = []                        # rounding is of the transforms' size, |x| |k|, also where sums cancel
    for mode in ("full", "same", "valid"):
        lengths += [np.linalg.norm(image) * np.linalg.norm(k) for k in kernels]
        lengths += [np.linalg.norm(line) * np.linalg.norm(k) for k in lines]
        built += [gf.fft.convolve(x, k, mode) for k in kernels] + [gf.fft.convolve(v, k, mode) for k in lines]
        expected += [signal.fftconvolve(image.astype(np.float64), k, mode) for k in kernels]
        expected += [np.convolve(line.astype(np.float64), k, mode) for k in lines]
    built.append(gf.fft.convolve(x, lines[1]))
    expected.append(np.stack([np.convolve(row.astype(np.float64), lines[1]) for row in image]))
    lengths.append(np.linalg.norm(image) * np.linalg.norm(lines[1]))
    results = run(device, built, [x, v], [image, line])
    for found, wanted, length in zip(results, expected, lengths, strict=True):
        near(found, wanted, dtype, length=length)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_the_convolution_are_correlations(device: str) -> None:
    image, kernel = RNG.standard_normal((6, 7)), RNG.standard_normal((2, 3))
    x, k = gf.input("x", image.shape, "float64"), gf.input("k", kernel.shape, "float64")
    weights = RNG.standard_normal((7, 9))
    total = gf.sum(gf.fft.convolve(x, k) * gf.constant(weights))
    dx, dk = gf.function([x, k], gf.grad(total, [x, k]), device=device)(image, kernel)
    np.testing.assert_allclose(dx, signal.correlate(weights, kernel, "valid"), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(dk, signal.correlate(weights, image, "valid"), rtol=1e-10, atol=1e-10)


@pytest.mark.reference
def test_frequencies_are_numpys() -> None:
    built = [gf.fft.fftfreq(8, 0.5), gf.fft.rfftfreq(9)]
    found = gf.function([], built, device="reference")()
    np.testing.assert_allclose(found[0], np.fft.fftfreq(8, 0.5))
    np.testing.assert_allclose(found[1], np.fft.rfftfreq(9), rtol=1e-6)


def test_good_sizes_are_scipys() -> None:
    for n in (*range(1, 300), 1000, 1025, 4097, 99991):
        assert gf.fft.good_size(n) == scipy_fft.next_fast_len(n, real=True), n


@pytest.mark.parametrize("build, kind, message", [
    (lambda x, n: gf.fft.fft(n), ShapeError, "the lengths are numbers >= 1, but axis 0 is N"),
    (lambda x, n: gf.fft.fft(x, 0), ShapeError, "its transform 0"),
    (lambda x, n: gf.fft.fft2(x, axes=(1, 1)), UseError, "not lengths of different axes"),
    (lambda x, n: gf.fft.fft(x, norm="half"), UseError, "use one of backward, ortho, forward"),
    (lambda x, n: gf.fft.rfft((x, x)), UseError, "takes a real array"),
    (lambda x, n: gf.fft.fft((x, x[0])), ShapeError, "of one shape"),
    (lambda x, n: gf.fft.irfft(x[:, :1]), ShapeError, "say its length"),
    (lambda x, n: gf.fft.convolve(x, x, "half"), UseError, "use one of full"),
    (lambda x, n: gf.fft.convolve(x[0], x), ShapeError, "an array of at least as many"),
    (lambda x, n: gf.fft.convolve(x[:2], x, "valid"), ShapeError, "does not lie within"),
    (lambda x, n: gf.fft.fft(gf.zeros((1000003,))), NotImplementedError, "the prime factor 1000003"),
])
def test_errors_say_what_is_wrong(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(gf.input("x", (3, 8)), gf.input("n", (gf.dim("N"),)))


@pytest.mark.parametrize("device", DEVICES)
def test_arithmetic_with_complex_arrays(device: str) -> None:
    (a, b), (c, d) = pair((3, 5), "float32"), pair((3, 5), "float32")
    tensors = [gf.input(name, (3, 5)) for name in "abcd"]
    x, y, r = gf.fft.Complex(*tensors[:2]), gf.fft.Complex(*tensors[2:]), tensors[0]
    u, v, w = a + 1j * b.astype(np.float64), c + 1j * d.astype(np.float64), np.exp(1j * np.arange(5))
    built = [x + y, x - y, x * y, -x, x + r, x - r, x * r, 2 * x, 1 - x, x * w, x + w, x.conj(), abs(x)]
    wanted = [u + v, u - v, u * v, -u, u + a, u - a, u * a, 2 * u, 1 - u, u * w, u + w, u.conj(), abs(u)]
    for i, (found, expected) in enumerate(zip(run(device, built, tensors, [a, b, c, d]), wanted)):
        near(found, expected, "float32", f"number {i}")
