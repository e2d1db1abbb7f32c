"""Signal dispositions, queued signals, alternate stacks.

Queued signals are peeked at through ptrace (they stay queued in the source) and queued again from
inside the restored thread: only a thread itself may send a siginfo with a kernel's si_code. The
order on the destination: dispositions first, because setting one to "ignore" discards what is
queued, then the queues while every signal is blocked. Masks have bit n-1 for signal n. Sources:
rt_sigaction(2), rt_sigqueueinfo(2), ptrace(2).
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from agent.kernel.siginfo import ALL_SIGNALS, SIG_SETMASK, SIGSET_BYTES, SS_ONSTACK
from agent.kernel.syscalls import (
    NR_rt_sigaction,
    NR_rt_sigprocmask,
    NR_rt_sigqueueinfo,
    NR_rt_tgsigqueueinfo,
    NR_sigaltstack,
)
from protocol.state.signals import NR_SIGNALS, AltStack, SignalAction

if TYPE_CHECKING:
    from agent.target.batch import Batch, Blob, BlobAddress

# struct sigaction of x86 (arch/x86/include/uapi/asm/signal.h): handler, flags, restorer, mask.
_SIGACTION: Final = struct.Struct("=QQQQ")
# stack_t: ss_sp, ss_flags, padding, ss_size.
_STACK_T: Final = struct.Struct("=QIIQ")

ALTSTACK_BYTES: Final = _STACK_T.size

CATCHABLE: Final = tuple(
    number for number in range(1, NR_SIGNALS + 1) if number not in (signal.SIGKILL, signal.SIGSTOP)
)


def plan_actions(batch: Batch) -> Callable[[], tuple[SignalAction, ...]]:
    """Add the calls that read the dispositions of the process that runs ``batch``.

    All of them: flags and mask of a default action mean little (but for SIGCHLD), yet sigaction(2)
    gives them back, and /proc does not show which there are. It takes a tenth of a millisecond.
    """
    out = batch.buffer(_SIGACTION.size * len(CATCHABLE))
    for index, number in enumerate(CATCHABLE):
        at = out.at(_SIGACTION.size * index)
        batch.call(NR_rt_sigaction, number, 0, at, SIGSET_BYTES, name="rt_sigaction")

    def collect() -> tuple[SignalAction, ...]:
        actions = zip(CATCHABLE, _SIGACTION.iter_unpack(out.read()), strict=True)
        return tuple(
            SignalAction(signal=number, handler=handler, flags=flags, restorer=restorer, mask=mask)
            for number, (handler, flags, restorer, mask) in actions
            if handler or flags or restorer or mask
        )

    return collect


def restore_actions_calls(
    batch: Batch, actions: Iterable[SignalAction], *, inherited: int
) -> None:
    """Add the calls that set all dispositions; ``inherited`` are the signals that the new process
    ignores as yet.
    """
    listed = {action.signal for action in actions}
    default = [number for number in CATCHABLE if inherited >> (number - 1) & 1]
    zeros = batch.data(bytes(_SIGACTION.size))
    for number in default:
        if number not in listed:
            batch.call(NR_rt_sigaction, number, zeros, 0, SIGSET_BYTES, name="rt_sigaction")
    for action in actions:
        raw = _SIGACTION.pack(action.handler, action.flags, action.restorer, action.mask)
        batch.call(
            NR_rt_sigaction, action.signal, batch.data(raw), 0, SIGSET_BYTES, name="rt_sigaction"
        )


def block_signals_call(batch: Batch) -> None:
    """Add the call that blocks every signal in the thread that runs ``batch``, for good.

    What is queued for a thread that is being built must stay queued; threads it makes inherit this.
    """
    mask = batch.data(ALL_SIGNALS.to_bytes(SIGSET_BYTES, "little"))
    batch.call(NR_rt_sigprocmask, SIG_SETMASK, mask, 0, SIGSET_BYTES, name="rt_sigprocmask")


def signal_of(info: bytes) -> int:
    """Return the signal number in a raw siginfo."""
    return int.from_bytes(info[:4], "little")


def code_of(info: bytes) -> int:
    """Return si_code of a raw siginfo."""
    return int.from_bytes(info[8:12], "little", signed=True)


def without_stops(infos: Iterable[bytes]) -> tuple[bytes, ...]:
    """Leave out SIGKILL and SIGSTOP, which cannot be blocked: one would kill, the other stop a
    half-made process.
    """
    return tuple(i for i in infos if signal_of(i) not in (signal.SIGKILL, signal.SIGSTOP))


def restore_shared_pending_calls(batch: Batch, pid: int, pending: Iterable[bytes]) -> None:
    """Queue signals for the whole process; ``batch`` must run in its leader, whose own id is
    ``pid``.
    """
    for info in pending:
        batch.call(
            NR_rt_sigqueueinfo, pid, signal_of(info), batch.data(info), name="rt_sigqueueinfo"
        )


def restore_private_pending_calls(
    batch: Batch, pid: int, tid: int, pending: Iterable[bytes]
) -> None:
    """Queue signals for one thread; ``batch`` must run in it. Ids are the process's own."""
    for info in pending:
        batch.call(
            NR_rt_tgsigqueueinfo,
            pid,
            tid,
            signal_of(info),
            batch.data(info),
            name="rt_tgsigqueueinfo",
        )


def altstack_call(batch: Batch, out: Blob | BlobAddress) -> None:
    """Add the call that has the thread that runs ``batch`` write ALTSTACK_BYTES to ``out``."""
    batch.call(NR_sigaltstack, 0, out, name="sigaltstack")


def unpack_altstack(sp: int, flags: int, _padding: int, size: int) -> AltStack:
    """Return the alternate stack, given the fields of a stack_t."""
    return AltStack(sp=sp, flags=flags & ~SS_ONSTACK, size=size)


def pack_altstack(state: AltStack) -> bytes:
    """Return the ALTSTACK_BYTES that restore_altstack_call() wants."""
    return _STACK_T.pack(state.sp, state.flags & 0xFFFFFFFF, 0, state.size)


def restore_altstack_call(batch: Batch, packed: Blob | BlobAddress) -> None:
    """Add the call that sets the alternate stack; rsp of the thread must be elsewhere."""
    batch.call(NR_sigaltstack, packed, 0, name="sigaltstack")
