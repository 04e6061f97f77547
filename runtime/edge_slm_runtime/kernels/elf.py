"""Makes an object file a piece of code that runs wherever it lies in memory.

The kernels call nothing and refer to nothing but their own constants, by distance. So a
linker's work comes down to putting the sections behind each other and entering the
distances, and a loader's to mapping the file. (ELF: System V ABI, and its supplement for
AMD64, which names the relocations.)
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_ELF64 = b"\x7fELF\x02\x01"
_AMD64 = 62
_HEADER, _SECTION = struct.Struct("<16s2HI3QI6H"), struct.Struct("<2I4Q2I2Q")
_JUMP = struct.Struct("<Bi")  # to this many bytes after it
_SYMBOL, _RELOCATION = struct.Struct("<I2BH2Q"), struct.Struct("<2Qq")
_SYMBOLS, _RELOCATIONS, _NO_BITS = 2, 4, 8  # kinds of sections
_IN_MEMORY, _WRITABLE = 2, 1  # flags of sections
_DISTANCES = (2, 4)  # R_X86_64_PC32 and PLT32: 32 bits, symbol + addend - place


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def flat_image(code: bytes, entry: str) -> bytes:
    """The code and constants of an object file, with a jump to `entry` at the beginning.

    Raises ValueError for another format, and for code that refers to anything outside.
    """
    if code[:6] != _ELF64 or len(code) < _HEADER.size:
        raise ValueError("not a 64-bit ELF file")
    header = _HEADER.unpack_from(code)
    machine, table, count = header[2], header[6], header[12]
    if machine != _AMD64:
        raise ValueError(f"code for machine {machine}")
    sections = [
        _Section(*_SECTION.unpack_from(code, table + i * _SECTION.size)) for i in range(count)
    ]
    symbols, names = _symbols(code, sections)
    image, places = bytearray(_JUMP.size), dict[int, int]()
    for i, section in enumerate(sections):
        if not section.flags & _IN_MEMORY or not section.size:
            continue
        if section.flags & _WRITABLE or section.kind == _NO_BITS:
            raise ValueError("code with variables")
        image += b"\0" * (-len(image) % max(section.alignment, 1))
        places[i] = len(image)
        image += code[section.offset : section.offset + section.size]
    home, place = symbols[names[entry.encode()]]
    _JUMP.pack_into(image, 0, 0xE9, places[home] + place - _JUMP.size)
    for section in sections:
        if section.kind == _RELOCATIONS and section.info in places:
            _relocate(image, code, section, places, symbols)
    return bytes(image)


def _symbols(
    code: bytes, sections: list[_Section]
) -> tuple[list[tuple[int, int]], dict[bytes, int]]:
    """(section, place in it) by number; numbers by name."""
    table = next(section for section in sections if section.kind == _SYMBOLS)
    strings = sections[table.link].offset
    symbols: list[tuple[int, int]] = []
    names: dict[bytes, int] = {}
    for at in range(table.offset, table.offset + table.size, _SYMBOL.size):
        name, _, _, section, place, _ = _SYMBOL.unpack_from(code, at)
        names[code[strings + name : code.index(b"\0", strings + name)]] = len(symbols)
        symbols.append((section, place))
    return symbols, names


def _relocate(
    image: bytearray,
    code: bytes,
    section: _Section,
    places: dict[int, int],
    symbols: list[tuple[int, int]],
) -> None:
    for at in range(section.offset, section.offset + section.size, _RELOCATION.size):
        offset, info, addend = _RELOCATION.unpack_from(code, at)
        where, place = symbols[info >> 32]
        if info & 0xFFFFFFFF not in _DISTANCES or where not in places:
            raise ValueError("code that refers to something outside")
        here = places[section.info] + offset
        struct.pack_into("<i", image, here, places[where] + place + addend - here)
