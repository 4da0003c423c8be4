"""The matrices of Winograd's algorithm, and the code for products with them, against exact fractions."""

from __future__ import annotations

import ctypes
from fractions import Fraction

import numpy as np
import pytest

from graphflow.compiler.emit.builder import F64, PTR, Module
from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.emit.winograd_matrices import Matrix, multiply, transposed, winograd_matrices
from graphflow.compiler.target import host_target
from graphflow.runtime.native import load_object

FORMS = ((2, 3), (3, 2), (4, 3), (3, 4), (2, 5), (5, 2), (5, 3), (3, 5), (4, 5), (5, 4))


def fractions(rng: np.random.Generator, count: int) -> list[Fraction]:
    """Random small integers."""
    return [Fraction(int(x)) for x in rng.integers(-9, 10, count)]


def apply(matrix: Matrix, values: list[Fraction]) -> list[Fraction]:
    """The product by its definition."""
    return [sum((c * v for c, v in zip(row, values)), Fraction(0)) for row in matrix]


@pytest.mark.parametrize("outputs, taps", FORMS)
def test_the_algorithm_is_exact(outputs: int, taps: int) -> None:
    """In fractions it gives the sums of the definition, and its transpose the gradient for the taps."""
    rng = np.random.default_rng(outputs * 8 + taps)
    m = winograd_matrices(outputs, taps)
    for _ in range(5):
        d, g, dy = (fractions(rng, n) for n in (outputs + taps - 1, taps, outputs))
        inputs = apply(m.b, d)
        products = [x * y for x, y in zip(apply(m.g, g), inputs)]
        assert apply(m.a, products) == [sum(d[i + k] * g[k] for k in range(taps)) for i in range(outputs)]
        products = [x * y for x, y in zip(apply(transposed(m.a), dy), inputs)]
        assert apply(transposed(m.g), products) == [
            sum(d[i + k] * dy[i] for i in range(outputs)) for k in range(taps)]


@pytest.mark.parametrize("outputs, taps", FORMS)
def test_inputs_are_transformed_exactly(outputs: int, taps: int) -> None:
    """The entries of A and B are float32 numbers."""
    m = winograd_matrices(outputs, taps)
    for row in (*m.a, *m.b):
        for entry in row:
            assert Fraction(float(np.float32(float(entry)))) == entry


def test_unknown_forms_are_refused() -> None:
    """There are no points for every number of products."""
    with pytest.raises(ValueError, match="5 products"):
        winograd_matrices(3, 3)


@pytest.mark.parametrize("fma", [True, False])
@pytest.mark.parametrize("name", ["a", "g", "b", "a'", "g'"])
@pytest.mark.parametrize("outputs, taps", FORMS)
def test_code_multiplies(outputs: int, taps: int, name: str, fma: bool) -> None:
    """The code gives the product in vectors of float64, to rounding, with at most the plain number of
    operations."""
    target = host_target()
    if fma and not target.has_fma:
        pytest.skip("this processor has no fused multiply and add")
    matrix: Matrix = getattr(winograd_matrices(outputs, taps), name[0])
    matrix = transposed(matrix) if name.endswith("'") else matrix
    module = Module()
    b = module.function("f", [("x", PTR), ("y", PTR)])
    wide = F64.vector(2)
    values = [b.load(wide, b.gep(b.params[0], 2 * i, F64)) for i in range(len(matrix[0]))]
    for i, value in enumerate(multiply(b, matrix, values, fma)):
        b.store(value, b.gep(b.params[1], 2 * i, F64))
    b.ret()
    library = load_object(compile_object(module.text(), target), "f", ["f"])
    x = np.random.default_rng(1).integers(-9, 10, (len(values), 2)).astype(np.float64)
    y = np.full((len(matrix), 2), np.nan)
    library.function("f", None, ctypes.c_void_p, ctypes.c_void_p)(x.ctypes.data, y.ctypes.data)
    for lane in (0, 1):
        expected = apply(matrix, [Fraction(v) for v in x[:, lane]])
        np.testing.assert_allclose(y[:, lane], [float(v) for v in expected], rtol=1e-13, atol=1e-12)
    operations = sum(module.text().count(f" = {op} ") for op in ("fadd", "fsub", "fmul", "fneg"))
    operations += module.text().count("call <2 x double> @llvm.fma")
    plain = sum(2 * sum(map(bool, row)) - 1 for row in matrix)
    assert operations <= plain
