"""Tables and plots of what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compare import MINE, Row
from workloads import Workload

COLUMNS = (
    "training step",
    "graphflow, ms",
    "fastest other, ms",
    "ratio",
    "losses apart",
    "peak MB",
    "least other peak MB",
    "ratio over the state",
    "first step, s",
)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are words, the others numbers."""
    lines = [heads, ["---" if i < left else "---:" for i in range(len(heads))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float, form: str) -> str:
    """The number, or nothing where there is none."""
    return format(value, form) if math.isfinite(value) else ""


# --- training steps


def steps_table(rows: Sequence[Row], works: Sequence[Workload]) -> str:
    """graphflow beside the fastest of the other engines, a line for each workload; without columns that would
    be empty."""
    cells = [_step(work, [r for r in rows if r.workload == work.name]) for work in works]
    filled = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
    return markdown([COLUMNS[i] for i in filled], [[line[i] for i in filled] for line in cells])


def _step(work: Workload, rows: Sequence[Row]) -> list[str]:
    what = f"**{work.name}**: {work.about}"
    mine = next((r for r in rows if r.engine == MINE), None)
    if mine is None or mine.failure:
        return [what, "failed" if mine else "", *[""] * 7]
    others = [r for r in rows if r.engine != MINE and not r.failure]
    best = min(others, key=lambda r: r.median_ms, default=None)
    state = work.state_bytes / 1e6
    return [
        what,
        f"{mine.median_ms:.2f}",
        f"{best.median_ms:.2f} ({best.engine})" if best else "",
        number(mine.ratio, ".2f"),
        (f"{mine.loss_apart:.0e}" if others else "") + " **wrong**" * mine.wrong,
        f"{mine.peak_mb:.0f}",
        f"{min(r.peak_mb for r in others):.0f}" if others else "",
        f"{(mine.peak_mb - state) / (min(r.peak_mb for r in others) - state):.2f}" if others else "",
        f"{mine.first_s:.2f}",
    ]


def engines_table(rows: Sequence[Row]) -> str:
    """Every engine on every workload."""
    heads = ("training step", "threads", "engine", "ms, median", "ms, least", "× fastest other",
             "first step, s", "peak MB", "losses apart", "norms apart")  # fmt: skip
    cells = []
    for r in rows:
        if r.failure:
            cells.append([r.workload, str(r.threads), r.engine, f"failed: {r.failure}", *[""] * 6])
            continue
        cells.append([
            r.workload, str(r.threads), r.engine, f"{r.median_ms:.3f}", f"{r.least_ms:.3f}",
            number(r.ratio, ".2f"), f"{r.first_s:.2f}", f"{r.peak_mb:.0f}",
            f"{r.loss_apart:.0e}" + " **wrong**" * r.wrong, f"{r.norm_apart:.0e}",
        ])  # fmt: skip
    return markdown(heads, cells, left=3)


def how(rounds: int, alone: bool) -> str:
    """What the columns of the steps' table mean; `alone`: without other engines."""
    turns = " in which engines take turns; ratio: graphflow's time over the other's, the rounds' median"
    over = "; ratio over the state: of what both peaks exceed parameters and optimizer state by"
    return (
        f"Medians of {rounds} rounds{'' if alone else turns}; peak: of the whole process, from its first "
        f"step on{'' if alone else over}; the first step includes compiling, with no caches."
    )


# --- plots


BARS: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("steps", "time of a step, ms", lambda r: r.median_ms),
    ("memory", "peak memory of the process, MB", lambda r: r.peak_mb),
    ("first", "first step, compiling included, s", lambda r: r.first_s),
)
"""The file's name, title and what the bars show."""


def plots(folder: Path, rows: Sequence[Row], kernels: dict[str, Any] | None) -> list[Path]:
    """Draws what there is; none, saying so, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is missing (the extra `plot` has it)")
        return []
    made = []
    good = [r for r in rows if not r.failure]
    for threads in sorted({r.threads for r in good}):
        some = [r for r in good if r.threads == threads]
        count = f"{threads} thread{'s' * (threads > 1)}"
        for name, title, value in BARS:
            made.append(_bars(Figure, folder / f"{name}-{threads}.png", some, f"{title}, {count}", value))
    if kernels and kernels["programs"]:
        made.append(_roofline(Figure, folder / "roofline.png", kernels))
    return made


def _bars(
    figure_type: Any, path: Path, rows: Sequence[Row], title: str, value: Callable[[Row], float]
) -> Path:
    """Groups of bars, one for each workload, on a logarithmic axis."""
    names = list(dict.fromkeys(r.workload for r in rows))
    engines = list(dict.fromkeys(r.engine for r in rows))
    engines.sort(key=lambda e: e != MINE)
    figure = figure_type(figsize=(max(5, 1.3 * len(names) + 2), 4), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(engines)
    for place, engine in enumerate(engines):
        of_engine = [r for r in rows if r.engine == engine]
        middle = (place - (len(engines) - 1) / 2) * width
        at = [names.index(r.workload) + middle for r in of_engine]
        axes.bar(at, [value(r) for r in of_engine], width, label=engine, color=f"C{place}")
    axes.set_xticks(range(len(names)), names)
    axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(engines), frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _roofline(figure_type: Any, path: Path, kernels: dict[str, Any]) -> Path:
    """The rate of every kernel over its intensity, below the machine's limits; areas follow times."""
    figure = figure_type(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    found = kernels["machine"]
    span = [2.0**e for e in range(-6, 12)]
    for level in found["levels"]:
        roof = [min(found["flops"], level["bandwidth"] * x) / 1e9 for x in span]
        axes.plot(span, roof, color="gray", lw=1)
        axes.annotate(level["name"], (span[0], roof[0]), color="gray", fontsize=8)
    for color, (name, timings) in enumerate(kernels["programs"].items()):
        points = [t for t in timings if t["flops"] and t["bytes"]]
        total = sum(t["seconds"] for t in timings)
        axes.scatter(
            [t["flops"] / t["bytes"] for t in points],
            [t["runs"] * t["flops"] / t["seconds"] / 1e9 for t in points],
            [10 + 600 * t["seconds"] / total for t in points],
            color=f"C{color}", alpha=0.5, label=name, linewidths=0,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-2, 2 * found["flops"] / 1e9)
    axes.set_xlabel("operations per byte of least traffic")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("kernels of graphflow below the roofline; area: share of the step's time")
    legend = axes.legend(fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    figure.savefig(path, dpi=110)
    return path
