"""The text form of the tensor graph: exact both ways, and clear about what it cannot read."""
from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from nets import Net

from graphflow.compiler.driver import NAMES, Compilation
from graphflow.compiler.ir.builder import Builder
from graphflow.compiler.ir.check import STAGES, check_graph
from graphflow.compiler.ir.graph import Graph, Guard, Node, Region, TensorType, Value
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.plan.dims import symbol
from graphflow.compiler.plan.dtypes import BOOL, DTYPES, F32, F64, I32, I64, U8
from graphflow.compiler.plan.errors import Location, TextError
from graphflow.compiler.target import host_target

N = symbol("N")


def same(graph: Graph) -> str:
    """The text, after it was read and printed again to the same."""
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text
    return text


def graph_of(*values: Value) -> Graph:
    return Graph("g", (), {f"y{i}": v for i, v in enumerate(values)})


def convolutional() -> Graph:
    net = Net()
    x, y = net.input("x", (1, 8, 8)), net.input("y", (), I64)
    h = net.pool(net.b.relu(net.conv(x, "first", 2, 3)))
    z = net.dense(net.b.reshape(h, shape=(N, 18)), "last", 4)
    loss = net.cross_entropy(z, y)
    net.momentum(loss)
    return Graph("step", tuple(net.inputs), {"loss": loss}, tuple(net.effects))


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage in NAMES])
def test_every_stage_is_exact(stage: str) -> None:
    text = same(Compilation(convolutional(), host_target()).result(stage))
    assert ("= fused(" in text) == (stage in ("fuse", "schedule"))
    assert ("= grad(" in text) == (stage in ("trace", "canonical", "stable"))


def test_a_whole_text() -> None:
    b = Builder()
    with b.origin([Location("a b.py", 3, "layer", 4, 9)]):
        x = b.input(name="x", dtype=F32, shape=(N, 4 * symbol("M"), 2))
    with b.origin([Location("net.py", 12), Location("a b.py", 3, "layer", 4, 9)]):
        image = b.reshape(x, shape=(N, 1, 4 * symbol("M"), 2))
        found, where = b.max_pool(image, window=(2, 2), stride=(2, 2))
    guard = Guard(N * symbol("M"), 4 * symbol("M"), Location("net.py", 12))
    text = same(Graph("my step", (x,), {"top": found, "odd name": where}, (), (guard,)))
    assert text == '''\
graph "my step"
%0 = input {name="x", dtype=f32, shape=[N, 4*M, 2]} : f32[N,4*M,2] #1
%1 = reshape(%0) {shape=[N, 1, 4*M, 2]} : f32[N,1,4*M,2] #2,1
%2, %3 = max_pool(%1) {window=[2, 2], stride=[2, 2]} : f32[N,1,2*M,1], i32[N,1,2*M,1] #2,1
inputs %0
output top = %2
output "odd name" = %3
guard M*N == 4*M #2
#1 "a b.py" 3 columns 4:9 in "layer"
#2 "net.py" 12
'''


FLOATS = [0.0, -0.0, 1.0, 0.1, 1e-45, -1e308, 2.0 ** 70, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("value", FLOATS)
def test_floats_are_exact(value: float) -> None:
    b = Builder()
    node = parse_graph(same(graph_of(b.constant(value, F64)))).nodes()[0]
    found = node.attrs["value"]
    assert isinstance(found, float)
    assert math.isnan(found) if math.isnan(value) else found.hex() == value.hex()


@pytest.mark.parametrize("value, dtype", [(True, BOOL), (False, BOOL), (-3, I32), (2 ** 62, I64), (255, U8)])
def test_whole_numbers_are_exact(value: int, dtype: object) -> None:
    node = Builder().node("constant", (), {"value": value, "dtype": dtype})
    found = parse_graph(same(graph_of(node.result()))).nodes()[0].attrs["value"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", ["x", "tab\t", 'quo"te', "back\\slash", "é 漢", "", "line\nend", "f32"])
def test_strings_are_exact(name: str) -> None:
    b = Builder()
    with b.origin([Location(name, 1, name)]):
        x = b.input(name=name, dtype=F32, shape=())
    graph = parse_graph(same(Graph(name, (x,), {name: x})))
    (node,) = graph.nodes()
    assert node.attrs["name"] == graph.name == node.origins[0].file == node.origins[0].scope == name
    assert list(graph.outputs) == [name]


def test_bytes_types_and_layouts_are_exact() -> None:
    b = Builder()
    data = bytes(range(16))
    a = b.array(data=data, dtype=F32, shape=(2, 2))
    laid = Node("neg", (a,), {}, (), (TensorType(F32, (2, 2), "nhwc+1"),)).result()
    graph = parse_graph(same(graph_of(laid, *(b.constant(1, d) for d in DTYPES.values()))))
    found = graph.outputs["y0"]
    assert found.type == laid.type and found.node.inputs[0].node.attrs["data"] == data


def test_locations_are_exact() -> None:
    places = [Location("f.py", 1), Location("f.py", 1, "s"), Location("f.py", 1, "", 0, 5),
              Location("f.py", 2, "", 3)]
    b = Builder()
    with b.origin(places):
        x = b.constant(1, F32)
    assert parse_graph(same(graph_of(x))).nodes()[0].origins == tuple(places)


def test_regions() -> None:
    b, inner = Builder(), Builder()
    x = b.input(name="x", dtype=F32, shape=(5, N))
    with inner.origin([Location("f.py", 1), Location("f.py", 2)]):
        total, row = inner.parameter(TensorType(F32, (N,)), 0), inner.parameter(TensorType(F32, (N,)), 1)
    after = inner.add(total, row)
    body = Region((total, row), (after, inner.exp(after)))
    start = b.zeros(TensorType(F32, (N,)))
    scan = b.node("scan", (start, x), {"length": 5, "carries": 1, "steps": 1}, [body])
    graph = Graph("g", (x,), {"last": scan.result(0), "all": scan.result(1)})
    text = same(graph)
    check_graph(parse_graph(text.replace(" #1,2", "")), "trace")
    assert "{\n  (%5: f32[N] #1,2, %6: f32[N] #1,2)\n  %7 = add(%5, %6) : f32[N]\n" in text
    assert "\n  return %7, %8\n}" in text


def test_a_guard_without_a_line_before_the_table() -> None:
    b = Builder()
    with b.origin([Location("f.py", 1)]):
        x = b.input(name="x", dtype=F32, shape=(N, symbol("M")))
    graph = parse_graph(same(Graph("g", (x,), {"x": x}, (), (Guard(N, symbol("M")),))))
    assert graph.guards == (Guard(N, symbol("M")),) and graph.nodes()[0].origins == (Location("f.py", 1),)


def test_without_origins_equal_programs_have_equal_texts() -> None:
    texts = []
    for line in (1, 2):
        b = Builder()
        with b.origin([Location("f.py", line)]):
            texts.append(graph_of(b.constant(1, F32)))
    assert print_graph(texts[0]) != print_graph(texts[1])
    assert print_graph(texts[0], origins=False) == print_graph(texts[1], origins=False)
    assert "f.py" not in print_graph(texts[0], origins=False)


START = 'graph g\n%0 = input {name="x", dtype=f32, shape=[2]} : f32[2]\n'


@pytest.mark.parametrize("text, message", [
    ("", "line 1, column 1: expected 'graph', found 'the end'"),
    (START + "%1 = nonsense(%0) : f32[2]", "line 3, column 6: expected the name of an op, found 'nonsense'"),
    (START + "%0 = neg(%0) : f32[2]", "%0 has a value already"),
    (START + "%1 = neg(%7) : f32[2]", "%7 is not defined"),
    (START + "%1 = neg(%0 : f32[2]", "line 3, column 13: expected ',', found ':'"),
    (START + "%1 = neg(%0) : f99[2]", "expected an element type"),
    (START + "%1 = neg(%0)", "expected ':', found 'the end'"),
    (START + "%1 = neg(%0) {size=3} : f32[2]", "neg has no attribute 'size'"),
    (START + "%1 = cast(%0) : f32[2]", "cast needs the attribute 'dtype'"),
    (START + "%1 = pad(%0) {low=[0], low=[0]} : f32[2]", "the attribute 'low' stands here twice"),
    (START + "%1, %2 = neg(%0) : f32[2]", "expected 2 result type(s) of neg, found 1"),
    (START + "%1 = neg(%0) : f32[2] #1", "the table of locations has no #1"),
    (START + "%1 = neg(%0) : f32[2]\noutput a = %1\noutput a = %0", "a second output named 'a'"),
    (START + "%1 = fused(%0) {kind=\"map\"} : f32[2] {\n(%2: f32[2])\n%3 = neg(%0) : f32[2]\nreturn %3\n}",
     "line 5, column 12: %0 lies outside this body"),
    (START + "%1 = fused(%0) {kind=\"map\"} : f32[2] {\n(%2: f32[2])\n", "expected 'return'"),
    (START + "inputs %0\n%1 = neg(%0) : f32[2]", "line 4, column 1: expected the end, found '%'"),
    (START + "#1 \"f.py\" 3\n#1 \"f.py\" 4", "the location #1 stands here twice"),
])
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(TextError) as error:
        parse_graph(text)
    assert message in str(error.value)


def test_cut_and_garbled_texts_raise_nothing_else() -> None:
    """Every prefix, and every text with one token gone, reads or raises TextError."""
    text = print_graph(convolutional())[:1500]
    tokens = re.findall(r"\s+|[\w.]+|.", text)
    for i in range(0, len(tokens), 3):
        for garbled in ("".join(tokens[:i]), "".join(tokens[:i] + tokens[i + 1:])):
            try:
                parse_graph(garbled)
            except TextError:
                continue


def test_the_grammars_example_is_valid() -> None:
    page = (Path(__file__).parents[1] / "docs" / "graph-grammar.md").read_text(encoding="utf-8")
    example = page.split("```text\n")[1].split("```")[0]
    graph = parse_graph(example)
    check_graph(graph, "trace")
    assert print_graph(graph) == example
