"""Which kernels must run before which, while kernels are still being made.

A directed graph without cycles, whose members are numbered so that what must run first has the lower number.
The numbers are kept right while edges come and members merge, as in Pearce and Kelly, "A dynamic topological
sort algorithm for directed acyclic graphs" (2007): a search then visits only what is numbered between its
two ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

Member = TypeVar("Member")


class Precedence(Generic[Member]):
    """The members and, for each, those that must run directly `before` and `behind` it."""

    def __init__(self) -> None:
        self.before: dict[Member, set[Member]] = {}
        self.behind: dict[Member, set[Member]] = {}
        self._number: dict[Member, int] = {}
        self._first = 0

    def add(self, member: Member) -> None:
        """A new member, numbered before all others."""
        self.before[member], self.behind[member] = set(), set()
        self._first -= 1
        self._number[member] = self._first

    def leads(self, starts: Iterable[Member], target: Member) -> bool:
        """Whether the target is one of the starts, or must run behind one."""
        seen: set[Member] = set()
        stack = list(starts)
        while stack:
            member = stack.pop()
            if member is target:
                return True
            if member not in seen and self._number[member] < self._number[target]:
                seen.add(member)
                stack.extend(self.behind[member])
        return False

    def between(self, first: Member, then: Member) -> bool:
        """Whether something must run behind `first` and before `then`."""
        return self.leads((m for m in self.behind[first] if m is not then), then)

    def order(self, first: Member, then: Member) -> None:
        """`first` must run before `then`, which must not lead to it."""
        self.behind[first].add(then)
        self.before[then].add(first)
        if self._number[first] > self._number[then]:
            later = self._reached(then, self.behind, first)
            earlier = self._reached(first, self.before, then)
            self._renumber([*earlier, *later])

    def merge(self, first: Member, then: Member) -> None:
        """One member, `first`, of two of which the second must run behind the first, with nothing between
        them."""
        self.behind[first].discard(then)
        self.before[then].discard(first)
        _, *later = self._reached(first, self.behind, then)
        *earlier, _ = self._reached(then, self.before, first)
        self._renumber([*earlier, first, *later])
        for links, back in ((self.behind, self.before), (self.before, self.behind)):
            for other in links.pop(then):
                back[other].discard(then)
                back[other].add(first)
                links[first].add(other)
        del self._number[then]

    def _reached(self, start: Member, links: dict[Member, set[Member]], end: Member) -> list[Member]:
        """The start and what the links lead to from it, as far as it is numbered between the two; by
        number."""
        low, high = sorted((self._number[start], self._number[end]))
        seen: set[Member] = set()
        stack = [start]
        while stack:
            member = stack.pop()
            if member not in seen and low <= self._number[member] <= high:
                seen.add(member)
                stack.extend(links[member])
        return sorted(seen, key=self._number.__getitem__)

    def _renumber(self, members: list[Member]) -> None:
        """Gives the members their own numbers in the order of the list."""
        numbers = sorted(self._number[m] for m in members)
        self._number.update(zip(members, numbers))
