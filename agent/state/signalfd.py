"""signalfd(2): only a mask. The signals themselves are pending in the task, and travel with it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_signalfd4
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
from protocol.state.signalfd import SignalFd

KERNEL_SIGSET_BYTES = 8


def dump_signalfd(job: DumpJob, desc: Description) -> SignalFd | None:
    """Describe a signalfd."""
    return SignalFd(mask=fdinfo.signalfd(desc.fdinfo))


def restore_signalfd(job: RestoreJob, items: Sequence[Item[SignalFd]]) -> None:
    """Make every signalfd. It reads the signals of whoever reads it, so the agent may make it."""
    for item in items:
        mask = ctypes.c_uint64(item.body.mask)
        address = ctypes.addressof(mask)
        # -1 is passed as is: a new descriptor.
        fd = syscall(NR_signalfd4, -1, address, KERNEL_SIGSET_BYTES, os.O_CLOEXEC)
        job.put(item, fd)
        set_status_flags(fd, item.file.flags)


KIND = FileKind(
    name="signalfd", dump=dump_signalfd, restore=restore_signalfd, unchanged=always_unchanged
)
