"""Times engines on the same training steps, in turn, and checks that they compute the same.

    python benchmarks/compare.py [--workloads mlp lenet ...] [--engines graphflow jax-jit ...] [--python PATH]
                                 [--threads 1 2] [--rounds 7] [--round-ms 200] [--small] [--json FILE]

Each engine is a process of its own (worker.py); they are started one after the other, so that no compiler
disturbs another, and then take turns, so that all see the same moods of the machine. Time is taken here, not
by the workers. PyTorch and JAX are those of the interpreter --python; what it lacks is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from worker import ENGINES
from workloads import WORKLOADS

WORKER = Path(__file__).resolve().parent / "worker.py"
MINE = "graphflow"
IMAGES = ("traffic", "lenet", "inception", "resnet", "alexnet")
"""Workloads with images: channels-last order changes nothing for the others."""
NO_CACHES = {"GRAPHFLOW_CACHE": "off", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
"""The first step compiles, whatever ran before."""
LOSS_APART, NORM_APART = 1e-2, 3e-2
"""Relative distances of two engines' losses, and of their parameters' norms, beyond which one of them
computes something else."""


@dataclass
class Row:
    """One engine on one workload.

    Times are milliseconds per step; `ratio`: to the fastest peer's time (for the peers too), the median of
    the rounds, NaN without peers; `loss_apart`, `norm_apart`: the greatest relative distance to the reference
    engine in the warm-up; `failure`: why there are no numbers, or "".
    """

    workload: str
    engine: str
    median_ms: float = math.nan
    least_ms: float = math.nan
    first_s: float = math.nan
    peak_mb: float = math.nan
    ratio: float = math.nan
    loss_apart: float = math.nan
    norm_apart: float = math.nan
    failure: str = ""
    threads: int = 1

    @property
    def wrong(self) -> bool:
        """Whether it computed something else than the reference."""
        return not self.failure and not (self.loss_apart <= LOSS_APART and self.norm_apart <= NORM_APART)

    def text(self) -> str:
        """The row as a line for the terminal."""
        head = f"{self.workload:<10}{self.engine:<14}{self.threads:>2} threads"
        if self.failure:
            return f"{head} failed: {self.failure}"
        beside = ""
        if math.isfinite(self.ratio):
            beside = (
                f"  x fastest peer {self.ratio:>6.3f}  losses apart {self.loss_apart:.0e}"
                f"  norms {self.norm_apart:.0e}" + "  WRONG" * self.wrong
            )
        return (
            f"{head}{self.median_ms:>10.3f} ms  first {self.first_s:>6.2f} s  peak {self.peak_mb:>6.0f} MB"
        ) + beside


class Worker:
    """A running worker. RuntimeError with its last words where it ends instead of answering."""

    def __init__(self, engine: str, command: Sequence[str], threads: int) -> None:
        self.engine, self.times, self.peak_mb = engine, [], math.nan
        self.ready: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), **NO_CACHES}
        env.pop("PYTHONPATH", None)  # there, another referee would be looked for
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env
        )

    def start(self) -> None:
        """Waits until it has warmed up."""
        self.ready = self._answer()

    def run(self, steps: int) -> float:
        """Milliseconds per step, by the clock of this process."""
        assert self._process.stdin is not None
        begin = time.perf_counter()
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.peak_mb = self._answer()["peak_mb"]
        return (time.perf_counter() - begin) * 1e3 / steps

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        raise RuntimeError(said[-1][:300] if said else f"it ended with status {self._process.returncode}")

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()


def versions(python: str) -> dict[str, str]:
    """The versions of PyTorch and JAX that an interpreter has, by name; SystemExit if it cannot be run."""
    code = (
        "import importlib.metadata as m\n"
        "for name in ('torch', 'jax'):\n"
        "    try: print(name, m.version(name).split('+')[0])\n"
        "    except m.PackageNotFoundError: pass"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks: {python} cannot be run: {error}")
    return dict(line.split() for line in done.stdout.splitlines())


def available(engines: Sequence[str], found: dict[str, str], python: str) -> list[str]:
    """Those of the engines that can run; says which cannot."""
    missing = [e for e in engines if e != MINE and e.split("-")[0] not in found]
    if missing:
        print(f"left out, as {python} does not have them (--python names another): {', '.join(missing)}")
    return [e for e in engines if e not in missing]


def command(engine: str, workload: str, threads: int, args: argparse.Namespace) -> list[str]:
    """What starts the worker."""
    python = sys.executable if engine == MINE else args.python
    return [python, str(WORKER), workload, str(threads), "--engine", engine, *["--small"] * args.small]


def compare(workload: str, engines: Sequence[str], threads: int, args: argparse.Namespace) -> list[Row]:
    """A row for each engine that suits the workload."""
    rows, workers = [], []
    try:
        for engine in engines:
            if engine == "torch-cl" and workload not in IMAGES:
                continue
            worker = Worker(engine, command(engine, workload, threads, args), threads)
            workers.append(worker)
            try:
                worker.start()
            except RuntimeError as error:
                rows.append(Row(workload, engine, failure=str(error), threads=threads))
                workers.pop().end()
        take_turns(workers, args.rounds, args.round_ms)
        return rows + [replace(row(workload, worker, workers), threads=threads) for worker in workers]
    finally:
        for worker in workers:
            worker.end()


def take_turns(workers: Sequence[Worker], rounds: int, round_ms: float) -> None:
    """Lets the workers run, each for about `round_ms` milliseconds in each round."""
    counts = []
    for worker in workers:
        few = max(1, round(round_ms / 10 / worker.run(1)))
        counts.append(max(1, round(round_ms / worker.run(few))))
    for _ in range(rounds):
        for worker, count in zip(workers, counts):
            worker.times.append(worker.run(count))


def row(workload: str, worker: Worker, workers: Sequence[Worker]) -> Row:
    """A worker's numbers beside the others'. The reference is the first peer: PyTorch if it is there."""
    peers = [w for w in workers if w.engine != MINE]
    reference = (peers or [worker])[0].ready
    ratio = math.nan
    if peers:
        fastest = min(peers, key=lambda w: statistics.median(w.times))
        ratio = statistics.median(a / b for a, b in zip(worker.times, fastest.times))
    losses = [apart(a, b, 1e-6) for a, b in zip(worker.ready["losses"], reference["losses"], strict=True)]
    norms = [
        apart(worker.ready["norms"].get(key, math.nan), norm, 0.1) for key, norm in reference["norms"].items()
    ]
    return Row(
        workload,
        worker.engine,
        statistics.median(worker.times),
        min(worker.times),
        worker.ready["first_s"],
        worker.peak_mb,
        ratio,
        max(losses),
        max(norms),
    )


def apart(value: float, reference: float, least: float) -> float:
    """The relative distance, to a reference of at least `least`; infinite where the value is no number."""
    return abs(value - reference) / max(abs(reference), least) if math.isfinite(value) else math.inf


def run(args: argparse.Namespace, found: dict[str, str]) -> list[Row]:
    """All rows, printed as they come."""
    engines, rows = available(args.engines, found, args.python), []
    for threads, workload in itertools.product(args.threads, args.workloads):
        for found_row in compare(workload, engines, threads, args):
            rows.append(found_row)
            print(found_row.text(), flush=True)
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data; JSON has no NaN and infinity."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(r).items()}
        | {"wrong": r.wrong}
        for r in rows
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose what is compared, and how."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workloads",
        nargs="*",
        choices=list(WORKLOADS),
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"of {', '.join(WORKLOADS)}; all by default",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=list(ENGINES),
        default=list(ENGINES),
        metavar="NAME",
        help=f"of {', '.join(ENGINES)}; all by default",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter that has PyTorch, JAX or both"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[processors], metavar="N", help="one comparison for each N"
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often the engines take turns")
    parser.add_argument("--round-ms", type=float, default=200, help="about how long a turn lasts")
    parser.add_argument("--small", action="store_true", help="nets of few units, to try this out in a minute")


def main() -> None:
    """Compares, and prints the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--json", type=Path, help="where to write the rows as well")
    args = parser.parse_args()
    rows = run(args, versions(args.python))
    if args.json:
        args.json.write_text(json.dumps(as_json(rows), indent=1))
    sys.exit(1 if any(r.wrong or r.failure for r in rows) else 0)


if __name__ == "__main__":
    main()
