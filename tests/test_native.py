"""Targets, object code, loading and freeing it, the default number of threads."""
from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import numpy as np
import pytest
from native_code import load_module

from graphflow.compiler.emit.builder import F32, F64, I64, PTR, Module
from graphflow.compiler.emit.object import assembly, compile_object, llvm_version
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.errors import CompilerError, DeviceError, UseError
from graphflow.compiler.target import host_target, make_target
from graphflow.runtime import native

pytestmark = pytest.mark.cpu


def sum_module() -> Module:
    module = Module()
    b = module.function("total", [("n", I64)], I64)
    with b.loop(0, b.params[0], carry=[b.sub(b.params[0], b.params[0])]) as loop:
        loop.next(b.add(loop.carry[0], loop.index))
    b.ret(loop.results[0])
    return module


def test_load_call_and_keep_alive() -> None:
    library = load_module(sum_module(), ["total"])
    total = library.function("total", ctypes.c_int64, ctypes.c_int64)
    del library
    gc.collect()
    assert [total(n) for n in (0, 1, 10, 100_000)] == [sum(range(n)) for n in (0, 1, 10, 100_000)]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_freed_with_the_library() -> None:
    module = Module()
    ballast = module.data("ballast", np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8))
    module.function("where", [], PTR).ret(ballast)
    code = compile_object(module.text(), host_target())
    native.load_object(code, "ballast", ["where"])
    gc.collect()
    gc.freeze()                                    # what other tests left behind need not be walked each time
    before = resident_bytes()
    for _ in range(100):
        native.load_object(code, "ballast", ["where"])
        gc.collect()
    assert resident_bytes() - before < 40 << 20


def test_process_symbols_are_found() -> None:
    module = Module()
    b = module.function("after", [("x", F64), ("y", F64)], F64)
    b.ret(b.call("nextafter", F64, b.params))
    after = load_module(module, ["after"]).function("after", *[ctypes.c_double] * 3)
    assert after(1.0, 2.0) == np.nextafter(1.0, 2.0)


def test_unknown_symbols_are_refused() -> None:
    module = Module()
    b = module.function("broken", [("x", F64)], F64)
    b.ret(b.call("graphflow_no_such_function", F64, b.params))
    code = compile_object(module.text(), host_target())
    with pytest.raises(CompilerError, match="object code of broken cannot be loaded"):
        native.load_object(code, "broken", ["broken"])
    with pytest.raises(CompilerError, match="cannot be loaded"):
        native.load_object(b"no object", "broken", ["broken"])


def test_refused_ir_is_kept_in_the_error() -> None:
    with pytest.raises(CompilerError, match="LLVM refuses") as caught:
        compile_object("define i32 @f() {\n  ret float 0.0\n}", host_target())
    assert caught.value.dump is not None and "ret float" in caught.value.dump


def test_assembly_and_versions() -> None:
    assert "total" in assembly(sum_module().text(), host_target())
    assert "llvm" in llvm_version()


def test_target_of_this_machine() -> None:
    target = host_target()
    assert target.lanes(dtypes.F32) * 4 == target.lanes(dtypes.F64) * 8 == target.vector_bytes
    assert target.lanes(dtypes.BOOL) == target.lanes(dtypes.F32)
    assert 0 < target.l1 <= target.l2
    assert target is host_target() and target.cpu in target.key()


AVX512 = {"avx512f": True, "avx512dq": True, "avx512bw": True, "avx512vl": True}


@pytest.mark.parametrize("features, vector_bytes, registers", [
    ({}, 16, 16), ({"avx2": True, "fma": True}, 32, 16), ({"avx2": True, "fma": True, **AVX512}, 64, 32),
])
def test_vector_width_follows_the_features(
    features: dict[str, bool], vector_bytes: int, registers: int
) -> None:
    target = make_target("x86_64-unknown-linux-gnu", "skylake-avx512", features, {1: 49152})
    assert (target.vector_bytes, target.vector_registers, target.l1) == (vector_bytes, registers, 49152)


def test_avx512_uses_whole_registers() -> None:
    module = Module()
    b = module.function("double", [("x", PTR)])
    x = b.load(F32.vector(16), b.params[0])
    b.store(b.add(x, x), b.params[0])
    b.ret()
    target = make_target("x86_64-unknown-linux-gnu", "skylake-avx512", AVX512, {})
    text = assembly(module.text(), target)
    assert "%zmm0" in text and "ymm" not in text


def test_unsupported_machines_are_refused() -> None:
    with pytest.raises(DeviceError, match="x86-64 and arm64, not for riscv64"):
        make_target("riscv64-unknown-linux-gnu", "generic", {}, {})
    with pytest.raises(DeviceError, match="Windows"):
        make_target("x86_64-pc-windows-msvc", "generic", {}, {})


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHFLOW_THREADS", raising=False)
    assert 1 <= native.default_threads() <= (os.cpu_count() or 1)
    monkeypatch.setenv("GRAPHFLOW_THREADS", "3")
    assert native.default_threads() == 3
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("GRAPHFLOW_THREADS", wrong)
        with pytest.raises(UseError, match="GRAPHFLOW_THREADS"):
            native.default_threads()


def test_cpu_quota(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    group = tmp_path / "cgroup" / "outer" / "inner"
    group.mkdir(parents=True)
    membership.write_text("0::/outer/inner\n")
    assert native._cpu_quota(tmp_path / "cgroup", membership) is None
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert native._cpu_quota(tmp_path / "cgroup", membership) == 1.5
    old = tmp_path / "cgroup" / "cpu,cpuacct" / "box"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    membership.write_text("4:cpu,cpuacct:/box\n3:memory:/box\n")
    assert native._cpu_quota(tmp_path / "cgroup", membership) == 0.5
    assert native._cpu_quota(tmp_path / "cgroup", tmp_path / "absent") is None
