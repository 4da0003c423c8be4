"""Every message of the language: its text, the op with its shapes, the user's line with the right part
marked, the hint."""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.compiler.plan.errors import (
    DeviceError,
    DTypeError,
    FeedError,
    ShapeError,
    UseError,
    UserError,
)

N, M = gf.dim("N"), gf.dim("M")
MARKS_COLUMNS = sys.version_info >= (3, 11)           # older ones mark the whole line


def marked(error: UserError) -> str:
    """The part of the user's line over the carets in the error's text."""
    lines = str(error).splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() and set(line.strip()) == {"^"})
    return lines[at - 1][lines[at].index("^"):len(lines[at])]


def x(*shape: Any, dtype: str = "float32", name: str = "x") -> gf.Tensor:
    return gf.input(name, shape, dtype)


class Case(NamedTuple):
    """What must be refused: `make`, whose own line is shown with `mark` marked; `op`: the line on the op, ""
    for none."""
    make: Callable[[], Any]
    kind: type[UserError]
    message: str
    op: str
    mark: str
    hint: str = ""


a, v, i, c = x(3, 4), x(5), x(3, dtype="int64"), x(3, 4, dtype="bool")
batch, other, image = x(N, 4), x(M, 4, name="z"), x(N, 3, 8, 8)

LANGUAGE = [
    Case(lambda: a + v, ShapeError, "add: the operands do not fit together: axis -1 is 4 in one and 5 in "
                                    "the other",
         "add([3, 4], [5])", "a + v", "extents must be equal, or 1"),
    Case(lambda: batch * other, ShapeError, "axis -2 is N in one and M in the other", "mul([N, 4], [M, 4])",
         "batch * other", "if N and M are the same, declare both inputs with one gf.dim"),
    Case(lambda: batch - x(3, 4), ShapeError, "axis -2 is N in one and 3", "sub([N, 4], [3, 4])",
         "batch - x(3, 4)",
         "N is decided by the call and never counts as 1"),
    Case(lambda: a @ v, ShapeError, "matmul contracts an axis of 4 with one of 5", "matmul([3, 4], [5, 1])",
         "a @ v",
         "the last axis of the first operand"),
    Case(lambda: a @ 2, ShapeError, "at least one axis, not a number", "matmul([3, 4], [])", "a @ 2",
         "with *"),
    Case(lambda: bool(a > 1), UseError, "a Tensor has no truth value", "gt([3, 4])", "bool(a > 1)",
         "gf.where"),
    Case(lambda: float(a), UseError, "a Tensor is no number", "", "float(a)", "gf.function"),
    Case(lambda: np.asarray(a), UseError, "a Tensor is no array", "", "np.asarray(a)", "in graphflow"),
    Case(lambda: len(batch), UseError, "this Tensor has no fixed length", "", "len(batch)", "shape[0]"),
    Case(lambda: a + "one", UseError, "'one' is neither a Tensor nor a number", "", 'a + "one"'),
    Case(lambda: a + None, UseError, "None is neither a Tensor nor a number", "", "a + None"),
    Case(lambda: i + 0.5 + [1, 2], ShapeError, "axis -1 is 3 in one and 2", "add([3], [2])",
         "i + 0.5 + [1, 2]"),
    Case(lambda: x(2, dtype="uint8") + 256, DTypeError, "256 does not fit into uint8", "constant()",
         'x(2, dtype="uint8") + 256', "it holds 0 to 255"),
    Case(lambda: a & c, DTypeError, "bit_and takes", "bit_and([3, 4], [3, 4])", "a & c", "cast"),
    Case(lambda: gf.exp(c, c), UseError, "exp takes 1 operand(s) (x), got 2", "exp()", "gf.exp(c, c)"),
    Case(lambda: gf.where(a, 1, 2), DTypeError, "the condition of where is a bool, not float32",
         "where([3, 4], [3, 4], [3, 4])", "gf.where(a, 1, 2)", "compare it"),
    Case(lambda: gf.cast(a, "complex64"), DTypeError, "'complex64' is not an element type", "",
         'gf.cast(a, "complex64")', "use one of float32"),
    Case(lambda: a[3], ShapeError, "index 3 is outside axis 0, which has 3 elements", "slice([3, 4])",
         "a[3]"),
    Case(lambda: a[0, 1, 2], UseError, "3 indices for 2 axes in [0, 1, 2]", "slice([3, 4])", "a[0, 1, 2]"),
    Case(lambda: a[..., ...], UseError, "more than one '...'", "slice([3, 4])", "a[..., ...]"),
    Case(lambda: a[::0], UseError, "the step 0 of axis 0", "slice([3, 4])", "a[::0]"),
    Case(lambda: a["x"], UseError, "'x' is no index", "slice([3, 4])", 'a["x"]', "use integers"),
    Case(lambda: a[[0], [1]], UseError, "only one of the keys", "slice([3, 4])", "a[[0], [1]]", "gf.take"),
    Case(lambda: gf.sum(a, 2), ShapeError, "sum: there is no axis 2 in an array of 2 axes", "sum([3, 4])",
         "gf.sum(a, 2)"),
    Case(lambda: a.mean((0, -2)), UseError, "an axis is named twice", "mean([3, 4])", "a.mean((0, -2))"),
    Case(lambda: a.sum("x"), UseError, "'x' is no axis", "sum([3, 4])", 'a.sum("x")', "use an integer"),
    Case(lambda: gf.max(x(3, 0), 1), ShapeError, "axis 1, which has no elements", "reduce_max([3, 0])",
         "gf.max(x(3, 0), 1)"),
    Case(lambda: a.reshape(5, -1), ShapeError, "12 elements do not divide among", "reshape([3, 4], [5, -1])",
         "a.reshape(5, -1)"),
    Case(lambda: a.reshape(-1, -1), UseError, "only one extent may be -1", "reshape([3, 4], [-1, -1])",
         "a.reshape(-1, -1)"),
    Case(lambda: a.reshape(5, 2), ShapeError, "keeps the number of elements: 12 is not 10",
         "reshape([3, 4], [5, 2])",
         "a.reshape(5, 2)"),
    Case(lambda: a.reshape("6"), UseError, "'6' is no shape", "", 'a.reshape("6")', "use integers"),
    Case(lambda: gf.squeeze(a, 0), ShapeError, "axis 0 has the extent 3, not 1", "squeeze([3, 4])",
         "gf.squeeze(a, 0)"),
    Case(lambda: gf.broadcast_to(a, (3, 5)), ShapeError, "does not stretch to 5",
         "broadcast_to([3, 4], [3, 5])",
         "gf.broadcast_to(a, (3, 5))"),
    Case(lambda: gf.concatenate([a, v]), ShapeError, "operand 1 has 1 axes, operand 0 has 2",
         "concatenate([3, 4], [5])", "gf.concatenate([a, v])"),
    Case(lambda: gf.stack([a, v]), ShapeError, "tensor 1 has another shape", "stack([3, 4], [5])",
         "gf.stack([a, v])"),
    Case(lambda: gf.concatenate(a), UseError, "takes a list of tensors", "concatenate()",
         "gf.concatenate(a)"),
    Case(lambda: gf.split(a, 3, 1), ShapeError, "extent 4 does not divide into 3", "split([3, 4])",
         "gf.split(a, 3, 1)"),
    Case(lambda: gf.pad(a, (1, 2, 3)), ShapeError, "neither a number, a pair, nor", "pad([3, 4])",
         "gf.pad(a, (1, 2, 3))"),
    Case(lambda: gf.one_hot(a, 3), DTypeError, "indices are integers, not float32", "one_hot([3, 4])",
         "gf.one_hot(a, 3)", "gf.cast"),
    Case(lambda: gf.take(a, a), DTypeError, "the indices are integers, not float32", "", "gf.take(a, a)"),
    Case(lambda: gf.take(a, [0, 3]), UseError, "an index is outside 0..2", "gather([3, 4])",
         "gf.take(a, [0, 3])"),
    Case(lambda: gf.iota(shape=(3,), axis=0), UseError, "iota needs the attribute 'dtype'", "iota()",
         "gf.iota(shape=(3,), axis=0)"),
    Case(lambda: gf.iota(shape=3, of=1), UseError, "iota has no attribute 'of'", "iota()",
         "gf.iota(shape=3, of=1)"),
    Case(lambda: gf.constant(np.zeros(300_000)), UseError, "at most 1,048,576 bytes", "array([300000])",
         "gf.constant(np.zeros(300_000))", "make it a feed"),
    Case(lambda: gf.grad(a, a), UseError, "differentiates one number", "grad([3, 4])", "gf.grad(a, a)",
         "mean()"),
    Case(lambda: gf.grad(gf.sum(a), v), UseError, "does not depend on 'x'", "grad([], [5])",
         "gf.grad(gf.sum(a), v)",
         "what it is computed from"),
    Case(lambda: gf.grad(gf.sum(i * 1.0), i), UseError, "only floats have gradients", "grad([3])",
         "gf.grad(gf.sum(i * 1.0), i)"),
    Case(lambda: gf.grad(gf.sum(a), 3), UseError, "grad takes tensors, not 3", "grad()",
         "gf.grad(gf.sum(a), 3)"),
    Case(lambda: gf.input("2x", (3,)), UseError, "'2x' is no name for an input", "", 'gf.input("2x", (3,))'),
    Case(lambda: gf.input("x", ("N",)), UseError, "axis 0 of the shape is 'N'", "", 'gf.input("x", ("N",))',
         "gf.dim"),
    Case(lambda: gf.input("x", (-2,)), ShapeError, "axis 0 has the negative extent -2", "input([-2])",
         'gf.input("x", (-2,))'),
    Case(lambda: gf.input("x", (2,), "int32", finite=True), UseError, "only floats can be NaN", "input()",
         'gf.input("x", (2,), "int32", finite=True)'),
    Case(lambda: gf.dim("a b"), UseError, "'a b' is no name for a dimension", "", 'gf.dim("a b")'),
    Case(lambda: gf.dim("i0"), UseError, "'i0' can't name a dimension", "", 'gf.dim("i0")'),
    Case(lambda: gf.dim("f32"), UseError, "'f32' can't name a dimension", "", 'gf.dim("f32")'),
    Case(lambda: gf.parameter((N, 2), 0.0), ShapeError, "a parameter has a fixed shape", "",
         "gf.parameter((N, 2), 0.0)"),
    Case(lambda: gf.parameter((2,), np.zeros(3)), ShapeError, "the initial value has another shape", "",
         "gf.parameter((2,), np.zeros(3))"),
    Case(lambda: gf.parameter((2,), 0.0, "a/b"), UseError, "'a/b' is no name for a parameter", "",
         'gf.parameter((2,), 0.0, "a/b")'),
]

LAYERS = [
    Case(lambda: gf.nn.dense(x(N, M), 3), ShapeError, "a fixed number of features, but axis -1 is M",
         "dense([N, M])",
         "gf.nn.dense(x(N, M), 3)", "declare this extent as a number"),
    Case(lambda: gf.nn.dense(i, 3), DTypeError, "dense takes floats, not int64", "dense([3])",
         "gf.nn.dense(i, 3)",
         "gf.cast(x, 'float32')"),
    Case(lambda: gf.nn.dense(a, 0), UseError, "units of dense is 0", "dense()", "gf.nn.dense(a, 0)",
         "integer >= 1"),
    Case(lambda: gf.nn.conv2d(a, 4, 3), ShapeError, "conv2d takes [N, C, H, W], not 2 axes", "conv2d([3, 4])",
         "gf.nn.conv2d(a, 4, 3)", "add the channels"),
    Case(lambda: gf.nn.conv2d(image, 4, 9), ShapeError, "spans 9 does not fit into axis 2",
         "conv([N, 3, 8, 8], [4, 3, 9, 9])", "gf.nn.conv2d(image, 4, 9)"),
    Case(lambda: gf.nn.conv2d(image, 4, 3, groups=2), ShapeError, "cannot be split into 2 groups",
         "conv2d([N, 3, 8, 8])", "gf.nn.conv2d(image, 4, 3, groups=2)"),
    Case(lambda: gf.nn.conv2d(image, 4, 3, padding="full"), UseError, "padding is 'full'",
         "conv2d([N, 3, 8, 8])",
         'gf.nn.conv2d(image, 4, 3, padding="full")', "use 'valid', 'same'"),
    Case(lambda: gf.nn.conv2d(image, 4, (3, 0)), UseError, "window is (3, 0)", "",
         "gf.nn.conv2d(image, 4, (3, 0))"),
    Case(lambda: gf.nn.conv2d(x(1, 3, N, 8), 4, 3, 2, "same"), ShapeError,
         "needs a fixed extent, but axis 2 is N",
         "conv2d([1, 3, N, 8])", 'gf.nn.conv2d(x(1, 3, N, 8), 4, 3, 2, "same")', "as numbers"),
    Case(lambda: gf.nn.max_pool2d(image, 9), ShapeError, "spans 9 does not fit", "max_pool([N, 3, 8, 8])",
         "gf.nn.max_pool2d(image, 9)"),
    Case(lambda: gf.nn.dropout(a, 1.0), UseError, "the rate of dropout is 1.0", "dropout([3, 4])",
         "gf.nn.dropout(a, 1.0)"),
    Case(lambda: gf.loss.mean_squared_error(batch, x(N, 1)), ShapeError, "compares tensors of one shape",
         "mean_squared_error([N, 4], [N, 1])", "gf.loss.mean_squared_error(batch, x(N, 1))",
         "mostly a mistake"),
    Case(lambda: gf.loss.softmax_cross_entropy(batch, x(M, dtype="int64")), ShapeError,
         "the labels must have the shape of the logits without the last axis",
         "softmax_cross_entropy([N, 4], [M])",
         'gf.loss.softmax_cross_entropy(batch, x(M, dtype="int64"))', "one gf.dim for the batch"),
    Case(lambda: gf.loss.softmax_cross_entropy(batch, x(N)), DTypeError, "labels are integers, not float32",
         "softmax_cross_entropy([N, 4], [N])", "gf.loss.softmax_cross_entropy(batch, x(N))", "dtype 'int64'"),
    Case(lambda: gf.metrics.accuracy(batch, batch), ShapeError,
         "the labels must have the shape of the scores",
         "accuracy([N, 4], [N, 4])", "gf.metrics.accuracy(batch, batch)"),
]

w = gf.parameter((3,), 0.0)
PROGRAMS = [
    Case(lambda: gf.function([v + 1], v), UseError, "inputs are made by gf.input; this is the result of add",
         "",
         "gf.function([v + 1], v)"),
    Case(lambda: gf.function([a, v], a), UseError, "the input 'x' names two different inputs", "",
         "gf.function([a, v], a)", "a name of its own"),
    Case(lambda: gf.function([a, a], a), UseError, "the input 'x' is listed twice", "",
         "gf.function([a, a], a)"),
    Case(lambda: gf.function(a, 3), UseError, "outputs are a Tensor, a list or a dict", "",
         "gf.function(a, 3)"),
    Case(lambda: gf.function(a, [a, 3]), UseError, "the output 'output1' is 3, not a Tensor", "",
         "gf.function(a, [a, 3])"),
    Case(lambda: gf.function(a, a, {a: a}), UseError, "this is no parameter, but the result of input", "",
         "gf.function(a, a, {a: a})", "gf.parameter"),
    Case(lambda: gf.function(v, v, {w: v}), ShapeError, "the new value of parameter has another shape",
         "update([3], [5])", "gf.function(v, v, {w: v})"),
    Case(lambda: gf.function(i, i, {w: i}), DTypeError, "parameter is float32, its new value int64",
         "update([3], [3])", "gf.function(i, i, {w: i})", "gf.cast(value, 'float32')"),
    Case(lambda: gf.function(a, a, name="a-b"), UseError, "'a-b' is no name for a program", "",
         'gf.function(a, a, name="a-b")'),
]


@pytest.mark.parametrize("case", LANGUAGE + LAYERS + PROGRAMS, ids=lambda case: case.mark)
def test_misuse_points_at_the_users_line(case: Case) -> None:
    with pytest.raises(case.kind) as caught:
        case.make()
    error = caught.value
    assert case.message in error.message
    lines = str(error).splitlines()
    assert [line for line in lines if line.startswith("  op: ")] == ([f"  op: {case.op}"] if case.op else [])
    assert error.where is not None and error.where.file == __file__
    if MARKS_COLUMNS:
        assert marked(error) == case.mark
    else:
        assert case.mark in error.where.source()
    assert case.hint in (error.hint or "")
    assert not case.hint or lines[-1] == f"hint: {error.hint}"


def test_the_whole_text_of_an_error() -> None:
    with gf.scope("decoder"), pytest.raises(ShapeError) as caught:
        a.reshape(7, -1)
    text = str(caught.value)
    line = caught.value.where.line
    assert text.startswith("reshape: 12 elements do not divide among the other extents\n"
                           "  op: reshape([3, 4], [7, -1]) in decoder\n")
    assert f"test_messages.py:{line}: a.reshape(7, -1)\n" in text
    if MARKS_COLUMNS:
        place, carets = text.splitlines()[-2:]
        assert carets == " " * place.index("a.reshape") + "^" * len("a.reshape(7, -1)")


# --- programs and calls

def test_an_output_that_needs_an_input_that_is_not_listed() -> None:
    left, right = gf.input("left", (2,)), gf.input("right", (2,))
    with pytest.raises(UseError,
                       match="the output 'total' depends on the input 'right', which is not among") as e:
        gf.function([left], {"other": left, "total": left + right})
    assert "right" in e.value.where.source() and e.value.shapes == ((2,),)
    assert e.value.hint == "list it in inputs; they are 'left'"
    p = gf.parameter((2,), 0.0, "p")
    with pytest.raises(UseError, match="the update of p depends on the input 'right'"):
        gf.function([left], left, {p: right})


def test_a_dimension_that_no_input_decides() -> None:
    with pytest.raises(UseError, match="no input's shape decides the dimension K"):
        gf.function(a, a + gf.sum(gf.zeros((gf.dim("K"),))))


def test_two_parameters_of_one_name() -> None:
    first = gf.parameter((2,), 0.0, "weights")
    second = gf.parameter((2,), 0.0, "weights")
    with pytest.raises(UseError) as caught:
        gf.function([], first + second, device="reference")
    text = str(caught.value)
    assert "two variables are both named 'weights'" in text
    assert 'first = gf.parameter((2,), 0.0, "weights")' in text
    assert 'second = gf.parameter((2,), 0.0, "weights")' in text


def test_parameters_of_two_stores() -> None:
    first, second = gf.parameter((2,), 0.0, "first"), gf.parameter((2,), 0.0, "second")
    gf.function([], first, device="reference")
    gf.function([], second, device="reference")
    with pytest.raises(UseError, match="second and first belong to different Stores|first and second belong"):
        gf.function([], first + second, device="reference")


def test_an_unknown_device() -> None:
    with pytest.raises(DeviceError, match="there is no device 'tpu'") as caught:
        gf.function(a, a, device="tpu")
    assert "cpu" in caught.value.hint


def test_scopes_with_impossible_names() -> None:
    with pytest.raises(UseError, match="'a b' is no name for a scope"), gf.scope("a b"):
        pass


ONES = np.ones((2, 3), np.float32)
LABELS = np.zeros(2, np.int64)


def program(device: str) -> gf.Program:
    n = gf.dim("N")
    images, labels = gf.input("images", (n, 3), finite=True), gf.input("labels", (n,), "int64")
    return gf.function([images, labels], gf.loss.softmax_cross_entropy(images, labels), device=device,
                       name="net")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feeds, message, source, hint", [
    ({"images": ONES}, "net misses the feed 'labels'", "", "its inputs are 'images', 'labels'"),
    ({"images": ONES, "labels": LABELS, "x": ONES}, "net has no input 'x'", "",
     "its inputs are 'images', 'labels'"),
    ({"images": ONES[:, :2], "labels": LABELS}, "feed 'images': axis 1 must be 3, got 2; its shape is [N, "
                                                "3], got [2, 2]",
     "gf.input", ""),
    ({"images": ONES[0], "labels": LABELS}, "feed 'images': has shape [N, 3], got [3]: 1 axes instead of 2",
     "gf.input", ""),
    ({"images": ONES, "labels": LABELS[:1]}, "feed 'labels': axis 0 must be N = 2 as in feed 'images', got 1",
     "gf.input", ""),
    ({"images": ONES.astype("f8"), "labels": LABELS}, "feed 'images': must be float32, got float64",
     "gf.input",
     ".astype('float32')"),
    ({"images": ONES, "labels": [0.5, 1]}, "feed 'labels': must be int64, got float64", "gf.input", ""),
    ({"images": [["a"]], "labels": LABELS}, "feed 'images': must be float32, got", "gf.input", "numbers"),
    ({"images": ONES, "labels": LABELS + 3}, "feed 'labels': the labels must lie in 0..2",
     "softmax_cross_entropy(images, labels)", ""),
    ({"images": ONES, "labels": LABELS - 1}, "feed 'labels': the labels must lie in 0..2",
     "softmax_cross_entropy(images, labels)", ""),
    ({"images": ONES * np.float32(np.nan), "labels": LABELS}, "feed 'images': has NaN or infinity in it",
     "gf.input", ""),
])
def test_wrong_feeds(device: str, feeds: dict[str, Any], message: str, source: str, hint: str) -> None:
    with pytest.raises(FeedError) as caught:
        program(device)(**feeds)
    assert message in caught.value.message
    assert source in caught.value.where.source() and caught.value.where.file == __file__
    assert hint in (caught.value.hint or "")


def test_feeds_by_position() -> None:
    net = program("reference")
    with pytest.raises(FeedError, match="net takes 2 feeds .'images', 'labels'., got 3"):
        net(ONES, LABELS, ONES)
    with pytest.raises(FeedError, match="the feed 'images' is given by position and by name"):
        net(ONES, images=ONES)


@pytest.mark.parametrize("device", DEVICES)
def test_indices_and_slices_that_a_call_exceeds(device: str) -> None:
    rows, index = gf.input("rows", (N, 2)), gf.input("index", (M,), "int32")
    f = gf.function([rows, index], [rows[index], rows[:3]], device=device)
    array = np.zeros((4, 2), np.float32)
    for wrong in (4, -1):
        with pytest.raises(FeedError, match="feed 'index': the indices must lie in 0..N - 1") as caught:
            f(array, np.array([0, wrong], np.int32))
        assert "rows[index]" in caught.value.where.source()
    with pytest.raises(ShapeError, match=r"N - 3 >= 0 does not hold for these feeds: it is -1 at") as bound:
        f(array[:2], np.array([0], np.int32))
    assert "rows[:3]" in bound.value.where.source()


def test_peak_bytes_needs_every_dimension() -> None:
    f = gf.function(batch, batch + 1, device="cpu")
    with pytest.raises(UseError, match="needs the value of 'N'"):
        f.peak_bytes()
    with pytest.raises(UseError, match="explain_memory of .* needs the value of 'N'"):
        f.explain_memory(M=3)
    with pytest.raises(UseError, match="there is no stage 'nope'"):
        f.text("nope")
