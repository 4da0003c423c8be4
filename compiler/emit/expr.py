"""Kernel expressions as instructions: scalars where all lanes agree, else vectors.

Every load is safe wherever its code is put: under guards it touches memory only where they hold, either by
a mask or, where the guards are the same for all lanes, by reading zeros from a safe place instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphflow.compiler.emit.builder import (
    I1,
    I32,
    MEMORY_TYPES,
    PTR,
    VOID,
    Builder,
    Module,
    Type,
    Value,
    constant,
    vector_constant,
)
from graphflow.compiler.emit.indices import Guards, Indices, Spread
from graphflow.compiler.emit.math import convert, scalar
from graphflow.compiler.emit.nodes import Names, Node, Nodes, names_in
from graphflow.compiler.emit.scopes import Scopes
from graphflow.compiler.kernel.form import Argument, Store
from graphflow.compiler.plan.dims import DimLike, bounds_of
from graphflow.compiler.plan.dtypes import I64, DType
from graphflow.compiler.target import Target

SAFE_BYTES = 1024
"""Zeros that loads read whose guards fail: as long as the longest vector."""
MAX_SPAN = 4
"""Lanes whose elements lie within this many vectors are loaded with whole vectors, others one by one."""


def register_type(dtype: DType) -> Type:
    """How a scalar of the dtype is held in a register."""
    return I1 if dtype.kind == "b" else MEMORY_TYPES[dtype.name]


def strides(argument: Argument) -> list[DimLike]:
    """Elements between neighbours along each axis."""
    out: list[DimLike] = []
    step: DimLike = 1
    for extent in reversed(argument.shape):
        out.insert(0, step)
        step = extent * step if not isinstance(extent, int) else step * extent
    return out


class Emitter(Indices):
    """Emits the expressions of one kernel into one function. `pointers`: the address of each argument."""

    def __init__(self, b: Builder, target: Target, nodes: Nodes, arguments: Mapping[str, Argument]):
        super().__init__(b, Scopes(b), nodes)
        self.target, self.arguments = target, dict(arguments)
        self.pointers: dict[str, Value] = {}
        self._strides = {name: strides(a) for name, a in arguments.items()}
        self.joined: dict[Node, tuple[Node, int]] = {}  # a reduction -> the one that it is a part of, where

    def add_argument(self, argument: Argument, pointer: Value) -> None:
        """Makes a piece of memory readable like an argument of the kernel."""
        self.arguments[argument.name] = argument
        self.pointers[argument.name] = pointer
        self._strides[argument.name] = strides(argument)

    # -- values --------------------------------------------------------------------------------------------

    def value(self, node: Node, guards: Guards = ()) -> Value:
        """The node's value where the guards hold (elsewhere anything): a scalar, or one element per
        lane."""
        if node.kind == "const":
            return constant(register_type(node.dtype), _number(node))
        if node.kind == "given":
            return self.scopes.bound(str(node.data))
        if not node.loads:
            guards = ()
        names = node.deps | self.guard_names(guards)
        return self.scopes.placed(names, (node, guards), lambda: self._compute(node, guards))

    def _compute(self, node: Node, guards: Guards) -> Value:
        if node.kind == "load":
            return self._load(node, guards, 0)
        if node.kind == "index":
            return self._index(node, guards)
        if node.kind == "apply":
            return self._apply(node, guards)
        if node.kind == "guarded":
            return self._guarded(node, guards)
        if node.kind == "result":
            return self.reduction(node.args[0], guards)[node.data]
        raise AssertionError(node.kind)

    def reduction(self, node: Node, guards: Guards) -> list[Value]:
        """The results of a reduce node."""
        from graphflow.compiler.emit.reduction import emit_reduction

        if node in self.joined:
            whole, at = self.joined[node]
            return self.reduction(whole, guards)[at : at + len(node.args)]
        names = node.deps | self.guard_names(guards)
        return self.scopes.placed(names, (node, guards), lambda: emit_reduction(self, node, guards))

    def wide(self, value: Value, names: Names) -> Value:
        """A scalar that depends on `names`, in every lane."""
        lane = self.scopes.lane
        if lane is None or value.type.lanes > 1 or lane.count == 1 or value.name[0] not in "%@":
            return value
        count = lane.count
        return self.scopes.placed(names, ("splat", count, value.name), lambda: self.b.splat(value, count))

    def _apply(self, node: Node, guards: Guards) -> Value:
        chosen = self._chosen(node.args[0]) if node.data == "where" else None
        if chosen is not None:
            return self.value(node.args[1 if chosen else 2], guards)
        values = [self.value(a, guards) for a in node.args]
        if any(v.type.lanes > 1 for v in values):
            first = 1 if node.data == "where" else 0  # a scalar condition chooses whole vectors
            values = [self.wide(v, a.deps | self.guard_names(guards if a.loads else ())) if i >= first else v
                      for i, (v, a) in enumerate(zip(values, node.args))]
        if all(v.name[0] != "%" for v in values):  # the builder needs one operand that is a value
            values[0] = self.b.bitcast(values[0], values[0].type)
        if node.data == "cast":
            return convert(self.b, values[0], node.args[0].dtype, node.dtype)
        return scalar(self.b, str(node.data), node.args[-1].dtype, *values)

    def _chosen(self, node: Node) -> bool | None:
        """What a comparison of indices gives for all values of its names, if that is known: between the ends
        of the parts of a concatenation it is."""
        if node.kind != "apply" or node.data != "lt" or any(a.kind != "index" for a in node.args):
            return None
        low, high = bounds_of(node.args[1].data - node.args[0].data, self.bounds)
        return True if low is not None and low > 0 else False if high is not None and high <= 0 else None

    def _index(self, node: Node, guards: Guards) -> Value:
        b, element = self.b, register_type(node.dtype)
        s = self.spread(node.data, guards)
        if s.uniform:
            return convert(b, self.scalar(s.base, guards), I64, node.dtype)
        lane = self.scopes.lane
        assert lane is not None
        low, high = bounds_of(s.base, self.bounds)
        small = s.bounds is not None
        if small and low is not None and high is not None and -(1 << 29) < low and high < 1 << 29:
            at = b.add(self.small(s, lane.count), b.cast(self.scalar(s.base, guards), I32))
        elif small and node.dtype.is_integer and node.dtype.bytes == 4:
            at = b.add(self.small(s, lane.count), b.cast(self.scalar(s.base, guards), I32))
        else:
            at = self.vector(s, guards)
        return b.cast(at, element)

    def _guarded(self, node: Node, guards: Guards) -> Value:
        value, fill = node.args
        needed = tuple(g for g in node.data if g not in guards and not self.proven(g))
        if not needed:
            return self.value(value, guards)
        if any(map(self.refuted, needed)):
            return self.value(fill, guards)
        inside = (*guards, *needed)
        other = self.value(fill, guards)
        if (value.kind == "load" and fill.kind == "const" and value.dtype.kind != "b"
            and not self.spread(self.offset(value.data[0], value.data[1]), inside).uniform):
            names = value.deps | self.guard_names(inside)
            return self.scopes.placed(names, (value, inside, fill), lambda: self._load(value, inside, other))
        found = self.value(value, inside)
        for condition in self.condition(needed, guards):
            if condition is not None:
                if condition.type.lanes > 1 and self.scopes.lane:
                    found, other = (self.b.splat(v, self.scopes.lane.count) for v in (found, other))
                found = self.b.select(condition, found, other)
        return found

    def indirect_value(self, name: str, guards: Guards) -> Value:
        """The indirect integer of that name, as I64."""
        node = self.nodes.indirect[name]
        names = node.deps | self.guard_names(guards)
        return self.scopes.placed(names, ("indirect", name, guards),
                                  lambda: convert(self.b, self.value(node, guards), node.dtype, I64))

    # -- memory --------------------------------------------------------------------------------------------

    def offset(self, arg: str, index: tuple[DimLike, ...]) -> DimLike:
        """The number of the element at `index`, counted from the argument's first."""
        total: DimLike = 0
        for d, step in zip(index, self._strides[arg]):
            total = total + (d * step if isinstance(d, int) or not isinstance(step, int) else d * step)
        return total

    def address(self, arg: str, offset: DimLike, guards: Guards = ()) -> Value:
        """The address of the element with that number. What is fixed in outer loops is added there."""
        element = MEMORY_TYPES[self.arguments[arg].dtype.name]
        groups, rest = self.by_level(offset)
        at = self.pointers[arg]
        so_far: DimLike = 0
        for group in groups:
            so_far = so_far + group
            at = self._step(at, group, so_far, arg, element, guards)
        return self._step(at, rest, so_far + rest, arg, element, guards) if rest else at

    def _step(self, at: Value, by: DimLike, total: DimLike, arg: str, element: Type, guards: Guards) -> Value:
        guards = self.context(names_in(total) if not isinstance(total, int) else frozenset(), guards)
        names = self.nodes.closure(total) | self.guard_names(guards)
        return self.scopes.placed(names, ("address", arg, total, guards),
                                  lambda: self.b.gep(at, self.scalar(by, guards), element))

    def prefetch(self, arg: str, offset: DimLike) -> None:
        """Asks for the cache line of the element with that number, which need not exist."""
        name, numbers = "llvm.prefetch.p0", [constant(I32, x) for x in (0, 3, 1)]
        self.b.module.declare(name, VOID, ["ptr", *["i32 immarg"] * 3], "")
        self.b.call(name, VOID, [self.address(arg, offset), *numbers], declare=False)

    def safe(self) -> Value:
        """Where loads may read when they must read nothing."""
        return safe_place(self.b.module)

    def _load(self, node: Node, guards: Guards, fill: Value | int) -> Value:
        """The loaded value where the guards hold; elsewhere `fill` if the lanes load different elements, and
        anything if they load the same."""
        arg, index, _ = node.data
        element = MEMORY_TYPES[node.dtype.name]
        s = self.spread(self.offset(arg, index), guards)
        uniform, mask = self.condition(guards)
        lane = self.scopes.lane
        if s.uniform:
            value = self._scalar_load(arg, s.base, element, guards, uniform, mask)
        else:
            assert lane is not None
            mask = self.both(mask, lane.mask)
            value = self._vector_load(arg, s, element.vector(lane.count), guards, uniform, mask, fill)
        return self.b.compare("ne", value, 0) if node.dtype.kind == "b" else value

    def _scalar_load(self, arg: str, base: DimLike, element: Type, guards: Guards, uniform: Value | None,
                     mask: Value | None) -> Value:
        """One element for all lanes, where some lane's guards hold; elsewhere anything."""
        b = self.b
        address = self.address(arg, base, guards)
        wanted = uniform
        if mask is not None:
            some = b.any(mask)
            wanted = some if uniform is None else b.and_(some, uniform)
        return b.load(element, address if wanted is None else b.select(wanted, address, self.safe()))

    def _vector_load(self, arg: str, s: Spread, type: Type, guards: Guards, uniform: Value | None, mask: Value
                     | None, fill: Value | int) -> Value:
        b = self.b
        if s.known and s.fixed == tuple(range(type.lanes)) and mask is None:
            first = self.address(arg, s.base, guards)
            value = b.load(type, first if uniform is None else b.select(uniform, first, self.safe()))
            if uniform is None or isinstance(fill, int) or _is_zero(fill):  # the safe place has zeros
                return value
            return b.select(uniform, value, fill)
        if uniform is not None:
            mask, uniform = self.both(mask, b.splat(uniform, type.lanes)), None
        if s.known and max(s.fixed) - min(s.fixed) < MAX_SPAN * type.lanes:
            return self._span_load(arg, s, type, guards, mask, fill)
        return b.gather(type, self._addresses(arg, s, type, guards), mask, fill)

    def _span_load(self, arg: str, s: Spread, type: Type, guards: Guards, mask: Value | None, fill: Value
                   | int) -> Value:
        """Lanes that are known to lie close together: whole vectors under masks, then shuffles. Nothing
        before the first or beyond the last wanted element is touched."""
        b, low = self.b, min(s.fixed)
        wanted = [x - low for x in s.fixed]
        span = max(wanted) + 1
        width = min(type.lanes, 1 << (span - 1).bit_length())
        first = self.address(arg, s.base + low, guards)
        value: Value | None = None
        for start in range(0, span, width):
            here = [x - start if start <= x < start + width else None for x in wanted]
            if not any(x is not None for x in here):  # a gap: no lane wants an element of it
                continue
            address = b.gep(first, start, type.scalar) if start else first
            part = self._part(type.vector(width), address, here, mask, fill, span - start)
            if value is None:
                order = [-1 if x is None else x for x in here]
                value = part if order == list(range(width)) else b.shuffle(part, None, order)
            else:
                part = b.shuffle(part, None, [-1 if x is None else x for x in here])
                lanes = range(type.lanes)
                value = b.shuffle(value, part, [i if here[i] is None else type.lanes + i for i in lanes])
        assert value is not None
        if mask is None or len(set(wanted)) == len(wanted):
            return value
        # A lane that is not set has got what a lane that is set wants from the same place.
        return b.select(mask, value, fill if isinstance(fill, int) else b.splat(fill, type.lanes))

    def _part(self, type: Type, address: Value, lanes: list[int | None], mask: Value | None, fill: Value
              | int, left: int) -> Value:
        """A whole vector, of which `lanes` tells the element that each lane wants; `left` may be read."""
        b = self.b
        if mask is None:
            if left >= type.lanes:
                return b.load(type, address)
            inside = vector_constant(I1.vector(type.lanes), [i < left for i in range(type.lanes)])
            return b.masked_load(type, address, inside, fill)
        if lanes == list(range(mask.type.lanes)):
            return b.masked_load(type, address, mask, fill)
        users = [[i for i, x in enumerate(lanes) if x == element] for element in range(type.lanes)]
        needed: Value | None = None
        for turn in range(max(map(len, users))):
            order = [at[turn] if turn < len(at) else mask.type.lanes for at in users]
            used = b.shuffle(mask, constant(mask.type, False), order)
            needed = used if needed is None else b.or_(needed, used)
        assert needed is not None
        return b.masked_load(type, address, needed, fill)

    def _addresses(self, arg: str, s: Spread, type: Type, guards: Guards) -> Value:
        """The address of each lane's element."""
        element = MEMORY_TYPES[self.arguments[arg].dtype.name]
        base = self.address(arg, s.base, guards)
        if s.bounds is not None:
            offsets = self.small(s, type.lanes)
        else:
            offsets = self.vector(Spread(0, s.fixed, s.scale, s.extra, s.low, s.high), guards)
        return self.b.gep(base, offsets, element)

    def both(self, x: Value | None, y: Value | None) -> Value | None:
        """The conjunction of two masks; None is true."""
        if x is None or y is None:
            return y if x is None else x
        return self.b.and_(x, y)

    def store(self, store: Store) -> None:
        """Stores the value of the statement's expression, in the valid lanes."""
        value = self.value(self.nodes.of(store.value))
        self.store_value(store.arg, store.index, value)
        self.nodes.stored(store.arg)

    def store_value(self, arg: str, index: tuple[DimLike, ...], value: Value) -> None:
        """Stores a value at an index of an argument, in the valid lanes."""
        b, lane = self.b, self.scopes.lane
        element = MEMORY_TYPES[self.arguments[arg].dtype.name]
        if value.type.element == "i1":
            value = b.cast(value, element)
        s = self.spread(self.offset(arg, index))
        if lane is None or lane.count == 1 or s.uniform:
            b.store(b.extract(value, 0), self.address(arg, s.base))
            return
        value = b.splat(value, lane.count)
        if s.known and s.fixed == tuple(range(lane.count)):
            address = self.address(arg, s.base)
            if lane.mask is None:
                b.store(value, address)
            else:
                b.masked_store(value, address, lane.mask)
        else:
            b.scatter(value, self._addresses(arg, s, value.type, ()), lane.mask)


def _number(node: Node) -> float:
    return float.fromhex(str(node.data)) if node.dtype.is_float else int(str(node.data))


def _is_zero(value: Value) -> bool:
    return value.name in ("0", "false", "0x0000000000000000")


def safe_place(module: Module) -> Value:
    """The module's zeros for loads that must read nothing."""
    if not any(line.startswith("@safe ") for line in module._globals):
        module._globals.append(f"@safe = internal constant [{SAFE_BYTES} x i8] zeroinitializer, align 64")
    return Value(PTR, "@safe")
