"""Checks that depend on the feeds alone, such as those of labels: they need not wait for the step before."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphflow.compiler.plan.bind import buffer_bytes
from graphflow.compiler.plan.dims import evaluate
from graphflow.compiler.plan.schema import Check, Item, Launch, Plan, base_of, launches


class FeedChecks:
    """The checks of feeds, if all of a plan's are.

    `codes`: of each check, the buffer that it looks at and its number. `launches`: what computes these
    buffers; it works in memory of its own, as the step before may be at work in the arena. `rest`: the plan's
    body without all that nothing else needs.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.table = plan, {b.id: b for b in plan.buffers}
        self.codes: dict[str, int] = {}
        self.launches: list[Launch] = []
        self.rest: tuple[Item, ...] = plan.body
        checks = [item for item in plan.body if isinstance(item, Check)]
        wanted = {c.buffer for c in checks}
        made = self._from_feeds()
        needed: list[Launch] = []
        for item in reversed(made):
            if wanted.intersection(item.writes):
                needed.insert(0, item)
                wanted.update(base_of(self.table, id) for id in item.buffers)
        rest = self._others(needed)
        alone = {item.kernel for item in needed}.isdisjoint(item.kernel for item in launches(rest))
        if not (checks and {c.buffer for c in checks} <= {id for item in needed for id in item.writes}):
            return
        if alone or not any(item.scratch != 0 for item in needed):    # else its counters would be shared
            for check in checks:
                self.codes.setdefault(check.buffer, check.code)
            self.launches, self.rest = needed, rest

    def _from_feeds(self) -> list[Launch]:
        """The launches of the body that read feeds and constants only, or what such launches make."""
        fixed = {b.id for b in self.plan.buffers if b.role in ("feed", "constant")}
        known, written = set(fixed), set[str]()
        out = []
        for item in self.plan.body:
            new = {base_of(self.table, id) for id in item.writes} if isinstance(item, Launch) else \
                self._touched(item) - fixed
            if isinstance(item, Launch) and new.isdisjoint(written) \
                    and {base_of(self.table, id) for id in item.buffers} - new <= known \
                    and all(self.table[id].role == "arena" for id in item.writes):
                known |= new
                out.append(item)
            elif not isinstance(item, Check):
                known -= new
            written |= new
        return out

    def _others(self, items: Sequence[Launch]) -> tuple[Item, ...]:
        """The body without checks, and without those of the items that no other needs."""
        kept: list[Item] = []
        wanted: set[str] = set()
        for item in reversed(self.plan.body):
            if isinstance(item, Check):
                continue
            ours = isinstance(item, Launch) and any(item is one for one in items)
            if not ours or isinstance(item, Launch) and wanted.intersection(item.writes):
                kept.insert(0, item)
                wanted.update(self._touched(item))
        return tuple(kept)

    def _touched(self, item: Item) -> set[str]:
        """The buffers that the item, and what is in it, reads or writes."""
        found = {id for x in launches([item]) for id in x.buffers}
        for name in ("source", "target", "condition", "predicate"):
            found.add(getattr(item, name, ""))
        inner = (*getattr(item, "body", ()), *getattr(item, "then", ()), *getattr(item, "otherwise", ()))
        found.update(id for x in inner for id in self._touched(x))
        return {base_of(self.table, id) for id in found - {""}}

    def sizes(self, symbols: Mapping[str, int]) -> dict[str, int]:
        """The memory that the launches work in: (name, bytes) of their buffers, and of their scratch."""
        out = {id: buffer_bytes(self.table[id], symbols) for item in self.launches for id in item.writes
               if id not in self.codes}
        if self.launches:
            out["scratch"] = max(evaluate(item.scratch, symbols) for item in self.launches)
        return out
