"""Small shared types of the agent: identifiers, the page size and the obstacle record.

Nothing here may touch the system. Addresses are target addresses unless a name says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple, NewType

Pid = NewType("Pid", int)
"""A process (thread group) id, as the agent's pid namespace sees it."""
Tid = NewType("Tid", int)
"""A thread id, as the agent's pid namespace sees it."""
TargetFd = NewType("TargetFd", int)
"""A file descriptor number in the target, not in the agent."""
Vaddr = NewType("Vaddr", int)
"""A virtual address in the target."""

PAGE_SIZE = 4096
"""Bytes per base page on every machine Ferry supports (checked in the handshake)."""


class Obstacle(NamedTuple):
    """One reason why a process cannot be moved: what it is, where, and what would help."""

    kind: str
    what: str
    detail: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.kind}: {self.what}: {self.detail}"
        return f"{text} ({self.hint})" if self.hint else text
