"""How an agent leaves the CPUs to others, and that nothing of it stays."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import termios
import threading
from collections.abc import Iterator

import pytest

from agent.kernel.prctl import PR_SET_DUMPABLE, prctl
from agent.niceness import Niceness
from agent.procfs.autogroup import parse_autogroup, read_autogroup, write_own_nice
from agent.procfs.sched import RunTimes, read_run_times
from tests.kernel.support import NOBODY, Puppet, skip_or_fail, skip_unless_root

Values = tuple[int, int, int]
"""Nice values of the session's group, of this thread, of another."""


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    """A process in a session of its own, without a terminal."""
    skip_unless_root()
    child = Puppet()
    try:
        child.run(os.setsid)  # the tests themselves may be in init's session, which has no group
        if read_autogroup(child.pid) is None or read_run_times(child.pid, child.pid) is None:
            skip_or_fail("the kernel has no autogroups (CONFIG_SCHED_AUTOGROUP) or no schedstat (CONFIG_SCHED_INFO)")
        yield child
    finally:
        child.close()


def values() -> Values:
    group = read_autogroup(os.getpid())
    assert group is not None
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    others: list[int] = []
    thread = threading.Thread(
        target=lambda: others.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    )
    thread.start()
    thread.join()
    return group.nice, own, others[0]


def through_it(fails: bool = False) -> list[Values]:
    """Values before, while and after this process is considerate."""
    found = [values()]
    try:
        with Niceness():
            found.append(values())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    found.append(values())
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_group_and_threads_step_back_and_come_back(puppet: Puppet, fails: bool) -> None:
    assert puppet.run(through_it, fails) == [(0, 0, 0), (19, 19, 19), (0, 0, 0)]


def test_a_session_with_somebody_else_in_it_is_left_alone(puppet: Puppet) -> None:
    # A script, say, that would go on with it if the agent were killed.
    pid = puppet.run(child_that_waits)
    assert puppet.run(through_it) == [(0, 0, 0), (0, 19, 19), (0, 0, 0)]
    puppet.run(end, pid)
    assert puppet.run(through_it) == [(0, 0, 0), (19, 19, 19), (0, 0, 0)]


def child_that_waits() -> int:
    pid = os.fork()
    if not pid:
        signal.pause()
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_session_with_a_terminal_is_left_alone(puppet: Puppet) -> None:
    assert puppet.run(with_a_terminal) == [(0, 0, 0), (0, 19, 19), (0, 0, 0)]


def with_a_terminal() -> list[Values]:
    _master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    return through_it()


def test_without_the_right_to_come_back_threads_do_not_step_back(puppet: Puppet) -> None:
    assert puppet.run(unprivileged) == [(0, 0, 0), (19, 0, 0), (0, 0, 0)]


def unprivileged() -> list[Values]:
    os.setuid(NOBODY)
    prctl(PR_SET_DUMPABLE, 1)  # as after exec: /proc/self is its own
    return through_it()


def test_never_above_what_it_was_given(puppet: Puppet) -> None:
    steps = [(19, 19, 19), (12, 15, 15), (12, 15, 15)]
    assert puppet.run(given_less) == ((12, 15, 15), steps, (12, 15, 15))


def given_less() -> tuple[Values, list[Values], Values]:
    write_own_nice(12)
    os.setpriority(os.PRIO_PROCESS, 0, 15)
    before = values()
    return before, starving(), values()


def starving() -> list[Values]:
    """Values after each look of one that waits for a CPU more than it runs."""
    times = iter([RunTimes(0, 0), RunTimes(10**8, 2 * 10**8), RunTimes(2 * 10**8, 4 * 10**8)])
    nice = Niceness(run_times=lambda _pid, _tid: next(times))
    nice.lower()
    found = [values()]
    while nice.is_lowered:
        nice.look_now()
        found.append(values())
    return found


def test_one_that_starves_comes_back_step_by_step(puppet: Puppet) -> None:
    assert puppet.run(starving) == [(19, 19, 19), (10, 10, 10), (0, 0, 0)]


@pytest.mark.parametrize(
    "times",
    [
        (RunTimes(10**8, 9 * 10**7), RunTimes(2 * 10**8, 10**8)),  # it runs more than it waits
        (RunTimes(0, 10**7), RunTimes(10**6, 2 * 10**7)),  # it hardly wants to run
    ],
)
def test_one_that_gets_on_stays(puppet: Puppet, times: tuple[RunTimes, ...]) -> None:
    assert puppet.run(after, times) == (19, 19, 19)


def after(times: tuple[RunTimes, ...]) -> Values:
    given = iter([RunTimes(0, 0), *times])
    nice = Niceness(run_times=lambda _pid, _tid: next(given))
    nice.lower()
    for _ in times:
        nice.look_now()
    return values()


def test_nothing_is_lowered_where_nobody_tells_who_starves(puppet: Puppet) -> None:
    assert puppet.run(untold) == (0, 0, 0)


def untold() -> Values:
    nice = Niceness(run_times=lambda _pid, _tid: None)
    nice.lower()
    assert not nice.is_lowered
    return values()


def test_what_was_lowered_comes_back_even_if_nobody_tells_any_more(puppet: Puppet) -> None:
    assert puppet.run(told_once) == [(19, 19, 19), (0, 0, 0)]


def told_once() -> list[Values]:
    times = iter([RunTimes(0, 0), None])
    with Niceness(run_times=lambda _pid, _tid: next(times)) as nice:
        nice.look_now()
        found = [values()]
    return [*found, values()]


def test_text_of_an_autogroup() -> None:
    assert parse_autogroup(b"/autogroup-27 nice -5\n") == ("/autogroup-27", -5)
    assert parse_autogroup(b"") is None
