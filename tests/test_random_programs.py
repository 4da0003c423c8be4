"""Random graphs through every stage down to native code: the kernels' interpreter, one and two threads, and
the reference agree; the memory in use is what was planned."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from random_graphs import Case, random_case
from support import loaded_program

from graphflow.compiler.driver import Compilation
from graphflow.compiler.interpret import bind_symbols, interpret
from graphflow.compiler.ir.text import print_graph
from graphflow.compiler.kernel.run import run_program
from graphflow.compiler.target import host_target
from graphflow.runtime.measure import measure_arena

SEEDS = range(300)

def expected(case: Case, compilation: Compilation) -> dict[str, np.ndarray]:
    """Outputs and new states by the reference, on the graph that autodiff expanded."""
    outputs, updates = interpret(compilation.result("autodiff"), case.feeds, case.state)
    return {**outputs, **{f"update of {name}": value for name, value in updates.items()}}


def agree(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], case: Case, seed: int) -> None:
    """Within what another order of summation and another exp may change; the graph's text is shown where
    not."""
    for name, value in wanted.items():
        try:
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            scale = np.max(np.abs(value[np.isfinite(value)]), initial=1.0) if value.dtype.kind == "f" else 1.0
            np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5 * scale)
        except AssertionError as error:
            text = print_graph(case.graph, origins=False)
            raise AssertionError(f"seed {seed}, {name}: {error}\n{text}") from None


@pytest.mark.cpu
@pytest.mark.parametrize("seed", SEEDS)
def test_kernels_and_native_code_agree_with_the_reference(seed: int) -> None:
    case = random_case(seed)
    compilation = Compilation(case.graph, host_target())
    wanted = expected(case, compilation)
    symbols = bind_symbols(case.graph, case.feeds)
    for stage in ("lower", "tile", "memory"):
        outputs, states, _ = run_program(compilation.result(stage), case.feeds, case.state, symbols)
        updates = {f"update of {name}": states[name] for name in case.graph.updates()}
        agree({**outputs, **updates}, wanted, case, seed)
    plan, code, bits = compilation.result("plan"), compilation.object_code(), []
    for threads in (1, 2):
        program = loaded_program(plan, code, threads)
        arrays = [np.asarray(case.feeds[v.node.attrs["name"]], order="C") for v in case.graph.inputs]
        for name in case.graph.states():
            if name in program.store:                         # what nothing needs is gone
                program.store[name] = case.state[name]
        if threads == 2:
            measured = measure_arena(program, arrays)
            assert measured.overruns == ()
        outputs = dict(zip(case.graph.outputs, program.run(arrays)))
        updates = {f"update of {name}": program.store[name] for name in case.graph.updates()}
        found = {**outputs, **updates}
        agree(found, wanted, case, seed)
        bits.append({name: value.tobytes() for name, value in found.items()})
    assert bits[0] == bits[1], f"seed {seed}: one and two threads give other bits"
