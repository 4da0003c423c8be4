"""Feeds of many steps at once, as `Program.run` takes them, and arrays that lie on a device already."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Node
from graphflow.compiler.plan.errors import FeedError, UseError
from graphflow.runtime.steps import Stack
from graphflow.scope import here


def device_array(array: Any, device: str = "cuda") -> Any:
    """The array in the memory of the device, to feed programs there with again and again: it is copied once.

    On a GPU it has `shape` and `dtype`, and wherever an array is needed it is one. Other devices work on the
    host's memory, so there it is the array itself, row-major. Outputs of programs on a GPU lie on it without
    this. DeviceError where the device has not the memory.
    """
    from graphflow.runtime.device import device as find_device
    value = np.asarray(array, order="C")
    if not find_device(device).name.startswith("cuda"):
        return value
    from graphflow.runtime.cuda_arrays import to_device
    return to_device(value)


def stack_feeds(name: str, nodes: Sequence[Node], feeds: Sequence[Any], steps: int | None) -> Stack:
    """The feeds, of which those with an axis more than their input are stacked. UseError or FeedError where
    it is not clear how many steps are meant, or a feed has not so many."""
    if steps is not None and (not isinstance(steps, (int, np.integer)) or steps < 1):
        raise UseError(f"{name}.run: steps is {steps!r}", where=here(), hint="use a positive integer")
    stacked = []
    count, whose = steps, "steps is"
    for node, feed in zip(nodes, feeds):
        own, more = node.attrs["name"], len(feed.shape) - len(node.types[0].shape)
        if more not in (0, 1):
            shape = ", ".join(map(str, node.types[0].shape))
            raise FeedError(f"{name}.run: feed {own!r} has the shape {list(feed.shape)}", where=here(),
                            hint=f"a step takes [{shape}]: stack those of all steps along a new first axis, "
                                 "or give one for all of them")
        stacked.append(more == 1)
        if more and count is None:
            count, whose = feed.shape[0], f"feed {own!r} has"
        if more and feed.shape[0] != count:
            raise FeedError(f"{name}.run: feed {own!r} has {feed.shape[0]} steps along its first axis, but "
                            f"{whose} {count}", where=here())
    if count is None:
        raise UseError(f"{name}.run: no feed has an axis of steps", where=here(),
                       hint="say how many there are: steps=10")
    if count == 0:
        raise FeedError(f"{name}.run: {whose} no steps", where=here())
    return Stack(list(feeds), stacked, int(count))
