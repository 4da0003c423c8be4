"""How far an index certainly reaches, given the loops and guards around it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphflow.compiler.kernel.form import Guard
from graphflow.compiler.plan.dims import Dim, DimLike, Symbol, bounds_of, symbols_of


def reach(at: DimLike, size: DimLike, loops: Mapping[str, DimLike], guards: Sequence[Guard]) -> str:
    """Says how the index certainly leaves ``0 <= at < size`` in some iteration, whatever the symbols (each >=
    1);
    "" where that is not certain.

    It is certain where the index is affine in the variables of loops that all run at least once: then it
    takes its least and its greatest value. Under guards it is decided only for one variable plus a constant,
    guarded by itself plus a constant.
    """
    if not all(_certain(extent - 1) for extent in loops.values()):
        return ""
    span = _span(at, loops)
    if span is None:
        return ""
    low, high = span
    lows, highs = [low], [high]
    for g in guards:
        shift = at - g.at
        if not isinstance(shift, int) or not _steps_by_one(at, loops):
            return ""
        lows.append(shift)
        highs.append(g.bound - 1 + shift)
    if all(_certain(-1 - x) for x in lows):
        return f"reaches {low}, before the start"
    if all(_certain(x - size) for x in highs):
        return f"reaches {high}, past the end"
    return ""


def _steps_by_one(at: DimLike, loops: Mapping[str, DimLike]) -> bool:
    varying = [(atoms, c) for atoms, c in at.terms if atoms] if isinstance(at, Dim) else []
    return len(varying) == 1 and abs(varying[0][1]) == 1 and symbols_of(at) <= set(loops)


def _span(at: DimLike, loops: Mapping[str, DimLike]) -> tuple[DimLike, DimLike] | None:
    """(least, greatest) value of an index that is affine in the loops' variables, else None."""
    low: DimLike = 0
    high: DimLike = 0
    for atoms, c in (at.terms if isinstance(at, Dim) else (((), at),)):
        atom = atoms[0] if len(atoms) == 1 else None
        if isinstance(atom, Symbol) and atom.name in loops:
            last = (loops[atom.name] - 1) * c
            low, high = (low, high + last) if c > 0 else (low + last, high)
        elif symbols_of(Dim(((atoms, c),))) & set(loops):
            return None
        else:
            term = Dim(((atoms, c),)) if atoms else c
            low, high = low + term, high + term
    return low, high


def _certain(d: DimLike) -> bool:
    """Whether d >= 0 whatever the symbols, each of which is at least 1."""
    low, _ = bounds_of(d, {name: (1, None) for name in symbols_of(d)})
    return low is not None and low >= 0
