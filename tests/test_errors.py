"""What the exceptions show, and that they keep what they were given."""
from __future__ import annotations

import ast
import copy
import pickle
import sys
from pathlib import Path

import pytest

from graphflow.compiler.plan import errors
from graphflow.compiler.plan.errors import CompilerError, GraphflowError, Location, ShapeError, UserError

USER_ERRORS = [errors.ShapeError, errors.DTypeError, errors.UseError, errors.FeedError, errors.DataError,
               errors.CheckpointError, errors.DeviceError]


def locate(folder: Path, text: str, line: int, expression: str, scope: str = "") -> Location:
    """The location of `expression` on `line`, with the columns that Python's own parser gives it."""
    path = folder / "model.py"
    path.write_text(text, encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.expr) and node.lineno == line and ast.unparse(node) == expression:
            return Location(str(path), line, scope, node.col_offset, node.end_col_offset)
    raise LookupError(expression)


def marked(where: Location) -> str:
    """The part of the source line that stands over the carets, as a reader of the text sees it."""
    source, carets = where.describe().splitlines()
    start = carets.index("^")
    assert set(carets.lstrip(" \t")) == {"^"}
    return source[start:len(carets)]


def test_the_whole_text(tmp_path: Path) -> None:
    where = locate(tmp_path, "def net(x):\n    return matmul(x, w) + b\n", 2, "matmul(x, w)", "encoder")
    error = ShapeError("the inner axes differ: 3 and 4", op="matmul", shapes=[(2, 3), ("N", 5)],
                       hint="transpose the second operand", where=where)
    start = f"  {where}: "
    assert str(error).splitlines() == [
        "the inner axes differ: 3 and 4",
        "  op: matmul([2, 3], [N, 5]) in encoder",
        start + "return matmul(x, w) + b",
        " " * len(start + "return ") + "^" * len("matmul(x, w)"),
        "hint: transpose the second operand",
    ]


@pytest.mark.parametrize("line, expression", [
    ("y = relu(x) * 2", "relu(x)"),
    ("    y = relu(x) * 2", "relu(x) * 2"),
    ("\ty = f('é', relu(x))", "relu(x)"),
    ("x", "x"),
])
def test_carets_point_at_the_columns(tmp_path: Path, line: str, expression: str) -> None:
    text = line + "\n" if line == line.lstrip() else f"if 1:\n{line}\n"
    where = locate(tmp_path, text, text.count("\n"), expression)
    assert marked(where) == expression


def test_carets_without_columns_underline_the_line(tmp_path: Path) -> None:
    where = locate(tmp_path, "if 1:\n    y = relu(x)\n", 2, "relu(x)")
    assert marked(Location(where.file, 2)) == "y = relu(x)"


def test_carets_of_an_expression_that_goes_on_past_the_line(tmp_path: Path) -> None:
    where = locate(tmp_path, "y = relu(\n    x)\n", 1, "relu(x)")
    assert marked(Location(where.file, 1, "", where.column, None)) == "relu("
    # The end column belongs to another line, here before the start: it must not turn the carets around.
    assert marked(Location(where.file, 1, "", where.column, 1)) == "relu("


@pytest.mark.parametrize("column, end", [(500, 510), (-1, 3), (0, 10_000)])
def test_columns_outside_the_line_are_survived(tmp_path: Path, column: int, end: int) -> None:
    path = tmp_path / "model.py"
    path.write_text("y = relu(x)\n")
    assert marked(Location(str(path), 1, "", column, end)) == "y = relu(x)"


@pytest.mark.parametrize("file", ["<stdin>", "/nowhere/at/all.py"])
def test_a_place_without_source(file: str) -> None:
    where = Location(file, 7)
    assert where.source() == ""
    assert str(UserError("wrong", where=where)) == f"wrong\n  {file}:7"


def test_files_below_the_working_directory_are_relative(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Location(str(tmp_path / "model.py"), 3)) == "model.py:3"
    assert str(Location("/elsewhere/model.py", 3)) == "/elsewhere/model.py:3"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="co_positions came with Python 3.11")
def test_columns_are_those_of_co_positions(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("y = 1 + fail('é', 2)\n", encoding="utf-8")
    seen: list[Location] = []

    def fail(*_: object) -> int:
        frame = sys._getframe(1)
        positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        seen.append(Location(str(path), frame.f_lineno, "", positions[2], positions[3]))
        return 1

    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"fail": fail})
    assert marked(seen[0]) == "fail('é', 2)"


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_every_user_error_keeps_its_attributes(kind: type[UserError]) -> None:
    where = Location("model.py", 3, "scope")
    error = kind("message", op="add", shapes=[(1,), (2,)], hint="do this", where=where)
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(same) is kind and isinstance(same, UserError) and isinstance(same, GraphflowError)
        assert (same.message, same.op, same.shapes, same.hint, same.where) == (
            "message", "add", ((1,), (2,)), "do this", where)
        assert str(same) == str(error)


def test_only_the_message_is_needed() -> None:
    assert str(UserError("just this")) == "just this"
    assert str(UserError("just this", shapes=[(2, 3), "f32[4]"])) == "just this\n  shapes: [2, 3], f32[4]"


def test_with_location_sets_a_missing_location_only() -> None:
    first, second = Location("a.py", 1), Location("b.py", 2)
    error = UserError("wrong")
    assert error.with_location(None) is error and error.where is None
    assert error.with_location(first) is error and error.where == first
    assert error.with_location(second).where == first


def test_a_compiler_error_blames_graphflow_and_says_what_to_report(tmp_path: Path) -> None:
    where = locate(tmp_path, "y = relu(x)\n", 1, "relu(x)")
    error = CompilerError("two values named %3", stage="fuse", dump="%3 = relu(%1)\n%3 = add(%1)\n",
                          where=where)
    text = str(error)
    assert not isinstance(error, UserError)
    assert text.startswith("two values named %3\n")
    for part in ("fault of graphflow in stage fuse", "not of your program", "report it", "y = relu(x)\n",
                 "--- fuse ---\n%3 = relu(%1)\n%3 = add(%1)\n---"):
        assert part in text
    assert str(pickle.loads(pickle.dumps(error))) == text
    assert "---" not in str(CompilerError("no dump"))
