"""Batches made by worker threads: the same for any number of them, errors come out, no thread is left."""
from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator

import numpy as np
import pytest

import graphflow as gf
from graphflow.compiler.plan.errors import DataError, UseError
from graphflow.data import Arrays, Batches, Minibatches, Stream, TextWindows
from graphflow.data.augment import Flip, Noise, Shift
from graphflow.data.sets import Batch

IMAGES = np.random.default_rng(6).random((37, 2, 8, 8)).astype(np.float32)
DATA = {"x": IMAGES, "y": np.arange(37)}
CHAIN = {"x": [Shift(2), Flip(), Noise(0.1)]}


def made(batches: Batches, epoch: int = 0, start: int = 0) -> list[Batch]:
    return [{k: v.copy() for k, v in batch.items()} for batch in batches.batches(epoch, start)]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("graphflow-data")]


class Slow:
    """A data set whose rows take longer or shorter, and that notes how many are asked for at once."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.running, self.most, self.taken = fails_at, 0, 0, 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return 37

    def take_rows(self, rows: np.ndarray) -> Batch:
        with self.lock:
            self.running, self.taken = self.running + 1, self.taken + 1
            self.most = max(self.most, self.running)
        time.sleep(0.002 * (rows[0] % 5))
        with self.lock:
            self.running -= 1
        if self.fails_at in rows:
            raise ValueError(f"row {self.fails_at} is broken")
        return {"x": IMAGES[rows], "y": rows}


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_the_batches_are_the_same_for_any_number_of_workers(number: int) -> None:
    plain = Minibatches(DATA, 5, seed=3, transforms=CHAIN, workers=0)
    threaded = Minibatches(DATA, 5, seed=3, transforms=CHAIN, workers=number)
    for epoch in (0, 4):
        assert_same(made(threaded, epoch), made(plain, epoch))
    assert_same(made(Minibatches(Slow(), 5, seed=3, workers=number)), made(Minibatches(DATA, 5, seed=3)))
    assert not workers()


def test_a_row_is_changed_otherwise_in_every_epoch_and_by_every_seed() -> None:
    def images(seed: int, epoch: int) -> np.ndarray:
        batches = Minibatches({"x": IMAGES}, 37, seed=seed, shuffle=False, transforms={"x": [Noise(0.1)]})
        return made(batches, epoch)[0]["x"] - IMAGES

    different = [images(3, 0), images(3, 1), images(4, 0), images(3, 0)[::-1]]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(images(3, 0), different[0])


def test_transforms_follow_the_row_not_its_batch() -> None:
    by_size = []
    for size, shuffle in ((5, True), (8, True), (37, False)):
        batches = made(Minibatches(DATA, size, seed=3, transforms=CHAIN, shuffle=shuffle), 2)
        by_size.append({int(y): x for batch in batches for x, y in zip(batch["x"], batch["y"])})
    for other in by_size[1:]:
        for row, image in by_size[0].items():
            np.testing.assert_array_equal(image, other[row])
    assert any((by_size[0][i] != IMAGES[i]).any() for i in range(37))


@pytest.mark.parametrize("batches", [
    Minibatches(DATA, 5), Minibatches(DATA, 5, shuffle=False), Minibatches(DATA, 5, drop_last=True),
    Minibatches(DATA, 5, transforms=CHAIN), Minibatches(DATA, 5, workers=2, lengths=np.arange(37) % 7),
    TextWindows(np.arange(60), 2, 5),
    Stream(lambda epoch: ({"x": np.full(2, i + epoch)} for i in range(99)), 7)],
    ids=lambda b: type(b).__name__)
def test_an_epoch_goes_on_from_any_batch(batches: Batches) -> None:
    whole = made(batches, 3)
    assert len(whole) == len(batches)
    for start in range(len(batches) + 1):
        assert_same(made(batches, 3, start), whole[start:])


def test_workers_run_at_once_and_not_far_ahead() -> None:
    data = Slow()
    iterator = Minibatches(data, 2, workers=3, shuffle=False).batches(0)
    next(iterator)
    time.sleep(0.1)
    assert data.taken <= 7 and 2 <= data.most <= 3
    assert len(workers()) == 3
    iterator.close()  # type: ignore[attr-defined]
    assert not workers() and data.taken <= 7


def test_an_error_in_a_worker_comes_out_with_its_place() -> None:
    batches = Minibatches(Slow(fails_at=30), 4, workers=2, shuffle=False)
    seen = 0
    with pytest.raises(ValueError, match="row 30 is broken") as caught:
        for _ in batches:
            seen += 1
    assert seen == 7 and "take_rows" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not workers()


def test_no_thread_is_left_where_training_ends_early() -> None:
    n = gf.dim("N")
    x = gf.input("x", (n, 2, 8, 8))
    loss = gf.mean(gf.square(gf.nn.dense(gf.nn.flatten(x), 1)))
    model = gf.Model(x, x, loss, optimizer=gf.optim.SGD(0.01), device="reference")

    def stop(training: gf.training.Training) -> None:
        raise RuntimeError("enough")

    class AfterTwo(gf.Callback):
        def on_step_end(self, training: gf.training.Training) -> None:
            assert workers()
            if training.step == 2:
                raise RuntimeError("enough")

    for callback in (stop, AfterTwo()):
        with pytest.raises(RuntimeError, match="enough"):
            model.fit(Minibatches(Slow(), 4, workers=2), callbacks=callback)
        assert not workers()
    with pytest.raises(ValueError, match="row 9 is broken"):
        model.fit(Minibatches(Slow(fails_at=9), 4, workers=2))
    with pytest.raises(ValueError, match="row 9 is broken"):
        model.evaluate(Slow(fails_at=9), 4)
    assert not workers()


def test_a_stream_is_made_anew_for_each_epoch_and_closed() -> None:
    closed = []

    def make(epoch: int) -> Iterator[Batch]:
        try:
            for i in range(5):
                yield {"x": np.full(3, 10 * epoch + i)}
        finally:
            closed.append(epoch)

    for prefetch in (True, False):
        closed.clear()
        stream = Stream(make, 4, prefetch=prefetch)
        assert [b["x"][0] for b in stream.batches(2)] == [20, 21, 22, 23]
        iterator = stream.batches(3)
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        assert closed == [2, 3] and not workers()
        with pytest.raises(DataError, match="the stream ended after 5 batches of epoch 1; an epoch has 6"):
            made(Stream(make, 6, prefetch=prefetch), 1)
    with pytest.raises(UseError, match="takes a function"):
        Stream(make(0), 4)  # type: ignore[arg-type]
    with pytest.raises(UseError, match="length is 0"):
        Stream(make, 0)


@pytest.mark.parametrize("options, message", [
    ({"workers": -1}, "workers is -1"), ({"workers": 1.5}, "workers is 1.5"),
    ({"transforms": {"z": [Flip()]}}, "transforms for 'z', but no such array"),
    ({"transforms": {"x": [lambda images, draws: images[1:]]}}, "made 4 rows of 'x' out of 5"),
    ({"transforms": {"y": [Flip()]}}, r"Flip takes images \[N, C, H, W\]")])
def test_what_makes_no_batches(options: dict[str, object], message: str) -> None:
    with pytest.raises((UseError, DataError), match=message):
        made(Minibatches(Arrays(DATA), 5, **options))  # type: ignore[arg-type]
    assert not workers()
