"""Idle threads that are stopped ahead of all others, and sleep on: parked, they are as good as stopped.

A thread that sleeps in a call which does nothing but wait (blocking.takes_nothing()) is stopped, looked at as a
stopped thread is, and let go up to the end of that very call (PTRACE_SYSCALL, first to its entry: the kernel makes it
again). From then on it either sleeps, and is as it was seen, or has left its call and is stopped by itself before it
runs an instruction. A freeze has only to find out which. unpark() makes a stopped thread of a parked one.

What is safe about it: a tracer that dies takes the stop at the end of the call with it, so the thread just goes on. A
signal does not slip through: the call ends, the thread stops, and the signal stays in its queue.

Sources: ptrace(2), kernel/entry/common.c, kernel/signal.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from agent.errors import TargetGone
from agent.kernel import ptrace
from agent.target.blocking import takes_nothing
from agent.target.restart import arguments, is_made_again
from agent.target.traced import StopKind, TracedThread
from agent.target.tracer import Tracer


def may_park(thread: TracedThread) -> bool:
    """Tell whether a stopped thread was stopped in a call that it can be parked in."""
    regs = thread.regs
    return (
        not thread.in_group_stop
        and not thread.pending_stop_signal
        and is_made_again(regs)
        and takes_nothing(regs.orig_rax, arguments(regs))
    )


def park(tracer: Tracer, threads: Sequence[TracedThread]) -> list[TracedThread]:
    """Park stopped threads that may_park(); return those that are, the others are let go of."""
    for thread in threads:
        tracer.before_release(thread)
        thread.stopped = False
        ptrace.cont_to_syscall(thread.tid)
    parked = []
    for thread in threads:
        stop = tracer.wait_stop(thread)
        if stop.kind is StopKind.SYSCALL:
            thread.forget()
            thread.stopped = False
            thread.parked = True
            ptrace.cont_to_syscall(thread.tid)
            parked.append(thread)
            continue
        # A signal, or a group-stop, has come first.
        thread.forget()
        if stop.kind is StopKind.SIGNAL:
            thread.pending_stop_signal = stop.sig
        tracer.detach(thread)
    return parked


def interrupt_parked(tracer: Tracer) -> None:
    """Have parked threads leave their calls, and stop; there is no need to wait for it."""
    for thread in tracer.threads.values():
        if thread.parked:
            with suppress(ProcessLookupError):
                ptrace.interrupt(thread.tid)


def unpark(tracer: Tracer, threads: Sequence[TracedThread]) -> None:
    """Stop parked threads as stop_all() does others; one that has ended is forgotten."""
    for thread in threads:
        thread.parked = False
        with suppress(ProcessLookupError):
            ptrace.interrupt(thread.tid)
    for thread in threads:
        with suppress(TargetGone):
            tracer.wait_stopped(thread)
