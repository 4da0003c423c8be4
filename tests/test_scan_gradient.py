"""Gradients of loops and branches, against those of the same loop written out in Python, and finite
differences."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.graph import Graph, Node, walk
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.passes.autodiff import expand_gradients

pytestmark = pytest.mark.reference

Loop = Callable[..., tuple[Any, Any]]
B, D, H = 3, 2, 4


def unrolled(body: Any, initial: Any, inputs: Any = None, length: int | None = None, reverse: bool = False
             ) -> tuple[Any, Any]:
    """The loop written out; `inputs` is a tensor, a tuple of them or None, outputs likewise."""
    count = length if inputs is None else (inputs[0] if isinstance(inputs, tuple) else inputs).shape[0]
    carry, rows = initial, []
    for t in reversed(range(count)) if reverse else range(count):
        step = inputs if inputs is None else inputs[t] if isinstance(inputs, gf.Tensor) else \
            tuple(x[t] for x in inputs)
        carry, out = body(carry, step)
        rows.append(out)
    rows = rows[::-1] if reverse else rows
    if rows[0] is None:
        return carry, None
    if isinstance(rows[0], tuple):
        return carry, tuple(gf.stack(list(column)) for column in zip(*rows))
    return carry, gf.stack(rows)


def feeds(**shapes: tuple[Any, ...]) -> dict[str, gf.Tensor]:
    return {name: gf.input(name, shape, "float64") for name, shape in shapes.items()}


def squares(*tensors: Any) -> gf.Tensor:
    total: Any = 0.0
    for t in tensors:
        total = total + gf.sum(t * t)
    return total


# --- bodies: each gives (inputs, loss) for a way to loop

def rnn(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    f = feeds(x=(steps, B, D), h=(B, H), w=(D, H), u=(H, H), b=(H,))
    last, ys = loop(lambda h, x: (gf.tanh(x @ f["w"] + h @ f["u"] + f["b"]),) * 2, f["h"], f["x"])
    return f, squares(last) + squares(ys * ys)


def lstm(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    f = feeds(x=(steps, B, D), h=(B, H), c=(B, H), w=(D + H, 4 * H), b=(4 * H,), peep=(H,))

    def body(carry: Any, x: gf.Tensor) -> Any:
        h, c = carry
        i, g, o, forget = gf.split(gf.concatenate([x, h], 1) @ f["w"] + f["b"], 4, 1)
        c = gf.sigmoid(forget + f["peep"] * c) * c + gf.sigmoid(i) * gf.tanh(g)
        h = gf.sigmoid(o) * gf.tanh(c)
        return (h, c), h
    (h, c), ys = loop(body, (f["h"], f["c"]), f["x"])
    return f, squares(h * c) + squares(ys)


def last_only(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    """Outputs that nobody reads, an integer carry, a carry that nothing needs, one that nothing changes."""
    f = feeds(x=(steps, B, H), h=(B, H), k=(B, H))
    n = gf.constant(0, "int64")

    def body(carry: Any, x: gf.Tensor) -> Any:
        h, n, unused, same = carry
        h = gf.sin(h * f["k"] + x) * gf.cast(n + 1, "float64") + same
        return (h, n + 1, unused + h, same), (h, n)
    (h, _, _, same), _ = loop(body, (f["h"], n, f["h"], f["k"]), f["x"])
    return f, squares(h) + squares(same)


def swaps(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    """Carries that change places, an output that is an input of the step, two inputs."""
    f = feeds(x=(steps, H), y=(steps, H), a=(H,), c=(H,))

    def body(carry: Any, step: Any) -> Any:
        (a, c), (x, y) = carry, step
        return (c * x, a), (x, a * y)
    (a, c), (xs, ys) = loop(body, (f["a"], f["c"]), (f["x"], f["y"]))
    return f, squares(a, c) + squares(xs * ys)


def no_inputs(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    f = feeds(m=(H, H), v=(H, 1))
    v, _ = loop(lambda v, _: (gf.tanh(f["m"] @ v), None), f["v"], length=steps)
    return f, squares(v)


def no_carries(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    f = feeds(x=(steps, B, H), w=(H, D))
    _, ys = loop(lambda _, x: ((), gf.exp(-gf.square(x)) @ f["w"]), (), f["x"])
    return f, squares(ys)


def looks_up(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    """An embedding inside the body, whose indices are checked there."""
    f = feeds(table=(5, H), h=(B, H))
    ids = gf.constant(np.arange(steps * B).reshape(steps, B) * 7 % 5)
    last, ys = loop(lambda h, i: (gf.tanh(h * gf.take(f["table"], i)),) * 2, f["h"], ids)
    return f, squares(last) + squares(ys * ys)


def convolves(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    f = feeds(x=(steps, 1, 2, 5, 5), h=(1, 2, 5, 5), w=(2, 2, 3, 3))

    def body(h: gf.Tensor, x: gf.Tensor) -> Any:
        h = gf.tanh(gf.functions.op_function("conv")(h, f["w"], padding=((1, 1), (1, 1)), stride=(1, 1),
                                                     dilation=(1, 1)) + x)
        return h, None
    last, _ = loop(body, f["h"], f["x"])
    return f, squares(last)


def nested(loop: Loop, steps: int) -> tuple[dict[str, gf.Tensor], gf.Tensor]:
    """A loop in the loop, over the columns of the step's input."""
    f = feeds(x=(steps, 3, H), h=(H,), k=(H,), w=(H, H))

    def inner(h: gf.Tensor, x: gf.Tensor) -> Any:
        h = gf.tanh(gf.expand_dims(h * f["k"] + x, 0) @ f["w"])[0]
        return h, h * x

    def body(h: gf.Tensor, xs: gf.Tensor) -> Any:
        h, ys = loop(inner, h, xs)
        return h * f["k"], gf.sum(ys, 0)
    last, ys = loop(body, f["h"], f["x"])
    return f, squares(last) + squares(ys)


BODIES = [rnn, lstm, last_only, swaps, no_inputs, no_carries, looks_up, convolves, nested]


def run(case: Any, loop: Loop, steps: int, second: bool = False) -> list[np.ndarray]:
    """The loss and its gradient by every input; with `second`, those of the gradient's square."""
    f, loss = case(loop, steps)
    inputs = list(f.values())
    grads = gf.grad(loss, inputs)
    if second:
        loss = squares(*grads)
        grads = gf.grad(loss, inputs)
    program = gf.function(inputs, [loss, *grads], device="reference")
    rng = np.random.default_rng(3)
    return program(*(rng.uniform(-1, 1, t.shape) for t in inputs))


def scans(**options: Any) -> Loop:
    def loop(body: Any, initial: Any, inputs: Any = None, length: int | None = None) -> tuple[Any, Any]:
        return gf.scan(body, initial, inputs, length, **options)
    return loop


def agree(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, e in zip(found, expected):
        np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", BODIES)
def test_gradients_are_those_of_the_unrolled_loop(case: Any, reverse: bool, steps: int) -> None:
    def plain(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return unrolled(*args, reverse=reverse, **kwargs)
    expected = run(case, plain, steps)
    agree(run(case, scans(reverse=reverse), steps), expected)
    for block in (1, 2, 5, 8):
        agree(run(case, scans(reverse=reverse, checkpoint=block), steps), expected)


@pytest.mark.parametrize("case", BODIES)
def test_second_derivatives_are_those_of_the_unrolled_loop(case: Any) -> None:
    expected = run(case, unrolled, 3, second=True)
    agree(run(case, scans(), 3, second=True), expected)
    agree(run(case, scans(checkpoint=2), 3, second=True), expected)


@pytest.mark.parametrize("case", [rnn, no_inputs, nested, no_carries])
def test_a_loop_without_steps_has_the_gradient_of_its_start(case: Any) -> None:
    f, loss = case(scans(), 0)
    program = gf.function(list(f.values()), [loss, *gf.grad(loss, list(f.values()))], device="reference")
    arrays = [np.full(t.shape, 2.0) for t in f.values()]
    value, *grads = program(*arrays)
    start = {"rnn": "h", "no_inputs": "v", "nested": "h"}.get(case.__name__)
    assert value == (4 * dict(zip(f, arrays))[start].size if start else 0)
    for name, grad in zip(f, grads):
        np.testing.assert_array_equal(grad, np.full(f[name].shape, 4.0 if name == start else 0.0))


# --- what the gradient is made of

def expanded(case: Any, steps: Any = 5) -> tuple[Graph, list[Node]]:
    """The graph after autodiff, and its scans."""
    f, loss = case(scans(), steps)
    program = gf.function(list(f.values()), [loss, *gf.grad(loss, list(f.values()))], device="reference")
    graph = expand_gradients(program.traced)
    return graph, [n for n in walk(graph.nodes()) if n.op == "scan"]


def test_one_loop_each_way_and_one_product_for_the_weights() -> None:
    graph, (forward, backward) = expanded(lstm)
    assert not forward.attrs["reverse"] and backward.attrs["reverse"]
    products = [n for n in graph.nodes() if n.op == "matmul"]
    assert [n.types[0].shape for n in products] == [(D + H, 4 * H)]
    ops = [n.op for n in backward.regions[0].nodes()]
    assert ops.count("matmul") == 1 and not {"tanh", "sigmoid", "exp"} & set(ops)


def test_the_note_says_what_is_kept() -> None:
    graph, (forward, backward) = expanded(rnn)
    assert forward.attrs["kept"] == ("tanh f64[3,4]", "carry 0 f64[3,4]") and not backward.attrs["kept"]
    f, loss = rnn(scans(), 5)
    program = gf.function(list(f.values()), gf.grad(loss, list(f.values())), device="reference")
    assert 'kept=["tanh f64[3,4]", "carry 0 f64[3,4]"]' in program.text("autodiff")


def keeps(body: Any, checkpoint: int | None = None) -> list[str]:
    """What the gradient of a loop of one carry keeps."""
    f = feeds(x=(6, B, H), h=(B, H))
    last, _ = gf.scan(lambda h, x: (body(h, x), None), f["h"], f["x"], checkpoint=checkpoint)
    program = gf.function(list(f.values()), gf.grad(squares(last), list(f.values())), device="reference")
    scans = [n for n in walk(expand_gradients(program.traced).nodes()) if n.op == "scan" and n.attrs["kept"]]
    return [", ".join(filter(None, n.attrs["kept"])) for n in scans]


@pytest.mark.parametrize("body, kept", [
    (lambda h, x: h * 2 + x, []),                                               # linear: nothing
    (lambda h, x: h * x, ["carry 0 f64[3,4]"]),                                 # the carry, for x's
    (lambda h, x: (h + x) * (h * x) * x, ["carry 0 f64[3,4]"]),                 # both factors from one value
    (lambda h, x: gf.tanh(h + x) * 3, ["sub f64[3,4]"]),                        # 1 - tanh**2
    (lambda h, x: gf.where(h > x, h * 2, x), ["gt bool[3,4]"]),                 # a bool for a float
    (lambda h, x: gf.broadcast_to(gf.max(h + x, 1, keepdims=True), h.shape) * x,
     ["reshape f64[3,1], eq bool[3,4], reduce_sum f64[3]"]),                    # where the largest was
])
def test_the_cut_takes_what_is_least(body: Any, kept: list[str]) -> None:
    assert keeps(body) == kept


def test_checkpoints_keep_carries_alone() -> None:
    outer, inner = keeps(lambda h, x: gf.tanh(h + x), checkpoint=3)
    assert (outer, inner) == ("carry 0 f64[3,4]", "sub f64[3,4]")


def test_dead_results_and_constant_carries_go() -> None:
    _, (forward, backward) = expanded(last_only)
    assert forward.attrs["carries"] == 2 and len(backward.types) == backward.attrs["carries"] + 1


def test_scans_written_twice_are_one() -> None:
    f = feeds(x=(5, H), h=(H,))
    a, ys = gf.scan(lambda h, x: (gf.sin(h + x), h), f["h"], f["x"])
    b, zs = gf.scan(lambda h, x: (gf.sin(h + x), h * x), f["h"], f["x"])
    c, _ = gf.scan(lambda h, x: (gf.cos(h + x), None), f["h"], f["x"])
    program = gf.function(list(f.values()), [a, b, c, ys, zs], device="reference")
    scans = [n for n in expand_gradients(program.traced).nodes() if n.op == "scan"]
    assert sorted(len(n.types) for n in scans) == [1, 3]
    x, h = np.random.default_rng(0).standard_normal((5, H)), np.ones(H)
    out = program(x, h)
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_allclose(out[4], out[3] * x)


@pytest.mark.cpu
def test_checkpoints_of_steps_that_are_numbers() -> None:
    """A slice of an array with one axis is one of steps, not of columns; 7 steps in blocks of 3 are cut."""
    x = gf.input("x", (7,), "float64")
    results = []
    for device, block in (("reference", None), ("cpu", 3)):
        start = gf.constant(0.5, "float64")
        last, ys = gf.scan(lambda h, row: (gf.sin(h * row),) * 2, start, x, checkpoint=block)
        loss = last * 2.0 + gf.sum(ys * ys)
        results.append(gf.function(x, [loss, gf.grad(loss, x)], device=device)(np.linspace(-2, 3, 7)))
    agree(results[1], results[0])


# --- symbolic lengths, parameters, random numbers

def test_a_length_that_the_call_decides() -> None:
    T = gf.dim("T")
    x, h = gf.input("x", (T, B, H), "float64"), gf.input("h", (B, H), "float64")
    programs = []
    for block in (None, 2, 3):
        last, ys = gf.scan(lambda h, x: (gf.sin(h * x),) * 2, h, x, checkpoint=block)
        loss = squares(last) + squares(ys)
        programs.append(gf.function([x, h], [loss, *gf.grad(loss, [x, h])], device="reference"))
    rng = np.random.default_rng(1)
    for steps in (0, 1, 2, 3, 7):
        arrays = rng.standard_normal((steps, B, H)), rng.standard_normal((B, H))
        expected = programs[0](*arrays)
        for p in programs[1:]:
            agree(p(*arrays), expected)
    assert expected[1].shape == (7, B, H)
    numeric, step = np.zeros((B, H)), 1e-6
    for at in np.ndindex(B, H):
        moved = [arrays[1].copy() for _ in range(2)]
        moved[0][at] += step
        moved[1][at] -= step
        numeric[at] = (programs[0](arrays[0], moved[0])[0] - programs[0](arrays[0], moved[1])[0]) / (2 * step)
    np.testing.assert_allclose(expected[2], numeric, rtol=1e-6, atol=1e-7)


def test_layers_in_a_body_are_trained() -> None:
    x, h = gf.input("x", (6, 5, D)), gf.input("h", (5, H))
    last, ys = gf.scan(lambda h, x: (gf.nn.dense(gf.concatenate([x, h], 1), H, gf.tanh),) * 2, h, x)
    loss = gf.mean(gf.square(ys - 0.5))
    step = gf.function([x, h], loss, gf.optim.SGD(0.5).minimize(loss), device="reference")
    assert sorted(n for n in step.store if "rng" not in n) == ["dense.W", "dense.b"]
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((6, 5, D)).astype("f4"), np.zeros((5, H), "f4")
    losses = [float(step(*arrays)) for _ in range(30)]
    assert losses[-1] < losses[0] / 3


def dropped(loop: str, block: int | None = None, steps: int = 7) -> gf.Program:
    x, h = gf.input("x", (steps, B, H)), gf.input("h", (B, H))

    def body(h: gf.Tensor, x: gf.Tensor) -> Any:
        h = gf.tanh(gf.nn.dropout(h + x, 0.5))
        return h, h
    if loop == "nested":
        cut = gf.reshape(x, (1, steps, B, H))
        (last, ys) = gf.scan(lambda h, xs: gf.scan(body, h, xs), h, cut)
    else:
        last, ys = gf.scan(body, h, x, checkpoint=block)
    loss = squares(last) + squares(ys)
    return gf.function([x, h], [gf.reshape(ys, (steps, B, H)), *gf.grad(loss, [x, h])], device="reference",
                       training=True)


def test_every_step_has_random_numbers_of_its_own_and_they_stay_when_computed_again() -> None:
    arrays = np.ones((7, B, H), "f4"), np.ones((B, H), "f4")
    ys, *grads = dropped("plain")(*arrays)
    masks = [tuple((y == 0).ravel()) for y in ys]
    assert len(set(masks)) == 7 and 20 < sum(map(sum, masks)) < 64
    assert ((ys == 0) <= (grads[0] == 0)).all() and (grads[0] != 0).any()
    for block in (1, 2, 3, 7):
        for found, expected in zip(dropped("plain", block)(*arrays), (ys, *grads)):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    other = dropped("nested")(*arrays)[0]
    assert ((other == 0) != (ys == 0)).any()                 # two indices: other numbers than one


def test_dropout_in_a_loop_does_nothing_outside_of_training() -> None:
    x = gf.input("x", (4, 3))
    _, ys = gf.scan(lambda c, x: (c, gf.nn.dropout(x, 0.9)), (), x)
    value = np.random.default_rng(0).standard_normal((4, 3)).astype("f4")
    np.testing.assert_array_equal(gf.function([x], ys, device="reference")(value), value)


def test_a_mask_from_outside_is_the_same_in_all_steps() -> None:
    x = gf.input("x", (6, 40))
    mask = gf.nn.dropout(gf.ones(40), 0.5)
    _, ys = gf.scan(lambda c, x: (c, x * mask), (), x)
    out = gf.function([x], ys, device="reference", training=True)(np.ones((6, 40), "f4"))
    assert (out == out[0]).all() and 5 < (out[0] == 0).sum() < 35


# --- checkpoint, cond, while_loop

def test_checkpoint_recomputes_and_changes_nothing() -> None:
    f = feeds(x=(B, H), w=(H, H))

    def block(x: gf.Tensor, scale: dict[str, Any]) -> Any:
        y = gf.tanh(x @ f["w"])
        return {"y": gf.nn.dropout(gf.exp(y) * scale["k"], 0.5), "z": y}
    outs = []
    for function in (block, gf.checkpoint(block)):
        made = function(f["x"], {"k": 3.0})
        loss = squares(made["y"], made["z"])
        results = [loss, *gf.grad(loss, list(f.values()))]
        outs.append(gf.function(list(f.values()), results, device="reference", training=True))
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((B, H)), rng.standard_normal((H, H))
    first, second = (p(*arrays)[0] for p in outs)
    assert first > 0 and second > 0                          # their masks differ: two streams of numbers
    forward, backward = [n for n in expand_gradients(outs[1].traced).nodes() if n.op == "scan"]
    assert not forward.attrs["kept"] and any(n.op == "tanh" for n in backward.regions[0].nodes())


def test_checkpoint_gives_the_plain_gradient() -> None:
    f = feeds(x=(B, H), w=(H, H))
    for function in (lambda x: gf.exp(gf.tanh(x @ f["w"])) * f["x"],):
        programs = []
        for g in (function, gf.checkpoint(function)):
            loss = squares(g(f["x"]))
            grads = gf.grad(loss, list(f.values()))
            programs.append(gf.function(list(f.values()), [loss, *grads, *gf.grad(squares(*grads),
                                                                                  list(f.values()))],
                                        device="reference"))
        rng = np.random.default_rng(0)
        arrays = rng.standard_normal((B, H)), rng.standard_normal((H, H))
        agree(programs[1](*arrays), programs[0](*arrays))


def test_cond_has_the_gradient_of_the_branch_that_ran() -> None:
    x, w, p = gf.input("x", (3,), "float64"), gf.input("w", (3,), "float64"), gf.input("p", (), "bool")
    y = gf.cond(p, lambda v: gf.sin(v) * w, lambda v: v * v * v, x)
    loss = gf.sum(y)
    g = gf.grad(loss, [x, w])
    second = gf.grad(gf.sum(g[0]), [x, w])
    program = gf.function([x, w, p], [loss, *g, *second], device="reference")
    a, k = np.array([0.3, -1, 2]), np.array([2.0, 5, 7])
    agree(program(a, k, True), [(np.sin(a) * k).sum(), np.cos(a) * k, np.sin(a), -np.sin(a) * k, np.cos(a)])
    agree(program(a, k, False), [(a ** 3).sum(), 3 * a * a, 0 * a, 6 * a, 0 * a])


def test_a_loop_of_branches() -> None:
    f = feeds(x=(6, H), h=(H,))

    def body(h: gf.Tensor, x: gf.Tensor) -> Any:
        h = gf.cond(gf.sum(x) > 0, lambda h: gf.tanh(h * x), lambda h: h * 0.5 + gf.sin(x), h)
        return h, None

    def chosen(h: gf.Tensor, x: gf.Tensor) -> Any:
        return gf.where(gf.sum(x) > 0, gf.tanh(h * x), h * 0.5 + gf.sin(x)), None
    results = []
    for function, loop in ((body, gf.scan), (chosen, unrolled)):
        loss = squares(loop(function, f["h"], f["x"])[0])
        program = gf.function(list(f.values()), [loss, *gf.grad(loss, list(f.values()))], device="reference")
        rng = np.random.default_rng(4)
        results.append(program(rng.standard_normal((6, H)), rng.standard_normal(H)))
    agree(results[0], results[1])


@pytest.mark.parametrize("limit", [3, 9])
def test_while_loop_has_the_gradient_of_its_trips(limit: int) -> None:
    """Newton's iteration for a square root, as far as the tolerance asks."""
    a, x0 = gf.input("a", (), "float64"), gf.input("x0", (), "float64")

    def body(carry: Any) -> Any:
        x, n = carry
        return (x + a / x) / 2, n + 1
    root, trips = gf.while_loop(lambda c: gf.abs(c[0] * c[0] - a) > 1e-3, body, (x0, 0), limit)
    g = gf.grad(root, [a, x0])
    program = gf.function([a, x0], [root, trips, *g, *gf.grad(g[0], [a])], device="reference")

    def newton(a: complex, x: complex) -> tuple[complex, int]:
        trips = 0
        while abs((x * x - a).real) > 1e-3 and trips < limit:
            x, trips = (x + a / x) / 2, trips + 1
        return x, trips
    value, count, by_a, by_x, second = program(2.0, 1.0)
    expected, trips = newton(2.0, 1.0)
    step = 1e-20                                          # the complex step: derivatives to the last bit
    np.testing.assert_allclose(value, expected.real)
    assert count == trips == 3
    np.testing.assert_allclose(by_a, newton(2 + step * 1j, 1.0)[0].imag / step, rtol=1e-12)
    np.testing.assert_allclose(by_x, newton(2.0, 1 + step * 1j)[0].imag / step, rtol=1e-9, atol=1e-12)
    ahead, back = (program(2.0 + d, 1.0)[2] for d in (1e-5, -1e-5))
    np.testing.assert_allclose(second, (ahead - back) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_taken_inside_a_body(device: str) -> None:
    """Descent along a gradient in the loop, differentiated through."""
    f = feeds(a=(H, H), x=(H,))

    def body(x: gf.Tensor, _: None) -> Any:
        y = gf.reshape(x, (H, 1))
        return x - 0.1 * gf.grad(gf.sum((f["a"] @ y) ** 2) + gf.sum(gf.cos(x)), x), None
    results = []
    for loop in (gf.scan, unrolled):
        last, _ = loop(body, f["x"], None, 4)
        loss = squares(last)
        program = gf.function(list(f.values()), [loss, *gf.grad(loss, list(f.values()))], device=device)
        rng = np.random.default_rng(2)
        results.append(program(rng.standard_normal((H, H)) / 3, rng.standard_normal(H)))
    agree(results[0], results[1])


def test_gradients_by_what_a_body_makes_anew_are_refused() -> None:
    """A body has a broadcast of its own, so the gradient by the one outside would miss that part."""
    w, flag = gf.input("w", (), "float64"), gf.input("flag", (), "bool")
    p = gf.broadcast_to(w, (3,))
    looped, _ = gf.scan(lambda c, _: (c + gf.sum(p * c), None), gf.constant(1.0, "float64"), length=2)
    chosen = gf.cond(flag, lambda: gf.sum(p), lambda: gf.sum(p * p))
    for scalar in (looped, chosen, looped + gf.sum(p)):
        with pytest.raises(gf.UseError, match="makes tensor number 0(?s:.)*as a carry"):
            gf.grad(scalar, p)
    outside = gf.cond(flag, gf.sum, lambda q: gf.sum(q * q), p) + gf.sum(p)
    found = gf.function([w, flag], [gf.grad(looped, w), gf.grad(outside, p)], device="reference")(2.0, False)
    np.testing.assert_array_equal(found[0], 6 * (1 + 3 * 2.0))
    np.testing.assert_array_equal(found[1], [5.0, 5.0, 5.0])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_inside_a_body_by_what_lies_outside(device: str) -> None:
    """The way from `a` to the scalar leads through a node that no parameter of the body decides."""
    a, x, flag = gf.input("a", (), "float64"), gf.input("x", (3,), "float64"), gf.input("flag", (), "bool")
    twice = gf.tanh(a) * 2
    _, slopes = gf.scan(lambda c, r: (c, gf.grad((twice * r + c) ** 2, a)), gf.constant(0.5, "float64"), x)
    chosen = gf.cond(flag, lambda: gf.grad(twice * twice, a), lambda: gf.grad(twice, a))
    rows = np.array([1.0, -2.0, 0.5])
    values, inside = gf.function([a, x, flag], [slopes, chosen], device=device)(0.3, rows, True)
    v, slope = 2 * np.tanh(0.3), 2 - 2 * np.tanh(0.3) ** 2
    np.testing.assert_allclose(values, 2 * (v * rows + 0.5) * rows * slope, rtol=1e-13)
    np.testing.assert_allclose(inside, 2 * v * slope, rtol=1e-13)


@pytest.mark.parametrize("case", BODIES)
def test_the_passes_before_kernels_keep_the_values(case: Any) -> None:
    f, loss = case(scans(checkpoint=2), 5)
    inputs = list(f.values())
    program = gf.function(inputs, [loss, *gf.grad(loss, inputs)], device="reference")
    rng = np.random.default_rng(5)
    arrays = [rng.uniform(-1, 1, t.shape) for t in inputs]
    expected = program(*arrays)
    for stage in ("autodiff", "joint"):
        text = program.text(stage)
        graph = parse_graph(text)
        assert print_graph(graph) == text
        found, _ = interpret(graph, dict(zip(f, arrays)), {})
        agree(list(found.values()), expected)
