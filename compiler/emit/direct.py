"""Convolutions of images by their definition, for few output channels: no panel is packed, for it would be
used by too few rows; a task unfolds an image, or a band of it, along x instead (see `direct_image`).

A micro-kernel keeps sums of `mr` output channels x `nv` vectors of neighbouring places in registers. For each
channel and place of the kernel it loads the vectors from scratch and multiplies them by the weights, which it
reads where they lie. The order of the sum is that of the axes. Serves the gradient for the input of a
convolution without stride as well.

Where the output channels lie next to each other in memory, vectors run along them: a tile is `mr` places x
`nv` vectors of channels, and a function of its own, which runs before, lays the weights side by side.

A convolution by 1 x 1 of images in rows to such channels is one as well. It reads images where they lie: for
each channel a cache line of places, of which the next one is asked for meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graphflow.compiler.emit.algorithm import FLOAT, ZERO
from graphflow.compiler.emit.builder import I64, Module, Value, constant
from graphflow.compiler.emit.cost import TASK_NS, expression_ns
from graphflow.compiler.emit.direct_image import (
    ALGORITHM,
    DirectEmitter,
    Unfolded,
    steps_of,
    unfold_image,
    unfolded,
)
from graphflow.compiler.emit.operands import algorithm_asked, coefficient, is_direct, load_offset, names_of
from graphflow.compiler.emit.packing import axis_values
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.tiling import whole_lines
from graphflow.compiler.kernel.form import ContractionKernel, Guarded
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, product, symbol
from graphflow.compiler.target import Target

ROW, COLUMN = "output row", "output column"
"""The names of a row of the output, and of the first place of a tile in it."""
_UNROLL = 5
"""Places along x of a kernel, up to which they become straight code."""
_LIGHT_NS = 0.35
"""Stores that take less time than this are done from registers, by straight code."""
_UNFOLD = 3.0
"""Cycles to unfold a vector."""
_GOOD_ROW, _LONGEST_ROW = 112, 256
"""Places of a row, where any number would do."""
_LINE = 16
"""Elements of a cache line."""
_FLAT_TILE = 8, 2
"""The largest tile by 1 x 1, places x vectors of output channels: what it reads of all channels stays in the
first cache."""
_PANEL = 10.0
"""What packing panels costs a contraction, in products with each of its elements; its vectors run on from one
image to the next, so none is rather empty."""
_VARIANT = 0.02
"""What one more form of the micro-kernel costs, as a share of the time."""


@dataclass(frozen=True)
class Direct:
    """How a contraction is computed so. `batch`: its batch axes; `image`: the unfolded image; `out`, `outs`:
    the variable and extent of the output channels; `last`: they lie next to each other. mr, nv: the
    micro-kernel, output channels x vectors of places, or places x vectors of output channels. `flat`: the
    variable of all places, where the contraction has no other, and the image is read where it lies; else ""
    (and y and x of `image` are its variables)."""

    batch: tuple[tuple[str, DimLike], ...]
    image: Unfolded
    out: str
    outs: int
    last: bool
    mr: int
    nv: int
    flat: str = ""

    @property
    def bands(self) -> int:
        """Tasks of an image."""
        return -(-self.image.height // self.image.band)

    def parts(self) -> dict[str, int]:
        """The pieces of a worker's scratch, in elements: the unfolded image, and the sums of a tile."""
        lanes = self.image.lanes
        sizes = {"sums ": self.mr * self.nv * lanes}
        if not self.flat:
            sizes |= self.image.parts()
            sizes["unfolded "] += self.nv * lanes                   # what the last vectors read beyond it
        return {name: whole_lines(4 * size) // 4 for name, size in sizes.items()}

    def weights(self) -> dict[str, int]:
        """The weights with the output channels side by side, [channel][place y][place x][out], in elements of
        scratch."""
        (py, px), channels = self.image.places, self.image.channels
        return {"weights ": whole_lines(4 * channels * py * px * self.outs) // 4} if self.last else {}


def direct(kernel: ContractionKernel, target: Target) -> Direct | None:
    """How the kernel is computed so; None where it is no such convolution, or a contraction is faster."""
    asked = algorithm_asked(kernel)
    found = applies(kernel, target) if asked in (None, ALGORITHM) else None
    return found if found is not None and (asked == ALGORITHM or pays(kernel, found)) else None


def applies(kernel: ContractionKernel, target: Target) -> Direct | None:
    """How the kernel is computed so, if it can be."""
    c = kernel.contraction
    axes = len(c.m), len(c.n), len(c.k)
    if axes == (1, 1, 1):
        return _pointwise(kernel, target)
    if kernel.indirect or axes not in ((1, 2, 3), (1, 2, 2)) or c.a.dtype != dtypes.F32:
        return None
    (channel, channels), (ty, py), (tx, px) = (("channel", 1), *c.k)[-3:]
    ((out, outs),), ((y, height), (x, width)) = c.m, c.n
    if not all(isinstance(d, int) and d > 0 for d in (outs, height, width, channels, py, px)):
        return None
    if not is_direct(kernel, c.a, (*c.m, *c.k)) or names_of(c.a) & {y, x} or out in names_of(c.b):
        return None
    steps = steps_of(c.b, (y, x), (ty, tx))
    if steps is None or py * px == 1:
        return None
    assert isinstance(outs, int) and isinstance(height, int) and isinstance(width, int)
    assert isinstance(channels, int) and isinstance(py, int) and isinstance(px, int)
    lanes = target.vector_bytes // 4
    enough = _enough_rows(outs * channels * py * px * width / lanes)
    last = outs % lanes == 0 and all(coefficient(s.index[-1], out) == 1 for s in c.stores)
    image = unfolded((y, height), (x, width), (channel, channels), ((ty, py), (tx, px)), steps, lanes,
                     target.l2 // 2, enough, last)
    if image is None:
        return None
    mr, nv = (_micro_kernel_of_outs(outs // lanes, width, target) if last else
              _micro_kernel(outs, -(-image.band * width // lanes), target))
    return Direct(c.batch, image, out, outs, last, mr, nv)


def _pointwise(kernel: ContractionKernel, target: Target) -> Direct | None:
    """How a convolution by 1 x 1 of images in rows to channels that lie next to each other is computed."""
    c = kernel.contraction
    ((out, outs),), ((place, places),), ((channel, channels),) = c.m, c.n, c.k
    offset, lanes = load_offset(kernel, c.b), target.vector_bytes // 4
    if kernel.indirect or c.a.dtype != dtypes.F32 or offset is None or not isinstance(places, int):
        return None
    if not isinstance(outs, int) or not isinstance(channels, int) or min(outs, places, channels) <= 0:
        return None
    if not is_direct(kernel, c.a, (*c.m, *c.k)) or place in names_of(c.a) or out in names_of(c.b):
        return None
    if coefficient(offset, place) != 1 or coefficient(offset, channel) in (None, 0, 1) or outs % lanes:
        return None
    width = min((w for w in range(lanes, _LONGEST_ROW + 1) if places % w == 0),
                key=lambda w: abs(w - _GOOD_ROW), default=0)
    if not width or any(coefficient(s.index[-1], out) != 1 for s in c.stores):
        return None
    rows = places // width
    band = min(rows, _enough_rows(outs * channels * width / lanes))
    image = Unfolded("row ", "column of row ", channel, ("tap y ", "tap x "), rows, width,
                     -(-rows // -(-rows // band)), channels, (1, 1), (1, 1), lanes, True)
    mr, nv = _micro_kernel_of_outs(outs // lanes, width, target, _FLAT_TILE)
    return Direct(c.batch, image, out, outs, True, mr, nv, place)


def _enough_rows(row_cycles: float) -> int:
    """Rows of the output for a task of a good size."""
    return max(1, round(4 * TASK_NS * 3 / row_cycles))


def _micro_kernel(outs: int, vectors: int, target: Target) -> tuple[int, int]:
    """(output channels, vectors) of the micro-kernel: what a tile takes is the products, or what it reads;
    the rest along both is computed by smaller forms."""

    def cycles(mr: int, nv: int) -> float:
        return max(mr * nv, mr + 1.5 * nv, 5)

    def total(mr: int, nv: int) -> float:
        tiles = [(n, r) for n, r in ((outs // mr, mr), (1, outs % mr)) if n and r]
        panels = [(n, v) for n, v in ((vectors // nv, nv), (1, vectors % nv)) if n and v]
        time = sum(n * p * cycles(r, v) for n, r in tiles for p, v in panels)
        return time * (1 + _VARIANT * len(tiles) * len(panels))

    choices = [(mr, nv) for nv in range(1, 9) for mr in range(1, 15)
               if mr * nv + nv + 1 <= target.vector_registers and mr <= outs and nv <= vectors]
    return min(choices, key=lambda c: total(*c))


def _micro_kernel_of_outs(vectors: int, width: int, target: Target, most: tuple[int, int] = (14, 4)
                          ) -> tuple[int, int]:
    """(places of a row, vectors of output channels), at most so many; places that are left over of a row are
    a smaller form."""

    def total(mr: int, nv: int) -> float:
        tiles = [(n, r) for n, r in ((width // mr, mr), (1, width % mr)) if n and r]
        time = sum(n * max(r * nv, nv + r / 2, 5) for n, r in tiles) * (vectors // nv)
        return time * (1 + _VARIANT * len(tiles))

    choices = [(mr, nv) for nv in range(most[1], 0, -1) for mr in range(min(width, most[0]), 0, -1)
               if vectors % nv == 0 and mr * nv + nv + 1 <= target.vector_registers]
    return min(choices, key=lambda c: total(*c))


def pays(kernel: ContractionKernel, d: Direct) -> bool:
    """Whether loads and stores walk along x, else elements would be gathered and scattered one by one, and
    the products are many for each element that is unfolded."""
    c, u = kernel.contraction, d.image
    if d.flat:
        return True
    offset = load_offset(kernel, c.b.value if isinstance(c.b, Guarded) else c.b)
    if offset is None or coefficient(offset, u.x) not in (1, 2, 3, 4):
        return False
    if not d.last and not all(coefficient(s.index[-1], u.x) == 1 for s in c.stores):
        return False
    products = d.outs * u.places[0] * u.band * u.width / u.lanes
    if u.plain:
        return u.rows() * -(-u.row // u.lanes) * _UNFOLD < products * u.places[1]
    unfolding = u.phases * u.rows() * -(-u.width // u.lanes) * _UNFOLD * abs(u.steps[1])
    places = u.band * u.width
    room = -(-places // u.lanes) * u.lanes
    return unfolding < products and room < (1 + _PANEL / d.outs) * places


def direct_tasks(d: Direct) -> DimLike:
    """The number of tasks: images, and bands of each, the last changing fastest."""
    return product(extent for _, extent in d.batch) * d.bands


def direct_scratch(d: Direct) -> int:
    """Bytes of scratch that each worker needs."""
    return 4 * sum(d.parts().values())


def direct_shared(d: Direct) -> int:
    """Bytes of scratch that all workers share."""
    return 4 * sum(d.weights().values())


def emit_direct(module: Module, kernel: ContractionKernel, target: Target, d: Direct) -> None:
    """Adds the kernel's function to the module."""
    if not d.last:
        _AlongPlaces(module, kernel, target, d).emit()
        return
    prepare = replace(kernel, name=f"{kernel.name}.prepare")
    module.before[kernel.name] = prepare.name, d.image.channels
    _Weights(module, prepare, target, d).emit()
    _AlongOuts(module, kernel, target, d).emit()


class _Weights(DirectEmitter):
    """Lays the weights of a channel, a task, side by side."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, d: Direct):
        super().__init__(module, kernel, target, d.image.lanes)
        self.d = d

    def emit(self) -> None:
        """The whole function."""
        e, b, d, u = self.e, self.b, self.d, self.d.image
        (ty, tx), (py, px) = u.taps, u.places
        _, begin, end, _ = b.params
        self.scratch({}, d.weights())
        node = e.nodes.of(self.c.a)

        def put(carry: list[Value]) -> list[Value]:
            at = ((symbol(u.channel) * py + symbol(ty)) * px + symbol(tx)) * d.outs + symbol(d.out)
            b.store(b.splat(e.value(node), u.lanes), e.address("weights ", at), align=4 * u.lanes)
            return []

        with e.scopes.loop(u.channel, begin, end) as channel:
            channel.next()
            with e.scopes.loop(ty, ZERO, constant(I64, py)) as down:
                down.next()
                with e.scopes.loop(tx, ZERO, constant(I64, px)) as across:
                    across.next()
                    e.scopes.lanes(d.out, ZERO, constant(I64, d.outs), u.lanes, put)
        b.ret()


class _Emission(DirectEmitter):
    """What does not depend on where vectors run: tasks, bands, and the loops of a sum."""

    def __init__(self, module: Module, kernel: ContractionKernel, target: Target, d: Direct):
        super().__init__(module, kernel, target, d.image.lanes)
        self.d = d
        self.e.bounds.update({"column": (0, d.image.height * d.image.width - 1), "m start": (0, d.outs - 1),
                              "r": (0, d.mr - 1)})
        ns = sum(expression_ns(s.value, True) for s in self.c.stores)
        self.light = ns + sum(expression_ns(let.value, True) for let in self.c.lets) < _LIGHT_NS
        u = d.image
        self.whole = u.height % u.band == 0 and u.band * u.width % u.lanes == 0     # no vector is cut

    def emit(self) -> None:
        """The whole function."""
        e, b, d, u = self.e, self.b, self.d, self.d.image
        _, begin, end, _ = b.params
        self.scratch(d.parts(), d.weights())
        node = e.nodes.of(self.c.b)
        with e.scopes.loop("task ", begin, end) as task:
            task.next()
            flat = task.index
            first: Value = ZERO
            if d.bands > 1:
                flat = b.udiv(task.index, constant(I64, d.bands))
                first = b.mul(b.sub(task.index, b.mul(flat, d.bands)), u.band)
            self.bind_batch(d.batch, flat)
            if not d.flat:
                unfold_image(e, node, u, first, ZERO, constant(I64, u.channels))
            stop = constant(I64, u.height)
            if d.bands > 1:
                stop = b.intrinsic("smin", b.add(first, u.band), stop)
            self._rows(first, stop)
        b.ret()

    def _rows(self, first: Value, stop: Value) -> None:
        """All outputs of the rows [first, stop) of the image."""
        raise NotImplementedError

    def _summed(self, sums: list[Value], products: Callable[[list[Value], DimLike], list[Value]]
                ) -> list[Value]:
        """The sums with all products added; `products` adds those of one channel and place of the kernel, of
        which it is given the place along x."""
        e, u = self.e, self.d.image
        (ty, tx), (py, px) = u.taps, u.places
        with e.scopes.loop(u.channel, ZERO, constant(I64, u.channels), 1, sums) as channel:
            with e.scopes.loop(ty, ZERO, constant(I64, py), 1, channel.carry) as down:
                if px <= _UNROLL:
                    sums = down.carry
                    for tap in range(px):
                        sums = products(sums, tap)
                    down.next(*sums)
                else:
                    with e.scopes.loop(tx, ZERO, constant(I64, px), 1, down.carry) as across:
                        across.next(*products(across.carry, symbol(tx)))
                    down.next(*across.results)
            channel.next(*down.results)
        return channel.results

    def _image(self, tap: DimLike) -> DimLike:
        """The element of scratch under the first place, for the current channel and place along y."""
        u = self.d.image
        return u.copy(symbol(u.channel), tap) + u.below(symbol(u.taps[0]))


class _AlongPlaces(_Emission):
    def _rows(self, first: Value, stop: Value) -> None:
        e, b, d = self.e, self.b, self.d
        start, stop = b.mul(first, d.image.width), b.mul(stop, d.image.width)
        e.scopes.bind("band start", start)
        wide = d.nv * d.image.lanes
        vectors = -(-d.image.band * d.image.width // d.image.lanes)
        whole = vectors // d.nv * wide
        # A shorter last band is computed by the larger form alone.
        with e.scopes.loop("column", start, b.intrinsic("smin", b.add(start, whole), stop), wide) as panel:
            panel.next()
            self._outs(panel.index, stop, d.nv)
        if vectors % d.nv:
            with e.scopes.loop("column", b.add(start, whole), stop, wide) as panel:
                panel.next()
                self._outs(panel.index, stop, vectors % d.nv)

    def _outs(self, column: Value, stop: Value, nv: int) -> None:
        """All output channels of a panel."""
        e, d = self.e, self.d
        whole = d.outs // d.mr * d.mr
        with e.scopes.loop("m start", ZERO, constant(I64, whole), d.mr) as tile:
            tile.next()
            self._tile(column, stop, d.mr, nv)
        if d.outs > whole:
            with e.scopes.block("m start", constant(I64, whole)):
                self._tile(column, stop, d.outs - whole, nv)

    # -- a tile --------------------------------------------------------------------------------------------

    def _tile(self, column: Value, stop: Value, mr: int, nv: int) -> None:
        e, b, u = self.e, self.b, self.d.image
        rows = [e.nodes.substitute(e.nodes.of(self.c.a), {self.d.out: symbol("m start") + r})
                for r in range(mr)]

        def products(sums: list[Value], tap: DimLike) -> list[Value]:
            at = self._image(tap) + symbol("column") - symbol("band start")
            right = [b.load(self.type, e.address("unfolded ", at + v * u.lanes), align=4) for v in range(nv)]
            out = []
            for r, node in enumerate(rows):
                left = b.splat(e.value(e.nodes.substitute(node, {u.taps[1]: tap})), u.lanes)
                out += [self.multiply(left, x, total) for x, total in zip(right, sums[r * nv : r * nv + nv])]
            return out

        self._store_tile(self._summed([constant(self.type, 0)] * (mr * nv), products), column, stop, mr, nv)

    def _store(self, total: Value, row: DimLike, place: DimLike) -> None:
        """The kernel's stores for a vector of finished sums."""
        self.store(total, {self.d.out: row, **axis_values(self.e, self.c.n, place, "")})

    def _store_tile(self, sums: list[Value], column: Value, stop: Value, mr: int, nv: int) -> None:
        e, b, lanes = self.e, self.b, self.d.image.lanes
        if self.light:
            for v in range(nv):
                at = b.add(column, v * lanes)
                mask = None if self.whole else b.first_lanes(b.sub(stop, at), lanes)
                name = f"column {v}"
                e.bounds[name] = e.bounds["column"]
                with e.scopes.block(name, at, Lane(name, lanes, mask, 1)):
                    for r in range(mr):
                        self._store(sums[r * nv + v], symbol("m start") + r, symbol(name))
            return
        for i, total in enumerate(sums):
            b.store(total, e.address("sums ", i * lanes), align=64)
        end = b.intrinsic("smin", b.add(column, nv * lanes), stop)
        with e.scopes.loop("r", ZERO, constant(I64, mr)) as row:
            row.next()

            def body(carry: list[Value]) -> list[Value]:
                at = e.address("sums ", symbol("r") * (nv * lanes) + symbol("place") - symbol("column"))
                total = b.load(self.type, at, align=4)
                self._store(total, symbol("m start") + symbol("r"), symbol("place"))
                return []

            e.bounds["place"] = e.bounds["column"]
            e.scopes.lanes("place", column, end, lanes, body, masked_only=True, align=1)


class _AlongOuts(_Emission):
    def _rows(self, first: Value, stop: Value) -> None:
        e, d, width = self.e, self.d, self.d.image.width
        whole = width // d.mr * d.mr
        e.bounds.update({ROW: (0, d.image.height - 1), COLUMN: (0, width - 1)})
        with e.scopes.loop(ROW, first, stop) as row:
            row.next()
            with e.scopes.loop(COLUMN, ZERO, constant(I64, whole), d.mr) as places:
                places.next()
                self._outs(d.mr)
            if width > whole:
                with e.scopes.block(COLUMN, constant(I64, whole)):
                    self._outs(width - whole)

    def _outs(self, mr: int) -> None:
        """All output channels of some places."""
        e, d = self.e, self.d
        with e.scopes.loop("m start", ZERO, constant(I64, d.outs), d.nv * d.image.lanes) as outs:
            outs.next()
            self._tile(outs.index, mr)

    def _at(self, column: DimLike) -> dict[str, DimLike]:
        """The variables of a place of the row."""
        d, u = self.d, self.d.image
        return {d.flat: symbol(ROW) * u.width + column} if d.flat else {u.y: symbol(ROW), u.x: column}

    def _tile(self, first: Value, mr: int) -> None:
        e, b, d, u = self.e, self.b, self.d, self.d.image
        nv, (py, px) = d.nv, u.places

        def element(column: DimLike, tap: DimLike) -> Value:
            if d.flat:
                return e.value(e.nodes.substitute(e.nodes.of(self.c.b), self._at(column)))
            place = self._image(tap) + u.under(symbol(ROW) - symbol("copy start"), column)
            return b.load(FLOAT, e.address("unfolded ", place))

        def products(sums: list[Value], tap: DimLike) -> list[Value]:
            weight = ((symbol(u.channel) * py + symbol(u.taps[0])) * px + tap) * d.outs + symbol("m start")
            right = [b.load(self.type, e.address("weights ", weight + v * u.lanes), align=4 * u.lanes)
                     for v in range(nv)]
            out = []
            if d.flat:
                ahead = e.nodes.substitute(e.nodes.of(self.c.b), self._at(symbol(COLUMN) + _LINE))
                e.prefetch(ahead.data[0], e.offset(ahead.data[0], ahead.data[1]))
            for r in range(mr):
                left = b.splat(element(symbol(COLUMN) + r, tap), u.lanes)
                out += [self.multiply(left, x, total) for x, total in zip(right, sums[r * nv : r * nv + nv])]
            return out

        sums = self._summed([constant(self.type, 0)] * (mr * nv), products)
        if self.light:
            for v in range(nv):
                at, name = b.add(first, v * u.lanes), f"out {v}"
                e.bounds[name] = (0, d.outs - 1)
                with e.scopes.block(name, at, Lane(name, u.lanes, None, u.lanes)):
                    for r in range(mr):
                        self.store(sums[r * nv + v], {d.out: symbol(name), **self._at(symbol(COLUMN) + r)})
            return
        for i, total in enumerate(sums):
            b.store(total, e.address("sums ", i * u.lanes), align=4 * u.lanes)
        with e.scopes.loop("r", ZERO, constant(I64, mr)) as row:
            row.next()

            def body(carry: list[Value]) -> list[Value]:
                at = symbol("r") * (nv * u.lanes) + symbol(d.out) - symbol("m start")
                total = b.load(self.type, e.address("sums ", at), align=4 * u.lanes)
                self.store(total, {d.out: symbol(d.out), **self._at(symbol(COLUMN) + symbol("r"))})
                return []

            e.scopes.lanes(d.out, first, b.add(first, nv * u.lanes), u.lanes, body)
