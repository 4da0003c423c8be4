"""Which team of threads of a GPU computes a row, and how: for `cuda_rows`, which writes it.

A row of known length that several passes read (its maximum, its sum, the results) and that the registers of a
team can hold is read once. Reductions that do not need each other go through a row in one pass, which stores
the elements, too, if these need no result. Of few rows each is then shared by several blocks. All of this
depends on shapes alone.
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from graphflow.compiler.cuda_target import BUSY_BLOCKS
from graphflow.compiler.emit.cuda_text import THREADS, WARP
from graphflow.compiler.emit.cuda_vectors import PACK_BYTES, Loops, Vectors, grid_of, reductions_of
from graphflow.compiler.kernel.form import Expr, Let, Load, Local, Loop, LoopKernel, Reduce, Statement, Store
from graphflow.compiler.kernel.walk import expressions, statements, subexpressions
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, substitute, symbol, typical

WARP_ROW, FEW_ROWS = 1024, 64
"""The longest row of a warp; of fewer rows, each has a block."""
MOST_HELD = {WARP: 64, 128: 32, 256: 32, 512: 32, 1024: 32}
"""Threads of a team and the registers of each that may hold elements of a row."""
LARGE_TEAM = 512
"""Threads of a long row of few; twice as many would have too few registers."""
LEAST_SHARE, FURTHER = 8, 16
"""Chunks of each thread that make another block for a row worth while; how much longer than typical symbolic
rows may be to have enough blocks."""


def has_rows(kernel: LoopKernel) -> bool:
    """Whether a loop or a reduction inside the grid runs over lanes."""
    _, body = grid_of(kernel.body)
    return any(s.kind == "lanes" if isinstance(s, Loop) else any(r.lanes for r in reductions_of(s.value))
               for s in statements(body))


class Teams(Vectors):
    """How one kernel is computed. `team`: threads of a row; `kept`: what each holds of it, in `steps` chunks;
    `parts`: blocks for each row, with `part_team` threads of it; `sides`: rows of a block that lie side by
    side; `along`: elements of a row in a chunk; `one_pass`: whether a row is reduced in one pass, and
    `at_once` the loop that runs in it."""

    sides, part_team = 1, THREADS

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel)
        self.passes = list(self._passes(self.body))
        for loops, _ in self.passes:
            self.names.update((var, f"e{n}") for n, (var, _) in enumerate(loops))
        self.names.update((name, name) for name in list(self.names.values()))
        self.kept: list[tuple[Load, str]] = []                # and the innermost variable
        self.steps, self.team = 0, THREADS
        self.one_pass = self._is_one_pass()
        self.at_once = self._stored_at_once() if self.one_pass else None
        self._choose_width()
        self.along = self.width
        self._choose_team()
        self.parts = self._parts()
        if self.parts > 1:
            self.kept, self.steps, self.team = [], 0, self.part_team
        self.by_warps = self.team == WARP
        self.threads = THREADS if self.by_warps else self.team

    def element(self, arg: str, index: tuple[DimLike, ...]) -> str:
        """An element of an argument. Its text is the same in all passes, whatever their variables are called
        and in which order these would stand."""
        same: dict[str, DimLike] = {var: symbol(name) for var, name in self.names.items()}
        return f"{arg}[{self.dim(substitute(self.flat(arg, index), same))}]"

    def _passes(self, body: tuple[Statement, ...]) -> Iterator[tuple[Loops, list[Expr]]]:
        """The loops that the threads of a team share, with the values that are computed in them."""
        for s in body:
            if isinstance(s, Loop):
                loops, inner = self._nest(s)
                if loops:
                    yield loops, [x.value for x in inner if self.is_used(x)]
                else:
                    yield from self._passes(s.body)
            elif self.is_used(s):
                for r in reductions_of(s.value):
                    if self._is_shared(r):
                        yield r.loops, [*(x.value for x in r.lets if x.name in self.used), *r.operands]

    def _is_shared(self, e: Reduce) -> bool:
        return bool(e.lanes)

    def _nest(self, s: Loop) -> tuple[Loops, tuple[Statement, ...]]:
        """Perfectly nested loops whose points are independent, and what is inside; no loops if they are
        not."""
        loops, body = [(s.var, s.extent)], s.body
        while len(body) == 1 and isinstance(body[0], Loop):
            loops.append((body[0].var, body[0].extent))
            body = body[0].body
        if any(isinstance(x, Loop) or any(map(self._is_shared, reductions_of(x.value))) for x in body):
            return [], s.body
        return loops, body

    def _choose_width(self) -> None:
        if self.reads_back():
            return
        found = self._accesses()
        for width in (8, 4, 2):
            packs = [x for x, var in found if self.packed(x.arg, x.index, var, width) == set()]
            if packs and max(self.bytes[x.arg] for x in packs) * width <= PACK_BYTES and all(
                    self.multiple(loops[-1][1], width) == set() for loops, _ in self.passes):
                self.width = width
                return

    def _accesses(self) -> list[tuple[Load | Store, str]]:
        """What passes may read and write by chunks, each with the variable of these."""
        found: list[tuple[Load | Store, str]] = [
            (x, self._var(loops)) for loops, values in self.passes for v in values
            for x, _ in self.loads(v, self._var(loops))]
        return found + [(x, self._var([(s.var, s.extent)])) for s in statements(self.body)
                        if isinstance(s, Loop) for x in s.body if isinstance(x, Store)]

    def _choose_team(self) -> None:
        """The smallest team that can hold what several passes read, else one for the row's typical length."""
        shapes = {tuple(x for _, x in loops) for loops, _ in self.passes}
        size = product(shapes.pop()) if len(shapes) == 1 and not self.at_once else 0
        kept = self._read_again() if isinstance(size, int) and size and not self.reads_back() else []
        for team, most in MOST_HELD.items() if kept else ():
            assert isinstance(size, int)
            steps = -(-size // (team * self.width))
            registers = sum(-(-steps * self.width * self.bytes[x.arg] // 4) for x, _ in kept)
            if registers <= most and (team > WARP or size <= WARP_ROW):
                self.team, self.kept, self.steps = team, kept, steps
                return
        longest = max((typical(product(x for _, x in loops)) for loops, _ in self.passes), default=0)
        rows = typical(product(x for _, x in self.grid))
        if longest <= WARP_ROW:
            self.team = WARP if rows >= FEW_ROWS or longest <= WARP else THREADS
        else:
            self.team = THREADS if rows >= BUSY_BLOCKS else LARGE_TEAM

    def _read_again(self) -> list[tuple[Load, str]]:
        """Loads that several passes do, with the innermost variable of the first of them."""
        count: dict[str, int] = {}
        first: dict[str, tuple[Load, str]] = {}
        for loops, values in self.passes:
            var = loops[-1][0]
            here = {self.element(x.arg, x.index): x for v in values for x, guards in self.loads(v, var)
                    if self.modes[x.arg] == "r" and not guards and self.is_pack(x, var)
                    and any(self.depends(x.index, v) for v, _ in loops)}
            for text, load in here.items():
                count[text] = count.get(text, 0) + 1
                first.setdefault(text, (load, var))
        return [first[text] for text, n in count.items() if n > 1]

    def _parts(self) -> int:
        """Blocks for each row, if rows are few and the kernel does nothing behind its only pass."""
        groups = self._groups()
        if (not isinstance(groups, int) or not groups or not self.one_pass or any(
                isinstance(s, Loop) and s is not self.at_once for s in self.body)):
            return 1
        length = product(x for _, x in self.passes[0][0])
        size = length if isinstance(length, int) else FURTHER * typical(length)
        return max(min(-(-BUSY_BLOCKS // groups), size // (LEAST_SHARE * self.part_team * self.along)), 1)

    def _is_one_pass(self) -> bool:
        """Whether all reductions run over the same elements, and none needs the result of another."""
        shapes = {tuple(x for _, x in loops) for loops, _ in self.passes}
        shared = self._shared()
        return bool(shared) and len(shapes) == 1 and not any(map(self._needs_result, shared)) and (
            not self.reads_back())

    def _stored_at_once(self) -> Loop | None:
        """The loop over elements that need no result of a reduction. What the kernel reads must be what it
        writes there, or of another shape: else the plan may let a result take over what is yet to be read
        (see `memory`)."""
        loops = [s for s in self.body if isinstance(s, Loop)]
        nest, inner = self._nest(loops[0]) if len(loops) == 1 else ([], ())
        if not nest or any(self._needs_result(s.value) for s in inner if self.is_used(s)):
            return None
        for x in (e for e in expressions(self.kernel) if isinstance(e, Load)):
            for s in (s for s in inner if isinstance(s, Store)):
                alike = (self.types[x.arg], self.shapes[x.arg]) == (self.types[s.arg], self.shapes[s.arg])
                read, written = (self.element(y.arg, y.index).removeprefix(y.arg) for y in (x, s))
                if (alike or x.arg == s.arg) and read != written:
                    return None
        return loops[0]

    @cached_property
    def _results(self) -> set[str]:
        """The locals that depend on the results of reductions."""
        out: set[str] = set()
        for s in self.body:
            if isinstance(s, Let) and any(getattr(x, "name", "") in out or isinstance(x, Reduce)
                                          and self._is_shared(x) for x in subexpressions(s.value)):
                out.add(s.name)
        return out

    def _needs_result(self, e: Expr) -> bool:
        return any(isinstance(x, Local) and x.name in self._results for x in subexpressions(e))

    def _groups(self) -> DimLike:
        """What teams there are for: rows."""
        return product(x for _, x in self.grid)

    def blocks(self) -> DimLike:
        """Blocks for all teams."""
        if not self.by_warps:
            return self._groups() * self.parts
        return ceildiv(self._groups(), self.threads // WARP)

    def scratch(self) -> DimLike:
        """Bytes of what the blocks of a row leave for the last of them."""
        if self.parts == 1:
            return 0
        return sum(self._region(x) for r in self._shared() for x in r.operands)

    def _region(self, operand: Expr) -> int:
        groups = self._groups()
        assert isinstance(groups, int)
        return -(-groups * self.sides * self.parts * operand.dtype.bytes // 16) * 16

    def _shared(self) -> list[Reduce]:
        """The reductions of the kernel, each once."""
        return [r for s in self.body if not isinstance(s, Loop) and self.is_used(s)
                for r in reductions_of(s.value) if self._is_shared(r)]

    def _var(self, loops: Loops) -> str:
        """The variable along which chunks lie."""
        return loops[-1][0]
