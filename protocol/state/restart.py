"""A thread's interrupted system call that the kernel would have restarted by itself with the time that remains.

The kernel keeps such a restart block inside the thread, where nobody can read it: the section says which call it was
and how long it had to go. Everything else about an interrupted call is in the registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register

NR_ARGS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartState:
    """System call `nr` with `args`, interrupted when it had `remaining_ns` to go (as of the freeze)."""

    nr: int
    args: tuple[int, ...]
    remaining_ns: int

    def __post_init__(self) -> None:
        if len(self.args) != NR_ARGS:
            raise ValueError(f"a system call has {NR_ARGS} arguments, not {len(self.args)}")
        if self.nr < 0 or any(not 0 <= arg < 1 << 64 for arg in self.args):
            raise ValueError(f"system call {self.nr} with arguments {self.args} makes no sense")
        if not 0 <= self.remaining_ns < 1 << 63:
            raise ValueError(f"remaining time of {self.remaining_ns} ns makes no sense")


register("restart", RestartState)
