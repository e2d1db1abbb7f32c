"""/proc/PID/limits: resource limits, readable even where prlimit(2) on another process is not allowed.

Source: proc_pid_limits(5), fs/proc/base.c lnames[].
"""

from __future__ import annotations

import re
import resource
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes

RLIM_INFINITY: Final = 2**64 - 1
"""Unlimited, as the kernel's 64-bit rlimits spell it (the resource module says -1)."""

RESOURCE_NAMES: Final[dict[str, int]] = {
    "Max cpu time": resource.RLIMIT_CPU,
    "Max file size": resource.RLIMIT_FSIZE,
    "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK,
    "Max core file size": resource.RLIMIT_CORE,
    "Max resident set": resource.RLIMIT_RSS,
    "Max processes": resource.RLIMIT_NPROC,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max file locks": 10,  # RLIMIT_LOCKS, unknown to the resource module
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}


class Limit(NamedTuple):
    """Soft and hard limit; RLIM_INFINITY for unlimited."""

    soft: int
    hard: int


_LINE: Final = re.compile(rb"^(Max [a-z ]*[a-z]) +(\d+|unlimited) +(\d+|unlimited)", re.MULTILINE)


def parse_limits(data: bytes) -> dict[int, Limit]:
    """Return the limits by RLIMIT_* number; lines of unknown resources are left out."""
    limits = {}
    for name, soft, hard in _LINE.findall(data):
        number = RESOURCE_NAMES.get(name.decode())
        if number is not None:
            limits[number] = Limit(_value(soft), _value(hard))
    return limits


def _value(text: bytes) -> int:
    return RLIM_INFINITY if text == b"unlimited" else int(text)


def read_limits(pid: int) -> dict[int, Limit]:
    """Return the limits of a process.

    :raises ProcessLookupError: it is gone.
    """
    return parse_limits(read_bytes(f"/proc/{pid}/limits"))
