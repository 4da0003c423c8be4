"""Convolutions of 3 x 3 and 5 x 5 places without stride by Winograd's algorithm: F(2 x 2, 3 x 3) takes 16
multiplications where the definition has 36, and F(2 x 2, 5 x 5) takes 36 for 100 (A. Lavin, S. Gray, Fast
Algorithms for Convolutional Neural Networks, 2015).

The output is cut into tiles of 2 x 2. With d the inputs of a tile and g the weights of a pair of channels,
the tile is A'[(G g G') * (B' d B)]A, summed over the input channels before A is applied: 16 or 36 matrix
products with the channels as k and the tiles as n. A function of its own, which runs before, transforms the
weights into scratch. The rest stays within a task: a panel of `nr` tiles is transformed into scratch, a
micro-kernel multiplies, and what the transformation back gives are finished sums for the kernel's stores.

The form of the kernel does not change: this is one way to compute a contraction that happens to be such a
convolution, or the gradient of one for its input. It rounds about as much as the definition does. An
infinite input makes NaN of its whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphflow.compiler.emit.algorithm import FLOAT, ZERO
from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.cost import UNKNOWN
from graphflow.compiler.emit.operands import algorithm_asked, is_direct, names_of
from graphflow.compiler.emit.tiling import rows_of_tile
from graphflow.compiler.emit.winograd_tiles import (
    SIDES,
    TILES_OF_2,
    TileEmitter,
    Tiles,
    depends_on_sum,
    padded,
)
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, ceildiv, symbol
from graphflow.compiler.target import Target

_INPUT, _OUTPUT, _WEIGHT, _STREAM = 90.0, 130.0, 20.0, 0.95
"""Cycles where there are 16 products: to transform the inputs of a vector of tiles, for a channel; to
transform its sums back and store them; to transform the weights of a pair of channels. And the share of the
peak that products reach."""
_DIRECT = 0.87
"""The share of the peak that the definition reaches."""


@dataclass(frozen=True)
class Winograd:
    """How a contraction is computed so. `image`: the variable and extent of the batch, if there is one; `y`,
    `x`, `out`, `channel`, `taps`: variables of the contraction; `height`, `width`, `outs`, `channels`: their
    extents. `flip`: the weights are applied backwards; `side`: places of the kernel
    along an axis. mr, nr: the register tile; lanes: of a vector."""

    image: tuple[str, DimLike]
    y: str
    x: str
    out: str
    channel: str
    taps: tuple[str, str]
    height: int
    width: int
    outs: int
    channels: int
    flip: bool
    side: int
    mr: int
    nr: int
    lanes: int

    @property
    def places(self) -> Tiles:
        """The tiles of the output."""
        return Tiles(self.height, self.width, self.nr, self.lanes, self.side)

    @property
    def products(self) -> int:
        """Matrix products: multiplications for a tile and a pair of channels."""
        return self.places.window ** 2

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return self.places.count

    @property
    def m_tiles(self) -> int:
        """Register tiles along the output channels."""
        return -(-self.outs // self.mr)

    def weights(self) -> dict[str, int]:
        """The transformed weights [tile of m][product][channel][mr], in elements of scratch."""
        return padded({"weights ": self.m_tiles * self.products * self.channels * self.mr}, self.lanes)

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's own scratch, in elements: transformed inputs [product][channel][nr],
        half-transformed inputs [number][parity][plane], products [product][mr][nr], and a row of finished
        sums [parity][2 nr]."""
        sizes = {
            "inputs ": self.products * self.channels * self.nr,
            "half ": 2 * self.places.window * self.places.plane,
            "products ": self.products * self.mr * self.nr,
            "finished ": 4 * self.nr,
        }
        return padded(sizes, self.lanes)


def winograd(kernel: ContractionKernel, target: Target) -> Winograd | None:
    """How the kernel is computed by Winograd's algorithm; None where it is no such convolution, its tile
    names another algorithm, or none and the definition is faster."""
    asked = algorithm_asked(kernel)
    w = applies(kernel, target) if asked in (None, TILES_OF_2) else None
    return w if w is not None and (asked or _pays(w)) else None


def applies(kernel: ContractionKernel, target: Target) -> Winograd | None:
    """How the kernel is computed so, if it can be."""
    c = kernel.contraction
    if kernel.indirect or len(c.batch) > 1 or (len(c.m), len(c.n), len(c.k)) != (1, 2, 3):
        return None
    ((out, outs),), ((y, height), (x, width)), ((channel, channels), *taps) = c.m, c.n, c.k
    side = taps[0][1]
    if c.a.dtype != dtypes.F32 or taps[1][1] != side or not isinstance(side, int) or side not in SIDES:
        return None
    if not all(isinstance(d, int) and d > 0 for d in (outs, height, width, channels)):
        return None
    others = {y, x, *(v for v, _ in c.batch)}
    if not is_direct(kernel, c.a, (*c.m, *c.k)) or names_of(c.a) & others or out in names_of(c.b):
        return None
    step = next((s for s in (1, -1) if all(depends_on_sum(c.b, p, t, s)
                                           for p, (t, _) in zip((y, x), taps))), None)
    if step is None:
        return None
    lanes = target.vector_bytes // 4
    assert isinstance(outs, int) and isinstance(channels, int)
    assert isinstance(height, int) and isinstance(width, int)
    return Winograd(c.batch[0] if c.batch else ("image", 1), y, x, out, channel, (taps[0][0], taps[1][0]),
                    height, width, outs, channels, step < 0, side,
                    min(rows_of_tile(outs, 2 * lanes, lanes, target), outs), 2 * lanes, lanes)


def _pays(w: Winograd) -> bool:
    """Compares rough counts of cycles."""
    images = w.image[1] if isinstance(w.image[1], int) else UNKNOWN
    vectors = 2 * -(-images * w.tiles // w.nr)
    direct = images * w.height * w.width / w.lanes * w.side ** 2 * w.channels * w.outs / _DIRECT
    pairs = w.channels * w.m_tiles * w.mr
    more = w.products / 16
    fast = vectors * more * (16 / _STREAM * pairs + _INPUT * w.channels + _OUTPUT * w.outs)
    fast += _WEIGHT * more * pairs
    return fast < 0.95 * direct


def winograd_tasks(w: Winograd) -> DimLike:
    """The number of tasks: panels of tiles."""
    return ceildiv(w.image[1] * w.tiles, w.nr)


def winograd_scratch(w: Winograd) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())


def winograd_shared(w: Winograd) -> int:
    """Bytes of scratch that all workers share."""
    return 4 * sum(w.weights().values())


def emit_winograd(module: Module, kernel: ContractionKernel, target: Target, w: Winograd) -> None:
    """Adds the kernel's function and the one that prepares the weights to the module."""
    prepare = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = prepare.name, w.m_tiles * w.channels
    WeightsEmitter(module, prepare, target, w).emit()
    _Emission(module, kernel, target, w).emit()


class WeightsEmitter(TileEmitter):
    """G g G' of every pair of channels; a task is an input channel and a register tile of output channels."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: Winograd):
        super().__init__(module, kernel, target, w.places)
        self.w = w

    def emit(self) -> None:
        """The whole function."""
        e, b, w = self.e, self.b, self.w
        _, begin, end, _ = b.params
        self.scratch({}, w.weights())
        e.bounds.update({"m tile": (0, w.m_tiles - 1), "row": (0, w.mr - 1)})
        count = min(w.lanes, 1 << (w.mr - 1).bit_length())
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            tile = b.udiv(task.index, constant(I64, w.channels))
            e.scopes.bind("m tile", tile)
            e.scopes.bind(w.channel, b.sub(task.index, b.mul(tile, w.channels)))
            left = b.sub(constant(I64, w.outs), b.mul(tile, w.mr))
            stop = constant(I64, w.mr) if w.outs % w.mr == 0 else b.intrinsic("smin", left, w.mr)
            e.scopes.lanes("row", ZERO, stop, count, self._transform, masked_only=True)
        b.ret()

    def _transform(self, carry: list[Value]) -> list[Value]:
        e, b, w = self.e, self.b, self.w
        lane = e.scopes.lane
        assert lane is not None
        node = e.nodes.substitute(e.nodes.of(self.c.a), {w.out: symbol("m tile") * w.mr + symbol("row")})
        transformed = self.change(w.places.matrices.g)
        taps = range(w.side - 1, -1, -1) if w.flip else range(w.side)
        values = [[b.splat(e.value(e.nodes.substitute(node, dict(zip(w.taps, (i, j))))), lane.count)
                   for i in taps] for j in taps]
        columns = [transformed(g) for g in values]
        for i in range(w.places.window):
            for j, value in enumerate(transformed([column[i] for column in columns])):
                number = symbol("m tile") * w.products + w.places.window * i + j
                at = (number * w.channels + symbol(w.channel)) * w.mr
                self.put(value, e.address("weights ", at + symbol("row")))
        return []


class PanelEmitter(TileEmitter):
    """Emits code on a panel of `nr` tiles whose inputs are transformed."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: Winograd):
        super().__init__(module, kernel, target, w.places)
        self.w = w
        self.e.bounds["m tile"] = (0, w.m_tiles - 1)

    def products(self) -> None:
        """The products of the current tile of output channels."""
        e, b, w = self.e, self.b, self.w
        wide = self.type.vector(w.nr)
        number, k = symbol("number"), symbol("k")
        e.bounds.update({"number": (0, w.products - 1), "k": (0, w.channels - 1)})
        with e.scopes.loop("number", ZERO, constant(I64, w.products)) as turn:
            turn.next()
            zeros = [constant(wide, 0)] * w.mr
            with e.scopes.loop("k", ZERO, constant(I64, w.channels), 1, zeros) as loop:
                right = b.load(wide, e.address("inputs ", (number * w.channels + k) * w.nr), align=64)
                base = ((symbol("m tile") * w.products + number) * w.channels + k) * w.mr
                sums = []
                for r, total in enumerate(loop.carry):
                    left = b.load(FLOAT, e.address("weights ", base + r))
                    sums.append(self.multiply(left, right, total))
                loop.next(*sums)
            for r, total in enumerate(loop.results):
                b.store(total, e.address("products ", (number * w.mr + r) * w.nr), align=64)


class _Emission(PanelEmitter):
    def emit(self) -> None:
        """The whole function."""
        e, b, w = self.e, self.b, self.w
        _, begin, end, _ = b.params
        self.scratch(w.parts(), w.weights())
        images = e.scalar(w.image[1])
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            with e.scopes.block("first", b.mul(task.index, w.nr)):
                with self.segments(w.image[0], images):
                    self._inputs()
                with e.scopes.loop("m tile", ZERO, constant(I64, w.m_tiles)) as tile:
                    tile.next()
                    self.products()
                    self._results(images)
        b.ret()

    def _inputs(self) -> None:
        """B' d B of one image's tiles in the panel."""
        e, w = self.e, self.w
        start = 1 - w.side if w.flip else 0
        node = e.nodes.substitute(e.nodes.of(self.c.b), dict.fromkeys(w.taps, 0))
        elements = [[self.element(node, w.y, w.x, start, parity, i, w.side - 1)
                     for i in range(w.places.window)]
                    for parity in (0, 1)]

        def into(i: int) -> Value:
            row = (i * w.channels + symbol(w.channel)) * w.nr
            return e.address("inputs ", row + symbol("column"))

        with e.scopes.loop(w.channel, ZERO, constant(I64, w.channels)) as channel:
            channel.next()
            self.transform(elements, self.change(w.places.matrices.b), into)

    # -- results -------------------------------------------------------------------------------------------

    def _results(self, images: Value) -> None:
        """A' m A of each row of the tile of output channels, and the stores."""
        e, b, w = self.e, self.b, self.w
        start = b.mul(e.scopes.bound("m tile"), w.mr)
        stop = b.intrinsic("smin", b.add(start, w.mr), w.outs) if w.outs % w.mr else b.add(start, w.mr)
        e.scopes.bind("m start", start)
        with e.scopes.loop(w.out, start, stop) as out:
            out.next()
            e.bounds["part"] = (0, w.nr - 1)
            with e.scopes.loop("part", ZERO, constant(I64, w.nr), w.lanes) as part:
                part.next()
                self._back()
            with self.segments(w.image[0], images):
                self._stores()

    def _back(self) -> None:
        """The tiles of one vector, as pairs of neighbouring elements of an even and an odd row."""
        e, b, w = self.e, self.b, self.w
        row = (symbol(w.out) - symbol("m start")) * w.nr + symbol("part")
        summed = self.change(w.places.matrices.a)
        halves, n = [], w.places.window
        for i in range(n):
            m = [b.load(self.type, e.address("products ", (n * i + j) * w.mr * w.nr + row)) for j in range(n)]
            halves.append(summed(m))
        columns = [summed([half[q] for half in halves]) for q in (0, 1)]
        size = w.lanes
        for p in (0, 1):
            left, right = columns[0][p], columns[1][p]
            for part in (0, 1):
                first = part * size // 2
                order = [x for i in range(first, first + size // 2) for x in (i, size + i)]
                at = e.address("finished ", 2 * p * w.nr + part * size + 2 * symbol("part"))
                b.store(b.shuffle(left, right, order), at)

    def _stores(self) -> None:
        """The stores of one image's elements under the panel's tiles, for one output channel."""
        e, b, w = self.e, self.b, self.w
        bound = e.scopes.bound
        first = b.mul(b.add(bound("from"), bound("shift")), 2)
        end = b.mul(b.add(bound("to"), bound("shift")), 2)
        stop = b.intrinsic("smin", b.mul(bound("bottom"), 2), w.height)
        count = min(w.lanes, 1 << max(w.width - 1, 0).bit_length())
        with e.scopes.loop(w.y, b.mul(bound("top"), 2), stop) as y:
            y.next()
            done = b.mul(b.lshr(y.index, 1), 2 * w.places.across)       # elements of the rows of tiles above
            left = b.intrinsic("smax", b.sub(first, done), 0)
            right = b.intrinsic("smin", b.sub(end, done), w.width)
            e.scopes.bind("done", b.add(b.sub(done, b.mul(bound("shift"), 2)),
                                        b.mul(b.and_(y.index, 1), 2 * w.nr)))
            e.scopes.lanes(w.x, left, right, count, self._store, align=2)

    def _store(self, carry: list[Value]) -> list[Value]:
        e, w = self.e, self.w
        lane = e.scopes.lane
        assert lane is not None
        at = e.address("finished ", symbol("done") + symbol(w.x))
        self.store(self.b.load(self.type.vector(lane.count), at, align=4), {})
        return []
