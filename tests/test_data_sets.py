"""Data sets: arrays in memory and in files, splits, statistics, text, sequences, folders of images."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import graphflow as gf
from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data import (
    Arrays,
    Characters,
    Dataset,
    ImageFolder,
    Minibatches,
    Sequences,
    Subset,
    TextWindows,
    mean_std,
    pad,
    read_image,
    read_text,
    split,
)

RNG = np.random.default_rng(5)


# --- arrays

def test_arrays_and_subsets() -> None:
    x, y = RNG.random((10, 3)), np.arange(10)
    data = Arrays({"x": x, "y": y})
    assert isinstance(data, Dataset) and not isinstance(x, Dataset) and len(data) == 10
    part = Subset(Subset(data, [7, 3, 3, 9]), [3, 0])
    batch = part.take_rows(np.array([1, 0, 0]))
    np.testing.assert_array_equal(batch["x"], x[[7, 9, 9]])
    assert batch["y"].tolist() == [7, 9, 9] and len(part) == 2
    for rows, message in (([10], "rows 10 to 10"), ([-1], "rows -1 to -1"), ([], "list of row numbers")):
        with pytest.raises(UseError, match=message):
            Subset(data, rows)


def test_a_mapped_file_is_read_batch_by_batch(tmp_path: Path) -> None:
    x = RNG.random((50, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = Arrays({"x": mapped})
    assert not data.in_memory and Arrays({"x": x}).in_memory and np.shares_memory(data.arrays["x"], mapped)
    seen = np.concatenate([batch["x"].copy() for batch in Minibatches(data, 7)])
    np.testing.assert_array_equal(seen, x[Minibatches(data, 7).order(0)])
    given = gf.input("x", (gf.dim("N"), 3))
    model = gf.Model(given, gf.sum(given, 1), device="reference")
    np.testing.assert_allclose(model.predict(mapped, 8), x.sum(1), rtol=1e-6)
    broken = np.memmap(tmp_path / "y", np.float32, "w+", shape=(50, 3))
    broken[40, 2] = np.nan
    with pytest.raises(gf.FeedError, match=r"feed 'x': nan at \[0, 2\]"):
        model.predict(broken, 8)


# --- splits and statistics

def test_split_cuts_every_kind_of_data_in_the_same_order() -> None:
    x, y = np.arange(100) * 2.0, np.arange(100)
    by_name = split({"x": x, "y": y}, (0.7, 0.2, 0.1), seed=3)
    by_place = split((x, y), (0.7, 0.2, 0.1), seed=3)
    alone = split(y, (0.7, 0.2, 0.1), seed=3)
    sets = split(Arrays({"x": x, "y": y}), (0.7, 0.2, 0.1), seed=3)
    for named, placed, one, part, size in zip(by_name, by_place, alone, sets, (70, 20, 10)):
        assert len(named["y"]) == len(part) == size
        np.testing.assert_array_equal(named["x"], named["y"] * 2)
        for other in (placed[1], one, part.take_rows(np.arange(size))["y"]):
            np.testing.assert_array_equal(other, named["y"])
        np.testing.assert_array_equal(placed[0], named["x"])
    assert sorted(np.concatenate(alone)) == list(range(100))
    assert split(y, (0.5, 0.5), seed=1)[0].tolist() != split(y, (0.5, 0.5), seed=2)[0].tolist()
    assert abs(split(np.arange(10000), (0.5, 0.5))[0].mean() - 5000) < 150


@pytest.mark.parametrize("parts, message", [((0.9, 0.2), "at most 1"), ((), "positive"), ((1, 0), "positive"),
                                            ((0.98, 0.02), "10 rows are too few")])
def test_shares_that_make_no_split(parts: tuple[float, ...], message: str) -> None:
    with pytest.raises(UseError, match=message):
        split(np.zeros(10), parts)


@pytest.mark.parametrize("rows", [1, 5, 1024, 2500])
def test_mean_and_deviation_are_those_of_numpy(rows: int) -> None:
    images = (RNG.random((rows, 3, 4, 5)) * 10 + 1e4).astype(np.float32)
    wide = images.astype(np.float64)
    for axes in ((0, 2, 3), (0,)):
        expected = wide.mean(axes, keepdims=True)[0], wide.std(axes, keepdims=True)[0]
        for data, name in ((images, None), (Arrays({"x": images}), "x")):
            mean, std = mean_std(data, axes, name)
            assert mean.dtype == std.dtype == np.float32 and mean.shape == expected[0].shape
            np.testing.assert_allclose(mean, expected[0], rtol=1e-6)
            np.testing.assert_allclose(std, np.where(expected[1] == 0, 1, expected[1]), rtol=1e-6)


def test_statistics_of_what_there_is() -> None:
    np.testing.assert_array_equal(mean_std(np.full((4, 2), 3.0), (0,))[1], [1, 1])
    with pytest.raises(UseError, match="along axis 0"):
        mean_std(np.zeros((3, 2)), (1,))
    with pytest.raises(UseError, match="not all among those"):
        mean_std(np.zeros((3, 2)))
    with pytest.raises(UseError, match="need the name"):
        mean_std(Arrays({"x": np.zeros((3, 2))}))
    with pytest.raises(UseError, match="no array 'z', but 'x'"):
        mean_std(Arrays({"x": np.zeros((3, 2))}), (0,), "z")


# --- text

def test_characters_become_numbers_and_text_again() -> None:
    text = "to be, or not to be: ünïcödé 🎈\n" * 3
    known = Characters(text)
    ids = known.encode(text)
    assert known.characters == "".join(sorted(set(text))) and len(known) == len(set(text))
    assert ids.dtype == np.int64 and ids.tolist() == [known.characters.index(c) for c in text]
    assert known.decode(ids) == text and known.encode("").shape == (0,)
    with pytest.raises(DataError, match="character 3 of the text, 'x', is not among"):
        known.encode("to x")
    with pytest.raises(DataError, match="numbers from 0 to 99"):
        known.decode([0, 99])
    with pytest.raises(DataError, match="empty"):
        Characters("")


@pytest.mark.parametrize("length, batch, steps", [(100, 4, 5), (97, 3, 8), (9, 1, 8), (50, 5, 9)])
def test_windows_go_on_where_the_last_ended(length: int, batch: int, steps: int) -> None:
    ids = RNG.integers(0, 50, length)
    windows = TextWindows(ids, batch, steps, start="fresh")
    batches = list(windows.batches(0))
    assert len(batches) == len(windows) == (length - 1) // batch // steps
    span = (length - 1) // batch
    for row in range(batch):
        x, y = (np.concatenate([b[name][row] for b in batches]) for name in "xy")
        np.testing.assert_array_equal(x, ids[row * span:row * span + len(x)])
        np.testing.assert_array_equal(y, ids[row * span + 1:row * span + 1 + len(x)])
    assert [b["fresh"].tolist() for b in batches] == [[i == 0] * batch for i in range(len(batches))]
    for start in range(len(windows) + 1):
        for got, expected in zip(windows.batches(3, start), batches[start:], strict=True):
            np.testing.assert_array_equal(got["x"], expected["x"])


def test_texts_that_make_no_windows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8 characters are too few for 1 texts of 9"):
        TextWindows(np.arange(8), 1, 8)
    with pytest.raises(DataError, match="a row of integers, not float64"):
        TextWindows(np.zeros(9), 1, 8)
    with pytest.raises(UseError, match="steps is 0"):
        TextWindows(np.arange(8), 1, 0)
    (tmp_path / "a").write_bytes("a\r\né".encode())
    assert read_text(tmp_path / "a") == "a\r\né"
    (tmp_path / "b").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="b: byte 3 is not text"):
        read_text(tmp_path / "b")
    with pytest.raises(DataError, match="No such file"):
        read_text(tmp_path / "c")


# --- sequences

ROWS = [RNG.random((steps, 2)).astype(np.float32) for steps in RNG.integers(1, 20, 60)]
TAGS = [RNG.integers(1, 9, len(row)) for row in ROWS]


def test_padding() -> None:
    padded, mask = pad([[1, 2], [], [3]], value=-1)
    assert padded.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert pad([[1]], 4)[0].tolist() == [[1, 0, 0, 0]]
    for sequences, length in (([[1, 2, 3]], 2), ([np.zeros((2, 2)), np.zeros((2, 3))], None)):
        with pytest.raises(DataError, match="does not fit"):
            pad(sequences, length)
    for sequences in ([], [1, 2]):
        with pytest.raises(DataError, match="at least one axis"):
            pad(sequences)


@pytest.mark.parametrize("multiple", [1, 8])
def test_sequences_are_padded_to_the_longest_of_their_batch(multiple: int) -> None:
    data = Sequences({"x": ROWS, "tags": TAGS, "y": np.arange(60)}, multiple=multiple, value={"tags": -1})
    seen = []
    for batch in Minibatches(data, 7, seed=1):
        longest = max(len(ROWS[i]) for i in batch["y"])
        assert batch["x"].shape[1] == -(-longest // multiple) * multiple
        for i, x, tags, mask in zip(batch["y"], batch["x"], batch["tags"], batch["mask"]):
            np.testing.assert_array_equal(x[mask], ROWS[i])
            np.testing.assert_array_equal(tags[mask], TAGS[i])
            assert not x[~mask].any() and (tags[~mask] == -1).all() and mask[:len(ROWS[i])].all()
            seen.append(i)
    assert sorted(seen) == list(range(60))


def test_buckets_hold_rows_of_about_one_length() -> None:
    data = Sequences({"x": ROWS, "y": np.arange(60)})
    plain = Minibatches(data, 8, seed=1)
    bucketed = Minibatches(data, 8, seed=1, lengths=data.lengths)

    def wasted(batches: Minibatches) -> int:
        return sum(int((~batch["mask"]).sum()) for batch in batches.batches(0))

    assert wasted(bucketed) < wasted(plain) / 3
    orders = [bucketed.order(epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1] and all(sorted(order) == list(range(60)) for order in orders)
    firsts = [data.lengths[order[:8]].mean() for order in orders]
    assert firsts[0] != firsts[1], "the shortest come first in every epoch"
    with pytest.raises(DataError, match=r"60 rows, and lengths of shape \[9\]"):
        Minibatches(data, 8, lengths=np.zeros(9))


@pytest.mark.parametrize("data, options, message", [
    ({"x": [[1, 2], [3]], "m": [[1, 1], [1, 1]]}, {}, "row 1: 'm' has 2 steps, 'x' has 1"),
    ({"x": [[1, 2], [3]], "y": [1, 2, 3]}, {}, "different numbers of rows: 'x' 2, 'y' 3"),
    ({"x": [np.zeros((2, 3)), np.zeros((2, 4))]}, {}, r"row 1 of 'x' is \[2, 4\], the first \[2, 3\]"),
    ({"y": np.zeros(3)}, {}, "none of the data is a list of sequences"),
    ({"x": [[1], [2]], "mask": [[1], [1]]}, {}, "'mask' is the name of the mask that is made"),
    ({"x": [[1], [2]]}, {"multiple": 0}, "multiple is 0")])
def test_what_makes_no_sequences(data: dict[str, object], options: dict[str, int], message: str) -> None:
    with pytest.raises((DataError, UseError), match=message):
        Sequences(data, **options)  # type: ignore[arg-type]


# --- folders of images

@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of lossless images, 6 high and 8 wide, in grey, in colour, and with a palette."""
    image = pytest.importorskip("PIL.Image")
    for name, mode, count in (("ash", "L", 2), ("birch", "RGB", 3), ("cedar", "P", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = RNG.integers(0, 256, (6, 8, 3) if mode == "RGB" else (6, 8)).astype(np.uint8)
            made = image.fromarray(pixels) if mode != "P" else image.fromarray(pixels).convert("P")
            made.save(tmp_path / name / f"{number}.png")
    (tmp_path / "ash" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_folder_of_images(folder: Path, channels: int, mode: str) -> None:
    from PIL import Image
    data = ImageFolder(folder, channels=channels)
    assert data.classes == ["ash", "birch", "cedar"] and len(data) == 6
    batch = data.take_rows(np.array([4, 0, 5]))
    assert batch["y"].tolist() == [1, 0, 2] and batch["y"].dtype == np.int64
    assert batch["x"].shape == (3, channels, 6, 8) and batch["x"].dtype == np.float32
    for path, pixels in zip(("birch/2.png", "ash/0.png", "cedar/0.png"), batch["x"]):
        expected = np.asarray(Image.open(folder / path).convert(mode)).reshape(6, 8, channels)
        np.testing.assert_allclose(pixels.transpose(1, 2, 0), expected / 255, rtol=1e-6)
    small = ImageFolder(folder, (3, 5), image="pixels", label="tree").take_rows(np.arange(6))
    assert small["pixels"].shape == (6, 3, 3, 5) and small["tree"].tolist() == [0, 0, 1, 1, 1, 2]


def test_grey_levels_of_16_bits(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    levels = RNG.integers(0, 1 << 16, (4, 5)).astype(np.uint16)
    image.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", channels=1), levels >> 8)


def test_folders_that_hold_no_data_set(folder: Path, tmp_path: Path) -> None:
    from PIL import Image
    with pytest.raises(DataError, match="no such folder"):
        ImageFolder(folder / "nothing")
    with pytest.raises(DataError, match="ash: no folders in it"):
        ImageFolder(folder / "ash")
    for options, message in (({"channels": 2}, "channels is 2"), ({"size": (0, 4)}, "size is"),
                             ({"size": (4,)}, "size is")):
        with pytest.raises(UseError, match=message):
            ImageFolder(folder, **options)  # type: ignore[arg-type]
    Image.new("RGB", (9, 9)).save(folder / "ash" / "2.png")
    with pytest.raises(DataError, match=r"ash/2.png is \[9, 9\], .*ash/0.png \[6, 8\]"):
        ImageFolder(folder).take_rows(np.arange(3))
    whole = (folder / "birch" / "0.png").read_bytes()
    for content in (b"", b"no image at all", whole[:len(whole) // 2]):
        (folder / "birch" / "0.png").write_bytes(content)
        with pytest.raises(DataError, match="birch/0.png: not a readable image: ."):
            ImageFolder(folder).take_rows(np.array([3]))
    (folder / "dogwood").mkdir()
    with pytest.raises(DataError, match="dogwood: no images in this class"):
        ImageFolder(folder)


def test_pillow_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UseError, match="needs Pillow") as caught:
        ImageFolder(tmp_path)
    assert caught.value.hint == "pip install 'graphflow[images]'"
