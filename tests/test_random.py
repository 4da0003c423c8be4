"""Random numbers: their distributions, that they are the same bits everywhere, and what they follow from."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_host import COMPILER, HostKernels, lowered
from devices import DEVICES
from scipy import special, stats
from support import graph_of, run_graph

import graphflow as gf
from graphflow import random
from graphflow.compiler.ir.builder import rebuild
from graphflow.compiler.plan.dtypes import F32, F64

COUNT = 200_000
TYPES = ("float32", "float64")


def draw(make: Callable[[], Any], device: str = "cpu", seed: int = 1, **options: Any) -> Any:
    """The values of what `make` makes."""
    made = make()
    return gf.function([], list(made) if isinstance(made, (list, tuple)) else made, device=device,
                       store=gf.Store(seed), **options)()


CONTINUOUS: dict[str, tuple[Callable[[str], gf.Tensor], Any]] = {
    "uniform": (lambda d: random.uniform((COUNT,), dtype=d), stats.uniform()),
    "uniform of a range": (lambda d: random.uniform((COUNT,), -3, 5, dtype=d), stats.uniform(-3, 8)),
    "exponential": (lambda d: random.exponential((COUNT,), dtype=d), stats.expon()),
    "gumbel": (lambda d: random.gumbel((COUNT,), dtype=d), stats.gumbel_r()),
    "normal": (lambda d: random.normal((COUNT,), dtype=d), stats.norm()),
    "normal of a mean": (lambda d: random.normal((COUNT,), 10, 0.5, dtype=d), stats.norm(10, 0.5)),
    "truncated normal": (lambda d: random.truncated_normal((COUNT,), dtype=d), stats.truncnorm(-2, 2)),
    "truncated normal of one side": (
        lambda d: random.truncated_normal((COUNT,), 1, 2, 0.5, 3, dtype=d), stats.truncnorm(0.5, 3, 1, 2)),
}


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_distributions(name: str, dtype: str) -> None:
    """Kolmogorov and Smirnov's test, the first two moments, and equal bits on both devices."""
    make, expected = CONTINUOUS[name]
    found = draw(lambda: make(dtype))
    assert found.dtype == dtype
    assert found.tobytes() == draw(lambda: make(dtype), "reference").tobytes()
    x = found.astype(np.float64)
    assert stats.kstest(x, expected.cdf).pvalue > 1e-3
    error = expected.std() / np.sqrt(COUNT)
    assert abs(x.mean() - expected.mean()) < 4 * error
    assert abs(x.std() - expected.std()) < 8 * error
    low, high = expected.support()
    assert low <= x.min() and x.max() <= high
    for q in (1e-4, 1e-3, 0.999, 0.9999):                              # the tails
        count = (x < expected.ppf(q)).mean() * COUNT
        assert abs(count - q * COUNT) < 5 * np.sqrt(COUNT * q * (1 - q))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, accuracy", [(F32, 4e-7), (F64, 2e-15)], ids=str)
def test_percentage_points(dtype: Any, accuracy: float, device: str) -> None:
    """Against SciPy's, for words at both ends, in the middle and in between."""
    bits, given = (32, "uint32") if dtype is F32 else (53, "int64")
    rng = np.random.default_rng(0)
    ends = np.arange(3000)
    k = np.concatenate([ends, 2 ** (bits - 1) - 1 - ends, rng.integers(0, 2 ** (bits - 1), 20_000),
                        np.geomspace(1, 2 ** (bits - 1) - 1, 20_000).astype(np.int64)])
    lower = special.ndtri((2.0 * k + 1) / 2.0 ** (bits + 1))
    words = np.concatenate([k, 2 ** bits - 1 - k])
    expected = np.concatenate([lower, -lower])
    word = gf.input("word", words.shape, given)
    found = gf.function([word], random._percentage_point(word, dtype), device=device)(words.astype(given))
    np.testing.assert_allclose(found, expected, rtol=accuracy, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, accuracy", [("float32", 3e-7), ("float64", 1e-15)])
def test_logarithms(dtype: str, accuracy: float, device: str) -> None:
    x = np.concatenate([np.geomspace(1, 2.0 ** 64, 5000), np.linspace(1, 4, 5000), 2.0 ** np.arange(64)])
    x = x.astype(dtype)
    t = gf.input("t", x.shape, dtype)
    power, part = random._split(t)
    rest = random._log(*random._ratio(part))
    powers, parts, found = gf.function([t], [power, part, rest], device=device)(x)
    np.testing.assert_array_equal(parts.astype(np.float64) * 2.0 ** powers, x)
    assert parts.min() >= np.sqrt(0.5) * (1 - 1e-7) and parts.max() <= np.sqrt(2) * (1 + 1e-7)
    np.testing.assert_allclose(found, np.log(parts.astype(np.float64)), rtol=accuracy, atol=0)


# --- discrete ones

@pytest.mark.parametrize("device", DEVICES)
def test_randint(device: str) -> None:
    found, wide = draw(lambda: [random.randint((COUNT,), -3, 7),
                                random.randint((COUNT,), 0, 2 ** 31, "int64")], device)
    assert found.dtype == np.int32 and wide.dtype == np.int64
    assert stats.chisquare(np.bincount(found + 3, minlength=10)).pvalue > 1e-3 and found.max() == 6
    assert stats.kstest(wide / 2.0 ** 31, stats.uniform.cdf).pvalue > 1e-3
    size = gf.dim("size")
    x = gf.input("x", (size,))
    below = gf.function([x], random.randint((1000,), 0, size), device=device)(np.zeros(5, np.float32))
    assert set(below) == set(range(5))


@pytest.mark.parametrize("device", DEVICES)
def test_bernoulli(device: str) -> None:
    p = np.linspace(0, 1, 6, dtype=np.float32)
    found = draw(lambda: random.bernoulli(gf.constant(p), (10_000, 6)), device)
    assert found.dtype == bool
    assert (np.abs(found.mean(0) - p) <= 5 * np.sqrt(p * (1 - p) / 10_000)).all()
    assert draw(lambda: random.bernoulli(1), device) and not draw(lambda: random.bernoulli(0), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_categorical(dtype: str, device: str) -> None:
    p = np.array([0.5, 0.2, 0.0, 0.3])
    with np.errstate(divide="ignore"):
        logits = np.log(p).astype(dtype)
    found = draw(lambda: random.categorical(gf.broadcast_to(gf.constant(logits), (50_000, 4))), device)
    counts = np.bincount(found, minlength=4)
    assert found.dtype == np.int64 and counts[2] == 0
    assert stats.chisquare(counts[p > 0], 50_000 * p[p > 0]).pvalue > 1e-3
    along = draw(lambda: random.categorical(gf.constant(np.eye(5, 3, dtype=dtype) * 100), axis=0), device)
    np.testing.assert_array_equal(along, [0, 1, 2])


@pytest.mark.parametrize("device", DEVICES)
def test_permutation(device: str) -> None:
    x = np.arange(12.0).reshape(6, 2)
    order, moved = draw(lambda: [random.permutation(1000), random.permutation(gf.constant(x))], device)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert stats.spearmanr(order, np.arange(1000)).pvalue > 1e-3
    assert sorted(map(tuple, moved)) == sorted(map(tuple, x))
    size = gf.dim("size")
    t = gf.input("t", (size,))
    found = gf.function([t], random.permutation(size), device=device)(np.zeros(7, np.float32))
    np.testing.assert_array_equal(np.sort(found), np.arange(7))


# --- what they follow from

def some() -> list[gf.Tensor]:
    return [random.normal((3000,)), random.normal((3000,)), random.gumbel((50, 7), dtype="float64"),
            random.truncated_normal((999,)), random.categorical(gf.zeros((40, 9)))]


@pytest.mark.cpu
def test_the_same_bits_for_any_number_of_threads() -> None:
    found = [[a.tobytes() for a in draw(some, threads=threads)] for threads in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1]                                   # two calls are independent
    assert found[0] != [a.tobytes() for a in draw(some, seed=2)]


@pytest.mark.cpu
@pytest.mark.skipif(COMPILER is None, reason="no g++ on the PATH to compile the text for the CPU")
def test_the_same_bits_from_cuda(tmp_path: Path) -> None:
    graph = graph_of([], [t.value for t in some()])
    graph = rebuild(graph, lambda b, node, inputs: b.copy(node, inputs).results)
    state = {name: np.asarray(11, leaf.types[0].dtype.numpy) for name, leaf in graph.states().items()}
    program = lowered(graph)
    found, _ = HostKernels([program], tmp_path).run(program, {}, state, {})
    for name, expected in run_graph(graph, {}, "reference", state).items():
        assert found[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("device", DEVICES)
def test_training_steps_draw_new_numbers(device: str) -> None:
    w = gf.parameter((), 0.0)
    noise = random.normal((100,))
    train = gf.function([], noise, {w: w + 1.0}, device=device, store=gf.Store(3))
    first, second = train(), train()
    assert not np.array_equal(first, second)
    again = gf.function([], random.normal((100,)), device=device, store=gf.Store(3))
    np.testing.assert_array_equal(again(), first)
    np.testing.assert_array_equal(again(), first)


@pytest.mark.reference
def test_steps_of_loops_draw_numbers_of_their_own() -> None:
    def body(carry: gf.Tensor, row: None) -> tuple[gf.Tensor, gf.Tensor]:
        noise = random.normal((3,))
        return carry + noise, noise

    total, each = gf.scan(body, gf.zeros((3,)), length=50)
    found = gf.function([], [total, each], device="reference")()
    assert len(np.unique(found[1])) == 150
    np.testing.assert_allclose(found[0], found[1].sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call, message", [
    (lambda: random.normal((3,), dtype="int32"), "normal makes floats, not int32"),
    (lambda: random.uniform((3,), dtype="float16"), "makes float32 or float64, not float16"),
    (lambda: random.randint((3,), 5, 5), "a range of 1 to"),
    (lambda: random.randint((3,), 0, 5, "float32"), "randint makes integers"),
    (lambda: random.truncated_normal((3,), low=4, high=5), "keeps only"),
    (lambda: random.permutation(gf.constant(1.0)), "a tensor with axes"),
    (lambda: random.normal(2.5), "is no shape"),
    (lambda: random.categorical(gf.zeros((3,)), axis=1), "no axis 1"),
])
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(gf.UserError, match=message):
        call()
