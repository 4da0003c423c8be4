"""Accuracy and time of elementwise functions: graphflow's beside PyTorch's.

    python benchmarks/functions.py [--python PATH] [--step 257] [--engine graphflow]

Errors are those of float32 results against NumPy's float64, in units in the last place, over every 257th of
the 2^32 bit patterns, so with all exponents, subnormal numbers, infinities and NaN (--step 1: all of them).
Times are nanoseconds an element on one thread, with numbers that are normally distributed and fit into the
second-level cache; a call is included. PyTorch is that of the interpreter --python, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


EXACT: dict[str, Function] = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "sigmoid": _sigmoid}
CHUNK, TIMED, REPEATS = 1 << 20, 1 << 15, 200


def graphflow_functions() -> dict[str, Function]:
    """Each function as a program on one thread."""
    import graphflow as gf

    made = {"exp": gf.exp, "log": gf.log, "tanh": gf.tanh, "sigmoid": gf.nn.sigmoid}
    programs = {}
    for name, function in made.items():
        x = gf.input("x", (gf.dim("N"),))
        programs[name] = gf.function(x, function(x), threads=1)
    return programs


def torch_functions() -> dict[str, Function]:
    """PyTorch's functions on one thread."""
    import torch

    torch.set_num_threads(1)

    def wrapped(function: Any) -> Function:
        return lambda x: function(torch.from_numpy(x)).numpy()

    return {name: wrapped(getattr(torch, name)) for name in EXACT}


ENGINES = {"graphflow": graphflow_functions, "torch": torch_functions}


def ulps(got: np.ndarray, x: np.ndarray, exact: Function) -> float:
    """The largest error of float32 results, in units in the last place of the exact one; infinite where a
    special value is wrong."""
    with np.errstate(all="ignore"):
        wanted = exact(x.astype(np.float64))
        rounded = wanted.astype(np.float32)
        special = ~np.isfinite(rounded) | np.isnan(got)
        same = np.array_equal(got[special], rounded[special], equal_nan=True)
        unit = np.spacing(np.abs(rounded[~special])).astype(np.float64)
        error = np.abs(got[~special].astype(np.float64) - wanted[~special]) / unit
    return float(error.max(initial=0)) if same else float("inf")


def largest_error(function: Function, exact: Function, step: int) -> float:
    """Over every `step`-th bit pattern."""
    worst = 0.0
    for start in range(0, 1 << 32, CHUNK * step):
        bits = np.arange(start, min(start + CHUNK * step, 1 << 32), step, np.int64).astype(np.uint32)
        x = bits.view(np.float32)
        worst = max(worst, ulps(function(x), x, exact))
    ends = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45], np.float32)
    return max(worst, ulps(function(ends), ends, exact))


def nanoseconds(function: Function, positive: bool) -> float:
    """For each element, with the call: the least of several rounds."""
    x = np.random.default_rng(0).standard_normal(TIMED, np.float32)
    x = np.abs(x) if positive else x
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(x)
        times.append(time.perf_counter() - start)
    return min(times) / TIMED * 1e9


def measure_engine(engine: str, step: int) -> dict[str, dict[str, float]]:
    """{function: {"ulp": largest error, "ns": for an element}} of this process's engine."""
    made = ENGINES[engine]()
    errors = {name: largest_error(made[name], exact, step) for name, exact in EXACT.items()}
    return {name: {"ulp": e, "ns": nanoseconds(made[name], name == "log")} for name, e in errors.items()}


def measure(python: str, step: int, engines: list[str]) -> dict[str, Any]:
    """{engine: what `measure_engine` finds}, each in a process of its own."""
    found = {}
    for engine in engines:
        command = [sys.executable if engine == "graphflow" else python, str(Path(__file__).resolve()),
                   "--engine", engine, "--step", str(step)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[engine] = json.loads(done.stdout)
    return found


def table(found: dict[str, Any]) -> str:
    """The measurements as a Markdown table; infinite errors are results that are wrong."""
    heads = ["function", *(f"{engine}, {what}" for what in ("ulp", "ns") for engine in found)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name in EXACT:
        errors = [f"{found[engine][name]['ulp']:.2f}" for engine in found]
        lines.append([f"`{name}`", *errors, *(f"{found[engine][name]['ns']:.2f}" for engine in found)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Prints the table, or with --engine one engine's numbers as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="", help="an interpreter that has PyTorch")
    parser.add_argument("--step", type=int, default=257, help="which of the bit patterns are tried")
    parser.add_argument("--engine", choices=list(ENGINES), help="only this one, here")
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(measure_engine(args.engine, args.step)))
    else:
        print(table(measure(args.python, args.step, ["graphflow", *["torch"] * bool(args.python)])))


if __name__ == "__main__":
    main()
