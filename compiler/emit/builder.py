"""A small builder of LLVM IR text.

A `Module` collects functions, declarations and constant data; `Module.function` returns a `Builder`,
whose methods append one instruction each and return a `Value` (a type and a name). Text is assembled
directly because an object per instruction costs more than everything else in the emitter together.

    module = Module()
    b = module.function("scale", [("x", PTR, "noalias"), ("n", I64)])
    x, n = b.params
    with b.loop(0, n, step=8) as loop:
        address = b.gep(x, loop.index, F32)
        b.store(b.mul(b.load(F32.vector(8), address), 2.0), address)
    b.ret()
    text = module.text()

Conventions. A scalar is a `Type` with one lane, and every arithmetic method takes scalars and vectors
alike. An operand may be a Python number (a constant of the other operand's type) or a scalar value beside
a vector (it is splatted). Booleans in registers are `I1`; in memory they are `I8`. No instruction carries
a fast-math flag: a multiply and an add become one fused operation only through `Builder.fma`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from graphflow.compiler.emit.values import (  # isort: skip
    F32, F64, FALSE, I1, I8, I16, I32, I64, MEMORY_TYPES, PTR, TRUE, VOID,
    Block, Line, Loop, Operand, Phi, Point, Type, Value, constant, flat, folded, vector_constant,
)

__all__ = [
    "F32", "F64", "FALSE", "I1", "I8", "I16", "I32", "I64", "MEMORY_TYPES", "PTR", "TRUE", "VOID",
    "Block", "Builder", "Loop", "Module", "Operand", "Phi", "Point", "Type", "Value", "constant",
    "vector_constant",
]


class Module:
    """One LLVM module: functions, the declarations they need, and constant data. `before`: for kernels, a
    function like theirs that must run before them, and the number of its tasks."""

    def __init__(self) -> None:
        self.before: dict[str, tuple[str, int]] = {}
        self._declarations: dict[str, str] = {}
        self._globals: list[str] = []
        self._functions: list[Builder] = []

    def function(
        self,
        name: str,
        params: Sequence[tuple[str, Type] | tuple[str, Type, str]],
        returns: Type = VOID,
        *,
        internal: bool = False,
        attributes: str = "nounwind",
    ) -> Builder:
        """Start a function. A parameter is (name, type) or (name, type, "noalias readonly" and the like)."""
        builder = Builder(self, name, params, returns, internal, attributes)
        self._functions.append(builder)
        return builder

    def declare(self, name: str, returns: Type, params: Sequence[str], attributes: str = "nounwind") -> None:
        """Declare an external function once; `params` are types as text, such as `i1 immarg`."""
        if name not in self._declarations:
            text = f"declare {returns} @{name}({', '.join(params)})"
            self._declarations[name] = f"{text} {attributes}".rstrip()

    def data(self, name: str, array: np.ndarray, align: int = 64) -> Value:
        """Add a constant array of bytes and return its address."""
        raw = np.ascontiguousarray(array).tobytes()
        text = "\\" + raw.hex("\\") if raw else ""
        self._globals.append(f'@{name} = internal constant [{len(raw)} x i8] c"{text}", align {align}')
        return Value(PTR, f"@{name}")

    def text(self) -> str:
        """The module as IR text."""
        functions = [function.text() for function in self._functions]
        return "\n".join([*self._globals, *self._declarations.values(), *functions, ""])


class Builder:
    """Appends instructions to one function, at the end of the current block."""

    def __init__(
        self,
        module: Module,
        name: str,
        params: Sequence[tuple[str, Type] | tuple[str, Type, str]],
        returns: Type,
        internal: bool,
        attributes: str,
    ) -> None:
        self.module = module
        self.fused = True                             # whether the processor multiplies and adds in one
        self.name = name
        self.returns = returns
        self.params: list[Value] = [Value(param[1], f"%{param[0]}") for param in params]
        listed = ", ".join(
            " ".join(filter(None, (str(param[1]), *param[2:], f"%{param[0]}"))) for param in params
        )
        linkage = "internal " if internal else ""
        self._head = f"define {linkage}{returns} @{name}({listed}) {attributes}".rstrip() + " {\nentry:"
        self._allocas: list[str] = []
        self._lines: list[Line] = []
        self._count = 0
        self.current = Block("entry")

    # -- text and names ------------------------------------------------------------------------------------

    def text(self) -> str:
        """The function as IR text."""
        return "\n".join([self._head, *self._allocas, *flat(self._lines), "}"])

    def point(self) -> Point:
        """Mark this place, so that `at` can add instructions here later on."""
        point = Point(self.current)
        self._lines.append(point.lines)
        return point

    @contextmanager
    def at(self, point: Point) -> Iterator[None]:
        """Instructions appended inside the `with` go to the point; new blocks begun there are followed."""
        saved = self._lines, self.current
        self._lines, self.current = point.lines, point.current
        yield
        point.current = self.current
        self._lines, self.current = saved

    def comment(self, text: str) -> None:
        """Write a comment line, such as where in the user's program the next instructions come from."""
        self._lines.append("  ; " + text.replace("\n", " "))

    def _fresh(self, prefix: str = "v") -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def _emit(self, type: Type, text: str) -> Value:
        name = "%" + self._fresh()
        self._lines.append(f"  {name} = {text}")
        return Value(type, name)

    def _match(self, *operands: Operand) -> list[Value]:
        """Bring numbers and scalars to the type of the widest value among `operands`."""
        values = [operand for operand in operands if isinstance(operand, Value)]
        if not values:
            raise TypeError("one operand at least must be a value")
        type = max((value.type for value in values), key=lambda candidate: candidate.lanes)
        matched = []
        for operand in operands:
            value = operand if isinstance(operand, Value) else constant(type, operand)
            if value.type != type and value.type.lanes == 1 and value.type.element == type.element:
                value = self.splat(value, type.lanes)
            if value.type != type:
                raise TypeError(f"operands of different types: {', '.join(map(str, operands))}")
            matched.append(value)
        return matched

    # -- arithmetic ----------------------------------------------------------------------------------------

    def _binary(self, integer: str, floating: str, x: Operand, y: Operand) -> Value:
        x, y = self._match(x, y)
        opcode = floating if x.type.is_float else integer
        if not opcode:
            raise TypeError(f"no such instruction for {x.type}")
        return folded(opcode, x, y) or self._emit(x.type, f"{opcode} {x.type} {x.name}, {y.name}")

    def add(self, x: Operand, y: Operand) -> Value:
        """x + y; integers wrap."""
        return self._binary("add", "fadd", x, y)

    def sub(self, x: Operand, y: Operand) -> Value:
        """x - y; integers wrap."""
        return self._binary("sub", "fsub", x, y)

    def mul(self, x: Operand, y: Operand) -> Value:
        """x · y; integers wrap."""
        return self._binary("mul", "fmul", x, y)

    def div(self, x: Operand, y: Operand) -> Value:
        """x / y for floats."""
        return self._binary("", "fdiv", x, y)

    def sdiv(self, x: Operand, y: Operand) -> Value:
        """x / y for signed integers, towards zero; undefined for y = 0."""
        return self._binary("sdiv", "", x, y)

    def udiv(self, x: Operand, y: Operand) -> Value:
        """x / y for unsigned integers; undefined for y = 0."""
        return self._binary("udiv", "", x, y)

    def srem(self, x: Operand, y: Operand) -> Value:
        """The remainder of `sdiv`, with the sign of x."""
        return self._binary("srem", "", x, y)

    def urem(self, x: Operand, y: Operand) -> Value:
        """The remainder of `udiv`."""
        return self._binary("urem", "", x, y)

    def and_(self, x: Operand, y: Operand) -> Value:
        """Bitwise and."""
        return self._binary("and", "", x, y)

    def or_(self, x: Operand, y: Operand) -> Value:
        """Bitwise or."""
        return self._binary("or", "", x, y)

    def xor(self, x: Operand, y: Operand) -> Value:
        """Bitwise exclusive or."""
        return self._binary("xor", "", x, y)

    def not_(self, x: Value) -> Value:
        """All bits of x inverted."""
        return self.xor(x, True if x.type.element == "i1" else -1)

    def shl(self, x: Operand, y: Operand) -> Value:
        """x shifted left by y < bits."""
        return self._binary("shl", "", x, y)

    def lshr(self, x: Operand, y: Operand) -> Value:
        """x shifted right by y < bits, zeros entering."""
        return self._binary("lshr", "", x, y)

    def ashr(self, x: Operand, y: Operand) -> Value:
        """x shifted right by y < bits, the sign entering."""
        return self._binary("ashr", "", x, y)

    def neg(self, x: Value) -> Value:
        """-x; for floats the sign bit flips, of zero and NaN too."""
        if x.type.is_float:
            return self._emit(x.type, f"fneg {x.type} {x.name}")
        return self.sub(constant(x.type, 0), x)

    def compare(self, predicate: str, x: Operand, y: Operand) -> Value:
        """Compare; the result is I1 per lane.

        `eq ne lt le gt ge` are the IEEE comparisons for floats (false with NaN, except ne) and signed for
        integers; any other LLVM predicate (`ult`, `uno` …) is passed on.
        """
        x, y = self._match(x, y)
        if predicate in ("eq", "ne", "lt", "le", "gt", "ge"):
            if x.type.is_float:
                predicate = "une" if predicate == "ne" else "o" + predicate
            elif predicate not in ("eq", "ne"):
                predicate = "s" + predicate
        opcode = "fcmp" if x.type.is_float else "icmp"
        return self._emit(x.type.like(I1), f"{opcode} {predicate} {x.type} {x.name}, {y.name}")

    def select(self, condition: Value, x: Operand, y: Operand) -> Value:
        """x where the condition holds, else y; a scalar condition may choose between vectors."""
        x, y = self._match(x, y)
        if condition.type.lanes > x.type.lanes:
            lanes = condition.type.lanes
            x, y = self.splat(x, lanes), self.splat(y, lanes)
        return self._emit(x.type, f"select {condition}, {x}, {y}")

    def fma(self, x: Operand, y: Operand, z: Operand) -> Value:
        """x · y + z with one rounding. Where the processor has no such instruction float32 goes by float64,
        in which the product is exact; float64 by the C library."""
        values = self._match(x, y, z)
        if self.fused or values[0].type.scalar != F32:
            return self.intrinsic("fma", *values)
        left, right, more = (self.cast(value, F64) for value in values)
        return self.cast(self.add(self.mul(left, right), more), F32)

    def intrinsic(self, name: str, *operands: Operand) -> Value:
        """An LLVM intrinsic whose operands and result have one type: `sqrt`, `fabs`, `smax`, `minimum` …"""
        values = self._match(*operands)
        type = values[0].type
        return self.call(f"llvm.{name}.{type.suffix}", type, values)

    # -- casts ---------------------------------------------------------------------------------------------

    def bitcast(self, x: Value, type: Type) -> Value:
        """The same bits as another type."""
        return self._emit(type, f"bitcast {x} to {type}")

    def cast(self, x: Value, element: Type, signed: bool = True) -> Value:
        """Convert the value of x to another element type, lanes kept.

        `signed` says how the integer side is read. Float to integer truncates, saturates, and takes NaN to
        0. To I1 means "is not zero".
        """
        source, target = x.type, x.type.like(element)
        if source == target:
            return x
        if target.element == "i1":
            return self.compare("ne", x, 0)
        if source.element == "i1":
            signed = False
        if source.is_float and target.is_float:
            return self._convert("fpext" if target.bits > source.bits else "fptrunc", x, element)
        if source.is_float:
            name = f"llvm.fpto{'s' if signed else 'u'}i.sat.{target.suffix}.{source.suffix}"
            return self.call(name, target, [x])
        if target.is_float:
            return self._convert("sitofp" if signed else "uitofp", x, element)
        if target.bits < source.bits:
            return self._convert("trunc", x, element)
        if target.bits == source.bits:
            return x
        return self._convert("sext" if signed else "zext", x, element)

    def _convert(self, opcode: str, x: Value, element: Type) -> Value:
        target = x.type.like(element)
        return self._emit(target, f"{opcode} {x} to {target}")

    # -- vectors -------------------------------------------------------------------------------------------

    def splat(self, x: Value, lanes: int) -> Value:
        """A vector with the scalar x in every lane."""
        if lanes == 1 or x.type.lanes == lanes:
            return x
        type = x.type.vector(lanes)
        if x.is_constant:
            return Value(type, f"splat ({x.type} {x.name})")
        first = self._emit(type, f"insertelement {type} poison, {x}, i64 0")
        return self._emit(type, f"shufflevector {type} {first.name}, {type} poison, "
                                f"<{lanes} x i32> zeroinitializer")

    def iota(self, type: Type, start: int = 0, step: int = 1) -> Value:
        """The constant start, start + step, … with one element per lane of `type`."""
        return vector_constant(type, [start + step * lane for lane in range(type.lanes)])

    def first_lanes(self, count: Value, lanes: int) -> Value:
        """The mask of the first `count` (an I64 of any size) of `lanes` lanes."""
        bounded = self.intrinsic("smin", self.intrinsic("smax", count, 0), lanes)
        narrow = self.splat(self.cast(bounded, I32), lanes)
        return self.compare("lt", self.iota(I32.vector(lanes)), narrow)

    def extract(self, x: Value, lane: int) -> Value:
        """One lane of x as a scalar."""
        if x.type.lanes == 1:
            return x
        return self._emit(x.type.scalar, f"extractelement {x}, i64 {lane}")

    def insert(self, x: Value, scalar: Value, lane: int) -> Value:
        """x with one lane replaced."""
        if x.type.lanes == 1:
            return scalar
        return self._emit(x.type, f"insertelement {x}, {scalar}, i64 {lane}")

    def shuffle(self, x: Value, y: Value | None, lanes: Sequence[int]) -> Value:
        """The given lanes of x followed by y (-1: any value)."""
        if len(lanes) == 1:
            return self.extract(x, lanes[0])
        second = "poison" if y is None else y.name
        mask = ", ".join("i32 poison" if lane < 0 else f"i32 {lane}" for lane in lanes)
        text = f"shufflevector {x}, {x.type} {second}, <{len(lanes)} x i32> <{mask}>"
        return self._emit(x.type.vector(len(lanes)), text)

    def slice(self, x: Value, start: int, count: int) -> Value:
        """`count` neighbouring lanes of x from lane `start`."""
        return self.shuffle(x, None, range(start, start + count))

    def reduce(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """Combine all lanes into a scalar by a fixed tree: lower half with upper half until one is left.

        The number of lanes must be a power of two.
        """
        while x.type.lanes > 1:
            half, odd = divmod(x.type.lanes, 2)
            if odd:
                raise TypeError(f"cannot halve {x.type}")
            x = combine(self.slice(x, 0, half), self.slice(x, half, half))
        return x

    def any(self, mask: Value) -> Value:
        """Whether some lane of a mask is set."""
        if mask.type.lanes == 1:
            return mask
        whole = Type(f"i{mask.type.lanes}")
        return self.compare("ne", self.bitcast(mask, whole), 0)

    def each_lane(self, function: Callable[..., Value], *vectors: Value) -> Value:
        """Apply a function of scalars to every lane; a scalar among the vectors is the same in every lane."""
        lanes = max(vector.type.lanes for vector in vectors)
        if lanes == 1:
            return function(*vectors)
        result: Value | None = None
        for lane in range(lanes):
            scalar = function(*(v if v.type.lanes == 1 else self.extract(v, lane) for v in vectors))
            result = self.insert(result or Value(scalar.type.vector(lanes), "poison"), scalar, lane)
        assert result is not None
        return result

    # -- memory --------------------------------------------------------------------------------------------

    def alloca(self, type: Type, count: int = 1, align: int | None = None) -> Value:
        """Stack room for `count` values of `type`, taken once when the function starts."""
        name = "%" + self._fresh("stack")
        aligned = f", align {align}" if align else ""
        self._allocas.append(f"  {name} = alloca {type}, i64 {count}{aligned}")
        return Value(PTR, name)

    def gep(self, pointer: Value, index: Operand, element: Type) -> Value:
        """The address `index` elements after `pointer`; a vector of indices gives a vector of addresses."""
        if not isinstance(index, Value):
            index = constant(I64, index)
        type = PTR.vector(index.type.lanes)
        return self._emit(type, f"getelementptr {element}, {pointer}, {index}")

    def load(self, type: Type, pointer: Value, align: int | None = None) -> Value:
        """Load from consecutive elements; `align` defaults to that of one element."""
        return self._emit(type, f"load {type}, {pointer}, align {align or type.bytes}")

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        """Store to consecutive elements; `align` defaults to that of one element."""
        self._lines.append(f"  store {value}, {pointer}, align {align or value.type.bytes}")

    def masked_load(
        self, type: Type, pointer: Value, mask: Value, otherwise: Operand = 0, align: int | None = None
    ) -> Value:
        """Load the lanes whose mask is set, touching no memory for the others, which get `otherwise`."""
        other = self._lanes_of(otherwise, type)
        name = f"llvm.masked.load.{self._vector_suffix(type)}.p0"
        return self._masked_call(name, type, [pointer, align or type.bytes, mask, other])

    def masked_store(self, value: Value, pointer: Value, mask: Value, align: int | None = None) -> None:
        """Store the lanes whose mask is set, touching no memory for the others."""
        name = f"llvm.masked.store.{self._vector_suffix(value.type)}.p0"
        self._masked_call(name, VOID, [value, pointer, align or value.type.bytes, mask])

    def gather(
        self, type: Type, addresses: Value, mask: Value | None = None, otherwise: Operand = 0
    ) -> Value:
        """Load each lane from its own address (see `gep`); lanes that are not set get `otherwise`."""
        if mask is None:
            if type.lanes == 1:
                return self.load(type, addresses)
            mask = constant(type.like(I1), True)
        other = self._lanes_of(otherwise, type)
        suffix = self._vector_suffix(type)
        name = f"llvm.masked.gather.{suffix}.v{type.lanes}p0"
        return self._masked_call(name, type, [addresses, type.bytes, mask, other])

    def scatter(self, value: Value, addresses: Value, mask: Value | None = None) -> None:
        """Store each lane to its own address, lane 0 first: of equal addresses the last lane wins."""
        if mask is None:
            if value.type.lanes == 1:
                return self.store(value, addresses)
            mask = constant(value.type.like(I1), True)
        suffix = self._vector_suffix(value.type)
        name = f"llvm.masked.scatter.{suffix}.v{value.type.lanes}p0"
        self._masked_call(name, VOID, [value, addresses, value.type.bytes, mask])

    def _lanes_of(self, operand: Operand, type: Type) -> Value:
        if not isinstance(operand, Value):
            return constant(type, operand)
        return self.splat(operand, type.lanes)

    @staticmethod
    def _vector_suffix(type: Type) -> str:
        return type.suffix if type.lanes > 1 else "v1" + type.suffix

    def _masked_call(self, name: str, returns: Type, operands: list[Value | int]) -> Value:
        """Call a masked memory intrinsic; these demand vectors, so scalars travel as one lane."""
        gathers = "gather" in name or "scatter" in name
        texts, types = [], []
        for operand in operands:
            if isinstance(operand, int):
                texts.append(f"i32 {operand}")
                types.append("i32 immarg")
            elif operand.type.lanes == 1 and (operand.type != PTR or gathers):
                one = f"<1 x {operand.type.element}>"
                lane = self._emit(operand.type, f"insertelement {one} poison, {operand}, i64 0")
                texts.append(f"{one} {lane.name}")
                types.append(one)
            else:
                texts.append(str(operand))
                types.append(str(operand.type))
        result = str(returns) if returns == VOID or returns.lanes > 1 else f"<1 x {returns.element}>"
        if name not in self.module._declarations:
            self.module._declarations[name] = f"declare {result} @{name}({', '.join(types)})"
        text = f"call {result} @{name}({', '.join(texts)})"
        if returns == VOID:
            self._lines.append("  " + text)
            return Value(VOID, "")
        called = self._emit(returns, text)
        if returns.lanes > 1:
            return called
        return self._emit(returns, f"extractelement {result} {called.name}, i64 0")

    # -- calls and control ---------------------------------------------------------------------------------

    def call(
        self, name: str, returns: Type, operands: Sequence[Value], declare: bool = True, attributes: str = ""
    ) -> Value:
        """Call a function, declaring it unless `declare` is false (a function that this module defines)."""
        if declare:
            intrinsic = name.startswith("llvm.")
            self.module.declare(name, returns, [str(operand.type) for operand in operands],
                                "" if intrinsic else "nounwind")
        return self._call(f"@{name}", returns, operands, attributes)

    def call_address(self, address: Value, returns: Type, operands: Sequence[Value]) -> Value:
        """Call the function at an address."""
        return self._call(address.name, returns, operands, "")

    def _call(self, callee: str, returns: Type, operands: Sequence[Value], attributes: str) -> Value:
        text = f"call {returns} {callee}({', '.join(map(str, operands))}) {attributes}".rstrip()
        if returns == VOID:
            self._lines.append("  " + text)
            return Value(VOID, "")
        return self._emit(returns, text)

    def ret(self, value: Value | None = None) -> None:
        """Return from the function."""
        self._lines.append("  ret void" if value is None else f"  ret {value}")

    def block(self, hint: str = "block") -> Block:
        """A new label, to be placed once."""
        return Block(self._fresh(hint + "_"))

    def place(self, block: Block) -> None:
        """Start the block here; the block before must have ended in a branch or a return."""
        self._lines.append(f"{block}:")
        self.current = block

    def branch(self, block: Block) -> None:
        """Go to a block."""
        self._lines.append(f"  br label %{block}")

    def branch_if(self, condition: Value, then: Block, otherwise: Block, weight: int = 0) -> None:
        """Go to one of two blocks; to the first so many times as often, if `weight` is not 0."""
        told = f', !prof !{{!"branch_weights", i32 {weight}, i32 1}}' if weight else ""
        self._lines.append(f"  br {condition}, label %{then}, label %{otherwise}{told}")

    def phi(self, type: Type, *incoming: tuple[Value, Block]) -> Phi:
        """A phi node; it must stand before the block's other instructions."""
        node = Phi(type, "%" + self._fresh())
        for value, block in incoming:
            node.add(value, block)
        self._lines.append(node)
        return node

    @contextmanager
    def loop(
        self, start: Operand, stop: Operand, step: Operand = 1,
        carry: Sequence[Value] = (), hint: str = "loop",
    ) -> Iterator[Loop]:
        """A loop over I64 start, start + step, … below stop, zero trips included; step is positive.

        `carry` gives the first values of the carried variables: read `loop.carry`, call `loop.next(…)` once
        in the body, and read `loop.results` after the `with` block.
        """
        certain = isinstance(start, int) and isinstance(stop, int) and start < stop
        first = start if isinstance(start, Value) else constant(I64, start)
        last = stop if isinstance(stop, Value) else constant(I64, stop)
        body, done, before = self.block(hint), self.block(hint + "_end"), self.current
        if certain:
            self.branch(body)
        else:
            self.branch_if(self.compare("lt", first, last), body, done)
        self.place(body)
        index = self.phi(I64, (first, before))
        carried = [self.phi(value.type, (value, before)) for value in carry]
        loop = Loop(index, carried)
        yield loop
        if len(loop.following) != len(carried):
            raise TypeError(f"loop carries {len(carried)} values, next() was given {len(loop.following)}")
        following = self.add(index, step)
        latch = self.current
        self.branch_if(self.compare("lt", following, last), body, done)
        index.add(following, latch)
        for node, value in zip(carried, loop.following):
            node.add(value, latch)
        self.place(done)
        if certain:
            loop.results = list(loop.following)
        else:
            loop.results = [self.phi(value.type, (value, before), (new, latch))
                            for value, new in zip(carry, loop.following)]

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Instructions that run only if the scalar condition holds."""
        then, done = self.block("then"), self.block("end")
        self.branch_if(condition, then, done)
        self.place(then)
        yield
        self.branch(done)
        self.place(done)

    def choose(self, condition: Value, then: Callable[[], Value], otherwise: Callable[[], Value]) -> Value:
        """The value of one of two pieces of code, of which only the chosen one runs."""
        blocks = self.block("then"), self.block("else")
        done = self.block("end")
        self.branch_if(condition, *blocks)
        incoming = []
        for block, code in zip(blocks, (then, otherwise)):
            self.place(block)
            value = code()
            incoming.append((value, self.current))
            self.branch(done)
        self.place(done)
        return self.phi(incoming[0][0].type, *incoming)
