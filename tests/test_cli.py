"""The command line: what it prints, its exit status, one line for errors of use; the examples, trained a
little."""
from __future__ import annotations

import gzip
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphflow.cli import examples, main
from graphflow.compiler.driver import NAMES
from graphflow.compiler.ops import OPS


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write below the working directory."""
    monkeypatch.chdir(tmp_path)


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder laid out like MNIST: ten classes, each of which lights up a row of its own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for stem, rows in (("train", 600), ("t10k", 100)):
        labels = rng.integers(0, 10, rows)
        images = rng.integers(0, 60, (rows, 28, 28))
        images[np.arange(rows), 2 * labels + 4] += 150
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels)
    return folder


def error_of(capsys: Any, *arguments: str) -> str:
    """The one line that the command prints when it is used wrongly."""
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert found.err.startswith("graphflow: ") and found.err.count("\n") == 1
    return found.err.strip()


def test_list(capsys: Any) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == examples()
    assert {"digits", "lenet", "mlp", "softmax_regression", "xor"} <= set(examples())
    assert all(len(line.split()) > 4 for line in lines)


def test_devices(capsys: Any) -> None:
    assert main(["devices"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["cpu", "cuda", "cuda-tf32", "reference", "null"]


def test_ops(capsys: Any) -> None:
    assert main(["ops"]) == 0
    text = capsys.readouterr().out
    for name, record in OPS.items():
        assert f" {name}(" in text and record.doc in text


@pytest.mark.cpu
def test_xor(capsys: Any) -> None:
    assert main(["run", "xor"]) == 0
    text = capsys.readouterr().out
    said = dict(re.findall(r"(\d xor \d) = (\d\.\d+)", text))
    assert {case: round(float(value)) for case, value in said.items()} == {
        "0 xor 0": 0, "0 xor 1": 1, "1 xor 0": 1, "1 xor 1": 0}
    assert "accuracy 100%" in text


@pytest.mark.cpu
def test_digits(capsys: Any, tmp_path: Path) -> None:
    assert main(["run", "digits", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    accuracy = re.search(r"test accuracy (\d+\.\d+)% on 360 digits", text)
    assert accuracy and float(accuracy[1]) >= 97
    assert re.search(r"working memory of a training step: \d+ KiB", text) and "ms a step" in text
    assert [p.stem for p in (tmp_path / "out" / "digits").iterdir() if p.is_file()] == ["misread"]
    assert (tmp_path / "out" / "digits" / "dump" / "01.trace.txt").is_file()


@pytest.mark.cpu
def test_null_computes_nothing_but_plans(capsys: Any) -> None:
    assert main(["run", "xor", "--device", "null", "--epochs", "1"]) == 0
    assert "loss 0.00000" in capsys.readouterr().out


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["softmax_regression", "mlp"])
def test_examples_on_mnist(capsys: Any, mnist: Path, name: str) -> None:
    assert main(["run", name, "--data", str(mnist), "--epochs", "5", "--quick"]) == 0
    accuracy = re.search(r"test accuracy (\d+\.\d+)%", capsys.readouterr().out)
    assert accuracy and float(accuracy[1]) > 90


@pytest.mark.cpu
def test_lenet_takes_a_step(capsys: Any, mnist: Path) -> None:
    assert main(["run", "lenet", "--data", str(mnist), "--quick"]) == 0
    assert re.search(r"10 steps in .*, loss \d", capsys.readouterr().out)


@pytest.mark.cpu
def test_dump_prints_a_stage_or_writes_all(capsys: Any, tmp_path: Path) -> None:
    assert main(["dump", "xor", "--stage", "trace"]) == 0
    assert capsys.readouterr().out.startswith("graph step\n")
    assert main(["dump", "xor", "-o", "here"]) == 0
    written = capsys.readouterr().out.split()
    stages = [p.name.split(".")[1] for p in sorted((tmp_path / "here").iterdir()) if p.suffix != ".graphml"]
    assert stages[:len(NAMES)] == list(NAMES) and all(Path(p).is_file() for p in written)


@pytest.mark.cpu
def test_dump_of_a_file_of_ones_own(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("import graphflow as gf\n\n\ndef build():\n    x = gf.input('x', (None, 2))\n"
                    "    return gf.function(x, gf.nn.dense(x, 3))\n")
    assert main(["dump", str(path)]) == 0
    assert (tmp_path / "out" / "net" / "dump" / "01.trace.txt").is_file()
    capsys.readouterr()
    path.write_text("import graphflow as gf\n\n\ndef build():\n    x = gf.input('x', (2, 3))\n    return x "
                    "@ x\n")
    assert main(["dump", str(path)]) == 2
    text = capsys.readouterr().err
    assert "matmul contracts an axis of 3 with one of 2" in text and "net.py:6: return x @ x" in text


def test_files_that_cannot_be_dumped(capsys: Any, tmp_path: Path) -> None:
    cases = {"": "has no function build()", "def build():\n    return 3\n": "build() returned int, neither",
             "def (": "line 1: "}
    for text, message in cases.items():
        (tmp_path / "net.py").write_text(text)
        assert message in error_of(capsys, "dump", "net.py")
    assert error_of(capsys, "dump", "none.py") == "graphflow: there is no file none.py"
    assert "there is no stage 'nope'" in error_of(capsys, "dump", "xor", "--stage", "nope")


def test_errors_of_use_are_one_line(capsys: Any, tmp_path: Path) -> None:
    assert error_of(capsys, "run", "nope").startswith(
        "graphflow: there is no example 'nope' (the examples are digits")
    assert "there is no device 'tpu' (use one of cpu" in error_of(capsys, "run", "xor", "--device", "tpu")
    for name in ("lenet", "mlp", "softmax_regression"):
        assert error_of(capsys, "run", name) == ("graphflow: this example needs --data FOLDER: the four "
                                                 "files of "
                                                 "MNIST or Fashion-MNIST in IDX form")
    assert "no file train-images-idx3-ubyte" in error_of(capsys, "run", "mlp", "--data", str(tmp_path))
    assert "cannot be opened" in error_of(capsys, "run", "digits", "--data", "missing.csv")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["run", "xor", "--epochs", "0"],
                                       ["run", "xor", "--threads", "two"]])
def test_arguments_that_are_none(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: graphflow" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m graphflow.cli ops | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True,
                          check=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
