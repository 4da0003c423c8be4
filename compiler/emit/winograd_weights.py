"""The gradient of a convolution of 3 x 3 or 5 x 5 places without stride for its weights, by Winograd's
algorithm: F(3 x 3, 2 x 2) takes 16 multiplications where the definition has 36, F(5 x 5, 2 x 2) 36 for 100.

With d the inputs under a tile of 2 x 2 outputs and g the gradient for these outputs, the tile adds
A'[(G g G') * (B' d B)]A to the gradient of a pair of channels: 16 or 36 matrix products with the tiles of all
images as k, to whose sums A is applied once at the end. A task does this for a group of input channels,
block by block of PANEL tiles: it transforms both operands into scratch, turns the inputs so that channels
are neighbours, and adds the products to the sums, which stay in scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.emit.algorithm import FLOAT, ZERO
from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.cost import UNKNOWN
from graphflow.compiler.emit.operands import algorithm_asked, drop_guard, is_direct, names_of, shared_limit
from graphflow.compiler.emit.packing import axis_values, transpose
from graphflow.compiler.emit.tiling import rows_of_tile
from graphflow.compiler.emit.winograd_matrices import transposed
from graphflow.compiler.emit.winograd_tiles import (
    SIDES,
    TILES_OF_2,
    TileEmitter,
    Tiles,
    depends_on_sum,
    padded,
)
from graphflow.compiler.kernel.form import ContractionKernel, Guard
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, product, symbol
from graphflow.compiler.target import Target

PANEL = 32
"""Tiles of a block."""
_SUMS_BYTES = 5 << 17
"""The sums of a task of several panels of channels take at most so much memory."""
_INPUT, _GRADIENT = 150.0, 55.0
"""Cycles, where there are 16 products, to transform the inputs, and to turn them, or the gradients of a
vector of tiles for a channel."""
_LEAST = 16
"""With fewer channels on either side the transformations cost more than they save."""


@dataclass(frozen=True)
class WinogradWeights:
    """How a contraction is computed so. `pieces`: the batch axes; `image`: the variable and extent of the
    images of a piece, cut by `limit`; `y`, `x`, `out`, `channel`, `taps`: variables of the contraction;
    `height`, `width`, `outs`, `channels`: extents; `side`: places of the kernel along an axis. mr, nr: the
    register tile; `group`: the input channels of a task, a multiple of nr; lanes: of a vector."""

    pieces: tuple[tuple[str, DimLike], ...]
    image: tuple[str, DimLike]
    limit: Guard | None
    y: str
    x: str
    out: str
    channel: str
    taps: tuple[str, str]
    height: int
    width: int
    outs: int
    channels: int
    side: int
    mr: int
    nr: int
    group: int
    lanes: int

    @property
    def places(self) -> Tiles:
        """The tiles of the output."""
        return Tiles(self.height, self.width, PANEL, self.lanes, self.side)

    @property
    def products(self) -> int:
        """Matrix products: multiplications for a tile and a pair of channels."""
        return self.places.window ** 2

    @property
    def m_tiles(self) -> int:
        """Register tiles along the output channels."""
        return -(-self.outs // self.mr)

    @property
    def groups(self) -> int:
        """Groups of input channels."""
        return -(-self.channels // self.group)

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: transformed inputs [product][channel][tile]
        and, turned, [product][tile][channel], transformed gradients [product][out][tile], sums
        [product][out][channel], half-transformed rows [number][parity][plane], and a row of the result."""
        rows = self.m_tiles * self.mr
        sizes = {"inputs ": self.products * self.group * PANEL, "turned ": self.products * PANEL * self.group,
                 "gradients ": self.products * rows * PANEL, "sums ": self.products * rows * self.group,
                 "half ": 2 * self.places.window * self.places.plane,
                 "finished ": self.side ** 2 * self.group}
        return padded(sizes, self.lanes)


def winograd_weights(kernel: ContractionKernel, target: Target) -> WinogradWeights | None:
    """How the kernel is computed so; None where it is no such gradient, its tile names another algorithm, or
    none and this one would gain nothing."""
    c, asked = kernel.contraction, algorithm_asked(kernel)
    axes = len(c.m), len(c.n), len(c.k)
    if kernel.indirect or asked not in (None, TILES_OF_2) or len(c.batch) > 1:
        return None
    if axes not in ((1, 3, 3), (1, 3, 2)):
        return None
    image, ((y, height), (x, width)) = (c.k[0] if len(c.k) == 3 else ("image", 1)), c.k[-2:]
    ((out, outs),), ((channel, channels), *taps) = c.m, c.n
    side = taps[0][1]
    if c.a.dtype != dtypes.F32 or taps[1][1] != side or not isinstance(side, int) or side not in SIDES:
        return None
    if not all(isinstance(d, int) and d > 0 for d in (outs, height, width, channels)):
        return None
    limit = shared_limit(c.a, c.b, c.k)
    a, b = drop_guard(c.a, limit), drop_guard(c.b, limit)
    if not is_direct(kernel, a, (*c.m, *c.k)) or names_of(a) & {v for v, _ in c.n} or out in names_of(b):
        return None
    if not all(depends_on_sum(b, p, t, 1) for p, (t, _) in zip((y, x), taps)):
        return None
    lanes = target.vector_bytes // 4
    assert isinstance(outs, int) and isinstance(channels, int)
    assert isinstance(height, int) and isinstance(width, int)
    nr = 2 * lanes if channels > lanes else lanes
    mr = min(rows_of_tile(outs, nr, lanes, target), outs)
    most = _SUMS_BYTES // (4 * (side + 1) ** 2 * -(-outs // mr) * mr * nr) if c.batch else 1
    panels = max(1, min(-(-channels // nr), most))
    w = WinogradWeights(c.batch, image, limit, y, x, out, channel, (taps[0][0], taps[1][0]),
                        height, width, outs, channels, side, mr, nr, panels * nr, lanes)
    return w if asked or _pays(w) else None


def _pays(w: WinogradWeights) -> bool:
    """Compares rough counts of cycles for a vector of tiles."""
    images = w.image[1] if isinstance(w.image[1], int) else UNKNOWN
    vectors = images * w.places.count / w.lanes
    if min(w.outs, w.channels) < _LEAST or vectors * w.lanes < 2 * PANEL:
        return False
    direct = 4 * w.side ** 2 * w.outs * w.channels * w.height * w.width / (4 * w.places.count)
    fast: float = w.products * w.m_tiles * w.mr * w.groups * w.group
    fast += w.products / 16 * (_INPUT * w.channels + _GRADIENT * w.outs * w.groups)
    fast += w.outs * w.channels * (w.products + 2 * w.side ** 2) / vectors
    return fast < 0.9 * direct


def winograd_weights_tasks(w: WinogradWeights) -> DimLike:
    """The number of tasks: pieces of the images, and groups of channels, the last changing fastest."""
    return product(extent for _, extent in w.pieces) * w.groups


def winograd_weights_scratch(w: WinogradWeights) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())


def emit_winograd_weights(module: Module, kernel: ContractionKernel, target: Target, w: WinogradWeights
                          ) -> None:
    """Adds the kernel's function to the module."""
    _Emission(module, kernel, target, w).emit()


class _Emission(TileEmitter):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradWeights):
        super().__init__(module, kernel, target, w.places)
        self.w = w
        self.rows = w.m_tiles * w.mr

    def emit(self) -> None:
        """The whole function."""
        e, b, w = self.e, self.b, self.w
        _, begin, end, _ = b.params
        self.scratch(w.parts(), {})
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            piece = b.udiv(task.index, constant(I64, w.groups))
            start = b.mul(b.sub(task.index, b.mul(piece, w.groups)), w.group)
            for var, _ in w.pieces:
                e.scopes.bind(var, piece)
            e.scopes.bind("start", start)
            e.scopes.bind("stop", b.intrinsic("smin", b.add(start, w.group), w.channels))
            e.bounds["start"] = (0, w.channels - 1)
            images = e.scalar(w.image[1])
            if w.limit is not None:
                room = e.scalar(w.limit.bound - (w.limit.at - symbol(w.image[0])))
                images = b.intrinsic("smin", images, b.intrinsic("smax", room, 0))
            self._clear()
            total = b.mul(images, w.places.count)
            with e.scopes.loop("first", ZERO, total, PANEL) as first:
                first.next()
                with self.segments(w.image[0], images):
                    self._operands()
                self._turn()
                self._products(b.intrinsic("smin", b.sub(total, first.index), PANEL))
            self._results()
        b.ret()

    def _clear(self) -> None:
        """Sets the sums to 0."""
        e, b, w = self.e, self.b, self.w
        wide = self.type.vector(w.nr)
        with e.scopes.loop("at", ZERO, constant(I64, w.products * self.rows * w.group), w.nr) as loop:
            loop.next()
            b.store(constant(wide, 0), e.address("sums ", symbol("at")), align=64)

    # -- operands ------------------------------------------------------------------------------------------

    def _operands(self) -> None:
        """B' d B and G g G' of one image's tiles in the block."""
        e, w = self.e, self.w
        node = e.nodes.substitute(e.nodes.of(drop_guard(self.c.b, w.limit)), dict.fromkeys(w.taps, 0))
        inputs = [[self.element(node, w.y, w.x, 0, parity, i, w.side - 1) for i in range(w.places.window)]
                  for parity in (0, 1)]
        node = e.nodes.of(drop_guard(self.c.a, w.limit))
        gradients = [[self.element(node, w.y, w.x, 0, parity, i, 0) for i in (0, 1)] for parity in (0, 1)]
        matrices = w.places.matrices

        def place(i: int, name: str, rows: int, row: DimLike) -> Value:
            return e.address(name, (i * rows + row) * PANEL + symbol("column"))

        with e.scopes.loop(w.channel, e.scopes.bound("start"), e.scopes.bound("stop")) as channel:
            channel.next()
            self.transform(inputs, self.change(matrices.b),
                           lambda i: place(i, "inputs ", w.group, symbol(w.channel) - symbol("start")))
        with e.scopes.loop(w.out, ZERO, constant(I64, w.outs)) as out:
            out.next()
            self.transform(gradients, self.change(transposed(matrices.a)),
                           lambda i: place(i, "gradients ", self.rows, symbol(w.out)))

    def _turn(self) -> None:
        """Turns the inputs of the block, in squares of as many channels and tiles as a vector has lanes."""
        e, b, w = self.e, self.b, self.w
        size = w.lanes
        number, row, column = symbol("number"), symbol("row"), symbol("column")
        with e.scopes.loop("number", ZERO, constant(I64, w.products)) as loop:
            loop.next()
            with e.scopes.loop("row", ZERO, constant(I64, w.group), size) as rows:
                rows.next()
                with e.scopes.loop("column", ZERO, constant(I64, PANEL), size) as columns:
                    columns.next()
                    at = (number * w.group + row) * PANEL + column
                    block = [b.load(self.type, e.address("inputs ", at + i * PANEL), align=4 * size)
                             for i in range(size)]
                    to = (number * PANEL + column) * w.group + row
                    for i, vector in enumerate(transpose(e, block)):
                        b.store(vector, e.address("turned ", to + i * w.group), align=4 * size)

    # -- products and results ------------------------------------------------------------------------------

    def _products(self, count: Value) -> None:
        """Adds the products of the block's first `count` tiles."""
        e, b, w = self.e, self.b, self.w
        wide = self.type.vector(w.nr)
        number, panel, row, k = (symbol(name) for name in ("number", "panel", "row", "k"))
        with e.scopes.loop("number", ZERO, constant(I64, w.products)) as loop:
            loop.next()
            with e.scopes.loop("panel", ZERO, constant(I64, w.group), w.nr) as panels:
                panels.next()
                with e.scopes.loop("row", ZERO, constant(I64, self.rows), w.mr) as rows:
                    rows.next()
                    base = (number * self.rows + row) * w.group + panel
                    at = [e.address("sums ", base + r * w.group) for r in range(w.mr)]
                    # A block's products are added up by themselves, so that rounding stays small.
                    with e.scopes.loop("k", ZERO, count, 1, [constant(wide, 0)] * w.mr) as tile:
                        turned = e.address("turned ", (number * PANEL + k) * w.group + panel)
                        right = b.load(wide, turned, align=64)
                        first = (number * self.rows + row) * PANEL + k
                        left = [e.address("gradients ", first + r * PANEL) for r in range(w.mr)]
                        tile.next(*(self.multiply(b.load(FLOAT, x), right, s)
                                    for x, s in zip(left, tile.carry)))
                    for x, total in zip(at, tile.results):
                        b.store(b.add(total, b.load(wide, x, align=64)), x, align=64)

    def _results(self) -> None:
        """A' s A of each pair of channels, and the stores."""
        e, b, w = self.e, self.b, self.w
        e.bounds["flat"] = (0, w.side ** 2 * w.channels - 1)
        with e.scopes.loop(w.out, ZERO, constant(I64, w.outs)) as out:
            out.next()
            with e.scopes.loop("column", ZERO, constant(I64, w.group), w.lanes) as column:
                column.next()
                self._back()
            start, stop = (b.mul(e.scopes.bound(name), w.side ** 2) for name in ("start", "stop"))
            e.scopes.lanes("flat", start, stop, w.lanes, self._store, align=w.lanes)

    def _back(self) -> None:
        """The gradients of one output channel and a vector of input channels."""
        e, b, w = self.e, self.b, self.w

        summed = self.change(transposed(w.places.matrices.g))
        at = symbol(w.out) * w.group + symbol("column")
        columns, n = [], w.places.window
        for j in range(n):
            m = [b.load(self.type, e.address("sums ", (n * i + j) * self.rows * w.group + at), align=4)
                 for i in range(n)]
            columns.append(summed(m))
        first = e.address("finished ", w.side ** 2 * symbol("column"))
        lanes = b.iota(I64.vector(w.lanes), 0, w.side ** 2)
        for r in range(w.side):
            for s, value in enumerate(summed([column[r] for column in columns])):
                b.scatter(value, b.gep(b.gep(first, w.side * r + s, FLOAT), lanes, FLOAT))

    def _store(self, carry: list[Value]) -> list[Value]:
        """The stores of a vector of the result's row."""
        e = self.e
        at = e.address("finished ", symbol("flat") - self.w.side ** 2 * symbol("start"))
        self.store(self.b.load(self.type, at, align=4), axis_values(e, self.c.n, symbol("flat"), ""))
        return []
