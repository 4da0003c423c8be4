"""CUDA C for routines: one thread for each row, or, where a row is sorted, for each of its elements.

A thread writes elements that no other writes, and goes through a row in its order, so the bits are those of
the other back ends. A result may lie where an operand does (`Routine.takes_over`): an element is read before
it is written.
"""
from __future__ import annotations

from collections.abc import Callable

from graphflow.compiler.emit.cuda_text import C_TYPES, THREADS, apply, dimension, literal, signature
from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike, ceildiv
from graphflow.compiler.plan.dtypes import DType


def routine_blocks(kernel: RoutineKernel) -> DimLike:
    """Blocks for a thread for each row, or for each element that is sorted."""
    before, size, behind = kernel.arguments[-1].shape
    return ceildiv(before * behind * (size if kernel.routine == "argsort" else 1), THREADS)


def routine_text(kernel: RoutineKernel) -> str:
    """The ``__global__`` function."""
    before, size, behind = (dimension(d) for d in kernel.arguments[-1].shape)
    by_element = kernel.routine == "argsort"
    rows = f"{before} * {size} * {behind}" if by_element else f"{before} * {behind}"
    lines = [
        f"// Launch with {THREADS} threads a block, one thread per {'element' if by_element else 'row'}.",
        signature(kernel), "{",
        f"  const idx N = {size}, I = {behind}, rows = {rows};",
        "  for (idx row = blockIdx.x * (idx)blockDim.x + threadIdx.x; row < rows; "
        "row += (idx)gridDim.x * blockDim.x) {",
        *("    " + line for line in ROUTINES[kernel.routine](kernel)),
        "  }", "}"]
    return "\n".join(lines) + "\n"


def _running(kernel: RoutineKernel, first: str, step: str) -> list[str]:
    """y[n] = step of y[n - 1] (`y`) and the elements at `at`."""
    kind = C_TYPES[kernel.arguments[-1].dtype]
    n = "N - 1 - k" if kernel.attrs["reverse"] else "k"
    return [
        "const idx start = row / I * N * I + row % I;",
        f"{kind} last = 0;",
        "for (idx k = 0; k < N; k++) {",
        f"  const idx at = start + ({n}) * I;",
        f"  last = k == 0 ? {first} : {step};",
        "  y[at] = last;",
        "}"]


def _cumulative(kernel: RoutineKernel) -> list[str]:
    function = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[kernel.attrs["kind"]]
    dtype = kernel.arguments[0].dtype
    return _running(kernel, "x[at]", apply(function, ["last", "x[at]"], dtype, dtype))


def _recurrence(kernel: RoutineKernel) -> list[str]:
    return _running(kernel, "b[at]", "a[at] * last + b[at]")


def _argsort(kernel: RoutineKernel) -> list[str]:
    """The place of an element is the number of those that come before it."""
    dtype = kernel.arguments[0].dtype
    ahead, behind = _before("other", "own", dtype), _before("own", "other", dtype)
    if kernel.attrs["descending"]:
        ahead, behind = behind, ahead
    kind = C_TYPES[dtype]
    return [
        "const idx start = row / (N * I) * N * I + row % I, n = row / I % N;",
        f"const {kind} own = x[start + n * I];",
        "idx place = 0;",
        "for (idx k = 0; k < N; k++) {",
        f"  const {kind} other = x[start + k * I];",
        f"  place += {ahead} || (k < n && !{behind});",
        "}",
        "y[start + place * I] = n;"]


def _before(x: str, y: str, dtype: DType) -> str:
    """Whether x < y, NaN being the greatest."""
    return f"({x} < {y} || ({x} == {x} && {y} != {y}))" if dtype.is_float else f"({x} < {y})"


def _scatter(kernel: RoutineKernel) -> list[str]:
    """All three: `put_add` has an index for each element."""
    updates = kernel.arguments[-2]
    dtype, count = updates.dtype, dimension(updates.shape[1])
    base = "x[start + n * I]" if kernel.routine == "scatter_set" else literal(0, dtype)
    index = "indices[from + k * I]" if kernel.routine == "put_add" else "indices[k]"
    target, value = "y[start + at * I]", "updates[from + k * I]"
    if kernel.routine != "scatter_set":
        value = apply("add", [target, value], dtype, dtype)
    return [
        "const idx o = row / I, i = row % I, start = o * N * I + i;",
        f"const idx count = {count}, from = o * count * I + i;",
        f"for (idx n = 0; n < N; n++) y[start + n * I] = {base};",
        "for (idx k = 0; k < count; k++) {",
        f"  const idx at = {index};",
        f"  if (at >= 0 && at < N) {target} = {value};",
        "}"]


ROUTINES: dict[str, Callable[[RoutineKernel], list[str]]] = {
    "cumulative": _cumulative, "recurrence": _recurrence, "argsort": _argsort,
    "scatter_add": _scatter, "scatter_set": _scatter, "put_add": _scatter,
}
"""The body of the loop over rows."""
