"""The preflight: everything on this host that would keep the process from being rebuilt, all of it at once.

Runs before anything is made; the source still runs. Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

from agent.errors import RestoreError, TransferError
from agent.options import RecvOptions
from agent.state.creds import check_creds_restore, own_capabilities
from agent.state.fileitems import preflight_files
from agent.state.limits import check_limits_restore
from agent.state.mempolicy import check_nodes
from agent.state.mm import open_exe
from agent.state.paths import check_directories
from agent.state.sched import check_affinity
from agent.state.vma import preflight_layout
from agent.types import Obstacle
from protocol.state.files import FilesState
from protocol.state.mm import MmState
from protocol.state.plan import PlanState
from protocol.state.vma import LayoutState

T = TypeVar("T")


def only(sections: Mapping[str, Sequence[object]], kind: str, schema: type[T]) -> T:
    """Return the one received state of a kind.

    :raises TransferError: there is none, or more than one.
    """
    found = [state for state in sections.get(kind, ()) if isinstance(state, schema)]
    if len(found) != 1:
        raise TransferError(f"The source sent {len(found)} states of kind {kind!r} instead of one")
    return found[0]


def find_restore_obstacles(
    sections: Mapping[str, Sequence[object]], options: RecvOptions
) -> list[Obstacle]:
    """Name everything that would make the restore fail, as far as it can be known now."""
    plan = only(sections, "plan", PlanState)
    found = [] if options.new_pidns else _taken_ids(plan)
    found += check_limits_restore(plan.limits)
    found += check_creds_restore(plan.pid, plan.creds)
    found += check_directories(plan.cwd, plan.root, capabilities=own_capabilities())
    for tid, affinity in zip(plan.tids, plan.affinities, strict=True):
        found += check_affinity(tid, affinity)
    found += check_nodes(plan.policy_nodes)
    found += preflight_files(only(sections, "files", FilesState), options)
    found += preflight_layout(only(sections, "layout", LayoutState))
    try:
        os.close(open_exe(only(sections, "mm", MmState)))
    except RestoreError as err:
        found.append(
            Obstacle(
                kind="executable",
                what=only(sections, "mm", MmState).exe,
                detail=str(err),
                hint="install the program on this host",
            )
        )
    return found


def _taken_ids(plan: PlanState) -> list[Obstacle]:
    return [
        Obstacle(
            kind="pid",
            what=str(tid),
            detail="is in use on the destination",
            hint="use agent-recv --new-pidns",
        )
        for tid in plan.tids
        if os.path.exists(f"/proc/{tid}")
    ]
