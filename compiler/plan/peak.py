"""Where the memory goes: the peak of a plan as a formula of its symbols, and what is alive there."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphflow.compiler.plan.bind import bind, blocks_of, buffer_bytes, live_bytes, scratch_lives, sharing
from graphflow.compiler.plan.dims import DimLike, bounds_of, product
from graphflow.compiler.plan.schema import Buffer, Plan


def peak_formula(plan: Plan, threads: int = 1) -> list[DimLike]:
    """The peak as a formula: for all values of the symbols it is the largest of these expressions, in bytes.

    They are the sums of what is alive at each point of the body, the scratch of `threads` workers included
    (rounding up to the alignment left out); those that another one is never below are dropped.
    """
    change: dict[int, DimLike] = {}
    scratch: list[DimLike] = [0]

    def live(first: int, last: int, size: DimLike) -> None:
        change[first] = change.get(first, 0) + size
        change[last + 1] = change.get(last + 1, 0) - size

    for group in sharing(plan):
        live(group[0].first, group[-1].last, product(group[0].shape) * group[0].dtype.bytes)
    for first, last, item in scratch_lives(plan):
        busy = min(threads, item.tasks) if isinstance(item.tasks, int) else threads
        size = item.shared + item.scratch * busy
        if plan.functions:                         # a GPU's kernels share one piece throughout
            scratch.append(size)
        else:
            live(first, last, size)
    sums: list[DimLike] = [0]
    for position in sorted(change):
        sums.append(sums[-1] + change[position])
    return _largest(a + b for a in _largest(sums) for b in _largest(scratch))


def _largest(sizes: Iterable[DimLike]) -> list[DimLike]:
    """The distinct sizes, without those that another is never below."""
    kept: list[DimLike] = []
    for size in dict.fromkeys(sizes):
        if not any(_never_below(other, size) for other in kept):
            kept = [other for other in kept if not _never_below(size, other)] + [size]
    return kept


def _never_below(a: DimLike, b: DimLike) -> bool:
    low = bounds_of(a - b, {})[0]
    return low is not None and low >= 0


@dataclass(frozen=True)
class PeakReport:
    """Who is alive where the most is: `position` in the body, (buffer, bytes), largest first, and the bytes
    of scratch."""
    position: int
    live: tuple[tuple[Buffer, int], ...]
    scratch: int

    @property
    def live_bytes(self) -> int:
        """The sum of the live buffers, without scratch and alignment."""
        return sum(size for _, size in self.live)


def explain_peak(plan: Plan, symbols: Mapping[str, int], threads: int = 1) -> PeakReport:
    """The buffers alive at the point of the body where the most bytes are (the first of several)."""
    blocks = blocks_of(plan, symbols, threads)
    scratch = [block for block in blocks if not block.buffers]
    live = live_bytes([block for block in blocks if block.buffers] if plan.functions else blocks)
    position = live.index(max(live)) if live else 0
    found = [(b, buffer_bytes(b, symbols)) for b in plan.buffers
             if b.role == "arena" and b.first <= position <= b.last]
    taken_over = {b.alias for b, _ in found if b.alias}
    found = [(b, size) for b, size in found if b.id not in taken_over]
    found.sort(key=lambda pair: (-pair[1], pair[0].id))
    if plan.functions:
        return PeakReport(position, tuple(found), max((x.bytes for x in scratch), default=0))
    return PeakReport(position, tuple(found),
                      sum(x.bytes for x in scratch if x.first <= position <= x.last))


def describe_peak(plan: Plan, symbols: Mapping[str, int], threads: int, lines: Mapping[int, str]) -> str:
    """The peak, its formula, and a line for each buffer that is alive then, with the user's lines. `lines`:
    those of the traced nodes, by number."""
    report = explain_peak(plan, symbols, threads)
    at = ", ".join(f"{name} = {value}" for name, value in symbols.items())
    sums = [str(size) for size in peak_formula(plan, threads)]
    formula = sums[0] if len(sums) == 1 else f"max({', '.join(sums)})"
    rows = [(size, f"{b.name} {b.dtype}[{', '.join(str(d) for d in b.shape)}]",
             ", ".join(dict.fromkeys(lines.get(n, "?") for n in b.origins))) for b, size in report.live]
    rows += [(report.scratch, "scratch of the kernels", "")] if report.scratch else []
    rows.sort(key=lambda row: -row[0])
    wide = max((len(f"{size:,}") for size, _, _ in rows), default=0)
    name = max((len(what) for _, what, _ in rows), default=0)
    text = [f"{bind(plan, symbols, threads).peak_bytes:,} bytes{' at ' * bool(at)}{at}",
            f"= {formula}, beside alignment"]
    text += [f"{f'{size:,}':>{wide}}  {what:<{name}}  {where}".rstrip() for size, what, where in rows]
    return "\n".join(text) + "\n"
