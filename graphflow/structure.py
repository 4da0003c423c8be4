"""Nested tuples, lists and dicts of tensors: taken apart into a flat list, and put together again."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphflow.arguments import as_tensor
from graphflow.compiler.plan.errors import UseError
from graphflow.scope import here
from graphflow.tensor import Tensor


@dataclass(frozen=True)
class Structure:
    """The shape of a nest: `kind` is the container's type, or None for one tensor; `keys` are a dict's,
    sorted, or the positions. None as a value is a container without entries."""
    kind: Any
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def paths(self) -> list[str]:
        """Where each tensor lies, e.g. ``["state"][0]``; "" for a tensor that is no part of anything."""
        if self.kind is None:
            return [""]
        return [f"[{_key_text(key)}]{path}" for key, child in zip(self.keys, self.children)
                for path in child.paths]

    def __len__(self) -> int:
        return 1 if self.kind is None else sum(map(len, self.children))

    def build(self, leaves: Sequence[Any]) -> Any:
        """The nest with these in the places of its tensors."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(leaves)
        entries = [child._build(leaves) for child in self.children]
        if self.kind is type(None):
            return None
        if issubclass(self.kind, Mapping):
            return dict(zip(self.keys, entries))
        return self.kind(*entries) if hasattr(self.kind, "_fields") else self.kind(entries)

    def __str__(self) -> str:
        if self.kind is None:
            return "a tensor"
        inner = [str(c) for c in self.children]
        if self.kind is type(None):
            return "None"
        if issubclass(self.kind, Mapping):
            return "{" + ", ".join(f"{_key_text(k)}: {text}" for k, text in zip(self.keys, inner)) + "}"
        return f"{self.kind.__name__}({', '.join(inner)})"


def _key_text(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


_TENSOR = Structure(None)


def flatten(nest: Any, what: str) -> tuple[list[Tensor], Structure]:
    """The tensors of a nest of tuples, lists, dicts and None, in order (a dict's by its sorted keys), and its
    structure. Numbers and arrays become constants; UseError, which calls the nest `what`, for anything
    else."""
    if isinstance(nest, Tensor):
        return [nest], _TENSOR
    if nest is None:
        return [], Structure(type(None))
    keys: tuple[Any, ...]
    kind: type
    if isinstance(nest, Mapping):
        keys = tuple(sorted(nest, key=lambda k: (str(type(k)), k)))
        entries, kind = [nest[k] for k in keys], dict
    elif isinstance(nest, (tuple, list)):
        keys, entries, kind = tuple(range(len(nest))), list(nest), type(nest)
    else:
        try:
            return [as_tensor(nest)], _TENSOR
        except UseError:
            raise UseError(f"{what} holds {nest!r}", where=here(),
                           hint="use tensors, and tuples, lists and dicts of them") from None
    leaves: list[Tensor] = []
    children = []
    for entry in entries:
        more, child = flatten(entry, what)
        leaves += more
        children.append(child)
    return leaves, Structure(kind, keys, tuple(children))
