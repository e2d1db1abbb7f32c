"""What the destination may make ahead of the switchover: sent right before it, while the target still runs.

Merely a hint, as of now: threads may come and go until the freeze, and the final sections alone say what there is.
Clock readings are the process's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register
from protocol.state.plan import MAX_THREADS


@dataclass(frozen=True, slots=True, kw_only=True)
class PreDumpState:
    """The threads, by the ids that the process itself sees, and its clocks in nanoseconds."""

    tids: tuple[int, ...]
    monotonic_ns: int
    boottime_ns: int

    def __post_init__(self) -> None:
        if not 0 < len(self.tids) <= MAX_THREADS or min(self.tids) <= 0:
            raise ValueError(f"{len(self.tids)} thread ids are not valid")


register("pre_dump", PreDumpState, version_id=1, minimum_version_id=1, required=False)
