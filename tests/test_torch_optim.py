"""Optimizers, schedules and clipping against PyTorch: a small net in float64, 100 steps each."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import graphflow as gf
from graphflow.optim import schedule

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.cpu
STEPS = 100
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((12, 5)), RNG.standard_normal((12, 3))
START = {"w0": RNG.standard_normal((5, 7)) * 0.5, "b0": RNG.standard_normal(7) * 0.1,
         "w1": RNG.standard_normal((7, 3)) * 0.5, "b1": RNG.standard_normal(3) * 0.1}
Tensors = dict[str, Any]


def loss_of(p: Tensors, x: Any, y: Any, tanh: Callable[[Any], Any]) -> Any:
    """The mean squared error of a net of two layers, written for both languages."""
    return ((tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"] - y) ** 2).mean()


def ours(make: Callable[[Tensors], gf.optim.Optimizer], device: str = "cpu", steps: int = STEPS
         ) -> dict[str, np.ndarray]:
    """The parameters after training in graphflow; `make` gets the parameters by name."""
    x, y = gf.input("x", X.shape, "float64"), gf.input("y", Y.shape, "float64")
    p = {name: gf.parameter(value.shape, value, name, "float64") for name, value in START.items()}
    loss = loss_of(p, x, y, gf.tanh)
    step = gf.function([x, y], loss, make(p).minimize(loss), device=device)
    for _ in range(steps):
        step(X, Y)
    return {name: step.store[name] for name in START}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """NAdam and RAdam keep numbers in PyTorch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theirs(make: Callable[[Tensors], Any], scheduler: Callable[[Any], Any] | None = None,
           change: Callable[[list[Any]], Any] | None = None, steps: int = STEPS) -> dict[str, np.ndarray]:
    """The parameters after training in PyTorch; `change` may clip the gradients."""
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    p = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
    optimizer = make(p)
    course = scheduler(optimizer) if scheduler else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(p, x, y, torch.tanh).backward()
        if change:
            change(list(p.values()))
        optimizer.step()
        if course:
            course.step()
    return {name: t.detach().numpy() for name, t in p.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        assert np.abs(value - START[name]).max() > 1e-3, "nothing was learnt: the comparison is worth little"
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


def theirs_of(name: str, **options: Any) -> Callable[[Tensors], Any]:
    return lambda p: getattr(torch.optim, name)(p.values(), **options)


opt = gf.optim
CASES: dict[str, tuple[Callable[[], gf.optim.Optimizer], Callable[[Tensors], Any]]] = {
    "sgd": (lambda: opt.SGD(0.05), theirs_of("SGD", lr=0.05)),
    "sgd l2": (lambda: opt.SGD(0.05, l2=0.1), theirs_of("SGD", lr=0.05, weight_decay=0.1)),
    "momentum": (lambda: opt.SGD(0.05, 0.9), theirs_of("SGD", lr=0.05, momentum=0.9)),
    "dampening": (lambda: opt.SGD(0.05, 0.9, dampening=0.3),
                  theirs_of("SGD", lr=0.05, momentum=0.9, dampening=0.3)),
    "nesterov": (lambda: opt.SGD(0.05, 0.9, nesterov=True, l2=0.01),
                 theirs_of("SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "adagrad": (lambda: opt.Adagrad(0.05, initial=0.1, l2=0.01),
                theirs_of("Adagrad", lr=0.05, initial_accumulator_value=0.1, weight_decay=0.01)),
    "adagrad decay": (lambda: opt.Adagrad(schedule.inverse_time(0.05, 0.02)),
                      theirs_of("Adagrad", lr=0.05, lr_decay=0.02)),
    "adadelta": (lambda: opt.Adadelta(0.7, 0.8, l2=0.01),
                 theirs_of("Adadelta", lr=0.7, rho=0.8, weight_decay=0.01)),
    "rmsprop": (lambda: opt.RMSprop(0.003, 0.95, l2=0.01),
                theirs_of("RMSprop", lr=0.003, alpha=0.95, weight_decay=0.01)),
    "rmsprop centred": (lambda: opt.RMSprop(0.01, 0.95, centred=True),
                        theirs_of("RMSprop", lr=0.01, alpha=0.95, centered=True)),
    "rmsprop momentum": (lambda: opt.RMSprop(0.01, 0.95, momentum=0.8, centred=True),
                         theirs_of("RMSprop", lr=0.01, alpha=0.95, momentum=0.8, centered=True)),
    "adam": (lambda: opt.Adam(0.01), theirs_of("Adam", lr=0.01)),
    "adam l2": (lambda: opt.Adam(0.01, 0.8, 0.95, 1e-3, l2=0.1),
                theirs_of("Adam", lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)),
    "amsgrad": (lambda: opt.Adam(0.01, beta2=0.9, amsgrad=True),
                theirs_of("Adam", lr=0.01, betas=(0.9, 0.9), amsgrad=True)),
    "adamw": (lambda: opt.AdamW(0.01, weight_decay=0.3), theirs_of("AdamW", lr=0.01, weight_decay=0.3)),
    "adamw amsgrad": (lambda: opt.AdamW(0.01, beta2=0.9, amsgrad=True),
                      theirs_of("AdamW", lr=0.01, betas=(0.9, 0.9), amsgrad=True)),
    "adamax": (lambda: opt.Adamax(0.01, l2=0.01), theirs_of("Adamax", lr=0.01, weight_decay=0.01)),
    "nadam": (lambda: opt.NAdam(0.01, l2=0.01), theirs_of("NAdam", lr=0.01, weight_decay=0.01)),
    "nadamw": (lambda: opt.NAdam(0.01, momentum_decay=0.1, weight_decay=0.2),
               theirs_of("NAdam", lr=0.01, momentum_decay=0.1, weight_decay=0.2,
                         decoupled_weight_decay=True)),
    "radam": (lambda: opt.RAdam(0.01, l2=0.01), theirs_of("RAdam", lr=0.01, weight_decay=0.01)),
    "radamw": (lambda: opt.RAdam(0.01, beta2=0.99, weight_decay=0.2),
               theirs_of("RAdam", lr=0.01, betas=(0.9, 0.99), weight_decay=0.2, decoupled_weight_decay=True)),
    "rprop": (lambda: opt.Rprop(0.01, 0.4, 1.3, 1e-5, 0.2),
              theirs_of("Rprop", lr=0.01, etas=(0.4, 1.3), step_sizes=(1e-5, 0.2))),
}


@pytest.mark.parametrize("case", CASES)
def test_optimizers_agree(case: str) -> None:
    make, reference = CASES[case]
    assert_same(ours(lambda p: make()), theirs(reference))


def test_groups_agree() -> None:
    def reference(p: Tensors) -> Any:
        return torch.optim.AdamW([{"params": [p["b0"], p["b1"]], "weight_decay": 0.0, "betas": (0.8, 0.99)},
                                  {"params": [p["w0"]], "lr": 0.003}, {"params": [p["w1"]]}], lr=0.01)

    def make(p: Tensors) -> gf.optim.Optimizer:
        biases = {"weight_decay": 0, "beta1": 0.8, "beta2": 0.99}
        return opt.AdamW(0.01, groups=[(lambda q: q.ndim == 1, biases), ([p["w0"]], {"lr": 0.003})])

    assert_same(ours(make), theirs(reference))


def test_groups_of_nadam_agree() -> None:
    """Its product of momenta is one number for each group."""
    def reference(p: Tensors) -> Any:
        return torch.optim.NAdam([{"params": [p["b0"], p["b1"]], "betas": (0.8, 0.99)},
                                  {"params": [p["w0"], p["w1"]]}], lr=0.003)

    found = ours(lambda p: opt.NAdam(0.003, groups=[([p["b0"], p["b1"]], {"beta1": 0.8, "beta2": 0.99})]))
    assert_same(found, theirs(reference))


NORMS = [2.0, 1.0, 3.0, float("inf")]


@pytest.mark.parametrize("norm", NORMS)
def test_clipping_by_the_global_norm_agrees(norm: float) -> None:
    found = ours(lambda p: opt.SGD(0.5, clip=opt.clip.by_global_norm(0.2, norm)))
    assert_same(found, theirs(theirs_of("SGD", lr=0.5),
                              change=lambda p: torch.nn.utils.clip_grad_norm_(p, 0.2, norm)))


def test_clipping_by_value_agrees() -> None:
    found = ours(lambda p: opt.SGD(0.5, 0.9, clip=opt.clip.by_value(0.02)))
    assert_same(found, theirs(theirs_of("SGD", lr=0.5, momentum=0.9),
                              change=lambda p: torch.nn.utils.clip_grad_value_(p, 0.02)))


T = torch.optim.lr_scheduler
SCHEDULES: dict[str, tuple[schedule.Schedule, Callable[[Any], Any]]] = {
    "step": (schedule.step(0.1, 7, 0.5), lambda o: T.StepLR(o, 7, 0.5)),
    "multistep": (schedule.multistep(0.1, [5, 20, 21], 0.3), lambda o: T.MultiStepLR(o, [5, 20, 21], 0.3)),
    "exponential": (schedule.exponential(0.1, 0.97), lambda o: T.ExponentialLR(o, 0.97)),
    "cosine": (schedule.cosine(0.1, 100, 0.01), lambda o: T.CosineAnnealingLR(o, 100, 0.01)),
    "restarts": (schedule.cosine_restarts(0.1, 9, end=0.01),
                 lambda o: T.CosineAnnealingWarmRestarts(o, 9, eta_min=0.01)),
    "longer restarts": (schedule.cosine_restarts(0.1, 5, 3),
                        lambda o: T.CosineAnnealingWarmRestarts(o, 5, 3)),
    "polynomial": (schedule.polynomial(0.1, 40, power=2), lambda o: T.PolynomialLR(o, 40, 2)),
    "linear": (schedule.linear(0.1 / 3, 0.1, 40), lambda o: T.LinearLR(o, 1 / 3, 1.0, 40)),
    "warm-up": (schedule.warmup(10, schedule.exponential(0.1, 0.95), 0.2),
                lambda o: T.SequentialLR(o, [T.LinearLR(o, 0.2, 1.0, 10), T.ExponentialLR(o, 0.95)], [10])),
    "piecewise": (schedule.piecewise([4, 30], [0.05, schedule.cosine(0.1, 50), schedule.step(0.1, 9)]),
                  lambda o: T.SequentialLR(o, [T.ConstantLR(o, 0.5, 1000), T.CosineAnnealingLR(o, 50),
                                               T.StepLR(o, 9)], [4, 30])),
    "one cycle": (schedule.one_cycle(0.1, 101), lambda o: T.OneCycleLR(o, 0.1, 101, cycle_momentum=False)),
    "inverse root": (schedule.inverse_sqrt(0.1, 10),
                     lambda o: T.LambdaLR(o, lambda t: min((t + 1) / 10, (10 / (t + 1)) ** 0.5))),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning",
                            "ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_agree(case: str) -> None:
    ours_of_it, make = SCHEDULES[case]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = make(optimizer)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours_of_it.values(STEPS), expected, rtol=1e-10, atol=1e-15)


def test_schedules_agree_in_training() -> None:
    """One-cycle moves the momentum too."""
    momentum = schedule.one_cycle(0.85, 101, 0.95, 0.95)
    found = ours(lambda p: opt.SGD(schedule.one_cycle(0.1, 101), momentum))
    expected = theirs(theirs_of("SGD", lr=0.1, momentum=0.9), lambda o: T.OneCycleLR(o, 0.1, 101))
    assert_same(found, expected)


def test_the_moving_average_agrees() -> None:
    x, y = gf.input("x", X.shape, "float64"), gf.input("y", Y.shape, "float64")
    p = {name: gf.parameter(value.shape, value, name, "float64") for name, value in START.items()}
    loss = loss_of(p, x, y, gf.tanh)
    optimizer = opt.SGD(0.1, average=opt.EMA(0.9))
    step = gf.function([x, y], loss, optimizer.minimize(loss))
    averaged = gf.function([x, y], optimizer.averaged(loss))

    net = torch.nn.ParameterDict({name: torch.tensor(v) for name, v in START.items()})
    mean = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    theirs_optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(STEPS // 2):
        step(X, Y)
        theirs_optimizer.zero_grad()
        loss_of(net, torch.from_numpy(X), torch.from_numpy(Y), torch.tanh).backward()
        theirs_optimizer.step()
        mean.update_parameters(net)
        expected = loss_of(mean.module, torch.from_numpy(X), torch.from_numpy(Y), torch.tanh).detach()
        np.testing.assert_allclose(averaged(X, Y), float(expected), rtol=1e-10)
