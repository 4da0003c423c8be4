"""Random changes of images that a training set is enlarged by, computed on whole batches [N, C, H, W].

Each transform is a function of (images, draws) that returns new images and leaves the old ones alone;
`draws` gives random numbers for each row (`gf.data.Draws`). One's own is any such function. Arrays that must
be changed alike, such as images and their masks, get equal lists of transforms: each list begins with the
same numbers.

Those that only move whole pixels (Shift, Crop, Flip, Cutout) take any element type; the others compute, so
they take floats: put `ToFloat` before them.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data.draws import Draws


@dataclass(frozen=True)
class ToFloat:
    """``images * scale`` as float32: the bytes 0 to 255 become 0 to 1."""
    scale: float = 1 / 255

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """The scaled images, float32, of any shape."""
        return images.astype(np.float32) * np.float32(self.scale)


class Normalize:
    """``(images - mean) / std``, with the statistics that `gf.data.mean_std` returns."""

    def __init__(self, mean: ArrayLike, std: ArrayLike) -> None:
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        if not (self.std > 0).all():
            raise UseError("a deviation of Normalize is not above 0")

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_floats("Normalize", images)
        return ((images - self.mean) / self.std).astype(images.dtype, copy=False)


@dataclass(frozen=True)
class Shift:
    """Moves each image by a whole number of pixels, at most so many in each direction; what comes in from
    outside is `fill`."""
    rows: int
    columns: int | None = None
    fill: float = 0

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        across = self.rows if self.columns is None else self.columns
        _check_images("Shift", images)
        padded = _padded(images, self.rows, across, self.fill)
        return _windows(padded, draws.integers(0, 2 * self.rows), draws.integers(0, 2 * across),
                        images.shape[2], images.shape[3])


@dataclass(frozen=True)
class Crop:
    """Cuts a window of `size` (H, W) out of each image at a random place, after padding it on all sides with
    `padding` pixels of `fill`."""
    size: tuple[int, int]
    padding: int = 0
    fill: float = 0

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images [N, C, *size] of the same type."""
        _check_images("Crop", images)
        spare = [images.shape[axis + 2] + 2 * self.padding - self.size[axis] for axis in (0, 1)]
        if min(spare) < 0 or min(self.size) < 1:
            raise DataError(f"Crop: windows of {list(self.size)} do not fit into images of "
                            f"{list(images.shape[2:])} with a padding of {self.padding}")
        padded = _padded(images, self.padding, self.padding, self.fill)
        return _windows(padded, draws.integers(0, spare[0]), draws.integers(0, spare[1]), *self.size)


@dataclass(frozen=True)
class Flip:
    """Mirrors each image with this probability: left and right (axis 3), or top and bottom (axis 2)."""
    probability: float = 0.5
    axis: int = 3

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_images("Flip", images)
        if self.axis not in (2, 3):
            raise UseError(f"Flip: the axis is {self.axis!r}; use 3 for left and right, 2 for top and bottom")
        chosen = draws.chance(self.probability)
        out = images.copy()
        out[chosen] = np.flip(images[chosen], self.axis)
        return out


@dataclass(frozen=True)
class Affine:
    """Turns, stretches and moves each image about its middle, in one interpolation.

    rotation: at most so many degrees either way (against the clock, as one looks at the image); scale: the
    limits of the factor, drawn evenly on a logarithmic scale; shift: at most so many pixels, fractions
    included, in each direction. Pixels are interpolated linearly between their four neighbours; outside the
    image they are `fill`, or with ``fill=None`` the nearest pixel of its edge.
    """
    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    fill: float | None = 0.0

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_floats("Affine", images)
        _check_images("Affine", images)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UseError(f"Affine: the scale {self.scale} is no pair of limits above 0")
        angle = np.deg2rad(draws.uniform(-self.rotation, self.rotation))
        factor = np.exp(draws.uniform(np.log(self.scale[0]), np.log(self.scale[1])))
        moved = draws.uniform(-self.shift, self.shift, (2,))
        cos, sin = np.cos(angle) / factor, np.sin(angle) / factor
        # from a pixel of the result to the place in the image that it shows; rows count downwards
        matrix = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)
        middle = (np.array(images.shape[2:]) - 1) / 2
        offset = middle - np.einsum("nij,nj->ni", matrix, middle + moved)
        return sampled(images, matrix, offset, self.fill)


def rotate(degrees: float, fill: float | None = 0.0) -> Affine:
    """Turns each image by at most so many degrees either way."""
    return Affine(rotation=degrees, fill=fill)


def zoom(low: float, high: float, fill: float | None = 0.0) -> Affine:
    """Stretches each image by a factor from `low` to `high`."""
    return Affine(scale=(low, high), fill=fill)


@dataclass(frozen=True)
class Brightness:
    """Adds a number from -amount to amount to all pixels of an image."""
    amount: float

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_floats("Brightness", images)
        return images + _per_image(draws.uniform(-self.amount, self.amount), images)


@dataclass(frozen=True)
class Contrast:
    """Multiplies each image's deviation from its mean with a factor from `low` to `high`."""
    low: float
    high: float

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_floats("Contrast", images)
        mean = images.mean(tuple(range(1, images.ndim)), keepdims=True)
        return mean + (images - mean) * _per_image(draws.uniform(self.low, self.high), images)


@dataclass(frozen=True)
class Noise:
    """Adds normally distributed noise of this deviation to each pixel."""
    deviation: float

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_floats("Noise", images)
        wide = images.dtype if images.dtype in (np.float32, np.float64) else np.dtype(np.float32)
        noise = draws.normal(images.shape[1:], wide) * wide.type(self.deviation)
        return images + noise.astype(images.dtype, copy=False)


@dataclass(frozen=True)
class Cutout:
    """Fills a square of `size` pixels around a random pixel of each image, as far as it lies inside: DeVries
    and Taylor, "Improved regularization of convolutional neural networks with Cutout" (2017)."""
    size: int
    fill: float = 0

    def __call__(self, images: np.ndarray, draws: Draws) -> np.ndarray:
        """Images of the same shape and type."""
        _check_images("Cutout", images)
        inside = []
        for extent in images.shape[2:]:
            first = draws.integers(0, extent - 1)[:, None] - self.size // 2
            place = np.arange(extent)
            inside.append((place >= first) & (place < first + self.size))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return np.where(square, np.asarray(self.fill, images.dtype), images)


def sampled(images: np.ndarray, matrix: np.ndarray, offset: np.ndarray, fill: float | None) -> np.ndarray:
    """The images seen through affine maps: pixel p of the result is the image at ``matrix @ p + offset``,
    interpolated linearly (what `scipy.ndimage.affine_transform` computes with order 1).

    images: [N, C, H, W]; matrix: [N, 2, 2] and offset: [N, 2], in rows and columns. fill: what lies outside;
    None for the nearest pixel of the edge.
    """
    count, _, height, width = images.shape
    pixels = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).reshape(2, -1)
    places = matrix @ pixels + offset[:, :, None]                 # [N, 2, H W]
    if fill is None:
        limits = np.array([height, width])[:, None] - 1
        places = np.clip(places, 0, limits)
    border = 1
    padded = _padded(images, border, border, 0 if fill is None else fill)
    limits = np.array(padded.shape[2:])[:, None] - 1
    places = np.clip(places + border, 0, limits)                  # the frame stands for all that is outside
    low = np.minimum(places.astype(np.int64), limits - 1)
    share = (places - low).astype(images.dtype)
    stride = padded.shape[3]
    corner = (low[:, 0] * stride + low[:, 1])[:, None, :]         # [N, 1, H W]
    flat = padded.reshape(count, images.shape[1], -1)
    down, right = share[:, 0, None], share[:, 1, None]
    one = images.dtype.type(1)

    def at(place: np.ndarray) -> np.ndarray:
        return np.take_along_axis(flat, place, 2)

    upper = at(corner) * (one - right) + at(corner + 1) * right
    lower = at(corner + stride) * (one - right) + at(corner + stride + 1) * right
    return (upper * (one - down) + lower * down).reshape(images.shape)


def _padded(images: np.ndarray, rows: int, columns: int, fill: float) -> np.ndarray:
    if rows < 0 or columns < 0:
        raise UseError(f"{rows} and {columns} pixels: use integers of 0 or more")
    return np.pad(images, ((0, 0), (0, 0), (rows, rows), (columns, columns)), constant_values=fill)


def _windows(images: np.ndarray, top: np.ndarray, left: np.ndarray, height: int, width: int) -> np.ndarray:
    """[N, C, height, width] from each image's own place."""
    views = np.lib.stride_tricks.sliding_window_view(images, (height, width), (2, 3))
    return views[np.arange(len(images)), :, top, left]


def _per_image(numbers: np.ndarray, images: np.ndarray) -> np.ndarray:
    return numbers.astype(images.dtype).reshape(-1, *[1] * (images.ndim - 1))


def _check_images(what: str, images: np.ndarray) -> None:
    if images.ndim != 4:
        raise DataError(f"{what} takes images [N, C, H, W], not an array {list(images.shape)}")


def _check_floats(what: str, images: np.ndarray) -> None:
    if images.dtype.kind != "f":
        raise DataError(f"{what} takes floats, not {images.dtype.name}",
                        hint="put augment.ToFloat() before it")
