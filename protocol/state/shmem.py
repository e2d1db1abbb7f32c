"""Shared memory objects: memfds, MAP_SHARED|MAP_ANONYMOUS memory and files in /dev/shm.

The content travels as pages with the object's id as space id and offsets as addresses. `mode` is the file's permission
bits, `seals` those of F_GET_SEALS; both are put on after the content.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from protocol.state import register

MAX_OBJECT_BYTES = 1 << 46
_KNOWN_SEALS = 0x3F  # include/uapi/linux/fcntl.h: SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC
_MAX_NAME_CHARS = 249  # memfd_create(2)


class SharedKind(enum.IntEnum):
    """How the object came to be."""

    MEMFD = 1
    ANON = 2
    """Shared anonymous memory: reachable through mappings only."""
    SHM_FILE = 3
    """A file of the shared memory file system; `name` is its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedObject:
    """One object. `name` of a memfd is what memfd_create(2) was given."""

    id: int
    kind: SharedKind
    name: str
    size: int
    seals: int = 0
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    linked: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.id < 1 << 32:
            raise ValueError(f"object id {self.id} is not valid")
        if not 0 <= self.size <= MAX_OBJECT_BYTES:
            raise ValueError(f"object size {self.size} is not valid")
        if self.seals & ~_KNOWN_SEALS:
            raise ValueError(f"seals {self.seals:#x} has unknown bits")
        if self.mode & ~0o7777:
            raise ValueError(f"mode {self.mode:#o} is not valid")
        if "\0" in self.name:
            raise ValueError("object name has a zero byte")
        if self.kind is SharedKind.MEMFD and len(self.name) > _MAX_NAME_CHARS:
            raise ValueError("memfd name is too long")
        if self.kind is SharedKind.SHM_FILE and (
            not self.name.startswith("/dev/shm/") or "/" in self.name[9:] or len(self.name) < 10
        ):
            raise ValueError(f"{self.name!r} is not a file in /dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedObjects:
    """All objects of a migration."""

    objects: tuple[SharedObject, ...]

    def __post_init__(self) -> None:
        if len({o.id for o in self.objects}) != len(self.objects):
            raise ValueError("two objects have the same id")


register("shmem", SharedObjects, version_id=1, minimum_version_id=1)
