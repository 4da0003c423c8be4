"""Dimensions against Python's own integers: the canonical form changes how an expression looks, never its
value."""
from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from graphflow.compiler.plan.dims import (
    Dim,
    DimLike,
    bounds_of,
    ceildiv,
    evaluate,
    floordiv,
    parse_dim,
    product,
    simplify,
    substitute,
    symbol,
    symbols_of,
)
from graphflow.compiler.plan.errors import GraphflowError

N, T, K = symbol("N"), symbol("T"), symbol("K")
NAMES = ("N", "T", "i.0", "batch_size")
CASES = 3000
Plain = Callable[[dict[str, int]], int]


def random_expression(rng: random.Random, depth: int) -> tuple[DimLike, Plain]:
    """A dimension, and the same expression as a function of its symbols made of Python's operators only."""
    if depth == 0 or rng.random() < 0.15:
        if rng.random() < 0.6:
            name = rng.choice(NAMES)
            return symbol(name), lambda values: values[name]
        constant = rng.randint(-6, 12)
        return constant, lambda values: constant
    left, f = random_expression(rng, depth - 1)
    kind = rng.choice("+-*/%n")
    if kind == "n":
        return -left, lambda values: -f(values)
    if kind in "/%":
        by = rng.choice((1, 2, 3, 4, 6, 8, 12))
        if kind == "/":
            return floordiv(left, by), lambda values: f(values) // by
        return left % by, lambda values: f(values) % by
    right, g = random_expression(rng, depth - 1)
    if kind == "+":
        return left + right, lambda values: f(values) + g(values)
    if kind == "-":
        return left - right, lambda values: f(values) - g(values)
    return left * right, lambda values: f(values) * g(values)


def expressions(seed: int) -> list[tuple[DimLike, Plain, dict[str, int], random.Random]]:
    """Many random expressions, each with random values of the symbols."""
    rng = random.Random(seed)
    out = []
    for _ in range(CASES):
        d, f = random_expression(rng, rng.randint(1, 4))
        out.append((d, f, {name: rng.randint(0, 40) for name in NAMES}, rng))
    return out


def test_arithmetic_is_pythons() -> None:
    for d, f, values, _ in expressions(1):
        assert evaluate(d, values) == f(values), d


def test_what_is_printed_is_read_back() -> None:
    for d, _, _, _ in expressions(2):
        again = parse_dim(str(d))
        assert again == d and str(again) == str(d) and hash(again) == hash(d)


def test_simplify_keeps_the_value_within_the_bounds() -> None:
    shorter = 0
    for d, f, values, rng in expressions(3):
        bounds = {name: (max(0, v - rng.randint(0, 3)), v + rng.randint(0, 3)) for name, v in values.items()}
        simple = simplify(d, bounds)
        shorter += len(str(simple)) < len(str(d))
        assert evaluate(simple, values) == f(values), (d, simple, bounds)
    assert shorter > CASES / 50


def test_bounds_hold() -> None:
    for d, f, values, rng in expressions(4):
        bounds = {name: (rng.randint(0, v), rng.choice((None, v + rng.randint(0, 9)))) for name,
                  v in values.items()}
        low, high = bounds_of(d, bounds)
        assert (low is None or low <= f(values)) and (high is None or f(values) <= high), (d, bounds)


def test_substitution_is_evaluation_in_two_steps() -> None:
    for d, f, values, rng in expressions(5):
        moved = {"N": symbol("K") + 1, "T": 7}
        with_k = {**values, "K": rng.randint(0, 20)}
        expected = f({**values, "N": with_k["K"] + 1, "T": 7})
        assert evaluate(substitute(d, moved), with_k) == expected
        assert symbols_of(substitute(d, moved)) <= symbols_of(d) - {"N", "T"} | {"K"}


def test_ceildiv_rounds_up() -> None:
    for d, f, values, rng in expressions(6):
        by = rng.randint(1, 9)
        assert evaluate(ceildiv(d, by), values) == -(-f(values) // by)


@pytest.mark.parametrize("left, right", [
    (T * N, N * T),
    ((N + T) * (N - T), N * N - T * T),
    (floordiv(2 * N + 2, 2), N + 1),
    (floordiv(4 * N + 6, 4), N + 1),
    (floordiv(N, 3) * 3 + N % 3, N),
    (T * (N % 8) + 8 * T * floordiv(N, 8), T * N),
    (floordiv(floordiv(N, 2), 3), floordiv(N, 6)),
    ((N % 12) % 4, N % 4),
    ((4 * N + 3) % 4, 3),
    (floordiv(N + 8, 4), floordiv(N, 4) + 2),
    (floordiv(2 * N, 4), floordiv(N, 2)),
    (floordiv(6 * N + 5, 12), floordiv(N, 2)),
    ((6 * N + 5) % 12, 6 * (N % 2) + 5),
    (floordiv(4 * floordiv(N, 2), 8), floordiv(N, 4)),
    (-N + N, 0),
    (N - (N - 1), 1),
    (product([N, 2, T]), 2 * (N * T)),
    (product([]), 1),
    ((N + 1) % 1, 0),
])
def test_equal_dimensions_have_one_form(left: DimLike, right: DimLike) -> None:
    assert left == right and str(left) == str(right) and hash(left) == hash(right)
    assert isinstance(left, Dim) == isinstance(right, Dim)


@pytest.mark.parametrize("left, right", [
    (N, T), (N, 2 * N), (N, N + 1), (floordiv(N, 2), floordiv(N, 3)), (N % 2, N % 4), (floordiv(N, 2) * 2, N),
    (floordiv(N + 1, 2), floordiv(N, 2)), (N, 1), (N * N, N),
])
def test_different_dimensions_differ(left: DimLike, right: DimLike) -> None:
    assert left != right and str(left) != str(right)


@pytest.mark.parametrize("d, bounds, simple", [
    (N % 8, {"N": (0, 7)}, N),
    (floordiv(N, 8), {"N": (8, 15)}, 1),
    (floordiv(8 * N + T, 8), {"T": (0, 7)}, N),
    ((8 * N + T) % 8, {"T": (0, 7)}, T),
    (floordiv(T + 8 * N + 8, 4), {"T": (0, 3)}, 2 * N + 2),
    (floordiv(floordiv(12 * N + T, 4), 3), {"T": (0, 11)}, N),
    (N % 8, {}, N % 8),
    (floordiv(N - 1, 4), {"N": (0, 3)}, floordiv(N - 1, 4)),
])
def test_simplify(d: DimLike, bounds: dict, simple: DimLike) -> None:
    assert simplify(d, bounds) == simple


@pytest.mark.parametrize("text, printed", [
    ("N*T", "N*T"), ("T * N", "N*T"), ("2+N", "N + 2"), ("-N + 3", "-N + 3"), ("(N + 1)//2", "(N + 1)//2"),
    ("((N)%4*2)", "2*(N)%4"), ("7", "7"), ("N//2%3", "((N)//2)%3"),
])
def test_printed_form(text: str, printed: str) -> None:
    assert str(parse_dim(text)) == printed


@pytest.mark.parametrize("text, message", [
    ("N +", "where a number"), ("(N + 1", "')' is missing"), ("N // T", "needs a constant"),
                                           ("N ^ 2", "at character 1"),
    ("N N", "what is 'N' doing there"), ("", "where a number"), ("N // 0", "only by a constant > 0"),
])
def test_text_that_is_no_dimension(text: str, message: str) -> None:
    with pytest.raises(GraphflowError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse_dim(text)


def test_a_symbolic_dimension_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match="before the program is bound"):
        bool(N)


@pytest.mark.parametrize("by", [0, -2, 1.5, N])
def test_division_is_by_positive_constants_only(by: object) -> None:
    with pytest.raises(GraphflowError, match="only by a constant > 0"):
        N // by
    with pytest.raises(GraphflowError, match="only by a constant > 0"):
        floordiv(4, by)


def test_evaluate_names_what_is_unbound() -> None:
    with pytest.raises(KeyError, match="K"):
        evaluate(N + K, {"N": 1})
