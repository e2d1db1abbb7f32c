"""Room for a page of code in the target: the unused tail of its vdso, or of another executable mapping.

The tail holds the routine (routine_x86_64) and what a thread needs to find its way back by itself, so it is written
before any register is changed and cleaned after the last one is restored. Writes go through /proc/PID/mem, which gives
the target a private copy of the page; nothing shows in its maps.

Layout, from the start of the tail: a header (magic, turn), the routine, four slots for a block with its exit stub, and
stubs for blocks in the scratch mapping. Two slots are in use, one for the thread that unmaps and one for whichever
other thread is just being sent into the routine or fetched back. The other two belong to the next agent, which may
find what a killed one left: threads that are healing may have a few instructions to go, so it writes the same code
over itself and uses the slots that they do not.

Addresses are target addresses.
"""

from __future__ import annotations

import contextlib
import struct
import time
from typing import Final, NamedTuple

from agent.errors import InjectError
from agent.kernel.procmap import ProcmapQuery
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.process import list_tids
from agent.procfs.status import read_signal_sets
from agent.procfs.syscall import read_syscall
from agent.target import routine_x86_64 as routine
from agent.target.memory import TargetMemory
from agent.types import PAGE_SIZE

_MAGIC: Final = b"Ferry\x00\x01\x00"
_HEADER: Final = struct.Struct("<8sQ")
_CODE_OFFSET: Final = 16
_SLOT_BYTES: Final = routine.BLOCK_BYTES + routine.EXIT_BYTES
_SLOTS_OFFSET: Final = (_CODE_OFFSET + len(routine.ROUTINE) + 15) & ~15
_STUBS_OFFSET: Final = _SLOTS_OFFSET + 4 * _SLOT_BYTES
MIN_BYTES: Final = _STUBS_OFFSET + routine.EXIT_BYTES
"""Least room that will do: stubs for one thread besides the leader."""
ALL_BLOCKED: Final = ~((1 << 8) | (1 << 18)) & (1 << 64) - 1
"""Every signal but SIGKILL and SIGSTOP, as the kernel shows it."""
_HEALING_LIMIT_S: Final = 5.0
_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")


class TailPlace(NamedTuple):
    """Where a tail is: [start, end), the end of a mapping."""

    start: int
    end: int
    mapping: int
    """Where the mapping begins, which is the vdso's image; 0: it is a file."""


class Tail:
    """The occupied tail of one process; restore() cleans it."""

    def __init__(self, memory: TargetMemory, place: TailPlace) -> None:
        self._memory = memory
        self.start = place.start
        self.nr_stubs = min((place.end - place.start - _STUBS_OFFSET) // routine.EXIT_BYTES, 64)
        """How many different return addresses there is room for, besides the leader's."""
        self._nr_bytes = _STUBS_OFFSET + self.nr_stubs * routine.EXIT_BYTES
        old = memory.read(self.start, self._nr_bytes)
        magic, turn = _HEADER.unpack_from(old)
        leftover = magic == _MAGIC
        self._old = bytes(self._nr_bytes) if leftover else old
        self._turn = 1 - (turn & 1) if leftover else 0
        code = self.start + _CODE_OFFSET
        self.map = code + routine.MAP
        self.unmap = code + routine.UNMAP
        self.heal = code + routine.HEAL
        self.batch = code + routine.BATCH
        self.gather = code + routine.GATHER
        self.join = code + routine.JOIN
        self.block = self.start + _SLOTS_OFFSET + self._turn * 2 * _SLOT_BYTES
        """Block of the thread that unmaps."""
        self.passing = self.block + _SLOT_BYTES
        """Block of a thread on its way in or out."""

    def write(self) -> None:
        """Write the routine."""
        self._memory.write(self.start, _HEADER.pack(_MAGIC, self._turn) + routine.ROUTINE)

    def write_slot(self, slot: int, block: bytes, return_rip: int) -> None:
        """Write a thread's way back; `block` must name stub_of(slot) as its stub."""
        self._memory.write(slot, self.make_slot(block, return_rip))

    @staticmethod
    def make_slot(block: bytes, return_rip: int) -> bytes:
        """Return what write_slot() writes."""
        return block + routine.EXIT_TAIL + return_rip.to_bytes(8, "little")

    @staticmethod
    def stub_of(slot: int) -> int:
        """Address of the exit stub of a slot (`block` or `passing`)."""
        return slot + routine.BLOCK_BYTES

    def write_stubs(self, rips: list[int]) -> dict[int, int]:
        """Write stubs for blocks in the scratch mapping; return the stub's address by return address."""
        first = self.start + _STUBS_OFFSET
        parts = []
        stubs = {}
        for index, rip in enumerate(rips):
            code = routine.EXIT_SCRATCH + struct.pack("<Q", rip)
            parts.append(code.ljust(routine.EXIT_BYTES, b"\xcc"))
            stubs[rip] = first + index * routine.EXIT_BYTES
        self._memory.write(first, b"".join(parts))
        return stubs

    def restore(self) -> None:
        """Put back what was there; no thread may have a register in the tail any more."""
        self._memory.write(self.start, self._old)

    def __contains__(self, vaddr: int) -> bool:
        return self.start <= vaddr < self.start + self._nr_bytes


def find_tail(memory: TargetMemory, known: TailPlace | None = None) -> TailPlace:
    """Return a place with room for the code; ``known`` is one found before, which is there in general.

    :raises InjectError: there is none. :raises OSError: the process is gone.
    """
    if known is not None and _is_still_there(memory, known):
        return known
    lines = [line for line in read_maps(memory.pid).splitlines() if b" r-xp " in line]
    maps = parse_maps(b"\n".join(lines) + b"\n")
    for entry in maps:
        if entry.path == "[vdso]":
            place = _after_elf(memory, entry.start, entry.end)
            if place is not None:
                return place
    for entry in maps:
        if entry.perms == "r-xp" and entry.inode:
            place = _after_content(memory, entry)
            if place is not None:
                return place
    raise InjectError(
        f"Process {memory.pid} has no {MIN_BYTES} unused bytes in an executable mapping",
        hint="a process without vdso is not supported",
    )


def _is_still_there(memory: TargetMemory, place: TailPlace) -> bool:
    if not place.mapping:
        return False
    try:
        with contextlib.closing(ProcmapQuery(memory.pid)) as query:
            found = query.covering(place.mapping)
            if found != (place.mapping, place.end) or not query.is_executable:
                return False
        return _after_elf(memory, place.mapping, place.end) == place
    except OSError:
        return False


def _after_elf(memory: TargetMemory, image: int, end: int) -> TailPlace | None:
    # What counts is where the image ends, not where zeros begin: a killed agent's code may be there.
    header = _ELF_HEADER.unpack(memory.read(image, _ELF_HEADER.size))
    ident, sections_offset, section_bytes, nr_sections = (
        header[0],
        header[6],
        header[11],
        header[12],
    )
    if ident[:5] != b"\x7fELF\x02" or not sections_offset:
        return None
    used = sections_offset + section_bytes * nr_sections
    start = image + ((used + 15) & ~15)
    return TailPlace(start, end, image) if start + MIN_BYTES <= end else None


def _after_content(memory: TargetMemory, entry: MapsEntry) -> TailPlace | None:
    try:
        page = memory.read(entry.end - PAGE_SIZE, PAGE_SIZE)
    except OSError:
        return None  # beyond the end of the file
    at = page.find(_MAGIC)
    used = at if at >= 0 and at % 16 == 0 else len(page.rstrip(b"\0")) + 15 & ~15
    start = entry.end - PAGE_SIZE + used
    return TailPlace(start, entry.end, 0) if start + MIN_BYTES <= entry.end else None


def wait_healed(pid: int, memory: TargetMemory) -> TailPlace | None:
    """Wait until no thread is on the way back from what a killed agent made it do; normally returns at once.

    Returns where the tail is, if there is one.
    """
    try:
        place = find_tail(memory)
        magic, _slot = _HEADER.unpack(memory.read(place.start, _HEADER.size))
    except (InjectError, OSError):
        return None  # whoever needs the tail will say what is wrong
    if magic != _MAGIC:
        return place
    deadline = time.monotonic() + _HEALING_LIMIT_S
    while time.monotonic() < deadline and any(_is_healing(pid, t, place) for t in list_tids(pid)):
        time.sleep(0.01)
    return place


def _is_healing(pid: int, tid: int, place: TailPlace) -> bool:
    try:
        blocked_in = read_syscall(pid, tid)
        if blocked_in is not None:
            return place.start <= blocked_in.pc < place.end
        return read_signal_sets(pid, tid).sig_blk == ALL_BLOCKED
    except OSError:
        return False  # died
