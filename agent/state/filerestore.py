"""The open files of a process, made in the agent and installed in the skeleton.

The agent makes every description itself, with its own system calls, and the skeleton takes them with pidfd_getfd(2):
first all at the lowest free numbers, in the order of their target numbers, so that each lands at or below where it
belongs; then each is moved up, highest first, so that none overwrites another.

What the source has sent ahead (agent.state.predump) is made and installed while the source still runs, as far as it can
be had; what has become of it since is put right in the end. Nobody outside the skeleton must notice what is made ahead.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import resource
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from agent.errors import RestoreError, TransferError
from agent.kernel import syscalls as nr
from agent.state import filelock, inetsk
from agent.state.context import RestoreContext
from agent.state.fdtable import make_room
from agent.state.fileitems import decode_item, decode_items
from agent.state.openfile import (
    F_SETOWN_EX,
    F_SETSIG,
    O_ASYNC,
    O_CLOEXEC,
    FileKind,
    Item,
    RestoreJob,
)
from agent.state.registry import FILE_KINDS
from agent.state.unixrestore import listen_calls
from agent.target.batch import Batch, Call
from protocol.state.files import FdEntry, FilesChange, FilesState
from protocol.state.inetsk import InetState

_log = logging.getLogger(__name__)

FD_CLOEXEC = 1
SPARE_FDS = 64
"""Numbers that the skeleton may need beside those of the process while it is built."""
NUMBERS_AT_ONCE = 1 << 11
"""How many numbers of a new table are made together: each may take three calls, of half a kilobyte of the agent."""
MAX_MISSED = 8
"""How many files of one kind may turn out impossible to make ahead, before the others are left for the end too."""


class FileRestorer:
    """Makes the descriptions of one process and installs them in its skeleton.

    Call prepare() with what is sent ahead, if there is any, then open_all(), install() and, when everything else is
    restored, start(); close() in any case. What was made ahead costs nothing in the end, unless it has changed.
    """

    def __init__(self, ctx: RestoreContext) -> None:
        self._job = RestoreJob(ctx)
        self._table: dict[int, FdEntry] | None = None
        """The table as the source has told it; None before it has."""
        self._standing: dict[int, FdEntry] = {}
        """The table of the skeleton as it is."""
        self._touched: set[int] = set()
        """Numbers at which the two may differ."""
        self._ahead: set[int] = set()
        """File ids of what was made ahead."""
        self._bound: frozenset[int] = frozenset()
        """Those of them that hold a port."""
        self._listeners: dict[int, int] = {}
        """The agent's copies of those of them that are to listen in the end, by file id."""
        self._late: dict[str, list[Item[Any]]] = {}
        """What is made in the end, by kind."""

    # -- ahead: the source runs --------------------------------------------------------------------------------------

    def prepare(self, state: FilesState) -> None:
        """Make and install what can be had by now; the rest is left for open_all().

        :raises InjectError: a call in the skeleton fails.
        """
        items = self._begin(state)
        _make_room(len(state.files))
        job = self._job
        job.ahead = True
        for name, kind in FILE_KINDS.items():
            if kind.unchanged is not None and name in items:
                self._try_to_make(kind, items[name])
        job.ahead = False
        # A number that the skeleton needs is an error in the end, if the process still has it open.
        self._drop(item for item in job.items.values() if not job.ctx.reserved_fds.isdisjoint(item.fds))
        self._drop_deaf_epolls(items.get("epoll", ()))
        self._ahead = set(job.fds)
        self._bound = frozenset(
            item.id for item in items.get("inet", ()) if item.id in self._ahead and item.body.local
        )
        made = {
            name: kept
            for name, found in items.items()
            if (kept := [item for item in found if item.id in self._ahead])
        }
        whole = job.items
        job.items = {item.id: item for found in made.values() for item in found}
        try:
            self._install({entry.fd: entry for entry in state.fds if entry.file_id in self._ahead}, made)
            for number in self._bound:
                if whole[number].body.state is InetState.LISTENING:
                    self._listeners[number] = job.fds.pop(number)
        finally:
            self._close_copies()
            job.items = whole
        job.installed = {entry.file_id: fd for fd, entry in self._standing.items()}
        self._touched = {entry.fd for entry in state.fds if entry.file_id not in self._ahead}

    def _begin(self, state: FilesState) -> dict[str, list[Item[Any]]]:
        """Begin with a whole table, of which nothing is made yet."""
        items = decode_items(state)
        self._job.items = {item.id: item for found in items.values() for item in found}
        self._job.installed.clear()
        self._ahead.clear()
        self._standing.clear()
        self._table = {entry.fd: entry for entry in state.fds}
        self._touched = set(self._table)
        return items

    def _try_to_make(self, kind: FileKind[Any], items: Sequence[Item[Any]]) -> None:
        job = self._job
        units = _units(items)
        for _attempt in range(MAX_MISSED):
            try:
                kind.restore(job, [item for unit in units for item in unit])
                return
            except (OSError, RestoreError, TransferError) as err:
                # They are made in order: the first one that is not complete is the one that cannot be had.
                missed = next(n for n, unit in enumerate(units) if any(i.id not in job.fds for i in unit))
                _log.debug("%s is not made ahead: %s", units[missed][0], err)
                self._drop(units[missed])
                units = units[missed + 1 :]
        self._drop([item for unit in units for item in unit])

    def _drop_deaf_epolls(self, epolls: Iterable[Item[Any]]) -> None:
        # One that watches what is not there cannot be made ahead, and so on for those that watch it.
        waiting = [item for item in epolls if item.id in self._job.fds]
        while deaf := [
            item for item in waiting if any(i.file_id not in self._job.fds for i in item.body.items)
        ]:
            self._drop(deaf)
            waiting = [item for item in waiting if item.id in self._job.fds]

    def _drop(self, items: Iterable[Item[Any]]) -> None:
        for item in items:
            fd = self._job.fds.pop(item.id, None)
            if fd is not None:
                os.close(fd)

    # -- the end: the source is frozen -------------------------------------------------------------------------------

    def open_all(self, files: FilesState | FilesChange) -> None:
        """Make every description that was not made ahead, in the agent, with its contents.

        :raises RestoreError: when one cannot be made; close() lets go of the others.
        :raises TransferError: the source contradicts itself.
        """
        before = dict(self._standing) if self._bound else {}
        if isinstance(files, FilesState):
            self._begin(files)
        else:
            self._follow(files)
        self._free_ports(before)
        job = self._job
        self._late = {}
        for number in sorted(job.items.keys() - self._ahead):
            item = job.items[number]
            self._late.setdefault(item.file.kind, []).append(item)
        late = list(itertools.chain.from_iterable(self._late.values()))
        _make_room(len(late))
        for name, kind in FILE_KINDS.items():
            items = self._late.get(name, [])
            if items:
                try:
                    kind.restore(job, items)
                except OSError as err:
                    raise RestoreError(
                        f"Cannot restore {items[0]}"
                        f"{' or others' if len(items) > 1 else ''}: {name}: {err}"
                    ) from err
        for number, fd in self._listeners.items():
            inetsk.listen_ahead(job.items[number], fd)
        for item in late:
            filelock.restore_locks(item, job.fds[item.id])

    def _follow(self, change: FilesChange) -> None:
        """Make the table and the items what they are after a change; costs as much as has changed."""
        if self._table is None:
            raise TransferError("The source tells how its files have changed, but never sent them")
        items = self._job.items
        numbers = {file.id: set[int]() for file in change.files}
        if not numbers.keys().isdisjoint(items):
            raise TransferError(f"The source uses file ids {sorted(numbers.keys() & items.keys())} twice")
        for fd in (*change.closed, *(entry.fd for entry in change.fds)):
            entry = self._table.pop(fd, None)
            if entry is not None:
                numbers.setdefault(entry.file_id, set(items[entry.file_id].fds)).discard(fd)
            self._touched.add(fd)
        for entry in change.fds:
            known = items.get(entry.file_id)
            if entry.file_id not in numbers and known is None:
                raise TransferError(f"The source did not send the file of fd {entry.fd}")
            numbers.setdefault(entry.file_id, set(known.fds if known else ())).add(entry.fd)
            self._table[entry.fd] = entry
        new = {file.id: file for file in change.files}
        for file_id, fds in numbers.items():
            if not fds:
                items.pop(file_id, None)
                self._ahead.discard(file_id)
            elif file_id in new:
                items[file_id] = decode_item(new[file_id], tuple(sorted(fds)))
            else:
                items[file_id] = replace(items[file_id], fds=tuple(sorted(fds)))

    def _free_ports(self, before: Mapping[int, FdEntry]) -> None:
        """Close sockets made ahead that have come to nothing: what takes their place may want their ports."""
        gone = [
            fd
            for fd, entry in before.items()
            if entry.file_id in self._bound and entry.file_id not in self._ahead
        ]
        if gone:
            batch = Batch()
            _add_closing(batch, sorted(gone))
            self._run(batch)
            for fd in gone:
                self._standing.pop(fd, None)
        for number in self._listeners.keys() - self._ahead:
            os.close(self._listeners.pop(number))

    def install(self) -> None:
        """Put everything into the skeleton's table under the exact numbers; other numbers are closed.

        :raises RestoreError: when a number cannot be had.
        :raises InjectError: when a call in the skeleton fails.
        """
        assert self._table is not None
        self._install(self._table, self._late)
        # From here on nothing may be closed: that would drop the record locks of the process.
        last = Batch()
        for item in itertools.chain.from_iterable(self._late.values()):
            filelock.add_posix_locks(item, last)
            _add_owner(item, last)
        self._run(last)

    def _install(
        self, entries: Mapping[int, FdEntry], items: Mapping[str, Sequence[Item[Any]]]
    ) -> None:
        ctx = self._job.ctx
        clash = ctx.reserved_fds.intersection(entries)
        if clash:
            raise RestoreError(f"Cannot restore fd {min(clash)}: the skeleton needs this number")
        batch = Batch()
        if not self._standing:
            self._add_clearing(batch)
        if self._touched:
            self._add_limit(batch, max(self._touched))
        *before, last = self._take_touched()
        for numbers in before:
            self._run_taking(batch, self._add_changes(batch, entries, numbers))
            batch = Batch()
        taken = self._add_changes(batch, entries, last)
        for name, kind in FILE_KINDS.items():
            if kind.install is not None and name in items:
                kind.install(self._job, items[name], batch)
        self._run_taking(batch, taken)
        while self._job.after:
            self._job.after.pop(0)()

    def _take_touched(self) -> list[list[int]]:
        """Return the touched numbers, none of which is from now on, in portions to be made one after another.

        What stands at the numbers of one may be needed for those of another: a table that has any is changed at once.
        """
        numbers = sorted(self._touched)
        self._touched.clear()
        size = len(numbers) if self._standing else NUMBERS_AT_ONCE
        return [numbers[low : low + size] for low in range(0, len(numbers), size or 1)] or [[]]

    def _run_taking(self, batch: Batch, taken: Mapping[int, Call]) -> None:
        self._run(batch)
        for slot, call in taken.items():
            if call.value != slot:
                raise RestoreError(f"Cannot install files: fd {slot} of the skeleton was not free")

    def _add_changes(
        self, batch: Batch, entries: Mapping[int, FdEntry], touched: Sequence[int]
    ) -> dict[int, Call]:
        """Add the calls that make the ``touched`` numbers, in order, of the table that stands as in ``entries``.

        Returns those that take a file, by the number that it comes to stand at first.
        """
        job, standing = self._job, self._standing
        closed = [
            fd
            for fd in touched
            if fd in standing and (fd not in entries or entries[fd].file_id != standing[fd].file_id)
        ]
        homes: dict[int, int] = {}
        coming: dict[int, int] = {}
        gone = set(closed)
        for fd in touched:
            entry = entries.get(fd)
            if entry is None or entry.file_id in homes or entry.file_id in coming:
                continue
            home = next(
                (n for n in job.items[entry.file_id].fds if n in standing and n not in gone), None
            )
            if home is not None:
                homes[entry.file_id] = home
            else:
                coming[entry.file_id] = fd
                job.agent_fd(entry.file_id)  # Before its last number is closed.
        _add_closing(batch, closed)
        before = {fd: standing.pop(fd) for fd in touched if fd in standing}
        busy = (standing.keys() | before.keys() - gone) if coming else set()
        free = _free_numbers(busy | job.ctx.reserved_fds | {job.ctx.agent_pidfd})
        taken: dict[int, Call] = {}
        for file_id, fd in coming.items():
            slot = next(free)
            if slot > fd:
                raise RestoreError(f"Cannot restore fd {fd}: it would come as fd {slot} first")
            taken[slot] = batch.call(
                nr.NR_pidfd_getfd, job.ctx.agent_pidfd, job.fds[file_id], 0, name="pidfd_getfd"
            )
        for (slot, call), fd in reversed(list(zip(taken.items(), coming.values(), strict=True))):
            if fd != slot:
                flags = O_CLOEXEC if entries[fd].cloexec else 0
                batch.call(nr.NR_dup3, call, fd, flags, name="dup3")
                batch.call(nr.NR_close, call, name="close")
            elif not entries[fd].cloexec:  # pidfd_getfd(2) sets it.
                batch.call(nr.NR_fcntl, fd, fcntl.F_SETFD, 0, name="fcntl(F_SETFD)")
        homes.update(coming)
        for fd in touched:
            entry = entries.get(fd)
            if entry is None:
                continue
            standing[fd] = entry
            if fd in before and fd not in gone:
                if before[fd].cloexec != entry.cloexec:
                    flags = FD_CLOEXEC if entry.cloexec else 0
                    batch.call(nr.NR_fcntl, fd, fcntl.F_SETFD, flags, name="fcntl(F_SETFD)")
            elif fd != homes[entry.file_id]:
                flags = O_CLOEXEC if entry.cloexec else 0
                batch.call(nr.NR_dup3, homes[entry.file_id], fd, flags, name="dup3")
        return taken

    def start(self, *, elapsed_ns: int = 0) -> None:
        """Do what must come last (timers are armed), and let go of the agent's copies.

        ``elapsed_ns``: how long ago the table was dumped, by the process's own clock; timers run
        meanwhile.
        """
        self._job.elapsed_ns = elapsed_ns
        for name, items in self._late.items():
            start = FILE_KINDS[name].start
            if start is not None:
                start(self._job, items)
        self._close_copies()
        self._close_listeners()

    def last_calls(self, batch: Batch) -> None:
        """Add the calls that the process must make with its own credentials, in the batch that sets them."""
        listen_calls(self._late.get("unix", ()), batch)

    def close(self) -> None:
        """Close the agent's copies. Safe to call twice.

        A process that no longer lives was not released: names taken from the source go back.
        """
        self._close_copies()
        self._close_listeners()
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

    def _close_listeners(self) -> None:
        while self._listeners:
            os.close(self._listeners.popitem()[1])

    def agent_fd(self, file_id: int) -> int:
        """Return the agent's copy of a description, until start() or close()."""
        return self._job.agent_fd(file_id)

    def _add_clearing(self, batch: Batch) -> None:
        ctx = self._job.ctx
        start = 0
        for fd in (*sorted(ctx.reserved_fds | {ctx.agent_pidfd}), 1 << 31):
            if start < fd:
                batch.call(nr.NR_close_range, start, fd - 1, 0, name="close_range")
            start = fd + 1

    def _add_limit(self, batch: Batch, highest: int) -> None:
        soft, hard = resource.prlimit(self._job.ctx.pid, resource.RLIMIT_NOFILE)
        if 0 <= soft <= highest + SPARE_FDS:
            # The process may have lowered its limit after it opened them; its own limits come
            # later.
            limit = max(highest + 1, hard) if hard >= 0 else hard
            new = struct.pack("=QQ", limit & (1 << 64) - 1, limit & (1 << 64) - 1)
            batch.call(
                nr.NR_prlimit64, 0, resource.RLIMIT_NOFILE, batch.data(new), 0, name="prlimit64"
            )

    def _run(self, batch: Batch) -> None:
        if len(batch):
            self._job.ctx.injector.run(batch)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _make_room(count: int) -> None:
    # The agent holds all descriptions at once, beside its own files.
    if not make_room(count + SPARE_FDS):
        raise RestoreError(
            f"Cannot open {count} files: the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[1]}",
            hint="raise ulimit -n",
        )


def _units(items: Sequence[Item[Any]]) -> list[list[Item[Any]]]:
    # What can only be made together: the ends of a pipe.
    units: dict[object, list[Item[Any]]] = {}
    for item in items:
        key = ("pipe", item.body.pipe_id) if item.file.kind == "pipe" else item.id
        units.setdefault(key, []).append(item)
    return list(units.values())


def _free_numbers(taken: Set[int]) -> Iterator[int]:
    return (fd for fd in itertools.count() if fd not in taken)


def _add_closing(batch: Batch, numbers: Sequence[int]) -> None:
    start = 0
    for end, (fd, after) in enumerate(itertools.zip_longest(numbers, numbers[1:], fillvalue=-1), 1):
        if after != fd + 1:
            batch.call(nr.NR_close_range, numbers[start], fd, 0, name="close_range")
            start = end


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
