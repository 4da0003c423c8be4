"""Convolutions of 3 x 3 and 5 x 5 places without stride by Winograd's algorithm with vectors along channels:
for images whose channels are neighbours in memory.

With d the inputs under a tile of outputs and g the weights of a pair of channels, the tile is
A[(G g G') * (B d B')]A' (A, B, G: the matrices of F(outputs, places) of `winograd_matrices`; A. Lavin,
S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015), summed over the input channels before A is
applied: F(4 x 4, 3 x 3) takes 36 multiplications where the definition has 144. So there are 36 matrix
products with tiles as rows, input channels as k and output channels as columns.

Where tiles would cover much beyond the images, several images make a mosaic that is cut into tiles as one:
neighbours share the zeros around them, and less is left over.

A function of its own, which runs before, transforms the weights into scratch. A task is a block of tiles, of
all images in turn: their inputs are transformed into scratch, where they stay in the second level cache; for
every panel of output channels a micro-kernel multiplies, and what the transformation back gives are finished
sums for the kernel's stores.

The form of the kernel does not change: this is one way to compute a contraction that happens to be such a
convolution, or the gradient of one for its input. An infinite input makes NaN of its whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphflow.compiler.emit.algorithm import padded
from graphflow.compiler.emit.expr import strides
from graphflow.compiler.emit.operands import (
    algorithm_asked,
    coefficient,
    depends_on_sum,
    is_direct,
    load_offset,
    names_of,
)
from graphflow.compiler.emit.winograd_matrices import SIZES, Matrices, winograd_matrices
from graphflow.compiler.kernel.form import ContractionKernel, Expr, Guarded, Store
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import TYPICAL_SIZE, DimLike, ceildiv, substitute, symbols_of
from graphflow.compiler.target import Target

_MANY = 32
"""Channels from which tiles of 4 are taken unasked: shorter sums round so little that the transformations'
rounding would show, and a net with batch norm that is trained with a high rate would drift from others."""
_FOLDS = (2, 3)
"""Images along an axis of a mosaic."""
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
    outputs of a tile along one. `fold`: so many images by as many make a mosaic, `pitch` rows and columns
    apart, that is cut into tiles as one; images left over are cut alone. mr, nr: the register tile; block:
    tiles of a task; lanes: of a vector."""

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
    lanes: int
    fold: int = 1
    pitch: tuple[int, int] = (0, 0)
    mr: int = 1
    nr: int = 1
    block: int = 1

    @property
    def matrices(self) -> Matrices:
        """Those of F(size, side)."""
        return winograd_matrices(self.size, self.side)

    @property
    def window(self) -> int:
        """Inputs under a tile, and what they become, along an axis."""
        return self.size + self.side - 1

    @property
    def start(self) -> int:
        """The first row of a window, from the first of its outputs."""
        return 1 - self.side if self.flip else 0

    @property
    def products(self) -> int:
        """Matrix products: multiplications for a tile and a pair of channels."""
        return self.window**2

    def grid(self, fold: int) -> tuple[int, int]:
        """Tiles along the height and the width of a mosaic of fold x fold images."""
        extents = zip((self.height, self.width), self.pitch)
        down, across = (-(-((fold - 1) * step + size) // self.size) for size, step in extents)
        return down, across

    def tiles(self, images: DimLike) -> DimLike:
        """Tiles of so many images."""
        (down, across), (rows, columns) = self.grid(self.fold), self.grid(1)
        group = self.fold**2
        return images // group * (down * across) + images % group * (rows * columns)

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
        products [product][tile][nr], the finished sums of a tile and a vector of channels, and a copy of a
        window."""
        sizes = {
            "inputs ": self.products * self.input_step,
            "products ": self.products * self.product_step,
            "finished ": self.size**2 * self.lanes,
            "window ": self.products * self.row if self.fold > 1 else 0,
        }
        return padded(sizes, self.lanes)



def winograd_nhwc(kernel: ContractionKernel, target: Target) -> WinogradNhwc | None:
    """How the kernel is computed so; None where it is no such convolution, its tile names another algorithm,
    or none and the definition is faster."""
    asked = algorithm_asked(kernel)
    forms = [w for w in _forms(kernel, target)
             if asked == w.size or asked is None and (w.size == 2 or w.channels >= _MANY)]
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
        w = WinogradNhwc(c.batch[0] if c.batch else ("image", 1), y, x, out, channel,
                         (taps[0][0], taps[1][0]), height, width, outs, channels, step < 0, side, size,
                         target.vector_bytes // 4)
        yield _tiled(_folded(w, c.b), target)


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


def _folded(w: WinogradNhwc, b: Expr) -> WinogradNhwc:
    """With the mosaic chosen. Neighbours share the zeros between them: the first row of an image's window is
    `before` rows above it, and the next one's begins where nothing of this one is read any more."""
    pitch = []
    for var, tap, extent in ((w.y, w.taps[0], w.height), (w.x, w.taps[1], w.width)):
        before, inside = 0, extent + w.side - 1
        for g in b.guards if isinstance(b, Guarded) else ():
            if var in symbols_of(g.at):
                at = substitute(g.at, {var: 0, tap: w.side - 1 if w.flip else 0})
                if not isinstance(at, int) or not isinstance(g.bound, int):
                    return w
                before, inside = -at, g.bound
        pitch.append(max(before + inside, extent + w.side - 1 - before))
    w = replace(w, pitch=(pitch[0], pitch[1]))
    best = min((replace(w, fold=n) for n in _FOLDS), key=_total)
    return best if _total(best) < 0.9 * _total(w) else w


def _total(w: WinogradNhwc) -> int:
    """The number of tiles, for a guess at the number of images where it is not known."""
    total = w.tiles(w.image[1] if isinstance(w.image[1], int) else TYPICAL_SIZE)
    assert isinstance(total, int)
    return total


def _tiled(w: WinogradNhwc, target: Target) -> WinogradNhwc:
    """With the register tile and the block of tiles chosen: few rows left over, and all that a block's tiles
    become within the second level cache."""
    nr = w.lanes if -(-w.outs // w.lanes) % 2 else 2 * w.lanes
    vectors = nr // w.lanes
    most = min((target.vector_registers - 2 - vectors) // vectors, 14)
    total = _total(w)
    mr = min(range(most, most // 2, -1), key=lambda r: -(-total // r) * (r + 0.5))
    room = target.l2 * 6 // 10 // (4 * w.products * (-(-w.channels // w.lanes) * w.lanes + nr))
    return replace(w, nr=nr, mr=mr, block=max(1, min(room // mr, round(_BLOCK / mr))) * mr)


def _cycles(w: WinogradNhwc, target: Target) -> float:
    """A rough count of cycles: products, transformations of inputs and of products, those of weights, and
    reading weights anew for each block of tiles where they lie beyond the second level cache."""
    total = _total(w)
    vectors = w.products * w.channels * w.panels * w.nr / w.lanes
    near = 4 * vectors * w.lanes < target.l2
    found = -(-total // w.mr) * w.mr * vectors / _PEAK
    found += total * w.products * (_INPUT * -(-w.channels // w.lanes) + _OUTPUT * w.panels * w.nr / w.lanes)
    return found + vectors * (_WEIGHT if near else _FAR_WEIGHT + total / w.block)


def _direct_cycles(w: WinogradNhwc) -> float:
    """That of the definition."""
    images = w.image[1] if isinstance(w.image[1], int) else TYPICAL_SIZE
    return images * w.height * w.width * w.side**2 * w.channels * -(-w.outs // w.lanes) / _PEAK


def winograd_nhwc_tasks(w: WinogradNhwc) -> DimLike:
    """The number of tasks: blocks of tiles."""
    return ceildiv(w.tiles(w.image[1]), w.block)


def winograd_nhwc_scratch(w: WinogradNhwc) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())


def winograd_nhwc_shared(w: WinogradNhwc) -> int:
    """Bytes of scratch that all workers share."""
    return 4 * sum(w.weights().values())
