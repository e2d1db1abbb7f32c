"""Convergence: after each round, go on, switch over or give up.

A pure function of what the rounds measured. Must never look at a clock or at the target. Bytes and seconds.

How the prediction works. The pages a round reports were dirtied while the round before it ran, so
the dirty rate is `pages_dirty of the last / seconds of the one before`. While the last round was
being sent the target went on at that rate: what the final round would find is the rate times the
last round's length, never more than the working set seen. The link's speed is what the sending of
the last rounds gave. Downtime is that transfer plus a fixed part: freezing, state, restore.

Why the limit is small and rounds go on below it: one more round costs the target next to nothing (a fault of about a
microsecond for the first write to a page) and each one that shrinks makes the stop shorter. So a predicted downtime
below the limit is not the end while rounds still shrink a lot; a tiny remainder is.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_DOWNTIME_LIMIT_S = 0.1
"""Same as agent.options: below the patience of a person or of an RPC timeout."""
DEFAULT_MAX_ROUNDS = 30
FIXED_DOWNTIME_S = 0.015
"""Freeze, last scan, state sections and restore of a common process; not influenced by more rounds."""
TINY_TRANSFER_S = 0.002
"""A predicted final transfer this short is lost in the fixed part: more rounds gain nothing."""
SHRINKING = 0.8
"""A round found at most this share of the one before: the rounds converge."""
STALLED_ROUNDS = 3
"""So many rounds without shrinking: more of the same will not help."""
DEFAULT_BANDWIDTH_BYTES_PER_S = 100e6
"""Assumed before anything was measured: gigabit Ethernet."""
MEASURABLE_BYTES = 256 << 10
"""A round that sent less says nothing of the link's speed."""
MEASURABLE_S = 1e-4
PAGE_SIZE = 4096


class Action(enum.Enum):
    """What to do next."""

    CONTINUE = "continue"
    SWITCHOVER = "switchover"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats:
    """One finished round. `pages_dirty`: what its scan found; `seconds`: from scan to the last byte sent."""

    pages_dirty: int
    pages_sent: int = 0
    pages_zero: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    scan_s: float = 0.0
    """The part of `seconds` that went into the scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLimits:
    """What the user allows. `strict`: give up rather than exceed the downtime limit."""

    downtime_limit_s: float = DEFAULT_DOWNTIME_LIMIT_S
    max_rounds: int = DEFAULT_MAX_ROUNDS
    bandwidth_bytes_per_s: float | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer, with its reason for the log."""

    action: Action
    reason: str
    predicted_downtime_s: float


def bandwidth(rounds: Sequence[RoundStats], limits: PolicyLimits) -> float:
    """Return the link's speed in bytes/s as the rounds showed it."""
    measured = [
        r.bytes_sent / (r.seconds - r.scan_s)
        for r in rounds[-3:]
        if r.bytes_sent >= MEASURABLE_BYTES and r.seconds - r.scan_s > MEASURABLE_S
    ]
    if not measured:
        measured = [
            r.bytes_sent / (r.seconds - r.scan_s)
            for r in rounds
            if r.bytes_sent >= MEASURABLE_BYTES and r.seconds - r.scan_s > MEASURABLE_S
        ][-1:]
    speed = sum(measured) / len(measured) if measured else DEFAULT_BANDWIDTH_BYTES_PER_S
    if limits.bandwidth_bytes_per_s and not measured:
        speed = min(speed, limits.bandwidth_bytes_per_s)
    return speed


def predict_pages(rounds: Sequence[RoundStats]) -> float:
    """Return how many pages a final round now would find."""
    last = rounds[-1]
    if len(rounds) < 2 or rounds[-2].seconds <= 0:
        return float(last.pages_dirty)
    rate = last.pages_dirty / rounds[-2].seconds
    return min(rate * last.seconds, float(max(r.pages_dirty for r in rounds[1:])))


def decide(rounds: Sequence[RoundStats], limits: PolicyLimits) -> Decision:
    """Decide after the last of `rounds` (the first is the full copy)."""
    if not rounds:
        return Decision(
            action=Action.CONTINUE, reason="nothing sent yet", predicted_downtime_s=float("inf")
        )
    pages = predict_pages(rounds)
    transfer_s = pages * PAGE_SIZE / bandwidth(rounds, limits)
    predicted_s = FIXED_DOWNTIME_S + transfer_s
    fits = predicted_s <= limits.downtime_limit_s or transfer_s <= TINY_TRANSFER_S
    about = f"about {pages:.0f} pages left, downtime {predicted_s * 1e3:.0f} ms"

    def decision(action: Action, why: str) -> Decision:
        return Decision(
            action=action, reason=f"{why}: {about}", predicted_downtime_s=predicted_s
        )

    if len(rounds) >= 2 and transfer_s <= TINY_TRANSFER_S:
        return decision(Action.SWITCHOVER, "nearly nothing is left")
    if len(rounds) >= limits.max_rounds:
        if limits.strict and not fits:
            return decision(Action.GIVE_UP, "downtime limit not reached in the allowed rounds")
        return decision(Action.SWITCHOVER, "no more rounds allowed")
    if len(rounds) < 2:
        return decision(Action.CONTINUE, "first copy done")
    shrinking = rounds[-1].pages_dirty <= SHRINKING * rounds[-2].pages_dirty
    if fits and not shrinking:
        return decision(Action.SWITCHOVER, "within the limit and no longer shrinking")
    if not shrinking and _stalled(rounds):
        if limits.strict:
            return decision(Action.GIVE_UP, "the target writes faster than the link takes")
        return decision(Action.SWITCHOVER, "rounds stopped shrinking, over the limit")
    return decision(Action.CONTINUE, "rounds still shrink" if shrinking else "over the limit")


def _stalled(rounds: Sequence[RoundStats]) -> bool:
    # The best round lies STALLED_ROUNDS or more back: noise between neighbours does not count.
    counts = [r.pages_dirty for r in rounds[1:]]
    if len(counts) <= STALLED_ROUNDS:
        return False
    return min(counts[-STALLED_ROUNDS:]) > SHRINKING * min(counts[:-STALLED_ROUNDS])
