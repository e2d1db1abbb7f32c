"""An eventfd(2): a counter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFd:
    """``count`` is below 2**64 - 1, which the kernel keeps for itself to mean overflow."""

    count: int
    semaphore: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.count < 1 << 64:
            raise ValueError(f"eventfd count {self.count} is out of range")
