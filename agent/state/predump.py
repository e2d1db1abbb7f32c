"""Open files dumped while the target runs, so that the freeze only has to find out what has changed since.

What is dumped so is what the destination may make ahead, without anybody noticing and without a trace if it comes to
nothing: files, directories, devices, pipes with nothing in them, eventfds, TCP sockets that listen (those made ahead do
not yet) or will be found reset, epolls of these... A kind has to say what must be looked at for that
(FileKind.unchanged); other sockets and all that is locked, has an owner or is a FIFO is dumped in the freeze as if
there had been no earlier dump.

A description is unchanged when its numbers show the same link and fdinfo as before, are not shared in another way, and
its kind finds the rest as it was. It need not be the same one: closed and opened again, in the same state, is as good.
While the target runs it may change in the middle of a look, so whatever a kind read by other means than link and fdinfo
has to be checked again in the freeze.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from agent.state.clocks import OwnClock
from agent.state.context import DumpContext
from agent.state.fdtable import Facts, TableReader, describe, group, is_shared
from agent.state.files import dump_all, dump_one, has_direct_io, require_carried
from agent.state.openfile import O_ASYNC, Description, DumpJob, Recheck
from agent.state.registry import FILE_KINDS
from agent.state.sockets import is_tcp
from protocol.state.files import FdEntry, FilesChange, FilesState, OpenFile


class PreDump:
    """The open files of a running process, and what becomes of them. close() it.

    ``state`` has only what is worth being sent ahead; ``has_direct_io`` tells of that.
    """

    def __init__(self, ctx: DumpContext) -> None:
        self._ctx = ctx
        self._files: dict[int, tuple[OpenFile, Any]] = {}
        self._reader = TableReader(ctx, keep=True)
        self._clock = OwnClock(ctx.pid)
        ctx.forget_shared()
        try:
            self._clock.now_ns()
            self._table = self._reader.look()
            found = [
                describe(number, fds, self._table)
                for number, fds in enumerate(group(ctx, self._table), 1)
            ]
            self._next_id = len(found) + 1
            self._job = DumpJob(ctx, found, content=False)
            self._dump(found)
        except BaseException:
            self.close()
            raise
        kept = [desc for desc in found if desc.id in self._files]
        self._by_fd = {fd: desc for desc in kept for fd in desc.fds}
        times = Counter(facts.key for facts in self._table.values())
        self._apart = {
            fd: desc for desc in kept if times[self._table[desc.fd].key] == len(desc.fds) for fd in desc.fds
        }
        """Those that no other numbers can share, unless one changes; by number."""
        self._together = [desc.fds for desc in kept if len(desc.fds) > 1 and desc.fd in self._apart]
        """Of those, the numbers of each that has several."""
        self._of_key = {self._table[desc.fd].key: desc for desc in self._apart.values()}
        self._expected = self._reader.expect(self._table)
        self._entries = {
            fd: FdEntry(fd=fd, file_id=desc.id, cloexec=self._table[fd].cloexec)
            for fd, desc in self._by_fd.items()
        }
        self.state = FilesState(
            fds=tuple(self._entries[fd] for fd in sorted(self._entries)),
            files=tuple(file for file, _body in self._files.values()),
        )
        self.has_direct_io = has_direct_io(self.state.files)

    def close(self) -> None:
        """Let go of what was kept for the second look. Safe to call twice."""
        self._reader.close()
        self._clock.close()

    def _dump(self, found: Iterable[Description]) -> None:
        # Obstacles do not matter: the final look finds them if they are still there.
        candidates = {}
        by_kind: dict[str, list[tuple[int, Any]]] = {}
        for desc in found:
            with contextlib.suppress(OSError):
                is_candidate = not desc.link.startswith("socket:") or is_tcp(self._job, desc)
                dumped = dump_one(self._job, desc) if is_candidate else None
                if dumped is not None and _may_be_ahead(dumped[0]):
                    candidates[desc.id] = desc
                    self._files[desc.id] = dumped
                    by_kind.setdefault(dumped[0].kind, []).append((desc.id, dumped[1]))
            # The running target must not be left with copies for longer than a moment.
            self._ctx.drop_fetched()
        self._by_kind = [  # Epolls after what they watch.
            (kind.unchanged, by_kind[name])
            for name, kind in FILE_KINDS.items()
            if kind.unchanged is not None and name in by_kind
        ]
        kept = self._check(Recheck(self._job, self._job, candidates))
        self._files = {number: self._files[number] for number in kept}
        for desc in kept.values():
            for fd in desc.fds:
                facts = self._table[fd]
                # The kind itself looks at where the path leads to.
                facts.told_by_path = (
                    self._files[desc.id][0].kind == "regular"
                    and facts.info is not None
                    and facts.info.st_ino == facts.fdinfo.ino
                )

    def _check(self, check: Recheck) -> dict[int, Description]:
        """Find out which candidates are unchanged."""
        candidates, kept = check.candidates, check.kept
        for unchanged, rows in self._by_kind:
            found = [(candidates[number], body) for number, body in rows if number in candidates]
            for number in unchanged(check, found):
                kept[number] = candidates[number]
        return kept

    # -- the second look: the target is frozen -----------------------------------------------------------------------

    def dump_change(self) -> FilesChange:
        """Dump what is not as it was; every thread of the target is stopped by now.

        :raises RefusedError: when something cannot be carried.
        """
        ctx = self._ctx
        ctx.forget_shared()
        changes = self._reader.changes(self._expected)
        clock_ns = self._clock.now_ns()
        settled = self._find_settled(changes)
        candidates = {desc.id: desc for desc in settled.values()}
        found = list(candidates.values())
        table = self._table_after(changes)
        others = []
        if len(settled) < len(table):
            for fds in group(ctx, {fd: table[fd] for fd in table.keys() - settled.keys()}):
                desc = self._find_earlier(fds, table, candidates)
                if desc is None:
                    desc = describe(self._new_id(), fds, table)
                else:
                    candidates[desc.id] = desc
                others.append(desc)
            found += others
        kept = self._check(Recheck(self._job, DumpJob(ctx, found, content=True), candidates))
        if not changes and not others and len(kept) == len(found):
            return FilesChange(clock_monotonic_ns=clock_ns)
        # Ids are in the order of the numbers, as in a whole dump.
        lost = sorted([desc for desc in found if desc.id not in kept], key=attrgetter("fds"))
        renewed = {desc.id: self._renew(desc) for desc in lost}
        job = DumpJob(ctx, [renewed.get(desc.id, desc) for desc in found], content=True)
        files = dump_all(job, renewed.values())
        require_carried(job)
        changed = [*renewed.values(), *(desc for desc in others if desc.id in kept)]
        return FilesChange(
            closed=tuple(sorted(self._entries.keys() - table.keys())),
            fds=self._changed_entries(changed, table),
            files=files,
            clock_monotonic_ns=clock_ns,
        )

    def _table_after(self, changes: Mapping[int, Facts | None]) -> Mapping[int, Facts]:
        if not changes:
            return self._table
        table = {**self._table, **changes}
        return {fd: facts for fd, facts in table.items() if facts is not None}

    def _find_settled(self, changes: Mapping[int, Facts | None]) -> dict[int, Description]:
        """Return, by number, the earlier descriptions of those that are as they were, with the same numbers."""
        settled = dict(self._apart)
        doubtful = [self._table[fd].key for fd in changes.keys() & self._table.keys()]
        doubtful += [facts.key for facts in changes.values() if facts is not None]
        doubtful += [self._table[fds[0]].key for fds in self._together if not is_shared(self._ctx, fds)]
        for key in doubtful:
            if (desc := self._of_key.get(key)) is not None:
                for fd in desc.fds:
                    settled.pop(fd, None)
        return settled

    def _renew(self, desc: Description) -> Description:
        info = self._reader.stat(desc.fd) if desc.info is not None else None
        return replace(desc, id=self._new_id(), info=info)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _find_earlier(
        self, fds: list[int], table: Mapping[int, Facts], taken: dict[int, Description]
    ) -> Description | None:
        """Return the earlier description that a group of numbers is, as far as the table can tell."""
        for fd in fds:
            desc = self._by_fd.get(fd)
            if desc is not None and desc.id not in taken and self._table[fd].key == table[fd].key:
                if desc.fds == fds:
                    return desc
                if self._ctx.options.external_fds.isdisjoint(fds):
                    return replace(desc, fds=fds)
        return None

    def _changed_entries(
        self, found: Iterable[Description], table: Mapping[int, Facts]
    ) -> tuple[FdEntry, ...]:
        changed = []
        for desc in found:
            for fd in desc.fds:
                earlier, facts = self._entries.get(fd), table[fd]
                if earlier is not None and earlier.file_id == desc.id:
                    if facts is self._table[fd] or earlier.cloexec == facts.cloexec:
                        continue
                changed.append(FdEntry(fd=fd, file_id=desc.id, cloexec=facts.cloexec))
        changed.sort(key=lambda entry: entry.fd)
        return tuple(changed)


def _may_be_ahead(file: OpenFile) -> bool:
    kind = FILE_KINDS[file.kind]
    return kind.unchanged is not None and not (file.locks or file.owner or file.flags & O_ASYNC)
