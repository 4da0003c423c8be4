"""Linear algebra of the last two axes, by numpy.linalg's names: factorisations, and what they solve.

Each factorisation is a `gf.scan` over columns, of masked operations on whole matrices, so the size of the
code does not depend on that of the matrix, and the axes before are a batch. Gradients are those of the known
formulas (for which see M. B. Giles, An extended collection of matrix derivative results, 2008), themselves
made of the functions below, so they can be differentiated again. Computed in the matrix's float type; others
become float32.

A matrix that has no such factorisation (singular, not positive definite, of less than full rank) gives NaN or
infinity; nothing is raised.
"""
from __future__ import annotations

from typing import NamedTuple

from graphflow.arguments import as_tensor
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.control import scan
from graphflow.creation import arange, eye, tril, triu
from graphflow.custom import custom_op
from graphflow.products import matmul
from graphflow.reductions import argmax, prod
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.shapes import concatenate, diagonal, expand_dims, moveaxis, squeeze, swapaxes
from graphflow.tensor import Operand, Tensor, apply, as_tensors, broadcast_shapes, cast, elementwise, stretch

Tensors = tuple[Tensor, ...]


class QR(NamedTuple):
    """The factors of `qr`."""
    Q: Tensor
    R: Tensor


class SignAndLog(NamedTuple):
    """The results of `slogdet`."""
    sign: Tensor
    logabsdet: Tensor


# --- arguments

def _float(x: Tensor) -> Tensor:
    return x if x.dtype.is_float else cast(x, "float32")


def _matrix(op: str, x: Operand, square: bool = True) -> Tensor:
    a = _float(as_tensor(x))
    if a.ndim < 2 or square and a.shape[-1] != a.shape[-2]:
        kind = "square matrices" if square else "matrices"
        raise ShapeError(f"{op} takes {kind} in the last two axes", op=op, shapes=[a.shape], where=here())
    return a


def _system(op: str, a: Operand, b: Operand) -> tuple[Tensor, Tensor, bool]:
    """(matrices, right-hand sides of the same batch axes, whether they are one vector)."""
    left, right = (_float(t) for t in as_tensors([a, b]))
    left = _matrix(op, left, square=False)
    vector = right.ndim == 1
    right = expand_dims(right, 1) if vector else right
    if right.ndim < 2 or right.shape[-2] != left.shape[-2]:
        raise ShapeError(f"{op}: the matrices have {left.shape[-2]} rows, the right-hand sides do not", op=op,
                         shapes=[left.shape, right.shape], where=here(),
                         hint="only an array of one axis is a vector; others are matrices of columns")
    batch = broadcast_shapes(op, [left.shape[:-2], right.shape[:-2]])
    return stretch(left, (*batch, *left.shape[-2:])), stretch(right, (*batch, *right.shape[-2:])), vector


# --- parts

def _transposed(x: Tensor) -> Tensor:
    return swapaxes(x, -1, -2)


def _columns(x: Tensor) -> Tensor:
    """[..., m, n] as [n, ..., m]: one column for each step of a scan."""
    return moveaxis(x, -1, 0)


def _entry(x: Tensor, place: Tensor) -> Tensor:
    """Element `place` of the last axis, which stays with the extent 1."""
    return expand_dims(apply("gather", [x, place], axis=x.ndim - 1), -1)


def _row(x: Tensor, place: Tensor) -> Tensor:
    """Row `place`: [..., n]."""
    return apply("gather", [x, place], axis=x.ndim - 2)


def _column(x: Tensor, place: Tensor) -> Tensor:
    """Column `place`: [..., m]."""
    return apply("gather", [x, place], axis=x.ndim - 1)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return expand_dims(x, -1) * expand_dims(y, -2)


def _where(holds: Tensor, x: Operand, y: Operand) -> Tensor:
    return elementwise("where", holds, x, y)


def _numbers(n: DimLike) -> Tensor:
    return arange(n, dtype="int64")


# --- triangular systems

def solve_triangular(a: Operand, b: Operand, lower: bool = False, trans: bool = False,
                     unit_diagonal: bool = False) -> Tensor:
    """The x with a x = b (or aᵀ x = b: `trans`) for triangular a[..., n, n]: only the upper triangle is
    read, or the lower one; `unit_diagonal`: the diagonal counts as 1. b is [..., n, k] or one vector [n]."""
    left, right, vector = _system("solve_triangular", a, b)
    _matrix("solve_triangular", left)
    left = _transposed(left) if trans else left
    found = _triangular_solution(left, right, lower=lower != trans, unit=unit_diagonal)
    return squeeze(found, -1) if vector else found


@custom_op("solve_triangular")
def _triangular_solution(a: Tensor, b: Tensor, lower: bool, unit: bool) -> Tensor:
    return _substitution(a, b, lower, unit)


@_triangular_solution.backward
def _triangular_solution_gradient(inputs: Tensors, x: Tensor, dx: Tensor, lower: bool, unit: bool) -> Tensors:
    db = _substitution(_transposed(inputs[0]), dx, not lower, unit)
    da = -matmul(db, _transposed(x))
    return (tril(da, -1 if unit else 0) if lower else triu(da, 1 if unit else 0)), db


def _substitution(a: Tensor, b: Tensor, lower: bool, unit: bool) -> Tensor:
    """Column by column: an unknown is known, and is subtracted from the rows that are left."""
    n = a.shape[-1]
    rows = _numbers(n)

    def step(left: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        column, j = given
        x = _row(left, j)
        x = x if unit else x / _entry(column, j)
        rest = _where(rows > j if lower else rows < j, column, 0.0)
        return left - _outer(rest, x), x
    _, found = scan(step, b, (_columns(a), rows), reverse=not lower)
    return moveaxis(found, 0, -2)


# --- Cholesky

def cholesky(a: Operand) -> Tensor:
    """The lower triangular L with L Lᵀ = a, of symmetric positive definite matrices [..., n, n]; only the
    lower triangle is read. NaN where a matrix is not positive definite. The gradient is symmetric."""
    return _cholesky(_matrix("cholesky", a))


@custom_op("cholesky")
def _cholesky(a: Tensor) -> Tensor:
    rows = _numbers(a.shape[-1])

    def step(left: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        column = _column(left, j)
        column = _where(rows >= j, column / elementwise("sqrt", _entry(column, j)), 0.0)
        return left - _outer(column, column), column
    _, columns = scan(step, a, rows)
    return moveaxis(columns, 0, -1)


@_cholesky.backward
def _cholesky_gradient(inputs: Tensors, factor: Tensor, df: Tensor) -> Tensors:
    inner = tril(matmul(_transposed(factor), df))
    inner = inner - _on_diagonal(inner) * 0.5
    half = solve_triangular(factor, inner, lower=True, trans=True)
    whole = _transposed(solve_triangular(factor, _transposed(half), lower=True, trans=True))
    return ((whole + _transposed(whole)) * 0.5,)


def _on_diagonal(x: Tensor) -> Tensor:
    """`x` with zeros off the diagonal."""
    return x * eye(x.shape[-2], x.shape[-1], dtype=x.dtype)


# --- LU

def lu_factor(a: Operand) -> tuple[Tensor, Tensor]:
    """(lu, order) of square matrices [..., n, n]: with the rows in the `order` [..., n] they are the product
    of a lower triangle with ones on its diagonal (below that of `lu`) and of an upper one (the rest of
    `lu`). The order takes in each column the largest element as the pivot."""
    return _lu(_matrix("lu_factor", a))


@custom_op("lu_factor")
def _lu(a: Tensor) -> tuple[Tensor, Tensor]:
    n = a.shape[-1]
    places = _numbers(n)

    def step(carry: tuple[Tensor, Tensor], j: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        left, order = carry
        size = _where(places >= j, elementwise("abs", _column(left, j)), -1.0)
        pivot = expand_dims(argmax(size, -1), -1)                                       # [..., 1]
        here, there = places == j, places == pivot
        left = _exchanged(left, j, expand_dims(pivot, -1), expand_dims(here, -1), expand_dims(there, -1), -2)
        order = _exchanged(order, j, pivot, here, there, -1)
        column, row = _column(left, j), _row(left, j)
        factors = _where(places > j, column / _entry(column, j), 0.0)
        left = left - _outer(factors, _where(places > j, row, 0.0))
        return (_where(here & expand_dims(places > j, -1), expand_dims(factors, -1), left), order), None
    start = stretch(places, a.shape[:-1])
    return scan(step, (a, start), places)[0]


def _exchanged(x: Tensor, j: Tensor, pivot: Tensor, here: Tensor, there: Tensor, axis: int) -> Tensor:
    """`x` with the elements j and pivot of an axis exchanged; pivot has the extent 1 there."""
    shape = (*x.shape[:axis], 1, *x.shape[axis:][1:])
    at_pivot = apply("take_along_axis", [x, stretch(pivot, shape)], axis=x.ndim + axis)
    at_j = expand_dims(apply("gather", [x, j], axis=x.ndim + axis), axis)
    return _where(here, at_pivot, _where(there, at_j, x))


@_lu.backward
def _lu_gradient(inputs: Tensors, results: Tensors, cotangents: Tensors) -> Tensors:
    (lu, order), d = results, cotangents[0]
    lower = tril(lu, -1) + eye(lu.shape[-1], dtype=lu.dtype)
    inner = tril(matmul(_transposed(lower), tril(d, -1)), -1) + triu(matmul(triu(d), _transposed(triu(lu))))
    inner = solve_triangular(lu, inner, lower=True, trans=True, unit_diagonal=True)
    inner = _transposed(solve_triangular(lu, _transposed(inner)))
    return (_reordered(inner, _inverse_order(order)),)


def _inverse_order(order: Tensor) -> Tensor:
    """The places of 0, 1, … in the order."""
    found = expand_dims(order, -1) == _numbers(order.shape[-1])
    return argmax(cast(found, "int32"), -2)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """The rows in that order."""
    return apply("take_along_axis", [x, stretch(expand_dims(order, -1), x.shape)], axis=x.ndim - 2)


# --- what LU solves

def solve(a: Operand, b: Operand) -> Tensor:
    """The x with a x = b for square a[..., n, n]; b is [..., n, k], or one vector [n]. By LU with row
    pivots; NaN or infinity where a matrix is singular."""
    left, right, vector = _system("solve", a, b)
    lu, order = lu_factor(_matrix("solve", left))
    found = solve_triangular(lu, _reordered(right, order), lower=True, unit_diagonal=True)
    found = solve_triangular(lu, found)
    return squeeze(found, -1) if vector else found


def inv(a: Operand) -> Tensor:
    """The inverse of square matrices; where it is only multiplied with something, `solve` is quicker and more
    exact."""
    x = _matrix("inv", a)
    return solve(x, stretch(eye(x.shape[-1], dtype=x.dtype), x.shape))


def det(a: Operand) -> Tensor:
    """The determinants of square matrices. That of a singular matrix is 0, its gradient NaN."""
    lu, order = lu_factor(_matrix("det", a))
    return prod(diagonal(lu, 0, -2, -1), -1) * _parity(order, lu)


def slogdet(a: Operand) -> SignAndLog:
    """The determinants of square matrices as (sign, logarithm of the size), which does not overflow."""
    lu, order = lu_factor(_matrix("slogdet", a))
    line = diagonal(lu, 0, -2, -1)
    sign = prod(elementwise("sign", line), -1) * _parity(order, lu)
    return SignAndLog(sign, total(elementwise("log", elementwise("abs", line)), -1))


def _parity(order: Tensor, like: Tensor) -> Tensor:
    """1 where an even number of exchanges gives the order, else -1."""
    places = _numbers(order.shape[-1])
    wrong = (expand_dims(order, -1) > expand_dims(order, -2)) & (expand_dims(places, -1) < places)
    return cast(1 - total(wrong, (-2, -1)) % 2 * 2, like.dtype)


# --- QR

def qr(a: Operand, mode: str = "reduced") -> QR | Tensor:
    """Q[..., m, k] with orthonormal columns and upper triangular R[..., k, n] with Q R = a[..., m, n], k =
    min(m, n); mode "r": R alone. By Householder's reflections, with LAPACK's signs. The gradient takes full
    rank."""
    x = _matrix("qr", a, square=False)
    m, n = x.shape[-2:]
    if mode not in ("reduced", "r"):
        raise UseError(f"qr: the modes are 'reduced' and 'r', not {mode!r}", op="qr", where=here())
    if not isinstance(m, int) or not isinstance(n, int):
        raise ShapeError("qr takes matrices of known extents", op="qr", shapes=[x.shape], where=here(),
                         hint="declare the inputs with numbers there")
    if m < n:                                          # the other columns follow from the square part
        q, r = _tall_qr(x[..., :m])
        r = concatenate([r, matmul(_transposed(q), x[..., m:])], -1)
    else:
        q, r = _tall_qr(x)
    return r if mode == "r" else QR(q, r)


@custom_op("qr")
def _tall_qr(a: Tensor) -> tuple[Tensor, Tensor]:
    m, n = a.shape[-2:]
    rows = _numbers(m)

    def reflect(x: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        """x - scale v (vᵀ x)"""
        along = squeeze(matmul(expand_dims(v, -2), x), -2)
        return x - _outer(v, scale * along)

    def step(left: Tensor, j: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        column = _column(left, j)
        first = _entry(column, j)
        below = _where(rows > j, column, 0.0)
        rest = total(below * below, -1, keepdims=True)
        size = elementwise("sqrt", first * first + rest)
        end = _where(first > 0, -size, size)                     # away from `first`: nothing cancels
        v = _where(rows == j, first - end, below)
        scale = _where(rest == 0, 0.0, 2 / ((first - end) * (first - end) + rest))
        return reflect(left, v, scale), (v, scale)

    def back(q: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        return reflect(q, *given), None
    r, reflections = scan(step, a, _numbers(n))
    q, _ = scan(back, stretch(eye(m, n, dtype=a.dtype), a.shape), reflections, reverse=True)
    return q, triu(r[..., :n, :])


@_tall_qr.backward
def _qr_gradient(inputs: Tensors, results: Tensors, cotangents: Tensors) -> Tensors:
    (q, r), (dq, dr) = results, cotangents
    inner = matmul(r, _transposed(dr)) - matmul(_transposed(dq), q)
    inner = tril(inner) + _transposed(tril(inner, -1))
    return (_transposed(solve_triangular(r, _transposed(dq + matmul(q, inner)))),)


def lstsq(a: Operand, b: Operand) -> Tensor:
    """The x that makes the sum of squares of a x - b least, for a[..., m, n] of full rank and b[..., m, k]
    or one vector [m]; where m < n the smallest such x. By QR."""
    left, right, vector = _system("lstsq", a, b)
    m, n = left.shape[-2:]
    if not isinstance(m, int) or not isinstance(n, int):
        raise ShapeError("lstsq takes matrices of known extents", op="lstsq", shapes=[left.shape],
                         where=here(), hint="declare them as numbers, or, where there are more rows than "
                         "columns, solve (aᵀ a) x = aᵀ b by gf.linalg.solve")
    if m >= n:
        q, r = qr(left)
        found = solve_triangular(r, matmul(_transposed(q), right))
    else:
        q, r = qr(_transposed(left))
        found = matmul(q, solve_triangular(r, right, trans=True))
    return squeeze(found, -1) if vector else found
