"""pidfds: fetching descriptors and sending signals. Opening is ``os.pidfd_open``.

Sources: pidfd_getfd(2), pidfd_send_signal(2).
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import c_long
from itertools import repeat

from agent.kernel.libc import check, libc, syscall
from agent.kernel.syscalls import NR_pidfd_getfd, NR_pidfd_send_signal

# Four arguments instead of seven: it is called for each of thousands of files while the target is frozen.
_getfd = libc["syscall"]
_getfd.argtypes = (c_long,) * 4
_getfd.restype = c_long


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Return an own descriptor (CLOEXEC) of the open file that is ``fd`` in the target; the caller closes it.

    Since Linux kernel commit 8649c322f75c ("pid: Implement pidfd_getfd syscall") (in v5.6).

    :raises OSError: EBADF: no such fd; ESRCH: the target is gone; EPERM: no ptrace access.
    """
    return check(_getfd(NR_pidfd_getfd, pidfd, fd, 0), "pidfd_getfd", pidfd, fd)


def pidfd_getfds(pidfd: int, fds: Iterable[int]) -> list[int]:
    """Return an own descriptor of each, as pidfd_getfd(), or -1 of one that cannot be had."""
    return list(map(_getfd, repeat(NR_pidfd_getfd), repeat(pidfd), fds, repeat(0)))


def pidfd_send_signal(pidfd: int, sig: int) -> None:
    """Send ``sig`` (0: only check) to the process of ``pidfd``."""
    syscall(NR_pidfd_send_signal, pidfd, sig, 0, 0)
