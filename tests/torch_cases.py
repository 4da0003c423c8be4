"""Comparison with PyTorch: many small cases in one program, values and gradients."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import graphflow as gf
from graphflow.compiler.ir.graph import topological
from graphflow.state import variables_in

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Of the largest magnitude of what is compared."""


class Case(NamedTuple):
    """What both must compute alike: `ours` from tensors, `theirs` from PyTorch's tensors and our parameters
    by name. Floats of `arrays` are differentiated by."""
    name: str
    arrays: Sequence[np.ndarray]
    ours: Callable[..., gf.Tensor]
    theirs: Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_near(found: Any, expected: Any, tolerance: float, what: str) -> None:
    assert found.shape == tuple(expected.shape), f"{what}: {found.shape} and {tuple(expected.shape)}"
    if found.size:
        size = max(float(np.abs(expected).max()), 1e-3)          # what is 0 but for rounding is so in both
        error = float(np.abs(found.astype(np.float64) - expected).max()) / size
        assert error <= tolerance, f"{what} is off by {error:.3g} of its largest magnitude"


def parameters_of(y: gf.Tensor) -> list[gf.Tensor]:
    return [v.tensor for v in variables_in(topological([y.value.node])) if v.role == "parameter"]


def compare(cases: Sequence[Case], dtype: str, training: bool = True, device: str = "cpu") -> None:
    """Runs all cases as one program, and each with PyTorch in float64 from the same numbers. Compared are the
    results and the gradients of Σ result · weight by every float input and every parameter."""
    assert len({case.name for case in cases}) == len(cases)
    inputs: list[gf.Tensor] = []
    feeds: list[np.ndarray] = []
    outputs: dict[str, gf.Tensor] = {}
    for case in cases:
        arrays = [a.astype(dtype) if a.dtype.kind == "f" else a for a in case.arrays]
        xs = [gf.input(f"{case.name}_{i}", a.shape, a.dtype) for i, a in enumerate(arrays)]
        with gf.scope(case.name):
            y = case.ours(*xs)
        weight = gf.input(f"{case.name}_weight", y.shape, y.dtype)
        floats = [x for x in xs if x.dtype.is_float]
        slopes = gf.grad(gf.sum(y * weight), [*floats, *parameters_of(y)])
        inputs += [*xs, weight]
        feeds += [*arrays, normal(*(int(d) for d in y.shape), seed=9).astype(dtype)]
        outputs.update({f"{case.name}.{i}": t for i, t in enumerate([y, *slopes])})
    program = gf.function(inputs, outputs, training=training, device=device)
    for name in program.store.names("parameter"):
        value = program.store[name]
        if value.size and np.all(value == value.flat[0]):          # scales of 1 and biases of 0 hide mistakes
            program.store[name] = (value + 0.3 * normal(*value.shape)).astype(value.dtype)
    before = {name: np.array(program.store[name]) for name in program.store}
    results = program(*feeds)
    fed = dict(zip(program.inputs, feeds))
    for case in cases:
        _compare_one(case, fed, before, results, TOLERANCE[dtype])


def _compare_one(case: Case, fed: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray],
                 results: Mapping[str, np.ndarray], tolerance: float) -> None:
    import torch
    xs = [torch.tensor(fed[f"{case.name}_{i}"].astype(np.float64) if a.dtype.kind == "f" else a)
          for i, a in enumerate(case.arrays)]
    prefix = f"{case.name}/"
    parameters = {name.removeprefix(prefix): torch.tensor(value.astype(np.float64))
                  for name, value in state.items() if name.startswith(prefix)}
    y = case.theirs(*(x.requires_grad_() if x.is_floating_point() else x for x in xs),
                    **{name.split(".", 1)[1] if "." in name else name: p.requires_grad_()
                       for name, p in parameters.items()})
    names = [f"d x{i}" for i, x in enumerate(xs) if x.requires_grad] + [f"d {name}" for name in parameters]
    leaves = [*(x for x in xs if x.requires_grad), *parameters.values()]
    weight = torch.tensor(fed[f"{case.name}_weight"].astype(np.float64))
    slopes = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    expected = [(f"{case.name}: {n}", s) for n, s in zip(names, slopes) if s is not None]
    assert_near(results[f"{case.name}.0"], y.detach().numpy(), tolerance, case.name)
    for i, (what, slope) in enumerate(expected, 1):
        assert_near(results[f"{case.name}.{i}"], slope.numpy(), tolerance, what)
    assert f"{case.name}.{len(expected) + 1}" not in results
