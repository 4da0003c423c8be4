"""Discrete Fourier transforms, as compositions: products with small matrices, and elementwise factors
between.

There is no complex element type: a complex array is `Complex`, a pair (real, imag) of tensors of one shape.
Functions that take one also take a single Tensor, which is real. float64 stays, all else is computed in
float32. Names, normalisations and the order of frequencies are those of numpy.fft. The lengths must be known
when the net is declared; other axes may be decided by the call.

A length n1 * n2 is split as Cooley and Tukey do (Mathematics of Computation 19, 1965), into as few factors
of at most MAX_RADIX as there can be, so the size of the code grows with their number; a large prime is a
convolution of a length that has small factors (Bluestein, IEEE Trans. Audio Electroacoustics 18, 1970).
Gradients are those of the composition.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from graphflow.arguments import as_axis, as_tensor
from graphflow.compiler.ops.leaf import MAX_ARRAY_BYTES
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.products import matmul
from graphflow.scope import here
from graphflow.shapes import concatenate, flip, moveaxis, reshape, roll, swapaxes
from graphflow.shapes import pad as pad_array
from graphflow.tensor import Axes, Operand, Tensor, as_tensors, cast, constant, elementwise
from graphflow.windows import MODES

MAX_RADIX = 32
"""The largest factor that a length is split into if it can be."""
MAX_DIRECT = 64
"""Lengths that can't be split are a product with one matrix up to here; longer primes are convolutions."""
MAX_TABLE = 1 << 13
"""Tables of more factors than this are products of two smaller ones."""
NORMS = ("backward", "ortho", "forward")


class Complex(NamedTuple):
    """A complex array: the tensors of its real and imaginary parts, of one shape. It is added, subtracted and
    multiplied, element by element, with another one or with a real array or number; ``abs`` is its size."""
    real: Tensor
    imag: Tensor

    def __add__(self, other: Any) -> Complex:
        real, imag = _operand(other)
        return Complex(self.real + real, self.imag + imag)

    def __sub__(self, other: Any) -> Complex:
        real, imag = _operand(other)
        return Complex(self.real - real, self.imag - imag)

    def __mul__(self, other: Any) -> Complex:
        real, imag = _operand(other)
        if isinstance(imag, float):
            return Complex(self.real * real, self.imag * real)
        return Complex(*_times(self, (real, imag)))

    def __neg__(self) -> Complex:
        return Complex(-self.real, -self.imag)

    def __rsub__(self, other: Any) -> Complex:
        return -self + other

    def __abs__(self) -> Tensor:
        return elementwise("hypot", self.real, self.imag)

    def __radd__(self, other: Any) -> Complex:
        return self + other

    def __rmul__(self, other: Any) -> Complex:
        return self * other

    def conj(self) -> Complex:
        """The complex conjugate."""
        return Complex(self.real, -self.imag)


Parts = tuple[Tensor, Tensor | None]


# --- transforms

def fft(x: Operand | Complex, n: int | None = None, axis: int = -1, norm: str = "backward") -> Complex:
    """X[k] = Σ over j of x[j] exp(-2πi jk/n) along an axis, cut or padded with zeros to the length `n`.

    norm: "backward" divides the inverse by n, "forward" this one, "ortho" both by sqrt(n).
    """
    return fftn(x, None if n is None else (n,), (axis,), norm)


def ifft(x: Operand | Complex, n: int | None = None, axis: int = -1, norm: str = "backward") -> Complex:
    """The inverse of `fft`."""
    return ifftn(x, None if n is None else (n,), (axis,), norm)


def fft2(x: Operand | Complex, s: Sequence[int] | None = None, axes: Sequence[int] = (-2, -1),
         norm: str = "backward") -> Complex:
    """`fft` along two axes."""
    return fftn(x, s, axes, norm)


def ifft2(x: Operand | Complex, s: Sequence[int] | None = None, axes: Sequence[int] = (-2, -1),
          norm: str = "backward") -> Complex:
    """The inverse of `fft2`."""
    return ifftn(x, s, axes, norm)


def fftn(x: Operand | Complex, s: Sequence[int] | None = None, axes: Sequence[int] | None = None,
         norm: str = "backward") -> Complex:
    """`fft` along several axes, all of them without `axes`; `s`: their lengths."""
    real, imag = _parts(x)
    places, lengths = _lengths("fftn", real, s, axes)
    for axis, n in zip(places, lengths):
        real, imag = _along("fftn", (real, imag), axis, n)
    return _scaled((real, imag), lengths, norm, inverse=False)


def ifftn(x: Operand | Complex, s: Sequence[int] | None = None, axes: Sequence[int] | None = None,
          norm: str = "backward") -> Complex:
    """The inverse of `fftn`."""
    real, imag = _parts(x)
    places, lengths = _lengths("ifftn", real, s, axes)
    for axis, n in zip(places, lengths):
        real, imag = _inverse("ifftn", (real, imag), axis, n)
    return _scaled((real, imag), lengths, norm, inverse=True)


def rfft(x: Operand, n: int | None = None, axis: int = -1, norm: str = "backward") -> Complex:
    """The first n//2 + 1 elements of the `fft` of a real array; the others are their conjugates."""
    return rfftn(x, None if n is None else (n,), (axis,), norm)


def irfft(x: Operand | Complex, n: int | None = None, axis: int = -1, norm: str = "backward") -> Tensor:
    """The real array of length `n` whose `rfft` this is; n is 2 * (elements - 1) unless it is given."""
    return irfftn(x, None if n is None else (n,), (axis,), norm)


def rfft2(x: Operand, s: Sequence[int] | None = None, axes: Sequence[int] = (-2, -1),
          norm: str = "backward") -> Complex:
    """`rfft` along the second of two axes, `fft` along the first."""
    return rfftn(x, s, axes, norm)


def irfft2(x: Operand | Complex, s: Sequence[int] | None = None, axes: Sequence[int] = (-2, -1),
           norm: str = "backward") -> Tensor:
    """The inverse of `rfft2`; `s`: the lengths of the result."""
    return irfftn(x, s, axes, norm)


def rfftn(x: Operand, s: Sequence[int] | None = None, axes: Sequence[int] | None = None,
          norm: str = "backward") -> Complex:
    """`rfft` along the last of the axes, `fft` along the others."""
    real, imag = _parts(x)
    if imag is not None:
        raise UseError("rfft takes a real array, not a pair", op="rfft", shapes=[real.shape], where=here(),
                       hint="use gf.fft.fft, or its real part")
    places, lengths = _lengths("rfftn", real, s, axes)
    half = (slice(None),) * places[-1] + (slice(0, lengths[-1] // 2 + 1),)
    out: Parts = _along("rfftn", (real, None), places[-1], lengths[-1])
    out = out[0][half], out[1][half] if out[1] is not None else None
    for axis, n in zip(places[:-1], lengths[:-1]):
        out = _along("rfftn", out, axis, n)
    return _scaled(out, lengths, norm, inverse=False)


def irfftn(x: Operand | Complex, s: Sequence[int] | None = None, axes: Sequence[int] | None = None,
           norm: str = "backward") -> Tensor:
    """The inverse of `rfftn`; `s`: the lengths of the result."""
    parts = _parts(x)
    places, lengths = _lengths("irfftn", parts[0], s, axes)
    if s is None:
        lengths[-1] = 2 * (lengths[-1] - 1)
    for axis, n in zip(places[:-1], lengths[:-1]):
        parts = _inverse("irfftn", parts, axis, n)
    axis, n = places[-1], lengths[-1]
    if n < 1:
        raise ShapeError("irfft: the result would have no elements", op="irfft", shapes=[parts[0].shape],
                         where=here(), hint="say its length: n=1")
    real, imag = (None if p is None else moveaxis(_fitted("irfftn", p, axis, n // 2 + 1), axis, -1)
                  for p in parts)
    assert real is not None
    mirrored = slice(1, 1 + (n - 1) // 2)
    real = concatenate([real, flip(real[..., mirrored], -1)], -1)
    imag = None if imag is None else concatenate([imag, -flip(imag[..., mirrored], -1)], -1)
    out = moveaxis(_inverse("irfftn", (real, imag), real.ndim - 1, n)[0], -1, axis)
    return _scaled((out, None), lengths, norm, inverse=True).real


# --- arguments

def _operand(x: Any) -> tuple[Tensor, Tensor | float]:
    """The real and the imaginary part of what stands beside a complex array: 0.0 where there is none."""
    if isinstance(x, Complex):
        return x
    if not isinstance(x, Tensor) and np.iscomplexobj(x):
        return as_tensor(np.real(x)), as_tensor(np.imag(x))
    return as_tensor(x), 0.0


def _parts(x: Operand | Complex) -> Parts:
    """The real and the imaginary part, None where there is none, in one float type."""
    if isinstance(x, tuple) and len(x) == 2 and any(isinstance(p, Tensor) for p in x):
        real, imag = as_tensors(x)
        if real.shape != imag.shape:
            raise ShapeError("a complex array is a pair (real, imag) of one shape", op="fft",
                             shapes=[real.shape, imag.shape], where=here())
        return _float(real), _float(imag)
    return _float(as_tensor(x)), None


def _float(x: Tensor) -> Tensor:
    return x if x.dtype.is_float else cast(x, "float32")


def _lengths(op: str, x: Tensor, s: Sequence[int] | None, axes: Axes) -> tuple[list[int], list[int]]:
    """The axes and the lengths along them."""
    if axes is None:
        places = list(range(x.ndim))[x.ndim - len(s) if s is not None else 0:]
    else:
        given = list(axes) if isinstance(axes, (tuple, list)) else [axes]
        places = [as_axis(x, a, op) for a in given]
    wanted = [x.shape[a] for a in places] if s is None else list(s)
    if not places or len(wanted) != len(places) or len(set(places)) < len(places):
        raise UseError(f"{op}: {s} and {axes} are not lengths of different axes", op=op, shapes=[x.shape],
                       where=here())
    for axis, n in zip(places, wanted):
        if not isinstance(n, int) or n < 1 or not isinstance(x.shape[axis], int):
            raise ShapeError(f"{op}: the lengths are numbers >= 1, but axis {axis} is {x.shape[axis]}, and "
                             f"its transform {n}", op=op, shapes=[x.shape], where=here(),
                             hint="declare the input with a fixed extent there")
    return places, [int(n) for n in wanted]


def _fitted(op: str, x: Tensor, axis: int, n: int) -> Tensor:
    """`x` cut or padded with zeros to the length n."""
    have = x.shape[axis]
    assert isinstance(have, int), op
    if have >= n:
        return x[(slice(None),) * axis + (slice(0, n),)]
    return pad_array(x, [(0, n - have if a == axis else 0) for a in range(x.ndim)])


def _scaled(x: Parts, lengths: Sequence[int], norm: str, inverse: bool) -> Complex:
    if norm not in NORMS:
        raise UseError(f"there is no norm {norm!r}", op="fft", where=here(),
                       hint=f"use one of {', '.join(NORMS)}")
    n = math.prod(lengths)
    divides = {"backward": inverse, "forward": not inverse, "ortho": True}[norm]
    factor = 1.0 if not divides else 1 / math.sqrt(n) if norm == "ortho" else 1 / n
    real, imag = x
    imag = real * 0 if imag is None else imag
    return Complex(real, imag) if factor == 1 else Complex(real * factor, imag * factor)


# --- one axis

def _along(op: str, x: Parts, axis: int, n: int) -> tuple[Tensor, Tensor]:
    """The transform along one axis, without normalisation."""
    real, imag = (None if p is None else moveaxis(_fitted(op, p, axis, n), axis, -1) for p in x)
    assert real is not None
    found = _transform(real, imag)
    return moveaxis(found[0], -1, axis), moveaxis(found[1], -1, axis)


def _inverse(op: str, x: Parts, axis: int, n: int) -> tuple[Tensor, Tensor]:
    """The inverse without normalisation: real and imaginary part exchanged before and after."""
    real, imag = x
    if imag is None:
        found = _along(op, x, axis, n)
        return found[0], -found[1]                                       # the conjugate, for a real array
    found = _along(op, (imag, real), axis, n)
    return found[1], found[0]


def _transform(real: Tensor, imag: Tensor | None) -> tuple[Tensor, Tensor]:
    """The transform along the last axis."""
    n = int(real.shape[-1])
    first = radix(n)
    if first == n:
        return _direct(real, imag, n) if n <= MAX_DIRECT else _bluestein(real, imag, n)
    second = n // first
    shape = real.shape

    def split(x: Tensor) -> Tensor:                    # element second * i + j as [j, i]
        return swapaxes(reshape(x, (*shape[:-1], first, second)), -1, -2)
    inner = _transform(split(real), None if imag is None else split(imag))              # [j, k]
    inner = _times(inner, _twiddles(second, first, real.dtype))
    outer = _transform(swapaxes(inner[0], -1, -2), swapaxes(inner[1], -1, -2))          # [k, l]
    # frequency k + first * l
    return reshape(swapaxes(outer[0], -1, -2), shape), reshape(swapaxes(outer[1], -1, -2), shape)


@lru_cache(maxsize=1024)
def radix(n: int) -> int:
    """The factor that a length is split by first; n itself if it is not split."""
    if n <= MAX_RADIX:
        return n
    stages = math.ceil(math.log(n) / math.log(MAX_RADIX) - 1e-9)
    ideal = n ** (1 / stages)
    small = [d for d in range(2, MAX_RADIX + 1) if n % d == 0]
    if small:
        return min(small, key=lambda d: abs(math.log(d / ideal)))
    return next((d for d in range(MAX_RADIX + 1, math.isqrt(n) + 1) if n % d == 0), n)


def _times(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The complex product."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _roots(numerators: np.ndarray, n: int) -> np.ndarray:
    """exp(-2πi numerators / n), the angles reduced exactly."""
    return np.exp(-2j * np.pi * (numerators % n) / n)


def _table(values: np.ndarray, dtype: DType) -> tuple[Tensor, Tensor]:
    return constant(values.real, dtype), constant(values.imag, dtype)


def _direct(real: Tensor, imag: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """A product with the matrix of the transform: both parts of the result side by side."""
    if n == 1:
        return real, real * 0 if imag is None else imag
    roots = _roots(np.outer(np.arange(n), np.arange(n)), n)
    out = matmul(real, constant(np.hstack([roots.real, roots.imag]), real.dtype))
    if imag is not None:
        out = out + matmul(imag, constant(np.hstack([-roots.imag, roots.real]), real.dtype))
    return out[..., :n], out[..., n:]


def _twiddles(rows: int, columns: int, dtype: DType) -> tuple[Tensor, Tensor]:
    """exp(-2πi jk / (rows * columns)) for row j and column k: one table, or the product of two, for
    j = step * a + b."""
    n, k = rows * columns, np.arange(columns)
    if n <= MAX_TABLE:
        return _table(_roots(np.outer(np.arange(rows), k), n), dtype)
    step = math.isqrt(rows)
    many = -(-rows // step)
    coarse = _table(_roots(np.outer(np.arange(many) * step, k), n)[:, None], dtype)
    fine = _table(_roots(np.outer(np.arange(step), k), n)[None], dtype)
    real, imag = (reshape(p, (many * step, columns))[:rows] for p in _times(coarse, fine))
    return real, imag


def _bluestein(real: Tensor, imag: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """jk = (j² + k² - (k - j)²) / 2 makes the transform a convolution with exp(πi j²/n)."""
    size = good_size(2 * n - 1)
    if size * real.dtype.bytes > MAX_ARRAY_BYTES:
        raise NotImplementedError(f"a Fourier transform whose length has the prime factor {n}; pad to a "
                                  "length with small factors: gf.fft.good_size(n)")
    chirp = _roots(np.arange(n, dtype=np.int64) ** 2, 2 * n)
    around = np.zeros(size, complex)
    around[:n] = chirp.conj()
    around[size - n + 1:] = chirp.conj()[:0:-1]
    spectrum = np.fft.fft(around) / size
    given = _table(chirp, real.dtype)
    if imag is None:
        parts = real * given[0], real * given[1]
    else:
        parts = _times((real, imag), given)
    last = real.ndim - 1
    first = _along("fft", parts, last, size)
    back = _inverse("fft", _times(first, _table(spectrum, real.dtype)), last, size)
    return _times((back[0][..., :n], back[1][..., :n]), given)


# --- frequencies and convolution

def good_size(n: int) -> int:
    """The least length >= n without prime factors above 5: quick to transform."""
    best = 1 << max(n - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three << max(0, (-(-n // three) - 1).bit_length())
            best = min(best, size)
            three *= 3
        five *= 5
    return best


def fftfreq(n: int, d: float = 1.0, dtype: str = "float32") -> Tensor:
    """The frequencies of `fft`, in cycles per unit of the sample spacing `d`."""
    return constant(np.fft.fftfreq(n, d), dtype)


def rfftfreq(n: int, d: float = 1.0, dtype: str = "float32") -> Tensor:
    """The frequencies of `rfft`, in cycles per unit of the sample spacing `d`."""
    return constant(np.fft.rfftfreq(n, d), dtype)


def fftshift(x: Tensor, axes: Axes = None) -> Tensor:
    """`x` with the frequency 0 in the middle of the axes, of all without `axes`."""
    places, lengths = _lengths("fftshift", x, None, axes)
    return roll(x, [n // 2 for n in lengths], places)


def ifftshift(x: Tensor, axes: Axes = None) -> Tensor:
    """The inverse of `fftshift`."""
    places, lengths = _lengths("ifftshift", x, None, axes)
    return roll(x, [-(n // 2) for n in lengths], places)


def convolve(x: Operand, kernel: Operand, mode: str = "full") -> Tensor:
    """`gf.convolve` by transforms: n log n work instead of n times the kernel's size. The kernel may have any
    number of axes; its extents and those of the last axes of `x` are fixed."""
    a, k = (_float(t) for t in as_tensors([x, kernel]))
    count = k.ndim
    if mode not in MODES:
        raise UseError(f"convolve: there is no mode {mode!r}", op="convolve", where=here(),
                       hint=f"use one of {', '.join(MODES)}")
    if not 1 <= count <= a.ndim:
        raise ShapeError("convolve takes a kernel of at least one axis, and an array of at least as many",
                         op="convolve", shapes=[a.shape, k.shape], where=here())
    axes = tuple(range(-count, 0))
    _, sizes = _lengths("convolve", a, None, axes)
    _, spans = _lengths("convolve", k, None, axes)
    if mode == "valid" and any(n < span for n, span in zip(sizes, spans)):
        raise ShapeError("convolve: the kernel does not lie within the array anywhere", op="convolve",
                         shapes=[a.shape, k.shape], where=here(), hint="use the mode 'full' or 'same'")
    lengths = [good_size(n + span - 1) for n, span in zip(sizes, spans)]
    both = _times(rfftn(a, lengths, axes), rfftn(k, lengths, axes))
    out = irfftn(Complex(*both), lengths, axes)
    starts = [{"full": 0, "same": (span - 1) // 2, "valid": span - 1}[mode] for span in spans]
    extents = [{"full": n + span - 1, "same": n, "valid": n - span + 1}[mode]
               for n, span in zip(sizes, spans)]
    return out[(..., *(slice(start, start + extent) for start, extent in zip(starts, extents)))]
