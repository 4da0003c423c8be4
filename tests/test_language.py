"""The language against NumPy: operators, promotion, broadcasting, slicing, functions, gradients, programs."""
from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from scipy import special

import graphflow as gf
from graphflow.compiler.ops import OPS

RNG = np.random.default_rng(0)
A = RNG.uniform(0.5, 2, (3, 4)).astype(np.float32)
B = RNG.uniform(0.5, 2, (4,)).astype(np.float32)
INTS = (RNG.integers(1, 9, (3, 4)) * RNG.choice([-1, 1], (3, 4))).astype(np.int32)
J = RNG.integers(1, 6, (3, 1)).astype(np.int32)
C = RNG.integers(0, 2, (3, 4)).astype(bool)
D = RNG.integers(0, 2, (3, 4)).astype(bool)
CUBE = RNG.standard_normal((5, 4, 6)).astype(np.float32)


def run(device: str, build: Any, *arrays: np.ndarray) -> Any:
    """What `build` makes of inputs like the arrays, computed on the device from the arrays."""
    inputs = [gf.input(f"x{i}", a.shape, a.dtype) for i, a in enumerate(arrays)]
    return gf.function(inputs, build(*inputs), device=device)(*arrays)


def same(found: np.ndarray, expected: Any, tolerance: float = 1e-6) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(found, expected)


# --- operators

OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge}


@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_numpys_with_broadcasting(device: str) -> None:
    cases = [(A, B), (B, A), (INTS, J), (J, INTS)]
    inputs = [gf.input(f"x{i}", a.shape, a.dtype) for i, a in enumerate((A, B, INTS, J))]
    tensors = {id(a): t for a, t in zip((A, B, INTS, J), inputs)}
    built = {f"{i} {name}": f(tensors[id(x)], tensors[id(y)])
             for i, (x, y) in enumerate(cases) for name, f in OPERATORS.items()}
    expected = {f"{i} {name}": f(x, y) for i, (x, y) in enumerate(cases) for name, f in OPERATORS.items()}
    for key, found in gf.function(inputs, built, device=device)(A, B, INTS, J).items():
        assert found.dtype == expected[key].dtype, key
        same(found, expected[key])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [
    lambda x: 2 - x, lambda x: 3 / x, lambda x: 2 ** x, lambda x: x ** 2, lambda x: x ** 3,
    lambda x: x ** 0.5,
    lambda x: 7 // x, lambda x: 7 % x, lambda x: -x, lambda x: abs(-x), lambda x: 1 + x * 2.5,
    lambda x: x + np.float32(1), lambda x: np.array([1, 2, 3, 4]) * x, lambda x: [1.5, 2, 3, 4] + x,
    lambda x: x + np.arange(12.0).reshape(3, 4)])
def test_python_numbers_and_arrays_are_weak(device: str, build: Any) -> None:
    found = run(device, build, A)
    assert found.dtype == np.float32
    with np.errstate(all="ignore"):
        same(found, np.asarray(build(A), np.float32), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [
    lambda x, y: x & y, lambda x, y: x | y, lambda x, y: x ^ y, lambda x, y: ~x, lambda x, y: x & True,
    lambda x, y: x == y, lambda x, y: x != y])
def test_operators_on_bools(device: str, build: Any) -> None:
    same(run(device, build, C, D), build(C, D))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [
    lambda x, y: x & y, lambda x, y: x | y, lambda x, y: x ^ y, lambda x, y: ~x, lambda x, y: x << y,
    lambda x, y: x >> y, lambda x, y: x ** 2, lambda x, y: x * 3 - 1])
def test_operators_on_integers(device: str, build: Any) -> None:
    found = run(device, build, INTS, J)
    assert found.dtype == np.int32
    same(found, build(INTS, J))


@pytest.mark.parametrize("x, y, expected", [
    ("float32", "int64", "f32"), ("float32", "float64", "f64"), ("int32", "int64", "i64"), ("bool", "uint8",
                                                                                            "u8"),
    ("uint32", "int32", "i64"), ("bool", "float32", "f32"), ("uint8", "int32", "i32")])
def test_promotion(x: str, y: str, expected: str) -> None:
    a, b = gf.input("a", (2,), x), gf.input("b", (2,), y)
    assert str((a * b).dtype) == str((b * a).dtype) == expected


@pytest.mark.parametrize("build, expected", [
    (lambda i: i + 1.5, "f32"), (lambda i: i + 1, "i64"), (lambda i: i / 2, "f32"), (lambda i: gf.exp(i),
                                                                                     "f32"),
    (lambda i: (i > 0) + 1, "i32"), (lambda i: (i > 0) * 0.5, "f32"), (lambda i: i ** 2, "i64"),
    (lambda i: gf.mean(i), "f32"), (lambda i: gf.constant(1.5), "f32"), (lambda i: gf.constant(3), "i32"),
    (lambda i: gf.constant(2 ** 40), "i64"), (lambda i: gf.constant(np.float64(1)), "f64"),
    (lambda i: gf.constant([1, 2], "float64"), "f64"), (lambda i: gf.sum(i > 0), "i64")])
def test_types_of_results(build: Any, expected: str) -> None:
    assert str(build(gf.input("i", (3,), "int64")).dtype) == expected


# --- slicing

N1, N2 = slice(None, None, -1), slice(None, None, -2)
KEYS = [0, -1, slice(1, 3), slice(None, None, 2), slice(-3, None), slice(3, 1), slice(1, 100), N1, N2,
        slice(4, 1, -2),
        slice(None, 1, -1), (1, 2), (slice(None), 1), (Ellipsis, 0), (None, 1), (slice(1, 4), None, N1, 2),
        (0, Ellipsis, N2), (slice(-2, None), slice(-1, -4, -1)), Ellipsis, None, (1, 2, 3), slice(100, None),
        slice(2, -100, -1)]


@pytest.mark.parametrize("device", DEVICES)
def test_slices_are_numpys(device: str) -> None:
    found = run(device, lambda x: [x[key] for key in KEYS], CUBE)
    for key, value in zip(KEYS, found):
        assert value.shape == CUBE[key].shape, key
        np.testing.assert_array_equal(value, CUBE[key], err_msg=str(key))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [5, 2])
def test_slices_of_an_axis_that_the_call_decides(device: str, rows: int) -> None:
    x = gf.input("x", (None, 4))
    keys = [0, -1, slice(1, None), slice(None, -1), N1, N2, slice(None, 2), slice(-2, None), slice(None, None,
                                                                                                   3)]
    array = RNG.standard_normal((rows, 4)).astype(np.float32)
    for key, value in zip(keys, gf.function(x, [x[key] for key in keys], device=device)(array)):
        np.testing.assert_array_equal(value, array[key], err_msg=str(key))


@pytest.mark.parametrize("device", DEVICES)
def test_an_integer_tensor_chooses_rows(device: str) -> None:
    rows = np.array([[4, 0], [2, 2]])
    x, r = gf.input("x", CUBE.shape), gf.input("rows", rows.shape, "int64")
    f = gf.function([x, r], [x[r], gf.take(x, r, 1), gf.take(x, [0, 3], axis=2)], device=device)
    small = rows % 4
    for found, expected in zip(f(CUBE, small), (CUBE[small], np.take(CUBE, small, 1), CUBE[..., [0, 3]])):
        np.testing.assert_array_equal(found, expected)


# --- functions

FUNCTIONS = [
    ("sum", lambda m, x: m.sum(x, axis=(0, 2))), ("sum all", lambda m, x: m.sum(x)),
    ("keepdims", lambda m, x: m.sum(x, axis=1, keepdims=True)), ("negative", lambda m, x: m.mean(x, axis=-1)),
    ("mean", lambda m, x: m.mean(x)), ("max", lambda m, x: m.max(x, axis=(1, 2))), ("min", lambda m,
                                                                                    x: m.min(x, 0)),
    ("var", lambda m, x: m.var(x, axis=0)), ("std", lambda m, x: m.std(x, axis=(0, 1), keepdims=True)),
    ("prod", lambda m, x: m.prod(x, axis=1)), ("any", lambda m, x: m.any(x > 1, axis=0)),
    ("all", lambda m, x: m.all(x > -1, axis=(0, 1))), ("argmax", lambda m, x: m.argmax(x, axis=1)),
    ("argmax flat", lambda m, x: m.argmax(x)), ("argmin", lambda m, x: m.argmin(x, axis=-1)),
    ("reshape", lambda m, x: m.reshape(x, (-1, 8))), ("transpose", lambda m, x: m.transpose(x)),
    ("transpose axes", lambda m, x: m.transpose(x, (1, 0, 2))), ("swapaxes", lambda m, x: m.swapaxes(x, 0,
                                                                                                     -1)),
    ("expand", lambda m, x: m.expand_dims(x, (0, 3))), ("squeeze", lambda m, x: m.squeeze(x[:, :1], 1)),
    ("broadcast", lambda m, x: m.broadcast_to(x[0], (2, 4, 6))), ("flip", lambda m, x: m.flip(x, (0, 2))),
    ("concatenate", lambda m, x: m.concatenate([x, x[:2], x[3:]], axis=0)),
    ("stack", lambda m, x: m.stack([x[0], x[1] * 2], axis=1)), ("clip", lambda m, x: m.clip(x, -0.5, 0.25)),
    ("pad", lambda m, x: m.pad(x, ((1, 0), (0, 2), (3, 3)))), ("where", lambda m, x: m.where(x > 0, x, 1.0)),
    ("square", lambda m, x: m.square(x)), ("maximum", lambda m, x: m.maximum(x, 0)),
    ("split", lambda m, x: m.split(x, 3, axis=2)[1]), ("split at", lambda m, x: m.split(x, [1, 3],
                                                                                        axis=1)[2]),
    ("exp", lambda m, x: m.exp(x)), ("tanh", lambda m, x: m.tanh(x)), ("isfinite", lambda m,
                                                                       x: m.isfinite(x)),
    ("floor", lambda m, x: m.floor(x * 3)), ("dot", lambda m, x: m.dot(x[0], x[0, 0]))]


@pytest.mark.parametrize("device", DEVICES)
def test_functions_are_numpys(device: str) -> None:
    found = run(device, lambda x: {name: f(gf, x) for name, f in FUNCTIONS}, CUBE)
    for name, f in FUNCTIONS:
        expected = np.asarray(f(np, CUBE))
        assert found[name].dtype == expected.dtype, name
        assert found[name].shape == expected.shape, name
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_compositions_are_scipys(device: str) -> None:
    x = CUBE * 200                                    # far beyond where exp overflows
    functions: dict[str, Any] = {"softmax": special.softmax, "log_softmax": special.log_softmax,
                                 "logsumexp": special.logsumexp}
    found = run(device, lambda t: {name: getattr(gf, name)(t, axis=1) for name in functions}, x)
    for name, reference in functions.items():
        np.testing.assert_allclose(found[name], reference(x.astype(np.float64), axis=1), rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_methods_are_the_functions(device: str) -> None:
    found = run(device, lambda x: [x.sum(0), x.mean((1, 2)), x.max(), x.min(-1, True), x.var(1), x.std(),
                                   x.prod(1),
                                   (x > 0).any(1), (x > 0).all(), x.argmax(2), x.argmin(), x.reshape(4, -1),
                                   x.reshape((-1,)), x.transpose(2, 0, 1), x.T, x.astype("float64")], CUBE)
    c = CUBE
    expected = [c.sum(0), c.mean((1, 2)), c.max(), c.min(-1, keepdims=True), c.var(1), c.std(), c.prod(1),
                (c > 0).any(1), (c > 0).all(), c.argmax(2), c.argmin(), c.reshape(4, -1), c.reshape(-1),
                c.transpose(2, 0, 1), c.T, c.astype("float64")]
    for value, wanted in zip(found, expected):
        assert value.dtype == wanted.dtype
        same(value, wanted, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)),
                                    ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 2)), ((3, 4), (2, 4, 5))])
def test_matmul_is_numpys(device: str, shapes: Any) -> None:
    x, y = (RNG.standard_normal(s).astype(np.float32) for s in shapes)
    same(run(device, lambda a, b: a @ b, x, y), x @ y, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_one_hot_and_new_arrays(device: str) -> None:
    labels = np.array([2, 0, 7])
    found = run(device, lambda i: [gf.one_hot(i, 4), gf.zeros((2, 3)), gf.ones(2, "int64"), gf.full((2,),
                                                                                                    2.5),
                                   gf.arange(4), gf.iota(shape=(2, 3), axis=1, dtype="float32")], labels)
    expected = [np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32), np.zeros((2, 3),
                                                                                           np.float32),
                np.ones(2, np.int64), np.full(2, 2.5, np.float32), np.arange(4, dtype=np.int32),
                np.broadcast_to(np.arange(3, dtype=np.float32), (2, 3))]
    for value, wanted in zip(found, expected):
        assert value.dtype == wanted.dtype
        same(value, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_means_over_a_batch_of_any_size(device: str) -> None:
    x = gf.input("x", (None, 3))
    f = gf.function(x, [x.mean(), x.mean(0), x.var(0)], device=device)
    for rows in (1, 7, 64):
        array = RNG.standard_normal((rows, 3)).astype(np.float32)
        for found, expected in zip(f(array), (array.mean(), array.mean(0), array.var(0))):
            same(found, expected, 1e-5)


def test_every_op_has_a_function() -> None:
    for name, record in OPS.items():
        if record.kind not in ("leaf", "effect", "control", "grad", "fused"):
            assert callable(getattr(gf, name)), name
    with pytest.raises(AttributeError, match="no function 'fused'"):
        gf.fused                                      # noqa: B018


# --- gradients

@pytest.mark.parametrize("device", DEVICES)
def test_gradients_and_their_gradients(device: str) -> None:
    x = gf.input("x", (4,), "float64")
    y = gf.sum(gf.exp(x) * x)
    first = gf.grad(y, x)
    second = gf.grad(gf.sum(first * first), x)
    array = RNG.standard_normal(4)
    f = gf.function(x, [first, second], device=device)
    e = np.exp(array)
    same(f(array)[0], e * (1 + array), 1e-12)
    same(f(array)[1], 2 * e * (1 + array) * e * (2 + array), 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_through_broadcasting_and_slices(device: str) -> None:
    found = run(device, lambda a, b: gf.grad(gf.sum((a * b)[1:, ::2] ** 2), [a, b]), A, B)
    mask = np.zeros_like(A)
    mask[1:, ::2] = 1
    same(found[0], 2 * A * B * B * mask, 1e-5)
    same(found[1], (2 * A * A * B * mask).sum(0), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_no_gradient_through_stop_gradient(device: str) -> None:
    same(run(device, lambda a: gf.grad(gf.sum(a * gf.stop_gradient(a)), a), A), A)


# --- programs

@pytest.mark.parametrize("device", DEVICES)
def test_outputs_come_in_the_structure_given(device: str) -> None:
    x = gf.input("x", (2,))
    one = np.ones(2, np.float32)
    assert gf.function(x, x + 1, device=device)(one).tolist() == [2, 2]
    listed = gf.function([x], (x + 1, x, x + 1), device=device)(x=one)
    assert isinstance(listed, list) and [v.tolist() for v in listed] == [[2, 2], [1, 1], [2, 2]]
    named = gf.function(x, {"a": x * 3, "b": gf.sum(x)}, device=device)(one)
    assert list(named) == ["a", "b"] and named["b"] == 2


@pytest.mark.parametrize("device", DEVICES)
def test_updates_read_the_state_as_it_was(device: str) -> None:
    a, b = gf.parameter((), 1.0, "a"), gf.parameter((), 2.0, "b")
    swap = gf.function([], a + b, {a: b, b: a + 10}, device=device)
    assert swap() == 3
    assert (swap.store["a"], swap.store["b"]) == (2, 11)
    assert swap() == 13
    assert (swap.store["a"], swap.store["b"], swap.store["rng.step"]) == (11, 12, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_check_changes_nothing(device: str) -> None:
    x = gf.input("x", (3,), finite=True)
    w = gf.parameter((3,), 0.0, "w")
    step = gf.function(x, w, {w: w + x}, device=device)
    step(np.ones(3, np.float32))
    with pytest.raises(gf.FeedError, match="feed 'x': has NaN or infinity"):
        step(np.array([1, np.inf, 0], np.float32))
    assert step.store["w"].tolist() == [1, 1, 1] and step.store["rng.step"] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_feeds_convert_only_where_nothing_is_lost(device: str) -> None:
    x, i = gf.input("x", (2,)), gf.input("i", (), "int64")
    f = gf.function([x, i], x * i, device=device)
    for feed in ([1, 2], (1.0, 2.0), np.array([1, 2], np.uint8), np.array([1, 2], np.float16), [True, 2]):
        assert f(feed, 3).tolist()[1] == 6
    assert f(np.array([1.0, 9, 2], np.float32)[::2], np.int32(3)).tolist() == [3, 6]


def test_names_of_parameters() -> None:
    x = gf.input("x", (2, 3))
    with gf.scope("encoder"):
        h = gf.nn.dense(x, 4)
        with gf.scope("deep"):
            h = gf.nn.dense(h, 4, name="out")
    h = gf.nn.dense(gf.nn.dense(h, 4), 4, use_bias=False)
    h = h * gf.parameter((4,), 1.0) + gf.parameter((4,), 0.0)
    f = gf.function(x, h, gf.optim.SGD(0.1, 0.9).minimize(gf.sum(h)), device="reference")
    assert f.store.names("parameter") == [
        "encoder/dense.W", "encoder/dense.b", "encoder/deep/out.W", "encoder/deep/out.b", "dense.W",
        "dense.b",
        "dense_1.W", "parameter", "parameter_1"]
    assert f.store.names("slot")[0] == "encoder/dense.W.momentum"


def test_two_programs_share_a_store_and_a_third_joins_it() -> None:
    x = gf.input("x", (1, 2))
    y = gf.nn.dense(x, 2)
    first = gf.function(x, y, device="reference")
    step = gf.function(x, y, gf.optim.SGD(0.1).minimize(gf.sum(y)), device="reference")
    other = gf.function(x, gf.nn.dense(y, 3), device="reference")
    assert first.store is step.store is other.store
    assert other.store.names("parameter") == ["dense.W", "dense.b", "dense_1.W", "dense_1.b"]


def test_scopes_and_lines_are_remembered() -> None:
    x = gf.input("x", (2,))
    with gf.scope("outer"), gf.scope("inner"):
        y = x + 1
    (where,) = y.value.node.origins
    assert where.file == __file__ and where.scope == "outer/inner"
    assert where.source() == "y = x + 1"


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_follow_from_seed_and_step(device: str) -> None:
    def build() -> gf.Program:
        u = gf.random.uniform((1000,))
        v = gf.random.uniform((1000,))
        w = gf.parameter((), 0.0)
        return gf.function([], [u, v], {w: w + 1}, device=device, store=gf.Store(7))
    first, second = build(), build()
    one = first()
    assert [a.tolist() for a in one] == [a.tolist() for a in second()]
    assert not np.array_equal(one[0], one[1]) and not np.array_equal(first()[0], one[0])
    for values in one:
        assert 0 <= values.min() and values.max() < 1 and abs(values.mean() - 0.5) < 0.05


def test_a_programs_stages_can_be_looked_at(tmp_path: Any) -> None:
    x = gf.input("x", (gf.dim("N"), 3))
    f = gf.function(x, gf.nn.dense(x, 2, gf.relu), name="net")
    assert "matmul" in f.text("trace") and "k_" in f.text("plan")
    assert f.graph("trace").number_of_nodes() > 3
    assert f.dump(tmp_path) and (tmp_path / "01.trace.txt").read_text() == f.text("trace")
    assert f.explain_memory(N=64).startswith(f"{f.peak_bytes(N=64):,} bytes at N = 64\n= ")
    assert repr(f) == "<Program net(x: f32[N,3]) -> output: f32[N,2] on cpu>"
