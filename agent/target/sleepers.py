"""What threads sleep in, and since when, seen from outside before they are stopped.

How the samples are used, and why they never have a thread wake early: agent.target.restart.
Times are nanoseconds of CLOCK_MONOTONIC. Sources: proc_pid_syscall(5), kernel/sched/fair.c.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from agent.kernel import syscalls as nr
from agent.procfs.files import read_text
from agent.procfs.sched import parse_sched
from agent.procfs.stat import read_task_stat
from agent.procfs.status import read_voluntary_switches
from agent.procfs.syscall import read_syscall
from agent.target.blocking import (
    EINTR_PRONE,
    LOWEST_ADDRESS,
    RESTARTS_WELL,
    TIMED_CALLS,
    has_limit,
    has_time_limit,
)


class SleepSample(NamedTuple):
    """A thread seen asleep in a system call, before it was interrupted."""

    nr: int
    """The call; in place of restart_syscall the one that it goes on with."""
    args: tuple[int, ...]
    asleep_since_ns: int | None
    """Not earlier than it fell asleep; None where the kernel does not tell."""
    voluntary_switches: int


def sample_sleepers(pid: int, tids: Sequence[int]) -> tuple[dict[int, SleepSample], set[int]]:
    """Return, by tid, what threads with a time limit sleep in; to be called right before they are interrupted.

    Also the tids of those whose call will most likely return EINTR when they are: see hide_eintr().
    """
    delicate: set[int] = set()
    return _sample(pid, tids, delicate), delicate


def sample_sleeper(pid: int, tid: int) -> SleepSample | None:
    """Return what one thread sleeps in, or None when it runs or when how long it has slept does not matter."""
    return _sample(pid, [tid], set()).get(tid)


def _sample(pid: int, tids: Sequence[int], delicate: set[int]) -> dict[int, SleepSample]:
    samples = {}
    starts = {}
    for tid in tids:
        try:
            call = read_syscall(pid, tid)
            if call is None:
                continue
            if call.nr in EINTR_PRONE:
                delicate.add(int(tid))
            if call.nr == nr.NR_restart_syscall:
                switches = read_voluntary_switches(pid, tid)
                number = guess_restarted(read_text(f"/proc/{pid}/task/{tid}/wchan"), call.args)
                if number is not None:
                    samples[int(tid)] = SleepSample(number, call.args, None, switches)
                continue
            if call.nr not in TIMED_CALLS or not has_limit(call.nr, call.args):
                continue
            switches = read_voluntary_switches(pid, tid)
            samples[int(tid)] = SleepSample(call.nr, call.args, None, switches)
            exec_start = _exec_start_ns(f"/proc/{pid}/task/{tid}/sched")
            if exec_start is not None:
                starts[int(tid)] = (read_task_stat(pid, tid).processor, exec_start)
        except OSError:
            continue  # died, or not ours to look at
    # The difference of the clocks is measured after all sleeps have begun: it only grows.
    offsets = _clock_offsets_ns({cpu for cpu, _ in starts.values()})
    for tid, (cpu, exec_start) in starts.items():
        if cpu in offsets:
            samples[tid] = samples[tid]._replace(asleep_since_ns=exec_start + offsets[cpu])
    return samples


def guess_restarted(wchan: str, args: tuple[int, ...]) -> int | None:
    """Tell which call a thread in restart_syscall has made, from the kernel function it sleeps in."""
    if "futex" in wchan:
        return nr.NR_futex
    if "poll" in wchan:
        return nr.NR_poll
    # The sleep proper does not count as a function to sleep in: what shows may be its caller's caller.
    if any(part in wchan for part in ("sleep", "restart_syscall", "do_syscall_64")):
        is_clock = args[0] < LOWEST_ADDRESS or "cpu" in wchan
        return nr.NR_clock_nanosleep if is_clock else nr.NR_nanosleep
    return None


def _exec_start_ns(path: str) -> int | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return parse_sched(file.read(16384)).get("se.exec_start")
    except FileNotFoundError:
        return None  # kernel without CONFIG_SCHED_DEBUG


def _clock_offsets_ns(cpus: Iterable[int]) -> dict[int, int]:
    """Return CLOCK_MONOTONIC minus the scheduler's clock of each CPU, rather too much than too little.

    Measured by going there: a thread that was just put on a CPU has that CPU's clock in its own se.exec_start.
    """
    offsets: dict[int, int] = {}
    if not cpus:
        return offsets
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError:
                continue  # outside our cpuset
            os.sched_yield()
            exec_start = _exec_start_ns("/proc/thread-self/sched")
            # Later than exec_start was taken: the offset comes out too big, the sleep too young.
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            if exec_start is not None:
                offsets[cpu] = now_ns - exec_start
    finally:
        os.sched_setaffinity(0, allowed)
    return offsets


def disturbance(pid: int, tid: int) -> int | None:
    """Return how much a stop would disturb a thread: 0 not at all .. 4; None for one that has ended.

    5: asleep in the kernel so that it stops only when it wakes, which may be at once (a disk) or not (vfork).
    """
    try:
        state = read_task_stat(pid, tid).state
        if state in "ZX":
            return None
        if state == "D":
            return 5
        call = read_syscall(pid, tid)
    except OSError:
        return None
    if call is None:
        return 2  # runs: loses some microseconds
    if call.nr in RESTARTS_WELL:
        return 0 if not has_time_limit(call.nr, call.args) else 1
    if call.nr == nr.NR_restart_syscall:
        return 1
    return 4 if call.nr in EINTR_PRONE else 3
