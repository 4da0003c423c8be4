"""Embeddings: a vector for each of a finite number of things."""
from __future__ import annotations

from typing import Any

from graphflow import init
from graphflow.compiler.plan.errors import UseError
from graphflow.indexing import take
from graphflow.nn.geometry import check_count
from graphflow.nn.parameters import layer_parameter
from graphflow.scope import here
from graphflow.shapes import expand_dims
from graphflow.state import Naming
from graphflow.tensor import Tensor, element_type, elementwise

_standard_normal = init.normal(1.0)


def embedding(indices: Tensor, count: int, size: int, *, padding_index: int | None = None,
              weight_init: Any = _standard_normal, dtype: Any = "float32", name: str | None = None) -> Tensor:
    """The rows of a table that the integers name. indices: [...] in 0..count-1, which every call checks;
    result: [..., size].

    The table is the parameter ``NAME.W``: [count, size]; weight_init may be a Tensor of that shape, for
    instance to share it with the layer that predicts words. padding_index: one index whose vector is 0 and
    stays so.
    """
    check_count("embedding", "count", count)
    check_count("embedding", "size", size)
    table = layer_parameter(Naming.of(name, "embedding"), "W", (count, size), weight_init,
                            weight_init.dtype if isinstance(weight_init, Tensor) else element_type(dtype))
    out = take(table, indices)
    if padding_index is None:
        return out
    if not isinstance(padding_index, int) or not 0 <= padding_index < count:
        raise UseError(f"padding_index is {padding_index!r}", op="embedding", shapes=[indices.shape],
                       where=here(), hint=f"use an integer in 0..{count - 1}")
    return elementwise("where", expand_dims(indices, -1) == padding_index, 0.0, out)
