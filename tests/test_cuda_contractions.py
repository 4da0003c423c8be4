"""Generated CUDA C of contractions: every tile of the table, forms of operands, and work split over blocks,
run on the CPU over a simulated block and against NumPy; compiled by nvcc if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_host import COMPILER, HostKernels, united
from numpy.lib.stride_tricks import sliding_window_view
from support import graph_of

from graphflow.compiler.cuda_target import ANY, CudaTarget
from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.cuda import cuda_function, emit_cuda
from graphflow.compiler.emit.cuda_contraction import contraction_code
from graphflow.compiler.emit.cuda_tiles import TILES, work
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Value
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import evaluate, symbol
from graphflow.compiler.plan.dtypes import BF16, F16, F32, F64, DType
from graphflow.compiler.plan.plan_text import parse_plan, print_plan

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++ on the PATH to compile the text for the CPU"),
    pytest.mark.xdist_group("cuda contractions"),  # one process compiles the text for all tests here
]
N = symbol("N")
TENSOR_ERROR = {"half": 2.0**-24, "tf32": 2.0**-10, "fma": 2.0**-24}
"""Of a product, beside the roundings of the sum."""


class Case(NamedTuple):
    """A program, and what it must give of its feeds: (results, the same of absolute values)."""

    program: KernelProgram
    feeds: tuple[tuple[DType, tuple[Any, ...]], ...]
    oracle: Callable[..., np.ndarray]
    terms: int
    sizes: tuple[int, ...] = (0,)
    unit: float = 2.0**-24


def made(
    feeds: tuple[tuple[DType, tuple[Any, ...]], ...],
    build: Callable[..., Value],
    oracle: Callable[..., np.ndarray],
    terms: int,
    tile: dict[str, int] | None = None,
    sizes: tuple[int, ...] = (0,),
) -> Case:
    """`tile`: what the kernel's contraction asks for."""
    b = Builder()
    inputs = [b.input(name=f"x{i}", dtype=d, shape=shape) for i, (d, shape) in enumerate(feeds)]
    program = Compilation(graph_of(inputs, [build(b, *inputs)]), ANY).result("memory")
    kernels = {}
    for name, k in program.kernels.items():
        if isinstance(k, ContractionKernel) and tile:
            k = replace(k, contraction=replace(k.contraction, tile=tile))
        kernels[name] = k
    unit = TENSOR_ERROR[TILES[tile["algorithm"]].units] if tile else 2.0**-24
    return Case(replace(program, kernels=kernels), feeds, oracle, terms, sizes, unit)


def product(m: Any, k: Any, n: Any, form: str = "NN", dtype: DType = F32, **more: Any) -> Case:
    """A matrix product of operands as they are ("N") or transposed ("T")."""

    def wide(b: Builder, x: Value) -> Value:
        return b.cast(x, dtype=F32) if dtype.is_half else x

    def oracle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.T if form[0] == "T" else x) @ (y.T if form[1] == "T" else y)

    return made(
        (
            (dtype, (k, m) if form[0] == "T" else (m, k)),
            (dtype, (n, k) if form[1] == "T" else (k, n)),
        ),
        lambda b, x, y: b.matmul(
            wide(b, x), wide(b, y), transpose_x=form[0] == "T", transpose_y=form[1] == "T"
        ),
        oracle,
        k if isinstance(k, int) else 100,
        **more,
    )


def on_tile(number: int) -> dict[str, Case]:
    """Products with that tile: with edges everywhere, and with sizes that allow 16 bytes at a time, as the
    largest tiles need."""
    t = TILES[number]
    dtype = F32 if t.units != "half" else (F16, BF16)[number % 2]
    name = f"{t.units} {t.rows}x{t.columns}"
    more = 8 if max(t.rows, t.columns) > 128 else 3
    sizes = {
        "NN odd": (min(t.rows, 32) + more, 2 * t.depth + more, t.columns + more),
        "NT wide": (t.rows, 3 * t.depth + 8, t.columns + 8),
        "TN wide": (t.rows + 8, 4 * t.depth, t.columns),
        "TT odd": (t.rows + more, t.depth + more, min(t.columns, 32) + more),
    }
    cases = {
        f"{name} {form}": product(*size, form[:2], dtype, tile={"algorithm": number})
        for form, size in sizes.items()
    }
    m, k, n = t.rows + more, 4 * t.depth + more, t.columns + 8
    cases[f"{name} parts"] = product(m, k, n, "TN", dtype, tile={"algorithm": number, "kc": 2 * t.depth})
    return cases


def _conv(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2))), (3, 4), (2, 3))[:, :, ::2]
    return np.einsum("ncijpq,ocpq->noij", windows, w)


def _weight_grad(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return np.einsum("ncpqij,noij->ocpq", sliding_window_view(x, dy.shape[2:], (2, 3)), dy)


def _input_grad(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    out = np.zeros((len(dy), w.shape[1], dy.shape[2] + 2, dy.shape[3] + 2))
    for p, q in np.ndindex(3, 3):
        out[:, :, p : p + dy.shape[2], q : q + dy.shape[3]] += np.einsum("noij,oc->ncij", dy, w[:, :, p, q])
    return out


def _fused(b: Builder, x: Value, y: Value, bias: Value) -> Value:
    z = b.matmul(b.maximum(x, 0.0), y)
    return b.maximum(b.add(z, b.broadcast(bias, z.shape)), 0.0)


def _halves(b: Builder, x: Value, y: Value) -> Value:
    """What an autocast makes of relu(x) @ y."""
    x = b.cast(b.maximum(b.cast(x, dtype=F32), 0.0), dtype=BF16)
    return b.cast(b.matmul(b.cast(x, dtype=F32), b.cast(y, dtype=F32)), dtype=BF16)


def _gates(b: Builder, x: Value, w: Value) -> Value:
    """Slices of columns, used together: column groups of one contraction."""
    z = b.matmul(*(b.cast(v, dtype=F32) if v.dtype.is_half else v for v in (x, w)))
    out = b.slice(z, starts=(0, 0), stops=(N, 24), steps=(1, 1))
    for g in (1, 2, 3):
        part = b.slice(z, starts=(0, 24 * g), stops=(N, 24 * g + 24), steps=(1, 1))
        out = b.add(out, b.mul(part, float(g + 1)))
    return out


def _gates_oracle(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.einsum("mgn,g->mn", (x @ w).reshape(len(x), 4, 24), np.arange(1, 5))


def _strided_gradient(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    out = np.zeros((len(dy), w.shape[1], 17, 17))
    for p, q in np.ndindex(3, 3):
        out[:, :, p : p + 15 : 2, q : q + 15 : 2] += np.einsum("noij,oc->ncij", dy, w[:, :, p, q])
    return out


def small(units: str) -> dict[str, int]:
    """What asks for the last such tile."""
    return {"algorithm": max(i for i, t in enumerate(TILES) if t.units == units)}


def products() -> dict[str, Case]:
    """Matrix products with what stands around them."""
    return {
        "fused": made(
            ((F32, (N, 70)), (F32, (70, 36)), (F32, (36,))),
            _fused,
            lambda x, y, bias: np.maximum(np.maximum(x, 0) @ y + bias, 0),
            71,
            sizes=(1, 37),
        ),
        "batch": made(
            ((F32, (N, 9, 20)), (F32, (N, 20, 12))),
            lambda b, x, y: b.matmul(x, y),
            np.matmul,
            20,
            sizes=(1, 5),
        ),
        "symbolic k": product(12, N, 20, "TN", sizes=(1, 100, 700)),
        "everything symbolic": product(N, N, N, "NT", sizes=(1, 33)),
        "double": product(70, 33, 66, "NT", F64),
        **{
            f"gates {units}": made(
                ((dtype, (N, 20)), (dtype, (20, 96))),
                _gates,
                _gates_oracle,
                30,
                tile=small(units),
                sizes=(1, 37),
            )
            for units, dtype in (("fma", F32), ("half", F16), ("tf32", F32))
        },
        "computed halves": made(
            ((BF16, (N, 40)), (BF16, (40, 24))), _halves, lambda x, y: np.maximum(x, 0) @ y, 1, sizes=(19,)
        ),
    }


def convolutions() -> dict[str, Case]:
    """Convolutions and their gradients."""
    image, filters = (F32, (N, 3, 9, 11)), (F32, (7, 3, 3, 4))
    return {
        "conv": made(
            (image, filters),
            lambda b, x, w: b.conv(x, w, stride=(2, 1), padding=((1, 1), (2, 2))),
            _conv,
            36,
            sizes=(1, 6),
        ),
        "conv half": made(
            ((BF16, (N, 3, 9, 11)), (BF16, (7, 3, 3, 4))),
            lambda b, x, w: b.conv(
                b.cast(x, dtype=F32), b.cast(w, dtype=F32), stride=(2, 1), padding=((1, 1), (2, 2))
            ),
            _conv,
            36,
            sizes=(3,),
        ),
        "weight gradient": made(
            ((F32, (9, 4, 20, 20)), (F32, (9, 6, 16, 16))),
            lambda b, x, dy: b.conv_weight_grad(x, dy, kernel=(5, 5)),
            _weight_grad,
            9 * 256,
        ),
        "input gradient": made(
            ((F32, (N, 6, 8, 8)), (F32, (6, 5, 3, 3))),
            lambda b, dy, w: b.conv_input_grad(dy, w, spatial=(10, 10)),
            _input_grad,
            54,
            sizes=(1, 4),
        ),
        **{
            f"channels-last {name}": made(
                ((BF16, shapes[0]), (BF16, shapes[1])),
                lambda b, x, w, build=build: build(b, *(_stored(b, v) for v in (x, w))),
                lambda x, w, oracle=oracle: 4 * oracle(x, w),
                terms,
                sizes=(1, 5),
            )
            for name, shapes, build, oracle, terms in CHANNELS_LAST
        },
        "strided gradient": made(
            ((F32, (N, 6, 8, 8)), (F32, (6, 5, 3, 3))),
            lambda b, dy, w: b.conv_input_grad(dy, w, spatial=(17, 17), stride=2),
            _strided_gradient,
            54,
            sizes=(2,),
        ),
    }


def _stored(b: Builder, x: Value) -> Value:
    """Twice x: a half that a kernel of its own stores, in the layout that it likes."""
    return b.cast(b.cast(b.mul(b.cast(x, dtype=F32), 2.0), dtype=BF16), dtype=F32)


CHANNELS_LAST = (
    (
        "conv",
        ((N, 24, 9, 11), (40, 24, 3, 4)),
        lambda b, x, w: b.conv(x, w, stride=(2, 1), padding=((1, 1), (2, 2))),
        _conv,
        288,
    ),
    (
        "weight gradient",
        ((N, 16, 12, 13), (N, 24, 10, 11)),
        lambda b, x, dy: b.conv_weight_grad(x, dy, kernel=(3, 3)),
        _weight_grad,
        550,
    ),
    (
        "input gradient",
        ((N, 40, 7, 9), (40, 24, 3, 3)),
        lambda b, dy, w: b.conv_input_grad(dy, w, spatial=(9, 11)),
        _input_grad,
        360,
    ),
)
"""Convolutions of halves whose operands are kept channels-last."""


@cache
def cases() -> dict[str, Case]:
    out: dict[str, Case] = {}
    for number in range(len(TILES)):
        out |= on_tile(number)
    return {**out, **products(), **convolutions()}


NAMES = [
    *(
        f"{t.units} {t.rows}x{t.columns} {form}"
        for t in TILES
        for form in ("NN odd", "NT wide", "TN wide", "TT odd", "parts")
    ),
    *("fused", "batch", "symbolic k", "everything symbolic", "double", "conv", "conv half"),
    *("gates fma", "gates half", "gates tf32", "strided gradient"),
    *("weight gradient", "input gradient", "computed halves"),
    *(f"channels-last {case[0]}" for case in CHANNELS_LAST),
]


def values(case: Case, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    out = []
    for dtype, shape in case.feeds:
        size = [evaluate(d, {"N": n}) for d in shape]
        out.append(rng.standard_normal(size).astype(dtype.numpy))
    return out


def check(case: Case, found: np.ndarray, feeds: list[np.ndarray]) -> None:
    """Against float64, within the error of a sum in any order of products with the unit's error."""
    exact = [x.astype(np.float64) for x in feeds]
    expected, size = case.oracle(*exact), case.oracle(*(np.abs(x) for x in exact))
    rounding = {BF16.numpy: 2.0**-8, F64.numpy: 2.0**-50}.get(found.dtype, 2.0**-23)
    unit = 2.0**-53 if found.dtype == np.float64 else case.unit
    bound = 2 * (case.terms * min(unit, 2.0**-23) + 2 * unit) * size + rounding * np.abs(expected)
    assert (np.abs(found.astype(np.float64) - expected) <= bound).all()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """All kernels of this file, compiled for the CPU."""
    return HostKernels([c.program for c in cases().values()], tmp_path_factory.mktemp("cuda"))


def test_every_case_has_a_name() -> None:
    assert set(NAMES) == set(cases())


@pytest.mark.parametrize("name", NAMES)
def test_contraction(name: str, kernels: HostKernels) -> None:
    case = cases()[name]
    for n in case.sizes:
        feeds = values(case, n)
        outputs, _ = kernels.run(case.program, {f"x{i}": a for i, a in enumerate(feeds)}, {}, {"N": n})
        (found,) = outputs.values()
        check(case, found, feeds)


def contraction(case: Case) -> ContractionKernel:
    (kernel,) = (k for k in case.program.kernels.values() if isinstance(k, ContractionKernel))
    return kernel


def test_operands_that_start_anywhere(kernels: HostKernels) -> None:
    """A view begins at any element: 16 bytes at a time only where its address allows."""
    for name in ("fma 64x64 TN wide", "half 64x64 NT wide", "tf32 64x64 TN wide"):
        case = cases()[name]
        feeds = values(case, 0)
        moved = []
        for x in feeds:
            raw = np.zeros(x.size + 1, x.dtype)[1:].reshape(x.shape)
            raw[...] = x
            moved.append(raw)
        kernel = contraction(case)
        out = np.zeros([int(d) for d in kernel.arguments[2].shape], np.float32)
        kernels.launch(kernel, [*moved, out], {})
        check(case, out, feeds)


# --- what is chosen


def test_work_is_split_by_shapes() -> None:
    gradient = work(contraction(product(6, 8_000, 25, "TN")), ANY)
    assert gradient.parts >= 16
    symbolic = work(contraction(product(12, N, 20, "TN")), ANY)
    assert isinstance(symbolic.tiles, int)
    assert work(contraction(product(N, 4096, 20)), ANY).parts == 1
    large = work(contraction(product(4096, 4096, 4096)), ANY)
    assert (large.tile.rows, large.tile.columns, large.parts) == (128, 256, 1)


def test_units_by_type_and_target() -> None:
    exact, loose = CudaTarget("sm_90"), CudaTarget("sm_90", tf32=True)
    assert exact.key() != loose.key()
    kernel = contraction(product(256, 256, 256))
    assert work(kernel, exact).tile.units == "fma" and work(kernel, loose).tile.units == "tf32"
    half = contraction(product(256, 256, 256, dtype=BF16))
    assert work(half, exact).tile.units == "half"
    assert work(half, CudaTarget("sm_75")).tile.units == "fma"
    assert work(contraction(product(256, 256, 256, dtype=F64)), loose).tile.units == "fma"


def test_shared_memory_by_architecture() -> None:
    """A launch asks for as much as the architecture has; a kernel without such a launch declares 48 KB."""
    kernel = contraction(product(4096, 4096, 4096, dtype=BF16))
    asked = {a: cuda_function(kernel, CudaTarget(a)).dynamic for a in ("sm_75", "sm_80", "sm_86", "sm_90")}
    assert asked == {"sm_75": 0, "sm_80": 147_456, "sm_86": 73_728, "sm_90": 147_456}
    program = product(4096, 4096, 4096, dtype=BF16).program
    plan = replace(program.plan, functions=(cuda_function(kernel),))
    assert parse_plan(print_plan(plan)) == plan and "dynamic 147456" in print_plan(plan)
    for architecture in ("sm_80", "sm_86", "sm_90"):
        for number, t in enumerate(TILES):
            dtype = BF16 if t.units == "half" else F32
            sized = contraction(product(1024, 1024, 1024, dtype=dtype, tile={"algorithm": number}))
            target = CudaTarget(architecture)
            declared = re.findall(r"char shared\[(\d+)\]", contraction_code(sized, target).as_kernel())
            dynamic = cuda_function(sized, target).dynamic
            assert dynamic <= target.shared and len(declared) == (dynamic == 0)
            assert all(int(size) <= 48 << 10 for size in declared)


def test_copies_of_16_bytes() -> None:
    """Where neighbours lie side by side and nothing guards them one by one."""

    def copies(case: Case) -> set[str]:
        return set(re.findall(r"gf_copy<\d>", emit_cuda(united([case.program]))))

    assert copies(product(64, 64, 64, "TN")) == {"gf_copy<4>"}
    assert copies(product(63, 64, 63, "TN")) == {"gf_copy<1>"}
    assert copies(product(64, 64, 64, "NT", BF16)) == {"gf_copy<8>"}
    assert copies(product(64, 63, 63, "NT", BF16)) == set()
    assert copies(product(64, 64, 64)) == {"gf_copy<1>", "gf_copy<4>"}  # turned on its way


@pytest.mark.parametrize("name", [case[0] for case in CHANNELS_LAST])
def test_convolutions_of_halves_are_channels_last(name: str) -> None:
    """Both operands come 16 bytes, or eight channels, at a time, padding or not."""
    text = emit_cuda(cases()[f"channels-last {name}"].program)
    assert re.findall(r"gf_copy<\d>\(|next_left", text) == ["gf_copy<8>("] * 2


def test_column_groups_and_computed_operands_are_covered() -> None:
    assert all(len(contraction(cases()[f"gates {u}"]).contraction.accumulators) == 4 for u in TENSOR_ERROR)
    assert "next_left" in emit_cuda(cases()["half 64x64 NN odd"].program)


# --- faults that must be noticed

PLANTED = [
    (r"gf_copies_wait<\d>\(\);\n", "\n", "copies that nothing waited for|Not equal|order of threads"),
    (r"(gf_copies_wait<\d>\(\);\n)\s*__syncthreads\(\);", r"\1", "depends on the order of threads|Not equal"),
    (r"gf_copies_end\(\);", "", "copies that nothing waited for|Not equal|order of threads"),
    (r"const int free = stage == 0 \? \d : stage - 1;", "const int free = stage;", "depends on|Not equal"),
    (r"stage = stage == \d \? 0 : stage \+ 1;", "", "depends on the order of threads|Not equal"),
    (r"(float sums)", r"if (row == 4) continue; \1", "wait at different places"),
    (r"if \(own_row >= M\)", "if (own_row > M)", "outside a buffer"),
    (r"&& k < K;", "&& k < K - 1;", "Not equal"),
    (r"if \(slice == 0\) \{\n(\s*for \(int s)", r"if (slice == 1) {\n\1", "Not equal|order of threads"),
    (r"if \(!gf_last_block\(.*\)\) continue;", "if (part > 0) continue;", "order of threads"),
    (r"p < 3; p\+\+", "p < 2; p++", "Not equal"),
]


@pytest.mark.parametrize("planted, replacement, noticed", PLANTED)
def test_harness_notices(
    planted: str, replacement: str, noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda_host

    number = next(i for i, t in enumerate(TILES) if t.units == "fma" and t.slices > 1)
    depth = TILES[number].depth
    case = product(37, 10 * depth - 3, 45, tile={"algorithm": number, "kc": 4 * depth})
    feeds = values(case, 0)

    def run(folder: str) -> None:
        (tmp_path / folder).mkdir()
        host = HostKernels([case.program], tmp_path / folder)
        outputs, _ = host.run(case.program, {f"x{i}": a for i, a in enumerate(feeds)}, {}, {})
        np.testing.assert_allclose(*outputs.values(), feeds[0] @ feeds[1], rtol=1e-4, atol=1e-4)

    text = emit_cuda(united([case.program]))
    assert re.search(planted, text), text
    monkeypatch.setattr(cuda_host, "emit_cuda", lambda p: re.sub(planted, replacement, emit_cuda(p)))
    with pytest.raises(AssertionError, match=noticed):
        run("planted")


def test_padding_that_is_not_zero_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_host

    case = cases()["channels-last conv"]
    assert "], holds);" in emit_cuda(case.program)
    monkeypatch.setattr(cuda_host, "emit_cuda", lambda p: emit_cuda(p).replace("], holds);", "], true);"))
    feeds = values(case, 1)
    host = HostKernels([case.program], tmp_path)
    outputs, _ = host.run(case.program, {f"x{i}": a for i, a in enumerate(feeds)}, {}, {"N": 1})
    with pytest.raises(AssertionError):
        check(case, *outputs.values(), feeds)


# --- with nvcc


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_a_warning_and_spills_nothing(architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    path = tmp_path / "kernels.cu"
    few = [
        c.program
        for name, c in cases().items()
        if not name.endswith(("wide", "TT odd")) or re.search("x256 NT|256x.* NT", name)
    ]
    path.write_text(emit_cuda(united(few)))
    options = ["-fmad=false", "-std=c++17", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings"]
    done = subprocess.run(
        ["nvcc", *options, "-Xptxas", "-v", str(path), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
    spilled = re.findall(r"properties for (\w+)\n.* ([1-9]\d*) bytes spill stores", done.stderr)
    assert "bytes spill stores" in done.stderr and not spilled, spilled
