"""NVIDIA's run-time compiler instead of nvcc: the same text, where there is no toolkit."""
from __future__ import annotations

import pytest
from nets import lenet_step, mlp_step

import graphflow as gf
from graphflow.compiler import cuda_target
from graphflow.compiler.cuda_target import (
    CudaTarget,
    compile_cubin,
    compiler_version,
    nvcc,
    nvrtc,
    with_figures,
)
from graphflow.compiler.driver import Compilation
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.plan.errors import CompilerError

pytestmark = pytest.mark.skipif(nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")
TARGET = CudaTarget("sm_90")


def lstm_step() -> Graph:
    x, t = gf.input("x", (8, 7), "int64"), gf.input("t", (8, 7), "int64")
    h, _ = gf.nn.lstm(gf.nn.embedding(x, 11, 16), 16)
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(h, 11), t)
    return gf.function([x, t], loss, gf.optim.Adam(0.1).minimize(loss)).traced


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_target, "nvcc", lambda: None)
    compiler_version.cache_clear()


@pytest.mark.parametrize("make", [mlp_step, lenet_step, lstm_step])
def test_every_kernel_compiles(make: object, no_toolkit: None) -> None:
    compilation = Compilation(make(), TARGET)
    plan, code = compilation.compile()
    assert code[:4] == b"\x7fELF" and compiler_version().startswith("nvrtc 1")
    assert "#include" not in compilation.text("emit"), "NVRTC has no headers"
    for f in plan.functions:
        assert 0 < f.registers * f.threads <= 65536, f
        assert f.spilled <= 128, f                            # nvcc's spill nothing, its are a little other
        assert f.name.encode() in code


@pytest.mark.skipif(not nvcc(), reason="there is no CUDA toolkit")
def test_shared_memory_is_that_of_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = Compilation(mlp_step(), TARGET)
    text, functions = compilation.text("emit"), compilation.result("plan").functions
    by_nvcc = with_figures(functions, compile_cubin(text, TARGET)[1])
    monkeypatch.setattr(cuda_target, "nvcc", lambda: None)
    by_nvrtc = with_figures(functions, compile_cubin(text, TARGET)[1])
    assert [f.shared for f in by_nvrtc] == [f.shared for f in by_nvcc]
    assert all(f.registers for f in (*by_nvrtc, *by_nvcc))


def test_what_it_refuses_is_told(no_toolkit: None) -> None:
    with pytest.raises(CompilerError, match="(?s)NVRTC refuses the generated code.*undefined"):
        compile_cubin('extern "C" __global__ void k(float* a) { a[0] = nothing; }', TARGET)
