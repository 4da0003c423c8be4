"""Checkpoints come back bit for bit, are replaced whole or not at all, and are refused when malformed."""
from __future__ import annotations

import errno
import json
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graphflow.compiler.plan.errors import CheckpointError
from graphflow.runtime.checkpoint import load_checkpoint, save_checkpoint

DTYPES = ["float32", "float64", "int32", "int64", "uint8", "bool", "uint32", "float16"]


def example(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {dtype: (rng.random((3, 5)) * 100 - 20 * (dtype[0] in "fi")).astype(dtype) for dtype in DTYPES}
    return tensors | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4)),
                      "a.b/c é": np.array([np.nan, -0.0, np.inf, 5e-324])}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()


def test_round_trip_is_exact_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, example(), {"step": "12", "plan": "ü\n\""})
    tensors, metadata = load_checkpoint(path)
    assert_same(tensors, example())
    assert metadata == {"step": "12", "plan": "ü\n\""}
    assert all(array.flags.writeable and array.flags.c_contiguous for array in tensors.values())
    assert_same(load_file(path), example())


def test_files_of_others_are_read(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "a")
    tensors, metadata = load_checkpoint(tmp_path / "a")
    assert_same(tensors, example())
    assert metadata == {}


def test_nothing_at_all_is_a_checkpoint_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", {}, {})
    assert load_checkpoint(tmp_path / "a") == ({}, {})


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.arange(24)[::-2],
                                   np.arange(5, dtype=">i4"), np.broadcast_to(np.float32(3), (2, 2))])
def test_any_memory_order_is_saved(tmp_path: Path, array: np.ndarray) -> None:
    save_checkpoint(tmp_path / "a", {"x": array}, {})
    got = load_checkpoint(tmp_path / "a")[0]["x"]
    assert got.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got, array)


def test_loaded_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", {"x": np.ones(1000)}, {})
    got = load_checkpoint(tmp_path / "a")[0]["x"]
    with open(tmp_path / "a", "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    np.testing.assert_array_equal(got, np.ones(1000))


def test_replacing_keeps_permissions_and_follows_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    save_checkpoint(real, example(0), {})
    umask = os.umask(0)
    os.umask(umask)
    assert real.stat().st_mode & 0o777 == 0o666 & ~umask
    real.chmod(0o640)
    link.symlink_to(real)
    save_checkpoint(link, example(1), {})
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    assert_same(load_checkpoint(real)[0], example(1))


@pytest.mark.parametrize("function, code", [
    ("fsync", errno.ENOSPC), ("replace", errno.ENOSPC), ("fsync", errno.EIO), ("chmod", errno.EPERM)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    path = tmp_path / "model"
    save_checkpoint(path, example(0), {"step": "1"})

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
            save_checkpoint(path, example(1), {"step": "2"})
    assert str(path) in caught.value.message and "unchanged" in caught.value.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert_same(load_checkpoint(path)[0], example(0))


def test_an_interrupt_leaves_the_old_file_and_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    save_checkpoint(path, example(0), {})

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, example(1), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert_same(load_checkpoint(path)[0], example(0))


def test_a_full_disk(tmp_path: Path) -> None:
    """A process that may write no file beyond 64 KiB: the real write fails half-way, as on a full disk."""
    path = tmp_path / "model"
    save_checkpoint(path, example(), {})
    program = ("import sys, numpy\n"
               "from graphflow.compiler.plan.errors import CheckpointError\n"
               "from graphflow.runtime.checkpoint import save_checkpoint\n"
               "try: save_checkpoint(sys.argv[1], {'x': numpy.ones(100_000)}, {})\n"
               "except CheckpointError as error: print(error)\n"
               "else: print('it was written')\n")
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)))
    assert os.strerror(errno.EFBIG) in done.stdout and "unchanged" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert_same(load_checkpoint(path)[0], example())


@pytest.mark.parametrize("place, reason", [("missing/model", errno.ENOENT), ("", errno.EISDIR)])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str, reason: int) -> None:
    with pytest.raises(CheckpointError, match=os.strerror(reason)):
        save_checkpoint(tmp_path / place, example(), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, array", [
    ("complex", np.zeros(3, complex)), ("text", np.array(["a"])),
    ("objects", np.array([None])), ("record", np.zeros(2, "i4,f4")), ("short", np.zeros(2, np.int16))])
def test_dtypes_that_no_checkpoint_holds(tmp_path: Path, name: str, array: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is") as caught:
        save_checkpoint(tmp_path / "a", {name: array}, {})
    assert caught.value.hint and all(dtype in caught.value.hint for dtype in DTYPES)
    assert list(tmp_path.iterdir()) == []


def test_names_and_metadata_are_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        save_checkpoint(tmp_path / "a", {"__metadata__": np.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="'step' has 3"):
        save_checkpoint(tmp_path / "a", {}, {"step": 3})  # type: ignore[dict-item]


def encode(header: object, content: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8,
          ) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED = {
    "empty": b"",
    "no header": b"\1\0\0",
    "header longer than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "header of no JSON": encode(b"{'x': 1}", b""),
    "header of no UTF-8": encode(b'{"\xff": 1}', b""),
    "header of a list": encode([], b""),
    "deep header": encode(b"[" * 100_000, b""),
    "cut content": encode({"x": entry()}, bytes(7)),
    "content beyond": encode({"x": entry()}, bytes(9)),
    "offsets beyond": encode({"x": entry(end=1 << 40)}, bytes(8)),
    "offsets backwards": encode({"x": entry(begin=8, end=0)}, bytes(8)),
    "offsets negative": encode({"x": entry(begin=-8, end=0)}, bytes(8)),
    "shape of other size": encode({"x": entry(shape=(3,))}, bytes(8)),
    "shape overflows": encode({"x": entry(shape=(1 << 62, 1 << 62))}, bytes(8)),
    "overlap": encode({"x": entry(), "y": entry()}, bytes(8)),
    "hole": encode({"x": entry(), "y": entry(begin=12, end=20)}, bytes(20)),
    "unknown dtype": encode({"x": entry(dtype="F31")}, bytes(8)),
    "metadata of no text": encode({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole checkpoint: .") as caught:
        load_checkpoint(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("dtype, size", [("F8_E5M2", 1), ("I16", 2), ("U64", 8)])
def test_dtypes_of_others_are_refused_by_name(tmp_path: Path, dtype: str, size: int) -> None:
    (tmp_path / "a").write_bytes(encode({"w": entry(dtype, (4,), 0, 4 * size)}, bytes(4 * size)))
    with pytest.raises(CheckpointError, match=f"tensor 'w' has dtype {dtype}"):
        load_checkpoint(tmp_path / "a")


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load_checkpoint(path)


def test_every_cut_and_damaged_headers_end_in_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_checkpoint(path, example(), {"step": "1"})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole) // 2)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100
