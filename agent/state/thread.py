"""One thread: dumped by one batch of calls inside it and a few ptrace requests, restored the same
way.

What the thread itself can tell costs a fraction of a microsecond as a record of a batch; a ptrace
request costs twenty. So ptrace is used only for what nothing else knows: the extended registers,
the rseq registration, queued signals if any.

Order on the destination, inside each thread: everything that needs privileges, kernel
registrations by address, queued signals (all signals are blocked meanwhile), credentials, what a
change of credentials would reset (the parent death signal). Then by ptrace, with the thread
stopped for good: extended registers, signal mask, general registers last. Addresses are the
target's; thread ids are the process's own unless called ``host_tid``. Sources: ptrace(2),
set_robust_list(2), set_tid_address(2), prctl(2), personality(2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from agent.errors import DumpError, RestoreError
from agent.kernel import ptrace
from agent.kernel.arch.x86_64 import (
    ARCH_GET_CPUID,
    ARCH_SET_CPUID,
    NT_X86_XSTATE,
    USER_CS,
    user_regs_struct,
)
from agent.kernel.futex import ROBUST_LIST_HEAD_BYTES
from agent.kernel.prctl import (
    PR_GET_IO_FLUSHER,
    PR_GET_NAME,
    PR_GET_PDEATHSIG,
    PR_GET_SPECULATION_CTRL,
    PR_GET_TID_ADDRESS,
    PR_GET_TSC,
    PR_MCE_KILL,
    PR_MCE_KILL_GET,
    PR_MCE_KILL_SET,
    PR_SET_IO_FLUSHER,
    PR_SET_NAME,
    PR_SET_PDEATHSIG,
    PR_SET_SPECULATION_CTRL,
    PR_SET_TSC,
)
from agent.kernel.siginfo import SIGSET_BYTES
from agent.kernel.syscalls import (
    NR_arch_prctl,
    NR_get_robust_list,
    NR_gettid,
    NR_personality,
    NR_prctl,
    NR_rt_sigpending,
    NR_set_robust_list,
    NR_set_tid_address,
)
from agent.kernel.xstate import LEGACY_AND_HEADER_BYTES, XstateLayout, components_in_use
from agent.state.creds import parse_creds, restore_creds_calls, securebits_call
from agent.state.rseq import read_rseq, restore_rseq_call
from agent.state.sched import plan_sched, restore_sched_calls
from agent.state.signals import (
    ALTSTACK_BYTES,
    altstack_call,
    block_signals_call,
    pack_altstack,
    restore_altstack_call,
    restore_private_pending_calls,
    unpack_altstack,
    without_stops,
)
from agent.target.restart import (
    apply_restart,
    dump_restart,
    leave_rseq_section,
    note_restart,
    rearm_restart_block,
)
from protocol.state.thread import RseqState, ThreadState

if TYPE_CHECKING:
    from agent.target.batch import Batch, Blob
    from agent.target.inject_skeleton import SkeletonInjector
    from agent.target.memory import TargetMemory
    from agent.target.template import Copy
    from agent.target.traced import TracedThread
    from agent.target.tracer import Tracer
    from protocol.state.creds import CredState
    from protocol.state.restart import RestartState

_XCR0_OFFSET: Final = 464
_NAME_BYTES: Final = 16
_PR_TSC_ENABLE: Final = 1
_PERSONALITY_QUERY: Final = 0xFFFFFFFF
# include/uapi/linux/prctl.h: PR_SPEC_STORE_BYPASS and PR_SPEC_INDIRECT_BRANCH; whether a thread has a choice; what it
# may have chosen: PR_SPEC_DISABLE, PR_SPEC_FORCE_DISABLE, PR_SPEC_DISABLE_NOEXEC.
_SPECULATIONS: Final = (0, 1)
_PR_SPEC_PRCTL: Final = 1
_PR_SPEC_CHOSEN: Final = 4 | 8 | 16
# What differs between threads that are restored by the same calls, in one buffer, and its offsets.
_VARIABLES: Final = struct.Struct(f"=QQQ{ALTSTACK_BYTES}s{_NAME_BYTES}s")
_V_ROBUST_LIST, _V_TID_ADDRESS, _V_RSEQ, _V_ALTSTACK, _V_NAME = 0, 8, 16, 24, 24 + ALTSTACK_BYTES
VARIABLES_BYTES: Final = _VARIABLES.size
# Offsets of what the calls of a thread write, in one buffer.
_OUT: Final = struct.Struct("=QQQQii16sQIIQ")
_HEAD, _LENGTH, _TID_ADDRESS, _PENDING, _PDEATH, _TSC, _NAME, _STACK = 0, 8, 16, 24, 32, 36, 40, 56


@dataclass(frozen=True, slots=True)
class ThreadStudy:
    """What ptrace tells of a stopped thread, and how an interrupted call of it goes on elsewhere."""

    thread: TracedThread
    regs: user_regs_struct
    restart: RestartState | None
    rseq: RseqState | None
    xstate: bytes


def study_thread(thread: TracedThread, memory: TargetMemory) -> ThreadStudy:
    """Read by ptrace what only ptrace knows of a stopped thread, before anything runs in it.

    :raises DumpError: the thread runs 32-bit code, or handles its own system calls.
    """
    tid = thread.tid
    if thread.regs.cs != USER_CS:
        raise DumpError(f"Cannot dump thread {tid}: it runs in a mode with cs {thread.regs.cs:#x}")
    if ptrace.has_user_dispatch(tid):
        # Not only would it be lost: it turns calls that Ferry injects into signals.
        raise DumpError(
            f"Cannot dump thread {tid}: it uses Syscall User Dispatch",
            hint="programs run by Wine do; they cannot be moved",
        )
    leave_rseq_section(thread, memory)  # before its registers are looked at
    regs, restart = dump_restart(thread, memory)
    return ThreadStudy(thread, regs, restart, read_rseq(thread), ptrace.getregset(tid, NT_X86_XSTATE))


class ThreadCalls:
    """The calls that a thread makes to be dumped, the same in every thread, added to ``batch``."""

    def __init__(self, batch: Batch) -> None:
        out = self._out = batch.buffer(_OUT.size)
        self._own = batch.call(NR_gettid, name="gettid")
        batch.call(NR_rt_sigpending, out.at(_PENDING), SIGSET_BYTES, name="rt_sigpending")
        batch.call(NR_get_robust_list, 0, out.at(_HEAD), out.at(_LENGTH), name="get_robust_list")
        batch.call(NR_prctl, PR_GET_TID_ADDRESS, out.at(_TID_ADDRESS), name="prctl(GET_TID_ADDRESS)")
        batch.call(NR_prctl, PR_GET_PDEATHSIG, out.at(_PDEATH), name="prctl(PR_GET_PDEATHSIG)")
        batch.call(NR_prctl, PR_GET_TSC, out.at(_TSC), name="prctl(PR_GET_TSC)")
        batch.call(NR_prctl, PR_GET_NAME, out.at(_NAME), name="prctl(PR_GET_NAME)")
        self._personality = batch.call(NR_personality, _PERSONALITY_QUERY, name="personality")
        self._mce_kill = batch.call(NR_prctl, PR_MCE_KILL_GET, name="prctl(PR_MCE_KILL_GET)")
        self._cpuid = batch.call(NR_arch_prctl, ARCH_GET_CPUID, 0, name="arch_prctl", check=False)
        # Asking needs CAP_SYS_RESOURCE; who lacks it cannot have set it either.
        self._flusher = batch.call(NR_prctl, PR_GET_IO_FLUSHER, name="prctl(IO_FLUSHER)", check=False)
        self._speculation = [
            batch.call(NR_prctl, PR_GET_SPECULATION_CTRL, which, name="prctl(SPECULATION)", check=False)
            for which in _SPECULATIONS
        ]
        altstack_call(batch, out.at(_STACK))
        self._sched = plan_sched(batch)
        self._securebits = securebits_call(batch)
        self._end = batch.buffer(0)
        self._alike: dict[object, tuple[Callable[..., ThreadState], int]] = {}

    def had_pending(self, copy: Copy) -> bool:
        """Tell whether a signal was queued, for the thread or for the whole process, when it made its calls."""
        at = copy.template.offset_of(self._out) + _PENDING
        return any(copy.content[at : at + SIGSET_BYTES])

    def collect(
        self, copy: Copy, study: ThreadStudy, status: bytes, pending: tuple[bytes, ...]
    ) -> ThreadState:
        """Return the state of the thread that ran ``copy``.

        ``status`` is its status file, ``pending`` are the siginfo of the signals queued for it alone.
        """
        content, template = copy.content, copy.template
        own, *results = template.results(content)
        out_at = template.offset_of(self._out)
        out = content[out_at : out_at + _OUT.size]
        head, length, tid_address, _, pdeath, tsc, name, *stack = _OUT.unpack(out)
        # Threads are mostly alike: what they say is looked at once.
        key = (tuple(results), content[out_at + _OUT.size : template.offset_of(self._end)])
        alike = self._alike.get(key)
        if alike is None:
            copy.load()
            alike = self._alike[key] = self._what_is_alike()
        make, securebits = alike
        return make(
            tid=own,
            name=name.partition(b"\0")[0],
            regs=bytes(study.regs),
            restart=study.restart,
            xstate=study.xstate,
            sigmask=study.thread.sigmask,
            altstack=unpack_altstack(*stack),
            pending=pending,
            robust_list_head=head,
            robust_list_length=length,
            clear_child_tid=tid_address,
            rseq=study.rseq,
            pdeath_signal=pdeath,
            tsc_mode=tsc,
            creds=parse_creds(status, securebits),
        )

    def _what_is_alike(self) -> tuple[Callable[..., ThreadState], int]:
        """Return what the batch shows now and what many threads have in common; and the securebits."""
        make = partial(
            ThreadState,
            personality=self._personality.value,
            mce_kill=self._mce_kill.value,
            cpuid_enabled=self._cpuid.result != 0,
            io_flusher=self._flusher.result == 1,
            sched=self._sched(),
            speculation=(_chosen(self._speculation[0].result), _chosen(self._speculation[1].result)),
        )
        return make, self._securebits.value


def _chosen(control: int) -> int:
    return control & _PR_SPEC_CHOSEN if control > 0 and control & _PR_SPEC_PRCTL else 0


def peek_private_pending(thread: TracedThread, *, queued: bool) -> tuple[bytes, ...]:
    """Return the siginfo of the signals for a stopped thread alone; nothing is taken from a queue.

    First the one that the stop found already taken from its queue; then, if ``queued``, those in
    the thread's own.
    """
    infos = list(thread.pending_siginfo)
    if queued:
        infos += ptrace.peeksiginfo(thread.tid, shared=False)
    return without_stops(infos)


def peek_shared_pending(host_tid: int) -> tuple[bytes, ...]:
    """Return the siginfo of the signals queued for the whole process of a stopped thread."""
    return without_stops(ptrace.peeksiginfo(host_tid, shared=True))


def pack_variables(state: ThreadState) -> bytes:
    """Return the VARIABLES_BYTES in which alike threads differ, for restore_thread_calls()."""
    return _VARIABLES.pack(
        state.robust_list_head,
        state.clear_child_tid,
        state.rseq.addr if state.rseq else 0,
        pack_altstack(state.altstack),
        state.name,
    )


def likeness(state: ThreadState) -> tuple[object, ...]:
    """Return what decides which calls restore a thread, all but its pack_variables(): equal for alike threads.

    What is equal is one object in general, by ThreadsState; if it is not, they are laid out once more.
    """
    rseq = state.rseq
    return (
        state.personality,
        id(state.sched),
        state.mce_kill,
        state.io_flusher,
        state.tsc_mode,
        state.speculation,
        state.cpuid_enabled,
        state.robust_list_length,
        rseq and (rseq.size, rseq.sig, rseq.flags),
        state.pending and (state.pending, state.tid),
        id(state.creds),
        state.pdeath_signal,
    )


def restore_thread_calls(
    batch: Batch,
    state: ThreadState,
    variables: Blob,
    pid: int,
    now: CredState,
    *,
    keep_pdeath_signal: bool,
    with_policy: bool = True,
) -> None:
    """Add the calls that restore ``state`` to the batch of the thread itself, credentials last.

    ``variables`` holds pack_variables(). The calls do for every thread that has an equal likeness().
    ``pid`` is the process's own id, ``now`` the credentials that the thread was made with.
    ``keep_pdeath_signal`` is false for a process whose new parent, the agent, will soon exit,
    ``with_policy`` when set_policy() follows.
    """
    block_signals_call(batch)
    batch.call(NR_prctl, PR_SET_NAME, variables.at(_V_NAME), name="prctl(PR_SET_NAME)")
    batch.call(NR_personality, state.personality, name="personality")
    restore_sched_calls(batch, state.sched, with_policy=with_policy)
    batch.call(
        NR_prctl, PR_MCE_KILL, PR_MCE_KILL_SET, state.mce_kill, name="prctl(PR_MCE_KILL)"
    )
    if state.io_flusher:
        batch.call(NR_prctl, PR_SET_IO_FLUSHER, 1, name="prctl(PR_SET_IO_FLUSHER)")
    if state.tsc_mode != _PR_TSC_ENABLE:
        batch.call(NR_prctl, PR_SET_TSC, state.tsc_mode, name="prctl(PR_SET_TSC)")
    for which, chosen in zip(_SPECULATIONS, state.speculation, strict=True):
        if chosen:
            # A host that gives no choice is not vulnerable, or protects everybody.
            batch.call(
                NR_prctl, PR_SET_SPECULATION_CTRL, which, chosen, name="prctl(SPECULATION)", check=False
            )
    if not state.cpuid_enabled:
        batch.call(NR_arch_prctl, ARCH_SET_CPUID, 0, name="arch_prctl(ARCH_SET_CPUID)")

    if state.robust_list_length:
        batch.call(
            NR_set_robust_list,
            variables.cell(_V_ROBUST_LIST),
            ROBUST_LIST_HEAD_BYTES,
            name="set_robust_list",
        )
    batch.call(NR_set_tid_address, variables.cell(_V_TID_ADDRESS), name="set_tid_address")
    restore_altstack_call(batch, variables.at(_V_ALTSTACK))
    if state.rseq is not None:
        restore_rseq_call(batch, state.rseq, variables.cell(_V_RSEQ))

    restore_private_pending_calls(batch, pid, state.tid, state.pending)
    restore_creds_calls(batch, state.creds, now)
    if state.pdeath_signal and keep_pdeath_signal:
        batch.call(NR_prctl, PR_SET_PDEATHSIG, state.pdeath_signal, name="prctl(PDEATHSIG)")


def fit_xstate(xstate: bytes, size: int, mask: int) -> bytearray:
    """Return the extended registers in the ``size`` bytes that a host with the components ``mask``
    wants.

    The layout up to the shorter length is the same on both: components have fixed places.

    :raises RestoreError: registers in use do not exist there.
    """
    if missing := components_in_use(xstate) & ~mask:
        raise RestoreError(
            f"Cannot restore extended registers: components {missing:#x} do not exist here",
            hint="choose a host with the same CPU features",
        )
    fitted = bytearray(size)
    length = min(size, len(xstate))
    fitted[:length] = memoryview(xstate)[:length]
    # The kernel compares XCR0 in the software area and rejects bits of components it does not know.
    struct.pack_into("=Q", fitted, _XCR0_OFFSET, mask)
    return fitted


def restore_thread_ptrace(
    tracer: Tracer,
    injector: SkeletonInjector,
    thread: TracedThread,
    state: ThreadState,
    layout: XstateLayout,
) -> None:
    """Set what only a tracer can set, the general registers last; the thread stays stopped.

    ``layout`` is that of the extended registers of any thread of the process.
    A restart block is built first, by making the interrupted call for an instant: memory and files
    must be in place. No batch may run in the thread afterwards.
    """
    regs = user_regs_struct.from_buffer_copy(state.regs)
    if state.restart is not None:
        regs = apply_restart(regs, rearm_restart_block(tracer, injector, thread, state.restart))
        note_restart(thread, regs, state.restart)
    if len(state.xstate) < LEGACY_AND_HEADER_BYTES:
        raise RestoreError(f"Extended registers of thread {state.tid} are cut short")
    fitted = fit_xstate(state.xstate, layout.size, layout.mask)
    ptrace.setregset(thread.tid, NT_X86_XSTATE, fitted)
    thread.set_regs_now(regs, state.sigmask)
