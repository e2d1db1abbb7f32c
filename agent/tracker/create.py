"""Make a userfaultfd inside the target and hold it in the agent.

A userfaultfd belongs to the address space of its creator, so the target itself must call userfaultfd(2): one injected
call. The agent fetches the descriptor and the target's copy is closed at once: when the agent dies the last reference
goes and the kernel unregisters every range. Must never leave the descriptor in the target's table.

UFFD_USER_MODE_ONLY needs no privilege and no sysctl; asynchronous write protection resolves the faults of system calls
under it too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agent.errors import SetupError
from agent.kernel import uffd
from agent.kernel.pidfd import pidfd_getfd
from agent.kernel.syscalls import NR_close, NR_userfaultfd

if TYPE_CHECKING:
    from agent.target.inject import Injector
    from agent.target.tracer import TracedThread

CREATE_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY


def adopt_uffd(pidfd: int, target_fd: int) -> int:
    """Fetch descriptor `target_fd` of the target and do the UFFDIO_API handshake; the caller owns the result.

    :raises SetupError: the kernel lacks a feature that tracking needs.
    """
    fd = pidfd_getfd(pidfd, target_fd)
    try:
        uffd.api(fd, uffd.UFFD_FEATURES_SCAN)
    except OSError as err:
        os.close(fd)
        raise SetupError(
            "Cannot track memory: the kernel has no asynchronous userfaultfd write protection",
            hint="Linux 6.7 or later is needed, with CONFIG_PTE_MARKER_UFFD_WP",
        ) from err
    return fd


def create_uffd(injector: Injector, pidfd: int, thread: TracedThread) -> int:
    """Create a userfaultfd in the stopped target, ready for ScanTracker; the target keeps no copy."""
    from agent.target.inject import Batch

    batch = Batch()
    created = batch.call(NR_userfaultfd, CREATE_FLAGS, name="userfaultfd")
    batch.undo(NR_close, created)
    injector.run(batch, thread)
    target_fd = created.value
    try:
        return adopt_uffd(pidfd, target_fd)
    finally:
        undo = Batch()
        undo.call(NR_close, target_fd, name="close")
        injector.run(undo, thread)
