"""Advisory locks of open files: flock(2), open file description locks, and POSIX record locks.

The first two belong to the description and are taken by the agent, which shares it with the
process; the last belong to the process and are taken by calls made inside it. Without --file-locks
a lock is an obstacle: the destination may see another file system, where the lock protects nothing.
Sources: flock(2), fcntl_locking(2), proc_locks(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Any

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.procfs import fdinfo
from agent.state.openfile import Description, DumpJob, Item
from protocol.state.files import FileLock, LockKind

if TYPE_CHECKING:
    from agent.target.batch import Batch

F_SETLK = 6
F_OFD_SETLK = 37
F_RDLCK, F_WRLCK = 0, 1

# struct flock of x86_64: type, whence, padding, start, length, pid, padding.
_FLOCK = struct.Struct("=hh4xqqi4x")

_KINDS = {"FLOCK": LockKind.FLOCK, "POSIX": LockKind.POSIX, "OFDLCK": LockKind.OFD}


def dump_locks(job: DumpJob, desc: Description) -> tuple[FileLock, ...]:
    """Return the locks held through a description; records an obstacle when they may not be carried."""
    found = []
    for lock in fdinfo.locks(desc.fdinfo):
        kind = _KINDS.get(lock.kind)
        if kind is None:
            job.refuse(desc, "file lock", f"{desc.link} has a lock of type {lock.kind}")
            continue
        length = 0 if lock.end < 0 else lock.end - lock.start + 1
        exclusive = lock.access == "WRITE"
        found.append(FileLock(kind=kind, exclusive=exclusive, start=lock.start, length=length))
    if found and not job.ctx.options.file_locks:
        job.refuse(
            desc, "file lock", f"{desc.link} is locked ({', '.join(l.kind.value for l in found)})",
            "carry the locks with --file-locks if both hosts share the file system",
        )  # fmt: skip
    return tuple(found)


def restore_locks(item: Item[Any], fd: int) -> list[FileLock]:
    """Take the locks that belong to a description; return those that somebody else holds.

    :raises RestoreError: when the file cannot be locked at all.
    """
    try:
        return [lock for lock in item.file.locks if not try_lock(fd, lock)]
    except OSError as err:
        raise RestoreError(f"Cannot lock {item}: {err.strerror}") from err


def try_lock(fd: int, lock: FileLock) -> bool:
    """Take a lock that belongs to a description, without waiting; False when somebody else holds it."""
    try:
        if lock.kind is LockKind.FLOCK:
            fcntl.flock(fd, (fcntl.LOCK_EX if lock.exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        elif lock.kind is LockKind.OFD:
            fcntl.fcntl(fd, F_OFD_SETLK, _pack(lock))
    except OSError as err:
        if err.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def add_posix_locks(item: Item[Any], batch: Batch) -> None:
    """Add the calls that take the locks that belong to the process."""
    for lock in item.file.locks:
        if lock.kind is LockKind.POSIX:
            blob = batch.data(_pack(lock))
            batch.call(nr.NR_fcntl, item.fds[0], F_SETLK, blob, name="fcntl(F_SETLK)")


def _pack(lock: FileLock) -> bytes:
    kind = F_WRLCK if lock.exclusive else F_RDLCK
    return _FLOCK.pack(kind, os.SEEK_SET, lock.start, lock.length, 0)
