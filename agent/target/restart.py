"""Interrupted system calls: how a thread that was stopped in one goes on, here or on another host.

Stopping a thread interrupts the call it sleeps in. What the kernel left in rax says what comes next:

    -512 ERESTARTSYS, -513 ERESTARTNOINTR, -514 ERESTARTNOHAND   the kernel makes the call again
    -516 ERESTART_RESTARTBLOCK   it makes restart_syscall, which knows the absolute end of the sleep
    -4 EINTR from a few calls (signal(7): epoll_wait, semtimedop, sigtimedwait, sockets with a timeout...): a mere stop
        shows in the program; hide_eintr() has the call made again

Time limits. A time limit in a register (epoll_wait, poll) is reduced to what remains. One in memory (semtimedop,
rt_sigtimedwait, epoll_pwait2) or in the socket cannot be: that call gets its full time again, unless the time is over.
How long a sleeper has slept is known from the scheduler: se.exec_start of a sleeping thread is when it fell asleep, in
a clock of its CPU that is compared with CLOCK_MONOTONIC on that CPU, and every doubt is settled in the direction of a
longer sleep: a program is never woken early.

- The scheduler's clock leaves out interrupt and steal time: the difference to CLOCK_MONOTONIC only grows, so that one
  measured later puts the start of the sleep later.
- CLOCK_MONOTONIC is slewed by NTP (up to 500 ppm): that much of the time slept is not counted.
- A thread that woke and slept again between the sample and the stop would seem to have slept too long: the count of its
  voluntary context switches tells, and the sample is not used.

A thread let go with a restart block shows as being in restart_syscall, whatever it was. The agent that let it go knows
and leaves a hint (agent.restart_hints); else the kernel function that it sleeps in tells, and the instructions before
the call, and its end comes late rather than early.

Times are nanoseconds of CLOCK_MONOTONIC. Addresses are target addresses. Sources: signal(7), kernel/signal.c,
kernel/time/hrtimer.c, fs/select.c, kernel/futex/waitwake.c, kernel/sched/fair.c.
"""

from __future__ import annotations

import errno
import logging
import signal
import struct
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from agent.kernel import ptrace
from agent.kernel import syscalls as nr
from agent.kernel.arch import SYSCALL_ARGUMENTS, user_regs_struct
from agent.procfs.status import (
    SignalSets,
    parse_signal_sets,
    parse_voluntary_switches,
    read_task_status_text,
    read_voluntary_switches,
)
from agent.procfs.syscall import read_syscall
from agent.target.blocking import (
    EINTR_CALLS,
    MASK_ARGUMENT,
    MILLISECONDS_ARGUMENT,
    REMAINDER_ARGUMENT,
    RESTART_BLOCK_CALLS,
    TIMEOUT_RESULT,
    TIMESPEC_ARGUMENT,
    has_limit,
    has_time_limit,
    signed_int,
)
from agent.target.sleepers import SleepSample
from protocol.state.restart import RestartState

if TYPE_CHECKING:
    from agent.target.inject_skeleton import SkeletonInjector
    from agent.target.memory import TargetMemory
    from agent.target.traced import TracedThread
    from agent.target.tracer import Tracer

log = logging.getLogger(__name__)

# include/linux/errno.h
ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516
_CALL_AGAIN: Final = (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND)

_U64: Final = (1 << 64) - 1
_SYSCALL_BYTES: Final = 2
_DEFAULT_IGNORED: Final = sum(
    1 << (sig - 1) for sig in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
)
_SLEW_DIVISOR: Final = 2000
"""1/500 ppm: how much faster than CLOCK_MONOTONIC another clock may run."""
_SLACK_NS: Final = 100_000


class KnownCall(NamedTuple):
    """What a call was before the kernel turned it into restart_syscall, which shows only as that from then on.

    agent.restart_hints keeps these for a later agent.
    """

    nr: int
    args: tuple[int, ...]
    rip: int
    rsp: int
    deadline_ns: int | None


_known: dict[tuple[int, int], KnownCall] = {}
"""By pid and tid, as the agent sees them."""


def learn_calls(pid: int, calls: Mapping[int, KnownCall]) -> None:
    """Take over, by tid, what threads in restart_syscall were interrupted in before."""
    _known.update(((pid, tid), call) for tid, call in calls.items())


def take_calls(pid: int) -> dict[int, KnownCall]:
    """Return, by tid, what learn_calls() should be told when the process is stopped again, and forget it."""
    return {tid: _known.pop((owner, tid)) for owner, tid in list(_known) if owner == pid}


def sleep_number(pid: int, tid: int, call: KnownCall) -> int | None:
    """Return which of its sleeps a thread is in, counted since it began; None when it is not asleep in ``call``.

    Only when the kernel goes on with it in restart_syscall: the same number later means the very same sleep.
    """
    try:
        switches = read_voluntary_switches(pid, tid)
        info = read_syscall(pid, tid)
        if info is None or info != (nr.NR_restart_syscall, call.args, call.rsp, call.rip):
            return None
        return switches if read_voluntary_switches(pid, tid) == switches else None
    except OSError:
        return None


# -- registers to go on with ------------------------------------------------------------------------------------------


def in_syscall(regs: user_regs_struct) -> bool:
    """Tell whether the registers are those of a system call on its way out."""
    return regs.orig_rax < 1 << 63


def is_made_again(regs: user_regs_struct) -> bool:
    """Tell whether the registers are those of a call that the kernel makes again when the thread is let go."""
    return in_syscall(regs) and regs.result in (*_CALL_AGAIN, -ERESTART_RESTARTBLOCK)


def _rewound(regs: user_regs_struct, number: int) -> user_regs_struct:
    again = regs.copy()
    again.rax = number
    again.rip = regs.rip - _SYSCALL_BYTES
    again.orig_rax = _U64
    return again


def healing_regs(regs: user_regs_struct) -> user_regs_struct:
    """Return what a thread must have when it goes on in user mode without the kernel's help to restart its call."""
    if not in_syscall(regs):
        return regs
    if regs.result in _CALL_AGAIN:
        return _rewound(regs, regs.orig_rax)
    if regs.result == -ERESTART_RESTARTBLOCK:
        return _rewound(regs, nr.NR_restart_syscall)
    return regs


def resuming_regs(regs: user_regs_struct) -> user_regs_struct:
    """Return the registers for a stopped thread whose signal mask was changed and put back.

    Exactly ``regs`` in general, so that the kernel decides about the restart when it knows what signals there are. A
    call with a mask of its own (sigsuspend, ppoll...) lost that mask: it is made again, which sets it again.
    """
    if not in_syscall(regs) or not _uses_own_mask(regs):
        return regs
    if regs.result in _CALL_AGAIN or regs.result == -errno.EINTR:
        return _rewound(regs, regs.orig_rax)
    return regs


def _uses_own_mask(regs: user_regs_struct) -> bool:
    argument = MASK_ARGUMENT.get(regs.orig_rax)
    return argument is not None and getattr(regs, SYSCALL_ARGUMENTS[argument]) != 0


def leave_rseq_section(thread: TracedThread, memory: TargetMemory) -> None:
    """Abort a restartable sequence the thread was stopped in, as the kernel does on every preemption.

    The kernel would otherwise take the routine's instructions for the end of the sequence, and the thread would finish
    it in spite of having been preempted.
    """
    regs = thread.regs
    if in_syscall(regs):
        return  # no system calls inside a sequence
    config = thread.rseq
    if config is None:
        return
    descriptor = memory.read_u64(config.addr + 8)
    if not descriptor:
        return
    start, length, abort = struct.unpack("<8x3Q", memory.read(descriptor, 32))
    if 0 <= regs.rip - start < length:
        memory.write(config.addr + 8, bytes(8))
        aborted = regs.copy()
        aborted.rip = abort
        thread.change_regs(aborted)


# -- EINTR ------------------------------------------------------------------------------------------------------------


def hide_eintr(thread: TracedThread) -> bool:
    """Have a call made again that returns EINTR for no other reason than our stop; tell whether that was so.

    Changes ``thread.regs``. A signal that is about to be delivered is a real reason.
    """
    regs = thread.regs
    if not in_syscall(regs) or regs.result != -errno.EINTR or regs.orig_rax not in EINTR_CALLS:
        return False
    if thread.pending_stop_signal:
        return False
    status = read_task_status_text(thread.pid, thread.tid)
    if _deliverable(thread, parse_signal_sets(status)):
        return False
    again = _rewound(regs, regs.orig_rax)
    request = _register_limit_ns(regs)
    remaining = remaining_ns(thread, request, status)
    if remaining == 0 and regs.orig_rax in TIMEOUT_RESULT:
        again = regs.copy()
        again.rax = TIMEOUT_RESULT[regs.orig_rax] & _U64
        again.orig_rax = _U64
    elif request is not None and remaining is not None:
        register = SYSCALL_ARGUMENTS[MILLISECONDS_ARGUMENT[regs.orig_rax]]
        setattr(again, register, -(-remaining // 1_000_000))
    thread.change_regs(again)
    return True


def _deliverable(thread: TracedThread, sets: SignalSets) -> int:
    pending = (sets.sig_pnd | sets.shd_pnd) & ~sets.sig_blk
    if thread.holds_sigstop:
        pending &= ~(1 << (signal.SIGSTOP - 1))
    return pending & ~sets.sig_ign & ~(_DEFAULT_IGNORED & ~sets.sig_cgt)


def _register_limit_ns(regs: user_regs_struct) -> int | None:
    argument = MILLISECONDS_ARGUMENT.get(regs.orig_rax)
    if argument is None:
        return None
    value = signed_int(getattr(regs, SYSCALL_ARGUMENTS[argument]))
    return value * 1_000_000 if value > 0 else None


# -- what remains ------------------------------------------------------------------------------------------------------


def remaining_ns(thread: TracedThread, request_ns: int | None, status: bytes | None = None) -> int | None:
    """Return how much of a relative time limit is left now: at least what really is, at most all of it.

    None: there is no limit (``request_ns`` is None). ``status``: what /proc says of the stopped thread, if it is known.
    """
    if request_ns is None:
        return None
    sample = thread.sample
    if sample is None or sample.asleep_since_ns is None or not _matches(sample, thread, status):
        return request_ns
    slept = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - sample.asleep_since_ns
    slept -= slept // _SLEW_DIVISOR + _SLACK_NS
    return min(max(request_ns - max(slept, 0), 0), request_ns)


def _matches(sample: SleepSample, thread: TracedThread, status: bytes | None = None) -> bool:
    regs = thread.regs
    if regs.orig_rax not in (sample.nr, nr.NR_restart_syscall) or sample.args != arguments(regs):
        return False
    # Our stop is the one switch since the sample.
    if status is None:
        status = read_task_status_text(thread.pid, thread.tid)
    return parse_voluntary_switches(status) == sample.voluntary_switches + 1


def arguments(regs: user_regs_struct) -> tuple[int, ...]:
    """Return the six arguments of the call that the registers are those of."""
    return tuple(getattr(regs, name) for name in SYSCALL_ARGUMENTS)


def read_timespec_ns(memory: TargetMemory, vaddr: int) -> int:
    """Return the nanoseconds in a struct timespec of the target.

    :raises OSError: there is none at ``vaddr``.
    """
    seconds, nanoseconds = struct.unpack("<qq", memory.read(vaddr, 16))
    total: int = seconds * 1_000_000_000 + nanoseconds
    return total


# -- moving to another host -------------------------------------------------------------------------------------------


def dump_restart(
    thread: TracedThread, memory: TargetMemory
) -> tuple[user_regs_struct, RestartState | None]:
    """Return the registers to restore on another host, and the restart block to build there (None: no need).

    To be called before the thread's registers are read otherwise. A call with an absolute limit needs no restart
    block: its registers say everything, and it is simply made again.
    """
    settle(thread, memory)
    regs = thread.regs
    if not in_syscall(regs) or regs.result != -ERESTART_RESTARTBLOCK:
        return resuming_regs(regs), None
    call = _identify(thread, memory)
    moved = regs.copy()
    if call is None:
        # EINTR is the one honest answer: what the call was cannot be found out.
        log.warning("thread %d: unknown call in restart_syscall will return EINTR", thread.tid)
        moved.rax, moved.orig_rax = -errno.EINTR & _U64, _U64
        return moved, None
    moved.orig_rax = call.nr
    if not has_limit(call.nr, call.args):
        moved.rax = -ERESTARTNOHAND & _U64
        return moved, None
    remaining = _restart_remaining_ns(thread, memory, call)
    return moved, RestartState(nr=call.nr, args=call.args, remaining_ns=remaining)


def settle(thread: TracedThread, memory: TargetMemory) -> None:
    """Find out, once per stop and before the thread runs anything else, what its interrupted call is and needs.

    EINTR of our making is hidden. Of a call with a restart block it is noted what it is and when it ends: once let go
    it shows as restart_syscall only, should it be stopped again.
    """
    if thread.settled:
        return
    thread.settled = True
    hide_eintr(thread)
    regs = thread.regs
    if not in_syscall(regs) or regs.result != -ERESTART_RESTARTBLOCK:
        _known.pop((thread.pid, thread.tid), None)
        return
    if regs.orig_rax == nr.NR_restart_syscall:
        return
    call = KnownCall(regs.orig_rax, arguments(regs), regs.rip, regs.rsp, None)
    if has_time_limit(call.nr, call.args):
        remaining = _restart_remaining_ns(thread, memory, call)
        deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + remaining
        call = call._replace(deadline_ns=deadline)
    _known[thread.pid, thread.tid] = call


def _identify(thread: TracedThread, memory: TargetMemory) -> KnownCall | None:
    regs = thread.regs
    args = arguments(regs)
    known = _known.get((thread.pid, thread.tid))
    if known is not None and known[1:4] == (args, regs.rip, regs.rsp):
        return known
    if regs.orig_rax in RESTART_BLOCK_CALLS:
        return KnownCall(regs.orig_rax, args, regs.rip, regs.rsp, None)
    # Stopped before by somebody else, or by an agent that could not leave a hint.
    sample = thread.sample
    if sample is not None and _matches(sample, thread):
        return KnownCall(sample.nr, args, regs.rip, regs.rsp, None)
    # Most code loads the number right before the instruction: mov eax, imm32.
    try:
        code = memory.read(regs.rip - 32, 32)
    except OSError:
        return None
    at = code.rfind(b"\xb8")
    while at >= 0:
        number = int.from_bytes(code[at + 1 : at + 5], "little")
        if number in RESTART_BLOCK_CALLS and at + 5 <= len(code) - _SYSCALL_BYTES:
            return KnownCall(number, args, regs.rip, regs.rsp, None)
        at = code.rfind(b"\xb8", 0, at)
    return None


def _restart_remaining_ns(thread: TracedThread, memory: TargetMemory, call: KnownCall) -> int:
    if call.deadline_ns is not None:
        return max(call.deadline_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC), 0)
    # The kernel has just written what remains where the program asked for it.
    argument = REMAINDER_ARGUMENT.get(call.nr)
    if argument is not None and call.args[argument]:
        try:
            return max(read_timespec_ns(memory, call.args[argument]), 0)
        except OSError:
            log.debug("thread %d: remainder at %#x unreadable", thread.tid, call.args[argument])
    if call.nr in MILLISECONDS_ARGUMENT:
        request = max(signed_int(call.args[MILLISECONDS_ARGUMENT[call.nr]]), 0) * 1_000_000
    else:
        request = read_timespec_ns(memory, call.args[TIMESPEC_ARGUMENT[call.nr]])
    remaining = remaining_ns(thread, request)
    return request if remaining is None else remaining


def rearm_restart_block(
    tracer: Tracer, injector: SkeletonInjector, thread: TracedThread, state: RestartState
) -> int:
    """Have the kernel build the restart block of ``state`` in a restored, stopped thread of a skeleton.

    The call is really made, with the remaining time, but with an interrupt waiting: it returns before it sleeps.
    Memory and files must be in place; afterwards nothing may be injected into this thread: set its registers.
    Returns what to do with them: -516, they stay as dumped (rax -516); anything else is the call's result, for rax,
    and orig_rax must be -1 (see apply_restart()).
    """
    args = list(state.args)
    if state.nr in MILLISECONDS_ARGUMENT:
        milliseconds = -(-state.remaining_ns // 1_000_000)
        args[MILLISECONDS_ARGUMENT[state.nr]] = min(milliseconds, 0x7FFFFFFF)
    else:
        limit = struct.pack("<qq", *divmod(state.remaining_ns, 1_000_000_000))
        args[TIMESPEC_ARGUMENT[state.nr]] = injector.place(thread, limit)
    before = ptrace.getsigmask(thread.tid)
    try:
        return injector.interrupted_syscall(thread, state.nr, *args)
    finally:
        ptrace.setsigmask(thread.tid, before)


def note_restart(thread: TracedThread, regs: user_regs_struct, state: RestartState) -> None:
    """Note what a restored thread with a restart block was interrupted in; it goes on with ``regs``."""
    deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + state.remaining_ns
    call = KnownCall(state.nr, arguments(regs), regs.rip, regs.rsp, deadline)
    _known[thread.pid, thread.tid] = call


def apply_restart(regs: user_regs_struct, result: int) -> user_regs_struct:
    """Return dumped registers as they must be restored after rearm_restart_block() returned ``result``."""
    if result == -ERESTART_RESTARTBLOCK:
        return regs
    final = regs.copy()
    final.rax, final.orig_rax = result & _U64, _U64
    return final
