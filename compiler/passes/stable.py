"""The stable stage: formulas that lose accuracy or overflow become those that do not.

It runs before autodiff, so gradients come out of the good formula. A row keeps the result within a tolerance,
and is at least as accurate as what it replaces; none fires on what it made. After each the canonical table
tidies up. """
from __future__ import annotations

from collections.abc import Sequence

from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.ops.reduce import restore
from graphflow.compiler.passes.canonical import CANONICAL
from graphflow.compiler.passes.rewrite import Result, RewriteBuilder, Rule, rewrite


def stabilize(graph: Graph) -> Graph:
    """One sweep of the table together with the canonical one. Assumes a checked graph; keeps a tolerance."""
    return rewrite(graph, STABLE + CANONICAL)


def _log_of_softmax(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log(exp(a) / s) = a - log(s): exp(a) may underflow to 0 or overflow, a does neither."""
    quotient = b.match(inputs[0], "div")
    top = b.match(quotient.inputs[0], "exp") if quotient is not None else None
    if quotient is None or top is None:
        return None
    return b.sub(top.inputs[0], b.log(quotient.inputs[1]))


def _log_of_exp(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log(exp(x)) = x."""
    inner = b.match(inputs[0], "exp")
    return None if inner is None else inner.inputs[0]


def _log_of_sigmoid(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log(sigmoid(x)) = -softplus(-x): sigmoid underflows to 0, softplus does not."""
    inner = b.match(inputs[0], "sigmoid")
    return None if inner is None else b.neg(b.softplus(b.neg(inner.inputs[0])))


def _log_of_one_minus_sigmoid(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log(1 - sigmoid(x)) = -softplus(x): 1 - sigmoid(x) cancels to 0."""
    difference = b.match(inputs[0], "sub")
    if difference is None or not b.is_constant(difference.inputs[0], 1):
        return None
    inner = b.match(difference.inputs[1], "sigmoid")
    return None if inner is None else b.neg(b.softplus(inner.inputs[0]))


def _log_of_one_plus(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log(1 + x) = log1p(x): 1 + x drops the low bits of a small x."""
    x = _one_plus(b, inputs[0])
    return None if x is None else b.log1p(x)


def _one_plus(b: RewriteBuilder, value: Value) -> Value | None:
    """x where `value` is 1 + x or x + 1."""
    total = b.match(value, "add")
    if total is not None:
        for one, x in (total.inputs, total.inputs[::-1]):
            if b.is_constant(one, 1):
                return x
    return None


def _log_sum_exp(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log(sum(exp(x))) = m + log(sum(exp(x - m))) with m = max(x), unless x is a difference from a maximum
    already. m counts as a constant: its derivatives cancel. An infinite m is not subtracted, for inf - inf is
    NaN."""
    view = b.match(inputs[0], "reshape")
    total = b.match(view.inputs[0] if view is not None else inputs[0], "reduce_sum")
    inner = b.match(total.inputs[0], "exp") if total is not None else None
    if total is None or inner is None:
        return None
    x, axes = inner.inputs[0], total.attrs["axes"]
    if not axes or any(x.shape[axis] == 0 for axis in axes) or _is_shifted(b, x):
        return None
    m = b.stop_gradient(b.reduce_max(x, axes=axes))
    m = b.where(b.isfinite(m), m, b.zeros(m.type))
    shifted = b.sub(x, restore(b, m, x.shape, axes))
    found = b.add(m, b.log(b.reduce_sum(b.exp(shifted), axes=axes)))
    return b.reshape(found, shape=node.types[0].shape) if view is not None else found


def _is_shifted(b: RewriteBuilder, x: Value) -> bool:
    """Whether x is a difference from a maximum, as a careful softmax has it."""
    difference = b.match(x, "sub")
    if difference is None:
        return False
    at: Value | None = difference.inputs[1]
    while at is not None:
        if at.op == "reduce_max":
            return True
        view = b.match(at, "broadcast_to", "reshape", "stop_gradient", "where")
        at = None if view is None else view.inputs[1 if view.op == "where" else 0]
    return False


def _expm1(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """exp(x) - 1 = expm1(x): the difference cancels for a small x."""
    inner = b.match(inputs[0], "exp")
    return b.expm1(inner.inputs[0]) if inner is not None and b.is_constant(inputs[1], 1) else None


def _softplus(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """log1p(exp(x)) = softplus(x): exp(x) overflows."""
    inner = b.match(inputs[0], "exp")
    return None if inner is None else b.softplus(inner.inputs[0])


def _reciprocal(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """1 / sqrt(x) = rsqrt(x), and 1 / (1 + exp(x)) = sigmoid(-x), whose gradient does not overflow."""
    if not b.is_constant(inputs[0], 1):
        return None
    root = b.match(inputs[1], "sqrt")
    if root is not None:
        return b.rsqrt(root.inputs[0])
    x = _one_plus(b, inputs[1])
    inner = b.match(x, "exp") if x is not None else None
    return None if inner is None else b.sigmoid(b.neg(inner.inputs[0]))


def _power(b: RewriteBuilder, node: Node, inputs: Sequence[Value]) -> Result:
    """x ** 2 = x * x, x ** 0.5 = sqrt(x), x ** -1 = 1 / x, each rounded once. As in NumPy's operator, the
    root of -inf is NaN."""
    x, exponent = inputs
    if b.is_constant(exponent, 2):
        return b.mul(x, x)
    if b.is_constant(exponent, 0.5):
        return b.sqrt(x)
    return b.div(1, x) if b.is_constant(exponent, -1) else None


STABLE: tuple[Rule, ...] = (Rule("log(exp(a) / s)", "log", _log_of_softmax, "tolerance"),
                            Rule("log(exp(x))", "log", _log_of_exp, "tolerance"),
                            Rule("log(sigmoid(x))", "log", _log_of_sigmoid, "tolerance"),
                            Rule("log(1 - sigmoid(x))", "log", _log_of_one_minus_sigmoid, "tolerance"),
                            Rule("log(1 + x)", "log", _log_of_one_plus, "tolerance"),
                            Rule("log(sum(exp(x)))", "log", _log_sum_exp, "tolerance"),
                            Rule("exp(x) - 1", "sub", _expm1, "tolerance"),
                            Rule("log1p(exp(x))", "log1p", _softplus, "tolerance"),
                            Rule("1 / sqrt(x), 1 / (1 + exp(x))", "div", _reciprocal, "tolerance"),
                            Rule("x ** 2, x ** 0.5, x ** -1", "pow", _power, "tolerance"))
"""The table. Stated cost: the number of logs, exps and quotients whose operand may overflow, underflow or
cancel."""
