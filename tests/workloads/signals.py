"""Dispositions, masks, alternate stack, and queued signals that must come out in order with their values.

Usage: python -m tests.workloads.signals STATUS_FILE

Again and again: queue signals to the process and to a thread, leave them pending for a while, take them out, compare.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import threading
import time

from tests.workloads import libc
from tests.workloads.status import Status

_SI_QUEUE = -1
_REALTIME = signal.SIGRTMIN + 5
_BLOCKED = [signal.SIGUSR1, _REALTIME]


class stack_t(ctypes.Structure):
    """struct sigaltstack of asm/signal.h."""

    _fields_ = [("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


def queue(signum: int, value: int, tid: int = 0) -> None:
    """A signal with a value, to this process or to one of its threads."""
    uid, pid = os.getuid(), os.getpid()
    info = ctypes.create_string_buffer(
        struct.pack("iiiiiiQ", signum, 0, _SI_QUEUE, 0, pid, uid, value), 128
    )
    if tid:
        result = libc.syscall(libc.NR_rt_tgsigqueueinfo, pid, tid, signum, info)
    else:
        result = libc.syscall(libc.NR_rt_sigqueueinfo, pid, signum, info)
    if result < 0:
        raise OSError(-result, "rt_sigqueueinfo")


def take(signum: int) -> tuple[int, int, int]:
    """(signal or -errno, si_code, value) of the next pending signal; does not wait."""
    mask = ctypes.c_uint64(1 << (signum - 1))
    info = ctypes.create_string_buffer(128)
    none = libc.seconds(0)
    result = libc.syscall(libc.NR_rt_sigtimedwait, ctypes.byref(mask), info, ctypes.byref(none), 8)
    code, value = struct.unpack_from("i", info, 8)[0], struct.unpack_from("Q", info, 24)[0]
    return result, code, value


def check_queues(status: Status, name: str, tid: int, base: int) -> None:
    """Queues, waits with them pending, takes them out again."""
    for offset in range(4):
        queue(_REALTIME, base + offset, tid)
    queue(signal.SIGUSR1, base, tid)
    time.sleep(0.2)
    for offset in range(4):
        found = take(_REALTIME)
        status.check(
            found == (_REALTIME, _SI_QUEUE, base + offset), f"{name}: {found}, expected {base + offset}"
        )
    found = take(signal.SIGUSR1)
    status.check(found == (signal.SIGUSR1, _SI_QUEUE, base), f"{name}: SIGUSR1 {found}")
    found = take(_REALTIME)
    status.check(found[0] == -11, f"{name}: a signal too many: {found}")


class Listener:
    """A thread with pending signals of its own, which no other thread could take."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.turns = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        # SIGUSR2 is open here and blocked in the other thread.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        while True:
            check_queues(self.status, "thread", threading.get_native_id(), 1000 + self.turns)
            self.status.check(
                signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask, "signal mask of the thread changed"
            )
            self.turns += 1


def main() -> None:
    status = Status(sys.argv[1])
    handled = []
    signal.signal(signal.SIGUSR2, lambda signum, frame: handled.append(signum))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGWINCH, lambda signum, frame: None)
    signal.siginterrupt(signal.SIGWINCH, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, [*_BLOCKED, signal.SIGUSR2])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    memory = ctypes.create_string_buffer(1 << 16)
    wanted = stack_t(ctypes.addressof(memory), 0, 1 << 16)
    libc.syscall(libc.NR_sigaltstack, ctypes.byref(wanted), None)
    listener = Listener(status)

    def dispositions() -> list[str]:
        lines = open("/proc/self/status").read().splitlines()
        return [line for line in lines if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]

    before = dispositions()
    turns = 0
    while True:
        # The values of the process queue are even, the thread's own queue is taken first by the kernel anyway.
        check_queues(status, "process", threading.get_native_id(), 500_000 + turns)
        os.kill(os.getpid(), signal.SIGUSR2)
        turns += 1
        status.check(signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask, "signal mask changed")
        now = dispositions()
        status.check(now == before, f"dispositions changed: {before} {now}")
        found = stack_t()
        libc.syscall(libc.NR_sigaltstack, None, ctypes.byref(found))
        same = (found.ss_sp, found.ss_size) == (wanted.ss_sp, wanted.ss_size)
        status.check(same, f"alternate stack is {found.ss_sp} {found.ss_size}")
        status.check(len(handled) >= turns - 2, f"{turns} signals sent, {len(handled)} handled")
        status.note(turns=turns, thread_turns=listener.turns, handled=len(handled))


if __name__ == "__main__":
    main()
