"""What the emitters of contractions by special algorithms share: scratch in named pieces, products of
vectors, and the kernel's stores behind finished sums."""

from __future__ import annotations

from collections.abc import Mapping

from graphflow.compiler.emit.builder import I64, MEMORY_TYPES, Module, Type, Value, constant
from graphflow.compiler.emit.loops import start_function
from graphflow.compiler.emit.packing import transpose
from graphflow.compiler.emit.tiling import whole_lines
from graphflow.compiler.kernel.form import Argument, ContractionKernel
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, substitute, symbol
from graphflow.compiler.target import Target

ZERO = constant(I64, 0)
FLOAT = MEMORY_TYPES["f32"]


def padded(sizes: Mapping[str, int], lanes: int) -> dict[str, int]:
    """Pieces of scratch in elements, each with room for a vector behind it, in whole lines."""
    return {name: whole_lines(4 * (size + lanes)) // 4 for name, size in sizes.items()}


class AlgorithmEmitter:
    """Emits one function of an algorithm with vectors of `lanes`: its scratch, products and stores."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, lanes: int):
        self.kernel, self.c = kernel, kernel.contraction
        self.e = e = start_function(module, kernel, target)
        self.b = e.b
        self.type: Type = FLOAT.vector(lanes)
        for var, extent in (*self.c.batch, *self.c.m, *self.c.n, *self.c.k):
            e.bounds[var] = (0, extent - 1 if isinstance(extent, int) else None)

    def scratch(self, own: Mapping[str, int], shared: Mapping[str, int]) -> None:
        """Makes the pieces of scratch arguments: those that all workers share, then the worker's own."""
        e, b = self.e, self.b
        slot = len(self.kernel.arguments) + len(self.kernel.symbols)
        at = b.load(Type("ptr"), b.gep(b.params[0], slot, I64))
        for name, size in shared.items():
            e.add_argument(Argument(name, dtypes.F32, (size,), "rw"), at)
            at = b.gep(at, size, FLOAT)
        at = b.gep(at, b.mul(b.params[3], sum(own.values())), FLOAT)
        for name, size in own.items():
            e.add_argument(Argument(name, dtypes.F32, (size,), "rw"), at)
            at = b.gep(at, size, FLOAT)

    def put(self, value: Value, address: Value) -> None:
        """Stores the valid lanes of a vector."""
        lane = self.e.scopes.lane
        if lane is None or lane.mask is None:
            self.b.store(value, address, align=4)
        else:
            self.b.masked_store(value, address, lane.mask, align=4)

    def multiply(self, left: Value, right: Value, total: Value) -> Value:
        """total + left * right, the left a scalar or a vector."""
        b, left = self.b, self.b.splat(left, right.type.lanes)
        return b.fma(left, right, total) if self.e.target.has_fma else b.add(b.mul(left, right), total)

    def store_turned(self, at: DimLike, step: int, out: str, first: Value, values: Mapping[str, DimLike]
                     ) -> None:
        """The stores of as many vectors of finished sums as one has lanes, turned round. They lie in
        "sums ", from element `at` on, `step` apart; lane i is value `first` + i of the variable `out`, and
        "m start" is `first`."""
        e, b, lanes = self.e, self.b, self.type.lanes
        vectors = [b.load(self.type, e.address("sums ", at + i * step), align=4 * lanes)
                   for i in range(lanes)]
        for i, vector in enumerate(transpose(e, vectors)):
            b.store(vector, e.address("block ", i * lanes), align=4 * lanes)
        with e.scopes.loop(out, first, b.add(first, lanes)) as row:
            row.next()
            place = e.address("block ", (symbol(out) - symbol("m start")) * lanes)
            self.store(b.load(self.type, place, align=4 * lanes), values)

    def store(self, total: Value, values: Mapping[str, DimLike]) -> None:
        """The kernel's stores of a vector of finished sums; `values` stand for variables of the axes."""
        e = self.e
        name = f"acc {total.name}"
        e.scopes.bind(name, total)
        e.nodes.bind("acc", e.nodes.given(name, dtypes.F32))
        for let in self.c.lets:
            (node,) = e.nodes.lets((let,))
            e.value(e.nodes.substitute(node, values))
        for s in self.c.stores:
            value = e.value(e.nodes.substitute(e.nodes.of(s.value), values))
            e.store_value(s.arg, tuple(substitute(d, values) for d in s.index), value)
