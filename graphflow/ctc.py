"""Connectionist temporal classification: the likelihood of a label sequence of unknown alignment.

Graves, Fernández, Gomez and Schmidhuber, ICML 2006. The forward recursion over the paths runs as one
`gf.scan`; its gradient is the compiler's.
"""
from __future__ import annotations

from graphflow.control import scan
from graphflow.creation import arange, full
from graphflow.indexing import matches, take_along_axis
from graphflow.reductions import log_softmax, logsumexp, sum
from graphflow.shapes import broadcast_to, concatenate, expand_dims, pad, reshape, stack
from graphflow.tensor import Tensor, cast, elementwise

_NEVER = -1e30
"""The log of a probability that is 0; finite, so that differences of two of them are."""


def log_likelihood(logits: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, blank: int
                   ) -> Tensor:
    """[N]: log P(labels | logits); -inf where a label sequence has no alignment. logits: [T, N, classes];
    labels: [N, L]; lengths, label_lengths: [N]."""
    steps, count, _ = logits.shape
    places = 2 * labels.shape[1] + 1
    blanks = full((count, labels.shape[1]), blank, labels.dtype)
    path = reshape(stack([blanks, labels], 2), (count, places - 1))          # blank, label, blank, label …
    path = concatenate([path, full((count, 1), blank, labels.dtype)], 1)
    emitted = take_along_axis(log_softmax(logits), broadcast_to(path, (steps, count, places)), 2)
    differs = path[:, 2:] != path[:, :-2]
    skips = pad(elementwise("logical_and", differs, path[:, 2:] != blank), [(0, 0), (2, 0)], False)
    start = elementwise("where", arange(places) == 0, 0.0, _NEVER)
    before = broadcast_to(cast(start, logits.dtype), (count, places))

    def step(old: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        emission, running = now
        one = pad(old[:, :-1], [(0, 0), (1, 0)], _NEVER)
        two = pad(old[:, :-2], [(0, 0), (2, 0)], _NEVER)
        paths = [old, one, elementwise("where", skips, two, _NEVER)]
        new = elementwise("maximum", logsumexp(stack(paths, 2), 2) + emission, _NEVER)
        return elementwise("where", expand_dims(running, 1), new, old), None

    # Before the first step a path stands as if on the first blank, from where it stays or goes on to place 1.
    running = expand_dims(arange(steps, dtype="int64"), 1) < cast(lengths, "int64")
    last, _ = scan(step, before, (emitted, running))
    ends = cast(label_lengths, "int64") * 2
    scores = [sum(elementwise("where", matches(end, places), last, 0.0), 1) for end in (ends, ends - 1)]
    scores[1] = elementwise("where", ends > 0, scores[1], _NEVER)
    total = logsumexp(stack(scores, 1), 1)
    return elementwise("where", total > _NEVER / 2, total, float("-inf"))
