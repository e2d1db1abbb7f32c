"""/proc/PID/task/TID/sched and schedstat: when the scheduler last saw a thread run, and how long it waited to.

Times are nanoseconds of the scheduler's clock, which is close to CLOCK_MONOTONIC but not the same one.
Sources: kernel/sched/debug.c, proc_sched_show_task(); Documentation/scheduler/sched-stats.rst.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

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


class RunTimes(NamedTuple):
    """What a thread had of the CPUs since it began."""

    ran_ns: int
    waited_ns: int
    """Able to run, with a CPU at work for others."""


def read_run_times(pid: int, tid: int) -> RunTimes | None:
    """Return what a thread ran and waited for a CPU, or None where the kernel does not tell.

    :raises ProcessLookupError: it is gone.
    """
    try:
        ran, waited, _slices = read_bytes(f"/proc/{pid}/task/{tid}/schedstat").split()
    except (FileNotFoundError, ValueError):
        return None  # kernel without CONFIG_SCHED_INFO
    return RunTimes(int(ran), int(waited))
