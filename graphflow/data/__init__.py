"""Data sets, read from files or memory, and minibatches of them."""
from __future__ import annotations

from graphflow.data.batches import Minibatches
from graphflow.data.files import load_csv, load_idx, load_idx_folder, load_npz

__all__ = ["Minibatches", "load_csv", "load_idx", "load_idx_folder", "load_npz"]
