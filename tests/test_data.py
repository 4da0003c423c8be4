"""Data files come back as NumPy wrote them; malformed ones are refused by name and place; batches repeat."""
from __future__ import annotations

import gzip
import io
import random
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data import Minibatches, load_csv, load_idx, load_idx_folder, load_npz

DIGITS = Path(__file__).parents[1] / "examples" / "data" / "digits.csv.gz"
IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encode_idx(array: np.ndarray) -> bytes:
    code = IDX_CODES[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path: Path, content: bytes, zipped: bool = False) -> Path:
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


# --- IDX

@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dtype", IDX_CODES)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0, 28, 28), (1,)])
def test_idx_round_trip(tmp_path: Path, dtype: str, shape: tuple[int, ...], zipped: bool) -> None:
    array = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    got = load_idx(write(tmp_path / "a", encode_idx(array), zipped))
    assert got.dtype == np.dtype(dtype) and got.dtype.isnative and got.flags.writeable
    np.testing.assert_array_equal(got, array)


WHOLE = encode_idx(np.arange(24, dtype="u1").reshape(2, 3, 4))
BAD_IDX = {
    "empty": (b"", "cut short: an IDX file begins with 4 bytes, this has 0"),
    "three bytes": (WHOLE[:3], "this has 3"),
    "wrong magic": (b"\x89PNG" + WHOLE[4:], "not an IDX file: it begins with 89 50 4e 47"),
    "unknown type": (b"\0\0\x0a\1" + WHOLE[4:], "not an IDX file"),
    "no axes": (b"\0\0\x08\0", "0 axes"),
    "too many axes": (b"\0\0\x08\xff" + bytes(2000), "255 axes"),
    "cut header": (WHOLE[:13], "header of 3 axes has 16 bytes, the file 13"),
    "cut content": (WHOLE[:-1], r"shape \[2, 3, 4\] of uint8 takes 24 bytes, the file has 23"),
    "trailing bytes": (WHOLE + b"\0", "bytes follow the 24"),
    "absurd sizes": (b"\0\0\x0e\3" + b"\xff" * 12 + bytes(100),
                     f"takes {8 * (2**32 - 1)**3} bytes, the file has 100"),
    "absurd sizes and a zero": (b"\0\0\x08\4" + bytes(4) + b"\xff" * 12, "impossible shape"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("content, message", BAD_IDX.values(), ids=BAD_IDX.keys())
def test_malformed_idx(tmp_path: Path, content: bytes, message: str, zipped: bool) -> None:
    path = write(tmp_path / "a", content, zipped)
    with pytest.raises(DataError, match=message) as caught:
        load_idx(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_a_size_is_not_believed_before_the_bytes_are_there(tmp_path: Path) -> None:
    """A 1 KiB file that states 3 GiB is refused by a process that may have 1 GiB in all."""
    for name, content in (("plain", b"\0\0\x08\1\xc0\0\0\0" + bytes(1000)), ("npz", stating_npz((3 << 30,)))):
        path = write(tmp_path / name, content)
        program = ("import sys\nfrom graphflow.compiler.plan.errors import DataError\n"
                   "from graphflow.data import load_idx, load_npz\n"
                   "try: (load_npz if sys.argv[1].endswith('npz') else load_idx)(sys.argv[1])\n"
                   "except DataError as error: print(error)\n")
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30)))
        assert "takes 3221225472 bytes, the file has 1000" in done.stdout, done.stderr


@pytest.mark.parametrize("damage", ["cut", "checksum", "body"])
@pytest.mark.parametrize("loader", [load_idx, load_csv])
def test_a_damaged_gzip_file(tmp_path: Path, loader: object, damage: str) -> None:
    plain = WHOLE if loader is load_idx else b"1,2\n3,4\n"
    content = bytearray(gzip.compress(plain))
    if damage == "cut":
        del content[-12:]
    else:
        content[-6 if damage == "checksum" else 12] ^= 0xFF
    path = write(tmp_path / "a.gz", bytes(content))
    with pytest.raises(DataError, match="a.gz"):
        loader(path)  # type: ignore[operator]


@pytest.mark.parametrize("loader", [load_idx, load_npz, load_csv, load_idx_folder])
def test_files_that_cannot_be_opened(tmp_path: Path, loader: object) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="No such file|Is a directory|no file train-images"):
            loader(path)  # type: ignore[operator]


def write_mnist(folder: Path, mark: str = "-", zipped: bool = False, labels: int = 6,
                ) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, stem, count in (("train", "train", 6), ("test", "t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28)).astype("u1")
        numbers = rng.integers(0, 10, labels if part == "train" else count).astype("u1")
        for array, kind in ((images, "images"), (numbers, "labels")):
            name = f"{stem}-{kind}{mark}idx{array.ndim}-ubyte" + ".gz" * zipped
            write(folder / name, encode_idx(array), zipped)
            arrays[f"{part}_{kind}"] = array
    return arrays


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_laid_out_as_mnist(tmp_path: Path, mark: str, zipped: bool) -> None:
    expected = write_mnist(tmp_path, mark, zipped)
    got = load_idx_folder(tmp_path)
    assert got.keys() == expected.keys() == {"train_images", "train_labels", "test_images", "test_labels"}
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_a_folder_that_is_not_laid_out_as_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no file t10k-labels-idx1-ubyte") as caught:
        load_idx_folder(tmp_path)
    assert "t10k-labels.idx1-ubyte.gz" in (caught.value.hint or "")
    write_mnist(tmp_path, labels=5)
    with pytest.raises(DataError, match="train images and labels do not fit") as caught:
        load_idx_folder(tmp_path)
    assert caught.value.shapes == ((6, 28, 28), (5,))


# --- NPZ

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_round_trip(tmp_path: Path, save: object) -> None:
    arrays = {"x": np.random.default_rng(0).random((3, 4)).astype("f4"), "fortran": np.eye(3, 5).T,
              "big": np.arange(4, dtype=">i8"), "scalar": np.array(3), "empty": np.zeros((0, 2)),
              "text": np.array(["cat", "dog"]), "flags": np.array([True, False])}
    save(tmp_path / "a.npz", **arrays)  # type: ignore[operator]
    got = load_npz(tmp_path / "a.npz")
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype.newbyteorder("=") and got[name].shape == array.shape
        assert got[name].flags.c_contiguous and got[name].flags.writeable
        np.testing.assert_array_equal(got[name], array)


def encode_npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name + ".npy", content)
    return file.getvalue()


def encode_npy(header: str, content: bytes, version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + content


def stating_npz(shape: tuple[int, ...], descr: str = "|u1", content: bytes = bytes(1000)) -> bytes:
    return encode_npz(x=encode_npy(str({"descr": descr, "fortran_order": False, "shape": shape}), content))


def pickle_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.array([{"a": 1}, None], dtype=object))
    return file.getvalue()


BAD_NPZ = {
    "empty": (b"", "not a readable .npz file"),
    "no zip": (b"\x93NUMPY\1\0", "not a readable .npz file"),
    "cut zip": (stating_npz((1000,))[:-40], "not a readable .npz file"),
    "damaged member": (stating_npz((1000,)).replace(bytes(1000), b"\1" + bytes(999)), "Bad CRC-32"),
    "pickles": (pickle_npz(), "array 'x' holds Python objects"),
    "cut": (stating_npz((1001,)), r"array 'x': shape \[1001\] of uint8 takes 1001 bytes, the file has 1000"),
    "trailing bytes": (stating_npz((999,)), "takes 999 bytes, the file has more"),
    "absurd sizes": (stating_npz((1 << 62, 1 << 62)), "the file has 1000"),
    "absurd sizes and a zero": (stating_npz((0, 1 << 62, 1 << 62), content=b""), "impossible shape"),
    "negative size": (stating_npz((-1000,)), "negative size"),
    "no bytes an element": (stating_npz((5,), "|V0", b""), "impossible shape"),
    "unknown dtype": (stating_npz((5,), "float99"), "array 'x': descr is not a valid dtype"),
    "header of no literal": (encode_npz(x=encode_npy("__import__('os')", b"")), "array 'x': "),
    "header of another kind": (encode_npz(x=encode_npy("[1, 2]", b"")), "array 'x': "),
    "cut header": (encode_npz(x=b"\x93NUMPY\1\0\xff\0{'descr'"), "array 'x': "),
    "wrong magic": (encode_npz(x=b"no array in here"), "array 'x': .*magic"),
    "unknown version": (encode_npz(x=encode_npy("{}", b"", b"\7\0")), "format 7.0"),
}


@pytest.mark.parametrize("content, message", BAD_NPZ.values(), ids=BAD_NPZ.keys())
def test_malformed_npz(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "a.npz", content)
    with pytest.raises(DataError, match=message) as caught:
        load_npz(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_npz_members_that_are_no_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(DataError, match="'notes.txt' is not an array"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("loader", [load_idx, load_npz])
def test_random_damage_ends_in_a_data_error(tmp_path: Path, loader: object) -> None:
    file = io.BytesIO()
    np.savez(file, x=np.arange(6.0).reshape(2, 3), y=np.arange(3))
    whole = WHOLE if loader is load_idx else file.getvalue()
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] = generator.randrange(256)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(damaged)):]
        try:
            loader(write(tmp_path / "a", bytes(damaged)))  # type: ignore[operator]
        except DataError:
            refused += 1
    assert refused > 100


# --- CSV

@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dtype, form", [("float32", "%.9g"), ("float64", "%.17g"), ("int64", "%d"),
                                         ("uint8", "%d")])
def test_csv_round_trip(tmp_path: Path, dtype: str, form: str, zipped: bool) -> None:
    array = (np.random.default_rng(0).random((5, 3)) * 200).astype(dtype)
    file = io.BytesIO()
    np.savetxt(file, array, fmt=form, delimiter=",")
    got = load_csv(write(tmp_path / "a.csv", file.getvalue(), zipped), dtype=dtype)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("text, options", [
    ("a,b\n1,2\n3,4\n", {"header": True}), ("1;2\r\n3;4", {"delimiter": ";"}),
    ("\ufeff1,2\n\n 3 ,\"4\"\n\n", {}),
    ("1\t2\n3\t4\n", {"delimiter": "\t", "dtype": np.int32})])
def test_csv_forms(tmp_path: Path, text: str, options: dict[str, object]) -> None:
    got = load_csv(write(tmp_path / "a.csv", text.encode()), **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, [[1, 2], [3, 4]])


BAD_CSV: dict[str, tuple[bytes, dict[str, object], str]] = {
    "empty": (b"", {}, "no rows"),
    "header only": (b"a,b\n", {"header": True}, "no rows"),
    "text": (b"1,2\n3,cat\n", {}, "row 2, column 2: 'cat' is not a number that float32 holds"),
    "empty cell": (b"1,2\n,4\n", {}, "row 2, column 1: ''"),
    "underscore": (b"1_0\n", {}, "row 1, column 1: '1_0'"),
    "fraction": (b"1\n\n2.5\n", {"dtype": np.int32}, "row 3, column 1: '2.5' is not a number that int32"),
    "too large for int": (b"1,300\n", {"dtype": np.uint8}, "column 2: '300' is not a number that uint8"),
    "too large for float": (b"1e39\n", {}, "column 1: '1e39' is not a number that float32"),
    "negative": (b"-1\n", {"dtype": np.uint8}, "column 1: '-1'"),
    "long cell": (b"x" * 500 + b"\n", {}, r"'x{37}\.\.\.'"),
    "short row": (b"1,2\n3\n", {}, "row 2 has 1 columns, the rows before it have 2"),
    "long row": (b"1,2\n3,4,\n", {}, "row 2 has 3 columns"),
    "no UTF-8": (b"1,2\n3,\xff\n", {}, "row 2: not text in UTF-8"),
    "open quote": (b"1,2\n3,\"4\n", {}, "row 2: "),
    "zero byte": (b"1,2\n3,\0\n", {}, "row 2"),
    "endless cell": (b"1" * 200_000, {}, "row 1: field larger than"),
}


@pytest.mark.parametrize("content, options, message", BAD_CSV.values(), ids=BAD_CSV.keys())
def test_malformed_csv(tmp_path: Path, content: bytes, options: dict[str, object], message: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError, match=message) as caught:
        load_csv(path, **options)  # type: ignore[arg-type]
    assert caught.value.message.startswith(f"{path}: ")


def test_csv_hints_and_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"height,width\n1,2\n")
    with pytest.raises(DataError) as caught:
        load_csv(path)
    assert "header=True" in (caught.value.hint or "")
    with pytest.raises(UseError, match="not as bool"):
        load_csv(path, dtype=bool)
    with pytest.raises(UseError, match="delimiter"):
        load_csv(path, delimiter="ab")
    path = write(tmp_path / "b.csv", b"nan,inf,-inf,1e-50\n")
    np.testing.assert_array_equal(load_csv(path), np.array([[np.nan, np.inf, -np.inf, 0]], np.float32))


def test_the_digits() -> None:
    table = load_csv(DIGITS, dtype=np.uint8)
    assert table.shape == (1797, 65) and table[:, :64].max() == 16
    # The number of images of each digit, as the data set's publishers state it.
    assert np.bincount(table[:, 64]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(table, np.loadtxt(DIGITS, delimiter=",", dtype=np.uint8))


# --- minibatches

def table(rows: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).random((rows, 3, 2)), "y": np.arange(rows)}


def epoch_of(batches: Minibatches) -> dict[str, np.ndarray]:
    seen = [{name: array.copy() for name, array in batch.items()} for batch in batches]
    return {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}


@pytest.mark.parametrize("rows, size", [(10, 3), (9, 3), (1, 1), (5, 8), (64, 1)])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_visits_every_row_once(rows: int, size: int, shuffle: bool, drop_last: bool) -> None:
    arrays = table(rows)
    if drop_last and size > rows:
        with pytest.raises(UseError, match="drop_last leaves no batch"):
            Minibatches(arrays, size, drop_last=True)
        return
    batches = Minibatches(arrays, size, shuffle=shuffle, drop_last=drop_last)
    lengths = [len(batch["x"]) for batch in batches]
    expected = [len(part) for part in np.split(np.arange(rows), range(size, rows, size))]
    assert lengths == (expected[:rows // size] if drop_last else expected)
    assert len(batches) == len(lengths)
    epoch = epoch_of(batches)
    np.testing.assert_array_equal(epoch["x"], arrays["x"][epoch["y"]])
    assert len(set(epoch["y"])) == sum(lengths)
    assert shuffle or epoch["y"].tolist() == list(range(sum(lengths)))


def test_batches_are_contiguous_and_reuse_their_memory() -> None:
    arrays = {"x": np.asfortranarray(np.random.default_rng(0).random((10, 4))), "y": [1, 2] * 5}
    addresses = set()
    for batch in Minibatches(arrays, 4):
        assert all(array.flags.c_contiguous for array in batch.values())
        addresses.add(batch["x"].__array_interface__["data"][0])
    assert len(addresses) == 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, same, other = (Minibatches(table(50), 7, seed=seed) for seed in (1, 1, 2))
    orders = [epoch_of(first)["y"].tolist() for _ in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [epoch_of(same)["y"].tolist() for _ in range(3)] == orders
    assert epoch_of(other)["y"].tolist() not in orders
    first.epoch = 1
    assert epoch_of(first)["y"].tolist() == orders[1]
    assert first.order(2).tolist() == orders[2]
    different_size = Minibatches({"y": np.arange(50)}, 50, seed=1)
    assert epoch_of(different_size)["y"].tolist() == orders[0]


def test_the_order_is_uniform() -> None:
    """Every row is as often first as every other: chi-square with 9 degrees of freedom, p about 1e-6."""
    batches = Minibatches({"y": np.arange(10)}, 10)
    counts = np.bincount([batches.order(epoch)[0] for epoch in range(2000)], minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 45


@pytest.mark.parametrize("arrays, message", [
    ({}, "no arrays"),
    ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "different numbers of rows: 'x' 3, 'y' 4"),
    ({"x": np.zeros((0, 2))}, "no rows"),
    ({"x": 3.0}, "'x' is a scalar"),
    ({"x": np.array([None, 1])}, "'x' holds Python objects"),
    ({"x": [[1, 2], [3]]}, "'x' makes no array|'x' holds Python objects"),
])
def test_arrays_that_make_no_minibatches(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Minibatches(arrays, 2)


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 0}, "batch_size is 0; it must be an integer of 1 or more"),
    ({"batch_size": -1}, "batch_size is -1"),
    ({"batch_size": 2.5}, "batch_size is 2.5"),
    ({"batch_size": 2, "seed": -1}, "seed is -1; it must be an integer of 0 or more"),
])
def test_wrong_numbers(options: dict[str, int], message: str) -> None:
    with pytest.raises(UseError, match=message):
        Minibatches(table(4), **options)  # type: ignore[arg-type]
