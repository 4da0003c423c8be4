"""Linking ELF objects without LLVM: every kind of section, symbol and relocation that generated code has.
LLVM's own linker is the oracle."""
from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from graphflow.compiler.emit.object import compile_object
from graphflow.compiler.plan.errors import CompilerError
from graphflow.compiler.target import host_target
from graphflow.runtime import native
from graphflow.runtime.elf import is_elf

TARGET = host_target()
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(TARGET.is_arm or TARGET.is_macos, reason="ELF for x86-64")]

IR = """
@counter = internal global i64 5
@zeros = internal global [1000 x i64] zeroinitializer, align 64
@table = internal constant [3 x ptr] [ptr @once, ptr @twice, ptr @nextafter]
@numbers = internal constant <16 x float> <float 1., float 2., float 3., float 4., float 5., float 6.,
  float 7., float 8., float 9., float 10., float 11., float 12., float 13.,
  float 14., float 15., float 16.>, align 64
declare double @nextafter(double, double)
declare double @hypot(double, double)

define internal double @once(double %x, double %y) noinline { ret double %x }
define internal double @twice(double %x, double %y) noinline {
  %z = fadd double %x, %y
  ret double %z
}
define double @choose(i64 %n, double %x, double %y) {
  %at = getelementptr ptr, ptr @table, i64 %n
  %f = load ptr, ptr %at
  %z = call double %f(double %x, double %y)
  %w = call double @hypot(double %z, double 3.5)
  ret double %w
}
define i64 @count(i64 %by) {
  %old = load i64, ptr @counter
  %new = add i64 %old, %by
  store i64 %new, ptr @counter
  %at = getelementptr i64, ptr @zeros, i64 %by
  %had = load i64, ptr %at
  store i64 %new, ptr %at
  %sum = add i64 %had, %new
  ret i64 %sum
}
define ptr @where() { ret ptr @numbers }
define float @pick(i64 %n) {
  %v = load <16 x float>, ptr @numbers, align 64
  %x = extractelement <16 x float> %v, i64 %n
  ret float %x
}
"""
SYMBOLS = ("choose", "count", "where", "pick")


@pytest.fixture(scope="module")
def code() -> bytes:
    return compile_object(IR, TARGET)


def results(library: native.Library) -> list[float]:
    choose = library.function("choose", ctypes.c_double, ctypes.c_int64, ctypes.c_double, ctypes.c_double)
    count = library.function("count", ctypes.c_int64, ctypes.c_int64)
    pick = library.function("pick", ctypes.c_float, ctypes.c_int64)
    where = library.function("where", ctypes.c_uint64)
    return [*(choose(n, 1.25, 7.5) for n in range(3)), *(count(n) for n in (1, 7, 1, 999)),
            *(pick(n) for n in range(16)), where() % 64]


def test_results_are_those_of_the_other_linker(code: bytes) -> None:
    assert is_elf(code)
    other = native.Library(*native._load_by_llvm(code, SYMBOLS))
    found = results(native.load_object(code, "code", SYMBOLS))
    assert found == results(other)
    assert found[:3] == [np.hypot(x, 3.5) for x in (1.25, 8.75, np.nextafter(1.25, 7.5))]
    assert found[3:7] == [6, 13, 6 + 14, 1013] and found[7:23] == list(range(1, 17)) and found[23] == 0


def test_copies_have_data_of_their_own(code: bytes) -> None:
    first, second = (native.load_object(code, "code", SYMBOLS) for _ in range(2))
    assert results(first) == results(second)


def test_code_cannot_be_written(code: bytes) -> None:
    library = native.load_object(code, "code", SYMBOLS)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[1]) for line in lines]
    at = [i for i, (start, end, _) in enumerate(spans) if start <= library.address("choose") < end]
    assert [spans[i][2][:3] for i in at] == ["r-x"]


def test_what_is_missing_is_named(code: bytes) -> None:
    with pytest.raises(CompilerError, match="cannot be loaded: it has no symbol nowhere"):
        native.load_object(code, "code", ["nowhere"])
    lost = compile_object("declare void @gf_lost()\ndefine void @f() {\n call void @gf_lost()\n ret void\n}",
                          TARGET)
    with pytest.raises(CompilerError, match="nothing is called gf_lost"):
        native.load_object(lost, "lost", ["f"])


def test_other_relocations_are_refused() -> None:
    text = "@x = thread_local global i32 1\ndefine ptr @f() {\n ret ptr @x\n}"
    with pytest.raises(CompilerError, match="cannot be loaded"):
        native.load_object(compile_object(text, TARGET), "local", ["f"])


def test_a_forked_child_writes_memory_of_its_own() -> None:
    """Or it would reset the thread pool of its parent."""
    count = native.load_object(compile_object(IR, TARGET), "forked", ["count"]).function(
        "count", ctypes.c_int64, ctypes.c_int64)
    assert count(0) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)       # this process has threads
        child = os.fork()
    if child == 0:
        count(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert count(0) == 5 + 5
