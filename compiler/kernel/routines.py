"""The routines: what a kernel can do that no loop nest can say, each by name, with its operands, what they
must satisfy, and its meaning in NumPy.

Every array is seen as [O, N, I]: the axes before the one that the routine works along, that axis, and those
behind it. (o, i) is a row; rows are independent, and back ends share them among threads. Each back end has
one emitter for each routine; a test holds them to that.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType

Arrays = Mapping[str, np.ndarray]


class Formal(NamedTuple):
    """An argument of a routine. dtype: "T" numbers, "F" floats, "J" integers, "A" anything, or a type; equal
    letters are the same type. axes: a letter each; equal letters are the same extent."""
    name: str
    mode: str
    dtype: str
    axes: str


@dataclass(frozen=True)
class Routine:
    """A routine. attrs: name -> the values that it may have. run(arrays by name, attrs): NumPy, which fills
    what is written. takes_over: arguments whose memory the result may be, as each of their elements is read
    before that element of the result is written, and by the same task."""
    name: str
    doc: str
    formals: tuple[Formal, ...]
    run: Callable[[Arrays, Mapping[str, Any]], None]
    attrs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    takes_over: tuple[str, ...] = ()


_LETTERS: dict[str, Callable[[DType], bool]] = {"A": lambda d: True, "T": lambda d: d.kind in "fiu",
                                                "F": lambda d: d.is_float, "J": lambda d: d.is_integer}


def fault(kernel: RoutineKernel) -> str:
    """What is wrong with the kernel, "" for nothing."""
    routine = ROUTINES.get(kernel.routine)
    if routine is None:
        return f"there is no routine {kernel.routine!r}"
    found = [(a.name, a.mode) for a in kernel.arguments]
    wanted = [(f.name, f.mode) for f in routine.formals]
    if found != wanted:
        return f"{routine.name} takes {', '.join(' '.join(w) for w in wanted)}"
    dtypes: dict[str, DType] = {}
    extents: dict[str, DimLike] = {}
    for a, f in zip(kernel.arguments, routine.formals):
        allowed = _LETTERS[f.dtype](a.dtype) if f.dtype in _LETTERS else a.dtype.name == f.dtype
        if not allowed or dtypes.setdefault(f.dtype, a.dtype) != a.dtype:
            return f"{a.name} of {routine.name} is {a.dtype}"
        same = all(extents.setdefault(letter, d) == d for letter, d in zip(f.axes, a.shape))
        if not same or len(a.shape) != len(f.axes):
            shape = ", ".join(map(str, a.shape))
            return f"{a.name} of {routine.name} is [{shape}], not [{', '.join(f.axes)}]"
    if set(kernel.attrs) != set(routine.attrs):
        return f"{routine.name} has the attributes {', '.join(routine.attrs) or 'none'}"
    for name, value in kernel.attrs.items():
        if not any(value is v or (isinstance(v, str) and value == v) for v in routine.attrs[name]):
            return f"{name} of {routine.name} is {value!r}"
    return ""


# --- what they mean

_UFUNCS: dict[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def _cumulative(a: Arrays, attrs: Mapping[str, Any]) -> None:
    x, y = _in_order(attrs, a["x"], a["y"])
    _UFUNCS[attrs["kind"]].accumulate(x, axis=1, dtype=x.dtype, out=y)


def _recurrence(a: Arrays, attrs: Mapping[str, Any]) -> None:
    factors, terms, y = _in_order(attrs, a["a"], a["b"], a["y"])
    carry = np.zeros((y.shape[0], y.shape[2]), y.dtype)
    for n in range(y.shape[1]):
        carry = factors[:, n] * carry + terms[:, n] if n else terms[:, 0].copy()
        y[:, n] = carry


def _in_order(attrs: Mapping[str, Any], *arrays: np.ndarray) -> list[np.ndarray]:
    return [x[:, ::-1] if attrs["reverse"] else x for x in arrays]


def stable_order(x: np.ndarray, axis: int, descending: bool) -> np.ndarray:
    """The positions that sort x; NaN counts as the greatest, equal elements keep their order."""
    if not descending:
        return np.argsort(x, axis=axis, kind="stable")
    if x.dtype.kind != "f":
        return np.argsort(~x, axis=axis, kind="stable")
    nan = np.isnan(x)
    return np.lexsort((np.where(nan, 0, -x), ~nan), axis=axis)


def _argsort(a: Arrays, attrs: Mapping[str, Any]) -> None:
    a["y"][...] = stable_order(a["x"], 1, attrs["descending"])


def _within(indices: np.ndarray, size: int) -> np.ndarray:
    return (indices >= 0) & (indices < size)


def _scatter_add(a: Arrays, attrs: Mapping[str, Any]) -> None:
    y = a["y"]
    inside = _within(a["indices"], y.shape[1])
    y[...] = 0
    where: tuple[Any, ...] = (slice(None), a["indices"][inside].astype(np.int64))
    np.add.at(y, where, a["updates"][:, inside])


def _scatter_set(a: Arrays, attrs: Mapping[str, Any]) -> None:
    y = a["y"]
    y[...] = a["x"]
    inside = _within(a["indices"], y.shape[1])
    for at, n in zip(a["indices"][inside], np.flatnonzero(inside)):
        y[:, int(at)] = a["updates"][:, n]


def _put_add(a: Arrays, attrs: Mapping[str, Any]) -> None:
    y = a["y"]
    inside = _within(a["indices"], y.shape[1])
    o, _, i = np.nonzero(inside)
    y[...] = 0
    np.add.at(y, (o, a["indices"][inside].astype(np.int64), i), a["updates"][inside])


_FLAG = (False, True)
_X, _Y = Formal("x", "r", "T", "ONI"), Formal("y", "w", "T", "ONI")
_UPDATES = Formal("updates", "r", "T", "OKI")

ROUTINES: dict[str, Routine] = {r.name: r for r in (
    Routine("cumulative",
            "y[o, n, i] = x[o, 0, i] combined with all up to x[o, n, i], in order; from the other end if "
            "`reverse`. A maximum or minimum is NaN from the first NaN on.",
            (_X, _Y), _cumulative, {"kind": tuple(_UFUNCS), "reverse": _FLAG}, ("x",)),
    Routine("recurrence",
            "y[o, n, i] = a[o, n, i] * y[o, n-1, i] + b[o, n, i], rounded twice; the first one is b's. From "
            "the other end if `reverse`.",
            tuple(Formal(name, mode, "F", "ONI") for name, mode in (("a", "r"), ("b", "r"), ("y", "w"))),
            _recurrence, {"reverse": _FLAG}, ("a", "b")),
    Routine("argsort",
            "The positions that sort each row. Equal elements keep their order; NaN counts as the greatest.",
            (_X, Formal("y", "w", "i64", "ONI")), _argsort, {"descending": _FLAG}),
    Routine("scatter_add",
            "y = 0, then y[o, indices[k], i] += updates[o, k, i] for k in order; an index outside y goes "
            "nowhere.",
            (Formal("indices", "r", "J", "K"), _UPDATES, _Y), _scatter_add),
    Routine("scatter_set",
            "y = x, then y[o, indices[k], i] = updates[o, k, i] for k in order: of equal indices the last "
            "wins; one outside y goes nowhere.",
            (Formal("x", "r", "A", "ONI"), Formal("indices", "r", "J", "K"),
             Formal("updates", "r", "A", "OKI"), Formal("y", "w", "A", "ONI")),
            _scatter_set, takes_over=("x",)),
    Routine("put_add",
            "y = 0, then y[o, indices[o, k, i], i] += updates[o, k, i] for k in order; an index outside y "
            "goes nowhere.",
            (Formal("indices", "r", "J", "OKI"), _UPDATES, _Y), _put_add),
)}
"""By name."""
