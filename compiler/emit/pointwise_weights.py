"""The gradient for the weights of a convolution by 1 x 1, a product with few results and long sums, so that
each image is read once.

A task computes all weights from some images. For a chunk of places, a micro-kernel multiplies `nv` vectors of
output channels, which lie next to each other, by elements of `mr` input channels, and adds to their sums,
which wait in scratch; elements of the next ones are asked for meanwhile. The gradient under a chunk stays in
the first cache for all input channels; nothing is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.emit.algorithm import FLOAT, ZERO, AlgorithmEmitter
from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.direct_image import ALGORITHM
from graphflow.compiler.emit.operands import (
    Axes,
    algorithm_asked,
    coefficient,
    drop_guard,
    load_offset,
    names_of,
    shared_limit,
)
from graphflow.compiler.emit.tiling import whole_lines
from graphflow.compiler.kernel.form import ContractionKernel, Guard, Load
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, product, substitute, symbol
from graphflow.compiler.target import Target

_CHUNK = 112
"""Places that are multiplied between taking sums up and putting them down."""
_VARIANT = 0.02
"""What one more form of the micro-kernel costs, as a share of the time."""
_LINE, _LINES = 16, 8
"""Elements of a cache line, and lines of a chunk of a row, which may begin within one."""


@dataclass(frozen=True)
class PointwiseWeights:
    """How a contraction is computed so. `pieces`: the batch axes, a task each; `images`, `places`: variable
    and extent of the axes of the sum, the images cut by `limit`; `out`, `channel`: the variables of the
    channels, of which there are `outs` and `channels`; mr, nv: the micro-kernel."""

    pieces: Axes
    images: tuple[str, DimLike]
    places: tuple[str, DimLike]
    limit: Guard | None
    out: str
    outs: int
    channel: str
    channels: int
    lanes: int
    mr: int
    nv: int

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: sums [channel][out], and turned ones."""
        sizes = {"sums ": (self.channels + self.lanes) * self.outs, "block ": self.lanes * self.lanes}
        return {name: whole_lines(4 * size) // 4 for name, size in sizes.items()}


def pointwise_weights(kernel: ContractionKernel, target: Target) -> PointwiseWeights | None:
    """How the kernel is computed so; None where it is no such gradient in pieces."""
    c, lanes = kernel.contraction, target.vector_bytes // 4
    if algorithm_asked(kernel) not in (None, ALGORITHM) or kernel.indirect or c.a.dtype != dtypes.F32:
        return None
    if not c.batch or (len(c.m), len(c.n), len(c.k)) != (1, 1, 2):
        return None
    ((out, outs),), ((channel, channels),) = c.m, c.n
    if not isinstance(outs, int) or not isinstance(channels, int) or min(outs, channels) <= 0 or outs % lanes:
        return None
    limit = shared_limit(c.a, c.b, c.k)
    a, b = drop_guard(c.a, limit), drop_guard(c.b, limit)
    above, below = load_offset(kernel, a), load_offset(kernel, b)
    if above is None or below is None or coefficient(above, out) != 1:
        return None
    if channel in names_of(a) or out in names_of(b) or 4 * outs * channels > target.l2 // 4:
        return None
    mr, nv = _micro_kernel(outs // lanes, channels, target)
    return PointwiseWeights(c.batch, c.k[0], c.k[1], limit, out, outs, channel, channels, lanes, mr, nv)


def _micro_kernel(vectors: int, channels: int, target: Target) -> tuple[int, int]:
    """(input channels, vectors of output channels): the products of a tile, or what it reads, and its loop;
    the channels that are left over are a smaller tile."""

    def total(mr: int, nv: int) -> float:
        tiles = [(n, r) for n, r in ((channels // mr, mr), (1, channels % mr)) if n and r]
        time = sum(n * (1 + max(r * nv, nv + r / 2, 8)) for n, r in tiles) * (vectors // nv)
        return time * (1 + _VARIANT * len(tiles))

    choices = [(mr, nv) for nv in (4, 3, 2, 1) for mr in range(min(channels, 16), 0, -1)
               if vectors % nv == 0 and mr * nv + nv + 1 <= target.vector_registers]
    return min(choices, key=lambda c: total(*c))


def pointwise_weights_tasks(d: PointwiseWeights) -> DimLike:
    """The number of tasks: pieces of the images."""
    return product(extent for _, extent in d.pieces)


def pointwise_weights_scratch(d: PointwiseWeights) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(d.parts().values())


def emit_pointwise_weights(module: Module, kernel: ContractionKernel, target: Target, d: PointwiseWeights
                           ) -> None:
    """Adds the kernel's function to the module."""
    _PointwiseWeights(module, kernel, target, d).emit()


class _PointwiseWeights(AlgorithmEmitter):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, d: PointwiseWeights):
        super().__init__(module, kernel, target, d.lanes)
        self.d = d
        self.e.bounds.update({"start": (0, d.channels - 1), "m start": (0, d.outs - 1), "chunk": (0, None),
                              "ahead": (0, None), "behind": (0, None)})
        self.above, self.below = (drop_guard(x, d.limit) for x in (self.c.a, self.c.b))

    def emit(self) -> None:
        """The whole function."""
        e, b, d = self.e, self.b, self.d
        _, begin, end, _ = b.params
        self.scratch(d.parts(), {})
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            flat = task.index
            for var, extent in reversed(d.pieces[1:]):
                rest = b.udiv(flat, e.scalar(extent))
                e.scopes.bind(var, b.sub(flat, b.mul(rest, e.scalar(extent))))
                flat = rest
            e.scopes.bind(d.pieces[0][0], flat)
            with e.scopes.loop("at", ZERO, constant(I64, d.channels * d.outs), d.lanes) as at:
                at.next()
                b.store(constant(self.type, 0), e.address("sums ", symbol("at")), align=4 * d.lanes)
            images, places = e.scalar(d.images[1]), e.scalar(d.places[1])
            if d.limit is not None:
                room = e.scalar(d.limit.bound - (d.limit.at - symbol(d.images[0])))
                images = b.intrinsic("smin", images, b.intrinsic("smax", room, 0))
            with e.scopes.loop(d.images[0], ZERO, images) as image:
                image.next()
                with e.scopes.loop("chunk", ZERO, places, _CHUNK) as chunk:
                    chunk.next()
                    self._chunk(chunk.index, b.intrinsic("smin", b.add(chunk.index, _CHUNK), places))
            self._results()
        b.ret()

    def _chunk(self, first: Value, last: Value) -> None:
        """Adds the products of the places [first, last) of an image."""
        e, d = self.e, self.d
        whole = d.channels // d.mr * d.mr
        with e.scopes.loop("m start", ZERO, constant(I64, d.outs), d.nv * d.lanes) as out:
            out.next()
            with e.scopes.loop("start", ZERO, constant(I64, whole), d.mr) as start:
                start.next()
                self._tile(d.mr, first, last)
            if d.channels > whole:
                with e.scopes.block("start", constant(I64, whole)):
                    self._tile(d.channels - whole, first, last)

    def _tile(self, mr: int, first: Value, last: Value) -> None:
        e, b, d = self.e, self.b, self.d
        next_start = b.add(e.scopes.bound("start"), mr)
        there = b.compare("lt", next_start, d.channels)            # else the next chunk comes
        e.scopes.bind("ahead", b.select(there, next_start, ZERO))
        e.scopes.bind("behind", b.select(there, first, last))
        outs = [symbol("m start") + v * d.lanes for v in range(d.nv)]
        rows = [symbol("start") + r for r in range(mr)]
        sums = [e.address("sums ", row * d.outs + at) for row in rows for at in outs]
        before = [b.load(self.type, x, align=4 * d.lanes) for x in sums]
        with e.scopes.loop(d.places[0], first, last, 1, before) as place:
            right = [b.load(self.type, self._element(self.above, {d.out: at}), align=4) for at in outs]
            left = [b.load(FLOAT, self._element(self.below, {d.channel: row})) for row in rows]
            self._ask(b.sub(place.index, first))
            pairs = [(b.splat(x, d.lanes), y) for x in left for y in right]
            place.next(*(self.multiply(x, y, total) for (x, y), total in zip(pairs, place.carry)))
        for address, total in zip(sums, place.results):
            b.store(total, address, align=4 * d.lanes)

    def _element(self, load: object, values: dict[str, DimLike]) -> Value:
        """The address of what a load reads, with these values of variables."""
        offset = load_offset(self.kernel, load) if isinstance(load, Load) else None
        assert isinstance(load, Load) and offset is not None
        return self.e.address(load.arg, substitute(offset, values))

    def _ask(self, step: Value) -> None:
        """For lines of the next rows of an image, where they are rows: one at each step."""
        e, d = self.e, self.d
        load = self.below
        offset = load_offset(self.kernel, load)
        assert isinstance(load, Load) and offset is not None
        if coefficient(offset, d.places[0]) != 1:
            return
        e.scopes.bind("asked", step)
        e.bounds["asked"] = (0, _CHUNK - 1)
        row, column = symbol("asked") // _LINES, symbol("asked") % _LINES * _LINE
        e.prefetch(load.arg, substitute(offset, {d.channel: symbol("ahead") + row,
                                                 d.places[0]: symbol("behind") + column}))

    def _results(self) -> None:
        """The stores, with vectors along the input channels."""
        e, d = self.e, self.d
        e.bounds[d.out] = (0, d.outs - 1)

        def body(carry: list[Value]) -> list[Value]:
            at = symbol(d.channel) * d.outs + symbol("m start")
            self.store_turned(at, d.outs, d.out, outs.index, {})
            return []

        with e.scopes.loop("m start", ZERO, constant(I64, d.outs), d.lanes) as outs:
            outs.next()
            e.scopes.lanes(d.channel, ZERO, constant(I64, d.channels), d.lanes, body, masked_only=True)
