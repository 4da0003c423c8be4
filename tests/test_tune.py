"""Tuning: what is chosen, when it is timed, and where it is kept. Times are made up, but in one test."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import graphflow as gf
from graphflow.compiler.cache import _opened
from graphflow.compiler.driver import Compilation, compile_program
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.plan.errors import CompilerError, UseError
from graphflow.compiler.plan.trial import Trial
from graphflow.compiler.target import host_target
from graphflow.compiler.tune import Tuning

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHFLOW_CACHE", str(tmp_path / "cache"))
    _opened.cache_clear()


def convolution(device: str = "cpu", **options: object) -> gf.Program:
    """A training step with a convolution and a product."""
    n = gf.dim("N")
    x, y = gf.input("x", (n, 8, 12, 12)), gf.input("y", (n,), "int64")
    hidden = gf.relu(gf.nn.conv2d(x, 16, (3, 3), padding=1))
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(gf.nn.flatten(hidden), 10), y)
    return gf.function([x, y], loss, gf.optim.SGD(0.1).minimize(loss), name="step", device=device, **options)


FEEDS = (np.random.default_rng(0).standard_normal((5, 8, 12, 12), np.float32), np.arange(5))


class Clock:
    """A callback that gives made-up times: of variant i of every trial, times[min(i, last)]."""

    def __init__(self, *times: float):
        self.times, self.trials = times, []

    def __call__(self, trial: Trial) -> Sequence[Sequence[float]]:
        self.trials.append(trial)
        row = [self.times[min(i, len(self.times) - 1)] for i in range(len(trial.variants))]
        return [row] * 3


def tiles(compilation: Compilation) -> list[dict[str, int]]:
    kernels = compilation.result("memory").kernels.values()
    return [dict(k.contraction.tile) for k in kernels if isinstance(k, ContractionKernel)]


def graph() -> Graph:
    return convolution().traced


def test_the_fastest_is_recorded_and_printed() -> None:
    clock = Clock(1.0, 0.5, 0.9)
    compilation = Compilation(graph(), host_target(), tuning=Tuning(clock, 2))
    chosen = tiles(compilation)
    assert len(chosen) >= 3 and all(chosen)
    printed = compilation.text("memory")
    for tile in chosen:
        assert f"tile [{', '.join(f'{k}={v}' for k, v in tile.items())}]" in printed
    explained = compilation.explain().splitlines()
    lines = [line for line in explained if "ways were timed" in line]
    assert len(lines) == len(chosen) and all("test_tune.py:" in line for line in lines)
    assert "takes 500000.0 µs, the cost model's choice 1000000.0 µs" in lines[0]
    again = Compilation.resume(printed, "memory")
    assert again.text("emit") == compilation.text("emit")


@pytest.mark.parametrize("times", [(1.0, 0.98), (1.0, 1.1), (1.0, 1.0, 0.975)])
def test_what_is_hardly_faster_is_not_taken(times: tuple[float, ...]) -> None:
    tuning = Tuning(Clock(*times), 2)
    compilation = Compilation(graph(), host_target(), tuning=tuning)
    assert not any(tiles(compilation)) and tuning.choices
    assert "the cost model's choice" in compilation.explain()
    assert compilation.text("emit") == Compilation(graph(), host_target()).text("emit")


def test_a_gain_that_does_not_come_again_is_none() -> None:
    clock = Clock(1.0, 0.5)

    def measure(trial: Trial) -> Sequence[Sequence[float]]:
        found = clock(trial)
        return found if len(trial.variants) > 2 else [[1.0, 1.0]] * 3

    assert not any(tiles(Compilation(graph(), host_target(), tuning=Tuning(measure, 1))))


def test_noise_in_single_rounds_changes_nothing() -> None:
    rng = np.random.default_rng(1)

    def measure(trial: Trial) -> Sequence[Sequence[float]]:
        rows = 1 + 0.01 * rng.standard_normal((9, len(trial.variants)))
        rows[rng.integers(0, 9, 3)] *= 3                                  # the whole machine was busy
        for i in range(len(trial.variants)):
            rows[rng.integers(0, 9), i] *= rng.choice([0.2, 5])             # a clock that jumped
        return rows.tolist()

    assert not any(tiles(Compilation(graph(), host_target(), tuning=Tuning(measure, 1))))


def test_symbols_have_the_sizes_given_or_128() -> None:
    for symbols, rows in (({}, 128), ({"N": 7}, 7)):
        clock = Clock(1.0)
        Compilation(graph(), host_target(), tuning=Tuning(clock, 1, symbols)).result("tile")
        assert any(a.size == rows * 8 * 12 * 12 for trial in clock.trials for a in trial.arguments)
        assert all(trial.symbols in ((), (rows,)) for trial in clock.trials)


def test_the_cache_keeps_what_was_found() -> None:
    def fails(trial: Trial) -> Sequence[Sequence[float]]:
        raise AssertionError(f"{trial.name} is timed a second time")

    clock = Clock(1.0, 0.5)
    first = compile_program(graph(), tuning=Tuning(clock, 2))
    assert clock.trials and not first.cached
    second = compile_program(graph(), tuning=Tuning(fails, 2))
    assert second.cached and second.object_code == first.object_code
    assert tiles(second.compilation) == tiles(first.compilation)
    assert second.compilation.explain() == first.compilation.explain()
    for other in (Tuning(fails, 3), Tuning(fails, 2, {"N": 5})):
        with pytest.raises(AssertionError, match="second time"):
            compile_program(graph(), tuning=other)
    assert not compile_program(graph()).cached                           # the cost model's is another program
    assert not any(tiles(compile_program(graph()).compilation))


def test_a_tuned_program_computes_the_same() -> None:
    plain, tuned = convolution(), convolution(tune={"N": 5})
    wanted = [plain(*FEEDS) for _ in range(3)]
    assert tuned.tuning is not None
    tuned.tuning.measure = Clock(1.0, 0.5)                               # all kernels are computed otherwise
    np.testing.assert_allclose([tuned(*FEEDS) for _ in range(3)], wanted, rtol=1e-5)
    assert any(tiles(tuned.compilation)) and tuned.fingerprint() != plain.fingerprint()
    again = convolution(tune={"N": 5})
    np.testing.assert_array_equal(again(*FEEDS), convolution(tune={"N": 5})(*FEEDS))
    assert again.compiled.cached and again.fingerprint() == tuned.fingerprint()


def test_kernels_are_timed_natively() -> None:
    program = convolution(tune={"N": 5}, threads=2)
    assert np.isfinite(program(*FEEDS))
    assert program.tuning is not None and program.tuning.choices
    for choice in program.tuning.choices.values():
        assert 0 < choice.seconds <= choice.default < 1 and choice.count > 1
        assert (choice.seconds < choice.default) == bool(choice.tile)
    assert all(name in program.explain() for name in program.tuning.choices)


def test_a_model_is_tuned_for_the_dimensions_of_inputs_and_targets() -> None:
    x, y = gf.input("x", (gf.dim("N"), 4)), gf.input("y", (gf.dim("N"), gf.dim("M")))
    outputs = gf.nn.dense(x, 3)
    loss = gf.mean(outputs) * gf.mean(y)
    model = gf.Model(x, outputs, loss, targets=y, optimizer=gf.optim.SGD(0.1), tune={"N": 6, "M": 2})
    assert model.step.tuning is not None and model.step.tuning.symbols == {"N": 6, "M": 2}
    assert model.prediction.tuning is not None and model.prediction.tuning.symbols == {"N": 6}
    with pytest.raises(UseError, match="no dimension 'M'"):
        gf.Model(x, gf.nn.dense(x, 3), tune={"M": 2})


@pytest.mark.parametrize("device", ["reference", "null"])
def test_only_the_cpu_is_tuned(device: str) -> None:
    with pytest.raises(UseError, match=f"for the device '{device}'"):
        convolution(device, tune=True)


@pytest.mark.parametrize("tune, message", [({"M": 3}, "no dimension 'M'"), ({"N": 0}, "size of N is 0"),
                                           ({"N": 2.5}, "size of N is 2.5")])
def test_wrong_sizes(tune: dict[str, int], message: str) -> None:
    with pytest.raises(UseError, match=message):
        convolution(tune=tune)


@pytest.mark.parametrize("tile, message", [
    ("mw=3", "no field 'mw'"), ("mr=0", "mr=0"), ("algorithm=-1", "algorithm=-1"),
    ("nr=12", "no power of two"),
    ("mr=16, nr=64", "registers"), ("algorithm=99", "does not apply"),
    ("algorithm=2, mr=3", "direct algorithm"),
])
def test_nonsense_in_a_tile_is_refused(tile: str, message: str) -> None:
    text = Compilation(graph(), host_target()).text("memory")
    start = text.index("contraction k_conv")
    start = text.index("  a = ", start)
    text = f"{text[:start]}  tile [{tile}]\n{text[start:]}"
    with pytest.raises(CompilerError, match=message):
        Compilation.resume(text, "memory").result("emit")
