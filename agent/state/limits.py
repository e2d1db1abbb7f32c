"""Resource limits: read from /proc, set from inside the process.

prlimit(2) on a process of another uid needs CAP_SYS_RESOURCE, which even root may lack. Inside the
process lowering is always allowed. Raising a hard limit is not: what the destination's agent has
itself is the most a restored process can get. Sources: getrlimit(2), proc_pid_limits(5).
"""

from __future__ import annotations

import functools
import os
import resource
import struct
from typing import TYPE_CHECKING, Final

from agent.errors import DumpError
from agent.kernel.syscalls import NR_prlimit64
from agent.procfs.files import read_bytes
from agent.procfs.limits import RESOURCE_NAMES, parse_limits, read_limits
from agent.state.creds import own_capabilities
from agent.types import Obstacle
from protocol.state.limits import NR_LIMITS, RLIM_INFINITY, LimitsState, ResourceLimit

if TYPE_CHECKING:
    from agent.target.inject import Batch

_RLIMIT64: Final = struct.Struct("=QQ")
_NAMES: Final = {number: name for name, number in RESOURCE_NAMES.items()}

# What stands in the way of building a process when the agent's own soft limit is low: descriptors
# with high numbers, large mappings and heaps, queued signals.
_RAISED_EARLY: Final = (
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_NPROC,
    resource.RLIMIT_SIGPENDING,
    resource.RLIMIT_STACK,
)
CAP_SYS_RESOURCE: Final = 24


def dump_limits(pid: int) -> LimitsState:
    """Return all limits of a process; the same object for as long as they do not change.

    :raises DumpError: the kernel does not show all of them.
    """
    return _limits_of(pid, read_bytes(f"/proc/{pid}/limits"))


@functools.lru_cache(maxsize=2)
def _limits_of(pid: int, text: bytes) -> LimitsState:
    limits = parse_limits(text)
    if limits.keys() != set(range(NR_LIMITS)):
        raise DumpError(f"Cannot dump the limits of task {pid}: only {len(limits)} are shown")
    return LimitsState(
        limits=tuple(
            ResourceLimit(resource=number, soft=limit.soft, hard=limit.hard)
            for number, limit in sorted(limits.items())
        )
    )


def raise_limits_calls(batch: Batch, pid: int) -> None:
    """Add calls that lift the soft limits of the new process ``pid`` to its hard ones while it is
    being built.
    """
    current = read_limits(pid)
    for number in _RAISED_EARLY:
        limit = current.get(number)
        if limit is not None and limit.soft < limit.hard:
            new = batch.data(_RLIMIT64.pack(limit.hard, limit.hard))
            batch.call(NR_prlimit64, 0, number, new, 0, name=f"prlimit64({_NAMES[number]})")


def restore_limits_calls(batch: Batch, state: LimitsState) -> None:
    """Add the calls that set all limits; when nothing that a limit could forbid is left to be
    done.
    """
    for limit in state.limits:
        new = batch.data(_RLIMIT64.pack(limit.soft, limit.hard))
        name = _NAMES.get(limit.resource, str(limit.resource))
        batch.call(NR_prlimit64, 0, limit.resource, new, 0, name=f"prlimit64({name})")


def _show(value: int) -> str:
    return "unlimited" if value == RLIM_INFINITY else str(value)


def check_limits_restore(
    state: LimitsState, pid: int | None = None, *, capabilities: int | None = None
) -> list[Obstacle]:
    """Say which hard limits a child of process ``pid`` (by default this agent) could not be given.
    """
    if capabilities is None:
        capabilities = own_capabilities()
    if capabilities >> CAP_SYS_RESOURCE & 1:
        return []
    current = read_limits(pid or os.getpid())
    found = []
    for limit in state.limits:
        here = current.get(limit.resource)
        if here is not None and limit.hard > here.hard:
            found.append(
                Obstacle(
                    kind="limit",
                    what=_NAMES.get(limit.resource, str(limit.resource)),
                    detail=f"the process has a hard limit of {_show(limit.hard)}, here it can"
                    f" have {_show(here.hard)}",
                    hint="run agent-recv with CAP_SYS_RESOURCE or with a higher hard limit",
                )
            )
    return found
