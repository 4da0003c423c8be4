"""Loops and branches as items of the plan: where carries, inputs of a step and stacked outputs lie.

A step's input is a view of the array of all steps, a stacked output one of the array that the loop makes. A
carry is never copied from one step to the next: it has two slots, and a step reads one and writes the other.
Where the loop stacks that carry as well, before or after the step, the stack, with one row more, is the
carry's memory, so that nothing is written twice.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphflow.compiler.ir.graph import Node, Region, TensorType
from graphflow.compiler.plan.dims import Dim, DimLike, product, symbol
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.schema import Branch, Copy, Item, Repeat

if TYPE_CHECKING:
    from graphflow.compiler.passes.lower import Lowering


@dataclass(frozen=True)
class _Carry:
    """Where a carry is: in the rows of the buffer `base`, each of that shape. A step reads row `read` and
    writes row `write`; it starts in row `start` and ends in row `end`. `stack`: there is a row for each step,
    and one more."""
    base: str
    shape: tuple[DimLike, ...]
    start: DimLike
    read: DimLike
    write: DimLike
    end: DimLike
    stack: bool = False

    def row(self, low: Lowering, number: DimLike, node: Node) -> str:
        """The buffer that is that row."""
        return low.view(self.base, self.shape, number * product(self.shape), node)


def lower_scan(low: Lowering, node: Node, given: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Appends the loop; gives the buffers of its results. Stacked outputs are written where `wanted`."""
    region, length, count = node.regions[0], node.attrs["length"], node.attrs["carries"]
    steps, counter = node.attrs["steps"], low.counter()
    turn = symbol(counter)
    step = length - 1 - turn if node.attrs["reverse"] else turn
    carries = [_carry(low, node, i, turn, wanted) for i in range(count)]
    inner = [c.row(low, c.read, node) if c else id for c, id in zip(carries, given)]
    inner += [low.view(id, p.shape, step * p.type.size, node)
              for id, p in zip(given[count:count + steps], region.parameters[count:])]
    inner += given[count + steps:]
    ends = [c.row(low, c.write, node) if c else "" for c in carries]
    stacks: list[str] = []
    for k in range(count, len(node.types)):
        stack = _stack_of_carry(low, node, carries, k)
        ends.append("" if stack else low.view(stack := wanted[k] or low.arena(node.types[k], node),
                                              node.types[k].shape[1:], step * region.results[k].type.size,
                                              node))
        stacks.append(stack)
    _start(low, carries, given, node)
    body = _body(low, region, inner, ends)
    if body:
        low.body.append(Repeat(counter, length, body))
    return [c.row(low, c.end, node) if c else id for c, id in zip(carries, given)] + stacks


def _carry(low: Lowering, node: Node, i: int, turn: Dim, wanted: Sequence[str]) -> _Carry | None:
    """The place of carry `i` of a scan; None for one that no step changes. The stack serves unless it is an
    output, which has no row more."""
    region, type = node.regions[0], node.types[i]
    if region.results[i] == region.parameters[i]:
        return None
    length, stacked = node.attrs["length"], _stacked(node, i)
    if not stacked or any(wanted[k] for k in stacked):
        return _slots(low, node, type, turn, length % 2)
    base = low.arena(TensorType(type.dtype, (length + 1, *type.shape)), node)
    if node.attrs["reverse"]:
        return _Carry(base, type.shape, length, length - turn, length - 1 - turn, 0, True)
    return _Carry(base, type.shape, 0, turn, turn + 1, length, True)


def _slots(low: Lowering, node: Node, type: TensorType, turn: Dim, end: DimLike) -> _Carry:
    base = low.arena(TensorType(type.dtype, (2, *type.shape)), node)
    return _Carry(base, type.shape, 0, turn % 2, (turn + 1) % 2, end)


def _stacked(node: Node, i: int) -> list[int]:
    """The results of a scan that stack carry `i`, before or after each step."""
    region = node.regions[0]
    return [k for k in range(node.attrs["carries"], len(region.results))
            if region.results[k] in (region.results[i], region.parameters[i])]


def _stack_of_carry(low: Lowering, node: Node, carries: Sequence[_Carry | None], k: int) -> str:
    """The buffer of stacked output `k` where it is the memory of a carry, else ""."""
    region = node.regions[0]
    for i, carry in enumerate(carries):
        if carry is None or not carry.stack or k not in _stacked(node, i):
            continue
        before = region.results[k] == region.parameters[i]
        first = 1 if before == node.attrs["reverse"] else 0
        return low.view(carry.base, node.types[k].shape, first * product(carry.shape), node)
    return ""


def _start(low: Lowering, carries: Sequence[_Carry | None], given: Sequence[str], node: Node) -> None:
    for carry, id in zip(carries, given):
        if carry:
            low.body.append(Copy(id, carry.row(low, carry.start, node)))


def _body(low: Lowering, region: Region, given: Sequence[str], wanted: Sequence[str]) -> tuple[Item, ...]:
    """The items of a body."""
    outer, low.body = low.body, []
    low.region(region, given, wanted)
    inner, low.body = low.body, outer
    return tuple(inner)


def lower_cond(low: Lowering, node: Node, given: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Appends the branch, both sides of which write the same buffers; gives these."""
    results = [id or low.arena(type, node) for id, type in zip(wanted, node.types)]
    sides = [_body(low, region, given[1:], results) for region in node.regions]
    low.body.append(Branch(given[0], sides[0], sides[1]))
    return results


def lower_while(low: Lowering, node: Node, given: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Appends the loop, with the condition before it and again at the end of each trip; gives the buffers of
    its results, which depend on the number of trips done."""
    condition, region = node.regions
    count, counter = node.attrs["carries"], low.counter()
    turn = symbol(counter)
    carries = [None if region.results[i] == region.parameters[i] else
               _slots(low, node, node.types[i], turn, turn % 2) for i in range(count)]
    _start(low, carries, given, node)
    constants = given[count:]
    goes_on = low.arena(TensorType(BOOL, ()), node, "condition")
    low.region(condition, given, [goes_on])
    before = [c.row(low, c.read, node) if c else id for c, id in zip(carries, given)]
    after = [c.row(low, c.write, node) if c else id for c, id in zip(carries, given)]
    body = _body(low, region, [*before, *constants],
                 [id if c else "" for c, id in zip(carries, after)])
    body += _body(low, condition, [*after, *constants], [goes_on])
    low.body.append(Repeat(counter, node.attrs["limit"], body, goes_on))
    return [c.row(low, c.end, node) if c else id for c, id in zip(carries, given)]


LOWERINGS: dict[str, Callable[[Lowering, Node, Sequence[str], Sequence[str]], list[str]]] = {
    "scan": lower_scan, "cond": lower_cond, "while_loop": lower_while}
"""How each op is lowered: (program, node, buffers of its operands, where results are wanted or "") -> the
buffers of its results."""
