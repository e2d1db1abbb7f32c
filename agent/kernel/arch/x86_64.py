"""Registers and system call convention of x86_64.

Facts only, no decisions. Sources: arch/x86/include/uapi/asm/ptrace.h, arch/x86/include/asm/user_64.h,
include/uapi/linux/elf.h, syscall(2).
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint64
from typing import Final

MACHINE: Final = "x86_64"
"""As uname(2) and the handshake spell it."""
SYSCALL_INSTRUCTION: Final = b"\x0f\x05"
"""The bytes of ``syscall``; it destroys rcx and r11."""
SYSCALL_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
"""Registers of the six arguments, in order; number in rax, result in rax."""
RED_ZONE_BYTES: Final = 128
"""Bytes below rsp that belong to the running function (System V ABI)."""

NT_PRSTATUS: Final = 1
NT_PRFPREG: Final = 2
NT_X86_SHSTK: Final = 0x204
NT_X86_XSTATE: Final = 0x202

# Segment selectors tell the mode of a thread: 32-bit code runs with USER32_CS.
USER32_CS: Final = 0x23
USER_CS: Final = 0x33

# arch/x86/include/uapi/asm/prctl.h
ARCH_GET_CPUID: Final = 0x1011
ARCH_GET_FS: Final = 0x1003
ARCH_GET_GS: Final = 0x1004
ARCH_GET_XCOMP_GUEST_PERM: Final = 0x1024
ARCH_GET_XCOMP_PERM: Final = 0x1022
ARCH_GET_XCOMP_SUPP: Final = 0x1021
ARCH_MAP_VDSO_64: Final = 0x2003
ARCH_REQ_XCOMP_PERM: Final = 0x1023
ARCH_SET_CPUID: Final = 0x1012
ARCH_SET_FS: Final = 0x1002
ARCH_SET_GS: Final = 0x1001
ARCH_SHSTK_STATUS: Final = 0x5005


class user_regs_struct(ctypes.Structure):
    """arch/x86/include/asm/user_64.h: what PTRACE_GETREGS gives; all unsigned 64-bit."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    _fields_ = [
        ("r15", c_uint64),
        ("r14", c_uint64),
        ("r13", c_uint64),
        ("r12", c_uint64),
        ("rbp", c_uint64),
        ("rbx", c_uint64),
        ("r11", c_uint64),
        ("r10", c_uint64),
        ("r9", c_uint64),
        ("r8", c_uint64),
        ("rax", c_uint64),
        ("rcx", c_uint64),
        ("rdx", c_uint64),
        ("rsi", c_uint64),
        ("rdi", c_uint64),
        ("orig_rax", c_uint64),
        ("rip", c_uint64),
        ("cs", c_uint64),
        ("eflags", c_uint64),
        ("rsp", c_uint64),
        ("ss", c_uint64),
        ("fs_base", c_uint64),
        ("gs_base", c_uint64),
        ("ds", c_uint64),
        ("es", c_uint64),
        ("fs", c_uint64),
        ("gs", c_uint64),
    ]

    def copy(self) -> user_regs_struct:
        """Return an independent copy."""
        return user_regs_struct.from_buffer_copy(self)

    def to_bytes(self) -> bytes:
        """Return the raw kernel layout (216 bytes)."""
        return bytes(self)

    @property
    def result(self) -> int:
        """rax as a signed number: what a finished system call returned."""
        rax = self.rax
        return rax - (1 << 64) if rax >> 63 else rax

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, user_regs_struct):
            return NotImplemented
        return bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name):#x}" for name, *_ in self._fields_)
        return f"user_regs_struct({values})"
