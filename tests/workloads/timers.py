"""Interval timers, POSIX timers and a CPU-time timer that go on counting.

Usage: python -m tests.workloads.timers STATUS_FILE

POSIX timers are made raw, with a gap in their ids, and must keep id, signal, value and interval. A long timer's
remaining time may only shrink, and never faster than the realtime clock, which two hosts share, runs.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import sys
import threading
import time
from types import FrameType
from typing import Optional

from tests.workloads import libc
from tests.workloads.status import Status

_SIGEV_SIGNAL, _SIGEV_NONE, _SIGEV_THREAD_ID = 0, 1, 4
_SI_TIMER = -2
_LONG_S = 4000.0
_PERIODIC_SIGNAL, _THREAD_SIGNAL = signal.SIGRTMIN + 3, signal.SIGRTMIN + 4
_ALARMS = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)
_VALUE = 0x1122334455667788


def create(clock: int, notify: int, signum: int, value: int, tid: int = 0) -> int:
    """timer_create(2) with a raw struct sigevent; returns the kernel's timer id."""
    event = ctypes.create_string_buffer(struct.pack("Qiii44x", value, signum, notify, tid), 64)
    timer = ctypes.c_int32(-1)
    result = libc.syscall(libc.NR_timer_create, clock, event, ctypes.byref(timer))
    if result < 0:
        raise OSError(-result, "timer_create")
    return timer.value


def start(timer: int, first: float, interval: float) -> None:
    wanted = libc.itimerspec(libc.seconds(interval), libc.seconds(first))
    if libc.syscall(libc.NR_timer_settime, timer, 0, ctypes.byref(wanted), None) < 0:
        raise OSError("timer_settime")


def remaining(timer: int) -> tuple[float, float]:
    """(seconds until it fires, interval)."""
    now = libc.itimerspec()
    result = libc.syscall(libc.NR_timer_gettime, timer, ctypes.byref(now))
    if result < 0:
        raise OSError(-result, f"timer_gettime({timer})")
    return (
        now.it_value.tv_sec + now.it_value.tv_nsec / 1e9,
        now.it_interval.tv_sec + now.it_interval.tv_nsec / 1e9,
    )


class Catcher:
    """A thread that takes one timer's signals and checks what comes with them."""

    def __init__(self, status: Status, signum: int) -> None:
        self.status = status
        self.signum = signum
        self.timer = -1
        self.tid = 0
        self.count = 0
        self.ready = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()
        self.ready.wait()

    def run(self) -> None:
        # The process's alarms are for the main thread; here they would end the wait with EINTR.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ALARMS)
        self.tid = threading.get_native_id()
        self.ready.set()
        mask = ctypes.c_uint64(1 << (self.signum - 1))
        info = ctypes.create_string_buffer(128)
        while True:
            wait = libc.seconds(20)
            result = libc.syscall(
                libc.NR_rt_sigtimedwait, ctypes.byref(mask), info, ctypes.byref(wait), 8
            )
            if result != self.signum:
                self.status.error(f"signal {self.signum}: waited, got {libc.name_of(result)}")
                continue
            _signum, _errno, code = struct.unpack_from("iii", info)
            timer, _overrun, value = struct.unpack_from("iiQ", info, 16)
            self.count += 1
            if (code, timer, value) != (_SI_TIMER, self.timer, _VALUE):
                self.status.error(f"signal {self.signum}: code {code} timer {timer} value {value:#x}")


def main() -> None:
    status = Status(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, [_PERIODIC_SIGNAL, _THREAD_SIGNAL])
    counts = dict.fromkeys(_ALARMS, 0)

    def count(signum: int, frame: Optional[FrameType]) -> None:
        counts[signal.Signals(signum)] += 1

    for signum in counts:
        signal.signal(signum, count)
    signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3600, 1800)
    signal.setitimer(signal.ITIMER_PROF, 3600, 1800)

    by_process, by_thread = Catcher(status, _PERIODIC_SIGNAL), Catcher(status, _THREAD_SIGNAL)
    gap = create(time.CLOCK_MONOTONIC, _SIGEV_NONE, 0, 0)
    by_process.timer = create(time.CLOCK_MONOTONIC, _SIGEV_SIGNAL, _PERIODIC_SIGNAL, _VALUE)
    by_thread.timer = create(
        time.CLOCK_BOOTTIME, _SIGEV_THREAD_ID, _THREAD_SIGNAL, _VALUE, by_thread.tid
    )
    long = create(time.CLOCK_REALTIME, _SIGEV_NONE, 0, 0)
    cpu = create(time.CLOCK_PROCESS_CPUTIME_ID, _SIGEV_NONE, 0, 0)
    libc.syscall(libc.NR_timer_delete, gap)
    start(by_process.timer, 0.04, 0.04)
    start(by_thread.timer, 0.05, 0.05)
    start(long, _LONG_S, 250.0)
    start(cpu, _LONG_S, 0.0)
    last, since = _LONG_S, time.time()
    while True:
        left, interval = remaining(long)
        spent = time.time() - since
        status.check(left <= last and interval == 250.0, f"long timer: {last} then {left}")
        status.check(left + spent > _LONG_S - 0.1, f"long timer ran {_LONG_S - left} in {spent} s")
        last = left
        cpu_left, _ = remaining(cpu)
        status.check(_LONG_S - 100 < cpu_left <= _LONG_S, f"CPU timer: {cpu_left}")
        for which in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            value, every = signal.getitimer(which)
            status.check(3000 < value <= 3600.1 and every == 1800, f"itimer {which}: {value} {every}")
        status.note(
            alarms=counts[signal.SIGALRM],
            by_process=by_process.count,
            by_thread=by_thread.count,
            long_left=left,
        )
        time.sleep(0.05)


if __name__ == "__main__":
    main()
