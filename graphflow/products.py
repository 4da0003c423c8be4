"""Products of arrays that sum over axes, by NumPy's names and rules."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphflow.arguments import as_axis
from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.contraction import Labelled, contract, next_pair, summed
from graphflow.scope import here
from graphflow.shapes import diagonal, expand_dims, moveaxis, reshape, squeeze, transpose
from graphflow.tensor import Operand, Tensor, apply, as_tensors, broadcast_shapes, stretch

Pairs = int | Sequence[int] | Sequence[Sequence[int]]


def matmul(x: Operand, y: Operand) -> Tensor:
    """``x @ y``: NumPy's matrix product. A vector stands for one row (left) or one column (right); the axes
    before the last two are broadcast."""
    a, b = as_tensors([x, y])
    if not a.shape or not b.shape:
        raise ShapeError("matmul takes arrays of at least one axis, not a number", op="matmul",
                         shapes=[a.shape, b.shape], where=here(), hint="multiply by a number with *")
    left = reshape(a, (1, *a.shape)) if a.ndim == 1 else a
    right = reshape(b, (*b.shape, 1)) if b.ndim == 1 else b
    out = _matrix_product(left, right)
    if a.ndim > 1 and b.ndim > 1:
        return out
    shape = out.shape[:-2] + (out.shape[-2:-1] if a.ndim > 1 else ()) + (out.shape[-1:] if b.ndim > 1 else ())
    return reshape(out, shape)


def _matrix_product(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] != right.shape[-2]:
        return apply("matmul", [left, right])                    # which says what is wrong
    if right.ndim == 2 and left.ndim > 2:                        # one product of all rows
        rows = product(left.shape[:-1])
        out = _matrix_product(reshape(left, (rows, left.shape[-1])), right)
        return reshape(out, (*left.shape[:-1], right.shape[-1]))
    batch = broadcast_shapes("matmul", [left.shape[:-2], right.shape[:-2]])
    left, right = stretch(left, (*batch, *left.shape[-2:])), stretch(right, (*batch, *right.shape[-2:]))
    if left.dtype.has_gradient:
        return apply("matmul", [left, right])
    shape = (*batch, left.shape[-2], left.shape[-1], right.shape[-1])
    terms = stretch(expand_dims(left, -1), shape) * stretch(expand_dims(right, -3), shape)
    return apply("reduce_sum", [terms], axes=(terms.ndim - 2,))


def dot(x: Operand, y: Operand) -> Tensor:
    """The product of a number with an array; of arrays the sum over the last axis of `x` and the last but
    one of `y` (the only one of a vector), for all combinations of the other axes."""
    a, b = as_tensors([x, y])
    if not a.shape or not b.shape:
        return a * b
    return matmul(a, b) if b.ndim <= 2 else tensordot(a, b, ([-1], [-2]))


def tensordot(x: Operand, y: Operand, axes: Pairs = 2) -> Tensor:
    """The sum over pairs of axes, for all combinations of the others: first those of `x`, then of `y`.

    `axes`: how many of the last axes of `x` go with the first of `y`; or (axes of `x`, axes of `y`).
    """
    a, b = as_tensors([x, y])
    if isinstance(axes, int):
        if not 0 <= axes <= min(a.ndim, b.ndim):
            raise ShapeError(f"tensordot: the arrays do not both have {axes} axes", op="tensordot",
                             shapes=[a.shape, b.shape], where=here())
        pairs: Any = (range(a.ndim - axes, a.ndim), range(axes))
    else:
        pairs = [list(given) if isinstance(given, (tuple, list)) else [given] for given in axes]
    if len(pairs) != 2 or len(pairs[0]) != len(pairs[1]):
        raise UseError(f"tensordot: {axes!r} does not pair axes", op="tensordot", shapes=[a.shape, b.shape],
                       where=here(), hint="use a number, or ([axes of x], [axes of y])")
    first = [as_axis(a, axis, "tensordot") for axis in pairs[0]]
    second = [as_axis(b, axis, "tensordot") for axis in pairs[1]]
    for i, j in zip(first, second):
        if a.shape[i] != b.shape[j]:
            raise ShapeError(f"tensordot: axis {i} of the first array is {a.shape[i]}, axis {j} of the "
                             f"second {b.shape[j]}", op="tensordot", shapes=[a.shape, b.shape], where=here())
    x_labels = tuple(f"s{first.index(i)}" if i in first else f"x{i}" for i in range(a.ndim))
    y_labels = tuple(f"s{second.index(j)}" if j in second else f"y{j}" for j in range(b.ndim))
    kept = {label for label in (*x_labels, *y_labels) if label[0] != "s"}
    return contract(Labelled(a, x_labels), Labelled(b, y_labels), kept).tensor


def inner(x: Operand, y: Operand) -> Tensor:
    """The sum over the last axis of both, for all combinations of the others."""
    a, b = as_tensors([x, y])
    return a * b if not a.shape or not b.shape else tensordot(a, b, ([-1], [-1]))


def outer(x: Operand, y: Operand) -> Tensor:
    """The matrix of all products of an element of `x` with one of `y`, both in row-major order."""
    a, b = as_tensors([x, y])
    return reshape(a, (-1, 1)) * reshape(b, (1, -1))


def vecdot(x: Operand, y: Operand, axis: int = -1) -> Tensor:
    """The sum of x * y over one axis; the others are broadcast."""
    a, b = as_tensors([x, y])
    if not a.shape or not b.shape:
        raise ShapeError("vecdot takes vectors: arrays of at least one axis", op="vecdot",
                         shapes=[a.shape, b.shape], where=here())
    a, b = (moveaxis(t, as_axis(t, axis, "vecdot"), -1) for t in (a, b))
    if a.shape[-1] != b.shape[-1]:
        raise ShapeError(f"vecdot: the vectors have {a.shape[-1]} and {b.shape[-1]} elements", op="vecdot",
                         shapes=[a.shape, b.shape], where=here())
    terms = a * b
    return apply("reduce_sum", [terms], axes=(terms.ndim - 1,))


def kron(x: Operand, y: Operand) -> Tensor:
    """Kronecker's product: each element of `x` replaced by its product with `y`. Missing axes in front are
    1."""
    a, b = as_tensors([x, y])
    rank = max(a.ndim, b.ndim)
    a, b = (reshape(t, ((1,) * (rank - t.ndim) + t.shape)) for t in (a, b))
    blocks = expand_dims(a, tuple(range(1, 2 * rank, 2))) * expand_dims(b, tuple(range(0, 2 * rank, 2)))
    return reshape(blocks, tuple(m * n for m, n in zip(a.shape, b.shape)))


# --- einsum

def einsum(equation: str, *operands: Operand) -> Tensor:
    """The product of the operands along labelled axes: "ij,jk->ik" is a matrix product.

    A letter for each axis; letters that the result does not have are summed over, a letter twice in an
    operand is its diagonal. "..." stands for axes that are broadcast. Without "->" the result has the axes
    of "...", then the letters that occur once, in alphabetical order. As numpy.einsum, without its lists of
    axes.

    Operands are contracted in pairs, in the order that takes the fewest multiplications (of up to six
    operands), each pair as one batched matrix product, or as a plain product where nothing is summed.
    """
    if not isinstance(equation, str) or not operands:
        raise UseError("einsum takes an equation such as 'ij,jk->ik', and then its operands", op="einsum",
                       where=here())
    tensors = as_tensors(operands)
    terms, result = _parse(equation, tensors)
    sizes = _sizes(equation, tensors, terms, result)
    given = [_distinct(t, labels, sizes) for t, labels in zip(tensors, terms)]
    while len(given) > 1:
        first, second = next_pair(given, result, sizes)
        others = [g for i, g in enumerate(given) if i not in (first, second)]
        needed = set(result).union(*(g.labels for g in others))
        given = [*others, contract(given[first], given[second], needed)]
    last = summed(given[0], set(result))
    return transpose(last.tensor, [last.labels.index(label) for label in result])


def _parse(equation: str, tensors: Sequence[Tensor]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The labels of each operand and of the result. Axes of "..." are labelled ".1", ".2", … from the
    last."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise UseError(f"einsum: {equation!r} is about {len(terms)} operand(s), but {len(tensors)} are given",
                       op="einsum", shapes=[t.shape for t in tensors], where=here())
    for text in [*terms, right]:
        letters = text.replace("...", "", 1)
        if not all(c.isalpha() and c.isascii() for c in letters):
            raise UseError(f"einsum: {text!r} is not made of letters and at most one '...'", op="einsum",
                           where=here())
    labelled = [_labels(equation, text, t) for text, t in zip(terms, tensors)]
    dots = max((sum(label[0] == "." for label in labels) for labels in labelled), default=0)
    broadcast = tuple(f".{i}" for i in range(dots, 0, -1))
    if arrow:
        before, _, after = right.partition("...")
        result = (*before, *(broadcast if "..." in right else ()), *after)
        if "..." not in right and dots:
            raise UseError(f"einsum: the result of {equation!r} has no '...', but the operands have",
                           op="einsum", where=here(), hint="write '...' into the result")
    else:
        counts = [c for text in terms for c in text if c != "."]
        result = (*broadcast, *(c for c in sorted(set(counts)) if counts.count(c) == 1))
    unknown = [label for label in result if not any(label in labels for labels in labelled)]
    if unknown or len(set(result)) < len(result):
        what = f"{unknown[0]!r}, which no operand has" if unknown else "a letter twice"
        raise UseError(f"einsum: the result of {equation!r} has {what}", op="einsum", where=here())
    return labelled, result


def _labels(equation: str, text: str, tensor: Tensor) -> tuple[str, ...]:
    before, dots, after = text.partition("...")
    more = tensor.ndim - len(before) - len(after)
    if more < 0 or more and not dots:
        raise ShapeError(f"einsum: {text!r} of {equation!r} has {len(before) + len(after)} letters for an "
                         f"array of {tensor.ndim} axes", op="einsum", shapes=[tensor.shape], where=here(),
                         hint="a letter for each axis, or '...' for those in front")
    return (*before, *(f".{i}" for i in range(more, 0, -1)), *after)


def _sizes(equation: str, tensors: Sequence[Tensor], terms: Sequence[tuple[str, ...]],
           result: Sequence[str]) -> dict[str, DimLike]:
    """The extent of each label: the one that is not 1."""
    sizes: dict[str, DimLike] = {}
    for tensor, labels in zip(tensors, terms):
        for label, size in zip(labels, tensor.shape):
            known = sizes.get(label, 1)
            if size != 1 and known != 1 and size != known:
                name = repr(label) if label[0] != "." else "an axis of '...'"
                raise ShapeError(f"einsum: in {equation!r}, {name} is {known} in one place and {size} in "
                                 "another", op="einsum", shapes=[t.shape for t in tensors], where=here())
            sizes[label] = size if known == 1 else known
    return sizes


def _distinct(tensor: Tensor, labels: tuple[str, ...], sizes: dict[str, DimLike]) -> Labelled:
    """The operand with each label once: diagonals of repeated ones, and no axes of 1 that are to be
    stretched."""
    ones = tuple(a for a, label in enumerate(labels) if tensor.shape[a] == 1 and sizes[label] != 1)
    if ones:
        tensor = squeeze(tensor, ones)
        labels = tuple(label for a, label in enumerate(labels) if a not in ones)
    while len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        first = labels.index(twice)
        second = labels.index(twice, first + 1)
        tensor = diagonal(tensor, 0, first, second)
        labels = (*(label for a, label in enumerate(labels) if a not in (first, second)), twice)
    return Labelled(tensor, labels)
