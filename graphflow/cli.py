"""The command ``graphflow``: runs and lists the examples, dumps what the compiler makes of a net, measures
its kernels, shows devices and ops."""
from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from graphflow.compiler.plan.errors import UseError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status: 0, or 2 with one line on standard error for an error of use."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"graphflow: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("graphflow: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                           # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _message(error: UserError) -> str:
    """The whole error where it shows a line of the user's, else its text and hint in one line."""
    if error.where is not None:
        return str(error)
    return " ".join(error.message.split()) + (f" ({error.hint})" if error.hint else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graphflow", description="A compiler for neural networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train an example")
    run.add_argument("example", help="its name; see `graphflow list`")
    run.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda-tf32, reference or null; see "
                                                     "`graphflow devices`")
    run.add_argument("--data", metavar="FOLDER", help="where MNIST or Fashion-MNIST lies, for the examples "
                                                      "on them")
    run.add_argument("--epochs", type=_positive, metavar="N",
                     help="passes over the data, instead of the example's own")
    run.add_argument("--threads", type=_positive, metavar="N", help="instead of one for each core")
    run.add_argument("--tune", action="store_true",
                     help="time the ways to compute each contraction when compiling, and take the fastest")
    run.add_argument("--quick", action="store_true", help="train only a small part, in seconds")
    run.set_defaults(command=_run)

    listing = commands.add_parser("list", help="list the examples")
    listing.set_defaults(command=_list)

    dump = commands.add_parser("dump", help="write down what each stage of the compiler makes of a net")
    dump.add_argument("target", help="an example, or a file.py with a function build() that returns a Model "
                                     "or Program")
    dump.add_argument("--stage", help="only this stage; without -o it is printed")
    dump.add_argument("-o", "--output", metavar="FOLDER", help="default: out/NAME/dump")
    dump.set_defaults(command=_dump)

    devices = commands.add_parser("devices", help="list the devices")
    devices.set_defaults(command=_devices)

    ops = commands.add_parser("ops", help="list the ops of the language")
    ops.set_defaults(command=_ops)

    bench = commands.add_parser("bench", help="measure a net's kernels against the machine's limits")
    subjects = bench.add_subparsers(required=True, metavar="WHAT")
    kernels = subjects.add_parser("ops", help="the time, rates and share of the roofline of each kernel")
    kernels.add_argument("targets", nargs="+", metavar="TARGET",
                         help="an example, a file.py with a function build(), matmul:MxKxN, or "
                              "conv:NxCxHxW:OxRxS")
    kernels.add_argument("--size", action="append", default=[], type=_size, metavar="NAME=NUMBER",
                         help="the value of a dimension, such as N=64; others are 128")
    kernels.add_argument("--threads", type=_positive, metavar="N", help="instead of one for each core")
    kernels.add_argument("--tune", action="store_true",
                         help="time the ways to compute each contraction first, and take the fastest")
    kernels.add_argument("--top", type=_positive, default=20, metavar="N", help="how many kernels to show")
    kernels.set_defaults(command=_bench_ops)
    compiling = subjects.add_parser("compile", help="the time of each stage of the compiler, cache or not")
    compiling.add_argument("targets", nargs="+", metavar="TARGET", help="as of `bench ops`")
    compiling.set_defaults(command=_bench_compile)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer >= 1")
    return int(text)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
    return name, int(number)


# --- examples

def examples() -> list[str]:
    """The examples' names."""
    import graphflow.examples
    modules = pkgutil.iter_modules(graphflow.examples.__path__)
    return sorted(m.name for m in modules if not m.name.startswith("_"))


def _example(name: str) -> ModuleType:
    if name not in examples():
        raise UseError(f"there is no example {name!r}", hint=f"the examples are {', '.join(examples())}")
    return importlib.import_module(f"graphflow.examples.{name}")


def _run(args: argparse.Namespace) -> None:
    from graphflow.runtime.device import device
    device(args.device)                               # before any data is read
    if args.device == "null":
        print("device null plans and counts but computes nothing: the results below mean nothing")
    _example(args.example).main(args)


def _list(args: argparse.Namespace) -> None:
    for name in examples():
        print(f"{name:<20}{_first_line(_example(name).__doc__)}")


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""


# --- dump

def _dump(args: argparse.Namespace) -> None:
    program = _program(_built(args.target))
    if args.stage and not args.output:
        print(program.text(args.stage), end="")
        return
    folder = Path(args.output or Path("out", Path(args.target).stem, "dump"))
    for path in program.dump(folder, args.stage):
        print(path)


def _built(target: str) -> Any:
    module = _load(Path(target)) if target.endswith(".py") else _example(target)
    if not callable(getattr(module, "build", None)):
        raise UseError(f"{target} has no function build()", hint="it must return a gf.Model or a gf.function")
    return module.build()


def _load(path: Path) -> ModuleType:
    """The module in a file; UseError if it cannot be loaded."""
    if not path.is_file():
        raise UseError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UseError(f"{path}, line {error.lineno}: {error.msg}") from error
    return module


def _program(built: Any) -> Any:
    from graphflow.function import Program
    from graphflow.model import Model
    if isinstance(built, Model):
        return built.main
    if isinstance(built, Program):
        return built
    raise UseError(f"build() returned {type(built).__name__}, neither a Model nor a Program",
                   hint="return a gf.Model or a gf.function")


# --- bench

def _bench_compile(args: argparse.Namespace) -> None:
    from graphflow import bench
    for target, program in zip(args.targets, _programs(args.targets)):
        print(f"{target}\n{bench.compile_table(program)}")


def _programs(targets: Sequence[str]) -> list[Any]:
    from graphflow import bench
    return [bench.shape_program(target) if ":" in target else _program(_built(target)) for target in targets]


def _bench_ops(args: argparse.Namespace) -> None:
    from graphflow import bench
    from graphflow.compiler.plan.dims import symbols_of
    from graphflow.function import tuning
    from graphflow.runtime.native import default_threads
    threads = args.threads or default_threads()
    programs = _programs(args.targets)
    dims = [symbols_of(*(d for v in program.traced.inputs for d in v.shape)) for program in programs]
    known = set().union(*dims)
    for name, _ in args.size:
        if name not in known:
            raise UseError(f"no target has a dimension {name!r}",
                           hint=f"there are {', '.join(sorted(known))}" if known else "they have none")
    found = bench.machine(threads)
    print(bench.describe(found))
    for target, program, names in zip(args.targets, programs, dims):
        sizes = {name: size for name, size in args.size if name in names}
        program.threads = threads
        if args.tune:
            program.tuning = tuning(program.traced, sizes, program.device, threads)
        feeds = bench.random_feeds(program, sizes)
        print(f"\n{target}\n{bench.table(bench.profile(program, feeds), found, args.top)}")


# --- tables

def _devices(args: argparse.Namespace) -> None:
    from graphflow.runtime.device import devices
    for found in devices():
        print(found.describe())


def _ops(args: argparse.Namespace) -> None:
    from graphflow.compiler.ops import OPS
    for name, record in OPS.items():
        signature = f"{name}({', '.join([*record.operands, *(f'{a}=' for a in record.attrs)])})"
        print(f"{record.kind:<12}{signature}\n            {record.doc}")


if __name__ == "__main__":
    sys.exit(main())
