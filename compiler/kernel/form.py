"""Level 2: kernels, one form for both back ends.

A kernel is a loop nest over buffers (`LoopKernel`), a contraction (`ContractionKernel`) or a named routine
(`RoutineKernel`). Buffers are the
kernel's formal arguments; an index has one quasi-affine `Dim` per axis of the argument, over loop variables,
symbols and *indirect* integers (loaded from a buffer: gather). Expressions are pure:

    Const        a literal
    Load         an element of an argument
    Index        the value of an index expression, as a number
    Local        a value bound by `Let`, or `acc`, a contraction's finished accumulator
    Apply        a scalar function of the table `SCALARS`
    Guarded      its value where every guard holds, else the fill; loads inside happen only where they hold
    Reduce       a reduction over own loop variables; with several operands a tuple reduction (argmax)

A value that is used more than once is bound by a `Let` (or in `Reduce.lets`), so expressions are small trees.
The order of evaluation is free except within one reduction, whose split is fixed by `tile`, never by thread
count.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType


@dataclass(frozen=True)
class Guard:
    """Holds where ``0 <= at < bound``."""
    at: DimLike
    bound: DimLike


@dataclass(frozen=True)
class Const:
    """A literal."""

    value: float | int | bool
    dtype: DType


@dataclass(frozen=True)
class Load:
    """Element `index` of argument `arg` (its name)."""
    arg: str
    index: tuple[DimLike, ...]
    dtype: DType


@dataclass(frozen=True)
class Index:
    """The value of a dimension expression as a number of `dtype`."""
    at: DimLike
    dtype: DType


@dataclass(frozen=True)
class Local:
    """A value that a `Let` of this name bound."""
    name: str
    dtype: DType


@dataclass(frozen=True)
class Apply:
    """A scalar function by name: see `graphflow.compiler.kernel.scalars.SCALARS`."""
    function: str
    args: tuple[Expr, ...]
    dtype: DType


@dataclass(frozen=True)
class Guarded:
    """`value` where every guard holds, else `fill`; loads in `value` happen only where they hold."""

    guards: tuple[Guard, ...]
    value: Expr
    fill: Expr

    @property
    def dtype(self) -> DType:
        """The element type of value and fill."""
        return self.value.dtype


REDUCTIONS = {"sum": 1, "prod": 1, "max": 1, "min": 1, "any": 1, "all": 1, "argmax": 2, "argmin": 2}
"""Kinds of reductions, with the number of their operands."""


@dataclass(frozen=True)
class Reduce:
    """Combines the operands over the loop variables, in the order of the loops, from the identity.

    kind: sum, prod, max, min (one operand; max and min propagate NaN), any, all, or argmax, argmin (operands:
    value, number; the first of equal values wins, NaN is the greatest / least). `result` picks the operand
    whose reduced value this is. `lanes`, set by `tile`, names the variable that is vectorised. `lets` bind
    what the operands use more than once; they are evaluated anew in every iteration and seen by the operands
    and by later lets only.
    """
    kind: str
    loops: tuple[tuple[str, DimLike], ...]
    operands: tuple[Expr, ...]
    result: int = 0
    lanes: str = ""
    lets: tuple[Let, ...] = ()

    @property
    def dtype(self) -> DType:
        """The element type of the chosen operand."""
        return self.operands[self.result].dtype


Expr = Union[Const, Load, Index, Local, Apply, Guarded, Reduce]  # noqa: UP007


@dataclass(frozen=True)
class Let:
    """Binds a scalar for the statements that follow it in the same body."""
    name: str
    value: Expr


@dataclass(frozen=True)
class Store:
    """Writes element `index` of an argument."""

    arg: str
    index: tuple[DimLike, ...]
    value: Expr


@dataclass(frozen=True)
class Loop:
    """`kind`: "serial" as written; "grid" the parallel loops, outermost and perfectly nested; "lanes"
    (innermost) vectorised. Until `tile` decides, independent loops are "grid" or "serial" by nesting only."""
    var: str
    extent: DimLike
    body: tuple[Statement, ...]
    kind: str = "serial"


Statement = Union[Let, Store, Loop]  # noqa: UP007


@dataclass(frozen=True)
class Argument:
    """A formal buffer of a kernel, row-major; `shape` is in the order of memory. `mode`: "r", "w" or "rw".
    An "rw" argument is read only at the very element that the same iteration writes. A "w" argument may share
    its memory with an "r" one (see `memory`): an emitter writes each of its elements once, with its final
    value, and no earlier than the kernel's text does."""
    name: str
    dtype: DType
    shape: tuple[DimLike, ...]
    mode: str


@dataclass(frozen=True)
class LoopKernel:
    """A loop nest. `indirect` names integers loaded from buffers that indices may use as symbols; they may
    refer to loop variables and to earlier ones. `symbols` are the program's symbols that occur in it. `rows`:
    a task is one iteration of the outermost loop (see `kernel/rows.py`); else the emitter cuts it."""
    name: str
    arguments: tuple[Argument, ...]
    body: tuple[Statement, ...]
    symbols: tuple[str, ...] = ()
    indirect: Mapping[str, Expr] = field(default_factory=dict)
    rows: bool = False


TILE_FIELDS = {"mr": 1, "nr": 1, "kc": 1, "algorithm": 0}
"""What `Contraction.tile` may hold, and the least value of each: the rows and columns of the register tile,
the rows of a panel of b, and the number of the algorithm (see `emit/candidates.py`)."""


@dataclass(frozen=True)
class Contraction:
    """acc(b, m, n) = sum over k of a(b, m, k) * b(b, k, n), then `stores`, in which `acc` is the Local of
    that name.

    Axes are (variable, extent) pairs. `batch`, `m`, `n` and `k` may have several; k's run in order. a and b
    are expressions over batch, m, k and batch, k, n variables: padding, strides and prologues live in them.
    The stores index by batch, m and n and read only their own element of what the kernel writes. `lets` bind
    what the stores use more than once (they may use `acc`). `tile` says how it is computed where that is not
    left to the emitter: a field for each of some TILE_FIELDS.

    `groups`: one more axis of b, of constant extent G, or none. There are G accumulators then, ``acc0``,
    ``acc1``, … for the stores to use together: the gates of a recurrent layer are such groups of columns.
    """
    batch: tuple[tuple[str, DimLike], ...]
    m: tuple[tuple[str, DimLike], ...]
    n: tuple[tuple[str, DimLike], ...]
    k: tuple[tuple[str, DimLike], ...]
    a: Expr
    b: Expr
    stores: tuple[Store, ...]
    tile: Mapping[str, int] = field(default_factory=dict)
    lets: tuple[Let, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()

    @property
    def accumulators(self) -> tuple[str, ...]:
        """The names by which the stores use the finished sums."""
        return tuple(f"acc{g}" for g in range(self.groups[0][1])) if self.groups else ("acc",)


@dataclass(frozen=True)
class ContractionKernel:
    """A contraction and its stores as a kernel; `indirect` and `symbols` as in `LoopKernel`. `rows`: a task
    is one element of the only m axis."""

    name: str
    arguments: tuple[Argument, ...]
    contraction: Contraction
    symbols: tuple[str, ...] = ()
    indirect: Mapping[str, Expr] = field(default_factory=dict)
    rows: bool = False


@dataclass(frozen=True)
class RoutineKernel:
    """A routine of the table `graphflow.compiler.kernel.routines.ROUTINES`, which says what its arguments and
    attributes mean. Argument names are the routine's own."""

    name: str
    arguments: tuple[Argument, ...]
    routine: str
    attrs: Mapping[str, Any] = field(default_factory=dict)
    symbols: tuple[str, ...] = ()

    @property
    def indirect(self) -> Mapping[str, Expr]:
        """None: what a routine loads to find its place is its own business."""
        return {}

    @property
    def rows(self) -> bool:
        """False: a routine cuts its work itself."""
        return False


Nest = Union[LoopKernel, ContractionKernel]  # noqa: UP007
"""Kernels whose loops are there to be seen."""
Kernel = Union[LoopKernel, ContractionKernel, RoutineKernel]  # noqa: UP007
