"""Gradients of loops and branches, against those of the same loop written out in Python, and finite
differences."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import graphflow as gf
from graphflow.compiler.ir.graph import Graph, Node, walk
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
        step = None if inputs is None else tuple(x[t] for x in inputs) if isinstance(inputs, tuple) else inputs[t]
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
