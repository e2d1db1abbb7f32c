"""ptrace(2): thin wrappers, one per request that Ferry uses.

ptrace(2): requests must come from the tracer thread, and the tracee must be stopped (all but SEIZE and INTERRUPT).
Nothing here waits; see wait.py. A thread that died, or is not stopped, gives ProcessLookupError. Addresses and
registers are the target's. Sources: include/uapi/linux/ptrace.h, ptrace(2).
"""

from __future__ import annotations

import ctypes
import errno
from ctypes import byref, c_int, c_int32, c_long, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from typing import Final, NamedTuple

from agent.kernel.arch import require_supported_machine, user_regs_struct
from agent.kernel.libc import libc, os_error

PTRACE_CONT: Final = 7
PTRACE_DETACH: Final = 17
PTRACE_GETEVENTMSG: Final = 0x4201
PTRACE_GETREGS: Final = 12
PTRACE_GETREGSET: Final = 0x4204
PTRACE_GETSIGINFO: Final = 0x4202
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_GET_RSEQ_CONFIGURATION: Final = 0x420F
PTRACE_GET_SYSCALL_INFO: Final = 0x420E
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: Final = 0x4211
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_LISTEN: Final = 0x4208
PTRACE_PEEKSIGINFO: Final = 0x4209
PTRACE_SEIZE: Final = 0x4206
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_SETREGS: Final = 13
PTRACE_SETREGSET: Final = 0x4205
PTRACE_SETSIGINFO: Final = 0x4203
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_SINGLESTEP: Final = 9
PTRACE_SYSCALL: Final = 24

PTRACE_EVENT_CLONE: Final = 3
PTRACE_EVENT_EXEC: Final = 4
PTRACE_EVENT_EXIT: Final = 6
PTRACE_EVENT_FORK: Final = 1
PTRACE_EVENT_SECCOMP: Final = 7
PTRACE_EVENT_STOP: Final = 128
PTRACE_EVENT_VFORK: Final = 2
PTRACE_EVENT_VFORK_DONE: Final = 5

PTRACE_O_EXITKILL: Final = 1 << 20
PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21
PTRACE_O_TRACECLONE: Final = 1 << PTRACE_EVENT_CLONE
PTRACE_O_TRACEEXEC: Final = 1 << PTRACE_EVENT_EXEC
PTRACE_O_TRACEEXIT: Final = 1 << PTRACE_EVENT_EXIT
PTRACE_O_TRACEFORK: Final = 1 << PTRACE_EVENT_FORK
PTRACE_O_TRACESECCOMP: Final = 1 << PTRACE_EVENT_SECCOMP
PTRACE_O_TRACESYSGOOD: Final = 1
PTRACE_O_TRACEVFORK: Final = 1 << PTRACE_EVENT_VFORK
PTRACE_O_TRACEVFORKDONE: Final = 1 << PTRACE_EVENT_VFORK_DONE

PTRACE_PEEKSIGINFO_SHARED: Final = 1 << 0
PTRACE_SYSCALL_INFO_ENTRY: Final = 1
PTRACE_SYSCALL_INFO_EXIT: Final = 2
PTRACE_SYSCALL_INFO_NONE: Final = 0
PTRACE_SYSCALL_INFO_SECCOMP: Final = 3

SIGINFO_BYTES: Final = 128
SIGSET_BYTES: Final = 8

# Grows with the CPU (AMX: 11 KiB); the kernel answers how much of the buffer it used.
_LARGEST_REGSET_BYTES: Final = 64 * 1024
_SIGINFOS_PER_CALL: Final = 32


class iovec(ctypes.Structure):
    """include/uapi/linux/uio.h"""

    _fields_ = [("iov_base", c_void_p), ("iov_len", c_size_t)]


class ptrace_peeksiginfo_args(ctypes.Structure):
    """include/uapi/linux/ptrace.h"""

    _fields_ = [("off", c_uint64), ("flags", c_uint32), ("nr", c_int32)]


class ptrace_rseq_configuration(ctypes.Structure):
    """include/uapi/linux/ptrace.h, PTRACE_GET_RSEQ_CONFIGURATION.

    Since Linux kernel commit 90f093fa8ea4 ("rseq, ptrace: Add PTRACE_GET_RSEQ_CONFIGURATION request") (in v5.13).
    """

    _fields_ = [
        ("rseq_abi_pointer", c_uint64),
        ("rseq_abi_size", c_uint32),
        ("signature", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
    ]


class ptrace_sud_config(ctypes.Structure):
    """include/uapi/linux/ptrace.h, PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG.

    Since Linux kernel commit 3f67987cdc09 ("ptrace: Provide set/get interface for syscall user
    dispatch") (in v6.4).
    """

    _fields_ = [
        ("mode", c_uint64),
        ("selector", c_uint64),
        ("offset", c_uint64),
        ("len", c_uint64),
    ]


class RseqConfiguration(NamedTuple):
    """A thread's registered rseq area: target address, length, signature, flags."""

    addr: int
    size: int
    sig: int
    flags: int


_ptrace = libc["ptrace"]
_ptrace.argtypes = (c_long, c_int, c_void_p, c_void_p)
_ptrace.restype = c_long
# Reused, as only the thread that traces may ask. To clear so much each time would cost more than the call.
_regset = (ctypes.c_char * _LARGEST_REGSET_BYTES)()
_regset_view = memoryview(_regset).cast("B")


def _request(request: int, what: str, tid: int, addr: object, data: object) -> int:
    result: int = _ptrace(request, tid, addr, data)
    if result < 0:
        raise os_error(ctypes.get_errno(), f"ptrace({what})", tid)
    return result


def seize(tid: int, options: int = 0) -> None:
    """Attach to ``tid`` without stopping it; ``options`` are PTRACE_O_*."""
    require_supported_machine()
    _request(PTRACE_SEIZE, "PTRACE_SEIZE", tid, 0, options)


def interrupt(tid: int) -> None:
    """Make ``tid`` stop soon (PTRACE_EVENT_STOP); works on a running thread."""
    _request(PTRACE_INTERRUPT, "PTRACE_INTERRUPT", tid, 0, 0)


def cont(tid: int, sig: int = 0) -> None:
    """Let a stopped thread go on, with the signal ``sig`` delivered."""
    _request(PTRACE_CONT, "PTRACE_CONT", tid, 0, sig)


def cont_to_syscall(tid: int, sig: int = 0) -> None:
    """Let a stopped thread go on up to its next system call entry or exit."""
    _request(PTRACE_SYSCALL, "PTRACE_SYSCALL", tid, 0, sig)


def listen(tid: int) -> None:
    """Leave a thread in its group-stop but hear of what ends it."""
    _request(PTRACE_LISTEN, "PTRACE_LISTEN", tid, 0, 0)


def detach(tid: int, sig: int = 0) -> None:
    """Let go of a stopped thread, which runs on with ``sig`` delivered (or stays in its group-stop)."""
    _request(PTRACE_DETACH, "PTRACE_DETACH", tid, 0, sig)


def setoptions(tid: int, options: int) -> None:
    """Replace the PTRACE_O_* of a stopped thread."""
    _request(PTRACE_SETOPTIONS, "PTRACE_SETOPTIONS", tid, 0, options)


def getregs(tid: int) -> user_regs_struct:
    """Return all general registers."""
    regs = user_regs_struct()
    _request(PTRACE_GETREGS, "PTRACE_GETREGS", tid, 0, byref(regs))
    return regs


def setregs(tid: int, regs: user_regs_struct) -> None:
    """Set all general registers; the kernel restarts an interrupted call by rax and orig_rax as usual."""
    _request(PTRACE_SETREGS, "PTRACE_SETREGS", tid, 0, byref(regs))


def getregset(tid: int, nt: int) -> bytes:
    """Return the register set ``nt`` (NT_X86_XSTATE, ...) as the kernel lays it out."""
    iov = iovec(ctypes.addressof(_regset), len(_regset))
    _request(PTRACE_GETREGSET, "PTRACE_GETREGSET", tid, nt, byref(iov))
    if iov.iov_len == len(_regset):  # and may have been cut off
        raise os_error(errno.E2BIG, "ptrace(PTRACE_GETREGSET)", tid, nt)
    return bytes(_regset_view[: iov.iov_len])


def setregset(tid: int, nt: int, data: bytearray) -> None:
    """Set the register set ``nt``."""
    buffer = (ctypes.c_char * len(data)).from_buffer(data)
    iov = iovec(ctypes.addressof(buffer), len(data))
    _request(PTRACE_SETREGSET, "PTRACE_SETREGSET", tid, nt, byref(iov))


def getsigmask(tid: int) -> int:
    """Return the blocked signals; bit n-1 is signal n."""
    mask = c_uint64()
    _request(PTRACE_GETSIGMASK, "PTRACE_GETSIGMASK", tid, SIGSET_BYTES, byref(mask))
    return mask.value


def setsigmask(tid: int, mask: int) -> None:
    """Set the blocked signals; SIGKILL and SIGSTOP are ignored by the kernel."""
    _request(PTRACE_SETSIGMASK, "PTRACE_SETSIGMASK", tid, SIGSET_BYTES, byref(c_uint64(mask)))


def peeksiginfo(tid: int, *, shared: bool) -> list[bytes]:
    """Return the queued signals in order, 128 raw bytes each, without taking them.

    ``shared`` chooses the queue of the process; otherwise it is the thread's own.
    """
    found: list[bytes] = []
    buffer = ctypes.create_string_buffer(SIGINFO_BYTES * _SIGINFOS_PER_CALL)
    flags = PTRACE_PEEKSIGINFO_SHARED if shared else 0
    while True:
        args = ptrace_peeksiginfo_args(len(found), flags, _SIGINFOS_PER_CALL)
        nr = _request(PTRACE_PEEKSIGINFO, "PTRACE_PEEKSIGINFO", tid, byref(args), byref(buffer))
        raw = buffer.raw
        found += [raw[i * SIGINFO_BYTES : (i + 1) * SIGINFO_BYTES] for i in range(nr)]
        if nr < _SIGINFOS_PER_CALL:
            return found


def getsiginfo(tid: int) -> bytes:
    """Return the 128 raw bytes of the signal that stopped the thread; EINVAL in a group-stop."""
    buffer = ctypes.create_string_buffer(SIGINFO_BYTES)
    _request(PTRACE_GETSIGINFO, "PTRACE_GETSIGINFO", tid, 0, byref(buffer))
    return buffer.raw


def setsiginfo(tid: int, info: bytes) -> None:
    """Replace the siginfo of a signal-delivery-stop."""
    if len(info) != SIGINFO_BYTES:
        raise ValueError(f"siginfo has {len(info)} bytes, not {SIGINFO_BYTES}")
    buffer = ctypes.create_string_buffer(info, SIGINFO_BYTES)
    _request(PTRACE_SETSIGINFO, "PTRACE_SETSIGINFO", tid, 0, byref(buffer))


def geteventmsg(tid: int) -> int:
    """Return what the last event stop reports: the new thread's id, the exit status, ..."""
    message = c_uint64()
    _request(PTRACE_GETEVENTMSG, "PTRACE_GETEVENTMSG", tid, 0, byref(message))
    return message.value


def get_rseq_configuration(tid: int) -> RseqConfiguration | None:
    """Return the thread's rseq registration, or None when it has none (or the kernel has no rseq)."""
    config = ptrace_rseq_configuration()
    result = _ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof(config), byref(config))
    if result < 0:
        err = ctypes.get_errno()
        if err == errno.EIO:  # request unknown, kernel built without CONFIG_RSEQ
            return None
        raise os_error(err, "ptrace(PTRACE_GET_RSEQ_CONFIGURATION)", tid)
    if config.rseq_abi_pointer == 0:
        return None
    return RseqConfiguration(
        config.rseq_abi_pointer, config.rseq_abi_size, config.signature, config.flags
    )


def has_user_dispatch(tid: int) -> bool:
    """Tell whether a stopped thread uses Syscall User Dispatch; False where the kernel cannot say."""
    config = ptrace_sud_config()
    result = _ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof(config), byref(config))
    if result < 0:
        err = ctypes.get_errno()
        if err == errno.EIO:  # request unknown
            return False
        raise os_error(err, "ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG)", tid)
    return bool(config.mode)
