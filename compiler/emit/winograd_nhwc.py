"""Convolutions of 3 x 3 and 5 x 5 places without stride by Winograd's algorithm with vectors along channels:
for images whose channels are neighbours in memory.

With d the inputs under a tile of outputs and g the weights of a pair of channels, the tile is
A[(G g G') * (B d B')]A' (A, B, G: the matrices of F(outputs, places) of `winograd_matrices`; A. Lavin,
S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015), summed over the input channels before A is
applied: F(4 x 4, 3 x 3) takes 36 multiplications where the definition has 144. So there are 36 matrix
products with tiles as rows, input channels as k and output channels as columns.

A function of its own, which runs before, transforms the weights into scratch. A task is a block of tiles, of
all images in turn: their inputs are transformed into scratch, where they stay in the second level cache; for
every panel of output channels a micro-kernel multiplies, and what the transformation back gives are finished
sums for the kernel's stores.

The form of the kernel does not change: this is one way to compute a contraction that happens to be such a
convolution, or the gradient of one for its input. An infinite input makes NaN of its whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

from graphflow.compiler.emit.builder import I1, I64, Module, Value, constant, vector_constant
from graphflow.compiler.emit.cost import UNKNOWN
from graphflow.compiler.emit.expr import strides
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.operands import algorithm_asked, coefficient, is_direct, load_offset, names_of
from graphflow.compiler.emit.packing import transpose
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.winograd_matrices import Matrices, Matrix, multiply, winograd_matrices
from graphflow.compiler.emit.winograd_tiles import FLOAT, ZERO, WinogradEmitter, depends_on_sum, padded
from graphflow.compiler.kernel.form import Const, ContractionKernel, Expr, Guard, Guarded, Store
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, ceildiv, substitute, symbol, symbols_of
from graphflow.compiler.target import Target

SIZES = {3: (4, 2), 5: (4, 2)}
"""By the places of a kernel along an axis: outputs of a tile along an axis."""
K_BLOCK = 64
"""So many products are added up before their sum is added to others: so rounding does not grow with the
number of channels."""
_BLOCK = 14
"""About so many tiles make a task: weights are read once for each."""
_PEAK = 0.9
"""The share of the peak that products reach."""
_INPUT, _OUTPUT, _WEIGHT, _FAR_WEIGHT = 7.0, 6.0, 8.0, 23.0
"""Cycles to transform a vector, for each product: of inputs, of products, of weights that then lie in the
second level cache, or beyond it."""
_PREPARE = 64
"""So many pairs of an input channel and a vector of output channels make a task of those that transform
weights."""


@dataclass(frozen=True)
class WinogradNhwc:
    """How a contraction is computed so. `image`: the variable and extent of the batch, if there is one; `y`,
    `x`, `out`, `channel`, `taps`: variables of the contraction; `height`, `width`, `outs`, `channels`: their
    extents. `flip`: the weights are applied backwards; `side`: places of the kernel along an axis; `size`:
    outputs of a tile along one. mr, nr: the register tile; block: tiles of a task; lanes: of a vector."""

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
    size: int
    mr: int
    nr: int
    block: int
    lanes: int

    @property
    def matrices(self) -> Matrices:
        """Those of F(size, side)."""
        return winograd_matrices(self.size, self.side)

    @property
    def window(self) -> int:
        """Inputs under a tile, and what they become, along an axis."""
        return self.size + self.side - 1

    @property
    def products(self) -> int:
        """Matrix products: multiplications for a tile and a pair of channels."""
        return self.window**2

    @property
    def down(self) -> int:
        """Tiles along the height."""
        return -(-self.height // self.size)

    @property
    def across(self) -> int:
        """Tiles along the width."""
        return -(-self.width // self.size)

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return self.down * self.across

    @property
    def panels(self) -> int:
        """Panels of output channels."""
        return -(-self.outs // self.nr)

    @property
    def row(self) -> int:
        """Elements from one tile's transformed inputs to the next's: its channels, in whole vectors."""
        return -(-self.channels // self.lanes) * self.lanes

    @property
    def input_step(self) -> int:
        """Elements from the transformed inputs of one product to the next's."""
        return self._apart(self.block * self.row)

    @property
    def product_step(self) -> int:
        """Elements from one product to the next."""
        return self._apart(self.block * self.nr)

    @property
    def weight_step(self) -> int:
        """Elements from the transformed weights of one product to the next's, in a panel."""
        return self._apart(self.channels * self.nr)

    def _apart(self, size: int) -> int:
        """So many elements or a few more: an odd number of vectors, that a tile's numbers fall into different
        sets of the cache."""
        return (size // self.lanes | 1) * self.lanes

    @property
    def piece(self) -> int:
        """Input channels of a task that transforms weights."""
        return min(max(1, _PREPARE * self.lanes // self.nr), self.channels)

    @property
    def pieces(self) -> int:
        """Such tasks for a panel."""
        return -(-self.channels // self.piece)

    def weights(self) -> dict[str, int]:
        """The transformed weights [panel][product][channel][nr], in elements of scratch."""
        return padded({"weights ": self.panels * self.products * self.weight_step}, self.lanes)

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's own scratch, in elements: transformed inputs [product][tile][channel],
        products [product][tile][nr] and the finished sums of a tile and a vector of channels."""
        sizes = {
            "inputs ": self.products * self.input_step,
            "products ": self.products * self.product_step,
            "finished ": self.size**2 * self.lanes,
        }
        return padded(sizes, self.lanes)


# -- the choice ---------------------------------------------------------------------------------------------


def winograd_nhwc(kernel: ContractionKernel, target: Target) -> WinogradNhwc | None:
    """How the kernel is computed so; None where it is no such convolution, its tile names another algorithm,
    or none and the definition is faster."""
    asked = algorithm_asked(kernel)
    forms = [w for w in _forms(kernel, target) if asked in (None, w.size)] if asked != 0 else []
    if not forms:
        return None
    best = min(forms, key=lambda w: _cycles(w, target))
    return best if asked or _cycles(best, target) < 0.95 * _direct_cycles(best) else None


def _forms(kernel: ContractionKernel, target: Target) -> Iterator[WinogradNhwc]:
    """The ways that apply to the kernel."""
    c = kernel.contraction
    if kernel.indirect or c.groups or len(c.batch) > 1 or (len(c.m), len(c.n), len(c.k)) != (1, 2, 3):
        return
    ((out, outs),), ((y, height), (x, width)), ((channel, channels), *taps) = c.m, c.n, c.k
    side = taps[0][1]
    if c.a.dtype != dtypes.F32 or taps[1][1] != side or not isinstance(side, int) or side not in SIZES:
        return
    if not all(isinstance(d, int) and d > 0 for d in (outs, height, width, channels)):
        return
    others = {y, x, *(v for v, _ in c.batch)}
    if not is_direct(kernel, c.a, (*c.m, *c.k)) or names_of(c.a) & others or out in names_of(c.b):
        return
    step = next((s for s in (1, -1) if all(depends_on_sum(c.b, p, t, s)
                                           for p, (t, _) in zip((y, x), taps))), None)
    if step is None or not _reads_along(kernel, c.b, y, x, channel):
        return
    if not all(_writes_along(kernel, s, out) for s in c.stores):
        return
    assert isinstance(outs, int) and isinstance(channels, int)
    assert isinstance(height, int) and isinstance(width, int)
    for size in SIZES[side]:
        yield _tiled(WinogradNhwc(
            c.batch[0] if c.batch else ("image", 1), y, x, out, channel, (taps[0][0], taps[1][0]),
            height, width, outs, channels, step < 0, side, size, 1, 1, 1, target.vector_bytes // 4), target)


def _reads_along(kernel: ContractionKernel, b: Expr, y: str, x: str, channel: str) -> bool:
    """Whether the channels of b are neighbours in memory, and where its guards hold is a rectangle."""
    load, guards = (b.value, b.guards) if isinstance(b, Guarded) else (b, ())
    offset = load_offset(kernel, load)
    if offset is None or coefficient(offset, channel) != 1:
        return False
    if not all(isinstance(coefficient(offset, v), int) for v in (y, x)):
        return False
    return all(
        channel not in symbols_of(g.at, g.bound) and not symbols_of(g.bound) & {y, x}
        and all(isinstance(coefficient(g.at, v), int) for v in (y, x)) for g in guards
    )


def _writes_along(kernel: ContractionKernel, store: Store, out: str) -> bool:
    """Whether the output channels that a statement writes are neighbours in memory."""
    argument = next(a for a in kernel.arguments if a.name == store.arg)
    offset: DimLike = 0
    for d, step in zip(store.index, strides(argument)):
        offset = offset + d * step
    return coefficient(offset, out) == 1


def _tiled(w: WinogradNhwc, target: Target) -> WinogradNhwc:
    """With the register tile and the block of tiles chosen: few rows left over, and all that a block's tiles
    become within the second level cache."""
    nr = w.lanes if -(-w.outs // w.lanes) % 2 else 2 * w.lanes
    vectors = nr // w.lanes
    most = min((target.vector_registers - 2 - vectors) // vectors, 14)
    total = _images(w) * w.tiles
    mr = min(range(most, most // 2, -1), key=lambda r: -(-total // r) * (r + 0.5))
    room = target.l2 * 6 // 10 // (4 * w.products * (-(-w.channels // w.lanes) * w.lanes + nr))
    return replace(w, nr=nr, mr=mr, block=max(1, min(room // mr, round(_BLOCK / mr))) * mr)


def _images(w: WinogradNhwc) -> int:
    """Their number, or a guess."""
    return w.image[1] if isinstance(w.image[1], int) else UNKNOWN


def _cycles(w: WinogradNhwc, target: Target) -> float:
    """A rough count of cycles: products, transformations of inputs and of products, those of weights, and
    reading weights anew for each block of tiles where they lie beyond the second level cache."""
    total = _images(w) * w.tiles
    vectors = w.products * w.channels * w.panels * w.nr / w.lanes
    near = 4 * vectors * w.lanes < target.l2
    found = -(-total // w.mr) * w.mr * vectors / _PEAK
    found += total * w.products * (_INPUT * -(-w.channels // w.lanes) + _OUTPUT * w.panels * w.nr / w.lanes)
    return found + vectors * (_WEIGHT if near else _FAR_WEIGHT + total / w.block)


def _direct_cycles(w: WinogradNhwc) -> float:
    """That of the definition."""
    return _images(w) * w.height * w.width * w.side**2 * w.channels * -(-w.outs // w.lanes) / _PEAK


def winograd_nhwc_tasks(w: WinogradNhwc) -> DimLike:
    """The number of tasks: blocks of tiles."""
    return ceildiv(w.image[1] * w.tiles, w.block)


def winograd_nhwc_scratch(w: WinogradNhwc) -> int:
    """Bytes of scratch for each worker; what they share is counted for each."""
    return 4 * sum((*w.weights().values(), *w.parts().values()))


# -- code ---------------------------------------------------------------------------------------------------


def emit_winograd_nhwc(module: Module, kernel: ContractionKernel, target: Target, w: WinogradNhwc) -> None:
    """Adds the kernel's function and the one that prepares the weights to the module."""
    prepare = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = prepare.name, w.panels * w.pieces
    _Weights(module, prepare, target, w).emit()
    _Emission(module, kernel, target, w).emit()


class _Nhwc(WinogradEmitter):
    """What both functions share. In their scopes "panel" is the number of a panel of output channels."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradNhwc):
        super().__init__(module, kernel, target, w.lanes)
        self.w = w
        self.e.bounds.update({"panel": (0, w.panels - 1), "tile": (0, w.block - 1),
                              "tile y": (0, w.down - 1), "tile x": (0, w.across - 1)})

    def both_axes(self, matrix: Matrix, values: list[list[Value]]) -> list[list[Value]]:
        """The matrix applied to the columns, then to the rows."""
        fma = self.e.target.has_fma
        columns = [multiply(self.b, matrix, list(column), fma) for column in zip(*values)]
        return [multiply(self.b, matrix, list(row), fma) for row in zip(*columns)]


class _Weights(_Nhwc):
    """G g G' of every pair of channels; a task is a piece of the input channels and a panel of the output
    channels."""

    def emit(self) -> None:
        """The whole function."""
        e, b, w = self.e, self.b, self.w
        _, begin, end, _ = b.params
        self.scratch({}, w.weights())
        e.bounds.update({"column": (0, w.nr - 1), "tap": (0, w.side**2 - 1)})
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            panel = b.udiv(task.index, constant(I64, w.pieces))
            e.scopes.bind("panel", panel)
            start = b.mul(b.sub(task.index, b.mul(panel, w.pieces)), w.piece)
            stop = b.add(start, w.piece)
            if w.channels % w.piece:
                stop = b.intrinsic("smin", stop, w.channels)
            with e.scopes.loop(w.channel, start, stop) as channel:
                channel.next()
                with e.scopes.loop("column", ZERO, constant(I64, w.nr), w.lanes) as column:
                    column.next()
                    self._transform()
        b.ret()

    def _transform(self) -> None:
        e, b, w = self.e, self.b, self.w
        taps = self._taps()
        order = range(w.side - 1, -1, -1) if w.flip else range(w.side)
        for i, row in enumerate(self.both_axes(w.matrices.g, [[taps[i * w.side + j] for j in order]
                                                              for i in order])):
            for j, value in enumerate(row):
                number = symbol("panel") * w.products + w.window * i + j
                at = number * w.weight_step + symbol(w.channel) * w.nr + symbol("column")
                b.store(value, e.address("weights ", at), align=4 * w.lanes)

    def _taps(self) -> list[Value]:
        """The weights of a vector of output channels, each read along its taps. What lies beyond the last
        channel repeats it."""
        e, b, w = self.e, self.b, self.w
        first = b.add(b.mul(e.scopes.bound("panel"), w.nr), e.scopes.bound("column"))
        names = [f"out {i}" for i in range(w.lanes)]
        for i, name in enumerate(names):
            e.scopes.bind(name, b.intrinsic("smin", b.add(first, i), w.outs - 1))
            e.bounds[name] = (0, w.outs - 1)
        at = {w.taps[0]: symbol("tap") // w.side, w.taps[1]: symbol("tap") % w.side}
        nodes = [e.nodes.substitute(e.nodes.of(self.c.a), {w.out: symbol(name), **at}) for name in names]
        found: list[Value] = []
        for start in range(0, w.side**2, w.lanes):
            count = min(w.lanes, w.side**2 - start)
            mask = vector_constant(I1.vector(w.lanes), [i < count for i in range(w.lanes)])
            with e.scopes.block("tap", constant(I64, start), Lane("tap", w.lanes, mask, w.lanes)):
                vectors = [b.splat(e.value(node), w.lanes) for node in nodes]
            found += transpose(e, vectors)[:count]
        return found


class _Emission(_Nhwc):
    def emit(self) -> None:
        """The whole function."""
        e, b, w = self.e, self.b, self.w
        _, begin, end, _ = b.params
        self.scratch(w.parts(), w.weights())
        total = b.mul(e.scalar(w.image[1]), w.tiles)
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            first = b.mul(task.index, w.block)
            count = b.intrinsic("smin", b.sub(total, first), w.block)
            with self._tiles(first, count):
                self._inputs()
            with e.scopes.loop("panel", ZERO, constant(I64, w.panels)) as panel:
                panel.next()
                self._products(count)
                with self._tiles(first, count):
                    self._results()
        b.ret()

    @contextmanager
    def _tiles(self, first: Value, count: Value) -> Iterator[None]:
        """A loop over the task's tiles: "tile" is the number within the block, "tile y" and "tile x" the
        place in the image."""
        e, b, w = self.e, self.b, self.w
        with e.scopes.loop("tile", ZERO, count) as tile:
            tile.next()
            flat = b.add(first, tile.index)
            image = b.udiv(flat, constant(I64, w.tiles))
            place = b.sub(flat, b.mul(image, w.tiles))
            down = b.udiv(place, constant(I64, w.across))
            e.scopes.bind(w.image[0], image)
            e.scopes.bind("tile y", down)
            e.scopes.bind("tile x", b.sub(place, b.mul(down, w.across)))
            yield

    # -- inputs --------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        """B d B' of a tile: where nothing of its window is outside of the image, and elsewhere."""
        e, b, w = self.e, self.b, self.w
        node = e.nodes.substitute(e.nodes.of(self.c.b), dict.fromkeys(w.taps, 0))
        guards, value = (node.data, node.args[0]) if node.kind == "guarded" else ((), node)
        guards += tuple(self._within(v, n) for v, n in ((w.y, w.height), (w.x, w.width)) if n % w.size)
        node = e.nodes.guarded(guards, value, e.nodes.of(Const(0, dtypes.F32)))
        corners = [self._place(i, j) for i, j in product((0, w.window - 1), repeat=2)]
        needed = {Guard(substitute(g.at, at), substitute(g.bound, at)): None for at in corners
                  for g in guards}
        inside, _ = e.condition(tuple(needed))
        if inside is None:
            return self._transform(value)
        whole = b.cast(inside, I64)
        for part, stop, read in (("inside ", whole, value), ("border ", b.sub(1, whole), node)):
            with e.scopes.loop(part, ZERO, stop) as once:
                once.next()
                self._transform(read)

    def _place(self, i: int, j: int) -> dict[str, DimLike]:
        """The place of element i, j of the window."""
        w = self.w
        start = 1 - w.side if w.flip else 0
        return {w.y: w.size * symbol("tile y") + (start + i), w.x: w.size * symbol("tile x") + (start + j)}

    def _within(self, var: str, extent: int) -> Guard:
        """What is read for outputs of the image, not of tiles beyond it."""
        start = 1 - self.w.side if self.w.flip else 0
        return Guard(symbol(var) - start, extent + self.w.side - 1)

    def _transform(self, node: Node) -> None:
        e, b, w = self.e, self.b, self.w

        def body(carry: list[Value]) -> list[Value]:
            values = [[b.splat(e.value(e.nodes.substitute(node, self._place(i, j))), w.lanes)
                       for j in range(w.window)] for i in range(w.window)]
            at = symbol("tile") * w.row + symbol(w.channel)
            for i, row in enumerate(self.both_axes(w.matrices.b, values)):
                for j, value in enumerate(row):
                    self.put(value, e.address("inputs ", (w.window * i + j) * w.input_step + at))
            return []

        e.scopes.lanes(w.channel, ZERO, constant(I64, w.channels), w.lanes, body, masked_only=True)

    # -- products and results ------------------------------------------------------------------------------

    def _products(self, count: Value) -> None:
        """The products of the block's tiles and the current panel, block by block of channels."""
        e, w = self.e, self.w
        e.bounds.update({"number": (0, w.products - 1), "row": (0, w.block - 1),
                         "k": (0, w.channels - 1), "k from": (0, w.channels - 1)})
        piece = -(-w.channels // -(-w.channels // K_BLOCK))
        with e.scopes.loop("number", ZERO, constant(I64, w.products)) as turn:
            turn.next()
            with e.scopes.block("k from", ZERO):
                self._micro_kernels(count, min(piece, w.channels), resume=False)
            if piece < w.channels:
                with e.scopes.loop("k from", constant(I64, piece), constant(I64, w.channels), piece) as k:
                    k.next()
                    self._micro_kernels(count, piece, resume=True)

    def _micro_kernels(self, count: Value, piece: int, resume: bool) -> None:
        """One product of the block's tiles for `piece` channels; `resume`: added to what is there."""
        e, b, w = self.e, self.b, self.w
        wide = self.type.vector(w.nr)
        number, row, k = symbol("number"), symbol("row"), symbol("k")
        with e.scopes.loop("row", ZERO, count, w.mr) as rows:
            rows.next()
            start = e.scopes.bound("k from")
            stop = b.add(start, piece)
            if w.channels % piece:
                stop = b.intrinsic("smin", stop, w.channels)
            with e.scopes.loop("k", start, stop, 1, [constant(wide, 0)] * w.mr) as loop:
                base = (symbol("panel") * w.products + number) * w.weight_step
                right = b.load(wide, e.address("weights ", base + k * w.nr), align=4 * w.lanes)
                sums = []
                for r, total in enumerate(loop.carry):
                    at = number * w.input_step + (row + r) * w.row + k
                    sums.append(self.multiply(b.load(FLOAT, e.address("inputs ", at)), right, total))
                loop.next(*sums)
            for r, total in enumerate(loop.results):
                to = e.address("products ", number * w.product_step + (row + r) * w.nr)
                if resume:
                    total = b.add(total, b.load(wide, to, align=4 * w.lanes))
                b.store(total, to, align=4 * w.lanes)

    def _results(self) -> None:
        """A m A' of a tile for the panel's channels, and the stores."""
        e, b, w = self.e, self.b, self.w
        start = b.mul(e.scopes.bound("panel"), w.nr)
        stop = b.add(start, w.nr) if w.outs % w.nr == 0 else b.intrinsic("smin", b.add(start, w.nr), w.outs)
        if w.outs % w.lanes:
            e.scopes.lanes(w.out, start, stop, w.lanes, self._back, masked_only=True)
            return
        with e.scopes.loop(w.out, start, stop, w.lanes,
                           lane=lambda at: Lane(w.out, w.lanes, None, w.lanes)) as out:
            out.next()
            self._back([])

    def _back(self, carry: list[Value]) -> list[Value]:
        e, b, w = self.e, self.b, self.w
        at = symbol("tile") * w.nr + symbol(w.out) - symbol("panel") * w.nr
        values = [[b.load(self.type, e.address("products ", (w.window * i + j) * w.product_step + at),
                          align=4 * w.lanes) for j in range(w.window)] for i in range(w.window)]
        for i, row in enumerate(self.both_axes(w.matrices.a, values)):
            for j, value in enumerate(row):
                b.store(value, e.address("finished ", (w.size * i + j) * w.lanes), align=4 * w.lanes)
        with self._outputs(w.y, "tile y", w.height), self._outputs(w.x, "tile x", w.width):
            y, x = symbol(w.y) - w.size * symbol("tile y"), symbol(w.x) - w.size * symbol("tile x")
            total = b.load(self.type, e.address("finished ", (w.size * y + x) * w.lanes), align=4 * w.lanes)
            self.store(total, {})
        return []

    @contextmanager
    def _outputs(self, var: str, tile: str, extent: int) -> Iterator[None]:
        """A loop over the tile's outputs along an axis."""
        e, b, w = self.e, self.b, self.w
        start = b.mul(e.scopes.bound(tile), w.size)
        stop = b.add(start, w.size)
        if extent % w.size:
            stop = b.intrinsic("smin", stop, extent)
        with e.scopes.loop(var, start, stop) as loop:
            loop.next()
            yield

