"""What a worker, a process for one engine and one workload, says to the process that times it.

1. When its step is built and has run WARM_UP times, it prints one line of JSON: {"ready": true, "first_s":
   seconds of the first step, compiling included, "losses": of the warm-up's steps, "norms": {parameter: its
   Euclidean norm after the warm-up}}.
2. To a line with a number N it answers, after N steps: {"ms": milliseconds per step, "loss": the last,
   "peak_mb": the most resident memory since the first step began}.
3. An empty line, or the end of the input, ends it.

Lines that do not begin with { are chatter of the engine, and ignored.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 6


def serve(
    step: Callable[[int], Any], read_loss: Callable[[Any], float], read_norms: Callable[[], dict[str, float]]
) -> None:
    """Speaks for a worker. `step(i)` runs training step i and returns a handle of its loss, which `read_loss`
    waits for; `read_norms` gives the norm of each parameter."""
    forget_peak()
    begin = time.perf_counter()
    losses = [read_loss(step(0))]
    first = time.perf_counter() - begin
    losses += [read_loss(step(i)) for i in range(1, WARM_UP)]
    say({"ready": True, "first_s": first, "losses": losses, "norms": read_norms()})
    done = WARM_UP
    for line in sys.stdin:
        if not line.strip():
            return
        count, begin = int(line), time.perf_counter()
        for i in range(done, done + count):
            handle = step(i)
        loss, done = read_loss(handle), done + count
        say({"ms": (time.perf_counter() - begin) * 1e3 / count, "loss": loss, "peak_mb": peak_bytes() / 1e6})


def say(message: dict[str, Any]) -> None:
    """Prints a message as a line."""
    print(json.dumps(message), flush=True)


def forget_peak() -> None:
    """Lets the peak of resident memory count from now on, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """The most memory that this process had resident."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
