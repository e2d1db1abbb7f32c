"""Interval timers and POSIX timers.

/proc/PID/timers says how each POSIX timer was made, calls inside the target say what remains.
Remaining times are as of the moment those calls ran in the frozen process. A stopped process's
timers go on: one that expires between reading it and peeking at the queued signals would be
carried twice (a queued signal and an armed timer) or lost. So the timers are read first, the
queues second, and settle_expired() decides every timer whose time fell in between by what the
queues hold.

On the destination timers keep their ids: ids are handed out by the kernel, which can be told to
take the caller's (PR_TIMER_CREATE_RESTORE_IDS), or else counts up from 0 in a new process. They
are made before the process's limits apply, since each timer counts against RLIMIT_SIGPENDING, and
armed last. Real-time clocks may be advanced by what elapsed since the freeze; CPU clocks stood
still. An expired deadline fires at once, never early. Times are nanoseconds. Sources:
timer_create(2), setitimer(2), proc_pid_timers(5).
"""

from __future__ import annotations

import dataclasses
import signal
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from agent.errors import RestoreError
from agent.kernel.features import kernel_features
from agent.kernel.prctl import (
    PR_TIMER_CREATE_RESTORE_IDS,
    PR_TIMER_CREATE_RESTORE_IDS_OFF,
    PR_TIMER_CREATE_RESTORE_IDS_ON,
)
from agent.kernel.siginfo import SI_KERNEL, SI_TIMER
from agent.kernel.syscalls import (
    NR_getitimer,
    NR_prctl,
    NR_setitimer,
    NR_timer_create,
    NR_timer_delete,
    NR_timer_getoverrun,
    NR_timer_gettime,
    NR_timer_settime,
)
from agent.kernel.timers import ITIMER_REAL
from agent.procfs import timers as proc_timers
from agent.state.signals import code_of, signal_of
from agent.types import Obstacle
from protocol.state.timers import (
    SIGEV_NONE,
    SIGEV_SIGNAL,
    SIGEV_THREAD,
    SIGEV_THREAD_ID,
    IntervalTimer,
    PosixTimer,
    TimersState,
)

if TYPE_CHECKING:
    from agent.target.inject import Batch

ITIMERS: Final = (0, 1, 2)
MAX_COUNTED_ID: Final = 2000
"""Where the kernel cannot be told an id, timers are made and deleted up to it; more would take too
long.
"""

# struct itimerval: interval, value, each seconds and microseconds.
_ITIMERVAL: Final = struct.Struct("=qqqq")
# struct itimerspec: interval, value, each seconds and nanoseconds.
_ITIMERSPEC: Final = struct.Struct("=qqqq")
# struct sigevent: value, signo, notify, thread id, padding to 64 bytes.
_SIGEVENT: Final = struct.Struct("=Qiii44x")
_NOTIFY: Final = {"signal": SIGEV_SIGNAL, "none": SIGEV_NONE, "thread": SIGEV_THREAD}
_SECOND_NS: Final = 1_000_000_000
_CLOCKFD: Final = 3
"""Clock ids whose low three bits are this stand for an open device (posix-timers.c, CLOCKFD)."""


def plan_timers(
    batch: Batch, made: Sequence[proc_timers.PosixTimer], ns_tid: Mapping[int, int]
) -> Callable[[], TimersState]:
    """Add the calls that read what remains of all timers of the process that runs ``batch``.

    ``made`` is /proc/PID/timers of the stopped process, ``ns_tid`` turns thread ids as the agent
    sees them into the process's own; collect it after the run.
    """
    interval_out = batch.buffer(_ITIMERVAL.size * len(ITIMERS))
    for which in ITIMERS:
        at = interval_out.at(_ITIMERVAL.size * which)
        batch.call(NR_getitimer, which, at, name="getitimer")
    posix_out = batch.buffer(max(1, _ITIMERSPEC.size * len(made)))
    overruns = []
    for index, timer in enumerate(made):
        at = posix_out.at(_ITIMERSPEC.size * index)
        batch.call(NR_timer_gettime, timer.id, at, name="timer_gettime")
        overruns.append(batch.call(NR_timer_getoverrun, timer.id, name="timer_getoverrun"))

    def collect() -> TimersState:
        raw = posix_out.read()
        posix = []
        for index, (timer, overrun) in enumerate(zip(made, overruns, strict=True)):
            times = _ITIMERSPEC.unpack_from(raw, _ITIMERSPEC.size * index)
            posix.append(
                PosixTimer(
                    id=timer.id,
                    clock_id=timer.clockid,
                    notify=SIGEV_THREAD_ID if timer.is_tid else _NOTIFY[timer.notify],
                    signal=timer.signo,
                    sigval=timer.sigval,
                    thread_id=ns_tid.get(timer.target, 0) if timer.is_tid else 0,
                    interval_ns=times[0] * _SECOND_NS + times[1],
                    remaining_ns=times[2] * _SECOND_NS + times[3],
                    overrun=overrun.value,
                )
            )
        interval = [
            IntervalTimer(
                which=which,
                interval_ns=times[0] * _SECOND_NS + times[1] * 1000,
                remaining_ns=times[2] * _SECOND_NS + times[3] * 1000,
            )
            for which, times in zip(ITIMERS, _ITIMERVAL.iter_unpack(interval_out.read()), strict=True)
            if any(times)
        ]
        return TimersState(interval_timers=tuple(interval), posix_timers=tuple(posix))

    return collect


def _timer_id_of(info: bytes) -> int:
    # siginfo of SI_TIMER: si_signo, si_errno, si_code, padding, si_timerid (siginfo.h, _timer).
    return int.from_bytes(info[16:20], "little", signed=True)


def settle_expired(state: TimersState, pending: Iterable[bytes], window_ns: int) -> TimersState:
    """Disarm the one-shot timers that went off in the ``window_ns`` between reading them and the
    queued signals.

    ``pending`` are all queued signals, read after the timers. A timer due in the window without
    its signal in a queue is left with what remained: it fires on the destination.
    """
    posix_fired = set()
    alarm_fired = False
    for info in pending:
        if code_of(info) == SI_TIMER:
            posix_fired.add(_timer_id_of(info))
        elif signal_of(info) == signal.SIGALRM and code_of(info) == SI_KERNEL:
            alarm_fired = True

    def due(timer: IntervalTimer | PosixTimer) -> bool:
        return 0 < timer.remaining_ns <= window_ns

    posix = tuple(
        dataclasses.replace(timer, remaining_ns=timer.interval_ns)
        if due(timer) and timer.id in posix_fired
        else timer
        for timer in state.posix_timers
    )
    interval = tuple(
        dataclasses.replace(timer, remaining_ns=timer.interval_ns)
        if timer.which == ITIMER_REAL and due(timer) and alarm_fired
        else timer
        for timer in state.interval_timers
    )
    return TimersState(interval_timers=interval, posix_timers=posix)


def _is_cpu_clock(clock_id: int) -> bool:
    # Negative ids are CPU clocks (or device clocks, which are refused); 2 and 3 are the caller's
    # own.
    return clock_id < 0 or clock_id in (2, 3)


def _left_ns(remaining_ns: int, elapsed_ns: int) -> int:
    # A deadline that passed meanwhile fires at once. A periodic one then goes on in its period,
    # but the kernel counts its overruns only from the expiry it is given.
    if remaining_ns == 0:
        return 0
    return max(1, remaining_ns - elapsed_ns)


def _created_with(timer: PosixTimer, pid: int, owner_tid: int) -> int:
    """Return the clock to create ``timer`` with from the leader, whatever thread made it."""
    # CPUCLOCK_PERTHREAD without a thread id (-2) means "the caller's own CPU time".
    if timer.clock_id in (-2, 3) and owner_tid not in (0, pid):
        return (~owner_tid << 3) | 4 | 2
    return timer.clock_id


def create_timers_calls(batch: Batch, timers: Sequence[PosixTimer], pid: int) -> Callable[[], None]:
    """Add the calls that make all POSIX timers, disarmed, with their ids; ``batch`` runs in the
    leader.

    All threads must exist. Returns what must be called after the run: it checks that the ids came
    out right.
    :raises RestoreError: by that check.
    """
    if not timers:
        return lambda: None
    told = kernel_features().has_timer_restore_ids
    made = {}
    if told:
        _restore_ids(batch, PR_TIMER_CREATE_RESTORE_IDS_ON)
    by_id = {timer.id: timer for timer in timers}
    for number in sorted(by_id) if told else range(max(by_id) + 1):
        timer = by_id.get(number)
        ident = batch.data(struct.pack("=iI", number if told else 0, 0))
        clock = _created_with(timer, pid, timer.thread_id) if timer else 1
        event = batch.data(
            _SIGEVENT.pack(timer.sigval, timer.signal, timer.notify, timer.thread_id)
            if timer
            else _SIGEVENT.pack(0, 0, SIGEV_NONE, 0)
        )
        batch.call(NR_timer_create, clock, event, ident, name=f"timer_create({number})")
        if timer is None:
            batch.call(NR_timer_delete, number, name="timer_delete")
        else:
            made[number] = ident
    if told:
        _restore_ids(batch, PR_TIMER_CREATE_RESTORE_IDS_OFF)

    def verify() -> None:
        for number, ident in made.items():
            got = struct.unpack_from("=i", ident.read())[0]
            if got != number:
                raise RestoreError(
                    f"Timer {number} came out as timer {got} in task {pid}",
                    hint="the kernel hands out other timer ids; it needs"
                    " PR_TIMER_CREATE_RESTORE_IDS (v6.16)",
                )

    return verify


def _restore_ids(batch: Batch, mode: int) -> None:
    batch.call(
        NR_prctl, PR_TIMER_CREATE_RESTORE_IDS, mode, name="prctl(PR_TIMER_CREATE_RESTORE_IDS)"
    )


def arm_timers_calls(batch: Batch, state: TimersState, *, elapsed_ns: int = 0) -> None:
    """Add the calls that start all timers; ``elapsed_ns`` is how long ago the freeze was, by the
    process's clocks.
    """
    for timer in state.posix_timers:
        if timer.remaining_ns == 0:
            continue
        elapsed = 0 if _is_cpu_clock(timer.clock_id) else elapsed_ns
        left = _left_ns(timer.remaining_ns, elapsed)
        spec = _ITIMERSPEC.pack(*divmod(timer.interval_ns, _SECOND_NS), *divmod(left, _SECOND_NS))
        batch.call(NR_timer_settime, timer.id, 0, batch.data(spec), 0, name="timer_settime")
    for itimer in state.interval_timers:
        elapsed = elapsed_ns if itimer.which == ITIMER_REAL else 0
        left = _left_ns(itimer.remaining_ns, elapsed)
        if left == 0 and itimer.which == ITIMER_REAL:
            # A periodic SIGALRM that waits to be delivered: the kernel starts the next period at
            # the delivery. Only a timer that is set has a period.
            left = itimer.interval_ns
        # Round up: the kernel would take 1 ns as "never".
        left_us = -(-left // 1000)
        value = _ITIMERVAL.pack(
            *divmod(itimer.interval_ns // 1000, 1_000_000), *divmod(left_us, 1_000_000)
        )
        batch.call(NR_setitimer, itimer.which, batch.data(value), 0, name="setitimer")


def check_timers(
    made: Iterable[proc_timers.PosixTimer], nr_threads: int
) -> list[Obstacle]:
    """Say which timers cannot be carried."""
    found = []
    for timer in made:
        if timer.clockid < 0 and timer.clockid & 7 == _CLOCKFD:
            found.append(
                Obstacle(
                    kind="timer",
                    what=f"timer {timer.id}",
                    detail="it runs on the clock of a device (a PTP clock)",
                    hint="delete it before the migration",
                )
            )
        elif timer.clockid in (-2, 3) and nr_threads > 1 and not timer.is_tid:
            found.append(
                Obstacle(
                    kind="timer",
                    what=f"timer {timer.id}",
                    detail="it measures the CPU time of the thread that made it, and the kernel"
                    " does not tell which of the threads that was",
                    hint="make it with pthread_getcpuclockid() or with SIGEV_THREAD_ID",
                )
            )
    return found


def check_timers_restore(state: TimersState) -> list[Obstacle]:
    """Say which timer ids this kernel cannot give; nothing is touched."""
    if kernel_features().has_timer_restore_ids:
        return []
    return [
        Obstacle(
            kind="timer",
            what=f"timer {timer.id}",
            detail="this kernel hands out timer ids one by one and cannot be told that one",
            hint="use a kernel with PR_TIMER_CREATE_RESTORE_IDS (v6.16)",
        )
        for timer in state.posix_timers
        if timer.id > MAX_COUNTED_ID
    ]
