"""Threads dumped ahead of the freeze: those that have nothing to do, and most likely still have nothing then.

Every thread of a frozen process costs downtime: to be stopped, asked, let make its calls, written down. A pool of
idle workers need not be asked in the freeze: each is asked before, and parked (agent.target.parking). What is left for
the freeze is to see that it still sleeps, and that nobody else has changed what others can change of a thread. One
that woke is dumped again with the threads that have worked all the time.

All ids are as the agent sees them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from agent.kernel import sched
from agent.procfs.syscall import read_syscall
from agent.state.clocks import clock_shift
from agent.state.thread import ThreadCalls, ThreadStudy, study_thread
from agent.target.blocking import end_of, takes_nothing
from agent.target.inject import Injector
from agent.target.memory import TargetMemory
from agent.target.parking import may_park, park, unpark
from agent.target.restart import read_timespec_ns
from agent.target.template import Template
from agent.target.tracer import Tracer
from protocol.state.thread import ThreadState

_SOON_NS: Final = 20_000_000
_EACH_NS: Final = 200_000
"""Who waits for less than this, and so much more for each thread of the process, is left alone: he would wake."""
_ASLEEP_S: Final = 0.005
_LOOK_S: Final = 0.00002
"""How long threads that were let go may take to fall asleep again, and how often it is looked."""
_TRACKS: Final = re.compile(
    rb"^State:\t(\w).*?^voluntary_ctxt_switches:\t(\d+)\nnonvoluntary_ctxt_switches:\t(\d+)", re.DOTALL | re.MULTILINE
)
"""In a status file: what shows whether a thread sleeps, and whether it has run since another look."""
_TRAITS: Final = re.compile(rb"\AName:\t(.*?)\n.*?^SigPnd:\t0+\n.*?^Cpus_allowed:\t(\S+)", re.DOTALL | re.MULTILINE)
"""What others may change, in the status file of a thread that no signal waits for."""


class _Kept(NamedTuple):
    state: ThreadState
    tracks: tuple[bytes, ...]
    traits: tuple[object, ...]


class ThreadsAhead:
    """The idle threads of a process, as dumped before the freeze. ``read_status`` returns the status file of a thread.

    Idle are those that wait for a time that is far, or for somebody, and that since before this was made.
    """

    def __init__(self, pid: int, tids: Iterable[int], read_status: Callable[[int], bytes]) -> None:
        self._pid = pid
        self._read_status = read_status
        self._seen: dict[int, tuple[bytes, ...]] = {}
        self._kept: dict[int, _Kept] = {}
        self._parked_ns = 0
        for tid in tids:
            if tid != pid:
                with suppress(OSError):
                    self._seen[tid] = _tracks(read_status(tid))

    @property
    def states(self) -> dict[int, ThreadState]:
        """Those that still hold, by tid."""
        return {tid: kept.state for tid, kept in self._kept.items()}

    def dump(self, tracer: Tracer, calls: ThreadCalls, template: Template, but: Collection[int]) -> None:
        """Dump and park the idle threads, all ``but`` some; the process runs, and none of its threads is stopped.

        :raises MigrationError: a thread cannot be dumped; those that are stopped are the caller's to let go.
        """
        self._kept = {}
        studies, statuses, traits = {}, {}, {}
        for study in self._study(tracer, but):
            # Looked at before the calls are made: what changes meanwhile differs in the freeze.
            tid = study.thread.tid
            status = self._read_status(tid)
            found = _traits(tid, status)
            if found is None:
                tracer.detach(study.thread)
            else:
                studies[tid], statuses[tid], traits[tid] = study, status, found
        if not studies:
            return
        copies = {tid: template.copy() for tid in studies}
        with Injector(tracer) as injector:
            injector.run_parallel(copies)
        states = {tid: calls.collect(copies[tid], study, statuses[tid], ()) for tid, study in studies.items()}
        self._parked_ns = time.monotonic_ns()
        deadline = time.monotonic() + _ASLEEP_S
        for thread in park(tracer, [study.thread for study in studies.values()]):
            tid = thread.tid
            tracks = self._wait_asleep(tid, deadline)
            if tracks is not None:
                self._kept[tid] = _Kept(states[tid], tracks, traits[tid])

    def recheck(self, tracer: Tracer, but: Collection[int]) -> None:
        """All other threads are stopped: stop those, too, of which the dump no longer holds, and all of ``but``."""
        parked = {tid: thread for tid, thread in tracer.threads.items() if thread.parked}
        # Those of another tracer have been let go of.
        self._kept = {
            tid: kept
            for tid, kept in self._kept.items()
            if tid in parked and tid not in but and self._holds(tid, kept)
        }
        woken = [thread for tid, thread in parked.items() if tid not in self._kept]
        if woken:
            tracer.stopped_ns = min(tracer.stopped_ns, self._parked_ns)
            unpark(tracer, woken)

    # -- which, and how they are found unchanged ---------------------------------------------------------------------

    def _study(self, tracer: Tracer, but: Collection[int]) -> Iterator[ThreadStudy]:
        for thread in tracer.stop_some([tid for tid in self._find_idle(tracer.memory) if tid not in but]):
            study = study_thread(thread, tracer.memory)
            if study.restart is None and may_park(thread):
                yield study
            else:
                tracer.detach(thread)

    def _find_idle(self, memory: TargetMemory) -> Iterator[int]:
        shift_ns = clock_shift(self._pid).monotonic_ns
        soon_ns = _SOON_NS + len(self._seen) * _EACH_NS
        for tid, seen in self._seen.items():
            with suppress(OSError):
                call = read_syscall(self._pid, tid)
                if call is None or not takes_nothing(call.nr, call.args):
                    continue
                end = end_of(call.nr, call.args)
                if end is None:
                    is_idle = _tracks(self._read_status(tid)) == seen
                else:
                    is_idle = _time_until(memory, *end, shift_ns) > soon_ns
                if is_idle:
                    yield tid

    def _wait_asleep(self, tid: int, deadline: float) -> tuple[bytes, ...] | None:
        with suppress(OSError):
            while (tracks := _tracks(self._read_status(tid)))[:1] != (b"S",):
                if time.monotonic() > deadline:
                    return None
                time.sleep(_LOOK_S)
            return tracks
        return None

    def _holds(self, tid: int, kept: _Kept) -> bool:
        try:
            status = self._read_status(tid)
            return _tracks(status) == kept.tracks and _traits(tid, status) == kept.traits
        except OSError:
            return False


def _tracks(status: bytes) -> tuple[bytes, ...]:
    match = _TRACKS.search(status)
    return match.groups() if match is not None else ()


def _traits(tid: int, status: bytes) -> tuple[object, ...] | None:
    """Return what others may change of a thread; None: a signal waits for it."""
    # Timer slack is left out: for that, somebody with CAP_SYS_NICE would have to write to a file of /proc.
    match = _TRAITS.search(status)
    return match and (*match.groups(), bytes(sched.getattr(tid)), sched.ioprio_get(tid))


def _time_until(memory: TargetMemory, clock: int, address: int, shift_ns: int) -> int:
    """Return how many ns it is until the time at an address; ``shift_ns``: what CLOCK_MONOTONIC is ahead there."""
    now_ns = time.clock_gettime_ns(clock) + (shift_ns if clock == time.CLOCK_MONOTONIC else 0)
    return read_timespec_ns(memory, address) - now_ns
