"""Ops of the user's own: compositions with a name, and with a gradient that need not be that of the
composition."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any

from graphflow.compiler.ir.graph import Node, TensorType, topological
from graphflow.compiler.passes.regions import extract
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.control import sort_checks, with_lifted
from graphflow.creation import zeros
from graphflow.scope import here, scope
from graphflow.structure import Structure, flatten
from graphflow.tensor import Tensor, apply
from graphflow.tracing import OUTSIDE, close, parameter, recording

Forward = Callable[..., Any]
Backward = Callable[..., Any]


def custom_gradient(forward: Forward, backward: Backward | None = None) -> CustomOp:
    """The function `forward` of tensors, with `backward` as its gradient; named after the function.

    ``backward(inputs, outputs, cotangents)`` gives a tuple with the cotangent of each argument, of its shape
    and element type: None for one of zeros, and for arguments that are no floats. `inputs` is the tuple of
    arguments, `outputs` what `forward` returned, `cotangents` the same nest with the cotangent of each float.
    Arguments and results are tensors, or nested tuples, lists and dicts of them. Keyword arguments are passed
    on to both functions as they are. As a decorator::

        @gf.custom_gradient
        def clipped(x):
            return gf.clip(x, -1, 1)

        @clipped.backward
        def straight_through(inputs, outputs, cotangents):
            return (cotangents,)
    """
    name = getattr(forward, "__name__", "")
    return CustomOp(name if name.isidentifier() else "custom", forward, backward)


def custom_op(name: str, forward: Forward | None = None, backward: Backward | None = None) -> Any:
    """An op of this name, which the dumps show beside every line of `forward`, the composition that it is.

    `backward` as for `custom_gradient`; without it the gradient is that of the composition. As a decorator:
    ``@gf.custom_op("swiglu")``.
    """
    if forward is None:
        return lambda function: custom_op(name, function, backward)
    return CustomOp(name, forward, backward)


class CustomOp:
    """What `custom_gradient` and `custom_op` give: called like the function that it was made from."""

    def __init__(self, name: str, forward: Forward, backward: Backward | None) -> None:
        if not isinstance(name, str) or not name.replace("/", "_").isidentifier():
            raise UseError(f"{name!r} is no name for an op", where=here(), hint="use letters, digits and _")
        self.name, self.forward, self._backward = name, forward, backward
        update_wrapper(self, forward)

    def backward(self, function: Backward) -> Backward:
        """Decorates the function that gives the cotangents of the arguments; see `custom_gradient`."""
        self._backward = function
        return function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The results of the function, for tensors."""
        with scope(self.name):
            if self._backward is None:
                return self.forward(*arguments, **options)
            return self._traced(arguments, options)

    def _traced(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        assert self._backward is not None
        where, what = here(), f"of {self.name}"
        leaves, nest = flatten(arguments, f"an argument {what}")
        given = [parameter(t.value.type, where) for t in leaves]
        inputs = nest.build([Tensor(p) for p in given])
        with recording() as made:
            results, result_nest = flatten(self.forward(*inputs, **options), f"a result {what}")
            outputs = [parameter(t.value.type, where) for t in results]
            cotangents = [parameter(t.value.type, where) if t.dtype.has_gradient else None for t in results]
            flows = self._cotangents(leaves, nest, self._backward(
                inputs, result_nest.build([Tensor(p) for p in outputs]),
                result_nest.build([None if p is None else Tensor(p) for p in cotangents]), **options))
        seeded = [p for p in cotangents if p is not None]

        def inside(node: Node) -> bool:
            return node in made and node.op not in OUTSIDE
        (checks, outer), ends = sort_checks(results, inside), [t.value for t in results]
        if sort_checks(flows, inside)[0]:
            raise NotImplementedError(f"the backward function {what} computes with indices that must be "
                                      "checked: compute them before, and pass them as an argument")
        outputs += [parameter(check.inputs[0].type, where) for check in checks]
        ends += [check.inputs[0] for check in checks]
        (first, second), captured = close([(given, ends), ([*given, *outputs, *seeded],
                                                           [t.value for t in flows])], inside)
        more = self._captured([Tensor(v, outer) for v in captured])
        own, rest = second.parameters[:len(given)], second.parameters[len(given):]
        cut = len(rest) - len(more)
        zero = [zeros(t.shape, t.dtype).value for t in more if t.dtype.has_gradient]
        second = extract([*second.results, *zero], [*own, *rest[cut:], *rest[:cut]])
        made_by = apply("custom_gradient", [*leaves, *more], [first, second], name=self.name)
        listed = [made_by] if isinstance(made_by, Tensor) else list(made_by)
        return result_nest.build(with_lifted(listed, checks, len(results)))

    def _cotangents(self, leaves: Sequence[Tensor], nest: Structure, returned: Any) -> list[Tensor]:
        """The cotangents of the float arguments, in order."""
        count = len(nest.children)
        if not isinstance(returned, tuple) or len(returned) != count:
            raise UseError(f"the backward function of {self.name} returns a tuple with a cotangent for each "
                           f"of the {count} arguments, not {_described(returned)}", where=here())
        places = iter(zip(leaves, nest.paths))
        out = []
        for number, (child, entry) in enumerate(zip(nest.children, returned)):
            inner = [next(places) for _ in range(len(child))]
            flat = [None] * len(inner) if entry is None else _like(child, entry, f"{self.name}, {number}")
            for (like, path), flow in zip(inner, flat):
                if like.dtype.has_gradient:
                    flow = zeros(like.shape, like.dtype) if flow is None else flow
                    self._check(like, flow, path)
                    out.append(flow)
        return out

    def _check(self, like: Tensor, flow: Tensor, path: str) -> None:
        if flow.value.type != like.value.type:
            kind = ShapeError if flow.dtype == like.dtype else DTypeError
            raise kind(f"the cotangent of argument{path} of {self.name} is {flow.value.type}, the argument "
                       f"{TensorType(like.dtype, like.shape)}", shapes=[flow.shape, like.shape], where=here(),
                       hint="a cotangent has the shape and element type of its argument")

    def _captured(self, tensors: list[Tensor]) -> list[Tensor]:
        """What the functions use from outside; UseError for a float that depends on something."""
        for t in tensors:
            if t.dtype.has_gradient and any(n.op in ("input", "state", "parameter")
                                            for n in topological([t.value.node])):
                name = f" {t.name!r}" if t.name else ""
                raise UseError(f"{self.name} uses a tensor{name} from outside, which no gradient would reach",
                               shapes=[t.shape], where=here(), hint="pass it as an argument")
        return tensors


def _like(nest: Structure, entry: Any, what: str) -> list[Tensor | None]:
    """The tensors of a nest like `nest`, in which None stands for zeros."""
    if nest.kind is None:
        return [flatten(entry, f"a cotangent of {what}")[0][0]]
    entries = [entry[k] for k in nest.keys] if isinstance(entry, dict) else list(entry)
    if len(entries) != len(nest.children):
        raise UseError(f"a cotangent of {what} has {len(entries)} entries, not {len(nest.children)}",
                       where=here())
    out: list[Tensor | None] = []
    for child, part in zip(nest.children, entries):
        out += [None] * len(child) if part is None else _like(child, part, what)
    return out


def _described(returned: Any) -> str:
    return f"a tuple of {len(returned)}" if isinstance(returned, tuple) else repr(returned)
