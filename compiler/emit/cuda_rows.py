"""CUDA C for loop kernels with long reductions: a team of threads computes a row that lies along memory
(`cuda_columns` has those that lie across it): a warp, or a block where rows are long or few. The threads walk
side by side through the row and combine what they found with shuffles, the warps of a block through shared
memory.

A row of known length that several passes read (its maximum, its sum, the results) and that the registers of a
team can hold is read once. A kernel that only reduces few rows has several blocks for each: each leaves what
it found in scratch, and the last one to arrive combines that. Every order depends on the shapes alone.

A team synchronises before it stores: the plan lets a result take over the memory of an operand (see
`memory`), and a thread must not overwrite what another has yet to read. That also keeps the shared memory of
a reduction from being written for the next row while a thread reads it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from graphflow.compiler.emit.cuda_text import C_TYPES, THREADS, WARP, Code, code_of, identity
from graphflow.compiler.emit.cuda_vectors import PACK_BYTES, Loops, Vectors, grid_of
from graphflow.compiler.kernel.form import (
    Apply,
    Expr,
    Guarded,
    Let,
    Load,
    Local,
    Loop,
    LoopKernel,
    Reduce,
    Statement,
    Store,
)
from graphflow.compiler.kernel.walk import statements, subexpressions
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, substitute, symbol, typical

WARP_ROW, FEW_ROWS = 1024, 64
"""The longest row of a warp; of fewer rows, each has a block."""
MOST_HELD = {WARP: 64, 128: 32, 256: 32, 512: 32, 1024: 32}
"""Threads of a team and the registers of each that may hold elements of a row."""
LARGE_TEAM = 512
"""Threads of a long row of few; twice as many would have too few registers."""
UNROLLED, UNDER_WAY, MOST_LOADS = 4, 2, 8
"""Chunks that a thread reads before it uses the first, in reductions, if these are not too many loads, and in
loops with stores."""
BLOCKS, LEAST_SHARE, FURTHER = 264, 8, 16
"""Blocks that keep a large device busy; chunks of each thread that make another block for a row worth while;
how much longer than typical symbolic rows may be to have enough blocks."""
Found = list[tuple[Reduce, list[str]]]
"""Reductions with the names of their accumulators."""


def has_rows(kernel: LoopKernel) -> bool:
    """Whether a loop or a reduction inside the grid runs over lanes."""
    _, body = grid_of(kernel.body)
    return any(s.kind == "lanes" if isinstance(s, Loop) else any(r.lanes for r in reductions_of(s.value))
               for s in statements(body))


def reductions_of(e: Expr) -> Iterator[Reduce]:
    """The outermost reductions of an expression."""
    if isinstance(e, Reduce):
        yield e
    elif isinstance(e, Apply):
        for x in e.args:
            yield from reductions_of(x)
    elif isinstance(e, Guarded):
        yield from reductions_of(e.value)
        yield from reductions_of(e.fill)


class Rows(Vectors):
    """Writes one kernel. `team`: threads of a row; `kept`: what each holds of it, in `steps` chunks; `parts`:
    blocks for each row; `sides`: rows of a block that lie side by side; `along`: elements of a row in a
    chunk."""

    sides = 1

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel)
        self.inside = False                                  # a loop that the threads of a team share
        self.found: dict[int, str] = {}                      # results of reductions that are written already
        self.passes = list(self._passes(self.body))
        for loops, _ in self.passes:
            self.names.update((var, f"e{n}") for n, (var, _) in enumerate(loops))
        self.names.update((name, name) for name in list(self.names.values()))
        self.kept: list[tuple[Load, str]] = []                # and the innermost variable
        self.steps, self.team = 0, THREADS
        self.waiting = {s.name for s in self.body if isinstance(s, Let)}       # locals without a value so far
        self._choose_width()
        self.along = self.width
        self._choose_team()
        self.parts = self._parts()
        if self.parts > 1:
            self.kept, self.steps = [], 0
            self._share_row()
        self.threads = self._threads()

    @property
    def by_warps(self) -> bool:
        """Whether a team is a warp."""
        return self.team == WARP

    def _share_row(self) -> None:
        """Chooses the team of a part of a row."""
        self.team = THREADS

    def _threads(self) -> int:
        return THREADS if self.by_warps else self.team

    def element(self, arg: str, index: tuple[DimLike, ...]) -> str:
        """An element of an argument. Its text is the same in all passes, whatever their variables are called
        and in which order these would stand."""
        same: dict[str, DimLike] = {var: symbol(name) for var, name in self.names.items()}
        return f"{arg}[{self.dim(substitute(self.flat(arg, index), same))}]"

    # -- how

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
        """What passes may read and write by chunks, each with the innermost variable."""
        found: list[tuple[Load | Store, str]] = [
            (x, loops[-1][0]) for loops, values in self.passes for v in values
            for x, _ in self.loads(v, loops[-1][0])]
        return found + [(x, s.var) for s in statements(self.body) if isinstance(s, Loop)
                        for x in s.body if isinstance(x, Store)]

    def _choose_team(self) -> None:
        """The smallest team that can hold what several passes read, else one for the row's typical length."""
        shapes = {tuple(x for _, x in loops) for loops, _ in self.passes}
        size = product(shapes.pop()) if len(shapes) == 1 else 0
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
            self.team = THREADS if rows >= BLOCKS else LARGE_TEAM

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
        """Blocks for each row, if the kernel does nothing but reduce rows that are few."""
        shapes = {tuple(x for _, x in loops) for loops, _ in self.passes}
        groups = self._groups()
        if (not isinstance(groups, int) or not groups or len(shapes) != 1 or any(
                isinstance(s, Loop) for s in self.body) or not self._independent()):
            return 1
        length = product(shapes.pop())
        size = length if isinstance(length, int) else FURTHER * typical(length)
        return max(min(BLOCKS // groups, size // (self._least() * self.along)), 1)

    def _least(self) -> int:
        """Chunks that are worth a block."""
        return LEAST_SHARE * THREADS

    def _independent(self) -> bool:
        """Whether no reduction needs the result of another."""
        return not any(self._needs_result(r) for r in self._shared())

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

    # -- the text

    def code(self) -> Code:
        """The kernel."""
        if all(extent != 0 for _, extent in self.grid):      # else there is nothing to do
            self._rows()
        done = f"static __device__ int {self.kernel.name}_done[{self._groups()}];\n" if self.parts > 1 else ""
        what = f"{self.parts} blocks" if self.parts > 1 else "one warp" if self.by_warps else "one block"
        return code_of(self.kernel, self.lines, f"{what} per {self._what()}", self.threads, self.scratch(),
                       meets=not self.by_warps, statics=done)

    def _what(self) -> str:
        return "row"

    def _packs(self) -> set[str]:
        """The arguments that are read or written by chunks."""
        return {x.arg for x, var in self._accesses() if self.width > 1 and self.is_pack(x, var)}

    def _rows(self) -> None:
        """The body for every row, in a grid-stride loop of teams; or for a part of a row."""
        packs = self._packs()
        if packs:
            self.line(f"const bool wide = {self.condition(packs)};")
        self.line(f"const unsigned groups = {self.dim(self._groups())};")
        self._place_thread()
        if self.parts > 1:
            self.line(f"const unsigned group = block / {self.parts};")
            self.line(f"const idx part = block % {self.parts};")
        elif self.by_warps:
            self.line(f"const unsigned teams = blocks * {self.threads // WARP};")
            self.open(f"for (unsigned group = block * {self.threads // WARP} + threadIdx.x / {WARP}; "
                      "group < groups; group += teams)")
        else:
            self.open("for (unsigned group = block; group < groups; group += blocks)")
        self._place_row()
        self._read_row()
        written = self._leave() if self.parts > 1 else set()
        self._statements(self.body, written)
        if self.parts == 1:
            self.close()

    def _place_thread(self) -> None:
        self.line(f"const int lane = threadIdx.x{f' % {WARP}' if self.by_warps else ''};")

    def _place_row(self) -> None:
        self.place(self.grid, "group", "1")

    def _read_row(self) -> None:
        """What several passes read, into registers."""
        if not self.kept:
            return
        names = [self.fresh("x") for _ in self.kept]
        for (x, _), name in zip(self.kept, names):
            self.line(f"{self._type(x)} {name}[{self.steps}];")
        self._open_share(self.passes[0][0])
        for (x, var), name in zip(self.kept, names):
            value = self.element(x.arg, x.index)
            self.held[value] = f"{name}[j]" + (".at[w]" if self.width > 1 else "")
            if self.width > 1:
                value = self.fetch(x, var, "from", str(self.width), ", wide")
            self.line(f"{name}[j] = {value};")
        self.close()

    def _type(self, x: Load) -> str:
        kind = self.types[x.arg]
        return kind if self.width == 1 else f"gf_pack<{kind}, {self.width}>"

    # -- loops that a team shares

    def _open_share(self, loops: Loops, first: str = "lane", end: str = "", loads: int = 0) -> None:
        """Opens the loop over the chunks of a thread, and places one; `loads` of a chunk."""
        size = product(x for _, x in loops)
        chunks = f"{self.dim(size)} / {self.along}" if self.along > 1 else self.dim(size)
        if self.steps:
            self.line("#pragma unroll")
            self.open(f"for (int j = 0; j < {self.steps}; j++)")
            self.line(f"const unsigned chunk = lane + j * {self.team};")
            if size != self.steps * self.team * self.width:
                self.line(f"if (chunk >= {chunks}) break;")
        else:
            if loads:
                unrolled = max(min(UNROLLED, MOST_LOADS // loads), 1)
                self.line(f"#pragma unroll {unrolled if self.width > 1 else 2 * unrolled}")
            self.open(f"for (idx turn = {first}; turn < {end or chunks}; turn += {self.team})")
            self.line("const unsigned chunk = turn;")        # numbers that can wrap cannot be unrolled
        self.place(loops, "chunk", str(self.along))

    def _var(self, loops: Loops) -> str:
        """The variable along which chunks lie."""
        return loops[-1][0]

    def _fetch_packs(self, loops: Loops, values: list[Expr]) -> list[str]:
        """Reads the chunks of what a pass uses and no register holds yet; their texts."""
        var, made = self._var(loops), []
        for x, guards in (found for v in values for found in self.loads(v, var)) if self.width > 1 else ():
            text = self.element(x.arg, x.index)
            if text in self.held or not self.is_pack(x, var):
                continue
            name = self.fresh("x")
            value = self.fetch(x, var, "from", str(self.width), ", wide")
            self.line(f"{self._type(x)} {name}{'' if guards else f' = {value}'};")
            if guards:
                self.line(f"if ({' && '.join(guards)}) {name} = {value};")
            self.held[text] = f"{name}.at[w]"
            made.append(text)
        return made

    def reduce(self, e: Reduce) -> str:
        """The same, where the reduction is a team's: by all of its threads, which all get the result. Others
        over the same elements that need nothing else go with it."""
        if id(e) in self.found:
            return self.found[id(e)]
        if self.inside or not self._is_shared(e):
            return super().reduce(e)
        found = [(r, self.accumulators(r)) for r in (e, *self._with(e))]
        self._accumulate_share(found)
        self._meet(found, self.width)
        self.found.update((id(r), accs[r.result]) for r, accs in found[1:])
        return found[0][1][e.result]

    def _with(self, e: Reduce) -> list[Reduce]:
        shared, extents = self._shared(), [x for _, x in e.loops]
        if not any(r is e for r in shared) or self.reads_back():
            return []
        return [r for r in shared if r is not e and id(r) not in self.found
                and [x for _, x in r.loops] == extents
                and not any(isinstance(x, Local) and x.name in self.waiting for x in subexpressions(r))]

    def let(self, s: Let) -> None:
        """Declares a local; see `Writer`."""
        super().let(s)
        self.waiting.discard(s.name)

    def _accumulate_share(self, found: Found, first: str = "lane", end: str = "") -> None:
        loops, made = found[0][0].loops, []
        values = [[*(x.value for x in e.lets if x.name in self.used), *e.operands] for e, _ in found]
        loads = {self.element(x.arg, x.index) for read in values for v in read
                 for x, _ in self.loads(v, self._var(loops))}
        self._open_share(loops, first, end, max(len(loads - self.held.keys()), 1))
        for (e, _), read in zip(found, values):
            made += self._fetch_packs(e.loops, read)
        self._in_chunk(self._var(loops), lambda: [self.accumulate(e, self._own(accs)) for e, accs in found])
        self._forget(made)
        self.close()

    def _own(self, accs: list[str]) -> list[str]:
        """The accumulators of one element of a chunk."""
        return accs

    def _in_chunk(self, var: str, write: Callable[[], object]) -> None:
        """Writes what is done with each element of a chunk."""
        self.inside = True
        if self.width > 1:
            self.line("#pragma unroll")
            self.open(f"for (int w = 0; w < {self.width}; w++)")
            self.line(f"const idx {self.variable(var)} = from + w;")
        write()
        if self.width > 1:
            self.close()
        self.inside = False

    def _forget(self, texts: list[str]) -> None:
        for text in texts:
            del self.held[text]

    def _meet(self, found: Found, width: int) -> None:
        """Combines the accumulators of the threads of a team, which has some for each of `width` columns."""
        for e, accs in found:
            self._shuffle(e, accs, WARP // 2)
        if self.by_warps:
            return
        warps = self.threads // WARP
        parts = [[self.fresh("part") for _ in accs] for _, accs in found]
        for (e, accs), names in zip(found, parts):
            for acc, part, operand in zip(accs, names, e.operands):
                self.line(f"__shared__ {C_TYPES[operand.dtype]} {part}[{warps}];")
                self.line(f"if (lane % {WARP} == 0) {part}[lane / {WARP}] = {acc};")
        self.line("__syncthreads();")
        for (e, accs), names in zip(found, parts):
            for acc, part in zip(accs, names):
                self.line(f"{acc} = {part}[lane % {warps}];")
            self._shuffle(e, accs, warps // 2)

    def _shuffle(self, e: Reduce, accs: list[str], most: int, least: int = 1) -> None:
        """Combines values of lanes that are `least`, twice that, … and `most` apart."""
        step = self.fresh("step")
        self.open(f"for (int {step} = {most}; {step} >= {least}; {step} /= 2)")
        self.combine(e, accs, [f"(({C_TYPES[x.dtype]})__shfl_xor_sync(0xffffffffu, {acc}, {step}))"
                               for acc, x in zip(accs, e.operands)])
        self.close()

    # -- rows of several blocks

    def _leave(self) -> set[int]:
        """Reduces the block's part of the row. All blocks but the last one leave what they found and end;
        that one combines everything. The statements that are written already, by identity."""
        shared = self._shared()
        size = product(x for _, x in shared[0].loops)
        least, parts = self._least(), self.parts
        self.line(f"const idx chunks = {self.dim(size)}{f' / {self.along}' if self.along > 1 else ''};")
        self.line(f"const idx even = (chunks + {parts - 1}) / {parts};")
        self.line(f"const idx share = even < {least} ? {least} : even;")
        self.line("const idx used = chunks > share ? (chunks + share - 1) / share : 1;")
        self.line("if (part >= used) return;")
        self.line("const idx end = part + 1 < used ? (part + 1) * share : chunks;")
        written = set()
        for s in self.body:
            if isinstance(s, Let) and not self._needs_result(s.value) and not any(
                    r is x for r in shared for x in reductions_of(s.value)):
                self.let(s)
                written.add(id(s))
        found = [(r, self.accumulators(r)) for r in shared]
        self._accumulate_share(found, "part * share + lane", "end")
        self._meet(found, self.width)
        self.open("if (used > 1)")
        self._last(found)
        self.close()
        self.found = {id(r): accs[r.result] for r, accs in found}
        return written

    def _last(self, found: Found) -> None:
        at, lefts = 0, []
        for r, accs in found:
            for acc, x in zip(accs, r.operands):
                kind, left = C_TYPES[x.dtype], self.fresh("left")
                place = f"({kind}*)(scratch + {at}) + group * {self.parts * self.sides}{self._side()}"
                self.line(f"{kind}* const {left} = {place};")
                self.line(f"if (threadIdx.x < {self.sides}) {left}[part * {self.sides}] = {acc};")
                at += self._region(x)
                lefts.append(f"{left}[p * {self.sides}]")
        self.line(f"if (!gf_last_block(&{self.kernel.name}_done[group], used)) return;")
        for r, accs in found:
            for acc, start in zip(accs, identity(r)):
                self.line(f"{acc} = {start};")
        self.open(f"for (idx p = threadIdx.x / {self.sides}; p < used; p += {self.threads // self.sides})")
        for r, accs in found:
            self.combine(r, accs, [lefts.pop(0) for _ in accs])
        self.close()
        self._meet(found, 1)

    def _side(self) -> str:
        """What is added to find the row of a thread among those that lie side by side."""
        return ""

    # -- statements

    def _statements(self, body: tuple[Statement, ...], written: set[int]) -> None:
        """Those that all threads of a team come to, with the same values; one of them stores, when all have
        read what they need before."""
        synced = False
        for s in body:
            if id(s) in written:
                continue
            if isinstance(s, Let):
                self.let(s)
                synced = synced and not any(isinstance(x, Load) for x in subexpressions(s.value))
                continue
            value = self.expr(s.value) if isinstance(s, Store) else ""
            if not synced:
                self.line("__syncwarp();" if self.by_warps else "__syncthreads();")
                synced = True
            if isinstance(s, Store):
                self.line(f"if ({self._one()}) {self.element(s.arg, s.index)} = {value};")
                continue
            loops, inner = self._nest(s)
            if loops:
                self._share_stores(loops, inner)
            else:
                self.loop(s.var, s.extent)
                self._statements(s.body, set())
                self.close()
            synced = False

    def _two_at_a_time(self, loops: Loops, values: list[Expr]) -> list[str]:
        """Opens the loop over pairs of chunks of a thread, both of which are read first, and the loop over
        the pair; the texts of what is read. Nothing where nothing is."""
        var = loops[-1][0]
        found = {self.element(x.arg, x.index): (x, guards) for v in values for x, guards in self.loads(v, var)
                 if self.is_pack(x, var)}
        if not found:
            return []
        names = {text: self.fresh("x") for text in found}
        chunks = f"{self.dim(product(x for _, x in loops))} / {self.width}"

        def pair() -> None:
            self.line("#pragma unroll")
            self.open(f"for (int u = 0; u < {UNDER_WAY}; u++)")
            self.line(f"const unsigned chunk = turn + u * {self.team};")
            self.line(f"if (chunk >= {chunks}) break;")
            self.place(loops, "chunk", str(self.width))

        self.open(f"for (idx turn = lane; turn < {chunks}; turn += {UNDER_WAY * self.team})")
        for text, (x, _) in found.items():
            self.line(f"{self._type(x)} {names[text]}[{UNDER_WAY}];")
        pair()
        for text, (x, guards) in found.items():
            guard = f"if ({' && '.join(guards)}) " if guards else ""
            value = self.fetch(x, var, "from", str(self.width), ", wide")
            self.line(f"{guard}{names[text]}[u] = {value};")
        self.close()
        pair()
        self.held.update((text, f"{name}[u].at[w]") for text, name in names.items())
        return list(found)

    def _one(self) -> str:
        """Whether a thread stores the results of its row."""
        return "lane == 0"

    def _guard(self) -> str:
        """What stands before the stores of elements."""
        return ""

    def _share_stores(self, loops: Loops, body: tuple[Statement, ...]) -> None:
        depth = self.depth
        values = [s.value for s in body if not isinstance(s, Loop) and self.is_used(s)]
        made = [] if self.steps or self.width == 1 else self._two_at_a_time(loops, values)
        if not made:
            self._open_share(loops)
            made = self._fetch_packs(loops, values)
        guard = self._guard()
        self.inside = True
        if self.width > 1:
            self.stored(body, loops[-1][0], "from", str(self.width), ", wide", guard)
        else:
            for s in body:
                if isinstance(s, Let):
                    self.let(s)
                elif isinstance(s, Store):
                    value = self.expr(s.value)
                    self.line(f"{guard}{self.element(s.arg, s.index)} = {value};")
        self.inside = False
        self._forget(made)
        self.close()
        if self.depth > depth:
            self.close()
