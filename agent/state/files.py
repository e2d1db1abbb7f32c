"""The open files of a process: checked and dumped from outside.

Everything comes from procfs, kcmp(2) and pidfd_getfd(2): the target runs no call of ours and needs not
be stopped to be looked at. What was dumped while it ran is in agent.state.predump, the destination's
side in agent.state.fileitems and filerestore.

Must never leave the agent with copies of the target's descriptors when it returns (see
DumpContext.drop_fetched).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from agent.errors import RefusedError
from agent.state import filelock
from agent.state.clocks import OwnClock
from agent.state.context import DumpContext
from agent.state.fdtable import TableReader, describe, group
from agent.state.openfile import (
    O_ASYNC,
    O_DIRECT,
    O_PATH,
    Description,
    DumpJob,
    read_owner,
)
from agent.state.registry import kind_of
from agent.types import Obstacle
from protocol import codec
from protocol.state.files import FdEntry, FileOwner, FilesState, OpenFile

OWNED_KINDS = frozenset({"pipe", "unix", "inet"})
"""Kinds whose owner matters without O_ASYNC (SIGURG), and which are fetched anyway."""

CONFIRMATIONS = 4
"""How often a look at a running target is repeated that found obstacles."""


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
    require_carried(job)
    return state


def require_carried(job: DumpJob) -> None:
    """Refuse when a job has found obstacles.

    :raises RefusedError: it has.
    """
    if job.obstacles:
        raise RefusedError(
            f"Cannot carry the open files of process {job.ctx.pid}: {job.obstacles[0]}", job.obstacles
        )


def has_direct_io(files: Iterable[OpenFile]) -> bool:
    """Tell whether one of the files is open with O_DIRECT.

    Such reads pin pages and store into them past any write protection: no tracker but compare is sure to see that.
    """
    return any(file.kind == "regular" and file.flags & O_DIRECT for file in files)


def _examine(ctx: DumpContext, *, content: bool) -> tuple[DumpJob, FilesState]:
    job, state = _look(ctx, content=content)
    for _ in range(0 if content else CONFIRMATIONS):
        if not job.obstacles:
            break
        # While the target runs, a number may change its meaning in the middle of a look: an obstacle shows every time.
        seen = {(obstacle.kind, obstacle.what) for obstacle in job.obstacles}
        job, state = _look(ctx, content=content)
        job.obstacles = [o for o in job.obstacles if (o.kind, o.what) in seen]
    return job, state


def _look(ctx: DumpContext, *, content: bool) -> tuple[DumpJob, FilesState]:
    ctx.forget_shared()
    with contextlib.closing(TableReader(ctx)) as reader:
        table = reader.look()
        descriptions = [
            describe(number, fds, table) for number, fds in enumerate(group(ctx, table), 1)
        ]
        with contextlib.closing(OwnClock(ctx.pid)) as clock:
            clock_ns = clock.now_ns()
        job = DumpJob(ctx, descriptions, content)
        files = dump_all(job, descriptions)
        if job.obstacles and not content:
            now = table | reader.changes(reader.expect(table))
            job.obstacles = [
                obstacle
                for obstacle, desc in zip(job.obstacles, job.refused, strict=True)
                if all((facts := now[fd]) and facts.key == table[fd].key for fd in desc.fds)
            ]
    dumped = {file.id for file in files}
    entries = [
        FdEntry(fd=fd, file_id=desc.id, cloexec=table[fd].cloexec)
        for desc in descriptions
        if desc.id in dumped
        for fd in desc.fds
    ]
    entries.sort(key=attrgetter("fd"))
    return job, FilesState(fds=tuple(entries), files=files, clock_monotonic_ns=clock_ns)


def dump_all(job: DumpJob, descriptions: Iterable[Description]) -> tuple[OpenFile, ...]:
    """Dump some descriptions of a job; what cannot be carried is among its obstacles."""
    job.ctx.drop_fetched()
    found = []
    try:
        for desc in descriptions:
            found.append(dump_one(job, desc))
            # A process that runs must not be left with copies for longer than a moment, and the agent has no room for
            # those of thousands.
            job.ctx.drop_fetched()
    finally:
        job.ctx.drop_fetched()
    return tuple(dumped[0] for dumped in found if dumped is not None)


def dump_one(job: DumpJob, desc: Description) -> tuple[OpenFile, Any] | None:
    """Dump one description; returns it and its body, or None after recording why it cannot be carried.

    None, too, where a running target has closed it meanwhile.
    """
    before = len(job.obstacles)
    try:
        kind = kind_of(job, desc)
        body = kind.dump(job, desc) if kind is not None else None
        locks = filelock.dump_locks(job, desc)
        owner = _dump_owner(job, desc, kind.name if kind else "")
        encoded = codec.encode(body) if body is not None else b""
    except FileNotFoundError as err:
        if job.content:
            job.refuse(desc, "file", f"{desc.link} cannot be examined: {err.strerror}")
        return None  # Closed meanwhile by a running target.
    except OSError as err:
        job.refuse(desc, "file", f"{desc.link} cannot be examined: {err.strerror}")
        return None
    except UnicodeEncodeError:
        job.refuse(desc, "file", f"{os.fsencode(desc.link)!r} is not UTF-8", "rename the file")
        return None
    except ValueError:
        if job.content:
            raise
        return None  # A running target put another file there between one look and the next.
    if kind is None or body is None or len(job.obstacles) > before:
        return None
    file = OpenFile(
        id=desc.id,
        kind=kind.name,
        flags=desc.flags,
        pos=desc.fdinfo.pos,
        owner=owner,
        locks=locks,
        body=encoded,
    )
    return file, body


def _dump_owner(job: DumpJob, desc: Description, kind: str) -> FileOwner | None:
    if desc.flags & O_PATH or not (kind in OWNED_KINDS or desc.flags & O_ASYNC):
        return None
    if kind == "external":
        return None
    return read_owner(job.fetch(desc))
