"""/proc/PID/maps: text to records, fast enough for tens of thousands of mappings per round.

The kernel writes the text a page at a time, and without a lock on all of it: of a running target two parts may not fit
together, and what is being cut or joined at that moment may show twice or not at all (seen on 6.18). Paths are as the
kernel prints them: newline as ``\\012``, and `` (deleted)`` after the name of an unlinked file. Addresses are target
addresses.
Source: proc_pid_maps(5).
"""

from __future__ import annotations

import io
import os
import re
from array import array
from functools import lru_cache
from typing import Final, NamedTuple

from agent.procfs.files import read_again

_NEWLINE: Final = 0x0A


class MapsEntry(NamedTuple):
    """One line: [start, end), "rw-p", byte offset in the file, device, inode, and path or "[heap]" or ""."""

    start: int
    end: int
    perms: str
    offset: int
    dev_major: int
    dev_minor: int
    inode: int
    path: str


def parse_maps(data: bytes) -> list[MapsEntry]:
    """Parse the text of /proc/PID/maps. Lines of the last large text give the very same entries as then.

    :raises ValueError: the text is not such a file.
    """
    global _last
    if data and data[-1] != _NEWLINE:
        raise ValueError(f"Not a maps file: last line is cut off: {data[-80:]!r}")
    if len(data) < _LARGE_BYTES:
        return _parse(data)
    text, known = _last
    if data == text:
        return known[:]
    head = data.rfind(b"\n", 0, _equal_head(data, text)) + 1
    tail = data.find(b"\n", len(data) - _equal_tail(data, text, head)) + 1 or len(data)
    nr_head, nr_tail = data.count(b"\n", 0, head), data.count(b"\n", tail)
    entries = known[:nr_head] + _parse(data[head:tail]) + known[len(known) - nr_tail :]
    _last = data, entries[:]
    return entries


_LARGE_BYTES: Final = 1 << 16
_last: tuple[bytes, list[MapsEntry]] = (b"", [])
"""Several parts of the agent look at the same mappings, and keep them: of tens of thousands, once is enough."""


def _equal_head(left: bytes, right: bytes) -> int:
    """Return how many bytes are equal at the beginning of both."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # all before `low` is; what is compared halves each time
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _equal_tail(left: bytes, right: bytes, head: int) -> int:
    """Return how many bytes are equal at the end of both, behind `head`."""
    low, high = 0, min(len(left), len(right)) - head
    while low < high:
        middle = (low + high + 1) // 2
        if left[len(left) - middle : len(left) - low] == right[len(right) - middle : len(right) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def _parse(data: bytes) -> list[MapsEntry]:
    entries: list[MapsEntry] = []
    append = entries.append
    new = tuple.__new__  # what MapsEntry._make does, without its Python frame
    for line in io.BytesIO(data):  # unlike splitlines(): a path may hold "\r"
        addresses, _, tail = line.partition(b" ")
        start, _, end = addresses.partition(b"-")
        append(new(MapsEntry, (int(start, 16), int(end, 16), *_parse_tail(tail))))
    return entries


def parse_bounds(data: bytes) -> array[int]:
    """Return start and end of each mapping, flat, from the text of /proc/PID/maps."""
    bounds: array[int] = array("Q")
    for match in _BOUNDS.finditer(data):
        bounds.append(int(match[1], 16))
        bounds.append(int(match[2], 16))
    return bounds


_BOUNDS: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)


# Most tails are equal ("rw-p 00000000 00:00 0 "), or were seen in the round before.
@lru_cache(maxsize=1 << 16)
def _parse_tail(tail: bytes) -> tuple[str, int, int, int, int, str]:
    # permissions, offset, major:minor, inode, blanks up to column 73, path, newline
    perms, offset, device, inode, *rest = tail[:-1].split(b" ", 4)
    major, _, minor = device.partition(b":")
    path = os.fsdecode(rest[0].lstrip(b" ")) if rest else ""
    return perms.decode(), int(offset, 16), int(major, 16), int(minor, 16), int(inode), path


def read_maps(pid: int) -> bytes:
    """Return the text of /proc/PID/maps; empty for a process without memory (zombie, kernel thread).

    The text that was parsed last, if it is the same, since others keep it too.

    :raises ProcessLookupError: the process is gone.
    """
    return read_again(f"/proc/{pid}/maps", _last[0])
