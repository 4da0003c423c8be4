"""What graphflow can do, as small nets in a few programs: tables for `test_cuda_nets`.

A case is made under its name, whose first word is the function that it is of: a function without a case is
found out. Floats of the arrays and all parameters are differentiated by where `slopes` holds.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch_cases import normal, parameters_of

import graphflow as gf

nn, loss, opt = gf.nn, gf.loss, gf.optim


class Case(NamedTuple):
    """Results of tensors made from the arrays."""
    arrays: tuple[np.ndarray, ...]
    build: Callable[..., Any]
    slopes: bool = True


def case(build: Callable[..., Any], *arrays: Any, slopes: bool = True) -> Case:
    """A case; floats are taken as float32."""
    found = [np.asarray(a) for a in arrays]
    return Case(tuple(a.astype(np.float32) if a.dtype.kind == "f" else a for a in found), build, slopes)


def program(cases: Mapping[str, Case], device: str, training: bool = True
            ) -> tuple[gf.Program, list[np.ndarray]]:
    """(all cases in one program, its feeds); outputs are called NAME.0, NAME.1, … results first."""
    inputs: list[gf.Tensor] = []
    feeds: list[np.ndarray] = []
    outputs: dict[str, gf.Tensor] = {}
    for name, made in cases.items():
        word = re.sub(r"\W", "_", name)
        xs = [gf.input(f"{word}_{i}", a.shape, a.dtype) for i, a in enumerate(made.arrays)]
        with gf.scope(word):
            results = made.build(*xs)
        found = list(results) if isinstance(results, (tuple, list)) else [results]
        if made.slopes:
            total = sum((gf.sum(y * weights_of(y)) for y in found if y.dtype.is_float), gf.constant(0.0))
            leaves = [*(x for x in xs if x.dtype.is_float), *parameters_of(total)]
            found += gf.grad(total, leaves) if leaves else []
        inputs, feeds = inputs + xs, feeds + list(made.arrays)
        outputs.update({f"{name}.{i}": t for i, t in enumerate(found)})
    return gf.function(inputs, outputs, training=training, device=device), feeds


def weights_of(y: gf.Tensor) -> np.ndarray:
    """Numbers that tell the elements of a result apart."""
    return np.cos(np.arange(np.prod(y.shape, dtype=int))).reshape(y.shape).astype(np.float32)


IMAGE, LINE, CUBE, ROWS = normal(2, 4, 7, 6), normal(2, 4, 9), normal(2, 2, 4, 5, 4), normal(6, 4)
STEPS, OTHER = normal(5, 3, 4), normal(6, 4, seed=1)
LABELS = np.array([3, 0, 2, 2, 1, 3])
LENGTHS = np.array([5, 3, 1])
SHARES = np.exp(OTHER) / np.exp(OTHER).sum(1, keepdims=True)

CONVOLUTIONS = {
    "conv1d": case(lambda t: nn.conv1d(t, 6, 3, 2, 1, dilation=2), LINE),
    "conv2d": case(lambda t: nn.conv2d(t, 6, (3, 2), padding="same", activation=gf.relu), IMAGE),
    "conv2d strided": case(lambda t: nn.conv2d(t, 5, 3, 2, 1), IMAGE),
    "conv2d groups": case(lambda t: nn.conv2d(t, 6, 3, groups=2, dilation=2, use_bias=False), IMAGE),
    "conv2d point": case(lambda t: nn.conv2d(t, 9, 1), IMAGE),
    "conv2d flipped": case(lambda t: nn.conv2d(t, 3, (3, 4), padding=((2, 0), (1, 2)), flip=True), IMAGE),
    "conv3d": case(lambda t: nn.conv3d(t, 3, (2, 3, 1), padding=1), CUBE),
    "depthwise_conv2d": case(lambda t: nn.depthwise_conv2d(t, 3, 2, 1, multiplier=2), IMAGE),
    "conv_transpose1d": case(lambda t: nn.conv_transpose1d(t, 3, 4, 2, 1), LINE),
    "conv_transpose2d": case(lambda t: nn.conv_transpose2d(t, 6, 3, 2, 1, output_padding=1, groups=2), IMAGE),
    "conv_transpose3d": case(lambda t: nn.conv_transpose3d(t, 2, 2, 2), CUBE),
    "inception": case(lambda t: nn.inception(
        t, lambda u: nn.conv2d(u, 3, 1), lambda u: nn.conv2d(u, 2, 3, padding=1),
        lambda u: nn.max_pool2d(u, 3, 1, 1)), IMAGE),
    "residual": case(lambda t: nn.residual(t, nn.sequential(
        lambda u: nn.conv2d(u, 4, 3, padding=1, use_bias=False), nn.batch_norm), activation=gf.relu), IMAGE),
    "sequential": case(nn.sequential(lambda u: nn.conv2d(u, 2, 3), nn.flatten, lambda u: nn.dense(u, 3)),
                       IMAGE),
}
POOLING = {
    "max_pool1d": case(lambda t: nn.max_pool1d(t, 3, 2, 1), LINE),
    "max_pool2d": case(lambda t: nn.max_pool2d(t, 2), IMAGE),
    "max_pool2d overlapping": case(lambda t: nn.max_pool2d(t, 3, 2, 1), IMAGE),
    "max_pool3d": case(lambda t: nn.max_pool3d(t, 2, 1), CUBE),
    "avg_pool1d": case(lambda t: nn.avg_pool1d(t, 4, 3, 2, include_padding=False), LINE),
    "avg_pool2d": case(lambda t: nn.avg_pool2d(t, 3, 2, 1), IMAGE),
    "avg_pool3d": case(lambda t: nn.avg_pool3d(t, 2, 1, 1), CUBE),
    "global_max_pool": case(nn.global_max_pool, IMAGE),
    "global_avg_pool": case(nn.global_avg_pool, IMAGE),
    "adaptive_avg_pool": case(lambda t: nn.adaptive_avg_pool(t, (4, 3)), IMAGE),
    "max_pool_with_switches": case(lambda t: nn.max_pool_with_switches(t, 2), IMAGE, slopes=False),
    "max_unpool": case(lambda t: nn.max_unpool(*nn.max_pool_with_switches(t, 2), 2, size=(7, 6)), IMAGE),
    "upsample": case(lambda t: nn.upsample(t, 2), IMAGE),
    "upsample linear": case(lambda t: nn.upsample(t, (3, 2), "linear", align_corners=True), IMAGE),
    "flatten": case(lambda t: nn.flatten(t) * 2.0, IMAGE),
    "batch_norm": case(nn.batch_norm, IMAGE),
    "batch_norm far": case(nn.batch_norm, normal(8, 3) + 100),
    "layer_norm": case(nn.layer_norm, normal(5, 70)),
    "layer_norm image": case(lambda t: nn.layer_norm(t, (-2, -1), eps=1e-3), IMAGE),
    "rms_norm": case(nn.rms_norm, ROWS),
    "group_norm": case(lambda t: nn.group_norm(t, 2), IMAGE),
    "instance_norm": case(lambda t: nn.instance_norm(t, affine=True), IMAGE),
    "local_response_norm": case(lambda t: nn.local_response_norm(t, 3, alpha=0.5, k=2.0), IMAGE),
}
DENSE = {
    "dense": case(lambda t: nn.dense(t, 33, gf.tanh), normal(5, 18)),
    "dense deep": case(lambda t: nn.dense(t, 3, use_bias=False), STEPS),
    "dense vector": case(lambda t: nn.dense(t, 4), normal(3)),
    "dense nothing": case(lambda t: nn.dense(t, 4), normal(0, 3)),
    "weight_norm": case(lambda t: nn.dense(t, 4, use_bias=False, weight_init=nn.weight_norm(
        gf.parameter((4, 4), gf.init.normal(1.0), "direction"), 1, name="length")), ROWS),
    "shared": case(lambda t: (lambda part: part(part(t)))(nn.shared(lambda u: nn.dense(u, 4))), ROWS),
    "embedding": case(lambda i: nn.embedding(i, 7, 5, padding_index=2), np.array([[1, 0, 6], [6, 2, 1]])),
    "attention": case(lambda q, k: nn.attention(q, k, k, causal=True), normal(2, 5, 8),
                      normal(2, 5, 8, seed=1)),
    "attention masked": case(lambda q, m: nn.attention(q, q, q, mask=m), normal(2, 3, 8),
                             np.arange(9).reshape(3, 3) % 4 > 0),
    "multi_head_attention": case(lambda t: nn.multi_head_attention(t, heads=2, causal=True, use_bias=False),
                                 normal(2, 5, 8)),
    "additive_attention": case(lambda q, k: nn.additive_attention(q, k, k, 6), normal(2, 3), normal(2, 5, 4)),
    "sinusoidal_encoding": case(lambda t: t + nn.sinusoidal_encoding(5, 8), normal(2, 5, 8)),
    "learned_encoding": case(lambda t: t * nn.learned_encoding(5, 8), normal(2, 5, 8)),
    "rotary_encoding": case(nn.rotary_encoding, normal(2, 5, 8)),
    "relu": case(nn.relu, ROWS), "sigmoid": case(nn.sigmoid, ROWS), "tanh": case(nn.tanh, ROWS),
    "softmax": case(nn.softmax, normal(3, 70)), "log_softmax": case(nn.log_softmax, ROWS),
    "dropout": case(lambda t: nn.dropout(t, 0.3), normal(9, 20)),
    "spatial_dropout": case(lambda t: nn.spatial_dropout(t, 0.5), IMAGE),
    "alpha_dropout": case(lambda t: nn.alpha_dropout(t, 0.3), ROWS),
}
RECURRENT = {
    "rnn": case(lambda t: nn.rnn(t, 6), STEPS),
    "lstm": case(lambda t: nn.lstm(t, 6)[0], STEPS),
    "lstm deep": case(lambda t, n: (lambda y, s: [y, *s])(*nn.lstm(
        t, 3, layers=2, bidirectional=True, lengths=n, dropout=0.2)), STEPS, LENGTHS),
    "gru": case(lambda t: nn.gru(t, 5, reverse=True), STEPS),
    "gru checkpoint": case(lambda t: nn.gru(t, 5, checkpoint=2)[0], STEPS),
    "lstm_cell": case(lambda x, h: nn.lstm_cell(x, (h, h)), ROWS, OTHER),
    "gru_cell": case(nn.gru_cell, ROWS, OTHER),
}
LAYERS = {"convolutions": CONVOLUTIONS, "pooling and norms": POOLING, "dense and attention": DENSE,
          "recurrent": RECURRENT}

LOSSES = {
    "squared_error": case(loss.squared_error, ROWS, OTHER),
    "squared_error rows": case(lambda x, y: loss.squared_error(x, y, reduction="none"), ROWS, OTHER),
    "mean_squared_error": case(loss.mean_squared_error, ROWS, OTHER),
    "absolute_error": case(lambda x, y: loss.absolute_error(x, y, reduction="sum"), ROWS, OTHER),
    "huber": case(loss.huber, ROWS, OTHER), "smooth_l1": case(loss.smooth_l1, ROWS, OTHER),
    "poisson": case(loss.poisson, ROWS, np.abs(OTHER)),
    "softmax_cross_entropy": case(lambda x, y: loss.softmax_cross_entropy(
        x, y, label_smoothing=0.1, class_weights=[0.5, 1.0, 2.0, 4.0], ignore_index=1), ROWS, LABELS),
    "softmax_cross_entropy plain": case(loss.softmax_cross_entropy, ROWS, LABELS),
    "softmax_cross_entropy shares": case(loss.softmax_cross_entropy, ROWS, SHARES),
    "negative_log_likelihood": case(lambda x, y: loss.negative_log_likelihood(gf.log_softmax(x), y), ROWS,
                                    LABELS),
    "binary_cross_entropy_from_logits": case(loss.binary_cross_entropy_from_logits, ROWS, SHARES),
    "binary_cross_entropy": case(lambda x, y: loss.binary_cross_entropy(gf.sigmoid(x), y), ROWS, SHARES),
    "kl_divergence": case(lambda x, y: loss.kl_divergence(gf.log_softmax(x), y), ROWS, SHARES),
    "hinge": case(loss.hinge, ROWS, np.sign(OTHER)),
    "multiclass_hinge": case(lambda x, y: loss.multiclass_hinge(x, y, power=2), ROWS, LABELS),
    "cosine_distance": case(loss.cosine_distance, ROWS, OTHER),
    "triplet": case(loss.triplet, ROWS, OTHER, normal(6, 4, seed=2)),
    "contrastive": case(loss.contrastive, ROWS, OTHER, LABELS > 1),
    "ctc": case(loss.ctc, normal(8, 3, 4), np.array([[1, 2], [3, 3], [2, 1]]), np.array([8, 6, 4]),
                np.array([2, 2, 1])),
}
METRICS = {
    "accuracy": case(gf.metrics.accuracy, ROWS, LABELS),
    "binary_accuracy": case(gf.metrics.binary_accuracy, ROWS, (OTHER > 0).astype(np.float32)),
    "top_k_accuracy": case(lambda x, y: gf.metrics.top_k_accuracy(x, y, 2), ROWS, LABELS),
    "confusion_matrix": case(gf.metrics.confusion_matrix, ROWS, LABELS),
    "precision": case(gf.metrics.precision, ROWS, LABELS),
    "recall": case(lambda x, y: gf.metrics.recall(x, y, average="micro"), ROWS, LABELS),
    "f1": case(gf.metrics.f1, ROWS, LABELS),
    "auc": case(lambda x, y: gf.metrics.auc(x, y, bins=50), ROWS[:, 0], (OTHER[:, 0] > 0).astype(np.float32)),
    "perplexity": case(gf.metrics.perplexity, ROWS, LABELS),
    "bits_per_character": case(gf.metrics.bits_per_character, ROWS, LABELS),
    "mean_absolute_error": case(gf.metrics.mean_absolute_error, ROWS, OTHER),
    "mean_squared_error": case(gf.metrics.mean_squared_error, ROWS, OTHER),
    "r_squared": case(gf.metrics.r_squared, ROWS, OTHER),
}


def sums_of(made: Case) -> Case:
    """The sums that a metric counts, in place of the metric."""
    return made._replace(build=lambda *xs: list(made.build(*xs).sums.values()), slopes=False)


MEASURES = {**LOSSES, **{f"metrics.{name}": sums_of(made) for name, made in METRICS.items()}}

SQUARE = normal(2, 5, 5) + 4 * np.eye(5)
FUNCTIONS = {
    "fft": case(gf.fft.fft, normal(3, 12)), "fft prime": case(gf.fft.fft, normal(3, 37)),
    "rfft2": case(gf.fft.rfft2, normal(2, 6, 10)),
    "irfft": case(lambda x: gf.fft.irfft(gf.fft.rfft(x)) * 2.0, normal(3, 15)),
    "fft convolve": case(gf.fft.convolve, normal(2, 40), normal(7)),
    "cholesky": case(lambda a: gf.linalg.cholesky(a @ gf.swapaxes(a, -1, -2)), SQUARE),
    "solve": case(gf.linalg.solve, SQUARE, normal(2, 5, 3)), "inv": case(gf.linalg.inv, SQUARE),
    "solve_triangular": case(lambda a, b: gf.linalg.solve_triangular(a, b, lower=True), SQUARE,
                             normal(2, 5, 3)),
    "slogdet": case(lambda a: list(gf.linalg.slogdet(a)), SQUARE), "det": case(gf.linalg.det, SQUARE),
    "qr": case(lambda a: list(gf.linalg.qr(a)), normal(6, 4)),
    "lstsq": case(gf.linalg.lstsq, normal(6, 4), normal(6, 2)),
    "lu_factor": case(lambda a: list(gf.linalg.lu_factor(a)), SQUARE, slopes=False),
    "sort": case(gf.sort, normal(4, 70)), "argsort": case(gf.argsort, normal(4, 70), slopes=False),
    "top_k": case(lambda x: gf.top_k(x, 3), normal(4, 40)),
    "median": case(lambda x: gf.median(x, 0), normal(7, 5)),
    "quantile": case(lambda x: gf.quantile(x, [0.1, 0.6], 1), normal(3, 11)),
    "cumsum": case(lambda x: gf.cumsum(x, 1), normal(4, 40)),
    "cumprod": case(lambda x: gf.cumprod(x, 0, reverse=True), normal(5, 3)),
    "cummax": case(lambda x: gf.cummax(x, 1), normal(4, 40)),
    "linear_recurrence": case(lambda a, b: gf.linear_recurrence(a, b), normal(3, 9) * 0.5, normal(3, 9)),
    "scatter_add": case(gf.scatter_add, normal(7, 3), np.array([1, 6, 1, 0]), normal(4, 3)),
    "scatter_set": case(gf.scatter_set, normal(7, 3), np.array([1, 6, 2, 0]), normal(4, 3)),
    "unfold": case(lambda x: gf.unfold(x, 3, 2), normal(2, 9)), "erfinv": case(gf.erfinv, SHARES * 1.8 - 0.9),
    "gelu": case(gf.gelu, ROWS), "logsumexp": case(lambda x: gf.logsumexp(x, 1), normal(3, 100)),
    "einsum": case(lambda a, b: gf.einsum("nij,njk->nik", a, b), SQUARE, normal(2, 5, 3)),
    "std": case(lambda x: gf.std(x, 1), normal(3, 40)), "prod": case(lambda x: gf.prod(x, 1), normal(4, 5)),
    "argmax": case(lambda x: gf.argmax(x, 1), normal(4, 70), slopes=False),
    "hessian": case(lambda x: gf.hessian(gf.sum(gf.exp(x) * x[::-1]), x), normal(5), slopes=False),
}


def _stepwise(carry: gf.Tensor, row: gf.Tensor) -> tuple[gf.Tensor, gf.Tensor]:
    new = gf.tanh(carry * 0.5 + row)
    return new, new * gf.cast(gf.step_index() + 1, "float32")


CONTROL = {
    "scan": case(lambda x: gf.scan(_stepwise, gf.zeros((4,)), x), normal(7, 4)),
    "scan checkpoint": case(lambda x: gf.scan(_stepwise, gf.zeros((4,)), x, checkpoint=3), normal(7, 4)),
    "scan reverse": case(lambda x: gf.scan(_stepwise, gf.zeros((4,)), x, reverse=True), normal(7, 4)),
    "checkpoint": case(lambda x: gf.checkpoint(lambda u: nn.dense(gf.tanh(nn.dense(u, 8)), 4))(x), ROWS),
    "check": case(lambda x: gf.check(x * 3.0, gf.all(x < 50.0), "too large"), ROWS),
    "take": case(lambda x, i: gf.take(x, i, 0), normal(5, 3), np.array([4, 0, 4])),
    "custom_gradient": case(gf.custom_gradient(gf.sin, lambda i, o, c: (c * 5.0 * gf.cos(i[0]),)), ROWS),
}
CHOICES = {
    "while_loop": case(lambda x: gf.while_loop(lambda v: gf.sum(v * v) < 500.0, lambda v: v * 1.5, x,
                                               limit=9), normal(6)),
    "cond": case(lambda x: gf.cond(gf.sum(x) > 0.0, lambda: gf.exp(x), lambda: gf.sin(x)), normal(6)),
}
RANDOM = {
    "bits": case(lambda: gf.random.bits((33,)), slopes=False),
    "uniform": case(lambda: gf.random.uniform((5, 9), -1.0, 2.0), slopes=False),
    "bernoulli": case(lambda: gf.random.bernoulli(0.3, (5, 9)), slopes=False),
    "randint": case(lambda: gf.random.randint((50,), -3, 9), slopes=False),
    "exponential": case(lambda: gf.random.exponential((50,)), slopes=False),
    "gumbel": case(lambda: gf.random.gumbel((50,)), slopes=False),
    "normal": case(lambda: gf.random.normal((7, 9)), slopes=False),
    "truncated_normal": case(lambda: gf.random.truncated_normal((50,)), slopes=False),
    "categorical": case(gf.random.categorical, normal(5, 9), slopes=False),
    "permutation": case(gf.random.permutation, np.arange(30), slopes=False),
}
EXACT = ("bits", "randint", "bernoulli", "permutation", "max_pool2d.0", "sort.0", "take.0", "dropout.0")
"""Results in which nothing is rounded."""
TABLES = {**LAYERS, "losses and metrics": MEASURES, "functions": FUNCTIONS, "control": CONTROL,
          "choices": CHOICES, "random": RANDOM}

OPTIMIZERS: dict[str, Callable[[], opt.Optimizer]] = {
    "SGD": lambda: opt.SGD(0.05), "SGD nesterov": lambda: opt.SGD(0.05, 0.9, nesterov=True, l2=0.01),
    "Lion": lambda: opt.Lion(0.01), "Rprop": lambda: opt.Rprop(0.01), "Adam": lambda: opt.Adam(0.01),
    "AdamW": lambda: opt.AdamW(0.01), "Adamax": lambda: opt.Adamax(0.01), "NAdam": lambda: opt.NAdam(0.01),
    "RAdam": lambda: opt.RAdam(0.01), "Adagrad": lambda: opt.Adagrad(0.05),
    "Adadelta": lambda: opt.Adadelta(0.7),
    "RMSprop": lambda: opt.RMSprop(0.01, 0.95, momentum=0.8, centred=True),
    "SGD scheduled": lambda: opt.SGD(opt.schedule.warmup(2, opt.schedule.cosine(0.1, 9)), accumulate=2),
    "Adam clipped": lambda: opt.Adam(0.01, clip=opt.clip.by_global_norm(0.1), constraint=opt.max_norm(1.0)),
    "Adam averaged": lambda: opt.Adam(0.01, average=opt.EMA(0.9), loss_scale=opt.LossScale(interval=2)),
    "SGD averaged": lambda: opt.SGD(0.05, average=opt.PolyakAverage(), l1_proximal=0.01),
}
