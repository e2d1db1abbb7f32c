"""The threads: registers, signal state, kernel registrations by address, scheduling, credentials.

``regs`` is the kernel's user_regs_struct, ``xstate`` the standard-format XSAVE image of
NT_X86_XSTATE; both x86_64. Addresses are the target's. The id is the one that the process itself
sees.

Threads travel together, by columns: a process may have thousands, nearly all alike, and what it takes
to write and read them is downtime.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadKind:
    """What threads of a process mostly have in common: fields of ThreadState, and of its rseq area."""

    pdeath_signal: int
    personality: int
    mce_kill: int
    tsc_mode: int
    cpuid_enabled: bool
    io_flusher: bool
    sched: SchedState
    creds: CredState
    speculation: tuple[int, int]
    rseq_size: int
    rseq_sig: int
    rseq_flags: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsState:
    """Some threads, or all; each column has them in the same order.

    ``regs`` has REGS_BYTES of each; ``xstates`` are without the zeros at their end, ``xstate_sizes`` with them.
    ``altstacks`` has sp, flags and size of each, ``robust_lists`` head and length. ``rseq_addrs`` has 0 for none.
    ``kind_of`` is a number in ``kinds``. ``restarts`` and ``pending`` have, by thread id, only those that have any.
    """

    kinds: tuple[ThreadKind, ...]
    kind_of: tuple[int, ...]
    tids: tuple[int, ...]
    names: tuple[bytes, ...]
    regs: bytes
    xstates: tuple[bytes, ...]
    xstate_sizes: tuple[int, ...]
    sigmasks: tuple[int, ...]
    altstacks: tuple[int, ...]
    robust_lists: tuple[int, ...]
    clear_child_tids: tuple[int, ...]
    rseq_addrs: tuple[int, ...]
    restarts: dict[int, RestartState]
    pending: dict[int, tuple[bytes, ...]]

    def __post_init__(self) -> None:
        count = len(self.tids)
        columns = (
            self.kind_of, self.names, self.xstates, self.xstate_sizes, self.sigmasks, self.altstacks[::3],
            self.robust_lists[::2], self.clear_child_tids, self.rseq_addrs,
        )  # fmt: skip
        if any(len(column) != count for column in columns) or len(self.regs) != count * REGS_BYTES:
            raise ValueError(f"columns of {count} threads have different lengths")
        if len(self.altstacks) != 3 * count or len(self.robust_lists) != 2 * count:
            raise ValueError(f"columns of {count} threads are cut short")
        if count and not 0 <= min(self.kind_of) <= max(self.kind_of) < len(self.kinds):
            raise ValueError(f"a thread is of none of {len(self.kinds)} kinds")
        if count and not 0 <= min(self.xstate_sizes) <= max(self.xstate_sizes) <= MAX_XSTATE_BYTES:
            raise ValueError(f"extended registers are {max(self.xstate_sizes)} bytes")
        if strangers := {*self.restarts, *self.pending} - {*self.tids}:
            raise ValueError(f"thread {min(strangers)} is not there")

    @classmethod
    def of(cls, threads: Sequence[ThreadState]) -> ThreadsState:
        """Put threads together."""
        numbers: dict[tuple[object, ...], int] = {}
        kinds: list[ThreadKind] = []
        kind_of = []
        for thread in threads:
            rseq = thread.rseq or _NO_RSEQ
            # What is equal is one object in general; if it is not, there is one kind more.
            key = (
                thread.pdeath_signal, thread.personality, thread.mce_kill, thread.tsc_mode, thread.cpuid_enabled,
                thread.io_flusher, id(thread.sched), id(thread.creds), thread.speculation,
                rseq.size, rseq.sig, rseq.flags,
            )  # fmt: skip
            number = numbers.setdefault(key, len(kinds))
            kind_of.append(number)
            if number == len(kinds):
                kinds.append(_kind_of(thread, rseq))
        return cls(
            kinds=tuple(kinds),
            kind_of=tuple(kind_of),
            tids=tuple([thread.tid for thread in threads]),
            names=tuple([thread.name for thread in threads]),
            regs=b"".join([thread.regs for thread in threads]),
            xstates=tuple([_without_zeros(thread.xstate) for thread in threads]),
            xstate_sizes=tuple([len(thread.xstate) for thread in threads]),
            sigmasks=tuple([thread.sigmask for thread in threads]),
            altstacks=tuple([word for t in threads for word in (t.altstack.sp, t.altstack.flags, t.altstack.size)]),
            robust_lists=tuple([word for t in threads for word in (t.robust_list_head, t.robust_list_length)]),
            clear_child_tids=tuple([thread.clear_child_tid for thread in threads]),
            rseq_addrs=tuple([thread.rseq.addr if thread.rseq else 0 for thread in threads]),
            restarts={thread.tid: thread.restart for thread in threads if thread.restart is not None},
            pending={thread.tid: thread.pending for thread in threads if thread.pending},
        )

    def threads(self) -> list[ThreadState]:
        """Take them apart again.

        :raises ValueError: one of them makes no sense.
        """
        return [self._thread(index) for index in range(len(self.tids))]

    def _thread(self, index: int) -> ThreadState:
        kind = self.kinds[self.kind_of[index]]
        tid = self.tids[index]
        sp, flags, size = self.altstacks[3 * index : 3 * index + 3]
        addr = self.rseq_addrs[index]
        rseq = None
        if addr:
            rseq = RseqState(addr=addr, size=kind.rseq_size, sig=kind.rseq_sig, flags=kind.rseq_flags)
        return ThreadState(
            tid=tid,
            name=self.names[index],
            regs=self.regs[REGS_BYTES * index : REGS_BYTES * (index + 1)],
            restart=self.restarts.get(tid),
            xstate=self.xstates[index].ljust(self.xstate_sizes[index], b"\0"),
            sigmask=self.sigmasks[index],
            altstack=AltStack(sp=sp, flags=flags, size=size),
            pending=self.pending.get(tid, ()),
            robust_list_head=self.robust_lists[2 * index],
            robust_list_length=self.robust_lists[2 * index + 1],
            clear_child_tid=self.clear_child_tids[index],
            rseq=rseq,
            pdeath_signal=kind.pdeath_signal,
            personality=kind.personality,
            mce_kill=kind.mce_kill,
            tsc_mode=kind.tsc_mode,
            cpuid_enabled=kind.cpuid_enabled,
            io_flusher=kind.io_flusher,
            sched=kind.sched,
            creds=kind.creds,
            speculation=kind.speculation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsAheadState:
    """Threads that were idle before the freeze, as they were then: only those count that KeptThreadsState names."""

    threads: ThreadsState


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptThreadsState:
    """The ids of the threads that the freeze found as they were sent ahead."""

    tids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tids or min(self.tids) <= 0 or len({*self.tids}) != len(self.tids):
            raise ValueError(f"{len(self.tids)} ids of threads are not valid")


def _without_zeros(data: bytes) -> bytes:
    """Return it without the zeros at its end: rstrip(), which looks at one byte after the other, but in big steps."""
    end = len(data)
    for zeros in _ZEROS:
        while data.endswith(zeros, 0, end):
            end -= len(zeros)
    return data[:end].rstrip(b"\0")


_ZEROS = (bytes(4096), bytes(1024), bytes(256), bytes(64))
_NO_RSEQ = RseqState(addr=1, size=1, sig=0, flags=0)


def _kind_of(thread: ThreadState, rseq: RseqState) -> ThreadKind:
    return ThreadKind(
        pdeath_signal=thread.pdeath_signal,
        personality=thread.personality,
        mce_kill=thread.mce_kill,
        tsc_mode=thread.tsc_mode,
        cpuid_enabled=thread.cpuid_enabled,
        io_flusher=thread.io_flusher,
        sched=thread.sched,
        creds=thread.creds,
        speculation=thread.speculation,
        rseq_size=rseq.size,
        rseq_sig=rseq.sig,
        rseq_flags=rseq.flags,
    )


register("threads", ThreadsState, version_id=1, minimum_version_id=1)
register("threads_ahead", ThreadsAheadState, version_id=1, minimum_version_id=1)
register("kept_threads", KeptThreadsState, version_id=1, minimum_version_id=1)
