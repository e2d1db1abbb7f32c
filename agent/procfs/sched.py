"""/proc/PID/task/TID/sched: when the scheduler last saw a thread run.

Times are nanoseconds of the scheduler's clock, which is close to CLOCK_MONOTONIC but not the same one.
Source: kernel/sched/debug.c, proc_sched_show_task().
"""

from __future__ import annotations

import re
from typing import Final

from agent.procfs.files import read_bytes

_LINE: Final = re.compile(rb"^(\S+) +: +(-?\d+)(?:\.(\d{6}))?$", re.MULTILINE)


def parse_sched(data: bytes) -> dict[str, int]:
    """Return the numbers by name: times (printed as ms with six decimals) in ns, counters as they are."""
    values = {}
    for name, whole, fraction in _LINE.findall(data):
        values[name.decode()] = int(whole + fraction)
    return values


def exec_start_ns(pid: int, tid: int) -> int | None:
    """Return when a thread last ran (for a sleeper: fell asleep), or None where the kernel does not tell.

    :raises ProcessLookupError: it is gone.
    """
    try:
        data = read_bytes(f"/proc/{pid}/task/{tid}/sched")
    except FileNotFoundError:
        return None  # kernel without CONFIG_SCHED_DEBUG
    return parse_sched(data).get("se.exec_start")
