"""What the destination must know before it says yes: sent first, while the target still runs.

Ids are those that the process itself sees; clock readings are the process's own, taken when this was sent.
Limits, credentials (the leader's) and CPU masks are a preview: the real ones come with the final state.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register
from protocol.state.creds import CredState
from protocol.state.limits import LimitsState
from protocol.state.sched import MAX_NODES_BYTES

MAX_THREADS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanState:
    """The process to come: its ids, its highest descriptor, its clocks.

    ``affinities`` has the CPU mask (little-endian) of each thread of ``tids``, empty for one that may use every CPU of
    the source. ``cwd`` and ``root`` are as the agent's root directory shows them.
    ``policy_nodes`` is the bit mask (little-endian) of the NUMA nodes that memory policies name, None without any.
    """

    pid: int
    tids: tuple[int, ...]
    name: str
    highest_fd: int
    monotonic_ns: int
    boottime_ns: int
    realtime_ns: int
    limits: LimitsState
    creds: CredState
    affinities: tuple[bytes, ...]
    cwd: str = "/"
    root: str = "/"
    policy_nodes: bytes | None = None

    def __post_init__(self) -> None:
        if self.pid <= 0 or self.pid not in self.tids:
            raise ValueError(f"process {self.pid} has no leader among its threads")
        if not 0 < len(self.tids) <= MAX_THREADS or min(self.tids) <= 0:
            raise ValueError(f"{len(self.tids)} thread ids are not valid")
        if len(self.affinities) != len(self.tids):
            raise ValueError(f"{len(self.affinities)} CPU masks for {len(self.tids)} threads")
        if len(self.policy_nodes or b"") > MAX_NODES_BYTES:
            raise ValueError("node mask is too long")


register("plan", PlanState, version_id=1, minimum_version_id=1)
