"""Tiles of 2 x 2 elements of images, and their transformations: what Winograd's algorithms share.

The tiles of all images form one long axis, cut into panels. A transformation takes a window of each tile of
a panel, along x and then along y, to as many numbers: 4 x 4 for kernels of 3 places, 6 x 6 for 5. Rows that
tiles share are transformed along x once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from graphflow.compiler.emit.algorithm import ZERO, AlgorithmEmitter
from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.tiling import whole_lines
from graphflow.compiler.emit.winograd_matrices import Matrices, Matrix, multiply, winograd_matrices
from graphflow.compiler.kernel.form import (
    Const,
    ContractionKernel,
    Expr,
    Guard,
    Guarded,
    Load,
)
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import substitute, symbol
from graphflow.compiler.target import Target

TILES_OF_2 = 2
"""The number of these algorithms in the table `candidates.ALGORITHMS`."""
SIDES = (3, 5)
"""The places of a kernel along an axis that there are tiles of 2 x 2 outputs for."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of an image of `height` x `width`, in panels of `panel` tiles, for kernels of `places` x
    `places`; `lanes` of a vector."""

    height: int
    width: int
    panel: int
    lanes: int
    places: int

    @property
    def window(self) -> int:
        """Inputs under a tile, along an axis, and the numbers that they become."""
        return self.places + 1

    @property
    def matrices(self) -> Matrices:
        """Those of the transformations."""
        return winograd_matrices(2, self.places)

    @property
    def down(self) -> int:
        """Tiles along the height."""
        return -(-self.height // 2)

    @property
    def across(self) -> int:
        """Tiles along the width."""
        return -(-self.width // 2)

    @property
    def count(self) -> int:
        """Tiles of an image."""
        return self.down * self.across

    @property
    def plane(self) -> int:
        """Elements of a plane of half-transformed rows: the even or the odd ones under a panel's tiles."""
        rows = min(self.down, (self.panel - 2) // self.across + 2) + self.window // 2 - 1
        return rows * self.across + self.lanes


def padded(sizes: Mapping[str, int], lanes: int) -> dict[str, int]:
    """Pieces of scratch in elements, each with room for a vector behind it, in whole lines."""
    return {name: whole_lines(4 * (size + lanes)) // 4 for name, size in sizes.items()}


def depends_on_sum(b: Expr, place: str, tap: str, step: int) -> bool:
    """Whether b is a load, 0 outside its guards, that depends on `place` + step * `tap` alone."""
    load, fill, guards = (b.value, b.fill, b.guards) if isinstance(b, Guarded) else (b, Const(0, b.dtype), ())
    if not isinstance(load, Load) or not isinstance(fill, Const) or fill.value:
        return False
    dims = [*load.index, *(d for g in guards for d in (g.at, g.bound))]
    moved = {place: symbol(place) + step, tap: symbol(tap) - 1}
    return all(substitute(d, moved) == d for d in dims)


class TileEmitter(AlgorithmEmitter):
    """Emits code on panels of tiles. In its scopes "first" is the number of a panel's first tile."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, tiles: Tiles):
        super().__init__(module, kernel, target, tiles.lanes)
        self.tiles = tiles
        rows = tiles.down + tiles.window // 2
        self.e.bounds.update({"pair": (0, rows - 2), "tile x": (0, tiles.across - 1)})

    @contextmanager
    def segments(self, image: str, images: Value) -> Iterator[None]:
        """A loop over those of the images that the panel has tiles of. Binds "from", "to": the image's part
        of the panel; "shift": what to add to a place in the panel for the tile's number in the image; "top",
        "bottom": the rows of tiles."""
        e, b, t = self.e, self.b, self.tiles
        first, count = e.scopes.bound("first"), constant(I64, t.count)
        last = b.sub(b.intrinsic("smin", b.add(first, t.panel), b.mul(images, count)), 1)
        with e.scopes.loop(image, b.udiv(first, count), b.add(b.udiv(last, count), 1)) as loop:
            loop.next()
            shift = b.sub(first, b.mul(loop.index, count))
            low = b.intrinsic("smax", shift, 0)
            high = b.intrinsic("smin", b.add(shift, t.panel), count)
            e.scopes.bind("shift", shift)
            e.scopes.bind("from", b.sub(low, shift))
            e.scopes.bind("to", b.sub(high, shift))
            e.scopes.bind("top", b.udiv(low, constant(I64, t.across)))
            e.scopes.bind("bottom", b.add(b.udiv(b.sub(high, 1), constant(I64, t.across)), 1))
            yield

    def element(self, node: Node, y: str, x: str, start: int, parity: int, i: int, reach: int) -> Node:
        """Element i of the tiles' windows in the even or the odd row of a pair: `node` with its places put
        in. Windows begin `start` elements off their tile; beyond height + reach there is nothing to read."""
        t = self.tiles
        rows, columns = 2 * symbol("pair") + parity, 2 * symbol("tile x") + i
        node = self.e.nodes.substitute(node, {y: rows + start, x: columns + start})
        guards = [Guard(at, size + reach) for at, size in ((rows, t.height), (columns, t.width)) if size % 2]
        if not guards:
            return node
        return self.e.nodes.guarded(tuple(guards), node, self.e.nodes.of(Const(0, dtypes.F32)))

    def transform(self, elements: list[list[Node]], change: Callable[[list[Value]], list[Value]],
                  into: Callable[[int], Value]) -> None:
        """Transforms the windows of one image's tiles in the panel, in a loop over channels of the caller's.

        `elements`: of the even and of the odd row of a pair, the elements of a window's row; `change`: a
        window's values as numbers; into(i): the address of number i of all of the tile at "column"."""
        e, t, bound = self.e, self.tiles, self.e.scopes.bound
        count = min(t.lanes, 1 << max(t.across - 1, 0).bit_length())
        size = len(elements[0])
        stop = self.b.add(bound("bottom"), size // 2 - 1)
        with e.scopes.loop("pair", bound("top"), stop) as pair:
            pair.next()
            for parity, row in enumerate(elements):
                e.scopes.lanes("tile x", ZERO, constant(I64, t.across), count,
                               self._along_x(parity, row, change), masked_only=True)
        body = self._along_y(size, change, into)
        e.scopes.lanes("column", bound("from"), bound("to"), t.lanes, body, align=1)

    def _along_x(self, parity: int, row: list[Node], change: Callable[[list[Value]], list[Value]]
                 ) -> Callable[[list[Value]], list[Value]]:
        e, b, t = self.e, self.b, self.tiles

        def body(carry: list[Value]) -> list[Value]:
            lane = e.scopes.lane
            assert lane is not None
            values = [b.splat(e.value(node), lane.count) for node in row]
            at = (symbol("pair") - symbol("top")) * t.across + symbol("tile x")
            for i, value in enumerate(change(values)):
                b.store(value, e.address("half ", (2 * i + parity) * t.plane + at), align=4)
            return []

        return body

    def _along_y(self, size: int, change: Callable[[list[Value]], list[Value]], into: Callable[[int], Value]
                 ) -> Callable[[list[Value]], list[Value]]:
        e, b, t = self.e, self.b, self.tiles

        def body(carry: list[Value]) -> list[Value]:
            at = symbol("column") + symbol("shift") - symbol("top") * t.across
            for j in range(t.window):
                rows = [e.address("half ", (2 * j + i % 2) * t.plane + at + i // 2 * t.across)
                        for i in range(size)]
                for i, value in enumerate(change([b.load(self.type, row, align=4) for row in rows])):
                    self.put(value, into(t.window * i + j))
            return []

        return body

    def change(self, matrix: Matrix) -> Callable[[list[Value]], list[Value]]:
        """The product of the matrix with a list of values."""
        return lambda values: multiply(self.b, matrix, values, self.e.target.has_fma)
