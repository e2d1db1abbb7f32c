"""/proc/PID/smaps: the VmFlags of each mapping. Costs a walk over all page tables: not for every round.

Addresses are target addresses. Source: Documentation/filesystems/proc.rst (the two-letter flags).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes, read_lines

PROTECTION_KEY: Final = "pkey"
"""Stands among the flags of a mapping with a protection key: the kernel shows it on a line of its own."""


class VmFlags(NamedTuple):
    """The two-letter flags of the mapping [start, end): "rd", "wr", "gd" (grows down), "uw" (uffd-wp), ..."""

    start: int
    end: int
    flags: frozenset[str]


class SmapsEntry(NamedTuple):
    """A mapping's counters in bytes by their names in smaps ("Rss", "Swap", ...), its flags and protection key."""

    start: int
    end: int
    bytes_by_name: dict[str, int]
    flags: frozenset[str]
    protection_key: int


_HEAD: Final = rb"^([0-9a-f]+)-([0-9a-f]+) [rwxsp-]{4} "
_FLAGS: Final = re.compile(_HEAD + rb"|^VmFlags:(.*)$|^ProtectionKey: +([1-9]\d*)$", re.MULTILINE)
_LINE: Final = re.compile(_HEAD + rb"|^(\w+): +(\d+)( kB)?$|^VmFlags:(.*)$", re.MULTILINE)


def parse_vm_flags(data: bytes) -> list[VmFlags]:
    """Parse only what read_vm_flags() returns from the text of smaps."""
    return list(_parse_vm_flags((data,)))


def _parse_vm_flags(pieces: Iterable[bytes]) -> Iterator[VmFlags]:
    # Whole lines; a mapping may begin in one piece and end in another.
    known: dict[bytes, frozenset[str]] = {}
    start = end = 0
    keyed = b""
    for low, high, flags, key in itertools.chain.from_iterable(map(_FLAGS.findall, pieces)):
        if low:
            start, end, keyed = int(low, 16), int(high, 16), b""
            continue
        if key:
            keyed = b" " + PROTECTION_KEY.encode()  # its line comes before that of the flags
            continue
        flags += keyed
        if flags not in known:
            known[flags] = frozenset(flags.decode().split())
        yield VmFlags(start, end, known[flags])


def parse_smaps(data: bytes) -> list[SmapsEntry]:
    """Parse the whole text of smaps."""
    result: list[SmapsEntry] = []
    start = end = 0
    counters: dict[str, int] = {}
    protection_key = 0
    for low, high, name, value, unit, flags in _LINE.findall(data):
        if low:
            start, end = int(low, 16), int(high, 16)
            counters, protection_key = {}, 0
        elif unit:
            counters[name.decode()] = int(value) * 1024
        elif name == b"ProtectionKey":
            protection_key = int(value)
        elif flags:
            vm_flags = frozenset(flags.decode().split())
            result.append(SmapsEntry(start, end, counters, vm_flags, protection_key))
    return result


def read_vm_flags(pid: int) -> list[VmFlags]:
    """Return the flags of every mapping, in address order.

    :raises ProcessLookupError: the process is gone.
    """
    return list(each_vm_flags(pid))


def each_vm_flags(pid: int) -> Iterator[VmFlags]:
    """Yield what read_vm_flags() returns, as it is read."""
    # 700 bytes a mapping: tens of thousands of them are not held as text.
    return _parse_vm_flags(read_lines(f"/proc/{pid}/smaps"))


def read_smaps(pid: int) -> list[SmapsEntry]:
    """Return counters and flags of every mapping, in address order."""
    return parse_smaps(read_bytes(f"/proc/{pid}/smaps"))
