"""CUDA C for loop kernels with long reductions: a team of threads computes a row that lies along memory
(`cuda_columns` has those that lie across it): a warp, or a block where rows are long or few. The threads walk
side by side through the row and combine what they found with shuffles, the warps of a block through shared
memory. Where several blocks share a row, each leaves what it found in scratch, and the last one to arrive
combines that. `cuda_teams` decides all this.

A team synchronises before it stores: the plan lets a result take over the memory of an operand (see
`memory`), and a thread must not overwrite what another has yet to read. That also keeps the shared memory of
a reduction from being written for the next row while a thread reads it.
"""
from __future__ import annotations

from graphflow.compiler.emit.cuda_teams import LEAST_SHARE, Teams
from graphflow.compiler.emit.cuda_text import C_TYPES, WARP, Code, identity
from graphflow.compiler.emit.cuda_vectors import Loops, reductions_of
from graphflow.compiler.kernel.form import Expr, Let, Load, Loop, LoopKernel, Reduce, Statement, Store
from graphflow.compiler.kernel.walk import subexpressions
from graphflow.compiler.plan.dims import DimLike, product

UNROLLED, MOST_LOADS = 4, 8
"""Chunks that a thread reads before it uses the first, if these are not too many loads."""
Found = list[tuple[Reduce, list[str]]]
"""Reductions with the names of their accumulators."""


class Rows(Teams):
    """Writes one kernel. `one`: whether a thread stores the results of its row; `guard`: what stands before
    the stores of elements; `side`: what is added to find a thread's row among those side by side."""

    what, one, guard, side = "row", "lane == 0", "", ""

    def __init__(self, kernel: LoopKernel):
        super().__init__(kernel)
        self.inside = False                                  # a loop that the threads of a team share
        self.found: dict[int, str] = {}                      # results of reductions that are written already

    # -- the text

    def code(self) -> Code:
        """The kernel."""
        if all(extent != 0 for _, extent in self.grid):      # else there is nothing to do
            self._rows()
        done = f"static __device__ int {self.kernel.name}_done[{self._groups()}];\n" if self.parts > 1 else ""
        what = f"{self.parts} blocks" if self.parts > 1 else "one warp" if self.by_warps else "one block"
        return Code(self.kernel, self.lines, f"{what} per {self.what}", self.threads, self.scratch(),
                       meets=not self.by_warps, statics=done)

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
        self._statements(self.body, self._reduce_row() if self.one_pass else set())
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
        """The same, where the reduction is a team's: by all of its threads, which all get the result."""
        if id(e) in self.found:
            return self.found[id(e)]
        if self.inside or not self._is_shared(e):
            return super().reduce(e)
        found = [(e, self.accumulators(e))]
        self._accumulate_share(found)
        self._meet(found, self.width)
        return found[0][1][e.result]

    def _accumulate_share(self, found: Found, first: str = "lane", end: str = "") -> None:
        depth, loops = self.depth, found[0][0].loops
        nest, inner = self._nest(self.at_once) if self.at_once else ([], ())
        passes: list[tuple[Loops, list[Expr]]] = [
            (e.loops, [*(x.value for x in e.lets if x.name in self.used), *e.operands])
             for e, _ in found]
        made = []
        if nest:
            passes.append((tuple(nest), [s.value for s in inner if self.is_used(s)]))
            made = self._several_at_a_time(passes, first, end)
        if not made:
            loads = {self.element(x.arg, x.index) for own, values in passes for v in values
                     for x, _ in self.loads(v, self._var(own))}
            self._open_share(loops, first, end, max(len(loads - self.held.keys()), 1))
            for own, values in passes:
                made += self._fetch_packs(own, values)
        self.inside = True
        if self.width > 1:
            self.line("#pragma unroll")
            self.open(f"for (int w = 0; w < {self.width}; w++)")
            self.line(f"const idx {self.variable(self._var(loops))} = from + w;")
        for e, accs in found:
            self.accumulate(e, self._own(accs))
        if self.width > 1:
            self.close()
        self.inside = False
        if nest:
            self._store_chunk(nest, inner)
        self._forget(made)
        while self.depth > depth:
            self.close()

    def _own(self, accs: list[str]) -> list[str]:
        """The accumulators of one element of a chunk."""
        return accs

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

    # -- rows in one pass

    def _reduce_row(self) -> set[int]:
        """Reduces the row, or the block's part of it; then all blocks but the last one leave what they found
        and end, and that one combines everything. The statements that are written, by identity."""
        shared = self._shared()
        if self.parts > 1:
            self._choose_part(product(x for _, x in shared[0].loops))
        written = {id(self.at_once)}
        for s in self.body:
            if isinstance(s, Let) and not self._needs_result(s.value) and not any(
                    r is x for r in shared for x in reductions_of(s.value)):
                self.let(s)
                written.add(id(s))
        found = [(r, self.accumulators(r)) for r in shared]
        self._accumulate_share(found, *(("part * share + lane", "end") if self.parts > 1 else ()))
        self._meet(found, self.width)
        if self.parts > 1:
            self._last(found)
        self.found = {id(r): accs[r.result] for r, accs in found}
        return written

    def _choose_part(self, size: DimLike) -> None:
        least, parts = LEAST_SHARE * self.part_team, self.parts
        self.line(f"const idx chunks = {self.dim(size)}{f' / {self.along}' if self.along > 1 else ''};")
        self.line(f"const idx even = (chunks + {parts - 1}) / {parts};")
        self.line(f"const idx share = even < {least} ? {least} : even;")
        self.line("const idx used = chunks > share ? (chunks + share - 1) / share : 1;")
        self.line("if (part >= used) return;")
        self.line("const idx end = part + 1 < used ? (part + 1) * share : chunks;")

    def _last(self, found: Found) -> None:
        at, lefts = 0, []
        self.open("if (used > 1)")
        for r, accs in found:
            for acc, x in zip(accs, r.operands):
                kind, left = C_TYPES[x.dtype], self.fresh("left")
                place = f"({kind}*)(scratch + {at}) + group * {self.parts * self.sides}{self.side}"
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
        self.close()

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
                self.line(f"if ({self.one}) {self.element(s.arg, s.index)} = {value};")
                continue
            loops, inner = self._nest(s)
            if loops:
                self._share_stores(loops, inner)
            else:
                self.loop(s.var, s.extent)
                self._statements(s.body, set())
                self.close()
            synced = False

    def _several_at_a_time(self, passes: list[tuple[Loops, list[Expr]]], first: str = "lane",
                           end: str = "") -> list[str]:
        """Opens the loop over a few chunks of a thread, which are all read first, and the loop over these
        few; the texts of what is read. Nothing where nothing is, or registers hold it."""
        wide, loops = self.width > 1, passes[0][0]
        found = {self.element(x.arg, x.index): (x, guards, self._var(own)) for own, values in passes
                 for v in values for x, guards in self.loads(v, self._var(own))
                 if self.is_pack(x, self._var(own)) and any(self.depends(x.index, v) for v, _ in own)}
        if not found or self.steps:
            return []
        names = {text: self.fresh("x") for text in found}
        size = self.dim(product(x for _, x in loops))
        several = max(min(UNROLLED, MOST_LOADS // (len(found) + 1)), 1) * (1 if wide else 2)
        end = end or (f"{size} / {self.along}" if self.along > 1 else size)

        def each() -> None:
            self.line("#pragma unroll")
            self.open(f"for (int u = 0; u < {several}; u++)")
            self.line(f"const unsigned chunk = turn + u * {self.team};")
            self.line(f"if (chunk >= {end}) break;")
            self.place(loops, "chunk", str(self.along))

        self.open(f"for (idx turn = {first}; turn < {end}; turn += {several * self.team})")
        for text, (x, _, _) in found.items():
            self.line(f"{self._type(x)} {names[text]}[{several}];")
        each()
        for text, (x, guards, var) in found.items():
            guard = f"if ({' && '.join(guards)}) " if guards else ""
            value = self.fetch(x, var, "from", str(self.width), ", wide") if wide else text
            self.line(f"{guard}{names[text]}[u] = {value};")
        self.close()
        each()
        self.held.update((text, f"{name}[u]{'.at[w]' if wide else ''}") for text, name in names.items())
        return list(found)

    def _share_stores(self, loops: Loops, body: tuple[Statement, ...]) -> None:
        depth = self.depth
        values = [s.value for s in body if not isinstance(s, Loop) and self.is_used(s)]
        made = self._several_at_a_time([(loops, values)])
        if not made:
            self._open_share(loops)
            made = self._fetch_packs(loops, values)
        self._store_chunk(loops, body)
        self._forget(made)
        while self.depth > depth:
            self.close()

    def _store_chunk(self, loops: Loops, body: tuple[Statement, ...]) -> None:
        self.inside = True
        if self.width > 1:
            self.stored(body, self._var(loops), "from", str(self.width), ", wide", self.guard)
        else:
            for s in body:
                if isinstance(s, Let):
                    self.let(s)
                elif isinstance(s, Store):
                    value = self.expr(s.value)
                    self.line(f"{self.guard}{self.element(s.arg, s.index)} = {value};")
        self.inside = False
