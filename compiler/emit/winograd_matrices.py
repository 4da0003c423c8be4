"""The matrices of Winograd's algorithm F(m, r): m outputs of a filter with r taps by n = m + r - 1 products.

With d the n inputs and g the taps, the outputs y[i] = sum over k of d[i + k] g[k] are A((G g) * (B d)),
element by element. The matrices come from polynomial products by interpolation at n - 1 points and infinity
(A. Toom, S. Cook; S. Winograd, Arithmetic Complexity of Computations, 1980). In two dimensions each is
applied to the columns, then to the rows. They also give the gradient for the taps, G'((A' dy) * (B d)).

Rounding depends on the points. Largest error of 2D convolutions of normal numbers over the largest output,
for 16, 64 and 256 input channels, that of plain float32 sums in brackets:

    F(2, 3)  0, ±1, inf                  2.1e-7 (3.9e-7)   3.5e-7 (9.4e-7)   3.1e-7 (2.1e-6)
    F(4, 3)  0, ±5/8, ±3/2, inf          1.1e-6 (3.9e-7)   1.7e-6 (9.4e-7)   1.3e-6 (2.1e-6)
    F(2, 5)  0, ±5/8, ±3/2, inf          6.7e-7 (7.0e-7)   1.5e-6 (1.9e-6)   1.1e-6 (2.7e-6)
    F(4, 5)  0, ±1/2, ±1, ±15/8, inf     5.6e-6 (7.0e-7)   7.3e-6 (1.9e-6)   5.9e-6 (2.7e-6)

where sums over channels are made of sums of 64; F(4, 3) with plain sums over channels:

             0, ±5/8, ±3/2, inf          8.0e-7            1.3e-6            2.7e-6
             0, ±1, ±2, inf              3.1e-6            4.8e-6            1.2e-5
             0, ±1, ±1/2, inf            3.2e-6            5.6e-6            8.8e-6
             0, ±1, 1/2, -2, inf         1.3e-6            2.1e-6            3.7e-6

The points come in pairs ±p, so that transformations share the even and the odd part of a polynomial, and are
short binary fractions, so that A and B are exact in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod

from graphflow.compiler.emit.builder import Builder, Value, constant

Matrix = tuple[tuple[Fraction, ...], ...]

_PAIRS = {4: (Fraction(1),), 6: (Fraction(5, 8), Fraction(3, 2)), 7: (Fraction(1), Fraction(7, 4)),
          8: (Fraction(1, 2), Fraction(1), Fraction(15, 8))}
"""By the number of products: the points beside 0 and infinity, of each pair ±p the positive one."""
_SINGLE = {7: (Fraction(-3, 8),)}
"""The point without a partner, where the number is odd."""

SIZES = {3: (4, 2), 5: (4, 2)}
"""By the places of a kernel along an axis: outputs of a tile along an axis."""


@dataclass(frozen=True)
class Matrices:
    """A [outputs, products], G [products, taps] and B [products, products] of F(outputs, taps)."""

    a: Matrix
    g: Matrix
    b: Matrix


@cache
def winograd_matrices(outputs: int, taps: int) -> Matrices:
    """The matrices of F(outputs, taps), exactly. B depends on outputs + taps alone. ValueError where there is
    no set of points for so many products."""
    products = outputs + taps - 1
    if products not in _PAIRS:
        raise ValueError(f"no points are known for {products} products; known are {sorted(_PAIRS)}")
    pairs = [p for pair in _PAIRS[products] for p in (pair, -pair)]
    points = [Fraction(0), *pairs, *_SINGLE.get(products, ())]
    scales = [1 / prod((p - q for q in points if q != p), start=Fraction(1)) for p in points]
    last = [tuple(Fraction(i == size - 1) for i in range(size)) for size in (outputs, taps)]
    columns = [*(tuple(p**i for i in range(outputs)) for p in points), last[0]]
    return Matrices(
        transposed(columns),
        (*(tuple(s * p**i for i in range(taps)) for p, s in zip(points, scales)), last[1]),
        (*((*_polynomial([q for q in points if q != p]), Fraction(0)) for p in points), _polynomial(points)),
    )


def _polynomial(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """The coefficients, lowest first, of the product of all (x - root)."""
    found = [Fraction(1)]
    for root in roots:
        found = [low - root * high for low, high in zip([Fraction(0), *found], [*found, Fraction(0)])]
    return tuple(found)


def transposed(matrix: Sequence[Sequence[Fraction]]) -> Matrix:
    """Rows as columns."""
    return tuple(zip(*matrix))


def multiply(b: Builder, matrix: Sequence[Sequence[Fraction]], values: Sequence[Value], fma: bool
             ) -> list[Value]:
    """The matrix times a list of values: code for each of its rows. `fma`: whether the target has it.

    Columns that differ only in the sign of their odd rows are joined beforehand, into the sum and the
    difference of their values; rows that differ only in the sign of their odd columns share two sums."""
    terms = _joined_columns(b, [list(row) for row in matrix], list(values))
    rows: list[Value | None] = [None] * len(terms)
    for i, row in enumerate(terms):
        if rows[i] is not None:
            continue
        partner = next((j for j in range(i + 1, len(terms)) if _alternate(row, terms[j])), None)
        even, odd = ([t if k % 2 == side else None for k, t in enumerate(row)] for side in (0, 1))
        if partner is None or not any(even) or not any(odd):
            rows[i] = _sum(b, [t for t in row if t], fma)
            continue
        scale = next(t[0] for t in reversed(odd) if t)
        shared = _sum(b, [t for t in even if t], fma)
        other = _sum(b, [(t[0] / scale, t[1]) for t in odd if t], fma)
        rows[i] = _sum(b, [(Fraction(1), shared), (scale, other)], fma)
        rows[partner] = _sum(b, [(Fraction(1), shared), (-scale, other)], fma)
    return [row for row in rows if row is not None]


def both_axes(b: Builder, matrix: Matrix, values: Sequence[Sequence[Value]], fma: bool) -> list[list[Value]]:
    """The matrix applied to the columns, then to the rows."""
    columns = [multiply(b, matrix, list(column), fma) for column in zip(*values)]
    return [multiply(b, matrix, list(row), fma) for row in zip(*columns)]


Term = tuple[Fraction, Value]
"""A coefficient, not 0, and what it multiplies."""


def _joined_columns(b: Builder, matrix: list[list[Fraction]], values: list[Value]
                    ) -> list[list[Term | None]]:
    """The terms of each row, with pairs of columns replaced by the sum and the difference of their values."""
    rows: list[list[Term | None]] = [[(c, v) if c else None for c, v in zip(row, values)] for row in matrix]
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            left, right = ([row[k] for row in matrix] for k in (i, j))
            signs = all(y == (-x if r % 2 else x) for r, (x, y) in enumerate(zip(left, right)))
            if not (signs and any(left[0::2]) and any(left[1::2])) or sum(map(bool, left)) < 3:
                continue
            joined = b.add(values[i], values[j]), b.sub(values[i], values[j])
            for r, row in enumerate(rows):
                row[i], row[j] = ((left[r], joined[r % 2]) if left[r] else None), None
    return rows


def _alternate(x: Sequence[Term | None], y: Sequence[Term | None]) -> bool:
    """Whether two rows differ in the sign of their odd terms alone."""
    return all((s is None and t is None)
               or (s is not None and t is not None and s[1] is t[1] and t[0] == (-s[0] if k % 2 else s[0]))
               for k, (s, t) in enumerate(zip(x, y)))


def _sum(b: Builder, terms: Sequence[Term], fma: bool) -> Value:
    """The sum of the terms, beginning with one without a multiplication if there is one."""
    first = next((t for t in reversed(terms) if t[0] == 1), terms[-1])
    c, value = first
    total = value if c == 1 else b.neg(value) if c == -1 else b.mul(value, float(c))
    for c, value in reversed(terms):
        if (c, value) == first:
            continue
        if abs(c) == 1:
            total = b.add(total, value) if c == 1 else b.sub(total, value)
        elif fma:
            total = b.fma(value, constant(value.type, float(c)), total)
        else:
            total = b.add(total, b.mul(value, float(c)))
    return total
