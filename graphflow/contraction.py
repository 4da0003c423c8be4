"""Einstein's summation: any product of arrays along labelled axes, by batched matrix products of two at a
time."""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from graphflow.compiler.plan.dims import DimLike, evaluate, product, symbols_of
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.scope import here
from graphflow.shapes import diagonal, reshape, squeeze, transpose
from graphflow.tensor import Operand, Tensor, apply, as_tensors, broadcast_shapes, stretch

TYPICAL_SIZE = 128
"""What a dimension that the call decides is taken to be when orders of contraction are compared."""
MANY_OPERANDS = 6
"""Up to so many operands every order is tried; of more the next pair is the one whose result is smallest."""


class Labelled(NamedTuple):
    """A Tensor and a label for each of its axes, all different."""
    tensor: Tensor
    labels: tuple[str, ...]


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
        first, second = _next_pair(given, result, sizes)
        others = [g for i, g in enumerate(given) if i not in (first, second)]
        needed = set(result).union(*(g.labels for g in others))
        given = [*others, contract(given[first], given[second], needed)]
    last = _summed(given[0], set(result))
    return transpose(last.tensor, [last.labels.index(label) for label in result])


# --- the equation

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


# --- the order

def _cost(labels: Iterable[str], sizes: dict[str, DimLike]) -> int:
    return _typical(product(sizes[label] for label in labels))


def _typical(size: DimLike) -> int:
    return evaluate(size, dict.fromkeys(symbols_of(size), TYPICAL_SIZE))


def _next_pair(given: Sequence[Labelled], result: Sequence[str], sizes: dict[str, DimLike]
               ) -> tuple[int, int]:
    """The two operands to contract next."""
    labels = [frozenset(g.labels) for g in given]
    if len(given) <= MANY_OPERANDS:
        return _best_order(labels, frozenset(result), sizes)[1]
    pairs = itertools.combinations(range(len(given)), 2)
    return min(pairs, key=lambda pair: _cost(_left(labels, pair, frozenset(result))[0], sizes))


def _left(labels: Sequence[frozenset[str]], pair: tuple[int, int], result: frozenset[str]
          ) -> tuple[frozenset[str], list[frozenset[str]]]:
    """The labels of the pair's product, and all operands after it is made; it comes last."""
    others = [labels[i] for i in range(len(labels)) if i not in pair]
    made = (labels[pair[0]] | labels[pair[1]]) & result.union(*others)
    return made, [*others, made]


def _best_order(labels: Sequence[frozenset[str]], result: frozenset[str], sizes: dict[str, DimLike]
                ) -> tuple[int, tuple[int, int]]:
    """(multiplications of the best order, its first pair)."""
    best: tuple[int, tuple[int, int]] | None = None
    for pair in itertools.combinations(range(len(labels)), 2):
        cost = _cost(labels[pair[0]] | labels[pair[1]], sizes)
        left = _left(labels, pair, result)[1]
        if len(left) > 1 and (best is None or cost < best[0]):
            cost += _best_order(left, result, sizes)[0]
        if best is None or cost < best[0]:
            best = cost, pair
    assert best is not None
    return best


# --- a pair

def contract(x: Labelled, y: Labelled, needed: set[str]) -> Labelled:
    """The product of two operands, summed over the labels that are not needed."""
    x = _summed(x, needed | set(y.labels))
    y = _summed(y, needed | set(x.labels))
    both = [label for label in x.labels if label in y.labels]
    batch, inner = [c for c in both if c in needed], [c for c in both if c not in needed]
    rows = [c for c in x.labels if c not in both]
    columns = [c for c in y.labels if c not in both]
    kept = (*batch, *rows, *columns)
    if not inner or not rows and not columns or not x.tensor.dtype.has_gradient:
        return _multiplied(x, y, kept, inner)
    sizes = dict(zip((*x.labels, *y.labels), (*x.tensor.shape, *y.tensor.shape)))
    left, x_flag = _matrices(x, batch, rows, inner)
    right, y_flag = _matrices(y, batch, columns, inner)
    out = apply("matmul", [left, right], transpose_x=x_flag, transpose_y=not y_flag)
    return Labelled(reshape(out, tuple(sizes[c] for c in kept)), kept)


def _matrices(x: Labelled, batch: list[str], own: list[str], inner: list[str]) -> tuple[Tensor, bool]:
    """The operand as [*batch, own, inner], or as [*batch, inner, own] where that is how it lies (True)."""
    swapped = list(x.labels) == [*batch, *inner, *own]
    groups = (inner, own) if swapped else (own, inner)
    order = [x.labels.index(c) for c in (*batch, *groups[0], *groups[1])]
    tensor = transpose(x.tensor, order) if order != list(range(len(order))) else x.tensor
    lead, first = len(batch), len(batch) + len(groups[0])
    shape = tensor.shape
    return reshape(tensor, (*shape[:lead], product(shape[lead:first]), product(shape[first:]))), swapped


def _multiplied(x: Labelled, y: Labelled, kept: tuple[str, ...], inner: list[str]) -> Labelled:
    """The elementwise product, summed over `inner`."""
    order = (*kept, *inner)
    parts = []
    for tensor, labels in (x, y):
        tensor = transpose(tensor, [labels.index(c) for c in order if c in labels])
        sizes = iter(tensor.shape)
        parts.append(reshape(tensor, tuple(next(sizes) if c in labels else 1 for c in order)))
    shape = broadcast_shapes("einsum", [p.shape for p in parts])
    out = stretch(parts[0], shape) * stretch(parts[1], shape)
    axes = tuple(range(len(kept), len(order)))
    return Labelled(apply("reduce_sum", [out], axes=axes) if axes else out, kept)


def _summed(x: Labelled, needed: set[str]) -> Labelled:
    """Summed over the labels that are not needed."""
    axes = tuple(a for a, label in enumerate(x.labels) if label not in needed)
    if not axes:
        return x
    return Labelled(apply("reduce_sum", [x.tensor], axes=axes),
                    tuple(label for label in x.labels if label in needed))
