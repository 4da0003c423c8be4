"""Accumulation: one update from the gradients of several calls."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from graphflow.state import Naming, counter, slot
from graphflow.tensor import Tensor, elementwise

Pairs = Sequence[tuple[Tensor, Tensor]]


def accumulated(calls: int, pairs: Pairs, make: Callable[[Pairs], dict[Tensor, Tensor]]
                ) -> dict[Tensor, Tensor]:
    """The updates that `make` gives for the gradients, in every call that completes `calls` of them, with the
    mean of their gradients; in the other calls only the sums change.

    For losses that are means over micro-batches of one size this is the update of the big batch. The sums are
    slots, so a checkpoint between two updates keeps them.
    """
    if calls == 1:
        return make(pairs)
    before = counter(Naming("accumulated", False))
    due = before == calls - 1
    sums: dict[Tensor, Tensor] = {}
    means = []
    for p, g in pairs:
        old = slot(p, "gradient_sum")
        total = old + g
        sums[old] = elementwise("where", due, 0.0, total)
        means.append((p, total / calls))
    updates = {old: elementwise("where", due, new, old) for old, new in make(means).items()}
    return {**updates, **sums, before: elementwise("where", due, 0, before + 1)}
