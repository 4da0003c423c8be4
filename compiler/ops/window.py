"""Op records."""
from __future__ import annotations

from graphflow.compiler.ops.record import Op

OPS: tuple[Op, ...] = ()
