"""CUDA C for loop kernels: fused elementwise chains, windows, reductions and rows.

There are two forms of parallelism:

- a kernel whose lanes lie directly below its grid loops: one thread per element, in a grid-stride loop;
- a kernel whose rows hold vectorised reductions or loops: one warp per row. Lanes stride through the row,
  and a reduction ends with shuffles in a fixed tree, so every run gives the same bits.

A warp synchronises before it stores: the plan lets a result take over the memory of an operand (see
`memory`), and a lane must not overwrite what another has yet to read.
"""
from __future__ import annotations

from graphflow.compiler.emit.cuda_text import THREADS, WARP, Writer, c_name, signature, used_locals
from graphflow.compiler.kernel.form import Let, Loop, LoopKernel, Reduce, Statement, Store
from graphflow.compiler.kernel.walk import expressions, statements, subexpressions
from graphflow.compiler.plan.dims import DimLike, ceildiv, product


def loop_text(kernel: LoopKernel) -> str:
    """The ``__global__`` function."""
    return _Loops(kernel).text()


def loop_blocks(kernel: LoopKernel) -> DimLike:
    """Blocks for a thread for each element, or a warp for each row."""
    grid, body = _grid(kernel.body)
    points = product(extent for _, extent in grid)
    return ceildiv(points, THREADS // WARP if _has_lanes(body) else THREADS)


def loop_scratch(kernel: LoopKernel) -> DimLike:
    """Bytes that the blocks of a launch share for what they hand to each other."""
    return 0


class _Loops(Writer):
    """Writes one kernel."""

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel.arguments, kernel.indirect, _used(kernel))
        self.kernel = kernel

    def text(self) -> str:
        """The ``__global__`` function."""
        k = self.kernel
        grid, body = _grid(k.body)
        by_row = _has_lanes(body)
        if all(extent != 0 for _, extent in grid):           # else there is nothing to do
            self.points(grid, body, by_row)
        form = "one warp per row" if by_row else "one thread per element"
        lines = [f"// Launch with {THREADS} threads a block, {form}.", signature(k, THREADS, loop_scratch(k)),
                 "{", *self.lines, "}"]
        return "\n".join(lines) + "\n"

    def points(self, grid: list[tuple[str, DimLike]], body: tuple[Statement, ...], by_row: bool) -> None:
        """The body at every point of the grid, in a grid-stride loop of threads or of warps."""
        thread, threads = "(blockIdx.x * (idx)blockDim.x + threadIdx.x)", "(idx)gridDim.x * blockDim.x"
        if by_row:
            self.line(f"const int lane = threadIdx.x % {WARP};")
            thread, threads = f"{thread} / {WARP}", f"{threads} / {WARP}"
        self.line(f"const idx total = {self.dim(product(extent for _, extent in grid))};")
        self.open(f"for (idx point = {thread}; point < total; point += {threads})")
        rest = "point"
        for number, (name, extent) in reversed(list(enumerate(grid))):
            self.line(f"const idx {c_name(name)} = {f'{rest} % {self.dim(extent)}' if number else rest};")
            rest = f"({rest} / {self.dim(extent)})"
        self.statements(body, by_row)
        self.close()

    def statements(self, body: tuple[Statement, ...], by_row: bool) -> None:
        """`by_row`: all lanes of a warp are here with the same values, so one of them stores."""
        synced = False
        for s in body:
            if isinstance(s, Let):
                self.let(s)
                continue
            lanes = isinstance(s, Loop) and s.kind == "lanes"
            if by_row and not synced and (lanes or isinstance(s, Store)):
                self.line("__syncwarp();")
                synced = True
            if isinstance(s, Store):
                value = self.expr(s.value)
                guard = "if (lane == 0) " if by_row else ""
                self.line(f"{guard}{self.element(s.arg, s.index)} = {value};")
            else:
                self.loop(s.var, s.extent, lanes)
                self.statements(s.body, by_row and not lanes)
                self.close()


def _used(kernel: LoopKernel) -> set[str]:
    """The locals that what is stored depends on."""
    lets = [s for s in statements(kernel.body) if isinstance(s, Let)]
    lets += [x for e in expressions(kernel) if isinstance(e, Reduce) for x in e.lets]
    stored = [s.value for s in statements(kernel.body) if isinstance(s, Store)]
    return used_locals([*kernel.indirect.values(), *stored], lets)


def _grid(body: tuple[Statement, ...]) -> tuple[list[tuple[str, DimLike]], tuple[Statement, ...]]:
    """The outer loops that threads share: the grid loops and a lanes loop directly below them."""
    loops: list[tuple[str, DimLike]] = []
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].kind in ("grid", "lanes"):
        loop = body[0]
        loops.append((loop.var, loop.extent))
        body = loop.body
        if loop.kind == "lanes":
            break
    return loops, body


def _has_lanes(body: tuple[Statement, ...]) -> bool:
    """Whether a loop or a reduction in the body runs over lanes."""
    for s in statements(body):
        if isinstance(s, Loop):
            if s.kind == "lanes":
                return True
        elif any(isinstance(e, Reduce) and e.lanes for e in subexpressions(s.value)):
            return True
    return False
