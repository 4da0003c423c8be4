"""Sums over the steps of a loop, taken after it.

The cotangent of a constant of a loop is a sum over its steps. Where a step's part is a product (a weight's
gradient is x' dz), a sum over rows (a bias) or a scatter (an embedding), the factors of all steps are stacked
and the sum over steps and rows is one product after the loop, instead of one and an addition to the whole
weight at every step. Else the loop carries the sum. """
from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.passes.regions import guessed_bytes
from graphflow.compiler.plan.dims import DimLike

Total = Callable[[Builder, Sequence[Value]], Value]
"""The sum over all steps, of the stacked factors."""


@dataclass(frozen=True)
class Term:
    """A part of the cotangent of an operand: `value` is the step's part, but for the `views` (innermost
    first) around it, which may be taken after the sum."""
    operand: int
    value: Value
    views: tuple[Node, ...] = ()

    def finish(self, b: Builder, total: Value) -> Value:
        """The sum, with the views around it."""
        for view in self.views:
            total = b.node(view.op, [total], view.attrs).result()
        return total


@dataclass(frozen=True)
class Stacked:
    """A term whose sum is taken after the loop: of these values of each step, by `total`."""
    term: Term
    factors: tuple[Value, ...]
    total: Total


def stack_terms(flows: Mapping[int, Value], varies: Callable[[Value], bool]
                ) -> tuple[list[Stacked], list[Term]]:
    """The step's cotangents of operands, as terms whose sums are taken after the loop, and the others.

    The first are products of factors that take no more memory at a step than reading and writing the sum
    would; and sums over rows, or over steps alone, of what is stacked for them anyway.
    """
    products: dict[Term, Stacked] = {}
    kept: set[Value] = set()
    for term in (t for i, f in flows.items() for t in _terms_of(i, f, kept)):
        found = _product(term) if all(varies(v) for v in term.value.node.inputs) else None
        if found is None:
            continue
        new = [v for v in dict.fromkeys(found.factors) if v not in kept and v.op != "parameter"]
        if sum(guessed_bytes(v.type) for v in new) <= 2 * guessed_bytes(term.value.type):
            products[term] = found
            kept.update(found.factors)
    stacked: list[Stacked] = []
    rest: list[Term] = []
    for i, f in flows.items():
        terms = _terms_of(i, f, kept)
        sums = [products[t] if t in products else _sum_of_stacked(t, kept) for t in terms]
        stacked += [s for s in sums if s is not None]
        other = [t for t, s in zip(terms, sums) if s is None]
        rest += [Term(i, f)] if other == terms else other
    return stacked, rest


def _terms_of(operand: int, cotangent: Value, whole: Container[Value]) -> list[Term]:
    """The step's cotangent of an operand as a sum of terms, in order; `whole` are not taken apart."""
    terms: list[Term] = []
    stack: list[tuple[Value, tuple[Node, ...]]] = [(cotangent, ())]
    while stack:
        v, views = stack.pop()
        if v.op == "add" and v not in whole:
            stack += [(v.node.inputs[1], views), (v.node.inputs[0], views)]
        elif (v.op in ("reshape", "transpose") or v.op == "cast" and v.dtype.is_half) and v not in whole:
            stack.append((v.node.inputs[0], (v.node, *views)))
        else:
            terms.append(Term(operand, v, views))
    return terms


def _sum_of_stacked(term: Term, kept: Container[Value]) -> Stacked | None:
    if term.value in kept:
        return Stacked(term, (term.value,), lambda b, x: b.reduce_sum(x[0], axes=(0,)))
    node = term.value.node
    if node.op != "reduce_sum" or node.inputs[0] not in kept:
        return None
    axes = (0, *(axis + 1 for axis in node.attrs["axes"]))
    return Stacked(term, node.inputs, lambda b, x: b.reduce_sum(x[0], axes=axes))


def stack_all(flows: Mapping[int, Value]) -> list[Stacked]:
    """The step's cotangents of operands where there is one step."""
    return [Stacked(Term(i, f), (f,), lambda b, x: b.reshape(x[0], shape=x[0].shape[1:]))
            for i, f in flows.items()]


def _product(term: Term) -> Stacked | None:
    node = term.value.node
    if node.op == "matmul" and term.value.type.rank == 2:
        return Stacked(term, node.inputs, lambda b, factors: _matmul(b, node, factors))
    if node.op == "scatter_add" and node.attrs["axis"] == 0:
        return Stacked(term, node.inputs, lambda b, factors: b.scatter_add(*factors, **node.attrs))
    if node.op == "conv_weight_grad":
        return Stacked(term, node.inputs, lambda b, factors: b.node(
            node.op, [_rows_together(b, f) for f in factors], node.attrs).result())
    return None


def _matmul(b: Builder, node: Node, factors: Sequence[Value]) -> Value:
    """The sum over steps of x y: one product that contracts steps and rows."""
    x, y = factors
    tx, ty = node.attrs["transpose_x"], node.attrs["transpose_y"]
    x = _rows_together(b, x) if tx else _columns_together(b, x)
    y = _columns_together(b, y) if ty else _rows_together(b, y)
    return b.matmul(x, y, transpose_x=tx, transpose_y=ty)


def _rows_together(b: Builder, x: Value) -> Value:
    """[steps, rows, …] as [steps * rows, …]."""
    return b.reshape(x, shape=(x.shape[0] * x.shape[1], *x.shape[2:]))


def _columns_together(b: Builder, x: Value) -> Value:
    """[steps, a, columns] as [a, steps * columns]."""
    steps, a, columns = x.shape
    shape: tuple[DimLike, ...] = (a, steps * columns)
    return b.reshape(b.transpose(x, perm=(1, 0, 2)), shape=shape)
