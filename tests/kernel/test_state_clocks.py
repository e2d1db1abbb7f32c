"""Time namespaces for restored processes: made by an agent that stays in its own."""

from __future__ import annotations

import os
import time
from contextlib import closing

import pytest

from agent.kernel.clone import CLONE_NEWTIME
from agent.kernel.namespaces import setns
from agent.procfs.process import read_timens_offsets
from agent.state.clocks import Clocks, OwnClock, make_time_namespace, read_clocks
from tests.kernel.support import puppet, skip_unless_root

HOUR_NS = 3600 * 10**9
MINUTE_NS = 60 * 10**9


def _shift_in_new_namespace(ahead: Clocks) -> Clocks:
    before = read_clocks()
    fd = make_time_namespace(ahead)
    setns(fd, CLONE_NEWTIME)
    os.close(fd)
    return read_clocks().minus(before)


def test_one_agent_makes_a_namespace_for_one_process_after_another() -> None:
    skip_unless_root()
    with puppet() as child:
        own = child.run(read_timens_offsets, child.pid)
        for ahead in (Clocks(HOUR_NS, 2 * HOUR_NS), Clocks(-MINUTE_NS, HOUR_NS)):
            child.run(os.close, child.run(make_time_namespace, ahead))
            assert child.run(read_timens_offsets, child.pid) == own, "its children are born elsewhere"
        shift = child.run(_shift_in_new_namespace, Clocks(HOUR_NS, 2 * HOUR_NS))
    assert 0 <= shift.monotonic_ns - HOUR_NS < MINUTE_NS
    assert 0 <= shift.boottime_ns - 2 * HOUR_NS < MINUTE_NS


def test_the_clock_of_a_process_is_followed_into_another_namespace() -> None:
    skip_unless_root()
    with puppet() as child, closing(OwnClock(child.pid)) as clock:
        before = clock.now_ns() - time.monotonic_ns()
        assert before <= 0 and -before < MINUTE_NS
        child.run(_shift_in_new_namespace, Clocks(HOUR_NS, 2 * HOUR_NS))
        assert 0 <= clock.now_ns() - time.monotonic_ns() - HOUR_NS + MINUTE_NS < 2 * MINUTE_NS
    with pytest.raises(ProcessLookupError):
        clock.now_ns()
