"""Layers as functions: each makes its parameters and returns its output.

Images are [N, C, H, W]; weights are (in, out) for dense layers and (out, in / groups, height, width) for
convolutions, named ``NAME.W`` and ``NAME.b``. Without a name a layer is called "dense", "dense_1", … Initial
values (`gf.init`) may everywhere be a Tensor, which is then used as the parameter; `shared` gives several
calls the same parameters.
"""
from __future__ import annotations

from graphflow.functions import op_function
from graphflow.nn.attention import (
    additive_attention,
    attention,
    learned_encoding,
    multi_head_attention,
    rotary_encoding,
    sinusoidal_encoding,
)
from graphflow.nn.combine import inception, residual, sequential
from graphflow.nn.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    depthwise_conv2d,
)
from graphflow.nn.dense import dense, flatten
from graphflow.nn.dropout import alpha_dropout, dropout, spatial_dropout
from graphflow.nn.embedding import embedding
from graphflow.nn.norm import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    rms_norm,
    weight_norm,
)
from graphflow.nn.parameters import shared
from graphflow.nn.pool import (
    adaptive_avg_pool,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    global_avg_pool,
    global_max_pool,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_pool_with_switches,
    max_unpool,
    upsample,
)
from graphflow.nn.recurrent import gru, gru_cell, lstm, lstm_cell, rnn
from graphflow.reductions import log_softmax, softmax

__all__ = ["adaptive_avg_pool", "additive_attention", "alpha_dropout", "attention", "avg_pool1d",
           "avg_pool2d", "avg_pool3d", "batch_norm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
           "conv_transpose2d", "conv_transpose3d", "dense", "depthwise_conv2d", "dropout", "embedding",
           "flatten", "global_avg_pool", "global_max_pool", "group_norm", "gru", "gru_cell", "inception",
           "instance_norm", "layer_norm", "learned_encoding", "local_response_norm", "log_softmax", "lstm",
           "lstm_cell", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool_with_switches", "max_unpool",
           "multi_head_attention", "relu", "residual", "rms_norm", "rnn", "rotary_encoding", "sequential",
           "shared", "sigmoid", "sinusoidal_encoding", "softmax", "spatial_dropout", "tanh", "upsample",
           "weight_norm"]

relu, sigmoid, tanh = op_function("relu"), op_function("sigmoid"), op_function("tanh")
