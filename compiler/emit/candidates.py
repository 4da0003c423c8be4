"""The ways in which a contraction may be computed on a target: its algorithms, and for each kernel those of
them, and of the register tiles, that are worth timing.

An algorithm other than the direct one (`contraction`) is a row of ALGORITHMS. Its `choose` says how it would
compute a kernel, or None where it does not apply. A kernel's tile may name an algorithm by number; otherwise
`choose` gives None as well where a cost model finds that it does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from graphflow.compiler.emit.blocked import (
    blocked,
    blocked_scratch,
    blocked_shared,
    blocked_tasks,
    emit_blocked,
)
from graphflow.compiler.emit.builder import Module
from graphflow.compiler.emit.contraction_rows import (
    emit_row_contraction,
    row_contraction,
    row_scratch,
    row_tasks,
)
from graphflow.compiler.emit.direct import (
    direct,
    direct_scratch,
    direct_shared,
    direct_tasks,
    emit_direct,
)
from graphflow.compiler.emit.direct_weights import (
    direct_weights,
    direct_weights_scratch,
    direct_weights_tasks,
    emit_direct_weights,
)
from graphflow.compiler.emit.narrow import emit_narrow, narrow
from graphflow.compiler.emit.operands import algorithm_asked
from graphflow.compiler.emit.pointwise_weights import (
    emit_pointwise_weights,
    pointwise_weights,
    pointwise_weights_scratch,
    pointwise_weights_tasks,
)
from graphflow.compiler.emit.thin import emit_thin, thin, thin_scratch, thin_tasks
from graphflow.compiler.emit.tiling import Tiling, contraction_tiling, rows_of_tile
from graphflow.compiler.emit.winograd_images import (
    winograd_images,
    winograd_images_scratch,
    winograd_images_shared,
    winograd_images_tasks,
    winograd_images_weights,
    winograd_images_weights_scratch,
    winograd_images_weights_tasks,
)
from graphflow.compiler.emit.winograd_images_code import emit_winograd_images, emit_winograd_images_weights
from graphflow.compiler.emit.winograd_nhwc import (
    winograd_nhwc,
    winograd_nhwc_scratch,
    winograd_nhwc_shared,
    winograd_nhwc_tasks,
)
from graphflow.compiler.emit.winograd_nhwc_code import emit_winograd_nhwc
from graphflow.compiler.emit.winograd_nhwc_weights import (
    emit_winograd_nhwc_weights,
    winograd_nhwc_weights,
    winograd_nhwc_weights_scratch,
    winograd_nhwc_weights_tasks,
)
from graphflow.compiler.kernel.form import ContractionKernel, Kernel
from graphflow.compiler.kernel.text import print_kernel
from graphflow.compiler.plan.dims import DimLike, product
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.target import Target

Tile = dict[str, int]
_SUMS = 8
MOST = 12
"""So many candidates of a kernel at most."""
DIRECT = 0
"""The number of the direct algorithm."""


class Algorithm(NamedTuple):
    """One emitter of contractions. `numbers`: those by which a kernel's tile may name it. `choose`, `tasks`,
    `scratch`, `emit` and `shared`: how it would compute a kernel; then, from that, the number of tasks, the
    bytes of scratch for each worker, the code, and the bytes of scratch that all workers share."""

    numbers: tuple[int, ...]
    choose: Callable[[ContractionKernel, Target], Any]
    tasks: Callable[[Any], DimLike]
    scratch: Callable[[Any], DimLike]
    emit: Callable[[Module, ContractionKernel, Target, Any], None]
    shared: Callable[[Any], DimLike] = lambda how: 0


ALGORITHMS = (
    Algorithm((), row_contraction, row_tasks, row_scratch, emit_row_contraction),
    Algorithm((2, 4), winograd_nhwc, winograd_nhwc_tasks, winograd_nhwc_scratch, emit_winograd_nhwc,
              winograd_nhwc_shared),
    Algorithm((2, 4), winograd_images, winograd_images_tasks, winograd_images_scratch, emit_winograd_images,
              winograd_images_shared),
    Algorithm((2, 4, 5), winograd_nhwc_weights, winograd_nhwc_weights_tasks, winograd_nhwc_weights_scratch,
              emit_winograd_nhwc_weights),
    Algorithm((2, 4), winograd_images_weights, winograd_images_weights_tasks, winograd_images_weights_scratch,
              emit_winograd_images_weights),
    Algorithm((1,), pointwise_weights, pointwise_weights_tasks, pointwise_weights_scratch,
              emit_pointwise_weights),
    Algorithm((1,), direct_weights, direct_weights_tasks, direct_weights_scratch, emit_direct_weights),
    Algorithm((1,), direct, direct_tasks, direct_scratch, emit_direct, direct_shared),
    Algorithm((3,), blocked, blocked_tasks, blocked_scratch, emit_blocked, blocked_shared),
    Algorithm((6,), thin, thin_tasks, thin_scratch, emit_thin),
    Algorithm((7,), narrow, lambda how: how.panels, lambda how: 0, emit_narrow),
)
"""Every algorithm but the direct one; the first that gives an answer is taken. 1: the definition of a
convolution over images unfolded along x; 2, 4 and 5: Winograd with tiles of as many outputs along an axis; 3:
a product of large matrices, block by block; 6: a product of few rows and a large matrix, read as it lies; 7:
a product of a transposed matrix and one of few columns."""


def special(kernel: ContractionKernel, target: Target) -> tuple[Algorithm, Any] | None:
    """The algorithm that computes the kernel, and how; None: it is computed directly. CompilerError if its
    tile names an algorithm that does not apply to it."""
    for algorithm in ALGORITHMS:
        how = algorithm.choose(kernel, target)
        if how is not None:
            return algorithm, how
    if algorithm_asked(kernel):
        raise _fault(kernel, f"the algorithm {algorithm_asked(kernel)}, which its tile names, does not apply "
                             "to it")
    return None


def check_tile(kernel: Kernel, target: Target, stage: str) -> None:
    """CompilerError if the kernel's tile asks for what the target or the algorithm cannot give."""
    if not isinstance(kernel, ContractionKernel) or not kernel.contraction.tile:
        return
    tile, lanes = kernel.contraction.tile, target.vector_bytes // kernel.contraction.a.dtype.bytes
    if special(kernel, target) is not None:
        for name in ("mr", "nr", "kc"):
            if name in tile:
                raise _fault(kernel, f"its tile has {name}={tile[name]}, which is for the direct algorithm, "
                                     f"{DIRECT}, alone", stage)
        return
    if "nr" in tile and tile["nr"] & (tile["nr"] - 1):
        raise _fault(kernel, f"its tile has nr={tile['nr']}, which is no power of two", stage)
    t = contraction_tiling(kernel, target)
    needed = _registers(t.mr, t.nr, lanes)
    if needed > target.vector_registers and ("mr" in tile or "nr" in tile):
        raise _fault(kernel, f"a tile of {t.mr} x {t.nr} takes {needed} vector registers, of which there are "
                             f"{target.vector_registers}", stage)


def candidates(kernel: Kernel, target: Target) -> list[Tile]:
    """The ways to compute the kernel that are worth timing, as what its `tile` may be: the first is the empty
    one, which leaves the choice to the cost model; no two come to the same. Only contractions have more than
    that one."""
    if not isinstance(kernel, ContractionKernel):
        return [{}]
    found: list[Tile] = []
    ways: list[Any] = []
    for tile in ({}, *_algorithms(kernel, target), *_direct(kernel, target)):
        how = _how(_with_tile(kernel, tile), target)
        if how not in ways:
            ways.append(how)
            found.append(tile)
    return found[:MOST]


def _how(kernel: ContractionKernel, target: Target) -> Any:
    """What the emitter will do, as a value that can be compared."""
    found = special(kernel, target)
    return contraction_tiling(kernel, target) if found is None else found


def _with_tile(kernel: ContractionKernel, tile: Tile) -> ContractionKernel:
    return replace(kernel, contraction=replace(kernel.contraction, tile=tile))


def _algorithms(kernel: ContractionKernel, target: Target) -> Iterator[Tile]:
    """Each algorithm that applies."""
    yield {"algorithm": DIRECT}
    for number in sorted({n for algorithm in ALGORITHMS for n in algorithm.numbers}):
        asked = _with_tile(kernel, {"algorithm": number})
        if any(a.choose(asked, target) is not None for a in ALGORITHMS if number in a.numbers):
            yield {"algorithm": number}


def _direct(kernel: ContractionKernel, target: Target) -> Iterator[Tile]:
    """Register tiles of one, two and four vectors by many rows and fewer, then other depths of a panel."""
    t = contraction_tiling(_with_tile(kernel, {"algorithm": DIRECT}), target)
    lanes = target.vector_bytes // kernel.contraction.a.dtype.bytes
    widest = 1 << (t.n_total - 1).bit_length() if isinstance(t.n_total, int) and t.n_total else 4 * lanes
    for nr in (2 * lanes, lanes, 4 * lanes):
        if nr <= max(widest, t.nr):
            for mr in _rows(t, nr, lanes, target):
                yield {"mr": mr, "nr": nr}
    depth = product(extent for _, extent in t.inner[1:]) * (t.chunk or t.inner[0][1])
    if isinstance(depth, int) and depth >= 256:
        yield {"mr": t.mr, "nr": t.nr, "kc": depth // 2}
        if t.blocks:
            yield {"mr": t.mr, "nr": t.nr, "kc": 2 * depth}


def _rows(t: Tiling, nr: int, lanes: int, target: Target) -> list[int]:
    """Rows of tiles that fit the registers: the usual number, the most, and half of it if that leaves as many
    sums as hide the latency of an addition."""
    vectors = -(-nr // lanes)
    most = (target.vector_registers - 1 - vectors) // vectors
    if t.fixed_m:
        most = min(most, t.fixed_m)
    usual = rows_of_tile(t.m_total, nr, lanes, target)
    half = [most // 2] if most // 2 * vectors >= _SUMS else []
    return [mr for mr in dict.fromkeys((usual, most, *half)) if 1 <= mr <= most]


def _registers(mr: int, nr: int, lanes: int) -> int:
    """The vector registers of a tile: its sums, a row of b, and an element of a."""
    vectors = -(-nr // lanes)
    return mr * vectors + vectors + 1


def _fault(kernel: ContractionKernel, message: str, stage: str = "tile") -> CompilerError:
    return CompilerError(f"kernel {kernel.name}: {message}", stage=stage, dump=print_kernel(kernel))
