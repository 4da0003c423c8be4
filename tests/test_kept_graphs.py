"""Graphs that once failed, found by random search and shrunk: native code agrees with the reference on
them."""
from __future__ import annotations

import numpy as np
import pytest
from support import native_program

from graphflow.compiler.interpret import interpret
from graphflow.compiler.ir.text import parse_graph
from graphflow.compiler.plan.dims import evaluate

KEPT = {
    "lanes that want two pieces of memory with a gap between": '''\
graph gap
%0 = input {name="x", dtype=f32, shape=[3]} : f32[3]
%1 = pad(%0) {low=[0], high=[33], interior=[0], value=0.25} : f32[36]
%2 = reshape(%1) {shape=[1, 1, 3, 4, 3]} : f32[1,1,3,4,3]
%3 = window_sum(%2) {window=[2, 2, 3], stride=[1, 2, 3]} : f32[1,1,2,2,1]
inputs %0
output y = %3
''',
    "lanes that share an element which only one of them wants": '''\
graph shared
%0 = input {name="x", dtype=f32, shape=[40]} : f32[40]
%1 = pad(%0) {low=[0], high=[0], interior=[1], value=2.0} : f32[79]
%2 = reduce_sum(%1) {axes=[0]} : f32[]
inputs %0
output y = %2
''',
    "the place of the least of nothing": '''\
graph nothing
%0 = input {name="x", dtype=f32, shape=[2, N]} : f32[2,N]
%1 = argmin(%0) {axis=1} : i64[2]
%2 = argmax(%0) {axis=1} : i64[2]
inputs %0
output least = %1
output largest = %2
''',
}


@pytest.mark.cpu
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT.keys())
def test_kept_graph(text: str, n: int) -> None:
    graph = parse_graph(text)
    rng = np.random.default_rng(n)
    feeds = {}
    for v in graph.inputs:
        shape = [evaluate(d, {"N": n}) for d in v.shape]
        feeds[v.node.attrs["name"]] = rng.normal(size=shape).astype(v.dtype.numpy)
    wanted, _ = interpret(graph, feeds, {})
    found = native_program(graph, 1).run(list(feeds.values()))
    assert len(found) == len(wanted) > 0
    for value, oracle in zip(found, wanted.values()):
        np.testing.assert_allclose(value, oracle, rtol=1e-6, atol=1e-6)
