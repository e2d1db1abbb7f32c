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
import os
import re
import signal
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from agent.kernel import ptrace
from agent.kernel import syscalls as nr
from agent.kernel.arch import SYSCALL_ARGUMENTS, user_regs_struct
from agent.procfs.files import read_text
from agent.procfs.process import list_tids
from agent.procfs.sched import parse_sched
from agent.procfs.stat import read_task_stat
from agent.procfs.status import read_task_status
from agent.procfs.syscall import read_syscall
from protocol.state.restart import RestartState

if TYPE_CHECKING:
    from agent.target.inject import Injector
    from agent.target.memory import TargetMemory
    from agent.target.tracer import TracedThread, Tracer

log = logging.getLogger(__name__)

# include/linux/errno.h
ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516
_CALL_AGAIN: Final = (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND)

_U64: Final = (1 << 64) - 1
_SYSCALL_BYTES: Final = 2
_TIMER_ABSTIME: Final = 1
_FUTEX_CMD_MASK: Final = 127
_FUTEX_WAIT: Final = 0

_EINTR_CALLS: Final = frozenset(
    (
        nr.NR_accept, nr.NR_accept4, nr.NR_connect, nr.NR_epoll_pwait, nr.NR_epoll_pwait2, nr.NR_epoll_wait,
        nr.NR_io_getevents, nr.NR_io_pgetevents, nr.NR_read, nr.NR_readv, nr.NR_recvfrom, nr.NR_recvmmsg,
        nr.NR_recvmsg, nr.NR_rt_sigtimedwait, nr.NR_semop, nr.NR_semtimedop, nr.NR_sendmmsg, nr.NR_sendmsg,
        nr.NR_sendto, nr.NR_write, nr.NR_writev,
    )
)  # fmt: skip
"""Calls that may return EINTR after a stop and that did nothing when they do, so that calling again is right."""

_EINTR_PRONE: Final = _EINTR_CALLS - {nr.NR_read, nr.NR_readv, nr.NR_write, nr.NR_writev}
_RESTARTS_WELL: Final = frozenset(
    (nr.NR_futex, nr.NR_read, nr.NR_readv, nr.NR_wait4, nr.NR_waitid, nr.NR_nanosleep, nr.NR_clock_nanosleep)
)
_MASK_ARGUMENT: Final = {
    nr.NR_epoll_pwait: 4,
    nr.NR_epoll_pwait2: 4,
    nr.NR_io_pgetevents: 5,
    nr.NR_ppoll: 3,
    nr.NR_pselect6: 5,
    nr.NR_rt_sigsuspend: 0,
}
"""Calls that swap the signal mask while they sleep: which argument points to the other mask."""

_MILLISECONDS_ARGUMENT: Final = {nr.NR_epoll_wait: 3, nr.NR_epoll_pwait: 3, nr.NR_poll: 2}
_TIMESPEC_ARGUMENT: Final = {
    nr.NR_nanosleep: 0,
    nr.NR_clock_nanosleep: 2,
    nr.NR_futex: 3,
    nr.NR_semtimedop: 3,
    nr.NR_rt_sigtimedwait: 2,
    nr.NR_epoll_pwait2: 3,
}
_TIMEOUT_RESULT: Final = {
    nr.NR_epoll_wait: 0,
    nr.NR_epoll_pwait: 0,
    nr.NR_epoll_pwait2: 0,
    nr.NR_semtimedop: -errno.EAGAIN,
    nr.NR_rt_sigtimedwait: -errno.EAGAIN,
}
_REMAINDER_ARGUMENT: Final = {nr.NR_nanosleep: 1, nr.NR_clock_nanosleep: 3}
_RESTART_BLOCK_CALLS: Final = (nr.NR_nanosleep, nr.NR_clock_nanosleep, nr.NR_poll, nr.NR_futex)
_SAMPLED: Final = frozenset((*_MILLISECONDS_ARGUMENT, *_TIMESPEC_ARGUMENT))

_DEFAULT_IGNORED: Final = sum(
    1 << (sig - 1) for sig in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
)
_SLEW_DIVISOR: Final = 2000
"""1/500 ppm: how much faster than CLOCK_MONOTONIC another clock may run."""
_SLACK_NS: Final = 100_000
_LOWEST_ADDRESS: Final = 4096
"""No pointer is below, and above no clock number but the negative ones of CPU clocks."""
_CPU_CLOCKS: Final = (time.CLOCK_PROCESS_CPUTIME_ID, time.CLOCK_THREAD_CPUTIME_ID)
_VOLUNTARY_SWITCHES: Final = re.compile(rb"^voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)


class SleepSample(NamedTuple):
    """A thread seen asleep in a system call, before it was interrupted."""

    nr: int
    """The call; in place of restart_syscall the one that it goes on with."""
    args: tuple[int, ...]
    asleep_since_ns: int | None
    """Not earlier than it fell asleep; None where the kernel does not tell."""
    voluntary_switches: int


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


# -- samples ----------------------------------------------------------------------------------------------------------


def sample_sleepers(pid: int) -> tuple[dict[int, SleepSample], set[int]]:
    """Return, by tid, what threads with a time limit sleep in; to be called right before they are interrupted.

    Also the tids of those whose call will most likely return EINTR when they are: see hide_eintr().
    """
    delicate: set[int] = set()
    try:
        tids = list_tids(pid)
    except OSError:
        return {}, delicate
    return _sample(pid, tids, delicate), delicate


def sample_sleeper(pid: int, tid: int) -> SleepSample | None:
    """Return what one thread sleeps in, or None when it runs or when how long it has slept does not matter."""
    return _sample(pid, [tid], set()).get(tid)


def _sample(pid: int, tids: Sequence[int], delicate: set[int]) -> dict[int, SleepSample]:
    samples = {}
    starts = {}
    for tid in tids:
        try:
            call = read_syscall(pid, tid)
            if call is None:
                continue
            if call.nr in _EINTR_PRONE:
                delicate.add(int(tid))
            if call.nr == nr.NR_restart_syscall:
                switches = _voluntary_switches(pid, tid)
                number = guess_restarted(read_text(f"/proc/{pid}/task/{tid}/wchan"), call.args)
                if number is not None:
                    samples[int(tid)] = SleepSample(number, call.args, None, switches)
                continue
            if call.nr not in _SAMPLED or not _has_limit(call.nr, call.args):
                continue
            switches = _voluntary_switches(pid, tid)
            samples[int(tid)] = SleepSample(call.nr, call.args, None, switches)
            exec_start = _exec_start_ns(f"/proc/{pid}/task/{tid}/sched")
            if exec_start is not None:
                starts[int(tid)] = (read_task_stat(pid, tid).processor, exec_start)
        except OSError:
            continue  # died, or not ours to look at
    # The difference of the clocks is measured after all sleeps have begun: it only grows.
    offsets = _clock_offsets_ns({cpu for cpu, _ in starts.values()})
    for tid, (cpu, exec_start) in starts.items():
        if cpu in offsets:
            samples[tid] = samples[tid]._replace(asleep_since_ns=exec_start + offsets[cpu])
    return samples


def guess_restarted(wchan: str, args: tuple[int, ...]) -> int | None:
    """Tell which call a thread in restart_syscall has made, from the kernel function it sleeps in."""
    if "futex" in wchan:
        return nr.NR_futex
    if "poll" in wchan:
        return nr.NR_poll
    # The sleep proper does not count as a function to sleep in: what shows may be its caller's caller.
    if any(part in wchan for part in ("sleep", "restart_syscall", "do_syscall_64")):
        is_clock = args[0] < _LOWEST_ADDRESS or "cpu" in wchan
        return nr.NR_clock_nanosleep if is_clock else nr.NR_nanosleep
    return None


def _has_limit(number: int, args: tuple[int, ...]) -> bool:
    if number in _MILLISECONDS_ARGUMENT:
        return _signed_int(args[_MILLISECONDS_ARGUMENT[number]]) > 0
    if number == nr.NR_clock_nanosleep:
        # Nobody knows when a sleep by CPU time ends: it begins anew.
        clock = _signed_int(args[0])
        if args[1] & _TIMER_ABSTIME or clock < 0 or clock in _CPU_CLOCKS:
            return False
    if number == nr.NR_futex and args[1] & _FUTEX_CMD_MASK != _FUTEX_WAIT:
        return False
    return args[_TIMESPEC_ARGUMENT[number]] != 0


def _voluntary_switches(pid: int, tid: int) -> int:
    with open(f"/proc/{pid}/task/{tid}/status", "rb", buffering=0) as file:
        match = _VOLUNTARY_SWITCHES.search(file.read(8192))
    return int(match.group(1)) if match else -1


def _exec_start_ns(path: str) -> int | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return parse_sched(file.read(16384)).get("se.exec_start")
    except FileNotFoundError:
        return None  # kernel without CONFIG_SCHED_DEBUG


def _clock_offsets_ns(cpus: Iterable[int]) -> dict[int, int]:
    """Return CLOCK_MONOTONIC minus the scheduler's clock of each CPU, rather too much than too little.

    Measured by going there: a thread that was just put on a CPU has that CPU's clock in its own se.exec_start.
    """
    offsets: dict[int, int] = {}
    if not cpus:
        return offsets
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError:
                continue  # outside our cpuset
            os.sched_yield()
            exec_start = _exec_start_ns("/proc/thread-self/sched")
            # Later than exec_start was taken: the offset comes out too big, the sleep too young.
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            if exec_start is not None:
                offsets[cpu] = now_ns - exec_start
    finally:
        os.sched_setaffinity(0, allowed)
    return offsets


def sleep_number(pid: int, tid: int, call: KnownCall) -> int | None:
    """Return which of its sleeps a thread is in, counted since it began; None when it is not asleep in ``call``.

    Only when the kernel goes on with it in restart_syscall: the same number later means the very same sleep.
    """
    try:
        switches = _voluntary_switches(pid, tid)
        info = read_syscall(pid, tid)
        if info is None or info != (nr.NR_restart_syscall, call.args, call.rsp, call.rip):
            return None
        return switches if _voluntary_switches(pid, tid) == switches else None
    except OSError:
        return None


def disturbance(pid: int, tid: int) -> int | None:
    """Return how much a stop would disturb a thread: 0 not at all .. 4; None for one that cannot be stopped."""
    try:
        state = read_task_stat(pid, tid).state
        if state in "ZXD":
            return None
        call = read_syscall(pid, tid)
    except OSError:
        return None
    if call is None:
        return 2  # runs: loses some microseconds
    if call.nr in _RESTARTS_WELL:
        return 0 if not _has_time_limit(call.nr, call.args) else 1
    if call.nr == nr.NR_restart_syscall:
        return 1
    return 4 if call.nr in _EINTR_PRONE else 3


def _has_time_limit(number: int, args: tuple[int, ...]) -> bool:
    return number in _SAMPLED and _has_limit(number, args)


# -- registers to go on with ------------------------------------------------------------------------------------------


def in_syscall(regs: user_regs_struct) -> bool:
    """Tell whether the registers are those of a system call on its way out."""
    return regs.orig_rax < 1 << 63


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
    argument = _MASK_ARGUMENT.get(regs.orig_rax)
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
    if not in_syscall(regs) or regs.result != -errno.EINTR or regs.orig_rax not in _EINTR_CALLS:
        return False
    if thread.pending_stop_signal or _deliverable(thread):
        return False
    again = _rewound(regs, regs.orig_rax)
    request = _register_limit_ns(regs)
    remaining = remaining_ns(thread, request)
    if remaining == 0 and regs.orig_rax in _TIMEOUT_RESULT:
        again = regs.copy()
        again.rax = _TIMEOUT_RESULT[regs.orig_rax] & _U64
        again.orig_rax = _U64
    elif request is not None and remaining is not None:
        register = SYSCALL_ARGUMENTS[_MILLISECONDS_ARGUMENT[regs.orig_rax]]
        setattr(again, register, -(-remaining // 1_000_000))
    thread.change_regs(again)
    return True


def _deliverable(thread: TracedThread) -> int:
    status = read_task_status(thread.pid, thread.tid)
    pending = (status.sig_pnd | status.shd_pnd) & ~status.sig_blk
    if thread.holds_sigstop:
        pending &= ~(1 << (signal.SIGSTOP - 1))
    return pending & ~status.sig_ign & ~(_DEFAULT_IGNORED & ~status.sig_cgt)


def _register_limit_ns(regs: user_regs_struct) -> int | None:
    argument = _MILLISECONDS_ARGUMENT.get(regs.orig_rax)
    if argument is None:
        return None
    value = _signed_int(getattr(regs, SYSCALL_ARGUMENTS[argument]))
    return value * 1_000_000 if value > 0 else None


# -- what remains ------------------------------------------------------------------------------------------------------


def remaining_ns(thread: TracedThread, request_ns: int | None) -> int | None:
    """Return how much of a relative time limit is left now: at least what really is, at most all of it.

    None: there is no limit (``request_ns`` is None).
    """
    if request_ns is None:
        return None
    sample = thread.sample
    if sample is None or sample.asleep_since_ns is None or not _matches(sample, thread):
        return request_ns
    slept = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - sample.asleep_since_ns
    slept -= slept // _SLEW_DIVISOR + _SLACK_NS
    return min(max(request_ns - max(slept, 0), 0), request_ns)


def _matches(sample: SleepSample, thread: TracedThread) -> bool:
    regs = thread.regs
    if regs.orig_rax not in (sample.nr, nr.NR_restart_syscall) or sample.args != _arguments(regs):
        return False
    # Our stop is the one switch since the sample.
    return _voluntary_switches(thread.pid, thread.tid) == sample.voluntary_switches + 1


def _arguments(regs: user_regs_struct) -> tuple[int, ...]:
    return tuple(getattr(regs, name) for name in SYSCALL_ARGUMENTS)


def _signed_int(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _timespec_ns(memory: TargetMemory, vaddr: int) -> int:
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
    if not _has_limit(call.nr, call.args):
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
    call = KnownCall(regs.orig_rax, _arguments(regs), regs.rip, regs.rsp, None)
    if _has_time_limit(call.nr, call.args):
        remaining = _restart_remaining_ns(thread, memory, call)
        deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + remaining
        call = call._replace(deadline_ns=deadline)
    _known[thread.pid, thread.tid] = call


def _identify(thread: TracedThread, memory: TargetMemory) -> KnownCall | None:
    regs = thread.regs
    args = _arguments(regs)
    known = _known.get((thread.pid, thread.tid))
    if known is not None and known[1:4] == (args, regs.rip, regs.rsp):
        return known
    if regs.orig_rax in _RESTART_BLOCK_CALLS:
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
        if number in _RESTART_BLOCK_CALLS and at + 5 <= len(code) - _SYSCALL_BYTES:
            return KnownCall(number, args, regs.rip, regs.rsp, None)
        at = code.rfind(b"\xb8", 0, at)
    return None


def _restart_remaining_ns(thread: TracedThread, memory: TargetMemory, call: KnownCall) -> int:
    if call.deadline_ns is not None:
        return max(call.deadline_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC), 0)
    # The kernel has just written what remains where the program asked for it.
    argument = _REMAINDER_ARGUMENT.get(call.nr)
    if argument is not None and call.args[argument]:
        try:
            return max(_timespec_ns(memory, call.args[argument]), 0)
        except OSError:
            log.debug("thread %d: remainder at %#x unreadable", thread.tid, call.args[argument])
    if call.nr in _MILLISECONDS_ARGUMENT:
        request = max(_signed_int(call.args[_MILLISECONDS_ARGUMENT[call.nr]]), 0) * 1_000_000
    else:
        request = _timespec_ns(memory, call.args[_TIMESPEC_ARGUMENT[call.nr]])
    remaining = remaining_ns(thread, request)
    return request if remaining is None else remaining


def rearm_restart_block(
    tracer: Tracer, injector: Injector, thread: TracedThread, state: RestartState
) -> int:
    """Have the kernel build the restart block of ``state`` in a restored, stopped thread of a skeleton.

    The call is really made, with the remaining time, but with an interrupt waiting: it returns before it sleeps.
    Memory and files must be in place; afterwards nothing may be injected into this thread: set its registers.
    Returns what to do with them: -516, they stay as dumped (rax -516); anything else is the call's result, for rax,
    and orig_rax must be -1 (see apply_restart()).
    """
    args = list(state.args)
    if state.nr in _MILLISECONDS_ARGUMENT:
        milliseconds = -(-state.remaining_ns // 1_000_000)
        args[_MILLISECONDS_ARGUMENT[state.nr]] = min(milliseconds, 0x7FFFFFFF)
    else:
        limit = struct.pack("<qq", *divmod(state.remaining_ns, 1_000_000_000))
        args[_TIMESPEC_ARGUMENT[state.nr]] = injector.place(thread, limit)
    before = ptrace.getsigmask(thread.tid)
    try:
        return injector.interrupted_syscall(thread, state.nr, *args)
    finally:
        ptrace.setsigmask(thread.tid, before)


def note_restart(thread: TracedThread, regs: user_regs_struct, state: RestartState) -> None:
    """Note what a restored thread with a restart block was interrupted in; it goes on with ``regs``."""
    deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + state.remaining_ns
    call = KnownCall(state.nr, _arguments(regs), regs.rip, regs.rsp, deadline)
    _known[thread.pid, thread.tid] = call


def apply_restart(regs: user_regs_struct, result: int) -> user_regs_struct:
    """Return dumped registers as they must be restored after rearm_restart_block() returned ``result``."""
    if result == -ERESTART_RESTARTBLOCK:
        return regs
    final = regs.copy()
    final.rax, final.orig_rax = result & _U64, _U64
    return final
