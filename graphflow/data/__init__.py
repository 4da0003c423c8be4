"""Data sets, read from files or memory; batches of them, made ahead by worker threads; augmentation."""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphflow.data.batches import Batches, Minibatches, Stream
from graphflow.data.draws import Draws
from graphflow.data.files import load_csv, load_idx, load_idx_folder, load_npz
from graphflow.data.images import ImageFolder, read_image
from graphflow.data.sequences import Sequences, pad
from graphflow.data.sets import Arrays, Dataset, Subset, mean_std, split
from graphflow.data.text import Characters, TextWindows, read_text

if TYPE_CHECKING:
    from graphflow.data import augment

__all__ = ["Arrays", "Batches", "Characters", "Dataset", "Draws", "ImageFolder", "Minibatches", "Sequences",
           "Stream", "Subset", "TextWindows", "augment", "load_csv", "load_idx", "load_idx_folder",
           "load_npz", "mean_std", "pad", "read_image", "read_text", "split"]


def __getattr__(name: str) -> Any:
    """The module of augmentation, which few need, is imported when it is first asked for."""
    if name == "augment":
        return importlib.import_module("graphflow.data.augment")
    raise AttributeError(f"graphflow.data has no {name!r}")
