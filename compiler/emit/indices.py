"""Index arithmetic: dimensions as scalar code, and how they vary over the lanes of a vector.

Addresses are computed in 64 bits. What differs between lanes is kept apart from what does not (`Spread`):
with v = base + lane, ``v // c`` is ``base // c + (base % c + lane) // c``, whose second part is small; so
lane arithmetic fits 32 bits whatever the extents are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from graphflow.compiler.emit.builder import I32, I64, Builder, Value, constant, vector_constant
from graphflow.compiler.emit.nodes import Names, Nodes, names_in
from graphflow.compiler.emit.scopes import Lane, Scopes
from graphflow.compiler.kernel.form import Guard
from graphflow.compiler.plan.dims import Dim, DimLike, Quotient, Symbol, bounds_of

Guards = tuple[Guard, ...]
_SMALL = 1 << 30


@dataclass(frozen=True)
class Spread:
    """base + fixed[lane] + scale·lane + extra. `base` and `scale` are the same in all lanes (in `base` the
    vectorised variable stands for its value in lane 0). `fixed` has a number for each lane known now, () for
    none; `extra` is a vector of I32 within [low, high], or of I64 (bounds None), or absent."""

    base: DimLike
    fixed: tuple[int, ...] = ()
    scale: DimLike = 0
    extra: Value | None = None
    low: int | None = 0
    high: int | None = 0

    @property
    def known(self) -> bool:
        """Whether the lanes differ by `fixed` alone."""
        return self.extra is None and isinstance(self.scale, int) and self.scale == 0

    @property
    def uniform(self) -> bool:
        """Whether all lanes have the same value."""
        return self.known and not any(self.fixed)

    @property
    def bounds(self) -> tuple[int, int] | None:
        """(least, greatest) of fixed + extra; None where there is no such bound."""
        if self.low is None or self.high is None or not isinstance(self.scale, int):
            return None
        return min(self.fixed, default=0) + self.low, max(self.fixed, default=0) + self.high


class Indices:
    """Emits dimensions. `bounds`: what is known of each name; `indirect_value` emits an indirect integer as
    I64."""

    def __init__(self, b: Builder, scopes: Scopes, nodes: Nodes):
        self.b, self.scopes, self.nodes = b, scopes, nodes
        self.bounds: dict[str, tuple[int, int | None]] = {}

    def indirect_value(self, name: str, guards: Guards) -> Value:
        """The indirect integer of that name, as I64 (a vector where it varies over lanes)."""
        raise NotImplementedError

    # -- scalars -------------------------------------------------------------------------------------------

    def context(self, names: Names, guards: Guards) -> Guards:
        """The guards that matter to code with these names: those around loads of indirect integers."""
        return guards if guards and any(map(self.nodes.is_indirect, names)) else ()

    def scalar(self, d: DimLike, guards: Guards = ()) -> Value:
        """A dimension as an I64, the same in all lanes."""
        if isinstance(d, int):
            return constant(I64, d)
        guards = self.context(names_in(d), guards)
        names = self.nodes.closure(d) | self.guard_names(guards)
        return self.scopes.placed(names, ("dim", d, guards), lambda: self._scalar(d, guards))

    def by_level(self, d: DimLike) -> tuple[list[DimLike], int]:
        """The terms of a dimension as sums, one for each scope that they need, outermost first; and the
        constant."""
        groups: dict[int, DimLike] = {}
        rest = 0
        if isinstance(d, int):
            return [], d
        for atoms, c in d.terms:
            if not atoms:
                rest = c
                continue
            term = Dim(((atoms, c),))
            level = self.scopes.level(self.nodes.closure(term))
            groups[level] = groups.get(level, 0) + term
        return [groups[level] for level in sorted(groups)], rest

    def _scalar(self, d: Dim, guards: Guards) -> Value:
        groups, rest = self.by_level(d)
        if len(groups) > 1 or (rest and len(d.terms) > 1):
            total = self.scalar(groups[0], guards)
            for group in groups[1:]:
                total = self.b.add(total, self.scalar(group, guards))
            return self.b.add(total, rest) if rest else total
        out = self._monomial(*d.terms[0], guards)
        for atoms, c in d.terms[1:]:
            out = self.b.add(out, self._monomial(atoms, c, guards))
        return out

    def _monomial(self, atoms: tuple, c: int, guards: Guards) -> Value:
        term = constant(I64, c)
        for atom in atoms:
            factor = self._atom(atom, guards)
            term = factor if term.name == "1" else self.b.mul(factor, term)
        return term

    def _atom(self, atom: Symbol | Quotient, guards: Guards) -> Value:
        if isinstance(atom, Symbol):
            if self.nodes.is_indirect(atom.name):
                return self.indirect_value(atom.name, guards)
            return self.scopes.bound(atom.name)
        inner = self.scalar(atom.inner, guards)
        low, high = bounds_of(atom.inner, self.bounds)
        return self._divide(inner, atom.by, atom.rest, low is not None and low >= 0, high)

    def _divide(self, x: Value, by: int, rest: bool, positive: bool, high: int | None = None) -> Value:
        """x // by or x % by, rounding down."""
        b = self.b
        if by & (by - 1) == 0:
            return b.and_(x, by - 1) if rest else b.ashr(x, by.bit_length() - 1)
        if positive:
            if x.type == I64 and high is not None and high < 1 << 31:
                small = b.cast(x, I32)
                return b.cast(b.urem(small, by) if rest else b.udiv(small, by), I64, signed=False)
            return b.urem(x, by) if rest else b.udiv(x, by)
        left = b.srem(x, by)
        below = b.compare("lt", left, 0)
        if rest:
            return b.select(below, b.add(left, by), left)
        return b.sub(b.sdiv(x, by), b.cast(below, x.type.scalar))

    # -- lanes ---------------------------------------------------------------------------------------------

    def varies(self, d: DimLike) -> bool:
        """Whether the dimension may differ between lanes here."""
        lane = self.scopes.lane
        return lane is not None and lane.count > 1 and lane.var in self.nodes.closure(d)

    def spread(self, d: DimLike, guards: Guards = ()) -> Spread:
        """How the dimension varies over the lanes."""
        if not self.varies(d):
            return Spread(d)
        assert isinstance(d, Dim) and self.scopes.lane is not None
        lane = self.scopes.lane
        guards = self.context(names_in(d), guards)
        names = self.nodes.closure(d) | self.guard_names(guards)
        return self.scopes.placed(names, ("spread", d, guards),
                                  lambda: self._sum([self._term(atoms, c, lane, guards)
                                                     for atoms, c in d.terms]))

    def _sum(self, parts: Iterable[Spread]) -> Spread:
        total = Spread(0)
        for p in parts:
            x, y = (q.fixed or (0,) * max(len(total.fixed), len(p.fixed)) for q in (total, p))
            fixed = tuple(a + b for a, b in zip(x, y))
            extra, low, high = total.extra, total.low, total.high
            if extra is None:
                extra, low, high = p.extra, p.low, p.high
            elif p.extra is not None:
                extra, low, high = self._both(total, p)
            total = Spread(total.base + p.base, fixed, total.scale + p.scale, extra, low, high)
        return total

    def _both(self, s: Spread, t: Spread) -> tuple[Value, int | None, int | None]:
        """The sum of two extras and its bounds."""
        assert s.extra is not None and t.extra is not None
        if s.low is not None and s.high is not None and t.low is not None and t.high is not None:
            low, high = s.low + t.low, s.high + t.high
            if -_SMALL < low and high < _SMALL:
                return self.b.add(s.extra, t.extra), low, high
        return self.b.add(self.b.cast(s.extra, I64), self.b.cast(t.extra, I64)), None, None

    def _term(self, atoms: tuple, c: int, lane: Lane, guards: Guards) -> Spread:
        outside: DimLike = c
        moving: list[Spread] = []
        for atom in atoms:
            alone = Dim((((atom,), 1),))
            if self.varies(alone):
                moving.append(self._varying(atom, lane, guards))
            else:
                outside = alone * outside
        if not moving:
            return Spread(outside)
        whole = moving[0]
        for other in moving[1:]:
            product = self.b.mul(self.vector(whole, guards), self.vector(other, guards))
            whole = Spread(0, extra=product, low=None, high=None)
        return self._scaled(whole, outside, lane, guards)

    def _scaled(self, s: Spread, by: DimLike, lane: Lane, guards: Guards) -> Spread:
        base = s.base * by
        if isinstance(by, int):
            fixed, scale = tuple(x * by for x in s.fixed), s.scale * by
            if s.extra is None:
                return Spread(base, fixed, scale)
            if s.low is not None and s.high is not None:
                ends = sorted((s.low * by, s.high * by))
                if max(map(abs, ends)) < _SMALL:
                    extra = self.b.mul(s.extra, by) if by != 1 else s.extra
                    return Spread(base, fixed, scale, extra, *ends)
        elif s.known and s.fixed == tuple(range(lane.count)):
            return Spread(base, (), by)
        moving = self.vector(Spread(0, s.fixed, s.scale, s.extra, s.low, s.high), guards)
        return Spread(base, extra=self.b.mul(moving, self.scalar(by, guards)), low=None, high=None)

    def _varying(self, atom: Symbol | Quotient, lane: Lane, guards: Guards) -> Spread:
        if isinstance(atom, Symbol):
            if atom.name == lane.var:
                return Spread(Dim((((atom,), 1),)), tuple(range(lane.count)))
            value = self.indirect_value(atom.name, guards)
            if value.type.lanes == 1:  # its names vary, the value does not
                value = self.b.splat(value, lane.count)
            return Spread(0, extra=value, low=None, high=None)
        s, by = self.spread(atom.inner, guards), atom.by
        if s.bounds is None:
            found = self._divide(self.vector(s, guards), by, atom.rest, False)
            return Spread(0, extra=found, low=None, high=None)
        low, high = s.bounds
        whole, left = s.base // by, s.base % by
        if low >= 0 and high < math.gcd(alignment(s.base, lane), by):
            # base % by is at most by less that alignment: no lane passes a multiple.
            return Spread(left, s.fixed, 0, s.extra, s.low, s.high) if atom.rest else Spread(whole)
        start = constant_part(s.base)
        if s.known and alignment(s.base - start, lane) % by == 0:
            lanes = [start % by + x for x in s.fixed]
            return (Spread(0, tuple(x % by for x in lanes)) if atom.rest
                    else Spread(whole, tuple(x // by for x in lanes)))
        shift = -low // by * by + by if low < 0 else 0  # makes the dividend positive
        moving = self.b.add(self.small(s, lane.count), self.b.cast(self.scalar(left + shift, guards), I32))
        found = self._divide(moving, by, atom.rest, True)
        if atom.rest:
            return Spread(0, extra=found, low=0, high=by - 1)
        return Spread(whole - shift // by, extra=found, low=0, high=(by - 1 + high + shift) // by)

    def small(self, s: Spread, count: int) -> Value:
        """fixed + extra of a spread that has bounds, as I32."""
        fixed = vector_constant(I32.vector(count), s.fixed or (0,) * count)
        if s.extra is None:
            return fixed
        return self.b.add(s.extra, fixed) if any(s.fixed) else s.extra

    def vector(self, s: Spread, guards: Guards = ()) -> Value:
        """The whole of a spread as a vector of I64."""
        assert self.scopes.lane is not None
        count = self.scopes.lane.count
        out = self.b.splat(self.scalar(s.base, guards), count)
        if any(s.fixed):
            fixed = vector_constant(I64.vector(count), s.fixed)
            out = fixed if out.name == constant(out.type, 0).name else self.b.add(out, fixed)
        if not isinstance(s.scale, int):
            lanes = self.b.mul(self.b.iota(I64.vector(count)), self.scalar(s.scale, guards))
            out = self.b.add(out, lanes)
        return out if s.extra is None else self.b.add(out, self.b.cast(s.extra, I64))

    # -- guards --------------------------------------------------------------------------------------------

    def guard_names(self, guards: Guards) -> Names:
        """What the guards depend on."""
        return self.nodes.closure(*(d for g in guards for d in (g.at, g.bound)))

    def proven(self, g: Guard) -> bool:
        """Whether the guard holds for all values of its names."""
        low, _ = bounds_of(g.at, self.bounds)
        room, _ = bounds_of(g.bound - 1 - g.at, self.bounds)
        return low is not None and low >= 0 and room is not None and room >= 0

    def refuted(self, g: Guard) -> bool:
        """Whether the guard holds for no value of its names."""
        _, high = bounds_of(g.at, self.bounds)
        _, room = bounds_of(g.bound - 1 - g.at, self.bounds)
        return (high is not None and high < 0) or (room is not None and room < 0)

    def condition(self, guards: Guards, within: Guards = ()) -> tuple[Value | None, Value | None]:
        """Where all guards hold: an I1 for all lanes, and a mask; None stands for true. Only where those of
        `within` hold does the result mean anything."""
        if not guards:
            return None, None
        within = self.context(self.guard_names(guards), within)
        names = self.guard_names((*within, *guards))
        return self.scopes.placed(names, ("condition", guards, within),
                                  lambda: self._condition(guards, within))

    def _condition(self, guards: Guards, within: Guards) -> tuple[Value | None, Value | None]:
        scalar, mask = self.condition(guards[:-1], within)
        g, before = guards[-1], (*within, *guards[:-1])
        if self.proven(g):
            return scalar, mask
        if not self.varies(g.at) and not self.varies(g.bound):
            around = self.context(names_in(g.at) | names_in(g.bound), before)
            holds = self.scopes.placed(self.guard_names((g, *around)), ("guard", g, around),
                                       lambda: self.b.compare("ult", self.scalar(g.at, around),
                                                              self.scalar(g.bound, around)))
            return (holds if scalar is None else self.b.and_(scalar, holds)), mask
        holds = self._lane_guard(g, before)
        return scalar, (holds if mask is None else self.b.and_(mask, holds))

    def _lane_guard(self, g: Guard, before: Guards) -> Value:
        """The mask of the lanes with 0 <= at < bound, a bound >= 0."""
        lane = self.scopes.lane
        assert lane is not None
        b, s = self.b, self.spread(g.at, before)
        if self.varies(g.bound):
            limit = self.vector(self.spread(g.bound, before), before)
            return b.compare("ult", self.vector(s, before), limit)
        if s.known and s.fixed == tuple(range(lane.count)):  # lanes from -base up to bound - base
            first = self._within(self.scalar(0 - s.base, before), lane.count)
            last = self._within(self.scalar(g.bound - s.base, before), lane.count)
            iota = b.iota(I32.vector(lane.count))
            return b.compare("ult", b.sub(iota, first), b.sub(last, first))
        limits = [bounds_of(d, self.bounds) for d in (s.base, g.bound)]
        if s.bounds is not None and all(map(_is_small, limits)):
            at = b.add(self.small(s, lane.count), b.cast(self.scalar(s.base, before), I32))
            return b.compare("ult", at, b.cast(self.scalar(g.bound, before), I32))
        return b.compare("ult", self.vector(s, before), self.scalar(g.bound, before))

    def _within(self, x: Value, count: int) -> Value:
        """An I64 brought into [0, count], as I32."""
        return self.b.cast(self.b.intrinsic("smin", self.b.intrinsic("smax", x, 0), count), I32)


def _is_small(limits: tuple[int | None, int | None]) -> bool:
    low, high = limits
    return low is not None and high is not None and -_SMALL < low and high < _SMALL


def constant_part(d: DimLike) -> int:
    """The constant that is added in a dimension."""
    return d if isinstance(d, int) else sum(c for atoms, c in d.terms if not atoms)


def alignment(d: DimLike, lane: Lane) -> int:
    """A number that divides the dimension whatever the values of its names."""
    if isinstance(d, int):
        return d
    grain = 0
    for atoms, c in d.terms:
        plain = any(isinstance(a, Symbol) and a.name == lane.var for a in atoms)
        grain = math.gcd(grain, c * lane.align if plain else c)
    return grain
