"""Products that sum over axes against NumPy: matmul, einsum, tensordot and their relatives."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.compiler.plan.errors import ShapeError, UseError

RNG = np.random.default_rng(0)

EQUATIONS: list[tuple[str, tuple[tuple[int, ...], ...]]] = [
    ("ij,jk->ik", ((3, 4), (4, 5))), ("ij,jk", ((3, 4), (4, 5))), ("ba,bc", ((3, 4), (3, 5))),
    ("ij,kj->ki", ((3, 4), (5, 4))), ("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))),
    ("bij,jk->bik", ((2, 3, 4), (4, 5))), ("ij,bjk->bik", ((3, 4), (2, 4, 5))),
    ("bqhd,bkhd->bhqk", ((2, 3, 2, 4), (2, 5, 2, 4))), ("bhqk,bkhd->bqhd", ((2, 2, 3, 5), (2, 5, 2, 4))),
    ("i,i", ((4,), (4,))), ("i,j->ij", ((3,), (4,))), ("i,j->ji", ((3,), (4,))),
    ("ij,ij->i", ((3, 4), (3, 4))),
    ("ij,ij->", ((3, 4), (3, 4))), ("ij,j->i", ((3, 4), (4,))), ("ijk,k->ij", ((2, 3, 4), (4,))),
    ("ii", ((4, 4),)), ("ii->i", ((4, 4),)), ("iij->ji", ((3, 3, 4),)), ("iii->i", ((3, 3, 3),)),
    ("ii,i->i", ((4, 4), (4,))), ("ij->", ((3, 4),)), ("ij->j", ((3, 4),)), ("ij->ji", ((3, 4),)),
    ("ba", ((3, 4),)), ("ijk->ki", ((2, 3, 4),)), ("ijk,l->il", ((2, 3, 4), (5,))),
    ("ik,jkl->ijl", ((2, 3), (4, 3, 5))), ("ijkl,klmn->ijmn", ((2, 3, 2, 3), (2, 3, 4, 2))),
    ("aibj,cjdi->abcd", ((2, 3, 2, 4), (3, 4, 2, 3))), ("i,i,i->i", ((3,), (3,), (3,))),
    ("ab,bc,cd->ad", ((2, 9), (9, 3), (3, 8))), ("ab,bc,cd,de->ae", ((2, 3), (3, 4), (4, 5), (5, 2))),
    ("ij,jk,ki", ((3, 4), (4, 5), (5, 3))), ("ia,ib,ic->abc", ((4, 2), (4, 3), (4, 2))),
    ("a,b,c,d,e,f,a->bcdef", ((2,), (1,), (2,), (3,), (2,), (2,), (2,))),
    ("...ij,...jk->...ik", ((2, 3, 4), (2, 4, 5))), ("...ij,...jk", ((2, 1, 3, 4), (6, 4, 5))),
    ("...i->...", ((2, 3, 4),)), ("i...,i...->...i", ((3, 2), (3, 2))), ("...ii->...i", ((2, 3, 3),)),
    ("i...j,j->i...", ((2, 3, 4, 5), (5,))), ("...,...", ((3, 4), (4,))), ("b...,b", ((2, 3, 4), (2,))),
    ("ij,jk->ik", ((1, 4), (4, 1))), ("ij,ij->ij", ((1, 4), (3, 4))), ("ij,jk->ik", ((3, 1), (4, 5))),
    ("ij,ij->j", ((1, 4), (3, 4))), ("ij,jk->ik", ((3, 0), (0, 2))), ("i,->i", ((3,), ())),
    (" i j , j -> i ", ((3, 4), (4,)))]


def operands(shapes: tuple[tuple[int, ...], ...], dtype: str = "float64") -> list[np.ndarray]:
    return [RNG.uniform(-1, 1, shape).astype(dtype) for shape in shapes]


def numpy_einsum(equation: str, *arrays: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum(equation.replace(" ", ""), *arrays))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_einsum_is_numpys(device: str, dtype: str) -> None:
    arrays = [operands(shapes, dtype) for _, shapes in EQUATIONS]
    inputs = [[gf.input(f"x{i}_{j}", a.shape, dtype) for j, a in enumerate(group)]
              for i, group in enumerate(arrays)]
    built = [gf.einsum(equation, *group) for (equation, _), group in zip(EQUATIONS, inputs)]
    flat = [x for group in inputs for x in group]
    found = gf.function(flat, built, device=device)(*(a for group in arrays for a in group))
    for (equation, shapes), value, group in zip(EQUATIONS, found, arrays, strict=True):
        expected = numpy_einsum(equation, *group)
        assert value.shape == expected.shape and value.dtype == expected.dtype, equation
        near = 1e-5 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(value, expected, rtol=near, atol=near, err_msg=f"{equation} {shapes}")


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_einsum(device: str) -> None:
    """Each operand's gradient is linear in the other operands: sum(gradient * direction) is the sum of the
    equation with the direction in the operand's place."""
    flat, feeds, built, expected = [], [], [], []
    for i, (equation, shapes) in enumerate(EQUATIONS):
        arrays = operands(shapes)
        inputs = [gf.input(f"x{i}_{j}", a.shape, "float64") for j, a in enumerate(arrays)]
        flat, feeds = flat + inputs, feeds + arrays
        y = gf.einsum(equation, *inputs)
        weights = RNG.uniform(-1, 1, numpy_einsum(equation, *arrays).shape)
        grads = gf.grad(gf.sum(y * gf.constant(weights)), inputs)
        for j, a in enumerate(arrays):
            direction = RNG.uniform(-1, 1, a.shape)
            moved = [*arrays[:j], direction, *arrays[j + 1:]]
            built.append(gf.sum(grads[j] * gf.constant(direction)))
            expected.append(np.sum(numpy_einsum(equation, *moved) * weights))
    found = gf.function(flat, built, device=device)(*feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_einsum_of_integers_and_of_extents_that_the_call_decides(device: str) -> None:
    b, t = gf.dim("B"), gf.dim("T")
    q, k = gf.input("q", (b, t, 2, 4)), gf.input("k", (b, t, 2, 4))
    i, j = gf.input("i", (3, 4), "int32"), gf.input("j", (4, 2), "int32")
    scores = gf.einsum("bqhd,bkhd->bhqk", q, k)
    built = [scores, gf.einsum("bhqk,bkhd->bqhd", scores, k), gf.einsum("bthd->htd", q),
             gf.einsum("ij,jk", i, j), i @ j,
             gf.einsum("bthd,bthd->", q, k), gf.grad(gf.sum(scores * scores), q),
             gf.einsum("tt->t", q[0, :, 0] @ k[0, :, 0].T)]
    arrays = [*operands(((2, 3, 2, 4), (2, 3, 2, 4)), "float32"),
              RNG.integers(-9, 9, (3, 4)).astype(np.int32), RNG.integers(-9, 9, (4, 2)).astype(np.int32)]
    found = gf.function([q, k, i, j], built, device=device)(*arrays)
    x, y = arrays[:2]
    expected = np.einsum("bqhd,bkhd->bhqk", x, y)
    wanted = [expected, np.einsum("bhqk,bkhd->bqhd", expected, y), np.einsum("bthd->htd", x),
              arrays[2] @ arrays[3], arrays[2] @ arrays[3], np.einsum("bthd,bthd->", x, y),
              2 * np.einsum("bhqk,bkhd->bqhd", expected, y), np.einsum("td,td->t", x[0, :, 0], y[0, :, 0])]
    for value, want in zip(found, wanted, strict=True):
        assert value.shape == want.shape and value.dtype == want.dtype
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)


def test_the_cheapest_order_is_taken() -> None:
    """A vector at the end of a chain of matrices: no product of two matrices is made."""
    x = [gf.input(f"x{i}", (50, 50)) for i in range(4)]
    v = gf.input("v", (50,))
    for equation, given in (("ab,bc,cd,de,e->a", [*x, v]), ("a,ab,bc,cd,de->e", [v, *x])):
        graph = gf.function(given, gf.einsum(equation, *given), device="reference").traced
        sizes = [v.type.size for node in graph.nodes() if node.op == "matmul" for v in node.results]
        assert len(sizes) == 4 and max(sizes) == 50


BROADCAST = [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((3, 4), (2, 4, 5)),
             ((6, 1, 3, 4), (2, 4, 5)), ((1, 3, 4), (2, 4, 5)), ((4,), (4,)), ((4,), (2, 4, 5)),
             ((2, 3, 4), (4,)), ((2, 3, 3, 4), (4,)), ((2, 2, 3, 4), (4, 5))]
PRODUCTS: list[tuple[Any, tuple[tuple[int, ...], ...]]] = [
    *((lambda m, x, y: m.matmul(x, y), shapes) for shapes in BROADCAST),
    (lambda m, x, y: m.tensordot(x, y), ((2, 3, 4), (3, 4, 5))),
    (lambda m, x, y: m.tensordot(x, y, 1), ((2, 3), (3, 4, 5))),
    (lambda m, x, y: m.tensordot(x, y, 0), ((2, 3), (4,))),
    (lambda m, x, y: m.tensordot(x, y, ([0, -1], [2, 0])), ((2, 3, 4), (4, 5, 2))),
    (lambda m, x, y: m.tensordot(x, y, (1, 0)), ((2, 3), (3, 5))),
    (lambda m, x, y: m.inner(x, y), ((2, 3, 4), (5, 4))), (lambda m, x, y: m.inner(x, y), ((4,), (4,))),
    (lambda m, x, y: m.outer(x, y), ((2, 3), (4,))), (lambda m, x, y: m.kron(x, y), ((2, 3), (4, 2))),
    (lambda m, x, y: m.kron(x, y), ((3,), (2, 2, 4))), (lambda m, x, y: m.vecdot(x, y), ((2, 3), (2, 3))),
    (lambda m, x, y: m.vecdot(x, y), ((2, 1, 3), (4, 3))),
    (lambda m, x, y: m.vecdot(x, y, axis=0), ((2, 3), (2, 3))),
    (lambda m, x, y: m.dot(x, y), ((2, 3), (4, 3, 5))),
    (lambda m, x, y: m.dot(x, y), ((2, 3), (3,))), (lambda m, x, y: m.dot(x, y), ((), (3,)))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_products_are_numpys(device: str, dtype: str) -> None:
    flat, feeds, built, expected = [], [], [], []
    for i, (f, shapes) in enumerate(PRODUCTS):
        arrays = [(a * 9).astype(dtype) for a in operands(shapes)]
        inputs = [gf.input(f"x{i}_{j}", a.shape, dtype) for j, a in enumerate(arrays)]
        flat, feeds = flat + inputs, feeds + arrays
        built.append(f(gf, *inputs))
        expected.append(np.asarray(f(np, *arrays)))
    found, near = gf.function(flat, built, device=device)(*feeds), 1e-4 if dtype == "float32" else 1e-12
    for i, (value, want) in enumerate(zip(found, expected, strict=True)):
        assert value.shape == want.shape and value.dtype == want.dtype, i
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=near, err_msg=str(i))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_products(device: str) -> None:
    """As `test_gradients_of_einsum`: products are linear in each operand."""
    flat, feeds, built, expected = [], [], [], []
    for i, (f, shapes) in enumerate(PRODUCTS):
        arrays, directions = operands(shapes), operands(shapes)
        inputs = [gf.input(f"x{i}_{j}", a.shape, "float64") for j, a in enumerate(arrays)]
        flat, feeds = flat + inputs, feeds + arrays
        weights = RNG.uniform(-1, 1, np.shape(f(np, *arrays)))
        grads = gf.grad(gf.sum(f(gf, *inputs) * gf.constant(weights)), inputs)
        built += [gf.sum(g * gf.constant(d)) for g, d in zip(grads, directions)]
        expected += [np.sum(f(np, directions[0], arrays[1]) * weights),
                     np.sum(f(np, arrays[0], directions[1]) * weights)]
    found = gf.function(flat, built, device=device)(*feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("build, kind, message", [
    (lambda x, y: gf.einsum("ij,jk", x), UseError, "is about 2 operand"),
    (lambda x, y: gf.einsum("ij,jk", x, y), ShapeError, "'j' is 4 in one place and 5 in another"),
    (lambda x, y: gf.einsum("ijk", x), ShapeError, "3 letters for an array of 2 axes"),
    (lambda x, y: gf.einsum("i", x), ShapeError, "1 letters for an array of 2 axes"),
    (lambda x, y: gf.einsum("ij->ik", x), UseError, "'k', which no operand has"),
    (lambda x, y: gf.einsum("ij->ii", x), UseError, "a letter twice"),
    (lambda x, y: gf.einsum("i1", x), UseError, "not made of letters"),
    (lambda x, y: gf.einsum("i...->i", x), UseError, "has no '...', but the operands have"),
    (lambda x, y: gf.einsum(x, y), UseError, "takes an equation"),
    (lambda x, y: gf.matmul(x, y), ShapeError, "an axis of 4 with one of 5"),
    (lambda x, y: gf.tensordot(x, y, 3), ShapeError, "do not both have 3 axes"),
    (lambda x, y: gf.tensordot(x, y, 1), ShapeError, "first array is 4, axis 0 of the second 5"),
    (lambda x, y: gf.tensordot(x, y, ([0], [1, 0])), UseError, "does not pair axes"),
    (lambda x, y: gf.vecdot(x, y), ShapeError, "have 4 and 3 elements"),
])
def test_errors_say_what_is_wrong(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(gf.input("x", (3, 4)), gf.input("y", (5, 3)))
