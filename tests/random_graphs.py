"""Random typed graphs from the op table: what is fed to every stage of the compiler.

A graph is grown op by op. Each candidate is typed by its record's own `infer`, evaluated by its reference on
the case's feeds, and evaluated once more on slightly different operands: what is not finite, large, or jumps
there is dropped, so that stages which keep values within a tolerance can be compared. The same seed gives the
same case. """
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from random_control import evaluate_control, grow_control
from support import make_operand

from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Region, TensorType, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Arg, Op, Sample
from graphflow.compiler.plan.dims import Dim, DimLike, evaluate, product, symbol
from graphflow.compiler.plan.dtypes import BOOL, COMPUTED, DTYPES, F32, F64, I32, I64, U8, U32, DType
from graphflow.compiler.plan.errors import Location, UserError

LARGEST = 1e3
NUDGE = 1e-4
GROWN = tuple(op for op in OPS.values() if op.kind not in ("leaf", "effect", "control", "grad", "fused"))
"""The ops that a graph grows by."""


@dataclass
class Case:
    """A graph with what to run it on."""
    seed: int
    graph: Graph
    feeds: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


def random_case(seed: int, nodes: int = 24) -> Case:
    """The case of that seed."""
    grower = _Grower(np.random.default_rng(seed))
    grower.start()
    while len(grower.values) < nodes and grower.tries < 40 * nodes:
        grower.grow()
    return grower.finish(seed)


class _Grower:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.b = rng, Builder()
        n = rng.choice([0, 1, 2, 3, 5], p=[0.04, 0.16, 0.2, 0.3, 0.3])
        self.symbols = {"N": int(n), "M": int(rng.integers(1, 4))}
        self.float = F64 if rng.random() < 0.3 else F32
        self.values: dict[Value, np.ndarray] = {}
        self.feeds: dict[str, np.ndarray] = {}
        self.state: dict[str, np.ndarray] = {}
        self.leaves: list[Value] = []
        self.streams = self.tries = self.depth = 0

    # --- choices

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def subset(self, items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(i for i in items if self.chance(0.5))

    def value(self, wanted: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """A value made before, rather a late one."""
        found = [v for v in self.values if wanted(v)]
        return found[int(len(found) * self.rng.random() ** 0.6)] if found else None

    def extent(self) -> DimLike:
        return self.pick([1, 2, 3, 4, symbol("N"), symbol("N"), symbol("M")])

    def inside(self, operands: Sequence[tuple[TensorType, np.ndarray]]) -> tuple[_Grower, list[Value]]:
        """A grower of a body with these parameters, and the parameters."""
        inner = _Body.__new__(_Body)
        inner.__dict__.update(self.__dict__, b=Builder(), values={}, feeds={}, state={}, leaves=[], tries=0,
                              depth=self.depth + 1)
        with self.origin(), inner.origin():
            for i, (type, array) in enumerate(operands):
                inner.values[inner.b.parameter(type, i)] = array
        return inner, list(inner.values)

    # --- leaves

    def start(self) -> None:
        n, m = symbol("N"), symbol("M")
        self.feed(self.float, (n, 3))
        if self.chance(0.6):
            self.feed(self.float, (m, n)[:int(self.rng.integers(1, 3))])
        else:
            self.feed(self.float, (2, m))
        if self.chance(0.5):
            shape = tuple(self.extent() for _ in range(self.rng.integers(0, 3)))
            self.feed(self.pick([I32, I64, U8, BOOL]), shape)
        for _ in range(int(self.rng.integers(1, 4))):
            self.parameter(tuple(int(self.rng.integers(1, 4)) for _ in range(self.rng.integers(0, 3))))

    def feed(self, dtype: DType, shape: Sequence[DimLike], arg: Arg | None = None) -> Value:
        size = tuple(evaluate(d, self.symbols) for d in shape)
        limits = arg or Arg((), dtype.name, 0 if dtype.kind in "ub" else -2, 2)
        array = make_operand(limits._replace(shape=size), dtype, self.rng)
        name = f"x{len(self.feeds)}"
        with self.origin():
            v = self.b.input(name=name, dtype=dtype, shape=tuple(shape))
        self.feeds[name] = self.values[v] = array
        self.leaves.append(v)
        return v

    def parameter(self, shape: tuple[int, ...]) -> Value:
        name = f"w{len(self.state)}"
        with self.origin():
            v = self.b.state(name=name, role="parameter", dtype=self.float, shape=shape)
        self.state[name] = self.values[v] = self.rng.uniform(-1, 1, shape).astype(self.float.numpy)
        return v

    def random_unit(self) -> None:
        """Random numbers in [0, 1). Their bits are too large to join the graph: the highest eight do, as
        floats."""
        keys = []
        for name in ("seed", "step"):
            keys.append(self.b.state(name=name, role="seed", dtype=U32, shape=()))
            self.state[name] = np.asarray(len(name), np.uint32)
        self.streams += 1
        shape = tuple(self.extent() for _ in range(self.rng.integers(0, 3)))
        bits = self.b.random_bits(*keys, shape=shape, stream=self.streams)
        self.values[bits], = self.compute(bits.node, [self.state["seed"], self.state["step"]])
        byte = self.add("shift_right", [bits, self.number(24, bits)])
        del self.values[bits]
        unit = self.add("cast", [byte], {"dtype": self.float})
        if unit is not None:
            self.add("mul", [unit, self.number(1 / 256, unit)])

    def origin(self) -> Any:
        line = len(self.values) + 1
        return self.b.origin([Location("random.py", line, "", 4, 4 + line)])

    # --- nodes

    def grow(self) -> None:
        """One more op, if a candidate of it is typed and tame."""
        self.tries += 1
        op = self.pick(GROWN)
        with self.origin():
            if self.depth < 2 and self.chance(0.1):
                return grow_control(self)
            if op.name == "random_bits":
                return self.random_unit()
            if op.name in _CHOOSE and self.chance(0.75):
                chosen = _CHOOSE[op.name](self)
            elif op.kind == "elementwise":
                chosen = self.elementwise(op)
            else:
                chosen = self.from_sample(op)
            if chosen is not None:
                self.add(op.name, *chosen)

    def add(self, op: str, inputs: Sequence[Value | None], attrs: Mapping[str, Any] | None = None,
            regions: Sequence[Region] = ()) -> Value | None:
        """The first result of the op if it is typed and tame; None otherwise."""
        if any(v is None for v in inputs):
            return None
        try:
            node = self.b.node(op, [v for v in inputs if v is not None], attrs, regions)
            results = self.compute(node, [self.values[v] for v in node.inputs])
            if not all(map(self.tame, results)) or self.jumps(node, results):
                return None
        except (UserError, NotImplementedError):
            return None
        self.values.update(zip(node.results, results))
        return node.result()

    def compute(self, node: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        attrs = {name: self.concrete(value) for name, value in node.attrs.items()}
        types = [TensorType(t.dtype, self.concrete(t.shape)) for t in node.types]
        if any(d < 0 for t in types for d in t.shape):
            raise UserError("a negative extent")
        if node.regions:
            return evaluate_control(node, arrays, self.symbols)
        reference = OPS[node.op].reference
        with np.errstate(all="ignore"):
            return [np.asarray(r) for r in reference(arrays, attrs, types)]

    def concrete(self, value: Any) -> Any:
        if isinstance(value, Dim):
            return evaluate(value, self.symbols)
        return tuple(map(self.concrete, value)) if isinstance(value, tuple) else value

    @staticmethod
    def tame(x: np.ndarray) -> bool:
        return x.size <= 4096 and bool((np.abs(x.astype(float)) <= LARGEST).all())

    def jumps(self, node: Any, results: Sequence[np.ndarray]) -> bool:
        """Whether slightly different operands give a quite different result."""
        for sign in (1, -1):
            near = [a * (1 + sign * NUDGE) + sign * NUDGE if a.dtype.kind == "f" else a
                    for a in (self.values[v] for v in node.inputs)]
            near = [a.astype(self.values[v].dtype) for a, v in zip(near, node.inputs)]
            for x, y in zip(results, self.compute(node, near)):
                if x.dtype.kind != "f" and not np.array_equal(x, y):
                    return True
                if x.dtype.kind == "f" and not np.allclose(x, y, rtol=0.05, atol=0.05):
                    return True
        return False

    # --- operands

    def elementwise(self, op: Op) -> tuple[list[Value | None], dict[str, Any]] | None:
        if op.name == "cast":
            return [self.value()], {"dtype": self.pick(list(COMPUTED))}
        first = self.value(lambda v: self.takes(op, v.type))
        if first is None:
            return None
        if self.chance(0.4) and first.dtype.is_float:          # into the domain of log, sqrt, div, …
            first = self.add("add", [self.add("sigmoid", [first]), self.number(0.5, first)])
        rest = [self.like(first) if first is not None else None for _ in op.operands[1:]]
        if op.name.startswith("shift_") and rest[0] is not None:
            rest = [self.add("bit_and", [rest[0], self.number(7, rest[0])])]
        if op.name == "where":
            return [self.condition(first), first, *rest[1:]], {}
        return [first, *rest], {}

    @staticmethod
    def takes(op: Op, type: TensorType) -> bool:
        operands = 2 if op.name == "where" else len(op.operands)
        try:
            condition = [TensorType(BOOL, type.shape)] if op.name == "where" else []
            op.infer(condition + [type] * operands, {}, ())
        except UserError:
            return False
        return True

    def like(self, v: Value) -> Value | None:
        """A value of the same type: one there is, a stretched one, a converted one, or a number."""
        same = self.value(lambda w: w.type == v.type)
        if same is not None and self.chance(0.6):
            return same
        other = self.value(lambda w: w.dtype == v.dtype and _stretches(w.shape, v.shape))
        if other is not None and self.chance(0.7):
            return self.add("broadcast_to", [other], {"shape": v.shape})
        converted = self.value(lambda w: w.shape == v.shape)
        if converted is not None and self.chance(0.3):
            return self.add("cast", [converted], {"dtype": v.dtype})
        return self.number(self.pick([0, 1, 1, 2, 3, -1, 0.5, -0.0]), v)

    def number(self, number: float, like: Value, dtype: DType | None = None) -> Value:
        """A number in the shape and type of a value."""
        dtype = dtype or like.dtype
        number = bool(number) if dtype == BOOL else number if dtype.is_float else int(abs(number))
        v = self.b.constant(number, dtype, like.shape)
        for made in (v.node.inputs or (v,))[0], v:
            self.values.setdefault(made, np.full(self.concrete(made.shape), number, dtype.numpy))
        return v

    def condition(self, like: Value | None) -> Value | None:
        if like is None:
            return None
        other = self.value(lambda v: v.dtype.is_float and v.shape == like.shape)
        if other is None:
            return self.number(self.pick([0, 1]), like, BOOL)
        made = self.add(self.pick(["lt", "ge"]), [other, self.number(0.3, other)])
        return self.add("logical_not", [made]) if made is not None and self.chance(0.3) else made

    def from_sample(self, op: Op) -> tuple[list[Value | None], dict[str, Any]] | None:
        """Operands and attributes of one of the record's samples, made from values there are where
        possible."""
        samples = list(op.samples())
        sample: Sample = self.pick(samples)
        return [self.operand(arg) for arg in sample.args], dict(sample.attrs)

    def operand(self, arg: Arg) -> Value | None:
        size = int(np.prod(arg.shape))
        dtype = self.float if arg.dtype == "float" else DTYPES[arg.dtype]
        source = self.value(lambda v: v.dtype == dtype and isinstance(v.type.size, int) and v.type.size > 0)
        if not dtype.is_float or source is None or arg.low >= 0 or self.chance(0.4):
            return self.feed(dtype, arg.shape, arg)
        have = self.values[source].size
        flat = self.add("reshape", [source], {"shape": (have,)})
        if flat is not None and have < size:
            high = (size - have,)
            flat = self.add("pad", [flat], {"low": (0,), "high": high, "interior": (0,), "value": 0.25})
        elif flat is not None and have > size:
            flat = self.add("slice", [flat], {"starts": (have - size,), "stops": (have,), "steps": (1,)})
        return self.add("reshape", [flat], {"shape": arg.shape})

    # --- the end

    def finish(self, seed: int) -> Case:
        """Chooses outputs, a loss with its gradients, and updates."""
        outputs: dict[str, Value] = {}
        effects = []
        floats = [v for v in self.values
                  if v.dtype == self.float and v.op not in ("input", "state", "constant")]
        with self.origin():
            loss = self.loss([v for v in floats if self.chance(0.5)] or floats[-1:])
            if loss is not None:
                outputs["loss"] = loss
                wrt = [v for v in self.values
                       if v.dtype == self.float and v.op not in ("constant", "broadcast_to")
                       and (v.op in ("input", "state") or self.chance(0.1))]
                grads = self.b.node("grad", [loss, *wrt]).results
                if self.chance(0.3):
                    grads = self.second(grads, wrt)
                for i, (g, v) in enumerate(zip(grads, wrt)):
                    if v.op == "state":
                        step = self.b.sub(v, self.b.mul(g, 0.1))
                        effects.append(self.b.update(step, name=v.node.attrs["name"]).node)
                    else:
                        outputs[f"grad{i}"] = g
            for i, v in enumerate([v for v in self.values if self.chance(0.25)]):
                outputs[f"y{i}"] = v
        inputs = tuple(v for v in self.values if v.op == "input")
        return Case(seed, Graph(f"random_{seed}", inputs, outputs, tuple(effects)), self.feeds, self.state)

    def loss(self, parts: Sequence[Value]) -> Value | None:
        total: Value | None = None
        for v in parts:
            one = self.add("reduce_sum", [v], {"axes": tuple(range(v.type.rank))}) if v.shape else v
            if one is not None:
                total = one if total is None else self.b.add(total, one)
        return total

    def second(self, grads: Sequence[Value], wrt: Sequence[Value]) -> Sequence[Value]:
        """The gradients of the sum of the squares of gradients."""
        total: Value | None = None
        for g in grads:
            one = self.b.reduce_sum(self.b.mul(g, g), axes=tuple(range(g.type.rank)))
            total = one if total is None else self.b.add(total, one)
        assert total is not None
        return self.b.node("grad", [total, *wrt]).results


class _Body(_Grower):
    """Grows the body of a loop or a branch: there are no feeds and no state."""

    def feed(self, dtype: DType, shape: Sequence[DimLike], arg: Arg | None = None) -> None:
        return None

    def parameter(self, shape: tuple[int, ...]) -> None:
        return None

    def random_unit(self) -> None:
        return None


def _stretches(have: Sequence[DimLike], want: Sequence[DimLike]) -> bool:
    new = len(want) - len(have)
    return new >= 0 and all(h == w or h == 1 for h, w in zip(have, want[new:]))


# --- attributes, per op

Chosen = tuple[list, dict[str, Any]] | None


def _reduce(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 0)
    return None if x is None else ([x], {"axes": g.subset(range(x.type.rank))})


def _reduce_bools(g: _Grower) -> Chosen:
    x = g.condition(g.value(lambda v: v.type.rank > 0 and v.dtype.is_float))
    return None if x is None else ([x], {"axes": g.subset(range(x.type.rank))})


def _arg(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 0)
    return None if x is None else ([x], {"axis": g.pick(range(x.type.rank))})


def _broadcast(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank < 3)
    if x is None:
        return None
    shape = tuple(g.extent() if d == 1 else d for d in x.shape)
    return [x], {"shape": (g.extent(), *shape) if g.chance(0.5) else shape}


def _reshape(g: _Grower) -> Chosen:
    x = g.value()
    if x is None:
        return None
    shape = [d for d in x.shape if d != 1] if g.chance(0.5) else list(x.shape)
    if len(shape) > 1 and g.chance(0.5):
        at = int(g.rng.integers(len(shape) - 1))
        shape[at:at + 2] = [product(shape[at:at + 2])]
    if shape and g.chance(0.3):
        at = int(g.rng.integers(len(shape)))
        if isinstance(shape[at], int) and shape[at] % 2 == 0:
            shape[at:at + 1] = [2, shape[at] // 2]
    if g.chance(0.4):
        shape.insert(int(g.rng.integers(len(shape) + 1)), 1)
    return [x], {"shape": tuple(shape)}


def _transpose(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 1)
    return None if x is None else ([x], {"perm": tuple(int(i) for i in g.rng.permutation(x.type.rank))})


def _slice(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 0)
    if x is None:
        return None
    starts, stops, steps = [], [], []
    for d in x.shape:
        start, stop = 0, d
        if isinstance(d, int) and g.chance(0.6):
            start, stop = sorted(g.rng.integers(0, d + 1, 2).tolist())
        starts.append(start)
        stops.append(stop)
        steps.append(int(g.pick([1, 1, 1, 2])))
    return [x], {"starts": tuple(starts), "stops": tuple(stops), "steps": tuple(steps)}


def _pad(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 0)
    if x is None:
        return None
    sizes = [(g.pick([0, 0, 1, 2]), g.pick([0, 0, 1]), g.pick([0, 0, 1]) if isinstance(d, int) and d else 0)
             for d in x.shape]
    low, high, interior = (tuple(s) for s in zip(*sizes))
    return [x], {"low": low, "high": high, "interior": interior, "value": g.pick([0.0, 1.0])}


def _flip(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 0)
    return None if x is None else ([x], {"axes": g.subset(range(x.type.rank))})


def _concatenate(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.type.rank > 0)
    if x is None:
        return None
    return [x, *(g.like(x) for _ in range(g.rng.integers(0, 3)))], {"axis": g.pick(range(x.type.rank))}


def _iota(g: _Grower) -> Chosen:
    shape = tuple(g.extent() for _ in range(g.rng.integers(1, 3)))
    return [], {"shape": shape, "axis": g.pick(range(len(shape))), "dtype": g.pick([I32, I64, F32])}


def _matmul(g: _Grower) -> Chosen:
    x = g.value(lambda v: v.dtype == g.float and v.type.rank == 2)
    if x is None:
        return None
    flip_x, flip_y = g.chance(0.3), g.chance(0.3)
    inner = x.shape[0] if flip_x else x.shape[1]
    y = g.value(lambda v: v.dtype == g.float and v.type.rank == 2 and v.shape[1 if flip_y else 0] == inner)
    if y is None and isinstance(inner, int):
        y = g.parameter((2, inner) if flip_y else (inner, 2))
    return [x, y], {"transpose_x": flip_x, "transpose_y": flip_y}


_CHOOSE: dict[str, Callable[[_Grower], Chosen]] = {
    **{name: _reduce for name in ("reduce_sum", "reduce_prod", "reduce_max", "reduce_min")},
    "reduce_any": _reduce_bools, "reduce_all": _reduce_bools,
    "argmax": _arg, "argmin": _arg, "broadcast_to": _broadcast, "reshape": _reshape, "transpose": _transpose,
    "slice": _slice, "pad": _pad, "flip": _flip, "concatenate": _concatenate, "iota": _iota,
    "matmul": _matmul,
}
