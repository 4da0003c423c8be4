"""The pass driver: runs every stage, times it, checks its result, prints and dumps it; stops after and starts
from any.

    trace -> canonical -> stable -> autodiff -> joint -> fuse -> schedule      (tensor graphs)
          -> lower -> tile -> memory                                           (kernel programs)
          -> emit                                                              (LLVM text)
          -> plan                                                              (what the runtime executes)

`compile_program` looks into the object cache first, under the text of the traced graph; only a miss runs the
passes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from graphflow.compiler.backend import Backend, backend_of
from graphflow.compiler.cache import cache_key, program_cache
from graphflow.compiler.cuda_target import CudaTarget, compiler_version
from graphflow.compiler.emit.object import give_memory_back
from graphflow.compiler.ir.check import check_graph
from graphflow.compiler.ir.graph import Graph, walk
from graphflow.compiler.ir.text import parse_graph, print_graph
from graphflow.compiler.kernel.check import check_program
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.kernel.text import parse_program, print_program
from graphflow.compiler.passes.assemble import fuse
from graphflow.compiler.passes.autodiff import expand_gradients
from graphflow.compiler.passes.canonical import canonicalize
from graphflow.compiler.passes.joint import optimize_jointly
from graphflow.compiler.passes.layout import explain_layouts
from graphflow.compiler.passes.lower import lower
from graphflow.compiler.passes.memory import memory
from graphflow.compiler.passes.schedule import schedule
from graphflow.compiler.passes.stable import stabilize
from graphflow.compiler.passes.tile import tile
from graphflow.compiler.plan.errors import CompilerError, GraphflowError, Location, PlanError, UseError
from graphflow.compiler.plan.plan_text import parse_plan, print_plan
from graphflow.compiler.plan.schema import Item, Launch, Plan, launches, map_items
from graphflow.compiler.plan.validate import validate
from graphflow.compiler.target import Target, host_target
from graphflow.compiler.tune import Tuning


@dataclass
class Context:
    """What stages share: the target, how the program is tuned, if it is, the numbers of the traced graph's
    source lines, and what was refused and why."""

    target: Target | CudaTarget
    tuning: Tuning | None = None
    numbers: Mapping[Location, int] = field(default_factory=dict)
    refusals: list[tuple[tuple[Location, ...], str]] = field(default_factory=list)

    def lines(self) -> dict[int, str]:
        """The traced graph's source lines, such as "net.py:12", by number."""
        return {number: str(location) for location, number in self.numbers.items()}

    @property
    def backend(self) -> Backend:
        """The target's back end."""
        return backend_of(self.target)


@dataclass(frozen=True)
class Emitted:
    """The program with the text of its code: LLVM's, or CUDA C."""

    program: KernelProgram
    ir: str


class Stage(NamedTuple):
    """`run` makes the stage's result from the one before."""

    name: str
    run: Callable[[Any, Context], Any]
    keeps: str = "bits"  # "bits" or "tolerance": what the stage does to the values computed


def _fuse(graph: Graph, context: Context) -> Graph:
    context.refusals.clear()
    return fuse(graph, context.refusals, context.backend.widen)


def _schedule(graph: Graph, context: Context) -> Graph:
    return schedule(context.backend.lay_out(graph), context.backend.blocks)


def _tile(program: KernelProgram, context: Context) -> KernelProgram:
    backend = context.backend
    program = tile(backend.prepare(program))
    if context.tuning is not None:
        assert isinstance(context.target, Target)
        program = context.tuning.apply(program, context.target)
    work = {name: backend.work(kernel) for name, kernel in program.kernels.items()}

    def sized(item: Item) -> Item:
        if not isinstance(item, Launch):
            return item
        tasks, scratch, shared = work[item.kernel]
        return replace(item, tasks=tasks, scratch=scratch, shared=shared)

    body = map_items(program.plan.body, sized)
    return replace(program, plan=replace(program.plan, body=body, functions=backend.functions(program)))


def _emit(program: KernelProgram, context: Context) -> Emitted:
    return Emitted(program, context.backend.emit(program, context.lines()))


STAGES = (
    Stage("trace", lambda graph, context: graph),
    Stage("canonical", lambda graph, context: canonicalize(graph)),
    Stage("stable", lambda graph, context: stabilize(graph), "tolerance"),
    Stage("autodiff", lambda graph, context: expand_gradients(graph)),
    Stage("joint", lambda graph, context: optimize_jointly(graph), "tolerance"),
    Stage("fuse", _fuse),
    Stage("schedule", _schedule),
    Stage("lower", lambda graph, context: lower(graph, context.numbers, context.target.key()), "tolerance"),
    Stage("tile", _tile, "tolerance"),
    Stage("memory", lambda program, context: memory(program)),
    Stage("emit", _emit, "tolerance"),
    Stage("plan", lambda emitted, context: emitted.program.plan),
)
NAMES = tuple(s.name for s in STAGES)


def check(result: Any, stage: str, backend: Backend) -> None:
    """Raises CompilerError where the result of a stage breaks the rules of its level, or asks the target for
    what it cannot do."""
    if isinstance(result, Graph):
        check_graph(result, stage)
    elif isinstance(result, KernelProgram):
        check_program(result, stage)
        for kernel in result.kernels.values():
            backend.check(kernel, stage)
    elif isinstance(result, Plan):
        try:
            validate(result)
        except PlanError as error:
            raise CompilerError(str(error), stage=stage) from error


def print_stage(result: Any) -> str:
    """The text of any stage's result."""
    if isinstance(result, Graph):
        return print_graph(result)
    if isinstance(result, KernelProgram):
        return print_program(result)
    return result.ir if isinstance(result, Emitted) else print_plan(result)


def parse_stage(text: str, stage: str) -> Any:
    """What `print_stage` printed for that stage. LLVM text is read by LLVM, so it can't be started from."""
    index = stage_index(stage)
    if index <= stage_index("schedule"):
        return parse_graph(text)
    if index <= stage_index("memory"):
        return parse_program(text)
    if stage == "plan":
        return parse_plan(text)
    raise UseError("the emit stage holds LLVM text, which graphflow does not read back",
                   hint="start from memory")


@contextmanager
def _collecting_at_the_end() -> Iterator[None]:
    """The block's cyclic garbage is collected once, behind it. Python would go through all live objects again
    and again while a graph grows, which takes a fifth of the time. What was there before the block, such as
    the modules of other packages, is left to Python's own rounds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect(1)


def stage_index(name: str) -> int:
    """The stage's place in the pipeline; UseError if there is no such stage."""
    if name not in NAMES:
        raise UseError(f"there is no stage {name!r}", hint=f"the stages: {', '.join(NAMES)}")
    return NAMES.index(name)


class Compilation:
    """One program on its way through the stages. Stages run when they are first asked for."""

    def __init__(self, start: Any, target: Target | CudaTarget, stage: str = "trace",
                 tuning: Tuning | None = None):
        """`start`: the result of `stage` (a traced Graph), from which the later stages follow. `tuning`: how
        the ways to compute contractions are timed, unless the cost model decides alone."""
        self.context = Context(target, tuning)
        self.first = stage_index(stage)
        if isinstance(start, Graph):
            numbers: dict[Location, int] = {}
            for number, node in enumerate(start.nodes()):
                for origin in node.origins:
                    numbers.setdefault(origin, number)
            self.context.numbers = numbers
        self.seconds: dict[str, float] = {}
        self._results: dict[str, Any] = {}
        self._start = start

    @classmethod
    def resume(cls, text: str, stage: str, target: Target | None = None) -> Compilation:
        """Starts from the text of a stage, edited or not."""
        return cls(parse_stage(text, stage), target or host_target(), stage)

    def result(self, stage: str) -> Any:
        """The result of a stage, run and checked together with those before it."""
        last = stage_index(stage)
        if last < self.first:
            raise UseError(f"this compilation starts from {NAMES[self.first]}, behind {stage}")
        done = next((i for i in range(last, self.first - 1, -1) if NAMES[i] in self._results), self.first - 1)
        current = self._results[NAMES[done]] if done >= self.first else self._start
        for s in STAGES[done + 1 : last + 1]:
            begin = time.perf_counter()
            current = current if s is STAGES[self.first] else s.run(current, self.context)
            self.seconds[s.name] = time.perf_counter() - begin
            check(current, s.name, self.context.backend)
            self._results[s.name] = current
        return current

    def keep_only(self, plan: Plan) -> None:
        """Keeps the plan, which may come from the cache, and lets go of the results of all stages before it:
        whoever asks for one runs them again."""
        self._results = {"plan": plan}

    def text(self, stage: str) -> str:
        """The printed result of a stage."""
        return print_stage(self.result(stage))

    def graph(self, stage: str) -> Any:
        """A networkx.DiGraph of a stage: ops and values, or kernels and buffers."""
        from graphflow.compiler.ir.export import program_to_networkx, to_networkx

        result = self.result(stage)
        if isinstance(result, Graph):
            return to_networkx(result)
        if isinstance(result, (Emitted, Plan)):
            result = self.result("memory")
        return program_to_networkx(result)

    def object_code(self) -> bytes:
        """The machine code of the emitted module."""
        return self._machine_code(self.result("plan"), self.result("emit").ir)[1]

    def _machine_code(self, plan: Plan, text: str) -> tuple[Plan, bytes]:
        begin = time.perf_counter()
        plan, code = self.context.backend.machine_code(plan, text)
        self.seconds["object"] = time.perf_counter() - begin
        return plan, code

    def compile(self) -> tuple[Plan, bytes]:
        """(the plan, machine code), with as little memory as it takes: nothing else is kept, and the stages'
        results are gone before LLVM begins."""
        with _collecting_at_the_end():
            plan, text = self.result("plan"), self.result("emit").ir
            self.keep_only(plan)
        plan, code = self._machine_code(plan, text)
        self.keep_only(plan)
        return plan, code

    def assembly(self) -> str:
        """The assembly of the emitted module."""
        return self.context.backend.assembly(self.result("emit").ir)

    def cuda(self) -> str:
        """The CUDA C of the same program, whatever the target."""
        if isinstance(self.context.target, CudaTarget) or self.first > stage_index("fuse"):
            return backend_of(CudaTarget("sm_90")).emit(self.result("memory"), self.context.lines())
        return Compilation(self._start, CudaTarget("sm_90"), NAMES[self.first]).result("emit").ir

    def dump(self, folder: str | Path, stage: str | None = None) -> list[Path]:
        """Writes a numbered text file per stage (or for one) and GraphML beside graphs; with all of them
        also what was refused, CUDA C, and the assembly."""
        import networkx

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [stage] if stage else NAMES[self.first :]
        written: list[Path] = []
        for name in names:
            number = stage_index(name) + 1
            end = self.context.backend.ending if name == "emit" else "txt"
            path = folder / f"{number:02}.{name}.{end}"
            path.write_text(self.text(name))
            written.append(path)
            if name not in ("emit", "plan"):
                networkx.write_graphml(self.graph(name), path.with_suffix(".graphml"))
                written.append(path.with_suffix(".graphml"))
        if stage is None:
            texts = {"refusals.txt": self.explain()}
            if isinstance(self.context.target, Target):
                texts |= {"kernels.cu": self.cuda(), "assembly.s": self.assembly()}
            for number, (name, text) in enumerate(texts.items(), len(STAGES) + 1):
                path = folder / f"{number:02}.{name}"
                path.write_text(text)
                written.append(path)
        return written

    def explain(self) -> str:
        """What was not fused or not done in place, and why, what loops keep for their gradients, which images
        are channels-last, and, of a program that is tuned, how its contractions are computed: a line for
        each, with the user's lines."""
        self.result("fuse")
        kept = []
        if self.first <= stage_index("autodiff"):
            for n in walk(self.result("autodiff").nodes()):
                names = [name for name in n.attrs.get("kept", ()) if name]
                kept += [(n.origins, f"scan keeps {', '.join(names)}")] if names else []
        layouts = explain_layouts(self.result("schedule"))
        lines = [f"{', '.join(str(o) for o in origins) or '?'}: {reason}"
                 for origins, reason in [*kept, *self.context.refusals, *layouts, *self._choices()]]
        return "\n".join(lines) + "\n" if lines else "nothing was refused\n"

    def _choices(self) -> list[tuple[tuple[Location, ...], str]]:
        """What tuning found for each kernel, with the lines that the kernel comes from."""
        tuning = self.context.tuning
        if tuning is None:
            return []
        origins: dict[str, set[int]] = {}
        for item in launches(self.result("tile").plan.body):
            origins.setdefault(item.kernel, set()).update(item.origins)
        lines = {number: location for location, number in self.context.numbers.items()}
        found = []
        for name, choice in (tuning.choices or {}).items():
            own = {str(lines[n]): lines[n] for n in sorted(origins[name])}
            found.append((tuple(own.values()), f"{name}: {choice}"))
        return found


@dataclass(frozen=True)
class Compiled:
    """A program ready to run. `locations`: number of a traced node -> its source line. `cached`: it came from
    disk."""

    plan: Plan
    object_code: bytes
    compilation: Compilation
    locations: tuple[Location | None, ...]
    seconds: float
    cached: bool


def compile_program(graph: Graph, target: Target | CudaTarget | None = None, tuning: Tuning | None = None
                    ) -> Compiled:
    """The traced graph as a plan and machine code for the target (the machine at hand by default). With
    `tuning`, choices that the cache has are taken from there; otherwise kernels are timed."""
    begin = time.perf_counter()
    target = target or host_target()
    compilation = Compilation(graph, target, tuning=tuning)
    locations = tuple(n.origins[0] if n.origins else None for n in graph.nodes())
    cache = program_cache()
    translator = compiler_version() if isinstance(target, CudaTarget) else ""
    key = cache_key(print_graph(graph, origins=False), target.key(), emitter_version(), translator,
                    tuning.key() if tuning else "")
    found = cache.get(key)
    if found is not None:
        try:
            plan = parse_plan(found["plan"].decode())
            if tuning is not None:
                tuning.read(found["choices"].decode())
            compilation.keep_only(plan)
            return Compiled(plan, found["object"], compilation, locations, time.perf_counter() - begin, True)
        except GraphflowError:
            pass  # written by something else: compile anew and replace it
    plan, code = compilation.compile()
    choices = {"choices": tuning.text().encode()} if tuning else {}
    cache.put(key, {"plan": print_plan(plan).encode(), "object": code, **choices})
    give_memory_back(pause=0.25)
    return Compiled(plan, code, compilation, locations, time.perf_counter() - begin, False)


def compile_pool(target: Target) -> bytes:
    """The object code of the thread pool, from the cache if it is there."""
    from graphflow.compiler.emit.pool import pool_ir, pool_object

    cache = program_cache()
    key = cache_key("pool", pool_ir(target), target.key(), emitter_version())
    found = cache.get(key)
    if found is None:
        found = {"object": pool_object(target)}
        cache.put(key, found)
    return found["object"]


_VERSION: list[str] = []


def emitter_version() -> str:
    """Changes with any line of the compiler and with LLVM: part of every cache key."""
    if not _VERSION:
        import hashlib

        from graphflow.compiler.emit.object import llvm_version

        digest = hashlib.sha256()
        for path in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
        _VERSION.append(f"{digest.hexdigest()} {llvm_version()}")
    return _VERSION[0]
