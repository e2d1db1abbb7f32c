"""What of a process, apart from its memory and files, stands in the way of moving it: all
obstacles at once.

The target runs on and is not touched: everything comes from /proc and kcmp(2). What Ferry cannot
see from outside it cannot check: keyrings, Landlock rules, Syscall User Dispatch (found when the
process is stopped). Each obstacle has a hint. Sources: proc(5), kcmp(2), namespaces(7).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from agent.kernel.kcmp import KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_SYSVSEM, KCMP_VM, kcmp
from agent.procfs.files import read_bytes, read_link
from agent.procfs.process import (
    list_children,
    list_tids,
    read_ns,
)
from agent.procfs.stat import is_exiting, read_stat
from agent.procfs.status import Status, read_status, read_task_status
from agent.procfs.timers import read_timers
from agent.state.paths import leads_to
from agent.state.timers import check_timers
from agent.types import Obstacle

if TYPE_CHECKING:
    from agent.state.context import DumpContext

_PF_KTHREAD: Final = 0x00200000
_ELFCLASS64: Final = 2
_NAMESPACES: Final = {
    "user": "its user ids and capabilities mean something else there",
    "mnt": "its paths lead to other files than the agent's",
    "net": "its sockets live in another network stack than the agent's",
    "ipc": "its System V objects and message queues are not the agent's",
}
# Names of mappings that stand for something the kernel keeps elsewhere.
_MAPPINGS: Final = (
    (re.compile(rb" /SYSV[0-9a-f]{8}"), "sysv-shm", "a System V shared memory segment is attached"),
    (re.compile(rb" /\[aio\]"), "aio", "an asynchronous I/O context (io_setup) exists"),
    (re.compile(rb"anon_inode:\[io_uring\]"), "io_uring", "the rings of an io_uring are mapped"),
)


def check_task(ctx: DumpContext) -> list[Obstacle]:
    """Return every obstacle of the process ``ctx.pid``; empty when it can be moved.

    :raises ProcessLookupError: the process is gone.
    """
    pid = ctx.pid
    status = read_status(pid)
    if impossible := list(_impossible(pid, status)):
        return impossible  # nothing else can be asked about such a task
    checks: tuple[Callable[[int, Status], Iterator[Obstacle]], ...] = (
        _relatives,
        _tracer,
        _threads,
        _program,
        _sharing,
        _namespaces,
        _terminal,
        _directories,
        _mappings,
        _timers,
        _semaphores,
        _security_label,
    )
    found: list[Obstacle] = []
    for check in checks:
        try:
            found += check(pid, status)
        except PermissionError as err:
            found.append(_no_permission(pid, err))
    return list(dict.fromkeys(found))


def _no_permission(pid: int, err: PermissionError) -> Obstacle:
    return Obstacle(
        kind="permission",
        what=f"pid {pid}",
        detail=f"{err.filename or 'a file of it in /proc'} cannot be read",
        hint="run agent-send as root or as the user of the process, with no fewer capabilities",
    )


def _impossible(pid: int, status: Status) -> Iterator[Obstacle]:
    if read_stat(pid).flags & _PF_KTHREAD:
        yield Obstacle(kind="task", what=f"pid {pid}", detail="it is a kernel thread")
    elif status.is_zombie and len(list_tids(pid)) > 1:
        yield Obstacle(
            kind="task",
            what=f"pid {pid}",
            detail="its main thread has exited and others run on",
            hint="the kernel cannot rebuild a process whose first thread is gone",
        )
    elif status.is_zombie:
        yield Obstacle(kind="task", what=f"pid {pid}", detail="it has exited already")
    elif pid == os.getpid():
        yield Obstacle(kind="task", what=f"pid {pid}", detail="it is this very agent")


def _relatives(pid: int, status: Status) -> Iterator[Obstacle]:
    try:
        children = list_children(pid)
    except FileNotFoundError:
        children = []  # kernel without CONFIG_PROC_CHILDREN; forked memory is tracked no better
    if children:
        names = ", ".join(map(str, children[:8])) + (", ..." if len(children) > 8 else "")
        yield Obstacle(
            kind="process-tree",
            what=f"pid {pid}",
            detail=f"it has {len(children)} child process{'es' if len(children) > 1 else ''}: {names}",
            hint="only single processes can be moved yet; let the children end first",
        )
    for other in (status.ppid, *children):
        if other and _shares(pid, other, KCMP_VM):
            yield Obstacle(
                kind="shared-memory-space",
                what=f"pid {pid}",
                detail=f"it shares its memory with process {other} (vfork, or clone with CLONE_VM)",
                hint="wait until the child has called exec",
            )


def _shares(pid: int, other: int, kind: int) -> bool:
    try:
        return kcmp(pid, other, kind) == 0
    except OSError:
        return False  # gone, or not ours to look at: then it is no relative that matters


def _tracer(pid: int, status: Status) -> Iterator[Obstacle]:
    tracers = {status.tracer_pid}
    for tid in list_tids(pid):
        try:
            tracers.add(read_task_status(pid, tid).tracer_pid)
        except ProcessLookupError:
            continue
    for tracer in sorted(tracers - {0, os.getpid()}):
        yield Obstacle(
            kind="traced",
            what=f"pid {pid}",
            detail=f"process {tracer} traces it",
            hint="detach the debugger or strace first",
        )


def _threads(pid: int, status: Status) -> Iterator[Obstacle]:
    for tid in list_tids(pid):
        try:
            thread = read_task_status(pid, tid)
        except ProcessLookupError:
            continue  # it ended just now
        if thread.seccomp:
            mode = "strict mode" if thread.seccomp == 1 else f"{thread.seccomp_filters} filters"
            yield Obstacle(
                kind="seccomp",
                what=f"thread {tid}",
                detail=f"it is confined by seccomp ({mode})",
                hint="run the service without a system call filter (systemd: SystemCallFilter=,"
                " containers: seccomp=unconfined)",
            )
            break  # filters are mostly those of the whole process
        if "shstk" in thread.x86_thread_features:
            yield Obstacle(
                kind="shadow-stack",
                what=f"thread {tid}",
                detail="it runs with a user shadow stack",
                hint="start it with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK",
            )
            break


def _program(pid: int, status: Status) -> Iterator[Obstacle]:
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            header = file.read(5)
    except FileNotFoundError:
        return  # no executable at all: whoever dumps the memory map says so
    if header[:4] == b"\x7fELF" and header[4] != _ELFCLASS64:
        yield Obstacle(
            kind="program",
            what=f"pid {pid}",
            detail="it is a 32-bit (i386 or x32) program",
            hint="only 64-bit programs can be moved",
        )


def _sharing(pid: int, status: Status) -> Iterator[Obstacle]:
    kinds = ((KCMP_FILES, "descriptor table"), (KCMP_FS, "working directory and umask"))
    for tid in list_tids(pid):
        for kind, what in (*kinds, (KCMP_SIGHAND, "signal handlers")):
            try:
                result = 0 if tid == pid else kcmp(pid, tid, kind)
            except OSError:
                break  # the thread ended, or kcmp is not allowed: then nothing of this works
            if result and not is_exiting(pid, tid):
                yield Obstacle(
                    kind="unshared-thread",
                    what=f"thread {tid}",
                    detail=f"it has its own {what} (unshare)",
                    hint="threads with tables of their own cannot be moved",
                )


def _namespaces(pid: int, status: Status) -> Iterator[Obstacle]:
    for kind, why in _NAMESPACES.items():
        try:
            same = read_ns(pid, kind) == read_ns(os.getpid(), kind)
        except FileNotFoundError:
            continue
        if not same:
            option = {"mnt": "-m", "net": "-n", "ipc": "-i", "user": "-U"}[kind]
            yield Obstacle(
                kind="namespace",
                what=f"{kind} namespace",
                detail=f"it differs from the agent's: {why}",
                hint=f"run agent-send inside: nsenter -t {pid} {option} agent-send ...",
            )


def _terminal(pid: int, status: Status) -> Iterator[Obstacle]:
    stat = read_stat(pid)
    if stat.tty_nr:
        major, minor = stat.tty_nr >> 8 & 0xFFF, stat.tty_nr & 0xFF | stat.tty_nr >> 12 & 0xFFF00
        yield Obstacle(
            kind="terminal",
            what=f"session {stat.session}",
            detail=f"the process has a controlling terminal (device {major}:{minor})",
            hint="start it with setsid, as a service, or below nohup with its output in a file",
        )


def _directories(pid: int, status: Status) -> Iterator[Obstacle]:
    for what, link in (("working directory", "cwd"), ("root directory", "root")):
        path = read_link(f"/proc/{pid}/{link}")
        if path.endswith(" (deleted)"):
            detail = f"{path.removesuffix(' (deleted)')} was deleted"
        elif not path.startswith("/"):
            detail = f"{path} cannot be reached from the agent's root"
        elif any("\ud800" <= letter <= "\udfff" for letter in path):
            detail = f"{path!r} is not valid UTF-8"
        elif not leads_to(path, pid, link):
            detail = f"{path} leads to another directory by now"
        else:
            continue
        yield Obstacle(
            kind="directory",
            what=what,
            detail=detail,
            hint="change the process's directory to one that both hosts have",
        )


def _mappings(pid: int, status: Status) -> Iterator[Obstacle]:
    maps = read_bytes(f"/proc/{pid}/maps")
    for pattern, kind, detail in _MAPPINGS:
        for match in pattern.finditer(maps):
            line = maps[maps.rfind(b"\n", 0, match.start()) + 1 : match.start()]
            yield Obstacle(
                kind=kind,
                what="mapping 0x" + line.partition(b"-")[0].decode(),
                detail=detail,
                hint="Ferry cannot rebuild it; run the program without, if it has a setting",
            )


def _timers(pid: int, status: Status) -> Iterator[Obstacle]:
    try:
        made = read_timers(pid)
    except FileNotFoundError:
        yield Obstacle(
            kind="kernel",
            what=f"/proc/{pid}/timers",
            detail="the kernel does not list POSIX timers",
            hint="it must be built with CONFIG_CHECKPOINT_RESTORE",
        )
        return
    yield from check_timers(made, status.threads)


def _semaphores(pid: int, status: Status) -> Iterator[Obstacle]:
    # The undo list itself is not shown anywhere. A process without one shares the absence of it
    # with this agent; every process that ever made a thread has one, mostly empty, and without
    # semaphores it is certainly empty.
    if _shares(pid, os.getpid(), KCMP_SYSVSEM):
        return
    try:
        sets = read_bytes("/proc/sysvipc/sem").splitlines()[1:]
    except FileNotFoundError:
        return
    if sets:
        yield Obstacle(
            kind="sysv-sem",
            what=f"pid {pid}",
            detail=f"it may hold undo values (SEM_UNDO) of {len(sets)} System V semaphore set"
            f"{'s' if len(sets) > 1 else ''}",
            hint="list them with ipcs -s, remove stale ones with ipcrm",
        )


def _security_label(pid: int, status: Status) -> Iterator[Obstacle]:
    theirs, ours = (_read_label(task) for task in (pid, os.getpid()))
    if theirs != ours and theirs not in ("", "unconfined"):
        yield Obstacle(
            kind="security-label",
            what=f"pid {pid}",
            detail=f"it is confined as {theirs!r}, which would be lost",
            hint=f"start agent-recv under the same label ({theirs!r}), agent-send too",
        )


def _read_label(pid: int) -> str:
    try:
        label = read_bytes(f"/proc/{pid}/attr/current")
    except OSError:
        return ""  # no security module gives labels
    return label.decode(errors="replace").rstrip("\0\n")
