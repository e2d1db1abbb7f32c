"""Shared memory objects: describe them on the source, make them on the destination.

The content is not here: pages carry it (agent.pages), with the object id as space id. An object is made empty and
writable, filled by pages over all rounds, and gets size, mode and seals at the end (finish_shared), since F_SEAL_WRITE
would keep the content out. Descriptors are the agent's. Sources: memfd_create(2), shmem(5), fcntl(2) F_ADD_SEALS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from ctypes import addressof, c_char

from agent.errors import DumpError, RestoreError
from agent.pages.extents import shared_extents
from agent.procfs.maps import MapsEntry
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey
from agent.tracker.layout import internal_tmpfs_device
from agent.types import PAGE_SIZE, Obstacle
from protocol.state.shmem import SharedKind, SharedObject

F_SEAL_SEAL = 0x0001
F_SEAL_EXEC = 0x0020
_DELETED = " (deleted)"


def check_shared(key: SharedKey, path: str) -> Obstacle | None:
    """Say why an object cannot be carried; `path` as maps or readlink show it."""
    what = path or f"object {key.dev}:{key.ino}"
    if path.startswith("/SYSV"):
        return Obstacle(
            kind="sysvshm",
            what=what,
            detail="System V shared memory is not carried yet",
            hint="detach the segment, or use memfd or POSIX shared memory",
        )
    if path.startswith(("/memfd:", "/dev/zero", "/anon_hugepage")):
        if key.dev != internal_tmpfs_device():
            return Obstacle(
                kind="hugetlb",
                what=what,
                detail="shared memory in huge pages of hugetlbfs is not carried yet",
                hint="use transparent huge pages",
            )
    return None


def _kind_and_name(path: str) -> tuple[SharedKind, str, bool]:
    linked = not path.endswith(_DELETED)
    bare = path.removesuffix(_DELETED)
    if bare.startswith("/memfd:"):
        return SharedKind.MEMFD, bare.removeprefix("/memfd:"), False
    if bare.startswith("/dev/shm/"):
        return SharedKind.SHM_FILE, bare, linked
    return SharedKind.ANON, "", False


def dump_shared(object_id: int, fd: int | None, path: str, *, size: int = 0) -> SharedObject:
    """Describe an object as it is now.

    `fd` is any descriptor of it, None where none can be had (then `size` is what its mappings cover). `path` is what
    maps or the link of a descriptor in /proc shows.
    """
    kind, name, linked = _kind_and_name(path)
    if fd is None:
        return SharedObject(id=object_id, kind=kind, name=name, size=size, linked=linked)
    try:
        status = os.fstat(fd)
    except OSError as err:
        raise DumpError(f"Cannot describe shared memory object {path}") from err
    seals = 0
    with contextlib.suppress(OSError):  # EINVAL: not a kind of file that has seals
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return SharedObject(
        id=object_id,
        kind=kind,
        name=name,
        size=status.st_size,
        seals=seals if kind is SharedKind.MEMFD else 0,
        mode=status.st_mode & 0o7777,
        uid=status.st_uid,
        gid=status.st_gid,
        linked=linked,
    )


def content_to_send(fd: int, dirty: RangeSet | None) -> tuple[RangeSet, RangeSet]:
    """Split a tracker's answer for an object into pages to read and ranges the destination must drop.

    `fd` must have a file position of its own (not one fetched from the target): SEEK_DATA moves it. None: all of it.
    """
    size = os.fstat(fd).st_size
    whole = RangeSet((0, size + -size % PAGE_SIZE))
    dirty = whole if dirty is None else dirty.intersect(whole)
    extents = shared_extents(fd)
    # Every hole, not only the dirty ones: punching one leaves no trace in page tables.
    return dirty.intersect(extents), whole.subtract(extents)


def preflight_shared(obj: SharedObject) -> Obstacle | None:
    """Say why an object cannot be made here."""
    if obj.linked and os.path.lexists(obj.name):
        return Obstacle(
            kind="shmem",
            what=obj.name,
            detail="shared memory of that name exists on the destination",
            hint="remove it there, or stop the program that uses it",
        )
    return None


def restore_shared(obj: SharedObject) -> int:
    """Make the object, empty and of its size; returns a read-write descriptor that is the caller's.

    A linked file appears under its name at once: see discard_shared().
    """
    try:
        if obj.kind is SharedKind.MEMFD:
            sealable = 0 if obj.seals & F_SEAL_SEAL and obj.seals == F_SEAL_SEAL else 2
            # With MFD_ALLOW_SEALING alone the kernel leaves the mode and F_SEAL_EXEC to us (finish_shared).
            fd = os.memfd_create(obj.name, os.MFD_CLOEXEC | sealable)
        elif obj.kind is SharedKind.SHM_FILE:
            fd = _make_shm_file(obj)
        else:
            fd = _make_anonymous(obj)
        if obj.kind is not SharedKind.ANON or os.fstat(fd).st_size != obj.size:
            os.ftruncate(fd, obj.size)
    except OSError as err:
        raise RestoreError(
            f"Cannot make shared memory object {obj.id} {obj.name!r}: {err.strerror}"
        ) from err
    return fd


def _make_shm_file(obj: SharedObject) -> int:
    if obj.linked:
        return os.open(obj.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)


def _make_anonymous(obj: SharedObject) -> int:
    # A real shared anonymous object, reached through a mapping of our own, looks the same in the restored process's
    # maps; opening it needs CAP_CHECKPOINT_RESTORE. A memfd behaves the same otherwise.
    length = obj.size + -obj.size % PAGE_SIZE
    if length:
        with contextlib.suppress(OSError), mmap.mmap(-1, length, flags=mmap.MAP_SHARED) as mapped:
            pin = c_char.from_buffer(mapped)
            start = addressof(pin)
            del pin
            path = f"/proc/self/map_files/{start:x}-{start + length:x}"
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return os.memfd_create("zero", os.MFD_CLOEXEC)


def resize_shared(fd: int, size: int) -> None:
    """Follow a size that changed between rounds. Content beyond the end is dropped, as truncation means."""
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)


def finish_shared(fd: int, obj: SharedObject) -> None:
    """Put on what must come after the content: size, owner, mode, seals. `obj` is the final description."""
    try:
        resize_shared(fd, obj.size)
        if obj.kind is SharedKind.ANON:
            return
        status = os.fstat(fd)
        if (status.st_uid, status.st_gid) != (obj.uid, obj.gid):
            with contextlib.suppress(PermissionError):  # without CAP_CHOWN: it stays the agent's
                os.fchown(fd, obj.uid, obj.gid)
        if status.st_mode & 0o7777 != obj.mode:
            os.fchmod(fd, obj.mode)
        if obj.seals and obj.kind is SharedKind.MEMFD:
            _seal(fd, obj.seals)
    except OSError as err:
        raise RestoreError(
            f"Cannot finish shared memory object {obj.id} {obj.name!r}: {err.strerror}"
        ) from err


def _seal(fd: int, seals: int) -> None:
    # F_SEAL_WRITE is EBUSY while a writable shared mapping exists: the source cannot have had one either. The last
    # seal is the one that forbids more.
    missing = seals & ~fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if missing:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, missing)
        except OSError as err:
            if err.errno != errno.EINVAL or not missing & F_SEAL_EXEC:
                raise
            # Kernels before 6.3 do not know F_SEAL_EXEC.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, missing & ~F_SEAL_EXEC)


def discard_shared(obj: SharedObject) -> None:
    """Undo restore_shared() after a failed migration: the name goes (descriptors are the caller's to close)."""
    if obj.linked:
        with contextlib.suppress(OSError):
            os.unlink(obj.name)


def mapped_size(entries: list[MapsEntry]) -> int:
    """Return the least size of an object that these mappings show."""
    return max((e.offset + e.end - e.start for e in entries), default=0)
