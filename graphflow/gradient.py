"""Derivatives: gradients, products with Jacobians from either side, Jacobians and Hessians.

All are made of one node, `grad`, which the compiler expands by reverse mode; the results are tensors like any
others and can be differentiated again. What is differentiated is a Tensor (or several) computed from the
inputs, or a function of the inputs.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, overload

import numpy as np

from graphflow.compiler.ir.graph import Node, topological, walk
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.indexing import one_hot
from graphflow.reductions import sum as total
from graphflow.scope import here
from graphflow.shapes import broadcast_to, reshape, stack
from graphflow.tensor import Tensor, apply, as_array, cast, constant, elementwise
from graphflow.tracing import REMADE

Outputs = Tensor | Sequence[Tensor] | Callable[..., Any]
"""A Tensor, several, or a function of the inputs that gives them."""

MAX_ROWS = 1024
"""How many rows or columns a Jacobian may be made of: each is a pass of its own through the graph."""


@overload
def grad(scalar: Tensor, wrt: Tensor) -> Tensor: ...
@overload
def grad(scalar: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]: ...


def grad(scalar: Tensor, wrt: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """The gradient of a scalar by a tensor that it is computed from, or by each of a list; of the tensors'
    shapes.

    The result is a tensor like any other: it can be differentiated again. UseError for a `scalar` that is
    none, and for a tensor that it does not depend on.
    """
    listed = _listed(wrt)
    _check_depends([scalar], listed)
    return _like(wrt, _many(apply("grad", [scalar, *listed])))


def value_and_grad(scalar: Tensor | Callable[..., Tensor], wrt: Tensor | Sequence[Tensor]
                   ) -> tuple[Tensor, Any]:
    """(the scalar, its gradient by `wrt`): ``loss, slopes = gf.value_and_grad(loss_of, [w, b])``."""
    value = _evaluated(scalar, wrt)
    return value, grad(value, wrt)


def vjp(output: Outputs, inputs: Tensor | Sequence[Tensor], cotangents: Any) -> Any:
    """The product of a vector with the Jacobian, vᵀJ: what reverse mode computes; a Tensor of the shape of
    the input, or a list of one for each.

    cotangents: v, of the shape of the output (numbers are broadcast), one for each where there are several.
    They are constants here: nothing is differentiated through them.
    """
    listed, given = _listed(inputs), _evaluated(output, inputs)
    return _like(inputs, _pull_back(_listed(given), listed, _vectors("cotangent", cotangents, given)))


def jvp(output: Outputs, inputs: Tensor | Sequence[Tensor], tangents: Any) -> Any:
    """The product of the Jacobian with a vector, Jv: the derivative of the output in the direction v; a
    Tensor of the shape of the output, or a list of one for each.

    tangents: v, of the shape of the input (numbers are broadcast), one for each where there are several. It
    is computed as the derivative of `vjp` by its cotangents, in which it is linear: J. Townsend, "A new trick
    for calculating Jacobian vector products", 2017.
    """
    given = _evaluated(output, inputs)
    # what the cotangents are does not matter: only the derivative by them is computed
    cotangents = [elementwise("stop_gradient", y) for y in _listed(given)]
    pulled = _pull_back(_listed(given), _listed(inputs), cotangents)
    return _like(given, _pull_back(pulled, cotangents, _vectors("tangent", tangents, inputs)))


def hvp(scalar: Tensor | Callable[..., Tensor], inputs: Tensor | Sequence[Tensor], vectors: Any) -> Any:
    """The product of the Hessian with a vector, Hv, without the Hessian; of the shape of the inputs.

    Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.
    """
    listed = _listed(inputs)
    slopes = grad(_evaluated(scalar, inputs), listed)
    return _like(inputs, _pull_back(slopes, listed, _vectors("vector", vectors, inputs)))


def jacobian(output: Tensor | Callable[..., Tensor], inputs: Tensor | Sequence[Tensor]) -> Any:
    """All derivatives of the output by the input: shape [*output, *input], or a list of these for several
    inputs.

    It has a pass through the graph for each element of the output, or of the inputs where these are fewer;
    UseError where both are more than 1024, or open.
    """
    listed = _listed(inputs)
    y = _evaluated(output, inputs)
    _check_depends([y], listed)
    rows, columns = _count(y), sum(_count(x) for x in listed)
    if min(rows, columns) > MAX_ROWS:
        raise UseError(f"a Jacobian of {rows} by {columns} numbers needs a pass for each row or column",
                       op="jacobian", shapes=[y.shape, *(x.shape for x in listed)], where=here(),
                       hint="products with it, gf.vjp and gf.jvp, need one pass")
    if rows <= columns:
        return _like(inputs, _rows(y, listed, int(rows)))
    return _like(inputs, [_columns(y, listed, i) for i in range(len(listed))])


def hessian(scalar: Tensor | Callable[..., Tensor], inputs: Tensor | Sequence[Tensor]) -> Any:
    """All second derivatives of the scalar by the input: shape [*input, *input]; for several inputs a list of
    lists, row i by column j. One pass through the graph for each element of the inputs."""
    rows = [jacobian(slope, inputs) for slope in grad(_evaluated(scalar, inputs), _listed(inputs))]
    return rows[0] if isinstance(inputs, Tensor) else rows


def check_gradient(function: Callable[..., Tensor], *arrays: Any, device: str = "reference",
                   step: float = 1e-6, tolerance: float = 1e-5) -> float:
    """Compares the gradient of a function of tensors with central differences at the given arrays, in
    float64; the largest error relative to the largest derivative.

    The function gives one Tensor; differentiated is its sum with random weights. UseError with the place and
    both numbers where the error exceeds the `tolerance`. For small arrays: every element takes two calls.
    """
    from graphflow.function import function as program_of
    from graphflow.state import input as feed
    points = [np.asarray(a, np.float64) for a in arrays]
    feeds = [feed(f"x{i}", a.shape, "float64") for i, a in enumerate(points)]
    y = function(*feeds)
    weights = constant(np.random.default_rng(0).standard_normal(_fixed_shape(y)))
    value = program_of(feeds, total(cast(y, "float64") * weights), device=device)
    slopes = program_of(feeds, _listed(vjp(y, feeds, cast(weights, y.dtype))), device=device)(*points)
    scale = max(1e-30, *(float(np.abs(s).max(initial=0.0)) for s in slopes))
    worst = 0.0
    for number, (array, slope) in enumerate(zip(points, slopes)):
        for place in np.ndindex(array.shape):
            moved = [a.copy() for a in points]
            moved[number][place] = array[place] + step
            up = value(*moved)
            moved[number][place] = array[place] - step
            difference = float(up - value(*moved)) / (2 * step)
            error = abs(difference - float(slope[place])) / scale
            if not error <= tolerance:
                raise UseError(f"the gradient by array {number} at {list(place)} is {slope[place]:.10g}, the "
                               f"difference quotient {difference:.10g}", op=y.value.op, shapes=[array.shape],
                               where=here())
            worst = max(worst, error)
    return worst


def _pull_back(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
               ) -> list[Tensor]:
    _check_depends(outputs, inputs)
    return _many(apply("grad", [*outputs, *cotangents, *inputs], cotangents=len(outputs)))


def _rows(y: Tensor, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """The Jacobian row by row: a cotangent that is 1 in one place gives a row."""
    rows = [_pull_back([y], inputs, [_unit(i, y)]) for i in range(count)]
    return [reshape(stack([row[i] for row in rows]), (*y.shape, *x.shape)) for i, x in enumerate(inputs)]


def _columns(y: Tensor, inputs: Sequence[Tensor], which: int) -> Tensor:
    """The Jacobian by one input column by column: a tangent that is 1 in one place gives a column."""
    x = inputs[which]
    columns = [jvp(y, x, _unit(i, x)) for i in range(int(_count(x)))]
    return reshape(stack(columns, -1), (*y.shape, *x.shape))


def _unit(place: int, like: Tensor) -> Tensor:
    return reshape(one_hot(constant(place, "int64"), int(_count(like)), like.dtype), like.shape)


def _count(x: Tensor) -> float:
    """The number of elements, infinite where a call decides it."""
    size = x.value.type.size
    return size if isinstance(size, int) else float("inf")


def _fixed_shape(y: Tensor) -> tuple[int, ...]:
    return tuple(int(d) for d in y.shape)             # of inputs that have fixed shapes


def _evaluated(output: Any, inputs: Tensor | Sequence[Tensor]) -> Any:
    """The Tensor or tensors that a function gives for the inputs; what is no function is what it is."""
    return output(*_listed(inputs)) if callable(output) else output


def _vectors(what: str, given: Any, of: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The vectors as tensors, one for each of the tensors, of its shape and element type."""
    tensors = _listed(of)
    vectors = [given] if isinstance(of, Tensor) else given
    if not isinstance(vectors, (list, tuple)) or len(vectors) != len(tensors):
        raise UseError(f"there are {len(tensors)} tensors, so {what}s are a list of as many", where=here(),
                       shapes=[t.shape for t in tensors])
    out = []
    for v, t in zip(vectors, tensors):
        vector = v if isinstance(v, Tensor) else constant(as_array(v), t.dtype)
        if vector.dtype != t.dtype:
            raise DTypeError(f"the {what} is {vector.dtype.full_name}, its tensor {t.dtype.full_name}",
                             shapes=[vector.shape, t.shape], where=here(), hint="convert it with gf.cast")
        if vector.shape not in ((), t.shape):
            raise ShapeError(f"the {what} has another shape than its tensor", shapes=[vector.shape, t.shape],
                             where=here())
        out.append(broadcast_to(vector, t.shape))
    return out


def _listed(tensors: Any) -> list[Any]:
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def _many(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _like(given: Any, results: list[Any]) -> Any:
    """The results as a list if a list was given, else the only one."""
    return results if isinstance(given, (list, tuple)) else results[0]


def _check_depends(outputs: Sequence[Tensor], wrt: Sequence[Tensor]) -> None:
    for t in (*outputs, *wrt):
        if not isinstance(t, Tensor):
            raise UseError(f"grad takes tensors, not {t!r}", op="grad", where=here())
    known = set(topological([y.value.node for y in outputs]))
    for i, t in enumerate(wrt):
        which = repr(t.name) if t.name else f"tensor number {i} (the result of {t.value.op})"
        if _is_remade(t.value.node, known):
            raise UseError(f"a loop or a branch makes {which} anew inside, where no gradient by it is seen",
                           op="grad", shapes=[outputs[0].shape, t.shape], where=here(),
                           hint="give it to the loop as a carry, to the branch as an operand; or "
                                "differentiate by what is broadcast")
        if t.value.node not in known:
            what = "scalar does" if len(outputs) == 1 and not outputs[0].shape else "output does"
            raise UseError(f"the {what} not depend on {which}", op="grad",
                           shapes=[outputs[0].shape, t.shape], where=here(),
                           hint="differentiate by what it is computed from; reshaping or casting a tensor "
                                "makes another one")


def _is_remade(node: Node, known: Collection[Node]) -> bool:
    """Whether bodies among the nodes have copies of this literal or broadcast (see `tracing.close`): nodes of
    the same line that say the same."""
    if node.op not in REMADE:
        return False
    bodies = (n for k in known for r in k.regions for n in walk(r.nodes()))
    return any((n.op, n.attrs, n.types, n.origins) == (node.op, node.attrs, node.types, node.origins)
               for n in bodies)
