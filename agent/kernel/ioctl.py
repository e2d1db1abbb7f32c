"""Composition of ioctl request numbers, and ioctl(2) itself.

Source: include/uapi/asm-generic/ioctl.h (the layout x86_64 and aarch64 use).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_ulong, c_void_p
from typing import Final

from agent.kernel.libc import check, libc

_IOC_NONE: Final = 0
_IOC_WRITE: Final = 1
_IOC_READ: Final = 2

_ioctl = libc["ioctl"]
_ioctl.argtypes = (c_int, c_ulong, c_void_p)
_ioctl.restype = c_int


def _IOC(direction: int, magic: int | str, nr: int, size: int) -> int:
    if isinstance(magic, str):
        magic = ord(magic)
    return direction << 30 | size << 16 | magic << 8 | nr


def _IO(magic: int | str, nr: int) -> int:
    """Request without an argument."""
    return _IOC(_IOC_NONE, magic, nr, 0)


def _IOR(magic: int | str, nr: int, struct: type[ctypes.Structure]) -> int:
    """Request that reads ``struct`` from the kernel."""
    return _IOC(_IOC_READ, magic, nr, ctypes.sizeof(struct))


def _IOW(magic: int | str, nr: int, struct: type[ctypes.Structure]) -> int:
    """Request that hands ``struct`` to the kernel."""
    return _IOC(_IOC_WRITE, magic, nr, ctypes.sizeof(struct))


def _IOWR(magic: int | str, nr: int, struct: type[ctypes.Structure]) -> int:
    """Request that passes ``struct`` both ways."""
    return _IOC(_IOC_READ | _IOC_WRITE, magic, nr, ctypes.sizeof(struct))


def ioctl(fd: int, request: int, address: int, what: str, *facts: object) -> int:
    """Call ioctl(2) with the address of an argument; ``what`` and ``facts`` name the call if it fails."""
    return check(_ioctl(fd, request, address), what, *facts)


def raw_ioctl(fd: int, request: int, address: int) -> int:
    """Call ioctl(2) where a failure is ordinary and time matters; ``ctypes.get_errno()`` says why it is negative."""
    result: int = _ioctl(fd, request, address)
    return result
