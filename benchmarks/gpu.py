"""What graphflow reaches on a GPU, beside PyTorch and JAX in the same process.

    python benchmarks/gpu.py [--parts steps ops kernels compile] [--workloads mlp lenet ...] [--scales 1 8]
                             [--engines graphflow torch-graphs ...] [--rounds 7] [--round-ms 100] [--small]
                             [--peers cuda|cpu] [--seconds 480] [--again] [--out FOLDER]

    steps    the nine training steps at their batch size and at 8 times that, all engines in turn
    ops      products of matrices, and what memory bounds, against a copy of as much memory
    kernels  the time of every kernel of graphflow's steps, launched one by one: what holds a step back
    once     a few training steps of each workload, nothing timed: for compute-sanitizer
    compile  the text of each step through nvcc for sm_90: registers, spills, seconds (needs no GPU)

Batches lie on the device for all engines but graphflow-fed, which is given NumPy arrays. Time is taken
between two points where the device has nothing left to do. Results are added to FOLDER/gpu.json as they come,
and what is there is not measured again (--again: it is); after --seconds nothing new is begun, so that a long
benchmark can be cut in parts. --small and --peers cpu try the benchmark itself out: on the simulated GPU of
tests/fake_gpu.py, with PyTorch and JAX on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX must leave memory to the others

import nets_graphflow  # noqa: E402
from workloads import SMALL, WORKLOADS, Workload  # noqa: E402

import graphflow as gf  # noqa: E402
from graphflow.compiler.plan.errors import DeviceError  # noqa: E402

ENGINES = {
    "graphflow": ("cuda", ""),
    "graphflow-fed": ("cuda", ""),
    "graphflow-tf32": ("cuda-tf32", ""),
    "graphflow-bf16": ("cuda", "bfloat16"),
    "torch-eager": ("eager", "fp32"),
    "torch-compile": ("compile", "fp32"),
    "torch-graphs": ("graphs", "fp32"),
    "torch-graphs-tf32": ("graphs", "tf32"),
    "torch-graphs-bf16": ("graphs", "bf16"),
    "jax": ("jit", "fp32"),
    "jax-tf32": ("jit", "tf32"),
}
"""Engine -> of graphflow, the device and the half of its autocast; of others, the mode and the precision."""
WARM_UP = 6
APART = {"": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
"""Relative distances of losses to the reference's beyond which an engine computes something else."""
REFERENCE = "torch-eager"


class Report:
    """What has been measured, in a file that grows: {part: {key: numbers}}."""

    def __init__(self, folder: Path, again: bool, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.again, self.end = folder / "gpu.json", again, time.monotonic() + seconds
        self.found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.found = json.loads(self.path.read_text())
        self.done: set[tuple[str, str]] = set()

    def wants(self, part: str, key: str) -> bool:
        """Whether that is to be measured now."""
        if (part, key) in self.done or key in self.found.get(part, {}) and not self.again:
            return False
        if time.monotonic() > self.end:
            print(f"{part} {key}: left for another run")
            return False
        return True

    def add(self, part: str, key: str, numbers: Any) -> None:
        """Keeps a result."""
        self.done.add((part, key))
        self.found.setdefault(part, {})[key] = numbers
        self.path.write_text(json.dumps(self.found, indent=1))


# --- training steps

def build(name: str, work: Workload, peers: str) -> Any:
    """The engine, which has not run yet."""
    initial, batches = work.params(), [work.batch(0), work.batch(1)]
    mode, precision = ENGINES[name]
    if name.startswith("graphflow"):
        if name != "graphflow-fed":
            batches = [{key: gf.device_array(value) for key, value in batch.items()} for batch in batches]
        return nets_graphflow.Engine(work, initial, batches, 1, device=mode, half=precision)
    threads = os.cpu_count() or 1
    if name.startswith("jax"):
        import nets_jax
        return nets_jax.Engine(work, initial, batches, threads, mode, precision)
    import nets_torch
    if mode == "graphs" and peers == "cpu":
        raise NotImplementedError("PyTorch has CUDA graphs on GPUs alone")
    return nets_torch.Engine(work, initial, batches, threads, mode, peers, precision)


def started(name: str, work: Workload, peers: str) -> tuple[Any, dict[str, Any]]:
    """(the engine after WARM_UP steps, or None; its row so far)."""
    row: dict[str, Any] = {}
    try:
        begin = time.perf_counter()
        engine = build(name, work, peers)
        getattr(engine, "prepare", lambda: None)()
        row["losses"] = [engine.read_loss(engine.step(0))]
        row["first_s"] = time.perf_counter() - begin
        row["losses"] += [engine.read_loss(engine.step(i)) for i in range(1, WARM_UP)]
    except Exception as error:  # an engine that fails must not end the benchmark of the others
        row["failure"] = f"{type(error).__name__}: {error}"[:500]
        return None, row
    return engine, row


def round_of(engine: Any, first: int, count: int) -> float:
    """Milliseconds per step of that many steps."""
    getattr(engine, "prepare", lambda: None)()
    begin = time.perf_counter()
    for i in range(first, first + count):
        loss = engine.step(i)
    engine.read_loss(loss)
    return (time.perf_counter() - begin) * 1e3 / count


def steps(args: argparse.Namespace, report: Report) -> None:
    """Every engine on every workload."""
    for name in args.workloads:
        for scale in args.scales:
            work = (SMALL if args.small else WORKLOADS)[name]
            work = replace(work, batch_size=work.batch_size * scale)
            key = f"{name} x{scale}"
            if report.wants("steps", key):
                report.add("steps", key, one_step(work, args))
                print(step_table(key, report.found["steps"][key]), flush=True)


def one_step(work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """{engine: its row}, timed in turn."""
    rows, running = {}, {}
    for name in args.engines:
        engine, rows[name] = started(name, work, args.peers)
        if engine is not None:
            count = max(2, min(1000, math.ceil(args.round_ms / max(round_of(engine, 0, 2), 1e-3))))
            running[name] = (engine, count)
            rows[name]["ms"] = []
    for _ in range(args.rounds):
        for name, (engine, count) in running.items():
            rows[name]["ms"].append(round_of(engine, 0, count))
    wanted = next((rows[n]["losses"] for n in (REFERENCE, *running) if n in running), [])
    for name in running:
        row = rows[name]
        row["apart"] = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(row["losses"], wanted))
        row["wrong"] = not row["apart"] <= APART[next((p for p in ("tf32", "bf16") if p in name), "")]
    return rows


def step_table(key: str, rows: dict[str, Any]) -> str:
    """The rows of a workload as text."""
    lines = [f"{key}\n  {'engine':<20}{'ms, median':>12}{'least':>10}{'first, s':>10}{'loss apart':>12}"]
    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"  {name:<20}failed: {row['failure'].splitlines()[0][:150]}")
        else:
            lines.append(f"  {name:<20}{statistics.median(row['ms']):>12.4f}{min(row['ms']):>10.4f}"
                         f"{row['first_s']:>10.1f}{row['apart']:>12.0e}" + "  WRONG" * row["wrong"])
    return "\n".join(lines)


# --- kernels, one by one

def timed_runner(program: gf.Program) -> Any:
    """The program's runner, which launches one kernel after the other between two events."""
    from graphflow.runtime.cuda import CudaProgram

    class Timed(CudaProgram):
        """Keeps (kernel, begin, end) of every launch."""

        launched: list[tuple[str, Any, Any]] = []

        def _launch(self, item: Any, *rest: Any) -> None:
            begin, end = self.gpu.driver.Event(), self.gpu.driver.Event()
            begin.record(self.gpu.stream)
            super()._launch(item, *rest)
            end.record(self.gpu.stream)
            self.launched.append((item.kernel, begin, end))

    compiled = program.compiled
    runner = Timed(compiled.plan, compiled.object_code, program.store)
    runner._captured = False
    return runner


def launch_times(program: gf.Program, feeds: list[Any], rounds: int) -> dict[str, dict[str, Any]]:
    """{kernel: {"us": microseconds of all its launches in a call, least of the rounds, "runs": how many}}"""
    runner = timed_runner(program)
    calls: list[dict[str, list[float]]] = []
    for _ in range(rounds + 1):
        runner.launched = []
        runner.run(feeds)
        with runner.gpu.current():
            runner.gpu.stream.synchronize()
            call: dict[str, list[float]] = {}
            for kernel, begin, end in runner.launched:
                call.setdefault(kernel, []).append(begin.time_till(end) * 1e3)
            runner.launched = []
        calls.append(call)
    return {kernel: {"us": min(sum(call[kernel]) for call in calls[1:]), "runs": len(times)}
            for kernel, times in calls[-1].items()}


def kernels(args: argparse.Namespace, report: Report) -> None:
    """The kernels of every workload, slowest first."""
    from graphflow.compiler.kernel.work import kernel_work

    for name in args.workloads:
        work = (SMALL if args.small else WORKLOADS)[name]
        if not report.wants("kernels", name):
            continue
        batch = work.batch(0)
        program = nets_graphflow.training_step(work, work.params(), batch, 1, "cuda")
        times = launch_times(program, [batch[key] for key in program.inputs], args.rounds)
        made = program.compilation.result("memory").kernels
        symbols = {symbol: work.batch_size for symbol in program.plan.symbols}
        for kernel, row in times.items():
            try:
                needed = kernel_work(made[kernel], symbols)
                row |= {"flops": needed.flops * row["runs"], "bytes": needed.bytes * row["runs"]}
            except KeyError:  # it mentions the counter of a loop
                row |= {"flops": 0, "bytes": 0}
        report.add("kernels", name, times)
        print(kernel_table(name, times), flush=True)


def kernel_table(name: str, times: dict[str, dict[str, Any]], top: int = 15) -> str:
    """The slowest kernels as text."""
    total = sum(row["us"] for row in times.values()) or 1e-9
    runs = sum(row["runs"] for row in times.values())
    lines = [f"{name}: {total:.1f} µs in {runs} launches of {len(times)} kernels",
             f"  {'µs':>10}{'share':>8}{'runs':>6}{'GFLOP/s':>10}{'GB/s':>8}  kernel"]
    for kernel, row in sorted(times.items(), key=lambda item: -item[1]["us"])[:top]:
        us = max(row["us"], 1e-9)
        lines.append(f"  {us:>10.1f}{us / total:>8.1%}{row['runs']:>6}{row['flops'] / us / 1e3:>10.0f}"
                     f"{row['bytes'] / us / 1e3:>8.0f}  {kernel}")
    return "\n".join(lines)


# --- single ops

MEMORY_BOUND: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "add": (lambda x: x + 1.0, lambda t, x: x + 1.0, 2),
    "gelu": (gf.gelu, lambda t, x: t.nn.functional.gelu(x), 2),
    "sum of rows": (lambda x: gf.sum(x, 1), lambda t, x: x.sum(1), 1),
    "sum of columns": (lambda x: gf.sum(x, 0), lambda t, x: x.sum(0), 1),
    "sum of all": (gf.sum, lambda t, x: x.sum(), 1),
    "max of rows": (lambda x: gf.max(x, 1), lambda t, x: x.amax(1), 1),
    "transpose": (lambda x: gf.transpose(x, (1, 0)) * 1.0, lambda t, x: x.T.contiguous(), 2),
    "softmax": (gf.softmax, lambda t, x: t.softmax(x, 1), 2),
    "layer norm": (
        lambda x: gf.nn.layer_norm(x, affine=False),
        lambda t, x: t.nn.functional.layer_norm(x, x.shape[1:]),
        2,
    ),
}
"""Op -> it in graphflow, in PyTorch, and how often each element of the matrix is read or written."""


def ops(args: argparse.Namespace, report: Report) -> None:
    """Products of matrices in GFLOP/s, and what memory bounds in GB/s."""
    size = 96 if args.small else 4096
    rows, columns = (40, 70) if args.small else (16384, 4096)
    if report.wants("ops", "copy"):
        report.add("ops", "copy", {"graphflow": {"rate": copy_rate(4 * rows * columns, args.rounds)}})
    x, y = gf.input("x", (size, size)), gf.input("y", (size, size))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    for precision, device in (("fp32", "cuda"), ("tf32", "cuda-tf32"), ("bf16", "cuda")):
        key = f"matmul {size}^3 {precision}"
        if report.wants("ops", key):
            with gf.autocast("bfloat16", enabled=precision == "bf16"):
                product = gf.matmul(x, y)
            row = compared(
                [x, y], product, [a, b], device, lambda t, x, y: x @ y, precision, 2 * size**3, args
            )
            report.add("ops", key, row)
    z, fed = gf.input("z", (rows, columns)), rng.standard_normal((rows, columns), np.float32)
    for name, (make, theirs, passes) in MEMORY_BOUND.items():
        if report.wants("ops", name):
            row = compared([z], make(z), [fed], "cuda", theirs, "fp32", passes * 4 * rows * columns, args)
            report.add("ops", name, row)
    print(op_table(report.found["ops"]), flush=True)


def compared(inputs: list[gf.Tensor], output: gf.Tensor, feeds: list[np.ndarray], device: str, theirs: Any,
             precision: str, work: float, args: argparse.Namespace) -> dict[str, Any]:
    """{engine: {"us", "rate": work in 10^9 per second}}, and how far the results are apart."""
    row: dict[str, Any] = {}
    try:
        program = gf.function(inputs, output, device=device)
        found = np.asarray(program(*feeds), dtype=np.float64)
        us = sum(k["us"] for k in launch_times(program, feeds, args.rounds).values())
        row["graphflow"] = {"us": us, "rate": work / max(us, 1e-3) / 1e3}
    except (DeviceError, NotImplementedError) as error:
        return {"graphflow": {"failure": str(error)}}
    try:
        us, value = torch_time(theirs, feeds, precision, args)
    except ImportError:
        return row
    apart = float(np.abs(found - value).max() / max(np.abs(value).max(), 1e-9))
    row["torch"] = {"us": us, "rate": work / max(us, 1e-3) / 1e3, "apart": apart}
    return row


def torch_time(
    theirs: Callable[..., Any], feeds: list[np.ndarray], precision: str, args: argparse.Namespace
) -> tuple[float, np.ndarray]:
    """(microseconds of the function of torch and the feeds, its value): the least of the rounds, each of many
    calls between two events."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    values = [torch.tensor(feed, device=args.peers).to(kind) for feed in feeds]
    calls, times = 3 if args.small else 20, []
    result = theirs(torch, *values)
    for _ in range(args.rounds):
        begin = time.perf_counter()
        if args.peers == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
        for _ in range(calls):
            result = theirs(torch, *values)
        if args.peers == "cuda":
            last.record()
            last.synchronize()
        times.append(first.elapsed_time(last) * 1e3 / calls if args.peers == "cuda" else
                     (time.perf_counter() - begin) * 1e6 / calls)
    return min(times), result.float().cpu().numpy().astype(np.float64)


def copy_rate(size: int, rounds: int) -> float:
    """GB/s, reading and writing, of copying so many bytes on the device."""
    from graphflow.runtime.cuda_device import Gpu
    gpu = Gpu.get()
    with gpu.current():
        source, target = gpu.allocate(size, "a copy"), gpu.allocate(size, "a copy")
        times = []
        for _ in range(rounds + 1):
            begin, end = gpu.driver.Event(), gpu.driver.Event()
            begin.record(gpu.stream)
            for _ in range(10):
                gpu.driver.memcpy_dtod_async(int(target), int(source), size, gpu.stream)
            end.record(gpu.stream)
            end.synchronize()
            times.append(begin.time_till(end) / 10)
        source.free()
        target.free()
    return 2 * size / max(min(times), 1e-6) / 1e6


def op_table(found: dict[str, Any]) -> str:
    """The ops as text: products in GFLOP/s, the others in GB/s and against the copy."""
    copy = found["copy"]["graphflow"]["rate"]
    lines = [f"copy on the device: {copy:.0f} GB/s",
             f"  {'op':<24}{'graphflow':>12}{'PyTorch':>12}{'ratio':>8}{'of copy':>9}{'apart':>8}"]
    for name, row in found.items():
        mine, other = row["graphflow"], row.get("torch")
        if "failure" in mine:
            lines.append(f"  {name:<24}failed: {mine['failure']}")
        elif name != "copy":
            beside = f"{other['rate']:>12.0f}{mine['rate'] / other['rate']:>8.2f}" if other else " " * 20
            share = "" if name.startswith("matmul") else f"{mine['rate'] / copy:.0%}"
            apart = f"{other['apart']:.0e}" if other else ""
            lines.append(f"  {name:<24}{mine['rate']:>12.0f}{beside}{share:>9}{apart:>8}")
    return "\n".join(lines)


# --- for a tool that watches

def once(args: argparse.Namespace, report: Report) -> None:
    """Every workload's step, as often as others warm up; ends the process where one fails."""
    for name in args.workloads:
        work = (SMALL if args.small else WORKLOADS)[name]
        for engine in (e for e in args.engines if e.startswith("graphflow")):
            found, row = started(engine, work, args.peers)
            if found is None:
                raise SystemExit(f"{engine} on {name}: {row['failure']}")
            losses = ", ".join(f"{loss:.6f}" for loss in row["losses"])
            print(f"{name} with {engine}: losses {losses}", flush=True)


# --- what nvcc makes of it

def compile_all(args: argparse.Namespace, report: Report) -> None:
    """Each step's text at full size, compiled for sm_90."""
    from graphflow.compiler.cuda_target import CudaTarget, compile_cubin
    from graphflow.compiler.driver import Compilation

    target = CudaTarget("sm_90")
    for name in args.workloads:
        if not report.wants("compile", name):
            continue
        work = (SMALL if args.small else WORKLOADS)[name]
        begin = time.perf_counter()
        program = nets_graphflow.training_step(work, work.params(), work.batch(0), 1)
        text = Compilation(program.traced, target).result("emit").ir
        emitted = time.perf_counter()
        _, said = compile_cubin(text, target)
        row = {"emit_s": emitted - begin, "nvcc_s": time.perf_counter() - emitted, "characters": len(text),
               "registers": list(map(int, re.findall(r"Used (\d+) registers", said))),
               "spilled": re.findall(r"properties for (\w+)\n.* ([1-9]\d*) bytes spill stores", said)}
        report.add("compile", name, row)
        print(f"{name:<10}{len(row['registers']):>4} kernels, at most {max(row['registers'])} registers, "
              f"{row['emit_s']:.1f} s to the text, {row['nvcc_s']:.1f} s in nvcc; "
              f"spilled: {', '.join(n for n, _ in row['spilled']) or 'nothing'}", flush=True)


PARTS = {"steps": steps, "ops": ops, "kernels": kernels, "once": once, "compile": compile_all}


def main() -> int:
    """Runs the parts; 0 unless an engine computed something else, or one of graphflow's failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["steps", "ops", "kernels"])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--scales", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-ms", type=float, default=100)
    parser.add_argument("--small", action="store_true", help="few units and examples, to try it out")
    parser.add_argument("--peers", choices=["cuda", "cpu"], default="cuda", help="where PyTorch and JAX run")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing new after that long")
    parser.add_argument("--again", action="store_true", help="measure what was measured, too")
    parser.add_argument("--out", type=Path, default=Path("out", "gpu"))
    args = parser.parse_args()
    report = Report(args.out, args.again, args.seconds)
    for part in args.parts:
        PARTS[part](args, report)
    tables = [step_table(key, rows) for key, rows in report.found.get("steps", {}).items()]
    tables += [op_table(report.found["ops"])] if "ops" in report.found else []
    tables += [kernel_table(name, times) for name, times in report.found.get("kernels", {}).items()]
    (args.out / "gpu.txt").write_text("\n\n".join(tables) + "\n")
    bad = [
        f"{key}: {name}"
        for key, rows in report.found.get("steps", {}).items()
        for name, row in rows.items()
        if row.get("wrong") or name.startswith("graphflow") and "failure" in row
    ]
    if bad:
        print(f"wrong or failed: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
