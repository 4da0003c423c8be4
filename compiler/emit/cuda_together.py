"""CUDA C for loops of small kernels: all trips in one launch, with a barrier of the whole grid behind each
kernel instead of a launch.

All blocks must be resident at once, so there are few of them: the runtime sees to that, and launches the
kernels one by one where they do not fit. Every kernel is right for any number of blocks, so its text stands
in the loop as it is. What one block wrote before a barrier, all read behind it: a fence on both sides of the
barrier has the multiprocessors forget what their first caches hold.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from graphflow.compiler.emit.cuda_text import C_TYPES, Code, c_name, dimension
from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import DimLike, evaluate, product, symbols_of
from graphflow.compiler.plan.schema import (
    MOST_TOGETHER,
    Copy,
    Function,
    Item,
    Launch,
    Repeat,
    base_of,
    bases_of_loop,
    name_of_loop,
    places,
)

FEW_TRIPS, FEW_BLOCKS = 4, 2 * MOST_TOGETHER
"""Loops of fewer trips, or with kernels of more blocks, gain nothing: these keep the device busy."""

BARRIER = """\
// Waits until all blocks of the grid are here. What they add is 2^31 together, so the highest bit of the
// count changes when the last comes.
static __device__ void gf_grid_barrier(unsigned* count)
{
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned before = atomicAdd(count, blockIdx.x ? 1u : 0x80000000u - (gridDim.x - 1));
    while ((*(volatile unsigned*)count ^ before) < 0x80000000u) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// All blocks copy `count` elements.
template <class T> static __device__ void gf_grid_copy(T* to, const T* from, idx count)
{
  for (idx i = blockIdx.x * (idx)blockDim.x + threadIdx.x; i < count; i += (idx)gridDim.x * blockDim.x)
    to[i] = from[i];
}
"""


def loops_together(program: KernelProgram, code: Callable[[Kernel], Code],
                   blocks: Callable[[Kernel], DimLike], scratch: Callable[[Kernel], DimLike]) -> list[Repeat]:
    """The loops of the program that become one launch: without an end that a value decides, of copies and
    kernels with few blocks, of which one at most has barriers and shared memory, no more than is declared."""
    found = []
    for place in places(program.plan.body):
        item = place.item
        if not isinstance(item, Repeat) or item.condition or not _kernels(item.body) \
                or not all(isinstance(x, (Launch, Copy)) for x in item.body):
            continue
        if isinstance(item.trips, int) and item.trips < FEW_TRIPS:
            continue
        kernels = [program.kernels[name] for name in dict.fromkeys(_kernels(item.body))]
        counts = [blocks(k) for k in kernels]
        if not all(isinstance(n, int) and n <= FEW_BLOCKS for n in counts):
            continue
        codes = [code(k) for k in kernels]
        most = max(c.threads for c in codes)
        meeting = [c for c in codes if c.meets]
        if len(meeting) <= 1 and all(c.threads == most and not c.asks for c in meeting) \
                and all(evaluate(n, {}) <= MOST_TOGETHER for k, n in zip(kernels, counts)
                        if scratch(k) != 0):                 # which is right for one number of blocks only
            found.append(item)
    return found


def _kernels(body: Sequence[Item]) -> list[str]:
    return [item.kernel for item in body if isinstance(item, Launch)]


def _touched(body: Sequence[Item]) -> list[str]:
    return [id for x in body for id in (x.buffers if isinstance(x, Launch) else (x.source, x.target)
                                        if isinstance(x, Copy) else ())]


def loop_function(program: KernelProgram, item: Repeat, threads: int) -> Function:
    """How the loop is launched: with the addresses of the buffers that its launches work on or in."""
    table = {b.id: b for b in program.plan.buffers}
    used = symbols_of(item.trips, *(table[id].offset for id in _touched(item.body)),
                      *(d for x in item.body if isinstance(x, Copy) for d in table[x.source].shape))
    used |= {s for name in _kernels(item.body) for s in program.kernels[name].symbols}
    return Function(name_of_loop(item), threads, tuple(sorted(used - {item.counter})))


def loop_of_kernels(program: KernelProgram, item: Repeat, threads: int,
                    launched: Callable[[Kernel], tuple[int, DimLike, DimLike]]) -> str:
    """The ``__global__`` function of the loop. `launched`: threads, blocks and scratch of a kernel."""
    table = {b.id: b for b in program.plan.buffers}
    function, bases = loop_function(program, item, threads), bases_of_loop(table, item)
    parameters = [f"{C_TYPES[table[id].dtype]}* m{i}" for i, id in enumerate(bases)]
    parameters += ["char* scratch", *(f"idx {c_name(s)}" for s in function.symbols)]
    counter = c_name(item.counter)
    lines = [f"// {function.name}: all trips of {', '.join(dict.fromkeys(_kernels(item.body)))}.",
             f"// Launch with {threads} threads a block, all blocks together.",
             f"static __device__ unsigned {function.name}_count;",
             f'extern "C" __global__ void __launch_bounds__({threads}) '
             f"{function.name}({', '.join(parameters)})",
             "{", f"  for (idx {counter} = 0; {counter} < {dimension(item.trips)}; {counter}++) {{"]

    def address(id: str) -> str:
        offset = table[id].offset
        return f"m{bases.index(base_of(table, id))}{f' + {dimension(offset)}' if offset != 0 else ''}"

    for launch in item.body:
        if isinstance(launch, Copy):
            size = dimension(product(table[launch.source].shape))
            lines += [f"    gf_grid_copy({address(launch.target)}, {address(launch.source)}, {size});",
                      f"    gf_grid_barrier(&{function.name}_count);"]
            continue
        assert isinstance(launch, Launch)
        kernel = program.kernels[launch.kernel]
        values = [f"({'const ' if argument.mode == 'r' else ''}{C_TYPES[argument.dtype]}*){address(id)}"
                  for argument, id in zip(kernel.arguments, launch.buffers)]
        own, blocks, scratch = launched(kernel)
        values += ["scratch"] if scratch != 0 else []
        values += [c_name(s) for s in kernel.symbols]
        guards = [f"blockIdx.x < {blocks}", *([f"threadIdx.x < {own}"] if own < threads else [])]
        lines += [f"    if ({' && '.join(guards)})",
                  f"      {kernel.name}_body(blockIdx.x, gridDim.x < {blocks} ? gridDim.x : {blocks}, "
                  f"{', '.join(values)});",
                  f"    gf_grid_barrier(&{function.name}_count);"]
    return "\n".join([*lines, "  }", "}"]) + "\n"
