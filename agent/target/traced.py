"""One traced thread, and the stops it can be in; agent.target.tracer says what they mean."""

from __future__ import annotations

import enum
from typing import NamedTuple

from agent.kernel import ptrace
from agent.kernel.arch import user_regs_struct
from agent.target.sleepers import SleepSample


class StopKind(enum.Enum):
    """Why a traced thread stopped."""

    EVENT_STOP = "interrupt, group-stop or first stop of a new thread"
    SIGNAL = "signal-delivery-stop"
    SYSCALL = "system call entry or exit"
    CHILD = "the thread made a new thread or process"


class Stop(NamedTuple):
    """One stop: its kind and the signal (of a group-stop: the stopping signal; of an interrupt: SIGTRAP)."""

    kind: StopKind
    sig: int


class TracedThread:
    """One seized thread. ``regs`` and ``sigmask`` are those of the stop, read when first asked for and then kept."""

    def __init__(self, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid
        self.stopped = False
        self.pending_stop_signal = 0
        """Signal taken from its queue but not delivered yet (signal-delivery-stop), or 0."""
        self.in_group_stop = False
        self.parked = False
        """Whether it sleeps in a call, and stops by itself before it runs anything: see agent.target.parking."""
        self.holds_sigstop = False
        """Whether a SIGSTOP of agent.target.hold is queued for the process."""
        self.sample: SleepSample | None = None
        """What the thread was blocked in before it was interrupted, when that matters."""
        self._regs: user_regs_struct | None = None
        self._sigmask: int | None = None
        self._siginfo: bytes | None = None
        self._rseq: list[ptrace.RseqConfiguration | None] = []
        self._regs_changed = False
        self.settled = False
        """Whether restart.settle() has seen this stop."""

    def __repr__(self) -> str:
        return f"<TracedThread {self.tid} {'stopped' if self.stopped else 'running'}>"

    @property
    def regs(self) -> user_regs_struct:
        """The exact registers at the stop, with orig_rax; the same object every time."""
        if self._regs is None:
            self._regs = ptrace.getregs(self.tid)
        return self._regs

    @property
    def sigmask(self) -> int:
        """The blocked signals at the stop (of sigsuspend and the like: those that will be restored)."""
        if self._sigmask is None:
            self._sigmask = ptrace.getsigmask(self.tid)
        return self._sigmask

    @property
    def rseq(self) -> ptrace.RseqConfiguration | None:
        """The registered rseq area at the stop, if any."""
        if not self._rseq:
            self._rseq.append(ptrace.get_rseq_configuration(self.tid))
        return self._rseq[0]

    @property
    def pending_siginfo(self) -> list[bytes]:
        """The signal that left its queue but was not delivered, as raw siginfo: it comes before the queued ones."""
        if not self.pending_stop_signal:
            return []
        if self._siginfo is None:
            self._siginfo = ptrace.getsiginfo(self.tid)
        return [self._siginfo]

    def change_regs(self, regs: user_regs_struct) -> None:
        """Make ``regs`` what the thread goes on with; written when it is let go."""
        self._regs = regs
        self._regs_changed = True

    def set_regs_now(self, regs: user_regs_struct, sigmask: int | None = None) -> None:
        """Write registers, and the signal mask if given, at once; for the destination's final state."""
        ptrace.setregs(self.tid, regs)
        self._regs = regs.copy()
        self._regs_changed = False
        if sigmask is not None:
            ptrace.setsigmask(self.tid, sigmask)
            self._sigmask = sigmask

    def forget(self) -> None:
        """Drop what was read: the thread has run since."""
        self._regs = None
        self._sigmask = None
        self._siginfo = None
        self._rseq.clear()
        self._regs_changed = False
        self.settled = False
        self.pending_stop_signal = 0
        self.in_group_stop = False
