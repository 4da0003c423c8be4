"""Contractions: acc(m, n) = sum over k of a(m, k)·b(k, n), then what is stored from acc.

A task (see `tiling`) packs a panel of b, unless the one before it used the same, then for each tile of `mr`
rows runs a micro-kernel that keeps mr x nr sums in registers: for each k one row of the panel and mr
broadcast elements of a. The finished sums go to a small buffer, from which a loop over the rows evaluates
the stores with vectors along n. Where k is too long for one panel, the sums wait in scratch between panels.
The order of k is that of the axes, always.

Fast are: a that is a plain load, linear in the k variables, whatever its strides; b that walks neighbouring
elements along the last n axis (that axis may be as short as half a vector) or along the last k axis. Guards
of b are cheap; anything else in a (arithmetic, guards, divisions) is evaluated into scratch once per task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from graphflow.compiler.emit.builder import I64, MEMORY_TYPES, Module, Type, Value, constant
from graphflow.compiler.emit.cost import trips
from graphflow.compiler.emit.expr import Emitter
from graphflow.compiler.emit.loops import start_function
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.operands import arranged, coefficient, drop_guard, flat_index, load_offset
from graphflow.compiler.emit.packing import (
    COLUMN,
    FROM,
    ROW,
    TO,
    KLoop,
    axis_values,
    pack_a,
    pack_b,
    panel_row,
)
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.tiling import contraction_tiling, is_straight, scratch_parts
from graphflow.compiler.kernel import walk
from graphflow.compiler.kernel.form import Argument, ContractionKernel, Load, Store
from graphflow.compiler.plan.dims import DimLike, ceildiv, product, simplify, substitute, symbol, symbols_of
from graphflow.compiler.target import Target

ZERO = constant(I64, 0)
PANEL = "panel number"
"""The name of the number of the panel at hand."""
STEP, FRACTION = 8, 16
"""What is needed later is asked for once for so many k, in lines with so many bits behind the point."""


def emit_contraction(module: Module, kernel: ContractionKernel, target: Target) -> None:
    """Adds the kernel's function to the module."""
    DirectContraction(module, kernel, target).emit()


class DirectContraction:
    """Writes the function of a contraction."""

    last: Value | None = None
    """Whether the panel along k at hand is the last; None where there is one for certain."""
    late: Value | None = None
    """How many columns of the panel at hand another has stored; None: none for certain."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target):
        self.kernel, self.c = kernel, arranged(kernel, target)
        self.t = contraction_tiling(kernel, target)
        self.e = e = start_function(module, kernel, target)
        self.b = e.b
        self.dtype = self.c.a.dtype
        self.type: Type = MEMORY_TYPES[self.dtype.name]
        for var, extent in (*self.c.batch, *self.c.m, *self.c.n, *self.c.k, *self.c.groups):
            e.bounds[var] = (0, extent - 1 if isinstance(extent, int) else None)
        self.a: Node = e.nodes.of(drop_guard(self.c.a, self.t.limit))
        self.right: Node = e.nodes.of(drop_guard(self.c.b, self.t.limit))
        t, plain = self.t, self.right.kind == "load" and not kernel.indirect
        plain = plain and t.reused and len(t.n) == len(self.c.k) == 1 and not t.groups and not t.outer
        self.ask_every = STEP if plain else 0

    # -- the function --------------------------------------------------------------------------------------

    def emit(self) -> None:
        """The whole function."""
        e, b = self.e, self.b
        _, begin, end, _ = b.params
        self._scratch()
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            self._task(task.index, begin)
        b.ret()

    def _scratch(self) -> None:
        """The worker's scratch: panel of b, packed a, sums."""
        b, t, own = self.b, self.t, self._own_scratch()
        panel, packed, _ = scratch_parts(t, self.dtype.bytes)
        self._place("panel ", own, (t.group_count * t.panel_rows + t.spare_rows, t.nr))
        self._place("packed ", b.gep(own, panel, Type("i8")), (t.tiles * t.mr, t.panel_rows))
        self._place("sums ", b.gep(own, panel + packed, Type("i8")), (t.group_count * t.sum_rows, t.nr))

    def _own_scratch(self) -> Value:
        """The address of the worker's scratch."""
        b = self.b
        slot = len(self.kernel.arguments) + len(self.kernel.symbols)
        area = b.load(Type("ptr"), b.gep(b.params[0], slot, I64))
        size = b.load(I64, b.gep(b.params[0], slot + 1, I64))
        return b.gep(area, b.mul(b.params[3], size), Type("i8"))

    def _place(self, name: str, address: Value, shape: tuple[DimLike, ...]) -> None:
        """Makes a piece of scratch an argument."""
        self.e.add_argument(Argument(name, self.dtype, shape, "rw"), address)

    def _task(self, index: Value, begin: Value) -> None:
        e, b, t = self.e, self.b, self.t
        m_blocks, panels = e.scalar(t.m_blocks), e.scalar(t.panels)
        above, block = self._split(index, m_blocks)
        flat, panel = self._split(above, panels)
        for var, extent in reversed(t.batch[1:]):
            flat, at = self._split(flat, e.scalar(extent))
            e.scopes.bind(var, at)
        if t.batch:
            e.scopes.bind(t.batch[0][0], flat)
        first_row = b.mul(block, t.mr * t.tiles)
        fresh = b.or_(b.compare("eq", block, 0), b.compare("eq", index, begin))
        self._at_columns(panel, lambda: self._in_blocks(first_row) if t.outer
                         else self._in_chunks(first_row, fresh))

    def _at_columns(self, panel: Value, body: Callable[[], None]) -> None:
        """Runs the body for the columns of a panel; by code of its own for a last one with half of them."""
        b, t = self.b, self.t
        if not t.half_last:
            with self._columns(panel, t.nr):
                return body()
        last = b.compare("eq", panel, b.sub(self.e.scalar(t.panels), 1))
        with self._when(b.xor(last, True)), self._columns(panel, t.nr, whole=True):
            body()
        self.t = replace(t, nr=t.lanes)
        with self._when(last), self._columns(panel, t.nr):
            body()
        self.t = t

    @contextmanager
    def _columns(self, panel: Value, wide: int, whole: bool = False) -> Iterator[None]:
        """Makes the panel the one at hand; `wide`: columns of one before; `whole`: it has all of its own. One
        that is read where it lies begins sooner if it must to be whole: in the inner loop masks cost."""
        e, b, t = self.e, self.b, self.t
        self.late, n, column = None, t.n_total, b.mul(panel, wide)
        whole = whole or t.nr == 1 or isinstance(n, int) and n % t.nr == 0
        if not whole and t.b == "inline" and isinstance(n, int) and n > t.nr:
            start, column = column, b.intrinsic("smin", column, n - t.nr)
            self.late = b.sub(start, column)
        mask = None if whole or self.late else b.first_lanes(b.sub(e.scalar(n), column), t.nr)
        panels = ceildiv(n, wide)
        e.scopes.bind(PANEL, panel)
        e.bounds[PANEL] = (0, panels - 1 if isinstance(panels, int) else None)
        e.bounds[COLUMN] = (0, n - 1 if isinstance(n, int) else None)
        with e.scopes.block(COLUMN, column, Lane(COLUMN, t.nr, mask, 1 if self.late else t.nr)):
            yield

    def _split(self, x: Value, by: Value) -> tuple[Value, Value]:
        """(x // by, x % by) for x >= 0."""
        if by.name == "1":
            return x, ZERO
        whole = self.b.udiv(x, by)
        return whole, self.b.sub(x, self.b.mul(whole, by))

    # -- k -------------------------------------------------------------------------------------------------

    def _k_limit(self) -> Value:
        """The end of the first k axis, cut by the shared guard."""
        e, t = self.e, self.t
        var, extent = self.c.k[0]
        stop = e.scalar(extent)
        if t.limit is None:
            return stop
        room = e.scalar(t.limit.bound - (t.limit.at - symbol(var)))
        return self.b.intrinsic("smin", stop, self.b.intrinsic("smax", room, 0))

    def _in_chunks(self, first_row: Value, fresh: Value) -> None:
        """One panel after the other. That of the task before is still there, unless it is `fresh`."""
        b, t = self.b, self.t
        stop = self._k_limit()
        with self._chunks(stop) as (first, last):
            self.last = last
            if t.b not in ("inline", "packed"):
                with self._when(fresh if last is None else b.or_(fresh, b.compare("gt", stop, t.chunk))):
                    self._pack_b()
            with self._tiles(first_row) as tile:
                self._multiply(tile, first, last)

    @contextmanager
    def _chunks(self, stop: Value) -> Iterator[tuple[Value | None, Value | None]]:
        """A loop over the panels along k, at least one: yields whether this is the first, and the last; None
        where it is both for certain."""
        e, b, t = self.e, self.b, self.t
        if not t.chunk:
            with self._range(ZERO, stop):
                yield None, None
            return
        with e.scopes.loop("chunk ", ZERO, b.intrinsic("smax", stop, 1), t.chunk) as chunk:
            chunk.next()
            end = b.add(chunk.index, t.chunk)
            with self._range(chunk.index, b.intrinsic("smin", end, stop)):
                yield b.compare("eq", chunk.index, 0), b.compare("ge", end, stop)

    @contextmanager
    def _when(self, condition: Value | None) -> Iterator[None]:
        """Code that runs only where the condition holds; None: always."""
        if condition is None:
            yield
            return
        with self.e.scopes.loop("when ", ZERO, self.b.cast(condition, I64)) as once:
            once.next()
            yield

    def _in_blocks(self, first_row: Value) -> None:
        """Axes of k that no panel covers: the sums of all row tiles wait in scratch."""
        b, t = self.b, self.t
        with self._tiles(first_row) as tile, self._groups():
            for r in range(t.mr):
                b.store(constant(self.type.vector(t.nr), 0), self._sum(tile, r), align=self._align())
        self._blocks(list(t.outer), first_row)
        with self._tiles(first_row) as tile:
            self._store_tile(tile)

    def _blocks(self, outer: list[tuple[str, DimLike]], first_row: Value) -> None:
        e, t = self.e, self.t
        if outer:
            var, extent = outer[0]
            stop = self._k_limit() if var == self.c.k[0][0] else e.scalar(extent)
            with e.scopes.loop(var, ZERO, stop) as loop:
                loop.next()
                self._blocks(outer[1:], first_row)
            return
        _, extent = t.inner[0]
        with self._chunks(e.scalar(extent)):
            self._pack_b()
            with self._tiles(first_row) as tile, self._packed_a(tile), self._groups():
                self._save(tile, self._micro_kernel(tile, True))

    @contextmanager
    def _range(self, start: Value, stop: Value) -> Iterator[None]:
        """Binds the range of the first inner k axis."""
        e = self.e
        with e.scopes.block(FROM, start), e.scopes.block(TO, stop):
            yield

    def _k_loops(self) -> list[KLoop]:
        """(variable, start, stop) of the loops within a panel."""
        first = self.t.inner[0][0]
        return [(first, symbol(FROM), symbol(TO)), *((v, 0, x) for v, x in self.t.inner[1:])]

    @contextmanager
    def _groups(self) -> Iterator[None]:
        """A loop over the column groups, if there are any."""
        e = self.e
        if not self.t.groups:
            yield
            return
        with e.scopes.loop(self.t.groups[0][0], ZERO, constant(I64, self.t.group_count)) as group:
            group.next()
            yield

    def _pack_b(self) -> None:
        with self._groups():
            pack_b(self.e, self.right, self.t.n, self._k_loops(), self.t, self._panel_start())

    # -- tiles ---------------------------------------------------------------------------------------------

    @contextmanager
    def _tiles(self, first_row: Value, last_row: Value | None = None) -> Iterator[DimLike]:
        """A loop over the row tiles, up to that row: yields the tile's number; ROW is its first row."""
        e, b, t = self.e, self.b, self.t
        total = e.scalar(t.m_total)
        left = b.sub(total if last_row is None else b.intrinsic("smin", total, last_row), first_row)
        count = b.intrinsic(
            "smin", constant(I64, t.tiles), b.udiv(b.add(left, t.mr - 1), constant(I64, t.mr))
        )
        e.bounds["tile"] = (0, t.tiles - 1)
        with e.scopes.loop("tile", ZERO, constant(I64, 1) if t.tiles == 1 else count) as tile:
            tile.next()
            row = b.add(first_row, b.mul(tile.index, t.mr)) if t.tiles > 1 else first_row
            e.scopes.bind("tile row", row)
            if t.fixed_m:  # the last tile reaches back over rows that are done
                row = b.intrinsic("smin", row, t.fixed_m - t.mr) if t.fixed_m % t.mr else row
                e.bounds[ROW] = (0, t.fixed_m - t.mr)
            e.scopes.bind(ROW, row)
            if not t.fixed_m:
                last = b.sub(total, 1)
                for r in range(t.mr):
                    e.scopes.bind(f"row {r}", b.intrinsic("smin", b.add(row, r), last))
            yield symbol("tile") if t.tiles > 1 else 0

    def _row(self, r: int) -> DimLike:
        """The number of the tile's row r; rows past the end stand for the last."""
        return symbol(ROW) + r if self.t.fixed_m else symbol(f"row {r}")

    def _at_row(self, node: Node, row: DimLike, suffix: str) -> Node:
        return self.e.nodes.substitute(node, axis_values(self.e, self.t.m, row, suffix))

    def _sum(self, tile: DimLike, r: DimLike, group: DimLike | None = None) -> Value:
        """The address of a row of the sums, of the group at hand or of that one."""
        t = self.t
        if group is None:
            group = symbol(t.groups[0][0]) if t.groups else 0
        row = (tile * t.mr if t.blocks else 0) + r + group * t.sum_rows
        return self.e.address("sums ", row * t.nr)

    def _align(self) -> int:
        return min(64, self.t.nr * self.type.bytes)

    def _multiply(self, tile: DimLike, first: Value | None, last: Value | None) -> None:
        """The micro-kernel for each group, from sums of 0 in the first panel; the stores after the last."""
        straight = self._is_straight()
        resume = False if first is None else self.b.xor(first, True)
        with self._packed_a(tile):
            with self._groups():
                sums = self._micro_kernel(tile, resume)
                if not straight:
                    self._save(tile, sums)
                elif last is not None:
                    with self._when(self.b.xor(last, True)):
                        self._save(tile, sums)
        with self._when(last):
            self._whole_or_cut(lambda: self._store_sums(sums) if straight else self._store_tile(tile))

    def _whole_or_cut(self, store: Callable[[], None]) -> None:
        """Runs the stores of a panel, of the columns that no other has stored; where stores under masks are
        slow, without a mask if the panel is whole."""
        e, b, t, lane, late = self.e, self.b, self.t, self.e.scopes.lane, self.late
        if lane is None or late is None and (lane.mask is None or e.target.has_mask_registers):
            return store()
        column: Value = e.scopes.bound(COLUMN)
        whole: Value | None = None
        if not e.target.has_mask_registers:
            whole = b.compare("ge", b.sub(e.scalar(t.n_total), column), b.add(late or ZERO, t.nr))
            with self._when(whole), e.scopes.block(COLUMN, column, replace(lane, mask=None)):
                store()
        cut = lane if late is None else replace(lane, mask=b.not_(b.first_lanes(late, t.nr)))
        with self._when(whole and b.xor(whole, True)), e.scopes.block(COLUMN, column, cut):
            store()

    def _is_straight(self) -> bool:
        """Whether the stores of a tile are straight code."""
        return is_straight(self.t, self.c, self.e.target)

    @contextmanager
    def _packed_a(self, tile: DimLike) -> Iterator[None]:
        if self.t.pack_a:
            pack_a(self.e, lambda row: self._at_row(self.a, row, ""), tile, self._k_loops(), self.t)
        yield

    def _save(self, tile: DimLike, sums: Sequence[Value]) -> None:
        for r, total in enumerate(sums):
            self.b.store(total, self._sum(tile, r), align=self._align())

    def _micro_kernel(self, tile: DimLike, resume: Value | bool) -> list[Value]:
        """The tile's sums with the panel's products. They start from those in scratch where `resume` holds,
        else from 0."""
        e, b, t = self.e, self.b, self.t
        wide = self.type.vector(t.nr)
        sums = [constant(wide, 0)] * t.mr
        if resume is not False:
            places = [self._sum(tile, r) for r in range(t.mr)]
            if resume is not True:                  # zeros are loaded as well: LLVM copes badly with branches
                places = [b.select(resume, place, e.safe()) for place in places]
            sums = [b.load(wide, place, align=self._align()) for place in places]
        if t.pack_a:
            rows = [self._packed_row(tile, r) for r in range(t.mr)]
        else:
            rows = [self._at_row(self.a, self._row(r), f".{r}") for r in range(t.mr)]
        loops, flat = self._merged(rows)
        if t.pack_a:
            rows = [e.nodes.substitute(x, {"k flat": flat}) for x in rows]
        self._prepare_asking()
        return self._accumulate(loops, flat, rows, sums)

    def _prepare_asking(self) -> None:
        """Before the loop over k: each tile that uses a panel asks for its share of the next one."""
        e, b, t = self.e, self.b, self.t
        if not self.ask_every:
            return
        stored = {s.arg for s in self.c.stores}
        self.results = [(arg, index) for arg, index in self._results() if arg not in stored]
        (at, end), column = map(e.scopes.bound, (FROM, TO)), e.scopes.bound(COLUMN)
        start, beside = ZERO, b.add(column, t.nr)
        if self.last is not None:                         # each task packs for its tiles alone
            tile, tiles = e.scopes.bound("tile") if t.tiles > 1 else ZERO, constant(I64, t.tiles)
            start, beside = b.select(self.last, start, end), b.select(self.last, beside, column)
        else:
            tile = b.udiv(e.scopes.bound("tile row"), constant(I64, t.mr))
            tiles = b.udiv(b.add(e.scalar(t.m_total), t.mr - 1), constant(I64, t.mr))
        share = b.udiv(b.add(tiles, (self._lines << FRACTION) - 1), tiles)
        found = {"asked from": start, "asked column": beside, "asked for each k": share,
                 "asked by others": b.mul(b.mul(tile, b.sub(end, at)), share)}
        for name, value in found.items():
            e.scopes.bind(name, value)
            e.bounds[name] = (0, None)

    @property
    def _lines(self) -> int:
        """Cache lines of a panel of b for each k."""
        return max(self.t.nr * self.dtype.bytes // 64, 1)

    def _ask(self, step: Value) -> None:
        """Within the loop over k, every STEP of them: asks for memory that will be needed soon. Here for the
        next panel of b, and for what the stores of the tile read. A line is asked for by its last element:
        that of the first came with the elements before."""
        e, b, t = self.e, self.b, self.t
        so_far = b.add(e.scopes.bound("asked by others"), b.mul(step, e.scopes.bound("asked for each k")))
        e.scopes.bind("asked", b.lshr(so_far, FRACTION))
        e.bounds["asked"] = (0, None)
        each, across = 64 // self.dtype.bytes, t.nr if t.b == "transpose" else self._lines
        rows = t.tiles * t.mr if t.chunk else max(1, t.fixed_m or trips(t.m_total) // 2)
        for i in range(-(-STEP * self._lines * t.mr // rows)):
            line = symbol("asked") + i
            k, column = line // across, line % across
            if t.b == "transpose":
                k = k * each + each - 1
            else:
                column = column * each + each - 1
            at = {self.c.k[0][0]: symbol("asked from") + k, t.n[0][0]: symbol("asked column") + column}
            node = e.nodes.substitute(self.right, at)
            e.prefetch(node.data[0], e.offset(node.data[0], node.data[1]))
        self._ask_results(step, symbol(COLUMN))

    def _ask_results(self, step: Value, column: DimLike) -> None:
        """Row by row, for what belongs to the tile from that column on; then for the last row again and
        again."""
        e, b, t = self.e, self.b, self.t
        extent = self.c.k[0][1]
        rows = -(-t.mr * STEP // max(trips(extent), 1))
        at_once = b.mul(b.lshr(step, STEP.bit_length() - 1), rows)
        e.bounds["asked row"] = (0, t.mr - 1)
        for i in range(rows if self.results else 0):
            e.scopes.bind("asked row", b.intrinsic("smin", b.add(at_once, i), t.mr - 1))
            row = symbol(ROW) + symbol("asked row")
            for arg, index in self.results:
                values = {**axis_values(e, t.m, row, ""), **axis_values(e, t.n, column, "")}
                at = e.offset(arg, tuple(substitute(d, values) for d in index))
                each = 64 // e.arguments[arg].dtype.bytes
                for part in range(0, t.nr, each):
                    e.prefetch(arg, at + part + min(each, t.nr) - 1)

    def _results(self) -> list[tuple[str, tuple[DimLike, ...]]]:
        """The elements, of different arguments, that the stores of a row read or write along n."""
        found = {s.arg: s.index for s in self.c.stores}
        for value in (*(s.value for s in self.c.stores), *(let.value for let in self.c.lets)):
            found.update({x.arg: x.index for x in walk.subexpressions(value) if isinstance(x, Load)})
        m, n = {v for v, _ in self.c.m}, self.c.n[-1][0]
        return [(arg, index) for arg, index in found.items()
                if m & symbols_of(*index) and coefficient(self.e.offset(arg, index), n) == 1]

    def _packed_row(self, tile: DimLike, r: int) -> Node:
        """Row r of the tile as it is packed, at "k flat" of the panel."""
        at = (tile * self.t.mr + r, symbol("k flat"))
        return self.e.nodes.make("load", ("packed ", at, 0), (), self.dtype, at)

    def _panel_start(self) -> DimLike:
        """The first row of the panel at hand: that of the column group, if there are any."""
        t = self.t
        return symbol(t.groups[0][0]) * t.panel_rows if t.groups else 0

    def _merged(self, rows: list[Node]) -> tuple[list[KLoop], DimLike]:
        """The k loops of the micro-kernel, joined where a walks on evenly; and the panel's row as an
        expression. Rewrites `rows` in place for the joined variables."""
        e, loops = self.e, self._k_loops()
        if self.t.pack_a and self.t.b != "inline":       # an inlined b needs each k variable by itself
            inner = product(stop for _, _, stop in loops[1:])
            joined, start = symbol("k join"), symbol(FROM) * inner
            e.bounds["k join"] = (0, None)
            return [("k join", start, symbol(TO) * inner)], joined - start
        at = 0 if self.t.b == "inline" else len(loops) - 1
        while at > 0:
            (outer, start, stop), (inner_var, _, extent) = loops[at - 1], loops[at]
            assert isinstance(extent, int)
            name = f"{outer}+{inner_var}"
            joined = symbol(name)
            e.bounds[name] = (0, None)
            apart = {outer: joined // extent, inner_var: joined % extent}
            new = [e.nodes.substitute(r, apart) for r in rows]
            if all(_linear(e, r, name) for r in new):
                rows[:] = new
                loops[at - 1 : at + 1] = [(name, start * extent, stop * extent)]
            at -= 1
        return loops, panel_row(loops)

    def _accumulate(
        self, loops: Sequence[KLoop], flat: DimLike, rows: list[Node], sums: list[Value]
    ) -> list[Value]:
        e, b, t = self.e, self.b, self.t
        if loops:
            (var, start, stop), every = loops[0], self.ask_every if len(loops) == 1 else 0
            first, last = e.scalar(start), e.scalar(stop)
            e.bounds.setdefault(var, (0, None))
            if every <= 1:
                with e.scopes.loop(var, first, last, 1, sums, often=True) as loop:
                    if every:
                        self._ask(b.sub(loop.index, first))
                    loop.next(*self._accumulate(loops[1:], flat, rows, loop.carry))
                return loop.results
            with e.scopes.loop("asking", first, last, every, sums, often=True) as outer:
                self._ask(b.sub(outer.index, first))
                end = b.intrinsic("smin", b.add(outer.index, every), last)
                with e.scopes.loop(var, outer.index, end, 1, outer.carry, often=True) as loop:
                    loop.next(*self._accumulate((), flat, rows, loop.carry))
                outer.next(*loop.results)
            return outer.results
        if t.b == "inline":
            row = b.splat(e.value(self._inline_b()), t.nr)
        else:
            row = b.load(self.type.vector(t.nr), self._panel_row(flat), align=self._align())
        out = []
        for node, total in zip(rows, sums):
            left = b.splat(e.value(node), t.nr)
            if self.dtype.is_float and e.target.has_fma:
                out.append(b.fma(left, row, total))
            else:
                out.append(b.add(b.mul(left, row), total))
        return out

    def _panel_row(self, flat: DimLike) -> Value:
        """The address of a row of the panel at hand."""
        t = self.t
        if t.b != "packed":
            return self.e.address("panel ", (flat + self._panel_start()) * t.nr)
        offset = load_offset(self.kernel, self.c.b)
        columns = flat_index(t.n, symbol(PANEL) * t.nr)
        assert offset is not None and columns is not None and isinstance(self.c.b, Load)
        first = substitute(offset, {**columns, **{var: 0 for var, _ in t.inner}})
        return self.e.address(self.c.b.arg, simplify(first, self.e.bounds) + flat * t.nr)

    def _inline_b(self) -> Node:
        return self.e.nodes.substitute(self.right, axis_values(self.e, self.t.n, symbol(COLUMN), ""))

    # -- results -------------------------------------------------------------------------------------------

    def _store_tile(self, tile: DimLike) -> None:
        """Runs the stores for each row of a tile."""
        e, b, t = self.e, self.b, self.t
        row, begin = e.scopes.bound(ROW), e.scopes.bound("tile row")
        done = b.sub(begin, row)  # rows that the tile before has stored
        left = b.sub(e.scalar(t.m_total), row)
        count = b.intrinsic("smin", left, t.mr) if not t.fixed_m else constant(I64, t.mr)
        if t.fixed_m and t.fixed_m % t.mr == 0:
            done = ZERO
        e.bounds["r"] = (0, t.mr - 1)
        with e.scopes.loop("r", done, count) as loop:
            loop.next()
            totals = [b.load(self.type.vector(t.nr), self._sum(tile, symbol("r"), group), align=self._align())
                      for group in range(t.group_count)]
            self._store_row(b.add(row, loop.index), totals)

    def _store_sums(self, sums: Sequence[Value]) -> None:
        """Runs the stores for each row of a tile, whose sums are in registers."""
        e, b, t = self.e, self.b, self.t
        row, begin = e.scopes.bound(ROW), e.scopes.bound("tile row")
        done, count = b.sub(begin, row), b.sub(e.scalar(t.m_total), row)
        e.bounds["in row"] = (0, 0)
        for r, total in enumerate(sums):
            wanted: Value | None = b.compare("gt", count, r)
            if t.fixed_m:
                wanted = None if t.fixed_m % t.mr == 0 else b.compare("le", done, r)
            with self._when(wanted), e.scopes.block("in row", ZERO):
                self._store_at(symbol(ROW) + symbol("in row") + r, [total])    # what is loaded stays inside

    def _store_row(self, flat: Value, totals: Sequence[Value]) -> None:
        """Runs the stores for one row, given its sums."""
        e, t = self.e, self.t
        e.scopes.bind("m flat", flat)
        e.bounds["m flat"] = (0, t.m_total - 1 if isinstance(t.m_total, int) else None)
        self._store_at(symbol("m flat"), totals)

    def _store_at(self, row: DimLike, totals: Sequence[Value]) -> None:
        e = self.e
        for name, total in zip(self.c.accumulators, totals):
            e.scopes.bind(f"{name} ", total)
            e.nodes.bind(name, e.nodes.given(f"{name} ", self.dtype))
        values = {**axis_values(e, self.t.m, row, ""), **axis_values(e, self.t.n, symbol(COLUMN), "")}
        for let in self.c.lets:
            (node,) = e.nodes.lets((let,))
            e.value(e.nodes.substitute(node, values))
        for store in self.c.stores:
            self._store(store, values)

    def _store(self, store: Store, values: dict[str, DimLike]) -> None:
        e = self.e
        value = e.value(e.nodes.substitute(e.nodes.of(store.value), values))
        index = tuple(substitute(d, values) for d in store.index)
        e.store_value(store.arg, index, value)


def _linear(e: Emitter, node: Node, name: str) -> bool:
    """Whether the load's element number is linear in the name."""
    return node.kind == "load" and coefficient(e.offset(node.data[0], node.data[1]), name) is not None
