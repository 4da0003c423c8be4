"""Convolutions of 3 x 3 and 5 x 5 places without stride, and their gradients, by Winograd's algorithm with
vectors along images: for images of rows, with any number of channels.

With d the inputs under a tile of outputs and g the weights of a pair of channels, the tile is
A[(G g G') * (B d B')]A' (A, B, G: the matrices of F(outputs, places) of `winograd_matrices`; A. Lavin,
S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015), summed over the input channels before A is
applied. Transposed, this gives both gradients. That for the weights, e being that of a tile of outputs, is
G'[(B d B') * (A' e A)]G, summed over the tiles before G is applied. That for the input is a convolution with
places flipped; or, where the convolution pads little, the same products *turned round*: to the inputs under
the tile it adds B'[(G g G') * (A' e A)]B, as many products as the convolution has.

A task copies as many images as a vector has lanes, or a band of each, into scratch, where lanes are images:
so tiles of any size that overlap anyhow are read, and added up, without a shuffle. Results are turned back
at the end. Fewer images than lanes cost as much as these, and are weighed so where their number is known; a
symbolic batch counts as a typical one, and a call with few images computes a whole vector of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphflow.compiler.emit.algorithm import padded
from graphflow.compiler.emit.operands import (
    algorithm_asked,
    coefficient,
    depends_on_sum,
    drop_guard,
    is_direct,
    load_offset,
    names_of,
    shared_limit,
)
from graphflow.compiler.emit.winograd_matrices import SIZES, Matrices, winograd_matrices
from graphflow.compiler.kernel.form import ContractionKernel, Expr, Guard, Guarded, Load
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import TYPICAL_SIZE, DimLike, ceildiv, product, substitute, symbol
from graphflow.compiler.target import Target

_MANY = 288
"""Terms from which tiles of 4 are taken unasked: shorter sums round so little that the transformations'
rounding would show."""
_TURN, _TRANSFORM, _PEAK = 4.0, 4.0, 0.87
"""Cycles to turn a vector; to transform one, for each product; the share of the peak that products reach."""
_REDUCE, _FINISH = 2.5, 16.0
"""Cycles to add up the lanes of a sum; to finish a vector of sums, for each product."""
_ROOM = 3
"""A task's scratch may take so many times the second level cache, if no band is small enough for it."""
_FEWER = 0.75
"""Where there are not so much fewer tiles than the input has, nothing is turned round."""


@dataclass(frozen=True)
class Plane:
    """An operand: element (row, column) of a channel of an image is what `load` reads where the variables of
    the contraction's places are `row` + `shift` and `column` + `shift`, and those of taps are 0; `rows`,
    `columns`: how many there are. `channel`, `channels`: variable and extent."""

    load: Expr
    channel: str
    channels: int
    rows: int
    columns: int
    shift: tuple[int, int]


@dataclass(frozen=True)
class Tiles:
    """How images of `height` x `width` are cut into tiles of `size` x `size`, for kernels of `side` x `side`
    places, in bands of `band` rows of tiles. `image`: the variable and extent of the images; `y`, `x`: the
    variables of places; lanes: of a vector."""

    image: tuple[str, DimLike]
    y: str
    x: str
    height: int
    width: int
    side: int
    size: int
    lanes: int
    band: int = 0

    @property
    def matrices(self) -> Matrices:
        """Those of F(size, side)."""
        return winograd_matrices(self.size, self.side)

    @property
    def window(self) -> int:
        """Places under a tile, and products, along an axis."""
        return self.size + self.side - 1

    @property
    def down(self) -> int:
        """Tiles along the height."""
        return -(-self.height // self.size)

    @property
    def across(self) -> int:
        """Tiles along the width."""
        return -(-self.width // self.size)

    @property
    def count(self) -> int:
        """Tiles of a band."""
        return self.band * self.across

    @property
    def bands(self) -> int:
        """Bands of an image."""
        return -(-self.down // self.band)

    def area(self, apron: bool) -> tuple[int, int]:
        """Rows and columns of a band; `apron`: of all that is under its tiles."""
        more = self.side - 1 if apron else 0
        return self.band * self.size + more, self.across * self.size + more

    def place(self, channels: int, apron: bool) -> int:
        """Elements of so many channels of a band."""
        rows, columns = self.area(apron)
        return channels * rows * columns * self.lanes


@dataclass(frozen=True)
class WinogradImages:
    """How a convolution is computed so. `tiles`: of the result, or, if it is `turned` round, of the operand;
    `operand`; `out`, `taps`: variables of the contraction; `outs`, `height`, `width`: extents of the result.
    `flip`: the weights are applied backwards; mr output channels x nv tiles: the register tile."""

    tiles: Tiles
    operand: Plane
    out: str
    outs: int
    taps: tuple[str, str]
    height: int
    width: int
    flip: bool
    turned: bool
    mr: int = 1
    nv: int = 1

    @property
    def products(self) -> int:
        """Matrix products: multiplications for a tile and a pair of channels."""
        return self.tiles.window ** 2

    @property
    def m_tiles(self) -> int:
        """Register tiles along the output channels."""
        return -(-self.outs // self.mr)

    def weights(self) -> dict[str, int]:
        """The transformed weights [tile of m][product][channel][mr], in elements of scratch."""
        size = self.m_tiles * self.products * self.operand.channels * self.mr
        return padded({"weights ": size}, self.tiles.lanes)

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's own scratch, in elements: the images [channel][row][column][image], what
        their tiles become [product][channel][tile][image], products [product][mr][tile][image], results
        [out][row][column][image], and a block of them turned back."""
        t, channels = self.tiles, self.operand.channels
        panel = self.products * self.nv * t.lanes
        sizes = {"images ": t.place(channels, not self.turned), "inputs ": panel * channels,
                 "products ": panel * self.mr, "results ": t.place(self.outs, self.turned) + t.lanes ** 2,
                 "block ": t.lanes ** 2}
        return padded(sizes, t.lanes)


@dataclass(frozen=True)
class WinogradImagesWeights:
    """How the gradient of a convolution for its weights is computed so. `pieces`: the batch axes; `tiles`: of
    the gradients for the output, of images cut by `limit`; `inputs`, `gradients`: the operands; `rows`: of
    the products that are computed at a time; mr output x nr input channels: the register tile, whose sums'
    lanes are added up to one vector."""

    pieces: tuple[tuple[str, DimLike], ...]
    limit: Guard | None
    tiles: Tiles
    inputs: Plane
    gradients: Plane
    rows: int
    mr: int
    nr: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Register tiles along the output and the input channels."""
        return -(-self.gradients.channels // self.mr), -(-self.inputs.channels // self.nr)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The rows of the products, those of points p and -p together, for they share terms: the last is
        that of infinity."""
        n = self.tiles.window
        order = [0, n - 1, *range(1, n - 1)]
        return [tuple(order[i:i + self.rows]) for i in range(0, n, self.rows)]

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: both operands, [channel][row][column][image]; what
        the tiles of each become, [product][channel][tile][image]; sums [product][block of out][block of
        in][pair]; and rows of the result for a block of output channels."""
        t, (out, inside) = self.tiles, self.blocks
        one = self.rows * t.window * t.count * t.lanes
        sizes = {"images ": t.place(self.inputs.channels, True),
                 "image gradients ": t.place(self.gradients.channels, False),
                 "inputs ": one * inside * self.nr, "gradients ": one * out * self.mr,
                 "sums ": t.window ** 2 * out * inside * t.lanes,
                 "finished ": t.side ** 2 * inside * t.lanes}
        return padded(sizes, t.lanes)


def winograd_images(kernel: ContractionKernel, target: Target) -> WinogradImages | None:
    """How the kernel is computed so; None where it is no such convolution, its tile names another algorithm,
    or none and another one is faster."""
    asked = algorithm_asked(kernel)
    found = [w for w in _forms(kernel, target) if asked == w.tiles.size or asked is None
             and (w.tiles.size == 2 or w.operand.channels * w.tiles.side ** 2 >= _MANY)]
    best = min(found, key=_cycles, default=None)
    return best if best is not None and (asked or _cycles(best) < 0.95 * _direct_cycles(best)) else None


def _forms(kernel: ContractionKernel, target: Target) -> Iterator[WinogradImages]:
    """The ways that apply to the kernel."""
    c = kernel.contraction
    if kernel.indirect or c.groups or (len(c.batch), len(c.m), len(c.n), len(c.k)) != (1, 1, 2, 3):
        return
    ((out, outs),), ((y, height), (x, width)), ((channel, channels), *taps) = c.m, c.n, c.k
    side, names = taps[0][1], (taps[0][0], taps[1][0])
    sizes = [d for d in (outs, height, width, channels) if isinstance(d, int) and d > 0]
    if c.a.dtype != dtypes.F32 or taps[1][1] != side or side not in SIZES or len(sizes) < 4:
        return
    outs, height, width, channels = sizes
    if not is_direct(kernel, c.a, (*c.m, *c.k)) or names_of(c.a) & {y, x, c.batch[0][0]}:
        return
    step = next((s for s in (1, -1) if all(depends_on_sum(c.b, p, t, s) for p, t in zip((y, x), names))), 0)
    operand = _plane(kernel, c.b, (y, x), names, channel, channels)
    if not step or operand is None or out in names_of(c.b):
        return
    if not all(coefficient(s.index[-1], x) == 1 for s in c.stores):
        return
    assert isinstance(side, int)
    for size in SIZES[side]:
        tiles = Tiles(c.batch[0], y, x, height, width, side, size, target.vector_bytes // 4)
        w = WinogradImages(tiles, operand, out, outs, names, height, width, step < 0, False)
        within = replace(tiles, height=operand.rows, width=operand.columns)
        turned = replace(w, tiles=within, flip=False, turned=True)
        if step < 0 and within.down * within.across <= _FEWER * tiles.down * tiles.across:
            w = turned
        banded = _tiled(w, target)
        if banded is not None:
            yield banded


def _plane(kernel: ContractionKernel, e: Expr, places: tuple[str, str], taps: tuple[str, ...], channel: str,
           channels: int) -> Plane | None:
    """The operand as images of rows, 0 outside; None if it is none."""
    load, guards = (e.value, e.guards) if isinstance(e, Guarded) else (e, ())
    if not isinstance(load, Load) or len(load.index) != 4 or load.index[1] != symbol(channel):
        return None
    offset = load_offset(kernel, load)
    shape = next(a for a in kernel.arguments if a.name == load.arg).shape
    rows, columns = shape[2:]
    if offset is None or coefficient(offset, places[1]) != 1:
        return None
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return None
    if any((g.at, g.bound) not in ((load.index[2], rows), (load.index[3], columns)) for g in guards):
        return None
    shift = [symbol(p) - substitute(at, dict.fromkeys(taps, 0)) for p, at in zip(places, load.index[2:])]
    down, across = shift
    if not (isinstance(down, int) and isinstance(across, int)):
        return None
    return Plane(load, channel, channels, rows, columns, (down, across))


def _tiled(w: WinogradImages, target: Target) -> WinogradImages | None:
    """With the register tile, and the largest band that stays in the second level cache; None where all are
    too large."""
    found = None
    for band in (w.tiles.down,) if w.turned else _bands(w.tiles):
        tiles = replace(w.tiles, band=band)
        mr, nv = _register_tile(w.outs, tiles.count, target)
        found = replace(w, tiles=tiles, mr=mr, nv=nv)
        if winograd_images_scratch(found) <= target.l2:
            return found
    return found if found is not None and winograd_images_scratch(found) <= _ROOM * target.l2 else None


def _bands(t: Tiles) -> list[int]:
    """Rows of tiles in bands of about the same size, the largest first."""
    return list(dict.fromkeys(-(-t.down // n) for n in range(1, t.down + 1)))


def _register_tile(outs: int, tiles: int, target: Target) -> tuple[int, int]:
    """(output channels, tiles): those that fill the registers best; tiles in whole panels."""
    spare = 6 if target.is_arm else 2             # LLVM loads elements ahead where they need registers

    def cycles(mr: int, nv: int) -> float:
        return -(-outs // mr) * -(-tiles // nv) * max(mr * nv, mr + nv, 8)

    fits = [(mr, nv) for nv in (3, 2, 1) for mr in range(min(outs, 14), 0, -1)
            if tiles % nv == 0 and mr * nv + nv + spare <= target.vector_registers]
    return min(fits, key=lambda tile: cycles(*tile))


def _images(tiles: Tiles) -> int:
    """Images, with those that lanes are left over for."""
    images = tiles.image[1] if isinstance(tiles.image[1], int) else TYPICAL_SIZE
    return -(-images // tiles.lanes) * tiles.lanes


def _cycles(w: WinogradImages) -> float:
    """A rough count of cycles."""
    t, channels = w.tiles, w.operand.channels
    transforms = _TRANSFORM * (channels + w.outs)
    tile = w.products * (channels * w.m_tiles * w.mr / _PEAK + transforms)
    turning = _TURN * (channels * w.operand.rows * w.operand.columns + w.outs * w.height * w.width)
    return (t.bands * t.count * tile + turning) * _images(t) / t.lanes


def _direct_cycles(w: WinogradImages) -> float:
    """That of the definition."""
    images = w.tiles.image[1] if isinstance(w.tiles.image[1], int) else TYPICAL_SIZE
    vectors = -(-w.height * w.width // w.tiles.lanes)          # of places: the last one may be rather empty
    return images * vectors * w.tiles.side ** 2 * w.operand.channels * w.outs / _PEAK


def winograd_images_tasks(w: WinogradImages) -> DimLike:
    """The number of tasks: vectors of images, and bands of each, the last changing fastest."""
    return ceildiv(w.tiles.image[1], w.tiles.lanes) * w.tiles.bands


def winograd_images_scratch(w: WinogradImages) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())


def winograd_images_shared(w: WinogradImages) -> int:
    """Bytes of scratch that all workers share."""
    return 4 * sum(w.weights().values())


def winograd_images_weights(kernel: ContractionKernel, target: Target) -> WinogradImagesWeights | None:
    """How the kernel is computed so; None where it is no such gradient, its tile names another algorithm, or
    none and another one is faster."""
    asked = algorithm_asked(kernel)
    best = min((w for w in _weight_forms(kernel, target) if asked in (None, w.tiles.size)),
               key=_weight_cycles, default=None)
    return best if best and (asked or _weight_cycles(best) < 0.9 * _direct_weight_cycles(best)) else None


def _weight_forms(kernel: ContractionKernel, target: Target) -> Iterator[WinogradImagesWeights]:
    """The ways that apply to the kernel."""
    c = kernel.contraction
    if kernel.indirect or c.groups or len(c.batch) > 1 or (len(c.m), len(c.n), len(c.k)) != (1, 3, 3):
        return
    ((out, outs),), ((channel, channels), *taps), (image, (y, height), (x, width)) = c.m, c.n, c.k
    side, names, limit = taps[0][1], (taps[0][0], taps[1][0]), shared_limit(c.a, c.b, c.k)
    sizes = [d for d in (outs, height, width, channels) if isinstance(d, int) and d > 0]
    if c.a.dtype != dtypes.F32 or taps[1][1] != side or side not in SIZES or len(sizes) < 4:
        return
    outs, height, width, channels = sizes
    a, b = drop_guard(c.a, limit), drop_guard(c.b, limit)
    if names_of(a) & {v for v, _ in c.n} or out in names_of(b):
        return
    inputs = _plane(kernel, b, (y, x), names, channel, channels)
    gradients = _plane(kernel, a, (y, x), (), out, outs)
    if inputs is None or gradients is None or gradients.shift != (0, 0):
        return
    if not all(depends_on_sum(b, p, t, 1) for p, t in zip((y, x), names)):
        return
    assert isinstance(side, int)
    lanes = target.vector_bytes // 4
    mr, nr = {4: (2, 2), 8: (2, 4), 16: (4, 4)}[lanes]
    for size in SIZES[side]:
        t = Tiles(image, y, x, height, width, side, size, lanes)
        forms = [WinogradImagesWeights(c.batch, limit, replace(t, band=band), inputs, gradients, rows, mr, nr)
                 for band in _bands(t) for rows in (t.window, 4, 2)]
        found = next((w for w in forms if winograd_images_weights_scratch(w) <= 1.25 * target.l2), forms[-1])
        if winograd_images_weights_scratch(found) <= _ROOM * target.l2:
            yield found


def _weight_cycles(w: WinogradImagesWeights) -> float:
    """A rough count of cycles for a piece."""
    t, (out, inside) = w.tiles, w.blocks
    products = out * inside * t.lanes * (t.count / _PEAK + _REDUCE)
    transforms = _TRANSFORM * t.count * (w.inputs.channels + w.gradients.channels)
    planes = (w.inputs, w.gradients)
    turning = _TURN * sum(p.channels * p.rows * p.columns for p in planes)
    results = _FINISH * t.window ** 2 * w.inputs.channels * w.gradients.channels / t.lanes
    return (t.bands * t.window ** 2 * (products + transforms) + turning) * _images(t) / t.lanes + results


def _direct_weight_cycles(w: WinogradImagesWeights) -> float:
    """That of the definition."""
    t = w.tiles
    images = t.image[1] if isinstance(t.image[1], int) else TYPICAL_SIZE
    vectors = -(-t.height * t.width // t.lanes)
    return images * vectors * t.side ** 2 * w.inputs.channels * w.gradients.channels / _PEAK


def winograd_images_weights_tasks(w: WinogradImagesWeights) -> DimLike:
    """The number of tasks: pieces of the images."""
    return product(extent for _, extent in w.pieces)


def winograd_images_weights_scratch(w: WinogradImagesWeights) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(w.parts().values())
