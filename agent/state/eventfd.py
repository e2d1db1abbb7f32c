"""eventfd(2): the counter is in fdinfo and is written into a new one.

Source: proc_pid_fdinfo(5).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from agent.kernel.libc import check, libc
from agent.procfs import fdinfo
from agent.state.openfile import (
    Description,
    DumpJob,
    FileKind,
    Item,
    RestoreJob,
    always_unchanged,
    set_status_flags,
)
from protocol.state.eventfd import EventFd

EFD_SEMAPHORE = 0x1
MAX_COUNT = (1 << 64) - 2

_eventfd = libc["eventfd"]  # os.eventfd came with Python 3.10, but not in every build.


def dump_eventfd(job: DumpJob, desc: Description) -> EventFd | None:
    """Describe an eventfd.

    Since Linux kernel commit 33d8b5d78285 ("eventfd: show flags in fdinfo") (in v6.5), fdinfo tells
    whether it is a semaphore; an older kernel does not, and it is taken for a counter.
    """
    info = fdinfo.eventfd(desc.fdinfo)
    return EventFd(count=min(info.counter, MAX_COUNT), semaphore=bool(info.semaphore))


def restore_eventfd(job: RestoreJob, items: Sequence[Item[EventFd]]) -> None:
    """Make every eventfd with its count."""
    for item in items:
        kind = EFD_SEMAPHORE if item.body.semaphore else 0
        fd = check(_eventfd(0, kind | os.O_CLOEXEC | os.O_NONBLOCK), "eventfd")
        job.put(item, fd)
        if item.body.count:
            os.write(fd, struct.pack("=Q", min(item.body.count, MAX_COUNT)))
        set_status_flags(fd, item.file.flags)


KIND = FileKind(
    name="eventfd", dump=dump_eventfd, restore=restore_eventfd, unchanged=always_unchanged
)
