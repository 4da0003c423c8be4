"""Whole programs through every stage: text, values, memory, bits, and what a native call does."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networkx
import numpy as np
import pytest
from nets import lenet_step, mlp_step, values_for
from support import native_program

from graphflow.compiler.driver import NAMES, Compilation, compile_program, parse_stage, print_stage
from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.plan.errors import UseError
from graphflow.compiler.plan.schema import Launch
from graphflow.compiler.target import host_target
from graphflow.examples import digits, lenet, mlp, softmax_regression, xor
from graphflow.runtime.measure import measure_arena

READABLE = [name for name in NAMES if name != "emit"]
EXAMPLES = (digits, lenet, mlp, softmax_regression, xor)


def example_graphs() -> list:
    """Every program of every example."""
    found = []
    for module in EXAMPLES:
        model = module.build()
        for program in (model.step, model.evaluation, model.prediction):
            name = module.__name__.rsplit(".", 1)[1]
            found.append(pytest.param(program.traced, id=f"{name}-{program.name}"))
    return found


@pytest.mark.parametrize("graph", example_graphs())
def test_every_stage_reads_back_what_it_prints(graph: Graph) -> None:
    compilation = Compilation(graph, host_target())
    for stage in READABLE:
        text = compilation.text(stage)
        assert print_stage(parse_stage(text, stage)) == text, stage
    assert compilation.text("emit").count("define ") > 1


@pytest.mark.parametrize("stage", [name for name in READABLE if name != "plan"])
def test_compilation_starts_from_any_stage(stage: str) -> None:
    whole = Compilation(mlp_step(), host_target())
    resumed = Compilation.resume(whole.text(stage), stage)
    assert resumed.text("emit") == whole.text("emit")
    if stage != NAMES[0]:
        with pytest.raises(UseError, match="starts from"):
            resumed.text(NAMES[0])


def test_dump_writes_every_stage(tmp_path: Path) -> None:
    written = Compilation(mlp_step(), host_target()).dump(tmp_path)
    names = {p.name for p in written}
    assert {f"{i + 1:02}.{s}.{'ll' if s == 'emit' else 'txt'}" for i, s in enumerate(NAMES)} <= names
    assert {"13.refusals.txt", "14.kernels.cu", "15.assembly.s"} <= names
    assert "__global__" in (tmp_path / "14.kernels.cu").read_text()
    graph = networkx.read_graphml(tmp_path / "05.joint.graphml")
    assert any(data["op"] == "update" for _, data in graph.nodes(data=True))


@pytest.mark.reference
@pytest.mark.parametrize("stage", ["lower", "tile", "memory"])
@pytest.mark.parametrize("make, n", [(mlp_step, 5), (lenet_step, 2)], ids=["mlp", "lenet"])
def test_kernels_compute_what_the_graph_says(make: Callable[[], Graph], n: int, stage: str) -> None:
    graph = make()
    feeds, state = values_for(graph, n)
    compilation = Compilation(graph, host_target())
    outputs, updates = interpret(compilation.result("autodiff"), feeds, state)
    found, states, peak = run_program(compilation.result(stage), feeds, state, {"N": n})
    for name, expected in {**outputs, **updates}.items():
        value = found[name] if name in found else states[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert peak > 0


@pytest.mark.cpu
@pytest.mark.parametrize("make", [mlp_step, lenet_step], ids=["mlp", "lenet"])
def test_one_program_serves_every_batch_with_the_planned_memory(make: Callable[[], Graph]) -> None:
    """The peak is measured: the call runs in an arena of just the planned size between canaries, and the
    bytes that it touches are counted; then with canaries around every buffer."""
    graph = make()
    program = native_program(graph)
    reference = Compilation(graph, host_target()).result("autodiff")
    for n in (1, 17, 64):
        feeds, state = values_for(graph, n)
        for name, value in state.items():
            program.store[name] = value
        arrays = [feeds[v.node.attrs["name"]] for v in graph.inputs]
        found = measure_arena(program, arrays)
        assert found.overruns == ()
        assert found.measured_bytes == found.planned_bytes == program.peak_bytes({"N": n})
        loss = program.run(arrays)[0]
        outputs, updates = interpret(reference, feeds, state)
        np.testing.assert_allclose(loss, outputs["loss"], rtol=1e-5)
        for name, expected in updates.items():          # a sum errs by its summands, not by itself
            near = 1e-5 * max(1, np.abs(expected).max(initial=0))
            np.testing.assert_allclose(program.store[name], expected, rtol=1e-4, atol=near, err_msg=name)


@pytest.mark.cpu
@pytest.mark.parametrize("make", [mlp_step, lenet_step], ids=["mlp", "lenet"])
def test_bits_are_the_same_every_run_and_for_any_number_of_threads(make: Callable[[], Graph]) -> None:
    graph = make()
    feeds, state = values_for(graph, 37)
    arrays = [feeds[v.node.attrs["name"]] for v in graph.inputs]
    seen = set()
    for threads in (1, 2, 2, 3):
        program = native_program(graph, threads)
        for name, value in state.items():
            program.store[name] = value
        bits = [program.run(arrays)[0].tobytes() for _ in range(3)]
        seen.add(b"".join([*bits, *(program.store[name].tobytes() for name in state)]))
    assert len(seen) == 1


@pytest.mark.cpu
def test_one_native_call_is_the_whole_step() -> None:
    """Nothing of the optimizer runs in Python: the bare C entry moves every parameter and slot as the
    reference does."""
    graph = mlp_step()
    program = native_program(graph)
    feeds, state = values_for(graph, 8)
    for name, value in state.items():
        program.store[name] = value
    arrays = [feeds[v.node.attrs["name"]] for v in graph.inputs]
    bound = program._bound_for(arrays)
    program.fill_feeds(bound.table, arrays)
    loss = np.empty((), np.float32)
    (place, _, _), = bound.outputs
    bound.table[place] = loss.ctypes.data
    assert program.execute(bound) == 0
    outputs, updates = interpret(Compilation(graph, host_target()).result("autodiff"), feeds, state)
    np.testing.assert_allclose(loss, outputs["loss"], rtol=1e-5)
    for name, expected in updates.items():
        assert not np.array_equal(expected, state[name])
        np.testing.assert_allclose(program.store[name], expected, rtol=1e-4, atol=1e-6)


def test_prediction_holds_no_optimizer() -> None:
    model = lenet.build()
    step, predict = model.step.compilation, model.prediction.compilation
    assert step.text("trace").count('role="slot"') == 17
    assert all('update' in step.text(stage) for stage in ("trace", "fuse", "schedule"))
    assert "slot" not in predict.text("trace") and "update" not in predict.text("trace")
    assert predict.result("plan").written == ()
    assert not any(b.name.endswith(".mean") for b in predict.result("plan").buffers)
    assert any(b.name.endswith(".mean") for b in step.result("plan").buffers)


def test_equal_kernels_are_emitted_once() -> None:
    plan = Compilation(lenet_step(), host_target()).result("plan")
    launches = [item.kernel for item in plan.body if isinstance(item, Launch)]
    program = Compilation(lenet_step(), host_target()).result("memory")
    assert set(launches) == set(program.kernels)


@pytest.mark.cpu
def test_the_second_compilation_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHFLOW_CACHE", str(tmp_path / "cache"))
    first, second = compile_program(mlp_step()), compile_program(mlp_step())
    assert (first.cached, second.cached) == (False, True)
    assert first.object_code == second.object_code and first.plan == second.plan
    other = compile_program(mlp_step(batch=4))
    assert not other.cached


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(UseError, match="there is no stage 'fused'"):
        Compilation(mlp_step(), host_target()).result("fused")
