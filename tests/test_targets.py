"""Code for processors other than this one, read as assembly: the inner loops of products hold as many
multiply-adds as the register tile has vectors and spill none, functions are computed inline with vectors; and
the instruction sets that this machine can be told to keep to.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from native_code import targets
from nets import lenet_step

import graphflow as gf
from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.blocked import Blocked
from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.candidates import special
from graphflow.compiler.emit.module import emit_kernel
from graphflow.compiler.emit.object import assembly
from graphflow.compiler.emit.tiling import contraction_tiling
from graphflow.compiler.emit.winograd_images import winograd_images
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import ContractionKernel, Kernel, Reduce
from graphflow.compiler.kernel.text import parse_kernel
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.errors import DeviceError
from graphflow.compiler.target import Target, host_target, make_target
from graphflow.tensor import apply

pytestmark = pytest.mark.cpu
LINUX, ARM_LINUX, MACOS = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-darwin"
AVX2 = {"avx2": True, "fma": True, "f16c": True}
AVX512 = {**AVX2, **{f"avx512{part}": True for part in ("f", "dq", "bw", "vl")}}
PROCESSORS = {
    "x86-64": make_target(LINUX, "x86-64", {}, {}),
    "haswell": make_target(LINUX, "haswell", AVX2, {1: 32 << 10, 2: 256 << 10}),
    "znver3": make_target(LINUX, "znver3", AVX2, {1: 32 << 10, 2: 512 << 10}),
    "skylake-avx512": make_target(LINUX, "skylake-avx512", AVX512, {1: 32 << 10, 2: 1 << 20}),
    "neoverse-n1": make_target(ARM_LINUX, "neoverse-n1", {}, {1: 64 << 10, 2: 1 << 20}),
    "apple-m1": make_target(MACOS, "apple-m1", {}, {1: 128 << 10, 2: 4 << 20}),
}
FUSED, PRODUCT = re.compile(r"vfmadd\d+p[sd]\s|fmla(\.4s|\.2d)?\s"), re.compile(r"mulp[sd]\s")
SCALAR = re.compile(r"v?(fmadd\d+|mul|add|sub|div)s[sd]\s|f(madd|mul|add|sub|div)\s+[sd]\d")
VECTOR = re.compile(r"v?(fmadd\d+|mul|add|sub|div|max|min)p[sd]\s|f(mla|mul|add|sub|div|max|min)(\.4s|\.2d)")
STACK = re.compile(r"\(%rsp|\[sp\b")
CALL = re.compile(r"\s(?:callq?|bl|jmp|b)\s+_?([a-z]\w*)")
ALLOWED = {"memmove", "memcpy", "memset"}


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest) -> Target:
    return PROCESSORS[request.param]


def code(kernel: Kernel, target: Target) -> str:
    """The kernel's assembly."""
    module = Module()
    emit_kernel(module, kernel, target)
    return assembly(module.text(), target)


def inner_loops(text: str) -> Iterator[list[str]]:
    """The instructions of each loop that is one block: from a label to a jump back to it."""
    label, body = "", []
    for line in text.splitlines():
        found = re.match(r"(\.?L\w+):", line)
        if found:
            label, body = found[1], []
        elif line.startswith("\t") and not line.startswith("\t."):
            body.append(line.strip())
            if re.search(rf"{re.escape(label)}\b", line) and label:
                yield list(body)


def count(pattern: re.Pattern[str], body: list[str]) -> int:
    return sum(bool(pattern.search(line)) for line in body)


@cache
def lstm_step() -> Graph:
    n = gf.dim("N")
    x, y = gf.input("x", (n, 12, 40)), gf.input("y", (n,), "int64")
    hidden = gf.nn.lstm(x, 64)
    last = hidden[0] if isinstance(hidden, tuple) else hidden
    loss = gf.loss.softmax_cross_entropy(gf.nn.dense(last[:, -1], 10), y)
    return gf.function([x, y], loss, gf.optim.Adam(0.01).minimize(loss), name="step").traced


def kernels(graph: Graph, target: Target) -> list[Kernel]:
    return list(Compilation(graph, target).result("memory").kernels.values())


@pytest.mark.parametrize("form", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("m, n, k", [(512, 512, 512), (64, 500, 800), (96, 800, 1200)])
def test_products_keep_their_sums_in_registers(form: str, m: int, n: int, k: int, processor: Target) -> None:
    left, right = (("k, i", f"{k},{m}") if form[0] == "T" else ("i, k", f"{m},{k}"),
                   ("j, k", f"{n},{k}") if form[1] == "T" else ("k, j", f"{k},{n}"))
    kernel = parse_kernel(f"""contraction c(a: r f32[{left[1]}], b: r f32[{right[1]}], y: w f32[{m},{n}]) {{
        batch [] m [i < {m}] n [j < {n}] k [k < {k}]
        a = a[{left[0]}] b = b[{right[0]}]  y[i, j] = acc }}""")
    assert isinstance(kernel, ContractionKernel)
    check_direct(kernel, processor)


@pytest.mark.parametrize("side", [8, 12, 28])
def test_products_of_images_as_lanes_keep_their_sums_in_registers(side: int, processor: Target) -> None:
    """Register tiles of one, two and three tiles of images, as their number can be divided."""
    x, w = gf.input("x", (64, 36, side, side)), gf.input("w", (40, 36, 3, 3))
    (kernel,) = kernels(gf.function([x, w], apply("conv", [x, w], padding=1)).traced, processor)
    assert isinstance(kernel, ContractionKernel)
    kernel = replace(kernel, contraction=replace(kernel.contraction, tile={"algorithm": 4}))
    how, pattern = winograd_images(kernel, processor), FUSED if processor.has_fma else PRODUCT
    assert how is not None
    loops = [body for body in inner_loops(code(kernel, processor)) if count(pattern, body) == how.mr * how.nv]
    assert loops, f"{how.mr} x {how.nv}"
    assert all(count(STACK, body) == 0 for body in loops), f"{how.mr} x {how.nv} spills"


def check_direct(kernel: ContractionKernel, target: Target) -> None:
    """The inner loop of a direct contraction."""
    chosen, pattern = special(kernel, target), FUSED if target.has_fma else PRODUCT
    t = chosen[1].tiling if chosen else contraction_tiling(kernel, target)
    vectors = t.mr * t.nr // t.lanes
    counts = {count(pattern, body): body for body in inner_loops(code(kernel, target))}
    found = [body for number, body in counts.items() if number and number % vectors == 0]
    assert found, f"{kernel.name}: {list(counts)} for {t.mr} x {t.nr}"
    for body in found:
        assert count(STACK, body) == 0, f"{kernel.name}: {t.mr} x {t.nr} spills\n" + "\n".join(body)


@pytest.mark.parametrize("graph", [lenet_step(96), lenet_step()], ids=["96 images", "any number"])
def test_kernels_of_a_convolutional_step(graph: Graph, processor: Target) -> None:
    check_step(graph, processor)


def test_kernels_of_a_recurrent_step(processor: Target) -> None:
    check_step(lstm_step(), processor)


def check_step(graph: Graph, target: Target) -> None:
    direct = 0
    for kernel in kernels(graph, target):
        if all(product(a.shape) == 1 for a in kernel.arguments if "w" in a.mode):
            continue                                  # a scalar, such as the step's number
        text = code(kernel, target)
        called = set(CALL.findall(text)) - {kernel.name, f"{kernel.name}.prepare"} - ALLOWED
        assert not called, f"{kernel.name} calls {called}"
        rows = any(isinstance(e, Reduce) for e in walk.expressions(kernel))      # a row has a few scalars
        for body in inner_loops(text) if not rows else ():
            scalars, vectors = count(SCALAR, body), count(VECTOR, body)
            assert scalars <= 2 + vectors / 4, f"{kernel.name} computes one by one: {scalars} of {vectors}"
        if isinstance(kernel, ContractionKernel) and (
                (chosen := special(kernel, target)) is None or isinstance(chosen[1], Blocked)):
            check_direct(kernel, target)
            direct += 1
    assert direct


# -- instruction sets of this machine ------------------------------------------------------------------------


@pytest.mark.parametrize("name, target", targets().items())
def test_an_instruction_set_may_be_asked_for(name: str, target: Target, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    if target.is_arm or name == "host":
        pytest.skip("there is no narrower one")
    monkeypatch.setenv("GRAPHFLOW_TARGET", name.upper())
    monkeypatch.setenv("GRAPHFLOW_CACHE", "off")
    assert (host_target().vector_bytes, host_target().has_fma) == (target.vector_bytes, target.has_fma)
    x = gf.input("x", (3, 50))
    program = gf.function(x, gf.softmax(gf.matmul(x, gf.constant(np.eye(50, dtype=np.float32)))))
    registers = {"sse2": ("xmm", "ymm"), "avx2": ("ymm", "zmm")}[name]
    text = program.compilation.assembly()
    assert registers[0] in text and registers[1] not in text
    feed = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    e = np.exp(feed.astype(np.float64))
    np.testing.assert_allclose(program(feed), e / e.sum(1, keepdims=True), rtol=1e-5)


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHFLOW_TARGET", "vax")
    with pytest.raises(DeviceError, match="cannot run code for GRAPHFLOW_TARGET=vax"):
        host_target()
