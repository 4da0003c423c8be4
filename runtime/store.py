"""The Store: everything that lives from one call of a program to the next.

Parameters, optimizer slots, running statistics, the seed and the step counter are named entries of one
allocation, in row-major form. Programs bind to their addresses; everyone else reads copies and writes
through a check.
"""
from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import numpy as np

from graphflow.compiler.plan.bind import align
from graphflow.compiler.plan.dtypes import I64, U32, DType, as_dtype
from graphflow.compiler.plan.errors import CheckpointError, DTypeError, ShapeError, UseError
from graphflow.runtime.arena import Arena, address_of, aligned_bytes
from graphflow.runtime.loading import Choice, Loaded, Rename, chooser, renamed, shortened, type_text

ROLES = ("parameter", "slot", "statistic", "seed", "step")
SEED, STEP = "rng.seed", "rng.step"
"""The entries that every Store has: the seed (u32) and the number of training steps done (i64)."""

CHECKPOINT_FORMAT = 1

EXTRA = "extra:"
"""Before a tensor's name in a checkpoint's metadata: it is no entry of the Store."""

Initial = Callable[[np.random.Generator, tuple[int, ...], np.dtype], Any] | np.ndarray | float | int | bool


@dataclass(frozen=True)
class Entry:
    """One entry of a Store. `offset`: bytes from the start of the Store's memory."""
    name: str
    role: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.shape else 1

    @property
    def bytes(self) -> int:
        """The bytes of the elements, without padding."""
        return self.size * self.dtype.bytes


class Mirror(Protocol):
    """Copies of a Store's entries elsewhere, of which either side may be newer."""

    def fetch(self, names: Iterable[str]) -> None:
        """Brings newer values of these entries to the Store."""

    def changed(self, names: Iterable[str]) -> None:
        """The Store has new values of these entries."""


class Store:
    """Named arrays in one allocation. ``store[name]`` is a copy; ``store[name] = array`` checks shape and
    type.

    `seed` decides every initial value (together with the entry's name, so the order of declarations does
    not matter) and what random operations draw. `lock` is held while a program runs on the Store.
    `version` changes when entries are added or move: whoever keeps their addresses must take them anew.
    `arena` is the working memory of the programs that run on this Store: they run one at a time, so they
    share it. `mirror`: the copies that a device keeps, which are asked for newer values.
    """

    def __init__(self, seed: int = 0) -> None:
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2 ** 32:
            raise UseError(f"the seed is {seed!r}", hint="use an integer from 0 to 4294967295")
        self.lock = threading.RLock()
        self.version = 0
        self.arena = Arena()
        self.mirror: Mirror | None = None
        self._entries: dict[str, Entry] = {}
        self._views: dict[str, np.ndarray] = {}
        self._taken = set[str]()
        self._memory = aligned_bytes(0, "the Store")
        self._used = 0
        self._seed = int(seed)
        self.declare(SEED, "seed", U32, (), self._seed)
        self.declare(STEP, "step", I64, (), 0)

    @property
    def seed(self) -> int:
        """The seed, as it is now (a loaded checkpoint brings its own)."""
        return int(self[SEED])

    def declare(self, name: str, role: str, dtype: Any, shape: Sequence[int], initial: Initial = 0) -> None:
        """Adds an entry. `role`: one of ROLES. `initial`: a scalar, an array, or a function of
        (generator, shape, NumPy dtype) that returns one.

        An entry that exists with the same role, type and shape stays as it is; UseError if it differs.
        """
        dtype, shape = as_dtype(dtype), tuple(int(n) for n in shape)
        if role not in ROLES:
            raise UseError(f"{role!r} is no role of a Store entry", hint=f"use one of {', '.join(ROLES)}")
        with self.lock:
            old = self._entries.get(name)
            if old is not None:
                if (old.role, old.dtype, old.shape) != (role, dtype, shape):
                    raise UseError(f"the Store has {name} as a {old.role} {_type_text(old.dtype, old.shape)}"
                                   f", not as a {role} {_type_text(dtype, shape)}",
                                   hint="give it another name")
                return
            value = self._initial_value(name, dtype, shape, initial)
            entry = Entry(name, role, dtype, shape, self._used)
            self._grow(self._used + align(entry.bytes))
            self._used += align(entry.bytes)
            self._entries[name] = entry
            parts = name.split(".")
            self._taken.update(".".join(parts[:i + 1]) for i in range(len(parts)))
            self._views[name] = self._view(entry)
            self._views[name][...] = value
            self.version += 1

    def reserve(self, sizes: Iterable[int]) -> None:
        """Makes room for entries of so many bytes each: declaring them then moves nothing."""
        with self.lock:
            self._grow(self._used + sum(map(align, sizes)))
            self.version += 1

    def _initial_value(self, name: str, dtype: DType, shape: tuple[int, ...], initial: Initial) -> np.ndarray:
        if callable(initial):
            generator = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
            initial = initial(generator, shape, dtype.numpy)
        value = np.asarray(initial)
        if value.shape not in (shape, ()):
            raise ShapeError(f"the initial value of {name} has the wrong shape", shapes=(value.shape, shape),
                             hint="give an array of the entry's shape, or a scalar")
        return _converted(name, value, dtype)

    def _grow(self, size: int) -> None:
        """Moves the entries to a larger block if need be, by half again: many declarations stay cheap."""
        if size <= len(self._memory):
            return
        memory = aligned_bytes(max(size, len(self._memory) * 3 // 2, 4096), "the Store")
        memory[:self._used] = self._memory[:self._used]
        self._memory = memory
        self._views = {name: self._view(entry) for name, entry in self._entries.items()}

    def _view(self, entry: Entry) -> np.ndarray:
        raw = self._memory[entry.offset:entry.offset + entry.bytes]
        return raw.view(entry.dtype.numpy).reshape(entry.shape)

    def host(self, name: str) -> np.ndarray:
        """The entry's own memory, whether or not a device has a newer value: for the mirror."""
        return self._views[name]

    def fetch(self, names: Iterable[str] | None = None) -> None:
        """Makes sure that these entries (all of them by default) are up to date here."""
        if self.mirror is not None:
            self.mirror.fetch(self._entries if names is None else names)

    def changed(self, names: Iterable[str]) -> None:
        """Says that these entries have new values here."""
        if self.mirror is not None:
            self.mirror.changed(names)

    def entry(self, name: str) -> Entry:
        """The entry's role, type and place; UseError if there is none of that name."""
        try:
            return self._entries[name]
        except KeyError:
            near = ", ".join(list(self._entries)[:20])
            raise UseError(f"the Store has no entry {name!r}", hint=f"it has: {near}") from None

    def address(self, name: str) -> int:
        """Where the entry lies, valid while `version` stays the same."""
        return address_of(self._memory) + self.entry(name).offset

    def names(self, role: str | None = None) -> list[str]:
        """The entries' names in the order of declaration, of one role if it is given."""
        return [e.name for e in self._entries.values() if role is None or e.role == role]

    def taken(self, name: str) -> bool:
        """Whether there is an entry of this name, or one whose name begins with it and a dot."""
        return name in self._taken

    def __getitem__(self, name: str) -> np.ndarray:
        """A copy of the entry."""
        self.entry(name)
        with self.lock:
            self.fetch([name])
            return self._views[name].copy()

    def view(self, name: str) -> np.ndarray:
        """The entry itself, read-only: no copy, so it changes with every step, and after a new entry is
        declared it may be memory that no program uses any more."""
        self.entry(name)
        self.fetch([name])
        found = self._views[name].view()
        found.flags.writeable = False
        return found

    def __setitem__(self, name: str, value: Any) -> None:
        """Overwrites the entry; ShapeError or DTypeError if `value` does not fit it."""
        entry, value = self.entry(name), np.asarray(value)
        if value.shape != entry.shape:
            raise ShapeError(f"{name} takes an array of shape {list(entry.shape)}, not {list(value.shape)}")
        value = _converted(name, value, entry.dtype)
        with self.lock:
            self._views[name][...] = value
            self.changed([name])

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """The bytes that the entries take, padding included."""
        return self._used

    def save(self, path: str | PathLike[str], plan_hash: str = "",
             extra: Mapping[str, np.ndarray] | None = None, notes: Mapping[str, str] | None = None) -> None:
        """Writes every entry to a checkpoint file, whole or not at all; `extra` tensors and text `notes` go
        along, and `load` gives them back."""
        from graphflow.runtime.checkpoint import save_checkpoint
        with self.lock:
            self.fetch()
            tensors = {name: view.copy() for name, view in self._views.items()}
        more = dict(extra or {})
        both = tensors.keys() & more.keys()
        if both:
            raise UseError(f"the Store has an entry {min(both)!r}: no other tensor of a checkpoint can be "
                           "called so", hint="give it another name")
        metadata = {**(notes or {}), "format": str(CHECKPOINT_FORMAT), "plan": plan_hash}
        metadata.update({f"role:{e.name}": e.role for e in self._entries.values()})
        metadata.update({f"{EXTRA}{name}": "" for name in more})
        save_checkpoint(path, tensors | more, metadata)

    def load(self, path: str | PathLike[str], *, rename: Rename | None = None, only: Choice | None = None,
             strict: bool = True) -> Loaded:
        """Replaces entries by the tensors of a checkpoint file; returns which, and the file's metadata
        (`plan`: the hash given when it was saved).

        rename: the entry's name for a tensor's name, by a mapping of names (or their beginnings up to a "/"
        or dot) or a function; None leaves the tensor out. only: the entries meant, by patterns such as
        "conv*" or a function of the name; all else stays as it is. strict: CheckpointError, and nothing
        changed, where one is missing, surplus or of another shape or type; without it what fits is loaded,
        floats converted to the entry's type, and the rest reported. Files that other programs wrote are
        taken without `strict` alone.
        """
        from graphflow.runtime.checkpoint import load_checkpoint
        tensors, metadata = load_checkpoint(path)
        version = metadata.get("format", "unknown")
        if version != str(CHECKPOINT_FORMAT) and (strict or "format" in metadata):
            raise CheckpointError(f"{path} is of checkpoint format {version!r}; "
                                  f"this version reads format {CHECKPOINT_FORMAT}")
        extra = {name: value for name, value in tensors.items() if f"{EXTRA}{name}" in metadata}
        meant = chooser(only)
        entries = renamed({k: v for k, v in tensors.items() if k not in extra}, rename)
        chosen = {name: value for name, value in entries.items() if meant(name)}
        report = Loaded(metadata=metadata, extra=extra)
        report.missing = [name for name in self._entries if meant(name) and name not in chosen]
        report.unexpected = [name for name in chosen if name not in self._entries]
        fitting = self._fitting(chosen, strict, report)
        faults = report.faults()
        if strict and faults:
            raise CheckpointError(f"{path} holds another net:\n  " + "\n  ".join(shortened(faults)),
                                  hint="load it into the net that it was saved from, or a part of it with "
                                       "only=, rename= or strict=False")
        if not fitting:
            raise CheckpointError(f"nothing in {path} fits this net:\n  " + "\n  ".join(shortened(faults)),
                                  hint="rename= gives the tensors other names")
        with self.lock:
            for name, value in fitting.items():
                self._views[name][...] = value
            self.changed(fitting)
        report.loaded = [name for name in self._entries if name in fitting]
        return report

    def _fitting(self, tensors: Mapping[str, np.ndarray], exact: bool, report: Loaded
                 ) -> dict[str, np.ndarray]:
        """Those that their entries take; of the others it is noted why not."""
        fitting = {}
        for name, value in tensors.items():
            entry = self._entries.get(name)
            if entry is None:
                continue
            same = value.dtype == entry.dtype.numpy
            alike = _is_real(value.dtype) and entry.dtype.has_gradient and not exact
            if value.shape == entry.shape and (same or alike):
                fitting[name] = value
            else:
                report.mismatched[name] = (f"{type_text(value.dtype, value.shape)} in the file, "
                                           f"{_type_text(entry.dtype, entry.shape)} here")
        return fitting


def _is_real(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _type_text(dtype: DType, shape: Sequence[int]) -> str:
    return type_text(dtype.full_name, shape)


def _converted(name: str, value: np.ndarray, dtype: DType) -> np.ndarray:
    """`value` as `dtype` where its kind allows: floats take integers, nothing drops a fraction."""
    try:
        given = as_dtype(value.dtype)
    except DTypeError:
        given = None
    fits = given is not None and (given == dtype or dtype.has_gradient and given.kind in "fhiub"
                                  or dtype.is_integer and given.kind in "iub")
    if not fits:
        raise DTypeError(f"{name} takes {dtype.full_name}, not {value.dtype}",
                         hint=f"convert the array with .astype('{dtype.full_name}')")
    if given is not None and given != dtype and dtype.is_integer and value.size:
        limits = np.iinfo(dtype.numpy)
        if int(value.min()) < limits.min or int(value.max()) > limits.max:
            raise DTypeError(f"{name} takes {dtype.full_name}, and a value lies outside its range")
    return value.astype(dtype.numpy, copy=False)
