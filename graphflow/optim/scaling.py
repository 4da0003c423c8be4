"""Dynamic scaling of the loss, for nets that compute with float16.

Gradients below 6e-8 are 0 in float16. The loss is multiplied by a scale, so that they are not, and the
gradients divided by it in float32 before anything else sees them. Micikevicius et al., "Mixed precision
training", ICLR 2018.
"""
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.plan.errors import UseError
from graphflow.reductions import all as every
from graphflow.scope import here
from graphflow.state import Naming, counter, variable
from graphflow.tensor import Tensor, cast, elementwise

Pairs = Sequence[tuple[Tensor, Tensor]]


class LossScale:
    """The scale of a loss, a state: halved, and the update left out, whenever a gradient is infinite or NaN;
    doubled after `interval` updates without.

        optimizer = gf.optim.Adam(1e-3, loss_scale=gf.optim.LossScale())

    initial, growth, backoff: numbers whose products are exact, powers of 2, so that scaling rounds nothing.
    The entries of the Store are ``loss_scale.value`` and ``loss_scale.step``, the updates since it changed.
    """

    def __init__(self, initial: float = 2.0 ** 15, growth: float = 2.0, backoff: float = 0.5,
                 interval: int = 2000) -> None:
        if not initial > 0 or not growth >= 1 or not 0 < backoff < 1 or interval < 1:
            raise UseError(f"LossScale({initial!r}, {growth!r}, {backoff!r}, {interval!r})", where=here(),
                           hint="initial > 0, growth >= 1, 0 < backoff < 1, interval >= 1")
        self.growth, self.backoff, self.interval = growth, backoff, interval
        naming = Naming("loss_scale", False)
        self.value = variable(naming, "value", (), initial, "float32", "slot")
        self._count = counter(naming)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * cast(self.value, loss.dtype)

    def unscaled(self, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        """The gradients of the loss itself from those of the scaled one."""
        return [(p, g * cast(1.0 / self.value, g.dtype)) for p, g in pairs]

    def guarded(self, pairs: Pairs, updates: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The updates where every gradient is finite, nothing else; and those of the scale."""
        finite = every(elementwise("isfinite", pairs[0][1]))
        for _, g in pairs[1:]:
            finite = finite & every(elementwise("isfinite", g))
        kept = {old: elementwise("where", finite, new, old) for old, new in updates.items()}
        grows = finite & (self._count + 1 >= self.interval)
        scale = elementwise("where", grows, self.value * self.growth, self.value)
        kept[self.value] = elementwise("where", finite, scale, self.value * self.backoff)
        kept[self._count] = elementwise("where", finite & ~grows, self._count + 1, 0)
        return kept
