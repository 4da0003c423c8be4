"""Programs: `gf.function` collects what some outputs need into one graph, and makes it callable on a
device."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphflow.compiler.ir.builder import Builder, rebuild, rebuild_region
from graphflow.compiler.ir.graph import Graph, Guard, Node, Value, topological, walk
from graphflow.compiler.ops.shape import slice_guards
from graphflow.compiler.plan.dims import DimLike, symbols_of
from graphflow.compiler.plan.errors import (
    DTypeError,
    FeedError,
    ShapeError,
    UseError,
)
from graphflow.compiler.plan.schema import Buffer, EntryGuard, Plan
from graphflow.debug import OUTPUT, Printed, prints_among, show
from graphflow.runtime.feeds import FeedChecker
from graphflow.runtime.steps import Stack, by_calls
from graphflow.runtime.store import STEP, Store
from graphflow.scope import here
from graphflow.stacking import stack_feeds
from graphflow.state import Variable, random_state, tracked, variable_of, variables_in
from graphflow.tensor import Tensor, apply

if TYPE_CHECKING:
    from graphflow.compiler.cuda_target import CudaTarget
    from graphflow.compiler.driver import Compilation, Compiled
    from graphflow.compiler.plan.trial import Trial
    from graphflow.compiler.target import Target
    from graphflow.compiler.tune import Tuning

Updates = Mapping[Tensor, Tensor]


def function(inputs: Tensor | Sequence[Tensor], outputs: Any, updates: Updates | None = None, *,
             device: str = "cpu", training: bool | None = None, name: str = "function",
             store: Store | None = None, threads: int | None = None,
             tune: bool | Mapping[str, int] = False) -> Program:
    """A program that computes `outputs` (a Tensor, a list or a dict of them) from `inputs`, and then sets
    each parameter in `updates` to its new value (what ``optimizer.minimize(loss)`` returns).

    All state is read as it was before the call; nothing is written if a check fails. `training` decides what
    dropout does, and whether running statistics, such as batch_norm's, are used or updated: by default it is
    a training program if there are updates. Parameters live in `store`: the one that they
    belong to already, else a new one. `threads`: None is one for each processor. Compiling happens at the
    first call.

    `tune`: the ways to compute each contraction are timed when the program is compiled, which takes longer,
    instead of a choice by shapes alone. Choices are kept in the cache: from then on, the same program on as
    many threads has the same bits. A dict gives sizes of dimensions for that, such as ``{"batch": 32}``; the
    others count as 128. Only on the CPU.
    """
    from graphflow.runtime.device import device as find_device
    listed = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    named, structure = _named_outputs(outputs)
    if not isinstance(name, str) or not name.isidentifier():
        raise UseError(f"{name!r} is no name for a program", hint="use letters, digits and _", where=here())
    chosen = find_device(device)
    graph, bound, prints = trace(name, listed, named, dict(updates or {}),
                                 bool(updates) if training is None else training,
                                 store)
    tuned = None
    if tune is not False:
        tuned = tuning(graph, {} if tune is True else tune, chosen.name, threads)
    return Program(graph, structure, chosen.name, bound, threads, prints, tuned)


def tuning(graph: Graph, sizes: Mapping[str, int], device: str, threads: int | None) -> Tuning:
    """How the program is to be tuned, with these sizes of its dimensions; UseError where that cannot be."""
    from graphflow.compiler.tune import Tuning
    from graphflow.runtime.native import default_threads
    if device != "cpu":
        raise UseError(f"tune times kernels on the CPU, and {graph.name} is for the device {device!r}",
                       where=here(), hint="leave tune out, or use device='cpu'")
    known = symbols_of(*(d for v in graph.inputs for d in v.shape))
    for name, size in sizes.items():
        if name not in known:
            raise UseError(f"tune: {graph.name} has no dimension {name!r}", where=here(),
                           hint=f"its dimensions: {_list(sorted(known))}")
        if not isinstance(size, int) or size < 1:
            raise UseError(f"tune: the size of {name} is {size!r}", where=here(),
                           hint="use a positive integer")
    count = threads or default_threads()

    def measure(trial: Trial) -> Sequence[Sequence[float]]:
        from graphflow.runtime.timing import time_variants
        install_threads()
        return time_variants(trial, count)

    return Tuning(measure, count, dict(sizes))


def _named_outputs(outputs: Any) -> tuple[dict[str, Tensor], Any]:
    """The outputs by name, and how a call gives them back: None for one, list, or dict."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}, None
    if isinstance(outputs, Mapping):
        named = {str(k): v for k, v in outputs.items()}
    elif isinstance(outputs, (list, tuple)):
        named = {f"output{i}": v for i, v in enumerate(outputs)}
    else:
        raise UseError(f"outputs are a Tensor, a list or a dict of tensors, not {type(outputs).__name__}",
                       where=here())
    for key, value in named.items():
        if not isinstance(value, Tensor):
            raise UseError(f"the output {key!r} is {value!r}, not a Tensor", where=here())
        if key.startswith(OUTPUT):
            raise UseError(f"the output {key!r} has the name of a printed value", where=here(),
                           hint=f"names that begin with {OUTPUT!r} are taken")
    return named, dict if isinstance(outputs, Mapping) else list


# --- tracing

def trace(name: str, inputs: Sequence[Tensor], outputs: Mapping[str, Tensor], updates: dict[Tensor, Tensor],
          training: bool, store: Store | None) -> tuple[Graph, Store, list[Printed]]:
    """The graph that computes the outputs and updates, its state named; the Store that it belongs to; and
    what it prints: these values are further outputs, behind the others."""
    _check_inputs(inputs)
    if training:
        computed = topological([t.value.node for t in (*outputs.values(), *updates.values())])
        updates = {**tracked(computed), **updates}
    targets = [variable_of(target) for target in updates]
    _check_updates(targets, list(updates.values()))
    values = [*outputs.values(), *updates.values()]
    notes = dict.fromkeys(note for t in values for note in t.checks)
    printed = list(prints_among(notes))
    outputs = {**outputs, **{name: Tensor(v) for p, node in printed for name, v in zip(p.names, node.inputs)}}
    step = random_state()[1].value.node.inputs[0]
    effects = [note for note in notes if note.op == "check"]
    made = [apply("update", [value], name="") for value in updates.values()]
    effects += [t.value.node for t in made]
    if updates:                                       # the Store counts the calls that train
        effects.append(apply("update", [Tensor(step) + 1], name=STEP).value.node)
    draft = Graph(name, tuple(t.value for t in inputs), {k: t.value for k, t in outputs.items()},
                  tuple(effects))
    _check_needed(draft, outputs, updates)
    bound = _bind_variables(variables_in((*draft.nodes(), *targets)), store)
    names = {t.value.node: v.name for t, v in zip(made, targets)}
    return _finish(draft, names, training), bound, [p for p, _ in printed]


def _check_inputs(inputs: Sequence[Tensor]) -> None:
    seen: dict[str, Value] = {}
    for t in inputs:
        if not isinstance(t, Tensor) or t.value.node.op != "input":
            what = f"the result of {t.value.op}" if isinstance(t, Tensor) else repr(t)
            raise UseError(f"inputs are made by gf.input; this is {what}", where=here())
        if t.name in seen:
            twice = "is listed twice" if seen[t.name] == t.value else "names two different inputs"
            raise UseError(f"the input {t.name!r} {twice}", where=here(),
                           hint="give each input a name of its own")
        seen[t.name] = t.value


def _check_updates(targets: Sequence[Variable], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values):
        if not isinstance(value, Tensor):
            raise UseError(f"the new value of {target.name} is {value!r}, not a Tensor", where=here())
        if value.dtype != target.dtype:
            raise DTypeError(f"{target.name} is {target.dtype.full_name}, its new value "
                             f"{value.dtype.full_name}",
                             op="update", shapes=[target.shape, value.shape], where=here(),
                             hint=f"convert it with gf.cast(value, '{target.dtype.full_name}')")
        if value.shape != target.shape:
            raise ShapeError(f"the new value of {target.name} has another shape", op="update",
                             shapes=[target.shape, value.shape], where=here())
    if len(set(targets)) < len(targets):
        raise UseError("a parameter is updated twice", where=here())


def _check_needed(draft: Graph, outputs: Mapping[str, Tensor], updates: Updates) -> None:
    """UseError if an output or update depends on an input that is not listed."""
    listed = {v.node for v in draft.inputs}
    for node in draft.nodes():
        if node.op != "input" or node in listed:
            continue
        users = [f"the output {k!r}" for k, t in outputs.items() if node in topological([t.value.node])]
        users += [f"the update of {k.name}" for k, t in updates.items()
                  if node in topological([t.value.node])]
        raise UseError(f"{users[0] if users else 'a check'} depends on the input {node.attrs['name']!r}, "
                       "which is not "
                       f"among the inputs of {draft.name}", shapes=[node.types[0].shape],
                       where=node.origins[0] if node.origins else None,
                       hint="list it in inputs; they are "
                       + (", ".join(repr(v.node.attrs["name"]) for v in draft.inputs) or "empty"))
    known = symbols_of(*(d for v in draft.inputs for d in v.shape))
    for node in draft.nodes():
        if node.op == "parameter":
            raise UseError("a tensor of a body is used outside of it", shapes=[node.types[0].shape],
                           where=node.origins[0] if node.origins else None,
                           hint="a loop or branch gives away only what its body returns")
    for node in walk(draft.nodes()):
        unknown = symbols_of(*(d for t in node.types for d in t.shape)) - known
        if unknown:
            raise UseError(f"no input's shape decides the dimension {min(unknown)}", op=node.op,
                           shapes=[t.shape for t in node.types],
                           where=node.origins[0] if node.origins else None)


def _bind_variables(variables: Sequence[Variable], store: Store | None) -> Store:
    """Names the variables that no program has used yet; the Store that all belong to."""
    for v in variables:
        if v.store is not None:
            store = store or v.store
            if v.store is not store:
                other = next((w for w in variables if w.store is store), None)
                with_it = f"{v.name} and {other.name} belong" if other else f"{v.name} belongs"
                raise UseError(f"{with_it} to different Stores", where=v.origins[0] if v.origins else here(),
                               hint="a program works on one Store: build the nets anew, or pass the same "
                                    "store= to "
                               "all programs")
    bound = store or Store()
    known: dict[str, Variable] = {v.name: v for v in variables if v.store is not None}
    new = dict.fromkeys(v for v in variables if v.store is None)
    bound.reserve(math.prod(v.shape) * v.dtype.bytes for v in new)
    for v in new:
        v.bind(bound, known)
    return bound


def _finish(draft: Graph, names: Mapping[Node, str], training: bool) -> Graph:
    """The graph with final names, equal nodes united, the training flag a constant, random streams numbered
    in the order in which they were made, and guards for slices whose bounds a call decides."""
    made = sorted({n.attrs["stream"] for n in walk(draft.nodes()) if n.op == "random_bits"})
    streams = {serial: number for number, serial in enumerate(made)}
    guards: dict[tuple[DimLike, DimLike], Guard] = {}

    def make(b: Builder, node: Node, operands: list[Value]) -> Sequence[Value]:
        attrs = dict(node.attrs)
        if node.op == "training":
            return [b.constant(training, node.types[0].dtype)]
        if node.op == "random_bits":
            attrs["stream"] = streams[attrs["stream"]]
        elif isinstance(node, Variable):
            attrs["name"] = node.name
        elif node in names:
            attrs["name"] = names[node]
        elif node.op == "slice":
            where = node.origins[0] if node.origins else None
            for pair in slice_guards(node.inputs[0].shape, attrs["starts"], attrs["stops"]):
                guards.setdefault(pair, Guard(*pair, where))
        regions = tuple(rebuild_region(region, make) for region in node.regions)
        return b.intern(Node(node.op, tuple(operands), attrs, regions, node.types, node.origins)).results

    graph = rebuild(draft, make)
    return Graph(graph.name, graph.inputs, graph.outputs, graph.effects, tuple(guards.values()))


# --- running

class Program:
    """A compiled graph over a Store: call it with arrays by position, or by name.

    `store` holds its parameters; `inputs` and `outputs` are names; `tuning` says how its kernels are timed,
    if they are. What the compiler made of it: `text`, `graph`, `dump`, `explain`, `plan`, `peak_bytes`,
    `explain_memory`.
    """

    def __init__(self, graph: Graph, structure: Any, device: str, store: Store, threads: int | None,
                 prints: Sequence[Printed] = (), tuning: Tuning | None = None) -> None:
        self.traced, self.device, self.store, self.threads = graph, device, store, threads
        self.name = graph.name
        self.inputs = [str(v.node.attrs["name"]) for v in graph.inputs]
        self._prints, self.tuning = prints, tuning
        hidden = {name for p in prints for name in p.names}
        self.outputs = [name for name in graph.outputs if name not in hidden]
        self._structure = structure
        self._compiled: Compiled | None = None
        self._compilation: Compilation | None = None
        self._runner: Any = None

    def __repr__(self) -> str:
        takes = ", ".join(f"{v.node.attrs['name']}: {v.type}" for v in self.traced.inputs)
        gives = ", ".join(f"{k}: {self.traced.outputs[k].type}" for k in self.outputs)
        return f"<Program {self.name}({takes}) -> {gives} on {self.device}>"

    def __call__(self, *args: Any, **feeds: Any) -> Any:
        """The outputs for these feeds, new NumPy arrays in the structure given to `gf.function`.

        FeedError for a missing, surplus, wrongly typed or shaped feed, and where a check fails: then no state
        has changed.
        """
        results = self.runner.run(self._arranged(args, feeds))
        if self._prints and self.device != "null":
            show(self._prints, results[len(self.outputs):])
        return self._structured(results)

    def run(self, *args: Any, steps: int | None = None, **feeds: Any) -> Any:
        """Many calls at once: of each feed, those of all steps stacked along a new first axis, or one for all
        steps. The outputs are stacked likewise.

        It gives what calls one after the other give, without the way through Python between them. `steps` is
        needed where no feed is stacked. On a GPU, feeds are sent once, and outputs fetched when they are read
        (see `device_array`). FeedError as for a call, with the number of the step; KeyboardInterrupt with
        the number of steps done, for Ctrl-C: the Store is as these left it.
        """
        arranged = self._arranged(args, feeds)
        stack = stack_feeds(self.name, [node for node, _ in self._types], arranged, steps)
        results = self.runner.run_steps(stack)
        if self._prints and self.device != "null":
            for step in range(stack.steps):
                show(self._prints, [value[step] for value in results[len(self.outputs):]])
        return self._structured(results)

    def _structured(self, results: Sequence[Any]) -> Any:
        """The outputs as `gf.function` was given them."""
        if self._structure is None:
            return results[0]
        results = list(results[:len(self.outputs)])
        return results if self._structure is list else dict(zip(self.outputs, results))

    @cached_property
    def _types(self) -> list[tuple[Node, np.dtype]]:
        """Each feed's node and NumPy type."""
        return [(v.node, v.node.attrs["dtype"].numpy) for v in self.traced.inputs]

    def _arranged(self, args: Sequence[Any], feeds: Mapping[str, Any]) -> list[np.ndarray]:
        if len(args) + len(feeds) == len(self.inputs):
            try:
                values = [*args, *[feeds[name] for name in self.inputs[len(args):]]]
            except KeyError:
                raise self._wrong_feeds(args, feeds) from None
            there = self.device.startswith("cuda")
            return [value if type(value) is np.ndarray and value.dtype == dtype
                    or there and getattr(value, "on_device", False) and value.dtype == dtype
                    else as_feed(node, value) for value, (node, dtype) in zip(values, self._types)]
        raise self._wrong_feeds(args, feeds)

    def _wrong_feeds(self, args: Sequence[Any], feeds: Mapping[str, Any]) -> FeedError:
        """What is wrong with feeds that are not one for each input."""
        if len(args) > len(self.inputs):
            return FeedError(f"{self.name} takes {len(self.inputs)} feeds ({_list(self.inputs)}), got "
                             f"{len(args)}", where=here())
        given = self.inputs[:len(args)]
        for key in feeds:
            if key not in self.inputs:
                return FeedError(f"{self.name} has no input {key!r}", where=here(),
                                 hint=f"its inputs are {_list(self.inputs)}")
            if key in given:
                return FeedError(f"the feed {key!r} is given by position and by name", where=here())
        missing = [name for name in self.inputs if name not in given and name not in feeds]
        return FeedError(f"{self.name} misses the feed{'s' * (len(missing) > 1)} {_list(missing)}",
                         where=here(), hint=f"its inputs are {_list(self.inputs)}")

    @property
    def runner(self) -> Any:
        """What runs the program on its device; compiled when first asked for."""
        if self._runner is None:
            self._runner = _RUNNERS[self.device](self)
        return self._runner

    @property
    def compilation(self) -> Any:
        """The stages of the compiler, each run when it is first asked for."""
        if self._compilation is None:
            if self.tuning is not None:              # the same choices as those of the code that runs
                self._compilation = self.compiled.compilation
            else:
                from graphflow.compiler.driver import Compilation
                self._compilation = Compilation(self.traced, self._target())
        return self._compilation

    @property
    def compiled(self) -> Compiled:
        """The plan with machine code, compiled or read from the cache when first asked for."""
        if self._compiled is None:
            from graphflow.compiler.driver import compile_program
            self._compiled = compile_program(self.traced, self._target(), self.tuning)
            self._compilation = self._compilation or self._compiled.compilation
        return self._compiled

    def _target(self) -> Target | CudaTarget:
        """What the device's code is generated for."""
        if self.device in ("cuda", "cuda-tf32"):
            from graphflow.compiler.cuda_target import host_cuda_target
            return replace(host_cuda_target(), tf32=self.device == "cuda-tf32")
        from graphflow.compiler.target import host_target
        return host_target()

    @property
    def plan(self) -> Plan:
        """What the runtime executes: buffers, launches, lifetimes."""
        return self.compilation.result("plan")

    def text(self, stage: str = "plan") -> str:
        """The result of a stage of the compiler as text."""
        return self.compilation.text(stage)

    def graph(self, stage: str = "trace") -> Any:
        """The result of a stage as a networkx.DiGraph: ops and values, or kernels and buffers."""
        return self.compilation.graph(stage)

    def dump(self, folder: str | Path, stage: str | None = None) -> list[Path]:
        """Writes every stage (or one) into the folder: text, GraphML, LLVM code and assembly; the files'
        paths."""
        return self.compilation.dump(folder, stage)

    def explain(self) -> str:
        """Which fusions and in-place updates were refused, and why; if the program is tuned, also what was
        found for each contraction."""
        return self.compilation.explain()

    def peak_bytes(self, **symbols: int) -> int:
        """The exact working memory of a call, with this value for each of the program's dimensions:
        activations, gradients and scratch, beside the Store, the feeds and the outputs.

        The batch that inputs leave open with None is called ``batch``: ``program.peak_bytes(batch=128)``.
        """
        from graphflow.compiler.plan.bind import bind
        return bind(self.plan, *self._sizes("peak_bytes", symbols)).peak_bytes

    def explain_memory(self, **symbols: int) -> str:
        """Where the working memory of a call goes, with these values of the program's dimensions: its peak,
        as a formula too, and what is alive there, the largest first, with your lines."""
        from graphflow.compiler.plan.peak import describe_peak
        values, threads = self._sizes("explain_memory", symbols)
        return describe_peak(self.plan, values, threads, self.compilation.context.lines())

    def _sizes(self, what: str, symbols: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """The values in the order of the plan's symbols, and the number of threads."""
        from graphflow.runtime.native import default_threads
        known = self.plan.symbols
        if set(symbols) != set(known):
            raise UseError(f"{what} of {self.name} needs the value of {_list(known) if known else 'nothing'}",
                           where=here())
        return {name: symbols[name] for name in known}, self.threads or default_threads()

    def fingerprint(self) -> str:
        """A hash of what is computed and where: equal for programs whose results have the same bits on one
        machine."""
        from graphflow.compiler.ir.text import print_graph
        text = f"{self.device}\n{print_graph(self.traced, origins=False)}"
        if self.tuning is not None:
            _ = self.compiled
            tiles = {name: dict(choice.tile) for name, choice in (self.tuning.choices or {}).items()}
            text += f"\n{tiles}"
        return hashlib.sha256(text.encode()).hexdigest()


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def as_feed(node: Node, value: Any) -> np.ndarray:
    """The value as an array of the input's type: exactly, or by a conversion that loses nothing; FeedError
    else.

    Python numbers and lists adapt as they do in the language: integers may feed a float.
    """
    target, name = node.attrs["dtype"].numpy, node.attrs["name"]
    where = node.origins[0] if node.origins else None
    if isinstance(value, np.ndarray) and value.dtype == target:
        return value
    if isinstance(value, Tensor):
        raise FeedError(f"feed {name!r}: a Tensor is no array", where=where, hint="feeds are numbers")
    array = np.asarray(value)
    literal = isinstance(value, (bool, int, float, list, tuple))
    if array.dtype.kind not in "fiub":
        raise FeedError(f"feed {name!r}: must be {target}, got {array.dtype}", where=where,
                        hint="pass numbers in rows of one length")
    if np.can_cast(array.dtype, target, "safe") or literal and np.can_cast(array.dtype, target, "same_kind") \
            and not _overflows(array, target) or literal and target.kind == "f" and array.dtype.kind in "iub":
        return array.astype(target)
    raise FeedError(f"feed {name!r}: must be {target}, got {array.dtype}", where=where,
                    hint=f"convert it with .astype('{target}') if nothing that matters is lost")


def _overflows(array: np.ndarray, target: np.dtype) -> bool:
    if target.kind not in "iu" or not array.size:
        return False
    limits = np.iinfo(target)
    return int(array.min()) < limits.min or int(array.max()) > limits.max


class ReferenceProgram:
    """Interprets the graph with NumPy, op by op, after its gradients are expanded: no other pass runs."""

    def __init__(self, graph: Graph, store: Store) -> None:
        from graphflow.compiler.passes.autodiff import expand_gradients
        self.graph, self.store = expand_gradients(graph), store
        nodes = graph.nodes()
        self.checker = FeedChecker(_feed_plan(graph),
                                   lambda n: nodes[n].origins[0] if nodes[n].origins else None)

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One call: the outputs in order; the Store has the updated values afterwards."""
        from graphflow.compiler.interpret import interpret
        symbols = self.checker.symbols(feeds)
        by_name = {v.node.attrs["name"]: feed for v, feed in zip(self.graph.inputs, feeds)}
        with self.store.lock:
            state = {name: self.store[name] for name in self.graph.states()}
            outputs, updated = interpret(self.graph, by_name, state, symbols)
            for name, value in updated.items():
                self.store[name] = value
        return [np.array(value) for value in outputs.values()]

    def run_steps(self, stack: Stack) -> list[np.ndarray]:
        """The outputs of many steps, stacked."""
        return by_calls(self.graph.name, self.run, stack)


def _feed_plan(graph: Graph) -> Plan:
    """The feeds and guards of a graph as a plan without a body: enough to check a call."""
    number = {n: i for i, n in enumerate(graph.nodes())}
    buffers = tuple(Buffer(f"feed{i}", "feed", v.node.attrs["name"], v.dtype, v.shape,
                           origins=(number[v.node],))
                    for i, v in enumerate(graph.inputs))
    symbols = sorted(symbols_of(*(d for v in graph.inputs for d in v.shape)))
    lines = {origin: i for i, n in enumerate(graph.nodes()) for origin in n.origins[:1]}
    guards = tuple(EntryGuard(g.left, g.right, lines[g.where] if g.where in lines else -1)
                   for g in graph.guards)
    feeds = tuple(b.id for b in buffers)
    return Plan(graph.name, "reference", tuple(symbols), buffers, feeds, (), (), (), (),
                guards=guards)


def _cpu_program(program: Program) -> Any:
    from graphflow.runtime.cpu import CpuProgram
    install_threads()
    compiled = program.compiled
    return CpuProgram(compiled.plan, compiled.object_code, program.store, program.threads,
                      lambda number: compiled.locations[number])


@lru_cache(maxsize=1)
def install_threads() -> None:
    """Makes the thread pool ready: one for all programs of the process, of generated code like the rest."""
    from graphflow.compiler.driver import compile_pool
    from graphflow.compiler.target import host_target
    from graphflow.runtime.native import install_pool
    install_pool(compile_pool(host_target()))


def _cuda_program(program: Program) -> Any:
    from graphflow.runtime.cuda import CudaProgram
    compiled = program.compiled
    return CudaProgram(compiled.plan, compiled.object_code, program.store,
                       lambda number: compiled.locations[number])


def _null_program(program: Program) -> Any:
    from graphflow.runtime.native import default_threads
    from graphflow.runtime.null import NullProgram
    locations = [n.origins[0] if n.origins else None for n in program.traced.nodes()]
    return NullProgram(program.plan, program.threads or default_threads(), lambda number: locations[number])


_RUNNERS = {"cpu": _cpu_program, "cuda": _cuda_program, "cuda-tf32": _cuda_program, "null": _null_program,
            "reference": lambda program: ReferenceProgram(program.traced, program.store)}
