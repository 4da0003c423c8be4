"""Training that is killed again and again, and gone on with, ends with the bits of training that was not."""
from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("training_process.py")
KILLS = 20

pytestmark = pytest.mark.cpu


def started(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "error", str(SCRIPT), str(folder)], bufsize=0,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[bytes], folder: Path) -> dict[str, np.ndarray]:
    """Lets the process train to its end; what it wrote."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    with np.load(folder / "result.npz") as result:
        return dict(result)


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Kills the process in the middle of some steps, or now and then while it starts."""
    assert process.stdin is not None and process.stdout is not None
    if chance.random() < 0.15:
        time.sleep(chance.uniform(0, 1))
    else:
        assert process.stdout.readline() == b"ready\n", process.communicate()[1].decode()
        process.stdin.write(bytes(chance.randrange(1, 25)))
        time.sleep(chance.uniform(0, 0.05))
    process.kill()
    process.communicate()


def test_training_killed_many_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    chance = random.Random(1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = finished(started(whole), whole)
    seen = set()
    for _ in range(KILLS):
        kill(started(broken), chance)
        seen |= {path.name for path in broken.glob("step-*")}
        assert not (broken / "result.npz").exists(), "it was finished before it had been killed often enough"
    assert len(seen) > KILLS / 2, "hardly any training was done between the kills"
    found = finished(started(broken), broken)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    assert not list(broken.glob(".checkpoint-*")) and len(list(broken.glob("step-*"))) == 2
