"""Code for convolutions by Winograd's algorithm with vectors along images: see `winograd_images`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from graphflow.compiler.emit.algorithm import FLOAT, ZERO, AlgorithmEmitter
from graphflow.compiler.emit.builder import I64, Module, Value, constant, vector_constant
from graphflow.compiler.emit.packing import axis_values, transpose
from graphflow.compiler.emit.winograd_images import Plane, Tiles, WinogradImages, WinogradImagesWeights
from graphflow.compiler.emit.winograd_matrices import Matrix, both_axes, multiply, transposed
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.target import Target


def emit_winograd_images(module: Module, kernel: ContractionKernel, target: Target, w: WinogradImages
                         ) -> None:
    """Adds the kernel's function and the one that prepares the weights to the module."""
    prepare = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = prepare.name, w.m_tiles * w.operand.channels
    _Weights(module, prepare, target, w).emit()
    _Convolution(module, kernel, target, w).emit()


def emit_winograd_images_weights(module: Module, kernel: ContractionKernel, target: Target,
                                 w: WinogradImagesWeights) -> None:
    """Adds the kernel's function to the module."""
    _WeightGradient(module, kernel, target, w).emit()


class _Weights(AlgorithmEmitter):
    """G g G' of every pair of channels; a task is an input channel and a register tile of output channels."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradImages):
        super().__init__(module, kernel, target, w.tiles.lanes)
        self.w = w

    def emit(self) -> None:
        """The whole function."""
        e, b, w = self.e, self.b, self.w
        _, begin, end, _ = b.params
        self.scratch({}, w.weights())
        e.bounds.update({"m tile": (0, w.m_tiles - 1), "row": (0, w.mr - 1)})
        channels = w.operand.channels
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            tile = b.udiv(task.index, constant(I64, channels))
            e.scopes.bind("m tile", tile)
            e.scopes.bind(w.operand.channel, b.sub(task.index, b.mul(tile, channels)))
            left = b.sub(constant(I64, w.outs), b.mul(tile, w.mr))
            stop = constant(I64, w.mr) if w.outs % w.mr == 0 else b.intrinsic("smin", left, w.mr)
            count = min(w.tiles.lanes, 1 << (w.mr - 1).bit_length())
            e.scopes.lanes("row", ZERO, stop, count, self._transform, masked_only=True)
        b.ret()

    def _transform(self, carry: list[Value]) -> list[Value]:
        e, b, w = self.e, self.b, self.w
        lane = e.scopes.lane
        assert lane is not None
        node = e.nodes.substitute(e.nodes.of(self.c.a), {w.out: symbol("m tile") * w.mr + symbol("row")})
        taps = range(w.tiles.side - 1, -1, -1) if w.flip else range(w.tiles.side)
        values = [[b.splat(e.value(e.nodes.substitute(node, dict(zip(w.taps, (i, j))))), lane.count)
                   for j in taps] for i in taps]
        for i, row in enumerate(both_axes(b, w.tiles.matrices.g, values, e.target.has_fma)):
            for j, value in enumerate(row):
                number = symbol("m tile") * w.products + w.tiles.window * i + j
                at = (number * w.operand.channels + symbol(w.operand.channel)) * w.mr
                self.put(value, e.address("weights ", at + symbol("row")))
        return []


class _Images(AlgorithmEmitter):
    """Emits code on bands of images in scratch, with images as lanes. In its scopes "first image" and "first
    row" tell where a band begins."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, tiles: Tiles):
        super().__init__(module, kernel, target, tiles.lanes)
        self.tiles = t = tiles
        self.e.bounds["first row"] = (0, (t.bands - 1) * t.band * t.size)

    def load(self, first: Value, offset: int = 0) -> Value:
        """A vector of scratch."""
        return self.b.load(self.type, self.b.gep(first, offset, FLOAT), align=4 * self.tiles.lanes)

    def fill(self, name: str, count: int) -> None:
        """Sets elements of a piece of scratch to 0."""
        e, b, lanes = self.e, self.b, self.tiles.lanes
        with e.scopes.loop("at", ZERO, constant(I64, count), lanes) as loop:
            loop.next()
            b.store(constant(self.type, 0), e.address(name, symbol("at")), align=4 * lanes)

    def begin(self, first: Value, images: Value, band: Value) -> None:
        """Binds the images of the lanes, the last one for those beyond it, and the first row of a band."""
        e, b, t = self.e, self.b, self.tiles
        e.scopes.bind("first image", first)
        last = b.sub(images, 1)
        for i in range(t.lanes):
            e.scopes.bind(f"image {i}", b.intrinsic("smin", b.add(first, i), last))
        e.scopes.bind("first row", b.mul(band, t.band * t.size))

    def copy(self, name: str, plane: Plane, taps: tuple[str, ...], origin: tuple[int, int], apron: bool,
             keep: Value | None = None) -> None:
        """Copies a band of an operand, turned so that lanes are images, with 0 around it: element `origin` of
        the first band is the image's first. `keep`: the lanes that are not 0."""
        e, b, t = self.e, self.b, self.tiles
        (rows, columns), (top, left) = t.area(apron), origin
        self.fill(name, t.place(plane.channels, apron))
        e.bounds.update({"row": (0, plane.rows - 1), "column": (0, plane.columns - 1)})
        at = {t.y: symbol("row") + plane.shift[0], t.x: symbol("column") + plane.shift[1],
              **dict.fromkeys(taps, 0)}
        node = e.nodes.substitute(e.nodes.of(plane.load), at)
        nodes = [e.nodes.substitute(node, {t.image[0]: symbol(f"image {i}")}) for i in range(t.lanes)]

        def body(carry: list[Value]) -> list[Value]:
            assert e.scopes.lane is not None
            row = symbol(plane.channel) * rows + symbol("row") + top - symbol("first row")
            to = e.address(name, (row * columns + symbol("column") + left) * t.lanes)
            vectors = transpose(e, [e.value(n) for n in nodes])
            count = t.lanes if e.scopes.lane.mask is None else plane.columns % t.lanes
            for i, vector in enumerate(vectors[:count]):
                value = vector if keep is None else b.select(keep, vector, constant(self.type, 0))
                b.store(value, b.gep(to, i * t.lanes, FLOAT), align=4 * t.lanes)
            return []

        first = b.sub(e.scopes.bound("first row"), top)
        start, stop = b.intrinsic("smax", first, 0), b.intrinsic("smin", b.add(first, rows), plane.rows)
        with e.scopes.loop(plane.channel, ZERO, constant(I64, plane.channels)) as channel:
            channel.next()
            with e.scopes.loop("row", start, stop) as row:
                row.next()
                e.scopes.lanes("column", ZERO, constant(I64, plane.columns), t.lanes, body)

    def at_tile(self, tile: Value, columns: int) -> Value:
        """The element of a channel's band, of so many columns, where a tile begins."""
        b, t = self.b, self.tiles
        row = b.udiv(tile, constant(I64, t.across))
        column = b.sub(tile, b.mul(row, t.across))
        return b.mul(b.add(b.mul(row, t.size * columns), b.mul(column, t.size)), t.lanes)

    def square(self, first: Value, size: int, columns: int) -> list[list[Value]]:
        """The size x size vectors from an address on, in a band of so many columns."""
        return [[self.load(first, (i * columns + j) * self.tiles.lanes) for j in range(size)]
                for i in range(size)]

    def both_axes(self, matrix: Matrix, values: list[list[Value]]) -> list[list[Value]]:
        """The matrix applied to the columns, then to the rows."""
        return both_axes(self.b, matrix, values, self.e.target.has_fma)


class _Convolution(_Images):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradImages):
        super().__init__(module, kernel, target, w.tiles)
        self.w = w
        self.nr = w.nv * w.tiles.lanes
        self.inward, self.outward = w.tiles.matrices.b, w.tiles.matrices.a
        if w.turned:
            self.inward, self.outward = transposed(self.outward), transposed(self.inward)
        self.e.bounds.update({"m tile": (0, w.m_tiles - 1), "r": (0, w.mr - 1), "k": (0, w.operand.channels),
                              "number": (0, w.products - 1)})

    def emit(self) -> None:
        """The whole function."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        _, begin, end, _ = b.params
        self.scratch(w.parts(), w.weights())
        images = e.scalar(t.image[1])
        reach = w.tiles.side - 1 if w.flip else 0
        origin = (0, 0) if w.turned else (w.operand.shift[0] + reach, w.operand.shift[1] + reach)
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            number = b.udiv(task.index, constant(I64, t.bands))
            first = b.mul(number, t.lanes)
            self.begin(first, images, b.sub(task.index, b.mul(number, t.bands)))
            self.copy("images ", w.operand, w.taps, origin, not w.turned)
            if w.turned:
                self.fill("results ", t.place(w.outs, True))
            with e.scopes.loop("tile", ZERO, constant(I64, t.count), w.nv) as tile:
                tile.next()
                self._transform(tile.index)
                with e.scopes.loop("m tile", ZERO, constant(I64, w.m_tiles)) as rows:
                    rows.next()
                    self._products()
                    self._back(tile.index)
            self._results(first, b.intrinsic("smin", b.add(first, t.lanes), images))
        b.ret()

    def _transform(self, first: Value) -> None:
        """What a panel of tiles becomes."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        rows, columns = t.area(not w.turned)
        channel = symbol(w.operand.channel)
        starts = [self.at_tile(b.add(first, v), columns) for v in range(w.nv)]
        with e.scopes.loop(w.operand.channel, ZERO, constant(I64, w.operand.channels)) as loop:
            loop.next()
            base = e.address("images ", channel * (rows * columns * t.lanes))
            to = e.address("inputs ", channel * self.nr)
            for v, start in enumerate(starts):
                values = self.square(b.gep(base, start, FLOAT), len(self.inward[0]), columns)
                for i, row in enumerate(self.both_axes(self.inward, values)):
                    for j, value in enumerate(row):
                        at = (t.window * i + j) * w.operand.channels * self.nr + v * t.lanes
                        b.store(value, b.gep(to, at, FLOAT), align=4 * t.lanes)

    def _products(self) -> None:
        """The products of the current tile of output channels."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        channels, number, k = w.operand.channels, symbol("number"), symbol("k")
        with e.scopes.loop("number", ZERO, constant(I64, w.products)) as turn:
            turn.next()
            zeros = [constant(self.type, 0)] * (w.mr * w.nv)
            with e.scopes.loop("k", ZERO, constant(I64, channels), 1, zeros) as loop:
                at = e.address("inputs ", (number * channels + k) * self.nr)
                right = [self.load(at, v * t.lanes) for v in range(w.nv)]
                base = ((symbol("m tile") * w.products + number) * channels + k) * w.mr
                left = [b.splat(b.load(FLOAT, e.address("weights ", base + r)), t.lanes) for r in range(w.mr)]
                pairs = [(x, y) for x in left for y in right]
                loop.next(*(self.multiply(x, y, total) for (x, y), total in zip(pairs, loop.carry)))
            to = e.address("products ", number * w.mr * self.nr)
            for i, total in enumerate(loop.results):
                b.store(total, b.gep(to, i * t.lanes, FLOAT), align=4 * t.lanes)

    def _back(self, first: Value) -> None:
        """What the products of a panel become, put where it belongs in the results, or added there."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        (rows, columns), n = t.area(w.turned), t.window
        start = b.mul(e.scopes.bound("m tile"), w.mr)
        count = b.intrinsic("smin", b.sub(constant(I64, w.outs), start), w.mr)
        e.scopes.bind("m start", start)
        starts = [self.at_tile(b.add(first, v), columns) for v in range(w.nv)]
        with e.scopes.loop("r", ZERO, count) as row:
            row.next()
            base = e.address("results ", (symbol("m start") + symbol("r")) * (rows * columns * t.lanes))
            products = e.address("products ", symbol("r") * self.nr)
            for v, at in enumerate(starts):
                values = [[self.load(products, (n * i + j) * w.mr * self.nr + v * t.lanes) for j in range(n)]
                          for i in range(n)]
                to = b.gep(base, at, FLOAT)
                for i, found in enumerate(self.both_axes(self.outward, values)):
                    for j, value in enumerate(found):
                        place = b.gep(to, (i * columns + j) * t.lanes, FLOAT)
                        total = b.add(self.load(place), value) if w.turned else value
                        b.store(total, place, align=4 * t.lanes)

    def _results(self, first: Value, stop: Value) -> None:
        """Turns the results of the band back, and stores them."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        rows, columns = t.area(w.turned)
        top, left = w.operand.shift if w.turned else (0, 0)

        def body(carry: list[Value]) -> list[Value]:
            row = symbol(w.out) * rows + symbol(t.y) - symbol("first row") - top
            at = e.address("results ", (row * columns + symbol(t.x) - left) * t.lanes)
            for i, vector in enumerate(transpose(e, [self.load(at, i * t.lanes) for i in range(t.lanes)])):
                b.store(vector, e.address("block ", i * t.lanes), align=4 * t.lanes)
            with e.scopes.loop(t.image[0], first, stop) as image:
                image.next()
                place = (symbol(t.image[0]) - symbol("first image")) * t.lanes
                self.store(self.load(e.address("block ", place)), {})
            return []

        begin = e.scopes.bound("first row")
        end = constant(I64, w.height)
        if not w.turned:
            end = b.intrinsic("smin", b.add(begin, rows), end)
        with e.scopes.loop(w.out, ZERO, constant(I64, w.outs)) as out:
            out.next()
            with e.scopes.loop(t.y, begin, end) as y:
                y.next()
                e.scopes.lanes(t.x, ZERO, constant(I64, w.width), t.lanes, body)


class _WeightGradient(_Images):
    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradImagesWeights):
        super().__init__(module, kernel, target, w.tiles)
        self.w = w

    def emit(self) -> None:
        """The whole function."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        _, begin, end, _ = b.params
        self.scratch(w.parts(), {})
        taps = tuple(var for var, _ in self.c.n[1:])
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            for var, _ in w.pieces:
                e.scopes.bind(var, task.index)
            images = e.scalar(t.image[1])
            if w.limit is not None:
                room = e.scalar(w.limit.bound - (w.limit.at - symbol(t.image[0])))
                images = b.intrinsic("smin", images, b.intrinsic("smax", room, 0))
            self.fill("sums ", t.window ** 2 * w.blocks[0] * w.blocks[1] * t.lanes)
            with e.scopes.loop("first", ZERO, images, t.lanes) as first:
                first.next()
                keep = b.first_lanes(b.sub(images, first.index), t.lanes)
                with e.scopes.loop("band", ZERO, constant(I64, t.bands)) as band:
                    band.next()
                    self.begin(first.index, images, band.index)
                    self.copy("images ", w.inputs, taps, w.inputs.shift, True)
                    self.copy("image gradients ", w.gradients, (), (0, 0), False, keep)
                    for number, rows in enumerate(w.groups):
                        self._transform("inputs ", "images ", w.inputs, True, t.matrices.b, rows,
                                        w.blocks[1] * w.nr)
                        self._transform("gradients ", "image gradients ", w.gradients, False,
                                        transposed(t.matrices.a), rows, w.blocks[0] * w.mr)
                        self._products(number, len(rows) * t.window)
            self._results()
        b.ret()

    def _transform(self, name: str, source: str, plane: Plane, apron: bool, matrix: Matrix,
                   chosen: tuple[int, ...], channels: int) -> None:
        """What the band's tiles become: some rows of it. `channels`: with those that fill blocks."""
        e, b, t, fma = self.e, self.b, self.tiles, self.e.target.has_fma
        (rows, columns), size = t.area(apron), len(matrix[0])
        with e.scopes.loop(plane.channel, ZERO, constant(I64, plane.channels)) as channel:
            channel.next()
            base = e.address(source, symbol(plane.channel) * (rows * columns * t.lanes))
            into = e.address(name, symbol(plane.channel) * (t.count * t.lanes))
            with e.scopes.loop("tile", ZERO, constant(I64, t.count)) as tile:
                tile.next()
                values = self.square(b.gep(base, self.at_tile(tile.index, columns), FLOAT), size, columns)
                halves = [multiply(b, [matrix[r] for r in chosen], list(column), fma)
                          for column in zip(*values)]
                to = b.gep(into, b.mul(tile.index, t.lanes), FLOAT)
                for i, half in enumerate(zip(*halves)):
                    for j, value in enumerate(multiply(b, matrix, list(half), fma)):
                        at = (i * t.window + j) * channels * t.count * t.lanes
                        b.store(value, b.gep(to, at, FLOAT), align=4 * t.lanes)

    def _products(self, group: int, products: int) -> None:
        """Adds the products of the band's tiles to the sums of a group of rows."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        (out, inside), line = w.blocks, t.count * t.lanes
        first = group * w.rows * t.window
        with e.scopes.loop("number", ZERO, constant(I64, products)) as number:
            number.next()
            with e.scopes.loop("block out", ZERO, constant(I64, out)) as rows:
                rows.next()
                at = b.add(b.mul(number.index, out), rows.index)
                left = b.gep(e.pointers["gradients "], b.mul(at, w.mr * line), FLOAT)
                sums = b.gep(e.pointers["sums "], b.mul(b.add(at, first * out), inside * t.lanes), FLOAT)
                with e.scopes.loop("block in", ZERO, constant(I64, inside)) as columns:
                    columns.next()
                    at = b.mul(b.add(b.mul(number.index, inside), columns.index), w.nr * line)
                    total = self._register_tile(left, b.gep(e.pointers["inputs "], at, FLOAT))
                    to = b.gep(sums, b.mul(columns.index, t.lanes), FLOAT)
                    b.store(b.add(self.load(to), total), to, align=4 * t.lanes)

    def _register_tile(self, left: Value, right: Value) -> Value:
        """The sums of a block of pairs of channels, one in each lane."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        line = t.count * t.lanes
        zeros = [constant(self.type, 0)] * t.lanes
        with e.scopes.loop("k", ZERO, constant(I64, t.count), 1, zeros) as k:
            at = b.mul(k.index, t.lanes)
            rows, columns = b.gep(left, at, FLOAT), b.gep(right, at, FLOAT)
            inputs = [self.load(columns, c * line) for c in range(w.nr)]
            after = []
            for r in range(w.mr):
                gradient = self.load(rows, r * line)
                sums = k.carry[r * w.nr:(r + 1) * w.nr]
                after += [self.multiply(gradient, x, s) for x, s in zip(inputs, sums)]
            k.next(*after)
        return self._summed(list(k.results))

    def _summed(self, vectors: list[Value]) -> Value:
        """A vector of the sum of each vector's lanes: halves are interleaved and added until one is left."""
        b, size = self.b, len(vectors)
        low, high = ([x for i in range(size // 2) for x in (at + i, at + size + i)] for at in (0, size // 2))
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [b.add(b.shuffle(x, y, low), b.shuffle(x, y, high))
                       for x, y in zip(vectors[:half], vectors[half:])]
        return vectors[0]

    def _results(self) -> None:
        """G' s G of each block of pairs of channels, and the stores."""
        e, b, w, t = self.e, self.b, self.w, self.tiles
        places, (out, inside) = t.side ** 2, w.blocks
        row = inside * w.nr * places
        channels, outs = w.inputs.channels, w.gradients.channels
        e.bounds.update({"flat": (0, places * channels - 1), "block row": (0, (out - 1) * w.mr)})
        with e.scopes.loop("block out", ZERO, constant(I64, out)) as rows:
            rows.next()
            with e.scopes.loop("block in", ZERO, constant(I64, inside)) as columns:
                columns.next()
                at = b.mul(b.add(b.mul(rows.index, inside), columns.index), t.lanes)
                self._back(b.gep(e.pointers["sums "], at, FLOAT),
                           b.gep(e.pointers["finished "], b.mul(columns.index, w.nr * places), FLOAT), row)
            start = b.mul(rows.index, w.mr)
            e.scopes.bind("block row", start)
            stop = b.intrinsic("smin", b.add(start, w.mr), outs)
            with e.scopes.loop(w.gradients.channel, start, stop) as each:
                each.next()
                e.scopes.lanes("flat", ZERO, constant(I64, places * channels), t.lanes, self._store(row))

    def _back(self, sums: Value, to: Value, row: int) -> None:
        """The gradients of a block of pairs, from its sums, into `finished`."""
        b, w, t = self.b, self.w, self.tiles
        n, (out, inside), side = t.window, w.blocks, t.side
        where = {r: at for at, r in enumerate(r for rows in w.groups for r in rows)}
        values = [[self.load(sums, (where[i] * n + j) * out * inside * t.lanes) for j in range(n)]
                  for i in range(n)]
        pairs = vector_constant(I64.vector(t.lanes), [r * row + c * side ** 2
                                                      for r in range(w.mr) for c in range(w.nr)])
        for i, found in enumerate(self.both_axes(transposed(t.matrices.g), values)):
            for j, value in enumerate(found):
                b.scatter(value, b.gep(b.gep(to, side * i + j, FLOAT), pairs, FLOAT))

    def _store(self, row: int) -> Callable[[list[Value]], list[Value]]:
        """The stores of a vector of the weights of one output channel."""
        e = self.e

        def body(carry: list[Value]) -> list[Value]:
            out = symbol(self.w.gradients.channel) - symbol("block row")
            total = self.b.load(self.type, e.address("finished ", out * row + symbol("flat")), align=4)
            self.store(total, axis_values(e, self.c.n, symbol("flat"), ""))
            return []

        return body
