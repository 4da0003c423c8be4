"""Products of arrays along labelled axes: which two come next, and two of them as one matrix product."""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from graphflow.compiler.plan.dims import DimLike, evaluate, product, symbols_of
from graphflow.shapes import reshape, transpose
from graphflow.tensor import Tensor, apply, broadcast_shapes, stretch

TYPICAL_SIZE = 128
"""What a dimension that the call decides is taken to be when orders of contraction are compared."""
MANY_OPERANDS = 6
"""Up to so many operands every order is tried; of more the next pair is the one whose result is smallest."""


class Labelled(NamedTuple):
    """A Tensor and a label for each of its axes, all different."""
    tensor: Tensor
    labels: tuple[str, ...]


# --- the order

def _cost(labels: Iterable[str], sizes: dict[str, DimLike]) -> int:
    return _typical(product(sizes[label] for label in labels))


def _typical(size: DimLike) -> int:
    return evaluate(size, dict.fromkeys(symbols_of(size), TYPICAL_SIZE))


def next_pair(given: Sequence[Labelled], result: Sequence[str], sizes: dict[str, DimLike]
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
    x = summed(x, needed | set(y.labels))
    y = summed(y, needed | set(x.labels))
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


def summed(x: Labelled, needed: set[str]) -> Labelled:
    """The operand summed over the labels that are not needed."""
    axes = tuple(a for a, label in enumerate(x.labels) if label not in needed)
    if not axes:
        return x
    return Labelled(apply("reduce_sum", [x.tensor], axes=axes),
                    tuple(label for label in x.labels if label in needed))
