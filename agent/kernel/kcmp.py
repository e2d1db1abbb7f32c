"""kcmp(2): do two tasks share a kernel object?

Source: include/uapi/linux/kcmp.h.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, c_uint32
from typing import Final

from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_kcmp

KCMP_EPOLL_TFD: Final = 7
KCMP_FILE: Final = 0
KCMP_FILES: Final = 2
KCMP_FS: Final = 3
KCMP_IO: Final = 5
KCMP_SIGHAND: Final = 4
KCMP_SYSVSEM: Final = 6
KCMP_VM: Final = 1


class kcmp_epoll_slot(ctypes.Structure):
    """include/uapi/linux/kcmp.h"""

    _fields_ = [("efd", c_uint32), ("tfd", c_uint32), ("toff", c_uint32)]


def kcmp(pid1: int, pid2: int, kind: int, index1: int = 0, index2: int = 0) -> int:
    """Compare two objects: 0 equal, 1 less, 2 greater, 3 different without order.

    :raises OSError: EBADF: no such fd; ESRCH, EPERM; ENOENT: no such epoll target.
    """
    return syscall(NR_kcmp, pid1, pid2, kind, index1, index2)


def kcmp_file(pid1: int, pid2: int, fd1: int, fd2: int) -> int:
    """Compare two open file descriptions: 0 same, 1 less, 2 greater (a total order of this boot)."""
    return kcmp(pid1, pid2, KCMP_FILE, fd1, fd2)


def kcmp_epoll_tfd(pid1: int, pid2: int, fd: int, epfd: int, tfd: int, toff: int = 0) -> int:
    """Compare the file of ``fd`` (in ``pid1``) with the one that epoll ``epfd`` (in ``pid2``) watches as ``tfd``.

    ``toff`` tells apart several targets that were added under the same number.
    """
    slot = kcmp_epoll_slot(epfd, tfd, toff)
    return kcmp(pid1, pid2, KCMP_EPOLL_TFD, fd, addressof(slot))
