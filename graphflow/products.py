"""Products of arrays that sum over axes."""
from __future__ import annotations

from graphflow.compiler.plan.errors import ShapeError
from graphflow.scope import here
from graphflow.shapes import reshape
from graphflow.tensor import Operand, Tensor, apply, as_tensors, broadcast_shapes, stretch


def matmul(x: Operand, y: Operand) -> Tensor:
    """``x @ y``: NumPy's matrix product. A vector stands for one row (left) or one column (right); the axes
    before the last two are broadcast."""
    a, b = as_tensors([x, y])
    if not a.shape or not b.shape:
        raise ShapeError("matmul takes arrays of at least one axis, not a number", op="matmul",
                         shapes=[a.shape, b.shape], where=here(), hint="multiply by a number with *")
    left = reshape(a, (1, *a.shape)) if a.ndim == 1 else a
    right = reshape(b, (*b.shape, 1)) if b.ndim == 1 else b
    if left.shape[-1] == right.shape[-2] and left.shape[:-2] != right.shape[:-2]:
        batch = broadcast_shapes("matmul", [left.shape[:-2], right.shape[:-2]])
        left, right = stretch(left, (*batch, *left.shape[-2:])), stretch(right, (*batch, *right.shape[-2:]))
    out = apply("matmul", [left, right])
    if a.ndim > 1 and b.ndim > 1:
        return out
    shape = out.shape[:-2] + (out.shape[-2:-1] if a.ndim > 1 else ()) + (out.shape[-1:] if b.ndim > 1 else ())
    return reshape(out, shape)


def dot(x: Operand, y: Operand) -> Tensor:
    """The product of a number with an array, else the matrix product `matmul`."""
    a, b = as_tensors([x, y])
    return a * b if not a.shape or not b.shape else matmul(a, b)
