"""Convolutions of 3 x 3 places without stride by Winograd's algorithm F(2 x 2, 3 x 3): 16 multiplications
where the definition has 36 (A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015).

The output is cut into tiles of 2 x 2. With d the 4 x 4 inputs of a tile and g the 3 x 3 weights of a pair of
channels, the tile is A'[(G g G') * (B' d B)]A, summed over the input channels before A is applied: 16 matrix
products with the channels as k and the tiles as n. Everything stays within a task: a panel of `nr` tiles is
transformed into scratch, a micro-kernel multiplies, and what the transformation back gives are finished sums
for the kernel's stores. Each worker transforms the weights once for each call.

The form of the kernel does not change: this is one way to compute a contraction that happens to be such a
convolution, or the gradient of one for its input. It rounds about as much as the definition does. An
infinite input makes NaN of its whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graphflow.compiler.emit.builder import I64, MEMORY_TYPES, Module, Type, Value, constant
from graphflow.compiler.emit.cost import UNKNOWN
from graphflow.compiler.emit.loops import start_function
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.operands import is_direct, names_of
from graphflow.compiler.emit.tiling import rows_of_tile, whole_lines
from graphflow.compiler.kernel.form import Argument, Const, ContractionKernel, Expr, Guard, Guarded, Load
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, ceildiv, substitute, symbol
from graphflow.compiler.target import Target

ZERO = constant(I64, 0)
_INPUT, _OUTPUT, _WEIGHT, _STREAM = 90.0, 130.0, 20.0, 0.95
"""Cycles: to transform the inputs of a vector of tiles, for a channel; to transform its sums back and store
them; to transform the weights of a pair of channels. And the share of the peak that products reach."""
_DIRECT = 0.87
"""The share of the peak that the definition reaches."""


@dataclass(frozen=True)
class Winograd:
    """How a contraction is computed so. `image`: the variable and extent of the batch, if there is one; `y`,
    `x`, `out`, `channel`, `taps`: variables of the contraction; `height`, `width`, `outs`, `channels`: their
    extents. `flip`: the weights are applied backwards. mr, nr: the register tile; lanes: of a vector."""

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
    mr: int
    nr: int
    lanes: int

    @property
    def down(self) -> int:
        """Tiles along the height."""
        return -(-self.height // 2)

    @property
    def across(self) -> int:
        """Tiles along the width."""
        return -(-self.width // 2)

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return self.down * self.across

    @property
    def m_tiles(self) -> int:
        """Register tiles along the output channels."""
        return -(-self.outs // self.mr)

    @property
    def plane(self) -> int:
        """Elements of a plane of half-transformed inputs: the even or the odd rows under a panel's tiles."""
        rows = min(self.down, (self.nr - 2) // self.across + 2) + 1
        return rows * self.across + self.lanes

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: transformed weights [tile of m][16][channel][mr] and
        inputs [16][channel][nr], half-transformed inputs [4][parity][plane], products [16][mr][nr], and a
        row of finished sums [parity][2 nr]."""
        sizes = {
            "weights ": self.m_tiles * 16 * self.channels * self.mr,
            "inputs ": 16 * self.channels * self.nr,
            "half ": 8 * self.plane,
            "products ": 16 * self.mr * self.nr,
            "finished ": 4 * self.nr + self.lanes,
        }
        return {name: whole_lines(4 * (size + self.lanes)) // 4 for name, size in sizes.items()}


def winograd(kernel: ContractionKernel, target: Target) -> Winograd | None:
    """How the kernel is computed by Winograd's algorithm; None where it is no such convolution, or the
    definition is faster."""
    c = kernel.contraction
    if kernel.indirect or c.tile or len(c.batch) > 1 or (len(c.m), len(c.n), len(c.k)) != (1, 2, 3):
        return None
    ((out, outs),), ((y, height), (x, width)), ((channel, channels), *taps) = c.m, c.n, c.k
    if c.a.dtype != dtypes.F32 or [extent for _, extent in taps] != [3, 3]:
        return None
    if not all(isinstance(d, int) and d > 0 for d in (outs, height, width, channels)):
        return None
    others = {y, x, *(v for v, _ in c.batch)}
    if not is_direct(kernel, c.a, (*c.m, *c.k)) or names_of(c.a) & others or out in names_of(c.b):
        return None
    step = next((s for s in (1, -1) if all(_depends_on_sum(c.b, p, t, s)
                                           for p, (t, _) in zip((y, x), taps))), None)
    if step is None:
        return None
    lanes = target.vector_bytes // 4
    mr = min(rows_of_tile(outs, 2 * lanes, lanes, target), outs)       # type: ignore[type-var]
    image = c.batch[0] if c.batch else ("image", 1)
    w = Winograd(image, y, x, out, channel, (taps[0][0], taps[1][0]), height, width,   # type: ignore[arg-type]
                 outs, channels, step < 0, mr, 2 * lanes, lanes)       # type: ignore[arg-type]
    return w if _pays(w) else None


def _depends_on_sum(b: Expr, place: str, tap: str, step: int) -> bool:
    """Whether b depends on `place` + step * `tap` alone."""
    load, fill, guards = (b.value, b.fill, b.guards) if isinstance(b, Guarded) else (b, Const(0, b.dtype), ())
    if not isinstance(load, Load) or not isinstance(fill, Const) or fill.value:
        return False
    dims = [*load.index, *(d for g in guards for d in (g.at, g.bound))]
    moved = {place: symbol(place) + step, tap: symbol(tap) - 1}
    return all(substitute(d, moved) == d for d in dims)


def _pays(w: Winograd) -> bool:
    """Compares rough counts of cycles."""
    images = w.image[1] if isinstance(w.image[1], int) else UNKNOWN
    vectors = 2 * -(-images * w.tiles // w.nr)
    direct = images * w.height * w.width / w.lanes * 9 * w.channels * w.outs / _DIRECT
    pairs = w.channels * w.m_tiles * w.mr
    fast = vectors * (16 / _STREAM * pairs + _INPUT * w.channels + _OUTPUT * w.outs) + _WEIGHT * pairs
    return fast < 0.95 * direct


def winograd_tasks(w: Winograd) -> DimLike:
    """The number of tasks: panels of tiles."""
    return ceildiv(w.image[1] * w.tiles, w.nr)


def winograd_scratch(w: Winograd) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())


def emit_winograd(module: Module, kernel: ContractionKernel, target: Target, w: Winograd) -> None:
    """Adds the kernel's function to the module."""
    _Emission(module, kernel, target, w).emit()


class _Emission:
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: Winograd):
        self.kernel, self.c, self.w = kernel, kernel.contraction, w
        self.e = e = start_function(module, kernel, target)
        self.b = e.b
        self.type: Type = MEMORY_TYPES["f32"].vector(w.lanes)
        for var, extent in (*self.c.batch, *self.c.m, *self.c.n, *self.c.k):
            e.bounds[var] = (0, extent - 1 if isinstance(extent, int) else None)
        e.bounds.update({"pair": (0, w.down), "tile x": (0, w.across - 1), "m tile": (0, w.m_tiles - 1)})

    def emit(self) -> None:
        """The whole function."""
        e, b = self.e, self.b
        _, begin, end, worker = b.params
        slot = len(self.kernel.arguments) + len(self.kernel.symbols)
        area = b.load(Type("ptr"), b.gep(b.params[0], slot, I64))
        at = b.gep(area, b.mul(worker, b.load(I64, b.gep(b.params[0], slot + 1, I64))), Type("i8"))
        for name, size in self.w.parts().items():
            e.add_argument(Argument(name, dtypes.F32, (size,), "rw"), at)
            at = b.gep(at, size, MEMORY_TYPES["f32"])
        self._weights()
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            first = b.mul(task.index, self.w.nr)
            with e.scopes.block("first", first):
                with self._segments():
                    self._inputs()
                with e.scopes.loop("m tile", ZERO, constant(I64, self.w.m_tiles)) as tile:
                    tile.next()
                    self._products()
                    self._results()
        b.ret()

    # -- weights -------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        """G g G' of every pair of channels."""
        e, b, w = self.e, self.b, self.w
        count = min(w.lanes, 1 << (w.mr - 1).bit_length())
        node = e.nodes.substitute(e.nodes.of(self.c.a), {w.out: symbol("m tile") * w.mr + symbol("row")})
        e.bounds["row"] = (0, w.mr - 1)
        row, half = symbol("row"), constant(MEMORY_TYPES["f32"], 0.5)

        def transformed(g: list[Value]) -> list[Value]:
            ends = b.add(g[0], g[2])
            return [g[0], b.mul(b.add(ends, g[1]), half), b.mul(b.sub(ends, g[1]), half), g[2]]

        def body(carry: list[Value]) -> list[Value]:
            lane = e.scopes.lane
            assert lane is not None
            taps = [2, 1, 0] if w.flip else [0, 1, 2]
            values = [[b.splat(e.value(e.nodes.substitute(node, dict(zip(w.taps, (i, j))))), count)
                       for i in taps] for j in taps]
            columns = [transformed(g) for g in values]
            for i in range(4):
                for j, value in enumerate(transformed([column[i] for column in columns])):
                    at = ((symbol("m tile") * 16 + 4 * i + j) * w.channels + symbol(w.channel)) * w.mr + row
                    if lane.mask is None:
                        b.store(value, e.address("weights ", at))
                    else:
                        b.masked_store(value, e.address("weights ", at), lane.mask)
            return []

        with e.scopes.loop("m tile", ZERO, constant(I64, w.m_tiles)) as tile:
            tile.next()
            left = b.sub(constant(I64, w.outs), b.mul(tile.index, w.mr))
            stop = constant(I64, w.mr) if w.outs % w.mr == 0 else b.intrinsic("smin", left, w.mr)
            with e.scopes.loop(w.channel, ZERO, constant(I64, w.channels)) as channel:
                channel.next()
                e.scopes.lanes("row", ZERO, stop, count, body, masked_only=True)

    # -- the panel -----------------------------------------------------------------------------------------

    @contextmanager
    def _segments(self) -> Iterator[None]:
        """A loop over the images that the panel has tiles of. Binds "from", "to": the image's part of the
        panel; "shift": what to add to a place in the panel for the tile's number in the image; "top",
        "bottom": the rows of tiles."""
        e, b, w = self.e, self.b, self.w
        first = e.scopes.bound("first")
        total = b.mul(e.scalar(w.image[1]), w.tiles)
        last = b.sub(b.intrinsic("smin", b.add(first, w.nr), total), 1)
        begin = b.udiv(first, constant(I64, w.tiles))
        end = b.add(b.udiv(last, constant(I64, w.tiles)), 1)
        with e.scopes.loop(w.image[0], begin, end) as image:
            image.next()
            shift = b.sub(first, b.mul(image.index, w.tiles))
            low = b.intrinsic("smax", shift, 0)
            high = b.intrinsic("smin", b.add(shift, w.nr), w.tiles)
            e.scopes.bind("shift", shift)
            e.scopes.bind("from", b.sub(low, shift))
            e.scopes.bind("to", b.sub(high, shift))
            e.scopes.bind("top", b.udiv(low, constant(I64, w.across)))
            e.scopes.bind("bottom", b.add(b.udiv(b.sub(high, 1), constant(I64, w.across)), 1))
            yield

    def _inputs(self) -> None:
        """B' d B of the image's tiles in the panel: along x for the rows under them, each row once, then
        along y. Tiles that are neighbours in a plane of half-transformed rows are neighbours in the panel."""
        e, w, bound = self.e, self.w, self.e.scopes.bound
        with e.scopes.loop(w.channel, ZERO, constant(I64, w.channels)) as channel:
            channel.next()
            with e.scopes.loop("pair", bound("top"), self.b.add(bound("bottom"), 1)) as pair:
                pair.next()
                count = min(w.lanes, 1 << max(w.across - 1, 0).bit_length())
                for parity in (0, 1):
                    e.scopes.lanes("tile x", ZERO, constant(I64, w.across), count,
                                   self._half(parity), masked_only=True)
            e.scopes.lanes("column", bound("from"), bound("to"), w.lanes, self._other_half, align=1)

    def _half(self, parity: int) -> Callable[[list[Value]], list[Value]]:
        """The transformation along x of the even or the odd row of a pair."""
        e, b, w = self.e, self.b, self.w

        def body(carry: list[Value]) -> list[Value]:
            lane = e.scopes.lane
            assert lane is not None
            d = [b.splat(e.value(self._input(parity, i)), lane.count) for i in range(4)]
            row = (symbol("pair") - symbol("top")) * w.across + symbol("tile x")
            for i, value in enumerate(self._differences(d)):
                b.store(value, e.address("half ", (2 * i + parity) * w.plane + row), align=4)
            return []

        return body

    def _input(self, parity: int, i: int) -> Node:
        """Element i of 4 of each tile's row."""
        e, w = self.e, self.w
        start = -2 if w.flip else 0
        y, x = 2 * symbol("pair") + (parity + start), 2 * symbol("tile x") + (i + start)
        node = e.nodes.substitute(e.nodes.of(self.c.b), {w.y: y, w.x: x, w.taps[0]: 0, w.taps[1]: 0})
        # What no place of the kernel reaches may lie outside of memory.
        guards = []
        if w.height % 2:
            guards.append(Guard(y - start, w.height + 2))
        if w.width % 2:
            guards.append(Guard(x - start, w.width + 2))
        if not guards:
            return node
        return e.nodes.guarded(tuple(guards), node, e.nodes.of(Const(0, dtypes.F32)))

    def _differences(self, d: list[Value]) -> list[Value]:
        """B' of four values."""
        b = self.b
        return [b.sub(d[0], d[2]), b.add(d[1], d[2]), b.sub(d[2], d[1]), b.sub(d[1], d[3])]

    def _other_half(self, carry: list[Value]) -> list[Value]:
        """The transformation along y of a vector of tiles."""
        e, b, w = self.e, self.b, self.w
        lane = e.scopes.lane
        assert lane is not None
        at = symbol("column") + symbol("shift") - symbol("top") * w.across
        for j in range(4):
            rows = [e.address("half ", (2 * j + i % 2) * w.plane + at + i // 2 * w.across) for i in range(4)]
            d = [b.load(self.type, row, align=4) for row in rows]
            for i, value in enumerate(self._differences(d)):
                to = e.address("inputs ",
                               ((4 * i + j) * w.channels + symbol(w.channel)) * w.nr + symbol("column"))
                if lane.mask is None:
                    b.store(value, to, align=4)
                else:
                    b.masked_store(value, to, lane.mask, align=4)
        return []

    # -- products and results ------------------------------------------------------------------------------

    def _products(self) -> None:
        """The 16 products of the current tile of output channels."""
        e, b, w = self.e, self.b, self.w
        wide = self.type.vector(w.nr)
        number, k = symbol("number"), symbol("k")
        e.bounds.update({"number": (0, 15), "k": (0, w.channels - 1)})
        with e.scopes.loop("number", ZERO, constant(I64, 16)) as turn:
            turn.next()
            zeros = [constant(wide, 0)] * w.mr
            with e.scopes.loop("k", ZERO, constant(I64, w.channels), 1, zeros) as loop:
                right = b.load(wide, e.address("inputs ", (number * w.channels + k) * w.nr), align=64)
                base = ((symbol("m tile") * 16 + number) * w.channels + k) * w.mr
                sums = []
                for r, total in enumerate(loop.carry):
                    left = b.splat(b.load(MEMORY_TYPES["f32"], e.address("weights ", base + r)), w.nr)
                    fused = e.target.has_fma
                    sums.append(b.fma(left, right, total) if fused else b.add(b.mul(left, right), total))
                loop.next(*sums)
            for r, total in enumerate(loop.results):
                b.store(total, e.address("products ", (number * w.mr + r) * w.nr), align=64)

    def _results(self) -> None:
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
            with self._segments():
                self._stores()

    def _back(self) -> None:
        """The tiles of one vector, as pairs of neighbouring elements of an even and an odd row."""
        e, b, w = self.e, self.b, self.w
        row = (symbol(w.out) - symbol("m start")) * w.nr + symbol("part")

        def summed(m: list[Value]) -> tuple[Value, Value]:
            return b.add(b.add(m[0], m[1]), m[2]), b.sub(b.sub(m[1], m[2]), m[3])

        halves = []
        for i in range(4):
            m = [b.load(self.type, e.address("products ", (4 * i + j) * w.mr * w.nr + row)) for j in range(4)]
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
            done = b.mul(b.lshr(y.index, 1), 2 * w.across)           # elements of the rows of tiles above
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
        total = self.b.load(self.type.vector(lane.count), at, align=4)
        e.scopes.bind("acc ", total)
        e.nodes.bind("acc", e.nodes.given("acc ", dtypes.F32))
        for let in self.c.lets:
            (node,) = e.nodes.lets((let,))
            e.value(node)
        for store in self.c.stores:
            e.store_value(store.arg, store.index, e.value(e.nodes.of(store.value)))
        return []
