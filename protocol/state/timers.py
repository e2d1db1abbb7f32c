"""Interval timers and POSIX timers of a process.

Every time is what remains as of the freeze, in nanoseconds; 0 remaining is a disarmed timer, or a
periodic SIGALRM whose signal is queued: its next period starts when that is delivered.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register

MAX_TIMER_ID = 0x7FFFFFFF
MAX_TIMERS = 1 << 20
MAX_TIME_NS = (1 << 63) - 1

# include/uapi/asm-generic/siginfo.h
SIGEV_SIGNAL = 0
SIGEV_NONE = 1
SIGEV_THREAD = 2
SIGEV_THREAD_ID = 4


def _check_times(what: str, *times: int) -> None:
    for value in times:
        if not 0 <= value <= MAX_TIME_NS:
            raise ValueError(f"{what}: time {value} ns is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalTimer:
    """One of the three timers of setitimer(2); ``which`` is ITIMER_REAL 0, ITIMER_VIRTUAL 1,
    ITIMER_PROF 2.
    """

    which: int
    remaining_ns: int
    interval_ns: int

    def __post_init__(self) -> None:
        if self.which not in (0, 1, 2):
            raise ValueError(f"interval timer {self.which} does not exist")
        _check_times(f"interval timer {self.which}", self.remaining_ns, self.interval_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class PosixTimer:
    """One timer of timer_create(2); ``notify`` is SIGEV_SIGNAL, SIGEV_NONE or SIGEV_THREAD_ID.

    ``thread_id`` is the thread that SIGEV_THREAD_ID names, as the process itself numbers it, else
    0. ``clock_id`` is signed: negative ones are CPU clocks of a process or a thread. ``overrun``
    is what timer_getoverrun(2) said.
    """

    id: int
    clock_id: int
    notify: int
    signal: int
    sigval: int
    thread_id: int
    remaining_ns: int
    interval_ns: int
    overrun: int

    def __post_init__(self) -> None:
        if not 0 <= self.id <= MAX_TIMER_ID:
            raise ValueError(f"timer id {self.id} is out of range")
        if self.notify not in (SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID):
            raise ValueError(f"timer {self.id} notifies in the unknown way {self.notify}")
        if not 0 <= self.signal <= 64:
            raise ValueError(f"timer {self.id} sends signal {self.signal}")
        _check_times(f"timer {self.id}", self.remaining_ns, self.interval_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimersState:
    """All timers of a process."""

    interval_timers: tuple[IntervalTimer, ...]
    posix_timers: tuple[PosixTimer, ...]

    def __post_init__(self) -> None:
        if len(self.posix_timers) > MAX_TIMERS:
            raise ValueError(f"{len(self.posix_timers)} timers")
        ids = [timer.id for timer in self.posix_timers]
        if ids != sorted(set(ids)):
            raise ValueError("timers are not sorted by id")
        which = [timer.which for timer in self.interval_timers]
        if which != sorted(set(which)):
            raise ValueError("interval timers are not sorted")


register("timers", TimersState, version_id=1, minimum_version_id=1)
