"""The gradient for the weights of a convolution by its definition, for few channels.

A weight's gradient is the product, summed over all places, of the gradient for its output channel and the
image under it. Both run along neighbouring places once the image is unfolded along x (see `direct_image`), so
a micro-kernel keeps `mr` output channels x `taps` places along y of the kernel as sums of a whole vector
each, and loads nothing but whole vectors. A task does so for a group of input channels, image by image; the
sums wait in scratch between images, and their lanes are added at the end, by a tree.

Where the output channels lie next to each other instead, vectors run along them: for each place, the
micro-kernel multiplies vectors of the gradient by as many elements of the unfolded image as it has weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from graphflow.compiler.emit.algorithm import FLOAT, ZERO
from graphflow.compiler.emit.builder import I64, Loop, Module, Value, constant
from graphflow.compiler.emit.cost import trips
from graphflow.compiler.emit.direct_image import (
    ALGORITHM,
    DirectEmitter,
    Unfolded,
    steps_of,
    unfold_image,
    unfolded,
)
from graphflow.compiler.emit.operands import (
    algorithm_asked,
    coefficient,
    drop_guard,
    is_direct,
    load_offset,
    names_of,
    shared_limit,
)
from graphflow.compiler.emit.packing import axis_values
from graphflow.compiler.emit.tiling import whole_lines
from graphflow.compiler.kernel.form import ContractionKernel, Guard, Guarded, Load
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, product, substitute, symbol
from graphflow.compiler.target import Target

ROW, COLUMN = "output row", "output column"
"""The names of a place of the gradient."""
_TASK_CYCLES = 40_000
"""A task has as many channels as make about so many cycles."""
_CHAIN = 32
"""So many vectors of places are multiplied between taking sums up and putting them down, if they fit the
cache."""
_LEAST_VECTORS = 6
"""With fewer vectors of places to an image, sums are taken up and put down too often."""


@dataclass(frozen=True)
class DirectWeights:
    """How a contraction is computed so. `pieces`: the batch axes; `images`: the variable and extent of the
    images of a piece, cut by `limit`; `image`: the unfolded image, whose `channels` are those of a task, of
    `channels` in all; `out`, `outs`: the variable and extent of the output channels; `last`: they lie next to
    each other. `block`: images that are unfolded at a time. `micro`: the micro-kernel's output channels
    (vectors of them, if `last`), places along x and along y of the kernel."""

    pieces: tuple[tuple[str, DimLike], ...]
    images: tuple[str, DimLike]
    limit: Guard | None
    image: Unfolded
    out: str
    outs: int
    channels: int
    last: bool
    block: int
    micro: tuple[int, int, int]

    @property
    def groups(self) -> int:
        """Groups of input channels."""
        return -(-self.channels // self.image.channels)

    @property
    def weights(self) -> int:
        """Weights of a pair of channels."""
        return self.image.places[0] * self.image.places[1]

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: the unfolded image, and a vector of sums for each
        weight, [out][channel][place y][place x]; or, if `last`, a sum, [channel][place y][place x][out], and
        turned sums."""
        lanes = self.image.lanes
        weights = self.image.channels * self.weights
        sizes = self.image.parts()
        sizes["unfolded "] *= self.block
        if self.last:
            sizes |= {"sums ": (weights + lanes) * self.outs, "block ": lanes * lanes}
        else:
            sizes |= {"sums ": (self.outs * weights + lanes) * lanes}
        return {name: whole_lines(4 * size) // 4 for name, size in sizes.items()}


def direct_weights(kernel: ContractionKernel, target: Target) -> DirectWeights | None:
    """How the kernel is computed so; None where it is no such gradient, or a contraction is faster."""
    asked = algorithm_asked(kernel)
    found = applies(kernel, target) if asked in (None, ALGORITHM) else None
    return found if found is not None and (asked == ALGORITHM or pays(found)) else None


def applies(kernel: ContractionKernel, target: Target) -> DirectWeights | None:
    """How the kernel is computed so, if it can be."""
    c = kernel.contraction
    if kernel.indirect or len(c.m) != 1 or len(c.n) not in (2, 3) or len(c.k) not in (2, 3):
        return None
    images, ((y, height), (x, width)) = (c.k[0] if len(c.k) == 3 else ("image", 1)), c.k[-2:]
    (channel, channels), (ty, py), (tx, px) = (("channel", 1), *c.n)[-3:]
    ((out, outs),) = c.m
    if not all(isinstance(d, int) and d > 0 for d in (outs, height, width, channels, py, px)):
        return None
    limit = shared_limit(c.a, c.b, c.k)
    a, b = drop_guard(c.a, limit), drop_guard(c.b, limit)
    if not is_direct(kernel, a, (*c.m, *c.k)) or names_of(a) & {v for v, _ in c.n} or out in names_of(b):
        return None
    offset = load_offset(kernel, a)
    steps = steps_of(b, (y, x), (ty, tx))
    if c.a.dtype != dtypes.F32 or offset is None or steps is None or min(steps) < 0 or py * px == 1:
        return None
    assert isinstance(outs, int) and isinstance(height, int) and isinstance(width, int)
    assert isinstance(channels, int) and isinstance(py, int) and isinstance(px, int)
    inner = load_offset(kernel, b.value if isinstance(b, Guarded) else b)
    if inner is None or coefficient(inner, x) not in (1, 2, 3, 4):
        return None
    lanes = target.vector_bytes // 4
    step = coefficient(offset, x)
    if not isinstance(step, int) or height > 1 and coefficient(offset, y) != step * width:
        return None
    last = step > 1 and coefficient(offset, out) == 1 and outs % lanes == 0
    if step > 1 and not last:
        return None
    group = max(1, min(channels, target.l2 // 4 // (4 * (1 if last else lanes) * outs * py * px)))
    cycles = max(trips(images[1]), 1) * outs * py * px * height * width / lanes            # of one channel
    group = min(group, max(1, round(_TASK_CYCLES / cycles)))
    group = -(-channels // -(-channels // group))
    image = unfolded((y, height), (x, width), (channel, group), ((ty, py), (tx, px)), steps, lanes,
                     target.l2 // 4, plain=last)
    if image is None:
        return None
    micro = _vectors_of_outs(outs // lanes, py, px, target) if last else _vectors_of_places(outs, py, target)
    vectors = -(-height * width // lanes)
    few = max(1, min(_CHAIN // vectors, target.l1 // 2 // (4 * image.size)))
    block = 1 if last or image.band < height else few
    return DirectWeights(c.batch, images, limit, image, out, outs, channels, last, block, micro)


def _vectors_of_places(outs: int, places: int, target: Target) -> tuple[int, int, int]:
    """The micro-kernel of vectors along places: what a tile takes is the products, or what it reads."""

    def total(mr: int, taps: int) -> float:
        tiles = [(n, r) for n, r in ((outs // mr, mr), (1, outs % mr)) if n and r]
        parts = [(n, t) for n, t in ((places // taps, taps), (1, places % taps)) if n and t]
        return sum(n * p * max(r * t, r + 1.7 * t, 5) for n, r in tiles for p, t in parts)

    choices = [(mr, taps) for taps in range(1, min(places, 8) + 1) for mr in range(1, min(outs, 12) + 1)
               if mr * taps + min(mr, taps) + 1 <= target.vector_registers]
    mr, taps = min(choices, key=lambda c: total(*c))
    return mr, 1, taps


def _vectors_of_outs(vectors: int, py: int, px: int, target: Target) -> tuple[int, int, int]:
    """The micro-kernel of vectors along output channels."""

    def total(nv: int, across: int, down: int) -> float:
        parts = [(n, t) for n, t in ((py // down, down), (1, py % down)) if n and t]
        tile = sum(n * (1 + max(nv * across * t, nv + across * t / 2, 5)) for n, t in parts)
        return vectors // nv * (px // across) * tile              # one cycle more for each tile: its loop

    choices = [(nv, across, down) for nv in (4, 3, 2, 1) for across in range(1, px + 1)
               for down in ([py] if across > 1 else range(1, py + 1))
               if vectors % nv == 0 and px % across == 0
               and nv * across * down + nv + 1 <= target.vector_registers]
    return min(choices, key=lambda c: total(*c))


def pays(d: DirectWeights) -> bool:
    """Whether there are places enough."""
    return d.last or -(-d.image.band * d.image.width // d.image.lanes) >= _LEAST_VECTORS


def direct_weights_tasks(d: DirectWeights) -> DimLike:
    """The number of tasks: pieces of the images, and groups of channels, the last changing fastest."""
    return product(extent for _, extent in d.pieces) * d.groups


def direct_weights_scratch(d: DirectWeights) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(d.parts().values())


def emit_direct_weights(module: Module, kernel: ContractionKernel, target: Target, d: DirectWeights) -> None:
    """Adds the kernel's function to the module."""
    (_AlongOuts if d.last else _AlongPlaces)(module, kernel, target, d).emit()


class _Emission(DirectEmitter):
    """What does not depend on where vectors run: tasks, images and bands."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, d: DirectWeights):
        super().__init__(module, kernel, target, d.image.lanes)
        self.d = d
        self.e.bounds.update({"start": (0, d.channels - 1), "m start": (0, d.outs - 1),
                              "flat": (0, d.channels * d.weights - 1)})

    def emit(self) -> None:
        """The whole function."""
        e, b, d, u = self.e, self.b, self.d, self.d.image
        _, begin, end, _ = b.params
        self.scratch(d.parts(), {})
        node = e.nodes.of(drop_guard(self.c.b, d.limit))
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            piece = b.udiv(task.index, constant(I64, d.groups))
            start = b.mul(b.sub(task.index, b.mul(piece, d.groups)), u.channels)
            self.bind_batch(d.pieces, piece)
            e.scopes.bind("start", start)
            stop = b.intrinsic("smin", b.add(start, u.channels), d.channels)
            images = e.scalar(d.images[1])
            if d.limit is not None:
                room = e.scalar(d.limit.bound - (d.limit.at - symbol(d.images[0])))
                images = b.intrinsic("smin", images, b.intrinsic("smax", room, 0))
            self._clear()
            with e.scopes.loop("block", ZERO, images, d.block) as block:
                block.next()
                e.scopes.bind("block end", b.intrinsic("smin", b.add(block.index, d.block), images))
                with e.scopes.loop("band", ZERO, constant(I64, u.height), u.band) as band:
                    band.next()
                    with self._images([]) as image:
                        image.next()
                        unfold_image(e, node, u, band.index, start, stop, self._base())
                    end = b.intrinsic("smin", b.add(band.index, u.band), u.height)
                    self._tiles(b.sub(stop, start), band.index, end)
            self._results(start, stop)
        b.ret()

    def _images(self, carry: list[Value]) -> AbstractContextManager[Loop]:
        """A loop over the images of a block."""
        bound = self.e.scopes.bound
        return self.e.scopes.loop(self.d.images[0], bound("block"), bound("block end"), 1, carry)

    def _base(self) -> DimLike:
        """The first element in scratch of the current image."""
        return (symbol(self.d.images[0]) - symbol("block")) * self.d.image.size if self.d.block > 1 else 0

    def _clear(self) -> None:
        """Sets the sums to 0."""
        e, b, d, u = self.e, self.b, self.d, self.d.image
        count = d.outs * u.channels * d.weights * (1 if d.last else u.lanes)
        with e.scopes.loop("at", ZERO, constant(I64, count), u.lanes) as loop:
            loop.next()
            b.store(constant(self.type, 0), e.address("sums ", symbol("at")), align=4 * u.lanes)

    def _tiles(self, channels: Value, first: Value, last: Value) -> None:
        """Adds the products of the rows [first, last) of an image."""
        raise NotImplementedError

    def _results(self, start: Value, stop: Value) -> None:
        """The stores of the channels [start, stop)."""
        raise NotImplementedError


class _AlongPlaces(_Emission):
    def _tiles(self, channels: Value, first: Value, last: Value) -> None:
        e, d, u = self.e, self.d, self.d.image
        (mr, _, taps), (py, px) = d.micro, u.places
        first, last = self.b.mul(first, u.width), self.b.mul(last, u.width)
        e.scopes.bind("band start", first)
        whole = d.outs // mr * mr
        e.bounds.update({"group channel": (0, u.channels - 1), "tap x": (0, px - 1)})

        def tile(mr: int) -> None:
            with e.scopes.loop("group channel", ZERO, channels) as channel:
                channel.next()
                with e.scopes.loop("tap x", ZERO, constant(I64, px)) as tap:
                    tap.next()
                    for at in range(0, py, taps):
                        self._tile(mr, range(at, min(at + taps, py)), first, last)

        with e.scopes.loop("m start", ZERO, constant(I64, whole), mr) as rows:
            rows.next()
            tile(mr)
        if d.outs > whole:
            with e.scopes.block("m start", constant(I64, whole)):
                tile(d.outs - whole)

    def _tile(self, mr: int, taps: range, first: Value, last: Value) -> None:
        e, b, d, u = self.e, self.b, self.d, self.d.image
        ((channel, tap), (py, px)) = (symbol("group channel"), symbol("tap x")), u.places
        node = e.nodes.of(drop_guard(self.c.a, d.limit))
        rows = [e.nodes.substitute(node, {d.out: symbol("m start") + r,
                                          **axis_values(e, ((u.y, u.height), (u.x, u.width)),
                                                        symbol("column"), "")}) for r in range(mr)]
        at = [e.address("sums ", ((((symbol("m start") + r) * u.channels + channel) * py + t) * px + tap)
                        * u.lanes) for r in range(mr) for t in taps]

        def body(carry: list[Value]) -> list[Value]:
            lane = e.scopes.lane
            assert lane is not None
            left = [e.value(x) for x in rows]
            place = self._base() + u.copy(channel, tap) + symbol("column") - symbol("band start")
            right = [e.address("unfolded ", place + u.below(t)) for t in taps]
            found = [b.load(self.type, x, align=4) if lane.mask is None else
                     b.masked_load(self.type, x, lane.mask, 0, align=4) for x in right]
            return [self.multiply(x, y, total) for (x, y), total in
                    zip(((x, y) for x in left for y in found), carry)]

        e.bounds["column"] = (0, u.height * u.width - 1)
        before = [b.load(self.type, x, align=4 * u.lanes) for x in at]
        with self._images(before) as image:
            image.next(*e.scopes.lanes("column", first, last, u.lanes, body, image.carry, align=1))
        for x, total in zip(at, image.results):
            b.store(total, x, align=4 * u.lanes)

    def _results(self, start: Value, stop: Value) -> None:
        e, b, d, u = self.e, self.b, self.d, self.d.image
        e.bounds[d.out] = (0, d.outs - 1)

        def body(carry: list[Value]) -> list[Value]:
            at = symbol(d.out) * (u.channels * d.weights) + symbol("flat") - symbol("start") * d.weights
            vectors = [b.load(self.type, e.address("sums ", (at + i) * u.lanes), align=4 * u.lanes)
                       for i in range(u.lanes)]
            self.store(self._added(vectors), axis_values(e, self.c.n, symbol("flat"), ""))
            return []

        with e.scopes.loop(d.out, ZERO, constant(I64, d.outs)) as out:
            out.next()
            e.scopes.lanes("flat", b.mul(start, d.weights), b.mul(stop, d.weights), u.lanes, body,
                           masked_only=True, align=1)

    def _added(self, vectors: list[Value]) -> Value:
        """The sum of the lanes of each vector, side by side."""
        b, size = self.b, len(vectors)
        width = size                # lanes that belong to one of the vectors in each of those that are left
        while len(vectors) > 1:
            starts = [x for x in range(0, 2 * size, width)]
            low = [s + i for s in starts for i in range(width // 2)]
            high = [s + width // 2 + i for s in starts for i in range(width // 2)]
            vectors = [b.add(b.shuffle(x, y, low), b.shuffle(x, y, high))
                       for x, y in zip(vectors[0::2], vectors[1::2])]
            width //= 2
        return vectors[0]


class _AlongOuts(_Emission):
    def _tiles(self, channels: Value, first: Value, last: Value) -> None:
        e, d, u = self.e, self.d, self.d.image
        (nv, across, down), (py, px) = d.micro, u.places
        e.bounds.update({"group channel": (0, u.channels - 1), "tap x": (0, px - 1), ROW: (0, u.height - 1),
                         COLUMN: (0, u.width - 1)})
        e.scopes.bind("copy start", first)
        places = max(e.target.l1 // 2 // (4 * d.outs), 16)        # the gradient under them stays in the cache
        high, wide = max(places // u.width, 1), -(-u.width // -(-u.width // places))
        with (e.scopes.loop("rows", first, last, high) as rows,
              e.scopes.loop("columns", ZERO, constant(I64, u.width), wide) as columns,
              e.scopes.loop("m start", ZERO, constant(I64, d.outs), nv * u.lanes) as outs,
              e.scopes.loop("group channel", ZERO, channels) as channel,
              e.scopes.loop("tap x", ZERO, constant(I64, px), across) as tap):
            for loop in (rows, columns, outs, channel, tap):
                loop.next()
            ends = (e.b.intrinsic("smin", e.b.add(rows.index, high), last),
                    e.b.intrinsic("smin", e.b.add(columns.index, wide), u.width))
            for at in range(0, py, down):
                taps = [(t, x) for x in range(across) for t in range(at, min(at + down, py))]
                self._tile(taps, (rows.index, columns.index), ends)

    def _tile(self, taps: Sequence[tuple[int, int]], starts: tuple[Value, Value], ends: tuple[Value, Value]
              ) -> None:
        """Adds the products of some places (y, x) of the kernel, for a rectangle of the gradient."""
        e, b, d, u = self.e, self.b, self.d, self.d.image
        channel, tap, nv, (py, px) = symbol("group channel"), symbol("tap x"), d.micro[0], u.places
        load = drop_guard(self.c.a, d.limit)
        offset = load_offset(self.kernel, load)
        assert isinstance(load, Load) and offset is not None
        outs = [symbol("m start") + v * u.lanes for v in range(nv)]
        sums = [e.address("sums ", ((channel * py + t) * px + tap + x) * d.outs + out)
                for t, x in taps for out in outs]
        before = [b.load(self.type, x, align=4 * u.lanes) for x in sums]
        with self._images(before) as image:
            with e.scopes.loop(ROW, starts[0], ends[0], 1, image.carry) as row:
                with e.scopes.loop(COLUMN, starts[1], ends[1], 1, row.carry) as place:
                    here: dict[str, DimLike] = {u.y: symbol(ROW), u.x: symbol(COLUMN)}
                    where = [substitute(offset, {**here, d.out: out}) for out in outs]
                    right = [b.load(self.type, e.address(load.arg, x), align=4) for x in where]
                    at = u.under(symbol(ROW) - symbol("copy start"), symbol(COLUMN))
                    left = [b.load(FLOAT, e.address("unfolded ", u.copy(channel, tap + x) + at + u.below(t)))
                            for t, x in taps]
                    pairs = [(b.splat(x, u.lanes), y) for x in left for y in right]
                    place.next(*(self.multiply(x, y, total) for (x, y), total in zip(pairs, place.carry)))
                row.next(*place.results)
            image.next(*row.results)
        for address, total in zip(sums, image.results):
            b.store(total, address, align=4 * u.lanes)

    def _results(self, start: Value, stop: Value) -> None:
        e, b, d, u = self.e, self.b, self.d, self.d.image
        e.bounds.update({"m start": (0, d.outs - 1), d.out: (0, d.outs - 1)})

        def body(carry: list[Value]) -> list[Value]:
            at = (symbol("flat") - symbol("start") * d.weights) * d.outs + symbol("m start")
            self.store_turned(at, d.outs, d.out, outs.index, axis_values(e, self.c.n, symbol("flat"), ""))
            return []

        with e.scopes.loop("m start", ZERO, constant(I64, d.outs), u.lanes) as outs:
            outs.next()
            e.scopes.lanes("flat", b.mul(start, d.weights), b.mul(stop, d.weights), u.lanes, body,
                           masked_only=True, align=1)
