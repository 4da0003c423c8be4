"""Images in folders, one for each class, decoded when their batch is made."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data.sets import Batch

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the files that are taken for images, in small letters."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageFolder:
    """The images below a folder that has one folder for each class, as a data set. Needs Pillow.

    A class' number is its folder's place in the sorted `classes`. Rows are sorted by class and path. A row is
    the image [channels, H, W], float32 from 0 to 1, under the name `image`, and its class, int64, under
    `label`. size: (H, W) to which images are resized, linearly and with smoothing; without it all must
    be of one size. channels: 1 (grey), 3 or 4, converted to. DataError for a folder without classes, a class
    without images, and an image that cannot be read, by its name.
    """

    def __init__(self, folder: str | os.PathLike[str], size: tuple[int, int] | None = None, channels: int = 3,
                 *, image: str = "x", label: str = "y") -> None:
        load_pillow()
        if channels not in _MODES:
            raise UseError(f"channels is {channels!r}", hint="use 1, 3 or 4")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise UseError(f"size is {size!r}", hint="use (height, width)")
        self.folder, self.size, self.channels = Path(folder), size, channels
        self.image, self.label = image, label
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder")
        self.classes = sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name[0] != ".")
        if not self.classes:
            raise DataError(f"{self.folder}: no folders in it; one for each class is needed")
        found = [_images_below(self.folder / name) for name in self.classes]
        self.files = [path for paths in found for path in paths]
        self.labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def take_rows(self, rows: np.ndarray) -> Batch:
        """Decodes the images of these numbers: float32 [rows, channels, H, W] and int64 [rows]."""
        pixels = [self._decoded(self.files[row]) for row in rows]
        for row, one in zip(rows, pixels):
            if one.shape != pixels[0].shape:
                raise DataError(f"{self.files[row]} is {list(one.shape[:2])}, {self.files[rows[0]]} "
                                f"{list(pixels[0].shape[:2])}",
                                hint="size=(height, width) resizes all images")
        stacked = np.stack(pixels).reshape(len(pixels), *pixels[0].shape[:2], self.channels)
        images = np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)).astype(np.float32)
        return {self.image: images * np.float32(1 / 255), self.label: self.labels[rows]}

    def _decoded(self, path: Path) -> np.ndarray:
        return read_image(path, self.size, self.channels)


def _images_below(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not found:
        raise DataError(f"{folder}: no images in this class' folder",
                        hint=f"files are taken for images that end in {', '.join(ENDINGS)}")
    return found


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None, channels: int = 3,
               ) -> np.ndarray:
    """The pixels of an image file as uint8 [H, W] (1 channel) or [H, W, channels], resized to (H, W) if that
    is given. Grey levels of 16 bits are scaled down to 8. DataError if it cannot be read."""
    image_module = load_pillow()
    try:
        with image_module.open(path) as file:
            if file.mode.startswith("I;16"):             # Pillow would clip them to 255
                file = image_module.fromarray((np.asarray(file) >> 8).astype(np.uint8))
            converted = file.convert(_MODES[channels])
            if size is not None and converted.size != (size[1], size[0]):
                converted = converted.resize((size[1], size[0]), image_module.Resampling.BILINEAR)
            return np.asarray(converted, np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError, image_module.DecompressionBombError) as error:
        raise DataError(f"{os.fspath(path)}: not a readable image: {error}") from error


def load_pillow() -> Any:
    """Pillow's module Image; UseError that says how to install it if it is missing."""
    try:
        from PIL import Image
    except ImportError:
        raise UseError("reading images needs Pillow", hint="pip install 'graphflow[images]'") from None
    return Image
