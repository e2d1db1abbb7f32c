"""Advisory locks of open files: flock(2), open file description locks, and POSIX record locks.

The first two belong to the description and are taken by the agent, which shares it with the
process; the last belong to the process and are taken by calls made inside it. Without --file-locks
a lock is an obstacle: the destination may see another file system, where the lock protects nothing.

All locks are taken before the copy is promised, while the original still has its own. So an exclusive
lock on a file system that both hosts share is refused: nothing hands a lock over, and between the
original's end and the copy's attempt anybody might take it, and change under it what the process
believes to be its own. Shared locks can be held twice.

Sources: flock(2), fcntl_locking(2), proc_locks(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.procfs import fdinfo
from agent.state.openfile import Description, DumpJob, Item, PreflightJob
from protocol.state.files import FileLock, LockKind
from protocol.state.regfile import RegularFile

if TYPE_CHECKING:
    from agent.target.batch import Batch

F_SETLK = 6
F_OFD_GETLK = 36
F_OFD_SETLK = 37
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2

# struct flock of x86_64: type, whence, padding, start, length, pid, padding.
_FLOCK = struct.Struct("=hh4xqqi4x")

_KINDS = {"FLOCK": LockKind.FLOCK, "POSIX": LockKind.POSIX, "OFDLCK": LockKind.OFD}


def dump_locks(job: DumpJob, desc: Description) -> tuple[FileLock, ...]:
    """Return the locks held through a description; records an obstacle when they may not be carried."""
    found = []
    for lock in fdinfo.locks(desc.fdinfo):
        kind = _KINDS.get(lock.kind)
        if kind is None:
            job.refuse(
                desc, "file lock", f"{desc.link} has a lock of type {lock.kind}",
                "have the process give up the lease (fcntl F_SETLEASE)",
            )  # fmt: skip
            continue
        length = 0 if lock.end < 0 else lock.end - lock.start + 1
        exclusive = lock.access == "WRITE"
        found.append(FileLock(kind=kind, exclusive=exclusive, start=lock.start, length=length))
    if found and not job.ctx.options.file_locks:
        job.refuse(
            desc, "file lock", f"{desc.link} is locked ({', '.join(l.kind.value for l in found)})",
            "carry the locks with --file-locks if they protect on the destination what they protect here",
        )  # fmt: skip
    return tuple(found)


def preflight_locks(job: PreflightJob, items: Iterable[Item[RegularFile]]) -> None:
    """Check that the locks of regular files and directories can be had, without keeping one."""
    for item in items:
        if not item.file.locks or item.body.pseudo:
            continue
        try:
            fd = os.open(item.body.path, item.file.flags & os.O_ACCMODE | os.O_CLOEXEC)
        except OSError:
            continue  # Refused for this by its kind.
        try:
            held = [lock for lock in item.file.locks if not _is_free(fd, lock)]
        except OSError as err:
            job.refuse(item, "file lock", f"{item.body.path} cannot be locked here: {err.strerror}")
            continue
        finally:
            os.close(fd)
        for lock in held:
            job.refuse(
                item, "file lock", f"{_describe(lock)} of {item.body.path} is held by another process; if that is"
                " the original, no lock can pass from it to the copy without a moment for others to take it",
                "have the process let go of the lock while it is moved",
            )  # fmt: skip


def _is_free(fd: int, lock: FileLock) -> bool:
    if lock.kind is LockKind.FLOCK:
        # There is no question without an attempt; the lock goes with the descriptor, at once.
        return _try_lock(fd, lock)
    answer = fcntl.fcntl(fd, F_OFD_GETLK, _pack(lock))
    return bool(_FLOCK.unpack(answer)[0] == F_UNLCK)


def _describe(lock: FileLock) -> str:
    return f"{'an exclusive' if lock.exclusive else 'a shared'} {lock.kind.value} lock"


def restore_locks(item: Item[Any], fd: int) -> None:
    """Take the locks that belong to a description.

    :raises RestoreError: somebody else holds one, or the file cannot be locked at all.
    """
    for lock in item.file.locks:
        try:
            if not _try_lock(fd, lock):
                raise RestoreError(f"Cannot restore {item}: {_describe(lock)} is held by another process")
        except OSError as err:
            raise RestoreError(f"Cannot lock {item}: {err.strerror}") from err


def _try_lock(fd: int, lock: FileLock) -> bool:
    # Without waiting; False when somebody else holds it.
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
    """Add the calls that take the locks that belong to the process; the error of one names it."""
    for lock in item.file.locks:
        if lock.kind is LockKind.POSIX:
            blob = batch.data(_pack(lock))
            batch.call(nr.NR_fcntl, item.fds[0], F_SETLK, blob, name=f"take {_describe(lock)} on {item}")


def _pack(lock: FileLock) -> bytes:
    kind = F_WRLCK if lock.exclusive else F_RDLCK
    return _FLOCK.pack(kind, os.SEEK_SET, lock.start, lock.length, 0)
