"""Removes device code for other GPUs from a library, so that the library compresses well.

nvcc puts device code into sections of fat binaries. A fat binary has entries: machine code for one
compute capability each, or PTX, which the driver compiles. The driver reads the entries' headers
and chooses one. This file sets the bodies of entries that it would not choose to zero. Nothing
moves, so all addresses stay right.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SECTIONS = (".nv_fatbin", "__nv_relfatbin")
MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2

# A fat binary's header: magic, version, the header's bytes, the bytes after it.
HEADER = struct.Struct("<IHHQ")
# The beginning of an entry's header: kind, version, the header's bytes, the body's bytes. The
# compute capability is at CAPABILITY_AT.
ENTRY = struct.Struct("<HHIQ")
CAPABILITY_AT = 28


class Entry(NamedTuple):
    """An entry of a fat binary, and where its body is in the file."""

    kind: int
    capability: int  # Such as 90.
    begin: int
    end: int


class Sizes(NamedTuple):
    """The bytes of device code in a library: those that were kept, and those set to zero."""

    kept: int
    zeroed: int


def sections(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield where each section with device code begins and ends in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    for name_at, *_, begin, length in rows:
        at = rows[names][4] + name_at
        if data[at : data.find(b"\0", at)].decode() in SECTIONS:
            yield begin, begin + length


def fat_binaries(data: mmap.mmap, begin: int, end: int) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary of a section.

    Raises:
        ValueError: If the section has another format.
    """
    at = begin
    while at + HEADER.size <= end:
        magic, _, header, length = HEADER.unpack_from(data, at)
        if magic != MAGIC:  # Zeros between two of them.
            at += 8
            continue
        entry, at = at + header, at + header + length
        entries = []
        while entry < at:
            kind, _, header, length = ENTRY.unpack_from(data, entry)
            (capability,) = struct.unpack_from("<I", data, entry + CAPABILITY_AT)
            body = entry + header
            entry = body + length
            if header <= CAPABILITY_AT or not body <= entry <= at <= end:
                raise ValueError(f"Expected device code at byte {body - header}, but got no entry")
            entries.append(Entry(kind, capability, body, entry))
        yield entries


def chosen(entries: Sequence[Entry], capability: int) -> list[Entry]:
    """Return the entries that a GPU of a compute capability may use; none if none fits.

    Machine code runs on GPUs of its major version that are not older. PTX runs on newer ones too,
    but only where no machine code fits.
    """
    fitting = [
        entry
        for entry in entries
        if entry.kind == MACHINE_CODE
        and entry.capability // 10 == capability // 10
        and entry.capability <= capability
    ] or [entry for entry in entries if entry.kind == PTX and entry.capability <= capability]
    newest = max((entry.capability for entry in fitting), default=None)
    return [entry for entry in fitting if entry.capability == newest]


def keep_one_capability(library: Path, capability: int) -> Sizes:
    """Set all device code of a library to zero but that which GPUs of one capability use.

    Returns:
        The sizes; both 0 if the library has no device code.

    Raises:
        ValueError: If it has some, but none for that capability. Then the library is as it was.
    """
    with open(library, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        binaries = [
            entries for begin, end in sections(data) for entries in fat_binaries(data, begin, end)
        ]
        kept = {entry for entries in binaries for entry in chosen(entries, capability)}
        others = [entry for entries in binaries for entry in entries if entry not in kept]
        if others and not kept:
            there_are = sorted({entry.capability for entry in others})
            raise ValueError(
                f"{library.name} has device code for compute capabilities "
                f"{', '.join(map(str, there_are))}, and none that runs on {capability}"
            )
        for entry in others:
            data[entry.begin : entry.end] = bytes(entry.end - entry.begin)
        return Sizes(*(sum(e.end - e.begin for e in part) for part in (kept, others)))
