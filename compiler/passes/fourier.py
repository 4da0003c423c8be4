"""Convolutions with large kernels as products of spectra, where that takes far fewer multiplications.

Images are cut into tiles of `side` x `side` elements, which overlap so that each gives (side - kernel + 1)
outputs along an axis; the transform of a tile, times the conjugate of the kernel's at each frequency, added
up over channels, is the transform of those outputs and of some that wrap around, which are left out (overlap-
save: Oppenheim, Schafer, Discrete-Time Signal Processing, 8.7). A transform along an axis is a product with a
small matrix, and so are the sums over channels: at each frequency three products of all tiles and all
channels, for a complex product is made of three real ones (Gauss): with k1 = c (a + b), k2 = a (c + d) and
k3 = b (c - d), (a + bi) conj(c + di) is k1 - k3 + (k1 - k2)i. The matrices of the transforms make these sums
as well. Tiles are real, so half of the frequencies along x do.

The gradient for the input is the convolution with the kernel turned round; that for the weights adds up the
products of transformed tiles over all images. Errors are small beside the largest outputs of a tile, not
beside each one.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from graphflow.compiler.ir.graph import Node, Value
from graphflow.compiler.ops.contract import per_axis, per_side
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule
from graphflow.compiler.plan.dims import DimLike, typical
from graphflow.compiler.plan.dtypes import F32

SIDES = (16, 32, 64)
"""Sides of tiles."""
LEAST_KERNEL = 7
"""Smaller kernels are left to other algorithms."""
WORTH = 1.75
"""By so much less work it has to be: products with the matrices of transforms are small."""
_TRAFFIC = 16
"""An element of a spectrum, which is written and read, costs as much as so many multiplications."""


class Tiles(NamedTuple):
    """How images are cut: the side of a tile, the extents (y, x) of the kernel, tiles along y and x."""

    side: int
    kernel: tuple[int, int]
    counts: tuple[int, int]

    @property
    def steps(self) -> tuple[int, int]:
        """Outputs of a tile along y and x."""
        return self.side - self.kernel[0] + 1, self.side - self.kernel[1] + 1


class _Geometry(NamedTuple):
    """A convolution whose extents are known: images (y, x), kernel, padding before, outputs (y, x)."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    low: tuple[int, int]
    outputs: tuple[int, int]


def _geometry(node: Node, x: Value, w: Sequence[DimLike], y: Value) -> _Geometry | None:
    """That of a convolution of x to y with weights of shape w; None where this is not for it."""
    if len(w) != 4 or x.dtype != F32 or node.attrs["groups"] != 1:
        return None
    shapes = *x.shape[1:], *w, *y.shape[2:]
    ones = (per_axis(node.op, name, node.attrs[name], 2, 1) for name in ("stride", "dilation"))
    if not all(isinstance(d, int) and d > 0 for d in shapes) or any(n != (1, 1) for n in ones):
        return None
    _, height, width, _, _, ky, kx, rows, columns = (typical(d) for d in shapes)
    (top, _), (left, _) = per_side(node.op, node.attrs["padding"], 2)
    if min(ky, kx) < LEAST_KERNEL or top >= ky or left >= kx:
        return None
    return _Geometry((height, width), (ky, kx), (top, left), (rows, columns))


def _tiles(g: _Geometry, channels: int, outs: int, images: int) -> Tiles | None:
    """The tiles that take the least work, in multiplications; None if it is not far less than by
    definition."""
    (ky, kx), (rows, columns) = g.kernel, g.outputs

    def of_side(side: int) -> Tiles:
        return Tiles(side, g.kernel, (-(-rows // (side - ky + 1)), -(-columns // (side - kx + 1))))

    def work(t: Tiles) -> float:
        half, (sy, sx) = t.side // 2 + 1, t.steps
        there = channels * 8 * half * t.side ** 2
        back = outs * (6 * sy * t.side * half + 2 * sy * sx * half)
        kernels = channels * outs * (2 * half * ky * kx + 6 * ky * t.side * half)
        spectra = half * (5 * t.side * channels + (3 * t.side + 2 * sy) * outs)
        tile = there + back + 3 * half * t.side * channels * outs + _TRAFFIC * spectra
        return t.counts[0] * t.counts[1] * tile + kernels / max(images, 1)

    choices = [of_side(side) for side in SIDES if side >= max(ky, kx) + LEAST_KERNEL - 1]
    best = min(choices, key=work, default=None)
    by_definition = rows * columns * channels * outs * ky * kx
    return best if best is not None and WORTH * work(best) < by_definition else None


# --- transforms


@lru_cache(maxsize=64)
def _tables(side: int, extents: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The matrices of transforms of elements (y, x) of a tile, with zeros behind them: from x to (part,
    frequency); from (y, part) to (factor, frequency), for the factors of images, a + b, a, b, and for those
    of kernels, c, c + d, c - d; and back, from (k, frequency) to (y, part), and from (part, frequency) to
    x."""
    (ty, tx), half = extents, side // 2 + 1
    turn = 2 * np.pi / side
    across = turn * np.outer(np.arange(half), np.arange(tx))
    along = turn * np.outer(np.arange(side), np.arange(ty))
    c, s = np.cos(along), np.sin(along)
    real, imag = np.stack([c, s], -1), np.stack([-s, c], -1)                    # [frequency, y, part]
    images, kernels = np.stack([real + imag, real, imag]), np.stack([real, real + imag, real - imag])
    real, imag = np.stack([c.T, s.T], 1), np.stack([-s.T, c.T], 1)              # [y, part, frequency]
    back = np.stack([real + imag, -imag, -real], 2)
    weights = np.full((half, 1), 2.0)
    weights[[0, -1]] = 1.0                                                      # those without a mirror image
    last = np.concatenate([weights * np.cos(across), -weights * np.sin(across)]) / side ** 2
    return tuple(table.astype(np.float32) for table in (
        np.concatenate([np.cos(across), -np.sin(across)]), images.reshape(3 * side, 2 * ty),
        kernels.reshape(3 * side, 2 * ty), back.reshape(2 * ty, 3 * side), last.T))


def _times(b: RewriteBuilder, table: np.ndarray, x: Value) -> Value:
    """The product of a matrix with x, or with each matrix of x."""
    matrix = b.array(data=np.ascontiguousarray(table).tobytes(), dtype=F32, shape=table.shape)
    return b.matmul(b.broadcast(matrix, (*x.shape[:-2], *table.shape)), x)


def _factors(b: RewriteBuilder, x: Value, side: int, of_kernels: bool = False) -> Value:
    """[frequency x, factor · frequency y, lead · rest] of elements [x, lead, y, rest]."""
    tx, lead, ty, rest = x.shape
    first, images, kernels, _, _ = _tables(side, (typical(ty), typical(tx)))
    half = side // 2 + 1
    rows = _times(b, first, b.reshape(x, shape=(tx, lead * ty * rest)))
    rows = b.transpose(b.reshape(rows, shape=(2, half, lead, ty, rest)), perm=(1, 3, 0, 2, 4))
    return _times(b, kernels if of_kernels else images, b.reshape(rows, shape=(half, 2 * ty, lead * rest)))


def _elements(b: RewriteBuilder, products: Value, extents: tuple[int, int], lead: DimLike, rest: DimLike
              ) -> Value:
    """[x, lead, y, rest] of products of factors [frequency x, k · frequency y, lead, rest]."""
    (ty, tx), half = extents, typical(products.shape[0])
    side = 2 * (half - 1)
    _, _, _, back, last = _tables(side, extents)
    columns = _times(b, back, b.reshape(products, shape=(half, 3 * side, lead * rest)))
    columns = b.transpose(b.reshape(columns, shape=(half, ty, 2, lead, rest)), perm=(2, 0, 3, 1, 4))
    out = _times(b, last, b.reshape(columns, shape=(2 * half, lead * ty * rest)))
    return b.reshape(out, shape=(tx, lead, ty, rest))


# --- convolutions


def _cut(b: RewriteBuilder, x: Value, low: tuple[int, int], size: int, steps: tuple[int, int],
         tiles: Tiles) -> tuple[Value, DimLike]:
    """([x, images · tiles along y, y, tiles along x · channels] of tiles of `size` elements, or of `steps` if
    that is 0; images) of x[images, channels, y, x], with `low` zeros before it."""
    images, channels, *extents = x.shape
    sides = (size, size) if size else steps
    last = b.transpose(x, perm=(0, 2, 3, 1))
    high = tuple(n * step + side - step - typical(extent) - before for n, step, side, extent, before
                 in zip(tiles.counts, steps, sides, extents, low))
    last = b.pad(last, low=(0, *low, 0), high=(0, *high, 0), interior=(0,) * 4)
    for axis in (0, 1):
        last = b.unfold(last, axis=1 + axis, size=sides[axis], stride=steps[axis])
    out = b.transpose(last, perm=(5, 0, 1, 4, 2, 3))
    (sy, sx), (down, across) = sides, tiles.counts
    return b.reshape(out, shape=(sx, images * down, sy, across * channels)), images


def _convolved(b: RewriteBuilder, x: Value, w: Value, g: _Geometry, tiles: Tiles) -> Value:
    """The convolution of x[images, channels, y, x] with w[outs, channels, y, x]."""
    (outs, channels), side, points = w.shape[:2], tiles.side, (tiles.side // 2 + 1, 3 * tiles.side)
    (down, across), (sy, sx), (ky, kx) = tiles.counts, tiles.steps, tiles.kernel
    cut, images = _cut(b, x, g.low, side, tiles.steps, tiles)
    of_tiles = b.reshape(_factors(b, cut, side), shape=(*points, images * down * across, channels))
    kernels = b.reshape(b.transpose(w, perm=(3, 2, 1, 0)), shape=(kx, 1, ky, channels * outs))
    of_kernels = b.reshape(_factors(b, kernels, side, of_kernels=True), shape=(*points, channels, outs))
    out = _elements(b, b.matmul(of_tiles, of_kernels), tiles.steps, images * down, across * outs)
    out = b.transpose(b.reshape(out, shape=(sx, images, down, sy, across, outs)), perm=(1, 2, 3, 4, 0, 5))
    out = b.reshape(out, shape=(images, down * sy, across * sx, outs))
    out = b.slice(out, starts=(0,) * 4, stops=(images, *g.outputs, outs), steps=(1,) * 4)
    return b.transpose(out, perm=(0, 3, 1, 2))


def _forward(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    x, w = inputs
    g = _geometry(node, x, w.shape, node.result())
    tiles = _tiles(g, typical(w.shape[1]), typical(w.shape[0]), typical(x.shape[0])) if g else None
    return _convolved(b, x, w, g, tiles) if g is not None and tiles is not None else None


def _input_grad(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    dy, w = inputs
    g = _geometry(node, node.result(), w.shape, dy)
    if g is None:
        return None
    (ky, kx), (top, left) = g.kernel, g.low
    turned = _Geometry(g.outputs, g.kernel, (ky - 1 - top, kx - 1 - left), g.size)
    tiles = _tiles(turned, typical(w.shape[0]), typical(w.shape[1]), typical(dy.shape[0]))
    if tiles is None:
        return None
    return _convolved(b, dy, b.flip(b.transpose(w, perm=(1, 0, 2, 3)), axes=(2, 3)), turned, tiles)


def _weight_grad(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    x, dy = inputs
    g = _geometry(node, x, node.result().shape, dy)
    if g is None:
        return None
    outs, channels, ky, kx = node.result().shape
    tiles = _tiles(g, typical(channels), typical(outs), typical(x.shape[0]))
    if tiles is None:
        return None
    side, points = tiles.side, (tiles.side // 2 + 1, 3 * tiles.side)
    cut, images = _cut(b, x, g.low, side, tiles.steps, tiles)
    above, _ = _cut(b, dy, (0, 0), 0, tiles.steps, tiles)
    count = images * tiles.counts[0] * tiles.counts[1]
    of_tiles = b.reshape(_factors(b, cut, side), shape=(*points, count, channels))
    of_above = b.reshape(_factors(b, above, side, of_kernels=True), shape=(*points, count, outs))
    out = _elements(b, b.matmul(of_tiles, of_above, transpose_x=True), tiles.kernel, 1, channels * outs)
    return b.transpose(b.reshape(out, shape=(kx, ky, channels, outs)), perm=(3, 2, 1, 0))


FOURIER: tuple[Rule, ...] = (
    Rule("convolution of spectra", "conv", _forward, "tolerance"),
    Rule("input gradient of spectra", "conv_input_grad", _input_grad, "tolerance"),
    Rule("weight gradient of spectra", "conv_weight_grad", _weight_grad, "tolerance"))
"""The table. Stated cost: multiplications."""
