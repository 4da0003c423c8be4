"""The thread pool: every task exactly once, by a worker of the team; help, reuse, nesting, forks, parking."""
from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_code import address, load_module

from graphflow.compiler.emit.builder import I64, PTR, VOID, Module, Value
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.emit.pool import pool_ir, pool_object
from graphflow.compiler.target import host_target, make_target
from graphflow.runtime.native import Library, install_pool, thread_pool

pytestmark = pytest.mark.cpu

TASK_PARAMS = [("args", PTR), ("begin", I64), ("end", I64), ("worker", I64)]


@pytest.fixture(scope="module")
def library() -> Library:
    """`mark` counts each index and notes its worker; `nest` and `repeat` call the pool."""
    module = Module()
    b = module.function("mark", TASK_PARAMS)
    args, begin, end, worker = b.params
    with b.loop(begin, end) as loop:
        count_at = b.gep(args, b.mul(loop.index, 2), I64)
        b.store(b.add(b.load(I64, count_at), 1), count_at)
        b.store(worker, b.gep(count_at, 1, I64))
    b.ret()
    b = module.function("nest", TASK_PARAMS)
    args, begin, end, worker = b.params
    pool = b.load(PTR, b.gep(args, -1, I64))
    with b.loop(begin, end) as loop:
        inner = b.gep(args, b.mul(loop.index, 20), I64)
        b.call_address(pool, VOID, [Value(PTR, "@mark"), inner, Value(I64, "10"), Value(I64, "4")])
    b.ret()
    params = [("pool", PTR), ("args", PTR), ("tasks", I64), ("threads", I64), ("n", I64)]
    b = module.function("repeat", params)
    pool, args, tasks, threads, n = b.params
    with b.loop(0, n):
        b.call_address(pool, VOID, [Value(PTR, "@mark"), args, tasks, threads])
    b.ret()
    return load_module(module, ["mark", "nest", "repeat"])


@pytest.fixture(scope="module")
def parallel() -> Any:
    pointer = install_pool(pool_object(host_target()))
    assert thread_pool() == pointer
    assert install_pool(b"not even an object: the process has its pool") == pointer
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(pointer)


def check_marks(marks: np.ndarray, tasks: int, threads: int, times: int = 1) -> None:
    np.testing.assert_array_equal(marks[:tasks, 0], times)
    assert np.all((0 <= marks[:tasks, 1]) & (marks[:tasks, 1] < max(1, min(tasks, threads))))


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 2, 1])
@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 5, 64, 1001, 65536, 200_003])
def test_each_task_runs_once(library: Library, parallel: Any, tasks: int, threads: int) -> None:
    marks = np.zeros((tasks + 1, 2), np.int64)
    parallel(library.address("mark"), marks.ctypes.data, tasks, threads)
    check_marks(marks, tasks, threads)
    np.testing.assert_array_equal(marks[tasks], 0)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_many_calls(library: Library, parallel: Any, threads: int) -> None:
    marks = np.zeros((7, 2), np.int64)
    repeat = library.function("repeat", None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)
    start = time.perf_counter()
    repeat(thread_pool(), address(marks), 7, threads, 2000)
    seconds = time.perf_counter() - start
    print(f"{threads} threads: {seconds / 2000 * 1e6:.2f} us a call")
    check_marks(marks, 7, threads, 2000)


def test_others_take_over_a_share_that_is_not_run(library: Library, parallel: Any) -> None:
    """Who gets task 0 waits until all tasks behind that piece are done: those of its own share too."""
    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    def task(_: int, begin: int, end: int, worker: int) -> None:
        limit = time.monotonic() + 20
        while begin == 0 and done[end:].sum() < 64 - end and time.monotonic() < limit:
            time.sleep(0.001)
        waited.append(time.monotonic() < limit)
        done[begin:end] = 1
        who[begin:end] = worker

    done, who, waited = np.zeros(64, np.int64), np.zeros(64, np.int64), []
    parallel(ctypes.cast(task, ctypes.c_void_p), None, 64, 2)
    assert all(waited) and done.all()
    assert np.count_nonzero(who != who[0]) >= 48 or who[0] == 1     # unless the caller itself was late


def test_teams_of_changing_size(library: Library, parallel: Any) -> None:
    """More workers than processors, some of which are late for a call that has long been over."""
    marks, count = np.zeros((300, 2), np.int64), np.zeros(300, np.int64)
    rng = np.random.default_rng(0)
    for tasks, threads in zip(rng.integers(1, 300, 3000).tolist(), rng.integers(1, 9, 3000).tolist()):
        parallel(library.address("mark"), marks.ctypes.data, tasks, threads)
        count[:tasks] += 1
        assert np.array_equal(marks[:, 0], count)
        assert np.all(marks[:tasks, 1] < min(tasks, threads))


def test_calls_after_parking(library: Library, parallel: Any) -> None:
    marks = np.zeros((8, 2), np.int64)
    for _ in range(20):
        parallel(library.address("mark"), marks.ctypes.data, 8, 4)
        time.sleep(0.003)
    check_marks(marks, 8, 4, 20)


def test_idle_workers_use_no_processor(library: Library, parallel: Any) -> None:
    marks = np.zeros((8, 2), np.int64)
    parallel(library.address("mark"), marks.ctypes.data, 8, 4)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_nested_call_runs_inline(library: Library, parallel: Any) -> None:
    memory = np.zeros(1 + 6 * 20, np.int64)
    memory[0] = thread_pool()
    parallel(library.address("nest"), memory[1:].ctypes.data, 6, 3)
    inner = memory[1:].reshape(6 * 10, 2)
    np.testing.assert_array_equal(inner[:, 0], 1)
    np.testing.assert_array_equal(inner[:, 1], 0)


def test_calls_from_several_threads(library: Library, parallel: Any) -> None:
    marks = np.zeros((3, 50, 2), np.int64)

    def work(own: np.ndarray) -> None:
        for _ in range(300):
            parallel(library.address("mark"), own.ctypes.data, 50, 4)

    callers = [threading.Thread(target=work, args=(own,)) for own in marks]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    np.testing.assert_array_equal(marks[:, :, 0], 300)


def test_pool_works_in_a_forked_child(library: Library, parallel: Any) -> None:
    marks = np.zeros((9, 2), np.int64)
    parallel(library.address("mark"), marks.ctypes.data, 9, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
        child = os.fork()
    if child == 0:
        try:
            own = np.zeros((9, 2), np.int64)
            parallel(library.address("mark"), own.ctypes.data, 9, 3)
            check_marks(own, 9, 3)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    parallel(library.address("mark"), marks.ctypes.data, 9, 3)
    check_marks(marks, 9, 3, 2)


def test_two_processes_share_the_machine() -> None:
    test = f"{Path(__file__).name}::test_many_calls"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    start = time.perf_counter()
    children = [subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
                for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    print(f"two processes: {time.perf_counter() - start:.2f} s")


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin22"])
def test_pool_compiles_for_arm64(triple: str) -> None:
    target = make_target(triple, "generic", {"neon": True}, {})
    assert b"gf_parallel" in compile_object(pool_ir(target), target)
