"""/proc/PID/stat and /proc/PID/task/TID/stat.

Times are in clock ticks, addresses are target addresses; addresses read as 0 without ptrace access.
Source: proc_pid_stat(5).
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes

PF_EXITING: Final = 0x4
"""include/linux/sched.h: in ``Stat.flags``."""


class Stat(NamedTuple):
    """The 52 fields in the kernel's order, by the names of proc_pid_stat(5)."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int
    minflt: int
    cminflt: int
    majflt: int
    cmajflt: int
    utime: int
    stime: int
    cutime: int
    cstime: int
    priority: int
    nice: int
    num_threads: int
    itrealvalue: int
    starttime: int
    vsize: int
    rss: int
    rsslim: int
    start_code: int
    end_code: int
    start_stack: int
    kstkesp: int
    kstkeip: int
    signal: int
    blocked: int
    sigignore: int
    sigcatch: int
    wchan: int
    nswap: int
    cnswap: int
    exit_signal: int
    processor: int
    rt_priority: int
    policy: int
    delayacct_blkio_ticks: int
    guest_time: int
    cguest_time: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int


def parse_stat(data: bytes) -> Stat:
    """Parse the one line of a stat file.

    :raises ValueError: the text is not such a file.
    """
    # The name may hold anything, blanks and parentheses too: it ends at the last parenthesis.
    pid, opening, rest = data.partition(b" (")
    comm, closing, tail = rest.rpartition(b") ")
    fields = tail.split()
    if not opening or not closing or len(fields) < 50:
        raise ValueError(f"Not a stat file: {data[:80]!r}")
    state, *numbers = fields[:50]
    return Stat(int(pid), os.fsdecode(comm), state.decode(), *map(int, numbers))


def read_stat(pid: int) -> Stat:
    """Return the stat of a process.

    :raises ProcessLookupError: it is gone.
    """
    return parse_stat(read_bytes(f"/proc/{pid}/stat"))


def read_state(pid: int) -> str:
    """Return the state of a process, the letter: R, S, D, T, t, Z, X, I; a fraction of what read_stat() costs.

    :raises ProcessLookupError: it is gone.
    """
    return read_bytes(f"/proc/{pid}/stat").rpartition(b") ")[2][:1].decode()


def read_task_stat(pid: int, tid: int) -> Stat:
    """Return the stat of one thread: times, state, last cpu and policy are its own."""
    return parse_stat(read_bytes(f"/proc/{pid}/task/{tid}/stat"))


def is_exiting(pid: int, tid: int) -> bool:
    """Tell whether a thread is gone or on its way out: it has given up what it shared with the others by then."""
    try:
        stat = read_task_stat(pid, tid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(stat.flags & PF_EXITING) or stat.state in "XZ"
