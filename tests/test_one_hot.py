"""Products with one-hot rows are looked up and added up, with the values of the products."""
from __future__ import annotations

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.compiler.ir.text import parse_graph

rng = np.random.default_rng(0)


def ops(program: gf.Program) -> list[str]:
    return [node.op for node in parse_graph(program.compilation.text("joint")).nodes()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_rows_are_picked_and_added(device: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Indices outside pick zeros and add nothing; some come more than once, some never."""
    symbols, columns = 6, 33
    indices = rng.integers(0, symbols - 1, shape).astype(dtype)
    indices.flat[0], indices.flat[1] = 200, symbols
    if dtype != "uint8":
        indices.flat[2] = -1
    w, dy = rng.normal(size=(symbols, columns)), rng.normal(size=(*shape, columns))
    i = gf.input("i", (gf.dim("N"), *shape[1:]), dtype)
    weight = gf.input("w", w.shape, "float64")
    cotangent = gf.input("dy", (gf.dim("N"), *dy.shape[1:]), "float64")
    y = gf.reshape(gf.matmul(gf.reshape(gf.one_hot(i, symbols, "float64"), (-1, symbols)), weight),
                   cotangent.shape)
    gradient = gf.grad(gf.sum(y * cotangent), weight)
    program = gf.function([i, weight, cotangent], [y, gradient], device=device)
    found, found_gradient = program(i=indices, w=w, dy=dy)
    one_hot = (indices[..., None] == np.arange(symbols)).astype(np.float64)
    np.testing.assert_array_equal(found, one_hot @ w)
    wanted = one_hot.reshape(-1, symbols).T @ dy.reshape(-1, columns)
    np.testing.assert_allclose(found_gradient, wanted, rtol=1e-14, atol=1e-15)
    assert "matmul" not in ops(program)
    assert ops(program).count("gather") == ops(program).count("scatter_add") == 1


@pytest.mark.reference
@pytest.mark.parametrize("make", [
    lambda i, w: gf.matmul(gf.one_hot(i, 6, "float64") * 2, w),
    lambda i, w: gf.matmul(gf.cast(gf.expand_dims(i, 1) == gf.arange(6)[::-1], "float64"), w),
    lambda i, w: gf.matmul(gf.cast(gf.expand_dims(i, 1) > gf.arange(6), "float64"), w),
    lambda i, w: gf.matmul(gf.cast(i == gf.expand_dims(gf.arange(6), 1), "float64"), w),
])
def test_what_only_looks_like_it_stays_a_product(make) -> None:  # type: ignore[no-untyped-def]
    i, w = gf.input("i", (6,), "int64"), gf.input("w", (6, 4), "float64")
    program = gf.function([i, w], make(i, w), device="reference")
    assert ops(program).count("matmul") == 1
