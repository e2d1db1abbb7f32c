"""The skeleton: a nearly empty process with the right pid, which the destination fills.

A tiny program written to a memfd is executed in a new process made with clone3(set_tid). All it has is
one page of code, a stack, the vdso and one descriptor far above those of the target: a pidfd of the agent,
through which it takes whatever the agent has opened. It dies with the agent until the agent lets it go.

``--new-pidns`` gives it pid and mount namespaces of their own with a fresh /proc; a second tiny program is
their init: it reaps orphans and ends with the restored process.

Sources: clone(2), pid_namespaces(7), time_namespaces(7), execveat(2), elf(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.kernel.clone import CLONE_NEWNS, CLONE_NEWPID, fork_with
from agent.kernel.libc import syscall
from agent.kernel.namespaces import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    mount,
    setns,
    unshare,
)
from agent.kernel.prctl import PR_SET_PDEATHSIG, prctl
from agent.types import Pid

AT_EMPTY_PATH = 0x1000
CLOSE_RANGE_CLOEXEC = 4
MFD_EXEC = 0x0010

CODE_BYTES = 4096
"""Address space that the skeleton's program takes at ``code_address``."""

# pause() for ever; the agent finds its first `syscall` instruction here.
_PAUSE_CODE = bytes.fromhex(
    "b822000000"  # 1: mov eax, 34 (pause)
    "0f05"  # syscall
    "ebf7"  # jmp 1b
)

FIRST_FREE_FD = 500
"""Lowest number for descriptors given to a child: above whatever the agent has open by then."""

# The init of a new pid namespace; the pidfd of the restored process always stands at INIT_PIDFD.
INIT_PIDFD = FIRST_FREE_FD
_INIT_CODE = bytes.fromhex(
    # reap: wait4(-1, 0, WNOHANG, 0) until nothing is left
    "48c7c7ffffffff"  # 0: mov rdi, -1
    "31f6"  # xor esi, esi
    "ba01000000"  # mov edx, 1 (WNOHANG)
    "4531d2"  # xor r10d, r10d
    "b83d000000"  # mov eax, 61 (wait4)
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "7fe4"  # jg 0b
    # poll({pidfd, POLLIN}, 1, 500 ms)
    "48b8f401000001000000"  # movabs rax, 0x00000001000001f4: fd 500, events POLLIN
    "50"  # push rax
    "4889e7"  # mov rdi, rsp
    "be01000000"  # mov esi, 1
    "baf4010000"  # mov edx, 500
    "b807000000"  # mov eax, 7 (poll)
    "0f05"  # syscall
    "59"  # pop rcx
    "83f801"  # cmp eax, 1
    "75bf"  # jne 0b
    # the restored process is gone: exit_group(0), and the kernel ends the namespace
    "31ff"  # xor edi, edi
    "b8e7000000"  # mov eax, 231
    "0f05"  # syscall
)

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")


def build_program(code: bytes, address: int) -> bytes:
    """Return a static ELF executable whose only page, at ``address``, holds ``code``."""
    headers = _ELF_HEADER.size + 2 * _PROGRAM_HEADER.size
    size = headers + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = _ELF_HEADER.pack(
        ident, 2, 62, 1, address + headers, _ELF_HEADER.size, 0, 0, _ELF_HEADER.size,
        _PROGRAM_HEADER.size, 2, 0, 0, 0,
    )
    load = _PROGRAM_HEADER.pack(1, 5, 0, address, address, size, size, 0x1000)
    # Without PT_GNU_STACK some kernels make everything readable executable.
    stack = _PROGRAM_HEADER.pack(0x6474E551, 6, 0, 0, 0, 0, 0, 16)
    return elf + load + stack + code


@dataclass(slots=True)
class _Init:
    """The init of a fresh pid and mount namespace; it dies with the agent until it has a process to watch."""

    pid: Pid
    mnt_fd: int
    connection: socket.socket

    def watch(self, pidfd: int) -> None:
        """Leave the agent: the namespace ends with the process of ``pidfd``."""
        socket.send_fds(self.connection, [b"."], [pidfd])

    def close(self) -> None:
        """Close the agent's descriptors."""
        self.connection.close()
        os.close(self.mnt_fd)


@dataclass(slots=True)
class Skeleton:
    """The process being filled: ``pid`` as the agent sees it, ``agent_pidfd`` its descriptor of the agent."""

    pid: Pid
    pidfd: int
    agent_pidfd: int
    init_pid: Pid | None

    def kill(self, reap_threads: Callable[[], None]) -> None:
        """End the skeleton (and its namespace's init) for good; it must not have been released.

        ``reap_threads`` takes the end of every thread but the first from the kernel.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        reap_threads()
        _reap(self.pid)
        if self.init_pid is not None:
            _end(self.init_pid)

    def close(self) -> None:
        """Close the agent's descriptors; the process is left alone."""
        with contextlib.suppress(OSError):
            os.close(self.pidfd)

    def __enter__(self) -> Skeleton:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _end(pid: Pid) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _reap(pid)


def _reap(pid: Pid) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0x40000000)


def create_skeleton(
    *,
    ns_pid: int,
    code_address: int,
    agent_pidfd: int,
    new_pidns: bool = False,
) -> Skeleton:
    """Make the process with pid ``ns_pid`` and let it wait in its one page of code.

    ``agent_pidfd`` is the number that its descriptor of the agent gets: above every descriptor of the
    target, and not below FIRST_FREE_FD.

    :raises RestoreError: when the pid is taken, or a namespace or the process cannot be made.
    """
    with contextlib.ExitStack() as undo:
        try:
            return _create(undo, ns_pid, code_address, agent_pidfd, new_pidns)
        except OSError as err:
            raise RestoreError(
                f"Cannot create a process with pid {ns_pid}: {err.strerror or err}",
                hint="the pid is taken: use --new-pidns" if err.errno == errno.EEXIST else "",
            ) from err


def _create(
    undo: contextlib.ExitStack,
    ns_pid: int,
    code_address: int,
    agent_pidfd: int,
    new_pidns: bool,
) -> Skeleton:
    own_pidfd = _kept(undo, os.pidfd_open(os.getpid()))
    failed = undo.enter_context(contextlib.ExitStack())
    init: _Init | None = None
    if new_pidns:
        # Those after this one are born here again: a receiver serves one migration after another.
        here = _kept(undo, os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
        unshare(CLONE_NEWPID)
        undo.callback(setns, here, CLONE_NEWPID)
        if ns_pid != 1:
            init = _start_init(own_pidfd)
            undo.callback(init.close)
            failed.callback(_end, init.pid)
    program = _kept(undo, _program_fd(build_program(_PAUSE_CODE, code_address), "ferry-skeleton"))

    def child() -> None:
        _die_with(own_pidfd)
        if init is not None:
            setns(init.mnt_fd, CLONE_NEWNS)
        elif new_pidns:
            _fresh_mount_namespace()
        _only_descriptors({own_pidfd: agent_pidfd})

    pid = _spawn(child, program, ns_pid)
    failed.callback(_end, pid)
    skeleton = Skeleton(
        pid=pid,
        pidfd=os.pidfd_open(pid),
        agent_pidfd=agent_pidfd,
        init_pid=init.pid if init is not None else None,
    )
    if init is not None:
        init.watch(skeleton.pidfd)
    failed.pop_all()
    return skeleton


def _kept(undo: contextlib.ExitStack, fd: int) -> int:
    undo.callback(os.close, fd)
    return fd


def _die_with(agent_pidfd: int) -> None:
    """In a child: end with the agent, also when it ended before this was asked for."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ended = select.poll()
    ended.register(agent_pidfd, select.POLLIN)
    if ended.poll(0):
        os._exit(127)


def _spawn(child: Callable[[], None], program: int, ns_pid: int) -> Pid:
    """Fork with a chosen pid, run ``child`` there and execute ``program``; return when that is done."""
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    pid = fork_with(set_tid=(ns_pid,))
    if pid == 0:
        # The agent's own handlers and cleanups must not run here: leave by exec or _exit alone.
        try:
            child()
            empty = ctypes.create_string_buffer(b"")
            vector = (ctypes.c_char_p * 2)(b"ferry", None)
            syscall(
                nr.NR_execveat, program, ctypes.addressof(empty), ctypes.addressof(vector),
                ctypes.addressof(vector) + 8, AT_EMPTY_PATH,
            )  # fmt: skip
        except OSError as err:
            os.write(status_write, struct.pack("<i", err.errno or 5))
        finally:
            os._exit(127)
    os.close(status_write)
    try:
        answer = os.read(status_read, 4)
    finally:
        os.close(status_read)
    if answer:
        _reap(Pid(pid))
        code = struct.unpack("<i", answer)[0]
        raise OSError(code, os.strerror(code))
    return Pid(pid)


def _only_descriptors(moves: dict[int, int]) -> None:
    """In the child: let only ``moves`` survive the exec, under their new numbers.

    The new numbers must not be in use (see FIRST_FREE_FD).
    """
    syscall(nr.NR_close_range, 0, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)
    for source, destination in moves.items():
        os.dup2(source, destination, inheritable=True)


def _program_fd(image: bytes, name: str) -> int:
    try:
        fd = syscall(nr.NR_memfd_create, ctypes.addressof(ctypes.create_string_buffer(name.encode())),
                     os.MFD_CLOEXEC | MFD_EXEC)  # fmt: skip
    except OSError:
        # Kernels before MFD_EXEC (v6.3) refuse the flag; there it is the default.
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, image)
    return fd


def _start_init(own_pidfd: int) -> _Init:
    """Start the init of the pid namespace that the next children are born in."""
    program = _program_fd(build_program(_INIT_CODE, 0x10000), "ferry-init")
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    receiver, sender = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            # Or the agent's end would not show as the end of this connection.
            sender.close()
            _die_with(own_pidfd)
            _fresh_mount_namespace()
            os.write(status_write, b"+")
            _message, fds, _flags, _address = socket.recv_fds(receiver, 1, 1)
            if not fds:
                os._exit(127)
            prctl(PR_SET_PDEATHSIG, 0)
            os.setsid()
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
                signal.signal(signum, signal.SIG_DFL)
            _only_descriptors({fds[0]: INIT_PIDFD})
            os.execve(program, ["ferry-init"], {})
        except OSError as err:
            with contextlib.suppress(OSError):
                os.write(status_write, bytes([min(err.errno or 5, 42)]))
        finally:
            os._exit(127)
    os.close(status_write)
    receiver.close()
    answer = os.read(status_read, 1)
    os.close(status_read)
    os.close(program)
    if answer != b"+":
        sender.close()
        _reap(Pid(pid))
        raise OSError(answer[0] if answer else 5, "cannot make a pid and mount namespace")
    mnt_fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    return _Init(pid=Pid(pid), mnt_fd=mnt_fd, connection=sender)


def _fresh_mount_namespace() -> None:
    """A mount namespace of its own, with a /proc that shows the new pid namespace."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
