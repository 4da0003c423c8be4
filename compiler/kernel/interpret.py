"""A bounds-checking interpreter of kernels, with NumPy: with `run_program` the oracle for every stage after
`fuse`.

It evaluates each statement for whole grids of loop iterations at once. Every variable of the loops in scope
is an array axis of its own, the innermost variable's axis leftmost, so that a value made outside a loop
broadcasts against those made inside. Big grids and reductions run in pieces, to bound memory.

Whatever a kernel must not do is a CompilerError that names the kernel, the argument and the index: leaving an
argument (guarded-out elements excepted), or writing one element in several iterations.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import (
    Apply,
    Const,
    Contraction,
    ContractionKernel,
    Expr,
    Guard,
    Guarded,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Loop,
    Reduce,
    RoutineKernel,
    Statement,
    Store,
)
from graphflow.compiler.kernel.routines import ROUTINES
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.kernel.text import print_kernel
from graphflow.compiler.plan.dims import DimLike, evaluate, symbols_of
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import CompilerError

PIECE = 1 << 21
"""Elements evaluated at once, about."""

Loops = Sequence[tuple[str, DimLike]]


def run_kernel(kernel: Kernel, arrays: Mapping[str, np.ndarray], symbols: Mapping[str, int]) -> None:
    """Runs the kernel on an array for each of its arguments, of the argument's element type and shape; those
    that it writes are changed in place."""
    with np.errstate(all="ignore"):
        _Run(kernel, arrays, symbols).run()


class _Run:
    def __init__(self, kernel: Kernel, arrays: Mapping[str, np.ndarray], symbols: Mapping[str, int]) -> None:
        self.kernel, self.arrays = kernel, arrays
        self.symbols = symbols
        self.variables: dict[str, Any] = {}            # loop variable -> its values, along its own axis
        self.extents: list[int] = []                   # of the variables that have an axis, outermost first
        self.locals: dict[str, Any] = {}
        self.mask: Any = None                          # where the guards in scope hold; None for everywhere
        for a in kernel.arguments:
            shape = tuple(evaluate(d, symbols) for d in a.shape)
            given = arrays.get(a.name)
            if given is None or (given.shape, given.dtype) != (shape, a.dtype.numpy):
                found = "nothing" if given is None else f"{given.dtype}{list(given.shape)}"
                raise self.fault(f"{a.name} is {a.dtype}{list(shape)}, but {found} is given")

    def fault(self, message: str) -> CompilerError:
        return CompilerError(f"kernel {self.kernel.name}: {message}", stage="interpret",
                             dump=print_kernel(self.kernel))

    def run(self) -> None:
        if isinstance(self.kernel, ContractionKernel):
            self.contraction(self.kernel.contraction)
        elif isinstance(self.kernel, RoutineKernel):
            ROUTINES[self.kernel.routine].run(self.arrays, self.kernel.attrs)
        else:
            self.body(self.kernel.body)

    # --- indices

    def __getitem__(self, name: str) -> Any:
        """The value of a name in an index: loop variable, symbol or indirect integer."""
        if name in self.variables:
            return self.variables[name]
        if name in self.kernel.indirect:
            return np.asarray(self.value(self.kernel.indirect[name])).astype(np.int64)
        if name in self.symbols:
            return self.symbols[name]
        raise self.fault(f"{name} has no value")

    def number(self, d: DimLike) -> Any:
        return evaluate(d, self)                       # type: ignore[arg-type]

    def place(self, arg: str, index: tuple[DimLike, ...]) -> tuple[Any, ...]:
        """The index as arrays, checked where the guards hold and 0 elsewhere."""
        out = []
        for axis, (at, size) in enumerate(zip(map(self.number, index), self.arrays[arg].shape)):
            at = np.asarray(at)
            wrong = (at < 0) | (at >= size)
            if np.any(wrong):
                if self.mask is None or np.any(wrong & self.mask):
                    bad = at if self.mask is None else np.broadcast_arrays(at, self.mask & wrong)[0]
                    where = wrong if self.mask is None else np.broadcast_to(wrong & self.mask, bad.shape)
                    raise self.fault(f"{arg}[{', '.join(map(str, index))}] reaches {int(bad[where].flat[0])} "
                                     f"in axis {axis}, "
                                     f"which has {size}")
                at = np.where(wrong, 0, at)
            out.append(at)
        return tuple(out)

    # --- loops

    def pieces(self, loops: Loops) -> Iterator[tuple[int, ...]]:
        """Gives each variable its axis, the last one's leftmost but one after the others; the first one in
        pieces. Yields
        the axes' lengths, first variable first."""
        sizes = [int(self.number(extent)) for _, extent in loops]
        if not loops:
            yield ()
        if not loops or 0 in sizes:
            return
        outside = int(np.prod(self.extents, dtype=np.int64))
        step = max(1, PIECE // max(1, outside * int(np.prod(sizes[1:], dtype=np.int64))))
        depth = len(self.extents)
        for number, ((name, _), size) in enumerate(reversed(list(zip(loops, sizes)))):
            self.variables[name] = np.arange(size).reshape(-1, *(1,) * (depth + number))
        self.extents += reversed(sizes)
        whole = self.variables[loops[0][0]]
        for start in range(0, sizes[0], step):
            self.variables[loops[0][0]] = whole[start:start + step]
            self.extents[-1] = min(step, sizes[0] - start)
            yield (self.extents[-1], *sizes[1:])
        del self.extents[depth:]
        for name, _ in loops:
            del self.variables[name]

    def body(self, statements: Sequence[Statement]) -> None:
        for s in statements:
            if isinstance(s, Let):
                self.locals[s.name] = self.value(s.value)
            elif isinstance(s, Store):
                self.store(s)
            elif s.kind == "serial" and not _independent(s):
                for i in range(int(self.number(s.extent))):
                    self.variables[s.var] = i
                    self.body(s.body)
                self.variables.pop(s.var, None)
            else:
                for _ in self.pieces(((s.var, s.extent),)):
                    self.body(s.body)

    def store(self, s: Store) -> None:
        shape = tuple(reversed(self.extents))
        value = np.broadcast_to(self.value(s.value), shape)
        if 0 in shape:
            return
        target = self.arrays[s.arg]
        where = self.place(s.arg, s.index)
        flat = np.asarray(np.ravel_multi_index(np.broadcast_arrays(*where), target.shape) if where else 0)
        if _distinct(flat, target.size) != value.size:
            index = ", ".join(map(str, s.index))
            raise self.fault(f"several iterations write one element at {s.arg}[{index}]")
        target[where] = value

    # --- expressions

    def value(self, e: Expr) -> Any:
        """The expression for every iteration in scope, as an array that broadcasts to their grid."""
        if isinstance(e, Const):
            return np.asarray(e.value, e.dtype.numpy)
        if isinstance(e, Load):
            return self.load(e)
        if isinstance(e, Index):
            return np.asarray(self.number(e.at)).astype(e.dtype.numpy)
        if isinstance(e, Local):
            return self.locals[e.name]
        if isinstance(e, Apply):
            args = [self.value(x) for x in e.args]
            return np.asarray(SCALARS[e.function].numpy(*args)).astype(e.dtype.numpy, copy=False)
        if isinstance(e, Guarded):
            return self.guarded(e)
        return self.reduce(e)

    def load(self, e: Load) -> Any:
        source = self.arrays[e.arg]
        where = self.place(e.arg, e.index)
        # nothing is read: no iteration, or every one is guarded out
        if source.size == 0:
            shape = np.broadcast_shapes(*(at.shape for at in where), () if self.mask is None
                                        else self.mask.shape)
            return np.zeros(shape, source.dtype)
        return source[where]

    def holds(self, guards: Sequence[Guard]) -> Any:
        out: Any = np.asarray(True)
        for g in guards:
            at = self.number(g.at)
            out = out & (at >= 0) & (at < self.number(g.bound))
        return out

    def guarded(self, e: Guarded) -> Any:
        fill, outer = self.value(e.fill), self.mask
        inside = self.holds(e.guards)
        self.mask = inside if outer is None else outer & inside
        value = self.value(e.value)
        self.mask = outer
        return np.where(inside, value, fill)

    def reduce(self, e: Reduce) -> Any:
        total: list[Any] | None = None
        for sizes in self.pieces(e.loops):
            for let in e.lets:
                self.locals[let.name] = self.value(let.value)
            values = [self.value(x) for x in e.operands]
            shape = np.broadcast_shapes(*(v.shape for v in values),
                                        (*sizes, *(1,) * (len(self.extents) - len(sizes))))
            part = _reduced(e.kind, [np.broadcast_to(v, shape) for v in values], len(sizes))
            total = part if total is None else _combined(e.kind, total, part)
        if total is None:
            total = _identity(e.kind, [x.dtype for x in e.operands])
        return total[e.result]

    # --- contractions

    def contraction(self, c: Contraction) -> None:
        """acc by np.matmul over matrices of a and b, for pieces of the first batch axis and of the first k
        axis."""
        head, rest = (c.batch[:1], c.batch[1:]) if c.batch else ((), ())
        k = c.k or (("", 1),)
        size = {name: int(self.number(extent)) for name, extent in (*c.batch, *c.m, *c.n, *k)}
        shapes = [tuple(size[name] for name, _ in axes) for axes in (rest, c.m, c.n, k)]
        r, m, n, depth = (int(np.prod(s, dtype=np.int64)) for s in shapes)
        per_batch = r * (m * n + (m + n) * int(np.prod(shapes[3][1:], dtype=np.int64)))
        count = size[head[0][0]] if head else 1
        if r * m * n == 0:
            return
        step = max(1, PIECE // max(1, per_batch))
        for start in range(0, count, step):
            first = np.arange(start, min(start + step, count)) if head else np.zeros(1, np.int64)
            acc = [np.zeros((len(first) * r, m, n), c.a.dtype.numpy) for _ in c.accumulators]
            k_step = max(1, PIECE // max(1,
                                         len(first) * r * (m + n) * int(np.prod(shapes[3][1:],
                                                                                dtype=np.int64))))
            for k_start in range(0, shapes[3][0] if depth else 0, k_step):
                piece = np.arange(k_start, min(k_start + k_step, shapes[3][0]))
                a = self.matrix(c.a, head, first, (*rest, *c.m), k, piece, size, (len(first) * r, m))
                for number, part in enumerate(acc):
                    self.symbols = {**self.symbols, **{group: number for group, _ in c.groups}}
                    b = self.matrix(c.b, head, first, (*rest, *c.n), k, piece, size, (len(first) * r, n))
                    part += np.matmul(a, b.swapaxes(1, 2))
            self.finish(c, head, first, rest, size, acc)

    def axes(self, names: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
        """Gives each variable an axis of its own, the first one's leftmost."""
        for number, name in enumerate(names):
            self.variables[name] = values[name].reshape(-1, *(1,) * (len(names) - 1 - number))
        self.extents = [len(values[name]) for name in reversed(names)]

    def matrix(self, e: Expr, head: Loops, first: np.ndarray, outer: Loops, k: Loops, piece: np.ndarray,
               size: Mapping[str, int], shape: tuple[int, int]) -> np.ndarray:
        """An operand as [batch, rows, k]."""
        names = [name for name, _ in (*head, *outer, *k)]
        values = {name: np.arange(size[name]) for name in names}
        values.update({name: first for name, _ in head})
        values[k[0][0]] = piece
        self.axes(names, values)
        full = np.broadcast_to(self.value(e), tuple(reversed(self.extents)))
        self.variables.clear()
        return full.reshape(*shape, -1)

    def finish(self, c: Contraction, head: Loops, first: np.ndarray, rest: Loops, size: Mapping[str, int],
               acc: Sequence[np.ndarray]) -> None:
        names = [name for name, _ in (*head, *rest, *c.m, *c.n)]
        values = {name: np.arange(size[name]) for name in names}
        values.update({name: first for name, _ in head})
        self.axes(names, values)
        for local, part in zip(c.accumulators, acc):
            self.locals[local] = part.reshape(tuple(reversed(self.extents)))
        self.body((*c.lets, *c.stores))
        self.variables.clear()
        self.extents = []


def _distinct(numbers: np.ndarray, bound: int) -> int:
    """How many different numbers there are, each in 0..bound-1."""
    if numbers.size * 8 < bound:
        return len(np.unique(numbers))
    seen = np.zeros(bound, bool)
    seen[numbers] = True
    return int(np.count_nonzero(seen))


def _independent(loop: Loop) -> bool:
    """Whether every store in the loop writes elsewhere in each iteration, as far as its index tells."""
    stores = [s for s in walk.statements(loop.body) if isinstance(s, Store)]
    return all(loop.var in symbols_of(*s.index) for s in stores)


_UFUNCS: dict[str, Any] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum,
                           "any": np.logical_or, "all": np.logical_and}


def _identity(kind: str, dtypes: Sequence[DType]) -> list[Any]:
    """What a reduction of nothing gives; for argmax and argmin the worst value and the greatest number."""
    simple = {"sum": 0, "prod": 1, "any": False, "all": True}
    if kind in simple:
        return [np.asarray(simple[kind], dtypes[0].numpy)]
    worst = _limit(dtypes[0], kind in ("max", "argmax"))
    return [worst] if kind in _UFUNCS else [worst, _limit(dtypes[1], False)]


def _limit(dtype: DType, lowest: bool) -> Any:
    if dtype.kind == "b":
        return np.asarray(not lowest)
    if dtype.is_float:
        return np.asarray(-np.inf if lowest else np.inf, dtype.numpy)
    info = np.iinfo(dtype.numpy)
    return np.asarray(info.min if lowest else info.max, dtype.numpy)


def _reduced(kind: str, values: list[np.ndarray], axes: int) -> list[Any]:
    """The reduction over the first `axes` axes, in row-major order."""
    if kind in _UFUNCS:
        return [_UFUNCS[kind].reduce(values[0], axis=tuple(range(axes)), dtype=values[0].dtype)]
    flat = [v.reshape(-1, *v.shape[axes:]) for v in values]
    best = (np.argmax if kind == "argmax" else np.argmin)(flat[0], axis=0)[None]
    return [np.take_along_axis(v, best, axis=0)[0] for v in flat]


def _combined(kind: str, x: list[Any], y: list[Any]) -> list[Any]:
    """Two parts as one; x comes first."""
    if kind in _UFUNCS:
        return [_UFUNCS[kind](x[0], y[0])]
    better = (y[0] > x[0] if kind == "argmax" else y[0] < x[0]) | ((y[0] != y[0]) & (x[0] == x[0]))
    return [np.where(better, new, old) for old, new in zip(x, y)]
