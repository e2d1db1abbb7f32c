"""Whether and how hard to compress: what --compress=auto does.

Only one thing counts: how fast pages get to the destination. It depends on the link, on both hosts' processors and on
the data, none of which can be known beforehand, so it is measured: now and then a stretch of pages is sent at a
neighbouring level, and the level that proves faster is kept. Pages per second are those that the peer has acknowledged
(what only fills a buffer is not there yet), but no more than were produced (what drains a full one is not our merit).

A receiver that does not keep up (its TCP window is closed most of the time) is not helped by work on top of its own,
nor is a sender that does little but compress: then nothing is tried upwards. Where compressing takes little of the
time, less of it cannot help: then nothing is tried downwards. Data that does not shrink ends a trial with its first
batch. Trials that fail get rarer.

It begins with level 1: on a fast link that costs some ten milliseconds, while raw pages that fill the buffers of a slow
one cost seconds.

Pure: never looks at a clock or a socket. Bytes and seconds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from agent.kernel.tcp_info import LinkProgress

_log = logging.getLogger(__name__)

LEVELS: Final = (0, 1, 4)
"""zstd's; 0: raw. Beyond 4 the gain is small and the time long."""
STRETCH_BYTES: Final = 8 << 20
STRETCH_S: Final = 0.25
"""Pages that a measurement takes, or, on a slow link, how long."""
GAIN: Final = 1.1
"""A level must be so many times as fast as the present one, twice, to take its place."""
GAIN_AT_ONCE: Final = 1.6
"""This is no chance."""
MAX_HOPELESS: Final = 3
"""After so many batches in a row that did not shrink, level 1 is given up without any trial."""
MIN_INTERVAL_BYTES: Final = 16 << 20
MAX_INTERVAL_BYTES: Final = 512 << 20
"""From one trial to the next; doubled by each that fails. On a slow link every MAX_INTERVAL_S at least."""
MAX_INTERVAL_S: Final = 10.0
FAST_LINK_BYTES_PER_S: Final = 200e6
"""Level 1 makes about twice that a thread, before it is decompressed."""
RECEIVER_SHARE: Final = 0.5
"""Share of the time with a closed window from which on the receiver is what all wait for."""
SMALL_SHARE: Final = 0.25
LARGE_SHARE: Final = 0.8
"""Of the time, for compressing."""


@dataclass(slots=True)
class _Stretch:
    """Pages sent at one level, one after another."""

    began_s: float
    began: LinkProgress | None
    page_bytes: int = 0
    wire_bytes: int = 0
    compress_s: float = 0.0

    def is_over(self, now_s: float) -> bool:
        return self.page_bytes >= STRETCH_BYTES or (self.page_bytes > 0 and now_s - self.began_s >= STRETCH_S)

    def pages_per_s(self, now_s: float, now: LinkProgress | None) -> float:
        seconds = max(now_s - self.began_s, 1e-6)
        moved = float(self.page_bytes)
        if now is not None and self.began is not None:
            acked = now.bytes_acked - self.began.bytes_acked
            moved = min(moved, acked * self.page_bytes / self.wire_bytes)
        return moved / seconds

    def receiver_share(self, now: LinkProgress | None) -> float:
        if now is None or self.began is None:
            return 0.0
        return (now.receiver_limited_us - self.began.receiver_limited_us) / max(
            now.busy_us - self.began.busy_us, 1
        )


class AutoLevel:
    """Chooses the level of the next batch. Tell it of each batch that was sent."""

    def __init__(self) -> None:
        self.index = 1
        """The present level, in LEVELS."""
        self._trial: int | None = None  # the one being tried
        self._direction = 1
        self._stretch: _Stretch | None = None
        self._rate = 0.0  # of the present level, in the last stretch of it
        self._wins = 0
        self._hopeless = 0
        self._interval = MIN_INTERVAL_BYTES
        self._bytes_left = 0  # until the next trial
        self._next_s = 0.0
        self._proven = False  # that the present level beats less of it
        self._final = False
        self._last: LinkProgress | None = None

    @property
    def level(self) -> int:
        """zstd's level for the next batch, 0: raw."""
        if self._final:
            return LEVELS[self.index] if self._proven and not self._is_fast_link() else 0
        return LEVELS[self.index if self._trial is None else self._trial]

    def begin(self, *, final: bool) -> None:
        """The next batch does not follow the last one at once: what passed in between says nothing.

        ``final``: the target stands still and waits for the pages, so nothing is tried, and what was not proven to be
        faster is left. So it is on a fast link: even where compressing makes all pages arrive sooner, since there are
        that many, the few of the end only wait for it.
        """
        self._stretch = None
        self._final = final
        if final:
            _log.debug("Final pages at compression level %d (%s)", self.level, self._last)

    def packed(self, seconds: float, *, smaller: bool) -> None:
        """What compressing the batch that is about to be sent has cost and brought; if no smaller, it goes raw."""
        if self._stretch is not None:
            self._stretch.compress_s += seconds
        self._hopeless = 0 if smaller else self._hopeless + 1
        if smaller:
            return
        if self._trial is not None and self._trial > self.index:
            self._failed()
        elif self._hopeless >= MAX_HOPELESS:
            self.index = 0
            self._failed()

    def sent(self, page_bytes: int, wire_bytes: int, now_s: float, progress: LinkProgress | None) -> None:
        """A batch was handed to the kernel at ``now_s``."""
        if self._final:
            return
        self._last = progress
        if self._stretch is None:
            self._stretch = _Stretch(now_s, progress)  # what came before it is not known
            self._next_s = self._next_s or now_s + MAX_INTERVAL_S
            return
        stretch = self._stretch
        stretch.page_bytes += page_bytes
        stretch.wire_bytes += wire_bytes
        self._bytes_left -= page_bytes
        if not stretch.is_over(now_s):
            return
        rate = stretch.pages_per_s(now_s, progress)
        if self._trial is None:
            self._rate = rate
            due = self._bytes_left <= 0 or now_s >= self._next_s
            if due and self._choose_trial(
                stretch.receiver_share(progress), stretch.compress_s / (now_s - stretch.began_s + 1e-6)
            ):
                self._next_s = now_s + MAX_INTERVAL_S
        elif rate > GAIN * self._rate:
            self._won(rate)
        else:
            self._failed()
        self._stretch = _Stretch(now_s, progress)

    def _is_fast_link(self) -> bool:
        return self._last is not None and self._last.delivery_rate > FAST_LINK_BYTES_PER_S

    def _choose_trial(self, receiver_share: float, compress_share: float) -> bool:
        waits = receiver_share >= RECEIVER_SHARE
        up = self.index + 1 < len(LEVELS) and not waits and compress_share < LARGE_SHARE
        down = self.index > 0 and (waits or compress_share > SMALL_SHARE)
        self._proven |= not down
        if not up and not down:
            return False
        if not self._wins:  # else the same once more
            self._direction = -self._direction if up and down else 1 if up else -1
        self._trial = self.index + self._direction
        return True

    def _won(self, rate: float) -> None:
        # Once may be chance: a neighbour that took the processor for a moment.
        trial, self._trial = self._trial, None
        assert trial is not None
        self._wins += 1
        if self._wins == 2 or rate > GAIN_AT_ONCE * self._rate:
            _log.debug(
                "Compression level %d instead of %d: %.0f MB/s instead of %.0f",
                LEVELS[trial], LEVELS[self.index], rate / 1e6, self._rate / 1e6,
            )  # fmt: skip
            self._proven = trial > self.index
            self.index, self._wins = trial, 0
            self._interval = self._bytes_left = MIN_INTERVAL_BYTES
        else:
            self._bytes_left = 0

    def _failed(self) -> None:
        self._proven |= self._trial is not None and self._trial < self.index
        self._trial, self._wins = None, 0
        self._bytes_left = self._interval
        self._interval = min(2 * self._interval, MAX_INTERVAL_BYTES)
        self._stretch = None
