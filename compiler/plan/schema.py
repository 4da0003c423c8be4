"""The plan: what the compiler hands to the runtime, as plain data.

A plan says which buffers there are (sizes are expressions of the program's symbols), when each is alive,
and what runs in which order. With the object code of its kernels it is everything that the runtime needs.
Source lines are kept as numbers: positions in the list of the traced graph's nodes (`origins`), so that
the same plan serves a program whose lines moved.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Union

from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType

SCHEMA_VERSION = 1
ALIGNMENT = 64
"""Bytes: every arena buffer starts at a multiple."""

GPU_ELEMENTS = 2**30
"""Every array on a GPU has fewer elements: its code counts in 32 bits, as division takes a tenth then."""

MAX_DEPTH = 32
"""How deep loops and branches may nest."""

ROLES = ("feed", "state", "output", "arena", "constant", "view")


@dataclass(frozen=True)
class Buffer:
    """A piece of memory. role: "feed" (the caller's array), "state" (in the Store), "output" (a new array
    of each call), "arena", "constant" (`data` holds its bytes) or "view": a piece of the buffer `base`, which
    is no view, from element number `offset` on; the offset may use the counters of the loops around the items
    that use the view. `name`: of the feed, state entry or output; else the value that it holds. first/last:
    positions in the body (inclusive) between which an arena buffer is alive. `alias`: an arena buffer that
    takes over the memory of that buffer, which dies at `first` (in-place), or "". `origins`: numbers of
    traced nodes.
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
    base: str = ""
    offset: DimLike = 0


@dataclass(frozen=True)
class Launch:
    """Runs `kernel` (a function of the object code) on `buffers`, in `tasks` independent pieces.
    `scratch`: bytes that each worker needs; `shared`: bytes that all of them share. `after`: positions of
    launches that read an old state value that this one overwrites. `writes`: those of the buffers that it
    writes (`memory` fills it in from the kernel)."""
    kernel: str
    buffers: tuple[str, ...]
    tasks: DimLike
    scratch: DimLike = 0
    after: tuple[int, ...] = ()
    origins: tuple[int, ...] = ()
    writes: tuple[str, ...] = ()
    shared: DimLike = 0


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


@dataclass(frozen=True)
class Repeat:
    """Runs `body` with `counter` = 0, 1, … below `trips`; where there is a `condition`, only as long as that
    bool scalar is true, which is looked at before each trip. Every loop has a counter of its own. Behind the
    loop, until the end of the body that it stands in, the counter is the number of trips done.

    `rows`: where it is not 0, the body holds launches of so many tasks each, and copies of buffers whose
    first axis is so long; and no task or row needs anything that the loop makes in one of another number. So
    they may be shared out once, and whoever has some of them runs all trips for these without waiting for
    others."""
    counter: str
    trips: DimLike
    body: tuple[Item, ...]
    condition: str = ""
    rows: DimLike = 0


@dataclass(frozen=True)
class Branch:
    """Runs `then` if the bool scalar `predicate` is true, else `otherwise`."""
    predicate: str
    then: tuple[Item, ...]
    otherwise: tuple[Item, ...]


Item = Union[Launch, Copy, Check, Repeat, Branch]  # noqa: UP007


class Place(NamedTuple):
    """An item with its position. Items are numbered in the order of the text; a loop or a branch has two
    numbers, of its beginning and, `last`, of its end. `loops`: (position, last) of the loops around it,
    outermost first."""
    position: int
    last: int
    item: Item
    loops: tuple[tuple[int, int], ...]


def places(body: Sequence[Item]) -> list[Place]:
    """Every item at every depth, by position."""
    out: list[Place] = []
    _number(body, 0, (), out)
    return out


def _number(body: Sequence[Item], start: int, loops: tuple[tuple[int, int], ...], out: list[Place]) -> int:
    for item in body:
        last = start + positions([item]) - 1
        out.append(Place(start, last, item, loops))
        if isinstance(item, Repeat):
            _number(item.body, start + 1, (*loops, (start, last)), out)
        elif isinstance(item, Branch):
            _number(item.otherwise, _number(item.then, start + 1, loops, out), loops, out)
        start = last + 1
    return start


def positions(body: Sequence[Item]) -> int:
    """How many positions the items take."""
    return sum(1 if not isinstance(item, (Repeat, Branch)) else
               2 + sum(map(positions, _bodies(item))) for item in body)


def _bodies(item: Item) -> tuple[tuple[Item, ...], ...]:
    if isinstance(item, Repeat):
        return (item.body,)
    return (item.then, item.otherwise) if isinstance(item, Branch) else ()


def launches(body: Sequence[Item]) -> Iterator[Launch]:
    """Every launch at every depth, in order."""
    for item in body:
        if isinstance(item, Launch):
            yield item
        for inner in _bodies(item):
            yield from launches(inner)


def map_items(body: Sequence[Item], change: Callable[[Item], Item]) -> tuple[Item, ...]:
    """The body with every item at every depth changed, inner ones first."""
    out = []
    for item in body:
        if isinstance(item, Repeat):
            item = replace(item, body=map_items(item.body, change))
        elif isinstance(item, Branch):
            item = replace(item, then=map_items(item.then, change),
                           otherwise=map_items(item.otherwise, change))
        out.append(change(item))
    return tuple(out)


def base_of(table: Mapping[str, Buffer], id: str) -> str:
    """The buffer whose memory the buffer is or lies in."""
    return table[id].base or id


MOST_TOGETHER = 132
"""So many blocks at most run a whole loop on a GPU, at once: one for each multiprocessor of a large one."""


def name_of_loop(item: Repeat) -> str:
    """The function of a GPU that runs all trips of the loop, if there is one."""
    return f"loop_{item.counter}"


def bases_of_loop(table: Mapping[str, Buffer], item: Repeat) -> list[str]:
    """The buffers whose addresses that function takes, in order."""
    return list(dict.fromkeys(base_of(table, id) for x in item.body for id in (
        x.buffers if isinstance(x, Launch) else (x.source, x.target) if isinstance(x, Copy) else ())))


@dataclass(frozen=True)
class Function:
    """How a kernel of a GPU is launched: `threads` of a block (a task is a block there), the values of the
    `symbols` behind the addresses of its buffers, the bytes of shared memory that a launch asks for
    (`dynamic`); and what it takes, as the assembler reports: registers of a thread, bytes of shared memory
    that it declares, bytes of registers that a thread spills to memory."""
    name: str
    threads: int
    symbols: tuple[str, ...] = ()
    dynamic: int = 0
    registers: int = 0
    shared: int = 0
    spilled: int = 0


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
    the entry takes them. `functions`: of every kernel, on a GPU; the code for a CPU knows by itself."""
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
    functions: tuple[Function, ...] = ()
    version: int = SCHEMA_VERSION

    def buffer(self, id: str) -> Buffer:
        """The buffer of that id; KeyError if there is none."""
        return next(b for b in self.buffers if b.id == id)
