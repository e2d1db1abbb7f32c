"""timerfd_create(2): remaining time, interval, unread expirations and flags, all from fdinfo.

The kernel reports the time that remains, for absolute timers too. A timer on a clock that all hosts
share (CLOCK_REALTIME) and set to an absolute time keeps that time; any other goes on with what
remained when it was dumped. Timers are armed last, right before the process is released. Times are
nanoseconds.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Sequence

from agent.kernel.ioctl import _IOW, ioctl
from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_timerfd_create, NR_timerfd_gettime, NR_timerfd_settime
from agent.procfs import fdinfo
from agent.state.openfile import (
    Candidates,
    Description,
    DumpJob,
    FileKind,
    Item,
    PreflightJob,
    Recheck,
    RestoreJob,
    set_status_flags,
)
from protocol.state.timerfd import TimerFd

CLOCK_REALTIME = 0
CLOCK_REALTIME_ALARM = 8
TFD_TIMER_ABSTIME = 0x1
TFD_TIMER_CANCEL_ON_SET = 0x2
TFD_CLOEXEC = 0o2000000
NS = 1_000_000_000


class _u64(ctypes.Structure):
    _fields_ = [("value", ctypes.c_uint64)]


# include/uapi/linux/timerfd.h, ioctl on a timerfd. Since Linux kernel commit 5442e9fbd7c2
# ("timerfd: Implement timerfd_ioctl method to restore timerfd_ctx::ticks") (in v3.17), with
# CONFIG_CHECKPOINT_RESTORE.
TFD_IOC_SET_TICKS = _IOW("T", 0, _u64)


def dump_timerfd(job: DumpJob, desc: Description) -> TimerFd | None:
    """Describe a timerfd."""
    info = fdinfo.timerfd(desc.fdinfo)
    if job.content and info.interval_ns and info.ticks and not info.value_ns:
        # A periodic timer stops at its first expiry until somebody reads it or asks for its time;
        # asking makes the kernel count what was missed and go on in the same phase, which the
        # program cannot see.
        spec = ctypes.create_string_buffer(32)
        syscall(NR_timerfd_gettime, job.fetch(desc), ctypes.addressof(spec))
        info = fdinfo.timerfd(fdinfo.read_fdinfo(job.ctx.pid, desc.fd))
    deadline = None
    shared_clock = info.clockid in (CLOCK_REALTIME, CLOCK_REALTIME_ALARM)
    if shared_clock and info.settime_flags & TFD_TIMER_ABSTIME and info.value_ns:
        deadline = time.clock_gettime_ns(time.CLOCK_REALTIME) + info.value_ns
    return TimerFd(
        clockid=info.clockid,
        ticks=info.ticks,
        settime_flags=info.settime_flags & (TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET),
        remaining_ns=info.value_ns,
        interval_ns=info.interval_ns,
        deadline_ns=deadline,
    )


def timerfd_unchanged(check: Recheck, found: Candidates[TimerFd]) -> list[int]:
    """See FileKind. One that runs, or has run out, is a matter of the last moment."""
    return [
        desc.id
        for desc, body in found
        if not body.remaining_ns and not body.ticks and not body.interval_ns
    ]


def preflight_timerfd(job: PreflightJob, items: Sequence[Item[TimerFd]]) -> None:
    """Check that the clocks may be used (alarm clocks need CAP_WAKE_ALARM and a device)."""
    for item in items:
        try:
            os.close(syscall(NR_timerfd_create, item.body.clockid, TFD_CLOEXEC))
        except OSError as err:
            job.refuse(item, "timerfd", f"clock {item.body.clockid} cannot be used: {err.strerror}")


def restore_timerfd(job: RestoreJob, items: Sequence[Item[TimerFd]]) -> None:
    """Make every timer, not armed."""
    for item in items:
        fd = syscall(NR_timerfd_create, item.body.clockid, TFD_CLOEXEC)
        job.put(item, fd)
        set_status_flags(fd, item.file.flags)


def start_timerfd(job: RestoreJob, items: Sequence[Item[TimerFd]]) -> None:
    """Arm every timer."""
    for item in items:
        arm(job.fds[item.id], item.body, elapsed_ns=job.elapsed_ns)


def arm(fd: int, body: TimerFd, *, elapsed_ns: int = 0) -> None:
    """Arm one timer and give it its unread expirations (which arming would reset).

    ``elapsed_ns`` has passed since it was dumped: a timer that ran out meanwhile expires at once, a
    periodic one as often as it would have.
    """
    flags = 0
    value = body.remaining_ns - elapsed_ns
    if body.deadline_ns is not None:
        flags, value = body.settime_flags, body.deadline_ns
    elif body.remaining_ns and value <= 0:
        flags = TFD_TIMER_ABSTIME
        value = max(1, time.clock_gettime_ns(body.clockid) + value)
    if body.remaining_ns:
        spec = struct.pack("=qqqq", *divmod(body.interval_ns, NS), *divmod(value, NS))
        buffer = ctypes.create_string_buffer(spec, len(spec))
        syscall(NR_timerfd_settime, fd, flags, ctypes.addressof(buffer), 0)
    if body.ticks:
        ticks = _u64(body.ticks)
        ioctl(fd, TFD_IOC_SET_TICKS, ctypes.addressof(ticks), "ioctl(TFD_IOC_SET_TICKS)")


KIND = FileKind(
    name="timerfd",
    dump=dump_timerfd,
    restore=restore_timerfd,
    preflight=preflight_timerfd,
    start=start_timerfd,
    unchanged=timerfd_unchanged,
)
