"""Arrays from files: IDX, NPZ and CSV, plain or gzipped.

A file is untrusted: every size it states is checked against the bytes it has before anything is allocated,
nothing in it is executed, and what is wrong is said with the file's name and the place in it.
"""
from __future__ import annotations

import csv
import gzip
import math
import os
import struct
import zipfile
import zlib
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import DTypeLike

from graphflow.compiler.plan.errors import DataError, UseError

PathLike = str | os.PathLike[str]

_IDX_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"), 0x09: np.dtype(">i1"), 0x0B: np.dtype(">i2"), 0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"), 0x0E: np.dtype(">f8")}
_IDX_STEMS = {"train_images": "train-images", "train_labels": "train-labels",
              "test_images": "t10k-images", "test_labels": "t10k-labels"}
_GZIP_MAGIC = b"\x1f\x8b"
_READ_BLOCK = 1 << 20


def _open(path: PathLike) -> IO[bytes]:
    """Open for reading, through gzip if the file begins as one (whatever its name says)."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be opened: {error.strerror}") from error
    try:
        magic = file.read(2)
        file.seek(0)
    except OSError as error:
        file.close()
        raise DataError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    if magic != _GZIP_MAGIC:
        return file
    file.close()
    return cast(IO[bytes], gzip.open(path, "rb"))


def _read_exactly(file: IO[bytes], size: int) -> bytearray:
    """Up to `size` bytes, in blocks: a false size costs no more memory than the file has bytes."""
    content = bytearray()
    while len(content) < size:
        block = file.read(min(_READ_BLOCK, size - len(content)))
        if not block:
            break
        content += block
    return content


def load_idx(path: PathLike) -> np.ndarray:
    """The array in an IDX file (the format of MNIST and Fashion-MNIST), plain or gzipped.

    Returns an array of the file's shape in native byte order: uint8, int8, int16, int32, float32 or
    float64. Raises `DataError` for a wrong magic number, an unknown type, a file that is cut short, and
    bytes after the end.
    """
    name = os.fspath(path)
    try:
        with _open(path) as file:
            return _parse_idx(name, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error


def _parse_idx(name: str, file: IO[bytes]) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4:
        raise DataError(f"{name}: cut short: an IDX file begins with 4 bytes, this has {len(head)}")
    dtype = _IDX_DTYPES.get(head[2])
    if head[:2] != b"\0\0" or dtype is None:
        raise DataError(f"{name}: not an IDX file: it begins with {head.hex(' ')}",
                        hint="an IDX file begins with two zero bytes and a type, 08, 09, 0b, 0c, 0d or 0e")
    rank = head[3]
    if not 1 <= rank <= 32:
        raise DataError(f"{name}: {rank} axes in the IDX header; 1 to 32 are possible")
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{name}: cut short: the IDX header of {rank} axes has {4 + 4 * rank} bytes, "
                        f"the file {4 + len(sizes)}")
    shape = struct.unpack(f">{rank}I", sizes)
    expected = math.prod(shape) * dtype.itemsize
    content = _read_exactly(file, expected)
    if len(content) < expected:
        raise DataError(f"{name}: cut short: shape {list(shape)} of {dtype.name} takes {expected} bytes, "
                        f"the file has {len(content)}")
    if file.read(1):
        raise DataError(f"{name}: bytes follow the {expected} that shape {list(shape)} of {dtype.name} takes")
    return _shape_array(name, content, shape, dtype)


def _shape_array(where: str, content: bytearray, shape: tuple[int, ...], dtype: np.dtype,
                 order: Literal["C", "F"] = "C") -> np.ndarray:
    """`content` as a writable C-contiguous array in native byte order."""
    try:
        array = np.frombuffer(content, dtype).reshape(shape, order=order)
    except ValueError as error:  # Sizes that are impossible even beside a 0; a dtype of 0 bytes.
        raise DataError(f"{where}: impossible shape {list(shape)} of {dtype}: {error}") from error
    return np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)


def load_idx_folder(path: PathLike) -> dict[str, np.ndarray]:
    """MNIST, Fashion-MNIST or any data set laid out like them, from a folder of four IDX files.

    The files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
    `t10k-labels-idx1-ubyte`, also with a dot before `idx` and also with `.gz`. Returns `train_images`,
    `train_labels`, `test_images` and `test_labels`; images are [count, rows, columns] and labels [count].
    """
    folder = os.fspath(path)
    arrays = {key: load_idx(_find_idx(folder, stem, 3 if "images" in key else 1))
              for key, stem in _IDX_STEMS.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{folder}: {part} images and labels do not fit: [count, rows, columns] and "
                            "[count] are needed", shapes=[images.shape, labels.shape])
    return arrays


def _find_idx(folder: str, stem: str, rank: int) -> str:
    names = [f"{stem}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise DataError(f"{folder}: no file {names[0]}", hint="the names looked for: " + ", ".join(names))


def load_npz(path: PathLike) -> dict[str, np.ndarray]:
    """Every array in a NumPy `.npz` file, by name. Arrays of Python objects are refused (no pickles).

    Raises `DataError` if the file is no zip of `.npy` members, is damaged, or states sizes that it has not.
    """
    name = os.fspath(path)
    try:
        with _open(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            return {member.filename.removesuffix(".npy"): _read_npy(name, archive, member)
                    for member in members}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{name}: not a readable .npz file: {error}") from error


def _read_npy(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    where = f"{name}: array '{member.filename.removesuffix('.npy')}'"
    if not member.filename.endswith(".npy"):
        raise DataError(f"{name}: '{member.filename}' is not an array",
                        hint="an .npz file holds .npy members only")
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise DataError(f"{where}: .npy format {version[0]}.{version[1]}; only 1.0 and 2.0 are read")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if dtype.hasobject:
            raise DataError(f"{where} holds Python objects, which could run code when read",
                            hint="save it again with a numeric dtype")
        if any(size < 0 for size in shape):
            raise DataError(f"{where}: a negative size in its shape {list(shape)}")
        expected = math.prod(shape) * dtype.itemsize
        content = _read_exactly(file, expected + 1)
    if len(content) != expected:
        has = len(content) if len(content) < expected else "more"
        raise DataError(f"{where}: shape {list(shape)} of {dtype.name} takes {expected} bytes, "
                        f"the file has {has}")
    return _shape_array(where, content, shape, dtype, "F" if fortran else "C")


def load_csv(path: PathLike, *, dtype: DTypeLike = np.float32, header: bool = False, delimiter: str = ",",
             ) -> np.ndarray:
    """The numbers of a CSV file, plain or gzipped, as an array [rows, columns] of `dtype`.

    `header=True` passes over the first row. Empty lines are passed over. Raises `DataError` naming the
    row and the column (both from 1, the row as a line of the file) for a cell that is no number or does
    not fit `dtype`, for rows of different lengths, and for a file without rows.
    """
    name = os.fspath(path)
    target = np.dtype(dtype)
    if target.kind not in "iuf":
        raise UseError(f"{name}: a CSV file is read as integers or floats, not as {target.name}")
    if len(delimiter) != 1:
        raise UseError(f"{name}: the delimiter is one character, not {delimiter!r}")
    rows: list[np.ndarray] = []
    try:
        with _open(path) as raw:
            text = (line.decode("utf-8-sig" if index == 0 else "utf-8") for index, line in enumerate(raw))
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for cells in reader:
                if header:
                    header = False
                elif cells:
                    if rows and len(rows[0]) != len(cells):
                        raise DataError(f"{name}: row {reader.line_num} has {len(cells)} columns, "
                                        f"the rows before it have {len(rows[0])}")
                    rows.append(_parse_row(name, reader.line_num, cells, target))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: row {reader.line_num + 1}: not text in UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise DataError(f"{name}: row {reader.line_num}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{name}: no rows")
    return np.stack(rows)


def _parse_row(name: str, row: int, cells: list[str], dtype: np.dtype) -> np.ndarray:
    """One row as `dtype`; only when that fails is the guilty cell looked for."""
    try:
        return _parse_cells(cells, dtype)
    except ValueError:
        for column, cell in enumerate(cells, 1):
            try:
                _parse_cells([cell], dtype)
            except ValueError as error:
                shown = cell if len(cell) <= 40 else cell[:37] + "..."
                raise DataError(f"{name}: row {row}, column {column}: {shown!r} is not a number that "
                                f"{dtype.name} holds", hint="header=True passes over a first row of names"
                                if row == 1 else None) from error
        raise


def _parse_cells(cells: list[str], dtype: np.dtype) -> np.ndarray:
    if any("_" in cell for cell in cells):  # Python reads 1_000 as a number; no CSV file means that.
        raise ValueError("an underscore in a number")
    if dtype.kind == "f":
        values = np.array(list(map(float, cells)))
        with np.errstate(over="ignore"):
            row = values.astype(dtype)
        if np.any(np.isinf(row) & np.isfinite(values)):
            raise ValueError("out of range")
        return row
    numbers = list(map(int, cells))
    if min(numbers) < np.iinfo(dtype).min or max(numbers) > np.iinfo(dtype).max:
        raise ValueError("out of range")
    return np.array(numbers, dtype)
