"""`argsort`: the order of a row, by merging.

Elements become unsigned integers of the same order, so one comparison serves all types. Up to 32 bits the
element and its position share a 64-bit word, whose order is then the stable one (rows are shorter than
2**32); 64-bit elements carry the position in a second array. Blocks of 16 are ordered by counting, for each
element, those that come before it; runs are then merged two by two, always the smaller of the two first
elements, the left one if they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from graphflow.compiler.emit.builder import (
    F64,
    FALSE,
    I1,
    I32,
    I64,
    Builder,
    Value,
    constant,
    vector_constant,
)
from graphflow.compiler.emit.cost import trips
from graphflow.compiler.emit.function import Function, Work
from graphflow.compiler.kernel.form import RoutineKernel
from graphflow.compiler.plan.dims import DimLike, ceildiv
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.target import Target

BLOCK = 16
"""Elements that are ordered by counting."""
LANES = 8
"""Elements turned into words together."""


def sort_work(kernel: RoutineKernel, target: Target) -> Work:
    """The work of `argsort`: its rows are those of the array."""
    before, size, behind = kernel.arguments[0].shape
    length = trips(size)
    row_ns = length * (3 + 2.5 * max(0.0, math.log2(max(length, 1) / BLOCK)))
    arrays = 2 * _columns(kernel.arguments[0].dtype)
    return Work(before * behind, row_ns, lambda f, row: _Sort(f, row).run(), arrays * 8 * _room(size))


def _columns(dtype: DType) -> int:
    """How many 64-bit words an element takes: one with its position in it, or one for each."""
    return 1 if dtype.bytes <= 4 else 2


def _room(size: DimLike) -> DimLike:
    """Words of an array in scratch: whole blocks, and one more, which merging may look at."""
    return ceildiv(size, BLOCK) * BLOCK + BLOCK


class _Sort:
    def __init__(self, f: Function, row: Value):
        self.f, self.b = f, f.b
        b = f.b
        self.columns = _columns(f.dtypes["x"])
        self.size: DimLike = f.shapes["x"][1]
        self.count, self.room = f.dim(self.size), f.dim(_room(self.size))
        behind = f.extent("x", 2)
        o = b.udiv(row, behind)
        i = b.sub(row, b.mul(o, behind))
        self.source, self.result = (f.address(name, o, f.dim(0), i) for name in ("x", "y"))
        self.first = f.scratch
        self.second = b.gep(f.scratch, b.mul(self.room, self.columns), I64)

    def run(self) -> None:
        """The whole row."""
        b = self.b
        self.sweep(self.enter)
        with b.loop(self.count, b.and_(b.add(self.count, BLOCK - 1), -BLOCK)) as rest:
            rest.next()
            for address in self.at(self.first, rest.index):
                b.store(constant(I64, -1), address)
        with b.loop(0, self.count, BLOCK) as block:
            block.next()
            self.order_block(block.index)
        done = self.merge()
        self.sweep(lambda index, lanes: self.leave(done, index, lanes))

    def sweep(self, body: Callable[[Value, int], None]) -> None:
        """Runs body(index, lanes) over the row: for vectors where its elements are neighbours."""
        b = self.b
        lanes = LANES if self.f.shapes["x"][2] == 1 else 1
        full = b.and_(self.count, -lanes)
        with b.loop(0, full, lanes) as loop:
            loop.next()
            body(loop.index, lanes)
        if lanes > 1:
            with b.loop(full, self.count) as loop:
                loop.next()
                body(loop.index, 1)

    def at(self, base: Value, index: Value) -> list[Value]:
        """The addresses of an element's words."""
        b = self.b
        arrays = [base if c == 0 else b.gep(base, self.room, I64) for c in range(self.columns)]
        return [b.gep(a, index, I64) for a in arrays]

    def load(self, base: Value, index: Value, lanes: int = 1) -> list[Value]:
        return [self.b.load(I64.vector(lanes), address) for address in self.at(base, index)]

    def enter(self, index: Value, lanes: int) -> None:
        """Turns elements into words."""
        b, f = self.b, self.f
        type = f.type("x")
        x = b.load(type.vector(lanes), b.gep(self.source, b.mul(index, f.extent("x", 2)), type))
        key = sort_key(b, x, f.dtypes["x"])
        key = b.not_(key) if f.kernel.attrs["descending"] else key
        number = index if lanes == 1 else b.add(b.splat(index, lanes), b.iota(I64.vector(lanes)))
        words = [key, number]
        if self.columns == 1:
            words = [b.or_(b.shl(b.cast(key, I64, signed=False), 32), number)]
        for word, address in zip(words, self.at(self.first, index)):
            b.store(word, address)

    def leave(self, base: Value, index: Value, lanes: int) -> None:
        """Writes positions."""
        b, f = self.b, self.f
        word = self.load(base, index, lanes)[-1]
        word = b.and_(word, 0xFFFFFFFF) if self.columns == 1 else word
        b.store(word, b.gep(self.result, b.mul(index, f.extent("y", 2)), I64))

    def order_block(self, start: Value) -> None:
        """Orders the block at `start`, from the first array to the second."""
        b = self.b
        block = self.load(self.first, start, BLOCK)
        rank = constant(I32.vector(BLOCK), 0)
        for j in range(min(BLOCK, self.size) if isinstance(self.size, int) else BLOCK):
            key = b.splat(self.load(self.first, b.add(start, j))[0], BLOCK)
            ahead = b.compare("ult", key, block[0])
            if self.columns > 1:                           # of equal ones the earlier comes first
                later = vector_constant(I1.vector(BLOCK), [lane > j for lane in range(BLOCK)])
                ahead = b.or_(ahead, b.and_(b.compare("eq", key, block[0]), later))
            rank = b.add(rank, b.cast(ahead, I32))
        place = b.add(b.splat(start, BLOCK), b.cast(rank, I64))
        arrays = [self.second if c == 0 else b.gep(self.second, self.room, I64) for c in range(self.columns)]
        for word, array in zip(block, arrays):
            b.scatter(word, b.gep(array, place, I64))

    def merge(self) -> Value:
        """Merges runs until one is left; the array in which it is."""
        b = self.b
        if isinstance(self.size, int) and self.size <= BLOCK:
            return self.second
        runs = b.lshr(b.add(self.count, BLOCK - 1), BLOCK.bit_length() - 1)
        passes = b.sub(64, _leading_zeros(b, b.sub(b.intrinsic("smax", runs, 1), 1)))
        carry = [self.second, self.first, constant(I64, BLOCK)]
        with b.loop(0, passes, carry=carry) as turn:
            source, target, width = turn.carry
            with b.loop(0, self.count, b.shl(width, 1)) as pair:
                pair.next()
                self.merge_pair(source, target, pair.index, width)
            turn.next(target, source, b.shl(width, 1))
        return turn.results[0]

    def merge_pair(self, source: Value, target: Value, low: Value, width: Value) -> None:
        """The runs [low, low + width) and [low + width, low + 2 width), as far as they are there."""
        b = self.b
        middle = b.intrinsic("smin", b.add(low, width), self.count)
        high = b.intrinsic("smin", b.add(middle, width), self.count)
        with b.loop(low, high, carry=[low]) as out:
            (i,) = out.carry
            j = b.sub(b.add(out.index, middle), i)
            left, right = self.load(source, i), self.load(source, j)
            takes = b.or_(b.compare("ge", j, high), b.compare("ule", left[0], right[0]))
            takes = b.and_(b.compare("lt", i, middle), takes)
            for x, y, address in zip(left, right, self.at(target, out.index)):
                b.store(b.select(takes, x, y), address)
            out.next(b.add(i, b.cast(takes, I64)))


def sort_key(b: Builder, x: Value, dtype: DType) -> Value:
    """x as unsigned integers of the same width and order; NaN becomes the greatest, -0.0 is 0.0."""
    top = -1 << (x.type.bits - 1)
    if dtype.kind == "u":
        return x
    if dtype.kind == "i":
        return b.xor(x, top)
    bits = b.bitcast(b.add(x, 0.0), x.type.like(I64 if x.type.scalar == F64 else I32))
    key = b.xor(bits, b.or_(b.ashr(bits, x.type.bits - 1), top))
    return b.select(b.compare("uno", x, x), constant(key.type, -1), key)


def _leading_zeros(b: Builder, x: Value) -> Value:
    b.module.declare("llvm.ctlz.i64", I64, ["i64", "i1 immarg"], "")
    return b.call("llvm.ctlz.i64", I64, [x, FALSE], declare=False)
