"""Convolutions with large kernels as products of spectra, where that takes far fewer multiplications.

Images are cut into tiles of `side` x `side` elements, which overlap so that each gives (side - kernel + 1)
outputs along an axis; the transform of a tile, times the conjugate of the kernel's at each frequency, added
up over channels, is the transform of those outputs and of some that wrap around, which are left out (overlap-
save: Oppenheim, Schafer, Discrete-Time Signal Processing, 8.7). A transform along an axis is a product with a
small matrix, and so are the sums over channels: at each frequency one product of all tiles and all channels,
with real and imaginary parts side by side. Tiles are real, so half of the frequencies along x do.

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
from graphflow.compiler.passes.fuse import typical
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import F32

SIDES = (16, 32, 64)
"""Sides of tiles."""
LEAST_KERNEL = 7
"""Smaller kernels are left to other algorithms."""
WORTH = 3.0
"""So many times fewer multiplications it has to take: they come in smaller products, between which all
spectra are written and read."""


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
    """The tiles that take the fewest multiplications; None if those are not far fewer than by definition."""
    (ky, kx), (rows, columns) = g.kernel, g.outputs

    def of_side(side: int) -> Tiles:
        return Tiles(side, g.kernel, (-(-rows // (side - ky + 1)), -(-columns // (side - kx + 1))))

    def products(t: Tiles) -> float:
        half, (sy, sx) = t.side // 2 + 1, t.steps
        there = channels * (2 * half * t.side ** 2 + 4 * half * t.side ** 2)
        back = outs * (4 * sy * t.side * half + 2 * sy * sx * half)
        kernels = channels * outs * (2 * half * ky * kx + 4 * ky * t.side * half)
        tile = there + back + 4 * half * t.side * channels * outs
        return t.counts[0] * t.counts[1] * tile + kernels / max(images, 1)

    choices = [of_side(side) for side in SIDES if side >= max(ky, kx) + LEAST_KERNEL - 1]
    best = min(choices, key=products, default=None)
    by_definition = rows * columns * channels * outs * ky * kx
    return best if best is not None and WORTH * products(best) < by_definition else None


# --- transforms


@lru_cache(maxsize=64)
def _tables(side: int, extents: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """(x to (part, frequency), (y, part) to (part, frequency)) of elements (y, x) of a tile, zeros behind
    them; then ((part, frequency) to (y, part), (part, frequency) to x) for these elements of the inverse."""
    (ty, tx), half = extents, side // 2 + 1
    turn = 2 * np.pi / side
    across = turn * np.outer(np.arange(half), np.arange(tx))
    along = turn * np.outer(np.arange(side), np.arange(ty))
    c, s = np.cos(along), np.sin(along)
    down = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)])              # [part', u, y, part]
    up = np.stack([np.stack([c.T, -s.T], 1), np.stack([s.T, c.T], 1)], 1)       # [y, part', part, u]
    weights = np.full((half, 1), 2.0)
    weights[[0, -1]] = 1.0                                                      # those without a mirror image
    back = np.stack([weights * np.cos(across), -weights * np.sin(across)]) / side ** 2
    return tuple(table.astype(np.float32) for table in (
        np.concatenate([np.cos(across), -np.sin(across)]), down.reshape(2 * side, 2 * ty),
        up.reshape(2 * ty, 2 * side), back.reshape(2 * half, tx).T))


def _array(b: RewriteBuilder, table: np.ndarray) -> Value:
    return b.array(data=np.ascontiguousarray(table).tobytes(), dtype=F32, shape=table.shape)


def _spectra(b: RewriteBuilder, x: Value, side: int) -> Value:
    """[frequency x, part, frequency y, lead · rest] of elements [x, lead, y, rest]."""
    tx, lead, ty, rest = x.shape
    assert isinstance(tx, int) and isinstance(ty, int)
    first, second, _, _ = _tables(side, (ty, tx))
    half = side // 2 + 1
    rows = b.matmul(_array(b, first), b.reshape(x, shape=(tx, lead * ty * rest)))
    rows = b.transpose(b.reshape(rows, shape=(2, half, lead, ty, rest)), perm=(1, 3, 0, 2, 4))
    second_all = b.broadcast(_array(b, second), (half, 2 * side, 2 * ty))
    out = b.matmul(second_all, b.reshape(rows, shape=(half, 2 * ty, lead * rest)))
    return b.reshape(out, shape=(half, 2, side, lead * rest))


def _elements(b: RewriteBuilder, spectra: Value, extents: tuple[int, int], lead: DimLike, rest: DimLike
              ) -> Value:
    """[x, lead, y, rest] of spectra [frequency x, part · frequency y, lead · rest]."""
    (ty, tx), half = extents, typical(spectra.shape[0])
    side = 2 * (half - 1)
    _, _, third, fourth = _tables(side, extents)
    columns = b.matmul(b.broadcast(_array(b, third), (half, 2 * ty, 2 * side)), spectra)
    columns = b.transpose(b.reshape(columns, shape=(half, ty, 2, lead, rest)), perm=(2, 0, 3, 1, 4))
    out = b.matmul(_array(b, fourth), b.reshape(columns, shape=(2 * half, lead * ty * rest)))
    return b.reshape(out, shape=(tx, lead, ty, rest))


def _conjugates(b: RewriteBuilder, spectra: Value, rows: DimLike, columns: DimLike) -> Value:
    """[frequency x, frequency y, part · rows, part' · columns]: the matrix by which one multiplies rows of
    (part, row) to multiply by the conjugates of spectra [frequency x, part, frequency y, rows · columns]."""
    half, _, side, _ = spectra.shape
    parts = b.reshape(spectra, shape=(half, 2, side, rows, columns))

    def part(at: int) -> Value:
        stops = (half, at + 1, side, rows, columns)
        return b.reshape(b.slice(parts, starts=(0, at, 0, 0, 0), stops=stops, steps=(1,) * 5),
                         shape=(half, side, rows, columns))

    real, imag = part(0), part(1)
    return b.concatenate(b.concatenate(real, b.neg(imag), axis=3), b.concatenate(imag, real, axis=3), axis=2)


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
    (outs, channels), side, half = w.shape[:2], tiles.side, tiles.side // 2 + 1
    (down, across), (sy, sx), (ky, kx) = tiles.counts, tiles.steps, tiles.kernel
    cut, images = _cut(b, x, g.low, side, tiles.steps, tiles)
    count = images * down * across
    of_tiles = b.reshape(_spectra(b, cut, side), shape=(half, 2, side, count, channels))
    of_tiles = b.reshape(b.transpose(of_tiles, perm=(0, 2, 3, 1, 4)), shape=(half, side, count, 2 * channels))
    kernels = b.reshape(b.transpose(w, perm=(3, 2, 1, 0)), shape=(kx, 1, ky, channels * outs))
    out = b.matmul(of_tiles, _conjugates(b, _spectra(b, kernels, side), channels, outs))
    out = b.transpose(b.reshape(out, shape=(half, side, count, 2, outs)), perm=(0, 3, 1, 2, 4))
    out = _elements(b, b.reshape(out, shape=(half, 2 * side, count * outs)), tiles.steps, images * down,
                    across * outs)
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
    outs, channels, ky, kx = node.result().shape
    g = _geometry(node, x, node.result().shape, dy)
    tiles = _tiles(g, typical(channels), typical(outs), typical(x.shape[0])) if g else None
    if g is None or tiles is None:
        return None
    side, half = tiles.side, tiles.side // 2 + 1
    cut, images = _cut(b, x, g.low, side, tiles.steps, tiles)
    above, _ = _cut(b, dy, (0, 0), 0, tiles.steps, tiles)
    count = images * tiles.counts[0] * tiles.counts[1]
    of_tiles = b.reshape(_spectra(b, cut, side), shape=(half, 2, side, count, channels))
    of_tiles = b.reshape(b.transpose(of_tiles, perm=(0, 2, 1, 3, 4)), shape=(half, side, 2 * count, channels))
    out = b.matmul(of_tiles, _conjugates(b, _spectra(b, above, side), count, outs), transpose_x=True)
    out = b.transpose(b.reshape(out, shape=(half, side, channels, 2, outs)), perm=(0, 3, 1, 2, 4))
    out = _elements(b, b.reshape(out, shape=(half, 2 * side, channels * outs)), tiles.kernel, 1,
                    channels * outs)
    return b.transpose(b.reshape(out, shape=(kx, ky, channels, outs)), perm=(3, 2, 1, 0))


FOURIER: tuple[Rule, ...] = (
    Rule("convolution of spectra", "conv", _forward, "tolerance"),
    Rule("input gradient of spectra", "conv_input_grad", _input_grad, "tolerance"),
    Rule("weight gradient of spectra", "conv_weight_grad", _weight_grad, "tolerance"))
"""The table. Stated cost: multiplications."""
