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


# --- what stays where


def test_states_move_only_when_they_must(gpu: dict[str, str]) -> None:
    """Programs of the GPU and of the CPU share one Store, and each sees what the other made."""
    code = """
x = gf.input("x", (2, 3))
w = gf.parameter((3, 2), gf.init.normal(1.0), name="w")
y = gf.matmul(x, w)
update = {w: w * 0.5 + gf.sum(y)}
step = gf.function([x], y, update, device="cuda")
look = gf.function([x], y, device="cpu", store=step.store)
a = rng.standard_normal((2, 3), dtype=np.float32)
expected = step.store["w"]
for i in range(5):
    result = step(a)
    close(result, a @ expected)
    expected = expected * 0.5 + (a @ expected).sum()
copies = fake.fake_cuda_calls(b"cuMemcpyDtoHAsync_v2")
for i in range(5):
    step(a)
    expected = expected * 0.5 + (a @ expected).sum()
assert fake.fake_cuda_calls(b"cuMemcpyDtoHAsync_v2") == copies, "results that nobody reads were fetched"
assert fake.fake_cuda_calls(b"cuGraphLaunch") == 10
assert fake.fake_cuda_calls(b"cuGraphInstantiateWithFlags") == 2
close(step.store["w"], expected)
close(look(a), a @ expected)
step.store["w"] = np.ones((3, 2), np.float32)
close(step(a), a @ np.ones((3, 2)))
both = gf.function([x], y, {w: w + 1.0}, device="cpu", store=step.store)
before = step.store["w"]
both(a)
close(step(a), a @ (before + 1))
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_results_are_kept_while_somebody_holds_them(gpu: dict[str, str]) -> None:
    code = """
x = gf.input("x", (None,))
p = gf.function([x], {"double": x * 2.0, "sum": gf.sum(x)}, device="cuda")
held = [p(np.full(4, i, np.float32)) for i in range(6)]
for i, r in enumerate(held):
    close(r["double"], np.full(4, 2 * i)); assert float(r["sum"]) == 4 * i
    assert (r["double"] + 1).tolist() == [2 * i + 1] * 4 and r["double"].shape == (4,) and f"{r['sum']:.1f}"
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_loops_and_branches_that_values_decide(gpu: dict[str, str]) -> None:
    code = """
x = gf.input("x", (3,))
made = [gf.while_loop(lambda v: gf.sum(v) < 100.0, lambda v: v * 2.0, x, limit=50),
        gf.cond(gf.sum(x) > 3.5, lambda: x + 1.0, lambda: x - 1.0)]
there, here = (gf.function([x], made, device=d) for d in ("cuda", "cpu"))
for a in (np.ones(3, np.float32), np.full(3, 7.0, np.float32)):
    for found, wanted in zip(there(a), here(a)):
        close(found, wanted)
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_a_check_that_fails_changes_nothing(gpu: dict[str, str]) -> None:
    code = """
x, t = gf.input("x", (2, 3)), gf.input("t", (2,), "int64")
w = gf.parameter((3, 4), gf.init.normal(1.0), name="w")
loss = gf.loss.softmax_cross_entropy(gf.matmul(x, w), t)
step = gf.function([x, t], loss, gf.optim.SGD(0.1).minimize(loss), device="cuda")
a = rng.standard_normal((2, 3), dtype=np.float32)
step(a, np.array([0, 3]))
before = step.store["w"]
try:
    step(a, np.array([0, 4]))
except gf.FeedError as error:
    assert "t" in str(error)
else:
    raise AssertionError("the label 4 of 4 classes was taken")
np.testing.assert_array_equal(step.store["w"], before)
float(step(a, np.array([0, 1])))
assert (step.store["w"] != before).any()
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_programs_leave_nothing_on_the_device(gpu: dict[str, str]) -> None:
    code = """
import gc
x = gf.input("x", (None, 3))
w = gf.parameter((3, 2), gf.init.normal(1.0), name="w")
first = gf.function([x], gf.matmul(x, w), device="cuda")
a = np.ones((2, 3), np.float32)
first(a)
gc.collect()
before = fake.fake_cuda_allocated(), fake.fake_cuda_handles()
for i in range(1000):
    p = gf.function([x], gf.matmul(x, w), device="cuda", store=first.store)
    p(a)
for i in range(3):
    if i == 1:                                        # the working memory has grown, for all programs to come
        del p, q, r, kept, held
        gc.collect()
        assert fake.fake_cuda_handles() == before[1]
        before = fake.fake_cuda_allocated(), fake.fake_cuda_handles()
    t = gf.input("t", (None,), "int64")
    loss = gf.loss.softmax_cross_entropy(gf.matmul(x, w), t)
    p = gf.function([x, t], [loss, x + 1.0], device="cuda", store=first.store)
    kept, labels = gf.device_array(np.ones((4, 5, 3), np.float32)), np.zeros((4, 5), np.int64)
    held = p.run(kept, labels)
    r = gf.function([x], x * 2.0, device="cuda", store=first.store)
    p(p(kept.fetch()[0], labels[0])[1], labels[0]), r.run(held[1])
    labels[2] = 7
    try:
        p.run(kept, labels)
    except gf.FeedError as error:
        assert "step 2 of 4" in str(error), error
    rows = gf.input("rows", (4, 6, 3))
    q = gf.function([rows], gf.nn.lstm(rows, 5)[0], device="cuda")
    q(np.ones((4, 6, 3), np.float32)), q.run(np.ones((2, 4, 6, 3), np.float32))
assert fake.fake_cuda_calls(b"cuLaunchCooperativeKernel") > 0
del p, q, r, kept, held
gc.collect()
assert (fake.fake_cuda_allocated(), fake.fake_cuda_handles()) == before, (fake.fake_cuda_handles(), before)
print("same")
"""
    assert good(code, gpu) == "same\n"


# --- many steps in one call, and feeds that are on the device


def test_many_steps(gpu: dict[str, str]) -> None:
    """As calls on the CPU one after the other; what is sent, and when the host waits."""
    code = """
def make(device):
    x, t, rate = gf.input("x", (None, 5)), gf.input("t", (None,), "int64"), gf.input("rate", ())
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(x, 4, gf.relu), t)
    return gf.function([x, t, rate], [loss, x * rate], gf.optim.SGD(rate).minimize(loss), device=device)

xs, ts = rng.standard_normal((6, 3, 5), dtype=np.float32), rng.integers(0, 4, (6, 3))
there, here = make("cuda"), make("cpu")
there(xs[0], ts[0], 0.1), here(xs[0], ts[0], 0.1)
count = lambda name: fake.fake_cuda_calls(name.encode())
before = {name: count(name) for name in ("cuMemcpyHtoDAsync_v2", "cuGraphLaunch", "cuMemcpyDtoHAsync_v2")}
found, wanted = there.run(xs, ts, 0.1), here.run(xs, ts, 0.1)
now = {name: count(name) - number for name, number in before.items()}
assert now == {"cuMemcpyHtoDAsync_v2": 3, "cuGraphLaunch": 6, "cuMemcpyDtoHAsync_v2": 1}, now
for a, b in zip(found, wanted):
    assert a.shape == b.shape and a.on_device
    close(a, b); assert not a.on_device
kept = gf.device_array(xs), gf.device_array(ts)
before = count("cuMemcpyHtoDAsync_v2")
again = there.run(*kept, np.full(6, 0.1, np.float32), steps=6)
assert count("cuMemcpyHtoDAsync_v2") == before + 1
for a, b in zip(again, here.run(xs, ts, 0.1)):
    close(a, b)
for name in here.store.names():
    close(there.store[name], here.store[name])
ts[4, 1] = 4
try:
    there.run(xs, ts, 0.1)
except gf.FeedError as error:
    assert "step 4 of 6, counted from 0: feed 't': the labels must lie in 0..3" in str(error), error
assert there.store["rng.step"] == 17, there.store["rng.step"]
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_results_on_the_device_are_fed_without_the_host(gpu: dict[str, str]) -> None:
    code = """
h, x = gf.input("h", (2, 3)), gf.input("x", (2, 3))
w = gf.parameter((3, 3), gf.init.normal(0.5), name="w")
cell = gf.function([h, x], gf.tanh(gf.matmul(h, w) + x), device="cuda")
state, want = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
xs = rng.standard_normal((7, 2, 3), dtype=np.float32)
for x in xs:
    fetched = fake.fake_cuda_calls(b"cuMemcpyDtoHAsync_v2")
    state = cell(state, x)
    assert fake.fake_cuda_calls(b"cuMemcpyDtoHAsync_v2") == fetched, "the state went through the host"
    want = np.tanh(want @ cell.store["w"] + x)
    old = state
close(state, want)
rows = gf.input("rows", (None, 2, 3))
total = gf.function([rows], gf.sum(rows, axis=0), device="cuda")
stacked = cell.run(np.zeros((2, 3), np.float32), xs)
close(total(stacked), np.tanh(xs).sum(0))
assert stacked.on_device
kept = gf.device_array(xs)
kept.fetch()[...] = 0
close(kept, xs); close(cell.run(kept, xs), np.tanh(xs @ cell.store["w"] + xs)); close(kept + 1, xs + 1)
on_cpu = gf.function([rows], rows * 2.0)
close(on_cpu(kept), 2 * xs)
try:
    cell(gf.device_array(np.zeros((2, 3))), x)
except gf.FeedError as error:
    assert "must be float32, got float64" in str(error)
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_checks_of_other_values_and_loops_in_many_steps(gpu: dict[str, str]) -> None:
    """A check that looks at a parameter waits for the step before; a loop that a value ends is no graph."""
    code = """
x = gf.input("x", ())
for device in ("cuda", "cpu"):
    w = gf.parameter((), 8.0, name="w")
    p = gf.function([x], gf.check(x * w, w * x > 1.0, "x * w must be above 1"), {w: w * 0.5}, device=device)
    try:
        p.run(np.ones(6, np.float32))
    except gf.FeedError as error:
        assert "step 3 of 6, counted from 0: x * w must be above 1" in str(error), error
    assert p.store["w"] == 1.0
grown = gf.while_loop(lambda v: v < 100.0, lambda v: v * 2.0, x, limit=50)
there, here = (gf.function([x], grown, device=d) for d in ("cuda", "cpu"))
xs = np.array([1.0, 3.0, 200.0], np.float32)
close(there.run(xs), here.run(xs))
print("same")
"""
    assert good(code, gpu) == "same\n"


def test_ctrl_c_between_steps(gpu: dict[str, str]) -> None:
    code = """
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)          # which a job in the background has not
x, w = gf.input("x", (), "int64"), gf.parameter((), 0, name="w", dtype="int64")
count = gf.function([x], w, {w: w + x}, device="cuda")
count(1)
def press():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.001)                                                # the steps have not begun
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
try:
    count.run(1, steps=10_000_000)
except KeyboardInterrupt as error:
    done = int(str(error).split()[1])
assert count.store["w"] == done + 1, (count.store["w"], done)
print("same")
"""
    assert good(code, gpu) == "same\n"


# --- loops in one launch

LOOPS = """
def bits(device, cell):
    x, t = gf.input("x", (6, 7), "int64"), gf.input("t", (6, 7), "int64")
    h, _ = cell(gf.nn.embedding(x, 11, 6), 40)
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(h, 11), t)
    step = gf.function([x, t], loss, gf.optim.SGD(0.1).minimize(loss), device=device)
    data = np.random.default_rng(5).integers(0, 11, (3, 2, 6, 7))
    losses = [float(step(*pair)) for pair in data]
    return step, np.concatenate([losses, *(step.store[n].ravel() for n in step.store.names("parameter"))])
"""


def test_loops_in_one_launch(gpu: dict[str, str]) -> None:
    """To the bit what launches one by one give; as many blocks as the kernels have wait for each other."""
    code = LOOPS + """
import sys
for cell in (gf.nn.lstm, gf.nn.rnn):
    step, found = bits("cuda", cell)
    _, wanted = bits("cpu", cell)
    close(found, wanted, 2e-5)
    sys.stdout.write(found.tobytes().hex() + " ")
calls = fake.fake_cuda_calls(b"cuLaunchCooperativeKernel")
from graphflow.compiler.emit import cuda
blocks = cuda.re.findall(r"if .blockIdx.x < (\\d+)", step.text("emit"))
assert max(map(int, blocks)) > 1, "one block waits for none"
if calls:
    cuda.BARRIER = cuda.BARRIER.replace("< 0x80000000u)", "< 0u)")
    missed = bits("cuda", gf.nn.lstm)[1]
    assert not np.allclose(missed, bits("cpu", gf.nn.lstm)[1], atol=1e-3), "a barrier that waits for none"
print(calls)
"""
    *together, calls = good(code, gpu, FAKE_CUDA_RESIDENT="1", GRAPHFLOW_CACHE="off").split()
    *separate, none = good(code, gpu, FAKE_CUDA_RESIDENT="0", GRAPHFLOW_CACHE="off").split()
    assert together == separate and int(calls) > 0 and int(none) == 0


def test_a_driver_that_captures_no_such_loops(gpu: dict[str, str]) -> None:
    code = LOOPS + """
step, found = bits("cuda", gf.nn.lstm)
close(found, bits("cpu", gf.nn.lstm)[1], 2e-5)
assert fake.fake_cuda_calls(b"cuLaunchCooperativeKernel") == 1
print("same")
"""
    assert good(code, gpu, FAKE_CUDA_FAIL="cuLaunchCooperativeKernel:1:801") == "same\n"


# --- what goes wrong

USE = """
x = gf.input("x", (None, 3))
w = gf.parameter((3, 2), gf.init.normal(1.0), name="w")
a = np.ones((2, 3), np.float32)
try:
    step = gf.function([x], gf.sum(gf.matmul(x, w)), {w: w * 0.5}, device="cuda")
    for i in range(3):
        float(step(a))
    np.asarray(step.run(np.ones((9, 1, 3), np.float32)))
    float(step(np.ones((400000, 3), np.float32)))
    print("done")
except gf.DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"FAKE_CUDA_DEVICES": "0"}, "the NVIDIA driver finds no GPU"),
        ({"FAKE_CUDA_VERSION": "11040"}, "the NVIDIA driver is for CUDA 11.4, older than 12.0"),
        ({"FAKE_CUDA_FAIL": "cuInit:1:999"}, "the NVIDIA driver does not start (cuInit returned 999)"),
        ({"FAKE_CUDA_FAIL": "cuDevicePrimaryCtxRetain:1:2"}, "the GPU does not start"),
        ({"FAKE_CUDA_FAIL": "cuGraphLaunch:2:719"}, "the GPU failed: "),
        ({"FAKE_CUDA_FAIL": "cuMemcpyDtoHAsync_v2:1:700"}, "the GPU failed: "),
        ({"FAKE_CUDA_FAIL": "cuModuleLoadDataEx:1:200"}, "the GPU failed: "),
        ({"FAKE_CUDA_FAIL": "cuStreamBeginCapture_v2:1:1"}, "the GPU failed: "),
        ({"FAKE_CUDA_MEMORY": "1000000"}, "bytes on the GPU"),
        ({"FAKE_CUDA_FAIL": "cuMemAllocAsync:1:2"}, "feeds of function needs 108 bytes on the GPU"),
        ({"FAKE_CUDA_FAIL": "cuMemAllocAsync:2:2"}, "outputs of function needs 36 bytes on the GPU"),
        ({"FAKE_CUDA_FAIL": "cuMemAllocAsync:1:801"}, "the GPU failed: cuMemAllocAsync failed"),
        ({"FAKE_CUDA_FAIL": "cuGraphLaunch:5:719"}, "the GPU failed: "),
        ({"FAKE_CUDA_FAIL": "cuMemFreeAsync:1:700"}, "done"),
    ],
    ids=["no device", "old driver", "no start", "no context", "launch", "copy", "module", "capture",
         "memory", "stacked feeds", "stacked outputs", "no pools", "launch of a step", "free"],
)
def test_faults_are_clear_errors(wrong: dict[str, str], said: str, gpu: dict[str, str]) -> None:
    """And the process lives on: it ends by itself, with status 0."""
    assert said in good(USE, gpu, **wrong)


def test_devices_tell_what_is_there(gpu: dict[str, str]) -> None:
    code = "from graphflow.runtime.device import devices\nprint([d.describe() for d in devices()][1])"
    assert good(code, gpu) == "cuda       NVIDIA GPUs: 1; Simulated GPU\n"


def test_the_plan_has_what_the_assembler_reports(gpu: dict[str, str]) -> None:
    code = """
x = gf.input("x", (None, 3))
p = gf.function([x], gf.softmax(x), device="cuda")
p(np.ones((2, 3), np.float32))
print(p.text("plan"))
print(p.text("emit"))
"""
    text = good(code, gpu)
    assert "threads 256 symbols [N] registers 32 shared 64 spilled 0" in text.replace("[batch]", "[N]")
    assert "__global__" in text


def test_launches_ask_for_shared_memory(gpu: dict[str, str]) -> None:
    """More than a kernel may declare; a device that has less says so."""
    code = """
x, w = gf.input("x", (1408, 16)), gf.input("w", (16, 3072))
p = gf.function([x, w], gf.matmul(x, w), device="cuda")
a, b = rng.standard_normal((1408, 16), dtype=np.float32), rng.standard_normal((16, 3072), dtype=np.float32)
try:
    close(p(a, b), a @ b, 1e-4)
    print(fake.fake_cuda_calls(b"cuFuncSetAttribute"), "dynamic 75264" in p.text("plan"))
except gf.DeviceError as error:
    print(error)
"""
    assert good(code, gpu) == "1 True\n"
    assert "needs 75,264 bytes of shared memory" in good(code, gpu, FAKE_CUDA_SHARED="49152")


def test_arrays_that_32_bits_cannot_count_are_refused(gpu: dict[str, str]) -> None:
    code = """
x = gf.input("x", (None,))
p = gf.function([x], gf.broadcast_to(gf.reshape(x, (-1, 1)), (x.shape[0], 2 ** 20)), device="cuda")
try:
    p(np.ones(1024, np.float32))
except NotImplementedError as error:
    print(error)
"""
    assert "which the code for GPUs does not count" in good(code, gpu)


def test_a_forked_child_is_told_that_it_cannot(gpu: dict[str, str]) -> None:
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
x = gf.input("x", (3,))
p = gf.function([x], x + 1.0, device="cuda")
close(p(np.zeros(3, np.float32)), np.ones(3))
child = os.fork()
if child == 0:
    try:
        p(np.zeros(3, np.float32))
    except gf.DeviceError as error:
        os._exit(7 if "was forked" in str(error) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
close(p(np.ones(3, np.float32)), np.full(3, 2.0))
print("same")
"""
    assert good(code, gpu) == "same\n"
