"""The sizes that keep the project readable, its docstrings, and the cost of importing it."""
from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ("compiler", "runtime")
PACKAGES = ("graphflow", *ENGINE)
SOURCES = (*PACKAGES, "examples", "benchmarks", "tests")

FILE_LINES = 600
FUNCTION_LINES = 60
LINE_COLUMNS = 110
ENGINE_LINES = 25_500
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER)
IMPORT_SECONDS = 0.3
LAZY_MODULES = ("llvmlite", "networkx", "pycuda", "safetensors", "tqdm", "matplotlib", "ml_dtypes", "PIL")


def sources(folders: tuple[str, ...]) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, "no sources: the checks below would pass over nothing"
    return found


def long_parts(name: str, text: str) -> Iterator[str]:
    """What of `text` exceeds the budgets of a file, a function or a line."""
    lines = text.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{name}: {len(lines)} lines"
    for number, line in enumerate(lines, 1):
        if len(line) > LINE_COLUMNS:
            yield f"{name}:{number}: {len(line)} columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"


def undocumented(name: str, text: str) -> Iterator[str]:
    """The public modules, classes, functions and methods of `text` that have no docstring."""
    tree = ast.parse(text)
    if text.strip() and not ast.get_docstring(tree):
        yield f"{name}: the module"
    yield from undocumented_members(name, tree, "")


def undocumented_members(name: str, owner: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in owner.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name[0] == "_":
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
        if not ast.get_docstring(node) and not decorators & {"overload", "setter"}:
            yield f"{name}:{node.lineno}: {prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented_members(name, node, f"{prefix}{node.name}.")


def test_files_functions_and_lines_are_short() -> None:
    found = [part for path in sources(SOURCES)
             for part in long_parts(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_every_public_name_is_documented() -> None:
    found = [part for path in sources(PACKAGES)
             for part in undocumented(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def code_lines(text: str) -> int:
    """The lines that hold code: a budget that counted blank lines, comments and docstrings would have them
    cut."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def test_the_engine_is_small() -> None:
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in sources(ENGINE)) <= ENGINE_LINES


def test_code_lines_are_those_that_hold_code() -> None:
    text = '"""Module."""\n\n# comment\nx = 1\n\n\ndef f():\n    """Doc,\n    two lines."""\n'
    assert code_lines(text + "    return [1,\n            2]\n") == 4


@pytest.mark.parametrize("text, expected", [
    ("x = 1\n" * FILE_LINES, []),
    ("x = 1\n" * (FILE_LINES + 1), ["a.py: 601 lines"]),
    ("#" * LINE_COLUMNS, []),
    ("\n" + "#" * (LINE_COLUMNS + 1), ["a.py:2: 111 columns"]),
    ("def f():\n" + "    pass\n" * (FUNCTION_LINES - 1), []),
    ("class C:\n  def f(self):\n" + "    pass\n" * FUNCTION_LINES, ["a.py:2: f has 61 lines"]),
])
def test_the_size_check_itself(text: str, expected: list[str]) -> None:
    assert list(long_parts("a.py", text)) == expected


def test_the_docstring_check_itself() -> None:
    text = ("class Public:\n"
            "    'text'\n"
            "    def method(self): ...\n"
            "    def _private(self): ...\n"
            "    def __len__(self): ...\n"
            "    @size.setter\n"
            "    def size(self, size): ...\n"
            "def documented():\n"
            "    'text'\n"
            "    def inner(): ...\n"
            "def function(): ...\n")
    assert list(undocumented("a.py", text)) == ["a.py: the module", "a.py:3: Public.method",
                                                "a.py:11: function"]
    assert list(undocumented("__init__.py", "")) == []


def test_importing_graphflow_is_quick_and_loads_no_engine() -> None:
    """The thread's time, not the clock's, and the best of several fresh interpreters: the others measure what
    else the machine was doing."""
    program = ("import time; start = time.thread_time()\n"
               "import graphflow; seconds = time.thread_time() - start\n"
               "import json, sys; print(json.dumps([seconds, sorted(sys.modules)]))")
    seconds = []
    for _ in range(7):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        elapsed, modules = json.loads(done.stdout)
        seconds.append(elapsed)
        assert "graphflow" in modules
        assert [name for name in LAZY_MODULES if name in modules] == []
    assert min(seconds) <= IMPORT_SECONDS
