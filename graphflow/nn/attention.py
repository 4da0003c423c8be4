"""Attention, and how its inputs know where they stand in a sequence."""
from __future__ import annotations

from typing import Any

import numpy as np

from graphflow import init
from graphflow.compiler.plan.dims import Dim, DimLike, product
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.creation import arange, tri
from graphflow.nn.dense import dense
from graphflow.nn.dropout import dropout as drop
from graphflow.nn.geometry import check_count, check_float, fixed_extent
from graphflow.nn.parameters import layer_parameter
from graphflow.products import matmul
from graphflow.reductions import softmax, sum
from graphflow.scope import here
from graphflow.shapes import expand_dims, reshape, stack, swapaxes, transpose
from graphflow.state import Naming
from graphflow.tensor import Tensor, cast, element_type, elementwise


def attention(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None,
              causal: bool = False, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention: softmax(queries keysᵀ · scale) values.

    queries: [..., T, D]; keys: [..., S, D]; values: [..., S, E]; result: [..., T, E]. mask: bools that
    broadcast to [..., T, S], true where a query may look; `causal`: only at keys up to its own place. A query
    that may look nowhere gets zeros. scale: 1/√D without. dropout: the rate at which weights are dropped in
    training. Vaswani et al., "Attention is all you need", NIPS 2017.
    """
    for x in (queries, keys, values):
        check_float("attention", x)
    if min(queries.ndim, keys.ndim, values.ndim) < 2 or keys.shape[-2] != values.shape[-2] \
            or queries.shape[-1] != keys.shape[-1]:
        raise ShapeError("attention takes queries [..., T, D], keys [..., S, D] and values [..., S, E]",
                         op="attention", shapes=[queries.shape, keys.shape, values.shape], where=here())
    if scale is None:
        scale = fixed_extent("attention", queries, -1, "features", 2) ** -0.5
    scores = matmul(queries * scale, swapaxes(keys, -1, -2))
    seen = _seen(mask, causal, scores)
    weights = _weights(scores, seen)
    return matmul(drop(weights, dropout) if dropout else weights, values)


def _seen(mask: Tensor | None, causal: bool, scores: Tensor) -> Tensor | None:
    if mask is not None and mask.dtype != BOOL:
        raise DTypeError(f"attention: the mask holds bools, not {mask.dtype.full_name}", op="attention",
                         shapes=[mask.shape], where=here(), hint="true where a query may look")
    if not causal:
        return mask
    before = tri(scores.shape[-2], scores.shape[-1], dtype="bool")
    return before if mask is None else elementwise("logical_and", mask, before)


def _weights(scores: Tensor, seen: Tensor | None) -> Tensor:
    """The softmax over what is seen; all 0 where that is nothing."""
    if seen is None:
        return softmax(scores)
    shares = softmax(elementwise("where", seen, scores, _LEAST))
    return elementwise("where", seen, shares, 0.0)


_LEAST = -1e30
"""A score so low that its share is 0 beside any other; finite, so that a row of them gives no NaN."""


def multi_head_attention(queries: Tensor, keys: Tensor | None = None, values: Tensor | None = None, *,
                         heads: int, size: int | None = None, mask: Tensor | None = None,
                         causal: bool = False, dropout: float = 0.0, use_bias: bool = True,
                         weight_init: Any = init.glorot_uniform, name: str | None = None) -> Tensor:
    """Attention of several heads side by side, each in a projection of its own.

    queries: [N, T, D]; keys: [N, S, K], the queries without; values: [N, S, V], the keys without. size: that
    of the result, [N, T, size], D without; it divides into `heads`. mask: bools [T, S], [N, T, S] or
    [N, heads, T, S]; see `attention` for the rest. Parameters: ``NAME.query.W`` and ``.b``, ``NAME.key``,
    ``NAME.value``, ``NAME.out``. Vaswani et al., NIPS 2017.
    """
    keys = queries if keys is None else keys
    values = keys if values is None else values
    for x in (queries, keys, values):
        check_float("multi_head_attention", x)
        if x.ndim != 3:
            raise ShapeError("multi_head_attention takes [N, T, features]", op="multi_head_attention",
                             shapes=[x.shape], where=here())
    check_count("multi_head_attention", "heads", heads)
    width = fixed_extent("multi_head_attention", queries, -1, "features", 3) if size is None else size
    if width % heads:
        raise UseError(f"a size of {width} does not divide into {heads} heads", op="multi_head_attention",
                       shapes=[queries.shape], where=here())
    naming = Naming.of(name, "multi_head_attention")

    def project(x: Tensor, part: str) -> Tensor:
        features = fixed_extent("multi_head_attention", x, -1, "features", 3)
        weights = layer_parameter(naming, f"{part}.W", (features, width), weight_init, x.dtype)
        bias = layer_parameter(naming, f"{part}.b", (width,), 0.0, x.dtype) if use_bias else 0.0
        return dense(x, width, use_bias=use_bias, weight_init=weights, bias_init=bias)

    def split(x: Tensor) -> Tensor:
        return transpose(reshape(x, (*x.shape[:2], heads, width // heads)), (0, 2, 1, 3))

    if mask is not None and mask.ndim == 3:
        mask = expand_dims(mask, 1)
    out = attention(split(project(queries, "query")), split(project(keys, "key")),
                    split(project(values, "value")), mask=mask, causal=causal, dropout=dropout)
    return project(reshape(transpose(out, (0, 2, 1, 3)), (*queries.shape[:2], width)), "out")


def additive_attention(query: Tensor, keys: Tensor, values: Tensor, units: int, *,
                       mask: Tensor | None = None, weight_init: Any = init.glorot_uniform,
                       name: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention by a small net: (mean of the values, its weights), of softmax_s(v · tanh(q Wq + k_s Wk)).

    query: [N, Q], a decoder's state; keys: [N, S, K]; values: [N, S, E]; mask: bools [N, S]; results: [N, E]
    and [N, S]. Parameters: ``NAME.Wq`` [Q, units], ``NAME.Wk`` [K, units], ``NAME.v`` [units]. Bahdanau, Cho
    and Bengio, ICLR 2015.
    """
    for x in (query, keys, values):
        check_float("additive_attention", x)
    if query.ndim != 2 or keys.ndim != 3 or values.ndim != 3 or keys.shape[:2] != values.shape[:2]:
        raise ShapeError("additive_attention takes a query [N, Q], keys [N, S, K] and values [N, S, E]",
                         op="additive_attention", shapes=[query.shape, keys.shape, values.shape],
                         where=here())
    check_count("additive_attention", "units", units)
    naming = Naming.of(name, "additive_attention")
    sizes = [fixed_extent("additive_attention", x, -1, "features", 2) for x in (query, keys)]
    wq = layer_parameter(naming, "Wq", (sizes[0], units), weight_init, query.dtype)
    wk = layer_parameter(naming, "Wk", (sizes[1], units), weight_init, keys.dtype)
    v = layer_parameter(naming, "v", (units, 1), weight_init, keys.dtype)
    count, steps = keys.shape[:2]
    of_keys = reshape(matmul(reshape(keys, (product((count, steps)), sizes[1])), wk), (count, steps, units))
    mixed = elementwise("tanh", expand_dims(matmul(query, wq), 1) + of_keys)
    scores = reshape(matmul(reshape(mixed, (product((count, steps)), units)), v), (count, steps))
    weights = _weights(scores, _seen(mask, False, scores))
    return sum(expand_dims(weights, -1) * values, 1), weights


def sinusoidal_encoding(length: DimLike, features: int, dtype: Any = "float32") -> Tensor:
    """[length, features]: sin(t / 10000^(2i/features)) in the even columns 2i, the cosine in the odd ones, to
    be added to the inputs of attention. Vaswani et al., NIPS 2017."""
    check_count("sinusoidal_encoding", "features", features)
    even = 10000.0 ** (-np.arange(0, features, 2) / features)
    rates = np.repeat(even, 2)[:features]
    angles = expand_dims(arange(length, dtype="float64"), 1) * rates
    odd = np.arange(features) % 2 == 1
    waves = elementwise("where", odd, elementwise("cos", angles), elementwise("sin", angles))
    return cast(waves, dtype)


def learned_encoding(length: DimLike, features: int, *, weight_init: Any = None, dtype: Any = "float32",
                     name: str | None = None) -> Tensor:
    """[length, features]: a trained vector for every place, the parameter ``NAME.W``."""
    if isinstance(length, Dim):
        raise ShapeError(f"learned_encoding needs a fixed length, not {length}", op="learned_encoding",
                         where=here(), hint="make it for the longest sequence and slice it: encoding[:T]")
    check_count("learned_encoding", "length", length)
    check_count("learned_encoding", "features", features)
    return layer_parameter(Naming.of(name, "learned_encoding"), "W", (length, features),
                           init.normal(0.02) if weight_init is None else weight_init, element_type(dtype))


def rotary_encoding(x: Tensor) -> Tensor:
    """`x` with each pair of neighbouring features turned by an angle that grows with its place: dot products
    of two results depend on their distance alone. x: [..., T, D] with an even D; for queries and keys. Su,
    Lu, Pan, Murtadha, Wen and Liu, "RoFormer", 2021."""
    check_float("rotary_encoding", x)
    features = fixed_extent("rotary_encoding", x, -1, "features", 2)
    if features % 2:
        raise ShapeError("rotary_encoding needs an even number of features", op="rotary_encoding",
                         shapes=[x.shape], where=here())
    rates = 10000.0 ** (-np.arange(0, features, 2) / features)
    angles = expand_dims(arange(x.shape[-2], dtype="float64"), 1) * rates
    cos, sin = (cast(elementwise(name, angles), x.dtype) for name in ("cos", "sin"))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return reshape(turned, x.shape)
