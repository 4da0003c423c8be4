"""Where code goes: nested scopes, and values put into the outermost one in which they are valid.

`Scopes` wraps a `Builder`. Opening a loop opens two scopes: one *before* the loop, to which code is still
added while the body is being written (it runs only if the loop does), and the body. Whatever is computed is
remembered in the scope that it was put in, so it is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from graphflow.compiler.emit.builder import I64, Builder, Loop, Point, Value, constant, vector_constant
from graphflow.compiler.emit.nodes import Names
from graphflow.compiler.emit.values import I1
from graphflow.compiler.plan.errors import CompilerError

_MANY = 30000
"""How many trips LLVM is to expect of a loop that is run often: more than of three loops around what fills a
panel, of each of which it expects about 30."""


@dataclass(frozen=True)
class Lane:
    """The vectorised variable: its value in lane l is `var` + l. `count` lanes, of which `mask` tells the
    valid ones (None: all). `var` is a multiple of `align`."""

    var: str
    count: int
    mask: Value | None = None
    align: int = 1


@dataclass
class Scope:
    """A piece of straight code and what it has computed. `point`: where its code goes (None: here).
    `filling`: code is being put there now, loops of its own perhaps, behind which it ends."""

    point: Point | None = None
    filling: bool = False
    memo: dict[Hashable, Any] = field(default_factory=dict)


class Scopes:
    """The stack of scopes of the function that `b` builds; names are bound to scalar I64 values unless said
    otherwise."""

    def __init__(self, b: Builder):
        self.b = b
        self.stack = [Scope()]
        self.lane: Lane | None = None
        self._bound: dict[str, tuple[int, Value]] = {}

    @contextmanager
    def vectorised(self, lane: Lane | None) -> Iterator[None]:
        """Inside, `lane` is the vectorised variable; its name is bound in some scope."""
        outer, self.lane = self.lane, lane
        yield
        self.lane = outer

    def bind(self, name: str, value: Value) -> None:
        """Binds a name in the current scope."""
        self._bound[name] = len(self.stack) - 1, value

    def bound(self, name: str) -> Value:
        """What a name is bound to."""
        if name not in self._bound:
            raise CompilerError(f"the name {name} is used outside its loop", stage="emit")
        return self._bound[name][1]

    def level(self, names: Names) -> int:
        """The number of the innermost scope that binds one of the names; names bound nowhere count as
        outermost."""
        return max((self._bound[n][0] for n in names if n in self._bound), default=0)

    def placed(self, names: Names, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` emits, in the outermost scope where all names are bound; made once for each key. What
        does not depend on the vectorised variable is made for all lanes alike."""
        level = self.level(names)
        last = len(self.stack) - 1
        at = level if level == last else level + 1
        while at < last and self.stack[at].filling:  # its code is the loops that are open: go before these
            at += 1
        for scope in self.stack[level : at + 1]:
            if key in scope.memo:
                return scope.memo[key]
        scope = self.stack[at]
        with self.vectorised(self.lane if self.lane and self.lane.var in names else None):
            if at == last or scope.point is None:
                made = make()
            else:
                whole, self.stack = self.stack, self.stack[: at + 1]
                scope.filling = True
                with self.b.at(scope.point):
                    made = make()
                scope.filling = False
                self.stack = whole
        scope.memo[key] = made
        return made

    @contextmanager
    def block(self, var: str, value: Value, lane: Lane | None = None) -> Iterator[None]:
        """A scope that binds `var`, without a loop."""
        outer = self._bound.get(var)
        point, body = self._before(), self.b.block("body")
        self.b.branch(body)
        self.b.place(body)
        self.stack = [*self.stack, Scope(point), Scope()]
        self.bind(var, value)
        with self.vectorised(lane or self.lane):
            yield
        self._close(var, outer)

    def _before(self) -> Point:
        """A point in a block of its own: code with branches may still be put there, whatever follows."""
        before = self.b.block("before")
        self.b.branch(before)
        self.b.place(before)
        return self.b.point()

    def _close(self, var: str, outer: tuple[int, Value] | None) -> None:
        self.stack = self.stack[:-2]
        if outer is None:
            self._bound.pop(var, None)
        else:
            self._bound[var] = outer

    @contextmanager
    def loop(self, var: str, start: Value, stop: Value, step: int = 1, carry: Sequence[Value] = (),
             lane: Callable[[Value], Lane] | None = None, often: bool = False) -> Iterator[Loop]:
        """A loop over `var`, as `Builder.loop`; `lane` makes the vectorised variable from the loop's index.
        `often` tells LLVM to expect many trips: registers go to what its body needs first."""
        b = self.b
        first, last = _number(start), _number(stop)
        certain = first is not None and last is not None and first < last
        if certain and first + step >= last:  # type: ignore[operator]
            with self.block(var, start, lane(start) if lane else None):
                once = Loop(start, carry)  # type: ignore[arg-type]
                yield once
            once.results = list(once.following)
            return
        before, done = b.block("before"), b.block("done")
        if not certain:
            b.branch_if(b.compare("lt", start, stop), before, done)
        else:
            b.branch(before)
        entry = b.current
        b.place(before)
        point = b.point()
        body = b.block("loop")
        b.branch(body)
        b.place(body)
        index = b.phi(I64)
        carried = [b.phi(v.type) for v in carry]
        loop = Loop(index, list(carried))
        outer = self._bound.get(var)
        self.stack = [*self.stack, Scope(point), Scope()]
        self.bind(var, index)
        with self.vectorised(lane(index) if lane else self.lane):
            yield loop
        self._close(var, outer)
        following = b.add(index, step)
        latch = b.current
        b.branch_if(b.compare("lt", following, stop), body, done, _MANY if often else 0)
        for phi, value, new in zip([index, *carried], [start, *carry], [following, *loop.following]):
            phi.add(value, point.current)
            phi.add(new, latch)
        b.place(done)
        loop.results = list(loop.following)
        if not certain:
            loop.results = [b.phi(v.type, (v, entry), (new, latch)) for v, new in zip(carry, loop.following)]

    def lanes(self, var: str, start: Value, stop: Value, count: int,
              body: Callable[[list[Value]], list[Value]], carry: Sequence[Value] = (),
              masked_only: bool = False, align: int = 0) -> list[Value]:
        """Runs `body` for vectors of `count` values of `var`: full ones, then a masked one. With
        `masked_only`, one body serves both. `start` is a multiple of `align` (0: of `count`)."""
        b = self.b
        first, last = _number(start), _number(stop)
        align = align or count
        if first is not None and last is not None:
            full: Value = constant(I64, last - (last - first) % count)
            tail = (last - first) % count > 0
        else:
            span = b.sub(stop, start)
            full, tail = b.sub(stop, b.and_(span, count - 1)), True
            masked_only = masked_only and count > 1
        results = list(carry)
        if count == 1:
            full, tail = stop, False
        if tail and masked_only:
            full = start
        elif full.name != start.name:
            with self.loop(var, start, full, count, results, lambda i: Lane(var, count, None, align)) as loop:
                loop.next(*body(loop.carry))
            results = loop.results
        if tail:

            def masked(index: Value) -> Lane:
                return Lane(var, count, self._first(index, stop, count), align)

            with self.loop(var, full, stop, count, results, masked) as loop:
                loop.next(*body(loop.carry))
            results = loop.results
        return results

    def _first(self, index: Value, stop: Value, count: int) -> Value:
        """The mask of the lanes below `stop`."""
        at, end = _number(index), _number(stop)
        if at is not None and end is not None:
            return vector_constant(I1.vector(count), [at + lane < end for lane in range(count)])
        return self.b.first_lanes(self.b.sub(stop, index), count)


def _number(value: Value) -> int | None:
    """The number of a constant, else None."""
    return None if value.name.startswith("%") else int(value.name)
