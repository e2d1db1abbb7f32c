"""The resource limits of a process (getrlimit(2)); RLIM_INFINITY is 2**64 - 1."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register

NR_LIMITS = 16
"""RLIM_NLIMITS (include/uapi/asm-generic/resource.h)."""
RLIM_INFINITY = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimit:
    """One limit; ``resource`` is the kernel's number (RLIMIT_CPU is 0)."""

    resource: int
    soft: int
    hard: int

    def __post_init__(self) -> None:
        if not 0 <= self.resource < NR_LIMITS:
            raise ValueError(f"resource {self.resource} does not exist")
        if not 0 <= self.soft <= self.hard <= RLIM_INFINITY:
            raise ValueError(f"resource {self.resource}: limit {self.soft} is above {self.hard}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsState:
    """All limits of a process, one for each resource, in the order of their numbers."""

    limits: tuple[ResourceLimit, ...]

    def __post_init__(self) -> None:
        if [limit.resource for limit in self.limits] != list(range(NR_LIMITS)):
            raise ValueError("limits are incomplete or out of order")


register("limits", LimitsState, version_id=1, minimum_version_id=1)
