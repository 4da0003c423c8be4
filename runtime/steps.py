"""Many steps in one call: feeds stacked along a leading axis, and outputs likewise."""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from graphflow.compiler.plan.errors import CompilerError, UserError


@dataclass(frozen=True)
class Stack:
    """Feeds of several steps. Of each feed, `stacked` tells whether it has a leading axis of so many `steps`;
    otherwise it is the same for all."""

    feeds: Sequence[Any]
    stacked: Sequence[bool]
    steps: int

    def at(self, step: int) -> list[Any]:
        """The feeds of one step."""
        return [feed[step, ...] if stacked else feed for feed, stacked in zip(self.feeds, self.stacked)]


class Interrupts:
    """Holds Ctrl-C back while a step runs: `raised` tells of it, and a second one raises at once."""

    def __init__(self) -> None:
        self.raised = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        # only Python's own way of raising KeyboardInterrupt is replaced, and only the main thread may do so
        if threading.current_thread() is threading.main_thread() \
                and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True


def interrupted(name: str, done: int, steps: int) -> KeyboardInterrupt:
    """What Ctrl-C raises between two steps."""
    return KeyboardInterrupt(f"{name}: {done} of {steps} steps are done, and the Store is as they left it")


def failed(error: UserError | CompilerError, step: int, steps: int) -> UserError | CompilerError:
    """The error of a step, which tells that those before are done."""
    error.message = f"step {step} of {steps}, counted from 0: {error.message}"
    return error


def by_calls(name: str, run: Callable[[Sequence[Any]], Sequence[Any]], stack: Stack) -> list[np.ndarray]:
    """The stacked outputs of one call after the other."""
    found: list[list[np.ndarray]] = []
    with Interrupts() as interrupts:
        for step in range(stack.steps):
            try:
                found.append([np.asarray(value) for value in run(stack.at(step))])
            except UserError as error:
                raise failed(error, step, stack.steps) from None
            if interrupts.raised:
                raise interrupted(name, step + 1, stack.steps)
    return [np.stack(values) for values in zip(*found)]
