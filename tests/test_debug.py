"""Printing values and checking conditions inside programs."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from devices import DEVICES

import graphflow as gf


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What programs print."""
    found: list[str] = []
    monkeypatch.setattr(gf.debug, "write", found.append)
    yield found


@pytest.mark.parametrize("device", DEVICES)
def test_values_are_printed_in_the_order_of_the_source(device: str, lines: list[str]) -> None:
    x = gf.input("x", (3,))
    first = gf.print("x is {} and its sum {:.2f}", x, gf.sum(x))
    y = gf.print("squares", x * x)
    last = gf.print("counts", gf.cast(y + first[0], "int64"))
    program = gf.function(x, [last, y], device=device)
    found = program(np.array([1, 2, 3], np.float32))
    assert lines == ["x is [1. 2. 3.] and its sum 6.00", "squares [1. 4. 9.]", "counts [ 2  6 12]"]
    assert len(found) == 2 and found[0].tolist() == [2, 6, 12]
    assert program.outputs == ["output0", "output1"] and "print" not in repr(program)
    program(np.array([0, 0, 0], np.float32))
    assert lines[3:] == ["x is [0. 0. 0.] and its sum 0.00", "squares [0. 0. 0.]", "counts [0 0 0]"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_prints(device: str, lines: list[str]) -> None:
    """Through the gradient and the update, with the state as it was before."""
    w = gf.parameter((2,), 1.0, "w")
    seen = gf.print("w {}", w)
    loss = gf.print("loss {:.1f}", gf.sum(seen * seen))
    step = gf.function([], [], gf.optim.SGD(0.25).minimize(loss), device=device)
    step()
    step()
    assert lines == ["w [1. 1.]", "loss 2.0", "w [0.5 0.5]", "loss 0.5"]


@pytest.mark.parametrize("device", DEVICES)
def test_large_arrays_are_shortened_and_sizes_may_be_open(device: str, lines: list[str]) -> None:
    x = gf.input("x", (None,), "int64")
    program = gf.function(x, gf.print("x", x), device=device)
    program(np.arange(1000))
    program(np.arange(2))
    assert lines == ["x [  0   1   2 ... 997 998 999]", "x [0 1]"]


def test_lines_go_to_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    x = gf.input("x", ())
    gf.function(x, gf.print("{{x}} = {}", x), device="reference")(2.5)
    assert capsys.readouterr().out == "{x} = 2.5\n"


def test_what_is_not_computed_is_not_printed(lines: list[str]) -> None:
    x = gf.input("x", ())
    gf.print("unused", x)
    gf.function(x, x + 1, device="reference")(1.0)
    gf.function(x, gf.print("nothing", x), device="null")(1.0)
    assert lines == []


@pytest.mark.parametrize("device", DEVICES)
def test_checks(device: str, lines: list[str]) -> None:
    x = gf.input("x", (None,))
    w = gf.parameter((), 1.0, "w")
    length = gf.check(x, x > 0, "lengths are positive")
    loss = gf.print("loss", gf.sum(gf.log(length)) * w)
    step = gf.function(x, loss, gf.optim.SGD(1.0).minimize(loss), device=device)
    step(np.array([1, np.e], np.float32))
    assert step.store["w"] == 0
    with pytest.raises(gf.FeedError, match="lengths are positive") as error:
        step(np.array([1, 0], np.float32))
    assert error.value.where is not None and error.value.where.file == __file__
    assert step.store["w"] == 0 and len(lines) == 1


@pytest.mark.parametrize("make, message", [
    (lambda x: gf.print("x"), "a message and at least one tensor"),
    (lambda x: gf.print("x", 3), "a message and tensors, not 3"),
    (lambda x: gf.print(x, x), "a message and at least one"),
    (lambda x: gf.print("{} {}", x), "does not fit 1 values"),
    (lambda x: gf.print("{name}", x), "does not fit 1 values"),
    (lambda x: gf.print("{", x), "does not fit 1 values"),
    (lambda x: gf.print("{:5q}", x), "does not fit 1 values"),
    (lambda x: gf.check(x, x, "message"), "is bool, not float32"),
    (lambda x: gf.check(x, x > 0, ""), "the message of a check"),
    (lambda x: gf.check(1, x > 0, "message"), "gives back a Tensor"),
    (lambda x: gf.function(x, {"print.0.0": x}), "has the name of a printed value")])
def test_misuse_is_refused(make: Any, message: str) -> None:
    with pytest.raises(gf.UserError, match=message) as error:
        make(gf.input("x", ()))
    assert error.value.where is not None and error.value.where.file == __file__


def test_bodies_of_loops_do_not_print() -> None:
    def body(carry: gf.Tensor, x: gf.Tensor) -> tuple[gf.Tensor, None]:
        return gf.print("step", carry + x), None

    with pytest.raises(NotImplementedError, match="return the values as outputs"):
        gf.scan(body, gf.constant(0.0), gf.input("x", (3,)))
