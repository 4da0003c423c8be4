"""Feeds and state: the leaves of a graph that stand for what a call passes and what a Store keeps."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from graphflow.compiler.ir.graph import Node, TensorType
from graphflow.compiler.plan.dims import Dim, DimLike, symbol
from graphflow.compiler.plan.dtypes import I64, U32, DType
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.runtime.store import SEED, STEP, Store
from graphflow.scope import current_scope, here
from graphflow.tensor import Tensor, apply, cast, element_type, with_check
from graphflow.tracing import loop_indices

Initial = Callable[[np.random.Generator, tuple[int, ...], np.dtype], Any] | np.ndarray | float | int | bool

Rule = Callable[[Tensor], Tensor]
"""What one training step makes of a running statistic."""

_serial = itertools.count()
_sharing: ContextVar[Sharing | None] = ContextVar("graphflow_sharing", default=None)


BATCH = "batch"
"""The symbol of a first axis that an input leaves open."""


def input(name: str, shape: Any, dtype: Any = "float32", finite: bool = False) -> Tensor:  # noqa: A001
    """A feed: an array that each call of a program passes under `name`.

    shape: for each axis an integer, a dimension (``gf.dim("N")``, shared between inputs that must agree), or
    None for an extent that each call decides: as the first axis the batch, one for all inputs that leave it
    open, else an extent of its own. `finite`: calls refuse NaN and infinity in it.
    """
    from graphflow.functions import op_function
    from graphflow.reductions import all as every
    if not isinstance(name, str) or not name.isidentifier():
        raise UseError(f"{name!r} is no name for an input",
                       hint="use letters, digits and _: feeds may be passed as "
                       "keywords", where=here())
    entries = shape if isinstance(shape, (tuple, list)) else (shape,)
    extents = tuple(d if d is not None else symbol(f"{name}.axis{axis}" if axis else BATCH)
                    for axis, d in enumerate(entries))
    target = element_type(dtype)
    x = apply("input", [], name=name, dtype=target, shape=_declared(extents), finite=finite)
    if not finite:
        return x
    if not target.has_gradient:
        raise UseError(f"only floats can be NaN or infinite, and {name!r} is {target.full_name}", op="input",
                       where=here(), hint="leave finite=True out")
    return with_check(x, every(op_function("isfinite")(x)), "has NaN or infinity in it", name)


def _declared(shape: Sequence[Any]) -> tuple[DimLike, ...]:
    for axis, d in enumerate(shape):
        if not isinstance(d, (int, np.integer, Dim)) or isinstance(d, bool):
            raise UseError(f"axis {axis} of the shape is {d!r}", where=here(),
                           hint="use an integer, a dimension (gf.dim) or, for inputs, None")
    return tuple(d if isinstance(d, Dim) else int(d) for d in shape)


class Naming:
    """What the state entries of one layer, or one parameter alone, are called.

    `base` is the name that was asked for. An explicit one must be free; else the first free of base, base_1,
    … is taken when the first program uses the layer, and `name` is then decided for all its entries.
    """

    def __init__(self, base: str, explicit: bool) -> None:
        prefix = f"{current_scope()}/" if current_scope() else ""
        self.base, self.explicit = prefix + base, explicit
        self.name: str | None = None

    @classmethod
    def of(cls, name: str | None, default: str) -> Naming:
        """The naming of what a caller calls `name`, or leaves to us; UseError for an impossible name."""
        if name is not None and not (isinstance(name,
                                                str) and all(p.isidentifier() for p in name.split("."))):
            raise UseError(f"{name!r} is no name for a parameter or layer",
                           hint="use letters, digits, _ and dots",
                           where=here())
        return cls(name or default, name is not None)


class Variable(Node):
    """A `state` leaf whose entry is yet to be declared: it knows its initial value, and how it wants to be
    called.

    It belongs to the Store of the first program that uses it, under the name that it gets there; gf.function
    replaces it by an ordinary node of that name.
    """

    # a Node is frozen; what a Variable adds to it is decided late
    __setattr__ = object.__setattr__

    def __init__(self, role: str, dtype: DType, shape: tuple[int, ...], initial: Initial, naming: Naming,
                 part: str = "", owner: Variable | None = None) -> None:
        where = here()
        attrs = {"name": "", "role": role, "dtype": dtype, "shape": shape}
        super().__init__("state", (), attrs, (), (TensorType(dtype, shape),), (where,) if where else ())
        self.serial = next(_serial)
        self.role, self.dtype, self.shape, self.initial = role, dtype, shape, initial
        self.naming, self.part, self.owner = naming, part, owner
        self.store: Store | None = None
        self.frozen = False                          # whether optimizers leave it alone
        self.tensor = Tensor(self.result())
        self.rules: dict[Node, Rule] = {}

    @property
    def name(self) -> str:
        """The name in the Store; before a program uses the variable, the one asked for."""
        if self.owner is not None:
            return f"{self.owner.name}.{self.part}"
        base = self.naming.name or self.naming.base
        return f"{base}.{self.part}" if self.part else base

    def bind(self, store: Store, known: dict[str, Variable]) -> None:
        """Joins the Store under a final name. `known`: who has which name, of those that have joined just
        now."""
        naming = self.naming
        if naming.name is None:
            naming.name = naming.base if naming.explicit else _free_name(naming.base, store)
        if self.owner is not None:
            self.part = _free_name(self.name, store).removeprefix(f"{self.owner.name}.")
        if self.name in store:
            self._refuse_name(known.get(self.name))
        store.declare(self.name, self.role, self.dtype, self.shape, self.initial)
        self.store, known[self.name] = store, self

    def _refuse_name(self, other: Variable | None) -> None:
        where = self.origins[0] if self.origins else None
        first = ""
        if other is not None and other.origins:
            first = f"\nthe other one is declared here:\n{other.origins[0].describe()}"
        raise UseError(f"two variables are both named {self.name!r}{first}", where=where,
                       hint="give one another name, leave the name out, or open a scope: with gf.scope(...)")


def _free_name(base: str, store: Store) -> str:
    names = (f"{base}_{number}" if number else base for number in itertools.count())
    return next(name for name in names if not store.taken(name))


def parameter(shape: Any, init: Initial, name: str | None = None, dtype: Any = "float32", *,
              trainable: bool = True) -> Tensor:
    """A trained array of a fixed shape, kept in the Store.

    init: a number, an array, or a function (generator, shape, dtype) -> array such as those of `gf.init`.
    Without a name it is called "parameter", "parameter_1", …; scopes are prefixes. ``trainable=False`` makes
    a running statistic, which optimizers leave alone.
    """
    return variable(Naming.of(name, "parameter"), "", shape, init, dtype,
                    "parameter" if trainable else "statistic")


def variable(naming: Naming, part: str, shape: Any, init: Initial, dtype: Any = "float32",
             role: str = "parameter") -> Tensor:
    """A state entry called ``naming.part``: what layers use."""
    extents = _declared(shape if isinstance(shape, (tuple, list)) else (shape,))
    if any(isinstance(d, Dim) for d in extents):
        raise ShapeError("a parameter has a fixed shape", shapes=[extents], where=here(),
                         hint="only inputs have extents that a call decides")
    if any(isinstance(d, int) and d < 0 for d in extents):
        raise ShapeError("a parameter has no negative extents", shapes=[extents], where=here())
    target = element_type(dtype)
    if isinstance(init, (np.ndarray, list)) and np.shape(init) not in ((), extents):
        raise ShapeError("the initial value has another shape than the parameter",
                         shapes=[np.shape(init), extents], where=here())
    fixed = tuple(int(d) for d in extents)

    def make() -> Tensor:
        return Variable(role, target, fixed, init, naming, part).tensor
    sharing = _sharing.get()
    return make() if sharing is None else sharing.variable(part, fixed, target, make)


class Sharing:
    """While it is open, `variable` hands out what it made when this was open for the first time, in that
    order; see `graphflow.nn.shared`. What is opened inside another for the first time makes its variables
    there."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.outer = _sharing.get()
        self.next = 0
        self.complete = False

    def __enter__(self) -> None:
        self.next = 0
        self.token = _sharing.set(self)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        _sharing.reset(self.token)
        if kind is None and self.complete and self.next < len(self.made):
            raise UseError(f"a shared part of a net used {self.next} of the {len(self.made)} parameters of "
                           "its first call", where=here(), hint="every call must build the same layers")
        if kind is not None and not self.complete:
            self.made.clear()
        self.complete = self.complete or kind is None

    def variable(self, part: str, shape: tuple[int, ...], dtype: DType, make: Callable[[], Tensor]) -> Tensor:
        """The next variable: a new one while this is open for the first time, else that of the first time."""
        if not self.complete:
            self.made.append(make() if self.outer is None else self.outer.variable(part, shape, dtype, make))
            return self.made[-1]
        if self.next == len(self.made):
            raise UseError(f"a shared part of a net asks for more than the {len(self.made)} parameters of "
                           "its first call", where=here(), hint="every call must build the same layers")
        found = self.made[self.next]
        self.next += 1
        if found.shape != shape or found.dtype != dtype or variable_of(found).part != part:
            raise ShapeError(f"a shared part of a net asks for another parameter than {found.name} of its "
                             "first call", shapes=[found.shape, shape], where=here(),
                             hint="its inputs must agree in the extents that parameters depend on")
        return found


def slot(owner: Tensor, part: str, init: Initial = 0.0, shape: tuple[int, ...] | None = None,
         dtype: Any = None) -> Tensor:
    """An optimizer's slot: a state entry named after the parameter that it serves, of its shape and type if
    none is given."""
    of = variable_of(owner)
    made = Variable("slot", of.dtype if dtype is None else element_type(dtype),
                    of.shape if shape is None else shape,
                    init, of.naming, part, of)
    return made.tensor


def counter(naming: Naming) -> Tensor:
    """The number of updates that an optimizer has made, an int64 slot of no parameter."""
    return variable(naming, "step", (), 0, I64, "slot")


def variable_of(x: Tensor) -> Variable:
    """The variable that the tensor is; UseError if it is none."""
    node = x.value.node if isinstance(x, Tensor) else None
    if not isinstance(node, Variable):
        what = f"the result of {node.op}" if node is not None else repr(x)
        raise UseError(f"this is no parameter, but {what}", where=here(), hint="make one with gf.parameter")
    return node


def variables_in(nodes: Iterable[Node]) -> list[Variable]:
    """The variables among the nodes, in the order in which they were made."""
    return sorted((n for n in nodes if isinstance(n, Variable)), key=lambda v: v.serial)


def track(statistic: Tensor, reader: Tensor, rule: Rule) -> None:
    """From now on every training program that computes `reader` replaces the statistic by `rule(statistic)`.

    Where several readers of one statistic are computed, their rules apply one after another.
    """
    variable_of(statistic).rules[reader.value.node] = rule


def tracked(nodes: Sequence[Node]) -> dict[Tensor, Tensor]:
    """The running statistics that a training program of these nodes updates, with their new values."""
    computed, updates = set(nodes), {}
    in_regions = {v.node for n in nodes if n.regions for v in n.inputs}
    for v in variables_in(nodes):
        rules = [rule for reader, rule in v.rules.items() if reader in computed]
        if v.rules and v in in_regions:
            raise UseError(f"the running statistic {v.name} is read inside a loop or a branch, where it "
                           "can't be updated", where=v.origins[0] if v.origins else here(),
                           hint="normalise outside, or by layer_norm or group_norm, which keep no statistics")
        new = v.tensor
        for rule in rules:
            new = rule(new)
        if rules:
            updates[v.tensor] = new
    return updates


def random_state() -> tuple[Tensor, Tensor]:
    """(seed, step) as random_bits takes them: what the Store's random numbers in this step follow from."""
    seed = apply("state", [], name=SEED, role="seed", dtype=U32, shape=())
    step = apply("state", [], name=STEP, role="step", dtype=I64, shape=())
    return seed, cast(step, U32)


def random_operands() -> list[Tensor]:
    """What random_bits takes: seed, step, and the step of each loop whose body is being traced, so that every
    one of these has its own numbers."""
    return [*random_state(), *(cast(Tensor(index), U32) for index in loop_indices())]
