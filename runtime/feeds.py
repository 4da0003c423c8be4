"""What a call is given, checked against the plan: count, types, shapes, and the values of the symbols."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphflow.compiler.plan.bind import solve_symbols
from graphflow.compiler.plan.dims import Dim, DimLike, Quotient, evaluate, symbols_of
from graphflow.compiler.plan.errors import CompilerError, FeedError, Location, ShapeError
from graphflow.compiler.plan.schema import Buffer, Plan

Where = Callable[[int], Location | None]
"""From the number of a traced node to the user's line."""


def nowhere(origin: int) -> Location | None:
    """The `Where` of a plan whose source is not known."""
    return None


class FeedChecker:
    """Checks feeds for one plan. `where` gives the user's lines for the messages; `arrays`: the types that a
    feed may have."""

    def __init__(self, plan: Plan, where: Where = nowhere, arrays: tuple[type, ...] = (np.ndarray,)) -> None:
        self.plan = plan
        self._arrays: Any = arrays
        self.where: Where = lambda origin: where(origin) if origin >= 0 else None
        table = {b.id: b for b in plan.buffers}
        self.feeds = [table[id] for id in plan.feeds]

    def check_types(self, feeds: Sequence[Any]) -> None:
        """FeedError unless there is one NumPy array of the exact type and rank for each feed."""
        if len(feeds) != len(self.feeds):
            names = ", ".join(b.name for b in self.feeds) or "none"
            raise FeedError(f"{self.plan.name} takes {len(self.feeds)} feeds ({names}), got {len(feeds)}")
        for b, feed in zip(self.feeds, feeds):
            if not isinstance(feed, self._arrays):
                raise self._error(b, f"must be a NumPy array, got {type(feed).__name__}")
            if feed.dtype != b.dtype.numpy:
                raise self._error(b, f"must be {b.dtype.full_name}, got {feed.dtype}",
                                  f"convert it with .astype('{b.dtype.full_name}')")
            if feed.ndim != len(b.shape):
                raise self._error(b, f"has shape {_list(b.shape)}, got {_list(feed.shape)}: "
                                     f"{feed.ndim} axes instead of {len(b.shape)}")

    def symbols(self, feeds: Sequence[np.ndarray]) -> dict[str, int]:
        """The symbols' values, in the plan's order. FeedError where a shape does not fit or two feeds
        disagree; ShapeError where a declared equality does not hold."""
        self.check_types(feeds)
        found = solve_symbols([(b.shape, feed.shape) for b, feed in zip(self.feeds, feeds)])
        missing = [name for name in self.plan.symbols if name not in found]
        if missing:
            raise CompilerError(f"no feed's shape decides {', '.join(missing)}", stage="plan")
        for b, feed in zip(self.feeds, feeds):
            for axis, (declared, size) in enumerate(zip(b.shape, feed.shape)):
                if any(found[name] < 0 for name in symbols_of(declared)) or evaluate(declared, found) != size:
                    raise self._axis_error(b, feed, axis, found)
        values = {name: found[name] for name in self.plan.symbols}
        for guard in self.plan.guards:
            left, right = evaluate(guard.left, values), evaluate(guard.right, values)
            if left != right:
                bound = _lower_bound(guard.left)
                text = f"{guard.left} == {guard.right} does not hold for these feeds: {left} != {right}"
                if bound is not None:
                    text = f"{bound} >= 0 does not hold for these feeds: it is {evaluate(bound, values)}"
                raise ShapeError(f"{text} at {_values(values)}", where=self.where(guard.origin))
        return values

    def check_failed(self, code: int) -> FeedError:
        """The error for a check of the program that failed."""
        message = self.plan.messages[code]
        text = f"feed {message.feed!r}: {message.text}" if message.feed else message.text
        return FeedError(text, where=self.where(message.origin))

    def _axis_error(self, b: Buffer, feed: np.ndarray, axis: int, found: dict[str, int]) -> FeedError:
        declared, size = b.shape[axis], feed.shape[axis]
        message = f"axis {axis} must be {declared}, got {size}"
        if isinstance(declared, Dim):
            values = {name: found[name] for name in sorted(symbols_of(declared))}
            if str(declared) in values:
                first, expected = self._first_with(str(declared)), found[str(declared)]
                message = f"axis {axis} must be {declared} = {expected} as in feed {first!r}, got {size}"
            elif min(values.values()) < 0:
                message += f", which no {', '.join(values)} gives"
            else:
                message += f" where {_values(values)}"
        return self._error(b, f"{message}; its shape is {_list(b.shape)}, got {_list(feed.shape)}")

    def _first_with(self, name: str) -> str:
        return next(b.name for b in self.feeds if any(name == str(d) for d in b.shape))

    def _error(self, b: Buffer, message: str, hint: str | None = None) -> FeedError:
        where = self.where(b.origins[0]) if b.origins else None
        return FeedError(f"feed {b.name!r}: {message}", hint=hint, where=where)


def _lower_bound(left: DimLike) -> DimLike | None:
    """e, where `left` is e // huge in canonical form: then left == 0 says that e >= 0."""
    terms = {atoms: factor for atoms, factor in left.terms} if isinstance(left, Dim) else {}
    whole = terms.pop((), 0)
    if len(terms) == 1:
        (atoms, factor), = terms.items()
        if factor == 1 and len(atoms) == 1 and isinstance(atoms[0], Quotient) and atoms[0].by >= 2 ** 62:
            return atoms[0].inner + whole * atoms[0].by
    return None


def _list(shape: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _values(symbols: dict[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in symbols.items())
