"""The Store: declarations, copies, checks, growth, checkpoints."""
from __future__ import annotations

import threading

import numpy as np
import pytest

from graphflow.compiler.plan.errors import CheckpointError, DTypeError, ShapeError, UseError
from graphflow.runtime.arena import address_of, aligned_bytes
from graphflow.runtime.checkpoint import save_checkpoint
from graphflow.runtime.store import SEED, STEP, Store


def normal(generator, shape, dtype):
    return generator.normal(size=shape)


def net(seed: int = 0, **more) -> Store:
    store = Store(seed)
    store.declare("w", "parameter", "float32", (3, 4), normal)
    store.declare("w/momentum", "slot", "float32", (3, 4))
    store.declare("mean", "statistic", "float64", (4,), 1.5)
    for name, shape in more.items():
        store.declare(name, "parameter", "float32", shape, normal)
    return store


def test_entries():
    store = net()
    assert store.names() == [SEED, STEP, "w", "w/momentum", "mean"]
    assert store.names("slot") == ["w/momentum"] and list(store) == store.names() and len(store) == 5
    assert "w" in store and "v" not in store
    assert store["w"].dtype == np.float32 and store["w"].shape == (3, 4)
    np.testing.assert_array_equal(store["mean"], np.full(4, 1.5))
    assert not store["w/momentum"].any() and store["w"].all()
    assert store[SEED] == 0 and store[STEP] == 0


def test_names_that_are_taken():
    store = Store()
    store.declare("net/dense.0.W", "parameter", "float32", (2,))
    assert all(map(store.taken, ("net/dense.0.W", "net/dense.0", "net/dense", "rng", "rng.seed")))
    assert not any(map(store.taken, ("net", "net/dens", "net/dense.0.W.momentum", "W", "")))


def test_reading_copies_and_writing_copies():
    store = net()
    before = store["w"]
    store["w"][...] = 7
    np.testing.assert_array_equal(store["w"], before)
    value = np.ones((3, 4), np.float32)
    store["w"] = value
    value[...] = 2
    np.testing.assert_array_equal(store["w"], np.ones((3, 4)))


def test_a_view_is_the_entry_itself():
    store = net()
    view = store.view("w")
    assert address_of(view) == store.address("w") and not view.flags.writeable
    store["w"] = np.ones((3, 4), np.float32)
    assert view.all()
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 2
    with pytest.raises(UseError, match="no entry 'v'"):
        store.view("v")


def test_initial_values_depend_on_seed_and_name_only():
    first, second = Store(5), Store(5)
    for name in ("a", "b", "c"):
        first.declare(name, "parameter", "f32", (4,), normal)
    for name in ("c", "a", "x", "b"):
        second.declare(name, "parameter", "f32", (4,), normal)
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(first[name], second[name])
    assert (first["a"] != first["b"]).any()
    other = Store(6)
    other.declare("a", "parameter", "f32", (4,), normal)
    assert (other["a"] != first["a"]).any()


def test_layout_in_memory():
    store = net(b=(), c=(0, 3), d=(5,))
    spans = []
    for name in store:
        address, entry = store.address(name), store.entry(name)
        assert address % 64 == 0
        spans.append((address, address + entry.bytes))
        view = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * entry.bytes).from_address(address)) \
            if entry.bytes else np.zeros(0, np.uint8)
        np.testing.assert_array_equal(view, np.frombuffer(store[name].tobytes(), np.uint8))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def test_reserved_room_is_used_without_moving():
    store = Store()
    store.declare("w", "parameter", "float32", (3,), np.float32([1, 2, 3]))
    version = store.version
    store.reserve([4000, 12])
    assert store.version > version
    before = store.address("w")
    store.declare("big", "parameter", "float32", (1000,), 5.0)
    store.declare("small", "parameter", "float32", (3,), 6.0)
    assert store.address("w") == before
    np.testing.assert_array_equal(store["w"], [1, 2, 3])
    assert (store["big"] == 5).all() and (store["small"] == 6).all()


def test_growth_keeps_values_and_changes_the_version():
    store = net()
    before, version = store["w"], store.version
    for i in range(300):
        store.declare(f"p{i}", "parameter", "f64", (i,), float(i))
    assert store.version > version
    np.testing.assert_array_equal(store["w"], before)
    for i in range(300):
        np.testing.assert_array_equal(store[f"p{i}"], np.full(i, float(i)))
    version = store.version
    store["p5"] = np.zeros(5)
    assert store.version == version


def test_declaring_again():
    store = net()
    store["w"] = np.ones((3, 4), np.float32)
    version = store.version
    store.declare("w", "parameter", "f32", (3, 4), normal)
    np.testing.assert_array_equal(store["w"], np.ones((3, 4)))
    assert store.version == version
    others = (("slot", "f32", (3, 4)), ("parameter", "f64", (3, 4)), ("parameter", "f32", (12,)))
    for role, dtype, shape in others:
        with pytest.raises(UseError, match=r"the Store has w as a parameter float32\[3, 4\], not as a"):
            store.declare("w", role, dtype, shape)


@pytest.mark.parametrize("value, error, message", [
    (np.ones((4, 3), np.float32), ShapeError, r"w takes an array of shape \[3, 4\], not \[4, 3\]"),
    (1.0, ShapeError, r"not \[\]"),
    (np.ones((3, 4), complex), DTypeError, "w takes float32, not complex128"),
    (np.full((3, 4), "a"), DTypeError, "w takes float32, not <U1"),
])
def test_wrong_values(value, error, message):
    store = net()
    before = store["w"]
    with pytest.raises(error, match=message):
        store["w"] = value
    np.testing.assert_array_equal(store["w"], before)


def test_integers_keep_their_value():
    store = Store()
    store.declare("n", "statistic", "u8", (2,))
    store["n"] = [3, 255]
    with pytest.raises(DTypeError, match="n takes uint8, and a value lies outside its range"):
        store["n"] = [3, 256]
    with pytest.raises(DTypeError, match="n takes uint8, not float64"):
        store["n"] = [3.5, 1.0]
    np.testing.assert_array_equal(store["n"], [3, 255])


def test_unknown_names_and_roles():
    store = net()
    with pytest.raises(UseError, match="no entry 'q'(?s:.)*it has: rng.seed, rng.step, w"):
        store["q"]
    with pytest.raises(UseError, match="no entry 'q'"):
        store["q"] = 1
    with pytest.raises(UseError, match="'gradient' is no role"):
        store.declare("g", "gradient", "f32", ())
    with pytest.raises(ShapeError, match="the initial value of b has the wrong shape"):
        store.declare("b", "parameter", "f32", (2,), np.zeros(3))
    assert "b" not in store
    for seed in (-1, 2 ** 32, 1.5, "x"):
        with pytest.raises(UseError, match="the seed is"):
            Store(seed)


def test_checkpoint(tmp_path):
    saved, loaded = net(3, b=(), c=(0, 3)), net(4, c=(0, 3), b=())
    saved[STEP] = 17
    saved.save(tmp_path / "net.ckpt", "cafe")
    report = loaded.load(tmp_path / "net.ckpt")
    assert report.loaded == loaded.names() and report.metadata["plan"] == "cafe"
    assert loaded.seed == 3
    for name in saved:
        np.testing.assert_array_equal(loaded[name], saved[name])
        assert loaded[name].dtype == saved[name].dtype


def test_checkpoint_of_another_net(tmp_path):
    net(1, a=(2,), b=(2,)).save(tmp_path / "net.ckpt")
    store = net(2, b=(3,), c=(1,))
    before = {name: store[name] for name in store}
    with pytest.raises(CheckpointError) as caught:
        store.load(tmp_path / "net.ckpt")
    text = str(caught.value)
    assert "c is missing" in text and "a is not of this net" in text
    assert "b is float32[2] in the file, float32[3] here" in text
    for name, value in before.items():
        np.testing.assert_array_equal(store[name], value)


def test_checkpoint_of_another_format(tmp_path):
    save_checkpoint(tmp_path / "a", {"w": np.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="checkpoint format 'unknown'"):
        net().load(tmp_path / "a")
    save_checkpoint(tmp_path / "b", {"w": np.zeros(3)}, {"format": "9"})
    with pytest.raises(CheckpointError, match="format '9'; this version reads format 1"):
        net().load(tmp_path / "b")


def test_lock_keeps_others_out():
    store, done = net(), threading.Event()
    with store.lock:
        other = threading.Thread(target=lambda: (store["w"], done.set()))
        other.start()
        assert not done.wait(0.05)
        store["w"]                                                # the holder itself may read
    assert done.wait(5)
    other.join()


def test_address_of():
    for array in (np.zeros(3), np.zeros((4, 5), np.uint8)[1:, 2:], np.zeros(()), aligned_bytes(100, "x")):
        assert address_of(array) == array.ctypes.data
    for size in (0, 1, 63, 64, 10 ** 6):
        block = aligned_bytes(size, "x")
        assert len(block) == size and (size == 0 or block.ctypes.data % 64 == 0) and not block.any()
