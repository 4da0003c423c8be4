"""Dimensions: canonical integer expressions over named symbols.

A dimension is a Python ``int`` where it is constant, else a `Dim`: a polynomial with integer coefficients
whose atoms are symbols (each >= 0), ``e // c`` and ``e % c`` with a constant c > 0 (both rounding down, as in
Python). The form is canonical: two dimensions are equal exactly when their canonical forms are, so ``T*N``
equals ``N*T`` and ``(2*N + 2)//2`` equals ``N + 1``. The same expressions serve as shapes, buffer sizes, trip
counts and, with loop variables as symbols, as the quasi-affine indices of kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Union

from graphflow.compiler.plan.errors import GraphflowError

DimLike = Union[int, "Dim"]  # noqa: UP007
Bounds = Mapping[str, tuple[int, "int | None"]]  # symbol -> inclusive (low, high); high None: unbounded


class Symbol:
    """A named unknown, >= 0. Symbols of the same name are the same."""

    __slots__ = ("name", "key")

    def __init__(self, name: str):
        self.name, self.key = name, (0, name)

    def __str__(self) -> str:
        return self.name


class Quotient:
    """The atom ``inner // by`` or, with ``rest``, ``inner % by``; `by` is a constant > 0."""

    __slots__ = ("inner", "by", "rest", "key")

    def __init__(self, inner: Dim, by: int, rest: bool):
        self.inner, self.by, self.rest = inner, by, rest
        self.key = (2 if rest else 1, by, inner.key)

    def __str__(self) -> str:
        return f"({self.inner}){'%' if self.rest else '//'}{self.by}"


Atom = Union[Symbol, Quotient]  # noqa: UP007


class Dim:
    """A non-constant canonical integer expression; immutable, hashable, ordered by nothing."""

    __slots__ = ("terms", "key", "_hash")
    key: tuple

    def __init__(self, terms: tuple[tuple[tuple[Atom, ...], int], ...], key: tuple | None = None):
        self.terms = terms  # ((atoms of the monomial, sorted), coefficient), sorted
        self.key = tuple([(tuple([a.key for a in atoms]), c) for atoms, c in terms]) if key is None else key
        self._hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.key)
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.key == other.key

    def __add__(self, other: DimLike) -> DimLike:
        if not isinstance(other, (int, Dim)):
            return NotImplemented
        if isinstance(other, int):  # nothing can fold: only the constant, the first term, changes
            if not other:
                return self
            first = 0 if self.terms[0][0] else 1
            constant = other + (self.terms[0][1] if first else 0)
            term = (((), constant),) if constant else ()
            return Dim((*term, *self.terms[first:]), (*term, *self.key[first:]))
        return _from_terms([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> DimLike:
        return self * -1

    def __sub__(self, other: DimLike) -> DimLike:
        return self + other * -1

    def __rsub__(self, other: DimLike) -> DimLike:
        return self * -1 + other

    def __mul__(self, other: DimLike) -> DimLike:
        if not isinstance(other, (int, Dim)):
            return NotImplemented
        if isinstance(other, int):
            if other in (0, 1):
                return self if other else 0
            return Dim(tuple([(atoms, c * other) for atoms, c in self.terms]),
                       tuple([(atoms, c * other) for atoms, c in self.key]))
        return _from_terms([(tuple(sorted(a + b, key=lambda x: x.key)), c * d) for a, c in self.terms
                            for b, d in _terms(other)])

    __rmul__ = __mul__

    def __floordiv__(self, by: int) -> DimLike:
        return _divide(self, by)[0]

    def __mod__(self, by: int) -> DimLike:
        return _divide(self, by)[1]

    def __bool__(self) -> bool:
        raise TypeError(
            f"the dimension {self} is symbolic: it has no truth value before the program is bound"
        )

    def __int__(self) -> int:
        raise TypeError(f"the dimension {self} is symbolic: it has no value before the program is bound")

    def __str__(self) -> str:
        out = ""
        for atoms, c in sorted(self.terms, key=lambda t: not t[0]):  # the constant last
            body = "*".join(map(str, atoms))
            sign, size = ("-" if c < 0 else "+"), abs(c)
            body = body if body and size == 1 else f"{size}*{body}" if body else str(size)
            out += f" {sign} {body}" if out else (body if c > 0 else f"-{body}")
        return out

    __repr__ = __str__


def symbol(name: str) -> Dim:
    """The dimension that is just the symbol `name`."""
    return _symbol(name)


@lru_cache(maxsize=4096)
def _symbol(name: str) -> Dim:
    return Dim((((Symbol(name),), 1),))


def _terms(d: DimLike) -> Iterable[tuple[tuple[Atom, ...], int]]:
    return d.terms if isinstance(d, Dim) else (((), int(d)),)


def _from_terms(terms: Iterable[tuple[tuple[Atom, ...], int]]) -> DimLike:
    table: dict[tuple, list] = {}
    for atoms, c in terms:
        entry = table.setdefault(tuple([a.key for a in atoms]), [atoms, 0])
        entry[1] += c
    if any([isinstance(a, Quotient) and a.rest for atoms, _ in table.values() for a in atoms]):
        _recombine(table)
    kept = sorted([k for k, e in table.items() if e[1]])
    if not kept:
        return 0
    if kept == [()]:
        return int(table[()][1])
    return Dim(tuple([tuple(table[k]) for k in kept]), tuple([(k, table[k][1]) for k in kept]))


def _recombine(table: dict[tuple, list]) -> None:
    """Folds k*c*(e // c) + k*(e % c) into k*e, the identity that makes quotient and rest canonical
    together."""
    for key, (atoms, coefficient) in list(table.items()):
        for at, atom in enumerate(atoms):
            if not (isinstance(atom, Quotient) and atom.rest) or not coefficient:
                continue
            others = atoms[:at] + atoms[at + 1 :]
            quotient = _divide(atom.inner, atom.by)[0]  # canonical: (e // a) // b is e // (a*b)
            if not isinstance(quotient, Dim) or len(quotient.terms) != 1 or quotient.terms[0][1] != 1:
                continue
            whole = tuple(sorted((*others, *quotient.terms[0][0]), key=lambda x: x.key))
            partner = table.get(tuple(a.key for a in whole))
            if partner is None or partner[1] != coefficient * atom.by:
                continue
            del table[key]
            del table[tuple(a.key for a in whole)]
            factor = _from_terms([(others, coefficient)])
            for more, c in _terms(factor * atom.inner):
                entry = table.setdefault(tuple(a.key for a in more), [more, 0])
                entry[1] += c
            return _recombine(table)


def _divide(d: DimLike, by: int) -> tuple[DimLike, DimLike]:
    """(d // by, d % by), each canonical: multiples of `by` leave the atom, nested quotients merge."""
    if not isinstance(by, int) or by <= 0:
        raise GraphflowError(f"a dimension divides only by a constant > 0, not by {by}")
    if isinstance(d, int):
        return divmod(d, by)
    if by == 1:
        return d, 0
    whole: DimLike = 0
    rest: DimLike = 0
    for atoms, c in d.terms:
        q, r = divmod(c, by)
        whole = whole + _from_terms([(atoms, q)])
        rest = rest + _from_terms([(atoms, r)])
    if isinstance(rest, int):
        return whole, rest
    shared = math.gcd(by, *(c for atoms, c in rest.terms if atoms))
    if shared > 1:  # (g*e + r) // (g*b) == e // b for 0 <= r < g
        constant = sum(c for atoms, c in rest.terms if not atoms)
        reduced = _from_terms([(atoms, c // shared) for atoms, c in rest.terms])
        quotient, remainder = _divide(reduced, by // shared)
        return whole + quotient, remainder * shared + constant % shared
    if len(rest.terms) == 1:
        ((atoms, c),) = rest.terms
        if c == 1 and len(atoms) == 1 and isinstance(atoms[0], Quotient):
            inner = atoms[0]
            if not inner.rest:  # (e // a) // b == e // (a*b)
                return whole + _atom(inner.inner, inner.by * by, False), _atom(rest, by, True)
            if inner.by % by == 0:  # (e % (a*b)) % b == e % b
                return whole + _atom(rest, by, False), _divide(inner.inner, by)[1]
    return whole + _atom(rest, by, False), _atom(rest, by, True)


def _atom(inner: Dim, by: int, rest: bool) -> Dim:
    return Dim((((Quotient(inner, by, rest),), 1),))


def floordiv(d: DimLike, by: int) -> DimLike:
    """``d // by`` rounding down; `by` a constant > 0."""
    return _divide(d, by)[0]


def ceildiv(d: DimLike, by: int) -> DimLike:
    """``d / by`` rounded up; `by` a constant > 0."""
    return _divide(d + (by - 1), by)[0]


def product(dims: Iterable[DimLike]) -> DimLike:
    """The product of the dimensions; 1 for none."""
    out: DimLike = 1
    for d in dims:
        out = out * d
    return out


def symbols_of(*dims: DimLike) -> set[str]:
    """The names of all symbols in the dimensions, inside quotients too."""
    names: set[str] = set()
    for d in dims:
        if isinstance(d, Dim):
            for atoms, _ in d.terms:
                for a in atoms:
                    names |= {a.name} if isinstance(a, Symbol) else symbols_of(a.inner)
    return names


def substitute(d: DimLike, values: Mapping[str, DimLike]) -> DimLike:
    """`d` with symbols replaced; symbols that `values` does not name stay."""
    if isinstance(d, int):
        return d
    return _rebuild(d, lambda a: values.get(a.name) if isinstance(a, Symbol) else None,
                    lambda inner: substitute(inner, values))


TYPICAL_SIZE = 128
"""What a symbol counts as where a choice depends on sizes."""


def typical(d: DimLike) -> int:
    """The dimension's value when every symbol has its typical size."""
    return evaluate(d, dict.fromkeys(symbols_of(d), TYPICAL_SIZE))


def evaluate(d: DimLike, values: Mapping[str, int]) -> int:
    """The number that `d` is when every symbol has its value; KeyError names a symbol without one."""
    if isinstance(d, int):
        return d
    total = 0
    for atoms, c in d.terms:
        for a in atoms:
            if isinstance(a, Symbol):
                c = c * values[a.name]
            else:
                inner = evaluate(a.inner, values)
                c = c * (inner % a.by if a.rest else inner // a.by)
        total = total + c
    return total


def _rebuild(d: Dim, leaf: Callable[[Atom], DimLike | None], inside: Callable[[DimLike], DimLike]) -> DimLike:
    out: DimLike = 0
    for atoms, c in d.terms:
        term: DimLike = c
        for a in atoms:
            new = leaf(a)
            if new is None:
                if isinstance(a, Symbol):
                    new = Dim((((a,), 1),))
                else:
                    new = _divide(inside(a.inner), a.by)[1 if a.rest else 0]
            term = term * new if isinstance(term, Dim) else new * term
        out = out + term
    return out


def bounds_of(d: DimLike, bounds: Bounds) -> tuple[int | None, int | None]:
    """Inclusive (low, high) of `d` by interval arithmetic; None is unbounded. Unnamed symbols are >= 0."""
    if isinstance(d, int):
        return d, d
    low: int | None = 0
    high: int | None = 0
    for atoms, c in d.terms:
        span: tuple[int | None, int | None] = (c, c)
        for a in atoms:
            if isinstance(a, Symbol):
                other: tuple[int | None, int | None] = bounds.get(a.name, (0, None))
            else:
                lo, hi = bounds_of(a.inner, bounds)
                if a.rest:
                    other = ((lo, hi) if lo is not None and hi is not None and 0 <= lo and hi < a.by
                             else (0, a.by - 1))
                else:
                    other = (None if lo is None else lo // a.by, None if hi is None else hi // a.by)
            span = _times(span, other)
        low = None if low is None or span[0] is None else low + span[0]
        high = None if high is None or span[1] is None else high + span[1]
    return low, high


def _times(
    a: tuple[int | None, int | None], b: tuple[int | None, int | None]
) -> tuple[int | None, int | None]:
    if None not in a and None not in b:
        every = [x * y for x in a for y in b]  # type: ignore[operator]
        return min(every), max(every)
    if a == (0, 0) or b == (0, 0):
        return 0, 0
    if a[0] is not None and b[0] is not None and a[0] >= 0 and b[0] >= 0:
        return a[0] * b[0], None
    if a[1] is not None and a[1] <= 0 and b[0] is not None and b[0] >= 0:
        return None, a[1] * b[0]
    if b[1] is not None and b[1] <= 0 and a[0] is not None and a[0] >= 0:
        return None, b[1] * a[0]
    return None, None


def simplify(d: DimLike, bounds: Bounds) -> DimLike:
    """`d` with quotients and rests dropped where the bounds of its symbols decide them."""
    if isinstance(d, int) or not any(isinstance(a, Quotient) for atoms, _ in d.terms for a in atoms):
        return d

    def leaf(a: Atom) -> DimLike | None:
        if isinstance(a, Symbol):
            return None
        inner = simplify(a.inner, bounds)
        low, high = bounds_of(inner, bounds)
        if low is not None and high is not None and low // a.by == high // a.by:
            return inner - (low // a.by) * a.by if a.rest else low // a.by
        whole, rest = _split_multiples(inner, a.by, bounds)
        if rest is not None:
            return rest if a.rest else whole
        return _divide(inner, a.by)[1 if a.rest else 0]

    return _rebuild(d, leaf, lambda inner: simplify(inner, bounds))


def _split_multiples(d: DimLike, by: int, bounds: Bounds) -> tuple[DimLike, DimLike | None]:
    """(q, r) with d = q*by + r and 0 <= r < by proved by the bounds; r is None where it cannot be."""
    whole: DimLike = 0
    rest: DimLike = 0
    for atoms, c in _terms(d):
        if c % by == 0:
            whole = whole + _from_terms([(atoms, c // by)])
        else:
            rest = rest + _from_terms([(atoms, c)])
    low, high = bounds_of(rest, bounds)
    if low is not None and high is not None and low // by == high // by:
        return whole + low // by, rest - (low // by) * by
    return d, None


_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.']*)|(//|[-+*%()]))")


def parse_dim(text: str) -> DimLike:
    """Reads what `str` of a dimension prints."""
    tokens: list[str] = []
    at = 0
    while at < len(text.rstrip()):
        m = _TOKEN.match(text, at)
        if not m:
            raise GraphflowError(f"not a dimension: {text!r} (at character {at})")
        tokens.append(m[0].strip())
        at = m.end()
    tokens.append("")
    result, at = _parse_sum(tokens, 0)
    if tokens[at]:
        raise GraphflowError(f"not a dimension: {text!r} (what is {tokens[at]!r} doing there?)")
    return result


def parse_tokens(tokens: Sequence[str], at: int) -> tuple[DimLike, int]:
    """Reads a dimension that starts with token number `at`; gives it and the number of the token after it.
    The last token must be ""."""
    return _parse_sum(tokens, at)


def _parse_sum(tokens: Sequence[str], at: int) -> tuple[DimLike, int]:
    negative = tokens[at] == "-"
    out, at = _parse_product(tokens, at + negative)
    out = -out if negative else out
    while tokens[at] in ("+", "-"):
        sign = 1 if tokens[at] == "+" else -1
        right, at = _parse_product(tokens, at + 1)
        out = out + right * sign
    return out, at


def _parse_product(tokens: Sequence[str], at: int) -> tuple[DimLike, int]:
    out, at = _parse_quotient(tokens, at)
    while tokens[at] == "*":
        right, at = _parse_quotient(tokens, at + 1)
        out = out * right
    return out, at


def _parse_quotient(tokens: Sequence[str], at: int) -> tuple[DimLike, int]:
    token = tokens[at]
    if token == "(":
        out, at = _parse_sum(tokens, at + 1)
        if tokens[at] != ")":
            raise GraphflowError(f"not a dimension: a ')' is missing before {tokens[at]!r}")
        at += 1
    elif token.isdigit():
        out, at = int(token), at + 1
    elif token and (token[0].isalpha() or token[0] == "_"):
        out, at = symbol(token), at + 1
    else:
        raise GraphflowError(f"not a dimension: {token!r} where a number, symbol or '(' belongs")
    while tokens[at] in ("//", "%"):
        if not tokens[at + 1].isdigit():
            raise GraphflowError(f"not a dimension: {tokens[at]} needs a constant after it")
        out = _divide(out, int(tokens[at + 1]))[0 if tokens[at] == "//" else 1]
        at += 2
    return out, at
