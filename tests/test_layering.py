"""Who may import whom, read from the sources, imports inside functions included."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Folder -> the module that it installs as.
PACKAGES = {"graphflow": "graphflow", "compiler": "graphflow.compiler", "runtime": "graphflow.runtime",
            "examples": "graphflow.examples"}

# Module -> what of graphflow it may import. The first row that is a module's prefix rules it.
LAYERS = {
    "graphflow.compiler.plan": ("graphflow.compiler.plan",),
    "graphflow.compiler": ("graphflow.compiler",),
    "graphflow.runtime": ("graphflow.runtime", "graphflow.compiler.plan"),
    "graphflow.examples": ("graphflow",),
    "graphflow": ("graphflow",),
}

# Module -> the libraries that it may import beside Python's own. The plan is plain data: it needs none.
LIBRARIES = {
    "graphflow.compiler.plan": {"numpy", "ml_dtypes"},
    "graphflow.compiler": {"numpy", "networkx", "llvmlite"},
    "graphflow.runtime": {"numpy", "llvmlite", "safetensors", "pycuda", "ml_dtypes"},
    "graphflow.examples": {"numpy", "matplotlib", "tqdm"},
    "graphflow": {"numpy", "networkx", "tqdm", "matplotlib", "safetensors", "ml_dtypes", "PIL"},
}

# Libraries that only a function may import, when it is called.
ON_DEMAND = {"pycuda", "matplotlib", "ml_dtypes", "PIL"}

IMPORTERS = ("import_module", "__import__")


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rule(table: dict[str, tuple[str, ...]] | dict[str, set[str]], module: str) -> tuple[str, ...] | set[str]:
    return next(allowed for package, allowed in table.items() if below(module, package))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Every module or member that `tree` imports, by its full name, with the node that does it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = package.split(".")[:len(package.split(".")) - node.level + 1]
                origin = ".".join(base + [node.module] * bool(node.module))
            yield from ((node, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node, node.args[0].value


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    """The imports in `module`, whose source is `text`, that its layer does not allow."""
    tree = ast.parse(text)
    package = module if is_package else module.rpartition(".")[0]
    in_functions = {inner for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef)
                    for inner in ast.walk(outer)}
    wrong = []
    for node, name in imports(tree, package):
        library = name.split(".")[0]
        if library == "graphflow":
            allowed = any(below(name, layer) for layer in rule(LAYERS, module))
        else:
            allowed = library in sys.stdlib_module_names or (
                library in rule(LIBRARIES, module) and (library not in ON_DEMAND or node in in_functions))
        if not allowed:
            wrong.append(f"{module}:{node.lineno}: imports {name}")
    return wrong


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def test_every_import_follows_the_layers() -> None:
    found = list(modules())
    assert {"graphflow", "graphflow.compiler.plan.errors", "graphflow.runtime"} <= dict(found).keys()
    wrong = [line for module, path in found
             for line in violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module, text", [
    ("graphflow.compiler.plan.bind", "from graphflow.compiler.plan.errors import UserError"),
    ("graphflow.compiler.plan.bind", "from .errors import UserError"),
    ("graphflow.compiler.emit.cpu", "from graphflow.compiler.ir import graph\nimport llvmlite.binding"),
    ("graphflow.runtime.cpu", "from graphflow.compiler.plan import schema"),
    ("graphflow.runtime.cuda", "def start():\n    import pycuda.driver"),
    ("graphflow.api", "from graphflow import runtime\nimport graphflow.compiler.driver"),
])
def test_what_the_layers_allow(module: str, text: str) -> None:
    assert violations(module, text) == []


@pytest.mark.parametrize("module, text, name", [
    ("graphflow.compiler.plan.bind", "from graphflow.compiler.ir.graph import Graph",
     "graphflow.compiler.ir.graph.Graph"),
    ("graphflow.compiler.plan.bind", "from ..ir import graph", "graphflow.compiler.ir.graph"),
    ("graphflow.compiler.plan.bind", "def f():\n    import networkx", "networkx"),
    ("graphflow.compiler.driver", "def f():\n    from graphflow import runtime", "graphflow.runtime"),
    ("graphflow.compiler.driver", "import graphflow", "graphflow"),
    ("graphflow.compiler.driver", "import importlib; importlib.import_module('graphflow.runtime.cpu')",
     "graphflow.runtime.cpu"),
    ("graphflow.compiler.emit.cuda", "def f():\n    import pycuda.driver", "pycuda.driver"),
    ("graphflow.runtime.cpu", "from graphflow.compiler import ir", "graphflow.compiler.ir"),
    ("graphflow.runtime.cpu", "if TYPE_CHECKING:\n    from graphflow.language import Tensor",
     "graphflow.language.Tensor"),
    ("graphflow.runtime.cuda", "import pycuda.driver", "pycuda.driver"),
    ("graphflow.api", "from compiler.ir import graph", "compiler.ir.graph"),
    ("graphflow.api", "import torch", "torch"),
])
def test_what_the_layers_refuse(module: str, text: str, name: str) -> None:
    assert [wrong.split(" imports ")[1] for wrong in violations(module, text)] == [name]


def test_every_folder_of_modules_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    present = {module if path.name == "__init__.py" else module.rpartition(".")[0]
               for module, path in modules()}
    assert present == set(project["tool"]["setuptools"]["packages"])
