"""A signalfd(2): the set of signals it accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFd:
    """Bit n-1 of ``mask`` stands for signal n."""

    mask: int

    def __post_init__(self) -> None:
        if not 0 <= self.mask < 1 << 64:
            raise ValueError(f"signal mask {self.mask:#x} is out of range")
