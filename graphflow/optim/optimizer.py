"""What optimizers have in common: hyperparameters, groups of parameters, penalties, and the order in which
these act."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from graphflow.compiler.plan.dtypes import F64
from graphflow.compiler.plan.errors import ShapeError, UseError
from graphflow.gradient import grad
from graphflow.optim.accumulate import accumulated
from graphflow.optim.average import Average
from graphflow.optim.parameters import trainable
from graphflow.optim.scaling import LossScale
from graphflow.scope import here
from graphflow.state import Initial, Naming, counter, slot, variable, variable_of
from graphflow.tensor import Tensor, cast, elementwise

Hyperparameter = float | Tensor | Callable[[Tensor], Any]
"""A number, a scalar Tensor (an input that each call feeds, an entry of the Store that the host sets), or a
function of the number of updates made so far, such as those of `gf.optim.schedule`."""

Pairs = Sequence[tuple[Tensor, Tensor]]
Group = tuple[Tensor | Sequence[Tensor] | Callable[[Tensor], bool], Mapping[str, Any]]

_DECAYS = ("momentum", "beta1", "beta2", "decay", "dampening")
_LABELS = {"lr": "the learning rate", "momentum": "the momentum"}


class Optimizer:
    """The base of all optimizers. A subclass says in `delta` by how much one parameter goes down.

    Every optimizer takes, beside its own hyperparameters:

    - ``l2``: g ← g + l2·p, the gradient of the penalty l2/2·‖p‖² (what PyTorch calls ``weight_decay`` in
      SGD and Adam);
    - ``l1``: g ← g + l1·sign(p), a gradient of l1·‖p‖₁;
    - ``weight_decay``: decoupled, p ← p - lr·weight_decay·p beside the update (Loshchilov and Hutter,
      "Decoupled weight decay regularization", ICLR 2019);
    - ``l1_proximal``: after the update, numbers move lr·l1_proximal towards 0 and stop there, so many become
      exactly 0 (proximal gradient descent; Beck and Teboulle, SIAM J. Imaging Sciences 2, 2009);
    - ``constraint``: a function from the new value to one that is allowed, such as `max_norm`;
    - ``clip``: a function of all (parameter, gradient) pairs, such as those of `gf.optim.clip`. It sees the
      gradients before the penalties are added;
    - ``groups``: pairs (which, options): the parameters in the list `which`, or for which the function
      `which` holds, have these hyperparameters instead, or are left alone with ``{"frozen": True}``. The
      first group that fits counts: ``groups=[(lambda p: p.ndim == 1, {"l2": 0}), (encoder, {"lr": 1e-5})]``;
    - ``accumulate``: with k, the update happens in every k-th call, with the mean gradient of these k;
    - ``average``: an `Average` of the parameters, kept up to date with them;
    - ``loss_scale``: a `LossScale`, for nets that compute with float16.

    Each hyperparameter is a number, a scalar Tensor, or a function of the number of updates made so far
    (`gf.optim.schedule`).
    """

    def __init__(self, hyperparameters: Mapping[str, Hyperparameter], *, l1: Hyperparameter = 0.0,
                 l2: Hyperparameter = 0.0, weight_decay: Hyperparameter = 0.0,
                 l1_proximal: Hyperparameter = 0.0, constraint: Callable[[Tensor], Tensor] | None = None,
                 clip: Callable[[Pairs], Pairs] | None = None, groups: Sequence[Group] = (),
                 accumulate: int = 1, average: Average | None = None, loss_scale: LossScale | None = None
                 ) -> None:
        self.hyperparameters: dict[str, Hyperparameter] = {
            **hyperparameters, "l1": l1, "l2": l2, "weight_decay": weight_decay, "l1_proximal": l1_proximal}
        for name, value in self.hyperparameters.items():
            _check(name, value)
        self.constraint, self.clip, self.groups = constraint, clip, list(groups)
        if not isinstance(accumulate, int) or accumulate < 1:
            raise UseError(f"accumulate is {accumulate!r}", where=here(), hint="use a number of calls >= 1")
        self.accumulate, self.average, self.loss_scale = accumulate, average, loss_scale
        known = {*self.hyperparameters, "constraint", "frozen"}
        for _, options in self.groups:
            for name, value in options.items():
                if name not in known:
                    raise UseError(f"{type(self).__name__} has no {name!r}", where=here(),
                                   hint=f"a group may set {', '.join(sorted(known))}")
                if name in self.hyperparameters:
                    _check(name, value)

    def minimize(self, loss: Tensor, parameters: Sequence[Tensor] | None = None) -> dict[Tensor, Tensor]:
        """The new values of the parameters and of the optimizer's slots after one step down the gradient of
        `loss`: the `updates` of `gf.function`. Without `parameters`, all that the loss is computed from and
        that are not frozen.
        """
        if not isinstance(loss, Tensor):
            raise UseError(f"minimize takes the loss, a scalar Tensor, not {loss!r}", where=here())
        chosen = [p for p in (trainable(loss) if parameters is None else parameters)
                  if not self._options(p).get("frozen")]
        if not chosen:
            raise UseError("the loss is computed from no parameter that is trained", op="minimize",
                           shapes=[loss.shape], where=here(),
                           hint="make parameters with gf.parameter or the layers of gf.nn; frozen ones are "
                                "left alone")
        scale = self.loss_scale
        if scale is None:
            return self.apply(list(zip(chosen, grad(loss, chosen))))
        pairs = scale.unscaled(list(zip(chosen, grad(scale.scaled(loss), chosen))))
        return scale.guarded(pairs, self.apply(pairs))

    def apply(self, gradients: Pairs) -> dict[Tensor, Tensor]:
        """The same for gradients that the caller has computed, or changed: pairs (parameter, gradient)."""
        pairs = [(p, g) for p, g in gradients if not self._options(p).get("frozen")]
        return accumulated(self.accumulate, pairs, self._updates)

    def averaged(self, x: Any) -> Any:
        """`x` (a Tensor, or a list or dict of them) as it is with the averages of the parameters in their
        places; `x` itself for an optimizer without ``average``."""
        return x if self.average is None else self.average.of(x)

    def delta(self, p: Tensor, g: Tensor, at: Step) -> Tensor:
        """By how much the parameter `p`, whose gradient is `g`, goes down; of its shape and type.
        Hyperparameters and slots come from `at`."""
        raise NotImplementedError

    def _updates(self, pairs: Pairs) -> dict[Tensor, Tensor]:
        shared = _Shared(type(self).__name__.lower())
        steps: dict[int, Step] = {}
        for p, g in self.clip(pairs) if self.clip else pairs:
            number, options = self._group(p)
            at = steps.setdefault(number, Step(shared, options))
            shared.updates[p] = self._new_value(p, g, at, options.get("constraint"))
        if self.average is not None:
            shared.updates = self.average.update(shared.updates)
        return shared.updates

    def _new_value(self, p: Tensor, g: Tensor, at: Step, constraint: Callable[[Tensor], Tensor] | None
                   ) -> Tensor:
        lr, l1, l2 = at.value("lr"), at.value("l1"), at.value("l2")
        decay, proximal = at.value("weight_decay"), at.value("l1_proximal")
        if not _is_zero(l2):
            g = g + scaled(p, l2)
        if not _is_zero(l1):
            g = g + scaled(elementwise("sign", p), l1)
        new = p if _is_zero(decay) else scaled(p, 1 - lr * decay)
        new = new - self.delta(p, g, at)
        if not _is_zero(proximal):
            rest = elementwise("maximum", elementwise("abs", new) - like(lr * proximal, p), 0.0)
            new = elementwise("sign", new) * rest
        return new if constraint is None else constraint(new)

    def _options(self, p: Tensor) -> Mapping[str, Any]:
        return self._group(p)[1]

    def _group(self, p: Tensor) -> tuple[int, Mapping[str, Any]]:
        """The number of the parameter's group and everything that is set for it."""
        variable_of(p)
        common = {**self.hyperparameters, "constraint": self.constraint}
        for number, (which, options) in enumerate(self.groups):
            if which(p) if callable(which) else any(p is q for q in _listed(which)):
                return number, {**common, **options}
        return -1, common


class _Shared:
    """What all parameters of one update share: the counter, and the new values."""

    def __init__(self, name: str) -> None:
        self.naming = Naming(name, False)
        self.updates: dict[Tensor, Tensor] = {}
        self.done: Tensor | None = None
        self.parts: set[str] = set()

    def count(self) -> Tensor:
        if self.done is None:
            self.done = counter(self.naming)
            self.updates[self.done] = self.done + 1
        return self.done

    def number(self, part: str, initial: float) -> Tensor:
        """A float64 slot that belongs to no parameter, called `part`, or part_1, … for further groups."""
        name = next(n for i in itertools.count() if (n := f"{part}_{i}" if i else part) not in self.parts)
        self.parts.add(name)
        return variable(self.naming, name, (), initial, F64, "slot")


class Step:
    """One update of one group of parameters in the making: its hyperparameters, slots and new values."""

    def __init__(self, shared: _Shared, options: Mapping[str, Any]) -> None:
        self._shared, self._options = shared, options
        self._values: dict[str, Any] = {}
        self._slots: dict[str, Tensor] = {}

    @property
    def done(self) -> Tensor:
        """How many updates were made before this one, a scalar of float64."""
        return cast(self._shared.count(), F64)

    @property
    def number(self) -> Tensor:
        """The number of this update, 1, 2, …; a scalar of float64."""
        return self.done + 1.0

    def value(self, name: str) -> Any:
        """The hyperparameter: a number, or a scalar Tensor of float64."""
        if name not in self._values:
            given = self._options[name]
            if callable(given) and not isinstance(given, Tensor):
                given = given(self.done)
                _check_scalar(name, given)
            self._values[name] = cast(given, F64) if isinstance(given, Tensor) else float(given)
        return self._values[name]

    def slot(self, p: Tensor, part: str, initial: Initial = 0.0) -> Tensor:
        """A new slot of the parameter, of its shape and type, as it was before this update."""
        return slot(p, part, initial)

    def shared(self, part: str, initial: float) -> Tensor:
        """A number (float64) that the parameters of the group share, as it was before this update."""
        if part not in self._slots:
            self._slots[part] = self._shared.number(part, initial)
        return self._slots[part]

    def set(self, old: Tensor, new: Tensor) -> Tensor:
        """Says what a slot is after this update; gives the new value."""
        self._shared.updates[old] = new
        return new


def like(number: Any, x: Tensor) -> Tensor:
    """A hyperparameter in the element type of `x`."""
    return cast(number, x.dtype)


def scaled(x: Tensor, factor: Any) -> Tensor:
    """``x * factor`` in the element type of `x`."""
    return x * like(factor, x)


def mix(old: Tensor, keep: Any, new: Tensor) -> Tensor:
    """A running mean: ``keep * old + (1 - keep) * new``."""
    return scaled(old, keep) + scaled(new, 1 - keep)


def sqrt(x: Tensor) -> Tensor:
    """The square root."""
    return elementwise("sqrt", x)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _listed(which: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [which] if isinstance(which, Tensor) else which


def _check(name: str, value: Any) -> None:
    """UseError for a number outside the hyperparameter's range, ShapeError for a Tensor that is no scalar."""
    label = _LABELS.get(name, name)
    if isinstance(value, Tensor) or not callable(value):
        _check_scalar(name, value)
    if isinstance(value, Tensor) or callable(value):
        return
    if name in _DECAYS and not 0 <= value < 1 and not (name == "decay" and value == 1):
        raise UseError(f"{label} is {value!r}", where=here(),
                       hint=f"use a number from 0 to {'1' if name == 'decay' else 'below 1'}")
    if not value >= 0:
        raise UseError(f"{label} is {value!r}", where=here(), hint="use a number >= 0 or a Tensor")


def _check_scalar(name: str, value: Any) -> None:
    label = _LABELS.get(name, name)
    if isinstance(value, Tensor) and value.shape:
        raise ShapeError(f"{label} is one number", shapes=[value.shape], where=here())
    if not isinstance(value, Tensor) and (isinstance(value, bool) or not isinstance(value, Real)):
        raise UseError(f"{label} is {value!r}", where=here(),
                       hint="use a number >= 0, a Tensor, or a function of the number of updates")
