"""Code for convolutions by Winograd's algorithm with vectors along channels: see `winograd_nhwc`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

from graphflow.compiler.emit.algorithm import FLOAT, ZERO, AlgorithmEmitter
from graphflow.compiler.emit.builder import I1, I64, Module, Value, constant, vector_constant
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.packing import transpose
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.winograd_matrices import Matrix, both_axes
from graphflow.compiler.emit.winograd_nhwc import WinogradNhwc
from graphflow.compiler.kernel.form import Const, ContractionKernel, Guard
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, substitute, symbol
from graphflow.compiler.target import Target

K_BLOCK = 64
"""So many products are added up before their sum is added to others: so rounding does not grow with the
number of channels."""


def emit_winograd_nhwc(module: Module, kernel: ContractionKernel, target: Target, w: WinogradNhwc) -> None:
    """Adds the kernel's function and the one that prepares the weights to the module."""
    prepare = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = prepare.name, w.panels * w.pieces
    _Weights(module, prepare, target, w).emit()
    _Emission(module, kernel, target, w).emit()


class _Nhwc(AlgorithmEmitter):
    """What both functions share. In their scopes "panel" is the number of a panel of output channels."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, w: WinogradNhwc):
        super().__init__(module, kernel, target, w.lanes)
        self.w = w
        self.e.bounds.update({"panel": (0, w.panels - 1), "tile": (0, w.block - 1), "fold": (1, w.fold)})
        for tile, place, count, pitch in zip(("tile y", "tile x"), ("top", "left"), w.grid(w.fold), w.pitch):
            self.e.bounds[tile] = (0, count - 1)
            self.e.bounds[place] = (0, w.size * (count - 1) if w.fold == 1 else pitch - 1)

    def both_axes(self, matrix: Matrix, values: list[list[Value]]) -> list[list[Value]]:
        """The matrix applied to the columns, then to the rows."""
        return both_axes(self.b, matrix, values, self.e.target.has_fma)


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
        total = e.scalar(w.tiles(w.image[1]))
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
        place in the mosaic, of "fold" images by as many from "first image" on."""
        e, b, w = self.e, self.b, self.w
        with e.scopes.loop("tile", ZERO, count) as tile:
            tile.next()
            flat = b.add(first, tile.index)
            (down, across), (rows, columns) = w.grid(w.fold), w.grid(1)
            if w.fold == 1:
                image, place = self._divide(flat, constant(I64, rows * columns))
                y, x = self._divide(place, constant(I64, columns))
                e.scopes.bind("fold", constant(I64, 1))
            else:
                groups = e.scalar(w.image[1] // w.fold**2)
                whole = b.mul(groups, down * across)
                folded = b.compare("lt", flat, whole)
                size, width, fold = (b.select(folded, constant(I64, p), constant(I64, q)) for p, q in (
                    (down * across, rows * columns), (across, columns), (w.fold, 1)))
                group, place = self._divide(b.sub(flat, b.select(folded, ZERO, whole)), size)
                y, x = self._divide(place, width)
                image = b.select(folded, b.mul(group, w.fold**2), b.add(b.mul(groups, w.fold**2), group))
                e.scopes.bind("fold", fold)
            e.scopes.bind("first image", image)
            e.scopes.bind("tile y", y)
            e.scopes.bind("tile x", x)
            yield

    def _divide(self, x: Value, by: Value) -> tuple[Value, Value]:
        """Quotient and rest."""
        found = self.b.udiv(x, by)
        return found, self.b.sub(x, self.b.mul(found, by))

    # -- inputs --------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        """B d B' of a tile: where all of its window is inside of one image, and elsewhere; in a mosaic, there
        of a copy of the window."""
        e, b, w = self.e, self.b, self.w
        node = e.nodes.substitute(e.nodes.of(self.c.b), dict.fromkeys(w.taps, 0))
        guards, value = (node.data, node.args[0]) if node.kind == "guarded" else ((), node)
        first, last = ([w.size * symbol(tile) + i for tile in ("tile y", "tile x")]
                       for i in (0, w.window - 1))
        if w.fold == 1:
            guards += tuple(self._within(v, n) for v, n in ((w.y, w.height), (w.x, w.width)) if n % w.size)
            needed = []
            origin: tuple[DimLike, ...] = (*first, symbol("first image"))
        else:
            needed = [Guard(q // p - o // p, 1) for o, q, p in zip(first, last, w.pitch)]
            needed += [Guard(q // p, symbol("fold")) for q, p in zip(last, w.pitch)]
            origin = (*(o % p for o, p in zip(first, w.pitch)), self._image(*first))
        for name, at in zip(("top", "left", "here"), origin):
            e.scopes.bind(name, e.scalar(at))
        corners = [self._inside(i, j) for i, j in product((0, w.window - 1), repeat=2)]
        needed += [Guard(substitute(g.at, at), substitute(g.bound, at)) for at in corners for g in guards]
        inside, _ = e.condition(tuple(dict.fromkeys(needed)))
        if inside is None:
            return self._transform(lambda i, j: e.nodes.substitute(value, self._inside(i, j)))
        whole = b.cast(inside, I64)
        with e.scopes.loop("inside ", ZERO, whole) as once:
            once.next()
            self._transform(lambda i, j: e.nodes.substitute(value, self._inside(i, j)))
        with e.scopes.loop("border ", ZERO, b.sub(1, whole)) as once:
            once.next()
            if w.fold == 1:
                self._transform(lambda i, j: self._guarded(guards, value, self._inside(i, j)))
            else:
                self._copy(guards, value)
                self._transform(self._copied)

    def _inside(self, i: int, j: int) -> dict[str, DimLike]:
        """The place of element i, j of a window within one image."""
        w = self.w
        return {w.y: symbol("top") + (w.start + i), w.x: symbol("left") + (w.start + j),
                w.image[0]: symbol("here")}

    def _image(self, y: DimLike, x: DimLike) -> DimLike:
        """The image at a place of the mosaic."""
        rows, columns = y // self.w.pitch[0], x // self.w.pitch[1]
        return symbol("first image") + rows * symbol("fold") + columns

    def _copy(self, guards: tuple[Guard, ...], value: Node) -> None:
        """The window as it is in memory, with 0 where it is outside of the images."""
        e, b, w = self.e, self.b, self.w
        rows, columns, fold = symbol("row "), symbol("column "), symbol("fold")
        at = {w.y: symbol("y ") + w.start, w.x: symbol("x ") + w.start,
              w.image[0]: symbol("first image") + rows * fold + columns}
        node = self._guarded((Guard(rows, fold), Guard(columns, fold), *guards), value, at)

        def body(carry: list[Value]) -> list[Value]:
            to = (w.window * symbol("window y") + symbol("window x")) * w.row + symbol(w.channel)
            self.put(b.splat(e.value(node), w.lanes), e.address("window ", to))
            return []

        with self._window(0, "window y"), self._window(1, "window x"):
            e.scopes.lanes(w.channel, ZERO, constant(I64, w.channels), w.lanes, body, masked_only=True)

    @contextmanager
    def _window(self, axis: int, name: str) -> Iterator[None]:
        """A loop over the window along an axis: binds the place in the image, and which image it is."""
        e, b, w = self.e, self.b, self.w
        first = b.mul(e.scopes.bound(("tile y", "tile x")[axis]), w.size)
        with e.scopes.loop(name, ZERO, constant(I64, w.window)) as loop:
            loop.next()
            number, at = self._locate(axis, b.add(first, loop.index))
            e.scopes.bind(("row ", "column ")[axis], number)
            e.scopes.bind(("y ", "x ")[axis], at)
            yield

    def _guarded(self, guards: tuple[Guard, ...], value: Node, at: dict[str, DimLike]) -> Node:
        """The value at a place, 0 where not all guards hold."""
        nodes = self.e.nodes
        holds = tuple(Guard(substitute(g.at, at), substitute(g.bound, at)) for g in guards)
        return nodes.guarded(holds, nodes.substitute(value, at), nodes.of(Const(0, dtypes.F32)))

    def _locate(self, axis: int, at: Value) -> tuple[Value, Value]:
        """Which of a mosaic's images is at a place along an axis, and where in it that is."""
        return (ZERO, at) if self.w.fold == 1 else self._divide(at, constant(I64, self.w.pitch[axis]))

    def _copied(self, i: int, j: int) -> Node:
        """Element i, j of the window's copy."""
        at = (self.w.window * i + j) * self.w.row + symbol(self.w.channel)
        return self.e.nodes.make("load", ("window ", (at,), 0), (), dtypes.F32, (at,))

    def _within(self, var: str, extent: int) -> Guard:
        """What is read for outputs of the image, not of tiles beyond it."""
        return Guard(symbol(var) - self.w.start, extent + self.w.side - 1)

    def _transform(self, element: Callable[[int, int], Node]) -> None:
        e, b, w = self.e, self.b, self.w
        nodes = [[element(i, j) for j in range(w.window)] for i in range(w.window)]

        def body(carry: list[Value]) -> list[Value]:
            values = [[b.splat(e.value(node), w.lanes) for node in row] for row in nodes]
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
        e.scopes.bind("row image", e.scopes.bound("first image"))
        with self._outputs(0, "y "), self._outputs(1, "x "):
            at = (w.size * symbol("y ") + symbol("x ")) * w.lanes
            self.store(b.load(self.type, e.address("finished ", at), align=4 * w.lanes), {})
        return []

    @contextmanager
    def _outputs(self, axis: int, name: str) -> Iterator[None]:
        """A loop over a tile's outputs along an axis, those of images: `name` is the number within the
        tile."""
        e, b, w = self.e, self.b, self.w
        var, extent, pitch = (w.y, w.x)[axis], (w.height, w.width)[axis], w.pitch[axis]
        start = b.mul(e.scopes.bound(("tile y", "tile x")[axis]), w.size)
        fold, image = e.scopes.bound("fold"), e.scopes.bound("row image")
        stop: Value = constant(I64, w.size)
        if extent % w.size or w.fold > 1:
            end = b.add(b.mul(b.sub(fold, 1), pitch), extent) if w.fold > 1 else constant(I64, extent)
            stop = b.intrinsic("smin", b.sub(end, start), stop)
        with e.scopes.loop(name, ZERO, stop) as loop:
            loop.next()
            at, valid = b.add(start, loop.index), constant(I64, 1)
            if w.fold > 1:
                number, at = self._locate(axis, at)
                image = b.add(image, number if axis else b.mul(number, fold))
                valid = b.cast(b.compare("lt", at, extent), I64)
            e.scopes.bind(var, at)
            e.scopes.bind(w.image[0] if axis else "row image", image)
            with e.scopes.loop(f"{name}valid", ZERO, valid) as once:
                once.next()
                yield
