"""/proc/PID/autogroup: the group in which the scheduler counts the processes of one session.

Between such groups the nice value of the group decides, within one those of its threads (sched(7), "The autogroup
feature"). Where it is switched off, or a CPU cgroup has taken over, the file still reads and writes, without effect.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes

_LINE: Final = re.compile(rb"(/autogroup-\d+) nice (-?\d+)\n")


class Autogroup(NamedTuple):
    """One group; whoever has the same name is in it."""

    name: str
    nice: int


def parse_autogroup(data: bytes) -> Autogroup | None:
    """Parse such a file; None for one that is empty (below) or means something else.

    Empty is that of init's own session, where it never made one, and of a process on its way out.
    """
    match = _LINE.fullmatch(data)
    return None if match is None else Autogroup(match[1].decode(), int(match[2]))


def read_autogroup(pid: int) -> Autogroup | None:
    """Return the group of a process, or None where there are none.

    :raises ProcessLookupError: it is gone.
    """
    try:
        return parse_autogroup(read_bytes(f"/proc/{pid}/autogroup"))
    except FileNotFoundError:
        return None  # kernel without CONFIG_SCHED_AUTOGROUP


def write_own_nice(nice: int) -> None:
    """Set the nice value of the caller's own group.

    :raises PermissionError: below 0 without CAP_SYS_NICE.
    :raises BlockingIOError: one without CAP_SYS_ADMIN did the same less than a tenth of a second ago.
    """
    fd = os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % nice)
    finally:
        os.close(fd)
