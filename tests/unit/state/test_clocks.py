"""Clocks of a process go on, never back: estimates, and when they are the host's own."""

from __future__ import annotations

import time
from dataclasses import replace

from agent.state.clocks import SAME_CLOCK_NS, Clocks, ahead_at_restore, is_own_clock, read_clocks
from tests.unit.state.test_state_task import process

HOUR_NS = 3600 * 10**9


def frozen_at(monotonic_ns: int, boottime_ns: int, realtime_ns: int) -> Clocks:
    state = replace(
        process(),
        clock_monotonic_ns=monotonic_ns,
        clock_boottime_ns=boottime_ns,
        clock_realtime_ns=realtime_ns,
    )
    return ahead_at_restore(state, Clocks(0, 0), recorded=True)


def test_the_greater_estimate_is_the_better_one() -> None:
    now = read_clocks()
    state = replace(
        process(), clock_monotonic_ns=now.monotonic_ns - 5, clock_boottime_ns=now.boottime_ns + HOUR_NS
    )
    ahead = ahead_at_restore(state, Clocks(7, 9), recorded=False)
    assert ahead.monotonic_ns == 7
    assert HOUR_NS // 2 < ahead.boottime_ns <= HOUR_NS


def test_in_an_image_only_the_boot_clock_goes_on() -> None:
    now = read_clocks()
    ahead = frozen_at(now.monotonic_ns - HOUR_NS, now.boottime_ns - HOUR_NS, time.time_ns() - HOUR_NS)
    assert abs(ahead.monotonic_ns + HOUR_NS) < 10**9
    assert abs(ahead.boottime_ns) < 10**9


def test_a_wall_clock_that_went_back_takes_nothing_away() -> None:
    now = read_clocks()
    ahead = frozen_at(now.monotonic_ns, now.boottime_ns, time.time_ns() + HOUR_NS)
    assert abs(ahead.boottime_ns) < 10**9


def test_only_a_clock_of_this_boot_slightly_behind_is_our_own() -> None:
    assert is_own_clock(Clocks(-1000, -SAME_CLOCK_NS + 1), same_boot=True)
    assert not is_own_clock(Clocks(-1000, -1000), same_boot=False)
    assert not is_own_clock(Clocks(-1000, -SAME_CLOCK_NS), same_boot=True)
    # A message cannot arrive before it was sent: that clock is another one, and must not go back.
    assert not is_own_clock(Clocks(1, 0), same_boot=True)
