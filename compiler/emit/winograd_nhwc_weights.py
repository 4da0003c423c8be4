"""The gradient of a convolution of 3 x 3 or 5 x 5 places without stride for its weights, by Winograd's
algorithm with vectors along channels: for buffers whose channels are neighbours in memory.

With d the inputs under a tile of outputs and g the gradient for these outputs, the tile adds
G'[(B' d B) * (A g A')]G to the gradient of a pair of channels (A, B, G: the matrices of F(outputs, places) of
`winograd_matrices`): F(4 x 4, 3 x 3) takes 36 multiplications where the definition has 144. Summed over the
tiles before G is applied, these are 36 matrix products with the tiles as k.

A task does this for a block of input and of output channels, two rows of the products after the other: their
transformations share half of their terms, what a pair leaves stays in registers, and the sums and a block of
transformed tiles stay in the second level cache. For every block of tiles it transforms both operands into
scratch, [product][vector of channels][tile][lane], and adds the products to the sums: rows are input
channels, vectors run along output channels. At the end G is applied, and blocks of the result are turned so
that the stores walk along the weights of one output channel.

Sums over a block of tiles are added up themselves, so rounding does not grow with the number of images.
Largest error over the largest element for normal numbers, for sums of 400, 1,600 and 25,600 terms:

                    F(2, 3)   F(4, 3)   F(5, 3)   float32 sums   F(2, 5)   F(4, 5)   float32 sums
       400 terms    2.2e-7    9.0e-7    1.8e-6    6.7e-7         1.9e-6    5.0e-6    8.2e-7
     1,600 terms    2.4e-7    7.9e-7    3.6e-6    9.4e-7         1.4e-6    4.6e-6    9.3e-7
    25,600 terms    3.0e-7    8.3e-7    2.4e-6    1.4e-6         1.4e-6    4.3e-6    1.2e-6

An infinite input makes NaN of all weights of its channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphflow.compiler.emit.algorithm import FLOAT, ZERO, AlgorithmEmitter, padded
from graphflow.compiler.emit.builder import I32, I64, Module, Value, constant
from graphflow.compiler.emit.operands import (
    algorithm_asked,
    coefficient,
    depends_on_sum,
    drop_guard,
    load_offset,
    names_of,
    shared_limit,
)
from graphflow.compiler.emit.packing import axis_values, transpose
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.winograd_matrices import (
    Matrices,
    Matrix,
    multiply,
    transposed,
    winograd_matrices,
)
from graphflow.compiler.kernel.form import ContractionKernel, Expr, Guard, Guarded, Load
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import TYPICAL_SIZE, DimLike, product, substitute, symbol
from graphflow.compiler.target import Target

OUTPUTS = {3: (5, 4, 2), 5: (4, 2)}
"""By the places of a kernel along an axis: the outputs of a tile along it."""
_SUMS = 16
"""Sums of a register tile: more are no faster."""
_TASKS = 4
"""Tasks at least, if there are so many blocks of channels."""
_TILES = 32
"""Tiles of a block: few, so that sums of as many terms are short, and are added up themselves."""
_INPUT, _GRADIENT, _RESULT = 170.0, 100.0, 200.0
"""Cycles, where there are 36 products, to transform a vector of channels of a tile; and to finish and store
the gradients of a channel and a vector of channels."""
_SHARE = 0.85
"""The share of the peak that products reach."""


@dataclass(frozen=True)
class Image:
    """An operand in memory: element (y, x, channel) lies at `origin` + y * `row` + x * `column` + channel of
    `arg`, and is 0 but for 0 <= y + top < bottom, 0 <= x + left < right."""

    arg: str
    origin: DimLike
    row: int
    column: int
    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class WinogradNhwcWeights:
    """How a contraction is computed so. `pieces`: the batch axes; `image`: the variable and extent of the
    images of a piece, cut by `limit`; `inputs`, `gradients`: the operands; `out`: the variable of the output
    channels; `height`, `width`, `outs`, `channels`: extents; `side`: places of the kernel along an axis;
    `outputs`: of a tile, along an axis. `block_in`, `block_out`: vectors of channels of a task; mr rows, nv
    vectors: the register tile; lanes: of a vector."""

    pieces: tuple[tuple[str, DimLike], ...]
    image: tuple[str, DimLike]
    limit: Guard | None
    inputs: Image
    gradients: Image
    out: str
    height: int
    width: int
    outs: int
    channels: int
    side: int
    outputs: int
    block_in: int
    block_out: int
    mr: int
    nv: int
    lanes: int

    @property
    def matrices(self) -> Matrices:
        """Those of the algorithm."""
        return winograd_matrices(self.outputs, self.side)

    @property
    def n(self) -> int:
        """Products along an axis, and inputs under a tile."""
        return self.outputs + self.side - 1

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The rows of the products in pairs that share terms: the first and the last, then those of the
        points p and -p; where their number is odd, one is left over."""
        rows = range(1, self.n - 1)
        return [(0, self.n - 1), *(tuple(rows[i:i + 2]) for i in range(0, len(rows), 2))]

    @property
    def down(self) -> int:
        """Tiles along the height of an image."""
        return -(-self.height // self.outputs)

    @property
    def across(self) -> int:
        """Tiles along its width."""
        return -(-self.width // self.outputs)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of output and of input channels."""
        return (-(-self.outs // (self.block_out * self.lanes)),
                -(-self.channels // (self.block_in * self.lanes)))

    def stride(self, vectors: int) -> int:
        """Elements of a product's transformed tiles, and a line more, so that neighbouring products lie in
        different sets of the cache."""
        return vectors * _TILES * self.lanes + 16

    @property
    def apart(self) -> int:
        """Elements from the sums of a product to those of the next, a line more than there are."""
        return self.block_in * self.block_out * self.lanes ** 2 + 16

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: transformed tiles of both operands; the sums of a
        group, [product][vector of in][vector of out][lane of in][lane of out]; what G makes of each row of
        them, in the same order; zeros for reads outside of an image; and the result for a square of channels,
        before and after it is turned."""
        places = self.side ** 2 * self.lanes
        sizes = {
            "inputs ": 2 * self.n * self.stride(self.block_in),
            "gradients ": 2 * self.n * self.stride(self.block_out),
            "sums ": 2 * self.n * self.apart,
            "halves ": self.n * self.side * self.apart,
            "zeros ": max((self.n - 1) * self.inputs.column + self.channels,
                          (self.outputs - 1) * self.gradients.column + self.outs),
            "finished ": places * self.lanes,
            "turned ": places * self.lanes,
        }
        return padded(sizes, self.lanes)


def winograd_nhwc_weights(kernel: ContractionKernel, target: Target) -> WinogradNhwcWeights | None:
    """How the kernel is computed so; None where it is no such gradient, its tile names another algorithm, or
    none and this one would gain nothing."""
    asked = algorithm_asked(kernel)
    found = [w for outputs in (5, 4, 2) if asked in (None, outputs)
             and (w := _applies(kernel, target, outputs)) is not None]
    best = min(found, key=_cycles, default=None)
    return best if best is not None and (asked or _cycles(best) < 0.95 * _direct_cycles(best)) else None


def _applies(kernel: ContractionKernel, target: Target, outputs: int) -> WinogradNhwcWeights | None:
    """How the kernel is computed with tiles of so many outputs along an axis; None where it cannot be."""
    c = kernel.contraction
    axes = len(c.m), len(c.n), len(c.k)
    if kernel.indirect or c.groups or c.a.dtype != dtypes.F32 or len(c.batch) > 1:
        return None
    if axes not in ((1, 3, 3), (1, 3, 2)):
        return None
    image, ((y, height), (x, width)) = (c.k[0] if len(c.k) == 3 else ("image", 1)), c.k[-2:]
    ((out, outs),), ((channel, channels), *taps) = c.m, c.n
    limit, lanes = shared_limit(c.a, c.b, c.k), target.vector_bytes // 4
    sizes = [d for d in (outs, height, width, channels, taps[0][1]) if isinstance(d, int) and d > 0]
    if len(sizes) < 5 or taps[1][1] != sizes[4] or outputs not in OUTPUTS.get(sizes[4], ()):
        return None
    outs, height, width, channels, side = sizes
    a, b = drop_guard(c.a, limit), drop_guard(c.b, limit)
    if outs % lanes or channels % lanes or names_of(a) & {v for v, _ in c.n} or out in names_of(b):
        return None
    if not all(depends_on_sum(b, p, t, 1) for p, (t, _) in zip((y, x), taps)):
        return None
    reach = side - 1
    inputs = _image(kernel, b, channel, {y: (taps[0][0], height + reach), x: (taps[1][0], width + reach)})
    gradients = _image(kernel, a, out, {y: ("", height), x: ("", width)})
    if inputs is None or gradients is None:
        return None
    mr, nv = _register_tile(outs // lanes, lanes, target)
    pieces = product(extent for _, extent in c.batch)
    n = outputs + side - 1
    block_out, block_in = _blocks(outs // lanes, channels // lanes, pieces, nv, lanes, n, target)
    return WinogradNhwcWeights(c.batch, image, limit, inputs, gradients, out, height, width, outs, channels,
                               side, outputs, block_in, block_out, mr, nv, lanes)


def _image(kernel: ContractionKernel, e: Expr, channel: str, axes: Mapping[str, tuple[str, int]]
           ) -> Image | None:
    """The operand as an image with its channels as neighbours; None if it is none. `axes`: the variables of
    the two axes of places, with that of the tap that is added, if any, and the extent of their sum."""
    load, guards = (e.value, e.guards) if isinstance(e, Guarded) else (e, ())
    offset = load_offset(kernel, load)
    if not isinstance(load, Load) or offset is None:
        return None
    row, column, step = (coefficient(offset, v) for v in (*axes, channel))
    ranges = {place: (0, extent) for place, (_, extent) in axes.items()}
    for g in guards:
        at = [(p, g.at - symbol(p) - (symbol(tap) if tap else 0)) for p, (tap, _) in axes.items()]
        found = [(p, d) for p, d in at if isinstance(d, int)]
        if not found or not isinstance(g.bound, int):
            return None
        ((place, low),) = found
        ranges[place] = low, min(g.bound, axes[place][1] + low)
    (top, bottom), (left, right) = ranges.values()
    if not (isinstance(row, int) and isinstance(column, int) and row > 0 and column > 0 and step == 1):
        return None
    zeros = dict.fromkeys((*axes, channel, *(tap for tap, _ in axes.values() if tap)), 0)
    return Image(load.arg, substitute(offset, zeros), row, column, top, bottom, left, right)


def _register_tile(vectors: int, lanes: int, target: Target) -> tuple[int, int]:
    """(rows, vectors): as many sums as the registers hold beside a row of vectors and an element, up to
    _SUMS, of as many rows as divide a vector and vectors as divide those of the output channels."""
    fits = [(mr * nv, -abs(nv - 2), mr, nv) for nv in (1, 2, 3, 4) for mr in (1, 2, 4, 8, 16)
            if vectors % nv == 0 and lanes % mr == 0 and mr * nv <= _SUMS
            and mr * nv + nv + 1 <= target.vector_registers]
    return max(fits)[2:]


def _blocks(outs: int, channels: int, pieces: DimLike, nv: int, lanes: int, n: int, target: Target
            ) -> tuple[int, int]:
    """Vectors of output and of input channels of a task: such that the sums of two rows of products, and the
    transformed tiles of a block, stay in the second level cache, and that two threads end soonest."""
    best = None
    for m_blocks in range(1, outs // nv + 1):
        for n_blocks in range(1, channels + 1):
            out, inside = -(-outs // (nv * m_blocks)) * nv, -(-channels // n_blocks)
            size = 2 * n * (out * inside * lanes + (out + inside) * _TILES) * lanes * 4
            tasks = m_blocks * n_blocks
            if isinstance(pieces, int):
                tasks = max(-(-pieces * tasks // 2) * 2, _TASKS)
            cost = size > target.l2, tasks * _tile_cycles(out, inside, lanes, n)
            if best is None or cost < best[0]:
                best = cost, (out, inside)
    assert best is not None
    return best[1]


def _tile_cycles(out: int, inside: int, lanes: int, n: int) -> float:
    """A rough count for a tile and so many vectors of channels, by a multiplication of vectors in each."""
    return n ** 2 * (out * inside * lanes / _SHARE + (_INPUT * inside + _GRADIENT * out) / 36)


def _images(w: WinogradNhwcWeights) -> int:
    return w.image[1] if isinstance(w.image[1], int) else TYPICAL_SIZE


def _cycles(w: WinogradNhwcWeights) -> float:
    """A rough count for a piece of the images."""
    m_blocks, n_blocks = w.blocks
    tile = m_blocks * n_blocks * _tile_cycles(w.block_out, w.block_in, w.lanes, w.n)
    results = _RESULT * w.n ** 2 / 36 * w.outs // w.lanes * w.channels
    return _images(w) * w.down * w.across * tile + results


def _direct_cycles(w: WinogradNhwcWeights) -> float:
    """The same for the definition."""
    return _images(w) * w.height * w.width * w.side ** 2 * w.outs * w.channels / (w.lanes * _SHARE)


def winograd_nhwc_weights_tasks(w: WinogradNhwcWeights) -> DimLike:
    """The number of tasks: pieces of the images, and blocks of channels, the last changing fastest."""
    return product(extent for _, extent in w.pieces) * w.blocks[0] * w.blocks[1]


def winograd_nhwc_weights_scratch(w: WinogradNhwcWeights) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())


def emit_winograd_nhwc_weights(module: Module, kernel: ContractionKernel, target: Target,
                               w: WinogradNhwcWeights) -> None:
    """Adds the kernel's function to the module."""
    _Emission(module, kernel, target, w).emit()


class _Emission(AlgorithmEmitter):
    """Within a task "in" and "out" are its first vectors of channels."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradNhwcWeights):
        super().__init__(module, kernel, target, w.lanes)
        self.w = w
        self.vectors: dict[str, Value] = {}     # of channels of a task, by the operand's piece of scratch
        self.first: dict[str, Value] = {}       # the first channel of them

    def emit(self) -> None:
        """The whole function."""
        e, b = self.e, self.b
        _, begin, end, _ = b.params
        self.scratch(self.w.parts(), {})
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            self._task(task.index)
        b.ret()

    def _task(self, index: Value) -> None:
        e, b, w = self.e, self.b, self.w
        outs, ins = w.blocks
        above = b.udiv(index, constant(I64, ins))
        piece = b.udiv(above, constant(I64, outs))
        block = {"inputs ": b.sub(index, b.mul(above, ins)), "gradients ": b.sub(above, b.mul(piece, outs))}
        for var, _ in w.pieces:
            e.scopes.bind(var, piece)
        for name, size, extent in (("inputs ", w.block_in, w.channels), ("gradients ", w.block_out, w.outs)):
            start = b.mul(block[name], size)
            self.first[name] = b.mul(start, w.lanes)
            self.vectors[name] = b.intrinsic("smin", b.sub(constant(I64, extent // w.lanes), start), size)
        with e.scopes.loop("zero", ZERO, constant(I64, w.parts()["zeros "] // w.lanes)) as loop:
            loop.next()
            b.store(constant(self.type, 0), b.gep(e.pointers["zeros "], b.mul(loop.index, w.lanes), FLOAT))
        images = e.scalar(w.image[1])
        if w.limit is not None:
            room = e.scalar(w.limit.bound - (w.limit.at - symbol(w.image[0])))
            images = b.intrinsic("smin", images, b.intrinsic("smax", room, 0))
        total = b.mul(images, w.down * w.across)
        for number, rows in enumerate(w.groups):
            with e.scopes.loop("first", ZERO, b.intrinsic("smax", total, 1), _TILES) as first:
                first.next()
                count = b.intrinsic("smin", b.sub(total, first.index), _TILES)
                self._transform("inputs ", w.inputs, w.matrices.b, rows, first.index, count)
                self._transform("gradients ", w.gradients, transposed(w.matrices.a), rows, first.index, count)
                self._products(len(rows) * w.n, count, b.compare("gt", first.index, 0))
            self._halves(number, len(rows))
        self._results()

    # -- transformations -----------------------------------------------------------------------------------

    def _transform(self, name: str, image: Image, matrix: Matrix, rows: tuple[int, ...], first: Value,
                   count: Value) -> None:
        """Transforms an operand of a block of tiles: some rows of matrix * window * matrix'."""
        e, b, w = self.e, self.b, self.w
        end, across = b.add(first, count), constant(I64, w.across)
        wanted = [i for i in range(len(matrix[0])) if any(matrix[r][i] for r in rows)]
        with e.scopes.loop("line", b.udiv(first, across), b.udiv(b.add(end, w.across - 1), across)) as line:
            line.next()
            number = b.udiv(line.index, constant(I64, w.down))
            e.scopes.bind(w.image[0], number)
            y = b.mul(b.sub(line.index, b.mul(number, w.down)), w.outputs)
            start = b.add(b.add(e.scalar(image.origin), self.first[name]), b.mul(y, image.row))
            lines = {i: b.gep(e.pointers[image.arg], b.add(start, i * image.row), FLOAT) for i in wanted}
            within = {i: self._inside(y, i, w.down, image.top, image.bottom) for i in wanted}
            before = b.sub(b.mul(line.index, across), first)        # tiles of the block on lines above
            stop = b.intrinsic("smin", b.sub(count, before), across)
            with e.scopes.loop("x", b.intrinsic("smax", b.sub(ZERO, before), 0), stop) as x:
                x.next()
                place = b.mul(x.index, w.outputs)
                places = [self._inside(place, j, w.across, image.left, image.right)
                          for j in range(len(matrix[0]))]
                shift = b.mul(place, image.column)
                starts = {i: self._or_zeros(b.gep(at, shift, FLOAT), within[i]) for i, at in lines.items()}
                into = b.gep(e.pointers[name], b.mul(b.add(before, x.index), w.lanes), FLOAT)
                self._window(name, image, matrix, rows, starts, places, into)

    def _window(self, name: str, image: Image, matrix: Matrix, rows: tuple[int, ...], lines: dict[int, Value],
                places: list[Value | None], into: Value) -> None:
        """One tile of `_transform`. `lines`: the addresses of the lines of its window that are wanted;
        `places`: which of their places are within the image; `into`: where its first vector goes."""
        e, b, w = self.e, self.b, self.w
        chosen, fma = tuple(matrix[r] for r in rows), e.target.has_fma
        stride = w.stride(w.block_in if name == "inputs " else w.block_out)
        nothing = constant(self.type, 0)        # where all coefficients are 0
        with e.scopes.loop("vector", ZERO, self.vectors[name]) as vector:
            vector.next()
            channel = b.mul(vector.index, w.lanes)
            starts = {i: b.gep(line, channel, FLOAT) for i, line in lines.items()}
            halves = []
            for j, inside in enumerate(places):
                values = [self._read(starts[i], j * image.column, inside) if i in starts else nothing
                          for i in range(len(matrix[0]))]
                halves.append(multiply(b, chosen, values, fma))
            to = b.gep(into, b.mul(channel, _TILES), FLOAT)
            for r in range(len(rows)):
                for j, value in enumerate(multiply(b, matrix, [half[r] for half in halves], fma)):
                    b.store(value, b.gep(to, (r * w.n + j) * stride, FLOAT), align=4 * w.lanes)

    def _inside(self, start: Value, i: int, tiles: int, low: int, high: int) -> Value | None:
        """Whether place i of the window that starts at `start` is within the image; None if always."""
        last = self.w.outputs * (tiles - 1) + i + low
        if i + low >= 0 and last < high:
            return None
        return self.b.compare("ult", self.b.add(start, i + low), high)

    def _or_zeros(self, address: Value, inside: Value | None) -> Value:
        """The address, or that of zeros if outside."""
        return address if inside is None else self.b.select(inside, address, self.e.pointers["zeros "])

    def _read(self, start: Value, offset: int, inside: Value | None) -> Value:
        """A vector of channels, zeros if outside."""
        b = self.b
        at = b.gep(start, offset, FLOAT) if offset else start
        if inside is None:
            return b.load(self.type, at)
        if self.w.lanes < 8:       # masks are slow
            return b.load(self.type, self._or_zeros(at, inside))
        return b.masked_load(self.type, at, b.splat(inside, self.w.lanes))

    # -- products ------------------------------------------------------------------------------------------

    def _products(self, products: int, count: Value, again: Value) -> None:
        """Adds so many products of the block's first `count` tiles to the sums, which are 0 yet unless
        `again`."""
        e, b, w = self.e, self.b, self.w
        line = _TILES * w.lanes
        square = w.lanes * w.lanes
        kept = b.splat(b.sub(constant(I32, 0), b.cast(again, I32)), w.lanes)
        with e.scopes.loop("product", ZERO, constant(I64, products)) as turn:
            turn.next()
            rows = b.gep(e.pointers["inputs "], b.mul(turn.index, w.stride(w.block_in)), FLOAT)
            columns = b.gep(e.pointers["gradients "], b.mul(turn.index, w.stride(w.block_out)), FLOAT)
            whole = b.gep(e.pointers["sums "], b.mul(turn.index, w.apart), FLOAT)
            with e.scopes.loop("column", ZERO, self.vectors["gradients "], w.nv) as column:
                column.next()
                right = b.gep(columns, b.mul(column.index, line), FLOAT)
                with e.scopes.loop("row", ZERO, self.vectors["inputs "]) as row:
                    row.next()
                    left = b.gep(rows, b.mul(row.index, line), FLOAT)
                    at = b.add(b.mul(row.index, w.block_out), column.index)
                    sums = b.gep(whole, b.mul(at, square), FLOAT)
                    with e.scopes.loop("part", ZERO, constant(I64, w.lanes), w.mr) as part:
                        part.next()
                        self._register_tile(b.gep(left, part.index, FLOAT), right,
                                            b.gep(sums, b.mul(part.index, w.lanes), FLOAT), count, kept)

    def _register_tile(self, left: Value, right: Value, sums: Value, count: Value, kept: Value) -> None:
        """Adds the products of `mr` input channels with `nv` vectors of output channels. `kept`: the bits of
        the sums that count."""
        e, b, w = self.e, self.b, self.w
        places = [b.gep(sums, v * w.lanes * w.lanes + r * w.lanes, FLOAT)
                  for r in range(w.mr) for v in range(w.nv)]
        zero = constant(self.type, 0)
        loaded = [b.load(I32.vector(w.lanes), p, align=4 * w.lanes) for p in places]
        before = [b.bitcast(b.and_(bits, kept), self.type) for bits in loaded]
        with e.scopes.loop("k", ZERO, count, 1, [zero] * len(places)) as k:
            at = b.mul(k.index, w.lanes)
            row = b.gep(left, at, FLOAT)
            lines = [b.gep(right, b.add(at, v * _TILES * w.lanes), FLOAT) for v in range(w.nv)]
            vectors = [b.load(self.type, line, align=4 * w.lanes) for line in lines]
            after = []
            for r in range(w.mr):
                element = b.load(FLOAT, b.gep(row, r, FLOAT))
                sums_of_row = k.carry[r * w.nv:(r + 1) * w.nv]
                after += [self.multiply(element, vector, s) for vector, s in zip(vectors, sums_of_row)]
            k.next(*after)
        for place, total, more in zip(places, before, k.results):
            b.store(b.add(total, more), place, align=4 * w.lanes)

    # -- results -------------------------------------------------------------------------------------------

    def _halves(self, number: int, rows: int) -> None:
        """Applies G to each row of a group's sums: while they are in the cache, and to leave less."""
        e, b, w = self.e, self.b, self.w
        with e.scopes.loop("row", ZERO, self.vectors["inputs "]) as row:
            row.next()
            with e.scopes.loop("line", ZERO, b.mul(self.vectors["gradients "], w.lanes)) as line:
                line.next()
                at = b.mul(b.add(b.mul(row.index, w.block_out * w.lanes), line.index), w.lanes)
                sums, to = (b.gep(e.pointers[name], at, FLOAT) for name in ("sums ", "halves "))
                for i in range(rows):
                    loaded = self._load_apart(sums, [(i * w.n + j) * w.apart for j in range(w.n)])
                    first = (2 * number + i) * w.side
                    for s, value in enumerate(self._finish(loaded)):
                        b.store(value, b.gep(to, (first + s) * w.apart, FLOAT), align=4 * w.lanes)

    def _load_apart(self, first: Value, offsets: list[int]) -> list[Value]:
        b = self.b
        return [b.load(self.type, b.gep(first, at, FLOAT), align=4 * self.w.lanes) for at in offsets]

    def _finish(self, sums: list[Value]) -> list[Value]:
        """G' of a row or a column of sums."""
        return multiply(self.b, transposed(self.w.matrices.g), sums, self.e.target.has_fma)

    def _results(self) -> None:
        """G' s G of each pair of channels, and the stores: a square of vectors of channels at a time."""
        e, b, w = self.e, self.b, self.w
        places = w.side ** 2
        e.bounds.update({"start": (0, places * (w.channels - 1)), "flat": (0, places * w.channels - 1)})
        with e.scopes.loop("column", ZERO, self.vectors["gradients "]) as column:
            column.next()
            first = b.add(self.first["gradients "], b.mul(column.index, w.lanes))
            e.scopes.bind("out start", first)
            with e.scopes.loop("row", ZERO, self.vectors["inputs "]) as row:
                row.next()
                square = b.add(b.mul(row.index, w.block_out), column.index)
                self._back(b.gep(e.pointers["halves "], b.mul(square, w.lanes ** 2), FLOAT))
                self._turn()
                start = b.mul(b.add(self.first["inputs "], b.mul(row.index, w.lanes)), places)
                e.scopes.bind("start", start)
                with e.scopes.loop(w.out, first, b.add(first, w.lanes)) as out:
                    out.next()
                    with e.scopes.loop("flat", start, b.add(start, places * w.lanes), w.lanes, (),
                                       lambda i: Lane("flat", w.lanes, None, w.lanes)) as flat:
                        flat.next()
                        self._store()

    def _back(self, first: Value) -> None:
        """The gradients of a square of channels, [input channel][tap][output channel], from what `_halves`
        left at `first`."""
        e, b, w = self.e, self.b, self.w
        where = {r: 2 * number + i for number, rows in enumerate(w.groups) for i, r in enumerate(rows)}
        with e.scopes.loop("lane", ZERO, constant(I64, w.lanes)) as lane:
            lane.next()
            at = b.gep(first, b.mul(lane.index, w.lanes), FLOAT)
            to = b.gep(e.pointers["finished "], b.mul(lane.index, w.side ** 2 * w.lanes), FLOAT)
            for s in range(w.side):
                loaded = self._load_apart(at, [(where[i] * w.side + s) * w.apart for i in range(w.n)])
                for r, value in enumerate(self._finish(loaded)):
                    b.store(value, b.gep(to, (w.side * r + s) * w.lanes, FLOAT), align=4 * w.lanes)

    def _turn(self) -> None:
        """Turns [input channel and tap][output channel] into [output channel][input channel and tap]."""
        e, b, w = self.e, self.b, self.w
        size = w.lanes
        with e.scopes.loop("flat", ZERO, constant(I64, w.side ** 2 * size), size) as flat:
            flat.next()
            first = b.gep(e.pointers["finished "], b.mul(flat.index, size), FLOAT)
            block = [b.load(self.type, b.gep(first, i * size, FLOAT), align=4 * size) for i in range(size)]
            to = b.gep(e.pointers["turned "], flat.index, FLOAT)
            for i, vector in enumerate(transpose(e, block)):
                b.store(vector, b.gep(to, i * w.side ** 2 * size, FLOAT), align=4 * size)

    def _store(self) -> None:
        """The stores of a vector of the weights of one output channel."""
        e, b, w = self.e, self.b, self.w
        row = (symbol(w.out) - symbol("out start")) * (w.side ** 2 * w.lanes)
        at = e.address("turned ", row + symbol("flat") - symbol("start"))
        total = b.load(self.type, at, align=4 * w.lanes)
        self.store(total, axis_values(e, self.c.n, symbol("flat"), ""))
