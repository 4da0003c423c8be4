"""Optimizers: they append the update of every parameter to the graph, where it is compiled with the rest of
the step.

    step = gf.function([x, y], loss, gf.optim.Adam(1e-3).minimize(loss))

Learning rates, momenta, penalties: each is a number, a Tensor or a schedule (`gf.optim.schedule`). What they
all take (penalties, clipping, groups, accumulation, averages) is told at `Optimizer`.
"""
from __future__ import annotations

from graphflow.optim import clip, schedule
from graphflow.optim.adam import Adam, Adamax, AdamW, NAdam, RAdam
from graphflow.optim.adaptive import Adadelta, Adagrad, RMSprop
from graphflow.optim.average import EMA, Average, PolyakAverage
from graphflow.optim.constraint import max_norm, non_negative
from graphflow.optim.optimizer import Hyperparameter, Optimizer, Step
from graphflow.optim.parameters import freeze, trainable, unfreeze
from graphflow.optim.scaling import LossScale
from graphflow.optim.sgd import SGD, Lion, Rprop

__all__ = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Average", "EMA", "Hyperparameter", "Lion",
           "LossScale", "NAdam", "Optimizer", "PolyakAverage", "RAdam", "RMSprop", "Rprop", "SGD", "Step",
           "clip", "freeze", "max_norm", "non_negative", "schedule", "trainable", "unfreeze"]
