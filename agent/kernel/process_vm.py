"""process_vm_readv(2) and process_vm_writev(2) between one local buffer and many remote ranges.

The table of remote ranges is an array('Q') of pairs (target address, length): the very layout of struct iovec, handed
to the kernel in place. Local addresses come from the caller, who keeps the buffer alive and warm. Nothing is allocated
here. Both fail with EFAULT where the target itself could not access the memory; /proc/PID/mem can.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from ctypes import addressof, c_int, c_ssize_t, c_uint64, c_ulong, c_void_p
from typing import Any, Final

from agent.kernel.libc import libc, os_error

IOV_MAX: Final = 1024
"""Ranges per call (include/uapi/linux/uio.h, UIO_MAXIOV)."""


class _local_iovec(ctypes.Structure):
    """include/uapi/linux/uio.h, struct iovec; unsigned, so that Python integers fit as they are."""

    _fields_ = [("iov_base", c_uint64), ("iov_len", c_uint64)]


def _prototype(name: str) -> Callable[..., int]:
    function: Any = libc[name]
    function.argtypes = (c_int, c_void_p, c_ulong, c_void_p, c_ulong, c_ulong)
    function.restype = c_ssize_t
    return function  # type: ignore[no-any-return]


_readv = _prototype("process_vm_readv")
_writev = _prototype("process_vm_writev")


def _transfer(
    function: Callable[..., int],
    what: str,
    pid: int,
    local_addr: int,
    local_len: int,
    remote: array[int],
    first: int,
    count: int,
) -> int:
    local = _local_iovec(local_addr, local_len)
    table = remote.buffer_info()[0] + first * 16
    done = 0
    while count > 0:
        nr = min(count, IOV_MAX)
        moved = function(pid, addressof(local), 1, table, nr, 0)
        if moved < 0:
            if done:
                break  # what was moved counts; the next call, if any, hears of the error
            at = remote[2 * first] if first * 2 < len(remote) else 0
            raise os_error(ctypes.get_errno(), what, pid, at)
        done += moved
        if count == nr or moved < sum(remote[2 * first + 1 : 2 * (first + nr) : 2]):
            break
        count -= nr
        first += nr
        table += nr * 16
        local.iov_base = local_addr + done
        local.iov_len = local_len - done
    return done


def readv(
    pid: int, local_addr: int, local_len: int, remote: array[int], first: int, count: int
) -> int:
    """Copy the remote ranges ``first`` .. ``first + count`` of process ``pid`` to ``local_addr``, one after another.

    Returns the bytes copied: less than asked when a page on the way cannot be read or ``local_len`` is used up.

    :raises OSError: nothing could be copied: EFAULT for the first page, ESRCH, EPERM.
    """
    return _transfer(
        _readv, "process_vm_readv", pid, local_addr, local_len, remote, first, count
    )


def writev(
    pid: int, local_addr: int, local_len: int, remote: array[int], first: int, count: int
) -> int:
    """Copy from ``local_addr`` to the remote ranges ``first`` .. ``first + count``; otherwise as readv()."""
    return _transfer(
        _writev, "process_vm_writev", pid, local_addr, local_len, remote, first, count
    )
