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
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log10": np.log10,
    "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh,
    "acosh": np.arccosh, "atanh": np.arctanh, "cbrt": np.cbrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0),
    "erf": special.erf, "erfc": lambda x: wide_erfc(x),
    "erfinv": lambda x: np.copysign(special.erfinv(x), x),
}
TWO_OPERANDS = {"atan2": np.arctan2, "hypot": np.hypot}
SPECIAL = ("erf", "erfc", "erfinv")
"""Functions that SciPy knows in float64 only, itself with an error of up to six units."""


def wide_erfc(x: np.ndarray) -> np.ndarray:
    """erfc; above 1/2, where SciPy's loses digits, from its erfcx and NumPy's exp of a long double."""
    long = x.astype(np.longdouble)
    large = special.erfcx(np.maximum(x, 0.5)) * np.exp(-np.minimum(long * long, 1e4))
    return np.where(x > 0.5, large, special.erfc(x))


EXACT_UNARY = {
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil,
    "trunc": np.trunc, "round": np.rint, "isnan": np.isnan, "isfinite": np.isfinite,
}
EXACT_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "mod": np.mod,
    "floordiv": np.floor_divide, "minimum": np.minimum, "maximum": np.maximum, "copysign": np.copysign,
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


def float64_sample() -> np.ndarray:
    """The same for float64 with fewer mantissas, and numbers of ordinary size."""
    rng = np.random.default_rng(8)
    exponents = np.arange(4096, dtype=np.uint64)[:, None] << np.uint64(52)
    mantissas = rng.integers(0, 1 << 52, (4096, 14), dtype=np.uint64)
    mantissas[:, 0], mantissas[:, 1] = 0, (1 << 52) - 1
    ordinary = [rng.uniform(-size, size, 1600) for size in (0.1, 1, 1, 1, 2, 4, 10, 28, 100, 720)]
    near_one = np.array([1, -1] * 1600) * (1 - 10.0 ** rng.uniform(-17, 0, 3200))
    return np.concatenate([(exponents | mantissas).ravel().view(np.float64), *ordinary, near_one])


def ulps(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors of the results in units in the last place; infinite where an inf or NaN is wrong."""
    limits = np.finfo(result.dtype)
    with np.errstate(all="ignore"):
        rounded = exact.astype(result.dtype)
        _, exponent = np.frexp(np.maximum(np.abs(exact), limits.tiny))
        error = np.abs(result.astype(exact.dtype) - exact) / np.ldexp(1.0, exponent - limits.nmant - 1)
    special_value = ~np.isfinite(rounded) | ~np.isfinite(result)
    right = (result == rounded) | (np.isnan(result) & np.isnan(exact))
    return np.where(special_value, np.where(right, 0.0, np.inf), error)


def same_bits_or_nan(result: np.ndarray, expected: np.ndarray) -> None:
    """Equal values, NaN where NaN is expected, the same sign of zero."""
    np.testing.assert_array_equal(result, expected)
    if result.dtype.kind == "f":
        same_signs(result, expected)


def same_signs(result: np.ndarray, expected: np.ndarray) -> None:
    """The same signs, of zeros too, where a number is expected."""
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(result[number]), np.signbit(expected[number]))


@cache
def float_library(dtype: DType, lanes: int, target: str) -> Library:
    module = Module()
    names = []
    for name in [*TRANSCENDENTAL, *EXACT_UNARY, *EXACT_BINARY, *TWO_OPERANDS, "pow"]:
        binary = SCALARS[name].arity == 2
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
    errors = ulps(result, exact.astype(np.float64))
    worst = int(errors.argmax())
    assert errors[worst] <= 2.5, f"{name}({x[worst]!r}) = {result[worst]!r}, not {exact[worst]!r}"
    zero = np.array([0.0, -0.0] * 32, np.float32)
    with np.errstate(all="ignore"):
        expected = TRANSCENDENTAL[name](zero.astype(np.float64)).astype(np.float32)
    same_signs(call_map(float_library(F32, lanes, target), f"t_{name}", [zero], F32), expected)


def test_float32_lanes_agree_to_the_bit() -> None:
    x = float32_sample()
    for name in TRANSCENDENTAL:
        results = [call_map(float_library(F32, lanes, "host"), f"t_{name}", [x], F32) for lanes in (1, 8, 32)]
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="no wider type to compare with")
@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("name", TRANSCENDENTAL)
def test_float64_transcendentals_are_accurate(name: str, lanes: int) -> None:
    x = float64_sample()
    result = call_map(float_library(F64, lanes, "host"), f"t_{name}", [x], F64)
    with np.errstate(all="ignore"):
        exact = TRANSCENDENTAL[name](x if name in SPECIAL else x.astype(np.longdouble))
    errors = ulps(result, exact.astype(np.longdouble))
    worst = int(errors.argmax())
    limit = 8.0 if name in SPECIAL else 2.5
    assert errors[worst] <= limit, f"{name}({x[worst]!r}) = {result[worst]!r}, not {exact[worst]!r}"
    zero = np.array([0.0, -0.0] * 8)
    with np.errstate(all="ignore"):
        expected = TRANSCENDENTAL[name](zero)
    same_signs(call_map(float_library(F64, lanes, "host"), f"t_{name}", [zero], F64), expected)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="no wider type to compare with")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", TWO_OPERANDS)
def test_functions_of_two_numbers_are_accurate(name: str, dtype: DType) -> None:
    rng = np.random.default_rng(4)
    limits = np.finfo(dtype.numpy)
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, limits.max, -limits.max, limits.tiny,
            limits.smallest_subnormal, -limits.smallest_subnormal]
    grid = np.array(np.meshgrid(ends, ends)).reshape(2, -1)
    scale = 10.0 ** rng.uniform(np.log10(limits.tiny) + 10, np.log10(limits.max) - 10, 20_000)
    near = scale * 10.0 ** rng.uniform(-9, 9, scale.shape)
    x, y = (np.concatenate([ends, random * rng.choice([-1, 1], scale.shape)]).astype(dtype.numpy)
            for ends, random in ((grid[0], scale), (grid[1], near)))
    result = call_map(float_library(dtype, 8, "host"), f"t_{name}", [x, y], dtype)
    with np.errstate(all="ignore"):
        exact = TWO_OPERANDS[name](x.astype(np.longdouble), y.astype(np.longdouble))
    errors = ulps(result, exact)
    worst = int(errors.argmax())
    found = f"{name}({x[worst]!r}, {y[worst]!r}) = {result[worst]!r}, not {exact[worst]!r}"
    assert errors[worst] <= 2.5, found
    same_signs(result, exact)


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
    same_signs(result, exact)


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


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="no wider type to compare with")
@pytest.mark.parametrize("lanes", [1, 8])
def test_float64_pow(lanes: int) -> None:
    rng = np.random.default_rng(11)
    x = np.exp(rng.normal(size=40_000) * rng.choice([0.01, 1, 30, 200], 40_000))
    with np.errstate(all="ignore"):
        y = rng.uniform(-1100, 1100, x.shape) / np.log2(x)
    x[::3] *= -1
    y[::6] = np.rint(y[::6])
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2, -2, 0.5, -0.5, 3, -3, 5e-324, -5e-324, 1e308,
            -1e308, 2.0**53 + 2, 1 - 2.0**-53]
    grid = np.array(np.meshgrid(ends, ends)).reshape(2, -1)
    grid = grid[:, : grid.shape[1] // 8 * 8]
    x, y = np.concatenate([x, grid[0]]), np.concatenate([y, grid[1]])
    result = call_map(float_library(F64, lanes, "host"), "t_pow", [x, y], F64)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
    errors = ulps(result, exact)
    worst = int(errors.argmax())
    assert errors[worst] <= 2.5, f"pow({x[worst]!r}, {y[worst]!r}) = {result[worst]!r}, not {exact[worst]!r}"
    same_signs(result, exact)


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
