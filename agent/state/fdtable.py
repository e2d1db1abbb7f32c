"""The descriptor table of a process, as procfs and kcmp(2) show it: who is open, and which numbers share a description.

A second look at the same table is cheap (``TableReader(keep=True)``, then changes()): an open /proc/PID/fdinfo/FD shows
at each pread(2) what has that number by then, and what it shows tells most kinds of files apart without any other call.
Nothing here touches the target or decides anything about it. Numbers are the target's unless called the agent's.

Sources: proc_pid_fd(5), proc_pid_fdinfo(5), kcmp(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key, partial
from itertools import compress, pairwise, repeat
from operator import ne

from agent.kernel.kcmp import kcmp_file
from agent.kernel.many import try_each
from agent.procfs.fdinfo import FdInfo, parse_fdinfo
from agent.state.context import DumpContext
from agent.state.openfile import O_CLOEXEC, O_DIRECTORY, O_PATH, Description

Key = tuple[object, ...]

FDINFO_BYTES = 4096
"""One read; what fills more than half of it may go on (seq_file hands out whole records)."""
SHORT_FDINFO_BYTES = 448
"""One read for which Python needs no malloc(3); what fills it is read once more."""
LINK_OF_LINE = {
    "clockid": "anon_inode:[timerfd]",
    "eventfd-id": "anon_inode:[eventfd]",
    "sigmask": "anon_inode:[signalfd]",
    "tfd": "anon_inode:[eventpoll]",
}
"""Lines of fdinfo that only one kind of file has."""


@dataclass(slots=True)
class Facts:
    """One number as it was seen: ``raw`` is its fdinfo, ``link`` and ``info`` are as in Description.

    ``key`` stands for what two numbers of one description have in common, among the looks of one reader.
    """

    raw: bytes
    link: str
    fdinfo: FdInfo
    info: os.stat_result | None
    key: int
    told_by_raw: bool
    """Whether the same text of fdinfo means the same link; not for paths."""
    told_by_path: bool = False
    """Whether somebody else makes sure that ``info`` still holds, as long as the link is the same."""

    @property
    def cloexec(self) -> bool:
        """Whether the number is closed by exec."""
        return self.fdinfo.cloexec


@dataclass(frozen=True, slots=True)
class Expectation:
    """A table in columns, of which whole lists are compared; see TableReader.expect()."""

    table: Mapping[int, Facts]
    files: list[int]
    """The agent's descriptors of fdinfo, -1 if they are not held open, for all of ``table`` in its order."""
    texts: list[bytes]
    linked: list[int]
    """Those of which fdinfo does not tell all, but the link must be looked at."""
    names: list[str]
    links: list[str]
    placed: list[int]
    """Those of which the inode has to be looked at, too."""
    infos: list[os.stat_result]


class TableReader:
    """Reads the table of one process; close() it.

    :param keep: hold the files of /proc/PID/fdinfo open, for looks after the first one.
    """

    def __init__(self, ctx: DumpContext, *, keep: bool = False) -> None:
        self._ctx = ctx
        self._keep = keep
        self._kept: dict[int, int] = {}
        """The agent's descriptors of fdinfo files, by number of the target."""
        self._parsed: dict[bytes, FdInfo] = {}
        self._keys: dict[Key, int] = {}
        self._files = contextlib.ExitStack()
        self._links = self._open_folder("fd")
        self._infos = self._open_folder("fdinfo")

    def _open_folder(self, name: str) -> int:
        fd = os.open(f"/proc/{self._ctx.pid}/{name}", os.O_RDONLY | O_DIRECTORY | os.O_CLOEXEC)
        self._files.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Close what is held open. Safe to call twice."""
        self._files.close()
        while self._kept:
            os.close(self._kept.popitem()[1])

    def look(self) -> dict[int, Facts]:
        """Return all numbers. Those that a running target closes meanwhile may be missing."""
        seen = {fd: self._see_if_open(fd) for fd in self._list()}
        return {fd: facts for fd, facts in seen.items() if facts is not None}

    def _list(self) -> set[int]:
        numbers = {int(name) for name in os.listdir(self._links)}
        self._keep = self._keep and make_room(len(numbers) + 64)
        return numbers

    def _see_if_open(self, fd: int, old: Facts | None = None) -> Facts | None:
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile, by a target that still runs.
            return self._see(fd) if old is None else self._see_again(fd, old)
        return None

    def expect(self, table: Mapping[int, Facts]) -> Expectation:
        """Lay out what changes() has to compare: what an earlier look has found, of which ``told_by_path`` is final."""
        linked = [fd for fd, facts in table.items() if not facts.told_by_raw]
        infos = {fd: info for fd in linked if (info := table[fd].info) is not None and not table[fd].told_by_path}
        return Expectation(
            table=table,
            files=[self._kept.get(fd, -1) for fd in table],
            texts=[facts.raw for facts in table.values()],
            linked=linked,
            names=[str(fd) for fd in linked],
            links=[table[fd].link for fd in linked],
            placed=list(infos),
            infos=list(infos.values()),
        )

    def changes(self, expected: Expectation) -> dict[int, Facts | None]:
        """Return the numbers that are not as expected; None of one that is closed."""
        # In the freeze: one call for each number, two or three where it takes more to tell, and a closer look at what
        # differs.
        files, linked, table = expected.files, expected.linked, expected.table
        texts = try_each(os.pread, files, repeat(SHORT_FDINFO_BYTES), repeat(0))
        links = try_each(partial(os.readlink, dir_fd=self._links), expected.names)
        infos = try_each(self.stat, expected.placed)
        doubtful = set(compress(table, map(ne, texts, expected.texts)))
        doubtful.update(compress(linked, map(ne, links, expected.links)))
        doubtful.update(compress(expected.placed, map(_is_another, infos, expected.infos)))
        seen = {fd: self._see_if_open(fd, table[fd]) for fd in doubtful}
        changes = {fd: facts for fd, facts in seen.items() if facts is not table[fd]}
        # Since Linux kernel commit f1f1f2569901 ("proc: report open files as size in stat() for /proc/pid/fd") (in
        # v6.2). No more than those that were expected and are still there?
        closed = list(changes.values()).count(None)
        if os.fstat(self._links).st_size != len(table) - closed:
            opened = {fd: self._see_if_open(fd) for fd in self._list() - table.keys()}
            changes.update((fd, facts) for fd, facts in opened.items() if facts is not None)
        return changes

    def _see_again(self, fd: int, old: Facts) -> Facts:
        if self._read(fd) == old.raw and (old.told_by_raw or self._is_at(fd, old)):
            return old
        return self._see(fd)

    def _is_at(self, fd: int, old: Facts) -> bool:
        return os.readlink(str(fd), dir_fd=self._links) == old.link and (
            old.info is None or old.told_by_path or not _is_another(self.stat(fd), old.info)
        )

    def _see(self, fd: int) -> Facts:
        name = str(fd)
        link = os.readlink(name, dir_fd=self._links)
        info = self.stat(fd) if link[0] == "/" else None
        raw = self._read(fd)
        text = self._parsed.get(raw)
        if text is None:
            text = self._parsed[raw] = parse_fdinfo(raw)
        key = self._keys.setdefault(_group_key(link, text, info), len(self._keys))
        return Facts(raw, link, text, info, key, _is_told(link, text))

    def stat(self, fd: int) -> os.stat_result:
        """Return the status of what has the number now; ``info`` of a look may be of an earlier one."""
        return os.stat(str(fd), dir_fd=self._links)

    def _read(self, fd: int) -> bytes:
        kept = self._kept.get(fd)
        file = kept if kept is not None else os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._infos)
        if self._keep:
            self._kept[fd] = file
        try:
            data = os.pread(file, FDINFO_BYTES, 0)
            if len(data) >= FDINFO_BYTES // 2:
                data += b"".join(_rest(file, len(data)))
            return data
        finally:
            if not self._keep and kept is None:
                os.close(file)


def _rest(fd: int, offset: int) -> Iterator[bytes]:
    while data := os.pread(fd, 1 << 16, offset):
        yield data
        offset += len(data)


def _is_told(link: str, text: FdInfo) -> bool:
    # A running target may have put another file there between the two reads: they must agree.
    if link[-1] == "]" and link in (f"pipe:[{text.ino}]", f"socket:[{text.ino}]"):
        return True
    return any(LINK_OF_LINE.get(name) == link for name, _text in text.lines)


def _is_another(now: os.stat_result | None, before: os.stat_result) -> bool:
    return now is None or (now.st_dev, now.st_ino, now.st_mode, now.st_rdev) != (
        before.st_dev,
        before.st_ino,
        before.st_mode,
        before.st_rdev,
    )


def _group_key(link: str, text: FdInfo, info: os.stat_result | None) -> Key:
    # What two numbers of one description must have in common; only within a group does kcmp(2) have
    # to tell.
    if link.startswith("socket:"):
        # A socket has one description and cannot be opened again; it can be locked.
        return (link, text.flags & ~O_CLOEXEC, *text.get_all("lock"))
    rest = tuple(line for line in text.lines if line[0] != "flags")
    place = (info.st_dev, info.st_ino) if info is not None else ()
    return (link, text.flags & ~O_CLOEXEC, rest, *place)


def group(ctx: DumpContext, table: Mapping[int, Facts]) -> list[list[int]]:
    """Return the numbers of each description, all sorted."""
    groups: dict[int, list[int]] = {}
    for fd, facts in table.items():
        groups.setdefault(facts.key, []).append(fd)
    shared: list[list[int]] = []
    for fds in groups.values():
        if len(fds) == 1:
            shared.append(fds)
        elif table[fds[0]].link.startswith("socket:"):
            shared.append(sorted(fds))
        else:
            shared.extend(_split_by_identity(ctx, fds))
    shared.sort()
    return shared


def is_shared(ctx: DumpContext, fds: Sequence[int]) -> bool:
    """Tell whether all of some numbers are of one description."""
    try:
        return all(kcmp_file(ctx.pid, ctx.pid, fds[0], fd) == 0 for fd in fds[1:])
    except OSError:
        return False  # one is closed


def describe(number: int, fds: list[int], table: Mapping[int, Facts]) -> Description:
    """Return the description behind ``fds``, under the id ``number``."""
    facts = table[fds[0]]
    return Description(
        number, fds, facts.link, facts.fdinfo, facts.fdinfo.flags & ~O_CLOEXEC, facts.info
    )


def _split_by_identity(ctx: DumpContext, fds: Sequence[int]) -> Iterable[list[int]]:
    """Split numbers into groups that share a description, by sorting them in the kernel's order.

    The order of the last look is where the sort starts from: while nothing changed it takes n - 1
    calls.
    """
    pid = ctx.pid
    ranks = ctx.ranks
    same: set[tuple[int, int]] = set()

    def compare(left: int, right: int) -> int:
        order = (0, -1, 1)[kcmp_file(pid, pid, left, right)]
        if order == 0:
            same.add((left, right))
            same.add((right, left))
        return order

    try:
        ordered = sorted(sorted(fds, key=lambda fd: ranks.get(fd, fd)), key=cmp_to_key(compare))
    except OSError as err:
        if err.errno != errno.EBADF:
            raise
        # A running target closed one. The next look is right again.
        return [[fd] for fd in fds]
    groups = [[ordered[0]]]
    for left, right in pairwise(ordered):
        # Neighbours in the result were compared with each other, else their order would not be
        # known.
        if (left, right) in same:
            groups[-1].append(right)
        else:
            groups.append([right])
    ranks.update((fd, rank) for rank, fd in enumerate(ordered))
    return [sorted(found) for found in groups]


def make_room(count: int) -> bool:
    """Raise the agent's own limit so that it can have ``count`` more files open, without delay; say whether it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    try:
        if 0 <= soft < wanted:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted, max(wanted, hard) if hard >= 0 else hard)
            )
        # fs/file.c, expand_fdtable(): a table that threads share grows only after an RCU grace period: 10 ms and more.
        fd = os.open("/", O_PATH | os.O_CLOEXEC)
        try:
            os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, wanted - 1))
        finally:
            os.close(fd)
    except (ValueError, OSError):
        return False
    return True
