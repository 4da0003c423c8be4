"""Timing the ways to compute a kernel: what the compiler's tuning calls."""
from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import numpy as np

from graphflow.compiler.plan.trial import Array, Trial, Variant
from graphflow.runtime.arena import address_of, aligned_bytes
from graphflow.runtime.native import Library, load_object, thread_pool

ROUNDS, MOST_SECONDS = 9, 2.0
"""Rounds of a trial; once they have taken so long, three are enough."""
TURN_SECONDS = 1e-4
"""A variant's turn repeats it until it has run so long; its time is the least of these."""


def time_variants(trial: Trial, threads: int) -> Sequence[Sequence[float]]:
    """For each round, the seconds of each variant on so many threads. Arguments are aligned, floats in them
    normally distributed and all else 0; what a variant overwrites is as it was before each of its turns."""
    names = [name for v in trial.variants for name in (v.name, *(v.before or ())[:1])]
    library = load_object(trial.code, trial.name, names)
    arrays = [_array(a, i) for i, a in enumerate(trial.arguments)]
    kept = [(array, array.copy()) for a, array in zip(trial.arguments, arrays) if a.mode == "rw"]
    area = aligned_bytes(max(v.shared + v.scratch * threads for v in trial.variants), "scratch")
    calls = [_call(v, library, [*map(address_of, arrays), *trial.symbols, address_of(area), v.scratch],
                   threads) for v in trial.variants]
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < ROUNDS + 1 and (len(rounds) < 4 or time.perf_counter() - begin < MOST_SECONDS):
        row = []
        for call in calls:
            for array, value in kept:
                array[...] = value
            row.append(_turn(call))
        rounds.append(row)
    return rounds[1:]                                 # the first brings code and data into the caches


def _turn(call: Callable[[], None]) -> float:
    best, end = float("inf"), time.perf_counter() + TURN_SECONDS
    while True:
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now >= end:
            return best


def _array(a: Array, seed: int) -> np.ndarray:
    array = aligned_bytes(a.size * a.dtype.bytes, "an argument").view(a.dtype.numpy)
    if a.dtype.is_float and a.mode != "w":
        array[...] = np.random.default_rng(seed).standard_normal(a.size, np.float32)
    return array


def _call(variant: Variant, library: Library, values: Sequence[int], threads: int) -> Callable[[], None]:
    """A function that runs the variant once."""
    types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    parallel = ctypes.CFUNCTYPE(None, *types)(thread_pool())
    args = (ctypes.c_int64 * len(values))(*values)
    place = ctypes.addressof(args)
    launches = [(library.address(name), tasks)
                for name, tasks in ((variant.before,) if variant.before else ())]
    launches.append((library.address(variant.name), variant.tasks))

    def call(held: object = (args, library)) -> None:
        for address, tasks in launches:
            parallel(address, place, tasks, threads)
    return call
