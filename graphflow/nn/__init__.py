"""Layers as functions: each makes its parameters and returns its output.

Images are [N, C, H, W]; weights are (in, out) for dense layers and (out, in / groups, height, width) for
convolutions, named ``NAME.W`` and ``NAME.b``. Without a name a layer is called "dense", "dense_1", …
"""
from __future__ import annotations

from graphflow.functions import log_softmax, op_function, softmax
from graphflow.nn.conv import conv2d
from graphflow.nn.dense import dense, flatten
from graphflow.nn.dropout import dropout, random_uniform
from graphflow.nn.pool import avg_pool2d, max_pool2d

__all__ = ["avg_pool2d", "conv2d", "dense", "dropout", "flatten", "log_softmax", "max_pool2d",
           "random_uniform", "relu", "sigmoid", "softmax", "tanh"]

relu, sigmoid, tanh = op_function("relu"), op_function("sigmoid"), op_function("tanh")
