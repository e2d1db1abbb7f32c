"""What the kinds of open files share: the description on the source, the jobs of dump, preflight and restore.

A kind is a row of functions (``FileKind``), side by side in one module per kind, listed in
agent.state.registry. Obstacles are collected, never raised one by one, so that the user sees all of
them at once. Nothing here changes the target: its files are looked at through procfs and
pidfd_getfd(2).

Sources: proc_pid_fd(5), proc_pid_fdinfo(5), fcntl(2).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from agent.kernel.many import try_each
from agent.kernel.pidfd import pidfd_getfd
from agent.procfs.fdinfo import FdInfo
from agent.procfs.status import read_status
from agent.state.context import DumpContext, RestoreContext, RestoreOptions
from agent.types import Obstacle
from protocol.state.files import FileOwner, OpenFile

if TYPE_CHECKING:
    from agent.target.batch import Batch

_log = logging.getLogger(__name__)

BodyT = TypeVar("BodyT")

# include/uapi/asm-generic/fcntl.h (the x86_64 layout); os.O_LARGEFILE is 0 on 64-bit machines.
O_ASYNC = 0o20000
O_DIRECT = 0o40000
O_LARGEFILE = 0o100000
O_DIRECTORY = 0o200000
O_NOFOLLOW = 0o400000
O_NOATIME = 0o1000000
O_CLOEXEC = 0o2000000
O_SYNC = 0o4010000
O_PATH = 0o10000000
O_TMPFILE_BIT = 0o20000000
F_GETOWN_EX = 16
F_GETSIG = 11
F_SETOWN_EX = 15
F_SETSIG = 10

AT_ONCE = 128
"""How many files are looked at together: the agent has room for so many beside those of fdinfo."""

REOPEN_FLAGS = (
    os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | O_SYNC | O_DIRECT | O_LARGEFILE | O_DIRECTORY
    | O_NOFOLLOW | O_NOATIME | O_PATH
)  # fmt: skip
"""Flags that open(2) takes again. O_ASYNC is set at the end, by the process itself."""

_F_OWNER_EX = struct.Struct("ii")
_NO_OWNER = bytes(_F_OWNER_EX.size)
_INO = re.compile(r"\[(\d+)\]$")


@dataclass(slots=True)
class Description:
    """One open file description of the target, and every number that points at it (lowest first).

    ``link`` is the text of /proc/PID/fd/N; ``flags`` are without O_CLOEXEC. ``info`` is known for
    what has a path.
    """

    id: int
    fds: list[int]
    link: str
    fdinfo: FdInfo
    flags: int
    info: os.stat_result | None = None

    @property
    def fd(self) -> int:
        """The number it is examined through."""
        return self.fds[0]

    @property
    def readable(self) -> bool:
        """Was it opened for reading?"""
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        """Was it opened for writing?"""
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    @property
    def inode(self) -> int:
        """The inode number in a link such as ``socket:[123]``, or that of the path."""
        match = _INO.search(self.link)
        if match and not self.link.startswith("/"):
            return int(match[1])
        return self.info.st_ino if self.info else 0


@dataclass(slots=True)
class DumpJob:
    """One look at the whole table. ``content``: also take what is queued in pipes and sockets."""

    ctx: DumpContext
    descriptions: Sequence[Description]
    content: bool
    obstacles: list[Obstacle] = field(default_factory=list)
    refused: list[Description] = field(default_factory=list)
    """What the obstacles, one by one, are about."""
    memo: dict[str, Any] = field(default_factory=dict)
    """Things looked up once per job, by whoever needs them."""

    def refuse(self, desc: Description, kind: str, detail: str, hint: str = "") -> None:
        """Record that ``desc`` cannot be carried."""
        what = f"fd {', '.join(map(str, desc.fds[:8]))}"
        self.obstacles.append(Obstacle(kind=kind, what=what, detail=detail, hint=hint))
        self.refused.append(desc)

    def fetch(self, desc: Description) -> int:
        """Return an agent descriptor of the description; the context's."""
        return self.ctx.fetch_fd(desc.fd)

    def by_fd(self) -> dict[int, Description]:
        """Return the table: number to description."""
        table: dict[int, Description] | None = self.memo.get("by_fd")
        if table is None:
            table = {fd: desc for desc in self.descriptions for fd in desc.fds}
            self.memo["by_fd"] = table
        return table

    def by_link(self) -> dict[str, list[Description]]:
        """Return the descriptions by their link text."""
        table: dict[str, list[Description]] | None = self.memo.get("by_link")
        if table is None:
            table = {}
            for desc in self.descriptions:
                table.setdefault(desc.link, []).append(desc)
            self.memo["by_link"] = table
        return table

    def outside_holders(self, link: str) -> list[int]:
        """Return the other processes that hold a pipe or socket.

        Costs a look at every process, once per job.
        """
        if link in self.ctx.private_links:
            return []
        table: dict[str, list[int]] | None = self.memo.get("outside")
        if table is None:
            table = self.memo["outside"] = find_holders(self.ctx)
        holders = table.get(link, [])
        if not holders:
            self.ctx.private_links.add(link)
        return holders

    def refuse_if_shared(self, desc: Description, kind: str) -> bool:
        """Record an obstacle when another process holds the same pipe or socket; say whether."""
        holders = self.outside_holders(desc.link)
        if holders:
            named = ", ".join(_process_name(pid) for pid in holders[:3])
            self.refuse(
                desc, kind, f"{desc.link} is also held by {named}",
                "carry it with --external fd[N], or start the process without it",
            )  # fmt: skip
        return bool(holders)


Candidates = Sequence[tuple[Description, BodyT]]


@dataclass(slots=True)
class Recheck:
    """A look at descriptions that were dumped ``before``, while the target ran; ``now`` may be the same look.

    ``candidates`` have the same link, fdinfo and sharing as then; ``kept`` are those of them that were found to be
    unchanged so far. Both by id; an id in ``now`` means what it meant then.
    """

    before: DumpJob
    now: DumpJob
    candidates: Mapping[int, Description]
    kept: dict[int, Description] = field(default_factory=dict)


def find_holders(ctx: DumpContext) -> dict[str, list[int]]:
    """Return, for each pipe, socket or path that other processes have open, who they are."""
    table: dict[str, list[int]] = {}
    own = {str(fd) for fd in ctx.fetched.values()}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == ctx.pid:
            continue
        try:
            folder = os.open(f"/proc/{name}/fd", os.O_RDONLY | O_DIRECTORY)
        except OSError:
            continue  # It ended meanwhile, or hides its files from us.
        try:
            numbers = set(os.listdir(folder))
            if int(name) == os.getpid():
                numbers -= own
            for number in numbers:
                try:
                    link = os.readlink(number, dir_fd=folder)
                except OSError:
                    continue
                pids = table.setdefault(link, [])
                if int(name) not in pids:
                    pids.append(int(name))
        except OSError:
            continue
        finally:
            os.close(folder)
    return table


def _process_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return f"process {pid} ({file.read().strip()})"
    except OSError:
        return f"process {pid}"


def read_owner(fd: int) -> FileOwner | None:
    """Return who gets the signals of a description, given an agent descriptor of it.

    The pid is the one that the owner has in its own pid namespace; 0 when it has ended.
    """
    kind, pid = _F_OWNER_EX.unpack(fcntl.fcntl(fd, F_GETOWN_EX, bytes(_F_OWNER_EX.size)))
    signal = fcntl.fcntl(fd, F_GETSIG)
    if pid == 0 and signal == 0:
        return None
    return FileOwner(type=kind, pid=_own_pid(pid) if pid else 0, signal=signal)


def are_nobodys(fds: Sequence[int]) -> list[bool]:
    """Tell of each of some agent descriptors whether read_owner() has nobody to name; not of -1."""
    owners: list[Any] = try_each(fcntl.fcntl, fds, repeat(F_GETOWN_EX), repeat(_NO_OWNER))
    signals = try_each(fcntl.fcntl, fds, repeat(F_GETSIG))
    return [
        # Nobody is the same for all, as far as anybody knows; where it is not, the words are read one by one.
        owner == _NO_OWNER and signal == 0 or (owner is not None and read_owner(fd) is None)
        for fd, owner, signal in zip(fds, owners, signals)
    ]


def _own_pid(pid: int) -> int:
    try:
        return read_status(pid).ns_pid[-1]
    except ProcessLookupError:
        return 0


@dataclass(frozen=True, slots=True)
class Item(Generic[BodyT]):
    """A description as received: ``fds`` are the target's numbers for it."""

    file: OpenFile
    body: BodyT
    fds: tuple[int, ...]

    @property
    def id(self) -> int:
        """Its id within the FilesState."""
        return self.file.id

    def __str__(self) -> str:
        return f"fd {', '.join(map(str, self.fds[:8]))}"


@dataclass(slots=True)
class PreflightJob:
    """Checks on the destination, before anything is promised."""

    options: RestoreOptions
    obstacles: list[Obstacle] = field(default_factory=list)

    def refuse(self, item: Item[Any], kind: str, detail: str, hint: str = "") -> None:
        """Record that ``item`` cannot be restored here."""
        self.obstacles.append(Obstacle(kind=kind, what=str(item), detail=detail, hint=hint))


@dataclass(slots=True)
class RestoreJob:
    """The agent's copies of all descriptions, by file id. They are closed by the FileRestorer."""

    ctx: RestoreContext
    fds: dict[int, int] = field(default_factory=dict)
    items: dict[int, Item[Any]] = field(default_factory=dict)
    after: list[Callable[[], None]] = field(default_factory=list)
    """Called once the injected calls of install() have run; may inject again."""
    replaced: list[tuple[str, str]] = field(default_factory=list)
    """Path nodes of the source's that were renamed to make room: (path, where it is now)."""
    installed: dict[int, int] = field(default_factory=dict)
    """What stands in the skeleton already, by file id, with one of its numbers there."""
    elapsed_ns: int = 0
    """How long ago the table was dumped, by the process's own clock."""
    ahead: bool = False
    """Whether the source still runs: nobody outside may notice what is made."""

    def agent_fd(self, file_id: int) -> int:
        """Return the agent's descriptor of a file, which stays the job's.

        :raises KeyError: there is no such file.
        """
        fd = self.fds.get(file_id)
        if fd is None:
            number = self.installed[file_id]
            pidfd = os.pidfd_open(self.ctx.pid)
            try:
                fd = self.fds[file_id] = pidfd_getfd(pidfd, number)
            finally:
                os.close(pidfd)
        return fd

    def put(self, item: Item[Any], fd: int) -> None:
        """Hand over the agent's descriptor of ``item``."""
        self.fds[item.id] = fd

    def table(self) -> dict[int, int]:
        """Return the target's table: number to file id."""
        return {fd: item.id for item in self.items.values() for fd in item.fds}


@dataclass(frozen=True, slots=True)
class FileKind(Generic[BodyT]):
    """One kind of open file.

    ``dump`` returns the body, or None after it has recorded an obstacle. ``restore`` gets all items
    of the kind at once and puts a descriptor for each. ``install`` adds calls made inside the
    process when the whole table stands. ``start`` runs last, when everything else is done.

    ``unchanged`` makes a kind one that is dumped while the target runs and made ahead. Of candidates with their bodies
    of then it tells, by id, for which the body, and no owner, are what a dump would give now, when the same link and
    fdinfo are not enough to tell: in doubt none. Such a kind must be made, and given up again, without a trace.
    """

    name: str
    dump: Callable[[DumpJob, Description], BodyT | None]
    restore: Callable[[RestoreJob, Sequence[Item[BodyT]]], None]
    preflight: Callable[[PreflightJob, Sequence[Item[BodyT]]], None] | None = None
    install: Callable[[RestoreJob, Sequence[Item[BodyT]], Batch], None] | None = None
    start: Callable[[RestoreJob, Sequence[Item[BodyT]]], None] | None = None
    unchanged: Callable[[Recheck, Candidates[BodyT]], Iterable[int]] | None = None


def always_unchanged(check: Recheck, found: Candidates[Any]) -> Iterable[int]:
    """For kinds of which link and fdinfo tell everything."""
    return [desc.id for desc, _body in found]


def set_status_flags(fd: int, flags: int) -> None:
    """Give a description made by other means than open(2) the status flags it had (F_SETFL)."""
    wanted = flags & (os.O_APPEND | os.O_NONBLOCK | O_DIRECT | O_NOATIME)
    if wanted != fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_NONBLOCK | O_DIRECT | O_NOATIME):
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
