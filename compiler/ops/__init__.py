"""The op table: every op of the language, by name. Each file of this folder holds one family of records."""
from __future__ import annotations

from graphflow.compiler.ops import (  # noqa: I001
                                    contract,
                                    control,
                                    elementwise,
                                    indexing,
                                    leaf,
                                    random,
                                    reduce,
                                    routine,
                                    shape,
                                    unfold,
                                    window,
)
from graphflow.compiler.ops.record import Op

FAMILIES = (leaf, elementwise, reduce, shape, contract, window, unfold, indexing, routine, random, control)
OPS: dict[str, Op] = {op.name: op for family in FAMILIES for op in family.OPS}
