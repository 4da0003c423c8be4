"""Links relocatable ELF objects for x86-64 into the process, without LLVM: a program from the cache needs no
code generator.

Sections, symbols and relocations are those of the System V ABI, "AMD64 Architecture Processor Supplement".
The code is position-independent and LLVM's own, so only the few relocations of such code occur.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SECTION = np.dtype([("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("address", "<u8"),
                     ("offset", "<u8"), ("size", "<u8"), ("link", "<u4"), ("info", "<u4"), ("align", "<u8"),
                     ("entry", "<u8")])
_SYMBOL = np.dtype([("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
                    ("size", "<u8")])
_RELOCATION = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_IDENTITY = b"\x7fELF\x02\x01\x01"
_RELOCATABLE, _X86_64 = 1, 62
_SYMBOLS, _RELOCATIONS, _EMPTY = 2, 4, 8              # types of sections
_WRITABLE, _LOADED = 1, 2                             # flags of sections
_ABSOLUTE_64, _RELATIVE, _TABLE = (1,), (2, 4), (9, 41, 42)
"""Relocations: the address; its distance; the distance of the slot of the table that holds it."""
_JUMP = bytes.fromhex("ff25020000006690")
"""Jumps to the address in the eight bytes behind it."""


class Linked(NamedTuple):
    """Code in memory, which is freed with `memory`, and the addresses of the symbols that were asked for."""

    memory: mmap.mmap
    addresses: dict[str, int]


def is_elf(raw: bytes) -> bool:
    """Whether these bytes are an object that `link` takes."""
    head = np.frombuffer(raw[16:20].ljust(4, b"\0"), "<u2")
    return raw.startswith(_IDENTITY) and tuple(head) == (_RELOCATABLE, _X86_64)


def link(raw: bytes, symbols: Sequence[str]) -> Linked:
    """The object's code, ready to run; RuntimeError if it needs a symbol that the process lacks, or lacks one
    of `symbols`.

    All loaded sections lie in one block, the writable ones on pages of their own; the others can be read and
    run afterwards, not written. Functions of the process are reached through stubs, since they may be further
    away than a call reaches.
    """
    start, count = int.from_bytes(raw[40:48], "little"), int.from_bytes(raw[60:62], "little")
    sections = np.frombuffer(raw, _SECTION, count, start)
    table = next((s for s in sections if s["type"] == _SYMBOLS), None)
    if table is None:
        raise RuntimeError("it has no symbols")
    entries = np.frombuffer(raw, _SYMBOL, int(table["size"]) // _SYMBOL.itemsize, int(table["offset"]))
    names = _names(raw, sections[table["link"]], entries)
    places, tables, size = _places(sections, len(entries))
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)     # a child process has its own
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    image = np.frombuffer(memory, np.uint8)
    for section, place in zip(sections, places):
        if section["flags"] & _LOADED and section["type"] != _EMPTY:
            held = int(section["size"])
            image[place:place + held] = np.frombuffer(raw, np.uint8, held, int(section["offset"]))
    found = _addresses(entries, names, base + places)
    _stubs(image[tables:tables + 24 * len(entries)], found)
    outside = (entries["section"] == 0) & (np.arange(len(entries)) > 0)
    called = np.where(outside, base + tables + 16 * np.arange(len(entries)), found)
    slots = base + tables + 16 * len(entries) + 8 * np.arange(len(entries))
    for section in sections:
        if section["type"] == _RELOCATIONS and sections[section["info"]]["flags"] & _LOADED:
            _relocate(raw, section, image, base, int(places[section["info"]]), found, called, slots)
    _protect(base, tables + 24 * len(entries))
    missing = [name for name in symbols if name not in names]
    if missing:
        raise RuntimeError(f"it has no symbol {', '.join(missing)}")
    return Linked(memory, {name: int(found[names.index(name)]) for name in symbols})


def _names(raw: bytes, strings: np.void, entries: np.ndarray) -> list[str]:
    text = raw[int(strings["offset"]):int(strings["offset"] + strings["size"])]
    return [text[start:text.index(b"\0", start)].decode() for start in entries["name"].tolist()]


def _places(sections: np.ndarray, symbols: int) -> tuple[np.ndarray, int, int]:
    """(each section's place in the block, that of the stubs and the slots, the block's size): what can be
    written comes last, on pages of its own."""
    places, at, tables = np.zeros(len(sections), np.int64), 0, 0
    for writable in (False, True):
        for i, s in enumerate(sections):
            if s["flags"] & _LOADED and bool(s["flags"] & _WRITABLE) == writable:
                align = max(int(s["align"]), 1)
                places[i] = at = -(-at // align) * align
                at += int(s["size"])
        if not writable:
            tables = -(-at // 16) * 16
            at = -(-(tables + 24 * symbols) // mmap.PAGESIZE) * mmap.PAGESIZE
    return places, tables, at


def _addresses(entries: np.ndarray, names: Sequence[str], bases: np.ndarray) -> np.ndarray:
    """Where each symbol is; RuntimeError for one that is nowhere."""
    process, found = ctypes.CDLL(None), np.zeros(len(entries), np.int64)
    for i, (section, value) in enumerate(zip(entries["section"].tolist(), entries["value"].tolist())):
        if section:
            found[i] = value + (int(bases[section]) if section < len(bases) else 0)     # else it is absolute
        elif i:
            try:
                found[i] = ctypes.cast(getattr(process, names[i]), ctypes.c_void_p).value or 0
            except AttributeError:
                raise RuntimeError(f"nothing is called {names[i]}") from None
    return found


def _stubs(block: np.ndarray, found: np.ndarray) -> None:
    """Writes a jump to every symbol, then its address."""
    count = len(found)
    jumps = block[:16 * count].reshape(count, 16)
    jumps[:, :8] = np.frombuffer(_JUMP, np.uint8)
    jumps[:, 8:] = block[16 * count:].reshape(count, 8)[...] = found.view(np.uint8).reshape(count, 8)


def _relocate(raw: bytes, section: np.void, image: np.ndarray, base: int, place: int, found: np.ndarray,
              called: np.ndarray, slots: np.ndarray) -> None:
    """Fills in what the section lists; RuntimeError for a kind that position-independent code has not."""
    count = int(section["size"]) // _RELOCATION.itemsize
    entries = np.frombuffer(raw, _RELOCATION, count, int(section["offset"]))
    at = place + entries["offset"].astype(np.int64)
    for kinds, targets, width in ((_RELATIVE, called, 4), (_TABLE, slots, 4), (_ABSOLUTE_64, found, 8)):
        chosen = np.isin(entries["type"], kinds)
        value = targets[entries["symbol"][chosen]] + entries["addend"][chosen]
        if width == 4:
            value = (value - base - at[chosen]).astype(np.int32)
        image[at[chosen][:, None] + np.arange(width)] = value.view(np.uint8).reshape(-1, width)
    other = ~np.isin(entries["type"], (*_RELATIVE, *_TABLE, *_ABSOLUTE_64))
    if other.any():
        raise RuntimeError(f"relocations of type {int(entries['type'][other][0])} are not known")


def _protect(base: int, size: int) -> None:
    """Lets the pages be run and no longer written."""
    process = ctypes.CDLL(None, use_errno=True)
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if process.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(end), mmap.PROT_READ | mmap.PROT_EXEC):
        raise RuntimeError(f"memory cannot be made executable (error {ctypes.get_errno()})")
