"""Namespaces and mounts of this process: setns(2), unshare(2), mount(2), umount2(2), pivot_root(2).

Calls change the calling thread only. CLONE_NEW* are in clone.py. Sources: setns(2), unshare(2), mount(2).
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int, c_ulong
from typing import Final

from agent.kernel.libc import check, libc, syscall
from agent.kernel.syscalls import NR_pivot_root

MNT_DETACH: Final = 2
MS_BIND: Final = 4096
MS_MOVE: Final = 8192
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_NOSUID: Final = 2
MS_PRIVATE: Final = 1 << 18
MS_RDONLY: Final = 1
MS_REC: Final = 16384
MS_REMOUNT: Final = 32
MS_SHARED: Final = 1 << 20
MS_SLAVE: Final = 1 << 19

_setns = libc["setns"]
_setns.argtypes = (c_int, c_int)
_unshare = libc["unshare"]
_unshare.argtypes = (c_int,)
_mount = libc["mount"]
_mount.argtypes = (c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_umount2 = libc["umount2"]
_umount2.argtypes = (c_char_p, c_int)


def setns(fd: int, nstype: int = 0) -> None:
    """Enter the namespace of ``fd`` (a /proc/PID/ns file, or a pidfd with CLONE_NEW* in ``nstype``)."""
    check(_setns(fd, nstype), "setns", fd, hex(nstype))


def unshare(flags: int) -> None:
    """Leave shared namespaces: CLONE_NEW*. New pid and time namespaces count for children only."""
    check(_unshare(flags), "unshare", hex(flags))


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount, bind, move or change propagation."""
    result = _mount(
        os.fsencode(source), os.fsencode(target), fstype.encode(), flags, data.encode() or None
    )
    check(result, "mount", source, target, fstype)


def umount2(target: str, flags: int = 0) -> None:
    """Unmount; MNT_DETACH even if it is busy."""
    check(_umount2(os.fsencode(target), flags), "umount2", target)


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    """Make ``new_root`` the root and put the old one at ``put_old``, below it."""
    new, old = ctypes.create_string_buffer(new_root), ctypes.create_string_buffer(put_old)
    syscall(NR_pivot_root, ctypes.addressof(new), ctypes.addressof(old))
