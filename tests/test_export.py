"""Graphs handed to graph tools."""
from __future__ import annotations

from pathlib import Path

import networkx
import pytest
from nets import Net

from graphflow.compiler.driver import Compilation
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.export import program_to_networkx, to_graphml, to_networkx
from graphflow.compiler.ir.graph import Graph
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import F32, I64
from graphflow.compiler.plan.errors import Location
from graphflow.compiler.target import host_target


@pytest.fixture(scope="module")
def compilation() -> Compilation:
    net = Net()
    x, y = net.input("x", (3,)), net.input("y", (), I64)
    loss = net.cross_entropy(net.dense(net.b.relu(net.dense(x, "a", 5)), "b", 4), y)
    net.momentum(loss)
    return Compilation(Graph("step", tuple(net.inputs), {"loss": loss}, tuple(net.effects)), host_target())


def test_vertices_and_edges() -> None:
    b = Builder()
    with b.origin([Location("model.py", 3, "layer")]):
        x = b.input(name="x", dtype=F32, shape=(symbol("N"), 2))
    y = b.sub(x, b.mul(x, x))
    found = to_networkx(Graph("g", (x,), {"y": y}))
    assert found.nodes[0] == {"op": "input", "shape": "N,2", "dtype": "f32", "line": "model.py:3",
                              "scope": "layer", "label": "input x\nf32[N,2]", "ops": "", "outputs": ""}
    assert found.nodes[2]["outputs"] == "y" and found.nodes[2]["line"] == ""
    assert list(found.edges(data="operands")) == [(0, 1, "0,1"), (0, 2, "0"), (1, 2, "1")]


@pytest.mark.parametrize("stage", ["trace", "autodiff", "fuse"])
def test_every_stage_is_a_dag_with_all_nodes(compilation: Compilation, stage: str) -> None:
    graph = compilation.result(stage)
    found = to_networkx(graph)
    assert networkx.is_directed_acyclic_graph(found) and len(found) == len(graph.nodes())
    assert found.number_of_edges() == sum(len({v.node for v in n.inputs}) for n in graph.nodes())
    fused = [d["ops"].split() for _, d in found.nodes(data=True) if d["op"] == "fused"]
    assert bool(fused) == (stage == "fuse") and all(fused)


def test_graphml_is_read_back(compilation: Compilation, tmp_path: Path) -> None:
    to_graphml(compilation.result("fuse"), str(tmp_path / "g.graphml"))
    found, wanted = networkx.read_graphml(tmp_path / "g.graphml"), to_networkx(compilation.result("fuse"))
    labels = {str(n): label for n, label in wanted.nodes(data="label")}
    assert dict(found.nodes(data="label")) == labels
    assert len(found.edges) == len(wanted.edges)


def test_kernel_programs(compilation: Compilation) -> None:
    program = compilation.result("memory")
    found = program_to_networkx(program)
    assert len(found) == len(program.plan.buffers) + len(program.plan.body)
    kinds = {kind for _, kind in found.nodes(data="kind")}
    assert {"feed", "state", "output", "launch"} <= kinds
    for b in program.plan.buffers:
        if b.role == "output" or b.id in program.plan.written:
            assert found.in_degree(b.id) > 0
        if b.role == "feed":
            assert found.in_degree(b.id) == 0 and found.out_degree(b.id) > 0
    assert {kernel for _, kernel in found.nodes(data="kernel") if kernel} == set(program.kernels)
