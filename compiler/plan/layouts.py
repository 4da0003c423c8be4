"""Layouts: the order in which the axes of a buffer lie in memory.

Shapes are written in the order that the program means, whatever the layout. Row-major in that order is the
default, ""; every other layout has a name in a small table.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

CHANNELS_LAST = "nhwc"
"""Images [N, C, H, W] with the channels of a pixel side by side."""
_ORDERS: dict[str, tuple[int, ...]] = {CHANNELS_LAST: (0, 2, 3, 1)}

T = TypeVar("T")


def is_layout(layout: str, rank: int) -> bool:
    """Whether a buffer of that many axes may have the layout."""
    return not layout or (layout in _ORDERS and len(_ORDERS[layout]) == rank)


def in_memory(layout: str, axes: Sequence[T]) -> tuple[T, ...]:
    """What is given for each axis, in the order of memory, outermost first."""
    return tuple(axes[i] for i in _ORDERS[layout]) if layout else tuple(axes)
