"""The monotonic clocks of the process: on another host, or out of an image, they go on where they stood.

A time namespace hides that the clocks of two machines (or of two boots) have nothing in common. The process enters it
while it has one thread. Its clocks must never go back. They may lag by what messages take to travel: a message that
says how far the process's clock had come is old when it arrives, so every comparison gives at most what is true, and
the greatest is the best. Nanoseconds throughout. Sources: time_namespaces(7), clock_gettime(2).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.kernel.clone import CLONE_NEWTIME
from agent.kernel.namespaces import setns, unshare
from agent.procfs.files import ReadAgain
from agent.procfs.process import read_timens_offsets

if TYPE_CHECKING:
    from agent.target.inject import Batch
    from protocol.state.process import ProcessState

_LOG = logging.getLogger(__name__)

SAME_CLOCK_NS: Final = 100_000_000
"""A clock of this boot that seems to be behind ours by less than this is ours: its message took so long."""
_NS_PER_S: Final = 1_000_000_000


class Clocks(NamedTuple):
    """Two readings, or two differences."""

    monotonic_ns: int
    boottime_ns: int

    def minus(self, other: Clocks) -> Clocks:
        """Return the difference of both."""
        return Clocks(self.monotonic_ns - other.monotonic_ns, self.boottime_ns - other.boottime_ns)

    def best(self, other: Clocks) -> Clocks:
        """Return the better of two estimates of one difference: the greater one."""
        return Clocks(
            max(self.monotonic_ns, other.monotonic_ns), max(self.boottime_ns, other.boottime_ns)
        )


def read_clocks() -> Clocks:
    """Return what the agent's own clocks show."""
    return Clocks(
        time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    )


def clock_shift(pid: int) -> Clocks:
    """Return how far the clocks of a process here are ahead of the agent's, by time namespaces."""
    try:
        theirs, ours = read_timens_offsets(pid), read_timens_offsets(os.getpid())
    except FileNotFoundError:
        return Clocks(0, 0)  # kernel without time namespaces
    return Clocks(*(theirs.get(name, 0) - ours.get(name, 0) for name in ("monotonic", "boottime")))


class OwnClock:
    """What its CLOCK_MONOTONIC shows a process. Made and asked ahead, it answers fast when time matters. close() it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._path = f"/proc/{pid}/timens_offsets"
        self._files = ReadAgain([self._path], limit=1)
        self._offsets = b""
        self._shift_ns = 0

    def now_ns(self) -> int:
        """Return what it shows now, in ns.

        :raises ProcessLookupError: the process is gone.
        """
        with contextlib.suppress(FileNotFoundError):  # kernel without time namespaces
            offsets = self._files.read_bytes(self._path)
            # Those of the agent do not change.
            if offsets != self._offsets:
                self._offsets, self._shift_ns = offsets, clock_shift(self._pid).monotonic_ns
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + self._shift_ns

    def close(self) -> None:
        """Close what is open for it; closing twice is harmless."""
        self._files.close()


def ahead_at_restore(state: ProcessState, earlier: Clocks, *, recorded: bool) -> Clocks:
    """Return how far the process's clocks must be ahead of the agent's from now on.

    ``earlier`` is the estimate from before the freeze. In an image the monotonic clock stood still, as
    in a suspended machine, and the other one went on by the wall clock.
    """
    frozen = Clocks(state.clock_monotonic_ns, state.clock_boottime_ns)
    ahead = frozen.minus(read_clocks())
    if not recorded:
        return ahead.best(earlier)
    passed = max(0, time.time_ns() - state.clock_realtime_ns)
    return Clocks(ahead.monotonic_ns, ahead.boottime_ns + passed)


def has_reached(ahead: Clocks, state: ProcessState) -> bool:
    """Tell whether clocks that are ``ahead`` of the agent's show no less than the frozen process last saw."""
    now = read_clocks()
    return (
        now.monotonic_ns + ahead.monotonic_ns >= state.clock_monotonic_ns
        and now.boottime_ns + ahead.boottime_ns >= state.clock_boottime_ns
    )


def is_own_clock(ahead: Clocks, *, same_boot: bool) -> bool:
    """Tell whether the process's clocks are those that it would have here anyway."""
    return same_boot and all(-SAME_CLOCK_NS < value <= 0 for value in ahead)


def make_time_namespace(ahead: Clocks) -> int:
    """Return a descriptor of a time namespace whose clocks are ahead of the agent's.

    :raises RestoreError: this kernel or these privileges do not allow it.
    """
    # The offsets count from the machine's clocks, not from those of a namespace that the agent is in.
    own = read_timens_offsets(os.getpid()) if os.path.exists("/proc/self/timens_offsets") else {}
    offsets = {
        "monotonic": ahead.monotonic_ns + own.get("monotonic", 0),
        "boottime": ahead.boottime_ns + own.get("boottime", 0),
    }
    try:
        here = os.open("/proc/self/ns/time", os.O_RDONLY | os.O_CLOEXEC)
        try:
            unshare(CLONE_NEWTIME)
            with open("/proc/self/timens_offsets", "w", encoding="ascii") as file:
                for clock, offset in offsets.items():
                    file.write(f"{clock} {offset // _NS_PER_S} {offset % _NS_PER_S}\n")
            return os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            # The agent's other children are to be born into its own; and the offsets above read as those for children.
            setns(here, CLONE_NEWTIME)
            os.close(here)
    except OSError as err:
        raise RestoreError(
            f"Cannot make a time namespace in which clocks are ahead by {ahead.monotonic_ns / 1e9:.3f} s:"
            f" {err.strerror}",
            hint="run agent-recv as root, on a kernel with CONFIG_TIME_NS",
        ) from err


def enter_calls(batch: Batch, fd: int, *, agent_pidfd: int) -> None:
    """Add the calls that put the process, while it has one thread, into the namespace of the agent's ``fd``."""
    taken = batch.call(nr.NR_pidfd_getfd, agent_pidfd, fd, 0, name="pidfd_getfd(time)")
    batch.call(nr.NR_setns, taken, CLONE_NEWTIME, name="setns(CLONE_NEWTIME)")
    batch.call(nr.NR_close, taken, name="close")
