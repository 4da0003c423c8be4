"""The builder of LLVM IR: what its instructions compute, against NumPy."""
from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from native_code import address, load_module, targets

from graphflow.compiler.emit.builder import (
    F32,
    F64,
    I1,
    I32,
    I64,
    PTR,
    Builder,
    Module,
    Type,
    constant,
    vector_constant,
)
from graphflow.runtime.native import Library

pytestmark = pytest.mark.cpu


def run(build: Callable[[Builder], None], *arrays: np.ndarray, n: int = 0, target: str = "host") -> None:
    """Build a function of up to three arrays and an integer `n`, and call it."""
    module = Module()
    b = module.function("test", [("x", PTR), ("y", PTR), ("z", PTR), ("n", I64)])
    build(b)
    b.ret()
    library: Library = load_module(module, ["test"], targets()[target])
    pointers = [address(array) for array in arrays] + [None] * (3 - len(arrays))
    library.function("test", None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(*pointers, n)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_loop_carries_values(n: int) -> None:
    def build(b: Builder) -> None:
        x, y, _, count = b.params
        with b.loop(0, count, carry=[constant(F64, 1.0), constant(F64, 0.0)]) as loop:
            product, total = loop.carry
            value = b.load(F64, b.gep(x, loop.index, F64))
            loop.next(b.mul(product, value), b.add(total, value))
        b.store(loop.results[0], y)
        b.store(loop.results[1], b.gep(y, 1, F64))

    x, y = np.arange(2.0, 9.0), np.zeros(2)
    run(build, x, y, n=n)
    np.testing.assert_array_equal(y, [np.prod(x[:n]), np.sum(x[:n])])


def test_loop_with_known_bounds_and_a_nested_branch() -> None:
    def build(b: Builder) -> None:
        x = b.params[0]
        with b.loop(1, 10, 3, carry=[constant(I64, 0)]) as loop:
            with b.when(b.compare("ne", loop.index, 4)):
                b.store(loop.index, b.gep(x, loop.index, I64))
            loop.next(b.choose(b.compare("gt", loop.index, 4), lambda: b.add(loop.carry[0], 100),
                               lambda: b.add(loop.carry[0], 1)))
        b.store(loop.results[0], x)

    x = np.zeros(10, np.int64)
    run(build, x)
    np.testing.assert_array_equal(x, [102, 1, 0, 0, 0, 0, 0, 7, 0, 0])


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("lanes", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("n", [-3, 0, 1, 5, 16, 31, 32, 40])
def test_masked_memory_touches_only_the_set_lanes(lanes: int, n: int, target: str) -> None:
    def build(b: Builder) -> None:
        x, y, _, count = b.params
        mask = b.first_lanes(count, lanes) if lanes > 1 else b.compare("gt", count, 0)
        b.masked_store(b.masked_load(F32.vector(lanes), x, mask, 9.0), y, mask)
        loaded = b.masked_load(F32.vector(lanes), x, mask, 9.0)
        b.store(loaded, b.gep(y, 100, F32))

    x, y = np.arange(200, dtype=np.float32), np.full(200, -1, np.float32)
    run(build, x, y, n=n, target=target)
    kept = min(max(n, 0), lanes)
    np.testing.assert_array_equal(y[:100], np.where(np.arange(100) < kept, x[:100], -1))
    np.testing.assert_array_equal(y[100:100 + lanes], np.where(np.arange(lanes) < kept, x[:lanes], 9))


@pytest.mark.parametrize("lanes", [1, 8, 16])
def test_gather_and_scatter(lanes: int) -> None:
    places = np.random.default_rng(1).permutation(64)[:lanes]

    def build(b: Builder) -> None:
        x, y, z, _ = b.params
        index = b.load(I64.vector(lanes), z)
        far = b.compare("gt", index, 31)
        gathered = b.gather(F32.vector(lanes), b.gep(x, index, F32), far, -7.0)
        b.store(gathered, y)
        b.scatter(b.gather(F32.vector(lanes), b.gep(x, index, F32)), b.gep(y, b.add(index, 64), F32), far)

    x, y = np.arange(64, dtype=np.float32), np.full(128, -1, np.float32)
    run(build, x, y, places)
    np.testing.assert_array_equal(y[:lanes], np.where(places > 31, x[places], -7))
    expected = np.full(64, -1, np.float32)
    expected[places[places > 31]] = x[places[places > 31]]
    np.testing.assert_array_equal(y[64:], expected)


@pytest.mark.parametrize("lanes", [1, 2, 16, 32])
def test_reduce_is_a_fixed_tree_of_halves(lanes: int) -> None:
    def build(b: Builder) -> None:
        b.store(b.reduce(b.load(F32.vector(lanes), b.params[0]), b.add), b.params[1])

    x, y = np.random.default_rng(4).normal(size=32).astype(np.float32), np.zeros(1, np.float32)
    run(build, x, y)
    expected = x[:lanes]
    while len(expected) > 1:
        expected = expected[:len(expected) // 2] + expected[len(expected) // 2:]
    assert y[0] == expected[0]


def test_lanes_move_as_asked() -> None:
    def build(b: Builder) -> None:
        x, y, _, _ = b.params
        v = b.load(F32.vector(8), x)
        b.store(b.shuffle(b.slice(v, 4, 4), b.shuffle(v, v, [3, 2, 1, 15]), range(8)), y)
        scalar = b.extract(v, 5)
        b.store(b.insert(b.splat(scalar, 4), constant(F32, 100), 2), b.gep(y, 8, F32))
        b.store(b.iota(F32.vector(4), 3, 2), b.gep(y, 12, F32))
        b.store(b.add(v, scalar), b.gep(y, 16, F32))

    x, y = np.arange(8, dtype=np.float32), np.zeros(24, np.float32)
    run(build, x, y)
    expected = [4, 5, 6, 7, 3, 2, 1, 7, 5, 5, 100, 5, 3, 5, 7, 9, *(x + 5)]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("type, dtype", [(F32, np.float32), (F64, np.float64)])
def test_float_constants_are_exact(type: Type, dtype: type) -> None:
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    values = [0.0, -0.0, 0.1, -1 / 3, float(tiny), float(huge), np.inf, -np.inf, np.nan, 1e300]

    def build(b: Builder) -> None:
        for i, value in enumerate(values):
            b.store(constant(type, value), b.gep(b.params[0], i, type))
            b.store(constant(type.vector(2), value), b.gep(b.params[0], 10 + 2 * i, type))

    stored = np.zeros(30, dtype)
    run(build, stored)
    with np.errstate(over="ignore"):
        expected = np.array(values, dtype)
    np.testing.assert_array_equal(stored, np.concatenate([expected, np.repeat(expected, 2)]))
    np.testing.assert_array_equal(np.signbit(stored[:8]), np.signbit(expected[:8]))


def test_data_stack_and_calls_between_functions() -> None:
    table = np.array([1.5, -2.5, 3.25], np.float32)
    module = Module()
    inner = module.function("inner", [("x", F32)], F32, internal=True)
    inner.ret(inner.mul(inner.params[0], 2.0))
    b = module.function("test", [("y", PTR)])
    pointer = module.data("table", table)
    room = b.alloca(F32, 3, align=64)
    with b.loop(0, 3) as loop:
        value = b.load(F32, b.gep(pointer, loop.index, F32))
        b.store(b.call("inner", F32, [value], declare=False), b.gep(room, loop.index, F32))
    with b.loop(0, 3) as loop:
        b.store(b.load(F32, b.gep(room, loop.index, F32)), b.gep(b.params[0], loop.index, F32))
    b.ret()
    y = np.zeros(3, np.float32)
    load_module(module, ["test"]).function("test", None, ctypes.c_void_p)(address(y))
    np.testing.assert_array_equal(y, table * 2)


def test_any_lane() -> None:
    def build(b: Builder) -> None:
        x, y, _, _ = b.params
        mask = b.compare("gt", b.load(F32.vector(16), x), 5.0)
        b.store(b.cast(b.any(mask), I64), y)

    y = np.zeros(1, np.int64)
    for top, expected in ((5.0, 0), (5.5, 1)):
        run(build, np.array([0] * 11 + [top] + [0] * 4, np.float32), y)
        assert y[0] == expected


def test_mistakes_raise_at_the_call() -> None:
    b = Module().function("test", [("x", F32), ("y", F64), ("m", I1)])
    x, y, _ = b.params
    with pytest.raises(TypeError, match="different types"):
        b.add(x, y)
    with pytest.raises(TypeError, match="no such instruction"):
        b.and_(x, x)
    with pytest.raises(TypeError, match="one operand at least"):
        b.add(1, 2)
    with pytest.raises(TypeError, match="cannot halve"):
        b.reduce(b.splat(x, 3), b.add)
    with pytest.raises(TypeError, match="3 values"):
        vector_constant(I32.vector(4), [1, 2, 3])
    with pytest.raises(TypeError, match="phi of type float"):
        b.phi(F32).add(y, b.current)
    with pytest.raises(TypeError, match="carries 1 values"):
        with b.loop(0, 3, carry=[x]):
            pass
