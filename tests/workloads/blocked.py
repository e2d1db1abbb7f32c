"""A thread blocked in a system call, for each of many calls; notes with which result, and when, each call ended.

Usage: python -m tests.workloads.blocked MODE|all SECONDS STATUS_FILE

The calls are made raw, so an EINTR that Ferry failed to hide shows. Each ends SECONDS after the "begin" note: by its
own timeout, or because another thread then does what it waits for. "end" notes have the result, the expected result and
the time that passed by the realtime clock, which two hosts share. Then the workload idles, notes "idle" and lives on.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.workloads import libc
from tests.workloads.status import Status

_FUTEX_WAIT_PRIVATE = 128
_FUTEX_WAKE_PRIVATE = 129
_FUTEX_WAIT_BITSET_PRIVATE = 137
_TIMER_ABSTIME = 1
_SYS_READ = 0
_SYS_ACCEPT4 = 288
_SYS_RECVFROM = 45
_SYS_PAUSE = 34
_ETIMEDOUT, _EAGAIN, _EINTR = -110, -11, -4


class Plan(NamedTuple):
    """The blocking call, the result it must have, and what another thread does to end it."""

    call: Callable[[], int]
    expected: int
    wake: Callable[[], object] = lambda: None


class pollfd(ctypes.Structure):
    """struct pollfd of poll.h."""

    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]


def _later(seconds: float) -> libc.timespec:
    return libc.seconds(time.clock_gettime(time.CLOCK_MONOTONIC) + seconds)


def _plan_sleeps(mode: str, seconds: float) -> Plan:
    span = libc.seconds(seconds)
    remaining = libc.timespec()
    if mode == "nanosleep":
        return Plan(lambda: libc.syscall(libc.NR_nanosleep, ctypes.byref(span), ctypes.byref(remaining)), 0)
    if mode == "clock_nanosleep":
        return Plan(
            lambda: libc.syscall(
                libc.NR_clock_nanosleep, time.CLOCK_MONOTONIC, 0, ctypes.byref(span), ctypes.byref(remaining)
            ),
            0,
        )
    until = _later(seconds)
    return Plan(
        lambda: libc.syscall(
            libc.NR_clock_nanosleep, time.CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(until), None
        ),
        0,
    )


def _plan_polls(mode: str, seconds: float) -> Plan:
    reader, writer = os.pipe()
    milliseconds = int(seconds * 1000)
    waiting = pollfd(reader, select.POLLIN, 0)
    span = libc.seconds(seconds)
    if mode == "poll":
        return Plan(lambda: libc.syscall(libc.NR_poll, ctypes.byref(waiting), 1, milliseconds), 0)
    if mode == "poll_ready":
        return Plan(
            lambda: libc.syscall(libc.NR_poll, ctypes.byref(waiting), 1, -1), 1, lambda: os.write(writer, b"x")
        )
    if mode == "ppoll":
        return Plan(
            lambda: libc.syscall(libc.NR_ppoll, ctypes.byref(waiting), 1, ctypes.byref(span), None, 8), 0
        )
    if mode == "select":
        readable = (ctypes.c_uint64 * 16)()
        readable[reader // 64] = 1 << (reader % 64)
        return Plan(
            lambda: libc.syscall(
                libc.NR_pselect6, reader + 1, readable, None, None, ctypes.byref(span), None
            ),
            0,
        )
    epoll = select.epoll()
    epoll.register(reader, select.EPOLLIN)
    events = (ctypes.c_uint8 * 12)()
    fd = os.dup(epoll.fileno())
    if mode == "epoll_wait":
        return Plan(lambda: libc.syscall(libc.NR_epoll_wait, fd, events, 1, milliseconds), 0)
    if mode == "epoll_ready":
        return Plan(
            lambda: libc.syscall(libc.NR_epoll_wait, fd, events, 1, -1), 1, lambda: os.write(writer, b"x")
        )
    return Plan(
        lambda: libc.syscall(libc.NR_epoll_pwait2, fd, events, 1, ctypes.byref(span), None, 8), 0
    )


def _plan_futexes(mode: str, seconds: float) -> Plan:
    word = ctypes.c_uint32(0)
    span = libc.seconds(seconds)
    if mode == "futex":
        return Plan(
            lambda: libc.syscall(
                libc.NR_futex, ctypes.byref(word), _FUTEX_WAIT_PRIVATE, 0, ctypes.byref(span), None, 0
            ),
            _ETIMEDOUT,
        )
    if mode == "futex_bitset":
        until = _later(seconds)
        return Plan(
            lambda: libc.syscall(
                libc.NR_futex,
                ctypes.byref(word),
                _FUTEX_WAIT_BITSET_PRIVATE,
                0,
                ctypes.byref(until),
                None,
                ctypes.c_uint32(0xFFFFFFFF),
            ),
            _ETIMEDOUT,
        )
    return Plan(
        lambda: libc.syscall(libc.NR_futex, ctypes.byref(word), _FUTEX_WAIT_PRIVATE, 0, None, None, 0),
        0,
        lambda: libc.syscall(libc.NR_futex, ctypes.byref(word), _FUTEX_WAKE_PRIVATE, 1, None, None, 0),
    )


def _plan_reads(mode: str, seconds: float) -> Plan:
    buffer = ctypes.create_string_buffer(64)
    if mode == "read":
        reader, writer = os.pipe()
        return Plan(lambda: libc.syscall(_SYS_READ, reader, buffer, 64), 5, lambda: os.write(writer, b"hello"))
    if mode == "eventfd":
        event = os.eventfd(0)
        return Plan(
            lambda: libc.syscall(_SYS_READ, event, buffer, 8),
            8,
            lambda: os.write(event, (1).to_bytes(8, "little")),
        )
    if mode == "recv_timeout":
        left, right = socket.socketpair()
        option = struct.pack("qq", int(seconds), int(seconds % 1 * 1_000_000))
        left.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, option)
        fd = os.dup(left.fileno())
        os.dup(right.fileno())  # open for good, or the read would end
        return Plan(lambda: libc.syscall(_SYS_RECVFROM, fd, buffer, 64, 0, None, None), _EAGAIN)
    left, right = socket.socketpair()
    fd, peer = os.dup(left.fileno()), os.dup(right.fileno())
    return Plan(
        lambda: libc.syscall(_SYS_RECVFROM, fd, buffer, 64, 0, None, None), 5, lambda: os.write(peer, b"hello")
    )


def _plan_accept(mode: str, seconds: float) -> Plan:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    address = listener.getsockname()
    fd = os.dup(listener.fileno())

    def connect() -> None:
        with socket.create_connection(address):
            pass

    return Plan(lambda: min(libc.syscall(_SYS_ACCEPT4, fd, None, None, 0), 1), 1, connect)


def _plan_signals(mode: str, seconds: float) -> Plan:
    # Each waits for a signal of its own, which every thread blocks.
    waited = signal.SIGUSR2 if mode == "sigtimedwait" else signal.SIGUSR1
    mask = ctypes.c_uint64(1 << (waited - 1))
    span = libc.seconds(seconds)
    if mode == "sigtimedwait":
        return Plan(
            lambda: libc.syscall(
                libc.NR_rt_sigtimedwait, ctypes.byref(mask), None, ctypes.byref(span), 8
            ),
            _EAGAIN,
        )
    if mode == "sigwait":
        return Plan(
            lambda: libc.syscall(libc.NR_rt_sigtimedwait, ctypes.byref(mask), None, None, 8),
            signal.SIGUSR1,
            lambda: os.kill(os.getpid(), signal.SIGUSR1),
        )
    # A real signal, and a handler: the call must end with EINTR, once, and not before.

    def pause() -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        return libc.syscall(_SYS_PAUSE)

    return Plan(pause, _EINTR, lambda: os.kill(os.getpid(), signal.SIGALRM))


MODES: dict[str, Callable[[str, float], Plan]] = {
    "nanosleep": _plan_sleeps,
    "clock_nanosleep": _plan_sleeps,
    "clock_nanosleep_abs": _plan_sleeps,
    "poll": _plan_polls,
    "poll_ready": _plan_polls,
    "ppoll": _plan_polls,
    "select": _plan_polls,
    "epoll_wait": _plan_polls,
    "epoll_ready": _plan_polls,
    "epoll_pwait2": _plan_polls,
    "futex": _plan_futexes,
    "futex_bitset": _plan_futexes,
    "futex_wake": _plan_futexes,
    "read": _plan_reads,
    "eventfd": _plan_reads,
    "recv": _plan_reads,
    "recv_timeout": _plan_reads,
    "accept": _plan_accept,
    "sigtimedwait": _plan_signals,
    "sigwait": _plan_signals,
    "pause": _plan_signals,
}


def run(
    mode: str, seconds: float, status: Status, ready: threading.Barrier, wakers: list[Callable[[], object]]
) -> None:
    """Makes the call of one mode, notes how it ended."""
    ready.wait()
    plan = MODES[mode](mode, seconds)
    wakers.append(plan.wake)
    status.note(state="begin", mode=mode)
    begin_ns = time.time_ns()
    result = plan.call()
    status.note(
        state="end",
        mode=mode,
        result=result,
        result_name=libc.name_of(result),
        expected=plan.expected,
        elapsed_s=(time.time_ns() - begin_ns) / 1e9,
    )
    status.check(result == plan.expected, f"{mode} gave {libc.name_of(result)}")


def main() -> None:
    mode, seconds, path = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    status = Status(path)
    signal.signal(signal.SIGALRM, lambda signum, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM])
    modes = sorted(MODES) if mode == "all" else [mode]
    ready = threading.Barrier(len(modes) + 1)
    wakers: list[Callable[[], object]] = []
    threads = [
        threading.Thread(target=run, args=(mode, seconds, status, ready, wakers), daemon=True) for mode in modes
    ]
    for thread in threads:
        thread.start()
    ready.wait()
    # Some short sleeps instead of one long one: this thread too is in a call at any moment.
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(wakers) < len(modes):
        time.sleep(0.02)
    for wake in wakers:
        wake()
    for thread in threads:
        thread.join()
    while True:
        time.sleep(0.05)
        status.note(state="idle")


if __name__ == "__main__":
    main()
