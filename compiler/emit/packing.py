"""Panels of a contraction's operands in scratch, made from their expressions.

b becomes [k][nr]: either with vectors along n, where runs of the last n axis are loaded each under a mask
and merged, or with vectors along the last k axis, one for each column, which a network of shuffles
transposes. a, where it is more than a load, becomes [row][k] with vectors along the last k axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphflow.compiler.emit.builder import I32, I64, MEMORY_TYPES, Value, constant
from graphflow.compiler.emit.expr import Emitter
from graphflow.compiler.emit.nodes import Node
from graphflow.compiler.emit.operands import Axes, flat_index, pieces
from graphflow.compiler.emit.scopes import Lane
from graphflow.compiler.emit.tiling import MAX_PIECES, Tiling
from graphflow.compiler.plan import dtypes
from graphflow.compiler.plan.dims import DimLike, product, substitute, symbol

KLoop = tuple[str, DimLike, DimLike]
"""(variable, start, stop) of a loop over k within a panel."""
FROM, TO = "k from", "k to"
"""The names of the range of the first inner k axis that the current panel covers."""
COLUMN, ROW = "column", "row"
"""The names of the panel's first column and of a tile's first row."""
_UNROLL = 5


def axis_values(e: Emitter, axes: Axes, flat: DimLike, suffix: str) -> dict[str, DimLike]:
    """Each axis' variable in terms of the flattened index. Where an inner extent is a symbol, they are
    computed at run time and used like indirect integers."""
    values = flat_index(axes, flat)
    if values is not None:
        return values
    values = {}
    rest = e.nodes.make("index", flat, (), dtypes.I64, (flat,))
    for i in range(len(axes) - 1, -1, -1):
        var, extent = axes[i]
        size = e.nodes.make("index", extent, (), dtypes.I64, (extent,))
        at = rest if i == 0 else e.nodes.make("apply", "mod", (rest, size), dtypes.I64)
        rest = e.nodes.make("apply", "floordiv", (rest, size), dtypes.I64)
        name = f"{var} at {flat}{suffix}"
        e.nodes.indirect[name] = at
        values[var] = symbol(name)
    return values


def panel_row(loops: Sequence[KLoop]) -> DimLike:
    """The row of the panel that the k variables stand for."""
    row: DimLike = 0
    size: DimLike = 1
    for i in range(len(loops) - 1, -1, -1):
        var, start, stop = loops[i]
        row = row + (symbol(var) - start) * size
        size = size * stop if i else size
    return row


def pack_b(e: Emitter, node: Node, n: Axes, loops: Sequence[KLoop], t: Tiling, first: DimLike) -> None:
    """Fills the panel, which starts at that row of "panel ", for the columns from COLUMN on."""
    if t.b == "transpose":
        _pack_transposed(e, node, n, loops, t, first)
    else:
        _pack_lanes(e, node, n, loops, t, first)


def _each_k(
    e: Emitter,
    loops: Sequence[KLoop],
    at: dict[str, DimLike],
    body: Callable[[dict[str, DimLike]], None],
    unroll: bool,
) -> None:
    """Runs `body` for each point of the k loops; a short last loop becomes straight code."""
    if not loops:
        return body(at)
    var, start, stop = loops[0]
    if (
        unroll
        and len(loops) == 1
        and isinstance(start, int)
        and isinstance(stop, int)
        and stop - start <= _UNROLL
    ):
        for k in range(start, stop):
            body({**at, var: k})
        return
    with e.scopes.loop(var, e.scalar(start), e.scalar(stop)) as loop:
        loop.next()
        _each_k(e, loops[1:], at, body, unroll)


# -- vectors along n


def _pack_lanes(
    e: Emitter, node: Node, n: Axes, loops: Sequence[KLoop], t: Tiling, first: DimLike
) -> None:
    width = n[-1][1] if n else 1
    size = pieces(width, t.lanes) if len(n) > 1 else 0
    row = panel_row(loops) + first
    if not 0 < size <= MAX_PIECES:
        at_column = axis_values(e, n, symbol(COLUMN), "")
        node = e.nodes.substitute(node, at_column)
        _each_k(
            e,
            loops,
            {},
            lambda at: _put(e, e.value(e.nodes.substitute(node, at)), row, at, 0, t.nr, t),
            unroll=True,
        )
        return
    for part in range(0, t.nr, t.lanes):
        assert isinstance(width, int)
        runs = _runs(e, n, width, size, part, t)
        nodes = [e.nodes.substitute(node, values) for values, _ in runs]

        def body(
            at: dict[str, DimLike], nodes: list[Node] = nodes, runs: list = runs, part: int = part
        ) -> None:
            merged: Value | None = None
            for piece, (_, lane) in zip(nodes, runs):
                # Bound anew: masks made in the loop beat masks kept outside, of which there are too many.
                with e.scopes.block(lane.var, e.scopes.bound(lane.var), lane):
                    value = e.value(e.nodes.substitute(piece, at))
                value = e.b.splat(value, t.lanes)
                merged = value if merged is None else e.b.select(lane.mask, value, merged)
            assert merged is not None
            _put(e, merged, row, at, part, t.lanes, t)

        _each_k(e, loops, {}, body, unroll=True)


def _runs(
    e: Emitter, n: Axes, width: int, count: int, part: int, t: Tiling
) -> list[tuple[dict[str, DimLike], Lane]]:
    """For each run that the vector from column COLUMN + part on may touch: the n variables, and the
    vectorised variable, the last of them, with the mask of the run's lanes."""
    b = e.b
    first = b.add(e.scopes.bound(COLUMN), part)
    whole = b.udiv(first, constant(I64, width))
    start = b.sub(first, b.mul(whole, width))
    rows = product(x for _, x in n[:-1])
    last = b.sub(e.scalar(rows), 1)
    left = b.intrinsic("smin", b.sub(e.scalar(t.n_total), first), t.lanes)
    iota = b.iota(I32.vector(t.lanes))
    found = []
    for i in range(count):
        # Lanes [begin, end) of the vector fall into run i; those past the last column into none.
        begin = b.sub(constant(I64, i * width), start)
        end = b.intrinsic("smin", b.add(begin, width), left)
        inside = b.and_(b.compare("ge", iota, b.cast(begin, I32)), b.compare("lt", iota, b.cast(end, I32)))
        row, x = f"n row {part} {i}", f"n run {part} {i}"
        e.scopes.bind(row, b.intrinsic("smin", b.add(whole, i), last))
        e.scopes.bind(x, b.sub(constant(I64, 0), begin))
        e.bounds[row] = (0, rows - 1 if isinstance(rows, int) else None)
        e.bounds[x] = (-count * width, width - 1)
        values = {**axis_values(e, n[:-1], symbol(row), ""), n[-1][0]: symbol(x)}
        found.append((values, Lane(x, t.lanes, inside)))
    return found


def _put(
    e: Emitter, value: Value, row: DimLike, at: dict[str, DimLike], part: int, count: int, t: Tiling
) -> None:
    """Stores a vector into the panel."""
    element = MEMORY_TYPES[e.arguments["panel "].dtype.name]
    address = e.address("panel ", substitute(row, at) * t.nr + part)
    e.b.store(e.b.splat(value, count), address, align=min(64, count * element.bytes))


# -- vectors along k


def _pack_transposed(
    e: Emitter, node: Node, n: Axes, loops: Sequence[KLoop], t: Tiling, start: DimLike
) -> None:
    """Square blocks of `lanes` columns and as many k. What a block computes beyond the end of the last k
    axis lands in rows that are written later, or in the spare rows at the panel's end."""
    b, size = e.b, t.lanes
    last = b.sub(e.scalar(t.n_total), 1)
    row = panel_row(loops) + start
    e.bounds["columns"] = (0, t.nr - 1)
    with e.scopes.loop("columns", constant(I64, 0), constant(I64, t.nr), size) as columns:
        columns.next()
        first = b.add(e.scopes.bound(COLUMN), columns.index)
        names = [f"column {c}" for c in range(size)]
        for c, name in enumerate(names):
            e.scopes.bind(name, b.intrinsic("smin", b.add(first, c), last))
            e.bounds[name] = (0, t.n_total - 1 if isinstance(t.n_total, int) else None)
        nodes = [e.nodes.substitute(node, axis_values(e, n, symbol(name), "")) for name in names]

        def block(carry: list[Value]) -> list[Value]:
            vectors = [b.splat(e.value(x), size) for x in nodes]
            element = vectors[0].type.scalar
            for i, vector in enumerate(transpose(e, vectors)):
                address = e.address("panel ", (row + i) * t.nr + symbol("columns"))
                b.store(vector, address, align=size * element.bytes)
            return []

        def inside(at: dict[str, DimLike]) -> None:
            var, start, stop = loops[-1]
            e.scopes.lanes(var, e.scalar(start), e.scalar(stop), size, block, masked_only=True, align=1)

        _each_k(e, loops[:-1], {}, inside, unroll=False)


def transpose(e: Emitter, vectors: list[Value]) -> list[Value]:
    """The columns of a square block of as many vectors as they have lanes: log2 rounds of interleaving."""
    size = len(vectors)
    half = size // 2
    low = [x for i in range(half) for x in (i, size + i)]
    high = [x for i in range(half) for x in (half + i, size + half + i)]
    for _ in range(size.bit_length() - 1):
        vectors = [
            e.b.shuffle(vectors[i], vectors[i + half], order) for i in range(half) for order in (low, high)
        ]
    return vectors


def pack_a(
    e: Emitter, at_row: Callable[[DimLike], Node], tile: DimLike, loops: Sequence[KLoop], t: Tiling
) -> None:
    """Evaluates a for the rows of the current tile into scratch; rows past the end repeat the last."""
    b = e.b
    last = b.sub(e.scalar(t.m_total), 1)
    flat = panel_row(loops)
    count = min(t.lanes, 16) if t.lanes > 1 else 1
    e.bounds["a row"] = (0, t.m_total - 1 if isinstance(t.m_total, int) else None)
    e.bounds["a r"] = (0, t.mr - 1)
    with e.scopes.loop("a r", constant(I64, 0), constant(I64, t.mr)) as loop:
        loop.next()
        e.scopes.bind("a row", b.intrinsic("smin", b.add(e.scopes.bound(ROW), loop.index), last))
        node = at_row(symbol("a row"))
        base = (tile * t.mr + symbol("a r")) * t.panel_rows

        def inside(at: dict[str, DimLike]) -> None:
            element, place = e.nodes.substitute(node, at), substitute(base + flat, at)

            def store(carry: list[Value]) -> list[Value]:
                lane = e.scopes.lane
                assert lane is not None
                value, address = b.splat(e.value(element), lane.count), e.address("packed ", place)
                if lane.mask is None:
                    b.store(value, address)
                else:
                    b.masked_store(value, address, lane.mask)
                return []

            var, start, stop = loops[-1]
            e.scopes.lanes(var, e.scalar(start), e.scalar(stop), count, store,
                           masked_only=e.target.has_mask_registers, align=1)

        _each_k(e, loops[:-1], {}, inside, unroll=True)


def pack_columns(e: Emitter, node: Node, loop: KLoop, width: int, t: Tiling, first: DimLike) -> None:
    """Copies a tile of a as [k][width], from that row of "packed " on, with vectors along m; `node`: a at the
    row "a row"."""
    b, (var, start, stop), row = e.b, loop, e.scopes.bound(ROW)
    left = constant(I64, t.mr) if t.fixed_m else b.sub(e.scalar(t.m_total), row)
    mask = b.first_lanes(b.intrinsic("smin", left, t.mr), width) if width > 1 else None
    e.bounds["a row"] = (0, t.m_total - 1 if isinstance(t.m_total, int) else None)
    with e.scopes.block("a row", row, Lane("a row", width, mask)):
        with e.scopes.loop(var, e.scalar(start), e.scalar(stop)) as k:
            k.next()
            b.store(b.splat(e.value(node), width), e.address("packed ", (panel_row([loop]) + first) * width))
