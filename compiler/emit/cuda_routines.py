"""CUDA C for routines. Which threads go through what depends on where neighbouring elements lie:

- scatters of slices: a block has up to 64 slices of the result, or a piece of each, its warps share them. The
  block goes through the indices in their order, some at a time; a warp lists those that point to its slices,
  and takes them up;
- `put_add`: a block for each row, whose threads own elements of the result and go through all indices;
- running sums: a warp for each row, or a block where rows are long, by scans with a fixed tree. They are
  those of the CPU but for rounding;
- where rows lie side by side in memory, and for recurrences: a thread for each row;
- sorting: a thread for each element, whose place is the number of the elements before it.

A thread writes elements that no other writes, so there are no atomics; but for running sums each element sees
its operands in the order that the other back ends have, so the bits are theirs. A result may lie where an
operand does (`Routine.takes_over`): an element is read before it is written.
"""
from __future__ import annotations

from collections.abc import Callable

from graphflow.compiler.cuda_target import BUSY_BLOCKS
from graphflow.compiler.emit.cuda_text import C_TYPES, THREADS, WARP, Code, apply, dimension, literal
from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike, ceildiv, typical
from graphflow.compiler.plan.dtypes import DType

SHARES, PIECE = ((8, 4), (4, 4), (2, 4), (1, 4), (1, 2), (1, 1)), 1024
"""Slices of a warp, and elements of each that a thread has; indices that a block looks at together."""
WARPS = THREADS // WARP
"""Warps of a block."""
LONG_ROW = 1024
"""A running sum so long is a block's."""
UNDER_WAY = 4
"""Updates that a warp reads before it adds the first."""


def routine_blocks(kernel: RoutineKernel) -> DimLike:
    """Blocks for all rows, slices or elements."""
    before, size, behind = kernel.arguments[-1].shape
    if kernel.routine in ("scatter_add", "scatter_set"):
        slices, across = _share(kernel)
        return before * ceildiv(size, slices * WARPS) * ceildiv(behind, across * WARP)
    if kernel.routine == "argsort":
        return ceildiv(before * size * behind, THREADS)
    if _side_by_side(kernel):
        return ceildiv(before * behind, THREADS)
    by_warp = kernel.routine == "cumulative" and typical(size) < LONG_ROW
    return ceildiv(before * behind, WARPS) if by_warp else before * behind


def _side_by_side(kernel: RoutineKernel) -> bool:
    """Whether a thread goes through each row."""
    behind = kernel.arguments[-1].shape[2]
    return kernel.routine == "recurrence" or not isinstance(behind, int) or behind >= WARP


def routine_code(kernel: RoutineKernel) -> Code:
    """The kernel's code."""
    before, size, behind = (dimension(d) for d in kernel.arguments[-1].shape)
    what, meets, body = _form(kernel)
    lines = [f"  const idx O = {before}, N = {size}, I = {behind};", *("  " + line for line in body(kernel))]
    return Code(kernel, lines, what, meets=meets)


def _form(kernel: RoutineKernel) -> tuple[str, bool, Callable[[RoutineKernel], list[str]]]:
    """What a block does, whether its threads meet, and who writes that."""
    if kernel.routine in ("scatter_add", "scatter_set"):
        slices, across = _share(kernel)
        return f"{slices * WARPS} slices of {across * WARP} elements per block", True, _slices
    if kernel.routine == "argsort":
        return "one thread per element", False, _argsort
    if _side_by_side(kernel):
        return "one thread per row", False, _thread_per_row
    if kernel.routine == "put_add":
        return "one block per row", True, _put_add
    by_block = typical(kernel.arguments[-1].shape[1]) >= LONG_ROW
    return f"one {'block' if by_block else 'warp'} per row", by_block, _scan


def _each(what: str, count: str, body: list[str]) -> list[str]:
    """A grid-stride loop of threads."""
    return [f"for (idx {what} = block * {THREADS} + threadIdx.x; {what} < {count}; "
            f"{what} += blocks * {THREADS}) {{", *("  " + line for line in body), "}"]


# --- a thread for each row


def _thread_per_row(kernel: RoutineKernel) -> list[str]:
    if kernel.routine == "put_add":
        dtype, count = kernel.arguments[-2].dtype, dimension(kernel.arguments[-2].shape[1])
        target = "y[start + at * I]"
        total = apply("add", [target, "updates[from + k * I]"], dtype, dtype)
        return _each("row", "O * I", [
            "const idx o = row / I, i = row % I, start = o * N * I + i;",
            f"const idx count = {count}, from = o * count * I + i;",
            f"for (idx n = 0; n < N; n++) y[start + n * I] = {literal(0, dtype)};",
            "for (idx k = 0; k < count; k++) {",
            "  const idx at = indices[from + k * I];",
            f"  if (at >= 0 && at < N) {target} = {total};",
            "}"])
    first, step = "b[at]", "a[at] * last + b[at]"
    if kernel.routine == "cumulative":
        first, step = "x[at]", _combined(kernel, "last", "x[at]")
    return _each("row", "O * I", [
        "const idx start = row / I * N * I + row % I;",
        f"{C_TYPES[kernel.arguments[-1].dtype]} last = 0;",
        "for (idx k = 0; k < N; k++) {",
        f"  const idx at = start + ({_number(kernel, 'k')}) * I;",
        f"  last = k == 0 ? {first} : {step};",
        "  y[at] = last;",
        "}"])


def _number(kernel: RoutineKernel, k: str) -> str:
    return f"N - 1 - {k}" if kernel.attrs["reverse"] else k


def _combined(kernel: RoutineKernel, x: str, y: str) -> str:
    function = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[kernel.attrs["kind"]]
    dtype = kernel.arguments[0].dtype
    return apply(function, [x, y], dtype, dtype)


# --- running sums


def _scan(kernel: RoutineKernel) -> list[str]:
    """Each thread has every 32nd or 256th element; they are combined within warps, then across the warps of a
    block, then with all that came before."""
    by_block = typical(kernel.arguments[-1].shape[1]) >= LONG_ROW
    kind, team = C_TYPES[kernel.arguments[0].dtype], THREADS if by_block else WARP
    head = ["const int lane = threadIdx.x;", f"__shared__ {kind} totals[{WARPS}];",
            "for (idx row = block; row < O * I; row += blocks) {"]
    across = [f"    if (lane % {WARP} == {WARP - 1}) totals[lane / {WARP}] = own;", "    __syncthreads();",
              f"    {kind} total = totals[0], before = totals[0];",
              f"    for (int warp = 1; warp < {WARPS}; warp++) {{",
              f"      if (warp < lane / {WARP}) before = {_combined(kernel, 'before', 'totals[warp]')};",
              f"      total = {_combined(kernel, 'total', 'totals[warp]')};", "    }",
              "    __syncthreads();",
              f"    if (lane >= {WARP}) own = {_combined(kernel, 'before', 'own')};"]
    if not by_block:
        head = [f"const int lane = threadIdx.x % {WARP}, teams = blocks * {WARPS};",
                f"for (idx row = block * {WARPS} + threadIdx.x / {WARP}; row < O * I; row += teams) {{"]
        across = [f"    const {kind} total = ({kind})__shfl_sync(0xffffffffu, own, {WARP - 1});"]
    return [*head,
            "  const idx start = row / I * N * I + row % I;",
            f"  {kind} last = 0;",
            f"  for (idx first = 0; first < N; first += {team}) {{",
            f"    const idx k = first + lane, at = start + ({_number(kernel, 'k')}) * I;",
            f"    {kind} own = k < N ? x[at] : {literal(0, kernel.arguments[0].dtype)};",
            f"    for (int step = 1; step < {WARP}; step *= 2) {{",
            f"      const {kind} other = ({kind})__shfl_up_sync(0xffffffffu, own, step);",
            f"      if (lane % {WARP} >= step) own = {_combined(kernel, 'other', 'own')};",
            "    }",
            *across,
            f"    if (first > 0) own = {_combined(kernel, 'last', 'own')};",
            "    if (k < N) y[at] = own;",
            f"    last = first > 0 ? {_combined(kernel, 'last', 'total')} : total;",
            "  }", "}"]


# --- sorting


def _argsort(kernel: RoutineKernel) -> list[str]:
    """The place of an element is the number of those that come before it."""
    dtype = kernel.arguments[0].dtype
    ahead, behind = _before("other", "own", dtype), _before("own", "other", dtype)
    if kernel.attrs["descending"]:
        ahead, behind = behind, ahead
    kind = C_TYPES[dtype]
    return _each("element", "O * N * I", [
        "const idx start = element / (N * I) * N * I + element % I, n = element / I % N;",
        f"const {kind} own = x[start + n * I];",
        "idx place = 0;",
        "for (idx k = 0; k < N; k++) {",
        f"  const {kind} other = x[start + k * I];",
        f"  place += {ahead} || (k < n && !{behind});",
        "}",
        "y[start + place * I] = n;"])


def _before(x: str, y: str, dtype: DType) -> str:
    """Whether x < y, NaN being the greatest."""
    return f"({x} < {y} || ({x} == {x} && {y} != {y}))" if dtype.is_float else f"({x} < {y})"


# --- scatters


def _put_add(kernel: RoutineKernel) -> list[str]:
    """A block reads a piece of the row's indices and updates into shared memory; each thread takes from it
    what is for its element."""
    dtype, count = kernel.arguments[-2].dtype, dimension(kernel.arguments[-2].shape[1])
    kind, total = C_TYPES[dtype], apply("add", ["total", "values[k]"], dtype, dtype)
    return [
        f"__shared__ idx places[{PIECE}];",
        f"__shared__ {kind} values[{PIECE}];",
        f"const idx count = {count};",
        "for (idx row = block; row < O * I; row += blocks) {",
        "  const idx from = row / I * count * I + row % I;",
        f"  for (idx first = 0; first < N; first += {THREADS}) {{",
        "    const idx n = first + threadIdx.x;",
        f"    {kind} total = {literal(0, dtype)};",
        f"    for (idx piece = 0; piece < count; piece += {PIECE}) {{",
        f"      const int size = count - piece < {PIECE} ? count - piece : {PIECE};",
        "      __syncthreads();",
        f"      for (int k = threadIdx.x; k < size; k += {THREADS}) {{",
        "        const i64 at = indices[from + (piece + k) * I];",
        "        places[k] = at >= 0 && at < N ? (idx)at : -1;",
        "        values[k] = updates[from + (piece + k) * I];",
        "      }",
        "      __syncthreads();",
        "      for (int k = 0; k < size; k++)",
        f"        if (places[k] == n) total = {total};",
        "    }",
        "    if (n < N) y[row / I * N * I + n * I + row % I] = total;",
        "  }",
        "}"]


def _share(kernel: RoutineKernel) -> tuple[int, int]:
    """The largest share of a warp that leaves enough blocks; of those that no slice is shorter than."""
    before, size, behind = (typical(d) for d in kernel.arguments[-1].shape)
    fitting = [s for s in SHARES if s[1] == 1 or (s[1] - 1) * WARP < behind]
    return next((s for s in fitting if before * -(-size // (s[0] * WARPS)) * -(-behind // (s[1] * WARP))
                 >= BUSY_BLOCKS), fitting[-1])


def _slices(kernel: RoutineKernel) -> list[str]:
    updates = kernel.arguments[-2]
    dtype, adds = updates.dtype, kernel.routine == "scatter_add"
    slices, across = _share(kernel)
    base = literal(0, dtype) if adds else f"x[start + s * I + j * {WARP}]"
    value = apply("add", ["sums[j]", "next[u][j]"], dtype, dtype) if adds else "next[u][j]"
    head = [
        f"__shared__ unsigned char slices[{PIECE}];  // of the block, of each index; {slices * WARPS}: none",
        f"__shared__ unsigned short listed[{WARPS}][{PIECE}];  // by warp: number, slice",
        f"const int lane = threadIdx.x % {WARP}, warp = threadIdx.x / {WARP};",
        f"const idx count = {dimension(updates.shape[1])};",
        f"const unsigned groups = (N + {slices * WARPS - 1}) / {slices * WARPS};",
        f"const unsigned pieces = (I + {across * WARP - 1}) / {across * WARP};",
        "for (unsigned group = block; group < O * groups * pieces; group += blocks) {",
        "  const idx o = group / pieces / groups;",
        f"  const idx first = group / pieces % groups * {slices * WARPS}, own = first + warp * {slices};",
        f"  const idx i = group % pieces * {across * WARP} + lane, start = (o * N + own) * I + i;",
        f"  for (int s = 0; s < {slices}; s++)",
        f"    for (int j = 0; j < {across}; j++)",
        f"      if (own + s < N && i + j * {WARP} < I) y[start + s * I + j * {WARP}] = {base};"]
    return [*head, *_listed(slices), *_taken_up(C_TYPES[dtype], slices, across, value), "}"]


def _listed(own: int) -> list[str]:
    """Opens the loop over pieces of the indices; each warp lists what is for its slices."""
    return [
        f"  for (idx piece = 0; piece < count; piece += {PIECE}) {{",
        f"    for (int k = threadIdx.x; k < {PIECE}; k += {THREADS}) {{",
        "      const i64 at = piece + k < count ? (i64)indices[piece + k] : -1;",
        f"      const bool here = at >= first && at < N && at < first + {own * WARPS};",
        f"      slices[k] = here ? at - first : {own * WARPS};",
        "    }",
        "    __syncthreads();",
        "    int many = 0;",
        f"    for (int k = lane; k < {PIECE}; k += {WARP}) {{",
        f"      const bool mine = slices[k] / {own} == warp;",
        "      const unsigned all = __ballot_sync(0xffffffffu, mine);",
        "      const int place = many + __popc(all & ((1u << lane) - 1));",
        f"      if (mine) listed[warp][place] = k * {own} + slices[k] % {own};",
        "      many += __popc(all);",
        "    }",
        "    __syncthreads();"]


def _taken_up(kind: str, own: int, across: int, value: str) -> list[str]:
    """A warp takes up what it has listed; a slice stays in registers as long as the next update is for it."""
    flush = [f"  for (int j = 0; j < {across}; j++)",
             f"    if (slice >= 0 && i + j * {WARP} < I) y[start + slice * I + j * {WARP}] = sums[j];"]
    fetch = [f"  for (int j = 0; j < {across}; j++)",
             f"    if (i + j * {WARP} < I) sums[j] = y[start + slice * I + j * {WARP}];"]
    return [
        f"    {kind} sums[{across}];",
        "    int slice = -1;",
        f"    for (int e = 0; e < many; e += {UNDER_WAY}) {{",
        f"      {kind} next[{UNDER_WAY}][{across}];",
        "      #pragma unroll",
        f"      for (int u = 0; u < {UNDER_WAY}; u++) {{",
        "        if (e + u >= many) break;",
        f"        const idx from = (o * count + piece + listed[warp][e + u] / {own}) * I + i;",
        f"        for (int j = 0; j < {across}; j++)",
        f"          if (i + j * {WARP} < I) next[u][j] = updates[from + j * {WARP}];",
        "      }",
        "      #pragma unroll",
        f"      for (int u = 0; u < {UNDER_WAY}; u++) {{",
        "        if (e + u >= many) break;",
        f"        const int to = listed[warp][e + u] % {own};",
        "        if (to != slice) {",
        *("        " + line for line in flush),
        "          slice = to;",
        *("        " + line for line in fetch),
        "        }",
        f"        for (int j = 0; j < {across}; j++) sums[j] = {value};",
        "      }", "    }",
        *("  " + line for line in flush),
        "  }"]


ROUTINES = ("cumulative", "recurrence", "argsort", "scatter_add", "scatter_set", "put_add")
"""The routines that this writes."""
