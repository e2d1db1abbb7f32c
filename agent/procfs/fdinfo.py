"""/proc/PID/fdinfo/FD: what the kernel tells of an open file.

Source: proc_pid_fdinfo(5), Documentation/filesystems/proc.rst. Numbers in the text have three bases; each field is
parsed by its own here.
"""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes


class FdInfo(NamedTuple):
    """Fields common to all files, and every line as (name, text) in order."""

    pos: int
    flags: int
    """F_GETFL flags, plus O_CLOEXEC if the descriptor has it."""
    mnt_id: int
    ino: int
    lines: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str | None:
        """Return the text of the first line called ``name``."""
        return next((text for key, text in self.lines if key == name), None)

    def get_all(self, name: str) -> list[str]:
        """Return the texts of all lines called ``name`` ("tfd", "lock", ...)."""
        return [text for key, text in self.lines if key == name]

    @property
    def cloexec(self) -> bool:
        """Whether the descriptor is closed by exec."""
        return bool(self.flags & os.O_CLOEXEC)


class EventfdInfo(NamedTuple):
    """eventfd(2). ``semaphore`` is None on kernels that do not tell (before v6.5)."""

    counter: int
    semaphore: bool | None


class EpollTarget(NamedTuple):
    """One watched file: number it was added under, EPOLL* events, user data, and the file's identity."""

    tfd: int
    events: int
    data: int
    pos: int
    ino: int
    sdev: int


class TimerfdInfo(NamedTuple):
    """timerfd_create(2); times in ns, ``value_ns`` is what remains until expiry."""

    clockid: int
    ticks: int
    settime_flags: int
    value_ns: int
    interval_ns: int


class InotifyWatch(NamedTuple):
    """One watch; ``sdev`` in the kernel's own encoding (major << 20 | minor)."""

    wd: int
    ino: int
    sdev: int
    mask: int
    handle_type: int
    handle: bytes


class FileLock(NamedTuple):
    """One lock line: kind FLOCK, POSIX, OFDLCK or LEASE; ``end`` -1 means to the end of the file."""

    kind: str
    mandatory: bool
    access: str
    pid: int
    device: str
    ino: int
    start: int
    end: int


def parse_fdinfo(data: bytes) -> FdInfo:
    """Parse the text of a fdinfo file."""
    lines = [found for line in os.fsdecode(data).split("\n") if (found := _parse_line(line)) is not None]
    first = dict(reversed(lines))
    return FdInfo(
        pos=int(first.get("pos", "0")),
        flags=int(first.get("flags", "0"), 8),
        mnt_id=int(first.get("mnt_id", "-1")),
        ino=int(first.get("ino", "0")),
        lines=tuple(lines),
    )


# All but the inode number is the same in most of thousands of them, and kept for each.
@lru_cache(maxsize=256)
def _parse_line(line: str) -> tuple[str, str] | None:
    if line.startswith("inotify "):
        return "inotify", line[8:]
    name, colon, text = line.partition(":")
    return (sys.intern(name), text.strip(" \t")) if colon else None


def read_fdinfo(pid: int, fd: int) -> FdInfo:
    """Return what the kernel tells of ``fd`` of ``pid``.

    :raises ProcessLookupError: the process is gone.
    :raises FileNotFoundError: it has no such fd.
    """
    return parse_fdinfo(read_bytes(f"/proc/{pid}/fdinfo/{fd}"))


def _need(info: FdInfo, name: str) -> str:
    text = info.get(name)
    if text is None:
        raise ValueError(f"fdinfo has no field {name}")
    return text


def eventfd(info: FdInfo) -> EventfdInfo:
    """Return the eventfd fields; ValueError if it is not an eventfd."""
    semaphore = info.get("eventfd-semaphore")
    return EventfdInfo(
        int(_need(info, "eventfd-count"), 16), None if semaphore is None else semaphore != "0"
    )


def signalfd(info: FdInfo) -> int:
    """Return the signal mask of a signalfd as a bit set (bit n-1 is signal n)."""
    return int(_need(info, "sigmask"), 16)


_EPOLL: Final = re.compile(
    r"\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+)"
    r"(?:\s+pos:\s*(-?\d+) ino:\s*([0-9a-f]+) sdev:\s*([0-9a-f]+))?"
)


def epoll(info: FdInfo) -> list[EpollTarget]:
    """Return the watched files of an epoll fd, in the kernel's order (by file, then number)."""
    targets = []
    for text in info.get_all("tfd"):
        match = _EPOLL.match(text)
        if match is None:
            raise ValueError(f"fdinfo has a strange epoll line: {text!r}")
        tfd, events, data, pos, ino, sdev = match.groups("0")
        targets.append(
            EpollTarget(
                int(tfd), int(events, 16), int(data, 16), int(pos), int(ino, 16), int(sdev, 16)
            )
        )
    return targets


_TIMESPEC: Final = re.compile(r"\((\d+), (\d+)\)")


def _timespec_ns(text: str) -> int:
    match = _TIMESPEC.match(text)
    if match is None:
        raise ValueError(f"fdinfo has a strange time: {text!r}")
    return int(match[1]) * 1_000_000_000 + int(match[2])


def timerfd(info: FdInfo) -> TimerfdInfo:
    """Return the timerfd fields."""
    return TimerfdInfo(
        int(_need(info, "clockid")),
        int(_need(info, "ticks")),
        int(_need(info, "settime flags"), 8),
        _timespec_ns(_need(info, "it_value")),
        _timespec_ns(_need(info, "it_interval")),
    )


def inotify(info: FdInfo) -> list[InotifyWatch]:
    """Return the watches of an inotify fd."""
    watches = []
    for text in info.get_all("inotify"):
        pairs = dict(word.partition(":")[::2] for word in text.split())
        watches.append(
            InotifyWatch(
                int(pairs["wd"], 16),
                int(pairs["ino"], 16),
                int(pairs["sdev"], 16),
                int(pairs["mask"], 16),
                int(pairs.get("fhandle-type", "0"), 16),
                bytes.fromhex(pairs.get("f_handle", "")),
            )
        )
    return watches


def locks(info: FdInfo) -> list[FileLock]:
    """Return the locks held through this open file (flock and OFD) or by its process (POSIX)."""
    found = []
    for text in info.get_all("lock"):
        words = text.split()
        # 1: FLOCK ADVISORY WRITE 359 00:13:11691 0 EOF; a waiter has "->" after the number: not ours
        if len(words) != 8 or words[1] == "->":
            continue
        _, kind, mode, access, pid, place, start, end = words
        device, _, ino = place.rpartition(":")
        last = -1 if end == "EOF" else int(end)
        found.append(
            FileLock(kind, mode == "MANDATORY", access, int(pid), device, int(ino), int(start), last)
        )
    return found
