"""Where the user's code is: name scopes, and the source line that every node remembers."""
from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from types import CodeType

import graphflow.compiler
import graphflow.runtime
from graphflow.compiler.plan.errors import Location, UseError

_scope: ContextVar[str] = ContextVar("graphflow_scope", default="")


def _folder(file: str | None) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(file or "")), "")


_HERE = _folder(__file__)
_INTERNAL = (_HERE, _folder(graphflow.compiler.__file__), _folder(graphflow.runtime.__file__))
# installed below the package, but written as a user writes
_EXAMPLES = os.path.join(_HERE, "examples", "")


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Names what is made inside: ``with gf.scope("encoder"):``; scopes nest as ``encoder/attention``.

    The scope becomes the prefix of parameters' names and is shown with every node, in dumps and in errors.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split("/")):
        raise UseError(f"{name!r} is no name for a scope", hint="use letters, digits and _, with / between "
                       "nested names", where=here())
    token = _scope.set(f"{_scope.get()}/{name}" if _scope.get() else name)
    try:
        yield
    finally:
        _scope.reset(token)


def current_scope() -> str:
    """The open scopes, joined by "/"; "" for none."""
    return _scope.get()


def here() -> Location | None:
    """The innermost line of code outside graphflow, with the open scope; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None and _is_internal(frame.f_code.co_filename):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    columns = _columns(frame.f_code, frame.f_lasti)
    return Location(frame.f_code.co_filename, frame.f_lineno, _scope.get(), *columns)


@lru_cache(maxsize=1024)
def _is_internal(file: str) -> bool:
    path = file if file.startswith("<") else os.path.abspath(file)      # "<stdin>" is no path
    return path.startswith(_INTERNAL) and not path.startswith(_EXAMPLES)


@lru_cache(maxsize=4096)
def _columns(code: CodeType, instruction: int) -> tuple[int | None, int | None]:
    """(first column, column behind the last) of the expression that runs; the second None where it goes on
    past its first line. Known from Python 3.11 on."""
    if sys.version_info < (3, 11):
        return None, None
    line, end_line, column, end_column = next(islice(code.co_positions(), instruction // 2, None))
    return column, end_column if line == end_line else None
