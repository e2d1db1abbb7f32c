"""Signal dispositions and the signals queued for a whole process; the alternate stack of a thread.

A disposition is the kernel's struct sigaction field by field (rt_sigaction(2)), a queued signal
the 128 raw bytes of its siginfo, in queue order. Addresses are the target's; bit n-1 of a mask is
signal n.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register

NR_SIGNALS = 64
SIGINFO_BYTES = 128
MAX_PENDING = 1 << 20
"""RLIMIT_SIGPENDING is about 4 per MiB of memory: a quarter million on a 64 GiB host."""


def check_pending(pending: tuple[bytes, ...]) -> None:
    """Raise ValueError unless each element looks like a siginfo of a signal that can be queued."""
    if len(pending) > MAX_PENDING:
        raise ValueError(f"{len(pending)} queued signals")
    for info in pending:
        if len(info) != SIGINFO_BYTES:
            raise ValueError(f"siginfo has {len(info)} bytes, not {SIGINFO_BYTES}")
        signal = int.from_bytes(info[:4], "little")
        if not 1 <= signal <= NR_SIGNALS:
            raise ValueError(f"siginfo carries signal {signal}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalAction:
    """What a process does on one signal; ``handler`` 0 is SIG_DFL, 1 is SIG_IGN, else an address.
    """

    signal: int
    handler: int
    flags: int
    restorer: int
    mask: int

    def __post_init__(self) -> None:
        if not 1 <= self.signal <= NR_SIGNALS:
            raise ValueError(f"signal {self.signal} is outside 1..{NR_SIGNALS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AltStack:
    """An alternate signal stack (sigaltstack(2)); ``flags`` never has SS_ONSTACK: that follows
    from rsp.
    """

    sp: int
    flags: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalsState:
    """The signal state that all threads share; actions not listed are all zero (SIG_DFL)."""

    actions: tuple[SignalAction, ...]
    pending: tuple[bytes, ...]

    def __post_init__(self) -> None:
        signals = [action.signal for action in self.actions]
        if signals != sorted(set(signals)):
            raise ValueError("signal actions are not sorted by number")
        check_pending(self.pending)


register("signals", SignalsState, version_id=1, minimum_version_id=1)
