"""The benchmarks: a report with tables and plots in out/bench.

    python benchmarks/bench.py [--python PATH] [--workloads mlp lenet ...] [--threads 1 2] [--rounds 7]
                               [--parts steps overhead functions kernels contractions convolutions]
                               [--out FOLDER] [--readme]

    steps          training steps of graphflow beside PyTorch and JAX, by each number of threads (compare.py)
    overhead       what import, calls, compiling and memory cost (overhead.py)
    functions      accuracy and time of exp, log, tanh and sigmoid (functions.py)
    kernels        each kernel of those steps against the machine's limits (graphflow.bench)
    contractions   matrix products one by one (contractions.py)
    convolutions   the convolutions of those steps, pass by pass (convolutions.py)

PyTorch and JAX are those of the interpreter --python; without them graphflow is timed alone. --readme puts
the tables of steps and overhead into the README.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import convolutions
import functions
import machine
import overhead
import report
from workloads import SMALL, WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
PARTS = ("steps", "overhead", "functions", "kernels", "contractions", "convolutions")
SHOWN = 12
"""How many kernels of a program the report lists."""


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """The machine's limits, and the timings of every kernel of the chosen steps, as data and as text."""
    from nets_graphflow import training_step

    from graphflow import bench

    threads = max(args.threads)
    limits = bench.machine(threads)
    levels = [{"name": level.name, "bandwidth": level.bandwidth} for level in limits.levels]
    found: dict[str, Any] = {"machine": {"flops": limits.flops, "levels": levels}, "programs": {}}
    texts = [bench.describe(limits)]
    for name in args.workloads:
        work = (SMALL if args.small else WORKLOADS)[name]
        batch = work.batch(0)
        step = training_step(work, work.params(), batch, threads)
        timings = bench.profile(step, [batch[key] for key in step.inputs], rounds=args.rounds)
        found["programs"][name] = [
            {"name": t.name, "lines": t.lines, "runs": t.runs, "seconds": t.seconds, "flops": t.work.flops,
             "bytes": t.work.bytes, "bound": limits.bound(t.work), "reached": t.share(limits)}
            for t in timings
        ]  # fmt: skip
        texts.append(f"{name}\n{bench.table(timings, limits, SHOWN)}")
        print(f"kernels of {name}: {len(timings)}", flush=True)
    found["text"] = "\n\n".join(texts)
    return found


def one_by_one(script: str, names: list[str], args: argparse.Namespace) -> str:
    """What contractions.py or convolutions.py prints of these names, for each number of threads."""
    texts = []
    for threads in args.threads:
        command = [sys.executable, str(ROOT / "benchmarks" / script), *names, "--threads", str(threads),
                   "--python", args.python, *["--small"] * args.small]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        text = done.stdout if done.returncode == 0 else f"failed:\n{done.stderr}"
        texts.append(f"{threads} thread{'s' * (threads > 1)}\n{text.rstrip()}")
        print(f"{script}, {threads} thread{'s' * (threads > 1)}", flush=True)
    return "\n\n".join(texts)


def write(args: argparse.Namespace, found: dict[str, Any], rows: list[compare.Row]) -> str:
    """Writes results.json, the plots and report.md; returns the part that the README shows."""
    about = machine.text(found["machine"])
    works = [(SMALL if args.small else WORKLOADS)[name] for name in args.workloads]
    short = []
    if rows:
        for threads in args.threads:
            short.append(f"With {threads} thread{'s' * (threads > 1)}:")
            short.append(report.steps_table([r for r in rows if r.threads == threads], works))
        short.append(f"{about}. {report.how(args.rounds, all(r.engine == compare.MINE for r in rows))}")
    if "overhead" in found:
        short.append(overhead.table(found["overhead"]))
    parts = ["# Benchmarks of graphflow", *(short if rows else [f"{about}.", *short])]
    if rows:
        parts += ["## Every engine", report.engines_table(rows)]
    drawn = report.plots(args.out, rows, found.get("kernels"))
    parts += [f"![{path.stem}]({path.name})" for path in drawn]
    if "functions" in found:
        parts += ["## Functions", functions.table(found["functions"])]
    if "kernels" in found:
        parts += ["## Kernels", f"```\n{found['kernels']['text']}\n```"]
    if "contractions" in found:
        parts += ["## Contractions", f"```\n{found['contractions']}\n```"]
    if "convolutions" in found:
        parts += ["## Convolutions", f"```\n{found['convolutions']}\n```"]
    (args.out / "report.md").write_text("\n\n".join(parts) + "\n")
    (args.out / "results.json").write_text(json.dumps(found, indent=1, allow_nan=False))
    return "\n\n".join(short)


def put_into_readme(text: str, path: Path = ROOT / "README.md") -> None:
    """Replaces what lies between the README's two marker comments."""
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        sys.exit(f"benchmarks/bench.py: {path} needs one {BEGIN} and one {END}")
    head, rest = old.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Runs everything and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    compare.add_options(parser)
    parser.set_defaults(threads=sorted({1, *parser.get_default("threads")}))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="the report's folder")
    parser.add_argument("--readme", action="store_true", help="put the tables into the README as well")
    args = parser.parse_args()
    if args.readme and not {"steps", "overhead"} <= set(args.parts):
        parser.error("the README shows steps and overhead: --parts must name both")
    if args.readme and args.small:
        parser.error("the README shows the full sizes, not --small")
    args.out.mkdir(parents=True, exist_ok=True)
    versions = compare.versions(args.python)
    found: dict[str, Any] = {"machine": machine.describe(max(args.threads), versions)}
    rows: list[compare.Row] = []
    if "steps" in args.parts:
        rows = compare.run(args, versions)
        found["steps"] = compare.as_json(rows)
    if "overhead" in args.parts:
        found["overhead"] = overhead.measure(max(args.threads), args.small)
    if "functions" in args.parts:
        engines = ["graphflow", *["torch"] * ("torch" in versions)]
        found["functions"] = functions.measure(args.python, 65537 if args.small else 257, engines)
    if "kernels" in args.parts:
        found["kernels"] = kernels(args)
    if "contractions" in args.parts:
        found["contractions"] = one_by_one("contractions.py", [*args.workloads, "squares"], args)
    if "convolutions" in args.parts:
        images = [name for name in args.workloads if name in convolutions.IMAGES]
        found["convolutions"] = one_by_one("convolutions.py", images, args) if images else "none"
    text = write(args, found, rows)
    print(f"\n{text}\n\n{args.out / 'report.md'}")
    if args.readme:
        put_into_readme(text)


if __name__ == "__main__":
    main()
