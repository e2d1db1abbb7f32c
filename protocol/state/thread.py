"""One thread: registers, signal state, kernel registrations by address, scheduling, credentials.

``regs`` is the kernel's user_regs_struct, ``xstate`` the standard-format XSAVE image of
NT_X86_XSTATE; both x86_64. Addresses are the target's. The id is the one that the process itself
sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register
from protocol.state.creds import CredState
from protocol.state.restart import RestartState
from protocol.state.sched import SchedState
from protocol.state.signals import AltStack, check_pending

REGS_BYTES = 27 * 8
MIN_XSTATE_BYTES = 512 + 64
MAX_XSTATE_BYTES = 64 * 1024
MAX_NAME_BYTES = 15
"""TASK_COMM_LEN - 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RseqState:
    """A registered rseq area (rseq(2))."""

    addr: int
    size: int
    sig: int
    flags: int

    def __post_init__(self) -> None:
        if self.addr <= 0 or not 0 < self.size <= 1 << 16:
            raise ValueError(f"rseq area {self.addr:#x} of {self.size} bytes makes no sense")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadState:
    """One thread.

    ``restart`` is the restart block to be built for an interrupted call whose rax says so
    (restart_syscall(2)). ``pending`` are the siginfo of the signals queued for this thread alone,
    in order. ``speculation`` are the states of PR_SET_SPECULATION_CTRL for store bypass and indirect
    branches, 0 where the thread has the default.
    """

    tid: int
    name: bytes
    regs: bytes
    restart: RestartState | None
    xstate: bytes
    sigmask: int
    altstack: AltStack
    pending: tuple[bytes, ...]
    robust_list_head: int
    robust_list_length: int
    clear_child_tid: int
    rseq: RseqState | None
    pdeath_signal: int
    personality: int
    mce_kill: int
    tsc_mode: int
    cpuid_enabled: bool
    io_flusher: bool
    sched: SchedState
    creds: CredState
    speculation: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.tid <= 0:
            raise ValueError(f"thread id {self.tid} is not positive")
        if len(self.regs) != REGS_BYTES:
            raise ValueError(f"registers are {len(self.regs)} bytes, not {REGS_BYTES}")
        if not MIN_XSTATE_BYTES <= len(self.xstate) <= MAX_XSTATE_BYTES:
            raise ValueError(f"extended registers are {len(self.xstate)} bytes")
        if len(self.name) > MAX_NAME_BYTES or b"\0" in self.name:
            raise ValueError(f"thread name {self.name!r} is not a name")
        if not 0 <= self.pdeath_signal <= 64:
            raise ValueError(f"parent death signal {self.pdeath_signal} does not exist")
        check_pending(self.pending)


register("thread", ThreadState, version_id=1, minimum_version_id=1)
