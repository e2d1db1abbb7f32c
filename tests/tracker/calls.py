"""System calls as the victim makes them: through libc, answering the result or the negative errno."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from ctypes import c_int, c_long, c_size_t, c_ssize_t, c_ulong, c_void_p
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

MAP_FAILED = 2**64 - 1


def _prototype(name: str, *arguments: Any, result: Any = c_int) -> Callable[..., int]:
    function = libc[name]
    function.argtypes = arguments
    function.restype = result

    def call(*args: Any) -> int:
        value = function(*args)
        return -ctypes.get_errno() if value in (-1, MAP_FAILED) else value or 0

    call.__name__ = name
    return call


sys_mmap = _prototype("mmap", c_void_p, c_size_t, c_int, c_int, c_int, c_long, result=c_void_p)
sys_munmap = _prototype("munmap", c_void_p, c_size_t)
sys_mprotect = _prototype("mprotect", c_void_p, c_size_t, c_int)
sys_madvise = _prototype("madvise", c_void_p, c_size_t, c_int)
sys_mremap = _prototype("mremap", c_void_p, c_size_t, c_size_t, c_int, c_void_p, result=c_void_p)
sys_pread = _prototype("pread", c_int, c_void_p, c_size_t, c_long, result=c_ssize_t)
sys_pwrite = _prototype("pwrite", c_int, c_void_p, c_size_t, c_long, result=c_ssize_t)
sys_recv = _prototype("recv", c_int, c_void_p, c_size_t, c_int, result=c_ssize_t)
sys_sbrk = _prototype("sbrk", c_long, result=c_void_p)
sys_fallocate = _prototype("fallocate", c_int, c_int, c_long, c_long)

_VECTORS = (c_int, c_void_p, c_ulong, c_void_p, c_ulong, c_ulong)
_vm_readv = _prototype("process_vm_readv", *_VECTORS, result=c_ssize_t)
_vm_writev = _prototype("process_vm_writev", *_VECTORS, result=c_ssize_t)


def vm_read(buffer: Any, address: int, length: int) -> int:
    """process_vm_readv of this process's own memory: a plain load would crash where nothing is readable."""
    return _vm_transfer(_vm_readv, buffer, address, length)


def vm_write(buffer: Any, address: int, length: int) -> int:
    """process_vm_writev to this process's own memory, as a debugger does."""
    return _vm_transfer(_vm_writev, buffer, address, length)


def _vm_transfer(function: Callable[..., int], buffer: Any, address: int, length: int) -> int:
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), length)
    remote = (ctypes.c_uint64 * 2)(address, length)
    pid = os.getpid()
    return function(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)


# Machine code, so that stores come from several threads at once without the interpreter's lock.
# hammer(rdi = base, rsi = stride, rdx = words, rcx = times): `lock inc` each word, `times` times.
_HAMMER = bytes.fromhex("4889f8" "4989d0" "f048ff00" "4801f0" "49ffc8" "75f4" "48ffc9" "75e9" "c3")
# touch_stack(rdi = depth): store a byte `depth` bytes below the stack pointer.
_TOUCH_STACK = bytes.fromhex("4889e0" "4829f8" "c60001" "c3")


def _code() -> tuple[mmap.mmap, Any, Any]:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(_HAMMER)] = _HAMMER
    page[64 : 64 + len(_TOUCH_STACK)] = _TOUCH_STACK
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    hammer = ctypes.CFUNCTYPE(None, c_void_p, c_size_t, c_size_t, c_size_t)(address)
    touch_stack = ctypes.CFUNCTYPE(None, c_size_t)(address + 64)
    return page, hammer, touch_stack


_page, hammer, touch_stack = _code()
