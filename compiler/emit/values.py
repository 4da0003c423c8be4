"""What instructions of LLVM IR text are made of: types, values, labels, and constants written exactly."""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Union

import numpy as np

_FLOATS = {"float": 32, "double": 64}
_SUFFIX = {"float": "f32", "double": "f64", "ptr": "p0"}


class Type(NamedTuple):
    """An LLVM first-class type: `element` is `float`, `i32`, `ptr` …; `lanes` is 1 for a scalar."""

    element: str
    lanes: int = 1

    def __str__(self) -> str:
        return self.element if self.lanes == 1 else f"<{self.lanes} x {self.element}>"

    @property
    def is_float(self) -> bool:
        """Whether the element is a floating-point type."""
        return self.element in _FLOATS

    @property
    def bits(self) -> int:
        """Bits of one element (a pointer has 64)."""
        if self.element == "ptr":
            return 64
        return _FLOATS.get(self.element) or int(self.element[1:])

    @property
    def bytes(self) -> int:
        """Bytes of one element in memory."""
        return (self.bits + 7) // 8

    @property
    def scalar(self) -> Type:
        """The type of one lane."""
        return Type(self.element)

    @property
    def suffix(self) -> str:
        """The type's part of an intrinsic's name: `f32`, `v8i64` …"""
        element = _SUFFIX.get(self.element, self.element)
        return element if self.lanes == 1 else f"v{self.lanes}{element}"

    def vector(self, lanes: int) -> Type:
        """This element type with `lanes` lanes."""
        return Type(self.element, lanes)

    def like(self, element: Type) -> Type:
        """The element type of `element` with this type's lanes."""
        return Type(element.element, self.lanes)


F32, F64 = Type("float"), Type("double")
I1, I8, I16, I32, I64 = Type("i1"), Type("i8"), Type("i16"), Type("i32"), Type("i64")
PTR, VOID = Type("ptr"), Type("void")

#: The type of one element in memory, by the name of its DType. Signedness belongs to the operation, and what
#: the bits of a half mean to its casts.
MEMORY_TYPES = {"f32": F32, "f64": F64, "f16": I16, "bf16": I16, "i32": I32, "i64": I64, "u32": I32, "u8": I8,
                "bool": I8}


class Value:
    """An operand: its `type`, and its `name` as written in IR (`%v7`, `42`, `splat (float 0x…)`)."""

    __slots__ = ("name", "type")

    def __init__(self, type: Type, name: str) -> None:
        self.type = type
        self.name = name

    @property
    def is_constant(self) -> bool:
        """Whether this is written out as a literal."""
        return self.name[0] not in "%@"

    def __str__(self) -> str:
        return f"{self.type} {self.name}"

    __repr__ = __str__


#: What an instruction takes: a value, or a number that becomes a constant of the other operand's type.
Operand = Value | int | float


class Block(str):
    """The label of a basic block."""


class Phi(Value):
    """A phi node; `add` may be called until the module's text is taken."""

    __slots__ = ("incoming",)

    def __init__(self, type: Type, name: str) -> None:
        super().__init__(type, name)
        self.incoming: list[tuple[Value, Block]] = []

    def add(self, value: Value, block: Block) -> None:
        """Say that the node has `value` when control comes from `block`."""
        if value.type != self.type:
            raise TypeError(f"phi of type {self.type} cannot receive {value}")
        self.incoming.append((value, block))

    def text(self) -> str:
        """The instruction as IR text."""
        pairs = ", ".join(f"[ {value.name}, %{block} ]" for value, block in self.incoming)
        return f"  {self.name} = phi {self.type} {pairs}"


class Loop:
    """A loop under construction, see `Builder.loop`.

    `index` is the induction variable; `carry` holds the carried values at the start of the iteration;
    `next` sets them for the following one; `results` holds their last values once the loop is closed.
    """

    def __init__(self, index: Phi, carry: list[Phi]) -> None:
        self.index: Value = index
        self.carry: list[Value] = list(carry)
        self.following: list[Value] = []
        self.results: list[Value] = []

    def next(self, *values: Value) -> None:
        """Set the carried values of the following iteration, in the order of `carry`."""
        self.following = list(values)


#: A line of a function's text, a node whose text is not final, or the lines of a `Point`.
Line = Union[str, Phi, "list[Line]"]


class Point:
    """A place in a function where instructions can still be added, see `Builder.point`.

    `current` is the block in which the next instruction there will stand.
    """

    def __init__(self, current: Block) -> None:
        self.lines: list[Line] = []
        self.current = current


def flat(lines: list[Line]) -> Iterator[str]:
    """The lines of a function's text in order."""
    for line in lines:
        if isinstance(line, list):
            yield from flat(line)
        else:
            yield line if isinstance(line, str) else line.text()


_FOLDED: dict[str, Callable[[int, int], int]] = {"add": operator.add, "sub": operator.sub,
                                                  "mul": operator.mul}


def constant(type: Type, value: float) -> Value:
    """`value` as an exact constant of `type`, in every lane; floats are rounded to the type first."""
    text = _scalar_text(type, value)
    if type.lanes > 1:
        text = f"splat ({type.element} {text})"
    return Value(type, text)


def vector_constant(type: Type, values: Sequence[int | float]) -> Value:
    """A vector constant with one given value per lane."""
    if len(values) != type.lanes:
        raise TypeError(f"{len(values)} values for {type}")
    if type.lanes == 1:
        return constant(type, values[0])
    lanes = ", ".join(f"{type.element} {_scalar_text(type, value)}" for value in values)
    return Value(type, f"<{lanes}>")


def folded(opcode: str, x: Value, y: Value) -> Value | None:
    """What the instruction gives for two constants of I64, so that loops know how often they run; else
    None."""
    numbers = [x.name, y.name]
    if x.type != I64 or opcode not in _FOLDED or not all(n.lstrip("-").isdecimal() for n in numbers):
        return None
    result = _FOLDED[opcode](*map(int, numbers))
    return constant(I64, result) if -(1 << 63) <= result < 1 << 63 else None


def _scalar_text(type: Type, value: float) -> str:
    """One lane of a constant, exactly: floats as the bits of the value."""
    element = type.element
    if element == "ptr":
        if value != 0:
            raise TypeError("the only pointer constant is null")
        return "null"
    if not type.is_float:
        if element == "i1":
            return "true" if value else "false"
        return str(int(value))
    if element == "float":
        with np.errstate(over="ignore", under="ignore"):
            value = float(np.float32(value))
    # LLVM writes a float constant too as the bits of the equal double.
    return "0x" + struct.pack(">d", float(value)).hex().upper()


TRUE, FALSE = constant(I1, True), constant(I1, False)
