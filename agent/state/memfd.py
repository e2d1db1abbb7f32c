"""Descriptions of shared memory objects. The object (contents, size, name, seals) is agent.state.shmem's.

Every description is a new open of the object through /proc/self/fd, with its own access mode and
offset.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from agent.state.openfile import (
    REOPEN_FLAGS,
    Candidates,
    Description,
    DumpJob,
    FileKind,
    Item,
    Recheck,
    RestoreJob,
)
from protocol.state.memfd import MemFd


def dump_memfd(job: DumpJob, desc: Description) -> MemFd | None:
    """Describe a memfd by the id of its object."""
    assert desc.info is not None
    if desc.link.startswith("/secretmem"):
        job.refuse(desc, "memfd_secret", "its memory is hidden from everybody else")
        return None
    info = desc.info
    return MemFd(object_id=job.ctx.shared_id(info.st_dev, info.st_ino, desc.fd, desc.link))


def memfd_unchanged(check: Recheck, found: Candidates[MemFd]) -> list[int]:
    """See FileKind. Tells the context the number that the object has now."""
    return [desc.id for desc, body in found if dump_memfd(check.now, desc) == body]


def restore_memfd(job: RestoreJob, items: Sequence[Item[MemFd]]) -> None:
    """Open every object again."""
    for item in items:
        source = job.ctx.shared_fd(item.body.object_id)
        fd = os.open(f"/proc/self/fd/{source}", item.file.flags & REOPEN_FLAGS | os.O_CLOEXEC)
        job.put(item, fd)
        if item.file.pos:
            os.lseek(fd, item.file.pos, os.SEEK_SET)


KIND = FileKind(
    name="memfd", dump=dump_memfd, restore=restore_memfd, unchanged=memfd_unchanged
)
