"""What makes recurrent loops fast: column groups, panels that are packed once, and loops cut along rows."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import loaded_program
from test_emit import TARGETS, product_error, run

import graphflow as gf
from graphflow.compiler.driver import Compilation
from graphflow.compiler.kernel.check import check_kernel, check_program
from graphflow.compiler.kernel.form import ContractionKernel
from graphflow.compiler.kernel.interpret import run_kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.kernel.text import parse_kernel, parse_program, print_kernel, print_program
from graphflow.compiler.passes.memory import reads_before_writing
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.plan.schema import Launch, Repeat, places
from graphflow.runtime.measure import measure_arena

# --- column groups


def grouped(groups: int, columns: int, depth: int, form: str, dtype: str = "f32") -> ContractionKernel:
    """y = acc0 * v, z = acc0 + 2 acc1 (+ 4 acc2 …) of the groups of columns of a product."""
    right = "[g * {n} + j, k]" if form == "NT" else "[k, g * {n} + j]"
    shape = f"{groups * columns},{depth}" if form == "NT" else f"{depth},{groups * columns}"
    total = f"{dtype}(0.0)"
    for g in range(groups):
        total = f"add({total}, mul(acc{g}, {dtype}({2.0 ** g})))"
    kernel = parse_kernel(
        f"""contraction c(a: r {dtype}[N,{depth}], b: r {dtype}[{shape}], v: r {dtype}[{columns}],
        y: w {dtype}[N,{columns}], z: w {dtype}[N,{columns}]) symbols [N] {{
        batch [] m [i < N] n [j < {columns}] k [k < {depth}] groups [g < {groups}]
        a = a[i, k] b = b{right.format(n=columns)}
        y[i, j] = mul(acc0, v[j])
        z[i, j] = {total} }}""")
    assert isinstance(kernel, ContractionKernel)
    return kernel


def check_groups(got: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray, v: np.ndarray, groups: int
                 ) -> None:
    parts = np.split(b.astype(np.float64), groups, axis=1)
    weighted = sum(part * 2.0 ** g for g, part in enumerate(parts))
    size = 2 ** groups
    assert product_error(got["y"], a, (parts[0] * v).astype(a.dtype)) < 40
    assert product_error(got["z"], a, weighted.astype(a.dtype)) < 40 * size


@pytest.mark.parametrize(
    "groups, columns, depth", [(4, 7, 5), (4, 128, 33), (3, 20, 64), (2, 1, 9), (2, 16, 6000)]
)
@pytest.mark.parametrize("form", ["NN", "NT"])
@pytest.mark.parametrize("rows", [1, 3, 25])
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_groups_of_columns(groups: int, columns: int, depth: int, form: str, rows: int, name: str) -> None:
    kernel = grouped(groups, columns, depth, form)
    check_kernel(kernel)
    assert parse_kernel(print_kernel(kernel)) == kernel
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rows, depth), (depth, groups * columns)))
    v = rng.standard_normal(columns).astype(np.float32)
    arrays = {"a": a, "b": b if form == "NN" else np.ascontiguousarray(b.T), "v": v,
              "y": np.zeros((rows, columns), np.float32), "z": np.zeros((rows, columns), np.float32)}
    held = {k: x.copy() for k, x in arrays.items()}
    run_kernel(kernel, held, {"N": rows})
    check_groups(held, a, b, v, groups)
    found = [run(kernel, arrays, {"N": rows}, TARGETS[name], workers) for workers in (1, 2, 3)]
    check_groups(found[0], a, b, v, groups)
    for other in found[1:]:
        assert all(other[k].tobytes() == found[0][k].tobytes() for k in ("y", "z"))


def test_a_kernel_with_groups_uses_their_sums() -> None:
    kernel = grouped(2, 8, 4, "NN")
    text = print_kernel(grouped(3, 8, 4, "NN")).replace("g < 3", "g < 2").replace("24", "16")
    with pytest.raises(CompilerError, match="acc2 is used where no let binds it"):
        check_kernel(parse_kernel(text.replace("acc2", "acc2<f32>")))
    with pytest.raises(CompilerError, match="its groups are not one axis"):
        check_kernel(replace(kernel, contraction=replace(kernel.contraction, groups=(("g", 2), ("h", 2)))))


# --- whole layers

T, FEATURES = 12, 6


def numpy_lstm(x: np.ndarray, wx: np.ndarray, wh: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The outputs of the layer, in float64."""
    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    h = c = np.zeros((x.shape[1], wh.shape[0]))
    out = []
    for step in x.astype(np.float64):
        i, f, g, o = np.split(step @ wx + h @ wh + b, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def training(kind: str, units: int, threads: int = 2, device: str = "cpu") -> gf.Program:
    """A layer's outputs, and the gradients of its parameters and input."""
    x = gf.input("x", (T, gf.dim("N"), FEATURES))
    out = getattr(gf.nn, kind)(x, units, bias_init=gf.init.normal(0.5), name="l")[0]
    loss = (out * out).sum()
    slopes = gf.grad(loss, [x, *gf.optim.trainable(loss)])
    return gf.function([x], [out, *slopes], threads=threads, device=device)


def cut_loops(program: gf.Program) -> list[Repeat]:
    return [p.item for p in places(program.plan.body) if isinstance(p.item, Repeat) and p.item.rows != 0]


@pytest.mark.parametrize("units", [7, 96])
@pytest.mark.parametrize("batch", [1, 3, 19, 50, 99])
def test_lstm_equals_numpy_with_the_same_bits_on_any_number_of_threads(units: int, batch: int) -> None:
    x = np.random.default_rng(batch).standard_normal((T, batch, FEATURES)).astype(np.float32)
    seen = set()
    for threads in (1, 2, 3):
        program = training("lstm", units, threads)
        # where the gradients of small weights are summed inside the loop, its rows need each other
        assert len(cut_loops(program)) == (2 if units == 96 else 1)
        found = [np.asarray(a) for a in program(x)]
        seen.add(b"".join(a.tobytes() for a in found))
    assert len(seen) == 1
    wx, wh, b = (np.asarray(program.store[f"l.{name}"]).astype(np.float64) for name in ("Wx", "Wh", "b"))
    np.testing.assert_allclose(found[0], numpy_lstm(x, wx, wh, b), rtol=2e-5, atol=2e-6)
    reference = training("lstm", units, device="reference")
    for key in program.store:
        reference.store[key] = program.store[key]
    for got, expected in zip(found, reference(x)):
        np.testing.assert_allclose(got, np.asarray(expected), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_are_the_epilogue_of_the_recurrent_product(kind: str) -> None:
    program = training(kind, 16)
    kernels = program.compilation.result("memory").kernels
    loops = [p.item for p in places(program.plan.body) if isinstance(p.item, Repeat)]
    forward = [item for item in loops[0].body if isinstance(item, Launch)]
    made = [kernels[item.kernel] for item in forward]
    assert len(made) == 1 and isinstance(made[0], ContractionKernel)
    assert made[0].contraction.groups[0][1] == {"lstm": 4, "gru": 3}[kind]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_planned_memory_is_what_a_call_takes(kind: str) -> None:
    program = training(kind, 24, threads=3)
    plan, code = program.plan, program.compilation.object_code()
    for n in (1, 9, 40):
        native = loaded_program(plan, code, 3)
        for key in program.store:
            native.store[key] = program.store[key]
        x = np.random.default_rng(n).standard_normal((T, n, FEATURES)).astype(np.float32)
        found = measure_arena(native, [x])
        assert found.overruns == ()
        assert found.measured_bytes == found.planned_bytes == native.peak_bytes({"N": n})


def test_programs_with_such_loops_can_be_printed_and_run_at_kernel_level() -> None:
    program = training("lstm", 7)
    compilation = program.compilation
    x = np.random.default_rng(3).standard_normal((T, 4, FEATURES)).astype(np.float32)
    states = {key: np.asarray(program.store[key]) for key in program.store}
    expected = program(x)
    for stage in ("tile", "memory"):
        lowered = compilation.result(stage)
        if stage == "memory":
            assert print_program(parse_program(print_program(lowered))) == print_program(lowered)
        outputs, _, _ = run_program(lowered, {"x": x}, states, {"N": 4})
        for got, want in zip(outputs.values(), expected):
            np.testing.assert_allclose(got, np.asarray(want), rtol=2e-4, atol=2e-5)


# --- packed once


def loop_of(body: Callable[..., Any], *more: Any, threads: int = 2) -> gf.Program:
    """h = body(h, *step inputs) over T steps from the feed h."""
    h = gf.input("h", (gf.dim("N"), 24))
    _, out = gf.scan(lambda old, inputs: ((new := body(old, *inputs)), new), h, more, length=T)
    return gf.function([h, *more], out, threads=threads)


def test_what_changes_in_the_loop_is_not_packed_before_it() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((24, 24)).astype(np.float32) / 5
    v = rng.standard_normal((T, 24, 24)).astype(np.float32) / 5
    h = start = rng.standard_normal((20, 24)).astype(np.float32)
    weight = gf.parameter((24, 24), gf.init.glorot_uniform, "w")
    steps = gf.input("v", (T, 24, 24))
    program = loop_of(lambda old, step: gf.tanh(gf.matmul(old, weight)) + gf.matmul(old, step), steps)
    program.store["w"] = w
    names = [item.kernel for item in places_of(program)]
    assert sum(name.endswith("_pack") for name in names) == 1
    inside = [item.kernel for item in loop_launches(program)]
    assert sum(name.endswith("_packed") for name in inside) == 1 and not cut_loops(program)
    expected = []
    for step in v:
        h = np.tanh(h @ w) + h @ step
        expected.append(h)
    np.testing.assert_allclose(program(start, v), np.stack(expected), rtol=1e-4, atol=1e-5)


def places_of(program: gf.Program) -> list[Launch]:
    return [p.item for p in places(program.plan.body) if isinstance(p.item, Launch)]


def loop_launches(program: gf.Program) -> list[Launch]:
    return [p.item for p in places(program.plan.body) if isinstance(p.item, Launch) and p.loops]


# --- rows


def test_rows_that_need_each_other_are_not_cut_apart() -> None:
    weight = gf.parameter((24, 24), gf.init.glorot_uniform, "w")
    program = loop_of(lambda old: gf.tanh(gf.matmul(old - old.mean(0, keepdims=True), weight)), threads=2)
    assert not cut_loops(program)
    h = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)
    first = np.tanh((h - h.mean(0)) @ np.asarray(program.store["w"]))
    np.testing.assert_allclose(np.asarray(program(h))[0], first, rtol=1e-4, atol=1e-5)


def test_the_checker_refuses_rows_that_need_each_other() -> None:
    weight = gf.parameter((24, 24), gf.init.glorot_uniform, "w")
    program = loop_of(lambda old: gf.tanh(gf.matmul(old, weight)) + gf.flip(old, 0))
    lowered: KernelProgram = program.compilation.result("memory")
    text = print_program(lowered)
    assert " rows N" not in text
    wrong = parse_program(text.replace("repeat u0 < 12 {", "repeat u0 < 12 rows N {"))
    with pytest.raises(CompilerError, match="is cut along rows, but"):
        check_program(wrong)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"host"}))
def test_narrow_targets_compute_rows_alike(name: str) -> None:
    program = training("lstm", 20)
    x = np.random.default_rng(3).standard_normal((T, 21, FEATURES)).astype(np.float32)
    expected = [np.asarray(a) for a in program(x)]
    compilation = Compilation(program.traced, TARGETS[name])
    native = loaded_program(compilation.result("plan"), compilation.object_code(), 2)
    for key in program.store:
        native.store[key] = program.store[key]
    for got, want in zip(native.run([x]), expected):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


# --- parts, and memory that is taken over


def test_gates_and_their_gradients_take_the_place_of_the_products_that_they_are_made_of() -> None:
    program = training("lstm", 96)
    buffers = {b.id: b for b in program.plan.buffers}
    gates, slopes = (b for b in buffers.values() if b.alias and b.shape[-1] == 4 * 96)
    assert slopes.alias == gates.id and buffers[gates.alias].shape[-1] == 4 * 96
    arena = [b for b in buffers.values() if b.role == "arena" and b.shape[-1:] == (96,)]
    stacks = [b for b in arena if b.shape[0] in (T, T + 1)]
    assert len(stacks) <= 4                # h, c and tanh(c) of all steps, and the slopes of the outputs


def test_a_stack_that_is_read_behind_the_loop_keeps_its_memory() -> None:
    x = gf.input("x", (T, gf.dim("N"), 8))
    thrice = x * 3.0
    _, out = gf.scan(lambda h, step: ((new := gf.tanh(step * 2.0 + h)), step * new),
                     gf.zeros((x.shape[1], 8)), thrice)
    program = gf.function([x], (out * thrice).sum())
    data = np.random.default_rng(0).standard_normal((T, 5, 8)).astype(np.float32)
    h, total = np.zeros((5, 8)), 0.0
    for step in 3.0 * data.astype(np.float64):
        h = np.tanh(2 * step + h)
        total += float((step * h * step).sum())
    np.testing.assert_allclose(program(data), total, rtol=1e-4)


@pytest.mark.parametrize("load, store, expected", [
    ("[i, j]", "[i, j]", True), ("[i, j + 8]", "[i, j]", True), ("[i, j + 4]", "[i, j]", False),
    ("[i, j + 8]", "[i, j + 8]", True), ("[j, i]", "[i, j]", False),
])
def test_shifted_elements_share_memory_where_they_never_meet(load: str, store: str, expected: bool) -> None:
    kernel = parse_kernel(f"""kernel k(x: r f32[16,16], y: w f32[16,16]) {{
        grid i < 8 {{ lanes j < 8 {{ y{store} = x{load} }} }} }}""")
    assert reads_before_writing(kernel, "x", "y") == expected


def test_a_load_behind_the_store_of_its_element_forbids_to_share_memory() -> None:
    text = """kernel k(x: r f32[8,16], y: w f32[8,16]) { grid i < 8 { lanes j < 8 {
        y[i, j] = x[i, j] y[i, j + 8] = x[i, %s] } } }"""
    assert reads_before_writing(parse_kernel(text % "j + 8"), "x", "y")
    assert not reads_before_writing(parse_kernel(text % "j"), "x", "y")


@pytest.mark.parametrize("widths", [(16, 16, 16), (32, 32), (8, 8), (16, 32), (20, 20, 20, 20)])
def test_concatenations_are_computed_part_by_part(widths: tuple[int, ...]) -> None:
    n = gf.dim("N")
    parts = [gf.input(f"x{i}", (n, w)) for i, w in enumerate(widths)]
    first = gf.tanh(parts[0][:, :1])
    joined = gf.concatenate([gf.exp(p) * first for p in parts], 1)
    program = gf.function(parts, [joined, gf.grad((joined * joined).sum(), parts[0])])
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((7, w)).astype(np.float32) for w in widths]
    found = program(*arrays)
    expected = np.concatenate([np.exp(a) * np.tanh(arrays[0][:, :1]) for a in arrays], 1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_slices_is_a_concatenation() -> None:
    x = gf.input("x", (gf.dim("N"), 64))
    slope = gf.grad(sum((gf.tanh(x[:, i:i + 16]) * (i + 1.0)).sum() for i in range(0, 64, 16)), x)
    program = gf.function([x], slope)
    ops = [node.op for node in program.compilation.result("joint").nodes()]
    assert "concatenate" in ops and "pad" not in ops
    data = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    weights = np.repeat(np.arange(0, 64, 16) + 1.0, 16)
    np.testing.assert_allclose(program(data), weights / np.cosh(data.astype(np.float64)) ** 2, rtol=1e-4)
