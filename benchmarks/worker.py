"""Serves one engine on one workload to whoever times it (see protocol.py):

    worker.py WORKLOAD THREADS [--engine graphflow] [--small]

Another referee may bring modules `workloads` (with `params(name)` and `batch(name, index)`) and `protocol` of
its own on PYTHONPATH: then initial values and data are its, and it is served by its protocol.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

import protocol
from workloads import SMALL, WORKLOADS

ENGINES = {
    "graphflow": ("nets_graphflow", ""),
    "torch-eager": ("nets_torch", "eager"),
    "torch-cl": ("nets_torch", "cl"),
    "torch-compile": ("nets_torch", "compile"),
    "jax-jit": ("nets_jax", "jit"),
}
"""Engine -> the module of its nets, and the mode in which it runs them."""


def referees(name: str) -> ModuleType | None:
    """The referee's own module of that name, if it brings one."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    spec = PathFinder.find_spec(name, folders) if folders else None
    if spec is None or spec.loader is None:
        return None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hold_to(threads: int) -> None:
    """Lets this process run on so many processors, and XLA on one thread if it is one: JAX has no option."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def main() -> None:
    """Builds the engine and serves it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("threads", type=int)
    parser.add_argument("--engine", choices=list(ENGINES), default="graphflow")
    parser.add_argument("--small", action="store_true", help="few units and examples, to try it out")
    args = parser.parse_args()
    work = (SMALL if args.small else WORKLOADS)[args.workload]
    given, speech = referees("workloads"), referees("protocol")
    initial = given.params(work.name) if given else work.params()
    batches = [given.batch(work.name, i) if given else work.batch(i) for i in (0, 1)]
    module, mode = ENGINES[args.engine]
    if module == "nets_jax":
        hold_to(args.threads)
    engine = importlib.import_module(module).Engine(work, initial, batches, args.threads, mode)
    del initial, batches
    (speech or protocol).serve(engine.step, engine.read_loss, engine.read_norms)


if __name__ == "__main__":
    sys.exit(main())
