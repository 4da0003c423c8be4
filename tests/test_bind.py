"""Binding: offsets, the peak, its formula and its explanation, on random plans."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest

from graphflow.compiler.plan.bind import MAX_BYTES, bind, solve_symbols
from graphflow.compiler.plan.dims import DimLike, evaluate, symbol
from graphflow.compiler.plan.dtypes import F32, F64, U8
from graphflow.compiler.plan.errors import DeviceError
from graphflow.compiler.plan.peak import describe_peak, explain_peak, peak_formula
from graphflow.compiler.plan.schema import ALIGNMENT, Buffer, Function, Launch, Plan, Repeat

N, M = symbol("N"), symbol("M")


def random_plan(seed: int, count: int = 40, length: int = 30) -> Plan:
    """Arena buffers of random sizes and lives, some taking over others; launches only for scratch."""
    rng = random.Random(seed)
    buffers: list[Buffer] = []
    for i in range(count):
        first = rng.randrange(length)
        last = min(length - 1, first + int(rng.expovariate(0.2)))
        shapes = [(N, rng.randint(1, 9)), (rng.randint(0, 300),), (N * M, 3), ()]
        shape: tuple[DimLike, ...] = rng.choice(shapes)
        dtype = rng.choice([F32, F64, U8])
        b = Buffer(f"b{i}", "arena", "", dtype, shape, first=first, last=last)
        buffers.append(b)
        while rng.random() < 0.4 and b.first < b.last < length - 1:
            last = rng.randrange(b.last, length)
            b = replace(b, id=f"{b.id}'", first=b.last, last=last, alias=b.id)
            buffers.append(b)
    body = tuple(Launch("k", (), rng.choice([1, 2, 3, N]), scratch=rng.choice([0, 100, 8 * N]),
                        shared=rng.choice([0, 0, 72, 64 * M])) for _ in range(length))
    return Plan("p", "t", ("N", "M"), tuple(buffers), (), (), (), (), body)


def bytes_of(b: Buffer, symbols: dict[str, int]) -> int:
    size = b.dtype.bytes
    for d in b.shape:
        size *= evaluate(d, symbols)
    return size


def scratch_of(item: Launch, symbols: dict[str, int], threads: int) -> int:
    """Whole lines that are shared and for all workers but the last, and what that one needs."""
    own, shared, tasks = (evaluate(d, symbols) for d in (item.scratch, item.shared, item.tasks))
    workers = min(threads, tasks)
    return align(shared) + align(own) * (workers - 1) + own if workers else 0


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def takes_over(plan: Plan, a: Buffer, b: Buffer) -> bool:
    """Whether one of the two took over the other's memory, directly or through others."""
    table = {x.id: x for x in plan.buffers}

    def chain(x: Buffer) -> list[str]:
        return [x.id, *(chain(table[x.alias]) if x.alias else [])]
    return a.id in chain(b) or b.id in chain(a)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("symbols", [{"N": 1, "M": 1}, {"N": 17, "M": 5}, {"N": 64, "M": 0}])
def test_no_two_live_buffers_overlap(seed, symbols):
    plan = random_plan(seed)
    binding = bind(plan, symbols, threads=3)
    end = 0
    offsets = binding.offsets
    spans = {b.id: (offsets[b.id], offsets[b.id] + bytes_of(b, symbols)) for b in plan.buffers}
    for i, a in enumerate(plan.buffers):
        start, stop = spans[a.id]
        assert start % ALIGNMENT == 0 and start >= 0
        end = max(end, stop)
        for b in plan.buffers[:i]:
            other = spans[b.id]
            if a.first <= b.last and b.first <= a.last and not takes_over(plan, a, b):
                assert stop <= other[0] or other[1] <= start or start == stop or other[0] == other[1]
        if a.alias:
            assert offsets[a.id] == offsets[a.alias]
    assert len(binding.scratch) == len(plan.body)
    for position, (start, item) in enumerate(zip(binding.scratch, plan.body)):
        stop = start + scratch_of(item, symbols, 3)
        assert start % ALIGNMENT == 0 and start >= 0
        end = max(end, stop)
        for b in plan.buffers:
            if b.first <= position <= b.last and start < stop and spans[b.id][0] < spans[b.id][1]:
                assert stop <= spans[b.id][0] or spans[b.id][1] <= start
    assert binding.peak_bytes == end <= binding.arena_bytes < end + ALIGNMENT


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_scratch_of_a_loop_by_rows_lives_through_the_loop(threads):
    """There every thread is at another step, in another launch; in other loops launches follow each other."""
    inner = (Launch("k", (), 3, scratch=100), Launch("k", (), 3, scratch=200, shared=64))
    for rows in (0, 3):
        body = (Launch("k", (), 1, scratch=640), Repeat("u0", 4, inner, rows=rows))
        binding = bind(Plan("p", "t", (), (), (), (), (), (), body), {}, threads)
        one, two = (scratch_of(item, {}, threads) for item in inner)
        assert binding.live_peak_bytes == binding.arena_bytes == align(max(
            640, align(one) + align(two) if rows else max(one, two)))
        _, first, second = binding.scratch
        assert not rows or first + one <= second or second + two <= first


def test_the_scratch_of_a_gpu_lies_first():
    buffers = (Buffer("b0", "arena", "", F32, (100,), first=0, last=1),)
    body = (Launch("k", ("b0",), 1, scratch=100), Launch("k", ("b0",), 9, scratch=200))
    plan = Plan("p", "t", (), buffers, (), (), (), (), body, functions=(Function("k", 128),))
    binding = bind(plan, {})
    assert binding.scratch == (0, 0) and binding.offsets == {"b0": 256}
    assert (binding.peak_bytes, binding.arena_bytes, binding.live_peak_bytes) == (656, 704, 704)


@pytest.mark.parametrize("seed", range(30))
def test_packing_is_tight_and_repeatable(seed):
    plan, symbols = random_plan(seed), {"N": 13, "M": 4}
    binding = bind(plan, symbols, 2)
    assert binding == bind(random_plan(seed), symbols, 2)
    assert binding.live_peak_bytes <= binding.arena_bytes <= 1.05 * binding.live_peak_bytes
    without = bind(replace(plan, body=()), symbols, 2)
    assert without.scratch == ()
    assert without.peak_bytes == max(without.offsets[b.id] + bytes_of(b, symbols) for b in plan.buffers)


@pytest.mark.parametrize("seed", range(20))
def test_peak_formula(seed):
    """For any values the largest expression is the largest sum of live bytes, counted item by item."""
    plan = random_plan(seed)
    formula = peak_formula(plan, threads=2)
    for n, m in ((0, 0), (1, 1), (7, 3), (100, 0), (3, 50)):
        symbols = {"N": n, "M": m}
        live = [0] * len(plan.body)
        for b in plan.buffers:
            begins = b.first + 1 if b.alias else b.first          # the one that it takes over counts there
            for at in range(begins, b.last + 1):
                live[at] += bytes_of(b, symbols)
        for at, item in enumerate(plan.body):
            workers = min(2, item.tasks) if isinstance(item.tasks, int) else 2
            live[at] += evaluate(item.shared, symbols) + workers * evaluate(item.scratch, symbols)
        assert max(evaluate(d, symbols) for d in formula) == max(live)
    assert len(set(formula)) == len(formula)


def test_peak_formula_drops_what_cannot_win():
    def at(i: int, *shape: DimLike) -> Buffer:
        return Buffer(f"b{i}", "arena", "", F32, shape, first=i, last=i)
    plan = Plan("p", "t", ("N", "M"), (at(0, N), at(1, 2 * N), at(2, M), at(3, 2 * N)), (), (), (), (), ())
    assert peak_formula(plan) == [8 * N, 4 * M]


@pytest.mark.parametrize("seed", range(10))
def test_explain_peak(seed):
    plan, symbols = random_plan(seed), {"N": 20, "M": 3}
    report = explain_peak(plan, symbols, 3)
    sizes = [size for _, size in report.live]
    assert sizes == sorted(sizes, reverse=True)
    for b, size in report.live:
        assert b.first <= report.position <= b.last and size == bytes_of(b, symbols)
    assert report.scratch == scratch_of(plan.body[report.position], symbols, 3)
    whole, found = bind(plan, symbols, 3).live_peak_bytes, report.live_bytes + report.scratch
    assert whole - ALIGNMENT * (len(sizes) + 1) <= found <= whole


@pytest.mark.parametrize("seed", range(10))
def test_the_peak_of_a_gpu_has_the_largest_scratch_throughout(seed):
    plan, symbols = replace(random_plan(seed), functions=(Function("k", 128),)), {"N": 20, "M": 3}
    whole, report = bind(plan, symbols).live_peak_bytes, explain_peak(plan, symbols)
    found = report.live_bytes + report.scratch
    assert whole - ALIGNMENT * (len(report.live) + 1) <= found <= whole
    assert found <= max(evaluate(d, symbols) for d in peak_formula(plan)) <= whole


def test_describe_peak():
    """The numbers of a plan small enough to count by hand."""
    buffers = (Buffer("b0", "arena", "hidden", F32, (N, 4), first=0, last=1, origins=(3, 5)),
               Buffer("b1", "arena", "loss", F64, (), first=1, last=1, origins=(7,)))
    plan = Plan("p", "t", ("N",), buffers, (), (), (), (),
                (Launch("k", (), 2), Launch("k", (), 2, scratch=64)))
    assert describe_peak(plan, {"N": 100}, 2, {3: "net.py:1", 5: "net.py:2"}) == (
        "1,736 bytes at N = 100\n"
        "= 16*N + 136, beside alignment\n"
        "1,600  hidden f32[N, 4]        net.py:1, net.py:2\n"
        "  128  scratch of the kernels\n"
        "    8  loss f64[]              ?\n"
    )


def test_empty_plan():
    plan = Plan("p", "t", (), (), (), (), (), (), ())
    binding = bind(plan, {}, 4)
    assert (binding.peak_bytes, binding.arena_bytes, binding.live_peak_bytes) == (0, 0, 0)
    assert peak_formula(plan) == [0] and explain_peak(plan, {}).live == ()


def test_absurd_size():
    plan = Plan("p", "t", ("N",), (Buffer("b", "arena", "logits", F32, (N, N)),), (), (), (), (), ())
    with pytest.raises(DeviceError, match="logits takes .* bytes at N = 16777216"):
        bind(plan, {"N": 1 << 24})
    assert bind(plan, {"N": 1 << 22}).peak_bytes == 4 << 44 <= MAX_BYTES


def test_many_buffers_are_packed_in_reasonable_time():
    plan = random_plan(1, count=1500, length=1000)
    assert bind(plan, {"N": 8, "M": 2}).peak_bytes > 0


@pytest.mark.parametrize("shapes, expected", [
    ([((N, 3), (5, 3))], {"N": 5}),
    ([((2 * N + 1,), (7,)), ((N,), (4,))], {"N": 4}),              # a bare symbol wins
    ([((2 * N + 1,), (7,))], {"N": 3}),
    ([((N * M,), (12,)), ((N,), (4,))], {"N": 4, "M": 3}),
    ([((N * M,), (12,))], {}),
])
def test_solve_symbols(shapes, expected):
    assert solve_symbols(shapes) == expected
