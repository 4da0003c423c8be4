"""Random tensors: ``gf.random.normal((3, 4))``.

They follow from the seed and the step of the Store, from the call's place among the random calls of its
program, from the step of each loop around it, and from the element's number: the same bits on every run, for
any number of threads and on every device. A program that trains draws new numbers in every step, others the
same ones again.

Beside integers, these functions use only operations that IEEE 754 rounds exactly (+ - * / sqrt, comparisons),
logarithms included, which is why devices agree to the last bit. No gradient flows into the numbers.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from graphflow.arguments import as_axis, as_shape, as_tensor
from graphflow.compiler.plan.dims import Dim, DimLike
from graphflow.compiler.plan.dtypes import F32, F64, I64, DType
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.creation import extent
from graphflow.scope import here
from graphflow.state import random_operands
from graphflow.tensor import Operand, Tensor, apply, cast, element_type, elementwise

__all__ = ["bernoulli", "bits", "categorical", "exponential", "gumbel", "normal", "permutation", "randint",
           "truncated_normal", "uniform"]

_streams = itertools.count()

Shape = int | Dim | Sequence[DimLike]


def bits(shape: Shape) -> Tensor:
    """32 independent random bits for each element, as uint32."""
    return apply("random_bits", random_operands(), shape=as_shape(shape), stream=next(_streams))


def uniform(shape: Shape = (), low: float = 0.0, high: float = 1.0, dtype: Any = "float32") -> Tensor:
    """Numbers evenly from [low, high): multiples of 2**-24 (float64: 2**-53) of the whole range."""
    target = _float("uniform", dtype)
    if target == F32:
        made = cast(bits(shape) >> 8, F32) * 2.0 ** -24
    else:
        made = cast(_long_word(shape), F64) * 2.0 ** -53
    made = made if high - low == 1 else made * (high - low)
    return made if low == 0 else made + low


def bernoulli(p: Operand, shape: Shape | None = None) -> Tensor:
    """Bools that are true with probability `p`, a number or a tensor, to 2**-24. `shape`: that of the result,
    that of `p` if None."""
    p = as_tensor(p)
    if not p.dtype.is_float:
        p = cast(p, F32)
    return elementwise("lt", uniform(p.shape if shape is None else shape, dtype=p.dtype), p)


def randint(shape: Shape, low: DimLike, high: DimLike, dtype: Any = "int32") -> Tensor:
    """Integers evenly from low to high - 1, which may be dimensions. The range is at most 2**31; the chance
    of a value is off by less than 2**-32."""
    target = element_type(dtype)
    if not target.is_integer:
        raise DTypeError(f"randint makes integers, not {target.full_name}", where=here())
    size = high - low
    if isinstance(size, int) and not 1 <= size <= 2 ** 31:
        raise UseError(f"randint takes a range of 1 to 2**31 numbers, not {size}", where=here())
    number = cast(bits(shape), I64) * extent(size, I64) >> 32
    return cast(number if low == 0 else number + extent(low, I64), target)


def exponential(shape: Shape = (), dtype: Any = "float32") -> Tensor:
    """-log(u) of uniform u: the exponential distribution of mean 1, from 2**-32 to 22.2 (float64: 2**-53 to
    36.7)."""
    return _exponential(shape, _float("exponential", dtype))


def gumbel(shape: Shape = (), dtype: Any = "float32") -> Tensor:
    """-log(-log(u)) of uniform u: the standard Gumbel distribution, up to 22.2 (float64: 36.7)."""
    target = _float("gumbel", dtype)
    scale = 64 if target == F64 else 40
    power, rest = _split(_exponential(shape, target) * 2.0 ** scale)      # exact, and at least 1
    return -((power - scale) * math.log(2) + _log(*_ratio(rest)))


def normal(shape: Shape = (), mean: float = 0.0, std: float = 1.0, dtype: Any = "float32") -> Tensor:
    """The normal distribution, by its inverse distribution function. Its error is 4e-7 of the number
    (float64: 2e-15) as far as the tails go: to 6.3 deviations (float64: 8.2), one chance in 2**32 (2**53).

    Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (Applied Statistics 37,
    1988), with its coefficients for 7 (16) digits.
    """
    target = _float("normal", dtype)
    return _moved(_percentage_point(_word(shape, target), target), mean, std)


def truncated_normal(shape: Shape = (), mean: float = 0.0, std: float = 1.0, low: float = -2.0,
                     high: float = 2.0, dtype: Any = "float32") -> Tensor:
    """The normal distribution without what is farther than `low` and `high` standard deviations from the
    mean.

    The part that is left must hold at least 1/1000 of the distribution: of less there would be too few
    different numbers.
    """
    target = _float("truncated_normal", dtype)
    below, above = (0.5 * math.erfc(-x / math.sqrt(2)) for x in (low, high))
    if not above - below >= 1e-3:
        raise UseError(f"truncated_normal keeps only {above - below:.2g} of the distribution between {low} "
                       f"and {high}", where=here(), hint="use bounds with more between them")
    word, size = _word(shape, target), 2 ** (32 if target == F32 else 53)
    first, count = int(below * size), max(int((above - below) * size), 1)
    if target == F32:
        word = cast(cast(word, I64) * count >> 32, word.dtype) + first
    else:
        word = cast(cast(word, F64) * (count / size), I64) + first
    made = _percentage_point(word, target)
    return _moved(elementwise("minimum", elementwise("maximum", made, low), high), mean, std)


def categorical(logits: Operand, axis: int = -1) -> Tensor:
    """For each row along the axis a position, as int64, with probability softmax(logits): the greatest of the
    logits plus Gumbel noise. Several draws: broadcast the logits first."""
    logits = as_tensor(logits)
    noise = gumbel(logits.shape, F64 if logits.dtype == F64 else F32)
    return apply("argmax", [cast(logits, noise.dtype) + noise], axis=as_axis(logits, axis, "categorical"))


def permutation(x: Operand | Dim) -> Tensor:
    """The numbers 0 to x - 1 (int64) in random order, for an integer or a dimension; the slices of axis 0 in
    random order, for a tensor."""
    if isinstance(x, (int, Dim)):
        return apply("argsort", [bits((x,))], axis=0)
    x = as_tensor(x)
    if not x.ndim:
        raise ShapeError("permutation takes a number or a tensor with axes", where=here())
    return apply("gather", [x, permutation(x.shape[0])], axis=0)


def _float(name: str, dtype: Any) -> DType:
    """The float type; an error for any other."""
    target = element_type(dtype)
    if target.is_half:
        raise DTypeError(f"{name} makes float32 or float64, not {target.full_name}", where=here(),
                         hint="cast its result")
    if not target.is_float:
        raise DTypeError(f"{name} makes floats, not {target.full_name}", where=here())
    return target


# --- words, logarithms, percentage points

def _long_word(shape: Shape) -> Tensor:
    """53 random bits, as int64."""
    return (cast(bits(shape), I64) << 21) + (cast(bits(shape), I64) >> 11)


def _word(shape: Shape, dtype: DType) -> Tensor:
    """32 random bits for float32 (as uint32), 53 for float64 (as int64)."""
    return bits(shape) if dtype == F32 else _long_word(shape)


def _exponential(shape: Shape, dtype: DType) -> Tensor:
    """-log(w / 2**n) of odd n-bit w. Near w = 2**n it is computed from 2**n - w, which is exact."""
    word, n = _word(shape, dtype) | 1, 32 if dtype == F32 else 53
    rest = cast(0 - word if dtype == F32 else 2 ** n - word, dtype) * 2.0 ** -n
    power, part = _split(cast(word, dtype))
    top, bottom = _ratio(part)
    near = power == n
    top = elementwise("where", near, -rest, top)
    bottom = elementwise("where", near, 2.0 - rest, bottom)
    return (n - power) * math.log(2) - _log(top, bottom)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, f) with x = f * 2**n and f in [sqrt(1/2), sqrt(2)), for x in [1, 2**64 * sqrt(2)). Exact."""
    power = x * 0.0
    for step in (32, 16, 8, 4, 2, 1):
        big = x >= 2.0 ** step
        x = elementwise("where", big, x * 2.0 ** -step, x)
        power = power + elementwise("where", big, float(step), 0.0)
    big = x >= math.sqrt(2)
    return power + elementwise("where", big, 1.0, 0.0), elementwise("where", big, x * 0.5, x)


def _ratio(f: Tensor) -> tuple[Tensor, Tensor]:
    return f - 1.0, f + 1.0


def _log(top: Tensor, bottom: Tensor) -> Tensor:
    """log(f) for top / bottom = (f - 1) / (f + 1): 2 artanh of it, a series; f in [sqrt(1/2), sqrt(2))."""
    s = top / bottom
    square = s * s
    terms = 5 if s.dtype == F32 else 11
    return 2.0 * s * _polynomial(square, [1 / (2 * k + 1) for k in range(terms)])


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """By Horner's rule, the constant first."""
    out = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        out = out * x + c
    return out


# Wichura's coefficients: numerator and denominator, the constant first; within 0.425 of 1/2, in the tails,
# far out
_SINGLE = (
    ((3.3871327179, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1),
     (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1)),
    ((1.4234372777, 2.7568153900, 1.3067284816, 1.7023821103e-1),
     (1.0, 7.3700164250e-1, 1.2021132975e-1)),
)
_DOUBLE = (
    ((3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
      4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
     (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
      2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3)),
    ((1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
      1.27045825245236838258, 2.41780725177450611770e-1, 2.27238449892691845833e-2,
      7.74545014278341407640e-4),
     (1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
      1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
      1.05075007164441684324e-9)),
    ((6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 2.96560571828504891230e-1,
      2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5,
      2.01033439929228813265e-7),
     (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
      7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
      2.04426310338993978564e-15)),
)


def _percentage_point(word: Tensor, dtype: DType) -> Tensor:
    """The number below which (word + 1/2) / 2**n of the standard normal distribution lies; n is 32 or 53."""
    n, whole = (32, _SINGLE) if dtype == F32 else (53, _DOUBLE)
    lower = word < 2 ** (n - 1)
    inner = elementwise("where", lower, word, 2 ** n - 1 - word)
    odd = inner * 2 + 1                                           # the tail is odd / 2**(n + 1), at most 1/2
    rest = 0 - odd if dtype == F32 else 2 ** n - odd              # uint32 wraps
    q = cast(rest, dtype) * 2.0 ** -(n + 1)                       # the distance to 1/2
    size = q * _quotient(0.180625 - q * q, whole[0])
    power, part = _split(cast(odd, dtype))
    r = elementwise("sqrt", (n + 1 - power) * math.log(2) - _log(*_ratio(part)))
    tail = _quotient(r - 1.6, whole[1])
    if len(whole) > 2:
        tail = elementwise("where", r > 5.0, _quotient(r - 5.0, whole[2]), tail)
    size = elementwise("where", q <= 0.425, size, tail)
    return elementwise("where", lower, -size, size)


def _quotient(x: Tensor, parts: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    return _polynomial(x, parts[0]) / _polynomial(x, parts[1])


def _moved(x: Tensor, mean: float, std: float) -> Tensor:
    x = x if std == 1 else x * std
    return x if mean == 0 else x + mean
