"""What is measured of kernels: work counted against formulas, timings of programs, the command."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphflow as gf
from graphflow import bench
from graphflow.cli import main
from graphflow.compiler.driver import NAMES
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.kernel.work import Work, kernel_work
from graphflow.compiler.plan.schema import launches

LIMITS = bench.Machine(1, 100.0, (bench.Level("near", 64, 50.0), bench.Level("memory", math.inf, 10.0)))


def works(program: gf.Program, **symbols: int) -> list[Work]:
    compiled = program.compilation.result("memory")
    return [kernel_work(compiled.kernels[item.kernel], symbols) for item in launches(compiled.plan.body)]


@pytest.mark.parametrize("text, flops, moved", [
    ("matmul:5x7x3", 2 * 5 * 7 * 3, 4 * (5 * 7 + 7 * 3 + 5 * 3)),
    ("conv:2x3x6x5:4x3x2", 2 * (2 * 4 * 4 * 4) * (3 * 3 * 2),
     4 * (2 * 3 * 6 * 5 + 4 * 3 * 3 * 2 + 2 * 4 * 4 * 4)),
])
def test_work_of_contractions(text: str, flops: int, moved: int) -> None:
    assert works(bench.shape_program(text)) == [Work(flops, moved, moved)]


def test_work_of_a_map_and_a_reduction() -> None:
    x = gf.input("x", (gf.dim("N"), 6))
    mapped, = works(gf.function([x], x * 2.0 + 1.0), N=5)
    assert mapped == Work(2 * 5 * 6, 2 * 4 * 5 * 6, 2 * 4 * 5 * 6)
    summed, = works(gf.function([x], x.sum(1)), N=5)
    assert summed == Work(5 * 6, 4 * (5 * 6 + 5), 4 * (5 * 6 + 5))


def test_only_what_is_touched_is_traffic() -> None:
    kernel = parse_kernel("""kernel k(a: r f32[100], b: rw f32[8]) {
        lanes i < 8 {
          b[i] = add(b[i], a[3])
        }
    }""")
    assert kernel_work(kernel, {}) == Work(8, 4 * (8 + 8 + 8), 4 * 108)


@pytest.mark.parametrize("work, least, bound", [
    (Work(1000, 40, 60), 10.0, "FMA"), (Work(10, 200, 60), 4.0, "near"), (Work(10, 200, 65), 20.0, "memory"),
])
def test_the_roofline(work: Work, least: float, bound: str) -> None:
    assert LIMITS.least_seconds(work) == least and LIMITS.bound(work) == bound
    timing = bench.Timing("k", "", 3, 6 * least, work)
    assert timing.share(LIMITS) == 0.5
    assert bench.table([timing], LIMITS).splitlines()[-1].split() == [
        f"{6e6 * least:.1f}", "100%", "3", "0.0", "0.0", "50%", "all"]


@pytest.mark.cpu
def test_profile_times_loops_too_and_puts_the_state_back() -> None:
    x = gf.input("x", (5, gf.dim("N"), 4))
    w = gf.parameter((4, 4), np.eye(4, dtype=np.float32), name="w")
    last, _ = gf.scan(lambda h, z: (gf.tanh(h @ w + z),) * 2, gf.zeros((3, 4)), x[:, :3])
    loss = last.sum()
    step = gf.function([x], loss, {w: w - 0.1 * gf.grad(loss, w)})
    timings = bench.profile(step, bench.random_feeds(step, {"N": 3}), rounds=2)
    assert np.array_equal(step.store["w"], np.eye(4)) and step.store["rng.step"] == 0
    assert {1, 5} <= {t.runs for t in timings} and all(t.seconds > 0 for t in timings)
    assert len(timings) >= len(set(launches(step.plan.body)))
    assert any("test_bench.py" in t.lines for t in timings)


@pytest.mark.cpu
def test_what_the_machine_can_do() -> None:
    found = bench.machine(1)
    assert found.flops > 1e8 and all(level.bandwidth > 1e7 for level in found.levels)
    assert found.levels[-1].capacity == math.inf
    assert [level.capacity for level in found.levels] == sorted(level.capacity for level in found.levels)


def test_feeds_of_a_programs_shapes() -> None:
    x, y = gf.input("x", (gf.dim("N"), 3)), gf.input("y", (gf.dim("N"),), "int64")
    program = gf.function([x, y], x.sum(1) + gf.cast(y, "float32"))
    given = bench.random_feeds(program, {"N": 4})
    assert [(a.shape, str(a.dtype)) for a in given] == [((4, 3), "float32"), ((4,), "int64")]
    assert bench.random_feeds(program, {})[0].shape == (bench.GUESS, 3)
    with pytest.raises(gf.UseError, match="has no dimension 'M'"):
        bench.random_feeds(program, {"M": 4})


def test_only_the_cpu_is_timed() -> None:
    x = gf.input("x", (3,))
    with pytest.raises(gf.UseError, match="only kernels on the CPU"):
        bench.profile(gf.function([x], x + 1.0, device="reference"), [np.zeros(3, np.float32)])


@pytest.mark.cpu
def test_the_command(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "ops", "xor", "matmul:64x32x16", "--size", "N=4", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 threads: " in said and "k_matmul_0" in said and said.count("  all") == 2
    for arguments, message in ((["matmul:3x4"], "is no contraction"), (["conv:1x2"], "is no contraction"),
                               (["xor", "--size", "M=3"], "no target has a dimension 'M' (there are N)")):
        assert main(["bench", "ops", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_time_of_compiling(capsys: Any) -> None:
    assert main(["bench", "compile", "xor", "matmul:64x32x16"]) == 0
    said = capsys.readouterr().out
    for stage in (*NAMES, "checks", "code generator", "all"):
        assert said.count(f"\n{stage:<16}") == 2
    assert "1 launches" in said and said.startswith("xor\n")
