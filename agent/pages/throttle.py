"""Bandwidth limit: a token bucket in front of the link. Bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST_S = 0.05
"""How long an idle link may be made up for."""


class BandwidthLimit:
    """Call it with the bytes about to be sent; it sleeps as long as they exceed the rate."""

    def __init__(
        self,
        bytes_per_s: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s <= 0:
            raise ValueError("a bandwidth limit must be positive")
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()
        self.enabled = True
        """Set to False for the final round, where delay is downtime."""

    def __call__(self, nr_bytes: int) -> float:
        """Sleep as long as need be before so many bytes; return the seconds."""
        now = self._clock()
        pause_s = 0.0
        if self.enabled and self._free_at > now:
            pause_s = self._free_at - now
            self._sleep(pause_s)
        self._free_at = max(self._free_at, now - BURST_S) + nr_bytes / self._rate
        return pause_s
