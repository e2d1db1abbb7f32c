"""Whether and how hard to compress: what --compress=auto does.

Only one thing counts: how fast pages get to the destination. It depends on the link, on both hosts' processors and on
the data, none of which can be known beforehand, so it is measured, a stretch of pages at a time.

What a stretch shows first is what it waited for. A sender that blocks in send while the peer's window is open, and
whose bytes are acknowledged about as fast as the kernel sees any delivered, waits for the link, as does one that the
bandwidth limit holds: fewer bytes are faster for certain, so more compression is tried, never less. Anything else waits
for one of the processors: less compression is tried, never more. One sample of the kernel's delivery rate proves
nothing, however high: what shapes a link lets bursts pass.

To try is to send a stretch at the neighbouring level and to compare: pages per second that the peer has acknowledged
(what only fills a buffer is not there yet), but no more than were produced (what drains a full one is not our merit).
Trials end early when they are hopeless: data that does not shrink (further), raw pages that pile up. Those that fail
get rarer.

It begins with level 1: on a fast link that costs some ten milliseconds, while raw pages that fill the buffers of a slow
one cost seconds.

Pure: never looks at a clock or a socket. Bytes and seconds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

from agent.kernel.tcp_info import LinkProgress

_log = logging.getLogger(__name__)

LEVELS: Final = (0, 1, 4)
"""zstd's; 0: raw. Beyond 4 the gain is small and the time long."""
STRETCH_BYTES: Final = 4 << 20
STRETCH_S: Final = 0.25
"""Pages that a measurement takes, or, on a slow link, how long."""
GAIN: Final = 1.1
"""A level must be so many times as fast as the present one, twice, to take its place."""
GAIN_AT_ONCE: Final = 1.4
"""This is no chance."""
WORTHWHILE_SHRINK: Final = 0.95
"""A higher level must make so much less of what the present one makes, or the trial ends with its first batch."""
MAX_HOPELESS: Final = 3
"""After so many batches in a row that did not shrink, level 1 is given up without any trial."""
MIN_INTERVAL_BYTES: Final = 16 << 20
MAX_INTERVAL_BYTES: Final = 512 << 20
"""From one trial to the next; doubled by each that fails. On a slow link every MAX_INTERVAL_S at least."""
MAX_INTERVAL_S: Final = 10.0
PILED_UP_BYTES: Final = 512 << 10
"""Raw pages that pile up while even the best that the kernel saw is less than packed ones make end their trial."""
IDLE_LINK_BYTES_PER_S: Final = 600e6
"""A link that takes raw pages that fast waits for hosts. Packed ones seem faster: the peer's buffers hold seconds."""
FAST_LINK_BYTES_PER_S: Final = 200e6
"""On such a link final pages go raw."""
HOPELESS_SHARE: Final = 0.25
"""Where it is less than that share, raw pages are not tried again for MAX_INTERVAL_BYTES."""
WAIT_SHARE: Final = 0.2
"""Of the time, blocked in sending: from there on something else than this processor is what all wait for."""
RECEIVER_SHARE: Final = 0.5
"""Share of the time with a closed window from which on that is the receiver."""
DELIVERY_FACTOR: Final = 1.5
"""A link that delivers so many times what it is given on average has time to spare."""
LARGE_SHARE: Final = 0.8
"""Of the time, for compressing: more of it would be what all wait for."""


@dataclass(slots=True)
class _Stretch:
    """Pages sent at one level, one after another."""

    began_s: float
    began: LinkProgress | None
    page_bytes: int = 0
    wire_bytes: int = 0
    compress_s: float = 0.0
    blocked_s: float = 0.0
    limited_s: float = 0.0
    delivery_rates: list[int] = field(default_factory=list)

    def is_over(self, now_s: float) -> bool:
        return self.page_bytes >= STRETCH_BYTES or (self.page_bytes > 0 and now_s - self.began_s >= STRETCH_S)

    def seconds(self, now_s: float) -> float:
        return max(now_s - self.began_s, 1e-6)

    def acked(self, now: LinkProgress | None) -> int | None:
        return None if now is None or self.began is None else now.bytes_acked - self.began.bytes_acked

    def pages_per_s(self, now_s: float, now: LinkProgress | None) -> float:
        moved, acked = float(self.page_bytes), self.acked(now)
        if acked is not None:
            moved = min(moved, acked * self.page_bytes / self.wire_bytes)
        return moved / self.seconds(now_s)

    def has_piled_up(self, now: LinkProgress | None, bytes_per_s: float) -> bool:
        """Whether what was sent waits, for a link that never delivered as much as that."""
        acked = self.acked(now)
        if acked is None or now is None:
            return False
        return self.wire_bytes - acked >= PILED_UP_BYTES and now.delivery_rate < bytes_per_s

    def waits_for_link(self, now_s: float, now: LinkProgress | None) -> bool | None:
        """Whether that is what holds it up; None: for the link or for the receiver, nobody knows which."""
        seconds = self.seconds(now_s)
        if self.limited_s >= WAIT_SHARE * seconds:
            return True
        if self.blocked_s < WAIT_SHARE * seconds:
            return False
        acked = self.acked(now)
        if acked is None or now is None or self.began is None:
            return None
        closed_us = now.receiver_limited_us - self.began.receiver_limited_us
        if closed_us >= RECEIVER_SHARE * max(now.busy_us - self.began.busy_us, 1):
            return False
        rates = sorted(self.delivery_rates)
        return rates[len(rates) // 2] <= DELIVERY_FACTOR * acked / seconds


class AutoLevel:
    """Chooses the level of the next batch. Tell it of each batch that was sent."""

    def __init__(self) -> None:
        self.index = 1
        """The present level, in LEVELS."""
        self._trial: int | None = None  # the one being tried
        self._stretch: _Stretch | None = None
        self._rate = 0.0  # of the present level, in the last stretch of it
        self._ratio = 1.0  # likewise: bytes on the wire for one of pages
        self._wins = 0
        self._hopeless = 0
        self._interval = MIN_INTERVAL_BYTES
        self._bytes_left = 0  # until the next trial
        self._raw_left = 0  # until raw pages may be tried again, which this link could not take
        self._next_s = 0.0
        self._proven = False  # that the present level beats less of it, on a slow link
        self._final = False

    @property
    def level(self) -> int:
        """zstd's level for the next batch, 0: raw."""
        if self._final:
            return LEVELS[self.index] if self._proven else 0
        return LEVELS[self.index if self._trial is None else self._trial]

    @property
    def watches(self) -> bool:
        """Whether it wants to hear of batches: not of final ones."""
        return not self._final

    def begin(self, *, final: bool) -> None:
        """The next batch does not follow the last one at once: what passed in between says nothing.

        ``final``: the target stands still and waits for the pages, so nothing is tried, and what was not proven to be
        faster is left. So it is on a fast link: even where compressing makes all pages arrive sooner, since there are
        that many, the few of the end only wait for it.
        """
        self._stretch = None
        self._final = final
        if final:
            _log.debug("Final pages at compression level %d", self.level)

    def packed(self, seconds: float, page_bytes: int, wire_bytes: int, *, smaller: bool) -> None:
        """What compressing the batch that is about to be sent has cost and brought; if not `smaller`, it goes raw."""
        if self._stretch is not None:
            self._stretch.compress_s += seconds
        self._hopeless = 0 if smaller else self._hopeless + 1
        if self._trial is not None and self._trial > self.index:
            if not smaller or wire_bytes > WORTHWHILE_SHRINK * self._ratio * page_bytes:
                self._failed()
        elif self._hopeless >= MAX_HOPELESS:
            self.index, self._ratio = 0, 1.0
            self._failed()

    def sent(
        self,
        page_bytes: int,
        wire_bytes: int,
        now_s: float,
        progress: LinkProgress | None,
        *,
        blocked_s: float = 0.0,
        limited_s: float = 0.0,
    ) -> None:
        """A batch was handed to the kernel at ``now_s``, which had us wait ``blocked_s``, the limit ``limited_s``."""
        if self._final:
            return
        if self._stretch is None:
            self._stretch = _Stretch(now_s, progress)  # what came before it is not known
            self._next_s = self._next_s or now_s + MAX_INTERVAL_S
            return
        stretch = self._stretch
        stretch.page_bytes += page_bytes
        stretch.wire_bytes += wire_bytes
        stretch.blocked_s += blocked_s
        stretch.limited_s += limited_s
        if progress is not None:
            stretch.delivery_rates.append(progress.delivery_rate)
        self._bytes_left -= page_bytes
        self._raw_left -= page_bytes
        if self._trial == 0 and stretch.has_piled_up(progress, min(self._rate / GAIN, IDLE_LINK_BYTES_PER_S)):
            if stretch.has_piled_up(progress, HOPELESS_SHARE * self._rate):
                self._raw_left = MAX_INTERVAL_BYTES
            self._failed()
            return
        if not stretch.is_over(now_s):
            return
        rate = stretch.pages_per_s(now_s, progress)
        self._stretch = _Stretch(now_s, progress)
        if self._trial is None:
            self._judge(stretch, rate, now_s, progress)
        elif rate > GAIN * self._rate or self._fits_raw(rate):
            self._won(rate)
        else:
            self._failed()

    def _judge(self, stretch: _Stretch, rate: float, now_s: float, progress: LinkProgress | None) -> None:
        """Learn from a stretch at the present level, and choose what to try next, if anything."""
        self._rate, self._ratio = rate, stretch.wire_bytes / stretch.page_bytes
        waits_for_link = stretch.waits_for_link(now_s, progress)
        if waits_for_link is not None:
            self._proven = waits_for_link and rate * self._ratio < FAST_LINK_BYTES_PER_S
        if self._bytes_left > 0 and now_s < self._next_s:
            return
        share = stretch.compress_s / stretch.seconds(now_s)
        up = self.index + 1 < len(LEVELS) and waits_for_link is not False and share < LARGE_SHARE
        down = self.index > (1 if self._raw_left > 0 else 0) and waits_for_link is not True
        if up or down:
            self._trial = self.index + (-1 if down else 1)
            self._next_s = now_s + MAX_INTERVAL_S

    def _fits_raw(self, rate: float) -> bool:
        return self._trial == 0 and rate > IDLE_LINK_BYTES_PER_S

    def _won(self, rate: float) -> None:
        # Once may be chance: a neighbour that took the processor for a moment.
        at_once = self._fits_raw(rate)
        trial, self._trial = self._trial, None
        assert trial is not None
        self._wins += 1
        self._bytes_left = 0
        if self._wins == 2 or at_once or rate > GAIN_AT_ONCE * self._rate:
            _log.debug(
                "Compression level %d instead of %d: %.0f MB/s instead of %.0f",
                LEVELS[trial], LEVELS[self.index], rate / 1e6, self._rate / 1e6,
            )  # fmt: skip
            self._proven = trial > self.index
            self.index, self._wins = trial, 0
            self._interval = MIN_INTERVAL_BYTES

    def _failed(self) -> None:
        self._proven |= self._trial is not None and self._trial < self.index
        self._trial, self._wins = None, 0
        self._bytes_left = self._interval
        self._interval = min(2 * self._interval, MAX_INTERVAL_BYTES)
        self._stretch = None
