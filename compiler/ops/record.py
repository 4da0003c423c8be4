"""What an op is: one record, from which the DSL function, typing, interpreter, gradient, lowering, cost,
tests, fuzzer and docs all come. Adding an op means adding one record to one file of this folder."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from graphflow.compiler.ir.graph import Attrs, Node, Region, TensorType, Value
from graphflow.compiler.kernel.form import Expr, Guard
from graphflow.compiler.plan.dims import DimLike
from graphflow.compiler.plan.dtypes import DType
from graphflow.compiler.plan.errors import UseError

REQUIRED = object()
"""The default of an attribute that the caller must give."""

KINDS = {
    "leaf": "a value from outside: feed, state, region parameter",
    "elementwise": "every operand has the result's shape and is read at the result's own index",
    "view": "moves elements, no arithmetic: free to evaluate inside any reader",
    "gather": "moves elements along a loaded index: evaluated inside a reader that reads each element once",
    "window": "a small reduction around each element: its producers would be evaluated many times",
    "reduce": "a reduction over whole axes (attribute `axes`)",
    "contraction": "multiply and accumulate: matmul, convolution and their gradients",
    "routine": "a named routine of each back end",
    "effect": "writes state or raises an error",
    "control": "holds regions that run conditionally or repeatedly",
    "grad": "stands for gradients until the autodiff stage expands it",
    "fused": "a kernel in the making: its region holds the ops",
}


class Point(Protocol):
    """What a lowering sees: one point of the result. Given by the `lower` stage."""
    node: Node

    def operand(self, i: int, index: Sequence[DimLike], guards: Sequence[Guard] = (), fill: Any = 0) -> Expr:
        """Operand i at `index`; where a guard fails, `fill`, and the element is not read."""

    def const(self, value: Any, dtype: DType) -> Expr:
        """A literal."""

    def index(self, at: DimLike, dtype: DType) -> Expr:
        """An index expression as a number."""

    def apply(self, function: str, *args: Expr, dtype: DType | None = None) -> Expr:
        """A scalar function (see SCALARS)."""

    def bind(self, value: Expr) -> Expr:
        """The value under a name: for what a lowering uses more than once."""

    def indirect(self, value: Expr) -> DimLike:
        """An integer expression as a symbol that indices may use."""

    def loops(self, *extents: DimLike) -> tuple[tuple[str, DimLike], ...]:
        """Fresh loop variables with these extents, for the one `reduce` that follows; `dims.symbol(name)` is
        the variable. None for no extents: then `reduce` gives its operand."""

    def reduce(self, kind: str, loops: Sequence[tuple[str, DimLike]], *operands: Expr,
               result: int = 0) -> Expr:
        """A reduction over loops made by `loops`."""


Index = Sequence[DimLike]


@dataclass(frozen=True)
class Pointwise:
    """Lowering of an op whose result is a function of its index: `value(p, index, result)` is element `index`
    of that result (result: which of the node's results)."""
    value: Callable[[Point, Index, int], Expr]


class ContractionParts(NamedTuple):
    """acc(batch, m, n) = sum over k of a(batch, m, k) * b(batch, n, k). Extents are tuples; a, b get the
    tuples of index variables; `out` gives the result's index."""
    batch: tuple[DimLike, ...]
    m: tuple[DimLike, ...]
    n: tuple[DimLike, ...]
    k: tuple[DimLike, ...]
    a: Callable[[Index, Index, Index], Expr]
    b: Callable[[Index, Index, Index], Expr]
    out: Callable[[Index, Index, Index], Index]


@dataclass(frozen=True)
class Contract:
    """Lowering of a contraction."""
    parts: Callable[[Point], ContractionParts]


class RoutineForm(NamedTuple):
    """An op as a routine: its name and attributes, and the shapes as which it sees the operands and then the
    results, each a reshape of the array."""
    routine: str
    attrs: Mapping[str, Any]
    shapes: tuple[tuple[DimLike, ...], ...]


@dataclass(frozen=True)
class Routine:
    """Lowering of an op of kind "routine", see `graphflow.compiler.kernel.routines`. form(shapes, attrs): the
    shapes are those of the operands and then of the results."""
    form: Callable[[Sequence[tuple[DimLike, ...]], Attrs], RoutineForm]


class Arg(NamedTuple):
    """An operand of a sample: shape, element type ("float" stands for each float type in turn), range of its
    values. `distinct`: no two elements equal (keeps finite differences away from the kinks of max)."""
    shape: tuple[int, ...]
    dtype: str = "float"
    low: float = -2.0
    high: float = 2.0
    distinct: bool = False


class Sample(NamedTuple):
    """Operands and attributes on which the op must work. `smooth`: gradients may be compared with finite
    differences here; `second`: second derivatives too."""
    args: tuple[Arg, ...]
    attrs: Mapping[str, Any] = {}
    smooth: bool = True
    second: bool = True


class Failure(NamedTuple):
    """Operands (types) and attributes that must be refused with an error whose text contains `message`."""
    args: tuple[Arg, ...]
    attrs: Mapping[str, Any]
    message: str


Infer = Callable[[Sequence[TensorType], Attrs, Sequence[Region]], Sequence[TensorType]]
Reference = Callable[[Sequence[Any], Attrs, Sequence[TensorType]], Sequence[Any]]
Gradient = Callable[[Any, Node, Sequence["Value | None"]], Sequence["Value | None"]]


@dataclass(frozen=True)
class Op:
    """One op.

    operands: names of the inputs (a last name that starts with "*" takes the rest); attrs: name -> default.
    infer(types, attrs, regions): result types, or a UserError that names the axis.
    reference(arrays, attrs, result types with numbers for shapes): NumPy results, a sequence.
    gradient(b, node, cotangents): a cotangent per input (None: no gradient flows), built with the builder
    `b`; a cotangent
        of a result that nothing reads is None. The whole field is None where the op has no gradient anywhere.
    lowering: Pointwise, Contract, Routine, or None for what never reaches a kernel.
    flops(node): the arithmetic of one evaluation of all results, as a dimension.
    injective: (views) each operand element is read at most once, so inlining a producer repeats no work.
    samples, failures: see Sample, Failure.
    """
    name: str
    kind: str
    doc: str
    operands: tuple[str, ...]
    infer: Infer
    reference: Reference | None = None
    gradient: Gradient | None = None
    lowering: Pointwise | Contract | Routine | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    flops: Callable[[Node], DimLike] = lambda node: 0
    injective: bool = False
    samples: Callable[[], Sequence[Sample]] = lambda: ()
    failures: Sequence[Failure] = ()

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def complete(self, given: Attrs) -> dict[str, Any]:
        """The attributes in declared order with defaults filled in; UseError for a surplus or missing one."""
        for name in given:
            if name not in self.attrs:
                known = ", ".join(self.attrs) or "none"
                raise UseError(f"{self.name} has no attribute {name!r}", op=self.name,
                               hint=f"its attributes: {known}")
        out = {name: given.get(name, default) for name, default in self.attrs.items()}
        missing = [name for name, value in out.items() if value is REQUIRED]
        if missing:
            raise UseError(f"{self.name} needs the attribute {missing[0]!r}", op=self.name)
        return out


def check_operands(op: str, types: Sequence[TensorType], count: int) -> None:
    """UseError unless there are `count` operands."""
    if len(types) != count:
        shapes = [t.shape for t in types]
        raise UseError(f"{op} takes {count} operand(s), got {len(types)}", op=op, shapes=shapes)
