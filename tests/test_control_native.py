"""Loops and branches as native code: plain NumPy loops, the reference, the kernels' interpreter at each stage
and the code on one and two threads agree; the code does not grow with the number of steps."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support import feed, native_program

from graphflow.compiler.driver import Compilation
from graphflow.compiler.interpret import bind_symbols, interpret
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.graph import Graph, Region, TensorType, Value
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.kernel.text import parse_program, print_program
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, F32, F64, I32, I64, U8, as_dtype
from graphflow.compiler.plan.plan_text import parse_plan, print_plan
from graphflow.compiler.plan.schema import Branch, Launch, Repeat, launches, places
from graphflow.compiler.target import host_target
from graphflow.runtime.measure import measure_arena
from graphflow.runtime.null import NullProgram

pytestmark = pytest.mark.cpu
Arrays = Mapping[str, np.ndarray]
Body = Callable[..., Sequence[Value]]
T = symbol("T")


def region(types: Sequence[TensorType], body: Body) -> Region:
    """The region whose results `body(builder, *parameters)` gives."""
    b = Builder()
    parameters = [b.parameter(t, i) for i, t in enumerate(types)]
    return Region(tuple(parameters), tuple(body(b, *parameters)))


def scan(b: Builder, carries: Sequence[Value], steps: Sequence[Value], constants: Sequence[Value], body: Body,
         length: Any, reverse: bool = False) -> tuple[Value, ...]:
    types = [*(v.type for v in carries), *(TensorType(v.dtype, v.shape[1:]) for v in steps),
             *(v.type for v in constants)]
    attrs = {"length": length, "carries": len(carries), "steps": len(steps), "reverse": reverse}
    return b.node("scan", [*carries, *steps, *constants], attrs, [region(types, body)]).results


def cond(b: Builder, predicate: Value, operands: Sequence[Value], then: Body, otherwise: Body
         ) -> tuple[Value, ...]:
    types = [v.type for v in operands]
    return b.node("cond", [predicate, *operands], {}, [region(types, then), region(types, otherwise)]).results


def while_loop(b: Builder, carries: Sequence[Value], constants: Sequence[Value], condition: Body, body: Body,
               limit: int) -> tuple[Value, ...]:
    operands = [*carries, *constants]
    types = [v.type for v in operands]
    return b.node("while_loop", operands, {"carries": len(carries), "limit": limit},
                  [region(types, condition), region(types, body)]).results


def graph(b: Builder, outputs: Mapping[str, Value], updates: Mapping[str, Value] | None = None) -> Graph:
    effects = tuple(b.update(v, name=name).node for name, v in (updates or {}).items())
    inputs = [n.result() for n in Graph("g", (), outputs, effects).nodes() if n.op == "input"]
    return Graph("g", tuple(inputs), dict(outputs), effects)


def agree(graph: Graph, feeds: Arrays, wanted: Arrays, state: Arrays | None = None, tolerance: float = 2e-6
          ) -> Compilation:
    """Holds every way of running the graph to what NumPy gave: outputs, and new states as "update of …"."""
    state = state or {}

    def compare(outputs: Arrays, states: Arrays, how: str) -> None:
        found = {**outputs, **{f"update of {name}": value for name, value in states.items()
                               if name in graph.updates()}}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            value = np.asarray(value)
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), (how, name)
            if value.dtype.kind == "f":
                np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance,
                                           err_msg=f"{how}: {name}")
            else:
                np.testing.assert_array_equal(found[name], value, f"{how}: {name}")

    compare(*interpret(graph, feeds, state), "reference")
    compilation, symbols = Compilation(graph, host_target()), bind_symbols(graph, feeds)
    for stage in ("canonical", "stable", "autodiff", "joint", "fuse", "schedule"):
        compare(*interpret(compilation.result(stage), feeds, state), stage)
    for stage in ("lower", "tile", "memory"):
        program = compilation.result(stage)
        outputs, states, _ = run_program(program, feeds, state, symbols)
        compare(outputs, states, stage)
        text = print_program(program)
        assert print_program(parse_program(text)) == text
    text = print_plan(compilation.result("plan"))
    assert print_plan(parse_plan(text)) == text
    bits = []
    for threads in (1, 2):
        program = native_program(graph, threads)
        arrays = [np.asarray(feeds[v.node.attrs["name"]], order="C") for v in graph.inputs]
        for name in graph.states():
            program.store[name] = state[name]
        assert measure_arena(program, arrays).overruns == ()
        outputs = dict(zip(graph.outputs, program.run(arrays)))
        updates = {name: program.store[name] for name in graph.updates()}
        compare(outputs, updates, f"{threads} threads")
        bits.append([value.tobytes() for value in (*outputs.values(), *updates.values())])
    assert bits[0] == bits[1]
    return compilation


def feeds_of(b: Builder, **arrays: np.ndarray) -> list[Value]:
    return [feed(b, name, a) for name, a in arrays.items()]


def open_feed(b: Builder, name: str, array: np.ndarray) -> Value:
    """A feed whose first axis is the symbol T."""
    return b.input(name=name, dtype=as_dtype(array.dtype), shape=(T, *array.shape[1:]))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def floats(*shape: int) -> np.ndarray:
    return rng().uniform(-1, 1, shape).astype(np.float32)


# --- scan

def cell(i: Builder, h: Value, x: Value, w: Value, u: Value) -> list[Value]:
    new = i.tanh(i.add(i.matmul(x, w), i.matmul(h, u)))
    return [new, new]


def cell_numpy(x: np.ndarray, h: np.ndarray, w: np.ndarray, u: np.ndarray, reverse: bool
               ) -> tuple[np.ndarray, np.ndarray]:
    out = np.empty((len(x), *h.shape), np.float32)
    order = range(len(x))
    for t in reversed(order) if reverse else order:
        h = out[t] = np.tanh(x[t] @ w + h @ u)
    return h, out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("open_length", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("read", ["stack", "carry", "both"])
def test_recurrence(length: int, open_length: bool, reverse: bool, read: str) -> None:
    b = Builder()
    arrays = {"x": floats(length, 3, 4), "h": floats(3, 5), "w": floats(4, 5), "u": floats(5, 5)}
    x = open_feed(b, "x", arrays["x"]) if open_length else feed(b, "x", arrays["x"])
    h, w, u = feeds_of(b, h=arrays["h"], w=arrays["w"], u=arrays["u"])
    last, every = scan(b, [h], [x], [w, u], cell, T if open_length else length, reverse)
    wanted = dict(zip(("last", "every"), cell_numpy(*arrays.values(), reverse)))
    outputs = {"last": last, "every": every}
    if read == "stack":           # the stack is an array of the arena, not an output
        outputs = {"every": b.add(every, 1)}
        wanted = {"every": wanted["every"] + np.float32(1)}
    elif read == "carry":
        outputs, wanted = {"last": last}, {"last": wanted["last"]}
    agree(graph(b, outputs), arrays, wanted)


@pytest.mark.parametrize("dtype", [F32, F64, I32, I64, U8, BOOL])
@pytest.mark.parametrize("reverse", [False, True])
def test_carries_of_every_type(dtype: Any, reverse: bool) -> None:
    """Old and new value of the carry stacked, as the gradient of a loop wants them."""
    b = Builder()
    x = rng().integers(0, 2, (5, 4)).astype(dtype.numpy)
    c = np.asarray([1, 0, 1, 1]).astype(dtype.numpy)
    fx, fc = feeds_of(b, x=x, c=c)
    op = "logical_or" if dtype == BOOL else "add"
    last, before, after = scan(b, [fc], [fx], [], lambda i, c, x: [n := i.node(op, [c, x]).result(), c, n], 5,
                               reverse)
    olds, news = np.empty_like(x), np.empty_like(x)
    for t in range(5)[::-1] if reverse else range(5):
        olds[t] = c
        c = c | x[t] if dtype == BOOL else c + x[t]
        news[t] = c
    outputs = {"last": last, "before": b.reshape(before, shape=(20,)),
               "after": b.transpose(after, perm=(1, 0))}
    agree(graph(b, outputs), {"x": x, "c": np.asarray([1, 0, 1, 1]).astype(dtype.numpy)},
          {"last": c, "before": olds.reshape(20), "after": news.T})


@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_carries_that_trade_places(length: int) -> None:
    """Fibonacci's numbers: x, y = y, x + y; one carry stays as it is, and is stacked."""
    b = Builder()
    x, y, z = np.int64([0, 1]), np.int64([1, 1]), np.int64([7, 8])
    fx, fy, fz = feeds_of(b, x=x, y=y, z=z)
    results = scan(b, [fx, fy, fz], [], [], lambda i, x, y, z: [y, i.add(x, y), z, x, z], length)
    feeds, rows = {"x": x, "y": y, "z": z}, []
    for _ in range(length):
        rows.append(x)
        x, y = y, x + y
    agree(graph(b, dict(zip("abcde", results))), feeds,
          {"a": x, "b": y, "c": z, "d": np.asarray(rows, np.int64).reshape(length, 2),
           "e": np.tile(z, (length, 1))})


def test_a_value_in_many_places() -> None:
    """One value is two carries and two outputs; another output is an operand, another one a literal."""
    b = Builder()
    x, c = floats(4, 3), floats(3)
    fx, fc = feeds_of(b, x=x, c=c)

    def body(i: Builder, c: Value, d: Value, x: Value, k: Value) -> list[Value]:
        new = i.add(i.mul(c, d), x)
        return [new, new, new, new, k, x, i.constant(2.0, F32, (2,))]

    results = scan(b, [fc, b.add(fc, 1)], [fx], [fc], body, 4)
    first, second, rows = c, c + np.float32(1), []
    for t in range(4):
        first = second = first * second + x[t]
        rows.append(first)
    stack = np.stack(rows)
    agree(graph(b, dict(zip("abcdefg", results))), {"x": x, "c": c},
          {"a": first, "b": second, "c": stack, "d": stack, "e": np.tile(c, (4, 1)), "f": x,
           "g": np.full((4, 2), 2, np.float32)})


VIEWS: dict[str, tuple[Callable[[Builder, Value], Value], Callable[[np.ndarray], np.ndarray]]] = {
    "transpose": (lambda b, x: b.transpose(x, perm=(1, 0)), lambda x: x.T),
    "slice": (lambda b, x: b.slice(x, starts=(1, 0), stops=(4, 6), steps=(1, 2)), lambda x: x[1:4, ::2]),
    "broadcast": (lambda b, x: b.broadcast_to(x, shape=(3, 4, 6)), lambda x: np.broadcast_to(x, (3, 4, 6))),
    "reshape": (lambda b, x: b.reshape(x, shape=(3, 2, 4)), lambda x: x.reshape(3, 2, 4)),
    "flip": (lambda b, x: b.flip(x, axes=(0, 1)), lambda x: x[::-1, ::-1]),
    "reshape of transpose": (lambda b, x: b.reshape(b.transpose(x, perm=(1, 0)), shape=(4, 6)),
                             lambda x: x.T.reshape(4, 6)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("computed", [False, True])
def test_operands_that_are_views(view: str, computed: bool) -> None:
    make, numpy = VIEWS[view]
    b, x = Builder(), floats(4, 6)
    fx = feed(b, "x", x)
    source, value = (b.mul(fx, fx), x * x) if computed else (fx, x)
    operand, steps = make(b, source), numpy(value)
    start = b.broadcast(b.constant(0.0, F32), operand.shape[1:])
    last, rows = scan(b, [start], [operand], [operand], lambda i, c, x, k: [
        new := i.add(c, x), i.add(new, i.reduce_sum(k, axes=(0,)))], len(steps))
    both = b.add(operand, 1)                                # others look through the view still
    sums = np.cumsum(steps, 0)
    compilation = agree(graph(b, {"last": last, "rows": rows, "both": both}), {"x": x}, {
        "last": sums[-1], "rows": sums + steps.sum(0), "both": steps + np.float32(1)}, tolerance=1e-5)
    if view == "reshape" and not computed:
        names = [item.kernel for item in launches(compilation.result("plan").body)]
        assert not any("reshape" in name for name in names)


def test_nested_loops() -> None:
    """A loop over rows and, inside it, one over the elements of a row, both with a carry from outside."""
    b = Builder()
    x, k = floats(4, 3, 2), floats(2)
    fx, fk = feeds_of(b, x=x, k=k)

    def outer(i: Builder, total: Value, row: Value, k: Value) -> list[Value]:
        def inner(j: Builder, c: Value, d: Value, x: Value, k: Value) -> list[Value]:
            new = j.add(j.mul(c, k), x)
            return [new, j.maximum(d, x), new]
        c, d, every = scan(i, [total, k], [row], [k], inner, 3, reverse=True)
        return [i.mul(i.add(c, d), 0.5), every, c]

    last, every, ends = scan(b, [b.constant(0.0, F32, (2,))], [fx], [fk], outer, 4)
    total, out, tops = np.zeros(2, np.float32), np.empty((4, 3, 2), np.float32), np.empty((4, 2), np.float32)
    for t in range(4):
        c, d = total, k
        for s in (2, 1, 0):
            c, d = c * k + x[t, s], np.maximum(d, x[t, s])
            out[t, s] = c
        tops[t] = c
        total = (c + d) * np.float32(0.5)
    agree(graph(b, {"last": last, "every": b.neg(every), "ends": ends}), {"x": x, "k": k},
          {"last": total, "every": -out, "ends": tops}, tolerance=1e-5)


def test_a_state_that_is_updated_in_place() -> None:
    """The loop reads the state as it was: as carry, step by step, and as a constant."""
    b = Builder()
    w, x = floats(3, 3), floats(3, 3)
    fx = feed(b, "x", x)
    state = b.state(name="w", role="parameter", dtype=F32, shape=(3, 3))
    last, rows = scan(b, [state], [state, fx], [state], lambda i, c, s, x, k: [
        i.add(i.matmul(c, k), i.broadcast(s, (3, 3))), i.mul(s, x)], 3)
    total = w
    for t in range(3):
        total = total @ w + w[t]
    compilation = agree(graph(b, {"last": last, "rows": rows}, {"w": b.sub(state, b.mul(fx, 0.1))}),
                        {"x": x}, {"last": total, "rows": w * x, "update of w": w - x * np.float32(0.1)},
                        {"w": w}, tolerance=1e-5)
    (update,) = [i for i in launches(compilation.result("plan").body) if "s0" in i.writes]
    readers = [p.position for p in places(compilation.result("plan").body)
               if p.loops or (not isinstance(p.item, (Launch, Repeat)) and "s0" in (p.item.source,))]
    assert set(update.after) <= set(readers) and len(update.after) >= 2


def test_a_state_that_a_loop_makes() -> None:
    b = Builder()
    w, x = floats(3), floats(4, 3)
    fx = feed(b, "x", x)
    state = b.state(name="w", role="parameter", dtype=F32, shape=(3,))
    (last,) = scan(b, [state], [fx], [], lambda i, c, x: [i.sub(c, i.mul(x, 0.5))], 4)
    for t in range(4):
        w = w - x[t] * np.float32(0.5)
    agree(graph(b, {"old": state}, {"w": last}), {"x": x}, {"old": floats(3), "update of w": w},
          {"w": floats(3)})


def test_a_loop_behind_a_loop() -> None:
    """The second loop reads the stack of the first, which is a part of the memory of its carry."""
    b = Builder()
    arrays = {"x": floats(5, 3, 4), "h": floats(3, 5), "w": floats(4, 5), "u": floats(5, 5)}
    x, h, w, u = feeds_of(b, **arrays)
    last, every = scan(b, [h], [x], [w, u], cell, 5)
    top, rows = scan(b, [last], [every], [u, u], cell, 5, reverse=True)
    h1, every1 = cell_numpy(*arrays.values(), False)
    h2, every2 = cell_numpy(every1, h1, arrays["u"], arrays["u"], True)
    agree(graph(b, {"top": top, "rows": b.mul(rows, 2)}), arrays, {"top": h2, "rows": every2 * np.float32(2)},
          tolerance=1e-5)


# --- cond

@pytest.mark.parametrize("holds", [False, True])
def test_a_branch(holds: bool) -> None:
    b = Builder()
    x, w = floats(3, 4), floats(4, 4)
    p, fx, fw = feeds_of(b, p=np.asarray(holds), x=x, w=w)
    y, z, passed = cond(b, p, [fx, fw], lambda i, x, w: [i.tanh(i.matmul(x, w)), i.add(x, 1), x],
                        lambda i, x, w: [n := i.neg(x), n, i.mul(x, 3)])
    wanted = [np.tanh(x @ w), x + np.float32(1), x] if holds else [-x, -x, x * np.float32(3)]
    compilation = agree(graph(b, {"y": y, "z": b.mul(z, 2), "passed": passed}),
                        {"p": np.asarray(holds), "x": x, "w": w},
                        {"y": wanted[0], "z": wanted[1] * np.float32(2), "passed": wanted[2]})
    assert any(isinstance(p.item, Branch) for p in places(compilation.result("plan").body))


def test_a_branch_in_a_loop_and_a_loop_in_it() -> None:
    b = Builder()
    x, flags = floats(6, 3), np.asarray([1, 0, 0, 1, 1, 0], np.bool_)
    fx, ff = feeds_of(b, x=x, flags=flags)

    def body(i: Builder, c: Value, x: Value, flag: Value) -> list[Value]:
        def then(j: Builder, c: Value, x: Value) -> list[Value]:
            (power,) = scan(j, [c], [], [x], lambda k, c, x: [k.mul(c, x)], 3)
            return [power, j.add(c, x)]
        first, second = cond(i, flag, [c, x], then, lambda j, c, x: [j.sub(c, x), c])
        return [i.add(first, 0.5), i.mul(first, second)]

    last, rows = scan(b, [b.constant(1.0, F32, (3,))], [fx, ff], [], body, 6)
    c, out = np.ones(3, np.float32), np.empty((6, 3), np.float32)
    for t in range(6):
        first, second = (c * x[t] * x[t] * x[t], c + x[t]) if flags[t] else (c - x[t], c)
        c, out[t] = first + np.float32(0.5), first * second
    agree(graph(b, {"last": last, "rows": rows}), {"x": x, "flags": flags}, {"last": c, "rows": out},
          tolerance=1e-5)


# --- while_loop

@pytest.mark.parametrize("start, limit", [(1, 100), (1, 0), (1, 3), (500, 100), (60, 1), (2, 2)])
def test_a_loop_with_an_open_number_of_trips(start: int, limit: int) -> None:
    """Doubles until the sum is large; the constant and one carry stay what they are."""
    b = Builder()
    x, k = np.asarray([start, 1, 2], np.float32), floats(3)
    fx, fk = feeds_of(b, x=x, k=k)
    y, n, kept = while_loop(
        b, [fx, b.constant(0, I64), fk], [b.constant(100.0, F32)],
        lambda i, x, n, k, top: [i.lt(i.reduce_sum(x, axes=(0,)), top)],
        lambda i, x, n, k, top: [i.add(i.add(x, x), k), i.add(n, 1), k], limit)
    trips, feeds = 0, {"x": x, "k": k}
    while trips < limit and x.sum() < 100:
        x, trips = x + x + k, trips + 1
    agree(graph(b, {"y": y, "n": n, "kept": b.add(kept, y)}), feeds,
          {"y": x, "n": np.asarray(trips), "kept": k + x}, tolerance=1e-5)


def test_loops_with_an_open_number_of_trips_in_a_loop() -> None:
    """The greatest common divisors of pairs, by Euclid's algorithm."""
    b = Builder()
    pairs = np.asarray([[12, 18], [7, 0], [35, 14], [81, 27], [17, 5]], np.int64)
    fp = feed(b, "pairs", pairs)

    def body(i: Builder, pair: Value) -> list[Value]:
        first = i.reshape(i.slice(pair, starts=(0,), stops=(1,), steps=(1,)), shape=())
        second = i.reshape(i.slice(pair, starts=(1,), stops=(2,), steps=(1,)), shape=())
        found, _ = while_loop(i, [first, second], [], lambda j, x, y: [j.ne(y, 0)],
                              lambda j, x, y: [y, j.mod(x, y)], 50)
        return [found]

    (found,) = scan(b, [], [fp], [], body, len(pairs))
    agree(graph(b, {"found": found}), {"pairs": pairs}, {"found": np.gcd(pairs[:, 0], pairs[:, 1])})


# --- the size of the code

def lstm(length: Any, hidden: int = 8, batch: int = 4, project: bool = True
         ) -> tuple[Graph, dict[str, np.ndarray]]:
    """A layer of LSTM: four gates, cell and output; both carries start at zero. Without `project`, x is what
    the gates get."""
    b = Builder()
    arrays = {"x": floats(length, batch, hidden if project else 4 * hidden), "w": floats(hidden, 4 * hidden),
              "u": floats(hidden, 4 * hidden), "bias": floats(4 * hidden)}
    x, w, u, bias = feeds_of(b, **arrays)
    zero = b.constant(0.0, F32, (batch, hidden))

    def body(i: Builder, h: Value, c: Value, x: Value, w: Value, u: Value, bias: Value) -> list[Value]:
        z = i.add(i.matmul(x, w) if project else x, i.matmul(h, u))
        z = i.add(z, i.broadcast(bias, (batch, 4 * hidden)))
        gates = [i.slice(z, starts=(0, k * hidden), stops=(batch, (k + 1) * hidden), steps=(1, 1))
                 for k in range(4)]
        c = i.add(i.mul(i.sigmoid(gates[1]), c), i.mul(i.sigmoid(gates[0]), i.tanh(gates[2])))
        h = i.mul(i.sigmoid(gates[3]), i.tanh(c))
        return [h, c, h]

    h, c, every = scan(b, [zero, zero], [x], [w, u, bias], body, length)
    return graph(b, {"h": h, "c": c, "every": every}), arrays


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_lstm() -> None:
    g, arrays = lstm(6)
    h = c = np.zeros((4, 8), np.float32)
    every = []
    for x in arrays["x"]:
        i, f, m, o = np.split(x @ arrays["w"] + h @ arrays["u"] + arrays["bias"], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(m)
        h = sigmoid(o) * np.tanh(c)
        every.append(h)
    agree(g, arrays, {"h": h, "c": c, "every": np.stack(every)}, tolerance=1e-5)


def test_code_does_not_grow_with_the_number_of_steps() -> None:
    """10 steps or 1000: the same code but for numbers."""
    texts = [Compilation(lstm(length, project=False)[0], host_target()).text("emit")
             for length in (10, 1000)]
    lines = [[line for line in text.splitlines() if line.startswith("  ")] for text in texts]
    assert len(lines[0]) == len(lines[1])
    assert [re.sub(r"\d+", "0", x) for x in lines[0]] == [re.sub(r"\d+", "0", x) for x in lines[1]]


def test_what_a_step_would_take() -> None:
    """The null device counts every trip, and no slot of a carry is more than two rows."""
    plans = [Compilation(lstm(length, project=False)[0], host_target()).result("plan")
             for length in (1, 11, 21)]
    one, some, many = (NullProgram(plan).counts({}) for plan in plans)
    inside = sum(1 for p in places(plans[0].body) if p.loops and isinstance(p.item, Launch))
    assert inside > 0 and many.launches - some.launches == some.launches - one.launches == 10 * inside
    assert many.bytes - some.bytes == some.bytes - one.bytes > 0
    assert many.peak_bytes == one.peak_bytes
