"""The plan: what the compiler hands to the runtime, as plain data.

A plan says which buffers there are (sizes are expressions of the program's symbols), when each is alive,
and what runs in which order. With the object code of its kernels it is everything that the runtime needs.
Source lines are kept as numbers: positions in the list of the traced graph's nodes (`origins`), so that
the same plan serves a program whose lines moved.
"""
from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType

SCHEMA_VERSION = 1
ALIGNMENT = 64
"""Bytes: every arena buffer starts at a multiple."""

ROLES = ("feed", "state", "output", "arena", "constant")


@dataclass(frozen=True)
class Buffer:
    """A piece of memory. role: "feed" (the caller's array), "state" (in the Store), "output" (a new array
    of each call), "arena" or "constant" (`data` holds its bytes). `name`: of the feed, state entry or
    output; for the arena, the value that it holds. first/last: positions in the body (inclusive) between
    which an arena buffer is alive. `alias`: an arena buffer that takes over the memory of that buffer,
    which dies at `first` (in-place), or "". `origins`: numbers of traced nodes.
    """
    id: str
    role: str
    name: str
    dtype: DType
    shape: tuple[DimLike, ...]
    layout: str = ""
    first: int = 0
    last: int = 0
    alias: str = ""
    origins: tuple[int, ...] = ()
    data: bytes = b""


@dataclass(frozen=True)
class Launch:
    """Runs `kernel` (a function of the object code) on `buffers`, in `tasks` independent pieces.
    `scratch`: bytes that each worker needs. `after`: positions of launches that read an old state value
    that this one overwrites. `writes`: those of the buffers that it writes (`memory` fills it in from the
    kernel)."""
    kernel: str
    buffers: tuple[str, ...]
    tasks: DimLike
    scratch: DimLike = 0
    after: tuple[int, ...] = ()
    origins: tuple[int, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Copy:
    """Copies a whole buffer into another of the same element type and size (a state update that could not
    be made in place, an output that is a feed or a state)."""
    source: str
    target: str


@dataclass(frozen=True)
class Check:
    """Stops the call, before any state is written, with error number `code` (an index into Plan.messages)
    if the bool scalar in `buffer` is false."""
    buffer: str
    code: int


Item = Launch | Copy | Check


@dataclass(frozen=True)
class Message:
    """What a failed check says, and the traced node that asked for it. `feed`: the feed that is to blame,
    or ""."""
    text: str
    origin: int
    feed: str = ""


@dataclass(frozen=True)
class EntryGuard:
    """left == right must hold for the bound symbols."""
    left: DimLike
    right: DimLike
    origin: int


@dataclass(frozen=True)
class Plan:
    """A compiled program. `feeds`, `outputs`: buffer ids in the order of the call; `states`: buffer ids
    of state entries; `written`: ids of the states that the step writes; `symbols` in the order in which
    the entry takes them."""
    name: str
    target: str
    symbols: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    feeds: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[str, ...]
    written: tuple[str, ...]
    body: tuple[Item, ...]
    messages: tuple[Message, ...] = ()
    guards: tuple[EntryGuard, ...] = ()
    version: int = SCHEMA_VERSION

    def buffer(self, id: str) -> Buffer:
        """The buffer of that id; KeyError if there is none."""
        return next(b for b in self.buffers if b.id == id)
