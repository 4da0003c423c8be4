"""Tests made from the op table: every op, on each of its samples, in each element type, against an oracle."""
from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from oracles import ORACLES
from support import (
    directional,
    dtype_of,
    evaluate_lowering,
    float_dtypes,
    graph_of,
    make_operands,
    one_op,
    run_graph,
)

from graphflow.compiler.ir.graph import TensorType
from graphflow.compiler.ops import FAMILIES, OPS
from graphflow.compiler.ops.record import KINDS, REQUIRED, Failure, Op, Sample
from graphflow.compiler.passes.autodiff import gradients
from graphflow.compiler.plan.dtypes import F32, F64, DType
from graphflow.compiler.plan.errors import UserError

NO_GRADIENT = set("""
    input state constant array parameter training update check grad fused
    isnan isfinite eq ne lt le gt ge logical_and logical_or logical_not bit_and bit_or bit_xor shift_left
    shift_right stop_gradient reduce_any reduce_all argmax argmin argsort iota random_bits
""".split())
"""Ops whose results are no floats, that read none, or that stop gradients on purpose."""

NO_REFERENCE = set("input state parameter training grad scan cond while_loop custom_gradient fused".split())
"""Ops that the interpreter itself knows, or that an earlier stage replaces."""


def cases(wanted: Any = lambda op, sample: True, only_double: bool = False) -> list:
    """(op, name of the case, sample, float type) for every sample that is wanted."""
    out = []
    for op in OPS.values():
        for number, sample in enumerate(op.samples()):
            for dtype in [F64] if only_double else float_dtypes(sample):
                if wanted(op, sample):
                    name = f"{op.name}-{number}-{dtype}"
                    out.append(pytest.param(op, name, sample, dtype, id=name))
    return out


def failures() -> list:
    """(op, failure) for every failure of the table."""
    return [pytest.param(op, failure, id=f"{op.name}-{number}")
            for op in OPS.values() for number, failure in enumerate(op.failures)]


def tolerance(dtype: DType) -> dict[str, float]:
    return {"rtol": 2e-5, "atol": 2e-6} if dtype == F32 else {"rtol": 1e-12, "atol": 1e-12}


# --- the table itself

def test_names_are_unique() -> None:
    names = [op.name for family in FAMILIES for op in family.OPS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_record_is_complete(op: Op) -> None:
    assert op.doc.endswith(".") and op.kind in KINDS
    assert op.samples() or op.name in NO_REFERENCE | {"check"}
    assert (op.reference is None) == (op.name in NO_REFERENCE)
    assert op.failures or op.name in ("parameter", "training", "update")
    assert (op.gradient is None) == (op.name in NO_GRADIENT)


def test_every_reference_has_an_oracle() -> None:
    assert set(ORACLES) == {op.name for op in OPS.values() if op.samples()}


# --- values

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, name, sample, dtype", cases())
def test_value(op: Op, name: str, sample: Sample, dtype: DType, device: str) -> None:
    if op.kind == "effect" and device != "reference":
        pytest.skip("an effect has no value; programs with updates and checks are tested in test_runtime")
    arrays = make_operands(name, sample, dtype)
    b, inputs, node = one_op(op, arrays, sample.attrs)
    found = run_graph(graph_of(inputs, node.results), {f"x{i}": a for i, a in enumerate(arrays)}, device)
    with np.errstate(all="ignore"):
        expected = ORACLES[op.name](arrays, node.attrs)
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    assert len(found) == len(expected) == len(node.types)
    for result, oracle, type in zip(found.values(), expected, node.types):
        assert result.dtype == type.dtype.numpy and result.shape == type.shape
        assert np.shape(oracle) == type.shape
        if type.dtype.is_float:
            np.testing.assert_allclose(result, oracle, **tolerance(type.dtype))
        else:
            np.testing.assert_array_equal(result, np.asarray(oracle).astype(type.dtype.numpy))


@pytest.mark.parametrize("op, name, sample, dtype", cases(lambda op, sample: op.reference is not None))
def test_type_and_cost(op: Op, name: str, sample: Sample, dtype: DType) -> None:
    arrays = make_operands(name, sample, dtype)
    _, _, node = one_op(op, arrays, sample.attrs)
    with np.errstate(all="ignore"):
        results = [np.asarray(r) for r in op.reference(arrays, node.attrs, node.types)]
    assert [(r.dtype, r.shape) for r in results] == [(t.dtype.numpy, t.shape) for t in node.types]
    flops = op.flops(node)
    assert isinstance(flops, int) and flops >= 0


@pytest.mark.parametrize("op, name, sample, dtype", cases(lambda op, sample: op.lowering is not None))
def test_lowering(op: Op, name: str, sample: Sample, dtype: DType) -> None:
    arrays = make_operands(name, sample, dtype)
    _, _, node = one_op(op, arrays, sample.attrs)
    with np.errstate(all="ignore"):
        expected = op.reference(arrays, node.attrs, node.types)
    for number, (oracle, type) in enumerate(zip(expected, node.types)):
        found = evaluate_lowering(op, node, arrays, number)
        assert found.dtype == type.dtype.numpy
        np.testing.assert_allclose(found, oracle, **tolerance(type.dtype if type.dtype.is_float else F64))


# --- gradients

def compare_with_differences(op: Op, name: str, sample: Sample, device: str, order: int) -> None:
    """The derivative of a random functional of the op's float results (of their gradients, for order 2), in a
    random direction of all float operands, against a central difference."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + order)
    arrays = make_operands(name, sample, F64)
    b, inputs, node = one_op(op, arrays, sample.attrs)
    floats = [i for i, v in enumerate(inputs) if v.dtype.is_float]
    feeds = {f"x{i}": a for i, a in enumerate(arrays)}
    scalar, weights, leaves = directional(b, [v for v in node.results if v.dtype.is_float], rng, "u")
    feeds.update(weights)
    for _ in range(order - 1):
        firsts = gradients(b, scalar, [inputs[i] for i in floats])
        scalar, weights, more = directional(b, firsts, rng, "v")
        feeds.update(weights)
        leaves += more
    found = gradients(b, scalar, [inputs[i] for i in floats])
    graph = graph_of([*inputs, *leaves], [scalar, *found])
    outputs = list(run_graph(graph, feeds, device).values())
    directions = [rng.standard_normal(arrays[i].shape) for i in floats]

    def moved(by: float) -> float:
        shifted = {f"x{i}": arrays[i] + by * d for i, d in zip(floats, directions)}
        return float(run_graph(graph, {**feeds, **shifted}, device)["y0"])

    step = 1e-6
    difference = (moved(step) - moved(-step)) / (2 * step)
    derivative = sum(float(np.sum(g * d)) for g, d in zip(outputs[1:], directions))
    size = 1 + abs(float(outputs[0]))
    size += sum(float(np.sum(np.abs(g * d))) for g, d in zip(outputs[1:], directions))
    assert abs(derivative - difference) <= 1e-7 * size, (derivative, difference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, name, sample, dtype",
                         cases(lambda op, sample: op.gradient is not None and sample.smooth,
                               only_double=True))
def test_gradient(op: Op, name: str, sample: Sample, dtype: DType, device: str) -> None:
    compare_with_differences(op, name, sample, device, order=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, name, sample, dtype", cases(
    lambda op, sample: op.gradient is not None and sample.smooth and sample.second, only_double=True))
def test_second_gradient(op: Op, name: str, sample: Sample, dtype: DType, device: str) -> None:
    compare_with_differences(op, name, sample, device, order=2)


def gradient_at(op: str, *arrays: Any, **attrs: Any) -> list[np.ndarray]:
    """The gradient of the sum of the op's result by each operand."""
    values = [np.asarray(a, np.float64) for a in arrays]
    b, inputs, node = one_op(OPS[op], values, attrs)
    total = b.reduce_sum(node.result(), axes=tuple(range(node.types[0].rank)))
    graph = graph_of(inputs, gradients(b, total, inputs))
    return list(run_graph(graph, {f"x{i}": a for i, a in enumerate(values)}, "reference").values())


@pytest.mark.reference
def test_gradients_at_kinks() -> None:
    """The values that PyTorch and JAX take where there is no derivative."""
    equal = np.testing.assert_array_equal
    equal(gradient_at("maximum", [1.0, 2, 3], [2.0, 2, 2]), [[0, .5, 1], [1, .5, 0]])
    equal(gradient_at("minimum", [1.0, 2, 3], [2.0, 2, 2]), [[1, .5, 0], [0, .5, 1]])
    equal(gradient_at("relu", [-1.0, 0, 1]), [[0, 0, 1]])
    equal(gradient_at("abs", [-1.0, 0, 1]), [[-1, 0, 1]])
    equal(gradient_at("sign", [-1.0, 0, 1]), [[0, 0, 0]])
    equal(gradient_at("reduce_max", [[3.0, 1, 3, 2]], axes=(1,)), [[[.5, 0, .5, 0]]])
    equal(gradient_at("reduce_min", [[1.0, 1, 1, 1]], axes=(0, 1)), [[[.25] * 4]])
    equal(gradient_at("reduce_prod", [[2.0, 0, 3], [0, 0, 1], [2, 1, 3]], axes=(1,)),
          [[[0, 6, 0], [0, 0, 0], [3, 6, 2]]])


@pytest.mark.reference
def test_gradient_of_pow_at_zero() -> None:
    by_base, by_exponent = gradient_at("pow", [0.0, 0.0, 0.0, 2.0], [0.0, 1.0, 2.0, 0.0])
    np.testing.assert_array_equal(by_base, [0, 1, 0, 0])
    np.testing.assert_allclose(by_exponent, [0, 0, 0, np.log(2)], rtol=1e-15)


# --- what must be refused

@pytest.mark.parametrize("op, failure", failures())
def test_refused(op: Op, failure: Failure) -> None:
    types = [TensorType(dtype_of(arg, F32), arg.shape) for arg in failure.args]
    with pytest.raises((UserError, NotImplementedError)) as caught:
        op.infer(types, op.complete(failure.attrs), ())
    assert failure.message in str(caught.value)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_unknown_attribute_is_refused(op: Op) -> None:
    with pytest.raises(UserError, match="has no attribute 'axees'"):
        op.complete({"axees": 1})


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_missing_attributes_are_refused(op: Op) -> None:
    for name in (name for name, default in op.attrs.items() if default is REQUIRED):
        with pytest.raises(UserError, match=f"needs the attribute '{name}'"):
            op.complete({other: 0 for other in op.attrs if other != name})
