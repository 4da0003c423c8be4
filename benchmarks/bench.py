"""Times training steps beside PyTorch and JAX, and what graphflow itself costs; writes out/bench/table.md.

    python benchmarks/bench.py [--workloads mlp lenet ...] [--threads 2] [--rounds 7] [--python PATH]
                               [--peers FOLDER] [--readme]

The engines are compared by a referee, `compare.py`, with `workloads.py` and `protocol.py`, in a folder
`shared/peers` beside the checkout (or --peers FOLDER): it runs all engines in turn on the same data and
checks that their losses agree. --python names an interpreter that has PyTorch and JAX; where none has,
graphflow is timed alone. --readme also puts the table into the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import overhead

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "bench"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
WORKLOADS = {
    "logreg": "softmax regression, 784 → 10, batch 128",
    "mlp": "784-512-512-10, ReLU, momentum, batch 128",
    "autoenc": "autoencoder, 8 dense layers, Nesterov, batch 128",
    "traffic": "2 convolutions with tanh on 32×32, batch 32",
    "lenet": "LeNet on 28×28, momentum, batch 64",
}
LOSS_APART, NORM_APART = 1e-2, 3e-2
"""Relative distances of two engines' losses, and of their parameters' norms, beyond which a row is wrong."""


def engines(python: str) -> str:
    """The versions of PyTorch and JAX of an interpreter, or ""."""
    code = (
        "import torch, jax; print(f'PyTorch {torch.__version__.split(chr(43))[0]}, JAX {jax.__version__}')"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"benchmarks/bench.py: {python} cannot be run: {error.strerror}")
    return done.stdout.strip() if done.returncode == 0 else ""


def compare(args: argparse.Namespace, versions: str) -> list[dict[str, Any]]:
    """The referee's rows, one for each engine and workload that it could time."""
    worker = shlex.join([sys.executable, str(ROOT / "benchmarks" / "worker.py")])
    results = OUT / "results.json"
    results.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(args.peers / "compare.py"),
        "--workloads",
        *args.workloads,
        "--threads",
        str(args.threads),
        "--rounds",
        str(args.rounds),
        "--mine",
        worker + " {workload} {threads}",
        "--python",
        args.python,
        "--json",
        str(results),
    ]
    off = {**os.environ, "GRAPHFLOW_CACHE": "off"}
    subprocess.run(command if versions else [*command, "--peers"], check=True, env=off)
    return json.loads(results.read_text())


def row(workload: str, rows: list[dict[str, Any]]) -> str:
    """A line of the table: graphflow beside the fastest of the other engines."""
    mine = next((r for r in rows if r["engine"] == "mine"), None)
    others = [r for r in rows if r["engine"] != "mine"]
    what = f"**{workload}**: {WORKLOADS[workload]}"
    if mine is None:
        return f"| {what} | failed | | | | | | |"
    ours = f"{mine['median_ms']:.2f}"
    if not others:
        return f"| {what} | {ours} | | | | {mine['peak_mb']:.0f} | | {mine['first_s']:.2f} |"
    best = min(others, key=lambda r: r["median_ms"])
    wrong = " **wrong**" if mine["loss_apart"] > LOSS_APART or mine["norm_apart"] > NORM_APART else ""
    memory = min(r["peak_mb"] for r in others)
    return (
        f"| {what} | {ours} | {best['median_ms']:.2f} ({best['engine']}) | {mine['x_best_peer']:.2f} | "
        f"{mine['loss_apart']:.0e}{wrong} | {mine['peak_mb']:.0f} | {memory:.0f} | {mine['first_s']:.2f} |"
    )


def table(args: argparse.Namespace, rows: list[dict[str, Any]], versions: str, load: float) -> str:
    """The comparison as Markdown, with where and when it was made."""
    lines = [
        "| training step | graphflow, ms | fastest other, ms | ratio | losses apart | peak MB | least other "
        "peak MB | first step, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [row(w, [r for r in rows if r["workload"] == w]) for w in args.workloads]
    compared = versions or "no other engine was there to compare with"
    made = (
        f"{datetime.date.today()}, {processor()}, {args.threads} threads, load {load:.1f} at the start, "
        f"Python {platform.python_version()}, {compared}. Medians of {args.rounds} rounds in which engines "
        "take turns; ratio: graphflow's time over the other's, the median of the rounds; peak: of the whole "
        "process, from its first step on; the first step includes compiling, with no cache of graphflow."
    )
    return "\n".join([*lines, "", made])


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def put_into_readme(text: str) -> None:
    """Replaces what lies between the README's two marker comments."""
    path = ROOT / "README.md"
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        sys.exit(f"benchmarks/bench.py: {path} needs one {BEGIN} and one {END}")
    head, rest = old.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Runs everything and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers")
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    parts = []
    if (args.peers / "compare.py").exists():
        versions = engines(args.python)
        if not versions:
            print(
                f"{args.python} has no PyTorch and JAX: graphflow is timed alone (--python names another)"
            )
        load = os.getloadavg()[0]
        parts.append(table(args, compare(args, versions), versions, load))
    else:
        print(f"no compare.py in {args.peers}: training steps are not timed (--peers names another folder)")
    parts.append(overhead.table())
    text = "\n\n".join(parts)
    (OUT / "table.md").write_text(text + "\n")
    print(text)
    if args.readme and len(parts) == 2:
        put_into_readme(text)


if __name__ == "__main__":
    main()
