"""Images in scratch, with their padding: what the direct convolutions share.

Where vectors run along places, images are *unfolded* along x: for each channel and each place along x of the
kernel there is a copy of the image, shifted by that place, without the columns that a stride skips; its rows
are as long as those of the output. So a run of neighbouring outputs, over the ends of rows too, needs a run
of neighbouring elements of a copy, for each place along y: whole vectors, whatever the width. The rows of a
copy are parted by their number modulo the stride along y.

Where vectors run along output channels, elements are read one by one, and one *plain* copy serves all places:
what a few neighbouring outputs need lies in a few lines of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphflow.compiler.emit.algorithm import ZERO, AlgorithmEmitter
from graphflow.compiler.emit.builder import I64, Value, constant
from graphflow.compiler.emit.expr import Emitter
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.kernel.form import Const, Expr, Guarded, Load
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, substitute, symbol

ALGORITHM = 1
"""The number by which a kernel's tile may name these algorithms."""
MAX_STRIDE = 4


@dataclass(frozen=True)
class Unfolded:
    """An image in scratch: "unfolded " [channel][place x][y mod stride][row][x], or, if `plain`,
    [channel][row][x] with all columns.

    `y`, `x`, `channel`, `taps`: variables of the contraction; `height`, `width`: extents of the output,
    `band`: rows of the output whose inputs are there at a time, `channels`: channels that are there at a
    time; `places`: of the kernel along y and x; `steps`: the strides; -1: the kernel is applied backwards."""

    y: str
    x: str
    channel: str
    taps: tuple[str, str]
    height: int
    width: int
    band: int
    channels: int
    places: tuple[int, int]
    steps: tuple[int, int]
    lanes: int
    plain: bool = False

    @property
    def phases(self) -> int:
        """Parts of a copy, by the number of the row modulo the stride."""
        return min(self.steps[0], self.places[0]) if self.steps[0] > 0 and not self.plain else 1

    def rows(self, phase: int = 0) -> int:
        """Rows of a part under a band of the output."""
        if self.plain:
            return abs(self.steps[0]) * (self.band - 1) + self.places[0]
        return self.band + (self.places[0] - 1 - phase) // abs(self.steps[0])

    @property
    def part(self) -> int:
        """Elements of a part."""
        return self.rows() * (self.row if self.plain else self.width)

    @property
    def size(self) -> int:
        """Elements of all copies."""
        return self.channels * (1 if self.plain else self.places[1]) * self.phases * self.part

    @property
    def row(self) -> int:
        """Elements of a row of the image with its padding, of which the copies take parts."""
        return abs(self.steps[1]) * (self.width - 1) + self.places[1]

    def parts(self) -> dict[str, int]:
        """The pieces of scratch, in elements: the copies, and where the stride skips columns, a row."""
        sizes = {"unfolded ": self.size}
        return sizes | {"row ": self.row + self.lanes} if self.steps[1] > 1 and not self.plain else sizes

    def below(self, tap: DimLike) -> DimLike:
        """How many elements behind that of place 0 in phase 0 the element under place `tap` along y is."""
        step = self.steps[0]
        if step < 0:
            tap = self.places[0] - 1 - tap
        if self.plain or step < 0:
            return tap * (self.row if self.plain else self.width)
        return tap % step * self.part + tap // step * self.width

    def copy(self, channel: DimLike, tap: DimLike) -> DimLike:
        """The first element of the copy for a channel and a place along x."""
        if self.plain:
            return channel * self.part + (tap if self.steps[1] > 0 else self.places[1] - 1 - tap)
        return (channel * self.places[1] + tap) * (self.phases * self.part)

    def under(self, y: DimLike, x: DimLike) -> DimLike:
        """How many elements behind the first of a plain copy that under a place of the band is."""
        return y * (abs(self.steps[0]) * self.row) + x * abs(self.steps[1])


Axis = tuple[str, int]


def unfolded(y: Axis, x: Axis, channel: Axis, taps: tuple[Axis, Axis], steps: tuple[int, int], lanes: int,
             most: int, enough: int = 1 << 40, plain: bool = False) -> Unfolded | None:
    """The image, in bands of at most `enough` rows that take at most `most` bytes; None where such a band
    would have less rows than it needs besides."""
    (ty, py), (tx, px) = taps

    def banded(band: int) -> Unfolded:
        return Unfolded(y[0], x[0], channel[0], (ty, tx), y[1], x[1], band, channel[1], (py, px), steps,
                        lanes, plain)

    row = 4 * (banded(2).size - banded(1).size)
    besides = (py - 1) // abs(steps[0])
    room = most // row - besides
    if room < min(y[1], besides + 1):
        return None
    band = min(y[1], room, max(enough, py))
    return banded(-(-y[1] // -(-y[1] // band)))


def steps_of(b: Expr, places: tuple[str, str], taps: tuple[str, str]) -> tuple[int, int] | None:
    """(along y, along x) the number s with which b, a load that is 0 outside its guards, depends on s * place
    + tap alone; -1: on place - tap. None where that is not so."""
    load, fill, guards = (b.value, b.fill, b.guards) if isinstance(b, Guarded) else (b, Const(0, b.dtype), ())
    if not isinstance(load, Load) or not isinstance(fill, Const) or fill.value:
        return None
    dims = [*load.index, *(d for g in guards for d in (g.at, g.bound))]
    found = []
    for place, tap in zip(places, taps):
        for step in (-1, *range(1, MAX_STRIDE + 1)):
            moved = {place: symbol(place) + 1, tap: symbol(tap) - step}
            if all(substitute(d, moved) == d for d in dims):
                found.append(step)
                break
    return (found[0], found[1]) if len(found) == 2 else None


def unfold_image(e: Emitter, node: Node, u: Unfolded, first: Value, start: Value, stop: Value,
                 base: DimLike = 0) -> None:
    """Fills scratch, from element `base` on, with the channels [start, stop) under a band of the output whose
    first row is `first`. `node`: the image's element as a function of the variables of `u`."""
    tx, (py, px) = u.taps[1], u.places
    total = u.height + (py - 1) // abs(u.steps[0])
    e.bounds.update({"copy row": (0, total - 1), tx: (0, px - 1), u.x: (0, u.width - 1)})
    e.scopes.bind("copy start", first)
    e.scopes.bind("copy channel", start)
    with e.scopes.loop(u.channel, start, stop) as channel:
        channel.next()
        if u.plain:
            _plain_rows(e, node, u, first, base)
            return
        if u.steps[1] > 1:
            _each_row(e, node, u, first, lambda element, phase: _by_row(e, element, u, phase, base))
            return
        with e.scopes.loop(tx, ZERO, constant(I64, px)) as tap:
            tap.next()
            _each_row(e, node, u, first, lambda element, phase: _copy_row(e, element, u, phase, base))


def _plain_rows(e: Emitter, node: Node, u: Unfolded, first: Value, base: DimLike) -> None:
    """The rows of a plain copy of a channel."""
    (ty, tx), (py, px), (down, across) = u.taps, u.places, u.steps
    row, column, start = map(symbol, ("copy row", "copy column", "copy start"))
    e.bounds.update({"copy row": (0, u.rows() - 1), "copy column": (0, u.row - 1),
                     "copy start": (0, u.height - 1)})
    low, left = py - 1 if down < 0 else 0, px - 1 if across < 0 else 0
    at: dict[str, DimLike] = {u.y: start, ty: row} if down > 1 else {u.y: start + row - low, ty: 0}
    element = e.nodes.substitute(node, {**at, u.x: 0 if across > 1 else column - left,
                                        tx: column if across > 1 else 0})
    end: Value = constant(I64, u.rows())
    if u.height % u.band:
        below = e.b.mul(e.b.sub(constant(I64, u.height - 1), first), abs(down))
        end = e.b.intrinsic("smin", e.b.add(below, py), u.rows())
    place = base + (symbol(u.channel) - symbol("copy channel")) * u.part + row * u.row + column
    with e.scopes.loop("copy row", ZERO, end) as loop:
        loop.next()
        e.scopes.lanes("copy column", ZERO, constant(I64, u.row), u.lanes,
                       _put(e, element, "unfolded ", place))


def _each_row(e: Emitter, node: Node, u: Unfolded, first: Value, body: Callable[[Node, int], None]) -> None:
    """Runs body(element, phase) in a loop over the rows of each phase."""
    b, (py, _) = e.b, u.places
    for phase in range(u.phases):
        row = symbol("copy row") - (py - 1 if u.steps[0] < 0 else 0)
        element = e.nodes.substitute(node, {u.y: row, u.taps[0]: phase})
        end = b.add(first, u.rows(phase))
        if u.band < u.height and u.height % u.band:
            end = b.intrinsic("smin", end, u.height + u.rows(phase) - u.band)
        with e.scopes.loop("copy row", first, end) as loop:
            loop.next()
            body(element, phase)


def _by_row(e: Emitter, element: Node, u: Unfolded, phase: int, base: DimLike) -> None:
    """A row of all copies: the image's row is made once, with its padding, and taken apart then."""
    tx, at = u.taps[1], symbol("copy column")
    e.bounds["copy column"] = (0, u.row - 1)
    whole = e.nodes.substitute(element, {u.x: 0, tx: at})
    e.scopes.lanes("copy column", ZERO, constant(I64, u.row), u.lanes, _put(e, whole, "row ", at))
    index = symbol(u.x) * u.steps[1] + symbol(tx)
    part = e.nodes.make("load", ("row ", (index,), 0), (), dtypes.F32, (index,))
    with e.scopes.loop(tx, ZERO, constant(I64, u.places[1])) as tap:
        tap.next()
        _copy_row(e, part, u, phase, base)


def _copy_row(e: Emitter, element: Node, u: Unfolded, phase: int, base: DimLike) -> None:
    """A row of the copy for a place along x."""
    at = base + u.copy(symbol(u.channel) - symbol("copy channel"), symbol(u.taps[1])) + phase * u.part
    at = at + (symbol("copy row") - symbol("copy start")) * u.width + symbol(u.x)
    count = min(u.lanes, 1 << (u.width - 1).bit_length())
    e.scopes.lanes(u.x, ZERO, constant(I64, u.width), count, _put(e, element, "unfolded ", at))


def _put(e: Emitter, element: Node, name: str, at: DimLike) -> Callable[[list[Value]], list[Value]]:
    """What stores a vector of elements."""

    def body(carry: list[Value]) -> list[Value]:
        lane = e.scopes.lane
        assert lane is not None
        value, address = e.b.splat(e.value(element), lane.count), e.address(name, at)
        if lane.mask is None:
            e.b.store(value, address, align=4)
        else:
            e.b.masked_store(value, address, lane.mask, align=4)
        return []

    return body


class DirectEmitter(AlgorithmEmitter):
    """Emits code of a contraction over an unfolded image."""

    def bind_batch(self, axes: tuple[tuple[str, DimLike], ...], flat: Value) -> None:
        """Binds the variables of the axes to those of iteration `flat`, row-major."""
        e, b = self.e, self.b
        for var, extent in reversed(axes[1:]):
            size = e.scalar(extent)
            rest = b.udiv(flat, size)
            e.scopes.bind(var, b.sub(flat, b.mul(rest, size)))
            flat = rest
        if axes:
            e.scopes.bind(axes[0][0], flat)
