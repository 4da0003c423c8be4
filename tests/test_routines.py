"""Routines as kernels: their text, their checker, and native code against the interpreter, that is NumPy, on
fenced memory, for every target and any number of workers."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from native_code import targets
from support import feed, graph_of, native_program, run_graph
from test_emit import run

from graphflow.compiler.driver import Compilation
from graphflow.compiler.emit import cuda_routines
from graphflow.compiler.emit.routines import WORK, routine_tasks
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.check import check_kernel
from graphflow.compiler.kernel.form import Argument, RoutineKernel
from graphflow.compiler.kernel.interpret import run_kernel
from graphflow.compiler.kernel.routines import ROUTINES, fault
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.kernel.text import parse_kernel, print_kernel
from graphflow.compiler.kernel.walk import symbols
from graphflow.compiler.passes.autodiff import gradients
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import DTYPES, F32, F64, I32, I64, DType
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.target import host_target

TARGETS = targets()
O, N, I, K = (symbol(name) for name in ("outer", "along", "inner", "count"))  # noqa: E741
EXTENTS = {"O": O, "N": N, "I": I, "K": K}


def kernel_of(name: str, attrs: dict[str, Any], dtype: DType = F32, indices: DType = I64,
              extents: dict[str, Any] = EXTENTS) -> RoutineKernel:
    """The routine for arguments of these types and extents."""
    known = {"T": dtype, "F": dtype, "A": dtype, "J": indices, "i64": I64}
    arguments = tuple(Argument(f.name, known[f.dtype], tuple(extents[x] for x in f.axes), f.mode)
                      for f in ROUTINES[name].formals)
    kernel = RoutineKernel("k", arguments, name, attrs)
    return replace(kernel, symbols=symbols(kernel))


def variants(name: str) -> Iterator[dict[str, Any]]:
    """Every combination of the routine's attributes."""
    attrs = ROUTINES[name].attrs
    for values in itertools.product(*attrs.values()):
        yield dict(zip(attrs, values))


ALL = [pytest.param(name, attrs, id=" ".join([name, *map(str, attrs.values())]))
       for name in ROUTINES for attrs in variants(name)]


def arguments_for(kernel: RoutineKernel, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for the kernel; indices reach two past both ends, floats hold NaN and both zeros when they are
    compared only."""
    rng = np.random.default_rng(seed)
    out = {}
    for a, f in zip(kernel.arguments, ROUTINES[kernel.routine].formals):
        shape = tuple(sizes[x] for x in f.axes)
        if f.name == "indices":
            low = 0 if a.dtype.kind == "u" else -2
            values: Any = rng.integers(low, sizes["N"] + 2, shape)
        elif a.dtype.is_float:
            values = rng.standard_normal(shape)
            if kernel.routine in ("argsort", "scatter_set") or kernel.attrs.get("kind") in ("max", "min"):
                for special in (np.nan, 0.0, -0.0, np.inf, -np.inf):
                    values[rng.random(shape) < 0.05] = special
        else:
            limits = np.iinfo(a.dtype.numpy) if a.dtype.is_integer else None
            values = rng.integers(0 if limits is None or not limits.min else -3, 4 if limits else 2, shape)
        out[f.name] = np.asarray(values).astype(a.dtype.numpy)
    return out


def compare(kernel: RoutineKernel, sizes: dict[str, int], target: Any, workers: int = 1) -> None:
    """The bits of the native code are those of the interpreter."""
    arrays = arguments_for(kernel, sizes)
    named = {str(EXTENTS[letter]): size for letter, size in sizes.items()}
    expected = {name: a.copy() for name, a in arrays.items()}
    run_kernel(kernel, expected, named)
    at_end = sum(sizes.values()) % 2 == 0
    found = run(kernel, arrays, {s: named[s] for s in kernel.symbols}, target, workers, at_end)
    for name in arrays:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{name} of {sizes}")


# --- the form

def test_every_back_end_has_every_routine() -> None:
    assert set(ROUTINES) == set(WORK) == set(cuda_routines.ROUTINES)


@pytest.mark.parametrize("name, attrs", ALL)
def test_text_round_trip(name: str, attrs: dict[str, Any]) -> None:
    kernel = kernel_of(name, attrs)
    text = print_kernel(kernel)
    assert parse_kernel(text) == kernel and print_kernel(parse_kernel(text)) == text
    check_kernel(kernel)


def test_text_is_as_documented() -> None:
    text = """\
routine totals(x: r f32[N,10,1], y: w f32[N,10,1]) symbols [N] {
  cumulative [kind="sum", reverse=true]
}
"""
    kernel = parse_kernel(text)
    assert print_kernel(kernel) == text
    y = np.zeros((3, 10, 1), np.float32)
    x = np.arange(30, dtype=np.float32).reshape(y.shape)
    run_kernel(kernel, {"x": x, "y": y}, {"N": 3})
    np.testing.assert_array_equal(y, np.cumsum(x[:, ::-1], axis=1)[:, ::-1])


XY = "x: r f32[2,3,4], y: w f32[2,3,4]"


@pytest.mark.parametrize("text, message", [
    (f"routine k({XY}) {{ shuffle [] }}", "there is no routine 'shuffle'"),
    (f"routine k({XY}) {{ cumulative [kind=\"mean\", reverse=false] }}", "kind of cumulative is 'mean'"),
    (f"routine k({XY}) {{ cumulative [kind=\"sum\", reverse=0] }}", "reverse of cumulative is 0"),
    (f"routine k({XY}) {{ cumulative [kind=\"sum\"] }}", "has the attributes kind, reverse"),
    (f"routine k({XY}) {{ argsort [descending=false] }}", "y of argsort is f32"),
    ("routine k(y: w f32[2,3,4], x: r f32[2,3,4]) { cumulative [kind=\"sum\", reverse=false] }",
     "cumulative takes x r, y w"),
    ("routine k(x: r f32[2,3,4], y: w f32[2,4,3]) { cumulative [kind=\"sum\", reverse=false] }",
     "y of cumulative is [2, 4, 3], not [O, N, I]"),
    ("routine k(x: r f32[6], y: w f32[6]) { cumulative [kind=\"sum\", reverse=false] }",
     "x of cumulative is [6], not [O, N, I]"),
    ("routine k(x: r f32[1,2,3], y: w f64[1,2,3]) { cumulative [kind=\"sum\", reverse=false] }",
     "y of cumulative is f64"),
    ("routine k(x: r bool[1,2,3], y: w bool[1,2,3]) { cumulative [kind=\"max\", reverse=false] }",
     "x of cumulative is bool"),
    ("routine k(indices: r f32[3], updates: r f32[1,3,1], y: w f32[1,5,1]) { scatter_add [] }",
     "indices of scatter_add is f32"),
    ("routine k(x: r f32[N,2,3], y: w f32[N,2,3]) { cumulative [kind=\"sum\", reverse=false] }",
     "uses N, which nothing defines"),
])
def test_checker_refuses(text: str, message: str) -> None:
    with pytest.raises(CompilerError) as error:
        check_kernel(parse_kernel(text))
    assert message in str(error.value)


# --- native code

SIZES = ({"O": 1, "N": 1, "I": 1, "K": 1}, {"O": 3, "N": 7, "I": 1, "K": 5},
         {"O": 9, "N": 17, "I": 1, "K": 40},
         {"O": 1, "N": 33, "I": 5, "K": 3}, {"O": 2, "N": 16, "I": 21, "K": 33},
         {"O": 2, "N": 70, "I": 150, "K": 100}, {"O": 0, "N": 5, "I": 3, "K": 2},
         {"O": 2, "N": 0, "I": 3, "K": 2}, {"O": 2, "N": 3, "I": 0, "K": 2}, {"O": 2, "N": 5, "I": 3, "K": 0})


@pytest.mark.cpu
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("name, attrs", ALL)
def test_symbolic_extents(name: str, attrs: dict[str, Any], target: str) -> None:
    kernel = kernel_of(name, attrs)
    for sizes in SIZES:
        compare(kernel, sizes, TARGETS[target], workers=2)


@pytest.mark.cpu
@pytest.mark.parametrize("name, attrs", ALL)
def test_fixed_extents(name: str, attrs: dict[str, Any]) -> None:
    for sizes in SIZES:
        compare(kernel_of(name, attrs, F64, extents=sizes), sizes, TARGETS["host"])


@pytest.mark.cpu
@pytest.mark.parametrize("name, attrs, dtype", [
    pytest.param(*case.values, dtype, id=f"{case.id} {dtype}") for case in ALL for dtype in DTYPES.values()
    if not fault(kernel_of(*case.values, dtype))])
def test_every_type(name: str, attrs: dict[str, Any], dtype: DType) -> None:
    kernel = kernel_of(name, attrs, dtype, I32)
    compare(kernel, {"O": 3, "N": 40, "I": 19, "K": 25}, TARGETS["host"])
    compare(kernel, {"O": 5, "N": 40, "I": 1, "K": 25}, TARGETS["host"])


@pytest.mark.cpu
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("indices", [d for d in DTYPES.values() if d.is_integer], ids=str)
@pytest.mark.parametrize("name", ["scatter_add", "scatter_set", "put_add"])
def test_every_index_type(name: str, indices: DType, target: str) -> None:
    """Enough work for several blocks of targets."""
    sizes = {"O": 1, "N": 250, "I": 70, "K": 4003}
    kernel = kernel_of(name, {}, F32, indices, sizes)
    if name != "put_add":
        assert routine_tasks(kernel, TARGETS[target]) > 1
    compare(kernel, sizes, TARGETS[target], workers=3)


@pytest.mark.cpu
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 255, 1000, 4097])
@pytest.mark.parametrize("dtype", [F32, F64, I32], ids=str)
def test_long_rows_are_sorted(n: int, dtype: DType) -> None:
    for descending in (False, True):
        for inner in (1, 2):
            kernel = kernel_of("argsort", {"descending": descending}, dtype)
            compare(kernel, {"O": 2, "N": n, "I": inner, "K": 0}, TARGETS["host"])


@pytest.mark.cpu
def test_sums_of_updates_run_in_the_order_of_the_indices() -> None:
    """In float32, where the order shows."""
    rng = np.random.default_rng(0)
    for outer, size, count, inner in ((1, 50, 5000, 8), (3, 7, 900, 1), (1, 2000, 4000, 65)):
        shape = (outer, count, inner)
        updates = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape)).astype(np.float32)
        indices = rng.integers(0, size, count)
        expected = np.zeros((outer, size, inner), np.float32)
        for k in range(count):
            expected[:, indices[k]] += updates[:, k]
        sizes = {"O": outer, "N": size, "I": inner, "K": count}
        kernel = kernel_of("scatter_add", {}, F32, I64, sizes)
        for workers in (1, 2, 5):
            arrays = {"indices": indices, "updates": updates, "y": np.full_like(expected, np.nan)}
            found = run(kernel, arrays, {}, TARGETS["host"], workers)["y"]
            assert found.tobytes() == expected.tobytes()


# --- in programs

def totals_of_powers(dtype: DType = F32) -> Graph:
    """y = cumsum(exp(x)), argsort of it, and the sums scattered by a feed of indices."""
    b = Builder()
    x = b.input(name="x", dtype=dtype, shape=(symbol("N"), symbol("M")))
    at = b.input(name="at", dtype=I64, shape=(symbol("N"),))
    y = b.cumsum(b.exp(x), axis=1)
    order = b.argsort(b.neg(y), axis=0)
    spread = b.scatter_add(at, y, axis=0, size=symbol("N"))
    return graph_of([x, at], [b.mul(y, 2.0), order, spread, b.cumprod(b.transpose(x, perm=(1, 0)), axis=0)])


@pytest.mark.cpu
@pytest.mark.parametrize("n, m", [(1, 1), (3, 5), (40, 33), (130, 200)])
def test_programs_agree_for_any_number_of_threads(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    feeds = {"x": rng.standard_normal((n, m)).astype(np.float32), "at": rng.integers(0, n, n)}
    graph = totals_of_powers()
    found = []
    for threads in (1, 2, 4):
        program = native_program(graph, threads, guard=True)
        found.append([a.tobytes() for a in program.run([feeds["x"], feeds["at"]])])
    assert found[0] == found[1] == found[2]
    program = Compilation(graph, host_target()).result("memory")
    kernels = run_program(program, feeds, {}, {"N": n, "M": m})[0]
    native = dict(zip(graph.outputs, native_program(graph).run([feeds["x"], feeds["at"]])))
    reference = run_graph(graph, feeds, "reference")
    for name, expected in reference.items():
        np.testing.assert_allclose(native[name], expected, rtol=2e-5)
        np.testing.assert_allclose(kernels[name], expected, rtol=2e-5)


def test_a_running_sum_takes_over_its_operand() -> None:
    b = Builder()
    x = b.input(name="x", dtype=F32, shape=(symbol("N"), 9))
    program = Compilation(graph_of([x], [b.neg(b.cumsum(b.exp(x), axis=1))]), host_target()).result("memory")
    assert any(buffer.alias for buffer in program.plan.buffers)
    order = graph_of([x], [b.neg(b.cast(b.argsort(b.exp(x), axis=1), dtype=F32))])
    program = Compilation(order, host_target()).result("memory")
    routine = next(k for k in program.kernels.values() if isinstance(k, RoutineKernel))
    (launch,) = [item for item in program.plan.body if getattr(item, "kernel", "") == routine.name]
    source, target = (program.plan.buffer(id) for id in launch.buffers)
    assert target.alias != source.id


@pytest.mark.cpu
def test_operands_that_are_views_or_the_same() -> None:
    """A routine reads whole buffers: views are made first; one array may be both operands."""
    b = Builder()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 6))
    v = feed(b, "x0", x)
    flipped = b.flip(v, axes=(1,))
    graph = graph_of([v], [b.linear_recurrence(v, v, axis=1), b.cumsum(flipped, axis=1), b.add(flipped, 1.0),
                           b.cumsum(b.iota(shape=(2, 5), axis=1, dtype=I64), axis=1)])
    for device in ("reference", "cpu"):
        found = run_graph(graph, {"x0": x}, device)
        expected = x.copy()
        for t in range(1, 6):
            expected[:, t] = x[:, t] * expected[:, t - 1] + x[:, t]
        np.testing.assert_array_equal(found["y0"], expected)
        np.testing.assert_array_equal(found["y1"], np.cumsum(x[:, ::-1], axis=1))
        np.testing.assert_array_equal(found["y2"], x[:, ::-1] + 1)
        np.testing.assert_array_equal(found["y3"], np.cumsum(np.indices((2, 5))[1], axis=1))


# --- gradients

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_running_products_with_zeros(reverse: bool, device: str) -> None:
    """Against the sum over all products without the one factor."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 7))
    x[1, 3] = x[2, 0] = x[3, 6] = x[4, 2] = x[4, 5] = 0
    weights = rng.standard_normal(x.shape)
    b = Builder()
    v, w = feed(b, "x0", x), feed(b, "x1", weights)
    total = b.reduce_sum(b.mul(b.cumprod(v, axis=1, reverse=reverse), w), axes=(0, 1))
    graph = graph_of([v, w], gradients(b, total, [v]))
    (found,) = run_graph(graph, {"x0": x, "x1": weights}, device).values()
    forward, ahead = (x[:, ::-1], weights[:, ::-1]) if reverse else (x, weights)
    expected = np.zeros_like(x)
    for s in range(7):
        for t in range(s, 7):
            expected[:, s] += ahead[:, t] * np.prod(np.delete(forward[:, :t + 1], s, axis=1), axis=1)
    np.testing.assert_allclose(found, expected[:, ::-1] if reverse else expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_where_elements_are_equal(device: str) -> None:
    """The latest of equal extremes gets it, as does the last of updates in one place."""
    b = Builder()
    x = np.array([2.0, 2, 1, 2, 3, 3])
    v = feed(b, "x0", x)
    totals = [b.reduce_sum(b.cummax(v, axis=0, reverse=r), axes=(0,)) for r in (False, True)]
    found = run_graph(graph_of([v], [g for t in totals for g in gradients(b, t, [v])]), {"x0": x}, device)
    np.testing.assert_array_equal(found["y0"], [1, 2, 0, 1, 1, 1])
    np.testing.assert_array_equal(found["y1"], [0, 0, 0, 0, 5, 1])
    b = Builder()
    at, u = np.array([1, 3, 1]), np.array([5.0, 6, 7])
    v, i, w = feed(b, "x0", x), feed(b, "x1", at), feed(b, "x2", u)
    y = b.scatter_set(v, i, w, axis=0)
    total = b.reduce_sum(b.mul(y, y), axes=(0,))
    graph = graph_of([v, i, w], [y, *gradients(b, total, [v, w])])
    found = run_graph(graph, {"x0": x, "x1": at, "x2": u}, device)
    np.testing.assert_array_equal(found["y0"], [2, 7, 1, 6, 3, 3])
    np.testing.assert_array_equal(found["y1"], [4, 0, 2, 0, 6, 6])
    np.testing.assert_array_equal(found["y2"], [0, 12, 14])
