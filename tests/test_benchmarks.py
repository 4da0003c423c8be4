"""The benchmarks: the nine steps compile and agree with PyTorch's, workers speak their protocol, the report
is written."""
from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphflow.compiler.plan.bind import bind

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))

import bench  # noqa: E402
import compare  # noqa: E402
import contractions  # noqa: E402
import convolutions  # noqa: E402
import functions  # noqa: E402
import machine  # noqa: E402
import nets_graphflow  # noqa: E402
import overhead  # noqa: E402
import report  # noqa: E402
import torch_ops  # noqa: E402
from workloads import SMALL, WORKLOADS, Workload  # noqa: E402

NAMES = ("logreg", "mlp", "autoenc", "traffic", "lenet", "inception", "resnet", "alexnet", "charrnn")
NUMBERS = {"logreg": 7850, "lenet": 431080, "alexnet": 61100840, "charrnn": 259168}
"""Parameters, as PyTorch and torchvision count them (less the second biases of LSTM layers)."""


def engine(work: Workload, module: Any = nets_graphflow, **options: Any) -> Any:
    return module.Engine(work, work.params(), [work.batch(0), work.batch(1)], 1, **options)


# --- workloads

def test_the_workloads() -> None:
    assert tuple(WORKLOADS) == tuple(SMALL) == NAMES == tuple(nets_graphflow.NETS)
    for name, count in NUMBERS.items():
        assert sum(int(np.prod(shape)) for shape in WORKLOADS[name].shapes.values()) == count
    for small in SMALL.values():
        assert set(small.shapes) == set(WORKLOADS[small.name].shapes)


@pytest.mark.parametrize("work", SMALL.values(), ids=lambda w: w.name)
def test_seeds_decide_values_and_data(work: Workload) -> None:
    values, again = work.params(), work.params()
    assert {k: v.shape for k, v in values.items()} == work.shapes
    assert all(np.array_equal(values[k], again[k]) and values[k].dtype == np.float32 for k in values)
    first, second = work.batch(0), work.batch(1)
    assert not np.array_equal(first["x"], second["x"])
    assert ("y" in first) == (work.classes > 0) and (work.steps == 0 or np.array_equal(
        first["x"][1:], first["y"][:-1]))


def test_initial_weights_have_the_stated_scale() -> None:
    weights = WORKLOADS["mlp"].params()["fc1.W"]
    assert weights.std() == pytest.approx(np.sqrt(2 / 784), rel=0.01)


# --- the steps

@pytest.mark.parametrize("name", NAMES)
def test_full_sizes_compile_and_are_planned(name: str) -> None:
    """On the device that plans only: shapes as in the real step, no arithmetic."""
    work = WORKLOADS[name]
    initial = {key: np.zeros(shape, np.float32) for key, shape in work.shapes.items()}
    batch = work.batch(0)
    step = nets_graphflow.training_step(work, initial, batch, 1, device="null")
    assert step(**batch).shape == ()
    assert step.peak_bytes(N=work.batch_size) > 0
    for rows in (1, 7, work.batch_size, 3 * work.batch_size):
        for threads in (1, 2, 16):
            binding = bind(step.plan, {"N": rows}, threads)
            assert binding.live_peak_bytes <= binding.arena_bytes <= 1.05 * binding.live_peak_bytes


@pytest.mark.cpu
@pytest.mark.parametrize("work", SMALL.values(), ids=lambda w: w.name)
def test_losses_and_norms_agree_with_pytorch(work: Workload) -> None:
    pytest.importorskip("torch")
    import nets_torch
    mine, theirs = engine(work), engine(work, nets_torch, mode="eager")
    losses = [(mine.read_loss(mine.step(i)), theirs.read_loss(theirs.step(i))) for i in range(3)]
    np.testing.assert_allclose(*zip(*losses), rtol=1e-3)
    assert len({a for a, _ in losses}) == 3
    norms, expected = mine.read_norms(), theirs.read_norms()
    assert norms.keys() == expected.keys() == work.shapes.keys()
    for key, norm in expected.items():
        assert norms[key] == pytest.approx(norm, rel=1e-3, abs=1e-5), key


@pytest.mark.cpu
def test_a_smaller_batch_needs_no_new_compile() -> None:
    run = engine(SMALL["mlp"])
    run.step(0)
    runner = run.program.runner
    assert np.isfinite(run.program(**{key: array[:-1] for key, array in run.batches[0].items()}))
    assert run.program.runner is runner


# --- workers and comparing

def options(**changes: Any) -> Namespace:
    return Namespace(**{"workloads": ["logreg", "mlp"], "engines": ["graphflow"], "python": sys.executable,
                        "threads": [1], "rounds": 2, "round_ms": 5.0, "small": True, **changes})


@pytest.mark.cpu
def test_a_worker_answers_and_ends() -> None:
    command = [sys.executable, str(FOLDER / "worker.py"), "logreg", "1", "--small"]
    done = subprocess.run(command, input="3\n2\n\n", capture_output=True, text=True, check=True)
    ready, *answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ready["ready"] and len(ready["losses"]) == 6 and ready["first_s"] > 0
    assert set(ready["norms"]) == {"fc.W", "fc.b"}
    assert len(answers) == 2 and all(a["ms"] > 0 and a["peak_mb"] > 1 for a in answers)
    again = engine(SMALL["logreg"])
    losses = [again.read_loss(again.step(i)) for i in range(11)]
    assert ready["losses"] == losses[:6] and [a["loss"] for a in answers] == [losses[8], losses[10]]


@pytest.mark.cpu
def test_another_referee_brings_data_and_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workloads.py").write_text(
        "import numpy as np\n"
        "def params(name): return {'fc.W': np.zeros((4, 10), np.float32), 'fc.b': np.zeros(10, np.float32)}\n"
        "def batch(name, i): return {'x': np.ones((3, 4), np.float32), 'y': np.array([1, 2, 3])}\n")
    (tmp_path / "protocol.py").write_text(
        "def serve(step, read_loss, read_norms): print(read_loss(step(0)), sorted(read_norms()))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run([sys.executable, str(FOLDER / "worker.py"), "logreg", "1"], capture_output=True,
                          text=True, check=True)
    loss, norms = done.stdout.split(" ", 1)
    assert float(loss) == pytest.approx(np.log(10)) and norms == "['fc.W', 'fc.b']\n"


@pytest.mark.cpu
def test_compare_alone() -> None:
    rows = compare.run(options(), {})
    assert [(r.workload, r.engine, r.failure, r.wrong) for r in rows] == [
        ("logreg", "graphflow", "", False), ("mlp", "graphflow", "", False)]
    assert all(r.median_ms >= r.least_ms > 0 and r.first_s > 0 and np.isnan(r.ratio) for r in rows)


@pytest.mark.cpu
def test_compare_with_pytorch() -> None:
    pytest.importorskip("torch")
    mine, other = compare.compare("logreg", ["graphflow", "torch-eager", "torch-cl"], 1, options())
    assert other.engine == "torch-eager" and other.ratio == 1 and mine.ratio > 0
    assert 0 <= mine.loss_apart < 1e-3 and not mine.wrong


def test_engines_that_are_not_there_are_left_out(capsys: Any) -> None:
    assert compare.available(["graphflow", "torch-cl", "jax-jit"], {"torch": "2.5"}, "python") == [
        "graphflow", "torch-cl"]
    assert "jax-jit" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot be run"):
        compare.versions("/nowhere/python")


def test_a_worker_that_dies_says_why() -> None:
    worker = compare.Worker("x", [sys.executable, "-c", "raise ValueError('no such luck')"], 1)
    with pytest.raises(RuntimeError, match="no such luck"):
        worker.start()
    worker.end()


def fake(losses: list[float], norm: float, times: list[float], name: str = "graphflow") -> Any:
    ready = {"losses": losses, "norms": {"fc.W": norm}, "first_s": 1.0}
    return Namespace(engine=name, ready=ready, times=times, peak_mb=1.0)


def test_wrong_results_are_seen() -> None:
    peer = fake([2.0, 1.0], 3.0, [2.0, 4.0, 2.0], "torch-eager")
    for losses, norm, wrong in (([2.0, 1.001], 3.0, False), ([2.0, 1.02], 3.0, True),
                                ([2.0, 1.0], 3.2, True), ([2.0, float("nan")], 3.0, True)):
        mine = fake(losses, norm, [1.0, 1.0, 4.0])
        found = compare.row("mlp", mine, [mine, peer])
        assert found.wrong == wrong and found.ratio == 0.5
        assert ("**wrong**" in report.steps_table([found], [WORKLOADS["mlp"]])) == wrong


# --- functions and overhead

def test_errors_in_units_in_the_last_place() -> None:
    x = np.array([1.0, 0.0, -1.0, np.inf, np.nan, 1e-40], np.float32)
    with np.errstate(invalid="ignore"):
        root = np.sqrt(x)
    assert functions.ulps(root, x, np.sqrt) <= 0.5
    moved = root.copy()
    moved[0] = np.nextafter(moved[0], np.float32(2), dtype=np.float32)
    assert functions.ulps(moved, x, np.sqrt) == 1
    for place, value in ((2, 0.0), (3, 1e38), (4, 0.0), (0, np.nan)):
        wrong = root.copy()
        wrong[place] = value
        assert functions.ulps(wrong, x, np.sqrt) == np.inf


@pytest.mark.cpu
def test_functions_are_accurate() -> None:
    found = functions.measure(sys.executable, 999_983, ["graphflow"])
    assert all(0 < of["ulp"] <= 2.5 and of["ns"] > 0 for of in found["graphflow"].values())
    assert functions.table(found).count("\n") == 1 + len(functions.EXACT)


@pytest.mark.cpu
def test_overhead_is_measured() -> None:
    found = overhead.measure(2, small=True)
    text = overhead.table(found)
    assert 0 < found["deep"]["cached_s"] < found["deep"]["compile_s"] and 0 < found["fork_us"]["2"] < 1e4
    assert "a fork of 2 threads" in text and "the stage `fuse`" in text and "5 layers" in text


def test_the_state_is_counted() -> None:
    parameters = 4 * NUMBERS["alexnet"]
    assert WORKLOADS["alexnet"].state_bytes == 2 * parameters
    assert WORKLOADS["logreg"].state_bytes == 4 * NUMBERS["logreg"]


# --- the report

ROWS = [compare.Row("mlp", "graphflow", 1.0, 0.9, 0.5, 100.0, 0.5, 1e-7, 1e-7),
        compare.Row("mlp", "torch-eager", 2.0, 1.9, 0.1, 300.0, 1.0, 0.0, 0.0),
        compare.Row("mlp", "jax-jit", failure="no such module")]


def test_tables() -> None:
    table = report.steps_table(ROWS, [WORKLOADS["mlp"], WORKLOADS["lenet"]])
    assert table.splitlines()[2] == ("| **mlp**: 784-512-512-10, ReLU, momentum, batch 128 | 1.00 | "
                                     "2.00 (torch-eager) | 0.50 | 1e-07 | 100 | 300 | 0.32 | 0.50 |")
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "failed: no such module" in report.engines_table(ROWS)
    assert json.dumps(compare.as_json(ROWS), allow_nan=False)


def test_the_machine_is_described() -> None:
    text = machine.text(machine.describe(3, {"torch": "2.5"}))
    assert machine.processor() in text and "3 threads" in text and "PyTorch 2.5" in text


def test_the_readme_is_written_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    bench.put_into_readme("new", path)
    assert path.read_text() == f"before\n{bench.BEGIN}\nnew\n{bench.END}\nafter\n"
    with pytest.raises(SystemExit, match="needs one"):
        bench.put_into_readme("new", ROOT / "LICENSE")
    assert (ROOT / "README.md").read_text().count(bench.BEGIN) == 1


@pytest.mark.cpu
def test_bench_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [
        "bench.py", "--small", "--engines", "graphflow", "--workloads", "logreg", "--threads", "1", "2",
        "--rounds", "1", "--round-ms", "5", "--parts", "steps", "kernels", "--out", str(tmp_path)])
    bench.main()
    text = (tmp_path / "report.md").read_text()
    assert "**logreg**" in text and "## Kernels" in text
    assert "With 1 thread:" in text and "With 2 threads:" in text
    assert {p.name for p in tmp_path.iterdir()} == {
        "report.md", "results.json", "roofline.png", *(f"{bars}-{n}.png" for n in (1, 2)
                                                       for bars in ("steps", "memory", "first"))}
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["steps"][0]["median_ms"] > 0 and found["kernels"]["programs"]["logreg"]


def test_convolutions_are_timed_pass_by_pass() -> None:
    found = convolutions.convolutions(SMALL["lenet"])
    assert [c.op.removeprefix("conv_") for c in found] == ["conv", "conv", "input_grad", *["weight_grad"] * 2]
    assert all(c.flops == 2 * c.y[0] * c.y[2] * c.y[3] * int(np.prod(c.w)) for c in found)
    lines = convolutions.measure(["lenet"], True, 1, sys.executable).splitlines()
    assert len(lines) == 1 + len(found) and all(float(line.split()[-5]) > 0 for line in lines[1:])


def test_contractions_are_timed_beside_numpy() -> None:
    lines = contractions.measure(["logreg"], True, 1, sys.executable).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["NN", "TN"]
    rates, ratios = ([float(line.split()[i]) for line in lines[1:]] for i in (8, -1))
    assert min(rates) > 0 and np.isfinite(ratios).all()


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("product", ((5, 4), (5, 3), True, False)),
    *(("convolution", (op, (2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 8, 8), (1, 1), (1, 1)))
      for op in convolutions.PASSES),
]


def test_operations_of_pytorch_are_timed() -> None:
    torch = pytest.importorskip("torch")
    found = torch_ops.measure(sys.executable, CALLS, 1, 2)
    assert len(found) == len(CALLS) and all(0 < seconds < 10 for seconds in found)
    shapes = [tuple(run().shape) for run in torch_ops.product(torch, *CALLS[0][1])]
    assert shapes == [(4, 3)]


def test_an_interpreter_without_pytorch_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert np.isnan(torch_ops.measure(sys.executable, CALLS, 1, 2)).all()
