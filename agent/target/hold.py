"""Keeping a stopped process stopped whatever becomes of the agent: one SIGSTOP waits for it.

Set free by the agent's death, each thread passes the signal queues, under one lock, before it runs a single
instruction: the first one takes the SIGSTOP and stops all others by that. A process in a group-stop, or with a SIGSTOP
of its own, stays stopped anyway and gets none. SIGCONT ends the hold.

A frozen cgroup would hold it as well (a traced thread counts as frozen, and goes on being so when its tracer
dies), unseen by its parent and whatever SIGCONT comes. It is the worse choice all the same:

- The process's own cgroup may hold others, and has none of this in the root cgroup, so the process would have
  to be moved into one made for it. cgroup.procs waits for an RCU grace period: 9-17 ms here, in the middle of
  the downtime, where a SIGSTOP takes microseconds. Moved before the freeze, it would stay there when the agent
  is killed: a process that runs on must be as it was, and /proc/PID/cgroup shows the difference.
- A cgroup has one writer, its manager (systemd, a container runtime), whose limits, accounting and notion of
  what belongs to a service follow it. Neither moving the process nor freezing a cgroup that holds nothing
  else is ours to do: the manager may thaw it, and a process that joins it would hang.
- It needs a writable cgroup2 on both hosts, which containers and version 1 machines do not have: SIGSTOP
  would have to stay, as a second way with a second set of failures.
- What it would improve shows only when the agent dies, or the link breaks, within the milliseconds from COMMIT
  to the answer, and is over with --resolve.

Sources: ptrace(2), kernel/signal.c.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Final, final

from agent.errors import FreezeError, TargetGone
from agent.kernel import ptrace
from agent.kernel.libc import syscall
from agent.kernel.syscalls import NR_rt_sigqueueinfo
from agent.procfs.stat import read_state
from agent.procfs.status import read_signal_sets
from agent.target import restart
from agent.target.traced import StopKind, TracedThread
from agent.target.tracer import Tracer

_SWALLOW_S: Final = 0.1
"""After so long it is looked whether a queued signal is still there: taking it needs no instruction of the target."""
_SWALLOW_PATIENCE_S: Final = 60.0
"""How long to wait for a thread to take a queued signal."""
_ALL_SIGNALS: Final = (1 << 64) - 1


@final
class Hold:
    """The hold of the process that ``tracer`` has stopped, all threads of it; none before take()."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._is_taken = False
        self._dropped: list[bytes] = []  # signals that take() cost the process

    def take(self) -> None:
        """Queue the SIGSTOP; taking it twice is harmless."""
        tracer = self._tracer
        if self._is_taken or any(thread.in_group_stop for thread in tracer.threads.values()):
            return
        pending = read_signal_sets(tracer.pid, tracer.pid).shd_pnd
        if pending & _bit(signal.SIGSTOP):
            return
        if pending & _bit(signal.SIGCONT):
            # The kernel drops it from the queue when a SIGSTOP comes.
            tid = next(iter(tracer.threads))
            self._dropped = [
                info
                for info in ptrace.peeksiginfo(tid, shared=True)
                if int.from_bytes(info[:4], "little") == signal.SIGCONT
            ]
        os.kill(tracer.pid, signal.SIGSTOP)
        self._mark(taken=True)

    def drop(self) -> None:
        """Take the SIGSTOP from its queue again, if take() put it there; the threads stay stopped.

        Signals that the kernel takes first (lower numbers) are delivered on the way, as they would have been.

        :raises TargetGone: the process was killed meanwhile, or one of those signals ended it.
        """
        if not self._is_taken:
            return
        _swallow(self._tracer, _any_thread(self._tracer), signal.SIGSTOP)
        self._mark(taken=False)
        for info in self._dropped:
            _queue_again(self._tracer.pid, signal.SIGCONT, info)
        self._dropped = []

    def _mark(self, *, taken: bool) -> None:
        self._is_taken = taken
        for thread in self._tracer.threads.values():
            thread.holds_sigstop = taken


def release_hold(pid: int) -> None:
    """Let a process go on whose hold has outlived its agent; nothing happens to one that is not stopped.

    :raises TargetGone: it is gone. :raises FreezeError: somebody else traces it.
    """
    try:
        if read_state(pid) != "T":
            return
        with Tracer(pid) as tracer:
            tracer.stop_all()
            _end_group_stop(tracer)
    except (FileNotFoundError, ProcessLookupError) as err:
        raise TargetGone(f"Process {pid} is gone") from err


def _end_group_stop(tracer: Tracer) -> None:
    # The threads stay stopped by ptrace, and no handler will run.
    thread = _any_thread(tracer)
    os.kill(tracer.pid, signal.SIGCONT)
    blocked = thread.sigmask & _bit(signal.SIGCONT)
    if blocked:
        # A call with a mask of its own loses it here: it is made again.
        regs = restart.resuming_regs(thread.regs)
        if regs is not thread.regs:
            thread.change_regs(regs)
        mask = thread.sigmask
        ptrace.setsigmask(thread.tid, ~_bit(signal.SIGCONT) & _ALL_SIGNALS)
    _swallow(tracer, thread, signal.SIGCONT)
    if blocked:
        ptrace.setsigmask(thread.tid, mask)


def _any_thread(tracer: Tracer) -> TracedThread:
    return tracer.threads.get(tracer.pid) or next(iter(tracer.threads.values()))


def _swallow(tracer: Tracer, thread: TracedThread, sig: int) -> None:
    # No other thread runs, so this one comes to the queued signal without running an instruction, unless somebody
    # has taken the signal back (SIGCONT and SIGSTOP do that to each other): then it runs, and is stopped again.
    while True:
        tracer.before_release(thread)
        delivered = thread.pending_stop_signal
        thread.forget()
        thread.stopped = False
        ptrace.cont(thread.tid, delivered)
        taken = _wait_signal(tracer, thread, sig)
        if taken == sig:
            thread.pending_stop_signal = 0
        if taken in (0, sig):
            return
        thread.pending_stop_signal = taken


def _wait_signal(tracer: Tracer, thread: TracedThread, sig: int) -> int:
    """Wait for the stop at a queued signal and return it; 0, the thread being stopped, if ``sig`` was taken back.

    On a busy host the thread may wait long for a CPU.
    """
    deadline = time.monotonic() + _SWALLOW_PATIENCE_S
    while True:
        try:
            stop = tracer.wait_stop(thread, _SWALLOW_S)
        except FreezeError:
            if read_signal_sets(tracer.pid, tracer.pid).shd_pnd & _bit(sig) and time.monotonic() < deadline:
                continue
            ptrace.interrupt(thread.tid)
            stop = tracer.wait_stopped(thread)
            return stop.sig if stop.kind is StopKind.SIGNAL else 0
        if stop.kind is StopKind.SIGNAL:
            return stop.sig
        tracer.before_release(thread)
        thread.forget()
        thread.stopped = False
        ptrace.cont(thread.tid, 0)


def _queue_again(pid: int, sig: int, info: bytes) -> None:
    buffer = ctypes.create_string_buffer(info, len(info))
    try:
        syscall(NR_rt_sigqueueinfo, pid, sig, ctypes.addressof(buffer))
    except PermissionError:
        # Only a process itself may claim that the kernel or kill(2) was the sender: then we are.
        os.kill(pid, sig)


def _bit(sig: int) -> int:
    return 1 << (sig - 1)
