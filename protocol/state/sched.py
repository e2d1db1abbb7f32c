"""How one thread is scheduled: policy, nice value, deadline parameters, CPUs, I/O priority, timer
slack.

Part of a thread's section. Field names are those of sched_attr (sched_setattr(2)); times are
nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_AFFINITY_BYTES = 8192 // 8
"""CONFIG_NR_CPUS reaches 8192; a longer mask is no mask."""

MAX_NODES_BYTES = 1024 // 8
"""1 << CONFIG_NODES_SHIFT, at most 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedState:
    """The scheduling of one thread.

    ``runtime_ns`` of an ordinary policy is a custom slice, 0 for the kernel's default.
    ``affinity`` is a little-endian bit mask; ``affinity_all`` means that the thread could use
    every CPU of the source, and so may use every one of the destination. ``memory_policy`` is the
    mode of set_mempolicy(2) with its flags, 0 the default one; ``memory_nodes`` a bit mask like
    ``affinity``.
    """

    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int
    util_min: int
    util_max: int
    affinity: bytes
    affinity_all: bool
    ioprio: int
    timer_slack_ns: int
    memory_policy: int = 0
    memory_nodes: bytes = b""

    def __post_init__(self) -> None:
        if not -20 <= self.nice <= 19:
            raise ValueError(f"nice value {self.nice} is outside -20..19")
        if not 0 <= self.priority <= 99:
            raise ValueError(f"real-time priority {self.priority} is outside 0..99")
        if not 0 < len(self.affinity) <= MAX_AFFINITY_BYTES:
            raise ValueError(f"CPU mask is {len(self.affinity)} bytes long")
        if not any(self.affinity):
            raise ValueError("CPU mask is empty")
        if len(self.memory_nodes) > MAX_NODES_BYTES:
            raise ValueError(f"node mask is {len(self.memory_nodes)} bytes long")
