"""Everything that graphflow can do, on a GPU, against the CPU, which others compare with NumPy and PyTorch.

Without a GPU, `test_on_the_simulated_gpu` runs all of this on the simulated one, with small sizes.
"""
from __future__ import annotations

import gc
import gzip
import inspect
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import FAKE, NO_GPU
from fake_gpu import MISSING, install
from gpu_cases import EXACT, LAYERS, LOSSES, METRICS, OPTIMIZERS, RANDOM, TABLES, program
from torch_cases import assert_near, normal, parameters_of

import graphflow as gf
from graphflow import examples
from graphflow.cli import main as cli

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import nets_graphflow  # noqa: E402
from workloads import SMALL, WORKLOADS  # noqa: E402

WORK, STEPS = (SMALL, 3) if FAKE else (WORKLOADS, 20)


def on_gpu(test: Any) -> Any:
    """A test that needs a GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)(test))


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Floats to `tolerance` of the largest magnitude; what is not rounded to the bit."""
    assert found.keys() == expected.keys()
    wrong = []
    for name, wanted in expected.items():
        value = np.asarray(found[name])
        assert value.dtype == wanted.dtype, name
        try:
            if wanted.dtype.kind in "biu" or name.startswith(EXACT):
                np.testing.assert_array_equal(value, wanted, err_msg=name)
            else:
                assert_near(value, wanted, tolerance, name)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


# --- where every part of the language has a case

def test_every_function_has_a_case() -> None:
    def own(module: Any) -> set[str]:
        return {name for name, thing in vars(module).items() if not name.startswith("_")
                and getattr(thing, "__module__", "") == module.__name__ and thing.__class__ is type(own)}
    optimizers = {name for name, thing in vars(gf.optim).items() if inspect.isclass(thing)
                  and issubclass(thing, gf.optim.Optimizer)} - {"Optimizer"}
    for declared, tables in (
            (set(gf.nn.__all__), LAYERS.values()), (own(gf.loss), [LOSSES]), (optimizers, [OPTIMIZERS]),
            (own(gf.metrics) - {"outputs_of"}, [METRICS]), (set(gf.random.__all__), [RANDOM])):
        assert {name.split()[0] for table in tables for name in table} == declared


# --- small nets

@on_gpu
@pytest.mark.parametrize("table", TABLES)
def test_small_nets(table: str) -> None:
    """Results, gradients and what training leaves in the Store; the second call gives the same bits."""
    runs = []
    for device in ("cpu", "cuda"):
        made, feeds = program(TABLES[table], device)
        first = {name: np.array(value) for name, value in made(*feeds).items()}
        store = {f"store.{name}": np.array(made.store[name]) for name in made.store.names()}
        runs.append({**first, **store})
        if not made.plan.written:
            again = made(*feeds)
            changed = [n for n, value in first.items() if np.asarray(again[n]).tobytes() != value.tobytes()]
            assert not changed, f"{changed}: another result in the second call"
    compare(runs[1], runs[0])


def optimizers(device: str) -> gf.Program:
    """A small net for each optimizer, all trained by one program."""
    x, y = gf.input("x", (None, 5)), gf.input("y", (None, 3))
    losses, updates = {}, {}
    for name, make in OPTIMIZERS.items():
        with gf.scope(name.replace(" ", "_")):
            net = gf.nn.dense(gf.nn.dense(x, 7, gf.tanh), 3)
            losses[name] = gf.loss.squared_error(net, y)
            updates |= make().minimize(losses[name])
    return gf.function([x, y], losses, updates, device=device)


@on_gpu
def test_every_optimizer() -> None:
    """Losses of some steps, and the states that they leave."""
    rng = np.random.default_rng(0)
    here, there = optimizers("cpu"), optimizers("cuda")
    for rows in (6, 6, 4, 6):
        fed = rng.standard_normal((rows, 5), np.float32), rng.standard_normal((rows, 3), np.float32)
        found, expected = dict(there(*fed)), dict(here(*fed))
        compare(found, expected)
    names = here.store.names()
    compare({n: there.store[n] for n in names}, {n: here.store[n] for n in names})


@on_gpu
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_autocast(half: str) -> None:
    """Products of halves: sums in another order may fall on the other side of a rounding."""
    def net(device: str) -> gf.Program:
        x, y = gf.input("x", (None, 3, 12, 12)), gf.input("y", (None,), "int64")
        with gf.autocast(half):
            h = gf.nn.batch_norm(gf.nn.conv2d(x, 16, 3, activation=gf.relu))
            h = gf.nn.max_pool2d(gf.nn.conv2d(h, 24, 3, padding=1, activation=gf.relu), 2)
            logits = gf.nn.dense(gf.nn.dense(gf.nn.flatten(h), 40, gf.tanh), 10)
            loss = gf.loss.softmax_cross_entropy(logits, y)
        scale = gf.optim.LossScale() if half == "float16" else None
        return gf.function([x, y], loss, gf.optim.Adam(1e-3, loss_scale=scale).minimize(loss), device=device)
    rng = np.random.default_rng(0)
    fed = rng.standard_normal((17, 3, 12, 12), np.float32), rng.integers(0, 10, 17)
    here, there = net("cpu"), net("cuda")
    losses = [[float(step(*fed)) for _ in range(3)] for step in (here, there)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@on_gpu
def test_parameters_of_halves_and_float64() -> None:
    for dtype, tolerance in (("float64", 1e-12), ("float16", 5e-3), ("bfloat16", 3e-2)):
        x = gf.input("x", (None, 20), dtype)
        y = gf.nn.dense(gf.nn.dense(x, 33, gf.tanh, bias_init=0.5), 10)
        loss = gf.sum(gf.square(gf.cast(y, "float64" if dtype == "float64" else "float32")))
        outputs = {"y": y, **{f"g{i}": g for i, g in enumerate(gf.grad(loss, parameters_of(y)))}}
        fed = normal(9, 20).astype(y.dtype.numpy)
        found, expected = (gf.function(x, outputs, device=device)(fed) for device in ("cuda", "cpu"))
        wide = [{n: np.asarray(v).astype(np.float64) for n, v in r.items()} for r in (found, expected)]
        compare(*wide, tolerance)
        assert np.asarray(found["y"]).dtype == y.dtype.numpy


# --- the nine workloads and the examples

@on_gpu
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name: str) -> None:
    """Those of the CPU; and the same bits, step by step, in a second run."""
    work, runs = WORK[name], []
    for device in ("cpu", "cuda", "cuda"):
        engine = nets_graphflow.Engine(work, work.params(), [work.batch(0), work.batch(1)], 2, device=device)
        losses = [engine.read_loss(engine.step(i)) for i in range(STEPS)]
        runs.append((losses, engine.read_norms()))
    (expected, norms), found, again = runs
    assert found == again, "not the same bits"
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    for key, norm in norms.items():
        np.testing.assert_allclose(found[1][key], norm, rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with few images laid out like MNIST and few rows of the digits; examples write beside it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for stem, rows in (("train", 12 if FAKE else 600), ("t10k", 6 if FAKE else 100)):
        labels = rng.integers(0, 10, rows)
        images = rng.integers(0, 60, (rows, 28, 28))
        images[np.arange(rows), 2 * labels + 4] += 150
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", labels)
    with gzip.open(Path(examples.__file__).parent / "data" / "digits.csv.gz", "rt") as lines:
        few = [line for _, line in zip(range(64 if FAKE else 2000), lines)]
    (tmp_path / "digits.csv").write_text("".join(few))
    return tmp_path


@on_gpu
@pytest.mark.parametrize("name", ["xor", "digits", "lenet", "mlp", "softmax_regression"])
def test_example(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints is what it prints on the CPU, but for the device's name, its memory and the times."""
    source = [] if name == "xor" else ["--data", str(data / "digits.csv" if name == "digits" else data)]
    said, number = [], r"\d+(?:\.\d+)?"
    for device in ("cpu", "cuda"):
        epochs = "30" if name == "xor" else "1"
        assert cli(["run", name, "--device", device, "--epochs", epochs, *source]) == 0
        text = re.sub(r"[\d.]+ (s,|ms a step|KiB)|on cpu|on cuda", "", capsys.readouterr().out)
        said.append((re.sub(number, "#", text), [float(n) for n in re.findall(number, text)]))
    (text, numbers), (found_text, found) = said
    assert found_text == text and len(numbers) > 1
    np.testing.assert_allclose(found, numbers, rtol=2e-3, atol=2e-3)


@on_gpu
def test_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures, agrees with itself, and a second run measures nothing again."""
    import gpu
    options = "--small --workloads logreg --scales 1 --rounds 2 --round-ms 1 --parts steps kernels"
    engines = ["--engines", "graphflow", "graphflow-fed", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options.split(), *engines])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = found["steps"]["logreg x1"]
    assert rows.keys() == {"graphflow", "graphflow-fed"} and all(len(r["ms"]) == 2 for r in rows.values())
    assert rows["graphflow"]["losses"] == rows["graphflow-fed"]["losses"]
    assert len(found["kernels"]["logreg"]) > 3 and "logreg x1" in (tmp_path / "gpu.txt").read_text()
    before = (tmp_path / "gpu.json").stat().st_mtime_ns
    assert gpu.main() == 0 and (tmp_path / "gpu.json").stat().st_mtime_ns == before


# --- what is left behind

@on_gpu
def test_a_thousand_programs_leave_nothing_on_the_device() -> None:
    import pycuda.driver as driver

    from graphflow.runtime.cuda_device import Gpu
    x = gf.input("x", (None, 3))
    w = gf.parameter((3, 2), gf.init.normal(1.0), name="w")
    fed = np.ones((2, 3), np.float32)
    first = gf.function([x], gf.matmul(x, w), device="cuda")

    def free() -> int:
        gc.collect()
        with Gpu.get().current():
            return int(driver.mem_get_info()[0])

    def run(count: int) -> None:
        for _ in range(count):
            np.asarray(gf.function([x], gf.matmul(x, w), device="cuda", store=first.store)(fed))
    run(5)
    before = free()
    run(20 if FAKE else 1000)
    assert before - free() < (1 << 22), "the driver keeps some for itself, but not 4 KB a program"


# --- without a GPU

PARTS = {"layers": " or ".join(name.split()[0] for name in LAYERS),
         "language": "losses or functions or control or choices or random",
         "training": "optimizer or autocast or halves or thousand or example or benchmark",
         "workloads": "workloads"}


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("part", PARTS)
def test_on_the_simulated_gpu(part: str, tmp_path: Path) -> None:
    """The tests above that need a GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-k", PARTS[part], "-p", "no:xdist",
               "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=install(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "skipped" not in done.stdout, (done.stdout + done.stderr)[-6000:]
