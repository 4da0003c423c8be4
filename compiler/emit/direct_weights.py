"""The gradient for the weights of a convolution by its definition, for few channels.

A weight's gradient is the product, summed over all places, of the gradient for its output channel and the
image under it. Both run along neighbouring places once the image is unfolded along x (see `direct_image`), so
a micro-kernel keeps `mr` output channels x `taps` places along y of the kernel as sums of a whole vector
each, and loads nothing but whole vectors. A task does so for a group of input channels, image by image; the
sums wait in scratch between images, and their lanes are added at the end, by a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.cost import trips
from graphflow.compiler.emit.direct_image import (
    ALGORITHM,
    ZERO,
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
from graphflow.compiler.kernel.form import ContractionKernel, Guard, Guarded
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, product, symbol
from graphflow.compiler.target import Target

_TASK_CYCLES = 40_000
"""A task has as many channels as make about so many cycles."""
_LEAST_VECTORS = 6
"""With fewer vectors of places to an image, sums are taken up and put down too often."""


@dataclass(frozen=True)
class DirectWeights:
    """How a contraction is computed so. `pieces`: the batch axes; `images`: the variable and extent of the
    images of a piece, cut by `limit`; `image`: the unfolded image, whose `channels` are those of a task, of
    `channels` in all; `out`, `outs`: the variable and extent of the output channels. mr, taps: the
    micro-kernel."""

    pieces: tuple[tuple[str, DimLike], ...]
    images: tuple[str, DimLike]
    limit: Guard | None
    image: Unfolded
    out: str
    outs: int
    channels: int
    mr: int
    taps: int

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
        weight, [out][channel][place y][place x]."""
        lanes = self.image.lanes
        sizes = {"unfolded ": self.image.size + lanes,
                 "sums ": (self.outs * self.image.channels * self.weights + lanes) * lanes}
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
    if coefficient(offset, x) != 1 or height > 1 and coefficient(offset, y) != width:
        return None
    inner = load_offset(kernel, b.value if isinstance(b, Guarded) else b)
    if inner is None or coefficient(inner, x) not in (1, 2, 3, 4):
        return None
    lanes = target.vector_bytes // 4
    group = max(1, min(channels, target.l2 // 4 // (4 * lanes * outs * py * px)))
    cycles = max(trips(images[1]), 1) * outs * py * px * height * width / lanes            # of one channel
    group = min(group, max(1, round(_TASK_CYCLES / max(cycles, 1))))
    group = -(-channels // -(-channels // group))
    image = unfolded((y, height), (x, width), (channel, group), ((ty, py), (tx, px)), steps, lanes,
                     target.l2 // 4)
    if image is None:
        return None
    mr, taps = _micro_kernel(outs, py, target)
    return DirectWeights(c.batch, images, limit, image, out, outs, channels, mr, taps)


def _micro_kernel(outs: int, places: int, target: Target) -> tuple[int, int]:
    """(output channels, places along y) of the micro-kernel: what a tile takes is the products, or what it
    reads."""

    def total(mr: int, taps: int) -> float:
        tiles = [(n, r) for n, r in ((outs // mr, mr), (1, outs % mr)) if n and r]
        parts = [(n, t) for n, t in ((places // taps, taps), (1, places % taps)) if n and t]
        return sum(n * p * max(r * t, r + 1.7 * t, 5) for n, r in tiles for p, t in parts)

    choices = [(mr, taps) for taps in range(1, min(places, 8) + 1) for mr in range(1, min(outs, 12) + 1)
               if mr * taps + min(mr, taps) + 1 <= target.vector_registers]
    return min(choices, key=lambda c: total(*c))


def pays(d: DirectWeights) -> bool:
    """Whether there are places enough."""
    return -(-d.image.band * d.image.width // d.image.lanes) >= _LEAST_VECTORS


def direct_weights_tasks(d: DirectWeights) -> DimLike:
    """The number of tasks: pieces of the images, and groups of channels, the last changing fastest."""
    return product(extent for _, extent in d.pieces) * d.groups


def direct_weights_scratch(d: DirectWeights) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(d.parts().values())


def emit_direct_weights(module: Module, kernel: ContractionKernel, target: Target, d: DirectWeights) -> None:
    """Adds the kernel's function to the module."""
    _Emission(module, kernel, target, d).emit()


class _Emission(DirectEmitter):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, d: DirectWeights):
        super().__init__(module, kernel, target, d.image)
        self.d = d
        self.e.bounds.update({"start": (0, d.channels - 1), "m start": (0, d.outs - 1),
                              "flat": (0, d.channels * d.weights - 1)})

    def emit(self) -> None:
        """The whole function."""
        e, b, d, u = self.e, self.b, self.d, self.d.image
        _, begin, end, _ = b.params
        self.scratch(d.parts())
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
            with e.scopes.loop(d.images[0], ZERO, images) as image:
                image.next()
                with e.scopes.loop("band", ZERO, constant(I64, u.height), u.band) as band:
                    band.next()
                    unfold_image(e, node, u, band.index, start, stop)
                    first = b.mul(band.index, u.width)
                    e.scopes.bind("band start", first)
                    last = b.intrinsic("smin", b.add(first, u.band * u.width), u.height * u.width)
                    self._tiles(b.sub(stop, start), first, last)
            self._results(start, stop)
        b.ret()

    def _clear(self) -> None:
        """Sets the sums to 0."""
        e, b, u = self.e, self.b, self.d.image
        count = self.d.outs * u.channels * self.d.weights
        with e.scopes.loop("at", ZERO, constant(I64, count * u.lanes), u.lanes) as loop:
            loop.next()
            b.store(constant(self.type, 0), e.address("sums ", symbol("at")), align=4 * u.lanes)

    # -- products ------------------------------------------------------------------------------------------

    def _tiles(self, channels: Value, first: Value, last: Value) -> None:
        """Adds the products of the places [first, last) of an image."""
        e, d, u = self.e, self.d, self.d.image
        whole, (py, px) = d.outs // d.mr * d.mr, u.places
        e.bounds.update({"group channel": (0, u.channels - 1), "tap x": (0, px - 1)})

        def tile(mr: int) -> None:
            with e.scopes.loop("group channel", ZERO, channels) as channel:
                channel.next()
                with e.scopes.loop("tap x", ZERO, constant(I64, px)) as tap:
                    tap.next()
                    for at in range(0, py, d.taps):
                        self._tile(mr, range(at, min(at + d.taps, py)), first, last)

        with e.scopes.loop("m start", ZERO, constant(I64, whole), d.mr) as rows:
            rows.next()
            tile(d.mr)
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
            place = u.copy(channel, tap) + symbol("column") - symbol("band start")
            right = [e.address("unfolded ", place + u.below(t)) for t in taps]
            found = [b.load(self.type, x, align=4) if lane.mask is None else
                     b.masked_load(self.type, x, lane.mask, 0, align=4) for x in right]
            return [self.multiply(x, y, total) for (x, y), total in
                    zip(((x, y) for x in left for y in found), carry)]

        e.bounds["column"] = (0, u.height * u.width - 1)
        before = [b.load(self.type, x, align=4 * u.lanes) for x in at]
        sums = e.scopes.lanes("column", first, last, u.lanes, body, before, align=1)
        for x, total in zip(at, sums):
            b.store(total, x, align=4 * u.lanes)

    # -- results -------------------------------------------------------------------------------------------

    def _results(self, start: Value, stop: Value) -> None:
        """The sums of all lanes, and the stores."""
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
