"""The lexical ground that every text form stands on: graphs, kernels and plans.

Tokens: names, numbers, strings, layouts (``@nhwc+1``) and punctuation; white space separates, ``;`` starts a
comment that ends with the line. On top of them a `Scanner` reads dimensions, types, guards and literals, and
each has the function ``..._text`` that prints what it reads: print, read, print gives the same text, and
floats are exact.
"""
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from graphflow.compiler.plan.dims import Dim, DimLike, parse_tokens
from graphflow.compiler.plan.dtypes import DTYPES, DType
from graphflow.compiler.plan.errors import GraphflowError, TextError

RESERVED = frozenset(("true", "false", "nan", "inf", "hex", *DTYPES))
"""Names that are literals: no symbol of a dimension may be called so."""

MAX_NESTING = 200
"""How deep brackets may nest, so that no text can exhaust the parsers' stack."""

MAX_AHEAD = 3
"""How many tokens beyond the next one a reader may look."""

_NAME = re.compile(r"[A-Za-z_][\w.']*")
_TOKEN = re.compile(r"""
    (?P<space>(?:\s|;[^\n]*)+)
  | (?P<float>\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+))
  | (?P<integer>\d{1,20}(?!\d))
  | (?P<name>[A-Za-z_][\w.']*)
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<layout>@[\w+.:-]+)
  | (?P<mark>//|->|<=|==|[-+*/%()\[\]{}<>=,:|#^&!?.])
""", re.VERBOSE)
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_Item = TypeVar("_Item")


class Scanner:
    """Reads tokens from left to right; every mismatch is a TextError with line and column.

    `peek` looks, `accept` takes a token if it is the one asked for, `expect` insists; the others read one
    thing each.
    """

    def __init__(self, text: str, source: str = "text") -> None:
        self.text, self.source = text, source
        self.kinds: list[str] = []
        self.tokens: list[str] = []
        self.places: list[int] = []
        self.position = 0
        at = depth = 0
        for found in _TOKEN.finditer(text):
            if found.start() != at:
                break
            kind, token = str(found.lastgroup), found[0]
            if kind != "space":
                self.kinds.append(kind)
                self.tokens.append(token)
                self.places.append(at)
                if token in _OPENING:
                    depth += 1
                    if depth > MAX_NESTING:
                        raise self._error_at(at, f"brackets nest deeper than {MAX_NESTING}")
                elif token in _CLOSING:
                    depth -= 1
            at = found.end()
        if at < len(text):
            raise self._error_at(at, f"no token starts with {text[at]!r}")
        for _ in range(1 + MAX_AHEAD):                # so that looking past the end needs no test
            self.kinds.append("end")
            self.tokens.append("")
            self.places.append(len(text))

    def _error_at(self, place: int, message: str) -> TextError:
        line = self.text.count("\n", 0, place) + 1
        column = place - (self.text.rfind("\n", 0, place) + 1) + 1
        return TextError(f"{self.source}, line {line}, column {column}: {message}")

    def error(self, message: str, position: int | None = None) -> TextError:
        """The error to raise about the next token, or about token number `position`."""
        return self._error_at(self.places[self.position if position is None else position], message)

    def peek(self, ahead: int = 0) -> str:
        """The text of the next token ("" at the end), or of one behind it: `ahead` is at most MAX_AHEAD."""
        return self.tokens[self.position + ahead]

    def kind(self) -> str:
        """What the next token is: name, integer, float, string, layout, mark or end."""
        return self.kinds[self.position]

    def take(self) -> str:
        """The next token, whatever it is."""
        if self.kind() == "end":
            raise self.error("the text ends too early")
        self.position += 1
        return self.tokens[self.position - 1]

    def accept(self, token: str) -> bool:
        """Takes the token if it comes next; says whether it did."""
        if self.tokens[self.position] != token:
            return False
        self.take()
        return True

    def expect(self, token: str) -> None:
        """Takes the token, which must come next."""
        if not self.accept(token):
            raise self.error(f"expected {token!r}, found {self.peek() or 'the end'!r}")

    def end(self) -> None:
        """Nothing may follow."""
        if self.kind() != "end":
            raise self.error(f"expected the end, found {self.peek()!r}")

    def sequence(self, opening: str, item: Callable[[], _Item], closing: str) -> tuple[_Item, ...]:
        """Items between brackets, separated by commas; none is fine."""
        self.expect(opening)
        items: list[_Item] = []
        while not self.accept(closing):
            if items:
                self.expect(",")
            items.append(item())
        return tuple(items)

    def name(self) -> str:
        """A name, bare or as a string (see `name_text`)."""
        if self.kind() == "string":
            return self.string()
        if self.kind() != "name":
            raise self.error(f"expected a name, found {self.peek() or 'the end'!r}")
        return self.take()

    def word(self, allowed: Sequence[str], what: str) -> str:
        """A bare name out of a few."""
        if self.kind() != "name" or self.peek() not in allowed:
            raise self.error(f"expected {what} ({', '.join(allowed)}), found {self.peek() or 'the end'!r}")
        return self.take()

    def string(self) -> str:
        """A string in double quotes, with the escapes of JSON."""
        if self.kind() != "string":
            raise self.error(f"expected a string, found {self.peek() or 'the end'!r}")
        try:
            return str(json.loads(self.peek()))
        except ValueError:
            raise self.error("a malformed string") from None
        finally:
            self.take()

    def integer(self) -> int:
        """An integer, with or without a minus sign."""
        negative = self.accept("-")
        if self.kind() != "integer":
            raise self.error(f"expected an integer, found {self.peek() or 'the end'!r}")
        value = int(self.take())
        return -value if negative else value

    def number(self) -> int | float | bool:
        """What `number_text` prints."""
        if self.peek() in ("true", "false"):
            return self.take() == "true"
        negative = self.accept("-")
        if self.kind() == "integer":
            value: int | float = int(self.take())
        elif self.kind() == "float" or self.peek() in ("nan", "inf"):
            value = float(self.take())
        else:
            raise self.error(f"expected a number, found {self.peek() or 'the end'!r}")
        return -value if negative else value

    def dim(self) -> DimLike:
        """A dimension, as its `str` prints it."""
        try:
            value, self.position = parse_tokens(self.tokens, self.position)
        except GraphflowError as e:
            raise self.error(str(e)) from None
        return value

    def dtype(self) -> DType:
        """The short name of an element type."""
        return DTYPES[self.word(tuple(DTYPES), "an element type")]

    def type(self) -> tuple[DType, tuple[DimLike, ...], str]:
        """Element type, shape and layout: ``f32[N,784]`` or ``f32[N,3,8,8]@nhwc+1``."""
        dtype = self.dtype()
        shape = self.sequence("[", self.dim, "]")
        return dtype, shape, self.take()[1:] if self.kind() == "layout" else ""

    def literal(self) -> Any:
        """The value of an attribute: bool, int, float, str, bytes, DType, dimension or a tuple of these."""
        token, kind = self.peek(), self.kind()
        if token == "[":
            return self.sequence("[", self.literal, "]")
        if kind == "string":
            return self.string()
        if token == "hex":
            self.take()
            try:
                return bytes.fromhex(self.string())
            except ValueError:
                raise self.error("the string before this is not hexadecimal") from None
        if token in DTYPES:
            return self.dtype()
        if kind == "float" or token in RESERVED:
            return self.number()
        if token == "-" and (self.kinds[self.position + 1] == "float" or self.peek(1) in ("nan", "inf")):
            return self.number()
        return self.dim()


def name_text(name: str) -> str:
    """A name: bare where it is one token, else a string."""
    return name if _NAME.fullmatch(name) and name.isascii() else json.dumps(name)


def number_text(value: int | float | bool) -> str:
    """A number, exact: a float always shows as one (``1.0``, ``1e-05``, ``nan``, ``-inf``)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "nan"
    return repr(float(value))


def dim_text(d: DimLike) -> str:
    """A dimension without blanks."""
    return str(d).replace(" ", "") if isinstance(d, Dim) else str(int(d))


def type_text(dtype: DType, shape: Sequence[DimLike], layout: str = "") -> str:
    """Element type, shape and layout in one word."""
    return f"{dtype}[{','.join(map(dim_text, shape))}]" + (f"@{layout}" if layout else "")


def literal_text(value: Any) -> str:
    """The value of an attribute; TypeError for a value that attributes may not have."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(literal_text, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, (bytes, bytearray)):
        return f'hex"{value.hex()}"'
    if isinstance(value, DType):
        return str(value)
    if isinstance(value, Dim):
        return dim_text(value)
    if isinstance(value, (bool, int, float)):
        return number_text(value)
    raise TypeError(f"{value!r} cannot be the value of an attribute")
