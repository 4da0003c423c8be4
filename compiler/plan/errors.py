"""Every exception of graphflow, and the source location that it shows.

Two kinds, never mixed: a `UserError` is something the caller can put right and points at the caller's
line; a `CompilerError` is a fault of graphflow itself and says how to report it.
"""
from __future__ import annotations

import linecache
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_Error = TypeVar("_Error", bound="UserError")


@dataclass(frozen=True)
class Location:
    """A place in the user's source.

    `line` counts from 1. `column` and `end_column` are UTF-8 byte offsets from 0 within that line, as
    `code.co_positions()` gives them (Python 3.11 and later); None where they are not known, and
    `end_column` also where the expression goes on past the line. `scope` is the name scope that was
    open there, "" for none.
    """

    file: str
    line: int
    scope: str = ""
    column: int | None = None
    end_column: int | None = None

    def source(self) -> str:
        """The line's text without its indentation, "" if the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()

    def carets(self) -> str:
        """The marks to print under `source()`: under the columns if known, else under all of it."""
        text = linecache.getline(self.file, self.line)
        stripped = text.strip()
        raw = text.encode()
        if self.column is None or not 0 <= self.column < len(raw):
            return "^" * len(stripped)
        indent = len(text) - len(text.lstrip())
        start = max(len(raw[:self.column].decode(errors="ignore")) - indent, 0)
        stop = len(stripped)
        if self.end_column is not None and self.end_column > self.column:
            stop = min(stop, len(raw[:self.end_column].decode(errors="ignore")) - indent)
        # A tab before the mark must stay a tab, or the mark lands elsewhere on the terminal.
        pad = "".join("\t" if char == "\t" else " " for char in stripped[:start])
        return pad + "^" * max(stop - start, 1)

    def describe(self) -> str:
        """`  file.py:12: the source line` and the carets under it; the place alone if there is no text."""
        place = f"  {self}"
        source = self.source()
        if not source:
            return place
        return f"{place}: {source}\n{' ' * (len(place) + 2)}{self.carets()}"

    def __str__(self) -> str:
        """`file.py:12`, relative to the working directory if the file lies below it."""
        relative = os.path.relpath(self.file) if os.path.isabs(self.file) else self.file
        return f"{self.file if relative.startswith('..') else relative}:{self.line}"


class GraphflowError(Exception):
    """The base of everything that graphflow raises on purpose."""


def _shape_text(shape: object) -> str:
    if isinstance(shape, (tuple, list)):
        return "[" + ", ".join(str(size) for size in shape) + "]"
    return str(shape)


class UserError(GraphflowError):
    """Something the caller can put right.

    `op` names the operation, `shapes` its operands' shapes (tuples of sizes or texts), `hint` says what
    to do, `where` is the user's line. All four are kept as attributes, beside `message`.
    """

    def __init__(self, message: str, *, op: str | None = None, shapes: Sequence[object] | None = None,
                 hint: str | None = None, where: Location | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.op = op
        self.shapes = None if shapes is None else tuple(shapes)
        self.hint = hint
        self.where = where

    def with_location(self: _Error, where: Location | None) -> _Error:
        """Take `where` as the location unless one is set already; returns the error, ready to raise."""
        if self.where is None:
            self.where = where
        return self

    def __str__(self) -> str:
        parts = [self.message]
        operands = ", ".join(_shape_text(shape) for shape in self.shapes or ())
        scope = f" in {self.where.scope}" if self.where is not None and self.where.scope else ""
        if self.op is not None:
            parts.append(f"  op: {self.op}({operands}){scope}")
        elif operands:
            parts.append(f"  shapes: {operands}{scope}")
        if self.where is not None:
            parts.append(self.where.describe())
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)


class ShapeError(UserError):
    """Shapes that do not fit together."""


class DTypeError(UserError):
    """Element types that do not fit together, or that an op does not take."""


class UseError(UserError):
    """A function called in a way that it does not allow."""


class FeedError(UserError):
    """Missing, surplus or wrong feeds: shape, dtype, labels out of range, NaN."""


class DataError(UserError):
    """A file of data that is malformed, or arrays that make no data set."""


class TextError(UserError):
    """The text form of a graph, kernel or plan that cannot be read."""


class PlanError(UserError):
    """A plan that breaks a rule of plans: a damaged or foreign file."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class TrainingError(UserError):
    """Training that cannot go on: a loss that is NaN or infinite."""


class DeviceError(UserError):
    """A device that is absent, unusable or out of memory."""


class CompilerError(GraphflowError):
    """graphflow's own mistake: a stage produced something its checker refuses, or failed on valid input.

    `stage` names the stage, `dump` is the text of what it had in hand, `where` the user's line that led
    there; all are kept as attributes, beside `message`.
    """

    def __init__(self, message: str, *, stage: str | None = None, dump: str | None = None,
                 where: Location | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.dump = dump
        self.where = where

    def __str__(self) -> str:
        stage = f" in stage {self.stage}" if self.stage else ""
        parts = [self.message, f"This is a fault of graphflow{stage}, not of your program."]
        if self.where is not None:
            parts.append(self.where.describe())
        parts.append("Please report it with this whole message, the program that led to it, and the "
                     "versions of graphflow, Python and the operating system.")
        if self.dump:
            parts += [f"--- {self.stage or 'dump'} ---", self.dump.rstrip("\n"), "---"]
        return "\n".join(parts)
