"""The on-disk cache of compiled programs.

An entry is one file: a magic word, the SHA-256 of what follows, and named pieces of bytes. Entries hold
machine code, so the folder must belong to the user and be closed to everyone else; otherwise it is not
used. A file appears under its name only when it is complete, and the checksum is verified on every read,
so that a torn or damaged entry is a miss and never code that runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

_MAGIC = b"graphflow cache 1\n"
_SUFFIX = ".gfc"
_DIGEST_BYTES = 32


def cache_key(*parts: str) -> str:
    """A key (64 hex digits) that differs if any part differs, or their number or order."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def default_folder() -> Path | None:
    """`$GRAPHFLOW_CACHE`, else `graphflow` in the platform's cache folder; None if the variable is `off`."""
    chosen = os.environ.get("GRAPHFLOW_CACHE", "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "graphflow"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "graphflow"


def program_cache() -> Cache:
    """The cache in `default_folder()`, opened (and warned of, if need be) once."""
    return _opened(default_folder())


class Cache:
    """A folder of entries, bounded by their total size and by the time since each was last used.

    `folder` None switches it off: every `get` misses. A folder that cannot be made, is not the user's own,
    or is open to others is not used either; that is warned of once, when the cache is made.
    """

    def __init__(self, folder: Path | None, max_bytes: int = 512 << 20,
                 max_age_seconds: float = 60 * 86400) -> None:
        self.max_bytes = max_bytes
        self.max_age_seconds = max_age_seconds
        self._unlooked = max_bytes
        self.folder = folder
        problem = _make_private(folder) if folder else None
        if problem:
            self.folder = None
            warnings.warn(f"compiled programs are not cached: {folder} {problem}; set GRAPHFLOW_CACHE to a "
                          f"folder of your own, or to `off`", RuntimeWarning, stacklevel=2)

    def get(self, key: str) -> dict[str, bytes] | None:
        """The pieces stored under a key, or None. A damaged entry is removed."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        pieces = _unpack(raw)
        try:
            if pieces is None:
                path.unlink()
            else:
                os.utime(path)
        except OSError:
            pass
        return pieces

    def put(self, key: str, pieces: dict[str, bytes]) -> None:
        """Store the pieces under a key; then, the first time and whenever a 64th of `max_bytes` has been
        stored since, drop the entries that are too old or too many. To look at thousands takes longer than
        to compile a small program.

        A cache that cannot be written (a full disk, say) is no error: the next run compiles again.
        """
        if self.folder is None:
            return
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(prefix=".new-", suffix=_SUFFIX, dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                self._unlooked += file.write(_pack(pieces))
            os.replace(temporary, self._path(key))
        except OSError:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            return
        if self._unlooked >= self.max_bytes // 64:
            self._unlooked = 0
            self._evict()

    def _path(self, key: str) -> Path:
        if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"{key!r} is not a cache key; make one with cache_key")
        assert self.folder is not None
        return self.folder / (key + _SUFFIX)

    def _evict(self) -> None:
        """Remove entries unused for `max_age_seconds`, then the least recently used beyond `max_bytes`."""
        assert self.folder is not None
        entries = []
        try:
            found = [entry for entry in os.scandir(self.folder) if entry.name.endswith(_SUFFIX)]
        except OSError:
            return
        for entry in found:
            try:
                status = entry.stat()
            except OSError:
                continue
            entries.append((status.st_mtime, status.st_size, entry.path))
        oldest_kept = time.time() - self.max_age_seconds
        total = 0
        for used, size, path in sorted(entries, reverse=True):
            total += size
            if used < oldest_kept or total > self.max_bytes:
                Path(path).unlink(missing_ok=True)


@cache
def _opened(folder: Path | None) -> Cache:
    return Cache(folder)


def _make_private(folder: Path) -> str | None:
    """Create the folder for the user alone; what is wrong with it, or None."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & 0o077:
        return "is open to other users"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    return None


def _pack(pieces: dict[str, bytes]) -> bytes:
    """An entry's bytes: magic, digest, length of the table, table of names and sizes, the pieces."""
    table = json.dumps([[name, len(piece)] for name, piece in pieces.items()]).encode()
    body = len(table).to_bytes(8, "little") + table + b"".join(pieces.values())
    return _MAGIC + hashlib.sha256(body).digest() + body


def _unpack(raw: bytes) -> dict[str, bytes] | None:
    """The pieces of an entry, or None if it is not exactly what `_pack` wrote."""
    start = len(_MAGIC) + _DIGEST_BYTES
    body = raw[start:]
    if raw[:len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != raw[len(_MAGIC):start]:
        return None
    at = 8 + int.from_bytes(body[:8], "little")
    pieces = {}
    for name, size in json.loads(body[8:at]):
        pieces[name] = body[at:at + size]
        at += size
    return pieces
