"""A timerfd_create(2) timer. Times are nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFd:
    """``remaining_ns`` 0 means disarmed; ``deadline_ns`` is set where the clock is the same on all hosts.

    ``ticks``: expirations that were not read yet. ``settime_flags`` as given to timerfd_settime(2).
    """

    clockid: int
    ticks: int
    settime_flags: int
    remaining_ns: int
    interval_ns: int
    deadline_ns: int | None = None

    def __post_init__(self) -> None:
        if min(self.clockid, self.ticks, self.remaining_ns, self.interval_ns) < 0:
            raise ValueError("a timer field is negative")
        if self.settime_flags & ~0x3:
            raise ValueError(f"timer flags {self.settime_flags:#x} are unknown")
        if self.deadline_ns is not None and self.deadline_ns < 0:
            raise ValueError("timer deadline is negative")
