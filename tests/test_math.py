"""Scalar functions as native code, against NumPy and SciPy."""
from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from native_code import add_map, call_map, load_module, targets
from scipy import special

from graphflow.compiler.emit.builder import Builder, Module, Value
from graphflow.compiler.emit.math import MATH, convert, scalar
from graphflow.compiler.emit.object import assembly
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.plan.dtypes import BOOL, COMPUTED, F32, F64, I32, I64, U8, U32, DType
from graphflow.compiler.target import make_target
from graphflow.runtime.native import Library

pytestmark = pytest.mark.cpu

TRANSCENDENTAL = {
    "exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "tanh": np.tanh,
    "sigmoid": special.expit, "softplus": lambda x: np.logaddexp(x, 0.0), "erf": special.erf,
    "sin": np.sin, "cos": np.cos, "rsqrt": lambda x: 1 / np.sqrt(x),
}
EXACT_UNARY = {
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil,
    "trunc": np.trunc, "round": np.rint, "isnan": np.isnan, "isfinite": np.isfinite,
}
EXACT_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "mod": np.mod,
    "floordiv": np.floor_divide, "minimum": np.minimum, "maximum": np.maximum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}
INTEGER_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mod": np.mod, "floordiv": np.floor_divide,
    "minimum": np.minimum, "maximum": np.maximum, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "bit_and": np.bitwise_and,
    "bit_or": np.bitwise_or, "bit_xor": np.bitwise_xor, "shift_left": np.left_shift,
    "shift_right": np.right_shift,
}
INTEGER_UNARY = {name: EXACT_UNARY[name] for name in ("neg", "abs", "sign", "isnan", "isfinite")}
BOOL_BINARY = {
    "and": np.logical_and, "or": np.logical_or, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "minimum": np.minimum,
    "maximum": np.maximum, "add": np.add, "mul": np.multiply, "bit_xor": np.bitwise_xor,
}
INTEGERS = [I32, I64, U32, U8]


def float32_sample() -> np.ndarray:
    """Every exponent and sign, denormals, infinities and NaN among them, with many mantissas each."""
    rng = np.random.default_rng(7)
    mantissas = np.concatenate([[0, 1, (1 << 23) - 1], np.linspace(2, (1 << 23) - 2, 48).astype(np.int64)])
    exponents = np.arange(512, dtype=np.uint32)[:, None] << 23
    even = exponents | mantissas.astype(np.uint32)
    random = exponents | rng.integers(0, 1 << 23, (512, 77), dtype=np.uint32)
    return np.concatenate([even, random], axis=1).ravel().view(np.float32)


def ulps(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors of float32 results in units in the last place; infinite where an inf or NaN is wrong."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        _, exponent = np.frexp(np.maximum(np.abs(exact), 2.0**-126))
        error = np.abs(result.astype(np.float64) - exact) / np.ldexp(1.0, exponent - 24)
    special_value = ~np.isfinite(rounded) | ~np.isfinite(result)
    right = (result == rounded) | (np.isnan(result) & np.isnan(exact))
    return np.where(special_value, np.where(right, 0.0, np.inf), error)


def same_bits_or_nan(result: np.ndarray, expected: np.ndarray) -> None:
    """Equal values, NaN where NaN is expected, the same sign of zero."""
    np.testing.assert_array_equal(result, expected)
    if result.dtype.kind == "f":
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(result[number]), np.signbit(expected[number]))


@cache
def float_library(dtype: DType, lanes: int, target: str) -> Library:
    module = Module()
    names = []
    for name in [*TRANSCENDENTAL, *EXACT_UNARY, *EXACT_BINARY, "pow"]:
        binary = name in EXACT_BINARY or name == "pow"
        comparison = name in ("isnan", "isfinite") or (name in SCALARS and SCALARS[name].result == "bool")
        add_map(module, f"t_{name}", lanes, [dtype] * (2 if binary else 1), BOOL if comparison else dtype,
                lambda b, *values, name=name: scalar(b, name, dtype, *values))
        names.append(f"t_{name}")
    return load_module(module, names, targets()[target])


NARROWER = [(name, 8) for name in targets() if name != "host"]
CONFIGURATIONS = [("host", 1), ("host", 8), ("host", 32), *NARROWER]


@pytest.mark.parametrize("target, lanes", CONFIGURATIONS)
@pytest.mark.parametrize("name", TRANSCENDENTAL)
def test_float32_transcendentals_are_accurate(name: str, target: str, lanes: int) -> None:
    x = float32_sample()
    result = call_map(float_library(F32, lanes, target), f"t_{name}", [x], F32)
    with np.errstate(all="ignore"):
        exact = TRANSCENDENTAL[name](x.astype(np.float64))
    errors = ulps(result, exact)
    worst = int(errors.argmax())
    assert errors[worst] <= 2.5, f"{name}({x[worst]!r}) = {result[worst]!r}, not {exact[worst]!r}"
    zero = np.array([0.0, -0.0] * 32, np.float32)
    with np.errstate(all="ignore"):
        expected = TRANSCENDENTAL[name](zero.astype(np.float64)).astype(np.float32)
    at_zero = call_map(float_library(F32, lanes, target), f"t_{name}", [zero], F32)
    np.testing.assert_array_equal(np.signbit(at_zero), np.signbit(expected))


def test_float32_lanes_agree_to_the_bit() -> None:
    x = float32_sample()
    for name in TRANSCENDENTAL:
        results = [call_map(float_library(F32, lanes, "host"), f"t_{name}", [x], F32) for lanes in (1, 8, 32)]
        if name in ("sin", "cos"):  # a vector with one huge argument goes to the C library as a whole
            chosen = np.abs(x) <= 65536.0
            results = [call_map(float_library(F32, lanes, "host"), f"t_{name}", [np.where(chosen, x, 0)], F32)
                       for lanes in (1, 8, 32)]
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("target, lanes", CONFIGURATIONS)
def test_float32_pow(target: str, lanes: int) -> None:
    rng = np.random.default_rng(3)
    x = np.exp(rng.normal(size=40_000) * 20).astype(np.float32)
    with np.errstate(all="ignore"):
        y = (rng.uniform(-150, 150, x.shape) / np.log2(x.astype(np.float64))).astype(np.float32)
    x[::3] *= -1
    y[::6] = np.rint(y[::6])
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2, -2, 0.5, -0.5, 3, -3, 1e-45, -1e-45, 3e38]
    grid = np.array(np.meshgrid(ends, ends)).reshape(2, -1).astype(np.float32)
    x, y = np.concatenate([x, grid[0]]), np.concatenate([y, grid[1]])
    result = call_map(float_library(F32, lanes, target), "t_pow", [x, y], F32)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64))
    errors = ulps(result, exact)
    worst = int(errors.argmax())
    assert errors[worst] <= 0.51, f"pow({x[worst]!r}, {y[worst]!r}) = {result[worst]!r}, not {exact[worst]!r}"
    number = ~np.isnan(exact)
    np.testing.assert_array_equal(np.signbit(result[number]), np.signbit(exact[number]))


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of some values, as many as 32 divides."""
    first, second = (np.ascontiguousarray(grid.ravel()) for grid in np.meshgrid(values, values))
    count = len(first) // 32 * 32
    return first[:count], second[:count]


def interesting_floats(dtype: DType) -> np.ndarray:
    rng = np.random.default_rng(5)
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 0.5, -0.5, 1.5, 2.5, -2.5, 1, -1, 3, 1e9, 8388607.5, -1e30]
    tiny = np.finfo(dtype.numpy).tiny
    return np.concatenate([ends, [tiny, -tiny, tiny / 4], rng.normal(size=45) * 10]).astype(dtype.numpy)


@pytest.mark.parametrize("target, lanes", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_plain_float_functions_equal_numpy(dtype: DType, target: str, lanes: int) -> None:
    x, y = pairs(interesting_floats(dtype))
    library = float_library(dtype, lanes, target)
    for name, function in {**EXACT_UNARY, **EXACT_BINARY}.items():
        arguments = [x, y] if name in EXACT_BINARY else [x]
        with np.errstate(all="ignore"):
            expected = function(*arguments)
        result_type = BOOL if expected.dtype == bool else dtype
        result = call_map(library, f"t_{name}", arguments, result_type)
        if name in ("minimum", "maximum"):  # NumPy leaves open which zero comes out
            result, expected = result + 0.0, expected + 0.0
        same_bits_or_nan(result, expected)


@pytest.mark.parametrize("lanes", [1, 8])
def test_float64_functions_equal_numpy(lanes: int) -> None:
    rng = np.random.default_rng(11)
    x = np.concatenate([rng.normal(size=400) * 10.0 ** rng.integers(-12, 3, 400),
                        [0.0, -0.0, np.inf, -np.inf, np.nan, 710.0, -745.0, 1e300]])
    library = float_library(F64, lanes, "host")
    for name, function in TRANSCENDENTAL.items():
        with np.errstate(all="ignore"):
            expected = function(x)
        result = call_map(library, f"t_{name}", [x], F64)
        np.testing.assert_allclose(result, expected, rtol=2e-15, atol=1e-320)
    y = rng.normal(size=len(x)) * 3
    with np.errstate(all="ignore"):
        expected = np.power(x, y)
    np.testing.assert_allclose(call_map(library, "t_pow", [x, y], F64), expected, rtol=2e-15)


@cache
def integer_library(dtype: DType, lanes: int, target: str) -> Library:
    module = Module()
    names = []
    for name in [*INTEGER_BINARY, *INTEGER_UNARY, "pow"]:
        result = BOOL if SCALARS[name].result == "bool" else dtype
        add_map(module, f"t_{name}", lanes, [dtype] * SCALARS[name].arity, result,
                lambda b, *values, name=name: scalar(b, name, dtype, *values))
        names.append(f"t_{name}")
    return load_module(module, names, targets()[target])


def interesting_integers(dtype: DType) -> np.ndarray:
    rng = np.random.default_rng(13)
    limits = np.iinfo(dtype.numpy)
    low = max(limits.min, -100)
    return np.concatenate([
        np.array([limits.min, limits.max, limits.max - 1, 0, 1, 2, 3], dtype.numpy),
        rng.integers(low, 100, 24).astype(dtype.numpy),
        rng.integers(limits.min, limits.max, 32, dtype=dtype.numpy),
        (-np.arange(1, 2)).astype(dtype.numpy)])


@pytest.mark.parametrize("lanes", [1, 8, 32])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_functions_equal_numpy(dtype: DType, lanes: int) -> None:
    x, y = pairs(interesting_integers(dtype))
    library = integer_library(dtype, lanes, "host")
    for name, function in {**INTEGER_UNARY, **INTEGER_BINARY}.items():
        arguments = [x, y] if name in INTEGER_BINARY else [x]
        with np.errstate(all="ignore"):
            expected = function(*arguments)
        result = call_map(library, f"t_{name}", arguments, BOOL if expected.dtype == bool else dtype)
        np.testing.assert_array_equal(result, expected, err_msg=f"{name} of {dtype}")
    exponents = y.astype(np.uint64).astype(dtype.numpy) & dtype.numpy.type(63)
    np.testing.assert_array_equal(call_map(library, "t_pow", [x, exponents], dtype), np.power(x, exponents))


@pytest.mark.parametrize("lanes", [1, 16])
def test_bool_functions_equal_numpy(lanes: int) -> None:
    module = Module()
    x = np.array([False, False, True, True] * 8)
    y = np.array([False, True, False, True] * 8)
    for name in BOOL_BINARY:
        add_map(module, f"t_{name}", lanes, [BOOL, BOOL], BOOL,
                lambda b, *values, name=name: scalar(b, name, BOOL, *values))
    add_map(module, "t_not", lanes, [BOOL], BOOL, lambda b, x: scalar(b, "not", BOOL, x))
    library = load_module(module, [*(f"t_{name}" for name in BOOL_BINARY), "t_not"])
    for name, function in BOOL_BINARY.items():
        np.testing.assert_array_equal(call_map(library, f"t_{name}", [x, y], BOOL), function(x, y))
    np.testing.assert_array_equal(call_map(library, "t_not", [x], BOOL), ~x)


@pytest.mark.parametrize("lanes", [1, 8])
def test_where_and_fma(lanes: int) -> None:
    module = Module()
    add_map(module, "t_where", lanes, [BOOL, F32, F32], F32,
            lambda b, *values: scalar(b, "where", F32, *values))
    add_map(module, "t_fma", lanes, [F32, F32, F32], F32, lambda b, *values: scalar(b, "fma", F32, *values))
    library = load_module(module, ["t_where", "t_fma"])
    rng = np.random.default_rng(2)
    x, y, z = rng.normal(size=(3, 64)).astype(np.float32)
    np.testing.assert_array_equal(call_map(library, "t_where", [x > 0, y, z], F32), np.where(x > 0, y, z))
    z = -(x * y)  # what one rounding leaves of x·y - round(x·y); float64 holds it exactly
    exact = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    np.testing.assert_array_equal(call_map(library, "t_fma", [x, y, z], F32), exact.astype(np.float32))


@pytest.mark.parametrize("lanes", [1, 8])
def test_convert_equals_numpy(lanes: int) -> None:
    module = Module()
    cases = [(source, target) for source in COMPUTED for target in COMPUTED]
    for source, target in cases:
        def function(b: Builder, x: Value, source: DType = source, target: DType = target) -> Value:
            return convert(b, x, source, target)
        add_map(module, f"from_{source}_to_{target}", lanes, [source], target, function)
    library = load_module(module, [f"from_{source}_to_{target}" for source, target in cases])
    for source, target in cases:
        x = np.array([0, 1, 2, 3, 100, 127, 128, 200]).astype(source.numpy)
        if source.is_integer:
            x[-1] = np.iinfo(source.numpy).max
        if source.is_float:
            x += source.numpy.type(0.75)
        if source.kind in "if" and target.kind in "if":
            x *= source.numpy.type(-1)
        result = call_map(library, f"from_{source}_to_{target}", [x], target)
        np.testing.assert_array_equal(result, x.astype(target.numpy), err_msg=f"{source} to {target}")


def test_float_to_integer_saturates() -> None:
    module = Module()
    add_map(module, "to_i32", 8, [F32], I32, lambda b, x: convert(b, x, F32, I32))
    x = np.array([3e9, -3e9, np.inf, -np.inf, np.nan, 2.9, -2.9, 0], np.float32)
    limits = np.iinfo(np.int32)
    expected = np.array([limits.max, limits.min, limits.max, limits.min, 0, 2, -2, 0], np.int32)
    np.testing.assert_array_equal(call_map(load_module(module, ["to_i32"]), "to_i32", [x], I32), expected)


def test_every_scalar_function_has_a_row() -> None:
    assert set(SCALARS) - set(MATH) == {"cast"}


def test_arm64_code_is_generated() -> None:
    module = Module()
    for name in TRANSCENDENTAL:
        add_map(module, f"t_{name}", 4, [F32], F32, lambda b, x, name=name: scalar(b, name, F32, x))
    text = assembly(module.text(), make_target("aarch64-unknown-linux-gnu", "generic", {"neon": True}, {}))
    assert "fmla\tv" in text and "bl\tfmaf" not in text
