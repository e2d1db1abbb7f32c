"""/proc/PID/timers: the POSIX timers of a process, as timer_create(2) made them.

Needs CONFIG_CHECKPOINT_RESTORE in the kernel. Expiry and overrun are not here: timer_gettime(2) inside the target.
Source: proc_pid_timers(5).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes


class PosixTimer(NamedTuple):
    """One timer: its id, the sigevent it was created with, and its clock."""

    id: int
    signo: int
    sigval: int
    notify: str
    """"signal", "none" or "thread" (SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD)."""
    is_tid: bool
    """Whether the signal goes to one thread (SIGEV_THREAD_ID)."""
    target: int
    """The pid, or the tid, as this pid namespace sees it; 0 if it cannot."""
    clockid: int


_TIMER: Final = re.compile(
    rb"ID: (\d+)\nsignal: (\d+)/([0-9a-fx]+)\nnotify: (\w+)/(tid|pid)\.(-?\d+)\nClockID: (-?\d+)\n"
)


def parse_timers(data: bytes) -> list[PosixTimer]:
    """Parse the text of a timers file.

    :raises ValueError: something in it is not understood.
    """
    timers = [
        PosixTimer(
            int(number),
            int(signo),
            int(sigval, 16),
            notify.decode(),
            kind == b"tid",
            int(target),
            int(clockid),
        )
        for number, signo, sigval, notify, kind, target, clockid in _TIMER.findall(data)
    ]
    if len(timers) != data.count(b"ID: ") - data.count(b"ClockID: "):
        raise ValueError(f"Not a timers file: {data[:120]!r}")
    return timers


def read_timers(pid: int) -> list[PosixTimer]:
    """Return the timers of a process in order of their ids.

    :raises ProcessLookupError: it is gone.
    :raises FileNotFoundError: the kernel has no such file.
    """
    return sorted(parse_timers(read_bytes(f"/proc/{pid}/timers")))
