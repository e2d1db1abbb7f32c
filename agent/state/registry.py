"""Which kinds of open files there are, which one a description belongs to, and why the others cannot be carried."""

from __future__ import annotations

import re
import socket
import stat
import struct
from typing import Any

from agent.state import (
    chardev,
    epoll,
    eventfd,
    external,
    inetsk,
    memfd,
    pipe,
    regfile,
    signalfd,
    timerfd,
    unixsk,
)
from agent.state.openfile import O_PATH, Description, DumpJob, FileKind
from agent.tracker.layout import is_posix_shm

FILE_KINDS: dict[str, FileKind[Any]] = {
    kind.name: kind
    for kind in (
        # The order of restore: regular files first, so that a missing one costs nothing else.
        regfile.KIND,
        chardev.KIND,
        memfd.KIND,
        external.KIND,
        pipe.KIND,
        eventfd.KIND,
        signalfd.KIND,
        timerfd.KIND,
        inetsk.KIND,
        epoll.KIND,
        # Last, since any other file may be on its way in a queue.
        unixsk.KIND,
    )
}
"""Every kind by name, in the order in which they are restored."""

ANON_KINDS = {"eventfd": "eventfd", "eventpoll": "epoll", "signalfd": "signalfd", "timerfd": "timerfd"}

HINTS = {
    "inotify": "watches cannot be carried yet; turn file watching off in the program",
    "fanotify": "turn file watching off in the program",
    "io_uring": "start the program without io_uring (for example UV_USE_IO_URING=0 for Node.js)",
    "userfaultfd": "the program handles its own page faults; let it finish first",
    "perf_event": "stop profiling the process",
    "pidfd": "the program watches another process through this descriptor",
    "bpf-map": "BPF objects stay on their host",
    "bpf-prog": "BPF objects stay on their host",
    "kvm-vm": "use the live migration of the virtual machine monitor",
}

_ANON = re.compile(r"anon_inode:\[?([^\]]*)\]?$")

MEMORY_PATHS = ("/dev/zero", "/SYSV")
"""Regular files without a path that are shared memory (agent.state.shmem)."""


def kind_of(job: DumpJob, desc: Description) -> FileKind[Any] | None:
    """Return the kind of a description, or None after recording why it cannot be carried."""
    if not job.ctx.options.external_fds.isdisjoint(desc.fds):
        return FILE_KINDS["external"]
    link = desc.link
    name = ""
    if link.startswith("/"):
        name = _kind_of_path(job, desc)
    elif link.startswith("pipe:"):
        name = "pipe"
    elif link.startswith("socket:"):
        name = _kind_of_socket(job, desc)
    else:
        match = _ANON.match(link)
        what = match[1] if match else link.partition(":")[0]
        name = ANON_KINDS.get(what, "")
        if not name:
            job.refuse(
                desc, what, f"{link} cannot be carried",
                HINTS.get(what, "have the process close it, or use --external fd[N]"),
            )  # fmt: skip
    return FILE_KINDS[name] if name else None


def _kind_of_path(job: DumpJob, desc: Description) -> str:
    assert desc.info is not None
    mode = desc.info.st_mode
    if desc.link.startswith(("/memfd:", "/secretmem", "/anon_hugepage")):
        return "memfd"
    if desc.flags & O_PATH or stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        is_memory = desc.link.startswith(MEMORY_PATHS) or is_posix_shm(desc.link)
        if stat.S_ISREG(mode) and not desc.flags & O_PATH and is_memory:
            # POSIX shared memory travels with its contents, as its mappings do.
            return "memfd"
        return "regular"
    if stat.S_ISCHR(mode):
        return "chardev"
    if stat.S_ISFIFO(mode):
        return "pipe"
    what = "block device" if stat.S_ISBLK(mode) else "file"
    job.refuse(desc, what, f"{desc.link} has type {stat.filemode(mode)[0]!r}", "have it closed")
    return ""


def _kind_of_socket(job: DumpJob, desc: Description) -> str:
    fd = job.fetch(desc)
    family, kind, protocol = job.memo[f"socket {desc.fd}"] = socket_identity(fd)
    if family == socket.AF_UNIX:
        return "unix"
    if family in (socket.AF_INET, socket.AF_INET6):
        carried = {
            (socket.SOCK_STREAM, socket.IPPROTO_TCP),
            (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
            (socket.SOCK_DGRAM, 136),  # IPPROTO_UDPLITE
        }
        if (kind, protocol) in carried:
            return "inet"
    try:
        named = socket.AddressFamily(family).name
    except ValueError:
        named = f"address family {family}"
    hint = "have the process close it, or use --external fd[N]"
    if family == socket.AF_NETLINK:
        hint = "netlink sockets talk to this host's kernel; have the process close it"
    job.refuse(
        desc, "socket", f"{named} socket of type {kind}, protocol {protocol} cannot be carried", hint
    )
    return ""


def socket_identity(fd: int) -> tuple[int, int, int]:
    """Return family, type and protocol of a socket given an agent descriptor.

    :raises OSError: it is none; the descriptor is left open in any case.
    """
    with inetsk.opened(fd, socket.AF_UNIX, socket.SOCK_STREAM, 0) as sock:
        words = [
            sock.getsockopt(socket.SOL_SOCKET, option, 4)
            for option in (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL)
        ]
    family, kind, protocol = (struct.unpack("i", word)[0] for word in words)
    return family, kind, protocol
