"""Which kinds of open files there are, which one a description belongs to, and why the others cannot be carried."""

from __future__ import annotations

import importlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from agent.state.openfile import O_PATH, Description, DumpJob, FileKind
from agent.tracker.layout import is_posix_shm

MODULES = {
    # The order of restore: regular files first, so that a missing one costs nothing else.
    "regular": "regfile",
    "chardev": "chardev",
    "memfd": "memfd",
    "external": "external",
    "pipe": "pipe",
    "eventfd": "eventfd",
    "signalfd": "signalfd",
    "timerfd": "timerfd",
    "inet": "inetsk",
    "epoll": "epoll",
    # Last, since any other file may be on its way in a queue.
    "unix": "unixsk",
}
"""The module of agent.state that has the ``KIND``, by its name."""


class _FileKinds(Mapping[str, FileKind[Any]]):
    # Imports a kind when it is first asked for: all of them are a quarter of what a check takes, and few processes have
    # them all. Before a freeze, agent.warmup asks for every one.

    def __init__(self) -> None:
        self._known: dict[str, FileKind[Any]] = {}

    def __getitem__(self, name: str) -> FileKind[Any]:
        kind = self._known.get(name)
        if kind is None:
            kind = self._known[name] = importlib.import_module(f"agent.state.{MODULES[name]}").KIND
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


FILE_KINDS = _FileKinds()
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
        from agent.state.sockets import kind_of_socket  # As the kinds, when first needed.

        name = kind_of_socket(job, desc)
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
