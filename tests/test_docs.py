"""The reference in docs/ops.md is what its generator writes, and leaves out nothing."""
from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import graphflow as gf
from graphflow.compiler.ops import OPS
from graphflow.docs import reference

PAGE = Path(__file__).parents[1] / "docs" / "ops.md"


def test_the_page_is_what_the_generator_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_public_name_has_a_row_with_a_sentence() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)[(`].*?\| (.*) \|$", page, re.MULTILINE))
    modules = {name for name in gf.__all__ if isinstance(getattr(gf, name), ModuleType)}
    names = [*(name for name in gf.__all__ if name not in modules), *OPS]
    assert [name for name in names if not rows.get(name, "").strip()] == []
    assert [name for name in modules - {"functions"} if f"## gf.{name}\n" not in page] == []
