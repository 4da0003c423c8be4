"""The README and the docs: their code runs, and what they name exists."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from graphflow import cli
from graphflow.compiler.driver import NAMES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the document's blocks in that language."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in found]


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.cpu
@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p, "python")], ids=lambda p: p.name)
def test_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document, one after the other in one namespace, like a reader who tries them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, text in blocks(path, "python"):
        exec(compile("\n" * (line - 1) + text, str(path), "exec"), namespace)


@pytest.mark.cpu
def test_the_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line, text = blocks(ROOT / "README.md", "python")[0]
    namespace: dict[str, object] = {}
    exec(compile("\n" * (line - 1) + text, str(ROOT / "README.md"), "exec"), namespace)
    assert namespace["model"].evaluate((namespace["points"], namespace["inside"]))["accuracy"] > 0.95


@pytest.mark.cpu
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ran = 0
    for path in DOCUMENTS:
        for _, text in blocks(path, "sh"):
            for command in (shlex.split(line, comments=True) for line in text.splitlines()):
                if command[:1] == ["make"]:
                    assert set(command[1:]) <= targets, command
                elif command[:1] == ["graphflow"]:
                    assert cli.main(command[1:]) == 0, command
                    ran += 1
    assert ran >= 2 and (tmp_path / "out" / "xor" / "01.trace.txt").exists()


def test_the_stages_are_the_drivers() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tuple(table) == NAMES


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_tree_is_that_of_the_checkout() -> None:
    text = (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    parent, seen = ROOT, []
    for indent, name in re.findall(r"^    ( *)(\S+)  ", text, re.MULTILINE):
        parent = parent if indent else ROOT
        assert (parent / name).exists(), name
        if not indent:
            parent = ROOT / name
            seen.append(name.rstrip("/"))
    assert {"graphflow", "compiler", "runtime", "examples", "tests", "docs", "benchmarks"} <= set(seen)
