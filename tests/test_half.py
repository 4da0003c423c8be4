"""float16 and bfloat16: every bit of every cast, arithmetic by float32, gradients, checkpoints, feeds."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.compiler.plan.dtypes import BF16, F16, DType

pytest.importorskip("ml_dtypes")

HALVES = pytest.mark.parametrize("half", [F16, BF16], ids=str)
on_devices = pytest.mark.parametrize("device", DEVICES)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal types and bits, but that any NaN is like any other."""
    assert found.dtype == expected.dtype
    wide, right = found.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(right))
    bits = np.uint16 if found.dtype.itemsize == 2 else np.uint32
    known = ~np.isnan(right)
    np.testing.assert_array_equal(found.view(bits)[known], expected.view(bits)[known])


def all_halves(half: DType) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(half.numpy)


def hard_floats() -> np.ndarray:
    """Every exponent of float32, and what lies close to the ends and to the ties of both halves."""
    rng = np.random.default_rng(5)
    random = rng.integers(0, 1 << 32, 40_000, dtype=np.uint32).view(np.float32)
    small = (rng.standard_normal(20_000) * 1e-6).astype(np.float32)
    ends = np.linspace(65_000, 66_000, 4_001, dtype=np.float32)
    with np.errstate(all="ignore"):
        ties = ((np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    return np.concatenate([random, small, ends, -ends, ties, special])


@on_devices
@HALVES
def test_casts_round_as_numpy_does(half: DType, device: str) -> None:
    n, m = gf.dim("N"), gf.dim("M")
    x, h = gf.input("x", (n,)), gf.input("h", (m,), half.full_name)
    outputs = [gf.cast(x, half), gf.cast(h, "float32"), gf.cast(h, "int32"), gf.cast(h, "float64")]
    program = gf.function([x, h], outputs, device=device)
    with np.errstate(all="ignore"):
        narrow, wide, whole, double = program(hard_floats(), all_halves(half)[:0x4000])
        same(narrow, hard_floats().astype(half.numpy))
        same(wide, all_halves(half)[:0x4000].astype(np.float32))
        np.testing.assert_array_equal(whole, all_halves(half)[:0x4000].astype(np.float32).astype(np.int32))
        np.testing.assert_array_equal(double, all_halves(half)[:0x4000].astype(np.float64))


@on_devices
@HALVES
def test_every_half_widens_exactly(half: DType, device: str) -> None:
    h = gf.input("h", (1 << 16,), half.full_name)
    found = gf.function([h], gf.cast(h, "float32"), device=device)(all_halves(half))
    same(found, all_halves(half).astype(np.float32))


@on_devices
@HALVES
def test_arithmetic_rounds_once_after_each_op(half: DType, device: str) -> None:
    n = gf.dim("N")
    x, y = (gf.input(name, (n,), half.full_name) for name in "xy")
    program = gf.function([x, y], [x * y + 1.5, gf.where(x > y, x, 0.25), gf.exp(x) / y, x[::-1], gf.sum(x)],
                          device=device)
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.5, 2, 999).astype(half.numpy) for _ in "ab")
    wide = np.float32
    product, chosen, ratio, flipped, total = program(a, b)
    rounded = (a.astype(wide) * b.astype(wide)).astype(half.numpy)
    same(product, (rounded.astype(wide) + wide(1.5)).astype(half.numpy))
    same(chosen, np.where(a.astype(wide) > b.astype(wide), a, half.numpy.type(0.25)))
    power = np.exp(a.astype(wide)).astype(half.numpy)
    difference = np.abs(ratio.astype(wide) - (power.astype(wide) / b.astype(wide)))
    assert (difference <= 2 ** (-7 if half == BF16 else -10) * ratio.astype(wide)).all()
    same(flipped, a[::-1])
    assert abs(float(total) - a.astype(wide).sum()) <= 2 ** -8 * float(total)


@on_devices
@HALVES
def test_gradients_come_back_in_the_operands_type(half: DType, device: str) -> None:
    n = gf.dim("N")
    x = gf.input("x", (n, 3))
    w = gf.parameter((3, 4), np.linspace(-1, 1, 12).reshape(3, 4), dtype="float32")
    out = gf.cast(x, half) @ gf.cast(w, half)
    assert out.dtype == half
    loss = gf.cast(out * out, "float32").sum()
    taken = gf.take(gf.cast(w, half), np.array([0, 1, 1]))          # its gradient adds into one row twice
    loss = loss + gf.cast(taken, "float32").sum()
    by_x, by_w = gf.grad(loss, [x, w])
    assert by_x.dtype == by_w.dtype == gf.input("z", ()).dtype
    data = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    found_x, found_w = gf.function([x], [by_x, by_w], device=device)(data)
    weights = np.linspace(-1, 1, 12).reshape(3, 4)
    expected = 2 * data @ weights
    np.testing.assert_allclose(found_x, expected @ weights.T, rtol=0.05, atol=0.1)
    np.testing.assert_allclose(found_w, data.T @ expected + np.array([[1], [2], [0]]), rtol=0.05, atol=0.15)


def test_promotion() -> None:
    f16, bf16, f32, i64 = (gf.input(name, (), name) for name in ("float16", "bfloat16", "float32", "int64"))
    assert (f16 + 1).dtype == (f16 + 1.5).dtype == (f16 * i64).dtype == F16
    assert (f16 + bf16).dtype.name == (bf16 + f32).dtype.name == "f32"
    assert (f16 > 1).dtype.name == "bool" and gf.argmax(gf.stack([f16, f16])).dtype.name == "i64"


@pytest.mark.cpu
@HALVES
def test_a_store_keeps_halves(half: DType, tmp_path: Path) -> None:
    w = gf.parameter((3,), [1.0, 2.5, -3.0], name="w", dtype=half.full_name)
    program = gf.function([], gf.cast(w, "float32") * 2, {w: w + 1})
    np.testing.assert_array_equal(program(), [2, 5, -6])
    assert program.store["w"].dtype == half.numpy
    program.store.save(tmp_path / "c")
    program()
    program.store.load(tmp_path / "c")
    np.testing.assert_array_equal(program.store["w"].astype(np.float32), [2, 3.5, -2])


def test_a_pass_may_not_compute_with_halves() -> None:
    from graphflow.compiler.ir.check import check_graph
    from graphflow.compiler.ir.graph import Graph, Node, TensorType
    from graphflow.compiler.plan.errors import CompilerError
    attrs = {"name": "x", "dtype": F16, "shape": (2,), "finite": False}
    leaf = Node("input", (), attrs, (), (TensorType(F16, (2,)),))
    view = Node("reduce_sum", (leaf.result(),), {"axes": (0,)}, (), (TensorType(F16, ()),))
    with pytest.raises(CompilerError, match="halves are cast to float32"):
        check_graph(Graph("g", (leaf.result(),), {"y": view.result()}), "canonical")


def test_float16_loads_no_package() -> None:
    import subprocess
    code = ("import sys, graphflow as gf; x = gf.input('x', (2,), 'float16');"
            "gf.function([x], x + 1, device='reference');"
            "sys.exit('ml_dtypes' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@on_devices
@HALVES
def test_means_of_more_than_a_half_counts(half: DType, device: str) -> None:
    """257 is no bfloat16, and 70000 is no float16; both axes are the call's."""
    x = gf.input("x", (None, None), half.full_name)
    program = gf.function(x, [gf.mean(x), gf.mean(x, 0), gf.mean(x, 1)], device=device)
    for shape in ((257, 3), (3, 70000)):
        array = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(half.numpy)
        wide = array.astype("float64")
        found = program(array)
        assert all(value.dtype == half.numpy for value in found)
        for value, expected in zip(found, (wide.mean(), wide.mean(0), wide.mean(1))):
            np.testing.assert_allclose(value.astype("float64"), expected, rtol=2.0 ** -8)
