"""The CUDA runtime: unmodified PyCUDA over a simulated GPU, against the CPU."""
from __future__ import annotations

import pytest
from fake_gpu import MISSING, install, run

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.xdist_group("cuda runtime")]

PRELUDE = """
import ctypes
import numpy as np
import graphflow as gf
rng = np.random.default_rng(0)
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_cuda_allocated.restype = ctypes.c_size_t

def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=tolerance, atol=tolerance)
"""

STEPS = """
def train(make, feeds, steps=3):
    stores = []
    for device in ("cuda", "cpu"):
        net = make(device)
        losses = [float(net(*feeds(i))) for i in range(steps)]
        stores.append((losses, net.store))
    (found, there), (wanted, here) = stores
    close(found, wanted)
    for name in here.names():
        close(there[name], here[name], 2e-5)
    return there
"""

LENET = STEPS + """
def lenet(device):
    x, t = gf.input("x", (None, 1, 28, 28)), gf.input("t", (None,), "int64")
    h = gf.nn.max_pool2d(gf.nn.conv2d(x, 6, 5), 2)
    h = gf.nn.max_pool2d(gf.nn.conv2d(h, 8, 5), 2)
    h = gf.nn.dropout(gf.nn.dense(gf.nn.flatten(h), 40, activation=gf.relu), 0.3)
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(h, 10), t)
    return gf.function([x, t], loss, gf.optim.Adam(1e-3).minimize(loss), device=device)

data = [(rng.standard_normal((3, 1, 28, 28), dtype=np.float32), rng.integers(0, 10, 3)) for _ in range(3)]
train(lenet, lambda i: data[i])
print("same")
"""

LSTM = STEPS + """
def chars(device):
    x, t = gf.input("x", (4, 7), "int64"), gf.input("t", (4, 7), "int64")
    h, _ = gf.nn.lstm(gf.nn.embedding(x, 11, 6), 9)
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(h, 11), t)
    return gf.function([x, t], loss, gf.optim.SGD(0.1).minimize(loss), device=device)

data = [rng.integers(0, 11, (2, 4, 7)) for _ in range(3)]
train(chars, lambda i: tuple(data[i]))
print("same")
"""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install(tmp_path_factory.mktemp("gpu"))


def good(code: str, gpu: dict[str, str], **more: str) -> str:
    done = run(PRELUDE + code, gpu, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert not done.stderr, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("code", [LENET, LSTM], ids=["lenet", "lstm"])
def test_training_steps(code: str, gpu: dict[str, str]) -> None:
    assert good(code, gpu) == "same\n"
