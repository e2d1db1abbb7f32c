"""The open files of a process: checked and dumped from outside, made in the agent, installed in the skeleton.

On the source everything comes from procfs, kcmp(2) and pidfd_getfd(2): the target runs no call of
ours and needs not be stopped to be looked at. On the destination the agent makes every description
itself, with its own system calls, and the skeleton takes them with pidfd_getfd(2): first all at the
lowest free numbers, in the order of their target numbers, so that each lands at or below where it
belongs; then each is moved up, highest first, so that none overwrites another.

Must never leave the agent with copies of the target's descriptors when it returns (see
DumpContext.drop_fetched).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import resource
import struct
import time
from collections.abc import Iterable, Sequence
from functools import cmp_to_key
from typing import Any

from agent.errors import RefusedError, RestoreError
from agent.kernel import syscalls as nr
from agent.kernel.kcmp import kcmp_file
from agent.procfs.fdinfo import FdInfo, parse_fdinfo
from agent.state import filelock
from agent.state.clocks import clock_shift
from agent.state.context import DumpContext, RestoreContext, RestoreOptions
from agent.state.openfile import (
    F_SETOWN_EX,
    F_SETSIG,
    O_ASYNC,
    O_CLOEXEC,
    O_DIRECT,
    O_DIRECTORY,
    O_PATH,
    Description,
    DumpJob,
    Item,
    PreflightJob,
    RestoreJob,
    read_owner,
)
from agent.state.registry import FILE_KINDS, kind_of
from agent.state.unixrestore import listen_calls
from agent.target.batch import Batch
from agent.types import Obstacle
from protocol import codec
from protocol.state.files import FILE_BODIES, FdEntry, FileOwner, FilesState, OpenFile

FD_CLOEXEC = 1
OWNED_KINDS = frozenset({"pipe", "unix", "inet"})
"""Kinds whose owner matters without O_ASYNC (SIGURG), and which are fetched anyway."""

Key = tuple[object, ...]


def check_files(ctx: DumpContext) -> list[Obstacle]:
    """Return every reason why the files of a running process cannot be carried, all at once."""
    job, _ = _examine(ctx, content=False)
    return job.obstacles


def dump_files(ctx: DumpContext, *, content: bool = True) -> FilesState:
    """Describe all open files. The final dump must be made while every thread is stopped.

    ``content`` False leaves out what is queued in pipes and sockets: enough for a preflight, and
    leaves no trace.

    :raises RefusedError: when something cannot be carried.
    """
    job, state = _examine(ctx, content=content)
    if job.obstacles or state is None:
        raise RefusedError(
            f"Cannot carry the open files of process {ctx.pid}: {job.obstacles[0]}", job.obstacles
        )
    return state


def has_direct_io(state: FilesState) -> bool:
    """Tell whether a file is open with O_DIRECT.

    Such reads pin pages and store into them past any write protection: no tracker but compare is sure to see that.
    """
    return any(file.kind == "regular" and file.flags & O_DIRECT for file in state.files)


def _examine(ctx: DumpContext, *, content: bool) -> tuple[DumpJob, FilesState | None]:
    entries, descriptions = read_table(ctx)
    # Not before: a timer that is read earlier than the clock ends late by so much, and not early.
    clock_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + clock_shift(ctx.pid).monotonic_ns
    job = DumpJob(ctx, descriptions, content)
    ctx.drop_fetched()
    try:
        files = [file for desc in descriptions if (file := _dump_one(job, desc)) is not None]
    finally:
        ctx.drop_fetched()
    if job.obstacles:
        return job, None
    return job, FilesState(fds=tuple(entries), files=tuple(files), clock_monotonic_ns=clock_ns)


def read_table(ctx: DumpContext) -> tuple[list[FdEntry], list[Description]]:
    """Read the descriptor table and find out which numbers share a description."""
    pid = ctx.pid
    groups: dict[Key, list[int]] = {}
    cloexec: dict[int, bool] = {}
    facts: dict[int, tuple[str, FdInfo, os.stat_result | None]] = {}
    parsed: dict[bytes, FdInfo] = {}
    links = os.open(f"/proc/{pid}/fd", os.O_RDONLY | O_DIRECTORY | os.O_CLOEXEC)
    infos = os.open(f"/proc/{pid}/fdinfo", os.O_RDONLY | O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(links):
            try:
                link = os.readlink(name, dir_fd=links)
                info = os.stat(name, dir_fd=links) if link[0] == "/" else None
                raw = _read_at(infos, name)
            except FileNotFoundError:
                continue  # Closed meanwhile, by a target that still runs.
            text = parsed.get(raw)
            if text is None:
                text = parsed[raw] = parse_fdinfo(raw)
            fd = int(name)
            cloexec[fd] = text.cloexec
            facts[fd] = (link, text, info)
            groups.setdefault(_group_key(link, text, info), []).append(fd)
    finally:
        os.close(links)
        os.close(infos)
    shared: list[list[int]] = []
    for key, fds in groups.items():
        fds.sort()
        if len(fds) == 1 or key[0] == "socket":
            shared.append(fds)
        else:
            shared.extend(_split_by_identity(ctx, fds))
    shared.sort()
    descriptions = []
    file_ids: dict[int, int] = {}
    for number, fds in enumerate(shared, 1):
        link, text, info = facts[fds[0]]
        descriptions.append(Description(number, fds, link, text, text.flags & ~O_CLOEXEC, info))
        file_ids.update(dict.fromkeys(fds, number))
    entries = [
        FdEntry(fd=fd, file_id=file_ids[fd], cloexec=cloexec[fd]) for fd in sorted(file_ids)
    ]
    return entries, descriptions


def _read_at(folder: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        data = os.read(fd, 4096)
        if len(data) < 2048:  # seq_file hands out whole records: a short one is the last one.
            return data
        chunks = [data]
        while data := os.read(fd, 65536):
            chunks.append(data)
        return b"".join(chunks)
    finally:
        os.close(fd)


def _group_key(link: str, text: FdInfo, info: os.stat_result | None) -> Key:
    # What two numbers of one description must have in common; only within a group does kcmp(2) have
    # to tell.
    if link.startswith("socket:"):
        return ("socket", link)  # A socket has one description and cannot be opened again.
    rest = tuple(line for line in text.lines if line[0] != "flags")
    place = (info.st_dev, info.st_ino) if info is not None else ()
    return ("other", link, text.flags & ~O_CLOEXEC, rest, *place)


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
    for left, right in itertools.pairwise(ordered):
        # Neighbours in the result were compared with each other, else their order would not be
        # known.
        if (left, right) in same:
            groups[-1].append(right)
        else:
            groups.append([right])
    ranks.update((fd, rank) for rank, fd in enumerate(ordered))
    return [sorted(group) for group in groups]


def _dump_one(job: DumpJob, desc: Description) -> OpenFile | None:
    before = len(job.obstacles)
    try:
        kind = kind_of(job, desc)
        body = kind.dump(job, desc) if kind is not None else None
        locks = filelock.dump_locks(job, desc)
        owner = _dump_owner(job, desc, kind.name if kind else "")
        encoded = codec.encode(body) if body is not None else b""
    except FileNotFoundError:
        return None  # Closed meanwhile by a running target.
    except OSError as err:
        job.refuse(desc, "file", f"{desc.link} cannot be examined: {err.strerror}")
        return None
    except UnicodeEncodeError:
        job.refuse(desc, "file", f"{os.fsencode(desc.link)!r} is not UTF-8", "rename the file")
        return None
    if kind is None or body is None or len(job.obstacles) > before:
        return None
    return OpenFile(
        id=desc.id,
        kind=kind.name,
        flags=desc.flags,
        pos=desc.fdinfo.pos,
        owner=owner,
        locks=locks,
        body=encoded,
    )


def _dump_owner(job: DumpJob, desc: Description, kind: str) -> FileOwner | None:
    if desc.flags & O_PATH or not (kind in OWNED_KINDS or desc.flags & O_ASYNC):
        return None
    if kind == "external":
        return None
    return read_owner(job.fetch(desc))


def decode_items(state: FilesState) -> dict[str, list[Item[Any]]]:
    """Decode the bodies, by kind.

    :raises RemoteProtocolError: when one is malformed.
    :raises RestoreError: when a kind is unknown.
    """
    numbers: dict[int, list[int]] = {}
    for entry in state.fds:
        numbers.setdefault(entry.file_id, []).append(entry.fd)
    items: dict[str, list[Item[Any]]] = {}
    for file in state.files:
        schema = FILE_BODIES.get(file.kind)
        if schema is None:
            raise RestoreError(
                f"Cannot restore fd {numbers[file.id][0]}: unknown kind of file {file.kind!r}"
            )
        item: Item[Any] = Item(file, codec.decode(schema, file.body), tuple(numbers[file.id]))
        items.setdefault(file.kind, []).append(item)
    return items


def preflight_files(state: FilesState, options: RestoreOptions) -> list[Obstacle]:
    """Check on the destination that everything can be opened there. Changes nothing."""
    job = PreflightJob(options)
    items = decode_items(state)
    for name, kind in FILE_KINDS.items():
        if kind.preflight is not None and name in items:
            kind.preflight(job, items[name])
    filelock.preflight_locks(job, items.get("regular", ()))
    return job.obstacles


class FileRestorer:
    """Makes the descriptions of one process and installs them in its skeleton.

    Call open_all(), install() and, when everything else is restored, start(); close() in any case.
    """

    def __init__(self, ctx: RestoreContext) -> None:
        self._job = RestoreJob(ctx)
        self._items: dict[str, list[Item[Any]]] = {}

    def open_all(self, state: FilesState) -> None:
        """Make every description in the agent, with its contents; nothing is in the skeleton yet.

        :raises RestoreError: when one cannot be made; close() lets go of the others.
        """
        _make_room(len(state.files) + 64)
        self._items = decode_items(state)
        job = self._job
        job.items = {item.id: item for items in self._items.values() for item in items}
        for name, kind in FILE_KINDS.items():
            items = self._items.get(name)
            if items:
                try:
                    kind.restore(job, items)
                except OSError as err:
                    raise RestoreError(
                        f"Cannot restore {items[0]}"
                        f"{' or others' if len(items) > 1 else ''}: {name}: {err}"
                    ) from err
        for item in job.items.values():
            filelock.restore_locks(item, job.fds[item.id])

    def install(self, state: FilesState) -> None:
        """Put everything into the skeleton's table under the exact numbers; other numbers are closed.

        :raises RestoreError: when a number cannot be had.
        :raises InjectError: when a call in the skeleton fails.
        """
        ctx = self._job.ctx
        highest = state.fds[-1].fd if state.fds else -1
        clash = ctx.reserved_fds.intersection(entry.fd for entry in state.fds)
        if clash:
            raise RestoreError(f"Cannot restore fd {min(clash)}: the skeleton needs this number")
        first = Batch()
        self._add_clearing(first, highest)
        order = sorted(self._job.items.values(), key=lambda item: item.fds[0])
        taken = [
            first.call(
                nr.NR_pidfd_getfd, ctx.agent_pidfd, self._job.fds[item.id], 0, name="pidfd_getfd"
            )
            for item in order
        ]
        ctx.injector.run(first)
        slots = [call.value for call in taken]
        for item, slot in zip(order, slots, strict=True):
            if slot > item.fds[0]:
                raise RestoreError(f"Cannot restore {item}: it came as fd {slot} first")
        moves = Batch()
        _add_moves(moves, state, order, slots)
        for name, kind in FILE_KINDS.items():
            if kind.install is not None and name in self._items:
                kind.install(self._job, self._items[name], moves)
        _run(ctx, moves)
        for call in self._job.after:
            call()
        # From here on nothing may be closed: that would drop the record locks of the process.
        last = Batch()
        for item in self._job.items.values():
            filelock.add_posix_locks(item, last)
            _add_owner(item, last)
        _run(ctx, last)

    def start(self, *, elapsed_ns: int = 0) -> None:
        """Do what must come last (timers are armed), and let go of the agent's copies.

        ``elapsed_ns``: how long ago the table was dumped, by the process's own clock; timers run
        meanwhile.
        """
        self._job.elapsed_ns = elapsed_ns
        for name, items in self._items.items():
            start = FILE_KINDS[name].start
            if start is not None:
                start(self._job, items)
        self._close_copies()

    def last_calls(self, batch: Batch) -> None:
        """Add the calls that the process must make with its own credentials, in the batch that sets them."""
        listen_calls(self._items.get("unix", ()), batch)

    def close(self) -> None:
        """Close the agent's copies. Safe to call twice.

        A process that no longer lives was not released: names taken from the source go back.
        """
        self._close_copies()
        while self._job.replaced:
            path, aside = self._job.replaced.pop()
            with contextlib.suppress(OSError):
                if _is_alive(self._job.ctx.pid):
                    os.unlink(aside)
                else:
                    os.rename(aside, path)

    def _close_copies(self) -> None:
        while self._job.fds:
            os.close(self._job.fds.popitem()[1])

    def agent_fd(self, file_id: int) -> int:
        """Return the agent's copy of a description, until start() or close()."""
        return self._job.fds[file_id]

    def _add_clearing(self, batch: Batch, highest: int) -> None:
        ctx = self._job.ctx
        keep = sorted(ctx.reserved_fds | {ctx.agent_pidfd})
        start = 0
        for fd in (*keep, 1 << 31):
            if start < fd:
                batch.call(nr.NR_close_range, start, fd - 1, 0, name="close_range")
            start = fd + 1
        soft, hard = resource.prlimit(ctx.pid, resource.RLIMIT_NOFILE)
        if highest >= soft:
            # The process may have lowered its limit after it opened them; its own limits come
            # later.
            limit = max(highest + 1, hard) if hard >= 0 else hard
            new = struct.pack("=QQ", limit & (1 << 64) - 1, limit & (1 << 64) - 1)
            batch.call(
                nr.NR_prlimit64, 0, resource.RLIMIT_NOFILE, batch.data(new), 0, name="prlimit64"
            )


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _run(ctx: RestoreContext, batch: Batch) -> None:
    if len(batch):
        ctx.injector.run(batch)


def _make_room(count: int) -> None:
    # The agent holds all descriptions at once, beside its own files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if 0 <= soft < wanted:
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted, max(wanted, hard) if hard >= 0 else hard)
            )
        except (ValueError, OSError) as err:
            raise RestoreError(
                f"Cannot open {count} files: the limit is {hard}", hint="raise ulimit -n"
            ) from err


def _add_moves(
    batch: Batch, state: FilesState, order: Sequence[Item[Any]], slots: Sequence[int]
) -> None:
    cloexec = {entry.fd: entry.cloexec for entry in state.fds}
    home = {}
    for item, slot in reversed(list(zip(order, slots, strict=True))):
        fd = home[item.id] = item.fds[0]
        if fd == slot:
            if not cloexec[fd]:  # pidfd_getfd(2) sets it.
                batch.call(nr.NR_fcntl, fd, fcntl.F_SETFD, 0, name="fcntl(F_SETFD)")
        else:
            batch.call(nr.NR_dup3, slot, fd, O_CLOEXEC if cloexec[fd] else 0, name="dup3")
            batch.call(nr.NR_close, slot, name="close")
    for item in order:
        for fd in item.fds[1:]:
            flags = O_CLOEXEC if cloexec[fd] else 0
            batch.call(nr.NR_dup3, home[item.id], fd, flags, name="dup3")


def _add_owner(item: Item[Any], batch: Batch) -> None:
    owner = item.file.owner
    fd = item.fds[0]
    if owner is not None:
        if owner.pid:
            blob = batch.data(struct.pack("=ii", owner.type, owner.pid))
            # The owner may have ended long ago on the source: then nobody gets the signal here
            # either.
            batch.call(nr.NR_fcntl, fd, F_SETOWN_EX, blob, name="fcntl(F_SETOWN_EX)", check=False)
        if owner.signal:
            batch.call(nr.NR_fcntl, fd, F_SETSIG, owner.signal, name="fcntl(F_SETSIG)")
    if item.file.flags & O_ASYNC and item.file.kind != "external":
        flags = item.file.flags
        batch.call(nr.NR_fcntl, fd, fcntl.F_SETFL, flags, name="fcntl(F_SETFL)")
