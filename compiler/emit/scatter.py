"""Scatters of whole slices: `scatter_add` and `scatter_set`.

A row of the work owns a block of neighbouring slices of the result: it fills them, then goes through all
indices in their order and takes up those that point into its block. So there are no atomics, and every
element sees its updates in the order of the indices, however many threads there are. Blocks are few, because
each looks at all indices; it does so for a vector of them at once.
"""

from __future__ import annotations

from graphflow.compiler.emit.builder import FALSE, I8, I32, I64, VOID, Builder, Type, Value, constant
from graphflow.compiler.emit.cost import TASK_NS, trips
from graphflow.compiler.emit.function import Function, Work, lanes_along
from graphflow.compiler.emit.math import scalar
from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike, ceildiv
from graphflow.compiler.target import Target

MAX_BLOCKS = 16
"""Blocks into which the slices are cut at most."""
SCAN = 16
"""Indices looked at together, at most."""
UNROLL = 8
"""Slices of at most this many vectors are added by straight code."""


def scatter_work(kernel: RoutineKernel, target: Target) -> Work:
    """The work of either scatter."""
    before, size, behind = kernel.arguments[-1].shape
    count = kernel.arguments[-2].shape[1]
    slices, updates, width = trips(size), trips(count), trips(behind)
    row_ns = slices * width * 0.05 + updates * (1 + width * 0.1)
    wanted = int(trips(before) * row_ns / TASK_NS) // max(trips(before), 1)
    blocks = max(1, min(MAX_BLOCKS, slices, wanted))
    each = ceildiv(size, blocks)

    def block(f: Function, row: Value) -> None:
        b = f.b
        o = b.udiv(row, blocks) if blocks > 1 else row
        low = b.mul(b.urem(row, blocks), f.dim(each)) if blocks > 1 else f.dim(0)
        high = b.intrinsic("smin", b.add(low, f.dim(each)), f.dim(size))
        with b.when(b.compare("lt", low, high)):
            _fill(f, o, low, high)
            _Scan(f, target, o, low, high).run(blocks > 1)

    return Work(before * blocks, row_ns / blocks, block)


def _fill(f: Function, o: Value, low: Value, high: Value) -> None:
    """The slices as they are before any update: zeros, or those of x."""
    b, zero = f.b, f.dim(0)
    bytes = b.mul(b.mul(b.sub(high, low), f.extent("y", 2)), f.type("y").bytes)
    target = f.address("y", o, low, zero)
    if "x" in f.shapes:
        b.module.declare("llvm.memmove.p0.p0.i64", VOID, ["ptr", "ptr", "i64", "i1 immarg"], "")
        given = [target, f.address("x", o, low, zero), bytes, FALSE]
        b.call("llvm.memmove.p0.p0.i64", VOID, given, declare=False)
    else:
        b.module.declare("llvm.memset.p0.i64", VOID, ["ptr", "i8", "i64", "i1 immarg"], "")
        b.call("llvm.memset.p0.i64", VOID, [target, constant(I8, 0), bytes, FALSE], declare=False)


class _Scan:
    """Goes through the indices, and takes up the updates of the slices [low, high)."""

    def __init__(self, f: Function, target: Target, o: Value, low: Value, high: Value):
        self.f, self.b, self.target = f, f.b, target
        self.o, self.low, self.high = o, low, high
        self.signed = f.dtypes["indices"].kind == "i"
        self.source, self.result = (f.address(name, o, f.dim(0), f.dim(0)) for name in ("updates", "y"))

    def run(self, some: bool) -> None:
        """`some`: most indices point elsewhere, so whole vectors of them are looked at first."""
        b, count = self.b, self.f.extent("indices", 0)
        done: Value = constant(I64, 0)
        if some:
            lanes = min(SCAN, self.target.vector_bytes // 4)
            done = b.and_(count, -lanes)
            with b.loop(0, done, lanes) as group:
                group.next()
                self.group(group.index, lanes)
        with b.loop(done, count) as one:
            one.next()
            at = b.cast(self.index(one.index, 1), I64, self.signed)
            with b.when(b.compare("ult", b.sub(at, self.low), b.sub(self.high, self.low))):
                self.slice(one.index, at)

    def index(self, k: Value, lanes: int) -> Value:
        type = self.f.type("indices")
        return self.b.load(type.vector(lanes), self.b.gep(self.f.pointers["indices"], k, type))

    def group(self, first: Value, lanes: int) -> None:
        """The indices [first, first + lanes): those in the block, one after another."""
        b = self.b
        wide = I64 if self.f.type("indices") == I64 else I32
        at = b.cast(self.index(first, lanes), wide, self.signed)
        low, size = b.cast(self.low, wide), b.cast(b.sub(self.high, self.low), wide)
        inside = b.compare("ult", b.sub(at, low), size)
        bits = b.cast(b.bitcast(inside, Type(f"i{lanes}")), I64, signed=False)
        with b.loop(0, b.intrinsic("ctpop", bits), carry=[bits]) as each:
            (left,) = each.carry
            k = b.add(first, _lowest_bit(b, left))
            self.slice(k, b.cast(self.index(k, 1), I64, self.signed))
            each.next(b.and_(left, b.sub(left, 1)))

    def slice(self, k: Value, at: Value) -> None:
        """Adds update k to slice `at`, or puts it there."""
        f, b = self.f, self.b
        behind = f.shapes["y"][2]
        lanes = lanes_along(behind, f.dtypes["y"], self.target)
        source = b.gep(self.source, b.mul(k, f.extent("y", 2)), f.type("y"))
        result = b.gep(self.result, b.mul(at, f.extent("y", 2)), f.type("y"))
        full, rest = _whole(behind, lanes)
        if isinstance(full, int) and full <= UNROLL * lanes:
            for start in range(0, full, lanes):
                self.vector(source, result, constant(I64, start), lanes, None)
        else:
            with b.loop(0, f.dim(full), lanes) as part:
                part.next()
                self.vector(source, result, part.index, lanes, None)
        if rest != 0:
            left = f.dim(rest)
            with b.when(b.compare("gt", left, 0)):
                self.vector(source, result, f.dim(full), lanes, b.first_lanes(left, lanes))

    def vector(self, source: Value, result: Value, start: Value, lanes: int, mask: Value | None) -> None:
        f, b = self.f, self.b
        type = f.type("y").vector(lanes)
        source, result = b.gep(source, start, f.type("y")), b.gep(result, start, f.type("y"))

        def load(address: Value) -> Value:
            return b.load(type, address) if mask is None else b.masked_load(type, address, mask)

        value = load(source)
        if "x" not in f.shapes:
            value = scalar(b, "add", f.dtypes["y"], load(result), value)
        if mask is None:
            b.store(value, result)
        else:
            b.masked_store(value, result, mask)


def _whole(extent: DimLike, lanes: int) -> tuple[DimLike, DimLike]:
    """(elements in full vectors, elements behind them)."""
    rest = extent % lanes
    return extent - rest, rest


def _lowest_bit(b: Builder, bits: Value) -> Value:
    """The number of the lowest bit that is set."""
    b.module.declare("llvm.cttz.i64", I64, ["i64", "i1 immarg"], "")
    return b.call("llvm.cttz.i64", I64, [bits, FALSE], declare=False)
