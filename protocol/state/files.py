"""The file descriptor table of a process and the open file descriptions behind it.

A *description* (open file description, open(2)) is what dup(2) and fork(2) share: it has the offset
and the status flags. It is saved once, under an ``id`` that means something only inside one
``FilesState``; each number in the table names the description it points at. ``body`` is the encoded
schema of the kind, one module of this package per kind (bodies.py). Numbers and ids are the
target's; nothing here touches a system.

Three sections: "files" is the final table as a whole. Or there comes, right before the switchover and while the target
runs, "pre_files", those descriptions that the destination may make ahead, and in the end "files_change", what became of
that. An image may have either.
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass

from protocol.state import register

MAX_FD = (1 << 31) - 1


class LockKind(enum.Enum):
    """Which interface made an advisory lock: flock(2), fcntl(2) F_SETLK or F_OFD_SETLK."""

    FLOCK = "flock"
    POSIX = "posix"
    OFD = "ofd"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLock:
    """One advisory lock held through a description; ``length`` 0 means to the end of the file."""

    kind: LockKind
    exclusive: bool
    start: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 0:
            raise ValueError(f"lock range {self.start}+{self.length} is negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOwner:
    """Who gets SIGIO and SIGURG: ``type`` and ``pid`` as in f_owner_ex, ``signal`` as in F_SETSIG."""

    type: int
    pid: int
    signal: int = 0

    def __post_init__(self) -> None:
        if self.type not in (0, 1, 2) or not 0 <= self.signal <= 64 or self.pid < 0:
            raise ValueError(f"owner {self.type}, {self.pid}, {self.signal} is impossible")


@dataclass(frozen=True, slots=True, kw_only=True)
class FdEntry:
    """One number of the table."""

    fd: int
    file_id: int
    cloexec: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fd <= MAX_FD:
            raise ValueError(f"fd {self.fd} is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """One open file description; ``flags`` as F_GETFL gives them."""

    id: int
    kind: str
    flags: int
    body: bytes
    pos: int = 0
    owner: FileOwner | None = None
    locks: tuple[FileLock, ...] = ()

    def __post_init__(self) -> None:
        if self.id <= 0:
            raise ValueError(f"file id {self.id} is not positive")
        if not 0 <= self.flags < 1 << 32:
            raise ValueError(f"file flags {self.flags:#x} are out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesState:
    """The whole table: entries sorted by number, each description named by at least one of them.

    ``clock_monotonic_ns`` is what the process's own clock showed when the timerfds were read.
    """

    fds: tuple[FdEntry, ...]
    files: tuple[OpenFile, ...]
    clock_monotonic_ns: int = 0

    def __post_init__(self) -> None:
        ids = {file.id for file in self.files}
        if len(ids) != len(self.files):
            raise ValueError("a file id is used twice")
        previous = -1
        for entry in self.fds:
            if entry.fd <= previous:
                raise ValueError(f"fd {entry.fd} is listed after fd {previous}")
            previous = entry.fd
        named = {entry.file_id for entry in self.fds}
        if named != ids:
            raise ValueError(f"fds and files disagree about file ids {sorted(named ^ ids)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesChange:
    """A whole table, told by what became of an earlier one (section "pre_files").

    ``closed``: numbers of the earlier table that are not in this one. ``fds``: entries that it did not have, or had
    otherwise. ``files``: descriptions that it did not have; an id of the earlier table still means the very same
    state, and a description that no number names any more is gone.
    """

    closed: tuple[int, ...] = ()
    fds: tuple[FdEntry, ...] = ()
    files: tuple[OpenFile, ...] = ()
    clock_monotonic_ns: int = 0

    def __post_init__(self) -> None:
        for numbers in (self.closed, [entry.fd for entry in self.fds]):
            if any(fd <= previous for previous, fd in itertools.pairwise(numbers)):
                raise ValueError("numbers are not in order")
        new = [file.id for file in self.files]
        if len(set(new)) != len(new):
            raise ValueError("a file id is used twice")
        unnamed = set(new) - {entry.file_id for entry in self.fds}
        if unnamed:
            raise ValueError(f"no number names the files {sorted(unnamed)}")


register("files", FilesState, version_id=1, minimum_version_id=1)
register("files_change", FilesChange, version_id=1, minimum_version_id=1)
register("pre_files", FilesState, version_id=1, minimum_version_id=1)
