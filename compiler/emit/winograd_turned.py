"""Gradients for the input of convolutions of 3 x 3 or 5 x 5 places without stride and with little padding, by
Winograd's algorithm turned round.

As a convolution of its own such a gradient has more places than the output has, for it reaches over its edge.
But what is linear can be transposed: where the convolution computes a tile of 2 x 2 outputs as A[(G g G') *
(B d B')]A', the gradient for a tile of outputs, e, adds B'[(G g G') * (A' e A)]B, summed over the output
channels before B, to the inputs under the tile. So there are as many products as in the convolution.

Vectors run along images, which a task turns into scratch and back, a vector of them at a time: so tiles that
overlap are added up without a shuffle, whatever the sizes. The weights are transformed as in `winograd`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphflow.compiler.emit.algorithm import ZERO
from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.cost import UNKNOWN
from graphflow.compiler.emit.operands import algorithm_asked
from graphflow.compiler.emit.packing import transpose
from graphflow.compiler.emit.tiling import rows_of_tile
from graphflow.compiler.emit.winograd import (
    PanelEmitter,
    WeightsEmitter,
    Winograd,
    applies,
    winograd_shared,
)
from graphflow.compiler.emit.winograd_matrices import transposed
from graphflow.compiler.emit.winograd_tiles import TILES_OF_2, padded
from graphflow.compiler.kernel.form import ContractionKernel, Guarded, Load
from graphflow.compiler.plan.dims import DimLike, ceildiv, symbol
from graphflow.compiler.target import Target

_TRANSFORM = 8.0
"""Cycles, for each product, to transform a vector of gradients of a channel, or a vector of sums back."""
_TURN = 8.0
"""Cycles to turn a vector of elements."""
_STREAM, _DIRECT = 0.9, 0.87
"""The share of the peak that the products reach, and those of the definition."""
_FEWER = 0.75
"""Where there are not so much fewer tiles than the input has, the convolution as such is faster."""


@dataclass(frozen=True)
class WinogradTurned:
    """How a contraction is computed so. `form`: its shape, and its register tile, whose `nr` counts lanes of
    images; `rows`, `columns`: of the gradient for the output; `low`: what was padded before the input's
    first row and column."""

    form: Winograd
    rows: int
    columns: int
    low: tuple[int, int]

    @property
    def down(self) -> int:
        """Tiles along the height."""
        return -(-self.rows // 2)

    @property
    def across(self) -> int:
        """Tiles along the width."""
        return -(-self.columns // 2)

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return self.down * self.across

    @property
    def fits(self) -> bool:
        """Whether the inputs under all tiles are elements of the result."""
        reach = self.form.side - 1
        return self.low == (0, 0) and (2 * self.down + reach <= self.form.height
                                       and 2 * self.across + reach <= self.form.width)

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's own scratch, in elements: the turned gradients [channel][place][image],
        transformed ones [product][channel][nr], products [product][mr][nr], results [out][place][image] and a
        vector that nobody reads, and turned results [image][place]."""
        w = self.form
        sizes = {"turned ": (w.channels * self.rows * self.columns + w.lanes) * w.lanes,
                 "inputs ": w.products * w.channels * w.nr, "products ": w.products * w.mr * w.nr,
                 "results ": (w.outs * w.height * w.width + w.lanes) * w.lanes, "block ": w.lanes * w.lanes}
        return padded(sizes, w.lanes)


def winograd_turned(kernel: ContractionKernel, target: Target) -> WinogradTurned | None:
    """How the kernel is computed so; None where it is no such gradient, its tile names another algorithm, or
    none and another one is faster."""
    asked = algorithm_asked(kernel)
    w = _applies(kernel, target) if asked in (None, TILES_OF_2) else None
    return w if w is not None and (asked or _pays(w)) else None


def _applies(kernel: ContractionKernel, target: Target) -> WinogradTurned | None:
    form, c = applies(kernel, target), kernel.contraction
    if form is None or not form.flip or len(c.batch) != 1:
        return None
    load, guards = (c.b.value, c.b.guards) if isinstance(c.b, Guarded) else (c.b, ())
    if not isinstance(load, Load) or len(load.index) != 4:
        return None
    shape = next(a for a in kernel.arguments if a.name == load.arg).shape
    image, channel, row, column = load.index
    low = row - symbol(form.y) + symbol(form.taps[0]), column - symbol(form.x) + symbol(form.taps[1])
    if image != symbol(form.image[0]) or channel != symbol(form.channel):
        return None
    if not all(isinstance(d, int) and d >= 0 for d in (*low, *shape[2:])):
        return None
    if any((g.at, g.bound) not in ((row, shape[2]), (column, shape[3])) for g in guards):
        return None
    (down, across), lanes = low, form.lanes
    rows, columns = shape[2:]
    assert isinstance(rows, int) and isinstance(columns, int)
    assert isinstance(down, int) and isinstance(across, int)
    nr = lanes if -(-rows // 2) * -(-columns // 2) % 2 else 2 * lanes
    mr = min(rows_of_tile(form.outs, nr, lanes, target), form.outs)
    found = WinogradTurned(replace(form, flip=False, mr=mr, nr=nr), rows, columns, (down, across))
    size = winograd_turned_scratch(found) + winograd_turned_shared(found)
    return found if size <= target.l2 else None


def _pays(t: WinogradTurned) -> bool:
    """Compares rough counts of cycles for a vector of images."""
    w = t.form
    if t.tiles > _FEWER * w.tiles:
        return False
    images = w.image[1] if isinstance(w.image[1], int) else UNKNOWN
    direct = w.height * w.width * w.side ** 2 * w.channels * w.outs / _DIRECT
    fast = t.tiles * w.products * (w.channels * w.m_tiles * w.mr / _STREAM
                                   + _TRANSFORM * (w.channels + w.outs))
    fast += _TURN * (w.channels * t.rows * t.columns + w.outs * w.height * w.width)
    return fast * -(-images // w.lanes) * w.lanes < 0.95 * direct * images


def winograd_turned_tasks(t: WinogradTurned) -> DimLike:
    """The number of tasks: vectors of images."""
    return ceildiv(t.form.image[1], t.form.lanes)


def winograd_turned_scratch(t: WinogradTurned) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(t.parts().values())


def winograd_turned_shared(t: WinogradTurned) -> int:
    """Bytes of scratch that all workers share."""
    return winograd_shared(t.form)


def emit_winograd_turned(module: Module, kernel: ContractionKernel, target: Target, t: WinogradTurned
                         ) -> None:
    """Adds the kernel's function and the one that prepares the weights to the module."""
    prepare = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = prepare.name, t.form.m_tiles * t.form.channels
    WeightsEmitter(module, prepare, target, t.form).emit()
    _Emission(module, kernel, target, t).emit()


class _Emission(PanelEmitter):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, t: WinogradTurned):
        super().__init__(module, kernel, target, t.form)
        self.t = t
        inner = self.c.b.value if isinstance(self.c.b, Guarded) else self.c.b
        self.load = self.e.nodes.substitute(self.e.nodes.of(inner), dict.fromkeys(t.form.taps, 0))
        w = t.form
        self.e.bounds.update({
            "gradient": (0, t.rows * t.columns - 1), "place": (0, w.height * w.width - 1), "r": (0, w.mr - 1),
            "vector": (0, w.nr - 1), "tile y": (0, t.down - 1), "tile x": (0, t.across - 1)})

    def emit(self) -> None:
        """The whole function."""
        e, b, w, t = self.e, self.b, self.w, self.t
        _, begin, end, _ = b.params
        self.scratch(t.parts(), w.weights())
        images = e.scalar(w.image[1])
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            first = b.mul(task.index, w.lanes)
            e.scopes.bind("first image", first)
            last = b.sub(images, 1)
            for i in range(w.lanes):
                e.scopes.bind(f"image {i}", b.intrinsic("smin", b.add(first, i), last))
            self._turn()
            with e.scopes.loop("tile", ZERO, constant(I64, t.tiles), w.nr // w.lanes) as tile:
                tile.next()
                self._transform(tile.index)
                with e.scopes.loop("m tile", ZERO, constant(I64, w.m_tiles)) as rows:
                    rows.next()
                    self.products()
                    self._back(tile.index)
            self._results(first, b.intrinsic("smin", b.add(first, w.lanes), images))
        b.ret()

    # -- gradients for the output --------------------------------------------------------------------------

    def _turn(self) -> None:
        """Turns the images' gradients, so that lanes are images, and sets the results to 0."""
        e, b, w, t = self.e, self.b, self.w, self.t
        size = t.rows * t.columns
        at = {w.y: symbol("gradient") // t.columns - t.low[0], w.x: symbol("gradient") % t.columns - t.low[1]}
        nodes = [e.nodes.substitute(self.load, {**at, w.image[0]: symbol(f"image {i}")})
                 for i in range(w.lanes)]

        def body(carry: list[Value]) -> list[Value]:
            place = (symbol(w.channel) * size + symbol("gradient")) * w.lanes
            for i, vector in enumerate(transpose(e, [e.value(node) for node in nodes])):
                b.store(vector, e.address("turned ", place + i * w.lanes), align=4 * w.lanes)
            return []

        with e.scopes.loop(w.channel, ZERO, constant(I64, w.channels)) as channel:
            channel.next()
            e.scopes.lanes("gradient", ZERO, constant(I64, size), w.lanes, body)
        count = w.outs * w.height * w.width * w.lanes
        with e.scopes.loop("at", ZERO, constant(I64, count), w.lanes) as loop:
            loop.next()
            b.store(constant(self.type, 0), e.address("results ", symbol("at")), align=4 * w.lanes)

    def _tile(self, first: Value, vector: int) -> tuple[Value, Value]:
        """(row, column) of the tile of one of a panel's vectors."""
        across = constant(I64, self.t.across)
        tile = self.b.add(first, vector)
        row = self.b.udiv(tile, across)
        return row, self.b.sub(tile, self.b.mul(row, across))

    def _transform(self, first: Value) -> None:
        """A' e A of a panel of tiles."""
        e, b, w, t = self.e, self.b, self.w, self.t
        change, n = self.change(transposed(w.places.matrices.a)), w.places.window
        places = [self._tile(first, v) for v in range(w.nr // w.lanes)]
        with e.scopes.loop(w.channel, ZERO, constant(I64, w.channels)) as channel:
            channel.next()
            base = e.address("turned ", symbol(w.channel) * (t.rows * t.columns * w.lanes))
            for v, (row, column) in enumerate(places):
                values = [[self._gradient(base, row, column, i, j) for i in (0, 1)] for j in (0, 1)]
                columns = [change(g) for g in values]
                for i in range(n):
                    for j, value in enumerate(change([g[i] for g in columns])):
                        at = ((n * i + j) * w.channels + symbol(w.channel)) * w.nr + v * w.lanes
                        b.store(value, e.address("inputs ", at), align=4 * w.lanes)

    def _gradient(self, base: Value, row: Value, column: Value, i: int, j: int) -> Value:
        """Element (i, j) of a tile; 0 beyond the edge."""
        b, t = self.b, self.t
        y, x = b.add(b.mul(row, 2), i), b.add(b.mul(column, 2), j)
        over = [b.compare("ge", at, size) for at, size, k in ((y, t.rows, i), (x, t.columns, j))
                if k and size % 2]
        at = b.add(b.mul(y, t.columns), x)
        if not over:
            return b.load(self.type, b.gep(base, b.mul(at, self.w.lanes), self.type.scalar))
        outside = over[0] if len(over) == 1 else b.or_(*over)
        at = b.select(outside, constant(I64, 0), at)
        value = b.load(self.type, b.gep(base, b.mul(at, self.w.lanes), self.type.scalar))
        return b.select(outside, constant(self.type, 0), value)

    # -- results -------------------------------------------------------------------------------------------

    def _back(self, first: Value) -> None:
        """Adds B' m B of each row of the tile of results where it belongs."""
        e, b, w, t = self.e, self.b, self.w, self.t
        change, n = self.change(transposed(w.places.matrices.b)), w.places.window
        start = b.mul(e.scopes.bound("m tile"), w.mr)
        count = b.intrinsic("smin", b.sub(constant(I64, w.outs), start), w.mr)
        e.scopes.bind("m start", start)
        places = [self._tile(first, v) for v in range(w.nr // w.lanes)]
        rows = [[b.add(b.mul(row, 2), i - t.low[0]) for i in range(n)] for row, _ in places]
        columns = [[b.add(b.mul(column, 2), j - t.low[1]) for j in range(n)] for _, column in places]
        with e.scopes.loop("r", ZERO, count) as row:
            row.next()
            size = w.height * w.width
            base = e.address("results ", (symbol("m start") + symbol("r")) * (size * w.lanes))
            spare = e.address("results ", w.outs * size * w.lanes)
            for v in range(w.nr // w.lanes):
                m = [b.load(self.type, e.address("products ", (i * w.mr + symbol("r")) * w.nr + v * w.lanes),
                            align=4 * w.lanes) for i in range(n * n)]
                halves = [change(m[j::n]) for j in range(n)]
                for i in range(n):
                    for j, value in enumerate(change([half[i] for half in halves])):
                        self._add(value, rows[v][i], columns[v][j], base, spare)

    def _add(self, value: Value, y: Value, x: Value, base: Value, spare: Value) -> None:
        """Adds to an element of the results; what lies beyond them goes where nobody reads."""
        b, w = self.b, self.w
        at = b.gep(base, b.mul(b.add(b.mul(y, w.width), x), w.lanes), self.type.scalar)
        if not self.t.fits:
            inside = b.and_(b.compare("ult", y, w.height), b.compare("ult", x, w.width))
            at = b.select(inside, at, spare)
        b.store(b.add(b.load(self.type, at, align=4 * w.lanes), value), at, align=4 * w.lanes)

    def _results(self, first: Value, stop: Value) -> None:
        """Turns the results back, and stores them."""
        e, b, w = self.e, self.b, self.w
        size = w.height * w.width

        def body(carry: list[Value]) -> list[Value]:
            at = (symbol(w.out) * size + symbol("place")) * w.lanes
            vectors = [b.load(self.type, e.address("results ", at + i * w.lanes), align=4 * w.lanes)
                       for i in range(w.lanes)]
            for i, vector in enumerate(transpose(e, vectors)):
                b.store(vector, e.address("block ", i * w.lanes), align=4 * w.lanes)
            values = {w.y: symbol("place") // w.width, w.x: symbol("place") % w.width}
            with e.scopes.loop(w.image[0], first, stop) as image:
                image.next()
                row = (symbol(w.image[0]) - symbol("first image")) * w.lanes
                self.store(b.load(self.type, e.address("block ", row), align=4 * w.lanes), values)
            return []

        with e.scopes.loop(w.out, ZERO, constant(I64, w.outs)) as out:
            out.next()
            e.scopes.lanes("place", ZERO, constant(I64, size), w.lanes, body)
