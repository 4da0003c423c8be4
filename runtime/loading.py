"""Which tensors of a checkpoint go into which entries of a Store."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from graphflow.compiler.plan.errors import CheckpointError

Rename = Mapping[str, str | None] | Callable[[str], str | None]
Choice = str | Sequence[str] | Callable[[str], bool]

SEPARATORS = "/."
"""What stands between the parts of an entry's name: scopes, then the parts of a layer."""

SHOWN = 12
"""Names that a message lists at most."""


@dataclass
class Loaded:
    """What became of a checkpoint's tensors and a Store's entries.

    loaded: the Store's entries that were replaced. missing: those that the file lacks. unexpected: tensors of
    the file that no entry takes. mismatched: tensors of another shape or type than their entry, as text by
    name. metadata: the file's text; extra: its tensors that never belonged to a Store.
    """
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """A line for each name that was not loaded."""
        return [*(f"{name} is missing" for name in self.missing),
                *(f"{name} is not of this net" for name in self.unexpected),
                *(f"{name} is {text}" for name, text in self.mismatched.items())]

    def __str__(self) -> str:
        """The numbers, and a line for each name that was not loaded."""
        faults = self.faults()
        head = (f"{len(self.loaded)} loaded, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
                f"{len(self.mismatched)} mismatched")
        return "\n  ".join([head, *shortened(faults)])


def shortened(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def renamed(tensors: Mapping[str, np.ndarray], rename: Rename | None) -> dict[str, np.ndarray]:
    """The tensors under the names that `rename` gives; those without one are left out.

    A mapping's keys are whole names or beginnings of names up to a "/" or dot (the longest counts):
    {"encoder": "body"} makes encoder/dense.W body/dense.W; None leaves out. CheckpointError if two get one
    name.
    """
    if rename is None:
        return dict(tensors)
    found: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    for old, tensor in tensors.items():
        new = rename(old) if callable(rename) else _by_prefix(old, rename)
        if not new:
            continue
        if new in found:
            raise CheckpointError(f"{sources[new]} and {old} are both renamed to {new}")
        found[new], sources[new] = tensor, old
    return found


def _by_prefix(name: str, rename: Mapping[str, str | None]) -> str | None:
    ends = [len(name), *(i for i in range(len(name) - 1, -1, -1) if name[i] in SEPARATORS)]
    for end in ends:
        if name[:end] in rename:
            new = rename[name[:end]]
            return None if new is None else new + name[end:]
    return name


def chooser(only: Choice | None) -> Callable[[str], bool]:
    """Whether a name is among those meant by `only`: patterns such as "conv*", a function, or all."""
    if only is None:
        return lambda name: True
    if callable(only):
        return only
    patterns = [only] if isinstance(only, str) else list(only)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def type_text(dtype: Any, shape: Sequence[int]) -> str:
    """A type as messages show it: float32[3, 4]."""
    return f"{dtype}{list(shape)}"
