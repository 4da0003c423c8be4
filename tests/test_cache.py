"""The on-disk cache of compiled programs."""
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from graphflow.compiler import cache
from graphflow.compiler.cache import Cache, cache_key, default_folder, program_cache

PIECES = {"object": bytes(range(256)) * 10, "plan": b"", "text": "é".encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "nested" / "cache"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_was_put_comes_back(folder: Path) -> None:
    store = Cache(folder)
    key = cache_key("program", "target")
    assert store.get(key) is None
    store.put(key, PIECES)
    assert store.get(key) == PIECES
    assert Cache(folder).get(key) == PIECES
    assert store.get(cache_key("program")) is None
    store.put(key, {"object": b"new"})
    assert store.get(key) == {"object": b"new"}
    assert len(entries(folder)) == 1
    assert folder.stat().st_mode & 0o777 == 0o700


def test_keys_tell_parts_apart() -> None:
    keys = {cache_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("c", "ab")]}
    assert len(keys) == 5
    assert cache_key("ab", "c") == cache_key("ab", "c")


@pytest.mark.parametrize("at", [0, 20, 60, -1])
def test_a_changed_byte_is_a_miss_and_removes_the_entry(folder: Path, at: int) -> None:
    store, key = Cache(folder), cache_key("x")
    store.put(key, PIECES)
    (path,) = entries(folder)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    assert store.get(key) is None
    assert entries(folder) == []


@pytest.mark.parametrize("keep", [0, 5, 40, 100])
def test_a_cut_entry_is_a_miss(folder: Path, keep: int) -> None:
    store, key = Cache(folder), cache_key("x")
    store.put(key, PIECES)
    (path,) = entries(folder)
    path.write_bytes(path.read_bytes()[:keep])
    assert store.get(key) is None
    assert entries(folder) == []


def test_keys_cannot_leave_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="cache_key"):
        Cache(folder).get("../../etc/passwd")


def test_least_recently_used_entries_go_first(folder: Path) -> None:
    store = Cache(folder, max_bytes=3500)
    keys = [cache_key(str(number)) for number in range(4)]
    for age, key in zip((40, 30, 20), keys):
        store.put(key, {"object": b"x" * 1000})
        path = folder / (key + ".gfc")
        os.utime(path, (time.time() - age, time.time() - age))
    assert store.get(keys[0]) is not None  # now the most recently used
    store.put(keys[3], {"object": b"x" * 1000})
    assert [store.get(key) is not None for key in keys] == [True, False, True, True]


def test_old_entries_are_dropped(folder: Path) -> None:
    store = Cache(folder, max_age_seconds=100)
    store.put(cache_key("old"), PIECES)
    (path,) = entries(folder)
    os.utime(path, (time.time() - 200, time.time() - 200))
    store.put(cache_key("new"), PIECES)
    assert store.get(cache_key("old")) is None
    assert store.get(cache_key("new")) == PIECES


def test_open_folder_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.warns(RuntimeWarning, match="open to other users"):
        store = Cache(folder)
    store.put(cache_key("x"), PIECES)
    assert store.get(cache_key("x")) is None
    assert entries(folder) == []


def test_folder_that_cannot_be_made_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert Cache(tmp_path / "file" / "cache").get(cache_key("x")) is None
    with pytest.warns(RuntimeWarning, match="not cached"):
        assert Cache(tmp_path / "file").folder is None
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(target)
    with pytest.warns(RuntimeWarning, match="not a folder"):
        assert Cache(tmp_path / "link").folder is None


def test_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.warns(RuntimeWarning, match="another user"):
        assert Cache(folder).folder is None


def test_environment_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHFLOW_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    store = program_cache()
    assert store.folder == tmp_path / "mine" and program_cache() is store
    monkeypatch.setenv("GRAPHFLOW_CACHE", "off")
    assert default_folder() is None
    program_cache().put(cache_key("x"), PIECES)
    assert program_cache().get(cache_key("x")) is None
    monkeypatch.delenv("GRAPHFLOW_CACHE")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "graphflow"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path.home() / ".cache" / "graphflow"


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Cache(folder)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    store.put(cache_key("x"), PIECES)
    assert entries(folder) == []
