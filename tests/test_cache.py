"""The on-disk cache of compiled programs."""
from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from nets import mlp_step

from graphflow.compiler import cache
from graphflow.compiler.cache import Cache, cache_key, default_folder, program_cache
from graphflow.compiler.driver import Compilation, compile_pool
from graphflow.compiler.emit.object import give_memory_back
from graphflow.compiler.emit.pool import pool_object
from graphflow.compiler.target import host_target

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
    Cache(folder).put(cache_key("old"), PIECES)
    (path,) = entries(folder)
    os.utime(path, (time.time() - 200, time.time() - 200))
    store = Cache(folder, max_age_seconds=100)
    store.put(cache_key("new"), PIECES)
    assert store.get(cache_key("old")) is None
    assert store.get(cache_key("new")) == PIECES


def test_entries_are_looked_through_by_the_first_put_and_when_much_was_stored(folder: Path) -> None:
    store = Cache(folder, max_bytes=64 * 10_000, max_age_seconds=100)
    for size, kept in ((10, True), (10, True), (8_000, True), (10, True), (3_000, False), (10, True)):
        store.put(cache_key("old"), {"object": b""})
        path = folder / (cache_key("old") + ".gfc")
        os.utime(path, (time.time() - 200, time.time() - 200))
        store.put(cache_key(f"new {size}"), {"object": bytes(size)})
        assert path.exists() == kept


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


# --- programs


TRAIN = """
import sys
import numpy as np
import graphflow as gf
x = gf.input("x", (None, 3))
w = gf.parameter((3, 2), np.ones((3, 2), np.float32))
loss = gf.sum(gf.square(x @ w))
step = gf.function(x, loss, gf.optim.SGD(0.01).minimize(loss))
values = [float(step(np.arange(12, dtype=np.float32).reshape(4, 3))) for _ in range(3)]
print(values, step.peak_bytes(batch=4), step.compiled.cached, "llvmlite.binding" in sys.modules)
"""


@pytest.mark.cpu
@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="links by LLVM")
def test_a_program_from_the_cache_needs_no_code_generator(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        env = {**os.environ, "GRAPHFLOW_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", TRAIN]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        said.append(done.stdout.split("]"))
    assert said[0][0] == said[1][0] and said[0][1].split()[0] == said[1][1].split()[0]
    assert said[0][1].split()[1:] == ["False", "True"] and said[1][1].split()[1:] == ["True", "False"]


def test_stages_that_were_let_go_are_run_again() -> None:
    kept, fresh = Compilation(mlp_step(), host_target()), Compilation(mlp_step(), host_target())
    plan = kept.result("plan")
    explained, text = kept.explain(), kept.text("emit")
    kept.keep_only(plan)
    assert kept.result("plan") is plan
    assert kept.text("emit") == text == fresh.text("emit") and kept.explain() == explained
    assert kept.result("plan") is plan


@pytest.mark.cpu
def test_compiling_goes_on_after_memory_was_given_back() -> None:
    first = compile_pool(host_target())
    give_memory_back()
    assert pool_object(host_target()) == first


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux only")
def test_memory_is_not_given_back_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    library = SimpleNamespace(madvise=lambda *span: None, malloc_trim=times.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for pause in (0.0, 60.0, 0.0):
        give_memory_back(pause)
    assert len(times) == 2
