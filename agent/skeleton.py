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
import os
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.kernel.clone import CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWTIME, fork_with
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
class Namespaces:
    """A fresh pid and mount namespace for ``--new-pidns``, held by its init until the end."""

    init_pid: Pid
    mnt_fd: int


@dataclass(slots=True)
class Skeleton:
    """The process being filled: ``pid`` as the agent sees it, ``agent_pidfd`` its descriptor of the agent."""

    pid: Pid
    pidfd: int
    agent_pidfd: int
    init_pid: Pid | None

    def kill(self) -> None:
        """End the skeleton (and its namespace's init) for good; it must not have been released."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        _reap(self.pid)
        if self.init_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init_pid, signal.SIGKILL)
            _reap(self.init_pid)

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


def _reap(pid: Pid) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0x40000000)


def create_skeleton(
    *,
    ns_pid: int,
    code_address: int,
    agent_pidfd: int,
    new_pidns: bool = False,
    clock_offsets: tuple[int, int] | None = None,
) -> Skeleton:
    """Make the process with pid ``ns_pid`` and let it wait in its one page of code.

    ``agent_pidfd`` is the number that its descriptor of the agent gets: above every descriptor of the
    target, and not below FIRST_FREE_FD. ``clock_offsets`` (monotonic, boottime; ns) put it into a time
    namespace of its own.

    :raises RestoreError: when the pid is taken, or a namespace or the process cannot be made.
    """
    own_pidfd = os.pidfd_open(os.getpid())
    try:
        if clock_offsets is not None:
            _new_time_namespace(clock_offsets)
        namespaces = None
        if new_pidns:
            unshare(CLONE_NEWPID)
            if ns_pid != 1:
                namespaces = _start_init()
        program = _program_fd(build_program(_PAUSE_CODE, code_address), "ferry-skeleton")

        def child() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if namespaces is not None:
                setns(namespaces.mnt_fd, CLONE_NEWNS)
            elif new_pidns:
                _fresh_mount_namespace()
            _only_descriptors({own_pidfd: agent_pidfd})

        pid = _spawn(child, program, ns_pid)
        try:
            if namespaces is not None:
                _give_init_its_pidfd(namespaces, pid)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            _reap(pid)
            raise
        os.close(program)
        return Skeleton(
            pid=pid,
            pidfd=os.pidfd_open(pid),
            agent_pidfd=agent_pidfd,
            init_pid=namespaces.init_pid if namespaces is not None else None,
        )
    except OSError as err:
        raise RestoreError(
            f"Cannot create a process with pid {ns_pid}: {err.strerror or err}",
            hint="the pid is taken: use --new-pidns" if err.errno == 17 else "",
        ) from err
    finally:
        os.close(own_pidfd)


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


def _start_init() -> Namespaces:
    """Start the init of the pid namespace that the next children are born in."""
    program = _program_fd(build_program(_INIT_CODE, 0x10000), "ferry-init")
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    receiver, sender = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _fresh_mount_namespace()
            os.write(status_write, b"+")
            _message, fds, _flags, _address = socket.recv_fds(receiver, 1, 1)
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
        _reap(Pid(pid))
        raise OSError(answer[0] if answer else 5, "cannot make a pid and mount namespace")
    namespaces = Namespaces(
        init_pid=Pid(pid), mnt_fd=os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    )
    _init_sockets[pid] = sender
    return namespaces


_init_sockets: dict[int, socket.socket] = {}


def _give_init_its_pidfd(namespaces: Namespaces, pid: Pid) -> None:
    sender = _init_sockets.pop(namespaces.init_pid)
    pidfd = os.pidfd_open(pid)
    try:
        socket.send_fds(sender, [b"."], [pidfd])
    finally:
        os.close(pidfd)
        sender.close()
        os.close(namespaces.mnt_fd)


def _fresh_mount_namespace() -> None:
    """A mount namespace of its own, with a /proc that shows the new pid namespace."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _new_time_namespace(offsets_ns: tuple[int, int]) -> None:
    """Let the next children be born in a time namespace with these clock offsets."""
    unshare(CLONE_NEWTIME)
    with open("/proc/self/timens_offsets", "w", encoding="ascii") as file:
        for clock, offset in zip(("monotonic", "boottime"), offsets_ns, strict=True):
            file.write(f"{clock} {offset // 10**9} {offset % 10**9}\n")
