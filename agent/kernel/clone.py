"""clone3(2): the argument structure, the flags, and a fork of this process with a chosen pid or new namespaces.

Sources: include/uapi/linux/sched.h, clone(2).
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, c_int32, c_long, c_uint64, sizeof
from typing import Final

from agent.kernel.arch import require_supported_machine
from agent.kernel.libc import check
from agent.kernel.syscalls import NR_clone3

CLONE_CHILD_CLEARTID: Final = 0x00200000
CLONE_CHILD_SETTID: Final = 0x01000000
CLONE_CLEAR_SIGHAND: Final = 0x100000000
CLONE_DETACHED: Final = 0x00400000
CLONE_FILES: Final = 0x00000400
CLONE_FS: Final = 0x00000200
CLONE_INTO_CGROUP: Final = 0x200000000
CLONE_IO: Final = 0x80000000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWNET: Final = 0x40000000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWTIME: Final = 0x00000080
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_PARENT: Final = 0x00008000
CLONE_PARENT_SETTID: Final = 0x00100000
CLONE_PIDFD: Final = 0x00001000
CLONE_PTRACE: Final = 0x00002000
CLONE_SETTLS: Final = 0x00080000
CLONE_SIGHAND: Final = 0x00000800
CLONE_SYSVSEM: Final = 0x00040000
CLONE_THREAD: Final = 0x00010000
CLONE_UNTRACED: Final = 0x00800000
CLONE_VFORK: Final = 0x00004000
CLONE_VM: Final = 0x00000100


class clone_args(ctypes.Structure):
    """include/uapi/linux/sched.h (88 bytes, version 2)."""

    _fields_ = [
        ("flags", c_uint64),
        ("pidfd", c_uint64),
        ("child_tid", c_uint64),
        ("parent_tid", c_uint64),
        ("exit_signal", c_uint64),
        ("stack", c_uint64),
        ("stack_size", c_uint64),
        ("tls", c_uint64),
        ("set_tid", c_uint64),
        ("set_tid_size", c_uint64),
        ("cgroup", c_uint64),
    ]


# PyDLL keeps the GIL over the call. With CDLL another thread could hold it at the very moment of the
# fork, and the child, where that thread does not exist, would wait for it for ever.
_syscall = ctypes.PyDLL(None, use_errno=True)["syscall"]
_syscall.argtypes = (c_long,) * 7
_syscall.restype = c_long

_before_fork = ctypes.pythonapi["PyOS_BeforeFork"]
_before_fork.argtypes = ()
_before_fork.restype = None
_after_fork_parent = ctypes.pythonapi["PyOS_AfterFork_Parent"]
_after_fork_parent.argtypes = ()
_after_fork_parent.restype = None
_after_fork_child = ctypes.pythonapi["PyOS_AfterFork_Child"]
_after_fork_child.argtypes = ()
_after_fork_child.restype = None


def clone3(args: clone_args) -> int:
    """Fork this interpreter by clone3(2), as os.fork does: returns 0 in the child and the pid in the parent.

    Only for flags that give the child its own memory (no CLONE_VM) and for stack == 0.

    :raises OSError: EEXIST: the pid asked for by ``set_tid`` is in use; EPERM: not allowed to choose pids or make
        namespaces; EINVAL.
    """
    require_supported_machine()
    if args.flags & CLONE_VM or args.stack:
        raise ValueError("clone3() of the agent itself cannot share memory")
    _before_fork()
    # Any Python code between here and the hooks runs without its after-fork state: keep it to this one call.
    result: int = _syscall(NR_clone3, addressof(args), sizeof(args), 0, 0, 0, 0)
    if result == 0:
        _after_fork_child()
        return 0
    errno = ctypes.get_errno()
    _after_fork_parent()
    ctypes.set_errno(errno)
    return check(result, "clone3", hex(args.flags))


def fork_with(flags: int = 0, *, set_tid: tuple[int, ...] = (), exit_signal: int = 17) -> int:
    """Fork this interpreter with CLONE_* ``flags`` and the chosen pids (innermost pid namespace first).

    Returns 0 in the child and the pid in the parent; ``exit_signal`` defaults to SIGCHLD. Errors as clone3().
    """
    tids = (c_int32 * len(set_tid))(*set_tid)
    args = clone_args(flags=flags, exit_signal=exit_signal)
    if set_tid:
        args.set_tid = addressof(tids)
        args.set_tid_size = len(set_tid)
    return clone3(args)
