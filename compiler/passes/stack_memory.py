"""Stacks that take over the memory of stacks (part of memory).

A loop reads its inputs step by step from one array of all steps, and stacks its outputs in another. Where an
input is needed by nothing behind the loop, and every step writes its piece of an output only after it has
read the same piece of the input, the output can be in the input's memory: so do the gates of a recurrent
layer take the place of the products that they are made of, and their gradients that of the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from graphflow.compiler.kernel.form import Kernel
from graphflow.compiler.kernel.program import KernelProgram
from graphflow.compiler.plan.dims import product, substitute, symbol
from graphflow.compiler.plan.schema import Buffer, Copy, Launch, Place, Repeat, base_of, places

Proof = Callable[[Kernel, str, str], bool]
"""(kernel, argument that it reads, argument that it writes) -> whether both may be the same memory."""


def stack_aliases(program: KernelProgram, table: Mapping[str, Buffer], lives: Mapping[str, tuple[int, int]],
                  proof: Proof) -> Iterator[tuple[str, str]]:
    """Pairs (buffer, the one whose memory it may take over), for every loop of launches and copies."""
    for place in places(program.plan.body):
        loop = place.item
        if isinstance(loop, Repeat) and all(isinstance(item, (Launch, Copy)) for item in loop.body):
            found = _Loop(program, table, place)
            dying = [id for id in found.views if lives[id][0] < place.position and lives[id][1] == place.last]
            born = [id for id in found.views if lives[id][0] == place.position and lives[id][1] > place.last]
            yield from ((y, x) for y in born for x in dying if found.fits(x, y, proof))


class _Loop:
    """What a loop touches. `views`: for each arena buffer the views of it that the loop uses."""

    def __init__(self, program: KernelProgram, table: Mapping[str, Buffer], place: Place) -> None:
        assert isinstance(place.item, Repeat)
        self.loop, self.table, self.kernels = place.item, table, program.kernels
        self.views: dict[str, set[str]] = {}
        for item in self.loop.body:
            for id in (item.source, item.target) if isinstance(item, Copy) else item.buffers:  # type: ignore
                if table[base_of(table, id)].role == "arena":
                    self.views.setdefault(base_of(table, id), set()).add(id)

    def fits(self, x: str, y: str, proof: Proof) -> bool:
        """Whether y, which the loop makes, can be in the memory of x, which it reads."""
        if len(self.views[x]) != 1 or len(self.views[y]) != 1:
            return False
        (read,), (written,) = self.views[x], self.views[y]
        a, b = self.table[read], self.table[written]
        sizes = {product(self.table[id].shape) for id in (x, y)}
        if a.role != "view" or b.role != "view" or len(sizes) != 1:
            return False
        if (a.dtype, a.shape, a.offset) != (b.dtype, b.shape, b.offset):
            return False
        size, turn = product(a.shape), {self.loop.counter: symbol(self.loop.counter) + 1}
        if substitute(a.offset, turn) - a.offset not in (size, -size):
            return False
        return self._in_order(read, written, proof)

    def _in_order(self, read: str, written: str, proof: Proof) -> bool:
        """Whether a step has read the one view when it begins to write the other."""
        begun = False
        for item in self.loop.body:
            if isinstance(item, Copy):
                if read in (item.source, item.target) or written in (item.source, item.target):
                    return False
                continue
            assert isinstance(item, Launch)
            arguments = dict(zip(item.buffers, self.kernels[item.kernel].arguments))
            if read in arguments:
                if begun or arguments[read].mode != "r" or item.buffers.count(read) != 1:
                    return False
            if written in arguments and not begun:
                begun = True
                if arguments[written].mode != "w" or item.buffers.count(written) != 1:
                    return False
                if read in arguments:
                    x, y = arguments[read], arguments[written]
                    if x.shape != y.shape or not proof(self.kernels[item.kernel], x.name, y.name):
                        return False
        return begun
