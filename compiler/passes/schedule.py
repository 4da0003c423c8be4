"""schedule: the order of the kernels, the split of long reductions, and the layout of buffers (bit-preserving
but for the order of summation in split reductions, which is fixed here by the shapes).

Every `fused` node gets its `position` and `split`. Order: checks and what they need come first; then, among
the kernels that can run, the one that leaves the least memory alive. Layouts are chosen before, by `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

from graphflow.compiler.cuda_target import BUSY_BLOCKS
from graphflow.compiler.ir.builder import Builder, rebuild
from graphflow.compiler.ir.graph import Graph, Node, Value
from graphflow.compiler.ops import OPS
from graphflow.compiler.ops.record import Contract
from graphflow.compiler.passes.access import Probe, domain
from graphflow.compiler.passes.bodies import in_bodies
from graphflow.compiler.passes.fuse import FEW_ROWS
from graphflow.compiler.passes.kernels import column_groups, domain_layout
from graphflow.compiler.passes.phases import WHOLE, cut_axis
from graphflow.compiler.plan.dims import DimLike, product, typical
from graphflow.compiler.plan.dtypes import F32
from graphflow.compiler.plan.layouts import CHANNELS_LAST, in_memory

PIECE = 2048
"""About how many products one piece of a split contraction sums, and
how many elements (times 8) one piece of a split reduction does."""
SHARE, COLUMNS, ENOUGH_BLOCKS = 1 << 13, 32, 4
"""Of a GPU: the elements that are worth a block, the columns that one takes, and the blocks for a row that
are worth a kernel more."""
MAX_PARTIALS = 1 << 20
TILE_M, TILE_N, ENOUGH_TILES = 12, 32, 8
MOST_WEIGHTS = 1 << 16
"""As many sums as stay in the second cache beside images."""
CHANNELS = 96
"""About the channels, on either side, of a task of a gradient for weights that sums over tiles."""


def schedule(graph: Graph, blocks: bool = False) -> Graph:
    """The same graph with `position` and `split` set on every fused node; those in a body have positions of
    their own, from 0. `blocks`: whether rows and sums are cut among blocks of threads, by their kernels."""
    position = {node: i for i, node in enumerate(order(graph))}

    def make(b: Builder, node: Node, inputs: list[Value]) -> tuple[Value, ...]:
        if node.op != "fused":
            return b.copy(node, inputs).results
        attrs = {**node.attrs, "position": position[node], "split": split(node, blocks)}
        regions = in_bodies(node, partial(schedule, blocks=blocks)).regions
        return b.intern(Node("fused", tuple(inputs), attrs, regions, node.types, node.origins)).results

    return rebuild(graph, make)


def order(graph: Graph) -> list[Node]:
    """The fused nodes in the order in which they run: a list schedule that keeps little alive."""
    nodes = [n for n in graph.nodes() if n.op == "fused"]
    users = {n: [u for u in us if u.op == "fused"] for n, us in graph.users().items()}
    waiting = {n: len({v.node for v in n.inputs if v.node.op == "fused"}) for n in nodes}
    readers_left = {n: len(users[n]) for n in nodes}
    urgent = _needed_by_checks(graph)
    index = {n: i for i, n in enumerate(nodes)}
    kept = {v.node for v in graph.outputs.values()} | {v.node for e in graph.effects for v in e.inputs}
    size = {
        n: sum(typical(t.size) * t.dtype.bytes for i, t in enumerate(n.types) if not _stays(n, i))
        for n in nodes
    }
    ready = [n for n in nodes if not waiting[n]]
    out: list[Node] = []

    def cost(n: Node) -> tuple[bool, int, int]:
        producers = {v.node for v in n.inputs if v.node.op == "fused"}
        freed = sum(size[p] for p in producers if readers_left[p] == 1 and p not in kept)
        return n not in urgent, size[n] - freed, index[n]

    while ready:
        best = min(ready, key=cost)
        ready.remove(best)
        out.append(best)
        for p in {v.node for v in best.inputs if v.node.op == "fused"}:
            readers_left[p] -= 1
        for u in users[best]:
            waiting[u] -= 1
            if not waiting[u]:
                ready.append(u)
    return out


def _stays(node: Node, result: int) -> bool:
    return bool(node.attrs["inplace"][result])


def _needed_by_checks(graph: Graph) -> set[Node]:
    seen: set[Node] = set()
    stack = [v.node for e in graph.effects if e.op == "check" for v in e.inputs]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(v.node for v in n.inputs)
    return seen


def split(node: Node, blocks: bool) -> int:
    """The length of the pieces into which the first reduced axis of a kernel is cut; 0: not split; or WHOLE.
    A function of the shapes alone, with symbols at their typical size."""
    region = node.regions[0]
    inner = region.nodes()
    if node.attrs["kind"] == "contraction" and not blocks:
        anchor = next(n for n in inner if OPS[n.op].kind == "contraction")
        lowering = OPS[anchor.op].lowering
        assert isinstance(lowering, Contract)
        parts = lowering.parts(Probe(anchor))
        m, n, batch = (typical(product(x)) for x in (parts.m, parts.n, parts.batch))
        k, rest = typical(product(parts.k)), typical(product(parts.k[1:]))
        tiles = batch * -(-m // TILE_M) * -(-n // TILE_N)
        if _sums_over_tiles(anchor):
            return _images_apiece(anchor)
        if _between_rows_and_channels(anchor):
            return _images_read_once(anchor)
        enough = tiles >= ENOUGH_TILES and not _of_few_channels(anchor)
        if not parts.k or k < 2 * PIECE or enough or column_groups(node) > 1:
            return 0
        first = typical(parts.k[0])
        piece = _power_of_two(max(PIECE // max(rest, 1), -(-first * batch * m * n // MAX_PARTIALS)))
        return piece if piece < first else 0
    if node.attrs["kind"] == "row":
        reductions = [n for n in inner if OPS[n.op].kind == "reduce"]
        if blocks:
            return _split_among_blocks(node, reductions)
        if not reductions or not node.attrs["axes"] or any(r.op in ("argmax", "argmin") for r in reductions):
            return 0
        shape, axes = domain(reductions[0]), node.attrs["axes"]
        if domain_layout(node, shape) == CHANNELS_LAST:
            return _images_of_piece(node, shape, axes)
        rows = typical(product(d for i, d in enumerate(shape) if i not in axes))
        first, total = typical(shape[cut_axis(shape, axes)]), typical(product(shape[i] for i in axes))
        outer_rank = len(shape) - len(axes)
        if rows >= FEW_ROWS or total < 16 * PIECE or any(v.type.rank != outer_rank for v in region.results):
            return 0
        if any(_depends(r, set(reductions) - {r}) for r in reductions):
            return 0
        piece = _power_of_two(8 * PIECE // max(total // first, 1))
        return piece if piece < first else 0
    return 0


def _split_among_blocks(node: Node, reductions: Sequence[Node]) -> int:
    """WHOLE where a row is worth several blocks, but something needs what all of them find: they can't wait
    for each other."""
    if not reductions or not node.attrs["axes"]:
        return 0
    shape, axes = domain(reductions[0]), node.attrs["axes"]
    order = in_memory(domain_layout(node, shape), range(len(shape)))
    kept = [typical(shape[i]) for i in order if i not in axes]
    size, rows = typical(product(shape)), prod(kept)
    groups = rows if order[-1] in axes else rows // max(kept[-1], 1) * -(-kept[-1] // COLUMNS)
    waits = any(_depends(v.node, set(reductions)) for v in node.regions[0].results
                if v.type.rank != len(kept)) or any(_depends(r, set(reductions) - {r}) for r in reductions)
    return WHOLE if waits and min(BUSY_BLOCKS, size // SHARE) >= ENOUGH_BLOCKS * groups else 0


def _images_of_piece(node: Node, shape: Sequence[DimLike], axes: Sequence[int]) -> int:
    """The length of a piece of a row of channels-last images, which runs across memory; 0 where it does not,
    or is short."""
    size, along = typical(product(shape)), typical(shape[cut_axis(shape, axes)])
    written = any(name and t.rank == len(shape) for name, t in zip(node.attrs["inplace"], node.types))
    if 1 in axes or tuple(axes)[:1] != (0,) or size < 16 * PIECE or written:
        return 0
    piece = _power_of_two(max(2 * PIECE // max(size // max(along, 1), 1), 1))
    return piece if piece < along else 0


def _sums_over_tiles(anchor: Node) -> bool:
    """Whether this is a gradient for weights of the kind that Winograd's algorithms are for: their tasks
    have all output channels, and 32 input channels or more."""
    geometry = (anchor.attrs.get(name) for name in ("stride", "dilation", "groups"))
    return (anchor.op == "conv_weight_grad" and anchor.attrs["kernel"] in ((3, 3), (5, 5))
            and anchor.types[0].dtype == F32 and all(_ones(g) for g in geometry)
            and all(isinstance(d, int) and d >= 16 for d in anchor.types[0].shape[:2])
            and (anchor.attrs["kernel"] == (5, 5) or -typical(anchor.types[0].shape[1]) % 16 < 6))


def _of_few_channels(anchor: Node) -> bool:
    """Whether this is a gradient for weights of the kind that `emit/direct_weights.py` is for: its tasks have
    at least an input channel, with all its weights."""
    return (anchor.op == "conv_weight_grad" and anchor.types[0].dtype == F32 and anchor.attrs["groups"] == 1
            and typical(anchor.types[0].shape[1]) < 16)


def _ones(x: object) -> bool:
    return all(n == 1 for n in x) if isinstance(x, tuple) else x == 1


def _images_apiece(anchor: Node) -> int:
    """The images of a piece of such a gradient: so many pieces that these and blocks of channels make enough
    tasks, but few enough that finishing the sums of each costs little: they are much smaller than what they
    are sums of."""
    outs, channels = (typical(d) for d in anchor.types[0].shape[:2])
    images, places = anchor.inputs[0].shape[0], typical(product(anchor.inputs[1].shape[2:]))
    blocks = -(-outs // CHANNELS) * -(-channels // CHANNELS)
    if blocks >= ENOUGH_TILES or not places:
        return 0
    worth = -(-7 * typical(product(anchor.types[0].shape)) // (2 * places * (outs + channels)))
    shared = -(-images * blocks // ENOUGH_TILES) if isinstance(images, int) else 1
    piece = _power_of_two(max(PIECE // 2 // places, worth, shared))
    return piece if piece < typical(images) else 0


def _between_rows_and_channels(anchor: Node) -> bool:
    """Whether this is a gradient for weights of the kind that `emit/pointwise_weights.py` is for."""
    if anchor.op != "conv_weight_grad" or anchor.attrs["kernel"] != (1, 1):
        return False
    geometry = (anchor.attrs.get(name) for name in ("stride", "dilation", "groups"))
    images, above = anchor.inputs
    few = product(anchor.types[0].shape)
    return (not _lies_channels_last(images) and _lies_channels_last(above) and above.type.dtype == F32
            and isinstance(few, int) and 0 < few <= MOST_WEIGHTS and all(_ones(g) for g in geometry))


def _lies_channels_last(image: Value) -> bool:
    """Whether the channels of an image lie side by side: by its layout, or because it is such an array of the
    user's with its axes in another order."""
    made = image.node
    if made.op == "transpose" and not made.inputs[0].type.layout:
        return bool(made.attrs["perm"] == (0, 3, 1, 2))
    return image.type.layout == CHANNELS_LAST


def _images_read_once(anchor: Node) -> int:
    """The images of a piece of such a gradient, which a task reads once: so many that the sums of a piece are
    small beside them."""
    outs, channels = (typical(d) for d in anchor.types[0].shape[:2])
    places = typical(product(anchor.inputs[1].shape[2:]))
    images = anchor.inputs[0].shape[0]
    shared = -(-images // ENOUGH_TILES) if isinstance(images, int) else 1
    piece = _power_of_two(max(shared, -(-16 * outs * channels // max(places * (outs + channels), 1))))
    return piece if piece < typical(images) else 0


def _power_of_two(size: int) -> int:
    """The next power of two: usual batch sizes are multiples of it, so no piece is cut short."""
    return 1 << max(size - 1, 0).bit_length()


def _depends(node: Node, targets: set[Node]) -> bool:
    stack, seen = [v.node for v in node.inputs], set()
    while stack:
        n = stack.pop()
        if n in targets:
            return True
        if n not in seen:
            seen.add(n)
            stack.extend(v.node for v in n.inputs)
    return False
