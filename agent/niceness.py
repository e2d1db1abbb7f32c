"""How an agent leaves the CPUs to others while the target runs, and gets on all the same where they leave it none.

An agent that copies memory always wants a CPU. Where the target has none to itself, it finds the agent on it when it
wakes up, and waits until the agent's turn is over: a few milliseconds. The turn of the lowest weight is over at once.
That costs the agent nothing as long as some CPU has time to spare. Where none has, the lowest weight would be a
sixtieth of what others get and the migration would not end: who waits for a CPU longer than it runs goes one
step back towards ordinary.

Nice values of threads count among those of one session only; between sessions it is that of the session's group
(agent.procfs.autogroup). Hence both are set. The group's only if nobody else is in it, since an agent that is killed
leaves it as it is: not in a session with a terminal, where more commands will follow, nor in that of a script.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Final

from agent.procfs.autogroup import read_autogroup, write_own_nice
from agent.procfs.process import list_pids, list_tids
from agent.procfs.sched import RunTimes, read_run_times
from agent.procfs.stat import read_stat
from agent.procfs.status import read_status

STEPS: Final = (19, 10)
"""Nice values in the order they are tried, each for ten times the share of the one before; then what it began with."""
LOOK_S: Final = 0.25
"""How often it looks whether it starves."""
_GROUP_S: Final = 0.5
"""How long to try: the kernel lets all without CAP_SYS_ADMIN together do it ten times a second."""
_CAP_SYS_NICE: Final = 23
_LOG = logging.getLogger(__name__)


class Niceness:
    """Within it, this process takes CPUs only as far as others leave them; all is as before afterwards.

    As long as look() is called. Does nothing that could not be taken back: without CAP_SYS_NICE threads stay as they
    are. (No thread looks: one that has others may not enter a time namespace, which agent-recv does.)
    """

    def __init__(self, run_times: Callable[[int, int], RunTimes | None] = read_run_times) -> None:
        own = os.getpid()
        self._run_times = partial(run_times, own, threading.get_native_id())
        group = None
        with suppress(OSError):
            if not read_stat(own).tty_nr and _is_alone_in_session(own):
                group = read_autogroup(own)
        self._group_nice = None if group is None else group.nice
        may = read_status(own).cap_eff >> _CAP_SYS_NICE & 1
        self._nice = os.getpriority(os.PRIO_PROCESS, 0) if may else None
        self._steps = list(STEPS)
        self._times: RunTimes | None = None
        self._due_s = 0.0

    def __enter__(self) -> Niceness:
        self.lower()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    @property
    def is_lowered(self) -> bool:
        """Whether there is something left to take back."""
        return self._times is not None

    def lower(self) -> None:
        """Take the first step; nothing where the kernel does not tell who starves."""
        self._times, self._due_s = self._run_times(), time.monotonic() + LOOK_S
        if self._times is not None:
            self._set(self._steps.pop(0))

    def look(self) -> None:
        """To be called again and again: whether it is time to look if this thread starves."""
        if self._times is not None and time.monotonic() >= self._due_s:
            self.look_now()

    def look_now(self) -> None:
        """Take one step back if this thread waited for a CPU longer than it ran since the last look."""
        before, now = self._times, self._run_times()
        self._due_s = time.monotonic() + LOOK_S
        if before is None or now is None:
            return
        self._times = now
        waited_ns, ran_ns = now.waited_ns - before.waited_ns, now.ran_ns - before.ran_ns
        if waited_ns <= max(ran_ns, LOOK_S * 1e9 / 4):
            return
        if not self._steps:
            _LOG.info("The CPUs are busy: as any other process from here on")
            self.restore()
            return
        nice = self._steps.pop(0)
        _LOG.info("The CPUs are busy: nice %d from here on", nice)
        self._set(nice)

    def restore(self) -> None:
        """Make everything as it was; twice is harmless."""
        if self.is_lowered:
            self._times = None
            self._set(-20)

    def _set(self, nice: int) -> None:
        # Never above what the agent was given.
        if self._group_nice is not None:
            self._set_group(max(nice, self._group_nice))
        if self._nice is not None:
            for tid in list_tids(os.getpid()):
                with suppress(OSError):  # it has ended
                    os.setpriority(os.PRIO_PROCESS, tid, max(nice, self._nice))

    @staticmethod
    def _set_group(nice: int) -> None:
        deadline = time.monotonic() + _GROUP_S
        while True:
            try:
                return write_own_nice(nice)
            except BlockingIOError:  # too soon, without CAP_SYS_ADMIN
                if time.monotonic() > deadline:
                    return None
                time.sleep(_GROUP_S / 50)
            except OSError as err:
                return _LOG.debug("The nice value of the session stays: %s", err)


def _is_alone_in_session(pid: int) -> bool:
    session = os.getsid(pid)
    if not session:
        return False  # of another pid namespace: nobody can tell
    for other in list_pids():
        with suppress(OSError):  # it has ended
            if other != pid and os.getsid(other) == session:
                return False
    return True
