"""Looking into programs: printing values, and checking conditions, in every call.

Both take a tensor and give it back, and act in every program that computes with what they gave:
``h = gf.print("hidden", h)``. `write` receives each printed line; replace it to send the lines elsewhere:
``gf.debug.write = log.append``.
"""
from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np

from graphflow.arguments import as_tensor
from graphflow.compiler.ir.graph import Node
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.errors import DTypeError, UseError
from graphflow.reductions import all as every
from graphflow.scope import here
from graphflow.tensor import Operand, Tensor, with_check

OUTPUT = "print."
"""What the names of the outputs begin with that hold printed values."""

MAX_SHOWN = 100
"""Arrays of more elements are shown by the first and last three of each axis."""

_serial = itertools.count()


def _to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


write: Callable[[str], None] = _to_stdout
"""Receives each line that programs print."""


def print(message: str, *tensors: Tensor) -> Any:  # noqa: A001
    """The tensors (one, or a list of several), such that every program that computes with them prints
    `message` and their values after each call, in the order in which the prints were written.

    ``{}`` in the message stands for a value, with a format such as ``{:.3f}`` for its numbers; without any,
    the values follow the message. Arrays of more than 100 elements are shortened as NumPy does. State is
    printed as it was when the call began. Whole arrays are kept and copied for it: this is for finding
    faults. A call that a check refuses prints nothing; nor does the null device.
    """
    for t in tensors:
        if not isinstance(t, Tensor):
            raise UseError(f"print takes a message and tensors, not {t!r}", where=here(),
                           hint='x = gf.print("x is {}", x)')
    if not isinstance(message, str) or not tensors:
        raise UseError("print takes a message and at least one tensor", where=here(),
                       hint='x = gf.print("x is {}", x)')
    _formatted(message, [np.zeros((), t.dtype.numpy) for t in tensors])
    where, attrs = here(), {"message": message, "serial": next(_serial)}
    note = Node("print", tuple(t.value for t in tensors), attrs, (), (), (where,) if where else ())
    out = [Tensor(t.value, (*t.checks, note)) for t in tensors]
    return out[0] if len(out) == 1 else out


def check(x: Tensor, condition: Operand, message: str) -> Tensor:
    """`x`, such that every program that computes with it first refuses the call with `message` unless the
    condition (bools, of any shape) holds everywhere: ``x = gf.check(x, x > 0, "lengths are positive")``.

    The error, a FeedError, names this line; no state has changed then. Nothing is printed or returned.
    """
    if not isinstance(x, Tensor):
        raise UseError(f"check gives back a Tensor; {x!r} is none", where=here(),
                       hint='x = gf.check(x, x > 0, "x is positive")')
    if not isinstance(message, str) or not message:
        raise UseError(f"the message of a check is {message!r}", where=here(), hint="say what must hold")
    holds = as_tensor(condition)
    if holds.dtype != BOOL:
        raise DTypeError(f"the condition of a check is bool, not {holds.dtype.full_name}",
                         shapes=[holds.shape], where=here(), hint="compare with something, e.g. x > 0")
    return with_check(x, every(holds), message)


@dataclass(frozen=True)
class Printed:
    """A print of a program: its message, and the names of the hidden outputs that hold the values."""
    message: str
    names: tuple[str, ...]


def prints_among(notes: Iterable[Node]) -> Iterator[tuple[Printed, Node]]:
    """What the notes of a program's tensors print, in the order in which the prints were written."""
    found = sorted((n for n in notes if n.op == "print"), key=lambda n: n.attrs["serial"])
    for i, node in enumerate(found):
        names = tuple(f"{OUTPUT}{i}.{j}" for j in range(len(node.inputs)))
        yield Printed(node.attrs["message"], names), node


def show(prints: Sequence[Printed], values: Sequence[np.ndarray]) -> None:
    """Writes a line for each print; `values` are those of all prints, in order."""
    given = iter(values)
    for printed in prints:
        write(_formatted(printed.message, [next(given) for _ in printed.names]))


class _Value:
    """A value that a format string may have in it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __format__(self, spec: str) -> str:
        if self.array.ndim == 0:
            return format(self.array.item(), spec)
        options: dict[str, Any] = {"threshold": MAX_SHOWN, "edgeitems": 3}
        if spec:
            options["formatter"] = {"all": lambda v: format(v, spec)}
        return np.array2string(self.array, **options)


def _formatted(message: str, arrays: Sequence[np.ndarray]) -> str:
    """The line; UseError for a message whose placeholders are not as many as there are values."""
    try:
        places = sum(field is not None for _, field, _, _ in Formatter().parse(message))
        whole = message if places else " ".join([message,
                                                 *("{}" for _ in arrays)])
        if places not in (0, len(arrays)):
            raise ValueError(f"it has {places} places")
        return whole.format(*(_Value(a) for a in arrays))
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise UseError(f"the message {message!r} does not fit {len(arrays)} values: {error}",
                       where=here(), hint="write {} for each value, or none at all") from None
