"""Threads that sleep in raw system calls, over and over, and notice every EINTR and every sleep that is cut short.

Usage: python -m tests.faults.sleepers STATUS_FILE

One more waits for a lock, for as long as it takes, and two for one that nobody gives back: they never have anything to
do. Two hand a counter to each other through pipes, SIGALRM ticks in the main thread, a blocked SIGUSR1 and two blocked
real-time signals with values stay pending for good. Mappings and descriptors stay the same once the first note is
written. Runs until killed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from tests.workloads import libc
from tests.workloads.status import Status

SLEEP_S = 0.15
_FUTEX_WAIT_PRIVATE = 128
_FUTEX_WAIT_BITSET_PRIVATE = 137
_ANY_BIT = 0xFFFFFFFF
_TIMER_ABSTIME = 1
_SYS_RECVFROM = 45
_SYS_READ = 0
_ETIMEDOUT, _EAGAIN = -110, -11


class pollfd(ctypes.Structure):
    """struct pollfd of poll.h."""

    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]


def sleeps() -> dict[str, tuple[Callable[[], int], int]]:
    """Name -> a call that takes SLEEP_S, and the result it must have."""
    span = libc.seconds(SLEEP_S)
    rest = libc.timespec()
    word = ctypes.c_uint32(0)
    reader, _writer = os.pipe()
    waiting = pollfd(reader, select.POLLIN, 0)
    unnamed = select.epoll()
    epoll = os.dup(unnamed.fileno())
    events = (ctypes.c_uint8 * 12)()
    buffer = ctypes.create_string_buffer(64)
    left, right = socket.socketpair()
    limit = struct.pack("qq", 0, int(SLEEP_S * 1e6))
    left.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    silent = os.dup(left.fileno())
    os.dup(right.fileno())  # open for good, or the read would end
    milliseconds = int(SLEEP_S * 1000)
    unused = ctypes.c_uint64(1 << (signal.SIGTERM - 1))
    return {
        "nanosleep": (
            lambda: libc.syscall(libc.NR_nanosleep, ctypes.byref(span), ctypes.byref(rest)),
            0,
        ),
        "poll": (lambda: libc.syscall(libc.NR_poll, ctypes.byref(waiting), 1, milliseconds), 0),
        "epoll_wait": (lambda: libc.syscall(libc.NR_epoll_wait, epoll, events, 1, milliseconds), 0),
        "recv": (
            lambda: libc.syscall(_SYS_RECVFROM, silent, buffer, 64, 0, None, None),
            _EAGAIN,
        ),
        "sigtimedwait": (
            lambda: libc.syscall(
                libc.NR_rt_sigtimedwait, ctypes.byref(unused), None, ctypes.byref(span), 8
            ),
            _EAGAIN,
        ),
        "futex": (
            lambda: libc.syscall(
                libc.NR_futex, ctypes.byref(word), _FUTEX_WAIT_PRIVATE, 0, ctypes.byref(span), None, 0
            ),
            _ETIMEDOUT,
        ),
        "futex_until": (
            lambda: libc.syscall(
                libc.NR_futex, ctypes.byref(word), _FUTEX_WAIT_BITSET_PRIVATE, 0, ctypes.byref(end()), None, _ANY_BIT
            ),
            _ETIMEDOUT,
        ),
        "clock_nanosleep": (
            lambda: libc.syscall(
                libc.NR_clock_nanosleep, time.CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(end()), None
            ),
            0,
        ),
    }


def end() -> libc.timespec:
    """When a sleep that begins now ends."""
    return libc.seconds(time.monotonic() + SLEEP_S)


def repeat(
    status: Status, name: str, call: Callable[[], int], expected: int, counts: list[int], index: int
) -> None:
    """Sleep for ever, checking each result and that no sleep was short, and count."""
    while True:
        began = time.monotonic()
        result = call()
        slept = time.monotonic() - began
        status.check(result == expected, f"{name} gave {libc.name_of(result)} after {slept:.4f} s")
        status.check(slept > SLEEP_S - 0.002, f"{name} took only {slept:.4f} s")
        counts[index] += 1


def wait_for(lock: threading.Lock, counts: list[int], index: int) -> None:
    """Take a lock for ever, and count."""
    while True:
        lock.acquire()
        counts[index] += 1


def hand_over(status: Status, reader: int, writer: int, turns: list[int]) -> None:
    """Pass a counter on; it must be the next one each time."""
    buffer = ctypes.create_string_buffer(8)
    while True:
        count = libc.syscall(_SYS_READ, reader, buffer, 8)
        status.check(count == 8, f"read gave {libc.name_of(count)}")
        value = int.from_bytes(buffer.raw, "little")
        status.check(value == turns[0] + 1, f"got turn {value} after {turns[0]}")
        turns[0] = value
        time.sleep(0.001)
        os.write(writer, (value + 1).to_bytes(8, "little"))


def main() -> None:
    status = Status(sys.argv[1])
    every = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
    signal.pthread_sigmask(signal.SIG_BLOCK, every)
    there, back = os.pipe(), os.pipe()
    turns = [0]
    plans = sleeps()
    counts = [0] * (len(plans) + 1)
    lock, taken = threading.Lock(), threading.Lock()
    lock.acquire()
    taken.acquire()
    threads = [
        threading.Thread(target=repeat, args=(status, name, *plan, counts, index), daemon=True)
        for index, (name, plan) in enumerate(plans.items())
    ]
    threads += [
        threading.Thread(target=taken.acquire, daemon=True),
        threading.Thread(target=taken.acquire, daemon=True),
        threading.Thread(target=wait_for, args=(lock, counts, len(plans)), daemon=True),
        threading.Thread(target=hand_over, args=(status, there[0], back[1], turns), daemon=True),
        threading.Thread(target=hand_over, args=(status, back[0], there[1], turns), daemon=True),
    ]
    for thread in threads:
        thread.start()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda signum, frame: status.error("SIGUSR2 came"))
    ticks = [0]

    def tick(signum: int, frame: object) -> None:
        ticks[0] += 1

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1, signal.SIGRTMIN, signal.SIGCONT])
    os.kill(os.getpid(), signal.SIGUSR1)
    siginfo = (ctypes.c_int32 * 32)()
    for value in (41, 42):
        siginfo[0:7] = [signal.SIGRTMIN, 0, -1, 0, os.getpid(), os.getuid(), value]
        libc.syscall(libc.NR_rt_sigqueueinfo, os.getpid(), signal.SIGRTMIN, siginfo)
    os.write(there[1], (1).to_bytes(8, "little"))
    for number in itertools.count():
        status.note(turns=turns[0], ticks=ticks[0], sleeps=counts)
        time.sleep(0.05)
        if number % 5 == 0 and lock.locked():
            lock.release()


if __name__ == "__main__":
    main()
