"""Descriptions that the user takes care of: --external fd[N] here, --inherit-fd fd[M]:fd[N] over there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from agent.errors import RestoreError
from agent.state.openfile import Description, DumpJob, FileKind, Item, PreflightJob, RestoreJob
from protocol.state.external import External


def dump_external(job: DumpJob, desc: Description) -> External | None:
    """Name a description by those of its numbers that were given with --external."""
    return External(fds=tuple(fd for fd in desc.fds if fd in job.ctx.options.external_fds))


def _inherited(item: Item[External], inherit_fds: Mapping[int, int]) -> int | None:
    named = (inherit_fds[fd] for fd in item.body.fds if fd in inherit_fds)
    return next(named, None)


def preflight_external(job: PreflightJob, items: Sequence[Item[External]]) -> None:
    """Check that a descriptor was given for each."""
    for item in items:
        fd = _inherited(item, job.options.inherit_fds)
        try:
            usable = fd is not None and os.fstat(fd) is not None
        except OSError:
            usable = False
        if not usable:
            name = item.body.fds[0]
            job.refuse(
                item, "external", f"nothing is there to stand in for fd[{name}]",
                f"give agent-recv --inherit-fd fd[M]:fd[{name}] with an open fd M",
            )  # fmt: skip


def restore_external(job: RestoreJob, items: Sequence[Item[External]]) -> None:
    """Share the agent's own descriptors.

    :raises RestoreError: when one was not given.
    """
    for item in items:
        fd = _inherited(item, job.ctx.options.inherit_fds)
        if fd is None:
            raise RestoreError(f"Cannot restore {item}: no --inherit-fd for it")
        job.put(item, os.dup(fd))


KIND = FileKind(
    name="external", dump=dump_external, restore=restore_external, preflight=preflight_external
)
