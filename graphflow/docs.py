"""Writes docs/ops.md, the reference of the language and of the op table, from the sources themselves:

    python -m graphflow.docs > docs/ops.md
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import graphflow
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import TensorType, Value
from graphflow.compiler.ops import FAMILIES
from graphflow.compiler.ops.record import KINDS, REQUIRED, Op
from graphflow.compiler.plan.dtypes import DTYPES, F32, as_dtype
from graphflow.functions import MODULES
from graphflow.pointwise import ALIASES

_HEAD = """\
# Reference

Made by `make docs` from the docstrings and the op table: change those, not this file.

Every function is found as `gf.NAME`; those of a module, such as `gf.nn`, as `gf.nn.NAME`. Operands may be
tensors, numbers, lists and arrays. Every op of the table at the end, but for those that only the compiler
makes, is a function of its own name, too.
"""
_OPS = """\
# The op table

In gradients, `g` is the gradient by the result (`g0`, `g1` … where there are several), `result` the op's
result; functions stand for ops of the table, whose attributes are left out. A dash: there is none.

Kinds of ops:

"""
_INFIX = {"add": "+", "sub": "-", "mul": "·", "div": "/", "eq": "=", "ne": "≠", "lt": "<", "le": "≤",
          "gt": ">", "ge": "≥"}
_ABBREVIATIONS = ("e.g.", "i.e.", "al.", "etc.", "cf.", "vs.", "p.")
_LONGEST = 160
_KINDS = {"f": "float", "h": "half", "i": "integer", "u": "integer", "b": "bool"}


def reference() -> str:
    """The text of docs/ops.md."""
    parts = [_HEAD, "## graphflow\n", _table(_names(graphflow, graphflow.__all__))]
    for module in MODULES:
        parts += [f"## {_title(module)}\n", f"{_first_sentence(module)}\n", _table(_defined(module))]
    aliases = ", ".join(f"`{name}` = `{op}`" for name, op in sorted(ALIASES.items()))
    parts += ["## NumPy's names of ops\n", f"{aliases}.\n"]
    for name in sorted(graphflow.__all__):
        module = getattr(graphflow, name)
        if isinstance(module, ModuleType) and module is not graphflow.functions:
            rows = _names(module, module.__all__) if hasattr(module, "__all__") else _defined(module)
            parts += [f"## gf.{name}\n", f"{_first_sentence(module)}\n", _table(rows)]
    parts.append(_OPS + "".join(f"- {kind}: {text}\n" for kind, text in KINDS.items()))
    for family in FAMILIES:
        parts += [f"## {_title(family)}\n", f"{_first_sentence(family)}\n", _op_table(family.OPS)]
    return "\n".join(parts)


# --- the language

def _title(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[-1].capitalize()


def _names(module: ModuleType, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(signature, first sentence) of the named members and of their methods; modules have tables of their
    own."""
    for name in sorted(names, key=str.lower):
        member = getattr(module, name)
        if isinstance(member, ModuleType):
            continue
        yield _signature(name, member), _first_sentence(member)
        for method, function in vars(member).items() if isinstance(member, type) else ():
            if not method.startswith("_") and inspect.isfunction(function):
                yield _signature(f"{name}.{method}", function, skip_self=True), _first_sentence(function)


def _defined(module: ModuleType) -> Iterator[tuple[str, str]]:
    """The same of the public functions and classes that the module defines."""
    names = [name for name, member in vars(module).items() if not name.startswith("_") and callable(member)
             and getattr(member, "__module__", None) == module.__name__]
    return _names(module, names)


def _signature(name: str, member: Any, skip_self: bool = False) -> str:
    """`name(x, axis=-1)`: the parameters and their defaults."""
    if not callable(member) or inspect.isclass(member) and _has_no_init(member):
        return name
    parameters = list(inspect.signature(member).parameters.values())[1 if skip_self else 0:]
    words, keywords = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keywords:
            words.append("*")
        keywords = keywords or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        words.append(star + p.name + ("" if p.default is p.empty else f"={_default(p.default)}"))
    return f"{name}({', '.join(words)})"


def _has_no_init(owner: type) -> bool:
    return not inspect.isfunction(inspect.getattr_static(owner, "__init__"))


def _default(value: Any) -> str:
    text = getattr(value, "__name__", None) or repr(value)
    return "…" if text.startswith("<") else text


def _first_sentence(member: Any) -> str:
    text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    for match in re.finditer(r"\.(?=\s|$)", text):
        sentence = text[:match.end()]
        if not sentence.endswith(_ABBREVIATIONS) and sentence.count("(") == sentence.count(")"):
            return sentence
    return text


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = ["| | |", "|---|---|", *(f"| `{name}` | {_cell(text)} |" for name, text in rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the op table

def _op_table(ops: Sequence[Op]) -> str:
    lines = ["| op | kind | types | what it computes | gradient |", "|---|---|---|---|---|"]
    for op in ops:
        attrs = [name if default is REQUIRED else f"{name}={_default(default)}"
                 for name, default in op.attrs.items()]
        words = ", ".join([*op.operands, *(["*"] if attrs else []), *attrs])
        cells = [f"`{op.name}({words})`", op.kind, _types(op), " ".join(op.doc.split()),
                 "; ".join(f"`{part}`" for part in _gradient(op)) or "–"]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _types(op: Op) -> str:
    """The kinds of element type that operands have in some sample."""
    names = [arg.dtype for sample in op.samples() for arg in sample.args]
    kinds = ["float" if name == "float" else _KINDS[DTYPES[name].kind] for name in names]
    return ", ".join(dict.fromkeys(kinds)) or "–"


def _gradient(op: Op) -> list[str]:
    """What the record's rule builds on its first sample, by operand: `x: g · cos(x)`."""
    sample = next((s for s in op.samples() if s.smooth), None)
    if op.gradient is None or sample is None:
        return []
    names: dict[Value, str] = {}
    b = Builder()
    types = [TensorType(F32 if arg.dtype == "float" else as_dtype(arg.dtype), arg.shape)
             for arg in sample.args]
    inputs = [_leaf(b, names, _operand_name(op, i), t) for i, t in enumerate(types)]
    node = b.node(op.name, inputs, sample.attrs)
    several = len(node.types) > 1
    for i, value in enumerate(node.results):
        names[value] = f"result{i}" if several else "result"
    cotangents = [_leaf(b, names, f"g{i}" if several else "g", t) if t.dtype.has_gradient else None
                  for i, t in enumerate(node.types)]
    found = op.gradient(b, node, cotangents)
    texts = [(names[v], _expression(c, names)) for v, c in zip(inputs, found) if c is not None]
    return [f"{name}: {text if len(text) <= _LONGEST else 'see its record'}" for name, text in texts]


def _operand_name(op: Op, i: int) -> str:
    rest = op.operands[-1]
    if rest.startswith("*") and i >= len(op.operands) - 1:
        return f"{rest[1:]}{i - len(op.operands) + 1}"
    return op.operands[i]


def _leaf(b: Builder, names: dict[Value, str], name: str, type: TensorType) -> Value:
    value = b.node("input", (), {"name": name, "dtype": type.dtype, "shape": type.shape}).result()
    names[value] = name
    return value


def _expression(value: Value, names: dict[Value, str], inner: bool = False) -> str:
    """The value as a formula of the named ones; `inner`: as an operand."""
    node = value.node
    if value in names:
        return names[value]
    if node.op == "constant":
        return f"{node.attrs['value']:.6g}"
    if node.op == "broadcast_to" and node.inputs[0].node.op == "constant":
        return _expression(node.inputs[0], names)
    if node.op == "neg":
        return f"-{_expression(node.inputs[0], names, True)}"
    if node.op in _INFIX:
        left, right = (_expression(v, names, True) for v in node.inputs)
        text = f"{left} {_INFIX[node.op]} {right}"
        return f"({text})" if inner else text
    return f"{node.op}({', '.join(_expression(v, names) for v in node.inputs)})"


if __name__ == "__main__":
    print(reference(), end="")
