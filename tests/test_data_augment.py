"""Augmentation against SciPy's ndimage, and its random numbers: the same for a row in whatever batch."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage, stats

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data import Draws
from graphflow.data.augment import (
    Affine,
    Brightness,
    Contrast,
    Crop,
    Cutout,
    Flip,
    Noise,
    Normalize,
    Shift,
    ToFloat,
    rotate,
    sampled,
    zoom,
)
from graphflow.data.draws import Transform

RNG = np.random.default_rng(4)
IMAGES = RNG.random((40, 3, 9, 12)).astype(np.float32)


def draws(rows: int = len(IMAGES), seed: int = 1, epoch: int = 2, first: int = 0) -> Draws:
    return Draws(seed, epoch, np.arange(first, first + rows))


class Told:
    """Draws that say what they gave."""

    def __init__(self, source: Draws) -> None:
        self.source, self.given = source, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Callable[..., np.ndarray]:
        def draw(*args: object) -> np.ndarray:
            self.given.append(getattr(self.source, name)(*args))
            return self.given[-1]
        return draw


TRANSFORMS: list[Transform] = [
    Shift(2), Shift(1, 3, 0.5), Crop((7, 8)), Crop((9, 12), 2), Flip(), Flip(0.3, 2), rotate(30),
    zoom(0.8, 1.25), Affine(20, (0.9, 1.1), 1.5, None), Brightness(0.2), Contrast(0.5, 1.5), Noise(0.1),
    Cutout(4), Normalize([[[0.5]]], [[[0.2]]]), ToFloat(0.5)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_a_row_is_changed_alike_in_every_batch_and_its_source_not_at_all(transform: Transform) -> None:
    before = IMAGES.copy()
    whole = transform(IMAGES, draws())
    parts = [transform(IMAGES[i:i + 7], draws(len(IMAGES[i:i + 7]), first=i)) for i in range(0, 40, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(IMAGES, before)
    assert whole.dtype == np.float32
    if not isinstance(transform, (Normalize, ToFloat)):
        assert (whole != transform(IMAGES, draws(epoch=3))).any()
        assert (whole != transform(IMAGES, draws(seed=2))).any()


def test_shift_is_that_of_scipy() -> None:
    told = Told(draws())
    found = Shift(2, 3, 0.25)(IMAGES, told)  # type: ignore[arg-type]
    for image, moved, top, left in zip(IMAGES, found, *told.given):
        expected = ndimage.shift(image, (0, 2 - top, 3 - left), order=0, cval=0.25, prefilter=False)
        np.testing.assert_array_equal(moved, expected)
    assert set(told.given[0]) == set(range(5)) and set(told.given[1]) == set(range(7))


def test_bytes_are_moved_as_bytes() -> None:
    pixels = (IMAGES * 255).astype(np.uint8)
    for transform in (Shift(1), Crop((5, 5), 1), Flip(), Cutout(3, 7)):
        assert transform(pixels, draws()).dtype == np.uint8


def test_crop_without_room_is_the_image_and_each_place_occurs() -> None:
    np.testing.assert_array_equal(Crop((9, 12))(IMAGES, draws()), IMAGES)
    told = Told(draws(2000))
    many = np.repeat(IMAGES[:1], 2000, 0)
    found = Crop((8, 10), 1)(many, told)  # type: ignore[arg-type]
    padded = np.pad(IMAGES[0], ((0, 0), (1, 1), (1, 1)))
    for image, top, left in zip(found, *told.given):
        np.testing.assert_array_equal(image, padded[:, top:top + 8, left:left + 10])
    assert set(zip(*map(np.ndarray.tolist, told.given))) == {(t, le) for t in range(4) for le in range(5)}


@pytest.mark.parametrize("axis", [2, 3])
def test_flip_mirrors_as_many_as_it_should(axis: int) -> None:
    many = np.repeat(IMAGES[:1], 4000, 0)
    found = Flip(0.3, axis)(many, draws(4000))
    flipped = (found == np.flip(many, axis)).all((1, 2, 3))
    assert ((found == many).all((1, 2, 3)) ^ flipped).all()
    assert abs(flipped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)


@pytest.mark.parametrize("fill, mode", [(0.0, "grid-constant"), (0.5, "grid-constant"), (None, "nearest")])
def test_affine_sampling_is_that_of_scipy(fill: float | None, mode: str) -> None:
    images = IMAGES.astype(np.float64)
    matrix = np.eye(2) + RNG.normal(0, 0.4, (len(images), 2, 2))
    offset = RNG.normal(0, 3, (len(images), 2))
    found = sampled(images, matrix, offset, fill)
    for image, a, b, one in zip(images, matrix, offset, found):
        for channel, seen in zip(image, one):
            expected = ndimage.affine_transform(channel, a, b, order=1, mode=mode, cval=fill or 0)
            np.testing.assert_allclose(seen, expected, atol=1e-12)


def test_rotate_is_that_of_scipy() -> None:
    images = IMAGES.astype(np.float64)
    told = Told(draws())
    found = rotate(40)(images, told)  # type: ignore[arg-type]
    degrees = told.given[0]
    assert degrees.min() < -30 and degrees.max() > 30
    for image, turned, angle in zip(images, found, degrees):
        expected = ndimage.rotate(image, angle, (1, 2), reshape=False, order=1, mode="grid-constant")
        np.testing.assert_allclose(turned, expected, atol=1e-12)


def test_zoom_and_shift_are_those_of_scipy() -> None:
    images, middle = IMAGES.astype(np.float64), np.array([4, 5.5])
    told = Told(draws())
    found = Affine(0, (0.5, 2), 1.5, None)(images, told)  # type: ignore[arg-type]
    factors, moves = np.exp(told.given[1]), told.given[2]
    assert factors.min() < 0.6 and factors.max() > 1.7 and np.median(factors) == pytest.approx(1, abs=0.3)
    assert np.abs(moves).max() < 1.5 and moves.std() > 0.6
    for image, seen, factor, move in zip(images, found, factors, moves):
        for channel, one in zip(image, seen):
            expected = ndimage.affine_transform(channel, [1 / factor] * 2, middle - (middle + move) / factor,
                                                order=1, mode="nearest")
            np.testing.assert_allclose(one, expected, atol=1e-12)


def test_brightness_contrast_and_normalize() -> None:
    told = Told(draws())
    found = Brightness(0.3)(IMAGES, told)  # type: ignore[arg-type]
    added = np.broadcast_to(told.given[0][:, None, None, None], IMAGES.shape)
    np.testing.assert_allclose(found - IMAGES, added, atol=1e-6)
    assert told.given[0].min() < -0.2 and told.given[0].max() > 0.2
    told = Told(draws())
    found = Contrast(0.5, 1.5)(IMAGES, told)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.mean((1, 2, 3)), IMAGES.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.std((1, 2, 3)), IMAGES.std((1, 2, 3)) * told.given[0], rtol=1e-5)
    mean, std = np.array([0.1, 0.2, 0.3])[:, None, None], np.array([1, 2, 4])[:, None, None]
    found = Normalize(mean, std)(IMAGES, draws())
    np.testing.assert_allclose(found, (IMAGES - mean) / std, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(ToFloat()(np.array([[0, 51, 255]], np.uint8), draws(1)),
                                  np.array([[0, 51, 255]], np.float32) * np.float32(1 / 255))


def test_noise_is_normally_distributed() -> None:
    noise = (Noise(0.2)(np.zeros((50, 1, 20, 20), np.float32), draws(50)) / 0.2).ravel()
    assert stats.kstest(noise.astype(np.float64), "norm").pvalue > 1e-3
    rows = noise.reshape(50, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(50)).max() < 0.3


def test_cutout_fills_a_square_around_a_pixel() -> None:
    found = Cutout(4, -1)(np.ones((500, 2, 9, 12), np.float32), draws(500)) == -1
    assert (found[:, 0] == found[:, 1]).all()
    for square in found[:, 0]:
        rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
        assert square.sum() == len(rows) * len(columns) and 2 <= len(rows) <= 4 and 2 <= len(columns) <= 4
        assert np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1
    assert found.mean((0, 1)).min() > 0


def test_draws_are_uniform_and_of_their_row() -> None:
    made = draws(5000)
    for values in (made.uniform(-1, 3), made.uniform(-1, 3, (2,))[:, 1]):
        assert stats.kstest(values, "uniform", (-1, 4)).pvalue > 1e-3
    numbers = made.integers(-2, 4)
    assert stats.chisquare(np.bincount(numbers + 2, minlength=7)).pvalue > 1e-3
    again = Draws(1, 2, [17, 3])
    again.uniform()
    np.testing.assert_array_equal(again.uniform(-1, 3, (2,)), draws_after_one(5000)[[17, 3]])
    assert abs(np.corrcoef(draws(5000).uniform(), draws(5000, epoch=3).uniform())[0, 1]) < 0.06
    assert abs(np.corrcoef(draws(5000).uniform(), draws(5000, first=1).uniform())[0, 1]) < 0.06


def draws_after_one(rows: int) -> np.ndarray:
    made = draws(rows)
    made.uniform()
    return made.uniform(-1, 3, (2,))


def test_equal_lists_change_images_and_their_masks_alike() -> None:
    chain = [Shift(2), Flip(), rotate(20)]
    masks = (IMAGES[:, :1] > 0.5).astype(np.float32)
    both = np.concatenate([IMAGES, masks], 1)
    joint, first, second = draws(), draws(), draws()
    images, alone = IMAGES, masks
    for transform in chain:
        both, images = transform(both, joint), transform(images, first)
        alone = transform(alone, second)
    np.testing.assert_array_equal(both, np.concatenate([images, alone], 1))


@pytest.mark.parametrize("transform, images, message", [
    (Shift(1), IMAGES[0], r"Shift takes images \[N, C, H, W\], not an array \[3, 9, 12\]"),
    (rotate(5), (IMAGES * 255).astype(np.uint8), "Affine takes floats, not uint8"),
    (Noise(1), np.zeros((40, 2), int), "Noise takes floats"),
    (Crop((10, 12)), IMAGES, r"windows of \[10, 12\] do not fit into images of \[9, 12\]"),
    (Flip(axis=1), IMAGES, "the axis is 1"), (zoom(0, 1), IMAGES, "no pair of limits"),
    (Shift(-1), IMAGES, "integers of 0 or more")])
def test_what_no_transform_takes(transform: Transform, images: np.ndarray, message: str) -> None:
    with pytest.raises((DataError, UseError), match=message):
        transform(images, draws())


def test_a_deviation_of_nothing_is_refused() -> None:
    with pytest.raises(UseError, match="not above 0"):
        Normalize(0, [1, 0])
