"""What several test files share: running graphs on a device, operands for samples, gradients, and a lowering
evaluated with NumPy."""
from __future__ import annotations

import weakref
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit.pool import pool_object
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Node, TensorType, Value
from graphflow.compiler.kernel.form import Guard
from graphflow.compiler.kernel.routines import ROUTINES
from graphflow.compiler.kernel.scalars import SCALARS
from graphflow.compiler.ops.record import Arg, Contract, Op, Pointwise, Routine, Sample
from graphflow.compiler.plan.dims import DimLike, evaluate, symbol
from graphflow.compiler.plan.dtypes import BOOL, DTYPES, DType, as_dtype
from graphflow.compiler.plan.schema import Plan
from graphflow.compiler.target import host_target
from graphflow.runtime.cpu import CpuProgram
from graphflow.runtime.native import Library, install_pool
from graphflow.runtime.store import Store


def run_graph(graph: Graph, feeds: Mapping[str, Any], device: str, state: Mapping[str, Any] | None = None
              ) -> dict[str, np.ndarray]:
    """The graph's outputs on that device."""
    if device == "reference":
        return interpret(graph, feeds, state or {})[0]
    if device == "cpu":
        return run_native(graph, feeds, state or {})[0]
    if device == "cuda":
        return run_cuda(graph, feeds, state or {})
    raise ValueError(f"no way to run a graph on {device!r}")


_PROGRAMS: weakref.WeakKeyDictionary[Graph, CpuProgram] = weakref.WeakKeyDictionary()
_COMPILED: weakref.WeakKeyDictionary[Graph, tuple[Plan, bytes]] = weakref.WeakKeyDictionary()


def native_program(graph: Graph, threads: int = 2, guard: bool = False) -> CpuProgram:
    """The graph compiled for the machine at hand without the cache, once for any number of threads; over a
    Store of its own."""
    if graph not in _COMPILED:
        compilation = Compilation(graph, host_target())
        _COMPILED[graph] = compilation.result("plan"), compilation.object_code()
    return loaded_program(*_COMPILED[graph], threads, guard)


@cache
def _pool() -> None:
    install_pool(pool_object(host_target()))


def loaded_program(plan: Plan, code: bytes | Library, threads: int, guard: bool = False) -> CpuProgram:
    """The program over a Store of its own."""
    _pool()
    return CpuProgram(plan, code, store_of(plan), threads, guard=guard)


def store_of(plan: Plan) -> Store:
    """A Store with the plan's states."""
    store = Store()
    for b in plan.buffers:
        if b.role == "state":
            store.declare(b.name, "parameter", b.dtype, [int(d) for d in b.shape])
    return store


def run_native(graph: Graph, feeds: Mapping[str, Any], state: Mapping[str, Any]
               ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(outputs, updated states) of the graph on two threads; compiled once for each graph."""
    program = _PROGRAMS.get(graph)
    if program is None:
        program = _PROGRAMS[graph] = native_program(graph)
    for name in graph.states():
        program.store[name] = state[name]
    outputs = program.run([np.asarray(feeds[v.node.attrs["name"]]) for v in graph.inputs])
    return dict(zip(graph.outputs, outputs)), {name: program.store[name] for name in graph.updates()}


def run_cuda(graph: Graph, feeds: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The graph's outputs on the GPU."""
    from graphflow.compiler.cuda_target import host_cuda_target
    from graphflow.runtime.cuda import CudaProgram
    plan, code = Compilation(graph, host_cuda_target()).compile()
    program = CudaProgram(plan, code, store_of(plan))
    for name in graph.states():
        program.store[name] = state[name]
    outputs = program.run([np.asarray(feeds[v.node.attrs["name"]]) for v in graph.inputs])
    return dict(zip(graph.outputs, map(np.asarray, outputs)))


# --- samples

def dtype_of(arg: Arg, float_dtype: DType) -> DType:
    return float_dtype if arg.dtype == "float" else as_dtype(arg.dtype)


def make_operand(arg: Arg, float_dtype: DType, rng: np.random.Generator) -> np.ndarray:
    """An array such as the sample's operand asks for."""
    dtype = dtype_of(arg, float_dtype)
    if dtype.has_gradient:
        values = rng.uniform(arg.low, arg.high, arg.shape)
        if arg.distinct:
            grid = np.linspace(arg.low, arg.high, values.size) if values.size != 1 else values
            values = rng.permutation(grid.ravel()).reshape(arg.shape)
    elif dtype == BOOL:
        values = rng.integers(0, 2, arg.shape)
    else:
        limits = np.iinfo(dtype.numpy)
        low, high = max(int(arg.low), limits.min), min(int(arg.high), limits.max)
        if arg.distinct:
            values = rng.permutation(np.arange(low, high + 1))[:int(np.prod(arg.shape))].reshape(arg.shape)
        else:
            values = rng.integers(low, high + 1, arg.shape)
    with np.errstate(over="ignore"):               # an infinity of float16 is an operand like any other
        return np.asarray(values).astype(dtype.numpy)


def make_operands(name: str, sample: Sample, float_dtype: DType) -> list[np.ndarray]:
    """The sample's operands, the same for the same name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return [make_operand(arg, float_dtype, rng) for arg in sample.args]


def one_op(op: Op, arrays: Sequence[np.ndarray], attrs: Mapping[str, Any]
           ) -> tuple[Builder, list[Value], Node]:
    """A builder, feeds ``x0``, ``x1`` … typed like the arrays, and the node of the op on them."""
    b = Builder()
    inputs = [feed(b, f"x{i}", a) for i, a in enumerate(arrays)]
    return b, inputs, b.node(op.name, inputs, attrs)


def feed(b: Builder, name: str, array: np.ndarray) -> Value:
    """An `input` typed like the array."""
    return b.node("input", (), {"name": name, "dtype": as_dtype(array.dtype), "shape": array.shape}).result()


def graph_of(inputs: Sequence[Value], outputs: Sequence[Value], name: str = "g") -> Graph:
    """A graph with the outputs ``y0``, ``y1`` …"""
    return Graph(name, tuple(inputs), {f"y{i}": v for i, v in enumerate(outputs)})


Directional = tuple[Value, dict[str, np.ndarray], list[Value]]


def directional(b: Builder, values: Sequence[Value], rng: np.random.Generator, name: str
                ) -> Directional:
    """A scalar, the inner product of the values with random weights; the weights as feeds (`name` 0, 1 …),
    and their `input` values."""
    total, feeds, made = None, {}, []
    for i, v in enumerate(values):
        weights = rng.standard_normal(v.shape).astype(v.dtype.numpy)
        feeds[f"{name}{i}"] = weights
        made.append(feed(b, f"{name}{i}", weights))
        part = b.reduce_sum(b.mul(v, made[-1]), axes=tuple(range(v.type.rank)))
        total = part if total is None else b.add(total, part)
    return total, feeds, made


# --- lowerings

AXES = 20
"""Loop variables that one lowering may have: number i runs along axis i of every array."""


class EagerPoint:
    """The `Point` of a lowering, which computes with NumPy at all points at once: an expression is an array,
    and every read is checked to be within its operand."""

    def __init__(self, node: Node, arrays: Sequence[np.ndarray]):
        self.node, self.arrays = node, arrays
        self.values: dict[str, Any] = {}
        self.made = 0

    def number(self, at: DimLike) -> np.ndarray:
        return np.asarray(evaluate(at, self.values))

    def loops(self, *extents: DimLike) -> tuple[tuple[str, DimLike], ...]:
        out = []
        for extent in extents:
            shape = [-1 if axis == self.made else 1 for axis in range(AXES)]
            name = f"v{self.made}"
            self.values[name] = np.arange(extent).reshape(shape)
            self.made += 1
            out.append((name, extent))
        return tuple(out)

    def operand(self, i: int, index: Sequence[DimLike], guards: Sequence[Guard] = (),
                fill: Any = 0) -> np.ndarray:
        array = self.arrays[i]
        holds: Any = np.asarray(True)
        for g in guards:
            at = self.number(g.at)
            holds = holds & (at >= 0) & (at < self.number(g.bound))
        assert len(index) == array.ndim
        where = []
        if array.size == 0:
            no_points = any(v.size == 0 for v in self.values.values())
            assert no_points or not np.any(holds), f"{self.node.op} reads operand {i}, which is empty"
            return np.asarray(fill).astype(array.dtype)
        for at, extent in zip(map(self.number, index), array.shape):
            assert np.all(~holds | ((at >= 0) & (at < extent))), f"{self.node.op} reads operand {i} outside"
            where.append(np.where(holds, at, 0))
        value = array[tuple(where)]
        return np.where(holds, value, np.asarray(fill).astype(array.dtype)) if guards else value

    def const(self, value: Any, dtype: DType) -> np.ndarray:
        return np.asarray(value, dtype.numpy)

    def index(self, at: DimLike, dtype: DType) -> np.ndarray:
        return self.number(at).astype(dtype.numpy)

    def apply(self, function: str, *args: Any, dtype: DType | None = None) -> np.ndarray:
        scalar = SCALARS[function]
        assert len(args) == scalar.arity
        if function == "cast":
            return args[0].astype(dtype.numpy)
        if scalar.result == "same":
            assert len({a.dtype for a in args}) == 1, f"{function} of {[a.dtype for a in args]}"
        value = np.asarray(scalar.numpy(*args))
        assert dtype is None or value.dtype == dtype.numpy, f"{function} gives {value.dtype}, not {dtype}"
        return value

    def bind(self, value: np.ndarray) -> np.ndarray:
        return value

    def indirect(self, value: np.ndarray) -> DimLike:
        assert value.dtype.kind in "iu"
        name = f"g{len(self.values)}"
        self.values[name] = value.astype(np.int64)
        return symbol(name)

    def reduce(self, kind: str, loops: Sequence[tuple[str, DimLike]], *operands: Any,
               result: int = 0) -> np.ndarray:
        shape = np.broadcast_shapes(*(a.shape for a in operands),
                                    *(self.values[name].shape for name, _ in loops))
        axes = tuple(int(name[1:]) for name, _ in loops)
        last, count = tuple(range(AXES - len(axes), AXES)), int(np.prod([shape[axis] for axis in axes]))
        flat = [np.moveaxis(np.broadcast_to(a, shape), axes, last).reshape(*_but(shape, axes), count)
                for a in operands]
        if kind in ("argmax", "argmin"):
            assert len(operands) == 2
            if flat[0].shape[-1]:
                at = getattr(np, kind)(flat[0], axis=-1)[..., None]
                out = np.take_along_axis(flat[result], at, -1)[..., 0]
            else:
                out = np.zeros(flat[0].shape[:-1], operands[result].dtype)
        else:
            more = {}
            if kind in ("max", "min") and not flat[0].shape[-1]:
                more["initial"] = -np.inf if kind == "max" else np.inf
            out = getattr(np, kind)(flat[0], axis=-1, **more).astype(flat[0].dtype)
        return out.reshape([1 if axis in axes else extent for axis, extent in enumerate(shape)])


def _but(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [extent for axis, extent in enumerate(shape) if axis not in axes]


def evaluate_lowering(op: Op, node: Node, arrays: Sequence[np.ndarray], result: int = 0) -> np.ndarray:
    """Result number `result` of the node, computed by its lowering."""
    p, type = EagerPoint(node, arrays), node.types[result]
    with np.errstate(all="ignore"):
        if isinstance(op.lowering, Pointwise):
            index = [symbol(name) for name, _ in p.loops(*type.shape)]
            value = np.asarray(op.lowering.value(p, index, result))
            full = tuple(type.shape) + (1,) * (AXES - type.rank)
            return np.broadcast_to(value, full).reshape(type.shape)
        if isinstance(op.lowering, Routine):
            return _evaluate_routine(op.lowering, node, arrays)
        assert isinstance(op.lowering, Contract)
        return _evaluate_contraction(op.lowering, p, type)


def _evaluate_routine(lowering: Routine, node: Node, arrays: Sequence[np.ndarray]) -> np.ndarray:
    out = np.empty(node.types[0].shape, node.types[0].dtype.numpy)
    form = lowering.form([x.shape for x in (*arrays, out)], node.attrs)
    routine = ROUTINES[form.routine]
    given = [x.reshape(shape) for x, shape in zip((*arrays, out), form.shapes)]
    routine.run({f.name: x for f, x in zip(routine.formals, given)}, form.attrs)
    return out


def _evaluate_contraction(lowering: Contract, p: EagerPoint, type: TensorType) -> np.ndarray:
    parts = lowering.parts(p)
    loops = [p.loops(*extents) for extents in (parts.batch, parts.m, parts.n, parts.k)]
    batch, m, n, k = ([symbol(name) for name, _ in made] for made in loops)
    product = np.asarray(parts.a(batch, m, k)) * np.asarray(parts.b(batch, n, k))
    assert product.dtype == type.dtype.numpy
    value = p.reduce("sum", loops[3], product) if loops[3] else product
    at = [p.number(d) for d in parts.out(batch, m, n)]
    out = np.full(type.shape, np.nan, type.dtype.numpy)
    full = tuple(extent for made in loops[:3] for _, extent in made)
    if 0 not in full:
        out[tuple(np.broadcast_to(a, np.broadcast_shapes(value.shape, *(a.shape for a in at)))
                  for a in at)] = value
    return out


def float_dtypes(sample: Sample) -> list[DType]:
    """The float types in which a sample stands: each, if an operand is "float", else just one."""
    floats = [d for d in DTYPES.values() if d.is_float]
    return floats if any(arg.dtype == "float" for arg in sample.args) else floats[:1]
